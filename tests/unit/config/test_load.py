from __future__ import annotations

from pathlib import Path

import pytest

from meshbolt.config.load import COMMAND_LINE, load
from meshbolt.errors import ConfigError

BASE = """
trainer:
  devices: 2
  max_steps: 60
  val_check_interval: ${trainer.max_steps}
  callbacks: [one]
  strategy:
    class_path: meshbolt.MeshStrategy
    init_args:
      zero: {stage: 2, replicate: 1}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "more.yaml"
    path.write_text(text)
    return path


def test_every_value_is_traced_to_its_file(base: Path) -> None:
    loaded = load([base])

    assert loaded.get("trainer.strategy.init_args.zero.stage") == 2
    assert loaded.origins["trainer.strategy.init_args.zero.stage"] == str(base)
    assert set(loaded.origins.values()) == {str(base)}
    assert loaded.get("trainer.none", "fallback") == "fallback"


def test_later_files_win_and_overrides_win_over_all(base: Path, tmp_path: Path) -> None:
    more = write(tmp_path, "trainer: {devices: 4, max_steps: 10}")
    loaded = load([base, more], overrides=[("trainer.max_steps", "5")])

    assert (loaded.get("trainer.devices"), loaded.get("trainer.max_steps")) == (4, 5)
    assert loaded.origins["trainer.devices"] == str(more)
    assert loaded.origins["trainer.max_steps"] == COMMAND_LINE
    assert loaded.origins["trainer.callbacks"] == str(base)


def test_references_are_resolved_after_everything_is_merged(base: Path) -> None:
    loaded = load([base], overrides=[("trainer.max_steps", "7")])

    assert loaded.get("trainer.val_check_interval") == 7
    assert loaded.origins["trainer.val_check_interval"] == str(base)


def test_a_value_that_replaces_a_mapping_takes_the_place_of_all_origins_below(base: Path, tmp_path: Path) -> None:
    loaded = load([base, write(tmp_path, "trainer: {strategy: zero3}")])

    assert loaded.get("trainer.strategy") == "zero3"
    assert [key for key in loaded.origins if key.startswith("trainer.strategy")] == ["trainer.strategy"]


def test_a_mapping_that_replaces_a_value_takes_the_place_of_its_origin(base: Path) -> None:
    loaded = load([base], overrides=[("trainer.strategy", "zero3"), ("trainer.strategy", "{class_path: x.Y}")])

    assert loaded.get("trainer.strategy") == {"class_path": "x.Y"}
    assert "trainer.strategy" not in loaded.origins
    assert loaded.origins["trainer.strategy.class_path"] == COMMAND_LINE


def test_init_args_may_be_left_out_of_an_override(base: Path) -> None:
    loaded = load([base], overrides=[("trainer.strategy.zero.stage", "1"), ("trainer.strategy.recompute", "full")])

    assert loaded.get("trainer.strategy.init_args.zero") == {"stage": 1, "replicate": 1}
    assert loaded.get("trainer.strategy.init_args.recompute") == "full"
    assert loaded.origins["trainer.strategy.init_args.zero.stage"] == COMMAND_LINE


def test_a_class_given_as_a_string_takes_arguments(base: Path) -> None:
    overrides = [("trainer.strategy", "meshbolt.MeshStrategy"), ("trainer.strategy.zero", "3")]
    loaded = load([base], overrides=overrides)

    assert loaded.get("trainer.strategy") == {"class_path": "meshbolt.MeshStrategy", "init_args": {"zero": 3}}


def test_a_name_takes_no_arguments_and_the_way_out_is_said(base: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.strategy is 'zero2', a name.*class_path"):
        load([base], overrides=[("trainer.strategy", "zero2"), ("trainer.strategy.zero", "3")])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("two", ["one", "two"]),
        ("[two, three]", ["one", "two", "three"]),
        ("{class_path: a}", ["one", {"class_path": "a"}]),
    ],
)
def test_a_key_that_ends_in_plus_appends(base: Path, text: str, expected: list[object]) -> None:
    assert load([base], overrides=[("trainer.callbacks+", text)]).get("trainer.callbacks") == expected


def test_appending_to_nothing_makes_a_list(base: Path) -> None:
    assert load([base], overrides=[("trainer.plugins+", "one")]).get("trainer.plugins") == ["one"]


@pytest.mark.parametrize(
    ("text", "expected"), [("3", 3), ("1e-3", 1e-3), ("null", None), ("[1, 2]", [1, 2]), ("'3'", "3"), ("a:b", "a:b")]
)
def test_overrides_are_read_as_yaml(base: Path, text: str, expected: object) -> None:
    assert load([base], overrides=[("x.y", text)]).get("x.y", "nothing") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1,", "not valid YAML"),
        ("- a\n- b", "holds a list"),
        ("a: ${nowhere}", "nowhere"),
        ("a: 1\na: 2", "not valid YAML"),
    ],
)
def test_a_file_that_means_nothing_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load([write(tmp_path, text)])


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load([tmp_path / "absent.yaml"])


def test_an_override_that_is_not_yaml_is_refused_by_name(base: Path) -> None:
    with pytest.raises(ConfigError, match=r"--trainer\.devices=\[1,"):
        load([base], overrides=[("trainer.devices", "[1,")])
