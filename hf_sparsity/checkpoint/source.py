"""What a model's source has beside the tensors that its class knows: small files, and tensors the class has no place for.

A folder that is written has all of it, or names what was left out; `completion.py` sees to that.
"""

from __future__ import annotations

import copy
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file

from ..files import is_inside, read_json
from ..model.offload import weight_store
from .conversion import rehearse, some, targets, twin_of
from .locate import find_stored
from .safetensors_index import Stored, find_files, opened, read_headers
from .streamed import StreamedWeights

logger = logging.getLogger(__name__)

# Files of weights in any library's format, and folders that hold copies of them.
_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|pkl|pickle|h5|msgpack|gguf|ggml|onnx|onnx_data|ot|npz|tflite|mlmodel|zip)"
    r"|.*\.(safetensors|bin|h5|msgpack)\.index\.json"
)
_COPIES = {"original", "onnx", "openvino", "gguf", "coreml", "metal"}
# Files that are about one folder: its config, its card, and what we record of a sparse model.
_OF_ONE_FOLDER = re.compile(r"\..*|config\.json|README\.md|sparsity_.*|plan\.json|adapter_config\.json|UNFINISHED")
# Files that the Trainer, tests and file managers leave beside a model, and that are no part of it.
LEFTOVERS = re.compile(
    r"\..*|__pycache__|checkpoint-\d+|runs|logs|wandb|trainer_state\.json|training_args\.bin|"
    r"(optimizer|scheduler|scaler)\.(pt|bin)|rng_state.*\.pth"
)
LEFT_OUT = "other weights, which the model is not loaded from: not carried over, since they are not pruned"
LARGEST_SMALL_FILE = 256 * 2**20  # bytes; the largest tokenizers have 40 MB


@dataclass(frozen=True)
class Source:
    """The folder that a model was loaded from.

    Attributes:
        folder: a local folder, or the snapshot in the Hub's cache.
        stored: name -> place of all tensors there; empty if they are in another format or quantized.
        extra: names of the tensors that the model's class has no place for.
        lost: names of such tensors that are not carried over, since they are quantized and the model is not.
    """

    folder: Path
    stored: Mapping[str, Stored] = field(repr=False)
    extra: frozenset[str]
    lost: frozenset[str] = frozenset()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the tensors that the class has no place for, as they are stored."""
        with opened(self.stored, sorted(self.extra)) as slices:
            for name, part in slices.items():
                yield name, part if isinstance(part, Tensor) else part[...]

    def left_out(self) -> dict[str, str]:
        """Returns the files and folders of other weights, which are not carried over -> the reason."""
        used = {Path(place.file).name for place in self.stored.values()}
        left: dict[str, str] = {}
        modules = self._modules
        for path in sorted(self.folder.iterdir()) if used else ():
            if LEFTOVERS.fullmatch(path.name) or path.name in used or path.name.endswith(".index.json"):
                continue
            inside = path.rglob("*") if path.is_dir() and path.name not in modules else [path]
            if any(_WEIGHTS.fullmatch(each.name) for each in inside):
                left[path.name + "/" * path.is_dir()] = LEFT_OUT
        return left

    @property
    def _modules(self) -> set[str]:
        """The subfolders that sentence-transformers' list of modules names: their weights belong to the model."""
        file = self.folder / "modules.json"
        listed = read_json(file) if file.is_file() else []
        paths = (
            {module.get("path") for module in listed if isinstance(module, dict)} if isinstance(listed, list) else set()
        )
        return {path for path in paths if isinstance(path, str) and path}

    def small_files(self) -> Iterator[Path]:
        """Yields the paths, relative to the folder, of all files that are no weights of the model and not about the folder."""
        yield from self._walk(self.folder, self._modules)

    def _walk(self, folder: Path, modules: Collection[str], is_module: bool = False) -> Iterator[Path]:
        for path in sorted(folder.iterdir()):
            top = folder == self.folder
            if LEFTOVERS.fullmatch(path.name) or (top and _OF_ONE_FOLDER.fullmatch(path.name)):
                continue
            if not is_inside(path, self.folder):
                logger.warning("%s is a link that leaves its folder; it is not carried over", path)
            elif path.is_dir():
                if path.name not in _COPIES and not path.is_symlink():
                    yield from self._walk(path, modules, is_module or (top and path.name in modules))
            elif _WEIGHTS.fullmatch(path.name) and not (is_module and path.suffix == ".safetensors"):
                continue
            elif path.stat().st_size <= LARGEST_SMALL_FILE:
                yield path.relative_to(self.folder)

    def copy_files(self, output: Path, *, leave: Collection[str] = ()) -> list[str]:
        """Copies the small files that a folder lacks; returns their names. `leave`: first parts of paths to leave out."""
        copied = []
        for name in self.small_files():
            target = output / name
            if name.parts[0] in leave or target.exists():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / name, target)
            copied.append(name.as_posix())
        return copied


def find_source(model: PreTrainedModel) -> Source | None:
    """Returns what a model was loaded from; None where that is not known, or is no longer what the model is.

    A streamed model knows. For a model in memory it is the name in its config, if that is a folder here (or in the Hub's
    cache) whose config is of the same type and whose tensors the model's class loads: all are there, with their shapes.
    """
    streamed = weight_store(model)
    if isinstance(streamed, StreamedWeights):
        return Source(streamed.folder, streamed.source, frozenset(streamed.source.keys() - streamed.used))
    folder = _folder(model)
    if folder is None:
        return None
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError):  # of a type that needs its own code: the folder is read by its files alone
        config = None
    if config is not None and config.model_type != model.config.model_type:
        return None
    try:
        stored = find_stored(folder, copy.deepcopy(config or model.config), {})
    except (OSError, ValueError) as error:  # quantized, or no safetensors
        logger.info("the tensors of %s are not compared with the model's: %s", folder, error)
        return Source(folder, {}, frozenset(), _unknown_groups(model, folder))
    try:
        loaded = try_loading(model, stored)
    except ValueError as error:
        logger.info("%s is not taken for the model's source: %s", folder, error)
        return None
    if loaded.missing:
        logger.info("%s is not taken for the model's source: it lacks %s", folder, some(loaded.missing))
        return None
    return Source(folder, stored, loaded.unused)


def group_of(name: str) -> str:
    """Returns what a tensor belongs to: its layer, or the module that has it."""
    match = re.match(r"(.*?\.\d+)\.", name)
    return match[1] if match else name.rpartition(".")[0] or name


def _unknown_groups(model: PreTrainedModel, folder: Path) -> frozenset[str]:
    """Returns the tensors of a quantized checkpoint that belong to layers of which the model's class has none at all.

    Of the other layers it has tensors that only the quantization needs, such as scales.
    """
    try:
        stored = read_headers(find_files(folder, None, {}))
        known = {group_of(name) for name in targets(twin_of(model), stored)}
    except Exception as error:  # a class of anybody's, or files of another format
        logger.info("the tensors of %s are not looked at: %s", folder, error)
        return frozenset()
    return frozenset(name for name in stored if group_of(name) not in known)


def _folder(model: PreTrainedModel) -> Path | None:
    config: Any = model.config
    name = model.name_or_path or getattr(config, "_name_or_path", None)
    if not name:
        return None
    if os.path.isdir(name):
        return Path(name) if (Path(name) / CONFIG_NAME).is_file() else None
    revision = getattr(config, "_commit_hash", None)
    try:
        file = cached_file(name, CONFIG_NAME, revision=revision, local_files_only=True)
    except (OSError, ValueError):
        return None
    return Path(file).parent if file else None


@dataclass(frozen=True)
class Loading:
    """What the class of a model would say of tensors: names in the model that are `missing`, tensors that are `unused`."""

    missing: frozenset[str] = frozenset()
    unused: frozenset[str] = frozenset()


def try_loading(model: PreTrainedModel, stored: Mapping[str, Stored]) -> Loading:
    """Has a model of the same class and config without memory load these tensors, without their values.

    A quantized model, or one whose class cannot be made from its config alone, is not tried: nothing is missing then.

    Raises:
        ValueError: tensors of another shape than the config says, or that cannot be converted.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        return Loading()
    try:
        twin = twin_of(model)
    except Exception as error:  # a class of anybody's
        logger.info("loading is not tried: %s cannot be made from its config (%s)", type(model).__name__, error)
        return Loading()
    missing = rehearse(twin, stored)
    tied = set(getattr(twin, "all_tied_weights_keys", None) or {})
    return Loading(
        missing=frozenset(missing - tied - set(_matching(missing, twin, "_keys_to_ignore_on_load_missing"))),
        unused=frozenset(stored.keys() - targets(twin, stored).keys()),
    )


def _matching(names: Iterable[str], model: PreTrainedModel, attribute: str) -> list[str]:
    """Returns the names that one of the class's lists of patterns means."""
    patterns = getattr(model, attribute, None) or ()
    return [name for name in names if any(re.search(pattern, name) for pattern in patterns)]
