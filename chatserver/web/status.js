/** The state of the stream, in the page's header. */

import { announce } from "./dom.js";

/** @typedef {import("./client.js").State} State */

const LABELS = {
  connecting: "Connecting",
  live: "Live",
  reconnecting: "Reconnecting",
  offline: "Offline",
  signedOut: "Signed out",
  paused: "Paused: click to resume",
  deleted: "Deleted",
};

/** Tell whether the stream is interrupted. */
export function isTrouble(/** @type {State} */ state) {
  return state === "reconnecting" || state === "offline";
}

export class Status {
  /** whether the last announcement was that the stream is interrupted */
  #inTrouble = false;

  /** @param {HTMLElement} element */
  constructor(element) {
    this.element = element;
  }

  /** Show a state; announce an interruption and its end. Return whether an interruption has ended. */
  show(/** @type {State} */ state) {
    this.element.dataset.state = state;
    this.element.textContent = LABELS[state];
    const hasRecovered = this.#inTrouble && state === "live";
    if (isTrouble(state) || hasRecovered) {
      this.#inTrouble = isTrouble(state);
      announce(LABELS[state]);
    }
    return hasRecovered;
  }
}
