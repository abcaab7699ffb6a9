"""The demo model: what it is made of, what it never saw, and that it has learned something."""

import hashlib
import math
import os
import re
import subprocess
import sys
import sysconfig

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_sparsity import demo


@pytest.fixture(autouse=True)
def _demo_is_small():
    """It is not: this is about the whole model."""


@pytest.fixture(scope="module")
def splits():
    return {split: demo.texts(split) for split in ("calibration", "heldout", "training")}


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(demo.PATH, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo.PATH)


def paths(split):
    return [path for path, _ in split]


def test_importing_needs_no_torch():
    code = "import sys, hf_sparsity.demo as d; d.PATH; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_splits_do_not_overlap(splits):
    heldout, calibration = set(paths(splits["heldout"])), set(paths(splits["calibration"]))
    training = set(paths(splits["training"]))
    assert heldout and calibration < training
    assert not heldout & training


def test_heldout_rule(splits):
    """The rule in other words: 20 divides the SHA-1 of the path, library modules only."""
    everything = paths(splits["heldout"]) + paths(splits["training"])
    expected = set()
    for path in everything:
        skip = re.search(r"(^|/)(tests?/|test_[^/]*$)|^encodings/", path)
        digest = int.from_bytes(hashlib.sha1(path.encode()).digest(), "big")
        if not skip and digest == digest // 20 * 20:
            expected.add(path)
    assert set(paths(splits["heldout"])) == expected


def test_every_library_file_is_in_a_split(splits):
    root = sysconfig.get_paths()["stdlib"]
    found = set()
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in ("site-packages", "dist-packages")]
        relative = os.path.relpath(folder, root).replace(os.sep, "/")
        for file in files:
            if file.endswith(".py"):
                found.add(file if relative == "." else f"{relative}/{file}")
    assert found == set(paths(splits["heldout"]) + paths(splits["training"]))


def test_texts_are_sorted_and_the_same_each_time(splits):
    for name, split in splits.items():
        assert paths(split) == sorted(set(paths(split)))
        if name == "heldout":
            assert split == demo.texts(name)


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the library differs by version")
def test_counts_on_python_3_11(splits):
    assert (len(splits["heldout"]), len(splits["calibration"])) == (26, 592)


def test_unknown_split_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'test'.*'calibration', 'heldout', 'training'"):
        demo.texts("test")


def test_shape(model):
    config = AutoConfig.from_pretrained(demo.PATH)
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (8, 192, 576)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (6, 2, 32)
    assert config.vocab_size == 3072 and config.tie_word_embeddings
    assert config.dtype == torch.bfloat16
    assert model.num_parameters() == 4_033_728


def test_the_package_stays_small():
    files = [entry for entry in os.scandir(demo.PATH) if entry.is_file()]
    assert sum(entry.stat().st_size for entry in files) <= 9_000_000


def test_its_folder_has_the_model_and_nothing_else():
    """What lies beside the model would be carried over into every output."""
    files = sorted(entry.name for entry in os.scandir(demo.PATH))
    assert files == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_tokenizer(model, tokenizer, splits):
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (0, 1)
    assert tokenizer.model_max_length == model.config.max_position_embeddings
    for text in ["é ☃ 日本\r\n\tif a:  b  \n\n", *(text for _, text in splits["heldout"][:5])]:
        ids = tokenizer(text, verbose=False)["input_ids"]
        assert tokenizer.decode(ids) == text


@torch.no_grad()
@pytest.mark.parametrize("window", [256, 512])
def test_it_has_learned(model, tokenizer, splits, window):
    """A guess by token frequency alone is at 670, random weights are near 3000."""
    text = "".join(text for _, text in splits["heldout"])
    ids = tokenizer(text, verbose=False, return_tensors="pt")["input_ids"][0]
    windows = ids[20_000 : 20_000 + 2048].view(-1, window)
    loss = model(input_ids=windows, labels=windows).loss
    assert math.exp(loss) < 30
