"""Training any Hugging Face causal model on text, on `transformers.Trainer`.

AdamW (0.9, 0.95) with weight decay on matrices only, cosine schedule with warm-up, clipped
gradients, bf16 autocast where the hardware has it. Steps are the unit: runs of equal steps, batch
and length see the same windows of text in the same order, whatever the model.
"""

import copy
import json
import math
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer import TRAINER_STATE_NAME

from pytitans.cache import TitansCache
from pytitans.callbacks import Clock, KeepCacheOn, StopOnSignal, agreed
from pytitans.data.text import TextData, head, load_text
from pytitans.data.tokenizer import check_vocabulary
from pytitans.data.windows import (
    CarriedWindows,
    DrawnWindows,
    ScoredWindows,
    TokenText,
    tokenize,
)
from pytitans.evaluate import window_nll
from pytitans.models import TitansPreTrainedModel
from pytitans.penalty import GatePenalty
from pytitans.report import Progress, plot_losses

FACTS = "run.json"
CURVE = "loss.png"

# What `titans train` does when told nothing: a small model, a few minutes on two cores. Of its size
# linear memories with wide values are ahead of deep ones (docs/results.md).
DEFAULT_RUN: dict[str, Any] = {
    "model.variant": "mal",
    "model.hidden_size": 128,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 4,
    "model.intermediate_size": 288,
    "model.memory_depth": 1,
    "model.memories_per_head": 2,
    "model.memory_expansion": 2,
    "model.chunk_size": 16,
    "model.segment_len": 128,
    "model.window": 128,
    "data.sequence_length": 1024,
    "train.max_steps": 2200,
    "train.per_device_train_batch_size": 2,
    "train.learning_rate": 4e-3,
    "train.warmup_steps": 50,
    "train.carry": True,
}


def has_bf16() -> bool:
    """Whether bf16 matmuls are faster than float32 ones here."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@dataclass
class TrainArguments(TrainingArguments):
    """Hugging Face's TrainingArguments with this project's defaults and three options more.

    Args:
        output_dir: where checkpoints, model, logs and loss curve go; runs/VARIANT if not given
        max_steps: optimizer steps; short: --steps
        max_minutes: minutes of training, instead of max_steps: a few steps are timed, and as many
            planned as fit
        per_device_train_batch_size: sequences of a step, on each device
        learning_rate: its peak, after the warm-up
        gate_penalty: price on what a memory's gates write and forget (pytitans/penalty.py), for
            texts a thousand times longer than those trained on
        carry: begin most steps with the memory that the step before has left, so that the model
            learns to live with one that has read for long; no gradient goes back through it
        warmup_steps: steps, or a share of all below 1
        bf16: bf16 autocast; the default is whether the hardware here has bf16 matmuls
        eval_steps: steps between evaluations, or a share of all below 1
        eval_bytes: UTF-8 bytes of the validation text that are scored at each evaluation
        save_steps: steps between checkpoints, or a share of all below 1
        seed: of the first weights and of the order of the text
    """

    output_dir: str | None = None
    max_steps: int = 600
    max_minutes: float | None = None
    eval_bytes: int = 50_000
    gate_penalty: float = 0.0
    carry: bool = False
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    learning_rate: float = 2e-3
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 50
    weight_decay: float = 0.1
    adam_beta2: float = 0.95
    max_grad_norm: float = 1.0
    bf16: bool = field(default_factory=has_bf16)
    eval_strategy: str = "steps"
    eval_steps: float | None = 0.25
    save_steps: float = 0.25
    save_total_limit: int | None = 2
    logging_steps: float = 0.02
    report_to: str | list[str] | None = "tensorboard"
    disable_tqdm: bool | None = True
    seed: int = 0

    def __post_init__(self):
        if self.max_minutes is None and self.max_steps < 1:
            raise ValueError(f"max_steps={self.max_steps}: train for 1 step or more")
        if self.max_minutes is not None and self.max_minutes <= 0:
            raise ValueError(f"max_minutes={self.max_minutes}: give a time above 0")
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()  # asked for by bf16
        super().__post_init__()


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    data: TextData,
    args: TrainArguments,
    *,
    checkpoint: str | None = None,
) -> dict[str, Any]:
    """Trains the model; saves it, its tokenizer, `run.json` and `loss.png` in args.output_dir.

    From a `checkpoint` of the same run it goes on to the very weights that it would have had
    without the stop. Returns what `run.json` holds. Raises KeyboardInterrupt, with a checkpoint
    saved, when stopped by SIGINT or SIGTERM; ValueError for bad input, before training.
    """
    check_vocabulary(tokenizer, model.config.get_text_config().vocab_size)
    texts = load_text(data, ("train", "validation"))
    length = data.sequence_length
    text = tokenize(tokenizer, texts["train"], length)
    held_out = tokenize(tokenizer, head(texts["validation"], args.eval_bytes), length)
    return train_on_tokens(
        model, tokenizer, text, held_out, args, length=length, data=data, checkpoint=checkpoint
    )


def train_on_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    text: TokenText,
    held_out: TokenText,
    args: TrainArguments,
    *,
    length: int,
    data: Any,
    drawn: Callable[[TokenText, int, int, int], DrawnWindows] = DrawnWindows,
    checkpoint: str | None = None,
) -> dict[str, Any]:
    """`train` on ids. data: the dataclass that says where they are from, for `run.json`. drawn: the
    windows to train on, of text, length, count and seed."""
    args.max_steps = planned_steps(model, args, drawn(text, length, 64, args.seed), checkpoint)
    sequences = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    bits = text.tokens / text.bytes / math.log(2)
    progress = Progress(bits, sequences * length)
    windows = drawn(text, length, args.max_steps * sequences, args.seed)
    if args.carry:
        args.remove_unused_columns = False  # of a window: whether it is fresh
        windows = CarriedWindows(windows, args.train_batch_size * args.world_size)
    trainer = TextTrainer(
        model=model,
        args=args,
        gate_penalty=args.gate_penalty,
        train_dataset=windows,
        eval_dataset=ScoredWindows(held_out, length),
        processing_class=tokenizer,
        data_collator=default_data_collator,
        compute_metrics=lambda scored: {"bits_per_byte": bits_per_byte(scored, held_out.bytes)},
        preprocess_logits_for_metrics=nll_of_outputs,
        callbacks=[progress],
    )
    facts = run_trainer(trainer, checkpoint) | {
        "train_tokens": trainer.state.global_step * sequences * length,
        "tokens_per_second": round(progress.tokens_per_second, 1),
        "bits_per_byte": last_metric(trainer.state, "eval_bits_per_byte"),
        "eval_bytes": held_out.bytes,
        "train_bytes": text.bytes,
        "processes": args.world_size,
        "data": asdict(data),
    }
    save(trainer, facts)
    if trainer.is_world_process_zero():
        plot_losses(trainer.state.log_history, bits, Path(args.output_dir or "", CURVE))
    return facts


def run_trainer(trainer: Trainer, checkpoint: str | None = None) -> dict[str, Any]:
    """Trains to the end, and what every run's `run.json` holds of it.

    Raises KeyboardInterrupt, with a checkpoint saved, when stopped by SIGINT or SIGTERM.
    """
    args, stop, clock = trainer.args, StopOnSignal(), Clock()
    model: Any = trainer.model
    cached = getattr(type(model.config), "use_cache", False)  # by default; the Trainer undoes it
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(stop)
    trainer.add_callback(clock)
    if cached:
        trainer.add_callback(KeepCacheOn())
    with stop.listening():
        trainer.train(resume_from_checkpoint=checkpoint)
    if stop.asked:
        raise KeyboardInterrupt(
            f"saved; go on by --resume {args.output_dir}, or by the same command if it is a recipe"
        )
    if cached:
        model.config.use_cache = True
    return {
        "command": shlex.join(sys.argv),
        "parameters": model.num_parameters(),
        "steps": trainer.state.global_step,
        "seconds": round(clock.seconds, 1),
        "learning_rate": args.learning_rate,
        "weight_decay": args.weight_decay,
        "seed": args.seed,
        "bf16": args.bf16,
        "model": model.config.to_diff_dict(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


class TextTrainer(Trainer):
    """The Trainer with windows in their order, weight decay on matrices alone, a price on gates,
    and a memory that is carried on to windows that are not fresh."""

    def __init__(self, *args: Any, gate_penalty: float = 0.0, **options: Any):
        super().__init__(*args, **options)
        assert self.model is not None
        self.price = gate_penalty
        self.penalty = GatePenalty(self.model) if gate_penalty else None
        self.carried: TitansCache | None = None
        self.resumed: str | None = None  # the checkpoint whose memory is still to be taken
        self.add_callback(KeepCarried(self))

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **options: Any):
        self.resumed = resume_from_checkpoint
        return super().train(resume_from_checkpoint, *args, **options)

    def compute_loss(
        self, model, inputs, return_outputs: bool = False, num_items_in_batch=None
    ) -> Any:
        carries = self.read_on(inputs)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if carries:
            left: Any = outputs
            self.carried = left.cache.detach()
        loss = self.priced(model, loss, self.price)
        return (loss, outputs) if return_outputs else loss

    def read_on(self, inputs: dict[str, Any]) -> bool:
        """Whether the memory is carried; if so, the model is given what the step before has left,
        or nothing if the windows are fresh."""
        fresh, model = inputs.pop("fresh", None), cast(Any, self.model)
        if fresh is None or not isinstance(model, TitansPreTrainedModel):
            return False
        if self.resumed:
            path = KeepCarried.path(self.resumed, self.args)
            if path.exists():
                self.carried = TitansCache.load(path, model, fingerprint=KeepCarried.__name__)
            self.resumed = None
        cache = None if fresh.any() else self.carried
        inputs |= {"cache": cache, "use_cache": True}
        return True

    def priced(self, model, loss: Tensor, price: float | Tensor) -> Tensor:
        """The loss and the price of what the gates did for it."""
        if self.penalty is None or not model.training:
            return loss
        return loss + price * self.penalty.take()

    def _get_train_sampler(self, train_dataset: Dataset | None = None):
        dataset: Any = train_dataset or self.train_dataset
        return torch.utils.data.SequentialSampler(dataset)

    def get_decay_parameter_names(self, model) -> list[str]:
        return [name for name, weight in model.named_parameters() if weight.ndim > 1]


class KeepCarried(TrainerCallback):
    """Saves the memory that a trainer carries, of each process its own, with every checkpoint."""

    def __init__(self, trainer: TextTrainer):
        self.trainer = trainer

    @staticmethod
    def path(folder: str, args: TrainingArguments) -> Path:
        return Path(folder, f"carried-{args.process_index}.safetensors")

    def on_save(self, args, state, control, **kwargs):
        if self.trainer.carried is not None:
            folder = f"{args.output_dir}/checkpoint-{state.global_step}"
            model, by = cast(Any, self.trainer.model), type(self).__name__  # whatever its weights
            self.trainer.carried.save(self.path(folder, args), model, fingerprint=by)


def last_checkpoint(folder: str | Path) -> str | None:
    """The last checkpoint in the folder, if there is any. One without its state is not whole: the
    process was killed while it saved."""
    steps = {
        int(number): str(path.parent)
        for path in Path(folder).glob(f"checkpoint-*/{TRAINER_STATE_NAME}")
        if (number := path.parent.name.removeprefix("checkpoint-")).isdecimal()
    }
    return steps[max(steps)] if steps else None


def find_checkpoint(args: TrainingArguments, resume: bool) -> str | None:
    """The last checkpoint in output_dir if resuming; otherwise output_dir must not hold a run."""
    folder = args.output_dir or ""
    last = last_checkpoint(folder)
    if resume and last is None:
        raise ValueError(
            f"{folder!r} holds no checkpoint to resume from: start it without --resume"
        )
    if not resume and last is not None:
        raise ValueError(
            f"{folder!r} holds a run already: choose another --train.output_dir, continue it by "
            f"--resume {folder}, or delete it"
        )
    return last


def planned_steps(model, args: TrainArguments, windows: Dataset, checkpoint: str | None) -> int:
    """max_steps, or as many as fit in max_minutes; a resumed run keeps its plan."""
    if args.max_minutes is None:
        return args.max_steps
    if checkpoint is not None:
        return TrainerState.load_from_json(f"{checkpoint}/{TRAINER_STATE_NAME}").max_steps
    return max(1, int(args.max_minutes * 60 / agreed(seconds_per_step(model, args, windows), args)))


def seconds_per_step(model, args: TrainArguments, windows: Dataset, steps: int = 5) -> float:
    """The median time of a training step, on a copy of the model; its first two are not counted."""
    with torch.random.fork_rng():
        trial = copy.deepcopy(model).to(args.device).train()
        optimizer = torch.optim.AdamW(trial.parameters(), lr=0.0)
        rows = [windows[i] for i in range(args.train_batch_size)]
        batch = {k: v.to(args.device) for k, v in default_data_collator(rows).items()}
        times = []
        for _ in range(2 + steps):
            began = time.perf_counter()
            with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
                loss = trial(**batch, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()  # waits for the device
            times.append(time.perf_counter() - began)
    return statistics.median(times[2:]) * args.gradient_accumulation_steps


def nll_of_outputs(logits, labels):
    """What the Trainer is to keep of an evaluation's outputs: one number for each window."""
    return window_nll(logits[0] if isinstance(logits, tuple) else logits, labels)


def bits_per_byte(scored: EvalPrediction, size: int) -> float:
    return float(np.asarray(scored.predictions, np.float64).sum()) / math.log(2) / size


def last_metric(state: TrainerState, name: str) -> float | None:
    return next((log[name] for log in reversed(state.log_history) if name in log), None)


def save(trainer: Trainer, facts: dict[str, Any]) -> None:
    """The model, its tokenizer and the facts, in the run's folder."""
    trainer.save_model()
    if trainer.is_world_process_zero():
        path = Path(trainer.args.output_dir or "", FACTS)
        path.write_text(json.dumps(facts, indent=1, default=str) + "\n")
