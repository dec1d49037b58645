"""The command `titans`: train, eval, report, read, generate, info, serve, forecast, dna.

Options are the fields of the classes they configure: `--data.X` TextData, `--model.X` TitansConfig,
`--train.X` TrainArguments, which are Hugging Face's TrainingArguments. Torch and transformers are
imported by the command that needs them, so help is quick.
"""

import argparse
import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from pytitans.options import (
    RUN_FILE,
    add_fields,
    add_model_arguments,
    add_train_arguments,
    long_name,
    new_parser,
    parse,
    resumed,
)

if TYPE_CHECKING:
    from jsonargparse import Namespace
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

HELP = """\
titans: neural memory that learns at test time

  titans train       train a model on text
  titans eval        bits per byte of a model on a text, beside xz -9; or --task, see its help
  titans report      tables and pictures of what `titans eval --task` has found
  titans read        read texts of any length into a memory, and save it
  titans generate    continue a prompt, or what a memory has read
  titans info        parameters, memory state and FLOPs of a model
  titans serve       a server: OpenAI's endpoints, memories that outlive a request
  titans forecast    the next rows of a table with dates
  titans dna         classes of DNA sequences, the next base of a genome, embeddings

A first run, without any file or download (minutes on two cores):

  titans train
  titans eval --model runs/mal
  titans generate --model runs/mal --prompt "def mean(values):"

A memory of a book, and a continuation in another process:

  titans read --model runs/mal book.txt.xz --memory book.safetensors
  titans generate --model runs/mal --memory book.safetensors

Your own text, another architecture, and a Transformer of equal size to compare with:

  titans train --data "books/*.txt.xz" --data.validation moby-dick --variant mag
  titans train --data "books/*.txt.xz" --data.validation moby-dick --variant transformer

`titans COMMAND --help` shows the main options with examples, `--help-all` every option.
`--debug` anywhere shows where an error arose.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code. An error is one line on stderr."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    command, *options = [argument for argument in argv if argument != "--debug"] or ["--help"]
    if command in ("-h", "--help", "help"):
        print(HELP)
        return 0
    try:
        if command not in COMMANDS:
            raise ValueError(f"{command!r} is no command: choose {', '.join(COMMANDS)}")
        return COMMANDS[command]([long_name(option) for option in options])
    except BrokenPipeError:  # `titans info | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as stop:
        print(f"titans: stopped{'; ' if str(stop) else ''}{stop}", file=sys.stderr)
        return 130
    except Exception as error:  # whatever it is, a user sees one line; --debug shows the rest
        if debug:
            raise
        print(f"titans: error: {message_of(error)}", file=sys.stderr)
        return 2


def message_of(error: Exception) -> str:
    """The error in one line; what is not known to be the user's to mend says how to see more."""
    if isinstance(error.__cause__, ValueError) and type(error).__name__.startswith("Strict"):
        error = error.__cause__  # a configuration's own check
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, argparse.ArgumentError):
        return plain(text)
    if isinstance(error, ModuleNotFoundError):
        return f"{text}: install what the commands need, pip install 'pytitans[train]'"
    if isinstance(error, (ValueError, OSError)):
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"


def plain(text: str) -> str:
    """jsonargparse's message in the command line's words."""
    text = re.sub(r'^Parser key "(.+?)": ', r"--\1: ", text)
    text = re.sub(
        r"Does not validate .*?Subtypes: \[(.*)\] Errors.*value: ", r"expected \1, got ", text
    )
    text = re.sub(r"Expected an? (?:typing\.Literal)?", "expected ", text)
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text).replace("NoneType", "null")
    return f"{text.replace('. Got value: ', ', got ')} (see --help)"


def train_command(argv: list[str]) -> int:
    """Trains a model and says where it is."""
    from pytitans.data.text import TextData

    parser = new_parser("train", "Trains a model on text.")
    parser.add_argument("--resume", type=str, metavar="FOLDER", help="go on with FOLDER's run")
    add_fields(parser, "data", TextData)
    add_model_arguments(parser)
    add_train_arguments(parser)
    options = parse(parser, "train", resumed(argv))

    from transformers import AutoModelForCausalLM, set_seed

    from pytitans.data.tokenizer import load_tokenizer
    from pytitans.train import TrainArguments, find_checkpoint, train

    quiet()
    data = TextData(**options.data.as_dict())
    tokenizer = load_tokenizer(data.tokenizer)
    config = model_config(options, tokenizer)
    options.train.output_dir = options.train.output_dir or f"runs/{options.model.variant}"
    args = TrainArguments(**options.train.as_dict())
    checkpoint = find_checkpoint(args, resume=options.resume is not None)
    if args.process_index == 0:
        write(parser.dump(options), Path(options.train.output_dir, RUN_FILE))
    set_seed(args.seed)
    model = AutoModelForCausalLM.from_config(config)
    facts = train(model, tokenizer, data, args, checkpoint=checkpoint)
    if args.process_index == 0:
        print_facts(facts, args.output_dir)
    return 0


def print_facts(facts: dict[str, Any], folder: str | None) -> None:
    print(
        f"{facts['parameters']:,} parameters, {facts['train_tokens']:,} tokens, "
        f"{facts['tokens_per_second']:,.0f} tokens/s"
    )
    if facts["bits_per_byte"] is not None:  # with --train.eval_strategy no
        print(f"validation: {facts['bits_per_byte']:.4f} bits per byte")
    print(f"saved: {folder} (model, tokenizer, loss.png, run.json)")


def eval_command(argv: list[str]) -> int:
    """Prints bits per byte and perplexity as JSON; with --task, runs that."""
    if any(option.split("=")[0] == "--task" for option in argv):
        from pytitans.evals.command import eval_task

        return eval_task(argv)

    from pytitans.data.text import SPLITS, TextData, head, load_text

    parser = new_parser("eval", "Bits per byte of a model on a text, beside xz -9.")
    add = parser.add_argument
    add("--model", type=str, required=True, help="folder or hub name of a causal model")
    add_fields(parser, "data", TextData)
    add("--split", type=Literal["", *SPLITS, "all"], default="",
        help="part of the text; validation, or all of it if only --data is given")  # fmt: skip
    add("--stride", type=int | None, help="tokens that a window adds to the last; all but one")
    add("--limit", type=int | None, help="score the first so many bytes")
    add("--batch_size", type=int, default=8, help="windows at a time")
    add("--bf16", type=bool, default=False, help="bf16 autocast instead of the model's own type")
    add("--output", type=str | None, help="also write the JSON to this file")
    parser.set_defaults({f"data.{field.name}": None for field in dataclasses.fields(TextData)})
    options = parse(parser, "eval", argv)

    from pytitans.data.tokenizer import load_tokenizer
    from pytitans.evaluate import evaluate

    quiet()
    given = {key: value for key, value in options.data.as_dict().items() if value is not None}
    folder = model_folder(options.model)
    tokenizer = load_tokenizer(given.get("tokenizer", folder))
    known = trained_with(options.model) if "files" not in given else {}
    data = TextData(**(known | given))
    whole = "files" in given and not {"validation", "test"} & set(given)
    split = options.split or ("all" if whole else "validation")
    texts = load_text(data, (split,))[split]
    model = load_model(folder)
    result = evaluate(
        model,
        tokenizer,
        head(texts, options.limit),
        length=data.sequence_length,
        stride=options.stride,
        batch_size=options.batch_size,
        bf16=options.bf16,
    )
    line = json.dumps({"model": options.model, "split": split} | result)
    print(line)
    if options.output:
        write(line + "\n", Path(options.output))
    return 0


def read_command(argv: list[str]) -> int:
    """Reads texts into a memory and saves it."""
    parser = new_parser("read", "Reads texts of any length into a memory, and saves it.")
    add = parser.add_argument
    add("files", type=str, nargs="*", help="text files, .gz and .xz as they are; - standard input")
    add("--model", type=str, required=True, help="folder or hub name of a Titans model")
    add("--memory", type=str, required=True, help="file to save the memory in")
    add("--memory_from", type=str | None, help="a saved memory to read on with")
    add("--resume", action="store_true", help="go on where reading these files was stopped")
    add("--save_minutes", type=float, default=5.0, help="save this often on the way")
    options = parse(parser, "read", argv)

    from pytitans.data.tokenizer import check_vocabulary, load_tokenizer
    from pytitans.read import read

    quiet()
    folder = model_folder(options.model)
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    check_vocabulary(tokenizer, model.config.get_text_config().vocab_size)
    reading = read(
        model, tokenizer, options.files, options.memory,
        memory_from=options.memory_from, resume=options.resume, save_minutes=options.save_minutes,
    )  # fmt: skip
    scored = f", {reading.bits_per_byte:.4f} bits per byte" if reading.bytes else ""
    print(f"read {reading.tokens:,} tokens, {reading.bytes:,} bytes{scored}")
    print(f"saved: {options.memory} ({reading.cache.nbytes / 2**20:,.1f} MB)")
    if not reading.finished:
        raise KeyboardInterrupt("--resume reads the rest")
    return 0


def generate_command(argv: list[str]) -> int:
    """Streams a continuation of the prompt, or of what a memory has read and the prompt."""
    parser = new_parser("generate", "Continues a prompt, or what a memory has read.")
    add = parser.add_argument
    add("--model", type=str, required=True, help="folder or hub name of a causal model")
    add("--prompt", type=str, default="", help="text to continue; - reads it from standard input")
    add("--memory", type=str | None, help="what `titans read` saved: the prompt follows that text")
    add("--max_new_tokens", type=int, default=256, help="tokens to write at most")
    add("--temperature", type=float, default=0.8, help="0 always takes the likeliest token")
    add("--top_p", type=float, default=1.0, help="share of the probability to draw from")
    add("--seed", type=int, default=0, help="the same seed writes the same text")
    options = parse(parser, "generate", argv)

    import torch
    from transformers import TextStreamer, set_seed

    from pytitans.data.tokenizer import check_vocabulary, load_tokenizer

    if options.temperature < 0 or options.max_new_tokens < 1:
        raise ValueError(
            f"temperature={options.temperature} must be 0 or more, and "
            f"max_new_tokens={options.max_new_tokens} 1 or more"
        )
    quiet()
    folder = model_folder(options.model)
    tokenizer = load_tokenizer(folder)
    model = load_model(folder)
    check_vocabulary(tokenizer, model.config.get_text_config().vocab_size)
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    ids, start = tokenizer(prompt).input_ids, {}
    if options.memory:
        from pytitans.read import resumed_memory

        memory, ids = resumed_memory(options.memory, model, tokenizer, prompt)
        start["cache"] = memory
        print(prompt, end="", flush=True)
    ids = torch.tensor([ids or [tokenizer.eos_token_id]])
    sampling = {"temperature": options.temperature, "top_p": options.top_p}
    set_seed(options.seed)
    cast(Any, model).generate(
        input_ids=ids.to(model.device),
        attention_mask=torch.ones_like(ids).to(model.device),
        max_new_tokens=options.max_new_tokens,
        do_sample=options.temperature > 0,
        streamer=TextStreamer(tokenizer, skip_prompt=bool(start), skip_special_tokens=True),
        **start,
        **(sampling if options.temperature > 0 else {}),
    )
    return 0


def info_command(argv: list[str]) -> int:
    """Prints what a model costs."""
    parser = new_parser("info", "Parameters, memory state and FLOPs of a model; nothing is built.")
    parser.add_argument("--checkpoint", type=str | None, help="a model's folder or hub name")
    add_model_arguments(parser)
    options = parse(parser, "info", argv)

    from transformers import AutoConfig

    from pytitans.data.tokenizer import byte_tokenizer
    from pytitans.info import describe

    quiet()
    if options.checkpoint:
        config = AutoConfig.from_pretrained(model_folder(options.checkpoint))
    else:
        config = model_config(options, byte_tokenizer())
    print(describe(config))
    return 0


def serve_command(argv: list[str]) -> int:
    """Serves a model over HTTP."""
    from pytitans.serve.command import serve

    return serve(argv)


def forecast_command(argv: list[str]) -> int:
    """Forecasts series."""
    from pytitans.forecasting.command import forecast

    return forecast(argv)


def report_command(argv: list[str]) -> int:
    """Writes tables and pictures of results."""
    from pytitans.evals.command import report

    return report(argv)


def dna_command(argv: list[str]) -> int:
    """Models of DNA."""
    from pytitans.genomics.command import dna

    return dna(argv)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train_command,
    "eval": eval_command,
    "read": read_command,
    "generate": generate_command,
    "info": info_command,
    "serve": serve_command,
    "report": report_command,
    "forecast": forecast_command,
    "dna": dna_command,
}


def model_config(options: "Namespace", tokenizer: "PreTrainedTokenizerFast") -> "PreTrainedConfig":
    """The configuration of the model that the options describe, for the tokenizer's ids."""
    from pytitans.baseline import BASELINES, baseline_like
    from pytitans.models import TitansConfig

    fields = options.model.as_dict()
    variant = fields["variant"]
    fields |= {
        "variant": "mac" if variant in BASELINES else variant,
        "vocab_size": fields["vocab_size"] or len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = TitansConfig(**fields)
    return baseline_like(config, variant) if variant in BASELINES else config


def model_folder(name: str) -> str:
    """The name; of a run that was stopped, its last checkpoint; of a released model, its folder,
    unless there is a model here of that name."""
    from pytitans.released import released_folder

    folder = Path(name).expanduser()
    if not folder.is_dir():
        return released_folder(name) or name
    if (folder / "config.json").exists():
        return str(folder)
    from pytitans.train import last_checkpoint

    last = last_checkpoint(folder) or released_folder(name)
    if last is None:
        raise ValueError(f"{name!r} holds no model: no config.json and no checkpoint is in it")
    return last


def load_model(name: str) -> "PreTrainedModel":
    """The causal model, every weight of it found in the checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True)
    except Exception as error:  # safetensors, json, transformers and huggingface_hub have their own
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{name!r} holds no model that can be loaded: {reason}") from error
    model, found = loaded
    wrong = [*found["missing_keys"], *found["unexpected_keys"], *found["mismatched_keys"]]
    if wrong:
        raise ValueError(
            f"{name!r} does not fit its own config.json: {len(wrong)} weights, as {wrong[0]}"
        )
    return model.eval().to(torch.accelerator.current_accelerator() or "cpu")


def trained_with(name: str) -> dict:
    """The text that a run of ours was trained on, from its facts."""
    from pytitans.train import FACTS

    for folder in (Path(name), Path(name).parent):
        if (folder / FACTS).is_file():
            return json.loads((folder / FACTS).read_text())["data"]
    return {}


def quiet() -> None:
    """Transformers' own bars and hints off; errors stay."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def write(text: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


if __name__ == "__main__":
    sys.exit(main())
