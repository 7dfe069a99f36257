/**
 * A client of chatserver's HTTP API for the browser: fetch and the browser's own EventSource, nothing else.
 *
 * It knows nothing of any page, so that it can be copied into another project as it is:
 *
 *     const api = new Api("https://chat.example/");
 *     const conversation = new Conversation(api, newId(), { fresh: true });
 *     conversation.addEventListener("change", () => show(conversation.messages, conversation.busy));
 *     conversation.addEventListener("state", () => showState(conversation.state));
 *     conversation.open();
 *     await conversation.say("Hello!");
 *
 * The stream alone says what was said and in which order; answers to posts only say that they were taken. Each event
 * carries the position after it, and a stream that breaks goes on from the last one, so that no character of a reply is
 * lost and none comes twice, however often the line is cut. One that dies without breaking is noticed by the server's
 * pings, which stay away.
 */

/**
 * @typedef {"complete"|"streaming"|"stopped"|"failed"|"interrupted"|"superseded"} Status
 * A reply that was retried is superseded; it stays in the record.
 *
 * @typedef {object} Message
 * @property {string|null} id  null while a reply grows whose id is not known yet
 * @property {string} role  user, assistant, or another one that another application stored
 * @property {string} content
 * @property {Status} status
 * @property {string} [createdAt]  ISO 8601; the history has it for all messages, the stream for those of users
 * @property {{code: string, message: string}} [error]  why a reply failed or was interrupted
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
 * @typedef {object} Unsent  a message that is not known to have arrived
 * @property {string} text
 * @property {string} key  with the same key it is taken once, however often it is sent
 * @property {number} [before]  how many messages there were before it, if that was known
 *
 * @typedef {"connecting"|"live"|"reconnecting"|"offline"|"paused"|"deleted"} State
 * `paused` is before `open` and after `pause`; `deleted` is final.
 */

const ANSWER_WITHIN_MS = 20_000;
const FIRST_DELAY_MS = 500;
const LONGEST_DELAY_MS = 15_000;
/** how often a quiet stream has a `ping`, until the server says so itself; seconds */
const PING_EVERY_S = 15;
/** A stream that was silent for this many halves of that interval is dead. */
const SILENT_HALVES = 5;

/** Return a new id for a conversation: 24 hex digits. */
export function newId() {
  return randomHex(12);
}

/** Tell whether a text can be a conversation's id. */
export function isId(/** @type {string} */ text) {
  return /^[0-9a-f]{24}$/i.test(text);
}

/**
 * Return a text with each half of a surrogate pair replaced by U+FFFD. Such a half is no character (a keyboard, a limit
 * of length or another program has cut one in two), no UTF-8 can carry it, and servers refuse it.
 */
export function wellFormed(/** @type {string} */ text) {
  // Not String.prototype.toWellFormed, which browsers before 2024 lack. With the flag `u`, no part of a whole pair matches.
  return text.replace(/\p{Surrogate}/gu, "\ufffd");
}

// Not crypto.randomUUID: that is only there in secure contexts, and plain http in a local network is none.
function randomHex(/** @type {number} */ bytes) {
  return Array.from(crypto.getRandomValues(new Uint8Array(bytes)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** A request that was refused or not answered; `message` is a sentence for people. */
export class ApiError extends Error {
  /**
   * @param {number} status  of HTTP; 0: no answer, so that it is unknown whether the request was carried out
   * @param {string} code  stable, for programs; "unreachable" if there was no answer
   * @param {string} message
   * @param {number} retryAfterS  how many seconds the server asks to wait; 0: it does not say
   */
  constructor(status, code, message, retryAfterS = 0) {
    super(message);
    this.name = "ApiError";
    this.status = status;
    this.code = code;
    this.retryAfterS = retryAfterS;
  }

  /** Whether it is unknown if the request was carried out: there was no answer, or only a proxy's. */
  get isUnanswered() {
    return [0, 502, 504].includes(this.status);
  }
}

/** The API's routes, one method each. All of them throw `ApiError`. */
export class Api {
  /** @param {string|URL} base  the absolute address of the server's root, with the slash at its end */
  constructor(base) {
    this.base = base;
  }

  /**
   * Return a page of the conversations, the latest activity first.
   * @param {string} [cursor]  the `nextCursor` of the page before
   * @param {number} [limit]
   * @returns {Promise<{conversations: Summary[], nextCursor?: string}>}
   */
  list(cursor, limit = 30) {
    const query = new URLSearchParams({ limit: String(limit), ...(cursor && { cursor }) });
    return this.#call("GET", `chat?${query}`);
  }

  /**
   * Return what was said so far, and the position after it.
   * @param {string} id
   * @param {{limit?: number, before?: string}} [part]  only so many messages, the newest, or those before that one
   * @returns {Promise<{messages: Message[], lastEventId: string}>}
   */
  history(id, { limit, before } = {}) {
    const query = new URLSearchParams({ ...(limit && { limit: String(limit) }), ...(before && { before }) }).toString();
    return this.#call("GET", `chat/${id}${query && `?${query}`}`);
  }

  /**
   * Say something; the reply comes by the stream.
   * @param {string} id  an unknown one begins a new conversation
   * @param {string} text  sent and stored as `wellFormed` returns it
   * @param {string} key  the same key with the same text is taken once, however often it is sent
   * @returns {Promise<Turn>}
   */
  say(id, text, key) {
    return this.#call("POST", "chat", { conversationId: id, input: wellFormed(text) }, { "Idempotency-Key": key });
  }

  /**
   * Stop the running reply; what was said of it is kept.
   * @param {string} id
   * @returns {Promise<{status: "stopping"|"idle"}>}
   */
  stop(id) {
    return this.#call("POST", `chat/${id}/stop`);
  }

  /**
   * Have the last message answered anew, if its reply was stopped, failed or interrupted.
   * @param {string} id
   * @returns {Promise<Turn>}
   */
  retry(id) {
    return this.#call("POST", `chat/${id}/retry`);
  }

  /**
   * Delete a conversation.
   * @param {string} id
   * @returns {Promise<void>}
   */
  delete(id) {
    return this.#call("DELETE", `chat/${id}`);
  }

  /**
   * Return the stream's address.
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
    const url = new URL(path, this.base);
    let response;
    let text;
    try {
      response = await fetch(url, request);
      text = await response.text();
    } catch {
      // fetch rejects for nothing but a request that could not be made, a broken line and our own time limit.
      throw new ApiError(0, "unreachable", "The server cannot be reached.");
    }
    const type = response.headers.get("Content-Type") ?? "";
    if (!response.ok) {
      // A proxy's error is no problem+json.
      const isProblem = type.startsWith("application/problem+json");
      const problem = isProblem ? JSON.parse(text) : { code: "unknown", detail: `The server answered ${response.status}.` };
      throw new ApiError(response.status, problem.code, problem.detail, Number(response.headers.get("Retry-After")) || 0);
    }
    if (response.status === 204) {
      return undefined;
    }
    if (!type.startsWith("application/json")) {
      // Such as the login page of a hotel's network.
      throw new ApiError(0, "unreachable", "The server cannot be reached: something else answered.");
    }
    return JSON.parse(text);
  }
}

/**
 * One conversation, kept up to date by its stream.
 *
 * Fires `change` when `messages`, `accepted`, `busy` or `pending` have changed, `state` when `state` has, `sent` (a
 * CustomEvent whose detail is the text) when what was said is known to have arrived, and `end` (its detail is the reply)
 * when a reply has ended.
 */
export class Conversation extends EventTarget {
  /** @type {Message[]} what was said, in order; a reply that grows is the last */
  messages = [];
  /** @type {{text: string, messageId: string, replyId: string}|null} a turn that was taken, until the stream tells it */
  accepted = null;
  /** @type {Unsent|null} to be kept and given back by whoever wants it to outlive a reload */
  unsent = null;
  /** whether something said, or a retry, has not been answered yet */
  pending = false;
  /** whether the server knew no such conversation when it was asked; what is said begins it */
  missing = false;

  /** @type {State} */
  #state = "paused";
  /** @type {string|null} how much of the conversation `messages` holds; null: the history must be fetched */
  #position = null;
  /** @type {EventSource|null} */
  #source = null;
  #known = false;
  #failures = 0;
  #attempt = 0;
  /** @type {ReturnType<typeof setTimeout>|undefined} */
  #timer;
  /** @type {ReturnType<typeof setTimeout>|undefined} */
  #watchdog;
  /** @type {number|null} how often a quiet stream has a `ping`, in seconds; null: the server has not announced any */
  #pingEveryS = null;
  // Either is only a hint; whether the line holds is found out by trying.
  #onNetworkChange = () => this.#reconnect();

  /**
   * @param {Api} api
   * @param {string} id
   * @param {{fresh?: boolean, listed?: boolean}} [options]  fresh: the id is a new one, so that there is no history to
   *   fetch; listed: it is known to the server, so that one without a history has been deleted since
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

  /** Whether a reply is awaited or grows. */
  get busy() {
    return this.accepted !== null || this.messages.at(-1)?.status === "streaming";
  }

  /** Whether `messages` is what the server has, as far as it is known. */
  get loaded() {
    return this.#position !== null;
  }

  /** @returns {State} */
  get state() {
    const waiting = this.#state === "connecting" || this.#state === "reconnecting";
    return waiting && !navigator.onLine ? "offline" : this.#state;
  }

  /** Fetch the history, if need be, and follow the stream, until `pause`. */
  open() {
    if (this.#state === "paused") {
      addEventListener("online", this.#onNetworkChange);
      addEventListener("offline", this.#onNetworkChange);
      this.#setState("connecting");
      this.#connect();
    }
  }

  /** Let go of the stream; `open` goes on where it was. */
  pause() {
    if (this.#state !== "deleted") {
      this.#letGo("paused");
    }
  }

  /**
   * Say something. After a failure, the same text may be sent again without being posted twice.
   * @param {string} typed  sent, and reported by `sent`, as `wellFormed` returns it
   * @throws {ApiError}
   */
  async say(typed) {
    // Here, too: `unsent` is compared with what the stream and the history say.
    const text = wellFormed(typed);
    if (this.unsent?.text !== text) {
      this.unsent = { text, key: randomHex(16), before: this.loaded ? this.messages.length : undefined };
    }
    const unsent = this.unsent;
    try {
      await this.#begin(() => this.api.say(this.id, text, unsent.key), text);
    } catch (error) {
      if (!(error instanceof ApiError) || this.unsent === unsent) {
        throw error;
      }
      // The answer was lost, but by now the stream has told that it arrived.
    }
    if (this.unsent === unsent) {
      this.#sent(text);
    }
  }

  /**
   * Have the last message answered anew.
   * @throws {ApiError}
   */
  async retry() {
    await this.#begin(() => this.api.retry(this.id), "");
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
   * @param {() => Promise<Turn>} request
   * @param {string} text  empty for a retry
   */
  async #begin(request, text) {
    this.pending = true;
    this.#changed();
    try {
      this.#accept(await this.#ask(request), text);
    } finally {
      this.pending = false;
      this.#changed();
    }
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
      return await request();
    } catch (error) {
      if (error instanceof ApiError && error.status === 0 && this.#state === "live") {
        // A dead line that the stream has not noticed yet.
        this.#reconnect();
      }
      throw error;
    }
  }

  /**
   * The stream may lag behind an answer, or be ahead of it.
   * @param {Turn} turn
   * @param {string} text
   */
  #accept(turn, text) {
    const isRetry = text === "";
    const last = this.messages.at(-1);
    if (this.#find(turn.replyId)) {
      return;
    }
    if (last?.status === "streaming" && (isRetry || this.messages.at(-2)?.id === turn.messageId)) {
      last.id = turn.replyId;
    } else if (isRetry || !this.#find(turn.messageId)) {
      this.accepted = { text, messageId: turn.messageId, replyId: turn.replyId };
    }
  }

  // -- the line -------------------------------------------------------------------------------------------------------

  /** Make the stream anew, from the last position. */
  async #connect() {
    const attempt = this.#hangUp();
    if (this.#position === null) {
      try {
        const history = await this.api.history(this.id);
        if (attempt !== this.#attempt) {
          return;
        }
        this.#adopt(history.messages);
        this.#position = history.lastEventId;
      } catch (error) {
        if (!(error instanceof ApiError)) {
          throw error;
        }
        if (attempt !== this.#attempt) {
          return;
        }
        if (error.status !== 404) {
          this.#connectLater(error.retryAfterS * 1000);
          return;
        }
        if (this.#known) {
          this.#adopt([]);
          this.#letGo("deleted");
          return;
        }
        this.#position = this.#beginning;
        this.missing = true;
      }
    }
    const source = new EventSource(this.api.streamUrl(this.id, this.#position));
    this.#source = source;
    let isOpen = false;
    source.addEventListener("open", () => {
      isOpen = true;
      this.#known = true;
      this.#failures = 0;
      this.#setState("live");
      this.#watch();
    });
    source.addEventListener("ping", (event) => {
      this.#pingEveryS = JSON.parse(event.data).everyS;
      this.#watch();
    });
    this.#watch();
    for (const name of ["input", "message", "token", "done", "error", "reset"]) {
      source.addEventListener(name, (event) => {
        if (event instanceof MessageEvent) {
          this.#watch();
          this.#position = event.lastEventId || null;
          this.#take(name, JSON.parse(event.data));
        } else if (isOpen && source.readyState === EventSource.CONNECTING) {
          // The line broke, and it tries again by itself; but only once, since it would do so every second for ever.
          isOpen = false;
          this.#setState("reconnecting");
          this.#watch();
        } else {
          // It gives up on any answer but 200.
          this.#connectLater();
        }
      });
    }
  }

  #reconnect() {
    this.#failures = 0;
    this.#state = "reconnecting";
    // Whether that is called "offline" may have changed.
    this.dispatchEvent(new Event("state"));
    this.#connect();
  }

  /** Connect after a while that doubles with each failure; its random part keeps many clients from coming at once. */
  #connectLater(atLeastMs = 0) {
    this.#hangUp();
    const longest = Math.min(LONGEST_DELAY_MS, FIRST_DELAY_MS * 2 ** this.#failures);
    this.#failures += 1;
    this.#timer = setTimeout(() => this.#connect(), Math.max(atLeastMs, longest * (0.5 + Math.random() / 2)));
    this.#setState("reconnecting");
  }

  /**
   * Restart the watch for a connection that has died without closing: a stream that stays silent for two and a half
   * intervals of its pings is opened again, and one that is not answered for as long, too. A server that has never
   * announced pings is an old one: its open streams may be silent.
   *
   * The silence is counted in steps, not read from a clock. A computer that slept and a tab in the background run their
   * timers late: that is one step, however long it took, and what has arrived meanwhile is handled before the next one.
   */
  #watch(halves = SILENT_HALVES) {
    clearTimeout(this.#watchdog);
    if (halves === 0) {
      this.#connectLater();
    } else if (this.#pingEveryS !== null || this.#source?.readyState === EventSource.CONNECTING) {
      // Not below a second, so that a network that is slow for a moment does not look dead.
      const halfMs = Math.max(1, this.#pingEveryS ?? PING_EVERY_S) * 500;
      this.#watchdog = setTimeout(() => this.#watch(halves - 1), halfMs);
    }
  }

  /** Close the stream, and let what is under way come to nothing; return the number of the attempt that may follow. */
  #hangUp() {
    clearTimeout(this.#timer);
    clearTimeout(this.#watchdog);
    this.#source?.close();
    this.#source = null;
    this.#attempt += 1;
    return this.#attempt;
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

  // -- what is said ---------------------------------------------------------------------------------------------------

  /**
   * @param {string} name  of the event
   * @param {any} data
   */
  #take(name, data) {
    if (name === "input") {
      const ours = this.accepted?.messageId === data.messageId ? this.accepted : null;
      this.accepted = ours ? null : this.accepted;
      if (!this.#find(data.messageId)) {
        this.messages.push({ id: data.messageId, role: "user", content: data.text, status: "complete", createdAt: data.createdAt });
        this.messages.push({ id: ours?.replyId ?? null, role: "assistant", content: "", status: "streaming" });
      }
      if (data.text === this.unsent?.text) {
        this.#sent(data.text);
      }
    } else if (name === "message") {
      if (!this.#find(data.messageId)) {
        this.messages.push({ id: data.messageId, role: data.role, content: data.text, status: "complete", createdAt: data.createdAt });
      }
    } else if (name === "token") {
      this.#growing().content += data.text;
    } else if (name === "reset") {
      this.#connect();
    } else {
      const reply = this.#find(data.messageId) ?? this.#growing();
      reply.id = data.messageId;
      reply.status = name === "done" ? data.status : data.code === "interrupted" ? "interrupted" : "failed";
      if (name === "error") {
        reply.error = { code: data.code, message: data.message };
      }
      this.dispatchEvent(new CustomEvent("end", { detail: reply }));
      if (reply.status === "interrupted") {
        // A crash may have taken the last words that we have seen; the history has what was kept.
        this.#position = null;
        this.#connect();
      }
    }
    this.#changed();
  }

  /** Return the reply that grows; what comes after an ended one, with no word from the user, is a retry of that one. */
  #growing() {
    const last = this.messages.at(-1);
    if (last?.status === "streaming") {
      return last;
    }
    if (last?.role === "assistant") {
      last.status = "superseded";
    }
    const retry = this.accepted;
    this.accepted = null;
    /** @type {Message} */
    const reply = { id: retry?.text === "" ? retry.replyId : null, role: "assistant", content: "", status: "streaming" };
    this.messages.push(reply);
    return reply;
  }

  /** Take over a history, keeping the objects of messages that are known, so that views of them stay. */
  #adopt(/** @type {Message[]} */ messages) {
    this.#known = this.#known || messages.length > 0;
    this.messages = messages.map((message) => Object.assign(this.#find(message.id) ?? {}, message));
    if (this.accepted && (this.#find(this.accepted.messageId) || messages.length === 0)) {
      this.accepted = null;
    }
    const { text, before } = this.unsent ?? {};
    if (text && before !== undefined && this.messages.slice(before).some((each) => each.role === "user" && each.content === text)) {
      this.#sent(text);
    }
    this.#changed();
  }

  #find(/** @type {string|null} */ id) {
    return id === null ? undefined : this.messages.find((message) => message.id === id);
  }

  #changed() {
    this.dispatchEvent(new Event("change"));
  }
}
