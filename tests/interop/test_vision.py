"""Vision configs of transformers as `VitConfig`, counted at full size."""

from __future__ import annotations

import json
import math

import jax
import jax.numpy as jnp
import pytest
import torch
import transformers

from jaxblip.errors import UserError
from jaxblip.interop.families.vision import DEFAULTS, vit_config
from jaxblip.models.vit import AttentionPooling, VisionTransformer, VitConfig

CLASSES = {
    "clip_vision_model": (transformers.CLIPVisionConfig, transformers.CLIPVisionModel),
    "blip_2_vision_model": (transformers.Blip2VisionConfig, transformers.Blip2VisionModel),
    "instructblip_vision_model": (
        transformers.InstructBlipVisionConfig,
        transformers.InstructBlipVisionModel,
    ),
    "blip_vision_model": (transformers.BlipVisionConfig, transformers.BlipVisionModel),
    "siglip_vision_model": (transformers.SiglipVisionConfig, transformers.SiglipVisionModel),
}


@pytest.mark.parametrize("model_type", CLASSES)
def test_the_defaults_are_those_of_transformers(model_type):
    theirs = CLASSES[model_type][0]().to_dict()
    assert theirs["model_type"] == model_type
    ours = {name: value for name, value in DEFAULTS[model_type].items() if name in theirs}
    assert ours == {name: theirs[name] for name in ours}
    # BLIP's classes take three channels for granted.
    assert set(DEFAULTS[model_type]) - set(ours) <= {"num_channels"}
    assert vit_config({"model_type": model_type}) == vit_config(theirs)
    # A config that went through a file.
    assert vit_config(json.loads(json.dumps(theirs))) == vit_config(theirs)


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        (
            "clip_vision_model",
            VitConfig(
                patch_size_px=32,
                activation="quick_gelu",
                layer_norm_epsilon=1e-5,
                pre_norm=True,
                patch_bias=False,
            ),
        ),
        (
            "blip_2_vision_model",
            VitConfig(
                patch_size_px=14,
                width=1408,
                num_layers=39,
                num_heads=16,
                mlp_width=6144,
                key_bias=False,
            ),
        ),
        # The class's epsilon; the original BLIP has 1e-6.
        ("blip_vision_model", VitConfig(image_size_px=384, layer_norm_epsilon=1e-5)),
        ("siglip_vision_model", VitConfig(activation="gelu_tanh", has_cls_token=False)),
    ],
)
def test_the_variant_of_each_model_type(model_type, expected):
    assert vit_config({"model_type": model_type}) == expected
    if model_type == "blip_2_vision_model":
        assert vit_config({"model_type": "instructblip_vision_model"}) == expected


LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
}
GIANT_OPT = {
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "num_hidden_layers": 40,
    "num_attention_heads": 16,
}
RELEASED = {
    "clip-vit-base-patch32": ("clip_vision_model", {}),
    "clip-vit-base-patch16": ("clip_vision_model", {"patch_size": 16}),
    "clip-vit-large-patch14": ("clip_vision_model", LARGE | {"patch_size": 14}),
    "clip-vit-large-patch14-336": (
        "clip_vision_model",
        LARGE | {"patch_size": 14, "image_size": 336},
    ),
    "blip2-opt-2.7b": ("blip_2_vision_model", {}),
    "blip2-opt-2.7b-coco": ("blip_2_vision_model", {"image_size": 364}),
    "instructblip-vicuna-7b": ("instructblip_vision_model", {}),
    "blip-image-captioning-base": ("blip_vision_model", {}),
    "blip-image-captioning-large": ("blip_vision_model", LARGE),
    "siglip-base-patch16-224": ("siglip_vision_model", {}),
    "siglip-large-patch16-256": ("siglip_vision_model", LARGE | {"image_size": 256}),
    "siglip-so400m-patch14-384": (
        "siglip_vision_model",
        SO400M | {"image_size": 384, "patch_size": 14},
    ),
    "siglip2-giant-opt-patch16-256": ("siglip_vision_model", GIANT_OPT | {"image_size": 256}),
}


def count(module, *inputs) -> int:
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("name", RELEASED)
def test_parameters_at_full_size(name):
    """As many as transformers has, the norm behind the last block and the key biases aside."""
    model_type, fields = RELEASED[name]
    config = vit_config({"model_type": model_type} | fields)
    config_class, model_class = CLASSES[model_type]
    with torch.device("meta"):
        theirs = model_class(config_class(**fields))
    expected = sum(parameter.numel() for parameter in theirs.parameters())
    side = config.image_size_px
    ours = count(VisionTransformer(config), jnp.zeros((1, side, side, 3))) + 2 * config.width
    if model_type == "siglip_vision_model":
        ours += count(AttentionPooling(config), jnp.zeros((1, 1, config.width)))
    if not config.key_bias:
        ours += config.num_layers * config.width  # zeros in the joint bias of transformers
    assert ours == expected


def test_the_checkpoints_own_values_count():
    """Each field away from the class's default, and from jaxblip's."""
    fields = {
        "model_type": "blip_vision_model",
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "image_size": 60,
        "patch_size": 12,
        "hidden_act": "relu",
        "layer_norm_eps": 1e-3,
        "initializer_range": 1e-10,
        "projection_dim": 7,
    }
    assert vit_config(fields) == VitConfig(
        image_size_px=60,
        patch_size_px=12,
        width=48,
        num_layers=5,
        num_heads=6,
        mlp_width=80,
        activation="relu",
        layer_norm_epsilon=1e-3,
    )


def test_sizes_as_pairs_and_a_patch_that_does_not_fit():
    config = vit_config(
        {"model_type": "siglip_vision_model", "image_size": [384, 384], "patch_size": (14, 14)}
    )
    assert (config.image_size_px, config.patch_size_px) == (384, 14)
    assert config.crop_to_patches and config.num_tokens == 27**2


@pytest.mark.parametrize(
    ("model_type", "field", "value"),
    [
        ("clip_vision_model", "num_channels", 4),
        ("clip_vision_model", "hidden_act", "swish"),
        ("blip_vision_model", "attention_dropout", 0.1),
        ("blip_2_vision_model", "qkv_bias", False),
        ("instructblip_vision_model", "qkv_bias", False),
        ("siglip_vision_model", "image_size", [224, 256]),
        ("siglip_vision_model", "image_size", None),
        ("clip_vision_model", "patch_size", [16, 14]),
        ("siglip2_vision_model", "model_type", "siglip2_vision_model"),
        (None, "model_type", None),
    ],
)
def test_what_is_not_covered_is_an_error_with_field_and_value(model_type, field, value):
    with pytest.raises(UserError) as error:
        vit_config({"model_type": model_type, field: value})
    assert f"vision_config.{field}={value!r}" in str(error.value)
    assert model_type is None or model_type in str(error.value)


def test_heads_that_do_not_divide_the_width():
    with pytest.raises(UserError, match="num_heads=7.*width=768"):
        vit_config({"model_type": "clip_vision_model", "num_attention_heads": 7})
