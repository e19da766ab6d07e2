"""The blocks that every transformer of the family is made of: attention and feed-forward.

Parameter names are the same in all architectures (`query`, `key`, `value`, `out`, `up`, `down`),
so one table of sharding rules places them all. Dropout is active exactly when the caller passes a
`dropout` key: `module.apply(..., rngs={"dropout": key})`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from jaxblip.errors import UserError
from jaxblip.models.attention import Mask, dot_product_attention
from jaxblip.models.dropout import Dropout


def exact_gelu(x: Array) -> Array:
    """GELU by the error function, in float32 and rounded once; `nn.gelu` rounds in between."""
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


ACTIVATIONS: dict[str, Callable] = {
    "gelu": exact_gelu,  # BERT and EVA-CLIP
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),  # SigLIP
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # OpenAI CLIP
    "relu": nn.relu,  # OPT
}


@flax.struct.dataclass
class KeyValues:
    """Keys and values of one attention layer, or of a stack of layers on a leading axis."""

    key: Float[Array, "*layers batch length heads width"]
    value: Float[Array, "*layers batch length heads width"]

    def write(self, new: KeyValues, position: int | Array) -> KeyValues:
        """This cache with `new` written from `position` (along `length`) on."""

        def put(cache, update):
            return jax.lax.dynamic_update_slice_in_dim(
                cache, update.astype(cache.dtype), position, axis=-3
            )

        return KeyValues(put(self.key, new.key), put(self.value, new.value))


def empty_cache(config: Any, batch: int, capacity: int, dtype=jnp.float32) -> KeyValues:
    """A cache for `capacity` positions, of `config.cache_shape`."""
    shape = config.cache_shape(batch, capacity)
    return KeyValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def float32_sums(
    x: Array, kernel: Array, dimensions: jax.lax.DotDimensionNumbers, precision: Any = None
) -> Array:
    """Product of the last axes of `x` with the first ones of `kernel`, as `lax.dot_general`.

    Its sums stay in float32, in which they are accumulated; those of its gradients are rounded when
    they are complete. By itself JAX would multiply with gradients in float32, and XLA would widen
    the factors of a product that is to be bfloat16: on a CPU that multiplies bfloat16 either takes
    twice the time.
    """
    return jax.lax.dot_general(x, kernel, dimensions, precision, preferred_element_type=jnp.float32)


def _float32_sums_forward(x, kernel, dimensions, precision):
    # What is multiplied with something frozen need not be kept.
    kept = x.value if kernel.perturbed else None, kernel.value if x.perturbed else None
    return float32_sums(x.value, kernel.value, dimensions, precision), kept


def _float32_sums_backward(dimensions, precision, kept, gradient):
    if isinstance(gradient, SymbolicZero):
        return None, None
    depth = len(dimensions[0][0])  # number of axes that are summed over
    rounded = gradient.astype(next(factor.dtype for factor in kept if factor is not None))

    def product(a, b, of_a, of_b):
        return float32_sums(a, b, ((of_a, of_b), ((), ())), precision).astype(rounded.dtype)

    x, kernel = kept
    of_x = of_kernel = None
    if kernel is not None:
        outputs = tuple(range(depth, kernel.ndim))
        last = tuple(range(rounded.ndim - len(outputs), rounded.ndim))
        of_x = product(rounded, kernel, last, outputs)
    if x is not None:
        rows = tuple(range(x.ndim - depth))
        of_kernel = product(x, rounded, rows, rows)
    return of_x, of_kernel


float32_sums.defvjp(_float32_sums_forward, _float32_sums_backward, symbolic_zeros=True)


class Linear(nn.DenseGeneral):
    """A linear map that rounds once, behind the bias; `nn.Dense` rounds before it as well."""

    def __post_init__(self):
        if self.use_bias and self.dtype == jnp.bfloat16:
            self.dot_general = float32_sums
        super().__post_init__()

    def __call__(self, x: Array) -> Array:
        return super().__call__(x).astype(self.dtype)


class KeyValueProjection(nn.Module):
    """Keys and values of features that another sequence will attend to."""

    num_heads: int
    head_width: int
    kernel_init: Callable
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Float[Array, "batch length width"]) -> KeyValues:
        return KeyValues(
            key=to_heads(self, "key")(features), value=to_heads(self, "value")(features)
        )


class Attention(nn.Module):
    """Multi-head attention of a sequence to itself, to a cache, or to given keys and values.

    Attributes:
      key_bias: EVA-CLIP has none: a constant added to every key cancels in the softmax.
      attention_dropout: dropout of the attention weights.
      kernel: which computes it, one of `kernels.KERNELS`.
    """

    num_heads: int
    head_width: int
    kernel_init: Callable
    key_bias: bool = True
    attention_dropout: float = 0.0
    kernel: str = "auto"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch query width"],
        mask: Mask | None = None,
        *,
        key_values: KeyValues | None = None,
        cache: KeyValues | None = None,
        cache_position: Array | int = 0,
    ) -> tuple[Float[Array, "batch query width"], KeyValues | None]:
        """Attends to `key_values` where given, otherwise to the projections of `x`.

        With a `cache`, the projections of `x` are first written into it from `cache_position` on,
        and `x` attends to the whole cache; `mask` says which of its positions count.

        Returns:
          The output, and the cache with this call written into it (None without a cache).
        """
        query = to_heads(self, "query")(x)
        if key_values is None:
            key_values = KeyValues(
                key=to_heads(self, "key", use_bias=self.key_bias)(x),
                value=to_heads(self, "value")(x),
            )
            if cache is not None:
                key_values = cache = cache.write(key_values, cache_position)
        dropout = self.attention_dropout if self.has_rng("dropout") else 0.0
        attended = dot_product_attention(
            query,
            key_values.key.astype(query.dtype),
            key_values.value.astype(query.dtype),
            mask=mask,
            dropout_rate=dropout,
            dropout_rng=self.make_rng("dropout") if dropout else None,
            kernel=self.kernel,
        )
        out = Linear(
            x.shape[-1], axis=(-2, -1), kernel_init=self.kernel_init, dtype=self.dtype, name="out"
        )(attended)
        return out, cache


def to_heads(module: KeyValueProjection | Attention, name: str, use_bias: bool = True):
    """The linear map `[..., width] -> [..., heads, head_width]` of an attention module."""
    return Linear(
        (module.num_heads, module.head_width),
        use_bias=use_bias,
        kernel_init=module.kernel_init,
        dtype=module.dtype,
        name=name,
    )


class FeedForward(nn.Module):
    """Two linear maps with an activation between them."""

    hidden_width: int
    activation: str
    kernel_init: Callable
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        width = x.shape[-1]
        dense = partial(Linear, kernel_init=self.kernel_init, dtype=self.dtype)
        x = ACTIVATIONS[self.activation](dense(self.hidden_width, name="up")(x))
        return dense(width, name="down")(x)


def layer_norm(epsilon: float, dtype: jnp.dtype, name: str | None = None) -> nn.LayerNorm:
    """Layer norm with float32 statistics, by the two-pass variance as in PyTorch."""
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


def l2_normalize(x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
    """Rows of length 1; zero rows stay finite, with a finite gradient."""
    squared = jnp.sum(x * x, axis=-1, keepdims=True)
    return x / jnp.sqrt(jnp.maximum(squared, 1e-24))


class PreNormBlock(nn.Module):
    """The pre-norm transformer block of ViT, CLIP and OPT."""

    num_heads: int
    mlp_width: int
    activation: str
    layer_norm_epsilon: float
    kernel_init: Callable
    key_bias: bool = True
    dropout: float = 0.0
    attention_kernel: str = "auto"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length width"],
        mask: Mask | None = None,
        cache: KeyValues | None = None,
        cache_position: Array | int = 0,
    ) -> tuple[Float[Array, "batch length width"], KeyValues | None]:
        """Returns the output and the updated cache, as `scan_layers` wants it."""
        dropout = Dropout(self.dropout)
        normed = layer_norm(self.layer_norm_epsilon, self.dtype, "attention_norm")(x)
        attended, cache = Attention(
            self.num_heads,
            x.shape[-1] // self.num_heads,
            self.kernel_init,
            key_bias=self.key_bias,
            kernel=self.attention_kernel,
            dtype=self.dtype,
            name="attention",
        )(normed, mask, cache=cache, cache_position=cache_position)
        x = x + dropout(attended)
        normed = layer_norm(self.layer_norm_epsilon, self.dtype, "mlp_norm")(x)
        update = FeedForward(
            self.mlp_width, self.activation, self.kernel_init, self.dtype, name="mlp"
        )(normed)
        return x + dropout(update), cache


# End of a kernel's path -> how many trailing dimensions are inputs and outputs of its linear map.
# Those before them are the layers of a stack. These are the maps between hidden states: patch
# embeddings, word embeddings and heads onto classes or words are not among them.
MATRICES = (
    (r"(query|key|value)/kernel", 1, 2),  # [width, heads, head_width]
    (r"out/kernel", 2, 1),  # [heads, head_width, width]
    (r"(up|gate|down|dense|[a-z_]*projection)/kernel", 1, 1),
)


def matrix_axes(path: str) -> tuple[int, int] | None:
    """How many inputs and outputs the parameter at `path` has, as in `MATRICES`; or None."""
    for pattern, inputs, outputs in MATRICES:
        if re.search(rf"(^|/){pattern}$", path):
            return inputs, outputs
    return None


def check_heads(config: Any) -> None:
    """Raises UserError unless the heads of a model config divide its width."""
    if config.num_heads < 1 or config.width % config.num_heads:
        raise UserError(
            f"{type(config).__name__}: num_heads={config.num_heads} does not divide "
            f"width={config.width}; set one to fit the other."
        )


def check_activation(config: Any, known: Iterable[str] = ACTIVATIONS) -> None:
    """Raises UserError unless the activation of a model config is one of `known`."""
    if config.activation not in known:
        raise UserError(
            f"{type(config).__name__}: activation={config.activation!r} is not known; use one of "
            f"{', '.join(known)}."
        )


# Stacks of at most this many blocks are written out when compiled. A loop keeps what the backward
# pass needs in one array for all blocks, and slicing and filling it costs a small model a third of
# its time, while compiling a few blocks costs little.
UNROLLED_LAYERS = 4


# What the backward pass computes again, by the names that the model configs have for it: nothing; a
# whole block, from its input; all but the matrix products ("dots"); all but those that have no
# batch dimension, so that attention is computed again as well. What is kept costs memory.
REMAT_POLICIES: dict[str, Callable | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_with_no_batch_dims": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def check_remat(config: Any) -> None:
    """Raises UserError unless the rematerialisation of a model config is a known one."""
    if config.remat not in REMAT_POLICIES:
        raise UserError(
            f"{type(config).__name__}: remat={config.remat!r} is not known; use one of "
            f"{', '.join(REMAT_POLICIES)}."
        )


def scan_layers(block: type[nn.Module], length: int, *, remat: str, in_axes=nn.broadcast):
    """`block` repeated `length` times, its parameters stacked on axis 0.

    The block's `__call__(x, *inputs)` returns `(x, output)`; `in_axes` says which of the inputs
    have an own slice for each layer (0) and which are the same for all (`nn.broadcast`).

    Args:
      remat: a name of `REMAT_POLICIES`.
    """
    is_loop = length > UNROLLED_LAYERS
    if remat != "none":
        # Inside a loop nothing is left with which a second computation could be merged.
        block = nn.remat(block, prevent_cse=not is_loop, policy=REMAT_POLICIES[remat])
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=length,
        unroll=1 if is_loop else max(length, 2),  # with 1, a single block would be a loop
    )
