// Has client.js read bodies of streams by fetch, each of them whole, byte by byte, and in two parts divided at every byte:
// node parse.mjs CLIENT < BODIES, a JSON array of texts.
// Prints for each body the distinct outcomes: the text of the reply, the position and the delay of the next request.
import { text } from "node:stream/consumers";

const bodies = JSON.parse(await text(process.stdin));
const timers = [];
let chunks = [];
let asked = "";

Object.defineProperty(globalThis, "navigator", { value: { onLine: true } });
Object.assign(globalThis, {
  addEventListener() {},
  removeEventListener() {},
  setTimeout: (action, ms) => timers.push({ action, ms }),
  fetch: async (url) => {
    asked = new URL(url).searchParams.get("lastEventId");
    const body = new ReadableStream({
      start(controller) {
        chunks.forEach((chunk) => controller.enqueue(chunk));
        controller.close();
      },
    });
    return new Response(body, { headers: { "Content-Type": "text/event-stream" } });
  },
});

const { Api, Conversation } = await import(process.argv[2]);
const api = new Api("http://server.example/", { headers: async () => ({}) });

async function read(parts) {
  chunks = parts;
  const conversation = new Conversation(api, "0".repeat(24), { fresh: true });
  conversation.open();
  await until(conversation, "reconnecting");
  const { action, ms } = timers.at(-1);
  chunks = [];
  action();
  await until(conversation, "live");
  conversation.pause();
  // Without the `retry` of a server, the delay is random.
  return JSON.stringify([conversation.messages.at(-1)?.content ?? null, asked, ms > 500 ? ms : null]);
}

function until(conversation, state) {
  return new Promise((resolve) => {
    conversation.addEventListener("state", () => conversation.state === state && resolve());
  });
}

const outcomes = [];
for (const body of bodies) {
  const bytes = new TextEncoder().encode(body);
  const divisions = [[bytes], Array.from(bytes, (byte) => Uint8Array.of(byte))];
  bytes.forEach((_, index) => divisions.push([bytes.slice(0, index), bytes.slice(index)]));
  const found = new Set();
  for (const parts of divisions) {
    found.add(await read(parts));
  }
  outcomes.push(Array.from(found, (each) => JSON.parse(each)));
}
process.stdout.write(JSON.stringify(outcomes), () => process.exit(0));
