"""Merge YAML files and overrides, and remember where each value came from.

Later files win over earlier ones, and overrides over files. `${...}` is resolved when everything is merged, so that it
sees overrides too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from meshbolt.errors import ConfigError

COMMAND_LINE = "command line"
_CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """Values as the user gave them, and where each came from.

    Attributes:
        values: nested, with every `${...}` resolved.
        origins: by dotted key, the file that a value is from, or "command line"; a list counts as one value.
    """

    values: Mapping[str, Any]
    origins: Mapping[str, str]

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value under a dotted key.

        Args:
            key: such as "trainer.devices".
            default: returned where nothing was given.
        """
        value: Any = self.values
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return default
            value = value[part]
        return value


def load(paths: Iterable[str | Path], *, overrides: Sequence[tuple[str, str]] = ()) -> Loaded:
    """Merge configuration files and overrides.

    Args:
        paths: YAML files, the one that wins last.
        overrides: dotted keys and their values as YAML, the one that wins last. As on the command line of `fit`, an
            argument of a class may be named without `init_args` in between; a key that ends in `+` appends to a list.

    Raises:
        ConfigError: a file cannot be read or is no mapping, or a value refers to another that does not exist.
    """
    merged = OmegaConf.create()
    origins: dict[str, str] = {}
    for path in paths:
        merged = _merge(merged, _read(Path(path)), origins, origin=str(path))
    for key, text in overrides:
        merged = _merge(merged, _override(merged, key, text), origins, origin=COMMAND_LINE)
    return Loaded(values=_resolve(merged), origins=origins)


def _read(path: Path) -> DictConfig:
    try:
        content = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The configuration {path} cannot be read: {error}. Give the path of a YAML file.") from error
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(
            f"The configuration {path} is not valid YAML: {_one_line(error)}. Correct it there."
        ) from error
    if not isinstance(content, DictConfig):
        raise ConfigError(
            f"The configuration {path} holds a list at its top; it needs keys with values, such as `trainer:`."
        )
    return content


def _merge(into: DictConfig, layer: DictConfig, origins: dict[str, str], *, origin: str) -> DictConfig:
    for key in _leaves(OmegaConf.to_container(layer)):
        for other in list(origins):
            if f"{other}.".startswith(f"{key}.") or f"{key}.".startswith(f"{other}."):
                del origins[other]
        origins[key] = origin
    merged = OmegaConf.merge(into, layer)
    if not isinstance(merged, DictConfig):
        raise AssertionError(f"Merging two mappings gave {type(merged).__name__}.")
    return merged


def _leaves(value: Any, prefix: str = "") -> Iterator[str]:
    if not isinstance(value, Mapping) or (prefix and not value):
        yield prefix
        return
    for key, below in value.items():
        yield from _leaves(below, f"{prefix}.{key}" if prefix else str(key))


def _override(merged: DictConfig, key: str, text: str) -> DictConfig:
    """Return an override as a layer that fits onto what is merged so far."""
    path, classes = _full_path(OmegaConf.to_container(merged), key)
    name = ".".join(path).removesuffix("+")
    try:
        layer = OmegaConf.from_dotlist([*classes, f"{name}={text}"])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"--{key}={text} is not valid YAML: {_one_line(error)}. Quote the value.") from error
    if key.endswith("+"):
        before, item = OmegaConf.select(merged, name), OmegaConf.select(layer, name)
        OmegaConf.update(
            layer, name, [*(before or []), *(item if isinstance(item, ListConfig) else [item])], merge=False
        )
    return layer


def _full_path(values: Any, key: str) -> tuple[list[str], list[str]]:
    """Write out a dotted key that may leave out the `init_args` between a class and its arguments.

    Returns:
        The parts of the full key; and an override for each class that stood there as a plain string.
    """
    path: list[str] = []
    classes: list[str] = []
    for part in key.split("."):
        if isinstance(values, str):
            if "." not in values:
                raise ConfigError(
                    f"--{key}: {'.'.join(path)} is {values!r}, a name, which takes no arguments. Write the class "
                    f"instead: `class_path: ...` and `init_args:` below `{path[-1]}:`."
                )
            classes.append(f"{'.'.join(path)}.class_path={values}")
            values = {"class_path": values}
        is_class = isinstance(values, Mapping) and "class_path" in values
        for step in ["init_args", part] if is_class and part not in _CLASS_KEYS else [part]:
            values = values.get(step) if isinstance(values, Mapping) else None
            path.append(step)
    return path, classes


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _resolve(merged: DictConfig) -> Mapping[str, Any]:
    try:
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"A value refers to another that cannot be found: {_one_line(error)}. Correct the name in `${{...}}`."
        ) from error
    return {str(key): value for key, value in dict(values).items()}  # type: ignore[arg-type]
