"""One conversation: OpenAI's and ShareGPT's spellings are brought to one checked list of messages, with the tools it may call."""

import json

import numpy as np

from kto_ds.config_data import RESERVED_TEMPLATE_KWARGS
from kto_ds.errors import UserError, excerpt
from kto_ds.rows.json_rows import STRICT_JSON

Messages = list[dict]  # role and content, and what else a chat template may read; an assistant turn that only calls tools has no content

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
SYSTEM_ROLES = ("system", "developer")
SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant", "system": "system",
    "observation": "tool", "tool": "tool", "function_call": "assistant",
}  # fmt: skip
AS_MESSAGES = 'write messages as {"role": "user", "content": "text"}, or as {"from": "human", "value": "text"}'


def to_messages(values: list, field: str, where: str) -> Messages:
    """Return the messages of one field, checked and without keys that are null. `values` is left as it is."""
    return [to_message(value, f"{field}[{index}]", where) for index, value in enumerate(values)]


def to_message(value: object, name: str, where: str) -> dict:
    """Return one message with role and content. Keys that a template may read are kept, null ones are not: so tables write a key that is absent."""
    if not isinstance(value, dict):
        raise UserError(f"{name}: expected a message with role and content, found {excerpt(value)}", where=where, remedy=AS_MESSAGES)
    message = _from_sharegpt(value, name, where) if value.get("role") is None and value.get("from") is not None else value
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise UserError(f"{name}: expected role to be text, found {excerpt(value)}", where=where, remedy=AS_MESSAGES)
    if role not in ROLES:
        raise UserError(f"{name}: unknown role {excerpt(role)}", where=where, remedy=f"use one of {', '.join(ROLES)}")
    if len(message) == 2 and isinstance(content, str):
        return {"role": role, "content": content}
    kept = {str(key): plain_value(other) for key, other in message.items() if other is not None and key != "tool_calls"}
    if calls := _tool_calls(message.get("tool_calls"), role, name, where):
        kept["tool_calls"] = calls
    if content is not None or not calls:
        kept["content"] = _text_of(content, name, where)
    return kept


def to_tools(value: object, field: str, where: str) -> list[dict] | None:
    """Return the tools that the conversation may call, or None for an empty list. They come as a list of objects, or as JSON text of one."""
    remedy = 'give a list of objects such as [{"type": "function", "function": {"name": "f", "parameters": {}}}], or JSON text of one'
    tools = value
    if isinstance(value, str):
        tools = _parse_json(value, field, where, remedy) if value.strip() else []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{field}: expected a list of objects, found {excerpt(value)}", where=where, remedy=remedy)
    return plain_value(tools) or None


def to_template_kwargs(value: object, field: str, where: str) -> dict | None:
    """Return what the chat template is given besides the messages, or None for nothing."""
    if not isinstance(value, dict):
        raise UserError(f"{field}: expected an object, found {excerpt(value)}", where=where, remedy='write it as {"enable_thinking": false}')
    given = {name: plain_value(setting) for name, setting in value.items() if setting is not None}
    for name, setting in given.items():
        if not isinstance(name, str):
            raise UserError(f"{field}: expected names as text, found {excerpt(name)}", where=where, remedy='write it as {"enable_thinking": false}')
        if name in RESERVED_TEMPLATE_KWARGS:
            what = f"{field}: {name} cannot be set by a row, found {excerpt(setting)}"
            raise UserError(what, where=where, remedy=f"remove {name}; tools have a field of their own")
    return given or None


def text_message(role: str, text: str) -> dict:
    return {"role": role, "content": text}


def has_content(message: dict) -> bool:
    """Whether a message says anything: text other than white space, or a call of a tool."""
    return bool(message.get("tool_calls")) or bool(message["content"].strip())


def plain_value(value: object) -> object:
    """Return `value` in JSON's types alone, which can be compared and rendered: dates, decimals and the like of tables become text."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value.item() if isinstance(value, np.generic) else value
    if isinstance(value, dict):
        return {str(key): plain_value(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_value(inner) for inner in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return plain_value(value.tolist())
    return str(value)


def _text_of(content: object, name: str, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UserError(f"{name}: expected content to be text, found {excerpt(content)}", where=where, remedy="give every message its text")
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            what = f"{name}: expected content to be text or a list of text parts, found {excerpt(part)}"
            raise UserError(what, where=where, remedy='text only: images, audio and files cannot be trained on; a part is {"type": "text", "text": "..."}')
    return "".join(part["text"] for part in content)


def _tool_calls(calls: object, role: str, name: str, where: str) -> list[dict]:
    if calls is None or isinstance(calls, list) and not calls:
        return []
    remedy = 'give a list such as [{"type": "function", "function": {"name": "f", "arguments": {}}}], or leave tool_calls out'
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise UserError(f"{name}: expected tool_calls to be a list of objects, found {excerpt(calls)}", where=where, remedy=remedy)
    if role != "assistant":
        raise UserError(f"{name}: tool_calls in a message of role {role}, found {excerpt(calls)}", where=where, remedy="only an assistant turn calls tools")
    return plain_value(calls)


def _from_sharegpt(value: dict, name: str, where: str) -> dict:
    speaker, text = value["from"], value.get("value")
    role = SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise UserError(f"{name}: unknown from {excerpt(speaker)}", where=where, remedy=f"use one of {', '.join(SHAREGPT_ROLES)}")
    if not isinstance(text, str):
        raise UserError(f"{name}: expected value to be text, found {excerpt(text)}", where=where, remedy="give every message its text as value")
    others = {key: other for key, other in value.items() if key not in ("from", "value", "role", "content")}
    if speaker == "function_call":
        return {"role": role, **others, "tool_calls": _calls_in(text, name, where)}
    return {"role": role, "content": text, **others}


def _calls_in(text: str, name: str, where: str) -> list[dict]:
    remedy = 'write a function_call as JSON text: {"name": "f", "arguments": {}}, or a list of these'
    parsed = _parse_json(text, f"{name}: value", where, remedy)
    calls = parsed if isinstance(parsed, list) else [parsed]
    for call in calls:
        fits = isinstance(call, dict) and isinstance(call.get("name"), str) and call["name"] and isinstance(call.get("arguments"), (dict, str))
        if not fits:
            raise UserError(f"{name}: expected a function call with name and arguments, found {excerpt(call)}", where=where, remedy=remedy)
    if not calls:
        raise UserError(f"{name}: a function_call without a call, found {excerpt(text)}", where=where, remedy=remedy)
    return [{"type": "function", "function": call} for call in calls]


def _parse_json(text: str, name: str, where: str, remedy: str) -> object:
    try:
        value = STRICT_JSON.decode(text)
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair has no UTF-8 and would fail in the tokenizer
    except ValueError as error:
        raise UserError(f"{name}: not valid JSON: {excerpt(str(error))[1:-1]}, found {excerpt(text)}", where=where, remedy=remedy) from error
    return value
