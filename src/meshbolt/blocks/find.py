"""Find the repeated blocks of a model: the layers of a transformer, the bottlenecks of a ResNet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn

from meshbolt.errors import ConfigError, did_you_mean

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
_WITHOUT_FORWARD = (nn.ModuleList, nn.ModuleDict)


def find_blocks(module: nn.Module) -> dict[str, nn.Module]:
    """Return the outermost repeated blocks, by their name in `module`, in the order in which they are registered.

    A block is a child of a list, sequence or dictionary of modules that holds at least two of the same class; it has
    parameters, and is more than a single layer of `torch.nn`. Where the model names its own unsplittable classes (Hugging
    Face's `_no_split_modules`), their instances are the blocks.
    """
    named = _named_by_model(module)
    return named if named else _children_of_containers(module)


def modules_by_name_or_class(module: nn.Module, wanted: Sequence[str], *, setting: str) -> dict[str, nn.Module]:
    """Return the modules that a list of module paths or class names selects, by their name in `module`.

    Args:
        module: where to look.
        wanted: paths such as `model.layers.3`, or class names such as `Block`.
        setting: name of the user's setting, for the message.

    Raises:
        ConfigError: an entry selects nothing.
    """
    names = {name: child for name, child in module.named_modules() if name}
    classes = Counter(type(child).__name__ for child in names.values())
    for entry in wanted:
        if entry not in names and entry not in classes:
            raise ConfigError(
                f"{setting}={list(wanted)!r}: {entry!r} is neither the path nor the class of a module in "
                f"{type(module).__name__}{did_you_mean(entry, [*classes, *_short(names)])}."
            )
    chosen = set(wanted)
    return {name: child for name, child in names.items() if name in chosen or type(child).__name__ in chosen}


def _named_by_model(module: nn.Module) -> dict[str, nn.Module]:
    classes: set[str] = set()
    for child in module.modules():
        classes.update(getattr(child, "_no_split_modules", None) or ())
    found: dict[str, nn.Module] = {}
    for name, child in module.named_modules():
        if type(child).__name__ in classes and not _inside(name, found):
            found[name] = child
    return found


def _children_of_containers(module: nn.Module) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for name, container in module.named_modules():
        if not isinstance(container, _CONTAINERS) or _inside(name, found):
            continue
        counts = Counter(type(child) for child in container.children() if _is_composite(child))
        for key, child in container.named_children():
            if counts[type(child)] >= 2:
                found[f"{name}.{key}" if name else key] = child
    return found


def _is_composite(module: nn.Module) -> bool:
    has_parameters = next(module.parameters(), None) is not None
    single_layer = type(module).__module__.startswith("torch.nn.modules") and not any(True for _ in module.children())
    return has_parameters and not single_layer and not isinstance(module, _WITHOUT_FORWARD)


def _inside(name: str, found: dict[str, nn.Module]) -> bool:
    return any(name == outer or name.startswith(outer + ".") for outer in found)


def _short(names: dict[str, nn.Module]) -> list[str]:
    return [name for name in names if name.count(".") <= 1][:40]
