"""Sources of weights: what each gives, and what is said where one gives nothing."""

from __future__ import annotations

import argparse
import builtins
import json
import types

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from jaxblip.errors import UserError
from jaxblip.interop.files import open_weights
from tiny_checkpoints import random_model, read_all, save


def assert_same_as_library(weights, folder):
    expected = read_all(folder)
    assert sorted(weights.tensors) == sorted(expected)
    for name, tensor in expected.items():
        info, array = weights.tensors[name], weights.read(name)
        assert array.shape == info.shape == tuple(tensor.shape)
        assert array.dtype == info.dtype == np.dtype(str(tensor.dtype).removeprefix("torch."))
        as_float = tensor.float().numpy()
        np.testing.assert_array_equal(array.astype(np.float32), as_float)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("max_shard_size", ["10GB", "10KB"])
def test_folder(dtype, max_shard_size, tmp_path):
    model = random_model("CLIPModel").to(getattr(torch, dtype))
    save(model, tmp_path, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size == "10KB")
    weights = open_weights(tmp_path)
    assert weights.config["model_type"] == "clip"
    assert weights.folder == tmp_path
    assert_same_as_library(weights, tmp_path)
    with pytest.raises(ValueError, match="read-only"):
        weights.read("visual_projection.weight")[0] = 0.0


def test_one_file(tmp_path):
    arrays = {
        "scalar": np.array(3.0, np.float16),
        "empty": np.zeros((0, 3), np.int64),
        "matrix": np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3),
        "flags": np.array([True, False]),
    }
    save_file(arrays, tmp_path / "weights.safetensors")
    for source in (tmp_path / "weights.safetensors", tmp_path):  # the folder's only one
        weights = open_weights(source)
        assert weights.config == {}
        assert set(weights.tensors) == set(arrays)
        for name, array in arrays.items():
            assert weights.tensors[name].shape == array.shape
            assert weights.tensors[name].dtype == array.dtype
            np.testing.assert_array_equal(weights.read(name), array)


def test_repository_from_the_cache(tmp_path, monkeypatch):
    repository = tmp_path / "models--someone--tiny"
    save(random_model("CLIPModel"), repository / "snapshots" / "0123abcd")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for source in ("someone/tiny", "hf:someone/tiny", "someone/tiny@main"):
        weights = open_weights(source)
        assert weights.revision == "0123abcd" and weights.source == source
        assert_same_as_library(weights, repository / "snapshots" / "0123abcd")
    # Without network, as here, or with a cache that lacks it.
    with pytest.raises(UserError) as error:
        open_weights("hf:nothing")
    assert str(error.value) == (
        "There is no folder or file 'nothing', and no Hugging Face repository of that name in the "
        "cache, and the hub was not reached: correct the path or the name, or fetch it where there "
        "is network."
    )


@pytest.mark.parametrize("name", ["runs/typo", "typo", "runs/typo@main"])
def test_a_name_without_hf_asks_the_cache_only(name, tmp_path, monkeypatch):
    """It may be a mistyped path, for which nobody waits for the network."""

    def ask(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", ask)
    with pytest.raises(UserError, match=f"no folder or file '{name.split('@')[0]}'.*correct the p"):
        open_weights(name)
    with pytest.raises(AssertionError, match="the hub was asked"):
        open_weights("hf:some/name")


@pytest.mark.parametrize("wrong", ["name", "connection"])
def test_a_repository_that_cannot_be_read(wrong, monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    def fail(name, **kwargs):
        if wrong == "connection":
            raise LocalEntryNotFoundError("Got: ConnectError: [Errno -2] Name or service not known")
        response = types.SimpleNamespace(headers={}, request=None)
        raise RepositoryNotFoundError("404 Client Error.", response=response)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError) as error:
        open_weights("hf:someone/else")
    assert "'someone/else', and no Hugging Face repository of that name" in str(error.value)
    assert "Error" not in str(error.value)
    assert ("log in" if wrong == "name" else "where there is network") in str(error.value)


def test_only_weights_configs_and_tokenizers_are_fetched(tmp_path, monkeypatch):
    calls = {}

    def fetch(name, **kwargs):
        calls.update(kwargs, name=name)
        save(random_model("CLIPModel"), tmp_path)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    open_weights("hf:someone/tiny@v1.0")
    from huggingface_hub.utils import filter_repo_objects

    repository = [
        "model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json",
        "tokenizer.json", "merges.txt", "spiece.model", "chat_template.jinja",
        "qformer_tokenizer/tokenizer_config.json", "pytorch_model.bin",
        "consolidated.safetensors", "onnx/model.onnx", "onnx/config.json",
        "flax_model.msgpack", "modeling_custom.py", "README.md",
    ]  # fmt: skip
    patterns = {key: calls[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(repository, **patterns)) == repository[:8]
    assert calls["name"] == "someone/tiny" and calls["revision"] == "v1.0"


# PyTorch files


def test_torch_file(tmp_path):
    state = {
        "a": torch.randn(3, 4),
        "b": torch.randn(3, 4).bfloat16(),
        "turned": torch.randn(3, 4).T,
        "scalar": torch.tensor(0.5),
        "ids": torch.arange(3),
    }
    for content in (state, {"model": state, "epoch": 1}, {"state_dict": state}):
        torch.save(content, tmp_path / "weights.pth")
        weights = open_weights(tmp_path / "weights.pth")
        assert set(weights.tensors) == set(state)
        for name, tensor in state.items():
            array = weights.read(name)
            assert weights.tensors[name].dtype == array.dtype
            np.testing.assert_array_equal(array.astype(np.float32), tensor.float().numpy())
    assert weights.tensors["b"].dtype == ml_dtypes.bfloat16


class Code:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_file_that_carries_code_is_refused_and_does_not_run(tmp_path):
    mark = tmp_path / "mark"
    torch.save({"model": {"a": torch.zeros(2)}, "more": Code(mark)}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match=r"bad\.pth' holds more than weights.*refused"):
        open_weights(tmp_path / "bad.pth")
    assert not mark.exists()
    torch.save({"model": {}, "args": argparse.Namespace()}, tmp_path / "args.pth")
    with pytest.raises(UserError, match=r"holds more than weights, a argparse\.Namespace"):
        open_weights(tmp_path / "args.pth")


def test_torch_files_that_cannot_be_read(tmp_path):
    old, junk, empty = (tmp_path / name for name in ("old.pth", "junk.pth", "empty.pth"))
    torch.save({"a": torch.zeros(2)}, old, _use_new_zipfile_serialization=False)
    junk.write_bytes(b"no weights")
    torch.save({"epoch": 3}, empty)
    for file, message in (old, "older than PyTorch 1.6"), (junk, "damaged"), (empty, "no table"):
        with pytest.raises(UserError, match=message):
            open_weights(file)


def test_without_torch_the_message_says_to_install_it(tmp_path, monkeypatch):
    torch.save({"a": torch.zeros(2)}, tmp_path / "weights.pth")
    original = builtins.__import__

    def without_torch(name, *args, **kwargs):
        if name == "torch":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    with pytest.raises(UserError, match="pip install torch"):
        open_weights(tmp_path / "weights.pth")


# Bad sources


def test_bad_names(tmp_path):
    (tmp_path / "weights.npz").write_bytes(b"")
    for source, message in [
        (tmp_path / "absent" / "folder", "There is no folder or file"),
        ("./typo", "There is no folder or file"),
        ("../runs/typo", "There is no folder or file"),
        ("runs/demo/typo", "There is no folder or file"),
        ("absent.safetensors", "There is no folder or file"),
        ("hf:three/part/name", "no name of a Hugging Face repository"),
        (tmp_path / "absent.pth", "There is no folder or file"),
        ("absent.pth", "There is no folder or file"),
        (tmp_path / "weights.npz", "none that weights are read from"),
        (tmp_path, "no model.safetensors and no model.safetensors.index.json: name another"),
    ]:
        with pytest.raises(UserError, match=message):
            open_weights(source)


def test_folders_that_are_not_whole(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"only pytorch_model\.bin: name that file itself"):
        open_weights(tmp_path)
    for name in ("a", "b"):
        save_file({name: np.zeros(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match="2 safetensors files and no model.safetensors.index.json"):
        open_weights(tmp_path)

    def index(**weight_map):
        text = json.dumps({"weight_map": weight_map})
        (tmp_path / "model.safetensors.index.json").write_text(text)

    index(a="a.safetensors", b="b.safetensors")
    assert set(open_weights(tmp_path).tensors) == {"a", "b"}
    index(a="a.safetensors", c="b.safetensors")
    with pytest.raises(UserError, match="names the tensor 'c', but no file has it"):
        open_weights(tmp_path)
    index(a="a.safetensors", c="c.safetensors")
    with pytest.raises(UserError, match=r"c\.safetensors is missing"):
        open_weights(tmp_path)
    save_file({"a": np.zeros(2)}, tmp_path / "c.safetensors")
    with pytest.raises(UserError, match="The tensor 'a' is in two files"):
        open_weights(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(UserError, match="is no JSON"):
        open_weights(tmp_path)


def test_damaged_safetensors(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": np.zeros((20, 3), np.float32), "b": np.ones(4)}, file)
    whole = file.read_bytes()

    def header(**changes):
        fields = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes
        text = json.dumps({"a": fields}).encode()
        return len(text).to_bytes(8, "little") + text + bytes(8)

    file.write_bytes(header())
    assert open_weights(tmp_path).tensors["a"].shape == (2,)
    for content in [
        whole[:-1], whole[:40], whole[:4], b"", b"\x08" + bytes(7) + b"no json!",
        b"\xff" * 64, header(dtype="F12"), header(shape=[3]), header(data_offsets=[-4, 4]),
        header(data_offsets=[8, 16]), header(shape="no"),
    ]:  # fmt: skip
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"no whole safetensors file.*again"):
            open_weights(tmp_path)
