"""What DeepSpeed has cut is put together as it was, to the last bit: files are made by `tests.deepspeed_fixtures`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.deepspeed_fixtures import (
    Trained,
    deepspeeds_classes,
    trained,
    write,
    write_pipeline,
    write_plain,
    write_rows,
    write_shards,
    write_universal,
)

from meshbolt.checkpoint.deepspeed import DeepSpeedCheckpoint, is_deepspeed, open_deepspeed

# Sizes that no number of ranks divides, fewer elements than ranks, one without elements in between, two groups.
ODD = [
    {"embedding.weight": (11, 7), "net.weight": (5, 3), "net.scale": (1,)},
    {"net.bias": (5,), "head.bias": (13,), "point": ()},
]


def run(**options: Any) -> Trained:
    """Return a run with frozen, tied and buffered tensors."""
    return trained(
        ODD,
        **{
            "frozen": {"old.weight": torch.randn(3, 5), "old.bias": torch.randn(3)},
            "buffers": {
                "norm.running_mean": torch.randn(7, dtype=torch.float64),
                "norm.num_batches_tracked": torch.tensor(12),
                "mask": torch.tensor([True, False, True]),
                "table": torch.randn(3, dtype=torch.bfloat16),
            },
            "tied": {"head.weight": "embedding.weight"},
            "client": {"epoch_of_mine": 4},
            **options,
        },
    )


def values(tensors: Any) -> dict[str, torch.Tensor]:
    """Return lazy tensors, read."""
    return {name: tensor.value() if hasattr(tensor, "value") else tensor for name, tensor in tensors.items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Check that two groups of tensors are the same, dtypes and shapes too."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert torch.equal(found[name], value), name


def assert_holds(opened: DeepSpeedCheckpoint, expected: Trained, *, groups: list[list[str]] | None = None) -> None:
    """Check weights, moments, count of steps and settings."""
    assert_same(values(opened.weights), expected.weights())
    assert opened.optimizer is not None
    state = opened.optimizer["state"]
    if not expected.step:
        assert not any(state.values())
        return
    for key, moments in expected.moments.items():
        assert_same(values({name: kept[key] for name, kept in state.items()}), moments)
    assert {float(kept["step"]) for kept in state.values()} == {float(expected.step)}
    named = groups or [list(group) for group in expected.groups]
    assert [group["params"] for group in opened.optimizer["param_groups"]] == named
    assert [group["lr"] for group in opened.optimizer["param_groups"]] == [0.1 / (1 + i) for i in range(len(named))]


WRITERS: dict[str, Callable[[Path, Trained], Path]] = {
    "stage 1": lambda root, run: write_rows(root, run, stage=1),
    "stage 2": lambda root, run: write_rows(root, run, stage=2),
    "stage 2 aligned": lambda root, run: write_rows(root, run, stage=2, align=8),
    "stage 2 in torch's old files": lambda root, run: write_rows(root, run, stage=2, old=True),
    "the optimizer for bfloat16": lambda root, run: write_rows(root, run, stage=1, bf16=True),
    "stage 3": write_shards,
    "stage 3 in pieces": lambda root, run: write_shards(root, run, pieces=5),
    "stage 3 in torch's old files": lambda root, run: write_shards(root, run, old=True),
    "master weights in one tensor": lambda root, run: write_plain(root, run, kind="flat"),
    "master weights in many": lambda root, run: write_plain(root, run, kind="each"),
    "universal of stage 2": lambda root, run: write_universal(root, run, stage=2),
    "universal of stage 3": lambda root, run: write_universal(root, run, stage=3),
}


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", WRITERS)
def test_every_layout_is_read_as_it_was_cut(kind: str, world: int, tmp_path: Path) -> None:
    expected = run(world=world)
    WRITERS[kind](tmp_path, expected)
    opened = open_deepspeed(tmp_path)
    assert_holds(opened, expected)
    assert opened.world == world
    assert opened.client_state == {"epoch_of_mine": 4}
    assert (opened.global_steps, opened.global_samples, opened.skipped_steps) == (10, 40, 1)
    assert opened.scheduler == {"last_epoch": 7}
    assert opened.ds_version == "0.19.8"


@pytest.mark.parametrize("kind", [kind for kind in WRITERS if "universal" not in kind])
def test_a_save_before_the_first_step_has_no_state(kind: str, tmp_path: Path) -> None:
    expected = run(step=0)
    WRITERS[kind](tmp_path, expected)
    assert_holds(open_deepspeed(tmp_path), expected)


SHAPES = st.lists(
    st.lists(st.lists(st.integers(1, 6), max_size=3).map(tuple), min_size=1, max_size=4), min_size=1, max_size=3
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=SHAPES, world=st.integers(1, 6), pieces=st.integers(0, 9), align=st.sampled_from([0, 4, 8]), data=st.data()
)
def test_any_shapes_on_any_number_of_ranks_come_back(
    shapes: list[list[tuple[int, ...]]], world: int, pieces: int, align: int, data: st.DataObject, tmp_path_factory: Any
) -> None:
    named = [{f"g{i}.p{j}": shape for j, shape in enumerate(group)} for i, group in enumerate(shapes)]
    frozen = {"frozen": torch.randn(data.draw(st.integers(1, 5)), 3)}
    expected = trained(named, world=world, frozen=frozen)
    path = tmp_path_factory.mktemp("any")
    if data.draw(st.booleans()):
        write_shards(path, expected, pieces=pieces)
    else:
        write_rows(path, expected, stage=data.draw(st.sampled_from([1, 2])), align=align)
    assert_holds(open_deepspeed(path), expected)


def test_weights_stay_in_sixteen_bits_where_there_are_no_others(tmp_path: Path) -> None:
    expected = run()
    write_plain(tmp_path, expected, kind="none")
    opened = open_deepspeed(tmp_path)
    assert opened.optimizer is None
    assert_same(values(opened.weights), expected.weights(is_narrow=True))


def test_torchs_own_state_keeps_its_numbers(tmp_path: Path) -> None:
    expected = run(dtype=torch.float32)
    write_plain(tmp_path, expected, kind="torch")
    opened = open_deepspeed(tmp_path)
    assert opened.kind == "plain"
    assert opened.optimizer is not None
    assert_same(values(opened.weights), expected.weights(is_narrow=True))
    assert [group["params"] for group in opened.optimizer["param_groups"]] == [[0, 1, 2], [3, 4, 5]]
    moments = list(expected.moments["exp_avg"].values())
    assert all(torch.equal(opened.optimizer["state"][number]["exp_avg"], moments[number]) for number in range(6))


@pytest.mark.parametrize("kind", ["flat", "each"])
def test_master_weights_are_told_apart_by_their_values_in_any_order(kind: str, tmp_path: Path) -> None:
    shapes = [{"b": (4,), "a": (4,)}, {"d": (2, 2), "c": (4,), "e": (3,)}]
    expected = trained(shapes)
    for name in ("b", "e"):  # what begins alike is told apart by what follows
        expected.masters[name].zero_()
    place = write_plain(tmp_path, expected, kind=kind)
    file = place / "mp_rank_00_model_states.pt"
    content = torch.load(file)
    content["module"] = {name: content["module"][name] for name in "ecadb"}
    torch.save(content, file)
    assert_holds(open_deepspeed(tmp_path), expected)


def test_what_has_not_been_stepped_has_no_state_and_the_rest_keeps_its_own(tmp_path: Path) -> None:
    expected = run(world=3)
    place = write_shards(tmp_path, expected, pieces=9)
    for file in place.glob("*_optim_states.pt"):
        with deepspeeds_classes():
            content = torch.load(file, weights_only=False)
        content["optimizer_state_dict"]["optimizer_state_dict"]["state"].pop(
            1
        )  # elements 9 to 17 of each rank's first row
        write(file, content)
    opened = open_deepspeed(tmp_path)
    assert opened.optimizer is not None
    state = opened.optimizer["state"]
    assert "exp_avg" not in state.get("embedding.weight", {})
    kept = {name: values["exp_avg"] for name, values in state.items() if "exp_avg" in values}
    assert_same(
        values(kept), {name: each for name, each in expected.moments["exp_avg"].items() if name != "embedding.weight"}
    )


def test_frozen_weights_of_stage_1_are_there(tmp_path: Path) -> None:
    expected = run()
    write_rows(tmp_path, expected, stage=1)
    assert {"old.weight", "old.bias"} <= open_deepspeed(tmp_path).weights.keys()


def test_weights_that_are_tied_are_told_by_the_memory_that_they_share(tmp_path: Path) -> None:
    expected = run()
    write_rows(tmp_path, expected, stage=1)
    file = tmp_path / "global_step10" / "mp_rank_00_model_states.pt"
    content = torch.load(file)
    del content["shared_params"]
    torch.save(content, file)
    assert_holds(open_deepspeed(tmp_path), expected)


def test_the_loss_scale_goes_on_where_it_was(tmp_path: Path) -> None:
    write_shards(tmp_path, run(loss_scale=512.0))
    scaler = open_deepspeed(tmp_path).loss_scaler
    assert scaler is not None
    assert (scaler.scale, scaler.iteration, scaler.window, scaler.hysteresis_left) == (512.0, 9, 100, 1)
    # Step 4 overflowed, steps 5 to 8 did not; the first of these does not count.
    assert scaler.as_state()["_growth_tracker"] == 3


def test_elastic_saves_are_read(tmp_path: Path) -> None:
    expected = run()
    write_rows(tmp_path, expected, stage=2, elastic=True)
    opened = open_deepspeed(tmp_path)
    assert_same(values(opened.weights), expected.weights())
    assert opened.optimizer is not None
    state = opened.optimizer["state"]
    assert_same(values({name: kept["exp_avg"] for name, kept in state.items()}), expected.moments["exp_avg"])
    assert float(state["net.bias"]["step"]) == 3.0


def stages(**options: Any) -> list[Trained]:
    """Return two stages of a pipeline that share a layer."""
    first = trained([{"tied_modules.words.weight": (6, 4), "1.weight": (4, 4)}, {"1.bias": (4,)}], **options)
    second = trained([{"tied_modules.words.weight": (6, 4), "3.weight": (2, 4)}, {"3.bias": (2,)}], **options)
    second.groups[0]["tied_modules.words.weight"] = first.groups[0]["tied_modules.words.weight"]
    for key in second.moments:
        second.moments[key]["tied_modules.words.weight"] = first.moments[key]["tied_modules.words.weight"]
    return [first, second]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_pipeline_is_read_under_the_names_of_its_module(world: int, tmp_path: Path) -> None:
    first, second = stages(world=world, buffers={"1.count": torch.tensor(5)})
    second.buffers = {"3.count": torch.tensor(6)}
    write_pipeline(tmp_path, [first, second], {0: "tied_modules.words.", 1: "1.", 3: "3.", 4: "tied_modules.words."})
    opened = open_deepspeed(tmp_path)
    assert (opened.kind, opened.stage) == ("pipeline", 1)
    assert_same(values(opened.weights), {**first.weights(), **second.weights()})
    assert opened.optimizer is not None
    state = opened.optimizer["state"]
    moments = {**first.moments["exp_avg_sq"], **second.moments["exp_avg_sq"]}
    assert_same(values({name: kept["exp_avg_sq"] for name, kept in state.items()}), moments)
    assert [group["params"] for group in opened.optimizer["param_groups"]] == [
        ["tied_modules.words.weight", "1.weight", "3.weight"],
        ["1.bias", "3.bias"],
    ]


@pytest.mark.parametrize("again", [False, True])
def test_without_zero_a_tied_layer_has_the_number_of_its_first_use(again: bool, tmp_path: Path) -> None:
    both = [
        trained([{"0.weight": (6, 4), "1.weight": (4, 4)}, {"1.bias": (4,)}], dtype=torch.float32),
        trained([{"0.weight": (6, 4), "3.weight": (2, 4)}, {"3.bias": (2,)}], dtype=torch.float32),
    ]
    both[1].groups[0]["0.weight"] = both[0].groups[0]["0.weight"]
    for key in both[1].moments:
        both[1].moments[key]["0.weight"] = both[0].moments[key]["0.weight"]
    layers = {0: "0.", 1: "1.", 3: "3.", **({4: "0."} if again else {})}
    write_pipeline(tmp_path, both, layers, zero=False)
    opened = open_deepspeed(tmp_path)
    assert opened.optimizer is not None
    assert [group["params"] for group in opened.optimizer["param_groups"]] == [
        ["0.weight", "1.weight", "3.weight"],
        ["1.bias", "3.bias"],
    ]
    assert torch.equal(opened.optimizer["state"]["0.weight"]["exp_avg"], both[0].moments["exp_avg"]["0.weight"])
    assert "without ZeRO no file has its key" in opened.notes[0]
    assert ("4.weight" in opened.weights) == again


def test_a_frozen_layer_that_looks_like_a_tied_one_keeps_its_number(tmp_path: Path) -> None:
    first, second = stages()
    first.frozen = {"2.weight": torch.randn(6, 4)}
    write_pipeline(
        tmp_path, [first, second], {0: "tied_modules.words.", 1: "1.", 2: "2.", 3: "3.", 4: "tied_modules.words."}
    )
    opened = open_deepspeed(tmp_path)
    assert_same(values(opened.weights), {**first.weights(), **second.weights()})
    assert opened.notes == ()


@pytest.mark.parametrize("counts", [False, True])
def test_of_tied_layers_that_are_alike_only_what_is_not_trained_is_unclear(counts: bool, tmp_path: Path) -> None:
    shapes = [{"tied_modules.one.weight": (3, 3), "tied_modules.two.weight": (3, 3), "2.weight": (2, 3)}]
    both = [trained(shapes), trained([{"3.weight": (3, 2)}])]
    if counts:
        both[0].frozen = {f"tied_modules.{key}.count": torch.ones(1) for key in ("one", "two")}
    write_pipeline(tmp_path, both, {0: "tied_modules.one.", 1: "tied_modules.two.", 2: "2.", 3: "3."})
    opened = open_deepspeed(tmp_path)
    trained_ones = {"tied_modules.one.weight", "tied_modules.two.weight", "2.weight", "3.weight"}
    assert opened.weights.keys() == (trained_ones | {"0.count", "1.count"} if counts else trained_ones)
    assert bool(opened.notes) == counts
    assert not counts or "Layers [0, 1] are tied ones, and no file tells which" in opened.notes[0]


def test_a_pipeline_without_zero_is_read_in_the_order_of_its_layers(tmp_path: Path) -> None:
    both = [
        trained([{"0.weight": (6, 4), "1.weight": (4, 4)}, {"1.bias": (4,)}], dtype=torch.float32),
        trained([{"2.weight": (5, 4), "3.weight": (2, 5)}, {"3.bias": (2,)}], dtype=torch.float32),
    ]
    write_pipeline(tmp_path, both, {number: f"{number}." for number in range(4)}, zero=False)
    opened = open_deepspeed(tmp_path)
    assert_same(values(opened.weights), {**both[0].weights(), **both[1].weights()})
    assert opened.optimizer is not None
    moments = {**both[0].moments["exp_avg"], **both[1].moments["exp_avg"]}
    assert_same({name: kept["exp_avg"] for name, kept in opened.optimizer["state"].items()}, moments)
    names = [group["params"] for group in opened.optimizer["param_groups"]]
    assert names == [["0.weight", "1.weight", "2.weight", "3.weight"], ["1.bias", "3.bias"]]


@pytest.mark.parametrize(("version", "prefix"), [("2.6.0", "_forward_module."), ("1.6.5", "module."), ("2.6.0", "")])
def test_what_lightning_puts_before_names_is_taken_away(version: str, prefix: str, tmp_path: Path) -> None:
    plain = run()
    lightnings = {"pytorch-lightning_version": version, "epoch": 2, "global_step": 10, "lr_schedulers": [], "loops": {}}
    wrapped = Trained(
        groups=[{f"{prefix}{name}": value for name, value in group.items()} for group in plain.groups],
        client=lightnings,
    )
    write_shards(tmp_path, wrapped, tag="checkpoint")
    opened = open_deepspeed(tmp_path)
    assert opened.is_lightnings
    assert opened.weights.keys() == plain.masters.keys()
    tree = opened.as_lightning()
    assert tree["epoch"] == 2
    assert tree["optimizer_states"][0]["param_groups"][0]["params"] == list(plain.groups[0])


def test_a_module_that_is_called_module_keeps_its_name(tmp_path: Path) -> None:
    wrapped = trained([{"module.weight": (2, 2)}], client={"pytorch-lightning_version": "2.6.0"})
    write_rows(tmp_path, wrapped)
    assert list(open_deepspeed(tmp_path).weights) == ["module.weight"]


@pytest.mark.parametrize("stage", [1, 3])
def test_what_modules_keep_beside_tensors_stays_as_it_is(stage: int, tmp_path: Path) -> None:
    expected = run()
    place = write_shards(tmp_path, expected) if stage == 3 else write_rows(tmp_path, expected, stage=stage)
    for file in place.glob("*model_states.pt"):
        content = torch.load(file)
        content["module"]["net._extra_state"] = {"version": 2}
        torch.save(content, file)
    opened = open_deepspeed(tmp_path)
    assert dict(opened.weights).pop("net._extra_state") == {"version": 2}
    assert_same(values({k: v for k, v in opened.weights.items() if "_extra" not in k}), expected.weights())


@pytest.mark.parametrize("stage", [2, 3])
def test_a_save_without_frozen_weights_is_read_without_them(stage: int, tmp_path: Path) -> None:
    expected = run()
    place = write_shards(tmp_path, expected) if stage == 3 else write_rows(tmp_path, expected, stage=stage)
    for file in place.glob("*model_states.pt"):
        content = torch.load(file)
        content |= {"frozen_param_shapes": None, "frozen_param_fragments": None}
        content["module"] = {k: v for k, v in content["module"].items() if not k.startswith("old.")}
        torch.save(content, file)
    expected.frozen = {}
    assert_holds(open_deepspeed(tmp_path), expected)


def test_files_of_early_releases_are_found_by_their_names(tmp_path: Path) -> None:
    expected = run()
    place = write_rows(tmp_path, expected)
    for file in place.glob("*_optim_states.pt"):
        file.rename(file.with_name(file.name.replace("_optim_states", "optim_states")))
    assert_holds(open_deepspeed(tmp_path), expected)


def test_the_save_is_found_from_its_own_directory_and_from_the_one_above(tmp_path: Path) -> None:
    write_rows(tmp_path, run(), tag="one")
    write_rows(tmp_path, trained([{"other": (2,)}]), tag="two")
    assert is_deepspeed(tmp_path)
    assert open_deepspeed(tmp_path).tag == "two"
    assert open_deepspeed(tmp_path, "one").tag == open_deepspeed(tmp_path / "one").tag == "one"
    (tmp_path / "empty").mkdir()
    assert not is_deepspeed(tmp_path / "empty")


def test_a_part_of_a_tensor_is_read_without_the_rest(tmp_path: Path) -> None:
    expected = run(world=3)
    write_shards(tmp_path, expected, pieces=4)
    lazy: Any = open_deepspeed(tmp_path).weights["embedding.weight"]
    rows = expected.groups[0]["embedding.weight"][4:9]
    assert torch.equal(torch.cat([each.clone() for each in lazy.runs(28, 63)]), rows.flatten())
    assert torch.equal(lazy.part((slice(4, 9), slice(0, 7))).value(), rows)


def test_round_robin_groups_come_in_the_order_of_the_model(tmp_path: Path) -> None:
    expected = trained([{"a": (3,), "c": (4,), "b": (5,), "d": (6,)}])
    place = write_rows(tmp_path, expected, stage=2)
    file = place / "mp_rank_00_model_states.pt"
    content = torch.load(file)
    content["ds_config"]["zero_optimization"] = {"round_robin_gradients": True}
    content["module"] = {name: content["module"][name] for name in "abcd"}
    torch.save(content, file)
    assert_holds(open_deepspeed(tmp_path), expected, groups=[["a", "b", "c", "d"]])
