"""What `titans serve` lets be chosen. No import beyond the standard library: `--help` reads it."""

import hashlib
import hmac
import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path

TOKEN_VARIABLE = "TITANS_TOKEN"
LOCAL_CLIENT = "local"  # the one client of a server without tokens
CLIENT_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Options of the server.

    Args:
        host: address to listen on; any but a loopback address needs a token.
        port: port to listen on; 0 takes a free one.
        name: what clients call the model; the last part of --model.
        token: what clients must send as bearer token; better set in TITANS_TOKEN.
        tokens: file of tokens, a line each: `TOKEN` or `CLIENT TOKEN`; a client sees its own
            sessions only.
        folder: where sessions and snapshots are kept.
        disk_mb: MiB on disk that each client may fill with sessions and snapshots.
        memory_mb: MiB of sessions kept in memory; the least recently used go to disk.
        evict: when a client's disk_mb are full, delete its least recently used sessions
            instead of refusing.
        save_seconds: how long a session may be ahead of the disk; 0 answers when it is on disk.
        concurrency: requests that are worked on at once, a step each in turn.
        queue: requests that may wait beyond those; more are sent away (429).
        time_limit: seconds that a request may take, waiting included.
        max_body_mb: MiB of a JSON body.
        max_document_mb: MiB of a document that is streamed into a session.
        max_prompt_tokens: tokens of a prompt.
        max_new_tokens: tokens of an answer.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    token: str | None = None
    tokens: str | None = None
    folder: str = "titans-sessions"
    disk_mb: float = 4096
    memory_mb: float = 1024
    evict: bool = False
    save_seconds: float = 0
    concurrency: int = 32
    queue: int = 64
    time_limit: float = 600
    max_body_mb: float = 4
    max_document_mb: float = 1024
    max_prompt_tokens: int = 131_072
    max_new_tokens: int = 4096

    def __post_init__(self):
        for name in ("concurrency", "max_prompt_tokens", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")
        for name in ("time_limit", "disk_mb", "max_body_mb", "max_document_mb"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        for name in ("queue", "memory_mb", "save_seconds"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port={self.port} is not a port: 0 to 65535")


class Clients:
    """Who may use the server: a client's name for each token, or one nameless local client."""

    def __init__(self, names: dict[str, str]):
        """names: token -> client."""
        self.names = {digest(token): name for token, name in names.items()}

    @property
    def known(self) -> bool:
        return bool(self.names)

    def named(self, token: str | None) -> str | None:
        """The client of the token, None if there is none. Its time does not tell which fitted."""
        if not self.known:
            return LOCAL_CLIENT
        asked, found = digest(token or ""), None
        for known, name in self.names.items():
            if hmac.compare_digest(known, asked):
                found = name
        return found


def digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def read_clients(settings: ServeSettings) -> Clients:
    """From --token, TITANS_TOKEN and the file --tokens. Raises ValueError if none is given and the
    host can be reached from elsewhere."""
    names: dict[str, str] = {}
    for token in (settings.token, os.environ.get(TOKEN_VARIABLE)):
        if token:
            names[checked(token, "--token")] = LOCAL_CLIENT
    if settings.tokens:
        path = Path(settings.tokens).expanduser()
        for number, line in enumerate(path.read_text().splitlines(), 1):
            words = line.split("#")[0].split()
            if not words:
                continue
            where = f"{path}, line {number}"
            if len(words) > 2:
                raise ValueError(f"{where}: a line is `TOKEN` or `CLIENT TOKEN`")
            token = checked(words[-1], where)
            name = words[0] if len(words) == 2 else f"token-{digest(token).hex()[:32]}"
            if not CLIENT_NAME.fullmatch(name):
                raise ValueError(
                    f"{where}: a client's name is of a-z, 0-9, _ and -, at most 64 of them"
                )
            if names.setdefault(token, name) != name:
                raise ValueError(f"{where}: the token is another client's already")
        if not names:
            raise ValueError(f"{path} holds no token")
    if not names and not is_loopback(settings.host):
        raise ValueError(
            f"host={settings.host} can be reached from elsewhere: give a token by {TOKEN_VARIABLE},"
            " --token or --tokens, or stay on 127.0.0.1"
        )
    return Clients(names)


def checked(token: str, where: str) -> str:
    if len(token) < 16 or not re.fullmatch(r"[!-~]+", token):
        raise ValueError(
            f"{where}: a token has 16 characters or more, printable and without spaces; "
            "`openssl rand -hex 32` makes one"
        )
    return token


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
