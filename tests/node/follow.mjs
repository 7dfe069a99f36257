// Follows one conversation with COUNT instances of client.js that read their streams by fetch, until each has received
// TURNS replies: node follow.mjs CLIENT SERVER CONVERSATION COUNT TURNS
// Prints the messages of each instance as JSON.
const [client, server, id, count, turns] = process.argv.slice(2);

// What client.js uses of a browser, beside fetch.
Object.defineProperty(globalThis, "navigator", { value: { onLine: true } });
Object.assign(globalThis, { addEventListener() {}, removeEventListener() {} });

const { Api, Conversation } = await import(client);
const api = new Api(server, { headers: async () => ({ Authorization: "Bearer token" }) });

function follow() {
  const conversation = new Conversation(api, id, { fresh: true });
  let left = Number(turns);
  return new Promise((resolve) => {
    conversation.addEventListener("end", () => {
      left -= 1;
      if (left === 0) {
        conversation.pause();
        resolve(conversation);
      }
    });
    conversation.open();
  });
}

const followed = await Promise.all(Array.from({ length: Number(count) }, follow));
const seen = followed.map(({ messages }) => messages.map(({ id, content, status }) => ({ id, content, status })));
process.stdout.write(JSON.stringify(seen), () => process.exit(0));
