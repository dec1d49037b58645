"""The examples run, and do what they say; with a tiny model in place of the one they train."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_config

from pytitans.data.tokenizer import byte_tokenizer
from pytitans.models import TitansForCausalLM

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def folder(tmp_path) -> Path:
    torch.manual_seed(0)
    ids = {"vocab_size": 258, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 257}
    TitansForCausalLM(tiny_config("mac", **ids)).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "book.txt").write_text("It was a bright cold day in April. " * 20)
    return tmp_path


def run(folder: Path, script: str, *options: str) -> str:
    command = [sys.executable, str(EXAMPLES / script), "--model", "model", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_read_a_book(folder):
    """The other process gives the answer of the first."""
    out = run(folder, "read_a_book.py", "book.txt", "--question", "So")
    first, second = out.split("-- asked")[1:]
    assert first.split("\n", 1)[1].strip() == second.split("\n", 1)[1].strip() != ""
    assert "700 bytes at" in out
    assert (folder / "book.safetensors").exists()


def test_sensor_stream(folder):
    """Untrained, but the signal that comes in pieces is answered as the whole one."""
    options = ["--steps", "1", "--seconds", "0.5", "--count", "2"]
    command = [sys.executable, str(EXAMPLES / "sensor_stream.py"), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("differ by")[-1]) < 1e-10


def test_watch_memory(folder):
    assert "400 tokens" in run(folder, "watch_memory.py", "book.txt", "--tokens", "400")
    assert (folder / "watch_memory.png").read_bytes()[:4] == b"\x89PNG"
