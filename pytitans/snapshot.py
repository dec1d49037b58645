"""A cache as a file: safetensors that a crash cannot spoil and that no other model can mistake.

The header says what the file holds: the format's version, the fingerprint of the model that read
the text, the tokens read, the caller's metadata, how the states nest, and a SHA-256 of the whole
file, taken with the digest's own place filled with zeros: any byte that changes is noticed.
"""

import dataclasses
import hashlib
import json
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from pytitans.attention import KeysValues, WindowState
from pytitans.blocks import MACState, MAGState, MALState
from pytitans.memory import LayerState
from pytitans.ops import MemoryState

VERSION = 1
STATES = {
    kind.__name__: kind
    for kind in (KeysValues, LayerState, MACState, MAGState, MALState, MemoryState, WindowState)
}
UNREAD = b"0" * 64  # in the digest's place while the digest is taken
DIGEST = b'"sha256":"'
WITHOUT_EFFECT = {  # fields of a configuration that change no state
    "use_cache", "initializer_range", "tie_word_embeddings", "classifier_pooling",
    "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip
STALE = 3600  # seconds after which a temporary file belongs to a process that was killed


class Snapshot(NamedTuple):
    """What a file holds: a state for each layer, and the tokens they have read."""

    states: list[Any]
    tokens: int


def model_fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 of all that decides what a model makes of a text: weights, their types, and shape.

    The head has no part in it: a TitansModel continues what its TitansForCausalLM has read.
    Nothing is remembered: each call reads every weight once, about half a second a gigabyte.
    """
    body = model.base_model
    fields = {f.name for f in dataclasses.fields(model.config)}  # inherited ones too
    fields -= {f.name for f in dataclasses.fields(PreTrainedConfig)} | WITHOUT_EFFECT
    shape = {name: getattr(model.config, name) for name in fields}
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode())
    for name, weight in sorted(body.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        raw = weight.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(memoryview(raw.numpy()))
    return digest.hexdigest()


def write_snapshot(
    snapshot: Snapshot, path: str | Path, fingerprint: str, metadata: Mapping[str, Any]
) -> None:
    """Replaces the file at once: whoever looks sees the old one or the new one, whole."""
    tensors: dict[str, Tensor] = {}
    nesting = pack(snapshot.states, tensors, {})
    header = {
        "version": str(VERSION),
        "model": fingerprint,
        "tokens": str(snapshot.tokens),
        "metadata": json.dumps(dict(metadata)),
        "states": json.dumps(nesting),
        "sha256": UNREAD.decode(),
    }
    data = save(tensors, header)
    digest = hashlib.sha256(data).hexdigest().encode()
    replace_file(Path(path), data.replace(DIGEST + UNREAD, DIGEST + digest, 1))


def read_snapshot(path: str | Path, fingerprint: str) -> Snapshot:
    """The file's states, on the CPU. ValueError, naming the file, unless it is whole and was made
    by the model of this fingerprint."""
    data = Path(path).read_bytes()
    header = read_header(path, data, len(data))
    place = data.find(DIGEST) + len(DIGEST)
    with_zeros = data[:place] + UNREAD + data[place + len(UNREAD) :]
    if hashlib.sha256(with_zeros).hexdigest() != header["sha256"]:
        raise damaged(path, "its bytes do not fit its checksum")
    if header["model"] != fingerprint:
        raise ValueError(
            f"{path} was read by another model (fingerprint {header['model'][:12]}, this one's is "
            f"{fingerprint[:12]}): load it with the model, weights and dtype, that made it"
        )
    # safetensors hands out views into one buffer: each gets a place of its own, aligned
    tensors = {name: tensor.clone() for name, tensor in load(data).items()}
    return Snapshot(unpack(json.loads(header["states"]), tensors), int(header["tokens"]))


def describe_snapshot(path: str | Path) -> dict[str, Any]:
    """The header in plain types: version, model, tokens, metadata, bytes. Only it is read."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(8)
        data = start + file.read(min(int.from_bytes(start, "little"), size))
    header = read_header(path, data, size)
    return {
        "version": int(header["version"]),
        "model": header["model"],
        "tokens": int(header["tokens"]),
        "metadata": json.loads(header["metadata"]),
        "bytes": size,
    }


def read_header(path: str | Path, data: bytes, size: int) -> dict[str, str]:
    """The header of a file of `size` bytes that begins with `data`."""
    end = 8 + int.from_bytes(data[:8], "little")
    if len(data) < 8 or end > size:
        raise damaged(path, "it is no safetensors file, or was cut off")
    try:
        entries = json.loads(data[8:end])
        header = entries.pop("__metadata__")
        whole = end + max((x["data_offsets"][1] for x in entries.values()), default=0)
        version = header["version"]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise damaged(path, f"its header cannot be read: {error!r}") from error
    if version != str(VERSION):
        raise ValueError(
            f"{path} is a memory of format version {version}, this pytitans reads version "
            f"{VERSION}: use the pytitans that wrote it, or read the text again"
        )
    if size != whole:
        raise damaged(path, f"it has {size:,} bytes instead of {whole:,}")
    if missing := {"model", "tokens", "metadata", "states", "sha256"} - header.keys():
        raise damaged(path, f"its header lacks {', '.join(sorted(missing))}")
    return header


def damaged(path: str | Path, why: str) -> ValueError:
    return ValueError(
        f"{path} holds no memory that can be loaded ({why}): "
        "restore it from a copy, or read the text again"
    )


def pack(state: Any, tensors: dict[str, Tensor], known: dict) -> Any:
    """The nesting as JSON. Tensors go into `tensors`, one that is used twice goes there once."""
    if isinstance(state, Tensor):
        key = (state.data_ptr(), state.shape, state.stride(), state.dtype, state.device)
        if key not in known:
            known[key] = str(len(tensors))
            tensors[known[key]] = state.detach().contiguous().clone()
        return {"tensor": known[key]}
    if isinstance(state, (tuple, list)):
        if not hasattr(state, "_fields"):
            return [pack(x, tensors, known) for x in state]
        name = type(state).__name__
        if STATES.get(name) is not type(state):
            raise TypeError(f"{name} is no state that can be saved: add it to snapshot.STATES")
        fields = zip(state._fields, state, strict=True)  # type: ignore - of a NamedTuple
        return {"is": name, **{k: pack(v, tensors, known) for k, v in fields}}
    if state is None or isinstance(state, int):
        return state
    raise TypeError(f"a {type(state).__name__} in a state cannot be saved")


def unpack(nesting: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(nesting, list):
        return tuple(unpack(x, tensors) for x in nesting)
    if not isinstance(nesting, dict):
        return nesting
    if "tensor" in nesting:
        return tensors[nesting["tensor"]]
    fields = {k: unpack(v, tensors) for k, v in nesting.items() if k != "is"}
    return STATES[nesting["is"]](**fields)


def replace_file(path: Path, data: bytes) -> None:
    """Writes beside the file, flushes, renames over it, flushes the folder."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        if left.stat().st_mtime < time.time() - STALE:
            left.unlink(missing_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere a folder cannot be opened, nor needs to be
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
