"""The benchmark of whole models: it measures equal models, and nothing that is wrong."""

import json
import subprocess
import sys
from unittest.mock import patch

import pytest

from benchmarks import training
from pytitans.ops import neural_memory
from pytitans.presets import count_parameters

TINY = ["--width=16", "--heads=2", "--layers=1", "--segment=8", "--chunk=4", "--rounds=1"]


def test_a_right_model_is_measured_and_a_wrong_one_is_not():
    args = training.arguments([])
    assert training.differences(args) == ""

    def keeps_all(q, k, v, lr, log_momentum, log_decay, state, **options):
        return neural_memory(q, k, v, lr, log_momentum, None, state, **options)

    with patch("pytitans.memory.neural_memory", keeps_all):
        assert "the memory's path" in training.differences(args)


def test_peers_have_the_parameters_of_titans():
    args = training.arguments(["--peers", "llama", "mamba2_hf", "gated_deltanet"])
    sizes = {name: training.count(make()) for name, make in training.models(args).items()}
    target = count_parameters(training.titans_config(args, 64))
    assert len(sizes) == 5
    assert all(abs(size / target - 1) < 0.01 for size in sizes.values()), sizes


@pytest.mark.filterwarnings("ignore")  # titans-pytorch's, where it is installed
def test_every_peer_takes_a_step():
    args = training.arguments([*TINY, "--lengths", "32"])
    for make in training.models(args).values():
        tokens, step = training.training_step(args, make(), 32)
        step()
        assert tokens == 64


def test_the_command_reports(tmp_path):
    options = ["--lengths=24", "--decode=2", "--peers", "--json=a/b.json"]
    command = [sys.executable, training.__file__, *TINY, *options]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "pytitans mac, chunk 4" in run.stdout
    rows = json.loads((tmp_path / "a" / "b.json").read_text())["rows"]
    assert [r["what"] for r in rows] == ["train", "decode"]
    assert all(r["tokens_per_s"] > 0 and r["memory_mb"] >= 0 for r in rows)


def test_the_crossing_is_between_the_lengths_around_it():
    assert "from about 4,000" in training.overtakes({2000: 0.5, 8000: 2.0, 32000: 9.0})
    assert "no measured length" in training.overtakes({2000: 0.5, 8000: 0.9})
    assert "at 2,000 tokens only" in training.overtakes({2000: 1.5, 8000: 0.5})
    assert "every measured length" in training.overtakes({2000: 1.5, 8000: 3.0})
