"""Which models are accepted, and what is said to those who hand in something else.

Everything that takes a model calls `check_model` before it does any work, or `check_kind` where it changes no weight.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.peft_utils import find_adapter_config_file

from ..files import check_finished, read_json
from .classes import text_config

# Packages whose linear layers hold quantized weights.
_QUANTIZERS = ("bitsandbytes", "optimum.quanto", "torchao", "torch.ao.nn", "gptqmodel", "auto_gptq", "awq", "hqq")


def check_kind(model: Any) -> None:
    """Raises ValueError for anything but a transformers model, with what to do instead.

    Refused: paths, and wrappers such as peft's, DataParallel, torch.compile's, or a module around a transformers model.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(_what_to_do(model))


def check_model(model: Any, doing: str = "pruned") -> None:
    """Raises ValueError unless `model` is a transformers model whose weights are its own, with what to do instead.

    Refused: what `check_kind` refuses, adapters inside the model, masks of `torch.nn.utils.prune` and other
    reparametrisations, quantized weights.

    `doing`: what shall happen to the weights, for the message.
    """
    check_kind(model)
    compiled = next((name for name, module in model.named_modules() if hasattr(module, "_orig_mod")), None)
    if compiled is not None:
        raise ValueError(
            f"{compiled} of {type(model).__name__} was replaced by torch.compile; hand in the model as it was loaded, and "
            "compile it afterwards"
        )
    refuse_adapters(model)
    refuse_quantized(model, doing)
    _refuse_reparametrised(model)


def _what_to_do(model: Any) -> str:
    """The message for something that is not a transformers model."""
    kind = type(model).__name__
    if isinstance(model, (str, os.PathLike)):
        return (
            f"a loaded model is expected, not the path {str(model)!r}: load it first, as "
            f"SparseModel.from_pretrained does, or by AutoModelForCausalLM.from_pretrained({str(model)!r})"
        )
    if isinstance(model, type):
        return f"a model is expected, not the class {model.__name__}: call {model.__name__}.from_pretrained(...)"
    if _from(type(model), "peft"):
        return (
            f"a transformers model is expected, not a {kind} of peft, whose adapters are no part of the model. Merge them "
            "first: model = model.merge_and_unload(), or merge_lora(model) where the base is sparse already"
        )
    inner = next(_inside(model), None)
    if inner is not None:
        path, inside = inner
        return (
            f"a transformers model is expected, not a module around one ({kind}): pass model{_accessor(path)}, the "
            f"{type(inside).__name__} in it, which is changed in place"
        )
    if isinstance(model, nn.Module):
        return f"a transformers model (PreTrainedModel) is expected; {kind} is none, and has none inside"
    return f"a transformers model (PreTrainedModel) is expected, not a {kind}"


def _accessor(path: str) -> str:
    return "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in path.split("."))


def _inside(model: Any) -> Iterator[tuple[str, PreTrainedModel]]:
    """The transformers models inside an object (a wrapper, a pipeline, a Trainer), as (attribute path, model)."""
    if isinstance(model, nn.Module):
        for path, module in model.named_modules():
            if isinstance(module, PreTrainedModel):
                yield path, module
    elif isinstance(getattr(model, "model", None), PreTrainedModel):
        yield "model", model.model


def _from(kind: type, package: str) -> bool:
    """Returns whether a class, or one that it is derived from, stands in a package."""
    return any(f"{base.__module__}.".startswith(f"{package}.") for base in kind.__mro__)


def _is_injected(module: nn.Module) -> bool:
    """Returns whether a module was put into a model by peft: a wrapped layer with its adapters."""
    return _from(type(module), "peft")


def refuse_adapters(model: nn.Module) -> None:
    """Raises ValueError for a model that holds adapters of peft, with the line that merges them."""
    adapted = next((name for name, module in model.named_modules() if _is_injected(module)), None)
    if adapted is not None:
        raise ValueError(
            f"{type(model).__name__} holds adapters of peft, such as the one on {adapted!r}, which are no part of the model. "
            "Merge them first: model = peft_model.merge_and_unload(), or merge_lora(peft_model) where the base is sparse "
            "already. After model.add_adapter: model.save_pretrained(folder), which writes the adapter alone, then "
            "PeftModel.from_pretrained(base, folder).merge_and_unload() on the base loaded anew"
        )


def quantization_of(config: Any) -> Any:
    """Returns the `quantization_config` of a config or of its text part; None where there is none."""
    parts = (getattr(part, "quantization_config", None) for part in (config, text_config(config)))
    return next((part for part in parts if part is not None), None)


def refuse_quantized(model: Any, doing: str = "pruned") -> None:
    """Raises ValueError for a model with quantized weights; `doing` is what cannot be done to them."""
    quantized = getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False)
    kinds = {type(module) for module in model.modules()} | {type(p.data) for p in model.parameters()}
    by = next((package for package in _QUANTIZERS for kind in kinds if _from(kind, package)), None)
    if quantized or by:
        raise ValueError(quantized_message("the model", doing, by))


def quantized_message(what: str, doing: str = "pruned", by: str | None = None) -> str:
    """Returns what is said of a quantized model or checkpoint."""
    return (
        f"{what} is quantized{f' ({by})' if by else ''}; its weights cannot be {doing}. Take the original in bfloat16 or "
        "float32, and quantize what comes of it: zeros stay zero"
    )


def _refuse_reparametrised(model: nn.Module) -> None:
    """Raises ValueError for a linear layer whose weight is computed from other parameters at each call."""
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D)) or module._parameters.get("weight") is not None:
            continue
        if any(isinstance(hook, torch_prune.BasePruningMethod) for hook in module._forward_pre_hooks.values()):
            raise ValueError(
                f"{name} is masked by torch.nn.utils.prune. Make the mask permanent first, for each such module: "
                "torch.nn.utils.prune.remove(module, 'weight')"
            )
        undo = "undo that first"
        if parametrize.is_parametrized(module):
            undo = "first call torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')"
        raise ValueError(f"the weight of {name} is computed from other parameters (a reparametrisation); {undo}")


def check_path(folder: Any) -> None:
    """Raises ValueError for what is not the name of a folder or file, such as a model."""
    if not isinstance(folder, (str, os.PathLike)):
        kind = type(folder).__name__
        advice = "; save the model first: save_sparse(model, folder)" if hasattr(folder, "state_dict") else ""
        raise ValueError(f"the name of a folder is expected, not a {kind}{advice}")


def check_tokenizer(tokenizer: Any) -> None:
    """Raises ValueError for what is neither None nor a tokenizer or processor that can be saved."""
    if tokenizer is not None and not callable(getattr(tokenizer, "save_pretrained", None)):
        raise ValueError(
            f"tokenizer is a {type(tokenizer).__name__}; a loaded one is expected: AutoTokenizer.from_pretrained(...)"
        )


def check_source(source: str | os.PathLike[str], location: Mapping[str, Any] | None = None) -> None:
    """Checks that a checkpoint is there and a model of its own.

    `location`: `revision`, `token`, ... as in transformers.

    Raises:
        ValueError: an unfinished folder, an adapter, or no name at all.
        FileNotFoundError: a path at which there is no folder.
    """
    check_path(source)
    if os.path.isdir(source):
        check_finished(source)
    elif os.path.isabs(source) or str(source).startswith(".") or len(Path(source).parts) > 2:
        raise FileNotFoundError(f"there is no folder {str(source)!r}; give the folder of a model, or its id on the Hub")
    names = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
    where = {name: value for name, value in (location or {}).items() if name in names and value is not None}
    file = find_adapter_config_file(str(source), **where)
    if file is None:
        return
    config = read_json(file)
    config = config if isinstance(config, Mapping) else {}
    base = config.get("base_model_name_or_path") or "a model that it does not name"
    merge = (
        f"peft.AutoPeftModelForCausalLM.from_pretrained({str(source)!r}).merge_and_unload().save_pretrained('merged')"
    )
    if "sparse_base" in config:
        merge = f"hf_sparsity.merge_lora(hf_sparsity.load_sparse_lora(base, {str(source)!r})).save_pretrained('merged')"
    raise ValueError(
        f"{str(source)!r} is an adapter of {str(base)!r}, not a model. Merge it first, and use the result: {merge}"
    )


@contextmanager
def reading(source: str | os.PathLike[str]) -> Iterator[None]:
    """Turns what other libraries raise for a damaged or incomplete checkpoint into a ValueError that says what is wrong.

    Errors of the network and of the machine pass as they are.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, SafetensorError, StrictDataclassError, ImportError) as error:
        raise ValueError(f"{str(source)!r} cannot be loaded: {_last_line(error)}") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"{str(source)!r} cannot be loaded: its weights have other shapes than its config.json says"
        ) from error
    except OSError as error:
        if error.errno is not None or not os.path.isdir(source):
            raise
        raise ValueError(f"{str(source)!r} cannot be loaded: {_last_line(error)}") from error


def _last_line(error: BaseException) -> str:
    """Returns an error's kind and the line of its message that says most: the last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (
        lines[-1]
        if lines and isinstance(error, (OSError, ImportError))
        else f"{type(error).__name__}: {(lines or [''])[-1]}"
    )
