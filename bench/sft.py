"""Fine-tuning compared with other programs in the same run: speed of LoRA; memory of full fine-tuning, LoRA and QLoRA.

    python bench/sft.py lora                         # tokens/s, TRL's SFTTrainer, and peft with a plain loop
    python bench/sft.py memory                       # peak memory with a 374M model, each in a separate process
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from train import machine

import MODEL
import SFT
import TOKENIZER
import TRAIN

BATCH, LENGTH, RATE = 16, 256, 1e-3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# ------------------------------------------------------------------------------------------------- LoRA's speed


def conversations(kind: str, count: int, vocabulary: int) -> list[tuple[list[int], list[int]]]:
    """(ids, mask) with a prompt and a completion of equal length. `equal`: all have the full length; `mixed`: lengths are
    log-normal, as in chats, and limited. Ids have a Zipf distribution, so that the loss falls and a wrong gradient shows."""
    random = np.random.default_rng(0)
    sizes = [LENGTH + 1 if kind == "equal" else int(np.clip(random.lognormal(4.0, 0.8), 16, LENGTH + 1)) for _ in range(count)]
    return [(np.minimum(random.zipf(1.3, size), vocabulary - 1).tolist(), [0] * (size // 2) + [1] * (size - size // 2)) for size in sizes]


class Batches:
    """A stream for `TRAIN.fit`: one pass over given batches."""

    def __init__(self, batches: list[dict]):
        self.batches, self.next, self.steps_per_epoch = batches, 0, len(batches)

    def start(self, run) -> None:
        pass

    def __next__(self) -> dict:
        self.next += 1
        return self.batches[self.next - 1]

    def state_dict(self) -> dict:
        return {}


def ours(folder: str, samples, half: bool, packing: bool) -> tuple[float, list[float]]:
    """(seconds, loss of each step) of one epoch."""
    model = MODEL.load(f"{folder}/base", device=DEVICE)
    MODEL.load_adapter(model, f"{folder}/adapter", train=True)
    batches = []
    for i in range(0, len(samples), BATCH):  # each step has the same conversations as the peers', in fewer rows if packed
        examples = TOKENIZER.Examples.of([SimpleNamespace(ids=ids, weights=mask) for ids, mask in samples[i : i + BATCH]])
        batches += TOKENIZER.fixed_batches(TOKENIZER.WholeRows(examples, LENGTH, packing, None), BATCH)
    stream = Batches(batches)
    training = TRAIN.TrainingSection(epochs=1.0, batch_size=BATCH, max_length=LENGTH, learning_rate=RATE, optim="adamw", weight_decay=0.0,
                                     adam_beta2=0.999, lr_scheduler_type="constant", warmup_steps=0, logging_steps=1, eval_steps=0, save_steps=0)
    mixed = "bf16" if half else "no"
    if half:
        MODEL.narrow_frozen(model, torch.bfloat16)
    TRAIN.Log.show = TRAIN.Log.plot = TRAIN.Trainer.checkpoint = lambda *_: None
    with tempfile.TemporaryDirectory() as out:
        result = TRAIN.fit(model, stream, TRAIN.token_loss, training, out, lambda model, folder: None, mixed=mixed, device=torch.device(DEVICE))
        return result.seconds, [record["loss"] for record in map(json.loads, Path(out, "log.jsonl").read_text().splitlines()) if "loss" in record]


def peer(folder: str):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(f"{folder}/base", dtype=torch.float32).to(DEVICE)
    return PeftModel.from_pretrained(base, f"{folder}/adapter", is_trainable=True).train()


def labeled(samples) -> list[dict]:
    return [{"input_ids": ids, "labels": [i if on else -100 for i, on in zip(ids, mask, strict=True)]} for ids, mask in samples]


def plain(folder: str, samples, half: bool) -> tuple[float, list[float]]:
    """A plain training loop: padded batches and the loss of the model."""
    model, records, losses = peer(folder), labeled(samples), []
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=RATE, weight_decay=0.0, fused=True)
    start = time.perf_counter()
    for i in range(0, len(records), BATCH):
        batch = records[i : i + BATCH]
        width = max(len(r["input_ids"]) for r in batch)
        pad = {"input_ids": 0, "labels": -100}
        ids, labels = (torch.tensor([r[key] + [fill] * (width - len(r[key])) for r in batch], device=DEVICE) for key, fill in pad.items())
        attention_mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (width - len(r["input_ids"])) for r in batch], device=DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=half):
            loss = model(input_ids=ids, attention_mask=attention_mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return time.perf_counter() - start, losses


def trl(folder: str, samples, half: bool) -> tuple[float, list[float]]:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    with tempfile.TemporaryDirectory() as out:
        settings = SFTConfig(out, per_device_train_batch_size=BATCH, num_train_epochs=1, learning_rate=RATE, lr_scheduler_type="constant", weight_decay=0.0,
                             logging_steps=1, report_to="none", save_strategy="no", train_sampling_strategy="sequential", bf16=half, use_cpu=DEVICE == "cpu",
                             gradient_checkpointing=False, optim="adamw_torch_fused", max_length=None, disable_tqdm=True, dataset_num_proc=None,
                             dataset_kwargs={"skip_prepare_dataset": True}, dataloader_pin_memory=DEVICE != "cpu")
        trainer = SFTTrainer(peer(folder), settings, train_dataset=Dataset.from_list(labeled(samples)), processing_class=AutoTokenizer.from_pretrained(f"{folder}/base"))
        trainer.log = lambda logs, *_: logged.append(logs)
        logged: list[dict] = []
        start = time.perf_counter()
        trainer.train()
        return time.perf_counter() - start, [record["loss"] for record in logged if "loss" in record]


def lora(preset: str, count: int, rounds: int, precisions: list[str], kinds: list[str]) -> None:
    print(machine(DEVICE))
    with tempfile.TemporaryDirectory() as folder:
        model = MODEL.build(preset)
        MODEL.save(model, f"{folder}/base")
        TOKENIZER.save(TOKENIZER.train(["a"], 300, "byte"), f"{folder}/base")
        SFT.attach_lora(model, f"{folder}/base", r=16, lora_alpha=32)
        MODEL.save(model, f"{folder}/adapter")
        for kind in kinds:
            samples = conversations(kind, count if kind == "equal" else 2 * count, model.config.vocab_size)
            tokens = sum(len(ids) for ids, _ in samples)
            programs = {"ours": partial(ours, packing=kind == "mixed"), "plain": plain, "trl": trl}
            for precision in precisions:
                times: dict[str, list[float]] = {program: [] for program in programs}
                losses = {}
                for _ in range(rounds):
                    for program, run in programs.items():
                        seconds, losses[program] = run(folder, samples, precision == "bf16")
                        times[program].append(seconds)
                best = [min(times[program][i] for program in ("plain", "trl")) / times["ours"][i] for i in range(rounds)]
                difference = max(abs(a - b) for program in ("plain", "trl") for a, b in zip(losses["ours"], losses[program], strict=True))
                print(json.dumps({"shape": preset, "data": kind, "precision": precision, "tokens": tokens, "rounds": rounds,
                                  **{f"{program}_tok_s": round(tokens / statistics.median(seconds)) for program, seconds in times.items()},
                                  "ratio_to_the_faster": round(statistics.median(best), 3),
                                  "steps": len(losses["ours"]), "loss": [round(losses["ours"][i], 4) for i in (0, -1)],
                                  "largest_difference_of_a_steps_loss": round(difference, 6)}), flush=True)


# --------------------------------------------------------------------------------------------- memory of one step

FORMS = {"full": [], "lora": ["--lora.r", "16"], "int8": ["--lora.r", "16", "--model.quantization", "int8"],
         "qlora": ["--lora.r", "16", "--model.quantization", "nf4"]}
IMPORTS = "import torch, transformers, peft, bitsandbytes, accelerate, matplotlib, safetensors, SFT"


def peak_of(command: list[str]) -> int:
    """Peak resident memory of a process in bytes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen([sys.executable, *command], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    errors = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: {errors[-2000:]}")
    return usage.ru_maxrss * 1024


def memory(preset: str, forms: list[str], length: int, steps: int) -> None:
    print(machine(DEVICE))
    imports = peak_of(["-c", IMPORTS]) if DEVICE == "cpu" else 0
    print(json.dumps({"interpreter_and_imports_MB": round(imports / 1e6)}), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        build = f"import MODEL, TOKENIZER; MODEL.save(MODEL.build('{preset}'), '{folder}/base'); TOKENIZER.save(TOKENIZER.train(['a'], 300, 'byte'), '{folder}/base')"
        peak_of(["-c", build])
        words = " ".join(str(i) for i in range(4 * length))
        Path(folder, "data.jsonl").write_text("".join(json.dumps({"prompt": f"{i}", "completion": f"{i} {words}"}) + "\n" for i in range(steps)))
        flags = ["--model", f"{folder}/base", "--data", f"{folder}/data.jsonl", "--data.validation", "none", "--max-length", str(length), "--batch-size", "1",
                 "--max-steps", str(steps), "--training.gradient_checkpointing", "true", "--training.mixed_precision", "bf16", "--training.optim", "adamw",
                 "--training.sample_tokens", "0", "--training.save_steps", "0", "--training.eval_steps", "0"]
        found = {}
        for form in forms:
            for program, command in {"ours": [str(ROOT / "SFT.py"), *flags, *FORMS[form], "--out", f"{folder}/{form}"],
                                  "peer": [str(ROOT / "bench" / "sft.py"), "peer", f"{folder}/base", form, str(length), str(steps), f"{folder}/{form}.json"]}.items():
                start = time.perf_counter()
                peak = peak_of(command)
                if DEVICE != "cpu":
                    report = Path(folder, form, "result.json") if program == "ours" else Path(folder, f"{form}.json")
                    peak = json.loads(report.read_text())["peak_memory_bytes"]
                found[form, program] = peak - imports
                print(json.dumps({"shape": preset, "form": form, "program": program, "peak_MB": round(peak / 1e6), "without_interpreter_MB": round((peak - imports) / 1e6),
                                  "share_of_our_full": round((peak - imports) / found["full", "ours"], 3) if ("full", "ours") in found else None,
                                  "process_s": round(time.perf_counter() - start)}), flush=True)


def peer_memory(folder: str, form: str, length: int, steps: int, report: str) -> None:
    """The same steps with peft and transformers: gradient checkpointing, bf16 autocast, fused AdamW on float32 weights."""
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    packed = {"qlora": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16),
              "int8": dict(load_in_8bit=True)}.get(form)
    options = {"quantization_config": BitsAndBytesConfig(**packed), "device_map": {"": DEVICE}} if packed else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    model = model if packed else model.to(DEVICE)
    if packed:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if form != "full":
        model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
        model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-4, fused=True)
    for _ in range(steps):
        ids = torch.randint(0, 300, (1, length), device=DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    Path(report).write_text(json.dumps({"peak_memory_bytes": TRAIN.peak_memory(torch.device(DEVICE))}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    speed = commands.add_parser("lora")
    speed.add_argument("--preset", default="llama-14m")
    speed.add_argument("--count", type=int, default=160, help="number of conversations of the full length; twice as many for mixed lengths")
    speed.add_argument("--rounds", type=int, default=5)
    speed.add_argument("--precisions", nargs="+", default=["fp32"])
    speed.add_argument("--kinds", nargs="+", default=["equal", "mixed"])
    size = commands.add_parser("memory")
    size.add_argument("--preset", default="llama-374m")
    size.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    size.add_argument("--length", type=int, default=512)
    size.add_argument("--steps", type=int, default=3)
    peer = commands.add_parser("peer", help="used by `memory`")
    for name, kind in (("folder", str), ("form", str), ("length", int), ("steps", int), ("report", str)):
        peer.add_argument(name, type=kind)
    args = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    if args.command == "lora":
        lora(args.preset, args.count, args.rounds, args.precisions, args.kinds)
    elif args.command == "memory":
        memory(args.preset, args.forms, args.length, args.steps)
    else:
        peer_memory(args.folder, args.form, args.length, args.steps, args.report)


if __name__ == "__main__":
    main()
