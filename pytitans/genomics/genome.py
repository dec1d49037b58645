"""Bits per base over the position in a genome, read as one stream through one memory.

Every base is predicted from all before it; a base that is not known (N) is read and not scored.
Beside the model: tables of counts that learn as they read (`pytitans.genomics.counts`), and the 2
bits of a base that is drawn. A model whose state grows with the text (full attention) reads in
windows, each begun half a window after the one before, and scored in its new half.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from pytitans.data.dna import EOS_ID, fasta_lengths, read_fasta, stored_bases
from pytitans.evals.positions import nll_of, window_nll
from pytitans.evals.streaming import PIECE, Stream, context_limit
from pytitans.evaluate import scoring
from pytitans.genomics.counts import BASES, ContextMixture
from pytitans.genomics.train import DEV, TRAIN
from pytitans.report import new_axes

BINS = 200
Read = Iterator[tuple[np.ndarray, np.ndarray]]


def genome_bits(
    model: PreTrainedModel,
    files: Sequence[str],
    *,
    window: int | None = None,
    piece: int = PIECE,
    orders: Sequence[int] = (),
    seen: bool = False,
    bf16: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Bits per base of the model, and of the orders and their mixture, in 200 bins of position and
    in parts: with `seen` (these files were trained on) the training part, the dev part and the test
    part that training never saw; else the whole.

    window: of a model that cannot carry all it has read.
    """
    tokens = sum(1 + length for path in files for length in fasta_lengths(path).values())
    width = math.ceil(tokens / BINS)
    mixture = ContextMixture(orders) if orders else None
    names = ["model", *(mixture.names if mixture else [])]
    borders = {"train": TRAIN, "dev": TRAIN + DEV, "test": 1.0} if seen else {"whole": 1.0}
    ends = [round(share * tokens) for share in borders.values()]
    bins, parts = Sums(names, BINS), Sums(names, len(ends))
    windowed = context_limit(model) is not None
    if windowed and window is None:
        raise ValueError(f"a {model.config.model_type} cannot carry a genome: give a --window")
    place = 0
    bar = tqdm(total=tokens, unit="base", unit_scale=True, disable=None if progress else True)
    with scoring(model, bf16), bar:
        read = in_windows(model, files, window) if windowed else in_stream(model, files, piece)
        for ids, nats in read:
            bits = [nats / math.log(2)]
            if mixture:
                bits += list(mixture.bits(ids))
            at = np.arange(place, place + len(ids))
            known = ids < BASES
            bins.add(at[known] // width, [x[known] for x in bits])
            parts.add(np.searchsorted(ends, at[known], side="right"), [x[known] for x in bits])
            place += len(ids)
            bar.update(len(ids))
            bar.set_postfix_str(f"{parts.mean('model'):.3f} bits/base", refresh=False)
    return {
        "bases": int(bins.counts.sum()),
        "window": window if windowed else None,
        "parts": {name: parts.row(i) for i, name in enumerate(borders)},
        "bins": [{"first": i * width} | bins.row(i) for i in range(BINS) if bins.counts[i]],
    }


def in_stream(model: PreTrainedModel, files: Sequence[str], piece: int) -> Read:
    """Tokens, eos before each record, and the nats that each costs after all before. The first eos
    is given."""
    stream, last = Stream(model), None
    for path in files:
        for block in read_fasta(path, piece):
            ids = np.insert(block.ids, 0, EOS_ID) if block.start == 0 else block.ids
            known = ids if last is None else np.concatenate([[last], ids])
            tokens = torch.from_numpy(known.astype(np.int64))
            nats = np.zeros(0)
            if len(tokens) > 1:
                logits = stream.read(tokens[None, :-1].to(model.device))[0]
                nats = nll_of(logits, tokens[1:]).double().numpy()
            yield ids, np.concatenate([np.zeros(len(ids) - len(nats)), nats])
            last = ids[-1]


def in_windows(model: PreTrainedModel, files: Sequence[str], window: int | None) -> Read:
    streams = [ids for path in files for ids in stored_bases(path)]
    tokens = torch.from_numpy(np.concatenate(streams).astype(np.int64))
    yield tokens[:1].numpy().astype(np.uint8), np.zeros(1)
    done = 1
    for nats in window_nll(model, tokens, window or 2):
        yield tokens[done : done + len(nats)].numpy().astype(np.uint8), nats.double().numpy()
        done += len(nats)


class Sums:
    """Bits summed by place, for each of the names."""

    def __init__(self, names: Sequence[str], places: int):
        self.names = list(names)
        self.counts = np.zeros(places)
        self.bits = np.zeros((len(self.names), places))

    def add(self, at: np.ndarray, bits: Sequence[np.ndarray]) -> None:
        size = len(self.counts)
        self.counts += np.bincount(at, minlength=size)
        for row, values in zip(self.bits, bits, strict=True):
            row += np.bincount(at, weights=values, minlength=size)

    def mean(self, name: str) -> float:
        return float(self.bits[self.names.index(name)].sum() / max(1, self.counts.sum()))

    def row(self, place: int) -> dict[str, Any]:
        count = self.counts[place]
        means = zip(self.names, self.bits[:, place] / max(1, count), strict=True)
        return {"bases": int(count)} | {name: round(float(x), 5) for name, x in means}


def genome_table(found: dict[str, Any]) -> str:
    """Bits per base: a row for each model and order, a column for each part."""
    parts = found["parts"]
    names = [name for name in next(iter(parts.values())) if name != "bases"]
    lines = ["| bits per base | " + " | ".join(parts) + " |", "|---" * (len(parts) + 1) + "|"]
    lines += [
        f"| {name} | " + " | ".join(f"{part[name]:.4f}" for part in parts.values()) + " |"
        for name in names
    ]
    lines.append("| a base drawn at random |" + " 2.0000 |" * len(parts))
    lines.append("| bases | " + " | ".join(f"{part['bases']:,}" for part in parts.values()) + " |")
    return "\n".join(lines)


def plot_genome(found: dict[str, Any], path: str | Path) -> None:
    """Bits per base over position; what was held out of training is shaded."""
    figure, axes = new_axes(9, 4.2, xlabel="position, million bases", ylabel="bits per base")
    places = [row["first"] / 1e6 for row in found["bins"]]
    end = places[-1] + (places[1] - places[0] if len(places) > 1 else 0)
    names = [name for name in found["bins"][0] if name not in ("first", "bases")]
    means = {name: np.mean([row[name] for row in found["bins"]]) for name in names}
    orders = sorted((x for x in names if x.startswith("order")), key=lambda x: means[x])
    shown = ["model", *(["mixture"] if "mixture" in names else []), *orders[:1]]
    for name, colour in zip(shown, ("#2b6cb0", "#c05621", "#718096"), strict=False):
        label = {"mixture": "mixture of orders"}.get(name, name)
        axes.step(places, [row[name] for row in found["bins"]], color=colour, label=label, lw=1)
    axes.axhline(2, color="#cbd5e0", lw=1)
    axes.text(0, 2, "a base drawn at random", va="bottom", fontsize=8, color="#718096")
    if "train" in found["parts"]:
        axes.axvspan(TRAIN * end, end, color="#edf2f7", zorder=0)
        axes.text(TRAIN * end, axes.get_ylim()[0], " held out", va="bottom", fontsize=8)
    axes.legend()
    figure.savefig(path, dpi=120)
