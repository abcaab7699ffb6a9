"""Texts to evaluate on: joined as in the papers, cut into windows, with their documents."""

from __future__ import annotations

import json

import datasets
import pytest
import torch

from hf_sparsity.evaluation.perplexity import text_windows
from hf_sparsity.evaluation.texts import Text, cut, read_text
from tests.evaluation.models import DOCUMENTS


def test_windows_that_begin_in_one_document_are_one_unit(tokenizer):
    joiner = " # and now for something else\n" * 3
    found = cut(Text("mine", DOCUMENTS, joiner=joiner), tokenizer, 16)
    joined = joiner.join(DOCUMENTS)
    assert torch.equal(found.ids, text_windows(joined, tokenizer, 16)) and found.unit == "document"
    starts = [len(tokenizer.decode(found.ids[:i].flatten())) for i in range(len(found.ids))]
    boundaries = [joined.index(f"class Thing{i}:") for i in range(10)]
    owners = [max(i for i, boundary in enumerate(boundaries) if boundary <= start) for start in starts]
    assert list(found.units) == owners and set(owners) == set(range(10))


@pytest.mark.parametrize("text", [["".join(DOCUMENTS)], DOCUMENTS[:7], ["short\n"] * 400])
def test_few_or_short_documents_leave_windows_as_units(tokenizer, text):
    found = cut(Text("mine", text), tokenizer, 16)
    assert found.unit == "window" and list(found.units) == list(range(len(found.ids)))


def test_windows_are_limited_and_too_little_text_is_an_error(tokenizer):
    assert len(cut(Text("mine", DOCUMENTS), tokenizer, 16, 3).ids) == 3
    assert len(cut(Text("mine", DOCUMENTS, windows=5), tokenizer, 16, 30).ids) == 5
    with pytest.raises(ValueError, match="mine has 2 tokens, fewer than one window of 16"):
        cut(Text("mine", ["a b"]), tokenizer, 16)


PAPERS = {
    "wikitext2": ("Salesforce/wikitext", "test", "text", "\n\n", None),
    "WikiText-2": ("Salesforce/wikitext", "test", "text", "\n\n", None),
    "c4": ("allenai/c4", "validation", "text", " ", 256),
    "ptb": ("ptb-text-only/ptb_text_only", "test", "sentence", " ", None),
}


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_texts_are_joined_as_in_the_papers(monkeypatch, tokenizer, name):
    path, split, column, joiner, limit = PAPERS[name]
    asked = {}

    def hub(**arguments):
        asked.update(arguments)
        return ({column: text} for text in ["", "one", "", *["two"] * 2000])

    monkeypatch.setattr(datasets, "load_dataset", hub)
    text = read_text(name)
    assert (asked["path"], asked["split"], text.split, text.joiner, text.windows) == (path, split, split, joiner, limit)
    assert text.documents[:4] == ["", "one", "", "two"] and len(text.documents) == (1100 if name == "c4" else 2003)
    assert text.name == ("wikitext2" if "iki" in name else name) and text.special
    with pytest.raises(ValueError, match=f"split '{split}', not 'train'"):
        read_text(name, split="train")


@pytest.mark.parametrize("name", [*PAPERS, "someone/corpus"])
def test_without_a_network_the_error_says_so(name):
    with pytest.raises(ValueError, match=r"could not be reached|could be reached"):
        read_text(name)


def test_local_files_keep_their_documents(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in DOCUMENTS))
    (tmp_path / "a.txt").write_text("".join(DOCUMENTS))
    assert read_text(str(tmp_path / "a.jsonl")) == Text("a.jsonl", DOCUMENTS)
    assert read_text(str(tmp_path / "a.txt")) == Text("a.txt", ["".join(DOCUMENTS)])
