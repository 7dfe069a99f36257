// Evaluates an expression for mongosh, from standard input, with `db` as the database of a URI; prints the result.
import { readFileSync } from "node:fs";
import mongoose from "mongoose";

await mongoose.connect(process.argv[2]);
const db = new Proxy({}, { get: (_, name) => mongoose.connection.db.collection(name) });
const evaluate = new Function("db", `return ${readFileSync(0, "utf8")}`);
console.log(JSON.stringify(await evaluate(db)));
await mongoose.disconnect();
