"""The benchmark of the operator: every contestant in both dtypes, and none that is wrong."""

import json
from unittest.mock import patch

import pytest
import torch

from benchmarks import operator as benchmark
from pytitans.ops import neural_memory

TINY = ["--batch=1", "--tokens=24", "--heads=2", "--head-dim=8", "--hidden=16", "--chunk=8"]
TINY += ["--rounds=1", "--no-long"]


def test_a_right_operator_is_measured():
    assert benchmark.differences(benchmark.arguments(TINY)) == ""


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_operator_wrong_in_one_dtype_is_not_measured(dtype):
    def forgets(q, k, v, lr, log_momentum, log_decay, state, **options):
        log_decay = log_decay - 0.1 if v.dtype == dtype else log_decay
        return neural_memory(q, k, v, lr, log_momentum, log_decay, state, **options)

    with patch.object(benchmark, "neural_memory", forgets):
        wrong = benchmark.differences(benchmark.arguments(TINY))
        with pytest.raises(SystemExit, match="not measured"):
            benchmark.main(TINY)
    assert str(dtype).removeprefix("torch.") in wrong
    assert all(str(x) not in wrong for x in ("float64", "float32") if x not in str(dtype))


@pytest.mark.filterwarnings("ignore")  # titans-pytorch's, where it is installed
def test_ratios_are_within_a_dtype(tmp_path, capsys):
    path = tmp_path / "a" / "b.json"
    with (
        patch.object(benchmark.common, "in_its_own_process", lambda file, only: 1.0),
        patch.object(benchmark, "SHORT", 8),
    ):
        benchmark.main([*TINY, f"--json={path}"])
    rows = json.loads(path.read_text())["rows"]
    kinds = {name.rsplit(", ", 1)[0] for name in rows}
    assert set(rows) == {f"{kind}, {dtype}" for kind in kinds for dtype in benchmark.NEAR}
    for name, row in rows.items():
        ours = rows["pytitans, " + name.rsplit(", ", 1)[1]]
        assert row["step_over_pytitans"] == pytest.approx(
            ours["step_tokens_per_s"] / row["step_tokens_per_s"]
        )
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows)


def test_the_fastest_dtype_of_each_is_compared():
    rates = {"pytitans, float32": 10, "pytitans, bfloat16": 20}
    rates |= {"titans-pytorch default, float32": 5, "titans-pytorch default, bfloat16": 4}
    rows = {n: {"forward_tokens_per_s": x, "step_tokens_per_s": x} for n, x in rates.items()}
    (line,) = benchmark.best_against_best(rows)
    assert "forward 4.0x (bfloat16 over float32)" in line
