"""Time series: a table with dates (`pytitans.data.tables`) -> splits -> windows.

The protocol is the community's (Informer, Autoformer, DLinear, PatchTST, iTransformer):

    split            ETT: 12, 4 and 4 months of 30 days; any other series: 7:1:2
    standardisation  by mean and standard deviation of the train rows
    windows          look-back and horizon around every *origin*, the first row that is forecast;
                     those of validation and test look back into the rows before their split
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pytitans.data.tables import DAY, Series, read_series
from pytitans.data.text import SPLITS

ETT_MONTHS = (12, 4, 4)


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


class Borders(NamedTuple):
    """Where train, validation and test end; each begins where the one before ends."""

    train: int
    validation: int
    test: int

    def span(self, split: str) -> tuple[int, int]:
        ends, part = (0, self.train, self.validation, self.test), SPLITS.index(split)
        return ends[part], ends[part + 1]


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
    """The whole table, checked; ValueError for anything wrong with it."""
    return read_series(data.file, data.date_column, data.columns, data.uneven_dates)
