"""What a Trainer's checkpoint says about the zeros that were held, and whether its weights were really loaded."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, TrainerState, TrainingArguments

from ..model.fingerprint import weights_fingerprint

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"


def saved_state(state: TrainerState, name: str) -> dict[str, Any]:
    """Returns what `SparsityCallback.state` wrote into a checkpoint, {} if the callback was not there."""
    entry: Any = cast(dict, state.stateful_callbacks or {}).get(name) or {}
    entry = entry[-1] if isinstance(entry, list) else entry
    saved = (entry.get("attributes") or {}).get("saved") or {}
    return dict(saved.get("masks", {}), **{k: v for k, v in saved.items() if k != "masks"})


def saved_in(folder: Path, name: str) -> dict[str, Any]:
    """Returns the same, read from a checkpoint's folder."""
    file = folder / STATE_FILE
    return saved_state(TrainerState.load_from_json(str(file)), name) if file.exists() else {}


def resumed_folder(args: TrainingArguments, state: TrainerState) -> Path | None:
    """Returns the folder of the checkpoint being resumed, or None.

    A callback is not told which it is, so what lies there is to be checked by its hash.
    """
    usual = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
    for folder in (args.resume_from_checkpoint, usual):
        if isinstance(folder, (str, os.PathLike)) and (Path(folder) / STATE_FILE).exists():
            return Path(folder)
    return None


@torch.no_grad()
def load_weights(model: PreTrainedModel, saved: Mapping[str, Any], folder: Path | None) -> None:
    """Loads the weights that the Trainer did not: it takes a checkpoint's keys as they are, which a MoE model renames.

    Raises:
        ValueError: the model's weights are not the checkpoint's, and cannot be found.
    """
    expected = saved.get("weights")
    if expected is None or weights_fingerprint(model) in (expected, None):
        return
    if folder is not None:
        logger.warning(
            "the Trainer did not load all weights of %s; they are loaded again as from_pretrained does", folder
        )
        fresh = type(model).from_pretrained(folder, dtype=model.dtype)
        model.load_state_dict(fresh.state_dict())
        del fresh
    if weights_fingerprint(model) != expected:
        raise ValueError(
            f"the model's weights are not those of the checkpoint ({folder or 'which was not found in output_dir'}): the "
            "Trainer does not load the experts of MoE models. Load the model from the checkpoint folder with "
            "from_pretrained, pass it to the Trainer, and resume"
        )
