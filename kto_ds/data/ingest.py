"""From blocks of raw rows to segments of tokens, in one process or several; what comes out does not depend on how many.

Two passes: `check_rows` decides by the schema alone, in seconds, whether the rows can be used; `tokenize_rows` then writes one segment a block.
"""

import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from kto_ds.data.segments import Limits, Row, fit, is_whole, load_notes, make_segment, save_segment
from kto_ds.data.tokenization import RowTokenizer, texts_of
from kto_ds.data.workers import Workers
from kto_ds.errors import UserError
from kto_ds.rows.records import Record, RowRules, to_records, unused_fields
from kto_ds.rows.sources import Block, read_blocks

# C0 and DEL without tab, line feed and carriage return.
CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
# A message names the first bad rows; the rest are counted.
NAMED_PROBLEMS = 5


class SourceFile(NamedTuple):
    """One file of one source, or one dataset of the hub."""

    path: str
    split: str | None
    rules: RowRules
    source: int  # index of the source in its split


class Problem(NamedTuple):
    """A row that cannot be used."""

    where: str
    what: str
    remedy: str
    text: str  # the row, as found


class Checked(NamedTuple):
    """What the schema says about some rows."""

    num_rows: int
    num_bad: int
    problems: list[Problem]  # the first NAMED_PROBLEMS of them


def check_rows(files: list[SourceFile], workers: Workers, on_rows: Callable[[int], None]) -> Checked:
    """Read and check every row without tokenizing any. Raises UserError for what no single row can be blamed for."""
    num_rows, num_bad, problems = 0, 0, []
    blocks = ((block, file.rules) for file in files for block in _blocks(file))
    for found in workers.map(check_block, blocks):
        num_rows += found.num_rows
        num_bad += found.num_bad
        problems += found.problems[: NAMED_PROBLEMS - len(problems)]
        on_rows(found.num_rows)
    return Checked(num_rows, num_bad, problems)


def check_block(_: RowTokenizer, block: Block, rules: RowRules) -> Checked:
    num_rows, num_bad, problems = 0, 0, []
    for number, _, records in _parse(block, rules):
        num_rows += 1
        if isinstance(records, UserError):
            num_bad += 1
            if len(problems) < NAMED_PROBLEMS:
                problems.append(_problem(block, number, records))
    return Checked(num_rows, num_bad, problems)


def refuse_bad_rows(problems: list[Problem], num_bad: int, num_rows: int, *, max_bad_fraction: float | None) -> None:
    """Raise UserError for the first bad row, with the count and the places of further ones."""
    first, *others = problems[:NAMED_PROBLEMS]
    what = first.what
    if num_bad > 1:
        further = num_bad - 1
        places = "".join(f"\n    {other.where}: {other.what}" for other in others)
        what += f"\n  {further:,} further {'row' if further == 1 else 'rows'} of {num_rows:,} cannot be used{', the next' if others else ''}:{places}"
    if max_bad_fraction is not None:
        what += f"\n  bad rows: {num_bad:,} of {num_rows:,}, more than data.max_bad_fraction allows, which is {max_bad_fraction:g}"
    raise UserError(what, where=first.where, remedy=first.remedy)


def tokenize_rows(files: list[SourceFile], folder: Path, limits: Limits, workers: Workers, on_rows: Callable[[int], None]) -> list[tuple[int, Path]]:
    """Write the segments of all files to `folder`, those apart that are there already; return (index of the file, segment) in order."""
    folder.mkdir(parents=True, exist_ok=True)
    segments: list[tuple[int, Path]] = []
    tasks = _missing(files, folder, limits, segments, on_rows)
    for num_rows in workers.map(tokenize_block, tasks):
        on_rows(num_rows)
    return segments


def _missing(files: list[SourceFile], folder: Path, limits: Limits, segments: list[tuple[int, Path]], on_rows: Callable[[int], None]) -> Iterator[tuple]:
    """Yield the tasks whose segment is not there, and note every segment's name on the way."""
    for index, file in enumerate(files):
        for block in _blocks(file):
            path = folder / f"{len(segments):06d}.npz"
            segments.append((index, path))
            if is_whole(path):
                on_rows(load_notes(path)["rows"])
            else:
                yield block, file.rules, limits, path


def tokenize_block(row_tokenizer: RowTokenizer, block: Block, rules: RowRules, limits: Limits, path: Path) -> int:
    """Write the segment of a block and return the number of its rows."""
    num_rows, problems, rows, unused = 0, [], [], set()
    pending: list[tuple[int, Record]] = []
    for number, row, records in _parse(block, rules):
        num_rows += 1
        if isinstance(records, UserError):
            problems.append((number, records))
        else:
            unused |= unused_fields(row, rules)
            pending += [(number, record) for record in records]
    # Batches keep the Rust tokenizer busy; smaller ones keep the memory of long rows within bounds.
    for batch in _batches(pending, size=250):
        for (number, record), tokens in zip(batch, row_tokenizer.tokenize([record for _, record in batch])):
            if isinstance(tokens, UserError):
                problems.append((number, tokens))
            else:
                rows.append(Row(tokens, number, record.desirable, _has_control_characters(record)))
    if limits.truncation_mode == "error":
        remedy = "shorten the row, raise the limit, or choose another data.truncation_mode"
        problems += [(row.number, UserError(found, remedy=remedy)) for row in rows if isinstance(found := fit(row.tokens, limits), str)]
    bad = {number for number, _ in problems}  # none of its records is used when one of them cannot be
    segment, unfit = make_segment([row for row in rows if row.number not in bad], limits)
    problem_of = {number: problem for number, problem in reversed(problems)}  # the first one of each row
    notes = {
        "place": block.place,
        "rows": num_rows,
        "examples": len(segment.row_of),
        "unused": sorted(unused),
        "largest_id": int(max(segment.prompt_tokens.max(initial=0), segment.completion_tokens.max(initial=0))),
        "bad": [_problem(block, number, problem) for number, problem in sorted(problem_of.items(), key=lambda item: item[0])],
        "dropped": [(f"{block.place}{number}", reason) for number, reason in unfit],
    }
    save_segment(path, segment, notes)
    return num_rows


class Summary(NamedTuple):
    """What the notes of some segments come to."""

    num_rows: int
    num_bad: int
    problems: list[Problem]  # the first NAMED_PROBLEMS of them
    num_examples: int
    num_dropped: int
    first_dropped: tuple[str, str] | None  # (place, reason)
    largest_id: int
    unused: set[str]  # columns that no rule reads
    places: dict[int, str]  # by file, what stands before a row's number
    by_source: dict[int, dict[str, int]]  # rows, rejected_rows, dropped_examples


def summarize(files: list[SourceFile], segments: list[tuple[int, Path]]) -> Summary:
    """Read the notes of all segments once, and hold no more of them than this."""
    problems, first_dropped, largest_id, num_examples = [], None, 0, 0
    unused: set[str] = set()
    places: dict[int, str] = {}
    by_source = {file.source: {"rows": 0, "rejected_rows": 0, "dropped_examples": 0} for file in files}
    for file, path in segments:
        note, counts = load_notes(path), by_source[files[file].source]
        counts["rows"] += note["rows"]
        counts["rejected_rows"] += len(note["bad"])
        counts["dropped_examples"] += len(note["dropped"])
        problems += [Problem(*problem) for problem in note["bad"][: NAMED_PROBLEMS - len(problems)]]
        first_dropped = first_dropped or next(iter(note["dropped"]), None)
        largest_id, num_examples = max(largest_id, note["largest_id"]), num_examples + note["examples"]
        unused.update(note["unused"])
        places[file] = note["place"]
    totals = {key: sum(counts[key] for counts in by_source.values()) for key in ("rows", "rejected_rows", "dropped_examples")}
    return Summary(
        totals["rows"], totals["rejected_rows"], problems, num_examples, totals["dropped_examples"], first_dropped, largest_id, unused, places, by_source
    )


def rejected_rows(segments: list[tuple[int, Path]]) -> Iterator[dict]:
    """Yield what is to be written down of every row that was refused, and of every example that was dropped."""
    for _, path in segments:
        note = load_notes(path)
        for problem in map(Problem._make, note["bad"]):
            yield {"where": problem.where, "reason": problem.what, "row": problem.text}
        for where, reason in note["dropped"]:
            yield {"where": where, "reason": reason}


def _blocks(file: SourceFile) -> Iterator[Block]:
    return read_blocks(file.path, file.split, label_fields=file.rules.boolean_columns)


def _parse(block: Block, rules: RowRules) -> Iterator[tuple[int, dict, list[Record] | UserError]]:
    """Yield (number, row, its records or why it has none)."""
    for number, row in block.rows():
        if isinstance(row, UserError):
            yield number, {}, row
            continue
        try:
            yield number, row, to_records(row, f"{block.place}{number}", rules)
        except UserError as error:
            yield number, row, error


def _problem(block: Block, number: int, error: UserError) -> Problem:
    return Problem(f"{block.place}{number}", error.what, error.remedy, block.text(number))


def _batches(items: list, size: int) -> Iterator[list]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _has_control_characters(record: Record) -> bool:
    return any(CONTROL_CHARACTERS.search(text) for text in texts_of(record))
