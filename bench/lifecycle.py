"""The whole life of a language model: every stage once, from raw text to a server, with the shipped data and settings.

    python bench/lifecycle.py                        # 14 to 20 minutes on two cores; writes out/lifecycle
    python bench/lifecycle.py --quick                # a few steps of each stage, to try it
    python bench/lifecycle.py --table                # only print the table of a finished run, and draw its plot again

Each stage is a command of README.md, started from the model of an earlier stage. Its row shows the stage's own held-out measure
before and after, the minutes and the peak memory of its process, and the size of the weights that it leaves. `answered` is the exact
match on data/chat_test.jsonl, which shows what a stage forgets. An interrupted run continues: finished stages are not run again.
The exit status is 1 if a stage did not improve its measure.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STORIES = "--data data/preferences.jsonl --data.validation data/preferences_test.jsonl"


@dataclass
class Stage:
    name: str
    source: str  # name of the folder with the model that it starts from
    command: str  # {out}: its own folder, {home}: the folder of all stages
    measure: str  # key of result.json, or column of QUANT.py's table
    title: str
    lower: bool = False  # lower values of the measure are better


STAGES = [
    Stage("pretrain", "", "TRAIN.py --out {out}", "loss", "held-out loss, nats per token", True),
    Stage("sft", "pretrain", "SFT.py --model {home}/pretrain --out {out}", "exact_match", "held-out questions answered"),
    Stage("reward", "sft", "RL.py --rl.method reward --model {home}/sft --out {out}", "accuracy", "held-out pairs ranked correctly"),
    Stage("dpo", "sft", "RL.py --rl.method dpo --model {home}/sft --out {out}", "rewards/accuracies", "chosen preferred to rejected"),
    Stage("ppo", "sft", f"RL.py --rl.method ppo --model {{home}}/sft --rl.reward_funcs {{home}}/reward {STORIES} "
          "--rl.max_completion_length 32 --out {out}", "reward", "score of the reward model"),
    Stage("grpo", "dpo", "RL.py --rl.method grpo --model {home}/dpo --out {out}", "reward", "held-out sums solved"),
    Stage("distill", "pretrain", "DISTILL.py --teacher {home}/pretrain --out {out}", "loss", "held-out loss, a quarter of the size", True),
    Stage("quantize", "grpo", "QUANT.py --model {home}/grpo --method int4 --out {out}", "size, MB", "weights in memory, MB", True),
    Stage("export", "grpo", "QUANT.py --model {home}/grpo --to gguf --out {out}", "size", "file for llama.cpp, MB", True),
    Stage("serve", "grpo", "INFER.py --serve --model {home}/grpo --port {port}", "tokens/s", "tokens/s, 1 and 16 clients"),
]
SHORT = "--max-steps 2 --training.eval_batches 1 --training.sample_tokens 0"
ROLLOUT = f"{SHORT} --rl.kept null --batch-size 8 --rl.rollout_size 16"
QUICK = {"pretrain": SHORT, "sft": f"{SHORT} --sft.eval_answers 4", "reward": f"{SHORT} --batch-size 8",
         "dpo": f"{SHORT} --rl.kept null --batch-size 8", "ppo": ROLLOUT, "grpo": ROLLOUT, "distill": SHORT}


def run(command: list[str], log=None, use=None) -> tuple[str, float, float]:
    """stdout, minutes and peak memory in MB of a program. `use`, if given, is called while the program runs and ends it."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        if use:
            use()
            process.send_signal(signal.SIGTERM)
        output = process.stdout.read()
    except BaseException:
        process.terminate()
        raise
    _, status, usage = os.wait4(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGTERM if use else 0):
        raise SystemExit(f"{shlex.join(command)}: exit status {code}")
    return output, (time.monotonic() - start) / 60, usage.ru_maxrss / 1000


def megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for pattern in ("*.safetensors", "*.gguf") for file in folder.glob(pattern)) / 1e6


def columns(table: str) -> dict[str, list[float]]:
    """{title: values of all rows} of the numbers of a Markdown table."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")]
    return {title: [float(value.rstrip("%").replace(",", "")) for value in values]
            for title, *values in zip(rows[0], *rows[2:]) if all(re.match(r"[\d.]", value) for value in values)}


def throughput(port: int, clients: int, questions: list[str]) -> float:
    """Generated tokens per second of the server at `port` when that many clients ask at the same time."""
    def ask(question: str) -> int:
        body = json.dumps({"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 64})
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        request = urllib.request.Request(url, body.encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)["usage"]["completion_tokens"]

    start = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        return sum(pool.map(ask, questions)) / (time.monotonic() - start)


def serve(command: list[str], port: int, log: Path) -> tuple[list[float], float, float]:
    records = [json.loads(line) for line in (ROOT / "data/chat_test.jsonl").read_text().splitlines()]
    questions = [record["messages"][0]["content"] for record in records[:64]]
    speeds = []

    def ask() -> None:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        speeds.extend(throughput(port, clients, questions) for clients in (1, 16))

    with log.open("w") as file:
        _, minutes, memory = run(command, file, ask)
    return speeds, minutes, memory


def row_of(stage: Stage, home: Path, quick: bool) -> dict:
    """Run a stage, and return its row."""
    out = home / stage.name
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = shlex.split(stage.command.format(out=shlex.quote(str(out)), home=shlex.quote(str(home)), port=port))
    command += ["--config", "config.yaml"]
    trains = command[0] not in ("QUANT.py", "INFER.py")
    if trains:
        command += ["--resume", "auto", *shlex.split(QUICK[stage.name] if quick else "")]
    print(f"\n{stage.name}: python {shlex.join(command)}", file=sys.stderr, flush=True)
    if stage.name == "serve":
        (before, after), minutes, memory = serve(command, port, home / "serve.log")
    else:
        output, minutes, memory = run(command)
    row = {"stage": stage.name, "minutes": minutes, "memory": memory, "size": megabytes(out)}
    if trains:
        result = json.loads((out / "result.json").read_text())
        before, after = result["before"][stage.measure], result["after"][stage.measure]
        row["minutes"] = max(minutes, result["seconds"] / 60)  # of an interrupted run, all of its parts
        row["answered"] = result["after"].get("exact_match", result["after"].get("kept"))
    elif stage.name == "quantize":
        before, after = columns(output)[stage.measure]
        row["answered"] = columns(output).get("answered", [None])[-1]
        row["answered"] = row["answered"] and row["answered"] / 100
    elif stage.name == "export":
        before, after = megabytes(home / stage.source), row["size"]
    return row | {"before": before, "after": after}


def table(rows: list[dict]) -> str:
    lines = ["| stage | starts from | measure | before | after | answered | minutes | memory, MB | size, MB |",
             "|---|---|---|--:|--:|--:|--:|--:|--:|"]
    for stage, row in zip(STAGES, rows):
        answered = f"{row['answered']:.0%}" if row.get("answered") is not None else ""
        size = f"{row['size']:.2f}" if row["size"] else ""
        lines.append(f"| {stage.name} | {stage.source or 'random weights'} | {stage.title} | {row['before']:.4g} | {row['after']:.4g} "
                     f"| {answered} | {row['minutes']:.1f} | {row['memory']:,.0f} | {size} |")
    lines.append(f"| all | | | | | | {sum(row['minutes'] for row in rows):.1f} | {max(row['memory'] for row in rows):,.0f} | |")
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    """A panel per stage: its measure before and after."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    for axes, stage, row in zip(figure.subplots(2, 5).flat, STAGES, rows):
        values = [row["before"], row["after"]]
        bars = axes.bar(["before", "after"], values, color=["#b8c4d6", "#1f5fa8"], width=0.6)
        axes.bar_label(bars, [f"{value:.3g}" if value < 1000 else f"{value:,.0f}" for value in values], padding=2)
        axes.set_title(f"{stage.name}, {row['minutes']:.1f} min\n", fontsize=11, fontweight="bold")
        axes.text(0.5, 1.02, stage.title, transform=axes.transAxes, ha="center", fontsize=8.5)
        axes.axhline(0, color="black", linewidth=0.8, clip_on=False)
        axes.margins(y=0.15)
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out/lifecycle", help="folder of all stages (default: out/lifecycle)")
    parser.add_argument("--quick", action="store_true", help="two steps per training stage, to try it; nothing is learned")
    parser.add_argument("--table", action="store_true", help="print the table of an earlier run and draw its plot again")
    options = parser.parse_args()
    home = Path(options.out).resolve()
    home.mkdir(parents=True, exist_ok=True)
    file = home / "lifecycle.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    for stage in [] if options.table else STAGES[len(rows):]:
        rows.append(row_of(stage, home, options.quick))
        file.with_suffix(".tmp").write_text(json.dumps(rows, indent=1))
        os.replace(file.with_suffix(".tmp"), file)
    if not rows:
        raise SystemExit(f"{file}: no finished stage; run without --table")
    print(table(rows))
    plot(rows, home / "lifecycle.png")
    print(f"plot: {home / 'lifecycle.png'}", file=sys.stderr)
    worse = [stage.name for stage, row in zip(STAGES, rows) if (row["after"] >= row["before"]) == stage.lower]
    if worse:
        raise SystemExit(f"no improvement in: {', '.join(worse)}")


if __name__ == "__main__":
    main()
