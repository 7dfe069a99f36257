/** The list of conversations; on a narrow screen a drawer. */

import { ApiError } from "./client.js";
import { button, byId, icon } from "./dom.js";

/** @typedef {import("./client.js").Summary} Summary */

const UNTITLED = "Untitled";
const CROSS = "M6 6l12 12M18 6L6 18";
const PENCIL = "M4 20l1-4.5L16 4.5l3.5 3.5L8.5 19z";
const NARROW = matchMedia("(max-width: 52rem)");

export class Sidebar {
  /** @type {Summary[]} */
  #conversations = [];
  /** @type {string|undefined} of the next page; undefined: there is none */
  #cursor;
  /** @type {Set<string>} the ids on the first page when `refresh` last fetched it */
  #first = new Set();
  #current = "";
  #isFetched = false;
  #asked = 0;

  /**
   * @param {import("./client.js").Api} api
   * @param {object} actions
   * @param {(id: string) => Promise<void>} actions.onDelete
   * @param {(id: string, title: string|null) => void} actions.onRename  null: the user wants an automatic title
   * @param {() => void} actions.onList
   * @param {(error: ApiError) => void} actions.onFailure  the conversations that the user asked for could not be fetched,
   *   or the user is signed out
   */
  constructor(api, { onDelete, onRename, onList, onFailure }) {
    this.api = api;
    this.onDelete = onDelete;
    this.onRename = onRename;
    this.onList = onList;
    this.onFailure = onFailure;
    this.sidebar = byId("sidebar");
    this.list = byId("conversations");
    this.opener = byId("open-sidebar");
    this.shade = byId("shade");
    this.dialog = /** @type {HTMLDialogElement} */ (byId("delete-dialog"));
    this.renameDialog = /** @type {HTMLDialogElement} */ (byId("rename-dialog"));
    this.newTitle = /** @type {HTMLInputElement} */ (byId("new-title"));
    this.opener.addEventListener("click", () => this.#open(true));
    byId("close-sidebar").addEventListener("click", () => this.#open(false));
    this.shade.addEventListener("click", () => this.#open(false));
    byId("more").addEventListener("click", () => this.#loadMore());
    // Not a button of the form: Enter in the text would press the first one.
    byId("cancel-rename").addEventListener("click", () => this.renameDialog.close());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !this.shade.hidden && !this.dialog.open && !this.renameDialog.open) {
        this.#open(false);
      }
    });
    NARROW.addEventListener("change", () => this.#open(false));
    this.#open(false);
  }

  /** Return a conversation's title, or undefined if it is not in the list. */
  title(/** @type {string} */ id) {
    const found = this.#conversations.find((each) => each.conversationId === id);
    return found && (found.title || UNTITLED);
  }

  /** Mark a conversation as the current one, and close the drawer. */
  select(/** @type {string} */ id) {
    this.#current = id;
    this.#show();
    this.#open(false);
  }

  /** Fetch the first page again, the most recently active conversations; keep the older ones that were fetched before. */
  async refresh() {
    this.#asked += 1;
    const asked = this.#asked;
    try {
      const page = await this.api.list();
      if (asked !== this.#asked) {
        return;
      }
      this.#isFetched = true;
      const oldest = page.conversations.at(-1);
      const seen = new Set(page.conversations.map((each) => each.conversationId));
      // A conversation that has left the first page has moved down or was deleted.
      const isBelow = (/** @type {Summary} */ each) => oldest && (!this.#first.has(each.conversationId) || each.updatedAt <= oldest.updatedAt);
      const older = page.nextCursor ? this.#conversations.filter((each) => !seen.has(each.conversationId) && isBelow(each)) : [];
      this.#first = seen;
      this.#conversations = [...page.conversations, ...older];
      this.#cursor = older.length ? this.#cursor : page.nextCursor;
      this.#show();
      this.onList();
    } catch (error) {
      if (!(error instanceof ApiError)) {
        throw error;
      }
      // The stream's state shows any other problem, and the next event refreshes the list.
      if (error.isUnauthenticated) {
        this.onFailure(error);
      }
    }
  }

  async #loadMore() {
    try {
      const page = await this.api.list(this.#cursor);
      const seen = new Set(this.#conversations.map((each) => each.conversationId));
      this.#conversations.push(...page.conversations.filter((each) => !seen.has(each.conversationId)));
      this.#cursor = page.nextCursor;
      const next = this.list.children.length;
      this.#show();
      this.list.children[next]?.querySelector("a")?.focus();
    } catch (error) {
      if (!(error instanceof ApiError)) {
        throw error;
      }
      this.onFailure(error);
    }
  }

  #show() {
    /** @type {Map<string|undefined, HTMLElement>} */
    const old = new Map(Array.from(this.list.children, (each) => [each instanceof HTMLElement ? each.dataset.id : "", /** @type {HTMLElement} */ (each)]));
    // Remove items first, so that the others need not be moved: moving an element takes its focus away.
    for (const [id, item] of old) {
      if (!this.#conversations.some((each) => each.conversationId === id)) {
        item.remove();
      }
    }
    this.#conversations.forEach((summary, index) => {
      const item = old.get(summary.conversationId) ?? this.#item(summary);
      const isCurrent = summary.conversationId === this.#current;
      const link = /** @type {HTMLAnchorElement} */ (item.querySelector("a"));
      const title = summary.title || UNTITLED;
      link.textContent = title;
      link.title = title;
      link.toggleAttribute("aria-current", isCurrent);
      if (isCurrent) {
        link.setAttribute("aria-current", "page");
      }
      item.querySelector(".rename")?.setAttribute("aria-label", `Rename the conversation: ${title}`);
      item.querySelector(".delete")?.setAttribute("aria-label", `Delete the conversation: ${title}`);
      if (this.list.children[index] !== item) {
        this.list.insertBefore(item, this.list.children[index] ?? null);
      }
    });
    byId("no-conversations").hidden = !this.#isFetched || this.#conversations.length > 0;
    byId("more").hidden = !this.#cursor;
  }

  #item(/** @type {Summary} */ summary) {
    const item = document.createElement("li");
    item.dataset.id = summary.conversationId;
    const link = document.createElement("a");
    link.href = `#${summary.conversationId}`;
    link.dir = "auto";
    link.addEventListener("click", () => this.#open(false));
    const rename = button("", "icon rename", () => this.#askTitle(summary.conversationId));
    rename.append(icon(PENCIL));
    const remove = button("", "icon delete", () => this.#confirm(summary.conversationId, item));
    remove.append(icon(CROSS));
    item.append(link, rename, remove);
    return item;
  }

  #askTitle(/** @type {string} */ id) {
    const old = this.#conversations.find((each) => each.conversationId === id)?.title ?? "";
    this.newTitle.value = old;
    this.renameDialog.onsubmit = (event) => {
      const title = this.newTitle.value.trim();
      // An automatic title that the user has not changed stays automatic.
      if (/** @type {HTMLButtonElement} */ (event.submitter).value === "rename" && title !== old) {
        this.onRename(id, title || null);
      }
    };
    this.renameDialog.showModal();
    this.newTitle.select();
  }

  #confirm(/** @type {string} */ id, /** @type {HTMLElement} */ item) {
    // Isolate the title, so that its text direction cannot reorder the sentence around it.
    const title = document.createElement("bdi");
    title.textContent = this.title(id) ?? "";
    byId("delete-text").replaceChildren("“", title, "” and all its messages will be deleted permanently.");
    // Not the dialog's event "close": it fires late, when the dialog may be open again.
    this.dialog.onsubmit = async (event) => {
      if (/** @type {HTMLButtonElement} */ (event.submitter).value === "delete") {
        const neighbour = item.nextElementSibling ?? item.previousElementSibling;
        await this.onDelete(id);
        (neighbour?.querySelector("a") ?? byId("new")).focus();
      }
    };
    this.dialog.showModal();
  }

  /** Open or close the drawer. On a wide screen the list is always visible. */
  #open(/** @type {boolean} */ open) {
    const isDrawer = NARROW.matches;
    const wasOpen = this.opener.getAttribute("aria-expanded") === "true";
    this.sidebar.classList.toggle("open", open && isDrawer);
    this.sidebar.inert = isDrawer && !open;
    byId("main").inert = isDrawer && open;
    this.shade.hidden = !(isDrawer && open);
    this.opener.setAttribute("aria-expanded", String(open && isDrawer));
    if (isDrawer && open) {
      byId("close-sidebar").focus();
    } else if (wasOpen && isDrawer) {
      this.opener.focus();
    }
  }
}
