"""Score the evaluation rows with an exported model, or any other, on one or more ranks."""

import json

from transformers import PretrainedConfig

from kto_ds.artifacts import write_atomically
from kto_ds.config import LossConfig, ModelConfig, RunConfig
from kto_ds.data.packing import require_fit
from kto_ds.data.sharding import Sharding
from kto_ds.errors import UserError
from kto_ds.model.lora import Adapter, require_lora_served
from kto_ds.model.scoring import choose_serving
from kto_ds.model.support import read_model_config, require_positions
from kto_ds.report.samples_file import EVALUATION_SAMPLES_FILE
from kto_ds.runtime.collectives import World, barrier, on_main_rank, start
from kto_ds.runtime.guard import guarded, stacks_folder
from kto_ds.stages.identity import require_same_tokenizer, resolve_weights, weights_line
from kto_ds.stages.inputs import evaluation_splits, open_dataset, open_reference
from kto_ds.stages.objective import evaluate_split
from kto_ds.stages.samples import Asker, ask, open_questions
from kto_ds.stages.serving import load_scorer, place
from kto_ds.stages.trained import exported_model

EXPORT_FIRST = "run kto-ds export --config RUN.yaml, or set eval.path"


def main(config: RunConfig) -> None:
    if not config.data.eval_splits and config.data.held_out_fraction is None:
        remedy = "list sources under data.eval, or set data.held_out_fraction, and run kto-ds prepare and kto-ds precompute-ref again"
        raise UserError("no evaluation rows", where="data.eval", remedy=remedy)
    path, model, adapter = exported_model(config, remedy=EXPORT_FIRST)
    model_config = read_model_config(model, where="eval.path")
    seconds = config.train.setup_timeout_seconds
    world = start(timeout_seconds=seconds, dumps=stacks_folder(config.output_dir, "evaluate"))
    with guarded(world, config.output_dir, "evaluate", seconds=seconds):
        _evaluate(config, path, model, model_config, adapter, world)
        barrier()


def _evaluate(config: RunConfig, path: str, model: ModelConfig, model_config: PretrainedConfig, adapter: Adapter | None, world: World) -> None:
    require_lora_served(model, model_config, world.device)
    splits, manifest = open_dataset(config)
    on_main_rank(lambda: require_same_tokenizer(model, manifest["identity"], where="eval.path"))
    references, _ = open_reference(config, splits, manifest)
    loss, names = resolve_weights(config.loss, splits["train"]), evaluation_splits(splits)
    for name in names:
        require_positions(model_config, splits[name].longest_pair_tokens, "eval.path")
        require_fit(splits[name].longest_pair_tokens, config.reference.max_tokens_per_microbatch, "reference.max_tokens_per_microbatch")
    questions = open_questions(config.eval.generate, model, splits, max_tokens=config.reference.max_tokens_per_microbatch, where="eval.path")
    serving = choose_serving(model, model_config, world.device)
    scorer = load_scorer(config, model, model_config, serving, place(config, model, model_config, world), world, adapter=adapter and adapter.folder)
    sharding = Sharding(serving.layout, config.reference.max_tokens_per_microbatch, world.rank, world.num_ranks, world.device)
    metrics = {name: evaluate_split(scorer, splits[name], references[name], loss, sharding=sharding) for name in names}
    if world.is_main:
        _report(config, path, loss, metrics)
    if questions:
        on_main_rank(lambda: (config.output_dir / EVALUATION_SAMPLES_FILE).unlink(missing_ok=True))
        asker = Asker(scorer, questions, splits, references, loss.beta, config.seed, sharding)
        ask(asker, config.output_dir, step=None, file=EVALUATION_SAMPLES_FILE, wants_to_stop=lambda: False)


def _report(config: RunConfig, path: str, loss: LossConfig, metrics: dict[str, dict[str, float]]) -> None:
    """Write and print the metrics of each evaluation split."""
    config.output_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(config.output_dir / "evaluation.json", json.dumps({"model": path, "splits": metrics}, indent=1))
    print(f"evaluation of {path}")
    if loss != config.loss:
        print(f"automatic weights: {weights_line(loss)}")
    for name, found in metrics.items():
        print(f"{name}:")
        for metric, value in found.items():
            print(f"  {metric:<18} {value:>12,}" if isinstance(value, int) else f"  {metric:<18} {value:>12.5f}")
