/** The chat page: one conversation, the list of all, and a box to write in. */

import { Api, ApiError, Conversation, isId, newId } from "./client.js";
import { Sidebar } from "./sidebar.js";
import { shareConnections } from "./tabs.js";
import { Thread } from "./thread.js";

const STATES = {
  connecting: "Connecting",
  live: "Live",
  reconnecting: "Reconnecting",
  offline: "Offline",
  paused: "Paused: go on by a click",
  deleted: "Deleted",
};
const NAME = "chatserver";
const NEW = "New conversation";
const BUSY = "The answer is still being written: wait for its end, or stop it.";
const COPIED_MS = 1500;

const input = /** @type {HTMLTextAreaElement} */ (byId("input"));
const send = /** @type {HTMLButtonElement} */ (byId("send"));
const stop = /** @type {HTMLButtonElement} */ (byId("stop"));
const notice = byId("notice");

// All addresses are relative to the page's own, so that it works under any path.
const api = new Api(new URL(".", location.href));
/** @type {Conversation} */
let conversation;
let draftName = "";
let mayHold = false;
let sending = false;
let inTrouble = false;
/** @type {string|null} what the notice says once the server answers again; null: what it says now */
let afterwards = null;

const thread = new Thread(byId("scroller"), byId("thread"), {
  onRetry: () => {
    // The button that had the focus goes away.
    input.focus();
    attempt(() => conversation.retry());
  },
  onScroll: (atEnd) => {
    byId("latest").hidden = atEnd;
  },
});
const sidebar = new Sidebar(api, { onDelete: remove, onList: showTitle });
const tellOthers = shareConnections({
  hold: () => {
    mayHold = true;
    conversation?.open();
  },
  letGo: () => {
    mayHold = false;
    conversation?.pause();
  },
  refresh: () => sidebar.refresh(),
});

route();
addEventListener("hashchange", route);
sidebar.refresh();

// -- which conversation ---------------------------------------------------------------------------------------------------

/** Show the conversation that the address bar names, or a new one. */
function route() {
  const id = location.hash.slice(1).toLowerCase();
  if (!isId(id)) {
    history.replaceState(null, "", location.pathname + location.search);
    follow(new Conversation(api, newId(), { fresh: true }), "new");
  } else if (id !== conversation?.id) {
    follow(new Conversation(api, id, { listed: sidebar.title(id) !== undefined }), id);
  }
}

/**
 * Leave the present conversation for another one.
 * @param {Conversation} next
 * @param {string} name  under which a draft is kept
 */
function follow(next, name) {
  conversation?.pause();
  conversation = next;
  draftName = `${NAME}-draft-${name}`;
  next.addEventListener("change", () => next === conversation && showConversation());
  next.addEventListener("state", () => next === conversation && showState());
  next.addEventListener("end", (event) => next === conversation && event instanceof CustomEvent && onEnd(event.detail));
  tell("");
  input.value = sessionStorage.getItem(draftName) ?? "";
  fit();
  thread.show(next);
  sidebar.select(next.id);
  showConversation();
  showState();
  if (mayHold) {
    next.open();
  }
  // On a touch screen this would open the keyboard.
  if (matchMedia("(hover: hover)").matches) {
    input.focus();
  }
}

function onEnd(/** @type {import("./client.js").Message} */ reply) {
  // Only now is the answer read out: once, as a whole, and not token by token.
  const endings = { stopped: " (stopped)", failed: " (failed)", interrupted: " (interrupted)" };
  announce(`Answer: ${reply.content.replace(/[*`#]/g, "")}${endings[/** @type {"stopped"} */ (reply.status)] ?? ""}`);
  if (notice.textContent === BUSY) {
    tell("");
  }
  sidebar.refresh();
}

function changedList() {
  sidebar.refresh();
  tellOthers();
}

/** Delete a conversation. */
async function remove(/** @type {string} */ id) {
  const isOurs = id === conversation.id;
  if (isOurs) {
    conversation.pause();
  }
  const isDone = await attempt(() => api.delete(id));
  if (isOurs && isDone) {
    startNew();
  } else if (isOurs) {
    conversation.open();
  }
  changedList();
}

function startNew() {
  history.pushState(null, "", location.pathname + location.search);
  route();
}

// -- what is shown ------------------------------------------------------------------------------------------------------

function showConversation() {
  const isEmpty = conversation.messages.length === 0 && !conversation.accepted;
  byId("welcome").hidden = !isEmpty || (isId(location.hash.slice(1)) && conversation.state !== "live");
  byId("thread").hidden = isEmpty;
  byId("awaited").hidden = !isEmpty || !isId(location.hash.slice(1)) || !isTrouble();
  const hadFocus = document.activeElement === send || document.activeElement === stop;
  stop.hidden = !conversation.busy;
  send.hidden = conversation.busy;
  if (hadFocus && document.activeElement === document.body) {
    input.focus();
  }
  showTitle();
  thread.update();
}

function showTitle() {
  const first = conversation.messages[0]?.content ?? conversation.accepted?.text;
  const title = sidebar.title(conversation.id) ?? first?.trim().split("\n")[0].slice(0, 80) ?? NEW;
  byId("title").textContent = title;
  document.title = `${title} · ${NAME}`;
}

function showState() {
  if (conversation.state === "deleted") {
    startNew();
    tell("That conversation has been deleted.");
    changedList();
    return;
  }
  const state = byId("state");
  state.dataset.state = conversation.state;
  state.textContent = STATES[conversation.state];
  if (isTrouble() || (inTrouble && conversation.state === "live")) {
    inTrouble = isTrouble();
    announce(STATES[conversation.state]);
  }
  if (afterwards !== null && conversation.state === "live") {
    tell(afterwards);
  }
  showConversation();
}

function isTrouble() {
  return conversation.state === "reconnecting" || conversation.state === "offline";
}

/** Have a screen reader say something when it has said what it is at. */
function announce(/** @type {string} */ text) {
  byId("announcer").textContent = text;
}

/**
 * Tell the reader what went wrong; an empty text takes the notice away.
 * @param {string} text
 * @param {string|null} [later]  what is left to say once the server answers again
 */
function tell(text, later = null) {
  notice.textContent = text;
  notice.hidden = !text;
  afterwards = later;
}

// -- writing --------------------------------------------------------------------------------------------------------------

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  say();
});

input.addEventListener("keydown", (event) => {
  // While a character is composed (Japanese, for one), Enter chooses it.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    say();
  }
});

input.addEventListener("input", () => {
  keepDraft(draftName, input.value);
  fit();
});

stop.addEventListener("click", (event) => {
  // The second click of a double click on "Send" is none on "Stop".
  if (event.detail < 2) {
    attempt(() => conversation.stop());
  }
});

for (const suggestion of document.querySelectorAll(".suggestion")) {
  suggestion.addEventListener("click", () => {
    input.value = suggestion.textContent ?? "";
    input.focus();
    fit();
  });
}

async function say() {
  const text = input.value;
  const to = conversation;
  const draft = draftName;
  if (!text.trim() || sending) {
    return;
  }
  if (to.busy) {
    tell(BUSY);
    return;
  }
  sending = true;
  byId("composer").setAttribute("aria-busy", "true");
  const isSent = await attempt(() => to.say(text), "Your text is kept; sending it again will not say it twice.");
  sending = false;
  byId("composer").removeAttribute("aria-busy");
  if (!isSent) {
    return;
  }
  keepDraft(draft, "");
  if (to === conversation) {
    // What was typed meanwhile stays.
    input.value = input.value.startsWith(text) ? input.value.slice(text.length) : input.value;
    fit();
    history.replaceState(null, "", `#${to.id}`);
    draftName = `${NAME}-draft-${to.id}`;
    thread.toEnd();
  }
  changedList();
}

/**
 * Do something that may fail, and say so if it does.
 * @param {() => Promise<unknown>} action
 * @param {string} [unanswered]  what to say if it is unknown whether it was done
 */
async function attempt(action, unanswered = "") {
  tell("");
  try {
    await action();
    return true;
  } catch (error) {
    if (!(error instanceof ApiError)) {
      throw error;
    }
    if (error.status === 0) {
      tell(`${error.message} ${unanswered}`, unanswered);
    } else {
      tell(error.message.replace(/^\/input /, "Your message "));
    }
    return false;
  }
}

/** Make the box as high as its text. */
function fit() {
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
  thread.follow();
}

/** Have a text outlive a reload. */
function keepDraft(/** @type {string} */ name, /** @type {string} */ text) {
  if (text) {
    sessionStorage.setItem(name, text);
  } else {
    sessionStorage.removeItem(name);
  }
}

// -- small things -----------------------------------------------------------------------------------------------------

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

/** Put a text on the clipboard; tell whether it is there. */
async function copy(/** @type {string} */ text) {
  if (navigator.clipboard) {
    return navigator.clipboard.writeText(text).then(() => true, () => false);
  }
  // Plain http in a local network has no clipboard of its own.
  const area = document.createElement("textarea");
  area.value = text;
  area.className = "visually-hidden";
  document.body.append(area);
  area.select();
  const isCopied = document.execCommand("copy");
  area.remove();
  return isCopied;
}

byId("latest").addEventListener("click", () => {
  thread.toEnd();
  input.focus();
});

byId("skip").addEventListener("click", (event) => {
  // The address bar's fragment names the conversation.
  event.preventDefault();
  input.focus();
});

byId("new").addEventListener("click", (event) => {
  event.preventDefault();
  startNew();
});

function byId(/** @type {string} */ id) {
  return /** @type {HTMLElement} */ (document.getElementById(id));
}
