"""kto-ds inspect, on datasets whose token ids are written down here."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from kto_ds.artifacts import describe_folder, seal
from kto_ds.config import RunConfig
from kto_ds.data.dataset import ARRAYS, FILES, TokenizedSplit
from kto_ds.data.keys import ids_key, pair_keys
from kto_ds.errors import UserError
from kto_ds.report.histograms import LengthLimits, Lengths, plot_lengths
from kto_ds.report.inspection import Reader, counts_by_split, decoded, fill_table, open_console, visible
from kto_ds.stages.identity import dataset_identity, run_tokenizer
from kto_ds.stages.inspect import cut_of, examples_of_step, fills_of, main, spread

EOS = 256
HOSTILE = "\x1b[31mred\x1b]0;title\x07 \x9b2J\u202egnp.exe\u200b \t\r[bold]loud[/bold]"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, so that every text has ids that can be written down, and <eos>."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def encode(text: str) -> list[int]:
    ids = byte_tokenizer()(text)["input_ids"]
    assert max(ids) <= EOS
    return ids


def make_split(rows: list[tuple[str, str, bool]], *, max_length: int = 10_000, kl_group_size: int = 2) -> TokenizedSplit:
    """Rows of (prompt, completion, label); each completion is donated to the next prompt of its group, and cut where it does not fit."""
    prompts = list(dict.fromkeys(prompt for prompt, _, _ in rows))
    prompt_of = np.array([prompts.index(prompt) for prompt, _, _ in rows])
    group = prompt_of // kl_group_size
    members = np.minimum(kl_group_size, len(prompts) - group * kl_group_size)
    mismatched_prompt_of = group * kl_group_size + (prompt_of % kl_group_size + 1) % members
    prompt_ids, completion_ids = [encode(prompt) for prompt in prompts], [encode(completion) for _, completion, _ in rows]
    lengths, room = np.array([len(ids) for ids in completion_ids]), max_length - np.array([len(ids) for ids in prompt_ids])
    matched, mismatched = np.minimum(lengths, room[prompt_of]), np.minimum(lengths, room[mismatched_prompt_of])
    kept = [ids[:needed] for ids, needed in zip(completion_ids, np.maximum(matched, mismatched))]
    halves = ((prompt_of, matched), (mismatched_prompt_of, mismatched))
    pairs = [(prompt_ids[prompt], ids[:length]) for prompts, lengths in halves for ids, prompt, length in zip(completion_ids, prompts, lengths)]
    prompt_keys, completion_keys = (np.stack([ids_key(np.array(ids)) for ids in part]) for part in zip(*pairs))
    return TokenizedSplit(
        prompt_tokens=np.concatenate(prompt_ids).astype(np.int32), prompt_offsets=np.cumsum([0, *map(len, prompt_ids)]),
        completion_tokens=np.concatenate(kept).astype(np.int32), completion_offsets=np.cumsum([0, *map(len, kept)]),
        prompt_of=prompt_of, mismatched_prompt_of=mismatched_prompt_of, matched_lengths=matched, mismatched_lengths=mismatched,
        desirable=np.array([label for _, _, label in rows]), kl_group_of=group, pair_keys=pair_keys(prompt_keys, completion_keys),
        file_of=np.zeros(len(rows), np.int32), row_of=np.arange(1, len(rows) + 1), files=("rows.jsonl:",),
    )  # fmt: skip


def numbered_rows(count: int) -> list[tuple[str, str, bool]]:
    return [(f"question {index // 2}?", f" answer {index} " + "x" * index + "<eos>", index % 2 == 0) for index in range(count)]


def save_split(folder: Path, split: TokenizedSplit) -> None:
    folder.mkdir(parents=True)
    for name in ARRAYS:
        np.save(folder / f"{name}.npy", vars(split)[name])
    (folder / FILES).write_text(json.dumps(split.files))


def save_run(folder: Path, splits: dict[str, TokenizedSplit], **sections) -> RunConfig:
    """Write a model folder without weights, and the dataset artefact of a run on it."""
    byte_tokenizer().save_pretrained(folder / "model")
    LlamaConfig(vocab_size=257, hidden_size=8, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1).save_pretrained(folder / "model")
    (folder / "rows.jsonl").touch()
    values = {"data": {"train": [{"path": str(folder / "rows.jsonl")}]}, "batch": {"global_batch_size": 4, "max_tokens_per_microbatch": 64}}
    merged = {name: {**values.get(name, {}), **sections.get(name, {})} for name in values.keys() | sections.keys()}
    config = RunConfig(output_dir=folder / "run", model={"path": str(folder / "model"), "dtype": "float32"}, **merged)
    for name, split in splits.items():
        save_split(config.dataset_dir / name, split)
    report = {name: {"examples": 1234567, "mean_tokens": 12.345, "sources": [{"path": HOSTILE, "split": None, "rows": 7654321}]} for name in splits}
    (config.dataset_dir / "data_report.json").write_text(json.dumps(report))
    manifest = {"kind": "dataset", "identity": dataset_identity(config, run_tokenizer(config)), "splits": list(splits)}
    seal(config.dataset_dir, manifest, describe_folder(config.dataset_dir))
    return config


def inspect(config: RunConfig, capsys, *, split: str = "train", num_rows: int = 2, step: int = 1, num_ranks: int = 1) -> str:
    main(config, split=split, num_rows=num_rows, step=step, num_ranks=num_ranks)
    return capsys.readouterr().out


def totals(output: str) -> list[list[int]]:
    """Return micro-batches, units, prompts, pairs and tokens of every pass's last line."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in output.splitlines() if re.match(r"\s*all\s", line)]
    return [[int(cell.replace(",", "")) for cell in cells[1:6]] for cells in lines]


# the whole command


def test_texts_partners_counts_and_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # the folder's name may be long
    config = save_run(tmp_path, {"train": make_split(numbered_rows(8))})
    output = inspect(config, capsys, num_rows=5)
    for index in range(8):
        assert f"answer {index} {'x' * index}⟦<eos>⟧" in output and f"rows.jsonl:{index + 1}\n" in output.replace(" ─", "\n").replace("─", "")
    assert output.count("desirable example 1 of 4") == 2 and "undesirable example 4 of 4" in output
    # The completion of row 8, of the fourth prompt, is donated to the third, which rows 5 and 6 have.
    assert "donated to the prompt of rows.jsonl:5, 11 tokens; 18 of its 18 tokens fit there" in output
    assert "1,234,567" in output and "7,654,321" in output and "12.3" in output
    assert "notice" not in output
    assert (config.output_dir / "inspect-train.png").read_bytes().startswith(b"\x89PNG")


def test_the_layout_adds_up_to_the_step(tmp_path, capsys):
    split = make_split(numbered_rows(12))
    config = save_run(tmp_path, {"train": split}, batch={"max_tokens_per_microbatch": 50})
    for step in (1, 2, 3):
        examples, num_steps = examples_of_step(config, "train", split, step)
        assert num_steps == 3 and len(examples) == 4
        output = inspect(config, capsys, step=step, num_ranks=5)
        assert f"step {step} of 3, 4 examples on 5 ranks, layout prefix_shared" in output
        for (_, units, prompts, pairs, tokens), pair_ids in zip(totals(output), (examples, split.mismatched_pairs(examples)), strict=True):
            alone = split.prompt_lengths[split.pair_prompts[pair_ids]] + split.pair_lengths[pair_ids]
            assert pairs == 4 and prompts == 2 <= units and tokens <= alone.sum()
        assert "filler" in output  # four pairs cannot keep five ranks busy


@pytest.mark.parametrize("layout", ["prefix_shared", "packed", "padded"])
def test_fills_count_every_pair_once_within_the_budget(layout):
    split = make_split(numbered_rows(20), kl_group_size=5)
    for pairs in (np.arange(20), np.arange(20, 40)):
        fills = fills_of(pairs, split, layout=layout, max_tokens=90, num_ranks=3)
        assert sum(fill.pairs for fill in fills) == 20
        assert [fill.rank for fill in fills] == sorted(fill.rank for fill in fills) and len({fill.rank for fill in fills}) == 3
        assert all(fill.tokens <= fill.used <= 90 for fill in fills) and any(fill.tokens < fill.used for fill in fills) == (layout == "padded")
        together = sum(fill.tokens for fill in fills)
        alone = (split.prompt_lengths[split.pair_prompts[pairs]] + split.pair_lengths[pairs]).sum()
        assert together < alone if layout == "prefix_shared" else together == alone


def test_without_a_reference_point_there_is_no_kl_pass(tmp_path, capsys):
    output = inspect(save_run(tmp_path, {"train": make_split(numbered_rows(8))}, loss={"loss_type": "apo_zero_unpaired"}), capsys)
    assert len(totals(output)) == 1 and "no KL pass: apo_zero_unpaired" in output


def test_an_evaluation_split_is_one_step(tmp_path, capsys):
    split = make_split(numbered_rows(12))
    config = save_run(tmp_path, {"train": split, "eval/held_out": split})
    output = inspect(config, capsys, split="eval/held_out")
    assert "step 1 of 1, 12 examples on 1 rank" in output and [total[3] for total in totals(output)] == [12, 12]
    assert (config.output_dir / "inspect-eval-held_out.png").exists()
    with pytest.raises(UserError, match="no step 2: an evaluation takes its whole split in one step\n.*from 1 to 1"):
        inspect(config, capsys, split="eval/held_out", step=2)


def test_a_sequence_beyond_the_budget_is_shown_and_told(tmp_path, capsys):
    output = inspect(save_run(tmp_path, {"train": make_split(numbered_rows(8))}, batch={"max_tokens_per_microbatch": 20}), capsys)
    assert "too long" in output and "notice: train will refuse this split. batch.max_tokens_per_microbatch" in output


def test_an_artefact_of_other_settings_is_shown_with_a_notice(tmp_path, capsys):
    config = save_run(tmp_path, {"train": make_split(numbered_rows(8))})
    other = config.model_copy(update={"data": config.data.model_copy(update={"kl_group_size": 3})})
    output = inspect(other, capsys)
    assert "notice: train will refuse this artefact" in output and "kl_group_size: this run has 3" in output and "answer 2" in output


# hostile and long texts


@pytest.mark.parametrize("colour", [False, True])
def test_no_byte_of_the_data_controls_the_terminal(tmp_path, capsys, monkeypatch, colour):
    if colour:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm-256color")
    rows = [(f"{HOSTILE}{index}", f"{HOSTILE}<eos>", index < 2) for index in range(4)]
    output = inspect(save_run(tmp_path, {"train": make_split(rows)}), capsys)
    assert ("\x1b[" in output) == colour
    plain = re.sub(r"\x1b\[[0-9;]*m", "", output)
    assert all(char.isprintable() or char == "\n" for char in plain)
    assert r"\x1b[31mred\x1b]0;title\x07 \x9b2J\u202egnp.exe\u200b \t\r[bold]loud[/bold]" in plain.replace("\n", "")


def test_colours_are_left_out_where_no_color_is_set(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    output = inspect(save_run(tmp_path, {"train": make_split(numbered_rows(8))}), capsys)
    assert not re.search(r"\x1b\[[0-9;]*\b(3[0-7]|9[0-7]|4[0-7]|38|48)\b[0-9;]*m", output)


@pytest.mark.parametrize(
    "text, shown",
    [("plain é 漢 ⋯", "plain é 漢 ⋯"), ("a\nb", "a⏎\nb"), ("\r\t\x00\x7f", r"\r\t\x00\x7f"), ("\u2028\ufeff\xa0", r"\u2028\ufeff\xa0"), ("\ud800", r"\ud800")],
)
def test_what_does_not_print_is_escaped(text, shown):
    assert visible(text) == shown


def test_a_long_text_loses_its_middle_and_says_how_much():
    tokenizer = byte_tokenizer()
    text = decoded(Reader(tokenizer, {EOS}), np.array(encode("a" * 500 + "b" * 600)), "", most=20).plain
    assert text == "a" * 10 + " [... 1,080 tokens left out ...] " + "b" * 10


def test_characters_of_several_tokens_and_special_tokens():
    ids = np.array(encode("né漢<eos> <eos"))
    assert len(ids) > 10
    assert decoded(Reader(byte_tokenizer(), {EOS}), ids, "").plain == "né漢⟦<eos>⟧ <eos"


def test_a_completion_keeps_the_space_it_begins_with():
    backend = Tokenizer(models.WordLevel({"▁ask": 0, "▁good": 1, "<eos>": 2}, unk_token="<eos>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    reader = Reader(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>"), {2})
    assert decoded(reader, np.array([1, 2]), "", after=np.array([0])).plain == " good⟦<eos>⟧"
    assert decoded(reader, np.array([0, 1]), "").plain == "ask good"


# what is said about an example


@pytest.mark.parametrize(
    "completion, max_length, data, expected",
    [
        ("abc<eos>", 100, {}, "whole"),
        ("abc<eos>", 12, {}, "whole"),  # fits to the token
        ("abcdefgh<eos>", 12, {}, "cut"),  # longer behind the shorter prompt
        ("abcd", 12, {}, "at the limit: cut?"),
        ("abc", 100, {"max_completion_length": 3}, "at the limit: cut?"),
        ("abcd", 12, {"truncation_mode": "drop"}, "whole"),
    ],
)
def test_whether_a_completion_was_cut(completion, max_length, data, expected):
    split = make_split([("longlong", completion, True), ("s", "x", False)], max_length=max_length)
    section = RunConfig(output_dir="run", model={"path": "m"}, data={"train": [{"path": "rows.jsonl"}], "max_length": max_length, **data}).data
    assert cut_of(split, 0, EOS, section) == expected


@pytest.mark.parametrize("available, count, chosen", [(10, 5, [1, 3, 5, 7, 9]), (10, 1, [5]), (3, 5, [0, 1, 2]), (0, 5, []), (4, 0, []), (100, 3, [16, 50, 83])])
def test_examples_are_spread_over_the_split(available, count, chosen):
    assert spread(np.arange(available) + 7, count).tolist() == [index + 7 for index in chosen]


def test_many_micro_batches_are_counted_and_a_report_of_any_shape_is_printed(capsys):
    split = make_split(numbered_rows(200), kl_group_size=100)
    console = open_console()
    fills = fills_of(np.arange(200), split, layout="packed", max_tokens=250, num_ranks=2)
    console.print(fill_table("pass", fills, num_prompts=100, max_tokens=250, ascii_only=True))
    console.print(counts_by_split({"train": {"bad_rows": {"reasons": {"label": 3}}, "names": ["a", 2], "on": True, "none": None}, "eval": {"share": 0.25}}))
    output = capsys.readouterr().out
    assert len(fills) > 48 and f"{len(fills) - 48} more micro-batches" in output and totals(output)[0][3] == 200
    assert "####" in output and "█" not in output
    for line in (r"bad rows: reasons: label\s+3", r"names\s+a, 2", r"on\s+yes", r"none\s+none", r"share\s+0.25"):
        assert re.search(line, output)


def test_counts_of_many_splits_are_all_there_on_a_terminal_of_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    report = {f"eval/a_split_{number}": {"rows": 1000 + number, "share": {"of_a_rather_long_key": 0.5}} for number in range(9)}
    open_console().print(counts_by_split(report))
    rows = re.findall(r"^rows +(.*)$", capsys.readouterr().out, re.MULTILINE)
    assert " ".join(rows).split() == [f"{1000 + number:,}" for number in range(9)]


# refusals


@pytest.mark.parametrize(
    "options, message",
    [
        ({"split": "evil\x1b"}, r"--split: the dataset artefact has no split 'evil\\x1b'\n  remedy: use one of train, eval/helpful"),
        ({"step": 0}, "--step: train has no step 0\n  remedy: give a number from 1 to 2"),
        ({"step": 3}, "--step: train has no step 3\n  remedy: give a number from 1 to 2"),
        ({"num_ranks": 0}, "--num_ranks: 0 ranks cannot share a step"),
        ({"num_rows": -1}, "--num_rows: -1 examples cannot be shown"),
    ],
)
def test_options_that_do_not_fit(tmp_path, capsys, options, message):
    split = make_split(numbered_rows(8))
    config = save_run(tmp_path, {"train": split, "eval/helpful": split})
    with pytest.raises(UserError, match=message):
        inspect(config, capsys, **options)
    assert capsys.readouterr().out == ""


def test_without_an_artefact_prepare_is_named(tmp_path, capsys):
    config = save_run(tmp_path, {"train": make_split(numbered_rows(8))})
    elsewhere = config.model_copy(update={"output_dir": tmp_path / "other"})
    with pytest.raises(UserError, match="the dataset artefact is missing\n.*kto-ds prepare"):
        inspect(elsewhere, capsys)
    assert not elsewhere.output_dir.exists()


def test_a_damaged_artefact_and_another_tokenizer_are_refused(tmp_path, capsys):
    config = save_run(tmp_path, {"train": make_split(numbered_rows(8))})
    tokens = config.dataset_dir / "train" / "prompt_tokens.npy"
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-1] + b"\x07")
    with pytest.raises(UserError, match="damaged"):
        inspect(config, capsys)
    tokens.write_bytes(whole)
    other = byte_tokenizer()
    other.add_tokens("more")
    other.save_pretrained(config.model.path)
    with pytest.raises(UserError, match="tokenizer"):
        inspect(config, capsys)


def test_a_picture_that_cannot_be_written_is_a_users_error(tmp_path, capsys):
    config = save_run(tmp_path, {"train": make_split(numbered_rows(8))})
    (config.output_dir / "inspect-train.png").mkdir()
    with pytest.raises(UserError, match="inspect-train.png: cannot write: Is a directory\n.*output_dir"):
        inspect(config, capsys)


# the picture


@pytest.mark.parametrize(
    "prompt, completion, desirable, limits",
    [
        ([5], [1], [True], LengthLimits(None, None, 2048)),
        ([5, 9, 5], [3, 3, 3], [False] * 3, LengthLimits(9, 3, 12)),
        (list(range(1, 2000)), list(range(2000, 1, -1)), [index % 3 == 0 for index in range(1999)], LengthLimits(4096, None, 2001)),
    ],
)
def test_picture_of_any_lengths(tmp_path, prompt, completion, desirable, limits):
    plot_lengths("eval/x", Lengths(np.array(prompt), np.array(completion), np.array(desirable)), limits, {"train": (3, 0), "eval/x": (0, 12345)}, tmp_path / "x.png")
    pixels = imread(tmp_path / "x.png")
    assert pixels.shape[0] > 700 and pixels.shape[1] > 1200 and 0.02 < (pixels[..., :3].min(axis=-1) < 0.9).mean() < 0.6
