"""What the server counts, for Prometheus. No client's name, session or text is in it."""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

from pytitans.serve.engine import Engine
from pytitans.serve.sessions import SessionStore

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class Metrics:
    """Each server has a registry of its own."""

    def __init__(self):
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # resident memory, CPU seconds, open files
        PlatformCollector(registry=registry)
        self.read = Counter(
            "titans_tokens_read", "Tokens of prompts and documents read", registry=registry
        )
        self.written = Counter("titans_tokens_written", "Tokens of answers", registry=registry)
        self.requests = Counter(
            "titans_requests", "Requests answered", ["route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "titans_request_seconds",
            "Whole requests",
            ["route"],
            buckets=SECONDS,
            registry=registry,
        )
        self.first = Histogram(
            "titans_first_token_seconds",
            "Until an answer began",
            buckets=SECONDS,
            registry=registry,
        )

    def watch(self, engine: Engine, store: SessionStore) -> None:
        """Gauges that are looked up when they are asked for."""
        for name, help, value in (
            ("jobs_active", "Pieces of work taking turns", lambda: engine.active),
            ("jobs_queued", "Pieces of work waiting", lambda: len(engine.waiting)),
            ("sessions", "Sessions", lambda: len(store.sessions)),
            ("sessions_resident", "Sessions in memory", lambda: len(list(store.resident()))),
            (
                "sessions_resident_bytes",
                "Their size in memory",
                lambda: sum(session.resident for session in store.resident()),
            ),
            (
                "disk_bytes",
                "Sessions and snapshots",
                lambda: sum(store.disk.usage.values()),
            ),
        ):
            Gauge(f"titans_{name}", help, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        return generate_latest(self.registry)
