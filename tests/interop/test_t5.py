"""T5 configs of Hugging Face against what transformers makes of them."""

from __future__ import annotations

import json

import pytest
import transformers

from jaxblip.errors import UserError
from jaxblip.interop.families.t5 import t5_config
from jaxblip.models.t5 import T5Config

# As on the hub: FlanT5-XL by itself, and as the text_config of BLIP-2; T5-small, whose file says
# neither what its feed-forward network is nor that its head is tied.
FLAN_T5_XL = dict(
    d_ff=5120, d_kv=64, d_model=2048, num_layers=24, num_decoder_layers=24, num_heads=32,
    feed_forward_proj="gated-gelu", tie_word_embeddings=False, vocab_size=32128,
    layer_norm_epsilon=1e-6, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    relative_attention_num_buckets=32, relative_attention_max_distance=128, dropout_rate=0.1,
)  # fmt: skip
BLIP2_FLAN_T5_XL = FLAN_T5_XL | dict(dense_act_fn="gelu", is_gated_act=True)
T5_SMALL = dict(
    d_ff=2048, d_kv=64, d_model=512, num_layers=6, num_heads=8, vocab_size=32128,
    decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
)  # fmt: skip


def test_flan_t5_xl():
    expected = T5Config(
        width=2048, num_layers=24, num_decoder_layers=24, num_heads=32, mlp_width=5120
    )
    assert t5_config(FLAN_T5_XL) == expected
    assert expected.activation == "gelu_new" and expected.gated and not expected.tied_head


def test_blip2_has_the_exact_gelu():
    config = t5_config(BLIP2_FLAN_T5_XL)
    assert config.activation == "gelu" and config.gated
    # What would be lost without dense_act_fn, in transformers as here:
    assert transformers.T5Config(**BLIP2_FLAN_T5_XL).dense_act_fn == "gelu"
    assert transformers.T5Config(**FLAN_T5_XL).dense_act_fn == "gelu_new"


def test_t5_small():
    config = t5_config(T5_SMALL)
    assert (config.activation, config.gated, config.tied_head) == ("relu", False, True)
    assert config.num_decoder_layers == 6


@pytest.mark.parametrize("file", [FLAN_T5_XL, BLIP2_FLAN_T5_XL, T5_SMALL, {}])
def test_same_as_by_transformers_and_as_from_the_file_that_it_writes(file):
    config, theirs = t5_config(file), transformers.T5Config(**file)
    names = dict(
        vocab_size="vocab_size", width="d_model", num_layers="num_layers",
        num_decoder_layers="num_decoder_layers", num_heads="num_heads", head_width="d_kv",
        mlp_width="d_ff", gated="is_gated_act", activation="dense_act_fn",
        tied_head="scale_decoder_outputs", num_position_buckets="relative_attention_num_buckets",
        max_position_distance="relative_attention_max_distance",
        layer_norm_epsilon="layer_norm_epsilon",
    )  # fmt: skip
    for ours, name in names.items():
        assert getattr(config, ours) == getattr(theirs, name), ours
    assert t5_config(json.loads(theirs.to_json_string())) == config


def test_other_fields():
    config = t5_config(
        dict(num_layers=3, num_decoder_layers=None, decoder_start_token_id=4, pad_token_id=2)
    )
    assert (config.num_decoder_layers, config.start_token_id, config.dropout) == (3, 4, 0.0)
    assert t5_config(dict(pad_token_id=2)).start_token_id == 2
    assert t5_config(dict(dense_act_fn="gelu_pytorch_tanh")).activation == "gelu_new"


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(feed_forward_proj="gated-silu"), "activation 'silu'"),
        (dict(dense_act_fn="swish"), "activation 'swish'"),
        (dict(feed_forward_proj="doubly-gelu"), "feed_forward_proj='doubly-gelu'"),
    ],
)
def test_feed_forward_networks_that_are_not_supported(fields, message):
    with pytest.raises(UserError, match=message):
        t5_config(fields)
