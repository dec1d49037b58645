"""`titans forecast`: trained once on a small table, then asked."""

import csv
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from pytitans.callbacks import StopOnSignal
from pytitans.cli import main
from pytitans.data.series import Windows
from pytitans.forecasting.backtest import score_carried, table
from pytitans.forecasting.runs import load_run
from pytitans.models import TitansForecastingConfig, TitansForForecasting

ROWS = 400
SMALL = {
    "data.context_length": 24, "model.patch_length": 8, "model.patch_stride": 8,
    "model.hidden_size": 8, "model.num_attention_heads": 2, "model.intermediate_size": 8,
    "train.max_steps": 8, "train.learning_rate": 0.02, "train.eval_steps": 4,
    "train.eval_strategy": "steps", "train.per_device_train_batch_size": 16,
}  # fmt: skip


def power(rows: int) -> pd.DataFrame:
    """A table with names and a frequency of its own."""
    t, rng = np.arange(rows), np.random.default_rng(0)
    load = 100 + 20 * np.sin(t * 2 * np.pi / 48) + rng.normal(size=rows)
    dates = pd.date_range("2024-01-01", periods=rows, freq="30min")
    return pd.DataFrame({"when": dates, "load": load, "oil": 0.1 * t})


def flags(options: dict) -> list[str]:
    return [x for key, value in options.items() for x in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("forecast")
    power(ROWS).to_csv(home / "power.csv", index=False)
    for name, part in (("lmm", "--data.history_length=16"), ("dlinear", "--variant=dlinear")):
        folder = ["--output", str(home / name), "--horizons", "4", "6"]
        options = [part, "--variant", name, "--carried", "true", *flags(SMALL), *folder]
        assert main(["forecast", "train", str(home / "power.csv"), *options]) == 0
    return home


@pytest.fixture(autouse=True)
def here(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def predict(home, file: str, *options: str) -> list[dict[str, str]]:
    model = [] if "--model" in options else ["--model", str(home / "lmm" / "h4")]
    assert main(["forecast", "predict", file, *model, *options]) == 0
    assert Path("forecast.png").read_bytes()[:4] == b"\x89PNG"
    with open("forecast.csv") as file_:
        return list(csv.DictReader(file_))


def error_of(capsys, *command: str) -> str:
    assert main(["forecast", *command]) == 2
    return capsys.readouterr().err


def test_what_a_run_leaves(home):
    facts = json.loads((home / "lmm" / "h6" / "run.json").read_text())
    assert facts["series"] | {"borders": None} == {
        "name": "power", "rows": ROWS, "step_seconds": 1800.0, "season": 48,
        "columns": ["load", "oil"], "borders": None,
    }  # fmt: skip
    places = [(c["split"], c["protocol"], c["windows"]) for c in facts["cells"]]
    assert places == [
        ("validation", "plain", 35), ("validation", "carried", 35),
        ("test", "plain", 75), ("test", "carried", 75),
    ]  # fmt: skip
    logs = [log["eval_loss"] for log in facts["training"]["history"] if "eval_loss" in log]
    assert facts["training"]["validation_loss"] == min(logs)
    assert (home / "lmm" / "h6" / "forecast.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(home.rglob("checkpoint-*"))


def test_the_best_weights_are_kept(home):
    """The saved model has the lowest validation loss that was seen; quantiles are part of it."""
    run = load_run(home / "dlinear" / "h4")
    found = [c["mse"] for c in run.facts["cells"] if c["split"] == "validation"]
    assert found == [pytest.approx(run.facts["training"]["validation_loss"], rel=1e-4)]


def test_a_stopped_run_goes_on(home, monkeypatch, capsys):
    """Stopped within the second horizon: the first is kept, the second ends with the weights that
    it has without a stop."""

    def stop_at(self, args, state, control, **kwargs):
        if state.global_step == 6 and "h6" in args.output_dir:
            self.asked = control.should_save = control.should_training_stop = True

    options = ["--data.history_length=16", "--variant=lmm", "--carried=true", *flags(SMALL)]
    train = ["forecast", "train", str(home / "power.csv"), *options, "--output", "runs/it"]
    with monkeypatch.context() as patched:
        patched.setattr(StopOnSignal, "on_step_end", stop_at)
        assert main([*train, "--horizons", "4", "6"]) == 130
    assert "go on by --resume runs/it" in capsys.readouterr().err
    first = (Path("runs/it") / "h4" / "run.json").read_text()
    seen = []
    monkeypatch.setattr(
        StopOnSignal,
        "on_step_end",
        lambda self, args, state, *rest, **_: seen.append(state.global_step),
    )
    assert main(["forecast", "train", "--resume", "runs/it"]) == 0
    assert seen == [7, 8]
    assert (Path("runs/it") / "h4" / "run.json").read_text() == first
    whole, parts = load_run(home / "lmm" / "h6"), load_run(Path("runs/it") / "h6")
    for name, weight in whole.model.state_dict().items():
        torch.testing.assert_close(parts.model.state_dict()[name], weight, rtol=0, atol=0)
    assert "holds a run already" in error_of(capsys, *train[1:])


def test_backtest_prints_the_table_of_all(home, capsys):
    assert main(["forecast", "backtest", str(home / "lmm"), str(home / "dlinear")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| model | protocol | look-back | 4 | 6 | average |" in lines
    rows = [line.split(" | ")[:3] for line in lines if line.startswith(("| lmm", "| dlin"))]
    assert rows == [
        ["| lmm", "plain", "24"],
        ["| lmm", "carried", "24"],
        ["| dlinear", "plain", "24"],
    ]


def test_table_by_hand():
    cells = [
        {
            "model": "lmm",
            "protocol": "plain",
            "context_length": 96,
            "horizon": h,
            "mse": m,
            "mae": 1,
        }
        for h, m in ((96, 0.2), (96, 0.4), (192, 0.5))
    ]
    assert table(cells).splitlines()[-1] == (
        "| lmm | plain | 96 | 0.300 / 1.000 | 0.500 / 1.000 | 0.400 / 1.000 |"
    )


def test_backtest_on_another_table_scales_as_in_training(home, capsys):
    """Scaled by its own rows, a table of ten times the size would score the same."""
    frame = power(ROWS)
    frame[["load", "oil"]] *= 10
    frame.to_csv("ten.csv", index=False)
    folder = str(home / "dlinear" / "h4")
    assert main(["forecast", "backtest", folder, "--file", "ten.csv"]) == 0
    mse = float(capsys.readouterr().out.splitlines()[-2].split(" | ")[3].split("/")[0])
    plain = next(c for c in load_run(folder).facts["cells"] if c["split"] == "test")
    assert mse > 5 * plain["mse"]


def test_predict_what_follows(home):
    rows = predict(home, str(home / "power.csv"))
    assert [row["date"] for row in rows] == [
        "2024-01-09T08:00:00", "2024-01-09T08:30:00", "2024-01-09T09:00:00", "2024-01-09T09:30:00",
    ]  # fmt: skip
    assert list(rows[0]) == [
        "date", "load", "load 0.1", "load 0.5", "load 0.9", "oil", "oil 0.1", "oil 0.5", "oil 0.9",
    ]  # fmt: skip
    assert all(20 < float(row["load"]) < 180 for row in rows)
    assert all(float(r["load 0.1"]) <= float(r["load 0.5"]) <= float(r["load 0.9"]) for r in rows)


def test_predict_within_the_table_knows_nothing_later(home):
    frame = power(ROWS)
    start = ["--start", str(frame["when"][300]).replace(" ", "T")]
    before = predict(home, str(home / "power.csv"), *start)
    frame.loc[300:, "load"] = 0.0
    frame.to_csv("changed.csv", index=False)
    assert predict(home, "changed.csv", *start) == before
    assert before[0]["date"] == "2024-01-07T06:00:00"


def test_a_memory_reads_on_with_new_rows(home):
    """In one go, appended to the table, or alone: the same forecast. And without new rows."""
    frame = power(ROWS)
    frame[:350].to_csv("grows.csv", index=False)
    frame[350:370].to_csv("new.csv", index=False)
    predict(home, "grows.csv", "--memory", "parts")
    predict(home, "new.csv", "--memory", "parts")
    frame.to_csv("grows.csv", index=False)
    parts = predict(home, "grows.csv", "--memory", "parts")
    whole = predict(home, "grows.csv", "--memory", "whole")
    again = predict(home, "grows.csv", "--memory", "whole")
    for other in (parts, again):
        assert [row["date"] for row in other] == [row["date"] for row in whole]
        for name in ("load", "oil 0.9"):
            got, want = ([float(row[name]) for row in rows] for rows in (other, whole))
            np.testing.assert_allclose(got, want, rtol=1e-4)


def test_what_a_memory_refuses(home, capsys):
    frame, model = power(ROWS), ["--model", str(home / "lmm" / "h4")]
    for name, rows in (("early", frame[:350]), ("late", frame[352:]), ("less", frame[:340])):
        rows.to_csv(f"{name}.csv", index=False)
    predict(home, "early.csv", "--memory", "m")
    late = error_of(capsys, "predict", "late.csv", *model, "--memory", "m")
    assert "late leaves a gap after 2024-01-08T06:30" in late
    less = error_of(capsys, "predict", "less.csv", *model, "--memory", "m")
    assert "the memory has read up to 2024-01-08T06:30" in less
    baseline = ["--model", str(home / "dlinear" / "h4"), "--memory", "b"]
    assert "dlinear has no memory" in error_of(capsys, "predict", "early.csv", *baseline)


def test_wrong_commands(home, capsys):
    file, model = str(home / "power.csv"), ["--model", str(home / "lmm" / "h4")]
    power(400).assign(when=pd.date_range("2024", periods=400, freq="h")).to_csv("hours.csv")
    power(20).to_csv("short.csv", index=False)
    for command, message in (
        (["fit"], "'fit' is no command of forecast: choose train, predict, backtest"),
        (["predict", file, "--model", "nothing"], "holds no forecasting run"),
        (["predict", "hours.csv", *model], "has a row every 3600 seconds"),
        (["predict", "short.csv", *model], "has 20 rows before the forecast"),
        (["predict", file, *model, "--start", "soon"], "is no date: write it"),
        (["predict", file, *model, "--start", "2030-01-01"], "is no date of power"),
        (["train", file, "--output", str(home / "lmm" / "h4"), *flags(SMALL)], "a run already"),
        (["train", file, "--horizons", "500"], "power is too short"),
        (["train", file, "--data.context_length", "50", "--horizons", "4"], "is no patch of 16"),
        (["train", file, "--variant", "rnn"], "--model.variant"),
        (["train", file, "--train.patience", "0"], "patience=0"),
    ):
        assert message in error_of(capsys, *command), command


def test_help(capsys):
    assert main(["forecast"]) == 0 and "titans forecast predict" in capsys.readouterr().out
    for command in ("train", "predict", "backtest"):
        with pytest.raises(SystemExit):
            main(["forecast", command, "--help"])
        assert "examples:" in capsys.readouterr().out


def test_carried_is_what_a_stream_forecasts():
    """The score with a carried memory is that of one call with all rows up to each origin."""
    torch.manual_seed(0)
    model = TitansForForecasting(
        TitansForecastingConfig(
            hidden_size=8, num_attention_heads=2, intermediate_size=8, num_input_channels=2,
            context_length=24, prediction_length=4, patch_length=8, patch_stride=4,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
        for layer in model.model.layers:  # large steps, nothing forgotten
            bias = layer.block.memory.to_gates.bias.view(3, -1)
            bias[0], bias[2] = 3.0, -20.0
    values = np.random.default_rng(0).normal(size=(80, 2))
    windows = Windows(values, 50, 80, 24, 4)
    found = score_carried(model, windows)
    rows = windows.values
    with torch.no_grad():
        said = [model(past_values=rows[None, :o]).prediction_outputs[0] for o in windows.origins]
        alone = [
            model(past_values=rows[None, o - 24 : o]).prediction_outputs[0] for o in windows.origins
        ]
    truth = torch.stack([rows[o : o + 4] for o in windows.origins])
    assert found.windows == 27
    assert found.mse == pytest.approx((torch.stack(said) - truth).square().mean().item(), rel=1e-5)
    assert found.mse != pytest.approx((torch.stack(alone) - truth).square().mean().item(), rel=1e-4)
