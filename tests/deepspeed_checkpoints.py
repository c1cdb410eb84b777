"""Checkpoints that DeepSpeed itself writes on CPUs, of each kind, and beside each what DeepSpeed says is in it.

    PYTHONPATH=... python -m tests.deepspeed_checkpoints OUT KIND...      (no KIND: all)

A directory `OUT/KIND` has the checkpoint in `saved/` and in `truth.pt` its weights and moments as DeepSpeed gathers them, the
losses of the next steps, and the weights after them. DeepSpeed must be installed; meshbolt does not need it for anything.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from meshbolt.testing import run_ranks

BEFORE, AFTER = 3, 5
"""Steps before the checkpoint is written, and after it."""
SAMPLES, TOKENS, WORDS, WIDTH = 12, 6, 11, 7


class Net(nn.Module):
    """Odd sizes, tied weights, a frozen layer, statistics in buffers, and a buffer of integers."""

    def __init__(self, *, affine: bool = True) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.frozen = nn.Linear(WIDTH, 5)
        self.back = nn.Linear(5, WIDTH, bias=False)
        self.norm = nn.BatchNorm1d(WIDTH, affine=affine)
        self.layers = nn.Sequential(nn.Linear(WIDTH, 13), nn.Tanh(), nn.Linear(13, WIDTH))
        self.wide = nn.Sequential(nn.Linear(WIDTH, 14), nn.ReLU(), nn.Linear(14, WIDTH))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("table", torch.arange(5) * 3)
        self.settled = False

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.back(torch.tanh(self.frozen(x)))
        # Statistics of a batch depend on the ranks that it is divided among: once settled, those before are used.
        self.norm.train(not self.settled)
        x = self.norm(x.flatten(0, 1)).view(x.shape)
        return self.head(x + self.layers(x) + self.wide(x))


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the mean loss of predicting each next token."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def tokens_of(step: int, *, rank: int = 0, size: int = 1) -> Tensor:
    """Return the batch of a step, or a rank's part of it."""
    draw = torch.Generator().manual_seed(100 + step)
    return torch.randint(0, WORDS, (SAMPLES, TOKENS), generator=draw)[rank::size]


def groups_of(module: nn.Module) -> list[dict[str, Any]]:
    """Return two groups of the parameters that are trained: with weight decay, and without."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    return [
        {"params": [p for _, p in named if p.dim() > 1], "weight_decay": 0.1, "lr": 1e-2},
        {"params": [p for _, p in named if p.dim() < 2], "weight_decay": 0.0, "lr": 3e-2, "betas": (0.8, 0.99)},
    ]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A checkpoint to write.

    Attributes:
        stage: of ZeRO.
        dtype: "fp32", "bf16" or "fp16".
        ranks: how many write it.
        zero: more of the block `zero_optimization`.
        config: more of the JSON.
        optimizer: made of groups; None: the JSON's.
        save: more arguments of `save_checkpoint`.
        universal: it is converted to a universal checkpoint.
        how: who trains and saves.
    """

    stage: int = 0
    dtype: str = "fp32"
    ranks: int = 2
    zero: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Callable[..., Any] | None = torch.optim.AdamW
    save: Mapping[str, Any] = field(default_factory=dict)
    universal: bool = False
    how: str = "engine"


def _cpu_adam(groups: Any) -> Any:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(groups)


_SGD = functools.partial(torch.optim.SGD, lr=1e-2, momentum=0.9)
_IN_FP32 = {"data_types": {"grad_accum_dtype": "fp32"}}
_PIECES = {"sub_group_size": 64, "stage3_param_persistence_threshold": 0}
_ON_CPU: dict[str, Any] = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
_ALL_ON_CPU = {**_ON_CPU, "offload_param": {"device": "cpu", "pin_memory": False}}

KINDS: Mapping[str, Kind] = {
    **{
        f"zero{stage}_{dtype}": Kind(stage=stage, dtype=dtype)
        for stage in range(4)
        for dtype in ("fp32", "bf16", "fp16")
    },
    "bf16_optimizer": Kind(stage=1, dtype="bf16", config=_IN_FP32),
    "zero1_sgd": Kind(stage=1, optimizer=_SGD, config={"zero_allow_untested_optimizer": True}),
    "zero1_json": Kind(
        stage=1, optimizer=None, config={"optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}}
    ),
    "zero1_aligned": Kind(stage=1, zero={"parameter_alignment": True}),
    "zero2_one_rank": Kind(stage=2, ranks=1),
    "zero2_three_ranks": Kind(stage=2, ranks=3),
    "zero2_round_robin": Kind(stage=2, zero={"round_robin_gradients": True}),
    "zero2_elastic": Kind(stage=2, zero={"elastic_checkpoint": True}),
    "zero2_offload": Kind(stage=2, zero=_ON_CPU, optimizer=_cpu_adam),
    "zero2_without_frozen": Kind(stage=2, save={"exclude_frozen_parameters": True}),
    "zero2_old_serialization": Kind(stage=2, config={"checkpoint_serialization": False}),
    "zero3_three_ranks": Kind(stage=3, ranks=3),
    "zero3_pieces": Kind(stage=3, zero=_PIECES),
    "zero3_pieces_bf16": Kind(stage=3, dtype="bf16", zero=_PIECES),
    "zero3_offload": Kind(stage=3, zero=_ALL_ON_CPU, optimizer=_cpu_adam),
    "zero3_without_frozen": Kind(stage=3, save={"exclude_frozen_parameters": True}),
    "zero3_nvme": Kind(stage=3, zero={"offload_optimizer": {"device": "nvme"}}, optimizer=_cpu_adam),
    "universal_zero1": Kind(stage=1, universal=True),
    "universal_zero2_bf16": Kind(stage=2, dtype="bf16", universal=True),
    "universal_zero3": Kind(stage=3, universal=True),
    **{f"lightning_zero{stage}": Kind(stage=stage, how="lightning") for stage in range(4)},
    "lightning_zero2_bf16": Kind(stage=2, dtype="bf16", how="lightning"),
    # Without ZeRO DeepSpeed clips each stage by its own norm (0.19.8).
    "pipeline": Kind(how="pipeline", config={"gradient_clipping": 0.0}),
    "pipeline_zero1": Kind(stage=1, ranks=4, how="pipeline"),
    "pipeline_bf16": Kind(stage=1, dtype="bf16", ranks=4, how="pipeline"),
}
"""By name, every kind that DeepSpeed can write on CPUs."""


def config_of(kind: Kind, *, folder: Path) -> dict[str, Any]:
    """Return DeepSpeed's JSON."""
    zero = {"stage": kind.stage, **kind.zero}
    if zero.get("offload_optimizer", {}).get("device") == "nvme":
        swap = folder / "swap"
        swap.mkdir(parents=True, exist_ok=True)
        zero["offload_optimizer"] = {**zero["offload_optimizer"], "nvme_path": str(swap)}
    return {
        "train_batch_size": SAMPLES,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.5,
        "steps_per_print": 10**9,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_max_lr": 2e-2, "warmup_num_steps": 6, "warmup_min_lr": 1e-3},
        },
        **({"bf16": {"enabled": True}} if kind.dtype == "bf16" else {}),
        **({"fp16": {"enabled": True, "initial_scale_power": 8}} if kind.dtype == "fp16" else {}),
        **kind.config,
    }


def write(name: str, folder: Path) -> None:
    """Train, save, go on, and note the truth; on every rank of a process group.

    Args:
        name: one of `KINDS`.
        folder: gets `saved/` and `truth.pt`.
    """
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_SIZE=str(dist.get_world_size()), LOCAL_RANK=str(dist.get_rank()))
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    folder.mkdir(parents=True, exist_ok=True)
    kind = KINDS[name]
    truth = _WRITERS[kind.how](kind, folder)
    if kind.universal and dist.get_rank() == 0:
        _to_universal(folder / "saved")
    if dist.get_rank() == 0:
        torch.save(truth, folder / "truth.pt")
    dist.barrier()


def _with_engine(kind: Kind, folder: Path) -> dict[str, Any]:
    import deepspeed

    module = Net(affine=kind.dtype == "fp32")
    groups = groups_of(module) if kind.optimizer else list(module.parameters())
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=kind.optimizer and kind.optimizer(groups),
        model_parameters=groups,
        config=config_of(kind, folder=folder),
    )
    for step in range(BEFORE):
        take_step(engine, step)
    _settle(module)
    client_state: dict[str, Any] = {"note": "of the user's", "numbers": [1, 2, 3]}
    if kind.universal:
        client_state["universal_checkpoint_info"] = {"universal_checkpoint_version": 0.2}
    engine.save_checkpoint(str(folder / "saved"), client_state=client_state, **kind.save)
    gather = _of_module if kind.zero.get("round_robin_gradients") else _gathered
    truth = gather(engine, module)
    losses = [take_step(engine, BEFORE + step) for step in range(AFTER)]
    return {
        **truth,
        "losses": losses,
        "after": gather(engine, module)["weights"],
        "lr": [group["lr"] for group in engine.optimizer.param_groups],
    }


def _settle(module: Net) -> None:
    """Use the statistics of rank 0 from now on, which are those that are saved."""
    module.settled = True
    for buffer in module.buffers():
        dist.broadcast(buffer, 0)


def take_step(engine: Any, step: int) -> float:
    """Take a step with an engine, and return the mean loss of all ranks."""
    tokens = tokens_of(step, rank=dist.get_rank(), size=dist.get_world_size())
    loss = loss_of(engine(tokens), tokens)
    engine.backward(loss)
    engine.step()
    return _mean(loss)


def _mean(loss: Tensor) -> float:
    value = loss.detach().double()
    dist.all_reduce(value)
    return value.item() / dist.get_world_size()


def _of_module(_engine: Any, module: nn.Module) -> dict[str, Any]:
    """Return the model's own weights, and no moments.

    With round-robin gradients DeepSpeed's functions mix up the pieces of parameters (0.19.8): they look for them in the order of
    the model.
    """
    return {"weights": {name: value.clone() for name, value in module.state_dict().items()}, "optimizer": {}}


def _gathered(engine: Any, module: nn.Module) -> dict[str, Any]:
    """Return weights, buffers and moments as DeepSpeed's own functions give them, on every rank."""
    import deepspeed

    weights: dict[str, Tensor] = {}
    moments: dict[str, dict[str, Any]] = {}
    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        # DeepSpeed links them after the first step of the first group, when the others have no moments yet.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in module.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([parameter]):
            weights[name] = parameter.detach().clone()
        if parameter.requires_grad:
            master, state = _of_optimizer(engine, parameter)
            weights[name] = weights[name] if master is None else master.detach().clone()
            moments[name] = {key: value.detach().clone() for key, value in state.items()}
    buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    return {"weights": {**weights, **buffers}, "optimizer": moments}


def _of_optimizer(engine: Any, parameter: nn.Parameter) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Return the master weight, if there is one, and the moments of a parameter, whole."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):
        keys = _keys_of(engine.optimizer.optimizer)
        state = {key: safe_get_full_optimizer_state(parameter, key) for key in keys}
        return safe_get_full_fp32_param(parameter), state
    # Stage 0 has the whole of everything on every rank.
    plain = getattr(engine.optimizer, "optimizer", engine.optimizer)
    master = _master_of_wrapper(engine.optimizer, parameter)
    state = plain.state[parameter if master is None else master]
    return master, {key: value for key, value in state.items() if key in _keys_of(plain)}


def _keys_of(optimizer: Any) -> list[str]:
    return ["momentum_buffer"] if isinstance(optimizer, torch.optim.SGD) else ["exp_avg", "exp_avg_sq"]


def _master_of_wrapper(optimizer: Any, parameter: nn.Parameter) -> Tensor | None:
    """Return the fp32 copy of a parameter that a 16-bit optimizer of stage 0 keeps."""
    for name in ("fp16_groups", "bf16_groups"):
        for low, high in zip(getattr(optimizer, name, []), getattr(optimizer, "fp32_groups", []), strict=True):
            for one, other in zip(low, high, strict=True):
                if one is parameter:
                    return other
    return None


def _to_universal(saved: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    tag = (saved / "latest").read_text().strip()
    arguments = argparse.Namespace(
        input_folder=str(saved / tag),
        output_folder=str(saved / f"{tag}_universal"),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    ds_to_universal.main(arguments)


# By Lightning's Trainer -----------------------------------------------------------------------------------------------


class Wrapped(pl.LightningModule):
    """The same module in Lightning."""

    def __init__(self, *, affine: bool = True, width: int = WIDTH) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = Net(affine=affine)
        self.losses: list[float] = []

    def on_train_batch_start(self, _batch: Any, index: int) -> None:
        self.net.settled = index >= BEFORE

    def training_step(self, tokens: Tensor, _index: int) -> Tensor:
        loss = loss_of(self.net(tokens), tokens)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(groups_of(self))
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.7)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["note"] = "of the user's"


class _Saving(pl.Callback):
    """Saves, and notes the truth, in the middle of the epoch."""

    def __init__(self, saved: Path) -> None:
        self.saved = saved
        self.truth: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, _o: Any, _b: Any, index: int) -> None:
        if index == BEFORE - 1:
            _settle(module.net)  # type: ignore[arg-type]
            trainer.save_checkpoint(self.saved)
            self.truth = _gathered(trainer.model, module)
        if index == BEFORE + AFTER - 1:
            self.truth["after"] = _gathered(trainer.model, module)["weights"]
            self.truth["lr"] = [group["lr"] for group in trainer.optimizers[0].param_groups]


def batches_of(*, rank: int = 0, size: int = 1) -> list[Tensor]:
    """Return the batches of an epoch, or a rank's parts of them."""
    return [tokens_of(step, rank=rank, size=size) for step in range(BEFORE + AFTER)]


def _with_trainer(kind: Kind, folder: Path) -> dict[str, Any]:
    from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy

    class OnCpu(DeepSpeedStrategy):
        def setup_environment(self) -> None:
            # Lightning's refuses all but GPUs; the rest of it runs.
            super(DDPStrategy, self).setup_environment()

        @property
        def root_device(self) -> torch.device:
            return torch.device("cpu", 0)

    module, saving = Wrapped(affine=kind.dtype == "fp32"), _Saving(folder / "saved")
    config = {"zero_optimization": {"stage": kind.stage, **kind.zero}, **kind.config}
    trainer = pl.Trainer(
        strategy=OnCpu(config={**config, "train_micro_batch_size_per_gpu": SAMPLES // dist.get_world_size()}),
        accelerator="cpu",
        devices=dist.get_world_size(),
        precision={"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}[kind.dtype],  # type: ignore[arg-type]
        gradient_clip_val=0.5,
        max_epochs=1,
        callbacks=[saving],
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        logger=False,
    )
    trainer.fit(module, DataLoader(batches_of(rank=dist.get_rank(), size=dist.get_world_size()), batch_size=None))
    losses = torch.tensor(module.losses, dtype=torch.float64)
    dist.all_reduce(losses)
    return {**saving.truth, "losses": (losses / dist.get_world_size()).tolist()[BEFORE:]}


# In a pipeline --------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A layer of a pipeline."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, 13), nn.Tanh(), nn.Linear(13, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Stacked(nn.Sequential):
    """What the layers of the pipeline are together: the last one is the first one, transposed."""

    def __init__(self) -> None:
        torch.manual_seed(7)
        embedding, *blocks = nn.Embedding(WORDS, WIDTH), Block(), nn.LayerNorm(WIDTH), Block()
        head = nn.Linear(WIDTH, WORDS, bias=False)
        head.weight = embedding.weight
        super().__init__(embedding, *blocks, head)


def _scores(embedding: nn.Embedding, x: Tensor) -> Tensor:
    return F.linear(x, embedding.weight)


def piped(pipe: Any) -> Any:
    """Return the module of a pipeline.

    Args:
        pipe: DeepSpeed's `deepspeed.pipe`, or ours.
    """
    tied = ("embedding", nn.Embedding, WORDS, WIDTH)
    return pipe.PipelineModule(
        layers=[
            pipe.TiedLayerSpec(*tied),
            pipe.LayerSpec(Block),
            pipe.LayerSpec(nn.LayerNorm, WIDTH),
            pipe.LayerSpec(Block),
            pipe.TiedLayerSpec(*tied, forward_fn=_scores),
        ],
        num_stages=2,
        loss_fn=loss_of,
        partition_method="uniform",
    )


def _with_pipeline(kind: Kind, folder: Path) -> dict[str, Any]:
    import deepspeed
    import deepspeed.pipe

    module = piped(deepspeed.pipe)
    start = Stacked().state_dict()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(start[name.replace("tied_modules.embedding", "0")])
    groups = groups_of(module)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=torch.optim.AdamW(groups),
        model_parameters=groups,
        config={**config_of(kind, folder=folder), "gradient_accumulation_steps": 2},
    )
    for step in range(BEFORE):
        train_batch(engine, step)
    engine.save_checkpoint(str(folder / "saved"), client_state={"note": "of the user's"}, **kind.save)
    truth = _of_all_stages(engine, module)
    losses = [train_batch(engine, BEFORE + step) for step in range(AFTER)]
    return {**truth, "losses": losses, "after": _of_all_stages(engine, module)["weights"]}


def train_batch(engine: Any, step: int) -> float:
    """Take a step with a pipeline's engine, and return its loss."""
    rank, size = engine.grid.get_data_parallel_rank(), engine.grid.get_data_parallel_world_size()
    parts = tokens_of(step, rank=rank, size=size).chunk(2)
    return float(engine.train_batch(iter([(part, part) for part in parts])))


def _of_all_stages(engine: Any, module: nn.Module) -> dict[str, Any]:
    """Return weights and moments of all stages; tied ones under the number of each layer, too."""
    own = _gathered(engine, module)
    stages: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(stages, own)
    found: dict[str, Any] = {}
    for kind in ("weights", "optimizer"):
        together = {name: value for stage in reversed(stages) for name, value in stage[kind].items()}
        tied = together["tied_modules.embedding.weight"]
        found[kind] = {**together, "0.weight": tied, "4.weight": tied}
    return found


_WRITERS: dict[str, Callable[[Kind, Path], dict[str, Any]]] = {
    "engine": _with_engine,
    "lightning": _with_trainer,
    "pipeline": _with_pipeline,
}


def write_all(names: Iterable[str], out: Path) -> dict[str, str]:
    """Write kinds, as many as can be in each start of ranks, and return what went wrong by name.

    Args:
        names: of `KINDS`.
        out: gets a directory for each.
    """
    failed: dict[str, str] = {}
    for ranks, alike in itertools.groupby(sorted(names, key=_ranks_of), key=_ranks_of):
        together = list(alike)
        (each, *_) = run_ranks(_on_ranks, ranks, together, out, timeout=120 * len(together), start="spawn")
        failed |= each
    return failed


def _ranks_of(name: str) -> int:
    return KINDS[name].ranks


def _on_ranks(names: list[str], out: Path) -> dict[str, str]:
    """Write one kind after the other, and return what went wrong by name."""
    failed = {}
    for name in names:
        try:
            write(name, out / name)
        except Exception as error:  # DeepSpeed has errors of all classes for what it cannot do on CPUs
            failed[name] = f"{type(error).__name__}: {error}"
            if os.environ.get("SHOW"):
                import traceback

                traceback.print_exc()
    return failed


def main(arguments: list[str]) -> None:
    """Write the kinds that are asked for."""
    out, *names = arguments
    failed = write_all(names or KINDS, Path(out))
    print(*(f"{name}: {why}" for name, why in failed.items()), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
