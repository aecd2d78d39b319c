"""Experts, latent attention and long prompts, beside transformers in the same run.

    python bench/architectures.py moe        # one layer of experts, forward and backward, against a dense layer of the same active size
    python bench/architectures.py mla        # decoding at 4k context, against transformers' DeepSeek-V3
    python bench/architectures.py prefill    # peak memory of prompts up to 32k tokens
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
    """Alternated: each round times every one once; the first two warm up."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(rounds + 2):
        for name, function in work.items():
            spent = seconds(function)
            if turn > 1:
                times[name].append(spent)
    return times


def report(what: dict, times: dict[str, list[float]], base: str, **more) -> None:
    for name, own in times.items():
        ratio = statistics.median(a / b for a, b in zip(own, times[base], strict=True))
        print(json.dumps({**what, "who": name, "ms": round(1e3 * statistics.median(own), 2), f"times_{base}": round(ratio, 3),
                          "rounds": len(own), **more}), flush=True)


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
    report({"what": "layer of experts, forward and backward", "dtype": str(dtype), "tokens": tokens}, times, "dense")


def mla(rounds: int, context: int, batch: int, dtype: torch.dtype) -> None:
    """Two layers, width 1024, 16 heads, latent 512: one token for each of `batch` sequences after `context` others."""
    from transformers import DynamicCache

    print(machine(DEVICE))
    config = MODEL.preset_config("deepseek-v3", hidden_size=1024, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=16,
                                 num_experts=8, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=256, mlp_only_layers=[0],
                                 vocab_size=1024, q_lora_rank=512, num_key_value_heads=16)
    model = MODEL.build(config).to(DEVICE, dtype).eval()
    peer = peer_of(model).to(DEVICE, dtype).eval()
    torch.manual_seed(0)
    cache, past = model.new_cache(batch, context + rounds + 4), DynamicCache(config=peer.config)
    texts = [MODEL.Sequence([row]) for row in range(batch)]
    step = MODEL.CacheStep(cache, [(text, context) for text in texts])
    with torch.no_grad():  # a past of random latents and rotary keys, the same in both caches
        for number in range(config.num_hidden_layers):
            latent, place = (torch.randn(batch, context, width, device=DEVICE, dtype=dtype) for width in (512, config.qk_rope_head_dim))
            states = [one.flatten(0, 1)[None, None] for one in (latent, place)]  # (1, 1, N, D)
            step.attend(number, tuple(states), tuple(states), None, lambda *states: states[0])
            past.update(latent[:, None], place[:, None], number)
    last = torch.randint(0, 1024, (batch, 1), device=DEVICE)

    @torch.no_grad()
    def ours():
        return model(last.T, cache=MODEL.CacheStep(cache, [(text, 1) for text in texts])).logits.transpose(0, 1)

    @torch.no_grad()
    def theirs():
        return peer(last, past_key_values=past, use_cache=True).logits

    difference = float((ours() - theirs()).float().abs().amax((1, 2)).median())  # of the rows: rounding may choose another expert for one
    times = rounds_of({"ours": ours, "transformers": theirs}, rounds)
    used = cache.bytes() / (batch * (cache.length + 1) * config.num_hidden_layers * dtype.itemsize)
    report({"what": "decode with latent attention", "dtype": str(dtype), "context": context, "batch": batch}, times, "ours",
           cache_numbers_a_token_and_layer=round(used), expected=MODEL.cache_numbers(config) // config.num_hidden_layers,
           logits_differ_by=round(difference, 4))


def peer_of(model: MODEL.Transformer):
    """transformers' model of the same weights, by way of a folder."""
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
    """A prompt of so many tokens through generate; memory beyond that of the loaded model, without and with the cache itself."""
    model = MODEL.build(MODEL.preset_config("llama-1m", vocab_size=1024, max_position_embeddings=length + 8)).eval()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    INFER.generate(model, [torch.randint(0, 1024, (length,)).tolist()], INFER.Sampling(1, temperature=0))
    spent = time.perf_counter() - start
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    cache = MODEL.cache_numbers(model.config) * 4 * (length + 2)
    print(json.dumps({"what": "chunked prefill", "tokens": length, "seconds": round(spent, 2), "MB_beyond_the_model": round(peak / 1e6),
                      "of_which_cache_MB": round(cache / 1e6)}))


@torch.no_grad()
def context_of(models: list[str], text: str, length: int, rows: int) -> None:
    """Perplexity of 256 tokens at a time in rows of `length` tokens of a text, without any masks between documents."""
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
    parser.add_argument("what", choices=["moe", "mla", "prefill", "prefill-one", "context"])
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
    if args.what == "moe":
        moe(args.rounds, args.tokens, dtype)
    elif args.what == "mla":
        mla(args.rounds, args.context, args.batch, dtype)
    elif args.what == "context":
        context_of(args.models, args.text, 1024, args.rows)
    elif args.what == "prefill":
        prefill(args.number or [2048, 8192, 16384, 32768])
    else:
        prefill_one(args.number[0])


if __name__ == "__main__":
    MODEL.run_main(lambda argv: main())
