"""What a run takes over from the weights that it starts from, beside their values.

These are the sizes of the model's parts, how pixels are normalised, and the tokenizer, of published
weights as of other runs.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxblip.config import config_from_dict, default_config
from jaxblip.data.run_tokenizers import QFORMER_TOKENIZER_FOLDER, TOKENIZER_FOLDER
from jaxblip.data.tokenizers import load_tokenizer
from jaxblip.errors import UserError
from jaxblip.interop.files import REPOSITORY
from jaxblip.interop.processors import ImageProcessing, find_image_processing
from jaxblip.interop.published import Published, open_published
from jaxblip.interop.tokenizer import published_tokenizer
from jaxblip.models.language_models import LANGUAGE_MODELS
from jaxblip.overrides import overridden_fields
from jaxblip.tasks import STAGE2_TASKS
from jaxblip.tasks.parts import NOT_IN_CONFIG
from jaxblip.training.checkpoints import CONFIG_FILE
from jaxblip.training.sources import (
    ALL,
    HUB,
    PARTS,
    is_converted,
    is_published,
    is_run,
    shared_parts,
)

# Fields that are choices of the training, not properties of weights.
CHOICES = (
    "remat",
    "dropout",
    "hidden_dropout",
    "attention_dropout",
    "initializer_range",
    "enc_token_id",
    "connector",
)
# The section whose texts a task's tokenizer is for.
TOKENIZER_OF = {
    "blip_caption": "text",
    "blip_retrieval": "text",
    "blip_vqa": "text",
    "clip": "text",
    "instruct": "language_model",
    "stage1": "qformer",
    "stage2": "language_model",
    "language_model": "language_model",
}


@dataclasses.dataclass(frozen=True)
class Adopted:
    """A config that fits its sources.

    Attributes:
      config: a copy, with revisions of repositories written out.
      tokenizer: makes the tokenizer of the source that decides it; None where none does.
      lines: what has changed in the config.
      qformer_tokenizer: as `tokenizer`, of a Q-Former that has another one.
    """

    config: ConfigDict
    tokenizer: Callable[[], Any] | None
    lines: Sequence[str]
    qformer_tokenizer: Callable[[], Any] | None = None


@dataclasses.dataclass(frozen=True)
class _Source:
    """What published weights say of a config.

    Attributes:
      name: for messages.
      pinned: the source, with its revision.
      task: that has the whole of it.
      sections: fields by section of `config.model`; those that are choices may be among them.
      fields: what else it says of `config.model`.
      pixels: fields of `config.data`.
      is_clip: an image encoder of CLIP whose last block BLIP-2 leaves out.
      tokenizers: makes its tokenizers, by the section that each belongs to.
    """

    name: str
    pinned: str
    task: str
    sections: Mapping[str, Mapping[str, Any]]
    fields: Mapping[str, Any]
    pixels: Mapping[str, Any]
    is_clip: bool
    tokenizers: Mapping[str, Callable[[], Any]]


def has_sizes(source: str) -> bool:
    """Whether a field of `config.init` names something that decides sizes."""
    return is_published(source) or is_run(source)


def adopt_sources(config: ConfigDict) -> Adopted:
    """The config with the sizes of the weights that `config.init` names.

    Raises:
      UserError: a source cannot be read or lacks the part that it is named for, or a field that
        was set on the command line says otherwise.
    """
    overridden = overridden_fields(config)
    config = config.copy_and_resolve_references()
    owners = [TOKENIZER_OF[config.task]]
    if "qformer_tokenizer" in config.data:
        owners.append("qformer")
    tokenizers, lines = {}, []
    for field in (ALL, *PARTS):  # what is named for a part counts more
        name = config.init.get(field, "")
        if not has_sizes(name):
            continue
        source = _describe(name)
        with config.unlocked():
            config.init[field] = source.pinned
            lines += _adopt(config, field, source, overridden)
        for owner in owners:
            decides = owner == field or (field == ALL and not config.init.get(owner, ""))
            is_ours = source.task == config.task or owner in shared_parts(config.task, source.task)
            if decides and is_ours and owner in source.tokenizers:
                tokenizers[owner] = source.tokenizers[owner]
    tokenizer, *other = map(tokenizers.get, owners)
    return Adopted(config.lock(), tokenizer, lines, *other)


def _adopt(
    config: ConfigDict, field: str, source: _Source, overridden: frozenset[str]
) -> list[str]:
    model, lines = config.model, []
    is_whole = field == ALL and source.task == config.task
    if field == ALL:
        shared = shared_parts(config.task, source.task)
        sections = [name for name in source.sections if name in shared or is_whole]
        sections = [name for name in sections if name in model and not config.init.get(name, "")]
    else:
        sections = [field]
        if field not in source.sections:
            raise UserError(
                f"config.init.{field} names {source.name}, which has no {field}: it has "
                f"{', '.join(source.sections)}."
            )
    for section in sections:
        changed, line = _adopt_section(config, section, source, overridden)
        if changed:
            lines.append(f"config.model.{section} has the sizes of {source.name}.{line}")
    # The norm is trained with the Q-Former, and its vocabulary has [DEC].
    of_qformer = ("vision_norm_epsilon", "dec_token_id") if "qformer" in sections else ()
    for name, value in source.fields.items():
        if name in model and name not in CHOICES and (is_whole or name in of_qformer):
            _set(model, name, value, "model", source, overridden)
    if "vision" in sections:
        for name, value in source.pixels.items():
            # How images become squares is a choice of the training: BLIP-2 squashes them for CLIP.
            if name == "resize" and (not is_whole or "data.resize" in overridden):
                continue
            if _set(config.data, name, value, "data", source, overridden):
                lines.append(f"config.data.{name} is that of {source.name}: {value}.")
    return lines


def _adopt_section(
    config: ConfigDict, section: str, source: _Source, overridden: frozenset[str]
) -> tuple[bool, str]:
    """Replaces a section; whether that changed anything, and a remark."""
    ours, theirs, line = config.model[section], dict(source.sections[section]), ""
    architecture = ours.get("architecture")
    is_other = theirs.get("architecture", architecture) != architecture
    if not is_other:  # else the fields are others, too
        theirs = {name: value for name, value in theirs.items() if name in ours}
    theirs |= {name: ours[name] for name in CHOICES if name in theirs and name in ours}
    if section == "vision":
        theirs["num_layers"], line = _num_layers(config, source, overridden)
    result = ConfigDict(theirs if is_other else dict(ours) | theirs)
    changed = result.to_dict() != ours.to_dict()
    for name, value in result.items():
        if name in ours:
            _check(ours[name], value, f"model.{section}.{name}", source, overridden)
    config.model[section] = result
    if is_other:
        _fit_architecture(config)
    return changed, line


def _num_layers(
    config: ConfigDict, source: _Source, overridden: frozenset[str]
) -> tuple[int, str]:
    """Blocks of the image encoder: the config may have fewer than the source, the first ones."""
    given, there = config.model.vision.num_layers, source.sections["vision"]["num_layers"]
    is_given = "model.vision.num_layers" in overridden or (
        given != default_config(config.task).model.vision.num_layers
    )
    if is_given and given < there:
        return given, f" Of its {there} blocks the first {given} are used."
    if not is_given and source.is_clip and config.task in ("stage1", *STAGE2_TASKS):
        return there - 1, (
            f" Its last block of {there} is left out, as in BLIP-2 (paper §3.1); "
            f"--config.model.vision.num_layers={there} keeps it."
        )
    return there, ""


def _fit_architecture(config: ConfigDict) -> None:
    """Fields that only language models with an encoder have."""
    kind = config.model.language_model.architecture
    like = default_config(config.task, language_model=kind)
    for section, field in (("data", "max_input_tokens"), ("loss", "prefix_lm")):
        if field not in like[section] and field in config[section]:
            del config[section][field]
        elif field in like[section] and field not in config[section]:
            config[section][field] = like[section][field]


def _set(
    owner: ConfigDict,
    name: str,
    value: Any,
    section: str,
    source: _Source,
    overridden: frozenset[str],
) -> bool:
    """Sets a field; whether it was another value."""
    before = owner[name]
    _check(before, value, f"{section}.{name}", source, overridden)
    owner[name] = value
    return before != value


def _check(
    ours: Any, theirs: Any, name: str, source: _Source, overridden: frozenset[str]
) -> None:
    if name in overridden and ours != theirs:
        raise UserError(
            f"--config.{name}={ours} disagrees with {source.name}, which has {theirs}: leave it "
            "out, or name another source in config.init."
        )


def _describe(name: str) -> _Source:
    return _of_run(name) if is_run(name) else _published(name)


def _published(name: str) -> _Source:
    published = open_published(name)
    pinned, revision = name, published.weights.revision
    if revision:
        pinned = f"{HUB}{REPOSITORY.fullmatch(name.removeprefix(HUB))['name']}@{revision}"
    processing = find_image_processing(published.weights.folder)
    has_pixels = processing is not None and "vision" in published.configs
    return _Source(
        f"{name!r} ({published.name})",
        pinned,
        published.task,
        published_sections(published),
        published.fields,
        processing.data_fields() if has_pixels else {},
        published.name in ("CLIPModel", "CLIPVisionModel"),
        {
            section: partial(tokenizer_or_error, published, folder)
            for section, folder in published.tokenizers.items()
        },
    )


def _of_run(name: str) -> _Source:
    saved = json.loads((Path(name) / CONFIG_FILE).read_text(encoding="utf-8"))
    model, task = saved["model"], saved["task"]
    folders = {TOKENIZER_OF[task]: TOKENIZER_FOLDER}
    if "qformer_tokenizer" in saved["data"]:
        folders["qformer"] = QFORMER_TOKENIZER_FOLDER
    return _Source(
        repr(name),
        name,
        task,
        {  # published weights have no other connector than a Q-Former
            section: fields
            for section, fields in model.items()
            if isinstance(fields, dict) and section != "perceiver"
        },
        {field: value for field, value in model.items() if not isinstance(value, dict)},
        ImageProcessing.of_run(config_from_dict(saved).data).data_fields(),
        task == "clip" and is_converted(name),
        {
            section: partial(load_tokenizer, str(Path(name) / folder))
            for section, folder in folders.items()
        },
    )


def published_sections(published: Published) -> dict[str, dict[str, Any]]:
    """The fields that published weights decide, by section of `config.model`."""
    sections = {name: dataclasses.asdict(config) for name, config in published.configs.items()}
    for name, fields in sections.items():
        for field in NOT_IN_CONFIG:
            fields.pop(field, None)
        for architecture, (kind, _) in LANGUAGE_MODELS.items():
            if type(published.configs[name]) is kind:
                sections[name] = {"architecture": architecture} | fields
    qformer = published.configs.get("qformer")
    unknown = ()
    if qformer is not None and not qformer.has_text:
        unknown = ("vocab_size", "max_positions")
    elif qformer is not None and published.task == "":  # BERT
        unknown = ("num_query_tokens", "cross_attention_frequency")
    for field in unknown:
        del sections["qformer"][field]
    return sections


def tokenizer_or_error(published: Published, folder: str = "") -> Any:
    """The tokenizer of published weights (`Published.tokenizers`); UserError where none is."""
    tokenizer = published_tokenizer(published, folder)
    if tokenizer is None and folder:
        raise UserError(
            f"{published.weights.source!r} has no tokenizer in {folder!r} beside its weights: put "
            "one there, or name one in data.qformer_tokenizer of a training."
        )
    if tokenizer is None:
        raise UserError(
            f"{published.weights.source!r} has no tokenizer beside its weights: name one in "
            "data.tokenizer, or in --tokenizer of `jaxblip convert`."
        )
    return tokenizer
