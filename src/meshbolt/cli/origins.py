"""Where the settings of a run of `meshbolt fit` are from, for its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from meshbolt.cli.explain import split_overrides
from meshbolt.cli.planned import explain_plan
from meshbolt.config.load import load
from meshbolt.errors import MeshboltError

_CONFIG = ("--config", "-c")


def origins_of(arguments: Sequence[str]) -> Mapping[str, str]:
    """Return where each setting is from, by its name, as `meshbolt explain` has it.

    Args:
        arguments: of `fit`, from the first one on. What cannot be explained, such as a strategy that is not meshbolt's, has no
            origins: this is for a report, and refuses nothing that `fit` takes.
    """
    configs, others = _without_configs(arguments)
    try:
        _, overrides = split_overrides(others)
        loaded = load(configs, overrides=overrides)
        rows = explain_plan(loaded)
    except (MeshboltError, SystemExit):
        return {}
    given = {key: f"{origin}: {key}" for key, origin in loaded.origins.items() if key.startswith("trainer.")}
    return {**given, **{row.key: row.origin for row in rows}}


def _without_configs(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    configs, others, rest = list[str](), list[str](), iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name in _CONFIG:
            configs.append(value if equals else next(rest, ""))
        else:
            others.append(argument)
    return configs, others
