"""State tracking: after every token, say which state a small machine is in.

Word problems of groups, as in Merrill, Petty and Sabharwal, "The Illusion of State in State-Space
Models", arXiv 2404.08819, and Grazzi et al., "Unlocking State-Tracking in Linear RNNs Through
Negative Eigenvalues", arXiv 2411.12537:

    parity             bits: is the number of ones so far odd?         the group Z_2
    modular_addition   digits 0 to 4: their sum so far, modulo 5       Z_5
    s5                 permutations of 5: what they come to so far     S_5, 120 elements

Token i is the group's element i (0 the identity), drawn uniformly; at token t the next token
should be g_t ... g_2 g_1, the latest applied last. S_5 is not solvable: its word problem is
complete for NC^1, and no Transformer or linear recurrence with diagonal transitions can solve it at
every length with a fixed number of layers (unless TC^0 = NC^1). The answer is asked for, and not
told: it is not in the text.

Metric: `accuracy` is the share of tokens with the right state, `exact` the share of examples with
all of them right. Differences: Grazzi et al. ask for parity and modular arithmetic at the end
alone; here every token is asked, as for S_5 in both. Their modular arithmetic also subtracts and
multiplies.
"""

from itertools import permutations

import numpy as np

from pytitans.evals.task import Example, Task, check_depth

MODULUS = 5


def cyclic(n: int) -> np.ndarray:
    """Z_n: [n, n] with a + b at [b, a]."""
    return np.add.outer(np.arange(n), np.arange(n)) % n


def symmetric(n: int) -> np.ndarray:
    """S_n: [n!, n!] with "a, then b" at [b, a]; elements in lexicographic order, 0 the identity."""
    elements = np.array(list(permutations(range(n))))
    powers = n ** np.arange(n)
    number = np.full(n**n, -1)
    number[elements @ powers] = np.arange(len(elements))
    return number[elements[:, elements] @ powers]  # b[a[i]], for all b and a


GROUPS = {
    "parity": lambda: cyclic(2),
    "modular_addition": lambda: cyclic(MODULUS),
    "s5": lambda: symmetric(5),
}


class StateTracking(Task):
    """The word problem of one of the GROUPS."""

    def __init__(self, name: str):
        self.name, self.table = name, GROUPS[name]()
        self.vocab_size = len(self.table)
        self.chance = 1 / self.vocab_size

    def draw(self, rng, index, length, depth) -> Example:
        check_depth(self, depth)
        ids = rng.integers(self.vocab_size, size=length)
        places = np.arange(length)
        return Example(ids, places, prefix_products(self.table, ids), places)


def prefix_products(table: np.ndarray, elements: np.ndarray) -> np.ndarray:
    """The product of all elements up to each, by doubling: log2(T) lookups of T."""
    products, reach = elements.copy(), 1
    while reach < len(products):
        products[reach:] = table[products[reach:], products[:-reach]]
        reach *= 2
    return products
