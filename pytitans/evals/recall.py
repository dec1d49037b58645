"""Multi-query associative recall (MQAR): keys with values, then the keys again: what was it?

Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models",
arXiv 2312.04927, appendix; the generator follows their `multiquery_ar`.

    k1 v1 k2 v2 ... kn vn   then, at places drawn by a power law, k3 * * k1 * k2 ...

Keys are of the first half of the vocabulary (0 left out), values of the second, each at most once.
The i-th key comes back 2 g_i tokens after the pairs, its gap g_i drawn without replacement with
p(g) ~ a g^(a-1), a = 0.01: mostly soon. All other tokens are drawn from the whole vocabulary. At
each key that came back the next token should be its value; as in the original, it is not told.

Metric: share of right values. Differences: none but the default number of pairs, length / 16 (at
least 1), which for lengths of 64 to 256 is that of their figure 2 (4 to 16).
"""

import numpy as np

from pytitans.evals.task import Example, Task, check_depth


class Recall(Task):
    """MQAR with `vocab_size` token ids from 0 on and `pairs` keys (None: length / 16)."""

    name = "recall"

    def __init__(self, vocab_size: int = 8192, pairs: int | None = None, power: float = 0.01):
        if vocab_size < 4:
            raise ValueError(f"vocab_size={vocab_size} is too small: 4 or more")
        self.vocab_size, self.pairs, self.power = vocab_size, pairs, power
        self.chance = 1 / (vocab_size - vocab_size // 2)

    def draw(self, rng, index, length, depth) -> Example:
        check_depth(self, depth)
        half = self.vocab_size // 2
        pairs = max(1, min(length // 16, half - 1)) if self.pairs is None else self.pairs
        space = (length - 2 * pairs) // 2  # places where a key can come back
        if space < pairs or pairs > half - 1:
            raise ValueError(
                f"length={length} and vocab_size={self.vocab_size} do not fit pairs={pairs}: "
                f"{4 * pairs} tokens and a vocabulary of {2 * pairs + 2} or more"
            )
        keys = 1 + rng.choice(half - 1, pairs, replace=False)
        values = half + rng.choice(self.vocab_size - half, pairs, replace=False)
        ids = rng.integers(self.vocab_size, size=length)
        ids[: 2 * pairs : 2], ids[1 : 2 * pairs : 2] = keys, values
        places = 2 * pairs + 2 * self.gaps(rng, space, pairs)
        ids[places] = keys
        order = np.argsort(places)
        return Example(ids, places[order], values[order], np.arange(pairs))

    def gaps(self, rng: np.random.Generator, space: int, count: int) -> np.ndarray:
        """`count` of the numbers below `space`, one after another, none twice: the largest of
        log p + Gumbel noise, in order, are such a draw."""
        log_p = (self.power - 1) * np.log(np.arange(1, space + 1))
        noisy = log_p + rng.gumbel(size=space)
        top = np.argpartition(-noisy, count - 1)[:count]
        return top[np.argsort(-noisy[top])]
