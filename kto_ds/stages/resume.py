"""Going on from a checkpoint: which one, whether it belongs to this run, and what may have changed in the config since."""

from typing import NamedTuple

from pydantic import ValidationError

from kto_ds.artifacts import require_match
from kto_ds.config import RunConfig
from kto_ds.config_text import leaves
from kto_ds.data.batch_plan import BatchPlan
from kto_ds.data.dataset import TokenizedSplit
from kto_ds.errors import UserError, excerpt
from kto_ds.redaction import redact_values
from kto_ds.runtime.collectives import World, on_main_rank
from kto_ds.runtime.engine import Engine
from kto_ds.runtime.restore import Checkpoint, load_checkpoint, newest_verified
from kto_ds.runtime.retention import sweep
from kto_ds.runtime.rng import derive_rng
from kto_ds.stages.inputs import evaluation_splits
from kto_ds.stages.objective import evaluation_metrics
from kto_ds.stages.progress import Progress

# Another value makes another run of it. What is trained on is known by digests besides: of the dataset, of the reference's weights, of the plan.
FIXED = frozenset("""
    seed model.path model.revision model.dtype model.lora model.load_in_4bit model.router_aux_loss_coef data.shuffle data.kl_group_size
    loss.loss_type loss.beta loss.desirable_weight loss.undesirable_weight loss.kl_fraction batch.global_batch_size
""".split())  # fmt: skip
# Another value makes sense in the middle of a run, but must not slip in: --accept-changes. It holds from the next step on.
ALLOWED = frozenset("""
    optim.learning_rate optim.lr_scheduler_type optim.warmup_ratio optim.adam_beta1 optim.adam_beta2 optim.adam_epsilon optim.weight_decay optim.max_grad_norm
    train.num_train_epochs train.max_steps
""".split())  # fmt: skip
# Changes where and how fast, but not what is computed, rounding apart; or its effect is known by a digest. A line is printed for each.
FREE = frozenset("""
    output_dir model.attention model.kernels model.layout model.gradient_checkpointing model.gradient_checkpointing_every model.gradient_checkpointing_offload
    model.trust_remote_code data.train data.eval data.held_out_fraction data.max_length data.max_prompt_length data.max_completion_length data.truncation_mode
    data.append_eos data.special_tokens_in_text data.chat_template_kwargs data.max_bad_fraction data.on_bad_row data.allow_one_label data.dataset_num_proc
    data.artifact reference.path reference.revision reference.dtype reference.placement reference.per_token reference.artifact reference.max_tokens_per_microbatch
    train.setup_timeout_seconds train.step_timeout_seconds train.on_nonfinite train.max_skipped_steps train.loss_spike_sigmas
    batch.max_tokens_per_microbatch batch.max_tokens_per_scoring_microbatch batch.sequence_parallel_size deepspeed.config eval.eval_steps eval.path eval.generate
    checkpoint.save_steps checkpoint.save_total_limit checkpoint.resume checkpoint.metric_for_best_model checkpoint.greater_is_better
    report.logging_steps report.wandb.mode report.wandb.project report.wandb.name report.tensorboard
""".split())  # fmt: skip
REMEDY = "restore the config, choose another output_dir, or set checkpoint.resume: never"


class Change(NamedTuple):
    """A key of the config that has another value than in the run that wrote a checkpoint."""

    key: str
    was: object
    now: object

    def __str__(self) -> str:
        return f"{self.key}: was {excerpt(self.was)}, now {excerpt(self.now)}"


def changes(saved: dict, now: dict) -> list[Change]:
    """Return the differences between the config of a checkpoint and that of a run, both dumped as JSON values."""
    # A key that is newer than the checkpoint had its default then; what is secret has been taken out of what was saved.
    was, is_now = leaves(RunConfig, RunConfig.model_validate(saved).model_dump(mode="json")), leaves(RunConfig, redact_values(now))
    return [Change(key, was[key], is_now[key]) for key in is_now if was[key] != is_now[key]]


def find_checkpoint(config: RunConfig, record: dict, plan: BatchPlan, world: World, zero_stage: int, *, accept_changes: bool) -> Checkpoint | None:
    """Return the newest verified checkpoint if the run is to resume from one; one that does not fit is refused here, before weights are read.

    What killed runs left half-written goes.
    """
    root = config.output_dir / "checkpoints"
    on_main_rank(lambda: sweep(root))
    if config.checkpoint.resume == "never":
        return None
    checkpoint = newest_verified(root, world, sets_aside=True)
    if checkpoint is None:
        return None
    found = require_same_run(checkpoint, record)
    require_match({"batch plan": plan.digest_until(checkpoint.step)}, {"batch plan": checkpoint.manifest["plan"]}, where=str(checkpoint.folder), remedy=REMEDY)
    if checkpoint.zero_stage != zero_stage:
        what = f"saved with ZeRO stage {checkpoint.zero_stage}, now {zero_stage}"
        raise UserError(what, where=str(checkpoint.folder), remedy="start with a DeepSpeed config of the same stage; the number of ranks may change")
    pending = [change for change in found if change.key in ALLOWED]
    if pending and not accept_changes:
        remedy = f"give --accept-changes to go on with the new values, or {REMEDY}"
        raise UserError(_in_lines("the config has changed since this checkpoint", pending), where=str(checkpoint.folder), remedy=remedy)
    if world.is_main:
        for change in found:
            print(f"changed since {checkpoint.folder.name}: {change}", flush=True)
    return checkpoint


def require_same_run(checkpoint: Checkpoint, record: dict) -> list[Change]:
    """Refuse a checkpoint of another run: other inputs, or another value of a FIXED key; return the changes of the other keys."""
    where = str(checkpoint.folder)
    try:
        found = changes(checkpoint.manifest["config"], record["config"])
        Progress.from_json(checkpoint.manifest["progress"])
    except (ValidationError, TypeError, ValueError) as error:
        raise UserError("its config and progress are not those of this version of kto_ds", where=where, remedy=REMEDY) from error
    fixed = [f"{change.key}: this run has {excerpt(change.now)}, the checkpoint has {excerpt(change.was)}" for change in found if change.key in FIXED]
    require_match(record["identity"], checkpoint.manifest["identity"], where=where, remedy=REMEDY, besides=fixed)
    return [change for change in found if change.key not in FIXED]


def _in_lines(head: str, found: list[Change]) -> str:
    return "\n  ".join([f"{head}, {len(found)} difference{'s' if len(found) > 1 else ''}:", *map(str, found)])


def restore(engine: Engine, checkpoint: Checkpoint | None, seed: int, world: World) -> Progress:
    """Put the run back to where the checkpoint was taken, or to its start without one; return how far it is."""
    if checkpoint is None:
        derive_rng(seed, 0, world.rank, world.device)
        return Progress()
    load_checkpoint(engine, checkpoint, seed=seed, world=world)
    return Progress.from_json(checkpoint.manifest["progress"])


def require_known_metric(config: RunConfig, splits: dict[str, TokenizedSplit]) -> None:
    """Refuse a checkpoint.metric_for_best_model that no evaluation of this run gives; the message names those that there are."""
    wanted = config.checkpoint.metric_for_best_model
    known = [f"{name}/{metric}" for name in evaluation_splits(splits) for metric in evaluation_metrics(splits[name], config.loss)]
    if wanted is not None and wanted not in known:
        remedy = f"choose one of {', '.join(known)}" if known else "name evaluation rows under data.eval, or leave this key out"
        raise UserError(f"no evaluation of this run gives {excerpt(wanted)}", where="checkpoint.metric_for_best_model", remedy=remedy)
