/** The chat page: one conversation, the list of all, and a box to write in. */

import { Api, ApiError, Conversation, isId, newId, wellFormed } from "./client.js";
import { keepDraft, loadDraft } from "./drafts.js";
import { Sidebar } from "./sidebar.js";
import { shareConnections } from "./tabs.js";
import { Thread } from "./thread.js";

const STATES = {
  connecting: "Connecting",
  live: "Live",
  reconnecting: "Reconnecting",
  offline: "Offline",
  paused: "Paused: click to resume",
  deleted: "Deleted",
};
const NAME = "chatserver";
const NEW = "New conversation";
const UNTITLED = "Conversation";
const BUSY = "The answer is still being written: wait for its end, or stop it.";
const KEPT = "Your text is kept; sending it again will not post it twice.";
const COPIED_MS = 1500;
const TITLE_POINTS = 80;

const input = /** @type {HTMLTextAreaElement} */ (byId("input"));
const send = /** @type {HTMLButtonElement} */ (byId("send"));
const stop = /** @type {HTMLButtonElement} */ (byId("stop"));
const notice = byId("notice");

// All addresses are relative to the page's own, so that it works under any path.
const api = new Api(new URL(".", location.href));
/** @type {Conversation} */
let conversation;
/** under which the draft is kept: the conversation's id, once that stands in the address bar */
let draftName = "";
let mayHold = false;
let inTrouble = false;
/** what the notice is about, so that it goes when that is settled, and what is left of it once the server answers again */
let told = { about: "", later: "" };
/** @type {Set<string>} the conversations that are being deleted from here */
const deleting = new Set();

const thread = new Thread(byId("scroller"), byId("thread"), {
  onRetry: () => {
    // The button that had the focus goes away.
    input.focus();
    if (!conversation.pending) {
      attempt("retry", () => conversation.retry(), "Your retry may not have got through.");
    }
  },
  onScroll: (atEnd) => {
    byId("latest").hidden = atEnd;
  },
});
const sidebar = new Sidebar(api, { onDelete: remove, onList: showList, onFailure: (error) => tell(error.message) });
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
  draftName = name;
  const draft = loadDraft(name);
  next.unsent = draft.unsent ?? null;
  next.addEventListener("change", () => next === conversation && showConversation());
  next.addEventListener("state", () => next === conversation && showState());
  next.addEventListener("end", (event) => next === conversation && event instanceof CustomEvent && onEnd(event.detail));
  next.addEventListener("sent", (event) => event instanceof CustomEvent && onSent(next, event.detail));
  input.value = draft.text;
  tell(next.unsent && next.unsent.text === draft.text ? KEPT : "", "say");
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
  settled("busy");
  sidebar.refresh();
}

function changedList() {
  sidebar.refresh();
  tellOthers();
}

/** Take what has arrived, now or on an earlier try, out of the box; what was typed after it stays. */
function onSent(/** @type {Conversation} */ to, /** @type {string} */ text) {
  const isShown = to.id === conversation.id;
  const typed = isShown ? input.value : loadDraft(to.id).text;
  const left = typed.startsWith(text) ? typed.slice(text.length) : typed;
  keepDraft(to.id, { text: left });
  if (isShown) {
    conversation.unsent = null;
    input.value = left;
    fit();
    settled("say");
    thread.toEnd();
  }
  changedList();
}

/** Delete a conversation. */
async function remove(/** @type {string} */ id) {
  deleting.add(id);
  const isDone = await attempt(id, () => api.delete(id), `“${sidebar.title(id)}” may not have been deleted.`);
  deleting.delete(id);
  // The reader may have gone elsewhere meanwhile.
  if (isDone && id === conversation.id) {
    leaveDeleted();
  }
  changedList();
}

/** Go from a conversation that is gone to a new one; what was typed goes along. */
function leaveDeleted() {
  const typed = input.value;
  keepDraft(draftName, { text: "" });
  history.replaceState(null, "", location.pathname + location.search);
  route();
  addText(typed);
}

function startNew() {
  // One step back leads to what was there before, however often this is clicked.
  if (location.hash) {
    history.pushState(null, "", location.pathname + location.search);
  }
  route();
}

// -- what is shown ------------------------------------------------------------------------------------------------------

function showConversation() {
  const isEmpty = conversation.messages.length === 0 && !conversation.accepted;
  byId("welcome").hidden = !isEmpty || !conversation.loaded;
  byId("missing").hidden = !conversation.missing;
  byId("thread").hidden = isEmpty;
  byId("awaited").hidden = !isEmpty || conversation.loaded || !isTrouble();
  byId("composer").setAttribute("aria-busy", String(conversation.pending));
  const hadFocus = document.activeElement === send || document.activeElement === stop;
  stop.hidden = !conversation.busy;
  send.hidden = conversation.busy;
  if (hadFocus && document.activeElement === document.body) {
    input.focus();
  }
  settled(conversation.busy ? "retry" : "stop");
  showTitle();
  thread.update();
}

function showList() {
  showTitle();
  if (isId(told.about) && sidebar.title(told.about) === undefined) {
    // It has been deleted after all.
    tell("");
  }
}

function showTitle() {
  const first = conversation.messages[0]?.content ?? conversation.accepted?.text;
  const title = sidebar.title(conversation.id) ?? (first && titleOf(first)) ?? (conversation.loaded ? NEW : UNTITLED);
  byId("title").textContent = title;
  document.title = `${title} · ${NAME}`;
}

/**
 * Return a title made of a first message: what its first line begins with, at most 80 code points, cut between grapheme
 * clusters, so that no character is shown in part.
 */
function titleOf(/** @type {string} */ text) {
  // The rest of a long line is not looked at: this runs with each token.
  const line = text.trim().split("\n")[0].slice(0, 3 * TITLE_POINTS);
  const points = Array.from(line);
  if (points.length <= TITLE_POINTS) {
    return line;
  }
  const end = points.slice(0, TITLE_POINTS).join("").length;
  // Firefox has no Segmenter before version 125.
  const cluster = "Segmenter" in Intl ? new Intl.Segmenter().segment(line).containing(end) : undefined;
  return line.slice(0, cluster?.index || end);
}

function showState() {
  if (conversation.state === "deleted") {
    const isOurDoing = deleting.has(conversation.id);
    leaveDeleted();
    if (!isOurDoing) {
      tell("That conversation has been deleted.");
      changedList();
    }
    return;
  }
  const state = byId("state");
  state.dataset.state = conversation.state;
  state.textContent = STATES[conversation.state];
  if (isTrouble() || (inTrouble && conversation.state === "live")) {
    inTrouble = isTrouble();
    announce(STATES[conversation.state]);
    if (!inTrouble) {
      sidebar.refresh();
    }
  }
  if (conversation.state === "live" && notice.textContent !== told.later) {
    tell(told.later, told.about);
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
 * @param {string} [about]  what it is about; see `settled`
 * @param {string} [later]  what is left to say once the server answers again
 */
function tell(text, about = "", later = text) {
  notice.textContent = text;
  notice.hidden = !text;
  told = { about, later };
}

/** Take the notice away if it is about something that is not so any more. */
function settled(/** @type {string} */ about) {
  if (told.about === about) {
    tell("");
  }
}

// -- writing --------------------------------------------------------------------------------------------------------------

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  say();
});

input.addEventListener("keydown", (event) => {
  // While a character is composed (Japanese, for one), Enter chooses it.
  // (Safari tells of that key only by this old number.)
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229) {
    event.preventDefault();
    say();
  }
});

input.addEventListener("input", () => {
  keep();
  fit();
});

stop.addEventListener("click", (event) => {
  // The second click of a double click on "Send" is none on "Stop".
  if (event.detail < 2) {
    attempt("stop", () => conversation.stop(), "Your stop may not have got through.");
  }
});

for (const suggestion of document.querySelectorAll(".suggestion")) {
  suggestion.addEventListener("click", () => {
    addText(suggestion.textContent ?? "");
    input.focus();
  });
}

function say() {
  const text = wellFormed(input.value);
  const to = conversation;
  if (!text.trim() || to.pending) {
    return;
  }
  if (to.busy) {
    tell(BUSY, "busy");
    return;
  }
  if (draftName !== to.id) {
    // Before it is sent: should the answer be lost, a reload finds the conversation that was begun.
    keepDraft(draftName, { text: "" });
    draftName = to.id;
    history.replaceState(null, "", `#${to.id}`);
  }
  // What is sent stands in the box, so that it is recognised there when it has arrived.
  input.value = text;
  attempt("say", () => to.say(text), KEPT);
  // The message has its key by now.
  keep();
}

/**
 * Do something that may fail, and say so if it does.
 * @param {string} about  what a notice is about; of a deletion, which the reader may see from elsewhere, the id
 * @param {() => Promise<unknown>} action
 * @param {string} unanswered  what to say if it is unknown whether it was done
 */
async function attempt(about, action, unanswered) {
  const of = conversation;
  tell("");
  try {
    await action();
    return true;
  } catch (error) {
    if (!(error instanceof ApiError)) {
      throw error;
    }
    if (of === conversation || isId(about)) {
      const isBusy = error.code === "reply_in_progress";
      const text = error.message.replace(/^\/input /, "Your message ");
      if (error.isUnanswered) {
        tell(`${text} ${unanswered}`, about, unanswered);
      } else {
        tell(text, isBusy ? "busy" : about);
      }
      showConversation();
    }
    return false;
  }
}

/** Add to what is in the box. */
function addText(/** @type {string} */ text) {
  input.value = [input.value, text].filter(Boolean).join("\n\n");
  keep();
  fit();
}

/** Make the box as high as its text. */
function fit() {
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
  thread.follow();
}

/** Have what is in the box outlive a reload, and the key of what was sent with it. */
function keep() {
  keepDraft(draftName, { text: input.value, unsent: conversation.unsent });
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
  // With one of these keys the browser opens it in a tab or a window of its own.
  if (!event.ctrlKey && !event.metaKey && !event.shiftKey) {
    event.preventDefault();
    startNew();
  }
});

function byId(/** @type {string} */ id) {
  return /** @type {HTMLElement} */ (document.getElementById(id));
}
