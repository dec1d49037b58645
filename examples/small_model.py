"""A small model for the other examples, trained in two minutes on Python's own library.

    python examples/small_model.py runs/example

`titans train` makes a better one; the examples take either by --model.
"""

import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from pytitans import TitansConfig, TitansForCausalLM
from pytitans.data.tokenizer import byte_tokenizer

STEPS, ROWS, LENGTH = 600, 2, 512


def load_or_train(folder: str) -> TitansForCausalLM:
    """The model in the folder; where there is none, one that is trained now and left there."""
    if not Path(folder, "config.json").exists():
        print(f"no model in {folder}: training a small one, {STEPS} steps")
        model = train()
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def train() -> TitansForCausalLM:
    """Each row is a file, read on from step to step: what a memory is good for shows only behind
    the piece at hand, so the state is carried over, without its history."""
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 384}
    model = TitansForCausalLM(TitansConfig(variant="mal", memory_expansion=2, **shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, STEPS, pct_start=0.1)
    cache = None
    for step, (ids, first) in enumerate(pieces(random.Random(0))):
        cache = None if first or cache is None else cache.detach()
        out = model(input_ids=ids, labels=ids, cache=cache, use_cache=True)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        cache = out.cache
        if step % 50 == 49:
            print(f"step {step + 1}: {out.loss.item() / 0.6931:.2f} bits per byte")
    return model


def pieces(draw: random.Random) -> Iterator[tuple[torch.Tensor, bool]]:
    """[ROWS, LENGTH] bytes a step, and whether they begin new files."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [data for path in files if len(data := path.read_bytes()) > LENGTH]
    weights = [len(text) for text in texts]
    steps = 0
    while steps < STEPS:
        rows = draw.choices(texts, weights, k=ROWS)
        count = min(min(len(text) for text in rows) // LENGTH, STEPS - steps)
        for i in range(count):
            at = slice(i * LENGTH, (i + 1) * LENGTH)
            yield torch.tensor([list(text[at]) for text in rows]), i == 0
        steps += count


if __name__ == "__main__":
    load_or_train(sys.argv[1] if len(sys.argv) > 1 else "runs/example")
