"""Shared by all tests: no network, tiny models made from configs, the goldens."""

from __future__ import annotations

import os
import shutil
import socket

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import torch
import transformers as hf

from hf_sparsity import demo

torch.set_num_threads(1)  # the suite runs one process a core

GOLDENS = Path(__file__).parent / "fixtures" / "goldens"
_LOOPBACK = ("127.", "::1", "localhost")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Any connection outside loopback fails."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(_LOOPBACK):
            raise AssertionError(f"a test tried to reach {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


class Stopped(Exception):
    """The run of a test was stopped on purpose."""


def stop_after(records: int, what: str | None = "block", error: type[BaseException] = Stopped):
    """For `Output(..., after_record=...)`: raises once so many records of a kind, or of any (None), are on disk."""
    left = [records]

    def after_record(record):
        left[0] -= what is None or record["what"] == what
        if left[0] == 0:
            left[0] = -1
            raise error

    return after_record


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Values computed by the authors' own code."""
    return GOLDENS


@pytest.fixture(scope="session")
def small_demo(tmp_path_factory) -> str:
    """A folder with the embedded model's first two blocks, in float32: bfloat16 is slow on CPUs that only emulate it."""
    folder = tmp_path_factory.mktemp("demo")
    model = hf.AutoModelForCausalLM.from_pretrained(demo.PATH, dtype=torch.float32)
    del model.model.layers[2:]
    model.config.num_hidden_layers = 2
    model.save_pretrained(folder)
    for file in Path(demo.PATH).glob("tokenizer*"):
        shutil.copy(file, folder)
    return str(folder)


@pytest.fixture(autouse=True)
def _demo_is_small(small_demo, monkeypatch):
    """What commands call `demo` is the small one; tests of the real one override this."""
    monkeypatch.setattr(demo, "PATH", small_demo)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # some libraries change it


def tiny(name: str, dtype: torch.dtype = torch.float32):
    """A tiny random model of an architecture in `ZOO`, weights wide enough that differences show."""
    auto, config = ZOO[name]()
    torch.manual_seed(1)
    model = getattr(hf, auto).from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.08)
    return model


def auto(name: str):
    """The Auto class of an architecture in `ZOO`."""
    return getattr(hf, ZOO[name]()[0])


@pytest.fixture
def source(tmp_path):
    """`source(name)`: the folder of `tiny(name)`, in several files, written once."""

    def make(name, **options):
        folder = tmp_path / f"source_{name}"
        if not folder.exists():
            tiny(name, **options).save_pretrained(folder, max_shard_size="150KB")
        return folder

    return make


def tiny_batch(name: str, sequences: int = 2, tokens: int = 24) -> dict[str, torch.Tensor]:
    """Inputs for `tiny(name)`; text models get plain ids."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 120, (sequences, tokens), generator=generator)
    if name == "whisper":
        return {"input_features": torch.randn(sequences, 16, 100, generator=generator), "decoder_input_ids": ids[:, :9]}
    if name == "t5":
        return {"input_ids": ids, "decoder_input_ids": ids[:, :9]}
    if name == "llava":
        ids = torch.cat([torch.full((sequences, 16), 127), ids], dim=1)
        return {"input_ids": ids, "pixel_values": torch.randn(sequences, 3, 32, 32, generator=generator)}
    return {"input_ids": ids}


def gemma3n():
    """A tiny Gemma-3n, whose last blocks read the keys and values of earlier ones from a mapping that all are given."""
    config = hf.Gemma3nTextConfig(
        vocab_size=128,
        vocab_size_per_layer_input=128,
        hidden_size=32,
        intermediate_size=48,
        hidden_size_per_layer_input=8,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=4,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 4,
    )
    torch.manual_seed(0)
    return hf.Gemma3nForCausalLM(config)


def _text(**changes):
    base = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    return (
        base
        | {
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        | changes
    )


_CAUSAL = "AutoModelForCausalLM"
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SPEECH = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
ZOO = {
    "llama": lambda: (_CAUSAL, hf.LlamaConfig(**_text())),
    "qwen2_window": lambda: (
        _CAUSAL,
        hf.Qwen2Config(**_text(use_sliding_window=True, sliding_window=4, max_window_layers=1)),
    ),
    "gemma3": lambda: (
        _CAUSAL,
        hf.Gemma3TextConfig(
            **_text(
                head_dim=16, sliding_window=4, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
            )
        ),
    ),
    "gpt2": lambda: (_CAUSAL, hf.GPT2Config(vocab_size=128, n_embd=64, n_layer=3, n_head=4, n_positions=128)),
    "opt": lambda: (
        _CAUSAL,
        hf.OPTConfig(
            vocab_size=128,
            hidden_size=64,
            ffn_dim=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=128,
            word_embed_proj_dim=64,
        ),
    ),
    "bloom": lambda: (_CAUSAL, hf.BloomConfig(vocab_size=128, hidden_size=64, n_layer=3, n_head=4)),
    "falcon": lambda: (
        _CAUSAL,
        hf.FalconConfig(vocab_size=128, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, alibi=False),
    ),
    "mixtral": lambda: (_CAUSAL, hf.MixtralConfig(**_text(num_local_experts=4, num_experts_per_tok=2))),
    "qwen3_moe": lambda: (_CAUSAL, hf.Qwen3MoeConfig(**_text(head_dim=16, num_experts=4, **_MOE))),
    "gpt_oss": lambda: (
        _CAUSAL,
        hf.GptOssConfig(**_text(head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=4)),
    ),
    "deepseek_v3": lambda: (
        _CAUSAL,
        hf.DeepseekV3Config(
            **_text(
                num_key_value_heads=4, first_k_dense_replace=1, n_routed_experts=4, n_group=1, topk_group=1, **_MOE
            ),
            kv_lora_rank=16,
            q_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=16,
        ),
    ),
    "qwen3_next": lambda: (
        _CAUSAL,
        hf.Qwen3NextConfig(
            **_text(head_dim=16, num_hidden_layers=4, num_experts=4, shared_expert_intermediate_size=32, **_MOE),
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
        ),
    ),
    "mamba": lambda: (_CAUSAL, hf.MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=3, state_size=8)),
    "t5": lambda: (
        "AutoModelForSeq2SeqLM",
        hf.T5Config(
            vocab_size=128,
            d_model=64,
            d_kv=16,
            d_ff=96,
            num_layers=2,
            num_decoder_layers=3,
            num_heads=4,
            decoder_start_token_id=0,
        ),
    ),
    "whisper": lambda: (
        "AutoModelForSpeechSeq2Seq",
        hf.WhisperConfig(
            vocab_size=128,
            d_model=64,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=96,
            decoder_ffn_dim=96,
            num_mel_bins=16,
            max_source_positions=50,
            max_target_positions=64,
            **_SPEECH,
        ),
    ),
    "llava": lambda: (
        "AutoModelForImageTextToText",
        hf.LlavaConfig(
            text_config=hf.LlamaConfig(**_text()),
            vision_config=hf.CLIPVisionConfig(
                hidden_size=64,
                num_hidden_layers=3,
                num_attention_heads=4,
                intermediate_size=96,
                image_size=32,
                patch_size=8,
                projection_dim=64,
            ),
            image_token_index=127,
            vision_feature_layer=-2,
        ),
    ),
}
