import pytest

from jaxblip.evaluation.labels import TASK_TITLES, is_share, metric_label
from jaxblip.tasks import TASKS


def test_every_task_has_a_title():
    assert TASK_TITLES.keys() == TASKS.keys()


@pytest.mark.parametrize(
    "name, label",
    [
        ("eval/t2i_r1", "text to image, recall@1"),
        ("itc_i2t_r10", "image to text by ITC alone, recall@10"),
        ("train/itm_accuracy", "ITM accuracy"),
        ("train/token_accuracy", "token accuracy"),
        ("heldout_images", "held-out images"),
    ],
)
def test_metrics_have_the_fields_words(name, label):
    assert metric_label(name) == label


def test_shares_are_known():
    assert all(map(is_share, ("eval/i2t_r5", "train/itg_accuracy", "eval/caption_exact")))
    assert not any(map(is_share, ("bleu4", "train/itc", "images_per_s", "perplexity")))
