"""The command `titans serve`."""

import dataclasses
import logging
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from pytitans.options import documented, new_parser, parse
from pytitans.serve.settings import MIB, ServeSettings, read_clients

if TYPE_CHECKING:
    from pytitans.serve.service import Service

GOODBYE = 5  # seconds that requests have to end when the server is asked to stop


def serve(argv: list[str]) -> int:
    """Serves a model until it is told to stop."""
    parser = new_parser("serve", "Serves a model: OpenAI's endpoints and memory sessions.")
    add = parser.add_argument
    add("--model", type=str, required=True, help="folder or hub name of a Titans model")
    docs = documented(ServeSettings)
    for field in dataclasses.fields(ServeSettings):
        add(f"--{field.name}", type=field.type, default=field.default, help=docs[field.name])
    options = parse(parser, "serve", argv)
    fields = {field.name for field in dataclasses.fields(ServeSettings)}
    settings = ServeSettings(**{k: v for k, v in options.as_dict().items() if k in fields})
    clients = read_clients(settings)  # before a model is loaded for nothing

    try:
        import uvicorn

        from pytitans.serve.app import build_app
    except ModuleNotFoundError as error:
        raise ValueError(
            f"titans serve needs {error.name}: pip install 'pytitans[serve]'"
        ) from None

    from pytitans.cli import quiet

    quiet()
    logging.basicConfig(level=logging.WARNING, format="titans: %(message)s")
    with listen(settings.host, settings.port) as listening:
        service = load_service(options.model, settings)
        config = uvicorn.Config(
            build_app(service, clients),
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=GOODBYE,
        )

        class Server(uvicorn.Server):
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                host, port = listening.getsockname()[:2]
                host = f"[{host}]" if ":" in host else host
                print(f"{service.name} on http://{host}:{port}/v1, its page at /docs", flush=True)

        Server(config).run(sockets=[listening])
    return 0


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address; OSError where that cannot be."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise ValueError(f"cannot listen on {host}, port {port}: {error}") from error
    return bound


def load_service(model_name: str, settings: ServeSettings) -> "Service":
    """The model with its sessions. Raises ValueError if it is no Titans model."""
    from pytitans.cli import load_model, model_folder
    from pytitans.data.tokenizer import check_vocabulary, load_tokenizer
    from pytitans.models import TitansForCausalLM
    from pytitans.serve.service import Service
    from pytitans.serve.sessions import SessionStore

    folder = model_folder(model_name)
    tokenizer = load_tokenizer(folder)
    model = load_model(folder)
    if not isinstance(model, TitansForCausalLM):
        raise ValueError(
            f"{model_name!r} is a {model.config.model_type} model, without a memory to keep: "
            "`transformers serve` serves those"
        )
    check_vocabulary(tokenizer, model.config.vocab_size)
    store = SessionStore(
        Path(settings.folder).expanduser(),
        model,
        disk_bytes=int(MIB * settings.disk_mb),
        memory_bytes=int(MIB * settings.memory_mb),
        evict=settings.evict,
        save_seconds=settings.save_seconds,
    )
    path = Path(model_name).expanduser()
    name = settings.name or (path.resolve().name if path.is_dir() else model_name)
    return Service(model, tokenizer, store, settings, name)
