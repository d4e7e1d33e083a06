"""What the pages say is what the stored verdicts say; and the site they make is whole."""

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from experiments.compared import primary, side_by_side, verdicts_of

ROOT = Path(__file__).parents[1]
BLOCKS = {
    "seeds 32 to 43": ROOT / "docs/default/verdicts.json",
    "seeds 64 to 75": ROOT / "docs/default/verdicts-second-block.json",
}


def test_a_real_model_stands_beside_the_toy_as_it_was_measured():
    sides = {
        "the toy, seeds 32 to 43": BLOCKS["seeds 32 to 43"],
        "SmolLM2-135M, seeds 0 to 2": ROOT / "docs/smollm/verdicts.json",
    }
    listed = {name: primary(verdicts_of(path)) for name, path in sides.items()}
    assert side_by_side(listed, "intervals") in (ROOT / "docs/smollm.md").read_text()


def test_the_primary_family_of_both_blocks_stands_as_it_was_measured():
    table = side_by_side({block: primary(verdicts_of(path)) for block, path in BLOCKS.items()})
    assert table in (ROOT / "docs/findings.md").read_text()


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
