/** The messages of a conversation, as elements that are kept up to date. */

import { button } from "./dom.js";
import { render } from "./markdown.js";

/** @typedef {import("./client.js").Message} Message */
/** @typedef {import("./client.js").Conversation} Conversation */

const NEAR_PX = 8;

/** @type {Partial<Record<Message["status"], string>>} the endings of replies that can be retried */
const ENDINGS = {
  stopped: "Stopped.",
  failed: "The answer failed.",
  interrupted: "The answer was interrupted.",
};

/** Shows one conversation at a time in the list `thread` inside `scroller`. */
export class Thread {
  /** @type {Conversation|null} */
  #conversation = null;
  /** @type {WeakMap<Message, HTMLElement>} */
  #elements = new WeakMap();
  /** @type {WeakMap<HTMLElement, string>} a key of the content that each element shows */
  #shown = new WeakMap();
  #following = true;
  /** the scroller's position when it was last read or set here */
  #top = 0;
  #scheduled = false;

  /**
   * @param {HTMLElement} scroller
   * @param {HTMLElement} thread
   * @param {{onRetry: () => void, onScroll: (atEnd: boolean) => void}} actions
   */
  constructor(scroller, thread, { onRetry, onScroll }) {
    this.scroller = scroller;
    this.thread = thread;
    this.onRetry = onRetry;
    this.onScroll = onScroll;
    scroller.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    new ResizeObserver(() => this.follow()).observe(scroller);
    new ResizeObserver(() => this.follow()).observe(thread);
  }

  /** Show another conversation. */
  show(/** @type {Conversation} */ conversation) {
    this.#conversation = conversation;
    this.thread.replaceChildren();
    this.scroller.scrollTop = 0;
    this.toEnd();
    this.update();
  }

  /** Show all changes with the next animation frame, which coalesces the tokens that arrive until then. */
  update() {
    if (!this.#scheduled) {
      this.#scheduled = true;
      requestAnimationFrame(() => {
        this.#scheduled = false;
        this.#update();
      });
    }
  }

  /** Scroll to the last message, and keep following it while it grows. */
  toEnd() {
    this.#following = true;
    this.follow();
    this.onScroll(true);
  }

  /** Keep the end in view if the user is there. Call this when the height available for the messages has changed. */
  follow() {
    if (this.#following && this.#hasMessages) {
      this.scroller.scrollTop = this.scroller.scrollHeight;
    }
    this.#top = this.scroller.scrollTop;
  }

  get #hasMessages() {
    return this.thread.childElementCount > 0;
  }

  /**
   * Any movement upwards is the user's, however small: a rule by the distance to the end would drag users back who start
   * to scroll up while an answer grows. The browser itself moves up only when the content shrinks, and then to the end.
   */
  #scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    const end = scrollHeight - clientHeight;
    if (scrollTop < Math.min(this.#top, end)) {
      this.#following = false;
    } else if (scrollTop > this.#top && scrollTop > end - NEAR_PX) {
      this.#following = true;
    }
    this.#top = scrollTop;
    this.onScroll(this.#following || !this.#hasMessages);
  }

  #update() {
    const conversation = this.#conversation;
    if (!conversation) {
      return;
    }
    const messages = [...conversation.messages];
    if (conversation.accepted?.text) {
      messages.push({ id: conversation.accepted.messageId, role: "user", content: conversation.accepted.text, status: "complete" });
    }
    if (conversation.accepted) {
      messages.push({ id: conversation.accepted.replyId, role: "assistant", content: "", status: "streaming" });
    }
    messages.forEach((message, index) => {
      let element = this.#elements.get(message);
      if (!element) {
        element = document.createElement("li");
        this.#elements.set(message, element);
      }
      if (this.thread.children[index] !== element) {
        this.thread.insertBefore(element, this.thread.children[index] ?? null);
      }
      const isLast = index === messages.length - 1;
      const shown = JSON.stringify([message.content.length, message.status, isLast, message.error]);
      if (this.#shown.get(element) !== shown) {
        this.#shown.set(element, shown);
        show(element, message, isLast, this.onRetry);
      }
    });
    while (this.thread.children.length > messages.length) {
      this.thread.lastElementChild?.remove();
    }
    this.follow();
  }
}

/**
 * @param {HTMLElement} element
 * @param {Message} message
 * @param {boolean} isLast
 * @param {() => void} onRetry
 */
function show(element, message, isLast, onRetry) {
  const isKnown = message.role === "user" || message.role === "assistant";
  element.className = `message ${isKnown ? message.role : "other"} ${message.status}`;
  element.hidden = message.status === "superseded" && !message.content && !message.error;
  let body = /** @type {HTMLElement|null} */ (element.querySelector(".body"));
  if (!body || (message.status === "superseded") !== (body.parentElement instanceof HTMLDetailsElement)) {
    body = build(element, message);
  }
  const isGrowing = message.status === "streaming";
  if (message.role !== "assistant") {
    body.textContent = message.content;
  } else {
    render(body, message.content, isGrowing);
  }
  body.classList.toggle("waiting", isGrowing && !message.content);
  element.setAttribute("aria-busy", String(isGrowing));
  const foot = /** @type {HTMLElement} */ (element.querySelector(".message-foot"));
  foot.replaceChildren(...footing(message, isLast, onRetry));
}

/**
 * Build a message's parts: speaker, text and footer. A superseded reply is collapsed.
 * @param {HTMLElement} element
 * @param {Message} message
 */
function build(element, message) {
  const speaker = document.createElement("h2");
  speaker.className = "visually-hidden";
  speaker.textContent = { user: "You", assistant: "Answer" }[message.role] ?? message.role;
  const body = document.createElement("div");
  body.className = "body";
  body.dir = "auto";
  const foot = document.createElement("div");
  foot.className = "message-foot";
  if (message.status === "superseded") {
    const details = document.createElement("details");
    const summary = document.createElement("summary");
    summary.textContent = "Earlier attempt";
    details.append(summary, body, foot);
    element.replaceChildren(speaker, details);
  } else {
    element.replaceChildren(speaker, body, foot);
  }
  return body;
}

/**
 * Return the content of a message's footer: how the reply ended, and buttons.
 * @param {Message} message
 * @param {boolean} isLast
 * @param {() => void} onRetry
 */
function footing(message, isLast, onRetry) {
  const ending = ENDINGS[message.status];
  const words = [ending, message.error?.message].filter(Boolean).join(" ");
  const parts = [];
  if (words) {
    const text = document.createElement("span");
    text.className = "ending";
    text.textContent = words;
    parts.push(text);
  }
  if (ending && isLast) {
    parts.push(button("Retry", "retry", onRetry));
  }
  if (message.status !== "streaming" && message.content) {
    const copy = button("Copy", "copy");
    copy.setAttribute("aria-label", message.role === "user" ? "Copy message" : "Copy answer");
    copy.dataset.text = message.content;
    parts.push(copy);
  }
  return parts;
}
