"""Captions against their references: exact match, and the metrics of COCO captions.

BLEU, ROUGE-L, CIDEr, METEOR and SPICE are those of `pycocoevalcap`, the code that the papers score
with. The first three are Python; METEOR and SPICE are programs in Java, and so is the tokenizer,
in whose place stands `ptb.ptb_words` where there is no Java.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer import ptbtokenizer

from jaxblip.evaluation.ptb import ptb_words

Texts = dict[int, list[str]]  # tokenized captions, by the number of their image

_TOKENIZER_JAR = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
# Not in the package: `missing_metrics` says how to get it.
_SPICE_JAR = _TOKENIZER_JAR.parents[1] / "spice/lib/stanford-corenlp-3.6.0-models.jar"


def is_exact(prediction: str, references: Sequence[str]) -> bool:
    """Whether a caption equals one of its references but for white space."""
    return _normalised(prediction) in map(_normalised, references)


def exact_share(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share (0-1) of captions that are exactly one of their references, white space aside."""
    return sum(map(is_exact, predictions, references)) / len(predictions)


def caption_metrics(
    predictions: Sequence[str], references: Sequence[Sequence[str]], java: bool = False
) -> dict[str, float]:
    """Scores captions, each against all references of its image, as COCO captions are scored.

    Args:
        predictions: one caption an image.
        references: the true captions of each image as they are written, repeats included; one or
            more, and their number may vary.
        java: whether to run what needs Java (`has_java`): a minute for thousands of captions.

    Returns:
        "bleu1" to "bleu4", "rouge_l", "cider", and by Java "meteor" and, where its models are
        installed, "spice"; each times 100, as papers print them. CIDEr weighs words by how few
        images of this set have them, so that it depends on the set, and is 0 of a single image.

    Raises:
        ValueError: nothing to score, lists of different lengths, or an image without a reference.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions and {len(references)} lists of references; "
            "expected as many of both, at least one"
        )
    without = [index for index, captions in enumerate(references) if not captions]
    if without:
        raise ValueError(f"prediction {without[0]} has no reference ({len(without)} have none)")
    owners = [image for image, texts in enumerate(references) for _ in texts]
    said = tokenize([*predictions, *(text for texts in references for text in texts)], java)
    found: Texts = {image: [text] for image, text in enumerate(said[: len(predictions)])}
    true: Texts = {image: [] for image in found}
    for image, text in zip(owners, said[len(predictions) :], strict=True):
        true[image].append(text)

    bleu, _ = Bleu(4).compute_score(true, found, verbose=0)
    metrics = {f"bleu{n}": value for n, value in enumerate(bleu, start=1)}
    metrics["rouge_l"], _ = Rouge().compute_score(true, found)
    metrics["cider"], _ = Cider().compute_score(true, found)
    if java:
        metrics["meteor"], _ = Meteor().compute_score(true, found)
    if java and _SPICE_JAR.is_file():
        from pycocoevalcap.spice.spice import Spice

        metrics["spice"], _ = Spice().compute_score(true, found)
    return {name: 100 * float(value) for name, value in metrics.items()}


def missing_metrics() -> list[str]:
    """What to install for the metrics that are left out, a sentence each."""
    if not has_java():
        return [
            "METEOR and SPICE are left out, because they need Java: install a Java runtime (such "
            "as `apt-get install default-jre-headless`) to have them, and Stanford's tokenizer."
        ]
    if not _SPICE_JAR.is_file():
        return [
            "SPICE is left out, because it needs Stanford CoreNLP 3.6 (400 MB): `python -m "
            "pycocoevalcap.spice.get_stanford_models` downloads it."
        ]
    return []


def tokenizer_name(java: bool) -> str:
    """Which tokenizer divides captions into words."""
    return "Stanford PTBTokenizer 3.4.1" if java else "jaxblip.evaluation.ptb"


def tokenize(captions: Sequence[str], java: bool = False) -> list[str]:
    """Each caption as its words in lower case, without punctuation, with spaces between them."""
    if not java:
        return [" ".join(ptb_words(caption)) for caption in captions]
    lines = [" ".join(caption.split()) for caption in captions]
    # Not the package's own wrapper, which writes into the folder that it is installed in.
    tokenizer = "edu.stanford.nlp.process.PTBTokenizer"
    done = subprocess.run(
        ["java", "-cp", str(_TOKENIZER_JAR), tokenizer, "-preserveLines", "-lowerCase"],
        input="\n".join(lines) + "\n",
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    found = [line.split() for line in done.stdout.split("\n")[: len(lines)]]
    left_out = ptbtokenizer.PUNCTUATIONS
    return [" ".join(word for word in words if word not in left_out) for words in found]


@functools.cache
def has_java() -> bool:
    """Whether a Java runtime is there."""
    java = shutil.which("java")  # which macOS has even where there is none
    return bool(java) and subprocess.run([java, "-version"], capture_output=True).returncode == 0


def _normalised(caption: str) -> str:
    return " ".join(caption.split())
