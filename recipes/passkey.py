"""Does a layer learn to recall? A passkey in repeated noise, a few minutes on one core.

    python recipes/passkey.py
    python recipes/passkey.py chunk_size=64 memory_norm=true --steps 300
    python recipes/passkey.py variant=lmm --length 512

Trains a small byte model on texts of at most --length bytes, half of them shorter, then asks for
the key in longer ones, read as a stream. Prints the loss on the key's digits (2.30 is chance) and
the share of keys recalled whole. `NAME=VALUE` are fields of TitansConfig. How layers start was
chosen with it; see docs/log.md.
"""

import argparse
import json
import time

import numpy as np
import torch
import torch.nn.functional as F

from pytitans import TitansConfig, TitansForCausalLM

NOISE = (
    b"The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)
QUESTION = b" What is the pass key? The pass key is "
DIGITS = 5
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


def passkeys(rng: np.random.Generator, count: int, length: int) -> torch.Tensor:
    """[count, length] bytes: noise, the key at a random place, noise, the question, the key."""
    rows = []
    for _ in range(count):
        key = b"%0*d" % (DIGITS, rng.integers(10**DIGITS))
        told = b"The pass key is " + key + b". Remember it. "
        room = length - len(told) - len(QUESTION) - DIGITS
        if room < 0:
            raise ValueError(
                f"length={length} is too short: the question alone takes {length - room}"
            )
        shift, place = rng.integers(len(NOISE)), rng.integers(room + 1)
        noise = (NOISE * (room // len(NOISE) + 2))[shift : shift + room]
        rows.append(noise[:place] + told + noise[place:] + QUESTION + key)
    return torch.from_numpy(np.array([np.frombuffer(row, np.uint8) for row in rows])).long()


@torch.no_grad()
def recalled(model: TitansForCausalLM, ids: torch.Tensor, piece: int = 4096) -> float:
    """The share of rows whose digits are all the most likely ones."""
    cache = None
    for part in ids[:, :-1].split(piece, dim=1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
    guesses = out.logits[:, -DIGITS:].argmax(-1)
    return (guesses == ids[:, -DIGITS:]).all(1).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("fields", nargs="*", metavar="NAME=VALUE", help="fields of TitansConfig")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test", type=int, nargs="*", default=[256, 1024, 4096])
    args = parser.parse_args()
    changes = dict(field.split("=", 1) for field in args.fields)
    changes = {k: v if k == "variant" else json.loads(v) for k, v in changes.items()}

    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    model = TitansForCausalLM(TitansConfig(**{**SMALL, **changes})).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, args.steps, pct_start=min(0.5, 50 / args.steps)
    )
    began, losses = time.perf_counter(), []
    for step in range(args.steps):
        length = args.length if rng.random() < 0.5 else int(rng.integers(128, args.length + 1))
        ids = passkeys(rng, args.batch, length)
        logits = model(ids, use_cache=False).logits
        each = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        on_digits = each[:, -DIGITS:].mean()
        (on_digits + 0.1 * each[:, :-DIGITS].mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(on_digits.item())
        if (step + 1) % 50 == 0:
            mean, spent = np.mean(losses[-25:]), time.perf_counter() - began
            print(f"step {step + 1}: loss on digits {mean:.3f}, {spent:.0f} s", flush=True)
    model.eval()
    test = np.random.default_rng(args.seed + 1)
    shares = {n: recalled(model, passkeys(test, 16, n)) for n in args.test}
    print("recalled:", ", ".join(f"{n:,} bytes {share:.0%}" for n, share in shares.items()))


if __name__ == "__main__":
    main()
