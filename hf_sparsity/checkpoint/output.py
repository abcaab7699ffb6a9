"""A folder that a sparse model is written to block by block: complete, or visibly unfinished.

Each block's shard is written as soon as the block is pruned, under the names of the source checkpoint.
`config.json` comes last, so that nothing loads a folder that is not whole.

Packed files are made of dense ones at the end, since until then a run may go on from these; so for a while both are on
disk. The dense ones lie in the record of the run and go with it.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from ..distributed import Processes
from ..files import MARKER, sync_folder
from ..model.accepted import check_path
from ..model.layers import Block, ModelLayers
from ..model.offload import onload, weight_store
from ..plan import LayerReport, Report, read_json, write_json
from .atomic import check_place, disk_errors, write_tensors
from .completion import complete, with_notes
from .conversion import read_parameters, targets, twin_of
from .journal import Journal, digests
from .locate import find_stored_of
from .packed_folder import check_layout, pack_into
from .safetensors_index import DTYPES
from .source import Source, find_source
from .streamed import read_blocks
from .transformers_internals import custom_object_save, revert_weight_conversion
from .zeros import REPORT_FILE, check_written

logger = logging.getLogger(__name__)

PACKED = "packed"  # the dense files, under the name that says that they are needed no more


class Output:
    """The folder that a sparse model is written to, and the record of what is there already, `journal`.

    `layout`: "dense" or "bitmask", see `save_sparse`. `overwrite`: replace an unfinished run or a sparse model.
    `after_record`: see `Journal`.

    Raises:
        ValueError: an unknown layout; the folder holds other files, or a model without a record of its run.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        processes: Processes | None = None,
        layout: str = "dense",
        after_record: Callable[[Mapping[str, Any]], None] | None = None,
    ):
        check_layout(layout)
        check_path(path)
        self.path, self.layout = Path(path), layout
        check_place(self.path)
        self._dense = self.path if layout == "dense" else self.path / MARKER / "dense"  # where blocks are written
        self.processes = processes or Processes.current()
        self._wipe = overwrite and self._is_ours()
        self._after_record = after_record
        self._record: Mapping[str, Any] | None = None  # of the run that made a complete folder
        self.is_complete = False  # by a run of the same arguments; known after `begin`
        if not self._wipe:
            self._check()
            self.journal = self._new_journal()

    def begin(self, phase: str, arguments: Mapping[str, Any]) -> None:
        """Begins planning or pruning into the folder, or goes on with it; before this call nothing is written.

        A folder that a run of the same arguments has completed is left as it is, and `is_complete` is True then.

        Raises:
            ValueError: a run with other arguments is there, unfinished or complete.
            OSError: the folder cannot be written to.
        """
        if self._record is not None:
            self._compare(phase, digests(arguments))
            return
        if self.processes.main:
            if self._wipe:
                (self.path / CONFIG_NAME).unlink(missing_ok=True)  # first, so that nothing loads what is left
                for stem in ("model", "sparse"):  # dense and packed weights, and their indexes
                    for file in self.path.glob(f"{stem}*.safetensors*"):
                        file.unlink()
                shutil.rmtree(self.path / MARKER, ignore_errors=True)
            with disk_errors(self.path):
                for folder in (self.path / MARKER, self._dense):
                    folder.mkdir(parents=True, exist_ok=True)
        self.processes.wait()
        if self._wipe:
            self._wipe, self.journal = False, self._new_journal()
        self.journal.begin(phase, arguments)

    def _compare(self, phase: str, now: Mapping[str, str]) -> None:
        """Checks that the run that completed the folder had these arguments, by their digests."""
        assert self._record is not None
        before = self._record["phases"].get(phase)
        if before is None:
            raise ValueError(self._occupied())
        keys = (
            now.keys() if phase == "recover" else before.keys() | now.keys() - {"layout"}
        )  # its record also has results
        differing = sorted(key for key in keys if before.get(key) != now.get(key))
        if self.layout != self._record["layout"]:
            differing.append("layout")
        if differing:
            raise ValueError(
                f"output {str(self.path)!r} is complete already, of a run with another {' and '.join(differing)}; "
                "overwrite=True (--overwrite) replaces it, or choose another"
            )
        if not self.is_complete:
            logger.info("%s is complete already, of a run with the same arguments", self.path)
        self.is_complete = True

    def arguments(self) -> dict[str, dict[str, str]]:
        """Returns the digests of the arguments of this run by phase, which a finished folder keeps in its config."""
        phases = {phase: self.journal.recall("begin", phase) for phase in ("plan", "prune")}
        return {
            phase: {key: value for key, value in digests(arguments).items() if key != "layout"}
            for phase, arguments in phases.items()
            if arguments is not None
        }

    def earlier_arguments(self) -> set[str] | None:
        """Returns the names of the arguments of the run that began or completed the folder; None if there was none."""
        if self._wipe:
            return None
        phases = ("plan", "prune")
        before = (
            self._record["phases"] if self._record else {name: self.journal.recall("begin", name) for name in phases}
        )
        known = [set(before[name]) for name in phases if before.get(name)]
        return set().union(*known) if known else None

    @property
    def goes_on(self) -> bool:
        """True if a pruning pass into this folder was begun before: it will be continued, or is complete."""
        return not self._wipe and (self._record is not None or self.journal.order is not None)

    def _new_journal(self) -> Journal:
        return Journal(self.path / MARKER, self.processes, after_record=self._after_record)

    def _is_ours(self) -> bool:
        """Returns whether a run or a sparse model is there, which may be replaced. Raises ValueError for other files."""
        if (self.path / MARKER).is_dir():
            return True
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return False
        config = self.path / CONFIG_NAME
        if config.exists() and "sparsity_config" in read_json(config):
            return True
        raise ValueError(f"output {str(self.path)!r} holds files that are not a sparse model; choose another")

    def _check(self) -> None:
        marker = self.path / MARKER
        if marker.is_dir() and (self.path / CONFIG_NAME).exists():
            # The run was killed in its very last steps; another process may be quicker.
            if (marker / PACKED).exists() or (self.layout == "bitmask" and not self._dense.exists()):
                shutil.rmtree(marker, ignore_errors=True)
            elif not any(marker.iterdir()):
                with suppress(OSError):
                    marker.rmdir()
        if marker.is_dir():
            return
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            self._record = self._finished_run()
            if self._record is None:
                raise ValueError(self._occupied())

    def _occupied(self) -> str:
        hint = "; overwrite=True (--overwrite) replaces a sparse model" if (self.path / CONFIG_NAME).exists() else ""
        return f"output {str(self.path)!r} exists and is not an empty folder; choose another{hint}"

    def _finished_run(self) -> dict[str, Any] | None:
        """Returns what a complete folder says of the arguments of its run; None if it says nothing."""
        if not (self.path / CONFIG_NAME).is_file():
            return None
        config = read_json(self.path / CONFIG_NAME)
        sparsity = config.get("sparsity_config") if isinstance(config, dict) else None
        if not isinstance(sparsity, dict):
            return None
        pruned = sparsity.get("pruned")
        phases = pruned.get("arguments") if isinstance(pruned, dict) else None
        recovered = sparsity.get("recovered")  # its facts are the arguments themselves
        if isinstance(recovered, dict):  # what was trained after pruning is no longer what pruning gave
            phases = {"recover": digests(recovered)}
        if not isinstance(phases, dict) or not all(isinstance(value, dict) for value in phases.values()):
            return None
        return {"phases": phases, "layout": "bitmask" if config.get("quantization_config") is not None else "dense"}

    def resume(self, model: PreTrainedModel, model_layers: ModelLayers) -> None:
        """Puts the finished blocks into the model: into memory, or where a streamed model reads them from."""
        order = self.journal.order or []
        if len(set(order)) < len(order):  # statistics over repeated visits are taken while all blocks are dense
            self.journal.forget_blocks()
        finished = {
            block.name: dict.fromkeys(record["tensors"], record["file"])
            for block in model_layers.blocks
            if (record := self.journal.blocks.get(block.name)) is not None
        }
        if (streamed := weight_store(model)) is not None:
            for name, files in finished.items():
                streamed.redirect(name, self._dense, files)
            return
        blocks = {block.name: block for block in model_layers.blocks}
        for name, values in read_blocks(model, self._dense, finished):
            _write_weights(blocks[name], values)

    def restore(self, model: PreTrainedModel, model_layers: ModelLayers) -> Report:
        """Puts the weights of a complete folder into the model, as pruning into it would have; returns its report."""
        described = read_json(self.path / CONFIG_NAME)
        stored = find_stored_of(self.path, model, described)
        streamed, uses = weight_store(model), targets(model, stored)
        by_block = {
            block.name: {key: stored[key] for key, name in uses.items() if name.startswith(f"{block.name}.")}
            for block in model_layers.blocks
        }
        if streamed is None:
            twin = twin_of(model)
            for block in model_layers.blocks:
                values = read_parameters(twin, stored, sorted(by_block[block.name]), torch.device("cpu"))
                _write_weights(block, values)
        elif self.layout == "dense":  # a streamed model cannot be used once its blocks are packed
            for name, places in by_block.items():
                streamed.redirect(name, self.path, {key: Path(place.file).name for key, place in places.items()})
        model.config.sparsity_config = described["sparsity_config"]
        return Report.load(self.path / REPORT_FILE)

    def write_block(
        self, model: PreTrainedModel, model_layers: ModelLayers, block: Block, layers: Mapping[str, LayerReport]
    ) -> None:
        """Writes the shard of a block whose weights are on its device; the next `journal.commit` records it.

        Raises:
            RuntimeError: the file has fewer zeros than the layers' reports say.
        """
        record: dict[str, Any] = {"layers": {name: dataclasses.asdict(layer) for name, layer in layers.items()}}
        if self.processes.main:
            names = _names(model, model_layers)[block.name]
            file = self._shard(model_layers, model_layers.blocks.index(block))
            state = {name: _tensor(model, name) for name in names}
            tensors = self._write(model, file, state)
            check_written([self._dense / file], layers)
            record |= {"file": file, "tensors": tensors}
            if (streamed := weight_store(model)) is not None:
                streamed.redirect(block.name, self._dense, dict.fromkeys(tensors, file))
        if weight_store(model) is not None and self.processes.count > 1:
            record = self.processes.gather(record)[0]
            streamed = weight_store(model)
            assert streamed is not None
            streamed.redirect(block.name, self._dense, dict.fromkeys(record["tensors"], record["file"]))
        self.journal.block_done(block.name, record)

    def report(self) -> dict[str, LayerReport]:
        """Returns the reports of the layers of all finished blocks."""
        return {
            name: LayerReport(**layer)
            for record in self.journal.blocks.values()
            for name, layer in record["layers"].items()
        }

    def finish(
        self, model: PreTrainedModel, model_layers: ModelLayers, report: Report, tokenizer: Any = None
    ) -> Report:
        """Writes what is not in a pruned block, the index and the config; then the folder is complete.

        Returns:
            The report; its `skipped` also names the tensors that the model's class does not know.

        Raises:
            RuntimeError: the folder would not load completely, see `completion.py`.
        """
        source = find_source(model)
        if self.processes.main:
            with self.finishing(model, report, tokenizer, source) as place:
                write_json(place / SAFE_WEIGHTS_INDEX_NAME, self._write_rest(model, model_layers, source))
                _save_config(model, place)
        self.processes.wait()
        return with_notes(report, model, source)

    @contextmanager
    def finishing(
        self, model: PreTrainedModel, report: Report, tokenizer: Any = None, source: Source | None = None
    ) -> Iterator[Path]:
        """Yields a folder for the files of the dense model inside the unfinished one.

        When the block ends, they are made complete (see `completion.py`; `source`: by default found from the model),
        and move to the output, packed if the layout is, `config.json` last.
        """
        place = self.journal.folder / "final"
        shutil.rmtree(place, ignore_errors=True)
        with disk_errors(self.path):
            place.mkdir()
            dense = place if self.layout == "dense" else self._dense
            yield dense
            if tokenizer is not None:
                tokenizer.save_pretrained(dense)
            weights = dense if any(dense.glob("model*.safetensors")) else self._dense
            source = source or find_source(model)
            complete(dense, model, source, weights=weights, tokenizer=tokenizer)
            if self.layout == "bitmask":
                pack_into(dense, place)
            with_notes(report, model, source).save(place / REPORT_FILE)
            for file in sorted(place.iterdir(), key=lambda file: file.name == CONFIG_NAME):
                if file.is_dir():  # a tokenizer may have folders; one is there if the run was killed here before
                    shutil.rmtree(self.path / file.name, ignore_errors=True)
                os.replace(file, self.path / file.name)
            sync_folder(self.path)
            if self.layout == "bitmask":  # at once: a run cannot go on from some of its blocks
                os.rename(self._dense, self.journal.folder / PACKED)
            self.journal.remove()

    def _write_rest(self, model: PreTrainedModel, model_layers: ModelLayers, source: Source | None) -> dict[str, Any]:
        """Writes the shards of what no pruned block holds; returns the index of all shards."""
        names = _names(model, model_layers)
        where: dict[str, str] = {}
        for number, block in enumerate(model_layers.blocks):
            record = self.journal.blocks.get(block.name)
            if record is not None:
                where |= dict.fromkeys(record["tensors"], record["file"])
            elif names[block.name]:
                file = self._shard(model_layers, number)
                with onload(block.module):
                    tensors = self._write(model, file, {name: _tensor(model, name) for name in names[block.name]})
                where |= dict.fromkeys(tensors, file)
        file = self._shard(model_layers, len(model_layers.blocks))
        outside = {name: _lent(model, name) for name in names[""]}
        extra = dict(source.tensors()) if source is not None else {}  # of no class, such as layers for further tokens
        where |= dict.fromkeys(self._write(model, file, outside, extra), file)
        size = 0
        for file in sorted(set(where.values())):
            with safe_open(self._dense / file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (not a dict)
                    part = opened.get_slice(name)
                    size += torch.Size(part.get_shape()).numel() * DTYPES[part.get_dtype()].itemsize
        return {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}

    def _write(
        self, model: PreTrainedModel, file: str, state: Mapping[str, Tensor], extra: Mapping[str, Tensor] | None = None
    ) -> list[str]:
        """Writes a shard under the names of the source, and returns them. `extra`: tensors that have such names already."""
        named = revert_weight_conversion(model, dict(state)) | dict(extra or {})
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
        write_tensors(self._dense / file, kept, {"format": "pt"})
        return list(kept)

    def _shard(self, model_layers: ModelLayers, number: int) -> str:
        return f"model-{number + 1:05d}-of-{len(model_layers.blocks) + 1:05d}.safetensors"


def _names(model: PreTrainedModel, model_layers: ModelLayers) -> dict[str, list[str]]:
    """Returns the names in the state dict by block ("" for the rest): each tensor once, without those tied to another."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    result: dict[str, list[str]] = {name: [] for name in ("", *(block.name for block in model_layers.blocks))}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in tied or name in ignored or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        block = next((b.name for b in model_layers.blocks if name.startswith(b.name + ".")), "")
        result[block].append(name)
    return result


def _write_weights(block: Block, values: Mapping[str, Tensor]) -> None:
    """Puts the prunable weights of a block into the model, from the values of its parameters by full name."""
    with onload(block.module) as onloaded:
        for weight in block.weights.values():
            value = values[weight.parameter]
            value = value if weight.expert is None else value[weight.expert]
            onloaded.write(weight, value.T if weight.transposed else value)


def _tensor(model: PreTrainedModel, name: str) -> Tensor:
    path, _, attribute = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(path), attribute)
    return tensor.detach()


def _lent(model: PreTrainedModel, name: str) -> Tensor:
    """Returns a tensor of the model, also if it is offloaded."""
    if (tensor := _tensor(model, name)).device.type != "meta":
        return tensor
    with onload(model.get_submodule(name.rpartition(".")[0])):
        return _tensor(model, name).clone()


def _save_config(model: PreTrainedModel, folder: Path) -> None:
    """Writes config.json, generation_config.json and the model's own code, as `save_pretrained` does."""
    if model.is_remote_code():
        custom_object_save(model, str(folder), config=model.config)  # type: ignore[arg-type]
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.save_pretrained(folder)
    if model.can_generate():
        with suppress(ValueError):
            model.generation_config.save_pretrained(folder)


def open_output(output: str | os.PathLike[str] | Output | None, overwrite: bool, processes: Processes) -> Output | None:
    """Returns the `Output` for a folder; an `Output` or None is returned as it is."""
    if output is None or isinstance(output, Output):
        return output
    return Output(output, overwrite=overwrite, processes=processes)
