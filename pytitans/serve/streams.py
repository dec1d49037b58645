"""Work for a client that may go away: then it is cancelled."""

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import Response

from pytitans.serve.errors import ApiError, error_body

T = TypeVar("T")
Say = Callable[[Any], Iterable[dict[str, Any]]]


async def until_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's result. Cancelled if the client goes; the body must have been read."""
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(disconnect(request))
    try:
        await asyncio.wait([task, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise gone()
        return task.result()
    finally:
        for each in (task, leaving):
            each.cancel()
        await asyncio.wait([task, leaving])  # what the work holds is free when this returns


def gone() -> ApiError:
    return ApiError(499, "the client is gone")  # nobody reads it but the metrics


async def disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events of work under way. `say` makes them of what the work emits."""

    def __init__(self, events: "Events", say: Say, last: Callable[[], Iterable[dict[str, Any]]]):
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self.events, self.say, self.last = events, say, last

    async def __call__(self, scope, receive, send) -> None:
        async def leave() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self.events.task.cancel()

        async def tell(message: dict[str, Any] | str) -> None:
            text = message if isinstance(message, str) else json.dumps(message)
            body = f"data: {text}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})

        leaving = asyncio.ensure_future(leave())
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            await send(start)
            try:
                while (event := await self.events.next()) is not None:
                    for message in self.say(event):
                        await tell(message)
                for message in self.last():
                    await tell(message)
                await tell("[DONE]")
            except ApiError as error:
                await tell(error.body)
            except Exception:
                await tell(error_body(500, "the server failed: see its log"))
                raise
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            leaving.cancel()
            await self.events.close()


class Events:
    """What a task emits, one after another."""

    def __init__(self, work: Callable[[Callable[[Any], None]], Coroutine[Any, Any, None]]):
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        self.held: list[Any] = []
        self.task = asyncio.ensure_future(work(self.queue.put_nowait))
        self.task.add_done_callback(lambda _: self.queue.put_nowait(None))

    async def next(self) -> Any:
        """The next event; None at the end. Raises what the task raised."""
        if self.held:
            return self.held.pop()
        event = await self.queue.get()
        if event is None and self.task.cancelled():
            raise gone()
        if event is None:
            self.task.result()
        return event

    async def begun(self) -> None:
        """Until there is a first event; raises what kept it from coming."""
        self.held.append(await self.next())

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])
