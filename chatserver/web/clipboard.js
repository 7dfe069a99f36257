/** The page's Copy buttons. */

import { announce } from "./dom.js";

const COPIED_MS = 1500;

/** Make every `button.copy`, present and future, copy its `data-text` or the code block that contains it. */
export function enableCopyButtons() {
  document.addEventListener("click", async (event) => {
    const button = event.target instanceof Element ? event.target.closest("button.copy") : null;
    if (!(button instanceof HTMLButtonElement)) {
      return;
    }
    const text = button.dataset.text ?? button.closest("figure")?.querySelector("code")?.textContent ?? "";
    button.textContent = (await copy(text)) ? "Copied" : "Not copied";
    announce(button.textContent);
    setTimeout(() => {
      button.textContent = "Copy";
    }, COPIED_MS);
  });
}

/** Put a text on the clipboard; return whether that succeeded. */
async function copy(/** @type {string} */ text) {
  if (navigator.clipboard) {
    return navigator.clipboard.writeText(text).then(() => true, () => false);
  }
  // Over plain HTTP in a local network there is no navigator.clipboard.
  const focused = document.activeElement;
  const area = document.createElement("textarea");
  area.value = text;
  area.className = "visually-hidden";
  document.body.append(area);
  area.select();
  const isCopied = document.execCommand("copy");
  area.remove();
  if (focused instanceof HTMLElement) {
    focused.focus({ preventScroll: true });
  }
  return isCopied;
}
