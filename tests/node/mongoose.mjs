// Another application that uses the same collection, with Mongoose models with and without ids, timestamps and createdAt.
// Usage: mongoose.mjs URI write|read '{"<variant>": "<id of a conversation to append to>", ...}'
import mongoose from "mongoose";

const [uri, action, given] = process.argv.slice(2);
const ids = JSON.parse(given);
await mongoose.connect(uri);

const VARIANTS = {
  plain: [{ createdAt: Date }, {}, {}],
  timestamps: [{}, {}, { timestamps: true }],
  timesOfMessages: [{}, { timestamps: true }, { timestamps: true }],
  withoutIds: [{ createdAt: { type: Date, default: Date.now } }, { _id: false }, { timestamps: true }],
  withoutAnything: [{}, { _id: false }, {}],
};

const answers = {};
for (const [name, [fields, ofMessages, ofConversations]] of Object.entries(VARIANTS)) {
  const message = new mongoose.Schema({ role: String, content: String, ...fields }, ofMessages);
  const schema = new mongoose.Schema({ messages: [message] }, { collection: "conversations", ...ofConversations });
  const Conversation = mongoose.model(name, schema);
  const theirs = await Conversation.findById(ids[name]);
  const seen = theirs.messages.map((each) => [each.role, each.content]);
  let created = null;
  if (action === "write") {
    theirs.messages.push({ role: "user", content: "from Mongoose" }, { role: "assistant", content: "indeed" });
    await theirs.save();
    created = await Conversation.create({ messages: [{ role: "system", content: "Be kind." }, { role: "user", content: "created" }] });
  }
  answers[name] = { seen, created: created && created._id.toString() };
}
console.log(JSON.stringify(answers));
await mongoose.disconnect();
