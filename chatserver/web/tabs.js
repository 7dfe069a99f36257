/**
 * Which of this browser's windows may hold a stream.
 *
 * A browser opens six connections to a host over HTTP/1.1, for all its windows together; with six streams open, nothing
 * else gets through. So only windows that are seen hold one, and of these only the few that were attended last: shown,
 * focused, clicked or typed into. The others let go, and go on from their position when it is their turn again.
 */

const STREAMS = 4;
const ATTENTION = ["focus", "pointerdown", "keydown", "pageshow"];

/**
 * Say when this window may hold a stream and when it must let go, for as long as the page lives.
 * @param {object} actions
 * @param {() => void} actions.hold
 * @param {() => void} actions.letGo
 * @param {() => void} actions.refresh  another window has changed the list of conversations, or this one is seen again
 * @returns {() => void} call it when this window has changed the list of conversations
 */
export function shareConnections({ hold, letGo, refresh }) {
  const me = `${Math.random()}`;
  const channel = openChannel();
  /** @type {Set<string>} the windows that are seen and were attended after this one */
  const later = new Set();
  /** @type {boolean|undefined} */
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
  return () => channel.postMessage({ list: true });
}

/**
 * Return the line to this browser's other windows; where there is none, each is on its own.
 * @returns {Pick<BroadcastChannel, "postMessage"|"addEventListener">}
 */
function openChannel() {
  try {
    return new BroadcastChannel("chatserver");
  } catch {
    // An old browser has none, another was told to keep windows apart.
    return { postMessage: () => {}, addEventListener: () => {} };
  }
}
