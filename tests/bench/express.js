// The Express twin: a Map of conversations to Sets of responses, and `res.write` per client and token.
//
// The same routes, events, positions and pace as chatserver's, but no database, no resume and no limits: the bench
// measures delivery. Each event is encoded once for all subscribers. Settings come from the environment:
// PORT, TOKENS_FILE (a JSON array of strings, sent in a loop), TOKENS (of a reply), DELAY_MS, LATE_MS (0: a late token
// delays all tokens after it), KEEPALIVE_S.

const fs = require("node:fs");
const { randomBytes } = require("node:crypto");
const express = require("express");

const texts = JSON.parse(fs.readFileSync(process.env.TOKENS_FILE, "utf8"));
const tokens = Number(process.env.TOKENS);
const delay = Number(process.env.DELAY_MS);
const late = Number(process.env.LATE_MS || 0);
const keepalive = Number(process.env.KEEPALIVE_S || 15) * 1000;

const streams = new Map();

function broadcast(conversationId, event) {
  for (const res of streams.get(conversationId) ?? []) res.write(event);
}

function reply(conversationId) {
  const messageId = randomBytes(12).toString("hex");
  let chars = 0;
  let said = 0;
  // By the clock, so that late timers do not add up: tokens that fell due within LATE_MS are sent at once.
  let due = performance.now();
  const wait = () => {
    const now = performance.now();
    due = Math.max(due + delay, now - late);
    if (delay && due <= now && late) next();
    else if (delay) setTimeout(next, due - now);
    else setImmediate(next);
  };
  const next = () => {
    if (said === tokens) {
      const data = JSON.stringify({ messageId, status: "complete" });
      broadcast(conversationId, `event: done\nid: ${messageId}-done\ndata: ${data}\n\n`);
      return;
    }
    const text = texts[said++ % texts.length];
    for (const _ of text) chars++;
    broadcast(conversationId, `event: token\nid: ${messageId}-${chars}\ndata: ${JSON.stringify({ text })}\n\n`);
    if (said < tokens) wait();
    else setImmediate(next);
  };
  wait();
}

const app = express();
app.disable("x-powered-by");
app.use(express.json());

app.post("/chat", (req, res) => {
  const conversationId = req.body.conversationId ?? randomBytes(12).toString("hex");
  reply(conversationId);
  res.status(202).json({ conversationId, status: "streaming" });
});

app.get("/chat/stream/:conversationId", (req, res) => {
  const { conversationId } = req.params;
  res.writeHead(200, {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-cache",
    Connection: "keep-alive",
    "X-Accel-Buffering": "no",
  });
  res.flushHeaders();
  let clients = streams.get(conversationId);
  if (!clients) streams.set(conversationId, (clients = new Set()));
  clients.add(res);
  req.on("close", () => {
    clients.delete(res);
    if (!clients.size && streams.get(conversationId) === clients) streams.delete(conversationId);
  });
});

setInterval(() => {
  for (const clients of streams.values()) for (const res of clients) res.write(":\n\n");
}, keepalive);

const server = app.listen(Number(process.env.PORT || 0), "127.0.0.1", () => {
  console.log(`express listens on http://127.0.0.1:${server.address().port}/`);
});
