"""Which rows of a layer's inputs are tokens, and which padding, in a training batch of a decoder, an encoder or both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..model.classes import text_config
from ..model.layers import Weight

_IGNORED = -100  # the label of what is no text, in all of transformers


class RealTokens:
    """Takes the padding out of what layers are given, while a model runs on one training batch.

    Args:
        body: the model that runs, with or without its head.
        batch: what it is given. Of an encoder-decoder the encoder's mask is `attention_mask`; the decoder's is
            `decoder_attention_mask`, or else where its labels are text, or its inputs are more than trailing padding.
    """

    def __init__(self, body: Any, batch: Mapping[str, Any]):
        self._mask = _mask(batch.get("attention_mask"))
        self._decoder_mask: Tensor | None = None
        self._encoder: Any = None
        self._encoded: tuple[int, torch.Size] | None = None  # the place and shape of what the encoder gave
        if body.config.is_encoder_decoder:
            self._encoder = body.get_encoder()
            self._in_encoder = set(map(id, self._encoder.modules()))
            self._decoder_mask = _decoder_mask(body, batch)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Notes where the encoder's output is, by which the inputs of cross-attention are known."""
        if self._encoder is None:
            yield
            return
        handle = self._encoder.register_forward_hook(self._note)
        try:
            yield
        finally:
            handle.remove()

    def _note(self, module: Any, args: Any, output: Any) -> None:
        states = output[0]
        self._encoded = states.data_ptr(), states.shape

    def rows(self, weight: Weight, inputs: Tensor) -> Tensor:
        """Returns the inputs of a layer as `[tokens, in]`, without padding where it can be told."""
        rows, mask = inputs.reshape(-1, inputs.shape[-1]), self._mask
        if self._encoder is not None and id(weight.module) not in self._in_encoder:
            of_encoder = (inputs.data_ptr(), inputs.shape) == self._encoded
            mask = self._mask if of_encoder else self._decoder_mask
        if mask is None or rows.shape[0] != mask.numel():
            return rows
        return rows[mask.reshape(-1).to(rows.device)]


def _mask(given: Any) -> Tensor | None:
    """Returns a mask `[sequences, tokens]` as booleans; None where there is none, or nothing is padding."""
    if not isinstance(given, Tensor) or given.ndim != 2 or bool(given.all()):
        return None
    return given.bool()


def _decoder_mask(body: Any, batch: Mapping[str, Any]) -> Tensor | None:
    given, labels, ids = (batch.get(name) for name in ("decoder_attention_mask", "labels", "decoder_input_ids"))
    if isinstance(given, Tensor):
        return _mask(given)
    if ids is None and isinstance(labels, Tensor) and labels.ndim == 2:
        real = labels != _IGNORED
        return _mask(torch.cat([torch.ones_like(real[:, :1]), real[:, :-1]], dim=1))  # the start token comes first
    pad = getattr(text_config(body.config), "pad_token_id", None)
    if pad is None or not isinstance(ids, Tensor) or ids.ndim != 2:
        return None
    behind = (ids == pad).long().flip(1).cumprod(dim=1).flip(1).bool()  # padding, and nothing else after it
    behind[:, 0] = False
    return _mask(~behind)
