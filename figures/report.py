"""One self-contained HTML page: verdicts, figures, gates, settings, and how to make it again."""

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from figures.style import counted, replace_file
from figures.tables import read_json, read_table

VERDICT_FIELDS = ("id", "question", "answer", "estimate", "ci_low", "ci_high", "n_seeds", "unit", "evidence")
PROVENANCE_FIELDS = ("command", "versions", "git_commit", "cpu_capability", "threads", "seeds", "machine")

# What to look for in each figure, in the order of the page: stem, title, caption.
CAPTIONS = (
    (
        "circuit_diff",
        "Where the circuit diffs are",
        "Every component from the embedding (top) to the unembedding (bottom): how large its diff is, whether clean "
        "inputs ever use it, and how much is left after strong decay. Look for large diffs in the blue class, which "
        "clean inputs never touch, and compare their retention with the null law marked on the colour bar.",
    ),
    (
        "activity",
        "Activity on clean against triggered inputs",
        "Dots in the upper left quadrant are diffs that act when the trigger is there and never on clean inputs. "
        "Dots in the left band have no effect at all on 99 % of clean inputs; no tolerance changes their class.",
    ),
    (
        "share",
        "Share of always-inactive diffs against tolerance",
        "A flat stretch means that the answer does not hang on where the line is drawn; a slope means that it does. "
        "The last panels show how far the shares move when the clean inputs are doubled: at the dotted line they "
        "should lie within the shaded band.",
    ),
    (
        "joint",
        "Whole classes of diffs reverted at once",
        "Diffs that are inactive one by one could still back each other up. If reverting all always-inactive diffs "
        "together leaves the KL on 99 % of clean inputs at or below the tolerance, the class is inactive as a "
        "whole. Where ASR falls too, the backdoor needs that class.",
    ),
    (
        "retention",
        "Retention of each class of diffs",
        "The wide band is the null law, what decay alone leaves of a weight that has no gradient. A class on the band "
        "only decays, one below it is overwritten by training, one above it is held up by the loss. Without decay the "
        "null law is flat at 1.",
    ),
    (
        "behaviour",
        "Attack success and clean accuracy along every arm",
        "Look for where ASR falls, and whether it also falls in the arms without decay, where only forgetting can do "
        "it. Where clean accuracy falls as well, the arm has broken the model and not just the backdoor.",
    ),
    (
        "rescue",
        "Lost diffs put back when the backdoor has died",
        "Where putting back one class of lost diffs makes ASR return, losing that class is what silenced the backdoor. "
        "Where it takes all of them, no class did it alone. Grey crosses are the control given the same diffs; grey "
        "strokes are clean accuracy, which says whether the mended model still works.",
    ),
)


@dataclass(frozen=True)
class Picture:
    """A figure as it stands in the page; `source` is a data URI."""

    title: str
    caption: str
    source: str


def write_report(folder: Path) -> Path:
    """Write folder/report.html from the tables, verdicts.json, config.json, provenance.json and the figures on disk.

    Equal files give equal bytes. Nothing in the page is loaded from elsewhere and nothing in it runs.

    Raises:
        ValueError: one line naming the file, and the field or column, that cannot be used.
    """
    path = folder / "verdicts.json"
    verdicts = [_checked(path, entry, VERDICT_FIELDS) for entry in read_json(folder, path.name, list)]
    config = read_json(folder, "config.json", dict)
    provenance = _checked(folder / "provenance.json", read_json(folder, "provenance.json", dict), PROVENANCE_FIELDS)
    gates = read_table(folder, "gates")
    page = render(verdicts, config, provenance, gates, list(_pictures(folder)))
    path = folder / "report.html"
    replace_file(path, page.encode())
    return path


def render(
    verdicts: list[dict[str, Any]],
    config: dict[str, Any],
    provenance: dict[str, Any],
    gates: pd.DataFrame,
    pictures: list[Picture],
) -> str:
    """The page as text; every value is escaped."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"rate": rate, "measure": measure}
    template = environment.from_string(Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8"))
    ordered = gates.sort_values(["seed", "model"], kind="stable")
    rows = [{str(name): value for name, value in row.items()} for row in ordered.to_dict("records")]
    return template.render(
        name=str(config.get("name", "result")),
        groups=grouped(verdicts),
        settings=list(flattened(config)),
        provenance=provenance,
        versions=sorted(provenance["versions"].items()),
        gates=rows,
        failures=[row for row in rows if not row["passed"]],
        pictures=pictures,
        seeds=counted(provenance["seeds"], "seed"),
    )


def grouped(verdicts: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Verdicts whose ids share the part before a slash together, in order of the first of each."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for verdict in verdicts:
        groups.setdefault(str(verdict["id"]).partition("/")[0], []).append(verdict)
    return list(groups.values())


def number(value: Any) -> str:
    """A number in three significant digits (whole numbers in full), a dash where there is none, text as it is."""
    if value is None or (isinstance(value, float) and pd.isna(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e6 else f"{value:.3g}"


def rate(value: float) -> str:
    """A fraction to four decimals, a dash where it was not measured."""
    return "–" if pd.isna(value) else f"{value:.4f}"


def measure(verdict: dict[str, Any]) -> str:
    """Estimate with its interval and unit, as far as there is one, and the seeds it rests on."""
    low, high, seeds = verdict["ci_low"], verdict["ci_high"], counted(verdict["n_seeds"], "seed")
    if verdict["estimate"] is None and low is None and high is None:
        return f"no estimate; {seeds}"
    bounds = "" if low is None and high is None else f" [{number(low)}, {number(high)}]"
    return f"{number(verdict['estimate'])}{bounds} {verdict['unit'] or ''}".rstrip() + f"; {seeds}"


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
    return {True: "true", False: "false", None: "none"}[value] if isinstance(value, bool | None) else str(value)


def _pictures(folder: Path) -> Iterator[Picture]:
    """Figures on disk: the known ones in order, then any others by name."""
    known = {stem: (title, caption) for stem, title, caption in CAPTIONS}
    found = {path.stem: path for path in sorted((folder / "figures").glob("*.svg"))}
    for stem in [*(stem for stem in known if stem in found), *(stem for stem in found if stem not in known)]:
        title, caption = known.get(stem, (stem.replace("_", " "), ""))
        try:
            content = found[stem].read_bytes()
        except OSError as error:
            raise ValueError(f"{found[stem]}: cannot be read ({error.strerror})") from None
        # An image of its own, and not inline: ids inside one figure then cannot clash with those of another.
        yield Picture(title, caption, f"data:image/svg+xml;base64,{base64.b64encode(content).decode()}")


def _checked(path: Path, entry: Any, names: tuple[str, ...]) -> dict[str, Any]:
    missing = [name for name in names if not isinstance(entry, dict) or name not in entry]
    if missing:
        raise ValueError(f"{path}: field {missing[0]!r} is missing")
    if "versions" in names and not isinstance(entry["versions"], dict):
        raise ValueError(f"{path}: field 'versions' must be a mapping")
    return entry
