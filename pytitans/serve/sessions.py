"""Memory sessions: caches with a name, the least recently used on disk only.

A session is one file, replaced at once when the session has read on (`TitansCache.save`); whatever
kills the server leaves the old file or the new one. Caches here are never written: who reads on
does so with a fork and commits it. All bookkeeping is done in the event loop.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel

from pytitans.cache import TitansCache
from pytitans.serve.errors import ApiError
from pytitans.serve.storage import HEADER, Disk, on_disk

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(eq=False)
class Session:
    """A memory's state as of the last commit. `cache` is None while it is on disk only."""

    id: str
    owner: str
    path: Path
    created: float
    used: float
    tokens: int = 0
    title: str = ""
    cache: TitansCache | None = None
    resident: int = 0  # bytes of the cache
    size: int = 0  # bytes on disk
    unsaved_since: float | None = None  # the cache is ahead of the file
    deleted: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # who may advance it
    files: asyncio.Lock = field(default_factory=asyncio.Lock)  # who may touch its file

    def hold(self, cache: TitansCache | None) -> None:
        self.cache, self.resident = cache, 0 if cache is None else cache.nbytes

    @property
    def metadata(self) -> dict[str, Any]:
        return {"title": self.title, "created": self.created, "used": self.used}


class SessionStore:
    """All sessions and snapshots of a folder; one server at a time uses it."""

    def __init__(
        self,
        folder: Path,
        model: PreTrainedModel,
        *,
        disk_bytes: int,
        memory_bytes: int,
        evict: bool = False,
        save_seconds: float = 0,
    ):
        self.disk, self.model = Disk(folder, model, disk_bytes), model
        self.memory_bytes, self.evict, self.save_seconds = memory_bytes, evict, save_seconds
        self.sessions: dict[str, Session] = {}
        self.naming = asyncio.Lock()  # who may touch snapshots
        for owner, name, path in self.disk.files("sessions"):
            session = self.found(owner, name, path)
            if session is not None:
                self.sessions[name] = session

    def found(self, owner: str, name: str, path: Path) -> Session | None:
        """The session of an earlier server, however that ended."""
        try:
            found = self.disk.describe(path)
            known = {"title": "", "created": path.stat().st_mtime, "used": 0} | found["metadata"]
            session = Session(
                name, owner, path, created=float(known["created"]), used=float(known["used"])
            )
        except (ValueError, TypeError, OSError) as error:
            log.warning("session left aside, its file stays: %s", error)
            return None
        session.title, session.tokens = str(known["title"]), found["tokens"]
        session.size = on_disk(path)
        return session

    # What clients ask for

    async def create(
        self, owner: str, *, title: str = "", cache: TitansCache | None = None
    ) -> Session:
        """A new session, on disk when this returns. cache: its state, shared and not written."""
        cache = TitansCache(self.model.config.num_hidden_layers) if cache is None else cache
        name = f"session-{secrets.token_hex(16)}"
        path = self.disk.place(owner, "sessions", name)
        now = time.time()
        session = Session(name, owner, path, created=now, used=now, title=title)
        await self.commit(session, cache, now=True)
        return session

    def get(self, owner: str, name: str) -> Session:
        """Another client's session is as unknown as one that never was."""
        session = self.sessions.get(name)
        if session is None or session.owner != owner or session.deleted:
            raise ApiError(404, "no session of this id", code="session_not_found", param="session")
        session.used = time.time()
        return session

    def of(self, owner: str) -> list[Session]:
        """The client's, the oldest first."""
        mine = (session for session in self.sessions.values() if session.owner == owner)
        return sorted(mine, key=lambda session: (session.created, session.id))

    async def cache(self, session: Session) -> TitansCache:
        """The session's state, from disk if need be."""
        if session.cache is not None:
            return session.cache
        async with session.files:
            if session.deleted:
                self.get(session.owner, session.id)
            if session.cache is None:
                session.hold(await self.disk.load(session.path))
            cache = session.cache
            assert cache is not None  # nobody drops it while its file is held
        await self.shrink()
        return cache

    async def commit(self, session: Session, cache: TitansCache, *, now: bool = False) -> None:
        """Replaces the session's state, on disk too unless `save_seconds` allow it to wait.

        Either all of it is done or nothing; then the session is as it was, and the error says why.
        The caller holds `session.lock`. Not stopped by cancellation halfway.
        """
        await to_the_end(self.replace(session, cache, now or not self.save_seconds))

    async def replace(self, session: Session, cache: TitansCache, now: bool) -> None:
        if session.deleted:
            self.get(session.owner, session.id)
        size = max(cache.nbytes + HEADER, session.size)
        await self.make_room(session.owner, size - session.size, keep=session)
        self.disk.charge(session.owner, size - session.size)
        before, session.size = session.size, size
        session.used = time.time()
        if now:
            try:
                await self.write(session, cache)
            except BaseException:
                self.disk.charge(session.owner, before - session.size)
                session.size = before
                raise
        elif session.unsaved_since is None:
            session.unsaved_since = time.monotonic()
        session.hold(cache)
        session.tokens = cache.get_seq_length()
        self.sessions[session.id] = session
        await self.shrink(held=session)

    async def write(self, session: Session, cache: TitansCache) -> None:
        async with session.files:
            if session.deleted:
                return
            size = await self.disk.save(cache, session.path, session.metadata)
            self.disk.charge(session.owner, size - session.size)
            session.size = size
            if session.cache is cache:  # not one that came while this was written
                session.unsaved_since = None

    async def delete(self, session: Session) -> None:
        await to_the_end(self.remove(session))

    async def remove(self, session: Session) -> None:
        async with session.lock, session.files:
            if session.deleted:
                return
            session.deleted = True
            session.hold(None)
            del self.sessions[session.id]
            await asyncio.to_thread(session.path.unlink, missing_ok=True)
            self.disk.charge(session.owner, -session.size)

    # Snapshots

    async def save_snapshot(self, session: Session, name: str, overwrite: bool) -> dict[str, Any]:
        """Writes the session's state under a name, to stay when the session goes on."""
        cache = await self.cache(session)
        path = self.disk.place(session.owner, "snapshots", name)
        async with self.naming:
            await to_the_end(self.write_snapshot(cache, path, session, overwrite))
        return self.snapshot(path)

    async def write_snapshot(
        self, cache: TitansCache, path: Path, session: Session, overwrite: bool
    ) -> None:
        before = on_disk(path) if path.exists() else 0
        if before and not overwrite:
            raise ApiError(
                409, "a snapshot of this name exists: set overwrite", code="snapshot_exists"
            )
        owner, growth = session.owner, max(cache.nbytes + HEADER - before, 0)
        await self.make_room(owner, growth, keep=session)
        self.disk.charge(owner, growth)
        try:
            size = await self.disk.save(
                cache, path, {"title": session.title, "created": time.time()}
            )
            self.disk.charge(owner, size - before)
        finally:
            self.disk.charge(owner, -growth)

    def snapshots(self, owner: str) -> list[dict[str, Any]]:
        """The client's by name; files that cannot be read are left out, and logged."""
        found = []
        for _, _, path in self.disk.files("snapshots", owner):
            try:
                found.append(self.snapshot(path))
            except (ValueError, OSError) as error:
                log.warning("snapshot left aside: %s", error)
        return found

    def snapshot(self, path: Path) -> dict[str, Any]:
        """As clients see it."""
        found = self.disk.describe(path)
        return {
            "id": path.stem,
            "object": "snapshot",
            "created": int(found["metadata"].get("created", path.stat().st_mtime)),
            "title": str(found["metadata"].get("title", "")),
            "tokens": found["tokens"],
            "bytes": found["bytes"],
        }

    async def load_snapshot(self, owner: str, name: str) -> tuple[TitansCache, list[int]]:
        """Its state, and ids that are still to be read: `titans read` leaves the last one."""
        path = self.disk.place(owner, "snapshots", name)
        if not path.exists():
            raise no_snapshot()
        cache = await self.disk.load(path)
        last = self.disk.describe(path)["metadata"].get("reading", {}).get("next_token")
        return cache, [] if last is None else [int(last)]

    async def delete_snapshot(self, owner: str, name: str) -> None:
        path = self.disk.place(owner, "snapshots", name)
        async with self.naming:
            if not path.exists():
                raise no_snapshot()
            self.disk.charge(owner, -on_disk(path))
            path.unlink()

    async def make_room(self, owner: str, size: int, keep: Session) -> None:
        """Raises ApiError 507 unless the client may store so many bytes more. With `evict`, its
        least recently used sessions that nobody uses are deleted first; snapshots stay."""
        while not self.disk.has_room(owner, size):
            idle = [s for s in self.of(owner) if s is not keep and not s.lock.locked()]
            if not self.evict or not idle:
                raise self.disk.full(owner, size)
            await self.remove(min(idle, key=lambda session: session.used))

    async def shrink(self, held: Session | None = None) -> None:
        """Drops the least recently used caches until what is in memory is within the limit; what
        the disk does not have yet is written first. held: whose lock the caller has."""
        resident = sorted(self.resident(), key=lambda session: session.used)
        excess = sum(session.resident for session in resident) - self.memory_bytes
        for session in resident:
            if excess <= 0:
                break
            if session.unsaved_since is not None and session is not held and session.lock.locked():
                continue  # it is being advanced: its turn comes
            excess -= session.resident
            if await self.flush(session) and session.unsaved_since is None:
                session.hold(None)

    def resident(self) -> Iterator[Session]:
        return (session for session in self.sessions.values() if session.cache is not None)

    async def flush(self, session: Session) -> bool:
        """Writes the session if it is ahead of its file; False if that failed, for now."""
        if session.unsaved_since is not None and session.cache is not None:
            try:
                await to_the_end(self.write(session, session.cache))
            except ApiError:
                return False
        return True

    async def flush_all(self, older_than: float = 0) -> None:
        now = time.monotonic()
        for session in list(self.resident()):
            since = session.unsaved_since
            if since is not None and now - since >= older_than:
                await self.flush(session)

    async def keep_saving(self) -> None:
        """With `save_seconds`: writes what has waited so long, for as long as the server runs."""
        while self.save_seconds:
            await asyncio.sleep(self.save_seconds / 4)
            await self.flush_all(older_than=self.save_seconds / 2)


def no_snapshot() -> ApiError:
    return ApiError(404, "no snapshot of this name", code="snapshot_not_found", param="snapshot")


async def to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Awaits work that cancellation must not cut in two: the caller is cancelled afterwards."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError:
                continue
        raise
