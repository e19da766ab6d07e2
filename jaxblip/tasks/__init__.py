"""Tasks by name."""

from __future__ import annotations

from ml_collections import ConfigDict

from jaxblip.tasks.base import LossOutput, Task
from jaxblip.tasks.clip import ClipTask
from jaxblip.tasks.language_model import LanguageModelTask
from jaxblip.tasks.stage1 import Stage1Task
from jaxblip.tasks.stage2 import Stage2Task

TASKS: dict[str, type[Task]] = {
    "clip": ClipTask,
    "language_model": LanguageModelTask,
    "stage1": Stage1Task,
    "stage2": Stage2Task,
}

__all__ = ["TASKS", "LossOutput", "Task", "make_task"]


def make_task(config: ConfigDict) -> Task:
    """The task that `config.task` names."""
    return TASKS[config.task](config)
