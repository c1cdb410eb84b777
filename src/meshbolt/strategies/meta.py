"""Build modules on the meta device, where values would vanish without a word."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from meshbolt.errors import ConfigError

_NO_OP_COPY = "copying from a non-meta parameter in the checkpoint to a meta parameter"


@contextmanager
def meta_tensors() -> Iterator[None]:
    """Create tensors on the meta device, to be filled when they are sharded.

    Raises:
        ConfigError: values are loaded into them, which torch would drop.
    """
    with warnings.catch_warnings(), torch.device("meta"), _RefuseValues():
        warnings.filterwarnings("error", message=f".*{_NO_OP_COPY}", category=UserWarning)
        try:
            yield
        except UserWarning as warning:
            if _NO_OP_COPY not in str(warning):
                raise
            raise _refusal(str(warning).partition(":")[0]) from warning


class _RefuseValues(TorchFunctionMode):
    """Raises where real values are copied into a tensor that cannot hold any."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (torch.Tensor.copy_, torch.Tensor.__setitem__) and args[0].is_meta:
            values = args[-1]
            if isinstance(values, torch.Tensor) and not values.is_meta:
                raise _refusal(f"a tensor of shape {tuple(args[0].shape)}")
        return func(*args, **(kwargs or {}))


def _refusal(what: str) -> ConfigError:
    return ConfigError(
        f"Weights were loaded into {what} while the module was built on the meta device, where they would be lost: no rank "
        "holds the whole model there. Call meshbolt.load_pretrained(module, path) instead, which reads safetensors when the "
        "module is sharded; or load_state_dict(..., assign=True), which holds all weights on every rank; or build the module "
        "in __init__."
    )
