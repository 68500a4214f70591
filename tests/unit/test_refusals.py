"""What a user can get wrong, through the command line: exit code 2, one message that says where and what to do, nothing half-written."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kto_ds import cli
from tests.distributed.runs import number_tokenizer, write_config, write_rows

VOCAB_SIZE = 40


def rows(num_prompts: int = 6) -> list[dict]:
    return [{"prompt": f"t3 t{4 + number % num_prompts}", "completion": f" t7 t{8 + number}", "label": number % 2 == 0} for number in range(12)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model, 12 good rows, and run.yaml; nothing prepared."""
    make_model(tmp_path / "model", seed=0)
    write_rows(tmp_path / "rows.jsonl", rows())
    write_config(
        tmp_path / "run.yaml",
        output_dir=str(tmp_path / "run"),
        model={"path": str(tmp_path / "model"), "dtype": "float32"},
        data={"train": [{"path": str(tmp_path / "rows.jsonl")}], "max_length": 16},
        batch={"global_batch_size": 8, "max_tokens_per_microbatch": 64},
    )
    return tmp_path


def make_model(path: Path, *, seed: int, **changes) -> None:
    torch.manual_seed(seed)
    shape = dict(vocab_size=VOCAB_SIZE, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16)
    LlamaForCausalLM(LlamaConfig(**{**shape, **changes}, bos_token_id=1, eos_token_id=2, pad_token_id=0)).save_pretrained(path)
    number_tokenizer(VOCAB_SIZE).save_pretrained(path)


def run(folder: Path, command: str, *overrides: str) -> int:
    return cli.run([command, "--config", str(folder / "run.yaml"), *overrides])


def files_of(folder: Path) -> list[Path]:
    """All files, but what marks a run's folder as its own (the locks, status.json, which says that the run failed, and the ranks') and what prepare can go on with."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != "status.json" and path.suffix != ".lock" and path.name != ".lock")
    return sorted(path for path in found if not {"dataset.incomplete", "ranks", "stacks", "logs"} & set(path.parts))


def refuse(capsys, folder: Path, command: str, *overrides: str, saying: list[str]) -> None:
    before = files_of(folder)
    capsys.readouterr()
    assert run(folder, command, *overrides) == 2
    printed = capsys.readouterr()
    assert printed.err.count("kto-ds: error:") == 1 and "Traceback" not in printed.err + printed.out
    for text in saying:
        assert text in printed.err, printed.err
    assert files_of(folder) == before, "something was written"
    if command == "train" and (folder / "run" / "status.json").exists():
        status = json.loads((folder / "run" / "status.json").read_text())
        assert (status["state"], status["exit_code"]) == ("failed", 2)


def test_a_bad_row_is_named_by_file_line_field_and_value(folder, capsys):
    bad = rows()
    bad[4]["label"] = "yes"
    write_rows(folder / "rows.jsonl", bad)
    refuse(capsys, folder, "prepare", saying=["rows.jsonl:5", "label", "'yes'", "true"])


def test_rows_with_one_prompt_have_no_reference_point(folder, capsys):
    write_rows(folder / "rows.jsonl", rows(num_prompts=1))
    refuse(capsys, folder, "prepare", saying=["at least two distinct prompts", "found 1"])


def test_a_batch_smaller_than_a_kl_group(folder, capsys):
    refuse(capsys, folder, "prepare", "--batch.global_batch_size", "3", saying=["batch.global_batch_size", "KL group of 4"])


def test_a_source_that_is_not_there(folder, capsys):
    refuse(capsys, folder, "prepare", "--data.train", json.dumps([{"path": str(folder / "none.jsonl")}]), saying=["none.jsonl", "no such file"])


def test_a_model_that_is_not_there(folder, capsys):
    refuse(capsys, folder, "prepare", "--model.path", str(folder / "none"), saying=["model.path", "none"])


def test_a_tokenizer_with_more_ids_than_the_model(folder, capsys):
    make_model(folder / "model", seed=0, vocab_size=12)
    refuse(capsys, folder, "prepare", saying=["model.path", "12 embeddings"])


def test_sequences_longer_than_the_model_has_positions(folder, capsys):
    make_model(folder / "model", seed=0, max_position_embeddings=4)
    refuse(capsys, folder, "prepare", saying=["data.max_length", "only 4 positions to use"])


def test_an_untested_mixture_of_experts_says_so_before_its_weights_are_read(folder, capsys):
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps({**config, "num_local_experts": 8}))
    (folder / "model" / "model.safetensors").unlink()
    refuse(capsys, folder, "prepare", saying=["mixture of 8 experts", "not tested", "qwen3_moe"])


def test_a_dense_model_has_no_router_to_balance(folder, capsys):
    refuse(capsys, folder, "train", "--model.router_aux_loss_coef", "0.01", saying=["model.router_aux_loss_coef", "dense model"])


def test_each_stage_names_the_command_that_is_missing(folder, capsys):
    refuse(capsys, folder, "precompute-ref", saying=["dataset artefact is missing", "kto-ds prepare"])
    assert run(folder, "prepare") == 0
    refuse(capsys, folder, "train", saying=["reference artefact is missing", "kto-ds precompute-ref"])
    refuse(capsys, folder, "export", saying=["no checkpoint", "kto-ds train"])
    refuse(capsys, folder, "evaluate", saying=["data.eval"])


def test_ranks_that_a_secondary_partition_does_not_divide_are_refused(folder, capsys):
    zero = folder / "hpz.json"
    zero.write_text(json.dumps({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}))
    refuse(capsys, folder, "train", "--deepspeed.config", str(zero), saying=["zero_hpz_partition_size = 2", "in every 2 ranks, and there are 1", "set it to the GPUs of a node"])


def test_a_dataset_artefact_of_another_config_is_refused_with_every_differing_field(folder, capsys):
    assert run(folder, "prepare") == 0
    write_rows(folder / "rows.jsonl", rows()[:-1])
    refuse(
        capsys, folder, "precompute-ref", "--data.max_length", "8", "--data.kl_group_size", "2",
        saying=["3 differences", "max_length: this run has 8, the artefact has 16", "kl_group_size: this run has 2, the artefact has 4", "rows.jsonl' has changed since prepare", "kto-ds prepare"],
    )  # fmt: skip


def test_a_reference_artefact_of_another_model_is_refused(folder, capsys):
    assert run(folder, "prepare") == 0 and run(folder, "precompute-ref") == 0
    make_model(folder / "other", seed=1)
    refuse(capsys, folder, "train", "--reference.path", str(folder / "other"), saying=["2 differences", "reference model: this run has", f"model.path: this run has {str(folder / 'other')!r}, the artefact was made with", "kto-ds precompute-ref"])
    refuse(capsys, folder, "train", "--model.dtype", "bfloat16", saying=["dtype: this run has 'bfloat16', the artefact has 'float32'"])


def test_a_changed_byte_of_an_artefact_is_refused(folder, capsys):
    assert run(folder, "prepare") == 0 and run(folder, "precompute-ref") == 0
    for damaged in (*(folder / "run" / "reference").glob("scored-*"), folder / "run" / "dataset" / "train" / "completion_tokens.npy"):
        content = bytearray(damaged.read_bytes())
        content[-1] ^= 1
        damaged.write_bytes(content)
        refuse(capsys, folder, "train", saying=["damaged", damaged.name])


def test_reference_log_probs_that_cannot_be_are_refused(folder, capsys):
    from safetensors.numpy import load_file, save_file

    from kto_ds.artifacts import describe_folder, read_manifest, seal

    assert run(folder, "prepare") == 0 and run(folder, "precompute-ref") == 0
    artefact = folder / "run" / "reference"
    [path] = artefact.glob("scored-*")
    arrays = load_file(path)
    for bad in (0.5, 0.0, -0.0, float("nan"), float("-inf")):
        save_file({**arrays, "logps": np.where(np.arange(len(arrays["logps"])) == 3, np.float32(bad), arrays["logps"])}, path)
        manifest = read_manifest(artefact, kind="reference", remedy="")
        seal(artefact, manifest, describe_folder(artefact))
        refuse(capsys, folder, "train", saying=[path.name, "1 of 24 log-probs are not finite, 0 or above 0"])


def test_reference_log_probs_of_other_rows_are_refused(folder, capsys):
    assert run(folder, "prepare") == 0 and run(folder, "precompute-ref") == 0
    more = write_rows(folder / "more.jsonl", [*rows(), {"prompt": "t9 t9", "completion": " t9", "label": True}])
    overrides = ["--data.train", json.dumps([{"path": str(more)}]), "--data.artifact", str(folder / "more")]
    assert run(folder, "prepare", *overrides) == 0
    refuse(capsys, folder, "train", *overrides, saying=["have no reference log-prob", "more.jsonl:", "kto-ds precompute-ref"])


def test_a_list_that_is_not_json_on_the_command_line(folder, capsys):
    refuse(capsys, folder, "prepare", "--data.train", "[{path: rows.jsonl}]", saying=["command line", "JSON", "--data.train"])


@pytest.mark.parametrize("path", ["./modles/tiny", "/modles/tiny", "modles/tiny/llama"])
def test_a_mistyped_model_folder_is_not_looked_for_on_the_hub(folder, capsys, path):
    refuse(capsys, folder, "prepare", "--model.path", path, saying=[f"model.path: no such folder: '{path}'", "looked up from"])


def test_sources_may_move_away_but_not_change(folder, capsys):
    several = folder / "several"
    several.mkdir()
    for name in ("a", "b"):
        write_rows(several / f"{name}.jsonl", rows())
    options = ["--data.train", json.dumps([{"path": str(several / "*.jsonl")}])]
    assert run(folder, "prepare", *options) == 0
    write_rows(several / "c.jsonl", rows())
    write_rows(several / "b.jsonl", rows()[:-1])
    refuse(capsys, folder, "precompute-ref", *options, saying=["2 differences", "b.jsonl' has changed since prepare", "c.jsonl' is new since prepare", "kto-ds prepare"])
    for path in several.iterdir():
        path.unlink()
    assert run(folder, "precompute-ref", *options) == 0


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (("--data.held_out_fraction", "0.4"), "held_out_fraction: this run has 0.4, the artefact has None"),
        (("--data.truncation_mode", "drop"), "truncation_mode: this run has 'drop', the artefact has 'keep_start'"),
        (("--data.append_eos", "false"), "append_eos: "),
        (("--data.max_completion_length", "3"), "max_completion_length: "),
        (("--data.special_tokens_in_text", "error"), "special_tokens_in_text: "),
        (("--data.chat_template_kwargs", '{"a": 1}'), "chat_template_kwargs: "),
        (("--data.on_bad_row", "skip", "--data.max_bad_fraction", "0.1"), "max_bad_fraction: "),
        (("--seed", "7"), "seed: this run has 7, the artefact has 42"),
    ],
)
def test_whatever_changes_the_examples_asks_for_prepare_again(folder, capsys, options, field):
    assert run(folder, "prepare") == 0
    refuse(capsys, folder, "precompute-ref", *options, saying=["does not belong to this run", field, "kto-ds prepare"])


@pytest.mark.parametrize(
    ("more", "field"), [({"weight": 2}, "weights: this run has [2.0]"), ({"columns": {"prompt": "prompt"}}, "sources.train.columns: "), ({"label_map": {"true": True}}, "label_maps: ")]
)
def test_so_does_whatever_changes_a_source(folder, capsys, more, field):
    assert run(folder, "prepare") == 0
    sources = json.dumps([{"path": str(folder / "rows.jsonl"), **more}])
    refuse(capsys, folder, "precompute-ref", "--data.train", sources, saying=["does not belong to this run", field, "kto-ds prepare"])


def test_a_split_that_was_added_or_taken_away(folder, capsys):
    write_rows(folder / "eval.jsonl", rows())
    options = ["--data.eval", json.dumps({"x": [{"path": str(folder / "eval.jsonl")}]})]
    assert run(folder, "prepare", *options) == 0
    refuse(capsys, folder, "precompute-ref", saying=["splits: this run has ['train'], the artefact has ['train', 'eval/x']"])


def test_two_runs_in_one_folder(folder, capsys):
    import fcntl

    assert run(folder, "prepare") == 0 and run(folder, "precompute-ref") == 0
    # This process holds the lock of the folder it prepared in, so the other run has a folder of its own.
    taken = folder / "taken"
    taken.mkdir()
    options = ["--output_dir", str(taken), "--data.artifact", str(folder / "run" / "dataset"), "--reference.artifact", str(folder / "run" / "reference")]
    with open(taken / ".lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for command in ("prepare", "train"):
            refuse(capsys, folder, command, *options, saying=["another run is writing here"])
        assert not (taken / "status.json").exists(), "the status is that of the run inside"


def test_a_reference_model_with_another_tokenizer(folder, capsys):
    assert run(folder, "prepare") == 0
    make_model(folder / "other", seed=1)
    number_tokenizer(VOCAB_SIZE - 1).save_pretrained(folder / "other")
    refuse(capsys, folder, "precompute-ref", "--reference.path", str(folder / "other"), saying=["reference.path", "tokenizer: this run has"])


def test_a_complete_reference_artefact_is_not_made_twice(folder, capsys):
    assert run(folder, "prepare") == 0 and run(folder, "precompute-ref") == 0
    made = (folder / "run" / "reference" / "manifest.json").stat().st_mtime_ns
    assert run(folder, "precompute-ref", "--loss.beta", "0.5", "--batch.global_batch_size", "16") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert (folder / "run" / "reference" / "manifest.json").stat().st_mtime_ns == made


@pytest.mark.parametrize("rope", [{"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 4}])
def test_rotary_embeddings_that_depend_on_the_batch_limit_the_length(folder, capsys, rope):
    make_model(folder / "model", seed=0, rope_parameters=rope)
    refuse(capsys, folder, "prepare", saying=["data.max_length", "only 4 positions to use"])


def test_logits_that_are_changed_after_the_head_are_refused_in_families_that_are_not_tested(folder, capsys):
    from transformers import NanoChatConfig

    NanoChatConfig(vocab_size=VOCAB_SIZE, final_logit_softcapping=15.0).save_pretrained(folder / "model")
    refuse(capsys, folder, "prepare", saying=["final_logit_softcapping = 15.0"])


def test_a_model_of_more_than_language_is_refused(folder, capsys):
    from transformers import Gemma3Config

    Gemma3Config().save_pretrained(folder / "model")
    refuse(capsys, folder, "prepare", saying=["gemma3 is more than a language model"])


@pytest.mark.parametrize(
    ("content", "saying"),
    [
        ({"zero_optimisation": {"stage": 3}}, ["zero_optimisation: unknown key", "did you mean zero_optimization"]),
        ({"zero_optimization": {"stage": 3, "stage3_prefetch_buckets": 1}}, ["zero_optimization.stage3_prefetch_buckets"]),
        ({"gradient_clipping": 0.5}, ["gradient_clipping", "optim.max_grad_norm"]),
        ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, ["bf16", "model.dtype"]),
        ({"zero_optimization": {"stage": 7}}, ["zero_optimization.stage"]),
    ],
)
def test_a_deepspeed_file_with_a_wrong_key(folder, capsys, content, saying):
    path = folder / "ds.json"
    path.write_text(json.dumps(content))
    refuse(capsys, folder, "train", "--deepspeed.config", str(path), saying=["ds.json", *saying])


def test_an_unwritable_target_is_one_message(folder, capsys):
    (folder / "blocked").write_text("a file, not a folder")
    refuse(capsys, folder, "prepare", "--data.artifact", str(folder / "blocked" / "dataset"), saying=["cannot write", "blocked"])


def test_prepare_under_the_launcher_is_refused(folder, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refuse(capsys, folder, "prepare", saying=["one process", "without deepspeed"])
