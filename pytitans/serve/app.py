"""The server's HTTP application."""

import itertools
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from pytitans.serve.completions import openai_routes
from pytitans.serve.errors import ApiError, error_body
from pytitans.serve.guard import Guard
from pytitans.serve.memory_routes import session_routes
from pytitans.serve.schema import ErrorBody, Health
from pytitans.serve.service import Service
from pytitans.serve.settings import Clients

UNION = {"str", "int", "list", "float", "bool"}
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "not valid, or beyond a limit of the prompt or the answer"},
    401: {"description": "no token, or none that is known"},
    403: {"description": "a Host or Origin header that is not this server's"},
    404: {"description": "no such model, session or snapshot of this client's"},
    408: {"description": "more time than a request may take"},
    409: {"description": "a snapshot of this name exists, or its file is damaged"},
    413: {"description": "a body larger than allowed"},
    415: {"description": "a body that is encoded"},
    429: {"description": "too many requests at work and waiting: see Retry-After"},
    507: {"description": "the client's storage is full"},
}


def build_app(service: Service, clients: Clients) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    bearer = [Depends(HTTPBearer(auto_error=False))] if clients.known else []  # for the page alone
    app = FastAPI(
        title="titans serve",
        summary="A language model whose memory outlives a request.",
        lifespan=lifespan,
        dependencies=bearer,
        redoc_url=None,
        responses={code: {"model": ErrorBody} | about for code, about in ERRORS.items()},
    )
    app.add_middleware(Guard, service=service, clients=clients)  # type: ignore - an ASGI class
    app.include_router(openai_routes(service))
    app.include_router(session_routes(service))

    @app.get("/health", tags=["server"])
    async def health() -> Health:
        """Answers without a token, while the server is up."""
        return Health()

    @app.get("/metrics", tags=["server"], response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(Exception, on_failure)
    described = app.openapi
    app.openapi = lambda: with_limits(described(), service)
    return app


async def on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = (
        error.body
        if isinstance(error, ApiError)
        else error_body(error.status_code, str(error.detail))
    )
    headers = {name.lower(): value for name, value in (error.headers or {}).items()}
    if error.status_code == 405:
        headers["allow"] = ", ".join(methods_of(request)) or headers.get("allow", "")
    return JSONResponse(body, error.status_code, headers)


def methods_of(request: Request) -> list[str]:
    """All methods of the path; the framework names those of one of its functions."""
    found: set[str] = set()
    for path, operations in request.app.openapi()["paths"].items():
        pattern = re.sub(r"\{\w+\}", "[^/]+", path)
        if re.fullmatch(pattern, request.url.path):
            found |= operations.keys()
    return sorted(method.upper() for method in found)


async def on_invalid(request: Request, error: Exception) -> Response:
    """OpenAI answers 400 and names the field; what was sent is not repeated."""
    assert isinstance(error, RequestValidationError)
    where = field_of(error.errors()[0])
    messages = [e["msg"] for e in error.errors() if field_of(e) == where]  # of a union, several
    message = ", or: ".join(dict.fromkeys(m.removeprefix("Value error, ") for m in messages))
    text = f"{where}: {message}" if where else message
    text = text.encode("utf-8", "replace").decode()
    return JSONResponse(error_body(400, text, "invalid_request", where or None), 400)


def field_of(error: dict[str, Any]) -> str:
    """`messages.0.role`; what pydantic calls the members of a union is left out."""
    parts = itertools.takewhile(
        lambda part: isinstance(part, int) or (part.isidentifier() and part not in UNION),
        error["loc"][1:],
    )
    return ".".join(str(part) for part in parts)


async def on_failure(request: Request, error: Exception) -> Response:
    return JSONResponse(error_body(500, "the server failed: see its log"), 500)


def with_limits(schema: dict[str, Any], service: Service) -> dict[str, Any]:
    """What this server in particular takes. FastAPI's own form of an error goes: ours is 400's."""
    for path in schema["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("CompletionRequest", "ChatRequest", "AskRequest"):
        fields = schema["components"]["schemas"][name]["properties"]
        if "model" in fields:
            fields["model"]["enum"] = [service.name]
        for field in fields.keys() & {"max_tokens", "max_completion_tokens"}:
            fields[field]["anyOf"][0]["maximum"] = service.settings.max_new_tokens
    return schema
