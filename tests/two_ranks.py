"""Checks that need two processes, and the toy stream and losses that tests/test_train.py shares with them.

    torchrun --nproc_per_node 2 tests/two_ranks.py FOLDER     writes FOLDER/rank0.json, FOLDER/rank1.json and run folders
    torchrun --nproc_per_node 2 tests/two_ranks.py RUNS.json  runs a script ({"SFT": [...]}) with each of its lists of arguments
"""

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F

import INFER
import MODEL
import TRAIN

CONFIG = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
              max_position_embeddings=64, initializer_range=0.2, bos_token_id=0, eos_token_id=0)


# More experts than a process has tokens for in a micro-batch, and a selection bias that follows the load of all processes.
EXPERTS = dict(num_experts=30, num_experts_per_tok=2, moe_intermediate_size=16, scoring_func="sigmoid", router_bias_update_speed=0.01,
               n_shared_experts=1)


def build(**knobs) -> MODEL.Transformer:
    return MODEL.build(MODEL.ModelConfig(**{**CONFIG, **knobs}), seed=1)


def settings(**more) -> TRAIN.TrainingSection:
    """The settings of a few float32 steps that log each step."""
    quiet = dict(eval_steps=0, save_steps=0, sample_tokens=0, logging_steps=1, mixed_precision="no")
    usual = dict(epochs=None, max_steps=6, batch_size=16, max_length=32, learning_rate=3e-3, optim="adamw", warmup_steps=2)
    return TRAIN.TrainingSection(**{**quiet, **usual, **more})


def rows_of_step(step: int, count: int = 16) -> list[list[int]]:
    """Rows of 2 to 30 ids; the first half is short, so that micro-batches have very different numbers of tokens."""
    generator = torch.Generator().manual_seed(1000 + step)
    lengths = [2 + int(torch.randint(3 if i < count // 2 else 29, (1,), generator=generator)) for i in range(count)]
    return [torch.randint(1, CONFIG["vocab_size"], (length,), generator=generator).tolist() for length in lengths]


def batch_of(rows: list[list[int]]) -> dict:
    """Right-padded rows; a row of more than 8 ids also counts as a pair."""
    width = max(map(len, rows)) - 1
    ids, targets, positions = (torch.full((len(rows), width), fill) for fill in (0, -100, -1))
    for i, row in enumerate(rows):
        n = len(row) - 1
        ids[i, :n], targets[i, :n], positions[i, :n] = torch.tensor(row[:-1]), torch.tensor(row[1:]), torch.arange(n)
    pairs = torch.tensor([len(row) > 8 for row in rows])
    counts = {"tokens": int((targets != -100).sum()), "pairs": int(pairs.sum())}
    return {"input_ids": ids, "targets": targets, "positions": positions, "pairs": pairs, "counts": counts}


class Ragged:
    """The same 16 rows per step, for any division into micro-batches and processes."""

    steps_per_epoch = None

    def __init__(self, batch_size: int):
        self.batch_size, self.step, self.queue = batch_size, 0, []

    def start(self, run) -> None:
        self.run = run

    def __next__(self) -> dict:
        if not self.queue:
            rows, run = rows_of_step(self.step), self.run
            assert self.batch_size * run.grad_accum * run.world_size == len(rows)
            self.step += 1
            for micro in range(run.grad_accum):
                first = (micro * run.world_size + run.rank) * self.batch_size
                self.queue.append(batch_of(rows[first : first + self.batch_size]))
        return self.queue.pop(0)

    def state_dict(self) -> dict:
        return {"step": self.step}

    def load_state_dict(self, state: dict) -> None:
        self.step, self.queue = state["step"], []


def token_loss(model, batch: dict, totals: dict):
    out = model(batch["input_ids"], positions=batch["positions"], targets=batch["targets"])
    loss = -out.logprobs.sum() / totals["tokens"]
    return loss, {"loss": loss.detach(), "rows": torch.tensor(float(len(batch["input_ids"])))}


def two_counts_loss(model, batch: dict, totals: dict):
    """A loss with two denominators, the numbers of tokens and of pairs, as in ORPO."""
    out = model(batch["input_ids"], positions=batch["positions"], targets=batch["targets"])
    nll = -out.logprobs.sum() / totals["tokens"]
    odds = (F.softplus(-out.logprobs.sum(1) / 8) * batch["pairs"]).sum() / totals["pairs"]
    return nll + 0.5 * odds, {"loss": nll.detach(), "odds": odds.detach()}


def run(out: Path, batch_size: int, loss=two_counts_loss, resume=None, model=None, accelerator=None, evaluate=None, **more) -> list[dict]:
    """One fit on the ragged rows -> its log."""
    out.mkdir(parents=True, exist_ok=True)
    training = settings(batch_size=batch_size, **more)
    TRAIN.fit(model or build(), Ragged(batch_size), loss, training, out, MODEL.save, evaluate, resume=resume,
              accelerator=accelerator, device=torch.device("cpu"))
    return read_log(out)


def read_log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def held_out_batches() -> list[dict]:
    """Three batches, so that one process has one batch more than the other."""
    keys = ("input_ids", "targets", "positions", "counts")
    return [{**{key: batch_of(rows_of_step(100 + i, 4))[key] for key in keys}, "segment_ids": None, "weights": None} for i in range(3)]


# ------------------------------------------------------------------------------------------- the two processes


def gradient_difference(accelerator) -> float:
    """Largest difference between gradients through `targets` and through cross-entropy on logits, both under DDP."""
    wrapped, rank = accelerator.prepare(build()), TRAIN.MODEL.process_rank()
    batch = batch_of(rows_of_step(0)[8 * rank : 8 * rank + 8])
    ids, positions, targets = batch["input_ids"], batch["positions"], batch["targets"]
    (-wrapped(ids, positions=positions, targets=targets).logprobs.sum()).backward()
    ours = {name: weight.grad.clone() for name, weight in wrapped.named_parameters()}
    wrapped.zero_grad()
    logits = wrapped(ids, positions=positions).logits
    F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    assert all(weight.grad.abs().sum() > 0 for weight in wrapped.parameters())
    return max(float((ours[name] - weight.grad).abs().max()) for name, weight in wrapped.named_parameters())


def requests_of(rank: int) -> list[tuple[list[int], int]]:
    """(prompt, length of the completion): the first process has none."""
    return [([3, 5 + i, 7], 4 + 3 * i) for i in range(3 * rank)]


def sharded_completions() -> dict:
    """The completions of this process's prompts by a sharded model, and the loss of the model before and after."""
    model = TRAIN.shard(build().eval(), torch.device("cpu"))
    batch = batch_of(rows_of_step(0)[:4])
    with torch.no_grad():
        losses = [float(model(batch["input_ids"], positions=batch["positions"], targets=batch["targets"]).logprobs.sum())]
        requests = requests_of(TRAIN.MODEL.process_rank())
        samplings = [INFER.Sampling(length, temperature=0, ignore_eos=True) for _, length in requests]
        completions = INFER.generate(model, [prompt for prompt, _ in requests], samplings)
        whole = any(weight.to_local().numel() == weight.numel() for weight in model.parameters() if weight.dim() > 1)
        losses.append(float(model(batch["input_ids"], positions=batch["positions"], targets=batch["targets"]).logprobs.sum()))
    return {"completions": [completion.ids for [completion] in completions], "losses": losses, "whole": whole}


def gathered_on_first() -> tuple[list, int]:
    """Tensors of 1 to 5 rows, unevenly sharded, gathered on the first process; and the number of calls of `full_tensor`, which
    would gather them on every process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    calls, whole = [], DTensor.full_tensor
    DTensor.full_tensor = lambda tensor, **more: calls.append(1) or whole(tensor, **more)
    mesh = init_device_mesh("cpu", (2,))
    tensors = [distribute_tensor(torch.arange(3 * rows).view(rows, 3), mesh, [Shard(0)]) for rows in range(1, 6)]
    found = [MODEL.gathered_on_first(tensor).tolist() for tensor in tensors]
    DTensor.full_tensor = whole
    return found, len(calls)


def stopped_by(number: int, out: Path, accelerator):
    """The exit status of a run in which every process gets the signal, as from a terminal's Ctrl-C."""

    def loss(model, batch, totals):
        os.kill(os.getpid(), number)
        return token_loss(model, batch, totals)

    try:
        run(out, 8, loss, accelerator=accelerator)
    except SystemExit as stop:
        return stop.code


def main(folder: Path) -> None:
    TRAIN.Log.plot = lambda self: None  # drawing takes longer than these runs
    name = "cpu" if torch.cuda.is_available() else "auto"  # the default on a machine without a GPU
    accelerator, _ = TRAIN.start_processes(settings(), name, Path("."))
    results: dict = {"world_size": TRAIN.world_size()}
    options = dict(accelerator=accelerator)
    run(folder / "ddp", 8, **options)
    run(folder / "ddp-accumulated", 4, grad_accum=2, **options)
    for optim in ("adamw", "muon"):
        sharded = dict(fsdp=True, optim=optim, save_steps=3, **options)
        run(folder / f"fsdp-{optim}", 8, **sharded)
        resume = folder / f"fsdp-{optim}" / "ckpt-step-000003"
        run(folder / f"fsdp-{optim}-resumed", 8, resume=resume, model=MODEL.build(MODEL.ModelConfig(**CONFIG), seed=9), **sharded)
    run(folder / "fsdp-accumulated", 4, grad_accum=2, fsdp=True, **options)
    for name, more in (("experts-ddp", {}), ("experts-accumulated", dict(grad_accum=2)), ("experts-fsdp", dict(fsdp=True))):
        run(folder / name, 8 // more.get("grad_accum", 1), model=build(**EXPERTS), **more, **options)
    results["gradient_difference"] = gradient_difference(accelerator)
    evaluate = TRAIN.held_out_loss(held_out_batches(), 2.0)
    with torch.no_grad():
        results["held_out"] = evaluate(build().eval())
    results["sharded"], results["gathered"] = sharded_completions(), gathered_on_first()
    results["exit_status"] = stopped_by(signal.SIGINT, folder / "stopped", accelerator)
    (folder / f"rank{TRAIN.MODEL.process_rank()}.json").write_text(json.dumps(results))
    TRAIN.barrier()
    torch.distributed.destroy_process_group()


def run_all(runs: dict[str, list[list[str]]]) -> None:
    import DISTILL
    import RL
    import SFT

    TRAIN.Log.plot = SFT.Confusion.plot = RL.plot_rollouts = lambda *_: None
    for name, lists in runs.items():
        for argv in lists:
            {"SFT": SFT, "RL": RL, "DISTILL": DISTILL}[name].main(argv)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    given = Path(sys.argv[1])
    run_all(json.loads(given.read_text())) if given.suffix == ".json" else main(given)
