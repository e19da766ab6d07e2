"""The tokenizer that lies beside published weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jaxblip.errors import UserError
from jaxblip.interop.files import GGUF_SUFFIX
from jaxblip.interop.published import Published

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# One of these is there where there is a tokenizer.
FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def published_tokenizer(published: Published, folder: str = "") -> PreTrainedTokenizerBase | None:
    """The tokenizer of a published checkpoint; None where there is none.

    Args:
      folder: beside the weights, where the tokenizer lies, of `published.tokenizers`.

    One without a padding token, such as LLaMA's, pads with its unknown or end token: masks say
    what is padding, so that no loss and no attention reads it.

    Raises:
      UserError: it cannot be read.
    """
    from transformers import AutoTokenizer

    weights = published.weights
    file = Path(weights.source).expanduser()
    if file.suffix == GGUF_SUFFIX:
        from jaxblip.interop.gguf import gguf_tokenizer  # which needs an optional package

        return _with_padding(gguf_tokenizer(file))
    place = weights.folder / folder
    if not any((place / name).is_file() for name in FILES):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"The tokenizer of {weights.source!r} cannot be loaded ({reason}): name another one in "
            "data.tokenizer, or in --tokenizer of `jaxblip convert`."
        ) from error
    return _with_padding(tokenizer)


def _with_padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer
