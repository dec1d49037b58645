"""`titans read`: any text, any length, one memory; stopped anywhere and gone on with, the same."""

import gzip
import io
import json
import lzma
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny import tiny_config
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pytitans import read as reading_module
from pytitans.cache import TitansCache
from pytitans.cli import main
from pytitans.data.tokenizer import byte_tokenizer, load_tokenizer
from pytitans.models import TitansForCausalLM
from pytitans.read import interruptible, read, text_blocks
from pytitans.state import tensors_of

TEXT = "It was a bright cold day in April. \u2014 na\u00efve caf\u00e9!\n" * 12


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty place to work in, with a model and a text; blocks of 64 tokens."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reading_module, "BLOCK", 64)
    torch.manual_seed(0)
    ids = {"vocab_size": 258, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 257}
    model = TitansForCausalLM(tiny_config("mac", **ids))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained("model")
    byte_tokenizer().save_pretrained("model")
    (tmp_path / "a.txt").write_text(TEXT)
    return tmp_path


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained("model").eval()


def read_by(*command: str) -> int:
    return main(["read", "--model", "model", *command])


def states(path: str, model) -> list[torch.Tensor]:
    return list(tensors_of(TitansCache.load(path, model).states))


def test_a_file_is_read_as_one_call_would(folder, model, capsys):
    assert read_by("a.txt", "--memory", "a.st") == 0
    ids = torch.tensor([[256, *TEXT.encode()]])
    with torch.no_grad():
        whole = model(ids[:, :-1], use_cache=True)
    got = TitansCache.load("a.st", model)
    for one, other in zip(got.states, whole.cache.states, strict=True):
        torch.testing.assert_close(one.memory.memory, other.memory.memory)
    loss = torch.nn.functional.cross_entropy(whole.logits[0], ids[0, 1:], reduction="sum")
    said = float(capsys.readouterr().out.split(" bits per byte")[0].split()[-1])
    assert said == pytest.approx(loss.item() / math.log(2) / len(TEXT.encode()), abs=1e-4)
    about = TitansCache.describe("a.st")
    assert about["tokens"] == len(TEXT.encode())  # eos was read, the last byte was not
    assert about["metadata"]["reading"]["next_token"] == ids[0, -1]
    assert about["metadata"]["reading"]["finished"]


def test_the_same_text_by_any_way_in(folder, model, monkeypatch):
    data = TEXT.encode()
    (folder / "a.gz").write_bytes(gzip.compress(data))
    (folder / "a.xz").write_bytes(lzma.compress(data))
    for name in ("a.txt", "a.gz", "a.xz"):
        assert read_by(name, "--memory", f"{name}.st") == 0
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert read_by("-", "--memory", "stdin.st") == 0
    want = states("a.txt.st", model)
    for name in ("a.gz", "a.xz", "stdin"):
        torch.testing.assert_close(states(f"{name}.st", model), want, rtol=0, atol=0)


def test_reading_on_equals_reading_both(folder, model):
    (folder / "b.txt").write_text(TEXT[::-1])
    assert read_by("a.txt", "b.txt", "--memory", "both.st") == 0
    assert read_by("a.txt", "--memory", "one.st") == 0
    assert read_by("b.txt", "--memory", "two.st", "--memory-from", "one.st") == 0
    torch.testing.assert_close(states("two.st", model), states("both.st", model))
    assert TitansCache.describe("two.st")["tokens"] == TitansCache.describe("both.st")["tokens"]
    assert read_by("b.txt", "--memory", "one.st", "--memory-from", "one.st") == 0  # in place
    torch.testing.assert_close(states("one.st", model), states("both.st", model))


def test_stopped_and_resumed_equals_never_stopped(folder, model, capsys, monkeypatch):
    """Stopped by Ctrl-C in the middle, with the tally of bits and bytes."""
    assert read_by("a.txt", "--memory", "whole.st") == 0
    whole = capsys.readouterr().out.splitlines()[0]
    feed, fed = reading_module.Reading.feed, []

    def feed_and_interrupt(self, model, block):
        feed(self, model, block)
        fed.append(block)
        if len(fed) == 5:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(reading_module.Reading, "feed", feed_and_interrupt)
    assert read_by("a.txt", "--memory", "part.st") == 130
    assert "--resume reads the rest" in capsys.readouterr().err
    assert TitansCache.describe("part.st")["metadata"]["reading"]["tokens"] == 5 * 64 + 1
    assert read_by("a.txt", "--memory", "part.st", "--resume") == 0
    assert capsys.readouterr().out.splitlines()[0] == whole
    torch.testing.assert_close(states("part.st", model), states("whole.st", model), rtol=0, atol=0)
    assert read_by("a.txt", "--memory", "part.st", "--resume") == 0  # nothing is left to read
    assert capsys.readouterr().out.splitlines()[0] == whole


def test_killed_while_reading_leaves_what_was_saved(folder, model):
    (folder / "long.txt").write_text(TEXT * 1000)
    command = [sys.executable, "-m", "pytitans.cli", "read", "--model", "model", "long.txt"]
    command += ["--memory", "killed.st", "--save_minutes", "0.0001"]
    process = subprocess.Popen(command)
    for _ in range(600):
        if (folder / "killed.st").exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    tokens = TitansCache.describe("killed.st")["tokens"]
    assert TitansCache.load("killed.st", model).tokens == tokens > 0
    assert not TitansCache.describe("killed.st")["metadata"]["reading"]["finished"]


def test_a_broken_file_leaves_what_came_before(folder, model, capsys):
    (folder / "broken.gz").write_bytes(gzip.compress(os.urandom(1000))[:-300])
    assert read_by("a.txt", "broken.gz", "--memory", "out.st") == 2
    assert "broken.gz cannot be read" in capsys.readouterr().err
    assert TitansCache.load("out.st", model).tokens > len(TEXT.encode())


def test_generate_goes_on_from_the_memory_in_a_new_process(folder, model, capsys):
    assert read_by("a.txt", "--memory", "a.st") == 0
    ids = torch.tensor([[256, *TEXT.encode(), *b"So"]])
    new = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    want = byte_tokenizer().decode(new, skip_special_tokens=True)
    command = [sys.executable, "-m", "pytitans.cli", "generate", "--model", "model"]
    command += ["--memory", "a.st", "--temperature", "0", "--max_new_tokens", "8", "--prompt", "So"]
    before = (folder / "a.st").read_bytes()
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == f"So{want}\n"
    assert (folder / "a.st").read_bytes() == before
    capsys.readouterr()
    assert main(command[3:-2]) == 0  # no prompt: the text itself goes on
    new = model.generate(ids[:, :-2], max_new_tokens=8, do_sample=False)[0, ids.shape[1] - 2 :]
    want = byte_tokenizer().decode(new, skip_special_tokens=True)
    assert capsys.readouterr().out == want + "\n"


def test_other_tokenizers_read_streams_as_they_read_texts(tmp_path, monkeypatch):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    monkeypatch.setattr(reading_module, "BLOCK", 64)
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    text = TEXT * 3 + "  two\n\n\n   lines; " + "x" * 300 + " and an end\n"
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": 400, "special_tokens": ["<e>"], "initial_alphabet": alphabet}
    core.train_from_iterator([text], trainers.BpeTrainer(show_progress=False, **options))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<e>", pad_token="<e>")
    (tmp_path / "t.txt").write_text(text)
    blocks = list(text_blocks([str(tmp_path / "t.txt")], tokenizer))
    assert len(blocks) > 3
    ids = [token for block in blocks for token in block.ids.tolist()]
    assert ids == [0, *tokenizer(text).input_ids]
    assert sum(block.bytes for block in blocks) == len(text.encode())
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9 " * 100)
    with pytest.raises(ValueError, match="not UTF-8"):
        list(text_blocks([str(tmp_path / "bad.txt")], tokenizer))


def test_ctrl_c_while_waiting_ends_at_once():
    def waiting():
        yield 1
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    begin, handler = time.monotonic(), signal.getsignal(signal.SIGINT)
    with interruptible(waiting()) as blocks:
        assert list(blocks) == [1]
    assert blocks.interrupted
    assert time.monotonic() - begin < 30
    assert signal.getsignal(signal.SIGINT) is handler  # of a background job: to ignore it


def test_memory_does_not_grow_with_the_text(folder, model):
    sizes = []
    for repeats in (1, 4):
        (folder / "b.txt").write_text(TEXT * repeats)
        done = read(model, load_tokenizer("model"), ["b.txt"], f"{repeats}.st", progress=False)
        sizes.append(done.cache.nbytes)
    assert sizes[0] == pytest.approx(sizes[1], rel=0.2)  # by where the last segment stands


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["missing.txt", "--memory", "o.st"], "'missing.txt' is no file"),
        (["--memory", "o.st"], "no text: give files"),
        (["a.txt", "--memory", "no/o.st"], "there is no folder 'no'"),
        (["a.txt", "--memory", "a.txt"], "'a.txt' exists: --resume"),
        (["a.txt", "--memory", "o.st", "--memory-from", "a.txt"], "a.txt holds no memory"),
        (["a.txt", "--memory", "o.st", "--memory-from", "missing"], "missing"),
        (["a.txt", "--memory", "o.st", "--save-minutes", "0"], "save_minutes=0.0"),
    ],
)
def test_bad_input_is_one_line(folder, capsys, options, message):
    assert read_by(*options) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert message in lines[0]
    assert not (folder / "o.st").exists()


def test_other_files_and_other_models_are_refused(folder, capsys):
    (folder / "b.txt").write_text("b")
    read_by("a.txt", "--memory", "a.st")
    assert read_by("b.txt", "--memory", "a.st", "--resume") == 2
    assert "was made from a.txt: resume with the same files" in capsys.readouterr().err
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps(config | {"chunk_size": 8}))
    assert main(["generate", "--model", "model", "--memory", "a.st"]) == 2
    assert "a.st was read by another model" in capsys.readouterr().err
    shape = {"vocab_size": 258, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    llama = LlamaForCausalLM(LlamaConfig(intermediate_size=8, **shape))
    with pytest.raises(ValueError, match="a llama model has no memory"):
        read(llama, byte_tokenizer(), ["a.txt"], "o.st")
