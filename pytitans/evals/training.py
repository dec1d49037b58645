"""Training a model on a task's examples, from short ones to long ones, on `transformers.Trainer`.

    stages = [Stage([passkey], 96, 256, steps=400), Stage([niah], 448, 2048, steps=300)]
    train_on_tasks(model, tokenizer, stages, args)

What a long text asks for is learned from a short one: a model that is begun with 512 bytes of noise
around a key of five digits stays at chance for hundreds of steps (docs/log.md). So training goes in
stages, each with longer texts, and half of the texts of a stage are shorter than its longest.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pytitans.callbacks import Kept
from pytitans.data.windows import IGNORED
from pytitans.evals.task import Example, Task, collate
from pytitans.report import Progress, new_axes
from pytitans.train import CURVE, TextTrainer, TrainArguments, last_checkpoint, run_trainer, save

RECENT = 15  # steps that tell whether a stage is learned
TRAINING_SEEDS = 10**6  # added to a run's seed: no text is trained on that an evaluation asks


def task_arguments(folder: str | Path, rate: float, seed: int, **changes: Any) -> TrainArguments:
    """`titans train`'s settings, with a lower weight decay and few checkpoints."""
    fields = {
        "output_dir": str(folder),
        "learning_rate": rate,
        "seed": seed,
        "weight_decay": 0.01,
        "report_to": "none",
        "save_total_limit": 1,
    }
    return TrainArguments(**fields | changes)


@dataclass(frozen=True)
class Stage:
    """`steps` steps on tasks that take turns, on texts of `shortest` to `longest` tokens.

    until: it ends before, when the loss on the answers (nats a token, the mean of its last
        `RECENT` steps) is below; 0: `steps` steps.
    review: this share of the steps has the tasks and lengths of an earlier stage, any of them.
    fill: tokens of a step; a step has as many texts as fit into it, one at least.
    gate_penalty: price on open gates (`pytitans.penalty`), for the last stages: in the first ones
        it would close a memory that is of no use yet for good.

    Raises:
        ValueError: a field out of its bounds.
    """

    tasks: Sequence[Task]
    shortest: int
    longest: int
    steps: int
    fill: int = 8192
    gate_penalty: float = 0.0
    until: float = 0.0
    review: float = 0.0

    def __post_init__(self):
        wanted = {
            "tasks, one at least": len(self.tasks) > 0,
            "0 <= shortest <= longest": 0 <= self.shortest <= self.longest,
            "steps > 0": self.steps > 0,
            "fill > 0": self.fill > 0,
            "gate_penalty >= 0": self.gate_penalty >= 0,
            "until >= 0": self.until >= 0,
            "0 <= review < 1": 0 <= self.review < 1,
        }
        missed = [what for what, holds in wanted.items() if not holds]
        if missed:
            raise ValueError(f"a stage is to have {' and '.join(missed)}; this is {self}")


class TaskBatches(Dataset):
    """Whole batches in their order, each the same whenever it is asked for."""

    def __init__(self, stages: Sequence[Stage], seed: int):
        self.stages, self.seed = stages, seed
        self.steps = [stage.steps for stage in stages]  # fewer, once a stage has ended before
        for stage in stages:  # what does not fit is told now, not in an hour
            for task in stage.tasks:
                task.example(0, length=stage.shortest, seed=seed)

    def __len__(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def ends(self) -> np.ndarray:
        """The step before which each stage ends."""
        return np.cumsum(self.steps)

    def stage_at(self, step: int) -> int:
        return min(int(np.searchsorted(self.ends, step, side="right")), len(self.stages) - 1)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        number = self.stage_at(step)
        now = stage = self.stages[number]
        seed = TRAINING_SEEDS + self.seed
        rng = np.random.default_rng([seed, step])
        whole = rng.random() < 0.5
        reviews = number > 0 and stage.review > 0 and rng.random() < stage.review
        if reviews:
            stage = self.stages[int(rng.integers(number))]
        length = stage.longest if whole else int(rng.integers(stage.shortest, stage.longest + 1))
        task = stage.tasks[step % len(stage.tasks)]
        found = task.examples(stage.fill, length=length, seed=seed, first=step * stage.fill)
        ids, targets = collate(filling(found, stage.fill))
        facts = {"price": torch.tensor(now.gate_penalty), "reviews": torch.tensor(reviews)}
        return {"input_ids": ids, "targets": targets, **facts}


class StageEnds(Kept):
    """Ends a stage once it is learned, and knows it again when a run goes on from a checkpoint."""

    def __init__(self, batches: TaskBatches):
        self.batches = batches
        self.losses: list[float] = []  # of this stage's steps, the last ones

    def on_step_end(self, args, state, control, **kwargs):
        batches, done = self.batches, state.global_step
        number = batches.stage_at(done - 1)
        learned = len(self.losses) == RECENT and mean(self.losses) < batches.stages[number].until
        if learned and done + 1 < batches.ends[number]:
            # The next batch is drawn already, before this step's loss is known.
            batches.steps[number] -= int(batches.ends[number]) - done - 1
        elif done == batches.ends[number]:
            self.losses.clear()
            control.should_training_stop |= number + 1 == len(batches.stages)

    def told(self, loss: float) -> None:
        self.losses = [*self.losses, loss][-RECENT:]

    def attributes(self) -> dict[str, Any]:
        return {"steps": self.batches.steps, "losses": self.losses}

    def restore(self, attributes: dict[str, Any]) -> None:
        self.batches.steps, self.losses = list(attributes["steps"]), list(attributes["losses"])


def filling(examples: Iterable[Example], fill: int) -> list[Example]:
    """As many as have `fill` tokens when all are as long as the longest; one at least."""
    kept: list[Example] = []
    longest = 0
    for example in examples:
        longest = max(longest, len(example.ids))
        if kept and longest * (len(kept) + 1) > fill:
            break
        kept.append(example)
    return kept


class TaskTrainer(TextTrainer):
    """The loss is the answers', and `rest` times that of all other tokens."""

    def __init__(self, *args: Any, ends: StageEnds, rest: float = 0.1, **options: Any):
        super().__init__(*args, **options)
        self.ends, self.rest = ends, rest
        self.add_callback(ends)

    def compute_loss(
        self, model, inputs, return_outputs: bool = False, num_items_in_batch=None
    ) -> Any:
        ids, targets = inputs["input_ids"], inputs["targets"]
        outputs = model(input_ids=ids, use_cache=False)
        logits, asked = outputs.logits.float(), targets != IGNORED
        answers = cross_entropy(logits[asked], targets[asked])  # few: others are not looked at
        loss = answers
        if self.rest:
            rest = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            loss = loss + self.rest * rest
        if model.training:
            right = ~asked
            right[asked] = logits.detach()[asked].argmax(-1) == targets[asked]
            self.seen.append((answers.item(), right.all(1).float().mean().item()))
            if not inputs["reviews"]:
                self.ends.told(answers.item())
        loss = self.priced(model, loss, inputs["price"])
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        if self.seen and "loss" in logs:
            answers, exact = (sum(x) / len(x) for x in zip(*self.seen, strict=True))
            stage = self.ends.batches.stage_at(self.state.global_step - 1) + 1
            logs |= {"answer_loss": answers, "exact": exact, "stage": stage}
            self.seen.clear()
        super().log(logs, *args, **options)

    def train(self, *args: Any, **options: Any):
        self.seen: list[tuple[float, float]] = []
        return super().train(*args, **options)


class TaskProgress(Progress):
    """A bar with the loss on the answers, and the share of texts with all of them right; it gets
    shorter as stages end before their last step."""

    def __init__(self, batches: TaskBatches):
        super().__init__(1.0, sum(s.steps * s.fill for s in batches.stages) // len(batches))
        self.batches = batches

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.total = int(self.batches.ends[-1])
        super().on_step_end(args, state, control, **kwargs)

    def describe(self, logs: dict[str, Any]) -> str:
        answers = f"answers: loss {logs['answer_loss']:.3f}, all right in {logs['exact']:.0%}"
        return f"stage {logs['stage']}, {answers}"


def train_on_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast | None,
    stages: Sequence[Stage],
    args: TrainArguments,
    *,
    rest: float = 0.1,
) -> dict[str, Any]:
    """Trains the model; saves it, its tokenizer, `run.json` and `loss.png` in args.output_dir.

    rest: what a token that is no answer counts; 0 for tasks whose text is random. Steps, lengths
    and texts follow from the stages and args.seed alone, so that runs of several models see the
    same, unless stages end when they are learned (`Stage.until`); a learning rate that falls with
    the steps then falls by the most there can be. It goes on from a checkpoint in the folder.
    Returns what `run.json` holds.

    Raises:
        KeyboardInterrupt: stopped by SIGINT or SIGTERM; a checkpoint is saved.
        ValueError: more than one process, or steps of several batches.
    """
    processes, accumulated = args.world_size, args.gradient_accumulation_steps
    if processes * accumulated > 1:
        raise ValueError(
            f"{processes} processes x {accumulated} accumulated batches a step; a step on "
            "tasks is one batch, whose stage its number decides. "
            "Run one process, accumulate nothing, and make batches larger by Stage(fill=...)"
        )
    batches = TaskBatches(stages, args.seed)
    args.max_steps, args.eval_strategy = len(batches), "no"
    args.per_device_train_batch_size = 1  # a batch is ready-made
    args.remove_unused_columns = False  # of the batch: the targets, which no model takes
    trainer = TaskTrainer(
        ends=StageEnds(batches),
        rest=rest,
        model=model,
        args=args,
        gate_penalty=max(stage.gate_penalty for stage in stages),
        train_dataset=batches,
        processing_class=tokenizer,
        data_collator=lambda rows: rows[0],
        callbacks=[TaskProgress(batches)],
    )
    folder = Path(args.output_dir or "")
    facts = run_trainer(trainer, last_checkpoint(folder))
    history = [log for log in trainer.state.log_history if "answer_loss" in log]
    facts |= {
        "rest": rest,
        "stages": [
            {
                "tasks": [task.name for task in s.tasks],
                "lengths": [s.shortest, s.longest],
                "steps": steps,
                "fill": s.fill,
                "gate_penalty": s.gate_penalty,
                "until": s.until,
                "review": s.review,
            }
            for s, steps in zip(stages, batches.steps, strict=True)
        ],
        "history": [[log["step"], log["answer_loss"], log["exact"]] for log in history],
    }
    save(trainer, facts)
    plot_answers(facts, folder / CURVE)
    return facts


def plot_answers(facts: dict[str, Any], path: Path) -> None:
    """Loss on the answers and share of texts right, over steps; lines where a stage ends."""
    figure, axes = new_axes(
        7, 4.2, xlabel="step (lines: stages, and their longest text)", ylabel="loss on the answers"
    )
    steps, losses, exact = zip(*facts["history"], strict=True)
    axes.plot(steps, losses, color="#2b6cb0")
    right = axes.twinx()
    right.plot(steps, [100 * x for x in exact], color="#c05621")
    right.set_ylabel("texts with all answers right, %")
    right.set_ylim(0, 102)
    ends = np.cumsum([0, *[stage["steps"] for stage in facts["stages"]]])
    axes.set_xlim(0, ends[-1])
    for i, stage in enumerate(facts["stages"]):
        axes.axvline(ends[i + 1], color="#cbd5e0", zorder=0)
        place = (ends[i] + ends[i + 1]) / 2, 1.01 + 0.04 * (i % 2)  # short ones side by side
        longest, above = f"to {stage['lengths'][1]:,}", axes.get_xaxis_transform()
        axes.text(*place, longest, ha="center", va="bottom", fontsize=8, transform=above)
    figure.savefig(path, dpi=120)


@torch.inference_mode()
def answer_loss(model: PreTrainedModel, task: Task, *, length: int, texts: int, seed: int) -> float:
    """Nats per asked token on texts that neither training nor an evaluation of that seed has."""
    ids, targets = task.batch(texts, length=length, seed=2 * TRAINING_SEEDS + seed)
    model.eval()
    losses = []
    for rows, wanted in zip(ids.split(8), targets.split(8), strict=True):
        logits = model(input_ids=rows, use_cache=False).logits.float().mT
        losses.append(cross_entropy(logits, wanted, ignore_index=IGNORED).item())
    return sum(losses) / len(losses)
