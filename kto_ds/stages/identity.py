"""What an artefact depends on. Equal identities mean that it belongs to this run; nothing here needs a process group."""

import importlib.metadata
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

import kto_ds
from kto_ds.artifacts import digest_of, file_digest, folder_digest, require_match
from kto_ds.config import ModelConfig, RunConfig, SourceConfig
from kto_ds.data.dataset import TokenizedSplit
from kto_ds.data.reference import KEY_DTYPE
from kto_ds.data.tokenization import load_tokenizer
from kto_ds.model.support import model_digest

LIBRARIES = ("torch", "deepspeed", "transformers", "datasets")


def library_versions() -> dict[str, str]:
    return {"kto_ds": kto_ds.__version__, **{name: importlib.metadata.version(name) for name in LIBRARIES}}


def run_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    return load_tokenizer(config.model.path, revision=config.model.revision, trust_remote_code=config.model.trust_remote_code)


def reference_model(config: RunConfig) -> ModelConfig:
    """Return the section that describes the reference: the policy's own, unless reference.path names another model."""
    if config.reference.path is None:
        return config.model
    return config.model.model_copy(update={"path": config.reference.path, "revision": None})


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    vocabulary = sorted(tokenizer.get_vocab().items())
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else ""
    return {
        "tokenizer": digest_of(repr(vocabulary), backend, repr(tokenizer.special_tokens_map)),
        "chat_template": digest_of(repr(tokenizer.chat_template)),
    }


def truncation_identity(config: RunConfig) -> dict:
    return {"max_length": config.data.max_length, "truncation_mode": config.data.truncation_mode}


def dataset_identity(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> dict:
    """What a dataset artefact depends on: train refuses one that differs in any of these."""
    grouping = {"kl_group_size": config.data.kl_group_size, "shuffle": config.data.shuffle, "seed": config.seed if config.data.shuffle else None}
    sources = {split: [_source_identity(source) for source in sources] for split, sources in (("train", config.data.train), ("eval", config.data.eval))}
    return {**tokenizer_identity(tokenizer), **truncation_identity(config), **grouping, **{f"{split} sources": found for split, found in sources.items()}}


def _source_identity(source: SourceConfig) -> list:
    path = Path(source.path)
    # A source that was moved away since is no reason to refuse; one that was changed is.
    content = file_digest(path) if path.is_file() else None
    if path.is_dir():
        content = folder_digest(path, [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()])
    return [source.path, source.split, content]


def run_record(config: RunConfig) -> dict:
    """What a checkpoint remembers of its run: a resume and an export must find it unchanged."""
    return {
        "seed": config.seed,
        "model": config.model.path,
        "dtype": config.model.dtype,
        "global_batch_size": config.batch.global_batch_size,
        **config.model_dump(mode="json", include={"loss", "optim", "train"}),
    }


def require_same_tokenizer(model: ModelConfig, dataset_manifest: dict, *, where: str) -> None:
    """Refuse a model whose tokenizer gives other ids than the one the dataset was prepared with."""
    tokenizer = load_tokenizer(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    found = {"tokenizer": dataset_manifest["identity"]["tokenizer"]}
    require_match({"tokenizer": tokenizer_identity(tokenizer)["tokenizer"]}, found, where=where, remedy="use models that share the tokenizer of model.path")


def reference_identity(config: RunConfig, dataset_manifest: dict) -> dict:
    """What reference log-probs depend on, the pairs apart. The weights are digested as files, so partitioning does not matter."""
    model = reference_model(config)
    carried = {key: dataset_manifest["identity"][key] for key in ("tokenizer", "chat_template", "max_length", "truncation_mode")}
    return {"reference model": model_digest(model), "dtype": model.dtype, **carried}


def needed_pairs(split: TokenizedSplit, loss_type: str) -> np.ndarray:
    """Return the pair ids whose reference log-prob the loss needs: all 2E for kto, the E matched ones for apo_zero_unpaired."""
    return np.arange(split.num_examples * (2 if loss_type == "kto" else 1))


def pair_keys(split: TokenizedSplit, pairs: np.ndarray) -> np.ndarray:
    return np.array([split.pair_key(pair) for pair in pairs.tolist()], dtype=KEY_DTYPE)
