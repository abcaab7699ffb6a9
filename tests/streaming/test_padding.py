"""Padding never enters a statistic: what is computed on padded batches is what the same rows give without padding."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from hf_sparsity.calibration.batches import data_fingerprint, prepare_batches
from hf_sparsity.core.stats import GRAM, NORMS
from hf_sparsity.evaluation.divergence import by_token
from hf_sparsity.evaluation.perplexity import next_token_losses
from hf_sparsity.model.layers import find_layers
from hf_sparsity.planning.fisher import fisher_information
from hf_sparsity.recovery.running_norms import RunningNorms
from hf_sparsity.streaming.stream import stream_blocks
from tests.conftest import tiny

LENGTHS = ((19, 11), (12, 17))  # tokens of the encoder and the decoder, of two rows


def bart():
    torch.manual_seed(1)
    sides = {"layers": 2, "attention_heads": 2, "ffn_dim": 48}
    sizes = {f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in sides.items()}
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = hf.BartConfig(vocab_size=128, d_model=32, max_position_embeddings=64, dropout=0.0, **sizes, **special)
    return hf.BartForConditionalGeneration(config).eval()


def wav2vec():
    torch.manual_seed(1)
    config = hf.Wav2Vec2Config(
        vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        conv_dim=(16, 16), conv_kernel=(4, 3), conv_stride=(2, 2), num_feat_extract_layers=2, feat_extract_norm="layer",
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, do_stable_layer_norm=True,
    )  # fmt: skip
    return hf.Wav2Vec2ForCTC(config).eval()


def text(encoder, decoder, pad, *, hole=False):
    """Rows of encoder and decoder tokens, padded to these lengths; a hole in a mask keeps rows from being cut."""
    generator = torch.Generator().manual_seed(3)
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for of_encoder, of_decoder in LENGTHS:
        ids = torch.randint(5, 120, (of_encoder,), generator=generator).tolist()
        labels = torch.randint(5, 120, (of_decoder,), generator=generator).tolist()
        mask = [1] * of_encoder + [0] * (encoder - of_encoder)
        if hole:
            mask[2] = 0
        batch["input_ids"].append(ids + [pad] * (encoder - of_encoder))
        batch["attention_mask"].append(mask)
        batch["labels"].append(labels + [-100] * (decoder - of_decoder))
    return {name: torch.tensor(rows) for name, rows in batch.items()}


def rows_of(batch):
    """The rows of a batch of text, each alone and cut to its text; the decoder reads its last label where there is room."""
    for number, (of_encoder, of_decoder) in enumerate(LENGTHS):
        yield {
            name: rows[number : number + 1, : of_decoder + 1 if name == "labels" else of_encoder]
            for name, rows in batch.items()
        }


def grams(model, batches):
    layers = find_layers(model)
    stream = stream_blocks(model, layers, prepare_batches(model, batches), frozenset({GRAM}), rewrites=False)
    return {name: (x.stats.tokens, x.stats.gram) for block in stream for name, x in block.layers.items()}


def check_same(one, other):
    assert one.keys() == other.keys()
    for name, (tokens, gram) in one.items():
        assert tokens == other[name][0], name
        torch.testing.assert_close(
            gram, other[name][1], rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


MODELS = {"t5": (lambda: tiny("t5"), 0), "bart": (bart, 1)}
SHAPES = [(24, 17), (19, 20), (24, 24)]  # the last: both sides padded to one length


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_an_encoder_decoders_statistics_and_scores(name, shape):
    make, pad = MODELS[name]
    model, padded = make(), text(*shape, pad)
    apart = list(rows_of(padded))
    check_same(grams(model, [padded]), grams(model, apart))
    layers = find_layers(model)
    fisher = [fisher_information(model, layers, prepare_batches(model, data)) for data in ([padded], apart)]
    assert fisher[0] == pytest.approx(fisher[1], rel=1e-3)
    # Scores of a batch that was not cut count the decoder's text alone.
    whole = dict(padded)
    labels = whole.pop("labels")
    whole["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
    whole["decoder_attention_mask"] = torch.cat([torch.ones(2, 1), (labels != -100)[:, :-1]], dim=1).long()
    with torch.no_grad():
        logits = model(**whole).logits
        alone = [next_token_losses(b, model(**b).logits) for b in prepare_batches(model, apart)]
    losses, counts = next_token_losses(whole, logits)
    torch.testing.assert_close(losses, torch.cat([loss for loss, _ in alone]), rtol=1e-4, atol=1e-4)
    assert counts.tolist() == [float(count) for _, count in alone]
    assert by_token(whole, logits, logits)[2].sum(1).tolist() == counts.tolist()


@pytest.mark.parametrize("name", MODELS)
def test_masks_with_holes(name):
    """Such rows stay as they are, and their masks keep what is no text out."""
    model = MODELS[name][0]()
    batch = text(24, 17, MODELS[name][1], hole=True)
    found = grams(model, [batch])
    encoder = int(batch["attention_mask"].sum())
    decoder = sum(
        min(of_decoder + 1, 17) for _, of_decoder in LENGTHS
    )  # the start, and the labels that there is room for
    for layer, (tokens, _) in found.items():
        cross = any(
            part in layer for part in ("encoder_attn.k", "encoder_attn.v", "EncDecAttention.k", "EncDecAttention.v")
        )
        assert tokens == (encoder if (".decoder." not in layer and "encoder." in layer) or cross else decoder), layer


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", ["labels", "decoder_input_ids"])
def test_the_norms_of_gradual_pruning(name, shape, side):
    """Those of the last training batch are the norms that pruning takes of the rows alone."""
    make, pad = MODELS[name]
    model, padded = make(), text(*shape, pad)
    layers = find_layers(model)
    rows = prepare_batches(model, rows_of(padded))
    stream = stream_blocks(model, layers, rows, frozenset({NORMS}), rewrites=False)
    expected = {n: x.stats.mean_sq * len(rows) / x.stats.tokens for block in stream for n, x in block.layers.items()}
    running = RunningNorms(list(layers.weights.values()))
    if side != "labels":
        padded["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(padded.pop("labels"))
    handle = running.watch(model)
    model.train()(**padded)
    handle.remove()
    running.observe(model.eval())
    assert running.mean_sq.keys() == expected.keys()
    for layer, mean in expected.items():
        torch.testing.assert_close(running.mean_sq[layer], mean, rtol=1e-4, atol=1e-5)


def test_a_mask_of_who_sees_whom():
    """Of four dimensions, as packed texts have it; it says nothing of padding, and is handed to the model as it is."""
    model, ids = tiny("llama"), torch.randint(5, 120, (1, 12), generator=torch.Generator().manual_seed(3))
    blind = torch.full((1, 1, 12, 12), torch.finfo(torch.float32).min)
    seen = torch.zeros(12, 12, dtype=torch.bool)
    seen[:7, :7], seen[7:, 7:] = torch.ones(7, 7).tril().bool(), torch.ones(5, 5).tril().bool()
    batch = {"input_ids": ids, "attention_mask": blind.masked_fill(seen, 0)}
    batch["position_ids"] = torch.cat([torch.arange(7), torch.arange(5)])[None]
    assert data_fingerprint(prepare_batches(model, [batch]))["tokens"] == 12
    check_same(grams(model, [batch]), grams(model, [{"input_ids": ids[:, :7]}, {"input_ids": ids[:, 7:]}]))
    fisher_information(model, find_layers(model), prepare_batches(model, [batch]))


def test_sound_that_is_padded():
    model = wav2vec()
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randn(1, length, generator=generator) for length in (160, 96)]
    values, mask = torch.zeros(2, 160), torch.zeros(2, 160, dtype=torch.long)
    for number, row in enumerate(rows):
        values[number, : row.shape[1]], mask[number, : row.shape[1]] = row[0], 1
    padded = grams(model, [{"input_values": values, "attention_mask": mask}])
    check_same(padded, grams(model, [{"input_values": row} for row in rows]))
    whisper = tiny("whisper")
    sound = {"input_features": torch.randn(2, 16, 100, generator=generator), "decoder_input_ids": torch.full((2, 6), 5)}
    mask = torch.ones(2, 100, dtype=torch.long)
    mask[1, 60:] = 0  # Whisper hears its padding: it was trained with it
    check_same(grams(whisper, [sound | {"attention_mask": mask}]), grams(whisper, [sound]))
