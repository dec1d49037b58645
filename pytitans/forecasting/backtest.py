"""Scores on windows: MSE and MAE of standardised values, over every window, step and variable."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pytitans.data.series import Windows


class Score(NamedTuple):
    """Mean squared and mean absolute error, and the windows they are the means of."""

    mse: float
    mae: float
    windows: int


def stacked(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@torch.no_grad()
def score(model: PreTrainedModel, windows: Windows, batch_size: int = 256) -> Score:
    """Of the model's point forecasts, each window for itself; the last batch is kept."""
    model.eval()
    total = Errors()
    for begin in range(0, len(windows), batch_size):
        rows = range(begin, min(begin + batch_size, len(windows)))
        batch = stacked([windows[i] for i in rows])
        past, future = (batch[k].to(model.device) for k in ("past_values", "future_values"))
        total.add(model(past_values=past).prediction_outputs, future)
    return total.score()


class Errors:
    """Sums of errors, in float64."""

    def __init__(self):
        self.squared = self.absolute = 0.0
        self.count = self.windows = 0

    def add(self, prediction: Tensor, future: Tensor) -> None:
        error = (prediction - future).double()
        self.squared += error.square().sum().item()
        self.absolute += error.abs().sum().item()
        self.count += error.numel()
        self.windows += len(error)

    def score(self) -> Score:
        return Score(self.squared / self.count, self.absolute / self.count, self.windows)


def averages(cells: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The means over the horizons that the field's tables end with."""
    return {key: sum(cell[key] for cell in cells) / len(cells) for key in ("mse", "mae")}
