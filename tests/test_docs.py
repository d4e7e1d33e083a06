"""What the pages say is what the stored verdicts say."""

import re
from pathlib import Path

import pytest

from experiments.compared import primary, side_by_side, verdicts_of
from experiments.findings import (
    BLOCKS,
    PAGES,
    REAL_MODEL,
    TEMPLATES,
    estimate,
    interval,
    less,
    one,
    pages,
    said,
)

ROOT = Path(__file__).parents[1]
# Numbers that a page may hold by itself: settings, and criteria that were fixed before the numbers.
SETTINGS = {
    "2", "12", "24",  # blocks and their seeds
    "32", "43", "64", "75",  # the first and the last seed of a block
    "400",  # steps of an arm
    "1e-4", "1e-3", "2e-4", "3e-4",  # learning rates, and a decay a step
    "0.39",  # exposure at the end of an arm
    "99", "0.001", "0.01", "0.95",  # lines of inactive, of joint sets, of the backdoor set
    "0.02", "0.05", "95",  # bound of a share, level of a test, of an interval
    "1",  # a temperature; the effective exposure of an unused weight
    "2026",  # the year of the first version
}  # fmt: skip


def written_numbers(template: str) -> list[str]:
    """Numbers in its prose: not rendered, and in no code, heading, table, list mark or address."""
    prose = template
    for aside in (
        r"\{[{%].*?[}%]\}", r"```.*?```", r"`[^`]*`", r"\]\([^)]*\)",
        r"^(?:#|\||!\[).*?$", r"^\d+\. ", r"SmolLM2-135M", r"bfloat16|float32",
    ):  # fmt: skip
        prose = re.sub(aside, " ", prose, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"\d*\.?\d+(?:e-?\d+)?", prose)


@pytest.mark.parametrize("template", sorted(TEMPLATES.glob("*.md")), ids=lambda path: path.name)
def test_no_page_of_findings_holds_a_number_by_hand(template: Path):
    assert not {*written_numbers(template.read_text())} - SETTINGS


def test_a_number_by_hand_would_be_seen():
    text = "# 7\n{{ 0.91 }} takes 13.5 nats, p .03, at `0.5` of [it](a1.md), 3 times.\n| 9 |\n"
    assert written_numbers(text) == ["13.5", ".03", "3"]


def test_pages_of_findings_are_what_their_templates_give():
    rendered = pages()
    assert {path: path.read_text() for path in rendered} == rendered
    by_hand = {path.name for path in PAGES.glob("*.md")} - {path.name for path in rendered}
    assert by_hand == {"sweeps.md"}


def test_a_page_writes_a_verdict_as_it_was_measured():
    listed = [verdicts_of(path) for path in BLOCKS.values()]
    asked = [one(block, "primary_masked") for block in listed]
    assert interval(asked) == "0.91 (0.90 to 0.93) and 0.91 (0.90 to 0.92)"
    assert estimate(less(asked), 1) == "-0.9 and -0.9"
    assert said(asked, "twin _, base") == "57.5 and 57.5"
    with pytest.raises(ValueError, match="has no 'a goat of _'"):
        said(asked, "a goat of _")
    with pytest.raises(ValueError, match="margin_lost, None: 11 verdicts"):
        one(listed[0], "margin_lost")


def test_a_real_model_stands_beside_the_toy_as_it_was_measured():
    sides = {
        "the toy, seeds 32 to 43": BLOCKS["seeds 32 to 43"],
        "SmolLM2-135M, seeds 0 to 2": REAL_MODEL,
    }
    listed = {name: primary(verdicts_of(path)) for name, path in sides.items()}
    assert side_by_side(listed, "intervals") in (ROOT / "docs/smollm.md").read_text()


def test_the_primary_family_of_both_blocks_stands_as_it_was_measured():
    table = side_by_side({block: primary(verdicts_of(path)) for block, path in BLOCKS.items()})
    assert table in (PAGES / "README.md").read_text()
