"""Caches as files of a folder, and how much of it each client fills.

FOLDER/CLIENT/sessions/ID.safetensors
FOLDER/CLIENT/snapshots/NAME.safetensors
"""

import asyncio
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from pytitans.cache import TitansCache, model_fingerprint
from pytitans.serve.errors import ApiError

log = logging.getLogger(__name__)
SUFFIX = ".safetensors"
BLOCK = 4096
HEADER = 16_384  # bytes of a file beside the state's own, roughly


class Disk:
    """The files of one model's caches. Used from the event loop; files are read and written in
    other threads. One server at a time has the folder."""

    def __init__(self, folder: Path, model: PreTrainedModel, limit: int):
        """limit: bytes that each client may fill."""
        self.folder, self.model, self.limit = folder, model, limit
        self.fingerprint = model_fingerprint(model)
        self.usage: dict[str, int] = {}  # client -> bytes
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.held = take_folder(folder)
        for left in folder.glob("*/*/.*.tmp"):
            left.unlink()  # was being written when a server was killed
        for owner, _, path in self.files("*"):
            self.charge(owner, on_disk(path))

    def close(self) -> None:
        os.close(self.held)

    def files(self, kind: str, owner: str = "*") -> Iterator[tuple[str, str, Path]]:
        """Owner, name and path of each file of a kind."""
        for path in sorted(self.folder.glob(f"{owner}/{kind}/*{SUFFIX}")):
            yield path.parent.parent.name, path.stem, path

    def place(self, owner: str, kind: str, name: str) -> Path:
        """The file of a name, which must be plain; clients' names were checked before."""
        folder = self.folder / owner / kind
        path = folder / f"{name}{SUFFIX}"
        if path.parent != folder or path.resolve().parent != folder.resolve():
            raise ValueError(f"{name!r} is no plain name")
        return path

    async def save(self, cache: TitansCache, path: Path, metadata: dict[str, Any]) -> int:
        """Replaces the file at once; returns the bytes it fills."""

        def write() -> int:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            cache.save(path, self.model, metadata=metadata, fingerprint=self.fingerprint)
            return on_disk(path)

        try:
            return await asyncio.to_thread(write)
        except OSError as error:
            log.error("cannot write %s: %s", path, error)
            raise ApiError(
                507, "the server cannot write to its disk: nothing was changed", code="disk_full"
            ) from error

    async def load(self, path: Path) -> TitansCache:
        try:
            return await asyncio.to_thread(
                TitansCache.load, path, self.model, fingerprint=self.fingerprint
            )
        except (ValueError, OSError) as error:
            raise unusable(error) from error

    def describe(self, path: Path) -> dict[str, Any]:
        """The file's header. ValueError if it is damaged or another model's."""
        found = TitansCache.describe(path)
        if found["model"] != self.fingerprint:
            raise ValueError(f"{path} belongs to another model")
        return found

    def charge(self, owner: str, size: int) -> None:
        self.usage[owner] = self.usage.get(owner, 0) + size

    def has_room(self, owner: str, size: int) -> bool:
        return self.usage.get(owner, 0) + size <= self.limit

    def full(self, owner: str, size: int) -> ApiError:
        return ApiError(
            507,
            f"your sessions and snapshots fill {self.usage.get(owner, 0):,} of {self.limit:,} "
            f"bytes and {size:,} more are needed: delete some",
            code="storage_full",
        )


def on_disk(path: Path) -> int:
    """Bytes in whole blocks: an empty session is not for nothing."""
    return -(-path.stat().st_size // BLOCK) * BLOCK


def unusable(error: Exception) -> ApiError:
    """For a file that cannot be loaded. What and where is the server's affair, not the client's."""
    log.error("cannot load a memory: %s", error)
    return ApiError(
        409,
        "its file is damaged or was made by another model: nothing was changed",
        code="state_unusable",
    )


def take_folder(folder: Path) -> int:
    """Holds the folder for this process; an open file, released however the process ends."""
    handle = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        import fcntl
    except ImportError:  # Windows: two servers on one folder are not noticed
        return handle
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise ValueError(f"{folder} is in use by another server: give another --folder") from None
    return handle
