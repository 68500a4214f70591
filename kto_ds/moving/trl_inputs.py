"""What TRL's options of data, model, trackers and hub become; the other rules are in trl_rules.py."""

import os

from kto_ds.errors import UserError, excerpt
from kto_ds.moving.trl_rules import Given, Values, Verdict, evaluated_split, is_share

DEFAULT_FOLDER = "trainer_output"  # TRL's output_dir
FILE_BUILDERS = ("json", "csv", "parquet", "arrow")


def dataset(given: Given) -> Verdict:
    values = given.values
    if values["datasets"]:
        return Verdict({}, "--datasets goes before it, as in TRL")
    if not given.value:
        return Verdict({}, "--datasets has the rows")
    settings: Values = {"data.train": [source(given.value, values["dataset_train_split"])]}
    if values["eval_strategy"] != "no":
        settings["data.eval"] = [source(given.value, values["dataset_test_split"])]
    return Verdict(settings)


def source(path: object, split: object) -> Values:
    """Return a source of ours; a single file has no splits, and train is what one without a split gives."""
    return {"path": str(path)} | ({} if split in (None, "train") or os.path.isfile(str(path)) else {"split": split})


def mixture(given: Given) -> Verdict:
    sources, lost = [], []
    for part in _parts(given.value):
        files = part.get("data_files")
        if part["path"] in FILE_BUILDERS and files:
            files = files.get(part.get("split", "train"), []) if isinstance(files, dict) else files
            sources += [{"path": str(file)} for file in (files if isinstance(files, list) else [files])]
        else:
            sources.append(source(part["path"], part.get("split")))
        lost += [name for name in ("name", "data_dir", "columns", "fraction") if part.get(name) is not None]
    why = {
        "name": "a configuration cannot be named", "data_dir": "name its files", "columns": "fields that are not used are ignored",
        "fraction": "weight is a share of a source's own rows: set it from the numbers of rows",
    }  # fmt: skip
    told = "; ".join(f"{name}: {why[name]}" for name in dict.fromkeys(lost)) or ("sources are mixed by their weight" if sources else "--dataset_name has the rows")
    return Verdict({"data.train": sources} if sources else {}, told, has_counterpart=not set(lost) - {"columns"})


def _parts(datasets: object) -> list[Values]:
    """Return the datasets of a mixture; a text is a path, as TRL's parser has it."""
    parts = [{"path": part} if isinstance(part, str) else part for part in (datasets if isinstance(datasets, list) else [datasets] * bool(datasets))]
    if odd := next((part for part in parts if not isinstance(part, dict) or not isinstance(part.get("path"), str)), None):
        raise UserError(f"--datasets: expected a path, or a mapping with one, found {excerpt(odd)}", where="the command", remedy="write datasets: [{path: ...}] in a YAML file for --config")
    return parts


def test_split_size(given: Given) -> Verdict:
    if given.value is None:
        return Verdict({}, "no prompts are held out")
    if not given.values["datasets"]:
        return Verdict({}, "has no effect without --datasets, as in TRL; data.held_out_fraction holds prompts out here")
    if not is_share(given.value):
        return Verdict({}, "a share is needed: data.held_out_fraction", has_counterpart=False)
    return Verdict({"data.held_out_fraction": given.value}, "of the prompts, with all their rows")


# model, adapters, reports


def adapters(given: Given) -> Verdict:
    values = given.values
    if not given.value:
        return Verdict({}, "full fine-tuning")
    targets = values["lora_target_modules"]
    settings = {
        "model.lora.r": values["lora_r"], "model.lora.lora_alpha": values["lora_alpha"], "model.lora.use_rslora": values["use_rslora"],
        "model.lora.target_modules": targets if isinstance(targets, list) else [targets or "q_proj", *([] if targets else ["v_proj"])],
    }  # fmt: skip
    why = "" if targets else "target_modules are peft's own for Llama, Qwen, Gemma and Mistral, as none are given; all-linear is better as a rule"
    return Verdict(settings, why)


def four_bits(given: Given) -> Verdict:
    if given.value and not given.values["use_peft"]:
        return Verdict({}, "only below adapters: --use_peft", has_counterpart=False)
    return Verdict({"model.load_in_4bit": given.value}, "policy and reference both: NF4 with double quantisation" if given.value else "")


ATTENTION = {None: "auto", "flash_attention_2": "flash_attention_2", "sdpa": "sdpa"}


def attention(given: Given) -> Verdict:
    name = str(given.value)
    if given.value in ATTENTION:
        return Verdict({"model.attention": ATTENTION[given.value]})
    return Verdict({"model.attention": "auto"}, f"auto takes the fastest kernel that is installed; {name} is none of ours", has_counterpart=name.startswith(("flash", "kernels-community/")))


def trackers(given: Given) -> Verdict:
    names = given.value if isinstance(given.value, list) else [given.value]
    names = [name for name in names if name not in (None, "none")]
    others = [name for name in names if name not in ("wandb", "tensorboard", "all")]
    settings: Values = {"report.wandb.mode": "online"} if {"wandb", "all"} & set(names) else {}
    settings |= {"report.tensorboard": True} if {"tensorboard", "all"} & set(names) else {}
    return Verdict(settings, "metrics.jsonl has every metric" + (f"; nothing is sent to {', '.join(map(str, others))}" if others else ""), has_counterpart=not others)


def run_name(given: Given) -> Verdict:
    return Verdict({"report.wandb.name": given.value})


def model_revision(given: Given) -> Verdict:
    return Verdict({"model.revision": None if given.value == "main" else given.value})


def push(given: Given) -> Verdict:
    values = given.values
    if not given.value:
        return Verdict({}, "nothing is pushed unasked")
    name = values["hub_model_id"] or os.path.basename(str(values["output_dir"] or DEFAULT_FOLDER).rstrip("/"))
    return Verdict({}, f"kto-ds export --config RUN.yaml --push-to-hub {name}{'' if values['hub_private_repo'] else ' --public'}, after training")


def generation(given: Given) -> Verdict:
    if not given.value:
        return Verdict({}, "nobody is asked")
    if evaluated_split(given.values) is None:
        return Verdict({}, "without evaluation rows nobody is asked")
    return Verdict({"eval.generate.num_prompts": 8}, "prompts of each evaluation split, in every evaluation; answers are in samples.jsonl")


def sharded(given: Given) -> Verdict:
    name, origin = given.sharding
    return Verdict({"deepspeed.config": name}, origin)
