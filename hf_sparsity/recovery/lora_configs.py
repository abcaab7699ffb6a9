"""Which peft configs `sparse_lora` takes, and for every other one why not and what to do instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from peft import HiraConfig, LoraConfig

from .lora_layers import SparseLoraConfig

INITS = (True, False, "gaussian", "orthogonal")  # values of `init_lora_weights` that leave the base weights as they are

# Types of adapter that change no pruned weight, whatever they learn.
_KEEPS_ZEROS = {
    "IA3": "it multiplies rows or columns by numbers",
    "LN_TUNING": "it trains the normalisations only",
    "BEFT": "it trains biases only",
    "TRAINABLE_TOKENS": "it trains rows of the embedding only",
}
# Types whose adapter works beside the weights and is never merged into them; prompts of all kinds as well.
_NEVER_MERGED = {"ADAPTION_PROMPT", "LILY", "POLY", "SHADOW", "XLORA"}
_TRAIN_AND_MASK = (
    "train it with peft.get_peft_model(model, config) and merge it with hf_sparsity.merge_lora(model), which drops its "
    "update at the zeros and so changes what it learned"
)
# Variants of LoRA: the option, why its update cannot be masked, and what to do.
_LEAVE_OUT = "Leave it out"
_VARIANTS = {
    "use_dora": ("DoRA rescales whole rows of W + BA by their norms, which a mask changes", _TRAIN_AND_MASK),
    "use_qalora": ("QALoRA is for quantized bases", _LEAVE_OUT),
    "velora_config": ("VeLoRA has its own backward pass", _TRAIN_AND_MASK),
    "alora_invocation_tokens": ("an activated LoRA cannot be merged", _LEAVE_OUT),
    "arrow_config": ("Arrow routes between adapters and cannot be merged", _LEAVE_OUT),
    "monteclora_config": ("MonteCLoRA samples its update", _LEAVE_OUT),
    "use_bdlora": ("its factors are block-diagonal", _TRAIN_AND_MASK),
    "kasa_config": ("KaSA takes components out of the base weight", _LEAVE_OUT),
    "layer_replication": ("replicated layers share one base weight", _LEAVE_OUT),
    "megatron_config": ("Megatron's layers are not those of transformers", _LEAVE_OUT),
}


def check_config(config: Any, planned: Iterable[str]) -> None:
    """Raises ValueError unless adapters of this config keep the zeros of the planned parameters.

    The message says why, and what to do instead.
    """
    if type(config) not in (LoraConfig, SparseLoraConfig, HiraConfig):
        raise ValueError(_other_type(config))
    for name in getattr(config, "modules_to_save", None) or ():
        if any(f".{name}." in f".{parameter}" for parameter in planned):
            raise ValueError(
                f"modules_to_save={name!r} trains a pruned layer densely; leave it out, or use SparsityCallback"
            )
    if isinstance(config, HiraConfig):
        return
    for name, (reason, advice) in _VARIANTS.items():
        if getattr(config, name, None):
            raise ValueError(f"{name} does not go with a mask: {reason}. {advice[0].upper()}{advice[1:]}")
    if config.init_lora_weights not in INITS:
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} changes the base weights or needs data; use one of {INITS}"
        )


def _other_type(config: Any) -> str:
    kind = type(config).__name__
    start = f"a LoraConfig or HiraConfig is expected, not {kind}"
    peft_type = str(getattr(getattr(config, "peft_type", None), "value", ""))
    if getattr(config, "is_prompt_learning", False) or peft_type in _NEVER_MERGED:
        return f"{start}: that leaves all weights as they are, and no zero is at risk. Use peft.get_peft_model(model, config)"
    if peft_type in _KEEPS_ZEROS:
        return (
            f"{start}: that keeps zeros by itself, since {_KEEPS_ZEROS[peft_type]}. Use peft.get_peft_model(model, config) "
            "and merge_and_unload()"
        )
    return f"{start}, whose update is not masked and may fill zeros when it is merged. Use a LoraConfig; or {_TRAIN_AND_MASK}"


def changed_base(configs: Mapping[str, Any]) -> str:
    """Returns which adapters changed the base weights when they were put on, in words; "" if none is known to have."""
    settings = []
    for name, config in configs.items():
        init = getattr(config, "init_lora_weights", True)
        if isinstance(config, LoraConfig) and init not in (*INITS, "eva"):
            settings.append(f"init_lora_weights={init!r} of adapter {name!r}")
        if getattr(config, "kasa_config", None):
            settings.append(f"KaSA of adapter {name!r}")
    return " and ".join(settings)
