"""Bytes of the packed layout, put together by hand."""

from __future__ import annotations

import hashlib
import struct

import torch


def seal(raw: bytes) -> bytes:
    """The layout's checksum restated in plain Python, put in its place."""
    raw = raw[:48] + bytes(8) + raw[56:]
    return raw[:48] + digest(raw) + raw[56:]


def digest(raw: bytes) -> bytes:
    words = struct.unpack(f"<{-(-len(raw) // 4096) * 512}Q", raw + bytes(-len(raw) % 4096))
    rows = [words[i : i + 512] for i in range(0, len(words), 512)] or [(0,) * 512]
    if len(raw) % 4096 == 0 and raw:
        rows.append((0,) * 512)
    sums = [sum(c) % 2**64 for c in zip(*rows, strict=True)] + [sum(r) % 2**64 for r in rows]
    return hashlib.sha256(struct.pack(f"<{len(sums)}Q", *sums)).digest()[:8]


def tensor(raw: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def string(packed: torch.Tensor) -> bytes:
    return bytes(packed.tolist())


def put(raw: bytes, at: int, new: bytes) -> bytes:
    return raw[:at] + new + raw[at + len(new) :]
