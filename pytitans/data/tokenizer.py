"""Text -> ids. The byte tokenizer needs no files; any other is a Hugging Face tokenizer.

A byte's id is the byte: ids 0 to 255, then <|eos|> 256, which begins and ends every text, and
<|pad|> 257. Encoding for training is one numpy view; the same ids come from the tokenizer that is
saved with the model, a merge-less byte-level BPE which `AutoTokenizer` loads.
"""

import functools
from pathlib import Path
from typing import cast

import numpy as np
from transformers import AutoTokenizer, GPT2Tokenizer, LlamaTokenizer, PreTrainedTokenizerFast

BYTES = "bytes"
EOS, PAD = "<|eos|>", "<|pad|>"


def load_tokenizer(name: str = BYTES) -> PreTrainedTokenizerFast:
    """`bytes`, or a Hugging Face tokenizer by folder or hub name, with eos and pad tokens set.

    A folder that holds nothing but a SentencePiece `tokenizer.model` is read by `LlamaTokenizer`,
    one with `vocab.json` and `merges.txt` by `GPT2Tokenizer`. Raises ValueError if there is none.
    """
    if name == BYTES:
        return byte_tokenizer()
    try:
        tokenizer = tokenizer_class(Path(name).expanduser()).from_pretrained(name)
    except (
        Exception
    ) as error:  # transformers raises OSError, ValueError, TypeError, ImportError, ...
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"no tokenizer at {name!r}: give `bytes`, a folder or a hub name ({reason})"
        ) from error
    if tokenizer.eos_token is None:
        raise ValueError(f"the tokenizer {name!r} has no end-of-sequence token, which parts files")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenizer_class(folder: Path):
    """Pinned where a folder does not name one: readers of one file differ in the ids they give."""
    if (folder / "tokenizer.json").exists() or (folder / "tokenizer_config.json").exists():
        return AutoTokenizer
    if (folder / "tokenizer.model").exists():
        return LlamaTokenizer
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return GPT2Tokenizer
    return AutoTokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per UTF-8 byte: 258 ids, any text comes back as it was."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {letter: byte for byte, letter in enumerate(byte_letters())}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in (EOS, PAD)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,  # "<|eos|>" in a text is seven letters
        model_max_length=int(1e30),
    )


@functools.cache
def byte_letters() -> list[str]:
    """The letter by which byte-level BPE writes a byte: itself if printable, else from 256 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = iter(range(256, 512))
    return [chr(byte if byte in printable else next(rest)) for byte in range(256)]


def is_bytes(tokenizer: PreTrainedTokenizerFast) -> bool:
    return len(tokenizer) == 258 and tokenizer.convert_ids_to_tokens(255) == byte_letters()[255]


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> np.ndarray:
    """The text's ids, no special tokens added, in the smallest unsigned type that holds them."""
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    if is_bytes(tokenizer):
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(dtype)
    ids = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, verbose=False
    ).input_ids
    return np.asarray(ids, dtype=dtype)


def check_vocabulary(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> None:
    """Raises ValueError unless every id of the tokenizer is a row of the model's embedding."""
    largest = max(cast(dict[str, int], tokenizer.get_vocab()).values())
    if largest >= vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {largest}, the model's vocab_size is {vocab_size}: "
            f"use the model's own tokenizer, or --model.vocab_size {largest + 1}"
        )
