"""Several evaluations in one config."""

from __future__ import annotations

import pytest

from jaxblip.config import default_config
from jaxblip.overrides import apply_overrides
from jaxblip.data.eval_sections import KINDS, configs_of_evaluations
from jaxblip.errors import UserError
from jaxblip.tasks import TASKS


def configs(task, *overrides, **settings):
    config = default_config(task, **settings).lock()
    apply_overrides(config, [f"config.eval.{override}" for override in overrides])
    return configs_of_evaluations(config)


def test_without_sections_there_is_the_one_of_the_source():
    assert configs("stage2") == {}
    (config,) = configs("stage2", "source=a.json").values()
    assert config.eval.kind == "captions" and config.data.prompt == ""


def test_every_task_has_kinds():
    assert KINDS.keys() == TASKS.keys()


def test_a_section_has_its_own_fields_and_the_rest_of_all():
    found = configs(
        "stage2", "source=a.json", "max_images=7", "set.long.max_new_tokens=80",
        "set.nocaps.source=nocaps.json", "set.nocaps.prompt=a photo of",
        "set.nocaps.fields.captions=said",
    )  # fmt: skip
    assert list(found) == ["long", "nocaps"]
    long, nocaps = found["long"], found["nocaps"]
    assert long.eval.source == "a.json" and long.eval.max_new_tokens == 80
    assert nocaps.eval.source == "nocaps.json" and nocaps.eval.max_new_tokens == 30
    assert nocaps.data.prompt == "a photo of" and long.data.prompt == ""
    assert nocaps.eval.fields.captions == "said" and long.eval.fields.captions == ""
    assert long.eval.max_images == nocaps.eval.max_images == 7


def test_questions_are_asked_and_answered_as_by_blip2():
    asked = "set.vqa.kind=vqa", "set.vqa.source=q.json"
    found = configs("stage2", *asked, "set.vqa.max_new_tokens=5")["vqa"]
    assert found.data.prompt == "Question: {} Answer:"
    assert (found.eval.length_penalty, found.eval.max_new_tokens) == (-1.0, 5)
    with_encoder = configs("stage2", *asked, language_model="t5")["vqa"]
    assert with_encoder.data.prompt == "Question: {} Short answer:"
    own = configs("stage2", *asked, "set.vqa.prompt=Q: {} A:", "set.vqa.length_penalty=0")["vqa"]
    assert own.data.prompt == "Q: {} A:" and own.eval.length_penalty == 0


@pytest.mark.parametrize("overrides, message", [
    (["set.a.kind=captions"], "config.eval.set.a names no source"),
    (["set.a.sourse=x"], "did you mean source"),
    (["set.a.every_steps=3"], "no field that an evaluation of stage2 has of its own"),
    (["source=x", "kind=retrieval"], "'retrieval' cannot be measured of a checkpoint of stage2"),
    (["set.a.source=x", "set.a.kind=capions"], "did you mean captions"),
])  # fmt: skip
def test_what_does_not_fit_is_one_sentence(overrides, message):
    with pytest.raises(UserError, match=message):
        configs("stage2", *overrides)
