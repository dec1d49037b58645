"""The recipe of the table: what its names mean, what it chooses by, what it reports."""

import argparse
import json
import sys
from pathlib import Path

import dropped_batch
import experiment
import forecasting
import numpy as np
import pandas as pd
import pytest


def make(**options) -> forecasting.Forecasting:
    given = {"models": ["lmm@96+672", "dlinear@336"], "horizons": [192, 96], "rates": None}
    given["rows"] = 60_000
    return forecasting.Forecasting(argparse.Namespace(share=0.1, **given | options))


def test_names_and_who_is_swept():
    made = make()
    assert made.models == (
        "lmm@96+672-h96", "lmm@96+672-h192", "dlinear@336-h96", "dlinear@336-h192",
    )  # fmt: skip
    assert forecasting.Name.of("lmm@96+672-h192") == ("lmm", 96, 672, 192)
    assert forecasting.Name.of("dlinear@336-h96") == ("dlinear", 336, 0, 96)
    assert made.swept("lmm@96+672-h192") == "lmm@96+672-h192"  # each horizon has its own rate
    assert len(made.rates("lmm@96+672-h96")) == len(made.rates("dlinear@336-h96")) == 3
    assert made.budget(True, "large")["max_steps"] == 200
    assert make(rows=17_420).budget(True, "small")["max_steps"] == 80


def test_what_depends_on_the_series_look_back_and_horizon():
    kinds = {
        (rows, name): make(rows=rows).kind(forecasting.Name.of(name))
        for rows in (17_420, 60_000)
        for name in ("lmm@336-h96", "lmm@336-h192", "lmm@720-h96")
    }
    assert list(kinds.values()) == [
        "small", "small, from 192", "small", "large", "large", "large, long",
    ]  # fmt: skip
    assert set(kinds.values()) == set(forecasting.TITANS)
    assert all("large, long" in forecasting.FIELDS[name] for name in ("dlinear", "rlinear"))


def test_spread_is_over_seeds_alone():
    place = {"model": "lmm", "protocol": "plain", "context_length": 96}
    cells = [place | {"horizon": h, "mse": m} for h, m in ((96, 0.1), (96, 0.3), (192, 9.0))]
    assert forecasting.spread(cells).endswith("0.1414 at most (lmm, look-back 96, horizon 96).")
    assert forecasting.spread(cells[1:]) == "One seed."


def test_windows_kept_without_the_last_batch():
    assert [dropped_batch.kept(2545, size) for size in dropped_batch.SIZES] == [
        2545,
        2528,
        2432,
        2048,
    ]


@pytest.fixture
def table(tmp_path) -> Path:
    t = np.arange(500)
    dates = pd.date_range("2024-01-01", periods=500, freq="h")
    frame = pd.DataFrame({"date": dates, "load": np.sin(t * 2 * np.pi / 24) + 0.1 * (t % 7)})
    frame.to_csv(tmp_path / "power.csv", index=False)
    return tmp_path / "power.csv"


def test_one_command_makes_the_table_and_keeps_what_is_done(table, monkeypatch, capsys):
    """Rates are chosen by validation, seeds follow, a second call trains nothing."""

    def in_this_process(jobs, workers):
        return [failure for job in jobs if (failure := experiment.attempt(*job))]

    def recipe() -> list[str]:
        assert forecasting.main() == 0
        return capsys.readouterr().out.splitlines()

    command = [
        "forecasting.py", str(table), "--models", "dlinear@24", "seasonal_naive@24", "--horizons",
        "6", "12", "--rates", "1e-9", "1e-2", "--share", "0.01", "--seeds", "0", "1",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(experiment, "run_all", in_this_process)
    monkeypatch.chdir(table.parent)
    out = recipe()
    assert any(line.startswith("| dlinear | plain | 24 |") for line in out)
    found = json.loads((table.parent / "results/forecasting/power.json").read_text())
    assert [found["sweep"][f"dlinear@24-h{h}"]["chosen"] for h in (6, 12)] == [1e-2, 1e-2]
    cells = [c for c in found["cells"] if c["model"] == "dlinear" and c["split"] == "test"]
    assert {(c["horizon"], c["seed"]) for c in cells} == {(6, 0), (6, 1), (12, 0), (12, 1)}
    assert {c["learning_rate"] for c in cells} == {1e-2}
    runs = table.parent / "runs/forecasting/power"
    folders = [str(runs / f"dlinear@24-h{h}-seed0") for h in (12, 6)]
    monkeypatch.setattr(sys, "argv", ["dropped_batch.py", *folders])
    dropped_batch.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows[2:]] == ["| 6", "| 12", "| average"]
    score = next(c for c in cells if (c["horizon"], c["seed"]) == (12, 0))
    assert rows[3][1] == f"{score['mse']:.3f} / {score['mae']:.3f}"  # of all windows
    monkeypatch.setattr(sys, "argv", command)
    before = {p: p.stat().st_mtime_ns for p in runs.rglob("model.safetensors")}
    again = recipe()  # prints the table, and nothing before it
    assert again[0] == "# power" and again == out[-len(again) :]
    assert {p: p.stat().st_mtime_ns for p in runs.rglob("model.safetensors")} == before
    monkeypatch.setattr(sys, "argv", [*command[:2], "--models", "seasonal_naive@24", *command[5:]])
    recipe()  # of one model: what the other has swept is kept
    sweep = json.loads((table.parent / "results/forecasting/power.json").read_text())["sweep"]
    assert "dlinear@24-h6" in sweep and "seasonal_naive@24-h6" in sweep
