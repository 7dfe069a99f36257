/**
 * Shares this browser's connections between its windows.
 *
 * Over HTTP/1.1 a browser opens at most six connections to a host, for all its windows together; with six streams open,
 * no other request gets through. So only visible windows hold a stream, and of these only the few that were used last:
 * shown, focused, clicked or typed into. The others close their streams, and resume from their positions when they are
 * used again.
 */

const STREAMS = 4;
const ATTENTION = ["focus", "pointerdown", "keydown", "pageshow"];

/**
 * Decide, for the lifetime of the page, when this window may hold a stream and when it must close it.
 * @param {object} actions
 * @param {() => void} actions.hold  called when the window may open its stream
 * @param {() => void} actions.letGo  called when the window must close its stream
 * @param {() => void} actions.refresh  called when another window has changed the list of conversations, or this one has
 *   become visible again
 * @returns {{mayHold: () => boolean, announceChange: () => void}} whether the window may hold a stream now; a function to
 *   call when this window has changed the list of conversations
 */
export function shareConnections({ hold, letGo, refresh }) {
  const me = `${Math.random()}`;
  const channel = openChannel("chatserver");
  /** @type {Set<string>} the visible windows that were used after this one */
  const later = new Set();
  /** @type {boolean|undefined} undefined until either action has been called */
  let holding;

  const settle = () => {
    const may = document.visibilityState === "visible" && later.size < STREAMS;
    if (may !== holding) {
      holding = may;
      (may ? hold : letGo)();
    }
  };
  const attend = () => {
    later.clear();
    channel.postMessage({ attended: me });
    settle();
  };
  const leave = () => {
    channel.postMessage({ left: me });
    settle();
  };

  channel.addEventListener("message", ({ data }) => {
    if (data.attended) {
      later.add(data.attended);
    } else if (data.left) {
      later.delete(data.left);
    } else if (document.visibilityState === "visible") {
      refresh();
    }
    settle();
  });
  document.addEventListener("visibilitychange", () => {
    if (document.visibilityState === "visible") {
      attend();
      refresh();
    } else {
      leave();
    }
  });
  addEventListener("pagehide", leave);
  for (const name of ATTENTION) {
    addEventListener(name, (event) => {
      if (later.size > 0 && !(event instanceof KeyboardEvent && event.repeat)) {
        attend();
      }
    }, { capture: true });
  }
  if (document.visibilityState === "visible") {
    attend();
  } else {
    settle();
  }
  return { mayHold: () => holding === true, announceChange: () => channel.postMessage({ list: true }) };
}

/**
 * Return a channel to this browser's other windows, or a stub where the browser has none: then each window decides alone.
 * @param {string} name
 * @returns {Pick<BroadcastChannel, "postMessage"|"addEventListener">}
 */
export function openChannel(name) {
  try {
    return new BroadcastChannel(name);
  } catch {
    // An old browser lacks the class; a privacy setting makes its constructor throw.
    return { postMessage: () => {}, addEventListener: () => {} };
  }
}
