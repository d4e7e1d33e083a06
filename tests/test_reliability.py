"""The checks themselves can fail: each finds the fault that it is there to find.

CI runs them whole, at small size.
"""

import signal
from pathlib import Path

import pytest

from experiments.check import broken_files, hosts, reliability


def test_damage_that_nobody_notices_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(broken_files, "verify", lambda folder: None)
    monkeypatch.setattr(broken_files, "draw_all", lambda folder: None)
    check = broken_files.damage(tmp_path, small=True)
    assert not check.held and check.measured.startswith("0 of 60")


def test_a_setting_that_is_coerced_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert broken_files.settings(tmp_path, small=True).held
    lenient = broken_files.load_settings("tiny")
    monkeypatch.setattr(broken_files, "load_settings", lambda path: lenient)
    assert not broken_files.settings(tmp_path, small=True).held


def test_a_run_that_does_not_resume_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert reliability.resume(tmp_path / "sound", small=True).held
    files = iter(range(99))
    monkeypatch.setattr(reliability, "read_json", lambda path: {"files": next(files)})
    assert not reliability.resume(tmp_path / "other bytes each time", small=True).held


@pytest.mark.slow
def test_a_stop_that_says_nothing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hosts, "STOP", signal.SIGKILL)
    check = hosts.stop(tmp_path, small=True)
    assert not check.held and check.measured == "0 of 1 told and clean, hashes equal"


@pytest.mark.slow
def test_a_disk_that_refuses_our_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    refusing = hosts.NFS.replace("if mode ==", "if mode != -1 or mode ==")
    monkeypatch.setattr(hosts, "NFS", refusing)
    check = hosts.nfs(tmp_path, small=True)
    assert not check.held and "DIFFER" in check.measured and "not status" in check.measured


def test_an_unknown_check_is_one_line():
    with pytest.raises(ValueError, match="no check 'speed'"):
        list(reliability.checks(["speed"], small=True))
