"""Tokenizers and documents that are made on the spot."""

from __future__ import annotations

import random
import string

import datasets
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END = 256


def make_tokenizer(template: str | None = None, limit: int = 64) -> PreTrainedTokenizerFast:
    """One token a byte, and id 256 ends a text."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {"<end>": END}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", model_max_length=limit)
    fast.chat_template = template
    return fast


def documents(count: int = 30, seed: int = 0) -> list[str]:
    """Texts of 5 to 60 letters; the first is their number, so that no two are equal."""
    draw = random.Random(seed)
    return [f"{i} " + "".join(draw.choices(string.ascii_letters + "é", k=draw.randint(5, 60))) for i in range(count)]


def streaming(rows: list[dict]) -> datasets.IterableDataset:
    """A dataset that knows neither its length nor its columns."""

    def generate():
        yield from rows

    return datasets.IterableDataset.from_generator(generate)


def texts_in(ids: torch.Tensor, tokenizer) -> list[str]:
    """The documents that were packed, the last one perhaps cut short."""
    return tokenizer.decode(ids.flatten().tolist()).split("<end>")


def assert_from(ids: torch.Tensor, tokenizer, texts: list[str]) -> None:
    *whole, last = texts_in(ids, tokenizer)
    assert len(whole) > 3 and set(whole) <= set(texts) and len(set(whole)) == len(whole)
    assert any(text.startswith(last.rstrip("\ufffd")) for text in texts)
