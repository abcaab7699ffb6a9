"""The facts of a model card: the files of a sparse model's folder, read and checked. No weights are loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ...checkpoint.bitmask.bits import GROUPS
from ...checkpoint.bitmask.codec import Header
from ...checkpoint.packed_folder import METHOD
from ...checkpoint.zeros import REPORT_FILE
from ...demo import NAME as DEMO
from ...demo import is_embedded
from ...evaluation.metrics import METRICS_FILE, Metrics, TaskRecord, TextRecord
from ...files import check_finished
from ...plan import LayerPlan, Plan, Report, read_json
from ...records import SourceScore
from ...runtime.speed import read_speed
from .markdown import line, number, slug

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}", flags=re.ASCII)


@dataclass(frozen=True)
class Sizes:
    """The bytes of all weights in both layouts; the layout `stored` is measured, the other one is computed."""

    dense: int
    bitmask: int
    stored: Literal["dense", "bitmask"]


@dataclass(frozen=True)
class Facts:
    """Everything that is known of a sparse model without its weights.

    Args:
        plan: from `config.json`.
        stored: all of `sparsity_config` there: the plan, and the records of what was done with it.
        config: all of `config.json`.
        report: how many zeros were counted, or None if there is no report.
        metrics: recorded evaluations.
        sizes: of both layouts; None where there are no weight files, or where they are not as the plan says.
        file_bytes: of the tensors in the weight files, or None if there are none.
        speed: what `hf-sparsity bench` measured, see `runtime/speed.py`; None where nothing was measured.
    """

    plan: Plan
    stored: Mapping[str, Any]
    config: Mapping[str, Any]
    report: Report | None
    metrics: Metrics
    sizes: Sizes | None = None
    file_bytes: int | None = None
    speed: Mapping[str, Any] | None = None

    @property
    def sources(self) -> dict[str, SourceScore]:
        """The sources of the calibration mix that the model was pruned with; empty where there was no mix."""
        recorded = self.report.sources if self.report else {}
        return {name: SourceScore.from_dict(entry) for name, entry in recorded.items()}

    @property
    def packed(self) -> bool:
        """True if the folder's files are in the bitmask layout."""
        return field(self.config, "quantization_config", "quant_method") == METHOD

    @property
    def quantization(self) -> str | None:
        """What quantized the weights after they were pruned, such as "bitsandbytes, 4 bits"; None if nothing did."""
        quantized = self.config.get("quantization_config")
        if quantized is None or self.packed:
            return None
        method = str(field(quantized, "quant_method") or "an unknown method")
        four, eight = field(quantized, "load_in_4bit") is True, field(quantized, "load_in_8bit") is True
        bits = 4 if four else 8 if eight else field(quantized, "bits")
        return f"{method}, {bits} bits" if isinstance(bits, int) else method

    @property
    def pruned(self) -> Mapping[str, Any]:
        """What the run that pruned the model recorded; empty where there is no record."""
        pruned = self.stored.get("pruned")
        return pruned if isinstance(pruned, Mapping) else {}

    @property
    def reconstructed(self) -> bool:
        """True if the weights that are left were trained block by block while the model was pruned."""
        return bool(self.pruned.get("reconstruction"))

    @property
    def hub_id(self) -> str | None:
        """The dense model on the Hub, if that is where it came from."""
        name = self._recorded_name
        return name if is_hub_id(name) else None

    @property
    def base(self) -> str:
        """What to call the dense model: its Hub id, or only the last part of a path, so that no path of this machine is published."""
        last = DEMO if self.is_demo else re.split(r"[/\\]", self._recorded_name.rstrip("/\\"))[-1]
        return self.hub_id or last or str(self.plan.model.get("type") or "model")

    @property
    def is_demo(self) -> bool:
        """True if the dense model is the one inside the package."""
        return is_embedded(self._recorded_name)

    @property
    def _recorded_name(self) -> str:
        return str(self.plan.model.get("name") or "")

    @property
    def name(self) -> str:
        """A name made from what was done, such as `Llama-3.1-8B-sparse60-owl-wanda`."""
        pattern = str(self.plan.config.get("pattern", "unstructured"))
        fixed = re.fullmatch(r"(\d+):(\d+)", pattern)
        sparse = f"{fixed[1]}of{fixed[2]}" if fixed else f"{100 * self.plan.target:g}"
        names = [name for role, name in self.algorithms if not (role == "allocator" and name == "uniform")]
        end = "-recovered" if self.recoveries else ""
        return slug(f"{self.base.rsplit('/', 1)[-1]}-sparse{sparse}-{'-'.join(names)}") + end

    @property
    def algorithms(self) -> list[tuple[str, str]]:
        """The (role in the config, name) of each algorithm that planned or pruned."""
        roles = ((role, self.plan.config.get(role)) for role in ("allocator", "row_allocator", "pruner"))
        return [(role, str(entry["name"])) for role, entry in roles if isinstance(entry, Mapping) and "name" in entry]

    @property
    def recoveries(self) -> list[Mapping[str, Any]]:
        """The records of all trainings since the model was pruned, or while it was; the first one first."""
        records: list[Mapping[str, Any]] = []
        record = self.stored.get("recovered")
        while isinstance(record, Mapping) and len(records) < 100:
            records.append(record)
            record = record.get("previous")
        return records[::-1]

    @property
    def gradual(self) -> bool:
        """True if zeros came in step by step while the model was trained."""
        return any(record.get("method") in ("gradual", "elsa") for record in self.recoveries)

    @property
    def architecture(self) -> str:
        """The name of the model's class in transformers, or "" where it is not recorded."""
        architectures = self.config.get("architectures")
        return str(architectures[0]) if isinstance(architectures, list) and architectures else ""

    @property
    def task(self) -> str | None:
        """What the model's class is for, as the Hub names tasks; None for classes that transformers has no task for."""
        from transformers.modelcard import TASK_MAPPING

        tasks: Mapping[str, Mapping[str, str]] = TASK_MAPPING  # type: ignore[assignment]
        return next((task for task, names in tasks.items() if self.architecture in names.values()), None)

    @property
    def zeros(self) -> int:
        """The number of zero weights: counted, or as planned where there is no report."""
        if self.report is not None:
            return sum(layer.zeros for layer in self.report.layers.values())
        return round(sum(layer.sparsity * layer.size for layer in self.plan.layers.values()))

    @property
    def weights(self) -> int:
        """The number of weights in all planned layers."""
        return sum(layer.size for layer in self.plan.layers.values())


def read_facts(folder: str | os.PathLike[str]) -> Facts:
    """Reads a sparse model's folder; the weights may be missing.

    Raises:
        FileNotFoundError: no `config.json`.
        ValueError: an unfinished run; a config without a plan; a damaged file; evaluations that are not all of the same
            weights, or that were made before a training.
    """
    folder = Path(folder)
    check_finished(folder)
    config = read_json(folder / "config.json")
    if not isinstance(config, Mapping) or not isinstance(config.get("sparsity_config"), Mapping):
        raise ValueError(f"{folder / 'config.json'} has no sparsity plan: prune the model first (hf_sparsity.prune)")
    stored, plan = config["sparsity_config"], Plan.load(folder)
    report = Report.load(folder / REPORT_FILE) if (folder / REPORT_FILE).exists() else None
    if report is not None and {n: x.size for n, x in report.layers.items()} != {
        n: x.size for n, x in plan.layers.items()
    }:
        raise ValueError(f"{folder / REPORT_FILE} is about other layers than the plan in config.json")
    facts = Facts(plan, stored, config, report, Metrics.load(folder))
    _check_weights(facts, folder / METRICS_FILE)
    file_bytes = _tensor_bytes(folder, "sparse" if facts.packed else "model")
    return replace(facts, sizes=_sizes(facts, file_bytes), file_bytes=file_bytes, speed=read_speed(folder))


def field(entry: Any, *path: str) -> Any:
    """Returns a value deep in nested JSON objects, or None where there is no such key."""
    for key in path:
        entry = entry.get(key) if isinstance(entry, Mapping) else None
    return entry


def is_hub_id(text: str) -> bool:
    """Returns whether a name is `owner/model` and no folder here."""
    return bool(_HUB_ID.fullmatch(text)) and ".." not in text and not Path(text).exists()


def _check_weights(facts: Facts, file: Path) -> None:
    """Raises ValueError for evaluations that cannot all be of the weights beside them."""
    seen: dict[str, str] = {}
    records: list[TextRecord | TaskRecord] = [*facts.metrics.texts, *facts.metrics.tasks]
    for record in records:
        if isinstance(record.weights, str):
            seen.setdefault(record.weights, line(record.name, 60))
    if len(seen) > 1:
        first, second = list(seen.values())[:2]
        raise ValueError(
            f"{file}: the evaluations on {first!r} and {second!r} are of different weights; evaluate again on both, or "
            "remove the file"
        )
    if any(record.get("model") in seen for record in facts.recoveries):
        raise ValueError(f"{file}: the model was evaluated before it was trained again; evaluate it again")


# ---- bytes


def _sizes(facts: Facts, stored: int | None) -> Sizes | None:
    """Returns both sizes: one is `stored`, as the files say, the other follows from `checkpoint/bitmask/codec.py`."""
    dtype = _dtype(facts.config)
    if stored is None or dtype is None or facts.quantization:
        return None
    layers = [_layer_bytes(layer, zeros, dtype) for layer, zeros in _counted(facts)]
    dense, bitmask = sum(d for d, _ in layers), sum(b for _, b in layers)
    others = stored - (bitmask if facts.packed else dense)
    if others < 0:  # fewer bytes than the plan's matrices take: the files have another dtype, or are damaged
        return None
    return Sizes(others + dense, others + bitmask, "bitmask" if facts.packed else "dense")


def _counted(facts: Facts) -> Iterator[tuple[LayerPlan, int]]:
    for name, layer in facts.plan.layers.items():
        reported = facts.report.layers[name].zeros if facts.report is not None else round(layer.sparsity * layer.size)
        yield layer, reported


def _layer_bytes(layer: LayerPlan, zeros: int, dtype: torch.dtype) -> tuple[int, int]:
    """Returns (dense, packed) bytes; packed is the shortest of dense, bitmask and, for N:M patterns, the group code."""
    dense = layer.size * dtype.itemsize
    packed = [dense, Header((1, layer.size), dtype, None, False, layer.size - zeros).total_bytes]
    match = re.fullmatch(r"(\d+):(\d+)", layer.pattern)
    if match and int(match[2]) in GROUPS and 0 < int(match[1]) < int(match[2]) and layer.size % int(match[2]) == 0:
        kept, group = int(match[1]), int(match[2])
        packed.append(Header((1, layer.size), dtype, (kept, group), False, layer.size // group * kept).total_bytes)
    return dense, min(packed)


def _tensor_bytes(folder: Path, stem: str) -> int | None:
    """Returns the bytes of the tensors in a folder's weight files, as its index says or by their headers; None without either."""
    index = folder / f"{stem}.safetensors.index.json"
    if index.exists():
        total = field(read_json(index), "metadata", "total_size")
        return int(number(total, f"{index}: total_size"))
    file = folder / f"{stem}.safetensors"
    if not file.exists():
        return None
    with file.open("rb") as stream:
        return file.stat().st_size - 8 - int.from_bytes(stream.read(8), "little")


def _dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    for part in (config, config.get("text_config")):
        name = (part.get("dtype") or part.get("torch_dtype")) if isinstance(part, Mapping) else None
        dtype = getattr(torch, name, None) if isinstance(name, str) and name.isidentifier() else None
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
            return dtype
    return None
