"""Generation speed compared with transformers' generate, in the same run and with the same weights.

    python bench/infer.py                            # prefill, decode at batch 1 and 8 of the 374M shape, in bf16
    python bench/infer.py --cold-start MODEL         # seconds from a new process to the first token on stdout
    python bench/infer.py --encode PATH              # MB/s and memory of text -> .bin at a 4k vocabulary
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import torch
from train import machine, peer_model

import INFER
import MODEL


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def memory_bandwidth(device: str) -> float:
    """Bytes per second of reading a tensor that is far larger than any cache."""
    data = torch.zeros(2**28, dtype=torch.float32, device=device)
    data.sum()
    return data.numel() * 4 / min(seconds(lambda: data.sum().item()) for _ in range(5))


def speed(preset: str, prompt_length: int, new: int, batches: list[int], rounds: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(machine(device))
    peer = peer_model(preset).to(device, torch.bfloat16).eval()
    ours = MODEL.build(preset)
    ours.load_state_dict(peer.state_dict())
    ours = INFER.configure_for_hardware(ours.to(torch.bfloat16), device)
    bound = memory_bandwidth(device) / (2 * MODEL.count_parameters(peer)[0])
    prompt = torch.randint(5, ours.config.vocab_size, (max(batches), prompt_length)).tolist()
    sampling = INFER.Sampling(max_new_tokens=1 + new, temperature=0, ignore_eos=True)

    def ours_times(batch: int) -> list[float]:
        """Seconds from the start of the prompt until each token of the whole batch."""
        rows = [row for group in INFER._make_rows(ours, prompt[:batch], [sampling] * batch, None, 0) for row in group]
        start, times = time.perf_counter(), []
        for _ in INFER._steps(ours, rows, True, batch):
            if min(len(row.ids) for row in rows) > len(times):
                times.append(time.perf_counter() - start)
        return times

    def peer_times(batch: int) -> list[float]:
        ids, times = torch.tensor(prompt[:batch], device=device), []

        def record_time(input_ids, scores, **_):
            times.append(time.perf_counter() - start)
            return torch.zeros(len(input_ids), dtype=torch.bool, device=device)

        start = time.perf_counter()
        with torch.no_grad():
            peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1 + new, min_new_tokens=1 + new, do_sample=False,
                          pad_token_id=0, stopping_criteria=[record_time])
        return times

    for batch in batches:
        runs = {"ours": ours_times, "transformers": peer_times}
        prefill, decode = {name: [] for name in runs}, {name: [] for name in runs}
        for number in range(rounds + 1):
            for name, run in runs.items():
                times = run(batch)
                if number:  # the first round warms up
                    prefill[name].append(batch * prompt_length / times[0])
                    decode[name].append(batch * new / (times[-1] - times[0]))
        for phase, rates in (("prefill", prefill), ("decode", decode)):
            ratio = statistics.median(a / b for a, b in zip(rates["ours"], rates["transformers"], strict=True))
            record = {"what": phase, "batch": batch, "ours_tok_s": round(statistics.median(rates["ours"]), 1),
                      "transformers_tok_s": round(statistics.median(rates["transformers"]), 1), "ratio": round(ratio, 3), "pairs": rounds}
            if phase == "decode" and batch == 1:
                record |= {"memory_bound_tok_s": round(bound, 1), "share_of_bound": round(record["ours_tok_s"] / bound, 3)}
            print(json.dumps(record), flush=True)


def cold_start(model: str, rounds: int) -> None:
    """Seconds from the start of a Python process to the first byte of the completion."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        with subprocess.Popen([sys.executable, str(ROOT / "INFER.py"), "--model", model, "--prompt", "Once", "--max-new-tokens", "8"],
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            process.stdout.read(1)
            times.append(time.perf_counter() - start)
            process.stdout.read()
    print(json.dumps({"what": "first token from a cold start", "seconds": round(statistics.median(times), 2), "runs": rounds}))


def encode(path: str, copies: int) -> None:
    """Run TOKENIZER.py in a new process on `copies` copies of a file, with a 4k tokenizer trained beforehand."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / f"big{Path(path).suffix}"
        with open(data, "wb") as out:
            for _ in range(copies):
                out.write(Path(path).read_bytes())
        flags = ["--tokenizer.vocab_size", "4096", "--data.deduplicate", "false", "--data.text_unit", "file", "--out", f"{folder}/data"]
        base = [sys.executable, str(ROOT / "TOKENIZER.py")]
        subprocess.run([*base, "--data", path, *flags], check=True, stderr=subprocess.DEVNULL)
        script = ("import resource, runpy, sys, time; sys.argv = sys.argv[1:]; start = time.perf_counter();\n"
                  "runpy.run_path(sys.argv[0], run_name='__main__')\n"
                  "print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)")
        command = [sys.executable, "-c", script, *base[1:], "--data", str(data), "--tokenizer.name", f"{folder}/data/tokenizer", *flags]
        wall, memory = map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
        size = data.stat().st_size
        print(json.dumps({"what": "text to .bin", "MB": round(size / 1e6, 1), "MB_s": round(size / 1e6 / wall, 2), "seconds": round(wall, 1),
                          "peak_memory_MB": round(memory / 1e6)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama-374m")
    parser.add_argument("--prompt-length", type=int, default=512)
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold-start", metavar="MODEL")
    parser.add_argument("--encode", metavar="PATH")
    parser.add_argument("--copies", type=int, default=40)
    args = parser.parse_args()
    if args.cold_start:
        cold_start(args.cold_start, args.rounds)
    elif args.encode:
        encode(args.encode, args.copies)
    else:
        speed(args.preset, args.prompt_length, args.new, args.batches, args.rounds)


if __name__ == "__main__":
    main()
