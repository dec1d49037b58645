"""Tables of series: what is read, what is refused, where splits and windows lie."""

import zipfile

import numpy as np
import pandas as pd
import pytest

from pytitans.data.series import (
    Borders,
    Scaler,
    SeriesData,
    Windows,
    find_borders,
    load_series,
    load_splits,
)


def table(rows: int = 200, freq: str = "h", date: str = "date") -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            date: pd.date_range("2020-01-01", periods=rows, freq=freq),
            "load": rng.normal(size=rows),
            "oil": np.arange(rows),
        }
    )


@pytest.fixture
def save(tmp_path):
    def save(frame: pd.DataFrame, name: str = "power.csv") -> str:
        frame.to_csv(tmp_path / name, index=False)
        return str(tmp_path / name)

    return save


def test_reads_any_table_with_dates(save):
    for frame in (table(), table(date="when"), table()[["oil", "date", "load"]]):
        series = load_series(SeriesData(file=save(frame)))
        assert set(series.columns) == {"load", "oil"} and series.values.shape == (200, 2)
        assert series.values[:, series.columns.index("oil")].tolist() == list(range(200))
        assert series.name == "power" and series.season == 24
    assert load_series(SeriesData(file=save(table(), "power.csv.gz"))).name == "power"
    chosen = load_series(SeriesData(file=save(table()), columns=["oil"]))
    assert chosen.columns == ["oil"]


def test_reads_a_member_of_a_zip(tmp_path):
    path = tmp_path / "both.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("a", "b"):
            archive.writestr(f"set/{name}.csv", table(100 if name == "a" else 50).to_csv())
        archive.writestr("set/README.txt", "no table")
    for file in (f"{path}::a.csv", f"{path}::set/a.csv", f"{path}/set/a.csv", f"{path}::a"):
        series = load_series(SeriesData(file=file, columns=["load"]))
        assert series.name == "a" and len(series.values) == 100
    for file in (str(path), f"{path}::c.csv"):
        with pytest.raises(ValueError, match=r"2 CSV files .*both.zip::a.csv"):
            load_series(SeriesData(file=file))


@pytest.mark.parametrize(
    ("freq", "season"), [("15min", 96), ("h", 24), ("D", 7), ("B", 7), ("W", 52), ("MS", 12)]
)
def test_step_season_and_later_dates(save, freq, season):
    """Months and working days are even on the calendar, though not in days."""
    frame = table(120, freq)
    series = load_series(SeriesData(file=save(frame[:100])))
    assert series.season == season
    later = series.later_dates(20)
    assert (later == frame["date"][100:].to_numpy().astype("datetime64[ns]")).all()


def spoiled(change) -> pd.DataFrame:
    frame = table()
    frame["load"] = frame["load"].astype(object)
    return change(frame)


def put(column, row, value):
    def change(frame):
        frame.loc[row, column] = value
        return frame

    return change


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (
            spoiled(lambda f: f.drop(index=7)),
            r"in 1 place: row 8 .* leaves a gap after .*06",
        ),
        (spoiled(put("date", 7, pd.Timestamp("2020-01-01 06:00"))), r"row 8 .* repeats"),
        (spoiled(lambda f: f[::-1]), r"not sorted: row 2 "),
        (spoiled(put("load", 7, np.nan)), r"'load' .* 1 values missing .* row 8 .*07:00"),
        (spoiled(put("load", 7, np.inf)), r"'load' .* 1 values missing"),
        (spoiled(put("load", 7, "off")), r"'load' .* not numeric \(row 8: 'off'\)"),
        (spoiled(put("date", 7, None)), r"lacks the date of row 8"),
        (spoiled(lambda f: f.drop(columns="date")), r"no column of dates"),
        (spoiled(lambda f: f[["date"]]), r"no column beside its dates"),
        (spoiled(lambda f: f[:0]), r"has no rows"),
    ],
)
def test_what_is_wrong_is_said(save, frame, message):
    with pytest.raises(ValueError, match=message):
        load_series(SeriesData(file=save(frame)))


def test_uneven_dates_are_taken_where_wanted(save):
    path = save(table().drop(index=7))
    assert len(load_series(SeriesData(file=path, uneven_dates=True)).values) == 199


def test_other_wrong_names(save, tmp_path):
    path = save(table())
    for options, message in (
        ({"file": str(tmp_path / "no.csv")}, "is no file"),
        ({"file": path, "columns": ["gas"]}, "no variable 'gas': choose among load, oil"),
        ({"file": path, "date_column": "day"}, "no column 'day'"),
        ({"file": path, "date_column": "oil"}, "'oil' of power holds no dates"),
    ):
        with pytest.raises(ValueError, match=message):
            load_series(SeriesData(**options))
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(ValueError, match="is no CSV"):
        load_series(SeriesData(file=str(tmp_path / "empty.csv")))


def test_ett_borders(save):
    """12, 4 and 4 months of 30 days, whatever follows; in hours and in quarters of one."""
    for name, freq, day in (("ETTh1", "h", 24), ("ETTm2", "15min", 96)):
        series = load_series(SeriesData(file=save(table(610 * day, freq), f"{name}.csv")))
        borders = find_borders(series, "auto")
        assert borders == (360 * day, 480 * day, 600 * day)
    short = series._replace(values=series.values[: 599 * day], dates=series.dates[: 599 * day])
    with pytest.raises(ValueError, match="20 months"):
        find_borders(short, "ett")


def test_other_borders_and_scaler(save):
    """As Autoformer's loader has them: int(0.7 n), the rest, int(0.2 n)."""
    split = load_splits(SeriesData(file=save(table(203)), context_length=10), 5)
    assert split.borders == (142, 163, 203)
    oil = split.values[:, 1]
    assert abs(oil[:142].mean()) < 1e-12 and oil[:142].std() == pytest.approx(1)
    assert oil.std() > 1.3  # nothing of the later rows is in it
    np.testing.assert_allclose(split.scaler.undo(split.values), split.series.values, atol=1e-12)
    assert Scaler.of(np.ones((5, 1))).std == 1  # a constant is no division by 0


def test_windows_look_back_over_their_border():
    values = np.arange(100.0)[:, None]
    held = Windows(values, 60, 80, context=8, horizon=5)
    assert len(held) == 20 - 5 + 1
    assert held[0]["past_values"].flatten().tolist() == list(range(52, 60))
    assert held[0]["future_values"].flatten().tolist() == list(range(60, 65))
    assert held[15]["future_values"].flatten().tolist() == list(range(75, 80))
    train = Windows(values, 0, 60, context=8, horizon=5)
    assert len(train) == 60 - 8 - 5 + 1 and train[0]["past_values"][0] == 0


def test_standard_counts_of_windows():
    """ETTh1's: 8449, 2785 and 2785 windows for look-back and horizon 96; 2161 test at 720."""
    borders = Borders(8640, 11520, 14400)
    values = np.zeros((17420, 1))
    counts = [
        len(Windows(values, *borders.span(split), 96, 96))
        for split in ("train", "validation", "test")
    ]
    assert counts == [8449, 2785, 2785]
    assert len(Windows(values, *borders.span("test"), 96, 720)) == 2161


def test_too_short(save):
    with pytest.raises(ValueError, match=r"too short: its validation part has 20 of 200 rows"):
        load_splits(SeriesData(file=save(table()), context_length=10), 30)
    with pytest.raises(ValueError, match=r"too short: its train part"):
        load_splits(SeriesData(file=save(table()), context_length=130), 20)


def test_hub_names_go_through_datasets(save, tmp_path):
    """A folder of data is a hub name to `datasets`; nothing is downloaded."""
    (tmp_path / "hub").mkdir()
    table(50).to_csv(tmp_path / "hub" / "train.csv", index=False)
    series = load_series(SeriesData(file=f"hub:{tmp_path / 'hub'}"))
    assert series.values.shape == (50, 2)
