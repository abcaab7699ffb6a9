"""Documents, one after another, as token ids: texts, chats and rows that are tokenized already, from any kind of table."""

from __future__ import annotations

import operator
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import chats
from .reading import as_dataset, load
from .sequences import real_span

TEXTS = ("text", "content")  # columns of a dataset
IDS = "input_ids"
COLUMNS = (*chats.COLUMNS, *TEXTS, IDS)  # in the order in which they are looked for
_ANSWERS = ("completion", "chosen")  # what follows a prompt
_BESIDE = ("attention_mask", "tools", "documents", "chat_template_kwargs", "system")  # read with it


def read_documents(
    data: Any, tokenizer: Any, column: str | None, split: str, seed: int, rng: random.Random
) -> Iterator[list[int]]:
    """Yields the token ids of one document after another, in an order drawn by seed.

    Args:
        data: see `calibration_batches`; no tensor of ids, no mix.
        tokenizer: needed unless the documents are token ids.
        column: of a dataset; by default the first of `COLUMNS`, or prompt with completion or chosen.
        split: of a dataset that has several; "train+validation" joins two.
        seed, rng: of the order; streams are shuffled in a buffer of 1000 documents.

    Raises:
        ValueError: nothing given, data of another kind, no such column or split; a document that is no text, chat or
            list of token ids, with its number.
    """
    for number, document, row in _rows(data, column, split, seed, rng):
        try:
            yield document_ids(document, tokenizer, row)
        except chats.NoTokenizer:
            raise
        except ValueError as error:
            raise ValueError(f"calibration document {number}: {error}") from error.__cause__


def _rows(data: Any, column: str | None, split: str, seed: int, rng: random.Random) -> Iterator[tuple[int, Any, Any]]:
    """Yields (number in the data, document, the row that it stands in)."""
    data = as_dataset(load(data, split) if isinstance(data, (str, Path)) else data, split, COLUMNS)
    if hasattr(data, "column_names") or hasattr(data, "features"):
        key = find_column(data, column)
        for number, row in _shuffled(_only_needed(data, key), seed, rng):
            if key is not None and key not in row:
                raise ValueError(f"calibration document {number} has no field {key!r}; it has {', '.join(row)}")
            row = chats.without_missing(row) if key in (*chats.COLUMNS, None) else row
            yield number, _joined(row) if key is None else row.get(key), row
        return
    if isinstance(data, Sequence) and not isinstance(data, (bytes, bytearray)):
        if not data:
            raise ValueError("the calibration data are empty")
        numbered: Iterable[tuple[int, Any]] = rng.sample(list(enumerate(data)), len(data))
    elif isinstance(data, Iterable) and not isinstance(data, (bytes, bytearray)):
        numbered = enumerate(data)
    else:
        raise ValueError(
            f"calibration data of type {type(data).__name__} are not understood: give texts, a dataset, a file or token ids"
        )
    for number, document in numbered:
        yield number, *_field(document, column, number)


def _only_needed(dataset: Any, key: str | None) -> Any:
    """Returns a dataset without the columns that are not looked at: pictures and sound are decoded when they are read."""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "select_columns"):
        return dataset
    needed = {key, *_BESIDE, *(("prompt", *_ANSWERS) if key is None else ())}
    return dataset.select_columns([name for name in dataset.column_names if name in needed])


def _shuffled(dataset: Any, seed: int, rng: random.Random) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if hasattr(dataset, "__len__"):
        order = list(range(len(dataset)))
        rng.shuffle(order)
        yield from ((i, dataset[i]) for i in order)
        return
    rows = enumerate(dataset.shuffle(seed=seed, buffer_size=1000))
    while True:
        try:
            numbered = next(rows, None)
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"the calibration data cannot be read on: {error.__cause__ or error}") from error
        if numbered is None:
            return
        yield numbered


def _field(document: Any, column: str | None, number: int) -> tuple[Any, Any]:
    """Returns (document, row) of one entry of a list: of an object the field that holds the text."""
    if not isinstance(document, Mapping):
        return document, None
    key = column or next((name for name in COLUMNS if name in document), None)
    if key is None and _has_prompt(document):
        return _joined(document), document
    if key is None or key not in document:
        raise ValueError(
            f"calibration document {number} has the fields {', '.join(document)}; name the one to use: column=..."
        )
    return document[key], document


def document_ids(document: Any, tokenizer: Any, row: Mapping[str, Any] | None = None) -> list[int]:
    """Returns the token ids of a text, a chat, or a list of token ids, without its padding; of None, none.

    Args:
        document: a text; messages, see `chats.chat_ids`; ids as a list, an array or a tensor.
        tokenizer: or a processor; only ids do without.
        row: what the document stands in: its `attention_mask` says which ids are padding.
    """
    if document is None:  # datasets have such rows
        return []
    if hasattr(document, "tolist"):  # a tensor or an array
        document = document.tolist()
    if isinstance(document, (list, tuple)) and document and not isinstance(document[0], (Mapping, str)):
        return _without_padding(_integers(document), tokenizer, row or {})
    if tokenizer is None:
        raise chats.NoTokenizer("texts need a tokenizer: pass tokenizer=AutoTokenizer.from_pretrained(...)")
    if isinstance(document, str):
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        return list(tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"])
    if document and chats.is_chat(document):
        return chats.chat_ids(document, tokenizer, row)
    if isinstance(document, (list, tuple)) and not document:
        return []
    raise ValueError(f"it is a {type(document).__name__}; a text, a chat or token ids are expected")


def _integers(document: Sequence[Any]) -> list[int]:
    try:
        return [operator.index(token) for token in document]
    except TypeError:
        raise ValueError(f"it is a list of {type(document[0]).__name__}; token ids are integers") from None


def _without_padding(ids: list[int], tokenizer: Any, row: Mapping[str, Any]) -> list[int]:
    """Returns the ids that the row's attention mask counts; without a mask, those between padding tokens at the ends."""
    mask = row.get("attention_mask")
    if mask is not None:
        mask = mask.tolist() if hasattr(mask, "tolist") else mask
        if len(mask) != len(ids):
            raise ValueError(f"its attention_mask has {len(mask)} entries for {len(ids)} token ids")
        return [token for token, real in zip(ids, mask, strict=True) if real]
    start, end = real_span(ids, getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None))
    return ids[start:end]


def find_column(data: Any, asked: str | None) -> str | None:
    """Returns the column of a dataset that holds the documents; None stands for a prompt and what follows it.

    Raises:
        ValueError: an empty dataset, or no such column; the message names those there are.
    """
    # A stream may know no columns before its first row.
    names = list(data.column_names or data.features or next(iter(data), {}))
    if not names:
        raise ValueError("the calibration data are empty")
    if asked is not None:
        if asked not in names:
            raise ValueError(f"the dataset has no column {asked!r}; it has {', '.join(names)}")
        return asked
    for name in COLUMNS:
        if name in names:
            return name
    if _has_prompt(names):
        return None
    raise ValueError(f"the dataset has the columns {', '.join(names)}; name the one with the text: column=...")


def _has_prompt(names: Iterable[str]) -> bool:
    return "prompt" in names and any(name in names for name in _ANSWERS)


def _joined(row: Mapping[str, Any]) -> Any:
    """Returns a prompt and its completion (or the answer that was chosen): two texts, or the messages of a chat."""
    prompt, answer = row["prompt"], next(row[name] for name in _ANSWERS if name in row)
    if prompt is None or answer is None:
        return None
    if type(prompt) is not type(answer):
        raise ValueError("a prompt and its completion are a text and a chat; name a column: column=...")
    return answer if isinstance(answer, list) and answer[: len(prompt)] == prompt else prompt + answer
