"""If these fail, a rank that has run out of memory says nothing, or says it of another error."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from meshbolt.callbacks.out_of_memory import Failure, asked_for, is_out_of_memory
from meshbolt.engine.savings import Saving
from meshbolt.errors import RankError

MIB, GIB = 2**20, 2**30


def raised_from(cause: BaseException) -> RuntimeError:
    error = RuntimeError("something else")
    error.__cause__ = cause
    return error


def real_failure() -> BaseException:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**55, dtype=torch.uint8)
    return raised.value


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        real_failure(),
        raised_from(MemoryError()),
    ],
)
def test_memory_that_cannot_be_had_is_known_by_its_error(error: BaseException) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shape mismatch"),
        OSError(errno.ENOENT, "gone"),
        KeyboardInterrupt(),
        RankError("rank 1 failed: RuntimeError: can't allocate memory: you tried to allocate 7 bytes"),
    ],
)
def test_other_errors_are_not_taken_for_it(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_what_was_asked_for_is_read_from_the_error() -> None:
    assert asked_for(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 ...")) == "2.00 GiB"
    assert asked_for(raised_from(real_failure())) == "33554432.0 GiB"
    assert asked_for(MemoryError()) is None


def test_the_advice_says_where_who_and_what_next() -> None:
    modules = {f"layers.{number}": {"parameters": GIB, "gathered": 0} for number in range(7)}
    failure = Failure(
        rank=3,
        step=12,
        phase="the backward pass",
        inside=None,
        asked="2.00 GiB",
        used_bytes=78 * GIB,
        limit_bytes=80 * GIB,
        addresses_bytes=None,
        categories={"parameters": 7 * GIB, "gathered": 0, "activations": 60 * GIB},
        modules=modules,
        savings=[Saving("recompute='full'", 50 * GIB, "7 blocks keep their inputs only"), Saving("zero=3", MIB, "why")],
    )
    assert failure.text().splitlines() == [
        "rank 3 has run out of memory in step 12, in the backward pass: 78.0 GiB of 80.0 GiB were in use; 2.00 GiB more were "
        "asked for",
        "  held: parameters 7.0 GiB, activations 60.0 GiB",
        *(f"    layers.{number}: 1.0 GiB (parameters 1.0 GiB)" for number in range(5)),
        "  what to try, with what it saves on this rank (estimated from what the rank holds):",
        "    recompute='full'  50.0 GiB: 7 blocks keep their inputs only",
        "    zero=3            1.0 MiB: why",
    ]


def test_a_rank_that_has_tried_all_is_told_so() -> None:
    failure = Failure(
        rank=0,
        step=0,
        phase="the forward pass",
        inside="layers.4",
        asked=None,
        used_bytes=1,
        limit_bytes=2,
        addresses_bytes=3 * GIB,
        categories={},
        modules={},
        savings=[],
    )
    first, last = failure.text().splitlines()
    assert first == (
        "rank 0 has run out of memory in step 0, in the forward pass, in layers.4: 1 B of 2 B were in use; this process may "
        "reserve 3.0 GiB in all (ulimit -v)"
    )
    assert "more ranks" in last
