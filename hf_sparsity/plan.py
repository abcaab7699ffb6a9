"""Plan and Report: what will happen, what happened. JSON, standard library only.

A plan is data: readable, editable, publishable. The same schema stands in `plan.json` and, under
`sparsity_config`, in a sparse model's `config.json`:

    {"version": 1,
     "config":   {...},                       # SparsityConfig.to_dict()
     "model":    {"type", "name", "layers", "weights"},    # fingerprints
     "data":     {"sequences", "tokens", "sha256"} | null,
     "versions": {"hf_sparsity", "torch", "transformers"},
     "compute_dtype": "float32",              # what computed the measures; only where there was a choice
     "chosen":   {...},                       # only of a race or search
     "unseen":   {name: reason},              # only if the inputs of layers were not seen
     "layers":   {name: {"sparsity", "size", "pattern"?, "measure"?}}}

`pattern` stands only where it differs from the config's. The experts of one fused parameter
(`...experts.gate_up_proj[0]`, `[1]`, ...) are one entry `...gate_up_proj[0:128]`; a field that
differs between them is one string of numbers separated by spaces, so that 48 blocks of 128 experts
stay small in a file that is written with one list element a line.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .files import LARGEST_FILE as LARGEST_FILE
from .files import read_json as read_json
from .files import write_json as write_json
from .race_record import RaceDetails
from .validation import check_number

# How far the sparsity of a layer may be from its plan. A row has a whole number of zeros, so 1 / width comes on top.
MOST_EXPERTS = 1_000_000  # of a plan in all: a short file could name so many that they fill the memory
LARGEST_DEVIATION = 0.005  # sparsity below the plan
LARGEST_EXCESS = 0.02  # sparsity above the plan without a note in the report
LEAST_ROUNDING = 0.01  # sparsity: what is allowed for 1 / width, at least, when a finished model is loaded or trained

VERSION = 1
TOLERANCE = 1e-6  # sparsity: how far the weighted mean of a plan may be from its target

_PATTERN = re.compile(r"unstructured|(\d+|\*):0*[1-9]\d{0,3}")
_SLICE = re.compile(r"(.+)\[(\d+)\]")
_SLICES = re.compile(r"(.+)\[0:(\d+)\]")


@dataclass(frozen=True)
class LayerPlan:
    """What is intended for one layer: `sparsity` in [0, 1), over `size` weights, in `pattern`.

    `measure` is the number the allocator found for the layer, if it has one.
    """

    sparsity: float
    size: int
    pattern: str = "unstructured"
    measure: float | None = None


@dataclass(frozen=True)
class Plan:
    """The sparsity that each layer will have, and why. `layers` is in model order."""

    config: Mapping[str, Any]
    layers: Mapping[str, LayerPlan]
    model: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    chosen: Mapping[str, Any] | None = None  # how a race or search came to it, see `planning/race/choose.py`
    # Layers that could be measured by magnitude only, because no calibration data showed their inputs -> the reason.
    unseen: Mapping[str, str] = field(default_factory=dict)
    compute_dtype: str | None = None  # what computed the measures; None: the model's own dtype, or there are none
    # Instances of algorithms from outside our tree, so that `prune` need not know their names. Not in the JSON.
    algorithms: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    story: RaceDetails | None = field(default=None, repr=False, compare=False)  # of a race or search. Not in the JSON.

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("the plan has no layers")
        if not _is_sparsity(self.config.get("sparsity")):
            raise ValueError(
                f"the plan's config.sparsity is {self.config.get('sparsity')!r}; it must be a number in [0, 1)"
            )
        if not _PATTERN.fullmatch(str(self.config.get("pattern", "unstructured"))):
            raise ValueError(
                f"the plan's config.pattern is {self.config['pattern']!r}; use 'unstructured', 'N:M' or '*:M'"
            )
        for name, layer in self.layers.items():
            if not _is_sparsity(layer.sparsity):
                raise ValueError(f"plan: the sparsity of {name} is {layer.sparsity!r}; it must be a number in [0, 1)")
            if isinstance(layer.size, bool) or not isinstance(layer.size, int) or not 0 < layer.size < 2**63:
                raise ValueError(f"plan: the size of {name} is {layer.size!r}; it must be a positive number of weights")
            if layer.measure is not None and not _is_number(layer.measure):
                raise ValueError(f"plan: the measure of {name} is {layer.measure!r}; it must be a number, or left out")
            if not isinstance(layer.pattern, str) or not _PATTERN.fullmatch(layer.pattern):
                raise ValueError(f"plan: the pattern of {name} is {layer.pattern!r}; use 'unstructured' or 'N:M'")

    @property
    def target(self) -> float:
        """The global sparsity asked for."""
        return float(self.config["sparsity"])

    @property
    def sparsity(self) -> float:
        """The sparsity the layers add up to, weighted by size."""
        total = sum(layer.size for layer in self.layers.values())
        return math.fsum(layer.sparsity * layer.size for layer in self.layers.values()) / total

    def check_target(self) -> None:
        """Raises ValueError when the layers do not add up to the target (after an edit, say).

        A `*:M` plan may be sparser by less than one step of its largest layer, since a layer's
        sparsity is a multiple of 1/M.
        """
        slack = TOLERANCE
        if (pattern := str(self.config.get("pattern", ""))).startswith("*:"):
            total = sum(layer.size for layer in self.layers.values())
            slack += max(layer.size for layer in self.layers.values()) / total / int(pattern[2:])
        if not self.target - TOLERANCE <= self.sparsity <= self.target + slack:
            raise ValueError(
                f"the plan's layers add up to a sparsity of {self.sparsity:.6f}, but its target is {self.target:.6f}. "
                "Edit the layers so that their mean, weighted by size, is the target, or change config.sparsity with them; "
                "plan.with_target(s) shifts all layers to a target"
            )

    def with_target(self, target: float) -> Plan:
        """Returns the plan shifted to another target: every layer by the same amount, clamped to [0, 0.998]."""
        check_number("target", target, "[0, 1)")
        high = max(0.998, target)
        low, above = -1.0, 1.0
        total = sum(layer.size for layer in self.layers.values())

        def mean(by: float) -> float:
            return math.fsum(min(max(x.sparsity + by, 0.0), high) * x.size for x in self.layers.values()) / total

        for _ in range(100):
            middle = (low + above) / 2
            low, above = (middle, above) if mean(middle) < target else (low, middle)
        shifted = {n: min(max(x.sparsity + above, 0.0), high) for n, x in self.layers.items()}
        # Experts are rounded as in `make_plan`, to keep their joint entry short: far below one weight of a layer.
        layers = {
            n: replace(x, sparsity=round(shifted[n], 9) if _SLICE.fullmatch(n) else shifted[n])
            for n, x in self.layers.items()
        }
        return replace(self, config={**self.config, "sparsity": target}, layers=layers, chosen=None, story=None)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON types, with fused experts folded into one entry."""
        entries: dict[str, dict[str, Any]] = {}
        default = self.config.get("pattern", "unstructured")
        for name, layer in self.layers.items():
            entry: dict[str, Any] = {"sparsity": layer.sparsity, "size": layer.size}
            if layer.pattern != default:
                entry["pattern"] = layer.pattern
            if layer.measure is not None:
                entry["measure"] = layer.measure
            entries[name] = entry
        return {
            "version": VERSION,
            "config": dict(self.config),
            "model": dict(self.model),
            "data": None if self.data is None else dict(self.data),
            "versions": dict(self.versions),
            **({} if self.chosen is None else {"chosen": dict(self.chosen)}),
            **({"unseen": dict(self.unseen)} if self.unseen else {}),
            **({"compute_dtype": self.compute_dtype} if self.compute_dtype else {}),
            "layers": _fold(entries),
        }

    @classmethod
    def from_dict(cls, data: Any) -> Plan:
        """Returns the plan that `to_dict` wrote; raises ValueError that names what is missing or malformed."""
        if not isinstance(data, Mapping) or "layers" not in data or "config" not in data:
            raise ValueError(
                "this is not a sparsity plan: a JSON object with 'version', 'config' and 'layers' is expected"
            )
        if data.get("version") != VERSION:
            raise ValueError(
                f"the plan has version {data.get('version')!r}; this release of hf_sparsity reads version {VERSION}"
            )
        config, layers = data["config"], data["layers"]
        if not isinstance(config, Mapping) or "sparsity" not in config:
            raise ValueError("the plan's 'config' must be an object with the global 'sparsity'")
        for key in ("model", "data", "versions", "chosen", "unseen"):
            if not isinstance(data.get(key), (Mapping, type(None))):
                raise ValueError(f"the plan's {key!r} must be an object, not {data[key]!r}")
        if not isinstance(data.get("compute_dtype"), (str, type(None))):
            raise ValueError(f"the plan's 'compute_dtype' must be a name, not {data['compute_dtype']!r}")
        if not isinstance(layers, Mapping) or not all(isinstance(v, Mapping) for v in layers.values()):
            raise ValueError("the plan's 'layers' must be an object of {layer name: {'sparsity': ..., 'size': ...}}")
        default = str(config.get("pattern", "unstructured"))
        parsed = {}
        for name, entry in _unfold(layers):
            unknown = set(entry) - {"sparsity", "size", "pattern", "measure"}
            if unknown or "sparsity" not in entry or "size" not in entry:
                raise ValueError(
                    f"the plan's layer {name} needs 'sparsity' and 'size' (and may have 'pattern', 'measure'); it has {sorted(entry)}"
                )
            if name in parsed:
                raise ValueError(f"the plan's layer {name} is there twice")
            parsed[name] = LayerPlan(
                entry["sparsity"], entry["size"], str(entry.get("pattern", default)), entry.get("measure")
            )
        return cls(
            config=dict(config),
            layers=parsed,
            model=dict(data.get("model") or {}),
            data=data.get("data"),
            versions=dict(data.get("versions") or {}),
            chosen=data.get("chosen"),
            unseen=dict(data.get("unseen") or {}),
            compute_dtype=data.get("compute_dtype"),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON; the file is complete or not there."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Reads `plan.json`, or the plan in a model folder's `config.json`.

        Raises `FileNotFoundError`, or `ValueError` for a truncated or altered file, or what is no path.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise ValueError(
                f"the path of a plan or of a sparse model's folder is expected, not a {type(path).__name__}"
            )
        path = Path(path)
        if path.is_dir():
            path = path / "config.json"
        data = read_json(path)
        if isinstance(data, Mapping) and "sparsity_config" in data:
            data = data["sparsity_config"]
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    `zeros` of `size` weights are zero; `planned` is the sparsity the plan wanted; `error` is the relative squared
    error of the layer's output, ‖(W − W′)X‖² / ‖WX‖² (exact where the Gram matrix was collected, else from the
    column norms alone; None without data); `tokens` reached it; `note` says what was done differently; `mask` is the
    hash of where the zeros are (`model/sparsity.mask_hash`), 32 hex digits; `error_before_refit`, only with `refit`, is
    the error of what the pruner itself left; `swapped`, only with `refine="swaps"`, is how many weights that the pruner
    had removed took the place of one that it had kept.
    """

    zeros: int
    size: int
    planned: float
    error: float | None = None
    tokens: int | None = None
    seconds: float = 0.0
    note: str = ""
    mask: str | None = None
    error_before_refit: float | None = None
    swapped: int | None = None

    def __post_init__(self) -> None:
        if not (
            isinstance(self.zeros, int)
            and isinstance(self.size, int)
            and 0 <= self.zeros <= self.size
            and self.size > 0
        ):
            raise ValueError(f"a layer's report has {self.zeros!r} zeros of {self.size!r} weights")
        if self.mask is not None and not (isinstance(self.mask, str) and re.fullmatch("[0-9a-f]{32}", self.mask)):
            raise ValueError(f"a layer's report has {self.mask!r} as the hash of its mask; 32 hex digits are expected")

    @property
    def sparsity(self) -> float:
        """Fraction of the layer's weights that are zero."""
        return self.zeros / self.size


_JUDGED = ("sources", "certificate", "revalidation")  # what a report may have beside its layers


@dataclass(frozen=True)
class Report:
    """What pruning did, layer by layer, in model order. `skipped`: what stayed dense -> why.

    `sources`: of a calibration mix, by source, on sequences that pruning never saw: `{"weight", "sequences", "predictions",
    "kl", "perplexity": {"dense", "pruned"}}`; KL of the pruned model from the dense one in nats a token. `certificate`: of a
    plan that a race or a search chose, `{"masks", "pruned"}`: what it promised against uniform (`evaluation/certificate.py`), and
    `{"kl", "perplexity", "data"}` of the finished model on the same text if that was at hand. `revalidation`: of a plan
    from another model, what `planning/transfer.py` found. `compute_dtype`: what computed the statistics; None: the
    model's own dtype.
    """

    target: float
    layers: Mapping[str, LayerReport]
    skipped: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    sources: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    certificate: Mapping[str, Any] | None = None
    revalidation: Mapping[str, Any] | None = None
    compute_dtype: str | None = None

    @property
    def sparsity(self) -> float:
        """Reached: zeros over weights of all planned layers."""
        return sum(layer.zeros for layer in self.layers.values()) / sum(layer.size for layer in self.layers.values())

    @property
    def notes(self) -> dict[str, str]:
        """The layers that were treated differently, and how."""
        return {name: layer.note for name, layer in self.layers.items() if layer.note}

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON types; the reached `sparsity` is included for readers."""
        layers = {n: {k: v for k, v in vars(x).items() if v not in (None, "")} for n, x in self.layers.items()}
        judged = {key: getattr(self, key) for key in _JUDGED}
        return {
            "version": VERSION,
            "target": self.target,
            "sparsity": self.sparsity,
            "seconds": round(self.seconds, 3),
            "skipped": dict(self.skipped),
            **{key: dict(value) for key, value in judged.items() if value},
            **({"compute_dtype": self.compute_dtype} if self.compute_dtype else {}),
            "layers": layers,
        }

    @classmethod
    def from_dict(cls, data: Any) -> Report:
        """Returns the report that `to_dict` wrote; raises ValueError when `data` is something else."""
        try:
            if data["version"] != VERSION:
                raise ValueError(f"the report has version {data['version']!r}; this release reads version {VERSION}")
            layers = {name: LayerReport(**entry) for name, entry in data["layers"].items()}
            judged = {key: {**data[key]} for key in _JUDGED if key in data}
            computes = data.get("compute_dtype")
            return cls(data["target"], layers, data["skipped"], data["seconds"], **judged, compute_dtype=computes)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is not a pruning report: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON; the file is complete or not there."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """Reads what `save` wrote; raises ValueError for a truncated or altered file."""
        return cls.from_dict(read_json(path))


def _fold(entries: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Joins consecutive `name[0]`, `name[1]`, ... of equal size into `name[0:n]`."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for name, entry in entries.items():
        if match := _SLICE.fullmatch(name):
            groups.setdefault(match[1], {})[match[2]] = entry
    whole = {
        base: list(group.values())
        for base, group in groups.items()
        if list(group) == [str(i) for i in range(len(group))] and len({e["size"] for e in group.values()}) == 1
    }
    folded: dict[str, dict[str, Any]] = {}
    for name, entry in entries.items():
        match = _SLICE.fullmatch(name)
        if match is None or match[1] not in whole:
            folded[name] = entry
        elif match[2] == "0":
            group = whole[match[1]]
            keys = dict.fromkeys(key for e in group for key in e)
            folded[f"{match[1]}[0:{len(group)}]"] = {key: _column([e.get(key) for e in group]) for key in keys}
    return folded


def _column(values: list[Any]) -> Any:
    """The value that all share, or one string of all, "-" for those that have none."""
    if len(set(values)) == 1:
        return values[0]
    return " ".join("-" if v is None else v if isinstance(v, str) else repr(float(v)).removeprefix("0") for v in values)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_sparsity(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


def _unfold(layers: Mapping[str, Mapping[str, Any]]) -> Iterable[tuple[str, dict[str, Any]]]:
    counts = {name: int(match[2]) for name in layers if (match := _SLICES.fullmatch(name))}
    total = sum(counts.values())
    for name, count in sorted(counts.items(), key=lambda entry: -entry[1]):
        if total > MOST_EXPERTS or not count:
            raise ValueError(
                f"the plan's entry {name} names {count} experts, of {total} in all; from 1 to {MOST_EXPERTS} are allowed"
            )
    for name, entry in layers.items():
        match = _SLICES.fullmatch(name)
        if match is None:
            yield name, dict(entry)
            continue
        count = counts[name]
        columns: dict[str, list[Any]] = {}
        for key, value in entry.items():
            parts = value.split() if isinstance(value, str) and " " in value else [value] * count
            if len(parts) != count:
                raise ValueError(f"the plan's entry {name} has {len(parts)} values of {key!r} for {count} experts")
            columns[key] = parts
        for index in range(count):
            expert = {key: parts[index] for key, parts in columns.items() if parts[index] != "-"}
            for key in ("sparsity", "measure"):
                if isinstance(expert.get(key), str):
                    try:
                        expert[key] = float(expert[key])
                    except ValueError:
                        raise ValueError(f"the plan's entry {name} has {expert[key]!r} as a {key}") from None
            yield f"{match[1]}[{index}]", expert
