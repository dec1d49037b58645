"""Inputs of the operator's tests by name, one call on them, and the comparison the tests share."""

from itertools import pairwise

import torch
import torch.nn.functional as F

from pytitans.ops.naive import MemoryState, naive_memory

GATES = ("lr", "log_momentum", "log_decay")


def make_inputs(
    depth=2, B=2, T=11, H=2, K=4, V=5, hidden=6, per_layer=(), off=(), norm=False, seed=0, lr=0.3
) -> dict[str, torch.Tensor | None]:
    """Random leaves in float64. `per_layer` and `off` name gates; `anchor` is apart from M."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x = {"q": draw(B, T, H, K), "k": F.normalize(draw(B, T, H, K), dim=-1), "v": draw(B, T, H, V)}
    for name in GATES:
        gate = draw(B, T, H, depth) if name in per_layer else draw(B, T, H)
        x[name] = lr * gate.sigmoid() if name == "lr" else F.logsigmoid(gate + 1)
    for name in ("M", "S", "anchor"):
        for i, (a, b) in enumerate(pairwise([K, *[hidden] * (depth - 1), V])):
            x[f"{name}{i}"] = 0.3 * draw(B, H, a, b)  # large weights diverge in a few deep steps
    if norm:
        x["weight"], x["bias"] = 1 + 0.3 * draw(H, V), 0.3 * draw(H, V)
    x.update(dict.fromkeys(off))
    return {name: t if t is None else t.requires_grad_() for name, t in x.items()}


def state_of(inputs, position=0) -> MemoryState:
    """A chunk that is not open begins at M: `anchor` counts only where `position` is not 0."""
    M, S, anchor = (
        tuple(t for name, t in inputs.items() if name.rstrip("0123456789") == part)
        for part in ("M", "S", "anchor")
    )
    return MemoryState(M, S, M if isinstance(position, int) and not position else anchor, position)


def call(op, inputs, *, position=0, **options) -> dict[str, torch.Tensor]:
    """What `op` retrieves, and the state it leaves, by name."""
    tokens = [inputs[name] for name in ("q", "k", "v", *GATES)]
    norm = (inputs["weight"], inputs["bias"]) if "weight" in inputs else None
    retrieved, state = op(*tokens, state_of(inputs, position), norm=norm, **options)
    named = {"retrieved": retrieved, "position": torch.as_tensor(state.position)}
    for part in ("M", "S", "anchor"):
        named |= {f"{part}{i}": t for i, t in enumerate(getattr(state, part))}
    return named


def gradients(outputs, inputs) -> dict[str, torch.Tensor]:
    """The gradient of one fixed random sum of all outputs, in every input."""
    g = torch.Generator().manual_seed(1)
    outputs = [t for name, t in outputs.items() if name != "position"]
    sums = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype) for t in outputs]
    leaves = {name: t for name, t in inputs.items() if t is not None}
    found = torch.autograd.grad(
        outputs, list(leaves.values()), sums, allow_unused=True, materialize_grads=True
    )
    return dict(zip(leaves, found, strict=True))


def assert_is_the_definition(op, inputs, **options):
    """Values, state and every gradient, to PyTorch's own tolerance of float64."""
    want, got = call(naive_memory, inputs, **options), call(op, inputs, **options)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradients(got, inputs), gradients(want, inputs))


def cut(inputs, begin, end) -> dict[str, torch.Tensor | None]:
    """The tokens in [begin, end), and everything that is not a token as it is."""
    tokens = ("q", "k", "v", *GATES)
    return {n: t[:, begin:end] if n in tokens and t is not None else t for n, t in inputs.items()}


def assert_any_cut(op, inputs, cuts, *, position=0, mask=None, **options):
    """Feeding the pieces between `cuts` one after another is feeding the whole."""
    whole = call(op, inputs, position=position, mask=mask, **options)
    norm = (inputs["weight"], inputs["bias"]) if "weight" in inputs else None
    state, parts = state_of(inputs, position), []
    for begin, end in pairwise([0, *cuts, inputs["q"].shape[1]]):
        piece = cut(inputs, begin, end)
        rows = None if mask is None else mask[:, begin:end]
        tokens = [piece[name] for name in ("q", "k", "v", *GATES)]
        out, state = op(*tokens, state, norm=norm, mask=rows, **options)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole["retrieved"])
    for part in ("M", "S", "anchor"):
        for i, t in enumerate(getattr(state, part)):
            torch.testing.assert_close(t, whole[f"{part}{i}"])
    torch.testing.assert_close(torch.as_tensor(state.position), whole["position"])
