"""What a training run is made of: its inputs, its engine, and the work of its steps. train makes one to its end, doctor two steps of it."""

from transformers import PretrainedConfig

from kto_ds.artifacts import digest_of
from kto_ds.config import RunConfig
from kto_ds.data.batch_plan import plan_batches
from kto_ds.data.dataset import FILES
from kto_ds.data.packing import require_fit
from kto_ds.data.sharding import Sharding
from kto_ds.model.checkpointing import checkpointed_share
from kto_ds.model.flops import ModelShape, model_shape
from kto_ds.model.load import destination, load_policy
from kto_ds.model.lora import in_words as adapters_in_words
from kto_ds.model.lora import require_lora_served
from kto_ds.model.scoring import Serving
from kto_ds.model.sizes import model_sizes, skeleton
from kto_ds.model.states import read_zero, require_partial_offload, require_room
from kto_ds.model.support import DTYPES, model_digest, require_sharable
from kto_ds.runtime.collectives import World, neighbours, on_main_rank, total_memory
from kto_ds.runtime.deepspeed_config import zero_stage
from kto_ds.runtime.engine import Engine
from kto_ds.runtime.sequence_parallel import exchanging
from kto_ds.runtime.watch import beat
from kto_ds.runtime.zero_keys import require_world
from kto_ds.stages.identity import resolve_weights, run_record
from kto_ds.stages.inputs import open_dataset, open_reference
from kto_ds.stages.resume import require_known_metric
from kto_ds.stages.run import Inputs
from kto_ds.stages.samples import open_questions
from kto_ds.stages.serving import require_same_weights
from kto_ds.stages.step_work import StepPlanner


def open_inputs(config: RunConfig) -> Inputs:
    """Open the artefacts and plan every step; whatever does not belong together is refused here, before weights are read."""
    splits, manifest = open_dataset(config)
    require_known_metric(config, splits)
    reference_logps, reference_manifest = open_reference(config, splits, manifest)
    for split in splits.values():
        for budget, where in ((config.batch.max_tokens_per_microbatch, "max_tokens_per_microbatch"), (config.batch.scoring_tokens, "max_tokens_per_scoring_microbatch")):
            require_fit(split.longest_pair_tokens, budget, f"batch.{where}", group_size=config.batch.sequence_parallel_size)
    plan = plan_batches(
        splits["train"].kl_group_of, global_batch_size=config.batch.global_batch_size, num_train_epochs=config.train.num_train_epochs,
        max_steps=config.train.max_steps, shuffle=config.data.shuffle, seed=config.seed,
    )  # fmt: skip
    loss = resolve_weights(config.loss, splits["train"])
    reference_model = reference_manifest["identity"]["reference model"]
    identity = {
        # Only what is trained on: evaluation rows that are added later are no reason to refuse a resume.
        "dataset": digest_of(*(entry["digest"] for name, entry in manifest["files"].items() if name.startswith("train/") and name != f"train/{FILES}")),
        "reference model": reference_model,
        "reference dtype": reference_manifest["identity"]["dtype"],
    }
    if config.model.lora is not None:  # a checkpoint does not hold the weights below the adapters
        identity["base model"] = reference_model if config.reference.path is None else on_main_rank(lambda: model_digest(config.model))
    reference_way = reference_manifest["attention"], reference_manifest["kernels"]
    questions = open_questions(config.eval.generate, config.model, splits, max_tokens=config.batch.scoring_tokens)
    return Inputs(splits, reference_logps, reference_way, plan, loss, run_record(config, loss, identity), questions)


def require_served(config: RunConfig, model_config: PretrainedConfig, deepspeed_config: dict, serving: Serving, world: World) -> None:
    """Refuse what cannot run on these ranks: groups that do not divide them, adapters that have no place, a DeepSpeed config or states beyond them."""
    require_sharable(config.batch.sequence_parallel_size, model_config, layout=serving.layout, num_ranks=world.num_ranks)
    require_lora_served(config.model, model_config, world.device)
    require_world(deepspeed_config, world.num_ranks, where=config.deepspeed.config)
    if world.device.type == "cuda" and not config.model.load_in_4bit:
        sizes, zero = model_sizes(skeleton(config.model, model_config)), read_zero(deepspeed_config)
        require_partial_offload(sizes, zero, world.num_ranks)
        require_room(sizes, zero, DTYPES[config.model.dtype].itemsize, world.num_ranks, total_memory(world.device))


def build_engine(
    config: RunConfig, model_config: PretrainedConfig, serving: Serving, deepspeed_config: dict, inputs: Inputs, world: World
) -> tuple[Engine, ModelShape | None]:
    require_same_weights(config.model)
    group = neighbours(config.batch.sequence_parallel_size)
    policy = load_policy(
        config.model, model_config, layout=serving.layout, backend=serving.backend, kernels=serving.kernels, exchange=group and exchanging(group),
        gradient_checkpointing=config.model.gradient_checkpointing, seed=config.seed, beat=beat,
        **destination(config.model, deepspeed_config if zero_stage(deepspeed_config) == 3 else None, world.device),
    )  # fmt: skip
    if config.model.lora is not None and world.is_main:
        print(adapters_in_words(config.model, policy.lm), flush=True)
    shape = model_shape(policy, model_config)
    return Engine(policy, deepspeed_config, config.optim, inputs.plan.num_steps, group), shape


def plan_steps(config: RunConfig, inputs: Inputs, serving: Serving, world: World, shape: ModelShape | None, aux_coef: float | None) -> StepPlanner:
    training = Sharding(serving.layout, config.batch.max_tokens_per_microbatch, world.rank, world.num_ranks, world.device, config.batch.sequence_parallel_size)
    return StepPlanner(
        inputs.splits["train"], inputs.plan, config.seed, kl_fraction=config.loss.kl_fraction if config.loss.loss_type == "kto" else 0.0, training=training,
        scoring=training._replace(max_tokens=config.batch.scoring_tokens), shape=shape, recomputed_layers=checkpointed_share(config.model), balances_experts=bool(aux_coef),
    )  # fmt: skip
