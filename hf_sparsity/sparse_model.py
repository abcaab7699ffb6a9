"""`SparseModel.from_pretrained`: load, plan, prune; or load what is sparse already and check it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any, Literal

from .calibration.calibration import model_batches
from .checkpoint.output import Output
from .checkpoint.streamed import open_streamed
from .config import SparsityConfig
from .files import check_finished
from .model.loading import LOCATION, find_tokenizer
from .model.sparsity import check_zeros
from .plan import Plan
from .planning.make_plan import make_plan
from .pruning.prune import prune
from .pruning.reconstruction import BlockReconstruction

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
        **kwargs: Any,
    ) -> Any:
        """Loads a model and makes it sparse; without a config or plan, loads a sparse one and checks it.

        Args:
            pretrained_model_name_or_path: a folder or Hub id.
            sparsity_config: what is wanted; a plan is made and carried out.
            plan: carry out this plan instead (or the one in this file or model folder).
            calibration_data: see `calibration_batches`; also an iterable of dicts of model inputs. Of several sources,
                a list of `Source`: then `sparsity_report.json` says how far the model departs from the dense one on each.
            calibration_options: keywords for `calibration_batches` (`sequences`, `length`, `column`, ...).
            tokenizer: by default the checkpoint's own.
            auto_class: by default `AutoModelForCausalLM`.
            offload: "stream" for a model larger than memory: each block is read from the checkpoint when its turn
                comes, pruned, and written to `output_dir` at once. See `open_streamed`; of the keywords it takes `dtype`,
                `device` and those that say where the checkpoint is.
            output_dir: writes the sparse model there while it is pruned; an interrupted run goes on when it is called
                again with the same arguments.
            overwrite: start anew if `output_dir` holds an unfinished run or a sparse model.
            hidden_limit: see `prune`.
            reconstruct: see `prune`.
            layout: of the files in `output_dir`, see `save_sparse`. `bitmask` needs room for the dense files too until
                the run is over, and a model with `offload="stream"` is then to be opened anew.
            **kwargs: to transformers (`dtype`, `device_map`, `revision`, ...). `trust_remote_code` is off unless given.

        Returns:
            The transformers model; its plan is in `model.config.sparsity_config`. A streamed one reads its blocks
            from `output_dir`.

        Raises:
            ValueError: contradictory or missing arguments, bad data, a plan for another model, or a checkpoint whose
                zeros do not match its plan.
        """
        from transformers import AutoModelForCausalLM

        if sparsity_config is not None and plan is not None:
            raise ValueError("give sparsity_config or plan, not both: a plan carries the config it was made with")
        if plan is not None and not isinstance(plan, Plan):
            plan = Plan.load(plan)
        config = SparsityConfig.from_dict(sparsity_config) if isinstance(sparsity_config, Mapping) else sparsity_config
        if config is not None and not isinstance(config, SparsityConfig):
            raise ValueError(f"sparsity_config is a {type(config).__name__}; a SparsityConfig or its dict is expected")
        if offload not in (None, "stream"):
            raise ValueError(
                f"offload={offload!r} is unknown; 'stream' reads the model from disk block by block, and for accelerate's "
                "offload there is device_map"
            )
        if offload == "stream" and output_dir is None and (config is not None or plan is not None):
            raise ValueError("offload='stream' prunes into a folder: give output_dir")
        if output_dir is not None and config is None and plan is None:
            raise ValueError("output_dir without sparsity_config or plan: say how sparse the model shall be")
        if layout != "dense" and output_dir is None:
            raise ValueError(f"layout={layout!r} is for files: give output_dir, or save the model with save_sparse")
        location = {key: kwargs[key] for key in LOCATION if key in kwargs}
        if os.path.isdir(pretrained_model_name_or_path):
            check_finished(pretrained_model_name_or_path)
        output = Output(output_dir, overwrite=overwrite, layout=layout) if output_dir is not None else None
        if offload == "stream":
            model = open_streamed(pretrained_model_name_or_path, auto_class=auto_class, **kwargs)
        else:
            model = (auto_class or AutoModelForCausalLM).from_pretrained(pretrained_model_name_or_path, **kwargs)
        if config is None and plan is None:
            if calibration_data is not None:
                raise ValueError("calibration_data without sparsity_config or plan: say how sparse the model shall be")
            check_zeros(model)
            return model
        if output is not None and tokenizer is None:
            tokenizer = find_tokenizer(pretrained_model_name_or_path, **location)
        batches = None
        if calibration_data is not None:
            options = {"seed": config.seed if config else plan.config.get("seed", 0)} | dict(calibration_options or {})  # type: ignore[union-attr]
            batches = model_batches(
                model, calibration_data, options, tokenizer, pretrained_model_name_or_path, location
            )
        if plan is None:
            assert config is not None
            plan = make_plan(model, config, batches, output_dir=output, hidden_limit=hidden_limit)
        report = prune(
            model,
            plan,
            batches,
            output_dir=output,
            hidden_limit=hidden_limit,
            tokenizer=tokenizer,
            reconstruct=reconstruct,
        )
        logger.info(
            "reached a sparsity of %.4f over %d layers (target %.4f)",
            report.sparsity,
            len(report.layers),
            report.target,
        )
        return model
