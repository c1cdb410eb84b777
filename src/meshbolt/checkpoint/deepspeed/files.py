"""One file of DeepSpeed's, read without DeepSpeed and without running code from it.

Its files are pickles that name a few classes of its own. Here these are built as plain holders of what was saved; any other
class is refused, or built where the file is trusted.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, Final

import torch

from meshbolt.checkpoint.agreement import in_words
from meshbolt.checkpoint.foreign import RefusedClassesError, refusal, refused_classes
from meshbolt.checkpoint.objects import PLAIN_CLASSES
from meshbolt.errors import CheckpointError


class Saved:
    """What was saved of an object: its attributes."""


class SavedStage(int):
    """A stage of ZeRO, which DeepSpeed has as a member of an enum."""


def _member(owner: Any, name: str) -> Any:
    """Stand in for `getattr`, by which some releases of Python 3.11 pickle the member of an enum."""
    stages = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3, "max_stage": 3}
    if owner is not SavedStage or name not in stages:
        raise CheckpointError("asks for an attribute that no checkpoint needs: do not trust this file")
    return SavedStage(stages[name])


_STANDING_IN: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "deepspeed.runtime.zero.config.ZeroStageEnum": SavedStage,
        "deepspeed.runtime.fp16.loss_scaler.LossScaler": Saved,
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": Saved,
        "deepspeed.utils.tensor_fragment.fragment_address": Saved,
        "deepspeed.utils.mixed_precision_linkage.fragment_address": Saved,
        "deepspeed.checkpoint.universal_checkpoint.SubparamShape": Saved,
    }
)
_GETATTR = "builtins.getattr"


def _without_factory(*_factory: Any) -> dict[Any, Any]:
    """Stand in for `collections.defaultdict`: its entries are plain data, and what makes new ones is not saved again."""
    return {}


_PLAIN: Final[Mapping[str, Any]] = MappingProxyType(
    {
        _GETATTR: _member,
        "collections.defaultdict": _without_factory,
        **{f"builtins.{kind.__name__}": kind for kind in (bool, dict, float, int, list, set, str)},
        **{f"{kind.__module__}.{kind.__qualname__}": kind for kind in PLAIN_CLASSES},
    }
)
"""What else a file that is not trusted may name."""


def read_file(path: Path, *, weights_only: bool = True) -> dict[str, Any]:
    """Return what a file holds; its tensors stay there, and are read when they are used, unless the file is of torch's old kind.

    Args:
        path: of the file.
        weights_only: False builds objects of any class, which runs code from the file; else plain data only.

    Raises:
        CheckpointError: it cannot be read, or holds objects of classes that `weights_only` does not allow.
    """
    found = read_any(path, weights_only=weights_only)
    if not isinstance(found, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(found).__name__} where a dictionary should be: it is not DeepSpeed's"
        )
    return dict(found)


def read_any(path: Path, *, weights_only: bool = True) -> Any:
    """Return what a file holds, whatever it is; see `read_file`."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        return _loaded(path, weights_only=weights_only)
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from error
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"{path} holds objects of a package that is not here ({in_words(error)}). Install {error.name!r} and import again"
        ) from error
    except Exception as error:  # of a damaged file, errors of almost every class
        raise _refused(error, path) from error


def _loaded(path: Path, *, weights_only: bool) -> Any:
    # torch reads its old kind of file whole: nothing of it can stay on the disk.
    options: dict[str, Any] = {"map_location": "cpu", "mmap": zipfile.is_zipfile(path)}
    if not weights_only:
        return torch.load(path, weights_only=False, pickle_module=_TRUSTING, **options)
    stubs: list[Any] = [(stub, name) for name, stub in {**_STANDING_IN, **_PLAIN}.items()]
    with torch.serialization.safe_globals(stubs):
        return torch.load(path, weights_only=True, **options)


def _refused(error: Exception, path: Path) -> CheckpointError:
    known = [*_STANDING_IN, *_PLAIN]
    text = f"{path} {_damage(path) or f'({path.stat().st_size} bytes) {refusal(error, path, known=known)}'}"
    if not (classes := refused_classes(error, path, known=known)):
        return CheckpointError(text)
    refused = RefusedClassesError(text)
    refused.classes = classes
    return refused


def _damage(path: Path) -> str:
    """Return what is wrong with a file as its first bytes and its end show it; empty where they show nothing."""
    size = path.stat().st_size
    if not size:
        return f"is empty: it was not written to its end. {_INSTEAD}"
    with path.open("rb") as file:
        begins = file.read(4)
    if begins == b"PK\x03\x04" and not zipfile.is_zipfile(path):
        return f"({size} bytes) is cut off: it begins as torch.save writes it, and its end is missing. {_INSTEAD}"
    if begins[:2] != b"PK" and begins[:1] != b"\x80":
        return f"({size} bytes) is damaged: it begins with the bytes {begins.hex(' ')}, as no file of torch.save. {_INSTEAD}"
    return ""


_INSTEAD = "Copy it once more from where it was written, or take an earlier save"


class _TrustingUnpickler(pickle.Unpickler):
    """Builds any class, and stands in for DeepSpeed's, which need not be installed."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class, or what stands in for it."""
        stub = _STANDING_IN.get(f"{module}.{name}")
        return stub if stub is not None else super().find_class(module, name)


_TRUSTING = SimpleNamespace(
    Unpickler=_TrustingUnpickler,
    load=lambda file, **options: _TrustingUnpickler(file, **options).load(),
    UnpicklingError=pickle.UnpicklingError,
    __name__="pickle",
)
