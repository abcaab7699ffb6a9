"""The model card: `README.md` and a picture of the plan, rendered from the files of a sparse model's folder.

Nothing is typed by hand and no date is written, so rendering again gives the same bytes. What only a person knows (the
licence, the languages) comes from the arguments, the dense model's card, or the card that is there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard import metadata_load

from ...evaluation.metrics import TaskRecord, TextRecord
from ...files import write_whole
from ...model.accepted import check_path
from ...pictures.heatmaps import draw_card
from .markdown import line, slug
from .model_facts import Facts, is_hub_id, read_facts
from .render import render

CARD, PLOT = "README.md", "sparsity_plan.png"
MARKER = "<!-- Rendered by hf_sparsity; `hf-sparsity card` replaces all of it."  # as in card_template.md
LARGEST_CARD = 2**22  # bytes of a card whose metadata are read
# The Hub knows adapter, merge, quantized and finetune (https://huggingface.co/docs/hub/model-cards); pruned weights are the
# same ones changed, in the same format: a finetune. Tags say that it is sparse.
RELATION = "finetune"
DATASETS = {  # name of a recorded text -> id on the Hub, configuration
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "c4": ("allenai/c4", "en"),
    "ptb": ("ptb-text-only/ptb_text_only", "penn_treebank"),
}
# What the Hub accepts as each field. An argument that does not fit is an error; in other people's metadata it is left out.
_ALLOWED = {
    "license": r"[a-z0-9][a-z0-9.-]{0,63}",
    "license_name": r"[\w.-]{1,96}",
    "license_link": r"(https://)?[\w./%-]{1,200}",
    "language": r"[a-z]{2,3}(-[A-Za-z]{2,4})?|code|multilingual",
    "datasets": r"([\w.-]+/)?[\w.-]{1,96}",
    "base_model": r"([\w-][\w.-]*/)?[\w-][\w.-]{0,95}",
    "name": r"([\w-][\w.-]*/)?[\w-][\w.-]{0,95}",
}
INHERITED = ("license", "license_name", "license_link", "language", "datasets")
_LICENCE = ("license", "license_name", "license_link")


def make_card(
    folder: str | os.PathLike[str],
    *,
    dense: str | os.PathLike[str] | None = None,
    name: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    language: str | Sequence[str] | None = None,
    datasets: str | Sequence[str] | None = None,
    overwrite: bool = False,
) -> ModelCard:
    """Writes the model card of a sparse model's folder, and the picture of its plan; the weights may be missing.

        make_card("sparse", dense="meta-llama/Llama-3.1-8B")

    Everything but the arguments is read from `config.json`, `sparsity_report.json`, `sparsity_metrics.json` and the sizes
    of the weight files. A card in the folder that this function wrote keeps the arguments of then, so give them once.

    Args:
        folder: of a sparse model, in the dense or in the bitmask layout.
        dense: the dense model, a folder or a Hub id, whose card is asked for licence, languages and data sets. Only with a
            Hub id is the network used.
        name: the sparse model's name, "owner/name" or "name"; by default made from what was done.
        base_model: the dense model's Hub id; by default `dense`, or the name that the plan recorded, if that is one.
        license: an identifier of the Hub's, such as "apache-2.0".
        language: ISO 639 codes, or "code".
        datasets: Hub ids of what the model was trained on.
        overwrite: replace a `README.md` that this function did not write. Licence, languages and data sets stay.

    Returns:
        The card, as written.

    Raises:
        FileNotFoundError: no `config.json`.
        ValueError: a folder without a plan, unfinished, or with a damaged file; evaluations of other weights; a
            `README.md` that this function did not write; an argument that the Hub would refuse.
        OSError: the card of `dense` cannot be fetched.
    """
    check_path(folder)
    folder = Path(folder)
    facts = read_facts(folder)
    arguments = _checked(
        {"license": license, "language": language, "datasets": datasets, "base_model": base_model, "name": name}
    )
    recorded = {"base_model": facts.hub_id} if facts.hub_id else {}
    people = recorded | _from_card(folder / CARD, overwrite) | _from_dense(dense) | arguments
    if "license" in arguments:
        people = {k: v for k, v in people.items() if k not in _LICENCE} | {"license": arguments["license"]}
    plot = PLOT if _draw(facts, folder / PLOT) else None
    title = people.get("name") or facts.name
    about = metadata(facts, title, people).to_yaml()
    card = ModelCard(render(facts, metadata=about, title=title, base=people.get("base_model"), plot=plot))
    write_whole(folder / CARD, str(card).encode())
    return card


def refresh(folder: str | os.PathLike[str]) -> None:
    """Renders the folder's card again if `make_card` wrote it; call this after the files it is made from changed."""
    file = Path(folder) / CARD
    if file.exists() and MARKER in _read(file):
        make_card(folder)


def metadata(facts: Facts, name: str, people: Mapping[str, Any]) -> ModelCardData:
    """Returns what the Hub reads; `people` has what only people know, by the names of `ModelCardData`."""
    config = facts.plan.config
    pattern = str(config.get("pattern", "unstructured")).replace(":", "of").replace("*", "n")
    tags = ["sparse", "pruned", "hf_sparsity", pattern, f"sparsity-{100 * facts.plan.target:.0f}"]
    tags += [slug(algorithm) for _, algorithm in facts.algorithms]
    tags += ["recovered"] if facts.recoveries else []
    tags += ["bitmask"] if facts.packed else [slug(facts.quantization.split(",")[0])] if facts.quantization else []
    results = [r for text in facts.metrics.texts for r in text_results(text)]
    results += [r for task in facts.metrics.tasks for r in task_results(task)]
    kept = {key: people[key] for key in INHERITED if people.get(key)}
    base = people.get("base_model")
    return ModelCardData(
        **kept,
        base_model=base,
        base_model_relation=("quantized" if facts.quantization else RELATION) if base else None,
        library_name="transformers",
        pipeline_tag=facts.task,
        tags=tags,
        model_name=name.rsplit("/", 1)[-1] if results else None,
        eval_results=results or None,
    )


def text_results(text: TextRecord) -> list[EvalResult]:
    """Returns a text's perplexity and its comparison with the dense model in the Hub's form."""
    dataset, configuration = DATASETS.get(text.name, (slug(text.name), None))
    about: dict[str, Any] = {
        "task_type": "text-generation",
        "dataset_type": dataset,
        "dataset_name": line(text.name),
        "dataset_config": configuration,
        "dataset_split": slug(text.split) if text.split else None,
    }
    where = f"windows of {text.length} tokens"
    results = [
        EvalResult(
            **about,
            metric_type="perplexity",
            metric_name=f"perplexity, {where}",
            metric_value=_round(text.perplexity.value),
        )
    ]
    if text.against is not None:
        results += [
            EvalResult(**about, metric_type=kind, metric_name=f"{what}, {where}", metric_value=_round(measured.value))
            for kind, what, measured in (
                ("kl_divergence", "KL divergence from the dense model, nats a token", text.against.kl),
                ("top1_agreement", "share of positions with the dense model's most likely token", text.against.top1),
            )
        ]
    return results


def task_results(task: TaskRecord) -> list[EvalResult]:
    """Returns a task's metrics in the Hub's form."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=slug(task.name),
            dataset_name=line(task.name),
            metric_type=slug(metric),
            metric_name=f"{line(metric, 60)}, {task.shots} shots",
            metric_value=_round(score.value),
        )
        for metric, score in task.metrics.items()
    ]


def _round(value: float) -> float:
    return float(f"{value:.5g}")


def _draw(facts: Facts, file: Path) -> bool:
    """Returns whether the picture could be drawn: not without matplotlib, nor for more blocks than anyone can look at."""
    try:
        draw_card(facts.plan, facts.report, file)
    except ValueError:
        return False
    return True


# ---- what people know


def _from_card(file: Path, overwrite: bool) -> dict[str, Any]:
    """Returns what the card in the folder says; raises ValueError when `make_card` did not write it and may not replace it."""
    if not file.exists():
        return {}
    ours = MARKER in _read(file)
    if not ours and not overwrite:
        raise ValueError(
            f"{file} was not made by hf_sparsity; pass overwrite=True (--overwrite) to replace it, or keep it"
        )
    kept = _fitting(_metadata(file), (*INHERITED, "base_model"))
    return kept | (_fitting({"name": _title(file)}, ("name",)) if ours else {})


def _from_dense(dense: str | os.PathLike[str] | None) -> dict[str, Any]:
    """Returns what the dense model's card says, and its Hub id if it has one."""
    if dense is None:
        return {}
    if Path(dense).is_dir():
        file = Path(dense) / CARD
        return _fitting(_metadata(file), INHERITED) if file.exists() else {}
    if not is_hub_id(str(dense)):
        raise ValueError(f"dense={str(dense)!r} is neither a folder nor the Hub id of a model")
    from huggingface_hub import hf_hub_download

    try:
        card = _metadata(Path(hf_hub_download(str(dense), CARD)))
    except (OSError, ValueError) as error:
        raise OSError(
            f"the card of {dense} cannot be read ({error}); give its folder, or --license and --language"
        ) from error
    return _fitting(card, INHERITED) | {"base_model": str(dense)}


def _read(file: Path) -> str:
    if (size := file.stat().st_size) > LARGEST_CARD:
        raise ValueError(f"{file} has {size} bytes; a card of more than {LARGEST_CARD} is not read")
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text: {error}") from None


def _metadata(file: Path) -> Mapping[str, Any]:
    _read(file)
    try:
        return metadata_load(file) or {}
    except Exception as error:  # PyYAML has errors of its own, which are no ValueErrors
        raise ValueError(f"the metadata of {file} are damaged: {line(error)}") from None


def _title(file: Path) -> str:
    heading = re.search(r"^# (\S+)$", _read(file), flags=re.MULTILINE)
    return heading[1] if heading else ""


def _fitting(metadata: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Returns those of these fields of other people's metadata that the Hub accepts."""
    kept: dict[str, Any] = {}
    for name in names:
        values = metadata.get(name)
        fitting = [v for v in (values if isinstance(values, list) else [values]) if _fits(name, v)][:50]
        if fitting:
            kept[name] = fitting if isinstance(values, list) else fitting[0]
    return kept


def _fits(name: str, value: Any) -> bool:
    return (
        isinstance(value, str) and re.fullmatch(_ALLOWED[name], value, flags=re.ASCII) is not None and ".." not in value
    )


def _checked(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments that are not None; raises ValueError for one that the Hub would refuse."""
    kept: dict[str, Any] = {}
    for name, value in arguments.items():
        if value is None:
            continue
        values = [value] if isinstance(value, str) else list(value)
        for each in values:
            if not _fits(name, each):
                raise ValueError(f"{name}={each!r} is not what the Hub takes there, such as {_EXAMPLES[name]!r}")
        kept[name] = value if isinstance(value, str) else values
    return kept


_EXAMPLES = {
    "license": "apache-2.0",
    "language": "en",
    "datasets": "allenai/c4",
    "base_model": "meta-llama/Llama-3.1-8B",
    "name": "me/my-sparse-model",
}
