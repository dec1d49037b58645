"""What any run of `transformers.Trainer` is given here: a stop that loses nothing, a clock that
outlives it, and checkpoints that generate with a cache."""

import json
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState


class KeepCacheOn(TrainerCallback):
    """Undoes the `use_cache: false` that the Trainer leaves in a checkpoint's configuration."""

    def on_save(self, args, state, control, **kwargs):
        path = Path(args.output_dir or "", f"checkpoint-{state.global_step}", "config.json")
        if state.is_world_process_zero and path.exists():
            path.write_text(
                json.dumps(json.loads(path.read_text()) | {"use_cache": True}, indent=2)
            )


class Kept(TrainerCallback, ExportableState, ABC):
    """A callback whose `attributes` (plain values) a checkpoint keeps, and a run that goes on from
    it is given again, before it begins."""

    @abstractmethod
    def attributes(self) -> dict[str, Any]: ...

    @abstractmethod
    def restore(self, attributes: dict[str, Any]) -> None: ...

    def on_train_begin(self, args, state, control, **kwargs):
        saved: Any = state.stateful_callbacks  # a checkpoint's, where there is one
        kept = saved.setdefault(type(self).__name__, self.state())  # without, it cannot be saved
        self.restore(kept["attributes"])

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": self.attributes()}


class Clock(Kept):
    """Seconds of training, those that led to the checkpoint it goes on from included."""

    def __init__(self) -> None:
        self.began = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def attributes(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def restore(self, attributes: dict[str, Any]) -> None:
        self.began = time.perf_counter() - attributes["seconds"]


class StopOnSignal(TrainerCallback):
    """Ends training after the step, with a checkpoint, on SIGINT or SIGTERM to any process."""

    def __init__(self):
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles the signals within; a second one then acts as usual. Main thread only."""
        before = {}

        def ask(number, frame):
            self.asked = True
            signal.signal(number, before[number])

        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(self, args, state, control, **kwargs):
        self.asked = agreed(self.asked, args)
        if self.asked:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False


def agreed(value: float, args: TrainingArguments) -> float:
    """The largest value among the processes."""
    if args.world_size == 1:
        return value
    shared = torch.tensor(float(value), device=args.device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return shared.item()
