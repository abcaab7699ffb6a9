"""The verb `verify`: checks that a folder holds what its plan and report say, and tells what happened to it if not.

The weights of dense and packed folders alike are read once, block by block. The checks are in `checks.py`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from ...checkpoint.packed_folder import METHOD
from ...checkpoint.streamed import open_streamed
from ...checkpoint.zeros import REPORT_FILE
from ...files import check_finished
from ...model.accepted import check_path
from ...model.layers import ModelLayers
from ...model.sparsity import planned_layers
from ...plan import LayerReport, Plan, Report, read_json
from . import checks
from .checks import Finding
from .walk import Measured, measure


@dataclass(frozen=True)
class Verification:
    """The result of `verify`.

    Attributes:
        folder: what was verified.
        findings: the results of all checks.
        measured: the report that the weights themselves give; None where they could not be read.
        weights: the fingerprint of the weights; None where they could not be read.
    """

    folder: str
    findings: list[Finding]
    measured: Report | None = field(default=None, repr=False)
    weights: str | None = None

    @property
    def ok(self) -> bool:
        """True if no check failed."""
        return not self.failed

    @property
    def failed(self) -> list[Finding]:
        """The findings of the checks that failed."""
        return [finding for finding in self.findings if finding.status == checks.FAILED]

    def to_dict(self) -> dict[str, Any]:
        """Returns the result as plain JSON types."""
        return {
            "ok": self.ok,
            "folder": self.folder,
            "sparsity": self.measured.sparsity if self.measured else None,
            "target": self.measured.target if self.measured else None,
            "weights": self.weights,
            "findings": [vars(finding) for finding in self.findings],
        }


def verify(
    folder: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    auto_class: Any = None,
    **location: Any,
) -> Verification:
    """Recomputes what the plan and the report of a sparse model's folder say, and compares.

        result = verify("pruned", against="dense")
        for finding in result.failed: print(finding.check, finding.where, finding.message)

    Args:
        folder: a sparse model, dense or packed. One block of it is in memory at a time.
        against: the dense model, a folder or Hub id: the weights that were kept must equal its weights, unless the
            pruner updates them or they were trained; they are compared in the dtype of `folder`.
        auto_class: the class to open both with, or its name; by default the one that each `config.json` names.
        **location: `revision`, `token`, ... of `against`, as for `open_streamed`.

    Returns:
        A `Verification`; `.ok` is False when the folder does not hold what it says.

    Raises:
        FileNotFoundError: no such folder, or it has no `config.json`.
        ValueError: it has no plan, its run is unfinished, it is quantized by another method; `against` cannot be read, or
            is a model of other names or shapes.
    """
    check_path(folder)
    path = Path(folder)
    plan, config = _plan(path), AutoConfig.from_pretrained(path)
    dense = _dense(against, auto_class, location) if against is not None else None
    try:
        model = open_streamed(path, auto_class=auto_class)
        model_layers = planned_layers(model)
    except (ValueError, TypeError, OSError) as error:
        return Verification(str(path), [Finding(checks.FILES, checks.FAILED, "", str(error))])
    dense_layout = _same(model, dense, plan) if dense is not None else None
    findings, report = _report(path, plan)
    seen = measure(model, model_layers, plan.layers, dense, dense_layout)
    reports = report.layers if report is not None else {}
    compared = _how(model, dense) if dense is not None else ""
    facts = checks.FolderFacts(plan, model_layers, reports, seen, compared, _trained(path) or checks.updating(plan))
    weights = seen.fingerprints(model)
    findings = [
        *checks.files(facts),
        *checks.plan(facts, model),
        *checks.fingerprints(facts, config.model_type),
        *findings,
        *checks.zeros(facts),
        *checks.pattern(facts),
        *checks.masks(facts),
        *checks.finite(facts),
        *checks.tied(model, plan),
        *checks.evaluation(path, weights),
        *checks.survivors(facts),
        *(checks.tensors(model, dense) if dense is not None else ()),
        *checks.explained(facts),
    ]
    return Verification(str(path), findings, _measured(plan, model_layers, seen), weights[0] if weights else None)


def _plan(path: Path) -> Plan:
    """Returns the plan of a folder that can be verified."""
    check_finished(path)
    config = read_json(path / CONFIG_NAME)
    if not isinstance(config, Mapping) or "sparsity_config" not in config:
        raise ValueError(f"{path / CONFIG_NAME} has no sparsity_config, so this is not a sparse model of ours")
    quantized = config.get("quantization_config")
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, Mapping) else quantized
        if method != METHOD:
            raise ValueError(
                f"{path} is quantized by {method!r}, so its zeros cannot be counted; verify what it was made of"
            )
    return Plan.load(path)


def _dense(source: str | os.PathLike[str], auto_class: Any, location: Mapping[str, Any]) -> PreTrainedModel:
    if os.path.isdir(source):
        check_finished(source)
    try:
        return open_streamed(source, auto_class=auto_class, **location)
    except OSError as error:
        raise ValueError(f"against={str(source)!r} cannot be read: {error}") from None


def _report(path: Path, plan: Plan) -> tuple[list[Finding], Report | None]:
    """Returns the findings about the report, and the report unless it is missing or damaged."""
    if not (path / REPORT_FILE).exists():
        return [Finding(checks.REPORT, checks.NOT_APPLICABLE, REPORT_FILE, "there is none")], None
    try:
        report = Report.load(path / REPORT_FILE)
        return checks.report(report, plan), report
    except (ValueError, TypeError) as error:  # TypeError: a text where a number belongs
        return [Finding(checks.REPORT, checks.FAILED, REPORT_FILE, str(error))], None


def _same(model: PreTrainedModel, dense: PreTrainedModel, plan: Plan) -> ModelLayers:
    """The layers of the dense model; `ValueError` unless it has the names and shapes of the sparse one."""
    ours, theirs = ({n: tuple(p.shape) for n, p in each.named_parameters()} for each in (model, dense))
    if different := [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]:
        name = different[0]
        raise ValueError(
            f"against is another model: {len(different)} parameters have other names or shapes, such as {name}, "
            f"{_shape(ours.get(name))} in the sparse model and {_shape(theirs.get(name))} in the dense one"
        )
    return planned_layers(dense, plan)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))


def _how(model: PreTrainedModel, dense: PreTrainedModel) -> str:
    """Says in which dtype the two are compared."""
    ours, theirs = (str(each.dtype).removeprefix("torch.") for each in (model, dense))
    return f"in {ours}" if ours == theirs else f"in {ours}, to which the dense ones ({theirs}) were cast"


def _trained(path: Path) -> str:
    """Says how the kept weights were trained on purpose, by the config; "" if they were not."""
    recorded = read_json(path / CONFIG_NAME)["sparsity_config"]
    recovered, pruned = recorded.get("recovered"), recorded.get("pruned")
    if isinstance(recovered, Mapping):
        return f"recovered by {recovered.get('method')}"
    return "reconstructed while pruning" if isinstance(pruned, Mapping) and pruned.get("reconstruction") else ""


def _measured(plan: Plan, model_layers: ModelLayers, seen: Measured) -> Report | None:
    layers = {
        name: LayerReport(fact.zeros, fact.size, plan.layers[name].sparsity, mask=fact.mask)
        for name, fact in seen.facts.items()
    }
    return Report(plan.target, layers, model_layers.skipped) if layers else None
