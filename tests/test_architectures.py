"""Experts, latent attention, encoders, kernels and foreign models of MODEL.py, against transformers and slow direct computations.

The tests of all families are in test_model.py."""

import dataclasses
import json
import math
import shutil
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from test_model import SIZES, VOCAB, close, feed, gradients_of, ids_of, pack, reference, roughen, slow_attention, texts_of
from torch.nn import Linear
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import INFER
import MODEL
import TOKENIZER
import TRAIN
from MODEL import ModelConfig, UserError

pytestmark = pytest.mark.usefixtures("one_thread")
MOE = dict(SIZES, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24)
MLA = dict(SIZES, num_key_value_heads=4, kv_lora_rank=20, q_lora_rank=24, qk_nope_head_dim=10, qk_rope_head_dim=6, v_head_dim=12)


def build(seed: int = 3, head="lm", **knobs):
    return roughen(MODEL.build(ModelConfig(**knobs), head, seed), seed).eval()


# ------------------------------------------------------------------------------------------------------ experts


def slow_experts(layer: MODEL.MixtureOfExperts, hidden: torch.Tensor) -> torch.Tensor:
    """The experts of each token, one after another."""
    experts, weights, _ = layer.gate(hidden, None, 1)
    out = torch.zeros_like(hidden)
    for t, token in enumerate(hidden):
        for e, weight in zip(experts[t].tolist(), weights[t]):
            gate, up = (layer.experts.gate_up_proj[e] @ token).chunk(2)
            out[t] += weight * (layer.experts.down_proj[e] @ (F.silu(gate) * up))
        if hasattr(layer, "shared_experts"):
            out[t] += layer.shared_experts(token)
    return out


@pytest.mark.parametrize("more", [{}, dict(scoring_func="sigmoid", n_group=3, topk_group=2, n_shared_experts=1, routed_scaling_factor=1.6)])
def test_grouped_experts_equal_separate_experts(more):
    layer = build(**MOE, **more).model.layers[0].mlp
    hidden = torch.randn(11, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found, expected = [], None
    for compute in (lambda: layer(hidden[None], None)[0][0], lambda: slow_experts(layer, hidden)):
        out = compute()
        layer.zero_grad()
        hidden.grad = None
        (out * torch.linspace(-1, 1, 32)).sum().backward()
        found.append([out.detach(), hidden.grad.clone(), *(weight.grad.clone() for weight in layer.parameters())])
    for ours, expected in zip(*found):
        close(ours, expected, 1e-5)


def test_experts_are_selected_within_the_best_groups():
    """As in the paper: groups are ranked by the sum of their top 2 biased scores, then experts within the best groups."""
    config = ModelConfig(**{**MOE, "num_experts": 12, "num_experts_per_tok": 3}, scoring_func="sigmoid", n_group=4, topk_group=2)
    router = MODEL.Router(config)
    generator = torch.Generator().manual_seed(1)
    router.e_score_correction_bias.copy_(0.3 * torch.randn(12, generator=generator))
    scores = torch.rand(50, 12, generator=generator)
    for token, chosen in zip(scores, router.choose(scores)):
        biased = (token + router.e_score_correction_bias).tolist()
        strength = {g: sum(sorted(biased[3 * g : 3 * g + 3])[-2:]) for g in range(4)}
        groups = sorted(strength, key=strength.get)[-2:]
        allowed = [e for g in groups for e in range(3 * g, 3 * g + 3)]
        assert sorted(chosen.tolist()) == sorted(sorted(allowed, key=lambda e: biased[e])[-3:])


def test_the_balance_loss_equals_transformers():
    config = ModelConfig(**{**MOE, "num_hidden_layers": 1}, router_aux_loss_coef=0.7)
    logits = torch.randn(40, 6, generator=torch.Generator().manual_seed(2))
    scores = logits.softmax(-1)
    routing = MODEL.balance_loss(scores, scores.topk(2, -1).indices, None, 4, config)
    close(routing.loss, 0.7 * load_balancing_loss_func((logits,), 6, 2))
    real = torch.arange(40) % 10 < 7
    padded = MODEL.balance_loss(scores, scores.topk(2, -1).indices, real, 4, config)
    close(padded.loss, 0.7 * load_balancing_loss_func((logits,), 6, 2, real.view(4, 10)))
    assert padded.counts.sum() == 2 * 28


def test_the_sequence_wise_balance_loss_equals_the_formula():
    """DeepSeek-V3, eqs. 17-20, in loops."""
    config = ModelConfig(**MOE, scoring_func="sigmoid", seq_aux=True, router_aux_loss_coef=0.3)
    scores = torch.rand(20, 6, generator=torch.Generator().manual_seed(3))
    experts = scores.topk(2, -1).indices
    total = 0.0
    for row in range(2):
        for e in range(6):
            tokens = range(10 * row, 10 * row + 10)
            f = 6 / (2 * 10) * sum(e in experts[t].tolist() for t in tokens)
            p = sum(float(scores[t, e] / scores[t].sum()) for t in tokens) / 10
            total += 0.3 * f * p / 2
    close(MODEL.balance_loss(scores, experts, None, 2, config).loss, torch.tensor(total))


def test_the_selection_bias_follows_the_load_and_counts_are_added_once():
    knobs = dict(MOE, scoring_func="sigmoid", router_bias_update_speed=0.01, mlp_only_layers=[0], num_hidden_layers=3)
    model, counts = build(**knobs).train(), []
    ids = ids_of(2, 24)
    for checkpointing in (False, True):
        MODEL.set_checkpointing(model, checkpointing)
        for _ in range(2):
            model(ids[:, :-1], targets=ids[:, 1:]).logprobs.sum().backward()
        counts.append(model.router_counts.clone())
        before = [layer.mlp.gate.e_score_correction_bias.clone() for layer in model.model.layers[1:]]
        report = model.after_step()
        for layer, old, count in zip(model.model.layers[1:], before, counts[-1]):
            bias = layer.mlp.gate.e_score_correction_bias
            close(bias - old, 0.01 * torch.sign(count.mean() - count), 1e-6)
            bias.copy_(old)
        assert report["expert_load"] >= 1 and model.router_counts is None
    assert counts[0].shape == (2, 6) and torch.equal(counts[0], counts[1])
    assert torch.equal(counts[0].sum(1), torch.full((2,), 2.0 * 2 * 23 * 2))  # two forwards of 2 x 23 tokens, two experts each
    model.eval()(ids)
    assert model.router_counts is None and model.after_step() == {}


@pytest.mark.parametrize("seed", range(3))
def test_padding_is_neither_routed_nor_counted(seed):
    model = build(seed, **MOE, router_aux_loss_coef=0.1).train()
    ids, positions, segments, documents = pack()
    out = model(ids, positions=positions, segment_ids=segments)
    assert int(model.router_counts[0].sum()) == 2 * int((positions >= 0).sum())
    assert out.logits.isfinite().all()
    alone = build(seed, **MOE)
    for row, start, document in documents:
        close(out.logits[row, start : start + len(document)], alone(document[None]).logits[0], 2e-5)
    changed = ids.masked_fill(positions < 0, 1)
    close(gradients_of(model, model(ids, positions=positions, segment_ids=segments, targets=ids).logprobs.sum())["model.layers.0.mlp.experts.down_proj"],
          gradients_of(model, model(changed, positions=positions, segment_ids=segments, targets=ids).logprobs.sum())["model.layers.0.mlp.experts.down_proj"])


def test_unused_experts_get_zero_gradients():
    model = build(**{**MOE, "num_experts": 40}).train()
    gradients = gradients_of(model, model(ids_of(1, 4), targets=ids_of(1, 4)).logprobs.sum())
    for layer in range(2):
        for name in ("gate_up_proj", "down_proj"):
            used = gradients[f"model.layers.{layer}.mlp.experts.{name}"].flatten(1).abs().sum(1) > 0
            assert 2 <= int(used.sum()) <= 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_routing_does_not_recompile(dtype):
    layer = build(**MOE).model.layers[0].mlp.to(dtype)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=dtype == torch.bfloat16)
    graphs = []
    for seed in range(4):
        hidden = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)
        close(compiled(hidden, None)[0], layer(hidden, None)[0], 1e-5 if dtype == torch.float32 else 2e-2)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(set(graphs)) == 1


def test_the_balance_loss_is_part_of_the_training_loss():
    model = build(**MOE, router_aux_loss_coef=0.5).train()
    ids = ids_of(2, 12)
    batch = {"input_ids": ids[:, :-1], "targets": ids[:, 1:], **dict.fromkeys(("positions", "segment_ids", "weights"))}
    loss, metrics = TRAIN.token_loss(model, batch, {"tokens": 22, "micro_batches": 4})
    aux = model(ids[:, :-1]).aux_loss
    assert float(aux) > 0
    close(loss, metrics["loss"] + aux / 4)
    gradient = torch.autograd.grad(loss, model.model.layers[0].mlp.gate.weight)[0]
    assert float(gradient.abs().sum()) > 0


# --------------------------------------------------------------------------------------------- latent attention


class Scaled(torch.nn.Module):
    """A layer that is not nn.Linear, so its weight is unknown."""

    def __init__(self, inner: Linear):
        super().__init__()
        self.inner, self.in_features = inner, inner.in_features

    def forward(self, hidden):
        return self.inner(hidden) + self.inner(hidden * 0.5)


@pytest.mark.parametrize("more", [{}, dict(q_lora_rank=None, rope_interleave=True), dict(rope_scaling=dict(
    rope_type="yarn", factor=4.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=0.7))])
@pytest.mark.parametrize("wrapped", [False, True])
def test_absorbed_attention_equals_expanded(more, wrapped, monkeypatch):
    model, ids = build(**{**MLA, **more}), ids_of(2, 35)
    if wrapped:
        for layer in model.model.layers:
            layer.self_attn.kv_b_proj = Scaled(layer.self_attn.kv_b_proj)
    forms = []
    for form in ("_absorbed", "_expanded"):
        original = getattr(MODEL.LatentAttention, form)
        monkeypatch.setattr(MODEL.LatentAttention, form, lambda self, *a, form=form, original=original: forms.append(form) or original(self, *a))
    with torch.no_grad():
        whole = model(ids).logits
        kv = model.new_cache(3, 35)
        both = texts_of(kv, 2, 35)
        forms.clear()
        found = [torch.stack(feed(model, kv, *zip(both, ids[:, :30])))]
        assert set(forms) == {"_expanded"}
        forms.clear()
        found += [torch.stack(feed(model, kv, *zip(both, ids[:, t : t + 1]))) for t in range(30, 35)]
        assert set(forms) == {"_absorbed"}
    close(torch.cat(found, 1), whole, 2e-5)


def test_absorbed_attention_of_ragged_rows():
    model = build(**MLA)
    prompts = [ids_of(n, seed=n).tolist() for n in (3, 11, 7)]
    together = INFER.generate(model, prompts, INFER.Sampling(12, temperature=0, ignore_eos=True))
    for prompt, [answer] in zip(prompts, together):
        [[alone]] = INFER.generate(model, [prompt], INFER.Sampling(12, temperature=0, ignore_eos=True), use_cache=False)
        assert answer.ids == alone.ids


def test_the_cache_contains_only_latents_and_rotary_keys():
    model, rows, length = build(**MLA), 3, 40
    kv = model.new_cache(rows, length)
    feed(model, kv, *zip(texts_of(kv, 3, 10), ids_of(3, 10)))
    assert kv.bytes() == MODEL.cache_numbers(model.config) * 4 * rows * length == 2 * (20 + 6) * 4 * rows * length
    plain = build(**SIZES)
    kv = plain.new_cache(rows, length)
    feed(plain, kv, *zip(texts_of(kv, 1, 10), ids_of(1, 10)))
    assert kv.bytes() == MODEL.cache_numbers(plain.config) * 4 * rows * length == 2 * 2 * 2 * 8 * 4 * rows * length


def test_decoding_does_not_expand_the_keys():
    """The scores of all heads grow with the context; expanded keys and values are not created."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and not function.is_view:
                self.size = max(self.size, result.numel())
            return result

    context = 60
    model = build(**{**MLA, "max_position_embeddings": 80, "num_hidden_layers": 1, "hidden_size": 16, "vocab_size": 50, "intermediate_size": 8,
                     "q_lora_rank": 8, "kv_lora_rank": 12})
    kv = model.new_cache(1, context + 2)
    with torch.no_grad():
        [sequence] = texts_of(kv, 1, context + 1)
        feed(model, kv, (sequence, ids_of(context) % 50))
        with Largest() as seen:
            feed(model, kv, (sequence, ids_of(1) % 50))
    assert seen.size <= 4 * 22 * 12 < context * 4 * 10  # the weights of kv_b_proj; less than the keys of all heads


def test_configuring_for_hardware_keeps_latent_attention_exact():
    for dtype in (torch.float32, torch.bfloat16):
        knobs = dict(MLA, num_experts=4, n_shared_experts=1, mlp_only_layers=[0], moe_intermediate_size=16)
        model, ids = build(**knobs).to(dtype), ids_of(1, 12)
        with torch.no_grad():
            expected = model(ids).logits.float()
            ready = INFER.configure_for_hardware(model, "cpu", quiet=True)
            kv = ready.new_cache(1, 12)
            [sequence] = texts_of(kv, 1, 12)
            found = torch.cat([feed(ready, kv, (sequence, ids[0, t : t + 1]))[0] for t in range(12)])[None].float()
        assert (found - expected).norm() / expected.norm() < (1e-5 if dtype == torch.float32 else 0.08)


# ------------------------------------------------------------------------------------------------ hub layouts


def fp8(folder: Path, block: int) -> None:
    """Rewrite a folder in DeepSeek's format: float8 matrices with a scale per block."""
    state = load_file(folder / "model.safetensors")
    for name, tensor in list(state.items()):
        if name.endswith("proj.weight"):
            rows, columns = (-(-size // block) for size in tensor.shape)
            scales = torch.zeros(rows, columns)
            packed = torch.zeros_like(tensor).to(torch.float8_e4m3fn)
            for r in range(rows):
                for c in range(columns):
                    block_slice = slice(r * block, (r + 1) * block), slice(c * block, (c + 1) * block)
                    scales[r, c] = tensor[block_slice].abs().max() / 448
                    packed[block_slice] = (tensor[block_slice] / scales[r, c]).to(torch.float8_e4m3fn)
            state[name], state[name + "_scale_inv"] = packed, scales
    save_file(state, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [block, block]}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture()
def deepseek(tmp_path):
    reference("deepseek-v3").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_block_scaled_float8_weights_are_dequantized(deepseek):
    expected = load_file(deepseek / "model.safetensors")
    fp8(deepseek, 16)
    model = MODEL.load(deepseek)
    state = MODEL.weights_to_hub("deepseek_v3", model.state_dict())
    for name, tensor in expected.items():
        assert (state[name] - tensor).abs().max() <= tensor.abs().max() / 14, name  # three bits of mantissa
        assert name.endswith("proj.weight") or torch.equal(state[name], tensor)
    assert model(ids_of(1, 9)).logits.isfinite().all()
    edit_config(deepseek, quantization_config={"quant_method": "awq"})
    with pytest.raises(UserError, match="quantized with awq"):
        MODEL.load(deepseek)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_float8_weights_with_one_scale_per_matrix(deepseek, shape):
    expected, packed = load_file(deepseek / "model.safetensors"), {}
    for name, tensor in expected.items():
        packed[name] = tensor
        if name.endswith("proj.weight"):
            scale = tensor.abs().max() / 448
            packed[name] = (tensor / scale).to(torch.float8_e4m3fn)
            packed[name + "_scale_inv"], packed[name.replace(".weight", ".activation_scale")] = scale.reshape(shape), torch.tensor(0.1)
            expected[name] = packed[name].float() * scale
    save_file(packed, deepseek / "model.safetensors")
    edit_config(deepseek, quantization_config={"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None})
    state = MODEL.weights_to_hub("deepseek_v3", MODEL.load(deepseek).state_dict())
    for name, tensor in expected.items():
        close(state[name], tensor, 1e-6)


def test_model_type_kimi_k2_is_accepted(deepseek):
    edit_config(deepseek, model_type="kimi_k2", architectures=["DeepseekV3ForCausalLM"], auto_map={"AutoConfig": "configuration_deepseek.X"})
    close(MODEL.load(deepseek)(ids_of(1, 9)).logits, reference("deepseek-v3")(ids_of(1, 9)).logits, 1e-4)


def test_multi_token_prediction_layers_are_skipped(deepseek):
    state = load_file(deepseek / "model.safetensors")
    state |= {"model.layers.3.eh_proj.weight": torch.zeros(32, 64), "model.layers.3.enorm.weight": torch.ones(32)}
    save_file(state, deepseek / "model.safetensors")
    edit_config(deepseek, num_nextn_predict_layers=1)
    close(MODEL.load(deepseek)(ids_of(1, 9)).logits, reference("deepseek-v3")(ids_of(1, 9)).logits, 1e-4)
    edit_config(deepseek, num_nextn_predict_layers=0)
    with pytest.raises(UserError, match="unexpected tensor model.layers.3.eh_proj.weight"):  # config.json declares no such layer
        MODEL.load(deepseek)


def test_each_expert_is_checked(deepseek):
    state = load_file(deepseek / "model.safetensors")
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    for damage, message in (({name: None}, "missing tensor model.layers.1.mlp.experts.gate_up_proj"),
                            ({name: torch.zeros(3, 32)}, r"experts.5.up_proj.weight has shape \(3, 32\), but config.json implies \(24, 32\)"),
                            ({name.replace(".5.", ".9."): state[name].clone()}, r"experts.9.up_proj.weight has shape \(24, 32\), but config.json implies \(\)"),
                            ({"model.layers.1.mlp.experts.5.bias": torch.zeros(2)}, "unexpected tensor .*experts.5.bias")):
        changed = {k: v for k, v in {**state, **damage}.items() if v is not None}
        save_file(changed, deepseek / "model.safetensors")
        with pytest.raises(UserError, match=message):
            MODEL.load(deepseek)


def test_experts_are_saved_separately(tmp_path):
    model = build(**MOE, model_type="mixtral")
    model.config = dataclasses.replace(model.config, rope_theta=1e6)
    MODEL.save(build(**{**MOE, "moe_intermediate_size": 48}, model_type="mixtral"), tmp_path / "mixtral")
    names = set(load_file(tmp_path / "mixtral" / "model.safetensors"))
    assert {"model.layers.1.block_sparse_moe.experts.5.w2.weight", "model.layers.0.block_sparse_moe.gate.weight"} <= names
    MODEL.save(build(**MOE, qk_norm=True, model_type="qwen3_moe"), tmp_path / "qwen")
    assert "model.layers.1.mlp.experts.5.gate_proj.weight" in load_file(tmp_path / "qwen" / "model.safetensors")


def test_the_selection_bias_stays_float32(deepseek):
    model = MODEL.load(deepseek, torch.bfloat16)
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32
    assert model.model.layers[1].mlp.experts.down_proj.dtype == torch.bfloat16


def bert_variants():
    def gamma(state):
        return {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v for k, v in state.items()}

    def pretraining(state):
        extra = {"cls.seq_relationship.weight": torch.zeros(2, 32), "cls.seq_relationship.bias": torch.zeros(2), "bert.pooler.dense.bias": torch.zeros(32),
                 "bert.pooler.dense.weight": torch.zeros(32, 32), "bert.embeddings.position_ids": torch.arange(64)[None]}
        return {**state, **extra}

    def twice(state):
        return {**state, "cls.predictions.decoder.bias": state["cls.predictions.bias"].clone(),
                "cls.predictions.decoder.weight": state["bert.embeddings.word_embeddings.weight"].clone()}

    return {"plain": dict, "gamma and beta": gamma, "for pretraining": pretraining, "tied tensors twice": twice}


@pytest.mark.parametrize("variant", bert_variants())
def test_bert_files_of_the_hub_load(variant, tmp_path):
    reference("bert").save_pretrained(tmp_path)
    state = bert_variants()[variant](load_file(tmp_path / "model.safetensors"))
    save_file(state, tmp_path / "model.safetensors")
    close(MODEL.load(tmp_path)(ids_of(2, 9)).logits, reference("bert")(ids_of(2, 9)).logits, 1e-4)


# -------------------------------------------------------------------------------------------------- the encoder


def test_an_untied_head_keeps_its_bias_in_transformers(tmp_path):
    model = MODEL.build(MODEL.preset_config("bert-2m", vocab_size=VOCAB, num_hidden_layers=1, tie_word_embeddings=False))
    torch.nn.init.normal_(model.lm_head.decoder.bias)
    MODEL.save(model, tmp_path)
    hf = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        close(model.eval()(ids_of(2, 9)).logits, hf(ids_of(2, 9)).logits, 1e-4)
        close(MODEL.load(tmp_path)(ids_of(2, 9)).logits, hf(ids_of(2, 9)).logits, 1e-4)


def test_unsupported_uses_of_an_encoder_are_user_errors(tokenizer):
    model = MODEL.build(MODEL.preset_config("bert-2m", vocab_size=len(tokenizer), num_hidden_layers=1, max_position_embeddings=16)).eval()
    assert INFER.fill(model, tokenizer, "the <|mask|> fox") != "the <|mask|> fox"
    with pytest.raises(UserError, match="stdin:3: this model is an encoder and fills in .*, which the text does not contain"):
        INFER.fill(model, tokenizer, "the fox", "stdin:3")
    with pytest.raises(UserError, match="prompt: [0-9]+ tokens exceed this encoder's context of 16"):
        INFER.fill(model, tokenizer, "the <|mask|> " + "fox " * 30)


def test_an_encoder_attends_in_both_directions_and_uses_token_types(tmp_path):
    reference("bert").save_pretrained(tmp_path)
    model, ids = MODEL.load(tmp_path), ids_of(2, 9)
    kinds = (torch.arange(9) >= 4).long().expand(2, 9)
    attention = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    positions = torch.where(attention.bool(), torch.arange(9), -1)
    with torch.no_grad():
        close(model(ids, token_types=kinds).logits, reference("bert")(ids, token_type_ids=kinds).logits, 1e-4)
        ours = model(ids, positions=positions, token_types=kinds).logits
        theirs = reference("bert")(ids, attention_mask=attention, token_type_ids=kinds).logits
        close(ours[attention.bool()], theirs[attention.bool()], 1e-4)
        assert ours.isfinite().all()
        changed = ids.clone()
        changed[:, -1] = (changed[:, -1] + 1) % VOCAB
        assert not torch.allclose(model(ids).logits[:, 0], model(changed).logits[:, 0])
        packed, positions, segments, documents = pack()
        logits = model(packed, positions=positions, segment_ids=segments).logits
        for row, start, document in documents:
            close(logits[row, start : start + len(document)], model(document[None]).logits[0], 2e-5)
    with pytest.raises(ValueError, match="no token types"):
        build(**SIZES)(ids, token_types=kinds)
    with pytest.raises(ValueError, match="an encoder cannot use a KV cache"):
        model(ids, cache=MODEL.CacheStep(model.new_cache(2, 9), []))


def test_masked_tokens_are_hidden_replaced_or_kept(tokenizer):
    ids = torch.randint(5, len(tokenizer), (40, 200), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = tokenizer.bos_token_id
    positions = torch.arange(200).repeat(40, 1).masked_fill(torch.arange(200) >= 190, -1)
    batch = {"input_ids": ids, "positions": positions, "targets": ids, "counts": {"tokens": ids.numel()}}
    masked = TRAIN.mask_tokens(batch, tokenizer, [(0, i) for i in range(40)], 0.15)
    chosen = masked["targets"] != -100
    assert masked["counts"]["tokens"] == int(chosen.sum()) and abs(chosen[:, 1:190].float().mean() - 0.15) < 0.02
    assert not chosen[:, 0].any() and not chosen[:, 190:].any() and torch.equal(masked["targets"][chosen], ids[chosen])
    assert torch.equal(masked["input_ids"][~chosen], ids[~chosen])
    seen, truth = masked["input_ids"][chosen], ids[chosen]
    assert abs((seen == tokenizer.mask_token_id).float().mean() - 0.8) < 0.04
    assert abs((seen == truth).float().mean() - 0.1) < 0.03
    half = TRAIN.mask_tokens({k: v[20:] if k != "counts" else v for k, v in batch.items()}, tokenizer, [(0, i) for i in range(20, 40)], 0.15)
    assert torch.equal(half["input_ids"], masked["input_ids"][20:])  # the mask of a row does not depend on the batch


# ------------------------------------------------------------------------------------ any other architecture

TEXT = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64,
            bos_token_id=0, eos_token_id=1, pad_token_id=2, initializer_range=0.3)
WINDOWED = dict(TEXT, num_key_value_heads=2, head_dim=8, sliding_window=5)
FOREIGN = {
    "gpt_neox": ("GPTNeoX", TEXT),
    "opt": ("OPT", dict({k: v for k, v in TEXT.items() if k not in ("intermediate_size", "initializer_range")}, ffn_dim=48, word_embed_proj_dim=32,
                        init_std=0.3)),
    "gemma3": ("Gemma3Text", dict(WINDOWED, layer_types=["sliding_attention", "full_attention", "sliding_attention"], query_pre_attn_scalar=8)),
    "gemma2": ("Gemma2", dict(WINDOWED, final_logit_softcapping=3.0, attn_logit_softcapping=10.0, query_pre_attn_scalar=8)),
    "granite": ("Granite", dict(TEXT, num_key_value_heads=2, logits_scaling=4.0)),
    "bloom": ("Bloom", dict(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1, pad_token_id=2, initializer_range=0.3)),
    "phi3": ("Phi3", dict(TEXT, max_position_embeddings=128, original_max_position_embeddings=14, rope_parameters={
        "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 1.0, "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 2.0, 6.0, 20.0]})),
    "gpt_neo": ("GPTNeo", dict(vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=5,
                               max_position_embeddings=64, bos_token_id=0, eos_token_id=1, initializer_range=0.3)),
    "llama4": ("Llama4Text", dict(TEXT, intermediate_size_mlp=48, num_key_value_heads=2, head_dim=8, num_local_experts=2, attention_chunk_size=6,
                                  no_rope_layers=[1, 0, 1])),
    "mamba": ("Mamba", dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4, bos_token_id=0, eos_token_id=1, pad_token_id=2,
                            initializer_range=0.3)),
    "recurrent_gemma": ("RecurrentGemma", dict(TEXT, num_hidden_layers=3, num_key_value_heads=1, attention_window_size=6, lru_width=32, w_init_variance_scale=0.3)),
}


def foreign_reference(kind: str):
    prefix, knobs = FOREIGN[kind]
    torch.manual_seed(0)
    config = getattr(transformers, prefix + "Config")(**knobs)
    name = prefix.removesuffix("Text") + "ForCausalLM"
    return roughen(getattr(transformers, name)(config), 1).eval()


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """foreign(kind): (folder, transformers' model)."""
    root, made = tmp_path_factory.mktemp("foreign"), {}

    def folder(kind):
        if kind not in made:
            made[kind] = foreign_reference(kind)
            made[kind].save_pretrained(root / kind)
        return root / kind, made[kind]

    return folder


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_models_equal_transformers(kind, foreign):
    folder, hf = foreign(kind)
    model, ids = MODEL.load(folder), ids_of(2, 24)
    with torch.no_grad():
        close(model(ids).logits, hf(ids).logits, 1e-4)
        expected = hf(ids).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
        close(model(ids[:, :-1], targets=ids[:, 1:]).logprobs, expected, 1e-4)
        states, theirs = model(ids, want=("hidden_states",)).hidden_states, hf(ids, output_hidden_states=True).hidden_states
        assert len(states) == len(theirs)
        for state, their in zip(states, theirs):
            close(state, their, 1e-4)
    hf.zero_grad()
    (-hf(ids).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).mean()).backward()
    gradients = gradients_of(model.inner, -model(ids[:, :-1], targets=ids[:, 1:]).logprobs.mean())
    for name, weight in hf.named_parameters():
        assert (gradients[name] - weight.grad).norm() <= 1e-4 * weight.grad.norm().clamp(min=1e-3), name


@pytest.mark.parametrize("kind", FOREIGN)
def test_documents_are_separate_in_foreign_models(kind, foreign):
    """One document is longer than the sliding windows of 5 tokens."""
    model = MODEL.load(foreign(kind)[0])
    ids, positions, segments, documents = pack()
    assert max(len(document) for *_, document in documents) > 5
    with torch.no_grad():
        for arguments in (dict(positions=positions, segment_ids=segments), dict(segment_ids=segments)):
            logits = model(ids, **arguments).logits
            assert logits.isfinite().all()
            for row, start, document in documents:
                close(logits[row, start : start + len(document)], model(document[None]).logits[0], 1e-4)


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_models_generate_ragged_batches(kind, foreign):
    folder, hf = foreign(kind)
    prompts = [ids_of(n, seed=n).tolist() for n in (4, 13)]
    answers = INFER.generate(MODEL.load(folder), prompts, INFER.Sampling(16, temperature=0, ignore_eos=True))
    for prompt, [answer] in zip(prompts, answers):
        theirs = hf.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=16, min_new_tokens=16, attention_mask=torch.ones(1, len(prompt)),
                             eos_token_id=None)
        assert answer.ids == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", ["gpt_neox", "gemma3"])
def test_a_foreign_model_trains_saves_and_resumes(kind, foreign, tmp_path, tokenizer, text_file):
    prefix, knobs = FOREIGN[kind]
    config = getattr(transformers, prefix + "Config")(**{**knobs, "vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id,
                                                         "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id})
    cls = transformers.Gemma3ForCausalLM if kind == "gemma3" else getattr(transformers, prefix + "ForCausalLM")
    torch.manual_seed(0)
    cls(config).save_pretrained(tmp_path / "start")
    TOKENIZER.save(tokenizer, tmp_path / "start")
    flags = ["--model", str(tmp_path / "start"), "--data", str(text_file), "--data.dir", str(tmp_path / "data"), "--max-length", "24", "--batch-size", "4",
             "--training.logging_steps", "1", "--training.save_steps", "3", "--learning-rate", "3e-3", "--training.sample_tokens", "4",
             "--training.mixed_precision", "no", "--training.lr_scheduler_type", "constant", "--training.gradient_checkpointing", "true"]
    result = TRAIN.main([*flags, "--max-steps", "6", "--out", str(tmp_path / "whole")])
    assert result.after["loss"] < result.before["loss"]
    TRAIN.main([*flags, "--max-steps", "3", "--out", str(tmp_path / "halves")])
    TRAIN.main([*flags, "--max-steps", "6", "--out", str(tmp_path / "halves"), "--resume", "auto"])
    whole, halves = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "halves"))
    assert set(whole) == set(halves) and all(torch.equal(whole[name], halves[name]) for name in whole)
    hf = cls.from_pretrained(tmp_path / "whole").eval()
    ids = ids_of(1, 12)
    with torch.no_grad():
        close(MODEL.load(tmp_path / "whole")(ids).logits, hf(ids).logits, 1e-4)


def test_a_foreign_model_streams_and_stops_at_the_ids_of_generation_config(foreign, tmp_path, tokenizer):
    folder, hf = foreign("gpt_neox")
    shutil.copytree(folder, tmp_path / "model")
    prompt = ids_of(7, seed=3).tolist()
    free = hf.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=None, attention_mask=torch.ones(1, 7))[0, 7:].tolist()
    end = next(token for token in free[3:] if token not in free[:3])
    (tmp_path / "model/generation_config.json").write_text(json.dumps({"eos_token_id": [1, end], "pad_token_id": 7, "repetition_penalty": 9.0}))
    model = MODEL.load(tmp_path / "model")
    assert model.config.eos_ids == [1, end] and model.config.pad_token_id == 7
    [[answer]] = INFER.generate(model, [prompt], INFER.Sampling(12, temperature=0))
    assert answer.ids == free[: free.index(end) + 1] and answer.finish_reason == "stop"
    sampling = INFER.Sampling(12, temperature=0.7, seed=5, logprobs=True)
    [[alone]], [[_], [batched]] = (INFER.generate(model, prompts, sampling, first=first) for prompts, first in (([prompt], 1), ([prompt[:4], prompt], 0)))
    assert alone == batched and len(alone.logprobs) == len(alone.ids)
    with torch.no_grad():
        logprobs = (hf(torch.tensor([prompt + alone.ids])).logits[0, 6:-1] / 0.7).log_softmax(-1)
    close(torch.tensor(alone.logprobs), logprobs.gather(1, torch.tensor(alone.ids)[:, None])[:, 0], 1e-4)
    chunks = list(INFER.stream(model, tokenizer, prompt, INFER.Sampling(12, temperature=0, ignore_eos=True)))
    [[whole]] = INFER.generate(model, [prompt], INFER.Sampling(12, temperature=0, ignore_eos=True), tokenizer)
    assert len(chunks) > 1 and "".join(chunks) == whole.text
    MODEL.save(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved/generation_config.json").read_text())["eos_token_id"] == [1, end]


def test_closing_a_stream_early_stops_generation(foreign, tokenizer):
    before = threading.active_count()
    steps = INFER.stream(MODEL.load(foreign("mamba")[0]), tokenizer, [3, 5, 8], INFER.Sampling(200, temperature=0, ignore_eos=True))
    next(steps)
    assert threading.active_count() == before + 1
    steps.close()
    for _ in range(200):
        if threading.active_count() == before:
            return
        time.sleep(0.02)
    raise AssertionError("the thread is still running")


def test_a_foreign_encoder_is_refused(tmp_path):
    knobs = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    transformers.RobertaForMaskedLM(transformers.RobertaConfig(**knobs)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="roberta is not a causal language model"):
        MODEL.load(tmp_path)


@pytest.mark.parametrize("damage", [dict(hidden_size=64), dict(num_hidden_layers=None), "cut"])
def test_a_damaged_foreign_folder_is_a_user_error(damage, foreign, tmp_path):
    folder = Path(shutil.copytree(foreign("gpt_neox")[0], tmp_path / "broken"))
    if damage == "cut":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    else:
        edit_config(folder, **damage)
    with pytest.raises(UserError, match="model_type 'gpt_neox' is not one of .*, and transformers cannot load it"):
        MODEL.load(folder)


def test_folders_are_saved_with_a_class_that_can_open_them(tmp_path, capsys):
    for knobs, kind in ((dict(MOE, scoring_func="sigmoid", model_type="mixtral"), MODEL.CUSTOM), (dict(SIZES, model_type="mixtral"), "llama"),
                        (dict(SIZES, model_type="mistral"), "mistral")):
        config = ModelConfig(**knobs)
        assert MODEL.config_to_hub(config)["model_type"] == kind
        MODEL.say_portability(config)
        assert capsys.readouterr().err.count("\n") == (kind != config.model_type)


def test_unsupported_settings_of_foreign_models_are_user_errors(tmp_path, foreign):
    folder, _ = foreign("gpt_neox")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonsuch"}))
    with pytest.raises(UserError, match="model_type 'nonsuch' is not one of .*, and transformers cannot load it"):
        MODEL.load(tmp_path)
    with pytest.raises(UserError, match="flash_attention_2 is not supported for gpt_neox"):
        MODEL.load(folder, attn_implementation="flash_attention_2")
    with pytest.raises(UserError, match="model.rope_theta: cannot be changed for gpt_neox"):
        MODEL.load(folder, changes={"rope_theta": 5.0})


# ------------------------------------------------------------------------------------------------ long context


def test_rope_scaling_may_change_for_trained_weights(tmp_path):
    MODEL.save(build(**SIZES), tmp_path)
    yarn = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
    model = MODEL.load(tmp_path, changes=dict(rope_scaling=yarn, max_position_embeddings=256))
    direct = build(**{**SIZES, "max_position_embeddings": 256}, rope_scaling=yarn)
    close(model(ids_of(1, 200)).logits, direct(ids_of(1, 200)).logits)
    MODEL.save(model, tmp_path / "longer")
    assert MODEL.read_config(tmp_path / "longer").rope_scaling["factor"] == 4.0
    with pytest.raises(UserError, match="model.hidden_size: a trained model's architecture is fixed"):
        MODEL.load(tmp_path, changes=dict(hidden_size=64))


# ------------------------------------------------------------------------------------------------------ kernels


def ragged_oracle(calls: list, name: str):
    def run(q, k, v, edges, window):
        assert edges[0] == 0 and edges[-1] == len(q)
        calls.append(name)
        return torch.cat([slow_attention(q[a:b], k[a:b], v[a:b], window) for a, b in zip(edges, edges[1:])])

    return run


@pytest.fixture()
def fake_kernel(monkeypatch):
    """fake_kernel(name) installs a fake package according to its documentation, in loops, and a fake CUDA device."""
    def install(name: str) -> list:
        calls: list = []
        run = ragged_oracle(calls, name)
        if name == "xformers":
            class Bias:
                def __init__(self, lengths, window=None):
                    self.lengths, self.window = lengths, window

                @classmethod
                def from_seqlens(cls, lengths):
                    return cls(lengths)

                def make_local_attention(self, window):
                    return type(self)(self.lengths, window)

            def memory_efficient_attention(q, k, v, attn_bias, p=0.0):
                assert q.shape == k.shape == v.shape and q.shape[0] == 1
                edges = [0, *torch.tensor(attn_bias.lengths).cumsum(0).tolist()]
                return run(q[0], k[0], v[0], edges, (-1, -1) if attn_bias.window is None else (attn_bias.window - 1, 0))[None]

            fmha = types.SimpleNamespace(attn_bias=types.SimpleNamespace(BlockDiagonalCausalMask=Bias), memory_efficient_attention=memory_efficient_attention)
            monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
            monkeypatch.setitem(sys.modules, "xformers.ops", types.SimpleNamespace(fmha=fmha))
        else:
            def without_groups(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
                return varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window_size)

            def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False):
                assert query.dtype in (torch.float16, torch.bfloat16) and cu_seq_q.dtype == torch.int32 and window_size[1] == 0
                assert query.shape[2] % 8 == 0
                groups = query.shape[1] // key.shape[1]
                assert groups == 1 or enable_gqa
                return run(query, *(states.repeat_interleave(groups, 1) for states in (key, value)), cu_seq_q.tolist(), window_size)

            monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", types.SimpleNamespace(varlen_attn=without_groups if "without" in name else varlen_attn))
        monkeypatch.setattr(MODEL, "_installed", lambda package: package == "xformers")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        name = name.split()[0]
        monkeypatch.setitem(MODEL.KERNELS, name, MODEL.KERNELS[name]._replace(device="cpu"))
        return calls

    return install


@pytest.mark.parametrize("kernel", ["xformers", "varlen", "varlen without groups"])
@pytest.mark.parametrize("knobs", [SIZES, dict(SIZES, sliding_window=4), dict(SIZES, head_dim=20), MLA])
def test_kernels_for_concatenated_sequences(kernel, knobs, fake_kernel):
    config = ModelConfig(**knobs)
    eager = MODEL.build(config, seed=1, attn_implementation="eager").half().eval()
    calls = fake_kernel(kernel)
    assert MODEL.choose_attention("auto")[1] == [MODEL.KERNELS["varlen"]]  # without flash-attn
    kernel = kernel.split()[0]
    model = MODEL.build(config, seed=1, attn_implementation=kernel).half().eval()
    ids, positions, segments, _ = pack()
    real = positions >= 0
    with torch.no_grad():
        for arguments in (dict(), dict(positions=positions, segment_ids=segments)):
            ours, expected = model(ids, **arguments).logits, eager(ids, **arguments).logits
            assert calls and ours.isfinite().all()
            calls.clear()
            error = (ours - expected)[real].float().norm() / expected[real].float().norm()
            assert error < 1e-2
        kv = model.new_cache(2, 14)
        feed(model, kv, *zip(texts_of(kv, 2, 14), ids))
        assert not calls  # cached states are read by torch's kernel
    expected = MODEL.build(config, seed=1, attn_implementation="eager").train()
    model = MODEL.build(config, seed=1, attn_implementation=kernel).half().train()
    loss = [m(ids, positions=positions, segment_ids=segments, targets=ids).logprobs.sum() for m in (model, expected)]
    for (name, ours), theirs in zip(gradients_of(model, loss[0]).items(), gradients_of(expected, loss[1]).values()):
        assert (ours.float() - theirs).norm() <= 3e-2 * theirs.norm() + 1e-2, name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("knobs", [SIZES, dict(SIZES, sliding_window=4), dict(SIZES, num_key_value_heads=4), dict(SIZES, head_dim=20), MLA])
def test_the_gpu_kernel_is_as_accurate_as_plain_attention(knobs):
    """The kernel of `auto` and plain attention, both in bfloat16: errors of values and gradients relative to float32."""
    models = [MODEL.build(ModelConfig(**knobs), seed=1, attn_implementation=kind).to("cuda", dtype).train()
              for kind, dtype in (("eager", torch.float32), ("eager", torch.bfloat16), ("auto", torch.bfloat16))]
    ids, positions, segments = (tensor.cuda() for tensor in pack()[:3])
    for arguments in (dict(), dict(positions=positions, segment_ids=segments)):
        real = positions >= 0 if arguments else torch.ones_like(ids, dtype=torch.bool)
        losses = [model(ids, targets=ids, **arguments).logprobs[real] for model in models]
        exact, plain, ours = ({"values": loss.detach(), **gradients_of(model, loss.sum())} for model, loss in zip(models, losses))
        for name in exact:
            errors = [(found[name].float() - exact[name]).norm() for found in (plain, ours)]
            assert errors[1] <= 1.5 * errors[0] + 1e-3 * exact[name].norm(), name


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("case", ["dropout", "float32", "another device"])
def test_an_unsupported_kernel_is_not_used(window, case, fake_kernel):
    """torch's varlen kernel supports neither dropout nor float32 nor CPU tensors; then masks and windows are applied by another."""
    dtype = torch.float32 if case == "float32" else torch.bfloat16
    knobs = dict(SIZES, sliding_window=window)
    expected = MODEL.build(knobs, seed=1, attn_implementation="eager").to(dtype).train()
    calls = fake_kernel("varlen")
    if case == "another device":
        MODEL.KERNELS["varlen"] = MODEL.KERNELS["varlen"]._replace(device="cuda")  # restored with the fixture's change
    model = MODEL.build(dict(knobs, attention_dropout=1e-9 if case == "dropout" else 0.0), seed=1).to(dtype).train()
    ids, positions, segments, _ = pack()
    for arguments in (dict(), dict(segment_ids=segments), dict(positions=positions, segment_ids=segments)):
        ours, theirs = (m(ids, targets=ids, **arguments).logprobs for m in (model, expected))
        assert (ours - theirs).abs().max() < (1e-4 if dtype == torch.float32 else 0.15)
    assert not calls


def test_unavailable_kernels_suggest_another(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, reason in (("xformers", "needs a CUDA device"), ("flash_attention_2", "needs a CUDA device")):
        with pytest.raises(UserError, match=f"{name} {reason}; sdpa"):
            MODEL.choose_attention(name)


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("knobs, named", [
    (dict(MOE, n_group=4), "model.n_group: num_experts 6 is not divisible by 4 groups"),
    (dict(MOE, n_group=3, topk_group=4), "model.topk_group: 4 must be at most n_group 3"),
    (dict(MOE, num_experts_per_tok=5, n_group=3, topk_group=2), "model.topk_group: 2 must be at most n_group 3, with at least num_experts_per_tok 5 experts in these groups of 2"),
    (dict(MOE, n_group=6, topk_group=2), "model.n_group: 6 groups have 1 expert each"),
    (dict(MOE, num_experts_per_tok=7), "model.num_experts_per_tok: 7 must be between 1 and num_experts 6"),
    (dict(MOE, router_bias_update_speed=0.1), "model.router_bias_update_speed: requires model.scoring_func sigmoid"),
    (dict(MOE, mlp_only_layers=[2]), "model.mlp_only_layers: .* must be layer indices from 0 to 1"),
    (dict(MLA, kv_lora_rank=0), "model.kv_lora_rank: 0 must be at least 1"),
    (dict(MLA, q_lora_rank=0), "model.q_lora_rank: 0 must be at least 1"),
    (dict(MLA, v_head_dim=0), "model.v_head_dim: 0 must be at least 1"),
    (dict(MLA, sliding_window=4), "model.sliding_window: 4 is not supported with latent attention"),
    (dict(MLA, head_dim=64), "model.head_dim: 64, but with latent attention"),
    (dict(MOE, num_experts=0), "model.num_experts: 0 must be at least 1"),
    (dict(MOE, mlp_only_layers=["x"]), "model.mlp_only_layers: .* must be layer indices from 0 to 1"),
    (dict(SIZES, type_vocab_size=-2), "model.type_vocab_size: -2 must be at least 0"),
    (dict(SIZES, rope_scaling=dict(rope_type="yarn", factor="abc")), "model.rope_scaling: factor 'abc' must be a number of at least 1"),
    (dict(SIZES, rope_scaling=dict(rope_type="linear", factor=0.5)), "model.rope_scaling: factor 0.5 must be a number of at least 1"),
    (dict(SIZES, rope_scaling=dict(rope_type="yarn", factor=4, original_max_postion_embeddings=9)), "has no 'original_max_postion_embeddings'; nearest is 'original_max_position"),
    (dict(SIZES, rope_scaling=dict(rope_type="yarn", factor=4, beta_fast=1, beta_slow=32)), "model.rope_scaling: beta_slow 32 must be below beta_fast 1"),
    (dict(SIZES, position_embedding_type="learned", rope_theta=500.0), "model.rope_theta: has no effect with model.position_embedding_type learned .only with rope."),
    (dict(MLA, num_key_value_heads=2), "model.num_key_value_heads: 2, but latent attention has one latent for all 4 heads"),
    (dict(MOE, scoring_func="tanh"), "model.scoring_func: 'tanh' is not one of softmax, sigmoid"),
    (dict(SIZES, n_group=2), "model.n_group: has no effect without model.num_experts"),
    (dict(SIZES, router_aux_loss_coef=0.1), "model.router_aux_loss_coef: has no effect without model.num_experts"),
    (dict(SIZES, q_lora_rank=8), "model.q_lora_rank: has no effect without model.kv_lora_rank"),
    (dict(SIZES, causal=False, sliding_window=4), "model.sliding_window: an encoder .* cannot have a sliding window"),
    (dict(SIZES, layer_types=["full_attention", "sliding_attention"]), "model.layer_types: sliding_attention requires model.sliding_window"),
])
def test_invalid_settings_are_refused(knobs, named):
    with pytest.raises(UserError, match=named):
        ModelConfig(**knobs)


# ------------------------------------------------------------------------------------------------ whole programs


@pytest.mark.parametrize("preset", ["mixtral-tiny", "qwen3-moe-tiny", "deepseek-v3-tiny", "kimi-k2-tiny", "bert-2m"])
def test_tiny_presets_train_resume_and_generate(preset, tmp_path, text_file, capsys):
    flags = ["--model.preset", preset, "--model.num_hidden_layers", "2", "--data", str(text_file), "--data.dir", str(tmp_path / "data"),
             "--tokenizer.vocab_size", "300", "--max-length", "32", "--batch-size", "4", "--training.logging_steps", "1", "--training.save_steps", "4",
             "--training.sample_tokens", "4", "--training.lr_scheduler_type", "constant", "--training.warmup_steps", "2"]
    result = TRAIN.main([*flags, "--max-steps", "8", "--out", str(tmp_path / "whole")])
    assert result.after["loss"] < result.before["loss"] - 0.3
    TRAIN.main([*flags, "--max-steps", "4", "--out", str(tmp_path / "halves")])
    TRAIN.main([*flags, "--max-steps", "8", "--out", str(tmp_path / "halves"), "--resume", "auto"])
    whole, halves = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "halves"))
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    records = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert preset == "bert-2m" or all("expert_load" in record for record in records if "loss" in record)
    capsys.readouterr()
    INFER.main(["--model", str(tmp_path / "whole"), "--prompt", "The <|mask|> fox" if preset == "bert-2m" else "The red", "--max-new-tokens", "5",
                "--seed", "0", "--ignore-eos", "true"])
    assert len(capsys.readouterr().out) >= 2


def test_an_encoder_needs_a_mask_token():
    tokenizer = types.SimpleNamespace(mask_token_id=None)
    with pytest.raises(UserError, match="tokenizer.name: masked language modeling needs a mask token"):
        TRAIN.is_masked(MODEL.build("bert-2m", device="meta"), tokenizer)
    assert not TRAIN.is_masked(MODEL.build("llama-225k", device="meta"), tokenizer)


def test_presets_have_the_published_sizes(capsys):
    """Published parameters, such as 671 billion with 37 billion active for DeepSeek-V3 (without the extra prediction layer)."""
    expected = {"mixtral-8x7b": (46.7e9, 12.9e9), "qwen3-30b-a3b": (30.5e9, 3.3e9), "qwen3-235b-a22b": (235e9, 22e9), "deepseek-v3": (671e9, 37e9),
                "kimi-k2": (1.03e12, 32e9), "bert-110m": (110e6, 110e6), "bert-340m": (336e6, 336e6)}
    for name, (total, active) in expected.items():
        found = MODEL.count_parameters(MODEL.build(name, device="meta"))
        assert math.isclose(found[0], total, rel_tol=0.01) and math.isclose(found[1], active, rel_tol=0.04), (name, found)
        MODEL.main(["--model.preset", name])
        assert f"{found[0]:,} ({found[1]:,} active per token)" in capsys.readouterr().out


def test_new_rows_of_a_foreign_model_are_the_same_at_each_load(foreign):
    """New rows are the mean of the old rows, in the embedding and in the head."""
    grown = [MODEL.load(foreign("gpt_neox")[0]) for _ in range(2)]
    for model in grown:
        MODEL.grow_vocabulary(model, VOCAB + 3)
    for first, second in zip(*(model.inner.state_dict().values() for model in grown), strict=True):
        assert torch.equal(first, second)
    for module in (grown[0].inner.get_input_embeddings(), grown[0].inner.get_output_embeddings()):
        close(module.weight[VOCAB:], module.weight[:VOCAB].mean(0).expand(3, -1))
