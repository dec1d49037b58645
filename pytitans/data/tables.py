"""Tables with dates: a CSV, one in a zip, or a hub data set -> a Series that has been checked."""

import warnings
import zipfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

import numpy as np

from pytitans.data.text import HUB, one_line, unreadable

Table = Any  # pandas' DataFrame and Series, which checkers of types cannot follow
Column = Any
MEMBER = "::"  # ETT-small.zip::ETTh1.csv
DATES = ("date", "datetime", "timestamp", "time", "ds")  # what a date column is usually called
DAY = np.timedelta64(1, "D")


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


def read_series(
    file: str, date_column: str | None = None, columns: Sequence[str] = (), uneven: bool = False
) -> Series:
    """The table, checked: dates that ascend in even steps, numbers in every cell.

    Raises ValueError, naming the row or column and the remedy, for anything else.
    """
    name, table = read_table(file)
    if not len(table):
        raise ValueError(f"{name} has no rows")
    date = find_date_column(name, table, date_column)
    dates = read_dates(name, table[date])
    columns = list(columns) or [str(c) for c in table.columns if c != date]
    if missing := [c for c in columns if c not in table.columns or c == date]:
        known = ", ".join(str(c) for c in table.columns if c != date)
        raise ValueError(f"{name} has no variable {missing[0]!r}: choose among {known}")
    if not columns:
        raise ValueError(f"{name} has no column beside its dates, {date!r}")
    values = np.stack([read_numbers(name, table[c], dates) for c in columns], axis=1)
    check_dates(name, dates, uneven)
    return Series(name, dates, values, columns)


def read_table(file: str) -> tuple[str, Table]:
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


def read_csv(source: Path | IO[bytes]) -> Table:
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


def read_hub(name: str) -> Table:
    """All splits of a Hugging Face dataset, one after another."""
    import datasets
    import pandas as pd

    path, _, config = name.removeprefix(HUB).partition(":")
    try:
        found: Any = datasets.load_dataset(path, config or None)
        return pd.concat([split.to_pandas() for split in found.values()], ignore_index=True)
    except Exception as error:  # datasets, fsspec, pyarrow and huggingface_hub have their own
        raise ValueError(f"{name!r} cannot be loaded as a dataset: {one_line(error)}") from error


def find_date_column(name: str, table: Table, given: str | None) -> str:
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


def parse_dates(column: Column) -> Column | None:
    """None if they are no dates; a date that is missing is NaT."""
    import pandas as pd
    from pandas.api.types import is_numeric_dtype

    if is_numeric_dtype(column):
        return None
    try:
        parsed: Column = pd.to_datetime(column)
    except (ValueError, TypeError):
        return None
    return parsed if not parsed.isna().all() else None


def read_dates(name: str, column: Column) -> np.ndarray:
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


def read_numbers(name: str, column: Column, dates: np.ndarray) -> np.ndarray:
    import pandas as pd

    numbers: Column = pd.to_numeric(column, errors="coerce")
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
