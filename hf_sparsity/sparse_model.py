"""`SparseModel.from_pretrained`: load, plan and prune a model; or load one that is sparse already and check it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any, Literal

from .calibration.calibration import model_batches
from .checkpoint.output import Output
from .checkpoint.quantizer import BitmaskConfig
from .checkpoint.streamed import open_streamed
from .config import SparsityConfig
from .model.accepted import check_source
from .model.classes import location_of
from .model.loading import find_tokenizer, is_packed, load_model
from .model.sparsity import check_zeros
from .plan import Plan
from .planning.make_plan import make_plan
from .pruning.prune import prune
from .pruning.reconstruction import BlockReconstruction
from .runtime.packing import pack_model

logger = logging.getLogger(__name__)


class SparseModel:
    """A factory, as transformers' Auto classes are: what it returns is the plain transformers model."""

    def __init__(self) -> None:
        raise TypeError("SparseModel is a factory: use SparseModel.from_pretrained(...)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        sparsity_config: SparsityConfig | Mapping[str, Any] | None = None,
        plan: Plan | str | os.PathLike[str] | None = None,
        calibration_data: Any = None,
        calibration_options: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
        auto_class: Any = None,
        offload: str | None = None,
        output_dir: str | os.PathLike[str] | None = None,
        overwrite: bool = False,
        hidden_limit: int | None = None,
        reconstruct: BlockReconstruction | None = None,
        layout: Literal["dense", "bitmask"] = "dense",
        dequantize: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Loads a model and makes it sparse; without a config or a plan, loads a sparse model and checks it.

        Args:
            pretrained_model_name_or_path: a folder or Hub id.
            sparsity_config: how sparse the model shall be; a plan is made and carried out.
            plan: carries out this plan instead, or the one in this file or model folder.
            calibration_data: see `calibration_batches`; also an iterable of dicts of model inputs. With a list of `Source`,
                `sparsity_report.json` says how far the model departs from the dense one on each source.
            calibration_options: keywords for `calibration_batches` (`sequences`, `length`, `column`, ...).
            tokenizer: by default the checkpoint's own.
            auto_class: the class to load the model with, or its name, such as "AutoModelForSequenceClassification"; by
                default the one that the checkpoint's `config.json` names.
            offload: "stream" for a model larger than memory: each block is read from the checkpoint when its turn comes,
                pruned, and written to `output_dir` at once. See `open_streamed`; of the keywords it takes `dtype`, `device`
                and those that say where the checkpoint is.
            output_dir: writes the sparse model there while it is pruned; an interrupted run goes on when it is called again
                with the same arguments.
            overwrite: starts anew if `output_dir` holds an unfinished run or a sparse model.
            hidden_limit: see `prune`.
            reconstruct: see `prune`.
            layout: of the files in `output_dir`, see `save_sparse`. "bitmask" needs room for the dense files too until the
                run is over, and with `offload="stream"` the model has to be opened anew afterwards.
            dequantize: False loads a sparse model with its weights packed in memory, bits and values, and multiplies with
                them as they are: see `pack_model`. A packed folder is not unpacked on the way.
            **kwargs: to transformers (`dtype`, `device_map`, `revision`, ...). `trust_remote_code` is off unless given.

        Returns:
            The transformers model, with its plan in `model.config.sparsity_config`. A streamed one reads its blocks from
            `output_dir`.

        Raises:
            ValueError: contradictory or missing arguments, bad data, a checkpoint that is no model of its own, a plan for
                another model, or a checkpoint whose zeros do not match its plan.
        """
        source = pretrained_model_name_or_path
        config, plan = _what_is_wanted(sparsity_config, plan)
        wanted = config is not None or plan is not None
        _check_arguments(
            wanted,
            offload=offload,
            output_dir=output_dir,
            layout=layout,
            calibration_data=calibration_data,
            dequantize=dequantize,
        )
        location = location_of(kwargs)
        check_source(source, location)
        if not dequantize:
            return _load_packed(source, wanted or offload is not None, location, auto_class=auto_class, **kwargs)
        output = Output(output_dir, overwrite=overwrite, layout=layout) if output_dir is not None else None
        load = open_streamed if offload == "stream" else load_model
        model = load(source, auto_class=auto_class, **kwargs)
        if not wanted:
            check_zeros(model)
            return model
        if output is not None and tokenizer is None:
            tokenizer = find_tokenizer(source, **location)
        batches = None
        if calibration_data is not None:
            seed = config.seed if config is not None else plan.config.get("seed", 0)  # type: ignore[union-attr]
            options = {"seed": seed, **(calibration_options or {})}
            batches = model_batches(model, calibration_data, options, tokenizer, source, location)
        if plan is None:
            assert config is not None
            plan = make_plan(model, config, batches, output_dir=output, hidden_limit=hidden_limit)
        where = {"output_dir": output, "hidden_limit": hidden_limit, "tokenizer": tokenizer}
        report = prune(model, plan, batches, reconstruct=reconstruct, **where)
        logger.info(
            "reached a sparsity of %.4f over %d layers (target %.4f)",
            report.sparsity,
            len(report.layers),
            report.target,
        )
        return model


def _load_packed(source: Any, more: bool, location: Mapping[str, Any], **options: Any) -> Any:
    """Loads a sparse model with packed weights; `more`: it shall be pruned or streamed as well, which is refused."""
    if more:
        raise ValueError(
            "dequantize=False loads a sparse model to run it: prune it first, then load its folder, or pack_model(model)"
        )
    packed = is_packed(source, **location)
    if packed:
        options = {"quantization_config": BitmaskConfig(dequantize=False)} | options
    model = load_model(source, **options)
    check_zeros(model)
    return model if packed else pack_model(model)


def _what_is_wanted(
    config: SparsityConfig | Mapping[str, Any] | None, plan: Plan | str | os.PathLike[str] | None
) -> tuple[SparsityConfig | None, Plan | None]:
    """The config and the plan as objects; raises ValueError for both at once, or for what is neither."""
    if config is not None and plan is not None:
        raise ValueError("give sparsity_config or plan, not both: a plan carries the config it was made with")
    if plan is not None and not isinstance(plan, Plan):
        plan = Plan.from_dict(plan) if isinstance(plan, Mapping) else Plan.load(plan)
    if isinstance(config, Mapping):
        config = SparsityConfig.from_dict(config)
    if config is not None and not isinstance(config, SparsityConfig):
        raise ValueError(f"sparsity_config is a {type(config).__name__}; a SparsityConfig or its dict is expected")
    return config, plan


def _check_arguments(
    wanted: bool, *, offload: Any, output_dir: Any, layout: Any, calibration_data: Any, dequantize: Any
) -> None:
    """Raises ValueError for arguments that contradict each other; `wanted`: a config or a plan was given."""
    if not isinstance(dequantize, bool):
        raise ValueError(f"dequantize={dequantize!r}: True (dense weights) or False (packed in memory) is expected")
    if offload not in (None, "stream"):
        raise ValueError(
            f"offload={offload!r} is unknown; 'stream' reads the model from disk block by block, and for accelerate's "
            "offload there is device_map"
        )
    if offload == "stream" and output_dir is None and wanted:
        raise ValueError("offload='stream' prunes into a folder: give output_dir")
    if layout != "dense" and output_dir is None:
        raise ValueError(f"layout={layout!r} is for files: give output_dir, or save the model with save_sparse")
    for name, value in {"output_dir": output_dir, "calibration_data": calibration_data}.items():
        if value is not None and not wanted:
            raise ValueError(f"{name} without sparsity_config or plan: say how sparse the model shall be")
