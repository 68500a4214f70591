"""What an artefact depends on. Equal identities mean that it belongs to this run; nothing here needs a process group."""

import importlib.metadata
import json
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

import kto_ds
from kto_ds.artifacts import digest_of, file_digest, folder_digest, require_match
from kto_ds.config import LossConfig, ModelConfig, RunConfig
from kto_ds.config_data import SourceConfig
from kto_ds.data.balance import recommended_weights
from kto_ds.data.dataset import TokenizedSplit
from kto_ds.data.tokenization import load_tokenizer
from kto_ds.errors import UserError, excerpt
from kto_ds.model.support import model_digest, quantization
from kto_ds.redaction import redact_values
from kto_ds.rows.sources import list_files

LIBRARIES = ("torch", "deepspeed", "transformers", "tokenizers", "datasets")


def library_versions() -> dict[str, str]:
    return {"kto_ds": kto_ds.__version__, **{name: importlib.metadata.version(name) for name in LIBRARIES}}


def run_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    return load_tokenizer(config.model.path, revision=config.model.revision, trust_remote_code=config.model.trust_remote_code)


def reference_model(config: RunConfig) -> ModelConfig:
    """Return the section that describes the reference: the policy's own without its adapters, unless reference.path names another model."""
    section = config.reference
    own = config.model.model_copy(update={"dtype": section.dtype or config.model.dtype, "lora": None})
    if section.path is None:
        return own
    return own.model_copy(update={"path": section.path, "revision": section.revision, "load_in_4bit": False})


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    vocabulary = sorted(tokenizer.get_vocab().items())
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else ""
    return {
        "tokenizer": digest_of(repr(vocabulary), backend, repr(tokenizer.special_tokens_map)),
        "chat_template": digest_of(repr(tokenizer.chat_template)),
    }


def tokenization_identity(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> dict:
    """What the tokens of the rows depend on. A prepare that was cut short goes on with the segments of an equal one."""
    data = config.data
    sources = {"train": data.train, **data.eval_splits}
    return {
        **tokenizer_identity(tokenizer),
        **data.model_dump(include={"max_length", "max_prompt_length", "max_completion_length", "truncation_mode", "append_eos", "special_tokens_in_text"}),
        "chat_template_kwargs": _as_text(data.chat_template_kwargs),
        "splits": list(sources),
        "sources": {name: _source_identity(listed) for name, listed in sources.items()},
        "contents": {path: digest for listed in sources.values() for source in listed for path, digest in _contents(config, source).items()},
    }


def dataset_identity(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> dict:
    """What a dataset artefact depends on: train refuses one that differs in any of these."""
    return {**tokenization_identity(config, tokenizer), **assembly_identity(config)}


def assembly_identity(config: RunConfig) -> dict:
    """What becomes of the tokens depends on this: splits, weights of sources and KL groups."""
    data = config.data
    weights = [source.weight for source in data.train]
    is_seeded = data.shuffle or data.held_out_fraction is not None or set(weights) != {1}
    return {
        **data.model_dump(include={"kl_group_size", "shuffle", "held_out_fraction", "on_bad_row", "max_bad_fraction"}),
        "seed": config.seed if is_seeded else None,
        "weights": weights,
    }


def _source_identity(sources: list[SourceConfig]) -> dict[str, list]:
    return {
        "paths": [source.path for source in sources],
        "splits": [source.split for source in sources],
        "columns": [_as_text(source.columns) for source in sources],
        "label_maps": [_as_text(source.label_map) for source in sources],
    }


def _as_text(value: object) -> str:
    # Mappings are compared key by key, and one that lacks an entry would pass.
    return json.dumps(value, sort_keys=True)


def source_files(config: RunConfig, source: SourceConfig) -> list[str]:
    """Return the files of a source. A glob does not take in what the run itself writes."""
    files = list_files(source.path, source.split)
    if files == [source.path]:
        return files
    own = [folder.resolve() for folder in (config.output_dir, config.dataset_dir, config.reference_dir)]
    others = [file for file in files if not any(Path(file).resolve().is_relative_to(folder) for folder in own)]
    if not others:
        raise UserError("only files of the run itself fit this pattern", where=source.path, remedy="keep the rows outside of output_dir, or name the files one by one")
    return others


def _contents(config: RunConfig, source: SourceConfig) -> dict[str, str]:
    """Return the digest of every local file or folder of a source; what lies on the hub, or was moved away since, has none."""
    try:
        paths = source_files(config, source)
    except UserError:
        return {}
    return {path: _content_digest(Path(path)) for path in paths if Path(path).exists()}


def _content_digest(path: Path) -> str:
    if path.is_file():
        return file_digest(path)
    # datasets keeps what it computed from a saved dataset in the same folder.
    files = [file for file in path.rglob("*") if file.is_file() and not file.name.startswith("cache-")]
    return folder_digest(path, [file.relative_to(path).as_posix() for file in files])


def require_same_dataset(expected: dict, found: dict, *, where: str, remedy: str) -> None:
    """Refuse a dataset artefact of another identity. A source that was moved away since is no reason to; one that was changed is."""
    known = found.get("contents", {})
    changed = [
        f"the content of {excerpt(path)} has changed since prepare" if path in known else f"{excerpt(path)} is new since prepare"
        for path, digest in expected["contents"].items()
        if known.get(path) != digest
    ]
    require_match({**expected, "contents": {}}, found, where=where, remedy=remedy, besides=changed)


def resolve_weights(loss: LossConfig, train: TokenizedSplit) -> LossConfig:
    """Return the loss with numbers in place of automatic weights, which follow from the labels of the training split."""
    num_desirable = int(np.count_nonzero(train.desirable))
    desirable, undesirable = recommended_weights(num_desirable, train.num_examples - num_desirable, loss.desirable_weight, loss.undesirable_weight)
    return loss.model_copy(update={"desirable_weight": desirable, "undesirable_weight": undesirable})


def weights_line(loss: LossConfig) -> str:
    return f"{loss.desirable_weight:.4g} (desirable) and {loss.undesirable_weight:.4g} (undesirable)"


def weights_of_config(loss: LossConfig, saved: dict) -> LossConfig:
    """Return the loss with the numbers of a checkpoint's config in place of automatic weights."""
    names = [name for name in ("desirable_weight", "undesirable_weight") if loss.model_dump()[name] == "auto"]
    return loss.model_copy(update={name: saved["loss"][name] for name in names})


def run_record(config: RunConfig, loss: LossConfig, identity: dict) -> dict:
    """What a checkpoint remembers of its run; what a resume makes of it is in resume.py. `loss` has numbers as weights, `identity` is of its inputs."""
    resolved = config.model_copy(update={"loss": loss}).model_dump(mode="json")
    return {"config": redact_values(resolved), "identity": identity, "versions": library_versions()}


def require_same_tokenizer(model: ModelConfig, identity: dict, *, where: str) -> None:
    """Refuse a model whose tokenizer gives other ids than that of `identity`: a dataset's, or tokenizer_identity."""
    tokenizer = load_tokenizer(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    found = {"tokenizer": identity["tokenizer"]}
    require_match({"tokenizer": tokenizer_identity(tokenizer)["tokenizer"]}, found, where=where, remedy="use models that share the tokenizer of model.path")


def reference_identity(config: RunConfig, dataset_manifest: dict) -> dict:
    """What reference log-probs depend on, the pairs apart. The weights are digested as files, so partitioning does not matter."""
    model = reference_model(config)
    carried = {key: dataset_manifest["identity"][key] for key in ("tokenizer", "chat_template", "max_length", "truncation_mode")}
    return {"reference model": model_digest(model), "dtype": model.dtype, "quantization": _as_text(quantization(model)), **carried}


# What a log-prob of given tokens depends on. Truncation is not among it: a pair's name is made of the tokens that are left.
SAME_VALUES = ("reference model", "dtype", "quantization", "tokenizer", "chat_template")


# The part of it that a slip in a config changes, and that took the reference hours.
SAME_MODEL = ("reference model", "dtype", "quantization")


def gives_same_values(identity: dict, other: object) -> bool:
    """Tell whether log-probs of one reference identity are those of another for the same tokens. `other` may be anything that JSON holds."""
    return isinstance(other, dict) and all(other.get(key) == identity[key] for key in SAME_VALUES)


def is_same_model(identity: dict, other: dict) -> bool:
    return all(other.get(key) == identity[key] for key in SAME_MODEL)


def reference_origin(config: RunConfig, dataset_manifest: dict) -> dict:
    """What a reference artefact came from, in the words of the config: not compared, but told where something else does not match."""
    model = reference_model(config)
    fields = {key: value for key, value in dataset_manifest["identity"].items() if key not in ("contents", "tokenizer", "chat_template")}
    return {"model.path": model.path, "model.revision": model.revision, **fields}


def origin_differences(expected: dict, found: object) -> list[str]:
    """Return one line for each thing in which the origin of an artefact differs from that of the run."""
    found = found if isinstance(found, dict) else {}
    return [f"{key}: this run has {excerpt(value)}, the artefact was made with {excerpt(found.get(key))}" for key, value in expected.items() if found.get(key) != value]
