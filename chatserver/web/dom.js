/** What the page's modules need from the document. */

/** Return the element with this id, which the page must contain. */
export function byId(/** @type {string} */ id) {
  return /** @type {HTMLElement} */ (document.getElementById(id));
}

/**
 * Return a new button.
 * @param {string} label
 * @param {string} className
 * @param {() => void} [onClick]
 */
export function button(label, className, onClick) {
  const made = document.createElement("button");
  made.type = "button";
  made.className = className;
  made.textContent = label;
  if (onClick) {
    made.addEventListener("click", onClick);
  }
  return made;
}

/**
 * Return an icon.
 * @param {string} path  the data of its path, in a square of 24 units
 */
export function icon(path) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
  line.setAttribute("d", path);
  svg.append(line);
  return svg;
}

/** Make a screen reader read a text aloud once it has finished its current sentence. */
export function announce(/** @type {string} */ text) {
  byId("announcer").textContent = text;
}
