/**
 * Types of `client.js`, for TypeScript. Copy both files into one folder; `import ... from "./client.js"` finds them.
 */

/** Only documents of version 1 have replies that are `superseded`: they were retried. They are ended replies like others. */
export type Status = "complete" | "streaming" | "stopped" | "failed" | "interrupted" | "superseded";

export interface Message {
  /** null while a reply streams whose id is not known yet */
  id: string | null;
  /** `user`, `assistant`, or another role that another application has stored */
  role: string;
  content: string;
  status: Status;
  /** ISO 8601; present in the history, and in the stream for messages of users */
  createdAt?: string;
  /** why a reply failed or was interrupted */
  error?: { code: string; message: string };
  /**
   * the ids of all versions of this message, oldest first, its own included; absent if there is only one, and while the id
   * is null
   */
  siblings?: string[];
}

/** A conversation in the list. */
export interface Summary {
  conversationId: string;
  title: string;
  /** ISO 8601 */
  createdAt: string;
  /** ISO 8601 */
  updatedAt: string;
  messageCount: number;
  status: "idle" | "streaming";
}

/** The answer to an accepted message or retry. */
export interface Turn {
  conversationId: string;
  messageId: string;
  replyId: string;
  lastEventId: string;
}

/** A message that may not have arrived. To survive a reload, store it and assign it to `Conversation.unsent` again. */
export interface Unsent {
  text: string;
  /** the idempotency key: the server accepts a message once per key, however often it is sent */
  key: string;
  /** the id of the last message before it, if that was known; null: there was none */
  after?: string | null;
  /** of an edit, the ids of the versions that it replaces */
  instead?: string[];
}

/** The user who is signed in. */
export interface Me {
  /** the name by which the server knows the user */
  owner: string;
  /** ISO 8601; when the credentials expire, if they do */
  expiresAt?: string;
  /** where the user can sign out */
  logoutUrl?: string;
}

/** `signedOut` lasts until `open` is called; `paused` is the state before `open` and after `pause`; `deleted` is final. */
export type State = "connecting" | "live" | "reconnecting" | "offline" | "signedOut" | "paused" | "deleted";

/** Returns headers to add to a request. */
export type GetHeaders = () => Promise<Record<string, string>>;

/** Return a new conversation id: 24 hex digits. */
export function newId(): string;

/** Tell whether a text has the form of a conversation id. */
export function isId(text: string): boolean;

/** Return a text with each unpaired surrogate replaced by U+FFFD: UTF-8 cannot encode one, and servers refuse it. */
export function wellFormed(text: string): string;

/** A request that was refused or not answered. `message` is a sentence for users. */
export class ApiError extends Error {
  /**
   * @param status  of HTTP; 0: no answer, so that it is unknown whether the server carried out the request
   * @param code  stable, for programs; `unreachable` if there was no answer
   * @param message
   * @param retryAfterS  how many seconds the server asks to wait; 0: it does not say
   * @param loginUrl  where the user can sign in; empty: the server does not say
   */
  constructor(status: number, code: string, message: string, retryAfterS?: number, loginUrl?: string);
  readonly status: number;
  readonly code: string;
  readonly retryAfterS: number;
  readonly loginUrl: string;
  /** Whether the server wants other credentials: there were none, or they are invalid or have expired. */
  get isUnauthenticated(): boolean;
  /** Whether it is unknown if the server carried out the request: there was no answer, or only a proxy's. */
  get isUnanswered(): boolean;
}

/** The API's routes, one method each. Every request rejects with `ApiError` if it fails. */
export class Api {
  /**
   * @param base  the absolute URL of the server's root, with a slash at the end
   * @param options  `headers`: called before each request; returns headers to add to it. If it rejects, the request counts
   *   as not answered, unless it rejects with an `ApiError`. With it, streams are read by fetch
   */
  constructor(base: string | URL, options?: { headers?: GetHeaders });
  readonly base: string | URL;
  readonly headers: GetHeaders | undefined;

  /** Return the user who is signed in. Rejects with the status 401 if nobody is, and with 404 if the server has no users. */
  me(): Promise<Me>;

  /**
   * Return a page of the conversations, the most recently active first.
   * @param cursor  `nextCursor` of the previous page
   * @param limit  conversations per page; 30 by default
   */
  list(cursor?: string, limit?: number): Promise<{ conversations: Summary[]; nextCursor?: string }>;

  /**
   * Return the messages of a conversation, on the branch that is shown, and the position after them; `title` only if a user
   * has chosen one.
   * @param id
   * @param part  `limit`: return only the newest messages, this many; `before`: only messages before this message's id
   */
  history(
    id: string,
    part?: { limit?: number; before?: string },
  ): Promise<{ messages: Message[]; lastEventId: string; title?: string }>;

  /**
   * Post a message. The reply arrives by the stream.
   * @param id  of the conversation; an unknown id starts a new one
   * @param text  sent and stored as `wellFormed` returns it
   * @param key  the idempotency key: the server accepts the same text with the same key once, however often it is sent
   * @param parentId  the message that it follows; null: it is a first message; by default the last message of the branch
   *   that is shown
   */
  say(id: string, text: string, key: string, parentId?: string | null): Promise<Turn>;

  /** Stop the running reply; the text so far is kept. */
  stop(id: string): Promise<{ status: "stopping" | "idle" }>;

  /**
   * Request another version of a reply.
   * @param id
   * @param retry  `messageId`: the existing reply, by default the last one of the branch that is shown; `key`: the
   *   idempotency key: the server makes one reply per key, however often it is sent
   */
  retry(id: string, retry?: { messageId?: string; key?: string }): Promise<Turn>;

  /**
   * Show the branch with a message, in all clients; after the message, it follows the newest version at each step. Returns
   * the last message of the branch.
   */
  show(id: string, messageId: string): Promise<{ conversationId: string; messageId: string }>;

  /** Choose the title of a conversation; null: an automatic one again. */
  rename(id: string, title: string | null): Promise<Summary>;

  /** Delete a conversation with all its messages. */
  delete(id: string): Promise<void>;

  /** Return the URL of the stream that starts at a position. */
  streamUrl(id: string, position: string): URL;
}

/** The events of a `Conversation`. */
export interface ConversationEventMap {
  /** `messages`, `title`, `accepted`, `busy` or `pending` has changed. */
  change: Event;
  /** `state` has changed. */
  state: Event;
  /** A message is known to have arrived; `detail` is its text. */
  sent: CustomEvent<string>;
  /** A reply has ended; `detail` is the reply. */
  end: CustomEvent<Message>;
}

/** A conversation that its stream keeps up to date. */
export class Conversation extends EventTarget {
  /**
   * @param api
   * @param id
   * @param options  `fresh`: the id is new, so that there is no history to fetch; `listed`: the server has listed the
   *   conversation, so that it has been deleted if it has no history
   */
  constructor(api: Api, id: string, options?: { fresh?: boolean; listed?: boolean });
  readonly api: Api;
  readonly id: string;
  /** The branch that is shown, in order; a reply that is streaming is the last one, and its object changes in place. */
  readonly messages: Message[];
  /** The title that a user has chosen; null: there is only the automatic one, which the list has. */
  readonly title: string | null;
  /**
   * A turn that the server has accepted but the stream has not shown yet; `text` is empty for a retry; `parentId` is the
   * message that the turn follows: null if there is none, undefined if it is the last one.
   */
  readonly accepted: { text: string; messageId: string; replyId: string; parentId: string | null | undefined } | null;
  /**
   * The message that may not have arrived. The same method with the same text sends it again with the same key: `edit` if
   * it has `instead`, else `say`.
   */
  unsent: Unsent | null;
  /** Whether a message, a retry or a switch to another branch has been sent and not answered yet. */
  readonly pending: boolean;
  /** Whether the server knew no conversation with this id; the first message creates it. */
  readonly missing: boolean;
  /** Where the user can sign in, once the state is `signedOut`; empty: the server does not say. */
  readonly loginUrl: string;
  /** Whether a reply is expected or streaming. */
  get busy(): boolean;
  /** Whether `messages` is the history that the server has, as far as known. */
  get loaded(): boolean;
  get state(): State;

  /**
   * Fetch the history, if necessary, and follow the stream until `pause`. If the user is signed out, the state becomes
   * `signedOut`, and there are no more attempts until this is called again, or a message or retry is accepted.
   */
  open(): void;

  /** Close the stream; `open` resumes from the same position. */
  pause(): void;

  /**
   * Send a message. After a failure, sending the same text again does not post it twice.
   * Rejects with `ApiError`.
   * @param typed  sent, and reported by the event `sent`, as `wellFormed` returns it
   */
  say(typed: string): Promise<void>;

  /**
   * Send another version of a message, which begins a branch of its own. After a failure, as `say`.
   * Rejects with `ApiError`, or with `RangeError` if the message is not shown any more.
   * @param message  one of `messages`
   * @param typed
   */
  edit(message: Message, typed: string): Promise<void>;

  /**
   * Request another version of a reply. After a failure, repeating the request does not make two.
   * Rejects with `ApiError`.
   * @param messageId  the existing reply; by default the last one
   */
  retry(messageId?: string): Promise<void>;

  /**
   * Show another branch, in all clients: the one with this message. `messages` changes when the stream reports it.
   * Rejects with `ApiError`.
   * @param messageId  usually one of the `siblings` of a message
   */
  show(messageId: string): Promise<void>;

  /** Choose the title of the conversation; null: an automatic one again. Rejects with `ApiError`. */
  rename(title: string | null): Promise<void>;

  /** Stop the running reply. Rejects with `ApiError`. */
  stop(): Promise<void>;

  addEventListener<K extends keyof ConversationEventMap>(
    type: K,
    listener: (this: Conversation, event: ConversationEventMap[K]) => void,
    options?: boolean | AddEventListenerOptions,
  ): void;
  removeEventListener<K extends keyof ConversationEventMap>(
    type: K,
    listener: (this: Conversation, event: ConversationEventMap[K]) => void,
    options?: boolean | EventListenerOptions,
  ): void;
}
