from __future__ import annotations

import math

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from meshbolt.demos import ByteGPT, WriteSample


@pytest.fixture
def model() -> ByteGPT:
    torch.manual_seed(0)
    return ByteGPT(dim=32, num_layers=2, num_heads=2, max_length=16)


def test_the_default_has_the_size_it_says() -> None:
    assert sum(parameter.numel() for parameter in ByteGPT().parameters()) == pytest.approx(0.88e6, rel=0.01)


def test_an_untrained_model_finds_all_bytes_about_equally_likely(model: ByteGPT) -> None:
    batch = torch.randint(256, (8, 16)), torch.randint(256, (8, 16))

    assert float(model._loss(batch).detach()) == pytest.approx(math.log(256), abs=0.1)


def test_no_position_sees_the_bytes_after_it(model: ByteGPT) -> None:
    tokens = torch.randint(256, (1, 16))
    changed = tokens.clone()
    changed[0, 9:] = (changed[0, 9:] + 1) % 256
    before, after = model(tokens), model(changed)

    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_it_learns_a_text_that_repeats(model: ByteGPT) -> None:
    tokens = torch.arange(17).repeat(4, 1) % 5
    batch = tokens[:, :-1], tokens[:, 1:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        loss = model._loss(batch)
        loss.backward()
        optimizer.step()

    assert float(loss.detach()) < 0.1


def test_its_blocks_are_a_list_that_sharding_finds(model: ByteGPT) -> None:
    assert isinstance(model.blocks, nn.ModuleList)
    assert len(model.blocks) == 2


def test_generating_continues_the_prompt_alike_each_time_and_leaves_the_random_state_alone(model: ByteGPT) -> None:
    state = torch.get_rng_state()
    first, again = (model.generate("To be, or not", num_bytes=30) for _ in range(2))

    assert first == again
    assert first.startswith("To be, or not")
    assert first != model.generate("To be, or not", num_bytes=30, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("rank_zero", [True, False])
def test_the_sample_is_written_on_every_rank_and_printed_on_the_first(
    rank_zero: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    class Model(pl.LightningModule):
        calls = 0

        def generate(self, prompt: str, *, num_bytes: int) -> str:
            assert not self.training
            self.calls += 1
            return prompt + "x" * num_bytes + "\x1b[2J\r\nend"

    class OnRank(pl.Trainer):
        is_global_zero = rank_zero

    model = Model()
    WriteSample(prompt="ab", num_bytes=3).on_fit_end(OnRank(accelerator="cpu", devices=1, logger=False), model)

    assert model.calls == 1
    assert model.training
    shown = "\nsample:\nabxxx\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}\nend\n\n"
    assert capsys.readouterr().out == (shown if rank_zero else "")
