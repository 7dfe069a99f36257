"""An issuer of tokens, for the servers under test that have users."""

import json
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm

_AUDIENCE = "https://chat.example.com"
_KEY_ID = "0123456789abcdef0123456789abcdef"
_VALID_S = 7 * 86_400
"""Longer than any bench, since streams end when their token expires."""


class Issuer:
    """An identity provider with one key (RS256) and one user. It serves its JWK set (RFC 7517) in a thread.

    :ivar header: a line of a request's head, with a token that has the size and the claims of an OIDC provider's
    """

    def __init__(self) -> None:
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        public = {**RSAAlgorithm.to_jwk(key.public_key(), as_dict=True), "kid": _KEY_ID, "alg": "RS256", "use": "sig"}
        handler = partial(_Handler, json.dumps({"keys": [public]}).encode())
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._url = f"http://127.0.0.1:{self._server.server_port}"
        now = int(time.time())
        claims = {
            "iss": self._url,
            "sub": "auth0|65f0c1d2e3a4b5c6d7e8f901",
            "aud": _AUDIENCE,
            "azp": "b1oCk3dPaRtYcLiEnTiD0123456789ab",
            "scope": "openid profile email",
            "iat": now,
            "exp": now + _VALID_S,
        }
        self.header = f"Authorization: Bearer {jwt.encode(claims, key, algorithm='RS256', headers={'kid': _KEY_ID})}"

    @property
    def settings(self) -> dict[str, object]:
        """The settings of a server that accepts the token."""
        return {"AUTH": "jwt", "AUTH_JWKS_URL": f"{self._url}/keys", "AUTH_AUDIENCE": _AUDIENCE}

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    """Answers each GET with the same JSON document."""

    def __init__(self, document: bytes, *arguments: Any) -> None:
        self._document = document
        super().__init__(*arguments)  # handles the request

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(self._document)))
        self.end_headers()
        self.wfile.write(self._document)

    def log_message(self, format: str, *arguments: object) -> None:
        pass
