"""Text from a decoder language model: greedy and beam search over a static-shape cache."""

from jaxblip.decoding.causal import CausalDecoder, generate
from jaxblip.decoding.search import Decoder, DecodingConfig, beam_search, greedy_search

__all__ = [
    "CausalDecoder",
    "Decoder",
    "DecodingConfig",
    "beam_search",
    "generate",
    "greedy_search",
]
