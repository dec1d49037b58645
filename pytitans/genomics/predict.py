"""What a trained model makes of sequences: probabilities of classes, embeddings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from pytitans.data.dna import Bases, read_fasta
from pytitans.data.dna_sets import Labelled
from pytitans.evals.streaming import PIECE, Stream
from pytitans.evaluate import scoring
from pytitans.genomics.batches import OrderedSequences, collate
from pytitans.genomics.scores import average_strands
from pytitans.models.sequence_classification import pool


def predict(
    model: PreTrainedModel,
    rows: Labelled,
    *,
    both: bool = False,
    batch_size: int = 128,
    bf16: bool = False,
    progress: bool = True,
) -> np.ndarray:
    """Probabilities of the classes [N, C]; with `both`, means over the two strands. Sequences of
    like length are read together."""
    strands = OrderedSequences(rows, both)
    order = np.argsort([len(strands[i][0]) for i in range(len(strands))], kind="stable")
    found = np.zeros((len(strands), len(model.config.id2label or {})), dtype=np.float32)
    bar = tqdm(total=len(strands), unit="sequence", disable=None if progress else True)
    with scoring(model, bf16), bar:
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            batch = collate([strands[i] for i in places])
            ids, mask = (batch[x].to(model.device) for x in ("input_ids", "attention_mask"))
            logits = model(input_ids=ids, attention_mask=mask).logits
            found[places] = logits.float().softmax(-1).cpu().numpy()
            bar.update(len(places))
    return average_strands(found, both)


def embed_sequences(
    model: PreTrainedModel,
    sequences: Sequence[np.ndarray],
    *,
    pooling: str = "mean",
    batch_size: int = 64,
    progress: bool = True,
) -> np.ndarray:
    """[N, D]: last hidden states, pooled over each sequence."""
    order = np.argsort([len(x) for x in sequences], kind="stable")
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    bar = tqdm(total=len(sequences), unit="sequence", disable=None if progress else True)
    with scoring(model, False), bar:
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            parts.append((places, embed_batch(model, [sequences[i] for i in places], pooling)))
            bar.update(len(places))
    return np.concatenate([x for _, x in parts])[np.concatenate([x for x, _ in parts]).argsort()]


def embed_batch(model: PreTrainedModel, rows: Sequence[np.ndarray], pooling: str) -> np.ndarray:
    batch = collate([(ids, 0) for ids in rows])
    ids, mask = (batch[name].to(model.device) for name in ("input_ids", "attention_mask"))
    hidden = body_of(model)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return pool(hidden.float(), mask, pooling).cpu().numpy()


def body_of(model: PreTrainedModel) -> Any:
    """The model without its head."""
    body = model.base_model
    if body is model:
        raise ValueError(f"a {type(model).__name__} has no hidden states of bases to embed by")
    return body


class RecordStream(Stream):
    """The embedding of a record that is read piece by piece."""

    def __init__(self, model: PreTrainedModel, name: str):
        super().__init__(body_of(model))
        self.name, self.count = name, 0
        self.total: Tensor | float = 0.0
        self.last: Tensor | None = None

    def feed(self, ids: np.ndarray) -> None:
        piece = torch.from_numpy(ids.astype(np.int64))[None].to(self.model.device)
        options = {} if self.cache is None else {self.cache_name: self.cache}
        out = self.model(input_ids=piece, use_cache=True, **options)
        self.cache = out[self.cache_name]
        hidden = out.last_hidden_state[0].double()
        self.total, self.count = self.total + hidden.sum(0), self.count + len(ids)
        self.last = hidden[-1]

    def embedding(self, pooling: str) -> np.ndarray:
        found = self.total / self.count if pooling == "mean" else self.last
        return found.float().cpu().numpy()  # type: ignore - something has been fed


def embed_fasta(
    model: PreTrainedModel,
    path: str | Path,
    *,
    pooling: str = "mean",
    batch_size: int = 64,
    piece: int = PIECE,
    progress: bool = True,
) -> tuple[list[str], np.ndarray]:
    """The records' names, and [N, D]. Records shorter than `piece` bases are read side by side,
    a longer one piece by piece through one memory: its length does not matter."""
    names: list[str] = []
    found: list[np.ndarray] = []
    short: list[Bases] = []
    long: RecordStream | None = None

    def finish() -> None:
        if short:
            names.extend(block.record for block in short)
            found.extend(embed_batch(model, [block.ids for block in short], pooling))
            short.clear()
        if long is not None:
            names.append(long.name)
            found.append(long.embedding(pooling))

    bar = tqdm(unit="base", unit_scale=True, disable=None if progress else True)
    with scoring(model, False), bar:
        for block in read_fasta(path, piece):
            if block.start == 0 and (long is not None or len(block.ids) == piece):
                finish()
                long = None
            if block.start == 0 and len(block.ids) < piece:
                short.append(block)
                if len(short) == batch_size:
                    finish()
            else:
                long = long or RecordStream(model, block.record)
                long.feed(block.ids)
            bar.update(len(block.ids))
        finish()
    return names, np.stack(found)
