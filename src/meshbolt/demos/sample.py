"""A callback that lets a language model write a little at the end of a run."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl


class WriteSample(pl.Callback):
    """Print a text that the model continues, at the end of `fit` and on one rank.

    The model needs a method `generate(prompt, num_bytes=...)` that returns the text.
    """

    def __init__(self, prompt: str = "The ", num_bytes: int = 200) -> None:
        """Take what to write.

        Args:
            prompt: the text to continue.
            num_bytes: how much to add.
        """
        self.prompt, self.num_bytes = prompt, num_bytes

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write on every rank, since each holds a part of the weights, and print on rank 0."""
        text = self._write(pl_module)
        if trainer.is_global_zero:
            # A model that has learnt little writes control codes, too, which a terminal would obey.
            shown = "".join(
                letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in text
            )
            print(f"\nsample:\n{shown}\n", flush=True)

    def _write(self, model: Any) -> str:
        was_training = model.training
        model.eval()
        text: str = model.generate(self.prompt, num_bytes=self.num_bytes)
        model.train(was_training)
        return text
