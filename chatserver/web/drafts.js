/** Drafts and unanswered messages, stored until the window closes, so that a reload neither loses nor repeats a message. */

/**
 * @typedef {object} Draft
 * @property {string} text  in the message box
 * @property {import("./client.js").Unsent|null} [unsent]  a message that may not have arrived
 */

const PREFIX = "chatserver-typed-";

/**
 * Return the draft of a conversation; an empty one if none is stored.
 * @param {string} name
 * @returns {Draft}
 */
export function loadDraft(name) {
  const kept = attempt(() => sessionStorage.getItem(PREFIX + name));
  return kept ? JSON.parse(kept) : { text: "" };
}

/**
 * Store the draft of a conversation, or delete the stored one if it is empty.
 * @param {string} name
 * @param {Draft} draft
 */
export function keepDraft(name, draft) {
  const isEmpty = !draft.text && !draft.unsent;
  attempt(() => (isEmpty ? sessionStorage.removeItem(PREFIX + name) : sessionStorage.setItem(PREFIX + name, JSON.stringify(draft))));
}

/**
 * Return the result of an action, or null if the browser refuses to store data: by a privacy setting, or for lack of space.
 * @template T
 * @param {() => T} action
 */
function attempt(action) {
  try {
    return action();
  } catch (error) {
    if (error instanceof DOMException) {
      return null;
    }
    throw error;
  }
}
