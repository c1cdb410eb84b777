"""The ways to train one model on several ranks that `run_step_time.py` compares; each in a fresh process."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import gpt
import torch
import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every contender is given.

    Attributes:
        steps: optimizer steps that are timed; `warmup` more come first.
        window: batches of one optimizer step.
        samples: of one batch of one rank.
        sizes: of the model.
    """

    steps: int = 10
    warmup: int = 3
    window: int = 1
    samples: int = 4
    sizes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of each timed step on one rank, and the last loss."""

    seconds: list[float]
    loss: float


def _adamw(module: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)


def _timed(step: Callable[[int], torch.Tensor], job: Job) -> Timing:
    seconds, loss = [], torch.zeros(())
    for index in range(job.warmup + job.steps):
        dist.barrier()
        start = time.perf_counter()
        loss = step(index)
        seconds.append(time.perf_counter() - start)
    return Timing(seconds=seconds[job.warmup :], loss=float(loss))


def _loop(net: torch.nn.Module, job: Job, between: Callable[[bool], Any]) -> Timing:
    optimizer, rank = _adamw(net), dist.get_rank()

    def step(index: int) -> torch.Tensor:
        loss = torch.zeros(())
        for k in range(job.window):
            with between(k == job.window - 1):
                loss = gpt.loss_of(net, *gpt.batch(index * job.window + k, rank, samples=job.samples))
                (loss / job.window).backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return _timed(step, job)


def local(job: Job) -> Timing:
    """No communication at all: the floor."""
    return _loop(gpt.build(**job.sizes), job, lambda _last: contextlib.nullcontext())


def ddp(job: Job) -> Timing:
    """torch's DistributedDataParallel."""
    net = torch.nn.parallel.DistributedDataParallel(gpt.build(**job.sizes))
    return _loop(net, job, lambda last: contextlib.nullcontext() if last else net.no_sync())


def fsdp2(job: Job, *, reshard: bool = True) -> Timing:
    """A hand-written loop on torch's fully_shard: the reference."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, net = init_device_mesh("cpu", (dist.get_world_size(),)), gpt.build(**job.sizes)
    for block in net.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    root = fully_shard(net, mesh=mesh, reshard_after_forward=reshard)

    @contextlib.contextmanager
    def between(last: bool) -> Iterator[None]:
        if not reshard:
            root.set_reshard_after_backward(last)
        yield

    return _loop(net, job, between)


def fsdp2_keep(job: Job) -> Timing:
    """The same, with parameters kept whole between forward and backward."""
    return fsdp2(job, reshard=False)


def deepspeed(job: Job, *, stage: int) -> Timing:
    """DeepSpeed's engine."""
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_SIZE=str(dist.get_world_size()))
    import deepspeed as peer

    peer.init_distributed(dist_backend="gloo")
    net, rank = gpt.build(**job.sizes), dist.get_rank()
    config = {
        "train_micro_batch_size_per_gpu": job.samples,
        "gradient_accumulation_steps": job.window,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    engine, *_ = peer.initialize(model=net, optimizer=_adamw(net), config=config)

    def step(index: int) -> torch.Tensor:
        loss = torch.zeros(())
        for k in range(job.window):
            loss = gpt.loss_of(engine, *gpt.batch(index * job.window + k, rank, samples=job.samples))
            engine.backward(loss)
            engine.step()
        return loss.detach()

    return _timed(step, job)


def trainer(
    job: Job, strategy: Any, *, shards_itself: bool = False, tensor_parallel: bool = False, pipeline: bool = False
) -> Timing:
    """Lightning's Trainer with a strategy.

    Args:
        job: what to train.
        strategy: for the Trainer.
        shards_itself: the module divides itself in configure_model, as Lightning's own strategy wants it.
        tensor_parallel: all ranks share each layer, and train on the same batches.
        pipeline: ranks have different layers, and train on the same batches.
    """
    import lightning.pytorch as pl

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rank, seconds = 0 if tensor_parallel or pipeline else int(os.environ["RANK"]), []

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = gpt.build(**job.sizes, fused=not tensor_parallel)
            self.last = torch.zeros(())

        def configure_model(self) -> None:
            if not shards_itself or isinstance(self.net, torch.distributed.fsdp.FSDPModule):
                return
            if tensor_parallel:
                _parallelize(self.net, self.device_mesh["tensor_parallel"])
                return
            mesh = self.device_mesh["data_parallel"]
            for block in self.net.blocks:
                torch.distributed.fsdp.fully_shard(block, mesh=mesh)
            torch.distributed.fsdp.fully_shard(self.net, mesh=mesh)

        def training_step(self, batch: Any, _index: int) -> torch.Tensor:
            self.last = gpt.loss_of(self.net, *batch)
            return self.last

        def configure_optimizers(self) -> torch.optim.Optimizer:
            if tensor_parallel and shards_itself:
                # A fused step cannot take plain and divided parameters together.
                return torch.optim.AdamW(self.parameters(), lr=1e-3, foreach=False)
            return _adamw(self)

    class Clock(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            dist.barrier()
            self.start = time.perf_counter()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            seconds.append(time.perf_counter() - self.start)
            if pipeline:  # the module sees it on the last stage only
                module.last = outputs["loss"]

    class Batches(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            for index in range((job.warmup + job.steps) * job.window):
                yield gpt.batch(index, rank, samples=job.samples)

    loop = pl.Trainer(
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy=strategy,
        max_steps=job.warmup + job.steps,
        accumulate_grad_batches=job.window,
        callbacks=[Clock()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    module = Module()
    loop.fit(module, torch.utils.data.DataLoader(Batches(), batch_size=None))
    steps = [sum(seconds[at : at + job.window]) for at in range(0, len(seconds), job.window)]
    return Timing(seconds=steps[job.warmup :], loss=float(module.last.detach()))


def lightning_fsdp2(job: Job) -> Timing:
    """Lightning's own strategy on fully_shard."""
    from lightning.pytorch.strategies import ModelParallelStrategy

    strategy = ModelParallelStrategy(data_parallel_size=int(os.environ["WORLD_SIZE"]), tensor_parallel_size=1)
    return trainer(job, strategy, shards_itself=True)


def meshbolt(job: Job, *, stage: int) -> Timing:
    """meshbolt, through the Trainer."""
    from meshbolt import MeshStrategy

    return trainer(job, MeshStrategy(zero=stage))


PLAN = {"blocks.*.q": "colwise", "blocks.*.k": "colwise", "blocks.*.v": "colwise", "blocks.*.proj": "rowwise"} | {
    "blocks.*.up": "colwise",
    "blocks.*.down": "rowwise",
}
"""The layers that contenders with tensor parallelism divide; the rest is whole on every rank."""


def _parallelize(net: torch.nn.Module, mesh: Any) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    styles = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
    parallelize_module(net, mesh, {pattern: styles[style]() for pattern, style in PLAN.items()})


def tp_loop(job: Job) -> Timing:
    """A hand-written loop on torch's parallelize_module: the reference for tensor parallelism."""
    from torch.distributed.device_mesh import init_device_mesh

    net = gpt.build(**job.sizes, fused=False)
    _parallelize(net, init_device_mesh("cpu", (dist.get_world_size(),)))
    # One optimizer cannot step on plain and on divided parameters in one fused call.
    divided = [p for p in net.parameters() if isinstance(p, torch.distributed.tensor.DTensor)]
    whole = [p for p in net.parameters() if not isinstance(p, torch.distributed.tensor.DTensor)]
    optimizers = [torch.optim.AdamW(params, lr=1e-3, fused=True) for params in (divided, whole)]

    def step(index: int) -> torch.Tensor:
        loss = torch.zeros(())
        for k in range(job.window):
            loss = gpt.loss_of(net, *gpt.batch(index * job.window + k, 0, samples=job.samples))
            (loss / job.window).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    return _timed(step, job)


def tp_lightning(job: Job) -> Timing:
    """Lightning's own strategy, with the same plan written by hand."""
    from lightning.pytorch.strategies import ModelParallelStrategy

    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=int(os.environ["WORLD_SIZE"]))
    return trainer(job, strategy, shards_itself=True, tensor_parallel=True)


def tp(job: Job, **further: Any) -> Timing:
    """meshbolt through the Trainer, with the same plan."""
    from meshbolt import MeshStrategy
    from meshbolt.tensor import TensorParallel

    plan = {f"net.{pattern}": style for pattern, style in PLAN.items()}
    setting = TensorParallel(int(os.environ["WORLD_SIZE"]), plan=plan, **{"sequence_parallel": False, **further})
    return trainer(job, MeshStrategy(zero=0, tensor_parallel=setting), tensor_parallel=True)


def tp_sequence(job: Job) -> Timing:
    """The same with sequence parallelism."""
    return tp(job, sequence_parallel=True)


def _pipeline_sizes(job: Job) -> tuple[int, int, int]:
    """Return layers, where the second stage begins, and microbatches."""
    layers = job.sizes.get("layers", 6)
    return layers, layers // 2, 4


def pp_loop(job: Job) -> Timing:
    """A hand-written script on torch.distributed.pipelining, 1F1B, with a model split by hand: the reference for pipelines."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    _, middle, microbatches = _pipeline_sizes(job)
    net, rank, ranks = gpt.build(**job.sizes), dist.get_rank(), dist.get_world_size()
    if ranks != 2:
        raise ValueError("The model is split by hand for two ranks.")

    class First(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions, self.blocks = net.tokens, net.positions, net.blocks[:middle]

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
            for block in self.blocks:
                x = block(x)
            return x

    class Last(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.norm, self.head = net.blocks[middle:], net.norm, net.head

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x))

    part = First() if rank == 0 else Last()

    def loss_of(logits: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), following.flatten())

    stage = PipelineStage(part, rank, ranks, torch.device("cpu"))
    schedule, optimizer = Schedule1F1B(stage, microbatches, loss_fn=loss_of), _adamw(part)

    def step(index: int) -> torch.Tensor:
        losses: list[torch.Tensor] = []
        for k in range(job.window):
            tokens, following = gpt.batch(index * job.window + k, 0, samples=job.samples)
            if rank == 0:
                schedule.step(tokens)
            else:
                schedule.step(target=following, losses=losses)
        optimizer.step()
        optimizer.zero_grad()
        loss = torch.stack(losses[-microbatches:]).mean().detach() if losses else torch.zeros(())
        dist.broadcast(loss, src=1)  # for the user to see, as every rank does in a Trainer
        return loss

    return _timed(step, job)


def pp(job: Job, *, zero: int = 0, schedule: str = "1f1b", **options: Any) -> Timing:
    """meshbolt through the Trainer, with the same stages and schedule; other schedules have two stages a rank."""
    from meshbolt import MeshStrategy, PipelineParallel

    layers, middle, microbatches = _pipeline_sizes(job)
    size = int(os.environ["WORLD_SIZE"])
    cuts = [middle] if schedule == "1f1b" else [layers * stage // 4 for stage in (1, 2, 3)]
    names = [f"net.blocks.{number}" for number in cuts]
    setting = PipelineParallel(size, microbatches=microbatches, cuts=names, schedule=schedule, **options)
    return trainer(job, MeshStrategy(zero=zero, pipeline_parallel=setting), pipeline=True)


CONTENDERS: dict[str, Callable[[Job], Timing]] = {
    "fsdp2": fsdp2,
    "local": local,
    "ddp": ddp,
    "fsdp2_keep": fsdp2_keep,
    "lightning_fsdp2": lightning_fsdp2,
    "tp_loop": tp_loop,
    "tp_lightning": tp_lightning,
    "tp": tp,
    "tp_sequence": tp_sequence,
    "pp_loop": pp_loop,
    "pp": pp,
    "pp_interleaved": functools.partial(pp, schedule="interleaved_1f1b"),
    "pp_zbv": functools.partial(pp, schedule="zbv"),
    "pp_zbv_whole": functools.partial(pp, schedule="zbv", split_backward=False),
    **{f"deepspeed{stage}": (lambda job, stage=stage: deepspeed(job, stage=stage)) for stage in (1, 2, 3)},
    **{f"zero{stage}": (lambda job, stage=stage: meshbolt(job, stage=stage)) for stage in (0, 1, 2, 3)},
}
OWN_PROCESS_GROUP = (
    "pp",
    "pp_interleaved",
    "pp_zbv",
    "pp_zbv_whole",
    "tp",
    "tp_sequence",
    "tp_lightning",
    "lightning_fsdp2",
    "zero0",
    "zero1",
    "zero2",
    "zero3",
    "deepspeed1",
    "deepspeed2",
    "deepspeed3",
)
