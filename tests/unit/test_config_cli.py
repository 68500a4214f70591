"""From YAML and options to a RunConfig, or to one message and exit code 2."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from kto_ds.cli import COMMANDS, main, read_config
from kto_ds.cli_apart import APART
from kto_ds.config import RunConfig
from kto_ds.config_data import FIELDS
from kto_ds.config_text import known_keys, nearest_key, read_yaml, write_yaml
from kto_ds.errors import EXIT_OK, EXIT_USER, UserError

ROOT = Path(__file__).parents[2]
MINIMAL = "output_dir: runs/x\nmodel: {path: some/model}\ndata: {train: [{path: rows.jsonl}]}\n"


def run_file(tmp_path: Path, more: str = "", text: str = MINIMAL) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text + more, encoding="utf-8")
    return path


def config_of(tmp_path: Path, more: str = "", *options: str, text: str = MINIMAL) -> RunConfig:
    return read_config("train", ["--config", str(run_file(tmp_path, more, text)), *options])[0]


def refused(capsys, tmp_path: Path, more: str = "", *options: str, text: str = MINIMAL, command: str = "train") -> str:
    """Run main on what it must refuse and return its message: exit code 2, on stderr only, without a traceback."""
    code = main([command, "--config", str(run_file(tmp_path, more, text)), *options])
    captured = capsys.readouterr()
    assert code == EXIT_USER == 2, captured.err
    assert captured.out == "" and captured.err.startswith("kto-ds: error: ") and "Traceback" not in captured.err and "pydantic" not in captured.err
    return captured.err


# defaults, YAML, overrides


def test_the_smallest_file_gets_the_defaults(tmp_path):
    config = config_of(tmp_path)
    assert (config.seed, config.loss.beta, config.optim.learning_rate, config.batch.global_batch_size) == (42, 0.1, 1e-6, 32)
    assert config.dataset_dir == Path("runs/x/dataset") and config.reference_dir == Path("runs/x/reference") and config.export_dir == Path("runs/x/export")


def test_an_option_beats_the_file_and_the_file_the_default(tmp_path):
    more = "loss: {beta: 0.3, desirable_weight: 1.5}\nreport: {wandb: {mode: offline, project: p}}\n"
    config = config_of(tmp_path, more, "--loss.beta", "0.5", "--report.wandb.project=q", "--output_dir", "elsewhere")
    assert (config.loss.beta, config.loss.desirable_weight, config.loss.undesirable_weight) == (0.5, 1.5, 1.0)
    assert (config.report.wandb.mode, config.report.wandb.project, config.output_dir) == ("offline", "q", Path("elsewhere"))


def test_an_option_can_replace_the_list_of_sources(tmp_path):
    config = config_of(tmp_path, "", "--data.train", '[{"path": "other.jsonl", "split": "train"}]')
    assert [(source.path, source.split) for source in config.data.train] == [("other.jsonl", "train")]


@pytest.mark.parametrize("options", [("--train.max_steps", "null"), ("--train.max_steps=null",)])
def test_null_takes_a_value_back(tmp_path, options):
    assert config_of(tmp_path, "train: {max_steps: 7}\n").train.max_steps == 7
    assert config_of(tmp_path, "train: {max_steps: 7}\n", *options).train.max_steps is None


@pytest.mark.parametrize("text", ["1e-6", "1.0e-6", "1.E-6", "0.000001"])
def test_numbers_with_an_exponent_are_numbers(tmp_path, text):
    # YAML 1.1 reads 1e-6, without a point, as a string.
    assert config_of(tmp_path, f"optim: {{learning_rate: {text}}}\n").optim.learning_rate == 1e-6
    assert config_of(tmp_path, "", "--optim.learning_rate", text).optim.learning_rate == 1e-6


def test_words_of_yaml_1_1_stay_words(tmp_path):
    config = config_of(tmp_path, "report: {wandb: {name: off, project: 'no'}}\n")
    assert (config.report.wandb.name, config.report.wandb.project) == ("off", "no")


@pytest.mark.parametrize("text", ["True", "false", "true"])
def test_booleans(tmp_path, text):
    assert config_of(tmp_path, "", "--model.gradient_checkpointing", text).model.gradient_checkpointing == (text.lower() == "true")
    assert config_of(tmp_path, f"model: {{path: m, gradient_checkpointing: {text}}}\n", text=MINIMAL.replace("model: {path: some/model}\n", "")).model.path == "m"


def test_the_environment_changes_nothing(tmp_path, monkeypatch):
    for name in ("SEED", "LOSS", "OUTPUT_DIR", "LOSS__BETA", "KTO_DS_SEED"):
        monkeypatch.setenv(name, "7")
    config = config_of(tmp_path)
    assert (config.seed, config.loss.beta, config.output_dir) == (42, 0.1, Path("runs/x"))


def test_a_config_cannot_be_changed(tmp_path):
    with pytest.raises(ValidationError, match="frozen"):
        config_of(tmp_path).loss.beta = 0.5


# unknown keys


@pytest.mark.parametrize(
    ("more", "key", "nearest"),
    [
        ("loss: {bta: 0.5}\n", "loss.bta", "loss.beta"),
        ("batch: {global_batchsize: 8}\n", "batch.global_batchsize", "batch.global_batch_size"),
        ("optimiser: {learning_rate: 1}\n", "optimiser", "optim"),
        ("learning_rate: 1.0e-5\n", "learning_rate", "optim.learning_rate"),
        ("train: {learning_rate: 1.0e-5}\n", "train.learning_rate", "optim.learning_rate"),
        ("report: {wandb: {projekt: p}}\n", "report.wandb.projekt", "report.wandb.project"),
    ],
)
def test_an_unknown_key_of_the_file_is_named_with_the_nearest_known_one(capsys, tmp_path, more, key, nearest):
    message = refused(capsys, tmp_path, more)
    assert f"{key}: unknown key" in message and str(tmp_path / "run.yaml") in message
    assert f"did you mean {nearest}?" in message


@pytest.mark.parametrize("form", ["--{} {}", "--{}={}"])
@pytest.mark.parametrize(("key", "nearest"), [("loss.bta", "loss.beta"), ("learning_rate", "optim.learning_rate"), ("batch.global_batch", "batch.global_batch_size")])
def test_an_unknown_option_is_named_with_the_nearest_known_one(capsys, tmp_path, key, nearest, form):
    message = refused(capsys, tmp_path, "", *form.format(key, "1").split())
    assert f"--{key}" in message and f"did you mean {nearest}?" in message


def test_options_are_not_abbreviated(capsys, tmp_path):
    assert "did you mean loss.beta?" in refused(capsys, tmp_path, "", "--loss.bet", "0.5")


@pytest.mark.parametrize(
    ("command", "option", "hint"),
    [("prepare", "--profile", "--profile is an option of kto-ds train"), ("train", "--profil", "did you mean --profile?"), ("inspect", "--num_row", "did you mean --num_rows?")],
)
def test_an_option_of_a_command_is_told_from_the_keys(capsys, tmp_path, command, option, hint):
    assert hint in refused(capsys, tmp_path, "", option, command=command)


def test_every_key_is_nearest_to_itself():
    assert all(nearest_key(key) == f"did you mean {key}?" for key in known_keys())


def test_a_key_written_as_an_option_is_shown_in_sections(capsys, tmp_path):
    assert "remedy: write sections one within another: report: {wandb: {mode: ...}}\n" in refused(capsys, tmp_path, "report.wandb.mode: offline\n")


@pytest.mark.parametrize("key", ["data.train.0.path", "data.train.path", "data.train.0.pth"])
def test_a_key_of_a_source_is_no_option(capsys, tmp_path, key):
    message = refused(capsys, tmp_path, "", f"--{key}", "x")
    assert f"--{key}" in message and """remedy: path belongs to a source: --data.train '[{"path": "rows.jsonl"}]'\n""" in message


def test_several_mistakes_are_told_at_once(capsys, tmp_path):
    message = refused(capsys, tmp_path, "loss: {bta: 0.5, beta: -1}\nsede: 3\n")
    assert "3 keys cannot be used" in message and "loss.bta" in message and "loss.beta" in message and "did you mean seed?" in message


# values


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        ("loss: {beta: high}\n", ["loss.beta", "number", "'high'"]),
        ("loss: {beta: 0}\n", ["loss.beta", "greater than 0", "found 0"]),
        ("loss: {beta: .nan}\n", ["loss.beta", "finite"]),
        ("optim: {learning_rate: .inf}\n", ["optim.learning_rate", "finite"]),
        ("loss: {beta: true}\n", ["loss.beta", "not true or false", "found True"]),
        ("loss: {beta: null}\n", ["loss.beta", "found None"]),
        ("loss: {loss_type: apo_zero_unpaired, kl_fraction: 0.5}\n", ["loss.kl_fraction", "estimates no reference point"]),
        ("loss: {loss_type: dpo}\n", ["loss.loss_type", "'kto' or 'apo_zero_unpaired'", "'dpo'"]),
        ("loss: 3\n", ["loss: expected a section with keys such as loss_type; found 3", "remedy: write loss: {loss_type: ...}; the section has "]),
        ("checkpoint: {save_steps: true}\n", ["checkpoint.save_steps", "not true or false"]),
        ("checkpoint: {save_steps: 2.5}\n", ["checkpoint.save_steps", "integer", "found 2.5"]),
        ("train: {max_steps: 0}\n", ["train.max_steps", "greater than or equal to 1"]),
        ("train: {num_train_epochs: -1}\n", ["train.num_train_epochs", "greater than 0"]),
        ("optim: {warmup_ratio: 1.5}\n", ["optim.warmup_ratio", "less than or equal to 1"]),
        ("optim: {adam_beta2: 1}\n", ["optim.adam_beta2", "less than 1"]),
        ("seed: -1\n", ["seed", "greater than or equal to 0"]),
        ("seed: 4294967296\n", ["seed", "less than 4294967296"]),
    ],
)
def test_a_wrong_value_is_told_with_key_found_and_expected(capsys, tmp_path, more, parts):
    message = refused(capsys, tmp_path, more)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--loss.beta", "high"), ["loss.beta", "number", "'high'"]),
        (("--data.kl_group_size", "true"), ["data.kl_group_size", "integer"]),
        (("--optim.max_grad_norm", "null"), ["optim.max_grad_norm", "found None"]),
        (("--data.train", "[]"), ["data.train", "at least one source"]),
        (("--data.train", "x"), ["data.train: expected a list of sources; found 'x'", """remedy: write --data.train '[{"path": "x"}]'\n"""]),
        (("--data.eval", "[x"), ["data.eval: not a list of sources in JSON (", """remedy: write --data.eval '[{"path": "rows.jsonl"}]'\n"""]),
        (("--data.chat_template_kwargs", "x"), ["data.chat_template_kwargs: expected a section or a mapping in JSON\n"]),
        (("--report.wandb", "{x"), ["report: expected a section or a mapping in JSON (Expecting property name"]),
        (("--loss.beta",), ["--loss.beta", "expected one argument"]),
        (("stray",), ["stray"]),
    ],
)
def test_a_wrong_option_is_told_likewise(capsys, tmp_path, options, parts):
    message = refused(capsys, tmp_path, "", *options)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(("more", "options"), [("batch: {global_batch_size: 3}\n", ()), ("", ("--batch.global_batch_size", "3"))])
def test_a_step_must_hold_a_kl_group(capsys, tmp_path, more, options):
    message = refused(capsys, tmp_path, more, *options)
    assert "batch.global_batch_size: a step of 3 cannot hold a KL group of 4 prompts" in message and "data.kl_group_size" in message


@pytest.mark.parametrize("key", ["output_dir", "model", "data"])
def test_what_must_be_given_is_named(capsys, tmp_path, key):
    text = "".join(line + "\n" for line in MINIMAL.splitlines() if not line.startswith(key))
    assert f"{key}: required, but not set" in refused(capsys, tmp_path, text=text)


def test_the_path_of_a_source_must_be_given_in_the_source(capsys, tmp_path):
    message = refused(capsys, tmp_path, text=MINIMAL.replace("path: rows.jsonl", "split: train"))
    assert "data.train.0.path: required, but not set" in message and "every source has a path: train: [{path: rows.jsonl}] in section data\n" in message


# data


def data(more: str) -> str:
    return MINIMAL.replace("rows.jsonl}]}", f"rows.jsonl}}], {more}}}")


def source(more: str) -> str:
    return MINIMAL.replace("rows.jsonl", f"rows.jsonl, {more}")


@pytest.mark.parametrize(
    ("more", "splits"),
    [
        ("eval: [{path: a}, {path: b}]", {"eval": ["a", "b"]}),
        ("eval: {maths: [{path: a}], chat-2: [{path: b}, {path: c}]}", {"eval/maths": ["a"], "eval/chat-2": ["b", "c"]}),
        ("eval: []", {}),
        ("eval: {}", {}),
        ("shuffle: true", {}),
    ],
)
def test_evaluation_sources_are_one_split_or_several_with_names(tmp_path, more, splits):
    assert {name: [source.path for source in sources] for name, sources in config_of(tmp_path, text=data(more)).data.eval_splits.items()} == splits


@pytest.mark.parametrize(
    ("option", "splits"), [('[{"path": "a\\"b"}]', {"eval": ['a"b']}), ('{"x": [{"path": "a"}], "y": [{"path": "b"}]}', {"eval/x": ["a"], "eval/y": ["b"]}), ("[]", {})]
)
def test_both_kinds_of_evaluation_sources_can_be_options(tmp_path, option, splits):
    config = config_of(tmp_path, "", "--data.eval", option, text=data("eval: [{path: k}]"))
    assert {name: [source.path for source in sources] for name, sources in config.data.eval_splits.items()} == splits


@pytest.mark.parametrize(
    ("labels", "texts"),
    [
        ("{1: true, 0: false}", {"1": True, "0": False}),
        ("{true: true, false: false}", {"true": True, "false": False}),
        ("{true: true, false: false, 1: true, 0: false}", {"true": True, "false": False, "1": True, "0": False}),
        ("{TRUE: true, FALSE: false, True: true}", {"TRUE": True, "FALSE": False, "True": True}),
        ("{1.0: true, 0.5: false}", {"1": True, "0.5": False}),
        ("{thumbs_up: true, '1': true, no: false}", {"thumbs_up": True, "1": True, "no": False}),
    ],
)
def test_labels_are_texts_whatever_yaml_makes_of_them(tmp_path, labels, texts):
    assert config_of(tmp_path, text=source(f"label_map: {labels}")).data.train[0].label_map == texts


def test_a_source_on_the_command_line_has_labels_and_columns(tmp_path):
    config = config_of(tmp_path, "", "--data.train", '[{"path": "a", "label_map": {"1": true}, "columns": {"prompt": "q"}, "weight": 0.5}]')
    assert config.data.train[0].model_dump() == {"path": "a", "split": None, "weight": 0.5, "columns": {"prompt": "q"}, "label_map": {"1": True}}


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        ("truncation_mode: keep_end", ["data.truncation_mode: keep_end cuts prompts", "found 'keep_end'", "remedy: set data.max_prompt_length"]),
        ("truncation_mode: middle", ["data.truncation_mode", "'keep_start', 'keep_end', 'drop' or 'error'"]),
        ("max_prompt_length: 2048", ["data.max_prompt_length", "data.max_length = 2048", "remedy: lower it"]),
        ("max_prompt_length: 9, max_length: 8", ["data.max_prompt_length", "data.max_length = 8", "found 9"]),
        ("max_completion_length: 0", ["data.max_completion_length", "greater than or equal to 1"]),
        ("on_bad_row: skip", ["data.on_bad_row", "remedy: set data.max_bad_fraction"]),
        ("max_bad_fraction: 0.1", ["data.max_bad_fraction", "remedy: set data.on_bad_row: skip, or remove"]),
        ("on_bad_row: skip, max_bad_fraction: 0", ["data.max_bad_fraction", "greater than 0"]),
        ("on_bad_row: skip, max_bad_fraction: 1.1", ["data.max_bad_fraction", "less than or equal to 1"]),
        ("held_out_fraction: 0", ["data.held_out_fraction", "greater than 0"]),
        ("held_out_fraction: 1", ["data.held_out_fraction", "less than 1"]),
        ("held_out_fraction: true", ["data.held_out_fraction", "not true or false"]),
        ("special_tokens_in_text: ignore", ["data.special_tokens_in_text", "'warn' or 'error'"]),
        ("chat_template_kwargs: {tools: []}", ["data.chat_template_kwargs: tools is decided by kto_ds", "remedy: remove it"]),
        ("chat_template_kwargs: {when: 2024-01-01}", ["data.chat_template_kwargs.when", "JSON"]),
        ("eval: {a/b: [{path: x}]}", ["data.eval: 'a/b' cannot name", "letters, digits"]),
        ("eval: {'': [{path: x}]}", ["data.eval: '' cannot name"]),
        ("eval: {held_out: [{path: x}]}", ["data.eval: 'held_out' cannot name"]),
        ("eval: {maths: []}", ["data.eval.maths: expected at least one source"]),
        ("eval: {maths: {path: x}}", ["data.eval.maths: expected a list", "write eval: {maths: [{path: x}]} in section data\n"]),
        ("eval: {1: [{path: x}]}", ["data.eval.1: ", "string"]),
        ("eval: [{path: x, weight: 2}]", ["data.eval: weight is for training sources", "remedy: remove it"]),
        ("eval: {maths: [{path: x, wieght: 1}]}", ["data.eval.maths.0.wieght: unknown key", "did you mean data.eval.maths.0.weight?"]),
        ("eval: rows.jsonl", ["data.eval: expected a list of sources; found 'rows.jsonl'", "remedy: write eval: [{path: rows.jsonl}] in section data\n"]),
        ("eval: 3", ["data.eval: ", "list", "found 3"]),
        ("eval: [a.jsonl]", ["data.eval.0: expected a source such as {path: rows.jsonl}; found 'a.jsonl'", "write eval: [{path: a.jsonl}] in section data\n"]),
        ("eval: {path: a.jsonl}", ["data.eval.path: expected a list of sources", "write eval: [{path: a.jsonl}] in section data\n"]),
        ("label_map: {a: true}", ["data.label_map: unknown key", "belongs to a source: train: [{path: rows.jsonl, label_map: {up: true, down: false}}] in section data\n"]),
        ("columns: {prompt: q}", ["data.columns: unknown key", "columns belongs to a source: "]),
        ("weight: 2", ["data.weight: unknown key", "weight belongs to a source: "]),
        ("chat_template_kwargs: 3", ["data.chat_template_kwargs: expected a mapping such as {enable_thinking: false}; found 3"]),
        ("artifact: ''", ["data.artifact: a path is expected"]),
    ],
)
def test_what_the_data_section_refuses(capsys, tmp_path, more, parts):
    message = refused(capsys, tmp_path, text=data(more))
    assert all(part in message for part in [*parts, "remedy: "]) and message.count("\n") == 2, message


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        ("columns: {promt: question}", ["columns: 'promt' is not a field", ", ".join(FIELDS)]),
        ("columns: {prompt: text, completion: text}", ["columns: column 'text' is given to two fields"]),
        ("columns: {prompt: ''}", ["columns.prompt: ", "at least 1 character"]),
        ("columns: {prompt: 3}", ["columns.prompt: ", "string"]),
        ("label_map: {}", ["label_map: an empty map"]),
        ("label_map: {good: 1}", ["label_map: 'good' is mapped to 1", "true (desirable)"]),
        ("label_map: {good: 'true'}", ["label_map: 'good' is mapped to 'true'"]),
        ("label_map: {1: true, '1': false}", ["label_map: label '1' is listed twice"]),
        ("label_map: {null: false}", ["label_map: label None is not"]),
        ("label_map: [good]", ["label_map: expected a mapping such as {up: true, down: false}"]),
        ("columns: {question: prompt}", ["columns: you wrote it the wrong way round", "write our field first: prompt: 'question'"]),
        ("weight: 101", ["weight: Input should be less than or equal to 100; found 101", "remedy: weight is how often"]),
        ("wieght: 2", ["wieght: unknown key", "did you mean data.train.0.weight?"]),
        ("x: 2", ["x: unknown key", "a source has path, split, weight, columns, label_map"]),
        ("weight: 0", ["weight: ", "greater than 0"]),
        ("weight: true", ["weight: ", "not true or false"]),
        ("weight: .inf", ["weight: ", "finite"]),
    ],
)
def test_what_a_source_refuses(capsys, tmp_path, more, parts):
    message = refused(capsys, tmp_path, text=source(more))
    assert "data.train.0." in message and all(part in message for part in [*parts, "remedy: "]), message


@pytest.mark.parametrize("value", ["auto", "1.25", "0"])
def test_a_weight_of_the_loss_is_a_number_or_auto(tmp_path, value):
    expected = value if value == "auto" else float(value)
    assert config_of(tmp_path, f"loss: {{desirable_weight: {value}}}\n").loss.desirable_weight == expected
    assert config_of(tmp_path, "", "--loss.undesirable_weight", value).loss.undesirable_weight == expected


@pytest.mark.parametrize("value", ["high", "-1", "true", "null", ".nan"])
def test_any_other_weight_is_refused(capsys, tmp_path, value):
    assert "loss.desirable_weight: " in refused(capsys, tmp_path, f"loss: {{desirable_weight: {value}}}\n")


@pytest.mark.parametrize("options", [("--output_dir", ""), ("--output_dir=",), ("--model.path=",)])
def test_an_empty_path_is_refused(capsys, tmp_path, options):
    assert f"{options[0].strip('-=')}: " in refused(capsys, tmp_path, "", *options)


# files


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("seed: 1\nseed: 2\n", "seed"),
        ("loss:\n  beta: 0.1\n  beta: 0.2\n", "beta"),
        ("loss: {beta: 0.1\n", "not valid YAML"),
        ("!!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ("- a\n- b\n", "expected a mapping"),
        ("", "expected a mapping"),
        ("\t:\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_not_a_config_is_one_message(capsys, tmp_path, text, part):
    message = refused(capsys, tmp_path, text=text)
    assert part in message and str(tmp_path / "run.yaml") in message and "\n  remedy: " in message


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("rows.jsonl", '{"prompt": "a", "label": true}\n{"prompt": "b", "label": true}\n', "JSON lines"),
        ("rows.jsonl", '{"prompt": "a", "label": true}\n', "JSON rows"),
        ("rows.json", '[{"prompt": "a"}]', "JSON rows"),
        ("rows.csv", "prompt,completion,label\na,b,true\n", "CSV data"),
        ("rows.txt", 'prompt,completion,label\n"a: b",c: d,true\n', "CSV data"),
        ("rows.parquet", "PAR1\x15", "a table"),
    ],
)
def test_a_data_file_as_config_is_told_so(capsys, tmp_path, name, text, kind):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert main(["prepare", "--config", str(tmp_path / name)]) == 2
    assert f"remedy: give a YAML config, and name data files in its data.train; this looks like {kind}\n" in capsys.readouterr().err


def test_a_config_in_json_is_a_config(tmp_path):
    text = '{"output_dir": "runs/x", "model": {"path": "m"}, "data": {"train": [{"path": "r"}]}}'
    assert config_of(tmp_path, text=text).model.path == "m"


def test_what_the_parser_says_is_cut_to_place_and_fault(capsys, tmp_path):
    message = refused(capsys, tmp_path, "seed: 1\nseed: 2\n")
    assert message == f"kto-ds: error: {tmp_path / 'run.yaml'}:5: not valid YAML: found duplicate key \"seed\"\n  remedy: keep one of them\n"


def test_a_duplicate_key_is_not_silently_the_last_one(tmp_path):
    with pytest.raises(UserError, match="duplicate key"):
        read_yaml(run_file(tmp_path, text="loss: {beta: 0.1, beta: 0.2}\n"))


def test_bytes_that_are_not_utf_8_are_one_message(capsys, tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"output_dir: \xff\n")
    assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 2
    assert "not valid YAML" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_a_file_that_cannot_be_read_is_one_message(capsys, tmp_path, name):
    assert main(["train", "--config", str(tmp_path / name)]) == 2
    assert "cannot read the config" in capsys.readouterr().err


def test_without_a_config_the_option_is_named(capsys):
    assert main(["train"]) == 2
    assert "--config" in capsys.readouterr().err


# --print-config


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in APART])
def test_the_printed_config_reads_back_as_the_same_one(capsys, tmp_path, command):
    more = "optim: {learning_rate: 3e-7, max_grad_norm: 0}\ntrain: {num_train_epochs: 0.5}\nreport: {wandb: {name: 'yes'}}\n"
    path = run_file(tmp_path, more)
    sources = '[{"path": "a b.jsonl", "label_map": {"1": true, "false": false}, "columns": {"label": "no"}}, {"path": "c", "split": "train", "weight": 2}]'
    options = ["--seed", "7", "--data.train", sources, "--data.eval", '{"on": [{"path": "e"}]}', "--data.chat_template_kwargs", '{"thinking": false, "x": ["1"]}']
    assert main([command, "--config", str(path), *options, "--print-config"]) == EXIT_OK
    printed = capsys.readouterr()
    assert printed.err == ""
    again = tmp_path / "again.yaml"
    again.write_text(printed.out, encoding="utf-8")
    config = read_config(command, ["--config", str(path), *options])[0]
    assert read_config(command, ["--config", str(again)])[0] == config
    assert {key for key, value in config.model_dump().items() if isinstance(value, dict)} <= read_yaml(again).keys()


def test_all_that_is_known_is_written(tmp_path):
    stream = io.StringIO()
    write_yaml(config_of(tmp_path), stream)
    (tmp_path / "written.yaml").write_text(stream.getvalue(), encoding="utf-8")
    written = read_yaml(tmp_path / "written.yaml")
    for key in known_keys():
        section = written
        for part in key.split("."):
            section = section[part]
            if section is None and key.startswith(("model.lora", "eval.generate")):  # a section that is not there has no keys
                break


# options of a command of its own


def test_inspect_has_options_besides_those_of_the_config(tmp_path):
    path = str(run_file(tmp_path))
    config, given = read_config("inspect", ["--config", path, "--split", "eval/maths", "--num_rows=2", "--loss.beta", "0.5"])
    assert (given.split, given.num_rows, given.step, given.num_ranks, config.loss.beta) == ("eval/maths", 2, 1, 1, 0.5)
    assert read_config("inspect", ["--config", path])[1].split == "train"


@pytest.mark.parametrize(
    ("command", "options", "part"),
    [("inspect", ("--num_rows", "many"), "--num-rows: invalid int value: 'many'"), ("inspect", ("--split",), "--split: expected one argument"), ("train", ("--num_ranks", "2"), "--num_ranks")],
)
def test_they_are_checked_and_belong_to_that_command(capsys, tmp_path, command, options, part):
    assert part in refused(capsys, tmp_path, "", *options, command=command)


@pytest.mark.parametrize("option", ["--max-wall-time", "--max_wall_time"])
@pytest.mark.parametrize("joined", [True, False])
def test_they_may_be_written_with_dashes(tmp_path, option, joined):
    path = str(run_file(tmp_path))
    config, given = read_config("train", ["--config", path, *([f"{option}=3600"] if joined else [option, "3600"])])
    assert given.max_wall_time == "3600" and config == read_config("train", ["--config", path])[0]
    assert read_config("train", ["--config", path])[1].max_wall_time is None


def test_one_of_another_command_is_said_to_be_so(capsys, tmp_path):
    assert "--max-wall-time is an option of kto-ds train" in refused(capsys, tmp_path, "", "--max-wall-time", "5", command="evaluate")


def test_a_wall_time_that_is_none_is_refused(capsys, tmp_path):
    assert "'soon' is no wall time" in refused(capsys, tmp_path, "", "--max-wall-time", "soon")


# launchers and commands


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("option", ["--local_rank=3", "--local-rank=0"])
def test_the_option_the_launcher_adds_is_accepted(capsys, tmp_path, option, place):
    command = ["train", "--config", str(run_file(tmp_path)), "--print-config"]
    assert main([option, *command] if place == "before" else [*command, option]) == EXIT_OK
    assert "local" not in capsys.readouterr().out


def test_an_unknown_command_lists_the_known_ones(capsys):
    assert main(["trian"]) == 2
    message = capsys.readouterr().err
    assert "unknown command 'trian'" in message and all(command in message for command in COMMANDS)


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(capsys, argv):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    text = capsys.readouterr().out
    assert caught.value.code == EXIT_OK and all(command in text for command in COMMANDS)


def test_help_of_a_command_lists_every_key_that_can_be_set(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == EXIT_OK
    sections = {key for key in known_keys() if any(other.startswith(key + ".") for other in known_keys())}
    assert [key for key in known_keys() if key not in sections and f"--{key}" not in text] == []


@pytest.mark.parametrize("options", [["--print-config"], ["--help"]])
def test_an_output_that_nobody_reads_ends_quietly(tmp_path, options):
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run([sys.executable, "-m", "kto_ds", "train", "--config", str(run_file(tmp_path)), *options], stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, "")


def test_as_a_program_a_mistake_ends_with_2_before_torch_is_imported(tmp_path):
    path = run_file(tmp_path, "loss: {bta: 0.5}\n")
    code = f"import sys; from kto_ds.cli import main; code = main(['train', '--config', {str(path)!r}]); sys.exit(9 if 'torch' in sys.modules else code)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr == f"kto-ds: error: {path}: loss.bta: unknown key\n  remedy: did you mean loss.beta?\n"
