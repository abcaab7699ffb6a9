"""Tells what a later step did to the zeros, from what the layers were and are."""

from __future__ import annotations

from collections.abc import Mapping

from ...plan import LARGEST_DEVIATION, LARGEST_EXCESS, LayerPlan, LayerReport
from .layer_facts import LayerFacts

DENSE = 0.01  # fraction of zeros below which a layer counts as dense


def expected(plan: LayerPlan, facts: LayerFacts, report: LayerReport | None) -> tuple[float, float]:
    """Returns (fewest, most) zeros that a layer may have: those of its report, or else as pruning itself allows."""
    if report is not None:
        return report.zeros, report.zeros
    lower = plan.sparsity - LARGEST_DEVIATION - 1 / facts.width
    return lower * plan.size, (plan.sparsity + LARGEST_EXCESS) * plan.size


def lost(plan: LayerPlan, facts: LayerFacts, report: LayerReport | None) -> bool:
    """Returns whether the layer has fewer zeros than it may have."""
    return facts.zeros < expected(plan, facts, report)[0]


def gained(plan: LayerPlan, facts: LayerFacts, report: LayerReport | None) -> bool:
    """Returns whether the layer has more zeros than it may have."""
    return facts.zeros > expected(plan, facts, report)[1]


def moved(facts: LayerFacts, report: LayerReport | None) -> bool:
    """Returns whether the layer has as many zeros as its report, in other places."""
    if report is None or report.mask is None:
        return False
    return report.zeros == facts.zeros and report.mask != facts.mask


def explain(
    planned: Mapping[str, LayerPlan],
    facts: Mapping[str, LayerFacts],
    reports: Mapping[str, LayerReport],
    changed: Mapping[str, int],
) -> list[str]:
    """Returns one sentence for each thing that seems to have happened; all arguments are by layer.

    `changed`: number of kept weights that differ from the dense model's, though nothing says that they should.
    """
    less = [n for n in facts if lost(planned[n], facts[n], reports.get(n))]
    more = [n for n in facts if gained(planned[n], facts[n], reports.get(n))]
    other = [n for n in facts if moved(facts[n], reports.get(n))]
    full = [n for n in less if facts[n].sparsity < DENSE]
    some = [n for n in less if n not in set(full)]
    grid = [n for n in facts if facts[n].on_grid]
    sentences = []
    if full:
        sentences.append(
            f"{_of(full, facts)} lost their zeros altogether ({_kinds(full)}). This looks like merge_and_unload() of a "
            "plain LoRA, or training without SparsityCallback: to keep zeros use sparse_lora or merge_lora, or the callback"
        )
    if some:
        sentences.append(
            f"{_of(some, facts)} lost some of their zeros ({_kinds(some)}): weights were edited, or trained without "
            "SparsityCallback"
        )
    if other:
        sentences.append(
            f"{_of(other, facts)} have as many zeros as reported, in other places: the model was pruned again, or "
            "weights and report are of two runs"
        )
    if more:
        cause = "rounding to few values made zeros of small weights" if set(more) <= set(grid) else "pruned further"
        sentences.append(
            f"{_of(more, facts)} have more zeros than {'reported' if reports else 'planned'} ({_kinds(more)}): {cause}"
        )
    trained = [n for n in facts if changed.get(n)]
    if len(grid) > len(facts) / 2:
        sentences.append(f"{_of(grid, facts)} take only few values, as after quantization to 8 bits or fewer")
    elif trained and not less:
        sentences.append(
            f"{_of(trained, facts)} have all their zeros, and other values than the dense model: fine-tuned with the "
            "zeros held, of which config.json says nothing, or made from another dense model"
        )
    return sentences


def _of(some: list[str], every: Mapping[str, LayerFacts]) -> str:
    if len(some) == len(every):
        return f"all {len(every)} layers"
    return f"{len(some)} of {len(every)} layers"


def _kinds(names: list[str]) -> str:
    """Returns which projections the layers are, such as `q_proj, v_proj`."""
    kinds = dict.fromkeys(name.split("[")[0].rsplit(".", 1)[-1] for name in names)
    return ", ".join([*list(kinds)[:6], *(["..."] if len(kinds) > 6 else [])])
