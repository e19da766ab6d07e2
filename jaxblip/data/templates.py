"""Templates of instructions, by the family of tasks that they ask for.

InstructBLIP draws one of 13 templates for each caption, of 10 for each question and of 6 for each
question to be asked (arXiv 2305.06500, appendix). These are as many, of the same kinds, in words of
our own but for the prompts that BLIP-2 and InstructBLIP are evaluated with. {} is the place of an
example's instruction: the question, or of `vqg` the answer. Those whose outputs are short say so,
so that a model does not learn to be short whatever it is asked.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Sequence

from jaxblip.errors import UserError

FAMILIES = {
    "caption": (
        "A short image caption.",
        "Describe the image briefly.",
        "Write a short caption for this picture.",
        "A short image description.",
        "In a few words, what does the image show?",
        "Say in one short sentence what can be seen here.",
        "Give a brief summary of the photo.",
        "What is in this picture? Reply with a short caption.",
        "A photo of",
        "This image shows",
        "Sum up the scene in a few words.",
        "Please put a short caption under this photo.",
        "What would a brief title of this picture be?",
    ),
    "vqa": (
        "{}",
        "Question: {} Short answer:",
        "Look at the image and answer in a word or two: {}",
        "Question: {} Answer:",
        "{} A short answer is",
        "Given the image, answer this question briefly. {}",
        "Q: {} A:",
        "Use the picture to give a short answer to the question: {}",
        "{} Reply with as few words as you can.",
        "Someone asks about this photo: {} The answer, in short, is",
    ),
    "vqg": (
        "Given the image, ask a question whose answer is: {}",
        "Write a question about this picture that is answered by: {}",
        "Answer: {} Question:",
        "The answer is {}. What was asked about the image?",
        "What could one ask about the photo to hear: {}",
        "Look at the image and make up a question for the answer: {}",
    ),
    "classification": (
        "What is the main thing in this image? Answer in a word or two.",
        "Name the class of the picture.",
        "Which category does this photo belong to? Give a short answer.",
        "Label the image in a few words.",
        "In short, this is a picture of",
        "Say briefly what kind of thing is shown.",
        "Class of the image:",
        "Tell in a word or two what this photo shows.",
    ),
}
_EVERY = 4  # of a family's templates each such one is held out
_NAMED = FAMILIES | {
    f"{family}:{part}": tuple(
        template
        for number, template in enumerate(templates, start=1)
        if (number % _EVERY == 0) == (part == "heldout")
    )
    for family, templates in FAMILIES.items()
    for part in ("train", "heldout")
}


def expanded(templates: Sequence[str]) -> tuple[str, ...]:
    """Templates with those of a family in the place of its name, and all others as they are.

    Args:
      templates: of one's own, or the name of a family, such as "vqa"; "vqa:train" is without every
        fourth of its templates, and "vqa:heldout" those alone.

    Raises:
      UserError: one is a single word that is nearly such a name.
    """
    found = (_NAMED.get(template) or _own(template) for template in templates)
    return tuple(dict.fromkeys(itertools.chain.from_iterable(found)))


def _own(template: str) -> tuple[str]:
    near = difflib.get_close_matches(template, _NAMED, 1, cutoff=0.8)
    if near and re.fullmatch("[a-z]+(:[a-z]+)?", template):
        raise UserError(
            f"There are no templates {template!r}: did you mean {near[0]}? The families are "
            f"{', '.join(FAMILIES)}, each also as NAME:train and NAME:heldout."
        )
    return (template,)
