"""Memory sessions and snapshots over HTTP."""

import json
from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from pytitans.serve.completions import Form, sampling_of
from pytitans.serve.errors import ApiError
from pytitans.serve.guard import is_json
from pytitans.serve.schema import (
    NAME,
    AskAnswer,
    AskRequest,
    Deleted,
    ForkRequest,
    NewSession,
    ReadAnswer,
    ReadRequest,
    SaveRequest,
    SessionInfo,
    SessionList,
    SnapshotInfo,
    SnapshotList,
)
from pytitans.serve.service import Ask, Service
from pytitans.serve.sessions import Session
from pytitans.serve.streams import gone, until_gone
from pytitans.serve.text import prompt_ids

ASK_TOKENS = 256  # where max_tokens is left out
READ_BODY = {  # the body of `read` is not parsed by FastAPI: a document may be long
    "requestBody": {
        "required": False,  # no body is an empty document
        "content": {
            "application/json": {"schema": ReadRequest.model_json_schema()},
            "text/plain": {"schema": {"type": "string"}},
        },
    }
}
SnapshotName = Annotated[str, Path(pattern=NAME)]


def session_routes(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["memory"])
    store = service.store

    def find(request: Request, name: str) -> Session:
        return store.get(request.state.client, name)

    @routes.post("/sessions", status_code=201)
    async def create(request: Request, body: NewSession | None = None) -> SessionInfo:
        """A new session; with `snapshot`, one that has read what the snapshot has."""
        body = body or NewSession.model_validate({})
        client, cache = request.state.client, None
        if body.snapshot is not None:
            cache = await service.start_from(client, body.snapshot)
        return info(await store.create(client, title=body.title, cache=cache))

    @routes.get("/sessions")
    async def list_sessions(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        after: Annotated[str | None, Query(description="id of the last one had")] = None,
    ) -> SessionList:
        """The client's own, oldest first."""
        found = store.of(request.state.client)
        if after is not None:
            last = find(request, after)
            found = [s for s in found if (s.created, s.id) > (last.created, last.id)]
        data = [info(session) for session in found[:limit]]
        return SessionList(data=data, has_more=len(found) > limit)

    @routes.get("/sessions/{session}")
    async def show(request: Request, session: str) -> SessionInfo:
        return info(find(request, session))

    @routes.delete("/sessions/{session}")
    async def delete(request: Request, session: str) -> Deleted:
        await store.delete(find(request, session))
        return Deleted(id=session)

    @routes.post("/sessions/{session}/read", openapi_extra=READ_BODY)
    async def read(request: Request, session: str) -> ReadAnswer:
        """Reads a document on: JSON `{"text": ...}`, or any other body as UTF-8 text, streamed."""
        found = find(request, session)
        if is_json(request.headers.get("content-type", "")):
            text = json_text(await request.body())
            tokens = await until_gone(request, service.read(found, once(text)))
        else:
            try:
                tokens = await service.read(found, request.stream())
            except ClientDisconnect:
                raise gone() from None
        return ReadAnswer(read=tokens, session=info(found))

    @routes.post("/sessions/{session}/ask")
    async def ask(request: Request, session: str, body: AskRequest) -> AskAnswer:
        """Answers from the session; it goes on with prompt and answer only if `advance`."""
        found = find(request, session)
        form = Form(service, chat=False)
        question = Ask(
            prompts=[partial(prompt_ids, service.tokenizer, body.prompt)],
            sampling=sampling_of(service, body, ASK_TOKENS),
            session=found,
            advance=body.advance,
        )
        await until_gone(request, service.complete(question, form.take))
        return AskAnswer.model_validate(
            {
                "text": form.texts[0],
                "finish_reason": form.ends[0].reason,
                "usage": form.usage,
                "session": info(found),
            }
        )

    @routes.post("/sessions/{session}/fork", status_code=201)
    async def fork(request: Request, session: str, body: ForkRequest | None = None) -> SessionInfo:
        """A second session that has read the same; both go on alone."""
        found = find(request, session)
        title = found.title if body is None or body.title is None else body.title
        cache = await store.cache(found)
        return info(await store.create(found.owner, title=title, cache=cache))

    @routes.post("/sessions/{session}/save")
    async def save(request: Request, session: str, body: SaveRequest) -> SnapshotInfo:
        """Keeps the session's present state under a name; `POST /v1/sessions` begins with it."""
        found = await store.save_snapshot(find(request, session), body.name, body.overwrite)
        return SnapshotInfo.model_validate(found)

    @routes.get("/snapshots")
    async def list_snapshots(request: Request) -> SnapshotList:
        return SnapshotList.model_validate({"data": store.snapshots(request.state.client)})

    @routes.delete("/snapshots/{snapshot}")
    async def delete_snapshot(request: Request, snapshot: SnapshotName) -> Deleted:
        await store.delete_snapshot(request.state.client, snapshot)
        return Deleted(id=snapshot)

    return routes


def info(session: Session) -> SessionInfo:
    return SessionInfo(
        id=session.id,
        title=session.title,
        created=int(session.created),
        used=int(session.used),
        tokens=session.tokens,
        bytes=session.size,
        in_memory=session.cache is not None,
    )


def json_text(body: bytes) -> bytes:
    """The text of a JSON document, as UTF-8."""
    try:
        fields: Any = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {error}", code="invalid_json") from None
    try:
        return ReadRequest.model_validate(fields).text.encode()
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None


async def once(data: bytes) -> AsyncIterator[bytes]:
    yield data
