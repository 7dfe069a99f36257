/**
 * A client of chatserver's HTTP API for the browser. It needs only fetch, and EventSource unless it is given headers.
 *
 * It is independent of the chat page: copy it into another project as it is, with `client.d.ts` for TypeScript.
 *
 *     const api = new Api("https://chat.example/");
 *     const conversation = new Conversation(api, newId(), { fresh: true });
 *     conversation.addEventListener("change", () => show(conversation.messages, conversation.busy));
 *     conversation.addEventListener("state", () => showState(conversation.state));
 *     conversation.open();
 *     await conversation.say("Hello!");
 *
 * The stream is authoritative for the messages and their order; the answer to a post only confirms that the server has
 * accepted it. Each event carries the position after it, and after a disconnect the stream resumes from the last position:
 * no character of a reply is lost or repeated, however often the connection breaks. A connection that has died without
 * closing is detected by the absence of the server's pings.
 *
 * A conversation is a tree: an edit or a retry begins another branch, and earlier versions are kept. `messages` is the
 * branch that is shown, in every client the same; `siblings` of a message are the versions of it that `show` can show.
 *
 * If the server has users, and its token is not in a cookie of the page's own site, pass a function for the headers. It is
 * called before each request, and the streams are then read by fetch, because EventSource cannot send headers:
 *
 *     const api = new Api("https://chat.example/", { headers: async () => ({ Authorization: `Bearer ${await token()}` }) });
 */

/**
 * @typedef {"complete"|"streaming"|"stopped"|"failed"|"interrupted"|"superseded"} Status
 * Only documents of version 1 have replies that are `superseded`: they were retried. They are ended replies like others.
 *
 * @typedef {object} Message
 * @property {string|null} id  null while a reply streams whose id is not known yet
 * @property {string} role  `user`, `assistant`, or another role that another application has stored
 * @property {string} content
 * @property {Status} status
 * @property {string} [createdAt]  ISO 8601; present in the history, and in the stream for messages of users
 * @property {{code: string, message: string}} [error]  why a reply failed or was interrupted
 * @property {string[]} [siblings]  the ids of all versions of this message, oldest first, its own included; absent if there
 *   is only one, and while the id is null
 *
 * @typedef {object} Summary
 * @property {string} conversationId
 * @property {string} title
 * @property {string} createdAt  ISO 8601
 * @property {string} updatedAt  ISO 8601
 * @property {number} messageCount
 * @property {"idle"|"streaming"} status
 *
 * @typedef {{conversationId: string, messageId: string, replyId: string, lastEventId: string}} Turn
 *
 * @typedef {object} Unsent  a message that may not have arrived
 * @property {string} text
 * @property {string} key  the idempotency key: the server accepts a message once per key, however often it is sent
 * @property {string|null} [after]  the id of the last message before it, if that was known; null: there was none
 * @property {string[]} [instead]  of an edit, the ids of the versions that it replaces
 *
 * @typedef {object} Me  the user who is signed in
 * @property {string} owner  the name by which the server knows the user
 * @property {string} [expiresAt]  ISO 8601; when the credentials expire, if they do
 * @property {string} [logoutUrl]  where the user can sign out
 *
 * @typedef {"connecting"|"live"|"reconnecting"|"offline"|"signedOut"|"paused"|"deleted"} State
 * `signedOut` lasts until `open` is called; `paused` is the state before `open` and after `pause`; `deleted` is final.
 *
 * @typedef {() => Promise<Record<string, string>>} GetHeaders  returns headers to add to a request
 *
 * @typedef {EventSource & {failure?: ApiError, retryMs?: number}} Stream  an EventSource, or a `FetchStream`
 */

const ANSWER_WITHIN_MS = 20_000;
const FIRST_DELAY_MS = 500;
const LONGEST_DELAY_MS = 15_000;
/** the interval of pings on a quiet stream, in seconds, until the server announces its own */
const PING_EVERY_S = 15;
/** A stream that has been silent for this many halves of that interval is considered dead. */
const SILENT_HALVES = 5;
// The values of `readyState`, for programs that have no EventSource.
const CONNECTING = 0;
const OPEN = 1;
const CLOSED = 2;

/** Return a new conversation id: 24 hex digits. */
export function newId() {
  return randomHex(12);
}

/** Tell whether a text has the form of a conversation id. */
export function isId(/** @type {string} */ text) {
  return /^[0-9a-f]{24}$/i.test(text);
}

/**
 * Return a text with each unpaired surrogate replaced by U+FFFD. Keyboards, length limits and other programs split
 * surrogate pairs; UTF-8 cannot encode one half, and servers refuse it.
 */
export function wellFormed(/** @type {string} */ text) {
  // Not String.prototype.toWellFormed, which browsers before 2024 lack. With the flag `u`, a complete pair never matches.
  return text.replace(/\p{Surrogate}/gu, "\ufffd");
}

// Not crypto.randomUUID: it exists only in secure contexts, which plain HTTP in a local network is not.
function randomHex(/** @type {number} */ bytes) {
  return Array.from(crypto.getRandomValues(new Uint8Array(bytes)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** A request that was refused or not answered. `message` is a sentence for users. */
export class ApiError extends Error {
  /**
   * @param {number} status  of HTTP; 0: no answer, so that it is unknown whether the server carried out the request
   * @param {string} code  stable, for programs; `unreachable` if there was no answer
   * @param {string} message
   * @param {number} retryAfterS  how many seconds the server asks to wait; 0: it does not say
   * @param {string} loginUrl  where the user can sign in; empty: the server does not say
   */
  constructor(status, code, message, retryAfterS = 0, loginUrl = "") {
    super(message);
    this.name = "ApiError";
    this.status = status;
    this.code = code;
    this.retryAfterS = retryAfterS;
    this.loginUrl = loginUrl;
  }

  /** Whether the server wants other credentials: there were none, or they are invalid or have expired. */
  get isUnauthenticated() {
    return this.status === 401;
  }

  /** Whether it is unknown if the server carried out the request: there was no answer, or only a proxy's. */
  get isUnanswered() {
    return [0, 502, 504].includes(this.status);
  }
}

/** The API's routes, one method each. Every request rejects with `ApiError` if it fails. */
export class Api {
  /**
   * @param {string|URL} base  the absolute URL of the server's root, with a slash at the end
   * @param {{headers?: GetHeaders}} [options]  `headers`: called before each request; returns headers to add to it. If it
   *   rejects, the request counts as not answered, unless it rejects with an `ApiError`. With it, streams are read by fetch
   */
  constructor(base, { headers } = {}) {
    this.base = base;
    this.headers = headers;
  }

  /**
   * Return the user who is signed in. Rejects with the status 401 if nobody is, and with 404 if the server has no users.
   * @returns {Promise<Me>}
   */
  me() {
    return this.#call("GET", "me");
  }

  /**
   * Return a page of the conversations, the most recently active first.
   * @param {string} [cursor]  `nextCursor` of the previous page
   * @param {number} [limit]  conversations per page
   * @returns {Promise<{conversations: Summary[], nextCursor?: string}>}
   */
  list(cursor, limit = 30) {
    const query = new URLSearchParams({ limit: String(limit), ...(cursor && { cursor }) });
    return this.#call("GET", `chat?${query}`);
  }

  /**
   * Return the messages of a conversation, and the position after them.
   * @param {string} id
   * @param {{limit?: number, before?: string}} [part]  `limit`: return only the newest messages, this many; `before`: only
   *   messages before this message's id
   * @returns {Promise<{messages: Message[], lastEventId: string, title?: string}>} the branch that is shown; `title` only
   *   if a user has chosen one
   */
  history(id, { limit, before } = {}) {
    const query = new URLSearchParams({ ...(limit && { limit: String(limit) }), ...(before && { before }) }).toString();
    return this.#call("GET", `chat/${id}${query && `?${query}`}`);
  }

  /**
   * Post a message. The reply arrives by the stream.
   * @param {string} id  of the conversation; an unknown id starts a new one
   * @param {string} text  sent and stored as `wellFormed` returns it
   * @param {string} key  the idempotency key: the server accepts the same text with the same key once, however often it is
   *   sent
   * @param {string|null} [parentId]  the message that it follows; null: it is a first message; by default the last message
   *   of the branch that is shown
   * @returns {Promise<Turn>}
   */
  say(id, text, key, parentId) {
    const body = { conversationId: id, input: wellFormed(text), ...(parentId !== undefined && { parentId }) };
    return this.#call("POST", "chat", body, { "Idempotency-Key": key });
  }

  /**
   * Stop the running reply; the text so far is kept.
   * @param {string} id
   * @returns {Promise<{status: "stopping"|"idle"}>}
   */
  stop(id) {
    return this.#call("POST", `chat/${id}/stop`);
  }

  /**
   * Request another version of a reply.
   * @param {string} id
   * @param {{messageId?: string, key?: string}} [retry]  `messageId`: the existing reply, by default the last one of the
   *   branch that is shown; `key`: the idempotency key: the server makes one reply per key, however often it is sent
   * @returns {Promise<Turn>}
   */
  retry(id, { messageId, key } = {}) {
    return this.#call("POST", `chat/${id}/retry`, messageId ? { messageId } : {}, key ? { "Idempotency-Key": key } : {});
  }

  /**
   * Show the branch with a message, in all clients; after the message, it follows the newest version at each step.
   * @param {string} id
   * @param {string} messageId
   * @returns {Promise<{conversationId: string, messageId: string}>} the last message of the branch
   */
  show(id, messageId) {
    return this.#call("PUT", `chat/${id}/head`, { messageId });
  }

  /**
   * Choose the title of a conversation.
   * @param {string} id
   * @param {string|null} title  sent and stored as `wellFormed` returns it; null: an automatic one again
   * @returns {Promise<Summary>}
   */
  rename(id, title) {
    return this.#call("PATCH", `chat/${id}`, { title: title === null ? null : wellFormed(title) });
  }

  /**
   * Delete a conversation with all its messages.
   * @param {string} id
   * @returns {Promise<void>}
   */
  delete(id) {
    return this.#call("DELETE", `chat/${id}`);
  }

  /**
   * Return the URL of the stream that starts at a position.
   * @param {string} id
   * @param {string} position
   */
  streamUrl(id, position) {
    return new URL(`chat/stream/${id}?${new URLSearchParams({ lastEventId: position })}`, this.base);
  }

  /**
   * @param {string} method
   * @param {string} path
   * @param {object} [body]
   * @param {Record<string, string>} [headers]
   * @returns {Promise<any>}
   */
  async #call(method, path, body, headers = {}) {
    /** @type {RequestInit} */
    const request = { method, headers, signal: AbortSignal.timeout(ANSWER_WITHIN_MS) };
    if (body) {
      request.headers = { ...headers, "Content-Type": "application/json" };
      request.body = JSON.stringify(body);
    }
    const response = await send(new URL(path, this.base), request, this.headers);
    const text = await read(response);
    if (response.status === 204) {
      return undefined;
    }
    if (!isOfType(response, "application/json")) {
      throw foreign();
    }
    return JSON.parse(text);
  }
}

/**
 * Send a request.
 * @param {URL} url
 * @param {RequestInit} init
 * @param {GetHeaders} [headers]
 * @returns {Promise<Response>} with a status from 200 to 299
 * @throws {ApiError}
 */
async function send(url, init, headers) {
  let response;
  try {
    response = await fetch(url, { ...init, headers: { ...(await headers?.()), ...init.headers } });
  } catch (error) {
    // fetch rejects only if the request could not be sent, the connection broke or our own time limit expired. `headers`
    // usually rejects for the same reasons, while it fetches a token.
    throw error instanceof ApiError ? error : unreachable();
  }
  if (!response.ok) {
    // A proxy's error is not problem+json.
    const isProblem = isOfType(response, "application/problem+json");
    const text = await read(response);
    const problem = isProblem ? JSON.parse(text) : { code: "unknown", detail: `The server answered ${response.status}.` };
    const retryAfterS = Number(response.headers.get("Retry-After")) || 0;
    throw new ApiError(response.status, problem.code, problem.detail, retryAfterS, problem.loginUrl);
  }
  return response;
}

/**
 * Return the body of a response.
 * @param {Response} response
 * @throws {ApiError}
 */
async function read(response) {
  try {
    return await response.text();
  } catch {
    // The connection broke, or our own time limit expired.
    throw unreachable();
  }
}

/**
 * @param {Response} response
 * @param {string} type
 */
function isOfType(response, type) {
  return response.headers.get("Content-Type")?.startsWith(type) ?? false;
}

function unreachable() {
  return new ApiError(0, "unreachable", "The server cannot be reached.");
}

/** Return the error for an answer that is not the server's: for example, the login page of a hotel's network. */
function foreign() {
  return new ApiError(0, "unreachable", "The server cannot be reached: something else answered.");
}

/** A parser of Server-Sent Events, by the HTML standard, section "Interpreting an event stream". */
class EventParser {
  /** the delay before a reconnect in milliseconds, as the server announced it */
  retryMs = 0;
  #line = "";
  #endsWithCR = false;
  #name = "";
  #data = "";
  #id = "";

  /**
   * Return the events that are complete with this text. The text may end anywhere, even between CR and LF.
   * @param {string} text
   */
  take(text) {
    const lines = (this.#endsWithCR && text.startsWith("\n") ? text.slice(1) : text).split(/\r\n|\r|\n/);
    this.#endsWithCR = text ? text.endsWith("\r") : this.#endsWithCR;
    lines[0] = this.#line + lines[0];
    this.#line = lines.pop() ?? "";
    const events = [];
    for (const line of lines) {
      if (line) {
        this.#takeLine(line);
      } else {
        if (this.#data) {
          const init = { data: this.#data.slice(0, -1), lastEventId: this.#id };
          events.push(new MessageEvent(this.#name || "message", init));
        }
        this.#name = "";
        this.#data = "";
      }
    }
    return events;
  }

  #takeLine(/** @type {string} */ line) {
    const [, name, value = ""] = /^([^:]*)(?:: ?(.*))?$/s.exec(line) ?? [];
    if (name === "event") {
      this.#name = value;
    } else if (name === "data") {
      this.#data += `${value}\n`;
    } else if (name === "id" && !value.includes("\0")) {
      this.#id = value;
    } else if (name === "retry" && /^[0-9]+$/.test(value)) {
      this.retryMs = Number(value);
    }
  }
}

/**
 * A stream of events that is read by fetch. It has the part of EventSource's interface that `Conversation` uses, but it
 * never reconnects: it fires `error` once, when it was refused, broken or ended.
 */
class FetchStream extends EventTarget {
  readyState = CONNECTING;
  /** @type {ApiError|undefined} why the stream was not opened */
  failure;
  #parser = new EventParser();
  #abort = new AbortController();

  /**
   * @param {URL} url
   * @param {GetHeaders} headers
   */
  constructor(url, headers) {
    super();
    this.#run(url, headers);
  }

  get retryMs() {
    return this.#parser.retryMs;
  }

  close() {
    this.readyState = CLOSED;
    this.#abort.abort();
  }

  /**
   * @param {URL} url
   * @param {GetHeaders} headers
   */
  async #run(url, headers) {
    try {
      const init = { headers: { Accept: "text/event-stream" }, signal: this.#abort.signal };
      const response = await send(url, { ...init, cache: "no-store" }, headers);
      if (!response.body || !isOfType(response, "text/event-stream")) {
        throw foreign();
      }
      this.readyState = this.readyState === CLOSED ? CLOSED : OPEN;
      this.#fire(new Event("open"));
      await this.#read(response.body.getReader());
    } catch (error) {
      if (!(error instanceof ApiError)) {
        throw error;
      }
      this.failure = error;
    }
    const isClosed = this.readyState === CLOSED;
    this.close();
    if (!isClosed) {
      this.dispatchEvent(new Event("error"));
    }
  }

  /** Fire the events of the body until it ends or breaks. An event without its final blank line is dropped. */
  async #read(/** @type {ReadableStreamDefaultReader<Uint8Array>} */ reader) {
    const decoder = new TextDecoder();
    for (;;) {
      const { done, value } = await reader.read().catch(() => ({ done: true, value: undefined }));
      if (done) {
        return;
      }
      for (const event of this.#parser.take(decoder.decode(value, { stream: true }))) {
        this.#fire(event);
      }
    }
  }

  /** Fire an event, unless a listener of an earlier one has closed the stream. */
  #fire(/** @type {Event} */ event) {
    if (this.readyState !== CLOSED) {
      this.dispatchEvent(event);
    }
  }
}

/**
 * A conversation that its stream keeps up to date.
 *
 * Fires `change` when `messages`, `title`, `accepted`, `busy` or `pending` has changed, `state` when `state` has changed,
 * `sent` (a CustomEvent whose detail is the text) when a message is known to have arrived, and `end` (its detail is the
 * reply) when a reply has ended.
 */
export class Conversation extends EventTarget {
  /** @type {Message[]} the branch that is shown, in order; a reply that is streaming is the last one, and its object changes
   * in place */
  messages = [];
  /** @type {string|null} the title that a user has chosen; null: there is only the automatic one, which the list has */
  title = null;
  /** @type {{text: string, messageId: string, replyId: string, parentId: string|null|undefined}|null} a turn that the server
   * has accepted but the stream has not shown yet; `text` is empty for a retry; `parentId` is the message that the turn
   * follows: null if there is none, undefined if it is the last one */
  accepted = null;
  /** @type {Unsent|null} to survive a reload, the page must store it and assign it again */
  unsent = null;
  /** whether a message, a retry or a switch to another branch has been sent and not answered yet */
  pending = false;
  /** whether the server knew no conversation with this id; the first message creates it */
  missing = false;
  /** where the user can sign in, once the state is `signedOut`; empty: the server does not say */
  loginUrl = "";

  /** @type {State} */
  #state = "paused";
  /** @type {string|null} the position after `messages`; null: the history must be fetched */
  #position = null;
  /** @type {Stream|null} */
  #source = null;
  /** @type {{hasTitle: boolean}|null} the stream has just been opened, and may begin with its title and its `head` */
  #opening = null;
  /** @type {string|null} the last message of a branch that the history was fetched for */
  #sought = null;
  /** @type {{after: string|null, ids: string[]}|null} the versions that were dropped, and the message before them */
  #dropped = null;
  /** @type {string[]} the other versions of the last message, as far as the stream has shown them */
  #others = [];
  /** @type {{messageId: string|undefined, key: string, versions: number}|null} a retry that may not have arrived */
  #retrying = null;
  #known = false;
  #failures = 0;
  #attempt = 0;
  /** @type {ReturnType<typeof setTimeout>|undefined} */
  #timer;
  /** @type {ReturnType<typeof setTimeout>|undefined} */
  #watchdog;
  /** @type {number|null} the interval of pings on a quiet stream, in seconds; null: the server has announced none */
  #pingEveryS = null;
  // These events are only hints; a new connection shows whether the network works.
  #onNetworkChange = () => this.#reconnect();

  /**
   * @param {Api} api
   * @param {string} id
   * @param {{fresh?: boolean, listed?: boolean}} [options]  `fresh`: the id is new, so that there is no history to fetch;
   *   `listed`: the server has listed the conversation, so that it has been deleted if it has no history
   */
  constructor(api, id, { fresh = false, listed = false } = {}) {
    super();
    this.api = api;
    this.id = id;
    this.#known = listed;
    if (fresh) {
      this.#position = this.#beginning;
    }
  }

  /** Whether a reply is expected or streaming. */
  get busy() {
    return this.accepted !== null || this.messages.at(-1)?.status === "streaming";
  }

  /** Whether `messages` is the history that the server has, as far as known. */
  get loaded() {
    return this.#position !== null;
  }

  /** Whether the stream is open, or will be. */
  get #isFollowing() {
    return this.#state === "connecting" || this.#state === "live" || this.#state === "reconnecting";
  }

  /** @returns {State} */
  get state() {
    const waiting = this.#state === "connecting" || this.#state === "reconnecting";
    return waiting && !navigator.onLine ? "offline" : this.#state;
  }

  /**
   * Fetch the history, if necessary, and follow the stream until `pause`. If the user is signed out, the state becomes
   * `signedOut`, and there are no more attempts until this is called again, or a message or retry is accepted.
   */
  open() {
    if (this.#state === "paused" || this.#state === "signedOut") {
      addEventListener("online", this.#onNetworkChange);
      addEventListener("offline", this.#onNetworkChange);
      this.#setState("connecting");
      this.#connect();
    }
  }

  /** Close the stream; `open` resumes from the same position. */
  pause() {
    if (this.#state !== "deleted" && this.#state !== "signedOut") {
      this.#letGo("paused");
    }
  }

  /**
   * Send a message. After a failure, sending the same text again does not post it twice.
   * @param {string} typed  sent, and reported by `sent`, as `wellFormed` returns it
   * @throws {ApiError}
   */
  async say(typed) {
    await this.#send(typed);
  }

  /**
   * Send another version of a message, which begins a branch of its own. After a failure, as `say`.
   * @param {Message} message  one of `messages`
   * @param {string} typed
   * @throws {ApiError}
   * @throws {RangeError} if the message is not shown any more
   */
  async edit(message, typed) {
    const index = this.messages.findIndex((each) => each.id === message.id);
    if (index === -1 || message.id === null) {
      throw new RangeError("The message is not shown.");
    }
    const instead = this.messages[index].siblings ?? [message.id];
    await this.#send(typed, { after: this.messages[index - 1]?.id ?? null, instead });
  }

  /**
   * Request another version of a reply. After a failure, repeating the request does not make two.
   * @param {string} [messageId]  the existing reply; by default the last one
   * @throws {ApiError}
   */
  async retry(messageId) {
    const target = messageId ?? this.messages.findLast((each) => each.role === "assistant")?.id ?? undefined;
    const earlier = this.#retrying?.messageId === target ? this.#retrying : null;
    const retrying = earlier ?? { messageId: target, key: randomHex(16), versions: this.#versions(target) };
    this.#retrying = retrying;
    const { key } = retrying;
    let isUnknown = false;
    try {
      await this.#request(
        () => this.api.retry(this.id, target ? { messageId: target, key } : { key }),
        (turn) => this.#accept(turn, "", turn.messageId, earlier !== null),
      );
    } catch (error) {
      if (!(error instanceof ApiError)) {
        throw error;
      }
      isUnknown = error.status === 0 || error.status >= 500;
      if (!isUnknown || this.#retrying === retrying) {
        throw error;
      }
      // The answer was lost, but the stream has shown the new reply.
    } finally {
      if (!isUnknown && this.#retrying === retrying) {
        this.#retrying = null;
      }
    }
  }

  /**
   * Show another branch, in all clients: the one with this message. `messages` changes when the stream reports it.
   * @param {string} messageId  usually one of the `siblings` of a message
   * @throws {ApiError}
   */
  async show(messageId) {
    await this.#request(() => this.api.show(this.id, messageId));
  }

  /**
   * Choose the title of the conversation.
   * @param {string|null} title  null: an automatic one again
   * @throws {ApiError}
   */
  async rename(title) {
    await this.#ask(() => this.api.rename(this.id, title));
    // An open stream reports it, in the right order with the changes of other clients.
    if (this.#state !== "live") {
      this.title = title === null ? null : wellFormed(title);
      this.#changed();
    }
  }

  /**
   * Stop the running reply.
   * @throws {ApiError}
   */
  async stop() {
    await this.#ask(() => this.api.stop(this.id));
  }

  /** The position before the first message, as the API defines it. */
  get #beginning() {
    return `${this.id}-0`;
  }

  /**
   * @param {string} typed
   * @param {{after: string|null, instead: string[]}} [edit]
   */
  async #send(typed, edit) {
    // Normalise here as well: `unsent` is compared with the texts in the stream and the history.
    const text = wellFormed(typed);
    const old = this.unsent;
    const isRepeated = old?.text === text && (edit ? old.instead !== undefined && old.after === edit.after : !old.instead);
    if (!isRepeated) {
      const after = this.loaded ? { after: this.messages.findLast((each) => each.id !== null)?.id ?? null } : {};
      this.unsent = { text, key: randomHex(16), ...(edit ?? after) };
    }
    const unsent = /** @type {Unsent} */ (this.unsent);
    try {
      await this.#request(
        () => this.api.say(this.id, text, unsent.key, edit?.after),
        (turn) => this.#accept(turn, text, edit?.after, isRepeated),
      );
    } catch (error) {
      if (!(error instanceof ApiError) || this.unsent === unsent) {
        throw error;
      }
      // The answer was lost, but the stream has shown that the message arrived.
    }
    if (this.unsent === unsent) {
      this.#sent(text);
    }
  }

  /**
   * Send a request, and be pending until it is answered.
   * @template T
   * @param {() => Promise<T>} request
   * @param {(answer: T) => void} [onAnswer]
   */
  async #request(request, onAnswer) {
    this.pending = true;
    this.#changed();
    try {
      const answer = await this.#ask(request);
      onAnswer?.(answer);
    } finally {
      this.pending = false;
      this.#changed();
    }
  }

  /** Return how many versions of a message there are; 0 if it is not shown. */
  #versions(/** @type {string|undefined} */ id) {
    const message = this.#find(id ?? null);
    return message ? (message.siblings?.length ?? 1) : 0;
  }

  #sent(/** @type {string} */ text) {
    this.unsent = null;
    this.dispatchEvent(new CustomEvent("sent", { detail: text }));
  }

  /**
   * @template T
   * @param {() => Promise<T>} request
   */
  async #ask(request) {
    try {
      const answer = await request();
      if (this.#state === "signedOut") {
        this.open();
      }
      return answer;
    } catch (error) {
      if (error instanceof ApiError && error.status === 0 && this.#state === "live") {
        // The connection is dead, and the stream has not noticed it yet.
        this.#reconnect();
      } else if (error instanceof ApiError && error.isUnauthenticated && this.#isFollowing) {
        this.#checkSignedIn();
      }
      throw error;
    }
  }

  /**
   * Note an accepted turn, unless the stream, which may be ahead of the answer, has shown it already.
   * @param {Turn} turn
   * @param {string} text  empty for a retry
   * @param {string|null|undefined} parentId
   * @param {boolean} isRepeated  whether an earlier request with the same key was not answered
   */
  #accept(turn, text, parentId, isRepeated) {
    const isRetry = text === "";
    const last = this.messages.at(-1);
    if (this.#find(turn.replyId)) {
      return;
    }
    if (last?.status === "streaming" && last.id === null && this.messages.at(-2)?.id === turn.messageId) {
      this.#identify(last, turn.replyId);
    } else if (isRetry || !this.#find(turn.messageId)) {
      this.accepted = { text, messageId: turn.messageId, replyId: turn.replyId, parentId };
      if (isRepeated) {
        // The earlier request may have been carried out on a branch that is not shown any more, so that the stream will
        // not show this turn: the history decides.
        this.#fetch();
      }
    }
  }

  // -- connection ----------------------------------------------------------------------------------------------------

  /** Open a new stream from the last position, after the history if there is none. */
  async #connect() {
    const attempt = this.#hangUp();
    if (this.#position === null) {
      const { accepted } = this;
      try {
        const history = await this.api.history(this.id);
        if (attempt !== this.#attempt) {
          return;
        }
        this.#position = history.lastEventId;
        this.#adopt(history, accepted);
      } catch (error) {
        if (!(error instanceof ApiError)) {
          throw error;
        }
        if (attempt !== this.#attempt) {
          return;
        }
        if (error.isUnauthenticated) {
          this.#checkSignedIn();
          return;
        }
        if (error.status !== 404) {
          this.#connectLater(error.retryAfterS * 1000);
          return;
        }
        if (this.#known) {
          this.#adopt({ messages: [] }, accepted);
          this.#letGo("deleted");
          return;
        }
        this.#position = this.#beginning;
        this.missing = true;
      }
    }
    const url = this.api.streamUrl(this.id, this.#position);
    const { headers } = this.api;
    const source = /** @type {Stream} */ (headers ? new FetchStream(url, headers) : new EventSource(url));
    this.#source = source;
    let isOpen = false;
    let pings = 0;
    source.addEventListener("open", () => {
      isOpen = true;
      pings = 0;
      this.#opening = { hasTitle: false };
      this.#known = true;
      this.#failures = 0;
      this.#setState("live");
      this.#watch();
    });
    source.addEventListener("ping", (event) => {
      this.#pingEveryS = JSON.parse(event.data).everyS;
      this.#watch();
      pings += 1;
      if (pings > 1) {
        this.#opened();
      }
    });
    this.#watch();
    for (const name of ["head", "title", "input", "message", "token", "done", "error", "reset"]) {
      source.addEventListener(name, (event) => {
        if (event instanceof MessageEvent) {
          this.#watch();
          if (name !== "head" && name !== "title") {
            this.#position = event.lastEventId || null;
          }
          this.#take(name, JSON.parse(event.data));
        } else if (isOpen && source.readyState === CONNECTING) {
          // The connection broke, and EventSource reconnects. Allow one attempt: it would retry every second forever.
          isOpen = false;
          this.#setState("reconnecting");
          this.#watch();
        } else if (source.failure ? source.failure.isUnauthenticated : !isOpen && source.readyState === CLOSED) {
          // EventSource gives up after any status but 200, and hides the status.
          this.#checkSignedIn();
        } else {
          this.#connectLater(source.failure ? source.failure.retryAfterS * 1000 : source.retryMs);
        }
      });
    }
  }

  /** Connect again, unless the user is signed out: then every attempt would be refused. */
  async #checkSignedIn() {
    const attempt = this.#hangUp();
    if (this.#state === "live") {
      this.#setState("reconnecting");
    }
    try {
      await this.api.me();
    } catch (error) {
      if (!(error instanceof ApiError)) {
        throw error;
      }
      if (error.isUnauthenticated && attempt === this.#attempt) {
        this.loginUrl = error.loginUrl;
        this.#letGo("signedOut");
        return;
      }
      // A server without users answers 404.
    }
    if (attempt === this.#attempt) {
      this.#connectLater();
    }
  }

  #reconnect() {
    this.#failures = 0;
    this.#state = "reconnecting";
    // Fire always: the state may have changed from or to "offline".
    this.dispatchEvent(new Event("state"));
    this.#connect();
  }

  /** Connect after a delay that doubles with each failure. Its random part spreads the reconnects of many clients. */
  #connectLater(atLeastMs = 0) {
    this.#hangUp();
    const longest = Math.min(LONGEST_DELAY_MS, FIRST_DELAY_MS * 2 ** this.#failures);
    this.#failures += 1;
    this.#timer = setTimeout(() => this.#connect(), Math.max(atLeastMs, longest * (0.5 + Math.random() / 2)));
    this.#setState("reconnecting");
  }

  /**
   * Restart the watchdog for connections that have died without closing. It reconnects a stream that is silent for two and
   * a half ping intervals, and one whose request is not answered for as long. A server that has never announced pings has
   * an older version: its open streams may be silent.
   *
   * The silence is counted in steps, not measured by a clock. After a computer has slept, or in a background tab, timers
   * run late: that is one step, however long it took, and the events received meanwhile are handled before the next step.
   */
  #watch(halves = SILENT_HALVES) {
    clearTimeout(this.#watchdog);
    if (halves === 0) {
      this.#connectLater();
    } else if (this.#pingEveryS !== null || this.#source?.readyState === CONNECTING) {
      // At least one second, so that a short delay in the network does not look like a dead connection.
      const halfMs = Math.max(1, this.#pingEveryS ?? PING_EVERY_S) * 500;
      this.#watchdog = setTimeout(() => this.#watch(halves - 1), halfMs);
    }
  }

  /** Close the stream and invalidate any attempt to connect that is under way; return the number of the next attempt. */
  #hangUp() {
    clearTimeout(this.#timer);
    clearTimeout(this.#watchdog);
    this.#source?.close();
    this.#source = null;
    this.#opening = null;
    this.#attempt += 1;
    return this.#attempt;
  }

  /** Fetch the history, and open a new stream after it. */
  #fetch() {
    this.#position = null;
    if (this.#isFollowing) {
      this.#connect();
    }
  }

  #letGo(/** @type {State} */ state) {
    removeEventListener("online", this.#onNetworkChange);
    removeEventListener("offline", this.#onNetworkChange);
    this.#hangUp();
    this.#setState(state);
  }

  #setState(/** @type {State} */ state) {
    if (state !== this.#state) {
      this.#state = state;
      this.dispatchEvent(new Event("state"));
    }
  }

  // -- events --------------------------------------------------------------------------------------------------------

  /**
   * @param {string} name  of the event
   * @param {any} data
   */
  #take(name, data) {
    const isOpening = this.#opening !== null;
    if (name !== "title" && name !== "reset") {
      this.#opened();
    }
    if (name === "head") {
      this.#takeHead(data.messageId, isOpening);
    } else if (name === "title") {
      this.title = data.title;
      if (this.#opening) {
        this.#opening.hasTitle = true;
      }
    } else if (name === "input") {
      this.#takeInput(data);
    } else if (name === "message") {
      if (!this.#find(data.messageId)) {
        this.#push({ id: data.messageId, role: data.role, content: data.text, status: "complete", createdAt: data.createdAt });
      }
    } else if (name === "token") {
      this.#growing().content += data.text;
    } else if (name === "reset") {
      this.#connect();
    } else {
      this.#takeEnd(name, data);
    }
    this.#changed();
  }

  #takeInput(/** @type {{messageId: string, text: string, createdAt: string}} */ { messageId, text, createdAt }) {
    const ours = this.accepted?.messageId === messageId ? this.accepted : null;
    this.accepted = ours ? null : this.accepted;
    if (!this.#find(messageId)) {
      this.#push({ id: messageId, role: "user", content: text, status: "complete", createdAt });
      this.#push({ id: ours?.replyId ?? null, role: "assistant", content: "", status: "streaming" });
      this.#retrying = null;
    }
    const index = this.messages.findIndex((message) => message.id === messageId);
    if (this.#isUnsent(this.messages[index], index)) {
      this.#sent(text);
    }
  }

  /**
   * End the reply that is streaming.
   * @param {string} name  `done` or `error`
   * @param {any} data
   */
  #takeEnd(name, data) {
    const reply = this.#find(data.messageId) ?? this.#growing();
    this.#identify(reply, data.messageId);
    reply.status = name === "done" ? data.status : data.code === "interrupted" ? "interrupted" : "failed";
    if (name === "error") {
      reply.error = { code: data.code, message: data.message };
    }
    if (this.accepted?.replyId === data.messageId) {
      this.accepted = null;
    }
    this.dispatchEvent(new CustomEvent("end", { detail: reply }));
    if (reply.status === "interrupted") {
      // A crash may have lost the end of the text that was shown; the history has the stored text.
      this.#fetch();
    }
  }

  /** Note that the stream has got past its beginning: without a title there, the conversation has no chosen one. */
  #opened() {
    if (this.#opening && !this.#opening.hasTitle && this.title !== null) {
      this.title = null;
      this.#changed();
    }
    this.#opening = null;
  }

  /**
   * Let the visible conversation end at a message: drop those after it, or fetch the branch that the message belongs to.
   * @param {string|null} id  null: the conversation is empty
   * @param {boolean} isOpening  whether this is the first event of a stream
   */
  #takeHead(id, isOpening) {
    const index = id === null ? -1 : this.messages.findIndex((message) => message.id === id);
    const last = this.messages.at(-1);
    if (id !== null && index === -1) {
      if (isOpening && last?.status === "streaming" && last.id === null && last.content) {
        // The position that the stream starts from is inside this reply.
        this.#identify(last, id);
      } else if (!isOpening || id !== this.#sought) {
        this.#sought = id;
        this.#fetch();
      }
      // Else the history, which was just fetched, does not have it either. To fetch it again would never end.
      return;
    }
    this.#sought = null;
    const next = this.messages[index + 1];
    if (!next) {
      // After a disconnect, `head` is repeated.
      this.#dropped = this.#dropped?.after === id ? this.#dropped : null;
    } else if (next !== last || next.status !== "streaming" || next.content) {
      this.messages = this.messages.slice(0, index + 1);
      this.#dropped = { after: id, ids: next.siblings ?? (next.id === null ? [] : [next.id]) };
    }
  }

  /** Add a message to the end. If others were dropped from its place, it is another version of them. */
  #push(/** @type {Message} */ message) {
    const parent = this.messages.at(-1)?.id ?? null;
    this.#others = this.#dropped?.after === parent ? this.#dropped.ids : [];
    this.#dropped = null;
    this.messages.push(message);
    if (message.id !== null) {
      this.#identify(message, message.id, true);
    }
  }

  /**
   * Give the last message its id, and so its place among its versions.
   * @param {Message} message
   * @param {string} id
   * @param {boolean} [isNew]
   */
  #identify(message, id, isNew = false) {
    if (isNew || message.id !== id) {
      message.id = id;
      if (this.#others.length > 0) {
        message.siblings = [...this.#others, id];
      }
    }
  }

  /** Return the reply that is streaming. Text after an ended message begins a new reply, to a retry. */
  #growing() {
    const last = this.messages.at(-1);
    if (last?.status === "streaming") {
      return last;
    }
    const retry = this.accepted?.text === "" && this.accepted.messageId === last?.id ? this.accepted : null;
    this.accepted = retry ? null : this.accepted;
    this.#retrying = null;
    /** @type {Message} */
    const reply = { id: retry?.replyId ?? null, role: "assistant", content: "", status: "streaming" };
    this.#push(reply);
    return reply;
  }

  /**
   * Replace the messages by a history, but keep the objects of known messages, because views refer to them.
   * @param {{messages: Message[], title?: string}} history
   * @param {Conversation["accepted"]} earlier  the turn that had been accepted when the history was requested
   */
  #adopt({ messages, title }, earlier) {
    this.#known = this.#known || messages.length > 0;
    this.messages = messages.map((message) => Object.assign(this.#find(message.id) ?? {}, message));
    this.title = title ?? null;
    this.#dropped = null;
    this.#others = [];
    const { accepted } = this;
    if (accepted && (accepted === earlier || this.#find(accepted.replyId) || (accepted.text && this.#find(accepted.messageId)))) {
      this.accepted = null;
    }
    if (this.#retrying && this.#versions(this.#retrying.messageId) !== this.#retrying.versions) {
      this.#retrying = null;
    }
    const { text, after } = this.unsent ?? {};
    const from = after === null ? 0 : this.messages.findIndex((message) => message.id === after) + 1;
    const isKnown = after === null || (after !== undefined && from > 0);
    if (text && isKnown && this.messages.some((each, index) => index >= from && this.#isUnsent(each, index))) {
      this.#sent(text);
    }
    this.#changed();
  }

  /**
   * Tell whether a message is the one that may not have arrived.
   * @param {Message} message
   * @param {number} index  of it in `messages`
   */
  #isUnsent({ id, role, content }, index) {
    const { text, after, instead } = this.unsent ?? {};
    if (role !== "user" || content !== text) {
      return false;
    }
    // The text of an edit may be that of an earlier version.
    return !instead || (after === (this.messages[index - 1]?.id ?? null) && !instead.includes(id ?? ""));
  }

  #find(/** @type {string|null} */ id) {
    return id === null ? undefined : this.messages.find((message) => message.id === id);
  }

  #changed() {
    this.dispatchEvent(new Event("change"));
  }
}
