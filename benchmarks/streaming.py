"""Does reading cost the same at two million tokens as at a hundred thousand, and decoding too?

    python benchmarks/streaming.py                    # the tables of docs/performance.md
    python benchmarks/streaming.py --quick            # the same tables on a short text
    python benchmarks/streaming.py --variant mag --json runs/streaming.json

Correctness comes first: unless a small model reads a text in pieces as in one call, logits and
state, nothing is reported.

read: what `titans read` does, in a process of its own: Python's standard library, byte by byte,
by an untrained model. Resident memory after --early tokens and at the end; tokens/s
in the first tenth and in the last; all are medians over pieces.

decode: tokens/s one by one, greedy, one row, after a context of each length; Hugging Face's Llama
has the parameters of the Titans model, its feed-forward width fitted. Titans has read its context;
Llama's cache is filled at random, which takes as long to attend to. All take turns, round by round,
in one process; the table holds medians.
"""

import os
import sys

if __name__ == "__main__":  # the folder above: here operator.py hides the standard library's
    sys.path[0] = os.path.dirname(sys.path[0])

import argparse
import json
import statistics
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from benchmarks import common, training
from pytitans.baseline import build_baseline
from pytitans.cache import TitansCache
from pytitans.data.tokenizer import byte_tokenizer
from pytitans.evals.streaming import Stream
from pytitans.models import TitansForCausalLM
from pytitans.read import BLOCK, Block, Reading

TENTH = 10
SAMPLES = 10  # of resident memory, whose median counts: what is freed returns when it likes
EXACT = 1e-9  # what float64 may differ by, relatively


def main() -> None:
    args = arguments()
    common.begin(args)
    if args.only:
        print(json.dumps(read(args)))
        return
    if wrong := differences(args):
        sys.exit(f"not measured: streaming differs from one call: {wrong}")
    report = benchmark(args)
    show(report)
    common.write(args.json, report)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    p = common.parser(__doc__)
    p.set_defaults(rounds=5)
    p.add_argument("--quick", action="store_true", help="60K tokens, contexts of 256 to 4096")
    p.add_argument("--tokens", type=int, default=2_000_000, help="to read (default: %(default)s)")
    p.add_argument("--early", type=int, default=100_000, metavar="TOKENS",
                   help="after which memory is first looked at (default: %(default)s)")  # fmt: skip
    p.add_argument("--contexts", type=int, nargs="+", metavar="TOKENS",
                   default=[1024, 8192, 32768, 100_000],
                   help="to decode after (default: 1024 8192 32768 100000)")  # fmt: skip
    p.add_argument("--llama", type=int, nargs="*", default=[1024, 8192, 32768], metavar="TOKENS",
                   help="contexts of Llama's (default: 1024 8192 32768)")  # fmt: skip
    p.add_argument("--decode", type=int, default=128, metavar="TOKENS",
                   help="of a round: a whole segment (default: %(default)s)")  # fmt: skip
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of weights")
    p.add_argument("--variant", default="mac", choices=["mac", "mag", "mal", "lmm"])
    p.add_argument("--chunk", type=int, default=16, help="of the memory")
    p.add_argument("--width", type=int, default=256, help="hidden size")
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--heads", type=int, default=4)
    p.add_argument("--segment", type=int, default=128, help="MAC's segment, MAG's and MAL's window")
    args = p.parse_args(argv)
    if args.quick:
        args.tokens, args.early, args.rounds, args.decode = 60_000, 20_000, 3, 16
        args.contexts, args.llama = [256, 1024, 4096], [256, 1024, 4096]
    return args


# Correctness


@torch.no_grad()
def differences(args) -> str:
    """Where a small model's logits or state depend on how a text is cut; empty if nowhere."""
    small = training.titans_config(
        args, 7, hidden_size=32, num_attention_heads=2, num_hidden_layers=2,
        intermediate_size=32, segment_len=12, window=12,
    )  # fmt: skip
    model = TitansForCausalLM(small).double().eval()
    for p in model.parameters():
        p.add_(0.1 * torch.randn_like(p))
    ids = torch.randint(256, (2, 60))
    whole, end = in_pieces(model, ids, [60])
    found = []
    for sizes in ([1] * 60, [37, 1, 12, 10], [7, 12, 5, 36]):
        logits, cache = in_pieces(model, ids, sizes)
        worst = training.relative(logits, whole)
        if not worst < EXACT:
            found.append(f"logits by {worst:.1e}")
        pairs = zip(tree_leaves(cache.states), tree_leaves(end.states), strict=True)
        pairs = [(a, b) for a, b in pairs if isinstance(a, Tensor) and a.numel()]
        worst = max((a - b).abs().max().item() for a, b in pairs)
        if not worst < EXACT:
            found.append(f"state by {worst:.1e}")
    return ", ".join(found)


def in_pieces(model, ids: Tensor, sizes: list[int]) -> tuple[Tensor, TitansCache]:
    cache, logits = None, []
    for piece in ids.split(sizes, dim=1):
        out = model(input_ids=piece, cache=cache, use_cache=True)
        cache = out.cache
        logits.append(out.logits)
    return torch.cat(logits, dim=1), cache


def titans(args) -> TitansForCausalLM:
    model = TitansForCausalLM(training.titans_config(args, args.chunk))
    return model.to(args.device, getattr(torch, args.dtype)).eval()


# Reading


def library(tokens: int) -> np.ndarray:
    """Bytes of Python's standard library, from the beginning again where it ends."""
    files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    data = b""
    for path in files:
        data += path.read_bytes()
        if len(data) >= tokens:
            break
    return np.resize(np.frombuffer(data, dtype=np.uint8), tokens)


def read(args) -> dict:
    """What `titans read` does with so many bytes, and what it costs on the way."""
    text = library(args.tokens)
    model = titans(args)
    eos = byte_tokenizer().eos_token_id
    reading = Reading(TitansCache(args.layers), eos, next_token=eos)
    seconds, resident = [], []
    for begin in range(0, args.tokens, BLOCK):
        ids = text[begin : begin + BLOCK]
        started = time.perf_counter()
        reading.feed(model, Block(ids, len(ids), 0))
        seconds.append((time.perf_counter() - started) / len(ids))
        resident.append(common.status_mb("self/status", "VmRSS"))
    part = max(1, len(seconds) // TENTH)
    early = max(1, args.early // BLOCK)
    return {
        "tokens": reading.tokens, "early": args.early,
        "early_mb": statistics.median(resident[early - 1 :][:SAMPLES]),
        "end_mb": statistics.median(resident[-SAMPLES:]),
        "cache_mb": reading.cache.nbytes / 2**20, "bits_per_byte": reading.bits_per_byte,
        "tokens_per_s": 1 / statistics.mean(seconds),
        "first_tenth": 1 / statistics.median(seconds[:part]),
        "last_tenth": 1 / statistics.median(seconds[-part:]),
    }  # fmt: skip


# Decoding


def decoder(args, model, cache):
    """The model with this cache behind it, which goes on one token at a time."""
    stream = Stream(model)
    stream.cache = cache
    return training.Decoder(stream, args.decode)


@torch.no_grad()
def titans_decoders(args) -> dict:
    """One for each context, of one model that reads up to the longest."""
    model = titans(args)
    text = torch.from_numpy(library(max(args.contexts)).astype(np.int64))[None].to(args.device)
    cache, found, begin = TitansCache(args.layers), {}, 0
    for length in sorted(args.contexts):
        for piece in text[:, begin:length].split(BLOCK, dim=1):
            model.model(input_ids=piece, cache=cache)
        found[length], begin = decoder(args, model, cache.fork()), length
    return found


def llama_decoders(args) -> dict:
    dtype, like = getattr(torch, args.dtype), training.titans_config(args, args.chunk)
    model, found = build_baseline(like, "llama").to(args.device, dtype).eval(), {}
    for length in args.llama:
        cache = DynamicCache(config=model.config)
        for layer in range(args.layers):
            shape = (1, args.heads, length, args.width // args.heads)
            keys, values = torch.randn(2, *shape, dtype=dtype, device=args.device)
            cache.update(keys, values, layer)
        found[length] = decoder(args, model, cache)
    return found


def decode(args) -> list[dict]:
    decoders = {(f"pytitans {args.variant}", n): d for n, d in titans_decoders(args).items()}
    decoders |= {("llama", n): d for n, d in llama_decoders(args).items()}
    times = common.take_turns(
        {key: d.step for key, d in decoders.items()}, args.rounds, args.device
    )
    rows = []
    for (name, length), d in sorted(decoders.items(), key=lambda item: item[0][1]):
        spent = times[name, length]
        rows.append({
            "context": length, "model": name, "parameters": training.count(d.stream.model),
            "tokens_per_s": args.decode / statistics.median(spent),
            "spread": [args.decode / max(spent), args.decode / min(spent)],
            "cache_mb": d.cache_mb(),
        })  # fmt: skip
    return rows


# What it says


def benchmark(args) -> dict:
    print(f"reading {args.tokens:,} tokens", file=sys.stderr)
    found = common.in_its_own_process(__file__, ["reading"])
    print("decoding", file=sys.stderr)
    rows = decode(args)
    return {
        "shape": common.shape(args),
        "machine": common.machine(args.device),
        "read": found,
        "decode": rows,
        "summary": summary(found, rows),
    }


def summary(found: dict, rows: list[dict]) -> list[str]:
    grown = found["end_mb"] / found["early_mb"] - 1
    slower = found["last_tenth"] / found["first_tenth"] - 1
    said = [
        f"memory at {found['tokens']:,} tokens against {found['early']:,}: {grown:+.1%}",
        f"tokens/s in the last tenth against the first: {slower:+.1%}",
    ]
    ours = {r["context"]: r["tokens_per_s"] for r in rows if r["model"] != "llama"}
    theirs = {r["context"]: r["tokens_per_s"] for r in rows if r["model"] == "llama"}
    few, many = min(ours), max(ours)
    said.append(f"decoding at {many:,} against {few:,}: {ours[many] / ours[few] - 1:+.1%}")
    both = [n for n in ours if n in theirs]
    ratios = ", ".join(f"{ours[n] / theirs[n]:.2f}x at {n:,}" for n in both)
    return [*said, f"decoding against llama: {ratios}"] if both else said


def show(report: dict) -> None:
    shape, found, console = report["shape"], report["read"], common.console()
    title, caption = training.title_of(shape), common.caption(report["machine"])
    table = Table(title=f"reading, pytitans {shape['variant']}, {title}", caption=caption)
    heads = ["tokens", "MB resident", "tokens/s", "bits/byte", "MB state"]
    for head in heads:
        table.add_column(head, justify="right")
    table.add_row(f"{found['early']:,}", f"{found['early_mb']:,.1f}",
                  f"{found['first_tenth']:,.0f} (first tenth)", "", "")  # fmt: skip
    table.add_row(f"{found['tokens']:,}", f"{found['end_mb']:,.1f}",
                  f"{found['last_tenth']:,.0f} (last tenth)", f"{found['bits_per_byte']:.2f}",
                  f"{found['cache_mb']:,.1f}")  # fmt: skip
    console.print(table)
    table = Table(title=f"decoding, {title}", caption=caption)
    for i, head in enumerate(["context", "model", "parameters", "tokens/s", "spread", "MB cache"]):
        table.add_column(head, justify="left" if i == 1 else "right")
    for r in report["decode"]:
        low, high = r["spread"]
        table.add_row(
            f"{r['context']:,}", r["model"], f"{r['parameters'] / 1e6:.2f}M",
            f"{r['tokens_per_s']:,.0f}", f"{low:,.0f} to {high:,.0f}", f"{r['cache_mb']:,.1f}",
        )  # fmt: skip
    console.print(table)
    for line in report["summary"]:
        console.print(line)


if __name__ == "__main__":
    main()
