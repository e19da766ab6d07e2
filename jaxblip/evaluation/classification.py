"""Zero-shot classification: images compared with the names of classes in many prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from jaxblip.data.text import INSTRUCTION
from jaxblip.errors import UserError


def class_prompts(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Each name in each template, name by name; without templates the names alone.

    Raises:
      UserError: a template has no {}, or several.
    """
    for template in templates:
        if template.count(INSTRUCTION) != 1:
            raise UserError(
                f"The template {template!r} of eval.templates has {{}} "
                f"{template.count(INSTRUCTION)} times: write it once, where the name is to stand."
            )
    fillings = [template.split(INSTRUCTION) for template in templates] or [["", ""]]
    return [f"{before}{name}{after}" for name in names for before, after in fillings]


def class_embeddings(
    prompts: Float[np.ndarray, "prompts embed"], num_classes: int
) -> Float[np.ndarray, "classes embed"]:
    """The normalised mean of the normalised embeddings of a class's prompts (CLIP §3.1.4)."""
    prompts = prompts / np.linalg.norm(prompts, axis=-1, keepdims=True)
    means = prompts.reshape(num_classes, -1, prompts.shape[-1]).mean(axis=1)
    return means / np.linalg.norm(means, axis=-1, keepdims=True)
