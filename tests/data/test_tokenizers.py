"""Trained and loaded tokenizers, and the two forms of encoded text."""

import copy
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

from jaxblip.data.shapes import ShapesSource
from jaxblip.data.tokenizers import (
    TextEncoder,
    add_dec_token,
    load_tokenizer,
    save_tokenizer,
    train_wordpiece,
)
from jaxblip.errors import UserError

CAPTION = "small red circle left of large blue square"


@pytest.fixture(scope="module")
def texts():
    source = ShapesSource("train", size=300).without_images()
    return [caption for index in range(300) for caption in source[index]["captions"]]


@pytest.fixture(scope="module")
def wordpiece(texts):
    return train_wordpiece(texts, 512)


@pytest.fixture(scope="module")
def opt_like():
    """A byte-level BPE tokenizer put together like OPT's: one token begins and ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "c"), ("Ġc", "a"), ("Ġca", "t")]
    tokens = ["<pad>", "</s>", *alphabet, *("".join(pair) for pair in merges)]
    bpe = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="</s>", eos_token="</s>", pad_token="<pad>"
    )


def test_wordpiece_knows_the_words_and_the_special_tokens(wordpiece):
    assert wordpiece.tokenize(CAPTION) == CAPTION.split()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    assert wordpiece.convert_tokens_to_ids(special) == list(range(6))
    assert wordpiece.bos_token == wordpiece.cls_token == "[CLS]"
    assert wordpiece.eos_token == wordpiece.sep_token == "[SEP]"
    assert wordpiece.decode(wordpiece(CAPTION).input_ids, skip_special_tokens=True) == CAPTION
    assert wordpiece.decode([2, 5, 3], skip_special_tokens=True) == ""
    assert len(wordpiece) == len(wordpiece.get_vocab()) <= 512


def test_wordpiece_agrees_with_berts_own_tokenizer(wordpiece, tmp_path):
    """transformers' BERT tokenizer over the same vocabulary gives the same ids."""
    vocab = sorted(wordpiece.get_vocab(), key=wordpiece.get_vocab().get)
    (tmp_path / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    bert = BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"), do_lower_case=True)
    for text in (CAPTION, "A RED, Circle!", "unknown zebra é", ""):
        assert wordpiece(text).input_ids == bert(text).input_ids
        assert wordpiece(text, "red").input_ids == bert(text, "red").input_ids


def test_training_gives_the_same_vocabulary_in_every_process(texts, tmp_path):
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    code = (
        "import json,sys,hashlib; from jaxblip.data.tokenizers import train_wordpiece;"
        "t = train_wordpiece(json.load(open(sys.argv[1])), 90);"
        "print(hashlib.sha256(t.backend_tokenizer.to_str().encode()).hexdigest())"
    )
    hashes = {
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "texts.json")],
            capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2", "3")
    }  # fmt: skip
    assert len(hashes) == 1


def test_a_vocabulary_too_small_for_the_characters():
    with pytest.raises(UserError, match="data.vocab_size=9 .* at least 10"):
        train_wordpiece(["ab", "cb"], 9)  # 6 special tokens, a, b, c, ##b
    assert set(train_wordpiece(["ab", "cb"], 10).get_vocab()) == {
        "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "a", "b", "c", "##b"
    }  # fmt: skip


def test_pieces_are_ordinary_tokens():
    tokenizer = train_wordpiece(["abc", "ab"] * 3, 64)
    assert tokenizer.all_special_tokens.count("##b") == 0
    assert tokenizer.decode(tokenizer("abc ab", add_special_tokens=False).input_ids) == "abc ab"


def test_saved_tokenizer_is_loaded_again(wordpiece, tmp_path):
    save_tokenizer(wordpiece, tmp_path / "tokenizer")
    loaded = load_tokenizer(tmp_path / "tokenizer")
    assert loaded.get_vocab() == wordpiece.get_vocab()
    assert loaded(CAPTION).input_ids == wordpiece(CAPTION).input_ids
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (2, 3, 0)
    for kind in ("qformer", "language_model"):
        before, after = TextEncoder(wordpiece, 16, kind), TextEncoder(loaded, 16, kind)
        np.testing.assert_array_equal(before([CAPTION])[0], after([CAPTION])[0])


def test_a_tokenizer_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="data.tokenizer='.*nothing'.*save_pretrained"):
        load_tokenizer(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="data.tokenizer='.*empty'"):
        load_tokenizer(tmp_path / "empty")


def test_a_tokenizer_without_padding_token(opt_like, tmp_path):
    bare = PreTrainedTokenizerFast(tokenizer_object=opt_like.backend_tokenizer, eos_token="</s>")
    bare.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no padding token"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no pad_token"):
        TextEncoder(bare, 16, "language_model")


def test_add_dec_token_adds_one_entry_once(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red"]) + "\n")
    bert = BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"))
    assert len(bert) == 6
    for _ in range(2):
        assert add_dec_token(bert) is bert
        assert len(bert) == 7 and bert.convert_tokens_to_ids("[DEC]") == 6
    assert bert.decode([6, 5, 3], skip_special_tokens=True) == "red"


def test_qformer_text_is_what_berts_post_processing_makes(wordpiece):
    encoder = TextEncoder(wordpiece, 16, "qformer")
    texts = [CAPTION, "red", "", "a small red circle " * 8]
    ids, mask = encoder(texts)
    expected = wordpiece(texts, padding="max_length", truncation=True, max_length=16)
    assert (ids.dtype, mask.dtype) == (np.int32, np.bool_)
    np.testing.assert_array_equal(ids, expected.input_ids)
    np.testing.assert_array_equal(mask, np.array(expected.attention_mask, bool))
    assert ids[3, -1] == wordpiece.sep_token_id  # also where the text was cut


def test_language_model_text_has_one_bos_and_one_stop(opt_like):
    encoder = TextEncoder(opt_like, 8, "language_model", stop_token="\n")
    newline = opt_like("\n", add_special_tokens=False).input_ids[0]
    ids, mask = encoder([" cat cat", ""])
    cat = opt_like.convert_tokens_to_ids("Ġcat")
    assert ids[0].tolist() == [1, cat, cat, newline, 0, 0, 0, 0]
    assert ids[1].tolist() == [1, newline, 0, 0, 0, 0, 0, 0]
    np.testing.assert_array_equal(mask.sum(1), [4, 2])
    # As the reference makes it: the tokenizer's own BOS, then caption + newline.
    assert ids[0, :4].tolist() == opt_like(" cat cat\n").input_ids
    # Without a stop token the end token stops, although OPT spells it like BOS.
    assert TextEncoder(opt_like, 8, "language_model")([" cat"])[0][0, :3].tolist() == [1, cat, 1]


def test_language_model_text_that_is_cut_has_no_stop(opt_like):
    encoder = TextEncoder(opt_like, 4, "language_model", stop_token="\n")
    cat = opt_like.convert_tokens_to_ids("Ġcat")
    ids, mask = encoder([" cat cat", " cat cat cat", " cat cat cat cat"])
    assert ids[0].tolist() == [1, cat, cat, encoder.stop_id]  # just fits
    assert ids[1].tolist() == ids[2].tolist() == [1, cat, cat, cat]
    assert mask.all()


def test_wordpiece_serves_a_language_model_too(wordpiece):
    ids, _ = TextEncoder(wordpiece, 16, "language_model")(["red circle"])
    expected, _ = TextEncoder(wordpiece, 16, "qformer")(["red circle"])
    np.testing.assert_array_equal(ids, expected)


def test_special_tokens_spelled_out_in_a_caption_do_not_end_it(wordpiece, opt_like):
    ids, _ = TextEncoder(wordpiece, 32, "qformer")(["red [SEP] circle"])
    assert (ids == wordpiece.sep_token_id).sum() == 1
    ids, _ = TextEncoder(opt_like, 32, "language_model", "\n")(["a</s>b"])
    assert (ids == opt_like.bos_token_id).sum() == 1


def test_prompt_length_counts_bos_and_the_words_of_the_prompt(opt_like, wordpiece):
    encoder = TextEncoder(wordpiece, 16, "language_model")
    assert encoder.prompt_length("") == 0
    assert encoder.prompt_length("a small ") == 3
    assert TextEncoder(wordpiece, 2, "language_model").prompt_length("a small red") == 2
    # The space after the prompt is part of the caption's first token.
    encoder = TextEncoder(opt_like, 16, "language_model", "\n")
    prompt = "ab: "
    length = encoder.prompt_length(prompt)
    with_caption, without = encoder([prompt + "cat", "ab:"])[0]
    assert length == 4
    assert with_caption[:length].tolist() == without[:length].tolist()
    assert with_caption[length] == opt_like.convert_tokens_to_ids("Ġcat")


def test_a_long_text_is_cut_at_the_end_that_is_asked_for(wordpiece):
    words = "a b c d e f g h".split()
    for truncation, kept in (("right", words[:4]), ("left", words[-4:])):
        encoder = TextEncoder(wordpiece, 6, "qformer", truncation=truncation)
        (ids,), (mask,) = encoder([" ".join(words)])
        assert ids.tolist() == wordpiece(" ".join(kept)).input_ids and mask.all()
        short = wordpiece("a b").input_ids
        assert encoder(["a b"])[0][0].tolist() == short + [0, 0]
    # As BERT's own tokenizer does it.
    wordpiece = copy.deepcopy(wordpiece)
    wordpiece.truncation_side = "left"
    expected = wordpiece(" ".join(words), truncation=True, max_length=6).input_ids
    assert ids.tolist() == expected


def test_the_first_tokens_of_a_prompt_can_be_skipped(wordpiece):
    encoder = TextEncoder(wordpiece, 8, "language_model")
    assert encoder.prompt_length("a b c d", skip=3) == 2
    np.testing.assert_array_equal(encoder.row(["a b c d e"], 3), encoder.row(["d e"]))


def test_a_stop_that_is_no_single_token(wordpiece, opt_like):
    with pytest.raises(UserError, match=r"stop token '\\n' is 0 tokens"):
        TextEncoder(wordpiece, 16, "language_model", stop_token="\n")
    with pytest.raises(UserError, match="is 2 tokens"):
        TextEncoder(opt_like, 16, "language_model", stop_token="xy")
    assert TextEncoder(wordpiece, 16, "language_model", "[DEC]").stop_id == 5


def test_encoder_leaves_the_tokenizer_alone_and_pickles(wordpiece):
    encoder = pickle.loads(pickle.dumps(TextEncoder(wordpiece, 4, "qformer")))
    assert encoder([CAPTION])[0].shape == (1, 4)
    assert len(wordpiece(CAPTION).input_ids) == len(CAPTION.split()) + 2
    assert wordpiece("[SEP]").input_ids == [2, 3, 3]
