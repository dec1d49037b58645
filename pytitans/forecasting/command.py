"""The command `titans forecast`: train, predict, backtest."""

import csv
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pytitans.options import RUN_FILE, add_fields, new_parser, parse, resumed, subcommand

if TYPE_CHECKING:
    from pytitans.data.series import Series
    from pytitans.forecasting.runs import Forecast, Run

HELP = """\
titans forecast: the next rows of a table with dates

  titans forecast train      train a model on a CSV, and backtest it
  titans forecast predict    forecast what follows; with --memory, read on as rows arrive
  titans forecast backtest   the table of one or more trained models

  titans forecast train power.csv
  titans forecast predict power.csv --model runs/power-lmm

`titans forecast COMMAND --help` shows options and examples; docs/forecasting.md says more."""


def forecast(argv: list[str]) -> int:
    return subcommand("forecast", COMMANDS, HELP, argv)


def train_command(argv: list[str]) -> int:
    """Trains a model for each horizon; prints the backtest, draws the last test window."""
    from transformers import PreTrainedConfig

    from pytitans.data.series import SeriesData
    from pytitans.forecasting.runs import FACTS, NAMES, VARIANTS, load_run, train_run
    from pytitans.forecasting.train import ForecastArguments
    from pytitans.models import TitansForecastingConfig

    parser = new_parser("forecast train", "Trains a model on a table with dates.")
    add = parser.add_argument
    add("file", type=str, help="CSV, ZIP::NAME.csv, or hub:NAME")
    add("--horizons", type=int, nargs="+", default=[96], help="rows to forecast, a model for each")
    add("--model.variant", type=Literal[NAMES], default="lmm",  # type: ignore - a tuple
        help="architecture, or a baseline; short: --variant")  # fmt: skip
    add("--output", type=str | None, help="folder; runs/NAME-VARIANT")
    add("--resume", type=str, metavar="FOLDER", help="go on with FOLDER's run")
    add("--carried", type=bool, default=False,
        help="backtest also with a memory of all that came before the look-back")  # fmt: skip
    add_fields(parser, "data", SeriesData, skip={"file"})
    shared = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    fixed = {
        "variant", "vocab_size", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id",
        "num_input_channels", "context_length", "prediction_length", "tie_word_embeddings",
    }  # fmt: skip
    add_fields(parser, "model", TitansForecastingConfig, skip=shared | fixed)
    parser.set_defaults({"model.quantiles": [0.1, 0.5, 0.9]})
    add_fields(parser, "train", ForecastArguments, skip={"parallelism_config", "output_dir"})
    options = parse(parser, "forecast train", resumed(argv, "--output"))

    from pytitans.cli import quiet, write
    from pytitans.train import last_checkpoint

    quiet()
    data = SeriesData(file=options.file, **options.data.as_dict())
    fields = options.model.as_dict()
    name = fields.pop("variant")
    folder = Path(options.output or f"runs/{Path(options.file.split(':')[-1]).stem}-{name}")
    begun = [*folder.rglob(FACTS), *folder.rglob("checkpoint-*")]
    if options.resume is None and begun:
        raise ValueError(
            f"{str(folder)!r} holds a run already: choose another --output, continue it by "
            f"--resume {folder}, or delete it"
        )
    write(parser.dump(options), folder / RUN_FILE)
    runs = []
    for horizon in options.horizons:
        place = folder / f"h{horizon}" if len(options.horizons) > 1 else folder
        if (place / FACTS).exists():
            runs.append(load_run(place))
            continue
        args = ForecastArguments(output_dir=str(place), **options.train.as_dict())
        try:
            run = train_run(
                name, fields if name in VARIANTS else {}, data, horizon, args,
                carried=options.carried, checkpoint=last_checkpoint(place),
            )  # fmt: skip
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"saved; go on by --resume {folder}") from None
        draw_last_test_window(run, place)
        runs.append(run)
    print_table(runs)
    print(f"saved: {folder} (model, run.json, forecast.png)")
    return 0


def predict_command(argv: list[str]) -> int:
    """Writes what follows the table's last row, as CSV and picture."""
    parser = new_parser("forecast predict", "Forecasts what follows the last row of a table.")
    add = parser.add_argument
    add("file", type=str, help="CSV, ZIP::NAME.csv, or hub:NAME")
    add("--model", type=str, required=True, help="folder of `titans forecast train`")
    add("--output", type=str, default="forecast", help="writes OUTPUT.csv and OUTPUT.png")
    add("--start", type=str | None, help="first date to forecast, if the table goes on beyond it")
    add("--memory", type=str | None,
        help="file of a memory, made if there is none; it reads the rows that are new")  # fmt: skip
    options = parse(parser, "forecast predict", argv)

    from pytitans.cli import quiet
    from pytitans.data.series import load_series
    from pytitans.forecasting.plots import plot_forecast
    from pytitans.forecasting.runs import load_run
    from pytitans.forecasting.streams import read_on

    quiet()
    run = load_run(options.model)
    series = load_series(dataclasses.replace(run.data, file=options.file, columns=run.columns))
    check_step(run, series)
    origin = origin_of(series, options.start)
    if options.memory:
        seen = series._replace(dates=series.dates[:origin], values=series.values[:origin])
        found, read = read_on(run, seen, Path(options.memory))
        print(f"the memory read {read:,} rows: {options.memory}")
    else:
        if origin < run.reads:
            raise ValueError(
                f"{series.name} has {origin:,} rows before the forecast, the model looks back on "
                f"{run.reads}: give more rows"
            )
        found = run.forecast(series, origin)
    path = Path(options.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_csv(run, found, path.with_name(path.name + ".csv"))
    plot_forecast(run, series, origin, found, path.with_name(path.name + ".png"))
    print(f"saved: {path}.csv {path}.png")
    return 0


def backtest_command(argv: list[str]) -> int:
    """Prints the table of runs; scores them again where the table or --carried asks for it."""
    parser = new_parser("forecast backtest", "The table of trained models, on their test rows.")
    add = parser.add_argument
    add("folders", type=str, nargs="+", help="folders of `titans forecast train`")
    add("--file", type=str | None, help="another table; that of the training if not given")
    add("--carried", type=bool, default=False,
        help="also with a memory of all that came before the look-back")  # fmt: skip
    options = parse(parser, "forecast backtest", argv)

    from pytitans.cli import quiet
    from pytitans.data.series import load_splits
    from pytitans.forecasting.runs import backtest, load_run, run_folders

    quiet()
    runs = [load_run(place) for folder in options.folders for place in run_folders(folder)]
    for run in runs:
        known = {cell["protocol"] for cell in run.facts["cells"]}
        if options.file or (options.carried and "carried" not in known):
            data = dataclasses.replace(run.data, file=options.file or run.data.file)
            split = load_splits(dataclasses.replace(data, columns=run.columns), run.horizon)
            split = split._replace(scaler=run.scaler, values=run.scaler.apply(split.series.values))
            run.facts["cells"] = backtest(run, split, options.carried)
    print_table(runs)
    return 0


COMMANDS: dict[str, Any] = {
    "train": train_command,
    "predict": predict_command,
    "backtest": backtest_command,
}


def print_table(runs: "list[Run]") -> None:
    from pytitans.forecasting.backtest import table

    cells = [cell for run in runs for cell in run.facts["cells"] if cell["split"] == "test"]
    print("test windows, MSE / MAE of standardised values\n")
    print(table(cells) + "\n")


def draw_last_test_window(run: "Run", folder: Path) -> None:
    from pytitans.data.series import load_series
    from pytitans.forecasting.plots import plot_forecast

    series = load_series(run.data)
    origin = run.facts["series"]["borders"][-1] - run.horizon
    plot_forecast(run, series, origin, run.forecast(series, origin), folder / "forecast.png")


def check_step(run: "Run", series: "Series") -> None:
    import numpy as np

    if len(series.dates) < 2:
        return
    trained, here = run.facts["series"]["step_seconds"], series.step / np.timedelta64(1, "s")
    if abs(here / trained - 1) > 0.12:  # months have 28 to 31 days
        raise ValueError(
            f"{series.name} has a row every {here:g} seconds, the model was trained on one every "
            f"{trained:g}: resample it, or train a model on it"
        )


def origin_of(series: "Series", start: str | None) -> int:
    """The row that the forecast begins with: the one after the last, or the one of the date."""
    import numpy as np

    if start is None:
        return len(series.values)
    try:
        date = np.datetime64(start).astype(series.dates.dtype)
    except ValueError:
        raise ValueError(f"--start {start!r} is no date: write it as 2020-01-31T13:00") from None
    origin = int(np.searchsorted(series.dates, date))
    if origin == len(series.dates) or series.dates[origin] != date:
        raise ValueError(
            f"--start {start} is no date of {series.name}, which runs from {series.dates[0]} to "
            f"{series.dates[-1]}; leave it out to forecast what follows"
        )
    return origin


def write_csv(run: "Run", found: "Forecast", path: Path) -> None:
    """A row for each date; of each variable the point, then its quantiles."""
    levels = [] if found.quantiles is None else list(run.model.config.quantiles)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        names = [n for c in run.columns for n in (c, *(f"{c} {level:g}" for level in levels))]
        writer.writerow(["date", *names])
        for row, date in enumerate(found.dates):
            values: list[float] = []
            for v in range(len(run.columns)):
                values.append(found.point[row, v])
                if found.quantiles is not None:
                    values += found.quantiles[row, v].tolist()
            writer.writerow([str(date.astype("datetime64[s]")), *(f"{x:.6g}" for x in values)])
