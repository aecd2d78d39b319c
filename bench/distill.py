"""Quality of the students of DISTILL.py, and the time and memory saved by caching the teacher's outputs.

    python bench/distill.py                          # quality: three seeds of each row; appends to out/bench/distill.jsonl and skips existing rows
    python bench/distill.py --rows text-alone text-logits --seeds 0
    python bench/distill.py --table                  # print the rows as a table
    python bench/distill.py cache                    # speed, losses and memory without a teacher, with the teacher and with a cache
    python bench/distill.py stories --teacher FOLDER --data FILE   # a trained model and real text: students with and without distillation
    python bench/distill.py trl                      # on-policy and off-policy steps compared with TRL's GKDTrainer

loss: nats per held-out token (conversations: per token of the answers). answered: exact match of greedy answers on the questions of
data/chat_test.jsonl; text models continue the question. All students have 225,000 parameters, and their teachers (out, out/sft) four
times as many. "alone" is training without a teacher.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")


import torch
from rl import PLAIN, STEPS, TURNS, load, rows, save

import INFER
import MODEL
import TOKENIZER

CHAT = ["--teacher", "out/sft", "--max-steps", "400"]
AFTER = ["--teacher", "out/sft", "--model", "{out}/chat-hidden-{seed}", "--alpha", "0", "--batch-size", "64", "--data.packing", "false", "--learning-rate", "1e-3",
         "--training.optim", "adamw"]  # 64 completions per step, of the teacher or of the student
RUNS = {  # row -> flags of DISTILL.py
    "text-alone": ["--alpha", "1"],
    "text-logits": [],
    "text-cache": ["--cache-dir", "{out}/cache"],
    "text-hidden": ["--method", "hidden"],
    "chat-alone": [*CHAT, "--alpha", "1"],
    "chat-logits": [*CHAT],
    "chat-hidden": [*CHAT, "--method", "hidden"],
    "off-policy": [*AFTER, "--max-steps", "200", "--data", "{out}/answers.jsonl", "--data.validation", "data/chat_test.jsonl"],
    "on-policy": [*AFTER, "--max-steps", "200", "--lmbda", "1", "--max-completion-length", "64"],
    "off-policy-equal-time": [*AFTER, "--max-minutes", "{minutes}", "--data", "{out}/answers.jsonl", "--data.validation", "data/chat_test.jsonl"],
}
NEEDS = {"off-policy": "chat-hidden", "on-policy": "chat-hidden", "off-policy-equal-time": "on-policy"}


def questions() -> list[dict]:
    return [json.loads(line) for line in (ROOT / "data/chat_test.jsonl").read_text().splitlines()]


def answered(folder: str) -> float:
    """The fraction of the questions whose answer is an exact match."""
    model, tokenizer, records = load(folder), TOKENIZER.load(folder), questions()
    chat = bool(tokenizer.chat_template)
    prompts = [TOKENIZER.render_chat(tokenizer, record["messages"][:1], add_generation_prompt=True).ids if chat else TOKENIZER.encode_prompt(tokenizer, record["messages"][0]["content"])
               for record in records]
    completions = [completion.text for [completion] in INFER.generate(model, prompts, INFER.Sampling(64, 0), tokenizer, batch_size=256)]
    expected = [record["messages"][1]["content"].strip() for record in records]
    return sum(text.strip() == right if chat else text.strip().startswith(right) for text, right in zip(completions, expected, strict=True)) / len(records)


def distill(flags: list[str], options, check: bool = True) -> None:
    command = [sys.executable, str(ROOT / "DISTILL.py"), "--config", str(ROOT / "config.yaml"), *map(str, flags), *options.flags]
    subprocess.run(command, check=check, cwd=ROOT, stderr=None if options.loud else subprocess.DEVNULL)


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def run(name: str, seed: int, options) -> dict:
    """Run a row and the rows that it needs. An interrupted run resumes from its newest checkpoint."""
    home = Path(options.out).resolve()
    out = home / f"{name}-{seed}"
    if name in NEEDS and not (home / f"{NEEDS[name]}-{seed}" / "result.json").exists():
        save(run(NEEDS[name], seed, options), options.file)
    if "off-policy" in name and not (home / "answers.jsonl").exists():
        distill(["--generate", "--teacher", "out/sft", "--data", "data/chat.jsonl", "--sampling", "{temperature: 0, max_new_tokens: 64}", "--out",
                 home / "answers.jsonl"], options)
    if name == "text-cache" and not (home / "cache" / "cache.json").exists():
        distill(["--cache", "--cache-dir", home / "cache"], options)
    minutes = result(home / f"on-policy-{seed}")["seconds"] / 60 if "{minutes}" in RUNS[name] else 0
    flags = [flag.format(out=home, seed=seed, minutes=minutes) for flag in RUNS[name]]
    if not (out / "result.json").exists():
        distill([*flags, "--out", out, "--seed", seed, "--resume", "auto", "--training.sample_tokens", 0], options)
    found = result(out)
    return {"row": name, "seed": seed, "loss": found["after"]["loss"], "answered": answered(str(out)), "steps": found["steps"], "seconds": round(found["seconds"])}


BASELINES = {"text-logits": "text-alone", "text-cache": "text-logits", "text-hidden": "text-alone", "chat-logits": "chat-alone", "chat-hidden": "chat-alone",
          "on-policy": "off-policy", "off-policy-equal-time": "on-policy"}


def two_errors(values: list[float], other: list[float], share: bool) -> float:
    """Two standard errors of a difference of means: over the seeds or, for a `share` of answers, over the answers if that is larger."""
    def variance(values: list[float]) -> float:
        mean = sum(values) / len(values)
        seeds = sum((x - mean) ** 2 for x in values) / max(len(values) - 1, 1) / len(values)
        return max(seeds, mean * (1 - mean) / len(questions()) / len(values)) if share else seeds
    return 2 * math.sqrt(variance(values) + variance(other))


def table(found: list[dict]) -> str:
    lines = ["| student | loss (each seed) | vs. baseline | answered (each seed) | vs. baseline | steps | seconds |", "|---|---|---|---|---|---|---|"]
    for name in RUNS:
        seeds = sorted((row for row in found if row["row"] == name), key=lambda row: row["seed"])
        if not seeds:
            continue
        cells = []
        for measure, text in (("loss", "{:.4f}"), ("answered", "{:.1%}")):
            values = [row[measure] for row in seeds]
            cells.append(f"{text.format(sum(values) / len(values))} ({', '.join(map(text.format, values))})")
            other = [row[measure] for row in found if row["row"] == BASELINES.get(name) and row["seed"] in {seed["seed"] for seed in seeds}]
            gain = sum(values) / len(values) - sum(other) / len(other) if other else 0
            cells.append(f"{text.replace(':', ':+').format(gain)} ± {text.format(two_errors(values, other, measure == 'answered'))}" if other else "")
        steps = sorted({row["steps"] for row in seeds})
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {'-'.join(str(n) for n in {steps[0], steps[-1]})} | {seeds[0]['seconds']} |")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------- time and memory

SHAPES = {  # (student, teacher): the defaults, and larger models with 4,096 tokens, in which matrix products dominate the time
    "225k": ([], None),
    "3m": (["--model.preset", "llama-14m", "--model.hidden_size", "192", "--model.num_hidden_layers", "4", "--model.intermediate_size", "512"],
           dict(hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6)),
}
WATCH = """
import sys, threading, time
sys.path.insert(0, {root!r})
peak = 0
def watch():
    global peak
    while True:
        with open("/proc/self/status") as file:
            peak = max(peak, *(int(line.split()[1]) for line in file if line.startswith("RssAnon")))
        time.sleep(0.002)
import DISTILL, json
threading.Thread(target=watch, daemon=True).start()
result = DISTILL.main(sys.argv[1:])
print(json.dumps(dict(anonymous=peak * 1024)))
"""


def timed(flags: list[str], options) -> dict:
    """Tokens per second (median of the log), the loss, and the peak of the anonymous memory of the process."""
    out = Path(options.out) / "cache-run"
    command = [sys.executable, "-c", WATCH.format(root=str(ROOT)), "--config", str(ROOT / "config.yaml"), *map(str, flags), "--out", str(out), "--overwrite",
               "--training.logging_steps", "1", "--training.sample_tokens", "0", *options.flags]
    done = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, stderr=None if options.loud else subprocess.DEVNULL, text=True)
    log = [record for record in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "tokens_per_second" in record]
    return {"speed": statistics.median(record["tokens_per_second"] for record in log[3:]), "anonymous": json.loads(done.stdout)["anonymous"],
            "loss": result(out)["after"]["loss"]}


def time_cache(options) -> None:
    """Print the medians of alternating rounds."""
    for name in options.shapes:
        student, shape = SHAPES[name]
        teacher, cache = ROOT / "out", Path(options.out).resolve() / f"cache-{name}"
        data = []
        if shape:  # random weights take as long as trained weights
            text = Path(options.out).resolve() / "some.txt"  # a part of the data, so that the cache is written quickly
            text.parent.mkdir(parents=True, exist_ok=True)
            text.write_text("".join(f"{line}\n" for line in (ROOT / "data/train.txt").read_text().splitlines()[:1000]))
            data = ["--data", text, "--data.dir", Path(options.out).resolve() / f"ids-{name}"]
            tokenizer = TOKENIZER.train((ROOT / "data/train.txt").read_text().splitlines() + (ROOT / "data/train.jsonl").read_text().splitlines(), 4096)
            teacher = Path(options.out).resolve() / f"teacher-{name}"
            MODEL.save(MODEL.build(MODEL.preset_config("llama-14m", **{**shape, "vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id})), teacher)
            TOKENIZER.save(tokenizer, teacher)
        flags = [*student, "--teacher", teacher, *data]
        if not (cache / "cache.json").exists():
            distill(["--cache", *flags, "--cache-dir", cache], options)
        kinds = {"alone": ["--alpha", "1"], "teacher in memory": [], "from the cache": ["--cache-dir", cache]}
        few = ["--max-steps", options.steps, "--training.eval_batches", "2", "--training.save_steps", "0"]
        found: dict[str, list[dict]] = {kind: [] for kind in kinds}
        for _ in range(options.rounds):
            for kind, more in kinds.items():
                found[kind].append(timed([*flags, *few, *more], options))
        medians = {kind: {key: statistics.median(run[key] for run in values) for key in values[0]} for kind, values in found.items()}
        for kind, median in medians.items():
            print(f"{name} {kind}: {median['speed']:,.0f} tokens/s ({median['speed'] / medians['teacher in memory']['speed']:.2f}x), "
                  f"anonymous memory {median['anonymous'] / 2**20:,.0f} MiB ({median['anonymous'] / medians['alone']['anonymous'] - 1:+.1%}), loss {median['loss']:.4f}", flush=True)


# ---------------------------------------------------------------------------------------------- a trained teacher


def stories(options) -> None:
    """Train a student of a third of the teacher's size: alone, with logits, and with hidden states. The teacher was trained on text in
    normal case, so sentences and names in the data are capitalized."""
    home = Path(options.out).resolve()
    home.mkdir(parents=True, exist_ok=True)
    text = home / "stories.jsonl"
    if not text.exists():
        records = [json.loads(line) for line in Path(options.data).read_text().splitlines()]
        text.write_text("".join(json.dumps({"text": with_capitals(record["text"])}) + "\n" for record in records))
    student = ["--model.preset", "llama-225k", "--model.hidden_size", "40", "--model.num_hidden_layers", "3", "--model.num_attention_heads", "4", "--model.intermediate_size", "112",
               "--model.max_position_embeddings", "512"]
    common = ["--teacher", Path(options.teacher).resolve(), "--data", text, "--data.dir", home / "stories", *student, "--max-steps", options.steps, "--training.sample_tokens", "0"]
    for name, more in {"alone": ["--alpha", "1"], "logits": [], "hidden": ["--method", "hidden"]}.items():
        found = []
        for seed in options.seeds:
            out = home / f"stories-{name}-{seed}"
            if not (out / "result.json").exists():
                distill([*common, *more, "--seed", seed, "--out", out, "--resume", "auto"], options)
            found.append(result(out)["after"]["loss"])
        error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else 0
        print(f"{name}: held-out loss {statistics.mean(found):.4f} ({', '.join(f'{x:.4f}' for x in found)}), 2 standard errors {2 * error:.4f}", flush=True)


def with_capitals(text: str) -> str:
    """"one day, lily saw tom. i am here." -> "One day, Lily saw Tom. I am here.": sentences, `i`, and the usual names of these stories."""
    import re

    text = re.sub(r"\bi\b", "I", re.sub(r"(^|[.!?]\s+[\"']?|\n\s*[\"']?|[\"'](?=\w))([a-z])", lambda m: m[1] + m[2].upper(), text.strip()))
    return re.sub(r"\b(" + "|".join(NAMES) + r")\b", lambda m: m[0].capitalize(), text)


NAMES = ("lily tim timmy tom sara sarah ben anna mia max jack lucy sam amy bob sue jane john mary billy jimmy joe emma jill mark kitty spot benny lila tommy bobby "
         "daisy molly polly ella susie peter jim david sally lola leo lena mike nick zoe nina alice jenny johnny charlie buddy rex fluffy").split()


# ---------------------------------------------------------------------------------------------- compared with TRL

ROWS = 32
SETTINGS = ["--learning-rate", "1e-3", "--batch-size", str(ROWS), "--data.packing", "false", "--sft.eval-answers", "0", "--alpha", "0", *PLAIN]


def train_ours(kind: list[str], student: Path, data: Path, options) -> tuple[float, list[float], list[int]]:
    """(seconds of training, losses, record numbers in training order)."""
    import DISTILL

    out, order, original = Path(options.out) / "compared", [], TOKENIZER.TokenStream.__next__

    def recorded(stream) -> dict:
        batch = original(stream)
        plan, first = stream.plan, batch["place"][2]
        order.extend(plan.members[int(plan.order[i])][0] for i in range(first, min(first + stream.batch_size, plan.count)))
        return batch

    TOKENIZER.TokenStream.__next__ = recorded
    with contextlib.redirect_stderr(io.StringIO()):
        DISTILL.main(["--config", str(ROOT / "config.yaml"), "--teacher", options.model, "--model", str(student), "--data", str(data), "--out", str(out), "--overwrite", *SETTINGS, *kind])
    TOKENIZER.TokenStream.__next__ = original
    losses = [record["loss"] for record in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "loss" in record]
    return result(out)["seconds"], losses, order


def train_trl(lmbda: float, student: Path, records: list[dict], options) -> tuple[float, list[float]]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.chat_template = TURNS
    model, teacher = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (student, options.model))
    settings = GKDConfig(output_dir=str(Path(options.out) / "trl"), per_device_train_batch_size=ROWS, max_steps=STEPS, learning_rate=1e-3, lr_scheduler_type="constant", weight_decay=0.0,
                         adam_beta2=0.999, optim="adamw_torch_fused", logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
                         disable_tqdm=True, lmbda=lmbda, beta=0.0, temperature=1.0, max_new_tokens=32, max_length=256, max_grad_norm=1.0)
    sequential = type("Sequential", (GKDTrainer,), {"_get_train_sampler": lambda self, *_: torch.utils.data.SequentialSampler(self.train_dataset)})
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        trainer = sequential(model, teacher, settings, train_dataset=Dataset.from_list([{"messages": record["messages"]} for record in records]), processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        clock = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - clock
    return seconds, [record["loss"] for record in trainer.state.log_history if "loss" in record]


def compare_trl(options) -> None:
    """Print the medians of alternating rounds on questions with one answer."""
    home = Path(options.out).resolve()
    home.mkdir(parents=True, exist_ok=True)
    records = [record for line in (ROOT / "data/chat.jsonl").read_text().splitlines() if len((record := json.loads(line))["messages"]) == 2]
    records = [record for record in records if len(record["messages"][1]["content"]) < 200][: 4 * STEPS * ROWS]
    data, student, config = home / "single.jsonl", home / "student", MODEL.load(options.model).config
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    knobs = {"vocab_size": config.vocab_size, "bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    MODEL.save(MODEL.build(MODEL.preset_config("llama-225k", **knobs)), student)
    TOKENIZER.save(TOKENIZER.load(options.model), student)
    for name, lmbda, kind in (("off-policy", 0.0, []), ("on-policy", 1.0, ["--lmbda", "1", "--max-completion-length", "32", "--rollout-size", str(ROWS)])):
        times: dict[str, list[float]] = {"ours": [], "TRL": []}
        for _ in range(options.rounds):
            seconds, losses, order = train_ours(kind, student, data, options)
            times["ours"].append(seconds)
            seconds, their_losses = train_trl(lmbda, student, [records[i] for i in order] or records, options)
            times["TRL"].append(seconds)
        ours, theirs = (statistics.median(values) for values in times.values())
        difference = f"; losses differ by at most {max(abs(a - b) for a, b in zip(losses, their_losses, strict=True)):.1g}" if not lmbda else ""
        print(f"{name}, {STEPS} steps of {ROWS}: DISTILL.py {ours:.1f} s, TRL {theirs:.1f} s, {theirs / ours:.2f}x{difference}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("gains", "cache", "stories", "trl"), default="gains")
    parser.add_argument("--rows", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", default=str(ROOT / "out/bench/distill"))
    parser.add_argument("--model", default=str(ROOT / "out/sft"), help="trl: teacher model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--teacher", help="stories: the folder of a trained model")
    parser.add_argument("--data", help="stories: a JSONL file with texts")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--loud", action="store_true", help="show the logs of DISTILL.py")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="flags for DISTILL.py, up to the end of the line")
    options = parser.parse_args()
    options.file = Path(options.out) / "distill.jsonl"
    if options.what != "gains":
        return {"cache": time_cache, "stories": stories, "trl": compare_trl}[options.what](options)
    for seed in () if options.table else options.seeds:
        for name in options.rows:
            if (name, seed) not in {(row["row"], row["seed"]) for row in rows(options.file)}:
                save(run(name, seed, options), options.file)
    print(table(rows(options.file)))


if __name__ == "__main__":
    main()
