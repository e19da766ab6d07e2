"""Several training sources in one run: what each has of its own, and its share of the examples."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from jaxblip.errors import UserError

if TYPE_CHECKING:
    from jaxblip.data.samples import Source

# Fields of config.data that a section of config.data.mixture may have, beside "weight".
OF_A_SOURCE = (
    "train",
    "image_folder",
    "fields",
    "shuffle_block",
    "captions",
    "prompt",
    "templates",
    "max_words",
    "crop_scale",
    "crop_aspect",
    "interpolation",
    "flip_probability",
    "randaugment",
    "max_image_pixels",
)
WEIGHT = "weight"


@dataclasses.dataclass(frozen=True)
class TrainSource:
    """One source of a run.

    Attributes:
      name: of its section in config.data.mixture; "" for the only one of a run without a mixture.
      config: the run's, in which config.data has the values of this source.
      source: its examples.
      share: of all examples that the run sees, between 0 and 1.
    """

    name: str
    config: ConfigDict
    source: Source
    share: float


def configs_of_sources(config: ConfigDict) -> dict[str, ConfigDict]:
    """The config of each source by its name: the run's, with the section's values in config.data.

    Raises:
      UserError: a section names no source or has a field that is none of a source, a weight or the
        exponent is no share, or config.data.train.source is read by none.
    """
    mixture = config.data.mixture
    if not mixture:
        return {"": config}
    if config.data.train.source and all("train" in section for section in mixture.values()):
        raise UserError(
            f"config.data.train.source={config.data.train.source!r} is read by no source of "
            "config.data.mixture, each of which names its own: set --config.data.train.source= to "
            "leave it out."
        )
    if config.data.mixture_exponent < 0:
        raise UserError(
            f"config.data.mixture_exponent={config.data.mixture_exponent} would favour small "
            "sources: it must be 0 (by the weights alone) or more."
        )
    found = {}
    for name, section in mixture.items():
        found[name] = of_source = config.copy_and_resolve_references()
        check_section(name, section)
        if not section.get("train", config.data.train).source:
            raise UserError(
                f"config.data.mixture.{name} names no source: set "
                f"--config.data.mixture.{name}.train.source to a file or a folder."
            )
        if section.get(WEIGHT, 1.0) <= 0:
            raise UserError(
                f"config.data.mixture.{name}.weight={section.weight} must be above 0: leave a "
                "source out to see nothing of it."
            )
        for field, value in section.items():
            if isinstance(value, ConfigDict):
                of_source.data[field].update(value)
            elif field != WEIGHT:
                of_source.data[field] = value
    return found


def section_of(name: str) -> str:
    """Where the fields of a source are in the config, "data" without a mixture."""
    return f"data.mixture.{name}" if name else "data"


def check_section(name: str, section: Sequence[str]) -> None:
    """Raises UserError where a section of config.data.mixture has a field that no source has."""
    known = (*OF_A_SOURCE, WEIGHT)
    for field in section:
        if field not in known:
            near = difflib.get_close_matches(field, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"they are {', '.join(known)}."
            raise UserError(
                f"config.data.mixture.{name}.{field} is no field that a source has of its own: "
                f"{hint}"
            )


def shares(weights: Sequence[float], sizes: Sequence[int], exponent: float) -> list[float]:
    """The share of each source, `weight * size ** exponent` over the sum of all.

    Args:
      weights: factors by hand.
      sizes: numbers of examples.
      exponent: 1 for shares by size, 0.5 by its square root (InstructBLIP §2.4), 1 / T for
        temperature T, 0 for the weights alone.
    """
    parts = [weight * size**exponent for weight, size in zip(weights, sizes, strict=True)]
    return [part / sum(parts) for part in parts]


def lines(sources: Sequence[TrainSource]) -> Iterator[str]:
    """What a run says of its sources: sizes and shares of a mixture, and problems."""
    if len(sources) > 1:
        yield "Mixture: " + ", ".join(
            f"{each.name} {each.share:.2%} ({len(each.source):,} examples)" for each in sources
        )
    for each in sources:
        yield from getattr(each.source, "problems", ())
