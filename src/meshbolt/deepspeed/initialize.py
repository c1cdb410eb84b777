"""`initialize`: from a model, an optimizer and a file of DeepSpeed's to an engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from meshbolt.deepspeed.alike import compare_optimizers, compare_schedulers, on_all
from meshbolt.deepspeed.data import DeepSpeedDataLoader
from meshbolt.deepspeed.engine import DeepSpeedEngine
from meshbolt.deepspeed.pipe import PipelineModule
from meshbolt.deepspeed.pipe_engine import PipelineEngine
from meshbolt.deepspeed.ranks import PORT, init_distributed, place_of_this_process
from meshbolt.deepspeed.receipts import in_a_loop
from meshbolt.deepspeed.run import Config, Run, begin
from meshbolt.deepspeed.zero import end_init
from meshbolt.errors import ConfigError, UnsupportedError

_log = logging.getLogger(__name__)
_SIXTEEN = (torch.float16, torch.bfloat16)

Made = tuple[DeepSpeedEngine, Optimizer | None, DeepSpeedDataLoader | None, Any]


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Optimizer | Callable[[Any], Optimizer] | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Any = None,
    lr_scheduler: LRScheduler | Callable[[Optimizer], Any] | None = None,
    distributed_port: int = PORT,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    config: Config | None = None,
    mesh_param: Any = None,
    config_params: Config | None = None,
    *,
    deepspeed_version: str | None = None,
) -> Made:
    """Shard a model as DeepSpeed's JSON says, and return the engine that trains it in DeepSpeed's loop.

    Args:
        args: of the script: its `deepspeed_config` is the file, and its `local_rank` is set.
        model: any module.
        optimizer: made on the model's parameters, or a function that makes one of them; None: the file's.
        model_parameters: to be trained by an optimizer that is made here, or groups of them; None: all.
        training_data: a dataset, for the loader that is returned.
        lr_scheduler: of `optimizer`, or a function that makes one of an optimizer; None: the file's.
        distributed_port: where rank 0 listens, unless MASTER_PORT says.
        mpu: None; layers are divided by "tensor_parallel" in the file.
        dist_init_required: False: ranks must be connected already.
        collate_fn: makes a batch of samples.
        config: path of the JSON file, or what it says as a dictionary.
        mesh_param: None; the mesh follows from the file.
        config_params: an old name of `config`.
        deepspeed_version: that the file was written for, such as "0.19.8", whose defaults then count: since 0.19.3 gradients
            are clipped to a norm of 1.0 where the file does not say.

    Returns:
        The engine, its optimizer, the loader of `training_data`, and the scheduler; each None where there is none.

    Raises:
        ConfigError: arguments or keys of the file are missing, wrong, or contradict each other.
        UnsupportedError: something is asked for that is not there.
        TopologyError: ranks were given different settings; on every rank.

    Example:
        >>> engine, optimizer, loader, scheduler = deepspeed.initialize(model=model, config="ds_config.json")
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"initialize(model={type(model).__name__}): give a torch.nn.Module.")
    if mpu is not None or mesh_param is not None:
        raise UnsupportedError(
            "initialize(mpu=..., mesh_param=...): groups of ranks are not a script's to give. Layers are divided by "
            '"tensor_parallel": {"autotp_size": 2} in the JSON, stages by "pipeline"; leave both out.'
        )
    _check_optimizer(optimizer, lr_scheduler)
    init_distributed(distributed_port=distributed_port, dist_init_required=dist_init_required)
    run = begin(
        _config(args, config, config_params),
        deepspeed_version=deepspeed_version,
        pipeline=model if isinstance(model, PipelineModule) else None,
    )
    if getattr(args, "local_rank", None) is not None:
        args.local_rank = place_of_this_process().local_rank
    end_init(model)
    _say(run, optimizer, lr_scheduler)
    module = _in_precision(model, run)
    made = on_all(lambda: _optimizer(optimizer, module, model_parameters, run), run.group)
    compare_optimizers(made, run.group)
    engine = _engine_class(model, run)(module, run=run, optimizer=made)
    engine.collate_fn = collate_fn
    engine.lr_scheduler = on_all(lambda: _scheduler(lr_scheduler, made, run), run.group)
    compare_schedulers(engine.lr_scheduler, run.group)
    if training_data is not None:
        engine.take_training_data(training_data)
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def _config(args: Any, config: Config | None, config_params: Config | None) -> Config:
    given = {
        "args.deepspeed_config": getattr(args, "deepspeed_config", None),
        "args.deepscale_config": getattr(args, "deepscale_config", None),
        "config": config,
        "config_params": config_params,
    }
    found = {name: value for name, value in given.items() if value is not None}
    if len(found) > 1:
        raise ConfigError(f"initialize was given {' and '.join(found)}, of which one can count. Leave the others out.")
    if not found:
        raise ConfigError(
            "initialize was given no configuration. Give config= (a path of a JSON file, or a dictionary), or args with "
            "deepspeed_config."
        )
    return next(iter(found.values()))


def _check_optimizer(optimizer: Any, scheduler: Any) -> None:
    if optimizer is not None and not isinstance(optimizer, Optimizer) and not callable(optimizer):
        raise ConfigError(
            f"initialize(optimizer={type(optimizer).__name__}): give a torch.optim.Optimizer, or a function of parameters that "
            "makes one."
        )
    if scheduler is None or (callable(scheduler) and not hasattr(scheduler, "step")):
        return
    if not hasattr(scheduler, "step"):
        raise ConfigError(
            f"initialize(lr_scheduler={type(scheduler).__name__}): give a scheduler of torch.optim.lr_scheduler, or a function "
            "of an optimizer that makes one."
        )
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(
            "initialize was given lr_scheduler, which was made for an optimizer, and not that optimizer. Give optimizer= too, "
            "or a function of an optimizer: lr_scheduler=lambda optimizer: ..."
        )
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ConfigError(
            "initialize was given lr_scheduler and optimizer, and the scheduler was made for another one. Make it for this one."
        )


def _say(run: Run, optimizer: Any, scheduler: Any) -> None:
    """Print what became of every key, on rank 0."""
    translation = run.translation
    has_optimizer = optimizer is not None or translation.optimizer is not None
    unused = "" if optimizer is None else "initialize(optimizer=...) is used instead"
    late = "" if scheduler is None else "initialize(lr_scheduler=...) is used instead"
    if not has_optimizer:
        late = "there is no optimizer, so that the engine evaluates only"
    if dist.get_rank() == 0:
        in_a_loop(run, optimizer=unused, scheduler=late).show()
        if unused and translation.optimizer is not None:
            _log.warning("%s: 'optimizer' is not used, since initialize was given one.", translation.receipt.source)


def _in_precision(model: nn.Module, run: Run) -> nn.Module:
    """Return the module with its parameters in the dtype in which shards are kept.

    Raises:
        ConfigError: it is in 16 bits and the file asks for float32.
    """
    precision: Any = run.translation.precision
    module = run.strategy.precision.convert_module(model)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    odd = sorted({str(parameter.dtype) for parameter in trained if parameter.dtype in _SIXTEEN})
    if not odd or (precision is not None and precision.flag.endswith("-true") and precision.flag != "32-true"):
        return module
    if precision is None or precision.flag == "32-true":
        raise ConfigError(
            f"The model's parameters are in {' and '.join(odd)}, and {run.translation.receipt.source} asks for float32. Add "
            '"bf16": {"enabled": true}, or build the model in float32.'
        )
    for parameter in trained:
        if parameter.dtype in _SIXTEEN:
            # Master weights, of which 16-bit copies are gathered.
            parameter.data = parameter.data.float()
    return module


def _optimizer(
    given: Optimizer | Callable[[Any], Optimizer] | None,
    module: nn.Module,
    model_parameters: Iterable[Any] | None,
    run: Run,
) -> Optimizer | None:
    """Return the optimizer on whole parameters: the caller's, else the file's."""
    if isinstance(given, Optimizer):
        if model_parameters is not None:
            _compare(given, model_parameters)
        return _without_empty_groups(given)
    if model_parameters is None:
        model_parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    parameters = list(model_parameters)
    if given is None and run.translation.optimizer is None:
        return None
    if not parameters:
        raise ConfigError(
            "There is no parameter to be trained: model_parameters is empty, or no parameter needs gradients."
        )
    made = given(parameters) if given is not None else run.translation.optimizer.build(parameters)  # type: ignore[union-attr]
    if not isinstance(made, Optimizer):
        raise ConfigError(
            f"initialize(optimizer=...) returned {type(made).__name__}. It has to return a torch.optim.Optimizer."
        )
    return _without_empty_groups(made)


def _without_empty_groups(optimizer: Optimizer) -> Optimizer:
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    return optimizer


def _compare(optimizer: Optimizer, model_parameters: Iterable[Any]) -> None:
    """Refuse parameters that the optimizer does not train: they would be left alone without a word.

    Raises:
        ConfigError: there are some.
    """
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    flat: list[Any] = []
    for each in model_parameters:
        flat.extend(each["params"] if isinstance(each, dict) else [each])
    others = sum(isinstance(each, nn.Parameter) and each.requires_grad and id(each) not in trained for each in flat)
    if others:
        raise ConfigError(
            f"initialize was given optimizer and model_parameters, and {others} of the latter are not in the optimizer. Leave "
            "model_parameters out, or make the optimizer of them."
        )


def _scheduler(given: Any, optimizer: Optimizer | None, run: Run) -> Any:
    """Return the scheduler: the caller's, else the file's."""
    if given is not None:
        if optimizer is None:
            raise ConfigError(
                "initialize was given lr_scheduler, and there is no optimizer. Give one, or leave it out."
            )
        return given if hasattr(given, "step") else given(optimizer)
    named = run.translation.scheduler
    if named is None or optimizer is None:
        return None
    late = {}
    if any(key.endswith("warmup_max_lr") for key in named.missing):
        late["warmup_max_lr"] = [group["lr"] for group in optimizer.param_groups]
    return named.build(optimizer, **late)


def _engine_class(model: nn.Module, run: Run) -> type[Any]:
    if isinstance(model, PipelineModule):
        return PipelineEngine
    if "pipeline_parallel" in run.translation.settings:
        raise UnsupportedError(
            f"{run.translation.receipt.source}: 'pipeline.stages' divides a model into stages, whose steps forward, backward and "
            "step cannot run one by one. Give initialize a PipelineModule and call engine.train_batch, use a Trainer with "
            "meshbolt.deepspeed.trainer_arguments, or leave 'pipeline' out."
        )
    return DeepSpeedEngine
