"""Keys of `zero_optimization`."""

from __future__ import annotations

from dataclasses import replace

from meshbolt.deepspeed_json.key import (
    BLOCK,
    LIST,
    NUMBER,
    OBJECT,
    OPTIONAL_SWITCH,
    OPTIONAL_TEXT,
    SIZE,
    SWITCH,
    WHOLE,
    Key,
    honoured,
    ignored,
    is_equal_to,
    mapped,
    one_of,
    refused,
    whole_between,
)

_ZERO = "zero_optimization"
_BUCKETS = "there are no buckets: the parameters of a block are one message"
_OVERLAPS = "communication is behind computation in any case"
_SIZES = "what lies elsewhere is moved in pieces whose sizes are found"
_SHAPES = "parameters keep their shapes, so that nothing special is needed"
_DEVICE = one_of("none", "cpu", "nvme", None)


def _key(make: object, name: str, *rest: object, **options: object) -> Key:
    return make(f"{_ZERO}.{name}", *rest, **options)  # type: ignore[operator, no-any-return]


STAGE = (
    mapped(_ZERO, BLOCK, "MeshStrategy(zero=...)", "the old forms true and false are stages 1 and 0"),
    _key(honoured, "stage", whole_between(0, 3), "MeshStrategy(zero=...)"),
    _key(ignored, "overlap_comm", OPTIONAL_SWITCH, _OVERLAPS),
    _key(ignored, "contiguous_gradients", SWITCH, _BUCKETS),
    _key(ignored, "allgather_partitions", SWITCH, _BUCKETS),
    _key(ignored, "reduce_scatter", SWITCH, "stages 1 to 3 always reduce and scatter at once"),
    _key(ignored, "reduce_bucket_size", SIZE, _BUCKETS),
    _key(ignored, "allgather_bucket_size", SIZE, _BUCKETS),
    _key(ignored, "use_multi_rank_bucket_allreduce", SWITCH, _BUCKETS),
    _key(ignored, "round_robin_gradients", SWITCH, _BUCKETS),
    _key(refused, "legacy_stage1", SWITCH, "there is one stage 1: leave it out"),
    _key(ignored, "sub_group_size", SIZE, _SIZES),
    _key(ignored, "ignore_unused_parameters", SWITCH, "parameters without gradients are allowed in every stage"),
    _key(ignored, "load_from_fp32_weights", SWITCH, "weights are kept and loaded in float32"),
    _key(honoured, "elastic_checkpoint", SWITCH, "", "every checkpoint loads on any number of ranks"),
    _key(ignored, "parameter_alignment", SWITCH, "parameters are not flattened"),
    _key(ignored, "compute_grad_norm", SWITCH, "the norm is computed where gradients are clipped, or asked for"),
    _key(ignored, "save_muon_momentum_buffer_in_memory", SWITCH, "is for an optimizer of DeepSpeed's"),
)

STAGE_3 = (
    _key(ignored, "stage3_prefetch_bucket_size", SIZE, "the next block is gathered while one computes"),
    _key(ignored, "stage3_param_persistence_threshold", SIZE, "small parameters travel with their block"),
    _key(ignored, "stage3_model_persistence_threshold", SIZE, "small parameters travel with their block"),
    _key(ignored, "stage3_max_live_parameters", SIZE, "what is gathered is freed after its block"),
    _key(ignored, "stage3_max_reuse_distance", SIZE, "what is gathered is freed after its block"),
    _key(
        ignored,
        "stage3_gather_16bit_weights_on_model_save",
        SWITCH,
        "checkpoints are sharded; `meshbolt checkpoint consolidate` writes one file",
    ),
    _key(
        ignored,
        "stage3_gather_fp16_weights_on_model_save",
        SWITCH,
        "old name; checkpoints are sharded; `meshbolt checkpoint consolidate` writes one file",
    ),
    _key(ignored, "stage3_module_granularity_threshold", SIZE, "the repeated blocks of a model are gathered as one"),
    _key(ignored, "stage3_use_all_reduce_for_fetch_params", SWITCH, "parameters are gathered"),
    _key(ignored, "stage3_allgather_sequential", SWITCH, "parameters are gathered block by block"),
    _key(mapped, "leaf_module", BLOCK, "Zero(unit=[...])"),
    _key(mapped, "leaf_module.classes", LIST, "Zero(unit=[...])", "the modules named are gathered as one, each"),
    _key(mapped, "leaf_module.names", LIST, "Zero(unit=[...])", "the modules named are gathered as one, each"),
    _key(
        refused,
        "leaf_module.name_suffixes",
        LIST,
        "modules are not found by the end of their name: list names or classes",
    ),
    _key(ignored, "memory_efficient_linear", SWITCH, _SHAPES),
    _key(ignored, "override_module_apply", SWITCH, _SHAPES),
    _key(ignored, "pipeline_loading_checkpoint", SWITCH, "each rank reads its shards only"),
    _key(ignored, "log_trace_cache_warnings", SWITCH, "blocks are found in the module, not by a trace"),
    _key(ignored, "enable_sanity_checks", SWITCH, "MESHBOLT_DEBUG=1 turns on the checks of meshbolt"),
)

OFFLOAD = (
    _key(mapped, "offload_optimizer", BLOCK, "Offload(optimizer=...)"),
    _key(mapped, "offload_optimizer.device", _DEVICE, "Offload(optimizer=...)", "in every stage"),
    _key(mapped, "offload_optimizer.nvme_path", OPTIONAL_TEXT, "Offload(path=...)"),
    _key(mapped, "offload_optimizer.pin_memory", SWITCH, "Offload(pin_memory=...)"),
    _key(mapped, "offload_optimizer.ratio", NUMBER, "Offload(fraction=...)", "in every stage"),
    _key(ignored, "offload_optimizer.buffer_count", SIZE, _SIZES),
    _key(ignored, "offload_optimizer.pipeline_read", SWITCH, "reading is behind updates in any case"),
    _key(ignored, "offload_optimizer.pipeline_write", SWITCH, "writing is behind updates in any case"),
    _key(ignored, "offload_optimizer.fast_init", SWITCH, "nothing is written before the first step"),
    _key(
        ignored, "offload_optimizer.super_offload", SWITCH, "updates overlap backward and forward: Offload(overlap=...)"
    ),
    _key(ignored, "offload_optimizer.cpuadam_cores_perc", NUMBER, "OMP_NUM_THREADS decides"),
    _key(mapped, "offload_param", BLOCK, "Offload(parameters=...)"),
    _key(mapped, "offload_param.device", _DEVICE, "Offload(parameters=...)", "needs stage 3 and offload_optimizer"),
    _key(mapped, "offload_param.nvme_path", OPTIONAL_TEXT, "Offload(path=...)"),
    _key(mapped, "offload_param.pin_memory", SWITCH, "Offload(pin_memory=...)"),
    _key(ignored, "offload_param.buffer_count", SIZE, _SIZES),
    _key(ignored, "offload_param.buffer_size", SIZE, _SIZES),
    _key(ignored, "offload_param.max_in_cpu", SIZE, "parameters in files are read into buffers of two blocks"),
    _key(mapped, "cpu_offload", OPTIONAL_SWITCH, "Offload(optimizer='cpu')", "old name of offload_optimizer"),
    _key(mapped, "cpu_offload_param", OPTIONAL_SWITCH, "Offload(parameters='cpu')", "old name of offload_param"),
    _key(mapped, "cpu_offload_use_pin_memory", OPTIONAL_SWITCH, "Offload(pin_memory=...)", "old name of pin_memory"),
)

VARIANTS = (
    _key(
        refused,
        "zero_hpz_partition_size",
        SIZE,
        "there is no second copy inside a machine; MeshStrategy(zero=Zero(stage=3, replicate=...)) keeps copies of all state",
        off=is_equal_to(0, 1),
    ),
    _key(refused, "zero_quantized_weights", SWITCH, "weights travel in the precision of the run"),
    _key(refused, "zero_quantized_nontrainable_weights", SWITCH, "weights travel in the precision of the run"),
    _key(refused, "zero_quantized_gradients", SWITCH, "gradients travel in the dtype of communication_data_type"),
    _key(refused, "zeropp_loco_param", OBJECT, "DeepSpeed 0.19.8 has removed it"),
    _key(
        refused,
        "mics_shard_size",
        WHOLE,
        "DeepSpeed 0.19.8 has removed it; Zero(replicate=ranks // mics_shard_size) shards in groups",
        off=is_equal_to(0, -1),
    ),
    _key(refused, "mics_hierarchical_params_gather", SWITCH, "DeepSpeed 0.19.8 has removed it"),
    _key(refused, "zenflow", OBJECT, "updates with old gradients change the results: leave it out"),
)

# DeepSpeed takes these with and without what is before them.
SHORT = tuple(
    replace(key, path=key.path.replace(".stage3_", "."), why=f"short name; {key.why}")
    for key in STAGE_3
    if key.path.startswith(f"{_ZERO}.stage3_") and "fp16" not in key.path
)

KEYS: tuple[Key, ...] = (*STAGE, *STAGE_3, *SHORT, *OFFLOAD, *VARIANTS)
