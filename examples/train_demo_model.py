"""Train the demo model: a 4-million-parameter Llama on Python's standard library.

    python examples/train_demo_model.py --output demo_train --hours 1.2 --bf16 --init-from FOLDER
    python examples/train_demo_model.py --output demo_train --install

The first command may be stopped at any time, and goes on where it was when repeated. The second
copies the model it made into `hf_sparsity/demo/model`. Without `--init-from` it begins at random
weights and trains a tokenizer; the shipped model began at one trained for 11 million tokens in
windows of 256, whose held-out perplexity per token was 19.2, 24.3 and 48.8 in windows of 256,
512 and 1024.

Expect, on two shared cores of an AMD EPYC (AVX-512 with bf16, no AMX), which leave 1000 to 3000
tokens per second:

    windows of                      256     512    1024
    held-out perplexity per token   14.68   13.17   12.49     (74 minutes, 7 million tokens)
"""

import argparse
import json
import logging
import math
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from hf_sparsity import demo

CHUNK = 1024  # tokens: the longest window, and the unit in which the text is shuffled
CHUNKS = 2  # per micro-batch: 2048 tokens, whatever the window, so that the speed stays even
MICRO_BATCHES = 2  # per step: 4096 tokens, each micro-batch in a thread of its own
# Three quarters of the tokens are library modules, as the held-out text is; the rest are tests.
SOURCES = ("library", "library", "library", "tests")
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)

log = logging.getLogger("train_demo_model")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of checkpoint and model")
    parser.add_argument("--init-from", type=Path, help="start from this model and its tokenizer")
    parser.add_argument("--hours", type=float, help="budget; the learning rate ends at 0 with it")
    parser.add_argument("--tokens", type=float, help="the same budget, in tokens")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="highest learning rate")
    parser.add_argument("--decay-from", type=float, default=0.3, help="fraction of the budget")
    parser.add_argument(
        "--seqlen",
        type=int,
        nargs="+",
        default=[256, 512, 512, 1024],
        help="windows, in tokens; they take turns, named twice is twice as often",
    )
    parser.add_argument("--max-length", type=int, default=1024, help="the model's stated limit")
    parser.add_argument("--bf16", action="store_true", help="autocast; for CPUs fast at it (AMX)")
    parser.add_argument("--eval-every", type=float, default=5.0, help="minutes")
    parser.add_argument("--heldout-tokens", type=int, help="judge by so many, to try the script")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--install", action="store_true", help="copy the model into hf_sparsity")
    return parser.parse_args()


def train_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every text survives encoding and decoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=3072,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator((text for _, text in demo.texts("calibration")), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=max_length
    )


def new_model(max_length: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=3072,
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=max_length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def start(args):
    """Return model (float32) and tokenizer, new or from `--init-from`."""
    torch.manual_seed(args.seed)
    if args.init_from is None:
        return new_model(args.max_length), train_tokenizer(args.max_length)
    model = AutoModelForCausalLM.from_pretrained(args.init_from, dtype=torch.float32)
    model.config.max_position_embeddings = args.max_length
    tokenizer = AutoTokenizer.from_pretrained(args.init_from)
    tokenizer.model_max_length = args.max_length
    return model, tokenizer


# --- text ---


def tokenize(tokenizer, split: str, leave_out=frozenset()) -> np.ndarray:
    """Return all documents of a split in one row of ids, each followed by EOS."""
    documents = [text for path, text in demo.texts(split) if path not in leave_out]
    ids = tokenizer(documents, verbose=False)["input_ids"]
    return np.concatenate([np.array([*i, tokenizer.eos_token_id], dtype=np.uint16) for i in ids])


def tokenize_sources(tokenizer) -> dict[str, np.ndarray]:
    library = frozenset(path for path, _ in demo.texts("calibration"))
    return {
        "library": tokenize(tokenizer, "calibration"),
        "tests": tokenize(tokenizer, "training", leave_out=library),
    }


def micro_batch(sources, number: int, window: int, seed: int) -> torch.Tensor:
    """Return the micro-batch of this number: [windows, window], a function of its arguments.

    Each source is read in chunks, all of them once an epoch in an order of its own, and cut at
    other places each epoch.
    """
    turn = number % len(SOURCES)
    name = SOURCES[turn]
    nth = number // len(SOURCES) * SOURCES.count(name) + SOURCES[:turn].count(name)
    text = sources[name]
    chunks = len(text) // CHUNK - 1
    per_epoch = chunks // CHUNKS
    epoch, place = divmod(nth, per_epoch)
    rng = np.random.default_rng([seed, epoch])
    offset = rng.integers(CHUNK)
    order = rng.permutation(chunks)[place * CHUNKS : (place + 1) * CHUNKS]
    rows = [text[offset + CHUNK * c : offset + CHUNK * (c + 1)] for c in order]
    return torch.from_numpy(np.concatenate(rows).astype(np.int64)).view(-1, window)


# --- training ---


def loss_of(model, ids: torch.Tensor, bf16: bool = False) -> torch.Tensor:
    """Return the mean loss over all but the first token of each window; ids: [windows, window]."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def learning_rate(args, progress: float) -> float:
    """Warm up in the first hundredth of the budget, hold, then fall linearly to 0."""
    return args.lr * min(1.0, progress / 0.01, (1.0 - progress) / (1.0 - args.decay_from))


def make_optimizer(model) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    gains = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)


def train_step(model, optimizer, pool, batches, bf16: bool) -> float:
    """Average the gradients of the micro-batches, take one step, return the mean loss.

    A thread for each micro-batch: on a shared machine that waits once a step for the slower
    core, where parallel matrix products wait in every one of them.
    """
    parameters = list(model.parameters())

    def gradients(ids):
        loss = loss_of(model, ids, bf16)
        return loss.item(), torch.autograd.grad(loss, parameters)

    results = list(pool.map(gradients, batches))
    for parameter, *parts in zip(parameters, *(grads for _, grads in results), strict=True):
        parameter.grad = torch.stack(parts).mean(0)
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    return sum(loss for loss, _ in results) / len(results)


@torch.no_grad()
def perplexity(model, pool, text: np.ndarray, window: int, limit: int | None = None) -> float:
    """Return the perplexity per token in windows that do not overlap; limit: tokens to use."""
    count = min(len(text), limit or len(text)) // window
    ids = torch.from_numpy(text[: count * window].astype(np.int64)).view(count, window)
    parts = ids.split(max(1, 4096 // window))

    @torch.no_grad()  # holds for one thread only
    def total(part):
        return loss_of(model, part).item() * len(part)

    return math.exp(sum(pool.map(total, parts)) / count)


# --- saving ---


def save_checkpoint(path: Path, model, optimizer, state: dict) -> None:
    """Write everything needed to go on into one file, which is whole or not there."""
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = value
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata={"state": json.dumps(state)})
    os.replace(part, path)


@torch.no_grad()
def load_checkpoint(path: Path, model, optimizer) -> dict:
    with safe_open(path, "pt") as file:
        for name, parameter in model.named_parameters():
            parameter.copy_(file.get_tensor(f"model.{name}"))
            optimizer.state[parameter] = {
                key: file.get_tensor(f"{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")
            }
        return json.loads(file.metadata()["state"])


def save_model(folder: Path, model, tokenizer) -> None:
    """Save what is shipped, in bfloat16, without disturbing the float32 model."""
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def install(folder: Path) -> None:
    for name in FILES:
        shutil.copyfile(folder / name, Path(demo.PATH) / name)
    log.info("copied %s to %s", folder, demo.PATH)


# --- the loop ---


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    args = arguments()
    if args.install:
        return install(args.output / "model")
    if (args.hours is None) == (args.tokens is None):
        raise SystemExit("give the budget either as --hours or as --tokens")
    args.output.mkdir(parents=True, exist_ok=True)
    checkpoint = args.output / "checkpoint.safetensors"
    if checkpoint.exists():
        args.init_from = args.output / "model"  # its tokenizer
    model, tokenizer = start(args)
    optimizer = make_optimizer(model)
    state = {"step": 0, "seconds": 0.0}
    if checkpoint.exists():
        state = load_checkpoint(checkpoint, model, optimizer)
    sources = tokenize_sources(tokenizer)
    heldout = tokenize(tokenizer, "heldout")[: args.heldout_tokens]
    sizes = {name: len(text) for name, text in {**sources, "heldout": heldout}.items()}
    log.info("%d parameters, tokens: %s, %s", model.num_parameters(), sizes, state)
    torch.set_num_threads(1)
    workers = min(MICRO_BATCHES, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        train(args, (model, tokenizer, optimizer), (sources, heldout), pool, state)


def train(args, made, texts, pool, state: dict) -> None:
    """Train until the budget is spent; `state` counts steps and seconds across restarts."""
    model, tokenizer, optimizer = made
    sources, heldout = texts
    bar = tqdm(total=1.0, bar_format="{percentage:5.1f}% {elapsed} {desc}", mininterval=10)
    tokens_per_step = CHUNK * CHUNKS * MICRO_BATCHES
    clock, next_eval, smooth = time.monotonic() - state["seconds"], 0.0, None

    def save():
        save_model(args.output / "model", model, tokenizer)
        save_checkpoint(args.output / "checkpoint.safetensors", model, optimizer, state)

    def progress() -> float:
        if args.hours is not None:
            return min(1.0, state["seconds"] / 3600 / args.hours)
        return min(1.0, state["step"] * tokens_per_step / args.tokens)

    try:
        while progress() < 1.0:
            if state["seconds"] >= next_eval:
                found = {w: perplexity(model, pool, heldout, w, 16384) for w in (256, 512, 1024)}
                found = {w: round(p, 2) for w, p in found.items()}
                log.info("step %d, held out (first 16k tokens): %s", state["step"], found)
                if state["step"]:
                    save()
                next_eval = state["seconds"] + 60 * args.eval_every
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args, progress())
            window = args.seqlen[state["step"] % len(args.seqlen)]
            first = state["step"] * MICRO_BATCHES
            numbers = range(first, first + MICRO_BATCHES)
            batches = [micro_batch(sources, n, window, args.seed) for n in numbers]
            loss = train_step(model, optimizer, pool, batches, args.bf16)
            smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
            state["step"] += 1
            state["seconds"] = time.monotonic() - clock
            speed = state["step"] * tokens_per_step / state["seconds"]
            bar.set_description_str(f"step {state['step']} loss {smooth:.3f} {speed:.0f} tokens/s", refresh=False)
            bar.update(progress() - bar.n)
    finally:  # also on Ctrl-C
        if state["step"]:
            save()
    for window in (256, 512, 1024):
        found = perplexity(model, pool, heldout, window)
        log.info("held out, all tokens, windows of %d: perplexity %.2f", window, found)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on from the last checkpoint") from None
