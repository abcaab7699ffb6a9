"""Texts to measure perplexity on: the papers' three, Hub datasets and local files, cut into windows."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..calibration.calibration import read_texts

logger = logging.getLogger(__name__)

FEWEST = 8  # documents that are resampled; fewer say too little about how documents differ


@dataclass(frozen=True)
class Text:
    """Documents that are joined by `joiner` and cut into windows, of which the first `windows` are scored.

    `special`: the tokenizer's start token once, before all of it, as in the papers' code.
    """

    name: str
    documents: Sequence[str]
    split: str | None = None
    joiner: str = "\n\n"
    windows: int | None = None
    special: bool = False


@dataclass(frozen=True)
class _Paper:
    """The place of a text of the papers on the Hub, and how they join it."""

    load: dict[str, Any]
    split: str
    column: str
    joiner: str
    documents: int | None = None
    windows: int | None = None


# As in SparseGPT's datautils.py and Wanda's lib/data.py, which later papers took over. Empty rows belong to the text.
# Penn Treebank is a script on the Hub; its data are in the branch that the Hub made of it.
_PAPERS = {
    "wikitext2": _Paper({"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"}, "test", "text", "\n\n"),
    "c4": _Paper(
        {
            "path": "allenai/c4",
            "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"},
            "streaming": True,
        },
        "validation",
        "text",
        " ",
        documents=1100,
        windows=256,
    ),
    "ptb": _Paper(
        {"path": "ptb-text-only/ptb_text_only", "name": "penn_treebank", "revision": "refs/convert/parquet"},
        "test",
        "sentence",
        " ",
    ),
}
_NAMES = {"wikitext-2": "wikitext2", "penn_treebank": "ptb"}


def read_text(source: str, *, split: str | None = None, column: str | None = None) -> Text:
    """Reads the text that a name stands for.

    Args:
        source: `"wikitext2"`, `"c4"` or `"ptb"`, read and joined as in the papers; any file, folder or Hub dataset that
            `calibration_batches` reads, its documents joined by an empty line.
        split: of a Hub dataset, by default the one the papers measure on, or "test".
        column: of a dataset, by default the first with texts.

    Raises:
        ValueError: it cannot be read or reached, or has no such column.
    """
    name = source.lower()
    paper = _PAPERS.get(_NAMES.get(name, name))
    local = Path(source).exists()
    if paper is not None and not local:
        return _of_the_papers(_NAMES.get(name, name), paper, split)
    documents = read_texts(source, split=split or "test", column=column)
    if local:
        return Text(Path(source).name, documents)
    return Text(source, documents, split or "test")


def _of_the_papers(name: str, paper: _Paper, split: str | None) -> Text:
    import datasets  # heavy

    if split not in (None, paper.split):
        raise ValueError(f"{name} is measured on its split {paper.split!r}, not {split!r}; leave the split out")
    try:
        rows = datasets.load_dataset(**paper.load, split=paper.split)
    except (OSError, RuntimeError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{name} could not be reached ({error}); connect to the Hub, or give a local text, jsonl or parquet file"
        ) from error
    documents = [row[paper.column] for row in itertools.islice(rows, paper.documents)]
    return Text(name, documents, paper.split, paper.joiner, paper.windows, special=True)


@dataclass(frozen=True, eq=False)
class Windows:
    """A text's windows: `ids` `[n, length]`, int64, and the unit `[n]` that each belongs to, from 0.

    Units are what a bootstrap draws. Windows that begin in the same document are one unit, `unit="document"`, because
    they are alike; where documents are shorter than a window, or fewer than `FEWEST`, each window is a unit, `unit="window"`; intervals are then rather
    too narrow, as far as neighbours are alike.
    """

    text: Text
    ids: Tensor
    units: np.ndarray[Any, Any]
    unit: str


def cut(text: Text, tokenizer: Any, length: int, windows: int | None = None) -> Windows:
    """Cuts joined text into windows of `length` tokens that do not overlap, at most `windows`; the rest is dropped.

    Raises:
        ValueError: the text does not fill one window.
    """
    fast = bool(getattr(tokenizer, "is_fast", False))  # the others do not say where a token was
    encoded = tokenizer(
        text.joiner.join(text.documents),
        add_special_tokens=text.special,
        return_offsets_mapping=fast,
        return_attention_mask=False,
        verbose=False,
    )
    ids = torch.tensor(encoded["input_ids"], dtype=torch.int64)
    count = min(limit for limit in (len(ids) // length, text.windows, windows) if limit is not None)
    if count == 0:
        raise ValueError(
            f"{text.name} has {len(ids)} tokens, fewer than one window of {length}; give more text or a smaller length"
        )
    rows = ids[: count * length].reshape(count, length)
    if fast:
        begin = [start for start, _ in encoded["offset_mapping"][: count * length : length]]
        ends = np.cumsum([len(document) + len(text.joiner) for document in text.documents])
        documents, units = np.unique(np.searchsorted(ends, begin, side="right"), return_inverse=True)
        if FEWEST <= len(documents) < count:
            return Windows(text, rows, units, "document")
    return Windows(text, rows, np.arange(count), "window")
