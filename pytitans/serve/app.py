"""The server's HTTP application."""

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
    app.openapi = lambda: without_422(described())
    return app


async def on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = (
        error.body
        if isinstance(error, ApiError)
        else error_body(error.status_code, str(error.detail))
    )
    return JSONResponse(body, error.status_code, dict(error.headers or {}))


async def on_invalid(request: Request, error: Exception) -> Response:
    """OpenAI answers 400 and names the field; what was sent is not repeated."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
    message = first["msg"].removeprefix("Value error, ")
    text = f"{where}: {message}" if where else message
    text = text.encode("utf-8", "replace").decode()
    return JSONResponse(error_body(400, text, "invalid_request", where or None), 400)


async def on_failure(request: Request, error: Exception) -> Response:
    return JSONResponse(error_body(500, "the server failed: see its log"), 500)


def without_422(schema: dict[str, Any]) -> dict[str, Any]:
    """FastAPI announces its own form of a validation error; ours is 400's."""
    for path in schema["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    return schema
