"""The command `titans`: train, eval, generate, info.

Options are the fields of the classes they configure: `--data.X` TextData, `--model.X` TitansConfig,
`--train.X` TrainArguments, which are Hugging Face's TrainingArguments. Torch and transformers are
imported by the command that needs them, so help is quick.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

HELP = """\
titans: neural memory that learns at test time

  titans train       train a model on text
  titans eval        bits per byte of a model on a text, beside xz -9
  titans generate    continue a prompt
  titans info        parameters, memory state and FLOPs of a model

A first run, without any file or download (minutes on two cores):

  titans train
  titans eval --model runs/mac
  titans generate --model runs/mac --prompt "def mean(values):"

Your own text, another architecture, and a Transformer of equal size to compare with:

  titans train --data "books/*.txt.xz" --data.validation moby-dick --variant mag
  titans train --data "books/*.txt.xz" --data.validation moby-dick --variant transformer

`titans COMMAND --help` shows the main options with examples, `--help-all` every option.
`--debug` anywhere shows where an error arose.
"""

EXAMPLES = {
    "train": """\
examples:
  titans train                                   the default model on Python's own source text
  titans train --variant mag --steps 2000        another architecture, longer
  titans train --variant transformer             sliding-window Transformer of equal parameters
  titans train --data notes/ book.txt.gz         files, folders, globs; .xz .gz .zip as they are
  titans train --data hub:Salesforce/wikitext:wikitext-103-raw-v1
  titans train --preset 170m --data.tokenizer gpt2 --train.per_device_train_batch_size 4
  titans train --config run.yaml --train.seed 1  a file, then overrides
  titans train --print_config > run.yaml         the file of a run
  titans train --resume runs/mac                 go on from the last checkpoint
  torchrun --nproc-per-node 2 -m pytitans.cli train

--help-all shows every option of the model and of Hugging Face's TrainingArguments.""",
    "eval": """\
examples:
  titans eval --model runs/mac                            the validation text it was trained beside
  titans eval --model runs/mac --split test --output test.json
  titans eval --model runs/mac --data book.txt --split all --data.sequence_length 4096
  titans eval --model gpt2 --data book.txt --split all    any Hugging Face causal model""",
    "generate": """\
examples:
  titans generate --model runs/mac --prompt "import os"
  titans generate --model runs/mac --prompt "Call me" --temperature 0 --max-new-tokens 500""",
    "info": """\
examples:
  titans info --preset 760m
  titans info --preset 760m --variant lmm --model.chunk_size 64
  titans info --model runs/mac""",
}

SHORT = {
    "--data": "--data.files",
    "--variant": "--model.variant",
    "--steps": "--train.max_steps",
    "--seed": "--train.seed",
}
SHOWN = {
    "train": ["config", "print_config", "preset", "resume", "data.files", "data.validation", "data.test", "data.tokenizer", "data.sequence_length", "model.variant", "model.hidden_size", "model.num_hidden_layers", "model.num_attention_heads", "model.intermediate_size", "model.chunk_size", "model.segment_len", "model.window", "train.output_dir", "train.max_steps", "train.max_minutes", "train.per_device_train_batch_size", "train.learning_rate", "train.warmup_steps", "train.bf16", "train.eval_steps", "train.eval_bytes", "train.save_steps", "train.seed"],
}
RUN_FILE = "run.yaml"
VARIANTS = ("mac", "mag", "mal", "lmm", "transformer")


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
    except KeyboardInterrupt as stop:
        print(f"titans: stopped{'; ' if str(stop) else ''}{stop}", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        print(f"titans: error: {message_of(error)}", file=sys.stderr)
        return 2


def long_name(option: str) -> str:
    name, equals, value = option.partition("=")
    return SHORT.get(name, name) + equals + value


def message_of(error: Exception) -> str:
    """The error in one line; what is not known to be the user's to mend says how to see more."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ModuleNotFoundError):
        return f"{text}: install what the commands need, pip install 'pytitans[train]'"
    if isinstance(error, (ValueError, OSError, argparse.ArgumentError)):
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"


def train_command(argv: list[str]) -> int:
    """Trains a model and says where it is."""
    parser = new_parser("train", "Trains a model on text.")
    parser.add_argument("--resume", type=str, metavar="FOLDER", help="Go on with FOLDER's run.")
    add_data_arguments(parser)
    add_model_arguments(parser)
    add_train_arguments(parser)
    options = parse(parser, "train", resumed(argv))

    from transformers import AutoModelForCausalLM, set_seed

    from pytitans.data.text import TextData
    from pytitans.data.tokenizers import load_tokenizer
    from pytitans.train import TrainArguments, find_checkpoint, train

    quiet()
    data = TextData(**options.data.as_dict())
    tokenizer = load_tokenizer(data.tokenizer)
    config = model_config(options, tokenizer)
    options.train.output_dir = options.train.output_dir or f"runs/{options.model.variant}"
    args = TrainArguments(**options.train.as_dict())
    checkpoint = find_checkpoint(args, resume=options.resume is not None)
    if args.process_index == 0:
        write(parser.dump(options), Path(args.output_dir) / RUN_FILE)
    set_seed(args.seed)
    model = AutoModelForCausalLM.from_config(config)
    facts = train(model, tokenizer, data, args, checkpoint=checkpoint)
    if args.process_index == 0:
        print(
            f"{facts['parameters']:,} parameters, {facts['train_tokens']:,} tokens, "
            f"{facts['tokens_per_second']:,.0f} tokens/s\n"
            f"validation: {facts['bits_per_byte']:.4f} bits per byte\n"
            f"saved: {args.output_dir} (model, tokenizer, loss.png, run.json)"
        )
    return 0


def eval_command(argv: list[str]) -> int:
    """Prints bits per byte and perplexity as JSON."""
    parser = new_parser("eval", "Bits per byte of a model on a text, beside xz -9.")
    add = parser.add_argument
    add("--model", type=str, required=True, help="Folder or hub name of a causal model.")
    add_data_arguments(parser)
    add("--split", type=Literal["train", "validation", "test", "all"], default="validation",
        help="Which part of the text; all: every file, whole.")  # fmt: skip
    add(
        "--stride",
        type=int | None,
        help="Tokens that a window adds to the one before; all but one.",
    )
    add("--limit", type=int | None, help="Score the first so many bytes.")
    add("--batch_size", type=int, default=8, help="Windows at a time.")
    add("--bf16", type=bool, default=False, help="bf16 autocast instead of the model's own type.")
    add("--output", type=str | None, help="Also write the JSON to this file.")
    parser.set_defaults({f"data.{name}": None for name in data_fields()})
    options = parse(parser, "eval", argv)

    from pytitans.data.text import TextData, head, load_text
    from pytitans.data.tokenizers import load_tokenizer
    from pytitans.evaluate import evaluate

    quiet()
    given = {key: value for key, value in options.data.as_dict().items() if value is not None}
    folder = model_folder(options.model)
    tokenizer = load_tokenizer(given.get("tokenizer", folder))
    known = trained_with(options.model) if "files" not in given else {}
    data = TextData(**(known | given))
    texts = load_text(data, (options.split,))[options.split]
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
    line = json.dumps({"model": options.model, "split": options.split} | result)
    print(line)
    if options.output:
        write(line + "\n", Path(options.output))
    return 0


def generate_command(argv: list[str]) -> int:
    """Streams a continuation of the prompt."""
    parser = new_parser("generate", "Continues a prompt.")
    add = parser.add_argument
    add("--model", type=str, required=True, help="Folder or hub name of a causal model.")
    add("--prompt", type=str, default="", help="Text to continue; - reads it from standard input.")
    add("--max_new_tokens", type=int, default=256, help="Tokens to write at most.")
    add("--temperature", type=float, default=0.8, help="0 always takes the likeliest token.")
    add("--top_p", type=float, default=1.0, help="Share of the probability to draw from.")
    add("--seed", type=int, default=0, help="The same seed writes the same text.")
    options = parse(parser, "generate", argv)

    from transformers import TextStreamer, set_seed

    from pytitans.data.tokenizers import check_vocabulary, load_tokenizer

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
    ids = tokenizer(
        prompt or tokenizer.eos_token, return_tensors="pt"
    )  # every text begins with eos
    sampling = {"temperature": options.temperature, "top_p": options.top_p}
    set_seed(options.seed)
    model.generate(
        input_ids=ids.input_ids.to(model.device),
        attention_mask=ids.attention_mask.to(model.device),
        max_new_tokens=options.max_new_tokens,
        do_sample=options.temperature > 0,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **(sampling if options.temperature > 0 else {}),
    )
    return 0


def info_command(argv: list[str]) -> int:
    """Prints what a model costs."""
    raise ValueError("not yet")


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train_command,
    "eval": eval_command,
    "generate": generate_command,
    "info": info_command,
}


def new_parser(command: str, description: str) -> "ArgumentParser":
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog=f"titans {command}",
        description=description,
        epilog=EXAMPLES[command],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="A YAML file of these options.")
    return parser


def data_fields() -> list[str]:
    from pytitans.data.text import TextData

    return [field.name for field in dataclasses.fields(TextData)]


def add_data_arguments(parser: "ArgumentParser") -> None:
    """`--data.X`; the names of files take several values."""
    from pytitans.data.text import TextData

    several = {"files", "validation", "test"}
    parser.add_class_arguments(TextData, "data", skip=several)
    for name in sorted(several):
        parser.add_argument(
            f"--data.{name}", type=str, nargs="*", default=list(getattr(TextData, name))
        )


def add_model_arguments(parser: "ArgumentParser") -> None:
    """`--model.X`, the fields of TitansConfig that describe a shape, and `--preset`."""
    from transformers import PreTrainedConfig

    from pytitans.models import TitansConfig
    from pytitans.train import DEFAULT_RUN

    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    own = {"variant", "vocab_size", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"}
    parser.add_argument(
        "--preset", type=str | None, help="A size of the paper: 170m, 340m, 400m, ..."
    )
    parser.add_class_arguments(TitansConfig, "model", skip=inherited | own)
    add = parser.add_argument
    add("--model.variant", type=Literal[VARIANTS], help="Architecture (short: --variant).")  # type: ignore
    add("--model.vocab_size", type=int | None, help="Rows of the embedding; the tokenizer's size.")
    parser.set_defaults({k: v for k, v in DEFAULT_RUN.items() if k.startswith("model.")})


def add_train_arguments(parser: "ArgumentParser") -> None:
    """`--train.X`, and the whole default run as defaults."""
    from pytitans.train import DEFAULT_RUN, TrainArguments

    parser.add_class_arguments(TrainArguments, "train")
    parser.set_defaults(DEFAULT_RUN)


def parse(parser: "ArgumentParser", command: str, argv: list[str]) -> "Namespace":
    """The options; --help lists the main ones, --help-all all. A preset gives the model's defaults."""
    if "--help-all" in argv:
        argv = ["--help"]
    elif command in SHOWN and {"-h", "--help"} & set(argv):  # not else: what is hidden is not saved
        for action in parser._actions:
            if action.dest not in SHOWN[command] and action.dest != "help":
                action.help = argparse.SUPPRESS
    options = parser.parse_args(argv)
    if getattr(options, "preset", None):
        from pytitans.presets import model_preset

        preset = model_preset(options.preset)
        parser.set_defaults({f"model.{name}": value for name, value in preset.items()})
        options = parser.parse_args(argv)
    return options


def resumed(argv: list[str]) -> list[str]:
    """With --resume FOLDER: the options the run was started with come first, its folder last."""
    values = [v for flag, v in zip(argv, argv[1:], strict=False) if flag == "--resume"]
    values += [v.removeprefix("--resume=") for v in argv if v.startswith("--resume=")]
    if not values:
        return argv
    path = Path(values[-1]) / RUN_FILE
    if not path.is_file():
        raise ValueError(
            f"{values[-1]!r} holds no run: there is no {path}; start one without --resume"
        )
    return ["--config", str(path), *argv, "--train.output_dir", values[-1]]


def model_config(options: "Namespace", tokenizer: "PreTrainedTokenizerFast") -> "PreTrainedConfig":
    """The configuration of the model that the options describe, for the tokenizer's ids."""
    from pytitans.baseline import baseline_like
    from pytitans.models import TitansConfig

    fields = options.model.as_dict()
    variant = fields.pop("variant")
    config = TitansConfig(
        **fields | {"vocab_size": fields["vocab_size"] or len(tokenizer)},
        variant="mac" if variant == "transformer" else variant,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return baseline_like(config) if variant == "transformer" else config


def model_folder(name: str) -> str:
    """The name; of a run that was stopped, its last checkpoint."""
    from transformers.trainer_utils import get_last_checkpoint

    folder = Path(name).expanduser()
    if not folder.is_dir() or (folder / "config.json").exists():
        return str(folder) if folder.is_dir() else name
    last = get_last_checkpoint(str(folder))
    if last is None:
        raise ValueError(f"{name!r} holds no model: no config.json and no checkpoint is in it")
    return last


def load_model(name: str) -> "PreTrainedModel":
    """The causal model, every weight of it found in the checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model, found = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True)
    except Exception as error:  # safetensors, json, transformers and huggingface_hub have their own
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{name!r} holds no model that can be loaded: {reason}") from error
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
