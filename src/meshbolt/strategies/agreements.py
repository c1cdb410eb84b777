"""What any rank may ask for at any moment, and all ranks then do at the same point of the training, without a collective.

A rank that asks leaves word in the store through which the ranks once found each other; rank 0 finds it at the beginning of a
window (the batches of one optimizer step) and writes there that all act at the beginning of the next one. No rank gets that far
without rank 0 having taken part in the window between, so that each has read it in time. This costs a look into the store a
window.
"""

from __future__ import annotations

import torch.distributed as dist

from meshbolt.strategies.compat import default_store


class Agreement:
    """Lets all ranks do something at the beginning of the same window, after any of them has asked."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._asks = False
        self._due: int | None = None

    def ask(self) -> None:
        """Ask for it; all that a handler does."""
        self._asks = True

    def is_due(self, window: int) -> bool:
        """Return whether it is to be done now; to be asked on every rank at the beginning of every window.

        Args:
            window: number of the window, counted from 1.
        """
        if self._due is None:
            self._due = self._agreed_window(window)
        return self._due == window

    def _agreed_window(self, window: int) -> int | None:
        if dist.get_world_size() == 1:
            return window if self._asks else None
        store = default_store()
        if self._asks:
            store.set(f"{self._name}/asked", "")
            self._asks = False
        agreed = f"{self._name}/window"
        if dist.get_rank() == 0 and store.check([f"{self._name}/asked"]):
            store.set(agreed, str(window + 1))
            store.get(agreed)  # the answer proves that it is written before anyone can ask
        return int(store.get(agreed)) if store.check([agreed]) else None
