"""Batches with images: packed patches, several images a prompt, none; for every allocator, the race and reconstruction."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from hf_sparsity import BlockReconstruction, SparsityConfig, make_plan, prune
from hf_sparsity.calibration.batches import prepare_batches
from hf_sparsity.core.stats import GRAM
from hf_sparsity.evaluation.divergence import DenseReference
from hf_sparsity.model.inference import can_be_sliced
from hf_sparsity.model.layers import find_layers
from hf_sparsity.planning.fisher import fisher_information
from hf_sparsity.streaming.stream import stream_blocks
from tests.tools import row_and_column

IMAGE = 120
TEXT = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def qwen():
    """Its images are packed: `pixel_values` `[patches of all images, width]`."""
    torch.manual_seed(0)
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 4,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 16,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
    }
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    config = hf.Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=121,
        vision_start_token_id=122,
        vision_end_token_id=123,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return hf.Qwen2_5_VLForConditionalGeneration(config).eval()


def gemma():
    """It has one row of `pixel_values` for each image."""
    torch.manual_seed(0)
    config = hf.Gemma3Config(
        text_config=TEXT
        | {"head_dim": 8, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 4,
        },
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=121,
        eoi_token_index=122,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return hf.Gemma3ForConditionalGeneration(config).eval()


MODELS = {"qwen": (qwen, 122, 123, "mm_token_type_ids"), "gemma": (gemma, 121, 122, "token_type_ids")}


def batch(kind, rows, padding=0):
    """One batch; `rows`: the number of images of each sequence, all of one length."""
    _, begin, end, types = MODELS[kind]
    most = max(rows)
    ids = []
    for images in rows:
        fill = torch.randint(5, 100, ((most - images) * 6 + 12,)).tolist()
        ids.append([0] * padding + [5, *[begin, *[IMAGE] * 4, end] * images, *fill])
    ids = torch.tensor(ids)
    inputs = {"input_ids": ids}
    if sum(rows):
        inputs[types] = (ids == IMAGE).long()
    if padding:
        inputs["attention_mask"] = (ids != 0).long()
    if sum(rows) and kind == "qwen":
        inputs |= {
            "pixel_values": torch.randn(16 * sum(rows), 96),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * sum(rows)),
        }
    elif sum(rows):
        inputs["pixel_values"] = torch.randn(sum(rows), 3, 16, 16)
    return inputs


CONFIGS = {
    "owl": SparsityConfig(0.5, allocator="owl"),
    "fisher": SparsityConfig(0.5, allocator="fisher"),
    "trim": SparsityConfig(0.5, row_allocator="trim"),
    "atp": SparsityConfig(0.5, allocator="atp"),
    "sparsegpt": SparsityConfig(0.5, pruner="sparsegpt"),
    "search": SparsityConfig(
        0.5, allocator={"name": "search", "candidates": ("owl",), "budget": "9 evals", "descent": 1}
    ),
}


@pytest.mark.parametrize(("kind", "name"), row_and_column(MODELS, CONFIGS))
def test_every_allocator_takes_batches_with_images(kind, name):
    model = MODELS[kind][0]()
    data = [batch(kind, [1 + i % 2]) for i in range(8)]
    plan = make_plan(model, CONFIGS[name], data)
    report = prune(model, plan, data)
    assert not plan.unseen and not report.notes
    assert report.sparsity == pytest.approx(0.5, abs=0.03)  # of rows of 32 weights
    assert all(name.startswith("model.language_model.") for name in plan.layers)
    with torch.no_grad():
        assert torch.isfinite(model(**data[0]).logits).all()


@pytest.mark.parametrize(("kind", "first"), row_and_column(MODELS, [0, 1]))
def test_some_prompts_have_no_image(kind, first, tmp_path):
    """Statistics are those of the two kinds of prompts apart, and all that walks through the model takes both."""
    model = MODELS[kind][0]()
    layers = find_layers(model, include=["vision"])
    data = prepare_batches(model, [batch(kind, [(first + i) % 2 * 2]) for i in range(4)])

    def facts(data):
        stream = stream_blocks(model, layers, data, frozenset({GRAM}), rewrites=False)
        return {name: layer.stats for block in stream for name, layer in block.layers.items()}

    both = facts(data)
    text, images = (facts([b for b in data if ("pixel_values" in b) == wanted]) for wanted in (False, True))
    assert {name.split(".")[1] for name in both} == {"language_model", "visual" if kind == "qwen" else "vision_tower"}
    for name, stats in both.items():
        parts = [part[name] for part in (text, images) if part[name] is not None]
        assert stats.tokens == sum(part.tokens for part in parts) and len(parts) == 1 + ("language" in name)
        torch.testing.assert_close(stats.gram, sum(part.gram for part in parts), rtol=1e-4, atol=1e-4)
    reference = DenseReference(model, layers, data)
    assert all(kl == pytest.approx(0, abs=1e-6) for kl, _, _ in reference.rows())
    plan = make_plan(model, SparsityConfig(0.5, allocator="owl"), data, output_dir=tmp_path / "out")
    report = prune(model, plan, data, output_dir=tmp_path / "out", reconstruct=BlockReconstruction(epochs=1, lr=0.1))
    assert not plan.unseen and not report.notes


@pytest.mark.parametrize("kind", MODELS)
def test_reconstruction_takes_batches_with_images(kind):
    model = MODELS[kind][0]()
    data = [batch(kind, [1 + i % 2]) for i in range(4)]
    report = prune(
        model, make_plan(model, SparsityConfig(0.5), data), data, reconstruct=BlockReconstruction(epochs=1, lr=0.1)
    )
    assert report.sparsity >= 0.49 and model.config.sparsity_config["pruned"]["reconstruction"]["improved"]


@pytest.mark.parametrize("kind", MODELS)
def test_several_sequences_in_a_batch_are_the_same_sequences(kind):
    """Gram matrices and gradients do not depend on how sequences with images are put into batches."""
    model = MODELS[kind][0]()
    layers = find_layers(model)
    types = MODELS[kind][3]
    together = batch(kind, [1, 1])
    apart = []
    for row in range(2):
        one = {"input_ids": together["input_ids"][row : row + 1], types: together[types][row : row + 1]}
        pixels = together["pixel_values"].chunk(2)[row]
        apart.append(one | {"pixel_values": pixels})
        if kind == "qwen":
            apart[-1]["image_grid_thw"] = together["image_grid_thw"][row : row + 1]

    def facts(batches):
        data = prepare_batches(model, batches)
        stream = stream_blocks(model, layers, data, frozenset({GRAM}), rewrites=False)
        grams = {name: (x.stats.tokens, x.stats.gram) for block in stream for name, x in block.layers.items()}
        return grams, fisher_information(model, layers, data)

    (grams, fisher), (expected, expected_fisher) = facts([together]), facts(apart)
    for name, (tokens, gram) in expected.items():
        assert grams[name][0] == tokens == together["input_ids"].numel()
        torch.testing.assert_close(grams[name][1], gram, rtol=1e-4, atol=1e-4)
        assert fisher[name] == pytest.approx(expected_fisher[name], rel=1e-3)


@pytest.mark.parametrize("kind", MODELS)
def test_padding_beside_images_never_enters_a_statistic(kind):
    model = MODELS[kind][0]()
    layers = find_layers(model)
    torch.manual_seed(1)
    padded = batch(kind, [1, 1], padding=5)
    data = prepare_batches(model, [padded])
    for block in stream_blocks(model, layers, data, frozenset({GRAM}), rewrites=False):
        assert {layer.stats.tokens for layer in block.layers.values()} == {int(padded["attention_mask"].sum())}


@pytest.mark.parametrize("kind", MODELS)
def test_the_dense_walk_of_a_reference_replays_both_stacks(kind):
    model = MODELS[kind][0]()
    data = prepare_batches(model, [batch(kind, [1]) for _ in range(2)])
    reference = DenseReference(model, find_layers(model), data)
    with torch.no_grad():
        torch.testing.assert_close(reference.dense_logits(1), model(**data[1], use_cache=False).logits)
    assert all(kl == pytest.approx(0, abs=1e-6) for kl, _, _ in reference.rows())


def test_only_tensors_of_the_ids_shape_are_cut_into_sequences():
    ids = torch.ones(2, 8, dtype=torch.long)
    assert can_be_sliced({"input_ids": ids, "attention_mask": ids, "decoder_input_ids": ids[:, :3]})
    for extra in (torch.ones(2, 3, 4, 4), torch.ones(2, 8), torch.ones(3, 2, 8, dtype=torch.long), torch.ones(2, 3)):
        assert not can_be_sliced({"input_ids": ids, "other": extra})
    assert not can_be_sliced({"pixel_values": torch.ones(2, 8)})
