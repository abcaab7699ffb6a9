"""Texts, files or datasets -> the same token batches every time."""

from __future__ import annotations

import logging
import math
import operator
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..model.classes import text_config
from ..model.loading import find_tokenizer
from .mixture import LEAST, SELF, Mixture, Source, counts, interleaved, names, sources_in
from .sequences import packed_rows, random_windows

logger = logging.getLogger(__name__)

SEQUENCES = 128  # the papers' number
LENGTH = 2048  # and length, or the model's limit if that is smaller
_COLUMNS = ("messages", "conversations", "text", "content")

# Short names of the papers' datasets: path, configuration and files for datasets.load_dataset.
_SHORT_NAMES: dict[str, dict[str, Any]] = {
    "c4": {"path": "allenai/c4", "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}, "streaming": True},
    "wikitext2": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"},
}
_SHORT_NAMES["wikitext-2"] = _SHORT_NAMES["wikitext2"]
_BUILDERS = {
    ".txt": "text",
    ".md": "text",
    ".py": "text",
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
}


@overload
def calibration_batches(
    data: Sequence[Source],
    tokenizer: Any = ...,
    *,
    sequences: int | None = ...,
    length: int | None = ...,
    seed: int = ...,
    column: str | None = ...,
    split: str = ...,
    packing: str = ...,
    model: Any = ...,
) -> Tensor | Mixture: ...
@overload
def calibration_batches(
    data: Any,
    tokenizer: Any = ...,
    *,
    sequences: int | None = ...,
    length: int | None = ...,
    seed: int = ...,
    column: str | None = ...,
    split: str = ...,
    packing: str = ...,
    model: Any = ...,
) -> Tensor: ...
def calibration_batches(
    data: Any,
    tokenizer: Any = None,
    *,
    sequences: int | None = None,
    length: int | None = None,
    seed: int = 0,
    column: str | None = None,
    split: str = "train",
    packing: str = "full",
    model: Any = None,
) -> Tensor | Mixture:
    """Token ids `[sequences, length]`, int64; the same arguments give the same ids. Of several sources, a `Mixture`.

    Of a mix each source gives its share of the sequences, the ones that it would give alone, and any stretch of them
    holds the mix. A source that has too little text is an error.

    Args:
        data: a list of texts (or of chats, lists of `{"role", "content"}`); a `datasets` dataset with a text or messages
            column, streaming too; a local text, jsonl, json, csv or parquet file; token ids, a tensor `[n, t]` or lists;
            a Hub dataset's name, `"c4"` and `"wikitext2"` for short; `"self"` for samples of the model (a file of that
            name is `"./self"`); a list of `Source`, or of dicts of their fields, for a mix.
        tokenizer: needed unless `data` are token ids. Chats go through its chat template.
        sequences: how many; by default 128, or as many as the data give (then a warning says so).
        length: tokens in each; by default 2048 or the tokenizer's `model_max_length` if that is smaller.
        seed: of the order in which documents are drawn.
        column: of a dataset; by default the first of messages, conversations, text, content.
        split: of a Hub dataset.
        packing: `"full"` joins documents, each closed by the end-of-text token, and cuts full sequences;
            `"documents"` is the papers' way: a random window of each drawn document that is longer than `length`.
        model: for `"self"`, see `self_samples`.

    Raises:
        ValueError: nothing given, too little text for the sequences asked for, no tokenizer, no such column; a bad
            `Source`; a model that cannot write samples.
    """
    for name, value, least in (("sequences", sequences, 1), ("length", length, 2)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"{name}={value!r}: a whole number, at least {least}, is expected")
    if packing not in ("full", "documents"):
        raise ValueError(f"packing={packing!r}: use 'full' or 'documents'")
    how = _Reading(tokenizer, seed, column, split, packing, model)
    mix = sources_in(data, column)
    if mix is not None and len(mix) == 1:
        data, how, mix = mix[0].data, how.of(mix[0]), None
    if isinstance(data, Tensor):
        return _from_tensor(data, sequences, length)
    limit = getattr(tokenizer, "model_max_length", None) or LENGTH
    length = length or min(LENGTH, int(limit))
    wanted = sequences or SEQUENCES
    if mix is not None:
        return _mixture(mix, wanted, length, how)
    rows = _rows(data, wanted, length, how)
    if not len(rows):
        raise ValueError(
            f"the calibration data are empty or too short: they do not fill one sequence of {length} tokens; give more text, or a smaller length"
        )
    if len(rows) < wanted:
        message = f"the calibration data fill {len(rows)} of {wanted} sequences of {length} tokens"
        if sequences is not None:
            raise ValueError(f"{message}; give more text, a smaller length, or sequences={len(rows)}")
        logger.warning("%s; continuing with those", message)
    return rows


@dataclass(frozen=True)
class _Reading:
    """Options of reading: how data become rows."""

    tokenizer: Any
    seed: int
    column: str | None
    split: str
    packing: str
    model: Any

    def of(self, source: Source) -> _Reading:
        """Returns the options with what the source itself says."""
        return replace(self, column=source.column or self.column, split=source.split or self.split)


def _rows(data: Any, wanted: int, length: int, how: _Reading) -> Tensor:
    """Up to `wanted` sequences of one source."""
    if isinstance(data, Tensor):
        return _from_tensor(data, None, length)[:wanted]
    if isinstance(data, str) and data == SELF:
        from .self_sampling import self_samples

        return self_samples(how.model, how.tokenizer, sequences=wanted, length=length, seed=how.seed)
    rng = random.Random(how.seed)
    documents = read_documents(data, how.tokenizer, how.column, how.split, how.seed, rng)
    rows = (
        packed_rows(documents, how.tokenizer, wanted, length)
        if how.packing == "full"
        else random_windows(documents, wanted, length, rng)
    )
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, length)


def _mixture(mix: Sequence[Source], wanted: int, length: int, how: _Reading) -> Mixture:
    called, shares = names(mix), counts([one.weight for one in mix], wanted)
    total = math.fsum(one.weight for one in mix)
    weights = {name: one.weight / total for name, one in zip(called, mix, strict=True)}
    parts: list[Iterator[Tensor]] = []
    for source, name, count in zip(mix, called, shares, strict=True):
        try:
            rows = _rows(source.data, count, length, how.of(source))
        except ValueError as error:
            raise ValueError(f"source {name!r} of the calibration mix: {error}") from error
        if len(rows) < count:
            fitting = int(len(rows) / weights[name])
            smaller = f", or sequences={fitting}" if fitting >= LEAST * len(mix) else ""
            raise ValueError(
                f"source {name!r} of the calibration mix fills {len(rows)} of the {count} sequences of {length} tokens that its "
                f"weight makes of {wanted}; give it more text or a smaller weight, a smaller length{smaller}"
            )
        parts.append(iter(rows))
    order = interleaved(shares)
    return Mixture(torch.stack([next(parts[i]) for i in order]), tuple(called[i] for i in order), weights)


def read_texts(source: str, *, split: str = "test", column: str | None = None) -> list[str]:
    """Returns all documents of a local file or a Hub dataset, in order; errors as `calibration_batches`."""
    data = _load(source, split)
    if isinstance(data, list):
        return data
    name = _column(data, column)
    if name not in ("messages", "conversations", "input_ids"):
        return [text for text in data[name] if text]
    raise ValueError(f"{source} holds chats; perplexity is measured on texts: name a text column")


def _from_tensor(ids: Tensor, sequences: int | None, length: int | None) -> Tensor:
    if ids.ndim != 2 or ids.numel() == 0 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"token ids must be integers [sequences, tokens], not {ids.dtype} {list(ids.shape)}")
    if (length is not None and ids.shape[1] < length) or (sequences is not None and ids.shape[0] < sequences):
        raise ValueError(f"token ids {list(ids.shape)} are too few for sequences={sequences}, length={length}")
    return ids[:sequences, :length].to(torch.int64)


def read_documents(
    data: Any, tokenizer: Any, column: str | None, split: str, seed: int, rng: random.Random
) -> Iterator[list[int]]:
    """Token ids of one document after another, in an order drawn by seed."""
    if isinstance(data, (str, Path)):
        data = _load(str(data), split)
    if isinstance(data, Mapping):
        raise ValueError(
            f"data has splits {', '.join(map(str, data))}: choose one, data[{next(iter(data), 'train')!r}]"
        )
    if hasattr(data, "column_names") or hasattr(data, "features"):
        column = _column(data, column)
        data = _shuffled(data, column, seed, rng)
    elif isinstance(data, Sequence):
        if not data:
            raise ValueError("the calibration data are empty")
        data = rng.sample(list(data), len(data))
    elif not isinstance(data, Iterable):
        raise ValueError(
            f"calibration data of type {type(data).__name__} are not understood: give texts, a dataset, a file or token ids"
        )
    for document in data:
        yield _tokens(document, tokenizer, column)


def _shuffled(dataset: Any, column: str, seed: int, rng: random.Random) -> Iterator[Any]:
    if not hasattr(dataset, "__len__"):  # streaming
        for row in dataset.shuffle(seed=seed, buffer_size=1000):
            yield row[column]
        return
    order = list(range(len(dataset)))
    rng.shuffle(order)
    for i in order:
        yield dataset[i][column]


def _tokens(document: Any, tokenizer: Any, column: str | None) -> list[int]:
    if isinstance(document, Mapping):
        key = column or next((c for c in _COLUMNS if c in document), None)
        if key is None or key not in document:
            raise ValueError(
                f"a calibration document has the fields {', '.join(document)}; name the one to use: column=..."
            )
        document = document[key]
    if document is None:  # datasets have such rows
        return []
    if hasattr(document, "tolist"):  # a tensor or an array
        document = document.tolist()
    if isinstance(document, (list, tuple)) and document and not isinstance(document[0], (Mapping, str)):
        try:
            return [operator.index(token) for token in document]
        except TypeError:
            raise ValueError(
                f"a calibration document is a list of {type(document[0]).__name__}; token ids are integers"
            ) from None
    if tokenizer is None:
        raise ValueError("texts need a tokenizer: pass tokenizer=AutoTokenizer.from_pretrained(...)")
    if isinstance(document, str):
        return list(tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"])
    if isinstance(document, (list, tuple)) and all(isinstance(m, Mapping) for m in document):
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "the calibration data are chats, but the tokenizer has no chat_template; give texts, or set tokenizer.chat_template"
            )
        chat = [{"role": m.get("role", m.get("from")), "content": m.get("content", m.get("value"))} for m in document]
        return list(tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"])
    raise ValueError(f"a calibration document is a {type(document).__name__}; a text, a chat or token ids are expected")


def _column(data: Any, given: str | None) -> str:
    names = list(
        data.column_names or data.features or next(iter(data), {})
    )  # a stream may know none before its first row
    if not names:
        raise ValueError("the calibration data are empty")
    if given is not None:
        if given not in names:
            raise ValueError(f"the dataset has no column {given!r}; it has {', '.join(names)}")
        return given
    for name in (*_COLUMNS, "input_ids"):
        if name in names:
            return name
    raise ValueError(f"the dataset has the columns {', '.join(names)}; name the one with the text: column=...")


def _load_file(path: Path) -> Any:
    import datasets

    if path.is_dir():
        return datasets.load_from_disk(str(path))
    if path.suffix not in _BUILDERS:
        raise ValueError(f"one of {', '.join(_BUILDERS)} is expected")
    if path.stat().st_size == 0:
        raise ValueError("it is empty")
    if _BUILDERS[path.suffix] == "text":
        return [path.read_text(encoding="utf-8")]
    return datasets.load_dataset(_BUILDERS[path.suffix], data_files=str(path), split="train")


def _load(source: str, split: str) -> Any:
    import datasets  # a heavy import that most calls do without

    path = Path(source)
    if path.suffix in _BUILDERS or path.exists():
        try:
            return _load_file(path)
        except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
            cause = error.__cause__ or error  # datasets' own message is only that an error occurred
            raise ValueError(f"calibration data {source!r} cannot be read: {cause}") from error
    arguments = {"path": source} | _SHORT_NAMES.get(source.lower(), {}) | {"split": split}
    try:
        return datasets.load_dataset(**arguments)
    except (ConnectionError, FileNotFoundError) as error:
        raise ValueError(
            f"calibration data {source!r} are neither a local file nor a dataset that could be reached: {error}"
        ) from error


def model_batches(
    model: PreTrainedModel,
    data: Any,
    options: Mapping[str, Any],
    tokenizer: Any,
    source: Any,
    location: Mapping[str, Any],
) -> Any:
    """Calibration data in any form -> what `prepare_batches` takes; the length is at most the model's limit."""
    if isinstance(data, Mixture):
        return data
    if isinstance(data, Tensor):
        return calibration_batches(data, **options)
    if (
        isinstance(data, (list, tuple))
        and data
        and isinstance(data[0], Mapping)
        and "input_ids" in data[0]
        and not isinstance(data[0]["input_ids"], list)
    ):
        return data
    if type(data).__name__ == "DataLoader":
        return data
    if tokenizer is None and ((isinstance(data, str) and data == SELF) or sources_in(data, options.get("column"))):
        tokenizer = find_tokenizer(source, **location)  # samples and ids do without
    elif tokenizer is None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(source, **location)
    options = dict(options)
    if options.get("length") is None:
        options["length"] = default_length(model, tokenizer)
    return calibration_batches(data, tokenizer, model=model, **options)


def default_length(model: PreTrainedModel, tokenizer: Any = None) -> int:
    """2048 tokens, or the model's or tokenizer's limit if that is smaller."""
    config = text_config(model.config)
    limits = [LENGTH, getattr(config, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None)]
    return min(int(limit) for limit in limits if limit)
