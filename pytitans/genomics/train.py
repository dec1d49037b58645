"""Training on DNA: a classifier of sequences, or a model of the next base of a genome.

Both on the loop of `pytitans.train`; what is drawn when: `pytitans.genomics.batches`.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerFast

from pytitans.data.dna import EOS_ID, stored_bases
from pytitans.data.dna_sets import SPLITS, DnaData, Sets
from pytitans.data.windows import DrawnWindows, TokenText
from pytitans.genomics.batches import (
    Collated,
    DrawnSequences,
    DrawnStrands,
    OrderedSequences,
    collate,
)
from pytitans.genomics.scores import average_strands, scores
from pytitans.report import Progress, new_axes
from pytitans.train import (
    CURVE,
    TextTrainer,
    TrainArguments,
    planned_steps,
    run_trainer,
    save,
    train_on_tokens,
)

TRAIN, DEV = 0.8, 0.1  # shares of a genome: its beginning, and what comes next; the rest is test


class ClassifierProgress(Progress):
    """A bar with the loss; a line for each evaluation on the dev set."""

    def describe(self, logs: dict[str, Any]) -> str:
        return f"loss {logs['loss']:.3f}"

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs):
        super().on_log(args, state, control, logs, **kwargs)
        if logs and "eval_mcc" in logs:
            found = f"MCC {logs['eval_mcc']:.4f}, accuracy {logs['eval_accuracy']:.4f}"
            self.say(f"step {state.global_step}: dev {found}")


def train_classifier(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    sets: Sets,
    data: DnaData,
    args: TrainArguments,
    *,
    checkpoint: str | None = None,
) -> dict[str, Any]:
    """Trains on sets.train; saves the model, its tokenizer, `run.json` and `loss.png` in
    args.output_dir. With `load_best_model_at_end` the model is that of the evaluation with the best
    MCC on sets.dev. The test set is not looked at. Returns what `run.json` holds.

    Raises KeyboardInterrupt, with a checkpoint saved, when stopped by SIGINT or SIGTERM.
    """
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    augment, both = data.augments, data.averages
    args.remove_unused_columns = False
    if args.load_best_model_at_end:
        args.metric_for_best_model, args.greater_is_better = "mcc", True
    args.max_steps = planned_steps(
        model, args, Collated(DrawnSequences(sets.train, 64, args.seed, augment)), checkpoint
    )
    mean_length = float(np.mean([len(x) for x in sets.train.sequences]))
    progress = ClassifierProgress(1.0, round(batch * mean_length))
    trainer = TextTrainer(
        model=model,
        args=args,
        gate_penalty=args.gate_penalty,
        train_dataset=DrawnSequences(sets.train, args.max_steps * batch, args.seed, augment),
        eval_dataset=OrderedSequences(sets.dev, both),
        processing_class=tokenizer,
        data_collator=collate,
        compute_metrics=lambda found: dev_scores(found, sets.dev.labels, both),
        preprocess_logits_for_metrics=logits_alone,
        callbacks=[progress],
    )
    facts = run_trainer(trainer, checkpoint)
    found = trainer.evaluate()
    facts |= {
        "sequences": trainer.state.global_step * batch,
        "epochs": round(trainer.state.global_step * batch / len(sets.train.labels), 2),
        "best_step": trainer.state.best_global_step,
        "tokens_per_second": round(progress.tokens_per_second, 1),
        "dev": {key: found[f"eval_{key}"] for key in ("loss", "mcc", "accuracy")},
        "sizes": {name: len(getattr(sets, name).labels) for name in SPLITS},
        "split": sets.split,
        "classes": sets.classes,
        "data": asdict(data),
    }
    save(trainer, facts)
    plot_training(trainer.state.log_history, Path(args.output_dir or "", CURVE))
    return facts


def logits_alone(logits: Any, labels: Tensor) -> Tensor:
    return logits[0] if isinstance(logits, tuple) else logits


def dev_scores(found: EvalPrediction, labels: np.ndarray, both: bool) -> dict[str, float]:
    probabilities = torch.from_numpy(np.asarray(found.predictions)).float().softmax(-1).numpy()
    return scores(average_strands(probabilities, both), labels)


def plot_training(history: Sequence[dict[str, Any]], path: Path) -> None:
    """The training loss, and the dev set's MCC, over steps."""
    figure, axes = new_axes(7, 4.2, xlabel="step", ylabel="training loss")
    losses = [(log["step"], log["loss"]) for log in history if "loss" in log]
    if losses:
        axes.plot(*zip(*losses, strict=True), color="#2b6cb0")
    right = axes.twinx()
    found = [(log["step"], log["eval_mcc"]) for log in history if "eval_mcc" in log]
    right.plot(*zip(*found, strict=True), "o-", color="#c05621", markersize=4)
    right.set_ylabel("MCC on the dev set")
    figure.savefig(path, dpi=120)


def train_bases(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    data: DnaData,
    args: TrainArguments,
    *,
    checkpoint: str | None = None,
) -> dict[str, Any]:
    """Trains a causal model on the first 80 % of the bases of data.files (FASTA); it is evaluated
    on the first args.eval_bytes bases of the next 10 %. In `run.json` bits per byte are bits per
    base. The genome is a temporary file, so its length does not matter."""
    streams = [ids for path in data.files for ids in stored_bases(path)]
    train, dev, _ = split_genome(streams)
    drawn = DrawnStrands if data.augments else DrawnWindows
    return train_on_tokens(
        model,
        tokenizer,
        joined(train, data.sequence_length),
        joined([ids[: args.eval_bytes] for ids in dev][:1], data.sequence_length),
        args,
        length=data.sequence_length,
        data=data,
        drawn=drawn,
        checkpoint=checkpoint,
    )


def split_genome(streams: Sequence[np.ndarray]) -> tuple[list[np.ndarray], ...]:
    """Train, dev and test: parts of the whole, record after record, cut where a share ends."""
    total = sum(map(len, streams))
    borders = [0, round(TRAIN * total), round((TRAIN + DEV) * total), total]
    parts: tuple[list[np.ndarray], ...] = ([], [], [])
    start = 0
    for ids in streams:
        for part, begin, end in zip(parts, borders, borders[1:], strict=False):
            piece = ids[max(0, begin - start) : max(0, end - start)]
            if len(piece):
                part.append(piece)
        start += len(ids)
    return parts


def joined(streams: Sequence[np.ndarray], length: int) -> TokenText:
    """As `pytitans.data.windows.tokenize`: streams shorter than a window become one."""
    long = [ids for ids in streams if len(ids) > length]
    short = [ids for ids in streams if len(ids) <= length]
    bases = sum(int((ids != EOS_ID).sum()) for ids in streams)
    return TokenText([*long, np.concatenate(short)] if short else long, EOS_ID, bases, bases)
