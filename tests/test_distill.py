"""Distillation: losses compared with slow versions, caches compared with the teacher, and complete runs."""

import datetime
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import TINY, foreign_tokenizer, in_file, make_text, two_processes
from safetensors.torch import load_file

import DISTILL
import INFER
import MODEL
import RL
import SFT
import TOKENIZER
import TRAIN
from MODEL import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
G = torch.Generator().manual_seed(0)


def draw(*shape, spread=3.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=G, dtype=torch.float64) * spread).float()


def slow_divergence(student, teacher, beta: float, temperature: float = 1.0) -> torch.Tensor:
    """Token by token in float64: T^2 (beta KL(teacher || m) + (1 - beta) KL(student || m)), or KL(teacher || student) at beta 0 and KL(student || teacher) at beta 1."""
    losses = []
    for s, t in zip(student.double() / temperature, teacher.double() / temperature, strict=True):
        q, p = torch.exp(s) / torch.exp(s).sum(), torch.exp(t) / torch.exp(t).sum()
        if beta == 0:
            losses.append(sum(p[i] * torch.log(p[i] / q[i]) for i in range(len(p))))
        elif beta == 1:
            losses.append(sum(q[i] * torch.log(q[i] / p[i]) for i in range(len(p))))
        else:
            m = [beta * p[i] + (1 - beta) * q[i] for i in range(len(p))]
            losses.append(sum(beta * p[i] * torch.log(p[i] / m[i]) + (1 - beta) * q[i] * torch.log(q[i] / m[i]) for i in range(len(p))))
    return temperature**2 * torch.stack(losses)


def assert_same(fast, slow, inputs: torch.Tensor, tolerance=1e-5) -> None:
    """Equal values, and equal gradients of a weighted sum."""
    torch.testing.assert_close(fast.double(), slow.double(), atol=tolerance, rtol=1e-5)
    weights = torch.rand(fast.shape, generator=G)
    gradient, expected = (torch.autograd.grad((losses * weights).sum(), inputs)[0] for losses in (fast, slow))
    assert gradient.abs().sum() > 0
    torch.testing.assert_close(gradient, expected, atol=tolerance, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_distill_loss_matches_the_published_formula(beta, temperature):
    student, teacher = draw(6, 11).requires_grad_(), draw(6, 11)
    assert_same(DISTILL.distill_loss(student, teacher, beta, temperature), slow_divergence(student, teacher, beta, temperature), student)


def test_distill_loss_has_the_value_of_the_docstring():
    assert float(DISTILL.distill_loss(torch.tensor([0.0, 0.0]), torch.tensor([2.0, 0.0]))) == pytest.approx(0.327, abs=1e-3)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_a_student_equal_to_its_teacher_has_no_gradient(beta):
    logits = draw(5, 2, 40).requires_grad_()
    losses = DISTILL.distill_loss(logits, logits.detach().clone(), beta, 2.0)
    losses.sum().backward()
    assert losses.shape == (5, 2) and losses.abs().max() < 1e-6 and logits.grad.abs().max() < 1e-6


def test_losses_are_finite_if_the_teacher_masks_tokens():
    teacher = draw(3, 8)
    teacher[:, 2] = -math.inf
    for beta in (0.0, 0.5, 1.0):
        student = draw(3, 8).requires_grad_()
        losses = DISTILL.distill_loss(student, teacher, beta)
        losses.sum().backward()
        assert losses.isfinite().all() and student.grad.isfinite().all()


def cached_outputs(teacher: torch.Tensor, k: int, temperature: float) -> tuple:
    logprobs = (teacher / temperature).log_softmax(-1)
    top, ids = logprobs.topk(k, -1)
    return ids, top, (1 - top.double().exp().sum(1)).clamp(min=0).log().float()


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_loss_is_the_divergence_with_the_remaining_tokens_merged(beta, temperature):
    student, teacher = draw(7, 30).requires_grad_(), draw(7, 30)
    ids, top, tail = cached_outputs(teacher, 6, temperature)
    merged = []
    for n in range(7):
        q = (student[n].double() / temperature).softmax(0)
        rest = sum(q[i] for i in range(30) if i not in ids[n])
        merged.append(torch.cat((q[ids[n]], rest[None])).log())
    slow = temperature**2 * slow_divergence(torch.stack(merged), torch.cat((top, tail[:, None]), 1), beta)
    fast = DISTILL.top_k_loss(student, ids, top, tail, beta, temperature)
    assert_same(fast, slow, student)
    assert (fast <= DISTILL.distill_loss(student, teacher, beta, temperature) + 1e-5).all()
    if beta == 0:  # the difference has a closed form
        p, q = ((logits.detach().double() / temperature).softmax(-1).scatter(1, ids, 0) for logits in (teacher, student))
        p_tail, q_tail = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
        lacking = temperature**2 * p.sum(1) * torch.where(p > 0, p_tail * (p_tail / q_tail).log(), 0).sum(1)
        torch.testing.assert_close((fast + lacking).float(), DISTILL.distill_loss(student, teacher, 0.0, temperature), atol=1e-5, rtol=1e-4)


def test_top_k_loss_of_the_whole_vocabulary_is_distill_loss():
    student, teacher = draw(7, 30).requires_grad_(), draw(7, 30)
    for beta in (0.0, 0.5, 1.0):
        assert_same(DISTILL.top_k_loss(student, *cached_outputs(teacher, 30, 1.0), beta), DISTILL.distill_loss(student, teacher, beta), student)


def test_top_k_loss_returns_the_log_probabilities_of_the_targets():
    """Top-k tokens, tail tokens and one of tiny probability as targets: values and gradients, also in a sum with the divergence."""
    student, teacher = draw(6, 30).requires_grad_(), draw(6, 30)
    ids, top, tail = cached_outputs(teacher, 5, 1.0)
    targets = torch.stack([ids[0, 0], ids[1, 3], *(teacher[n].argmin() for n in range(2, 6))])
    with torch.no_grad():
        student[5, targets[5]] = -200.0
    _, chosen = DISTILL.top_k_loss(student, ids, top, tail, 0.0, 1.0, targets)
    assert_same(chosen, -torch.nn.functional.cross_entropy(student, targets, reduction="none"), student)
    losses, chosen = DISTILL.top_k_loss(student, ids, top, tail, 0.0, 1.0, targets)
    joint, separate = losses - 3 * chosen, DISTILL.top_k_loss(student, ids, top, tail) + 3 * torch.nn.functional.cross_entropy(student, targets, reduction="none")
    assert_same(joint, separate, student)


def test_a_tail_of_tiny_probability_has_a_gradient():
    student = torch.tensor([[30.0, 28.0, 0.0, -1.0]], requires_grad=True)
    ids, top, tail = cached_outputs(torch.tensor([[1.0, 0.5, 0.4, 0.0]]), 2, 1.0)
    assert_same(DISTILL.top_k_loss(student, ids, top, tail),
         slow_divergence(torch.cat((student[:, :2], student[:, 2:].logsumexp(1, keepdim=True)), 1), torch.cat((top, tail[:, None]), 1), 0.0), student)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_gradients_in_16_bits_match_float32(dtype, tolerance, scale):
    """Also with loss scaling, tokens of tiny probability, and a student that nearly equals its teacher."""
    teacher = draw(4, 300, spread=2.0)
    student = torch.cat((teacher[:1] + 1e-3 * draw(1, 300), 5 * teacher[1:3], draw(1, 300))).to(dtype)
    student[2] = -8.0
    student[2, 7] = 12.0  # all others have tiny probabilities
    cached = cached_outputs(teacher, 20, 2.0)
    for loss in (lambda s: DISTILL.distill_loss(s, teacher, 0.0, 2.0), lambda s: DISTILL.distill_loss(s, teacher, 0.5, 2.0), lambda s: DISTILL.distill_loss(s, teacher, 1.0, 2.0),
                 lambda s: DISTILL.top_k_loss(s, *cached, 0.0, 2.0)):
        exact, rough = student.float().requires_grad_(), student.clone().requires_grad_()
        (loss(exact).sum() * 1e-4 * scale).backward()
        (loss(rough).sum() * 1e-4 * scale).backward()
        assert rough.grad.isfinite().all() and rough.grad.dtype == dtype
        largest = exact.grad.abs().amax(1, keepdim=True)
        if scale > 1:  # float16 always needs loss scaling
            assert ((rough.grad.float() - exact.grad).abs() / largest).max() < tolerance


def test_hidden_losses():
    student, teacher = draw(4, 6).requires_grad_(), draw(4, 6)
    squared, cosine = DISTILL.hidden_losses(student, teacher)
    assert_same(squared, torch.stack([sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / 6 for s, t in zip(student, teacher, strict=True)]), student)
    slow = [1 - (s * t).sum() / (s.square().sum().sqrt() * t.square().sum().sqrt()) for s, t in zip(student, teacher, strict=True)]
    assert_same(cosine, torch.stack(slow), student)


def test_layer_maps():
    assert DISTILL.spread_layers(2, 6) == {0: 0, 1: 3, 2: 6} and DISTILL.spread_layers(3, 4) == {0: 0, 1: 1, 2: 3, 3: 4}
    assert DISTILL.read_layer_map({0: 0, 2: 6}, 2, 6) == {0: 0, 2: 6}
    for given, message in (({3: 1}, "{3: 1}: expected"), ({1: 7}, "0 (the embeddings) to 2 for the student and 0 to 6 for the teacher"), ({"a": 1}, "expected"), ({}, "expected"),
                           ({True: 1}, "expected")):
        with pytest.raises(UserError, match="distill.layer_map") as error:
            DISTILL.read_layer_map(given, 2, 6)
        assert message in str(error.value)


# ------------------------------------------------------------------------------------------- models and settings


def make_model(folder: Path, tokenizer, seed: int, **knobs) -> Path:
    config = MODEL.ModelConfig(**{**TINY, "vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "initializer_range": 0.2, **knobs})
    MODEL.save(MODEL.build(config, seed=seed), folder)
    TOKENIZER.save(tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def assets(tmp_path_factory, tokenizer):
    """Folders: teacher (of plain text), chat-teacher, chat-student, other (another tokenizer); files: text.txt, conversations.jsonl, prompts.jsonl."""
    folder = tmp_path_factory.mktemp("distill")
    make_model(folder / "teacher", tokenizer, 1, hidden_size=48, num_hidden_layers=3)
    chat = TOKENIZER.train(make_text(400), 330, "bpe")
    TOKENIZER.ensure_chat(chat)
    make_model(folder / "chat-teacher", chat, 2, hidden_size=48, num_hidden_layers=3, eos_token_id=[TOKENIZER.chat_ends(chat).stop[0], chat.eos_token_id, *range(40, 60)])
    make_model(folder / "chat-student", chat, 6)
    other = foreign_tokenizer("unigram", make_text(300, seed=9), 290)
    TOKENIZER.ensure_chat(other)
    make_model(folder / "other", other, 3, hidden_size=48)
    (folder / "text.txt").write_text("\n".join(make_text(150, seed=3)) + "\n")
    lines = make_text(160, seed=5)
    conversations = [{"messages": [{"role": "user", "content": a[:24]}, {"role": "assistant", "content": b}]} for a, b in zip(lines[:80], lines[80:], strict=True)]
    (folder / "conversations.jsonl").write_text("".join(json.dumps(conversation) + "\n" for conversation in conversations))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": line[:30], "answer": "fox"}) + "\n" for line in lines[:40]))
    return folder


STUDENT = "--model.preset llama-1m --model.hidden_size 32 --model.num_hidden_layers 2 --model.num_attention_heads 4 --model.intermediate_size 48 --model.max_position_embeddings 128".split()
QUICK = "--model.device cpu --batch-size 4 --max-length 48 --training.logging_steps 1 --training.sample_tokens 0 --training.mixed_precision no --sft.eval_answers 0".split()


def flags_of(assets, name: str, folder) -> list[str]:
    """A short run of each kind."""
    trained = [*QUICK, "--teacher", assets / "teacher", "--data", assets / "text.txt", "--data.dir", folder / "ids"]
    adapted = [*QUICK, "--teacher", assets / "chat-teacher", "--data", assets / "conversations.jsonl", "--model", assets / "chat-student"]
    text, chat = [*STUDENT, *trained], [*STUDENT, *adapted[:-2]]
    on_policy = ["--lmbda", "0.5", "--rollout-size", "8", "--max-completion-length", "8"]
    flags = {
        "text": text, "chat": chat, "jsd": [*chat, "--beta", "0.5", "--temperature", "2", "--alpha", "0.3"], "hidden": [*text, "--method", "hidden"],
        "hidden-chat": [*chat, "--method", "hidden", "--alpha", "1", "--layer-map", "{2: 3}"],
        "on-policy": [*chat, *on_policy], "on-policy-alone": [*chat, *on_policy, "--lmbda", "1", "--beta", "1", "--alpha", "0"],
        "cache": [*text, "--cache-dir", assets / "cache"], "cache-chat": [*chat, "--cache-dir", assets / "cache-chat"],
        "layers": [*trained, "--init-layers", "[0, 2]"], "lora": [*adapted, "--lora.r", "4", "--alpha", "0.5"],
    }[name]
    return in_file(Path(folder) / f"{name}.yaml", flags, DISTILL, "distill")


KINDS = ("text", "chat", "jsd", "hidden", "hidden-chat", "on-policy", "on-policy-alone", "cache", "cache-chat", "layers", "lora")


def log_of(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def losses_of(folder, key="loss") -> list[float]:
    return [record[key] for record in log_of(folder) if key in record]


def need_cache(assets, name: str, folder) -> None:
    for kind in ("cache", "cache-chat") if name.startswith("cache") else ():
        flags = flags_of(assets, kind, folder)
        if not (assets / kind / "cache.json").exists():
            DISTILL.main(["--cache", *flags, "--cache-top-k", "9999"])


# ---------------------------------------------------------------------------------- a step compared with transformers


def first_batch(monkeypatch, argv: list[str]) -> tuple:
    """(model, first batch, loss function, totals) of a run that stops before its first step."""
    kept = {}

    def fit(model, stream, loss, training, *_, **more):
        model.eval()
        stream.start(TRAIN.Run(model, training, torch.device("cpu"), "no"))
        batch = next(stream)
        kept.update(model=model, batch=batch, loss=loss, totals={**batch["counts"], "micro_batches": 1})
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TRAIN, "fit", fit)
        with pytest.raises(KeyboardInterrupt):
            DISTILL.main(argv)
    return kept["model"], kept["batch"], kept["loss"], kept["totals"]


def transformers_logits(folder, batch: dict, prefix: str = "") -> torch.Tensor:
    """Logits (B, T, V) from transformers, with each segment in a separate forward pass."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids, segments = batch[f"{prefix}input_ids"], batch.get(f"{prefix}segment_ids")
    segments = torch.zeros_like(ids) if segments is None else segments
    out = None
    for r in range(len(ids)):
        for s in range(int(segments[r].max()) + 1):
            there = segments[r] == s
            with torch.no_grad():
                logits = model(ids[r, there][None]).logits[0]
            out = torch.zeros(*ids.shape, logits.shape[-1]) if out is None else out
            out[r, there] = logits
    return out


@pytest.mark.parametrize("name", ["text", "jsd"])
def test_the_loss_of_a_step_matches_transformers(name, assets, tmp_path, monkeypatch):
    """alpha cross-entropy + (1 - alpha) divergence over the trained tokens, and its gradient."""
    flags = [*flags_of(assets, name, tmp_path), "--data.packing", "false", "--out", str(tmp_path / "run")]
    model, batch, loss_fn, totals = first_batch(monkeypatch, flags)
    if name == "jsd":  # conversations with different weights
        batch["weights"] = batch["weights"] * (1 + torch.arange(len(batch["weights"]))[:, None] % 2)
        totals = {**totals, "tokens": float(batch["weights"].sum())}
    loss, metrics = loss_fn(model, batch, totals)
    loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    beta, temperature, alpha = (0.0, 1.0, 0.1) if name == "text" else (0.5, 2.0, 0.3)
    student = model(batch["input_ids"], positions=batch.get("positions"), segment_ids=batch.get("segment_ids")).logits
    teacher, mask = transformers_logits(assets / ("teacher" if name == "text" else "chat-teacher"), batch), batch["targets"] != -100
    weights = torch.ones(int(mask.sum())) if batch["weights"] is None else batch["weights"][mask]
    assert 0 < mask.sum() < mask.numel() and len(weights.unique()) == (2 if name == "jsd" else 1)
    divergence = (slow_divergence(student[mask], teacher[mask], beta, temperature) * weights).sum() / weights.sum()
    nll = (torch.nn.functional.cross_entropy(student[mask], batch["targets"][mask], reduction="none") * weights).sum() / weights.sum()
    slow = alpha * nll + (1 - alpha) * divergence
    assert float(loss) == pytest.approx(float(slow), abs=1e-5) and float(metrics["divergence"]) == pytest.approx(float(divergence), abs=1e-5)
    slow.backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(gradients[name], weight.grad.float(), atol=1e-5, rtol=1e-4, msg=name)


def test_hidden_state_losses_match_transformers(assets, tmp_path, monkeypatch):
    flags = [*flags_of(assets, "hidden", tmp_path), "--data.packing", "false", "--alpha", "1", "--layer-map", "{0: 0, 1: 3}", "--cosine-weight", "0.5", "--out", str(tmp_path / "run")]
    model, batch, loss_fn, totals = first_batch(monkeypatch, flags)
    loss, metrics = loss_fn(model, batch, totals)
    teacher = transformers.AutoModelForCausalLM.from_pretrained(assets / "teacher", dtype=torch.float32, output_hidden_states=True).eval()
    squared = cosine = 0.0
    real = batch["positions"] >= 0
    for r in range(len(real)):
        ids = batch["input_ids"][r, real[r]][None]
        with torch.no_grad():
            theirs, ours = teacher(ids).hidden_states, model.backbone(ids, None, None, None, None, True)
        for layer, teacher_layer in ((0, 0), (1, 3)):
            projected = ours[1][layer][0] @ model.projections[str(layer)].weight.T
            squared += float(((projected - theirs[teacher_layer][0]) ** 2).mean(1).sum()) / 2 / totals["tokens"]
            cosine += float((1 - torch.nn.functional.cosine_similarity(projected, theirs[teacher_layer][0])).sum()) / 2 / totals["tokens"]
    assert float(metrics["hidden_mse"]) == pytest.approx(squared, abs=1e-4) and float(metrics["hidden_cosine"]) == pytest.approx(cosine, abs=1e-4)
    assert float(loss) == pytest.approx(float(metrics["nll"]) + squared + 0.5 * cosine, abs=1e-4)


# ------------------------------------------------------------------------------------------------- cached teacher


def test_training_from_a_full_cache_matches_training_with_the_teacher(assets, tmp_path):
    """With the full vocabulary in float32, losses are equal to 1e-6 on text and conversations. With top-k they are close."""
    for kind in ("text", "chat"):
        flags = [*flags_of(assets, kind, tmp_path), "--max-steps", "12", "--training.optim", "adamw", "--learning-rate", "1e-4"]
        DISTILL.main([*flags, "--out", str(tmp_path / kind)])
        found = {}
        for name, more in (("whole", ["--cache-top-k", "9999", "--cache-dtype", "float32"]), ("some", ["--cache-top-k", "64"])):
            cache = ["--cache-dir", str(tmp_path / f"{kind}-{name}-cache")]
            DISTILL.main(["--cache", *flags, *cache, *more])
            DISTILL.main([*flags, *cache, "--out", str(tmp_path / f"{kind}-{name}"), "--seed", "0"])
            found[name] = losses_of(tmp_path / f"{kind}-{name}")
        online = losses_of(tmp_path / kind)
        assert found["whole"] == pytest.approx(online, abs=1e-6) and len(online) == 12
        assert all(0.9 * full < part < full for full, part in zip(online, found["some"], strict=True))  # a lower bound, close if tails are small
        facts = json.loads((tmp_path / f"{kind}-some-cache" / "cache.json").read_text())
        size = sum(path.stat().st_size for path in (tmp_path / f"{kind}-some-cache").glob("*.bin"))
        assert size / facts["tokens"] == 64 * (2 + 2) + 4 <= 300


def test_a_large_vocabulary_is_cached_with_32_bit_ids(tmp_path):
    facts = {"tokens": 10, "top_k": 64, "vocab_size": 2**16 + 1, "logprobs": "float16"}
    cache = DISTILL.Cache(tmp_path, facts, "r+", create=True)
    ids = torch.arange(640).view(10, 64) + 70_000
    cache.write(0, ids, -torch.rand(10, 64), -torch.rand(10))
    assert torch.equal(DISTILL.Cache(tmp_path, facts).read([slice(0, 4), slice(4, 10)])["cached_ids"], ids)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.bin")) / 10 <= 420


def test_a_cache_is_valid_for_every_seed_and_epoch(assets, tmp_path):
    """Row boundaries do not change, and each row keeps its cached outputs."""
    need_cache(assets, "cache", tmp_path)
    flags = flags_of(assets, "cache", tmp_path)
    for seed in ("0", "7"):
        DISTILL.main([*flags, "--epochs", "2", "--seed", seed, "--out", str(tmp_path / f"cached{seed}")])
        DISTILL.main([*flags_of(assets, "text", tmp_path), "--epochs", "2", "--seed", seed, "--out", str(tmp_path / f"online{seed}")])
        assert losses_of(tmp_path / f"cached{seed}", "divergence") == pytest.approx(losses_of(tmp_path / f"online{seed}", "divergence"), rel=0.01)
    assert losses_of(tmp_path / "cached0")[1:] != losses_of(tmp_path / "cached7")[1:]


def interrupted(monkeypatch, module, name: str, calls: int) -> list:
    """Ctrl-C at a call of module.name after so many calls; the arguments of all calls are recorded."""
    usual, seen = getattr(module, name), []

    def call(*arguments, **more):
        seen.append(arguments)
        if len(seen) == calls + 1:
            raise KeyboardInterrupt
        return usual(*arguments, **more)

    monkeypatch.setattr(module, name, call)
    return seen


def test_an_interrupted_cache_continues_with_the_same_settings_only(assets, tmp_path, monkeypatch):
    flags = [*flags_of(assets, "text", tmp_path), "--batch-size", "1", "--cache", "--cache-dir", str(tmp_path / "cache")]
    calls = interrupted(monkeypatch, DISTILL, "top_k_outputs", 40)
    with pytest.raises(KeyboardInterrupt):
        DISTILL.main(flags)
    assert json.loads((tmp_path / "cache" / "cache.part.json").read_text())["done"] == 32
    with pytest.raises(UserError, match="has no finished cache; write it with"):
        DISTILL.Cache.open(tmp_path / "cache")
    for more, message in ((["--training.mixed_precision", "bf16"], "started with a different mixed_precision"), (["--cache-top-k", "9"], r"started with a different top_k \(64\)"),
                        (["--teacher", str(assets / "chat-teacher"), "--task", "text"], "started with a different teacher")):
        with pytest.raises(UserError, match=message):
            DISTILL.main([*flags, *more])
    (tmp_path / "cache" / "entries.bin").rename(tmp_path / "entries")
    with pytest.raises(UserError, match="entries.bin has 0 bytes instead of"):
        DISTILL.main(flags)
    (tmp_path / "entries").rename(tmp_path / "cache" / "entries.bin")
    DISTILL.main(flags)
    rows = len(calls) - 1 - (40 - 32)  # the first 32 rows are not computed again
    DISTILL.main([*flags, "--overwrite"])
    assert len(calls) - 1 - (40 - 32) - rows == rows > 40


def test_a_mismatched_cache_is_an_error(assets, tmp_path):
    need_cache(assets, "cache", tmp_path)
    flags = [*flags_of(assets, "cache", tmp_path), "--max-steps", "2", "--out", str(tmp_path / "run")]
    (tmp_path / "other.txt").write_text("\n".join(make_text(150, seed=8)) + "\n")
    made = "was written with .*teacher and a different "
    cases = {("--data", tmp_path / "other.txt"): f"{made}data", ("--data.packing", "false"): f"{made}data", ("--teacher", assets / "chat-teacher"): f"{made}teacher weights; restore it",
             ("--temperature", "2"): rf"{made}temperature \(1.0\)", ("--max-length", "32"): rf"{made}data, max_length \(48\)",
             ("--cache-dir", tmp_path / "none"): "has no cache; write it with DISTILL.py --cache"}
    for more, message in cases.items():
        with pytest.raises(UserError, match=message):
            DISTILL.main([*flags, *map(str, more)])
    with pytest.raises(UserError, match="has a complete cache; train with it, or replace it with --overwrite"):
        DISTILL.main(["--cache", *flags[:-2]])
    path = assets / "cache" / "entries.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(UserError, match="entries.bin is missing or damaged; write the cache again with --cache --overwrite"):
        DISTILL.main(flags)
    path.write_bytes(whole)
    DISTILL.main(flags)


def test_a_cache_replaces_the_teacher(assets, tmp_path, capsys, monkeypatch):
    need_cache(assets, "cache-chat", tmp_path)
    flags = [*flags_of(assets, "cache-chat", tmp_path), "--teacher", str(tmp_path / "gone"), "--max-steps", "2", "--out", str(tmp_path / "run")]
    monkeypatch.setattr(DISTILL, "load_teacher", None)
    DISTILL.main(flags)
    assert f"{tmp_path / 'gone'} does not exist; using the cached outputs of {assets / 'chat-teacher'}" in capsys.readouterr().err
    assert TOKENIZER.load(tmp_path / "run").chat_template


# ------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("name", KINDS)
def test_every_method_learns_and_resumes_exactly(name, assets, tmp_path):
    need_cache(assets, name, tmp_path)
    steps = 10
    flags = [*flags_of(assets, name, tmp_path), "--max-steps", str(steps), "--training.save_steps", "5", "--training.save_total_limit", "9"]
    result = DISTILL.main([*flags, "--out", str(tmp_path / "whole")])
    saved = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert saved["stage"] == "distill" and saved["measure"] == "loss" and saved["after"] == result.after
    losses = losses_of(tmp_path / "whole")
    assert losses[-1] < losses[0] and all(map(math.isfinite, losses))
    if name != "on-policy-alone":
        assert saved["after"]["loss"] < saved["before"]["loss"]
    again = DISTILL.main([*flags, "--out", str(tmp_path / "again"), "--resume", str(tmp_path / "whole" / "ckpt-step-000005")])
    assert again.after == result.after
    other = losses_of(tmp_path / "again")
    assert len(losses) == steps and losses[5:] == other[-5:]
    if name == "lora":
        MODEL.load(str(assets / "chat-student"), adapter=tmp_path / "whole")
        return
    assert not any("projections" in key for key in load_file(tmp_path / "whole" / "model.safetensors"))
    theirs, ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval(), MODEL.load(tmp_path / "whole")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-4, rtol=1e-4)


def test_resuming_from_another_method_is_an_error(assets, tmp_path):
    flags = [*flags_of(assets, "on-policy", tmp_path), "--max-steps", "2", "--out", str(tmp_path / "mixed")]
    DISTILL.main(flags)
    DISTILL.main([*flags_of(assets, "chat", tmp_path), "--max-steps", "2", "--out", str(tmp_path / "plain")])
    with pytest.raises(KeyError):  # which TRAIN turns into "was made by another method"
        DISTILL.TeacherStream(None, "mark").load_state_dict({"mixed": 1, "data": {}})
    with pytest.raises(UserError, match="was made with distill.lmbda 0"):
        DISTILL.main(["--lmbda", "0.5", "--rollout-size", "8", "--max-completion-length", "8", "--out", str(tmp_path / "plain"), "--resume", "auto"])


def test_resuming_with_a_changed_teacher_is_an_error(assets, tmp_path):
    make_model(tmp_path / "teacher", TOKENIZER.load(assets / "teacher"), 1)
    flags = [*flags_of(assets, "text", tmp_path), "--teacher", str(tmp_path / "teacher"), "--out", str(tmp_path / "run")]
    DISTILL.main([*flags, "--max-steps", "1"])
    assert DISTILL.main([*flags, "--max-steps", "2", "--resume", "auto"]).steps == 2
    make_model(tmp_path / "teacher", TOKENIZER.load(assets / "teacher"), 2)
    with pytest.raises(UserError, match="^--resume: distill.teacher is not the model that the checkpoint was trained with, or its weights have changed; start"):
        DISTILL.main([*flags, "--max-steps", "3", "--resume", "auto"])
    assert DISTILL.main([*flags, "--max-steps", "3", "--alpha", "1", "--resume", "auto"]).steps == 3  # it is no longer used


def test_the_held_out_divergence_matches_transformers(assets, tmp_path):
    """It is the mean over all held-out targets, with beta and temperature of the training. The loss comes first and selects the best model."""
    flags = [*flags_of(assets, "text", tmp_path), "--data.packing", "false", "--beta", "0.5", "--temperature", "2", "--max-steps", "1", "--out", str(tmp_path / "run")]
    result = DISTILL.main(flags)
    assert list(result.after)[0] == "loss" and result.after["divergence"] == losses_of(tmp_path / "run", "eval_divergence")[-1]
    student, teacher = (transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in (tmp_path / "run", assets / "teacher"))
    ids = TOKENIZER.open_tokens(tmp_path / "ids" / "val_ids.bin", TOKENIZER.load(assets / "teacher"))
    spans, losses = TOKENIZER.Spans(ids), []
    for start, length in zip(spans.starts, spans.lengths, strict=True):
        for first in range(start, start + length, 48):
            row = torch.from_numpy(ids.ids[first : min(first + 48, start + length)].astype(np.int64))[None]
            with torch.no_grad():
                losses.append(DISTILL.distill_loss(student(row).logits[0], teacher(row).logits[0], 0.5, 2.0))
    assert result.after["divergence"] == pytest.approx(float(torch.cat(losses).mean()), abs=1e-5) and torch.cat(losses).mean() > 0.1
    need_cache(assets, "cache", tmp_path)
    for name, more in (("cache", []), ("text", ["--alpha", "1"])):  # without a teacher for the held-out rows
        assert "divergence" not in DISTILL.main([*flags_of(assets, name, tmp_path), *more, "--max-steps", "1", "--out", str(tmp_path / f"{name}{len(more)}")]).after


def test_lmbda_is_the_fraction_of_on_policy_steps(assets, tmp_path):
    flags = [*flags_of(assets, "on-policy", tmp_path), "--max-steps", "8", "--out", str(tmp_path / "run")]
    DISTILL.main(flags)
    log = [record for record in log_of(tmp_path / "run") if "loss" in record]
    assert [("divergence_on_policy" in record, "nll" in record) for record in log] == [(False, True), (True, False)] * 4
    rollouts = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert len(rollouts) == 16 and set(rollouts[0]) == {"rollout", "prompt", "completion", "tokens", "finish_reason"}
    assert any("completions/mean_length" in record for record in log)


def test_the_on_policy_loss_is_the_divergence_on_completions(assets, tmp_path, monkeypatch):
    flags = [*flags_of(assets, "on-policy-alone", tmp_path), "--beta", "0.5", "--out", str(tmp_path / "run")]
    model, batch, loss_fn, totals = first_batch(monkeypatch, flags)
    mask = batch["targets"] != -100
    real = batch["positions"] >= 0
    assert batch["sampled"] and mask.any() and (mask <= real).all() and mask.sum() < real.sum()
    loss, metrics = loss_fn(model, batch, totals)
    teacher = transformers_logits(assets / "chat-teacher", {**batch, "segment_ids": torch.where(real, 0, -1)})
    student = model(batch["input_ids"], positions=batch["positions"]).logits
    slow = slow_divergence(student[mask], teacher[mask], 0.5).mean()
    assert float(loss) == pytest.approx(float(slow), abs=1e-5) == float(metrics["divergence_on_policy"])


def test_the_student_is_initialized_with_teacher_layers(assets, tmp_path):
    DISTILL.main([*flags_of(assets, "layers", tmp_path), "--max-steps", "1", "--learning-rate", "1e-12", "--training.weight_decay", "0", "--out", str(tmp_path / "run")])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(assets / "teacher", dtype=torch.float32).eval()
    theirs.model.layers = torch.nn.ModuleList([theirs.model.layers[i] for i in (0, 2)])
    for i, layer in enumerate(theirs.model.layers):
        layer.self_attn.layer_idx = i
    theirs.config.num_hidden_layers = 2
    ids = torch.arange(30)[None]
    with torch.no_grad():
        torch.testing.assert_close(MODEL.load(tmp_path / "run")(ids).logits, theirs(ids, use_cache=False).logits, atol=1e-4, rtol=1e-4)
    for given, message in (("[0, 3]", r"\[0, 3\]: expected layers of the teacher, 0 to 2"), ("[]", "expected layers")):
        with pytest.raises(UserError, match=message):
            DISTILL.main([*flags_of(assets, "layers", tmp_path), "--init-layers", given, "--out", str(tmp_path / "no")])
    with pytest.raises(UserError, match="the student has the teacher's architecture; leave out --model"):
        DISTILL.main([*flags_of(assets, "text", tmp_path), "--init-layers", "[0]", "--out", str(tmp_path / "no")])


def test_two_processes_match_one_process(assets, tmp_path):
    """Two processes with 2 rows match one process with 2 x 2, and write the same cache and completions."""
    names = ("text", "hidden", "on-policy", "cache", "text-sharded")
    need_cache(assets, "cache", tmp_path)
    sharded = {"text-sharded": ["--training.fsdp", "true"]}
    runs = {name: in_file(tmp_path / f"run-{name}.yaml", [*flags_of(assets, name.removesuffix("-sharded"), tmp_path), *sharded.get(name, []), "--batch-size", "2", "--max-steps", "4",
                                                           "--out", tmp_path / name], DISTILL, "distill") for name in names}
    cache = ["--cache", "--cache-top-k", "9999", *flags_of(assets, "text", tmp_path), "--batch-size", "3", "--cache-dir", str(tmp_path / "two-cache")]
    generation = ["--generate", "--model.device", "cpu", "--teacher", str(assets / "chat-teacher"), "--data", str(assets / "prompts.jsonl"), "--sampling", "{n: 3, temperature: 1, max_new_tokens: 40}", "--reward-funcs", "regex:fox",
                  "length:9"]
    generated = [*generation, "--batch-size", "2", "--out", str(tmp_path / "two.jsonl")]
    two_processes(tmp_path, {"DISTILL": [*runs.values(), cache, generated]})
    for name, argv in runs.items():
        single = tmp_path / f"{name}-single"
        DISTILL.main([*argv, "--training.fsdp", "false", "--grad-accum", "2", "--out", str(single)])
        for key in ("loss", "divergence", "grad_norm", "hidden_mse", "divergence_on_policy"):
            assert losses_of(tmp_path / name, key) == pytest.approx(losses_of(single, key), abs=1e-5), (name, key)
        assert len(losses_of(single)) == 4
        results = [json.loads((folder / "result.json").read_text()) for folder in (tmp_path / name, single)]
        assert results[0]["after"] == pytest.approx(results[1]["after"], abs=1e-4), name
    facts, expected = (json.loads((folder / "cache.json").read_text()) for folder in (tmp_path / "two-cache", assets / "cache"))
    assert facts == expected
    two, single = DISTILL.Cache.open(tmp_path / "two-cache"), DISTILL.Cache.open(assets / "cache")
    assert np.allclose(two.entries["tail"], single.entries["tail"], atol=1e-4) and (two.entries["ids"][:, 0] == single.entries["ids"][:, 0]).mean() > 0.999
    DISTILL.main([*generation, "--out", str(tmp_path / "single.jsonl")])
    assert (tmp_path / "two.jsonl").read_text() == (tmp_path / "single.jsonl").read_text()


# --------------------------------------------------------------------------------------------- kinds of teachers


@pytest.mark.parametrize("more", [["--teacher-quantization", "nf4"], ["--teacher-quantization", "llm_int8"], ["--teacher-dtype", "bfloat16"], ["--training.mixed_precision", "bf16"]])
def test_quantized_and_16_bit_teachers(more, assets, tmp_path):
    DISTILL.main([*flags_of(assets, "text", tmp_path), "--max-steps", "2", "--out", str(tmp_path / "exact"), "--alpha", "0"])
    DISTILL.main([*flags_of(assets, "text", tmp_path), *more, "--max-steps", "2", "--out", str(tmp_path / "rough"), "--alpha", "0"])
    exact, rough = losses_of(tmp_path / "exact", "divergence"), losses_of(tmp_path / "rough", "divergence")
    assert rough != exact and rough == pytest.approx(exact, rel=0.3)


def test_teachers_of_transformers_and_with_adapters(assets, tmp_path, tokenizer):
    """GPT-NeoX with a padded vocabulary, and a teacher with an adapter."""
    config = transformers.GPTNeoXConfig(vocab_size=384, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=128,
                                        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, initializer_range=0.2)
    transformers.GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "neox")
    TOKENIZER.save(tokenizer, tmp_path / "neox")
    DISTILL.main([*flags_of(assets, "text", tmp_path), "--teacher", str(tmp_path / "neox"), "--method", "hidden", "--max-steps", "4", "--out", str(tmp_path / "run")])
    assert losses_of(tmp_path / "run")[-1] < losses_of(tmp_path / "run")[0]
    flags = in_file(tmp_path / "settings.yaml", [*flags_of(assets, "text", tmp_path), "--teacher", tmp_path / "neox", "--cache-dir", tmp_path / "cache"], DISTILL, "distill")
    DISTILL.main(["--cache", *flags, "--cache-top-k", "999", "--cache-dtype", "float32"])  # without the padding of the vocabulary
    assert json.loads((tmp_path / "cache" / "cache.json").read_text())["top_k"] == len(tokenizer) < 384
    for name, more in (("cached-run", ["--cache-dir", str(tmp_path / "cache")]), ("online-run", ["--cache-dir", "null"])):
        DISTILL.main([*flags, *more, "--max-steps", "2", "--out", str(tmp_path / name)])
    assert losses_of(tmp_path / "cached-run") == pytest.approx(losses_of(tmp_path / "online-run"), abs=1e-5)
    DISTILL.main([*flags_of(assets, "lora", tmp_path), "--max-steps", "6", "--learning-rate", "1e-2", "--out", str(tmp_path / "adapter")])
    DISTILL.main([*flags_of(assets, "chat", tmp_path), "--max-steps", "2", "--alpha", "0", "--out", str(tmp_path / "plain")])
    DISTILL.main([*flags_of(assets, "chat", tmp_path), "--teacher", str(tmp_path / "adapter"), "--max-steps", "2", "--alpha", "0", "--out", str(tmp_path / "adapted")])
    assert losses_of(tmp_path / "plain") != losses_of(tmp_path / "adapted")


def test_an_encoder_teaches_an_encoder(assets, tmp_path, capsys):
    tokenizer = TOKENIZER.train(make_text(300), 300, "bpe")
    bert = ["--model.preset", "bert-2m", "--model.hidden_size", "32", "--model.num_hidden_layers", "2", "--model.num_attention_heads", "4", "--model.intermediate_size", "48"]
    MODEL.save(MODEL.build(MODEL.preset_config("bert-2m", vocab_size=len(tokenizer), hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
                                               initializer_range=0.2), seed=1), tmp_path / "bert")
    TOKENIZER.save(tokenizer, tmp_path / "bert")
    flags = in_file(tmp_path / "settings.yaml", [*bert, *QUICK, "--teacher", tmp_path / "bert", "--data", assets / "text.txt", "--data.dir", tmp_path / "ids", "--max-steps", "6", "--out", tmp_path / "run"],
                    DISTILL, "distill")
    DISTILL.main([*flags, "--method", "hidden"])
    losses = losses_of(tmp_path / "run")
    assert losses[-1] < losses[0] and "nll" in log_of(tmp_path / "run")[1]
    with pytest.raises(UserError, match="is an encoder, but the student is not"):
        DISTILL.main([*flags, *STUDENT, "--out", str(tmp_path / "no")])
    with pytest.raises(UserError, match="--cache: data.streaming, data.weights and encoders change the rows"):
        DISTILL.main([*flags, "--cache", "--cache-dir", str(tmp_path / "cache")])


def test_the_output_folder_must_not_be_an_input(assets, tmp_path):
    need_cache(assets, "cache", tmp_path)
    text = [*flags_of(assets, "text", tmp_path), "--max-steps", "1", "--overwrite"]
    before = (assets / "teacher" / "config.json").read_bytes()
    for more, message in ((["--out", assets / "teacher"], "is an input of the run .--teacher"),
                          (["--cache-dir", assets / "cache", "--out", assets / "cache"], "is an input of the run .--cache-dir"),
                          (["--cache", "--cache-dir", assets / "teacher"], "is an input of the run .--teacher"), (["--cache", "--cache-dir", assets / "other"], "contains a model")):
        with pytest.raises(UserError, match=message):
            DISTILL.main([*text, *map(str, more)])
    assert (assets / "teacher" / "config.json").read_bytes() == before and DISTILL.Cache.open(assets / "cache")


def test_a_full_disk_is_an_error_in_one_line(assets, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="cache/cache.part.json: the disk is full; free some space and run the same command again to continue"):
        DISTILL.main([*flags_of(assets, "text", tmp_path), "--cache", "--cache-dir", str(tmp_path / "cache")])
    monkeypatch.setattr(DISTILL, "append", full)
    with pytest.raises(UserError, match="out.jsonl.part.json: the disk is full"):
        generate(assets, tmp_path / "out.jsonl")


def test_hidden_states_of_a_foreign_teacher_match_transformers(assets, tmp_path, tokenizer):
    config = transformers.BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    bloom = transformers.BloomForCausalLM(config).eval()
    bloom.save_pretrained(tmp_path / "bloom")
    TOKENIZER.save(tokenizer, tmp_path / "bloom")
    model, ids = MODEL.load(tmp_path / "bloom"), torch.arange(12).view(1, 12) % len(tokenizer)
    segments = torch.tensor([[0] * 5 + [1] * 7])
    with torch.no_grad():
        packed = model(ids, segment_ids=segments, want=("hidden_states",)).hidden_states
        alone = [bloom(part, output_hidden_states=True).hidden_states for part in (ids[:, :5], ids[:, 5:])]
    for state, *parts in zip(packed, *alone, strict=True):
        torch.testing.assert_close(state, torch.cat(parts, 1), atol=1e-5, rtol=1e-4)
    flags = [*flags_of(assets, "text", tmp_path), "--teacher", str(tmp_path / "bloom"), "--max-steps", "2", "--out", str(tmp_path / "run")]
    DISTILL.main([*flags, "--method", "hidden"])
    steps = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert any(key.startswith("hidden") or "cosine" in key for step in steps for key in step)


def test_the_fingerprint_of_an_adapter_includes_its_base_model(assets, tmp_path):
    shutil.copytree(assets / "chat-student", tmp_path / "base")
    flags = [*flags_of(assets, "lora", tmp_path), "--model", str(tmp_path / "base"), "--max-steps", "1", "--out", str(tmp_path / "adapter")]
    DISTILL.main(flags)
    before = DISTILL.fingerprint_of(str(tmp_path / "adapter"))
    assert before == DISTILL.fingerprint_of(str(tmp_path / "adapter"))
    make_model(tmp_path / "base", TOKENIZER.load(assets / "chat-student"), 77)
    assert DISTILL.fingerprint_of(str(tmp_path / "adapter")) != before


def test_the_steps_per_epoch_include_on_policy_steps():
    """Also for fractions that are not exact in binary."""
    for share, steps in ((0.8, 500), (0.9, 1000), (0.5, 200), (0.3, 143)):
        mixed = DISTILL.Mixed(type("", (), {"start": lambda self, run: None, "steps_per_epoch": 100})(), type("", (), {"start": lambda self, run: None, "metrics": None})(), share)
        mixed.start(None)
        assert mixed.steps_per_epoch == steps


def test_the_student_adopts_the_chat_template_of_the_teacher(assets, tmp_path):
    """The student is pretrained without a chat template; the teacher has one."""
    make_model(tmp_path / "plain", TOKENIZER.train(make_text(400), 330, "bpe"), 5)
    flags = [*flags_of(assets, "lora", tmp_path), "--lora.r", "0", "--alpha", "0.1"]
    DISTILL.main([*flags, "--model", str(tmp_path / "plain"), "--max-steps", "2", "--out", str(tmp_path / "run")])
    tokenizer, model = TOKENIZER.load(tmp_path / "run"), MODEL.load(tmp_path / "run")
    assert tokenizer.chat_template and model.config.vocab_size >= len(tokenizer) and TOKENIZER.chat_ends(tokenizer).stop[0] in model.config.eos_ids


# --------------------------------------------------------------------------------------- generated training data


def generate(assets, out, *more, **sampling) -> list[dict]:
    usual = ["--model.device", "cpu", "--teacher", assets / "chat-teacher", "--data", assets / "prompts.jsonl"]
    more = [*more, "--sampling", json.dumps({"max_new_tokens": 40, "temperature": 1 if sampling.get("n") else 0, **sampling})]
    DISTILL.main(["--generate", *in_file(Path(f"{out}.yaml"), usual, DISTILL, "distill"), "--out", str(out), *map(str, more)])
    return [json.loads(line) for line in Path(out).read_text().splitlines()]


def test_completions_do_not_depend_on_the_batch_size(assets, tmp_path):
    single = generate(assets, tmp_path / "single.jsonl", "--batch-size", "1")
    batched = generate(assets, tmp_path / "batched.jsonl", "--batch-size", "64")
    assert single == batched and len(single) > 5
    model, tokenizer = MODEL.load(assets / "chat-teacher"), TOKENIZER.load(assets / "chat-teacher")
    for record in single[:4]:
        ids = TOKENIZER.render_chat(tokenizer, record["messages"][:-1], add_generation_prompt=True).ids
        [[expected]] = INFER.generate(model, [ids], INFER.Sampling(40, 0), tokenizer, use_cache=False)
        assert record["messages"][-1] == {"role": "assistant", "content": expected.text} and record["answer"] == "fox"
    config = MODEL.load_config(["--data", str(tmp_path / "single.jsonl"), "--data.validation", "none"], SFT.SECTIONS, "sft", SFT.ACTIONS)
    assert len(SFT.read_conversations(config, tokenizer)[0]) == len(single)


def test_the_best_completion_is_kept(assets, tmp_path):
    every = generate(assets, tmp_path / "all.jsonl", "--seed", "3", n=4)
    rewards = ["--seed", "3", "--reward-funcs", "length:4", "regex:fox"]
    best = generate(assets, tmp_path / "best.jsonl", *rewards, n=4)
    by_prompt: dict[str, list[str]] = {}
    for record in every:
        by_prompt.setdefault(record["messages"][0]["content"], []).append(record["messages"][1]["content"])
    assert max(map(len, by_prompt.values())) > 1 and [record["messages"][0]["content"] for record in best] == list(by_prompt)
    for record in best:
        assert record["messages"][1]["content"] in by_prompt[record["messages"][0]["content"]] and 0 <= record["reward"] <= 2
    good = generate(assets, tmp_path / "good.jsonl", *rewards, "--reward-threshold", "1", n=4)
    assert good == [record for record in best if record["reward"] >= 1] and 0 < len(good) < len(best)


def test_filtering_of_completions():
    prompt = RL.Prompt("f:1", "Hi", [1], {})
    given = [RL.Sample(prompt, 0, [2], finish, text, None) for finish, text in (("stop", "a"), ("stop", "b"), ("stop", "a"), ("length", "c"), ("stop", " "))]
    for sample, reward in zip(given, (1.0, 3.0, 1.0, 9.0, 9.0), strict=True):
        sample.reward = reward
    best = lambda **knobs: [sample.text for sample in DISTILL.best(given, DISTILL.DistillSection(sampling={"n": 5}, **knobs))]  # noqa: E731
    assert best() == ["a", "b"] and best(reward_funcs=["regex:a"]) == ["b"]
    assert best(reward_funcs=["regex:a"], reward_threshold=3.0) == ["b"] and best(reward_funcs=["regex:a"], reward_threshold=3.1) == []


def test_generation_refuses_changed_reward_functions_on_resume(assets, tmp_path):
    """A changed file of reward functions is an error. A run without usable completions leaves no files behind."""
    rewards = tmp_path / "rewards.py"
    rewards.write_text("def f(completions, **_):\n    return [1.0 for _ in completions]\n")
    flags = ["--batch-size", "2", "--reward-funcs", f"{rewards}:f"]
    usual = RL.Judges.__call__
    calls = []

    def stop(self, samples):
        calls.append(len(samples))
        if len(calls) == 3:
            raise KeyboardInterrupt
        usual(self, samples)

    RL.Judges.__call__ = stop
    try:
        with pytest.raises(KeyboardInterrupt):
            generate(assets, tmp_path / "out.jsonl", *flags, n=2)
    finally:
        RL.Judges.__call__ = usual
    rewards.write_text("def f(completions, **_):\n    return [-5.0 for _ in completions]\n")
    with pytest.raises(UserError, match="out.jsonl.part.json was started with a different reward_funcs; --overwrite starts again"):
        generate(assets, tmp_path / "out.jsonl", *flags, n=2)
    assert {record["reward"] for record in generate(assets, tmp_path / "out.jsonl", *flags, "--overwrite", n=2)} == {-5.0}
    with pytest.raises(UserError, match=r"--generate: no completion that ended within max_new_tokens \(1\); raise max_new_tokens in"):
        generate(assets, tmp_path / "short.jsonl", max_new_tokens=1)
    assert generate(assets, tmp_path / "short.jsonl") and not list(tmp_path.glob("*.part*")) and not list(tmp_path.glob(".*.lock"))


def test_interrupted_answers_continue_with_the_same_settings_only(assets, tmp_path, monkeypatch):
    flags = [str(word) for word in ["--generate", "--model.device", "cpu", "--teacher", assets / "chat-teacher", "--data", assets / "prompts.jsonl",
                                    "--sampling", "{temperature: 0, max_new_tokens: 8}", "--batch-size", "1", "--out", tmp_path / "out.jsonl"]]
    calls = interrupted(monkeypatch, INFER, "generate", 2)
    with pytest.raises(KeyboardInterrupt):
        DISTILL.main(flags)
    part = tmp_path / "out.jsonl.part"
    assert part.read_text() and not (tmp_path / "out.jsonl").exists()
    with open(part, "a") as file:
        file.write('{"number": 7, "rec')  # a line that was cut short
    with pytest.raises(UserError, match="part.json was started with a different sampling"):
        DISTILL.main([*flags, "--seed", "1"])
    DISTILL.main(flags)
    assert len(calls) == 6 and not part.exists()  # five blocks of eight prompts, one of them twice
    text = (tmp_path / "out.jsonl").read_text()
    DISTILL.main([*flags, "--overwrite"])
    assert (tmp_path / "out.jsonl").read_text() == text and text.count("\n") > 4


def test_generation_without_a_chat_template_continues_text(assets, tmp_path):
    records = generate(assets, tmp_path / "out.jsonl", "--teacher", assets / "teacher", max_new_tokens=90)
    assert records and set(records[0]) == {"prompt", "completion", "answer"}
    (tmp_path / "chat.jsonl").write_text(json.dumps({"prompt": [{"role": "user", "content": "Hi"}]}) + "\n")
    with pytest.raises(UserError, match=r"chat.jsonl:1: a conversation, but .*teacher has no chat template"):
        generate(assets, tmp_path / "no.jsonl", "--teacher", assets / "teacher", "--data", tmp_path / "chat.jsonl")


def test_completions_are_records_for_sft(assets, tmp_path):
    """Each conversation has one system message, table cells become JSON, and reserved keys are an error."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"prompt": ["The red fox", "One old owl"], "system": ["Be brief.", "Be kind."], "when": [datetime.datetime(2026, 1, 1)] * 2})
    parquet.write_table(table, tmp_path / "prompts.parquet")
    found = generate(assets, tmp_path / "out.jsonl", "--data", tmp_path / "prompts.parquet", n=30, max_new_tokens=60)
    assert found and all([m["role"] for m in record["messages"]] == ["system", "user", "assistant"] and set(record) == {"messages", "when"} for record in found)
    form = TOKENIZER.Form(SFT.conversation, "sft")
    assert len(list(form.read(tmp_path / "out.jsonl", TOKENIZER.LeftOut()))) == len(found)
    (tmp_path / "odd.jsonl").write_text(json.dumps({"prompt": "Hi", "completions": 1}) + "\n")
    with pytest.raises(UserError, match="odd.jsonl:1: .*completions"):
        generate(assets, tmp_path / "no.jsonl", "--data", tmp_path / "odd.jsonl")
    tools, tokenizer = [{"type": "function", "function": {"name": "rain", "parameters": {}}}], TOKENIZER.load(assets / "chat-teacher")
    (tmp_path / "tools.jsonl").write_text(json.dumps({"prompt": "Hi", "tools": tools}) + "\n")
    config = MODEL.load_config(["--data", str(tmp_path / "tools.jsonl")], DISTILL.SECTIONS, "distill", DISTILL.ACTIONS)
    [prompt] = DISTILL.read_prompts(config, DISTILL.Teacher("teacher", None, tokenizer, 0, 4096, True))
    assert prompt.ids == TOKENIZER.render_chat(tokenizer, [{"role": "user", "content": "Hi"}], tools, add_generation_prompt=True).ids
    assert prompt.columns["tools"] == tools


def test_prompts_longer_than_the_context_are_left_out(assets, tmp_path, capsys):
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "fox " * 200}) + "\n" + json.dumps({"prompt": "The red"}) + "\n")
    found = generate(assets, tmp_path / "out.jsonl", "--data", tmp_path / "long.jsonl", n=20)
    assert f"left out 1 that do not fit the teacher's context of 128 tokens (the first: {tmp_path / 'long.jsonl'}:1)" in capsys.readouterr().err
    assert {record["messages"][0]["content"] for record in found} == {"The red"}


# ------------------------------------------------------------------------------------------------------ mistakes


def test_invalid_settings_are_errors_in_one_line(assets, tmp_path):
    text, chat = flags_of(assets, "text", tmp_path), flags_of(assets, "chat", tmp_path)
    out = ["--out", str(tmp_path / "run"), "--max-steps", "1"]
    cases = [
        ([*text, "--tokenizer.name", assets / "other"], "the tokenizers of .*teacher and the student differ .*DISTILL.py --generate, then SFT.py"),
        ([*text, "--teacher", tmp_path / "none"], "distill.teacher"),
        ([*text, "--method", "hidden", "--layer-map", "{9: 1}"], "distill.layer_map: {9: 1}: expected .* to 2 for the student"),
        ([*text, "--layer-map", "{1: 1}"], "distill.layer_map: has no effect with distill.method logits"),
        ([*text, "--lmbda", "0.5"], "distill.lmbda: needs conversations, but distill.task is text"),
        ([*text, "--task", "chat"], "has no chat template; fine-tune it with SFT.py first"),
        ([*text, "--alpha", "1.5"], "distill.alpha: 1.5 must be at least 0 and at most 1"),
        ([*text, "--temperature", "0"], "distill.temperature: 0.0 must be at least 0.001"),
        ([*text, "--lora.r", "4"], "lora.r: adapters need a trained student in a folder"),
        (["--generate", "--teacher", assets / "chat-teacher", "--out", tmp_path / "x.jsonl"], "set the prompts with --data"),
        (["--generate", "--teacher", assets / "chat-teacher", "--data", assets / "prompts.jsonl", "--out", tmp_path / "x.jsonl", "--sampling", "{n: 2}", "--reward-funcs", "nosuch"],
         "^distill.reward_funcs: 'nosuch' is not one of"),
        ([*chat, "--sft.columns", "{messages: nosuch}"], "no key 'nosuch', which sft.columns names"),
        ([*flags_of(assets, "layers", tmp_path), "--lora.r", "4"], "lora.r: adapters need a trained student in a folder"),
        ([*text, "--cache"], "set the folder to write with --cache-dir"),
        ([*text, "--model.vocab_size", "99"], "model.vocab_size: 99 is smaller than the tokenizer's"),
        ([*text, "--teacher", "--alpha", "0"], "--teacher: a value is missing"),
        ([*text, "--adapter", "nowhere"], "--adapter: adapters need a trained student in a folder"),
        (["--generate", "--teacher", assets / "chat-teacher", "--data", assets / "prompts.jsonl", "--out", tmp_path / "x.jsonl", "--reward-threshold", "1"], "distill.reward_threshold: needs distill.reward_funcs"),
        (["--generate", "--teacher", assets / "chat-teacher", "--data", assets / "prompts.jsonl", "--out", tmp_path / "x.jsonl", "--sampling", "{n: 2, temperature: 0}"], "distill.sampling: temperature 0 gives 2 identical completions"),
        (["--generate", "--teacher", assets / "chat-teacher", "--data", assets / "prompts.jsonl", "--out", "/proc/x.jsonl"], "--out: /proc cannot be written"),
        ([*chat, "--lmbda", "0.5", "--max-completion-length", "8", "--rollout-size", "6"], "distill.rollout_size: 6 completions do not fill whole optimizer steps"),
        (["--generate", "--sampling", "{top_q: 2}"], "distill.sampling: unknown key 'top_q'; nearest is 'top_p'"),
        (["--generate", "--sampling", "{top_p: 2}"], "distill.sampling: top_p: 2.0 must be at least 0 and at most 1"),
        ([*text, "--rollout-size", "8"], "distill.rollout_size: has no effect without distill.lmbda"),
        ([*chat, "--lmbda", "0.5", "--max-completion-length", "48"], "leaves no room for a prompt in training.max_length 48"),
        ([*chat, "--lmbda", "0.5", "--alpha", "1"], "distill.alpha: 1 does not use the teacher"),
        ([*chat, "--method", "hidden", "--cache-dir", "x"], "a cache has no hidden states for distill.method hidden"),
        (["--generate", "--teacher", assets / "chat-teacher", "--data", assets / "prompts.jsonl", "--out", tmp_path / "x.txt"], "must end in .jsonl"),
        (["--generate", "--teacher", assets / "chat-teacher", "--data", assets / "prompts.jsonl", "--out", tmp_path / "x.jsonl", "--reward-funcs", "length:5"], "only one completion per prompt; raise n in distill.sampling"),
        (["--generate", "--cache", *text], "--cache and --generate are mutually exclusive"),
    ]
    for argv, message in cases:
        argv = [*map(str, argv)]
        with pytest.raises(UserError, match=message) as error:
            DISTILL.main(argv if "--generate" in argv else [*argv, *out])
            print("no error:", argv)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "result.json").exists()


def test_settings_without_effect_are_reported(assets, tmp_path, capsys):
    flags = [*flags_of(assets, "text", tmp_path), "--cache-top-k", "5", "--sampling", "{n: 5}", "--beta", "0.5"]
    DISTILL.main([*flags, "--alpha", "1", "--max-steps", "1", "--out", str(tmp_path / "run")])
    log = capsys.readouterr().err
    for message in ("distill.sampling: no effect without --generate\n", "distill.cache_top_k: no effect without --cache\n", "distill.beta: no effect with distill.alpha 1\n",
                  "only its tokenizer is used (distill.alpha 1)"):
        assert message in log
    generate(assets, tmp_path / "out.jsonl", "--alpha", "0.5", n=2)
    assert "distill.alpha: no effect without training" in capsys.readouterr().err


def test_a_small_teacher_prints_a_warning(assets, tmp_path, capsys):
    DISTILL.main([*flags_of(assets, "text", tmp_path), "--model.hidden_size", "96", "--max-steps", "1", "--out", str(tmp_path / "run")])
    assert "warning: the teacher is smaller than the student" in capsys.readouterr().err


def test_rows_are_limited_to_the_context_of_the_teacher(assets, tmp_path, capsys, tokenizer):
    make_model(tmp_path / "short", tokenizer, 4, max_position_embeddings=24)
    DISTILL.main([*flags_of(assets, "text", tmp_path), "--teacher", str(tmp_path / "short"), "--max-steps", "1", "--out", str(tmp_path / "run")])
    assert "training.max_length: 48 exceeds the teacher's context; using 24" in capsys.readouterr().err
