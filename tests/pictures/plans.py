"""Plans and reports to draw."""

from __future__ import annotations

from hf_sparsity.plan import LayerPlan, LayerReport, Plan, Report

PROJECTIONS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def plan(layers, allocator="owl", **model):
    entries = {name: one if isinstance(one, LayerPlan) else LayerPlan(one, 1000) for name, one in layers.items()}
    config = {"sparsity": 0.6, "allocator": {"name": allocator}, "pruner": {"name": "wanda"}}
    return Plan(config, entries, {"name": "tiny", **model})


def llama(blocks, allocator="owl", sparsity=lambda block: 0.5 + 0.002 * block):
    return plan(
        {
            f"model.layers.{b}.{p}": LayerPlan(sparsity(b), 1000, measure=5.0 - b / blocks)
            for b in range(blocks)
            for p in PROJECTIONS
        },
        allocator,
    )


def report(made, less=()):
    """As planned, but for the layers in `less`, which lost half as many weights."""
    layers = {}
    for name, layer in made.layers.items():
        zeros = round(layer.sparsity * layer.size / (2 if name in less else 1))
        layers[name] = LayerReport(zeros, layer.size, layer.sparsity)
    return Report(made.target, layers)


def experts(low=0.4, high=0.8):
    """One block whose experts differ, the second twice the size of the first."""
    name = "model.layers.0.mlp.experts.up_proj"
    return plan({f"{name}[0]": LayerPlan(low, 100, measure=1.0), f"{name}[1]": LayerPlan(high, 200, measure=3.0)})
