/** The notice above the message box: why an action failed, until that is settled. */

import { ApiError } from "./client.js";

const SIGNED_OUT = "You are signed out. Sign in, then try again.";

export class Notice {
  /** the subject of the notice (an action, or the id of the conversation to delete), which `settle` is called with */
  about = "";
  /** the part of the text that remains true once the server can be reached again */
  #lasting = "";

  /** @param {HTMLElement} element */
  constructor(element) {
    this.element = element;
  }

  /**
   * Show a notice instead of the present one.
   * @param {string} text
   * @param {string} [about]
   * @param {string} [lasting]
   */
  show(text, about = "", lasting = text) {
    this.element.textContent = text;
    this.element.hidden = !text;
    this.about = about;
    this.#lasting = lasting;
  }

  /** Remove the notice, whatever it is about. */
  clear() {
    this.show("");
  }

  /** Remove the notice if it is about this subject. */
  settle(/** @type {string} */ about) {
    if (this.about === about) {
      this.clear();
    }
  }

  /** Reduce the notice to its lasting part, because the server can be reached again. */
  reduce() {
    // A text that is set again would be read aloud again.
    if (this.element.textContent !== this.#lasting) {
      this.show(this.#lasting, this.about);
    }
  }

  /**
   * Run an action that may fail, and show its error.
   * @param {string} about
   * @param {() => Promise<unknown>} action
   * @param {string} unanswered  added to the error if it is unknown whether the server carried out the action
   * @param {() => boolean} isRelevant  asked when the action fails; false: do not show the error
   * @returns {Promise<boolean>} whether the action succeeded
   */
  async attempt(about, action, unanswered, isRelevant) {
    this.clear();
    try {
      await action();
      return true;
    } catch (error) {
      if (!(error instanceof ApiError)) {
        throw error;
      }
      if (isRelevant()) {
        const text = error.message.replace(/^\/input /, "Your message ").replace(/^\/title /, "The title ");
        if (error.isUnanswered) {
          this.show(`${text} ${unanswered}`, about, unanswered);
        } else if (error.isUnauthenticated) {
          this.show(SIGNED_OUT, "signedOut");
        } else {
          this.show(text, error.code === "reply_in_progress" ? "busy" : about);
        }
      }
      return false;
    }
  }
}
