"""A price on open gates: what a memory need not do, it learns not to do at all.

A gate that forgets a ten-thousandth at a token loses nothing that a text of 4,096 tokens would
show, and everything in two million. No loss on short texts says so; a small price on each gate's
logit does, the same wherever the logit is, until the gate is closed with a margin. Where writing or
forgetting lowers the loss, that weighs more. With it, training on 4,096 tokens ends in gates that
are exactly 0 on noise; see docs/log.md.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytitans.memory import FORGET_FLOOR, STEP_FLOOR, NeuralMemory, closing_logit

MARGIN = 1.5  # logits below where a gate closes: a text unlike those of training rarely opens it
CLOSED = {"lr": closing_logit(0.0, STEP_FLOOR), "decay": closing_logit(0.0, FORGET_FLOOR)}


class GatePenalty:
    """How open a model's gates are, of all tokens that it has read in training since last asked.

    >>> penalty = GatePenalty(model)
    >>> (model(**batch).loss + 0.01 * penalty.take()).backward()
    """

    def __init__(self, model: nn.Module):
        self.found: list[Tensor] = []
        for memory in model.modules():
            if isinstance(memory, NeuralMemory):
                memory.to_gates.register_forward_hook(self.note(memory))

    def note(self, memory: NeuralMemory):
        names, heads, depth = memory.gates, memory.num_heads, memory.depth

        def hook(module: nn.Module, args: tuple, logits: Tensor) -> None:
            if module.training and torch.is_grad_enabled() and logits.numel():
                by_name = dict(
                    zip(names, logits.unflatten(-1, (-1, heads, depth)).unbind(-3), strict=True)
                )
                for name in CLOSED.keys() & by_name.keys():
                    above = F.relu(by_name[name] - CLOSED[name] + MARGIN)
                    self.found.append(above.mean())

        return hook

    def take(self) -> Tensor | float:
        """The sum over layers and kinds of gates of the mean logit above closed; then forgets it.
        0 for a model without such gates."""
        total = sum(self.found)
        self.found.clear()
        return total
