"""The state of a rank's random generators as tensors, so that a checkpoint can hold that of every rank."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Snapshot:
    """The states of all generators at one moment, as they give them: quick to take, and to go back to."""

    python: tuple[Any, ...]
    numpy: dict[str, Any]
    torch_cpu: torch.Tensor
    cuda: torch.Tensor | None
    device: torch.device

    @classmethod
    def take(cls, device: torch.device) -> Snapshot:
        """Note the states as they are.

        Args:
            device: also the generator of this GPU, if it is one.
        """
        return cls(
            python=random.getstate(),
            numpy=np.random.get_state(legacy=False),
            torch_cpu=torch.get_rng_state(),
            cuda=torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            device=device,
        )

    def restore(self) -> None:
        """Set the generators back."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch_cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the states as tensors."""
        version, internal, gauss = self.python
        state = self.numpy["state"]
        rest = (state["pos"], self.numpy["has_gauss"], self.numpy["gauss"])
        found = {
            "python": torch.tensor([version, *internal], dtype=torch.int64),
            "python_gauss": torch.tensor(float("nan") if gauss is None else gauss, dtype=torch.float64),
            "numpy_keys": torch.from_numpy(np.asarray(state["key"]).astype(np.int64)),
            "numpy_rest": torch.tensor([float(x) for x in rest], dtype=torch.float64),
            "torch": self.torch_cpu,
        }
        return found if self.cuda is None else {**found, "cuda": self.cuda}


def collect_random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the states of Python's, NumPy's and torch's generators on this rank.

    Args:
        device: also the generator of this GPU, if it is one.
    """
    return Snapshot.take(device).tensors()


def restore_random_state(state: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Set this rank's generators to what `collect_random_state` returned.

    Args:
        state: from a rank in the same place; a state of a GPU is used on a GPU only.
        device: this rank's.
    """
    version, *internal = state["python"].tolist()
    gauss = float(state["python_gauss"])
    random.setstate((version, tuple(internal), None if np.isnan(gauss) else gauss))
    pos, has_gauss, cached = state["numpy_rest"].tolist()
    np.random.set_state(("MT19937", state["numpy_keys"].numpy().astype(np.uint32), int(pos), int(has_gauss), cached))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def branch_random_state(state: Mapping[str, torch.Tensor], coordinate: int, device: torch.device) -> None:
    """Seed this rank's generators from the state of another rank: the same each time, and apart from all other coordinates.

    Args:
        state: what `collect_random_state` returned, equal on all ranks that branch from it.
        coordinate: this rank's data-parallel coordinate.
        device: this rank's; its GPU is seeded too.
    """
    origin = hashlib.sha256(state["torch"].numpy().tobytes())
    origin.update(f"data-parallel coordinate {coordinate}".encode())
    seed = int.from_bytes(origin.digest()[:8], "little")
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
