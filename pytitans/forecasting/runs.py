"""A run: a model trained for one horizon, its folder, its forecasts in the units of the table."""

import json
import platform
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, set_seed

from pytitans.cache import TitansCache
from pytitans.data.series import Scaler, Series, SeriesData, SplitSeries, load_splits
from pytitans.evals.results import VERSION, describe_model, describe_software
from pytitans.forecasting.backtest import score, score_carried
from pytitans.forecasting.baselines import BASELINES, build_baseline
from pytitans.forecasting.train import ForecastArguments, fit
from pytitans.models.configuration_titans import VARIANTS
from pytitans.models.configuration_titans_forecasting import TitansForecastingConfig
from pytitans.models.modeling_titans_forecasting import TitansForForecasting

FACTS = "run.json"
NAMES = (*VARIANTS, *BASELINES)


@dataclass
class Forecast:
    """Rows to come, in the table's units: point [horizon, V], quantiles [horizon, V, Q] or None."""

    dates: np.ndarray
    point: np.ndarray
    quantiles: np.ndarray | None


@dataclass
class Run:
    """A trained model and the facts of its training."""

    model: PreTrainedModel
    facts: dict[str, Any]

    @property
    def name(self) -> str:
        return self.facts["name"]

    @property
    def horizon(self) -> int:
        return self.facts["horizon"]

    @property
    def columns(self) -> list[str]:
        return self.facts["series"]["columns"]

    @property
    def scaler(self) -> Scaler:
        kept = self.facts["scaler"]
        return Scaler(np.array(kept["mean"]), np.array(kept["std"]))

    @property
    def data(self) -> SeriesData:
        """What it was trained on."""
        return SeriesData(**self.facts["data"])

    @property
    def reads(self) -> int:
        """Rows before an origin that a forecast is made from."""
        return rows_read(self.name, self.data, self.facts["series"]["season"])

    def forecast(self, series: Series, origin: int) -> Forecast:
        """What follows row `origin` - 1 of the series, from the look-back alone."""
        known = series.dates[:origin]
        return self.predict(series.values[origin - self.reads : origin], self.later(known))

    @torch.no_grad()
    def predict(
        self, rows: np.ndarray, dates: np.ndarray, cache: TitansCache | None = None
    ) -> Forecast:
        """What follows the rows [T, V], at these dates; the rows follow those that the cache, a
        Titans model's, has read, and it reads on."""
        self.model.eval()
        options = {} if cache is None else {"cache": cache}
        past = torch.as_tensor(self.scaler.apply(rows), dtype=torch.float32)
        out = self.model(past_values=past[None].to(self.model.device), **options)
        point = self.scaler.undo(out.prediction_outputs[0].cpu().double().numpy())
        quantiles, kept = None, getattr(out, "quantile_outputs", None)
        if kept is not None:
            levels = kept[0].cpu().double().movedim(-1, 0).numpy()
            quantiles = np.moveaxis(self.scaler.undo(levels), 0, -1)
        return Forecast(dates, point, quantiles)

    def later(self, dates: np.ndarray) -> np.ndarray:
        """The dates of the horizon after the last of these."""
        if len(dates) > 2:
            return Series("", dates, dates, []).later_dates(self.horizon)
        seconds = round(self.facts["series"]["step_seconds"])
        return dates[-1] + np.timedelta64(seconds, "s") * np.arange(1, self.horizon + 1)


def rows_read(name: str, data: SeriesData, season: int) -> int:
    if name == "seasonal_naive":
        return max(data.context_length, season)
    return data.context_length + data.history_length * (name in VARIANTS)


def build_model(
    name: str, fields: dict[str, Any], split: SplitSeries, data: SeriesData, horizon: int
) -> PreTrainedModel:
    """The model of that name for the series; `fields` are its configuration's."""
    channels = split.values.shape[1]
    if name in VARIANTS:
        return TitansForForecasting(
            TitansForecastingConfig(
                **fields | {
                    "variant": name, "num_input_channels": channels,
                    "context_length": data.context_length, "prediction_length": horizon,
                }
            )
        )  # fmt: skip
    return build_baseline(
        name, channels, data.context_length, horizon, split.series.season, **fields
    )


def train_run(
    name: str,
    fields: dict[str, Any],
    data: SeriesData,
    horizon: int,
    args: ForecastArguments,
    *,
    carried: bool = False,
    checkpoint: str | None = None,
) -> Run:
    """Trains the model of that name, from a checkpoint of the same run if there is one, and saves
    it, with its scores on validation and test windows, in args.output_dir. Choices (epochs,
    learning rates) are made on validation alone."""
    folder = Path(args.output_dir or "")
    split = load_splits(data, horizon)
    set_seed(args.seed)
    model = build_model(name, fields, split, data, horizon)
    reads = rows_read(name, data, split.series.season)
    trained: dict[str, Any] = {}
    if any(p.requires_grad for p in model.parameters()):
        train = split.windows("train", reads, horizon)
        held_out = split.windows("validation", reads, horizon, args.validation_stride)
        trained = fit(model, train, held_out, args, checkpoint)
    else:
        model.save_pretrained(folder)
    run = Run(model, {
        "version": VERSION,
        "task": "forecast",
        "name": name,
        "horizon": horizon,
        "seed": args.seed,
        "command": shlex.join(sys.argv),
        "data": {**asdict(data), "columns": list(data.columns)},
        "series": {
            "name": split.series.name,
            "rows": len(split.values),
            "step_seconds": float(split.series.step / np.timedelta64(1, "s")),
            "season": split.series.season,
            "columns": split.series.columns,
            "borders": list(split.borders),
        },
        "scaler": {"mean": split.scaler.mean.tolist(), "std": split.scaler.std.tolist()},
        "model": describe_model(model, name) | {"config": model.config.to_diff_dict()},
        "learning_rate": args.learning_rate,
        "training": trained,
        "software": describe_software() | {"machine": platform.machine()},
        "cells": [],
        "finished": True,
    })  # fmt: skip
    run.facts["cells"] = backtest(run, split, carried)
    save_facts(run, folder)
    return run


def backtest(run: Run, split: SplitSeries, carried: bool) -> list[dict[str, Any]]:
    """Scores on every window of validation and test; with `carried`, also with a memory of all
    that came before."""
    cells = []
    for part in ("validation", "test"):
        windows = split.windows(part, run.reads, run.horizon)
        scores = {"plain": score(run.model, windows)}
        if carried and isinstance(run.model, TitansForForecasting):
            scores["carried"] = score_carried(run.model, windows)
        place = {
            "model": run.name, "split": part, "context_length": run.data.context_length,
            "horizon": run.horizon, "seed": run.facts["seed"],
        }  # fmt: skip
        cells += [{**place, "protocol": p, **found._asdict()} for p, found in scores.items()]
    return cells


def save_facts(run: Run, folder: Path) -> None:
    (folder / FACTS).write_text(json.dumps(run.facts, indent=1, default=str) + "\n")


def load_run(folder: str | Path) -> Run:
    """A run from its folder; ValueError if it holds none."""
    try:
        facts = json.loads((Path(folder) / FACTS).read_text())
        name = facts["name"]
        kind = TitansForForecasting if name in VARIANTS else BASELINES[name][1]
        model: Any = kind.from_pretrained(folder)
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"{str(folder)!r} holds no forecasting run that can be loaded ({error}): make one by "
            "`titans forecast train`"
        ) from error
    return Run(model.eval().to(torch.accelerator.current_accelerator() or "cpu"), facts)


def run_folders(folder: str | Path) -> list[Path]:
    """The folder of a run, or those of its horizons in the order of these."""
    path = Path(folder)
    if (path / FACTS).exists():
        return [path]
    found = [p.parent for p in path.glob(f"h*/{FACTS}")]
    if not found:
        raise ValueError(f"{str(folder)!r} holds no run: make one by `titans forecast train`")
    return sorted(found, key=lambda p: int(p.name[1:]) if p.name[1:].isdigit() else 0)
