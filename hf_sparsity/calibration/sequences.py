"""Cut token ids into sequences of one length."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any


def packed_rows(documents: Iterable[list[int]], tokenizer: Any, wanted: int, length: int) -> list[list[int]]:
    """Documents joined, an end token between them, and cut into at most `wanted` rows of `length` tokens."""
    end = getattr(tokenizer, "eos_token_id", None)
    stream: list[int] = []
    for document in documents:
        stream += document
        if end is not None and document and document[-1] != end:
            stream.append(end)
        if len(stream) >= wanted * length:
            break
    return [stream[i : i + length] for i in range(0, min(len(stream), wanted * length) - length + 1, length)]


def random_windows(documents: Iterable[list[int]], wanted: int, length: int, rng: random.Random) -> list[list[int]]:
    """Returns up to `wanted` windows of `length` tokens, each at a random place of a document that is long enough."""
    rows = []
    for document in documents:
        if len(document) > length:
            start = rng.randint(0, len(document) - length - 1)
            rows.append(document[start : start + length])
        if len(rows) == wanted:
            break
    return rows
