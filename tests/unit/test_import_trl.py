"""`kto-ds import-trl`: every option of TRL 1.16's KTO script is known with its default, words become what TRL's own parser makes of them, and runs what they ask for."""

import dataclasses
import json
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from kto_ds import cli
from kto_ds.config import RunConfig
from kto_ds.config_text import leaves, read_yaml
from kto_ds.errors import UserError
from kto_ds.moving.trl_command import Command, count_gpus, read_command, read_file, typed
from kto_ds.moving.trl_import import translate
from kto_ds.moving.trl_options import EARLIER, OPTIONS, RENAMED
from tests.distributed.runs import ROOT
from tests.unit.test_docs_data import byte_tokenizer

MINIMAL = ["--model_name_or_path", "some/model", "--dataset_name", "org/rows"]


def imported(capsys, *words: str, gpus: int = 1, before: tuple[str, ...] = ("trl", "kto")) -> tuple[RunConfig, dict, str]:
    """Return the config that a command becomes, its YAML, and the account of it."""
    code = cli.run(["import-trl", "--num_gpus", str(gpus), "--", *before, *MINIMAL, *words])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    values = YAML(typ="safe").load(printed.out)
    return RunConfig.model_validate(values), values, printed.err


def section_of(account: str, heading: str) -> str:
    parts = account.split(f"\n{heading}:\n")
    return parts[1].split("\n\n")[0] if len(parts) > 1 else ""


# the table


@pytest.fixture(scope="module")
def trl_fields() -> dict[str, object]:
    pytest.importorskip("trl")
    from trl import KTOConfig, ModelConfig, ScriptArguments
    from trl.scripts.utils import DatasetMixtureConfig

    return {
        field.name: field.default if field.default is not dataclasses.MISSING else field.default_factory()
        for kind in (ScriptArguments, KTOConfig, ModelConfig, DatasetMixtureConfig) for field in dataclasses.fields(kind)
    }  # fmt: skip


def test_every_option_of_trl_is_known_with_its_default(trl_fields):
    assert len(trl_fields) == 159
    assert {name: option.default for name, option in OPTIONS.items()} == trl_fields
    assert not (EARLIER.keys() | RENAMED.keys()) & trl_fields.keys()


def test_flags_are_those_of_trl():
    pytest.importorskip("trl")
    from trl.scripts.kto import make_parser

    flags = {action.dest for action in make_parser()._actions if getattr(action.type, "__name__", "") == "string_to_bool" and not action.dest.startswith("no_")}
    assert {name for name, option in OPTIONS.items() if option.kind == "flag"} == flags - {"include_num_input_tokens_seen"}  # whose default is a word


def test_words_become_what_trl_makes_of_them():
    pytest.importorskip("trl")
    from trl.scripts.kto import make_parser

    words = """--learning_rate 5e-7 --per-device-train-batch-size=4 --bf16 False --no_gradient_checkpointing --use_peft --lora_target_modules q_proj v_proj --max_steps -1
        --warmup_steps 0.1 --eval_strategy steps --eval_steps 50 --load_in_4bit t --report_to none --save_total_limit none --max_length null
        --greater_is_better n --router_aux_loss_coef 0.001 --output_dir out --desirable_weight 1.33 --logging_steps 1 --dataset_train_split train_prefs""".split()
    theirs = {name: value for part in make_parser().parse_args_into_dataclasses(args=words) for name, value in vars(part).items()}
    ours = {name: typed(value, OPTIONS[name].kind) for name, value in read_command(["trl", "kto", *words], read_yaml).options.items()}
    assert len(ours) == 20
    assert ours.pop("report_to") is None and theirs["report_to"] == []
    for name, value in ours.items():
        assert value == (str(theirs[name].value) if hasattr(theirs[name], "value") else theirs[name]), name


def test_every_option_gets_a_word_with_a_reason():
    values = {"datasets": [{"path": "a"}], "truncation_mode": "keep_start", "lr_scheduler_type": "polynomial", "warmup_ratio": "0.2", "max_steps": "7", "metric_for_best_model": "loss"}
    for name, option in (OPTIONS | EARLIER).items():
        for value in (values.get(name, "true" if option.kind == "flag" else "7"), option.default):
            translation = translate(Command({name: value}, {}, {}), num_gpus=1, sharding=("zero2", "of a file"), defaults={})
            [outcome] = [outcome for outcome in translation.outcomes if outcome.option == name]
            assert len(outcome.text) > 5 and outcome.kind in ("became", "as it is", "no counterpart"), outcome


# what it becomes


def test_trl_defaults_that_differ_are_written(capsys):
    config, values, account = imported(capsys)
    assert values == {
        "output_dir": "trainer_output", "model": {"path": "some/model"}, "data": {"train": [{"path": "org/rows"}], "max_length": 1024}, "batch": {"global_batch_size": 8},
        "optim": {"lr_scheduler_type": "linear", "warmup_ratio": 0.0}, "train": {"num_train_epochs": 3.0}, "checkpoint": {"save_steps": 500}, "report": {"logging_steps": 10},
    }  # fmt: skip
    for name in ("num_train_epochs", "lr_scheduler_type", "warmup_steps", "max_length", "save_steps", "logging_steps", "train_sampling_strategy", "save_total_limit"):
        assert f"  --{name} " in section_of(account, "not given, but TRL's default is another one than ours"), name


BECOMES = [
    ("--per_device_train_batch_size 4 --gradient_accumulation_steps 2", {"batch.global_batch_size": 64}),
    ("--learning_rate 5e-7 --beta 0.05 --desirable_weight 1.33 --undesirable_weight 0.5", {"optim.learning_rate": 5e-7, "loss.beta": 0.05, "loss.desirable_weight": 1.33, "loss.undesirable_weight": 0.5}),
    ("--loss_type apo_zero_unpaired", {"loss.loss_type": "apo_zero_unpaired"}),
    ("--max_length 16384", {"data.max_length": 16384, "batch.max_tokens_per_microbatch": 16384}),
    ("--max_length null", {"data.max_length": 2048}),
    ("--warmup_steps 0.05", {"optim.warmup_ratio": 0.05}),
    ("--warmup_ratio 0.2", {"optim.warmup_ratio": 0.2}),
    ("--warmup_steps 30 --warmup_ratio 0.2 --max_steps 100", {"optim.warmup_ratio": 0.3, "train.max_steps": 100}),
    ("--warmup_steps 7 --max_steps 300", {"optim.warmup_ratio": 0.023}),
    ("--lr_scheduler_type constant_with_warmup", {"optim.lr_scheduler_type": "constant_with_warmup"}),
    ("--bf16 false", {"model.dtype": "float32"}),
    ("--bf16 false --dtype bfloat16", {"model.dtype": "bfloat16"}),
    ("--fp16", {"model.dtype": "bfloat16"}),
    ("--no_gradient_checkpointing", {"model.gradient_checkpointing": False}),
    ("--activation_checkpointing false", {"model.gradient_checkpointing": False}),
    ("--activation_offloading", {"model.gradient_checkpointing_offload": True}),
    ("--eval_strategy steps --eval_steps 50 --dataset_test_split test_prefs", {"eval.eval_steps": 50, "data.eval": [{"path": "org/rows", "split": "test_prefs"}]}),
    ("--eval_strategy steps", {"eval.eval_steps": 10}),
    ("--eval_strategy steps --eval_steps 0.25 --max_steps 200 --save_steps 0.5", {"eval.eval_steps": 50, "checkpoint.save_steps": 100}),
    ("--eval_strategy epoch", {"eval.eval_steps": None, "data.eval": [{"path": "org/rows", "split": "test"}]}),
    ("--eval_steps 50", {"eval.eval_steps": None, "data.eval": []}),
    ("--eval_strategy steps --load_best_model_at_end --metric_for_best_model eval_rewards/margins --greater_is_better true", {"checkpoint.metric_for_best_model": "eval/rewards/margins", "checkpoint.greater_is_better": True}),
    ("--save_total_limit 1", {"checkpoint.save_total_limit": 2}),
    ("--report_to wandb tensorboard --run_name best", {"report.wandb.mode": "online", "report.wandb.name": "best", "report.tensorboard": True}),
    ("--report_to tensorboard", {"report.wandb.mode": "disabled", "report.tensorboard": True}),
    ("--report_to all", {"report.wandb.mode": "online", "report.tensorboard": True}),
    ("--use_peft --lora_r 8 --lora_alpha 16 --lora_target_modules q_proj k_proj --use_rslora --load_in_4bit", {
        "model.lora": {"r": 8, "lora_alpha": 16, "lora_dropout": 0, "target_modules": ["q_proj", "k_proj"], "use_rslora": True}, "model.load_in_4bit": True}),
    ("--use_peft", {"model.lora": {"r": 16, "lora_alpha": 32, "lora_dropout": 0, "target_modules": ["q_proj", "v_proj"], "use_rslora": False}}),
    ("--lora_r 8", {"model.lora": None}),
    ("--train_sampling_strategy sequential --per_device_train_batch_size 4", {"data.shuffle": False, "data.kl_group_size": 4}),
    ("--model_revision abc --attn_implementation flash_attention_2 --trust_remote_code", {"model.revision": "abc", "model.attention": "flash_attention_2", "model.trust_remote_code": True}),
    ('--model_init_kwargs {"attn_implementation":"sdpa","revision":"v1"}', {"model.attention": "sdpa", "model.revision": "v1"}),
    ("--router_aux_loss_coef 0.0", {"model.router_aux_loss_coef": 0.0}),
    ("--test_split_size 0.05", {"data.held_out_fraction": None}),
    ("--datasets org/a org/b --test_split_size 0.05", {"data.train": [{"path": "org/a"}, {"path": "org/b"}], "data.held_out_fraction": 0.05}),
    ("--datasets org/a --test_split_size 0.05 --eval_strategy steps --load_best_model_at_end", {"checkpoint.metric_for_best_model": "eval/held_out/loss"}),
    ("--datasets org/a --eval_strategy steps --load_best_model_at_end --greater_is_better true", {"checkpoint.metric_for_best_model": None, "checkpoint.greater_is_better": None}),
    ("--generate_during_eval --eval_strategy steps", {"eval.generate": {"num_prompts": 8, "max_new_tokens": 128, "temperature": 0.0, "top_p": 1.0, "every": 1}}),
    ("--generate_during_eval", {"eval.generate": None}),
    ("--evaluation_strategy steps --eval_steps 5 --max_prompt_length 512 --truncation_mode keep_end", {"eval.eval_steps": 5, "data.max_prompt_length": 512, "data.truncation_mode": "keep_end"}),
    ("--seed 7 --ddp_timeout 60 --max_grad_norm 0.5 --weight_decay 0.01 --adam_beta2 0.95", {
        "seed": 7, "train.step_timeout_seconds": 60, "optim.max_grad_norm": 0.5, "optim.weight_decay": 0.01, "optim.adam_beta2": 0.95}),
    ("--deepspeed " + str(ROOT / "ds_configs" / "zero2.json"), {"deepspeed.config": str(ROOT / "ds_configs" / "zero2.json")}),
    ("--fsdp shard_grad_op", {"deepspeed.config": "zero2"}),
    ("--fsdp full_shard auto_wrap offload", {"deepspeed.config": "zero3_offload"}),
    ("--fsdp false", {"deepspeed.config": "zero3"}),
    ('--fsdp --fsdp_config {"reshard_after_forward":false}', {"deepspeed.config": "zero2"}),
]  # fmt: skip


@pytest.mark.parametrize("words, expected", BECOMES, ids=[words[:50] for words, _ in BECOMES])
def test_what_options_become(capsys, words, expected):
    config, _, _ = imported(capsys, *words.split(), gpus=8)
    dumped = config.model_dump(mode="json", exclude={"data"}) | {"data": config.data.model_dump(mode="json")}
    found = leaves(RunConfig, dumped)
    for key, value in expected.items():
        got = found[key]
        if key in ("data.train", "data.eval"):
            got = [{name: part for name, part in source.items() if name in ("path", "split") and part is not None} for source in got]
        assert got == value, (key, got)


NONE = ["--lr_scheduler_type cosine_with_restarts", "--warmup_steps 30", "--sync_ref_model", "--no_disable_dropout", "--fp16", "--optim adafactor", "--save_steps 0.1", "--dataset_config maths",
        "--use_dora --use_peft", "--load_in_8bit", "--max_length null", "--neftune_noise_alpha 5", "--report_to mlflow", "--data_seed 3", "--eval_delay 3", "--save_only_model", "--learning_rte 1"]  # fmt: skip


@pytest.mark.parametrize("words", NONE)
def test_what_has_no_counterpart_is_said_with_the_reason(capsys, words):
    option, *rest = words.split()
    name = option.replace("--no_", "--")
    _, _, account = imported(capsys, *words.split())
    [line] = [line for line in section_of(account, "no counterpart").splitlines() if line.startswith(f"  {name}")]
    assert len(line.split("  ")[-1]) > 15


def test_a_token_is_never_shown(capsys):
    _, values, account = imported(capsys, "--push_to_hub", "--hub_model_id", "me/model", "--hub_token", "hf_verysecret")
    assert "verysecret" not in account + str(values) and "--push-to-hub me/model --public" in account


@pytest.mark.parametrize("words", ["--use_auth_token hf_verysecret", "--password 12345", '--model_init_kwargs {"token":"hf_verysecret"}', f"--run_nme hf_{'verysecret' * 4}", "--report_to https://me:verysecret@host"])
def test_secrets_in_other_options_are_hidden(tmp_path, capsys, words):
    option, value = words.split()
    out, file = tmp_path / "run.yaml", tmp_path / "kto.yaml"  # of a file, as values of our own command line are known to be secret
    file.write_text(f"model_name_or_path: some/model\ndataset_name: org/rows\n{option.removeprefix('--')}: {value}\n")
    assert cli.run(["import-trl", str(file), "--out", str(out)]) == 0
    account = capsys.readouterr().out
    assert value not in account + out.read_text() and "verysecret" not in account + out.read_text() and f"{option} " in account and "[redacted]" in account


def test_where_an_export_is_pushed_without_a_name(capsys):
    assert "--push-to-hub trainer_output --public, after training" in imported(capsys, "--push_to_hub")[2]
    assert "--push-to-hub best, after training" in imported(capsys, "--push_to_hub", "--hub_private_repo", "--output_dir", "runs/best/")[2]


@pytest.mark.parametrize("mode", ["dryrun", "offline", "disabled"])
def test_the_mode_of_wandb_is_that_of_its_variable(capsys, mode):
    config, _, account = imported(capsys, "--report_to", "wandb", before=(f"WANDB_MODE={mode}", "WANDB_PROJECT=ours", "trl", "kto"))
    ours = {"dryrun": "offline"}.get(mode, mode)
    assert (config.report.wandb.mode, config.report.wandb.project) == (ours, "ours") and f"report.wandb.mode: {ours}" in account


# launchers and files

LAUNCHES = [
    ("accelerate launch --num_processes 4 trl/scripts/kto.py", 4, "zero3"),
    ("trl kto --accelerate_config zero2", 8, "zero2"),
    ("accelerate launch --use_deepspeed --zero_stage 3 --offload_optimizer_device cpu --num_processes 2 kto.py", 2, "zero3_offload"),
    ("CUDA_VISIBLE_DEVICES=0,3 python kto.py", 2, "zero3"),
    ("torchrun --nproc_per_node=8 --nnodes 2 examples/kto.py", 16, "zero3"),
    ("deepspeed --num_gpus 8 kto.py", 8, "zero3"),
    ("torchrun --nproc_per_node 8 -m trl.scripts.kto", 8, "zero3"),
    ("accelerate launch --num_processes 2 -m trl.scripts.kto", 2, "zero3"),
    ("accelerate launch -m trl.scripts.kto --accelerate_config multi_gpu", 8, "zero3"),
    ("", None, "zero3"),
]


@pytest.mark.parametrize("before, gpus, sharding", LAUNCHES)
def test_launchers_say_how_many_gpus_there_were(capsys, before, gpus, sharding):
    words = [*before.split(), *MINIMAL]
    assert count_gpus(read_command(words, read_yaml))[0] == gpus
    assert cli.run(["import-trl", "--", *words]) == 0
    printed = capsys.readouterr()
    config = RunConfig.model_validate(YAML(typ="safe").load(printed.out))
    assert config.batch.global_batch_size == 8 * (gpus or 1) and config.deepspeed.config == sharding
    assert ("GPUs: 1 is assumed" in printed.err) == (gpus is None)


def test_files_of_accelerate_and_deepspeed_are_read(capsys, tmp_path):
    deepspeed = tmp_path / "ds.json"
    deepspeed.write_text(json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}, "allgather_partitions": True}, "bf16": {"enabled": "auto"}, "gradient_clipping": 1.0}))
    accelerate = tmp_path / "accelerate.yaml"
    accelerate.write_text(f"num_processes: 16\ndistributed_type: DEEPSPEED\ndeepspeed_config: {{deepspeed_config_file: {deepspeed}}}\n")
    assert cli.run(["import-trl", "--", "accelerate", "launch", "--config_file", str(accelerate), "kto.py", *MINIMAL]) == 0
    printed = capsys.readouterr()
    config = RunConfig.model_validate(YAML(typ="safe").load(printed.out))
    assert config.deepspeed.config == "zero2" and config.batch.global_batch_size == 128
    assert "bf16 = {'enabled': 'auto'} is decided by model.dtype" in printed.err  # why the file itself is not taken


FSDP = [
    ("fsdp_sharding_strategy: FULL_SHARD", "", "zero3"),
    ("fsdp_sharding_strategy: SHARD_GRAD_OP", "", "zero2"),
    ("fsdp_sharding_strategy: 2", "", "zero2"),
    ("fsdp_reshard_after_forward: false, fsdp_version: 2", "", "zero2"),
    ("fsdp_reshard_after_forward: true, fsdp_offload_params: true", "", "zero3_offload"),
    ("fsdp_reshard_after_forward: true", "--fsdp_reshard_after_forward false", "zero2"),
]


@pytest.mark.parametrize("section, words, sharding", FSDP)
def test_accelerates_file_says_how_fsdp_shards(capsys, tmp_path, section, words, sharding):
    file = tmp_path / "fsdp.yaml"
    file.write_text(f"num_processes: 8\ndistributed_type: FSDP\nfsdp_config: {{{section}}}\n")
    assert cli.run(["import-trl", "--", "accelerate", "launch", "--config_file", str(file), *words.split(), "kto.py", *MINIMAL]) == 0
    printed = capsys.readouterr()
    assert RunConfig.model_validate(YAML(typ="safe").load(printed.out)).deepspeed.config == sharding
    assert f"deepspeed.config: {sharding} (shards as FSDP does)" in printed.err


def test_a_shell_script_and_a_yaml_file_say_the_same(tmp_path, capsys):
    script, yaml = tmp_path / "run.sh", tmp_path / "kto.yaml"
    script.write_text('#!/bin/bash\npip install -U trl peft\ntrl env\n# trl kto --beta 9\nexport HF_HOME=/x\ntrl kto \\\n  --model_name_or_path some/model --beta 0.3 \\\n  --dataset_name "org/rows" --report_to wandb && echo done\n')
    yaml.write_text("model_name_or_path: some/model\ndataset_name: org/rows\nbeta: 0.3\nreport_to: wandb\nenv: {WANDB_PROJECT: ours}\n")
    assert cli.run(["import-trl", str(script), "--out", str(tmp_path / "a.yaml")]) == 0
    assert cli.run(["import-trl", str(yaml), "--out", str(tmp_path / "b.yaml")]) == 0
    account = capsys.readouterr().out
    first, second = (read_yaml(tmp_path / name) for name in ("a.yaml", "b.yaml"))
    assert first["loss"] == {"beta": 0.3} and second["report"]["wandb"].pop("project") == "ours" and first == second and "report.wandb.project: ours" in account
    assert read_file(script, read_yaml).options["beta"] == "0.3"
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text("model_name_or_path: m\ndatasets:\n  - {path: json, data_files: rows.jsonl}\n  - {path: org/rows, split: train_prefs, fraction: 0.5}\nlearning_rate: 5e-7\n")
    assert cli.run(["import-trl", str(mixture), "--out", str(tmp_path / "c.yaml")]) == 0
    made = read_yaml(tmp_path / "c.yaml")
    assert made["data"]["train"] == [{"path": "rows.jsonl"}, {"path": "org/rows", "split": "train_prefs"}] and made["optim"]["learning_rate"] == 5e-7
    assert "fraction: weight is a share" in (tmp_path / "c.yaml").read_text()


REFUSED = {
    "names no data train": ["trl", "kto", "--model_name_or_path", "m"],
    "names no model path": ["trl", "kto", "--dataset_name", "d"],
    "trl 'dpo' is not KTO": ["trl", "dpo", *MINIMAL],
    "starts no KTO script": ["echo", "hello"],
    "'$MODEL' is for a shell": ["trl", "kto", "--model_name_or_path", "$MODEL"],
    "--bf16: expected true or false, found 'maybe'": ["trl", "kto", *MINIMAL, "--bf16", "maybe"],
    "--max_length: expected a number, found 'long'": ["trl", "kto", *MINIMAL, "--max_length", "long"],
    "optim.learning_rate: ": ["trl", "kto", *MINIMAL, "--learning_rate", "-1"],
    "--datasets: expected a path, or a mapping with one, found 7": ["trl", "kto", *MINIMAL, "--datasets", "[7]"],
    "--deepspeed 'nowhere.json' cannot be used": ["trl", "kto", *MINIMAL, "--deepspeed", "nowhere.json"],
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_read_is_refused(capsys, message):
    assert cli.run(["import-trl", "--", *REFUSED[message]]) == 2
    error = capsys.readouterr().err
    assert message in error and "remedy: " in error and "Traceback" not in error


def test_nothing_is_overwritten(tmp_path, capsys):
    out = tmp_path / "run.yaml"
    out.write_text("mine")
    assert cli.run(["import-trl", "--out", str(out), "--", "trl", "kto", *MINIMAL]) == 2
    assert out.read_text() == "mine" and "--out" in capsys.readouterr().err
    assert cli.run(["import-trl"]) == 2 and cli.run(["import-trl", str(out), "--", "trl", "kto"]) == 2
    script = tmp_path / "run.sh"
    script.write_text("# trl kto --beta 1\necho done\n")
    with pytest.raises(UserError, match="found 0"):
        read_file(script, read_yaml)


def test_prepare_takes_what_comes_out(tmp_path, capsys, monkeypatch):
    from transformers import LlamaConfig

    monkeypatch.chdir(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained("model")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 2048}
    LlamaConfig(vocab_size=len(tokenizer), **shape).save_pretrained("model")
    rows = [{"prompt": [{"role": "user", "content": f"{number}?"}], "completion": [{"role": "assistant", "content": "yes"}], "label": number % 2 == 0} for number in range(20)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("kto.yaml").write_text("datasets: [{path: json, data_files: rows.jsonl}]\ntest_split_size: 0.2\n")
    words = "trl kto --config kto.yaml --model_name_or_path model --output_dir out --dataset_num_proc 1"
    assert cli.run(["import-trl", "--out", "run.yaml", "--", *words.split()]) == 0
    assert cli.run(["prepare", "--config", "run.yaml"]) == 0
    report = json.loads(Path("out/dataset/data_report.json").read_text())
    assert report["train"]["examples"] == 16 and report["eval/held_out"]["examples"] == 4
