"""Who may talk to the server, and how much: checked before anything of the body is read.

A server on a loopback address is reachable from every web page that the same machine opens. So a
Host header must name the machine (else a name that an attacker points here would be one origin with
his page: DNS rebinding), and an Origin header, which only browsers send, must be the server's own.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi.responses import JSONResponse

from pytitans.serve.errors import ApiError
from pytitans.serve.service import Service
from pytitans.serve.settings import MIB, Clients, is_loopback

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
OPEN = {"/health", "/docs", "/openapi.json"}  # without a token: nothing of any client's is in them
DOCUMENT = re.compile(r"/v1/sessions/[^/]+/read")


class Guard:
    """ASGI middleware; leaves the client's name in `request.state.client`."""

    def __init__(self, app: Any, service: Service, clients: Clients):
        self.app, self.service, self.clients = app, service, clients
        self.local_only = is_loopback(service.settings.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        # One request, one route's name: an unknown path must not make a metric of its own.
        with self.service.timed(Route(scope)) as answered:

            async def count(message: MutableMapping[str, Any]) -> None:
                if message["type"] == "http.response.start":
                    answered(message["status"])
                await send(message)

            try:
                self.check(scope)
                await self.app(scope, self.bounded(scope, receive), count)
            except ApiError as error:
                headers = dict(error.headers or {})
                response = JSONResponse(error.body, error.status_code, headers)
                await response(scope, receive, count)
            except Exception:
                answered(500)
                raise

    def check(self, scope: Scope) -> None:
        """Raises ApiError unless the request may go on."""
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        host = headers.get("host", "")
        if self.local_only and not is_loopback(host_name(host)):
            raise ApiError(403, "this server answers to localhost only", code="wrong_host")
        origin = headers.get("origin")
        if origin is not None and origin != f"{scope['scheme']}://{host}":
            raise ApiError(403, "web pages of other origins may not ask", code="wrong_origin")
        if headers.get("content-encoding", "identity") != "identity":
            raise ApiError(415, "send the body as it is, without content-encoding")
        kind, _, token = headers.get("authorization", "").partition(" ")
        client = self.clients.named(token.strip() if kind.lower() == "bearer" else None)
        if client is None and scope["path"] not in OPEN:
            raise ApiError(
                401, "send your token: Authorization: Bearer TOKEN", code="invalid_api_key"
            )
        scope.setdefault("state", {})["client"] = client
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.limit(scope, headers.get("content-type", "")):
            raise self.too_large(scope, headers.get("content-type", ""))

    def bounded(self, scope: Scope, receive: Receive) -> Receive:
        """Receives the body up to its limit, and within the time limit."""
        kind = dict(scope["headers"]).get(b"content-type", b"").decode("latin-1")
        left = self.limit(scope, kind)
        deadline = asyncio.get_running_loop().time() + self.service.settings.time_limit
        complete = False

        async def bounded_receive() -> MutableMapping[str, Any]:
            nonlocal left, complete
            if complete:
                return await receive()  # waits for the client to go
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise ApiError(408, "the body took too long", code="time_limit") from None
            left -= len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if left < 0:
                raise self.too_large(scope, kind)
            return message

        return bounded_receive

    def limit(self, scope: Scope, content_type: str) -> int:
        settings = self.service.settings
        streamed = DOCUMENT.fullmatch(scope["path"]) and not is_json(content_type)
        return int(MIB * (settings.max_document_mb if streamed else settings.max_body_mb))

    def too_large(self, scope: Scope, content_type: str) -> ApiError:
        limit = self.limit(scope, content_type)
        return ApiError(
            413, f"the body is larger than {limit:,} bytes: send it in parts", code="body_too_large"
        )


class Route:
    """The route's path, known once the request is done."""

    def __init__(self, scope: Scope):
        self.scope = scope

    def __str__(self) -> str:
        return getattr(self.scope.get("route"), "path", "other")


def is_json(content_type: str) -> bool:
    kind = content_type.split(";")[0].strip().lower()
    return kind == "application/json" or kind.endswith("+json")


def host_name(host: str) -> str:
    """The Host header without its port: `[::1]:8000` -> `[::1]`."""
    return re.sub(r":\d*$", "", host) if not host.endswith("]") else host
