"""Peak memory of quantizing a large model.

    python bench/large.py                               # QUANT.py on random weights with the shapes of Llama-2-7B
    python bench/large.py --shape 1b --method gptq --quantization.calibration_samples 16      # other flags are passed to QUANT.py

Writes a folder of random weights in bfloat16 (13.5 GB for 7b) unless it exists, and runs QUANT.py in a separate process.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import torch
from train import machine

import MODEL
import TOKENIZER

SHAPES = {"1b": dict(hidden_size=2048, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4, intermediate_size=5632),
          "7b": dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008)}


def size(folder: Path) -> float:
    """Size of the weights in GB."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9


@torch.no_grad()
def make(folder: Path, shape: str) -> None:
    """Write a Llama with random weights, one layer at a time."""
    config = MODEL.ModelConfig(vocab_size=32000, max_position_embeddings=4096, **SHAPES[shape])
    model = MODEL.build(config, device="meta").bfloat16()

    def fill(module: torch.nn.Module) -> torch.nn.Module:
        for weight in module.to_empty(device="cpu").parameters():
            weight.fill_(1) if weight.dim() == 1 else weight.normal_(0, 0.02)
        return module

    tokenizer = TOKENIZER.train((ROOT / "data/train.txt").read_text().splitlines()[:2000], 4096)
    with MODEL.saving(model, folder) as write:
        for layer in MODEL.layers_of(model):
            write(fill(layer))
        for part in (model.model.embed_tokens, model.model.norm, model.lm_head):
            fill(part)
        TOKENIZER.save(tokenizer, folder)


def memory(options) -> None:
    print(machine("cpu"))
    with tempfile.TemporaryDirectory(dir=options.dir) as scratch:
        model, out = Path(options.dir or scratch) / f"random-{options.shape}", Path(scratch) / "quantized"
        if not (model / "config.json").exists():
            make(model, options.shape)
        command = [sys.executable, str(ROOT / "QUANT.py"), "--model", str(model), "--method", options.method, "--out", str(out),
                   "--data", str(ROOT / "data/train.txt"), "--model.device", "cpu", *options.flags]
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"QUANT.py failed with wait status {status}")
        print(f"{options.method}: {size(model):.2f} GB -> {size(out):.2f} GB, peak memory {usage.ru_maxrss * 1024 / 1e9:.2f} GB, "
              f"{time.perf_counter() - start:.0f} s, {usage.ru_utime + usage.ru_stime:.0f} s of CPU time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--method", default="int4")
    parser.add_argument("--dir", help="folder to keep the random model in (default: a temporary folder)")
    options, options.flags = parser.parse_known_args()
    memory(options)


if __name__ == "__main__":
    main()
