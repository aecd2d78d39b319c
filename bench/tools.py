"""The gain from a calculator tool in GRPO training of a small model on sums.

    python bench/tools.py                            # three seeds, about three minutes each on two idle cores
    python bench/tools.py --seeds 0 --sft-steps 300  # appends to out/bench/tools.jsonl

A model with random weights is fine-tuned on sums with the phrases of data/prompts.jsonl. In six of ten conversations there is a calculator:
two call it and four answer directly, so the model rarely calls it. One conversation has no calculator, and three repeat digits to teach
copying. Then GRPO trains the model on data/prompts.jsonl, with and without the calculator. The result is the mean reward: the fraction of
greedy answers to held-out prompts of data/prompts_test.jsonl that end with the correct number.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import MODEL
import RL
import TOKENIZER

CALCULATOR = '''def calculate(sum: str) -> int:
    """Calculator.

    Args:
        sum: such as 1+2
    """
    first, sign, second = re.fullmatch(r"(\\d+)([+-])(\\d+)", sum).groups()
    return int(first) + (1 if sign == "+" else -1) * int(second)
'''


def questions(count: int, seed: int) -> list[tuple[str, str]]:
    """(question, sum): the phrases of data/prompts.jsonl with other numbers."""
    draw = random.Random(seed)
    phrases = sorted({re.sub(r"\d+", "{}", json.loads(line)["prompt"]) for line in (ROOT / "data/prompts.jsonl").read_text().splitlines()})
    found = []
    for _ in range(count):
        text, numbers = draw.choice(phrases), (draw.randrange(100), draw.randrange(100))
        sign = "-" if re.search("minus|without", text) else "+"
        first, second = sorted(numbers, reverse=True) if sign == "-" else numbers
        found.append((text.format(first, second), f"{first}{sign}{second}"))
    return found


def conversation(i: int, question: str, sum: str, schema: list) -> dict:
    answer, user = {"role": "assistant", "content": f"It is {eval(sum)}."}, {"role": "user", "content": question}
    kind = ("call", "repeat", "direct", "repeat", "direct", "call", "repeat", "direct", "no tools", "direct")[i % 10]
    if kind == "repeat":
        digits = "".join(random.Random(i).choices("0123456789", k=20))
        return {"messages": [{"role": "user", "content": f"Repeat {digits}"}, {"role": "assistant", "content": digits}]}
    if kind != "call":
        return {"messages": [user, answer], **({"tools": schema} if kind == "direct" else {})}
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "calculate", "arguments": {"sum": sum}}}]}
    return {"messages": [user, call, {"role": "tool", "name": "calculate", "content": str(eval(sum))}, answer], "tools": schema}


def train(program: str, out: Path, *flags) -> dict:
    done = subprocess.run([sys.executable, str(ROOT / program), "--out", str(out), "--overwrite", *map(str, flags)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads((out / "result.json").read_text())


def run(seed: int, options) -> dict:
    out, clock = Path(options.out) / f"tools-{seed}", time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    (out / "calculator.py").write_text(f"import re\n\n\n{CALCULATOR}")
    tool = f"{out}/calculator.py:calculate"
    from transformers.utils import get_json_schema

    schema = [get_json_schema(RL.user_function(tool, "tools"))]
    conversations = [conversation(i, *question, schema) for i, question in enumerate(questions(16000, seed))]
    (out / "sft.jsonl").write_text("".join(json.dumps(record) + "\n" for record in conversations))
    texts = [text for record in conversations[:2000] for text in (json.dumps(schema[0]), *(turn["content"] or "".join(
        f"<tool_call>{json.dumps(call['function'])}</tool_call>" for call in turn["tool_calls"]) for turn in record["messages"]))]
    tokenizer = TOKENIZER.train(texts, 600)
    TOKENIZER.ensure_chat(tokenizer)
    ends = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    model = MODEL.build(MODEL.ModelConfig(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
                                          max_position_embeddings=256, **ends), seed=seed)
    MODEL.save(model, out / "base")
    TOKENIZER.save(tokenizer, out / "base")
    quiet = ["--training.eval_steps", 0, "--training.save_steps", 0, "--training.sample_tokens", 0, "--seed", seed]
    sft = train("SFT.py", out / "sft", "--model", out / "base", "--data", out / "sft.jsonl", "--max-steps", options.sft_steps, "--batch-size", 12, "--learning-rate", "2e-3", "--max-length", 256,
                "--sft.eval_answers", 0, *quiet)
    row = {"seed": seed, "sft_loss": round(sft["after"]["loss"], 3)}
    for name, flags in (("without the calculator", []), ("with the calculator", ["--rl.tools", tool, "--rl.max_turns", 2])):
        result = train("RL.py", out / name.split()[0], "--model", out / "sft", "--rl.method", "grpo", "--data", ROOT / "data/prompts.jsonl", "--data.validation", ROOT / "data/prompts_test.jsonl",
                       "--rl.eval_prompts", 200, "--rl.rollout_size", 128, "--batch-size", 64, "--max-steps", options.steps, "--max-length", 256, "--rl.max_completion_length", 64,
                       "--learning-rate", "3e-4", "--rl.kept", "null", *quiet, *flags)
        row[name] = [round(result[when]["reward"], 3) for when in ("before", "after")]
    return {**row, "seconds": round(time.perf_counter() - clock)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sft-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", default=str(ROOT / "out/bench"))
    options = parser.parse_args()
    for seed in options.seeds:
        row = run(seed, options)
        with open(Path(options.out) / "tools.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"seed {seed}: " + "; ".join(f"{name} {row[name][0]:.3f} -> {row[name][1]:.3f}" for name in ("without the calculator", "with the calculator")) + f"  ({row['seconds']} s)", flush=True)


if __name__ == "__main__":
    main()
