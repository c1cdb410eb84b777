"""Keys of a run: batch, precision, optimizer, scheduler, gradients and what is printed."""

from __future__ import annotations

from meshbolt.deepspeed_json.key import (
    ANYTHING,
    BLOCK,
    COUNT,
    DTYPES,
    LIST,
    NUMBER,
    OBJECT,
    OPTIONAL_COUNT,
    OPTIONAL_TEXT,
    POSITIVE,
    SIZE,
    SWITCH,
    TEXT,
    Key,
    ignored,
    is_disabled,
    is_equal_to,
    mapped,
    one_of,
    refused,
    whole_between,
)

_PLUGIN = "MixedPrecision"
_DTYPE = one_of(*DTYPES, None)
_GONE = "DeepSpeed 0.19.8 has removed it"
_PRINTS = "only prints"
_DIVIDES = "the mean over ranks is the same, and is summed in float32, where nothing overflows"

BATCH = (
    mapped("train_batch_size", COUNT, "checked", "it is the loader's batch x accumulation x data-parallel ranks"),
    mapped(
        "train_micro_batch_size_per_gpu", COUNT, "checked", "batches come from your DataLoader, whose size must be this"
    ),
    mapped("gradient_accumulation_steps", COUNT, "Trainer(accumulate_grad_batches=...)"),
    refused(
        "managed_gradient_accumulation",
        SWITCH,
        "false leaves the end of a window to the caller: optimize manually (automatic_optimization = False) instead",
        off=is_equal_to(True),
    ),
    ignored("dataloader_drop_last", SWITCH, "your DataLoader decides: DataLoader(drop_last=...)"),
)

OPTIMIZER = (
    mapped("optimizer", BLOCK, "configure_optimizers", "used where the module's own returns None"),
    mapped("optimizer.type", TEXT, "torch.optim"),
    mapped("optimizer.params", OBJECT, "arguments of the optimizer"),
    ignored("optimizer.legacy_fusion", SWITCH, "chooses a kernel for Apex"),
    mapped(
        "scheduler", BLOCK, "configure_optimizers", "stepped after every step; used where the module gives no scheduler"
    ),
    mapped("scheduler.type", TEXT, "meshbolt.deepspeed schedules"),
    mapped("scheduler.params", OBJECT, "arguments of the schedule"),
    mapped(
        "gradient_clipping",
        NUMBER,
        "Trainer(gradient_clip_val=...)",
        "by the norm over all ranks; 0 is off",
    ),
    ignored("zero_allow_untested_optimizer", SWITCH, "optimizers that are wrong on shards are refused by themselves"),
    ignored("zero_force_ds_cpu_optimizer", SWITCH, "any optimizer of torch's runs on offloaded state"),
)

PRECISION = (
    mapped("fp16", BLOCK, "precision 16-mixed"),
    mapped(
        "fp16.enabled", SWITCH, f"{_PLUGIN}('16-mixed', autocast=False)", "16-bit arithmetic, float32 master weights"
    ),
    ignored("fp16.auto_cast", SWITCH, "inputs are always cast to 16 bits"),
    mapped("fp16.loss_scale", NUMBER, f"{_PLUGIN}(init_scale=...)", "0 is a dynamic scale"),
    mapped("fp16.initial_scale_power", whole_between(0, 127), f"{_PLUGIN}(init_scale=2 ** power)"),
    mapped("fp16.loss_scale_window", COUNT, f"{_PLUGIN}(growth_interval=...)"),
    mapped("fp16.hysteresis", COUNT, f"{_PLUGIN}(hysteresis=...)", "in every stage"),
    mapped("fp16.consecutive_hysteresis", SWITCH, f"{_PLUGIN}(consecutive_hysteresis=...)"),
    mapped(
        "fp16.min_loss_scale",
        NUMBER,
        f"{_PLUGIN}(min_scale=...)",
        "an overflow there skips the step and warns; no error",
    ),
    refused("fp16.fp16_master_weights_and_grads", SWITCH, "updates in float16 lose what is small: leave it out"),
    mapped("bf16", BLOCK, "precision bf16-mixed"),
    mapped(
        "bf16.enabled", SWITCH, f"{_PLUGIN}('bf16-mixed', autocast=False)", "16-bit arithmetic, float32 master weights"
    ),
    ignored("bf16.immediate_grad_update", SWITCH, "gradients are reduced in the backward pass in any case"),
    ignored(
        "bf16.check_grad_overflow",
        SWITCH,
        "a Trainer skips no step in bf16, whose range is float32's: Trainer(detect_anomaly=True) finds gradients that are not "
        "finite; engine.step() of initialize skips as it says",
    ),
    mapped(
        "bf16.bf16_master_weights_and_grads",
        SWITCH,
        "HalfPrecision('bf16-true')",
        "together with bf16_optimizer_states",
    ),
    mapped("bf16.bf16_optimizer_states", SWITCH, "HalfPrecision('bf16-true')"),
    mapped("torch_autocast", BLOCK, "precision *-mixed"),
    mapped(
        "torch_autocast.enabled", SWITCH, "Trainer(precision='...-mixed')", "float32 master weights, cast by operation"
    ),
    mapped(
        "torch_autocast.dtype",
        one_of(*(each for each in DTYPES if DTYPES[each] != "float32")),
        "Trainer(precision='...-mixed')",
    ),
    ignored(
        "torch_autocast.lower_precision_safe_modules",
        LIST,
        "gathers are in 16 bits for all modules; autocast keeps its own list of operations",
    ),
    mapped("data_types", BLOCK, "Zero(reduce_dtype=...)"),
    mapped(
        "data_types.grad_accum_dtype",
        _DTYPE,
        "",
        "gradients are always added up in float32, as fp32 asks for here",
    ),
    refused(
        "data_types.param_dtype",
        _DTYPE,
        "the precision blocks decide it: enable bf16 or fp16 instead",
    ),
    refused("data_types.buffer_dtype", _DTYPE, "buffers keep the dtype that the module gives them: set it there"),
    ignored("data_types.keep_in_fp32_modules", ANYTHING, "buffers keep their dtype in any case"),
    mapped("communication_data_type", _DTYPE, "Zero(reduce_dtype=...)"),
    ignored("seq_parallel_communication_data_type", _DTYPE, "there is no sequence-parallel group of its own"),
)

GRADIENTS = (
    ignored("prescale_gradients", SWITCH, _DIVIDES),
    ignored("gradient_predivide_factor", POSITIVE, _DIVIDES),
    refused(
        "gradient_allreduce_op",
        one_of("mean", "sum"),
        "gradients are averaged over ranks: scale the loss instead",
        off=is_equal_to("mean"),
    ),
    refused("sparse_gradients", SWITCH, f"{_GONE}; sharded parameters have dense gradients"),
    ignored("disable_allgather", SWITCH, "a workaround of DeepSpeed's"),
    ignored("allgather_size", SIZE, "there are no buckets; stands beside the old forms of zero_optimization"),
)

GONE = (
    refused("amp", OBJECT, f'{_GONE}: use "bf16": {{"enabled": true}}', off=is_disabled),
    refused("sparse_attention", OBJECT, f"{_GONE}: call attention with a mask in the model"),
    refused("progressive_layer_drop", OBJECT, f"{_GONE}: drop layers in the model", off=is_disabled),
    refused("eigenvalue", OBJECT, _GONE, off=is_disabled),
    refused("quantize_training", OBJECT, _GONE, off=is_disabled),
    refused("compression_training", OBJECT, f"{_GONE}: prune or quantize after training"),
    refused(
        "nebula",
        OBJECT,
        f'{_GONE}: "checkpoint": {{"writer": {{"decoupled": true}}}} saves in the background',
        off=is_disabled,
    ),
    refused("graph_harvesting", ANYTHING, _GONE),
    refused(
        "elasticity",
        OBJECT,
        f"{_GONE}; checkpoints of meshbolt load on any number of ranks: write the batch sizes instead",
        off=is_disabled,
    ),
    refused("curriculum_learning", OBJECT, f"{_GONE}: order samples in the DataLoader's sampler", off=is_disabled),
    refused("data_efficiency", OBJECT, "samples come from your DataLoader: order them in its sampler", off=is_disabled),
    refused("hybrid_engine", OBJECT, "generation inside training is the model's own `generate` here", off=is_disabled),
    refused("weight_quantization", OBJECT, "weights are not stored in integers in training"),
    refused(
        "sequence_parallel_size", SIZE, "attention is not divided by sequence in this version", off=is_equal_to(0, 1)
    ),
    ignored("data_parallel_size", SIZE, "it is what tensor and pipeline parallelism leave of the ranks"),
    ignored("use_data_before_expert_parallelism", SWITCH, "there are no expert-parallel groups to order"),
    refused(
        "expert_parallel", OBJECT, "experts are sharded like all parameters, not divided by expert", off=is_disabled
    ),
)

PRINTING = (
    ignored("steps_per_print", OPTIONAL_COUNT, "the progress bar logs: Trainer(log_every_n_steps=...)"),
    ignored("log_level", OPTIONAL_TEXT, "use Python's logging"),
    ignored("dump_state", SWITCH, f"{_PRINTS}; the receipt is printed"),
    ignored("disable_python_gc", SWITCH, "Python's garbage collector is left alone"),
    ignored("vocabulary_size", ANYTHING, "only checks that a vocabulary is divisible"),
    ignored("wall_clock_breakdown", SWITCH, "use Trainer(callbacks=[ThroughputMonitor()])"),
    ignored("memory_breakdown", SWITCH, "use Trainer(callbacks=[MemoryMonitor()])"),
)

KEYS: tuple[Key, ...] = (*BATCH, *OPTIMIZER, *PRECISION, *GRADIENTS, *PRINTING, *GONE)
