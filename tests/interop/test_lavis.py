"""LAVIS's files: written from models of transformers by LAVIS's names, read as those models."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from published_folders import (
    AUTHORS_VIT_NAMES,
    INSTRUCTBLIP,
    LANGUAGE_MODELS,
    assert_close,
    compute,
    tokenizer_of,
)
from reference import randomized
from reference_t5 import with_own_head
from tiny_checkpoints import IMAGE_TOKEN, QUERIES, TEXT, WORDS, shapes_of
from tiny_tasks import fast_jit

from jaxblip.cli import main
from jaxblip.config import default_config
from jaxblip.errors import UserError
from jaxblip.interop.convert import convert
from jaxblip.interop.families.lavis import lavis_layout, lavis_model
from jaxblip.interop.files import TensorInfo, Weights, open_weights
from jaxblip.interop.load import check
from jaxblip.interop.published import open_published
from jaxblip.models.blip2 import Blip2Stage2
from jaxblip.models.opt import OptConfig
from jaxblip.models.vit import VisionTransformer
from jaxblip.tasks.base import normalize_images
from jaxblip.training.initialize import frozen_params, initial_trainable
from jaxblip.training.restore import load_run
from jaxblip.training.setup import prepare

STAGE1, STAGE2 = "Blip2ForImageTextRetrieval", "Blip2ForConditionalGeneration"
# Files have no config: heads are 88 wide in EVA-CLIP, 64 in CLIP and in the Q-Former.
VISION = dict(
    hidden_size=176, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    image_size=8, patch_size=4,
)  # fmt: skip
QFORMER = dict(
    hidden_size=128, encoder_hidden_size=176, vocab_size=WORDS, max_position_embeddings=8,
    num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
)  # fmt: skip
PROJECTIONS = {"opt": "opt_proj", "t5": "t5_proj", "llama": "llm_proj"}
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (2, 8, 8, 3), np.uint8)
IDS, INPUT = RNG.integers(4, IMAGE_TOKEN, (2, TEXT)), RNG.integers(4, IMAGE_TOKEN, (2, 4))
VALID = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
INPUT_VALID = np.array([[1, 1, 1, 1], [1, 1, 0, 0]], bool)
ASKED = np.clip(INPUT, 0, WORDS - 1)
PIXELS = torch.tensor(np.array(normalize_images(IMAGES)).transpose(0, 3, 1, 2).copy())


@pytest.fixture(autouse=True)
def fast_compilation(monkeypatch):
    monkeypatch.setattr(jax, "jit", fast_jit)


def random_model(name, language_model="opt", dtype=torch.float32):
    """A tiny model with what LAVIS has and transformers' configs have not."""
    fields = {"vision_config": VISION, "num_query_tokens": QUERIES}
    if name == STAGE1:
        fields |= dict(image_text_hidden_size=8, image_token_index=None)
    else:
        fields |= dict(text_config=LANGUAGE_MODELS[language_model], image_token_index=IMAGE_TOKEN)
    qformer = dict(QFORMER)
    if name != INSTRUCTBLIP:
        qformer["use_qformer_text_input"] = name == STAGE1
    kind = getattr(transformers, name)
    model = kind(kind.config_class(qformer_config=qformer, **fields))
    if language_model == "t5":
        with_own_head(model.language_model)
    randomized(model, scale=0.1)
    with torch.no_grad():
        for parameter, value in model.named_parameters():
            if parameter.endswith("qkv.bias"):  # EVA-CLIP has no key bias
                value[len(value) // 3 : 2 * len(value) // 3] = 0
    model.vision_model.post_layernorm.eps = 1e-5
    return model.to(dtype).to(torch.float32)  # values that `dtype` can hold


def as_lavis(model, projection="", *, vision=False):
    """The state of a model by the names of LAVIS, without what was frozen."""
    renamed = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("language_model."):
            continue
        if name.endswith("self_attn.qkv.bias"):
            name = name.replace("vision_model.encoder.layers", "visual_encoder.blocks")
            query, _, value = tensor.chunk(3)
            renamed[name.replace("self_attn.qkv.bias", "attn.q_bias")] = query
            renamed[name.replace("self_attn.qkv.bias", "attn.v_bias")] = value
            continue
        for theirs, lavis in [
            ("vision_model.post_layernorm", "ln_vision"),
            *AUTHORS_VIT_NAMES,
            ("attention.attention", "attention.self"),  # of crossattention as well
            ("qformer.layernorm", "Qformer.bert.embeddings.LayerNorm"),
            ("qformer.embeddings.layernorm", "Qformer.bert.embeddings.LayerNorm"),
            ("qformer.", "Qformer.bert."),
            ("vision_projection", "vision_proj"),
            ("text_projection", "text_proj"),
            ("language_projection", projection),
        ]:
            name = name.replace(theirs, lavis)
        if name.startswith("embeddings."):
            name = f"Qformer.bert.{name}"
        if vision or not name.startswith("visual_encoder."):
            renamed[name] = tensor.clone()
    if not vision:
        renamed = {k: v for k, v in renamed.items() if not k.startswith("visual_encoder.")}
    return renamed | {"Qformer.bert.embeddings.position_ids": torch.arange(8)[None]}


def itg_head():
    head = "Qformer.cls.predictions"
    shapes = {
        "bias": (WORDS,), "transform.dense.weight": (128, 128), "transform.dense.bias": (128,),
        "transform.LayerNorm.weight": (128,), "transform.LayerNorm.bias": (128,),
    }  # fmt: skip
    return {f"{head}.{name}": torch.randn(shape) for name, shape in shapes.items()}


def write(file, state, dtype=torch.float32):
    """A file as LAVIS's runners save one."""
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    torch.save({"model": state, "epoch": 3, "optimizer": {"lr": 1e-4}, "scaler": None}, file)
    return str(file)


def parts_of(model, language_model, folder):
    """Folders with the image encoder, in its class of transformers, and with the language model."""
    model.save_pretrained(folder / "whole")
    model.language_model.save_pretrained(folder / "words")
    tokenizer_of(language_model).save_pretrained(folder / "words")
    return {"vision": str(folder / "whole"), "language_model": str(folder / "words")}


@torch.no_grad()
def logits_of(reference, language_model, **instruction):
    is_t5 = language_model == "t5"
    text, valid = (INPUT, INPUT_VALID) if is_t5 else (IDS, VALID)
    prefix = np.full((2, QUERIES), IMAGE_TOKEN)
    logits = reference(
        pixel_values=PIXELS,
        input_ids=torch.tensor(np.concatenate([prefix, text], axis=1)),
        attention_mask=torch.tensor(np.concatenate([prefix > 0, valid], axis=1)).long(),
        labels=torch.tensor(IDS) if is_t5 else None,
        **instruction,
    ).logits
    return (logits if is_t5 else logits[:, QUERIES - 1 : -1])[torch.tensor(VALID)]


def inputs_of(task):
    return task.model_inputs({
        "image": jnp.asarray(IMAGES), "text_ids": IDS, "text_mask": VALID, "input_ids": INPUT,
        "input_mask": INPUT_VALID, "instruction_ids": ASKED, "instruction_mask": INPUT_VALID,
    })  # fmt: skip


# Stage 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_stage1(dtype, tmp_path):
    reference = random_model(STAGE1, dtype=dtype)
    state = as_lavis(reference, vision=True) | itg_head() | {"temp": torch.tensor(0.05)}
    file = write(tmp_path / "stage1.pth", state, dtype)
    tokenizer_of("bert").save_pretrained(tmp_path / "bert")
    convert(file, str(tmp_path / "run"), tokenizer=str(tmp_path / "bert"), dtype="float32")
    run = load_run(str(tmp_path / "run"))
    head = run.params["itg_head"]
    np.testing.assert_array_equal(
        head["dense"]["kernel"], state["Qformer.cls.predictions.transform.dense.weight"].to(dtype).T
    )
    assert run.params["temperature"] == np.float32(torch.tensor(0.05, dtype=dtype))
    assert run.task.config.model.vision_norm_epsilon == 1e-5
    assert run.task.config.model.dec_token_id == WORDS - 1

    def scores(module, images):
        image = module.read_image(module.image_features(images))
        return module.embed_images(image), module.match(image, ASKED, INPUT_VALID)

    images, match = compute(run, run.task.normalize_images(jnp.asarray(IMAGES)), method=scores)
    inputs = PIXELS, torch.tensor(ASKED), torch.tensor(INPUT_VALID).long()
    with torch.no_grad():
        assert_close(images, reference(*inputs).image_embeds)
        expected = reference(*inputs, use_image_text_matching_head=True).logits_per_image
        assert_close(match, expected)
    lines = "\n".join(convert(str(tmp_path / "run"), str(tmp_path / "hf")))
    assert "epsilon 1e-06, not with 1e-05" in lines and "itg_head" in lines


# Stage 2 and InstructBLIP


@pytest.mark.parametrize("language_model", ["opt", "t5"])
def test_stage2_with_its_frozen_parts_from_elsewhere(language_model, tmp_path):
    reference = random_model(STAGE2, language_model)
    projection = PROJECTIONS[language_model]
    file = write(tmp_path / "stage2.pth", as_lavis(reference, projection))
    parts = parts_of(reference, language_model, tmp_path)
    lines = "\n".join(convert(file, str(tmp_path / "run"), **parts))
    assert "holds LAVIS stage 2: written as a run of the task stage2" in lines
    assert "random" not in lines
    run = load_run(str(tmp_path / "run"))
    assert run.task.config.model.vision_norm_epsilon == 1e-5
    logits = compute(run, *inputs_of(run.task))
    assert_close(logits[VALID], logits_of(reference, language_model))


def test_stage2_whose_image_encoder_was_trained(tmp_path):
    """In half precision, as the published files mostly are."""
    reference = random_model(STAGE2, dtype=torch.float16)
    state = as_lavis(reference, "opt_proj", vision=True)
    file = write(tmp_path / "caption.pth", state, torch.float16)
    parts = parts_of(reference, "opt", tmp_path)
    with pytest.raises(UserError, match="takes no vision from elsewhere: leave out --vision"):
        convert(file, str(tmp_path / "run"), **parts)
    words = parts["language_model"]
    convert(file, str(tmp_path / "run"), language_model=words, dtype="float32")
    run = load_run(str(tmp_path / "run"))
    assert run.task.config.model.vision.layer_norm_epsilon == 1e-6
    logits = compute(run, *inputs_of(run.task))
    assert_close(logits[VALID], logits_of(reference, "opt"))
    # By itself it keeps the type of the file.
    convert(file, str(tmp_path / "half"), language_model=words)
    half = load_run(str(tmp_path / "half"))
    assert half.params["vision"]["cls_token"].dtype == "float16"
    assert half.task.config.compute_dtype == "bfloat16"


@pytest.mark.parametrize("language_model", ["llama", "t5"])
def test_instructblip(language_model, tmp_path):
    reference = random_model(INSTRUCTBLIP, language_model)
    state = as_lavis(reference, PROJECTIONS[language_model])
    # A buffer that versions of transformers saved with Vicuna's weights, which are not there.
    state["llm_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    file = write(tmp_path / "instruct.pth", state)
    parts = parts_of(reference, language_model, tmp_path)
    with pytest.raises(UserError, match="no tokenizer in 'qformer_tokenizer'"):
        convert(file, str(tmp_path / "run"), **parts)
    tokenizer_of("bert").save_pretrained(tmp_path / "bert")
    bert = str(tmp_path / "bert")
    lines = convert(file, str(tmp_path / "run"), qformer_tokenizer=bert, **parts)
    assert "holds LAVIS InstructBLIP: written as a run of the task instruct" in lines[0]
    run = load_run(str(tmp_path / "run"))
    assert len(run.qformer_tokenizer) == WORDS == run.task.config.model.qformer.vocab_size
    logits = compute(run, *inputs_of(run.task))
    instruction = {
        "qformer_input_ids": torch.tensor(ASKED),
        "qformer_attention_mask": torch.tensor(INPUT_VALID).long(),
    }
    assert_close(logits[VALID], logits_of(reference, language_model, **instruction))


def test_the_encoder_of_eva_clip_as_a_file_of_its_own(tmp_path, monkeypatch):
    """Of which the last block is not used."""
    reference = random_model(STAGE2, dtype=torch.float16)
    encoder = {k: v for k, v in as_lavis(reference, vision=True).items() if "visual_encoder" in k}
    encoder = {name.removeprefix("visual_encoder."): tensor for name, tensor in encoder.items()}
    last = {k.replace("s.1", "s.2"): torch.ones_like(v) for k, v in encoder.items() if "s.1." in k}
    torch.save(encoder | last | {"norm.weight": torch.ones(176)}, tmp_path / "eva_vit_g.pth")
    monkeypatch.setattr("jaxblip.interop.families.lavis.EVA_BLOCKS", 2)
    parts = parts_of(reference, "opt", tmp_path) | {"vision": str(tmp_path / "eva_vit_g.pth")}
    file = write(tmp_path / "stage2.pth", as_lavis(reference, "opt_proj"), torch.float16)
    convert(file, str(tmp_path / "run"), dtype="float32", **parts)
    run = load_run(str(tmp_path / "run"))
    logits = compute(run, *inputs_of(run.task))
    assert_close(logits[VALID], logits_of(reference, "opt"))


def test_the_encoder_of_clip(tmp_path):
    """LAVIS's files with ViT-L have OpenAI's names, and those without it take all but one block."""
    config = transformers.CLIPVisionConfig(**VISION | dict(hidden_size=128, num_hidden_layers=3))
    reference = randomized(transformers.CLIPVisionModel(config), scale=0.1)
    qformer = as_lavis(random_model(STAGE2), "opt_proj")
    for name, tensor in qformer.items():
        if "crossattention.self" in name and name.endswith(("key.weight", "value.weight")):
            qformer[name] = tensor[:, :128].clone()
    qformer |= {f"ln_vision.{name}": torch.randn(128) for name in ("weight", "bias")}
    encoder = "visual_encoder."
    state = {k.removeprefix("vision_model."): v for k, v in reference.state_dict().items()}
    renamed = {
        "conv1.weight": state["embeddings.patch_embedding.weight"],
        "class_embedding": state["embeddings.class_embedding"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
    }
    for i in range(2):
        for leaf in ("weight", "bias"):
            at, block = f"encoder.layers.{i}.", f"transformer.resblocks.{i}."
            qkv = [state[f"{at}self_attn.{part}_proj.{leaf}"] for part in "qkv"]
            renamed[f"{block}attn.in_proj_{leaf}"] = torch.cat(qkv)
            for ours, theirs in [
                ("attn.out_proj", "self_attn.out_proj"), ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"),
            ]:  # fmt: skip
                renamed[f"{block}{ours}.{leaf}"] = state[f"{at}{theirs}.{leaf}"]
            renamed[f"ln_pre.{leaf}"] = state[f"pre_layrnorm.{leaf}"]
    with torch.no_grad():
        expected = reference(PIXELS, output_hidden_states=True).hidden_states[-2]
    model = random_model(STAGE2)
    words = parts_of(model, "opt", tmp_path)["language_model"]
    reference.save_pretrained(tmp_path / "clip")
    within = write(tmp_path / "a.pth", qformer | {encoder + k: v for k, v in renamed.items()})
    without = write(tmp_path / "b.pth", qformer)
    for file, parts in [(within, {}), (without, {"vision": str(tmp_path / "clip")})]:
        convert(file, f"{file}.run", language_model=words, **parts)
        run = load_run(f"{file}.run")
        vision = run.task.model.vision_config
        assert (vision.num_layers, vision.num_heads, vision.pre_norm) == (2, 2, True)
        features = fast_jit(VisionTransformer(vision).apply)(
            {"params": run.params["vision"]}, np.asarray(normalize_images(IMAGES))
        )
        assert_close(features, expected)


@pytest.mark.parametrize(
    ("name", "projection", "width", "trained"),
    [
        (STAGE2, "opt_proj", 2560, 107_133_696),
        (INSTRUCTBLIP, "llm_proj", 4096, pytest.approx(188.84e6, abs=5e3)),
    ],
)
def test_full_size(name, projection, width, trained):
    """ViT-g and the Q-Former of the paper: every tensor has its place, and no memory."""
    text = dict(
        hidden_size=width, word_embed_proj_dim=width, num_hidden_layers=1, ffn_dim=8,
        num_attention_heads=32,
    )  # fmt: skip
    kind = getattr(transformers, name)
    config = kind.config_class(
        text_config=dict(model_type="opt", **text), qformer_config=dict(vocab_size=30523)
    )
    with torch.device("meta"):
        state = as_lavis(kind(config), projection, vision=True)
    tensors = {k: TensorInfo(tuple(v.shape), np.dtype("float16")) for k, v in state.items()}
    weights = Weights(name, tensors, None, {}, None)
    found, words = lavis_model(weights), OptConfig(width=width, num_heads=32, num_layers=1)
    assert (found.vision.num_layers, found.vision.num_heads) == (39, 16)
    assert (found.qformer.num_heads, found.qformer.cross_attention_frequency) == (12, 2)
    model = Blip2Stage2(found.vision, found.qformer, words)
    ids, valid = jnp.zeros((1, 8), int), jnp.ones((1, 8), bool)
    asked = {"instruction_ids": ids, "instruction_valid": valid} if name == INSTRUCTBLIP else {}
    shapes = shapes_of(model, jnp.zeros((1, 224, 224, 3)), ids, valid, **asked)
    del shapes["language_model"]
    check(weights, lavis_layout(found), shapes)
    sizes = {part: sum(x.size for x in jax.tree.leaves(tree)) for part, tree in shapes.items()}
    assert sizes.pop("vision") == 985_894_528
    assert sum(sizes.values()) == trained


# As sources of a training


def start(config, folder):
    """The task of a run, and its parameters before the first step."""
    setup = prepare(config, str(folder / "run"))
    frozen, _ = frozen_params(setup.task, setup.mesh)
    return setup.task, initial_trainable(setup.task, setup.mesh) | frozen


def make_config(task, architecture, **init):
    config = default_config(task, language_model=architecture)
    config.steps, config.batch_size, config.optimizer.warmup_steps = 1, 8, 0
    config.compute_dtype = config.frozen_dtype = "float32"
    config.data.train.source, config.data.num_workers = "shapes:train", 0
    config.data.image_size_px, config.data.max_text_tokens = 8, TEXT
    if task == "instruct":
        config.data.max_instruction_tokens, config.data.prompt = 4, "what"
    config.init.update(init)
    return config.lock()


@pytest.mark.parametrize("field", ["qformer", "all"])
def test_stage2_starts_a_training(field, tmp_path, capfd):
    reference = random_model(STAGE2)
    file = write(tmp_path / "stage2.pth", as_lavis(reference, "opt_proj"), torch.float32)
    config = make_config("stage2", "opt", **{field: file}, **parts_of(reference, "opt", tmp_path))
    task, params = start(config, tmp_path)
    logits = fast_jit(lambda p: task.apply(p, *inputs_of(task)))(params)
    assert_close(logits[VALID], logits_of(reference, "opt"))
    assert "random" not in capfd.readouterr().out


def test_a_projection_to_another_width_starts_at_random(tmp_path, capfd):
    file = write(tmp_path / "stage2.pth", as_lavis(random_model(STAGE2), "opt_proj"))
    wider = LANGUAGE_MODELS["llama"] | dict(hidden_size=24)
    wider = randomized(transformers.LlamaForCausalLM(transformers.LlamaConfig(**wider)))
    wider.save_pretrained(tmp_path / "words")
    tokenizer_of("llama").save_pretrained(tmp_path / "words")
    parts = parts_of(random_model(STAGE2), "opt", tmp_path / "others")
    parts["language_model"] = str(tmp_path / "words")
    _, params = start(make_config("stage2", "llama", qformer=file, **parts), tmp_path)
    assert params["projection"]["kernel"].shape == (128, 24)
    printed = capfd.readouterr().out
    assert f"{file} has no projection to width 24: these parameters start at random." in printed


def test_instructblip_starts_a_training(tmp_path):
    reference = random_model(INSTRUCTBLIP, "llama")
    file = write(tmp_path / "instruct.pth", as_lavis(reference, "llm_proj"), torch.float16)
    tokenizer_of("bert").save_pretrained(tmp_path / "qformer_tokenizer")  # beside the file
    parts = parts_of(reference, "llama", tmp_path)
    task, params = start(make_config("instruct", "llama", qformer=file, **parts), tmp_path)
    tokens = reference.query_tokens.detach().half().float()[0]
    np.testing.assert_array_equal(params["qformer"]["query_tokens"], tokens)
    weight = reference.language_projection.weight.detach().half().float().T
    np.testing.assert_array_equal(params["projection"]["kernel"], weight)


# What does not fit


def test_without_the_frozen_parts_a_sentence_says_how_to_give_them(tmp_path, capfd):
    file = write(tmp_path / "stage2.pth", as_lavis(random_model(STAGE2), "t5_proj"))
    assert main(["convert", f"--from={file}", f"--to={tmp_path / 'run'}"]) == 2
    assert capfd.readouterr().err == (
        f"jaxblip: error: {file!r} (LAVIS stage 2) comes without image encoder and language model: "
        "add --vision=SOURCE --language-model=SOURCE, or name it in config.init.qformer of a "
        "training, with config.init.vision=SOURCE and config.init.language_model=SOURCE.\n"
    )


def test_missing_left_over_and_wrong_tensors_are_one_grouped_error(tmp_path):
    reference = random_model(STAGE2)
    state, parts = as_lavis(reference, "opt_proj"), parts_of(reference, "opt", tmp_path)
    for i in range(2):
        at = f"Qformer.bert.encoder.layer.{i}"
        state[f"{at}.attention.self.querry.weight"] = state.pop(f"{at}.attention.self.query.weight")
        state[f"{at}.output_query.dense.weight"] = torch.zeros(128, 25)
    del state["ln_vision.bias"]
    with pytest.raises(UserError) as error:
        convert(write(tmp_path / "bad.pth", state), str(tmp_path / "run"), **parts)
    for line in [
        "Missing in the file:\n  ln_vision.bias",
        "  Qformer.bert.encoder.layer.{0-1}.attention.self.query.weight (the file has "
        "Qformer.bert.encoder.layer.{0-1}.attention.self.querry.weight)",
        "Left over in the file:\n  Qformer.bert.encoder.layer.{0-1}.attention.self.querry.weight",
        "Of another shape:\n  Qformer.bert.encoder.layer.{0-1}.output_query.dense.weight: "
        "128 x 25 in the file, 128 x 24 in the model",
    ]:
        assert line in str(error.value)


def test_an_encoder_of_another_width_is_of_another_shape(tmp_path):
    reference = random_model(STAGE2)
    file = write(tmp_path / "stage2.pth", as_lavis(reference, "opt_proj"))
    parts = parts_of(reference, "opt", tmp_path)
    config = transformers.CLIPVisionConfig(**VISION | {"hidden_size": 20})
    transformers.CLIPVisionModel(config).save_pretrained(parts["vision"])
    with pytest.raises(UserError, match="ln_vision.weight: 176 in the file, 20 in the model"):
        convert(file, str(tmp_path / "run"), **parts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_tokens": torch.zeros(3, 128)}, "'query_tokens' of .* has 2 axes, not 3"),
        ({"query_tokens": torch.zeros(1, 3, 100)}, "width 100, which is not cut into heads"),
        ({"Qformer.bert.encoder.layer.0.intermediate_query.dense.weight": None}, "has no 'Qformer"),
        ({"opt_proj.weight": None, "opt_proj.bias": None}, "neither the heads .* nor a projection"),
    ],
)
def test_what_decides_the_sizes_must_be_there(change, message, tmp_path):
    state = as_lavis(random_model(STAGE2), "opt_proj") | change
    file = write(tmp_path / "bad.pth", {k: v for k, v in state.items() if v is not None})
    with pytest.raises(UserError, match=message):
        open_published(file)


def test_stage1_needs_its_text_side(tmp_path):
    state = as_lavis(random_model(STAGE1), vision=True) | itg_head()
    text = ("word_embeddings", "position_embeddings", "intermediate.", "output.")
    state = {k: v for k, v in state.items() if not any(part in k for part in text)}
    with pytest.raises(UserError, match="has no 'Qformer.bert.embeddings.word_embeddings.weight'"):
        open_published(write(tmp_path / "bad.pth", state))


def test_a_layer_that_is_not_there_is_missing_not_a_shorter_stack(tmp_path):
    state = as_lavis(random_model(STAGE1), vision=True) | itg_head()
    state = {k: v for k, v in state.items() if not k.startswith("visual_encoder.blocks.0.attn")}
    model = lavis_model(open_weights(write(tmp_path / "bad.pth", state)))
    assert model.vision.num_layers == 2


def test_parts_that_have_no_place(tmp_path):
    reference = random_model(STAGE2)
    parts = parts_of(reference, "opt", tmp_path)
    file = write(tmp_path / "stage2.pth", as_lavis(reference, "opt_proj"))
    for source, given, message in [
        (parts["vision"], {"vision": parts["vision"]}, "takes no vision from elsewhere"),
        (parts["language_model"], {"vision": parts["vision"]}, "takes no vision from elsewhere"),
        (file, {"vision": parts["language_model"]}, "has no vision: it has language_model"),
        (file, parts | {"qformer_tokenizer": "x"}, "leave out --qformer-tokenizer"),
    ]:
        with pytest.raises(UserError, match=message):
            convert(source, str(tmp_path / "run"), **given)
    convert(file, str(tmp_path / "run"), **parts)
    with pytest.raises(UserError, match="is a run and is whole: leave out --language-model"):
        convert(str(tmp_path / "run"), str(tmp_path / "out"), language_model="hf:x")
