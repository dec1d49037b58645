"""A request's way: admitted or sent away, its session locked, worked on, committed, counted."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pytitans.cache import TitansCache
from pytitans.serve.engine import Emit, Engine
from pytitans.serve.errors import ApiError
from pytitans.serve.generation import Read, Sampling, Written, answer, read_ids, read_text
from pytitans.serve.metrics import Metrics
from pytitans.serve.sessions import Session, SessionStore
from pytitans.serve.settings import ServeSettings
from pytitans.serve.text import Pieces

SMOOTHING = 0.1  # of the mean time of a request


@dataclass(frozen=True, kw_only=True)
class Ask:
    """n answers to each prompt. A prompt is a function that gives its ids, told whether nothing
    was read before."""

    prompts: Sequence[Callable[[bool], list[int]]]
    sampling: Sampling
    n: int = 1
    session: Session | None = None
    advance: bool = False


class Service:
    """One model, its sessions, and all that limits their use."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        store: SessionStore,
        settings: ServeSettings,
        name: str,
    ):
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.store, self.settings = store, settings
        self.engine, self.metrics = Engine(settings.concurrency), Metrics()
        self.metrics.watch(self.engine, store)
        self.started = int(time.time())
        self.admitted, self.mean_seconds = 0, 1.0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Work is done within; on leaving, what sessions have read is on disk."""
        self.engine.start()
        saving = asyncio.create_task(self.store.keep_saving())
        try:
            yield
        finally:
            saving.cancel()
            self.engine.stop()
            await self.store.flush_all()
            self.store.disk.close()

    @asynccontextmanager
    async def admission(self) -> AsyncIterator[asyncio.Timeout]:
        """A place among those worked on or waiting, and the time limit. Otherwise ApiError 429, or
        408 when the time is over."""
        places = self.settings.concurrency + self.settings.queue
        if self.admitted >= places:
            wait = self.mean_seconds * self.admitted / self.settings.concurrency
            raise ApiError(
                429,
                f"{self.admitted} requests are at work or waiting already: try again later",
                code="queue_full",
                retry_after=min(max(round(wait), 1), 60),
            )
        self.admitted += 1
        began = time.monotonic()
        try:
            async with asyncio.timeout(self.settings.time_limit) as limit:
                yield limit
        except TimeoutError as error:
            raise ApiError(
                408,
                f"the request took more than {self.settings.time_limit:g} seconds: "
                "no session was changed",
                code="time_limit",
            ) from error
        finally:
            self.admitted -= 1
            self.mean_seconds += SMOOTHING * (time.monotonic() - began - self.mean_seconds)

    async def complete(self, ask: Ask, emit: Emit) -> None:
        """Emits Read, Written and Finished events; the session has advanced when this returns."""
        began = time.monotonic()

        def count(event: Any) -> None:
            if isinstance(event, Read):
                self.metrics.read.inc(event.tokens)
            elif isinstance(event, Written):
                self.metrics.written.inc()
                first()
            emit(event)

        first = once(lambda: self.metrics.first.observe(time.monotonic() - began))
        async with self.admission() as limit, self.advancing(ask.session, ask.advance):
            cache = None if ask.session is None else await self.store.cache(ask.session)
            after = None
            for number, prompt in enumerate(ask.prompts):
                work = answer(
                    self.model,
                    self.tokenizer,
                    cache,
                    self.limited(prompt),
                    ask.sampling,
                    n=ask.n,
                    first_index=number * ask.n,
                    advance=ask.advance,
                )
                after = await self.engine.run(work, count)
            if ask.session is not None and ask.advance:
                assert after is not None  # of the only prompt
                await lift(limit)
                await self.store.commit(ask.session, after)

    def limited(self, prompt: Callable[[bool], list[int]]) -> Callable[[bool], list[int]]:
        """The prompt, refused if it is empty or too long, or its ids are none of the model's."""

        def encode(first: bool) -> list[int]:
            try:
                ids = prompt(first)
            except ValueError as error:
                raise ApiError(400, str(error), code="invalid_prompt") from error
            limit = self.settings.max_prompt_tokens
            if len(ids) > limit:
                raise ApiError(
                    400,
                    f"the prompt has {len(ids):,} tokens, the limit is {limit:,}: "
                    "read what is longer into a session",
                    code="context_length_exceeded",
                )
            size = self.model.config.vocab_size
            if not ids:
                raise ApiError(400, "the prompt has no token", code="invalid_prompt")
            if not 0 <= min(ids) <= max(ids) < size:
                raise ApiError(
                    400, f"a token of the prompt is not below {size}", code="invalid_prompt"
                )
            return ids

        return encode

    async def read(self, session: Session, document: AsyncIterator[bytes]) -> int:
        """Reads a UTF-8 document on; the number of its tokens. The session advances when all of it
        was read, and only then."""
        tokens, pieces = 0, Pieces()

        def count(event: Read) -> None:
            nonlocal tokens
            tokens += event.tokens
            self.metrics.read.inc(event.tokens)

        async with self.admission() as limit, self.advancing(session):
            cache = await self.store.cache(session)
            async for data, last in with_last(document):
                for text in self.decoded(pieces, data, last):
                    work = read_text(self.model, self.tokenizer, cache, text)
                    cache = await self.engine.run(work, count)
            await lift(limit)
            await self.store.commit(session, cache)
        return tokens

    async def start_from(self, owner: str, snapshot: str) -> TitansCache:
        """What the snapshot has read."""
        cache, ids = await self.store.load_snapshot(owner, snapshot)
        return await self.engine.run(read_ids(self.model, cache, ids)) if ids else cache

    def decoded(self, pieces: Pieces, data: bytes, last: bool) -> Iterator[str]:
        try:
            yield from pieces.add(data, last)
        except UnicodeDecodeError as error:
            raise ApiError(
                400, "the document is not UTF-8: no part of it was read", code="invalid_document"
            ) from error

    @asynccontextmanager
    async def advancing(self, session: Session | None, really: bool = True) -> AsyncIterator[None]:
        """The session is this request's alone to advance; others may still read it as it was."""
        if session is None or not really:
            yield
            return
        async with session.lock:
            self.store.get(session.owner, session.id)  # deleted while this waited?
            yield

    @contextmanager
    def timed(self, route: object) -> Iterator[Callable[[int], None]]:
        """Call what it gives with the status. route: its text is taken at the end."""
        began = time.monotonic()
        status = 499  # a client that is gone before the answer

        def answered(code: int) -> None:
            nonlocal status
            status = code

        try:
            yield answered
        finally:
            self.metrics.requests.labels(str(route), status).inc()
            self.metrics.seconds.labels(str(route)).observe(time.monotonic() - began)


async def lift(limit: asyncio.Timeout) -> None:
    """No limit from here on: what is committed must not be called too late."""
    if limit.expired():
        await asyncio.sleep(0)  # raises
    limit.reschedule(None)


def random_seed() -> int:
    return secrets.randbits(63)


def once(action: Callable[[], None]) -> Callable[[], None]:
    rest = [action]
    return lambda: rest.pop()() if rest else None


async def with_last(parts: AsyncIterator[bytes]) -> AsyncIterator[tuple[bytes, bool]]:
    """Each part, and at the end an empty one that says so."""
    async for part in parts:
        yield part, False
    yield b"", True
