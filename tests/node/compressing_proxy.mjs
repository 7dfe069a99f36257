// An Express proxy that compresses all responses: node compressing_proxy.mjs TARGET_URL. Prints its port.
import compression from "compression";
import express from "express";
import { createProxyMiddleware } from "http-proxy-middleware";

const app = express();
app.use(compression());
app.use(createProxyMiddleware({ target: process.argv[2] }));
const server = app.listen(0, "127.0.0.1", () => console.log(server.address().port));
