"""Every shipped config, and what `load_config` says of wrong fields and values."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict

from jaxblip.config import config_from_dict, default_config, load_config
from jaxblip.overrides import field_names
from jaxblip.errors import UserError
from jaxblip.models.language_models import LANGUAGE_MODELS
from jaxblip.tasks import TASKS, make_task
from jaxblip.tasks.parts import NOT_IN_CONFIG, language_model_config
from jaxblip.training.data_defaults import with_schedule
from jaxblip.training.initialize import abstract_params
from jaxblip.training.optimizer import learning_rate, make_optimizer

FOLDER = Path(__file__).parents[1] / "configs"
VOCABULARY = 30_523


def imported_by_neighbours(file: Path) -> bool:
    """Whether a file is a module that other configs share, and no config itself."""
    imports = re.compile(rf"^(import|from) {file.stem}\b", re.MULTILINE)
    return any(imports.search(other.read_text()) for other in file.parent.glob("*.py"))


SHIPPED = [file for file in sorted(FOLDER.rglob("*.py")) if not imported_by_neighbours(file)]
NAMES = [str(file.relative_to(FOLDER)) for file in SHIPPED]


def load(name: str, *overrides: str) -> ConfigDict:
    return load_config(str(FOLDER / name), overrides)


def test_there_are_configs():
    assert {"blip2/stage1_vit_g.py", "clip/vit_b_16.py", "demo/stage2.py"} <= set(NAMES)


def defaults_of(config: ConfigDict) -> ConfigDict:
    """What the config started from."""
    architecture = config.model.get("language_model", {}).get("architecture", "opt")
    return default_config(config.task, language_model=architecture)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_loads_locked_and_builds_its_task(name):
    config = load(name)
    assert config.is_locked and config.model.is_locked
    # No field but the known ones, nor one less.
    assert field_names(config) == field_names(defaults_of(config))
    for section in config.model.values():
        if isinstance(section, ConfigDict) and section.get("vocab_size") == 0:
            section.vocab_size = VOCABULARY
    task = make_task(config)
    trainable, frozen = abstract_params(task)
    assert trainable and set(frozen) == set(config.frozen)
    state = jax.eval_shape(make_optimizer(config).init, trainable)
    assert jax.tree.leaves(state)
    config, _ = with_schedule(config, 1_000_000)
    rate = learning_rate(config)
    assert float(rate(config.optimizer.warmup_steps)) == pytest.approx(config.optimizer.peak_lr)
    assert float(rate(config.steps)) == pytest.approx(config.optimizer.min_lr)


STAGE1 = ("blip2/stage1_vit_g.py", "blip2/stage1_vit_l.py")
STAGE2 = tuple(name for name in NAMES if name.startswith("blip2/stage2"))
FLAN_T5 = tuple(name for name in STAGE2 if "flan_t5" in name)
VICUNA = tuple(name for name in STAGE2 if "vicuna" in name)


@pytest.mark.parametrize("name", [*STAGE1, *STAGE2])
def test_the_papers_values_are_the_default(name):
    config = load(name)
    optimizer = config.optimizer
    assert config == load(f"{name}:paper")
    assert config.steps == (250_000 if name in STAGE1 else 80_000)
    batch_sizes = dict(zip(STAGE1, (1680, 2320), strict=True)) | dict.fromkeys(FLAN_T5, 1520)
    assert config.batch_size == batch_sizes.get(name, 1920)
    assert (optimizer.b1, optimizer.b2, optimizer.weight_decay) == (0.9, 0.98, 0.05)
    assert (optimizer.peak_lr, optimizer.warmup_steps) == (1e-4, 2000)
    assert optimizer.min_lr == (1e-5 if name in STAGE1 else 5e-5)
    assert (config.data.image_size_px, config.data.max_text_tokens) == (224, 32)


@pytest.mark.parametrize("name", FLAN_T5)
def test_flan_t5_is_trained_as_a_prefix_language_model(name):
    config = load(name)
    assert config.loss.prefix_lm and config.model.language_model.activation == "gelu"
    with pytest.raises(UserError, match="LAVIS has no recipe of stage 2 with FlanT5.*'paper'"):
        load(f"{name}:lavis")


@pytest.mark.parametrize("name", [*STAGE1, *sorted(set(STAGE2).difference(FLAN_T5, VICUNA))])
def test_the_repositorys_values_are_a_variant(name):
    config = load(f"{name}:lavis")
    optimizer = config.optimizer
    assert config.batch_size == (1600 if name in STAGE1 else 1024)
    assert optimizer.warmup_steps == (5000 if name in STAGE1 else 2000)
    assert (optimizer.b2, optimizer.min_lr, optimizer.warmup_init_lr) == (0.999, 1e-5, 1e-6)
    learning_rate(config)


def test_a_recipe_that_does_not_exist():
    with pytest.raises(UserError, match="LAVIS has no recipe of stage 2 with Vicuna.*'paper'"):
        load(f"{VICUNA[0]}:lavis")
    with pytest.raises(UserError, match="ViT-L/14 has no recipe '448': use '336'"):
        load("clip/vit_l_14.py:448")
    with pytest.raises(UserError, match="'fast'.*'paper'.*'lavis'"):
        load("blip2/stage1_vit_g.py:fast")
    with pytest.raises(UserError, match="'huge' of the task blip_caption: use 'base' or 'large'"):
        load("blip/caption.py:huge")


@pytest.mark.parametrize(
    ("name", "peak_lr", "large_lr", "epochs", "size"),
    [
        ("caption", 1e-5, 2e-6, 5, 384),
        ("retrieval", 1e-5, 5e-6, 6, 384),
        ("vqa", 2e-5, None, 10, 480),
    ],
)
def test_blip_is_fine_tuned_as_in_its_paper(name, peak_lr, large_lr, epochs, size):
    """Table 14, and the YAML files of the authors."""
    config = load(f"blip/{name}.py")
    optimizer = config.optimizer
    assert (config.batch_size, config.data.image_size_px) == (256, size)
    assert (optimizer.peak_lr, optimizer.min_lr, optimizer.weight_decay) == (peak_lr, 0.0, 0.05)
    examples = 658_111 if name == "vqa" else 566_747
    assert config.steps == epochs * examples // 256 and config.frozen == ()
    assert config.model.vision.width == 768 and config.data.randaugment
    if large_lr is None:
        with pytest.raises(UserError, match="no recipe 'large'"):
            load(f"blip/{name}.py:large")
    else:
        large = load(f"blip/{name}.py:large")
        assert (large.optimizer.peak_lr, large.model.vision.num_layers) == (large_lr, 24)
        assert large.steps == config.steps


@pytest.mark.parametrize(
    ("name", "batch_size", "length"),
    [
        ("vicuna_7b", 128, 384),
        ("vicuna_13b", 64, 384),
        ("flan_t5_xl", 192, 256),
        ("flan_t5_xxl", 64, 256),
    ],
)
def test_instructblip_is_trained_as_in_its_paper(name, batch_size, length):
    """§2.6, and X-InstructBLIP's YAML file; the defaults of the task are the same."""
    config = load(f"blip2/instructblip_{name}.py")
    optimizer, data = config.optimizer, config.data
    assert (config.steps, config.batch_size) == (60_000, batch_size)
    assert (optimizer.warmup_init_lr, optimizer.peak_lr, optimizer.min_lr) == (1e-8, 1e-5, 0.0)
    assert (optimizer.warmup_steps, optimizer.b1, optimizer.b2) == (1000, 0.9, 0.999)
    assert (optimizer.weight_decay, data.flip_probability, data.crop_scale) == (0.05, 0, (0.9, 1))
    assert data.max_instruction_tokens == data.get("max_input_tokens", 128) == 128
    assert data.max_text_tokens == length
    assert (data.prompt, data.max_words) == ("{}", 0)
    assert config.frozen == ("vision", "language_model")
    defaults = defaults_of(config)
    assert optimizer.to_dict() == defaults.optimizer.to_dict()
    data, usual = data.to_dict(), defaults.data.to_dict()
    differing = {field for field in data if data[field] != usual[field]}
    assert differing <= {"tokenizer", "qformer_tokenizer", "mixture_exponent"}
    assert config.data.mixture_exponent == 0.5 and not config.data.mixture


@pytest.mark.parametrize(
    ("name", "peak_lr", "steps", "size"),
    [
        ("vit_b_32", 5e-4, 390_625, 224),
        ("vit_b_16", 5e-4, 390_625, 224),
        ("vit_l_14", 4e-4, 390_625, 224),
        ("vit_l_14.py:336", 2e-5, 12_207, 336),
    ],
)
def test_clip_is_trained_as_in_its_paper(name, peak_lr, steps, size):
    config = load(f"clip/{name}" if ":" in name else f"clip/{name}.py")
    optimizer, vision = config.optimizer, config.model.vision
    assert (config.batch_size, config.steps, optimizer.peak_lr) == (32_768, steps, peak_lr)
    assert (optimizer.weight_decay, optimizer.b2, optimizer.eps) == (0.2, 0.98, 1e-6)
    assert config.data.image_size_px == size and size % vision.patch_size_px == 0
    assert config.model.embed_dim == config.model.text.width == 64 * config.model.text.num_heads


def test_blips_captions_have_the_lengths_of_its_code():
    """Of 5 to 20 tokens, counted with [DEC] and the prompt's three."""
    config = load("blip/caption.py")
    assert config.data.prompt == "a picture of " and config.eval.num_beams == 3
    assert (config.eval.min_new_tokens + 4, config.eval.max_new_tokens + 4) == (5, 20)


@pytest.mark.parametrize(
    ("name", "batch_size", "size", "decay"),
    [
        ("caption_opt_2_7b", 256, 364, 1.0),
        ("caption_opt_6_7b", 256, 364, 0.95),
        ("caption_flan_t5_xl", 256, 364, 1.0),
        ("vqa_opt_2_7b", 128, 490, 0.95),
        ("vqa_opt_6_7b", 128, 490, 0.9),
        ("vqa_flan_t5_xl", 128, 490, 0.95),
        ("retrieval_vit_g", 224, 364, 0.95),
        ("retrieval_vit_l", 224, 364, 0.95),
    ],
)
def test_blip2_is_fine_tuned_as_in_its_paper(name, batch_size, size, decay):
    """Tables 7 to 9 of the appendix."""
    config = load(f"blip2/{name}.py")
    optimizer = config.optimizer
    assert (config.batch_size, config.data.image_size_px) == (batch_size, size)
    assert (optimizer.warmup_steps, optimizer.weight_decay) == (1000, 0.05)
    assert optimizer.layer_decay.vision == decay
    is_small = name == "retrieval_vit_l"
    assert (optimizer.peak_lr, optimizer.b1) == (5e-6 if is_small else 1e-5, 0.9)
    assert optimizer.b2 == (0.98 if is_small else 0.999)
    assert config.frozen == (() if name.startswith("retrieval") else ("language_model",))
    if name.startswith("vqa"):
        assert config.data.prompt == "Question: {} Answer:" and config.eval.num_beams == 5
        with pytest.raises(UserError, match="LAVIS has no recipe of VQA"):
            load(f"blip2/{name}.py:lavis")
    else:  # what LAVIS configures and never applies
        lavis = load(f"blip2/{name}.py:lavis").optimizer
        assert (lavis.layer_decay.vision, lavis.b2) == (1.0, 0.999)


def test_a_saved_config_of_another_version():
    saved = default_config("stage1").to_dict()
    saved["model"]["vision"]["remat"] = False  # a name since
    with pytest.raises(UserError, match="of another version of jaxblip and cannot be read.*remat"):
        config_from_dict(saved)


# Overrides

NAME = "demo/stage1.py"


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("config.optimizer.peak_lr=3e-5", 3e-5),
        ("optimizer.peak_lr=1", 1.0),
        ("config.steps=7", 7),
        ("config.data.train.source=my data.jsonl", "my data.jsonl"),
        ("config.data.train.source=123", "123"),
        ("config.data.train.source=", ""),
        ("config.data.randaugment=true", True),
        ("config.data.randaugment=False", False),
        ("config.data.crop_scale=0.2,1.0", (0.2, 1.0)),
        ("config.data.crop_scale=(0.2, 1.0)", (0.2, 1.0)),
        ("config.frozen=vision,qformer/groups", ("vision", "qformer/groups")),
        ("config.frozen=vision", ("vision",)),
        ("config.frozen=", ()),
        ("config.mesh.fsdp=-1", -1),
    ],
)
def test_an_override_sets_one_field(override, value):
    config, before = load(NAME, override), load(NAME)
    *path, field = override.partition("=")[0].removeprefix("config.").split(".")
    owner = config
    for section in path:
        owner = owner[section]
    assert owner[field] == value and type(owner[field]) is type(value)
    differing = [name for name in field_names(config) if get(config, name) != get(before, name)]
    assert differing in ([], [".".join([*path, field])])


def get(config, name):
    for part in name.split("."):
        config = config[part]
    return config


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("config.optimizer.peak_lrr=1", "optimizer.peak_lr"),
        ("config.optimiser.peak_lr=1", "optimizer.peak_lr"),
        ("config.peak_lr=1", "optimizer.peak_lr"),
        ("config.step=1", "steps"),
        ("config.batchsize=1", "batch_size"),
        ("config.data.vocabsize=1", "data.vocab_size"),
        ("config.model.qformer.num_query_token=1", "model.qformer.num_query_tokens"),
        ("config.steps.more=1", "steps"),
        ("config.loss.itc_smoothing=1", "loss.itc_label_smoothing"),
    ],
)
def test_an_unknown_field_names_the_nearest(override, nearest):
    name = override.partition("=")[0].removeprefix("config.")
    with pytest.raises(UserError) as error:
        load(NAME, override)
    assert f"no field {name!r}" in str(error.value)
    assert f"--config.{nearest}=" in str(error.value)


@pytest.mark.parametrize(
    ("override", "kind"),
    [
        ("config.steps=many", "int"),
        ("config.steps=1.5", "int"),
        ("config.steps=", "int"),
        ("config.steps=True", "int"),
        ("config.optimizer.peak_lr=high", "float"),
        ("config.optimizer.peak_lr=True", "float"),
        ("config.data.randaugment=1", "bool"),
        ("config.data.randaugment=yes", "bool"),
    ],
)
def test_a_value_of_the_wrong_type(override, kind):
    name, _, text = override.partition("=")
    with pytest.raises(UserError, match=re.escape(f"{name}={text} is no {kind}")):
        load(NAME, override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("config.steps", "no value"),
        ("config.optimizer=1", "is a section.*peak_lr"),
    ],
)
def test_an_override_that_sets_nothing(override, message):
    with pytest.raises(UserError, match=message):
        load(NAME, override)


# Files


def test_a_file_that_does_not_exist(tmp_path):
    with pytest.raises(UserError, match="nothing.py.*does not exist"):
        load_config(str(tmp_path / "nothing.py"))


def test_a_file_without_get_config(tmp_path):
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(UserError, match="empty.py.*get_config"):
        load_config(str(tmp_path / "empty.py"))


def test_a_config_imports_the_neighbour_of_its_own_folder(tmp_path):
    """Two folders with a `common` each."""
    for folder, steps in ("a", 11), ("b", 22):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "common.py").write_text(f"STEPS = {steps}\n")
        (tmp_path / folder / "run.py").write_text(
            "import common\n"
            "from jaxblip.config import default_config\n"
            "def get_config(arg=''):\n"
            "    config = default_config(arg or 'clip')\n"
            "    config.steps = common.STEPS\n"
            "    return config\n"
        )
    assert load_config(str(tmp_path / "a" / "run.py")).steps == 11
    config = load_config(str(tmp_path / "b" / "run.py") + ":stage2")
    assert (config.steps, config.task) == (22, "stage2")


@pytest.mark.parametrize("task", TASKS)
def test_the_defaults_are_for_the_task(task):
    config = default_config(task)
    assert config.task == task
    assert ("rerank_top_k" in config.eval) == (task in ("stage1", "blip_retrieval"))
    assert ("num_beams" in config.eval) == (
        task in ("stage2", "instruct", "blip_caption", "blip_vqa")
    )
    assert ("qformer_tokenizer" in config.data) == (task == "instruct")


@pytest.mark.parametrize("task", ["instruct", "language_model", "stage2"])
@pytest.mark.parametrize("architecture", LANGUAGE_MODELS)
def test_the_language_model_has_the_fields_of_its_architecture(task, architecture):
    config = default_config(task, language_model=architecture)
    kind, _ = LANGUAGE_MODELS[architecture]
    fields = {field.name for field in dataclasses.fields(kind)}.difference(NOT_IN_CONFIG)
    assert set(config.model.language_model) == fields | {"architecture"}
    assert type(language_model_config(config)) is kind
    assert ("prefix_lm" in config.loss) == (architecture == "t5" and task != "instruct")
    assert ("max_input_tokens" in config.data) == (architecture == "t5")


@pytest.mark.parametrize("architecture", LANGUAGE_MODELS)
def test_a_saved_config_comes_back(architecture):
    config = default_config("stage2", language_model=architecture)
    config.data.pixel_std = (0.5, 0.25, 0.5)
    config.model.language_model.width = 96
    saved = json.loads(json.dumps(config.to_dict()))
    assert config_from_dict(saved) == config.lock()


def test_a_config_saved_before_there_were_other_language_models_comes_back():
    saved = default_config("stage2").to_dict()
    del saved["model"]["language_model"]["architecture"], saved["data"]["pixel_mean"]
    assert config_from_dict(saved) == default_config("stage2").lock()


def test_another_architecture_needs_its_own_fields():
    with pytest.raises(UserError, match=r"default_config\('stage2', language_model='llama'\)"):
        load("demo/stage2.py", "config.model.language_model.architecture=llama")


def test_a_language_model_that_does_not_exist():
    for make in (
        lambda: default_config("stage2", language_model="gpt"),
        lambda: load("demo/stage2.py", "config.model.language_model.architecture=gpt"),
    ):
        with pytest.raises(UserError, match="'gpt': choose one of opt, llama, t5"):
            make()


def test_pixels_are_not_divided_by_zero():
    with pytest.raises(UserError, match="pixel_std=.*must be positive"):
        make_task(load("demo/vision.py", "config.data.pixel_std=0.5,0,0.5"))


def test_visual_tokens_and_text_need_positions():
    override = "config.model.language_model.max_positions=20"
    with pytest.raises(UserError, match="num_query_tokens=10.*max_text_tokens=12.*=20"):
        make_task(load("demo/stage2.py", override))


def test_a_task_that_does_not_exist():
    with pytest.raises(UserError, match="'stage3'.*stage1.*stage2"):
        default_config("stage3")
