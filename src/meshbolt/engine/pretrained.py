"""Pretrained weights, read from safetensors while a module is sharded, so that no rank ever holds the whole model.

A module on the meta device only remembers where its weights are; each tensor is then read when its unit is filled. A module
with real tensors is filled at once, so that the same code serves one process without any strategy.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from meshbolt.checkpoint.formats.safetensors import safetensors_files
from meshbolt.engine.deferred import read_into
from meshbolt.errors import CheckpointError

_ATTRIBUTE = "_meshbolt_pretrained"


@dataclass(frozen=True, kw_only=True)
class PretrainedWeights:
    """Where the tensors of a module are.

    Attributes:
        files: by the tensor's name in the module.
        names: of the tensor in its file, by its name in the module.
    """

    files: Mapping[str, Path]
    names: Mapping[str, str]

    def read(self, name: str) -> torch.Tensor:
        """Return one whole tensor on the CPU.

        Args:
            name: in the module.
        """
        with safe_open(self.files[name], framework="pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(self.names[name])
        return tensor


def load_pretrained(module: nn.Module, path: str | os.PathLike[str], *, prefix: str = "", strict: bool = True) -> None:
    """Load a module's weights from safetensors, sharded and tensor by tensor where the module is on the meta device.

    Args:
        module: the module or a part of it, before it is sharded: in `__init__` or `configure_model`.
        path: a `.safetensors` file, or a directory with one or with an index as Hugging Face writes it.
        prefix: what the names in the file begin with and the module's do not, such as "model.".
        strict: refuse weights that the module does not have, and parameters that the file does not have.

    Raises:
        CheckpointError: no such file; or names or shapes differ (lists them).

    Example:
        >>> def configure_model(self):
        ...     if self.net is None:
        ...         self.net = Net(config)
        ...         meshbolt.load_pretrained(self.net, "weights/")
    """
    weights, shapes = _open(Path(path), prefix)
    own = {**dict(module.named_parameters(remove_duplicate=False)), **_persistent_buffers(module)}
    _check(own, shapes, strict=strict, path=path)
    here = [name for name in own if name in weights.files]
    if any(own[name].is_meta for name in here):
        setattr(module, _ATTRIBUTE, weights)
        return
    for name in here:
        read_into(own[name], functools.partial(weights.read, name))


def pretrained_weights(module: nn.Module) -> PretrainedWeights | None:
    """Return what `load_pretrained` has left on a module, if anything."""
    return getattr(module, _ATTRIBUTE, None)


def _open(path: Path, prefix: str) -> tuple[PretrainedWeights, dict[str, torch.Size]]:
    files: dict[str, Path] = {}
    names: dict[str, str] = {}
    shapes: dict[str, torch.Size] = {}
    for file in safetensors_files(path):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - not a mapping
                name = key.removeprefix(prefix)
                files[name], names[name] = file, key
                shapes[name] = torch.Size(opened.get_slice(key).get_shape())
    return PretrainedWeights(files=files, names=names), shapes


def _persistent_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    saved = module.state_dict()
    return {name: buffer for name, buffer in module.named_buffers(remove_duplicate=False) if name in saved}


def _check(own: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size], *, strict: bool, path: object) -> None:
    wrong = [
        f"{n} is {tuple(shapes[n])}, here {tuple(own[n].shape)}"
        for n in own
        if n in shapes and shapes[n] != own[n].shape
    ]
    # A tied parameter is saved under one of its names.
    held = {id(tensor) for name, tensor in own.items() if name in shapes}
    missing = [name for name, tensor in own.items() if name not in shapes and id(tensor) not in held]
    unknown = [name for name in shapes if name not in own]
    if wrong or (strict and (missing or unknown)):
        raise CheckpointError(
            f"The weights in {path} do not fit the module. Other shapes: {wrong[:5] or 'none'}. Missing there: "
            f"{missing[:5] or 'none'}. Unknown here: {unknown[:5] or 'none'}. Build the module in the sizes of the weights, give "
            "the prefix of their names, or load what fits with strict=False."
        )
