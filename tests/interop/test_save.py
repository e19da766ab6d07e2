"""Export: what the safetensors library and transformers read of it."""

from __future__ import annotations

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import transformers
from safetensors import safe_open

from jaxblip import sharding
from jaxblip.errors import UserError
from jaxblip.interop import entries as e
from jaxblip.interop.families import opt
from jaxblip.interop.files import open_weights
from jaxblip.interop.load import load_params, stored_params
from jaxblip.interop.save import save_params
from tiny_checkpoints import random_model, read_all, same_bits, save

LAYOUT = e.Layout((
    *e.plain("scale", "scale"),
    *e.embedding("words", "words"),
    *(entry for i in range(3) for entry in e.linear(f"layers.{i}", "layers/up", i)),
))  # fmt: skip


def params(dtype=np.float32):
    rng = np.random.default_rng(0)
    return {
        "scale": np.float32(2.5),
        "words": {"embedding": rng.normal(size=(5, 4)).astype(dtype)},
        "layers": {
            "up": {
                "kernel": rng.normal(size=(3, 4, 7)).astype(dtype),
                "bias": rng.normal(size=(3, 7)).astype(dtype),
            }
        },
    }


def expected(tree):
    up = tree["layers"]["up"]
    return {"scale": tree["scale"], "words.weight": tree["words"]["embedding"]} | {
        f"layers.{i}.{name}": array
        for i in range(3)
        for name, array in (("weight", up["kernel"][i].T), ("bias", up["bias"][i]))
    }


def assert_holds(folder, tree):
    tensors = read_all(folder)
    wanted = expected(tree)
    assert sorted(tensors) == sorted(wanted)
    for name, array in wanted.items():
        assert str(tensors[name].dtype) == f"torch.{array.dtype}"
        np.testing.assert_array_equal(tensors[name].float().numpy(), np.asarray(array, np.float32))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_one_file_is_read_by_the_library(dtype, tmp_path):
    tree = params(dtype)
    assert save_params(tree, LAYOUT, tmp_path, {"a": 1}, metadata={"step": "12"}) == ()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert_holds(tmp_path, tree)
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": 1}
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt", "step": "12"}
    weights = open_weights(tmp_path)
    for name, array in expected(tree).items():
        np.testing.assert_array_equal(weights.read(name), array)
    # Every tensor is aligned to its own width, mixed as they are.
    header, data = (tmp_path / "model.safetensors").read_bytes(), {}
    length = int.from_bytes(header[:8], "little")
    assert length % 8 == 0
    data = json.loads(header[8 : 8 + length])
    for name, info in data.items():
        if name != "__metadata__":
            assert info["data_offsets"][0] % weights.tensors[name].dtype.itemsize == 0


def test_shards_and_their_index(tmp_path):
    tree = params()
    save_params(tree, LAYOUT, tmp_path, {}, max_shard_bytes=200)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert len(files) == 3
    assert files[0] == "model-00001-of-00003.safetensors"
    assert set(index["weight_map"].values()) == set(files)
    for file in files:
        with safe_open(tmp_path / file, "np") as opened:
            names = list(opened.keys())
            assert sum(opened.get_tensor(name).nbytes for name in names) <= 200
            assert {index["weight_map"][name] for name in names} == {file}
    sizes = [array.nbytes for array in expected(tree).values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert index["metadata"]["total_parameters"] == sum(sizes) // 4
    assert_holds(tmp_path, tree)


def test_shards_are_loaded_by_transformers(tmp_path):
    folder = save(random_model("OPTForCausalLM"), tmp_path / "theirs")
    weights = open_weights(folder)
    config = opt.opt_config(weights.config)
    layout = opt.opt_layout(config)
    flat = {}
    for entry in layout.entries:
        (slot,) = entry.ours
        array = weights.read(entry.theirs)
        if slot.path.endswith("kernel"):
            inputs = 2 if "/out/" in slot.path else 1
            heads = "attention/" in slot.path
            array = array.T.reshape((2, 8, 16) if inputs == 2 else (16, 2, 8)) if heads else array.T
        elif slot.path.split("/")[-2] in e.QKV:
            array = array.reshape(2, 8)
        flat.setdefault(slot.path, []).append(array)
    tree = {}
    for path, arrays in flat.items():
        *parts, leaf = path.split("/")
        at = tree
        for part in parts:
            at = at.setdefault(part, {})
        at[leaf] = np.stack(arrays) if path.startswith("layers/") else arrays[0]
    out = tmp_path / "ours"
    save_params(tree, layout, out, opt.hf_opt_config(config), max_shard_bytes=4000)
    assert len(list(out.glob("*.safetensors"))) > 2
    _, info = transformers.OPTForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    same_bits(out, folder)


def test_sharded_arrays_are_written_whole(tmp_path):
    tree = jax.tree.map(np.asarray, params())
    tree["words"]["embedding"] = np.arange(32, dtype=np.float32).reshape(8, 4)
    tree["layers"]["up"]["kernel"] = np.arange(96, dtype=np.float32).reshape(3, 4, 8)
    tree["layers"]["up"]["bias"] = np.arange(24, dtype=np.float32).reshape(3, 8)
    for number, sizes in enumerate([{"data": 8}, {"fsdp": 2, "tensor": 4}, {"fsdp": 4, "data": 2}]):
        mesh = sharding.make_mesh(sizes)
        names = {**tree, "token_embedding": tree["words"]}
        placed = sharding.tree_shardings({k: names[k] for k in ("token_embedding", "layers")}, mesh)
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        on_mesh = jax.device_put(
            tree,
            {"scale": whole, "words": placed["token_embedding"], "layers": placed["layers"]},
        )
        out = tmp_path / str(number)
        save_params(on_mesh, LAYOUT, out, {})
        assert_holds(out, tree)


def test_from_file_to_file(tmp_path):
    save_params(params(), LAYOUT, tmp_path / "a", {})
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params())
    stored = stored_params(open_weights(tmp_path / "a"), LAYOUT, shapes)
    save_params(stored, LAYOUT, tmp_path / "b", {})
    same_bits(tmp_path / "b", tmp_path / "a")
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    loaded = load_params(
        open_weights(tmp_path / "b"), LAYOUT, shapes, jax.tree.map(lambda _: place, shapes)
    )
    jax.tree.map(np.testing.assert_array_equal, loaded, params())


def test_integers_keep_their_dtype(tmp_path):
    tree = params() | {"words": {"embedding": np.arange(6).reshape(2, 3)}}
    save_params(tree, LAYOUT, tmp_path, {}, dtype="bfloat16")
    dtypes = {name: str(tensor.dtype) for name, tensor in read_all(tmp_path).items()}
    assert dtypes.pop("words.weight") == "torch.int64"
    assert set(dtypes.values()) == {"torch.bfloat16"}
    assert json.loads((tmp_path / "config.json").read_text()) == {"dtype": "bfloat16"}


def test_chunks_of_large_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxblip.interop.save.CHUNK_BYTES", 20)
    save_params(params(), LAYOUT, tmp_path, {})
    assert_holds(tmp_path, params())


def test_a_folder_with_weights_is_refused(tmp_path):
    save_params(params(), LAYOUT, tmp_path, {})
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"has weights already \(model\.safetensors\)"):
        save_params(params(), LAYOUT, tmp_path, {})
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_parameters_that_the_target_needs(tmp_path):
    tree = params()
    del tree["words"]
    tree["layers"]["up"]["bias"] = tree["layers"]["up"]["bias"][:2]
    with pytest.raises(UserError, match="layers/up/bias, words/embedding"):
        save_params(tree, LAYOUT, tmp_path / "out", {})
    assert not (tmp_path / "out").exists()


def test_what_stays_behind_is_returned(tmp_path):
    tree = params() | {"itg_head": {"bias": np.zeros(3)}}
    assert save_params(tree, LAYOUT, tmp_path, {}) == ("itg_head/bias",)
    assert_holds(tmp_path, params())
