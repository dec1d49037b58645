"""Fixtures: a tiny model, and servers that run it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_server import Server, tiny_model
from transformers import PreTrainedTokenizerFast

from pytitans.data.tokenizer import byte_tokenizer
from pytitans.models import TitansForCausalLM


@pytest.fixture(scope="session")
def model() -> TitansForCausalLM:
    return tiny_model()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def serve(model, tokenizer, tmp_path) -> Iterator:
    """Starts servers: serve(folder=..., tokens=..., **settings)."""
    with contextlib.ExitStack() as running:

        def start(folder: Path | None = None, tokens=None, **options) -> Server:
            server = Server(model, tokenizer, folder or tmp_path / "sessions", tokens, **options)
            running.callback(server.stop)
            return server

        yield start


@pytest.fixture(scope="module")
def server(model, tokenizer, tmp_path_factory) -> Iterator[Server]:
    """One server for the tests that change no option."""
    server = Server(model, tokenizer, tmp_path_factory.mktemp("sessions"))
    yield server
    server.stop()
