"""Where ranks of a pipeline cannot meet: in a step, which each of them runs in parts of its own."""

from __future__ import annotations

from meshbolt.errors import UnsupportedError
from meshbolt.pipeline import is_in_step


def refuse_in_step() -> None:
    """Refuse what needs several ranks together while a step of a pipeline runs.

    Raises:
        UnsupportedError: one does, or is looked at before training.
    """
    if is_in_step():
        raise UnsupportedError(
            "A step called barrier(), broadcast(), reduce(), all_gather() or a decision of the strategy, which need other ranks "
            "at the same line. Under pipeline parallelism a step runs once for each microbatch and stage, and only the ranks of "
            "the last stage come to its end. Let the step return or log what it has computed: self.log(..., sync_dist=True) "
            "averages over ranks, and on_train_batch_end or on_validation_batch_end has on every rank what the step returned for "
            "the whole batch, and may gather it."
        )
