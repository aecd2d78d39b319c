"""Experts, latent attention and long prompts, compared with transformers in the same run.

    python bench/architectures.py moe        # one layer of experts, forward and backward, and a dense layer of the same active size
    python bench/architectures.py mla        # decoding at a context of 4096 tokens, and transformers' DeepSeek-V3
    python bench/architectures.py prefill    # peak memory of prompts of up to 32768 tokens
    python bench/architectures.py context --models out/short out/long --text held-out.txt    # perplexity by position, in one continuous text
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import torch
from train import machine

import INFER
import MODEL

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def rounds_of(work: dict, rounds: int) -> dict[str, list[float]]:
    """Seconds of each function, interleaved: each round runs all of them once. The first two rounds are warm-up."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 2):
        for name, function in work.items():
            elapsed = seconds(function)
            if number > 1:
                times[name].append(elapsed)
    return times


def report(benchmark: dict, times: dict[str, list[float]], base: str, **more) -> None:
    for name, elapsed in times.items():
        ratio = statistics.median(a / b for a, b in zip(elapsed, times[base], strict=True))
        print(json.dumps({**benchmark, "implementation": name, "ms": round(1e3 * statistics.median(elapsed), 2),
                          f"relative_to_{base}": round(ratio, 3), "rounds": len(elapsed), **more}), flush=True)


def moe(rounds: int, tokens: int, dtype: torch.dtype) -> None:
    """Width 512, top-2 of 8 experts of 704; the dense layer has one MLP of 1408."""
    from transformers import DeepseekV3Config, MixtralConfig
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    print(machine(DEVICE))
    torch.manual_seed(0)
    sizes = dict(hidden_size=512, num_hidden_layers=1, num_attention_heads=8, vocab_size=64)
    routed = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=704)
    mixtral = MODEL.ModelConfig(**sizes, intermediate_size=704, **routed, router_aux_loss_coef=0.01)
    deepseek = MODEL.ModelConfig(**sizes, intermediate_size=704, **routed, scoring_func="sigmoid", n_shared_experts=1, n_group=2, topk_group=1)
    ours = {"dense": MODEL.MLP(MODEL.ModelConfig(**sizes, intermediate_size=1408)), "experts": MODEL.MixtureOfExperts(mixtral),
            "experts, DeepSeek-V3": MODEL.MixtureOfExperts(deepseek)}
    peers = {}
    for form in ("grouped_mm", "eager"):
        config = MixtralConfig(**sizes, intermediate_size=704, num_local_experts=8, num_experts_per_tok=2)
        config._experts_implementation = form
        peers[f"transformers Mixtral, {form}"] = MixtralSparseMoeBlock(config)
        config = DeepseekV3Config(**sizes, intermediate_size=704, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=704,
                                  n_group=2, topk_group=1)
        config._experts_implementation = form
        peers[f"transformers DeepSeek-V3, {form}"] = DeepseekV3MoE(config)
    hidden = torch.randn(1, tokens, 512, device=DEVICE, dtype=dtype, requires_grad=True)

    def step(module):
        module.to(DEVICE, dtype).train()
        for weight in module.parameters():
            torch.nn.init.normal_(weight, std=0.02)

        def run():
            out = module(hidden, None)[0] if isinstance(module, MODEL.MixtureOfExperts) else module(hidden)
            out.sum().backward()
            module.zero_grad(set_to_none=True)

        return run

    times = rounds_of({name: step(module) for name, module in {**ours, **peers}.items()}, rounds)
    report({"benchmark": "layer of experts, forward and backward", "dtype": str(dtype), "tokens": tokens}, times, "dense")


def mla(rounds: int, context: int, batch: int, dtype: torch.dtype) -> None:
    """Two layers, width 1024, 16 heads, latent 512: decode one token of each of `batch` sequences after `context` tokens."""
    from transformers import DynamicCache

    print(machine(DEVICE))
    config = MODEL.preset_config("deepseek-v3", hidden_size=1024, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=16,
                                 num_experts=8, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=256, mlp_only_layers=[0],
                                 vocab_size=1024, q_lora_rank=512, num_key_value_heads=16)
    model = MODEL.build(config).to(DEVICE, dtype).eval()
    peer = peer_of(model).to(DEVICE, dtype).eval()
    torch.manual_seed(0)
    cache, past = model.new_cache(batch, context + rounds + 4), DynamicCache(config=peer.config)
    sequences = [MODEL.Sequence([row]) for row in range(batch)]
    step = MODEL.CacheStep(cache, [(sequence, context) for sequence in sequences])
    with torch.no_grad():  # the same random latents and rotary keys in both caches
        for number in range(config.num_hidden_layers):
            latent, rotary = (torch.randn(batch, context, width, device=DEVICE, dtype=dtype) for width in (512, config.qk_rope_head_dim))
            states = [part.flatten(0, 1)[None, None] for part in (latent, rotary)]  # (1, 1, N, D)
            step.attend(number, tuple(states), tuple(states), None, lambda *states: states[0])
            past.update(latent[:, None], rotary[:, None], number)
    last = torch.randint(0, 1024, (batch, 1), device=DEVICE)

    @torch.no_grad()
    def ours():
        return model(last.T, cache=MODEL.CacheStep(cache, [(sequence, 1) for sequence in sequences])).logits.transpose(0, 1)

    @torch.no_grad()
    def theirs():
        return peer(last, past_key_values=past, use_cache=True).logits

    difference = float((ours() - theirs()).float().abs().amax((1, 2)).median())  # over rows: rounding may change the routing of a row
    times = rounds_of({"ours": ours, "transformers": theirs}, rounds)
    used = cache.bytes() / (batch * (cache.length + 1) * config.num_hidden_layers * dtype.itemsize)
    report({"benchmark": "decode with latent attention", "dtype": str(dtype), "context": context, "batch": batch}, times, "ours",
           cached_elements_per_token_and_layer=round(used), expected=MODEL.cache_numbers(config) // config.num_hidden_layers,
           logits_difference=round(difference, 4))


def peer_of(model: MODEL.Transformer):
    """The model of transformers with the same weights, loaded from a temporary folder."""
    import tempfile

    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        MODEL.save(model, folder)
        return AutoModelForCausalLM.from_pretrained(folder)


def prefill(lengths: list[int]) -> None:
    print(machine(DEVICE))
    for length in lengths:
        done = subprocess.run([sys.executable, __file__, "prefill-one", str(length)], check=True, capture_output=True, text=True)
        print(done.stdout.strip(), flush=True)


def prefill_one(length: int) -> None:
    """Generate after a prompt of `length` tokens; memory in addition to that of the loaded model, and the size of the cache."""
    model = MODEL.build(MODEL.preset_config("llama-1m", vocab_size=1024, max_position_embeddings=length + 8)).eval()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    INFER.generate(model, [torch.randint(0, 1024, (length,)).tolist()], INFER.Sampling(1, temperature=0))
    elapsed = time.perf_counter() - start
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    cache = MODEL.cache_numbers(model.config) * 4 * (length + 2)
    print(json.dumps({"benchmark": "chunked prefill", "tokens": length, "seconds": round(elapsed, 2), "memory_MB": round(peak / 1e6),
                      "cache_MB": round(cache / 1e6)}))


@torch.no_grad()
def context_of(models: list[str], text: str, length: int, rows: int) -> None:
    """Perplexity of blocks of 256 tokens, in rows of `length` tokens of a text, without masks between documents."""
    import math

    import TOKENIZER

    for name in models:
        model, tokenizer = MODEL.load(name, "float32", DEVICE), TOKENIZER.load(name)
        ids = tokenizer(Path(text).read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
        rows = min(rows, (len(ids) - 1) // length)
        batch = torch.tensor(ids[: rows * length + 1], device=DEVICE)
        inputs, targets = batch[:-1].view(rows, length), batch[1:].view(rows, length)
        logprobs = torch.cat([model(inputs[i : i + 8], targets=targets[i : i + 8]).logprobs for i in range(0, rows, 8)])
        parts = {f"{start + 1}-{start + 256}": round(math.exp(-float(logprobs[:, start : start + 256].mean())), 3) for start in range(0, length, 256)}
        print(json.dumps({"model": name, "rows": rows, "perplexity": parts}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=["moe", "mla", "prefill", "prefill-one", "context"])
    parser.add_argument("number", nargs="*", type=int, help="prefill: prompt lengths")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--models", nargs="+", default=["out"])
    parser.add_argument("--text", default=str(ROOT / "data" / "train.txt"))
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", choices=list(MODEL.DTYPES))
    args = parser.parse_args()
    dtype = MODEL.DTYPES[args.dtype]
    if args.benchmark == "moe":
        moe(args.rounds, args.tokens, dtype)
    elif args.benchmark == "mla":
        mla(args.rounds, args.context, args.batch, dtype)
    elif args.benchmark == "context":
        context_of(args.models, args.text, 1024, args.rows)
    elif args.benchmark == "prefill":
        prefill(args.number or [2048, 8192, 16384, 32768])
    else:
        prefill_one(args.number[0])


if __name__ == "__main__":
    MODEL.run_main(lambda argv: main())
