/**
 * Renders the subset of Markdown that models write: paragraphs, headings, lists, quotes, tables, rules, fenced and inline
 * code, bold, italic, links. It only creates elements and text nodes, never HTML from text, so that no text can become
 * markup.
 */

/**
 * @typedef {{kind: "code", language: string, text: string}
 *   | {kind: "heading", level: number, text: string}
 *   | {kind: "list", ordered: boolean, start: number, items: string[]}
 *   | {kind: "table", rows: string[][]}
 *   | {kind: "quote"|"paragraph", text: string}
 *   | {kind: "rule"}} Block
 */

const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*)$/;
const RULE = /^ {0,3}(?:(?:-\s*){3,}|(?:\*\s*){3,}|(?:_\s*){3,})$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?:\s+(.*))?$/;
const ROW = /^\s*\|(.*)\|\s*$/;
const DELIMITER = /^\s*\|(?:\s*:?-+:?\s*\|)+\s*$/;
const DEEPEST = 8;

/**
 * A text or an element to display. `source`, if present, determines the children: an element whose source has not changed
 * is left as it is.
 * @typedef {string | {tag: string, attributes?: Record<string, string>, source?: string, children: () => View[]}} View
 */

/** @type {WeakMap<Node, {shape: string, source?: string}>} tag, attributes and source of each element */
const made = new WeakMap();

/**
 * Show a text in an element. Only nodes that have changed since the last call are touched, so that a growing text costs
 * no more than its last lines, and selection, focus and scroll positions survive.
 * @param {HTMLElement} element
 * @param {string} text
 * @param {boolean} growing  whether the text is incomplete: bold and code without a closing mark are then shown as such
 */
export function render(element, text, growing = false) {
  patch(element, parse(text, growing).map((block, index, all) => view(block, growing && index === all.length - 1, 0)));
}

/**
 * Make an element's children match the views.
 * @param {Node} parent
 * @param {View[]} views
 */
function patch(parent, views) {
  views.forEach((view, index) => {
    const old = parent.childNodes[index];
    const node = typeof view === "string" ? patchText(old, view) : patchElement(old, view);
    if (!old) {
      parent.appendChild(node);
    } else if (node !== old) {
      parent.replaceChild(node, old);
    }
  });
  while (parent.childNodes.length > views.length) {
    parent.lastChild?.remove();
  }
}

/**
 * @param {Node|undefined} old
 * @param {string} text
 */
function patchText(old, text) {
  if (!(old instanceof Text)) {
    return document.createTextNode(text);
  }
  if (text.startsWith(old.data)) {
    old.appendData(text.slice(old.data.length));
  } else {
    old.data = text;
  }
  return old;
}

/**
 * @param {Node|undefined} old
 * @param {Exclude<View, string>} view
 */
function patchElement(old, { tag, attributes = {}, source, children }) {
  const shape = JSON.stringify([tag, attributes]);
  const before = old && made.get(old);
  /** @type {Node} */
  let element;
  if (old && before?.shape === shape) {
    if (source !== undefined && before.source === source) {
      return old;
    }
    element = old;
  } else {
    const created = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      created.setAttribute(name, value);
    }
    element = created;
  }
  made.set(element, { shape, source });
  patch(element, children());
  return element;
}

/**
 * Split a text into blocks.
 * @param {string} text
 * @param {boolean} growing
 * @returns {Block[]}
 */
function parse(text, growing) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  /** @type {Block[]} */
  const blocks = [];
  let at = 0;
  /** Take lines as long as they fit. */
  const take = (/** @type {(line: string) => boolean} */ fits) => {
    const begin = at;
    while (at < lines.length && fits(lines[at])) {
      at += 1;
    }
    return lines.slice(begin, at);
  };
  while (at < lines.length) {
    const line = lines[at];
    const fence = FENCE.exec(line);
    const heading = HEADING.exec(line);
    if (!line.trim()) {
      at += 1;
    } else if (fence) {
      at += 1;
      const end = new RegExp(`^ {0,3}${fence[1][0]}{${fence[1].length},}\\s*$`);
      const code = take((each) => !end.test(each));
      at += 1;
      blocks.push({ kind: "code", language: fence[2].trim().split(/\s/)[0], text: code.join("\n") });
    } else if (heading) {
      at += 1;
      blocks.push({ kind: "heading", level: heading[1].length, text: heading[2].trim().replace(/(?:^|\s)#+$/, "").trimEnd() });
    } else if (RULE.test(line)) {
      at += 1;
      blocks.push({ kind: "rule" });
    } else if (QUOTE.test(line)) {
      blocks.push({ kind: "quote", text: take((each) => QUOTE.test(each)).map((each) => each.replace(QUOTE, "$1")).join("\n") });
    } else if (ITEM.test(line)) {
      blocks.push(takeList(lines[at], take));
    } else if (ROW.test(line) && DELIMITER.test(lines[at + 1] ?? "")) {
      // While the text grows, the last row may be incomplete.
      const isRow = (/** @type {string} */ each) => ROW.test(each) || (growing && at === lines.length - 1 && /^\s*\|/.test(each));
      const rows = take(isRow).filter((_, index) => index !== 1);
      blocks.push({ kind: "table", rows: rows.map(cells) });
    } else {
      at += 1;
      blocks.push({ kind: "paragraph", text: [line, ...take((each) => each.trim() !== "" && !begins(each))].join("\n") });
    }
  }
  return blocks;
}

/** Tell whether a line starts a block in the middle of a paragraph. */
function begins(/** @type {string} */ line) {
  return FENCE.test(line) || HEADING.test(line) || QUOTE.test(line) || RULE.test(line) || /^ {0,3}(?:[-*+]|1[.)])\s+\S/.test(line);
}

/**
 * Take the lines of a list. Each item becomes a text without its indentation.
 * @param {string} first
 * @param {(fits: (line: string) => boolean) => string[]} take
 * @returns {Block}
 */
function takeList(first, take) {
  const ordered = /\d/.test(ITEM.exec(first)?.[2] ?? "");
  /** @type {string[][]} */
  const items = [];
  let indent = 0;
  let blank = false;
  take((given) => {
    const line = given.replace(/^\t+/, (tabs) => "    ".repeat(tabs.length));
    const item = ITEM.exec(line);
    const deeper = /^ */.exec(line)?.[0].length ?? 0;
    if (item && !RULE.test(line) && (items.length === 0 || deeper < indent) && /\d/.test(item[2]) === ordered) {
      indent = item[1].length + item[2].length + 1;
      items.push([item[3] ?? ""]);
    } else if (!line.trim()) {
      items.at(-1)?.push("");
    } else if (deeper >= Math.min(indent, 2) || (!blank && !item && !begins(line))) {
      items.at(-1)?.push(line.slice(Math.min(deeper, indent)));
    } else {
      return false;
    }
    blank = !line.trim();
    return true;
  });
  const start = Number.parseInt(ITEM.exec(first)?.[2] ?? "1", 10);
  return { kind: "list", ordered, start: ordered ? start : 1, items: items.map((lines) => lines.join("\n").trimEnd()) };
}

/** Return the texts of a table's cells. */
function cells(/** @type {string} */ line) {
  return line.trim().replace(/^\||(?<!\\)\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

/**
 * @param {Block} block
 * @param {boolean} open  whether the block is still growing
 * @param {number} depth
 * @returns {View}
 */
function view(block, open, depth) {
  const source = JSON.stringify([block, open]);
  switch (block.kind) {
    case "code":
      return codeView(block, source);
    case "rule":
      return { tag: "hr", source, children: () => [] };
    case "heading":
      // The page itself uses the levels above.
      return { tag: `h${Math.min(block.level + 2, 6)}`, source, children: () => inline(block.text, open) };
    case "table":
      return tableView(block, source);
    case "list": {
      const items = () =>
        block.items.map((text, index, all) => containerView("li", text, open && index === all.length - 1, depth + 1));
      const attributes = block.start === 1 ? undefined : { start: String(block.start) };
      return { tag: block.ordered ? "ol" : "ul", attributes, source, children: items };
    }
    case "quote":
      return containerView("blockquote", block.text, open, depth + 1);
    default:
      return { tag: "p", source, children: () => inline(block.text, open) };
  }
}

/**
 * Return a list item or a quote, which contain blocks. The first paragraph of an item gets no element of its own.
 * @param {"li"|"blockquote"} tag
 * @param {string} text
 * @param {boolean} open
 * @param {number} depth
 * @returns {View}
 */
function containerView(tag, text, open, depth) {
  const children = () =>
    parse(text, open).flatMap((block, index, all) => {
      const isOpen = open && index === all.length - 1;
      return tag === "li" && index === 0 && block.kind === "paragraph" ? inline(block.text, isOpen) : [view(block, isOpen, depth)];
    });
  return { tag, source: `${open} ${text}`, children: depth > DEEPEST ? () => [text] : children };
}

/**
 * @param {{rows: string[][]}} block
 * @param {string} source
 * @returns {View}
 */
function tableView({ rows }, source) {
  const row = (/** @type {string[]} */ texts, /** @type {number} */ index) => ({
    tag: "tr",
    source: JSON.stringify(texts),
    children: () =>
      texts.map((text) => ({ tag: index === 0 ? "th" : "td", children: () => inline(text, false) })),
  });
  const body = () => [{ tag: "tbody", children: () => rows.map(row) }];
  return {
    tag: "div",
    attributes: { class: "table", tabindex: "0", role: "group", "aria-label": "Table" },
    source,
    children: () => [{ tag: "table", children: body }],
  };
}

/**
 * @param {{language: string, text: string}} block
 * @param {string} source
 * @returns {View}
 */
function codeView({ language, text }, source) {
  const button = { type: "button", class: "copy", "aria-label": "Copy code" };
  const caption = () => [
    { tag: "span", children: () => [language || "text"] },
    { tag: "button", attributes: button, children: () => ["Copy"] },
  ];
  // It scrolls horizontally, so it must be reachable by keyboard.
  const frame = { tabindex: "0", role: "group", "aria-label": "Code" };
  const code = () => [{ tag: "code", children: () => [text] }];
  return {
    tag: "figure",
    attributes: { class: "code" },
    source,
    children: () => [
      // With this source, a growing text does not reset the button's label.
      { tag: "figcaption", source: language, children: caption },
      { tag: "pre", attributes: frame, children: code },
    ],
  };
}

// -- within a line ---------------------------------------------------------------------------------------------------

const MARKS = /\\([\\`*_{}[\]()#+\-.!|>~])|(`+)|(\*{1,3}|_{1,3})|\[|\bhttps?:\/\/[^\s<>"'`]+/g;

/**
 * Return a text as plain parts and elements for its marks.
 * @param {string} text
 * @param {boolean} growing
 * @returns {View[]}
 */
function inline(text, growing, depth = 0) {
  /** @type {View[]} */
  const views = [];
  let plain = "";
  const flush = () => {
    if (plain) {
      views.push(plain);
      plain = "";
    }
  };
  /** @type {Set<string>} marks without a closing one further on, so that a text full of them is searched once */
  const unclosed = new Set();
  let at = 0;
  const marks = new RegExp(MARKS);
  for (let mark = marks.exec(text); mark; mark = marks.exec(text)) {
    plain += text.slice(at, mark.index);
    at = mark.index;
    const found = depth < DEEPEST ? markView(text, mark, growing, depth, unclosed) : null;
    if (mark[1]) {
      plain += mark[1];
      at += 2;
    } else if (found) {
      flush();
      views.push(found.view);
      at = found.end;
    } else {
      plain += mark[0];
      at += mark[0].length;
    }
    marks.lastIndex = at;
  }
  plain += text.slice(at);
  if (growing) {
    // A mark at the very end is probably incomplete.
    plain = plain.replace(/[*_`]{1,3}$/, "");
  }
  flush();
  return views;
}

/**
 * Return the element that starts at a mark and the index after it, or null if the mark is plain text.
 * @param {string} text
 * @param {RegExpExecArray} mark
 * @param {boolean} growing
 * @param {number} depth
 * @param {Set<string>} unclosed
 * @returns {{view: View, end: number}|null}
 */
function markView(text, mark, growing, depth, unclosed) {
  const begin = mark.index + mark[0].length;
  if (mark[0] === "[") {
    const link = /\[((?:[^[\]\\]|\\.)*)\]\(<?([^\s()<>]*(?:\([^\s()<>]*\)[^\s()<>]*)*)>?(?:\s"[^"]*")?\)/y;
    link.lastIndex = mark.index;
    const parts = link.exec(text);
    const view = parts && anchor(parts[2], inline(parts[1], false, depth + 1));
    return view ? { view, end: link.lastIndex } : null;
  }
  if (mark[0].startsWith("http")) {
    const address = trimAddress(mark[0]);
    const view = anchor(address, [address]);
    return view ? { view, end: mark.index + address.length } : null;
  }
  if (mark[1] || unclosed.has(mark[0]) || (mark[3] && !opens(text, mark[0], mark.index))) {
    return null;
  }
  const close = mark[2] ? findTicks(text, mark[0], begin) : findClose(text, mark[0], begin);
  if (close === -1) {
    unclosed.add(mark[0]);
    if (!growing) {
      return null;
    }
  }
  const inner = close === -1 ? text.slice(begin) : text.slice(begin, close);
  const view = mark[2] ? inlineCode(inner) : emphasis(inner, mark[0].length, growing && close === -1, depth);
  return { view, end: close === -1 ? text.length : close + mark[0].length };
}

/** Tell whether a mark opens emphasis: text follows it directly, and it is not an underscore inside a word. */
function opens(/** @type {string} */ text, /** @type {string} */ mark, /** @type {number} */ at) {
  return /\S/.test(text[at + mark.length] ?? "") && !(mark[0] === "_" && isWord(text[at - 1]));
}

/** Return the index of the mark that closes emphasis, or -1. */
function findClose(/** @type {string} */ text, /** @type {string} */ mark, /** @type {number} */ begin) {
  const closes = (/** @type {number} */ at) =>
    /\S/.test(text[at - 1]) &&
    !(mark.length === 1 && (text[at - 1] === mark || text[at + 1] === mark)) &&
    !(mark[0] === "_" && isWord(text[at + mark.length]));
  let at = text.indexOf(mark, begin + 1);
  while (at !== -1 && !closes(at)) {
    at = text.indexOf(mark, at + 1);
  }
  return at;
}

/** Return the index of the next run of exactly as many backticks, or -1. */
function findTicks(/** @type {string} */ text, /** @type {string} */ mark, /** @type {number} */ begin) {
  const ticks = new RegExp(`(?<!\`)${mark}(?!\`)`, "g");
  ticks.lastIndex = begin;
  return ticks.exec(text)?.index ?? -1;
}

function isWord(/** @type {string|undefined} */ char) {
  return char !== undefined && /[\p{L}\p{N}]/u.test(char);
}

/** Return an address without trailing punctuation and unmatched closing brackets. */
function trimAddress(/** @type {string} */ address) {
  let end = address.length;
  let unopened = address.split(")").length - address.split("(").length;
  while (/[.,;:!?*_~\])]/.test(address[end - 1]) && (address[end - 1] !== ")" || unopened > 0)) {
    unopened -= address[end - 1] === ")" ? 1 : 0;
    end -= 1;
  }
  return address.slice(0, end);
}

/** @returns {View} */
function inlineCode(/** @type {string} */ text) {
  const line = text.replaceAll("\n", " ");
  const code = line.startsWith(" ") && line.endsWith(" ") && line.trim() ? line.slice(1, -1) : line;
  return { tag: "code", children: () => [code] };
}

/**
 * @param {string} text
 * @param {number} marks  1: italic, 2: bold, 3: both
 * @param {boolean} growing
 * @param {number} depth
 * @returns {View}
 */
function emphasis(text, marks, growing, depth) {
  const children = () => inline(text, growing, depth + 1);
  const both = () => [{ tag: "em", children }];
  return { tag: marks === 1 ? "em" : "strong", children: marks === 3 ? both : children };
}

/**
 * Return a link, or null if its address is invalid or its scheme not allowed.
 * @param {string} address
 * @param {View[]} label
 * @returns {View|null}
 */
function anchor(address, label) {
  let url;
  try {
    url = new URL(address);
  } catch {
    return null;
  }
  if (!["http:", "https:", "mailto:"].includes(url.protocol)) {
    return null;
  }
  return { tag: "a", attributes: { href: url.href, rel: "noopener noreferrer", target: "_blank" }, children: () => label };
}
