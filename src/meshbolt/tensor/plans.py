"""Which layers are divided, and by which style: the user's mapping, a registered plan, or the model's own."""

from __future__ import annotations

import fnmatch
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from torch import nn

from meshbolt.errors import ConfigError, UnsupportedError, did_you_mean
from meshbolt.tensor.families import KNOWN, Styles
from meshbolt.tensor.setting import TensorParallel
from meshbolt.tensor.styles import ParallelModule, check_heads, parallel_module

TRACED = "traced"
"""Not a registered plan, but one that is found by looking at the forward."""

OWN_PLAN = "_tp_plan"
"""The plan that a Hugging Face model brings, and the name under which it can be asked for."""

Trace = Callable[[], tuple[Styles, Mapping[str, str]]]
"""Finds styles by looking at a forward, and says why layers are left out."""

_HEADS = ("num_heads", "n_head", "n_heads", "nhead", "num_attention_heads")
_OUTPUTS = (
    *("head", "lm_head", "output", "classifier", "decoder", "score", "embed_out", "fc_out", "output_projection"),
    *("generator_lm_head", "vocab_projector"),
)
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head")


@dataclass(frozen=True)
class TensorPlan:
    """What is divided.

    Attributes:
        name: of the plan: that of a registered one, "mapping", "the model's _tp_plan" or "traced".
        modules: by name, in the order of the module.
        sequence: whether activations between parallel layers are divided along the sequence.
        insists: whether a sequence that the ranks do not divide is refused.
        left_out: layers that stay whole, by name, and why.
    """

    name: str
    modules: Mapping[str, ParallelModule]
    sequence: bool
    insists: bool = field(default=False, kw_only=True)
    left_out: Mapping[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Return the plan in words, one line for layers that are alike."""
        shown = Counter((pattern_of(name), entry.style) for name, entry in self.modules.items())
        lines = [
            f"{pattern}: {style}{f' (x{count})' if count > 1 else ''}" for (pattern, style), count in shown.items()
        ]
        reasons = dict.fromkeys((pattern_of(name), reason) for name, reason in self.left_out.items())
        return [*lines, *(f"{pattern}: whole, {reason}" for pattern, reason in reasons)]


_FROM_HUGGING_FACE = MappingProxyType(
    {
        "colwise": "colwise",
        "rowwise": "rowwise",
        "colwise_rep": "colwise_gather?",
        "colwise_gather_output": "colwise_gather?",
        "embedding_rowwise": "rowwise?",
        "vocab_rowwise": "rowwise?",
        "rowwise_split_input": "rowwise",
        "rowwise_rep": "rowwise",
        "replicated_with_grad_allreduce": "replicate",
        "replicated": "replicate",
        "replicate": "replicate",
        "sequence_parallel": "replicate",
    }
)


def choose_plan(
    module: nn.Module,
    setting: TensorParallel,
    *,
    ranks: int,
    trace: Trace,
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
    chosen = _chosen(module, setting, trace)
    _check_heads(module, chosen.styles, ranks)
    left_out = dict(chosen.left_out)
    modules: dict[str, ParallelModule] = {}
    for path, child in module.named_modules():
        style = chosen.styles.get(path)
        if style is None:
            continue
        if style == "colwise_gather" and setting.loss_parallel and _is_head(path):
            style = "colwise"
        try:
            entry = parallel_module(path, child, style, ranks=ranks)
        except ConfigError as error:
            if path not in chosen.optional:
                raise
            left_out[path] = error.args[0].partition(". ")[0]
            continue
        if entry is not None:
            modules[path] = _in_its_place(module, path, entry)
    _settle_tied(module, modules, left_out, optional=chosen.optional)
    if not any(path not in chosen.optional for path in modules):
        whole = "".join(f"\n  {line}" for line in TensorPlan(chosen.name, {}, False, left_out).lines())
        raise ConfigError(
            f"tensor_parallel={ranks} found nothing to divide in {type(module).__name__} (plan {chosen.name!r}). Name its layers "
            f"in TensorParallel(plan={{pattern: style}}), or leave tensor_parallel out.{whole}"
        )
    if setting.loss_parallel:
        _check_head(module, modules, left_out)
    sequence = setting.sequence_parallel
    return TensorPlan(chosen.name, modules, sequence is not False, left_out, insists=sequence is True)


@dataclass(frozen=True)
class _Chosen:
    """Styles before they are looked at one by one.

    Attributes:
        name: of the plan.
        styles: by name of the module.
        optional: names of modules that need not be divided.
        left_out: names of modules that stay whole, and why.
    """

    name: str
    styles: Styles
    optional: frozenset[str] = frozenset()
    left_out: Mapping[str, str] = field(default_factory=dict)


def _chosen(module: nn.Module, setting: TensorParallel, trace: Trace) -> _Chosen:
    plan = setting.plan
    if not isinstance(plan, str):
        return _Chosen("mapping", _matched(module, plan))
    if plan == TRACED:
        return _traced(trace)
    if plan == OWN_PLAN:
        own = _own_plan(module)
        if own is None:
            raise ConfigError(
                f"TensorParallel(plan={OWN_PLAN!r}) asks for the plan that a Hugging Face model brings, and "
                f"{type(module).__name__} holds no model with one. Use 'auto', one of {', '.join(KNOWN)}, or a mapping."
            )
        return _with_optional(f"the model's {OWN_PLAN}", own)
    if plan != "auto":
        if plan not in KNOWN:
            raise ConfigError(
                f"There is no registered plan {plan!r}{did_you_mean(plan, KNOWN)}. Give one of these, "
                f"a mapping from patterns of module names to styles, {OWN_PLAN!r} for what the model itself brings, or 'auto'."
            )
        return _with_optional(plan, KNOWN[plan].styles_in(module))
    return _known(module) or _traced(trace)


def _traced(trace: Trace) -> _Chosen:
    styles, left_out = trace()
    return _Chosen(TRACED, styles, left_out=left_out)


def _known(module: nn.Module) -> _Chosen | None:
    """Return what registered plans find, and what the model's own plan has besides; None for nothing."""
    found = {name: styles for name, known in KNOWN.items() if (styles := known.styles_in(module))}
    left_out: dict[str, str] = {}
    try:
        own = _own_plan(module)
    except UnsupportedError as error:
        if not found:
            raise
        own, left_out = None, {f"the rest of the model's {OWN_PLAN}": error.args[0].partition(". ")[0]}
    merged: dict[str, str] = {}
    names = []
    # The plan that knows most of the module comes first, and gives it its name.
    for name, styles in sorted(found.items(), key=lambda item: -len(item[1])):
        if styles.keys() - merged.keys():
            names.append(name)
            merged = {**styles, **merged}
    if own and any(style != "replicate" for path, style in own.items() if path not in merged):
        names.append(f"the model's {OWN_PLAN}")
        merged = {**own, **merged}
    return _with_optional(" + ".join(names), merged, left_out) if merged else None


def _with_optional(name: str, styles: Styles, left_out: Mapping[str, str] = MappingProxyType({})) -> _Chosen:
    plain = {path: style.removesuffix("?") for path, style in styles.items()}
    optional = frozenset(path for path, style in styles.items() if style.endswith("?"))
    return _Chosen(name, plain, optional, left_out)


def _in_its_place(module: nn.Module, path: str, entry: ParallelModule) -> ParallelModule:
    """Return a parallel module whose sequence is where its surroundings have it: first, around attention without batch_first."""
    if not entry.sums or entry.style == "heads":
        return entry
    while path:
        path = path.rpartition(".")[0]
        for child in module.get_submodule(path).modules():
            if isinstance(child, nn.MultiheadAttention):
                return entry if child.batch_first else replace(entry, sequence_dim=0)
    return entry


def _matched(module: nn.Module, plan: Mapping[str, str]) -> dict[str, str]:
    names = [name for name, _ in module.named_modules() if name]
    styles: dict[str, str] = {}
    for pattern, style in plan.items():
        found = [name for name in names if matches(name, pattern)]
        if not found:
            known = {pattern_of(name) for name in names}
            raise ConfigError(
                f"TensorParallel.plan: the pattern {pattern!r} matches no module of {type(module).__name__}"
                f"{did_you_mean(pattern, known)}. Patterns are compared part by part with names from named_modules(); '*' stands "
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


def pattern_of(name: str) -> str:
    """Return the pattern that a module's name shares with those of its kind in other blocks.

    Example:
        >>> pattern_of("layers.3.attn.wq")
        'layers.*.attn.wq'
    """
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


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
            f"The _tp_plan of {type(model).__name__} gives {pattern!r} the style {style!r}, which is not supported. Give a plan "
            "of your own, TensorParallel(plan={pattern: style}), that leaves such layers out."
        )
    return known


def _settle_tied(
    module: nn.Module, modules: dict[str, ParallelModule], left_out: dict[str, str], *, optional: frozenset[str]
) -> None:
    """Divide parameters that are in several modules in all of them alike, or in none."""
    for names in _tied(module):
        places = {name: _place(name, modules) for name in names}
        layouts = {name: modules[at].layouts[key] if at else None for name, (at, key) in places.items()}
        if len(set(layouts.values())) == 1:
            continue
        divided = {name: at for name, (at, _) in places.items() if at}
        if all(name.endswith(".bias") for name in divided):
            # A column-parallel layer takes its part of a whole bias in its forward.
            for at in divided.values():
                kept = {key: layout for key, layout in modules[at].layouts.items() if key != "bias"}
                modules[at] = replace(modules[at], layouts=kept)
            continue
        if set(divided.values()) <= optional:
            whole = next(name for name in names if name not in divided or layouts[name] != layouts[next(iter(divided))])
            for at in divided.values():
                del modules[at]
                left_out[at] = f"its weight is also {whole}, which is not divided so"
            continue
        words = ", ".join(
            f"{name} {'whole' if layout is None else f'by dim {layout.dim}'}" for name, layout in layouts.items()
        )
        raise ConfigError(
            f"One parameter of {type(module).__name__} is in several modules, and the plan divides it differently: {words}. "
            "Give all of them a style ('rowwise' for an Embedding goes with 'colwise_gather' for the head that shares its "
            "weight), or none."
        )


def _tied(module: nn.Module) -> list[list[str]]:
    """Return, for parameters in several modules, all their names."""
    places: dict[int, list[str]] = {}
    # A module that stands in several places is one module.
    for prefix, child in module.named_modules():
        for key, parameter in child.named_parameters(prefix, recurse=False, remove_duplicate=False):
            places.setdefault(id(parameter), []).append(key)
    return [names for names in places.values() if len(names) > 1]


def _place(name: str, modules: Mapping[str, ParallelModule]) -> tuple[str, str]:
    """Return the parallel module that divides a parameter, and the parameter's name in it; two empty strings for none."""
    for at, entry in modules.items():
        key = name[len(at) + 1 :] if at else name
        if name.startswith(f"{at}." if at else "") and key in entry.layouts:
            return at, key
    return "", ""


def _check_heads(module: nn.Module, styles: Styles, ranks: int) -> None:
    """Refuse attention whose heads the ranks do not divide, as far as modules say how many they have."""
    owners = dict.fromkeys(path.rpartition(".")[0] for path, style in styles.items() if _leaves_heads_divided(style))
    for owner in owners:
        parent = module.get_submodule(owner)
        if not _is_attention(parent):
            continue
        counts = {"heads": _number(parent, _HEADS), "key/value heads": _number(parent, _KEY_VALUE_HEADS)}
        known = {what: count for what, count in counts.items() if count}
        for what, count in known.items():
            check_heads(owner, count, ranks, what=what, fitting=math.gcd(*known.values()))


def _leaves_heads_divided(style: str) -> bool:
    return style.startswith("colwise") and not style.startswith("colwise_gather")


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


def _check_head(module: nn.Module, modules: Mapping[str, ParallelModule], left_out: Mapping[str, str]) -> None:
    if any(_is_head(path) and entry.style.startswith("colwise") for path, entry in modules.items()):
        return
    reason = next((f" ({path} stays whole: {why})" for path, why in left_out.items() if _is_head(path)), "")
    raise ConfigError(
        f"TensorParallel(loss_parallel=True) leaves logits divided by classes, and no head of {type(module).__name__} is in the "
        f"plan{reason}. Add it to a mapping with the style 'colwise', or leave loss_parallel out."
    )


def _is_head(path: str) -> bool:
    return path.rpartition(".")[2] in _OUTPUTS
