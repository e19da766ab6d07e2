"""Costs of compiled programs against counts by hand, on 8 virtual devices and for a TPU slice."""

import collections
import importlib.util
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxblip import sharding
from jaxblip.planning import hlo, topologies
from jaxblip.planning.costs import _group, costs

LAYERS, ROWS, WIDTH, HIDDEN = 6, 64, 128, 512  # more layers than the compiler would unroll


def loss(kernels, x):
    def layer(x, kernel):
        return x + jnp.tanh(x @ kernel["up"]) @ kernel["down"], None

    return jax.lax.scan(layer, x, kernels)[0].sum()


def compiled(devices, sizes, *, gradient, platform):
    """A stack of small networks whose places are those of the rules for `up` and `down`."""
    mesh = sharding.make_mesh(sizes, devices)
    kernels = {
        "up": jax.ShapeDtypeStruct((LAYERS, WIDTH, HIDDEN), jnp.float32),
        "down": jax.ShapeDtypeStruct((LAYERS, HIDDEN, WIDTH), jnp.float32),
    }
    axes = {"up": (None, "fsdp", "tensor"), "down": (None, "tensor", "fsdp")}
    places = {name: NamedSharding(mesh, PartitionSpec(*axes[name])) for name in axes}
    rows = sharding.batch_sharding(mesh)

    def step(kernels, x):
        if gradient:
            grads = jax.grad(loss)(kernels, x)
            return jax.tree.map(lambda k, g: k - g, kernels, grads)
        return loss(kernels, x)

    out = places if gradient else NamedSharding(mesh, PartitionSpec())
    jitted = jax.jit(step, in_shardings=(places, rows), out_shardings=out)
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
    lowered = jitted.trace(kernels, x).lower(lowering_platforms=(platform,))
    return lowered.compile().as_text()


def moved(found):
    """Kind -> bytes, of all that is larger than a sum of scalars."""
    total = collections.Counter()
    for each in found.collectives:
        if each.bytes > 1000:
            total[each.kind] += each.bytes * each.times
    return total


KERNELS = LAYERS * 2 * WIDTH * HIDDEN * 4  # bytes


@pytest.fixture(params=["cpu", "tpu"])
def devices(request, monkeypatch):
    """(8 or 4 devices, platform)."""
    if request.param == "cpu":
        return jax.devices()[:8], "cpu"
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is half a gigabyte, so that `make test` does without: jaxblip[plan]")
    topology = topologies.parse("v5e:2x2")
    for name, value in topologies.environment(topology).items():
        monkeypatch.setenv(name, value)
    return topologies.devices(topology), "tpu"


def test_copies_of_the_parameters_sum_their_gradients(devices):
    devices, platform = devices
    found = costs(
        compiled(devices, {"data": -1}, gradient=True, platform=platform),
        num_devices=len(devices),
        is_tpu=platform == "tpu",
    )
    assert moved(found) == {"all-reduce": KERNELS}
    assert all(len(each.group) == len(devices) for each in found.collectives)
    # Forwards, and the gradients of kernels and of all activations but the first layer's input.
    forward = 2 * ROWS * KERNELS // 4 // len(devices)
    assert found.operations == pytest.approx(3 * forward, rel=0.06)


def test_a_loop_counts_as_often_as_it_runs(devices):
    devices, platform = devices
    found = costs(
        compiled(devices, {"tensor": -1}, gradient=False, platform=platform),
        num_devices=len(devices),
        is_tpu=platform == "tpu",
    )
    # Each layer's sum over the hidden units, which are split.
    assert moved(found) == {"all-reduce": LAYERS * ROWS * WIDTH * 4}
    assert found.operations == 2 * ROWS * KERNELS // 4 // len(devices)


def test_split_parameters_are_gathered():
    devices = jax.devices()[:8]
    found = costs(
        compiled(devices, {"fsdp": 8}, gradient=False, platform="cpu"), num_devices=len(devices)
    )
    assert moved(found)["all-gather"] == KERNELS


def test_memory_traffic_is_what_is_read_and_written():
    x, y = (jax.ShapeDtypeStruct((256, 512), jnp.float32) for _ in range(2))
    text = jax.jit(lambda x, y: jnp.tanh(x + y) * 2).lower(x, y).compile().as_text()
    assert costs(text, num_devices=1).memory_bytes == 3 * 256 * 512 * 4


def test_of_a_stack_a_layer_is_read_at_a_time():
    """A slice of the stack in each turn of the loop, and not the stack."""
    stack = jax.ShapeDtypeStruct((LAYERS * 10, 1024), jnp.float32)

    def total(stack):
        return jax.lax.scan(lambda sum, row: (jnp.tanh(sum + row), None), stack[0], stack)[0]

    text = jax.jit(total).lower(stack).compile().as_text()
    rows = LAYERS * 10 * 1024 * 4
    assert rows <= costs(text, num_devices=1).memory_bytes < 10 * rows


@pytest.mark.parametrize(
    ("attributes", "group"),
    [
        ("replica_groups={{0,1},{2,3}}, dimensions={0}", (0, 1)),
        ("replica_groups=[2,4]<=[8], channel_id=1", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b','a'}, x", tuple(range(8))),
        ("source_target_pairs={{0,0},{1,3}}", (1, 3)),
        ("replica_groups={}", tuple(range(8))),
    ],
)
def test_groups_of_devices(attributes, group):
    assert _group(attributes, 8) == group


def test_shapes():
    text = "(f32[2,3]{1,0:T(8,128)S(1)}, (pred[4], bf16[]), f8e4m3fn[7], s4[10])"
    shapes = list(hlo.shapes_of(text))
    assert [shape.bytes for shape in shapes] == [24, 4, 2, 7, 5]
    assert [shape.memory_space for shape in shapes] == [1, 0, 0, 0, 0]
    assert hlo.parts_of_tuple(text)[1] == "(pred[4], bf16[])"
    assert math.prod(shapes[0].sizes) == 6


CUDNN = """\
ENTRY %main (images: f32[2,8,8,3], kernel: f32[4,4,3,10]) -> f32[2,2,2,10] {{
  %images = f32[2,8,8,3]{{3,2,1,0}} parameter(0)
  %kernel = f32[4,4,3,10]{{3,2,1,0}} parameter(1)
  %output = f32[2,2,2,10]{{3,2,1,0}} parameter(2)
  ROOT %call = ({result}, u8[99]{{0}}) custom-call({operands}), window={{size=4x4 stride=4x4}}, \
dim_labels=b01f_01io->b01f, custom_call_target="__cudnn$conv{direction}"
}}
"""


@pytest.mark.parametrize(
    ("direction", "operands", "result"),
    [
        ("Forward", "%images, %kernel", "f32[2,2,2,10]{3,2,1,0}"),
        ("BackwardFilter", "%images, %output", "f32[4,4,3,10]{3,2,1,0}"),
        ("BackwardInput", "%output, %kernel", "f32[2,8,8,3]{3,2,1,0}"),
    ],
)
def test_convolutions_of_cudnn(direction, operands, result):
    """Patches of 4 x 4: each direction has as many products."""
    text = CUDNN.format(direction=direction, operands=operands, result=result)
    assert costs(text, num_devices=1).operations == 2 * (2 * 2 * 2) * 10 * (4 * 4 * 3)
