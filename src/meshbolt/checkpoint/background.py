"""Save checkpoints in the background: copied at the call, then written by a thread while training goes on.

What a checkpoint promises is what `save.py` promises, for the thread calls it. Here stands what comes before: copies in
host memory, so that what is written is the state at the call; and what comes after: an error that waits until somebody
raises it, on all ranks the same, and whatever may only happen once the checkpoint is whole, such as deleting another in
its favour. One checkpoint is written at a time, which bounds the memory to one copy of this rank's part. What is not in memory
at all, such as state in a file, is not copied: it is written first, and the call waits for that.

The threads of the ranks talk over a process group of their own: messages of the default group, which training uses at
the same moment, would be taken for theirs.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from meshbolt.checkpoint.agreement import Ranks, in_words, summary
from meshbolt.checkpoint.objects import PackedObjects, pack_objects
from meshbolt.checkpoint.places import name_of, place_of
from meshbolt.checkpoint.save import save_directory
from meshbolt.checkpoint.shards import info_of
from meshbolt.compat import StoredTensor, distributed_tensor, local_tensor
from meshbolt.errors import CheckpointError

_log = logging.getLogger(__name__)


class HostCopies:
    """Copies of tensors in host memory, whose buffers are used again from one time to the next."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return copies, each in the layout of its original; those of the time before are overwritten.

        Args:
            tensors: by key; of a DTensor this rank's part is copied. Those whose values are not in memory stay as they are.
        """
        # A validation may call this in inference mode, whose tensors could not be written to after it.
        with torch.inference_mode(False), torch.no_grad():
            copies = {key: self._copy(key, tensor) for key, tensor in tensors.items()}
        for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        return copies

    def free(self) -> None:
        """Give the memory back."""
        self._buffers.clear()

    def _copy(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        local = local_tensor(tensor.detach())
        if isinstance(local, StoredTensor):
            return tensor
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
            # Pinned memory is what a GPU copies to at full speed, and without being waited for.
            buffer = torch.empty(local.shape, dtype=local.dtype, device="cpu", pin_memory=local.is_cuda)
            self._buffers[key] = buffer
        buffer.copy_(local, non_blocking=local.is_cuda)
        if isinstance(tensor, DTensor):
            return distributed_tensor(buffer, like=tensor, placements=tensor.placements)
        return buffer


class BackgroundSaver:
    """Saves checkpoints in a thread, one at a time; one object on each rank, called by all ranks in the same order."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """Prepare; no thread is started yet.

        Args:
            group: the ranks that save, with a CPU backend, used for nothing else; None for a single process.
        """
        self._group = group
        self._copies = HostCopies()
        self._flight: _Flight | None = None

    @property
    def pending(self) -> bool:
        """Whether a checkpoint is being written, or could not be and nobody has raised that yet."""
        return self._flight is not None and not self._flight.landed

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be written and nobody has raised that yet; ranks may learn it one after another."""
        return self._flight is not None and self._flight.error is not None

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        tensors: Mapping[str, torch.Tensor],
        objects: Mapping[str, object],
        storage_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Copy the state and begin to write it; a collective of all ranks, which waits for the checkpoint before.

        Args:
            path: as `save_directory` has it.
            tensors: as `save_directory` has them; they may change as soon as this returns. Those whose values are not in memory
                are written by then.
            objects: likewise.
            storage_options: as `save_directory` has them.
            options: all else that `save_directory` takes but the group.

        Raises:
            CheckpointError: the checkpoint before was not saved, or this one cannot be; the same on every rank.
            ConfigError: there are storage options for a local path.
            MissingPackageError: the URL's scheme needs a package that is not installed.
            UnsupportedError: nobody knows the URL's scheme.
        """
        self.wait()
        place, ranks = place_of(path, storage_options=storage_options), Ranks(self._group)
        name = name_of(path)  # whole, wherever the process goes meanwhile
        flight = _Flight(name, ranks)
        options = {**options, "storage_options": storage_options, "group": self._group}

        def prepare() -> None:
            for key, tensor in tensors.items():
                info_of(key, tensor)
            packed: Mapping[str, object] | PackedObjects = {}
            if ranks.first:
                place.refuse_foreign()
                packed = pack_objects(objects)
            copies = self._copies.take(tensors)
            # Started here, where it fails for all if it fails for one; it begins to write when all have come so far.
            flight.start(
                lambda: save_directory(name, tensors=copies, objects=packed, on_stored=flight.let_go, **options)
            )

        try:
            ranks.each(prepare, failing=f"Checkpoint {place.text!r} cannot be saved")
        except BaseException:
            flight.release(go=False)
            raise
        self._flight = flight
        flight.release(go=True)
        # What is not in memory is not copied either: training would change it under the thread that writes.
        if any(isinstance(local_tensor(tensor), StoredTensor) for tensor in tensors.values()):
            flight.wait_for_stored()

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is whole, with all that was to follow; without one, do nothing.

        Raises:
            CheckpointError: it was not saved; once, and the same on every rank that lives.
        """
        if self._flight is None:
            return
        self._flight.join()
        error, self._flight = self._flight.error, None
        if error is not None:
            raise error

    def follow(self, action: Callable[[], None], *, makes: str | None = None, removes: str | None = None) -> None:
        """Do something once the checkpoint that is being written is whole, and never if it fails; without one, now.

        Args:
            action: without collectives; on the first rank only, before all ranks learn that the checkpoint is whole.
            makes: what will exist afterwards.
            removes: what will not exist any more.
        """
        places = {name_of(path): path is makes for path in (makes, removes) if path is not None}
        if self._flight is not None and self._flight.follow(action, places):
            return
        if not self.failed:
            action()

    def will_exist(self, path: str | os.PathLike[str]) -> bool | None:
        """Return whether there will be something at a path once all is done that is under way; None: as it is now."""
        if self._flight is None or not self.pending:
            return None
        return self._flight.expected.get(name_of(path))

    def free(self) -> None:
        """Wait as `wait` does, and give the memory of the copies back."""
        try:
            self.wait()
        finally:
            self._copies.free()


class _Flight:
    """One checkpoint on its way to the disk."""

    def __init__(self, name: str, ranks: Ranks) -> None:
        self.error: CheckpointError | None = None
        self.landed = False
        self.expected: dict[str, bool] = {name: True}
        self._name = name
        self._ranks = ranks
        self._thread: threading.Thread | None = None
        self._may_begin, self._is_wanted = threading.Event(), False
        self._has_let_go = threading.Event()
        self._followers: list[Callable[[], None]] | None = []
        self._lock = threading.Lock()

    def start(self, write: Callable[[], None]) -> None:
        """Start the thread; it waits until it is released.

        Args:
            write: a collective of all ranks, which fails on all or on none.
        """
        # Not a daemon: the interpreter does not exit before the checkpoint is whole.
        self._thread = threading.Thread(target=self._run, args=(write,), name=f"meshbolt: saving {self._name}")
        self._thread.start()

    def release(self, *, go: bool) -> None:
        """Let the thread write, or end."""
        self._is_wanted = go
        self._may_begin.set()

    def let_go(self) -> None:
        """Tell that tensors whose values are not in memory are written, or will never be."""
        self._has_let_go.set()

    def wait_for_stored(self) -> None:
        """Wait until tensors whose values are not in memory are no longer used."""
        self._has_let_go.wait()

    def join(self) -> None:
        """Wait until the thread has ended."""
        if self._thread is not None:
            self._thread.join()

    def follow(self, action: Callable[[], None], places: Mapping[str, bool]) -> bool:
        """Do something after the checkpoint, and expect places to be there or not; return False where it is too late."""
        with self._lock:
            if self._followers is None:
                return False
            self._followers.append(action)
            self.expected |= places
        return True

    def _run(self, write: Callable[[], None]) -> None:
        self._may_begin.wait()
        if not self._is_wanted:
            return
        try:
            self._land(write)
        except BaseException as error:  # whatever it is, it is raised by the thread that trains
            self.error = self._in_our_words(error)
            if self._ranks.first:
                _log.error("%s", self.error)
        finally:
            self.let_go()
            self._close()
        self.landed = self.error is None

    def _land(self, write: Callable[[], None]) -> None:
        is_whole, own = False, None
        try:
            write()
            is_whole = True
            self._follow_up()
        except BaseException as error:  # told to all ranks
            if isinstance(error, CheckpointError) and not is_whole:
                raise  # all have it, or have lost contact with each other
            own = error
        where = "was saved, but what was to follow it failed" if is_whole else "was not saved"
        failing = f"Checkpoint {self._name!r} {where}"
        texts = self._ranks.gather(own and in_words(own), failing=failing)
        if any(text is not None for text in texts):
            raise CheckpointError(f"{failing}: {summary(texts)}") from own

    def _follow_up(self) -> None:
        while (action := self._next()) is not None:
            action()

    def _next(self) -> Callable[[], None] | None:
        with self._lock:
            if self._followers:
                return self._followers.pop(0)
            self._followers = None
        return None

    def _close(self) -> None:
        with self._lock:
            self._followers = None

    def _in_our_words(self, error: BaseException) -> CheckpointError:
        if isinstance(error, CheckpointError):
            return error
        converted = CheckpointError(f"Checkpoint {self._name!r} was not saved: {in_words(error)}")
        converted.__cause__ = error
        return converted
