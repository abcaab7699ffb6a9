"""Cut token ids: documents into sequences of one length, padded rows to what is text."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any


def packed_rows(documents: Iterable[list[int]], tokenizer: Any, wanted: int, length: int) -> list[list[int]]:
    """Returns documents, joined with an end token behind each, cut into at most `wanted` rows of `length` tokens."""
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


def real_span(ids: Sequence[int], pad: int | None, ends: int | Sequence[int] | None) -> tuple[int, int]:
    """Returns where the text of a row begins and ends that may be padded, but has no attention mask.

    Two or more padding tokens in a row at an end are padding; where that token also ends texts, one of them stays. A
    single one, and a row of nothing else, is taken as text: it may be any token.
    """
    if pad is None or all(token == pad for token in ids):
        return 0, len(ids)
    start = next(i for i, token in enumerate(ids) if token != pad)
    behind = next(i for i, token in enumerate(reversed(ids)) if token != pad)
    stay = 1 if pad in (ends if isinstance(ends, (list, tuple)) else (ends,)) else 0
    return start - stay if start > 1 else 0, len(ids) - (behind - stay if behind > 1 else 0)
