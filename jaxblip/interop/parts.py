"""A model whose parts are published apart, such as LAVIS's files without what was frozen."""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxblip.config import default_config
from jaxblip.errors import UserError
from jaxblip.interop.published import SECTIONS, Published

PART_NAMES = {"vision": "image encoder", "language_model": "language model"}
CLIPS = ("CLIPModel", "CLIPVisionModel")


def lacking_parts(published: Published) -> list[str]:
    """The sections of its task's model of which published weights have nothing."""
    model = default_config(published.task).model
    return [name for name in SECTIONS if name in model and name not in published.configs]


def with_part(published: Published, section: str, other: Published) -> Published:
    """Published weights with one part of others.

    In messages, the names of that part's tensors have its section before them. Of CLIP's encoder
    the last block is left out, as in BLIP-2 (paper §3.1).

    Args:
      section: the part, of `lacking_parts`.

    Raises:
      UserError: `published` has such a part itself, or no place for it, or `other` has none.
    """
    weights, place = published.weights, f"{section}/"
    if not published.task or section not in lacking_parts(published):
        raise UserError(
            f"{weights.source!r} ({published.name}) takes no {section} from elsewhere: leave out "
            f"--{section.replace('_', '-')}."
        )
    if section not in other.configs:
        raise UserError(
            f"{other.weights.source!r} ({other.name}) has no {section}: it has "
            f"{', '.join(other.configs)}."
        )
    config = other.configs[section]
    if section == "vision" and other.name in CLIPS:
        config = dataclasses.replace(config, num_layers=config.num_layers - 1)
    entries, elsewhere = list(published.layout.entries), set()
    for entry in other.layout.entries:
        if entry.ours[0].path.startswith(place):
            aliases = tuple(place + alias for alias in entry.aliases)
            entries.append(dataclasses.replace(entry, theirs=place + entry.theirs, aliases=aliases))
        else:
            elsewhere.update(entry.names)
    tensors = {
        place + name: info
        for name, info in other.weights.tensors.items()
        if name not in elsewhere and not other.layout.is_ignored(name)
    }

    def read(name: str) -> np.ndarray:
        if name in tensors:
            return other.weights.read(name.removeprefix(place))
        return weights.read(name)

    merged = dataclasses.replace(weights, tensors={**weights.tensors, **tensors}, reader=read)
    published = dataclasses.replace(
        published,
        weights=merged,
        layout=dataclasses.replace(published.layout, entries=tuple(entries)),
        configs={**published.configs, section: config},
    )
    if section == "vision":
        return dataclasses.replace(published, resizing=other.resizing)
    # Its config says which token ends a text.
    return dataclasses.replace(
        published, weights=dataclasses.replace(merged, config=other.weights.config)
    )
