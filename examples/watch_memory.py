"""Watch a memory at work: surprise, gates and the memory's size along a text, as a picture.

    python examples/watch_memory.py                       # code, the same again, then noise
    python examples/watch_memory.py book.txt --model runs/mac --layer 1 --out watch.png

The text goes by in pieces of one chunk, so that what a chunk's tokens are measured against, the
memory as it stood when the chunk began, is at hand:

    surprise     |M(k) - v|: how wrong the memory is about each token, before it is written
    gates        step size, momentum, and what is forgotten at each token
    size         |M - M_0|, what has been learned at test time, and |S|, what still moves
"""

import argparse
import inspect
import textwrap

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from small_model import load_or_train

from pytitans import TitansForCausalLM, retrieve
from pytitans.data.tokenizer import load_tokenizer
from pytitans.memory import LayerState, NeuralMemory

PART = 1500  # bytes of each part of the built-in text
SMOOTH = 32  # tokens that a curve is averaged over


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("text", nargs="?", help="a text file (code, the same again, then noise)")
    p.add_argument("--model", default="runs/example", help="of `titans train` (%(default)s)")
    p.add_argument("--layer", type=int, default=0, help="of the model (%(default)s)")
    p.add_argument("--tokens", type=int, default=3 * PART, help="to read (%(default)s)")
    p.add_argument("--out", default="watch_memory.png", help="the picture (%(default)s)")
    args = p.parse_args()
    model, tokenizer = load_or_train(args.model), load_tokenizer(args.model)
    if args.text:
        with open(args.text, encoding="utf-8") as file:
            ids, borders = torch.tensor(tokenizer(file.read()).input_ids[: args.tokens]), []
    else:
        ids, borders = built_in_text(), [PART, 2 * PART]
    draw(watch(model, ids, args.layer), borders, args.out)
    print(f"{len(ids):,} tokens, layer {args.layer}: {args.out}")


def built_in_text() -> torch.Tensor:
    """A passage of code, the same passage again, and random letters."""
    passage = inspect.getsource(textwrap).encode()[:PART]
    noise = torch.randint(ord("a"), ord("z"), (PART,), generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.tensor([*passage, *passage]), noise])


@torch.no_grad()
def watch(model: TitansForCausalLM, ids: torch.Tensor, layer: int) -> dict[str, torch.Tensor]:
    """The curves, one value for each token."""
    memory: NeuralMemory = model.model.layers[layer].block.memory
    write, curves = memory.write, {}

    def watched(x, state=None, lengths=None):
        retrieved, after = write(x, state, lengths)
        if state is not None:  # the persistent tokens come before there is one
            for name, value in look(memory, x, state, after).items():
                curves.setdefault(name, []).append(value)
        return retrieved, after

    memory.write, cache = watched, None
    try:
        for piece in ids.split(memory.chunk_size):
            out = model(input_ids=piece[None], cache=cache, use_cache=True)
            cache = out.cache
    finally:
        del memory.write  # the method is seen again
    return {name: torch.cat(values) for name, values in curves.items()}


def look(memory: NeuralMemory, x, before: LayerState, after: LayerState) -> dict:
    """What there is to see of one chunk x [1, T, dim]; heads and memory layers are averaged."""
    (q, k, v), _ = memory.convolve(memory.qkv(x), before.tail, None)
    known = retrieve(k, before.memory, norm=memory.norm, norm_eps=memory.norm_eps)
    lr, momentum, decay = memory.gate_values(x, q, k, v)
    T = x.shape[1]
    learned = [W - W_0 for W, W_0 in zip(after.memory.M, memory.M_0, strict=True)]
    seen = {
        "surprise": (known - v).norm(dim=-1).mean(-1)[0],
        "step size": lr.mean((-1, -2))[0],
        "|M - M_0|": size(learned).expand(T),
        "|S|": size(after.memory.S).expand(T),
    }
    if momentum is not None:
        seen["momentum"] = momentum.exp().mean((-1, -2))[0]
    if decay is not None:
        seen["forgotten"] = -decay.expm1().mean((-1, -2))[0]
    return seen


def size(weights) -> torch.Tensor:
    return sum(W.square().sum() for W in weights).sqrt()


def smooth(curve: torch.Tensor) -> torch.Tensor:
    """Averaged over SMOOTH tokens; the last ones stand at the end."""
    return curve.unfold(0, min(SMOOTH, len(curve)), 1).mean(-1)


def draw(curves: dict[str, torch.Tensor], borders: list[int], path: str) -> None:
    panels = [
        ("surprise |M(k) - v|", ["surprise"], False),
        ("gates", ["step size", "momentum", "forgotten"], True),
        ("size of the memory", ["|M - M_0|", "|S|"], True),
    ]
    figure, axes = plt.subplots(3, sharex=True, figsize=(10, 8), layout="constrained")
    for axis, (title, names, logarithmic) in zip(axes, panels, strict=True):
        for name in names:
            if name in curves:
                line = smooth(curves[name].float())
                axis.plot(range(len(curves[name]) - len(line), len(curves[name])), line, label=name)
        axis.set_title(title, loc="left")
        if logarithmic:
            axis.set_yscale("log")
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
        axis.grid(alpha=0.3)
        for border in borders:
            axis.axvline(border, color="black", linestyle=":", linewidth=1)
    axes[-1].set_xlabel(f"token (curves are means of {SMOOTH} tokens)")
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
