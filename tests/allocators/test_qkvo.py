"""The q/k/v/o prior: EvoPress' released optima, names of many architectures, and the budget."""

import pytest

from hf_sparsity import SparsityConfig
from hf_sparsity.allocators.qkvo import QKVO, projection
from hf_sparsity.core.budget import meet
from hf_sparsity.model.layers import find_layers
from hf_sparsity.planning.make_plan import make_plan
from tests.conftest import ZOO, tiny

# Sums of the levels of all 32 blocks in IST-DASLab/EvoPress, pruning_configs/<model>_<percent>.txt: q, k, v, o. A level
# is 10^6 weights (scripts/run_sparse_gpt.sh); q and o have 4096 x 4096, k and v as many in Llama-2, and else 1024 x 4096.
LEVELS = {
    ("Llama-2-7b-hf", 50): (42, 56, -62, -36),
    ("Llama-2-7b-hf", 60): (35, 51, -38, -48),
    ("Llama-2-7b-hf", 70): (37, 50, -37, -50),
    ("Meta-Llama-3-8B", 50): (38, 18, -18, -38),
    ("Meta-Llama-3-8B", 60): (41, 13, -13, -41),
    ("Meta-Llama-3-8B", 70): (42, 11, -11, -42),
    ("Llama-3.1-8B", 50): (72, -10, -40, 0),
    ("Llama-3.1-8B", 60): (67, -11, -35, -15),
    ("Llama-3.1-8B", 70): (45, -4, -35, -22),
    ("Mistral-7B-v0.3", 50): (50, 19, -19, -50),
    ("Mistral-7B-v0.3", 60): (49, 18, -18, -49),
    ("Mistral-7B-v0.3", 70): (46, 16, -16, -46),
}
ATTENTION = {"q_proj": 4096 * 4096, "k_proj": 1024 * 4096, "v_proj": 1024 * 4096, "o_proj": 4096 * 4096}
SIZES = {f"model.layers.{i}.self_attn.{p}": size for i in range(3) for p, size in ATTENTION.items()}
SIZES |= {f"model.layers.{i}.mlp.{p}": 4096 * 14336 for i in range(3) for p in ("gate_proj", "up_proj", "down_proj")}
MEASURES = [{name: None for name in SIZES if f".{i}." in name} for i in range(3)]


def test_the_defaults_are_the_means_of_the_released_optima():
    for i, projection_ in enumerate("qkvo"):
        sizes = [4096 * (1024 if projection_ in "kv" and "-2-" not in model else 4096) for model, _ in LEVELS]
        offsets = [levels[i] / 32 * 1e6 / size for levels, size in zip(LEVELS.values(), sizes, strict=True)]
        assert getattr(QKVO(), projection_) == pytest.approx(sum(offsets) / len(offsets), abs=0.005), projection_


@pytest.mark.parametrize("target", [0.3, 0.5, 0.7])
def test_offsets_are_added_and_the_others_make_up_for_them(target):
    found = QKVO().assign(MEASURES, SIZES, target)
    for name, s in found.items():
        offset = {"q_proj": 0.09, "k_proj": 0.07, "v_proj": -0.15, "o_proj": -0.07}.get(name.rsplit(".", 1)[1])
        if offset is None:  # (0.09 - 0.07) * 16.8M and (0.07 - 0.15) * 4.2M, shared by 3 * 58.7M
            assert s == pytest.approx(target - (0.02 * 4 - 0.08) * 1024 * 4096 / (3 * 4096 * 14336))
        else:
            assert s == pytest.approx(target + offset)
    assert meet(found, SIZES, target) == found, "the target is met as it is"


def test_towards_the_ends_offsets_shrink():
    name = "model.layers.0.self_attn.v_proj"
    for target, share in ((0.9, 1 / 3), (0.15, 0.5), (0.0, 0.0)):
        assert QKVO().assign(MEASURES, SIZES, target)[name] == pytest.approx(target - 0.15 * share)
    assert QKVO(strength=0.5).assign(MEASURES, SIZES, 0.6)[name] == pytest.approx(0.525)
    assert set(QKVO(strength=0.0).assign(MEASURES, SIZES, 0.6).values()) == {0.6}


KNOWN = {
    "llama": {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"},
    "opt": {"q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "o"},
    "gpt2": {"attn.c_attn": "qkv", "attn.c_proj": "o"},
    "bloom": {"query_key_value": "qkv", "dense": "o"},
    "t5": {"q": "q", "k": "k", "v": "v", "o": "o"},
    "qwen3_next": {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"},  # not linear_attn.in_proj_qkvz
    "deepseek_v3": {"o_proj": "o"},  # its queries, keys and values are made in two steps
    "mamba": {},
}


@pytest.mark.parametrize("architecture", KNOWN)
def test_projections_are_known_by_their_names(architecture):
    assert architecture in ZOO
    for name in find_layers(tiny(architecture), ()).weights:
        expected = next((p for end, p in KNOWN[architecture].items() if name.endswith("." + end)), None)
        assert projection(name) == expected, name


def test_other_namings():
    for name, expected in {
        "h.0.self_attn.qkv_proj": "qkv",
        "layers.0.attention.wqkv": "qkv",
        "encoder.layer.0.attention.self.query": "q",
        "encoder.layer.0.attention.output.dense": "o",
        "encoder.layer.0.output.dense": None,
        "block.0.layer.1.DenseReluDense.wo": None,
        "layers.0.mixer.out_proj": None,
        "q": None,
    }.items():
        assert projection(name) == expected, name


def test_a_fused_projection_gets_the_mean_of_what_it_holds():
    found = QKVO(q=0.1, k=0.08, v=-0.06).assign(
        [{"attn.qkv_proj": None, "mlp.up": None}], {"attn.qkv_proj": 1, "mlp.up": 2}, 0.5
    )
    assert found == pytest.approx({"attn.qkv_proj": 0.54, "mlp.up": 0.48})


def test_names_without_attention_give_uniform():
    plan = make_plan(tiny("mamba"), SparsityConfig(0.6, allocator="qkvo"))  # and no data is needed
    assert {layer.sparsity for layer in plan.layers.values()} == {0.6}


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"between -1 and 1 \(0.09, not 9\)"):
        QKVO(q=9)
