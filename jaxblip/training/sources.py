"""What `config.init` names: runs, checkpoints that `jaxblip convert` wrote, published checkpoints.

Nothing is read before it is put onto its devices or into another file.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from jaxblip.errors import UserError
from jaxblip.interop.files import GGUF_SUFFIX, TORCH_SUFFIXES
from jaxblip.interop.published import open_published
from jaxblip.models.connectors import QFORMER
from jaxblip.models.lora import is_factor
from jaxblip.models.positions import interpolate_positions
from jaxblip.tasks import BLIP_TASKS, STAGE2_TASKS
from jaxblip.training.checkpoints import CONFIG_FILE, FOLDER, load_frozen_references, saved_steps
from jaxblip.training.piecewise import InMemory, saved_params, saved_paths

Params = dict[str, Any]

RANDOM = "random"
ALL = "all"  # the field of `config.init` for the parts that no other field names
HUB = "hf:"

# Which parts of the parameter tree a field of `config.init` stands for. The norm between encoder
# and Q-Former is trained with the Q-Former.
PARTS = {
    "vision": ("vision",),
    "qformer": ("qformer", "vision_norm"),
    "language_model": ("language_model",),
}
# Further parts that the tasks of BLIP give each other.
BLIP_PARTS = ("vision_norm", "text", "decoder")
OF_CONNECTOR = ("connector", "projection")
TEXT_SIDE = "text_embeddings"  # of the Q-Former, without which it has no other part of it
# Beside the config of what `jaxblip convert` wrote: where it is from.
CONVERTED_FILE = "published.json"
_WEIGHTS = (".safetensors", GGUF_SUFFIX, *TORCH_SUFFIXES)


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a part's values lie.

    Attributes:
      source: a run's work directory, or a published checkpoint.
      step: of the run's checkpoint; None for a published checkpoint.
    """

    source: str
    step: int | None = None


@dataclasses.dataclass(frozen=True)
class Stored:
    """Values of parameters that are not read yet.

    Attributes:
      params: by path, what `interop.load.put_params` takes. Parameters that are not in it are to
        be random.
      references: "source" and "revision" of each part: a run and its step, a published checkpoint
        and its commit, or `RANDOM` and the seed.
      lacking: by source, what it has no values for, as path prefixes.
    """

    params: dict[str, Any]
    references: dict[str, dict[str, str]]
    lacking: dict[str, list[str]]


def is_published(source: str) -> bool:
    """Whether a source of `config.init` is weights rather than a run; asks no network."""
    if source in ("", RANDOM):
        return False
    if source.startswith(HUB):
        return True
    path = Path(source).expanduser()
    if path.is_dir():
        is_run = (path / FOLDER).is_dir()
        return not is_run and any(file.suffix in _WEIGHTS for file in path.iterdir())
    return path.is_file()


def is_run(source: str) -> bool:
    """Whether a source of `config.init` is a work directory, of a training or of a conversion."""
    folder = Path(source)
    is_whole = (folder / CONFIG_FILE).is_file() and (folder / FOLDER).is_dir()
    return source not in ("", RANDOM) and is_whole


def is_converted(source: str) -> bool:
    """Whether a source of `config.init` is a work directory that `jaxblip convert` wrote."""
    return source not in ("", RANDOM) and (Path(source) / CONVERTED_FILE).is_file()


def init_field(config: ConfigDict, part: str) -> str:
    """The field of `config.init` that a part belongs to; `ALL` where it has none of its own."""
    if part == "vision_norm" and "qformer" not in config.init:
        return "vision"
    return next((field for field, parts in PARTS.items() if part in parts), ALL)


def source_of(config: ConfigDict, part: str) -> str:
    """What `config.init` names for a part of the tree: "" for nothing."""
    return config.init.get(init_field(config, part), "") or config.init.get(ALL, "")


def shared_parts(task: str, other: str) -> frozenset[str]:
    """What a source of another task gives as `ALL`: no heads, which would be others there."""
    shared = set(PARTS)
    if task in BLIP_TASKS and other in BLIP_TASKS:
        shared.update(BLIP_PARTS)
    if task in STAGE2_TASKS and other in STAGE2_TASKS:
        shared.update(OF_CONNECTOR)
    return frozenset(shared)


def stored_parts(config: ConfigDict, shapes: Params) -> Stored:
    """The values of `shapes` that are not random.

    Args:
      shapes: trainable or frozen parameters of the task, by part.

    Raises:
      UserError: a source does not exist, or does not fit.
    """
    origins = {part: _origins(config, part, tree) for part, tree in shapes.items()}
    stored = Stored({}, {}, {})
    for origin in dict.fromkeys(itertools.chain.from_iterable(origins.values())):
        tree = {part: found[origin] for part, found in origins.items() if origin in found}
        read = _from_published if origin.step is None else _from_run
        read(config, origin, tree, stored)
    for part, found in origins.items():
        random = {"source": RANDOM, "revision": f"seed {config.seed}"}
        stored.references.setdefault(part, random)
        if len(found) > 1:  # the others are found again from the first
            first = next(iter(found))
            stored.references[part] = {"source": first.source, "revision": str(first.step)}
    return stored


def _from_published(config: ConfigDict, origin: Origin, tree: Params, stored: Stored) -> None:
    published = open_published(origin.source)
    tree = _given(config, tree, published.task, "qformer" in published.configs)
    found = flatten_dict(published.stored(tree), sep="/")
    reference = {"source": origin.source, "revision": published.weights.revision}
    for part in tree:
        if any(_is_under(path, part) for path in found):
            stored.references[part] = reference
        elif config.init.get(part, ""):
            # `ALL` gives what there is; what is named for a part must have it.
            has = sorted({path.split("/")[0] for path in published.paths})
            raise UserError(
                f"config.init.{part}={config.init[part]!r} is a {published.name}, which has no "
                f"{part}: it has {', '.join(has)}."
            )
    if lacking := [path for path in flatten_dict(tree, sep="/") if path not in found]:
        stored.lacking[origin.source] = prefixes(lacking, found)
    stored.params.update(found)


def _from_run(config: ConfigDict, origin: Origin, tree: Params, stored: Stored) -> None:
    trained = saved_params(f"{origin.source}/{FOLDER}/{origin.step}")
    saved = json.loads((Path(origin.source) / CONFIG_FILE).read_text(encoding="utf-8"))
    connector = saved["model"].get("connector", QFORMER)
    tree = _given(config, tree, saved["task"], "qformer" in saved["model"], connector)
    for part, shapes in tree.items():
        if part not in trained:
            if not _is_named(config, part):
                continue  # `ALL` gives what there is
            raise UserError(
                f"The run {origin.source!r} has no part {part!r}: it has "
                f"{', '.join(sorted(trained))}. Name another source in config.init."
            )
        have = trained[part]
        if part == "vision" and "position_embedding" in shapes:  # not factors alone
            have = _fitted_encoder(have, shapes, origin.source)
        if part == "qformer" and TEXT_SIDE in shapes and TEXT_SIDE not in have:  # of stage 2
            shapes, lacking = _without_text_side(shapes)
            if lacking:
                stored.lacking[origin.source] = lacking
        values = _fit(have, shapes, part, origin.source)
        stored.params.update(flatten_dict({part: values}, sep="/"))
        stored.references[part] = {"source": origin.source, "revision": str(origin.step)}


def _without_text_side(shapes: Params) -> tuple[Params, list[str]]:
    """A Q-Former as stage 2 has it, and the path prefixes of what it is without."""
    flat = flatten_dict({"qformer": shapes}, sep="/")
    text = [path for path in flat if any(name.startswith("text_") for name in path.split("/"))]
    rest = {path: leaf for path, leaf in flat.items() if path not in text}
    return unflatten_dict(rest, sep="/")["qformer"], prefixes(text, rest)


def _fitted_encoder(values: Params, shapes: Params, source: str) -> Params:
    """The image encoder of a run, its positions at the image size of `shapes`.

    Of what `jaxblip convert` wrote the first blocks are enough, as `Published.stored` has it.
    """
    layers, resizing = values["layers"], "bicubic"
    if is_converted(source):
        origin = json.loads((Path(source) / CONVERTED_FILE).read_text(encoding="utf-8"))
        num_layers, resizing = jax.tree.leaves(shapes["layers"])[0].shape[0], origin["resizing"]
        layers = jax.tree.map(lambda stack: stack.first(num_layers), layers)
    rows, table = shapes["position_embedding"].shape[0], values["position_embedding"]
    if rows != table.shape[0]:
        has_class = int("cls_token" in values)
        sides = (math.isqrt(number - has_class) for number in (table.shape[0], rows))
        resized = interpolate_positions(table[()].astype(np.float32), *sides, resizing)
        table = InMemory(resized)
    return values | {"layers": layers, "position_embedding": table}


def _given(
    config: ConfigDict, tree: Params, task: str, has_qformer: bool, connector: str = QFORMER
) -> Params:
    """The parts that a source is to give; as `ALL` it gives another task what tasks share.

    A projection is for the visual tokens of one connector.
    """
    if config.model.get("connector", QFORMER) != connector:
        tree = {part: shapes for part, shapes in tree.items() if part not in OF_CONNECTOR}
    shared = {*shared_parts(config.task, task), *(("vision_norm",) if has_qformer else ())}
    return {
        part: shapes
        for part, shapes in tree.items()
        if _is_named(config, part) or task == config.task or part in shared
    }


def _is_named(config: ConfigDict, part: str) -> bool:
    """Whether a field other than `ALL` names a source for the part."""
    field = init_field(config, part)
    return field != ALL and bool(config.init.get(field, ""))


def _origins(config: ConfigDict, part: str, shapes: Params) -> dict[Origin, Params]:
    """Where the parameters of a part lie, the run that is named first.

    What a run trained is in its checkpoint. What was frozen there, be it the whole part or some of
    it, is where that run had it from.
    """
    wanted = flatten_dict({part: shapes}, sep="/")
    source, step, origins = source_of(config, part), None, {}
    while source not in ("", RANDOM) and not is_published(source):
        steps = saved_steps(source)
        if not steps:
            raise UserError(
                f"{source!r} is to supply the part {part!r}, but there is no run with checkpoints "
                "in that folder, and no published weights: train it first, or name in config.init "
                "another work directory, a folder or file of weights, or hf:NAME."
            )
        step = steps[-1] if step is None else step
        trained = saved_paths(f"{source}/{FOLDER}/{step}")
        _check_factors(config, part, source, trained)
        reference = load_frozen_references(source, step).get(part)
        here = {
            path: wanted.pop(path)
            for path in list(wanted)
            if path in trained or (reference is None and not is_factor(path))
        }
        if here:
            origins[Origin(source, step)] = unflatten_dict(here, sep="/")[part]
        if reference is None or all(map(is_factor, wanted)):
            return origins  # factors that no run has trained begin at random
        if reference["source"] == RANDOM:
            raise UserError(
                f"The part {part!r} was random and frozen in the run {source!r}: there are no "
                "weights to load; name another source in config.init."
            )
        source, revision = reference["source"], reference["revision"]
        step = None if is_published(source) else int(revision)
    rest = {path: leaf for path, leaf in wanted.items() if not is_factor(path)}
    if rest and source not in ("", RANDOM):
        origins[Origin(source)] = unflatten_dict(rest, sep="/")[part]
    return origins


def _check_factors(config: ConfigDict, part: str, source: str, trained: frozenset[str]) -> None:
    """Raises UserError where a run has trained low-rank factors that the config would not count."""
    if not any(is_factor(path) and _is_under(path, part) for path in trained):
        return
    saved = json.loads((Path(source) / CONFIG_FILE).read_text(encoding="utf-8"))["lora"]
    fields = ("rank", "alpha", "targets", "parts")
    there, here = ({name: each[name] for name in fields} for each in (saved, config.lora))
    if json.loads(json.dumps(here)) != there:
        shown = [", ".join(f"{name}={each[name]}" for name in fields) for each in (there, here)]
        raise UserError(
            f"{source!r} has trained low-rank factors for {part!r} ({shown[0]}), and this config "
            f"has config.lora with {shown[1]}: give it the same values, or start from what "
            f"`jaxblip convert` exports of that run, where the factors are part of the weights."
        )


def _fit(values: Params, shapes: Params, part: str, source: str | os.PathLike) -> Params:
    """The values that the model wants; the source may have more, such as stage 1's text side."""
    have, want = flatten_dict({part: values}, sep="/"), flatten_dict({part: shapes}, sep="/")
    wrong = [
        f"{path} is {have[path].shape if path in have else 'absent'} there and "
        f"{tuple(leaf.shape)} here"
        for path, leaf in want.items()
        if path not in have or have[path].shape != tuple(leaf.shape)
    ]
    if wrong:
        raise UserError(
            f"The part {part!r} of {source!r} does not fit the model of this config: "
            f"{'; '.join(wrong[:8])}{f'; and {len(wrong) - 8} more' if len(wrong) > 8 else ''}. "
            f"Give config.model the sizes of that run."
        )
    cast = {path: have[path].as_dtype(leaf.dtype) for path, leaf in want.items()}
    return unflatten_dict(cast, sep="/")[part]


def prefixes(paths: Iterable[str], others: Iterable[str]) -> list[str]:
    """The shortest prefixes of `paths` that none of `others` has."""
    taken = {path[:end] for path in others for end in _ends(path)}
    beginnings = ([path[:end] for end in _ends(path)] for path in paths)
    return list(dict.fromkeys(next(b for b in each if b not in taken) for each in beginnings))


def _ends(path: str) -> list[int]:
    return [*(i for i, character in enumerate(path) if character == "/"), len(path)]


def _is_under(path: str, part: str) -> bool:
    return path == part or path.startswith(f"{part}/")
