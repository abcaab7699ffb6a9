"""Chats become text by the tokenizer's own chat template, from the messages as they are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

# ShareGPT's names of who speaks ("from"), and those of its descendants -> the roles that templates know.
ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
_CALLS = ("function_call", "tool_call")
COLUMNS = ("messages", "conversations", "conversation")  # of a dataset


class NoTokenizer(ValueError):
    """Raised where a tokenizer is missing, or its chat template: a fault of the call, not of a document."""


def is_chat(document: Any) -> bool:
    """Returns whether a document is a list of messages: objects with a role and a content, or ShareGPT's from and value."""
    return (
        isinstance(document, Sequence)
        and not isinstance(document, (str, bytes))
        and bool(document)
        and all(isinstance(m, Mapping) and ("role" in m or "from" in m) for m in document)
    )


def chat_ids(messages: Sequence[Mapping[str, Any]], tokenizer: Any, row: Mapping[str, Any] | None = None) -> list[int]:
    """Returns the token ids of a chat, special tokens included, as its template renders it.

    Args:
        messages: `{"role", "content", ...}`, handed to the template as they are (tool calls, reasoning, content parts and
            None included); ShareGPT's `{"from", "value"}` is translated.
        tokenizer: or a processor; with a `chat_template`.
        row: the row of a dataset that the chat stands in: its `tools` (a list, or JSON), `documents` and
            `chat_template_kwargs` are handed over, and a `system` text that ShareGPT keeps beside the conversation.

    Raises:
        ValueError: no chat template; an image or sound among the parts; a role that ShareGPT does not have;
            a template that does not take these messages.
    """
    row = row or {}
    if not getattr(tokenizer, "chat_template", None):
        raise NoTokenizer(
            "the calibration data are chats, but the tokenizer has no chat_template; give texts, or set tokenizer.chat_template"
        )
    translated = [_translated(message) for message in messages]
    if isinstance(row.get("system"), str) and row["system"] and any("from" in message for message in messages):
        translated.insert(0, {"role": "system", "content": row["system"]})
    _check_parts(translated)
    options: dict[str, Any] = {name: row[name] for name in ("tools", "documents") if row.get(name)}
    if isinstance(options.get("tools"), str):
        options["tools"] = _json(options["tools"], "tools")
    if isinstance(extra := row.get("chat_template_kwargs"), Mapping):
        options |= extra
    text = _rendered(translated, tokenizer, options)
    return list(getattr(tokenizer, "tokenizer", tokenizer)(text, add_special_tokens=False, verbose=False)["input_ids"])


def without_missing(value: Any) -> Any:
    """Returns messages from a table without the fields that its format adds: there, every message has the fields of all.

    A `content` of None stays: it is what an assistant says who only calls a tool.
    """
    if isinstance(value, Mapping):
        return {k: without_missing(v) for k, v in value.items() if v is not None or k in ("content", "value")}
    return [without_missing(one) for one in value] if isinstance(value, (list, tuple)) else value


def _translated(message: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ShareGPT's `{"from", "value"}` as `{"role", "content"}`, with its tool calls; others as they are."""
    if "role" in message:
        return dict(message)
    speaker, content = message["from"], message.get("value", message.get("content"))
    if speaker not in ROLES:
        raise ValueError(f"a message is from {speaker!r}; ShareGPT's names are {', '.join(ROLES)}")
    rest = {key: value for key, value in message.items() if key not in ("from", "value", "content")}
    if speaker in _CALLS and isinstance(content, str):
        calls = _json(content, speaker)
        calls = calls if isinstance(calls, list) else [calls]
        return {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "function": c} for c in calls],
        }
    return {"role": ROLES[speaker], "content": content, **rest}


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"its {name} are not JSON: {error}") from None


def _check_parts(messages: Sequence[Mapping[str, Any]]) -> None:
    for message in messages:
        parts = message.get("content")
        kinds = {p.get("type", "text") for p in parts if isinstance(p, Mapping)} if isinstance(parts, list) else set()
        if other := kinds - {"text", "refusal", "thinking", "reasoning"}:
            raise ValueError(
                f"a message has a part of type {', '.join(sorted(map(str, other)))}, and calibration text is text only; give "
                "batches that the model's processor made, as a list of dicts"
            )


def _rendered(messages: list[dict[str, Any]], tokenizer: Any, options: Mapping[str, Any]) -> str:
    """Returns what the template makes of the messages: content parts as text, or text as parts, where it wants those."""
    problem: Exception | None = None
    plain: str | None = None
    for form in (messages, _as_text(messages), _as_parts(messages)):
        if form is None:
            continue
        try:
            text = str(tokenizer.apply_chat_template(form, tokenize=False, **options))
        except Exception as error:  # a template is a program, and raises what it likes
            problem = problem or error
            continue
        if _is_told(messages, text):
            return text
        plain = text if plain is None else plain
    if plain is not None:  # a template may alter whatever it is given
        return plain
    roles = ", ".join(str(message.get("role")) for message in messages[:8])
    raise ValueError(
        f"the tokenizer's chat template does not take its messages (roles {roles}): {type(problem).__name__}: {problem}; "
        "change the chats, or set tokenizer.chat_template"
    ) from problem


def _is_told(messages: Sequence[Mapping[str, Any]], text: str) -> bool:
    """Returns whether the text has what at least one message says, and no list of parts written out as Python or JSON."""
    contents = [message.get("content") for message in messages]
    lists = [content for content in contents if isinstance(content, list) and content]
    if any(str(parts) in text or json.dumps(parts, ensure_ascii=False) in text for parts in lists):
        return False
    words = [part for content in contents for part in _texts(content) if part.strip()]
    return not words or any(part.strip() in text for part in words)


def _texts(content: Any) -> list[str]:
    if isinstance(content, str):
        return [content]
    parts = content if isinstance(content, list) else []
    return [str(part.get("text") or "") for part in parts if isinstance(part, Mapping)]


def _as_text(messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    if not any(isinstance(message.get("content"), list) for message in messages):
        return None
    return [
        message | {"content": "".join(_texts(message["content"]))}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def _as_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    if not any(isinstance(message.get("content"), str) for message in messages):
        return None
    return [
        message | {"content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else message
        for message in messages
    ]
