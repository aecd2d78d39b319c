"""TRAIN.py: the training loop, and pretraining.

Read in this order: settings, learning-rate schedule and optimizers, the pretraining loss, `fit` (the project's only training
loop) and its parts (`Trainer`). Below the banner `edges`: processes and devices, checkpoints, the log, run folders, model and
data preparation, and `run_stage`, which runs every kind of training.

    python TRAIN.py --config config.yaml                                     # a small model on the bundled dataset
    python TRAIN.py --data mine.txt --model.preset llama-1m --max-minutes 1 --out /tmp/run
    torchrun --nproc_per_node 8 TRAIN.py --config config.yaml                # or on GPUs: accelerate launch --num_processes 8
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

import INFER
import MODEL
import TOKENIZER
from MODEL import Action, OutputSection, UserError, check, gathered, knob, load_config, run_main, say

SCHEDULES = ("cosine", "linear", "constant", "warmup_stable_decay")


@dataclass
class TrainingSection:
    epochs: float | None = knob(2.5, "number of epochs; replaced by max_steps or max_minutes", above=0, often=True)
    max_steps: int | None = knob(None, "number of optimizer steps", low=1, often=True)
    max_minutes: float | None = knob(None, "wall-clock limit in minutes; the schedule adapts to it", above=0, often=True)
    batch_size: int = knob(16, "sequences per device per forward pass", low=1, often=True)
    grad_accum: int = knob(1, "forward passes per optimizer step (gradient accumulation)", low=1, often=True)
    max_length: int = knob(256, "maximum tokens per sequence; longer documents continue in the next one", low=1, often=True)
    mlm_probability: float = knob(0.15, "masked language modeling: fraction of tokens to predict", above=0, below=1)
    learning_rate: float | None = knob(None, "peak learning rate; null depends on the method and the width; 6e-3 * sqrt(128 / "
                                             "width) for fresh weights, 5e-5 for trained ones; in SFT and DISTILL "
                                             "3e-3 * (128 / width)^2, for a reward model 1/10 of this, in RL 1/30; for "
                                             "adapters ten times as much",
                                             above=0, high=100, often=True)
    optim: str = knob("auto", "optimizer: muon, adamw or adamw_8bit; auto is muon for fresh weights, adamw for trained ones; in "
                              "SFT muon up to width 256", ("auto", "muon", "adamw", "adamw_8bit"), often=True)
    weight_decay: float = knob(0.1, "decoupled weight decay on matrices", low=0, high=100)
    adam_beta1: float = knob(0.9, "AdamW: decay rate of the gradient mean", low=0, below=1)
    adam_beta2: float = knob(0.95, "AdamW: decay rate of the squared gradient mean", low=0, below=1)
    adam_epsilon: float = knob(1e-8, "AdamW: added to the denominator", above=0, high=1)
    max_grad_norm: float = knob(1.0, "gradient clipping norm; 0 is off", low=0)
    lr_scheduler_type: str = knob("warmup_stable_decay", "learning-rate schedule: cosine, linear, constant or "
                                                         "warmup_stable_decay", SCHEDULES, often=True)
    warmup_steps: float = knob(20.0, "steps of linear warmup; below 1, a fraction of all steps", low=0, often=True)
    min_lr_rate: float = knob(0.0, "final learning rate / peak learning rate", low=0, high=1)
    decay_share: float = knob(0.5, "warmup_stable_decay: fraction of the run with linear decay", low=0, high=1)
    mixed_precision: str = knob("auto", "autocast dtype (AMP): bf16, fp16 or no; weights stay float32; auto follows model.dtype "
                                        "and the device's speed", ("auto", "no", "fp16", "bf16"), often=True)
    gradient_checkpointing: bool = knob(False, "recompute activations in backward: less memory, a third slower", often=True)
    torch_compile: bool = knob(False, "compile the layers: starts about half a minute later, then runs faster", often=True)
    qat: str = knob("none", "quantization-aware training: compute with weights rounded as in QUANT.py; int8_dynamic rounds "
                            "activations as well", ("none", "int8", "int8_dynamic", "int4"), often=True)
    qat_group_size: int = knob(0, "weights per scale, as in quantization.group_size; 0 means 32", low=0, only=("qat", "int4"))
    fsdp: bool = knob(False, "with several processes: shard the model (FSDP2) instead of replicating it (DDP)", often=True)
    logging_steps: int = knob(10, "steps between lines in log.jsonl", low=1, often=True)
    eval_steps: int = knob(100, "steps between validations; 0 validates at the end only", low=0, often=True)
    eval_batches: int = knob(16, "batches per validation, spread over the held-out set", low=1)
    save_steps: int = knob(200, "steps between checkpoints; 0 saves at the end only", low=0, often=True)
    save_total_limit: int = knob(2, "number of checkpoints to keep, besides the best", low=1, often=True)
    load_best_model_at_end: bool = knob(False, "use the model of the best validation as the final one")
    early_stopping_patience: int | None = knob(None, "stop after this many validations without improvement", low=1)
    max_skipped_steps: int = knob(10, "consecutive steps with a non-finite gradient before the run stops", low=1)
    sample_prompts: list[str] | str | None = knob(None, "prompts to complete after each validation; null uses held-out documents")
    sample_tokens: int = knob(48, "tokens per sample; 0 is off", low=0)
    report_to: str = knob("none", "experiment tracker: none, tensorboard or wandb", ("none", "tensorboard", "wandb"), often=True)
    seed: int = knob(0, "random seed for initialization, data order and dropout", low=0, high=2**63 - 1, often=True)

    def __post_init__(self):
        if all(getattr(self, key) is None for key in MODEL.HORIZON):
            raise UserError("training.epochs: set one of epochs, max_steps and max_minutes")
        check(self, "training")
        self.sample_prompts = [self.sample_prompts] if isinstance(self.sample_prompts, str) else self.sample_prompts


# ------------------------------------------------------------------------------------- schedule and optimizers


def learning_rate_factor(kind: str, step: int, progress: float, warmup: float, floor=0.0, decay_share=0.5) -> float:
    """Learning rate / peak learning rate after `progress` (0 to 1) of the run. `warmup`: steps, or below 1 a fraction of it."""
    start = 1.0 if not warmup else (step + 1) / warmup if warmup >= 1 else progress / warmup + 1e-3
    if start < 1:
        return start
    if kind in ("cosine", "linear"):  # the decay starts after the warmup
        fraction = warmup if warmup < 1 else warmup * progress / max(step, 1)
        progress = max(0.0, (progress - fraction) / (1 - fraction)) if fraction < 1 else 1.0
    if kind == "cosine":
        return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2
    if kind == "linear":
        return floor + (1 - floor) * (1 - progress)
    if kind == "warmup_stable_decay" and progress > 1 - decay_share:
        return floor + (1 - floor) * (1 - progress) / decay_share
    return 1.0


def orthogonalized(matrix: Tensor, steps: int = 5) -> Tensor:
    """Approximate U V^T of a matrix (A, B) = U S V^T by a Newton-Schulz iteration, whose polynomial moves all singular values to
    between 0.7 and 1.2 (Jordan 2024). It computes in bfloat16 on CUDA, elsewhere in float32, since some CPUs emulate bfloat16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.to(torch.bfloat16 if matrix.device.type == "cuda" else torch.float32)
    x = x.T if x.shape[0] > x.shape[1] else x  # for the smaller of the two Gram matrices
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Muon: the update is the orthogonalized momentum (Jordan 2024), scaled to the RMS of AdamW's updates, so that both use the
    same learning rate (Liu 2025). Sharded updates are gathered first; each process keeps its shard of the result."""

    def __init__(self, weights: list[Tensor], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(weights, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in (weight for weight in group["params"] if weight.grad is not None):
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                average = state["momentum_buffer"].lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalized(gathered(weight.grad.lerp(average, group["momentum"])))  # Nesterov's momentum
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                scale = 0.2 * math.sqrt(max(weight.shape))
                weight.add_(shard_like(update.to(weight.dtype), weight), alpha=-scale * group["lr"])


def make_optimizers(model: nn.Module, training: TrainingSection) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the matrices of the layers and AdamW for the rest. Norms and biases have no weight decay."""
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    if not named:
        raise UserError("nothing to train: all weights are frozen")
    optimizers: list[torch.optim.Optimizer] = []
    if training.optim == "muon":
        # Stacked experts and routers use AdamW: an orthogonal update would change the scores of all experts equally.
        inside = {id(weight) for layer in MODEL.layers_of(model) for weight in layer.parameters()}
        matrices = [(name, weight) for name, weight in named
                    if weight.dim() == 2 and id(weight) in inside and not name.endswith("mlp.gate.weight")]
        if matrices:
            optimizers.append(Muon([w for _, w in matrices], training.learning_rate, training.weight_decay))
            with_muon = {name for name, _ in matrices}
            named = [(name, weight) for name, weight in named if name not in with_muon]
    rates = getattr(model, "rates", {})
    by_kind: dict[tuple, list] = {}
    for name, weight in named:
        rate = next((rate for part, rate in rates.items() if part in name), 1.0)
        by_kind.setdefault((training.weight_decay if weight.dim() >= 2 else 0.0, rate), []).append(weight)
    groups = [{"params": weights, "weight_decay": decay, "rate": rate, "lr": rate * training.learning_rate}
              for (decay, rate), weights in sorted(by_kind.items(), key=lambda kind: (-kind[0][0], kind[0][1]))]
    options = dict(lr=training.learning_rate, betas=(training.adam_beta1, training.adam_beta2), eps=training.adam_epsilon)
    if training.optim == "adamw_8bit":
        optimizers.append(MODEL.library("bitsandbytes", "training.optim: adamw_8bit needs").optim.AdamW8bit(groups, **options))
    elif groups:
        optimizers.append(torch.optim.AdamW(groups, **options, fused=True))
    return optimizers


def choose_rate(training: TrainingSection, model: nn.Module, fresh: bool, share: float | None = None) -> None:
    """Set the learning rate if it is null, and the optimizer if it is auto. The rate is high for fresh weights, lower for wide
    models, and low for further pretraining. `share` is the fraction of the fine-tuning rate that a stage uses, 1 in SFT. Muon
    converges faster, but amplifies the noise of rollouts as much as their signal."""
    adapter, width = getattr(model, "adapter", None), getattr(getattr(model, "config", None), "hidden_size", 512)
    if fresh:
        rate, optim = 6e-3 * math.sqrt(128 / width), "muon"
    elif share is None:
        rate, optim = 5e-5, "adamw"
    else:
        rate, optim = share * min(3e-3, max(1e-5, 3e-3 * (128 / width) ** 2)), "muon" if width <= 256 and share == 1 else "adamw"
    if adapter:
        # A step of Adam changes each entry of B by about the rate, and so W by rate * scaling * r. The factor scaling * r is
        # alpha (in rsLoRA alpha * sqrt(r)), and LoRA+ multiplies the rate of B. If this factor exceeds the 16 of the default
        # adapter, the rate is divided by the square root of their ratio.
        scaling = adapter.lora_alpha / (math.sqrt(adapter.r) if adapter.use_rslora else adapter.r)
        ratio = max(getattr(model, "rates", {}).values(), default=1.0)
        rate, optim = min(1e-2, 10 * rate) / math.sqrt(max(1.0, scaling * adapter.r / 16) * ratio), "adamw"
    training.learning_rate = training.learning_rate or rate
    training.optim = optim if training.optim == "auto" else training.optim


# ------------------------------------------------------------------------------------------------- pretraining


def token_loss(model, batch: dict, totals: dict) -> tuple[Tensor, dict]:
    """Mean cross-entropy of the (weighted) target tokens of the whole optimizer step, in nats."""
    out = model(batch["input_ids"], positions=batch["positions"], segment_ids=batch["segment_ids"], targets=batch["targets"])
    logprobs = out.logprobs if batch["weights"] is None else out.logprobs * batch["weights"]
    loss = -logprobs.sum() / totals["tokens"]
    return loss + out.aux_loss / totals["micro_batches"], {"loss": loss.detach()}


def mask_tokens(batch: dict, tokenizer, keys: list[tuple], probability: float) -> dict:
    """Mask a batch for masked language modeling (Devlin 2018, section 3.1). The fraction `probability` of the tokens is
    predicted: 80% of them are replaced by the mask token, 10% by a random token, and 10% are unchanged, so that any token may
    have to be predicted. The random numbers of row i are seeded with keys[i]."""
    ids = batch["input_ids"]
    real = torch.ones_like(ids, dtype=torch.bool) if batch["positions"] is None else batch["positions"] >= 0
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    draws = torch.from_numpy(np.stack([np.random.default_rng(key).random((3, ids.shape[1])) for key in keys], 1))  # (3, B, T)
    chosen = real & ~special & (draws[0] < probability)
    masked = torch.where(draws[1] < 0.8, tokenizer.mask_token_id,
                         torch.where(draws[1] < 0.9, (draws[2] * len(tokenizer)).long(), ids))
    return {**batch, "input_ids": torch.where(chosen, masked, ids), "targets": ids.masked_fill(~chosen, -100),
            "counts": {"tokens": int(chosen.sum()), "read": int(real.sum())}}


# ------------------------------------------------------------------------------------------- the training loop


class LossScale:
    """Dynamic loss scaling against underflow of float16 gradients (Micikevicius 2018, section 3.2). The loss is multiplied by
    `scale`, which is halved on overflow and doubled after 2000 finite steps. With other dtypes it is 1."""

    def __init__(self, on: bool):
        self.on, self.scale, self.good = on, 65536.0 if on else 1.0, 0

    def update(self, finite: bool) -> None:
        if not self.on:
            return
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self.good % 2000 == 0:
            self.scale *= 2


class Result(NamedTuple):
    before: dict  # held-out measures
    after: dict
    steps: int
    seconds: float
    peak_memory_bytes: int


@dataclass
class State:
    """The progress of a run; checkpoints also contain the weights, optimizers, position in the data and random states."""

    step: int = 0
    tokens: int = 0  # training tokens processed
    seconds: float = 0.0  # training time before the checkpoint that this process resumed from
    before: dict = field(default_factory=dict)  # held-out measures before the first step
    measured: tuple | None = None  # (step, held-out measures) of the last validation
    best: tuple | None = None  # (order, step, held-out measures) of the best validation
    since_best: int = 0  # validations since the best one
    first_loss: float | None = None  # training loss of the first log line
    skipped: int = 0  # steps without an update, because of a non-finite loss or gradient
    skipped_in_row: int = 0
    loss_scale: tuple = ()  # see LossScale
    log: dict = field(default_factory=dict)  # sums of the metrics since the last log line


def fit(model: nn.Module, stream, loss_fn: Callable, training: TrainingSection, out: str | Path, save: Callable,
        evaluate: Callable | None = None, *, resume: Path | None = None, stage: str = "train", mixed: str | None = None,
        accelerator=None, device: torch.device | None = None, overwrite: bool = False, sources: dict | None = None) -> Result:
    """Train `model` on `stream` for the steps, epochs or minutes in `training`: the project's only training loop.

    stream: start(run), next(), state_dict(), load_state_dict(), steps_per_epoch, optionally metrics().
    loss_fn(model, batch, totals) -> (loss, metrics): a sum divided by totals[...], the counts of the whole optimizer step over
    micro-batches and processes. So 16 rows, 4 x 4 accumulated rows and 2 processes x 8 rows give the same gradient; with a mean
    per micro-batch, tokens in short batches would count more.
    save(model, folder) writes the model. evaluate(model) -> {measure: value}: the first measure decides which model is best.
    `resume` is a checkpoint folder. `overwrite` removes an earlier run from `out` after the first validation of the new one.
    `sources`: {setting: folder} of other models that the run needs; a resume fails if their weights have changed.
    """
    trainer = Trainer(model, stream, loss_fn, training, Path(out), save, evaluate, stage, mixed, accelerator, device, sources)
    state, run, log = trainer.state, trainer.run, trainer.log
    with trainer.guarded():
        trainer.start(resume)
        if overwrite:
            clear_run(trainer.out)
        if not state.step:
            trainer.log_measures(state.before)
        while not trainer.finished():
            with trainer.saved_on_error():
                batches = [next(stream) for _ in range(training.grad_accum)]
            totals = trainer.totals_of(batches)

            metrics: dict[str, Tensor] = defaultdict(float)
            for i, batch in enumerate(batches):
                batch = on_device(batch, trainer.device)
                with trainer.synced_gradients(last=i == len(batches) - 1):
                    with run.autocast():
                        loss, values = loss_fn(trainer.wrapped, batch, totals)
                    # Undo the averaging of DDP and FSDP2: the loss is already divided by the counts of all processes.
                    (loss * (run.world_size * trainer.loss_scale.scale)).backward()
                for name, value in values.items():
                    metrics[name] += value.detach()

            gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
            norm = float(gathered(nn.utils.get_total_norm(gradients))) / trainer.loss_scale.scale
            if trainer.is_finite(norm, metrics):
                clip = min(1.0, training.max_grad_norm / (norm + 1e-6)) if training.max_grad_norm else 1.0
                if clip / trainer.loss_scale.scale != 1.0:
                    for gradient in gradients:
                        gradient.mul_(clip / trainer.loss_scale.scale)
                factor = learning_rate_factor(training.lr_scheduler_type, state.step, min(trainer.progress, 1.0), trainer.warmup,
                                              training.min_lr_rate, training.decay_share)
                for optimizer in trainer.optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = group["peak_lr"] * factor
                    optimizer.step()
                log.add(metrics, norm, training.learning_rate * factor)
            for weight in model.parameters():
                weight.grad = None
            trainer.count(totals)

            done = state.step == trainer.total_steps
            if state.step % training.logging_steps == 0 or done:
                trainer.write_log()
            if training.eval_steps and state.step % training.eval_steps == 0 and not done:
                trainer.validate()
            if training.save_steps and state.step % training.save_steps == 0 and not done:
                trainer.checkpoint()
        return trainer.finish()


class Trainer:
    """The parts of `fit`, in the order in which the loop uses them."""

    def __init__(self, model, stream, loss_fn, training, out, save, evaluate, stage, mixed, accelerator, device, sources):
        self.model, self.stream, self.loss_fn, self.training = model, stream, loss_fn, training
        self.out, self.save, self.evaluate, self.stage, self.accelerator = out, save, evaluate, stage, accelerator
        choose_rate(training, model, fresh=True)
        self.device = device or (accelerator.device if accelerator else MODEL.choose_device())
        self.mixed = mixed or precision(training, "auto", self.device)
        self.run = Run(model, training, self.device, self.mixed)
        self.main = self.run.rank == 0
        self.state, self.loss_scale = self.run.state, LossScale(self.mixed == "fp16")
        self.sources = {key: [str(folder), MODEL.weights_fingerprint(folder, key)] for key, folder in (sources or {}).items()}
        self.computed = 0.0  # FLOPs since the start of this process
        self.routers: dict = {}  # load of the experts in the last step
        self.last_loss: float | None = None  # training loss of the last log line
        self.stop_signal = 0
        self.last_saved: Path | None = None
        self.outdated: list[Path] = []  # checkpoints after the resumed step; the next save removes them
        Path(out).mkdir(parents=True, exist_ok=True)
        self.log = Log(out, self.main, accelerator)

    # -- before the first step

    def start(self, resume: Path | None) -> None:
        training = self.training
        torch.manual_seed(training.seed + self.run.rank)
        if training.torch_compile and self.device.type == "cpu":
            torch.use_deterministic_algorithms(True, warn_only=True)  # compiled runs are not reproducible otherwise
        saved = restore_weights(self.model, resume) if resume else None
        self.model.to(self.device)
        MODEL.set_checkpointing(self.model, training.gradient_checkpointing)
        self.wrapped = self._wrap()
        self.optimizers = make_optimizers(self.model, training)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["peak_lr"] = group["lr"]
        self.stream.start(self.run)
        if saved:
            restore(self, saved)
            self.last_saved = resume
            self.outdated = [path for path in checkpoints(self.out) if step_of(path) > self.state.step]
            if self.outdated:
                self.log.say(f"the next checkpoint replaces {', '.join(map(str, self.outdated))}")
        self.total_steps = self.run.total_steps = self._total_steps()
        self.warmup = self._warmup()
        if self.total_steps is not None and self.state.step >= self.total_steps:
            self.log.say(f"nothing to train: the run has {self.total_steps} steps, the checkpoint is of step {self.state.step}")
        epochs = self.total_steps / self.stream.steps_per_epoch if self.total_steps and self.stream.steps_per_epoch else 0
        if training.max_steps and epochs > 20:
            self.log.say(f"training.max_steps: {self.total_steps} steps are {epochs:.0f} epochs of the data, in which a model "
                         "can overfit and forget; --epochs 10 trains less")
        self.flops, self.head_flops = self._flops_per_token()
        self.started = time.perf_counter()
        if not self.state.before:
            self.state.before = self._evaluate()
            self.log.idle = time.perf_counter() - self.started
        self.model.train()

    def _wrap(self) -> nn.Module:
        if self.training.torch_compile:
            compile_model(self.model)
        if self.training.fsdp:
            return shard(self.model, self.device)
        if world_size() == 1:
            return self.model
        wrapped = self.accelerator.prepare(self.model)
        assert isinstance(wrapped, nn.parallel.DistributedDataParallel), "gradients would not be reduced over the processes"
        return wrapped

    def _total_steps(self) -> int | None:
        training = self.training
        if training.max_steps is not None or training.max_minutes is not None:
            return training.max_steps
        if self.stream.steps_per_epoch is None:
            raise UserError("training.epochs: this stream has no known length; set training.max_steps or max_minutes")
        return max(1, math.ceil(training.epochs * self.stream.steps_per_epoch - 1e-9))

    def _warmup(self) -> float:
        """The warmup in steps or as a fraction; a quarter of a run that is shorter than twice the warmup."""
        steps, total = self.training.warmup_steps, self.total_steps
        if not total or steps < 1 or 2 * steps <= total:
            return steps
        self.log.say(f"training.warmup_steps: {steps:g} is more than half of the run's {MODEL.counted(total, 'step')}; using "
                     f"{max(1, total // 4)}. A higher --epochs or a lower --batch-size trains longer")
        return float(max(1, total // 4))

    def _flops_per_token(self) -> tuple[float, float]:
        """Training FLOPs per token: all but the language-model head, and this head alone, which is computed for targets only."""
        config, context = getattr(self.model, "config", None), self.training.max_length // 2
        if not isinstance(config, MODEL.ModelConfig):
            return 0.0, 0.0
        body, whole = (3 * MODEL.flops_per_token(config, context, head) for head in ((), "lm"))
        return body, (whole - body) * ("lm" in self.model.heads)

    # -- one optimizer step

    def elapsed(self) -> float:
        return self.state.seconds + time.perf_counter() - self.started

    def finished(self) -> bool:
        """Whether the run is over. All processes use the first one's clock, and a signal to any process stops all."""
        clock = self.elapsed() if self.main else 0.0
        clock, stop = all_sum([clock, float(bool(self.stop_signal))], self.device)
        if stop:
            self.interrupt()
        if self.total_steps is not None:
            self.progress = self.state.step / self.total_steps
        else:
            self.progress = clock / (60 * self.training.max_minutes)
        patience = self.training.early_stopping_patience
        return self.progress >= 1 or (patience is not None and self.state.since_best >= patience)

    @contextlib.contextmanager
    def saved_on_error(self):
        """Save a checkpoint if the block raises a UserError: a reward function may fail after hours of training."""
        try:
            yield
        except UserError as error:
            if self.state.step == 0:
                raise
            self.checkpoint()
            if not self.main:
                raise SystemExit(2) from None  # only the first process prints the error
            raise UserError(f"{error}; continue with --resume auto ({self.last_saved} is saved)") from error.__cause__

    def totals_of(self, batches: list[dict]) -> dict[str, float]:
        """The counts of this step's micro-batches, summed over all processes."""
        names = sorted(batches[0]["counts"])
        sums = all_sum([sum(batch["counts"][name] for batch in batches) for name in names], self.device)
        totals = {name: value or 1 for name, value in zip(names, sums, strict=True)}  # a step without targets has a loss of 0
        return {**totals, "micro_batches": len(batches) * self.run.world_size}

    @contextlib.contextmanager
    def synced_gradients(self, last: bool):
        """Reduce gradients across processes only once per step, with the last micro-batch."""
        if self.training.fsdp:
            self.wrapped.set_requires_gradient_sync(last)
            yield
        elif self.run.world_size > 1 and not last:
            with self.wrapped.no_sync():
                yield
        else:
            yield

    def is_finite(self, norm: float, metrics: dict[str, Tensor]) -> bool:
        """Whether loss and gradients are finite on all processes; otherwise the step is skipped, which is counted here."""
        state, scale = self.state, self.loss_scale
        loss_finite = all(bool(torch.isfinite(value).all()) for value in metrics.values())
        loss_finite = all_sum([float(not loss_finite)], self.device)[0] == 0
        finite = math.isfinite(norm) and loss_finite
        backing_off = scale.on and loss_finite and scale.scale > 1  # the first float16 steps usually overflow
        scale.update(finite)
        if finite:
            state.skipped_in_row = 0
        elif not backing_off:
            state.skipped += 1
            state.skipped_in_row += 1
            if state.skipped_in_row >= self.training.max_skipped_steps:
                self._fail_non_finite(f"{state.skipped_in_row} steps in a row")
        return finite

    def _fail_non_finite(self, which: str) -> None:
        good = f"the last good checkpoint is {self.last_saved}" if self.last_saved else "no checkpoint was written yet"
        raise UserError(f"{which} had a non-finite loss or gradient (up to step {self.state.step + 1}); {good}. "
                        "Lower training.learning_rate, or check the data")

    def count(self, totals: dict[str, float]) -> None:
        if hasattr(self.model, "after_step"):
            self.routers = self.model.after_step()
        read = totals.get("read", totals.get("tokens", 0))  # more than the targets if the loss skips tokens
        self.state.step += 1
        self.state.tokens += read
        self.computed += self.flops * read + self.head_flops * totals.get("targets", totals.get("tokens", 0))

    # -- between steps

    def write_log(self) -> None:
        state = self.state
        extra = self.stream.metrics() if hasattr(self.stream, "metrics") else {}
        record = {"step": state.step, **self.log.means(self.device), **extra, **(self.routers or {}), "tokens": state.tokens,
                  "seconds": round(self.elapsed(), 3)}
        if state.first_loss is None:
            state.first_loss = record.get("loss")
        self.last_loss = record.get("loss")
        if self.stream.steps_per_epoch:
            record["epoch"] = round(state.step / self.stream.steps_per_epoch, 4)
        if state.skipped:
            record["skipped_steps"] = state.skipped
        speed, flops = self.log.rates(state.tokens, self.computed)
        record["tokens_per_second"] = round(speed, 1)
        if self.flops:
            dtype = MODEL.AUTOCAST.get(self.mixed, torch.float32)
            peak = MODEL.matmul_flops(dtype, self.device.type)
            if flops > peak * self.run.world_size:  # the peak was measured while other programs were running
                MODEL.matmul_flops.cache_clear()
                peak = max(peak, MODEL.matmul_flops(dtype, self.device.type))
            record["mfu"] = round(flops / (peak * self.run.world_size), 4)
        self.log.write(record)
        share = state.step / self.total_steps if self.total_steps else record["seconds"] / (60 * self.training.max_minutes)
        self.log.show(record, self.total_steps, min(share, 1.0), peak_memory(self.device))

    def _evaluate(self) -> dict:
        if self.evaluate is None:
            return {}
        self.log.close()  # `evaluate` may print samples
        self.model.eval()
        with torch.no_grad(), self.run.autocast():
            measures = {name: without_noise(name, float(value)) for name, value in self.evaluate(self.model).items()}
        self.model.train()
        self.log.pause()
        return measures

    def validate(self) -> dict:
        state = self.state
        if state.measured and state.measured[0] == state.step:
            return state.measured[1]
        with self.saved_on_error():
            measures = self._evaluate()
        state.measured = (state.step, measures)
        if not measures:
            return measures
        name, value = next(iter(measures.items()))
        # If the first measure is equal (for example, all pairs are ranked correctly), the loss decides.
        order = (-value if lower_is_better(name) else round(value, 6), -measures.get("loss", 0.0))
        better = state.best is None or order > state.best[0]
        state.since_best = 0 if better else state.since_best + 1
        if better:
            state.best = (order, state.step, measures)
        self.log_measures(measures)
        if better and self.training.load_best_model_at_end:
            self.checkpoint()
        return measures

    def log_measures(self, measures: dict) -> None:
        if measures:
            self.log.write({"step": self.state.step, **{f"eval_{k}": v for k, v in measures.items()}})
            self.log.say(f"step {self.state.step}: held-out " + ", ".join(f"{k} {v:.4g}" for k, v in measures.items()))

    def checkpoint(self) -> None:
        """Write ckpt-step-N atomically: to a folder with a temporary name, flushed to disk, then renamed."""
        final = self.out / f"ckpt-step-{self.state.step:06d}"
        if self.last_saved == final:
            return
        content = content_of(self)
        scratch = self.out / f".tmp-{final.name}"
        if self.main:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
        self.save(self.model, scratch)
        if self.main:
            torch.save(content, scratch / STATE_FILE)
            MODEL.write_checksums(scratch, scratch.iterdir())
            for path in scratch.iterdir():
                MODEL.sync(path)
            for path in (*self.outdated, final):
                remove(path)
            self.outdated = []
            os.replace(scratch, final)
            MODEL.sync(self.out)
            self.log.plot()
        self.last_saved = final
        if self.main:
            keep = checkpoints(self.out)[-self.training.save_total_limit :]
            if self.state.best and self.training.load_best_model_at_end:
                keep.append(self.out / f"ckpt-step-{self.state.best[1]:06d}")
            for path in checkpoints(self.out):
                if path not in keep:
                    remove(path)
        barrier()

    # -- the end

    def interrupt(self) -> None:
        self.checkpoint()
        self.log.say(f"stopped at step {self.state.step}; continue with --resume auto ({self.last_saved})")
        raise SystemExit(128 + (self.stop_signal or signal.SIGTERM))

    def finish(self) -> Result:
        """Validate, write the last checkpoint, and save the model in `out`."""
        state = self.state
        if state.skipped and state.skipped == state.step:
            self._fail_non_finite("all steps")
        if self.log.counts:  # the run ended early
            self.write_log()
        after = self.validate()
        self.checkpoint()
        self.save(self.model, self.out)
        if self.training.load_best_model_at_end and state.best and state.best[1] != state.step:
            after = keep_best(self, after)
        result = Result(state.before, after, state.step, round(self.elapsed(), 2), peak_memory(self.device))
        if self.main:
            MODEL.write_text(self.out / "result.json", json.dumps({
                "stage": self.stage, "measure": next(iter(after), None), "before": state.before, "after": after,
                "steps": state.step, "seconds": result.seconds, "peak_memory_bytes": result.peak_memory_bytes}, indent=1) + "\n")
            self.log.plot()
        for name in after.keys() & state.before.keys() & set(SHARES):
            if after[name] <= state.before[name] - 0.1:
                self.log.say(f"warning: held-out {name} fell from {100 * state.before[name]:.1f}% to {100 * after[name]:.1f}%; "
                             "use a lower training.learning_rate or training.max_steps")
        barrier()
        check_sound(self, after)
        return result

    @contextlib.contextmanager
    def guarded(self):
        """Ctrl-C and SIGTERM end the run after the current step (a second Ctrl-C immediately). A full disk and a lack of memory
        are reported in one line; a full disk damages no file but the one being written."""

        def request_stop(number, frame):
            if self.stop_signal and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.stop_signal = number
            if number == signal.SIGINT and self.main and not MODEL.QUIET:  # `print` could be interrupted by itself
                os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C again stops at once, without one\n")

        previous = {}
        with contextlib.suppress(ValueError):  # only the main thread can handle signals
            previous = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        except (OSError, MemoryError, RuntimeError, SafetensorError) as error:
            explain(self, error)
            raise
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            self.log.close()


# ======================================================================================================== edges

# --------------------------------------------------------------------------------------- processes and devices


def world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_available() and torch.distributed.is_initialized() else 1


def all_sum(values: list[float], device) -> list[float]:
    """Sums over all processes, in float64 if the device supports it."""
    if world_size() == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float32 if str(device).startswith("mps") else torch.float64, device=device)
    torch.distributed.all_reduce(tensor)
    return tensor.tolist()


def from_all(value) -> list:
    """The values of all processes, in the order of their ranks."""
    if world_size() == 1:
        return [value]
    values: list = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def from_first(value):
    """The value of the first process, on all processes."""
    if world_size() > 1:
        box = [value]
        torch.distributed.broadcast_object_list(box)
        [value] = box
    return value


def barrier() -> None:
    if world_size() > 1:
        torch.distributed.barrier()


@functools.cache
def patient_group():
    """A process group with a long timeout: the first process may tokenize for hours, but default barriers time out in minutes."""
    return torch.distributed.new_group(backend="gloo", timeout=timedelta(days=30))


def first_alone(function: Callable, *arguments, folder: str | None = None):
    """Call function(*arguments), which writes files, in the first process, then in the others. `folder` is locked meanwhile."""
    first = MODEL.process_rank() == 0
    wait = partial(torch.distributed.barrier, patient_group()) if world_size() > 1 else lambda: None
    with locked(Path(folder) / ".lock", "data.dir", wait=True) if first and folder else contextlib.nullcontext():
        if not first:
            wait()
        value = function(*arguments)
        if first:
            wait()
        wait()
    return value


class Run:
    """Information for streams and losses: the model, the process and the progress of the run."""

    def __init__(self, model: nn.Module, training: TrainingSection, device: torch.device, mixed: str):
        self.model, self.device, self.mixed = model, device, mixed
        self.rank, self.world_size = MODEL.process_rank(), world_size()
        self.seed, self.grad_accum = training.seed, training.grad_accum
        self.static_shapes = training.torch_compile
        self.state, self.total_steps = State(), None  # set by `fit`; None: the run has a time limit

    def autocast(self):
        dtype = MODEL.AUTOCAST.get(self.mixed)
        return torch.autocast(self.device.type, dtype) if dtype else contextlib.nullcontext()


def on_device(batch: dict, device) -> dict:
    return {name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value for name, value in batch.items()}


def precision(training: TrainingSection, dtype: str, device: torch.device) -> str:
    """The autocast dtype (bf16, fp16 or no): training.mixed_precision, if auto model.dtype, if also auto the fastest."""
    mixed = training.mixed_precision
    if mixed == "auto":
        half = MODEL.fast_half(device.type) if dtype == "auto" else MODEL.DTYPES[dtype]
        mixed = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(half, "no")
    if mixed == "fp16" and device.type == "cpu":
        mixed = "bf16" if MODEL.fast_half("cpu") else "no"
        say(f"training.mixed_precision: float16 on a CPU is slow and overflows; using {mixed.replace('no', 'float32')}")
    return mixed


def start_processes(training: TrainingSection, device_name: str, out: Path):
    """(accelerator or None, device). Only several processes and trackers need accelerate."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if not several and os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_PORT" in os.environ:
        say("accelerate launch starts a single process on CPUs; for several use torchrun --nproc_per_node 2 TRAIN.py ...")
    if training.fsdp and not several:
        raise UserError("training.fsdp: needs several processes (torchrun --nproc_per_node 2 TRAIN.py ...)")
    if not several and training.report_to == "none":
        return None, MODEL.choose_device(device_name)
    need = "several processes need" if several else f"training.report_to: {training.report_to} needs"
    accelerate = MODEL.library("accelerate", need)
    try:
        log_with = None if training.report_to == "none" else training.report_to
        # Without cpu=True, accelerate does not wrap the model of CPU processes, and each process would train alone.
        cpu = MODEL.choose_device(device_name).type == "cpu" or None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a missing tracker, which is an error below
            accelerator = accelerate.Accelerator(mixed_precision="no", cpu=cpu, log_with=log_with, project_dir=out)
    except (ImportError, ValueError) as error:
        raise UserError(f"training.report_to: {training.report_to} cannot be used ({error})") from None
    if log_with and not accelerator.log_with:
        raise UserError(f"training.report_to: {log_with} needs `pip install {log_with}`")
    if device_name not in ("auto", "cpu") and not several:
        return accelerator, MODEL.choose_device(device_name)
    return accelerator, accelerator.device


def compile_model(model: nn.Module) -> None:
    """Compile each layer. Layers share the compiled code, so a deep model compiles as fast as a shallow one."""
    for layer in MODEL.layers_of(model):
        layer.compile()


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """Shard with FSDP2: each layer gathers its weights when it runs and frees them afterwards; the root has all others."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # Log-probabilities are a view of the chunks that they are computed in; losses do not change them in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (world_size(),))
    for layer in MODEL.layers_of(model):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def shard_like(tensor: Tensor, weight: Tensor) -> Tensor:
    """Shard a full tensor like `weight`. Scalars, and the tensors of unsharded weights, are returned unchanged."""
    if not hasattr(weight, "full_tensor") or tensor.shape != weight.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(weight.device), weight.device_mesh, weight.placements)


# ------------------------------------------------------------------------------------------------- checkpoints


STATE_FILE = "trainer_state.pt"
SHARES = ("accuracy", "exact_match", "kept", "f1_binary", "f1_macro", "rewards/accuracies")  # held-out measures from 0 to 1


def is_whole(model: nn.Module) -> bool:
    """Whether the saved model contains all of its weights, unlike adapters and models of transformers."""
    return isinstance(model, MODEL.Transformer) and not model.adapter


def lower_is_better(measure: str) -> bool:
    return any(word in measure for word in ("loss", "perplexity", "error", "bits", "nats", "divergence"))


def content_of(trainer: Trainer) -> dict:
    """What an exact resume needs in addition to the saved model. Only the first process keeps full tensors."""
    random = {"cpu": torch.get_rng_state()}
    if trainer.device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(trainer.device)
    seconds = all_sum([trainer.elapsed() if trainer.main else 0.0], trainer.device)[0]
    state = replace(trainer.state, seconds=seconds, log=trainer.log.state(trainer.device),
                    loss_scale=(trainer.loss_scale.scale, trainer.loss_scale.good))
    content = {**vars(state), "random": from_all(random), "stream": trainer.stream.state_dict(), "sources": trainer.sources,
               "optimizers": [map_tensors(MODEL.gathered_on_first, optimizer.state_dict()) for optimizer in trainer.optimizers]}
    # Trained weights that the saved model lacks or has in another form: adapters, heads of a transformers model, a critic.
    trained = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    if is_whole(trainer.model):
        trained = {name for name in trained if MODEL.is_tool(name)}
    if trained:
        content["module"] = {k: MODEL.gathered_on_first(v) for k, v in trainer.model.state_dict().items() if k in trained}
    return content


def restore(trainer: Trainer, saved: dict) -> None:
    """Restore the state in a checkpoint. Nothing on disk changes, so that a failed resume has no effect."""
    for key, (folder, fingerprint) in trainer.sources.items():
        if fingerprint != saved["sources"].get(key, [folder, fingerprint])[1]:
            raise UserError(f"{key}: {folder} changed since the checkpoint was written; restore its weights or use another --out")
    for name in vars(trainer.state):
        setattr(trainer.state, name, saved[name])
    trainer.loss_scale.scale, trainer.loss_scale.good = trainer.state.loss_scale
    trainer.log.load(trainer.state.log, trainer.state.step)
    trainer.log.rates(trainer.state.tokens, trainer.computed)  # speeds are measured from here
    if len(saved["optimizers"]) != len(trainer.optimizers):
        raise UserError("--resume: the checkpoint was made with another training.optim")
    for optimizer, content in zip(trainer.optimizers, saved["optimizers"], strict=True):
        weights = [w for group in optimizer.param_groups for w in group["params"]]
        content["state"] = {i: {k: shard_like(v, weights[i]) if isinstance(v, Tensor) else v for k, v in values.items()}
                            for i, values in content["state"].items()}
        try:
            optimizer.load_state_dict(content)
        except ValueError as error:
            raise UserError(f"--resume: the checkpoint's optimizer state does not match ({error})") from None
        for group in optimizer.param_groups:
            group["peak_lr"] = trainer.training.learning_rate * group.get("rate", 1.0)
    try:
        trainer.stream.load_state_dict(saved["stream"])
    except KeyError:
        raise UserError("--resume: the checkpoint was made by another method; its position in the data does not match") from None
    if len(saved["random"]) == world_size():
        random = saved["random"][trainer.run.rank]
        torch.set_rng_state(random["cpu"])
        if "cuda" in random and trainer.device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"], trainer.device)
    else:
        say(f"the number of processes changed from {len(saved['random'])} to {world_size()}: dropout uses new random numbers")


def keep_best(trainer: Trainer, last: dict) -> dict:
    """Replace the saved model by that of the best checkpoint -> its held-out measures."""
    _, step, measures = trainer.state.best
    folder = trainer.out / f"ckpt-step-{step:06d}"
    if not folder.exists():
        trainer.log.say(f"{folder}, the checkpoint of the best model, is missing; keeping the last model")
        return last
    if trainer.main:
        with MODEL.staged(trainer.out, "config.json", MODEL.WEIGHTS) as scratch:
            for path in folder.iterdir():
                if path.name not in (STATE_FILE, MODEL.CHECKSUMS):
                    shutil.copy2(path, scratch)
    trainer.log.say(f"saved the best model, from step {step}")
    return measures


def check_sound(trainer: Trainer, after: dict) -> None:
    """End a diverged run with exit status 1: its loss rose by a nat per token or more, a factor of e in perplexity."""
    state, name = trainer.state, next(iter(after), "")
    losses = "training loss", state.first_loss, trainer.last_loss
    if "perplexity" in after:
        losses = "held-out loss", state.before.get("loss"), after["loss"]
        if not lower_is_better(name) and after[name] > state.before.get(name, math.inf):
            return
    elif after or trainer.loss_fn is not token_loss:
        return
    what, first, last = losses
    if first is None or last is None or last < first + 1:
        return
    trainer.log.say(f"error: the run diverged: {what} went from {first:.4g} to {last:.4g}. The model in {trainer.out} is "
                    f"unusable; lower training.learning_rate (now {trainer.training.learning_rate:.2g}) and use --overwrite")
    raise SystemExit(1)


def explain(trainer: Trainer, error: Exception) -> None:
    """Raise a UserError if memory or disk space ran out."""
    t = trainer.training
    if is_out_of_memory(error):
        raise UserError(f"out of memory with training.batch_size {t.batch_size} x max_length {t.max_length}: lower one of them "
                        "(and raise grad_accum), or set training.gradient_checkpointing true") from None
    if MODEL.is_disk_full(error, trainer.out):
        for scratch in trainer.out.glob(".tmp-*"):
            shutil.rmtree(scratch, ignore_errors=True)
        last = f"the last complete checkpoint is {trainer.last_saved}" if trainer.last_saved else "no checkpoint was written yet"
        raise UserError(f"{trainer.out}: the disk is full at step {trainer.state.step}; {last}. Free some space and use "
                        "--resume auto") from None


def is_out_of_memory(error: Exception) -> bool:
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or "DefaultCPUAllocator" in str(error) or "not enough memory" in str(error)


def map_tensors(function: Callable, tree):
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: map_tensors(function, value) for key, value in tree.items()}
    return [map_tensors(function, value) for value in tree] if isinstance(tree, (list, tuple)) else tree


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints(out: Path) -> list[Path]:
    """Complete checkpoints, oldest first; incomplete ones have temporary names."""
    return sorted((p for p in out.glob("ckpt-step-*") if p.is_dir()), key=step_of)


def remove(checkpoint: Path) -> None:
    """Rename a checkpoint, then delete it: if a kill interrupts this, what remains does not look like a checkpoint."""
    if checkpoint.exists():
        shutil.rmtree(checkpoint.replace(checkpoint.with_name(f".tmp-old-{checkpoint.name}")), ignore_errors=True)


def load_state(folder: Path) -> dict:
    """The state in a checkpoint. With several processes, each one maps the file and reads only the parts it needs."""
    import pickle

    try:
        saved = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True, mmap=world_size() > 1)
    except pickle.UnpicklingError:
        raise UserError(f"{folder / STATE_FILE}: refused: it contains more than tensors and could execute code") from None
    except (RuntimeError, EOFError, OSError) as error:
        raise damaged(folder, f"{folder / STATE_FILE}: cannot be read; it may be truncated ({error})") from None
    if not {"sources", *vars(State())} <= saved.keys():
        raise UserError(f"--resume: {folder} was written by an earlier version; start from its weights with --model {folder}")
    return saved


def damaged(folder: Path, what: str) -> UserError:
    """The error for an unreadable checkpoint, which suggests another checkpoint of the run."""
    others = [path for path in checkpoints(folder.parent) if path != folder]
    return UserError(what + (f"; try --resume {others[-1]}" if others else ""))


def restore_weights(model: nn.Module, folder: Path) -> dict:
    """Load the weights of a checkpoint into the model and return the rest of its state."""
    saved = load_state(folder)
    if is_whole(model) or "module" not in saved:
        try:
            MODEL.load_weights(model, folder)
        except UserError as error:
            raise damaged(folder, str(error)) from None
    try:
        model.load_state_dict(saved.get("module", {}), strict=False)
    except RuntimeError as error:
        raise UserError(f"--resume: {folder} was made with another model or adapter ({MODEL.first_line(error)})") from None
    return saved


# --------------------------------------------------------------------------------------------------------- log


def json_lines(path: Path) -> list[dict]:
    """The records of a log, without lines that were truncated by a kill or are damaged."""
    records = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.split("\n"):  # splitlines() also splits inside of texts
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def without_noise(measure: str, value: float) -> float:
    """Round accuracies: their float32 parts may add up to 0.99999997 instead of 1."""
    return round(value, 6) if measure in SHARES else value


def rewind(path: Path, keep: Callable[[dict], bool]) -> None:
    MODEL.write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in json_lines(path) if keep(record)))


def duration(seconds: float) -> str:
    """40 -> 40s, 540 -> 9m00s, 7500 -> 2h05m."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02}m" if minutes >= 60 else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


class StatusLine:
    """The progress of long work on stderr: on a terminal, each line overwrites the previous one."""

    def show(self, line: str, share: float | None = None) -> None:
        """Print a line, after a progress bar if `share` is given: 20 columns, or fewer where the terminal is narrow."""
        terminal = sys.stderr.isatty() and not MODEL.QUIET
        columns = shutil.get_terminal_size().columns - 1 if terminal else 999
        width = min(20, columns - len(line) - 3)
        if share is not None and width >= 5:
            line = f"[{'#' * int(width * share):<{width}}] {line}"
        if terminal:
            print("\r\x1b[K" + line[:columns], end="", file=sys.stderr, flush=True)
            MODEL.line_is_open = True
        else:
            say(line)

    def close(self) -> None:
        if MODEL.line_is_open:
            print(file=sys.stderr, flush=True)
            MODEL.line_is_open = False


class Log:
    """log.jsonl, the progress bar, the plot and the trackers of one run. Only the first process writes."""

    def __init__(self, out: Path, main: bool, accelerator=None):
        self.out, self.main, self.accelerator = out, main, accelerator
        self.sums: dict[str, Tensor] = {}
        self.counts: Counter = Counter()
        self.norm = self.rate = 0.0
        self.clock, self.clock_counts = time.perf_counter(), (0, 0.0)
        self.rewind_to: int | None = None
        self.idle = 0.0  # seconds before the first step
        self.line = StatusLine()

    def add(self, metrics: dict[str, Tensor], norm: float, rate: float) -> None:
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] += 1
        self.norm, self.rate = norm, rate

    def state(self, device) -> dict:
        """The metrics since the last line of the log."""
        names = sorted(self.sums)
        return {"sums": dict(zip(names, all_sum([float(self.sums[name]) for name in names], device), strict=True)),
                "counts": dict(self.counts)}

    def load(self, state: dict, step: int) -> None:
        """Restore after a resume. The first new line of the log replaces the lines after the checkpoint's step."""
        self.counts, self.rewind_to = Counter(state["counts"]), step
        self.sums = {name: value if self.main else 0.0 for name, value in state["sums"].items()}  # sums over all processes

    def means(self, device) -> dict[str, float]:
        """Means of the metrics since the last call, over the steps that report them; processes are summed."""
        state = self.state(device)
        means = {name: without_noise(name, value / state["counts"][name]) for name, value in state["sums"].items()}
        self.sums, self.counts = {}, Counter()
        return {**means, "grad_norm": self.norm, "learning_rate": self.rate}

    def rates(self, *counts: float) -> list[float]:
        """The growth of these counters per second since the last call."""
        now = time.perf_counter()
        rates = [(count - before) / max(now - self.clock, 1e-9) for count, before in zip(counts, self.clock_counts, strict=True)]
        self.clock, self.clock_counts = now, counts
        return rates

    def pause(self) -> None:
        """Exclude the time of a validation from the speed."""
        self.clock = time.perf_counter()

    def write(self, record: dict) -> None:
        if not self.main:
            return
        if self.rewind_to is not None:
            rewind(self.out / "log.jsonl", lambda record: record.get("step", 0) <= self.rewind_to)
            self.rewind_to = None
        with open(self.out / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self.accelerator and self.accelerator.trackers:
            self.accelerator.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])

    def show(self, record: dict, total: int | None, share: float, memory: int) -> None:
        """Print the progress bar; `share` is the fraction of the run that is done."""
        if not self.main:
            return
        eta = duration((record["seconds"] - self.idle) * (1 - share) / max(share, 1e-9))
        reward = f" | reward {record['reward']:.3f}" if "reward" in record else ""
        mfu = f" | MFU {100 * record['mfu']:.0f}%" if "mfu" in record else ""
        self.line.show(f"step {record['step']}{f'/{total}' if total else ''} | loss {record.get('loss', math.nan):.4f}{reward} | "
                       f"{record['tokens_per_second']:,.0f} tok/s | {memory / 2**30:.1f} GiB | ETA {eta}{mfu}", share)

    def say(self, text: str) -> None:
        if self.main:
            self.close()
            say(text)

    def close(self) -> None:
        self.line.close()

    def plot(self) -> None:
        """loss.png: training and held-out loss over the steps, and held-out measures such as exact match."""
        records = json_lines(self.out / "log.jsonl") if self.main else []
        key = "nll" if any("nll" in r for r in records) else "loss"  # if the loss is a sum, the term that is validated
        panels = {"loss": {"training": curve(records, key), "held-out set": curve(records, "eval_loss")}}
        panels["held-out set, %"] = {name.rpartition("/")[2].replace("_", " "): curve(records, f"eval_{name}", 100)
                                 for name in SHARES}
        panels["reward of a pair"] = {name: curve(records, f"rewards/{name}") for name in ("chosen", "rejected", "margins")}
        plot_curves(self.out / "loss.png", panels)


def curve(records: list[dict], key: str, scale: float = 1.0) -> list[tuple]:
    """[(step, value), ...] of the log records that contain `key`."""
    return [(record["step"], scale * record[key]) for record in records if {"step", key} <= record.keys()]


def plot_curves(path: Path, panels: dict[str, dict[str, list[tuple]]]) -> None:
    """Plot {title: {label: [(step, value), ...]}} in panels side by side, without empty ones."""
    panels = {title: {label: points for label, points in curves.items() if points} for title, curves in panels.items()}
    panels = {title: curves for title, curves in panels.items() if curves}
    figure = new_figure(max(6, 4.4 * len(panels)), 4) if panels else None
    if not figure:
        return
    from matplotlib.ticker import MaxNLocator

    last = max(1, *(step for curves in panels.values() for points in curves.values() for step, _ in points))
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for (label, points), color in zip(curves.items(), ("#1f5fa8", "#d1495b", "#2a9d5c", "#e09f3e", "#7b5ea7"), strict=False):
            axes.plot(*zip(*points, strict=True), "-" if len(points) > 20 else "o-", color=color, markersize=4, label=label)
        axes.legend(frameon=False)
        axes.set(xlabel="optimizer step", title=title, xlim=(-0.04 * last, 1.04 * last))
        if "%" in title:
            top = max(10, axes.get_ylim()[1])
            axes.set_ylim(-0.04 * top, top)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10]))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def new_figure(width: float, height: float):
    """An empty figure, sizes in inches; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return TOKENIZER.say_once("no plot: matplotlib is not installed")
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, path: Path) -> None:
    with MODEL.staged(path.parent) as scratch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a box takes its place
        figure.savefig(scratch / path.name, dpi=120)


# ------------------------------------------------------------------------------------------------- run folders


@contextlib.contextmanager
def locked(path: Path, key: str, wait: bool = False):
    """Lock the folder of `path` against other runs. If it is locked, raise an error that names the setting `key`, or wait."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path, "w")
    except OSError as error:
        if wait:  # no other run writes to a read-only folder
            yield
            return
        raise UserError(f"{key}: {path.parent} cannot be written ({error.strerror})") from None
    with lock:
        if os.name == "posix":
            import fcntl

            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system releases it, even after kill -9
            except BlockingIOError:
                if not wait:
                    raise UserError(f"{key}: another run is writing to {path.parent}; choose another folder") from None
                say(f"waiting for another run that is writing to {path.parent}")
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def run_folder(out: Path, resume: str | None, overwrite: bool):
    """Lock an output folder, and protect its files unless `overwrite` is set. Yields the checkpoint to resume from, or None."""
    if MODEL.process_rank() != 0:
        barrier()
        yield find_checkpoint(out, resume)
        return
    with locked(out / ".lock", "output.dir"):
        for scratch in out.glob(".tmp-*"):
            shutil.rmtree(scratch, ignore_errors=True)
        found = find_checkpoint(out, resume)
        if resume == "auto" and found and found != checkpoints(out)[-1]:
            say(f"{MODEL.damage(checkpoints(out)[-1])}; resuming from {found}")
        used = [name for name in RUN_FILES if (out / name).exists()] + checkpoints(out)
        if found and found.resolve().parent != out.resolve() and used:
            raise UserError(f"output.dir: {out} contains a run, but {found} belongs to another run; choose another --out")
        if used and not (checkpoints(out) or {"config.yaml", "config.json"} <= set(used) or {*TRACES, *ADAPTER} & set(used)):
            raise UserError(f"output.dir: {out} contains {used[0]}, which was not written by a run; choose another --out")
        if resume and found is None:
            if kept := [name for name in used if name not in TRACES]:
                raise UserError(f"--resume: {out} contains {kept[0]} but no checkpoint; use --overwrite or another --out")
            say(f"{out} contains no checkpoint; starting a new run")
        if used and resume is None and not overwrite:
            proceed = "continue it with --resume auto, " if checkpoints(out) else ""
            raise UserError(f"output.dir: {out} contains a run; {proceed}replace it with --overwrite, or choose another --out")
        barrier()
        yield found


# files that a run may write before its first checkpoint
TRACES = ("log.jsonl", "loss.png", "confusion.png", "rollouts.jsonl", "rollouts.png")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
RUN_FILES = (*TRACES, *ADAPTER, "result.json", "config.yaml", "config.json", "generation_config.json", "model.safetensors",
             "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def clear_run(out: Path) -> None:
    """Remove the files of an earlier run. This is called after model, data and settings of the new run have been checked."""
    if MODEL.process_rank() == 0:
        for name in [*RUN_FILES, *(path.name for path in out.glob("model*.safetensors*"))]:
            (out / name).unlink(missing_ok=True)
        for path in checkpoints(out):
            remove(path)
    barrier()


def check_apart(out: Path, **sources: str | None) -> None:
    """Check that a run does not overwrite its input folders, given as {setting: folder}."""
    for key, name in sources.items():
        folder = Path(name or "").resolve()
        if name and (folder == out.resolve() or (folder.parent == out.resolve() and folder.name.startswith("ckpt-step-"))):
            raise UserError(f"output.dir: {out} is an input of the run (--{key.replace('_', '-')} {name}); choose another --out")


def find_checkpoint(out: Path, resume: str | None) -> Path | None:
    if resume is None:
        return None
    if resume == "auto":
        found = checkpoints(out)
        complete = next((folder for folder in reversed(found) if not MODEL.damage(folder)), None)
        if found and not complete:
            raise UserError(f"--resume: {MODEL.damage(found[-1])}, and {out} has no complete checkpoint; start again with "
                            "--overwrite")
        return complete
    folder = Path(resume)
    if not folder.is_dir():
        raise UserError(f"--resume: folder not found: '{resume}'; use auto for the newest checkpoint of output.dir")
    if not (folder / STATE_FILE).exists():
        raise damaged(folder, f"--resume: {folder} has no {STATE_FILE}; a checkpoint looks like out/ckpt-step-000500")
    if problem := MODEL.damage(folder):
        raise damaged(folder, f"--resume: {problem}")
    return folder


# ---------------------------------------------------------------------------------------------- model and data


class MaskedStream:
    """A stream of batches with masked tokens. The mask of a row does not depend on the process."""

    def __init__(self, rows, tokenizer, probability: float):
        self.rows, self.tokenizer, self.probability = rows, tokenizer, probability
        self.state_dict, self.load_state_dict = rows.state_dict, rows.load_state_dict

    def start(self, run) -> None:
        self.rows.start(run)
        self.seed, self.steps_per_epoch = run.seed, self.rows.steps_per_epoch

    def __next__(self) -> dict:
        batch = next(self.rows)
        epoch, block, first = batch["place"]
        keys = [(self.seed, 2, epoch, block, first + i) for i in range(len(batch["input_ids"]))]
        return mask_tokens(batch, self.tokenizer, keys, self.probability)


def is_masked(model, tokenizer) -> bool:
    """Whether the model is trained with masked language modeling (encoders) instead of next-token prediction."""
    if not model.config.causal and tokenizer.mask_token_id is None:
        raise UserError("tokenizer.name: masked language modeling needs a mask token; tokenizers trained here have one")
    return not model.config.causal


EMPTY = {"input_ids": torch.zeros(1, 1, dtype=torch.long), "targets": torch.full((1, 1), -100),
         "positions": torch.full((1, 1), -1), "segment_ids": torch.full((1, 1), -1), "weights": torch.zeros(1, 1),
         "counts": {"tokens": 0}}


def own_share(items: list, fill=EMPTY) -> list:
    """This process's part of a list, padded with `fill` to equal lengths, as a sharded forward pass needs all processes."""
    part = items[MODEL.process_rank() :: world_size()]
    return part + [fill] * (-(-len(items) // world_size()) - len(part))


def held_out_loss(batches: list[dict], bytes_per_token: float | None) -> Callable:
    """evaluate(model) for `fit`: loss, perplexity and bits per byte of fixed batches, distributed over the processes."""
    def evaluate(model) -> dict:
        nats = tokens = 0.0
        for batch in own_share(batches):
            inputs = on_device({name: batch[name] for name in ("input_ids", "targets", "positions", "segment_ids", "weights")},
                               model.device)
            weights = inputs.pop("weights")
            nats -= float((model(**inputs).logprobs.double() * (1.0 if weights is None else weights)).sum())
            tokens += batch["counts"]["tokens"]
        nats, tokens = all_sum([nats, tokens], model.device)
        measures = {"loss": nats / tokens, "perplexity": math.exp(min(nats / tokens, 700))}
        if bytes_per_token:
            measures["bits_per_byte"] = nats / tokens / bytes_per_token / math.log(2)
        return measures

    return evaluate


def with_samples(evaluate: Callable | None, tokenizer, training: TrainingSection, prompts: list[tuple[str, list[int]]],
                 sampling: INFER.Sampling | None = None, skip_first: bool = False) -> Callable | None:
    """The same validation, followed by completions of a few prompts (text, ids), which are printed to stderr."""
    if evaluate is None or not training.sample_tokens or not prompts:
        return evaluate

    def evaluate_and_show(model) -> dict:
        nonlocal skip_first
        measures, room = evaluate(model), model.config.max_position_embeddings - 1
        if skip_first:  # fresh weights would generate noise
            skip_first = False
            return measures
        settings = sampling or INFER.Sampling(training.sample_tokens, 0.7, seed=0)
        completions = INFER.generate(model, [ids[-room:] for _, ids in prompts], settings, tokenizer)
        for (prompt, _), [completion] in zip(prompts, completions, strict=True):
            say_sample(prompt, completion.text)
        return measures

    return evaluate_and_show


def say_sample(prompt: str, completion: str) -> None:
    """Print the lines of a prompt after > and those of its completion after |, with escaped control characters."""
    for mark, text in ((">", prompt), ("|", completion)):
        for line in filter(str.strip, text.splitlines()):
            say(f"  {mark} " + "".join(char if char.isprintable() else repr(char)[1:-1] for char in line))


def openings(spans: TOKENIZER.Spans, tokenizer, count: int = 3) -> list[tuple[str, list[int]]]:
    """The beginnings (text, ids) of a few evenly spaced documents: at most half of each, cut after a word."""
    chosen = (2 * np.arange(count) + 1) * len(spans.starts) // (2 * count)
    decoded = [tokenizer.decode(spans.ids[start : start + 1 + min(length // 2, 12)].tolist(), skip_special_tokens=True)
               for start, length in zip(spans.starts[chosen], spans.lengths[chosen], strict=True)]
    texts = [text.rpartition(" ")[0] or text for text in decoded]
    return [(text, TOKENIZER.encode_prompt(tokenizer, text)) for text in texts]


def prepare_model(config, tokenizer, head: str | tuple = "lm", labels: list | None = None, adapter: bool = False,
                  grow: bool = False) -> MODEL.LanguageModel:
    """The model to train, with float32 weights, or quantized ones if an `adapter` will be trained on them. `head`, `labels` and
    `grow` are those of `TOKENIZER.open_model`."""
    section, packed = config.model, config.model.quantization != "none"
    if packed and not (adapter and section.name):
        raise UserError(f"model.quantization: {section.quantization} weights cannot be trained; train an adapter on a trained "
                        "model: --lora.r 16 (SFT.py, RL.py)")
    if packed and config.training.fsdp:
        raise UserError("training.fsdp: quantized weights cannot be sharded; leave out model.quantization or training.fsdp")
    device = section.device if packed else "cpu"  # weights are quantized on the device that uses them
    model, _ = TOKENIZER.open_model(replace(section, dtype="float32", device=device), tokenizer, head=head, labels=labels,
                                    seed=config.training.seed, grow=grow)
    if section.name and not adapter and isinstance(model, MODEL.Transformer):
        MODEL.say_portability(model.config)
    if model.quantization != "none" and not adapter:
        raise UserError(f"model.name: the weights in {section.name} are quantized ({model.quantization}) and cannot be trained; "
                        "train the original model, or an adapter: --lora.r 16 (SFT.py, RL.py)")
    fit_length(config, model.config.max_position_embeddings)
    return model


def fit_length(config, context: int, whose: str = "the model's") -> None:
    if config.training.max_length > context:
        say(f"training.max_length: {config.training.max_length} exceeds {whose} context; using {context}")
        config.training.max_length = context


def prepare_data(config, tokenizer, masked: bool = False):
    """(stream, evaluate or None) from config.data, with samples after each validation. Warns if there is little data."""
    data, training = config.data, config.training

    def mask(stream):
        return MaskedStream(stream, tokenizer, training.mlm_probability) if masked else stream

    if data.streaming:
        stream = mask(TOKENIZER.text_stream(data, tokenizer, training.batch_size, training.max_length))
        size = training.eval_batches * training.batch_size * training.max_length * 4  # characters
        held_out = None if data.validation == "none" else TOKENIZER.held_out_tokens(data, tokenizer, size)
    else:
        files = first_alone(TOKENIZER.token_files, data, tokenizer, folder=data.dir)
        if "train" not in files:
            raise UserError("data.train: no text is left to train on (empty files, or everything was dropped or held out)")
        stream, held_out = mask(TOKENIZER.file_stream(files["train"], data, training.batch_size,
                                                      training.max_length)), files.get("val")
        TOKENIZER.warn_short_lines(data, files["train"], training.max_length)
        if len(files["train"].ids) <= training.max_length:
            say(f"data.train: only {len(files['train'].ids):,} tokens, less than one sequence of {training.max_length} tokens")
    spans = TOKENIZER.Spans(held_out) if held_out else None
    rows = TOKENIZER.Rows(spans, training.max_length, data.packing, None) if spans else None
    batches = TOKENIZER.fixed_batches(rows, training.batch_size, training.eval_batches) if rows else []
    if masked:
        batches = [mask_tokens(batch, tokenizer, [(training.seed, 3, b, i) for i in range(len(batch["input_ids"]))],
                               training.mlm_probability) for b, batch in enumerate(batches)]
    if not any(batch["counts"]["tokens"] for batch in batches):
        if data.validation != "none":
            say("data.validation: too little data for a held-out set; training without validation")
        return stream, None
    per_token = held_out.bytes / spans.pairs if held_out.bytes and not masked else None
    prompts = openings(spans, tokenizer) if training.sample_prompts is None else [
        (text, TOKENIZER.encode_prompt(tokenizer, text)) for text in training.sample_prompts]
    return stream, with_samples(held_out_loss(batches, per_token), tokenizer, training, [] if masked else prompts,
                                skip_first=not (config.model.name or config.actions.resume))


# -------------------------------------------------------------------------------------------- running a stage


def save_product(config_text: str, tokenizer, model, folder: Path) -> None:
    """Save a model, its tokenizer and the settings of the run."""
    MODEL.save(model, folder)
    if MODEL.process_rank() == 0:
        TOKENIZER.save(tokenizer, folder, model.config.max_position_embeddings)
        MODEL.write_text(Path(folder) / "config.yaml", config_text)


def saved_settings(folder: Path) -> dict:
    import yaml

    path = folder / "config.yaml"
    return yaml.safe_load(path.read_text()) if path.exists() else {}


def changed_keys(folder: Path, text: str) -> list[str]:
    """Settings that differ from those of a checkpoint."""
    import yaml

    old, new = saved_settings(folder), yaml.safe_load(text)
    harmless = ("output.dir", "training.save_steps", "training.save_total_limit", "training.logging_steps", "training.report_to")
    names = [f"{s}.{k}" for s in new for k in new[s] if s in old and old[s].get(k) != new[s][k]]
    return [name for name in names if name not in harmless]


ACTIONS = {
    "resume": Action("continue a run: auto (from the newest complete checkpoint) or a checkpoint's folder", str, "auto"),
    "overwrite": Action("replace the run in output.dir after the first validation of the new run"),
}
SECTIONS = {**TOKENIZER.SECTIONS, "training": TrainingSection, "output": OutputSection}


class Stage(NamedTuple):
    """The parts of a training stage."""

    model: nn.Module
    tokenizer: object
    stream: object
    loss: Callable
    evaluate: Callable | None
    save: Callable  # save(config_text, tokenizer, model, folder)
    share: float | None = None  # fraction of the fine-tuning learning rate; None: the rate of pretraining
    sources: dict = {}  # {setting: folder} of other models that the run needs


def resumed(config, resume: str):
    """The settings of a resumed run: those of its checkpoint, overridden by flags."""
    found = find_checkpoint(Path(config.output.dir), resume)
    if found is None or not (found / "config.yaml").exists():
        return config
    again = config.reload(saved=found / "config.yaml")
    before = saved_settings(found)
    fixed = [("model", key) for key in ("preset", *MODEL.KNOBS)] + [("tokenizer", key) for key in vars(again.tokenizer)]
    fixed += [("lora", key) for key in ("r", "target_modules", "use_dora") if key in before.get("lora", {})]
    for section, key in fixed:
        value, was = getattr(getattr(again, section), key, None), before.get(section, {}).get(key)
        if value != was:
            raise UserError(f"{section}.{key}: {value} differs from {was} in {found}; architecture, tokenizer and adapter cannot "
                            "change on resume; start a new run with --out")
    has_flag = again.origins.get("output.dir") == "command line"
    again.output.dir = config.output.dir if has_flag or resume == "auto" else str(found.parent)
    return again


def run_stage(name: str, config, prepare: Callable, show: str = 'echo "..." | python INFER.py MODEL') -> Result:
    """Run one stage: start the processes, lock the output folder, prepare model and data, print the settings, call `fit`.

    prepare(config, checkpoint, device) -> Stage. `show` is the command suggested at the end; MODEL in it is replaced by flags."""
    if config.actions.overwrite and config.actions.resume:
        raise UserError("--overwrite and --resume are mutually exclusive; set one")
    config = resumed(config, config.actions.resume) if config.actions.resume else config
    out = Path(config.output.dir)
    check_apart(out, model=config.model.name, adapter=getattr(config.actions, "adapter", None))
    accelerator, device = start_processes(config.training, config.model.device, out)
    if config.model.name and (base := MODEL.base_and_adapter(config.model.name)[0]) != config.model.name:
        raise UserError(f"model.name: {config.model.name} is an adapter; train it with --model {base} --adapter "
                        f"{config.model.name} (SFT.py, RL.py, DISTILL.py)")
    MODEL.choose_attention(config.model.attn_implementation)  # to report unavailable kernels early
    with run_folder(out, config.actions.resume, config.actions.overwrite) as checkpoint:
        # it may be measured, with different results in different processes
        mixed = config.training.mixed_precision = from_first(precision(config.training, config.model.dtype, device))
        stage, qat = prepare(config, checkpoint, device), config.training.qat
        if qat != "none":
            import QUANT

            QUANT.fake_quantize(stage.model, qat, config.training.qat_group_size)
        choose_rate(config.training, stage.model, not config.model.name and stage.share is None, stage.share)
        for key in ("load_best_model_at_end", "early_stopping_patience"):
            if stage.evaluate is None and getattr(config.training, key):
                raise UserError(f"training.{key}: needs held-out data; set data.validation")
        adapter = getattr(stage.model, "adapter", None)
        if adapter and mixed != "no":
            MODEL.narrow_frozen(stage.model, MODEL.AUTOCAST[mixed])
        sources = {**({"model.name": config.model.name} if adapter else {}), **stage.sources}
        text = MODEL.config_text(config)
        if MODEL.process_rank() == 0:
            for line in MODEL.changes(config):
                say(line)
            total, _ = MODEL.count_parameters(stage.model)
            trained = sum(weight.numel() for weight in stage.model.parameters() if weight.requires_grad)
            share = f" ({trained:,} trained)" if trained != total else ""
            processes = f", {world_size()} processes" if world_size() > 1 else ""
            say(f"{total:,} parameters{share}, device {device.type}, precision {mixed.replace('no', 'float32')}{processes}")
            if checkpoint:
                checked = (checkpoint / MODEL.CHECKSUMS).exists()
                say(f"resuming from {checkpoint}" + f", without {MODEL.CHECKSUMS}: not checked for damage" * (not checked))
                if changes := changed_keys(checkpoint, text):
                    say(f"changed since that checkpoint, so the resumed run will differ: {', '.join(changes)}")
        if accelerator and accelerator.log_with:
            accelerator.init_trackers(name, config={k: str(v) for k, v in vars(config.training).items()})
        result = fit(stage.model, stage.stream, stage.loss, config.training, out, partial(stage.save, text, stage.tokenizer),
                     stage.evaluate, resume=checkpoint, stage=name, mixed=mixed, accelerator=accelerator, device=device,
                     overwrite=bool(config.actions.overwrite) or checkpoint is None, sources=sources)
        if accelerator and accelerator.log_with:
            accelerator.end_training()
        result_flags = f"--model {config.model.name} --adapter {out}" if adapter else f"--model {out}"
        if config.model.quantization != "none":
            result_flags += f" --model.quantization {config.model.quantization}"
        steps = f"{MODEL.counted(result.steps, 'step')} in {duration(result.seconds)}"
        say(f"{steps}; the {'adapter' if adapter else 'model'} is in {out}; try: {show.replace('MODEL', result_flags)}")
        if qat != "none":
            size = config.training.qat_group_size
            other = f" --group-size {size}" if size else f" or INFER.py --quantization {qat}"
            say(f"{out} has float32 weights; QUANT.py --method {qat}{other} rounds them as in training")
    return result


def pretraining(config, checkpoint: Path | None, device: torch.device) -> Stage:
    tokenizer = first_alone(TOKENIZER.of_run, config, checkpoint, folder=config.data.dir)
    model = prepare_model(config, tokenizer)
    stream, evaluate = prepare_data(config, tokenizer, is_masked(model, tokenizer))
    return Stage(model, tokenizer, stream, token_loss, evaluate, save_product)


def main(argv: list[str] | None = None) -> Result:
    return run_stage("train", load_config(argv, SECTIONS, "training", ACTIONS, __doc__), pretraining)


if __name__ == "__main__":
    run_main(main)
