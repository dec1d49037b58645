"""One thread that runs all requests' work, a step each in turn: every client gets on, the event
loop never waits for the model, and the model is never in two threads."""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch

log = logging.getLogger(__name__)
Emit = Callable[[Any], None]


class Job:
    """An iterator at work; `emit` and `done` are called in the worker's thread."""

    def __init__(
        self, work: Iterator[Any], emit: Callable[[Any], Any], done: Callable[[Any, Any], Any]
    ):
        self.work, self.emit, self.done = work, emit, done
        self.cancelled = False

    def step(self) -> bool:
        """Does one step; False when there is no other."""
        if self.cancelled:
            self.close()
            return False
        try:
            event = next(self.work)
        except StopIteration as end:
            self.done(end.value, None)
            return False
        except BaseException as error:  # it is the request's, raised where it is waited for
            self.done(None, error)
            return False
        if event is not None:
            self.emit(event)
        return True

    def close(self) -> None:
        close = getattr(self.work, "close", None)
        if close is not None:
            close()


class Engine:
    """Runs at most `concurrency` jobs at once; others wait in the order they came."""

    def __init__(self, concurrency: int):
        self.concurrency = concurrency
        self.waiting: deque[Job] = deque()
        self.changed = threading.Condition()
        self.active = 0
        self.stopped = False
        self.thread = threading.Thread(target=self.work, name="titans-engine", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """After the step at hand; jobs that are not done never will be."""
        with self.changed:
            self.stopped = True
            self.changed.notify()
        self.thread.join()

    async def run(self, work: Iterator[Any], emit: Emit = lambda event: None) -> Any:
        """The iterator's return value. What it yields is emitted in the event loop. If the caller
        is cancelled, the work ends with its next step."""
        loop = asyncio.get_running_loop()
        result = loop.create_future()

        def settle(value: Any, error: BaseException | None) -> None:
            if result.done():
                return
            if error is None:
                result.set_result(value)
            else:
                result.set_exception(error)

        job = Job(
            work,
            lambda event: loop.call_soon_threadsafe(emit, event),
            lambda value, error: loop.call_soon_threadsafe(settle, value, error),
        )
        with self.changed:
            if self.stopped:
                raise RuntimeError("the server is stopping")
            self.waiting.append(job)
            self.changed.notify()
        try:
            return await result
        finally:
            job.cancelled = True

    @torch.inference_mode()
    def work(self) -> None:
        running: list[Job] = []
        while True:
            with self.changed:
                while not (running or self.waiting or self.stopped):
                    self.active = 0
                    self.changed.wait()
                if self.stopped:
                    break
                while self.waiting and len(running) < self.concurrency:
                    running.append(self.waiting.popleft())
                self.active = len(running)
            running = [job for job in running if job.step()]
        for job in [*running, *self.waiting]:
            job.close()
