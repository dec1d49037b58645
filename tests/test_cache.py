"""TitansCache: of constant size, copied, kept as a file and gone on with, the same numbers."""

import json
import os
import random
import subprocess
import sys

import pytest
import torch
from tiny import stream, tiny_model

from pytitans.cache import TitansCache
from pytitans.models import TitansConfig, TitansForCausalLM
from pytitans.snapshot import VERSION, model_fingerprint
from pytitans.state import tensors_of


def equal(a: TitansCache, b: TitansCache) -> bool:
    pairs = zip(tensors_of(a.states), tensors_of(b.states), strict=True)
    return a.tokens == b.tokens and all(torch.equal(x, y) for x, y in pairs)


@pytest.fixture
def saved(variant, ids, tmp_path):
    """A model, what it has read, and the file of it."""
    model = tiny_model(variant).float()
    with torch.no_grad():
        cache = model(ids[:, :21], use_cache=True).cache
    cache.save(tmp_path / "m.safetensors", model, metadata={"title": "Emma", "pages": [1, 2]})
    return model, cache, tmp_path / "m.safetensors"


def test_state_does_not_grow(model):
    """Bounded by one segment and window, whatever has been read and in whatever pieces; nothing of
    the call that it comes from is kept alive."""
    ids = torch.randint(16, (1, 512), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, early = stream(model, ids[:, :64], [64])
        _, late = stream(model, ids, [512])
        _, pieces = stream(model, ids, [200, 56, 256])
    count = [sum(x.numel() for x in tensors_of(c.states)) for c in (early, late, pieces)]
    assert count[0] == count[1] == count[2]
    assert max(late.nbytes, pieces.nbytes) <= 2 * early.fork().nbytes


def test_bytes_are_those_of_the_tensors(model, ids):
    fork = model(ids, use_cache=True).cache.fork()
    assert fork.nbytes == sum(x.numel() * x.itemsize for x in tensors_of(fork.states))
    assert TitansCache(2).nbytes == TitansCache(2).batch_size == TitansCache(2).tokens == 0
    assert fork.batch_size == 3


def test_a_fork_leaves_the_original(model, ids):
    cache = model(ids[:, :11], use_cache=True).cache
    fork = cache.fork()
    model(ids[:, 11:20], cache=fork)
    got, _ = stream(model, ids[:, 11:], [26], cache)
    torch.testing.assert_close(got, model(ids).logits[:, 11:])


def test_rows_are_chosen_repeated_and_reordered(model, ids):
    cache = model(ids[:, :11], use_cache=True).cache
    want = model(ids).logits[:, 11:]
    for change, rows in (
        (lambda c: c.reorder_cache(torch.tensor([2, 0, 1])), [2, 0, 1]),
        (lambda c: c.batch_select_indices(torch.tensor([1, 1])), [1, 1]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ):
        other = cache.fork()
        change(other)
        got, _ = stream(model, ids[rows, 11:], [26], other)
        torch.testing.assert_close(got, want[rows])
    assert cache.for_rows(3) is cache
    assert cache.for_rows(6).batch_size == 6
    with pytest.raises(ValueError, match="3 rows does not serve a batch of 4"):
        cache.for_rows(4)


def test_detach_and_move(model, ids):
    cache = model(ids, use_cache=True).cache
    assert any(x.requires_grad for x in tensors_of(cache.states))
    assert not any(x.requires_grad for x in tensors_of(cache.detach().states))
    assert {x.device.type for x in tensors_of(cache.to("meta").states)} == {"meta"}
    assert equal(cache.to("cpu"), cache)


def test_cache_refuses_what_a_memory_cannot_do(model, ids):
    cache = model(ids, use_cache=True).cache
    with pytest.raises(ValueError, match="cannot be unread"):
        cache.crop(3)
    with pytest.raises(ValueError, match="cache_implementation='static'"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")


# As a file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_goes_on_as_if_never_saved(variant, dtype, tmp_path):
    """Exactly, at random cuts: the same bits come out, and the same state stays behind."""
    model, draw = tiny_model(variant).to(dtype), random.Random(0)
    path = tmp_path / "m.safetensors"
    for _ in range(4):
        cuts = [draw.choice([1, 2, 7, 8, 33]) for _ in range(5)]
        ids = torch.randint(16, (draw.randint(1, 3), sum(cuts)))
        kept = loaded = None
        for piece in ids.split(cuts, dim=1):
            with torch.no_grad():
                out = model(piece, cache=kept, use_cache=True)
                again = model(piece, cache=loaded, use_cache=True)
            assert torch.equal(out.logits, again.logits)
            kept = out.cache
            again.cache.save(path, model)
            loaded = TitansCache.load(path, model)
            assert equal(loaded, kept)


def test_exact_at_a_size_where_kernels_block(variant, tmp_path):
    """Matmuls of real sizes may round by a tensor's strides and alignment: these are kept too."""
    torch.manual_seed(0)
    model = TitansForCausalLM(TitansConfig(variant=variant, num_hidden_layers=1)).eval()
    ids = torch.randint(256, (2, 480))
    with torch.no_grad():
        cache = model(ids[:, :333], use_cache=True).cache
        cache.save(tmp_path / "m", model)
        loaded = TitansCache.load(tmp_path / "m", model)
        got, want = (stream(model, ids[:, 333:], [1, 146], c)[0] for c in (loaded, cache))
    assert torch.equal(got, want)


def test_rows_at_different_places(variant, ids, tmp_path):
    model = tiny_model(variant)
    mask = torch.stack([(torch.arange(37) >= 37 - n).long() for n in (37, 20, 9)])
    cache = model(ids, attention_mask=mask, use_cache=True).cache
    cache.save(tmp_path / "m", model)
    loaded = TitansCache.load(tmp_path / "m", model)
    assert equal(loaded, cache)
    got, want = (stream(model, ids[:, :9], [4, 1, 4], c)[0] for c in (loaded, cache))
    assert torch.equal(got, want)


def test_a_file_says_what_it_is_without_a_model(saved):
    model, cache, path = saved
    about = TitansCache.describe(path)
    assert about == {
        "version": VERSION,
        "model": model_fingerprint(model),
        "tokens": 21,
        "metadata": {"title": "Emma", "pages": [1, 2]},
        "bytes": path.stat().st_size,
    }
    assert about["bytes"] < cache.fork().nbytes + 8192  # what states share is there once
    fork = TitansCache.load(path, model).as_start()
    assert (fork.get_seq_length(), fork.tokens) == (0, 21)
    fork.save(path, model)
    assert TitansCache.describe(path)["tokens"] == 21


def test_the_head_has_no_part_in_a_memory(saved, tmp_path):
    model, cache, path = saved
    assert equal(TitansCache.load(path, model.model), cache)
    TitansCache(2).save(path, model)  # before the first token
    assert TitansCache.load(path, model).states == [None, None]


def test_any_other_model_is_refused(saved):
    model, _, path = saved
    TitansCache.load(path, model, fingerprint=model_fingerprint(model))
    weight = model.model.layers[1].mlp.down.weight
    with torch.no_grad():
        weight[3, 5] += 1e-3
    with pytest.raises(ValueError, match=r"m\.safetensors was read by another model"):
        TitansCache.load(path, model)
    with torch.no_grad():
        weight[3, 5] -= 1e-3
    for other in (tiny_model(model.config.variant, chunk_size=8).float(), model.bfloat16()):
        with pytest.raises(ValueError, match="load it with the model"):
            TitansCache.load(path, other)


def test_every_flipped_byte_is_noticed(saved):
    model, _, path = saved
    fingerprint, whole = model_fingerprint(model), path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    places = {*range(8), *random.Random(0).sample(range(header), 60), header, len(whole) - 1}
    places |= {*random.Random(1).sample(range(header, len(whole)), 60)}
    for place in sorted(places):
        bad = bytearray(whole)
        bad[place] ^= 1 << place % 8
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"m\.safetensors (holds no|is a) memory"):
            TitansCache.load(path, model, fingerprint=fingerprint)


def test_every_cut_is_noticed(saved):
    model, _, path = saved
    fingerprint, whole = model_fingerprint(model), path.read_bytes()
    for size in (0, 3, 8, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        for look in (TitansCache.describe, lambda p: TitansCache.load(p, model)):
            with pytest.raises(ValueError, match=r"m\.safetensors holds no memory .*restore it"):
                look(path)
    path.write_bytes(whole + b"0")
    with pytest.raises(ValueError, match="bytes instead of"):
        TitansCache.load(path, model, fingerprint=fingerprint)
    path.write_text(json.dumps({"not": "safetensors"}))
    with pytest.raises(ValueError, match="holds no memory"):
        TitansCache.load(path, model)
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        TitansCache.load(path.parent / "elsewhere", model)


def test_a_newer_version_is_named(saved):
    model, _, path = saved
    old, new = f'"version":"{VERSION}"'.encode(), b'"version":"9"'
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(
        ValueError, match=f"format version 9, this pytitans reads version {VERSION}"
    ):
        TitansCache.load(path, model)


def test_a_save_that_fails_leaves_the_old_file(saved, monkeypatch):
    model, cache, path = saved
    before = path.read_bytes()
    with pytest.raises(TypeError):
        cache.save(path, model, metadata={"no": object()})
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        cache.save(path, model)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


KILLED_SAVES = """
import os, random, signal, sys, time
sys.path.insert(0, {here!r})
import torch
from tiny import tiny_model
from pytitans.cache import TitansCache
from pytitans.snapshot import model_fingerprint
from pytitans.state import tensors_of

model, path, draw = tiny_model("mac"), {path!r}, random.Random(0)
fingerprint, caches = model_fingerprint(model), {{}}
for length in (5, 40):
    with torch.no_grad():
        out = model(torch.arange(length)[None] % 16, use_cache=True)
    caches[length] = out.cache
caches[5].save(path, model, fingerprint=fingerprint)
for _ in range(60):
    child = os.fork()
    if not child:
        while True:
            for cache in caches.values():
                cache.save(path, model, fingerprint=fingerprint)
    time.sleep(draw.uniform(0.005, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    loaded = TitansCache.load(path, model, fingerprint=fingerprint)
    same = zip(tensors_of(loaded.states), tensors_of(caches[loaded.tokens].states), strict=True)
    assert all(torch.equal(x, y) for x, y in same)
    print(loaded.tokens)
"""


def test_killed_while_saving_many_times(tmp_path):
    """Whenever the kill comes, the file is whole: the state before the save, or after it."""
    here = os.path.dirname(__file__)
    script = KILLED_SAVES.format(here=here, path=str(tmp_path / "m.safetensors"))
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = run.stdout.split()
    assert len(found) == 60
    assert set(found) == {"5", "40"}


def test_what_a_killed_save_left_is_removed_in_time(saved):
    model, cache, path = saved
    for name in (".m.safetensors.1.tmp", ".m.safetensors.2.tmp", ".other.1.tmp"):
        (path.parent / name).write_bytes(b"half")
    for name in (".m.safetensors.1.tmp", ".other.1.tmp"):
        os.utime(path.parent / name, (0, 0))
    cache.save(path, model)
    left = sorted(p.name for p in path.parent.iterdir())
    assert left == [".m.safetensors.2.tmp", ".other.1.tmp", "m.safetensors"]
