"""How fast is the memory operator, against its own matrix products and against titans-pytorch?

    python benchmarks/operator.py                       # the shape of docs/performance.md, minutes
    python benchmarks/operator.py --quick               # the same table on a short text
    python benchmarks/operator.py --tokens 1024 --batch 8 --head-dim 32 --hidden 64 --chunk 16
    python benchmarks/operator.py --dtype bfloat16 --json runs/operator.json

Correctness comes first: unless values and gradients equal the definition's, nothing is reported.
Contestants take turns, round by round, in one process; the table holds medians. Peak memory is each
contestant's own, in a process of its own. "bare matmuls" runs the products of one forward and one
analytic backward, without recomputation, as torch.bmm on ready operands: what the step would cost
if everything but its matrix products were free. titans-pytorch joins if it can be imported.
"""

import sys

sys.path.pop(0)  # this folder: the file's name would hide the standard library's `operator`

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from pytitans.ops import chunk, chunk_fused, initial_state, neural_memory
from pytitans.ops.naive import naive_memory

SHORT = 128  # tokens for titans-pytorch's exact setting, whose memory grows with every token
LONG = 2**20  # tokens of the flat-memory check


def main() -> None:
    args = arguments()
    torch.manual_seed(0)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.only:
        print(json.dumps(peak_memory(args)))
        return
    if wrong := differences(args):
        sys.exit(f"not measured: the operator differs from its definition: {wrong}")
    rows = measure(args, contestants(args))
    for name, row in rows.items():
        row["memory_mb"] = memory_of(name)
    shape = {k: v for k, v in vars(args).items() if k not in ("json", "only")}
    report = {"shape": shape, "machine": machine(args), "rows": rows}
    if not args.quick and not args.no_long:
        report["long"] = memory_of("long")
    show(report)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=2, default=str) + "\n")


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of q, k, v")
    p.add_argument("--quick", action="store_true", help="512 tokens, 3 rounds, no long text")
    p.add_argument("--json", type=Path, metavar="PATH", help="also write the table as JSON")
    p.add_argument("--batch", type=int, default=2)
    p.add_argument("--tokens", type=int, default=4096)
    p.add_argument("--heads", type=int, default=4)
    p.add_argument("--head-dim", type=int, default=64)
    p.add_argument("--hidden", type=int, default=256, help="width inside the memory's MLP")
    p.add_argument("--depth", type=int, default=2, help="layers of the memory")
    p.add_argument("--chunk", type=int, default=64, help="tokens per gradient point")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--threads", type=int, help="torch threads (default: torch's)")
    p.add_argument("--no-peers", action="store_true", help="only pytitans and its matmuls")
    p.add_argument("--no-long", action="store_true", help="skip the text of 2^20 tokens")
    p.add_argument("--only", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.quick:
        args.tokens, args.rounds = min(args.tokens, 512), 3
    return args


def machine(args) -> dict:
    names = [x.split(":")[1].strip() for x in read_lines("/proc/cpuinfo") if "model name" in x]
    cpu = names[0] if names else platform.processor()
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else None
    form = "kernel" if chunk_fused.kernel() else "plain"
    return {
        "cpu": cpu, "gpu": gpu, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "python": platform.python_version(), "form": form,
        "load": Path("/proc/loadavg").read_text().split()[0],
    }  # fmt: skip


def read_lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


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
    tokens = 2 * min(args.chunk, 32) + 1
    small = argparse.Namespace(**vars(args) | {"batch": 1, "chunk": min(args.chunk, 32)})
    inputs, M = make_inputs(small, tokens, torch.float64, torch.float64)
    found = []
    for op in (naive_memory, neural_memory):
        out, state = op(*inputs, initial_state(M), chunk_size=small.chunk)
        results = [out, *state.M, *state.S]
        sums = [torch.ones_like(x) for x in results]
        found.append([*results, *torch.autograd.grad(results, [*inputs, *M], sums)])
    apart = [
        (a - b).abs().max().item() / b.abs().max().clamp_min(1e-300).item()
        for b, a in zip(*found, strict=True)
    ]
    names = ["retrieved", *("M" for _ in M), *("S" for _ in M), *"qkv", "lr", "momentum", "decay"]
    names += ["gradient of M" for _ in M]
    return ", ".join(f"{n} by {x:.1e}" for n, x in zip(names, apart, strict=True) if not x < 1e-9)


# Contestants: (tokens of a step, step(backward))

Contestant = tuple[int, Callable[[bool], None]]


def operator(args, fused: bool) -> Contestant:
    inputs, M = make_inputs(args, args.tokens, getattr(torch, args.dtype))
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


def layer(args) -> Contestant:
    from pytitans.memory import NeuralMemory

    expansion = args.hidden / args.head_dim
    memory = NeuralMemory(
        args.heads * args.head_dim, args.heads, depth=args.depth, expansion=expansion,
        chunk_size=args.chunk,
    )  # fmt: skip
    return module(args, memory, args.tokens)


def titans_pytorch(args, tokens: int, **options) -> Contestant:
    from titans_pytorch import MemoryMLP, NeuralMemory

    mlp = MemoryMLP(args.head_dim, depth=args.depth, expansion_factor=args.hidden / args.head_dim)
    memory = NeuralMemory(
        dim=args.heads * args.head_dim, dim_head=args.head_dim, heads=args.heads, model=mlp,
        **options,
    )  # fmt: skip
    return module(args, memory, tokens)


def module(args, memory, tokens: int) -> Contestant:
    memory = memory.to(args.device)
    x = torch.randn(args.batch, tokens, args.heads * args.head_dim, device=args.device)
    x.requires_grad_()
    learned = [p for p in memory.parameters() if p.requires_grad]

    def step(backward: bool) -> None:
        low = args.dtype == "bfloat16"
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


def bare_matmuls(args) -> Contestant:
    heads, dtype = args.batch * args.heads, getattr(torch, args.dtype)
    forward, backward = (
        [
            tuple(
                torch.randn(heads, *size, device=args.device, dtype=dtype)
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
    found = {
        "bare matmuls": lambda: bare_matmuls(args),
        "pytitans": lambda: operator(args, fused=True),
        "pytitans, plain torch": lambda: operator(args, fused=False),
        "pytitans layer": lambda: layer(args),
    }
    if chunk_fused.kernel() is None or args.device != "cpu":
        del found["pytitans, plain torch"]  # it is what "pytitans" ran
    if args.no_peers or find_spec("titans_pytorch") is None:
        return found
    C = args.chunk
    return found | {
        "titans-pytorch, default": lambda: titans_pytorch(args, args.tokens, chunk_size=C),
        "titans-pytorch, mini-batch": lambda: titans_pytorch(
            args, args.tokens, chunk_size=C, batch_size=C
        ),
        f"titans-pytorch, exact ({SHORT} tokens)": lambda: titans_pytorch(
            args, SHORT, chunk_size=1, batch_size=min(C, SHORT)
        ),
    }


# Measuring


def seconds(step, backward: bool, device: str) -> float:
    begin = time.perf_counter()
    step(backward)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure(args, makers) -> dict[str, dict]:
    ready = {name: make() for name, make in makers.items()}
    times = {(name, backward): [] for name in ready for backward in (False, True)}
    for _ in range(args.rounds + 1):
        for (name, backward), found in times.items():
            found.append(seconds(ready[name][1], backward, args.device))
    rows = {}
    for name, (tokens, _) in ready.items():
        forward, both = (statistics.median(times[name, x][1:]) for x in (False, True))
        rows[name] = {
            "tokens": tokens,
            "forward_s": forward,
            "step_s": both,
            "forward_tokens_per_s": tokens / forward,
            "step_tokens_per_s": tokens / both,
            "step_spread": [min(times[name, True][1:]), max(times[name, True][1:])],
        }
    return rows


def memory_of(name: str) -> dict | float:
    """`peak_memory` of one contestant, in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(f"the memory of {name!r} could not be measured:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def peak_memory(args):
    """MB a forward and backward need beyond the inputs and weights; for "long", see `long_text`."""
    if args.only == "long":
        return long_text(args)
    _, step = contestants(args)[args.only]()
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(True)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = resident_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    step(True)
    return resident_mb("VmHWM") - before


def resident_mb(field: str) -> float:
    status = next(x for x in read_lines("/proc/self/status") if x.startswith(field))
    return int(status.split()[1]) / 1024


@torch.no_grad()
def long_text(args) -> dict:
    """One row read in pieces: tokens/s, and the memory in use after an eighth and after all."""
    args.batch, piece, used = 1, 2**14, []
    inputs, M = make_inputs(args, piece, getattr(torch, args.dtype))
    state, begin = initial_state(tuple(W.detach() for W in M)), time.perf_counter()
    inputs = [x.detach() for x in inputs]
    for _ in range(LONG // piece):
        out, state = neural_memory(*inputs, state, chunk_size=args.chunk)
        used.append(resident_mb("VmRSS"))
    return {
        "tokens": LONG,
        "tokens_per_s": LONG / (time.perf_counter() - begin),
        "memory_mb_after_an_eighth": used[len(used) // 8],
        "memory_mb_at_the_end": used[-1],
        "finite": bool(out.isfinite().all()),
    }


def show(report: dict) -> None:
    shape, rows, about = report["shape"], report["rows"], report["machine"]
    bare, ours = rows["bare matmuls"], rows["pytitans"]
    table = Table(
        title="batch {batch}, {tokens} tokens, {heads} heads of {head_dim}, hidden {hidden}, "
        "depth {depth}, chunk {chunk}, {dtype}".format(**shape),
        caption=f"{about['gpu'] or about['cpu']}, {about['threads']} threads, "
        f"torch {about['torch']}, load {about['load']}",
    )
    heads = ["", "forward tok/s", "fwd+bwd tok/s", "time / bare matmuls", "pytitans is", "peak MB"]
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i else "left")
    for name, row in rows.items():
        over_bare = bare["step_tokens_per_s"] / row["step_tokens_per_s"]
        faster = ours["step_tokens_per_s"] / row["step_tokens_per_s"]
        table.add_row(
            name, f"{row['forward_tokens_per_s']:,.0f}", f"{row['step_tokens_per_s']:,.0f}",
            f"{over_bare:.2f}", f"{faster:.1f}x", f"{row['memory_mb']:,.0f}",
        )  # fmt: skip
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    if long := report.get("long"):
        console.print(
            f"{long['tokens']:,} tokens in pieces: {long['tokens_per_s']:,.0f} tok/s, "
            f"{long['memory_mb_after_an_eighth']:,.0f} MB in use after an eighth, "
            f"{long['memory_mb_at_the_end']:,.0f} MB at the end"
        )


if __name__ == "__main__":
    main()
