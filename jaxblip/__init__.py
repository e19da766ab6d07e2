"""jaxblip: training of BLIP-2-style vision-language models in JAX and Flax."""

__version__ = "0.1.0"
