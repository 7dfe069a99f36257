// An identity provider (OIDC), and a port to control it. Prints the addresses of both. Ends with its standard input.
// POST {"kid"?, "claims"} to /token: a signed token. POST {"alg"} to /key: the id of a new key; it signs nothing yet.
import { createServer } from "node:http";
import { text } from "node:stream/consumers";
import { OAuth2Server } from "oauth2-mock-server";

const provider = new OAuth2Server();
await provider.issuer.keys.generate("RS256");
await provider.start(0, "127.0.0.1");
const routes = {
  "/token": async ({ kid, claims }) => ({
    token: await provider.issuer.buildToken({ kid, scopesOrTransform: (_, payload) => Object.assign(payload, claims) }),
  }),
  "/key": async ({ alg }) => ({ kid: (await provider.issuer.keys.generate(alg)).kid }),
};
const control = createServer(async (request, response) => {
  const answer = await routes[request.url](JSON.parse(await text(request)));
  response.end(JSON.stringify(answer));
});
control.listen(0, "127.0.0.1", () => {
  const address = `http://127.0.0.1:${control.address().port}`;
  console.log(JSON.stringify({ issuer: provider.issuer.url, control: address }));
});
process.stdin.on("end", () => process.exit()).resume();
