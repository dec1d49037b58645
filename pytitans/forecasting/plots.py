"""Forecasts as pictures: what was known, what came, what was forecast, with intervals."""

from pathlib import Path

import numpy as np

from pytitans.data.series import Series
from pytitans.forecasting.runs import Forecast, Run

PANELS = 4  # variables that are shown


def plot_forecast(run: Run, series: Series, origin: int, forecast: Forecast, path: Path) -> None:
    """The last variables, which tables end with the target in, one panel each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = series.columns[-PANELS:]
    figure = Figure(figsize=(10, 1 + 2.2 * len(columns)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(columns), sharex=True, squeeze=False)[:, 0]
    begin, end = max(0, origin - max(run.reads, run.horizon)), origin + run.horizon
    truth = slice(begin, min(end, len(series.values)))
    for axes, column in zip(panels, columns, strict=True):
        v = series.columns.index(column)
        axes.plot(series.dates[truth], series.values[truth, v], color="black", lw=1, label="truth")
        axes.plot(forecast.dates, forecast.point[:, v], color="tab:blue", label="forecast")
        for low, high, share in bands(run, forecast):
            axes.fill_between(
                forecast.dates, low[:, v], high[:, v], color="tab:blue", alpha=0.2, lw=0,
                label=f"{share:.0%} interval",
            )  # fmt: skip
        axes.axvline(forecast.dates[0], color="gray", lw=0.8, ls=":")
        axes.set_ylabel(column)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(loc="upper left", ncols=4, fontsize="small")
    panels[0].set_title(
        f"{series.name}: {run.name}, look-back {run.reads}, horizon {run.horizon}", loc="left"
    )
    figure.savefig(path, dpi=120)


def bands(run: Run, forecast: Forecast) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """Intervals between quantiles that lie alike far from the median, the widest first."""
    if forecast.quantiles is None:
        return []
    levels = list(run.model.config.quantiles)
    found = []
    for i in range(len(levels) // 2):
        low, high = levels[i], levels[-1 - i]
        found.append((forecast.quantiles[..., i], forecast.quantiles[..., -1 - i], high - low))
    return found
