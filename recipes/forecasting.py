"""The forecasting table of a data set: every model, horizon and seed, by one command.

    python recipes/forecasting.py ETT-small.zip::ETTh1.csv
    python recipes/forecasting.py weather.zip
    python recipes/forecasting.py ETT-small.zip::ETTm1.csv --models lmm@336 dlinear@336 --seeds 0
    python recipes/forecasting.py ETT-small.zip::ETTh1.csv --report

A model is VARIANT@LOOKBACK, as lmm@96, mac@336, dlinear@96; lmm@96+672 reads 672 rows more with
its memory alone while it is trained, and is also tested with a memory that has read the whole
series up to the look-back ("carried"). The protocol is `pytitans/data/series.py`'s.

Nothing is chosen by the test rows: the learning rate of a model is at each horizon the one of three
with which it has the lowest validation MSE at seed 0, and each run keeps the weights of its lowest
validation loss. That is the Huber loss, for all but PatchTST, whose class has MSE. All is below
--output, one folder a run; a stopped recipe goes on with the same command. The table and all scores
go to --results/NAME.md and NAME.json. How runs are kept: `recipes/experiment.py`.
"""

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from experiment import Experiment, run_experiment, sweeps, with_earlier

HORIZONS = (96, 192, 336, 720)
MODELS = (
    "lmm@96", "lmm@336", "lmm@720", "mac@336", "mag@336", "mal@336",
    "dlinear@96", "dlinear@336", "dlinear@720", "rlinear@336", "rlinear@720",
    "itransformer@96", "patchtst@336", "seasonal_naive@96",
)  # fmt: skip
UNEVEN = ("weather",)  # a date that repeats and a gap, which the community's loaders do not see
LARGE = 20_000  # rows from which on a series counts as large
LONG = 720  # rows from which on a look-back counts as long

HUBER = {"loss": "huber"}  # better on validation rows than MSE, for Titans and DLinear alike
MAE = {"loss": "mae"}  # and this, where the look-back is long
SHAPE: dict[str, Any] = HUBER | {
    "num_attention_heads": 2, "num_hidden_layers": 1, "patch_length": 16, "patch_stride": 16,
    "chunk_size": 16,
}  # fmt: skip
TITANS: dict[str, dict[str, Any]] = {  # found on validation rows of ETT
    "small": SHAPE | {"hidden_size": 32, "intermediate_size": 64, "dropout": 0.3},
    "small, from 192": SHAPE | {"hidden_size": 32, "intermediate_size": 64, "dropout": 0.9},
    "large": SHAPE | {"hidden_size": 64, "intermediate_size": 64, "dropout": 0.2},
    "large, long": SHAPE
    | MAE
    | {
        "hidden_size": 64,
        "intermediate_size": 64,
        "dropout": 0.5,
        "patch_length": 48,
        "patch_stride": 48,
    },
}
FIELDS: dict[str, dict[str, Any]] = {  # what a baseline's authors take, but for the loss
    "dlinear": {"small": HUBER, "large": HUBER, "large, long": MAE},
    "rlinear": {"small": HUBER, "large": HUBER, "large, long": MAE},
    "itransformer": {"small": HUBER | {"d_model": 256, "ffn_dim": 256}, "large": HUBER},
    "patchtst": {
        "small": {},
        "large": {
            "d_model": 128, "ffn_dim": 256, "num_attention_heads": 16, "positional_dropout": 0.2,
            "ff_dropout": 0.2, "path_dropout": 0.2,
        },
    },
}  # fmt: skip
RATES = {
    "dlinear": (1e-4, 1e-3, 5e-3),
    "rlinear": (1e-4, 1e-3, 5e-3),
    "itransformer": (1e-4, 5e-4, 1e-3),
    "patchtst": (1e-4, 5e-4, 2e-3),
    "seasonal_naive": (1e-3,),  # it learns nothing
}
TITANS_RATES = (5e-4, 1e-3, 2e-3)


class Name(NamedTuple):
    """lmm@96+672-h192, in parts."""

    variant: str
    context: int
    history: int
    horizon: int

    @classmethod
    def of(cls, text: str) -> "Name":
        model, _, horizon = text.rpartition("-h")
        variant, _, rows = model.partition("@")
        context, _, history = rows.partition("+")
        return cls(variant, int(context), int(history or 0), int(horizon))


class Forecasting(Experiment):
    def __init__(self, args: argparse.Namespace):
        super().__init__(args)
        self.models = tuple(f"{m}-h{h}" for m in args.models for h in sorted(args.horizons))

    @property
    def size(self) -> str:
        return "large" if self.args.rows > LARGE else "small"

    def data(self, name: Name):
        from pytitans.data.series import SeriesData

        return SeriesData(
            file=self.args.file,
            context_length=name.context,
            history_length=name.history,
            uneven_dates=self.args.name in UNEVEN,
        )

    def train(self, name: str, folder: Path, rate: float, seed: int) -> float:
        import transformers

        from pytitans.forecasting.runs import VARIANTS, train_run
        from pytitans.forecasting.train import ForecastArguments
        from pytitans.train import last_checkpoint

        transformers.logging.disable_progress_bar()
        what = Name.of(name)
        titans = what.variant in VARIANTS
        found = TITANS if titans else FIELDS.get(what.variant, {})
        kinds = self.kind(what), self.size
        fields = next((found[kind] for kind in kinds if kind in found), {})
        args = ForecastArguments(
            output_dir=str(folder), learning_rate=rate, seed=seed, **self.budget(titans, kinds[0])
        )
        run = train_run(
            what.variant, fields, self.data(what), what.horizon, args, carried=what.history > 0,
            checkpoint=last_checkpoint(folder),
        )  # fmt: skip
        cells = [c for c in run.facts["cells"] if c["split"] == "validation"]
        return cells[0]["mse"]  # plain, as it was trained

    def kind(self, what: Name) -> str:
        """Which of TITANS and FIELDS: of a small series its far horizons, of a large one its long
        look-backs, are others."""
        if self.size == "small":
            return "small, from 192" if what.horizon > min(HORIZONS) else "small"
        return "large, long" if what.context >= LONG else "large"

    def budget(self, titans: bool, kind: str) -> dict[str, Any]:
        """Steps of 32 windows. What is scored while training is a part of a large validation set;
        the score that learning rates are chosen by is that of all of it."""
        if self.size == "small":
            steps = 800 if titans else 2600
        elif titans:
            steps = 600 if kind == "large, long" else 2000
        else:
            steps = 5000
        return {
            "max_steps": self.steps(steps),
            "eval_strategy": "steps",
            "eval_steps": max(1, self.steps(steps) // 10),
            "patience": 4,
            "validation_stride": 4 if self.size == "large" else 1,
        }

    def evaluations(self, name: str) -> dict[str, list[str]]:
        return {}  # the runs score themselves

    def rates(self, name: str) -> tuple[float, ...]:
        return self.args.rates or RATES.get(Name.of(name).variant, TITANS_RATES)


def found_cells(experiment: Forecasting, output: Path) -> list[dict[str, Any]]:
    """The scores of all trained runs, with what it took to get them."""
    cells = []
    for path in sorted(output.glob("*-seed*/run.json")):
        facts = json.loads(path.read_text())
        name = Name.of(path.parent.name.rpartition("-seed")[0])
        trained = facts["training"]
        cells += [
            cell
            | {
                "history_length": name.history,
                "model": f"{name.variant}+{name.history}" if name.history else name.variant,
                "learning_rate": facts["learning_rate"],
                "parameters": facts["model"]["parameters"],
                "steps": trained.get("steps"),
                "seconds": trained.get("seconds"),
            }
            for cell in facts["cells"]
        ]
    return cells


def report(experiment: Forecasting, output: Path, results: Path) -> None:
    """NAME.json with every score, and NAME.md with the table of the test rows. Models that are in
    NAME.json already and have no runs here stay in both."""
    from pytitans.evals.results import VERSION, describe_software
    from pytitans.forecasting.backtest import table

    cells = found_cells(experiment, output)
    if not cells:
        return
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{experiment.args.name}.json"
    before = json.loads(path.read_text()) if path.exists() else {"sweep": {}, "cells": []}
    cells = with_earlier(before["cells"], cells, "model", "context_length")
    found = {
        "version": VERSION, "task": "forecast", "series": experiment.args.name,
        "software": describe_software(),
        "titans": TITANS,
        "sweep": sweeps(before, output),
        "cells": cells,
    }  # fmt: skip
    path.write_text(json.dumps(found, indent=1) + "\n")
    test = [cell for cell in cells if cell["split"] == "test"]
    seeds = sorted({cell["seed"] for cell in test})
    text = (
        f"# {experiment.args.name}\n\nTest windows, MSE / MAE of standardised values, means of "
        f"{len(seeds)} seeds. plain: a window alone; carried: a memory that has read all rows "
        "before the look-back.\n\n"
        f"{table(test)}\n\n{spread(test)}\n"
    )
    (results / f"{experiment.args.name}.md").write_text(text)
    print(text)


def spread(cells: list[dict[str, Any]]) -> str:
    """The largest standard deviation over seeds, of any model and horizon."""
    groups: dict[tuple, list[float]] = {}
    for cell in cells:
        key = cell["model"], cell["protocol"], cell["context_length"], cell["horizon"]
        groups.setdefault(key, []).append(cell["mse"])
    spreads = {key: statistics.stdev(found) for key, found in groups.items() if len(found) > 1}
    if not spreads:
        return "One seed."
    key = max(spreads, key=lambda k: spreads[k])
    where = f"{key[0]}, look-back {key[2]}, horizon {key[3]}"
    return f"Standard deviation of MSE over seeds: {spreads[key]:.4f} at most ({where})."


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("file", help="CSV, or ZIP::NAME.csv")
    add("--models", nargs="*", default=list(MODELS), help="VARIANT@LOOKBACK[+HISTORY]")
    add("--horizons", type=int, nargs="*", default=list(HORIZONS))
    add("--seeds", type=int, nargs="*", default=[0, 1, 2])
    add("--rates", type=float, nargs="*", help="learning rates to choose from, for all models")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="runs side by side")
    add("--share", type=float, default=1.0, help="of the steps, to try it out")
    add("--output", type=Path, help="runs/forecasting/NAME")
    add("--results", type=Path, default=Path("results/forecasting"))
    add("--report", action="store_true", help="run nothing, report what is there")
    args = parser.parse_args()

    from pytitans.data.series import SeriesData, load_series

    series = load_series(SeriesData(file=args.file, uneven_dates=True))
    args.name, args.rows = series.name, len(series.values)
    output = args.output or Path("runs/forecasting", args.name)
    experiment = Forecasting(args)
    return run_experiment(
        experiment, experiment.models, output, lambda: report(experiment, output, args.results)
    )


if __name__ == "__main__":
    raise SystemExit(main())
