/** The chat page: shows the conversation that the address bar names, and connects the parts of the page with it. */

import { Account } from "./account.js";
import { Api, ApiError, Conversation, isId, newId } from "./client.js";
import { enableCopyButtons } from "./clipboard.js";
import { Composer, KEPT } from "./composer.js";
import { announce, byId } from "./dom.js";
import { Notice } from "./notice.js";
import { Sidebar } from "./sidebar.js";
import { isTrouble, Status } from "./status.js";
import { shareConnections } from "./tabs.js";
import { Thread } from "./thread.js";
import { titleOf } from "./title.js";

const NAME = "chatserver";
const NEW = "New conversation";
const UNTITLED = "Conversation";
const FOREIGN = "That conversation is not yours. Your message has not been sent; you can send it in this new conversation.";
const ENDINGS = { stopped: " (stopped)", failed: " (failed)", interrupted: " (interrupted)" };

// All addresses are relative to the page's own, so that the page works under any path.
const api = new Api(new URL(".", location.href));
/** @type {Conversation} */
let conversation;
/** @type {Set<string>} the conversations that this page is deleting */
const deleting = new Set();
/** what the list shows of the conversation: its chosen title, and its first message */
let listed = "";
/** the id of the version that was last requested */
let requested = "";

const notice = new Notice(byId("notice"));
const status = new Status(byId("state"));
const thread = new Thread(byId("scroller"), byId("thread"), {
  onRetry: retry,
  onEdit: (message) => composer.edit(message),
  onStep: step,
  onScroll: (atEnd) => {
    byId("latest").hidden = atEnd;
  },
});
const composer = new Composer(notice, { onSend: send, onStop: stop, onResize: () => thread.follow() });
const sidebar = new Sidebar(api, { onDelete: remove, onRename: rename, onList: showList, onFailure: onListFailure });
const account = new Account(api, onSignedIn);
const tabs = shareConnections({
  // A signed-out conversation is opened by `onSignedIn`.
  hold: () => conversation?.state === "paused" && conversation.open(),
  letGo: () => conversation?.pause(),
  refresh,
});

enableCopyButtons();

byId("new").addEventListener("click", (event) => {
  // With one of these keys the browser opens the link in a new tab or window.
  if (!event.ctrlKey && !event.metaKey && !event.shiftKey) {
    event.preventDefault();
    startNew();
  }
});
byId("latest").addEventListener("click", () => {
  thread.toEnd();
  composer.focus();
});
byId("skip").addEventListener("click", (event) => {
  // The fragment of the address is the conversation's id.
  event.preventDefault();
  composer.focus();
});
for (const suggestion of document.querySelectorAll(".suggestion")) {
  suggestion.addEventListener("click", () => {
    composer.add(suggestion.textContent ?? "");
    composer.focus();
  });
}

start();

// -- users -----------------------------------------------------------------------------------------------------------

async function start() {
  const checked = account.check();
  // A window without an owner has nothing to hide from another user, and does not wait.
  if (account.isOwned) {
    // The stored draft would replace what is typed meanwhile.
    byId("main").inert = true;
    const mayGoOn = await checked;
    byId("main").inert = false;
    if (!mayGoOn) {
      return;
    }
  }
  route();
  addEventListener("hashchange", route);
  sidebar.refresh();
}

/** Refresh the list, after a check that it is the same user's. */
async function refresh() {
  if (await account.check()) {
    sidebar.refresh();
  }
}

function onSignedIn(/** @type {boolean} */ again) {
  notice.settle("signedOut");
  if (conversation?.state === "signedOut" && tabs.mayHold()) {
    conversation.open();
  }
  if (again) {
    sidebar.refresh();
  }
}

function onListFailure(/** @type {import("./client.js").ApiError} */ error) {
  if (error.isUnauthenticated) {
    account.check();
  } else {
    notice.show(error.message);
  }
}

// -- routing ---------------------------------------------------------------------------------------------------------

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
 * @param {string} draftName
 */
function follow(next, draftName) {
  conversation?.pause();
  conversation = next;
  listed = "";
  next.addEventListener("change", () => next === conversation && showConversation());
  next.addEventListener("state", () => next === conversation && showState());
  next.addEventListener("end", (event) => next === conversation && onEnd(event.detail));
  next.addEventListener("sent", (event) => onSent(next, event.detail));
  composer.show(next, draftName);
  thread.show(next);
  sidebar.select(next.id);
  showConversation();
  showState();
  if (tabs.mayHold()) {
    next.open();
  }
  // On a touch screen the focus would open the keyboard.
  if (matchMedia("(hover: hover)").matches) {
    composer.focus();
  }
}

function startNew() {
  // One step back returns to the conversation, however often this is clicked.
  if (location.hash) {
    history.pushState(null, "", location.pathname + location.search);
  }
  route();
}

/** Go from a conversation that cannot be used to a new one, and take the draft along. */
function moveToNew() {
  const draft = composer.discard();
  history.replaceState(null, "", location.pathname + location.search);
  route();
  composer.add(draft);
}

// -- actions ---------------------------------------------------------------------------------------------------------

/**
 * @param {string} text
 * @param {import("./client.js").Message} [edited]
 */
function send(text, edited) {
  const to = conversation;
  if (!location.hash) {
    // Before the request: if its answer is lost, a reload shows the conversation that it created.
    history.replaceState(null, "", `#${to.id}`);
  }
  attempt("say", () => say(to, text, edited), KEPT);
}

/**
 * @param {Conversation} to
 * @param {string} text
 * @param {import("./client.js").Message} [edited]
 */
async function say(to, text, edited) {
  try {
    await (edited ? to.edit(edited, text) : to.say(text));
  } catch (error) {
    if (error instanceof ApiError && error.status === 404 && to === conversation && !edited) {
      moveToNew();
      notice.show(FOREIGN);
    }
    throw error;
  }
}

function stop() {
  attempt("stop", () => conversation.stop(), "Your stop may not have arrived.");
}

function retry(/** @type {import("./client.js").Message} */ reply) {
  // The button, which has the focus, will be removed.
  composer.focus();
  thread.toEnd();
  attempt("retry", () => conversation.retry(reply.id ?? undefined), "Your retry may not have arrived.");
}

function step(/** @type {string} */ id) {
  requested = id;
  attempt("step", () => conversation.show(id), "The other version may not be shown.");
}

/**
 * @param {string} id
 * @param {string|null} title
 */
async function rename(id, title) {
  const change = () => (id === conversation.id ? conversation.rename(title) : api.rename(id, title));
  await attempt(id, change, `“${sidebar.title(id)}” may not have been renamed.`);
  changedList();
}

async function remove(/** @type {string} */ id) {
  deleting.add(id);
  const isDone = await attempt(id, () => api.delete(id), `“${sidebar.title(id)}” may not have been deleted.`);
  deleting.delete(id);
  // The user may have opened another conversation in the meantime.
  if (isDone && id === conversation.id) {
    moveToNew();
  }
  changedList();
}

/**
 * Run an action on the conversation, or a deletion in the list, and show its error; see `Notice.attempt`.
 * @param {string} about  of a deletion, whose error is shown in every conversation, the id
 * @param {() => Promise<unknown>} action
 * @param {string} unanswered
 */
async function attempt(about, action, unanswered) {
  const of = conversation;
  const isDone = await notice.attempt(about, action, unanswered, () => of === conversation || isId(about));
  showConversation();
  return isDone;
}

// -- events ----------------------------------------------------------------------------------------------------------

function onEnd(/** @type {import("./client.js").Message} */ reply) {
  // A screen reader reads the answer once, as a whole, and not token by token.
  const ending = ENDINGS[/** @type {"stopped"} */ (reply.status)] ?? "";
  announce(`Answer: ${reply.content.replace(/[*`#]/g, "")}${ending}`);
  notice.settle("busy");
  sidebar.refresh();
}

function onSent(/** @type {Conversation} */ to, /** @type {string} */ text) {
  composer.clear(to, text);
  if (to.id === conversation.id) {
    thread.toEnd();
  }
  changedList();
}

function changedList() {
  sidebar.refresh();
  tabs.announceChange();
}

// -- display ---------------------------------------------------------------------------------------------------------

function showConversation() {
  const isEmpty = conversation.messages.length === 0 && !conversation.accepted;
  byId("welcome").hidden = !isEmpty || !conversation.loaded;
  byId("missing").hidden = !conversation.missing;
  byId("thread").hidden = isEmpty;
  byId("awaited").hidden = !isEmpty || conversation.loaded || !isTrouble(conversation.state);
  composer.update();
  notice.settle(conversation.busy ? "retry" : "stop");
  if (conversation.messages.some((message) => message.id === requested)) {
    notice.settle("step");
  }
  const inList = JSON.stringify([conversation.title, conversation.messages[0]?.id]);
  if (conversation.loaded && inList !== listed) {
    if (listed) {
      // Another client has renamed it or shows another branch; the list has the title for that.
      sidebar.refresh();
    }
    listed = inList;
  }
  showTitle();
  thread.update();
}

function showState() {
  if (conversation.state === "deleted") {
    const isOurs = deleting.has(conversation.id);
    moveToNew();
    if (!isOurs) {
      notice.show("That conversation has been deleted.");
      changedList();
    }
    return;
  }
  const hasRecovered = status.show(conversation.state);
  if (conversation.state === "signedOut") {
    account.showSignedOut(conversation.loginUrl);
  } else if (conversation.state === "live") {
    notice.reduce();
    if (hasRecovered || account.isSignedOut) {
      refresh();
    }
  }
  showConversation();
}

function showList() {
  showTitle();
  if (isId(notice.about) && sidebar.title(notice.about) === undefined) {
    // The conversation has been deleted after all.
    notice.clear();
  }
}

function showTitle() {
  const first = conversation.messages[0]?.content ?? conversation.accepted?.text;
  const known = conversation.title ?? sidebar.title(conversation.id) ?? (first && titleOf(first));
  const title = known ?? (conversation.loaded ? NEW : UNTITLED);
  byId("title").textContent = title;
  document.title = `${title} · ${NAME}`;
}
