"""Scores on windows: MSE and MAE of standardised values, over every window, step and variable.

Two protocols, told apart in every table:

    plain     each window alone: what a forecast knows is its look-back (and `history_length` rows
              before it, if the model was trained with any); the field's protocol
    carried   a memory that has read the series from its first row up to the look-back
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pytitans.data.series import Windows
from pytitans.models.modeling_titans_forecasting import Rows, TitansForForecasting
from pytitans.state import map_state


class Score(NamedTuple):
    """Mean squared and mean absolute error, and the windows they are the means of."""

    mse: float
    mae: float
    windows: int


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


def stacked(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@torch.no_grad()
def score(model: PreTrainedModel, windows: Windows, batch_size: int = 256) -> Score:
    """Plain: of the point forecasts, each window for itself; the last batch is kept."""
    model.eval()
    errors, device = Errors(), next(model.parameters()).device
    for begin in range(0, len(windows), batch_size):
        rows = range(begin, min(begin + batch_size, len(windows)))
        batch = stacked([windows[i] for i in rows])
        past, future = (batch[k].to(device) for k in ("past_values", "future_values"))
        errors.add(model(past_values=past).prediction_outputs, future)
    return errors.score()


@torch.no_grad()
def score_carried(model: TitansForForecasting, windows: Windows) -> Score:
    """Carried: the same forecasts that a stream from row 0 gives at each origin. Origins between
    which the memory reads nothing new share its state, and are forecast together."""
    model.eval()
    context, stride = model.config.context_length, model.config.patch_stride
    values = windows.values.to(next(model.parameters()).device)
    stream = Rows(values.T.contiguous(), torch.ones_like(values.T, dtype=torch.bool))
    errors, states = Errors(), [None] * model.config.num_hidden_layers
    read = 0  # patches
    origins = list(windows.origins)
    while origins:
        left_behind = (origins[0] - context) // stride
        span = slice(read * stride, left_behind * stride + context)
        states, read = model.read_history(stream.part(span), states)[1], left_behind
        group = [o for o in origins[:stride] if (o - context) // stride == read]
        origins = origins[len(group) :]
        past = torch.cat([stream.values[:, o - context : o] for o in group])
        future = torch.stack([values[o : o + windows.horizon] for o in group])
        known = [repeated(state, len(group)) for state in states]
        look_back = Rows(past, torch.ones_like(past, dtype=torch.bool))
        errors.add(model.forecast(look_back, known, values.shape[1])[0], future)
    return errors.score()


def repeated(state: Any, times: int) -> Any:
    """A state of all variables, once for each of so many windows."""
    return map_state(lambda x: x.repeat(times, *[1] * (x.ndim - 1)), state)


def averages(cells: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The means over the horizons that the field's tables end with."""
    return {key: sum(cell[key] for cell in cells) / len(cells) for key in ("mse", "mae")}


def table(cells: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each model, protocol and look-back; MSE and MAE at each horizon, and
    their averages where there are several horizons. Cells that differ in their seed alone are
    averaged."""
    horizons = sorted({cell["horizon"] for cell in cells})
    keys = ("model", "protocol", "context_length")
    rows = list(dict.fromkeys(tuple(cell[key] for key in keys) for cell in cells))
    heads = [str(h) for h in horizons] + ["average"] * (len(horizons) > 1)
    lines = [
        "| " + " | ".join(["model", "protocol", "look-back", *heads]) + " |",
        "|" + "---|" * (3 + len(heads)),
    ]
    for row in rows:
        at = {}
        for horizon in horizons:
            same = [c for c in cells if (*(c[k] for k in keys), c["horizon"]) == (*row, horizon)]
            if same:
                at[horizon] = averages(same)
        shown = [pair(at.get(h)) for h in horizons]
        if len(horizons) > 1:
            shown.append(pair(averages(list(at.values())) if len(at) == len(horizons) else None))
        lines.append("| " + " | ".join([*map(str, row), *shown]) + " |")
    return "\n".join(lines)


def pair(found: dict[str, float] | None) -> str:
    return "" if found is None else f"{found['mse']:.3f} / {found['mae']:.3f}"
