"""Keys of a DeepSpeed file that DeepSpeed 0.19.8 accepts and then ignores, that contradict each other, or that change what kto_ds computes. All are refused, with the key."""

from typing import NamedTuple

from kto_ds.errors import UserError, excerpt

ONLY_STAGE_3 = frozenset("""
    offload_param sub_group_size zero_hpz_partition_size memory_efficient_linear override_module_apply leaf_module log_trace_cache_warnings enable_sanity_checks
""".split())  # fmt: skip
ONLY_BELOW_STAGE_3 = frozenset("""
    allgather_bucket_size round_robin_gradients use_multi_rank_bucket_allreduce parameter_alignment ignore_unused_parameters
""".split())  # fmt: skip
# Another name of a key -> the one that this project completes; with both, one would be ignored.
SPELLED = {
    "prefetch_bucket_size": "stage3_prefetch_bucket_size", "param_persistence_threshold": "stage3_param_persistence_threshold",
    "model_persistence_threshold": "stage3_model_persistence_threshold", "max_live_parameters": "stage3_max_live_parameters", "max_reuse_distance": "stage3_max_reuse_distance",
    "module_granularity_threshold": "stage3_module_granularity_threshold", "use_all_reduce_for_fetch_params": "stage3_use_all_reduce_for_fetch_params",
    "allgather_sequential": "stage3_allgather_sequential", "cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param",
    "cpu_offload_use_pin_memory": "offload_optimizer.pin_memory",
}  # fmt: skip
# Keys that no run has a use for, whatever they say -> why.
USELESS = {
    "allgather_partitions": "DeepSpeed reads it nowhere",
    "elastic_checkpoint": "DeepSpeed has given it up; kto_ds converts a checkpoint for other numbers of ranks by itself",
    "legacy_stage1": "DeepSpeed has given it up",
    "pipeline_loading_checkpoint": "there is no pipeline",
    "load_from_fp32_weights": "checkpoints hold float32 master weights always",
    "stage3_gather_16bit_weights_on_model_save": "kto-ds export gathers the weights",
    "gather_16bit_weights_on_model_save": "kto-ds export gathers the weights",
    "stage3_gather_fp16_weights_on_model_save": "kto-ds export gathers the weights",
    "save_muon_momentum_buffer_in_memory": "the optimizer is AdamW",
}
# Keys that change what is computed -> why they may not be on.
REFUSED = {
    "zero_quantized_weights": "log-probs of rounded weights are not those that the reference was scored with, so rewards would not begin at 0",
    "zero_quantized_nontrainable_weights": "log-probs of rounded weights are not those that the reference was scored with, so rewards would not begin at 0",
    "zero_quantized_gradients": "gradients of 4 bits are not what optim and the resume of a run are checked with",
    "zenflow": "it updates some weights steps later, which is another algorithm",
    "stage3_allgather_sequential": "with it DeepSpeed prefetches nothing, and kto_ds gathers whole layers ahead",
}
ONLY_NVME = {
    "offload_optimizer": frozenset("nvme_path buffer_count pipeline_read pipeline_write fast_init".split()),
    "offload_param": frozenset("nvme_path buffer_count buffer_size max_in_cpu".split()),
}
COMMUNICATION_TYPES = ("fp16", "bf16", "fp32")


class Finding(NamedTuple):
    key: str
    why: str
    remedy: str


def refuse_conflicts(raw: dict, where: str) -> None:
    """UserError for the first key of a DeepSpeed file that is ignored, contradicts another, or may not be on."""
    section = raw.get("zero_optimization", {})
    if not isinstance(section, dict):
        raise UserError(f"zero_optimization = {excerpt(section)} is not a section", where=where, remedy='write {"zero_optimization": {"stage": 3}}')
    finding = next((found for look in (_of_any_stage, _of_stage, _of_offload, _of_top_level) for found in look(raw, section)), None)
    if finding:
        raise UserError(f"{finding.key}: {finding.why}", where=where, remedy=finding.remedy)


def require_world(raw: dict, num_ranks: int, where: str) -> None:
    """Refuse a file that does not go with this number of ranks."""
    size = raw.get("zero_optimization", {}).get("zero_hpz_partition_size", 1)
    if size > 1 and (num_ranks % size or size >= num_ranks):
        what = f"zero_optimization.zero_hpz_partition_size = {size} holds a second copy of the weights in every {size} ranks, and there are {num_ranks}"
        raise UserError(what, where=where, remedy="set it to the GPUs of a node, with at least two nodes, or use zero3")


def _of_any_stage(raw: dict, section: dict):
    for key, value in section.items():
        name = f"zero_optimization.{key}"
        if key in USELESS:
            yield Finding(name, f"it has no effect: {USELESS[key]}", f"remove {key}")
        elif key in SPELLED:
            yield Finding(name, "it is another name of a key that kto_ds reads", f"write {SPELLED[key]}")
        elif key in REFUSED and value:
            yield Finding(name, REFUSED[key], f"remove {key}")


def _of_stage(raw: dict, section: dict):
    stage = section.get("stage", 0)
    for key in section:
        name = f"zero_optimization.{key}"
        if stage != 3 and (key.startswith("stage3_") or key in ONLY_STAGE_3):
            yield Finding(name, f"it is for stage 3 and ignored in stage {stage}", f"remove {key}, or set stage to 3")
        elif stage == 3 and key in ONLY_BELOW_STAGE_3:
            yield Finding(name, "it is for stages 1 and 2 and ignored in stage 3", f"remove {key}")
        elif stage == 0 and key == "offload_optimizer":
            yield Finding(name, "it is ignored in stage 0", "remove offload_optimizer, or set stage to 1, 2 or 3")


def _of_offload(raw: dict, section: dict):
    for key, of_nvme in ONLY_NVME.items():
        offload = section.get(key)
        if not isinstance(offload, dict):
            continue
        device, name = offload.get("device", "none"), f"zero_optimization.{key}"
        if device == "none" and (others := sorted(offload.keys() - {"device"})):
            yield Finding(f"{name}.{others[0]}", f"it is ignored, as {key}.device is none", f"set {key}.device to cpu, or remove {key}")
        if device == "cpu" and (others := sorted(offload.keys() & of_nvme)):
            yield Finding(f"{name}.{others[0]}", f"it is for nvme and ignored, as {key}.device is cpu", f"remove {others[0]}")
        if device == "nvme" and not offload.get("nvme_path"):
            yield Finding(f"{name}.nvme_path", f"it is missing, and {key}.device is nvme", "name a folder on a local disk")
        if offload.get("super_offload"):
            yield Finding(f"{name}.super_offload", "it is an optimizer of its own, which kto_ds has not been tried with", "remove super_offload")
        elif "cpuadam_cores_perc" in offload:
            yield Finding(f"{name}.cpuadam_cores_perc", "it is ignored without super_offload", "remove cpuadam_cores_perc")
        if offload.get("ratio", 1.0) < 1 and section.get("stage", 0) != 3:
            yield Finding(f"{name}.ratio", "a part of the optimizer can be offloaded in stage 3 only", "remove ratio, or set stage to 3")


def _of_top_level(raw: dict, section: dict):
    if section.get("stage", 0) == 3 and section.get("reduce_scatter", True):
        for key, neutral in (("prescale_gradients", False), ("gradient_predivide_factor", 1.0)):
            if raw.get(key, neutral) != neutral:
                yield Finding(key, "stage 3 cannot scale gradients before it reduces them", f"remove {key}")
    if (kind := raw.get("communication_data_type")) is not None and kind not in COMMUNICATION_TYPES:
        yield Finding("communication_data_type", f"{excerpt(kind)} is none of {', '.join(COMMUNICATION_TYPES)}", "correct it, or remove it: gradients are then reduced in model.dtype")
    devices = [section[key].get("device") for key in ONLY_NVME if isinstance(section.get(key), dict)]
    if "aio" in raw and "nvme" not in devices:
        yield Finding("aio", "it is for nvme and ignored, as nothing is offloaded there", "remove aio")
