import json
import os

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from kto_ds.data.sources import read_rows
from kto_ds.errors import UserError

ROWS = [{"prompt": "a", "completion": "ü\u2028b", "label": True}, {"prompt": "c", "completion": "d", "label": False}]
ONE, TWO = (json.dumps(row, ensure_ascii=False) for row in ROWS)


def read(path, split=None):
    return list(read_rows(str(path), split))


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.JSONL"])
@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (f"{ONE}\n{TWO}\n", (1, 2)),
        (f"{ONE}\n{TWO}", (1, 2)),
        (f"\n{ONE}\r\n  \r\n{TWO}\r\n\r\n", (2, 4)),
        (f"\ufeff{ONE}\n{TWO}\n", (1, 2)),
        (f"[{ONE}, {TWO}]", (1, 1)),
        (f"\ufeff \n[\n {ONE},\n\n {TWO}\n]\n", (3, 5)),
        (json.dumps(ROWS, indent=2), (2, 7)),
        (f"{ONE}\n{json.dumps(ROWS[1])}", (1, 2)),
    ],
)
def test_json_is_read_in_every_layout(tmp_path, name, content, lines):
    path = write(tmp_path, name, content)
    assert read(path) == [(f"{path}:{line}", row) for line, row in zip(lines, ROWS)]


@pytest.mark.parametrize(
    ("content", "line", "what"),
    [
        (f"{ONE}\n{{", 2, "not valid JSON"),
        (f"{ONE}\n\n{{'a': 1}}", 3, "not valid JSON"),
        (f"{ONE}\n{TWO}}}", 2, "after the object"),
        (f"{ONE}{TWO}", 1, "after the object"),
        (f"{ONE},\n{TWO}", 1, "after the object"),
        ('{\n"a": 1\n}', 1, "not valid JSON"),
        (f'{ONE}\n{{"a": "b\tc"}}', 2, "Invalid control character"),
        ('{"a": 1, "a": 2}', 1, "'a' occurs twice"),
        ('{"a": {"\\u001b[2J": 1, "\\u001b[2J": 2}}', 1, "'\\x1b[2J' occurs twice"),
        ('{"label": NaN}', 1, "NaN is not a JSON number"),
        ('{"label": -Infinity}', 1, "-Infinity is not a JSON number"),
        ('{"a": "\\ud800"}', 1, "surrogates not allowed"),
        ('{"a": {"\\uDFFF": 1}}', 1, "surrogates not allowed"),
        (b'{"a": "\xff"}', 1, "not valid UTF-8: byte 0xff"),
        (f"{ONE}\n".encode("utf-16"), 1, "not valid UTF-8"),
        (ONE.encode() + b'\n{"a": "\xc3"}', 2, "not valid UTF-8: byte 0xc3"),
        (f"{ONE}\n3", 2, "expected an object with fields, found 3"),
        (f"{ONE}\n[1]", 2, "expected an object"),
        (f"{ONE}\n" + '{"a":' * 100_000, 2, "not valid JSON"),
        (f'{ONE}\n{{"a": {"9" * 5000}}}', 2, "not valid JSON"),
        (f"[{ONE},\n3]", 2, "expected an object"),
        (f"[{ONE},\n]", 2, "not valid JSON"),
        (f"[{ONE}\n{TWO}]", 1, "expected , or ] after this object"),
        (f"[\n{ONE}", 2, "expected , or ] after this object"),
        (f"[\n{ONE}]\n[{TWO}]", 2, "after the array"),
        ("[\n  {\n  'a': 1}]", 3, "not valid JSON"),
        (f'[\n{ONE},\n{{"a": 1, "a": 2}}]', 3, "'a' occurs twice"),
        (b'[\n\n{"a": "\xff"}]', 3, "not valid UTF-8"),
        ("[", 1, "not valid JSON"),
    ],
)
def test_bad_json_is_refused_with_its_line(tmp_path, content, line, what):
    path = write(tmp_path, "rows.jsonl", content)
    with pytest.raises(UserError) as caught:
        read(path)
    assert caught.value.where == f"{path}:{line}"
    assert what in caught.value.what
    assert "\x1b" not in str(caught.value)


def test_rows_before_a_bad_one_are_yielded(tmp_path):
    rows = read_rows(str(write(tmp_path, "rows.jsonl", f"{ONE}\n{{")), None)
    assert next(rows)[1] == ROWS[0]
    with pytest.raises(UserError):
        next(rows)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.json", ""), ("a.jsonl", "\n \r\n"), ("a.json", "\ufeff"), ("a.json", "[]"), ("a.jsonl", " [ \n] \n"), ("a.csv", ""), ("a.csv", "prompt,label\n\n")],
)
def test_an_empty_source_is_refused(tmp_path, name, content):
    with pytest.raises(UserError, match="no rows"):
        read(write(tmp_path, name, content))


def test_parquet_rows_are_numbered(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "a"}], "label": index % 2 == 0} for index in range(3000)]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=700)
    assert read(path) == [(f"{path}:row {index}", row) for index, row in enumerate(rows, start=1)]


def test_mixed_values_in_parquet_come_back_as_they_were(tmp_path):
    rows = [{"label": True, "messages": [{"role": "user", "content": "a"}]}, {"label": "yes", "messages": ["b", 1]}]
    mixed = datasets.Features({"label": datasets.Json(), "messages": datasets.List(datasets.Json())})
    datasets.Dataset.from_list(rows, features=mixed).to_parquet(tmp_path / "rows.parquet")
    assert [row for _, row in read(tmp_path / "rows.parquet")] == rows


def test_a_repeated_column_name_in_parquet_is_refused(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array([True]), pyarrow.array([False])], names=["label", "label"])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="column name occurs twice"):
        read(tmp_path / "rows.parquet")


def test_a_damaged_parquet_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read(write(tmp_path, "rows.parquet", "PAR1 and not much more PAR1"))


def test_a_parquet_file_without_rows_is_refused(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"a": pyarrow.array([], pyarrow.string())}), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="no rows"):
        read(tmp_path / "rows.parquet")


def test_csv_labels_become_bool_and_all_else_stays_text(tmp_path):
    long = "x" * 200_000
    labels = {"true": True, "True": True, "false": False, "False": False, "1": "1", "TRUE": "TRUE", " true": " true", "": None}
    content = "\ufeffprompt,completion,label\r\n" + "".join(f'true,"a\n""b"" {long}",{label}\r\n' for label in labels)
    path = write(tmp_path, "rows.csv", content)
    expected = [{"prompt": "true", "completion": f'a\n"b" {long}', "label": label} for label in labels.values()]
    assert read(path) == [(f"{path}:row {number}", row) for number, row in enumerate(expected, start=1)]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("a,b\n1,2\n3\n", "expected 2 cells as in the header, found 1"),
        ("a,b\n1,2,3\n", "expected 2 cells as in the header, found 3"),
        ("a,a\n1,2\n", "column name occurs twice"),
        ('a,b\n1,"2\n', "cannot be read: Error: 'unexpected end of data'"),
        ('a,b\n1,2\n1,"2"3\n', "rows.csv:row 1: Error"),
        (b"a,b\n1,\xff\n", "UnicodeDecodeError"),
    ],
)
def test_bad_csv_is_refused(tmp_path, content, what):
    with pytest.raises(UserError) as caught:
        read(write(tmp_path, "rows.csv", content))
    assert what in str(caught.value)


def test_a_saved_dataset_is_read(tmp_path):
    datasets.Dataset.from_list(ROWS, split="train").save_to_disk(tmp_path / "saved")
    expected = [(f"{tmp_path}/saved:row {number}", row) for number, row in enumerate(ROWS, start=1)]
    assert read(tmp_path / "saved") == read(tmp_path / "saved", "train") == expected
    with pytest.raises(UserError, match="without splits"):
        read(tmp_path / "saved", "test")


def test_the_split_of_a_saved_dataset_dict_is_chosen(tmp_path):
    one, two = (datasets.Dataset.from_list([row]) for row in ROWS)
    datasets.DatasetDict(train=one, test=two).save_to_disk(tmp_path / "both")
    datasets.DatasetDict(test=two).save_to_disk(tmp_path / "single")
    datasets.DatasetDict(a=one, b=two).save_to_disk(tmp_path / "unclear")
    chosen = [("both", None), ("both", "test"), ("single", None), ("unclear", "a")]
    assert [read(tmp_path / name, split)[0][1] for name, split in chosen] == [ROWS[0], ROWS[1], ROWS[1], ROWS[0]]
    for name, split in [("both", "dev"), ("unclear", None)]:
        with pytest.raises(UserError, match="no split .*\n.*set split to one of '") as caught:
            read(tmp_path / name, split)
        assert caught.value.where == str(tmp_path / name)


def test_a_damaged_saved_dataset_is_refused(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    for name in ("state.json", "data-00000-of-00001.arrow"):
        content = (tmp_path / "saved" / name).read_bytes()
        (tmp_path / "saved" / name).write_bytes(b"{}")
        with pytest.raises(UserError, match="cannot be read"):
            read(tmp_path / "saved")
        (tmp_path / "saved" / name).write_bytes(content)


def test_a_folder_of_data_files_is_read_like_a_hub_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "dataset"
    folder.mkdir()
    write(folder, "train.jsonl", ONE)
    write(folder, "test.jsonl", TWO)
    assert [read(folder), read(folder, "test")] == [[(f"{folder}:row 1", row)] for row in ROWS]
    with pytest.raises(UserError, match="cannot be read: .*dev"):
        read(folder, "dev")


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path)


@pytest.mark.parametrize("path", ["missing.jsonl", "data/missing.parquet", "/missing/folder", "./missing", "../missing", "", "a/b/c", "a b", "x\0y", "missing.txt"])
def test_a_missing_file_is_not_looked_for_on_the_hub(path):
    with pytest.raises(UserError, match="no such file or folder"):
        read(path)


@pytest.mark.parametrize(("name", "split", "what"), [("rows.txt", None, "unknown kind of file"), ("rows", None, "unknown kind"), ("rows.jsonl", "train", "no splits")])
def test_a_file_that_cannot_be_meant_is_refused(tmp_path, name, split, what):
    with pytest.raises(UserError, match=what):
        read(write(tmp_path, name, ONE), split)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_refused(tmp_path):
    path = write(tmp_path, "rows.jsonl", ONE)
    path.chmod(0)
    with pytest.raises(UserError, match="Permission denied"):
        read(path)
