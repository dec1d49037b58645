"""The recipe of genomics, from data to table, on a small table with two models."""

import json
import sys

import experiment
import genomics
import numpy as np
import pytest


@pytest.fixture
def table(tmp_path):
    rng = np.random.default_rng(0)
    lines = ["seq\tlabel"]
    for i in range(60):
        weights = (0.6, 0.1, 0.2, 0.1) if i % 2 else (0.1, 0.2, 0.1, 0.6)
        lines.append("".join(rng.choice(list("ACGT"), size=60, p=weights)) + f"\t{i % 2}")
    path = tmp_path / "toy.test.tsv"
    path.write_text("\n".join(lines) + "\n")
    return path


def run_here(jobs, workers):
    """Stands for the pool of processes."""
    for job, *args in jobs:
        job(*args)
    return []


def test_from_data_to_table(table, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment, "run_all", run_here)
    small = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    monkeypatch.setattr(genomics, "SHAPE", genomics.SHAPE | small)
    monkeypatch.setitem(genomics.BUDGETS, "toy", {"steps": 4, "batch": 8, "strands": "augment"})
    results = tmp_path / "results"
    argv = ["genomics.py", str(table), "--models", "lmm", "cnn", "--seeds", "0"]
    argv += [
        "--rates",
        "5e-3",
        "1e-2",
        "--output",
        str(tmp_path / "runs"),
        "--results",
        str(results),
    ]
    monkeypatch.setattr(sys, "argv", argv)
    assert genomics.main() == 0
    found = json.loads((results / "toy.json").read_text())
    rows = {row["model"]: row for row in found["rows"]}
    assert found["test_sequences"] == 12 and "seed 0" in found["split"]
    assert rows["lmm"]["steps"] == 4 and rows["cnn"]["steps"] == 10
    assert rows["lmm"]["seeds"] == [0] and len(rows["lmm"]["mcc"]) == 1
    for name, row in rows.items():
        losses = found["sweep"][name]["losses"]
        assert len(losses) == 2 and f"{row['learning_rate']:g}" in losses
        assert min(losses.values()) == pytest.approx(1 - row["dev_mcc"][0])
    text = (results / "toy.md").read_text()
    assert "12 test sequences" in text and "| lmm |" in text
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.json")}
    monkeypatch.setattr(genomics.Genomics, "train", None)  # nothing is trained twice
    assert genomics.main() == 0
    after = {path: path.stat().st_mtime_ns for path in before if path.stem != "sweep"}
    assert after == {path: time for path, time in before.items() if path.stem != "sweep"}

    elsewhere = [row | {"model": "mal"} for row in found["rows"][:1]]
    for share, kept in ((1.0, ["mal", "lmm", "cnn"]), (0.5, ["lmm", "cnn"])):
        (results / "toy.json").write_text(json.dumps(found | {"rows": elsewhere, "share": share}))
        monkeypatch.setattr(sys, "argv", [*argv, "--report"])
        assert genomics.main() == 0
        now = json.loads((results / "toy.json").read_text())
        assert [row["model"] for row in now["rows"]] == kept
        assert ("| mal |" in (results / "toy.md").read_text()) is (len(kept) == 3)


def test_the_table_has_means_and_deviations_best_first():
    row = {"parameters": 1000, "learning_rate": 2e-3, "seconds": [60, 120]}
    rows = [
        row | {"model": "a", "dev_mcc": [0.5, 0.6], "mcc": [0.5, 0.7], "accuracy": [0.8, 0.8]},
        row | {"model": "b", "dev_mcc": [0.5, 0.5], "mcc": [0.65, 0.65], "accuracy": [0.8, 0.8]},
    ]
    _, _, first, second = genomics.table(rows).splitlines()
    assert first.startswith("| b | 1,000 | 0.002 | 50.0 ± 0.0 | 65.0 ± 0.0 | 80.0 ± 0.0 | 1.5 |")
    assert second.startswith("| a |") and "| 60.0 ± 14.1 |" in second
    assert genomics.spread([0.5]) == "50.0"


def test_titans_models_have_the_parameters_of_mal():
    from pytitans import TitansConfig
    from pytitans.presets import count_parameters

    recipe = genomics.Genomics(None)
    sizes = [
        count_parameters(TitansConfig(**{"variant": name} | genomics.IDS | recipe.shape(name)))
        for name in (*genomics.TITANS, *genomics.LINEAR, *genomics.WIDE)
    ]
    assert max(sizes) < 1.01 * min(sizes)


def test_names_of_data_sets(tmp_path):
    (tmp_path / "GUE" / "tf" / "0").mkdir(parents=True)
    (tmp_path / "GUE" / "prom").mkdir()
    assert genomics.name_of(str(tmp_path / "GUE" / "tf" / "0")) == "tf-0"
    assert genomics.name_of(str(tmp_path / "GUE" / "prom")) == "prom"
    assert genomics.name_of("data/human_cohn.test.tsv.gz") == "human_cohn"
