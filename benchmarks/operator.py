"""How fast is the memory operator, against its own matrix products and against titans-pytorch?

    python benchmarks/operator.py                       # the shape of docs/performance.md, minutes
    python benchmarks/operator.py --quick               # the same table on a short text
    python benchmarks/operator.py --tokens 1024 --batch 8 --head-dim 32 --hidden 64 --chunk 16
    python benchmarks/operator.py --dtype bfloat16 --json runs/operator.json

Correctness comes first: unless values and gradients equal the definition's in float64, and come as
near to it as the measured dtypes can, nothing is reported. Contestants take turns, round by round,
in one process; the table holds medians. Each runs in float32 and in bfloat16: pytitans on a text in
bfloat16, modules (titans-pytorch's and our layer) under autocast, products on operands in bfloat16.
Peak memory is each contestant's own, in a process of its own. "bare matmuls" runs the products of
one forward and one analytic backward, without recomputation, as torch.bmm on ready operands: what
the step would cost if everything but its matrix products were free. titans-pytorch joins if it can
be imported.
"""

import os
import sys

if __name__ == "__main__":  # the folder above: here operator.py hides the standard library's
    sys.path[0] = os.path.dirname(sys.path[0])

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from itertools import pairwise

import torch
import torch.nn.functional as F
from rich.table import Table

from benchmarks import common
from pytitans.ops import chunk, chunk_fused, initial_state, neural_memory
from pytitans.ops.naive import naive_memory

SHORT = 128  # tokens for titans-pytorch's exact setting, whose memory grows with every token
LONG = 2**20  # tokens of the flat-memory check
DTYPES = {"both": ["float32", "bfloat16"], "float32": ["float32"], "bfloat16": ["bfloat16"]}
NEAR = {"float32": 1e-4, "bfloat16": 2e-2}  # to the definition in float64, by norms


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    common.begin(args)
    if args.only:
        print(json.dumps(peak_memory(args, *args.only)))
        return
    if wrong := differences(args):
        sys.exit(f"not measured: the operator differs from its definition: {wrong}")
    rows = compare(measure(args, contestants(args)))
    for name, row in rows.items():
        row["memory_mb"] = common.in_its_own_process(__file__, [name])
    about = common.machine(args.device)
    report = {"shape": common.shape(args), "machine": about, "rows": rows}
    if not args.quick and not args.no_long:
        report["long"] = common.in_its_own_process(__file__, ["long"])
    show(report)
    common.write(args.json, report)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    p = common.parser(__doc__)
    p.set_defaults(rounds=7)
    p.add_argument("--dtype", default="both", choices=DTYPES, help="default: %(default)s")
    p.add_argument("--quick", action="store_true", help="512 tokens, 3 rounds, no long text")
    p.add_argument("--batch", type=int, default=2)
    p.add_argument("--tokens", type=int, default=4096)
    p.add_argument("--heads", type=int, default=4)
    p.add_argument("--head-dim", type=int, default=64)
    p.add_argument("--hidden", type=int, default=256, help="width inside the memory's MLP")
    p.add_argument("--depth", type=int, default=2, help="layers of the memory")
    p.add_argument("--chunk", type=int, default=64, help="tokens per gradient point")
    p.add_argument("--no-peers", action="store_true", help="only pytitans and its matmuls")
    p.add_argument("--no-long", action="store_true", help="skip the text of 2^20 tokens")
    args = p.parse_args(argv)
    if args.quick:
        args.tokens, args.rounds = min(args.tokens, 512), 3
    return args


# Inputs and correctness


def widths(args) -> list[int]:
    return [args.head_dim, *[args.hidden] * (args.depth - 1), args.head_dim]


def make_inputs(args, tokens: int, dtype, wide=torch.float32):
    """Tokens and memory as a trained layer has them: unit keys, small steps, open gates."""
    B, H, D = args.batch, args.heads, args.head_dim

    def draw(*shape):
        return torch.randn(*shape, device=args.device, dtype=wide)

    q, k = (F.normalize(draw(B, tokens, H, D), dim=-1).to(dtype) for _ in range(2))
    lr = draw(B, tokens, H).sigmoid() / args.chunk
    log_momentum, log_decay = (F.logsigmoid(draw(B, tokens, H) + x) for x in (1, 5))
    inputs = [q, k, draw(B, tokens, H, D).to(dtype), lr, log_momentum, log_decay]
    M = tuple(draw(B, H, a, b) / a**0.5 for a, b in pairwise(widths(args)))
    return [x.requires_grad_() for x in inputs], tuple(W.requires_grad_() for W in M)


def differences(args) -> str:
    """Where the operator departs from its definition at the measured widths; empty if nowhere."""
    chunk_size = min(args.chunk, 32)
    small = argparse.Namespace(**vars(args) | {"batch": 1, "chunk": chunk_size})
    names = ["retrieved", *("M" for _ in range(args.depth)), *("S" for _ in range(args.depth))]
    names += [*"qkv", "lr", "momentum", "decay", *("gradient of M" for _ in range(args.depth))]
    found = []
    for dtype in ("float64", *DTYPES[args.dtype]):
        low = getattr(torch, dtype)
        wide = torch.float64 if dtype == "float64" else torch.float32
        inputs, M = make_inputs(small, 2 * chunk_size + 1, low, wide)
        exact = [[x.detach().double().requires_grad_() for x in part] for part in (inputs, M)]
        want = values_and_gradients(naive_memory, *exact, chunk_size)
        got = values_and_gradients(neural_memory, inputs, M, chunk_size)
        for name, a, b in zip(names, got, want, strict=True):
            apart = ((a.double() - b).norm() / b.norm().clamp_min(1e-300)).item()
            if not apart < NEAR.get(dtype, 1e-9):
                found.append(f"{name} in {dtype} by {apart:.1e}")
    return ", ".join(found)


def values_and_gradients(op, inputs, M, chunk_size: int) -> list[torch.Tensor]:
    out, state = op(*inputs, initial_state(tuple(M)), chunk_size=chunk_size)
    results = [out, *state.M, *state.S]
    sums = [torch.ones_like(x) for x in results]
    return [*results, *torch.autograd.grad(results, [*inputs, *M], sums)]


# Contestants: (tokens of a step, step(backward))

Contestant = tuple[int, Callable[[bool], None]]


def operator(args, dtype: str, fused: bool) -> Contestant:
    inputs, M = make_inputs(args, args.tokens, getattr(torch, dtype))
    weights = torch.randn_like(inputs[2])

    def step(backward: bool) -> None:
        available = chunk.chunk_fused.available
        if not fused:
            chunk.chunk_fused.available = lambda *_: False
        try:
            with torch.set_grad_enabled(backward):
                out, _ = neural_memory(*inputs, initial_state(M), chunk_size=args.chunk)
            if backward:
                torch.autograd.grad(out, [*inputs, *M], weights)
        finally:
            chunk.chunk_fused.available = available

    return args.batch * args.tokens, step


def layer(args, dtype: str) -> Contestant:
    from pytitans.memory import NeuralMemory

    expansion = args.hidden / args.head_dim
    memory = NeuralMemory(
        args.heads * args.head_dim, args.heads, depth=args.depth, expansion=expansion,
        chunk_size=args.chunk,
    )  # fmt: skip
    return module(args, dtype, memory, args.tokens)


def titans_pytorch(args, dtype: str, tokens: int, **options) -> Contestant:
    from titans_pytorch import MemoryMLP, NeuralMemory

    mlp = MemoryMLP(args.head_dim, depth=args.depth, expansion_factor=args.hidden / args.head_dim)
    memory = NeuralMemory(
        dim=args.heads * args.head_dim, dim_head=args.head_dim, heads=args.heads, model=mlp,
        **options,
    )  # fmt: skip
    return module(args, dtype, memory, tokens)


def module(args, dtype: str, memory, tokens: int) -> Contestant:
    memory = memory.to(args.device)
    x = torch.randn(args.batch, tokens, args.heads * args.head_dim, device=args.device)
    x.requires_grad_()
    learned = [p for p in memory.parameters() if p.requires_grad]

    def step(backward: bool) -> None:
        low = dtype == "bfloat16"
        with (
            torch.set_grad_enabled(backward),
            torch.autocast(args.device, torch.bfloat16, enabled=low),
        ):
            out = memory(x)[0]
        if backward:
            torch.autograd.grad(out.float().sum(), [x, *learned], allow_unused=True)

    return args.batch * tokens, step


def products(args) -> tuple[list, list]:
    """(rows, inner, columns) of every matrix product of a chunk: forward, and analytic backward."""
    C, forward, backward = args.chunk, [], []
    for i, (a, b) in enumerate(pairwise(widths(args))):
        through, back, update = (C, a, b), (C, b, a), (a, C, b)
        forward += [through, through, through, (C, a, C), (C, C, b), update, update]
        backward += [back] * 5 + [through] * 2 + [update] * 3
        backward += [(C, b, C), (C, C, b), (C, C, a), (C, C, a)]
        if i:  # the inner backpropagation
            forward.append(back)
            backward += [through, update]
    return forward, backward


def bare_matmuls(args, dtype: str) -> Contestant:
    heads = args.batch * args.heads
    forward, backward = (
        [
            tuple(
                torch.randn(heads, *size, device=args.device, dtype=getattr(torch, dtype))
                for size in ((m, k), (k, n), (m, n))
            )
            for m, k, n in sizes
        ]
        for sizes in products(args)
    )

    @torch.no_grad()
    def step(with_backward: bool) -> None:
        todo = forward + backward if with_backward else forward
        for _ in range(args.tokens // args.chunk):
            for a, b, out in todo:
                torch.bmm(a, b, out=out)

    return args.batch * args.tokens, step


def contestants(args) -> dict[str, Callable[[], Contestant]]:
    """By name and dtype: "pytitans, bfloat16"."""
    C, exact = args.chunk, {"chunk_size": 1, "batch_size": min(args.chunk, SHORT)}
    kinds = {
        "bare matmuls": lambda dtype: bare_matmuls(args, dtype),
        "pytitans": lambda dtype: operator(args, dtype, fused=True),
        "pytitans plain torch": lambda dtype: operator(args, dtype, fused=False),
        "pytitans layer": lambda dtype: layer(args, dtype),
        "titans-pytorch default": lambda dtype: titans_pytorch(
            args, dtype, args.tokens, chunk_size=C
        ),
        "titans-pytorch mini-batch": lambda dtype: titans_pytorch(
            args, dtype, args.tokens, chunk_size=C, batch_size=C
        ),
        "titans-pytorch exact": lambda dtype: titans_pytorch(args, dtype, SHORT, **exact),
    }
    if chunk_fused.kernel() is None or args.device != "cpu":
        del kinds["pytitans plain torch"]  # it is what "pytitans" ran
    if args.no_peers or find_spec("titans_pytorch") is None:
        kinds = {name: make for name, make in kinds.items() if "titans-pytorch" not in name}
    return {
        f"{name}, {dtype}": lambda make=make, dtype=dtype: make(dtype)
        for name, make in kinds.items()
        for dtype in DTYPES[args.dtype]
    }


# Measuring


def measure(args, makers) -> dict[str, dict]:
    ready = {name: make() for name, make in makers.items()}
    steps = {
        (name, backward): partial(ready[name][1], backward)
        for name in ready
        for backward in (False, True)
    }
    times = common.take_turns(steps, args.rounds, args.device)
    rows = {}
    for name, (tokens, _) in ready.items():
        forward, both = (statistics.median(times[name, x]) for x in (False, True))
        rows[name] = {
            "tokens": tokens,
            "forward_s": forward,
            "step_s": both,
            "forward_tokens_per_s": tokens / forward,
            "step_tokens_per_s": tokens / both,
            "step_spread": [min(times[name, True]), max(times[name, True])],
        }
    return rows


def compare(rows: dict[str, dict]) -> dict[str, dict]:
    """Adds to each row its time over its dtype's bare products, and over that of pytitans."""
    for name, row in rows.items():
        dtype = name.rsplit(", ", 1)[1]
        for part in ("forward", "step"):
            rate = row[f"{part}_tokens_per_s"]
            for other, into in (("bare matmuls", "over_bare"), ("pytitans", "over_pytitans")):
                row[f"{part}_{into}"] = rows[f"{other}, {dtype}"][f"{part}_tokens_per_s"] / rate
    return rows


def peak_memory(args, name: str):
    """MB a forward and backward need beyond the inputs and weights; for "long", see `long_text`."""
    if name == "long":
        return long_text(args)
    _, step = contestants(args)[name]()
    return common.peak_mb(partial(step, True), args.device)


@torch.no_grad()
def long_text(args) -> dict:
    """One row read in pieces: tokens/s, and the memory in use after an eighth and after all."""
    args.batch, piece, used = 1, 2**14, []
    inputs, M = make_inputs(args, piece, getattr(torch, DTYPES[args.dtype][-1]))
    state, begin = initial_state(tuple(W.detach() for W in M)), time.perf_counter()
    inputs = [x.detach() for x in inputs]
    for _ in range(LONG // piece):
        out, state = neural_memory(*inputs, state, chunk_size=args.chunk)
        used.append(common.status_mb("self/status", "VmRSS"))
    return {
        "tokens": LONG,
        "tokens_per_s": LONG / (time.perf_counter() - begin),
        "memory_mb_after_an_eighth": used[len(used) // 8],
        "memory_mb_at_the_end": used[-1],
        "finite": bool(out.isfinite().all()),
    }


def show(report: dict) -> None:
    shape, rows = report["shape"], report["rows"]
    table = Table(
        title="batch {batch}, {tokens} tokens, {heads} heads of {head_dim}, hidden {hidden}, "
        "depth {depth}, chunk {chunk}".format(**shape),
        caption=f"{common.caption(report['machine'])}; ratios within a dtype, "
        f"forward | forward and backward; exact: {SHORT} tokens",
    )
    heads = ["", "forward tok/s", "fwd+bwd tok/s", "time / bare", "pytitans is", "peak MB"]
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i else "left")
    for name, row in rows.items():
        over = {
            x: " | ".join(f"{row[f'{part}_over_{x}']:.2f}" for part in ("forward", "step"))
            for x in ("bare", "pytitans")
        }
        table.add_row(
            name, f"{row['forward_tokens_per_s']:,.0f}", f"{row['step_tokens_per_s']:,.0f}",
            over["bare"], over["pytitans"] + "x", f"{row['memory_mb']:,.0f}",
        )  # fmt: skip
    console = common.console()
    console.print(table)
    for line in best_against_best(rows):
        console.print(line)
    if long := report.get("long"):
        console.print(
            f"{long['tokens']:,} tokens in pieces: {long['tokens_per_s']:,.0f} tok/s, "
            f"{long['memory_mb_after_an_eighth']:,.0f} MB in use after an eighth, "
            f"{long['memory_mb_at_the_end']:,.0f} MB at the end"
        )


def best_against_best(rows: dict[str, dict]) -> list[str]:
    """Each in its faster dtype: who has a choice takes it."""

    def fastest(kind: str, part: str) -> tuple[float, str]:
        same = [x for x in rows.items() if x[0].startswith(kind + ", ")]
        return max((row[f"{part}_tokens_per_s"], name.rsplit(", ", 1)[1]) for name, row in same)

    lines = []
    for kind in dict.fromkeys(name.rsplit(", ", 1)[0] for name in rows):
        if not kind.startswith("titans-pytorch"):
            continue
        ratios = []
        for part, title in (("forward", "forward"), ("step", "forward and backward")):
            (ours, a), (theirs, b) = fastest("pytitans", part), fastest(kind, part)
            ratios.append(f"{title} {ours / theirs:.1f}x ({a} over {b})")
        lines.append(f"best against best, {kind}: " + "; ".join(ratios))
    return lines


if __name__ == "__main__":
    main()
