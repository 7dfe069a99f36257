// Posts right after the end of each reply's stream, on Node's keep-alive connections: node pooled.mjs agent|fetch URL TURNS.
// Prints how many posts were answered 202.
import http from "node:http";

const [client, url, turns] = process.argv.slice(2);
const agent = new http.Agent({ keepAlive: true });

const clients = {
  fetch: async (path, body) => {
    const response = await fetch(url + path, options(body));
    return [response.status, await response.text()];
  },
  agent: (path, body) =>
    new Promise((resolve, reject) => {
      const request = http.request(url + path, { agent, ...options(body) }, (response) => {
        let text = "";
        response.setEncoding("utf8").on("data", (part) => (text += part));
        response.on("end", () => resolve([response.statusCode, text])).on("error", reject);
      });
      request.on("error", reject).end(body);
    }),
};

function options(body) {
  return body ? { method: "POST", headers: { "Content-Type": "application/json" }, body } : {};
}

const send = clients[client];
const post = () => send("/chat", JSON.stringify({ input: "hi" }));
let accepted = 0;
let [, answer] = await post();
for (let turn = 0; turn < turns; turn += 1) {
  const { conversationId, lastEventId } = JSON.parse(answer);
  await send(`/chat/stream/${conversationId}?until=done&lastEventId=${lastEventId}`);
  let status;
  [status, answer] = await post();
  accepted += status === 202;
}
console.log(accepted);
process.exit(0);
