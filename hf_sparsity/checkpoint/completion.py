"""The last step of every way of writing a model: the folder has all that its source has, and loads completely.

Small files and tensors that the model's class has no place for come from the source. Then the class tries to load what
was written; only a folder that it loads completely counts as finished.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..files import read_json, write_json
from ..plan import Report
from .atomic import write_tensors
from .conversion import some, targets
from .safetensors_index import DTYPES, NAMES, Stored, read_headers
from .source import Source, group_of, try_loading
from .transformers_internals import conversions_of, revert_weight_conversion, set_conversions

logger = logging.getLogger(__name__)

# Config entries that count layers for the prediction of further tokens, which transformers' classes do not have.
_FURTHER_TOKENS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "num_mtp_modules")
_TOKENIZER = {"tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json"}
_TEMPLATES = {"chat_template.jinja", "chat_template.json", "additional_chat_templates"}


def check_writable(model: PreTrainedModel) -> None:
    """Raises ValueError for a model whose files, once written, would not load completely. Writes nothing.

    Loaders that convert (MXFP4 or FP8 weights made bf16) leave conversions behind that would not write what they read;
    these are forgotten, so that the model is written as one that was never quantized.
    """
    forget_dequantization(model)
    if getattr(model, "hf_quantizer", None) is not None:
        return  # its own quantizer writes it
    state = {name: torch.empty_like(tensor, device="meta") for name, tensor in model.state_dict().items()}
    try:
        named = revert_weight_conversion(model, state)
        written = {n: Stored("", 0, 0, NAMES.get(t.dtype, str(t.dtype)), tuple(t.shape)) for n, t in named.items()}
        missing = try_loading(model, written).missing
    except (ValueError, RuntimeError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError) as error:
        raise ValueError(f"{_refusal(model)} ({type(error).__name__}: {error})") from error
    if missing:
        raise ValueError(f"{_refusal(model)} (it would lack {len(missing)} tensors: {some(missing)})")


def _refusal(model: PreTrainedModel) -> str:
    return (
        f"this {type(model).__name__} cannot be written in a form that loads again. Convert its checkpoint to an "
        "ordinary one in bfloat16 first, load that and prune it"
    )


def forget_dequantization(model: PreTrainedModel) -> None:
    """Forgets conversions that a quantizer added while it made ordinary weights of quantized ones."""
    used = conversions_of(model)
    if used and any(_is_quantizers(operation) for c in used for operation in getattr(c, "operations", ())):
        set_conversions(model, None)


def _is_quantizers(operation: Any) -> bool:
    return any(part in type(operation).__module__ for part in (".integrations.", ".quantizers."))


def complete(
    folder: Path,
    model: PreTrainedModel,
    source: Source | None,
    *,
    weights: Path | None = None,
    tokenizer: Any = None,
) -> None:
    """Makes a folder of dense files complete, and checks it.

    Args:
        folder: has the config of `model`.
        source: what the model was loaded from, see `find_source`.
        weights: the folder that has the weights; by default the same.
        tokenizer: saved in the folder; the source's own tokenizer files are carried over only if it is that one.

    Raises:
        RuntimeError: the folder does not load completely, or lacks tensors of the source.
    """
    weights = weights or folder
    stored = _headers(weights)
    if source is not None:
        files = source.copy_files(folder, leave=_other_tokenizer(source, tokenizer))
        if files:
            logger.info("carried over from %s: %s", source.folder, ", ".join(files))
        if not source.extra <= stored.keys():
            _add_shard(weights, {name: tensor for name, tensor in source.tensors() if name not in stored})
            stored = _headers(weights)
        for what, note in _notes(source, model).items():
            logger.warning("%s: %s", what, note)
    _check(weights, model, stored, source)
    _correct_config(folder, stored)


def with_notes(report: Report, model: PreTrainedModel, source: Source | None) -> Report:
    """Returns a report whose `skipped` also names the tensors that the model's class does not know, and files left out."""
    notes = _notes(source, model) if source is not None else {}
    return dataclasses.replace(report, skipped={**report.skipped, **notes}) if notes else report


def _headers(folder: Path) -> dict[str, Stored]:
    return read_headers(map(str, folder.glob("model*.safetensors")))


def _other_tokenizer(source: Source, tokenizer: Any) -> set[str]:
    """Returns the source's tokenizer files if the folder has another tokenizer, which they would contradict."""
    if tokenizer is None or str(getattr(tokenizer, "name_or_path", "")) in ("", str(source.folder)):
        return set()
    if getattr(tokenizer, "name_or_path", None) and Path(tokenizer.name_or_path).resolve() == source.folder.resolve():
        return set()
    return {*_TOKENIZER, *_TEMPLATES, *getattr(tokenizer, "vocab_files_names", {}).values()}


def _notes(source: Source, model: PreTrainedModel) -> dict[str, str]:
    """Returns a note for each layer or module of tensors that the class has no place for, and for files left out."""
    kind = type(model).__name__
    carried = {
        group: f"unknown to {kind}; its {count} tensor{'s' * (count > 1)} carried over as they are"
        for group, count in _grouped(source.extra)
    }
    lost = {
        group: f"unknown to {kind}; its {count} tensor{'s' * (count > 1)} left out, since they are quantized"
        for group, count in _grouped(source.lost)
    }
    return {**carried, **lost, **source.left_out()}


def _grouped(names: Iterable[str]) -> list[tuple[str, int]]:
    return sorted(Counter(map(group_of, names)).items())


def _check(folder: Path, model: PreTrainedModel, stored: Mapping[str, Stored], source: Source | None) -> None:
    """Raises RuntimeError unless the model's class loads the files completely, and nothing of the source is lost."""
    try:
        loading = try_loading(model, stored)
    except ValueError as error:
        raise RuntimeError(f"what was written to {folder} does not load: {error}") from error
    if loading.missing:
        raise RuntimeError(
            f"what was written to {folder} lacks {len(loading.missing)} tensors of the model: {some(loading.missing)}"
        )
    extra = source.extra if source is not None else frozenset()
    if strange := loading.unused - extra:
        raise RuntimeError(
            f"what was written to {folder} has {len(strange)} tensors that {type(model).__name__} does not load and "
            f"that its source does not have: {some(strange)}"
        )
    if source is not None and (lost := missing_in(model, source.stored, stored)):
        raise RuntimeError(
            f"what was written to {folder} lacks {len(lost)} tensors of {source.folder}: {some(lost)}. "
            "Please report this with the type of the model"
        )


def missing_in(model: PreTrainedModel, source: Mapping[str, Any], output: Mapping[str, Any]) -> set[str]:
    """Returns the names in `source` that `output` has neither as they are nor as what the model makes of them.

    A tensor that is tied to another is stored once, so it counts as there if the other is.
    """
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    uses = targets(model, {**dict.fromkeys(source), **dict.fromkeys(output)})
    there = {uses.get(name, name) for name in output}
    there |= {name for pair in tied.items() if there & set(pair) for name in pair}
    return {name for name in source if uses.get(name, name) not in there and uses.get(name, name) not in ignored}


def _add_shard(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Adds a weight file to a folder; the others are renamed, since their names say how many there are."""
    single, index_file = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if single.exists():
        files = [single]
    else:
        files = sorted({folder / name for name in read_json(index_file)["weight_map"].values()})
    weight_map: dict[str, str] = {}
    size = 0
    names = [f"model-{number:05d}-of-{len(files) + 1:05d}.safetensors" for number in range(1, len(files) + 2)]
    for file, name in zip(files, names, strict=False):
        file.rename(folder / name)
    write_tensors(folder / names[-1], {n: t.contiguous() for n, t in tensors.items()}, {"format": "pt"})
    for name in names:
        for tensor, place in read_headers([str(folder / name)]).items():
            weight_map[tensor] = name
            size += torch.Size(place.shape).numel() * DTYPES[place.dtype].itemsize
    write_json(index_file, {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))})


def _correct_config(folder: Path, stored: Mapping[str, Stored]) -> None:
    """Makes the number of layers that predict further tokens 0 in a config whose folder has no such layers."""
    config = read_json(folder / CONFIG_NAME)
    changed = False
    for part in (config, config.get("text_config")):
        if not isinstance(part, dict) or _predicts_further(stored, part.get("num_hidden_layers")):
            continue
        for key in _FURTHER_TOKENS:
            if isinstance(part.get(key), int) and part[key]:
                logger.warning("%s was %d in the config; no such layers are there, so it is 0 now", key, part[key])
                part[key], changed = 0, True
    if changed:
        write_json(folder / CONFIG_NAME, config)


def _predicts_further(stored: Mapping[str, Stored], layers: Any) -> bool:
    """Returns whether there are tensors of layers after the last one, or with MTP in their name."""
    numbers = (int(match[1]) for name in stored if (match := re.search(r"layers\.(\d+)\.", name)))
    return any("mtp" in name.lower() for name in stored) or any(
        isinstance(layers, int) and n >= layers for n in numbers
    )
