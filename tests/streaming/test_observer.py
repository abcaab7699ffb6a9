"""However a model multiplies its weights, their inputs are seen; or the layers are named, with the true reason."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from hf_sparsity import Plan, SparsityConfig, make_plan, prune
from tests.conftest import tiny, tiny_batch


class Config(PretrainedConfig):
    model_type = "toy"


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        return F.linear(x, weight)


def hidden(x, w):
    """A product that no tensor library would recognise."""
    return (x[..., None, :] * w).sum(-1)


PRODUCTS = {
    "call": lambda layer, x: layer(x),
    "layer.forward": lambda layer, x: layer.forward(x),
    "einsum": lambda layer, x: torch.einsum("bth,fh->btf", x, layer.weight),
    "einsum of heads": lambda layer, x: torch.einsum("bth,neh->btne", x, layer.weight.view(4, -1, x.shape[-1])).flatten(
        2
    ),
    "tensordot": lambda layer, x: torch.tensordot(x, layer.weight, dims=([2], [1])),
    "inner": lambda layer, x: torch.inner(x, layer.weight),
    "weight first": lambda layer, x: (layer.weight @ x[0].T).T[None],
    "bmm": lambda layer, x: torch.bmm(x, layer.weight.T.expand(len(x), -1, -1)),
    "cast": lambda layer, x: F.linear(x.double(), layer.weight.double()).float(),
    "cast and turned": lambda layer, x: (x.double() @ layer.weight.to(torch.float64).t().contiguous()).float(),
    "copied": lambda layer, x: F.linear(x, layer.weight.clone()),
    "scaled": lambda layer, x: F.linear(x, layer.weight * 1.0),
    "rows apart": lambda layer, x: torch.cat([F.linear(x, part) for part in layer.weight.chunk(2)], dim=-1),
    "mv": lambda layer, x: torch.stack([torch.stack([torch.mv(layer.weight, t) for t in row]) for row in x]),
    "function": lambda layer, x: Double.apply(x, layer.weight),
}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64, bias=False), nn.Linear(64, 32, bias=False)

    def forward(self, x, product):
        return x + product(self.down, product(self.up, self.norm(x)).relu())


class Toy(PreTrainedModel):
    config_class, _no_split_modules = Config, ["Block"]
    product, run = staticmethod(PRODUCTS["call"]), staticmethod(lambda block, x, product: block(x, product))

    def __init__(self, config):
        super().__init__(config)
        self.embed, self.head = nn.Embedding(128, 32), nn.Linear(32, 128)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.post_init()

    def forward(self, input_ids, **_):
        h = self.embed(input_ids)
        for block in self.blocks:
            h = self.run(block, h, self.product)
        return CausalLMOutput(logits=self.head(h))


IDS = torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(0))


def toy(product="call", run=None):
    torch.manual_seed(0)
    model = Toy(Config()).eval()
    model.product = PRODUCTS.get(product, product)
    model.run = run or model.run
    with torch.no_grad():
        for i, block in enumerate(model.blocks):
            block.norm.weight[i::7] *= 1 + 6 * i
    return model


def planned(model, **changes):
    config = SparsityConfig(sparsity=0.6, allocator="owl", pruner="sparsegpt", **changes)
    plan = make_plan(model, config, IDS)
    return plan, prune(model, plan, IDS)


@pytest.fixture(scope="module")
def plain():
    model = toy()
    plan, report = planned(model)
    assert not plan.unseen and not report.notes
    return plan, {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("product", list(PRODUCTS)[1:])
def test_a_product_is_seen_however_it_is_written(plain, product):
    model = toy(product)
    plan, report = planned(model)
    assert not plan.unseen and not report.notes
    for name, layer in plan.layers.items():
        assert layer.sparsity == pytest.approx(plain[0].layers[name].sparsity, abs=1e-3)
        got, expected = model.state_dict()[f"{name}.weight"], plain[1][f"{name}.weight"]
        assert ((got == 0) == (expected == 0)).float().mean() > 0.99, name


def test_a_block_is_known_when_code_calls_its_forward(plain):
    plan, report = planned(toy(run=lambda block, x, product: block.forward(x, product)))
    assert plan.layers == plain[0].layers and not report.notes


def outside(block, x, product):
    return x + product(block.down, product(block.up, block.norm(x)).relu())


@pytest.mark.parametrize(
    "model, reason",
    [
        (lambda: toy(hidden_layer), "used inside torch.Tensor.mul"),
        (lambda: toy(run=outside), "without running its block"),
    ],
    ids=["product", "block"],
)
def test_what_cannot_be_seen_is_an_error_unless_allowed(model, reason, caplog, tmp_path):
    with pytest.raises(ValueError, match=f"6 layers with 100%.*{reason}.*allow_unseen"):
        planned(model())
    even = make_plan(toy(), SparsityConfig(sparsity=0.6), IDS)
    untouched = model()
    dense = {name: value.clone() for name, value in untouched.state_dict().items()}
    with pytest.raises(ValueError, match=reason):
        prune(untouched, even, IDS)
    assert all(torch.equal(value, dense[name]) for name, value in untouched.state_dict().items())
    with caplog.at_level(logging.WARNING):
        plan, report = planned(model(), allow_unseen=1.0)
    assert "measured by magnitude only" in caplog.text and "pruned by magnitude" in caplog.text
    assert plan.unseen.keys() == report.notes.keys() == plan.layers.keys()
    assert all(reason in text for text in (*plan.unseen.values(), *report.notes.values()))
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded.unseen == plan.unseen and loaded.config["allow_unseen"] == 1.0


def hidden_layer(layer, x):
    return hidden(x, layer.weight)


def test_a_few_unseen_weights_are_named_and_no_error():
    def some(layer, x):
        return hidden(x, layer.weight) if layer is model.blocks[1].up else layer(x)

    model = toy(some)
    plan, report = planned(model, allow_unseen=0.2)
    assert set(plan.unseen) == set(report.notes) == {"blocks.1.up"}
    assert report.notes["blocks.1.up"].startswith("pruned by magnitude: its weight is used inside torch.Tensor.mul")
    uniform = make_plan(model, SparsityConfig(sparsity=0.6, allow_unseen=0.2), IDS)
    assert set(uniform.unseen) == {"blocks.1.up"}  # also where nothing is measured, for pruning will be


def test_the_share_that_may_be_unseen_is_asked_for_as_such():
    for share in (-0.1, 1.5, True, "all"):
        with pytest.raises(ValueError, match="allow_unseen"):
            SparsityConfig(sparsity=0.6, allow_unseen=share)
    assert "allow_unseen" not in SparsityConfig(sparsity=0.6).to_dict()
    config = SparsityConfig(sparsity=0.6, allow_unseen=0.3)
    assert SparsityConfig.from_dict(config.to_dict()) == config


def test_scripted_code_is_named():
    model = toy()
    scripted = torch.jit.trace(
        lambda x, up, down: x + F.linear(F.linear(x, up).relu(), down),
        (torch.zeros(1, 2, 32), model.blocks[0].up.weight, model.blocks[0].down.weight),
    )
    model.run = lambda block, x, product: x
    for block in model.blocks:
        block.forward = lambda x, product, block=block: scripted(x, block.up.weight, block.down.weight)
    model.run = lambda block, x, product: block(x, product)
    with pytest.raises(ValueError, match="compiled or scripted"):
        planned(model)


@pytest.mark.parametrize("way", ["rows", "columns", "one buffer"])
def test_weights_that_are_views_of_one_tensor_get_the_masks_they_would_get_apart(way):
    ids = tiny_batch("llama")["input_ids"]

    def masks(model):
        prune(model, make_plan(model, SparsityConfig(sparsity=0.6, allocator="owl", pruner="sparsegpt"), ids), ids)
        return {name: value == 0 for name, value in model.state_dict().items()}

    model = tiny("llama")
    for layer in model.model.layers if way != "one buffer" else ():
        group = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
        parts = [linear.weight.detach() for linear in group]
        if way == "rows":
            views = torch.cat(parts).split([len(part) for part in parts])
        else:
            views = [view.T for view in torch.cat([p.T for p in parts], dim=1).split([len(p) for p in parts], dim=1)]
        for linear, view in zip(group, views, strict=True):
            linear.weight = nn.Parameter(view)
    if way == "one buffer":
        parameters = list(model.parameters())
        flat = torch.cat([p.detach().reshape(-1) for p in parameters])
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.data = part.view_as(parameter)
    apart, together = masks(tiny("llama")), masks(model)
    assert all(((together[name] == value).float().mean() > 0.999) for name, value in apart.items())


def test_two_parameters_in_the_same_place_are_one():
    model = toy()
    model.blocks[1].up.weight.data = model.blocks[0].up.weight.data
    _, report = planned(model)
    assert report.skipped["blocks.1.up.weight"] == "is the same parameter as blocks.0.up.weight"


class Attention(nn.Module):
    """A block whose attention is one fused call."""

    def __init__(self, batch_first):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=batch_first)

    def forward(self, x, product):
        return self.layer(x) if self.layer.self_attn.batch_first else self.layer(x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_fused_attention_call_is_seen(batch_first):
    model = toy()
    model.blocks = nn.ModuleList(Attention(batch_first) for _ in range(2)).eval()
    Toy._no_split_modules = ["Attention"]
    try:
        plan, report = planned(model)
    finally:
        Toy._no_split_modules = ["Block"]
    assert "blocks.0.layer.self_attn.out_proj" in plan.layers
    assert not plan.unseen and not report.notes
    tokens = {name: layer.tokens for name, layer in report.layers.items()}
    assert set(tokens.values()) == {IDS.numel()}
