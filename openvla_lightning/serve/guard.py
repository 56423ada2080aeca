"""Authentication of clients by the server's token."""

import base64
import hmac

from fastapi import WebSocket
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from openvla_lightning.serve.errors import Refused

UNGUARDED = ("/health",)


class Guard:
    """Answers 401 to a client without the token, before a byte of the body is read.

    The token comes as `Bearer`, as `Api-Key` (openpi's client), or as a password with any name (`Basic`). The latter is
    for clients that only take an address: ws://robot:token@gpu-machine:8000/vla_eval.
    """

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app, self._token = app, token.encode()

    def _knows(self, said: bytes) -> bool:
        scheme, _, secret = said.partition(b" ")
        if scheme == b"Basic":
            try:
                secret = base64.b64decode(secret, validate=True).partition(b":")[2]
            except ValueError:
                return False
        return hmac.compare_digest(secret, self._token) and scheme in (b"Bearer", b"Api-Key", b"Basic")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on requests with the token."""
        if scope["type"] in ("http", "websocket") and scope["path"] not in UNGUARDED:
            said = dict(scope["headers"]).get(b"authorization", b"")
            if not self._knows(said):
                refusal = Refused(401, "unauthorised", "send the server's token: Authorization: Bearer <token>")
                response = refused(refusal, {"WWW-Authenticate": "Bearer"})
                if scope["type"] == "websocket":
                    await WebSocket(scope, receive, send).send_denial_response(response)
                else:
                    await response(scope, receive, send)
                return
        await self.app(scope, receive, send)


def refused(refusal: Refused, headers: dict[str, str] | None = None) -> JSONResponse:
    """The HTTP response that says why there is no action."""
    retry = {"Retry-After": "1"} if refusal.status == 503 else {}
    return JSONResponse(refusal.body, refusal.status, headers={**retry, **(headers or {})})
