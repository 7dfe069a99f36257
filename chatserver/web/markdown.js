/**
 * The part of Markdown that models write, as elements: paragraphs, headings, lists, quotes, tables, rules, fenced and
 * inline code, bold, italic, links. It only ever creates elements and text nodes, so that no text can become markup.
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

/** @type {WeakMap<Node, string>} what each block's element was made from */
const sources = new WeakMap();

/**
 * Show a text in an element. Blocks that have not changed since the last time stay, so that a text that grows costs no
 * more than its last block, and what was selected or focused before that stays so.
 * @param {HTMLElement} element
 * @param {string} text
 * @param {boolean} growing  whether more is to come: then bold and code that are still open are shown as such
 */
export function render(element, text, growing = false) {
  const blocks = parse(text);
  blocks.forEach((block, index) => {
    const open = growing && index === blocks.length - 1;
    const source = JSON.stringify([block, open]);
    const old = element.childNodes[index];
    if (old && sources.get(old) === source) {
      return;
    }
    const made = build(block, open, 0);
    if (old) {
      // The code block keeps its element, and with it its button, while its text grows.
      if (!(block.kind === "code" && updateCode(old, block))) {
        old.replaceWith(made);
      }
    } else {
      element.append(made);
    }
    sources.set(element.childNodes[index], source);
  });
  while (element.childNodes.length > blocks.length) {
    element.lastChild?.remove();
  }
}

/**
 * Cut a text into its blocks.
 * @param {string} text
 * @returns {Block[]}
 */
export function parse(text) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  /** @type {Block[]} */
  const blocks = [];
  let at = 0;
  /** Take lines for as long as they fit. */
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
      blocks.push({ kind: "heading", level: heading[1].length, text: heading[2].trim() });
    } else if (RULE.test(line)) {
      at += 1;
      blocks.push({ kind: "rule" });
    } else if (QUOTE.test(line)) {
      blocks.push({ kind: "quote", text: take((each) => QUOTE.test(each)).map((each) => each.replace(QUOTE, "$1")).join("\n") });
    } else if (ITEM.test(line)) {
      blocks.push(takeList(lines[at], take));
    } else if (ROW.test(line) && DELIMITER.test(lines[at + 1] ?? "")) {
      const rows = take((each) => ROW.test(each)).filter((_, index) => index !== 1);
      blocks.push({ kind: "table", rows: rows.map(cells) });
    } else {
      at += 1;
      blocks.push({ kind: "paragraph", text: [line, ...take((each) => each.trim() !== "" && !begins(each))].join("\n") });
    }
  }
  return blocks;
}

/** Tell whether a line begins a block although a paragraph has not ended. */
function begins(/** @type {string} */ line) {
  return FENCE.test(line) || HEADING.test(line) || QUOTE.test(line) || RULE.test(line) || /^ {0,3}(?:[-*+]|1[.)])\s+\S/.test(line);
}

/**
 * Take the lines of a list; each item is a text of its own, freed of its indentation.
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
  take((line) => {
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
  return (ROW.exec(line)?.[1] ?? "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

/**
 * @param {Block} block
 * @param {boolean} growing
 * @param {number} depth
 * @returns {HTMLElement}
 */
function build(block, growing, depth) {
  switch (block.kind) {
    case "code":
      return buildCode(block);
    case "rule":
      return document.createElement("hr");
    case "heading": {
      // The page has the levels above.
      const heading = document.createElement(`h${Math.min(block.level + 2, 6)}`);
      heading.append(...inline(block.text, growing));
      return heading;
    }
    case "table":
      return buildTable(block.rows);
    case "list": {
      const list = document.createElement(block.ordered ? "ol" : "ul");
      if (list instanceof HTMLOListElement && block.start !== 1) {
        list.start = block.start;
      }
      block.items.forEach((text, index) => {
        const item = document.createElement("li");
        fill(item, text, growing && index === block.items.length - 1, depth + 1);
        list.append(item);
      });
      return list;
    }
    case "quote": {
      const quote = document.createElement("blockquote");
      fill(quote, block.text, growing, depth + 1);
      return quote;
    }
    default: {
      const paragraph = document.createElement("p");
      paragraph.append(...inline(block.text, growing));
      return paragraph;
    }
  }
}

/** Put blocks into a list's item or a quote; a single paragraph needs no element of its own in an item. */
function fill(/** @type {HTMLElement} */ element, /** @type {string} */ text, /** @type {boolean} */ growing, /** @type {number} */ depth) {
  if (depth > DEEPEST) {
    element.append(text);
    return;
  }
  const blocks = parse(text);
  blocks.forEach((block, index) => {
    const open = growing && index === blocks.length - 1;
    if (block.kind === "paragraph" && index === 0 && element instanceof HTMLLIElement) {
      element.append(...inline(block.text, open));
    } else {
      element.append(build(block, open, depth));
    }
  });
}

/** @param {string[][]} rows */
function buildTable(rows) {
  const table = document.createElement("table");
  rows.forEach((row, index) => {
    const line = table.insertRow();
    for (const text of row) {
      const cell = document.createElement(index === 0 ? "th" : "td");
      cell.append(...inline(text, false));
      line.append(cell);
    }
  });
  const frame = document.createElement("div");
  frame.className = "table";
  frame.tabIndex = 0;
  frame.setAttribute("role", "group");
  frame.setAttribute("aria-label", "Table");
  frame.append(table);
  return frame;
}

/** @param {{language: string, text: string}} block */
function buildCode({ language, text }) {
  const figure = document.createElement("figure");
  figure.className = "code";
  const caption = document.createElement("figcaption");
  const label = document.createElement("span");
  label.textContent = language || "text";
  const button = document.createElement("button");
  button.type = "button";
  button.className = "copy";
  button.textContent = "Copy";
  button.setAttribute("aria-label", "Copy code");
  caption.append(label, button);
  const pre = document.createElement("pre");
  // It scrolls sideways, so the keyboard must be able to get at it.
  pre.tabIndex = 0;
  pre.setAttribute("role", "group");
  pre.setAttribute("aria-label", "Code");
  const code = document.createElement("code");
  code.textContent = text;
  pre.append(code);
  figure.append(caption, pre);
  return figure;
}

/**
 * @param {Node} element
 * @param {{language: string, text: string}} block
 */
function updateCode(element, { language, text }) {
  const label = element instanceof HTMLElement && element.matches("figure.code") && element.querySelector("figcaption span");
  const code = label && element.querySelector("code");
  if (!code || label.textContent !== (language || "text")) {
    return false;
  }
  const old = code.firstChild;
  if (old instanceof Text && text.startsWith(old.data)) {
    old.appendData(text.slice(old.data.length));
  } else {
    code.textContent = text;
  }
  return true;
}

// -- within a line ----------------------------------------------------------------------------------------------------

const MARKS = /\\([\\`*_{}[\]()#+\-.!|>~])|(`+)|(\*{1,3}|_{1,3})|\[|\bhttps?:\/\/[^\s<>"'`]+/g;

/**
 * Return a text's nodes.
 * @param {string} text
 * @param {boolean} growing
 * @returns {Node[]}
 */
function inline(text, growing, depth = 0) {
  /** @type {Node[]} */
  const nodes = [];
  let plain = "";
  const flush = () => {
    if (plain) {
      nodes.push(document.createTextNode(plain));
      plain = "";
    }
  };
  const add = (/** @type {Node} */ node) => {
    flush();
    nodes.push(node);
  };
  /** @type {Set<string>} marks that nothing further on closes, so that a text full of them is not searched for each */
  const unclosed = new Set();
  let at = 0;
  const marks = new RegExp(MARKS);
  for (let mark = marks.exec(text); mark; mark = marks.exec(text)) {
    plain += text.slice(at, mark.index);
    at = mark.index;
    const found = depth < DEEPEST ? element(text, mark, growing, depth, unclosed) : null;
    if (mark[1]) {
      plain += mark[1];
      at += 2;
    } else if (found) {
      add(found.node);
      at = found.end;
    } else {
      plain += mark[0];
      at += mark[0].length;
    }
    marks.lastIndex = at;
  }
  plain += text.slice(at);
  if (growing) {
    // A mark at the very end is about to open or close something.
    plain = plain.replace(/[*_`]{1,3}$/, "");
  }
  flush();
  return nodes;
}

/**
 * Return the element that a mark begins and where it ends, or null if the mark is just text.
 * @param {string} text
 * @param {RegExpExecArray} mark
 * @param {boolean} growing
 * @param {number} depth
 * @param {Set<string>} unclosed
 * @returns {{node: HTMLElement, end: number}|null}
 */
function element(text, mark, growing, depth, unclosed) {
  const begin = mark.index + mark[0].length;
  if (mark[0] === "[") {
    const link = /\[((?:[^[\]\\]|\\.)*)\]\(<?([^\s()<>]*(?:\([^\s()<>]*\)[^\s()<>]*)*)>?(?:\s"[^"]*")?\)/y;
    link.lastIndex = mark.index;
    const parts = link.exec(text);
    const node = parts && anchor(parts[2], inline(parts[1], false, depth + 1));
    return node ? { node, end: link.lastIndex } : null;
  }
  if (mark[0].startsWith("http")) {
    const address = mark[0].replace(/[.,;:!?*_~)\]]{1,9}$/, "");
    const node = anchor(address, [document.createTextNode(address)]);
    return node ? { node, end: mark.index + address.length } : null;
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
  const node = mark[2] ? inlineCode(inner) : emphasis(inner, mark[0].length, growing && close === -1, depth);
  return { node, end: close === -1 ? text.length : close + mark[0].length };
}

/** Tell whether a mark of emphasis opens: there is text right after it, and it is no underscore inside a word. */
function opens(/** @type {string} */ text, /** @type {string} */ mark, /** @type {number} */ at) {
  return /\S/.test(text[at + mark.length] ?? "") && !(mark[0] === "_" && isWord(text[at - 1]));
}

/** Return where emphasis closes, or -1. */
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

/** Return where a run of just so many backticks is, or -1. */
function findTicks(/** @type {string} */ text, /** @type {string} */ mark, /** @type {number} */ begin) {
  const ticks = new RegExp(`(?<!\`)${mark}(?!\`)`, "g");
  ticks.lastIndex = begin;
  return ticks.exec(text)?.index ?? -1;
}

function isWord(/** @type {string|undefined} */ char) {
  return char !== undefined && /[\p{L}\p{N}]/u.test(char);
}

function inlineCode(/** @type {string} */ text) {
  const code = document.createElement("code");
  const line = text.replaceAll("\n", " ");
  code.textContent = line.startsWith(" ") && line.endsWith(" ") && line.trim() ? line.slice(1, -1) : line;
  return code;
}

/**
 * @param {string} text
 * @param {number} marks  1: italic, 2: bold, 3: both
 * @param {boolean} growing
 * @param {number} depth
 */
function emphasis(text, marks, growing, depth) {
  const element = document.createElement(marks === 1 ? "em" : "strong");
  const innermost = marks === 3 ? element.appendChild(document.createElement("em")) : element;
  innermost.append(...inline(text, growing, depth + 1));
  return element;
}

/**
 * Return a link, or null if its address is none that a link may have.
 * @param {string} address
 * @param {Node[]} label
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
  const link = document.createElement("a");
  link.href = url.href;
  link.rel = "noopener noreferrer";
  link.target = "_blank";
  link.append(...label);
  return link;
}
