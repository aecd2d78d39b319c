"""Training speed compared with transformers in the same run.

    python bench/train.py shakespeare PATH/tinyshakespeare.txt           # a short tuned run: loss and wall time as JSON
    python bench/train.py shakespeare PATH/tinyshakespeare.txt --long    # ten CPU minutes
    python bench/train.py throughput                                     # tokens/s, eager and compiled, two models on the CPU
    python bench/train.py throughput --shapes gpt2-124m                  # on CUDA: tokens/s and fraction of the peak FLOP/s
    torchrun --nproc_per_node 2 bench/train.py save                      # FSDP2 on CPUs: memory of a checkpoint in each process
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

import MODEL
import TRAIN

SHAPES = {"llama-14m": ("llama-14m", 16, 256), "llama-134m": ("llama-134m", 8, 256), "gpt2-124m": ("gpt2-124m", 16, 1024)}


def peer_model(preset: str):
    """The transformers model of the same architecture, with fresh weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = MODEL.preset_config(preset)
    raw = MODEL.config_to_hub(config)
    kind = raw.pop("model_type")
    raw.pop("architectures")
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{k: v for k, v in raw.items() if v is not None}))


def make_step(ours: bool, preset: str, batch: int, length: int, compiled: bool, half: bool, device: str):
    """A function that runs one optimizer step: forward, backward, clipping, fused AdamW on float32 weights."""
    model = (MODEL.build(preset) if ours else peer_model(preset)).to(device).train()
    if compiled and ours:
        TRAIN.compile_model(model)
    elif compiled:
        model = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    vocabulary = MODEL.preset_config(preset).vocab_size
    ids = torch.randint(0, vocabulary, (batch, length + 1), device=device)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=half):
            if ours:
                loss = -model(inputs, targets=targets).logprobs.sum() / targets.numel()
            else:
                loss = model(input_ids=inputs, labels=inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def timed(step, seconds: float) -> float:
    """Median seconds of a step, measured for about `seconds`."""
    times = []
    while sum(times) < seconds or len(times) < 2:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def outside_products(step) -> float:
    """Seconds of a step outside of the matrix products of linear layers, the part that depends on the program."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    return sum(event.self_cpu_time_total for event in profile.key_averages() if event.key not in ("aten::mm", "aten::addmm")) / 1e6


def throughput(shapes: list[str], rounds: int, seconds: float, modes: list[str], precisions: list[str]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(machine(device))
    for name in shapes:
        preset, batch, length = SHAPES[name]
        flops = 3 * MODEL.flops_per_token(MODEL.preset_config(preset), length // 2)
        for precision in precisions:
            half = precision == "bf16"
            peak = MODEL.matmul_flops(torch.bfloat16 if half else torch.float32, device, 0 if device == "cuda" else 2048)
            for mode in modes:
                torch._dynamo.reset()
                options = (preset, batch, length, mode == "compiled", half, device)
                steps = {"ours": make_step(True, *options), "transformers": make_step(False, *options)}
                for step in steps.values():
                    step(), step()
                pairs = [{program: timed(step, seconds) for program, step in steps.items()} for _ in range(rounds)]
                speed = {program: batch * length / statistics.median(pair[program] for pair in pairs) for program in steps}
                ratio = statistics.median(pair["transformers"] / pair["ours"] for pair in pairs)
                row = {"shape": name, "precision": precision, "mode": mode, "ours_tok_s": round(speed["ours"]),
                       "transformers_tok_s": round(speed["transformers"]), "ratio": round(ratio, 3),
                       "share_of_peak": round(flops * speed["ours"] / peak, 3), "pairs": rounds}
                if device == "cpu":
                    row["outside_products_s"] = {program: round(outside_products(step), 3) for program, step in steps.items()}
                print(json.dumps(row), flush=True)


def machine(device: str) -> str:
    import transformers

    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    return (f"# {name}; torch {torch.__version__}, transformers {transformers.__version__}, python {platform.python_version()}, "
            f"{time.strftime('%Y-%m-%d')}; {subprocess.list2cmdline(['python', *sys.argv])}")


SHAKESPEARE = ["--model.preset", "llama-1m", "--data.text_unit", "file", "--data.validation", "tail", "--data.validation_fraction", "0.1",
               "--training.sample_tokens", "0", "--training.eval_steps", "0", "--training.save_steps", "0", "--training.eval_batches", "100000"]
# BPE tokens train fastest, but overfit within ten minutes; characters with dropout reach a lower loss in that time.
SHORT = ["--tokenizer.vocab_size", "1024", "--max-length", "128", "--batch-size", "12", "--max-steps", "88", "--learning-rate", "0.01"]
LONG = ["--tokenizer.kind", "char", "--model.resid_pdrop", "0.1", "--model.embd_pdrop", "0.1", "--max-length", "256", "--batch-size", "16",
        "--max-minutes", "9.6"]


def shakespeare(path: str, long: bool, more: list[str]) -> None:
    """Train in a separate process and time all of it, with imports and tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "TRAIN.py"), "--data", path, "--out", f"{folder}/out", "--data.dir", f"{folder}/data",
                   *SHAKESPEARE, *(LONG if long else SHORT), *more]
        start = time.perf_counter()
        subprocess.run(command, check=True)
        wall = time.perf_counter() - start
        result = json.loads(Path(folder, "out", "result.json").read_text())
    nats_per_char = result["after"]["bits_per_byte"] * math.log(2)  # the text is ASCII: a byte is a character
    print(json.dumps({"val_nats_per_char": round(nats_per_char, 4), "wall_s": round(wall, 1), "steps": result["steps"]}))


def save() -> None:
    """Increase of each process's peak memory by a checkpoint of a model and AdamW (Linux), compared with torch's get_state_dict."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    training = TRAIN.TrainingSection(max_steps=1, batch_size=1, max_length=64, optim="adamw", learning_rate=1e-4, mixed_precision="no", fsdp=True)
    accelerator, device = TRAIN.start_processes(training, "cpu", Path("."))
    model = MODEL.build("llama-134m", seed=0)

    def added(work) -> str:
        """MiB of peak memory during work() above the memory before."""
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = resident("VmRSS")
        work()
        return f"{resident('VmHWM') - before:,.0f} MiB"

    def resident(key: str) -> float:
        return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 1024

    class Tokens:
        steps_per_epoch = None

        def start(self, run) -> None:
            pass

        def __next__(self) -> dict:
            ids = torch.arange(64)[None]
            return {"input_ids": ids, "targets": ids, "positions": None, "segment_ids": None, "weights": None, "counts": {"tokens": 64}}

        def state_dict(self) -> dict:
            return {}

    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    checkpoint = TRAIN.Trainer.checkpoint

    def measured(trainer) -> None:
        if not trainer.last_saved:
            ours = added(lambda: checkpoint(trainer))
            theirs = added(lambda: get_state_dict(trainer.model, trainer.optimizers, options=whole))
            print(f"process {trainer.run.rank}: checkpoint +{ours}, get_state_dict +{theirs}", flush=True)

    TRAIN.Trainer.checkpoint = measured
    with tempfile.TemporaryDirectory() as folder:
        out = Path(TRAIN.from_first(folder))
        TRAIN.fit(model, Tokens(), TRAIN.token_loss, training, out, MODEL.save, accelerator=accelerator, device=device)
    if MODEL.process_rank() == 0:
        print(machine("cpu"))
    torch.distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    play = commands.add_parser("shakespeare")
    play.add_argument("path")
    play.add_argument("--long", action="store_true")
    speed = commands.add_parser("throughput")
    speed.add_argument("--shapes", nargs="+", default=["llama-14m", "llama-134m"], choices=list(SHAPES))
    speed.add_argument("--modes", nargs="+", default=["eager", "compiled"])
    speed.add_argument("--precisions", nargs="+", default=["bf16"])
    speed.add_argument("--rounds", type=int, default=5)
    speed.add_argument("--seconds", type=float, default=3.0, help="seconds of each measurement")
    commands.add_parser("save")
    args, more = parser.parse_known_args()
    if args.command == "shakespeare":
        shakespeare(args.path, args.long, more)
    elif args.command == "save":
        save()
    else:
        throughput(args.shapes, args.rounds, args.seconds, args.modes, args.precisions)


if __name__ == "__main__":
    main()
