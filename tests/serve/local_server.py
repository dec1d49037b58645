"""A tiny model of random weights, a server in a thread, and what the model says by itself."""

import threading
import time
from pathlib import Path

import httpx
import openai
import torch
import uvicorn

from pytitans.models import TitansConfig, TitansForCausalLM
from pytitans.serve.app import build_app
from pytitans.serve.service import Service
from pytitans.serve.sessions import SessionStore
from pytitans.serve.settings import MIB, Clients, ServeSettings

MODEL = "tiny"


def tiny_model(variant: str = "mac") -> TitansForCausalLM:
    torch.manual_seed(0)
    config = TitansConfig(
        variant=variant,
        hidden_size=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        intermediate_size=24,
        memory_expansion=2,
        chunk_size=4,
        segment_len=8,
        window=6,
        num_persistent=3,
    )
    model = TitansForCausalLM(config)
    with torch.no_grad():  # large enough that the memory is felt and no two logits tie
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        model.model.embed_tokens.weight[128:].mul_(0.01)  # mostly letters are written
    return model.double().eval()


class Server:
    """A server in a thread of this process."""

    def __init__(self, model, tokenizer, folder: Path, tokens=None, **options):
        settings = ServeSettings(port=0, **options)
        store = SessionStore(
            folder,
            model,
            disk_bytes=int(settings.disk_mb * MIB),
            memory_bytes=int(settings.memory_mb * MIB),
            evict=settings.evict,
            save_seconds=settings.save_seconds,
        )
        self.service = Service(model, tokenizer, store, settings, MODEL)
        self.store = store
        app = build_app(self.service, Clients(tokens or {}))
        config = uvicorn.Config(app, port=0, log_level="critical", timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        self.clients: list[httpx.Client | openai.OpenAI] = []
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.005)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"

    def http(self, token: str | None = None) -> httpx.Client:
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        client = httpx.Client(base_url=self.url, headers=headers, timeout=30)
        self.clients.append(client)
        return client

    def openai(self, token: str = "any") -> openai.OpenAI:
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=token, max_retries=0)
        self.clients.append(client)
        return client

    def stop(self) -> None:
        for client in self.clients:
            client.close()
        self.server.should_exit = True
        self.thread.join()


def greedy(model, tokenizer, text: str, count: int) -> str:
    """The model's own continuation, by `generate`."""
    ids = tokenizer(text).input_ids
    out = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=count,
        do_sample=False,
    )
    return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
