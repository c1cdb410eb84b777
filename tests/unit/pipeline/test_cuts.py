"""Cuts from the setting: as given, by counts of blocks, or balanced; what cannot be is refused with numbers and a remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meshbolt.errors import ConfigError, UnsupportedError
from meshbolt.pipeline import PipelineParallel, cuts_of, emulate
from meshbolt.pipeline.cuts import live_microbatches

CPU = torch.device("cpu")
WIDTH = 32


def layers(count: int, hidden: int = WIDTH) -> nn.ModuleList:
    return nn.ModuleList(
        nn.Sequential(nn.Linear(WIDTH, hidden), nn.Tanh(), nn.Linear(hidden, WIDTH)) for _ in range(count)
    )


class Translator(nn.Module):
    """Two lists, which are registered in another order than the forward reaches them."""

    def __init__(self, *, encoder: int = 4, decoder: int = 4, hidden: int = WIDTH) -> None:
        super().__init__()
        self.decoder = layers(decoder)
        self.encoder = layers(encoder, hidden)
        self.head = nn.Linear(WIDTH, WIDTH)
        self.unused = layers(2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.encoder:
            x = layer(x)
        for layer in self.decoder:
            x = layer(x)
        return self.head(x).mean()


def found(module: nn.Module, **values: Any) -> tuple[str, ...]:
    x = torch.ones(8, WIDTH)
    return cuts_of(module, PipelineParallel(**{"size": 2, **values}), lambda: module(x), device=CPU)


def test_cuts_that_are_given_are_taken() -> None:
    assert found(Translator(), cuts=["decoder.1"]) == ("decoder.1",)
    assert found(Translator(), size=1) == ()


@pytest.mark.parametrize(
    ("values", "cuts"),
    [
        ({"blocks": "encoder", "split": [1, 3]}, ("encoder.1",)),
        ({"blocks": ["encoder", "decoder"], "split": [5, 3]}, ("decoder.1",)),
        ({"blocks": ["decoder", "encoder"], "split": [5, 3]}, ("decoder.1",)),
        ({"blocks": ["decoder", "encoder"], "split": [1, 3, 4], "size": 3}, ("encoder.1", "decoder.0")),
        (
            {"blocks": ["encoder"], "split": [1, 1, 1, 1], "schedule": "zbv"},
            ("encoder.1", "encoder.2", "encoder.3"),
        ),
    ],
)
def test_blocks_are_counted_over_lists_in_the_order_of_the_forward(
    values: dict[str, Any], cuts: tuple[str, ...]
) -> None:
    assert found(Translator(), **values) == cuts


def test_lists_of_single_layers_are_lists_of_blocks_when_they_are_named() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleDict({key: nn.Linear(WIDTH, WIDTH) for key in "abcd"})

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers.values():
                x = layer(x)
            return x.mean()

    assert found(Plain(), blocks="layers", split=[3, 1]) == ("layers.d",)
    assert found(Plain(), blocks="layers") == ("layers.c",)


def test_lists_inside_of_blocks_may_be_named() -> None:
    class Group(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers(3)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    module = nn.Sequential(Group(), Group())
    assert found(module, blocks=["0.layers", "1.layers"], split=[2, 4]) == ("0.layers.2",)
    assert found(module, blocks=["1.layers", "0.layers"], size=3) == ("0.layers.2", "1.layers.1")


def test_repeated_blocks_are_found_for_a_split() -> None:
    module = Translator()
    del module.unused
    assert found(module, split=[6, 2]) == ("decoder.2",)


def test_a_split_is_balanced_among_the_blocks_that_are_named() -> None:
    module = Translator(hidden=3 * WIDTH)  # a layer of the encoder is three of the decoder
    assert found(module) == ("encoder.3",)
    assert found(module, blocks=["decoder", "encoder"]) == ("encoder.3",)
    assert found(module, blocks="decoder") == ("decoder.1",)  # the first stage has one of them


def test_cuts_that_were_chosen_cut_the_step() -> None:
    module = Translator().double()
    x = torch.randn(4, WIDTH, dtype=torch.float64)
    setting = PipelineParallel(4, blocks=["encoder", "decoder"])
    cuts = cuts_of(module, setting, lambda: module(x), device=CPU)
    _, plan = emulate(module, [lambda: module(x)], cuts)
    assert plan.stages == 4


@pytest.mark.parametrize(
    ("schedule", "cuts"), [("gpipe", ("encoder.3", "decoder.2")), ("1f1b", ("encoder.2", "decoder.1"))]
)
def test_among_choices_as_fast_early_stages_that_keep_more_microbatches_have_less(
    schedule: str, cuts: tuple[str, ...]
) -> None:
    module = Translator()
    module.head = nn.Identity()  # eight equal layers for three stages: one of them has two
    assert found(module, size=3, schedule=schedule, microbatches=6) == cuts


@pytest.mark.parametrize(
    ("setting", "live"),
    [
        (PipelineParallel(4), [4, 3, 2, 1]),
        (PipelineParallel(4, schedule="gpipe", microbatches=6), [6, 6, 6, 6]),
        (PipelineParallel(2, schedule="looped_bfs"), [4, 4, 4, 4]),
    ],
)
def test_stages_keep_as_many_microbatches_as_their_schedule_promises(
    setting: PipelineParallel, live: list[int]
) -> None:
    assert live_microbatches(setting) == live


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cuts": "layer.2"}, r"Translator has no module 'layer\.2' \("),
        ({"cuts": "encoder.9"}, r"no module 'encoder\.9' \(did you mean 'encoder\."),
        ({"cuts": "encoder"}, r"'encoder' is a ModuleList, which is never called"),
        ({"cuts": "encoder.1", "replicate": "encodr"}, r"no module 'encodr' \(did you mean 'encoder'\?"),
        (
            {"cuts": "encoder.1", "replicate": "encoder"},
            r"a stage begins with 'encoder\.1', and 'encoder' is to be kept",
        ),
        ({"blocks": "encodr"}, r"no module 'encodr' \(did you mean 'encoder'\?"),
        ({"blocks": "head"}, r"'head' is a Linear, and not a list of modules.* Name one of decoder, encoder"),
        (
            {"blocks": ["encoder", "decoder"], "split": [4, 5]},
            r"8 blocks in encoder, decoder, and split=\[4, 5\] distributes 9. Give 2 numbers whose sum is 8",
        ),
        (
            {"blocks": ["unused"], "split": [1, 1]},
            r"split=\[1, 1\]\) counts the block 'unused\.0', which a step does not call",
        ),
        (
            {"blocks": "encoder", "size": 5},
            r"4 blocks in encoder, of which 5 stages cannot have one each. Use fewer stages",
        ),
        (
            {"size": 10, "microbatches": 10},
            r"cannot be cut into 10 stages: 8 of its units can begin one. Use fewer stages",
        ),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        found(Translator(), **values)


def test_a_model_without_blocks_has_none_to_count() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x)).mean()

    with pytest.raises(ConfigError, match=r"Single has no repeated blocks that could be found. Name the lists"):
        found(Single(), split=[1, 1])
    with pytest.raises(ConfigError, match=r"'second' is a Linear.* this one has none, or name cuts"):
        found(Single(), blocks="second")
    assert found(Single()) == ("second",)


def test_cuts_out_of_order_are_refused_when_the_step_is_looked_at() -> None:
    module = Translator()
    cuts = found(module, size=3, cuts=["decoder.1", "encoder.1"])
    with pytest.raises(UnsupportedError, match=r"'encoder\.1' is called before 'decoder\.1'. Name cuts in the order"):
        emulate(module, [lambda: module(torch.ones(8, WIDTH))], cuts)
