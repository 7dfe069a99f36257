/** The message box with its draft, and the buttons Send and Stop. */

import { wellFormed } from "./client.js";
import { byId } from "./dom.js";
import { keepDraft, loadDraft } from "./drafts.js";

/** @typedef {import("./client.js").Conversation} Conversation */
/** @typedef {import("./notice.js").Notice} Notice */

const BUSY = "The answer is still being written. Wait until it ends, or stop it.";
/** what a notice says of a message that may not have arrived */
export const KEPT = "Your text is kept. Sending it again will not post it twice.";

export class Composer {
  /** @type {Conversation|null} */
  #conversation = null;
  /** under which the draft is kept: the conversation's id, or another name until its first message is sent */
  #draftName = "";
  #form = byId("composer");
  #input = /** @type {HTMLTextAreaElement} */ (byId("input"));
  #send = byId("send");
  #stop = byId("stop");

  /**
   * @param {Notice} notice
   * @param {object} actions
   * @param {(text: string) => void} actions.onSend  must call `say` before it returns, which sets the message's key
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
      }
    });
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

  /** Append a paragraph to the draft. */
  add(/** @type {string} */ text) {
    this.#input.value = [this.#input.value, text].filter(Boolean).join("\n\n");
    this.#keep();
    this.#fit();
  }

  /** Forget the draft, because its conversation has been deleted; return its text. */
  discard() {
    keepDraft(this.#draftName, { text: "" });
    return this.#input.value;
  }

  /**
   * Remove a message that has arrived, now or on an earlier attempt, from its draft; keep any text that follows it.
   * @param {Conversation} conversation
   * @param {string} text
   */
  clear(conversation, text) {
    const isShown = conversation.id === this.#conversation?.id;
    const draft = isShown ? this.#input.value : loadDraft(conversation.id).text;
    const rest = draft.startsWith(text) ? draft.slice(text.length) : draft;
    keepDraft(conversation.id, { text: rest });
    if (this.#conversation && isShown) {
      this.#conversation.unsent = null;
      this.#input.value = rest;
      this.#fit();
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
    if (this.#draftName !== conversation.id) {
      keepDraft(this.#draftName, { text: "" });
      this.#draftName = conversation.id;
    }
    // The box must contain exactly the text that is sent, so that `clear` recognises it.
    this.#input.value = text;
    this.onSend(text);
    this.#keep();
  }

  /** Make the draft, and the key of a message that may not have arrived, survive a reload. */
  #keep() {
    keepDraft(this.#draftName, { text: this.#input.value, unsent: this.#conversation?.unsent });
  }

  /** Make the box as high as its text. */
  #fit() {
    this.#input.style.height = "auto";
    this.#input.style.height = `${this.#input.scrollHeight}px`;
    this.onResize();
  }
}
