"""The checks of `verify`: each is a function from what was read to findings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...checkpoint.completion import missing_in
from ...checkpoint.safetensors_index import opened
from ...checkpoint.streamed import StreamedWeights
from ...checkpoint.zeros import REPORT_FILE
from ...evaluation.metrics import METRICS_FILE, Metrics
from ...model.fingerprint import shapes_hash
from ...model.layers import ModelLayers
from ...model.offload import weight_store
from ...plan import LARGEST_DEVIATION, LayerReport, Plan, Report
from ...planning.checks import check_plan
from ...pruners import PRUNERS
from .explain import explain, gained, moved
from .walk import Measured

OK, FAILED, NOTE, NOT_APPLICABLE = "ok", "failed", "note", "not applicable"
FILES, PLAN, FINGERPRINTS, REPORT = "files", "plan", "fingerprints", "report"
ZEROS, PATTERN, MASKS, FINITE, TIED = "zeros", "pattern", "masks", "finite", "tied"
EVALUATION, SURVIVORS, TENSORS, EXPLANATION = "evaluation", "survivors", "tensors", "explanation"


@dataclass(frozen=True)
class Finding:
    """One result of one check.

    Attributes:
        check: which.
        status: "ok", "failed", "note" (worth knowing, not wrong) or "not applicable".
        where: the layer, parameter, block or file it is about; "" for the whole folder.
        message: a sentence.
    """

    check: str
    status: str
    where: str
    message: str


@dataclass(frozen=True)
class FolderFacts:
    """The facts that the checks compare.

    Attributes:
        plan: of the folder.
        model_layers: of the model.
        reports: layer -> its report; empty where there is none.
        measured: what was measured of the weights.
        compared: in which dtype weights were compared with the dense model's; "" if they were not.
        excuse: why the kept weights may differ from the dense model's; "" if they may not.
    """

    plan: Plan
    model_layers: ModelLayers
    reports: Mapping[str, LayerReport]
    measured: Measured
    compared: str = ""
    excuse: str = ""


def _failures(check: str, wrong: Mapping[str, str], right: str) -> list[Finding]:
    """Returns one finding for each place where something is wrong, or one that says all is right."""
    if not wrong:
        return [Finding(check, OK, "", right)]
    return [Finding(check, FAILED, where, message) for where, message in wrong.items()]


def files(folder: FolderFacts) -> list[Finding]:
    """Checks that the files are whole: their headers, and every checksum of packed ones."""
    return _failures(FILES, folder.measured.damaged, "every tensor could be read")


def plan(folder: FolderFacts, model: PreTrainedModel) -> list[Finding]:
    """Checks that the plan names this model's layers with their sizes, and meets its own target."""
    try:
        check_plan(Plan(folder.plan.config, folder.plan.layers), model, folder.model_layers)
    except ValueError as error:
        return [Finding(PLAN, FAILED, "", str(error))]
    return [Finding(PLAN, OK, "", f"it fits the {len(folder.model_layers.weights)} layers and meets its target")]


def fingerprints(folder: FolderFacts, kind: str) -> list[Finding]:
    """Checks that config.json names the model, the data and the versions, and that they fit."""
    model, wrong, absent = folder.plan.model, {}, []
    if model.get("type") not in (None, kind):
        wrong["type"] = f"the plan was made for a model of type {model['type']!r}, this is {kind!r}"
    if model.get("layers") not in (None, shapes_hash(folder.model_layers)):
        wrong["layers"] = "the plan was made for layers of other names or shapes"
    absent += [f"the model's {key}" for key in ("type", "layers", "weights") if model.get(key) is None]
    data = folder.plan.data
    if data is not None and not all(data.get(key) for key in ("sequences", "tokens", "sha256")):
        wrong["data"] = f"the fingerprint of the calibration data is incomplete: {dict(data)}"
    absent += [f"the version of {name}" for name in ("hf_sparsity", "torch") if not folder.plan.versions.get(name)]
    findings = _failures(FINGERPRINTS, wrong, "those of the model's type, its layers and the data fit")
    return findings + ([Finding(FINGERPRINTS, NOTE, "", f"not recorded: {', '.join(absent)}")] if absent else [])


def report(recorded: Report, plan: Plan) -> list[Finding]:
    """Checks that the report is about the layers of the plan, with their sizes and planned sparsities."""
    names = [name for name in {**plan.layers, **recorded.layers} if (name in plan.layers) != (name in recorded.layers)]
    wrong = {n: f"it is in {'the plan' if n in plan.layers else 'the report'} alone" for n in names}
    if abs(recorded.target - plan.target) > 1e-6:
        wrong[REPORT_FILE] = f"its target is {recorded.target}, the plan's {plan.target}"
    for name in plan.layers.keys() & recorded.layers.keys():
        layer, entry = plan.layers[name], recorded.layers[name]
        if entry.size != layer.size or abs(entry.planned - layer.sparsity) > 1e-6:
            wrong[name] = (
                f"the report says {entry.size} weights and a planned sparsity of {entry.planned:.6f}, "
                f"the plan {layer.size} and {layer.sparsity:.6f}"
            )
    return _failures(REPORT, wrong, f"it is about the {len(plan.layers)} layers of the plan")


def zeros(folder: FolderFacts) -> list[Finding]:
    """Checks that each layer has the zeros of its report, and of the plan within what pruning may deviate."""
    if not folder.measured.facts:
        return [Finding(ZEROS, NOT_APPLICABLE, "", "no planned layer could be read")]
    wrong, sparser = {}, {}
    for name, fact in folder.measured.facts.items():
        wanted, reported = folder.plan.layers[name], folder.reports.get(name)
        least = wanted.sparsity - LARGEST_DEVIATION - 1 / fact.width
        if reported is not None and fact.zeros != reported.zeros:
            more = "more" if fact.zeros > reported.zeros else "fewer"
            wrong[name] = (
                f"{fact.zeros} zeros, {abs(fact.zeros - reported.zeros)} {more} than the report's {reported.zeros}"
            )
        elif fact.sparsity < least:
            wrong[name] = f"a sparsity of {fact.sparsity:.4f} where the plan says {wanted.sparsity:.4f}"
        elif reported is None and gained(wanted, fact, None):
            sparser[name] = f"a sparsity of {fact.sparsity:.4f}, more than the plan's {wanted.sparsity:.4f}"
    source = "plan and report" if folder.reports else "the plan"
    findings = _failures(ZEROS, wrong, f"those of all {len(folder.measured.facts)} layers are as {source} say")
    return findings + [Finding(ZEROS, NOTE, name, message) for name, message in sparser.items()]


def pattern(folder: FolderFacts) -> list[Finding]:
    """Checks that in a layer with a pattern N:M no group of M consecutive inputs keeps more than N."""
    named = {n: x.pattern for n, x in folder.plan.layers.items() if ":" in x.pattern and n in folder.measured.facts}
    if not named:
        return [Finding(PATTERN, NOT_APPLICABLE, "", "no layer has a pattern N:M")]
    wrong = {}
    for name, text in named.items():
        fact = folder.measured.facts[name]
        if not fact.groups:
            wrong[name] = f"the pattern {text} does not fit its width {fact.width}"
        elif fact.crowded:
            wrong[name] = f"{fact.crowded} of {fact.groups} groups keep more than {text} allows"
    groups = sum(folder.measured.facts[name].groups for name in named)
    return _failures(PATTERN, wrong, f"all {groups} groups of {len(named)} layers are valid")


def masks(folder: FolderFacts) -> list[Finding]:
    """Checks that the zeros are where the report says, by a hash of each layer's mask."""
    reports = {n: report for n, report in folder.reports.items() if n in folder.measured.facts}
    stored = {n: report.mask for n, report in reports.items() if report.mask is not None}
    if not stored:
        return [Finding(MASKS, NOT_APPLICABLE, "", "the report has no hashes of masks")]
    text = "as many zeros as reported, in other places"
    wrong = {n: text for n in stored if moved(folder.measured.facts[n], folder.reports[n])}
    wrong |= {n: "another mask" for n in stored if n not in wrong and folder.measured.facts[n].mask != stored[n]}
    return _failures(MASKS, wrong, f"the zeros of {len(stored)} layers are where they were put")


def finite(folder: FolderFacts) -> list[Finding]:
    """Checks that no parameter has NaN or infinity."""
    wrong = dict.fromkeys(folder.measured.not_finite, "NaN or infinite values")
    return _failures(FINITE, wrong, f"all {len(folder.measured.samples)} parameters are finite")


def tied(model: PreTrainedModel, plan: Plan) -> list[Finding]:
    """Checks that weights that the config ties are the same, and not planned."""
    mapping = model.get_expanded_tied_weights_keys(all_submodels=True)
    if not mapping:
        return [Finding(TIED, NOT_APPLICABLE, "", "the config ties no weights")]
    wrong = {
        target: f"the config ties it to {source}, but the files have two different weights"
        for target, source in mapping.items()
        if model.get_parameter_or_buffer(target) is not model.get_parameter_or_buffer(source)
    }
    names = {name.removesuffix(".weight") for pair in mapping.items() for name in pair}
    wrong |= dict.fromkeys(sorted(names & plan.layers.keys()), "it is tied to another weight and yet planned")
    return _failures(TIED, wrong, f"{len(mapping)} weights are tied, none is planned")


def evaluation(folder: Path, weights: list[str]) -> list[Finding]:
    """Checks that the recorded evaluations are of these weights; `weights`: the fingerprints they can have."""
    try:
        metrics = Metrics.load(folder)
    except ValueError as error:
        return [Finding(EVALUATION, FAILED, METRICS_FILE, str(error))]
    entries = [(text.name, text.weights) for text in metrics.texts]
    entries += [(task.name, task.weights) for task in metrics.tasks]
    fingerprinted = [(name, value) for name, value in entries if value is not None]
    if not fingerprinted or not weights:
        reason = (
            "the weights cannot be read" if fingerprinted else f"{len(entries)} are recorded, without a fingerprint"
        )
        return [Finding(EVALUATION, NOT_APPLICABLE, "", reason if entries else "none is recorded")]
    old = [name for name, value in fingerprinted if value not in weights]
    wrong = dict.fromkeys(old, "evaluated before the weights were last changed: evaluate again")
    return _failures(EVALUATION, wrong, f"all {len(fingerprinted)} are of these weights")


def survivors(folder: FolderFacts) -> list[Finding]:
    """Checks that the kept weights are the dense model's, where nothing was meant to change them."""
    if not folder.compared:
        return [Finding(SURVIVORS, NOT_APPLICABLE, "", "no dense model to compare with was given")]
    kept = {name: fact.size - fact.zeros for name, fact in folder.measured.facts.items()}
    changed = {name: count for name, count in folder.measured.changed.items() if count}
    others = folder.measured.others
    if folder.excuse:
        total = f"{sum(changed.values())} of {sum(kept.values())} weights that are left"
        total += f" and {len(others)} parameters that are not planned" if others else ""
        return [
            Finding(SURVIVORS, NOTE, "", f"{total} differ from the dense, {folder.compared}; expected: {folder.excuse}")
        ]
    wrong = {n: f"{count} of {kept[n]} weights that are left differ from the dense" for n, count in changed.items()}
    wrong |= dict.fromkeys(others, "it is not planned, and differs from the dense model's")
    return _failures(SURVIVORS, wrong, f"all {sum(kept.values())} weights left are the dense ones, {folder.compared}")


def tensors(model: PreTrainedModel, dense: PreTrainedModel) -> list[Finding]:
    """Checks that both checkpoints have the same tensors, and that those which the class does not know are equal."""
    ours, theirs = weight_store(model), weight_store(dense)
    assert isinstance(ours, StreamedWeights) and isinstance(theirs, StreamedWeights)
    wrong = dict.fromkeys(sorted(missing_in(model, theirs.source, ours.source)), "it is in the dense model alone")
    wrong |= dict.fromkeys(sorted(missing_in(model, ours.source, theirs.source)), "it is not in the dense model")
    shared = sorted((ours.source.keys() - ours.used) & theirs.source.keys())
    for name in shared:
        with opened(ours.source, [name]) as mine, opened(theirs.source, [name]) as other:
            if not torch.equal(
                *(part[name] if isinstance(part[name], Tensor) else part[name][...] for part in (mine, other))
            ):
                wrong[name] = "it is not planned, and differs from the dense model's"
    unknown = f"; {len(shared)} of them are unknown to the class, and equal" if shared else ""
    return _failures(TENSORS, wrong, f"both have the same {len(theirs.source)} tensors{unknown}")


def updating(plan: Plan) -> str:
    """Says why pruning itself may have changed the kept weights; "" if it may not."""
    if plan.config.get("refine"):
        return "kept weights were exchanged with removed ones, and those that stay were refitted"
    if plan.config.get("refit"):
        return "the weights that stay were refitted"
    pruner = plan.config.get("pruner")
    name = pruner.get("name") if isinstance(pruner, Mapping) else pruner
    if not isinstance(name, str) or name not in PRUNERS:
        return f"nothing is known of the pruner {name!r}"
    return f"{name} updates the weights that stay" if PRUNERS[name].updates_survivors else ""


def explained(folder: FolderFacts) -> list[Finding]:
    """Returns notes on what a later step seems to have done."""
    facts = {n: x for n, x in folder.measured.facts.items() if folder.plan.layers[n].size == x.size}
    changed = {} if folder.excuse else folder.measured.changed
    sentences = explain(folder.plan.layers, facts, folder.reports, changed)
    return [Finding(EXPLANATION, NOTE, "", text) for text in sentences]
