"""Between text and ids: pieces of a document, text as tokens arrive, stop strings, chat prompts."""

import codecs
from collections.abc import Iterator, Sequence
from typing import cast

from transformers import PreTrainedTokenizerFast

PIECE = 16_384  # characters that are tokenized at a time
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # how decoding ends where a character is incomplete
PLAIN_STOP = "\nUser:"


def prompt_ids(tokenizer: PreTrainedTokenizerFast, text: str, first: bool) -> list[int]:
    """The text's ids, as `titans generate` reads it; `first`: nothing was read before."""
    ids = cast(list[int], tokenizer(text, add_special_tokens=first, verbose=False).input_ids)
    return ids if ids or not first else [cast(int, tokenizer.eos_token_id)]


def document_ids(tokenizer: PreTrainedTokenizerFast, text: str, first: bool) -> list[int]:
    """As `prompt_ids`, but what looks like a special token is text like any other."""
    encoded = tokenizer(text, add_special_tokens=first, split_special_tokens=True, verbose=False)
    return cast(list[int], encoded.input_ids)


class Pieces:
    """Cuts a UTF-8 document into pieces of at most PIECE characters, where a line or a word ends.

    The cuts depend on the text alone, not on how it arrived: the same document gives the same ids.
    """

    def __init__(self):
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text = ""

    def add(self, data: bytes, last: bool = False) -> Iterator[str]:
        """The pieces that are complete by now. Raises UnicodeDecodeError."""
        self.text += self.decoder.decode(data, last)
        start = 0
        while len(self.text) - start >= PIECE:
            end = start + PIECE
            cut = self.text.rfind("\n", start, end) + 1
            cut = cut or max(self.text.rfind(" ", start + 1, end), 0) or end
            yield self.text[start:cut]
            start = cut
        self.text = self.text[start:]
        if last and self.text:
            yield self.text
            self.text = ""


class Writer:
    """Text as its tokens arrive: whole characters only, up to the first stop string.

    `stopped` once a stop string was written; `kept` is the number of tokens whose text lies wholly
    before it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: Sequence[str] = ()):
        self.tokenizer = tokenizer
        self.stop = stop
        self.ids: list[int] = []
        self.start, self.end = 0, 0  # ids[start:end] is decoded again as context of what follows
        self.held = ""  # may be the beginning of a stop string
        self.ends: list[int] = []  # after each token, how long the text was
        self.length, self.kept, self.stopped = 0, 0, False

    def add(self, token: int) -> str:
        """What can be sent now that `token` has come."""
        self.ids.append(token)
        new = self.decoded()
        if new.endswith(UNFINISHED):
            return ""
        if new:
            self.start, self.end = self.end, len(self.ids)
        return self.take(new)

    def finish(self) -> str:
        """What was still held back."""
        if self.stopped:
            return ""
        text = self.take(self.decoded()) + self.held
        self.end, self.held = len(self.ids), ""
        return text

    def decoded(self) -> str:
        """The text of the tokens after `end`."""
        before = self.decode(self.ids[self.start : self.end])
        return self.decode(self.ids[self.start :])[len(before) :]

    def decode(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def take(self, new: str) -> str:
        """Text that is neither a stop string nor might become one."""
        sent = self.length - len(self.held)
        self.length += len(new)
        self.ends += [self.length] * (len(self.ids) - len(self.ends))
        self.held += new
        found = [at for at in (self.held.find(stop) for stop in self.stop) if at >= 0]
        if found:
            text, self.held, self.stopped = self.held[: min(found)], "", True
            self.kept = sum(end <= sent + min(found) for end in self.ends)
            return text
        hold = max((overlap(self.held, stop) for stop in self.stop), default=0)
        text = self.held[: len(self.held) - hold]
        self.held = self.held[len(text) :]
        return text


def overlap(text: str, stop: str) -> int:
    """How many characters at the text's end could begin the stop string."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


def chat_ids(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[dict[str, str]], first: bool
) -> list[int]:
    """By the tokenizer's chat template; without one, by lines `User: ...`, then `Assistant:`.

    Raises ValueError where the template refuses the messages.
    """
    if not tokenizer.chat_template:
        return prompt_ids(tokenizer, plain_chat(messages, first), first)
    from jinja2 import TemplateError

    try:
        text = cast(
            str,
            tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            ),
        )
    except TemplateError as error:
        raise ValueError(f"the model's chat template refuses the messages: {error}") from error
    ids = cast(list[int], tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    if not first and ids[:1] == [tokenizer.bos_token_id]:
        ids = ids[1:]  # the session began with it
    return ids


def plain_chat(messages: Sequence[dict[str, str]], first: bool) -> str:
    lines = [f"{message['role'].capitalize()}: {message['content']}" for message in messages]
    return ("" if first else "\n") + "\n".join([*lines, "Assistant:"])
