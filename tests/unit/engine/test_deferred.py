"""Modules built without values come to exactly what a plain build makes, tensor by tensor."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import random
from collections.abc import Callable

import numpy
import pytest
import torch
from torch import Tensor, nn

from meshbolt import UnsupportedError
from meshbolt.demos import ByteGPT
from meshbolt.engine.deferred import HELD_LIMIT_BYTES, SMALL_ELEMENTS, Deferred

WIDTH = 48
assert WIDTH**2 > SMALL_ELEMENTS


class Initialised(nn.Module):
    """One layer of each kind of initialisation that torch has, and several that users write."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(12))
        initialisers: list[Callable[[Tensor], object]] = [
            nn.init.xavier_uniform_,
            nn.init.kaiming_normal_,
            nn.init.orthogonal_,
            nn.init.trunc_normal_,
            lambda w: nn.init.trunc_normal_(w, a=1.5, b=3.0),
            lambda w: nn.init.sparse_(w, 0.5),
            nn.init.eye_,
            lambda w: w.data.copy_(w.data.t() * 2),
            lambda w: w.data.clamp_(min=w.data.mean().item()),
            lambda w: w.data.__setitem__(slice(3), torch.arange(WIDTH)),
            lambda w: w.data.mul_(random.random() + torch.rand(())),
        ]
        for layer, initialise in zip(self.layers, initialisers, strict=False):
            initialise(layer.weight)
        self.layers[-1].weight = self.layers[0].weight
        self.tokens = nn.Embedding(100, WIDTH, padding_idx=7)
        self.attention = nn.TransformerEncoderLayer(WIDTH, 2)
        self.recurrent = nn.LSTM(WIDTH, WIDTH)
        self.convolution = nn.Conv2d(16, 16, 3)
        self.table = nn.Parameter(torch.from_numpy(numpy.linspace(0, 1, WIDTH**2, dtype="float32")).clone())
        self.seeded = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(3)).half())
        self.register_buffer("mask", torch.ones(WIDTH, WIDTH).tril().bool(), persistent=False)
        self.register_buffer("waves", torch.outer(torch.arange(2000.0), 1 / torch.arange(1, WIDTH)).sin())


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def built(make: Callable[[], nn.Module], *, later: bool) -> tuple[dict[str, Tensor], list[object]]:
    """Return the values of a module, and what is drawn after it was built."""
    torch.manual_seed(5)
    random.seed(5)
    deferred = Deferred()
    if later:
        with deferred.building():
            module = make()
    else:
        module = make()
    drawn = [torch.rand(3).tolist(), random.random()]
    assert deferred.gap(module) is None
    assert any(deferred.knows(tensor) for tensor in tensors(module).values()) == later
    torch.set_default_dtype(torch.float64)  # what holds when values are computed is of no account
    try:
        items = reversed(tensors(module).items())
        return {name: deferred.value(t) if deferred.knows(t) else t for name, t in items}, drawn
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("make", [Initialised, ByteGPT], ids=["initialisers", "gpt"])
def test_values_computed_later_are_those_of_a_plain_build_bit_for_bit(make: Callable[[], nn.Module]) -> None:
    plain, drawn_after_plain = built(make, later=False)
    deferred, drawn_after = built(make, later=True)

    assert drawn_after == drawn_after_plain
    assert deferred.keys() == plain.keys()
    for name, value in plain.items():
        assert deferred[name].dtype == value.dtype, name
        assert deferred[name].stride() == value.stride(), name
        assert torch.equal(deferred[name], value), name


def test_computing_a_value_leaves_the_random_state_alone() -> None:
    deferred = Deferred()
    with deferred.building():
        layer = nn.Linear(WIDTH, WIDTH)
    before = torch.get_rng_state()

    assert torch.equal(deferred.value(layer.weight), deferred.value(layer.weight))
    assert torch.equal(torch.get_rng_state(), before)


def test_large_tensors_have_no_memory_and_small_ones_are_real() -> None:
    with Deferred().building():
        layer = nn.Linear(WIDTH, WIDTH)
        steps = [rate.item() for rate in torch.linspace(0, 1, 5)]

    assert layer.weight.is_meta
    assert not layer.bias.is_meta
    assert steps == [0, 0.25, 0.5, 0.75, 1]


def test_what_later_hooks_do_is_noted_while_watched() -> None:
    deferred = Deferred()
    torch.manual_seed(1)
    with deferred.building():
        layer = nn.Linear(WIDTH, WIDTH)
    deferred.watch()
    new = torch.ones(WIDTH, WIDTH)
    layer.load_state_dict({"weight": new * 3, "bias": new[0]})
    layer.to(torch.bfloat16)
    nn.init.zeros_(layer.weight[:2])
    deferred.stop()

    value = deferred.value(layer.weight)
    assert value.dtype == torch.bfloat16
    assert torch.equal(value[2:], torch.full((WIDTH - 2, WIDTH), 3.0, dtype=torch.bfloat16))
    assert not value[:2].any()
    assert not new.is_meta


def as_array(layer: nn.Linear) -> object:
    return layer.weight.detach().numpy()


def into_real(layer: nn.Linear) -> object:
    return layer.bias.data.copy_(layer.weight.data[0])


def normalise(layer: nn.Linear) -> object:
    return nn.BatchNorm1d(WIDTH)(layer.weight)


def choose(layer: nn.Linear) -> object:
    return torch.multinomial(layer.weight.detach().exp(), 2)


def from_file(layer: nn.Linear) -> object:
    return layer.weight.data.view(-1)[:1].copy_(torch.from_numpy(numpy.zeros(HELD_LIMIT_BYTES, dtype="int8"))[:1])


@pytest.mark.parametrize("use", [as_array, into_real, normalise, choose])
def test_what_cannot_be_noted_is_refused_and_not_lost(use: Callable[[nn.Linear], object]) -> None:
    with pytest.raises(UnsupportedError, match="--meta false"), Deferred().building():
        use(nn.Linear(WIDTH, WIDTH))


def test_many_values_from_outside_are_refused_since_they_would_be_kept() -> None:
    size = math.isqrt(HELD_LIMIT_BYTES // 4) + 1
    real = torch.from_numpy(numpy.zeros((size, size), dtype="float32"))

    with pytest.raises(UnsupportedError, match="64 MiB of values come from outside"), Deferred().building():
        nn.Parameter(torch.empty(size, size)).data.copy_(real)


def test_a_tensor_that_nobody_would_fill_is_a_gap() -> None:
    class Holder(nn.Module):
        def __init__(self, *, outside: bool, empty: bool) -> None:
            super().__init__()
            self.table = [torch.ones(WIDTH, WIDTH)] if outside else []
            self.weight = nn.Parameter((torch.empty if empty else torch.zeros)(WIDTH, WIDTH))
            torch.ones(WIDTH, WIDTH).sum()  # nobody keeps this one

    def gap(**kind: bool) -> str | None:
        deferred = Deferred()
        with deferred.building():
            module = Holder(**kind)
        gc.collect()
        return deferred.gap(module)

    assert gap(outside=False, empty=False) is None
    assert "weight was made without giving it a value" in str(gap(outside=False, empty=True))
    assert "shape (48, 48) is kept outside" in str(gap(outside=True, empty=False))


def test_notes_survive_a_copy_and_refuse_to_go_to_another_process() -> None:
    deferred = Deferred()
    with deferred.building():
        layer = nn.Linear(WIDTH, WIDTH)
        second = copy.deepcopy(layer)

    assert copy.deepcopy(deferred) is deferred
    assert torch.equal(deferred.value(second.weight), deferred.value(layer.weight))
    with pytest.raises(UnsupportedError, match="cannot be pickled"):
        pickle.dumps(deferred)
