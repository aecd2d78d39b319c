"""All attention kernels on this machine: time of forward, backward and decode, and memory, by sequence length.

    python bench/attention.py                                                # a table, and bench/attention.png
    python bench/attention.py --model out --prompt "Once" --kernels eager,sdpa   # a trained model: times, and agreement of the logits
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import torch

import MODEL
import TOKENIZER

HEADS, WIDTH = 8, 64


def timed(function, device: str, prepare=tuple, seconds: float = 0.4) -> float:
    """Median milliseconds of function(*prepare()), without the preparation."""
    function(*prepare())
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        arguments = prepare()
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function(*arguments)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def memory(device: str) -> int:
    """Peak memory so far, in bytes."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(name: str, lengths: list[int], dtype: str) -> None:
    """Measure a kernel and print a JSON line per length. It needs a separate process, since only peak memory can be measured."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    start = memory(device)
    for length in lengths:
        row = one_length(MODEL.KERNELS[name], length, MODEL.DTYPES[dtype], device)
        row["memory_MB"] = (memory(device) - start) / 1e6
        print(json.dumps({"kernel": name, "length": length, **{k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}}), flush=True)


def one_length(kernel: MODEL.Kernel, length: int, kind: torch.dtype, device: str) -> dict:
    query, key, value = (torch.randn(1, length, HEADS, WIDTH, device=device, dtype=kind).transpose(1, 2) for _ in range(3))  # (B, H, T, D)
    # Two documents in one row, so that every kernel needs a mask.
    segments = (torch.arange(length, device=device)[None] >= length // 2).long()
    positions = MODEL.default_positions(segments, segments)
    ragged = kernel.ragged and kernel.serves(torch.device(device), kind, 0.0)
    mask = MODEL.ragged_rows(kernel.attend, positions, segments) if ragged else MODEL.MaskBuilder(positions, segments, kind)(positions, None)
    attend = partial(MODEL.attend, MODEL.attend_sdpa if kernel.ragged else kernel.attend)
    row = {}
    with torch.no_grad():
        row["forward_ms"] = timed(lambda: attend(query, key, value, mask), device)
    trained = [states.detach().requires_grad_() for states in (query, key, value)]
    gradient = torch.randn_like(query)
    row["backward_ms"] = timed(lambda out: torch.autograd.grad(out, trained, gradient), device, lambda: (attend(*trained, mask),))
    with torch.no_grad():
        last = MODEL.Mask(torch.zeros(1, 1, 1, length, device=device, dtype=kind), None)
        row["decode_ms"] = timed(lambda: attend(query[:, :, -1:], key, value, last), device)
    return row


def table(lengths: list[int], dtype: str, out: Path) -> None:
    from train import machine

    print(machine("cuda" if torch.cuda.is_available() else "cpu"))
    rows = []
    for name in (name for name in MODEL.KERNELS if name != "auto"):
        if reason := MODEL.why_not(name):
            print(f"{name}: not measured, {reason}")
            continue
        command = [sys.executable, __file__, "--measure", name, "--dtype", dtype, "--lengths", *map(str, lengths)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{name}: not measured, {(done.stderr.strip().splitlines() or [f'exit status {done.returncode}'])[-1][:160]}")
            continue
        rows += [json.loads(line) for line in done.stdout.splitlines()]
    columns = ("forward_ms", "backward_ms", "decode_ms", "memory_MB")
    print(f"{'kernel':18}{'length':>8}" + "".join(f"{column:>14}" for column in columns))
    for row in rows:
        print(f"{row['kernel']:18}{row['length']:8}" + "".join(f"{row.get(column, '-'):>14}" for column in columns) + f"  {row.get('note', '')}")
    plot(rows, columns, out)


def plot(rows: list[dict], columns: tuple, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(columns), figsize=(4 * len(columns), 3.6), layout="constrained")
    for axis, column in zip(axes, columns, strict=True):
        for name in dict.fromkeys(row["kernel"] for row in rows):
            points = [(row["length"], row[column]) for row in rows if row["kernel"] == name and column in row]
            axis.plot(*zip(*points, strict=True), marker="o", label=name) if points else None
        axis.set(title=column.replace("_", " in "), xlabel="sequence length", xscale="log", yscale="log")
        axis.set_xticks(sorted({row["length"] for row in rows}), sorted({row["length"] for row in rows}))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(out, dpi=110)
    print(f"plot: {out}")


def compare_kernels(model: str, input_ids: torch.Tensor, kernels: list[str], dtype: str = "float32") -> list[dict]:
    """A trained model's forward pass with each kernel: milliseconds, and the largest difference from the first kernel's logits."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, first = [], None
    for name in kernels:
        try:
            loaded = MODEL.load(model, dtype, device, name)
        except MODEL.UserError as error:
            rows.append({"kernel": name, "unavailable": str(error)})
            continue
        with torch.no_grad():
            logits = loaded(input_ids.to(device)).logits.float()
            milliseconds = timed(partial(loaded, input_ids.to(device)), device)
        first = logits if first is None else first
        difference = float((logits - first).abs().max())
        rows.append({"kernel": name, "forward_ms": round(milliseconds, 2), "largest_difference": difference,
                     "agrees": difference <= (1e-3 if dtype == "float32" else 0.1) * max(float(first.std()), 1.0)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32", choices=list(MODEL.DTYPES))
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "attention.png")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--model")
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--kernels", default="eager,sdpa,flash_attention_2,xformers")
    args = parser.parse_args()
    if args.measure:
        measure(args.measure, args.lengths, args.dtype)
    elif args.model:
        ids = torch.tensor([TOKENIZER.encode_prompt(TOKENIZER.load(args.model), args.prompt)])
        for row in compare_kernels(args.model, ids, args.kernels.split(","), args.dtype):
            print(json.dumps(row))
    else:
        table(args.lengths, args.dtype, args.out)


if __name__ == "__main__":
    MODEL.run_main(lambda argv: main())
