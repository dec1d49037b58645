"""What a person sees of a run: the bar while it trains, the pictures when it is over."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainingArguments


class Progress(TrainerCallback):
    """A bar with the loss in bits per byte and the pace; a line for each evaluation and checkpoint.

    Args:
        bits: bits per byte of a loss of 1 nat per token.
        tokens_per_step: tokens that all processes train on in one step.
    """

    def __init__(self, bits: float, tokens_per_step: int):
        self.bits, self.tokens_per_step = bits, tokens_per_step
        self.seconds: list[float] = []  # of each step; evaluation and saving are not in them
        self.bar: tqdm | None = None

    @property
    def tokens_per_second(self) -> float:
        """The mean pace of the steps; the first, which warms up, counts only while it is alone."""
        seconds = self.seconds[1:] or self.seconds
        return len(seconds) * self.tokens_per_step / sum(seconds) if seconds else 0.0

    def on_train_begin(self, args: TrainingArguments, state, control, **kwargs):
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="training",
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 15,
            disable=not state.is_world_process_zero,
        )

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.began)
        if self.bar is not None:
            self.bar.update()

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs):
        if self.bar is None or not logs:
            return
        if "loss" in logs:
            pace = f"{self.describe(logs)}, {self.tokens_per_second:,.0f} tokens/s"
            self.bar.set_postfix_str(pace, refresh=False)
        if "eval_bits_per_byte" in logs:
            self.say(
                f"step {state.global_step}: validation {logs['eval_bits_per_byte']:.4f} bits/byte"
            )

    def describe(self, logs: dict[str, Any]) -> str:
        return f"{logs['loss'] * self.bits:.3f} bits/byte"

    def on_save(self, args, state, control, **kwargs):
        self.say(
            f"step {state.global_step}: saved {args.output_dir}/checkpoint-{state.global_step}"
        )

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()

    def say(self, line: str) -> None:
        if self.bar is not None and not self.bar.disable:
            self.bar.write(line)


def new_axes(width: float, height: float, **labels: Any):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(**labels)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plot_losses(history: Sequence[dict[str, Any]], bits: float, path: str | Path) -> None:
    """Writes the loss curve of a Trainer's log history as a PNG, in bits per byte."""
    trained = [(log["step"], log["loss"] * bits) for log in history if "loss" in log]
    validated = [
        (log["step"], log["eval_bits_per_byte"]) for log in history if "eval_bits_per_byte" in log
    ]
    figure, axes = new_axes(7, 4.5, xlabel="step", ylabel="bits per byte")
    for points, label, style in ((trained, "training", "-"), (validated, "validation", "o-")):
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
