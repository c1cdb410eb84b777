"""If these fail, transfers past the page cache are refused by the system, or go to memory of another process."""

from __future__ import annotations

import os

import pytest
import torch

from meshbolt.errors import ConfigError
from meshbolt.offload import ALIGNMENT_BYTES, aligned_bytes, aligned_empty
from meshbolt.offload.buffers import bytes_of

MIB = 2**20


@pytest.mark.parametrize("num_bytes", [1, 4096, 4097, 2 * MIB - 1, 2 * MIB, 5 * MIB + 3])
def test_memory_begins_and_ends_at_a_page_and_is_zero(num_bytes: int) -> None:
    buffer = aligned_empty(num_bytes)
    assert buffer.data_ptr() % ALIGNMENT_BYTES == 0
    assert buffer.nbytes == aligned_bytes(num_bytes) >= num_bytes
    assert not buffer.any()
    buffer.fill_(7)
    assert buffer.sum() == 7 * buffer.nbytes


def test_large_memory_begins_at_a_huge_page() -> None:
    assert aligned_empty(4 * MIB).data_ptr() % (2 * MIB) == 0


def test_a_part_of_a_buffer_keeps_its_memory_alive() -> None:
    part = aligned_empty(8 * MIB)[4 * MIB :]
    others = [aligned_empty(8 * MIB).fill_(9) for _ in range(4)]
    part.fill_(3)
    assert part.eq(3).all()
    assert all(other.eq(9).all() for other in others)


def test_a_process_forked_later_does_not_have_the_memory() -> None:
    address = aligned_empty(4 * MIB).data_ptr()
    buffer = aligned_empty(4 * MIB)
    buffer.fill_(1)
    del address
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        with open("/proc/self/maps") as maps:  # noqa: PTH123
            ranges = [line.split()[0].split("-") for line in maps]
        inside = any(int(start, 16) <= buffer.data_ptr() < int(end, 16) for start, end in ranges)
        os.write(writer, b"there" if inside else b"gone")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 10) == b"gone"
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_the_bytes_of_a_tensor_of_any_dtype_and_shape_are_its_own(dtype: torch.dtype) -> None:
    tensor = aligned_empty(8192).view(dtype).reshape(2, -1)
    view = bytes_of(tensor)
    assert len(view) == 8192
    view[0:4] = b"\x01\x02\x03\x04"
    assert tensor.view(torch.uint8).flatten()[:4].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "buffer",
    [
        aligned_empty(8192)[1:4097],
        aligned_empty(8192)[:4095],
        aligned_empty(8192)[:0],
        aligned_empty(8192).view(2, -1).t(),
        torch.empty(4096, device="meta"),
    ],
    ids=["address", "length", "empty", "strided", "device"],
)
def test_a_buffer_that_the_system_would_refuse_is_refused_with_what_it_is(buffer: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match=r"Take it from aligned_empty\(\)"):
        bytes_of(buffer)
