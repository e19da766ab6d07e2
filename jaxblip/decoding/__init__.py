"""Text from a language model: greedy and beam search and sampling over a static-shape cache."""

from jaxblip.decoding.causal import CausalDecoder, generate
from jaxblip.decoding.encoder_decoder import EncoderDecoder, generate_from_encoder
from jaxblip.decoding.search import (
    Decoder,
    DecodingConfig,
    beam_search,
    greedy_search,
    run_search,
    sample_search,
)

__all__ = [
    "CausalDecoder",
    "Decoder",
    "DecodingConfig",
    "EncoderDecoder",
    "beam_search",
    "generate",
    "generate_from_encoder",
    "greedy_search",
    "run_search",
    "sample_search",
]
