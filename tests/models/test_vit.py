"""The vision transformer against transformers, in both variants."""

from __future__ import annotations

import numpy as np
import torch
import transformers

from jaxblip.models.vit import VisionTransformer, VitConfig
from reference import clip_vit_params, eva_vit_params, randomized

SIZES = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=12,
    patch_size=4,
)
CONFIG = VitConfig(
    image_size_px=12, patch_size_px=4, width=16, num_layers=3, num_heads=2, mlp_width=24
)


def images():
    return np.random.default_rng(0).normal(size=(2, 12, 12, 3)).astype(np.float32)


def tokens_before_last_norm(model):
    """Output of the last block, whatever the model does with it."""
    seen = []
    hook = model.encoder.layers[-1].register_forward_hook(lambda *args: seen.append(args[-1]))
    with torch.no_grad():
        model(torch.tensor(images().transpose(0, 3, 1, 2)))
    hook.remove()
    return seen[0].numpy()


def ours(config, params):
    return VisionTransformer(config).apply({"params": params}, images())


def test_eva_clip_variant():
    reference = randomized(transformers.Blip2VisionModel(transformers.Blip2VisionConfig(**SIZES)))
    with torch.no_grad():
        for layer in reference.encoder.layers:
            layer.self_attn.qkv.bias[16:32] = 0.0
    config = VitConfig(**{**vars(CONFIG), "key_bias": False})
    expected = tokens_before_last_norm(reference)
    assert expected.shape == (2, config.num_tokens, 16)
    np.testing.assert_allclose(
        ours(config, eva_vit_params(reference)), expected, rtol=1e-4, atol=1e-4
    )


def test_clip_variant():
    reference = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZES))
    reference = randomized(reference)
    config = VitConfig(
        **{
            **vars(CONFIG),
            "activation": "quick_gelu",
            "layer_norm_epsilon": 1e-5,
            "pre_norm": True,
            "patch_bias": False,
        }
    )
    np.testing.assert_allclose(
        ours(config, clip_vit_params(reference)),
        tokens_before_last_norm(reference),
        rtol=1e-4,
        atol=1e-4,
    )
