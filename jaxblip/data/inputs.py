"""From a run's config, its sources and its tokenizers to what the model reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from jaxblip.data.mixture import TrainSource, configs_of_sources, section_of
from jaxblip.data.packing import PackedSource, PackTexts
from jaxblip.data.pipeline import Part, TrainBatches
from jaxblip.data.preprocess import Preprocess, input_tokens
from jaxblip.data.templates import expanded
from jaxblip.data.text import fill_prompt
from jaxblip.data.tokenizers import TextEncoder
from jaxblip.errors import UserError


def text_encoder(config: ConfigDict, tokenizer: Any) -> TextEncoder:
    """Texts to ids, in the form that the task reads."""
    if "language_model" in config.model:
        stop_token = config.data.stop_token or None
        encoder = TextEncoder(tokenizer, config.data.max_text_tokens, "language_model", stop_token)
        if has_encoder(config):
            encoder.start_id = None  # the decoder has a start token of its own (`shift_right`)
        return encoder
    return TextEncoder(tokenizer, config.data.max_text_tokens, "qformer")


def has_encoder(config: ConfigDict) -> bool:
    """Whether the language model has an encoder, which reads the prompt."""
    return "max_input_tokens" in config.data


def instruction_encoder(config: ConfigDict, tokenizer: Any) -> TextEncoder:
    """Instructions to ids; of one that is too long the first words are left out.

    Of BLIP's questions the last ones, as in its code.
    """
    side = "right" if config.task == "blip_vqa" else "left"
    return TextEncoder(tokenizer, config.data.max_instruction_tokens, "qformer", truncation=side)


def prompt_ids(
    config: ConfigDict, encoder: TextEncoder, instruction: str = "", prompt: str | None = None
) -> list[int]:
    """What a language model reads before it generates: the prompt, behind BOS where there is one.

    An encoder reads it with an end token behind it, as in training.

    Args:
      prompt: with {} for the instruction; by default that of the run.
    """
    prompt = fill_prompt(config.data.prompt if prompt is None else prompt, instruction)
    if has_encoder(config):
        return input_tokens(encoder, [prompt], config.data.max_input_tokens)
    ids = encoder.prompt_ids(prompt)
    cut = max(0, len(ids) - config.data.get("max_instruction_tokens", len(ids)))
    start = len(encoder.prompt_ids(""))
    return ids[:start] + ids[start + cut :]


def train_batches(
    config: ConfigDict,
    fields: tuple[str, ...],
    sources: Sequence[TrainSource],
    tokenizer: Any,
    process: tuple[int, int],
    position: dict[str, Any] | None,
    qformer_tokenizer: Any = None,
) -> TrainBatches:
    """The batches of a run.

    Args:
      fields: what the task reads.
      qformer_tokenizer: for instructions; by default `tokenizer`.
      process: this process's part of each global batch, and the number of parts.
      position: `TrainBatches.state()` of the run that goes on; None begins.

    Raises:
      UserError: the run goes on, and a source has not as many examples as it had.
    """
    # The sources were opened before the tokenizer was known, which gives the config more values.
    of_sources = configs_of_sources(config)
    parts = [
        Part(
            each.source,
            make_preprocess(of_sources[each.name], fields, tokenizer, qformer_tokenizer),
            name=each.name,
            share=each.share,
            shuffle_block=each.config.data.shuffle_block,
        )
        for each in sources
    ]
    process_index, process_count = process
    if config.data.get("packing"):
        parts = _packed(parts, config, report=process_index == 0)
    if position:
        _check_same_sizes(parts, position["sizes"])
    return TrainBatches(
        parts,
        batch_size=config.batch_size,
        seed=config.seed,
        process_index=process_index,
        process_count=process_count,
        start_example=position["examples_seen"] if position else 0,
        num_workers=config.data.num_workers,
        max_bad_share=config.data.max_bad_share,
        counters=position,
    )


def _check_same_sizes(parts: Sequence[Part], before: Mapping[str, int]) -> None:
    for part in parts:
        if len(part.source) != before[part.name]:
            raise UserError(
                f"config.{section_of(part.name)}.train.source had {before[part.name]} "
                f"examples when the run began, and has {len(part.source)} now: give it the data "
                "that it had, or start anew in another --workdir."
            )


def _packed(parts: Sequence[Part], config: ConfigDict, report: bool) -> list[Part]:
    """Parts whose examples are rows of several texts; a part's texts keep their share.

    Args:
      report: whether to print how full the rows are.
    """
    packed = []
    for part in parts:
        source = PackedSource(part.source, part.preprocess, config.seed, config.data.max_bad_share)
        if report:
            print(part.prefix + source.describe())
        packed.append(
            dataclasses.replace(
                part,
                source=source,
                preprocess=PackTexts(part.preprocess),
                share=part.share * len(source) / len(part.source),
            )
        )
    rows = sum(len(part.source) for part in packed)
    if rows < config.batch_size:
        raise UserError(
            f"The texts fill {rows} rows of data.max_text_tokens={config.data.max_text_tokens}, "
            f"fewer than batch_size={config.batch_size}, so that a batch would repeat some: set "
            f"--config.batch_size to {rows} or less, or give it more texts."
        )
    return packed


def make_preprocess(
    config: ConfigDict, fields: tuple[str, ...], tokenizer: Any, qformer_tokenizer: Any
) -> Preprocess:
    """What is made of the examples of a source, by its config."""
    data = config.data
    return Preprocess(
        fields=fields,
        image_size_px=data.image_size_px,
        encoder=text_encoder(config, tokenizer),
        prompt=data.prompt,
        templates=expanded(data.get("templates", ())),
        max_words=data.max_words,
        max_input_tokens=data.get("max_input_tokens", 0),
        prefix_lm=config.loss.get("prefix_lm", False),
        instruction_encoder=(
            instruction_encoder(config, qformer_tokenizer or tokenizer)
            if "instruction_ids" in fields
            else None
        ),
        max_instruction_tokens=data.get("max_instruction_tokens", 0),
        captions_per_text=data.get("captions_per_text", 1),
        frames=data.get("frames", 1),
        crop_scale=tuple(data.crop_scale),
        crop_aspect=tuple(data.crop_aspect),
        interpolation=data.interpolation,
        flip_probability=data.flip_probability,
        randaugment=data.randaugment,
        max_image_pixels=data.max_image_pixels,
    )
