"""A list of layers is an ordinary module, divided among stages at DeepSpeed's places, with weights drawn as there."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meshbolt import ConfigError, UnsupportedError
from meshbolt.deepspeed import DeepSpeedEngine, PipelineModule
from meshbolt.deepspeed.partition import partition_balanced, partition_uniform
from meshbolt.deepspeed.pipe import (
    LayerSpec,
    PipeDataParallelTopology,
    PipeModelDataParallelTopology,
    ProcessTopology,
    TiedLayerSpec,
)
from meshbolt.deepspeed.runtime import pipe as runtime_pipe
from meshbolt.deepspeed.topology import PipelineParallelGrid


def head(embedding: nn.Module, x: Tensor) -> Tensor:
    return x @ embedding.weight.T


def language() -> list[Any]:
    return [
        TiedLayerSpec("words", nn.Embedding, 9, 4),
        LayerSpec(nn.Linear, 4, 4),
        torch.tanh,
        LayerSpec(nn.Linear, 4, 4, bias=False),
        TiedLayerSpec("words", nn.Embedding, 9, 4, forward_fn=head),
    ]


# Where stages begin -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "parts", "expected"),
    [  # as DeepSpeed 0.19.8 divides them
        ([5, 1, 1, 5], 2, [0, 2, 4]),
        ([88, 256, 0, 256, 256, 16, 88], 2, [0, 4, 7]),
        ([0, 1, 0, 1, 1, 0, 0], 2, [0, 4, 7]),
        ([1, 1, 1, 1, 1], 3, [0, 2, 4, 5]),
        ([10, 1, 1, 1, 1, 1, 10], 3, [0, 1, 6, 7]),
        ([7, 7], 2, [0, 1, 2]),
    ],
)
def test_layers_are_divided_at_the_places_of_deepspeed(weights: list[int], parts: int, expected: list[int]) -> None:
    assert partition_balanced(weights, parts) == expected


def test_a_uniform_division_gives_what_is_left_to_the_first_parts() -> None:
    assert partition_uniform(9, 5) == [0, 2, 4, 6, 8, 9]
    assert partition_uniform(8, 2) == [0, 4, 8]


def test_every_part_has_an_item_and_none_is_lost() -> None:
    draw = random.Random(1)
    for _ in range(200):
        weights = [draw.randint(0, 9) for _ in range(draw.randint(1, 12))]
        count = draw.randint(1, len(weights))
        parts = partition_balanced(weights, count)
        assert parts[0] == 0
        assert parts[-1] == len(weights)
        assert len(parts) == count + 1
        assert all(start < end for start, end in itertools.pairwise(parts))


@pytest.mark.parametrize(
    ("method", "parts"),
    [("uniform", [0, 3, 5]), ("parameters", [0, 3, 5]), ("type:linear", [0, 3, 5]), ("TYPE:Emb|tanh", [0, 4, 5])],
)
def test_a_method_chooses_where_stages_begin(method: str, parts: list[int]) -> None:
    module = PipelineModule(language(), num_stages=2, partition_method=method)
    assert module.partitions() == parts
    assert module.cuts == [str(parts[1])]
    assert [module.stage_owner(index) for index in range(5)] == [int(index >= parts[1]) for index in range(5)]


# The module ---------------------------------------------------------------------------------------------------------------


def test_names_are_those_of_deepspeed_and_tied_layers_have_one() -> None:
    module = PipelineModule(language(), num_stages=2)
    assert list(module.state_dict()) == ["tied_modules.words.weight", "1.weight", "1.bias", "3.weight"]
    assert module.tied_prefixes == {"0.": "tied_modules.words.", "4.": "tied_modules.words."}
    x = torch.tensor([[1, 2, 3]])
    weights = module.state_dict()
    inner = torch.tanh(
        nn.functional.linear(weights["tied_modules.words.weight"][x], weights["1.weight"], weights["1.bias"])
    )
    expected = nn.functional.linear(inner, weights["3.weight"]) @ weights["tied_modules.words.weight"].T
    assert torch.equal(module(x), expected)


def test_a_parameter_is_on_the_stages_that_use_it() -> None:
    plan = PipelineModule(language(), num_stages=2, partition_method="uniform").plan_of_stages()
    assert plan.stages_of == {"tied_modules.words.weight": (0, 1), "1.weight": (0,), "1.bias": (0,), "3.weight": (1,)}
    shared = nn.Linear(4, 4)
    plan = PipelineModule([shared, torch.tanh, shared], num_stages=3).plan_of_stages()
    assert plan.stages_of == dict.fromkeys(("0.weight", "0.bias", "2.weight", "2.bias"), (0, 2))


def test_every_stage_draws_its_weights_from_the_same_random_state() -> None:
    specs = [LayerSpec(nn.Linear, 4, 4) for _ in range(4)]
    torch.manual_seed(3)
    module = PipelineModule(specs, num_stages=2, partition_method="uniform")
    torch.manual_seed(3)
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    after = torch.rand(1)
    for layer, expected in zip(module.layers, (first, second, first, second), strict=True):
        assert torch.equal(layer.weight, expected.weight)
    torch.manual_seed(3)
    PipelineModule(specs, num_stages=2, partition_method="uniform")
    assert torch.equal(torch.rand(1), after)


def test_layers_draw_from_seeds_of_their_own_where_that_is_asked_for() -> None:
    seeds: list[int] = []

    def seed(value: int) -> None:
        seeds.append(value)
        torch.manual_seed(value)

    specs = [LayerSpec(nn.Linear, 4, 4), nn.Dropout(0.5), LayerSpec(nn.Linear, 4, 4)]
    options: dict[str, Any] = {"seed_layers": True, "seed_fn": seed, "base_seed": 10, "partition_method": "uniform"}
    module = PipelineModule(specs, num_stages=1, **options)
    assert seeds == [10, 11, 12]
    torch.manual_seed(12)
    assert torch.equal(module.layers[2].weight, nn.Linear(4, 4).weight)
    for turn in (2, 3):
        seeds.clear()
        module(torch.ones(2, 4))
        assert seeds == [10 * turn, 10 * turn + 1, 10 * turn + 2]


def test_activations_are_computed_again_layer_by_layer_with_the_same_gradients() -> None:
    calls: list[int] = []

    class Counted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            return super().forward(x)

    gradients = []
    for interval in (0, 1, 3):
        torch.manual_seed(1)
        layers = [LayerSpec(Counted, 4, 4), torch.tanh, LayerSpec(Counted, 4, 4)]
        module = PipelineModule(layers, num_stages=1, activation_checkpoint_interval=interval)
        calls.clear()
        module(torch.ones(2, 4, requires_grad=True)).sum().backward()
        assert len(calls) == (4 if interval else 2)
        gradients.append(module.layers[0].weight.grad)
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def test_only_named_classes_compute_activations_again() -> None:
    module = PipelineModule(
        [LayerSpec(nn.Linear, 4, 4), LayerSpec(nn.LayerNorm, 4)],
        num_stages=1,
        activation_checkpoint_interval=1,
        checkpointable_layers=["LayerNorm"],
    )
    assert ["forward" in vars(layer) for layer in module.layers] == [False, True]


# Topologies ---------------------------------------------------------------------------------------------------------------


def test_a_topology_knows_where_ranks_stand() -> None:
    grid = PipeDataParallelTopology(2, 4)
    assert [grid.get_coord(rank) for rank in (0, 3, 6)] == [(0, 0), (0, 3), (1, 2)]
    assert [grid.get_rank(pipe=p, data=d) for p, d in ((0, 0), (0, 3), (1, 2))] == [0, 3, 6]
    assert grid.get_axis_list("data", 1) == [1, 5]
    assert (grid.get_dim("pipe"), grid.get_dim("model"), grid.world_size()) == (2, 0, 8)
    assert PipelineModule(language(), topology=grid).num_stages == 2


# What is refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PipelineModule(language()), "neither num_stages nor a topology"),
        (lambda: PipelineModule(language(), num_stages=0), "num_stages=0"),
        (lambda: PipelineModule(language(), num_stages=6), "5 layers for 6 stages"),
        (
            lambda: PipelineModule(language(), num_stages=2, partition_method="best"),
            "partition_method='best' is unknown",
        ),
        (
            lambda: PipelineModule(language(), num_stages=2, partition_method="type:Conv"),
            "matches no layer; .*Embedding, Linear",
        ),
        (lambda: PipelineModule([3, *language()], num_stages=2), "Layer 0 is 3"),
        (lambda: PipelineModule(language(), num_stages=2, activation_checkpoint_interval=-1), "interval=-1"),
        (lambda: PipelineModule(language(), num_stages=2, checkpointable_layers="Linear"), "list of names"),
        (lambda: LayerSpec(nn.Linear(2, 2)), "Give the class"),
        (lambda: PipelineModule(language(), num_stages=2).stage_owner(5), "there are 5 layers"),
        (lambda: PipelineModule(language(), topology=ProcessTopology(["data"], [2])), "has no stages"),
        (lambda: ProcessTopology(["pipe"], [2, 3]), "each axis a name"),
        (lambda: PipeDataParallelTopology(2, 2).get_coord(4), "4 ranks, numbered from 0"),
        (lambda: PipeDataParallelTopology(2, 2).get_rank(pipe=2, data=0), "'pipe': 2"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PipelineModule([PipelineModule(language(), num_stages=1)], num_stages=1), "PipelineModule itself"),
        (lambda: PipelineModule(language(), topology=PipeModelDataParallelTopology(2, 2, 1)), "autotp_size"),
        (
            lambda: PipelineModule(language(), topology=ProcessTopology(["data", "pipe"], [2, 2])),
            "PipeDataParallelTopology",
        ),
        (lambda: PipelineModule(language(), num_stages=1, activation_checkpoint_func=print), "Leave it out"),
    ],
)
def test_what_is_not_there_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        make()


def test_names_are_where_scripts_import_them_from() -> None:
    assert runtime_pipe.PipelineModule is PipelineModule
    assert runtime_pipe.ProcessTopology is ProcessTopology
    assert issubclass(runtime_pipe.PipelineEngine, DeepSpeedEngine)


def test_a_grid_tells_where_this_rank_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    grid = PipelineParallelGrid(topology=PipeDataParallelTopology(2, 4))
    assert (grid.get_stage_id(), grid.get_data_parallel_id(), grid.is_last_stage) == (1, 1, True)
    assert (grid.stage_to_global(0), grid.stage_to_global(1, data=3)) == (1, 7)
    assert PipelineModule(language(), num_stages=2).mpu().get_data_parallel_world_size() == 4
    with pytest.raises(ConfigError, match=r"num_stages=3\): 8 ranks are no multiple of 3. Use one of \[1, 2, 4, 8\]"):
        PipelineModule(language(), num_stages=3)
