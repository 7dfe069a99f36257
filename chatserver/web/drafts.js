/** What was typed and has not arrived, kept for as long as the window lives: a reload loses nothing and doubles nothing. */

/** @typedef {{text: string, unsent?: import("./client.js").Unsent|null}} Draft  of the box, and of what was sent */

const PREFIX = "chatserver-typed-";

/**
 * Return what was kept for a conversation.
 * @param {string} name
 * @returns {Draft}
 */
export function loadDraft(name) {
  const kept = attempt(() => sessionStorage.getItem(PREFIX + name));
  return kept ? JSON.parse(kept) : { text: "" };
}

/**
 * Keep something for a conversation, instead of what was kept before.
 * @param {string} name
 * @param {Draft} draft
 */
export function keepDraft(name, draft) {
  const isEmpty = !draft.text && !draft.unsent;
  attempt(() => (isEmpty ? sessionStorage.removeItem(PREFIX + name) : sessionStorage.setItem(PREFIX + name, JSON.stringify(draft))));
}

/**
 * Return what an action returns, or null where the browser keeps nothing: it was told so, or has no room left.
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
