"""What train says at its start and at its end, gathered from what it runs with. How it reads is in report/run_view.py."""

from collections.abc import Sequence

from transformers import PretrainedConfig

from kto_ds.config import RunConfig
from kto_ds.model.checkpointing import in_words
from kto_ds.model.flops import peak_flops
from kto_ds.model.memory import Load, peak_memory
from kto_ds.model.scoring import Serving
from kto_ds.model.sizes import ModelSizes, model_sizes, sizes_in_memory, skeleton
from kto_ds.model.states import read_zero
from kto_ds.model.support import DTYPES
from kto_ds.report.metrics_file import METRICS_FILE, read_records
from kto_ds.report.run_view import Closing, Estimate, Opening, closing_rows, closing_title, opening_rows, opening_title
from kto_ds.report.screen import show
from kto_ds.report.throughput import Lap, speed_rows, sum_of_laps
from kto_ds.runtime.collectives import World, total_memory
from kto_ds.runtime.deepspeed_config import zero_stage
from kto_ds.runtime.guard import logs_folder
from kto_ds.stages.advising import advice_lines
from kto_ds.stages.identity import weights_line
from kto_ds.stages.run import Inputs


def announce(
    config: RunConfig, model_config: PretrainedConfig, serving: Serving, deepspeed_config: dict, inputs: Inputs, world: World, *, aux_coef: float | None, done_steps: int
) -> None:
    """Print what will run, before weights are read."""
    lm = skeleton(config.model, model_config)
    sizes = model_sizes(lm)
    held = sizes_in_memory(sizes, lm, config.model)
    origin = "the model's config" if config.model.router_aux_loss_coef is None else "model.router_aux_loss_coef"
    opening = Opening(
        model=config.model.path, dtype=config.model.dtype, num_parameters=sizes.total, num_trainable=sum(sizes.trainable),
        num_examples=inputs.splits["train"].num_examples, global_batch_size=config.batch.global_batch_size,
        num_epochs=inputs.plan.epoch_after(inputs.plan.num_steps), done_steps=done_steps, num_steps=inputs.plan.num_steps,
        num_ranks=world.num_ranks, ranks_of_a_row=config.batch.sequence_parallel_size, zero_stage=zero_stage(deepspeed_config), deepspeed_config=config.deepspeed.config,
        way=serving.way, micro_batch_tokens=config.batch.max_tokens_per_microbatch, scoring_tokens=config.batch.scoring_tokens, checkpointing=in_words(config.model),
        estimate=_estimate(config, held, serving, deepspeed_config, world) if world.device.type == "cuda" else None, output_dir=config.output_dir, log_folder=logs_folder(config.output_dir, "train"),
        weights=f"automatic: {weights_line(inputs.loss)}" if inputs.loss != config.loss else "",
        aux_loss=f"load-balancing loss with coefficient {aux_coef:g}, from {origin}" if aux_coef is not None else "",
    )  # fmt: skip
    show(opening_title(opening), opening_rows(opening))
    for line in advice_lines(config):
        print(line, flush=True)
    if serving.notice:
        print(f"notice: {serving.notice}", flush=True)
    if (serving.backend, serving.kernels) != inputs.reference_way:
        theirs, ours = " and ".join(inputs.reference_way), f"{serving.backend} and {serving.kernels}"
        print(f"notice: the reference was scored with {theirs} kernels, the policy runs with {ours}: rewards begin with the rounding between them", flush=True)


def _estimate(config: RunConfig, held: ModelSizes, serving: Serving, deepspeed_config: dict, world: World) -> Estimate:
    """Return the memory of full micro-batches of which half is scored; `held` are the sizes as memory sees them."""
    model, batch = config.model, config.batch
    load = Load(
        tokens=batch.max_tokens_per_microbatch, scored_tokens=batch.max_tokens_per_microbatch // 2, scoring_tokens=batch.scoring_tokens,
        weight_bytes=DTYPES[model.dtype].itemsize, checkpoint_every=model.gradient_checkpointing_every if model.gradient_checkpointing else 0,
        offloads_checkpoints=model.gradient_checkpointing_offload, kernels=serving.kernels,
    )  # fmt: skip
    return Estimate(sum(peak_memory(held, read_zero(deepspeed_config), load, world.num_ranks).memory), total_memory(world.device))


def conclude(config: RunConfig, laps: Sequence[Lap], peaks_gib: list[float], world: World, *, num_steps: int, best_step: int | None, seconds: float) -> None:
    """Print what the run came to, from its record and from the laps and seconds of this start."""
    peak = peak_flops(world.device, config.model.dtype)
    speed = speed_rows(sum_of_laps(list(laps)), peaks_gib, peak_flops=peak) if laps else []
    closing = Closing(num_steps, seconds, read_records(config.output_dir / METRICS_FILE), best_step, speed, config.output_dir)
    show(closing_title(closing), closing_rows(closing))
