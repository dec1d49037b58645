"""Time series: a table with a date column -> checked values -> splits -> windows.

The protocol is the community's (Informer, Autoformer, DLinear, PatchTST, iTransformer):

    split            ETT: 12, 4 and 4 months of 30 days; any other series: 7:1:2
    standardisation  by mean and standard deviation of the train rows
    windows          look-back and horizon around every *origin*, the first row that is forecast;
                     those of validation and test look back into the rows before their split
"""

import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pytitans.data.text import HUB, SPLITS, one_line, unreadable

if TYPE_CHECKING:
    import pandas as pd

MEMBER = "::"  # ETT-small.zip::ETTh1.csv
DATES = ("date", "datetime", "timestamp", "time", "ds")  # what a date column is usually called
ETT_MONTHS = (12, 4, 4)
DAY = np.timedelta64(1, "D")


@dataclass(frozen=True, kw_only=True)
class SeriesData:
    """Which series to read, and how to cut it.

    Args:
        file: a CSV (plain, .gz, .xz), one in a zip (ETT-small.zip::ETTh1.csv), or hub:NAME[:CONFIG]
            for a Hugging Face dataset
        date_column: the column of dates; found by its name or content if not given
        columns: the variables; every other column if not given
        split: "ett" (12, 4, 4 months of 30 days), "7:1:2", or "auto": ETT's for a file of ETT's
        context_length: rows that a forecast looks back on
        history_length: rows before these that the memory alone reads in training
        uneven_dates: take the rows as they come, though dates repeat or leave gaps
    """

    file: str
    date_column: str | None = None
    columns: Sequence[str] = ()
    split: Literal["auto", "ett", "7:1:2"] = "auto"
    context_length: int = 96
    history_length: int = 0
    uneven_dates: bool = False

    def __post_init__(self):
        if self.context_length < 1 or self.history_length < 0:
            raise ValueError(
                f"context_length={self.context_length} must be 1 or more, and "
                f"history_length={self.history_length} 0 or more"
            )


class Series(NamedTuple):
    """A table: dates [T] (datetime64), values [T, V] (float64), the names of the variables."""

    name: str
    dates: np.ndarray
    values: np.ndarray
    columns: list[str]

    @property
    def step(self) -> np.timedelta64:
        """From a row to the next; the commonest where they differ (months, uneven dates)."""
        steps, counts = np.unique(np.diff(self.dates), return_counts=True)
        return steps[counts.argmax()]

    @property
    def season(self) -> int:
        """Rows of the period to expect: a day, a week of days, a year of weeks, months, quarters;
        1 where none is known."""
        days = self.step / DAY
        if days < 1:
            return max(1, round(1 / days))
        known = ((1, 7), (7, 52), (30, 12), (91, 4))
        return next((rows for length, rows in known if abs(days / length - 1) < 0.05), 1)

    def later_dates(self, count: int) -> np.ndarray:
        """The dates of the next `count` rows."""
        import pandas as pd

        rule = None if len(self.dates) < 3 else calendar_rule(self.dates[-400:])
        if rule is None:
            return self.dates[-1] + self.step * np.arange(1, count + 1)
        return pd.date_range(self.dates[-1], periods=count + 1, freq=rule).to_numpy()[1:]


class Borders(NamedTuple):
    """Where train, validation and test end; each begins where the one before ends."""

    train: int
    validation: int
    test: int

    def span(self, split: str) -> tuple[int, int]:
        ends = (0, *self)
        return ends[SPLITS.index(split)], ends[SPLITS.index(split) + 1]  # type: ignore


class Scaler(NamedTuple):
    """Standardisation, by mean and standard deviation [V] of the train rows."""

    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray) -> "Scaler":
        std = rows.std(axis=0)
        return cls(rows.mean(axis=0), np.where(std == 0, 1.0, std))

    def apply(self, values: np.ndarray) -> np.ndarray:
        return (values - self.mean) / self.std

    def undo(self, values: np.ndarray) -> np.ndarray:
        return values * self.std + self.mean


class Windows(Dataset):
    """One window for each origin in [begin, end - horizon]: the rows before it, the rows from it.

    values [T, V] are standardised; a window is `past_values` [context, V], `future_values`
    [horizon, V]. Every `stride`-th origin is taken.
    """

    def __init__(
        self,
        values: np.ndarray,
        begin: int,
        end: int,
        context: int,
        horizon: int,
        stride: int = 1,
    ):
        self.values = torch.as_tensor(values, dtype=torch.float32)
        self.context, self.horizon = context, horizon
        self.origins = range(max(begin, context), end - horizon + 1, stride)

    def __len__(self) -> int:
        return len(self.origins)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        origin = self.origins[index]
        return {
            "past_values": self.values[origin - self.context : origin],
            "future_values": self.values[origin : origin + self.horizon],
        }


class SplitSeries(NamedTuple):
    """A series made ready: standardised values [T, V] and what was used to get there."""

    series: Series
    borders: Borders
    scaler: Scaler
    values: np.ndarray

    def windows(self, split: str, context: int, horizon: int, stride: int = 1) -> Windows:
        return Windows(self.values, *self.borders.span(split), context, horizon, stride)


def load_splits(data: SeriesData, horizon: int) -> SplitSeries:
    """The series, its borders and its standardised values; every split has a window for the
    horizon, or it is a ValueError."""
    series = load_series(data)
    borders = find_borders(series, data.split)
    context = data.context_length + data.history_length
    for split in SPLITS:
        begin, end = borders.span(split)
        have = end - begin if split != "train" else end - context
        if have < horizon:
            raise ValueError(
                f"{series.name} is too short: its {split} part has {end - begin:,} of "
                f"{len(series.values):,} rows, and look-back {context} with horizon {horizon} "
                f"takes {horizon + (context if split == 'train' else 0):,}; shorten "
                "--data.context_length or --horizons, or give a longer series"
            )
    scaler = Scaler.of(series.values[: borders.train])
    return SplitSeries(series, borders, scaler, scaler.apply(series.values))


def find_borders(series: Series, split: str) -> Borders:
    rows = len(series.values)
    if split == "auto":
        split = "ett" if series.name in ("ETTh1", "ETTh2", "ETTm1", "ETTm2") else "7:1:2"
    if split == "7:1:2":
        train, test = int(rows * 0.7), int(rows * 0.2)
        return Borders(train, rows - test, rows)
    month = 30 * round(DAY / series.step)
    ends = [month * n for n in np.cumsum(ETT_MONTHS).tolist()]
    if ends[-1] > rows:
        raise ValueError(
            f"{series.name} is too short for ETT's split: {rows:,} rows, of {ends[-1]:,} in 20 "
            "months; use --data.split 7:1:2"
        )
    return Borders(*ends)


def load_series(data: SeriesData) -> Series:
    """The table, checked: dates that ascend in even steps, numbers in every cell.

    Raises ValueError, naming the row or column and the remedy, for anything else.
    """
    name, table = read_table(data.file)
    if not len(table):
        raise ValueError(f"{name} has no rows")
    date = find_date_column(name, table, data.date_column)
    dates = read_dates(name, table[date])
    columns = list(data.columns) or [str(c) for c in table.columns if c != date]
    if missing := [c for c in columns if c not in table.columns or c == date]:
        known = ", ".join(str(c) for c in table.columns if c != date)
        raise ValueError(f"{name} has no variable {missing[0]!r}: choose among {known}")
    if not columns:
        raise ValueError(f"{name} has no column beside its dates, {date!r}")
    values = np.stack([read_numbers(name, table[c], dates) for c in columns], axis=1)
    check_dates(name, dates, data.uneven_dates)
    return Series(name, dates, values, columns)


def read_table(file: str) -> tuple[str, "pd.DataFrame"]:
    """The series' name, and its table as it stands."""
    import pandas as pd

    if file.startswith(HUB):
        return file, read_hub(file)
    place, _, member = file.partition(MEMBER)
    path = Path(place).expanduser()
    inside = next((p for p in path.parents if p.suffix == ".zip" and p.is_file()), None)
    if inside is not None:  # ETT-small.zip/ETTh1.csv
        path, member = inside, path.relative_to(inside).as_posix()
    if not path.is_file():
        raise ValueError(
            f"{place!r} is no file: check the path, or write {HUB}{place} for a Hugging Face "
            "dataset"
        )
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                found = find_member(archive, place, member)
                with archive.open(found) as opened:
                    return stem(found), read_csv(opened)
        return stem(path.name), read_csv(path)
    except (OSError, EOFError, zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise unreadable(file, error) from error
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise ValueError(f"{file} is no CSV ({one_line(error)})") from error


def read_csv(source: Path | IO[bytes]) -> "pd.DataFrame":
    import pandas as pd

    return pd.read_csv(source, skipinitialspace=True)


def stem(name: str) -> str:
    """ETT-small/ETTh1.csv.gz -> ETTh1"""
    return PurePosixPath(name).name.removesuffix(".gz").removesuffix(".xz").rpartition(".")[0]


def find_member(archive: zipfile.ZipFile, place: str, wanted: str) -> str:
    """The CSV of a zip: the one asked for, by path, name or stem, or the only one."""
    members = [item.filename for item in archive.infolist() if item.filename.endswith(".csv")]
    wanted = wanted.strip("/")
    found = [m for m in members if wanted in (m, PurePosixPath(m).name, stem(m))]
    found = found if wanted else members
    if len(found) != 1:
        known = ", ".join(members[:8]) or "none"
        problem = f"{wanted!r} fits {len(found)} of them" if wanted else "say which"
        raise ValueError(
            f"{place} holds {len(members)} CSV files ({known}): {problem}, as "
            f"{place}{MEMBER}{PurePosixPath(members[0]).name if members else 'NAME.csv'}"
        )
    return found[0]


def read_hub(name: str) -> "pd.DataFrame":
    """All splits of a Hugging Face dataset, one after another."""
    import datasets
    import pandas as pd

    path, _, config = name.removeprefix(HUB).partition(":")
    try:
        found: Any = datasets.load_dataset(path, config or None)
        return pd.concat([split.to_pandas() for split in found.values()], ignore_index=True)
    except Exception as error:  # datasets, fsspec, pyarrow and huggingface_hub have their own
        raise ValueError(f"{name!r} cannot be loaded as a dataset: {one_line(error)}") from error


def find_date_column(name: str, table: "pd.DataFrame", given: str | None) -> str:
    """The column given; else one of a usual name; else the first whose text is dates."""
    from pandas.api.types import is_numeric_dtype

    columns = [str(c) for c in table.columns]
    if given is not None:
        if given not in columns:
            raise ValueError(f"{name} has no column {given!r}: choose among {', '.join(columns)}")
        return given
    usual = [c for c in columns if c.strip().lower() in DATES]
    text = [c for c in columns if not is_numeric_dtype(table[c])]
    for column in usual or text:
        if parse_dates(table[column].head(20)) is not None:
            return column
    raise ValueError(
        f"{name} has no column of dates (columns: {', '.join(columns[:8])}): add one, as "
        "2020-01-31 13:00, or name it by --data.date_column"
    )


def parse_dates(column: "pd.Series") -> "pd.Series | None":
    """None if they are no dates; a date that is missing is NaT."""
    import pandas as pd
    from pandas.api.types import is_numeric_dtype

    if is_numeric_dtype(column):
        return None
    try:
        parsed = pd.to_datetime(column)
    except (ValueError, TypeError):
        return None
    return parsed if not parsed.isna().all() else None


def read_dates(name: str, column: "pd.Series") -> np.ndarray:
    parsed = parse_dates(column)
    if parsed is None:
        bad = next((x for x in column if parse_dates(column.__class__([x])) is None), column[0])
        raise ValueError(
            f"column {column.name!r} of {name} holds no dates (as {str(bad)!r}): write them as "
            "2020-01-31 13:00, or name another column by --data.date_column"
        )
    if parsed.isna().any():
        raise ValueError(
            f"column {column.name!r} of {name} lacks the date of row {first(parsed.isna()) + 1:,}"
        )
    if parsed.dt.tz is not None:
        parsed = parsed.dt.tz_convert("UTC").dt.tz_localize(None)
    return parsed.to_numpy().astype("datetime64[ns]")


def read_numbers(name: str, column: "pd.Series", dates: np.ndarray) -> np.ndarray:
    import pandas as pd

    numbers = pd.to_numeric(column, errors="coerce")
    if (words := numbers.isna() & column.notna()).any():
        row = first(words)
        raise ValueError(
            f"column {column.name!r} of {name} is not numeric (row {row + 1:,}: "
            f"{str(column.iloc[row])!r}): name the columns to use by --data.columns, or convert it"
        )
    values = numbers.to_numpy(np.float64)
    if not (finite := np.isfinite(values)).all():
        row = first(~finite)
        raise ValueError(
            f"column {column.name!r} of {name} has {(~finite).sum():,} values missing (NaN or "
            f"infinite), the first in row {row + 1:,} ({show(dates[row])}): fill them, as by "
            "pandas.DataFrame.interpolate"
        )
    return values


def check_dates(name: str, dates: np.ndarray, uneven: bool) -> None:
    """Sorted; and, unless `uneven`, in even steps or on a calendar's (months, working days)."""
    import pandas as pd

    steps = np.diff(dates)
    zero = np.timedelta64(0)
    if (steps < zero).any():
        row = first(steps < zero) + 1
        raise ValueError(
            f"the dates of {name} are not sorted: row {row + 1:,} ({show(dates[row])}) is before "
            f"the row above it ({show(dates[row - 1])}); sort the rows by date"
        )
    if uneven or len(dates) < 3 or (steps == steps[0]).all():
        return
    if (steps > zero).all() and calendar_rule(dates) is not None:
        return
    usual = Series(name, dates, dates, []).step
    row = first(steps != usual) + 1
    what = "repeats" if steps[row - 1] == zero else "leaves a gap after"
    count = int((steps != usual).sum())
    raise ValueError(
        f"the dates of {name} are uneven in {count} place{'s' * (count > 1)}: row {row + 1:,} "
        f"({show(dates[row])}) {what} {show(dates[row - 1])}, where rows are "
        f"{pd.Timedelta(usual)} apart; fill or drop rows (pandas.DataFrame.asfreq), or take them "
        "as they come by --data.uneven_dates true"
    )


def calendar_rule(dates: np.ndarray) -> Any:
    """What pandas takes the dates to be, as months or working days; None if no rule fits."""
    import pandas as pd

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pandas: whether text or an offset, both serve
        return pd.infer_freq(pd.DatetimeIndex(dates))


def first(marks: Any) -> int:
    """The first row that is marked; messages count from 1, below the header."""
    return int(np.asarray(marks).argmax())


show = partial(np.datetime_as_string, unit="s")
