"""The experiments' frame: the best learning rate is chosen, seeds follow, what is done is kept."""

import argparse
import json
from pathlib import Path

import experiment
import pytest


class Fake(experiment.Experiment):
    """Its loss is least at 2e-3 for `a`, at 4e-3 for `b`."""

    models = ("a", "b", "c")

    def __init__(self):
        super().__init__(argparse.Namespace(share=0.5))
        self.trained: list[tuple[str, float, int]] = []

    def train(self, name, folder, rate, seed):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "checkpoint-1").mkdir()
        self.trained.append((name, rate, seed))
        return abs(rate - (4e-3 if name == "b" else 2e-3))

    def evaluations(self, name):
        return {"task": [], "task_long": []}

    def swept(self, name):
        return "a" if name == "c" else name


def seed_all(fake, output):
    for name in fake.models:
        for seed in (0, 1):
            experiment.seed_job(fake, name, seed, output)


@pytest.fixture
def evaluated(monkeypatch):
    """Stands for `titans eval`: writes a file of results, in which `b` finds nothing."""
    asked = []

    def titans(argv):
        options = dict(zip(argv[1::2], argv[2::2], strict=True))
        asked.append(Path(options["--output"]).name)
        right = 0.0 if options["--label"].startswith("b") else 1.0
        path = Path(options["--output"])
        path.parent.mkdir(exist_ok=True)
        cells = [{"length": 1, "accuracy": 1.0}, {"length": 2, "accuracy": right}]
        path.write_text(json.dumps({"finished": True, "cells": cells}))
        return 0

    monkeypatch.setattr("pytitans.cli.main", titans)
    return asked


def test_sweep_then_seeds(tmp_path, evaluated):
    fake = Fake()
    for name in "ab":
        for rate in (1e-3, 2e-3, 4e-3):
            experiment.sweep_job(fake, name, rate, tmp_path)
    assert len(fake.trained) == 6
    assert experiment.chosen("a", tmp_path) == 2e-3
    assert experiment.chosen("b", tmp_path) == 4e-3
    seed_all(fake, tmp_path)  # the sweep's own model is seed 0; c has a's rate
    assert fake.trained[6:] == [("a", 2e-3, 1), ("b", 4e-3, 1), ("c", 2e-3, 0), ("c", 2e-3, 1)]
    longer = {name for name in evaluated if name.startswith("task_long")}
    assert longer == {f"task_long-{m}-seed{s}.json" for m in "ac" for s in (0, 1)}
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_what_is_done_is_kept(tmp_path, evaluated):
    fake = Fake()
    for _ in range(2):
        experiment.sweep_job(fake, "a", 2e-3, tmp_path)
        experiment.seed_job(fake, "a", 0, tmp_path)
        experiment.seed_job(fake, "a", 1, tmp_path)
    assert fake.trained == [("a", 2e-3, 0), ("a", 2e-3, 1)]
    assert len(evaluated) == 4


def test_a_wider_sweep_that_finds_better_replaces_the_runs(tmp_path, evaluated):
    fake = Fake()
    experiment.sweep_job(fake, "a", 1e-3, tmp_path)
    experiment.seed_job(fake, "a", 0, tmp_path)
    experiment.sweep_job(fake, "a", 2e-3, tmp_path)
    experiment.seed_job(fake, "a", 0, tmp_path)
    assert json.loads((tmp_path / "a-seed0" / "done.json").read_text())["rate"] == 2e-3
    assert evaluated.count("task-a-seed0.json") == 2


def test_one_failure_leaves_the_others_alone():
    def job(*args):
        raise ValueError(f"no {args[1]}")

    assert "ValueError: no mal" in experiment.attempt(job, None, "mal", 0, None)
    assert experiment.attempt(lambda *args: None, None, "mal", 0, None) is None


def test_every_model_of_the_experiments_has_the_same_parameters():
    sizes = {
        name: experiment.build(name, experiment.SHAPE, 0).num_parameters()
        for name in experiment.all_models()
    }
    assert max(sizes.values()) < 1.005 * min(sizes.values()), sizes


def test_steps_are_a_share_and_lengths_end_where_asked():
    assert Fake().steps(300) == 150 and Fake().steps(1) == 1
    assert experiment.lengths_to(("1K", "16K", "1M"), 2**16, whole=False) == ["1K", "16K"]
    assert experiment.lengths_to(("1K", "16K", "64K"), 2**20, whole=True) == ["1K", "16K"]


def test_scores_of_models_that_were_run_elsewhere_stay():
    def cell(model, context, seed, mse):
        return {"model": model, "context_length": context, "seed": seed, "mse": mse}

    before = [cell("lmm", 336, 0, 1.0), cell("lmm", 720, 0, 2.0), cell("lmm", 720, 1, 3.0)]
    now = [cell("lmm", 720, 0, 4.0)]
    keys = "model", "context_length"
    assert experiment.with_earlier(before, now, *keys) == [before[0], *now]
    assert experiment.with_earlier([], now, *keys) == now
