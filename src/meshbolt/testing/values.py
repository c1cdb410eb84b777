"""How arguments and results travel between the test and its ranks: by value.

`multiprocessing` would send a tensor as a file descriptor to shared memory, which is gone once the sending rank has
left. Here a tensor is its bytes; one that lives in several processes (a DTensor) is refused, with the way out.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch.distributed.tensor import DTensor


class _ByValue(pickle.Pickler):
    """A pickler that copies tensors: to the CPU, without their graph, and no more of their storage than they show."""

    def reducer_override(self, obj: Any) -> Any:
        """Reduce a tensor to a compact copy of its values, and leave everything else to pickle."""
        if isinstance(obj, DTensor):
            raise TypeError("a DTensor cannot leave its ranks: return `x.full_tensor()` or `x.to_local()` instead")
        if type(obj) in (torch.Tensor, torch.nn.Parameter) and obj.layout is torch.strided and not obj.is_meta:
            buffer = io.BytesIO()
            torch.save(obj.detach().cpu().clone(), buffer)
            return _load_tensor, (buffer.getvalue(),)
        return NotImplemented


def _load_tensor(data: bytes) -> torch.Tensor:
    tensor: torch.Tensor = torch.load(io.BytesIO(data), weights_only=True)
    return tensor


def dump(value: Any) -> bytes:
    """Return `value` as bytes.

    Raises:
        TypeError: Something in it cannot leave the process; the message names it.
    """
    buffer = io.BytesIO()
    try:
        _ByValue(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    except Exception as reason:  # pickle raises whatever the object's own hooks raise
        raise TypeError(
            f"a value of type {type(value).__name__} cannot travel between processes: {reason}. "
            "Use plain Python values and tensors, and functions and classes from the top level of a module."
        ) from reason
    return buffer.getvalue()


def load(data: bytes) -> Any:
    """Return the value that `dump` wrote; for data of our own processes only."""
    return pickle.loads(data)
