"""Errors of broken connections are told from those of the user's code."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from meshbolt.compat import is_broken_connection


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:50086."),
        RuntimeError(
            "[gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 30000ms for recv operation to complete"
        ),
        RuntimeError("Application timeout caused pair closure"),
        dist.DistNetworkError("The client socket has failed"),
        dist.DistBackendError("NCCL error"),
    ],
)
def test_an_error_of_a_connection_is_one(error: RuntimeError) -> None:
    assert is_broken_connection(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        ConnectionError("Connection closed by the data base"),
        NotImplementedError("gloo/transport"),
        KeyboardInterrupt(),
    ],
)
def test_an_error_of_the_users_is_none(error: BaseException) -> None:
    assert not is_broken_connection(error)


def test_an_error_that_comes_of_a_broken_connection_says_no_more() -> None:
    def save() -> None:
        try:
            raise RuntimeError("gloo/transport/tcp/pair.cc: Connection closed by peer")
        except RuntimeError as error:
            raise ValueError("the checkpoint was not saved") from error

    with pytest.raises(ValueError, match="not saved") as caught:
        save()
    assert is_broken_connection(caught.value)


def test_an_error_that_was_raised_in_the_place_of_another_is_looked_at_alone() -> None:
    def answer() -> None:
        try:
            raise RuntimeError("gloo/transport/tcp/pair.cc: Connection closed by peer")
        except RuntimeError:
            raise ValueError("the user's own") from None

    with pytest.raises(ValueError, match="own") as caught:
        answer()
    assert not is_broken_connection(caught.value)
