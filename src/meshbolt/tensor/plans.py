"""Which layers are divided, and by which style: the user's mapping, a registered plan, or the model's own."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import nn

from meshbolt.errors import ConfigError, UnsupportedError
from meshbolt.tensor.setting import TensorParallel
from meshbolt.tensor.styles import ParallelModule, check_heads, parallel_module

TRACED = "traced"
"""Not a registered plan, but one that is found by looking at the forward."""

Styles = Mapping[str, str]
"""From module names to styles."""

_HEADS = ("num_heads", "n_head", "n_heads", "nhead", "num_attention_heads")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head")


@dataclass(frozen=True)
class TensorPlan:
    """What is divided.

    Attributes:
        name: of the plan: that of a registered one, "mapping", "the model's _tp_plan" or "traced".
        modules: by name, in the order of the module.
        sequence: whether activations between parallel layers are divided along the sequence.
        left_out: layers that stay whole, by name, and why.
    """

    name: str
    modules: Mapping[str, ParallelModule]
    sequence: bool
    left_out: Mapping[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Return the plan in words, one line for layers that are alike."""
        shown: dict[tuple[str, str], int] = {}
        for name, entry in self.modules.items():
            key = (re.sub(r"\.\d+(?=\.|$)", ".*", name), entry.style)
            shown[key] = shown.get(key, 0) + 1
        lines = [
            f"{pattern}: {style}{f' (x{count})' if count > 1 else ''}" for (pattern, style), count in shown.items()
        ]
        reasons: dict[tuple[str, str], int] = {}
        for name, reason in self.left_out.items():
            key = (re.sub(r"\.\d+(?=\.|$)", ".*", name), reason)
            reasons[key] = reasons.get(key, 0) + 1
        return [*lines, *(f"{pattern}: whole, {reason}" for pattern, reason in reasons)]


@dataclass(frozen=True)
class Family:
    """Layers that are found by the names of their children, wherever they stand.

    Attributes:
        children: paths of the layers inside of their common module, and their styles.
        optional: likewise, of layers that some of the family do not have.
    """

    children: Styles
    optional: Styles = field(default_factory=dict)

    def styles_in(self, module: nn.Module) -> dict[str, str]:
        """Return the styles of all layers of the family, by name in the module."""
        found: dict[str, str] = {}
        for name, child in module.named_modules():
            layers = {path: _submodule(child, path) for path in self.children}
            if not all(_is_layer(layer) for layer in layers.values()):
                continue
            prefix = f"{name}." if name else ""
            found.update({prefix + path: style for path, style in self.children.items()})
            found.update({prefix + p: s for p, s in self.optional.items() if _is_layer(_submodule(child, p))})
        return found


def _mlp(first: str, second: str, *more: str) -> Family:
    return Family({first: "colwise", second: "rowwise", **dict.fromkeys(more, "colwise")})


def _separate(query: str, key: str, value: str, out: str) -> Family:
    return Family({query: "colwise", key: "colwise", value: "colwise", out: "rowwise"})


FAMILIES: Mapping[str, tuple[Family, ...]] = MappingProxyType(
    {
        "byte_gpt": (
            Family({"attention.qkv": "colwise/3", "attention.out": "rowwise", "widen": "colwise", "narrow": "rowwise"}),
            Family({"tokens": "rowwise", "head": "colwise_gather", "blocks.0.attention.qkv": "colwise/3"}),
        ),
        "llama": (
            _separate("q_proj", "k_proj", "v_proj", "o_proj"),
            _mlp("gate_proj", "down_proj", "up_proj"),
        ),
        "gpt2": (
            Family({"c_attn": "colwise/3", "c_proj": "rowwise"}),
            _mlp("c_fc", "c_proj"),
        ),
        "bert": (
            _separate("self.query", "self.key", "self.value", "output.dense"),
            _mlp("intermediate.dense", "output.dense"),
        ),
        "vit": (
            _separate("attention.query", "attention.key", "attention.value", "output.dense"),
            _mlp("intermediate.dense", "output.dense"),
            _separate("q_proj", "k_proj", "v_proj", "o_proj"),
            Family({"qkv": "colwise/3", "proj": "rowwise"}),
            _mlp("fc1", "fc2"),
        ),
        "transformer_layers": (
            Family({"self_attn": "heads"}, {"multihead_attn": "heads"}),
            _mlp("linear1", "linear2"),
        ),
    }
)
"""Registered plans."""

_FROM_HUGGING_FACE = MappingProxyType(
    {
        "colwise": "colwise",
        "rowwise": "rowwise",
        "colwise_rep": "colwise_gather",
        "colwise_gather_output": "colwise_gather",
        "embedding_rowwise": "rowwise",
        "vocab_rowwise": "rowwise",
        "rowwise_split_input": "rowwise",
        "replicated_with_grad_allreduce": "replicate",
        "replicated": "replicate",
        "sequence_parallel": "replicate",
    }
)


def choose_plan(
    module: nn.Module,
    setting: TensorParallel,
    *,
    ranks: int,
    trace: Callable[[], tuple[Styles, Mapping[str, str]]],
) -> TensorPlan:
    """Decide what is divided.

    Args:
        module: the user's whole module.
        setting: the user's.
        ranks: along the axis.
        trace: finds styles in the module by looking at its forward, and says why layers are left out.

    Raises:
        ConfigError: the plan does not fit the module; names the pattern or the layer, and what would do.
        UnsupportedError: the model's own plan asks for what there is not.
    """
    name, styles, left_out = _styles(module, setting, trace)
    tied = _tied_to(module, styles)
    modules: dict[str, ParallelModule] = {}
    for path, child in module.named_modules():
        style = styles.get(path)
        if style is None:
            continue
        if setting.loss_parallel and style == "colwise_gather":
            style = "colwise"
        if (entry := parallel_module(path, child, style, ranks=ranks)) is not None:
            modules[path] = entry
    if not modules:
        raise ConfigError(
            f"tensor_parallel={ranks} found nothing to divide in {type(module).__name__} (plan {name!r}). Name its layers in "
            "TensorParallel(plan={pattern: style}), or leave tensor_parallel out."
        )
    _check_tied(module, modules, tied)
    _check_heads(module, modules, ranks)
    if setting.loss_parallel and not any(styles.get(path) in ("colwise_gather",) for path in modules):
        _check_head(module, modules)
    return TensorPlan(name, modules, _sequence(setting), left_out)


def _sequence(setting: TensorParallel) -> bool:
    return setting.sequence_parallel is not False


def _styles(
    module: nn.Module, setting: TensorParallel, trace: Callable[[], tuple[Styles, Mapping[str, str]]]
) -> tuple[str, Styles, Mapping[str, str]]:
    plan = setting.plan
    if not isinstance(plan, str):
        return "mapping", _matched(module, plan), {}
    if plan == TRACED:
        return plan, *trace()
    if plan != "auto":
        if plan not in FAMILIES:
            raise ConfigError(
                f"There is no registered plan {plan!r}.{_did_you_mean(plan, FAMILIES)} Registered: {', '.join(FAMILIES)}; or give "
                "a mapping from patterns of module names to styles, or 'auto'."
            )
        return plan, _registered(module, plan), {}
    found = {name: styles for name in FAMILIES if (styles := _registered(module, name))}
    if found:
        merged: dict[str, str] = {}
        for styles in found.values():
            merged = {**styles, **merged}
        return " + ".join(found), merged, {}
    if (own := _own_plan(module)) is not None:
        return "the model's _tp_plan", own, {}
    return TRACED, *trace()


def _registered(module: nn.Module, name: str) -> dict[str, str]:
    styles: dict[str, str] = {}
    for family in FAMILIES[name]:
        for path, style in family.styles_in(module).items():
            styles.setdefault(path, style)
    # A row-parallel layer alone would only cost time: it is the columns before it that bring something.
    return styles if any(style.startswith(("colwise", "heads")) for style in styles.values()) else {}


def _matched(module: nn.Module, plan: Mapping[str, str]) -> dict[str, str]:
    names = [name for name, _ in module.named_modules() if name]
    styles: dict[str, str] = {}
    for pattern, style in plan.items():
        found = [name for name in names if matches(name, pattern)]
        if not found:
            known = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names}
            raise ConfigError(
                f"TensorParallel.plan: the pattern {pattern!r} matches no module of {type(module).__name__}."
                f"{_did_you_mean(pattern, known)} Patterns are compared part by part with names from named_modules(); '*' stands "
                "for any one part."
            )
        for name in found:
            if styles.get(name, style) != style:
                raise ConfigError(
                    f"TensorParallel.plan gives {name!r} two styles, {styles[name]!r} and {style!r} (by {pattern!r}). Let one "
                    "pattern match it."
                )
            styles[name] = style
    return styles


def matches(name: str, pattern: str) -> bool:
    """Return whether a module's name matches a pattern, part by part.

    Example:
        >>> matches("layers.3.attn.wq", "layers.*.attn.w?")
        True
    """
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def _own_plan(module: nn.Module) -> dict[str, str] | None:
    """Return the styles that a Hugging Face model inside of the module asks for by its `_tp_plan`."""
    for name, child in module.named_modules():
        plan = getattr(child, "_tp_plan", None)
        if not isinstance(plan, Mapping) or not plan:
            continue
        translated = {pattern: _translated(pattern, style, child) for pattern, style in plan.items()}
        prefix = f"{name}." if name else ""
        paths = [path for path, _ in child.named_modules() if path]
        styles: dict[str, str] = {}
        for pattern, style in translated.items():
            styles.update({prefix + path: style for path in paths if matches(path, pattern)})
        return styles or None
    return None


def _translated(pattern: str, style: Any, model: nn.Module) -> str:
    known = _FROM_HUGGING_FACE.get(style)
    if known is None:
        raise UnsupportedError(
            f"The _tp_plan of {type(model).__name__} gives {pattern!r} the style {style!r}, which is not supported. Give a plan of "
            "your own, TensorParallel(plan={pattern: style}), that leaves such layers out."
        )
    return known


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def _tied_to(module: nn.Module, styles: Styles) -> dict[str, list[str]]:
    """Return, by the name of a parameter's first place, all its places, for parameters in several modules."""
    places: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    return {names[0]: names for names in places.values() if len(names) > 1}


def _check_tied(module: nn.Module, modules: Mapping[str, ParallelModule], tied: Mapping[str, list[str]]) -> None:
    layouts = {f"{n}.{k}" if n else k: layout for n, entry in modules.items() for k, layout in entry.layouts.items()}
    for names in tied.values():
        found = {name: layouts.get(name) for name in names}
        if len(set(found.values())) > 1:
            words = ", ".join(
                f"{name} {'whole' if lay is None else f'by dim {lay.dim}'}" for name, lay in found.items()
            )
            raise ConfigError(
                f"One parameter of {type(module).__name__} is in several modules, and the plan divides it differently: {words}. "
                "Give all of them a style ('rowwise' for an Embedding goes with 'colwise_gather' for the head that shares its "
                "weight), or none."
            )


def _check_heads(module: nn.Module, modules: Mapping[str, ParallelModule], ranks: int) -> None:
    """Refuse attention whose heads the ranks do not divide, as far as modules say how many they have."""
    looked_at: set[str] = set()
    for name, entry in modules.items():
        if entry.gathers or not entry.style.startswith("colwise"):
            continue
        owner = name.rpartition(".")[0]
        if owner in looked_at:
            continue
        looked_at.add(owner)
        parent = module.get_submodule(owner)
        for names, what in ((_HEADS, "heads"), (_KEY_VALUE_HEADS, "key/value heads")):
            heads = _number(parent, names)
            if heads is not None and _is_attention(parent):
                check_heads(owner, heads, ranks, what=what)


def _number(module: nn.Module, names: Iterable[str]) -> int | None:
    for holder in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def _is_attention(module: nn.Module) -> bool:
    return (
        "attention" in type(module).__name__.lower()
        or "attn" in type(module).__name__.lower()
        or any(hasattr(module, name) for name in _HEADS)
    )


def _check_head(module: nn.Module, modules: Mapping[str, ParallelModule]) -> None:
    last = [name for name, entry in modules.items() if entry.style.startswith("colwise")]
    if not last or not any(name.rpartition(".")[2] in ("head", "lm_head", "output", "classifier") for name in last):
        raise ConfigError(
            f"TensorParallel(loss_parallel=True) leaves logits divided by classes, and no head of {type(module).__name__} is in "
            "the plan. Add it to the plan with the style 'colwise', or leave loss_parallel out."
        )


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    for part in path.split("."):
        child = module._modules.get(part)
        if child is None:
            return None
        module = child
    return module


def _is_layer(module: nn.Module | None) -> bool:
    return module is not None and bool(module._parameters)
