/** The message box with its draft, and the buttons Send and Stop. */

import { wellFormed } from "./client.js";
import { announce, byId } from "./dom.js";
import { keepDraft, loadDraft } from "./drafts.js";

/** @typedef {import("./client.js").Conversation} Conversation */
/** @typedef {import("./client.js").Message} Message */
/** @typedef {import("./notice.js").Notice} Notice */

const GONE = "The message that you were editing is not shown any more. Your text is kept.";
const BUSY = "The answer is still being written. Wait until it ends, or stop it.";
/** what a notice says of a message that may not have arrived */
export const KEPT = "Your text is kept. Sending it again will not post it twice.";

export class Composer {
  /** @type {Conversation|null} */
  #conversation = null;
  /** under which the draft is kept: the conversation's id, or another name until its first message is sent */
  #draftName = "";
  /** the id of the message that the text is to replace; empty: it is a new message */
  #edited = "";
  /** while a message is edited, the text that was in the box before */
  #aside = "";
  #form = byId("composer");
  #input = /** @type {HTMLTextAreaElement} */ (byId("input"));
  #send = byId("send");
  #stop = byId("stop");
  #editing = byId("editing");

  /**
   * @param {Notice} notice
   * @param {object} actions
   * @param {(text: string, edited?: Message) => void} actions.onSend  must call `say`, or `edit` for the message `edited`,
   *   before it returns, which sets the message's key
   * @param {() => void} actions.onStop
   * @param {() => void} actions.onResize
   */
  constructor(notice, { onSend, onStop, onResize }) {
    this.notice = notice;
    this.onSend = onSend;
    this.onResize = onResize;
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    this.#input.addEventListener("keydown", (event) => {
      // While an input method composes characters (for Japanese, for example), Enter accepts them.
      // Safari marks that key only by the code 229.
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229) {
        event.preventDefault();
        this.#submit();
      } else if (event.key === "Escape" && this.#edited && !event.isComposing) {
        this.#cancel();
      }
    });
    byId("cancel-edit").addEventListener("click", () => this.#cancel());
    this.#input.addEventListener("input", () => {
      this.#keep();
      this.#fit();
    });
    this.#stop.addEventListener("click", (event) => {
      // Ignore the second click of a double click on Send, which Stop has replaced by then.
      if (event.detail < 2) {
        onStop();
      }
    });
  }

  focus() {
    this.#input.focus();
  }

  /**
   * Switch to a conversation: load its draft, and the key of a message that may not have arrived.
   * @param {Conversation} conversation
   * @param {string} draftName
   */
  show(conversation, draftName) {
    const draft = loadDraft(draftName);
    this.#conversation = conversation;
    this.#draftName = draftName;
    conversation.unsent = draft.unsent ?? null;
    this.#input.value = draft.text;
    this.#setEdited(draft.edited ?? "", draft.aside ?? "");
    this.notice.show(draft.unsent && draft.unsent.text === draft.text ? KEPT : "", "say");
    this.#fit();
  }

  /** Show which of the two buttons applies now. */
  update() {
    const { busy = false, pending = false } = this.#conversation ?? {};
    const hadFocus = document.activeElement === this.#send || document.activeElement === this.#stop;
    this.#form.setAttribute("aria-busy", String(pending));
    this.#stop.hidden = !busy;
    this.#send.hidden = busy;
    if (hadFocus && document.activeElement === document.body) {
      this.focus();
    }
  }

  /** Put a message into the box, to send another version of it. What is in the box comes back afterwards. */
  edit(/** @type {Message} */ message) {
    if (!this.#conversation?.pending) {
      this.#setEdited(message.id ?? "", this.#edited ? this.#aside : this.#input.value);
      this.#replace(message.content);
      this.notice.settle("say");
      announce(`${this.#editing.textContent?.trim()} (Escape)`);
      this.focus();
    }
  }

  /** Append a paragraph to the draft. */
  add(/** @type {string} */ text) {
    this.#input.value = paragraphs(this.#input.value, text);
    this.#keep();
    this.#fit();
  }

  /** Forget the draft, because its conversation has been deleted; return its text. */
  discard() {
    keepDraft(this.#draftName, { text: "" });
    return paragraphs(this.#aside, this.#input.value);
  }

  /**
   * Remove a message that has arrived, now or on an earlier attempt, from its draft; keep any text that follows it.
   * @param {Conversation} conversation
   * @param {string} text
   */
  clear(conversation, text) {
    const isShown = conversation.id === this.#conversation?.id;
    const shown = { text: this.#input.value, edited: this.#edited, aside: this.#aside };
    const draft = without(text, isShown ? shown : loadDraft(conversation.id));
    keepDraft(conversation.id, draft);
    if (this.#conversation && isShown) {
      this.#conversation.unsent = null;
      this.#setEdited(draft.edited ?? "", draft.aside ?? "");
      this.#replace(draft.text);
      this.notice.settle("say");
    }
  }

  #submit() {
    const conversation = this.#conversation;
    const text = wellFormed(this.#input.value);
    if (!conversation || !text.trim() || conversation.pending) {
      return;
    }
    if (conversation.busy) {
      this.notice.show(BUSY, "busy");
      return;
    }
    const edited = conversation.messages.find((message) => message.id === this.#edited);
    if (this.#edited && !edited) {
      // Another client has switched to another branch.
      const aside = this.#aside;
      this.#setEdited("", "");
      this.#replace(paragraphs(aside, text));
      this.notice.show(GONE);
      return;
    }
    if (this.#draftName !== conversation.id) {
      keepDraft(this.#draftName, { text: "" });
      this.#draftName = conversation.id;
    }
    // The box must contain exactly the text that is sent, so that `clear` recognises it.
    this.#input.value = text;
    this.onSend(text, edited);
    this.#keep();
  }

  /** Stop editing a message; return to the text that was in the box before. */
  #cancel() {
    const conversation = this.#conversation;
    if (conversation?.unsent?.instead) {
      conversation.unsent = null;
      this.notice.settle("say");
    }
    const aside = this.#aside;
    this.#setEdited("", "");
    this.#replace(aside);
    this.focus();
  }

  /**
   * @param {string} id
   * @param {string} aside
   */
  #setEdited(id, aside) {
    this.#edited = id;
    this.#aside = aside;
    this.#editing.hidden = !id;
    this.#input.setAttribute("aria-describedby", id ? "editing-text hint" : "hint");
  }

  #replace(/** @type {string} */ text) {
    this.#input.value = text;
    this.#keep();
    this.#fit();
  }

  /** Make the draft, and the key of a message that may not have arrived, survive a reload. */
  #keep() {
    const editing = this.#edited ? { edited: this.#edited, aside: this.#aside } : {};
    keepDraft(this.#draftName, { text: this.#input.value, unsent: this.#conversation?.unsent, ...editing });
  }

  /** Make the box as high as its text. */
  #fit() {
    this.#input.style.height = "auto";
    this.#input.style.height = `${this.#input.scrollHeight}px`;
    this.onResize();
  }
}

/**
 * Return a draft without a message that has arrived. If that was an edit, the text from before comes back.
 * @param {string} text
 * @param {import("./drafts.js").Draft} draft
 * @returns {import("./drafts.js").Draft}
 */
function without(text, draft) {
  const { edited, aside = "" } = draft;
  const rest = (/** @type {string} */ typed) => (typed.startsWith(text) ? typed.slice(text.length) : typed);
  if (!edited) {
    return { text: rest(draft.text) };
  }
  if (draft.text.startsWith(text)) {
    return { text: paragraphs(aside, rest(draft.text)) };
  }
  return { text: draft.text, edited, aside: rest(aside) };
}

/** Join texts as paragraphs, without the empty ones. */
function paragraphs(/** @type {string[]} */ ...texts) {
  return texts.filter(Boolean).join("\n\n");
}
