"""Captions in every script, of every length, all the way from a file to the report."""

import csv
import io
import json
import re
import tarfile
from collections import Counter
from html import unescape
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hostile import PNG, encoded, inspected, opened
from jaxblip.data.eval_set import iterate_eval_images
from jaxblip.data.pipeline import Part, TrainBatches
from jaxblip.data.preprocess import Preprocess
from jaxblip.data.text import clean_caption, clean_question
from jaxblip.data.tokenizers import TextEncoder, train_wordpiece
from jaxblip.evaluation.captions import caption_metrics, exact_share
from jaxblip.evaluation.report import write_report
from jaxblip.evaluation.results import prediction_rows

# What is written, and what cleaning makes of it.
SCRIPTS = {
    "Latin with marks": ("Ein Hündchen, naïve Åsa!", "ein hündchen, naïve åsa"),
    "marks that combine": (
        "Cafe\u0301 Za\u0334\u0338\u0337lgo", "cafe\u0301 za\u0334\u0338\u0337lgo",
    ),
    "Chinese": ("一只猫坐在垫子上。", "一只猫坐在垫子上。"),
    "Japanese": ("マットの上の猫 ＡＢＣ", "マットの上の猫 ａｂｃ"),
    "Korean": ("매트 위의 고양이", "매트 위의 고양이"),
    "Arabic": ("قطة على السجادة", "قطة على السجادة"),
    "Hebrew with points": ("חָתוּל עַל שָׁטִיחַ", "חָתוּל עַל שָׁטִיחַ"),
    "Devanagari": ("चटाई पर बिल्ली", "चटाई पर बिल्ली"),
    "Thai": ("แมวอยู่บนพรม", "แมวอยู่บนพรม"),
    "Cyrillic": ("Кошка на КОВРЕ", "кошка на ковре"),
    "Turkish": ("İstanbul'da kedi", "i\u0307stanbul'da kedi"),
    "emoji": ("a cat 🐈\u200d⬛ and 👩🏽\u200d🚀 ❤️", "a cat 🐈\u200d⬛ and 👩🏽\u200d🚀 ❤️"),
    "marks of direction": (
        "\u202ecat\u202c, \u2067חתול\u2069", "\u202ecat\u202c, \u2067חתול\u2069",
    ),
    "spaces of other kinds": ("a\u00a0cat\u3000on\u2003\u2003it", "a\u00a0cat\u3000on it"),
    "beyond the first plane": ("𝔞 𝒸𝒶𝓉 𓃠", "𝔞 𝒸𝒶𝓉 𓃠"),
    "HTML": ("<b onload=\"x\">&amp; 'cat'</b>", "<b onload= x >&amp 'cat'</b>"),
    "braces and paths": ("{} {0} %s \\n ../../x", "{} {0} %s \\n / /x"),
    "names of special tokens": ("[CLS] a [SEP] cat </s> <image>", "[cls] a [sep] cat </s> <image>"),
}  # fmt: skip
INVISIBLE = [
    "", " ", "\u3000", "\u200b\u200d", "\u200f", "\ufeff", "\0", "\x07\n", "\u2028", " ... ",
]  # fmt: skip
LONG = {
    "words": "word " * 2000,
    "one word": "x" * 10_000,
    "no spaces": "猫" * 10_000,
    "marks": "a" + "\u0301" * 9_999,
    "spaces": "a" + " " * 9_998 + "b",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_cleaning_keeps_the_letters_of_every_script(script):
    written, cleaned = SCRIPTS[script]
    assert clean_caption(written) == cleaned
    assert clean_caption(written, 0) == clean_question(written, 0) == written
    assert clean_question(cleaned)


@pytest.mark.parametrize("text", INVISIBLE, ids=ascii)
def test_what_nobody_sees_is_no_caption(text):
    assert clean_caption(text) == clean_caption(text, 50, "") == ""
    assert clean_caption(text, 50, "a photo of ") == "a photo of "
    if text != " ... ":
        assert clean_caption(text, 0) == clean_question(text, 0) == clean_question(text) == ""


def byte_level(texts) -> PreTrainedTokenizerFast:
    """As of GPT-2: every text has an encoding, and gets back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="</s>"
    )


CLEANED = [cleaned for _, cleaned in SCRIPTS.values()]
TOKENIZERS = {
    "WordPiece": (train_wordpiece(CLEANED, 600), "qformer"),
    "bytes": (byte_level(CLEANED), "language_model"),
}


TEXTS = [written for written, _ in SCRIPTS.values()] + [*LONG.values()]


def write(folder, name: str):
    path = folder / name
    images = [encoded(colour(index)) for index in range(len(TEXTS))]
    for index, image in enumerate(images):
        (folder / f"{index:02}.png").write_bytes(image)
    rows = [{"image": f"{index:02}.png", "caption": text} for index, text in enumerate(TEXTS)]
    match path.suffix:
        case ".jsonl":
            lines = (json.dumps(row, ensure_ascii=n % 2 == 0) for n, row in enumerate(rows))
            path.write_text("\n".join(lines), encoding="utf-8")
        case ".csv":
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, ["image", "caption"])
                writer.writeheader()
                writer.writerows(rows)
        case ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        case ".tar":
            with tarfile.open(path, "w") as archive:
                for index, text in enumerate(TEXTS):
                    for ending, data in ("png", images[index]), ("txt", text.encode()):
                        info = tarfile.TarInfo(f"{index:02}.{ending}")
                        info.size = len(data)
                        archive.addfile(info, io.BytesIO(data))
        case _:
            for index, text in enumerate(TEXTS):
                (folder / f"{index:02}.txt").write_text(text, encoding="utf-8")
            return folder
    return path


def colour(index: int):
    return Image.new("RGB", (8, 6), (index * 10, 255 - index * 10, 0))


@pytest.fixture(scope="module", params=["data.jsonl", "data.csv", "data.parquet", "data.tar", ""])
def spec(request, tmp_path_factory):
    """All captions, written to one kind of source."""
    return write(tmp_path_factory.mktemp("scripts"), request.param)


def test_every_source_hands_the_texts_over_as_they_are(spec):
    source = opened(spec)
    assert not source.problems
    found = [source[index]["captions"] for index in range(len(source))]
    # Texts of files lose white space around them; the others keep it.
    assert [each.strip() for [each] in found] == [text.strip() for text in TEXTS]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_batches_of_every_script(name, spec):
    tokenizer, kind = TOKENIZERS[name]
    encoder = TextEncoder(tokenizer, 48, kind)
    preprocess = Preprocess(("image", "text_ids", "text_mask", "image_id"), 8, encoder)
    with TrainBatches([Part(opened(spec), preprocess)], batch_size=len(TEXTS), seed=0) as batches:
        batch = next(batches)
    assert not batches.skipped and len(set(batch["image_id"].tolist())) == len(TEXTS)
    mask = batch["text_mask"]
    assert ((mask.sum(axis=1) > 2) & mask[:, 0]).all() and batch["text_ids"].max() < len(tokenizer)
    decoded = {
        tokenizer.decode(ids[used], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for ids, used in zip(batch["text_ids"], mask)
    }
    if name == "bytes":  # but for what was cut off
        whole = {text for text in CLEANED if len(tokenizer(text).input_ids) < 46}
        assert len(whole) > 8 and whole <= decoded
    else:
        assert {"一 只 猫 坐 在 垫 子 上 。", "кошка на ковре"} <= decoded


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("length", LONG)
def test_long_captions_fill_their_row_and_no_more(name, length):
    tokenizer, kind = TOKENIZERS[name]
    encoder = TextEncoder(tokenizer, 16, kind)
    example = {"image": PNG, "image_id": 0, "captions": [LONG[length]]}
    for max_words in (50, 0):
        preprocess = Preprocess(("text_ids", "text_mask"), encoder=encoder, max_words=max_words)
        arrays = preprocess(example, np.random.default_rng(0), Counter())
        assert arrays["text_ids"].shape == (16,) and arrays["text_mask"][0]
    assert len(clean_caption(LONG[length]).split()) <= 50


def test_from_an_evaluation_set_to_predictions_and_the_page(spec, tmp_path):
    found = iterate_eval_images(opened(spec), 8, 1000, 50)
    assert not found.skipped and len(found.captions) == len(TEXTS)
    cleaned = [clean_caption(text) for text in TEXTS]
    assert sorted(text for [text] in found.captions) == sorted(cleaned)
    said = [references[0] for references in found.captions]
    assert exact_share(said, found.captions) == 1
    assert np.isfinite(list(caption_metrics(said, found.texts).values())).all()
    rows = prediction_rows(
        SimpleNamespace(set=found, predictions=said, references=lambda: found.captions)
    )
    assert [row["caption"] for row in rows] == said and len(rows) == len(TEXTS)
    gallery = [
        {"image": found.images[row], "predicted": wrong, "references": references}
        for row, (references, wrong) in enumerate(zip(found.captions, reversed(said)))
    ]
    write_report(
        tmp_path / "page.html", title="مرحبا <b>", phases=[], results={}, gallery=gallery
    )
    page = (tmp_path / "page.html").read_bytes().decode()
    assert "<b onload" not in page and "مرحبا &lt;b&gt;" in page
    shown = unescape(re.sub(r"</?mark>", "", page))
    for text in CLEANED:
        assert " ".join(text.split()) in " ".join(shown.split())


def test_inspect_prints_every_script_on_lines_of_their_own(spec, capsys, tmp_path):
    status, printed = inspected(spec, capsys, f"--sheet={tmp_path}/sheet.png")
    assert status == 0 and "problems: none" in printed
    assert len(printed.splitlines()) == 1 + 1 + 10 + 1 + 4 + 1 + 1


def test_captions_that_nobody_sees_are_counted(tmp_path, capsys):
    (tmp_path / "1.png").write_bytes(PNG)
    path, count = tmp_path / "data.jsonl", len(INVISIBLE)
    rows = ({"image": "1.png", "caption": text} for text in [*INVISIBLE, "a"])
    path.write_text("\n".join(json.dumps(row | {"id": id}) for id, row in enumerate(rows)))
    found = iterate_eval_images(opened(path), 8, 1000, 50)
    assert found.skipped == {"empty caption": count} and found.captions == [["a"]]
    assert f"empty caption: {count}, such as example 0" in inspected(path, capsys)[1]
    encoder = TextEncoder(TOKENIZERS["bytes"][0], 8, "language_model")
    preprocess = Preprocess(("text_ids", "image_id"), encoder=encoder)
    settings = dict(batch_size=4, seed=0, max_bad_share=1)
    with TrainBatches([Part(opened(path), preprocess)], **settings) as batches:
        assert set(next(batches)["image_id"].tolist()) == {count}
        assert set(batches.skipped) == {"empty caption"}
