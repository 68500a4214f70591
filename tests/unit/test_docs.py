"""The pages of docs/ against the code: keys, examples, messages and links. Rows and configs that pages show are in test_docs_data.py."""

import contextlib
import io
import re
import sys

import pytest

from kto_ds import api
from kto_ds.config import RunConfig
from tests.distributed.runs import ROOT
from tests.unit.test_docs_data import blocks

sys.path.insert(0, str(ROOT / "tools"))
import config_reference  # noqa: E402

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted(DOCS.rglob("*.md")), *sorted((ROOT / "launch").glob("*.md")), *sorted((ROOT / "ds_configs").glob("*.md"))]


def test_the_config_reference_is_that_of_the_schema():
    page = config_reference.page()
    assert (DOCS / "config.md").read_text(encoding="utf-8") == page, "run python tools/config_reference.py"
    for part in ("| `seed` | whole number (≥ 0, < 4294967296) | `42` |", "| `model.path` | text | **required** |", "(> 0, < 1) | `null` |", "| fixed |", "| flag |"):
        assert part in page
    sections = {name for name, field in RunConfig.model_fields.items() if hasattr(field.annotation, "model_fields")}
    assert sections == {line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")} - {"the run"}


def test_the_worked_example_gives_what_the_page_says():
    [code], [shown] = ([block.text for block in blocks(DOCS / "mathematics.md") if block.language == language] for language in ("python", "text"))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "mathematics.md", "exec"), {})
    assert printed.getvalue() == shown


def test_messages_under_troubleshooting_are_those_of_the_code():
    source = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "kto_ds").rglob("*.py")))
    started = (DOCS / "troubleshooting.md").read_text(encoding="utf-8").split("## It does not start\n")[1]
    quoted = [message for part in (started.split("\n## ")[0], started.split("## It stops\n")[1].split("\n## ")[0]) for message in re.findall(r"^\| [^|]*?`([^`|]+)`", part, re.MULTILINE)]
    assert len(quoted) >= 10
    for message in quoted:
        fragments = message.removeprefix("label: ").split("...")
        assert all(fragment in source for fragment in fragments), message


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        found = (page.parent / file).resolve() if file else page
        assert found.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, f"{page.name}: {target}"


def test_every_page_is_in_the_list_of_pages():
    listed = set(re.findall(r"\]\((\w+\.md)\)", (DOCS / "README.md").read_text(encoding="utf-8")))
    assert listed == {path.name for path in DOCS.glob("*.md")} - {"README.md"}


def test_every_function_of_the_api_is_explained():
    rows = re.findall(r"^\| (`.+?) \|", (DOCS / "python.md").read_text(encoding="utf-8"), re.MULTILINE)
    explained = {name for row in rows for name in re.findall(r"`(\w+)\(", row)}
    assert explained == {name for name, value in vars(api).items() if getattr(value, "__module__", "") == api.__name__ and not name.startswith("_")}
