"""Packing: documents side by side in one row, each read as if it were alone.

Neither the memory nor the convolution or attention can start anew inside a row, so documents are
spread onto rows of their own, run as a batch of rows of different length, and gathered back.
Documents of about one length go together: what a batch is padded with never exceeds its tokens,
and batches are as few as doublings between the shortest document and the longest.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Documents(NamedTuple):
    """Where documents stand among B * T tokens: the first token's place and the number of each."""

    tokens: Tensor  # [N], places of the tokens that exist, in order
    starts: Tensor  # [n], of each document among `tokens`
    lengths: Tensor  # [n]


def find_documents(
    position_ids: Tensor | None, cu_seq_lens: Tensor | None, mask: Tensor | None, shape: torch.Size
) -> Documents | None:
    """The documents packed into [B, T] tokens; None where no row holds more than one.

    A document begins where `position_ids` [B, T] is 0, or at each entry of `cu_seq_lens` [n + 1],
    as Hugging Face's DataCollatorWithFlattening gives them. Positions that merely run, as
    `generate` passes them, pack nothing; nor do those of padding.
    """
    B, T = shape
    if T < 2 or (position_ids is None and cu_seq_lens is None):
        return None
    if cu_seq_lens is not None:
        begins = begins_at(cu_seq_lens, shape)
    else:
        assert position_ids is not None  # one of the two was given
        if (
            position_ids.ndim != 2
            or position_ids.shape[-1] != T
            or position_ids.shape[0]
            not in (
                1,
                B,
            )
        ):
            raise ValueError(
                f"position_ids {tuple(position_ids.shape)} are not one for each token {(B, T)}"
            )
        begins = (position_ids == 0).expand(B, T)
    real = torch.ones(B, T, dtype=torch.bool, device=begins.device)
    if mask is not None:
        real = mask[:, -T:].bool().to(begins.device)
    first = real & (real.cumsum(1) == 1)
    begins = (begins & real) | first
    if torch.equal(begins, first):
        return None
    tokens = real.flatten().nonzero()[:, 0]
    starts = begins.flatten()[tokens].nonzero()[:, 0]
    lengths = torch.diff(starts, append=starts.new_tensor([len(tokens)]))
    return Documents(tokens, starts, lengths)


def begins_at(cu_seq_lens: Tensor, shape: torch.Size) -> Tensor:
    """[1, T]: where the documents of cumulative lengths begin."""
    B, T = shape
    bounds = cu_seq_lens.long()
    wrong = bounds.ndim != 1 or len(bounds) < 2 or bool((bounds.diff() < 0).any())
    if B != 1 or wrong or bounds[0] != 0 or bounds[-1] != T:
        raise ValueError(
            f"cu_seq_lens_q {cu_seq_lens.tolist()} must rise from 0 to the tokens of one row; "
            f"the input is {(B, T)}: flatten the batch, or give position_ids"
        )
    begins = torch.zeros(1, T, dtype=torch.bool, device=bounds.device)
    begins[0, bounds[:-1][bounds.diff() > 0]] = True
    return begins


def run_packed(
    run: Callable[[Tensor, Tensor], list[Tensor]], x: Tensor, documents: Documents
) -> list[Tensor]:
    """`run` of each document, put back where its tokens stood; tokens that do not exist become 0.

    run: of rows [n, L, D] and their lengths [n], a list of [n, L, D]. x: [B, T, D].
    """
    flat = x.flatten(0, 1)
    places, parts = [], []
    for chosen in like_sized(documents.lengths):
        lengths = documents.lengths[chosen]
        step = torch.arange(int(lengths.max()), device=x.device)
        exists = step < lengths[:, None]
        index = documents.tokens[(documents.starts[chosen, None] + step) * exists]
        parts.append([y[exists] for y in run(flat[index], lengths)])
        places.append(index[exists])
    place = torch.cat(places)
    joined = (torch.cat(ys) for ys in zip(*parts, strict=True))
    return [
        y.new_zeros(flat.shape[0], y.shape[-1]).index_copy(0, place, y).view_as(x) for y in joined
    ]


def like_sized(lengths: Tensor) -> list[Tensor]:
    """Indices in groups, in each of which the longest is less than twice the shortest."""
    doublings = torch.frexp(lengths.double()).exponent
    return [(doublings == e).nonzero()[:, 0] for e in doublings.unique().tolist()]
