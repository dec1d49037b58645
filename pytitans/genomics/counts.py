"""Order-k context models: what a table of counts makes of a genome, the measure of DNA models.

    P(b | the k bases before) = (n_b + a) / (n + 4 a)

with n_b times that b followed these k before, n in all, counted up to the base before: the table
learns as it reads, on any part of the genome, as a memory does. The pseudo-count `a` is 1, and 1/16
for order 12, of which a bacterial genome has a tenth of the contexts: one that comes again is most
likely a repeat. Both were chosen on E. coli's bases at 80 to 90 %.

`ContextMixture` weighs several orders by how well each has predicted of late: a small version of
what DNA compressors do (GeCo, https://doi.org/10.1093/gigascience/giaa119).
"""

from collections.abc import Sequence

import numpy as np

BASES = 4
ORDERS = (2, 4, 6, 8, 11, 12)
HALF_LIFE = 32  # bases after which a prediction weighs half in a mixture
STEP = 16  # bases that share the mixture's weights


class ContextModel:
    """`probabilities(ids)` of each base, read after all that was given before."""

    def __init__(self, order: int):
        if not 1 <= order <= 12:
            raise ValueError(f"order={order}: 1 to 12, a table of 4^12 contexts is 256 MB")
        self.order = order
        self.pseudo = 1.0 if order < 12 else 1 / 16
        self.counts = np.zeros((BASES**order, BASES), dtype=np.uint32)
        self.tail = np.full(order, BASES, dtype=np.uint8)  # nothing is known before the start

    def probabilities(self, ids: np.ndarray) -> np.ndarray:
        """ids [T] uint8 -> [T] float64; 1/4 where the base or one of its context is none of ACGT,
        which is not counted either."""
        k = self.order
        whole = np.concatenate([self.tail, ids])
        self.tail = whole[-k:]
        contexts, clean = np.zeros(len(ids), dtype=np.int64), ids < BASES
        for back in range(k):
            earlier = whole[back : back + len(ids)]
            clean &= earlier < BASES
            contexts = contexts * BASES + earlier
        result = np.full(len(ids), 1 / BASES)
        c, b = contexts[clean], ids[clean].astype(np.int64)
        seen = self.counts.reshape(-1)[c * BASES + b] + earlier_equals(c * BASES + b)
        times = self.counts[c].sum(1) + earlier_equals(c)
        result[clean] = (seen + self.pseudo) / (times + BASES * self.pseudo)
        np.add.at(self.counts, (c, b), 1)
        return result


def earlier_equals(keys: np.ndarray) -> np.ndarray:
    """For each key, how many of those before it in the array are the same."""
    order = np.argsort(keys, kind="stable")
    ranked = keys[order]
    begins = np.flatnonzero(np.append(True, ranked[1:] != ranked[:-1])[: len(keys)])
    sizes = np.diff(np.append(begins, len(keys)))
    place = np.arange(len(keys)) - np.repeat(begins, sizes)
    result = np.empty(len(keys), dtype=np.int64)
    result[order] = place
    return result


class ContextMixture:
    """Several orders, each weighed by the product of its own late probabilities."""

    def __init__(self, orders: Sequence[int] = ORDERS):
        self.models = [ContextModel(order) for order in orders]
        self.names = [*(f"order {order}" for order in orders), "mixture"]
        self.evidence = np.zeros(len(orders))

    def bits(self, ids: np.ndarray) -> np.ndarray:
        """[orders + 1, T]: bits of each base by each order, and by their mixture."""
        each = np.stack([model.probabilities(ids) for model in self.models])
        logs = np.log(each)
        keep = 0.5 ** (STEP / HALF_LIFE)
        mixed = np.empty(len(ids))
        for start in range(0, len(ids), STEP):
            part = slice(start, start + STEP)
            weights = np.exp(self.evidence - self.evidence.max())
            mixed[part] = weights @ each[:, part] / weights.sum()
            self.evidence = keep * self.evidence + logs[:, part].sum(1)
        return -np.log2(np.vstack([each, mixed]))
