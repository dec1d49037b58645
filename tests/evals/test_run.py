"""`titans eval --task` goes on where it was stopped; `titans report` says what the files hold."""

import json
import math

import pytest
import torch
from tiny import tiny_model

from pytitans.cli import main
from pytitans.data.tokenizer import byte_tokenizer
from pytitans.evals import load_task
from pytitans.evals import run as running
from pytitans.evals.report import position_table, row_of, size, spread, write_report
from pytitans.evals.results import Results, describe_model, read_results
from pytitans.evals.run import run_task

BYTES = byte_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_model("lmm", vocab_size=258, bos_token_id=256, eos_token_id=256).float()


@pytest.fixture
def folder(tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("model")
    BYTES.save_pretrained("model")
    (tmp_path / "book.txt").write_text("The cat sat on the mat. It purred. " * 60)
    return tmp_path


def evaluate(*options: str) -> int:
    return main(["eval", "--model", "model", *options])


def scores(path):
    return {(c["length"], c["depth"]): c["scores"] for c in read_results(path)["cells"]}


def test_a_stopped_run_goes_on(tmp_path, model, monkeypatch):
    task, options = (
        load_task("passkey", BYTES),
        {"lengths": [84, 90], "samples": 3, "batch_size": 2},
    )
    facts = {"task": "passkey", "options": {}, "seed": 0, "model": describe_model(model, "m")}
    whole = Results(tmp_path / "whole.json", facts)
    run_task(model, task, whole, progress=False, **options)
    assert whole.facts["finished"]

    calls, score_examples = [], running.score_examples

    def stopping(*args, **kwargs):
        calls.append(len(args[1]))
        if len(calls) == 8:
            raise KeyboardInterrupt
        return score_examples(*args, **kwargs)

    monkeypatch.setattr(running, "score_examples", stopping)
    path = tmp_path / "parts.json"
    with pytest.raises(KeyboardInterrupt):
        run_task(model, task, Results(path, facts), progress=False, **options)
    assert not read_results(path)["finished"] and sum(map(len, scores(path).values())) == 11
    calls.clear()
    calls.extend([0] * 8)  # never stops again
    run_task(model, task, Results(path, facts), progress=False, **options)
    assert sum(calls) == 30 - 11  # what was there is not done again
    assert scores(path) == scores(tmp_path / "whole.json")


@pytest.mark.parametrize("found", [True, False])
def test_gives_up_after_a_length_at_which_nothing_is_right(tmp_path, model, monkeypatch, found):
    def scored(model, examples, **options):
        right = float(found and len(examples[0].ids) == 84)
        return [(right, right, right, 1.0)] * len(examples)

    monkeypatch.setattr(running, "score_examples", scored)
    results = Results(tmp_path / "x.json", {"task": "passkey"})
    options = {"lengths": [84, 90, 96], "samples": 1, "depths": [0, 100], "progress": False}
    run_task(model, load_task("passkey", BYTES), results, give_up=True, **options)
    assert {cell["length"] for cell in results.cells} == ({84, 90} if found else {84})
    assert len(results.cells) == (4 if found else 2)  # every depth of a length that is asked


def test_command_line_of_each_kind(folder, capsys):
    assert evaluate("--task", "passkey", "--lengths", "128", "1K", "--depths", "0", "50",
                    "--samples", "2", "--output", "out/a.json") == 0  # fmt: skip
    assert "| model | 128 | 1K |" in capsys.readouterr().out
    result = read_results("out/a.json")
    assert [(c["length"], c["depth"]) for c in result["cells"]] == [
        (128, 0), (128, 50), (1024, 0), (1024, 50)
    ]  # fmt: skip
    assert result["command"].startswith("titans eval --model model --task passkey")
    assert {"commit", "torch", "pytitans"} <= set(result["software"]) and result["seed"] == 0
    assert evaluate("--task", "positions", "--data", "book.txt", "--output", "p.json") == 0
    assert (
        evaluate("--task", "parity", "--lengths", "32", "--samples", "2", "--output", "s.json") == 0
    )
    assert main(["report", "out/a.json", "p.json", "s.json", "--output", "report"]) == 0
    report = (folder / "report" / "report.md").read_text()
    for heading in ("## passkey", "## positions", "## parity"):
        assert heading in report
    pictures = {"passkey-accuracy.png", "passkey-model-depth.png", "positions.png"}
    assert {path.name for path in (folder / "report").glob("*.png")} == pictures
    assert all((folder / "report" / name).stat().st_size > 5000 for name in pictures)


def test_positions_by_hand():
    """Each position's bits over its bytes, of all documents; the last column weighs by bytes."""

    def part(first, nats, size):
        last, nats = first + size - 1, nats * math.log(2)
        return {"first": first, "last": last, "tokens": size, "bytes": size, "nats": nats}

    cells = [{"bins": [part(0, 300, 100), part(1024, 20, 20)]}, {"bins": [part(0, 100, 100)]}]
    text = position_table({"m": [{"cells": cells}]})
    assert text.splitlines()[-3:] == [
        "| model | from 0 | from 1K | all |",
        "| --- | ---: | ---: | ---: |",
        "| m | 2.0000 | 1.0000 | 1.9091 |",
    ]


def test_results_of_another_question_are_not_written_over(folder, capsys):
    options = ["--task", "passkey", "--lengths", "128", "--depths", "50", "--samples", "1"]
    assert evaluate(*options, "--output", "a.json") == 0
    before = (folder / "a.json").read_text()
    assert evaluate(*options, "--seed", "1", "--output", "a.json") == 2
    assert "its seed is 0, now 1" in capsys.readouterr().err
    other = tiny_model("lmm", vocab_size=258, hidden_size=32)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    other.float().save_pretrained("model")
    assert evaluate(*options, "--output", "a.json") == 2
    assert "its model is" in capsys.readouterr().err
    assert (folder / "a.json").read_text() == before


@pytest.mark.parametrize(
    "options, message",
    [
        (["--task", "needle"], "'needle' is no task"),
        (["--task", "passkey", "--lengths", "1G"], "'1G' is no length"),
        (["--task", "passkey", "--lengths", "20"], "length=20 is too short"),
        (["--task", "babilong_qa1"], "--babi"),
        (["--task", "positions"], "give files by --data"),
        (["--task", "passkey", "--samples", "0"], "samples=0 must be 1 or more"),
        (["--task", "parity", "--depths", "50"], "parity has no depth"),
    ],
)
def test_errors_are_one_line(folder, capsys, options, message):
    assert evaluate(*options) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]


def made_result(name: str, accuracies: dict, task="niah_single_1") -> dict:
    cells = [
        {"length": n, "depth": d, "accuracy": a, "samples": 4, "scores": []}
        for (n, d), a in accuracies.items()
    ]
    model = {"name": name, "class": "X", "parameters": 10, "weights": "0" * 64}
    facts = {"task": task, "seed": 0, "model": model, "software": {}, "command": "titans eval"}
    return {"version": 1, "finished": True, "options": {}, **facts, "cells": cells}


def test_report_says_mean_and_spread_over_seeds(tmp_path):
    runs = {
        "runs/mal-seed0": {(2048, 0): 1.0, (2048, 100): 0.5, (4096, 0): 0.25},
        "runs/mal-seed1": {(2048, 0): 0.25, (2048, 100): 0.25, (4096, 0): 0.25},
        "runs/llama": {(2048, 0): 0.0},
    }
    files = []
    for number, (name, cells) in enumerate(runs.items()):
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(made_result(name, cells)))
    report, *pictures = write_report(files, tmp_path / "report")
    text = report.read_text()
    assert "| model | 2K | 4K |" in text
    assert "| mal | 50.0 ± 35.4 | 25.0 ± 0.0 |" in text  # runs of 75 and 25 at 2K
    assert "| llama | 0.0 |  |" in text
    assert {path.name for path in pictures} == {
        "niah_single_1-accuracy.png",
        "niah_single_1-mal-depth.png",
    }
    with pytest.raises(ValueError, match="no file of results"):
        (tmp_path / "x.json").write_text("{}")
        write_report([tmp_path / "x.json"], tmp_path)


def test_a_run_that_gave_up_counts_in_the_mean(tmp_path):
    """As 0, at lengths that other runs of the model were asked, whatever file they are in."""
    asked = {
        "a": ("mal-seed0", {(1024, 0): 1.0, (2048, 0): 1.0}),
        "b": ("mal-seed0", {(4096, 0): 0.5}),  # the same run's longer texts
        "c": ("mal-seed1", {(1024, 0): 0.0}),  # found nothing, and was asked no more
        "d": ("mal-seed2", {(1024, 0): 0.5, (2048, 0): 0.5}),  # not asked yet
        "e": ("mag-seed0", {(1024, 0): 0.0}),
    }
    files = [tmp_path / f"{name}.json" for name in asked]
    for path, (name, cells) in zip(files, asked.values(), strict=True):
        path.write_text(json.dumps(made_result(name, cells)))
    text = write_report(files, tmp_path / "report")[0].read_text()
    assert "| mal | 50.0 ± 50.0 | 50.0 ± 50.0 | 25.0 ± 35.4 |" in text
    assert "| mag | 0.0 |  |  |" in text


def test_names_and_numbers():
    names = ["runs/mal-seed3", "mac_seed_1", "gpt2", "org/model-s2", "seed1"]
    rows = [row_of({"model": {"name": name}}) for name in names]
    assert rows == ["mal", "mac", "gpt2", "model", "seed1"]
    assert [size(n) for n in (0, 500, 2048, 65536, 2**21, 3000)] == [
        "0",
        "500",
        "2K",
        "64K",
        "2M",
        "3,000",
    ]
    assert spread([1.0, None, 3.0]) == (2.0, pytest.approx(2**0.5)) and spread([None]) is None
