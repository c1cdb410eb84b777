"""`meshbolt explain`: the plan a configuration comes to, and where each of its values is from."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import jsonargparse

from meshbolt.cli.commands import DONE
from meshbolt.cli.deepspeed_plan import OWN_OPTIONS, explain_file, is_deepspeed
from meshbolt.cli.keys import nearest, top_level_keys
from meshbolt.cli.planned import DEFAULT, Row, explain
from meshbolt.cli.python_plan import explain_object, is_python
from meshbolt.cli.sections import Explanation, Section, sections_of_deepspeed
from meshbolt.config.load import Loaded, load
from meshbolt.errors import ConfigError

_FLAGS = ("--json", "--help", "-h")
_PLANNED = ("trainer.strategy", "trainer.devices", "trainer.num_nodes", "trainer.accelerator", "trainer.precision")
_META = "meta"


def run(arguments: Sequence[str]) -> int:
    """Print what configurations come to.

    Args:
        arguments: "explain", then files or a name in Python, overrides such as `--trainer.devices 4`, and flags.

    Raises:
        MeshboltError: the configuration is wrong, or no plan of meshbolt's.
    """
    known, overrides = split_overrides(arguments[1:])
    options = _parser().parse_args(known)
    explanation = _explain(options.config, overrides)
    if options.json:
        sys.stdout.write(json.dumps(explanation.as_data(), indent=2, default=str) + "\n")
    else:
        explanation.show()
    return DONE


def _explain(names: Sequence[str], overrides: Sequence[tuple[str, str]]) -> Explanation:
    """Explain what is named: files for `fit`, or one DeepSpeed file, or one object in Python."""
    alone = next((name for name in names if is_python(name) or is_deepspeed(name)), None)
    if alone is not None and len(names) > 1:
        raise ConfigError(
            f"{alone} is explained by itself, and beside it stands {next(each for each in names if each != alone)}."
        )
    if alone is not None and not is_python(alone):
        return explain_file(alone, load([], overrides=overrides))
    for key, _ in overrides:
        if key.partition(".")[0] in OWN_OPTIONS:
            raise ConfigError(
                f"--{key} is for a DeepSpeed file by itself. Beside a configuration it is an argument of its strategy."
            )
    if alone is not None:
        return explain_object(alone, load([], overrides=overrides))
    loaded = load(names, overrides=overrides)
    explained = explain(loaded)
    sections = [
        Section("plan", "plan", [*explained.rows, _meta(loaded)]),
        Section("given", "also given", _given(loaded)),
    ]
    if explained.translation is None:
        return Explanation(sections)
    of_file = [each for each in sections_of_deepspeed(explained.translation) if each.name != "trainer"]
    return Explanation([*sections, *of_file], explained.translation.receipt)


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
        known_keys = {*top_level_keys(), *OWN_OPTIONS}
        if "." not in key and key.removesuffix("+") not in known_keys:
            options = [flag.lstrip("-") for flag in _FLAGS]
            raise ConfigError(f"--{key} is not an option{nearest(key, [*known_keys, *options])}")
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
        description="Show the plan that a configuration comes to, and where each value is from: the command line wins over "
        "files, later files over earlier ones, and all over defaults. CONFIG is YAML of `meshbolt fit`; or DeepSpeed's JSON, "
        "with a receipt of what becomes of each of its keys; or `file.py:NAME` or `module:NAME`, a Trainer, a dictionary of its "
        "arguments, a strategy, or a function that returns one: the file is imported. How a model is cut into the stages of a "
        "pipeline is shown, and drawn, by `meshbolt verify`.",
        epilog="example: meshbolt explain configs/gpt_zero2.yaml --trainer.devices 8; "
        "meshbolt explain ds_config.json --trainer.devices 8 --deepspeed_version 0.19.8 --auto.optimizer.params.lr 1e-4; "
        "meshbolt explain train.py:trainer",
    )
    parser.add_argument("config", nargs="+", help="YAML file, of which the last one wins; JSON file; or name in Python")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def _given(loaded: Loaded) -> list[Row]:
    """Return what was given beside the plan: values that the Trainer, the model or the data take."""
    others = [key for key in loaded.origins if key != _META and not key.startswith(_PLANNED)]
    return [Row(key, loaded.get(key), loaded.origins[key]) for key in sorted(others)]


def _meta(loaded: Loaded) -> Row:
    """Return whether the model is built without values, which `fit` finds out when it builds it."""
    return Row(_META, loaded.get(_META, "auto"), loaded.origins.get(_META, DEFAULT))
