"""Which kind of row is this? SHAPES lists the rows that are read; a table may call the fields otherwise."""

import dataclasses
from functools import cache
from typing import NamedTuple

from kto_ds.config_data import FIELDS
from kto_ds.errors import UserError, excerpt
from kto_ds.rows.labels import shown

SECOND_NAMES = {"conversations": "messages", "conversation": "messages", "kto_tag": "label"}
NAMES = (*FIELDS, "conversation")
# Every shape may have these; with plain text they are refused where the records are made.
TEMPLATE_FIELDS = frozenset({"system", "tools", "chat_template_kwargs"})
ANSWER_NAMES = ("response", "answer", "reply", "output", "completion", "generation", "text")
# How tables call our fields, the likeliest name first. These are proposed where a field is missing, never taken unasked.
USUAL_NAMES = {
    "prompt": ("question", "query", "instruction", "input", "request", "user", "user_message", "message"),
    "completion": ANSWER_NAMES,
    "output": ANSWER_NAMES,
    "label": ("thumb", "thumbs", "rating", "feedback", "vote", "is_good", "good", "is_desirable", "desirable", "liked", "like", "score"),
    "messages": ("dialog", "dialogue", "chat", "turns"),
    "chosen": ("preferred", "accepted", "better"),
    "rejected": ("dispreferred", "declined", "worse"),
}
ALL_SHAPES = "docs/data.md lists all shapes"


class Shape(NamedTuple):
    """The fields of one kind of row: those it must have, those that would make it another kind, and those it may have."""

    text: str
    needs: frozenset[str]
    lacks: frozenset[str]
    may_have: frozenset[str]


def _shape(text: str, *, lacks: str = "", may_have: str = "") -> Shape:
    return Shape(text, frozenset(text.split(", ")), frozenset(lacks.split()), frozenset(may_have.split()) | TEMPLATE_FIELDS)


SHAPES = (
    _shape("prompt, completion, label"),
    _shape("messages, label"),
    _shape("prompt, chosen, rejected"),
    _shape("chosen, rejected", lacks="prompt messages instruction"),  # the prompt is what both start with
    _shape("messages, chosen, rejected", lacks="prompt"),
    _shape("instruction, output, label", may_have="input history"),
    _shape("instruction, chosen, rejected", may_have="input history"),
    _shape("prompt, output, label"),
    _shape("prompt, output_A, output_B, label"),
)


@dataclasses.dataclass(frozen=True)
class RowRules:
    """What a source says about its rows."""

    columns: dict[str, str] = dataclasses.field(default_factory=dict)  # our field -> the table's column
    label_map: dict | None = None  # the table's label -> true or false

    @property
    def boolean_columns(self) -> tuple[str, ...]:
        """Columns of a CSV file in which the words true and false are booleans: none with a label_map, whose keys are words."""
        mapped = tuple(self.columns[name] for name in ("label", "kto_tag") if name in self.columns)
        return () if self.label_map else mapped or ("label", "kto_tag")


class Row(NamedTuple):
    """A row by our names for its fields, without those that are null. `columns` has the table's name of each."""

    values: dict[str, object]
    columns: dict[str, str]
    raw: dict
    where: str
    rules: RowRules

    def name(self, field: str) -> str:
        """Return how messages call a field: as the table does, and as we do too where the source maps one to the other."""
        column = self.columns.get(field) or _mapped(self.rules).get(field, field)
        return column if column in NAMES else f"{field} (column {excerpt(column)})"


def by_our_names(row: dict, where: str, rules: RowRules) -> Row:
    """Return the row with our names for its fields. A column that is mapped to one field is no other field besides."""
    mapped = _mapped(rules) if rules.columns else {}
    taken = mapped.values()
    columns = {ours: column for ours, column in mapped.items() if row.get(column) is not None}
    for name in NAMES:
        # Tables fill the cells that a row does not have with null.
        if name in row and row[name] is not None:
            ours = SECOND_NAMES.get(name, name)
            if ours not in columns and ours not in mapped and name not in taken:
                columns[ours] = name
    return Row({ours: row[column] for ours, column in columns.items()}, columns, row, where, rules)


def text_of(row: Row, field: str) -> str:
    """Return a field that can only be text, empty where the row lacks it."""
    value = row.values.get(field, "")
    if not isinstance(value, str):
        raise UserError(f"{row.name(field)}: expected text, found {shown(value)}", where=row.where, remedy="write it as text")
    return value


def shape_of(row: Row) -> Shape:
    """Return the one shape that the row's fields fit. Raises UserError if none does, or several."""
    fits = fitting(frozenset(row.values))
    if not fits:
        _refuse_unknown(row)
    if len(fits) > 1:
        both = "; ".join(shape.text for shape in fits)
        raise UserError(f"fields of more than one shape: {both}; found {_listed(row.raw)}", where=row.where, remedy="keep the fields of one shape")
    if not row.raw.keys().isdisjoint(SECOND_NAMES):
        _refuse_two_names(row, fits[0])
    return fits[0]


@cache
def fitting(present: frozenset[str]) -> tuple[Shape, ...]:
    """Return the shapes that a row with these fields may have."""
    # A row that lacks nothing but its label is told so, or has a label in each rated turn.
    return _complete(present) or tuple(shape for shape in SHAPES if shape.needs - {"label"} <= present and not shape.lacks & present)


def _complete(present: frozenset[str]) -> tuple[Shape, ...]:
    return tuple(shape for shape in SHAPES if shape.needs <= present and not shape.lacks & present)


def _mapped(rules: RowRules) -> dict[str, str]:
    return {SECOND_NAMES.get(name, name): column for name, column in rules.columns.items()}


def _refuse_unknown(row: Row) -> None:
    empty = [column for column, value in row.raw.items() if value is None]
    filled = by_our_names({column: "" if value is None else value for column, value in row.raw.items()}, row.where, row.rules)
    if len(shapes := _complete(frozenset(filled.values))) == 1:
        null = next(field for field in shapes[0].text.split(", ") if field not in row.values)
        remedy = f"give it a value, or remove the row; its shape is {shapes[0].text}"
        raise UserError(f"{filled.name(null)}: expected a value, found null", where=row.where, remedy=remedy)
    found = f"found {_listed(row.raw)}" + (f", of which {excerpt(empty)} null" if empty else "")
    if missing := [column for column in row.rules.columns.values() if column not in row.raw]:
        found += f"; columns names {excerpt(missing)}, which the row lacks"
    nearest = _nearest(row)
    if not nearest:
        remedy = f"the simplest shape is {SHAPES[0].text}; the source's columns can say how a table calls them; {ALL_SHAPES}"
        raise UserError(f"fields of no known shape: {found}", where=row.where, remedy=remedy)
    hint = columns_hint(row, _lacking(nearest[0], row)) or "give the fields that are missing, or say with the source's columns how the table calls them"
    what = f"fields of no known shape: {found}; nearest: {'; or '.join(_compared(shape, row) for shape in nearest)}"
    raise UserError(what, where=row.where, remedy=f"{hint}; {ALL_SHAPES}")


def columns_hint(row: Row, fields: list[str]) -> str:
    """Return the `columns` that find the missing `fields` where the row has columns of usual names for them, empty if it has none."""
    if not (usual := _usual_columns(row, fields)):
        return ""
    # The line takes the place of the one that the source has, so that it can be pasted.
    others = {name: column for name, column in row.rules.columns.items() if SECOND_NAMES.get(name, name) not in usual}
    unknown = [field for field in fields if field not in usual]
    also = f", and say there which column is {' and which is '.join(unknown)}" if unknown else ""
    if not all(column.isidentifier() and column.isascii() for column in others.values()):
        return f"add to the source's columns: {_as_yaml(usual)}{also}"
    return f"set columns: {_as_yaml(others | usual)} on the source{also}"


def _nearest(row: Row) -> list[Shape]:
    """Return the shapes that lack least, two at most: one if columns can make up for it, none if the row has hardly anything of any."""
    ranked = []
    for shape in SHAPES:
        lacking = _lacking(shape, row)
        usual = _usual_columns(row, lacking)
        has = len(shape.needs) - len(lacking)
        if not shape.lacks & row.values.keys() and (has or len(usual) > 1):
            ranked.append(((len(lacking) - len(usual), -has - len(usual), len(lacking)), bool(usual), shape))
    least = min((rank for rank, _, _ in ranked), default=None)
    tied = [(has_usual, shape) for rank, has_usual, shape in ranked if rank == least]
    return [shape for _, shape in tied[: 1 if tied and tied[0][0] else 2]]


def _usual_columns(row: Row, fields: list[str]) -> dict[str, str]:
    mapped = _mapped(row.rules)
    taken = mapped.values()
    there = {column.lower(): column for column in row.raw if isinstance(column, str) and column not in taken}
    found = {}
    for field in fields:
        # A field that `columns` looks for elsewhere may be there under our own name; any other has no value there.
        names = ((field,) if field in mapped else ()) + USUAL_NAMES.get(field, ())
        columns = [there[name] for name in names if name in there]
        if columns:
            found[field] = min(columns, key=lambda column: row.raw[column] is None)
    return found


def _lacking(shape: Shape, row: Row) -> list[str]:
    return [field for field in shape.text.split(", ") if field not in row.values]


def _compared(shape: Shape, row: Row) -> str:
    lacking = _lacking(shape, row)
    has = ", ".join(row.name(field) for field in shape.text.split(", ") if field not in lacking)
    return f"{shape.text}, of which the row has {f'{has} and lacks ' + ', '.join(lacking) if has else 'none'}"


def _as_yaml(columns: dict[str, str]) -> str:
    return "{" + ", ".join(f"{field}: {column}" for field, column in columns.items()) + "}"


def _refuse_two_names(row: Row, shape: Shape) -> None:
    mapped = _mapped(row.rules)
    for field in (shape.needs & set(SECOND_NAMES.values())) - mapped.keys():
        given = [name for name in NAMES if SECOND_NAMES.get(name, name) == field and row.raw.get(name) is not None and name not in mapped.values()]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)}: names of one field, found {len(given)}", where=row.where, remedy=f"keep {' or '.join(given)}")


def _listed(raw: dict) -> str:
    return excerpt(list(raw))
