"""Files of weights: what is in them without reading it, and one tensor at a time.

Nothing is unpickled: safetensors are read here, PyTorch files by torch's weights-only loader, and
GGUF files by `interop.gguf`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxblip.errors import UserError
from jaxblip.interop.entries import Shape

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
CONFIG_FILE = "config.json"

# The types of the safetensors format that numpy and ml_dtypes have.
DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BF16": ml_dtypes.bfloat16,
        "F16": np.float16,
        "F32": np.float32,
        "F64": np.float64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "I8": np.int8,
        "I16": np.int16,
        "I32": np.int32,
        "I64": np.int64,
        "U8": np.uint8,
        "U16": np.uint16,
        "U32": np.uint32,
        "U64": np.uint64,
        "BOOL": np.bool_,
    }.items()
}

# What is fetched of a Hugging Face repository: weights, configs, tokenizers and chat templates.
# Other copies of the weights lie under other names (`consolidated…`, `pytorch_model.bin`) or in
# subfolders, of which only `qformer_tokenizer/` is wanted.
FETCHED = ("model*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
NOT_FETCHED = ("[!q]*/*",)
REPOSITORY = re.compile(r"(?P<name>\w[\w.-]*(/\w[\w.-]*)?)(@(?P<revision>[\w./-]+))?")
TORCH_SUFFIXES = (".pth", ".pt", ".bin")
GGUF_SUFFIX = ".gguf"
SUFFIXES = (".safetensors", *TORCH_SUFFIXES, GGUF_SUFFIX)
HUB = "hf:"


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor that has not been read."""

    shape: Shape
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class Weights:
    """The tensors of a checkpoint.

    Attributes:
      source: where they are from, for messages.
      tensors: what there is, by name.
      reader: reads the tensor of a name.
      config: the `config.json`; empty where there is none, as beside a LAVIS `.pth`.
      folder: where tokenizer and processor files may be.
      revision: the commit of a Hugging Face repository, else "".
    """

    source: str
    tensors: Mapping[str, TensorInfo]
    reader: Callable[[str], np.ndarray]
    config: Mapping[str, Any]
    folder: Path
    revision: str = ""

    def read(self, name: str) -> np.ndarray:
        """One tensor, bfloat16 as `ml_dtypes.bfloat16`.

        The array is a view of the file, not to be written to: only the parts that are used are
        read. What was read of safetensors leaves the process with the array; a PyTorch file stays
        mapped, and its pages are the system's to reclaim.
        """
        return self.reader(name)


def open_weights(source: str | os.PathLike) -> Weights:
    """The weights of a folder, a file or a Hugging Face repository; none is read yet.

    Args:
      source: a folder with a config.json and safetensors (one file, or several with an index); a
        .safetensors file; a PyTorch file of weights, such as a LAVIS `.pth`; a .gguf file
        (`interop.gguf`); or `hf:` and the name of a Hugging Face repository, with `@revision`
        behind it or not. `HF_HUB_OFFLINE=1` takes it from the cache alone, and so does a name
        without `hf:`.

    Raises:
      UserError: there is nothing of that name, a file is damaged, or it holds more than weights.
    """
    name = os.fspath(source)
    path = Path(name).expanduser()
    is_hub = name.startswith(HUB)
    if not is_hub and path.is_dir():
        return _open_folder(path, name)
    if not is_hub and path.is_file():
        if path.suffix == ".safetensors":
            return _open_safetensors([path], path.parent, name)
        if path.suffix in TORCH_SUFFIXES:
            return _open_torch(path, name)
        if path.suffix == GGUF_SUFFIX:
            from jaxblip.interop.gguf import open_gguf  # which is built on this module

            return open_gguf(path, name)
        raise UserError(
            f"The file {name!r} is none that weights are read from: name a folder of safetensors, "
            f"or a file that ends with .safetensors, {GGUF_SUFFIX} or {', '.join(TORCH_SUFFIXES)}."
        )
    repository = REPOSITORY.fullmatch(name.removeprefix(HUB))
    if repository is None or path.suffix in SUFFIXES:
        raise UserError(
            f"There is no folder or file {name!r}, and it is no name of a Hugging Face repository: "
            "correct the path."
        )
    # Without `hf:` it may be a mistyped path, which the hub is not asked about.
    folder = (_fetch if is_hub else _cached)(repository["name"], repository["revision"])
    weights = _open_folder(folder, name)
    return dataclasses.replace(weights, revision=folder.name)


def _cached(name: str, revision: str | None) -> Path:
    """The folder of the cache that holds a Hugging Face repository."""
    import huggingface_hub  # brings an HTTP client, which local files do without
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True)
        return Path(folder)
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"There is no folder or file {name!r}: correct the path, or write hf:{name} for a "
            "repository of the Hugging Face hub, which is not in the cache."
        ) from error


def _fetch(name: str, revision: str | None) -> Path:
    """The same, after a download if need be."""
    import huggingface_hub
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(FETCHED),
                ignore_patterns=list(NOT_FETCHED),
            )
        )
    except (LocalEntryNotFoundError, RepositoryNotFoundError) as error:
        offline = isinstance(error, LocalEntryNotFoundError)
        lacking = "in the cache, and the hub was not reached" if offline else "on the hub for you"
        fix = "fetch it where there is network" if offline else "log in where it is private"
        raise UserError(
            f"There is no folder or file {name!r}, and no Hugging Face repository of that name "
            f"{lacking}: correct the path or the name, or {fix}."
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"The Hugging Face repository {name!r} could not be read, and no folder has that name "
            f"({reason}): correct the name, or fetch it into the cache beforehand."
        ) from error


def _open_folder(folder: Path, source: str) -> Weights:
    index = folder / INDEX_FILE
    if index.is_file():
        # The map says which files count; its tensors are checked against the files themselves.
        listed = _json(index).get("weight_map", {})
        files = [folder / file for file in sorted(set(listed.values()))]
    elif (folder / SINGLE_FILE).is_file():
        listed, files = {}, [folder / SINGLE_FILE]
    else:
        listed, files = {}, sorted(folder.glob("*.safetensors"))
        if len(files) != 1:
            raise UserError(_no_weights(folder, source, files))
    weights = _open_safetensors(files, folder, source)
    if absent := sorted(set(listed) - set(weights.tensors)):
        raise UserError(
            f"{index} names the tensor {absent[0]!r}"
            f"{f' and {len(absent) - 1} more' if len(absent) > 1 else ''}, but no file has it: "
            "fetch the folder again."
        )
    return weights


def _no_weights(folder: Path, source: str, files: list[Path]) -> str:
    if files:
        return (
            f"{source!r} has {len(files)} safetensors files and no {INDEX_FILE} that says which "
            "belong together: name one of them."
        )
    suffixes = (*TORCH_SUFFIXES, GGUF_SUFFIX)
    others = sorted(file.name for file in folder.iterdir() if file.suffix in suffixes)
    other = f", only {others[0]}: name that file itself to read its weights" if others else ""
    return f"{source!r} has no {SINGLE_FILE} and no {INDEX_FILE}{other or ': name another source'}."


def _open_safetensors(files: list[Path], folder: Path, source: str) -> Weights:
    tensors: dict[str, TensorInfo] = {}
    places: dict[str, tuple[Path, int]] = {}
    for file in files:
        for name, (info, offset) in _read_header(file).items():
            if name in tensors:
                raise UserError(
                    f"The tensor {name!r} is in two files of {source!r}, {places[name][0].name} "
                    f"and {file.name}: remove the file that does not belong to them."
                )
            tensors[name], places[name] = info, (file, offset)

    def read(name: str) -> np.ndarray:
        info, (file, offset) = tensors[name], places[name]
        if not math.prod(info.shape):
            return np.empty(info.shape, info.dtype)
        # A mapping of its own for each tensor: when the array goes, so do its pages.
        flat = np.memmap(file, info.dtype, "r", offset, (math.prod(info.shape),))
        return flat.view(np.ndarray).reshape(info.shape)

    return Weights(source, tensors, read, _config(folder), folder)


def _read_header(file: Path) -> dict[str, tuple[TensorInfo, int]]:
    """Name to (what it is, position in the file) of a safetensors file.

    The format: the length of the header as 8 bytes, the header in JSON, the bytes of the tensors.
    """
    if not file.is_file():
        raise UserError(f"The file {file} is missing, although the index names it: fetch it.")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        start = 8 + length
        try:
            if size < start:
                raise ValueError("it ends within its header")
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            found = {}
            for name, tensor in header.items():
                if tensor["dtype"] not in DTYPES:
                    raise ValueError(f"{name!r} is of type {tensor['dtype']}, which is not covered")
                info = TensorInfo(tuple(tensor["shape"]), DTYPES[tensor["dtype"]])
                begin, end = tensor["data_offsets"]
                if end - begin != math.prod(info.shape) * info.dtype.itemsize or begin < 0:
                    raise ValueError(f"the place of {name!r} does not fit its shape")
                if start + end > size:
                    raise ValueError(f"it ends at {size} bytes, before the end of {name!r}")
                found[name] = info, start + begin
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{file} is no whole safetensors file: {error}. Fetch or export it again."
            ) from error
    return found


def _open_torch(file: Path, source: str) -> Weights:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{source!r} is a PyTorch file, and PyTorch is not installed: pip install torch."
        ) from error
    import pickle

    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        what = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
        raise UserError(
            f"{source!r} holds more than weights{f', a {what[1]}' if what else ''}: reading that "
            "would run code from the file, so it is refused. Save its state_dict alone, as a file "
            "of tensors, where you trust it."
        ) from error
    except (RuntimeError, EOFError) as error:
        raise UserError(
            f"{source!r} cannot be read piece by piece: it is damaged, or older than PyTorch 1.6. "
            "Fetch it again, or save it anew with torch.save."
        ) from error
    # LAVIS and most training scripts keep the weights under "model" or "state_dict".
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    tensors = {k: v for k, v in content.items() if isinstance(v, torch.Tensor)} if isinstance(
        content, Mapping
    ) else {}  # fmt: skip
    if not tensors:
        raise UserError(f"{source!r} holds no table of tensors: name a file with a state_dict.")
    infos = {}
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        try:
            infos[name] = TensorInfo(tuple(tensor.shape), np.dtype(_TORCH_DTYPES.get(dtype, dtype)))
        except TypeError as error:
            raise UserError(
                f"The tensor {name!r} of {source!r} is of type {dtype}, which is not covered."
            ) from error

    def read(name: str) -> np.ndarray:
        tensor, info = tensors[name].detach(), infos[name]
        if info.dtype == ml_dtypes.bfloat16:  # numpy knows it through ml_dtypes only
            return tensor.view(torch.int16).numpy().view(info.dtype)
        return tensor.numpy()

    return Weights(source, infos, read, _config(file.parent), file.parent)


_TORCH_DTYPES = {"bfloat16": ml_dtypes.bfloat16}


def _config(folder: Path) -> Mapping[str, Any]:
    file = folder / CONFIG_FILE
    return _json(file) if file.is_file() else {}


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is no JSON: {error}. Fetch it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__}, not named fields.")
    return content
