"""How long sequences may be: the positions that a model has, read from its tables and its config."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..model.classes import text_config
from ..model.inference import Batch

LENGTH = 2048  # tokens of a calibration sequence and of a window by default, unless the model's limit is smaller

_TABLE = re.compile(r"(^|\.)(wpe|position_embeddings?|position_embedding|embed_positions)$")
_DECODER = ("max_target_positions", "max_position_embeddings", "n_positions", "max_seq_len")
_ENCODER = ("max_encoder_position_embeddings", *_DECODER)


def default_length(model: PreTrainedModel, tokenizer: Any = None) -> int:
    """Returns 2048 tokens, or the model's or tokenizer's limit if that is smaller."""
    limits = [LENGTH, position_limit(model), getattr(tokenizer, "model_max_length", None)]
    return min(int(limit) for limit in limits if limit)


def position_limit(model: PreTrainedModel, decoder: bool = True) -> int | None:
    """Returns how many tokens a sequence may have, or None where the model's positions have no end.

    Args:
        decoder: of an encoder-decoder, whether the decoder's or the encoder's positions are asked for.
    """
    of_encoder = not decoder and model.config.is_encoder_decoder
    config = model.config.get_text_config(encoder=True) if of_encoder else text_config(model.config)
    names = _ENCODER if of_encoder else _DECODER
    limits = [getattr(config, name, None) for name in names]
    limit = next((value for value in limits if isinstance(value, int) and value > 0), None)
    table = _table(model, decoder)
    return limit if table is None else table if limit is None else min(limit, table)


def check_length(model: PreTrainedModel, length: int, what: str = "sequences", decoder: bool = True) -> None:
    """Raises `ValueError` where sequences of this many tokens are longer than the model has positions."""
    limit = position_limit(model, decoder)
    if limit is None or length <= limit:
        return
    table = _table(model, decoder)
    more = "" if table is not None else ", or set config.max_position_embeddings if the model can do more"
    raise ValueError(
        f"{what} of {length} tokens are longer than the {limit} positions of {type(model).__name__}; give a length of at "
        f"most {limit}{more}"
    )


def check_positions(model: PreTrainedModel, batch: Batch, number: int) -> None:
    """Raises `ValueError` where a batch is longer than the model has positions; `position_ids` say which it uses."""
    two = getattr(model.config, "is_encoder_decoder", False)
    for name, decoder in (("decoder_input_ids", True), ("input_ids", not two)):
        ids = batch.get(name)
        if not isinstance(ids, Tensor):
            continue
        length = ids.shape[1]
        positions = batch.get("position_ids")
        if name == "input_ids" and isinstance(positions, Tensor) and not positions.is_floating_point():
            length = min(length, int(positions.max()) + 1)
        check_length(model, length, f"calibration batch {number}: {name}", decoder)


def _table(model: PreTrainedModel, decoder: bool) -> int | None:
    """Returns the positions that a learned table has room for; RoBERTa's begin after the padding token's."""
    sizes = []
    for name, module in model.named_modules():
        side = "encoder" if decoder else "decoder"
        if not isinstance(module, nn.Embedding) or not _TABLE.search(name) or f"{side}." in f"{name}.":
            continue
        if "vision" in name or "visual" in name or "audio" in name:
            continue
        offset = getattr(module, "offset", None) or (0 if module.padding_idx is None else module.padding_idx + 1)
        sizes.append(module.num_embeddings - int(offset))
    return min(sizes, default=None)
