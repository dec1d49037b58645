"""A memory that listens to a sensor: any vectors instead of tokens, by `inputs_embeds`.

    python examples/sensor_stream.py            under a minute on one free core

Synthetic EEG: eight channels of alpha waves (10 Hz at 250 samples a second), each with a phase of
its own, under noise. Early on there is one event of 64 ms, one of four kinds that differ in the
channels that spike. Nothing tells of it afterwards, until a marker asks which it was.

Sixteen samples of all channels are a token. A `TitansModel` of two layers learns from recordings of
half a second to two seconds to answer at the marker. Then it listens to longer ones as they come,
in pieces: state in, state out, of a size that does not grow. It listens in float64: a trained
memory is a dynamical system, and rounding, which pieces change, grows over a long signal; this one
was trained so shortly that after half a minute (--seconds 30) some answers differ by the pieces.
"""

import argparse
import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytitans import TitansCache, TitansConfig, TitansModel

CHANNELS, KINDS, RATE, PATCH = 8, 4, 250, 16
EVENT = 3.0  # its height over the waves, whose amplitude is 1
NOISE = 0.3


class Listener(nn.Module):
    """Samples [B, T, channels] -> after each patch, which event there has been [B, T / 16, kinds].

    >>> answers, cache = listener(samples)
    >>> answers, cache = listener(more_samples, cache)  # goes on
    """

    def __init__(self, width: int = 32):
        super().__init__()
        self.embed = nn.Linear(CHANNELS * PATCH, width)
        self.model = TitansModel(
            TitansConfig(
                variant="lmm", vocab_size=1, hidden_size=width, num_hidden_layers=2,
                num_attention_heads=2, intermediate_size=2 * width, chunk_size=8,
                initializer_range=0.06, bos_token_id=None, eos_token_id=None, pad_token_id=None,
            )
        )  # fmt: skip
        self.head = nn.Linear(width, KINDS)

    def forward(self, samples: Tensor, cache: TitansCache | None = None):
        patches = samples.unflatten(1, (-1, PATCH)).flatten(2)
        out = self.model(
            inputs_embeds=self.embed(patches), cache=cache, use_cache=not self.training
        )
        return self.head(out.last_hidden_state), out.cache


def recordings(count: int, patches: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Samples [count, 16 patches, channels] and the kinds of their events [count]. The event is in
    one of the first patches, the marker, all channels up, in the last."""
    t = torch.arange(patches * PATCH) / RATE
    phase = 2 * math.pi * torch.rand(count, 1, CHANNELS, generator=generator)
    waves = torch.sin(2 * math.pi * 10 * t[None, :, None] + phase)
    samples = waves + NOISE * torch.randn(waves.shape, generator=generator)
    kinds = torch.randint(KINDS, (count,), generator=generator)
    begins = PATCH * torch.randint(4, (count,), generator=generator)
    spike = EVENT * torch.hann_window(PATCH)
    for row, (kind, begin) in enumerate(zip(kinds.tolist(), begins.tolist(), strict=True)):
        samples[row, begin : begin + PATCH, 2 * kind : 2 * kind + 2] += spike[:, None]
    samples[:, -PATCH:] += EVENT
    return samples, kinds


def train(listener: Listener, steps: int, generator: torch.Generator) -> None:
    optimizer = torch.optim.AdamW(listener.parameters(), lr=3e-3, weight_decay=0.01)
    for step in range(1, steps + 1):
        patches = int(torch.randint(8, 33, (1,), generator=generator))
        samples, kinds = recordings(32, patches, generator)
        loss = F.cross_entropy(listener(samples)[0][:, -1], kinds)
        loss.backward()
        nn.utils.clip_grad_norm_(listener.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, steps // 5) == 0:
            print(f"step {step:4}: loss {loss.item():.3f} (chance {math.log(KINDS):.3f})")


@torch.no_grad()
def listen(listener: Listener, samples: Tensor, piece: int) -> tuple[Tensor, TitansCache]:
    """The last answer [B, kinds] to samples that come `piece` patches at a time."""
    cache = None
    for part in samples.split(piece * PATCH, dim=1):
        answers, cache = listener(part, cache)
    return answers[:, -1], cache


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--steps", type=int, default=300, help="of training (%(default)s)")
    p.add_argument("--seconds", type=float, nargs="*", default=[1, 2, 4, 8],
        help="lengths of the recordings to listen to")  # fmt: skip
    p.add_argument("--count", type=int, default=32, help="recordings of each (%(default)s)")
    args = p.parse_args()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    listener, began = Listener(), time.perf_counter()
    train(listener, args.steps, generator)
    print(f"trained in {time.perf_counter() - began:.0f} s on up to 2 s of signal")
    listener.eval().double()
    print("signal   event recalled   state     pieces against one call")
    for seconds in args.seconds:
        patches = max(8, round(seconds * RATE / PATCH))
        samples, kinds = recordings(args.count, patches, generator)
        samples = samples.double()
        answer, cache = listen(listener, samples, piece=5)
        with torch.no_grad():
            whole = listener(samples)[0][:, -1]
        right = (answer.argmax(-1) == kinds).float().mean().item()
        apart = (answer - whole).abs().max().item()
        size = cache.nbytes / args.count / 1024
        print(f"{seconds:5g} s   {right:14.0%}   {size:3.0f} KB    differ by {apart:.0e}")


if __name__ == "__main__":
    main()
