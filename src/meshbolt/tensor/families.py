"""Architectures whose layers are known by the names of their children: the registered plans.

A wrong match would cost gathers in every forward (never a wrong result), so that names which anything may have count only where
the class of their owner says what it is, and only where the sizes of the layers fit together. To add an architecture, add a
`Known` to `KNOWN`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import nn

from meshbolt.tensor.styles import is_linear, width_in, width_out

Styles = Mapping[str, str]
"""From module names to styles."""

_PERCEPTRONS = ("mlp", "perceptron", "feedforward", "feed_forward", "ffn", "encoderlayer", "decoderlayer")
_ATTENTIONS = ("attention", "attn")


@dataclass(frozen=True)
class Family:
    """Layers that belong together and are found by the names of their children, wherever they stand.

    Attributes:
        columns: paths of the column-parallel layers inside of their owner, and their styles; the first one's outputs are what
            the row-parallel layer reads.
        row: path of the row-parallel layer.
        owners: parts of the names of classes that may own them, in lower case; none: any.
    """

    columns: Styles
    row: str
    owners: tuple[str, ...] = ()

    def styles_in(self, module: nn.Module) -> dict[str, str]:
        """Return the styles of all layers of the family, by name in the module."""
        found: dict[str, str] = {}
        for name, owner in module.named_modules():
            if self._is_owner(owner):
                prefix = f"{name}." if name else ""
                found.update({prefix + path: style for path, style in self.columns.items()})
                found[prefix + self.row] = "rowwise"
        return found

    def _is_owner(self, owner: nn.Module) -> bool:
        kind = type(owner).__name__.lower()
        if self.owners and not any(word in kind for word in self.owners):
            return False
        columns = [submodule(owner, path) for path in self.columns]
        row = submodule(owner, self.row)
        if row is None or not is_linear(row) or not all(layer is not None and is_linear(layer) for layer in columns):
            return False
        path, style = next(iter(self.columns.items()))
        sections = int(style.partition("/")[2] or 1)
        return width_out(owner.get_submodule(path)) == sections * width_in(row)


@dataclass(frozen=True)
class Known:
    """A registered plan.

    Attributes:
        families: the layers of its blocks.
        ends: embeddings and heads, by the ends of their paths; they are divided where blocks are, and only where they divide.
        attention: `nn.MultiheadAttention` is divided by heads.
    """

    families: tuple[Family, ...]
    ends: Styles = field(default_factory=dict)
    attention: bool = False

    def styles_in(self, module: nn.Module) -> dict[str, str]:
        """Return the styles of all layers that the plan knows, by name in the module; a '?' where a layer need not be divided."""
        found: dict[str, str] = {}
        for family in self.families:
            for path, style in family.styles_in(module).items():
                found.setdefault(path, style)
        if self.attention:
            found.update({name: "heads" for name, child in module.named_modules() if _divides_by_heads(child)})
        if found:
            widths = {width_out(module.get_submodule(path)) for path, style in found.items() if style == "rowwise"}
            found.update(self._ends_in(module, widths))
        return found

    def _ends_in(self, module: nn.Module, widths: set[int]) -> dict[str, str]:
        found: dict[str, str] = {}
        for name, child in module.named_modules():
            style = next((s for end, s in self.ends.items() if name == end or name.endswith(f".{end}")), None)
            is_embedding = isinstance(child, nn.Embedding) and style == "rowwise" and child.embedding_dim in widths
            is_head = style == "colwise_gather" and is_linear(child) and width_in(child) in widths
            if style is not None and (is_embedding or is_head):
                found[name] = f"{style}?"
        return found


def _divides_by_heads(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) and module.bias_k is None and not module.add_zero_attn


def _perceptron(first: str, second: str, *more: str, owners: tuple[str, ...] = ()) -> Family:
    return Family(dict.fromkeys((first, *more), "colwise"), second, owners)


def _separate(query: str, key: str, value: str, out: str) -> Family:
    return Family(dict.fromkeys((query, key, value), "colwise"), out)


def _fused(projections: str, out: str, owners: tuple[str, ...] = ()) -> Family:
    return Family({projections: "colwise/3"}, out, owners)


KNOWN: Mapping[str, Known] = MappingProxyType(
    {
        "byte_gpt": Known(
            (_fused("attention.qkv", "attention.out"), _perceptron("widen", "narrow")),
            {"tokens": "rowwise", "head": "colwise_gather"},
        ),
        "llama": Known(
            (_separate("q_proj", "k_proj", "v_proj", "o_proj"), _perceptron("gate_proj", "down_proj", "up_proj")),
            {"embed_tokens": "rowwise", "lm_head": "colwise_gather"},
        ),
        "gpt2": Known(
            (
                _fused("c_attn", "c_proj"),
                # Attention to another sequence has queries by themselves.
                Family({"q_attn": "colwise", "c_attn": "colwise/2"}, "c_proj"),
                _perceptron("c_fc", "c_proj"),
            ),
            {"wte": "rowwise", "lm_head": "colwise_gather"},
        ),
        "bert": Known(
            (
                _separate("self.query", "self.key", "self.value", "output.dense"),
                _perceptron("intermediate.dense", "output.dense"),
                _separate("q_lin", "k_lin", "v_lin", "out_lin"),
                _perceptron("lin1", "lin2", owners=_PERCEPTRONS),
            ),
            {
                "word_embeddings": "rowwise",
                "predictions.decoder": "colwise_gather",
                "lm_head.decoder": "colwise_gather",
                "generator_lm_head": "colwise_gather",
                "vocab_projector": "colwise_gather",
            },
        ),
        "bart": Known(
            (_separate("q_proj", "k_proj", "v_proj", "out_proj"), _perceptron("fc1", "fc2", owners=_PERCEPTRONS)),
            {"embed_tokens": "rowwise", "shared": "rowwise", "lm_head": "colwise_gather"},
        ),
        "t5": Known(
            (
                Family(dict.fromkeys(("q", "k", "v"), "colwise"), "o", _ATTENTIONS),
                _perceptron("wi", "wo", owners=("dense", *_PERCEPTRONS)),
                _perceptron("wi_0", "wo", "wi_1", owners=("dense", *_PERCEPTRONS)),
            ),
            {"embed_tokens": "rowwise", "shared": "rowwise", "lm_head": "colwise_gather"},
        ),
        "vit": Known(
            (
                _separate("attention.query", "attention.key", "attention.value", "output.dense"),
                _perceptron("intermediate.dense", "output.dense"),
                _separate("q_proj", "k_proj", "v_proj", "o_proj"),
                _fused("qkv", "proj", _ATTENTIONS),
                _perceptron("fc1", "fc2", owners=_PERCEPTRONS),
            ),
        ),
        "transformer_layers": Known((_perceptron("linear1", "linear2", owners=_PERCEPTRONS),), attention=True),
    }
)
"""By name; a module may be of several."""


def submodule(module: nn.Module, path: str) -> nn.Module | None:
    """Return a module inside of another by its path, or None."""
    for part in path.split("."):
        child = module._modules.get(part)
        if child is None:
            return None
        module = child
    return module
