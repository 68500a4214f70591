"""The table of faults: what was noted is added up, what was not run says so, and nothing else of the page changes."""

import json

import pytest

from tests.distributed.runs import ROOT
from tests.faults.ledger import record, tally
from tests.faults.table import BEGIN, END, ROWS, main, put_in, rows_of
from tests.faults.test_mutations import MUTANTS


def test_entries_become_rows(tmp_path, monkeypatch):
    ledger, page = tmp_path / "ledger.jsonl", tmp_path / "page.md"
    monkeypatch.setenv("KTO_FAULT_LEDGER", str(ledger))
    record("R3", "random kills", injected=1000, survived=999, seconds=60.25)
    record("R3", "random kills", injected=8, survived=8, seconds=2)
    record("R9", "a | full disk", injected=3, survived=3, seconds=1, stock="dies")
    page.write_text(f"before\n{BEGIN}\na former one\n{END}\nafter\n")
    main(ledger, page)
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n") and text.endswith(f"{END}\nafter\n") and "a former one" not in text
    assert "| R3 | kill -9 of training at random moments | random kills | 1,008 | 1,007 | 62 | as R2 |" in text
    [full] = [line for line in text.splitlines() if line.startswith("| R9 ")]
    assert "a / full disk | 3 | 3 | 1 |" in full and full.endswith("; dies |")
    assert text.count("not run") == len(ROWS) - 2 and "deepspeed 0." in text
    main(ledger, page)
    assert page.read_text() == text, "written twice, it is the same"


def test_a_failure_is_noted_too(tmp_path, monkeypatch):
    monkeypatch.setenv("KTO_FAULT_LEDGER", str(tmp_path / "ledger"))
    with pytest.raises(ZeroDivisionError), tally("R2", "kills") as counts:
        counts.injected += 1
        1 / 0
    with tally("R2", "nothing"):
        pass
    [entry] = map(json.loads, (tmp_path / "ledger").read_text().splitlines())
    assert (entry["injected"], entry["survived"], entry["method"]) == (1, 0, "kills")


def test_without_a_ledger_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.delenv("KTO_FAULT_LEDGER", raising=False)
    monkeypatch.chdir(tmp_path)
    record("R2", "kills", injected=1, survived=1, seconds=1)
    assert not list(tmp_path.iterdir())


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match="no row for R99"):
        rows_of([{"id": "R99", "method": "", "injected": 1, "survived": 1, "seconds": 1, "stock": ""}])
    for page in ("", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}\n{BEGIN}\n{END}"):
        with pytest.raises(ValueError, match="needs one line"):
            put_in(page, [])


def test_the_page_has_a_place_for_the_table_and_all_its_rows():
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert put_in(page, []) != page
    between = page[page.index(BEGIN) : page.index(END)]
    assert [row.fault_id for row in ROWS] == [line.split("|")[1].strip() for line in between.splitlines() if line.startswith("| R")]


@pytest.mark.parametrize("name", MUTANTS)
def test_every_safeguard_is_where_its_mutant_looks_for_it(name):
    mutant = MUTANTS[name]
    found = (ROOT / "kto_ds" / mutant.file).read_text(encoding="utf-8").count(mutant.old)
    assert found == 1 and mutant.new != mutant.old, f"{mutant.file} has changed: {mutant.old!r} stands there {found} times"
    assert (ROOT / mutant.test.split("::")[0]).is_file()
