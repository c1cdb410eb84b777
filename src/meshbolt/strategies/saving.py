"""Checkpoints on their way: through the CheckpointIO plugin to the directory, at once or in the background, and back.

A strategy calls its plugin on every rank; the user's own plugins stand around meshbolt's, which calls back here. Since files
are written by all ranks together, all must come this far with the same path, or none: they meet first, and tell each other.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO

from meshbolt.checkpoint import BackgroundSaver, Checkpoint, make_link, remove_directory, save_directory
from meshbolt.checkpoint.agreement import Ranks, in_words, summary
from meshbolt.collectives import agree_on_error
from meshbolt.config import Plan
from meshbolt.errors import CheckpointError, MeshboltError
from meshbolt.plugins import MeshCheckpointIO
from meshbolt.strategies.agreements import Agreement
from meshbolt.strategies.checks import mesh_io_inside
from meshbolt.strategies.deepspeeds import is_deepspeeds, read_deepspeed
from meshbolt.strategies.directories import Loaded, LoadInto, ToSave, load_tree, savable
from meshbolt.strategies.files import agree_on_path, load_file

_log = logging.getLogger(__name__)


class Saving:
    """Writes, reads and deletes a strategy's checkpoints; what its CheckpointIO plugin calls."""

    def __init__(self, policy: Checkpoint, io: CheckpointIO | None) -> None:
        """Prepare; ranks need not exist yet.

        Args:
            policy: how checkpoints are written and read.
            io: the user's plugin; None for meshbolt's alone.

        Raises:
            UnsupportedError: the plugin cannot be honoured.
        """
        self._policy = policy
        self.use(io or MeshCheckpointIO())
        self._plan: Plan | None = None
        self._saver: BackgroundSaver | None = None
        self._background: list[dist.ProcessGroup] = []
        self._windows = self._saves = self._arrivals = 0
        self._agreement: Agreement | None = None
        self._is_urgent = False
        # Of the call under way.
        self._group: dist.ProcessGroup | None = None
        self._in_background = False
        self._to_save = ToSave(tree={})
        self._into, self._loaded = LoadInto(), Loaded(tree={})

    def use(self, io: CheckpointIO) -> None:
        """Take the plugin that carries checkpoints.

        Raises:
            UnsupportedError: it cannot be honoured.
        """
        self._mesh_io = mesh_io_inside(io)
        self.io = io

    def connect(self, plan: Plan, *, timeout: timedelta) -> None:
        """Begin, when the ranks are connected; a collective of all ranks.

        Args:
            plan: of the run.
            timeout: how long a collective of the writing threads waits for its peers.
        """
        self._plan = plan
        if self._policy.asynchronous:
            self._background = [dist.new_group(backend="gloo", timeout=timeout)]
            self._saver = BackgroundSaver(self._background[0])

    # What strategies call, on every rank ------------------------------------------------------------------------------

    def save(
        self,
        path: str,
        state: ToSave,
        *,
        storage_options: Any,
        in_background: bool,
        group: dist.ProcessGroup | None,
    ) -> None:
        """Save a checkpoint, after the one that is still being written.

        Args:
            path: the same on every rank.
            state: this rank's.
            storage_options: for the user's plugin; meshbolt's has none.
            in_background: whether the run goes on meanwhile, where that was asked for.
            group: of all ranks, for tensors on the CPU.

        Raises:
            CheckpointError: it was not saved, or the one before was not; the same on every rank.
        """
        self._group, self._in_background = group, in_background
        self._to_save = state
        self._mesh_io.attach(self)
        try:
            with self._all_or_none():
                self.io.save_checkpoint(dict(state.tree), path, storage_options=storage_options)
        finally:
            self._to_save = ToSave(tree={})

    def load(self, path: str, into: LoadInto, *, weights_only: bool | None, group: dist.ProcessGroup | None) -> Loaded:
        """Load a checkpoint, after the one that is still being written.

        Args:
            path: the same on every rank.
            into: what to fill.
            weights_only: False builds objects of any class, which runs code from the file; else plain data only.
            group: of all ranks, for tensors on the CPU.

        Returns:
            What is there, with the tree that the plugin returned.

        Raises:
            CheckpointError: it cannot be read, or the one before was not saved; the same on every rank.
            Exception: what `into.check` raises; likewise.
        """
        self.finish()
        is_wrapped = self.io is not self._mesh_io
        # The user's plugin may change what it passes on, so that only what it returns can be compared.
        self._into = dataclasses.replace(into, check=LoadInto().check) if is_wrapped else into
        self._group = group
        self._mesh_io.attach(self)
        try:
            with self._all_or_none():
                tree = self.io.load_checkpoint(path, weights_only=weights_only)
            loaded = dataclasses.replace(self._loaded, tree=tree)
        finally:
            self._into, self._loaded = LoadInto(), Loaded(tree={})
        if is_wrapped:
            agree_on_error(lambda: into.check(loaded), group=group)
        return loaded

    def delete(self, path: str) -> None:
        """Delete a checkpoint, on rank 0, once the one that is being written is whole, and not in favour of a failure."""
        self._mesh_io.attach(self)
        self.io.remove_checkpoint(path)

    def before_window(self) -> None:
        """Raise the error of a checkpoint that could not be written; to be called wherever a window of batches begins.

        Raises:
            CheckpointError: there is one; on all ranks before the same window.
        """
        self._windows += 1
        saver, agreement = self._saver, self._agreement
        if saver is None or agreement is None or not saver.pending:
            return
        if saver.failed:
            agreement.ask()
        if agreement.is_due(self._windows):
            saver.wait()

    def finish(self, *, for_good: bool = False) -> None:
        """Wait until the checkpoint that is being written is whole.

        Args:
            for_good: also give back the memory that copies of the state took.

        Raises:
            CheckpointError: it was not saved; the same on every rank.
        """
        if self._saver is not None:
            self._saver.free() if for_good else self._saver.wait()

    def groups_at_work(self) -> list[dist.ProcessGroup]:
        """Return the groups over which a checkpoint is being written, which ends well if they are left alone."""
        is_writing = self._saver is not None and self._saver.pending and not self._saver.failed
        return self._background if is_writing else []

    def abandon(self) -> None:
        """Wait as `finish` does, where an exception has ended the run: an error is logged, so that the other one is seen."""
        try:
            self.finish(for_good=True)
        except CheckpointError as error:
            _log.error("%s", error)

    @contextmanager
    def urgent(self) -> Iterator[None]:
        """Save at once for a while: the process may not live for long."""
        self._is_urgent = True
        try:
            yield
        finally:
            self._is_urgent = False

    # What will be there when the checkpoint that is being written is whole --------------------------------------------

    def will_exist(self, path: str) -> bool | None:
        """Return whether there will be something at a path; None: as it is now."""
        return None if self._saver is None else self._saver.will_exist(path)

    def link(self, path: str, to: str) -> None:
        """Make a path a link to a checkpoint, on rank 0, once that is whole.

        Args:
            path: of the link.
            to: the checkpoint that was saved last.
        """
        if self._saver is None:
            make_link(path, to=to)
        else:
            self._saver.follow(lambda: make_link(path, to=to), makes=path)

    def after(self, action: Callable[[], None], *, makes: str) -> None:
        """Do something once the checkpoint that was saved last is whole, on rank 0, and never if it fails.

        Args:
            action: without collectives.
            makes: the path of what it makes.
        """
        if self._saver is None:
            action()
        else:
            self._saver.follow(action, makes=makes)

    # What the plugin calls --------------------------------------------------------------------------------------------

    def write(self, checkpoint: Mapping[str, Any], path: str) -> None:
        """Write a checkpoint directory; on every rank."""
        if self._plan is None:
            raise AssertionError("A checkpoint was written before the ranks were connected.")
        self._meet(path)
        self.finish()
        state = dataclasses.replace(self._to_save, tree=checkpoint)
        failing = f"Checkpoint {path!r} was not saved, and what had this name before is untouched"
        what = savable(state, plan=self._plan, ranks=Ranks(self._group), failing=failing)
        if self._saver is None or self._is_urgent or not self._in_background:
            save_directory(path, **what, group=self._group)
            return
        self._saves += 1
        self._agreement = Agreement(f"meshbolt/saving/{self._saves}")
        self._saver.save(path, **what)

    def read(self, path: str, *, weights_only: bool | None) -> dict[str, Any]:
        """Read a checkpoint directory, a directory of DeepSpeed's, or a file of Lightning's, to be divided among the ranks."""
        if self._plan is None:
            raise AssertionError("A checkpoint was read before the ranks were connected.")
        self._meet(path)
        _, is_file = agree_on_path(path, group=self._group)
        if is_file:
            content = load_file(path, weights_only=weights_only, group=self._group)
            self._loaded = Loaded(tree=content, is_file=True)
            agree_on_error(lambda: self._into.check(self._loaded), group=self._group)
        elif is_deepspeeds(path, group=self._group):
            self._loaded = read_deepspeed(path, self._into, weights_only=weights_only, group=self._group)
        else:
            self._loaded = load_tree(path, self._into, weights_only=weights_only, plan=self._plan, group=self._group)
        return self._loaded.tree

    def remove(self, path: str) -> None:
        """Delete a checkpoint directory; on rank 0."""
        if self._saver is None:
            remove_directory(path)
        else:
            self._saver.follow(lambda: remove_directory(path), removes=path)

    @contextmanager
    def _all_or_none(self) -> Iterator[None]:
        """Let ranks on which the user's plugin has not called on to ours tell those that wait for them."""
        before = self._arrivals
        try:
            yield
        except Exception as error:
            if self._arrivals == before:
                try:
                    self._meet(None, trouble=in_words(error))
                except CheckpointError as agreed:
                    if not isinstance(error, MeshboltError):
                        raise agreed from error
            raise
        if self._arrivals == before:
            self._meet(None)

    def _meet(self, path: str | None, *, trouble: str | None = None) -> None:
        self._arrivals += path is not None
        failing = f"The CheckpointIO plugin {type(self.io).__name__} failed"
        outcomes = Ranks(self._group).gather((path, trouble), failing=failing)
        troubles = [text for _, text in outcomes]
        if any(troubles):
            raise CheckpointError(f"{failing}, so that no rank has saved or loaded anything: {summary(troubles)}")
        if len({place for place, _ in outcomes}) > 1:
            raise CheckpointError(
                f"{failing}: it must call MeshCheckpointIO on every rank with the same path, or on none, and called it with "
                f"{[place for place, _ in outcomes]} by rank, where None is a rank that did not call it."
            )
