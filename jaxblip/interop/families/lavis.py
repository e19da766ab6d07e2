"""LAVIS's files of BLIP-2 and InstructBLIP, which have no config: models by names and shapes.

Those of stage 1 have the heads of ITC, ITM and ITG; those of stage 2 and of InstructBLIP have the
projection to a language model that is not in the file, and mostly no image encoder, which was
frozen.
"""

from __future__ import annotations

import dataclasses
import math

from jaxblip.errors import UserError
from jaxblip.interop.entries import Layout, linear, norm, plain
from jaxblip.interop.families.llama import INVERSE_FREQUENCIES
from jaxblip.interop.families.qformer import LAVIS, qformer_entries
from jaxblip.interop.families.sizes import heads_of, layers_with, num_layers, shape_of
from jaxblip.interop.families.vision import POSITION_IDS, VARIANTS, lavis_vit_entries
from jaxblip.interop.files import Weights
from jaxblip.models.qformer import QFormerConfig
from jaxblip.models.vit import VitConfig

VISION = "visual_encoder."
HEADS = "vision_proj"  # one of stage 1's
PROJECTIONS = ("opt_proj", "t5_proj", "llm_proj")  # to OPT, FlanT5 and Vicuna
EVA_BLOCKS = 39  # of the 40 of ViT-g
VISION_NORM_EPSILON = 1e-5  # of ln_vision; transformers has 1e-6


@dataclasses.dataclass(frozen=True)
class LavisModel:
    """What a file holds.

    Attributes:
      vision: None where the file is without the image encoder.
      qformer: with a text side in stage 1 and in InstructBLIP.
      embed_dim: of stage 1's contrastive space; None in the other files.
      projection: the name of the map to the language model; None in stage 1.
    """

    vision: VitConfig | None
    qformer: QFormerConfig
    embed_dim: int | None = None
    projection: str | None = None


def is_lavis(weights: Weights) -> bool:
    """Whether these are the names of a BLIP-2 or InstructBLIP of LAVIS."""
    return "query_tokens" in weights.tensors and any(
        name.startswith("Qformer.") for name in weights.tensors
    )


def is_lavis_encoder(weights: Weights) -> bool:
    """Whether these are the names of LAVIS's EVA-CLIP alone, `eva_vit_g.pth`."""
    return {"patch_embed.proj.weight", "blocks.0.attn.q_bias"} <= set(weights.tensors)


def lavis_encoder(weights: Weights) -> tuple[VitConfig, Layout]:
    """The blocks that LAVIS uses of its EVA-CLIP, and how the file, which may have more, holds it.

    Raises:
      UserError: a tensor that decides a size is not there.
    """
    config = lavis_vit_config(weights, "")
    layout = Layout(lavis_vit_entries(config), ignored=(r"(norm|fc_norm|head)\..*",))
    return dataclasses.replace(config, num_layers=min(config.num_layers, EVA_BLOCKS)), layout


def lavis_model(weights: Weights) -> LavisModel:
    """What a file of LAVIS holds.

    Raises:
      UserError: a tensor that decides a size is not there, or neither heads nor projection.
    """
    vision, qformer = lavis_vit_config(weights), lavis_qformer_config(weights)
    roots = {name.split(".")[0] for name in weights.tensors}
    projection = next((name for name in PROJECTIONS if name in roots), None)
    if projection is not None:
        return LavisModel(vision, qformer, projection=projection)
    if HEADS not in roots:
        raise UserError(
            f"{weights.source!r} has neither the heads of stage 1 ({HEADS}) nor a projection to a "
            f"language model ({', '.join(PROJECTIONS)}): it is no whole checkpoint of LAVIS."
        )
    embed_dim, _ = shape_of(weights, f"{HEADS}.weight", 2)
    return LavisModel(vision, qformer, embed_dim=embed_dim)


def lavis_layout(model: LavisModel) -> Layout:
    """How such a file holds the parameters of stage 1, stage 2 or InstructBLIP."""
    head = "Qformer.cls.predictions"
    entries = [
        *norm("ln_vision", "vision_norm"),
        *qformer_entries(model.qformer, LAVIS),
    ]
    if model.vision is not None:
        entries += lavis_vit_entries(model.vision, VISION)
    if model.projection is not None:
        entries += linear(model.projection, "projection")
    else:
        entries += [
            *linear("vision_proj", "image_projection"),
            *linear("text_proj", "text_projection"),
            *linear("itm_head", "itm_head"),
            *plain("temp", "temperature"),
            *linear(f"{head}.transform.dense", "itg_head/dense"),
            *norm(f"{head}.transform.LayerNorm", "itg_head/norm"),
            *plain(f"{head}.bias", "itg_head/bias", aliases=(f"{head}.decoder.bias",)),
        ]
    return Layout(tuple(entries), ignored=(POSITION_IDS, INVERSE_FREQUENCIES))


def lavis_qformer_config(weights: Weights) -> QFormerConfig:
    """The Q-Former of a file; heads are 64 wide, as in BERT.

    Raises:
      UserError: a tensor that decides a size is not there.
    """
    _, num_query_tokens, width = shape_of(weights, "query_tokens", 3)
    layers, words = LAVIS.layers, f"{LAVIS.embeddings}.word_embeddings.weight"
    depth, crossing = num_layers(weights, layers), layers_with(weights, layers, "crossattention.")
    mlp_width, _ = shape_of(weights, f"{layers}0.intermediate_query.dense.weight", 2)
    text = dict(has_text=False)
    # By any sign of a text side: where it is not whole, what is missing is an error.
    signs = words in weights.tensors, f"{HEADS}.weight" in weights.tensors
    if any(signs) or layers_with(weights, layers, "intermediate."):
        vocab_size, _ = shape_of(weights, words, 2)
        positions, _ = shape_of(weights, f"{LAVIS.embeddings}.position_embeddings.weight", 2)
        text = dict(vocab_size=vocab_size, max_positions=positions)
    return QFormerConfig(
        num_query_tokens=num_query_tokens,
        width=width,
        num_layers=depth,
        num_heads=heads_of(weights, width, 64),
        mlp_width=mlp_width,
        cross_attention_frequency=depth // max(len(crossing), 1),
        **text,
    )


def lavis_vit_config(weights: Weights, theirs: str = VISION) -> VitConfig | None:
    """The image encoder of a file; None where the file has none.

    EVA-CLIP has heads of width 88 and no biases of keys; CLIP, and the encoder of BLIP, which has
    all biases, have heads of width 64.

    Args:
      theirs: what its names begin with.
    """
    if f"{theirs}conv1.weight" in weights.tensors:
        blocks, up, table, patches = (
            "transformer.resblocks.", "mlp.c_fc.weight", "positional_embedding", "conv1.weight"
        )  # fmt: skip
        head_width, variant = 64, dict(activation="quick_gelu", layer_norm_epsilon=1e-5)
        variant |= VARIANTS["clip_vision_model"]
    elif f"{theirs}patch_embed.proj.weight" in weights.tensors:
        blocks, up, table, patches = (
            "blocks.", "mlp.fc1.weight", "pos_embed", "patch_embed.proj.weight"
        )  # fmt: skip
        is_blip = f"{theirs}blocks.0.attn.qkv.bias" in weights.tensors
        head_width = 64 if is_blip else 88
        variant = dict(activation="gelu", layer_norm_epsilon=1e-6)
        variant |= VARIANTS["blip_vision_model" if is_blip else "blip_2_vision_model"]
    else:
        return None
    width, _, _, patch = shape_of(weights, theirs + patches, 4)
    rows = shape_of(weights, theirs + table, 2 if table == "positional_embedding" else 3)[-2]
    mlp_width, _ = shape_of(weights, f"{theirs}{blocks}0.{up}", 2)
    return VitConfig(
        image_size_px=patch * math.isqrt(rows - 1),
        patch_size_px=patch,
        width=width,
        num_layers=num_layers(weights, theirs + blocks),
        num_heads=heads_of(weights, width, head_width),
        mlp_width=mlp_width,
        **variant,
    )
