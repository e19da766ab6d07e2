"""Tasks by name."""

from __future__ import annotations

from ml_collections import ConfigDict

from jaxblip.tasks.base import LossOutput, Task
from jaxblip.tasks.blip import BlipCaptionTask, BlipRetrievalTask, BlipVqaTask
from jaxblip.tasks.clip import ClipTask
from jaxblip.tasks.instruct import InstructTask
from jaxblip.tasks.language_model import LanguageModelTask
from jaxblip.tasks.stage1 import Stage1Task
from jaxblip.tasks.stage2 import Stage2Task

TASKS: dict[str, type[Task]] = {
    "blip_caption": BlipCaptionTask,
    "blip_retrieval": BlipRetrievalTask,
    "blip_vqa": BlipVqaTask,
    "clip": ClipTask,
    "instruct": InstructTask,
    "language_model": LanguageModelTask,
    "stage1": Stage1Task,
    "stage2": Stage2Task,
}
# Tasks whose networks have parts in common, under the same names.
BLIP_TASKS = ("blip_caption", "blip_retrieval", "blip_vqa")
# Tasks in which a language model reads what the Q-Former says of an image.
STAGE2_TASKS = ("instruct", "stage2")
# Tasks that can do without the images, where the output of their frozen encoder is known.
FROM_FEATURES = ("stage1", *STAGE2_TASKS)

__all__ = [
    "BLIP_TASKS",
    "FROM_FEATURES",
    "STAGE2_TASKS",
    "TASKS",
    "LossOutput",
    "Task",
    "make_task",
]


def make_task(config: ConfigDict) -> Task:
    """The task that `config.task` names."""
    return TASKS[config.task](config)
