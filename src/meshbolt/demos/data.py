"""Real English text that needs no download: the language reference that CPython carries as `pydoc_data.topics`."""

from __future__ import annotations

import hashlib
from pydoc_data.topics import topics

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

HELD_OUT_SHARE = 0.1


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """A text cut into windows of equal length; each comes with the bytes that follow its own."""

    def __init__(self, text: bytes, *, length: int) -> None:
        """Cut the text.

        Args:
            text: at least `length` + 1 bytes.
            length: bytes in a window.
        """
        self._text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._length = length

    def __len__(self) -> int:
        return (len(self._text) - 1) // self._length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self._length
        window = self._text[start : start + self._length + 1].long()
        return window[:-1], window[1:]


class PydocText(pl.LightningDataModule):
    """Python's language reference as bytes: the last tenth is held out for validation.

    It changes with the version of Python, so compare losses only between runs on the same one: the SHA-256 tells.
    """

    def __init__(self, length: int = 128, batch_size: int = 8, num_workers: int = 0) -> None:
        """Take the sizes; nothing is loaded.

        Args:
            length: bytes in a window.
            batch_size: windows in a batch of one rank.
            num_workers: processes that load for one rank; 0 loads in the rank itself.
        """
        super().__init__()
        self.length, self.batch_size, self.num_workers = length, batch_size, num_workers

    def prepare_data(self) -> None:
        """Print what the text is; Lightning calls this on one rank."""
        text = corpus()
        digest = hashlib.sha256(text).hexdigest()
        print(f"text: pydoc_data.topics, {len(text):,} bytes, SHA-256 {digest}", flush=True)

    def setup(self, stage: str) -> None:
        """Cut the text into windows for training and, from its last tenth, for everything else."""
        text = corpus()
        held_out = len(text) - int(len(text) * HELD_OUT_SHARE)
        self._train, self._held_out = (Windows(part, length=self.length) for part in (text[:held_out], text[held_out:]))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return the windows to train on, shuffled."""
        return DataLoader(
            self._train, batch_size=self.batch_size, shuffle=True, drop_last=True, num_workers=self.num_workers
        )

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return the held-out windows."""
        return DataLoader(self._held_out, batch_size=self.batch_size, num_workers=self.num_workers)

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader


def corpus() -> bytes:
    """Return the whole text, its topics in the order of their names."""
    return "\n\n".join(topics[name] for name in sorted(topics)).encode()
