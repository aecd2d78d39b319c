"""The engine and the server under load.

    python bench/serve.py soak --model out/sft --minutes 10 --clients 64     # valid, canceled, oversized and malformed requests
    python bench/serve.py prefix                     # time to first token with and without a cached prefix
    python bench/serve.py overhead                   # fraction of a step outside the forward pass, at 16 sequences
    python bench/serve.py streams --model out/sft    # time between the tokens of 50 concurrent streams
    python bench/serve.py lookup --preset llama-134m # prompt lookup decoding on repetitive text

soak: every complete response is compared with a completion that was computed alone before. It prints the memory after the first
minute and at the end. At the end no request may run or wait, and no page may be in use.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from train import machine

import INFER
import MODEL
import TOKENIZER

PORT = 8123
URL = f"http://127.0.0.1:{PORT}"


def resident(pid: int) -> float:
    """Resident memory of a process in MB."""
    return next(int(line.split()[1]) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")) / 1000


def soak(options) -> None:
    import httpx

    session = INFER.load(options.model, temperature=0)
    words = Path(ROOT / "data/train.txt").read_text().split()
    rng = random.Random(0)
    prompts = [" ".join(words[start : start + rng.randint(1, 60)]) for start in (rng.randrange(len(words) - 60) for _ in range(40))]
    sampling = INFER.Sampling(rng.randint(20, 60), 0)
    ids = [TOKENIZER.encode_prompt(session.tokenizer, prompt) for prompt in prompts]
    expected = [completion.text for [completion] in INFER.generate(session.model, ids, sampling, session.tokenizer)]
    counts: Counter = Counter()

    async def client(number: int, http, until: float) -> None:
        rng = random.Random(number)
        while time.time() < until:
            i, kind = rng.randrange(len(prompts)), rng.choice(["whole", "whole", "stream", "stream", "cancel", "cancel", "oversized", "malformed"])
            body = {"prompt": prompts[i], "max_tokens": sampling.max_new_tokens, "temperature": 0}
            try:
                if kind == "whole":
                    response = await http.post(f"{URL}/v1/completions", json=body)
                    counts[f"whole {response.status_code}"] += 1
                    if response.status_code == 200 and response.json()["choices"][0]["text"] != expected[i]:
                        counts["WRONG"] += 1
                elif kind in ("stream", "cancel"):
                    async with http.stream("POST", f"{URL}/v1/completions", json={**body, "stream": True}) as response:
                        counts[f"{kind} {response.status_code}"] += 1
                        text, ended = "", False
                        async for line in response.aiter_lines():
                            if kind == "cancel" and rng.random() < 0.2:
                                break
                            ended |= line == "data: [DONE]"
                            if response.status_code == 200 and line.startswith("data: {"):
                                text += json.loads(line[6:])["choices"][0]["text"]
                        if kind == "stream" and response.status_code == 200 and (text != expected[i] or not ended):
                            counts["WRONG"] += 1
                elif kind == "oversized":
                    bad = rng.choice([{**body, "prompt": "the old owl " * 2000}, {**body, "n": 100_000}, {**body, "max_tokens": 10**9}])
                    counts[f"oversized {(await http.post(f'{URL}/v1/completions', json=bad)).status_code}"] += 1
                else:
                    bad = rng.choice([b"{", b"\xff\xfe", b"[]", b'{"prompt": 5}', b'{"prompt": "a", "temperature": "hot"}', os.urandom(1000)])
                    counts[f"malformed {(await http.post(f'{URL}/v1/completions', content=bad)).status_code}"] += 1
            except httpx.HTTPError as error:
                counts[f"WRONG {type(error).__name__}"] += 1

    async def run() -> None:
        async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=options.clients)) as http:
            await ready(http)
            until, memory = time.time() + 60 * options.minutes, []

            async def watch() -> None:
                while time.time() < until:
                    await asyncio.sleep(10)
                    memory.append(resident(server.pid))

            await asyncio.gather(watch(), *(client(i, http, until) for i in range(options.clients)))
            await asyncio.sleep(2)
            metrics = (await http.get(f"{URL}/metrics")).text
        print(dict(sorted(counts.items())))
        print(f"memory: {memory[min(5, len(memory) - 1)]:.0f} MB after a minute, {memory[-1]:.0f} MB at the end")
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "generation_tokens_total"):
            print(next(line for line in metrics.splitlines() if line.startswith(f"vllm:{name} ")))

    with serving(options, "--max-num-seqs", "16", "--max-queue", str(options.clients // 2)) as server:
        asyncio.run(run())


@contextlib.contextmanager
def serving(options, *flags):
    server = subprocess.Popen([sys.executable, str(ROOT / "INFER.py"), "--serve", "--model", options.model, "--port", str(PORT), *flags, *options.flags])
    try:
        yield server
    finally:
        server.terminate()
        server.wait()


async def ready(http) -> None:
    for _ in range(600):
        try:
            await http.get(f"{URL}/health")
            break
        except Exception:  # raised by httpx: the server is not ready yet
            await asyncio.sleep(0.1)


def streams(options) -> None:
    """Milliseconds between the events of 50 streams of 200 tokens each."""
    import httpx

    gaps: list[float] = []

    async def client(number: int, http) -> None:
        body = {"prompt": f"The {number}", "max_tokens": 200, "temperature": 0.8, "seed": number, "ignore_eos": True, "stream": True}
        async with http.stream("POST", f"{URL}/v1/completions", json=body) as response:
            last = None
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    now = time.perf_counter()
                    gaps.extend([1000 * (now - last)] if last else [])
                    last = now

    async def run() -> None:
        async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=50)) as http:
            await ready(http)
            await asyncio.gather(*(client(i, http) for i in range(50)))

    with serving(options, "--max-num-seqs", "50"):
        asyncio.run(run())
    gaps.sort()
    median, high = gaps[len(gaps) // 2], gaps[len(gaps) * 99 // 100]
    print(f"50 streams, {len(gaps)} gaps: median {median:.1f} ms, 99th percentile {high:.1f} ms ({high / median:.1f} medians), maximum {gaps[-1]:.0f} ms")


def lookup(options) -> None:
    """Tokens per second of one sequence without and with prompt lookup decoding. Greedy completions of random weights soon repeat."""
    model, speeds, completions = build(options.preset), {}, {}
    for _ in range(options.rounds):
        for drafts in (0, 4):
            drafter = INFER.PromptLookup(drafts) if drafts else None
            engine = INFER.Engine(model, 1, 8, INFER.PAGE, drafter=drafter)
            [row] = rows_of(model, [list(range(5, 25))], 200)
            engine.add([row])
            start = time.perf_counter()
            while engine.busy:
                engine.step()
            speeds.setdefault(drafts, []).append(200 / (time.perf_counter() - start))
            completions[drafts] = row.ids
    without, with_drafts = (sorted(speeds[drafts])[options.rounds // 2] for drafts in (0, 4))
    assert completions[0] == completions[4]
    print(f"prompt lookup: {without:.1f} -> {with_drafts:.1f} tokens/s ({with_drafts / without:.2f}x), {drafter.accepted} of {drafter.drafted} draft tokens accepted")


def build(preset: str):
    model = MODEL.build(preset).to(torch.bfloat16 if MODEL.fast_half("cpu") or torch.cuda.is_available() else torch.float32)
    return INFER.configure_for_hardware(model, "cuda" if torch.cuda.is_available() else "cpu")


def rows_of(model, prompts: list[list[int]], count: int) -> list[INFER.Row]:
    sampling = INFER.Sampling(count, 0, ignore_eos=True)
    return [row for [row] in INFER._make_rows(model, prompts, [sampling] * len(prompts), None, 0)]


def prefix(options) -> None:
    """Time to first token of prompts that share 1,000 tokens: of the first prompt, and the median of the others."""
    model, rng = build(options.preset), random.Random(0)
    engine = INFER.Engine(model, 4, 80, INFER.PAGE, 512, reuse=True)
    common, times = [rng.randrange(5, 1000) for _ in range(1000)], []
    for _ in range(options.rounds + 1):
        [row] = rows_of(model, [common + [rng.randrange(5, 1000) for _ in range(10)]], 1)
        start = time.perf_counter()
        engine.add([row])
        while engine.busy:
            engine.step()
        times.append(time.perf_counter() - start)
    cached = sorted(times[1:])[len(times[1:]) // 2]
    print(f"first token: {times[0]:.3f} s, with 1,000 cached tokens {cached:.3f} s ({times[0] / cached:.1f}x)")


def overhead(options) -> None:
    """Medians over 100 steps of 16 sequences."""
    model, rng, inside = build(options.preset), random.Random(0), []
    forward = model.forward

    def timed(*args, **kwargs):
        start = time.perf_counter()
        out = forward(*args, **kwargs)
        inside.append(time.perf_counter() - start)
        return out

    model.forward = timed
    engine = INFER.Engine(model, 16, 16 * 8, INFER.PAGE)
    engine.add(rows_of(model, [[rng.randrange(5, 1000) for _ in range(rng.randint(10, 100))] for _ in range(16)], 110))
    whole = []
    while engine.busy:
        start = time.perf_counter()
        engine.step()
        whole.append(time.perf_counter() - start)
    shares = sorted(1 - a / b for a, b in zip(inside[5:], whole[5:], strict=True))
    print(f"a step of 16 sequences: {1e3 * sorted(whole)[len(whole) // 2]:.1f} ms, outside the forward pass {shares[len(shares) // 2]:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("soak", "prefix", "overhead", "streams", "lookup"))
    parser.add_argument("--model", default=str(ROOT / "out/sft"))
    parser.add_argument("--preset", default="llama-14m")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="soak and streams: pass the remaining arguments to INFER.py")
    options = parser.parse_args()
    print(machine("cuda" if torch.cuda.is_available() else "cpu"))
    {"soak": soak, "prefix": prefix, "overhead": overhead, "streams": streams, "lookup": lookup}[options.what](options)


if __name__ == "__main__":
    main()
