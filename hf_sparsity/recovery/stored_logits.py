"""A teacher's answers computed once: the likeliest tokens of every prediction, in a folder of safetensors.

Training reads them instead of running the teacher, which then needs no memory and no time. A sequence is found by the hash
of its token ids, so that order, batches, padding and epochs do not matter. Each file holds, of up to `SHARD` sequences,
`keys` uint8 `[n, 16]`, `lengths` int64 `[n]`, and of their tokens in a row `log_probabilities` float16 `[tokens, k]`, `tokens`
int32 `[tokens, k]` and `rest` float16 `[tokens]`: 6 k + 2 bytes a token.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..calibration.batches import prepare_batches
from ..checkpoint.atomic import write_tensors
from ..model.classes import text_config
from ..model.fingerprint import weights_fingerprint
from ..model.inference import evaluating
from ..model.offload import input_device
from ..validation import check_number
from .top_k import TopK, top_k_of

SHARD = 256  # sequences in a file
BATCH = 8  # sequences of equal length that the teacher reads at a time
FORMAT = "hf_sparsity.logits.1"


def store_logits(
    teacher: Any,
    batches: Tensor | Iterable[Mapping[str, Any]],
    folder: str | os.PathLike[str],
    *,
    top_k: int = 64,
    temperature: float = 1.0,
) -> StoredLogits:
    """Computes a teacher's likeliest tokens for every prediction of a text, and stores them in a folder.

        store_logits(dense, ids, "answers", top_k=64)
        SparsityCallback(teacher=Teacher("answers")).add_to(trainer)

    Interrupted, it goes on when it is called again; more sequences are added the same way, and what is there stays.

    Args:
        teacher: a causal language model, in memory, dispatched or from `open_streamed`.
        batches: token ids `[n, t]`, or an iterable of the model's inputs; padding is left out.
        folder: a new folder, or one with answers of the same teacher, `top_k` and `temperature`.
        top_k: tokens to keep of each prediction.
        temperature: by which the distributions are softened; training has to use the same.

    Raises:
        ValueError: a folder with answers of another teacher or with other settings, or bad batches.
    """
    check_number("top_k", top_k, "[1, inf)", whole=True)
    check_number("temperature", temperature, "(0, inf)")
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    size = getattr(text_config(teacher.config), "vocab_size", None)
    streamed = any(parameter.device.type == "meta" for parameter in teacher.parameters())
    record = {
        "format": FORMAT,
        "top_k": str(top_k),
        "temperature": repr(float(temperature)),
        "vocabulary": str(size),
        "teacher": str(None if streamed else weights_fingerprint(teacher)),
    }
    done = StoredLogits(path, empty_ok=True)
    if done.record and done.record != record:
        different = ", ".join(key for key in record if done.record.get(key) != record[key])
        raise ValueError(f"{path} holds the answers of another teacher or with other settings: {different} differ")
    wanted = {}
    for batch in prepare_batches(teacher, batches):
        for row in batch["input_ids"]:
            if (key := key_of(row)) not in done:
                wanted[key] = row
    number = len(list(path.glob("logits-*.safetensors")))
    rows = list(wanted.items())
    for start in range(0, len(rows), SHARD):
        tensors = _answers(teacher, rows[start : start + SHARD], top_k, temperature)
        write_tensors(path / f"logits-{number:05d}.safetensors", tensors, record)
        number += 1
    return StoredLogits(path)


def key_of(ids: Tensor) -> bytes:
    """Returns the hash by which a sequence is found: 16 bytes of BLAKE2b over its token ids as int64."""
    return hashlib.blake2b(ids.to("cpu", torch.int64).contiguous().numpy().tobytes(), digest_size=16).digest()


@torch.no_grad()
def _answers(teacher: Any, rows: list[tuple[bytes, Tensor]], top_k: int, temperature: float) -> dict[str, Tensor]:
    device = input_device(teacher)
    found: dict[bytes, tuple[Tensor, Tensor, Tensor]] = {}
    by_length: dict[int, list[tuple[bytes, Tensor]]] = {}
    for key, row in rows:
        by_length.setdefault(len(row), []).append((key, row))
    with evaluating(teacher):
        for same in by_length.values():
            for start in range(0, len(same), BATCH):
                part = same[start : start + BATCH]
                ids = torch.stack([row for _, row in part]).to(device)
                best = top_k_of(teacher(input_ids=ids, use_cache=False).logits, top_k, temperature=temperature)
                for index, (key, _) in enumerate(part):
                    found[key] = (best.log_probabilities[index], best.tokens[index], best.rest[index])
    values, tokens, rest = (torch.cat([found[key][i] for key, _ in rows]).cpu() for i in range(3))
    return {
        "keys": torch.frombuffer(bytearray(b"".join(key for key, _ in rows)), dtype=torch.uint8).reshape(-1, 16),
        "lengths": torch.tensor([len(row) for _, row in rows]),
        "log_probabilities": values.half(),
        "tokens": tokens.int(),
        "rest": rest.half(),
    }


class StoredLogits:
    """The answers in a folder of `store_logits`, read a batch at a time.

    Args:
        folder: where they are.
        empty_ok: allow a folder without answers.

    Raises:
        ValueError: no answers, files of different runs, or damaged ones.
    """

    def __init__(self, folder: str | os.PathLike[str], *, empty_ok: bool = False):
        self.folder = Path(folder)
        self.record: dict[str, str] = {}
        self._places: dict[bytes, tuple[Path, int, int]] = {}
        for path in sorted(self.folder.glob("logits-*.safetensors")):
            self._index(path)
        if not self._places and not empty_ok:
            raise ValueError(
                f"{self.folder} holds no stored logits: write them with store_logits(teacher, batches, folder)"
            )

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    @property
    def top_k(self) -> int:
        """Number of tokens kept of each prediction."""
        return int(self.record["top_k"])

    @property
    def temperature(self) -> float:
        """Temperature that softened the stored distributions."""
        return float(self.record["temperature"])

    @property
    def vocabulary(self) -> int | None:
        """Size of the teacher's vocabulary, if it is known."""
        value = json.loads(self.record["vocabulary"].replace("None", "null"))
        return None if value is None else int(value)

    def __call__(self, inputs: Mapping[str, Any]) -> TopK:
        """Returns the answers to a batch, on the CPU; those of padding are arbitrary.

        Raises:
            ValueError: a sequence whose answers are not stored.
        """
        ids: Tensor = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        real = mask.bool() if isinstance(mask, Tensor) and mask.shape == ids.shape else torch.ones_like(ids).bool()
        values = torch.zeros(*ids.shape, self.top_k)
        tokens = torch.arange(self.top_k).expand(*ids.shape, -1).clone()
        rest = torch.full(ids.shape, -torch.inf)
        for index, (row, keep) in enumerate(zip(ids, real, strict=True)):
            key = key_of(row[keep])
            if key not in self._places:
                raise ValueError(
                    f"a sequence of {int(keep.sum())} tokens has no answers in {self.folder}: store those of all training "
                    "sequences, cut and packed as the training cuts them"
                )
            best = self._read(key)
            keep = keep.cpu()
            values[index, keep], tokens[index, keep], rest[index, keep] = best
        return TopK(values, tokens, rest)

    def _index(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                record = dict(file.metadata() or {})
                keys, lengths = file.get_tensor("keys").numpy(), file.get_tensor("lengths").tolist()
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is damaged or no file of stored logits ({error}); remove it") from None
        if record.get("format") != FORMAT or (self.record and record != self.record):
            raise ValueError(f"{path} does not belong to the stored logits beside it, or is of another release")
        self.record, start = record, 0
        for key, length in zip(keys, lengths, strict=True):
            self._places[key.tobytes()] = (path, start, start + length)
            start += length

    def _read(self, key: bytes) -> tuple[Tensor, Tensor, Tensor]:
        path, start, end = self._places[key]
        with safe_open(path, "pt") as file:
            names = ("log_probabilities", "tokens", "rest")
            best, tokens, rest = (file.get_slice(name)[start:end] for name in names)
        return best.float(), tokens.long(), rest.float()
