"""Ways to 80 and 90 %: held-out perplexity of the embedded model after each, at equal tokens.

    python tests/benchmarks/train_to_sparsity.py --output train.json                  # about half an hour of one core
    python tests/benchmarks/train_to_sparsity.py --output train.json --sparsity 0.8   # 80 % only; goes on where it stopped
    python tests/benchmarks/train_to_sparsity.py --output train.json --steps 2000     # 2 million tokens for each way
    python tests/benchmarks/train_to_sparsity.py --table train.json                   # markdown of what is there
    python tests/benchmarks/train_to_sparsity.py --publish train.json                 # into results/train_to_sparsity.json
    python tests/benchmarks/train_to_sparsity.py --choose elsa --output trials.json   # learning rates and penalties

Each way has `--steps` steps of 8 sequences of 128 tokens of the calibration modules, float32, one thread. The plan is that of a race
with Wanda on 128 sequences (`--short-race`: of two allocators, 12 steps of descent, on 32 sequences); the ways that prune first do
it by SparseGPT and this plan, about the best one-shot of `allocators.py`. Judged on every second window of 128 tokens of the held-out modules, which no
plan, choice or training has seen; `--choose` judges on sequences of the calibration modules that `recover` holds out.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparsity import (
    Plan,
    SparsityConfig,
    calibration_batches,
    demo,
    evaluate_text,
    make_plan,
    measure_sparsity,
    prune,
    text_windows,
)
from hf_sparsity.recovery.methods import (
    Distillation,
    FullFineTuning,
    MaskedLora,
    TrainByElsa,
    Training,
    TrainToSparsity,
)
from hf_sparsity.recovery.recover import recover
from hf_sparsity.recovery.schedules import Elsa, Gradual

LENGTH, BATCH, SEQUENCES = 128, 8, 128
TARGETS = (0.8, 0.9)
RESULTS = Path(__file__).parent / "results" / "train_to_sparsity.json"
WAYS = {
    "pruned": "one-shot: the race's budgets, SparseGPT",
    "lora": "+ masked LoRA",
    "full": "+ full fine-tuning",
    "distilled": "+ full fine-tuning, distilled",
    "gradual": "gradual magnitude, uniform",
    "gradual-distilled": "gradual magnitude, uniform, distilled",
    "gradual-plan-distilled": "gradual magnitude, the race's budgets, distilled",
    "elsa": "ELSA, uniform",
    "elsa-plan": "ELSA, the race's budgets",
    "elsa-plan-distilled": "ELSA, the race's budgets, distilled",
}
ONE_SHOT = ("pruned", "lora", "full", "distilled")


def method_of(way: str, plan: Plan, steps: int) -> Training:
    """Returns the method of `recover` behind a way that trains."""
    common: dict[str, Any] = {"steps": steps, "batch": BATCH}
    if way.startswith("gradual"):
        schedule = Gradual(end=0.6, interval=max(1, steps // 40), scores="magnitude")
        return TrainToSparsity(plan=plan, schedule=schedule, hard=0.5, **common)
    if way.startswith("elsa"):
        schedule = Elsa(end=0.75, interval=min(32, max(1, steps // 20)), penalty=PENALTY)
        return TrainByElsa(plan=plan, schedule=schedule, hard=0.5, **common)
    kinds = {"lora": MaskedLora, "full": FullFineTuning, "distilled": Distillation}
    return kinds[way](**common)


PENALTY = 0.1


class Bench:
    """The model, its texts, the held-out windows and the plans, made once."""

    def __init__(self, folder: Path, race: dict[str, Any], sequences: int, windows: int | None):
        self.folder, self.race = folder, race
        self.tokenizer = AutoTokenizer.from_pretrained(demo.PATH)
        self.texts = [text for _, text in demo.texts("calibration")]
        heldout = "\n\n".join(text for _, text in demo.texts("heldout"))
        self.heldout = text_windows(heldout, self.tokenizer, LENGTH)[::2][:windows]
        self.batches = calibration_batches(self.texts, self.tokenizer, sequences=SEQUENCES, length=LENGTH, seed=0)
        self.planning = self.batches[:sequences]

    def dense(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(demo.PATH, dtype=torch.float32)

    def perplexity(self, model: Any) -> float:
        return evaluate_text(model, self.heldout).perplexity

    def plan(self, target: float, allocator: str) -> Plan:
        """Returns a plan, from a file beside the output once it is made."""
        file = self.folder / f"plan-{allocator}-{100 * target:.0f}.json"
        if not file.exists():
            chosen = self.race if allocator == "race" else allocator
            config, start = SparsityConfig(target, pruner="wanda", allocator=chosen), time.process_time()
            make_plan(self.dense(), config, self.planning).save(file)
            print(f"planned {file.name} in {time.process_time() - start:.0f} CPU s", flush=True)
        return Plan.load(file)

    def run(self, target: float, way: str, steps: int, changes: dict[str, Any] | None = None) -> dict[str, Any]:
        """Returns what came of one way."""
        model, loss = self.dense(), None
        if way in ONE_SHOT:
            plan = self.plan(target, "race")
            plan = replace(plan, config={**plan.config, "pruner": {"name": "sparsegpt"}})
            prune(model, plan, self.batches)
        else:
            plan = self.plan(target, "race" if "-plan" in way else "uniform")
        start = time.process_time()
        if way != "pruned":
            method = replace(method_of(way, plan, steps), **(changes or {}))
            teacher = self.dense() if "distilled" in way else None
            with tempfile.TemporaryDirectory() as folder:
                model = recover(
                    model,
                    self.texts,
                    method,
                    output_dir=Path(folder) / "out",
                    teacher=teacher,
                    tokenizer=self.tokenizer,
                    length=LENGTH,
                )
            loss = model.config.sparsity_config["recovered"]["loss"]["after"]
        seconds = time.process_time() - start
        return {
            "perplexity": self.perplexity(model),
            "calibration_perplexity": None if loss is None else math.exp(loss),
            "sparsity": measure_sparsity(model).sparsity,
            "windows": len(self.heldout),
            "tokens": 0 if way == "pruned" else steps * BATCH * LENGTH,
            "cpu_seconds": round(seconds, 1),
        }


def table(found: list[dict[str, Any]]) -> str:
    """Returns a Markdown table: a row for each way, perplexity and CPU seconds for each sparsity."""
    targets = [t for t in TARGETS if any(r["target"] == t for r in found)]
    head = [""] + [text for t in targets for text in (f"{100 * t:.0f} %", "CPU s")]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    for way, words in WAYS.items():
        row = [words]
        for t in targets:
            one = next((r for r in found if (r["target"], r["way"]) == (t, way)), None)
            row += [f"{one['perplexity']:.2f}", f"{one['cpu_seconds']:.0f}"] if one else ["", ""]
        if any(row[1:]):
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def publish(found: list[dict[str, Any]]) -> None:
    """Writes the file that `docs/render.py` reads."""
    dense = next(r["perplexity"] for r in found if r["way"] == "dense")
    rows = [
        {"way": words, **{f"{100 * t:.0f}": _cell(found, t, way) for t in TARGETS}}
        for way, words in WAYS.items()
        if any(r["way"] == way for r in found)
    ]
    tokens = max(r["tokens"] for r in found)
    command = f"python tests/benchmarks/train_to_sparsity.py --steps {tokens // (BATCH * LENGTH)}"
    data = {"command": command, "tokens": tokens, "dense": dense, "rows": rows}
    RESULTS.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _cell(found: list[dict[str, Any]], target: float, way: str) -> dict[str, Any] | None:
    keys = ("perplexity", "sparsity", "cpu_seconds")
    one = next((r for r in found if (r["target"], r["way"]) == (target, way)), None)
    return None if one is None else {key: round(one[key], 4) for key in keys}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("train_to_sparsity.json"))
    parser.add_argument("--sparsity", type=float, choices=TARGETS, help="this one only")
    parser.add_argument("--only", action="append", choices=tuple(WAYS), help="this way only; repeatable")
    parser.add_argument("--steps", type=int, default=160, help="of 8 sequences of 128 tokens (default: 160)")
    parser.add_argument("--short-race", action="store_true", help="plan by a short race, where minutes count")
    parser.add_argument("--windows", type=int, help="judge by this many of the held-out windows (default: all)")
    parser.add_argument(
        "--choose", choices=tuple(WAYS)[1:], help="try learning rates, and penalties of ELSA, for this way"
    )
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3], help="learning rates to try")
    parser.add_argument("--penalties", type=float, nargs="+", default=[0.01, 0.03, 0.1], help="of ELSA, to try")
    parser.add_argument("--table", type=Path, help="print the markdown of this file instead")
    parser.add_argument("--publish", type=Path, help="write this file's results into results/ instead")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return
    if args.publish:
        publish(json.loads(args.publish.read_text()))
        return
    torch.set_num_threads(1)
    short = {"name": "race", "candidates": ["owl", "fisher"], "slices": [1024, 2048], "descent": 12}
    bench = Bench(
        args.output.parent,
        short if args.short_race else {"name": "race"},
        32 if args.short_race else SEQUENCES,
        args.windows,
    )
    found = json.loads(args.output.read_text()) if args.output.exists() else []

    def add(target: float, way: str, tried: dict[str, Any] | None = None) -> None:
        case: dict[str, Any] = {"target": target, "way": way, "steps": args.steps} | ({"tried": tried} if tried else {})
        if any(all(r.get(key) == value for key, value in case.items()) and r.get("tried") == tried for r in found):
            return
        changes = dict(tried or {})
        if "penalty" in changes:
            schedule = method_of(way, bench.plan(target, "uniform"), args.steps).schedule
            changes["schedule"] = replace(schedule, penalty=changes.pop("penalty"))
        if way == "dense":
            result = {"perplexity": bench.perplexity(bench.dense()), "tokens": 0, "sparsity": 0.0, "cpu_seconds": 0.0}
        else:
            result = bench.run(target, way, args.steps, changes)
        found.append(case | result)
        args.output.write_text(json.dumps(found, indent=1))
        print(target, way, tried or "", f"{result['perplexity']:.3f}", result.get("calibration_perplexity"), flush=True)

    targets = [t for t in TARGETS if args.sparsity in (None, t)]
    if args.choose:
        for target in targets:
            for rate in args.rates:
                for penalty in args.penalties if "elsa" in args.choose else [None]:
                    add(target, args.choose, {"lr": rate} | ({} if penalty is None else {"penalty": penalty}))
        return
    add(0.0, "dense")
    for target in targets:
        for way in args.only or WAYS:
            add(target, way)


if __name__ == "__main__":
    main()
