"""The checksum: independent of how bytes are cut, and different for every kind of damage that storage does."""

from __future__ import annotations

import random

import numpy as np
import pytest

from meshbolt.checkpoint.checksum import Checksum, checksum_of

ROW_BYTES = 8 * 4096


def content(num_bytes: int) -> bytes:
    return np.random.default_rng(5).bytes(num_bytes)


@pytest.mark.parametrize("num_bytes", [0, 1, 100, ROW_BYTES - 1, ROW_BYTES, ROW_BYTES + 1, 40 * ROW_BYTES + 77])
def test_it_does_not_matter_how_the_bytes_are_cut(num_bytes: int) -> None:
    whole = content(num_bytes)
    for seed in range(5):
        generator, checksum, start = random.Random(seed), Checksum(), 0
        while start < num_bytes:
            length = generator.choice([0, 1, 7, 64, 4096, ROW_BYTES, 3 * ROW_BYTES + 5])
            checksum.update(whole[start : start + length])
            start += length
        assert checksum.hexdigest() == checksum_of(whole)


def test_it_is_the_same_forever() -> None:
    """Checkpoints on disks carry these values: if this fails, none of them loads any more."""
    assert checksum_of(b"") == "ca08ea5bca49cc18"
    assert checksum_of(b"meshbolt") == "a12f30de3aa598b3"
    assert checksum_of(bytes(range(256)) * 1024) == "9e9ec1e37d270877"


def test_what_has_been_summed_so_far_can_be_asked_in_between() -> None:
    checksum = Checksum()
    checksum.update(content(100))
    assert checksum.hexdigest() == checksum_of(content(100)) == checksum.hexdigest()


@pytest.mark.parametrize("num_bytes", [50, 3 * ROW_BYTES + 50])
def test_every_flipped_bit_changes_it(num_bytes: int) -> None:
    whole = content(num_bytes)
    expected = checksum_of(whole)
    positions = range(num_bytes) if num_bytes < 1000 else random.Random(1).sample(range(num_bytes), 300)
    for position in positions:
        for bit in range(8):
            changed = bytearray(whole)
            changed[position] ^= 1 << bit
            assert checksum_of(changed) != expected


def words(num_rows: int) -> np.ndarray:
    return np.frombuffer(content(num_rows * ROW_BYTES), dtype="<u8").reshape(num_rows, -1).copy()


def test_flipped_signs_of_two_numbers_in_a_row_do_not_cancel_out() -> None:
    """Modulo 2**64 the top bits of any two words weigh the same: this is what the columns are for."""
    changed = words(4)
    expected = checksum_of(changed.tobytes())
    changed[2, [10, 700]] ^= np.uint64(1 << 63)
    assert checksum_of(changed.tobytes()) != expected


@pytest.mark.parametrize(
    "damage", ["rows swapped", "words swapped", "a page of zeros", "shifted", "a row twice", "cut"]
)
def test_damage_that_keeps_plain_sums_is_found(damage: str) -> None:
    whole = words(6)
    changed = {
        "rows swapped": whole[[0, 2, 1, 3, 4, 5]],
        "words swapped": np.concatenate([whole[:, 1:2], whole[:, :1], whole[:, 2:]], axis=1),
        "a page of zeros": np.where(np.arange(4096) // 512 == 3, np.uint64(0), whole),
        "shifted": np.roll(whole.reshape(-1), 1),
        "a row twice": whole[[0, 1, 1, 3, 4, 5]],
        "cut": whole[:5],
    }[damage]
    assert checksum_of(np.ascontiguousarray(changed).tobytes()) != checksum_of(whole.tobytes())


def test_runs_of_zeros_of_different_length_differ() -> None:
    lengths = [0, 1, 8, ROW_BYTES - 1, ROW_BYTES, ROW_BYTES + 1, 2 * ROW_BYTES]
    assert len({checksum_of(bytes(length)) for length in lengths}) == len(lengths)
