"""Which kernel computes softmax attention: cuDNN's on NVIDIA GPUs, Pallas' on TPUs, or XLA.

XLA takes everything, and writes the scores of all pairs to memory. The other two keep them on the
chip, and each takes only some cases (`choose_kernel`); for the rest there is XLA.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxblip.sharding import BATCH_AXES

# What a config may ask for. "auto" is the best that the platform has.
KERNELS = ("auto", "xla", "cudnn", "pallas")
_PLATFORM_OF = {"cudnn": "gpu", "pallas": "tpu"}

# Fewest queries and keys for which the Pallas kernel is taken. Compiled for v5e, the forward and
# backward pass then moves 0.7 (677 tokens) to 0.5 (1226) of the bytes that XLA's moves; a shorter
# sequence, padded to whole tiles, would gain nothing.
PALLAS_MIN_LENGTH = 512
_TILE = 128
_HEADS_AXIS = "tensor"


def choose_kernel(
    wanted: str,
    platform: str,
    dtype: str,
    query_shape: tuple[int, int, int, int],
    key_shape: tuple[int, int, int, int],
    *,
    has_mask: bool = False,
    has_bias: bool = False,
    has_segments: bool = False,
    num_devices: int = 1,
    mesh: Mapping[str, int] | None = None,
) -> str:
    """The kernel of one attention, "xla", "cudnn" or "pallas": what is wanted, where it can do it.

    Args:
      wanted: one of `KERNELS`.
      platform: "cpu", "gpu" or "tpu".
      query_shape, key_shape: batch, length, heads, width; of the whole batch.
      has_mask: there is a mask.
      has_segments: it is an `attention.CausalMask`.
      has_bias: there is a bias on the scores, which may have a gradient.
      num_devices: of all processes.
      mesh: sizes of the mesh axes, where it is known on which the program will run.
    """
    if wanted == "auto":
        wanted = {home: name for name, home in _PLATFORM_OF.items()}.get(platform, "xla")
    home = _PLATFORM_OF.get(wanted, platform)
    if home != platform:
        _say_once(
            f"Attention by {wanted} needs a {home.upper()}, and this is for a {platform.upper()}: "
            "XLA computes it."
        )
    if wanted == "xla" or home != platform or has_bias:
        return "xla"
    batch, queries, _, width = query_shape
    _, keys, kv_heads, _ = key_shape
    if wanted == "cudnn":
        is_half = dtype in ("bfloat16", "float16")
        fits = is_half and width % 8 == 0 and width <= 128 and queries > 1
    else:
        fits = min(queries, keys) >= PALLAS_MIN_LENGTH and (has_segments or not has_mask)
        # By itself the compiler cannot split a Pallas kernel.
        fits &= mesh is not None or num_devices == 1
    sizes = mesh or {}
    rows = math.prod(sizes.get(axis, 1) for axis in BATCH_AXES)
    is_even_split = batch % rows == 0 and kv_heads % sizes.get(_HEADS_AXIS, 1) == 0
    return wanted if fits and is_even_split else "xla"


def platform() -> str:
    """The platform that the program being traced is for: that of its mesh, or else of JAX."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = device.platform if device else jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


def mesh_sizes() -> dict[str, int] | None:
    """Sizes of the mesh that the program being traced is for; None where that is not known."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else dict(mesh.shape)


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def _on_each_device(
    attend: Callable, query: Array, key: Array, value: Array, other: Array | None, dimensions: str
) -> Array:
    """`attend(query, key, value, other)`, on a mesh by each device for its rows and heads.

    Args:
      dimensions: of `other`, a letter each: r of rows, h of heads, and . of what stays whole.
    """
    if mesh_sizes() is None:
        return attend(query, key, value, other)
    places = {"r": BATCH_AXES, "h": _HEADS_AXIS, ".": None}

    def spec(dimensions):
        return PartitionSpec(*map(places.get, dimensions))

    whole = spec("r.h.")
    in_specs = (whole, whole, whole, None if other is None else spec(dimensions))
    # What a kernel varies over is not known to JAX, so there is nothing to check.
    attend = jax.shard_map(attend, in_specs=in_specs, out_specs=whole, check_vma=False)
    return attend(query, key, value, other)


def cudnn_attention(
    query: Float[Array, "batch query heads width"],
    key: Float[Array, "batch key kv_heads width"],
    value: Float[Array, "batch key kv_heads width"],
    mask: Bool[Array, "#batch #heads #query key"] | None = None,
    *,
    scale: float,
) -> Float[Array, "batch query heads width"] | None:
    """Flash attention of cuDNN; None, and a warning once, where JAX finds no cuDNN."""
    dimensions = ""
    if mask is not None:
        dimensions = ("r" if mask.shape[0] > 1 else ".") + ("h" if mask.shape[1] > 1 else ".")
    try:
        return _on_each_device(
            functools.partial(_cudnn, scale), query, key, value, mask, f"{dimensions}.."
        )
    except RuntimeError as error:
        _say_once(f"Attention by cuDNN is unavailable ({error}): XLA computes it, more slowly.")
        return None


def _cudnn_plain(scale, query, key, value, mask):
    if mask is not None:  # it becomes a bias, which may lack rows and heads, but not queries
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], query.shape[1], key.shape[1]))
    return jax.nn.dot_product_attention(
        query, key, value, mask=mask, scale=scale, implementation="cudnn"
    )


_cudnn = jax.custom_vjp(_cudnn_plain, nondiff_argnums=(0,))


def _cudnn_forward(scale, query, key, value, mask):
    # With a gradient cuDNN takes even lengths only. Without one, as of a frozen image encoder with
    # its 257 tokens, nothing need be padded.
    queries, keys = query.shape[1], key.shape[1]
    if mask is None and keys % 2:
        mask = jnp.ones((1, 1, 1, keys), bool)
    if mask is not None:
        mask = padded(mask, 2, axis=3)
        mask = mask if mask.shape[2] == 1 else padded(mask, 2, axis=2)

    def attend(query, key, value):
        return _cudnn_plain(scale, *(padded(x, 2) for x in (query, key, value)), mask)[:, :queries]

    return jax.vjp(attend, query, key, value)


def _cudnn_backward(scale, back, gradient):
    return *back(gradient), None


_cudnn.defvjp(_cudnn_forward, _cudnn_backward)


def pallas_attention(
    query: Float[Array, "batch query heads width"],
    key: Float[Array, "batch key kv_heads width"],
    value: Float[Array, "batch key kv_heads width"],
    segment_ids: Int[Array, "batch length"] | None = None,
    *,
    scale: float,
) -> Float[Array, "batch query heads width"]:
    """Flash attention of JAX's Pallas kernel for TPU.

    Args:
      segment_ids: each position sees those of its own segment up to itself; None: it sees all.
    """
    groups = query.shape[2] // key.shape[2]  # of heads that share a key; the kernel knows none
    key, value = (jnp.repeat(x, groups, axis=2) if groups > 1 else x for x in (key, value))
    attend = functools.partial(_flash_attention, scale=scale)
    return _on_each_device(attend, query, key, value, segment_ids, "r.")


def _flash_attention(query, key, value, segment_ids, *, scale: float):
    from jax.experimental.pallas.ops.tpu import flash_attention as kernel  # only where it is used

    is_causal = segment_ids is not None
    segments = [segment_ids if is_causal else jnp.zeros(x.shape[:2], int) for x in (query, key)]
    # What fills the last tile is a segment of its own, so that nothing sees it but itself.
    segments = [padded(ids + 1, _TILE) for ids in segments]
    attended = kernel.flash_attention(
        *(padded(x, _TILE).swapaxes(1, 2) for x in (query, key, value)),
        segment_ids=kernel.SegmentIds(*segments),
        causal=is_causal,
        sm_scale=scale,
        block_sizes=_block_sizes(kernel.BlockSizes, *(ids.shape[1] for ids in segments)),
    )
    return attended.swapaxes(1, 2)[:, : query.shape[1]]


def _block_sizes(make: Callable, queries: int, keys: int):
    """The largest of up to four tiles: by default the kernel takes one at a time."""
    of_queries, of_keys = (
        max(size for size in range(_TILE, 4 * _TILE + 1, _TILE) if length % size == 0)
        for length in (queries, keys)
    )
    return make(
        block_b=1,
        block_q=of_queries,
        block_k_major=of_keys,
        block_k=of_keys,
        block_q_major_dkv=of_queries,
        block_q_dkv=of_queries,
        block_k_major_dkv=of_keys,
        block_k_dkv=of_keys,
        block_q_dq=of_queries,
        block_k_major_dq=of_keys,
        block_k_dq=of_keys,
    )


def padded(x: Array, multiple: int, axis: int = 1) -> Array:
    """Zeros behind an axis, up to a multiple."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, padding)
