"""What the commands accept: options made from the fields of the classes they configure.

`--data.X` is a field of TextData, `--model.X` of TitansConfig, `--train.X` of TrainArguments, and
so in a YAML file. Help comes from their docstrings; jsonargparse checks types and reads files.
"""

import argparse
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

EXAMPLES = {
    "train": """\
examples:
  titans train                                   the default model on Python's own source text
  titans train --variant mag --steps 2000        another architecture, longer
  titans train --variant transformer             sliding-window Transformer of equal parameters
  titans train --variant gated_deltanet          other baselines: llama, mamba2_hf, retnet, ...
  titans train --data notes/ book.txt.gz         files, folders, globs; .xz .gz .zip as they are
  titans train --data hub:Salesforce/wikitext:wikitext-103-raw-v1
  titans train --preset 170m --data.tokenizer gpt2 --train.per_device_train_batch_size 4
  titans train --config run.yaml --train.seed 1  a file, then overrides
  titans train --print_config > run.yaml         the file of a run
  titans train --resume runs/mal                 go on from the last checkpoint
  torchrun --nproc-per-node 2 -m pytitans.cli train

--help-all shows every option of the model and of Hugging Face's TrainingArguments.""",
    "eval": """\
examples:
  titans eval --model runs/mal                            the validation text it was trained beside
  titans eval --model runs/mal --split test --output test.json
  titans eval --model runs/mal --data book.txt --split all --data.sequence_length 4096
  titans eval --model gpt2 --data book.txt --split all    any Hugging Face causal model
  titans eval --task niah_single_1 --model runs/mal       does it remember? --task NAME --help""",
    "eval --task NAME": """\
tasks (docs/evaluation.md):
  passkey, niah_single_1 to 3, niah_multikey_1 to 3, niah_multivalue, niah_multiquery
  babilong_qa1 to 5, with --babi; recall; parity, modular_addition, s5
  positions: bits per byte by position, with --data
  lm_eval:NAME,NAME: of the lm-evaluation-harness, from its hub or --local files

examples:
  titans eval --task niah_single_1 --model runs/mal --lengths 2K 64K 2M --output niah.json
  titans eval --task niah_single_2 --model runs/mal --data "books/*.txt.xz" --depths 10 50 90
  titans eval --task babilong_qa1 --model runs/mal --babi tasks_1-20_v1-2.zip --data "books/*.xz"
  titans eval --task positions --model runs/mal --data gibbon.txt.xz --output positions.json
  titans eval --task lm_eval:piqa,wikitext --model runs/mal --local commonsense/
  titans report niah.json positions.json --output report""",
    "report": """\
examples:
  titans report results/*.json --output report    report.md and its pictures

Files of one model, and of models that differ in their seed alone (mal-seed0, mal-seed1), are a
row.""",
    "read": """\
examples:
  titans read --model runs/mal book.txt.xz --memory book.safetensors
  titans read --model runs/mal more.txt --memory both.safetensors --memory-from book.safetensors
  cat *.py | titans read --model runs/mal - --memory code.safetensors
  titans read --model runs/mal *.txt --memory all.safetensors --resume   after Ctrl-C or a crash

A memory is of constant size whatever it has read, and fits the model that read it alone.""",
    "generate": """\
examples:
  titans generate --model runs/mal --prompt "import os"
  titans generate --model runs/mal --prompt "Call me" --temperature 0 --max-new-tokens 500
  titans generate --model runs/mal --memory book.safetensors --prompt "The whale"
  titans generate --model runs/mal --memory book.safetensors    goes on where the book ends""",
    "forecast train": """\
examples:
  titans forecast train power.csv                          rows with a date column, any frequency
  titans forecast train ETT-small.zip::ETTh1.csv --horizons 96 192 336 720
  titans forecast train power.csv --data.columns load oil --data.context_length 336
  titans forecast train power.csv --data.history_length 672 --carried true   the memory reads more
  titans forecast train power.csv --variant dlinear        baselines: itransformer, patchtst, ...
  titans forecast train weather.zip --data.uneven_dates true
  titans forecast train power.csv --resume runs/power-lmm  go on where it was stopped

--help-all shows every option of the model and of Hugging Face's TrainingArguments.""",
    "forecast predict": """\
examples:
  titans forecast predict power.csv --model runs/power-lmm            after the last row
  titans forecast predict power.csv --model runs/power-lmm --start 2026-03-01
  titans forecast predict power.csv --model runs/power-lmm --memory power.safetensors
  titans forecast predict new_rows.csv --model runs/power-lmm --memory power.safetensors

A memory reads each row once: a later call the new ones, from a file of all or of these alone.""",
    "forecast backtest": """\
examples:
  titans forecast backtest runs/power-lmm runs/power-dlinear
  titans forecast backtest runs/power-lmm --carried true""",
    "dna train": """\
examples:
  titans dna train --data GUE/tf/0                          its train.csv and dev.csv
  titans dna train --data GUE/tf/0 --variant llama          a baseline of equal parameters, or cnn
  titans dna train --data promoters.tsv.gz                  one table: a seeded draw splits it
  titans dna train --data human_nontata_promoters --data.genome GRCh38.fa.gz   intervals
  titans dna train --data GUE/tf/0 --data.reverse_complement both   both strands
  titans dna train --data ecoli.fa.gz --train.output_dir runs/ecoli      predicts the next base
  titans dna train --data GUE/tf/0 --start runs/ecoli       a classifier with that model's body

--help-all shows every option of the model and of Hugging Face's TrainingArguments.""",
    "dna evaluate": """\
examples:
  titans dna evaluate --model runs/dna-mal                  the test set beside what it learned from
  titans dna evaluate --model runs/dna-mal --data GUE/tf/0 --split dev --output dev.json
  titans dna evaluate --model runs/ecoli --output ecoli.json         its genome, and ecoli.png
  titans dna evaluate --model runs/ecoli --data other.fa.gz --orders 11 12""",
    "dna embed": """\
examples:
  titans dna embed --model runs/dna-mal --data sequences.csv --output vectors.npy
  titans dna embed --model runs/ecoli --data contigs.fa.gz --output vectors.safetensors""",
    "info": """\
examples:
  titans info --preset 760m
  titans info --preset 760m --variant lmm --model.chunk_size 64
  titans info --checkpoint runs/mal""",
    "serve": """\
examples:
  titans serve --model runs/mal                             on http://127.0.0.1:8000/v1
  TITANS_TOKEN=$(openssl rand -hex 32) titans serve --model runs/mal --host 0.0.0.0
  titans serve --model runs/mal --tokens clients.txt        a client to each token
  titans serve --model runs/mal --memory_mb 200 --disk_mb 20000 --folder /data/sessions

  curl http://127.0.0.1:8000/v1/completions -H 'content-type: application/json' \\
    -d '{"model": "mac", "prompt": "import ", "max_tokens": 32}'

Sessions, their limits and what survives a crash: docs/serving.md.""",
}

SHORT = {
    "--data": "--data.files",
    "--variant": "--model.variant",
    "--steps": "--train.max_steps",
}
SHOWN = {  # by --help; --help-all shows the rest
    "train": {
        "": "config print_config preset resume",
        "data.": "files validation test tokenizer sequence_length",
        "model.": "variant hidden_size num_hidden_layers num_attention_heads intermediate_size "
        "memory_depth chunk_size segment_len window num_persistent",
        "train.": "output_dir max_steps max_minutes per_device_train_batch_size learning_rate "
        "warmup_steps gate_penalty carry bf16 eval_steps eval_bytes save_steps seed",
    },
    "forecast train": {
        "": "file config print_config horizons output resume carried",
        "data.": "date_column columns split context_length history_length uneven_dates",
        "model.": "variant hidden_size num_hidden_layers num_attention_heads intermediate_size "
        "chunk_size patch_length patch_stride scaling loss quantiles channel_mixing linear_skip "
        "dropout",
        "train.": "num_train_epochs max_steps patience validation_stride "
        "per_device_train_batch_size learning_rate weight_decay seed",
    },
    "dna train": {
        "": "config print_config preset resume start",
        "data.": "files dev test genome reverse_complement split_seed sequence_length",
        "model.": "variant hidden_size num_hidden_layers num_attention_heads intermediate_size "
        "memory_depth chunk_size segment_len window num_persistent classifier_pooling",
        "train.": "output_dir max_steps max_minutes per_device_train_batch_size learning_rate "
        "warmup_steps weight_decay bf16 eval_steps save_steps load_best_model_at_end seed",
    },
    "info": {
        "": "config print_config preset checkpoint",
        "model.": "variant vocab_size hidden_size num_hidden_layers num_attention_heads "
        "intermediate_size memory_depth chunk_size segment_len window num_persistent",
    },
}
RUN_FILE = "run.yaml"
FIELD = re.compile(r"^ {4,8}([a-z]\w*(?:, \w+)*)(?: \(.*\))?:\s", re.MULTILINE)  # in a docstring


def subcommand(
    command: str, commands: Mapping[str, Callable[[list[str]], int]], help: str, argv: list[str]
) -> int:
    """Runs the part of a command that has several; without one, or asked for it, prints help."""
    name, *options = argv or ["--help"]
    if name in ("-h", "--help", "help"):
        print(help)
        return 0
    if name not in commands:
        raise ValueError(f"{name!r} is no command of {command}: choose {', '.join(commands)}")
    return commands[name](options)


def new_parser(command: str, description: str) -> "ArgumentParser":
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog=f"titans {command}",
        usage=f"titans {command} [options]",
        description=description,
        epilog=EXAMPLES[command],
        formatter_class=Formatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="a YAML file of options")
    return parser


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Help in two columns, with the default where there is one."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=40)

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.dest == "print_config":
            return "print the options as YAML and stop"
        shown = action.default not in (None, argparse.SUPPRESS, (), [])
        return (action.help or "") + (" (%(default)s)" if shown and action.option_strings else "")

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return action.dest.split(".")[-1].upper()


def add_fields(parser: "ArgumentParser", group: str, cls: type, skip: Iterable[str] = ()) -> None:
    """`--group.NAME` for each field of a dataclass, with the help of its docstring."""
    section = parser.add_argument_group(f"--{group}.X")
    docs = documented(cls)
    for field in dataclasses.fields(cls):
        if field.name in skip or not field.init:
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        several = field.type == Sequence[str]
        section.add_argument(
            f"--{group}.{field.name}",
            type=str if several else field.type,
            nargs="*" if several else None,
            default=list(default) if isinstance(default, tuple) else default,
            help=docs.get(field.name, ""),
            metavar=field.name.split("_")[-1].upper(),
        )


def documented(cls: type) -> dict[str, str]:
    """Field -> its text in the docstrings of the class and its bases, in one line."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, *parts = FIELD.split(base.__doc__ or "")
        for names, text in zip(parts[::2], parts[1::2], strict=True):
            line = " ".join(text.split("\n\n")[0].split()).replace("%", "%%")
            line = line if len(line) < 240 else line[:240].rsplit(" ", 1)[0] + " ..."
            docs |= {name.strip(): line for name in names.split(",")}
    return docs


def add_model_arguments(parser: "ArgumentParser", more: Sequence[str] = ()) -> None:
    """`--preset`, and `--model.X`: the fields of TitansConfig that describe a shape. `more`: names
    of models beside Titans and its baselines."""
    from transformers import PreTrainedConfig

    from pytitans.baseline import BASELINES
    from pytitans.models import TitansConfig
    from pytitans.models.configuration_titans import VARIANTS
    from pytitans.train import DEFAULT_RUN

    names = (*VARIANTS, *BASELINES, *more)
    parser.add_argument("--preset", type=str | None, help="a size of the paper: 170m, 340m, ...")
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    own = {"variant", "vocab_size", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"}
    add = parser.add_argument
    add("--model.variant", type=Literal[names], help="architecture; short: --variant")  # type: ignore - a tuple
    add("--model.vocab_size", type=int | None, help="rows of the embedding; the tokenizer's size")
    add_fields(parser, "model", TitansConfig, skip=inherited | own)
    parser.set_defaults({k: v for k, v in DEFAULT_RUN.items() if k.startswith("model.")})


def add_train_arguments(parser: "ArgumentParser") -> None:
    """`--train.X`, and the whole default run as defaults."""
    from pytitans.train import DEFAULT_RUN, TrainArguments

    add_fields(parser, "train", TrainArguments, skip={"parallelism_config"})  # cannot be written
    parser.set_defaults(DEFAULT_RUN)


def parse(parser: "ArgumentParser", command: str, argv: list[str]) -> "Namespace":
    """The options; --help lists the main ones, --help-all all. A preset sets model defaults."""
    if "--help-all" in argv:
        argv = ["--help"]
    elif "-h" in argv or "--help" in argv:
        hide_rare(parser, command)  # only here: jsonargparse does not save what it does not show
    silent = [option for option in argv if not option.startswith("--print_config")]
    if any(option.split("=")[0] in ("--preset", "--config") for option in argv):
        parser.set_defaults(preset_defaults(parser.parse_args(silent), command))
    return parser.parse_args(argv)


def preset_defaults(options: "Namespace", command: str) -> dict[str, Any]:
    """The preset's shape, and the paper's learning rate for it. Its vocabulary is for `info` alone:
    a tokenizer decides in training."""
    if getattr(options, "preset", None) is None:
        return {}
    from pytitans.baseline import BASELINES
    from pytitans.presets import PAPER_RATE, model_preset

    variant = "mac" if options.model.variant in BASELINES else options.model.variant
    preset = model_preset(options.preset, variant)
    known = {name for name in options.model.as_dict() if name != "variant"}
    known -= set() if command == "info" else {"vocab_size"}
    found = {f"model.{name}": value for name, value in preset.items() if name in known}
    return found if command == "info" else found | {"train.learning_rate": PAPER_RATE}


def hide_rare(parser: "ArgumentParser", command: str) -> None:
    if command in SHOWN:
        shown = {group + name for group, names in SHOWN[command].items() for name in names.split()}
        for action in parser._actions:
            if action.dest not in shown | {"help"}:
                action.help = argparse.SUPPRESS


def resumed(argv: list[str], output: str = "--train.output_dir") -> list[str]:
    """With --resume FOLDER: the options the run was started with come first, its folder last, as
    the option `output`."""
    values = [v for flag, v in pairwise(argv) if flag == "--resume"]
    values += [v.removeprefix("--resume=") for v in argv if v.startswith("--resume=")]
    if not values:
        return argv
    path = Path(values[-1]) / RUN_FILE
    if not path.is_file():
        raise ValueError(
            f"{values[-1]!r} holds no run: there is no {path}; start one without --resume"
        )
    return ["--config", str(path), *argv, output, values[-1]]


def long_name(option: str) -> str:
    """The option in full, with underscores: --steps=3 -> --train.max_steps=3."""
    name, equals, value = option.partition("=")
    if name.startswith("--") and name != "--help-all":
        name = "--" + name[2:].replace("-", "_")
    return SHORT.get(name, name) + equals + value
