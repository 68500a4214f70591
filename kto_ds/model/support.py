"""What a model is and how it can be served: decided from its config and files, before any weight is read."""

import json
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import AutoConfig, GenerationConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from kto_ds.artifacts import digest_of, folder_digest
from kto_ds.config import ModelConfig
from kto_ds.errors import UserError, excerpt, untrusted_code
from kto_ds.model.logprobs import CHANGED_LOGITS

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Layer kinds that packed attention serves; every other kind keeps a state that would run across sequences.
ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
# Config entries that change the logits between head and softmax, or the attention scores, in ways the packed path does not know.
LOGIT_CHANGES = (
    "final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "logits_soft_cap", "output_logit_soft_cap",
    "logits_mup_width_multiplier", "unpadded_vocab_size",
)  # fmt: skip
# Kinds of rotary embedding that change all positions of a micro-batch once its longest sequence is beyond the original length.
BATCH_DEPENDENT_ROPE = {"dynamic", "longrope"}
SAMPLES, SAMPLE_BYTES = 64, 1 << 16  # of a weight file, for sampled_digest
# How weights are quantised with model.load_in_4bit, in transformers' words.
FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
EXPERTS_OF_A_TOKEN = ("num_experts_per_tok", "experts_per_token", "top_k_experts")
# Mixtures of experts that tests/unit/test_families.py compares with transformers' own forward; their routers give a softmax over the experts.
MOE_FAMILIES = ("qwen2_moe", "qwen3_moe", "mixtral", "gpt_oss", "olmoe", "qwen3_next", "qwen3_5_moe_text")
SINK_FAMILIES = ("gpt_oss",)  # every query of a head has one score more than keys


def read_model_config(model: ModelConfig, *, where: str = "model.path") -> PretrainedConfig:
    """Return the config of a causal language model that kto_ds can train, or a UserError that says why not."""
    config = find_model_config(model, where=where)
    if num_experts(config) and config.model_type not in MOE_FAMILIES:
        what = f"{config.model_type} is a mixture of {num_experts(config)} experts of a family that is not tested here"
        raise UserError(what, where=where, remedy=f"use a dense model, or one of {', '.join(MOE_FAMILIES)}")
    # Some of these are properties of the config class, which to_dict does not list.
    if config.model_type not in CHANGED_LOGITS and (changed := [name for name in LOGIT_CHANGES if getattr(config, name, None) not in (None, 1, 1.0)]):
        raise UserError(f"{config.model_type} changes its logits by {changed[0]} = {getattr(config, changed[0])}, which is not served yet", where=where)
    return config


def find_model_config(model: ModelConfig, *, where: str = "model.path") -> PretrainedConfig:
    """Return the config of a causal language model, whether kto_ds can train it or not; only config.json is read."""
    _refuse_missing_folder(model.path, where)
    try:
        config = AutoConfig.from_pretrained(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, HFValidationError) as error:
        if "trust_remote_code" in str(error):
            raise untrusted_code("model", model.path, where=where) from error
        remedy = "give a folder with config.json, or a hub name" + ("" if Path(model.path).exists() else "; there is no such folder here, so it was looked for on the hub")
        raise UserError(f"no usable model config at {excerpt(model.path)}: {excerpt(str(error).splitlines()[0])}", where=where, remedy=remedy) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not model.trust_remote_code:
        raise UserError(f"{config.model_type} is not a causal language model of transformers", where=where)
    return _language_part(config, where)


def _language_part(config: PretrainedConfig, where: str) -> PretrainedConfig:
    """Return the config of the language model alone, where transformers can load it out of a model that also sees or hears."""
    text, model_class = config.get_text_config(), MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if text is config or model_class is None:  # or code of its own decides
        return config
    if model_class.config_class is not type(text):
        raise UserError(f"{config.model_type} is more than a language model, which is not served", where=where, remedy="save its language model alone, and name that")
    return text


def read_generation_config(model: ModelConfig) -> GenerationConfig:
    """Return how the model's makers want it to generate; an empty config where they do not say."""
    try:
        return GenerationConfig.from_pretrained(model.path, revision=model.revision)
    except OSError:
        return GenerationConfig()


def num_experts(config: PretrainedConfig) -> int:
    """Return how many experts a token is routed to some of, 0 for a dense model."""
    entries = config.to_dict()
    counts = [entries.get(name) or 0 for name in EXPERT_COUNTS]
    return max(counts) if max(counts) > 1 else 0


def experts_of_a_token(config: PretrainedConfig) -> int:
    """Return how many experts a token is routed to, 0 for a dense model; 1 where the config of a mixture does not say."""
    # As attributes, not as entries: some families have names of their own, which transformers maps.
    found = (getattr(config, name, None) for name in EXPERTS_OF_A_TOKEN)
    return next((count for count in found if count), 1) if num_experts(config) else 0


def router_aux_loss_coef(model: ModelConfig, config: PretrainedConfig) -> float | None:
    """Return the weight of the load-balancing loss: as configured, else what the model's own config says. None for a dense model, which may not ask for it."""
    if num_experts(config):
        return config.router_aux_loss_coef if model.router_aux_loss_coef is None else model.router_aux_loss_coef
    if model.router_aux_loss_coef:
        raise UserError(f"{config.model_type} is a dense model, without a router to balance", where="model.router_aux_loss_coef", remedy="leave this key out")
    return None


def padded_attention(config: PretrainedConfig) -> str:
    """Return transformers' own attention that the padded layout runs with: sdpa, but for soft-capped scores and sinks."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    takes_sdpa = model_class is None or model_class._supports_sdpa
    return "sdpa" if takes_sdpa and not config.to_dict().get("attn_logit_softcapping") else "eager"


def require_trainable(model: ModelConfig, config: PretrainedConfig) -> None:
    """Refuse a policy whose weights are quantised: they take no gradient. As a reference such a model is read like any other."""
    if config.to_dict().get("quantization_config"):
        remedy = "train the model it was made from; name this one under reference.path to be its reference"
        raise UserError(f"the weights of {excerpt(model.path)} are quantised, and cannot be trained without adapters", where="model.path", remedy=remedy)


def _refuse_missing_folder(path: str, where: str) -> None:
    # Whatever cannot be a name of the hub must not cost a search there, and a message about the connection.
    if not Path(path).is_dir() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        what = f"it is a file, not a folder: {excerpt(path)}" if Path(path).is_file() else f"no such folder: {excerpt(path)}"
        raise UserError(what, where=where, remedy=f"check the path; it is looked up from {excerpt(str(Path.cwd()))}")
    if (Path(path) / "adapter_config.json").is_file() and not (Path(path) / "config.json").is_file():
        raise UserError(f"it is an adapter, not a model: {excerpt(path)}", where=where, remedy="give a merged model, such as kto-ds export --merge writes")


def longest_servable(config: PretrainedConfig) -> int | None:
    """Return the most tokens a sequence may have for this model, None where nothing limits it.

    Positions end the sequence; and with some rotary embeddings a longer one would change the log-probs of its neighbours in a micro-batch.
    """
    entries = config.to_dict()
    limits = [entries.get("max_position_embeddings")]
    rope = entries.get("rope_parameters") or {}
    for kind in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        if kind.get("rope_type") in BATCH_DEPENDENT_ROPE:
            limits.append(kind.get("original_max_position_embeddings") or entries.get("original_max_position_embeddings"))
    return min((limit for limit in limits if limit), default=None)


def require_positions(config: PretrainedConfig, longest: int, where: str) -> None:
    """Refuse a model that has fewer positions than the longest sequence has tokens."""
    limit = longest_servable(config)
    if limit and longest > limit:
        what = f"the longest sequence has {longest} tokens, the model has only {limit} positions to use"
        raise UserError(what, where=where, remedy=f"use another model, or set data.max_length to {limit} or less and run kto-ds prepare again")


def choose_layout(config: PretrainedConfig, requested: str) -> tuple[str, str]:
    """Return (layout, notice); `auto` shares prompts unless the model's layers forbid packing, which the notice then says."""
    entries = config.to_dict()
    foreign = sorted(set(entries.get("layer_types") or []) - ATTENTION_LAYERS)
    reason = f"layers of kind {', '.join(foreign)}" if foreign else ""
    if entries.get("attn_logit_softcapping"):
        reason = "soft-capped attention scores"
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if not reason and model_class is None:
        reason = "code of its own"
    elif not reason and not model_class._supports_attention_backend:
        reason = "attention that cannot be exchanged"
    if not reason:
        return (requested if requested != "auto" else "prefix_shared"), ""
    if requested in ("auto", "padded"):
        return "padded", f"{config.model_type} has {reason}: one padded sequence a row instead of packed ones"
    raise UserError(f"{config.model_type} has {reason}, which layout {requested} cannot serve", where="model.layout", remedy="set model.layout: auto")


def require_sharable(size: int, config: PretrainedConfig, *, layout: str, num_ranks: int) -> None:
    """Refuse groups of `size` ranks that share rows where the ranks, the model's heads or the layout cannot be divided by that."""
    if size == 1:
        return
    where, text_config = "batch.sequence_parallel_size", config.get_text_config()
    counts = {
        "ranks": num_ranks,
        "query heads": text_config.num_attention_heads,
        "key/value heads": getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads,
    }
    if config.model_type in SINK_FAMILIES:
        raise UserError(f"the attention sinks of {config.model_type} belong to heads, which sharing ranks swap", where=where, remedy=f"set {where}: 1")
    if layout == "padded":
        raise UserError("only packed rows can be shared by several ranks, and this model runs with padded ones", where=where, remedy=f"set {where}: 1")
    for name, count in counts.items():
        if count % size:
            divisors = ", ".join(str(divisor) for divisor in range(1, count + 1) if not any(number % divisor for number in counts.values()))
            raise UserError(f"{count} {name} cannot be shared out to groups of {size} ranks", where=where, remedy=f"set it to one of {divisors}")


def weight_files(model: ModelConfig) -> tuple[Path, list[str]]:
    """Return the local folder of the model and the names of its safetensors files."""
    folder = Path(model.path)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(model.path, revision=model.revision, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model"]))
        except (OSError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise UserError(f"neither a folder nor a model that can be fetched: {model.path}", where="model.path") from error
    index = folder / "model.safetensors.index.json"
    if index.is_file():  # a folder may hold the weights in other forms too
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = ["model.safetensors"] if (folder / "model.safetensors").is_file() else []
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise UserError(f"{len(absent)} of {len(names)} weight files are not in {folder}, the first: {excerpt(absent[0])}", where="model.path", remedy="fetch the model again")
    if not names:
        raise UserError(f"no safetensors weights in {folder}", where="model.path", remedy="convert the model to safetensors; pickled weights are not read")
    return folder, names


def model_digest(model: ModelConfig) -> str:
    """Digest of the weights and config as files, the same whether or not parameters are partitioned later."""
    folder, names = weight_files(model)
    code = [path.name for path in folder.glob("*.py")] if model.trust_remote_code else []
    # An adapter's config beside the weights would have transformers apply the adapter.
    others = [name for name in ("model.safetensors.index.json", "adapter_config.json", "adapter_model.safetensors") if (folder / name).is_file()]
    return folder_digest(folder, [*names, "config.json", *others, *code])


def sampled_digest(model: ModelConfig) -> str:
    """Digest of the sizes of the weight files and of samples all over them: quick enough for every rank to take of what it sees itself."""
    folder, names = weight_files(model)
    parts: list[bytes | str] = []
    for name in names:
        size = (folder / name).stat().st_size
        parts += [name, str(size)]
        with open(folder / name, "rb") as file:
            for number in range(SAMPLES):
                file.seek(size * number // SAMPLES)
                parts.append(file.read(SAMPLE_BYTES))
    return digest_of(*parts)


def quantization(model: ModelConfig) -> dict | None:
    """Return how the weights are quantised, while they are read or as their config.json says, None where they are not."""
    if model.load_in_4bit:
        return FOUR_BITS
    folder, _ = weight_files(model)
    return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
