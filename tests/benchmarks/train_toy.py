"""Ways to 80 and 90 % on a toy, in ten minutes of one core: which order, before `train_to_sparsity.py` takes a night.

    python tests/benchmarks/train_toy.py --output toy.json        # goes on where it stopped
    python tests/benchmarks/train_toy.py --publish toy.json       # into results/train_toy.json

A Llama of three blocks of width 64 learns a second-order source over 64 tokens (1200 steps of 16 sequences of 32 tokens, float32).
Then each way has `--steps` steps of as many tokens. "pruned" is Wanda by the plan of a short race; the ways that train after it
start there. Judged on 400 sequences of the source that nothing was trained, planned or chosen on.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from hf_sparsity import Elsa, Gradual, Plan, SparsityCallback, SparsityConfig, Teacher, make_plan, prune

VOCABULARY, LENGTH, BATCH, RATE = 64, 32, 16, 2e-3
TARGETS = (0.8, 0.9)
RESULTS = Path(__file__).parent / "results" / "train_toy.json"
RACE = {"name": "race", "candidates": ["owl", "fisher"], "slices": [1024, 2048], "descent": 12}


def growth(**changes: Any) -> Gradual:
    return Gradual(**{"end": 0.6, "interval": 5, "scores": "magnitude"} | changes)


WAYS: dict[
    str, tuple[str, Any, bool]
] = {  # words: the budgets, the schedule (None: pruned before), whether there is a teacher
    "pruned": ("race", None, False),
    "pruned, full fine-tuning": ("race", None, False),
    "pruned, full fine-tuning, distilled": ("race", None, True),
    "gradual, uniform": ("uniform", growth(), False),
    "gradual, the race's budgets": ("race", growth(), False),
    "gradual, the race's budgets, distilled": ("race", growth(), True),
    "gradual, the race's budgets, scores of Fisher": ("race", growth(scores="fisher"), False),
    "gradual, the race's budgets, regrowth": ("race", growth(regrow=0.3), False),
    "ELSA, the race's budgets, penalty 0.003": ("race", Elsa(penalty=0.003, interval=10, end=0.75), False),
    "ELSA, the race's budgets, penalty 0.03": ("race", Elsa(penalty=0.03, interval=10, end=0.75), False),
    "ELSA, the race's budgets, penalty 0.3": ("race", Elsa(penalty=0.3, interval=10, end=0.75), False),
    "ELSA, uniform, penalty 0.03": ("uniform", Elsa(penalty=0.03, interval=10, end=0.75), False),
}


class Bench:
    """The source, its samples, the dense model and the plans."""

    def __init__(self, steps: int):
        self.steps = steps
        generator = torch.Generator().manual_seed(0)
        self.tables = [torch.randn(VOCABULARY, VOCABULARY, generator=generator) * 1.5 for _ in range(2)]
        self.train, self.held = self.sample(4000, generator), self.sample(400, generator)
        torch.manual_seed(0)
        self.dense = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=64,
                intermediate_size=192,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=64,
                tie_word_embeddings=False,
            )
        )
        self.fit(self.dense, 1200, 2 * RATE, None)

    def sample(self, count: int, generator: torch.Generator) -> torch.Tensor:
        ids = torch.randint(0, VOCABULARY, (count, 2), generator=generator)
        while ids.shape[1] < LENGTH:
            chances = torch.softmax(self.tables[0][ids[:, -1]] + self.tables[1][ids[:, -2]], -1)
            ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], 1)
        return ids

    def fit(self, model: Any, steps: int, rate: float, callback: SparsityCallback | None) -> Any:
        generator = torch.Generator().manual_seed(1)
        rows = self.train[torch.randint(len(self.train), (steps * BATCH,), generator=generator)]
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                max_steps=steps,
                per_device_train_batch_size=BATCH,
                learning_rate=rate,
                lr_scheduler_type="cosine",
                warmup_steps=steps // 20,
                weight_decay=0.0,
                save_strategy="no",
                report_to="none",
                logging_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
                seed=0,
            )
            trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
            trainer.remove_callback(PrinterCallback)
            if callback is not None:
                callback.add_to(trainer)
            trainer.train()
        return model

    def perplexity(self, model: Any) -> float:
        with torch.no_grad():
            return math.exp(float(model.eval()(input_ids=self.held, labels=self.held).loss))

    def plan(self, target: float, budgets: str) -> Plan:
        if budgets == "uniform":
            return make_plan(self.dense, SparsityConfig(target, pruner="magnitude"))
        return make_plan(self.dense, SparsityConfig(target, pruner="wanda", allocator=RACE), self.train[:128])

    def run(self, target: float, way: str, plan: Plan) -> dict[str, float]:
        _, schedule, taught = WAYS[way]
        model, teacher = copy.deepcopy(self.dense), Teacher(copy.deepcopy(self.dense), hard=0.5) if taught else None
        if schedule is None:
            prune(model, plan, self.train[:64])
        start = time.process_time()
        if way != "pruned":
            given = {} if schedule is None else {"plan": plan, "schedule": schedule}
            self.fit(model, self.steps, RATE, SparsityCallback(**given, teacher=teacher))
        return {"perplexity": self.perplexity(model), "cpu_seconds": round(time.process_time() - start, 1)}


def publish(found: list[dict[str, Any]]) -> None:
    """Writes the file that `docs/render.py` reads."""
    rows = []
    for way in WAYS:
        cells = {f"{100 * t:.0f}": r for t in TARGETS for r in found if (r["target"], r["way"]) == (t, way)}
        if cells:
            rows.append({"way": way, **{key: round(r["perplexity"], 2) for key, r in cells.items()}})
    first = found[0]
    data = {
        "command": "python tests/benchmarks/train_toy.py",
        "tokens": first["steps"] * BATCH * LENGTH,
        "dense": round(first["perplexity"], 2),
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("train_toy.json"))
    parser.add_argument("--steps", type=int, default=300, help="of 16 sequences of 32 tokens (default: 300)")
    parser.add_argument("--publish", type=Path, help="write this file's results into results/ instead")
    args = parser.parse_args()
    if args.publish:
        publish(json.loads(args.publish.read_text()))
        return
    torch.set_num_threads(1)
    bench = Bench(args.steps)
    found = json.loads(args.output.read_text()) if args.output.exists() else []
    done = {(r["target"], r["way"]) for r in found}

    def add(target: float, way: str, result: dict[str, float]) -> None:
        found.append({"target": target, "way": way, "steps": args.steps} | result)
        args.output.write_text(json.dumps(found, indent=1))
        print(target, way, f"{result['perplexity']:.3f}", flush=True)

    if (0.0, "dense") not in done:
        add(0.0, "dense", {"perplexity": bench.perplexity(bench.dense), "cpu_seconds": 0.0})
    for target in TARGETS:
        plans = {budgets: bench.plan(target, budgets) for budgets in ("uniform", "race")}
        for way, (budgets, _, _) in WAYS.items():
            if (target, way) not in done:
                add(target, way, bench.run(target, way, plans[budgets]))


if __name__ == "__main__":
    main()
