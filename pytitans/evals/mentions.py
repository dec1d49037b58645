"""Words and their numbers, again and again: what binding a number to its word is learned from.

    quiet-harbor: 417. able-owl: 932. able-owl: 932. quiet-harbor: 417. ...

Every number but a word's first can be told, and is asked for. One question at the end of a text, as
needle tasks have it, teaches next to nothing about which of several numbers is whose; dozens in
each text do (docs/log.md). No benchmark: training, on the way to several needles.
"""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerFast

from pytitans.evals.haystack import Haystack, continuation
from pytitans.evals.niah import NOISE, turning
from pytitans.evals.task import Example, Task, check_depth
from pytitans.evals.words import draw_words

LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz"))


class Mentions(Task):
    """A text of mentions, each of a word drawn among a few, in one of the forms.

    Args:
        words: a text has so many to so many different ones.
        letters: of a word, drawn at random; None: RULER's words, as "quiet-harbor".
        digits: of a number.
        forms: how a word is mentioned; each begins as it likes and ends after its number.
        gap: at most so many tokens of hay stand before a mention, and a space; fewer in a text
            that would else be too short to mention a word twice.
        prose: what the hay is cut from; None: RULER's noise.
    """

    name = "mentions"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        words: tuple[int, int] = (2, 6),
        letters: int | None = None,
        digits: int = 3,
        forms: Sequence[str] = ("{word}: {number}. ",),
        gap: int = 0,
        prose: Haystack | None = None,
    ):
        self.tokenizer, self.words, self.letters = tokenizer, words, letters
        self.digits, self.forms, self.gap, self.prose = digits, forms, gap, prose
        self.noise = continuation(tokenizer, "".join(NOISE) + " ")
        if letters is not None and 26**letters < words[1]:
            raise ValueError(f"letters={letters} make fewer than words={words} different words")

    def draw(self, rng, index, length, depth) -> Example:
        check_depth(self, depth)
        words = self.draw_words(rng, int(rng.integers(self.words[0], self.words[1] + 1)))
        numbers = [f"{x:0{self.digits}d}" for x in rng.integers(10**self.digits, size=len(words))]
        order, size = [0, 0], 0  # the first word comes twice: something can be asked
        pieces: list[np.ndarray] = []
        told, asked = set(), []
        mention = max(
            len(continuation(self.tokenizer, form.format(word=words[0], number=numbers[0])))
            for form in self.forms
        )
        gap = max(0, min(self.gap, length // 2 - mention - 1))  # so that both fit
        while size < length:
            word = order.pop() if order else int(rng.integers(len(words)))
            form = self.forms[int(rng.integers(len(self.forms)))]
            before, after = form.format(word=words[word], number="\0").split("\0")
            texts = before, numbers[word], after
            for piece in (*self.hay(rng, gap), *(continuation(self.tokenizer, x) for x in texts)):
                pieces.append(piece[: length - size])
                size += len(pieces[-1])
            if word in told and len(pieces[-2]):
                asked.append(len(pieces) - 2)
            told.add(word)
        if not asked:
            raise ValueError(f"length={length} is too short to mention a word twice")
        return Example.of_pieces(pieces, asked)

    def draw_words(self, rng: np.random.Generator, count: int) -> list[str]:
        if self.letters is None:
            return draw_words(rng, count)
        numbers = rng.choice(26**self.letters, count, replace=False)
        powers = 26 ** np.arange(self.letters)
        return ["".join(LETTERS[number // powers % 26]) for number in numbers]

    def hay(self, rng: np.random.Generator, gap: int) -> list[np.ndarray]:
        if not self.gap:
            return []
        if self.prose is not None:
            hay = self.prose.cut(rng, int(rng.integers(gap + 1))).ids
        else:
            begin = int(rng.integers(len(self.noise)))
            hay = turning(self.noise, begin, int(rng.integers(gap + 1)))
        return [hay, continuation(self.tokenizer, " ")]
