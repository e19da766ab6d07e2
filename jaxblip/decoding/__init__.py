"""Text from a language model: greedy and beam search and sampling over a static-shape cache."""

from jaxblip.decoding.causal import CausalDecoder
from jaxblip.decoding.cross_attending import generate_answers, generate_captions
from jaxblip.decoding.encoder_decoder import EncoderDecoder
from jaxblip.decoding.generation import generate
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
    "generate_answers",
    "generate_captions",
    "greedy_search",
    "run_search",
    "sample_search",
]
