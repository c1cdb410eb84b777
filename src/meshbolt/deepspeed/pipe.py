"""`deepspeed.pipe`: a module that is written as a list of layers, and which of them each stage of a pipeline has.

What DeepSpeed needs such a list for, meshbolt does with any module; here the list says where the stages begin. Names of
parameters, where stages begin and how weights are drawn are as there, so that a script's numbers stay what they were.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from meshbolt.blocks import Recompute, recompute_blocks
from meshbolt.deepspeed import checkpointing
from meshbolt.deepspeed.partition import partition_balanced, partition_uniform
from meshbolt.deepspeed.topology import (
    PipeDataParallelTopology,
    PipelineParallelGrid,
    PipeModelDataParallelTopology,
    ProcessTopology,
    rank_and_world,
)
from meshbolt.engine.random_state import Snapshot
from meshbolt.errors import ConfigError, UnsupportedError, did_you_mean
from meshbolt.pipeline import PipelinePlan, plan_of_layers

__all__ = [
    "LayerSpec",
    "PipeDataParallelTopology",
    "PipeModelDataParallelTopology",
    "PipelineModule",
    "ProcessTopology",
    "TiedLayerSpec",
]
METHODS = ("parameters", "uniform", "type:")
_SEEDS = 2**32


class LayerSpec:
    """A layer that is built when the module that it belongs to is.

    Attributes:
        typename: its class.
        module_args: arguments of that.
        module_kwargs: keyword arguments of that.

    Example:
        >>> LayerSpec(nn.Linear, 8, 8, bias=False).build()
        Linear(in_features=8, out_features=8, bias=False)
    """

    def __init__(self, typename: type[nn.Module], *module_args: Any, **module_kwargs: Any) -> None:
        if not (isinstance(typename, type) and issubclass(typename, nn.Module)):
            raise ConfigError(
                f"{type(self).__name__}({typename!r}) is to name a class of modules. Give the class, not an instance; functions "
                "go into the list of layers as they are."
            )
        self.typename, self.module_args, self.module_kwargs = typename, module_args, module_kwargs

    def __repr__(self) -> str:
        """Return it as it is written."""
        words = [*map(repr, self.module_args), *(f"{key}={value!r}" for key, value in self.module_kwargs.items())]
        return f"{self.typename.__name__}({', '.join(words)})"

    def build(self, log: bool = False) -> nn.Module:
        """Return the layer.

        Args:
            log: without effect.
        """
        return self.typename(*self.module_args, **self.module_kwargs)


class TiedLayerSpec(LayerSpec):
    """A layer whose parameters are those of all others with the same key.

    Attributes:
        key: by which they are found.
        forward_fn: called with the layer and its input, in the place of its forward; None: the forward.
        tied_weight_attr: names of the parameters that DeepSpeed ties; here all that several places use are one.

    Example:
        >>> head = lambda embedding, x: x @ embedding.weight.T
        >>> layers = [TiedLayerSpec("words", nn.Embedding, 9, 4), TiedLayerSpec("words", nn.Embedding, 9, 4, forward_fn=head)]
    """

    def __init__(
        self,
        key: str,
        typename: type[nn.Module],
        *module_args: Any,
        forward_fn: Callable[[nn.Module, Any], Any] | None = None,
        tied_weight_attr: str | Sequence[str] = ("weight",),
        **module_kwargs: Any,
    ) -> None:
        super().__init__(typename, *module_args, **module_kwargs)
        self.key, self.forward_fn = key, forward_fn
        self.tied_weight_attr = [tied_weight_attr] if isinstance(tied_weight_attr, str) else list(tied_weight_attr)


class _Function(nn.Module):
    """A function in its place among layers, so that a stage can begin with it."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, inputs: Any) -> Any:
        """Call it."""
        return self.function(inputs)


class _Tied(nn.Module):
    """A use of a layer whose parameters have their name elsewhere."""

    def __init__(self, owner: nn.ModuleDict, key: str, function: Callable[[nn.Module, Any], Any] | None) -> None:
        super().__init__()
        self._owner, self.key, self._use = (owner,), key, function  # in a tuple, or they would have a second name here

    @property
    def layer(self) -> nn.Module:
        """The layer that has the parameters."""
        return self._owner[0][self.key]

    def forward(self, inputs: Any) -> Any:
        """Use it."""
        return self.layer(inputs) if self._use is None else self._use(self.layer, inputs)


class PipelineModule(nn.Module):
    """Layers that are called one after the other, each with what the one before has returned, as stages of a pipeline.

    `initialize` trains it by `engine.train_batch`. Every rank builds all layers, and keeps those of its stage from then on.

    Attributes:
        num_stages: ranks among which the layers are distributed.
        parts: numbers of the layers with which stages begin, and of layers at the end.
        loss_fn: takes outputs and labels, and returns a loss; None: the last layer returns it.
        cuts: names of the layers with which stages 1, 2, ... begin.

    Raises:
        ConfigError: the arguments make no sense, or there are fewer layers than stages.
        UnsupportedError: they ask for what is not there.

    Example:
        >>> layers = [LayerSpec(nn.Linear, 4, 4), torch.relu, LayerSpec(nn.Linear, 4, 1)]
        >>> PipelineModule(layers, num_stages=2, loss_fn=nn.functional.mse_loss, partition_method="uniform").parts
        [0, 2, 3]
    """

    def __init__(
        self,
        layers: Iterable[LayerSpec | nn.Module | Callable[[Any], Any]],
        num_stages: int | None = None,
        topology: ProcessTopology | None = None,
        loss_fn: Callable[[Any, Any], Any] | None = None,
        seed_layers: bool = False,
        seed_fn: Callable[[int], None] | None = None,
        base_seed: int = 1234,
        partition_method: str = "parameters",
        activation_checkpoint_interval: int = 0,
        activation_checkpoint_func: Callable[..., Any] | None = None,
        checkpointable_layers: list[str] | None = None,
        dynamic_shape: bool = False,
    ) -> None:
        super().__init__()
        specs = list(layers)
        self.num_stages = _stages(num_stages, topology)
        _check(specs, self.num_stages, activation_checkpoint_func, checkpointable_layers)
        self._topo = topology
        self.loss_fn = loss_fn
        self.seed_layers, self.seed_fn, self.base_seed = seed_layers, seed_fn or _seed_all, base_seed
        self.checkpointable_layers = checkpointable_layers
        self.dynamic_shape = dynamic_shape  # shapes are looked at for each microbatch anyway
        self.micro_offset = 0
        self.activation_checkpoint_interval = 0
        self.tied_modules = nn.ModuleDict()
        counts = _parameters_of(specs) if partition_method.lower() == "parameters" else None
        self.parts = _parts(specs, self.num_stages, partition_method, counts)
        self._build(specs)
        self._no_split_modules = _repeated(self.layers)
        self.set_checkpoint_interval(activation_checkpoint_interval)

    @property
    def layers(self) -> list[nn.Module]:
        """The layers in their order; functions and uses of a tied layer are modules, too."""
        return [self._modules[str(index)] for index in range(self.parts[-1])]  # type: ignore[misc]

    @property
    def forward_funcs(self) -> list[Callable[..., Any]]:
        """The layers as they were given."""
        return [layer.function if isinstance(layer, _Function) else layer for layer in self.layers]

    @property
    def cuts(self) -> list[str]:
        """The names of the layers with which stages 1, 2, ... begin."""
        return [str(index) for index in self.parts[1:-1]]

    @property
    def tied_prefixes(self) -> dict[str, str]:
        """By what the number of a tied layer begins a name in files that DeepSpeed writes layer by layer, what it begins here."""
        uses = ((name, layer) for name, layer in self.named_children() if isinstance(layer, _Tied))
        return {f"{name}.": f"tied_modules.{layer.key}." for name, layer in uses}

    def forward(self, forward_input: Any) -> Any:
        """Call the layers one after the other."""
        self.micro_offset += 1
        for layer in self.layers:
            forward_input = layer(forward_input)
        return forward_input

    # Stages ---------------------------------------------------------------------------------------------------------------

    @property
    def stage_id(self) -> int:
        """The stage of this rank."""
        rank, world = rank_and_world()
        return rank * self.num_stages // max(world, self.num_stages)

    def partitions(self) -> list[int]:
        """Return the numbers of the layers with which stages begin, and how many layers there are."""
        return list(self.parts)

    def num_pipeline_stages(self) -> int:
        """Return the number of stages."""
        return self.num_stages

    def stage_owner(self, layer_idx: int) -> int:
        """Return the stage of a layer.

        Args:
            layer_idx: its number.

        Raises:
            ConfigError: there is no such layer.
        """
        if not 0 <= layer_idx < self.parts[-1]:
            raise ConfigError(f"stage_owner({layer_idx}): there are {self.parts[-1]} layers, numbered from 0.")
        return next(stage for stage, end in enumerate(self.parts[1:]) if layer_idx < end)

    def topology(self) -> ProcessTopology:
        """Return where each rank stands."""
        if self._topo is not None:
            return self._topo
        return PipeDataParallelTopology(self.num_stages, max(rank_and_world()[1] // self.num_stages, 1))

    def mpu(self) -> PipelineParallelGrid:
        """Return who asks where this rank stands."""
        return PipelineParallelGrid(self.topology())

    def plan_of_stages(self) -> PipelinePlan:
        """Return which stages use each parameter."""
        stages_of: dict[str, set[int]] = {}
        by_parameter: dict[int, list[str]] = {}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            by_parameter.setdefault(id(parameter), []).append(name)
        for index, layer in enumerate(self.layers):
            used = layer.layer if isinstance(layer, _Tied) else layer
            for parameter in used.parameters():
                for name in by_parameter[id(parameter)]:
                    stages_of.setdefault(name, set()).add(self.stage_owner(index))
        names = (name for names in by_parameter.values() for name in names)
        return plan_of_layers(self.cuts, {name: tuple(sorted(stages_of.get(name, {0}))) for name in names})

    def take_settings(self, settings: dict[str, Any], *, microbatches: int) -> None:
        """Put where stages begin into the arguments of a strategy, and take from them what is done here.

        Args:
            settings: changed in place.
            microbatches: of a step.
        """
        if settings.pop("recompute", None) is not None:
            self.set_checkpoint_interval(self.activation_checkpoint_interval or 1)
        if self.num_stages > 1:
            asked = settings["pipeline_parallel"]
            settings["pipeline_parallel"] = dataclasses.replace(asked, cuts=self.cuts, microbatches=microbatches)

    # Activations ----------------------------------------------------------------------------------------------------------

    def set_checkpoint_interval(self, interval: int) -> None:
        """Compute activations again in the backward pass; each layer by itself, so that results are those of any interval.

        Args:
            interval: 0: keep them.

        Raises:
            ConfigError: it is no number, or would take back what was asked for before.
        """
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 0:
            raise ConfigError(f"activation_checkpoint_interval={interval!r} is no number of layers. Use 0 or more.")
        before, self.activation_checkpoint_interval = self.activation_checkpoint_interval, interval
        if bool(before) == bool(interval):
            return
        if before:
            raise ConfigError(
                "set_checkpoint_interval(0): layers compute their activations again already. Say so before."
            )
        chosen = [layer for layer in self.layers if self._is_checkpointable(layer)]
        if chosen:
            recompute_blocks(chosen, Recompute(mode="full"))

    def _is_checkpointable(self, layer: nn.Module) -> bool:
        used = layer.layer if isinstance(layer, _Tied) else layer
        if self.checkpointable_layers is not None:
            return type(used).__name__ in self.checkpointable_layers
        return next(used.parameters(), None) is not None

    # Building -------------------------------------------------------------------------------------------------------------

    def _build(self, specs: Sequence[Any]) -> None:
        """Build every layer with the random numbers that it gets where each stage builds its own only."""
        cpu = torch.device("cpu")
        before, after = Snapshot.take(cpu), None
        for start, end in zip(self.parts, self.parts[1:], strict=False):
            before.restore()
            here: set[str] = set()
            for index in range(start, end):
                if self.seed_layers:
                    self.seed_fn(self.base_seed + index)
                self.add_module(str(index), self._layer(specs[index], here))
            after = after or Snapshot.take(cpu)
        if after is not None:
            after.restore()
        if self.seed_layers:
            for index, layer in enumerate(self.layers):
                layer.register_forward_pre_hook(functools.partial(self._seed_before, index))

    def _layer(self, spec: Any, here: set[str]) -> nn.Module:
        if isinstance(spec, TiedLayerSpec):
            if spec.key not in here:
                here.add(spec.key)
                made = spec.build()  # also where another stage has it: what is drawn next follows
                if spec.key not in self.tied_modules:
                    self.tied_modules[spec.key] = made
            return _Tied(self.tied_modules, spec.key, spec.forward_fn)
        if isinstance(spec, LayerSpec):
            return spec.build()
        return spec if isinstance(spec, nn.Module) else _Function(spec)

    def _seed_before(self, index: int, _layer: nn.Module, _inputs: Any) -> None:
        start = self.parts[self.stage_owner(index)]
        if interval := self.activation_checkpoint_interval:
            # DeepSpeed counts from the beginning of what it computes again at once.
            index = start + (index - start) % interval
        self.seed_fn(self.base_seed * (self.micro_offset + 1) + index)


# What is checked and counted ----------------------------------------------------------------------------------------------


def _stages(num_stages: int | None, topology: ProcessTopology | None) -> int:
    if topology is not None:
        topology.check()
        return topology.get_dim("pipe")
    if num_stages is None:
        raise ConfigError(
            "PipelineModule was given neither num_stages nor a topology. Give num_stages=2, or as many as you want."
        )
    if isinstance(num_stages, bool) or not isinstance(num_stages, int) or num_stages < 1:
        raise ConfigError(f"PipelineModule(num_stages={num_stages!r}) is not a number of stages. Use 1 or more.")
    world = rank_and_world()[1]
    if world > 1 and world % num_stages:
        fitting = [count for count in range(1, world + 1) if world % count == 0]
        raise ConfigError(
            f"PipelineModule(num_stages={num_stages}): {world} ranks are no multiple of {num_stages}. Use one of {fitting}, or "
            "start other ranks."
        )
    return num_stages


def _check(specs: Sequence[Any], stages: int, function: Any, checkpointable: Any) -> None:
    for index, spec in enumerate(specs):
        if isinstance(spec, PipelineModule):
            raise UnsupportedError(f"Layer {index} is a PipelineModule itself. Put its layers into the list.")
        if not callable(spec) and not isinstance(spec, LayerSpec):
            raise ConfigError(
                f"Layer {index} is {spec!r}, and has to be a LayerSpec, a module or a function of one argument."
            )
    if len(specs) < stages:
        raise ConfigError(
            f"PipelineModule was given {len(specs)} layers for {stages} stages, and each stage needs one. Use fewer stages."
        )
    known = (None, checkpointing.checkpoint, checkpointing.non_reentrant_checkpoint)
    if function not in known:
        raise UnsupportedError(
            f"PipelineModule(activation_checkpoint_func={function!r}): activations are computed again by torch. Leave it out."
        )
    if checkpointable is not None and not isinstance(checkpointable, list):
        raise ConfigError(f"PipelineModule(checkpointable_layers={checkpointable!r}): give a list of names of classes.")


def _parameters_of(specs: Sequence[Any]) -> list[int]:
    """Return how many trained parameters each layer has; layers are built for that one at a time, which draws their weights."""
    counts = []
    for spec in specs:
        layer = spec.build() if isinstance(spec, LayerSpec) else spec
        parameters = layer.parameters() if isinstance(layer, nn.Module) else ()
        counts.append(sum(each.numel() for each in parameters if each.requires_grad))
    return counts


def _parts(specs: Sequence[Any], stages: int, method: str, counts: Sequence[int] | None) -> list[int]:
    lower = method.lower()
    if counts is not None:
        return partition_balanced(counts, stages)
    if lower == "uniform":
        return partition_uniform(len(specs), stages)
    if lower.startswith("type:"):
        pattern = re.compile(method.partition(":")[2], re.IGNORECASE)
        matches = [int(pattern.search(_name_of(spec)) is not None) for spec in specs]
        if not any(matches):
            names = sorted({_name_of(spec) for spec in specs} - {""})
            raise ConfigError(f"partition_method={method!r} matches no layer; their classes are {', '.join(names)}.")
        return partition_balanced(matches, stages)
    raise ConfigError(
        f"partition_method={method!r} is unknown{did_you_mean(method, METHODS)}. Use 'parameters', 'uniform' or "
        "'type:' with a pattern for the names of classes."
    )


def _name_of(spec: Any) -> str:
    if isinstance(spec, LayerSpec):
        return spec.typename.__name__
    return type(spec).__name__ if isinstance(spec, nn.Module) else str(getattr(spec, "__name__", ""))


def _repeated(layers: Sequence[nn.Module]) -> list[str]:
    """Return the classes of the layers that are repeated and more than one layer of torch's, which are sharded one by one."""
    counts = Counter(type(layer) for layer in layers if next(layer.children(), None) is not None)
    return sorted({kind.__name__ for kind, count in counts.items() if count > 1})


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % _SEEDS)
    torch.manual_seed(seed % 2**63)
