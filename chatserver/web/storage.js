/** Texts that are stored until the window closes. Nothing is stored if the browser refuses: by a privacy setting, or for lack of space. */

/** Return a stored text, or null if there is none. */
export function recall(/** @type {string} */ key) {
  return attempt(() => sessionStorage.getItem(key));
}

/**
 * Store a text, or delete the stored one.
 * @param {string} key
 * @param {string|null} text  null: delete it
 */
export function remember(key, text) {
  attempt(() => {
    // First delete: an old text must not stay if there is no space for the new one.
    sessionStorage.removeItem(key);
    if (text !== null) {
      sessionStorage.setItem(key, text);
    }
  });
}

/** Delete all texts whose key starts with a prefix. */
export function forget(/** @type {string} */ prefix) {
  attempt(() => {
    for (const key of Object.keys(sessionStorage)) {
      if (key.startsWith(prefix)) {
        sessionStorage.removeItem(key);
      }
    }
  });
}

/**
 * Return the result of an action, or null if the browser refuses it.
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
