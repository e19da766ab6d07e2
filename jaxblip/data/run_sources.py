"""The data that a run's config names: the sources of its training, and its evaluation set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from jaxblip.data.captions import EachCaption
from jaxblip.data.eval_sections import KINDS
from jaxblip.data.eval_set import EvalSet, iterate_eval_images
from jaxblip.data.heldout import heldout_part, trained_part
from jaxblip.data.mixture import (
    WEIGHT,
    TrainSource,
    configs_of_sources,
    section_of,
    shares,
)
from jaxblip.data.samples import Source
from jaxblip.data.sources import open_source
from jaxblip.data.templates import expanded
from jaxblip.data.text import INSTRUCTION
from jaxblip.errors import UserError

CAPTIONS = ("sample", "all")  # values of config.data.captions


def open_train_sources(config: ConfigDict) -> list[TrainSource]:
    """The sources of a run, checked against batch, blocks and instructions.

    Without config.data.mixture that is the one that config.data.train.source names.
    """
    configs = configs_of_sources(config)
    opened = {name: _open_train_source(each) for name, each in configs.items()}
    sizes = [len(source) for source in opened.values()]
    weights = [config.data.mixture.get(name, {}).get(WEIGHT, 1.0) for name in configs]
    if sum(sizes) < config.batch_size:
        names = ", ".join(each.data.train.source for each in configs.values())
        raise UserError(
            f"{names} has {sum(sizes)} examples, fewer than batch_size={config.batch_size}, so "
            f"that a batch would repeat some: set --config.batch_size to {sum(sizes)} or less, or "
            "give it more examples."
        )
    for name, source in opened.items():
        _check_block(configs[name], name, len(source))
    parts = shares(weights, sizes, config.data.mixture_exponent)
    return [
        TrainSource(name, configs[name], opened[name], share)
        for name, share in zip(configs, parts, strict=True)
    ]


def _open_train_source(config: ConfigDict) -> Source:
    if not config.data.train.source:
        raise UserError(
            "config.data.train.source is empty: set --config.data.train.source to shapes:train or "
            "to the path of your data, such as a .jsonl file."
        )
    data, prompts = config.data, train_prompts(config)
    if data.captions not in CAPTIONS:
        raise UserError(
            f"data.captions={data.captions!r} is none of {', '.join(CAPTIONS)}: choose one."
        )
    source = trained_part(config, _open(config, data.train.source, data))
    _check_instructions(config, source, data.train.source, prompts, "data.templates")
    return EachCaption(source) if _why_all(data) else source


def read_eval_set(config: ConfigDict, images: bool = True) -> EvalSet:
    """The evaluation images with all their captions, in memory; or the captions alone."""
    data, name = config.data, config.eval.source
    if name:
        source = _open(config, name, config.eval)
    else:
        name = data.train.source
        source = heldout_part(config, _open(config, name, data))
    if not images and hasattr(source, "without_images"):
        source = source.without_images()
    prompts = eval_prompts(config)
    _check_instructions(config, source, name, prompts, "eval.templates")
    return iterate_eval_images(
        source,
        data.image_size_px,
        data.max_image_pixels,
        data.max_words,
        config.eval.max_images,
        reads_instructions(config, prompts),
        data.resize,
        data.interpolation,
        data.get("frames", 1),
    )


def _why_all(data: ConfigDict) -> str:
    """The setting that makes every caption an example; "" where each image is one."""
    if data.captions == "all":
        return "data.captions='all'"
    return "data.packing=True" if data.get("packing") else ""


def _check_block(config: ConfigDict, name: str, size: int) -> None:
    block, why_all = config.data.shuffle_block, _why_all(config.data)
    if why_all and block != 1:
        raise UserError(
            f"data.shuffle_block={block} would keep captions of one image together, which are no "
            f"negatives of each other, where {why_all}: set "
            f"--config.{section_of(name)}.shuffle_block=1."
        )
    if block < 1 or size % block:
        raise UserError(
            f"data.shuffle_block={block} does not divide the {size} examples of "
            f"{config.data.train.source}: --config.{section_of(name)}.shuffle_block=1 shuffles "
            "them one by one."
        )


def _open(config: ConfigDict, spec: str, section: ConfigDict) -> Source:
    """A source with the field map and the image folder of `section`, or else of config.data."""
    named = any(section.fields.values())
    return open_source(
        spec,
        image_size_px=config.data.image_size_px,
        fields=(section if named else config.data).fields.to_dict(),
        image_folder=section.image_folder or config.data.image_folder,
        frames=config.data.get("frames", 1),
    )


def reads_instructions(config: ConfigDict, prompts: Sequence[str] = ()) -> bool:
    """Whether every example must have an instruction.

    So it is where a prompt has a place for it, and where a task reads the instruction by itself.

    Args:
      prompts: by default the one of evaluation and generation.
    """
    by_itself = "max_instruction_tokens" in config.data
    return any(
        INSTRUCTION in prompt or (not prompt and by_itself)
        for prompt in prompts or (config.data.prompt,)
    )


def train_prompts(config: ConfigDict) -> tuple[str, ...]:
    """Of which one stands before each caption in training."""
    return expanded(config.data.get("templates", ())) or (config.data.prompt,)


def eval_prompts(config: ConfigDict) -> tuple[str, ...]:
    """Of which one stands before the text of each entry of an evaluation set."""
    if "classification" in KINDS[config.task]:  # whose templates are about classes
        return (config.data.prompt,)
    return expanded(config.eval.get("templates", ())) or (config.data.prompt,)


def prompts_of_entries(config: ConfigDict, entries: int) -> list[str]:
    """That of each entry of an evaluation set; with templates drawn, the same every time."""
    prompts = eval_prompts(config)
    chosen = np.random.default_rng(0).integers(len(prompts), size=entries)
    return [prompts[number] for number in chosen]


def _check_instructions(
    config: ConfigDict, source: Source, name: str, prompts: Sequence[str], templates: str
) -> None:
    """Raises UserError where one of `prompts` (of the field `templates`) has nothing to read."""
    reading = [prompt for prompt in prompts if reads_instructions(config, [prompt])]
    if not reading or getattr(source, "has_instructions", False):
        return
    prompt, field = reading[0], "data.prompt" if reading[0] == config.data.prompt else templates
    reader = f"{field}={prompt!r}" if prompt else config.task
    raise UserError(
        f"Examples of {name} have no instruction, which {reader} reads: give each line a "
        '"question" and an "answer", or an "instruction" and an "output".'
    )
