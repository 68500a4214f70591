"""The one form that every row is brought to, checked before anything is tokenized. Which rows are read: shapes.py; what their fields say: examples.py."""

from dataclasses import dataclass

from kto_ds.errors import UserError, excerpt
from kto_ds.rows.examples import Example, read_examples
from kto_ds.rows.messages import SYSTEM_ROLES, Messages, has_content, text_message, to_template_kwargs, to_tools
from kto_ds.rows.shapes import Row, RowRules, by_our_names, fitting, shape_of, text_of


@dataclass(frozen=True)
class Record:
    """One example. Prompt and completion are both plain text, or both messages; only messages have tools and options of the chat template."""

    prompt: str | Messages
    completion: str | Messages
    desirable: bool
    where: str
    tools: list[dict] | None = None
    template_kwargs: dict | None = None


def to_records(row: dict, where: str, rules: RowRules = RowRules()) -> list[Record]:
    """Return the one record of a labelled row, the two of a pair, the desirable one first, or one for every rated turn.

    Raises UserError with the place `where`, the field, what was found and what to do. `row` is left as it is.
    """
    try:
        fields = by_our_names(row, where, rules)
        examples = read_examples(fields, shape_of(fields))
        system, tools, template_kwargs = _template_fields(fields)
        return [_record(example, fields, system=system, tools=tools, template_kwargs=template_kwargs) for example in examples]
    except RecursionError as error:
        raise UserError(f"nested too deeply, in one of the fields {excerpt(list(row))}", where=where, remedy="mend or remove the row") from error


def unused_fields(row: dict, rules: RowRules = RowRules()) -> set[str]:
    """Return the columns of `row` that have a value which no record comes from; none for a row of no known shape."""
    fields = by_our_names(row, "", rules)
    fits = fitting(frozenset(fields.values))
    if len(fits) != 1:
        return set()
    used = {column for ours, column in fields.columns.items() if ours in fits[0].needs or ours in fits[0].may_have}
    return {str(column) for column, value in row.items() if value is not None and column not in used}


def _template_fields(row: Row) -> tuple[str, list[dict] | None, dict | None]:
    values = row.values
    tools = to_tools(values["tools"], row.name("tools"), row.where) if "tools" in values else None
    name = "chat_template_kwargs"
    template_kwargs = to_template_kwargs(values[name], row.name(name), row.where) if name in values else None
    return text_of(row, "system"), tools, template_kwargs


def _record(example: Example, row: Row, *, system: str, tools: list[dict] | None, template_kwargs: dict | None) -> Record:
    prompt, completion, desirable, name = example
    if isinstance(prompt, str) is not isinstance(completion, str):
        what = f"{_prompt_name(row, name)} and {name}: expected both as text or both as messages, found prompt {excerpt(prompt)}"
        raise UserError(what, where=row.where, remedy="write both in the same form")
    if isinstance(prompt, str):
        _refuse_with_text(row, system=system, tools=tools, chat_template_kwargs=template_kwargs)
        is_asked, is_answered = bool(prompt.strip()), bool(completion.strip())
    else:
        prompt = _with_system(prompt, system, row)
        is_asked = any(has_content(message) for message in prompt if message["role"] not in SYSTEM_ROLES)
        is_answered = any(map(has_content, completion))
    if not is_asked:
        is_system = isinstance(prompt, list) and any(map(has_content, prompt))
        what = f"{_prompt_name(row, name)}: the prompt is {'nothing but a system message' if is_system else 'empty'}, found {excerpt(prompt)}"
        raise UserError(what, where=row.where, remedy="give every completion a prompt: text, or a message besides those of the system")
    for message in completion if isinstance(completion, list) else ():
        if message["role"] != "assistant":
            what = f"{name}: expected an assistant turn as the completion, found {excerpt(message)}"
            raise UserError(what, where=row.where, remedy="end the conversation with an assistant turn, and put all that comes before it into the prompt")
    if not is_answered:
        raise UserError(f"{name}: the completion is empty, found {excerpt(completion)}", where=row.where, remedy="mend or remove the row")
    return Record(prompt, completion, desirable, row.where, tools, template_kwargs)


def _prompt_name(row: Row, name: str) -> str:
    """Return the field that the prompt comes from, the completion's where both share one."""
    return next((row.name(field) for field in ("prompt", "messages", "instruction") if field in row.values), name)


def _refuse_with_text(row: Row, **fields: object) -> None:
    for field, value in fields.items():
        if value:
            what = f"{row.name(field)}: only rows of messages have it, found {excerpt(value)} with plain text"
            raise UserError(what, where=row.where, remedy=f"write prompt and completion as messages, or remove {field}")


def _with_system(prompt: Messages, system: str, row: Row) -> Messages:
    if not system:
        return prompt
    if prompt and prompt[0]["role"] in SYSTEM_ROLES:
        what = f"{row.name('system')}: the messages begin with a {prompt[0]['role']} message already, found {excerpt(system)}"
        raise UserError(what, where=row.where, remedy="keep one of the two")
    return [text_message("system", system), *prompt]
