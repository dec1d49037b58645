"""The kernel is optional: without a compiler the plain form answers, after one line in the log."""

import logging

import pytest
import torch
from operator_cases import call, make_inputs

from pytitans.ops import chunk_fused
from pytitans.ops.chunk import chunk_memory


@pytest.fixture
def nothing_built(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    chunk_fused.kernel.cache_clear()
    yield tmp_path
    chunk_fused.kernel.cache_clear()


def test_without_a_compiler_plain_torch_answers(nothing_built, monkeypatch, caplog):
    inputs = make_inputs()
    want = call(chunk_memory, inputs, chunk_size=4)
    monkeypatch.setenv("CXX", "no-such-compiler")
    chunk_fused.kernel.cache_clear()
    caplog.clear()
    for _ in range(3):
        got = call(chunk_memory, inputs, chunk_size=4)
    torch.testing.assert_close(got, want)
    (line,) = caplog.records
    assert line.levelno == logging.WARNING and "no-such-compiler" in line.getMessage()


def test_a_compiler_that_fails_is_quoted(nothing_built, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "false")
    assert chunk_fused.kernel() is None
    assert len(caplog.records) == 1
    assert not list(nothing_built.rglob("*.so"))


def test_the_kernel_leaves_denormals_as_they_were():
    """It flushes them to zero for itself, not for the threads that called it."""
    call(chunk_memory, {n: t.float() for n, t in make_inputs(B=4).items()}, chunk_size=4)
    assert (torch.full((64,), 1e-38) * 0.1).count_nonzero() == 64
