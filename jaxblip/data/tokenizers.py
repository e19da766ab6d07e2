"""Tokenizers: trained on the captions or loaded from Hugging Face, and texts into padded ids."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Bool, Int32
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from jaxblip.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

DEC_TOKEN = "[DEC]"  # starts a generated text in stage 1, where [CLS] starts an understood one
ENC_TOKEN = "[ENC]"  # starts a text that BLIP reads with its image
_SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", DEC_TOKEN]
_MAX_ALPHABET = 1000  # characters that get an entry of their own; rarer ones become [UNK]


def train_wordpiece(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A lower-casing WordPiece tokenizer with BERT's special tokens and [DEC], from texts alone.

    [CLS] is the beginning and [SEP] the end of a text for a language model as well, so that one
    tokenizer serves the Q-Former and the language model. The same texts give the same tokenizer.

    Raises:
      UserError: `vocab_size` does not even hold the characters.
    """
    from transformers import PreTrainedTokenizerFast

    normalizer = normalizers.BertNormalizer(lowercase=True)
    pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    texts = list(texts)
    words = set()
    for start in range(0, len(texts), 1000):
        chunk = normalizer.normalize_str("\n".join(texts[start : start + 1000]))
        words.update(word for word, _ in pre_tokenizer.pre_tokenize_str(chunk))
    alphabet, pieces = _alphabet(words)
    base = [*_SPECIAL_TOKENS, *pieces]
    if len(base) + len(alphabet) > vocab_size:
        raise UserError(
            f"data.vocab_size={vocab_size} does not hold the {len(_SPECIAL_TOKENS)} special tokens "
            f"and the characters of the captions; it must be at least {len(base) + len(alphabet)}"
        )
    # The trainer numbers the single-character pieces in the order of a randomly seeded hash map,
    # and breaks ties between merges by these numbers. Given as "special", they are numbered as
    # they stand here; the vocabulary then goes into a tokenizer where they are ordinary.
    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer, trained.pre_tokenizer = normalizer, pre_tokenizer
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=base,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    tokenizer = Tokenizer(models.WordPiece(trained.get_vocab(), unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(t, tokenizer.token_to_id(t)) for t in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        bos_token="[CLS]",
        eos_token="[SEP]",
        additional_special_tokens=[DEC_TOKEN],
    )


def _alphabet(words: Iterable[str]) -> tuple[list[str], list[str]]:
    """The commonest characters, and the pieces "##c" of those that stand within a word."""
    counts = Counter(character for word in words for character in set(word))
    common = sorted(counts, key=lambda character: (-counts[character], character))[:_MAX_ALPHABET]
    within = {character for word in words for character in word[1:]}
    return sorted(common), [f"##{character}" for character in sorted(within & set(common))]


def load_tokenizer(
    name_or_path: str, field: str = "data.tokenizer"
) -> PreTrainedTokenizerBase:
    """The Hugging Face tokenizer of a model name or a folder; remote code is never run.

    Args:
      field: of the config that names it, for messages.

    Raises:
      UserError: it cannot be found or read, or has no padding token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(os.fspath(name_or_path), trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{field}={str(name_or_path)!r} is no tokenizer that can be loaded ({reason}); "
            "give a folder written by save_pretrained or a name on the Hugging Face hub, "
            "or leave it empty to train one on the captions"
        ) from error
    if tokenizer.pad_token_id is None:
        raise UserError(
            f"{field}={str(name_or_path)!r} has no padding token, which batches need; "
            "set its pad_token, save it with save_pretrained and name that folder"
        )
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | os.PathLike) -> None:
    """Writes what `load_tokenizer(folder)` reads."""
    tokenizer.save_pretrained(os.fspath(folder))


def add_dec_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Adds [DEC] as BLIP-2 does to BERT's tokenizer (30,522 to 30,523 entries), if not there."""
    if DEC_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([DEC_TOKEN], special_tokens=True)
    return tokenizer


def add_blip_tokens(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Adds [DEC] and [ENC] as BLIP does to BERT's tokenizer (30,522 to 30,524 entries)."""
    add_dec_token(tokenizer)
    if ENC_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([ENC_TOKEN], special_tokens=True)
    return tokenizer


class TextEncoder:
    """Texts into right-padded ids and masks, for the Q-Former or for a language model.

    "qformer" gives `[CLS] words [SEP]`, and a text that is too long still ends with [SEP].
    "language_model" gives `BOS words STOP`, where STOP is `stop_token` (a newline for OPT, as in
    the BLIP-2 paper's code) or else the end token; where the tokenizer has no BOS there is none.

    Holds a copy of the Rust tokenizer only, so that input workers need not import transformers.

    Args:
      tokenizer: a fast Hugging Face tokenizer with a padding token.
      max_tokens: length of every row, special tokens included.
      kind: "qformer" or "language_model".
      stop_token: text that is exactly one token; only for "language_model".
      truncation: the end of a text at which "qformer" leaves out words where it is too long.

    Raises:
      UserError: the tokenizer lacks a token that `kind` needs, or `stop_token` is not one token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
        kind: Literal["qformer", "language_model"],
        stop_token: str | None = None,
        truncation: Literal["left", "right"] = "right",
    ):
        if kind not in ("qformer", "language_model"):
            raise ValueError(f"kind is 'qformer' or 'language_model', not {kind!r}")
        if not tokenizer.is_fast:
            raise UserError(
                f"tokenizer {tokenizer.name_or_path!r} has no fast version; "
                "save it with a tokenizer.json, which save_pretrained of a fast one writes"
            )
        self._tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # A caption that spells out "[SEP]" or "</s>" must not end the text.
        self._tokenizer.encode_special_tokens = True
        self.max_tokens = max_tokens
        self.kind = kind
        self.truncation = truncation
        self.pad_id = _require(tokenizer, "pad_token")
        if kind == "qformer":
            # CLIP's tokenizer has begin and end tokens of text under the other names.
            begins, ends = "cls_token", "sep_token"
            if tokenizer.cls_token_id is None and tokenizer.bos_token_id is not None:
                begins, ends = "bos_token", "eos_token"
            self.start_id = _require(tokenizer, begins)
            self.stop_id = _require(tokenizer, ends)
        else:
            self.start_id = tokenizer.bos_token_id
            if stop_token is None:
                self.stop_id = _require(tokenizer, "eos_token")
            else:
                self.stop_id = self._single_token_id(stop_token, tokenizer.name_or_path)

    def __call__(
        self, texts: Sequence[str]
    ) -> tuple[Int32[np.ndarray, "batch tokens"], Bool[np.ndarray, "batch tokens"]]:
        """Ids and the mask that is True where a token is, False where padding is."""
        ids = np.empty((len(texts), self.max_tokens), np.int32)
        mask = np.empty((len(texts), self.max_tokens), bool)
        for index, text in enumerate(texts):
            ids[index], mask[index] = self.row([text])
        return ids, mask

    def row(
        self, texts: Sequence[str], skip: int = 0
    ) -> tuple[Int32[np.ndarray, " tokens"], Bool[np.ndarray, " tokens"]]:
        """One row of ids and its mask: the texts one after the other, each with start and stop.

        Args:
          skip: tokens behind the start that are left out of each text.
        """
        tokens = [token for text in texts for token in self._tokens(text, skip)]
        return padded_row(tokens[: self.max_tokens], self.max_tokens, self.pad_id)

    def lengths(self, texts: Sequence[str]) -> Int32[np.ndarray, " texts"]:
        """Number of tokens that each text has in a row of its own; on all cores, for many texts."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        special = 1 + (self.start_id is not None)
        words = np.fromiter(map(len, encoded), np.int32, len(encoded))
        return np.minimum(words + np.int32(special), np.int32(self.max_tokens))

    def prompt_length(self, prompt: str, skip: int = 0) -> int:
        """Number of leading tokens, BOS included, that an encoded `prompt + caption` owes to it.

        Trailing spaces belong to the first word of the caption in byte-pair vocabularies, so
        they are not counted. 0 for an empty prompt: then BOS is nobody's but the caption's.

        Args:
          skip: as in `row`.
        """
        prompt = prompt.rstrip()
        if not prompt:
            return 0
        length = (self.start_id is not None) + len(self._words(prompt)) - skip
        return min(length, self.max_tokens)

    def prompt_ids(self, prompt: str) -> list[int]:
        """What a generated text continues: BOS, where there is one, and the prompt's tokens."""
        start = [] if self.start_id is None else [self.start_id]
        return start + self._words(prompt.rstrip())

    def _words(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _tokens(self, text: str, skip: int = 0) -> list[int]:
        start = [] if self.start_id is None else [self.start_id]
        words = self._words(text)[skip:]
        if len(start) + len(words) + 1 <= self.max_tokens:
            return [*start, *words, self.stop_id]
        if self.kind == "qformer":
            room = self.max_tokens - len(start) - 1
            kept = words[:room] if self.truncation == "right" else words[len(words) - room :]
            return [*start, *kept, self.stop_id]
        # A STOP after words that were cut off would teach the model to stop in mid-sentence.
        return [*start, *words][: self.max_tokens]

    def _single_token_id(self, text: str, name: str) -> int:
        known = self._tokenizer.token_to_id(text)
        if known is not None:
            return known
        ids = self._words(text)
        if len(ids) != 1:
            raise UserError(
                f"stop token {text!r} is {len(ids)} tokens of tokenizer {name!r}, not one; "
                "choose another, or leave it empty for the end token"
            )
        return ids[0]


def padded_row(
    tokens: Sequence[int], length: int, pad_id: int
) -> tuple[Int32[np.ndarray, " length"], Bool[np.ndarray, " length"]]:
    """Ids with padding behind them, and the mask that is True where a token is."""
    ids = np.full(length, pad_id, np.int32)
    ids[: len(tokens)] = tokens
    return ids, np.arange(length) < len(tokens)


def _require(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    token_id = getattr(tokenizer, f"{token}_id")
    if token_id is None:
        raise UserError(
            f"tokenizer {tokenizer.name_or_path!r} has no {token}; set it and save the tokenizer "
            "with save_pretrained, or use another one"
        )
    return token_id
