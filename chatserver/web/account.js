/** The user: who is signed in, the bar for a user who is signed out, and the change to another user. */

import { ApiError } from "./client.js";
import { announce, byId } from "./dom.js";
import { forgetDrafts } from "./drafts.js";
import { recall, remember } from "./storage.js";
import { openChannel } from "./tabs.js";

const OWNER = "chatserver-owner";
/** In the URL for signing in, this stands for the page's own address, to which the user returns. */
const RETURN = "{page}";
const SIGNED_OUT = "You are signed out.";
const NO_LOGIN = "You are signed out. Sign in with the application that this server belongs to.";

/**
 * The owner of a window is the last user whom the server has named in it, also while that user is signed out or the server
 * cannot be reached. When the server names another user, or has no users any more, everything of the last owner is removed
 * before anything else is shown: the stored drafts first, the rest by loading the page again.
 */
export class Account {
  isSignedOut = false;
  /** @type {string|null} the owner of this window; null: none is known */
  #owner = recall(OWNER);
  /** false: the server has answered that it has no users */
  #hasUsers = true;
  /** whether the server has named the owner since the page was loaded */
  #isNamed = false;
  #loginUrl = "";
  /** @type {Promise<boolean>|null} the request that is under way, and its result */
  #checking = null;
  #channel = openChannel("chatserver-owner");

  /**
   * @param {import("./client.js").Api} api
   * @param {(again: boolean) => void} onSignedIn  called after each check that found a user, or a server without users;
   *   `again`: the bar was shown until then
   */
  constructor(api, onSignedIn) {
    this.api = api;
    this.onSignedIn = onSignedIn;
    this.bar = byId("signed-out");
    this.login = /** @type {HTMLAnchorElement} */ (byId("sign-in"));
    this.logout = /** @type {HTMLAnchorElement} */ (byId("sign-out"));
    this.logout.addEventListener("click", forgetDrafts);
    for (const name of ["click", "auxclick"]) {
      // The page's address may have changed since the bar was shown.
      this.login.addEventListener(name, () => this.#showLogin());
    }
    this.#channel.addEventListener("message", () => this.check());
    addEventListener("focus", () => this.check());
    addEventListener("pageshow", (event) => {
      // The browser shows a page again as it was left, even after its user has signed out.
      if (event.persisted && this.isOwned) {
        location.reload();
      }
    });
  }

  /** Whether this window has an owner, so that it may contain what another user must not see. */
  get isOwned() {
    return this.#owner !== null;
  }

  /**
   * Ask the server who is signed in, unless it has answered that it has no users.
   * @returns {Promise<boolean>} false: the page is about to be loaded again, for another user
   */
  async check() {
    if (!this.#hasUsers) {
      return true;
    }
    this.#checking ??= this.#ask().finally(() => {
      this.#checking = null;
    });
    return this.#checking;
  }

  /**
   * Show the bar.
   * @param {string} loginUrl  where the user can sign in; empty: the server does not say
   */
  showSignedOut(loginUrl) {
    this.#hasUsers = true;
    this.#loginUrl = loginUrl;
    this.#showLogin();
    this.isSignedOut = true;
    this.bar.hidden = false;
    // Not again at each answer, but after "Reconnecting".
    if (byId("announcer").textContent !== SIGNED_OUT) {
      announce(SIGNED_OUT);
    }
  }

  async #ask() {
    /** @type {import("./client.js").Me|null} */
    let me = null;
    try {
      me = await this.api.me();
    } catch (error) {
      if (!(error instanceof ApiError)) {
        throw error;
      }
      if (error.isUnauthenticated) {
        this.showSignedOut(error.loginUrl);
      }
      if (error.status !== 404) {
        return true;
      }
      this.#hasUsers = false;
    }
    if (!this.#take(me?.owner ?? null)) {
      return false;
    }
    if (me) {
      byId("owner").textContent = me.owner;
      showLink(this.logout, me.logoutUrl);
      byId("account").hidden = false;
    }
    this.onSignedIn(this.#hideSignedOut());
    return true;
  }

  /** Make a user the owner of this window; null: nobody. Return false if the page is loaded again for that. */
  #take(/** @type {string|null} */ owner) {
    const isOther = this.#owner !== null && owner !== this.#owner;
    if (isOther) {
      document.body.hidden = true;
      forgetDrafts();
      history.replaceState(null, "", location.pathname + location.search);
      location.reload();
    }
    this.#owner = owner;
    remember(OWNER, owner);
    if (owner !== null && !this.#isNamed) {
      // Windows of another user, or of this one while signed out, do not know about it yet.
      this.#isNamed = true;
      this.#channel.postMessage({});
    }
    return !isOther;
  }

  /** Hide the bar; return whether it was shown. */
  #hideSignedOut() {
    const wasSignedOut = this.isSignedOut;
    if (wasSignedOut) {
      if (document.activeElement === this.login) {
        byId("input").focus();
      }
      this.isSignedOut = false;
      this.bar.hidden = true;
      announce("You are signed in again.");
    }
    return wasSignedOut;
  }

  #showLogin() {
    const hasLink = showLink(this.login, this.#loginUrl.replaceAll(RETURN, () => encodeURIComponent(location.href)));
    byId("signed-out-text").textContent = hasLink ? SIGNED_OUT : NO_LOGIN;
  }
}

/**
 * Show a link to a URL that the server has sent, and return true; hide the link if there is no URL, or one by which a link
 * would run a script.
 * @param {HTMLAnchorElement} link
 * @param {string} [url]  absolute or relative
 */
function showLink(link, url) {
  if (url) {
    link.href = url;
  }
  link.hidden = !url || !["http:", "https:"].includes(link.protocol);
  if (link.hidden) {
    link.removeAttribute("href");
  }
  return !link.hidden;
}
