from __future__ import annotations

import hashlib

import pytest
import torch

from meshbolt.demos import PydocText
from meshbolt.demos.data import Windows, corpus


def test_a_window_comes_with_the_bytes_after_its_own_and_no_byte_is_lost() -> None:
    windows = Windows(bytes(range(11)), length=5)

    assert len(windows) == 2
    assert [window.tolist() for window in windows[1]] == [[5, 6, 7, 8, 9], [6, 7, 8, 9, 10]]


def test_a_text_that_fills_its_windows_exactly_ends_one_window_earlier() -> None:
    """The last byte of a text has no byte after it, so that a window that ended there would have no targets."""
    assert len(Windows(bytes(10), length=5)) == 1


def test_the_corpus_is_english_text_of_a_useful_size() -> None:
    text = corpus()

    assert len(text) > 300_000
    assert text.count(b" the ") > 1_000


def test_the_last_tenth_is_held_out_and_is_not_trained_on() -> None:
    data = PydocText(length=128, batch_size=4)
    data.setup("fit")
    text = corpus()
    first_held_out = next(iter(data.val_dataloader()))[0][0]

    assert first_held_out.numpy().astype("uint8").tobytes() == text[len(text) - len(text) // 10 :][:128]
    trained = len(data.train_dataloader().dataset) * 128
    assert len(text) * 0.89 < trained < len(text) * 0.9


def test_batches_are_whole_numbers_of_the_asked_shape() -> None:
    data = PydocText(length=32, batch_size=4)
    data.setup("fit")
    inputs, targets = next(iter(data.train_dataloader()))

    assert inputs.shape == targets.shape == (4, 32)
    assert inputs.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_the_text_is_named_with_its_size_and_checksum(capsys: pytest.CaptureFixture[str]) -> None:
    PydocText().prepare_data()
    said = capsys.readouterr().out

    assert hashlib.sha256(corpus()).hexdigest() in said
    assert f"{len(corpus()):,} bytes" in said
