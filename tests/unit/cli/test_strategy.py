from __future__ import annotations

import pytest

from meshbolt import MeshStrategy
from meshbolt.cli.strategy import check_strategy_name, class_of, is_own_strategy
from meshbolt.errors import ConfigError


@pytest.mark.parametrize("strategy", ["zero0", "ZERO3", "ddp", "auto", "fsdp", MeshStrategy(zero=1)])
def test_names_that_are_registered_and_objects_pass(strategy: object) -> None:
    check_strategy_name(strategy)


@pytest.mark.parametrize(("name", "suggested"), [("zero4", "zero3"), ("zer02", "zero2"), ("dpp", "ddp")])
def test_the_closest_name_is_suggested(name: str, suggested: str) -> None:
    with pytest.raises(ConfigError, match=f"{name!r} is not a strategy.*did you mean {suggested!r}"):
        check_strategy_name(name)


def test_a_name_that_resembles_none_lists_the_presets() -> None:
    with pytest.raises(
        ConfigError,
        match="known: mesh_3d, pipeline_parallel, tensor_parallel, zero0, zero1, zero2, zero2_offload, zero3",
    ):
        check_strategy_name("xyzzy")


def test_a_class_in_the_place_of_a_name_is_told_how_it_is_written() -> None:
    with pytest.raises(ConfigError, match=r"`class_path: my\.Strategy`"):
        check_strategy_name("my.Strategy")


def test_a_class_path_may_name_a_method_that_makes_the_strategy() -> None:
    assert class_of("meshbolt.MeshStrategy.from_deepspeed") is MeshStrategy
    assert is_own_strategy("meshbolt.MeshStrategy")
    assert is_own_strategy("meshbolt.MeshStrategy.from_deepspeed")
    assert not is_own_strategy("lightning.pytorch.strategies.FSDPStrategy")
    assert class_of("meshbolt.no.such.thing") is None
