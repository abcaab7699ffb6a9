"""Files, folders, tables and names of Hub datasets become datasets of 🤗 Datasets, or lists of texts."""

from __future__ import annotations

import bz2
import glob
import gzip
import lzma
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

# Short names of the papers' datasets: path, configuration and files for datasets.load_dataset.
_SHORT_NAMES: dict[str, dict[str, Any]] = {
    "c4": {"path": "allenai/c4", "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}, "streaming": True},
    "wikitext2": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "streaming": False},  # 4 MB
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
    ".tsv": "csv",
    ".arrow": "arrow",
}
_COMPRESSED: dict[str, Callable[..., Any] | None] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": None}
_TABLES = {"pandas": "from_pandas", "polars": "from_polars"}


def load(source: str | Path, split: str) -> Any:
    """Returns what a name stands for: a dataset, or the texts of text files.

    Args:
        source: a file (text, jsonl, json, csv, tsv, parquet, arrow; also compressed), a pattern of files such as
            "shards/*.jsonl", a folder (a saved dataset, or one with such files), or a Hub dataset: its name, "c4" or
            "wikitext2" for short, "name:configuration" for one of several.
        split: of a folder or Hub dataset.

    Raises:
        ValueError: it cannot be read or reached; the message says why.
    """
    import datasets  # a heavy import that most calls do without

    path = Path(source)
    files = sorted(glob.glob(str(source))) if glob.has_magic(str(source)) and not _exists(path) else []
    if not files and (_kind(path) is not None or _exists(path)):
        files = [str(path)]
    try:
        if files and Path(files[0]).is_dir():
            return _load_folder(Path(files[0]), split)
        if files:
            return load_files(files)
    except (datasets.exceptions.DatasetsError, OSError, EOFError, RuntimeError, ValueError) as error:
        cause = error.__cause__ or error  # datasets' own message is only that an error occurred
        raise ValueError(f"calibration data {str(source)!r} cannot be read: {cause}{_hint(cause)}") from error
    return _load_from_hub(str(source), split)


def load_files(files: Sequence[str | Path]) -> Any:
    """Returns the documents of files of one kind: a dataset, or of text files a list with one text each."""
    import datasets

    kinds = {_kind(Path(file)) for file in files}
    if None in kinds:
        raise ValueError(f"one of {', '.join(_BUILDERS)} is expected, or of these with {', '.join(_COMPRESSED)} behind")
    if len(kinds) > 1:
        raise ValueError(f"files of one kind are expected, not of {', '.join(sorted(map(str, kinds)))}")
    for file in files:
        if Path(file).stat().st_size == 0:
            raise ValueError("it is empty")
    (kind,) = kinds
    if kind == "text":
        return [_text(Path(file)) for file in files]
    options = {"sep": "\t"} if all(".tsv" in Path(file).suffixes for file in files) else {}
    return datasets.load_dataset(kind, data_files=[str(file) for file in files], split="train", **options)


def as_dataset(data: Any, split: str, columns: Sequence[str]) -> Any:
    """Returns tables and splits as one dataset, a list of files as what they hold, and other data as they are.

    Args:
        data: a pandas or polars table, a dict of columns (what a tokenizer returns, too), a dict of splits, a list of files.
        split: of a dict of splits; "train+validation" joins two.
        columns: names by which a dict of columns is known.

    Raises:
        ValueError: a dict without these, or no such split.
    """
    library = type(data).__module__.split(".")[0]
    if library in _TABLES and hasattr(data, "columns"):
        import datasets

        options = {"preserve_index": False} if library == "pandas" else {}
        return getattr(datasets.Dataset, _TABLES[library])(data, **options)
    if library in _TABLES and hasattr(data, "to_list"):  # one column
        return data.to_list()
    if isinstance(data, Mapping):
        return _columns(data) if set(columns) & set(data) else _choose_split(data, split)
    if isinstance(data, (list, tuple)) and data and all(map(_is_file, data)):
        missing = [str(path) for path in data if not _exists(Path(path))]
        if missing:
            raise ValueError(f"calibration data {missing[0]!r} cannot be read: No such file or directory")
        return load_files(list(data)) if len(data) > 1 else load(data[0], split)
    return data


def _kind(path: Path) -> str | None:
    """Returns how a file is read, by its name."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return _BUILDERS.get(suffixes[-1]) if suffixes else None


def _is_file(entry: Any) -> bool:
    """Returns whether an entry of a list is the path of a file, not a text."""
    if isinstance(entry, Path):
        return True
    one_line = isinstance(entry, str) and len(entry) < 1024 and not set(entry) & set("\n\t")
    return one_line and _kind(Path(entry)) is not None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long to be one, or with a character that none has
        return False


def _text(path: Path) -> str:
    if path.suffix.lower() not in _COMPRESSED:
        return path.read_text(encoding="utf-8")
    opened = _COMPRESSED[path.suffix.lower()]
    if opened is None:
        raise ValueError("a text that is compressed by zstandard is not read; decompress it")
    with opened(path, "rt", encoding="utf-8") as file:
        return str(file.read())


def _columns(data: Mapping[str, Any]) -> Any:
    import datasets

    lists = {name: value.tolist() if hasattr(value, "tolist") else list(value) for name, value in data.items()}
    return datasets.Dataset.from_dict(lists)


def _choose_split(data: Mapping[str, Any], split: str) -> Any:
    import datasets

    wanted = split.split("+")
    if not all(name in data and hasattr(data[name], "features") for name in wanted):
        raise ValueError(
            f"data has splits {', '.join(map(str, data))}: choose one, data[{next(iter(data), 'train')!r}] or split=..."
        )
    parts = [data[name] for name in wanted]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def _load_folder(path: Path, split: str) -> Any:
    """Returns a dataset that `save_to_disk` wrote, or a folder of files as the Hub has them."""
    import datasets

    has_files = any(_kind(file) not in (None, "text") for file in path.rglob("*") if file.is_file())
    saved = (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()
    if saved or not has_files:
        dataset = datasets.load_from_disk(str(path))
        return _choose_split(dataset, split) if isinstance(dataset, Mapping) else dataset
    return datasets.load_dataset(str(path), split=split)


def _load_from_hub(source: str, split: str) -> Any:
    """Returns a stream of a Hub dataset, so that only what is read is downloaded; without a network, what is cached."""
    import datasets

    name, _, configuration = source.partition(":")
    arguments = {"path": name, "streaming": "[" not in split} | _SHORT_NAMES.get(name.lower(), {})
    if configuration:
        arguments["name"] = configuration
    try:
        if not arguments["streaming"]:
            return datasets.load_dataset(**arguments, split=split)
        parts = [datasets.load_dataset(**arguments, split=part) for part in split.split("+")]
        return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    except (ConnectionError, FileNotFoundError) as error:
        if (cached := _cached(arguments, split)) is not None:
            return cached
        raise ValueError(
            f"calibration data {source!r} are neither a local file nor a dataset that could be reached: {error}"
        ) from error
    except (datasets.exceptions.DatasetsError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"calibration data {source!r} cannot be loaded: {error}{_hint(error)}") from error


def _hint(error: BaseException) -> str:
    return "; write name:configuration for one of them" if "Config name is missing" in str(error) else ""


def _cached(arguments: Mapping[str, Any], split: str) -> Any:
    """Returns a Hub dataset that an earlier run downloaded and prepared; None if there is none."""
    import datasets

    where = {key: value for key, value in arguments.items() if key in ("path", "name", "data_files")}
    try:
        return datasets.load_dataset_builder(**where).as_dataset(split=split)
    except Exception:  # whatever it is, there is nothing to use
        return None


def column_of_texts(data: Any, name: str) -> Iterable[str]:
    """Returns the texts of a dataset's column that are not empty; `ValueError` where the column holds something else."""
    texts = [text for text in data[name] if text]
    if other := next((text for text in texts if not isinstance(text, str)), None):
        raise ValueError(f"the column {name!r} holds {type(other).__name__}s, not texts; name a text column")
    return texts
