"""Captions into words as the Penn Treebank has them, which caption metrics count.

Where Java is installed, `pycocoevalcap` runs Stanford's PTBTokenizer, as the papers do. The
tokenizer here takes its place where there is none, and gives the same words of ordinary captions.
It differs in smileys, currencies other than the dollar, signs before numbers and abbreviations that
are not listed.
"""

from __future__ import annotations

import re

# What the evaluation of COCO captions leaves out. Brackets stay, by their names.
_LEFT_OUT = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", '"'])
_TYPED = str.maketrans(
    {"’": "'", "‘": "'", "“": '"', "”": '"', "–": "--", "—": "--", "…": "..."}
)  # fmt: skip
_BRACKETS = dict(zip("()[]{}", "-lrb- -rrb- -lsb- -rsb- -lcb- -rcb-".split(), strict=True))
# Words that keep their period.
_ABBREVIATIONS = (
    "mr mrs ms dr st mt ft jr sr vs ave blvd rd etc co inc ltd corp dept prof gen col capt lt "
    "sgt gov sen rep rev hon jan feb mar apr aug sept sep oct nov dec mon tues wed thurs fri est"
)
_CONTRACTION = r"'(?:s|m|d|re|ve|ll)\b"
_TOKEN = re.compile(
    rf"""
    (?:[^\W\d_]\.){{2,}}                                    # u.s. and p.m.
    | \b(?:{_ABBREVIATIONS.replace(" ", "|")})\.(?=\s*[^\s.])   # not at the end, but for etc.
    | \bnos?\.(?=\s*\d)
    | \b(?:etc|vs|jr|sr|ave|blvd|inc|ltd|corp|co|dr|mr)\.
    | \b(?-i:[A-Z])\.                                       # initials
    | \bcan(?=not\b) | \b(?:gon|wan)(?=na\b) | \bgot(?=ta\b) | \b(?:lem|gim)(?=me\b)
    | '?n'(?=\s|roll|\Z)'? | \by'(?=all\b) | '(?:em\b|\d+s\b) | (?<!\w)'t(?=(?:is|was)\b)
    | [^\W\d_]+?(?=n't\b) | n't\b | {_CONTRACTION}
    | (?-i:[A-Z]+&[A-Z]+)                                   # AT&T
    | \d+(?:[.,:]\d+)+ | \.\d+
    | \w+(?:(?:[-/.@!?]|(?<=[^\W\d])'(?!(?:s|m|d|re|ve|ll|t)\b))\w+)*
    | [\#@]\w*[^\W\d_]\w*                                   # hashtags and names
    | \.{{2,}} | -{{2,}} | \*+ | [?!]+
    | \S
    """,
    re.VERBOSE | re.IGNORECASE,
)


def ptb_words(caption: str) -> list[str]:
    """The words of a caption in lower case, without punctuation.

    Contractions are divided (`it's` into `it 's`, `don't` into `do n't`); compounds with hyphens or
    slashes, abbreviations and numbers are one word.
    """
    words = (_BRACKETS.get(word, word) for word in _TOKEN.findall(caption.translate(_TYPED)))
    words = (word.lower() for word in words)
    return [word for word in words if word not in _LEFT_OUT and not re.fullmatch(r"\.+|-+", word)]
