// Watches a conversation with the `eventsource` package until a reply has ended, then prints what it has put together.
import { EventSource } from "eventsource";

const [url] = process.argv.slice(2);
const source = new EventSource(url);
const seen = { opens: 0, ids: [], text: "", inputs: [] };
source.addEventListener("open", () => seen.opens++);
source.addEventListener("input", (event) => seen.inputs.push(JSON.parse(event.data).text));
source.addEventListener("token", (event) => {
  seen.ids.push(event.lastEventId);
  seen.text += JSON.parse(event.data).text;
});
const end = (status) => {
  source.close();
  console.log(JSON.stringify({ ...seen, status }));
};
source.addEventListener("done", (event) => end(JSON.parse(event.data).status));
// Connection errors come here, too, without data; it reconnects by itself.
source.addEventListener("error", (event) => event.data && end(JSON.parse(event.data).code));
source.addEventListener("reset", () => end("reset"));
