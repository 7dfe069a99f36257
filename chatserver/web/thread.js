/** The messages of a conversation, as elements that are kept up to date. */

import { button } from "./dom.js";
import { render } from "./markdown.js";

/** @typedef {import("./client.js").Message} Message */
/** @typedef {import("./client.js").Conversation} Conversation */

const NEAR_PX = 8;

/** @type {Partial<Record<Message["status"], string>>} the endings of replies that are not complete */
const ENDINGS = {
  stopped: "Stopped.",
  failed: "The answer failed.",
  interrupted: "The answer was interrupted.",
};

/**
 * @typedef {object} Actions  each is called only while no reply runs
 * @property {(message: Message) => void} onRetry  for a reply
 * @property {(message: Message) => void} onEdit  for a message of the user
 * @property {(id: string) => void} onStep  for another version of a message
 */

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
  /** the button that shows another version, and the version that it will show; its successor gets the focus */
  /** @type {{id: string, name: string}|null} */
  #stepped = null;

  /**
   * @param {HTMLElement} scroller
   * @param {HTMLElement} thread
   * @param {Actions & {onScroll: (atEnd: boolean) => void}} actions
   */
  constructor(scroller, thread, { onRetry, onEdit, onStep, onScroll }) {
    this.scroller = scroller;
    this.thread = thread;
    /** @type {Actions} */
    this.actions = { onRetry, onEdit, onStep };
    this.onScroll = onScroll;
    thread.addEventListener("click", (event) => this.#clicked(event), { capture: true });
    scroller.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    new ResizeObserver(() => this.follow()).observe(scroller);
    new ResizeObserver(() => this.follow()).observe(thread);
  }

  /** Show another conversation. */
  show(/** @type {Conversation} */ conversation) {
    this.#conversation = conversation;
    this.#stepped = null;
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
    const messages = branch(conversation);
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
      const isAnswer = messages[index - 1]?.role === "user";
      const { id, siblings = [] } = message;
      const shown = JSON.stringify([message.content.length, message.status, message.error, id, isAnswer, siblings.length]);
      if (this.#shown.get(element) !== shown) {
        this.#shown.set(element, shown);
        show(element, message, isAnswer, this.actions);
      }
    });
    while (this.thread.children.length > messages.length) {
      this.thread.lastElementChild?.remove();
    }
    for (const each of this.thread.querySelectorAll("[data-branches]")) {
      const isDisabled = String(conversation.busy || each.hasAttribute("data-end"));
      if (each.getAttribute("aria-disabled") !== isDisabled) {
        each.setAttribute("aria-disabled", isDisabled);
      }
    }
    this.#refocus(messages);
    this.follow();
  }

  /** Refuse the buttons that begin or show a branch while a reply runs. Disabled in earnest, they would lose the focus. */
  #clicked(/** @type {MouseEvent} */ event) {
    const clicked = event.target instanceof Element ? event.target.closest("[data-branches]") : null;
    if (!(clicked instanceof HTMLElement)) {
      return;
    }
    const { busy = true, pending = true } = this.#conversation ?? {};
    if (busy || pending || clicked.hasAttribute("data-end")) {
      event.stopPropagation();
    } else {
      const { id = "", name = "" } = clicked.dataset;
      this.#stepped = id ? { id, name } : null;
    }
  }

  /** Move the focus from the button that was pressed to the one in its place, once its version is shown. */
  #refocus(/** @type {Message[]} */ messages) {
    const stepped = this.#stepped;
    const index = messages.findIndex((message) => message.id === stepped?.id);
    if (!stepped || index === -1) {
      return;
    }
    this.#stepped = null;
    if (document.activeElement === document.body) {
      /** @type {HTMLElement|null} */ (this.thread.children[index].querySelector(`[data-name="${stepped.name}"]`))?.focus();
      // Stay at this message, and follow the end again only if it is in view.
      const { scrollTop, scrollHeight, clientHeight } = this.scroller;
      this.#following = scrollTop > scrollHeight - clientHeight - NEAR_PX;
      this.onScroll(this.#following);
    }
  }
}

/** Return the messages of a conversation up to the one that an accepted turn follows. */
function branch(/** @type {Conversation} */ { messages, accepted }) {
  const parentId = accepted?.parentId;
  const end = messages.findIndex((message) => message.id === parentId) + 1;
  return messages.slice(0, parentId === null ? 0 : end || messages.length);
}

/**
 * @param {HTMLElement} element
 * @param {Message} message
 * @param {boolean} isAnswer  whether it follows a message of the user
 * @param {Actions} actions
 */
function show(element, message, isAnswer, actions) {
  const isKnown = message.role === "user" || message.role === "assistant";
  element.className = `message ${isKnown ? message.role : "other"} ${message.status}`;
  const body = /** @type {HTMLElement|null} */ (element.querySelector(".body")) ?? build(element, message);
  const isGrowing = message.status === "streaming";
  if (message.role === "assistant") {
    render(body, message.content, isGrowing);
  } else if (body.textContent !== message.content) {
    // The same text again would remove a selection.
    body.textContent = message.content;
  }
  body.classList.toggle("waiting", isGrowing && !message.content);
  element.setAttribute("aria-busy", String(isGrowing));
  const foot = /** @type {HTMLElement} */ (element.querySelector(".message-foot"));
  foot.replaceChildren(...footing(message, isAnswer, actions));
}

/**
 * Build a message's parts: speaker, text and footer.
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
  element.replaceChildren(speaker, body, foot);
  return body;
}

/**
 * Return the content of a message's footer: how the reply ended, its versions, and buttons.
 * @param {Message} message
 * @param {boolean} isAnswer
 * @param {Actions} actions
 */
function footing(message, isAnswer, { onRetry, onEdit, onStep }) {
  const ending = ENDINGS[message.status];
  const words = [ending, message.error?.message].filter(Boolean).join(" ");
  const parts = [];
  if (words) {
    const text = document.createElement("span");
    text.className = "ending";
    text.textContent = words;
    parts.push(text);
  }
  if (message.siblings && message.siblings.length > 1) {
    parts.push(versions(message, message.siblings, onStep));
  }
  const hasEnded = message.status !== "streaming" && message.id !== null;
  if (hasEnded && message.role === "assistant" && isAnswer) {
    parts.push(branching(ending ? button("Retry", "retry") : button("Regenerate", "change"), () => onRetry(message)));
  } else if (hasEnded && message.role === "user") {
    parts.push(branching(button("Edit", "change"), () => onEdit(message)));
  }
  if (message.status !== "streaming" && message.content) {
    const copy = button("Copy", "copy");
    copy.setAttribute("aria-label", message.role === "user" ? "Copy message" : "Copy answer");
    copy.dataset.text = message.content;
    parts.push(copy);
  }
  return parts;
}

/**
 * Return the number of a version, between buttons that show the one before and the one after.
 * @param {Message} message
 * @param {string[]} siblings
 * @param {(id: string) => void} onStep
 */
function versions(message, siblings, onStep) {
  const index = siblings.indexOf(message.id ?? "");
  const group = document.createElement("span");
  group.className = "versions";
  group.setAttribute("role", "group");
  group.setAttribute("aria-label", message.role === "user" ? "Versions of the message" : "Versions of the answer");
  const number = document.createElement("span");
  number.textContent = `${index + 1}/${siblings.length}`;
  group.append(step("‹", "Previous version", siblings[index - 1]), number, step("›", "Next version", siblings[index + 1]));
  return group;

  function step(/** @type {string} */ sign, /** @type {string} */ name, /** @type {string|undefined} */ id) {
    const made = branching(button(sign, "step"), () => id && onStep(id));
    made.setAttribute("aria-label", name);
    made.dataset.name = name;
    if (id) {
      made.dataset.id = id;
    } else {
      made.dataset.end = "";
    }
    return made;
  }
}

/**
 * Mark a button that begins or shows another branch; see `Thread.#clicked`.
 * @param {HTMLButtonElement} made
 * @param {() => void} onClick
 */
function branching(made, onClick) {
  made.dataset.branches = "";
  made.addEventListener("click", onClick);
  return made;
}
