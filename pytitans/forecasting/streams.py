"""A memory of a series that outlives the process: it reads on with the rows that are new."""

from pathlib import Path

import numpy as np

from pytitans.cache import TitansCache
from pytitans.data.series import Series
from pytitans.forecasting.runs import Forecast, Run
from pytitans.models.modeling_titans_forecasting import TitansForForecasting

LAST = "last_date"


def read_on(run: Run, series: Series, path: Path) -> tuple[Forecast, int]:
    """The forecast of what follows the series, and the rows newly read. The file's memory, or a new
    one, reads the rows that it has not read, and is saved again. The table may hold all rows or the
    new ones alone."""
    if not isinstance(run.model, TitansForForecasting):
        raise ValueError(f"{run.name} has no memory: leave out --memory")
    cache = TitansCache(run.model.config.num_hidden_layers + 1)
    new, dates = series, series.dates
    if path.exists():
        cache = TitansCache.load(path, run.model)
        last = np.datetime64(TitansCache.describe(path)["metadata"][LAST])
        new = rows_after(run, series, last)
        dates = series.dates if len(new.dates) < len(series.dates) else np.append(last, new.dates)
    found = run.predict(new.values, run.later(dates), cache)
    path.parent.mkdir(parents=True, exist_ok=True)
    cache.save(path, run.model, metadata={LAST: str(dates[-1]), "series": series.name})
    return found, len(new.dates)


def rows_after(run: Run, series: Series, last: np.datetime64) -> Series:
    """The rows later than the last one read, which they must follow."""
    if series.dates[-1] < last:
        raise ValueError(
            f"{series.name} ends at {series.dates[-1]}, the memory has read up to {last}: what is "
            "read cannot be unread, make a new memory"
        )
    begin = int(np.searchsorted(series.dates, last, side="right"))
    new = series._replace(dates=series.dates[begin:], values=series.values[begin:])
    if len(new.dates) and not run.data.uneven_dates:
        step = (new.dates[0] - last) / np.timedelta64(1, "s")
        if step > 1.12 * run.facts["series"]["step_seconds"]:  # months have 28 to 31 days
            raise ValueError(
                f"{series.name} leaves a gap after {last}, where the memory stopped: its next row "
                f"is {new.dates[0]}; add the rows between"
            )
    return new
