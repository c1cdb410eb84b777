"""`meshbolt explain`: the plan a configuration comes to, and where each of its values is from."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence

import jsonargparse

from meshbolt.callbacks.console import print_table
from meshbolt.cli.keys import nearest, top_level_keys
from meshbolt.cli.planned import DEFAULT, Row, explain_plan
from meshbolt.config.load import Loaded, load
from meshbolt.errors import ConfigError

_FLAGS = ("--json", "--help", "-h")
_PLANNED = ("trainer.strategy", "trainer.devices", "trainer.num_nodes", "trainer.accelerator", "trainer.precision")
_META = "meta"
_COLUMNS = ("setting", "value", "where from")


def run(arguments: Sequence[str]) -> int:
    """Print the plan that configurations come to.

    Args:
        arguments: "explain", then files, overrides such as `--trainer.devices 4`, and flags.

    Raises:
        MeshboltError: the configuration is wrong, or no plan of meshbolt's.
    """
    known, overrides = split_overrides(arguments[1:])
    options = _parser().parse_args(known)
    loaded = load(options.config, overrides=overrides)
    plan, given = [*explain_plan(loaded), _meta(loaded)], _given(loaded)
    if options.json:
        sys.stdout.write(json.dumps({"plan": _as_json(plan), "given": _as_json(given)}, indent=2) + "\n")
        return 0
    print_table("plan", columns=_COLUMNS, rows=_as_text(plan))
    if given:
        print_table("also given", columns=_COLUMNS, rows=_as_text(given))
    return 0


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Separate overrides of the configuration from what `explain` itself takes.

    Args:
        arguments: an override is `--key value` or `--key=value`.

    Returns:
        The other arguments; and the overrides as keys and values.

    Raises:
        ConfigError: an override has no value, or is none of `fit`.
    """
    known: list[str] = []
    overrides: list[tuple[str, str]] = []
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("--") or argument in _FLAGS:
            known.append(argument)
            continue
        key, equals, value = argument.removeprefix("--").partition("=")
        if "." not in key and key.removesuffix("+") not in top_level_keys():
            options = [flag.lstrip("-") for flag in _FLAGS]
            raise ConfigError(f"--{key} is not an option{nearest(key, [*top_level_keys(), *options])}")
        if not equals:
            value = next(rest, "")
            if not value or value.startswith("--"):
                raise ConfigError(f"--{key} has no value. Write --{key}=VALUE.")
        overrides.append((key, value))
    return known, overrides


def _parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog="meshbolt explain",
        usage="meshbolt explain CONFIG [CONFIG ...] [--KEY VALUE ...] [--json]",
        description="Show the plan that a configuration of `meshbolt fit` comes to, and where each value is from: "
        "the command line wins over files, later files over earlier ones, and all over defaults. How a model is cut into the "
        "stages of a pipeline is shown, and drawn, by `meshbolt verify`.",
        epilog="example: meshbolt explain configs/gpt_zero2.yaml --trainer.devices 8",
    )
    parser.add_argument("config", nargs="+", help="YAML file; the last one wins")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def _given(loaded: Loaded) -> list[Row]:
    """Return what was given beside the plan: values that the Trainer, the model or the data take."""
    others = [key for key in loaded.origins if key != _META and not key.startswith(_PLANNED)]
    return [Row(key, loaded.get(key), loaded.origins[key]) for key in sorted(others)]


def _meta(loaded: Loaded) -> Row:
    """Return whether the model is built without values, which `fit` finds out when it builds it."""
    return Row(_META, loaded.get(_META, "auto"), loaded.origins.get(_META, DEFAULT))


def _as_text(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Return the rows of a table; a mapping takes one for each of its keys."""
    lines: list[tuple[str, str, str]] = []
    for row in rows:
        if isinstance(row.value, Mapping) and row.value:
            (first, *others) = (f"{key}: {_write(value)}" for key, value in row.value.items())
            lines += [(row.key, first, row.origin), *(("", other, "") for other in others)]
        else:
            lines.append((row.key, _write(row.value), row.origin))
    return lines


def _write(value: object) -> str:
    if isinstance(value, list) and all(isinstance(each, dict) and "class_path" in each for each in value):
        return ", ".join(each["class_path"] for each in value)
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _as_json(rows: Sequence[Row]) -> dict[str, dict[str, object]]:
    return {row.key: {"value": row.value, "from": row.origin} for row in rows}
