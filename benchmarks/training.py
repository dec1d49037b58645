"""How fast do whole models train and decode, against Transformers, Mamba2 and titans-pytorch?

    python benchmarks/training.py                     # the table of docs/performance.md
    python benchmarks/training.py --quick             # the same table on short texts
    python benchmarks/training.py --lengths 2048 --chunk 16 --json runs/training.json
    python benchmarks/training.py --device cuda --lengths 2048 8192 32768 131072

Correctness comes first: unless a small model reads a text in pieces as in one call, and its logits
and gradients equal those of the memory's definition, nothing is reported. Models take turns, round
by round, in one process; the table holds medians. All have the parameters of the Titans model:

    llama           Hugging Face's, SDPA, full attention; and so the other names of
                    `pytitans/baseline.py`
    mamba2_hf       Hugging Face's in plain torch, in the chunks that suit it
    titans-pytorch  its MemoryAsContextTransformer with our memory's shape, else as it comes, which
                    is one gradient for each segment; at the first length alone, if it is installed

train: tokens/s of forward, backward and AdamW, under autocast in --dtype; a step has --batch rows
of the first length, and as many tokens at the others while that is a row or more. MB: what a step
needs at its peak beyond weights and optimizer, in a process of its own. decode: tokens/s one by one
after a text of that length, greedy, one row, weights in --dtype. MB: the cache. "pytitans is": the
first row's tokens/s over this row's.
"""

import os
import sys

if __name__ == "__main__":  # the folder above: here operator.py hides the standard library's
    sys.path[0] = os.path.dirname(sys.path[0])

import argparse
import json
import math
import statistics
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from unittest.mock import patch

import torch
from rich.table import Table
from torch import Tensor, nn
from transformers import Mamba2ForCausalLM, PreTrainedModel
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from benchmarks import common
from pytitans.baseline import BASELINES, build_baseline
from pytitans.cache import TitansCache
from pytitans.evals.streaming import Stream
from pytitans.models import TitansConfig, TitansForCausalLM
from pytitans.ops import neural_memory
from pytitans.presets import count_parameters

OTHERS = "titans-pytorch"
PEERS = ("llama", "mamba2_hf", OTHERS)
SLOW_TO_DECODE = ("mamba2_hf", OTHERS)
SPARE = 0.8  # of the memory free at the start: what a model may use before it "does not fit"


def main() -> None:
    args = arguments()
    common.begin(args)
    if args.only:
        name, length = args.only
        print(json.dumps(peak_memory(args, models(args)[name](), int(length))))
        return
    if wrong := differences(args):
        sys.exit(f"not measured: the model differs from its definition: {wrong}")
    report = benchmark(args)
    show(report)
    common.write(args.json, report)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    p = common.parser(__doc__)
    p.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    p.add_argument("--quick", action="store_true", help="512 and 1024 tokens, 2 rounds")
    p.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768], metavar="TOKENS")
    p.add_argument("--batch", type=int, default=2, help="rows of a step at the first length")
    p.add_argument("--chunk", type=int, nargs="+", default=[64, 16], metavar="TOKENS",
                   help="of the memory, a row of the table each (default: 64 16)")  # fmt: skip
    p.add_argument("--variant", default="mac", choices=["mac", "mag", "mal", "lmm"])
    p.add_argument("--width", type=int, default=256, help="hidden size")
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--heads", type=int, default=4)
    p.add_argument("--segment", type=int, default=128, help="MAC's segment, MAG's and MAL's window")
    p.add_argument("--peers", nargs="*", default=PEERS, choices=(*BASELINES, OTHERS),
                   help=f"default: {' '.join(PEERS)}", metavar="NAME")  # fmt: skip
    p.add_argument("--decode", type=int, default=32, metavar="TOKENS", help="of a round (0: none)")
    args = p.parse_args(argv)
    if args.quick:
        args.lengths, args.rounds, args.decode = [512, 1024], 2, 8
    return args


# Correctness


def differences(args) -> str:
    """Where a small model departs from its definition or from itself; empty if nowhere."""
    small = titans_config(args, 7, hidden_size=32, num_attention_heads=2, num_hidden_layers=2,
                          intermediate_size=32, segment_len=12, window=12)  # fmt: skip
    model = TitansForCausalLM(small).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    ids = torch.randint(256, (2, 50))
    definition = partial(neural_memory, backend="naive")
    with patch("pytitans.memory.neural_memory", definition):
        exact = logits_and_gradients(model, ids)
    apart = {
        "the memory's path": (logits_and_gradients(model, ids), exact, 1e-9),
        "a text in pieces": ([in_pieces(model, ids, [0, 1, 5, 17, 31, 50])], exact[:1], 1e-9),
        "float32": (logits_and_gradients(model.float(), ids), exact, 1e-3),
    }
    found = []
    for name, (got, expected, allowed) in apart.items():
        worst = max(relative(a, b) for a, b in zip(got, expected, strict=True))
        if not worst < allowed:
            found.append(f"{name} by {worst:.1e}")
    return ", ".join(found)


def logits_and_gradients(model, ids: Tensor) -> list[Tensor]:
    model.zero_grad()
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    grads = (p.grad for p in model.parameters() if p.grad is not None)
    return [out.logits.detach(), torch.cat([g.flatten() for g in grads])]


@torch.no_grad()
def in_pieces(model, ids: Tensor, cuts: list[int]) -> Tensor:
    cache, logits = None, []
    for begin, end in pairwise(cuts):
        out = model(input_ids=ids[:, begin:end], cache=cache, use_cache=True)
        cache = out.cache
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


# Models of equal size


def titans_config(args, chunk: int, **changes) -> TitansConfig:
    shape = {
        "hidden_size": args.width, "num_hidden_layers": args.layers, "window": args.segment,
        "num_attention_heads": args.heads, "intermediate_size": 2 * args.width,
        "segment_len": args.segment,
    }  # fmt: skip
    return TitansConfig(variant=args.variant, chunk_size=chunk, **shape | changes)


def models(args) -> dict[str, Callable[[], nn.Module]]:
    """Makers of the models by name, the Titans ones first."""
    like = titans_config(args, args.chunk[0])
    makers: dict[str, Callable[[], nn.Module]] = {
        f"pytitans {args.variant}, chunk {chunk}": partial(
            TitansForCausalLM, titans_config(args, chunk)
        )
        for chunk in args.chunk
    }
    for name in args.peers:
        if name != OTHERS:
            makers[name] = partial(build_baseline, like, name)
        elif find_spec("titans_pytorch"):
            makers[name] = partial(titans_pytorch, like)
    return {name: lambda make=make: make().to(args.device) for name, make in makers.items()}


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def titans_pytorch(like: TitansConfig) -> nn.Module:
    from titans_pytorch import MemoryAsContextTransformer  # pyright: ignore

    heads, hundredths = like.num_attention_heads, 0.01
    head = like.hidden_size // heads

    def build(ff_mult: int) -> nn.Module:
        return MemoryAsContextTransformer(
            num_tokens=like.vocab_size, dim=like.hidden_size, depth=like.num_hidden_layers,
            heads=heads, dim_head=head, segment_len=like.segment_len,
            num_persist_mem_tokens=like.num_persistent, ff_mult=ff_mult * hundredths,
            neural_memory_kwargs={"dim_head": head, "heads": heads},
        )  # fmt: skip

    with torch.device("meta"):  # its size is linear in ff_mult
        few, many = count(build(100)), count(build(200))
    model = build(max(1, 100 + round((count_parameters(like) - few) * 100 / (many - few))))
    for p in model.parameters():  # some are views that repeat one head's, which AdamW refuses
        p.data = p.data.clone(memory_format=torch.contiguous_format)
    return model


# What is measured: a closure for each model


def training_step(args, model: nn.Module, length: int) -> tuple[int, Callable[[], None]]:
    """Tokens of a step, and the step."""
    rows = max(1, args.batch * args.lengths[0] // length)
    ids = torch.randint(256, (rows, length), device=args.device)
    if isinstance(model, Mamba2ForCausalLM):
        suit_chunks(model, length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            if isinstance(model, PreTrainedModel):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            else:
                loss = model(torch.cat([ids, ids[:, :1]], dim=1), return_loss=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return rows * length, step


def suit_chunks(model: Mamba2ForCausalLM, length: int) -> None:
    """The chunk at which plain torch makes the fewest elements: tokens by chunk by state within
    chunks, chunks by chunks by states between them. It does not change the result."""
    exponent = math.log2(2 * length * model.config.head_dim) / 3
    for part in model.modules():
        if isinstance(part, Mamba2Mixer):
            part.chunk_size = 2 ** round(exponent)


class Decoder:
    """A model with a text behind it, which goes on one token at a time."""

    def __init__(self, stream: Stream, tokens: int):
        self.stream, self.tokens = stream, tokens
        self.token = torch.zeros(1, 1, dtype=torch.long, device=stream.model.device)

    @torch.no_grad()
    def step(self) -> None:
        for _ in range(self.tokens):
            self.token = self.stream.read(self.token).argmax(-1)

    def cache_mb(self) -> float:
        cache = self.stream.cache
        if isinstance(cache, TitansCache):
            return cache.nbytes / 2**20
        held = [x for layer in cache.layers for x in (layer.keys, layer.values)]
        return sum(x.numel() * x.itemsize for x in held) / 2**20


@torch.no_grad()
def decoder(args, model, length: int) -> Decoder:
    stream = Stream(model.to(getattr(torch, args.dtype)).eval())
    stream.skip(torch.randint(256, (1, length), device=args.device))
    return Decoder(stream, args.decode)


def benchmark(args) -> dict:
    rows = []
    for i, length in enumerate(args.lengths):
        makers = models(args)
        if i:
            makers.pop(OTHERS, None)
        print(f"training at {length:,} tokens", file=sys.stderr)
        rows += train_rows(args, makers, length)
        if args.decode:
            print(f"decoding after {length:,} tokens", file=sys.stderr)
            decoding = {x: make for x, make in makers.items() if x not in SLOW_TO_DECODE}
            rows += decode_rows(args, decoding, length)
    return {
        "shape": common.shape(args),
        "machine": common.machine(args.device),
        "rows": rows,
        "summary": summary(rows),
    }


def train_rows(args, makers, length: int) -> list[dict]:
    memory = {name: common.in_its_own_process(__file__, [name, str(length)]) for name in makers}
    fits = {name: makers[name]() for name in makers if memory[name] is not None}
    steps = {name: training_step(args, model, length) for name, model in fits.items()}
    times = common.take_turns(
        {name: step for name, (_, step) in steps.items()}, args.rounds, args.device
    )
    return [
        row("train", length, name, count(fits[name]), steps[name][0], times[name], memory[name])
        if name in fits
        else {"what": "train", "length": length, "model": name, "note": "does not fit"}
        for name in makers
    ]


def decode_rows(args, makers, length: int) -> list[dict]:
    decoders = {name: decoder(args, make(), length) for name, make in makers.items()}
    times = common.take_turns(
        {name: d.step for name, d in decoders.items()}, args.rounds, args.device
    )
    return [
        row("decode", length, name, count(d.stream.model), d.tokens, times[name], d.cache_mb())
        for name, d in decoders.items()
    ]


def row(what, length, name, parameters, tokens, times, memory_mb) -> dict:
    median = statistics.median(times)
    return {
        "what": what, "length": length, "model": name, "parameters": parameters, "tokens": tokens,
        "seconds": median, "spread": [min(times), max(times)], "tokens_per_s": tokens / median,
        "memory_mb": memory_mb,
    }  # fmt: skip


def peak_memory(args, model: nn.Module, length: int) -> float | None:
    """MB a training step needs beyond the weights and what a short step leaves behind."""
    short = argparse.Namespace(**vars(args) | {"batch": 1, "lengths": [args.segment]})
    training_step(short, model, args.segment)[1]()
    _, step = training_step(args, model, length)
    if args.device == "cpu":
        spare_the_machine()
    try:
        return common.peak_mb(step, args.device)
    except torch.cuda.OutOfMemoryError:
        return None
    except RuntimeError as error:
        if any(x in str(error) for x in ("alloc", "could not create a primitive")):  # oneDNN's
            return None
        raise


def spare_the_machine() -> None:
    """Lets this process have most of the free memory, so that it fails and nothing else does."""
    import resource

    status_mb = common.status_mb
    limit = status_mb("self/status", "VmSize") + SPARE * status_mb("meminfo", "MemAvailable")
    resource.setrlimit(resource.RLIMIT_AS, (int(limit * 2**20), resource.RLIM_INFINITY))


# What it says


def summary(rows: list[dict]) -> list[str]:
    """From which length on the first Titans model is faster than each peer."""
    said = []
    names = list(dict.fromkeys(r["model"] for r in rows))
    for what in ("train", "decode"):
        for peer in names:
            if peer.startswith("pytitans"):
                continue
            ours, theirs = (
                {r["length"]: r["tokens_per_s"] for r in rows if keep(r, what, name)}
                for name in (names[0], peer)
            )
            lead = {length: ours[length] / theirs[length] for length in ours if length in theirs}
            if lead:
                said.append(f"{what}s faster than {peer} {overtakes(lead)}")
    return said


def keep(row: dict, what: str, name: str) -> bool:
    return row["what"] == what and row["model"] == name and "tokens_per_s" in row


def overtakes(lead: dict[int, float]) -> str:
    """The length at which lead passes 1, between measured ones on a double logarithmic scale."""
    lengths = sorted(lead)
    faster = [length for length in lengths if lead[length] >= 1]
    if not faster:
        return f"at no measured length ({lead[lengths[-1]]:.2f}x at {lengths[-1]:,})"
    if faster == lengths:
        return f"at every measured length ({lead[lengths[0]]:.2f}x at {lengths[0]:,})"
    first = lengths.index(faster[0])
    if lengths[first:] != faster or not first:
        return f"at {', '.join(f'{length:,}' for length in faster)} tokens only"
    a, b = lengths[first - 1 : first + 1]
    share = -math.log(lead[a]) / (math.log(lead[b]) - math.log(lead[a]))
    about = a * (b / a) ** share
    return f"from about {float(f'{about:.2g}'):,.0f} tokens on (interpolated)"


def title_of(shape: dict) -> str:
    return "{layers} layers of {width}, {heads} heads, segment {segment}, {dtype}".format(**shape)


def show(report: dict) -> None:
    table = Table(
        title=title_of(report["shape"]),
        caption=common.caption(report["machine"]),
    )
    for i, head in enumerate(["", "", "parameters", "tokens/s", "pytitans is", "MB"]):
        table.add_column(head, justify="right" if i > 1 else "left")
    last, ours = None, math.nan
    for r in report["rows"]:
        group = (r["what"], r["length"])
        if group != last:
            table.add_section()
            ours, last = r.get("tokens_per_s", math.nan), group
        title = "{what} {length:,}".format(**r)
        if "note" in r:
            table.add_row(title, r["model"], "", r["note"], "", "")
            continue
        table.add_row(
            title, r["model"], f"{r['parameters'] / 1e6:.2f}M", f"{r['tokens_per_s']:,.0f}",
            f"{ours / r['tokens_per_s']:.2f}x", f"{r['memory_mb']:,.1f}",
        )  # fmt: skip
    console = common.console()
    console.print(table)
    for line in report["summary"]:
        console.print(line)


if __name__ == "__main__":
    main()
