"""The papers' recipes at full size: each builds, and trains as many parameters as is published."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import pytest
from test_configs import NAMES, VOCABULARY, load

from jaxblip.data.mixture import configs_of_sources, shares
from jaxblip.data.templates import FAMILIES
from jaxblip.errors import UserError
from jaxblip.tasks import make_task
from jaxblip.training.initialize import abstract_params

RECIPES = [name for name in NAMES if Path(name).parent.name in ("blip", "blip2", "clip")]
STAGE1_G, STAGE1_L = "blip2/stage1_vit_g.py", "blip2/stage1_vit_l.py"

# To the digit by public training logs or by arithmetic from the definitions.
EXACT = {
    STAGE1_G: 186_705_470,
    "blip2/stage2_vit_g_opt_2_7b.py": 107_133_696,
    "blip2/stage2_vit_g_opt_6_7b.py": 108_314_880,
    "blip2/stage2_flan_t5_xl.py": 106_739_968,
    "blip2/stage2_flan_t5_xxl.py": 108_314_880,
    "blip2/caption_opt_2_7b.py": 1_093_619_584,
}
# In millions, as they are known.
ROUNDED = {
    STAGE1_L: 183.166,
    "blip2/stage2_vit_l_opt_2_7b.py": 103.594,
    "blip2/stage2_vit_l_flan_t5_xl.py": 103.200,
    "blip2/stage2_vit_g_vicuna_7b.py": 108.31,
    "blip2/stage2_vit_g_vicuna_13b.py": 109.10,
    "blip2/instructblip_flan_t5_xl.py": 187.26,
    "blip2/instructblip_flan_t5_xxl.py": 188.84,
    "blip2/instructblip_vicuna_7b.py": 188.84,
    "blip2/instructblip_vicuna_13b.py": 189.62,
}
VIT_G = {224: 985_894_528, 364: 986_485_888}  # 39 blocks, by the side of the images


@functools.cache
def sizes_of(name: str) -> tuple[dict[str, int], dict[str, int]]:
    """Parameters of each part that trains, and of each that is frozen."""
    config = load(name)
    for section in config.model.values():
        if getattr(section, "vocab_size", 1) == 0:
            section.vocab_size = VOCABULARY
    return tuple(
        {part: sum(leaf.size for leaf in jax.tree.leaves(tree)) for part, tree in params.items()}
        for params in abstract_params(make_task(config))
    )


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_what_is_published(name):
    trainable, frozen = sizes_of(name)
    total = sum(trainable.values())
    if name in EXACT:
        assert total == EXACT[name]
    if name in ROUNDED:
        wanted = ROUNDED[name]
        digits = len(f"{wanted:.3f}".rstrip("0").partition(".")[2])
        assert round(total / 1e6, max(digits, 2)) == wanted
    config = load(name)
    vision = (trainable | frozen)["vision"]
    if config.model.vision.width == 1408 and config.data.image_size_px in VIT_G:
        assert vision == VIT_G[config.data.image_size_px]
    if name == STAGE1_L:
        assert round(vision / 1e6, 2) == 290.58


def test_the_counts_are_of_recipes_that_there_are():
    assert {*EXACT, *ROUNDED} <= set(RECIPES)


def test_fine_tuning_for_retrieval_trains_stage_1_and_the_encoder():
    """Table 5 of BLIP-2: 1.2 and 0.474 billion."""
    totals = {}
    for size, stage1 in ("g", STAGE1_G), ("l", STAGE1_L):
        trainable, frozen = sizes_of(f"blip2/retrieval_vit_{size}.py")
        assert not frozen
        totals[size] = sum(trainable.values())
        vision = trainable["vision"]
        assert totals[size] == sum(sizes_of(stage1)[0].values()) + vision
    assert (round(totals["g"] / 1e9, 1), round(totals["l"] / 1e6)) == (1.2, 474)


# What InstructBLIP trains on

# Of the image training of X-InstructBLIP in LAVIS: samples and published ratio of each set.
LAVIS_SETS = {
    "cc12m": (6_029_862, 0.19438),
    "coco_caption": (566_747, 0.05959),
    "capfilt": (13_873_136, 0.29485),
    "vg_caption": (821_774, 0.07176),
    "sbu": (859_739, 0.07340),
    "vg_vqa": (1_440_069, 0.09499),
    "vqav2": (658_104, 0.06422),
    "ocrvqa": (1_002_146, 0.07925),
    "okvqa": (9_009, 0.00751),
    "aokvqa": (17_056, 0.01034),
    "llava_dialogue": (394_276, 0.04971),
}
INSTRUCTBLIP = "blip2/instructblip_vicuna_7b.py"


def sources(argument: str, **weights: float):
    """The config of each set, as if the user had named its file, and its share."""
    names = load(f"{INSTRUCTBLIP}:{argument}").data.mixture
    config = load(
        f"{INSTRUCTBLIP}:{argument}",
        *(f"config.data.mixture.{name}.train.source={name}.jsonl" for name in names),
        *(f"config.data.mixture.{name}.weight={weight}" for name, weight in weights.items()),
    )
    given = [section.weight for section in config.data.mixture.values()]
    lengths = [LAVIS_SETS.get(name, (10_000,))[0] for name in names]
    of_all = shares(given, lengths, config.data.mixture_exponent)
    return configs_of_sources(config), dict(zip(names, of_all, strict=True))


def test_the_eleven_sets_of_x_instructblip_have_their_published_shares():
    _, found = sources("lavis")
    assert {name: f"{share:.5f}" for name, share in found.items()} == {
        name: f"{ratio:.5f}" for name, (_, ratio) in LAVIS_SETS.items()
    }


def test_factors_by_hand_raise_one_set_and_lower_another():
    """As InstructBLIP does with OK-VQA and A-OKVQA, by factors that it does not give."""
    _, before = sources("lavis")
    _, after = sources("lavis", okvqa=2, aokvqa=0.5)
    total = 1 + before["okvqa"] - before["aokvqa"] / 2
    for name, share in before.items():
        factor = {"okvqa": 2, "aokvqa": 0.5}.get(name, 1)
        assert after[name] == pytest.approx(share * factor / total)


def test_every_set_has_the_templates_of_its_family():
    configs, _ = sources("paper")
    assert len(configs) == 13
    for name, config in configs.items():
        data = config.data
        assert data.train.source == f"{name}.jsonl" and data.prompt == "{}"
        if name.startswith("llava"):
            assert data.templates == ()
        else:
            assert len(data.templates) == 1 and data.templates[0] in FAMILIES
        if name.startswith("vqg"):  # the question is what is asked for
            assert (data.fields.instruction, data.fields.output) == ("answer", "question")
            assert data.templates == ("vqg",)
    some, _ = sources("coco_caption,vg_vqa")
    assert list(some) == ["coco_caption", "vg_vqa"]


def test_a_set_that_there_is_not():
    with pytest.raises(UserError, match="no set 'coco': use 'paper', 'lavis', or some of coco_cap"):
        load(f"{INSTRUCTBLIP}:coco")
    with pytest.raises(UserError, match="mixture.aokvqa names no source: set --config.data.mix"):
        configs_of_sources(load(f"{INSTRUCTBLIP}:lavis"))
