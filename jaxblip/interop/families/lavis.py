"""The stage-1 files of LAVIS: their model by the shapes of their tensors, for want of a config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxblip.errors import UserError
from jaxblip.interop.families.blip2 import lavis_qformer_config
from jaxblip.interop.families.vision import VARIANTS
from jaxblip.interop.files import TensorInfo, Weights
from jaxblip.models.blip2 import Blip2Stage1
from jaxblip.models.vit import VitConfig

VISION = "visual_encoder."


def lavis_stage1_model(weights: Weights, dtype: Any = jnp.float32) -> tuple[Blip2Stage1, bool]:
    """The model of a file, and whether its image encoder is in the file, too.

    Without one, the model's `vision_config` means nothing. `[DEC]` is the last word.

    Raises:
      UserError: the file is none of that kind.
    """
    qformer, heads = lavis_qformer_config(weights), "vision_proj.weight"
    if heads not in weights.tensors:
        raise UserError(
            f"{weights.source!r} has no {heads!r}: it is no stage-1 checkpoint of LAVIS."
        )
    vision = lavis_vit_config(weights.tensors)
    model = Blip2Stage1(
        vision or VitConfig(),
        qformer,
        dec_token_id=qformer.vocab_size - 1,
        embed_dim=weights.tensors[heads].shape[0],
        dtype=dtype,
    )
    return model, vision is not None


def lavis_vit_config(tensors: Mapping[str, TensorInfo], theirs: str = VISION) -> VitConfig | None:
    """The image encoder of a file; None where the file has none.

    Heads are 88 wide in EVA-CLIP and 64 in CLIP, as in LAVIS's two encoders.
    """
    shapes = {
        name.removeprefix(theirs): info.shape
        for name, info in tensors.items()
        if name.startswith(theirs)
    }
    if "conv1.weight" in shapes:
        blocks, up, table, patches = (
            "transformer.resblocks.", "mlp.c_fc.weight", "positional_embedding", "conv1.weight"
        )  # fmt: skip
        head_width, variant = 64, dict(activation="quick_gelu", layer_norm_epsilon=1e-5)
        variant |= VARIANTS["clip_vision_model"]
    elif "patch_embed.proj.weight" in shapes:
        blocks, up, table, patches = (
            "blocks.", "mlp.fc1.weight", "pos_embed", "patch_embed.proj.weight"
        )  # fmt: skip
        head_width, variant = 88, dict(activation="gelu", layer_norm_epsilon=1e-6)
        variant |= VARIANTS["blip_2_vision_model"]
    else:
        return None
    layers = {name.removeprefix(blocks).split(".")[0] for name in shapes if name.startswith(blocks)}
    width, _, _, patch = shapes[patches]
    return VitConfig(
        image_size_px=patch * math.isqrt(shapes[table][-2] - 1),
        patch_size_px=patch,
        width=width,
        num_layers=len(layers),
        num_heads=width // head_width,
        mlp_width=shapes[f"{blocks}0.{up}"][0],
        **variant,
    )
