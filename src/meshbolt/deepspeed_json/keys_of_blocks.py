"""Keys of the blocks beside ZeRO: activations, parallelism, checkpoints, monitors and tuning."""

from __future__ import annotations

from collections.abc import Iterable

from meshbolt.deepspeed_json.key import (
    ANYTHING,
    BLOCK,
    COUNT,
    LIST,
    NOTHING,
    NUMBER,
    OBJECT,
    OPTIONAL_SWITCH,
    OPTIONAL_TEXT,
    SIZE,
    SWITCH,
    TEXT,
    WHOLE,
    Key,
    Values,
    honoured,
    ignored,
    is_disabled,
    is_equal_to,
    mapped,
    one_of,
    refused,
)


def _ignored_block(block: str, why: str, keys: Iterable[tuple[str, Values]]) -> tuple[Key, ...]:
    """Return the rows of a block whose keys are all ignored for one reason."""
    return (ignored(block, BLOCK, why), *(ignored(f"{block}.{name}", values, why) for name, values in keys))


ACTIVATIONS = _ignored_block(
    "activation_checkpointing",
    "the block recomputes nothing by itself: give recompute='full' or 'selective'",
    (
        ("partition_activations", SWITCH),
        ("cpu_checkpointing", SWITCH),
        ("contiguous_memory_optimization", SWITCH),
        ("number_checkpoints", ANYTHING),
        ("synchronize_checkpoint_boundary", SWITCH),
        ("profile", SWITCH),
    ),
)

PARALLEL = (
    mapped("tensor_parallel", BLOCK, "MeshStrategy(tensor_parallel=...)"),
    mapped("tensor_parallel.autotp_size", SIZE, "MeshStrategy(tensor_parallel=...)", "0 is off"),
    mapped("tensor_parallel.tp", BLOCK, "MeshStrategy(tensor_parallel=...)"),
    mapped("tensor_parallel.tp.tp_size", COUNT, "MeshStrategy(tensor_parallel=...)"),
    ignored("tensor_parallel.tp.mpu", NOTHING, "groups follow from the sizes"),
    ignored("tensor_parallel.tp.tp_group", NOTHING, "groups follow from the sizes"),
    ignored("tensor_parallel.tp.tp_grain_size", COUNT, "layers are divided as evenly as they can be"),
    ignored("tensor_parallel.dtype", ANYTHING, "the precision blocks decide"),
    ignored("tensor_parallel.tp_overlap_comm", SWITCH, "communication is behind computation where it can be"),
    ignored(
        "tensor_parallel.preset_model", OPTIONAL_TEXT, "the plan is found: registered, of the model, or by a trace"
    ),
    refused(
        "tensor_parallel.partition_config",
        OBJECT,
        'patterns are written otherwise here: MeshStrategy(tensor_parallel=TensorParallel(size=..., plan={"layers.*.up": '
        '"colwise"}))',
    ),
    refused("tensor_parallel.injection_policy_tuple", LIST, "layers are divided by a plan: TensorParallel(plan={...})"),
    ignored(
        "tensor_parallel.vocab_parallel_lm_head", OPTIONAL_SWITCH, "the plan decides: TensorParallel(loss_parallel=...)"
    ),
    ignored("tensor_parallel.vocab_parallel_ce_backend", one_of("torch", "liger"), "torch's loss is used"),
    ignored("tensor_parallel.keep_module_on_host", SWITCH, "modules stay where they were made until they are sharded"),
    refused("tensor_parallel.kernel_inject", SWITCH, "no kernels are put in the place of layers"),
    refused("tensor_parallel.replace_with_kernel_inject", SWITCH, "no kernels are put in the place of layers"),
    mapped("pipeline", BLOCK, "MeshStrategy(pipeline_parallel=...)"),
    mapped("pipeline.stages", COUNT, "MeshStrategy(pipeline_parallel=...)", "microbatches are the accumulation steps"),
    ignored("pipeline.partition", TEXT, "stages are cut so that they take the same time: PipelineParallel(cuts=...)"),
    ignored("pipeline.seed_layers", SWITCH, "weights are drawn as without a pipeline"),
    mapped("pipeline.activation_checkpoint_interval", SIZE, "recompute='full'", "each block by itself; 0 is off"),
    ignored("pipeline.use_reentrant", OPTIONAL_SWITCH, "activations are computed again without re-entering autograd"),
    ignored("pipeline.pipe_partitioned", SWITCH, "activations between stages are sent whole"),
    ignored("pipeline.grad_partitioned", SWITCH, "activations between stages are sent whole"),
)

CHECKPOINT = (
    mapped("checkpoint", BLOCK, "MeshStrategy(checkpoint=...)"),
    ignored("checkpoint.tag_validation", ANYTHING, "all ranks write one directory, whose name is rank 0's"),
    honoured("checkpoint.load_universal", SWITCH, "", "every checkpoint loads into any plan"),
    refused("checkpoint.use_node_local_storage", SWITCH, "ranks share the directory of a checkpoint"),
    ignored("checkpoint.parallel_write", BLOCK, "all ranks write their shards at the same time"),
    ignored("checkpoint.parallel_write.pipeline_stage", SWITCH, "all ranks write their shards at the same time"),
    ignored("checkpoint.checkpoint_serialization", SWITCH, "shards have a format of their own"),
    mapped("checkpoint.writer", BLOCK, "Checkpoint(asynchronous=...)"),
    mapped("checkpoint.writer.decoupled", SWITCH, "Checkpoint(asynchronous=...)", "written in the background"),
    *(
        ignored(f"checkpoint.writer.{name}", values, "sizes and threads of writing are found")
        for name, values in (
            ("type", TEXT),
            ("io_buffer_size", SIZE),
            ("io_buffer_double", SWITCH),
            ("io_multiplier", SIZE),
            ("data_parallel", TEXT),
            ("show_statistics", SWITCH),
        )
    ),
    mapped("datastates_ckpt", OBJECT, "Checkpoint(asynchronous=True)", "written in the background"),
)

MONITORS = (
    *_ignored_block(
        "tensorboard",
        "give Trainer(logger=TensorBoardLogger(save_dir=output_path, name=job_name))",
        (("enabled", SWITCH), ("output_path", TEXT), ("job_name", TEXT)),
    ),
    *_ignored_block(
        "csv_monitor",
        "give Trainer(logger=CSVLogger(save_dir=output_path, name=job_name))",
        (("enabled", SWITCH), ("output_path", TEXT), ("job_name", TEXT)),
    ),
    *_ignored_block(
        "wandb",
        "give Trainer(logger=WandbLogger(project=project, group=group, entity=team))",
        (("enabled", SWITCH), ("group", OPTIONAL_TEXT), ("team", OPTIONAL_TEXT), ("project", TEXT)),
    ),
    *_ignored_block(
        "comet",
        "give Trainer(logger=CometLogger(...))",
        (
            ("enabled", SWITCH),
            ("samples_log_interval", SIZE),
            *(
                (name, OPTIONAL_TEXT)
                for name in ("project", "workspace", "api_key", "experiment_name", "experiment_key", "mode")
            ),
            ("online", OPTIONAL_SWITCH),
        ),
    ),
    *_ignored_block(
        "flops_profiler",
        "give Trainer(callbacks=[ThroughputMonitor()]), which counts operations",
        (
            ("enabled", SWITCH),
            ("profile_step", SIZE),
            ("module_depth", WHOLE),
            ("top_modules", SIZE),
            ("detailed", SWITCH),
            ("output_file", OPTIONAL_TEXT),
            ("recompute_fwd_factor", NUMBER),
        ),
    ),
    *_ignored_block(
        "comms_logger",
        "give Trainer(callbacks=[CommunicationMonitor()])",
        (("enabled", SWITCH), ("verbose", SWITCH), ("prof_all", SWITCH), ("debug", SWITCH), ("prof_ops", LIST)),
    ),
    ignored("timers", BLOCK, "give Trainer(callbacks=[ThroughputMonitor()]), which waits for nothing"),
    *_ignored_block(
        "timers.throughput",
        "give Trainer(callbacks=[ThroughputMonitor()]), which waits for nothing",
        (("enabled", SWITCH), ("synchronized", SWITCH)),
    ),
)

OTHERS = (
    refused("autotuning", OBJECT, "settings are not searched for: leave it out", off=is_disabled),
    *_ignored_block(
        "aio",
        "sizes and depths of reading are found: see Offload(path=...)",
        (
            ("block_size", SIZE),
            ("queue_depth", SIZE),
            ("intra_op_parallelism", SIZE),
            ("thread_count", SIZE),
            ("single_submit", SWITCH),
            ("overlap_events", SWITCH),
            ("use_gds", SWITCH),
        ),
    ),
    refused(
        "compile",
        OBJECT,
        "DeepSpeed's compiler passes are not here; MeshStrategy(compile=True) compiles each block with torch",
        off=lambda value: (
            is_equal_to({})(value) or (isinstance(value, dict) and value.get("deepcompile") in (None, False))
        ),
    ),
)

KEYS: tuple[Key, ...] = (*ACTIVATIONS, *PARALLEL, *CHECKPOINT, *MONITORS, *OTHERS)
