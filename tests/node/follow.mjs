// Follows one conversation with COUNT instances of client.js that read their streams by fetch, until the message LAST is
// the last one that each shows, and complete: node follow.mjs CLIENT SERVER CONVERSATION COUNT LAST
// Prints the messages of each instance as JSON.
const [client, server, id, count, last] = process.argv.slice(2);

// What client.js uses of a browser, beside fetch.
Object.defineProperty(globalThis, "navigator", { value: { onLine: true } });
Object.assign(globalThis, { addEventListener() {}, removeEventListener() {} });

const { Api, Conversation } = await import(client);
const api = new Api(server, { headers: async () => ({ Authorization: "Bearer token" }) });

function follow() {
  const conversation = new Conversation(api, id, { fresh: true });
  return new Promise((resolve) => {
    const check = () => {
      const message = conversation.messages.at(-1);
      if (message?.id === last && message.status === "complete" && conversation.state === "live") {
        conversation.pause();
        resolve(conversation);
      }
    };
    conversation.addEventListener("change", check);
    conversation.addEventListener("state", check);
    conversation.open();
  });
}

const followed = await Promise.all(Array.from({ length: Number(count) }, follow));
const seen = followed.map(({ messages }) => messages.map(({ id, content, status, siblings }) => ({ id, content, status, siblings })));
process.stdout.write(JSON.stringify(seen), () => process.exit(0));
