"""Does a layer learn to recall? A passkey in repeated noise, a few minutes on one core.

    python recipes/passkey.py
    python recipes/passkey.py chunk_size=64 memory_norm=true --steps 300
    python recipes/passkey.py variant=lmm --length 512

Trains a small byte model on texts of at most 128 bytes, half of them shorter, and for the second
half of the steps on texts of at most --length; then asks for the key in longer ones, read as a
stream. Prints the loss on the key (5 digits and the space before them; 1.92 is chance) and the
share of keys recalled whole. `NAME=VALUE` are fields of TitansConfig. The task is in
`pytitans/evals/niah.py`. How layers start was chosen with it; see docs/log.md.
"""

import argparse
import json
import time

import numpy as np
import torch
import torch.nn.functional as F

from pytitans import TitansConfig, TitansForCausalLM
from pytitans.data.tokenizer import byte_tokenizer
from pytitans.evals.niah import Passkey
from pytitans.evals.streaming import score_examples
from pytitans.evaluate import scoring

SHORTEST, START = 96, 128  # bytes: what is recalled at all is learned from short texts
SMALL = {
    "variant": "mal",
    "hidden_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 384,
    "memory_expansion": 2,
    "window": 64,
    "segment_len": 64,
}


def recalled(model: TitansForCausalLM, task: Passkey, length: int, seed: int) -> float:
    """The share of 16 keys that are told whole."""
    with scoring(model, bf16=False):
        scores = score_examples(model, list(task.examples(16, length=length, seed=seed)))
    return sum(score.exact for score in scores) / len(scores)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("fields", nargs="*", metavar="NAME=VALUE", help="fields of TitansConfig")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test", type=int, nargs="*", default=[256, 1024, 4096])
    parser.add_argument("--output", help="folder to save the model in, for `titans eval`")
    args = parser.parse_args()
    changes = dict(field.split("=", 1) for field in args.fields)
    changes = {k: v if k == "variant" else json.loads(v) for k, v in changes.items()}

    torch.manual_seed(args.seed)
    rng, task = np.random.default_rng(args.seed), Passkey(byte_tokenizer())
    model = TitansForCausalLM(TitansConfig(**{**SMALL, **changes})).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, args.steps, pct_start=min(0.5, 50 / args.steps)
    )
    began, losses = time.perf_counter(), []
    for step in range(args.steps):
        longest = args.length if step > args.steps // 2 else min(START, args.length)
        length = longest if rng.random() < 0.5 else int(rng.integers(SHORTEST, longest + 1))
        ids, targets = task.batch(
            args.batch, length=length, seed=args.seed, first=step * args.batch
        )
        logits = model(ids, use_cache=False).logits.transpose(1, 2)
        on_key = F.cross_entropy(logits, targets)
        on_rest = F.cross_entropy(logits[..., :-1], ids[:, 1:])
        (on_key + 0.1 * on_rest).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(on_key.item())
        if (step + 1) % 50 == 0:
            mean, spent = np.mean(losses[-25:]), time.perf_counter() - began
            print(f"step {step + 1}: loss on the key {mean:.3f}, {spent:.0f} s", flush=True)
    shares = {n: recalled(model, task, n, seed=args.seed + 1) for n in args.test}
    if args.output:
        model.save_pretrained(args.output)
        byte_tokenizer().save_pretrained(args.output)
    print("recalled:", ", ".join(f"{n:,} bytes {share:.0%}" for n, share in shares.items()))


if __name__ == "__main__":
    main()
