"""Make the models of `model_cards/` again, from the embedded model, and render their cards.

    python examples/make_model_cards.py                       # all of model_cards/, about twenty minutes on one free core
    python examples/make_model_cards.py --only 2of4 --output my_cards

Each model is pruned with the calibration text, and a second one is recovered by block reconstruction on more of the same
text; both are evaluated on all held-out modules, which nothing was chosen by. What a card is rendered from is kept, and the
weights are not: `make_card` on a folder of model_cards/ gives the same bytes again, without running a model.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparsity import SparsityConfig, Text, calibration_batches, demo, make_plan, prune, recover, save_sparse
from hf_sparsity.checkpoint.zeros import REPORT_FILE
from hf_sparsity.evaluation.evaluate import evaluate
from hf_sparsity.evaluation.metrics import METRICS_FILE
from hf_sparsity.plan import Report
from hf_sparsity.publish.card.make_card import CARD, PLOT, make_card

MODELS = {
    "50": SparsityConfig(0.5, allocator="owl"),
    "2of4": SparsityConfig(pattern="2:4"),
    "60": SparsityConfig(0.6, allocator="owl"),
    "70": SparsityConfig(0.7, allocator="owl"),
}
SHARD = "4MB"  # more than one file, so that there is an index, which knows the size of the weights without them
KEPT = (CARD, PLOT, "config.json", REPORT_FILE, METRICS_FILE, "model.safetensors.index.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=MODELS, action="append", help="repeatable; by default all")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "model_cards")
    parser.add_argument("--sequences", type=int, default=64, help="of calibration text")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=16, help="of recovery, 8 sequences each")
    parser.add_argument(
        "--windows", type=int, help="number of held-out windows of 512 tokens to evaluate on (default: all)"
    )
    args = parser.parse_args()
    for key in args.only or MODELS:
        with tempfile.TemporaryDirectory() as work:
            for folder in make(MODELS[key], Path(work), args):
                publish(folder, args)


def make(config: SparsityConfig, work: Path, args: argparse.Namespace) -> list[Path]:
    """Folders of the pruned and the recovered model."""
    tokenizer = AutoTokenizer.from_pretrained(demo.PATH)
    texts = [text for _, text in demo.texts("calibration")]
    batches = calibration_batches(texts, tokenizer, sequences=args.sequences, length=args.length)
    model = load()
    plan = make_plan(model, config, batches)
    report = prune(model, plan, batches)
    pruned = save_sparse(model, work / "pruned", report=report, max_shard_size=SHARD)
    model = recover(
        model,
        texts,
        "reconstruct",
        output_dir=work / "run",
        teacher=load(),
        tokenizer=tokenizer,
        steps=args.steps,
        length=args.length,
    )
    report = Report.load(work / "run" / REPORT_FILE)
    return [pruned, save_sparse(model, work / "recovered", report=report, max_shard_size=SHARD)]


def publish(folder: Path, args: argparse.Namespace) -> None:
    """Evaluates a model, renders its card, and keeps what the card was rendered from."""
    heldout = Text("demo held-out", [text for _, text in demo.texts("heldout")])
    evaluate(
        folder,
        texts=heldout,
        against=load(),
        tokenizer=AutoTokenizer.from_pretrained(demo.PATH),
        length=512,
        windows=args.windows,
    )
    card = make_card(folder, license="apache-2.0", language="code")
    output = args.output / str(card.data.model_name)
    output.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        shutil.copyfile(folder / name, output / name)
    print(f"{output}: {sum(file.stat().st_size for file in output.iterdir()) / 1e3:.0f} kB")


def load() -> Any:
    """The dense model, by the name that everyone has it under."""
    model = AutoModelForCausalLM.from_pretrained(demo.PATH)
    model.config._name_or_path = "demo"
    return model


if __name__ == "__main__":
    main()
