"""What a task is: a model, its loss, the batch fields it reads."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float, Key, UInt8
from ml_collections import ConfigDict

from jaxblip.data.choices import INTERPOLATIONS, RESIZES
from jaxblip.errors import UserError
from jaxblip.models.kernels import KERNELS
from jaxblip.models.lora import adapted, with_factors
from jaxblip.tasks.parts import lora_config, trains

Params = dict[str, Any]
Batch = dict[str, Array]
Images = Float[Array, "batch *frames height width 3"]
Features = BFloat16[Array, "batch tokens vision_width"]

DTYPES = ("bfloat16", "float16", "float32")

# Mean and standard deviation of the pixels, as in CLIP and EVA-CLIP; SigLIP has 0.5 throughout.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


@flax.struct.dataclass
class LossOutput:
    """What a task's loss returns.

    Attributes:
      loss: mean over the batch, float32.
      weight: how much this batch counts beside others of the same step when gradients are
        accumulated: its target tokens for a token mean, its examples otherwise.
      metrics: scalars to log, such as the parts of the loss.
    """

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    metrics: dict[str, Float[Array, ""]]


class Task(abc.ABC):
    """What one run optimises. Holds no parameters: they are an argument everywhere.

    Attributes:
      fields: the batch fields that the loss reads; they may depend on the config.
      frozen: path prefixes of the parameters that do not train, unless the config says otherwise.
      model: the network; its parameter tree has the parts `vision`, `qformer`, … on top.
      lora: which of its linear maps have low-rank factors.
    """

    fields: tuple[str, ...]
    frozen: ClassVar[tuple[str, ...]] = ()
    model: nn.Module

    def __init__(self, config: ConfigDict):
        """Builds the network; UserError where the fields of `config` do not fit each other."""
        self.config = config
        self.lora = lora_config(config)
        self._check()
        self.model = adapted(self.build_model(), self.lora)

    def _check(self) -> None:
        for field in ("compute_dtype", "frozen_dtype"):
            if self.config[field] not in DTYPES:
                raise UserError(
                    f"{field}={self.config[field]!r} is none of {', '.join(DTYPES)}: choose one."
                )
        if self.config.attention not in KERNELS:
            raise UserError(
                f"attention={self.config.attention!r} is none of {', '.join(KERNELS)}: choose one."
            )
        data = self.config.data
        if data.get("features") and trains(self.config, "vision"):
            raise UserError(
                f"data.features={data.features!r} is the output of an image encoder that stays as "
                "it is, but here it trains: add vision to config.frozen (and let neither "
                "config.trainable nor config.lora.parts name it), or set "
                "--config.data.features= to read images."
            )
        for field, known in (("resize", RESIZES), ("interpolation", INTERPOLATIONS)):
            if data[field] not in known:
                raise UserError(
                    f"data.{field}={data[field]!r} is none of {', '.join(known)}: choose one."
                )
        if min(data.pixel_std) <= 0:
            raise UserError(
                f"data.pixel_std={tuple(data.pixel_std)} must be positive, since pixels are "
                "divided by it: SigLIP has 0.5,0.5,0.5."
            )
        for field, unit in (("itc_block_size", "texts"), ("vocab_chunk", "tokens of a text")):
            if self.config.loss.get(field, 0) < 0:
                raise UserError(
                    f"loss.{field}={self.config.loss[field]} must be a number of {unit}, or 0 for "
                    "all at once."
                )
        for section, model in self.config.model.items():
            of_instruction = section == "qformer" and "max_instruction_tokens" in data
            field = "max_instruction_tokens" if of_instruction else "max_text_tokens"
            length = data[field]
            if "max_positions" in getattr(model, "keys", tuple)() and model.max_positions < length:
                raise UserError(
                    f"data.{field}={length} is more than config.model.{section}."
                    f"max_positions={model.max_positions}: lower the first or raise the second."
                )

    @abc.abstractmethod
    def build_model(self) -> nn.Module:
        """The network that `self.config` describes."""

    @abc.abstractmethod
    def loss(self, params: Params, batch: Batch, rng: Key[Array, ""] | None) -> LossOutput:
        """Loss of one batch.

        Args:
          params: the full tree, trainable and frozen.
          rng: key of dropout and of sampling; None switches dropout off, and sampling takes a
            fixed key.
        """

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the activations."""
        return jnp.dtype(self.config.compute_dtype)

    @property
    def image_field(self) -> str:
        """What the loss reads of images: "image", or the encoder's output, where it is known."""
        return "image_features" if self.config.data.get("features") else "image"

    def batch_shapes(
        self, batch_size: int, fields: Sequence[str] | None = None
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of each field of a global batch, by default of `self.fields`."""
        data = self.config.data
        size, length, frames = data.image_size_px, data.max_text_tokens, data.get("frames", 1)
        input_length = data.get("max_input_tokens", 0)
        instruction_length = data.get("max_instruction_tokens", 0)
        shapes = {
            "image": ((*((frames,) if frames > 1 else ()), size, size, 3), np.uint8),
            "image_features": (self._feature_shape(), jnp.bfloat16),
            "text_ids": ((length,), np.int32),
            "text_mask": ((length,), np.bool_),
            "segment_ids": ((length,), np.int32),
            "input_ids": ((input_length,), np.int32),
            "input_mask": ((input_length,), np.bool_),
            "instruction_ids": ((instruction_length,), np.int32),
            "instruction_mask": ((instruction_length,), np.bool_),
            "prompt_length": ((), np.int32),
            "image_id": ((), np.int32),
        }
        return {
            field: jax.ShapeDtypeStruct((batch_size, *shapes[field][0]), shapes[field][1])
            for field in fields or self.fields
        }

    def _feature_shape(self) -> tuple[int, ...]:
        """Tokens and width of the image encoder, where there is one."""
        vision = getattr(self.model, "vision_config", None)
        return () if vision is None else (vision.num_tokens, vision.width)

    def init(self, rng: Key[Array, ""]) -> Params:
        """Random parameters in float32; call it under `jax.jit` or `jax.eval_shape`."""
        # By an image in any case, so that the encoder has its parameters.
        fields = ["image" if field == self.image_field else field for field in self.fields]
        shapes = self.batch_shapes(1, fields)
        batch = {k: jnp.zeros(v.shape, v.dtype) for k, v in shapes.items()}
        params = self.model.init(rng, *self.model_inputs(batch))["params"]
        return with_factors(params, self.lora, jax.random.fold_in(rng, 1))

    def model_inputs(self, batch: Batch) -> tuple[Array, ...]:
        """The batch as the arguments of the model's `__call__`."""
        texts = ("text_ids", "text_mask", "segment_ids", "input_ids", "input_mask")
        return (*self.image_inputs(batch), *(batch[field] for field in texts if field in batch))

    def image_inputs(self, batch: Batch) -> tuple[Images | Features, ...]:
        """What the model reads of the images, if the batch has any: pixels, or their features."""
        if "image_features" in batch:
            return (batch["image_features"],)
        return (self.normalize_images(batch["image"]),) if "image" in batch else ()

    def normalize_images(self, images: UInt8[Array, "batch *frames height width 3"]) -> Images:
        """uint8 pixels to the encoder's input, by `data.pixel_mean` and `data.pixel_std`."""
        return normalize_images(images, self.config.data.pixel_mean, self.config.data.pixel_std)

    def apply(self, params: Params, *args, method: str | None = None, rng=None):
        """`model.apply`, with dropout where `rng` is given."""
        rngs = None if rng is None else {"dropout": rng}
        return self.model.apply({"params": params}, *args, method=method, rngs=rngs)

    def constrain(self, params: Params) -> Params:
        """Puts parameters back into their allowed range after an update."""
        return params


def normalize_images(
    images: UInt8[Array, "batch *frames height width 3"],
    mean: Sequence[float] = PIXEL_MEAN,
    std: Sequence[float] = PIXEL_STD,
) -> Images:
    """uint8 pixels to the encoder's input; on the device, so that batches stay small.

    Args:
      mean, std: of each channel, of pixels between 0 and 1.
    """
    mean = jnp.asarray(mean) * 255.0
    std = jnp.asarray(std) * 255.0
    return (images.astype(jnp.float32) - mean) / std
