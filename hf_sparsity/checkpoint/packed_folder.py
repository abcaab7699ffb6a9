"""The packed layout of a model folder: reading it, checking it, and rewriting folders to and from it, file by file.

A packed folder is a model folder in which

* the weights stand in `sparse.safetensors`, or `sparse-00001-of-0000N.safetensors` with
  `sparse.safetensors.index.json`. A pruned matrix has the name it always had, as the byte string of
  `checkpoint/bitmask/codec.py`; all other tensors are as usual. Each file's metadata carry the checksums of those others;
* `config.json` has a `quantization_config` that names the method, the layout's version, the weights file and the
  SHA-256 of each file's header. So nothing that is read is unchecked: config -> headers (names, shapes, places,
  checksums) -> tensors;
* `config.json` has, as `transformers_weights`, a sentence that says what is needed to load the folder. Without
  this package transformers takes it for a file name and raises an error that quotes it. With it, the quantizer
  of `quantizer.py` puts the real name there.

Which tensors are packed is decided by what is in them: every floating-point matrix that becomes shorter. That needs
no table of how each architecture names its experts on disk.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import is_inside
from ..plan import LARGEST_FILE, Plan, read_json, write_json
from .bitmask import codec
from .bitmask.bits import GROUPS

LAYOUT_ENTRIES = ("quantization_config", "transformers_weights")  # of a config: how the weights beside it are stored

logger = logging.getLogger(__name__)

METHOD, LAYOUT, VERSION = "hf_sparsity", "bitmask", 1
CHECKS = "hf_sparsity_checksums"  # in a file's metadata: {tensor: checksum}, of what is not packed
HOW_TO_LOAD = "this folder is packed; to load it, `pip install hf_sparsity` and `import hf_sparsity` first"
_SHARD = re.compile(r"(model|sparse)(-\d{5,6}-of-\d{5,6})?\.safetensors")
_TENSOR = re.compile(r"[\w.:/@+-]+")  # transformers makes regular expressions of names
_WEIGHTS = re.compile(r"(model|sparse|pytorch_model)[^/]*\.(safetensors|bin)(\.index\.json)?")


def check_layout(layout: Any) -> None:
    """Raises ValueError unless `layout` is 'dense' or 'bitmask'."""
    if layout not in ("dense", "bitmask"):
        raise ValueError(f"layout {layout!r} is unknown; use 'dense' or 'bitmask'")


def check_worth(plan: Plan, dtype: torch.dtype) -> None:
    """Raises ValueError when no layer of a plan is so sparse that a mask takes less room than the zeros."""
    if all(layer.sparsity * dtype.itemsize * 8 <= 1 for layer in plan.layers.values()):
        raise ValueError(f"a sparsity of {plan.sparsity:.4f} leaves nothing worth packing: use layout='dense'")


def check_description(described: Any) -> dict[str, Any]:
    """Returns the `quantization_config` of a packed folder. Raises ValueError that says what is wrong with it."""
    if not isinstance(described, Mapping) or described.get("quant_method") != METHOD:
        raise ValueError("this folder is not packed by hf_sparsity: its config.json has no such quantization_config")
    if described.get("layout") != LAYOUT or described.get("version") != VERSION:
        raise ValueError(
            f"packed folder: layout {described.get('layout')!r} version {described.get('version')!r}; this release of "
            f"hf_sparsity reads {LAYOUT!r} version {VERSION}"
        )
    files, single = described.get("files"), described.get("weights_file") == "sparse.safetensors"
    if not isinstance(files, Mapping) or not files or (single and list(files) != ["sparse.safetensors"]):
        raise ValueError("packed folder: quantization_config has no list of its files")
    if not single and described.get("weights_file") != "sparse.safetensors.index.json":
        raise ValueError(f"packed folder: {described.get('weights_file')!r} is not the name of packed weights")
    for name, digest in files.items():
        check_name(name, "sparse")
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise ValueError(f"packed folder: quantization_config has no checksum for {name}")
    return {key: described[key] for key in ("quant_method", "layout", "version", "weights_file", "files")}


def is_dense(folder: Path, described: Mapping[str, Any]) -> bool:
    """Returns whether a folder whose config describes a packed one has only dense files.

    transformers' `save_pretrained` writes that of a new model whose config was taken from a packed folder.
    """
    dense = any((folder / f"model.safetensors{end}").is_file() for end in ("", ".index.json"))
    return dense and not any((folder / name).exists() for name in (described["weights_file"], *described["files"]))


def check_index(folder: Path, described: Mapping[str, Any]) -> None:
    """Raises ValueError when a packed folder has an index that is damaged or names other files than its config."""
    index = folder / described["weights_file"]
    if not index.name.endswith(".json") or not index.is_file():
        return
    weight_map = read_json(index)
    weight_map = weight_map.get("weight_map") if isinstance(weight_map, dict) else None
    named = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
    if named != set(described["files"]):
        raise ValueError(f"{index}: the index names {sorted(named)[:3]}, config.json {sorted(described['files'])[:3]}")


def check_headers(files: list[Path], described: Mapping[str, Any]) -> None:
    """Checks that these are the files that the config was written for, by their names and headers.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: other files, or a damaged header.
    """
    if sorted(file.name for file in files) != sorted(described["files"]) or len({f.parent for f in files}) > 1:
        raise ValueError(
            f"packed folder: the index names {sorted(str(f) for f in files)[:3]}, config.json {sorted(described['files'])[:3]}"
        )
    for file in files:
        if header_digest(file) != described["files"][file.name]:
            raise ValueError(f"{file}: the header is not the one that config.json was written for; it is damaged")


def check_tensors(files: list[Path]) -> dict[str, bool]:
    """Checks the tensors that are not packed; the packed ones are checked when they are unpacked.

    Returns:
        {tensor: whether it is packed}.

    Raises:
        ValueError: a tensor or a name is damaged.
    """
    packed: dict[str, bool] = {}
    for file in files:
        with opened_file(file) as tensors:
            checks = checksums(tensors)
            for name in tensors.keys():  # noqa: SIM118  (not a dict)
                if name in packed or not _TENSOR.fullmatch(name):
                    raise ValueError(f"{file}: {name!r} is in another file, too, or no name of a tensor")
                packed[name] = name not in checks
                if name in checks and codec.checksum(tensors.get_tensor(name)) != checks[name]:
                    raise ValueError(f"{file}: {name} is damaged; its checksum is wrong")
    return packed


def header_digest(file: Path) -> str:
    """Returns the SHA-256 of a safetensors file's header. Raises ValueError when it is longer than the file or 64 MiB."""
    with file.open("rb") as stream:
        size = stream.read(8)
        length = int.from_bytes(size, "little")
        if len(size) < 8 or length > min(LARGEST_FILE, file.stat().st_size):
            raise ValueError(f"{file} is cut short or not a safetensors file: its header claims {length} bytes")
        return hashlib.sha256(size + stream.read(length)).hexdigest()


def checksums(tensors: Any) -> dict[str, str]:
    """Returns {tensor: checksum} of the tensors that a file stores dense. Raises ValueError when its metadata have none."""
    try:
        checks = json.loads((tensors.metadata() or {}).get(CHECKS, "{}"))
    except RecursionError:
        checks = None
    if not isinstance(checks, dict):
        raise ValueError(f"packed folder: the metadata of a weight file have no {CHECKS}")
    return checks


@contextmanager
def opened_file(file: Path) -> Iterator[Any]:
    """Opens a safetensors file. Raises ValueError when it is damaged."""
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from None


def check_name(name: Any, stem: str) -> None:
    """Raises ValueError unless this is a plain name of a weight file, so that no index can point outside its folder."""
    match = _SHARD.fullmatch(name) if isinstance(name, str) else None
    if match is None or match[1] != stem:
        raise ValueError(f"{name!r} is not the name of a weight file of this folder ({stem}*.safetensors)")


def read_config(folder: Path) -> dict[str, Any]:
    """Returns the folder's `config.json` as a dict."""
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'config.json'} is not a JSON object")
    return config


def refuse_unless_prunable(config: Mapping[str, Any]) -> Plan:
    """Returns the plan of a config whose model can be packed. Raises ValueError for all others."""
    quantized = config.get("quantization_config")
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, Mapping) else quantized
        if method == METHOD:
            raise ValueError("this folder is packed already; unpack() makes it dense")
        raise ValueError(
            f"the model is quantized by {method!r}; a checkpoint has one such format, so it cannot be packed. "
            "Save it dense: the zeros stay, and the quantized values are stored by their own method"
        )
    if config.get("sparsity_config") is None:
        raise ValueError("config.json has no sparsity plan: prune the model first (hf_sparsity.prune)")
    return Plan.from_dict(config["sparsity_config"])


def pack_into(folder: Path, output: Path, *, consume: bool = False) -> None:
    """Writes the packed layout of a dense folder into a folder that exists.

    `consume`: each dense file is removed once it is packed. Raises ValueError when nothing is worth packing.
    """
    config = read_config(folder)
    groups = groups_of(refuse_unless_prunable(config))
    sources = dense_files(folder)
    files, total = write_shards(
        sources, output, "sparse", lambda tensor, name, checks: shortest(tensor, groups), consume=consume
    )
    if not total:
        raise ValueError(f"{folder} has no weights with enough zeros to be worth packing")
    copy_other_files(folder, output, sources)
    write_description(output, config, files)


def groups_of(plan: Plan | None) -> list[tuple[int, int]]:
    """Returns the (N, M) that a plan names and codes exist for."""
    named = {layer.pattern for layer in plan.layers.values()} - {"unstructured"} if plan is not None else set()
    pairs = [tuple(int(n) for n in pattern.split(":")) for pattern in sorted(named) if pattern[0] != "*"]
    return [(kept, group) for kept, group in pairs if group in GROUPS and kept < group]


def write_description(output: Path, config: dict[str, Any], files: list[Path]) -> None:
    """Writes the `config.json` of a packed folder: `config`, and what there is to know of its weight files."""
    config["transformers_weights"] = HOW_TO_LOAD
    config["quantization_config"] = {
        "quant_method": METHOD,
        "layout": LAYOUT,
        "version": VERSION,
        "weights_file": "sparse.safetensors" + (".index.json" if len(files) > 1 else ""),
        "files": {file.name: header_digest(file) for file in files},
    }
    write_json(output / "config.json", config)


def repack_into(folder: Path, output: Path) -> None:
    """Writes the packed layout of a folder whose dense files hold packed matrices among others, as plain saving leaves them."""
    config = read_config(folder)
    stored = config.get("sparsity_config")
    groups = groups_of(None if stored is None else Plan.from_dict(stored))

    def convert(tensor: Tensor, name: str, checks: Mapping[str, str]) -> tuple[Tensor, bool]:
        return (tensor, True) if is_packed(tensor) else shortest(tensor, groups)

    sources = dense_files(folder)
    files, _ = write_shards(sources, output, "sparse", convert)
    copy_other_files(folder, output, sources)
    write_description(output, config, files)


def is_packed(tensor: Tensor) -> bool:
    """Returns whether a tensor of a checkpoint is a packed matrix."""
    return tensor.dtype == torch.uint8 and tensor.ndim == 1


def dense_files(folder: Path) -> list[Path]:
    """Returns the weight files of a dense folder, in order."""
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        raise FileNotFoundError(f"{folder} has neither model.safetensors nor model.safetensors.index.json")
    weight_map = read_json(index)
    weight_map = weight_map.get("weight_map") if isinstance(weight_map, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        check_name(name, "model")
    return [folder / name for name in names]


def shortest(tensor: Tensor, groups: list[tuple[int, int]]) -> tuple[Tensor, bool]:
    """Returns (what to store, whether it is packed): the shortest of dense, bitmask and N:M codes along either axis.

    `groups`: the (N, M) that the plan names.
    """
    if not tensor.is_floating_point() or tensor.ndim not in (2, 3) or not tensor.numel():
        return tensor, False
    if tensor.dtype not in codec.DTYPES or codec.packed_bytes(tensor) >= tensor.nbytes:
        return tensor, False
    coded = [packed for group in groups if (packed := _coded(tensor, group)) is not None]
    return min(coded, key=len) if coded else codec.pack(tensor), True


def _coded(tensor: Tensor, group: tuple[int, int]) -> Tensor | None:
    """Returns the tensor in the code of (N, M), along the axis that has the pattern; None where a bitmask is shorter."""
    for swapped in (False, True):
        if tensor.shape[-2 if swapped else -1] % group[1] == 0:
            packed = codec.pack(tensor, group=group, swapped=swapped)
            if codec.read_header(packed).group:
                return packed
    return None


def unpack_tensor(tensor: Tensor, name: str, checks: Mapping[str, str]) -> tuple[Tensor, bool]:
    """Returns (the dense tensor, whether it was packed). `checks`: checksums of the tensors that are stored dense."""
    if name in checks:
        return tensor, False
    try:
        return codec.unpack(tensor), True
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def write_shards(
    sources: list[Path], output: Path, stem: str, convert: Any, *, consume: bool = False
) -> tuple[list[Path], int]:
    """Converts file by file, and writes an index when there are several.

    `convert`: (tensor, name, checksums of the file) -> (what to store, whether it was converted). `stem`: of the new
    names, "model" or "sparse". `consume`: each source is removed once it is converted.

    Returns:
        (the new files, the number of tensors that were converted).
    """
    files, changed, weight_map, size, count = [], 0, {}, 0, 0
    for number, source in enumerate(sources, 1):
        name = f"{stem}-{number:05d}-of-{len(sources):05d}.safetensors" if len(sources) > 1 else f"{stem}.safetensors"
        stored, checks = {}, {}
        with opened_file(source) as tensors:
            recorded = checksums(tensors)
            for key in tensors.keys():  # noqa: SIM118  (not a dict)
                if key in weight_map:
                    raise ValueError(f"{source}: {key} is in another file, too")
                stored[key], converted = convert(tensors.get_tensor(key), key, recorded)
                changed += converted
                if not converted:
                    checks[key] = codec.checksum(stored[key])
                weight_map[key] = name
                size += stored[key].nbytes
                count += stored[key].numel()
            # One entry: safetensors writes several in a random order, and the same weights shall be the same bytes.
            metadata = {CHECKS: json.dumps(checks)} if stem == "sparse" else {"format": "pt"}
            save_file(stored, output / name, metadata=metadata)
        if consume:
            source.unlink()
        files.append(output / name)
    if len(files) > 1:
        total = {"total_size": size} if stem == "sparse" else {"total_parameters": count, "total_size": size}
        write_json(output / f"{stem}.safetensors.index.json", {"metadata": total, "weight_map": weight_map})
    return files, changed


def other_files(folder: Path, weights: Iterable[Path]) -> list[Path]:
    """Returns the paths of all files and folders beside weights and config: tokenizer, generation config, report, card.

    `weights`: the files that the model is loaded from. A warning names other weight files, and links that leave the
    folder: neither is among the result.
    """
    others = []
    used = {"config.json", *(file.name for file in weights)}
    used |= {f"{stem}.safetensors.index.json" for stem in ("model", "sparse")}
    for item in sorted(folder.iterdir()):
        if item.name in used or item.name.startswith("."):
            continue
        if _WEIGHTS.fullmatch(item.name):
            logger.warning("%s is left out: it is none of the weight files that the model is loaded from", item)
        elif any(not is_inside(path, folder) for path in (item, *item.rglob("*"))):
            logger.warning("%s is left out: it is, or has, a link that leaves its folder", item)
        else:
            others.append(item)
    return others


def copy_other_files(folder: Path, output: Path, weights: Iterable[Path]) -> None:
    """Copies what `other_files` finds."""
    for item in other_files(folder, weights):
        if item.is_dir():
            shutil.copytree(item, output / item.name)
        else:
            shutil.copyfile(item, output / item.name)
