"""The benchmark of streaming: it measures what reads rightly, and nothing that does not."""

import json
import subprocess
import sys
from unittest.mock import patch

import pytest

from benchmarks import streaming
from pytitans.ops import MemoryState, neural_memory

TINY = ["--width=16", "--heads=2", "--layers=1", "--segment=64", "--chunk=16", "--rounds=1"]


@pytest.mark.parametrize("variant", ["mac", "mag", "mal", "lmm"])
def test_a_right_model_is_measured_and_a_wrong_one_is_not(variant):
    args = streaming.arguments([f"--variant={variant}"])
    assert streaming.differences(args) == ""

    def forgets_where_it_is(*inputs, **options):
        retrieved, state = neural_memory(*inputs, **options)
        return retrieved, MemoryState(state.M, state.S, state.M, 0)

    with patch("pytitans.memory.neural_memory", forgets_where_it_is):
        assert "logits by" in streaming.differences(args)


def test_the_command_reports(tmp_path):
    options = ["--tokens=5000", "--early=4000", "--contexts", "16", "40", "--llama", "16"]
    command = [sys.executable, streaming.__file__, *TINY, *options, "--decode=4", "--json=a/b.json"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "memory at 5,000 tokens against 4,000" in run.stdout
    assert "decoding at 40 against 16" in run.stdout
    report = json.loads((tmp_path / "a" / "b.json").read_text())
    assert report["read"]["tokens"] == 5000
    assert report["read"]["early_mb"] > 0
    assert [(r["context"], r["model"]) for r in report["decode"]] == [
        (16, "pytitans mac"),
        (16, "llama"),
        (40, "pytitans mac"),
    ]
    sizes = [r["cache_mb"] for r in report["decode"] if r["model"] != "llama"]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1)
