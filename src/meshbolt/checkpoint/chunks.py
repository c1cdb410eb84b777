"""One chunk of a shard file: a tensor as `torch.save` writes it, with a checksum made as the bytes pass.

torch can read these files alone. What it writes around the values (the headers of a zip file, a pickle) is small; we
know where the values begin, and read them straight into the memory where they are wanted.
"""

from __future__ import annotations

import io
import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, cast

import numpy as np
import torch

from meshbolt.checkpoint.agreement import in_words
from meshbolt.checkpoint.checksum import BLOCK_BYTES, Checksum, Data
from meshbolt.checkpoint.manifest import Chunk
from meshbolt.compat import StoredTensor
from meshbolt.errors import CheckpointError

_MAP_NORESERVE = (
    0x4000 if sys.platform == "linux" else 0
)  # which the standard library has no name for before Python 3.13


def write_chunk(stream: IO[bytes], tensor: torch.Tensor, *, offset: int) -> Chunk:
    """Write a tensor to a file that is open at the chunk's offset, and return what the manifest says of it.

    Of one whose values are not in memory there is never more there than the run that is being written.
    """
    runs: Iterator[torch.Tensor] | None = None
    if isinstance(tensor, StoredTensor) and tensor.numel():
        plain, runs = _never_touched(tensor), tensor.runs()
    else:
        # Bare values: torch would write all of the storage that a tensor shows a part of, and leave flags to the pickle.
        plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        if plain.untyped_storage().nbytes() != plain.nbytes:
            plain = plain.clone()
    chunk = _ChunkStream(stream, values=bytes_of(plain), runs=runs)
    # torch's own checksums take longer than the rest of the save, and nothing looks at them.
    with _without_torch_checksums():
        torch.save(plain, cast("IO[bytes]", chunk))
    if chunk.values_at is None:
        raise AssertionError("torch.save has not written the values of a tensor in one piece")
    return Chunk(offset, chunk.length, chunk.values_at, chunk.checksum.hexdigest())


def _never_touched(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the same shape and dtype for `torch.save` to describe, whose memory nobody reads or writes."""
    return own_pages(tensor.nbytes).view(tensor.dtype).view(tensor.shape)


def own_pages(num_bytes: int) -> torch.Tensor:
    """Return memory (uint8, one dim) that the system gives page by page when it is touched, and has back at once in the end.

    Args:
        num_bytes: at least 1.
    """
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    return torch.frombuffer(memory, dtype=torch.uint8)


@contextmanager
def _without_torch_checksums() -> Iterator[None]:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def read_values(stream: IO[bytes], *, chunk: Chunk, into: memoryview, verify: bool) -> None:
    """Fill memory with the values of a chunk.

    Args:
        stream: the file.
        chunk: what the manifest says of it.
        into: as many bytes as the values are.
        verify: read all of the chunk and compare its checksum.

    Raises:
        CheckpointError: the file ends early, or the checksum is another one.
    """
    after = chunk.length - chunk.values - len(into)
    if after < 0:
        raise CheckpointError("it holds fewer values than its metadata says: it is damaged")
    if not verify:
        read_bytes(stream, offset=chunk.offset + chunk.values, into=into)
        return
    checksum = Checksum()
    stream.seek(chunk.offset)
    checksum.update(_exactly(stream, chunk.values))
    _fill(stream, into, checksum=checksum)
    checksum.update(_exactly(stream, after))
    _compare(checksum, chunk)


def read_bytes(stream: IO[bytes], *, offset: int, into: memoryview) -> None:
    """Fill memory from a file.

    Args:
        stream: the file.
        offset: where to begin.
        into: as many bytes as are wanted.

    Raises:
        CheckpointError: the file ends early.
    """
    stream.seek(offset)
    _read_into(stream, into)


def check_chunk(stream: IO[bytes], *, chunk: Chunk, num_bytes: int) -> None:
    """Read all of a chunk and compare its checksum, without keeping anything.

    Args:
        stream: the file.
        chunk: what the manifest says of it.
        num_bytes: how many bytes of values it has to hold.

    Raises:
        CheckpointError: it holds fewer, the file ends early, or the checksum is another one.
    """
    if chunk.values + num_bytes > chunk.length:
        raise CheckpointError("it holds fewer values than its metadata says: it is damaged")
    checksum = Checksum()
    stream.seek(chunk.offset)
    scratch = memoryview(bytearray(min(BLOCK_BYTES, chunk.length)))
    for block in checksum.blocks(chunk.length):
        content = scratch[: block.stop - block.start]
        _read_into(stream, content)
        checksum.update(content)
    _compare(checksum, chunk)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU."""
    return flat_bytes(tensor).numpy().data


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous tensor as bytes that share its memory."""
    # A single element may have any stride and be contiguous, but torch views it as bytes with stride 1 only.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


@contextmanager
def naming_file(name: str) -> Iterator[None]:
    """Have errors name a file and be such as travel between ranks, whatever they were."""
    handled = sys.exc_info()[1]
    try:
        yield
    except Exception as error:  # torch reports a short write by errors of many classes
        first = _first(error, besides=handled)
        if not isinstance(first, Exception):
            raise first from None  # an interrupt, which torch has buried under an error of its own
        raise CheckpointError(f"file {name}: {in_words(first)}") from error


def _first(error: BaseException, *, besides: BaseException | None) -> BaseException:
    """Return the error that came first, where torch met others on its way out and would tell of the last one."""
    while not error.__suppress_context__ and error.__context__ not in (None, besides):
        error = error.__context__
    return error


def _fill(stream: IO[bytes], into: memoryview, *, checksum: Checksum) -> None:
    for block in checksum.blocks(len(into)):
        _read_into(stream, into[block])
        checksum.update(into[block])


def _compare(checksum: Checksum, chunk: Chunk) -> None:
    if checksum.hexdigest() != chunk.checksum:
        raise CheckpointError("it is damaged: the checksum of what is there is not that of what was saved")


def _read_into(stream: IO[bytes], into: memoryview) -> None:
    done = 0
    while done < len(into):
        count = stream.readinto(into[done:])  # type: ignore[attr-defined]
        if not count:
            raise CheckpointError("it ends early: it is damaged")
        done += count


def _exactly(stream: IO[bytes], num_bytes: int) -> bytes:
    content = stream.read(num_bytes)
    if len(content) != num_bytes:
        raise CheckpointError("it ends early: it is damaged")
    return content


class _ChunkStream(io.RawIOBase):
    """What `torch.save` writes to: passes on to the file, keeps the checksum and notes where the values are."""

    def __init__(self, raw: IO[bytes], *, values: memoryview, runs: Iterator[torch.Tensor] | None) -> None:
        super().__init__()
        self.checksum = Checksum()
        self.length = 0
        self.values_at = None if len(values) else 0
        self._raw = raw
        self._values = values
        self._runs = runs

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, data: Data) -> int:  # type: ignore[override]
        """Write all of the data."""
        view = memoryview(data).cast("B")
        if self.values_at is None and self._is_values(view):
            self.values_at = self.length
            if self._runs is not None:
                self._write_runs(self._runs, len(view))
                return len(view)
        self._write(view)
        return len(view)

    def _is_values(self, view: memoryview) -> bool:
        if self._runs is not None:
            return len(view) == len(self._values) and _address(view) == _address(self._values)
        return _same(view, self._values)

    def _write_runs(self, runs: Iterator[torch.Tensor], num_bytes: int) -> None:
        end = self.length + num_bytes
        for run in runs:
            self._write(bytes_of(run.contiguous()))
        if self.length != end:
            raise CheckpointError(f"of {num_bytes} bytes of a tensor {num_bytes - end + self.length} were read")

    def _write(self, view: memoryview) -> None:
        for block in self.checksum.blocks(len(view)):
            self.checksum.update(view[block])
            self._raw.write(view[block])
        self.length += len(view)


def _same(one: memoryview, other: memoryview) -> bool:
    """Return whether two runs of bytes are the same; without a look at them where they are one memory."""
    return len(one) == len(other) and (_address(one) == _address(other) or one == other)


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, dtype=np.uint8).ctypes.data)
