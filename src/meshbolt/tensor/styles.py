"""How one module's parameters are divided, by the name of a style.

| style | of | parameters | what travels |
|---|---|---|---|
| `colwise` | Linear, GPT-2's Conv1D | by outputs | nothing; the output stays divided |
| `colwise/n` | the same | by outputs, each of n equal projections in one weight by itself | as `colwise` |
| `colwise_gather` | the same | by outputs | the output is gathered |
| `rowwise` | the same | weight by inputs, bias whole | the output is summed |
| `rowwise/n` | the same | by inputs, each of n equal parts of the input by itself | as `rowwise` |
| `rowwise` | Embedding | by rows of the table | the output is summed |
| `heads` | MultiheadAttention | projections by heads | the output is summed |
| `replicate` | any | whole | nothing |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from meshbolt.errors import ConfigError
from meshbolt.tensor.layout import Layout

STYLES = ("colwise", "colwise_gather", "rowwise", "heads", "replicate")


@dataclass(frozen=True)
class ParallelModule:
    """A module whose parameters are divided.

    Attributes:
        style: its name, for people.
        layouts: by a parameter's name in the module, how it is divided.
        gathers: the output is gathered.
        sums: the output is a sum over the ranks, which may stay divided along the sequence.
        sequence_dim: the dim of the output that is the sequence.
    """

    style: str
    layouts: Mapping[str, Layout]
    gathers: bool = False
    sums: bool = False
    sequence_dim: int = 1


def parallel_module(name: str, module: nn.Module, style: str, *, ranks: int) -> ParallelModule | None:
    """Return what a style means for a module; None where its parameters stay whole.

    Args:
        name: of the module, for messages.
        module: the user's.
        style: one of the table.
        ranks: that divide it.

    Raises:
        ConfigError: there is no such style, it is not for such a module, or the sizes do not divide.
    """
    base, _, number = style.partition("/")
    if base not in STYLES or (
        number and (not number.isdecimal() or int(number) < 1 or base not in ("colwise", "rowwise"))
    ):
        raise ConfigError(
            f"The style {style!r} of {name!r} is unknown. Use one of {', '.join(STYLES)}; 'colwise/3' for three projections in "
            "one weight."
        )
    if base == "replicate":
        return None
    found = _of_kind(module, base, int(number or 1))
    if found is None:
        raise ConfigError(f"The style {style!r} is not for {name!r}, a {type(module).__name__}. {_fitting(module)}")
    for key, layout in found.layouts.items():
        _check_divides(name, module, key, layout, ranks)
    return found


def _of_kind(module: nn.Module, style: str, sections: int) -> ParallelModule | None:
    if _computes_weight(module):
        return None
    if isinstance(module, nn.MultiheadAttention):
        return _attention(module) if style == "heads" else None
    if isinstance(module, nn.Embedding):
        reads_rows_only = module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
        if (style, sections) != ("rowwise", 1) or not reads_rows_only:
            return None
        return ParallelModule("rowwise", {"weight": Layout(0)}, sums=True)
    outputs = 0 if isinstance(module, nn.Linear) else 1 if is_conv1d(module) else None
    if outputs is None or style == "heads":
        return None
    named = f"{style}/{sections}" if sections > 1 else style
    if style == "rowwise":
        return ParallelModule(named, {"weight": Layout(1 - outputs, sections)}, sums=True)
    layouts = {"weight": Layout(outputs, sections)}
    if module.bias is not None:
        layouts["bias"] = Layout(0, sections)
    return ParallelModule(named, layouts, gathers=style == "colwise_gather")


def _attention(module: nn.MultiheadAttention) -> ParallelModule | None:
    if module.bias_k is not None or module.add_zero_attn:
        return None
    projections = {"in_proj_weight": Layout(0, 3), "in_proj_bias": Layout(0, 3)}
    projections |= {f"{letter}_proj_weight": Layout(0) for letter in "qkv"}
    own = {key: layout for key, layout in projections.items() if getattr(module, key) is not None}
    # torch's function has the sequence first, also where the module's inputs have the batch first.
    return ParallelModule("heads", {**own, "out_proj.weight": Layout(1)}, sums=True, sequence_dim=0)


def is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is a layer of GPT-2's kind, with a weight of (inputs, outputs)."""
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and getattr(weight, "ndim", 0) == 2


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer that can be divided by outputs or inputs."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def width_in(layer: nn.Module) -> int:
    """Return the number of inputs of a linear layer."""
    return layer.get_parameter("weight").shape[0 if is_conv1d(layer) else 1]


def width_out(layer: nn.Module) -> int:
    """Return the number of outputs of a linear layer."""
    return layer.get_parameter("weight").shape[1 if is_conv1d(layer) else 0]


def _computes_weight(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Embedding)) and module._parameters.get("weight") is None


def _fitting(module: nn.Module) -> str:
    if _computes_weight(module):
        return (
            "Its weight is computed from other parameters (by weight_norm, spectral_norm or another parametrization), of whole "
            "ones. Leave it out of the plan ('replicate')."
        )
    if isinstance(module, nn.MultiheadAttention):
        return "Use 'heads', which needs a MultiheadAttention without add_bias_kv and add_zero_attn."
    if isinstance(module, nn.Embedding):
        return "Use 'rowwise' for an Embedding, which needs one without max_norm, scale_grad_by_freq and sparse."
    if is_linear(module):
        return "Use 'colwise', 'colwise_gather' or 'rowwise'."
    return "Styles are for Linear, Embedding, MultiheadAttention and GPT-2's Conv1D: name the layers inside of it."


def _check_divides(name: str, module: nn.Module, key: str, layout: Layout, ranks: int) -> None:
    if isinstance(module, nn.MultiheadAttention):
        check_heads(name, module.num_heads, ranks)
        return
    size = module.get_parameter(key).shape[layout.dim]
    if size % (ranks * layout.sections):
        parts = f"{layout.sections} x {ranks}" if layout.sections > 1 else f"{ranks}"
        raise ConfigError(
            f"{name}.{key} has {size} {'rows' if layout.dim == 0 else 'columns'}, which cannot be divided into {parts} equal "
            f"parts. Use tensor_parallel={divisors(size // layout.sections) if size % layout.sections == 0 else [1]}, give the "
            f"layer another size, or leave it out of the plan ('replicate')."
        )


def check_heads(name: str, heads: int, ranks: int, *, what: str = "heads", fitting: int | None = None) -> None:
    """Refuse attention whose heads the ranks do not divide.

    Args:
        name: of the attention.
        heads: how many it has.
        ranks: that are to share them.
        what: kind of heads, for the message.
        fitting: a number whose divisors are numbers of ranks that would do; None: `heads`.

    Raises:
        ConfigError: they do not.
    """
    if heads % ranks:
        raise ConfigError(
            f"{name!r} has {heads} {what}, which {ranks} ranks cannot share evenly. Use "
            f"tensor_parallel={divisors(fitting or heads)}, give it a multiple of {ranks} {what}, or leave it out of the plan "
            "('replicate')."
        )


def divisors(number: int) -> list[int]:
    """Return the numbers that divide a number."""
    return [n for n in range(1, number + 1) if number % n == 0]
