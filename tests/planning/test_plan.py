"""The planner: a small config compiled for real, and its search on compilations made up."""

import dataclasses
import functools
import importlib.util
import json

import jax
import pytest
from tiny_tasks import shallow, tiny_config

from jaxblip import cli, sharding
from jaxblip.config import default_config
from jaxblip.errors import UserError
from jaxblip.planning import compilation, hardware, report, topologies, worker
from jaxblip.planning.compilation import AbstractStep, Compilation, with_full_vocabulary
from jaxblip.planning.plan import mesh_of, plan

LOCAL = topologies.parse("local")
POD = topologies.parse("v5e:4x4")
GIB = hardware.GIB


def small(task="stage1", **mesh):
    config = shallow(tiny_config(task))
    config.mesh.update(mesh)
    return config


@pytest.fixture(scope="module")
def local():
    """A small stage 1 with its parameters in two parts, on the devices at hand."""
    return plan(small(data=-1, fsdp=2), LOCAL)


def test_what_is_there_before_a_step_is_what_the_compiler_counts(local):
    config = small(data=-1, fsdp=2)
    parts = AbstractStep.of(config)
    mesh = sharding.make_mesh(config.mesh)
    step = jax.jit(
        lambda *arguments: arguments,
        in_shardings=(
            sharding.tree_shardings(parts.state.params, mesh),
            sharding.tree_shardings(parts.frozen, mesh),
            sharding.batch_sharding(mesh),
        ),
    )
    compiled = step.lower(parts.state.params, parts.frozen, parts.batch).compile()
    memory = parts.memory(mesh.shape)
    expected = memory.trainable + memory.frozen + memory.batch
    assert compiled.memory_analysis().argument_size_in_bytes == expected
    assert dataclasses.replace(local.asked.memory, temporary=0) == memory
    assert memory.optimizer == pytest.approx(2 * memory.trainable, rel=1e-3)


def test_a_small_config_is_planned_on_the_devices_at_hand(local):
    asked = local.asked
    assert local.tried == (asked,) and local.best is asked and asked.fits
    assert (asked.num_chips, asked.mesh) == (8, {"data": 4, "fsdp": 2, "tensor": 1})
    # As much as the model has, and what each device repeats of the contrast of all rows; the
    # compiler writes some of the smallest products as sums.
    assert 0.99 < 8 * asked.operations_per_chip / asked.operations < 1.2
    assert asked.collectives["all-gather"] > 0 and asked.memory.temporary > 0
    assert asked.times == {} and asked.bound == ""
    text = "\n".join(report.lines(local))
    assert "data=4, fsdp=2, batch 8 (1 examples a chip)" in text
    assert "no data sheet of these devices" in text and "[modelled]" not in text
    saved = json.loads(json.dumps(report.as_json(local)))
    assert saved["tried"][saved["best"]]["memory"]["total"] == asked.memory.total


def test_the_same_in_a_process_of_its_own_for_a_tpu():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is half a gigabyte, so that `make test` does without: jaxblip[plan]")
    found = worker.compile_apart(small("clip"), topologies.parse("v5e:2x2"))
    assert found.fits and found.memory.capacity == 15.75 * GIB
    assert set(found.times) == {"computation", "memory", "network"}
    assert 4 * found.operations_per_chip == pytest.approx(found.operations, rel=0.2)


# The search


@functools.cache
def parts():
    return AbstractStep.of(small())


def made_up(config, topology, *, temporary_gib, network_s=0.0, unread=False):
    """A compilation without a compiler: temporaries by the row, less with rematerialisation."""
    sizes = sharding.mesh_sizes(config.mesh, topology.num_chips)
    memory = parts().memory(sizes)
    remat = compilation.remat_of(config)
    rows = config.batch_size * sizes["tensor"] / topology.num_chips
    memory = dataclasses.replace(
        memory,
        temporary=int(rows * temporary_gib * GIB * (0.4 if remat == "full" else 1)),
        capacity=topologies.capacity(topology),
    )
    times = {"computation": 1.0, "memory": 0.5, "network": network_s / sizes["tensor"]}
    return Compilation(
        topology.name, topology.num_chips, sizes, config.batch_size, remat, memory, 10**15,
        times={} if unread else times, unread=unread, compile_s=1.0,
    )  # fmt: skip


def searched(config, topology=POD, *, tries=3, asked=False, **how):
    return plan(
        config,
        topology,
        tries=tries,
        is_asked_mesh=asked,
        compile_step=lambda config, topology: made_up(config, topology, **how),
    )


@pytest.fixture
def with_libtpu(monkeypatch):
    monkeypatch.setattr(topologies, "check_installed", lambda topology: None)


@pytest.mark.usefixtures("with_libtpu")
class TestSearch:
    def test_what_fits_and_does_not_wait_is_all_that_is_compiled(self):
        config = small()
        config.batch_size = 32
        found = searched(config, temporary_gib=1.0)
        assert found.tried == (found.asked,) and found.best is found.asked
        assert found.asked.step_s == 1.0 and found.asked.bound == "computation"
        text = "\n".join(report.lines(found))
        assert "fits: 2.0 of 15.8 GiB a chip: parameters that train 0.00" in text
        assert "at most 32 images/s; 10 steps in 0.0 days or 0 chip-hours at least" in text

    def test_a_program_that_cannot_be_read_back(self):
        """Its memory is known, its time is not, and no other setting is looked for."""
        config = small()
        config.batch_size = 32
        found = searched(config, temporary_gib=1.0, unread=True)
        text = "\n".join(report.lines(found))
        assert "fits: 2.0 of 15.8 GiB" in text and "XLA cannot read this program back" in text
        assert found.tried == (found.asked,) and "images/s" not in text
        assert report.as_json(found)["tried"][0]["modelled"] == {}

    def test_what_does_not_fit_is_computed_again(self):
        config = small()
        config.batch_size = 32
        found = searched(config, temporary_gib=12.0)
        assert not found.asked.fits and found.best.fits and found.best.remat == "full"
        assert found.best.mesh == found.asked.mesh and found.best.batch_size == 32
        assert report.options(found, found.best) == "--config.model.qformer.remat=full"
        assert "does not fit: 24.0 of 15.8 GiB" in "\n".join(report.lines(found))
        assert found.asked.largest_batch() == 16

    def test_nothing_that_was_tried_fits(self):
        config = small()
        config.batch_size = 16
        found = searched(config, temporary_gib=100.0)
        assert found.best is None and len(found.tried) == 4
        assert len({(str(each.mesh), each.remat) for each in found.tried}) == 4
        assert "Nothing that was tried fits." in list(report.lines(found))[-1]

    def test_what_waits_for_the_network_is_tried_on_other_meshes(self):
        config = small(data=1, fsdp=-1)
        config.batch_size = 16
        found = searched(config, temporary_gib=0.1, network_s=3.0)
        assert found.asked.bound == "network" and len(found.tried) > 1
        assert found.best.step_s <= found.asked.step_s

    def test_a_batch_that_cannot_be_split_is_tried_on_meshes_that_can_and_with_one_near_it(self):
        config = small()
        config.batch_size = 24
        found = searched(config, temporary_gib=0.1)
        assert found.asked is None and "batch_size=24 cannot be split" in found.note
        assert found.best.batch_size in (16, 24, 32)
        shards = found.best.num_chips // found.best.mesh["tensor"]
        assert found.best.batch_size % shards == 0
        with pytest.raises(UserError, match="batch_size=24 cannot be split evenly over .* = 16"):
            searched(config, temporary_gib=0.1, asked=True)

    def test_parameters_that_do_not_fit_are_not_compiled(self, monkeypatch):
        chip = dataclasses.replace(hardware.CHIPS["v5e"], capacity=100_000)
        config = small()
        config.batch_size = 16
        found = searched(config, dataclasses.replace(POD, chip=chip), temporary_gib=0.0)
        assert "alone do not fit; not compiled" in found.asked.problem
        assert found.best is not None and found.best.memory.state < 100_000

    def test_a_mesh_that_wastes_devices(self):
        with pytest.raises(UserError, match="12 of 16 devices.*product is 16"):
            searched(small(data=4, fsdp=3), temporary_gib=0.1)


# Topologies


def test_names_of_topologies():
    assert topologies.parse("v5p:4x4x8").num_chips == 128
    assert topologies.parse("H100:4x8").sizes == (4, 8)
    assert [each.name for each in topologies.names("v5e:2x2, a100-40g:2x8")] == [
        "v5e:2x2", "a100-40g:2x8",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:4x4", "no topology 'v9:4x4': known are TPU slices .v4:.*v5e:.*16x16.*h200.*'local'"),
        ("v5e:3x5", "no topology 'v5e:3x5': slices of v5e are 1x1, 2x2.*16x16"),
        ("v5e", "no topology 'v5e': slices of v5e are"),
        ("h100:8", "h100:8 needs hosts x GPUs: h100:4x8"),
        ("h100:8x64", "64 GPUs in a host.*16"),
    ],
)
def test_a_topology_that_is_not_known(name, message):
    with pytest.raises(UserError, match=message):
        topologies.parse(name)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("v5e:2x2", r"libtpu, which is missing: pip install 'jaxblip\[plan\]'"),
        ("h100:1x8", "plugin, which is missing: pip install --no-deps jax-cuda12-plugin=="),
    ],
)
def test_a_compiler_that_is_missing(name, command, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=command):
        plan(small(), topologies.parse(name))


def test_the_network_by_hand():
    """A ring in both directions where a dimension closes to one; adapters between hosts."""
    pod, cube = topologies.parse("v5e:16x16"), topologies.parse("v5p:4x4x8")
    row = [(0, y, 0) for y in range(16)]
    assert topologies.egress(pod, row) == 2 * 50e9
    assert topologies.egress(pod, row[:8]) == 50e9
    assert topologies.egress(pod, [(x, y, 0) for x in range(16) for y in range(16)]) == 4 * 50e9
    assert topologies.egress(cube, [(0, y, 0) for y in range(4)]) == 2 * 100e9
    gpus = topologies.parse("h100:4x8")
    assert topologies.egress(gpus, [(0, gpu) for gpu in range(8)]) == 450e9
    assert topologies.egress(gpus, [(host, 0) for host in range(4)]) == 50e9
    assert topologies.egress(gpus, [(h, g) for h in range(4) for g in range(8)]) == 400e9


@pytest.mark.parametrize("chip", hardware.CHIPS.values(), ids=lambda chip: chip.name)
def test_data_sheets_are_plausible(chip):
    """No slip of a power of ten: operations a byte of memory, seconds to fill the memory."""
    assert 100 < chip.peak / chip.bandwidth < 600
    assert 0.005 < chip.capacity / chip.bandwidth < 0.04
    assert chip.bandwidth > 5 * chip.link


# Configs


def test_vocabularies_are_those_of_the_published_models():
    stage1 = with_full_vocabulary(default_config("stage1"))
    assert stage1.model.qformer.vocab_size == 30_523 and stage1.model.dec_token_id == 30_522
    blip = with_full_vocabulary(default_config("blip_vqa"))
    assert blip.model.text.vocab_size == 30_524
    assert (blip.model.dec_token_id, blip.model.enc_token_id) == (30_523, 30_522)
    sizes = {"clip": ("clip", "opt"), "stage2": ("stage2", "t5")}
    for task, architecture in sizes.values():
        config = with_full_vocabulary(default_config(task, language_model=architecture))
        section = config.model.get("language_model", config.model.get("text"))
        assert section.vocab_size in (49_408, 32_128)
        AbstractStep.of(config)


def test_policies_are_set_for_the_parts_with_a_backward_pass():
    config = small("stage2")
    sections = compilation.remat_sections(config)
    assert {"language_model", "qformer"} <= set(sections) and "vision" not in sections
    again = compilation.with_remat(config, "full")
    assert compilation.remat_of(again) == "full" and again.model.vision.remat == "none"
    again.model.qformer.remat = "dots"
    assert "language_model full" in compilation.remat_of(again)
    assert "qformer dots" in compilation.remat_of(again)


def test_what_the_tpu_compiler_says_of_too_large_a_program():
    memory = compilation.Memory(1 * GIB, 2 * GIB, 0, 0, capacity=16 * GIB)
    found = Compilation("v5e:2x2", 4, {"tensor": 1}, 8, "none", memory, 1)
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (25.50G) exceeds available HBM (15.75G)."
    )
    too_large = compilation._too_large(found, message)
    assert too_large.memory.total == 25.5 * GIB and not too_large.fits
    assert too_large.memory.temporary == 22.5 * GIB


# The verb


def test_the_verb(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("jaxblip.config.load_config", lambda path, overrides: small("clip"))
    target = tmp_path / "plan.json"
    arguments = ["plan", "--config=any.py", "--topology=local"]
    assert cli.main([*arguments, "--mesh=data=2,fsdp=4", f"--json={target}"]) == 0
    (saved,) = json.loads(target.read_text())
    assert saved["tried"][0]["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
    assert "data=2, fsdp=4, batch 8" in capsys.readouterr().out
    assert cli.main([*arguments, "--mesh=data=3"]) == 2
    assert "of 8 device" in capsys.readouterr().err
    assert cli.main([*arguments, "--mesh=rows=3"]) == 2
    assert "--mesh=rows=3 is no mesh" in capsys.readouterr().err


def test_a_mesh_in_words():
    assert mesh_of("fsdp=16,data=-1") == {"data": -1, "fsdp": 16, "tensor": 1}
