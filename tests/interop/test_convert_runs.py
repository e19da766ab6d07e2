"""`jaxblip convert`: converted runs as sources, trained runs with frozen parts, and wrong input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from published_folders import INSTRUCTBLIP, publish, random_model, tokenizer_of
from tiny_checkpoints import read_all
from tiny_tasks import fast_jit

from jaxblip.cli import main
from jaxblip.config import default_config
from jaxblip.errors import UserError
from jaxblip.interop.convert import convert
from jaxblip.training.checkpoints import load_params
from jaxblip.training.initialize import frozen_params, initial_trainable
from jaxblip.models.positions import interpolate_positions
from jaxblip.training.loop import train
from jaxblip.training.setup import prepare


@pytest.fixture(autouse=True)
def fast_compilation(monkeypatch):
    monkeypatch.setattr(jax, "jit", fast_jit)


def test_a_converted_run_is_a_source_and_nothing_to_go_on_with(tmp_path):
    publish(tmp_path / "hf", "Blip2ForConditionalGeneration")
    convert(str(tmp_path / "hf"), str(tmp_path / "run"))
    config = tiny_stage2(all=tmp_path / "run")
    with pytest.raises(UserError, match="no state of a training"):
        prepare(config, str(tmp_path / "run"))
    setup = prepare(config, str(tmp_path / "other"))
    assert len(setup.tokenizer) == setup.config.model.language_model.vocab_size
    frozen, references = frozen_params(setup.task, setup.mesh)
    params = initial_trainable(setup.task, setup.mesh) | frozen
    saved = load_params(tmp_path / "run")
    for path, leaf in flatten_dict(params).items():
        expected = flatten_dict(saved)[path]
        np.testing.assert_array_equal(leaf, expected.astype(leaf.dtype))
    assert references["vision"] | {"fingerprint": ""} == {
        "source": str(tmp_path / "run"), "revision": "0", "fingerprint": "",
    }  # fmt: skip


def test_a_trained_run_with_frozen_parts(tmp_path):
    """Frozen parts come from their sources, as they were in the run: here in bfloat16."""
    publish(tmp_path / "hf", "Blip2ForConditionalGeneration")
    config = tiny_stage2(all=tmp_path / "hf")
    train(config, str(tmp_path / "run"))
    lines = "\n".join(convert(str(tmp_path / "run"), str(tmp_path / "out")))
    assert "Written as Blip2ForConditionalGeneration" in lines
    theirs, ours = read_all(tmp_path / "hf"), read_all(tmp_path / "out")
    assert theirs.keys() == ours.keys()
    for key, tensor in ours.items():
        assert tensor.dtype == torch.float32
        is_frozen = key.startswith(("vision_model.e", "language_model."))
        assert torch.equal(tensor, theirs[key].bfloat16().float()) == is_frozen, key
    # The source is not what it was: the export says so.
    random_model("Blip2ForConditionalGeneration", seed=1).save_pretrained(tmp_path / "hf")
    with pytest.raises(UserError, match="frozen part 'language_model'"):
        convert(str(tmp_path / "run"), str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_the_image_encoder_of_a_run_at_another_image_size(tmp_path):
    """Of one that trained here as of a published one: its positions are interpolated."""
    publish(tmp_path / "hf", "CLIPModel")
    config = tiny("clip", all=tmp_path / "hf")
    train(config, str(tmp_path / "run"))
    trained = load_params(tmp_path / "run")["vision"]["position_embedding"]
    other = tiny("blip_caption", vision=tmp_path / "run")
    with other.unlocked():
        other.data.image_size_px = 12  # 3 x 3 patches, where there were 2 x 2
    setup = prepare(other, str(tmp_path / "other"))
    table = initial_trainable(setup.task, setup.mesh)["vision"]["position_embedding"]
    np.testing.assert_array_equal(table, interpolate_positions(trained, 2, 3))


def tiny_stage2(**init):
    return tiny("stage2", **init)


def tiny(task, **init):
    config = default_config(task)
    config.steps, config.batch_size, config.optimizer.warmup_steps = 1, 8, 0
    config.data.train.source, config.data.num_workers = "shapes:train", 0
    config.data.image_size_px, config.data.max_text_tokens = 8, 6
    config.optimizer.peak_lr = 0.1
    config.init.update({part: str(source) for part, source in init.items()})
    return config.lock()


def failing(tmp_path, arguments, capfd):
    capfd.readouterr()
    assert main(["convert", *(f"--{name}={value}" for name, value in arguments.items())]) == 2
    message = capfd.readouterr().err
    assert message.startswith("jaxblip: error: ")
    assert not list(tmp_path.glob(".*.new"))
    return message


FAILING = """
import sys
from jaxblip.cli import main
from jaxblip.errors import UserError
from jaxblip.interop.load import StoredParam

def fail(self, array, layer, index, fill=StoredParam._fill):
    if layer == 1:
        raise UserError("Layer 1 cannot be read: fetch it again.")
    fill(self, array, layer, index)

StoredParam._fill = fail
sys.exit(main(["convert", f"--from={sys.argv[1]}", f"--to={sys.argv[2]}"]))
"""


def test_an_error_in_the_midst_of_writing_is_one_sentence(tmp_path):
    """Orbax's threads would print their stacks, past Python's own stderr: so as a process."""
    publish(tmp_path / "hf", "OPTForCausalLM")
    command = [sys.executable, "-c", FAILING, str(tmp_path / "hf"), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stderr == "jaxblip: error: Layer 1 cannot be read: fetch it again.\n"
    assert (done.returncode, done.stdout) == (2, "")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_instructblip_without_its_second_tokenizer(tmp_path, capfd):
    publish(tmp_path / "hf", INSTRUCTBLIP, "t5")
    shutil.rmtree(tmp_path / "hf/qformer_tokenizer")
    message = failing(tmp_path, {"from": tmp_path / "hf", "to": tmp_path / "run"}, capfd)
    assert "has no tokenizer in 'qformer_tokenizer'" in message and message.count("\n") == 1


def test_errors(tmp_path, capfd):
    target = {"to": tmp_path / "target"}
    (tmp_path / "empty").mkdir()
    assert "no model.safetensors" in failing(tmp_path, {"from": tmp_path / "empty"} | target, capfd)

    publish(tmp_path / "clip", "CLIPVisionModel")
    message = failing(tmp_path, {"from": tmp_path / "clip"} | target, capfd)
    assert "one part of a model" in message and "config.init.vision" in message

    config = json.loads((tmp_path / "clip/config.json").read_text())
    config |= {"architectures": ["FlavaModel"], "model_type": "flava"}
    (tmp_path / "clip/config.json").write_text(json.dumps(config))
    message = failing(tmp_path, {"from": tmp_path / "clip"} | target, capfd)
    assert "a FlavaModel" in message and message.count("\n") == 1
    assert "CLIPModel, CLIPVisionModel" in message

    message = failing(tmp_path, {"from": "hf:no/such-model"} | target, capfd)
    assert "no Hugging Face repository of that name" in message and "'no/such-model'" in message
    torch.save({"model": {"a": torch.zeros(2)}, "args": main}, tmp_path / "code.pth")
    message = failing(tmp_path, {"from": tmp_path / "code.pth"} | target, capfd)
    assert "would run code" in message and message.count("\n") == 1

    publish(tmp_path / "opt", "OPTForCausalLM")
    full = {"to": tmp_path / "opt", "from": tmp_path / "opt"}
    assert "is there already" in failing(tmp_path, full, capfd)
    for file in (*tmp_path.glob("opt/tok*"), *tmp_path.glob("opt/special*")):
        file.unlink()
    message = failing(tmp_path, {"from": tmp_path / "opt"} | target, capfd)
    assert "has no tokenizer" in message and "--tokenizer" in message
    config = json.loads((tmp_path / "opt/config.json").read_text()) | {"ffn_dim": 30}
    (tmp_path / "opt/config.json").write_text(json.dumps(config))
    tokenizer_of("opt").save_pretrained(tmp_path / "tokenizer")
    arguments = {"from": tmp_path / "opt", "tokenizer": tmp_path / "tokenizer"} | target
    assert "Of another shape" in failing(tmp_path, arguments, capfd)
    assert not (tmp_path / "target").exists()
