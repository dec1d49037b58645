"""Sequences and windows of a genome as batches.

The i-th of them, and its strand, are drawn by (seed, i) alone: models that are compared see the
same, and a run that was stopped goes on with what would have come next.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pytitans.data.dna import EOS_ID, PAD_ID, reverse_complement
from pytitans.data.dna_sets import Labelled
from pytitans.data.windows import DrawnWindows

STRANDS = 2**32  # apart from the draws of windows and orders with the same seed


def other_strand(seed: int, index: int) -> bool:
    """Whether example `index` is read on its other strand: a fair coin."""
    return bool(np.random.Generator(np.random.Philox(key=[STRANDS + seed, index])).random() < 0.5)


class DrawnSequences(Dataset):
    """`count` sequences: every one once, in an order of its own, before any comes again. With
    `augment` one of its two strands, at random."""

    def __init__(self, rows: Labelled, count: int, seed: int, augment: bool):
        self.rows, self.count, self.seed, self.augment = rows, count, seed, augment
        self.epoch, self.order = -1, np.zeros(0, np.int64)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        epoch, place = divmod(index, len(self.rows.labels))
        if epoch != self.epoch:
            draw = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            self.epoch, self.order = epoch, draw.permutation(len(self.rows.labels))
        row = self.order[place]
        ids = self.rows.sequences[row]
        if self.augment and other_strand(self.seed, index):
            ids = reverse_complement(ids)
        return ids, int(self.rows.labels[row])


class OrderedSequences(Dataset):
    """Every sequence; with `both`, all other strands after all first ones."""

    def __init__(self, rows: Labelled, both: bool):
        self.rows, self.both = rows, both

    def __len__(self) -> int:
        return len(self.rows.labels) * (1 + self.both)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        other, row = divmod(index, len(self.rows.labels))
        ids = self.rows.sequences[row]
        return reverse_complement(ids) if other else ids, int(self.rows.labels[row])


def collate(rows: Sequence[tuple[np.ndarray, int]]) -> dict[str, Tensor]:
    """A batch [B, T], padded on the right."""
    longest = max(len(ids) for ids, _ in rows)
    batch = np.full((len(rows), longest), PAD_ID, dtype=np.int64)
    for row, (ids, _) in zip(batch, rows, strict=True):
        row[: len(ids)] = ids
    ids = torch.from_numpy(batch)
    labels = torch.tensor([label for _, label in rows])
    return {"input_ids": ids, "attention_mask": (ids != PAD_ID).long(), "labels": labels}


class Collated(Dataset):
    """Sequences as rows of one length, for `seconds_per_step`, which knows no collator of ours."""

    def __init__(self, drawn: DrawnSequences):
        self.batch = collate([drawn[i] for i in range(len(drawn))])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: value[index % len(value)] for key, value in self.batch.items()}


class DrawnStrands(DrawnWindows):
    """Windows of either strand, at random: the eos before a record stays before its window."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = super().__getitem__(index)
        if other_strand(self.seed, index):
            ids = row["input_ids"].numpy().astype(np.uint8)
            first = int(ids[0] == EOS_ID)
            flipped = np.concatenate([ids[:first], reverse_complement(ids[first:])])
            other = torch.from_numpy(flipped.astype(np.int64))
            return {"input_ids": other, "labels": other}
        return row
