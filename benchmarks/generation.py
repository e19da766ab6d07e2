"""Times captions: images and a prompt in, a given number of tokens out, greedily and by beams.

    python benchmarks/generation.py --size=small --peer

prints a table of ours and, in turns with it, that of transformers' BLIP-2 in PyTorch. Needs jax,
flax, optax, ml_collections and jaxtyping; the peer also torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from workloads import SIZES, make_config  # noqa: E402

from jaxblip import sharding  # noqa: E402
from jaxblip.decoding.generation import compiler_options, decode, prefill  # noqa: E402
from jaxblip.decoding.search import DecodingConfig  # noqa: E402
from jaxblip.tasks import make_task  # noqa: E402

DTYPES = ("bfloat16", "float32")
PROMPT_TOKENS = 8
# Bytes a second that a device reads, from the data sheets; of a CPU reading an array is timed.
BANDWIDTHS = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.0e12, "B200": 8e12}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch-size", type=int, default=8, help="images of a batch")
    parser.add_argument("--new-tokens", type=int, default=30, help="of each text")
    parser.add_argument("--num-beams", type=int, nargs="+", default=[1, 5], help="1 is greedy")
    parser.add_argument("--peer", action="store_true", help="PyTorch, in turns with ours")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="that we compute in")
    parser.add_argument("--rounds", type=int, default=5, help="in each, one measurement of each")
    parser.add_argument("--json", metavar="FILE", help="where to write the figures")
    options = parser.parse_args()
    device = jax.devices()[0]
    config = make_config("stage2", options.size, options.batch_size, options.dtype)
    inputs = random_images(config), random_prompts(config), options.new_tokens
    ours = OurCaptions(config, *inputs)
    subjects = {"jaxblip": ours}
    if options.peer:
        from peers.generation import TorchCaptions

        subjects["torch"] = TorchCaptions(config, *inputs)
        if device.platform == "cpu" and options.dtype == "bfloat16":
            subjects["torch, bf16"] = TorchCaptions(config, *inputs, bfloat16=True)
    figures = {
        "machine": f"{device.device_kind}, {os.cpu_count()} cores, {jax.device_count()} device(s)",
        "size": options.size,
        "batch_size": options.batch_size,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": options.new_tokens,
        "dtype": options.dtype,
        "gb_of_weights": ours.bytes_a_step / 1e9,
        "gb_per_s": bandwidth(device) / 1e9,
        "decodings": {
            "greedy" if beams == 1 else f"beam {beams}": {
                name: of_times(options, times)
                for name, times in measured(subjects, options, beams).items()
            }
            for beams in options.num_beams
        },
        "compile_s": ours.compile_s,
    }
    for kind, of in (("ratio", "tokens_per_s"), ("decode_ratio", "decode_tokens_per_s")):
        figures[kind] = {
            decoding: {name: ours[of] / peer[of] for name, peer in peers.items()}
            for decoding, (ours, peers) in sides(figures["decodings"]).items()
        }
    print("\n".join(table(figures)))
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n")


def sides(decodings: dict) -> dict[str, tuple[dict, dict]]:
    """Of each decoding, our figures, and those of the peers by name."""
    return {
        decoding: (rows["jaxblip"], {name: row for name, row in rows.items() if name != "jaxblip"})
        for decoding, rows in decodings.items()
    }


def measured(subjects: dict, options: argparse.Namespace, num_beams: int) -> dict[str, dict]:
    """Median seconds in turns, after one call of each that is left out.

    Returns:
      By subject, and by phase ("read": images, prompt and the first token; "caption": all) and
      number of images (a batch, and one).
    """
    cases = [
        (name, phase, rows)
        for rows in sorted({options.batch_size, 1})
        for phase in ("read", "caption")
        for name in subjects
    ]
    seconds = {case: [] for case in cases}
    for round_number in range(options.rounds + 1):
        for name, phase, rows in cases:
            begin = time.perf_counter()
            getattr(subjects[name], phase)(rows, num_beams)
            if round_number:
                seconds[name, phase, rows].append(time.perf_counter() - begin)
    return {
        name: {
            (phase, rows): statistics.median(times)
            for (of, phase, rows), times in seconds.items()
            if of == name
        }
        for name in subjects
    }


def of_times(options: argparse.Namespace, seconds: dict) -> dict[str, float]:
    """The figures of a subject."""
    rows, tokens = options.batch_size, options.batch_size * options.new_tokens
    decode_s = max(seconds["caption", rows] - seconds["read", rows], 1e-9)
    return {
        "tokens_per_s": tokens / seconds["caption", rows],
        "decode_tokens_per_s": (tokens - rows) / decode_s,
        "step_s": decode_s / max(options.new_tokens - 1, 1),
        "batch_s": seconds["caption", rows],
        "batch_read_s": seconds["read", rows],
        "image_s": seconds["caption", 1],
        "image_read_s": seconds["read", 1],
    }


def random_images(config: ConfigDict) -> np.ndarray:
    """Images of noise."""
    size = config.data.image_size_px
    shape = config.batch_size, size, size, 3
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def random_prompts(config: ConfigDict) -> np.ndarray:
    """A prompt for each image, all of the same length."""
    shape = config.batch_size, PROMPT_TOKENS
    return np.random.default_rng(1).integers(3, 500, shape, np.int32)


class OurCaptions:
    """Captions as `decoding.image_to_text` makes them, with random parameters.

    Attributes:
      bytes_a_step: of the weights that a step reads.
      compile_s: seconds of compilation so far, of all shapes and searches.
    """

    def __init__(
        self, config: ConfigDict, images: np.ndarray, prompt_ids: np.ndarray, new_tokens: int
    ):
        self._task = task = make_task(config)
        dtype = jnp.dtype(config.frozen_dtype)
        mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])

        def params():
            return jax.tree.map(lambda leaf: leaf.astype(dtype), task.init(jax.random.key(0)))

        self._params = jax.jit(params)()
        self.bytes_a_step = _bytes_a_step(self._params["language_model"])
        self._images, self._prompt_ids = images, jnp.asarray(prompt_ids)
        self._new_tokens, self.compile_s = new_tokens, 0.0
        jit = partial(jax.jit, compiler_options=compiler_options(mesh))
        self._programs = {
            "encode": jit(self._encoded),
            "prefill": jit(self._prefilled, static_argnames="num_beams"),
            "decode": jit(self._decoded, static_argnames="num_beams", donate_argnames="state"),
        }
        self._compiled = {}

    def read(self, rows: int, num_beams: int) -> tuple[Any, ...]:
        """Images and prompt, and the scores of the first token; finished."""
        visual = self._run("encode", self._images[:rows])
        prompt_ids = self._prompt_ids[:rows]
        return jax.block_until_ready(self._run("prefill", visual, prompt_ids, num_beams=num_beams))

    def caption(self, rows: int, num_beams: int) -> np.ndarray:
        """All of it; the ids."""
        ids, _ = self._run("decode", *self.read(rows, num_beams), num_beams=num_beams)
        return np.asarray(ids)

    def _run(self, name: str, *inputs, **static):
        key = name, len(inputs[0]), *static.values()
        if key not in self._compiled:
            begin = time.perf_counter()
            lowered = self._programs[name].lower(self._params, *inputs, **static)
            self._compiled[key] = lowered.compile()
            self.compile_s += time.perf_counter() - begin
        return self._compiled[key](self._params, *inputs)

    def _encoded(self, params, images):
        task = self._task
        return task.apply(params, task.normalize_images(images), method="visual_tokens")

    def _prefilled(self, params, visual, prompt_ids, *, num_beams):
        model, own = self._task.language_model, params["language_model"]
        words = model.apply({"params": own}, prompt_ids, method="embed")
        embeddings = jnp.concatenate([visual.astype(words.dtype), words], axis=1)
        valid = jnp.ones(embeddings.shape[:2], bool)
        return prefill(model, own, embeddings, valid, self._new_tokens, num_beams)

    def _decoded(self, params, logits, state, *, num_beams):
        # No text ends before its last token, so that both sides make as many.
        search = DecodingConfig(
            self._new_tokens,
            stop_token_id=2,
            pad_token_id=1,
            min_new_tokens=self._new_tokens,
            num_beams=num_beams,
        )
        own = params["language_model"]
        return decode(self._task.language_model, own, logits, state, search)


def _bytes_a_step(params: dict) -> int:
    """Bytes of the layers that write a token, and of the head."""
    layers = params["decoder"] if "decoder" in params else params["layers"]
    head = params.get("lm_head", params["token_embedding"])
    return sum(leaf.nbytes for leaf in jax.tree.leaves((layers, head)))


def bandwidth(device: jax.Device) -> float:
    """Bytes a second that a device can read."""
    for name, bytes_per_s in BANDWIDTHS.items():
        if name in device.device_kind:
            return bytes_per_s
    array, total = jnp.ones(2**26, jnp.float32), jax.jit(jnp.sum)
    total(array).block_until_ready()
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        total(array).block_until_ready()
        times.append(time.perf_counter() - begin)
    return array.nbytes / min(times)


def table(figures: dict) -> list[str]:
    lines = [
        f"generation {figures['size']}, batch {figures['batch_size']}, {figures['new_tokens']} "
        f"tokens behind an image and {figures['prompt_tokens']}, {figures['dtype']}, "
        f"{figures['machine']}; a step reads {figures['gb_of_weights']:.2f} GB of weights, the "
        f"memory gives {figures['gb_per_s']:.1f} GB/s",
        f"{'':20}{'tokens/s':>10}{'decoding':>10}{'s/step':>10}{'s/batch':>10}{'read':>10}"
        f"{'s/image':>10}{'read':>10}",
    ]
    columns = (
        "tokens_per_s", "decode_tokens_per_s", "step_s", "batch_s", "batch_read_s", "image_s",
        "image_read_s",
    )  # fmt: skip
    for decoding, rows in figures["decodings"].items():
        for name, row in rows.items():
            values = "".join(f"{row[column]:>10.4g}" for column in columns)
            lines.append(f"{decoding:8}{name:12}{values}")
    for decoding, ratios in figures["ratio"].items():
        for name, ratio in ratios.items():
            alone = figures["decode_ratio"][decoding][name]
            lines.append(
                f"{decoding}: jaxblip makes {ratio:.2f} times the tokens/s of {name}, "
                f"{alone:.2f} times from the first token on"
            )
    least = figures["gb_of_weights"] / figures["gb_per_s"]
    lines.append(
        f"jaxblip: reading the weights takes {least:.4g} s a step; {figures['compile_s']:.1f} s to "
        "compile"
    )
    return lines


if __name__ == "__main__":
    main()
