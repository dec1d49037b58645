"""Read a book into a memory, ask it, save it, and go on in another process.

    python examples/read_a_book.py                        # a built-in text, a model trained now
    python examples/read_a_book.py book.txt.xz --model runs/mac --question "The whale"

The book is read once, as a stream; what is kept has constant size. How much of the book the memory
holds shows in the bits that its last page costs: read by a model that has read the book, and by one
that has read nothing. A model trained in two minutes holds next to nothing, and says so.
"""

import argparse
import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from small_model import load_or_train
from transformers import TextStreamer

from pytitans import TitansCache, TitansForCausalLM
from pytitans.data.text import TextData, load_text
from pytitans.data.tokenizer import load_tokenizer
from pytitans.read import read, resumed_memory

PAGE = 2000  # tokens


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("book", nargs="?", help="a text file, .gz and .xz too (Python's argparse.py)")
    p.add_argument("--model", default="runs/example", help="of `titans train` (%(default)s)")
    p.add_argument("--memory", default="book.safetensors", help="where it is saved (%(default)s)")
    p.add_argument("--question", default="    def ", help="what the book is to go on from")
    p.add_argument("--resume", action="store_true", help="only ask, from the saved memory")
    args = p.parse_args()
    model, tokenizer = load_or_train(args.model), load_tokenizer(args.model)
    if args.resume:
        tokens = TitansCache.describe(args.memory)["tokens"]
        print(f"-- asked in another process, of {args.memory}, which has read {tokens:,} tokens")
        ask(model, tokenizer, args.memory, args.question)
        return
    book = args.book or find_spec("argparse").origin
    print(f"-- reading {book}")
    Path(args.memory).unlink(missing_ok=True)
    reading = read(model, tokenizer, [book], args.memory)
    print(
        f"{reading.bytes:,} bytes at {reading.bits_per_byte:.3f} bits per byte; a memory of "
        f"{reading.cache.nbytes / 2**10:,.0f} KB, saved as {args.memory}"
    )
    print("-- the book's last page again, in bits per byte")
    page = last_page(book, tokenizer)
    for who, memory in (("who has read nothing", None), ("who has read the book", args.memory)):
        start = None if memory is None else TitansCache.load(memory, model)
        print(f"{who}: {bits_per_byte(model, tokenizer, page, start):.3f}")
    print("-- asked")
    ask(model, tokenizer, args.memory, args.question)
    subprocess.run([sys.executable, __file__, "--resume", *sys.argv[1:]], check=True)


def last_page(book: str, tokenizer) -> torch.Tensor:
    """Its ids, [1, n]."""
    (document,) = load_text(TextData(files=[book]), ["all"])["all"]
    return torch.tensor([tokenizer(document.text).input_ids[-PAGE:]])


@torch.no_grad()
def bits_per_byte(model: TitansForCausalLM, tokenizer, ids, memory: TitansCache | None) -> float:
    """What the model, with or without a memory, needs for these ids."""
    loss = model(input_ids=ids, labels=ids, cache=memory).loss
    size = len(tokenizer.decode(ids[0, 1:]).encode())
    return loss.item() * (ids.shape[1] - 1) / math.log(2) / size


def ask(model: TitansForCausalLM, tokenizer, memory: str, question: str) -> None:
    """Prints how the book goes on behind the question. The file stays as it is."""
    start, ids = resumed_memory(memory, model, tokenizer, question)
    print(question, end="")
    model.generate(
        torch.tensor([ids]),
        cache=start,
        max_new_tokens=80,
        do_sample=False,
        streamer=TextStreamer(tokenizer, skip_prompt=True),
    )


if __name__ == "__main__":
    main()
