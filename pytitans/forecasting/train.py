"""Training any model with Hugging Face's time-series signature, on `transformers.Trainer`.

Adam on shuffled windows of the train rows; after each epoch (or `eval_steps`) the validation loss;
the weights of the best one are kept, and training stops when it has not improved for `patience`
evaluations. The test rows have no part in it.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    ProgressCallback,
    Trainer,
    TrainingArguments,
)

from pytitans.forecasting.backtest import stacked
from pytitans.report import Progress
from pytitans.train import run_trainer


@dataclass
class ForecastArguments(TrainingArguments):
    """Hugging Face's TrainingArguments with defaults for forecasting and two options more.

    Args:
        output_dir: where model, facts, table and pictures go; runs/NAME-VARIANT if not given
        num_train_epochs: passes over the train windows at most
        max_steps: optimizer steps at most, instead of epochs; short: --steps
        patience: evaluations without a better validation loss after which training ends
        validation_stride: every so many-th validation window is scored while training; all of them
            in the backtest
        per_device_train_batch_size: windows of a step
        learning_rate: its peak, after the warm-up
        seed: of the first weights and of the order of the windows
    """

    output_dir: str | None = None
    num_train_epochs: float = 10
    patience: int = 3
    validation_stride: int = 1
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 256
    learning_rate: float = 1e-3
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    eval_strategy: str = "epoch"
    save_strategy: str = "best"
    save_total_limit: int | None = 2  # of 1, the Trainer would drop all but the best when stopped
    load_best_model_at_end: bool = True
    metric_for_best_model: str | None = "eval_loss"
    greater_is_better: bool | None = False
    logging_steps: float = 50
    report_to: str | list[str] | None = "none"
    disable_tqdm: bool | None = True
    remove_unused_columns: bool = False
    prediction_loss_only: bool = True
    seed: int = 0

    def __post_init__(self):
        if self.patience < 1 or self.validation_stride < 1:
            raise ValueError(
                f"patience={self.patience} and validation_stride={self.validation_stride} must be "
                "1 or more"
            )
        self.label_names = ["future_values"]
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()


def fit(
    model: PreTrainedModel,
    train: Dataset,
    validation: Dataset,
    args: ForecastArguments,
    checkpoint: str | None = None,
) -> dict[str, Any]:
    """Trains the model, saves it in args.output_dir with its best weights; what came of it. From a
    checkpoint of the same run it goes on.

    Raises KeyboardInterrupt, with a checkpoint saved, when stopped by SIGINT or SIGTERM.
    """
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=stacked,
        callbacks=[ForecastProgress(), EarlyStoppingCallback(args.patience)],
    )
    trainer.remove_callback(ProgressCallback)
    facts = run_trainer(trainer, checkpoint)
    trainer.save_model()
    for spent in Path(args.output_dir or "").glob("checkpoint-*"):
        shutil.rmtree(spent)
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    return {key: facts[key] for key in ("steps", "seconds", "parameters")} | {
        "epochs": round(trainer.state.epoch or 0, 2),
        "validation_loss": min(losses),
        "history": trainer.state.log_history,
    }


class ForecastProgress(Progress):
    """A bar with the training loss, and a line for each evaluation."""

    def __init__(self):
        super().__init__(1.0, 1)

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs):
        if self.bar is not None and logs and "loss" in logs:
            self.bar.set_postfix_str(f"loss {logs['loss']:.4f}", refresh=False)
        if logs and "eval_loss" in logs:
            self.say(f"epoch {state.epoch:.2f}: validation loss {logs['eval_loss']:.4f}")

    def on_save(self, args, state, control, **kwargs):
        """Said by the evaluations."""
