"""Plans that are found by looking at a forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshbolt.demos import ByteGPT
from meshbolt.errors import ConfigError
from meshbolt.tensor.trace import trace_styles

WIDTH = 16


class Attention(nn.Module):
    """Queries, keys and values apart, with as many heads for keys and values as are asked for."""

    def __init__(self, heads: int = 4, groups: int = 4) -> None:
        super().__init__()
        self.heads, self.groups = heads, groups
        self.q = nn.Linear(WIDTH, WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, WIDTH // heads * groups) for _ in range(2))
        self.o = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        query = self.q(x).view(batch, time, self.heads, -1).transpose(1, 2)
        key, value = (layer(x).view(batch, time, self.groups, -1).transpose(1, 2) for layer in (self.k, self.v))
        mixed = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        return self.o(mixed.transpose(1, 2).reshape(batch, time, width))


class Gated(nn.Module):
    """Gate and value in one projection."""

    def __init__(self, width: int = 2 * WIDTH) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(WIDTH, 2 * width), nn.Linear(width, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.both(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


class Layers(nn.Module):
    """Calls a function with its layers."""

    def __init__(self, function: Any, **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def linear(outputs: int = WIDTH, inputs: int = WIDTH) -> nn.Linear:
    return nn.Linear(inputs, outputs)


def found(module: nn.Module, ranks: int = 2, *, loss_parallel: bool = False) -> tuple[dict[str, str], dict[str, str]]:
    return trace_styles(
        module, lambda called: called(torch.empty(2, 6, WIDTH)), ranks=ranks, loss_parallel=loss_parallel
    )


def test_attention_is_divided_by_heads():
    styles, left_out = found(Attention())
    assert styles == {"q": "colwise", "k": "colwise", "v": "colwise", "o": "rowwise"}
    assert left_out == {}


def test_grouped_heads_are_divided_where_the_ranks_divide_the_groups():
    assert found(Attention(heads=4, groups=2))[0] == {"q": "colwise", "k": "colwise", "v": "colwise", "o": "rowwise"}
    styles, left_out = found(Attention(heads=4, groups=2), ranks=4)
    assert styles == {}
    assert left_out.keys() == {"q", "k", "v", "o"}
    assert all("cannot keep its output divided" in left_out[name] for name in "qkv")


def test_heads_that_the_ranks_do_not_divide_stay_whole_though_features_could_be_divided():
    class Odd(Attention):
        def forward(self, x: Tensor) -> Tensor:
            heads = [layer(x).view(2, 6, 1, WIDTH).transpose(1, 2) for layer in (self.q, self.k, self.v)]
            return self.o(F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(2, 6, WIDTH))

    assert found(Odd())[0] == {}


def test_projections_in_one_weight_are_found_by_where_their_output_is_cut():
    assert found(Gated())[0] == {"both": "colwise/2", "down": "rowwise"}
    module = ByteGPT(dim=32, num_layers=1, num_heads=4, max_length=16)
    tokens = torch.zeros(2, 8, dtype=torch.long)
    styles, _ = trace_styles(module, lambda called: called._loss((tokens, tokens)), ranks=2, loss_parallel=False)
    assert styles["blocks.0.attention.qkv"] == "colwise/3"


def test_pairs_are_divided_and_what_is_normalised_between_them_is_not():
    module = Layers(
        lambda m, x: m.d(m.c(F.layer_norm(m.b(F.gelu(m.a(x))), (WIDTH,))).relu()),
        **{name: linear() for name in "abcd"},
    )
    assert found(module)[0] == {"a": "colwise", "b": "rowwise", "c": "colwise", "d": "rowwise"}
    module = Layers(lambda m, x: m.b(F.layer_norm(m.a(x), (WIDTH,))), a=linear(), b=linear())
    styles, left_out = found(module)
    assert styles == {}
    assert left_out["a"].startswith("layer_norm cannot keep its output divided")


def test_a_residual_of_the_whole_is_not_divided():
    module = Layers(lambda m, x: m.b(m.a(x) + m.into(x)), into=linear(), a=linear(), b=linear())
    # Both are divided here: their sum is elementwise.
    assert found(module)[0] == {"into": "colwise", "a": "colwise", "b": "rowwise"}
    module = Layers(lambda m, x: m.b(m.a(m.norm(x)) + m.norm(x)), norm=nn.LayerNorm(WIDTH), a=linear(), b=linear())
    assert found(module)[0] == {}


def test_who_belongs_together_stays_whole_together():
    module = Layers(lambda m, x: m.c(m.a(x) * m.b(x)) + F.layer_norm(m.a(x), (WIDTH,)), **{n: linear() for n in "abc"})
    styles, left_out = found(module)
    assert styles == {}
    assert left_out["a"].startswith("layer_norm cannot keep its output divided")
    assert left_out["b"] == "mul cannot keep its output divided: it meets a whole tensor that has a gradient"


def test_a_weight_that_is_used_outside_of_its_layer_stays_whole():
    module = Layers(lambda m, x: m.b(m.a(x).relu()) + m.a.weight.sum(), a=linear(), b=linear())
    styles, left_out = found(module)
    assert styles == {}
    assert left_out["a"] == "its weight is used outside of the layer"


def test_one_layer_in_several_places_is_one_layer():
    block = Layers(lambda m, x: m.b(m.a(x).relu()), a=linear(), b=linear())
    assert found(nn.Sequential(block, block))[0] == {"0.a": "colwise", "0.b": "rowwise"}


def test_shared_weights_stay_whole():
    module = Layers(lambda m, x: m.b(m.a(x)), a=linear(), b=linear())
    module.b.weight = module.a.weight
    assert found(module) == ({}, dict.fromkeys("ab", "it shares its weight with another module"))


def test_a_head_is_divided_for_the_loss_where_that_is_asked_for():
    def loss(m: nn.Module, x: Tensor) -> Tensor:
        return F.cross_entropy(m.head(x).flatten(0, 1), torch.zeros(12, dtype=torch.long))

    module = Layers(loss, head=linear(10))
    assert found(module)[0] == {}
    assert found(module, loss_parallel=True)[0] == {"head": "colwise"}


def test_outputs_that_the_ranks_do_not_divide_stay_whole():
    module = Layers(lambda m, x: m.b(m.a(x)), a=linear(15), b=linear(inputs=15))
    assert found(module)[1]["a"] == "its 15 outputs cannot be divided by 2"


def test_attention_of_torch_is_divided_by_heads():
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 32, batch_first=True)
    assert found(layer)[0] == {"self_attn": "heads", "linear1": "colwise", "linear2": "rowwise"}
    assert "4 heads cannot be shared by 3 ranks" in found(layer, ranks=3)[1]["self_attn"]


def test_the_module_is_left_as_it_was():
    class Counting(Attention):
        calls = 0

        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Tensor] = []
            self.register_buffer("total", torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.seen.append(x)
            self.total += 1
            return super().forward(x)

    module = Counting()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    parameters, state = list(module.parameters()), torch.get_rng_state()
    found(module)
    assert all(one is other for one, other in zip(module.parameters(), parameters, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert (module.calls, module.seen) == (0, [])
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in module.modules())


def test_modules_on_the_meta_device_can_be_looked_at():
    with torch.device("meta"):
        module = Attention()
    assert found(module)[0] == {"q": "colwise", "k": "colwise", "v": "colwise", "o": "rowwise"}


def test_a_forward_that_needs_values_is_refused():
    module = Layers(lambda m, x: m.a(x) if x.sum() > 0 else x, a=linear())
    with pytest.raises(
        ConfigError, match=r"cannot look at the forward of Layers: .*example_input_array.*give a mapping"
    ):
        found(module)
