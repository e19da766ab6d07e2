"""`jaxblip convert`: published weights as a run, and a run as a folder of transformers."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from jaxblip.config import default_config
from jaxblip.data import run_tokenizers
from jaxblip.data.tokenizers import (
    DEC_TOKEN,
    add_blip_tokens,
    add_dec_token,
    load_tokenizer,
)
from jaxblip.errors import UserError
from jaxblip.interop.export import export_run
from jaxblip.interop.load import QuietParam
from jaxblip.interop.parts import PART_NAMES, lacking_parts, with_part
from jaxblip.interop.processors import find_image_processing
from jaxblip.interop.published import LAVIS_NAMES, Published, open_published
from jaxblip.models.opt import OptConfig
from jaxblip.tasks import BLIP_TASKS, STAGE2_TASKS, make_task
from jaxblip.training.adopt import published_sections, tokenizer_or_error
from jaxblip.training.checkpoints import FOLDER, save_config
from jaxblip.training.initialize import abstract_params, random_params
from jaxblip.training.piecewise import write_checkpoint
from jaxblip.training.sources import CONVERTED_FILE, prefixes

Params = dict[str, Any]

DTYPES = ("float32", "bfloat16", "float16")
CLIP_EPSILON = 1e-5  # that of the norm in the task `clip`


def convert(
    source: str,
    target: str,
    *,
    dtype: str | None = None,
    tokenizer: str | None = None,
    qformer_tokenizer: str | None = None,
    vision: str | None = None,
    language_model: str | None = None,
    step: int | None = None,
) -> list[str]:
    """Writes weights in the other form: those of a run for transformers, all others as a run.

    Memory is one layer at a time. `target` appears when all of it is written.

    Args:
      source: a run's work directory, or what `interop.files.open_weights` takes.
      target: a folder that does not exist, or is empty.
      dtype: of the weights, one of `DTYPES`; None keeps that of the source.
      tokenizer: name or folder of the tokenizer, for weights that come without one.
      qformer_tokenizer: likewise that of the Q-Former of InstructBLIP.
      vision: source of the image encoder, for weights that come without one.
      language_model: likewise of the language model; its tokenizer comes with it.
      step: of a run, by default the latest.

    Returns:
      What was done, in a few lines.

    Raises:
      UserError: the source cannot be read or has no place on the other side, or the target is not
        empty.
    """
    begin = time.monotonic()
    if dtype not in (None, *DTYPES):
        raise UserError(f"dtype={dtype!r} is none of {', '.join(DTYPES)}: choose one.")
    kind = None if dtype is None else np.dtype(jax.numpy.dtype(dtype))
    is_run = (Path(source) / FOLDER).is_dir()
    parts = {"vision": vision, "language_model": language_model}
    parts = {section: name for section, name in parts.items() if name}
    tokenizers = {"tokenizer": tokenizer, "qformer_tokenizer": qformer_tokenizer}
    given = [name for name, value in (tokenizers | parts).items() if value]
    if is_run and given:
        option = given[0].replace("_", "-")
        raise UserError(f"{source!r} is a run and is whole: leave out --{option}.")
    with _new_folder(target) as folder:
        if is_run:
            params, lines = export_run(source, folder, kind, step)
        else:
            params, lines = _import(source, parts, folder, kind, **tokenizers)
    lines += _summary(params, kind)
    return [*lines, f"Written to {target} in {time.monotonic() - begin:.1f} s."]


def _import(
    source: str,
    parts: Mapping[str, str],
    folder: Path,
    dtype: np.dtype | None,
    tokenizer: str | None,
    qformer_tokenizer: str | None,
) -> tuple[Params, list[str]]:
    published = open_published(source)
    others = {section: open_published(name) for section, name in parts.items()}
    of_text = others.get("language_model", published)
    for section, other in others.items():
        published = with_part(published, section, other)
    _check_is_whole(published)
    if qformer_tokenizer and published.task != "instruct":
        raise UserError(
            f"The task {published.task} has one tokenizer: leave out --qformer-tokenizer."
        )
    tokenizer = load_tokenizer(tokenizer) if tokenizer else tokenizer_or_error(of_text)
    if qformer_tokenizer:
        qformer_tokenizer = load_tokenizer(qformer_tokenizer)
    elif published.task == "instruct":
        qformer_tokenizer = tokenizer_or_error(published, published.tokenizers["qformer"])
    config = published_config(published, tokenizer, qformer_tokenizer)
    with config.unlocked():
        is_full = (dtype or _main_dtype(published)).itemsize >= 4
        # Not float16, which models that were trained in bfloat16 overflow.
        config.compute_dtype = config.frozen_dtype = "float32" if is_full else "bfloat16"
    task = make_task(config)
    shapes, _ = abstract_params(task)
    stored = flatten_dict(published.stored(published.own_dtypes(shapes), dtype), sep="/")
    errors: list[Exception] = []  # of reading, in the midst of writing
    stored = {path: QuietParam(param, errors) for path, param in stored.items()}
    flat = flatten_dict(shapes, sep="/")
    missing = {path: leaf for path, leaf in flat.items() if path not in stored}
    random = flatten_dict(random_params(task, unflatten_dict(missing, sep="/")), sep="/")
    random = {path: np.asarray(leaf, dtype or leaf.dtype) for path, leaf in random.items()}
    params = unflatten_dict({path: (stored | random)[path] for path in flat}, sep="/")

    write_checkpoint(folder / FOLDER, params)
    if errors:
        raise errors[0]
    run_tokenizers.save_tokenizers(tokenizer, qformer_tokenizer, folder)
    save_config(folder, config.to_dict())
    origin = {
        "source": source,
        "revision": published.weights.revision,
        "class": published.name,
        "resizing": published.resizing,
        **({"parts": dict(parts)} if parts else {}),
    }
    (folder / CONVERTED_FILE).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
    lines = [f"{source} holds {published.name}: written as a run of the task {config.task}."]
    if missing:
        names = ", ".join(prefixes(missing, stored))
        lines.append(f"It has no {names}: these parameters are random.")
    if unused := published.paths.difference(flat):
        names = ", ".join(prefixes(sorted(unused), flat))
        lines.append(f"A run of {config.task} has no place for {names}: left behind.")
    return params, lines


def published_config(
    published: Published, tokenizer: Any, qformer_tokenizer: Any = None
) -> ConfigDict:
    """The experiment config of a published model, nothing frozen.

    Adds to its tokenizer the tokens that its task needs, `[DEC]` and `[ENC]`.

    Raises:
      UserError: no task has such a model, or the tokenizer is not its own.
    """
    sections = published_sections(published)
    architecture = sections.get("language_model", {}).get("architecture", "opt")
    config = default_config(published.task, language_model=architecture)
    config.frozen = ()
    model, data = config.model, config.data
    for section, fields in sections.items():
        model[section].update({k: v for k, v in fields.items() if k in model[section]})
    model.update({name: value for name, value in published.fields.items() if name in model})
    epsilon = published.fields.get("vision_norm_epsilon", CLIP_EPSILON)
    if published.task == "clip" and epsilon != CLIP_EPSILON:
        raise UserError(
            f"{published.weights.source!r} norms its image features with epsilon {epsilon}; the "
            f"task clip has {CLIP_EPSILON}, as every published CLIP."
        )
    limits = [data.max_text_tokens]
    limits += [section.max_positions for section in _with_positions(model)]
    if published.task == "instruct":  # the Q-Former reads the instruction, not the text
        limits.remove(model.qformer.max_positions)
        if model.qformer.vocab_size > len(qformer_tokenizer):  # BERT's; InstructBLIP's has it
            add_dec_token(qformer_tokenizer)
        data.max_instruction_tokens = min(data.max_instruction_tokens, model.qformer.max_positions)
    if published.task in STAGE2_TASKS and "max_positions" in model.language_model:
        limits.append(model.language_model.max_positions - model.qformer.num_query_tokens)
    data.max_text_tokens = min(limits)
    if "vision" in model:
        data.image_size_px = published.configs["vision"].image_size_px
        processing = find_image_processing(published.weights.folder)
        if processing is not None:
            data.update(processing.data_fields())
    if published.task == "stage1":
        add_dec_token(tokenizer)
        model.dec_token_id = tokenizer.convert_tokens_to_ids(DEC_TOKEN)
    if published.task in BLIP_TASKS:
        add_blip_tokens(tokenizer)
        if "enc_token_id" in model:
            # None, as transformers computes, unless the weights are BLIP's own.
            model.enc_token_id = published.fields.get("enc_token_id", 0)
        if "max_instruction_tokens" in data:
            limit = model.text.max_positions
            data.max_instruction_tokens = min(data.max_instruction_tokens, limit)
    if "language_model" in model:
        data.stop_token = _stop_token(published, tokenizer)
    return run_tokenizers.with_vocabulary(config, tokenizer, qformer_tokenizer).lock()


def _with_positions(model: ConfigDict) -> Iterator[ConfigDict]:
    for section in model.values():
        if isinstance(section, ConfigDict) and "max_positions" in section:
            yield section


def _stop_token(published: Published, tokenizer: Any) -> str:
    """The text of the token that ends a caption, where it is not the tokenizer's end token."""
    fields = published.weights.config
    stop = (fields.get("text_config") or fields).get("eos_token_id")
    is_opt = isinstance(published.configs["language_model"], OptConfig)
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    if is_opt and published.name == LAVIS_NAMES["stage2"] and len(newline) == 1:
        (stop,) = newline  # as in its code; transformers' classes have it in their config
    if not isinstance(stop, int) or stop == tokenizer.eos_token_id or stop >= len(tokenizer):
        return ""
    text = tokenizer.decode([stop])
    is_one = tokenizer(text, add_special_tokens=False)["input_ids"] == [stop]
    return text if text and is_one else ""


def _check_is_whole(published: Published) -> None:
    name = f"{published.weights.source!r} ({published.name})"
    here = [f"config.init.{part}" for part in ("vision", "qformer") if part in published.configs]
    training = f"name it in {' or '.join(here)} of a training"
    if not published.task:
        raise UserError(f"{name} is one part of a model, which is no run by itself: {training}.")
    if lacking := lacking_parts(published):
        what = " and ".join(PART_NAMES[part] for part in lacking)
        options = " ".join(f"--{part.replace('_', '-')}=SOURCE" for part in lacking)
        fields = " and ".join(f"config.init.{part}=SOURCE" for part in lacking)
        raise UserError(
            f"{name} comes without {what}: add {options}, or {training}, with {fields}."
        )


def _main_dtype(published: Published) -> np.dtype:
    """That of most of the values."""
    sizes: dict[np.dtype, int] = {}
    for info in published.weights.tensors.values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + int(np.prod(info.shape))
    return max(sizes, key=sizes.__getitem__)


def _summary(params: Params, dtype: np.dtype | None) -> list[str]:
    lines, total = [], 0
    for part, tree in params.items():
        leaves = jax.tree.leaves(tree)
        size = sum(leaf.size for leaf in leaves)
        dtypes = sorted({np.dtype(dtype or leaf.dtype).name for leaf in leaves})
        lines.append(f"  {part:<18} {size:>14,} {', '.join(dtypes)}")
        total += size
    return [f"Parameters: {total:,}", *lines]


@contextlib.contextmanager
def _new_folder(target: str) -> Iterator[Path]:
    """A folder beside `target` that takes its name when all has gone well."""
    path = Path(target).expanduser().resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"The target {target!r} is there already: remove it, or name another one.")
    new = path.with_name(f".{path.name}.new")
    shutil.rmtree(new, ignore_errors=True)  # of a conversion that was killed
    new.mkdir(parents=True)
    try:
        yield new
        os.replace(new, path)
    finally:
        shutil.rmtree(new, ignore_errors=True)
