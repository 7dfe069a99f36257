// Watches conversations with a third-party client, one stream each, for TURNS replies: node watch.mjs CLIENT TURNS URL...
// Prints the events of each stream as JSON.
import { createRequire } from "node:module";

const [client, turns, ...urls] = process.argv.slice(2);
const { length } = urls;

class Seen {
  constructor() {
    Object.assign(this, { opens: 0, inputs: [], texts: [""], ids: [] });
  }

  /** Take an event; return whether it was the last expected one. */
  take(name, data, id) {
    this.ids.push(id);
    if (name === "input") {
      this.inputs.push(JSON.parse(data).text);
    } else if (name === "token") {
      this.texts[this.texts.length - 1] += JSON.parse(data).text;
    } else if (name === "done") {
      this.texts.push("");
    }
    return this.texts.length > turns;
  }
}

const NAMES = ["input", "token", "done", "reset"];

const clients = {
  eventsource: (url, seen) => withEventSource("eventsource", url, seen),
  eventsource2: (url, seen) => withEventSource("eventsource2", url, seen),

  async "fetch-event-source"(url, seen) {
    globalThis.document ??= { hidden: false, addEventListener() {}, removeEventListener() {} };
    globalThis.window ??= { setTimeout, clearTimeout, fetch };
    // Its ES modules import files without extensions, which Node does not find.
    const { fetchEventSource } = createRequire(import.meta.url)("@microsoft/fetch-event-source");
    const leaving = new AbortController();
    await fetchEventSource(url, {
      signal: leaving.signal,
      openWhenHidden: true,
      onopen: async () => {
        seen.opens += 1;
      },
      onmessage: (event) => {
        if (NAMES.includes(event.event) && seen.take(event.event, event.data, event.id)) {
          leaving.abort();
        }
      },
    });
  },

  async fetch(url, seen) {
    seen.error = await (await fetch(url)).text().then(() => null, (error) => error.message);
  },
};

async function withEventSource(name, url, seen) {
  const { EventSource, default: Default } = await import(name);
  const source = new (EventSource ?? Default)(url);
  source.addEventListener("open", () => (seen.opens += 1));
  await new Promise((resolve) => {
    for (const name of NAMES) {
      source.addEventListener(name, (event) => {
        if (seen.take(name, event.data, event.lastEventId)) {
          resolve();
        }
      });
    }
  });
  source.close();
}

const seen = Array.from({ length }, () => new Seen());
await Promise.all(urls.map((url, index) => clients[client](url, seen[index])));
// Exit with open connections, once the pipe has taken the output.
process.stdout.write(JSON.stringify(seen), () => process.exit(0));
