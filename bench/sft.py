"""Fine-tuning beside other programs in the same run: speed of LoRA, memory of full, LoRA and QLoRA.

    python bench/sft.py lora                         # tokens/s beside TRL's SFTTrainer and plain peft + transformers
    python bench/sft.py memory                       # peak memory of full, LoRA and QLoRA on a 374M model, a process each
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from train import machine

import MODEL
import TOKENIZER
import TRAIN

BATCH, LENGTH, RATE = 16, 256, 1e-3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# ------------------------------------------------------------------------------------------------- LoRA's speed


def conversations(kind: str, count: int, vocabulary: int) -> list[tuple[list[int], list[int]]]:
    """(ids, mask), question and answer of the same length. `equal`: all of the full length; `mixed`: log-normal, as
    chats are, the longest cut. Ids are drawn as words are (Zipf), so that losses fall and a wrong gradient shows."""
    random = np.random.default_rng(0)
    sizes = [LENGTH + 1 if kind == "equal" else int(np.clip(random.lognormal(4.0, 0.8), 16, LENGTH + 1)) for _ in range(count)]
    return [(np.minimum(random.zipf(1.3, size), vocabulary - 1).tolist(), [0] * (size // 2) + [1] * (size - size // 2)) for size in sizes]


class Batches:
    """A stream for `TRAIN.fit` of one pass over batches that were made before."""

    def __init__(self, batches: list[dict]):
        self.batches, self.next, self.steps_per_epoch = batches, 0, len(batches)

    def start(self, run) -> None:
        pass

    def __next__(self) -> dict:
        self.next += 1
        return self.batches[self.next - 1]

    def state_dict(self) -> dict:
        return {}


def examples(talks) -> TOKENIZER.Examples:
    sizes = np.array([len(ids) for ids, _ in talks])
    weights = np.concatenate([np.array(mask, np.float32) for _, mask in talks])
    return TOKENIZER.Examples(np.concatenate([np.array(ids) for ids, _ in talks]), weights, np.cumsum(sizes) - sizes, sizes - 1)


def ours(folder: str, talks, half: bool, packing: bool) -> tuple[float, list[float]]:
    """(seconds, loss of each step) of one pass."""
    model = MODEL.load(f"{folder}/base", device=DEVICE)
    MODEL.load_adapter(model, f"{folder}/adapter", train=True)
    batches = []
    for i in range(0, len(talks), BATCH):  # the same conversations a step as the peers, in fewer rows where packed
        spans = examples(talks[i : i + BATCH])
        rows = TOKENIZER.WholeRows(spans, LENGTH, packing, None)
        batches.append(TOKENIZER.collate(spans.ids, [rows.row(r) for r in range(rows.count)], weights=spans.weights))
    stream = Batches(batches)
    training = TRAIN.TrainingSection(epochs=1.0, batch_size=BATCH, max_length=LENGTH, learning_rate=RATE, optim="adamw", weight_decay=0.0,
                                     adam_beta2=0.999, lr_scheduler_type="constant", warmup_steps=0, logging_steps=1, eval_steps=0, save_steps=0)
    mixed = "bf16" if half else "no"
    if half:
        MODEL.narrow_frozen(model, torch.bfloat16)
    TRAIN.Log.show = TRAIN.Log.plot = TRAIN.Trainer.checkpoint = lambda *_: None
    with tempfile.TemporaryDirectory() as out:
        result = TRAIN.fit(model, stream, TRAIN.token_loss, training, out, lambda model, folder: None, mixed=mixed, device=torch.device(DEVICE))
        return result.seconds, [json.loads(line)["loss"] for line in Path(out, "log.jsonl").read_text().splitlines()]


def peer(folder: str):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(f"{folder}/base", dtype=torch.float32).to(DEVICE)
    return PeftModel.from_pretrained(base, f"{folder}/adapter", is_trainable=True).train()


def labelled(talks) -> list[dict]:
    return [{"input_ids": ids, "labels": [i if on else -100 for i, on in zip(ids, mask, strict=True)]} for ids, mask in talks]


def plain(folder: str, talks, half: bool) -> tuple[float, list[float]]:
    """The loop that a tutorial writes: padded batches, the model's own loss."""
    model, records, losses = peer(folder), labelled(talks), []
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=RATE, weight_decay=0.0, fused=True)
    start = time.perf_counter()
    for i in range(0, len(records), BATCH):
        batch = records[i : i + BATCH]
        width = max(len(r["input_ids"]) for r in batch)
        pad = {"input_ids": 0, "labels": -100}
        ids, labels = (torch.tensor([r[key] + [fill] * (width - len(r[key])) for r in batch], device=DEVICE) for key, fill in pad.items())
        seen = torch.tensor([[1] * len(r["input_ids"]) + [0] * (width - len(r["input_ids"])) for r in batch], device=DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=half):
            loss = model(input_ids=ids, attention_mask=seen, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return time.perf_counter() - start, losses


def trl(folder: str, talks, half: bool, **more) -> tuple[float, list[float]]:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    with tempfile.TemporaryDirectory() as out:
        settings = SFTConfig(out, per_device_train_batch_size=BATCH, num_train_epochs=1, learning_rate=RATE, lr_scheduler_type="constant", weight_decay=0.0,
                             logging_steps=1, report_to="none", save_strategy="no", train_sampling_strategy="sequential", bf16=half, use_cpu=DEVICE == "cpu",
                             gradient_checkpointing=False, optim="adamw_torch_fused", max_length=None, disable_tqdm=True, dataset_num_proc=None,
                             dataset_kwargs={"skip_prepare_dataset": True}, dataloader_pin_memory=DEVICE != "cpu", **more)
        trainer = SFTTrainer(peer(folder), settings, train_dataset=Dataset.from_list(labelled(talks)), processing_class=AutoTokenizer.from_pretrained(f"{folder}/base"))
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
        MODEL.attach_lora(model, f"{folder}/base", r=16, lora_alpha=32)
        MODEL.save(model, f"{folder}/adapter")
        for kind in kinds:
            talks = conversations(kind, count if kind == "equal" else 2 * count, model.config.vocab_size)
            tokens = sum(len(ids) for ids, _ in talks)
            sides = {"ours": partial(ours, packing=kind == "mixed"), "plain": plain, "trl": trl}
            for precision in precisions:
                times: dict[str, list[float]] = {side: [] for side in sides}
                losses = {}
                for _ in range(rounds):
                    for side, run in sides.items():
                        seconds, losses[side] = run(folder, talks, precision == "bf16")
                        times[side].append(seconds)
                best = [min(times[side][i] for side in ("plain", "trl")) / times["ours"][i] for i in range(rounds)]
                apart = max(abs(a - b) for side in ("plain", "trl") for a, b in zip(losses["ours"], losses[side], strict=True))
                print(json.dumps({"shape": preset, "data": kind, "precision": precision, "tokens": tokens, "rounds": rounds,
                                  **{f"{side}_tok_s": round(tokens / statistics.median(seconds)) for side, seconds in times.items()},
                                  "ratio_to_the_faster": round(statistics.median(best), 3),
                                  "steps": len(losses["ours"]), "loss": [round(losses["ours"][i], 4) for i in (0, -1)],
                                  "largest_difference_of_a_steps_loss": round(apart, 6)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    speed = commands.add_parser("lora")
    speed.add_argument("--preset", default="llama-14m")
    speed.add_argument("--count", type=int, default=160, help="conversations of the full length; twice as many of mixed length")
    speed.add_argument("--rounds", type=int, default=5)
    speed.add_argument("--precisions", nargs="+", default=["fp32"])
    speed.add_argument("--kinds", nargs="+", default=["equal", "mixed"])
    args = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    if args.command == "lora":
        lora(args.preset, args.count, args.rounds, args.precisions, args.kinds)


if __name__ == "__main__":
    main()
