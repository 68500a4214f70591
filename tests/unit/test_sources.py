import csv
import gzip
import io
import json
import os
import pickle
from functools import partial

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from kto_ds.errors import UserError
from kto_ds.rows.blocks import MAX_BLOCK_BYTES, MAX_BLOCK_ROWS, MAX_ROW_BYTES, MAX_TEXT
from kto_ds.rows.json_rows import read_json_blocks
from kto_ds.rows.sources import list_files, read_blocks

ROWS = [{"prompt": "a", "completion": "ü\u2028b", "label": True}, {"prompt": "c", "completion": "d", "label": False}]
ONE, TWO = (json.dumps(row, ensure_ascii=False) for row in ROWS)
# What a worker process gets.
BLOCK_FOLDED = [lambda block: block, lambda block: pickle.loads(pickle.dumps(block))]


def read_all(path, split=None, *, fold=lambda block: block, **options):
    """Return (where, row or error) of every row."""
    found = []
    for block in map(fold, read_blocks(str(path), split, **options)):
        rows = list(block.rows())
        assert len(rows) <= block.num_rows <= MAX_BLOCK_ROWS
        found += [(f"{block.place}{number}", row) for number, row in rows]
    assert all(row.where == where and row.remedy for where, row in found if isinstance(row, UserError))
    return found


def read(path, split=None, **options):
    """Return (where, row) of every row; raise the first error."""
    found = read_all(path, split, **options)
    for _, row in found:
        if isinstance(row, UserError):
            raise row
    return found


def text_of(path, number):
    [block] = read_blocks(str(path), None)
    return block.text(number)


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(packed(name, content if isinstance(content, bytes) else content.encode()))
    return path


def packed(name, content):
    if name.endswith(".gz"):
        return gzip.compress(content)
    if name.endswith(".zst"):
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(content)
        return sink.getvalue().to_pybytes()
    return content


# json


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.JSONL", "rows.jsonl.gz", "rows.json.zst"])
@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (f"{ONE}\n{TWO}\n", (1, 2)),
        (f"{ONE}\n{TWO}", (1, 2)),
        (f"\n{ONE}\r\n  \r\n{TWO}\r\n\r\n", (2, 4)),
        (f"\ufeff{ONE}\n{TWO}\n", (1, 2)),
        (f"[{ONE}, {TWO}]", ("row 1", "row 2")),
        (f"[\n{ONE}, {TWO}]\n", ("row 1", "row 2")),
        (f"[{ONE}\n,{TWO}]\n", (1, 2)),
        (f"\ufeff \n[\n {ONE},\n\n {TWO}\n]\n", (3, 5)),
        (json.dumps(ROWS, indent=2), (2, 7)),
        (f"{ONE}\n{json.dumps(ROWS[1])}", (1, 2)),
    ],
)
def test_json_is_read_in_every_layout(tmp_path, name, content, lines):
    path = write(tmp_path, name, content)
    for fold in BLOCK_FOLDED:
        assert read(path, fold=fold) == [(f"{path}:{line}", row) for line, row in zip(lines, ROWS)]


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
        (ONE.encode() + b'\n{"a": "\xc3"}', 2, "not valid UTF-8: byte 0xc3"),
        (f"{ONE}\n3", 2, "expected an object with fields, found 3"),
        (f"{ONE}\n[1]", 2, "expected an object"),
        (f"{ONE}\n" + '{"a":' * 100_000, 2, "not valid JSON"),
        (f'{ONE}\n{{"a": {"9" * 5000}}}', 2, "not valid JSON"),
        (f"[{ONE},\n3]", 2, "expected an object"),
        (f"[{ONE},\n]", 2, "not valid JSON"),
        (f"[{ONE}\n{TWO}]", 1, "expected , or ] after this row, found '{"),
        (f"[{ONE},\n,{TWO}]", 2, "expected a row, found ',"),
        (f"[{ONE},\n}}]", 2, "expected a row, found '}"),
        (f"[{ONE},\n", 2, "expected a row, found the end"),
        (f"[{ONE},\n{TWO[:-1]}", 2, "the file ends within this row"),
        (f"[{ONE},\n{TWO[:20]}", 2, "the file ends within this row"),
        (f"[{ONE},\nnull", 2, "expected , or ] after this row, found the end"),
        (f"[\n{ONE}", 2, "expected , or ] after this row"),
        (f"[\n{ONE}]\n[{TWO}]", 2, "after the array"),
        ("[\n  {\n  'a': 1}]", 2, "at column 3 of its line 2"),
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


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (b"{'a': 1}", "Expecting property name"),
        (b'{"a": "b\tc"}', "Invalid control character"),
        (b'{"a": 1, "a": 2}', "occurs twice"),
        (b'{"label": NaN}', "NaN is not"),
        (b'{"a": "\\uDead"}', "surrogates not allowed"),
        (b'{"a": "\xff"}', "byte 0xff"),
        (b"[1]", "expected an object"),
        (b"null", "expected an object"),
        (b'"a, \\" ] b"', "expected an object"),
        (b"bare words", "Expecting value"),
        (b'{"a": [1, {"b": "}]"}], "c": 0 0}', "delimiter"),
        (b'{"a":' * 2000 + b"1" + b"}" * 2000, "recursion"),
        (b"[" * 2000 + b"]" * 2000, "recursion"),
        (b'{"a": ' + b"9" * 5000 + b"}", "4300 digits"),
    ],
)
@pytest.mark.parametrize("is_array", [False, True])
def test_rows_around_a_bad_one_are_read(tmp_path, is_array, bad, what):
    one, two = ONE.encode(), TWO.encode()
    path = write(tmp_path, "rows.json", b"[\n" + b",\n".join([one, bad, two]) + b"\n]" if is_array else b"\n" + b"\n".join([one, bad, two]))
    for fold in BLOCK_FOLDED:
        (first, second, third) = read_all(path, fold=fold)
        assert [first, third] == [(f"{path}:2", ROWS[0]), (f"{path}:4", ROWS[1])]
        assert second[0] == f"{path}:3" and what in second[1].what
        assert str(pickle.loads(pickle.dumps(second[1]))) == str(second[1])
    assert text_of(path, 3) == bad.decode(errors="replace")[:MAX_TEXT]
    assert text_of(path, 4) == TWO


class Dribble(io.BytesIO):
    """Gives a few bytes a read, so that every place of a row is once where more must be read."""

    def __init__(self, content, at_most):
        super().__init__(content)
        self.at_most = at_most

    def read(self, size=-1):
        return super().read(min(size, self.at_most))


@pytest.mark.parametrize("at_most", [3, 4, 5, 7, 64])
def test_an_array_may_be_cut_anywhere_while_it_is_read(at_most):
    rows = [{"a\\": 'x\\"]},{["', "b": [[], {}, [{"c": "\\\\"}]], "ü": "\n\u2028\U0001f600"}, {}, {"a": ""}, {"a": -1.5e3, "b": None}]
    for content, place in [(json.dumps(rows, ensure_ascii=False), "a:row "), (json.dumps(rows, indent=1), "a:"), ("\ufeff[{}]", "a:"), ("[]", None)]:
        blocks = list(read_json_blocks(lambda: Dribble(content.encode(), at_most), "a"))
        assert [row for block in blocks for _, row in block.rows()] == json.loads(content.removeprefix("\ufeff"))
        assert {block.place for block in blocks} == ({place} if place else set())


@pytest.mark.parametrize("at_most", [3, 4, 5, 7, 64])
@pytest.mark.parametrize("element", ['"a, {}, b"', '"a] b"', '"a {[ b"', '"a \\", b"', "-1.5e3", "null", '{"a": "b"}', '["a", 1]'])
def test_what_is_no_row_may_be_cut_anywhere_too(at_most, element):
    content = f'["a", {element}, {{"c": "d"}}]'.encode()
    blocks = list(read_json_blocks(lambda: Dribble(content, at_most), "a"))
    assert [part for block in blocks for part in block.raw] == [(1, b'"a"'), (2, element.encode()), (3, b'{"c": "d"}')]


def test_escaped_characters_beyond_16_bits_are_read(tmp_path):
    path = write(tmp_path, "rows.jsonl", json.dumps({"a": "\U0001f600\\ud83d"}))
    assert read(path) == [(f"{path}:1", {"a": "\U0001f600\\ud83d"})]


@pytest.mark.parametrize("layout", ["lines", "array over lines", "array on one line"])
def test_long_files_are_cut_into_bounded_blocks(tmp_path, layout):
    rows = [{"prompt": "x{[\\\"" * (index % 7), "completion": "y" * (5_000_000 if index in (1500, 1501) else 3000), "label": index % 3 == 0} for index in range(3000)]
    lines = [json.dumps(row) for row in rows]
    between, around = {"lines": ("\n", "{}"), "array over lines": (",\n", "[{}]"), "array on one line": (", ", "[{}]\n")}[layout]
    path = write(tmp_path, "rows.json", around.replace("{}", between.join(lines)))
    blocks = list(read_blocks(str(path), None))
    place = f"{path}:row " if layout == "array on one line" else f"{path}:"
    assert {block.place for block in blocks} == {place}
    assert [row for block in blocks for row in block.rows()] == list(enumerate(rows, start=1))
    sizes = [(block.num_rows, sum(len(content) for _, content in block.raw)) for block in blocks]
    assert [size for size in sizes if size[1] > MAX_BLOCK_BYTES] == [(1, size) for _, size in sizes if size > 5_000_000]
    assert max(sizes)[0] == MAX_BLOCK_ROWS and sum(size > 5_000_000 for _, size in sizes) == 2
    [long] = [block for block in blocks if block.raw[0][0] == 1501]
    assert long.text(1501) == lines[1500][:MAX_TEXT]


def test_rows_that_begin_to_share_lines_are_refused(tmp_path):
    lines = [ONE] * 2500
    path = write(tmp_path, "rows.json", "[" + ",\n".join([*lines, f"{ONE}, {TWO}"]) + "]")
    with pytest.raises(UserError, match="rows share a line") as caught:
        read(path)
    assert caught.value.remedy


@pytest.mark.parametrize("opening", [b'{"a": "', b'[{"a": "', b"[9", b'[{"a": [1, '])
def test_a_row_over_the_limit_is_refused_unread(tmp_path, opening):
    path = write(tmp_path, "rows.jsonl.zst", b"\n" + opening + b" " * (2 * MAX_ROW_BYTES + 5))
    with pytest.raises(UserError, match="longer than 64 MiB") as caught:
        read(path)
    assert caught.value.where == f"{path}:2" and caught.value.remedy


def test_lines_after_one_over_the_limit_are_read(tmp_path):
    path = write(tmp_path, "rows.jsonl", b'{"a": "' + b"x" * (MAX_ROW_BYTES + 2**21) + b'"}\n' + ONE.encode())
    first, second = read_all(path)
    assert first[0] == f"{path}:1" and "longer than 64 MiB" in first[1].what
    assert second == (f"{path}:2", ROWS[0])


# any text file


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.json", ""), ("a.jsonl", "\n \r\n"), ("a.json", "\ufeff"), ("a.json", "[]"), ("a.jsonl", " [ \n] \n"), ("a.csv", ""), ("a.csv", "prompt,label\n\n")],
)
def test_an_empty_source_is_refused(tmp_path, name, content):
    with pytest.raises(UserError, match="no rows"):
        read(write(tmp_path, name, content))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_a_damaged_compressed_file_is_refused(tmp_path, name, suffix):
    rows = [{"prompt": os.urandom(300).hex(), "completion": "b", "label": True} for _ in range(4000)]
    content = json.dumps(rows, indent=1) if name.endswith(".json") else "\n".join(map(json.dumps, rows))
    if name.endswith(".csv"):
        content = "prompt,label\n" + "".join(f"{row['prompt']},true\n" for row in rows)
    path = write(tmp_path, name + suffix, content)
    assert len(read(path)) == 4000
    whole = path.read_bytes()
    middle = len(whole) // 2
    for damaged in (whole[:middle], whole[:-2], b"{}" + whole, whole + b"{}"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be read") as caught:
            read(path)
        assert caught.value.where == str(path) and "whole" in caught.value.remedy
    if suffix == ".gz":  # zst has a checksum only if it is asked for
        path.write_bytes(whole[:middle] + b"\xff" * 90 + whole[middle + 90 :])
        with pytest.raises(UserError) as caught:
            read(path)
        assert caught.value.where.startswith(str(path))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.json.gz"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_named(tmp_path, name, encoding):
    with pytest.raises(UserError, match="looks like UTF-16\n.*UTF-8") as caught:
        read(write(tmp_path, name, f"{ONE}\n".encode(encoding)))
    assert caught.value.where == str(tmp_path / name)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_must_say_so(tmp_path, suffix):
    path = write(tmp_path, "rows.jsonl", packed(suffix, ONE.encode()))
    with pytest.raises(UserError, match=f"compressed.*\n.*name it 'rows.jsonl{suffix}'"):
        read(path)


# parquet and arrow


def test_parquet_rows_are_numbered(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "a"}], "label": index % 2 == 0} for index in range(3000)]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=700)
    for fold in BLOCK_FOLDED:
        assert read(path, fold=fold) == [(f"{path}:row {index}", row) for index, row in enumerate(rows, start=1)]


@pytest.mark.parametrize("form", ["parquet", "arrow file", "arrow stream", "dataset"])
def test_columns_are_cut_into_bounded_blocks(tmp_path, form):
    rows = [{"prompt": "x", "completion": str(index) * (800_000 if index % 1000 > 990 else 10)} for index in range(2500)]
    table, path = pyarrow.Table.from_pylist(rows), tmp_path / "rows.arrow"
    if form == "parquet":
        path = tmp_path / "rows.parquet"
        pyarrow.parquet.write_table(table, path)
    elif form == "dataset":
        path = tmp_path / "saved"
        datasets.Dataset(table).select(range(2500)).save_to_disk(path)
    else:
        with (pyarrow.ipc.new_file if form == "arrow file" else pyarrow.ipc.new_stream)(path, table.schema) as writer:
            writer.write_table(table)
    blocks = list(read_blocks(str(path), None))
    assert [row for block in blocks for row in block.rows()] == list(enumerate(rows, start=1))
    assert {block.place for block in blocks} == {f"{path}:row "}
    assert all(len(pickle.dumps(block)) < MAX_BLOCK_BYTES + 20_000 for block in blocks)
    assert len(blocks) < 100
    last = blocks[-1]
    assert json.loads(last.text(2500)) == rows[-1]
    [long] = [block for block in blocks if block.first <= 992 < block.first + block.num_rows]
    assert len(long.text(992)) == MAX_TEXT


def test_values_that_no_row_can_hold_are_errors_of_their_rows(tmp_path):
    broken = pyarrow.Array.from_buffers(pyarrow.string(), 3, [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\3\0\0\0\4\0\0\0"), pyarrow.py_buffer(b"ab\xffc")])
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": broken}), path)
    for fold in BLOCK_FOLDED:
        first, second, third = read_all(path, fold=fold)
        assert [first, third] == [(f"{path}:row 1", {"prompt": "a"}), (f"{path}:row 3", {"prompt": "c"})]
        assert "cannot be decoded: UnicodeDecodeError" in second[1].what
    assert "0xff" in text_of(path, 2)


def test_mixed_values_in_parquet_come_back_as_they_were(tmp_path):
    rows = [{"label": True, "messages": [{"role": "user", "content": "a"}]}, {"label": "yes", "messages": ["b", 1]}]
    mixed = datasets.Features({"label": datasets.Json(), "messages": datasets.List(datasets.Json())})
    datasets.Dataset.from_list(rows, features=mixed).to_parquet(tmp_path / "rows.parquet")
    assert [row for _, row in read(tmp_path / "rows.parquet")] == rows


def test_tables_give_back_rows_without_the_nulls_they_fill_in(tmp_path):
    rows = [{"messages": [{"role": "user", "extra": [{"a": {"b": 0}}]}], "label": True}, {"messages": [{"role": "tool", "name": "f", "extra": [{"a": {"c": [None, 1]}}]}]}]
    filled = [rows[0], rows[1] | {"label": None}]  # a cell of its own that is null says that the row lacks it
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(filled), tmp_path / "rows.parquet")
    for path in (tmp_path / "saved", tmp_path / "rows.parquet"):
        assert [row for _, row in read(path)] == filled
    nulls = {"messages": [{"role": "user", "content": None, "extra": {"a": None}}]}
    assert read(write(tmp_path, "rows.jsonl", json.dumps(nulls)))[0][1] == nulls


def test_json_text_in_tables_keeps_its_nulls(tmp_path):
    mixed = datasets.Features({"tools": datasets.List({"name": datasets.Value("string"), "parameters": datasets.Json()})})
    rows = [{"tools": [{"name": "f", "parameters": {"until": None, "enum": [None, 1]}}]}, {"tools": [{"name": "g", "parameters": None}]}]
    datasets.Dataset.from_list(rows, features=mixed).to_parquet(tmp_path / "rows.parquet")
    assert [row for _, row in read(tmp_path / "rows.parquet")] == [rows[0], {"tools": [{"name": "g"}]}]


@pytest.mark.parametrize("feature", [datasets.Image(), datasets.Audio(), datasets.Video(), datasets.Pdf()], ids=lambda feature: type(feature).__name__)
def test_no_file_that_a_table_names_is_opened(tmp_path, feature):
    secret = write(tmp_path, "secret.txt", "no image at all")
    media = [{"bytes": None, "path": str(secret)}, {"bytes": b"broken", "path": None}, {"bytes": None, "path": f"{tmp_path}/missing.png"}]
    types = {"prompt": datasets.Value("string"), "picture": feature, "pages": datasets.List({"page": feature})}
    stored = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    columns = [pyarrow.array(["a", "b", "c"]), pyarrow.array(media, stored), pyarrow.array([[{"page": page}] for page in media], pyarrow.list_(pyarrow.struct({"page": stored})))]
    path = tmp_path / "rows.parquet"
    schema = datasets.Features(types).arrow_schema
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, schema=schema), path)
    [block] = read_blocks(str(path), None)
    assert block.features == datasets.Features(types)
    found = [row for _, row in read(path)]
    assert found == [{"prompt": prompt, "picture": image, "pages": [{"page": image}]} for prompt, image in zip("abc", media)]
    assert "no image" not in block.text(1)


@pytest.mark.parametrize("nested", [False, True])
def test_a_text_that_all_rows_of_parquet_share_is_not_held_for_each(tmp_path, nested):
    """The file has it once: how much the rows are is known only when they are read."""
    text = "x" * 2**20
    rows = [{"id": str(index), "prompt": [{"content": text}] if nested else text} for index in range(300)]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert path.stat().st_size < 2**20
    default = pyarrow.default_memory_pool()
    pool = pyarrow.proxy_memory_pool(default)
    pyarrow.set_memory_pool(pool)
    try:
        sizes = [block.num_rows for block in read_blocks(str(path), None)]
    finally:
        pyarrow.set_memory_pool(default)
    assert 2**20 < pool.max_memory() < 100 * 2**20
    assert sum(sizes) == 300 and max(sizes) <= 4
    assert sizes == [block.num_rows for block in read_blocks(str(path), None)]


@pytest.mark.parametrize("rows_in_group", [1, 30, 5000])
def test_blocks_of_parquet_are_full_however_it_was_written(tmp_path, rows_in_group):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"] * 2500}), path, row_group_size=rows_in_group)
    assert max(block.num_rows for block in read_blocks(str(path), None)) == 1000
    assert [number for number, _ in (row for block in read_blocks(str(path), None) for row in block.rows())] == list(range(1, 2501))


def test_a_repeated_column_name_in_parquet_is_refused(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array([True]), pyarrow.array([False])], names=["label", "label"])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="column name occurs twice"):
        read(tmp_path / "rows.parquet")


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
@pytest.mark.parametrize("content", ["", "PAR1 and not much more PAR1", "ARROW1 and not much more ARROW1"])
def test_a_damaged_file_of_columns_is_refused(tmp_path, name, content):
    with pytest.raises(UserError, match="cannot be read") as caught:
        read(write(tmp_path, name, content))
    assert caught.value.where == str(tmp_path / name) and "whole" in caught.value.remedy


def test_a_parquet_file_cut_short_is_refused(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"a": [os.urandom(50).hex() for _ in range(5000)]}), path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:1000] + b"\0" * 3000 + whole[4000:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be read"):
            read(path)


def test_a_parquet_file_without_rows_is_refused(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"a": pyarrow.array([], pyarrow.string())}), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="no rows"):
        read(tmp_path / "rows.parquet")


# csv


@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz", "rows.csv.zst"])
def test_csv_labels_become_bool_and_all_else_stays_text(tmp_path, name):
    long = "x" * 200_000
    labels = {"true": True, "True": True, "false": False, "False": False, "TRUE": True, "FALSE": False, "1": "1", "tRUE": "tRUE", " true": " true", "": None}
    content = "\ufeffprompt,completion,label\r\n" + "".join(f'true,"a\n""b""\0 {long}",{label}\r\n' for label in labels)
    path = write(tmp_path, name, content)
    expected = [{"prompt": "true", "completion": f'a\n"b"\0 {long}', "label": label} for label in labels.values()]
    for fold in BLOCK_FOLDED:
        assert read(path, fold=fold) == [(f"{path}:row {number}", row) for number, row in enumerate(expected, start=1)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"label": True, "kto_tag": False, "good": "True"}),
        ({"label_fields": ("good",)}, {"label": "true", "kto_tag": "FALSE", "good": True}),
        ({"label_fields": ()}, {"label": "true", "kto_tag": "FALSE", "good": "True"}),
    ],
)
def test_the_label_fields_of_csv_can_be_chosen(tmp_path, options, expected):
    path = write(tmp_path, "rows.csv", "label,kto_tag,good\ntrue,FALSE,True\n")
    assert read(path, **options)[0][1] == expected


def test_rows_around_a_bad_one_in_csv_are_read(tmp_path):
    path = write(tmp_path, "rows.csv", b'a,b\n1,2\n\n"x\ny"\n1,2,3\n1,\xff\n3,"4, ""5"""\n')
    for fold in BLOCK_FOLDED:
        found = [row for _, row in read_all(path, fold=fold)]
        assert [found[0], found[4]] == [{"a": "1", "b": "2"}, {"a": "3", "b": '4, "5"'}]
        whats = ["expected 2 cells as in the header, found 1: ['x\\ny']", "expected 2 cells as in the header, found 3", "not valid UTF-8: byte 0xff"]
        assert all(what in error.what for what, error in zip(whats, found[1:4], strict=True))
    assert [text_of(path, number) for number in (2, 4, 5)] == ['"x\ny"', "1,?", '3,"4, ""5"""']


def test_csv_is_cut_into_bounded_blocks(tmp_path):
    rows = [{"a": str(index), "b": "é" * (100_000 if 1200 < index < 1300 else 5)} for index in range(2500)]
    text = io.StringIO()
    writer = csv.DictWriter(text, ["a", "b"])
    writer.writeheader()
    writer.writerows(rows)
    blocks = list(read_blocks(str(write(tmp_path, "rows.csv", text.getvalue())), None))
    assert [row for block in blocks for row in block.rows()] == list(enumerate(rows, start=1))
    assert blocks[0].num_rows == 1000 and len(blocks) > 4
    assert all(sum(len(cell) for cells in block.cells for cell in cells) <= MAX_BLOCK_BYTES for block in blocks)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("a,a\n1,2\n", "column name occurs twice"),
        ('a,b\n1,"2\n', "not valid CSV after the header: unexpected end of data"),
        ('a,b\n1,2\n1,"2"3\n', "not valid CSV after row 1: ',' expected"),
        ('a,"b"c\n1,2\n', "not valid CSV in the header: ',' expected"),
        ('a,b\n1,2\n1,"' + "2" * (MAX_ROW_BYTES // 2) + "\n" + "2" * (MAX_ROW_BYTES // 2 + 1), "larger than field limit"),
        ("a,b\n" + "2" * (MAX_ROW_BYTES + 1), "rows.csv:2: a row is longer than 64 MiB"),
        ("a;b\n1;2\n", "looks separated by ';': the header is one cell, 'a;b'"),
        ("a\tb\n1\t2\n", "looks separated by '\\t'"),
    ],
    ids=range(8),
)
def test_bad_csv_is_refused(tmp_path, content, what):
    with pytest.raises(UserError) as caught:
        read(write(tmp_path, "rows.csv", content))
    assert what in str(caught.value) and caught.value.remedy


# datasets


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


@pytest.mark.parametrize(("names", "split", "pattern"), [
    (["rows.jsonl"], None, "*.jsonl"),
    (["b.json.GZ"], None, "*.json.GZ"),
    (["data/test-0.parquet", "data/train-0.parquet"], None, "data/*train*.parquet"),
    (["test.jsonl", "test_prefs.jsonl", "train.jsonl"], "test_prefs", "*test_prefs*.jsonl"),
    (["constraint.jsonl", "test.jsonl"], None, "*.jsonl"),
])  # fmt: skip
def test_a_folder_of_data_files_wants_a_glob(tmp_path, names, split, pattern):
    """One that takes rows of no other split, where the names of the files tell."""
    (tmp_path / "data").mkdir()
    write(tmp_path, "README.md", "")
    for name in names:
        write(tmp_path, name, ONE)
    for use in (partial(read, split=split), lambda path: list_files(str(path), split)):
        with pytest.raises(UserError, match="not saved by datasets") as caught:
            use(tmp_path)
        assert f"'{tmp_path}/{pattern}'" in caught.value.remedy


def test_a_folder_without_data_is_refused(tmp_path):
    with pytest.raises(UserError, match="neither a saved dataset nor data files"):
        read(tmp_path)


# paths


def test_a_glob_gives_its_files_sorted(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "deep/er/c.jsonl", "d.txt", "[x].jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path, name, ONE)
    (tmp_path / "e.jsonl").mkdir()
    expected = {
        "*.jsonl": ["[x].jsonl", "a.jsonl", "b.jsonl"],
        "**/*.jsonl": ["[x].jsonl", "a.jsonl", "b.jsonl", "deep/er/c.jsonl"],
        "[x].jsonl": ["[x].jsonl"],
        "[ab].json?": ["a.jsonl", "b.jsonl"],
    }
    for pattern, names in expected.items():
        assert list_files(f"{tmp_path}/{pattern}", None) == [f"{tmp_path}/{name}" for name in names]


def test_a_plain_source_gives_itself(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    for path, split in [(str(write(tmp_path, "a.json", ONE)), None), (f"{tmp_path}/saved", "train"), ("someone/some-data", "test"), ("imdb", None)]:
        assert list_files(path, split) == [path]


@pytest.mark.parametrize(("pattern", "split", "what"), [("*.csv", None, "no file fits"), ("*", None, "unknown kind of file"), ("*.jsonl", "train", "no splits")])
def test_a_glob_that_cannot_be_meant_is_refused(tmp_path, pattern, split, what):
    write(tmp_path, "a.jsonl", ONE)
    write(tmp_path, "b.md", "")
    with pytest.raises(UserError, match=what) as caught:
        list_files(f"{tmp_path}/{pattern}", split)
    assert caught.value.remedy


@pytest.mark.parametrize("path", ["org/*", "missing*", "a?b", "**"])
def test_a_glob_does_not_reach_the_hub(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no file fits this pattern"):
        list_files(path, None)
    with pytest.raises(UserError, match="no such file or folder"):
        read(path)


@pytest.mark.parametrize(
    "path",
    ["missing.jsonl", "data/missing.parquet", "/missing/folder", "./missing", "../missing", "", "a/b/c", "a b", "x\0y"]
    + ["missing.txt", "org/missing.jsonl.gz", "org/missing.TSV"],
)
def test_a_missing_file_is_not_looked_for_on_the_hub(path):
    for use in (read, lambda path: list_files(path, None)):
        with pytest.raises(UserError, match="no such file or folder"):
            use(path)


@pytest.mark.parametrize(
    ("name", "split", "what"),
    [("rows.jsonl", "train", "no splits")] + [(name, None, "unknown kind of file") for name in ("rows.txt", "rows", "rows.parquet.gz", ".gz")],
)
def test_a_file_that_cannot_be_meant_is_refused(tmp_path, name, split, what):
    with pytest.raises(UserError, match=what):
        read(write(tmp_path, name, ONE), split)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_refused(tmp_path):
    path = write(tmp_path, "rows.jsonl", ONE)
    path.chmod(0)
    with pytest.raises(UserError, match="Permission denied"):
        read(path)
