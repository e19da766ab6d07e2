"""Schedules that follow from the size of the data."""

import pytest

from jaxblip.config import default_config
from jaxblip.errors import UserError
from jaxblip.overrides import apply_overrides, overridden_fields
from jaxblip.training.data_defaults import with_schedule
from jaxblip.training.optimizer import learning_rate


def open_config(**fields):
    config = default_config("stage2")
    config.steps, config.epochs, config.batch_size = 0, 5.0, 32
    config.optimizer.warmup_steps = config.eval.every_steps = config.checkpoint.every_steps = -1
    config.update(fields)
    return config


def test_open_fields_follow_from_the_number_of_examples():
    config, lines = with_schedule(open_config(), 1000)
    assert config.steps == 157  # 5 * 1000 / 32, rounded up
    assert config.optimizer.warmup_steps == 15
    assert config.eval.every_steps == config.checkpoint.every_steps == 16
    assert lines == [
        "From 1,000 examples, 32 a step: steps 157, optimizer.warmup_steps 15, "
        "eval.every_steps 16, checkpoint.every_steps 16."
    ]


def test_the_warm_up_of_a_long_run_is_that_of_the_paper():
    config, _ = with_schedule(open_config(), 566_747)
    assert config.optimizer.warmup_steps == 1000


@pytest.mark.parametrize("examples", [1, 32, 33])
def test_the_smallest_data_sets_have_a_schedule(examples):
    config, _ = with_schedule(open_config(epochs=1.0), examples)
    assert float(learning_rate(config)(config.steps)) == pytest.approx(config.optimizer.min_lr)


def test_a_config_without_open_fields_stays_as_it_is():
    config = default_config("stage2")
    assert with_schedule(config, 1000) == (config, [])


def test_fields_set_on_the_command_line_are_still_known():
    config = open_config().lock()
    apply_overrides(config, ["config.model.vision.width=64"])
    assert overridden_fields(with_schedule(config, 1000)[0]) == {"model.vision.width"}


def test_resolving_twice_changes_nothing():
    config, _ = with_schedule(open_config(), 1000)
    assert with_schedule(config, 1000) == (config, [])


@pytest.mark.parametrize("steps, epochs, said", [(10, 5.0, "both say"), (0, 0.0, "do not say")])
def test_the_length_is_said_once(steps, epochs, said):
    with pytest.raises(UserError, match=f"steps={steps} and config.epochs={epochs:g} {said} how"):
        with_schedule(open_config(steps=steps, epochs=epochs), 1000)
