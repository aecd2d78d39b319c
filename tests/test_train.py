"""TRAIN.py: the loop compared with a hand-written one, equal gradients for every split of a step, exact resume, logs and errors."""

import fcntl
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import transformers
import yaml
from conftest import ROOT, free_port, in_file, launch, make_text, two_ranks, wait_for_steps
from safetensors.torch import load_file, save_file
from torch import nn
from two_ranks import (
    CONFIG,
    EXPERTS,
    Ragged,
    batch_of,
    build,
    held_out_batches,
    read_log,
    requests_of,
    rows_of_step,
    run,
    settings,
    token_loss,
    two_counts_loss,
)

import INFER
import MODEL
import TOKENIZER
import TRAIN
from MODEL import UserError

CPU = torch.device("cpu")
SMALL = ("--model.preset llama-1m --model.hidden_size 32 --model.num_hidden_layers 2 --model.num_attention_heads 4 "
         "--model.intermediate_size 48 --model.max_position_embeddings 128 --model.device cpu --tokenizer.kind byte "
         "--max-length 32 --batch-size 4 --training.warmup_steps 2 --training.mixed_precision no --training.sample_tokens 0 "
         "--training.logging_steps 1 --training.eval_batches 2").split()


@pytest.fixture()
def real_plot():
    """Tests with this fixture draw loss.png."""


@pytest.fixture(autouse=True)
def fewer_plots(request, monkeypatch):
    """Plots are drawn only where they are tested, since drawing takes longer than training here."""
    if "real_plot" not in request.fixturenames:
        monkeypatch.setattr(TRAIN.Log, "plot", lambda self: None)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small models are slower on several threads, and the subprocesses use one as well."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def arguments(folder: Path, *more, data=None, model=SMALL) -> list[str]:
    """The arguments of a tiny run on folder/text.txt into folder/out, of 4 steps unless `more` sets a length."""
    data = data or [folder / "text.txt"]
    horizon = [] if {"--epochs", "--max-steps", "--max-minutes"} & set(more) else ["--max-steps", 4]
    usual = ["--data", *data, "--data.dir", folder / "ids", "--out", folder / "out", *horizon]
    return [*in_file(folder / "usual.yaml", [*model, *usual], TRAIN, "training"), *map(str, more)]


def train(folder: Path, *more, **options):
    return TRAIN.main(arguments(folder, *more, **options))


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def losses(out: Path) -> list[float]:
    return [record["loss"] for record in read_log(out) if "loss" in record]


def weights(folder: Path) -> dict:
    return load_file(folder / "model.safetensors")


def same(a: dict, b: dict, **tolerance) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **(tolerance or dict(rtol=0, atol=0)), msg=lambda m, n=name: f"{n}: {m}")


def checkpoint_names(out: Path) -> list[str]:
    return [path.name for path in TRAIN.checkpoints(out)]


# ------------------------------------------------------------------------------------------------- the loop


def by_hand(steps: int, t: TRAIN.TrainingSection) -> tuple[list[float], dict]:
    """The steps of `fit` written out: cross-entropy on logits, global clipping, the formula of AdamW, linear decay."""
    model, seen = build(), []
    moments = {name: [torch.zeros_like(w), torch.zeros_like(w)] for name, w in model.named_parameters()}
    for step in range(steps):
        rate = t.learning_rate * ((step + 1) / t.warmup_steps if step < t.warmup_steps else
                                  1 - (step - t.warmup_steps) / (steps - t.warmup_steps))
        batch = batch_of(rows_of_step(step))
        logits = model(batch["input_ids"], positions=batch["positions"]).logits
        model.zero_grad()
        loss = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
        loss.backward()
        seen.append(float(loss))
        norm = math.sqrt(sum(float(w.grad.double().square().sum()) for w in model.parameters()))
        with torch.no_grad():
            for name, w in model.named_parameters():
                mean, square = moments[name]
                gradient = w.grad * min(1, t.max_grad_norm / (norm + 1e-6))
                mean.mul_(t.adam_beta1).add_((1 - t.adam_beta1) * gradient)
                square.mul_(t.adam_beta2).add_((1 - t.adam_beta2) * gradient**2)
                if w.dim() >= 2:
                    w.mul_(1 - rate * t.weight_decay)
                upper, lower = mean / (1 - t.adam_beta1 ** (step + 1)), square / (1 - t.adam_beta2 ** (step + 1))
                w.sub_(rate * upper / (lower.sqrt() + t.adam_epsilon))
    return seen, model.state_dict()


def test_fit_equals_a_hand_written_loop(tmp_path):
    choice = dict(lr_scheduler_type="linear", max_steps=6, max_grad_norm=0.5, warmup_steps=3, weight_decay=0.3)
    model = build()
    log = run(tmp_path, 16, token_loss, model=model, **choice)
    expected, state = by_hand(6, settings(**choice))
    assert [record["loss"] for record in log] == pytest.approx(expected, abs=1e-6)
    same(dict(model.state_dict()), dict(state), rtol=1e-6, atol=2e-6)
    assert all(record["grad_norm"] > 0.5 for record in log)  # all gradients were clipped


def test_accumulated_steps_equal_whole_ones(tmp_path):
    whole, parts = run(tmp_path / "a", 16), run(tmp_path / "b", 4, grad_accum=4)
    for name in ("loss", "odds", "grad_norm", "tokens"):
        assert [r[name] for r in parts] == pytest.approx([r[name] for r in whole], abs=1e-5)
    same(weights(tmp_path / "b"), weights(tmp_path / "a"), rtol=0, atol=2e-5)
    counts = [[sum(len(row) - 1 for row in rows_of_step(s)[i : i + 4]) for i in range(0, 16, 4)] for s in range(6)]
    assert all(max(c) > 4 * min(c) for c in counts)  # a mean per micro-batch would be very different
    assert [r["tokens"] for r in whole] == [sum(map(sum, counts[: s + 1])) for s in range(6)]


def test_losses_are_divided_by_their_own_counts(tmp_path):
    """Metrics and gradient norm of the first step, compared with the formula on the whole batch."""
    model, batch = build(), batch_of(rows_of_step(0))
    logits = model(batch["input_ids"], positions=batch["positions"]).logits
    nats = F.cross_entropy(logits.transpose(1, 2), batch["targets"], reduction="none")
    odds = torch.stack([F.softplus(row.sum() / 8) for row, pair in zip(nats, batch["pairs"], strict=True) if pair]).mean()
    loss = nats.sum() / (batch["targets"] != -100).sum()
    (loss + 0.5 * odds).backward()
    norm = math.sqrt(sum(float(w.grad.square().sum()) for w in model.parameters()))
    first = run(tmp_path, 4, two_counts_loss, grad_accum=4, max_steps=1)[0]
    assert [first["loss"], first["odds"], first["grad_norm"]] == pytest.approx([float(loss), float(odds), norm], abs=1e-5)


def test_metrics_are_summed_in_a_step_and_averaged_over_steps(tmp_path):
    assert [r["rows"] for r in run(tmp_path / "a", 4, token_loss, grad_accum=4)] == [16.0] * 6
    each = [r["loss"] for r in run(tmp_path / "b", 16, token_loss)]
    pairs = [r["loss"] for r in run(tmp_path / "c", 16, token_loss, logging_steps=2)]
    assert pairs == pytest.approx([(each[i] + each[i + 1]) / 2 for i in (0, 2, 4)], abs=1e-6)


def test_gradient_checkpointing_gives_the_same_losses(tmp_path):
    same_log = [run(tmp_path / str(on), 16, gradient_checkpointing=on) for on in (False, True)]
    assert [r["loss"] for r in same_log[1]] == pytest.approx([r["loss"] for r in same_log[0]], abs=1e-6)


def test_torch_compile_compiles_each_layer(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(MODEL.DecoderLayer, "compile", lambda self, *a, **k: compiled.append(self))
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *a, **k: None)
    model = build()
    run(tmp_path / "off", 16, max_steps=1)
    assert compiled == []
    run(tmp_path / "on", 16, model=model, torch_compile=True, max_steps=1)
    assert compiled == list(model.model.layers)


# --------------------------------------------------------------------------------------- schedule and horizon


def factors(kind: str, total: int, warmup: float, floor=0.0, decay=0.2) -> list[float]:
    return [TRAIN.learning_rate_factor(kind, s, s / total, warmup, floor, decay) for s in range(total)]


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_schedules_equal_the_published_formulas(floor):
    """Without warmup: cosine of Loshchilov 2017 (eq. 5), linear, constant, and warmup-stable-decay of Hu 2024."""
    shares = [s / 40 for s in range(40)]
    cosine = [floor + 0.5 * (1 - floor) * (1 + math.cos(math.pi * p)) for p in shares]
    assert factors("cosine", 40, 0, floor) == pytest.approx(cosine, abs=1e-12)
    assert factors("linear", 40, 0, floor) == pytest.approx([1 - (1 - floor) * p for p in shares], abs=1e-12)
    assert factors("constant", 40, 0, floor) == [1.0] * 40
    stable = [1.0 if p <= 0.75 else floor + (1 - floor) * (1 - p) / 0.25 for p in shares]
    assert factors("warmup_stable_decay", 40, 0, floor, 0.25) == pytest.approx(stable, abs=1e-12)
    assert {"cosine", "linear", "constant", "warmup_stable_decay"} == set(TRAIN.SCHEDULES)


@pytest.mark.parametrize("kind", TRAIN.SCHEDULES)
def test_warmup_in_steps_and_as_a_fraction(kind):
    by_steps, by_fraction = factors(kind, 100, 10), factors(kind, 100, 0.1)
    assert by_steps[:9] == pytest.approx([(s + 1) / 10 for s in range(9)])
    assert by_fraction[:9] == pytest.approx([s / 10 for s in range(9)], abs=2e-3)
    assert by_fraction[0] > 0  # the first step moves
    assert by_steps[10:] == pytest.approx(by_fraction[10:])


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_the_decay_starts_after_the_warmup(kind):
    """transformers' get_cosine_schedule_with_warmup and nanoGPT: progress counts from the end of the warmup."""
    progress = [(s - 40) / 60 for s in range(41, 100)]
    expected = [1 - p if kind == "linear" else 0.5 * (1 + math.cos(math.pi * p)) for p in progress]
    for warmup in (40, 0.4):
        assert factors(kind, 100, warmup)[41:] == pytest.approx(expected, abs=0.03)


def test_the_loop_follows_the_schedule(tmp_path):
    choice = dict(max_steps=8, warmup_steps=2, lr_scheduler_type="warmup_stable_decay", decay_share=0.5, min_lr_rate=0.1)
    rates = [r["learning_rate"] / 3e-3 for r in run(tmp_path, 16, token_loss, **choice)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 0.1 + 0.9 * 0.75, 0.1 + 0.9 * 0.5, 0.1 + 0.9 * 0.25])


def test_max_minutes_follows_the_clock(tmp_path, monkeypatch):
    """A clock that advances three seconds a step: a minute is 20 steps, and the rate falls with the time."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(TRAIN, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def loss(*args):
        clock.now += 3
        return token_loss(*args)

    log = run(tmp_path, 16, loss, max_steps=None, max_minutes=1.0, lr_scheduler_type="linear", warmup_steps=0)
    assert len(log) == 20 and log[-1]["seconds"] == 60
    assert [r["learning_rate"] for r in log] == pytest.approx([3e-3 * (1 - s / 20) for s in range(20)])


class Epochs(Ragged):
    steps_per_epoch = 5


def test_epochs_and_max_steps(tmp_path):
    def steps(stream, **horizon):
        training = settings(**{"max_steps": None, **horizon})
        return TRAIN.fit(build(), stream, token_loss, training, tmp_path, MODEL.save, device=CPU).steps

    assert steps(Epochs(16), epochs=1.0) == 5
    assert steps(Epochs(16), epochs=1.5) == 8
    assert steps(Epochs(16), epochs=0.01) == 1
    assert steps(Epochs(16), max_steps=3) == 3
    with pytest.raises(UserError, match="training.epochs.*no known length.*max_steps"):
        steps(Ragged(16), epochs=1.0)


def horizon_of(tmp_path, text: str, *argv: str):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    training = MODEL.load_config(["--config", str(path), *argv], TRAIN.SECTIONS, "training", TRAIN.ACTIONS).training
    return training.epochs, training.max_steps, training.max_minutes


def test_later_sources_override_the_training_length(tmp_path):
    assert horizon_of(tmp_path, "") == (2.5, None, None)
    assert horizon_of(tmp_path, "training: {max_steps: 7}") == (None, 7, None)
    assert horizon_of(tmp_path, "training: {max_steps: 7}", "--max-minutes", "2") == (None, None, 2.0)
    for text, argv in (("training: {max_steps: 7, epochs: 1}", []), ("", ["--epochs", "1", "--max-steps", "7"])):
        with pytest.raises(UserError, match="training.epochs and training.max_steps are mutually exclusive"):
            horizon_of(tmp_path, text, *argv)


def test_errors_name_the_setting_that_is_out_of_range():
    for key, value in (("batch_size", 0), ("learning_rate", 0.0), ("max_steps", -1), ("warmup_steps", -1), ("save_total_limit", 0)):
        with pytest.raises(UserError, match=f"training.{key}: .*must"):
            settings(**{key: value})


@pytest.mark.parametrize("value", ["nan", "-inf", ".inf", "1e999"])
def test_a_learning_rate_must_be_finite(value):
    with pytest.raises(UserError, match="command line: training.learning_rate: -?(nan|inf) must be a finite number"):
        MODEL.load_config([f"--learning-rate={value}"], TRAIN.SECTIONS, "training", TRAIN.ACTIONS)


def test_only_similar_names_are_suggested():
    for flag, suggestion in (("dry-run", ""), ("rank", ""), ("batchsize", "; nearest is --batch_size"),
                             ("num-layers", "; nearest is --model.num_hidden_layers")):
        with pytest.raises(UserError) as error:
            MODEL.load_config([f"--{flag}", "3"], TRAIN.SECTIONS, "training", TRAIN.ACTIONS)
        assert str(error.value) == f"--{flag}: unknown flag{suggestion}"


# --------------------------------------------------------------------------------------------------- resuming

RESUMES = {
    "adamw": ["--training.optim", "adamw", "--model.attention_dropout", "0.2"],
    "muon, accumulated, over an epoch's end": ["--training.optim", "muon", "--grad-accum", "2", "--batch-size", "4"],
    "for int4, muon": ["--training.optim", "muon", "--training.qat", "int4", "--training.qat_group_size", "16"],
    "muon, bf16, dropout": ["--training.optim", "muon", "--training.mixed_precision", "bf16", "--model.attention_dropout", "0.2"],
}


@pytest.mark.parametrize("case", RESUMES)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, case):
    """Weights, optimizer state, random states, data position and logged losses are identical."""
    write(tmp_path / "text.txt", make_text(40))
    options = ["--max-steps", 10, "--training.save_steps", 5, *RESUMES[case]]
    train(tmp_path, *options)
    out, other = tmp_path / "out", tmp_path / "other"
    records = [r for r in read_log(out) if "loss" in r]
    assert records[4]["epoch"] % 1 > 0 and (records[9]["epoch"] > 1 or "epoch" not in case)
    other.mkdir()
    shutil.copytree(out / "ckpt-step-000005", other / "ckpt-step-000005")
    shutil.copy(out / "log.jsonl", other / "log.jsonl")
    result = train(tmp_path, *options, "--out", other, "--resume", "auto")
    assert result.steps == 10 and losses(other) == losses(out)
    same(weights(other), weights(out))
    states = [TRAIN.load_state(folder / "ckpt-step-000010") for folder in (out, other)]
    assert pickle.dumps(states[0]["stream"]) == pickle.dumps(states[1]["stream"])
    assert torch.equal(states[0]["random"][0]["cpu"], states[1]["random"][0]["cpu"])
    for a, b in zip(states[0]["optimizers"], states[1]["optimizers"], strict=True):
        assert a["state"].keys() == b["state"].keys() and a["state"]
        for key in a["state"]:
            same(a["state"][key], b["state"][key])


def test_a_run_stopped_by_a_signal_resumes_exactly(tmp_path):
    """SIGTERM during step 3; a model with other weights resumes from the checkpoint."""
    run(tmp_path / "whole", 16, save_steps=3)

    def loss(model, batch, totals):
        if calls.append(1) or len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return two_counts_loss(model, batch, totals)

    calls, before = [], signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "cut", 16, loss)
    assert stop.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    assert checkpoint_names(tmp_path / "cut") == ["ckpt-step-000003"]
    run(tmp_path / "cut", 16, resume=tmp_path / "cut" / "ckpt-step-000003", model=MODEL.build(MODEL.ModelConfig(**CONFIG), seed=5))
    same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_resumed_run_uses_the_settings_of_its_checkpoint(tmp_path, capsys):
    """A run that was started with flags resumes without them. Changed settings are printed; some cannot change."""
    write(tmp_path / "text.txt", make_text(60))
    train(tmp_path, "--max-steps", 4, "--training.save_steps", 2, "--learning-rate", "1e-3", "--model.hidden_size", 48)
    shutil.rmtree(tmp_path / "out" / "ckpt-step-000004")
    capsys.readouterr()
    (tmp_path / "other.yaml").write_text("training: {batch_size: 2, learning_rate: 0.5}")
    os.chdir(tmp_path)
    result = TRAIN.main(["--resume", "auto", "--out", str(tmp_path / "out"), "--config", str(tmp_path / "other.yaml")])
    output = capsys.readouterr().err
    assert result.steps == 4 and "other.yaml" not in output and "--config is ignored" in output and "changed since" not in output
    settings = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert (settings["training"]["batch_size"], settings["training"]["learning_rate"], settings["model"]["hidden_size"]) == (4, 1e-3, 48)
    assert TRAIN.main(["--resume", str(tmp_path / "out" / "ckpt-step-000002"), "--max-steps", "6"]).steps == 6  # continues in the same folder
    assert "changed since that checkpoint, so the resumed run will differ: training.max_steps\n" in capsys.readouterr().err
    TRAIN.main(["--resume", "auto", "--out", str(tmp_path / "out"), "--training.save_steps", "3"])
    output = capsys.readouterr().err
    assert "nothing to train: the run has 6 steps, the checkpoint is of step 6" in output and "will differ" not in output
    for flags, message in ((["--model.num_hidden_layers", "1"], "model.num_hidden_layers: 1 differs from 2 in "),
                           (["--preset", "llama-225k"], "model.preset: llama-225k differs from llama-1m in ")):
        with pytest.raises(UserError, match=message):
            TRAIN.main(["--resume", "auto", "--out", str(tmp_path / "out"), *flags])


def test_later_checkpoints_are_kept_until_a_resumed_run_saves(tmp_path, text_file, monkeypatch):
    """If the resumed run fails before its first checkpoint, all later checkpoints still exist."""
    settings = ("--training.save_steps", 2, "--training.save_total_limit", 9, "--max-steps", 6)
    forward = MODEL.LanguageModel.forward
    train(tmp_path, *settings, data=[text_file])
    for steps, left in ((0, [2, 4, 6]), (2, [2, 4])):
        seen = []

        def fails(model, *words, seen=seen, steps=steps, **more):
            seen += [1] * model.training
            if len(seen) > steps:
                raise ValueError("the device is lost")
            return forward(model, *words, **more)

        monkeypatch.setattr(MODEL.LanguageModel, "forward", fails)
        with pytest.raises(ValueError, match="the device is lost"):
            train(tmp_path, *settings, "--training.eval_steps", 0, "--resume", tmp_path / "out/ckpt-step-000002", data=[text_file])
        assert checkpoint_names(tmp_path / "out") == [f"ckpt-step-{step:06d}" for step in left]
    monkeypatch.setattr(MODEL.LanguageModel, "forward", forward)
    counted, rates = [], TRAIN.Log.rates
    monkeypatch.setattr(TRAIN.Log, "rates", lambda log, *counts: counted.append(counts[0]) or rates(log, *counts))
    train(tmp_path, *settings, "--training.logging_steps", 1, "--resume", "auto", data=[text_file])
    assert counted[0] > 2 * (counted[1] - counted[0]) > 0  # the first speed excludes tokens from before the resume


def test_resume_names_a_folder_or_starts_fresh(tmp_path, text_file, capsys):
    train(tmp_path, "--resume", "auto", "--training.save_steps", 2)  # the folder is empty: a new run
    expected = losses(tmp_path / "out")
    assert len(expected) == 4 and "resuming" not in capsys.readouterr().err
    train(tmp_path, "--out", tmp_path / "b", "--training.save_steps", 3, "--resume", tmp_path / "out" / "ckpt-step-000002")
    assert losses(tmp_path / "b") == expected[2:]
    assert "changed since" not in capsys.readouterr().err


def test_changed_settings_are_printed_on_resume(tmp_path, text_file, capsys):
    train(tmp_path, "--training.save_steps", 2)
    train(tmp_path, "--training.save_steps", 2, "--resume", "auto", "--max-steps", 5)
    line = next(line for line in capsys.readouterr().err.splitlines() if "changed since" in line)
    assert line.endswith(": training.max_steps")


def test_resuming_from_anything_but_a_checkpoint_is_an_error(tmp_path, text_file, model_folder):
    with pytest.raises(UserError, match="folder not found"):
        train(tmp_path, "--resume", tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no trainer_state.pt; a checkpoint looks like"):
        train(tmp_path, "--resume", model_folder)
    train(tmp_path, "--training.optim", "adamw")
    with pytest.raises(UserError, match="made with another training.optim"):
        train(tmp_path, "--training.optim", "muon", "--resume", "auto", "--max-steps", 5)


def seal(folder: Path) -> None:
    """Checksums that fit the files as they are now."""
    MODEL.write_checksums(folder, [path for path in folder.iterdir() if path.name != MODEL.CHECKSUMS])


class Payload:
    def __reduce__(self):
        return os.mkdir, (os.environ["PAYLOAD"],)


def test_the_trainer_state_is_not_unpickled(tmp_path, text_file, monkeypatch):
    monkeypatch.setenv("PAYLOAD", str(tmp_path / "ran"))
    train(tmp_path)
    path = tmp_path / "out" / "ckpt-step-000004" / "trainer_state.pt"
    whole = path.read_bytes()
    torch.save({"step": 4, "tokens": Payload()}, path)
    seal(path.parent)
    with pytest.raises(UserError, match="trainer_state.pt: refused"):
        train(tmp_path, "--resume", "auto")
    assert not (tmp_path / "ran").exists()
    for size in (0, 100, len(whole) // 2):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="trainer_state.pt is missing or damaged"):
            train(tmp_path, "--resume", "auto")
        with pytest.raises(UserError, match="trainer_state.pt is missing or damaged"):
            train(tmp_path, "--resume", path.parent)
        seal(path.parent)
        with pytest.raises(UserError, match="trainer_state.pt: cannot be read"):
            train(tmp_path, "--resume", path.parent)


# -------------------------------------------------------------------------------------------------- processes


def test_ctrl_c_and_sigterm_save_and_print_how_to_resume(tmp_path, text_file):
    train(tmp_path)  # writes the token files that the two runs below read
    processes = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        argv = arguments(tmp_path, "--out", tmp_path / f"out{number}", "--max-steps", 100000, "--training.logging_steps", 50, "--training.save_steps", 0)
        processes[number] = launch(ROOT, ROOT / "TRAIN.py", *argv)
    for number, process in processes.items():
        wait_for_steps(process)
        process.send_signal(number)
        _, output = process.communicate(timeout=60)
        assert process.returncode == 128 + number and "Traceback" not in output
        assert ("stopping after this step" in output) == (number == signal.SIGINT)
        [saved] = TRAIN.checkpoints(tmp_path / f"out{number}")
        assert f"continue with --resume auto ({saved})" in output
        assert TRAIN.load_state(saved)["step"] == int(saved.name[-6:])


@pytest.fixture(scope="module")
def forged_gpt2(tmp_path_factory, tokenizer):
    """A folder like gpt2 on the hub: old weight names, mask buffers, vocab.json and merges.txt, a minimal tokenizer_config."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hub") / "gpt2"
    folder.mkdir()
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0)
    theirs = GPT2LMHeadModel(config).state_dict()
    state = {k.removeprefix("transformer."): v.contiguous() for k, v in theirs.items() if k != "lm_head.weight"}
    for layer in range(2):
        state[f"h.{layer}.attn.bias"] = torch.ones(128, 128).tril()[None, None]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    keys = ("model_type", "vocab_size", "n_embd", "n_layer", "n_head", "n_positions", "bos_token_id", "eos_token_id",
            "activation_function", "layer_norm_epsilon", "attn_pdrop", "embd_pdrop", "resid_pdrop", "initializer_range")
    raw = {key: getattr(config, key) for key in keys}
    (folder / "config.json").write_text(json.dumps({**raw, "n_ctx": 128, "architectures": ["GPT2LMHeadModel"]}))
    (folder / "generation_config.json").write_text('{"bos_token_id": 0, "eos_token_id": 0}')
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 128}')
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    (folder / "vocab.json").write_text(json.dumps(spec["model"]["vocab"]))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in spec["model"]["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return folder


def copied_files(folder: Path, gpt2: Path) -> Path:
    """A copy of the first four files, config.yaml and a little of the data, with the folder gpt2."""
    (folder / "data").mkdir(parents=True)
    for name in ("MODEL.py", "TOKENIZER.py", "INFER.py", "TRAIN.py", "config.yaml"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("train.txt", "train.jsonl"):
        write(folder / "data" / name, (ROOT / "data" / name).read_text().splitlines()[:10])
    shutil.copytree(gpt2, folder / "gpt2")
    return folder


SETTINGS_FILE = """
model: {name: gpt2, dtype: float16}
training: {epochs: 3, batch_size: 2, grad_accum: 16, learning_rate: 3e-5, max_length: 1024}
output: {dir: ./out}
"""


def test_fine_tuning_gpt2_by_flags_and_by_file(tmp_path, forged_gpt2):
    words = ("--model gpt2 --data data/train.txt data/train.jsonl --out ./out --epochs 3 --batch-size 2 --grad-accum 16").split()
    flags, file = copied_files(tmp_path / "flags", forged_gpt2), copied_files(tmp_path / "file", forged_gpt2)
    (file / "mine.yaml").write_text(SETTINGS_FILE)
    processes = [launch(flags, "TRAIN.py", *words, fork=False), launch(file, "TRAIN.py", "--config", "mine.yaml", fork=False)]
    for folder, process in zip((flags, file), processes, strict=True):
        _, output = process.communicate(timeout=120)
        assert process.returncode == 0, output
        assert "Traceback" not in output and "exceeds the model's context; using 128" in output
        assert [p for p in TRAIN.checkpoints(folder / "out") if (p / "trainer_state.pt").exists()]
        assert MODEL.load(str(folder / "out")).config.model_type == "gpt2"
    command = 'echo "Write a short science fiction paragraph" | "$0" INFER.py --model gpt2'
    done = subprocess.run(["sh", "-c", command, sys.executable], cwd=flags, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr and done.stdout.endswith("\n")


# ------------------------------------------------------------------------------------------------ checkpoints


class Scores:
    """An evaluate() that returns the given losses one after another."""

    def __init__(self, values):
        self.values, self.models = iter(values), []

    def __call__(self, model) -> dict:
        assert not model.training and not torch.is_grad_enabled()
        self.models.append({k: v.clone() for k, v in model.state_dict().items()})
        return {"loss": next(self.values)}


def test_old_checkpoints_are_deleted_except_the_best(tmp_path):
    evaluate = Scores([9, 5, 3, 4, 6, 7])  # before, then after steps 1 to 5
    run(tmp_path, 16, evaluate=evaluate, max_steps=5, eval_steps=1, save_steps=1, save_total_limit=1, load_best_model_at_end=True)
    assert checkpoint_names(tmp_path) == ["ckpt-step-000002", "ckpt-step-000005"]
    best = weights(tmp_path / "ckpt-step-000002")
    same(weights(tmp_path), best)
    same(evaluate.models[2], best)
    assert not torch.equal(weights(tmp_path / "ckpt-step-000005")["model.norm.weight"], best["model.norm.weight"])
    assert json.loads((tmp_path / "result.json").read_text())["after"] == {"loss": 3}
    assert not (tmp_path / TRAIN.STATE_FILE).exists()


def test_by_default_the_last_model_is_kept(tmp_path):
    run(tmp_path, 16, evaluate=Scores([9, 5, 3, 4, 6, 7]), max_steps=5, eval_steps=1, save_steps=1, save_total_limit=2)
    assert checkpoint_names(tmp_path) == ["ckpt-step-000004", "ckpt-step-000005"]
    same(weights(tmp_path), weights(tmp_path / "ckpt-step-000005"))


def test_early_stopping(tmp_path):
    scores = Scores([9, 5, 4, 4.5, 4.2, 8, 8, 8, 8])
    training = settings(max_steps=20, eval_steps=1, early_stopping_patience=2)
    result = TRAIN.fit(build(), Ragged(16), token_loss, training, tmp_path, MODEL.save, scores, device=CPU)
    assert result.steps == 4 and result.before == {"loss": 9}


def test_lower_is_better_for_losses_only():
    assert TRAIN.lower_is_better("loss") and TRAIN.lower_is_better("bits_per_byte") and TRAIN.lower_is_better("perplexity")
    assert not TRAIN.lower_is_better("accuracy") and not TRAIN.lower_is_better("reward")


def test_a_failed_save_leaves_the_previous_checkpoint(tmp_path):
    def save(model, folder):
        MODEL.save(model, folder)
        if "000004" in folder.name:
            raise ValueError("broken in the middle")

    training = settings(save_steps=2)
    with pytest.raises(ValueError, match="broken in the middle"):
        TRAIN.fit(build(), Ragged(16), token_loss, training, tmp_path, save, device=CPU)
    assert checkpoint_names(tmp_path) == ["ckpt-step-000002"]
    assert TRAIN.load_state(TRAIN.find_checkpoint(tmp_path, "auto"))["step"] == 2


def full_disk(out: Path, whole: Path, **more) -> None:
    with pytest.raises(UserError) as error:
        run(out, 16, save_steps=1, save_total_limit=99, max_steps=12, **more)
    last = TRAIN.find_checkpoint(out, "auto")
    assert "the disk is full" in str(error.value) and f"the last complete checkpoint is {last}." in str(error.value)
    assert TRAIN.load_state(last)["step"] == int(last.name[-6:]) and not list(out.glob(".tmp-*"))
    same(weights(last), weights(whole / last.name))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    run(folder, 16, save_steps=1, save_total_limit=99, max_steps=12)
    return folder


def test_a_full_disk_during_a_checkpoint(tmp_path, monkeypatch, undisturbed):
    def save_without_space(state, path):
        if "000003" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return real(state, path)

    real = torch.save
    monkeypatch.setattr(TRAIN.torch, "save", save_without_space)
    full_disk(tmp_path, undisturbed)


def test_a_full_file_system(small_disk, undisturbed):
    full_disk(small_disk / "out", undisturbed)


def test_a_full_disk_while_logging_is_a_user_error(small_disk):
    def loss(*args):
        if small_disk.joinpath("out", "log.jsonl").exists():
            with open(small_disk / "filler", "wb", buffering=0) as file:
                try:
                    while file.write(bytes(4096)):
                        pass
                except OSError:
                    pass
        return token_loss(*args)

    with pytest.raises(UserError, match="disk is full"):
        run(small_disk / "out", 16, loss, max_steps=99)


# --------------------------------------------------------------------------------------------- non-finite steps


class Watched(Ragged):
    """Keeps a copy of the weights before each step."""

    def __next__(self):
        self.seen = getattr(self, "seen", [])
        self.seen.append({k: v.clone() for k, v in self.run.model.state_dict().items()})
        return super().__next__()


def with_nan(*steps: int):
    def loss(model, batch, totals):
        calls.append(1)
        value, metrics = token_loss(model, batch, totals)
        poison = math.nan if len(calls) - 1 in steps else 1.0
        return value * poison, {"loss": metrics["loss"] * poison}

    calls: list = []
    return loss


def test_non_finite_steps_are_skipped_and_counted(tmp_path):
    stream = Watched(16)
    TRAIN.fit(build(), stream, with_nan(1, 3), settings(), tmp_path, MODEL.save, device=CPU)
    moved = [not torch.equal(a["lm_head.weight"], b["lm_head.weight"]) for a, b in zip(stream.seen, stream.seen[1:], strict=False)]
    assert moved == [True, False, True, False, True]
    log = read_log(tmp_path)
    assert [r.get("skipped_steps", 0) for r in log] == [0, 1, 1, 2, 2, 2]
    assert all(math.isfinite(w.sum()) for w in weights(tmp_path).values())


def test_too_many_non_finite_steps_end_the_run(tmp_path):
    choice = dict(max_steps=30, save_steps=2, max_skipped_steps=3)
    with pytest.raises(UserError, match="3 steps in a row.*last good checkpoint is .*ckpt-step-00000[46]"):
        run(tmp_path, 16, with_nan(*range(4, 30)), **choice)
    last = TRAIN.find_checkpoint(tmp_path, "auto")
    assert all(math.isfinite(w.sum()) for w in weights(last).values())
    with pytest.raises(UserError, match="no checkpoint was written yet"):
        run(tmp_path / "b", 16, with_nan(*range(30)), **{**choice, "save_steps": 0})


def test_the_float16_loss_scale_falls_and_rises():
    scale, off = TRAIN.LossScale(True), TRAIN.LossScale(False)
    assert (scale.scale, off.scale) == (65536, 1)
    scale.update(False), scale.update(False), off.update(False)
    assert (scale.scale, off.scale) == (16384, 1)
    for _ in range(1999):
        scale.update(True)
    assert scale.scale == 16384
    scale.update(True)
    assert scale.scale == 32768


def test_float16_trains_like_float32(tmp_path):
    """An overflow at the first loss scale halves the scale and is not counted as a skipped step."""
    plain = [r["loss"] for r in run(tmp_path / "a", 16, token_loss, max_steps=12)]

    def overflows_once(model, batch, totals):
        loss, metrics = token_loss(model, batch, totals)
        calls.append(1)
        return loss * (1e36 if len(calls) == 1 else 1.0), metrics

    calls: list = []
    training = settings(max_steps=12)
    (tmp_path / "b").mkdir()
    TRAIN.fit(build(), Ragged(16), overflows_once, training, tmp_path / "b", MODEL.save, mixed="fp16", device=CPU)
    log = read_log(tmp_path / "b")
    assert "skipped_steps" not in log[-1] and TRAIN.load_state(tmp_path / "b" / "ckpt-step-000012")["loss_scale"][0] == 32768
    assert [r["loss"] for r in log[2:]] == pytest.approx(plain[2:], abs=0.15)
    assert weights(tmp_path / "b")["lm_head.weight"].dtype == torch.float32


def test_out_of_memory_errors_name_settings_to_change(tmp_path):
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        def loss(*args, error=error):
            raise error

        with pytest.raises(UserError, match="training.batch_size 16 x max_length 32.*grad_accum.*gradient_checkpointing"):
            run(tmp_path, 16, loss)


# --------------------------------------------------------------------------------------------------- optimizers


def gpt2() -> MODEL.Transformer:
    return MODEL.build({"preset": "gpt2-2m", "vocab_size": 300, "hidden_size": 64, "num_attention_heads": 4})


def names_of(model, optimizer) -> dict[str, float]:
    """Parameter name -> weight decay."""
    names = {id(w): name for name, w in model.named_parameters()}
    return {names[id(w)]: group["weight_decay"] for group in optimizer.param_groups for w in group["params"]}


def test_muon_optimizes_only_the_matrices_in_layers():
    model = gpt2()
    muon, adamw = TRAIN.make_optimizers(model, settings(optim="muon"))
    matrices = {n for n, w in model.named_parameters() if w.dim() == 2 and ".layers." in n}
    assert isinstance(muon, TRAIN.Muon) and set(names_of(model, muon)) == matrices and len(matrices) == 4 * 4
    rest = names_of(model, adamw)
    assert set(rest) == {n for n, _ in model.named_parameters()} - matrices and "model.embed_tokens.weight" in rest
    assert {n for n, decay in rest.items() if decay} == {"model.embed_tokens.weight", "model.embed_positions.weight"}


def test_norms_and_biases_do_not_decay(tmp_path):
    [adamw] = TRAIN.make_optimizers(model := gpt2(), settings(optim="adamw", weight_decay=0.5))
    for name, decay in names_of(model, adamw).items():
        assert decay == (0.0 if name.endswith("bias") or "norm" in name else 0.5), name
    assert any(name.endswith("bias") for name in names_of(model, adamw))


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16)])
def test_muon_steps_equal_those_of_torch(shape):
    """torch iterates in bfloat16, hence the tolerance. The result is close to U V^T."""
    weights = [torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0))) for _ in range(2)]
    ours = TRAIN.Muon(weights[:1], lr=0.1, weight_decay=0.2)
    theirs = torch.optim.Muon(weights[1:], lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(step + 1))
        for weight, optimizer in zip(weights, (ours, theirs)):
            weight.grad = gradient.clone()
            optimizer.step()
        torch.testing.assert_close(weights[0], weights[1], atol=0.01, rtol=0.02)
    u, _, v = torch.linalg.svd(gradient, full_matrices=False)
    singular = torch.linalg.svdvals(TRAIN.orthogonalized(gradient))
    assert singular.min() > 0.6 and singular.max() < 1.3
    assert (TRAIN.orthogonalized(gradient) - u @ v).norm() < 0.35 * (u @ v).norm()


def test_muon_orthogonalizes(tmp_path):
    """The first step moves a matrix along U V^T of its gradient, by the RMS of AdamW's updates (Liu 2025)."""
    model = build()
    before = {k: v.clone() for k, v in model.named_parameters()}
    run(tmp_path, 16, token_loss, model=model, max_steps=1, optim="muon", warmup_steps=0, weight_decay=0.0)
    w = "model.layers.0.self_attn.q_proj.weight"
    moved = (before[w] - model.get_parameter(w)).detach()
    singular = torch.linalg.svdvals(moved)
    assert singular.max() / singular.min() < 4  # after five Newton-Schulz steps they are similar
    assert moved.square().mean().sqrt() == pytest.approx(0.2 * 3e-3, rel=0.2)


def test_adamw_8bit_steps_and_resumes(tmp_path):
    pytest.importorskip("bitsandbytes")
    choice = dict(optim="adamw_8bit", save_steps=3)
    large = dict(hidden_size=64, intermediate_size=128)  # matrices below 4096 numbers keep 32 bits
    log = run(tmp_path / "a", 16, token_loss, model=build(**large), **choice)
    full = run(tmp_path / "c", 16, token_loss, model=build(**large))
    assert [r["loss"] for r in log] == pytest.approx([r["loss"] for r in full], abs=0.05)
    found = []
    TRAIN.map_tensors(found.append, TRAIN.load_state(tmp_path / "a" / "ckpt-step-000003")["optimizers"])
    assert any(tensor.dtype == torch.uint8 for tensor in found)
    again = run(tmp_path / "b", 16, token_loss, model=build(**large), resume=tmp_path / "a" / "ckpt-step-000003", **choice)
    assert [r["loss"] for r in again] == pytest.approx([r["loss"] for r in log[3:]], abs=1e-6)


def test_a_missing_bitsandbytes_is_a_one_line_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="adamw_8bit needs `pip install bitsandbytes`"):
        TRAIN.make_optimizers(build(), settings(optim="adamw_8bit"))


def test_default_rates_and_optimizers_depend_on_the_weights(tmp_path):
    narrow, wide = (MODEL.build({"preset": "llama-1m", "hidden_size": width}, device="meta") for width in (128, 512))
    for model, fresh, rate, optim in ((narrow, True, 6e-3, "muon"), (wide, True, 3e-3, "muon"), (wide, False, 5e-5, "adamw")):
        training = TRAIN.TrainingSection()
        TRAIN.choose_rate(training, model, fresh)
        assert (training.learning_rate, training.optim) == (pytest.approx(rate), optim)
    for adapter, ratio, rate in ((dict(r=8, alpha=16), None, 1e-2), (dict(r=64, alpha=16), None, 1e-2), (dict(r=8, alpha=16), 16.0, 2.5e-3),
                                 (dict(r=64, alpha=16, rs=True), None, 1e-2 / math.sqrt(8))):
        tuned = MODEL.build({"preset": "llama-1m", "hidden_size": 128}, device="meta")
        tuned.adapter = SimpleNamespace(r=adapter["r"], lora_alpha=adapter["alpha"], use_rslora=adapter.get("rs", False))
        tuned.rates = {".lora_B.": ratio} if ratio else {}
        training = TRAIN.TrainingSection()
        TRAIN.choose_rate(training, tuned, False, share=1)
        assert (training.learning_rate, training.optim) == (pytest.approx(rate), "adamw")
    chosen = TRAIN.TrainingSection(learning_rate=1e-4, optim="adamw")
    TRAIN.choose_rate(chosen, narrow, True)
    assert (chosen.learning_rate, chosen.optim) == (1e-4, "adamw")


# ---------------------------------------------------------------------------------------------------- on policy


class Rollouts(Ragged):
    """Records each call of next()."""

    def __init__(self, batch_size: int, events: list):
        super().__init__(batch_size)
        self.events = events

    def __next__(self) -> dict:
        self.events.append("next")
        return super().__next__()

    def metrics(self) -> dict:
        return {"reward": self.step / 10}


class Pair(nn.Module):
    """A module with a policy, which is saved, and one more trained weight."""

    def __init__(self, seed: int = 1):
        super().__init__()
        self.policy = MODEL.build(MODEL.ModelConfig(**CONFIG), seed=seed)
        self.policy.model.embed_tokens.requires_grad_(False)
        self.extra = nn.Parameter(torch.tensor([0.5]))

    def forward(self, *args, **kwargs):
        out = self.policy(*args, **kwargs)
        return out._replace(logprobs=out.logprobs * self.extra)


def fit_pair(out: Path, model: Pair, events: list | None = None, resume=None, loss=token_loss, **more):
    events = [] if events is None else events
    out.mkdir(parents=True, exist_ok=True)

    def recorded_loss(*args):
        events.append("loss")
        return loss(*args)

    training = settings(**{"batch_size": 8, "grad_accum": 2, "save_steps": 2, "save_total_limit": 9, "max_steps": 8, **more})
    return TRAIN.fit(model, Rollouts(8, events), recorded_loss, training, out, lambda m, f: MODEL.save(m.policy, f), resume=resume, device=CPU)


def test_batches_are_not_drawn_ahead(tmp_path):
    events: list = []
    fit_pair(tmp_path, Pair(), events)
    assert events == ["next", "next", "loss", "loss"] * 8
    assert [r["reward"] for r in read_log(tmp_path)] == [s / 10 for s in range(1, 9)]


def test_weights_outside_of_the_saved_model_resume_exactly(tmp_path):
    whole, resumed = Pair(), Pair(seed=7)
    with torch.no_grad():
        resumed.policy.model.embed_tokens.weight.copy_(whole.policy.model.embed_tokens.weight)  # frozen: not in the state
        resumed.extra.fill_(9.0)
    frozen = whole.policy.model.embed_tokens.weight.clone()
    fit_pair(tmp_path / "a", whole)
    fit_pair(tmp_path / "b", resumed, resume=tmp_path / "a" / "ckpt-step-000004")
    same(dict(resumed.state_dict()), dict(whole.state_dict()))
    assert whole.extra != 0.5 and torch.equal(whole.policy.model.embed_tokens.weight, frozen)
    assert losses(tmp_path / "b") == losses(tmp_path / "a")[4:]


def test_frozen_weights_do_not_change_and_freezing_all_is_an_error(tmp_path):
    model = build().requires_grad_(False)
    with pytest.raises(UserError, match="nothing to train"):
        run(tmp_path / "none", 16, model=model)
    model.lm_head.requires_grad_(True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run(tmp_path, 16, model=model, optim="muon")
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"lm_head.weight"}


# ------------------------------------------------------------------------------------------- the output folder


def test_resume_auto_without_a_checkpoint(tmp_path, text_file, capsys):
    """The files of a run that stopped early are removed; a finished run is not replaced."""
    train(tmp_path)
    [saved] = TRAIN.checkpoints(tmp_path / "out")
    first = losses(tmp_path / "out")
    shutil.rmtree(saved)
    with pytest.raises(UserError, match="contains result.json but no checkpoint; use --overwrite"):
        train(tmp_path, "--resume", "auto")
    assert (tmp_path / "out" / "model.safetensors").exists()
    for path in (tmp_path / "out").iterdir():
        if path.name not in ("log.jsonl", "loss.png"):
            path.unlink()
    train(tmp_path, "--resume", "auto")
    assert "contains no checkpoint; starting a new run" in capsys.readouterr().err
    assert losses(tmp_path / "out") == first


def test_resume_does_not_replace_other_folders(tmp_path, text_file, trained):
    """Neither a downloaded model nor another run is overwritten."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(trained.out / name, folder)
    with pytest.raises(UserError, match="contains config.json, which was not written by a run"):
        train(tmp_path, "--resume", "auto", "--out", folder)
    assert (folder / "model.safetensors").read_bytes() == (trained.out / "model.safetensors").read_bytes()
    train(tmp_path)
    [other] = TRAIN.checkpoints(trained.out)[-1:]
    with pytest.raises(UserError, match=f"out contains a run, but {other} belongs to another run; choose another --out"):
        train(tmp_path, "--resume", other, "--out", tmp_path / "out")


def test_a_checkpoint_of_an_earlier_version_is_a_one_line_error(tmp_path, text_file):
    train(tmp_path)
    [folder] = TRAIN.checkpoints(tmp_path / "out")
    state = TRAIN.load_state(folder)
    torch.save({key: value for key, value in state.items() if key != "measured"}, folder / TRAIN.STATE_FILE)
    seal(folder)
    with pytest.raises(UserError, match="was written by an earlier version; start from its weights with --model"):
        train(tmp_path, "--resume", "auto")


def test_resuming_from_an_older_checkpoint_replaces_newer_ones(tmp_path, text_file):
    options = ["--training.save_steps", 2, "--training.save_total_limit", 9, "--training.logging_steps", 3, "--training.eval_steps", 2]
    train(tmp_path, *options, "--max-steps", 9)
    log = read_log(tmp_path / "out")
    assert [r["step"] for r in log if "eval_loss" in r] == [0, 2, 4, 6, 8, 9] and [r["step"] for r in log if "loss" in r] == [3, 6, 9]
    train(tmp_path, *options, "--max-steps", 9, "--resume", "auto")  # nothing to train and to log
    assert read_log(tmp_path / "out") == log
    train(tmp_path, *options, "--max-steps", 9, "--resume", tmp_path / "out" / "ckpt-step-000004")
    again = read_log(tmp_path / "out")
    assert [(r["step"], r.get("loss"), r.get("eval_loss")) for r in again] == [(r["step"], r.get("loss"), r.get("eval_loss")) for r in log]
    train(tmp_path, *options, "--max-steps", 5, "--training.lr_scheduler_type", "constant", "--resume", tmp_path / "out" / "ckpt-step-000004")
    assert checkpoint_names(tmp_path / "out") == ["ckpt-step-000002", "ckpt-step-000004", "ckpt-step-000005"]
    assert [r["step"] for r in read_log(tmp_path / "out") if "loss" in r] == [3, 5]


def test_a_used_folder_needs_overwrite(tmp_path, text_file):
    train(tmp_path)
    first, other = losses(tmp_path / "out"), tmp_path / "out" / "sft" / "model.safetensors"
    other.parent.mkdir()
    other.write_text("the model of another stage")
    (tmp_path / "out" / "model-00001-of-00002.safetensors").write_text("a shard of an earlier, larger model")
    with pytest.raises(UserError, match="continue it with --resume auto, replace it with --overwrite, or choose another --out"):
        train(tmp_path)
    assert losses(tmp_path / "out") == first
    train(tmp_path, "--overwrite", "--seed", 3, "--max-steps", 3)
    assert len(losses(tmp_path / "out")) == 3 and losses(tmp_path / "out") != first[:3]
    assert checkpoint_names(tmp_path / "out") == ["ckpt-step-000003"] and other.read_text() == "the model of another stage"
    assert not (tmp_path / "out" / "model-00001-of-00002.safetensors").exists()


def test_an_unfinished_run_counts_as_used(tmp_path, text_file):
    (tmp_path / "out" / "ckpt-step-000002").mkdir(parents=True)
    with pytest.raises(UserError, match="contains a run"):
        train(tmp_path)


def test_two_runs_cannot_share_a_folder(tmp_path, text_file):
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run is writing"):
            train(tmp_path, "--overwrite")
    train(tmp_path)  # the lock ends with the file that holds it


def test_an_output_that_is_not_a_folder_is_an_error(tmp_path, text_file):
    with pytest.raises(UserError, match="output.dir: .*cannot be written"):
        train(tmp_path, "--out", text_file)


# ------------------------------------------------------------------------------------------------ saved files


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("trained")
    write(folder / "text.txt", make_text(300))
    result = train(folder, "--max-steps", 40, "--training.eval_steps", 20, "--batch-size", 8)
    return SimpleNamespace(folder=folder, out=folder / "out", result=result)


def test_the_files_of_a_finished_run(trained, real_plot):
    """The plots of `trained` are real, since module fixtures run before the stub is set."""
    names = {path.name for path in trained.out.iterdir()}
    assert {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
            "config.yaml", "log.jsonl", "loss.png", "result.json", "ckpt-step-000040"} <= names
    assert not [name for name in names if name.startswith(".tmp")]
    assert {"config.json", "model.safetensors", "tokenizer.json", "config.yaml", "trainer_state.pt"} <= {
        path.name for path in (trained.out / "ckpt-step-000040").iterdir()}
    from PIL import Image

    with Image.open(trained.out / "loss.png") as image:
        image.load()
        assert image.format == "PNG" and len(image.convert("RGB").getcolors(2**24)) > 20


def test_held_out_percentages_are_drawn_next_to_the_loss(tmp_path, real_plot):
    rows = [{"step": 0, "eval_loss": 3.0, "eval_exact_match": 0.1}, {"step": 1, "loss": 2.0}, {"step": 2, "eval_loss": 1.0, "eval_exact_match": 0.6}]
    loss, percent = drawn(tmp_path, rows)
    assert [line.get_label() for line in (*loss.get_lines(), *percent.get_lines())] == ["training", "held-out set", "exact match"]
    assert [text.get_text() for text in percent.get_legend().get_texts()] == ["exact match"]
    assert list(percent.get_lines()[0].get_ydata()) == [10, 60]


def drawn(folder: Path, rows: list[dict]) -> list:
    """The axes of the plot of these log records."""
    from matplotlib.figure import Figure

    write(folder / "log.jsonl", map(json.dumps, rows))
    with mock.patch.object(Figure, "savefig", autospec=True) as saved:
        TRAIN.Log(folder, True).plot()
    return saved.call_args[0][0].axes


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 400, 1_000_000])
def test_plots_have_ticks_at_whole_steps_and_percentages(steps, tmp_path, real_plot):
    for measure, rows in ((None, [{"step": steps, "loss": 2.0}]),
                          (0.0, [{"step": 0, "eval_exact_match": 0.0}, {"step": steps, "eval_exact_match": 0.0}])):
        [axes] = drawn(tmp_path, rows)
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert ticks[0] == 0 and ticks[-1] > 0.7 * steps and all(float(tick).is_integer() for tick in ticks) and len(ticks) <= 8
        if measure is not None:
            percentages = [tick for tick in axes.get_yticks() if axes.get_ylim()[0] <= tick <= axes.get_ylim()[1]]
            assert percentages[0] == 0 and percentages[-1] == 10 and all(float(tick).is_integer() for tick in percentages)


def test_without_matplotlib_one_line_reports_that_there_is_no_plot(tmp_path, real_plot, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write(tmp_path / "log.jsonl", [json.dumps({"step": 1, "loss": 2.0})])
    TOKENIZER.say_once.cache_clear()
    for _ in range(2):
        TRAIN.Log(tmp_path, True).plot()
    assert capsys.readouterr().err == "no plot: matplotlib is not installed\n"


def test_contents_of_result_and_log(trained):
    result = json.loads((trained.out / "result.json").read_text())
    assert {"stage", "measure", "before", "after", "seconds", "peak_memory_bytes"} <= set(result)
    assert (result["stage"], result["measure"], result["steps"]) == ("train", "loss", 40)
    assert set(result["after"]) == {"loss", "perplexity", "bits_per_byte"}
    assert result["after"]["loss"] < result["before"]["loss"] - 0.5 and result["peak_memory_bytes"] > 2**26
    assert result["before"]["perplexity"] == pytest.approx(math.exp(result["before"]["loss"]))
    log = read_log(trained.out)
    assert [r["step"] for r in log if "eval_loss" in r] == [0, 20, 40] and [r["step"] for r in log if "loss" in r] == list(range(1, 41))
    assert {"loss", "grad_norm", "learning_rate", "tokens", "seconds", "epoch", "tokens_per_second"} <= set(log[1])
    seen = losses(trained.out)
    assert sum(seen[-5:]) / 5 < sum(seen[:5]) / 5 - 0.5


def test_transformers_loads_the_model_with_the_same_logits(trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(trained.out).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained.out)
    ids = torch.tensor([tokenizer("The old owl").input_ids])
    ours = MODEL.load(str(trained.out))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=0, atol=1e-4)


def test_held_out_measures_equal_those_of_single_documents(trained):
    """Compared with the loss of transformers on single held-out documents."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(trained.out).eval(), AutoTokenizer.from_pretrained(trained.out)
    data = TOKENIZER.DataSection([str(trained.folder / "text.txt")], dir=str(trained.folder / "ids"))
    held = TOKENIZER.token_files(data, tokenizer)["val"]
    batches = TOKENIZER.fixed_batches(TOKENIZER.Rows(TOKENIZER.Spans(held), 128, True, None), 4)
    measures = TRAIN.held_out_loss(batches, held.bytes / sum(b["counts"]["tokens"] for b in batches))(MODEL.load(str(trained.out)))
    texts = [text for part, text in TOKENIZER.documents(data, [trained.folder / "text.txt"], TOKENIZER.Counter()) if part == "val"]
    nats = tokens = 0
    for text in texts:
        ids = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            nats += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    assert measures["loss"] == pytest.approx(nats / tokens, abs=2e-3)  # documents that are split over two rows lose some context
    assert measures["bits_per_byte"] == pytest.approx(nats / math.log(2) / sum(len(t.encode()) for t in texts), abs=5e-3)


def test_settings_are_saved_with_the_model(trained):
    saved = MODEL.load_config(["--config", str(trained.out / "config.yaml")], TRAIN.SECTIONS, "training", TRAIN.ACTIONS)
    assert saved.training.max_steps == 40 and saved.training.epochs is None and saved.model.hidden_size == 32
    assert saved.training.optim == "muon" and saved.training.learning_rate == pytest.approx(6e-3 * math.sqrt(128 / 32))


def test_samples_are_printed_after_validations(tmp_path, text_file, capsys):
    options = ["--training.sample_tokens", 4, "--training.sample_prompts", '["The red"]', "--training.eval_batches", 1]
    train(tmp_path, *options)
    captured = capsys.readouterr()
    assert captured.err.count("  > The red\n  | ") == 1 and captured.out == ""  # no samples of fresh weights
    trained = ["--model", str(tmp_path / "out"), "--max-length", "32", "--batch-size", "4", "--model.device", "cpu"]
    train(tmp_path, *options, "--out", tmp_path / "more", model=trained)
    assert capsys.readouterr().err.count("  > The red\n  | ") == 2  # before and after


def test_samples_continue_held_out_documents(tmp_path, text_file, capsys):
    train(tmp_path, "--training.sample_tokens", 4)
    shown = [line.removeprefix("  > ") for line in capsys.readouterr().err.splitlines() if line.startswith("  > ")]
    documents = text_file.read_text().splitlines()
    assert len(shown) == 3
    assert all(any(document.startswith(line) and document != line for document in documents) for line in shown)


def test_samples_have_no_empty_lines_or_control_characters(capsys):
    completion = SimpleNamespace(text="a\n\n \n\nb\x1b[2J\n\n")
    with mock.patch.object(INFER, "generate", lambda *_: [[completion]]):
        model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=8))
        assert TRAIN.with_samples(lambda _: {"loss": 1.0}, None, TRAIN.TrainingSection(), [("q\n\nr", [1])])(model) == {"loss": 1.0}
    assert capsys.readouterr().err == "  > q\n  > r\n  | a\n  | b\\x1b[2J\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_and_samples_do_not_share_a_line_on_a_terminal(tmp_path, monkeypatch):
    def evaluate(model) -> dict:
        MODEL.say("  | a sample")
        return {"loss": 1.0}

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "80")
    run(tmp_path, 16, evaluate=evaluate, max_steps=4, eval_steps=2)
    lines = [line.rpartition("\r\x1b[K")[2] for line in screen.getvalue().split("\n")]
    assert lines[:2] == ["  | a sample", "step 0: held-out loss 1"] and lines[3:5] == ["  | a sample", "step 2: held-out loss 1"]
    for line in (lines[2], lines[5]):
        assert re.fullmatch(r"\[#+ *\] step \d/4 \| loss [\d.]+ \| [\d,]+ tok/s \| [\d.]+ GiB \| ETA \d+s \| MFU \d+%", line) and len(line) < 80


def test_a_message_ends_the_line_of_the_progress_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    TRAIN.StatusLine().show("step 1/4")
    MODEL.say("a message")
    TRAIN.StatusLine().close()
    assert screen.getvalue() == "\r\x1b[Kstep 1/4\na message\n"


def test_settings_that_another_one_replaces_are_not_listed():
    config = MODEL.load_config(["--config", os.devnull, "--max-steps", "7", "--model", "gpt2"], TRAIN.SECTIONS, "training")
    assert MODEL.changes(config)[0] == 'settings: model.name "gpt2", training.max_steps 7'


def test_a_narrow_terminal_cuts_the_bar_before_the_numbers(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    for columns, expected in ((80, f"[{'#' * 10}{' ' * 10}] 0123456789"), (23, "[####     ] 0123456789"),
                              (15, "0123456789"), (8, "0123456")):
        monkeypatch.setenv("COLUMNS", str(columns))
        sys.stderr.truncate(0), sys.stderr.seek(0)
        TRAIN.StatusLine().show("0123456789", 0.5)
        assert sys.stderr.getvalue() == "\r\x1b[K" + expected


def test_durations():
    assert [TRAIN.duration(seconds) for seconds in (0, 40.4, 59.6, 540, 3599.6, 7500)] == ["0s", "40s", "1m00s", "9m00s", "1h00m", "2h05m"]


# --------------------------------------------------------------------------------------------------------- data


def test_data_shorter_than_one_sequence_trains_with_a_warning(tmp_path, capsys):
    write(tmp_path / "text.txt", ["a red fox", "an old owl"])
    train(tmp_path, "--max-length", 1024, "--model.max_position_embeddings", 1024, "--max-steps", 12)
    output = capsys.readouterr().err
    assert "less than one sequence of 1024 tokens" in output
    assert "too little data for a held-out set; training without validation" in output
    assert losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0] - 0.3


def test_empty_data_is_a_one_line_error(tmp_path, model_folder):
    write(tmp_path / "text.txt", ["", "  "])
    with pytest.raises(UserError, match="data.train: no text in "):
        train(tmp_path)
    (tmp_path / "one.bin").write_bytes(b"\x05\x00")
    own = ["--model", str(model_folder), "--max-length", "32"]
    with pytest.raises(UserError, match="fewer than 2 tokens"):
        train(tmp_path, data=[tmp_path / "one.bin"], model=own)


def test_unpacked_and_streamed_data(tmp_path, text_file):
    for name, more in (("unpacked", ["--data.packing", "false"]), ("streamed", ["--data.streaming", "true", "--max-steps", 12])):
        train(tmp_path, *more, "--out", tmp_path / name)
        assert losses(tmp_path / name)[-1] < losses(tmp_path / name)[0]
    with pytest.raises(UserError, match="training.epochs: .*no known length"):
        train(tmp_path, "--data.streaming", "true", "--epochs", 1, "--out", tmp_path / "c")
    (tmp_path / "held.txt").write_text("\n".join(make_text(60, seed=5)))
    for name, validation in (("none", "none"), ("hash", "hash"), ("tail", "tail"), ("file", tmp_path / "held.txt")):
        result = train(tmp_path, "--data.streaming", "true", "--max-steps", 4, "--data.validation", validation, "--out", tmp_path / name)
        assert (result.after is None or "loss" not in result.after) == (name == "none"), name


def test_a_streamed_run_resumes_exactly(tmp_path, text_file):
    options = ["--data.streaming", "true", "--max-steps", 8, "--training.save_steps", 4]
    train(tmp_path, *options)
    (tmp_path / "other").mkdir()
    shutil.copytree(tmp_path / "out" / "ckpt-step-000004", tmp_path / "other" / "ckpt-step-000004")
    train(tmp_path, *options, "--out", tmp_path / "other", "--resume", "auto")
    same(weights(tmp_path / "other"), weights(tmp_path / "out"))


def test_token_files_with_a_held_out_file(trained, tmp_path):
    model = ["--model", str(trained.out), "--max-length", "32", "--batch-size", "4", "--training.sample_tokens", "0",
             "--training.mixed_precision", "no", "--training.logging_steps", "1", "--model.device", "cpu"]
    result = train(tmp_path, data=[trained.folder / "ids" / "train_ids.bin"], model=model)
    assert result.before["loss"] == pytest.approx(trained.result.after["loss"], abs=0.2)
    assert read_log(tmp_path / "out")[1]["learning_rate"] <= 5e-5  # trained weights get a low rate


def test_data_weights_set_the_mixing_ratio(tmp_path, monkeypatch):
    files = [write(tmp_path / "a.txt", [f"{i} aaaa bbbb aaaa" for i in range(90)]),
             write(tmp_path / "b.txt", [f"{i} yyyy zzzz zzzz" for i in range(30)])]
    seen = []
    real = TRAIN.token_loss
    monkeypatch.setattr(TRAIN, "token_loss", lambda m, b, t: seen.append(b["input_ids"]) or real(m, b, t))
    train(tmp_path, "--data.weights", "[1, 3]", "--max-steps", 20, data=files)
    tokenizer = TOKENIZER.load(tmp_path / "out")
    text = tokenizer.decode(torch.cat([ids.flatten() for ids in seen]).tolist())
    assert text.count("z") / (text.count("z") + text.count("b") * 2) == pytest.approx(0.75, abs=0.1)


def test_a_trained_models_architecture_is_fixed(tmp_path, text_file, model_folder):
    with pytest.raises(UserError, match="model.hidden_size: a trained model's architecture is fixed"):
        train(tmp_path, model=["--model", str(model_folder), "--model.hidden_size", "64"])
    with pytest.raises(UserError, match="model.vocab_size: 100 is smaller than the tokenizer's"):
        train(tmp_path, "--model.vocab_size", 100)


def test_float16_on_a_cpu_falls_back(tmp_path, text_file, capsys):
    train(tmp_path, "--training.mixed_precision", "fp16")
    assert "float16 on a CPU is slow" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- two processes


def torchrun(*words) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()), *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """tests/two_ranks.py and, at the same time, a torchrun command of TRAIN.py on rows that do not divide evenly."""
    folder = tmp_path_factory.mktemp("two")
    write(folder / "text.txt", make_text(31))
    argv = arguments(folder, "--epochs", 2, "--batch-size", 5, "--grad-accum", 2, "--training.optim", "adamw", "--training.eval_steps", 3,
                     "--training.fsdp", "true")
    command = torchrun(ROOT / "TRAIN.py", *argv)
    two_ranks(folder)
    output, _ = command.communicate(timeout=180)
    assert command.returncode == 0, output
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0]["world_size"] == 2
    return SimpleNamespace(folder=folder, ranks=ranks, output=output)


def test_two_processes_equal_one_process(two, tmp_path):
    single = run(tmp_path, 4, grad_accum=4)
    for name in ("ddp", "ddp-accumulated", "fsdp-adamw", "fsdp-accumulated"):
        log = read_log(two.folder / name)
        for key in ("loss", "odds", "grad_norm", "tokens"):
            assert [r[key] for r in log] == pytest.approx([r[key] for r in single], abs=1e-5), (name, key)
        same(weights(two.folder / name), weights(tmp_path), rtol=0, atol=2e-5)


def test_sharded_muon_equals_unsharded_muon(two, tmp_path):
    single = run(tmp_path, 16, optim="muon")
    log = read_log(two.folder / "fsdp-muon")
    assert [r["loss"] for r in log] == pytest.approx([r["loss"] for r in single], abs=1e-4)


def test_experts_on_two_processes_equal_those_on_one(two, tmp_path):
    """Experts without tokens on one process, router counts summed over processes, and the bias that depends on them."""
    single = run(tmp_path, 4, grad_accum=4, model=build(**EXPERTS))
    for name in ("experts-ddp", "experts-accumulated", "experts-fsdp"):
        log = read_log(two.folder / name)
        for key in ("loss", "odds", "grad_norm", "expert_load", "idle_experts"):
            assert [r[key] for r in log] == pytest.approx([r[key] for r in single], abs=1e-5), (name, key)
        same(weights(two.folder / name), weights(tmp_path), rtol=0, atol=2e-5)
    assert single[0]["idle_experts"] < 0.5 and any(name.endswith("e_score_correction_bias") for name in weights(tmp_path))


def test_saving_gathers_weights_on_the_first_process_only(two):
    first, second = (rank["gathered"] for rank in two.ranks)
    assert first == [[torch.arange(3 * rows).view(rows, 3).tolist() for rows in range(1, 6)], 0]
    assert second == [[[]] * 5, 0]


def test_gradients_flow_through_the_wrapped_forward(two):
    assert max(rank["gradient_difference"] for rank in two.ranks) < 1e-5


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_a_sharded_run_saves_the_same_files_and_resumes(two, optim, tmp_path):
    folder = two.folder / f"fsdp-{optim}"
    same(weights(two.folder / f"fsdp-{optim}-resumed"), weights(folder))
    assert losses(two.folder / f"fsdp-{optim}-resumed") == losses(folder)[3:]
    run(tmp_path, 16, optim=optim, save_steps=3)
    for name in (".", "ckpt-step-000003"):
        assert {p.name for p in (folder / name).iterdir()} - {".lock"} == {p.name for p in (tmp_path / name).iterdir()}
    model = MODEL.load(str(folder))
    batch = batch_of(rows_of_step(50))
    loss, _ = token_loss(model, batch, {"tokens": batch["counts"]["tokens"]})
    assert math.isfinite(loss)
    state = TRAIN.load_state(folder / "ckpt-step-000003")  # full tensors: a single process resumes from them
    again = run(tmp_path / "one", 16, optim=optim, resume=folder / "ckpt-step-000003")
    assert len(state["random"]) == 2
    assert [r["loss"] for r in again] == pytest.approx(losses(folder)[3:], abs=1e-4)


def test_processes_with_sharded_weights_generate_different_numbers_of_completions(two):
    for rank, found in enumerate(two.ranks):
        requests, sharded = requests_of(rank), found["sharded"]
        samplings = [INFER.Sampling(length, temperature=0, ignore_eos=True) for _, length in requests]
        completions = INFER.generate(build().eval(), [prompt for prompt, _ in requests], samplings)
        assert sharded["completions"] == [completion.ids for [completion] in completions]
        assert sharded["losses"][0] == sharded["losses"][1] and not sharded["whole"]


def test_the_held_out_loss_is_the_same_on_all_processes(two):
    with torch.no_grad():
        alone = TRAIN.held_out_loss(held_out_batches(), 2.0)(build().eval())
    for rank in two.ranks:
        assert rank["held_out"] == two.ranks[0]["held_out"] == pytest.approx(alone, rel=1e-6)


def test_a_signal_to_all_processes_ends_the_run_once(two):
    assert [rank["exit_status"] for rank in two.ranks] == [130, 130]


def test_a_torchrun_command_equals_one_process(two, tmp_path):
    """Two epochs of rows that do not fill the last step, compared with one process that accumulates gradients."""
    write(tmp_path / "text.txt", make_text(31))
    train(tmp_path, "--epochs", 2, "--batch-size", 5, "--grad-accum", 4, "--training.optim", "adamw", "--training.eval_steps", 3)
    out = two.folder / "out"
    assert losses(out) == pytest.approx(losses(tmp_path / "out"), abs=1e-5)
    assert two.output.count("parameters,") == 1 and "2 processes" in two.output  # only the first process prints
    assert "Warning" not in two.output
    results = [json.loads((folder / "result.json").read_text()) for folder in (out, tmp_path / "out")]
    for when in ("before", "after"):
        assert results[0][when] == pytest.approx(results[1][when], rel=1e-4)
    assert len(TRAIN.load_state(TRAIN.find_checkpoint(out, "auto"))["random"]) == 2


def test_the_error_for_a_damaged_checkpoint_names_another(tmp_path, text_file):
    out = tmp_path / "out"
    (out / "ckpt-step-000002").mkdir(parents=True)
    (out / "ckpt-step-000004").mkdir()
    with pytest.raises(UserError, match="; try --resume .*ckpt-step-000002"):
        TRAIN.restore_weights(MODEL.build("llama-1m", device="meta"), out / "ckpt-step-000004")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", TRAIN.STATE_FILE])
def test_auto_resumes_from_the_newest_complete_checkpoint(name, tmp_path, text_file, capsys):
    train(tmp_path, "--max-steps", 6, "--training.save_steps", 2, "--training.save_total_limit", 9)
    out, checkpoints = tmp_path / "out", TRAIN.checkpoints(tmp_path / "out")
    whole = {path.name: path.read_bytes() for path in checkpoints[2].iterdir()}
    for harm in (lambda path: path.write_bytes(path.read_bytes()[:100]), Path.unlink):
        harm(checkpoints[2] / name)
        assert TRAIN.find_checkpoint(out, "auto") == checkpoints[1]
        train(tmp_path, "--max-steps", 6, "--training.save_steps", 2, "--training.save_total_limit", 9, "--resume", "auto")
        output = capsys.readouterr().err
        assert output.count(name) == 1 and f"resuming from {checkpoints[1]}" in output
        assert (checkpoints[2] / "model.safetensors").read_bytes() == whole["model.safetensors"]
    for path in checkpoints:
        (path / name).write_bytes(b"{")
    with pytest.raises(UserError, match=f"--resume: .*{name} is missing or damaged, and .* has no complete checkpoint"):
        train(tmp_path, "--max-steps", 6, "--resume", "auto")


def test_overwrite_and_resume_are_mutually_exclusive():
    with pytest.raises(UserError, match="are mutually exclusive"):
        TRAIN.main(["--overwrite", "--resume", "auto"])


def test_muon_optimizes_the_layers_of_transformers_models():
    """Layers are found by their modules, not by names such as model.layers."""
    config = transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    model = MODEL.ForeignModel(transformers.BloomForCausalLM(config))
    muon, _ = TRAIN.make_optimizers(model, TRAIN.TrainingSection(optim="muon", learning_rate=0.1))
    expected = [weight for weight in model.inner.transformer.h.parameters() if weight.dim() == 2]
    assert {id(weight) for group in muon.param_groups for weight in group["params"]} == set(map(id, expected)) and expected


# ------------------------------------------------------------------------------------- changed inputs and errors


@pytest.mark.parametrize("more", [[], ["--data.streaming", "true"]])
def test_changed_data_is_reported_on_resume(more, tmp_path, text_file, capsys):
    train(tmp_path, "--training.save_steps", 2, "--training.save_total_limit", 9, *more)
    first = tmp_path / "out/ckpt-step-000002"
    train(tmp_path, "--resume", first, *more)
    assert "data changed" not in capsys.readouterr().err
    with open(tmp_path / "text.txt", "a") as file:
        file.write("".join(f"Line {i} is new.\n" for i in range(20)))
    train(tmp_path, "--resume", first, *more)
    assert "the training data changed after the checkpoint was saved, so the resumed run will differ" in capsys.readouterr().err


def test_a_resume_that_fails_changes_nothing(tmp_path):
    run(tmp_path, 16, max_steps=4, save_steps=1, save_total_limit=9)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}, (tmp_path / "log.jsonl").read_bytes()
    with pytest.raises(UserError, match="another training.optim"):
        run(tmp_path, 16, max_steps=4, optim="muon", resume=tmp_path / "ckpt-step-000002")
    assert before == ({path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}, (tmp_path / "log.jsonl").read_bytes())


def test_a_changed_base_model_is_an_error_on_resume(tmp_path):
    def train_on(resume=None):
        training = settings(save_steps=2, save_total_limit=9)
        return TRAIN.fit(build(), Ragged(16), token_loss, training, tmp_path / "out", MODEL.save, resume=resume, device=CPU,
                         sources={"model.name": tmp_path / "base"})

    (tmp_path / "out").mkdir()
    MODEL.save(build(), tmp_path / "base")
    train_on()
    train_on(tmp_path / "out/ckpt-step-000002")
    MODEL.save(MODEL.build(build().config, seed=9), tmp_path / "base")
    with pytest.raises(UserError, match="model.name: .*base changed since the checkpoint was written"):
        train_on(tmp_path / "out/ckpt-step-000002")


class Failing(Ragged):
    """Raises an error in the fourth step while `broken` is set."""

    broken = True

    def __next__(self) -> dict:
        if self.step == 3 and not self.queue and self.broken:
            raise UserError("rl.reward_funcs: the service does not answer")
        return super().__next__()


def test_a_failing_stream_leaves_a_checkpoint(tmp_path):
    def fit_stream(stream, folder, resume=None):
        TRAIN.fit(build(), stream, token_loss, settings(), folder, MODEL.save, resume=resume, device=CPU)
        return weights(folder)

    (tmp_path / "whole").mkdir()
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="does not answer; continue with --resume auto .*ckpt-step-000003 is saved"):
        fit_stream(Failing(16), tmp_path / "out")
    stream = Failing(16)
    stream.broken = False
    same(fit_stream(stream, tmp_path / "out", tmp_path / "out/ckpt-step-000003"), fit_stream(Ragged(16), tmp_path / "whole"))


def test_a_run_that_diverged_ends_with_status_1(tmp_path, capsys):
    def ends(values, **more):
        measures = iter(values)
        with pytest.raises(SystemExit) as error:
            run(tmp_path, 16, evaluate=lambda model: next(measures), max_steps=1, **more)
        return error.value.code, capsys.readouterr().err

    code, output = ends([{"loss": 5.0, "perplexity": 148.0}, {"loss": 6.5, "perplexity": 665.0}])
    assert code == 1 and "the run diverged: held-out loss went from 5 to 6.5" in output and "training.learning_rate" in output
    code, output = ends([{"loss": 5.0, "perplexity": 148.0}, {"loss": math.nan, "perplexity": math.nan}])
    assert code == 1 and "held-out loss went from 5 to nan" in output
    measures = iter([{"exact_match": 0.1, "loss": 1.0, "perplexity": 2.7}, {"exact_match": 0.9, "loss": 2.5, "perplexity": 12.0}])
    run(tmp_path, 16, evaluate=lambda model: next(measures), max_steps=1)  # a higher loss, but better answers


def test_without_held_out_data_the_training_loss_detects_divergence(tmp_path, text_file):
    with pytest.raises(SystemExit) as error:
        train(tmp_path, "--data.validation", "none", "--max-steps", 9, "--learning-rate", 30, "--training.optim", "adamw")
    assert error.value.code == 1


@pytest.mark.parametrize("steps, warmup, peak", [(20, 20, 5), (8, 20, 2), (2, 20, 1), (20, 10, 10), (20, 0.9, None)])
def test_a_warmup_of_more_than_half_of_the_run_is_shortened(steps, warmup, peak, tmp_path, capsys):
    rates = [r["learning_rate"] for r in run(tmp_path, 16, max_steps=steps, warmup_steps=warmup, lr_scheduler_type="constant")]
    shortened = "training.warmup_steps" in capsys.readouterr().err
    assert shortened == (peak is not None and warmup > steps / 2)
    assert peak is None or [i for i, rate in enumerate(rates) if rate == max(rates)][0] == peak - 1


@pytest.mark.parametrize("name", ["config.yaml", "config.json", "model.safetensors", "tokenizer.json"])
def test_files_that_no_run_wrote_are_not_overwritten(name, tmp_path, text_file):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    for more in ([], ["--overwrite"]):
        with pytest.raises(UserError, match=f"output.dir: .* contains {name}, which was not written by a run"):
            train(tmp_path, *more)
    assert (out / name).read_text() == "mine" and [path.name for path in out.iterdir() if path.name != ".lock"] == [name]


def test_runs_prepare_a_shared_folder_in_turn(tmp_path, capsys):
    """A second run waits until the first one has written and opened its files."""
    from threading import Event, Thread

    events, inside, leave = [], Event(), Event()

    def first():
        inside.set()
        leave.wait(10)
        events.append("first")

    threads = [Thread(target=TRAIN.first_alone, args=(function,), kwargs={"folder": str(tmp_path)})
               for function in (first, lambda: events.append("second"))]
    threads[0].start()
    inside.wait(10)
    threads[1].start()
    threads[1].join(0.3)
    assert threads[1].is_alive() and f"waiting for another run that is writing to {tmp_path}" in capsys.readouterr().err
    leave.set()
    for thread in threads:
        thread.join(10)
    assert events == ["first", "second"]


def test_accelerate_launch_with_one_cpu_process_prints_how_to_start_several(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_PORT", "29500")
    TRAIN.start_processes(settings(), "cpu", tmp_path)
    assert "torchrun --nproc_per_node 2" in capsys.readouterr().err
