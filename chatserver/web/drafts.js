/** Drafts and unanswered messages, stored until the window closes, so that a reload neither loses nor repeats a message. */

import { forget, recall, remember } from "./storage.js";

/**
 * @typedef {object} Draft
 * @property {string} text  in the message box
 * @property {import("./client.js").Unsent|null} [unsent]  a message that may not have arrived
 * @property {string} [edited]  the id of the message that the text is to replace
 * @property {string} [aside]  while a message is edited, the text that was in the box before
 */

const PREFIX = "chatserver-typed-";

let isForgotten = false;

/**
 * Return the draft of a conversation; an empty one if none is stored.
 * @param {string} name
 * @returns {Draft}
 */
export function loadDraft(name) {
  const kept = recall(PREFIX + name);
  return kept ? JSON.parse(kept) : { text: "" };
}

/**
 * Store the draft of a conversation, or delete the stored one if it is empty.
 * @param {string} name
 * @param {Draft} draft
 */
export function keepDraft(name, draft) {
  if (!isForgotten) {
    const isEmpty = !draft.text && !draft.unsent && !draft.aside && !draft.edited;
    remember(PREFIX + name, isEmpty ? null : JSON.stringify(draft));
  }
}

/** Delete all stored drafts, and store no more until the page is loaded again: another user may use this window next. */
export function forgetDrafts() {
  isForgotten = true;
  forget(PREFIX);
}
