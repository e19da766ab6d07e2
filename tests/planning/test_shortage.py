"""A step that does not fit the memory ends with the planner's breakdown, and with what fits."""

from pathlib import Path

import jax
import pytest
from tiny_tasks import shallow, tiny_config

from jaxblip.cli import main
from jaxblip.data import run_tokenizers
from jaxblip.errors import UserError
from jaxblip.planning import compilation, shortage, topologies
from jaxblip.training import loop

ROOT = Path(__file__).parents[2]
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes."


def test_an_allocators_error_becomes_a_breakdown(monkeypatch):
    config = shallow(tiny_config("clip"))
    config.mesh.update(data=1, fsdp=1, tensor=-1)
    needed = compilation.compile_step(config, topologies.parse("local")).memory
    monkeypatch.setattr(topologies, "capacity", lambda topology: needed.total - 1)
    with pytest.raises(UserError) as found:
        with shortage.explained_shortage(config):
            raise jax.errors.JaxRuntimeError(OUT_OF_MEMORY)
    first, breakdown, nearest, *_ = str(found.value).splitlines()
    assert "does not fit the memory of the 8 device(s) at batch_size=8" in first
    assert "GiB a chip: parameters that train" in breakdown
    assert nearest.startswith("This fits: --config.")


def test_other_errors_stay_what_they_are():
    error = jax.errors.JaxRuntimeError("INTERNAL: something else")
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        with shortage.explained_shortage(tiny_config("clip")):
            raise error


def test_a_training_ends_so_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    def step(state, frozen, batch):
        raise jax.errors.JaxRuntimeError(OUT_OF_MEMORY)

    monkeypatch.setattr(loop, "compiled_step", lambda *_: step)
    monkeypatch.setattr(shortage, "shortage", lambda config: ["It does not fit:", "why"])
    monkeypatch.setattr(run_tokenizers, "_TOKENIZER_EXAMPLES", 200)
    fields = {
        "steps": 2,
        "optimizer.warmup_steps": 1,
        "batch_size": 16,
        "eval.source": "",
        "data.image_size_px": 24,
        "data.num_workers": 0,
        "model.vision.num_layers": 1,
        "model.vision.width": 32,
        "model.text.num_layers": 1,
        "model.text.width": 32,
    }
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    workdir = tmp_path / "run"
    config = f"--config={ROOT}/configs/demo/vision.py"
    assert main(["train", config, f"--workdir={workdir}", *overrides]) == 2
    shown = capsys.readouterr().err
    assert "jaxblip: error: It does not fit:\njaxblip: error: why" in shown
    assert not workdir.exists()
