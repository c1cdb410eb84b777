from __future__ import annotations

import jsonargparse
import pytest

from meshbolt import MeshStrategy
from meshbolt.cli.building import typed_errors
from meshbolt.errors import ConfigError


class Other:
    """A class whose constructor fails with an error of its own."""

    def __init__(self, value: int = 0) -> None:
        raise ValueError(f"{value} on purpose")


def parser(kind: type) -> jsonargparse.ArgumentParser:
    made = jsonargparse.ArgumentParser(exit_on_error=False)
    made.add_argument("--it", type=str | kind)
    return made


def test_an_error_of_meshbolt_comes_out_of_a_union_of_types_as_it_went_in() -> None:
    made = parser(MeshStrategy)
    parsed = made.parse_object({"it": {"class_path": "meshbolt.MeshStrategy", "init_args": {"zero": 9}}})

    with pytest.raises(ConfigError, match="zero=9"), typed_errors(made):
        made.instantiate_classes(parsed)


def test_an_error_of_another_class_is_not_touched() -> None:
    made = parser(Other)
    parsed = made.parse_object({"it": {"class_path": f"{__name__}.Other"}})

    with pytest.raises(ValueError, match="on purpose"), typed_errors(made):
        made.instantiate_classes(parsed)


def test_what_can_be_built_is_built() -> None:
    made = parser(MeshStrategy)
    parsed = made.parse_object({"it": {"class_path": "meshbolt.MeshStrategy", "init_args": {"zero": 1}}})
    with typed_errors(made):
        built = made.instantiate_classes(parsed)["it"]

    assert built.settings.zero.stage == 1


def test_an_error_out_of_a_method_that_makes_a_strategy_comes_out_as_it_went_in() -> None:
    made = parser(MeshStrategy)
    given = {"class_path": "meshbolt.MeshStrategy.from_deepspeed", "init_args": {"config": {"fp61": {}}, "show": False}}
    parsed = made.parse_object({"it": given})

    with pytest.raises(ConfigError, match="did you mean 'fp16'"), typed_errors(made):
        made.instantiate_classes(parsed)
