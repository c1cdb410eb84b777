"""What a style means for one module, and which modules it is not for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from meshbolt.errors import ConfigError
from meshbolt.tensor.layout import Layout
from meshbolt.tensor.styles import STYLES, check_heads, divisors, is_linear, parallel_module, width_in, width_out


class Conv1D(nn.Module):
    """A layer of GPT-2's kind: its weight is (inputs, outputs)."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.nf = outputs
        self.weight, self.bias = nn.Parameter(torch.zeros(inputs, outputs)), nn.Parameter(torch.zeros(outputs))


LINEAR, CONV = nn.Linear(8, 12), Conv1D(12, 8)


@pytest.mark.parametrize(
    ("module", "style", "layouts"),
    [
        (LINEAR, "colwise", {"weight": Layout(0), "bias": Layout(0)}),
        (LINEAR, "colwise/3", {"weight": Layout(0, 3), "bias": Layout(0, 3)}),
        (LINEAR, "colwise_gather", {"weight": Layout(0), "bias": Layout(0)}),
        (LINEAR, "rowwise", {"weight": Layout(1)}),
        (LINEAR, "rowwise/2", {"weight": Layout(1, 2)}),
        (nn.Linear(8, 12, bias=False), "colwise", {"weight": Layout(0)}),
        (CONV, "colwise", {"weight": Layout(1), "bias": Layout(0)}),
        (CONV, "colwise/3", {"weight": Layout(1, 3), "bias": Layout(0, 3)}),
        (CONV, "rowwise", {"weight": Layout(0)}),
        (nn.Embedding(8, 4), "rowwise", {"weight": Layout(0)}),
        (
            nn.MultiheadAttention(8, 4),
            "heads",
            {"in_proj_weight": Layout(0, 3), "in_proj_bias": Layout(0, 3), "out_proj.weight": Layout(1)},
        ),
        (
            nn.MultiheadAttention(8, 4, bias=False),
            "heads",
            {"in_proj_weight": Layout(0, 3), "out_proj.weight": Layout(1)},
        ),
        (
            nn.MultiheadAttention(8, 4, kdim=6, vdim=5),
            "heads",
            {f"{letter}_proj_weight": Layout(0) for letter in "qkv"}
            | {"in_proj_bias": Layout(0, 3), "out_proj.weight": Layout(1)},
        ),
    ],
)
def test_a_style_divides_parameters(module: nn.Module, style: str, layouts: dict[str, Layout]) -> None:
    found = parallel_module("here", module, style, ranks=2)
    assert found is not None
    assert found.layouts == layouts
    assert found.gathers == (style == "colwise_gather")
    assert found.sums == style.startswith(("rowwise", "heads"))


@pytest.mark.parametrize("module", [LINEAR, nn.LayerNorm(3)])
def test_what_is_replicated_is_not_divided(module: nn.Module) -> None:
    assert parallel_module("here", module, "replicate", ranks=2) is None


@pytest.mark.parametrize("style", ["columns", "colwise/0", "colwise/x", "heads/2", "colwise_gather/2", "", "colwise?"])
def test_an_unknown_style_is_refused_with_those_there_are(style: str) -> None:
    with pytest.raises(ConfigError, match=f"of 'here' is unknown. Use one of {', '.join(STYLES)}"):
        parallel_module("here", LINEAR, style, ranks=2)


@pytest.mark.parametrize(
    ("module", "style", "words"),
    [
        (LINEAR, "heads", "'heads' is not for 'here', a Linear. Use 'colwise', 'colwise_gather' or 'rowwise'"),
        (nn.Embedding(8, 4), "colwise", "a Embedding. Use 'rowwise' for an Embedding"),
        (nn.Embedding(8, 4, max_norm=1.0), "rowwise", "without max_norm"),
        (nn.Embedding(8, 4, scale_grad_by_freq=True), "rowwise", "scale_grad_by_freq"),
        (nn.Embedding(8, 4), "rowwise/2", "Use 'rowwise'"),
        (nn.MultiheadAttention(8, 4), "colwise", "Use 'heads'"),
        (nn.MultiheadAttention(8, 4, add_bias_kv=True), "heads", "without add_bias_kv and add_zero_attn"),
        (nn.MultiheadAttention(8, 4, add_zero_attn=True), "heads", "without add_bias_kv and add_zero_attn"),
        (nn.LayerNorm(4), "rowwise", "name the layers inside of it"),
        (nn.Conv2d(4, 4, 1), "colwise", "name the layers inside of it"),
        (nn.Sequential(nn.Linear(2, 2)), "colwise", "name the layers inside of it"),
    ],
)
def test_a_style_on_a_module_it_does_not_fit_is_refused_with_those_that_do(
    module: nn.Module, style: str, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parallel_module("here", module, style, ranks=2)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("module", "style", "ranks", "words"),
    [
        (
            LINEAR,
            "colwise",
            5,
            "here.weight has 12 rows, which cannot be divided into 5 equal parts. Use tensor_parallel=[1, 2",
        ),
        (LINEAR, "rowwise", 3, "here.weight has 8 columns, which cannot be divided into 3"),
        (
            LINEAR,
            "colwise/3",
            8,
            "12 rows, which cannot be divided into 3 x 8 equal parts. Use tensor_parallel=[1, 2, 4]",
        ),
        (nn.Embedding(9, 4), "rowwise", 2, "here.weight has 9 rows"),
        (CONV, "colwise", 5, "here.weight has 12 columns"),
        (nn.MultiheadAttention(12, 3), "heads", 2, "'here' has 3 heads, which 2 ranks cannot share"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_sizes_that_do(
    module: nn.Module, style: str, ranks: int, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parallel_module("here", module, style, ranks=ranks)
    assert words in str(caught.value)


def test_heads_are_counted() -> None:
    check_heads("here", 8, 4)
    with pytest.raises(ConfigError, match=r"'here' has 8 key/value heads, which 3 ranks cannot share evenly"):
        check_heads("here", 8, 3, what="key/value heads")


def test_divisors_are_all_that_divide() -> None:
    assert divisors(12) == [1, 2, 3, 4, 6, 12]


@pytest.mark.parametrize("layer", [LINEAR, CONV])
def test_a_linear_layer_has_widths(layer: nn.Module) -> None:
    assert is_linear(layer)
    assert (width_in(layer), width_out(layer)) == (8, 12)


def test_a_convolution_is_no_linear_layer() -> None:
    assert not is_linear(nn.Conv1d(8, 12, 1))
