"""The class of a model, read from its config; and the text part of a config.

`config.json` names the class that a checkpoint was saved from (`architectures`). A model that is opened by another class
loses what that class does not have: the head of a classifier, an encoder, a vision tower.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

# Keywords of `from_pretrained` that say where a checkpoint is; its config and tokenizer are found with the same.
LOCATION = ("revision", "token", "cache_dir", "subfolder", "force_download", "local_files_only", "trust_remote_code")

# The end of a class's name -> the Auto classes that may know its head, where the class itself is not in transformers.
_HEADS = {
    "ForCausalLM": ("AutoModelForCausalLM",),
    "LMHeadModel": ("AutoModelForCausalLM",),
    "ForConditionalGeneration": (
        "AutoModelForSeq2SeqLM",
        "AutoModelForImageTextToText",
        "AutoModelForSpeechSeq2Seq",
        "AutoModelForMultimodalLM",
    ),
    "ForMaskedLM": ("AutoModelForMaskedLM",),
    "ForSequenceClassification": ("AutoModelForSequenceClassification",),
    "ForTokenClassification": ("AutoModelForTokenClassification",),
    "ForQuestionAnswering": ("AutoModelForQuestionAnswering",),
    "Model": ("AutoModel",),
}


def text_config(config: Any) -> Any:
    """Returns the part of a config that describes the language model: the config itself where it has no parts.

    Where a config has several text parts, an encoder and a decoder, it is the decoder's.
    """
    for which in ({}, {"decoder": True}):
        try:
            return config.get_text_config(**which)
        except ValueError:  # several parts would do
            continue
    return config


def location_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those of the keywords of a `from_pretrained` that say where the checkpoint is."""
    return {name: options[name] for name in LOCATION if name in options}


def find_class(source: str | os.PathLike[str], chosen: Any = None, **location: Any) -> Any:
    """Returns the class to open a checkpoint with: `model_class` of the config in a folder or of a Hub id.

    `location`: `revision`, `token`, ... as in transformers; `trust_remote_code` is off unless given.
    """
    trust = bool(location.pop("trust_remote_code", False))
    return model_class(AutoConfig.from_pretrained(source, trust_remote_code=trust, **location), chosen)


def model_class(config: Any, chosen: Any = None) -> Any:
    """Returns the class to open a checkpoint with.

    Args:
        config: of the checkpoint. Its `architectures` decide; a config that names none is a causal language model's if
            transformers has such a class for it, else an encoder-decoder's.
        chosen: overrides the config: an Auto class or a class of transformers, or the name of one.

    Returns:
        A class of transformers, or an Auto class. Code that comes with a checkpoint is reached only by an Auto class, which
        refuses it unless `trust_remote_code` is given.

    Raises:
        ValueError: a name that transformers does not have, or a class that does not go with the config.
    """
    if chosen is not None:
        return _chosen(chosen, config)
    names = [name for name in config.architectures or () if isinstance(name, str)]
    for name in names:
        if auto := _remote(config, name):
            return auto
        kind: Any = getattr(transformers, name, None)
        if _is_model(kind) and isinstance(config, kind.config_class):
            return kind
    for name in names:
        for auto in _autos_for(name):
            if _knows(auto, config):
                return auto
    if not names:
        kind = config.model_type
        both = kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        auto = transformers.AutoModelForSeq2SeqLM if both else AutoModelForCausalLM
        if _knows(auto, config):
            return auto
    raise ValueError(
        f"config.json names {', '.join(names) or 'no class'} for a model of type {config.model_type!r}, and this "
        f"transformers has no such class; give one that it has (--model-class, auto_class=)"
    )


def from_config(config: Any, chosen: Any = None, *, trust_remote_code: bool = False, **options: Any) -> PreTrainedModel:
    """Builds a model with new weights by `model_class`; `options` as for an Auto class's `from_config`."""
    kind = model_class(config, chosen)
    if hasattr(kind, "from_config"):
        return kind.from_config(config, trust_remote_code=trust_remote_code, **options)
    return kind._from_config(config, **options)


def _chosen(chosen: Any, config: Any) -> Any:
    """The class that the caller asks for, by name or itself."""
    kind = _named(chosen) if isinstance(chosen, str) else chosen
    if not (hasattr(kind, "from_pretrained") or hasattr(kind, "from_config")):
        raise ValueError(
            f"auto_class={chosen!r}: a class of transformers or its name is expected, such as "
            "'AutoModelForSequenceClassification'"
        )
    fits = isinstance(config, kind.config_class) if _is_model(kind) else not _is_auto(kind) or _knows(kind, config)
    if not fits:
        saved = ", ".join(config.architectures or ()) or "no class"
        raise ValueError(
            f"{kind.__name__} does not open models of type {config.model_type!r}; config.json names {saved}, which is "
            "used when no class is given"
        )
    return kind


def _named(name: str) -> Any:
    """The class of transformers with this name; `ValueError` otherwise. Nothing but transformers is looked in."""
    kind = getattr(transformers, name, None) if name.isidentifier() else None
    if _is_auto(kind) or _is_model(kind):
        return kind
    classes = [n for n in dir(transformers) if n.startswith("AutoModel") or n.endswith(tuple(_HEADS))]
    near = difflib.get_close_matches(name, classes, n=1)
    raise ValueError(
        f"{name!r} is no model class of this transformers{f'; did you mean {near[0]!r}?' if near else ''}; give a name such as "
        "'AutoModelForSequenceClassification' or 'LlamaForCausalLM'"
    )


def is_model_class(name: str) -> bool:
    """Returns whether transformers has a model class of this name."""
    return name.isidentifier() and _is_model(getattr(transformers, name, None))


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, PreTrainedModel) and kind.config_class is not None


def _is_auto(kind: Any) -> bool:
    return isinstance(kind, type) and kind.__name__.startswith("AutoModel") and hasattr(kind, "from_config")


def _knows(auto: Any, config: Any) -> bool:
    """Returns whether an Auto class has a class for this config, in transformers or in code that comes with the checkpoint."""
    remote = getattr(config, "auto_map", None) or {}
    mapping: Any = getattr(auto, "_model_mapping", None)
    return auto.__name__ in remote or mapping is None or type(config) in mapping


def _remote(config: Any, name: str) -> Any:
    """The Auto class that opens a class in the checkpoint's own code, if that is where this one is."""
    for auto, reference in (getattr(config, "auto_map", None) or {}).items():
        kind = getattr(transformers, auto, None) if isinstance(auto, str) and auto.startswith("AutoModel") else None
        if isinstance(reference, str) and reference.rpartition(".")[2] == name and _is_auto(kind):
            return kind
    return None


def _autos_for(name: str) -> list[Any]:
    return [getattr(transformers, auto) for end, autos in _HEADS.items() if name.endswith(end) for auto in autos]


def predicts_next_token(model: Any) -> bool:
    """Returns whether each position of the model's logits predicts the next token of its text, without having seen it.

    True for causal language models, also those that see or hear, and for encoder-decoders, of the decoder's text.
    """
    if not model.can_generate():
        return False
    config = model.config
    both_ways = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.is_encoder_decoder
    return not both_ways or bool(getattr(config, "is_decoder", True))


def require_next_token(model: Any, purpose: str, *, decoder_only: bool = False) -> None:
    """Raises ValueError unless the model predicts next tokens; `purpose` is what needs that, such as "perplexity".

    `decoder_only`: also for encoder-decoders, which predict another text than the one they read.
    """
    name = type(model).__name__
    if not predicts_next_token(model):
        heads = "a language model with its head (…ForCausalLM)"
        raise ValueError(f"{purpose} needs next-token predictions, and {name} makes none: {heads} is expected")
    if decoder_only and model.config.is_encoder_decoder:
        raise ValueError(
            f"{purpose} is for models that predict the text they read; {name} reads one text and predicts another"
        )
