"""Pixels and prompt ids against the processors of transformers."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from jaxblip.data.images import resize_square
from jaxblip.data.tokenizers import TextEncoder
from jaxblip.data.user_images import read_image
from jaxblip.errors import UserError
from jaxblip.interop.processors import (
    FILES,
    ImageProcessing,
    find_image_processing,
    image_processing,
)
from jaxblip.tasks.base import normalize_images

LANCZOS, BILINEAR = 1, 2
SETTINGS = {
    "blip": (BlipImageProcessorPil, dict(size={"height": 24, "width": 24})),
    "blip bilinear": (
        BlipImageProcessorPil,
        dict(size={"height": 17, "width": 17}, resample=BILINEAR),
    ),
    "clip": (
        CLIPImageProcessorPil,
        dict(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}),
    ),
    "clip of an odd size": (
        CLIPImageProcessorPil,
        dict(size={"shortest_edge": 19}, crop_size={"height": 19, "width": 19}, resample=LANCZOS),
    ),
    "clip of a square": (
        CLIPImageProcessorPil,
        dict(size={"height": 20, "width": 20}, do_center_crop=False),
    ),
    "siglip": (SiglipImageProcessorPil, dict(size={"height": 24, "width": 24})),
    "siglip 2": (
        SiglipImageProcessorPil,
        dict(size={"height": 24, "width": 24}, resample=BILINEAR),
    ),
    "not normalized": (SiglipImageProcessorPil, dict(do_normalize=False)),
    "defaults of blip": (BlipImageProcessorPil, {}),
    "defaults of clip": (CLIPImageProcessorPil, {}),
    "defaults of siglip": (SiglipImageProcessorPil, {}),
}
SIZES = [(24, 24), (1, 1), (1, 50), (37, 25), (25, 37), (24, 61), (300, 33), (3, 2), (640, 480)]
MODES = ["RGB", "L", "1", "LA", "RGBA", "P", "CMYK", "YCbCr"]


def random_image(mode, size, seed=0):
    """Smooth, with noise on it: either alone hides errors."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (3, 4, 4), np.uint8)).resize(size)
    noise = rng.integers(-40, 40, (size[1], size[0], 4))
    rgba = np.clip(np.asarray(coarse.convert("RGBA")).astype(int) + noise, 0, 255)
    rgba[..., 3] = rng.integers(0, 256, rgba.shape[:2])
    rgba = Image.fromarray(rgba.astype(np.uint8), "RGBA")
    return rgba if mode == "RGBA" else (rgba if mode == "LA" else rgba.convert("RGB")).convert(mode)


def assert_same_pixels(processing, reference, image):
    """Those of the file, read and resized as evaluation and generation do."""
    pixels = resize_square(
        read_image(image, 10**6), processing.size_px, processing.resize, processing.interpolation
    )
    plain = reference(image, do_rescale=False, do_normalize=False, return_tensors="np")
    expected = plain["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_array_equal(pixels, expected)
    normalized = reference(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    ours = normalize_images(pixels, processing.mean, processing.std)
    np.testing.assert_allclose(ours, normalized, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_images_of_all_shapes(name):
    kind, fields = SETTINGS[name]
    reference = kind(**fields)
    ours = image_processing(reference.to_dict())
    for seed, size in enumerate(SIZES):
        assert_same_pixels(ours, reference, random_image("RGB", size, seed))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["blip", "clip"])
def test_images_of_all_colours(name, mode):
    kind, fields = SETTINGS[name]
    reference = kind(**fields)
    ours = image_processing(reference.to_dict())
    for seed, size in enumerate([(37, 25), (24, 24), (10, 71)]):
        assert_same_pixels(ours, reference, random_image(mode, size, seed))


def test_transparent_palette():
    image = random_image("P", (37, 25))
    image.info["transparency"] = 3
    reference = BlipImageProcessorPil(size={"height": 24, "width": 24})
    assert_same_pixels(image_processing(reference.to_dict()), reference, image)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_there_and_back(name):
    kind, fields = SETTINGS[name]
    ours = image_processing(kind(**fields).to_dict())
    assert image_processing(ours.to_hf()) == ours
    written = ours.to_hf()
    is_clip = written["image_processor_type"] == "CLIPImageProcessor"
    reference = (CLIPImageProcessorPil if is_clip else BlipImageProcessorPil).from_dict(written)
    assert_same_pixels(ours, reference, random_image("RGB", (37, 25)))


@pytest.mark.parametrize(
    ("hf", "expected"),
    [
        # Salesforce/blip2-opt-2.7b
        (
            dict(image_processor_type="BlipImageProcessor", size={"height": 224, "width": 224}),
            ImageProcessing(224),
        ),
        # openai/clip-vit-large-patch14, as it was uploaded
        (
            dict(feature_extractor_type="CLIPFeatureExtractor", size=224, crop_size=224),
            ImageProcessing(224, "shortest_edge"),
        ),
        (dict(image_processor_type="BlipImageProcessor", size=384), ImageProcessing(384)),
        (
            dict(image_processor_type="CLIPImageProcessorFast"),
            ImageProcessing(224, "shortest_edge"),
        ),
        (
            dict(image_processor_type="SiglipImageProcessorFast", do_center_crop=None),
            ImageProcessing(224, mean=(0.5,) * 3, std=(0.5,) * 3),
        ),
        (
            dict(image_processor=dict(image_processor_type="BlipImageProcessorPil", size=32)),
            ImageProcessing(32),
        ),
    ],
)
def test_settings_of_several_ages(hf, expected):
    assert image_processing(hf) == expected


def blip(**fields):
    return dict(image_processor_type="BlipImageProcessor") | fields


def clip(**fields):
    return dict(image_processor_type="CLIPImageProcessor") | fields


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        ({}, "class '' is not covered"),
        ({"image_processor_type": "ViTImageProcessor"}, "'ViTImageProcessor'.*BlipImageProcessor"),
        (blip(do_resize=False), "do_resize=False"),
        (blip(do_rescale=False), "do_rescale=False"),
        (blip(rescale_factor=1 / 127.5), "rescale_factor=0.0078"),
        (blip(size={"height": 20, "width": 30}), "size=.*must be a square"),
        (blip(size={"shortest_edge": 20, "longest_edge": 30}), "size=.*longest_edge"),
        (clip(crop_size={"height": 224, "width": 200}), "crop_size=.*keep the 224 px"),
        (clip(size=256), "crop_size=.*keep the 256 px"),
        (clip(do_center_crop=False), "do_center_crop=False.*come out square"),
        (blip(resample=0), "resample=0.*bicubic"),
    ],
)
def test_settings_that_are_not_covered_are_refused(hf, message):
    with pytest.raises(UserError, match=message):
        image_processing(hf)


def test_settings_beside_the_weights(tmp_path):
    assert find_image_processing(tmp_path) is None
    BlipImageProcessorPil(size={"height": 20, "width": 20}).save_pretrained(tmp_path)
    assert find_image_processing(tmp_path) == ImageProcessing(20)
    # Between the two versions the processor had a file without the image's settings.
    (tmp_path / FILES[0]).write_text(json.dumps({"processor_class": "Blip2Processor"}))
    assert find_image_processing(tmp_path) == ImageProcessing(20)
    nested = {"image_processor": ImageProcessing(21).to_hf(), "num_query_tokens": 32}
    (tmp_path / FILES[0]).write_text(json.dumps(nested))
    assert find_image_processing(tmp_path) == ImageProcessing(21)
    (tmp_path / FILES[0]).write_text("{")
    with pytest.raises(UserError, match="no JSON"):
        find_image_processing(tmp_path)


# Prompts

TEXTS = ["Question: what is it? Answer:", "a photo of", "", " two  cats"]


def opt_like():
    """Byte-level pieces; a text begins with </s>."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=280,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=special,
            show_progress=False,
        ),
    )
    tokenizer.post_processor = TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>",
    )  # fmt: skip


def t5_like():
    """Unigram pieces; a text ends with </s>."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        TEXTS * 5,
        trainers.UnigramTrainer(
            vocab_size=60, unk_token="<unk>", special_tokens=["<pad>", "</s>", "<unk>"],
            show_progress=False,
        ),
    )  # fmt: skip
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


@pytest.mark.parametrize("make", [opt_like, t5_like])
def test_prompts_are_those_of_blip2(make):
    tokenizer = make()
    encoder = TextEncoder(tokenizer, 32, "language_model")
    behind = [encoder.stop_id] if make is t5_like else []  # an encoder reads an end token
    placeholder = len(tokenizer)
    processor = transformers.Blip2Processor(
        BlipImageProcessorPil(), copy.deepcopy(tokenizer), num_query_tokens=5
    )
    image = random_image("RGB", (24, 24))
    for text in TEXTS:
        expected = processor(images=image, text=text)["input_ids"][0]
        assert [placeholder] * 5 + encoder.prompt_ids(text) + behind == expected
