"""Where repeated blocks and outermost modules do not serve, cuts are found among all modules, at places that little passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.rows import full
from torch import Tensor, nn

from meshbolt.errors import ConfigError
from meshbolt.pipeline import PipelineReport, choose_cuts, compare_stages

CPU = torch.device("cpu")


class Inner(nn.Module):
    """What users put into an attribute of a LightningModule."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).square().mean()


class Chain(nn.Module):
    """Modules of different kinds, one after the other, inside of one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(8, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Convolved(nn.Module):
    """A convolution as most people write it: a module of its own."""

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, 3, stride=stride, padding=1)
        self.norm = nn.BatchNorm2d(after)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class Residual(nn.Module):
    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.first, self.second = Convolved(before, after, stride), nn.Conv2d(after, after, 3, padding=1)
        self.shortcut = nn.Conv2d(before, after, 1, stride=stride) if before != after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.shortcut(x))


class ResNet(nn.Module):
    """Levels of one block each, which are no repeated blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Convolved(3, 8)
        self.layer1 = nn.Sequential(Residual(8, 8))
        self.layer2 = nn.Sequential(Residual(8, 16, 2))
        self.layer3 = nn.Sequential(Residual(16, 32, 2))
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer3(self.layer2(self.layer1(self.stem(x)))).mean(dim=(2, 3)))


class UNet(nn.Module):
    """Skips are what modules return, or what a function makes of it."""

    def __init__(self, *, activated: bool = False) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = Convolved(3, 8), Convolved(8, 16, 2), Convolved(16, 32, 2)
        self.up1, self.up2 = nn.ConvTranspose2d(32, 16, 2, stride=2), nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.merge1, self.merge2 = Convolved(32, 16), Convolved(16, 8)
        self.out = nn.Conv2d(8, 1, 1)
        self.activated = activated

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        first = torch.sigmoid(first) if self.activated else first
        second = self.down2(first)
        x = self.up1(self.middle(second))
        x = self.up2(self.merge1(torch.cat([x, second], dim=1)))
        return self.out(self.merge2(torch.cat([x, first], dim=1)))


class Levels(nn.Module):
    """As timm builds convolutional networks: a sequence of sequences of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Convolved(3, 8)
        self.blocks = nn.Sequential(
            nn.Sequential(Residual(8, 8)),
            nn.Sequential(*(Residual(8, 8) for _ in range(6))),
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))


def pictures() -> Tensor:
    return torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def vectors() -> Tensor:
    return torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def cut(model: nn.Module, x: Tensor, stages: int, **values: Any) -> tuple[tuple[str, ...], PipelineReport]:
    module = Inner(model).double()
    cuts = choose_cuts(module, lambda: module(x), stages, device=CPU, **values)
    steps = [lambda: module(x), lambda: module(x + 1)]
    return cuts, compare_stages(module, steps, cuts, loss_of=lambda result: result)


@pytest.mark.parametrize(
    ("model", "x", "stages"),
    [
        (Chain(), vectors(), 2),
        full(Chain(), vectors(), 4),
        (ResNet(), pictures(), 3),
        (UNet(), pictures(), 3),
        full(UNet(), pictures(), 2),
        full(ResNet(), pictures(), 2),
        full(Levels(), pictures(), 4),
    ],
)
def test_a_model_in_one_module_is_cut_inside_of_it(model: nn.Module, x: Tensor, stages: int) -> None:
    cuts, report = cut(model, x, stages)
    assert report.is_equal, report
    assert len(cuts) == stages - 1
    # As even as a choice among the modules of these small models can be.
    assert max(report.shares) * stages < 1.7


def test_stages_begin_where_little_passes() -> None:
    cuts, report = cut(ResNet(), pictures(), 2)
    assert [len(crossings) for crossings in report.plan.crossings] == [1], cuts  # not inside of a residual block


def test_of_modules_that_begin_together_the_outermost_is_named() -> None:
    cuts, _ = cut(ResNet(), pictures(), 2)
    assert cuts == ("model.layer2",)


def test_levels_of_blocks_are_looked_into_where_they_are_uneven() -> None:
    cuts, report = cut(Levels(), pictures(), 2)
    assert cuts[0].startswith("model.blocks.1.")
    assert max(report.shares) * 2 < 1.25


def test_a_place_behind_which_a_functions_value_is_read_is_passed_over() -> None:
    cuts, report = cut(UNet(activated=True), pictures(), 2)
    assert report.is_equal, cuts


def test_blocks_that_are_even_are_not_looked_into() -> None:
    model = nn.Sequential(*(nn.Sequential(Residual(3, 3)) for _ in range(4)))
    cuts, _ = cut(model, pictures(), 2)
    assert cuts == ("model.2",)


def test_random_numbers_inside_of_a_module_are_compared_with_one_stage_of_the_same_units() -> None:
    model = Chain()
    model.net[1] = nn.Dropout(0.5)
    model.net[4] = nn.Dropout(0.5)
    _, report = cut(model, vectors(), 2)
    assert report.compared_with == "one stage"
    assert report.is_equal, report


def test_modules_that_every_stage_keeps_begin_none() -> None:
    cuts, _ = cut(Chain(), vectors(), 2, replicate=("model.net.3",))
    assert cuts != ("model.net.3",)


def test_a_refusal_says_what_was_looked_at() -> None:
    with pytest.raises(
        ConfigError,
        match=r"Inner cannot be cut into 9 stages: 3 of its modules can begin one\..* Looked at: model\.net\.2, ",
    ):
        cut(Chain(), vectors(), 9)
