"""MODEL.py against transformers, against slow direct computations, and against published numbers."""

import dataclasses
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import types
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import modeling_rope_utils
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

import INFER
import MODEL
import TOKENIZER
from MODEL import ModelConfig, UserError

pytestmark = pytest.mark.usefixtures("one_thread")
VOCAB = 97
SIZES = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3)
NO_SPECIALS = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
GPT2 = dict(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)
LLAMA3 = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16, rope_theta=100.0)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, rope_theta=100.0)
DEEPSEEK = {**SIZES, "num_hidden_layers": 3, "num_key_value_heads": 4, "kv_lora_rank": 20, "q_lora_rank": 24, "qk_nope_head_dim": 10,
            "qk_rope_head_dim": 6, "v_head_dim": 12, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2,
            "moe_intermediate_size": 24, "n_shared_experts": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 1.7, "num_mtp_layers": 0}
BERT = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
            initializer_range=0.3)
FAMILIES = {
    "gpt2": ("GPT2", GPT2),
    "llama-mha": ("Llama", dict(SIZES, num_key_value_heads=4)),
    "llama-gqa": ("Llama", SIZES),
    "llama-mqa": ("Llama", dict(SIZES, num_key_value_heads=1, tie_word_embeddings=True)),
    "llama-biases": ("Llama", dict(SIZES, attention_bias=True, mlp_bias=True)),
    "llama-llama3": ("Llama", dict(SIZES, head_dim=16, rope_parameters=LLAMA3)),
    "llama-yarn": ("Llama", dict(SIZES, head_dim=16, rope_parameters=YARN)),
    "llama-yarn-factor": ("Llama", dict(SIZES, head_dim=16, rope_parameters=dict(YARN, attention_factor=1.5))),
    "llama-linear": ("Llama", dict(SIZES, rope_parameters=dict(rope_type="linear", factor=3.0, rope_theta=100.0))),
    "mistral": ("Mistral", dict(SIZES, sliding_window=5)),
    "qwen2": ("Qwen2", SIZES),
    "qwen2-window": ("Qwen2", dict(SIZES, num_hidden_layers=3, use_sliding_window=True, sliding_window=5,
                                   max_window_layers=1)),
    "qwen3": ("Qwen3", dict(SIZES, head_dim=16)),
    "mixtral": ("Mixtral", dict(SIZES, num_local_experts=5)),
    "mixtral-window": ("Mixtral", dict(SIZES, num_local_experts=4, num_experts_per_tok=3, sliding_window=5)),
    "qwen3-moe": ("Qwen3Moe", dict(SIZES, num_hidden_layers=3, head_dim=16, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24,
                                   mlp_only_layers=[1])),
    "qwen3-moe-normed": ("Qwen3Moe", dict(SIZES, num_hidden_layers=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
                                          norm_topk_prob=True, decoder_sparse_step=2)),
    "deepseek-v3": ("DeepseekV3", dict(DEEPSEEK)),
    "deepseek-v3-direct": ("DeepseekV3", dict(DEEPSEEK, q_lora_rank=None, n_group=1, topk_group=1, norm_topk_prob=False)),
    "deepseek-v3-yarn": ("DeepseekV3", dict(DEEPSEEK, rope_interleave=False, attention_bias=True, rope_parameters=dict(
        YARN, mscale=1.0, mscale_all_dim=0.8, beta_fast=32, beta_slow=1))),
    "deepseek-v3-wide": ("DeepseekV3", dict(DEEPSEEK, kv_lora_rank=48, q_lora_rank=40, v_head_dim=24)),
    "kimi-k2": ("DeepseekV3", dict(DEEPSEEK, n_routed_experts=12, n_group=1, topk_group=1, first_k_dense_replace=1, rope_parameters=dict(
        YARN, mscale=1.0, mscale_all_dim=1.0, beta_fast=1.0, beta_slow=1.0))),
    "bert": ("Bert", BERT),
}
every_family = pytest.mark.parametrize("family", FAMILIES)
every_decoder = pytest.mark.parametrize("family", [family for family in FAMILIES if family != "bert"])
some_families = pytest.mark.parametrize("family", ["gpt2", "llama-gqa", "mistral", "qwen2-window", "qwen3", "mixtral", "deepseek-v3"])
every_kernel = pytest.mark.parametrize("kernel", ["eager", "sdpa", "auto"])


def roughen(model, seed: int):
    """Add noise to norms and biases: if all are one or zero, swapping or dropping them would have no effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return model


@cache
def reference(family: str):
    """A tiny random transformers model. All tests share the object, so they must not change it."""
    prefix, knobs = FAMILIES[family]
    config = getattr(transformers, prefix + "Config")(**knobs, **NO_SPECIALS, attn_implementation="eager")
    torch.manual_seed(0)
    name = {"GPT2": "GPT2LMHeadModel", "Bert": "BertForMaskedLM"}.get(prefix, prefix + "ForCausalLM")
    model = roughen(getattr(transformers, name)(config), 1).eval()
    for name, bias in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            bias.copy_(0.2 * torch.randn(bias.shape, generator=torch.Generator().manual_seed(2)))
    return model


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """hub(family): a folder written by save_pretrained."""
    root = tmp_path_factory.mktemp("hub")

    def folder(family: str) -> Path:
        if not (root / family).exists():
            reference(family).save_pretrained(root / family)
        return root / family

    return folder


def ids_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def close(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def apart(ours, theirs) -> float:
    """Relative distance, for 16-bit results."""
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


def tiny(seed: int = 3, head="lm", kernel="auto", **knobs):
    return roughen(MODEL.build(ModelConfig(**{**SIZES, **knobs}), head, seed, kernel), seed).eval()


def with_kernel(folder: Path, kernel: str):
    return MODEL.load(folder, attn_implementation=kernel)


# --------------------------------------------------------------------------------- the families of transformers


@every_family
def test_logits_of_a_transformers_folder_equal_transformers(family, hub):
    ids = ids_of(2, 24)
    model = MODEL.load(hub(family))
    assert not model.training and model.dtype == torch.float32
    with torch.no_grad():
        close(model(ids).logits, reference(family)(ids).logits, 1e-4)


@every_decoder
def test_greedy_generation_equals_transformers(family, hub):
    prompts = [ids_of(7, seed=1).tolist(), ids_of(12, seed=2).tolist()]
    ours = INFER.generate(MODEL.load(hub(family)), prompts, INFER.Sampling(30, temperature=0, ignore_eos=True))
    for prompt, [completion] in zip(prompts, ours):
        theirs = reference(family).generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=30, min_new_tokens=30,
                                            attention_mask=torch.ones(1, len(prompt)), pad_token_id=0)
        assert completion.ids == theirs[0, len(prompt):].tolist()


def their_gradients(hf) -> dict[str, torch.Tensor]:
    """Gradients of a transformers model with the names and layouts of MODEL.py."""
    bert = [("bert.embeddings.word_embeddings", "model.embed_tokens"), ("bert.embeddings.position_embeddings", "model.embed_positions"),
            ("bert.embeddings.token_type_embeddings", "model.embed_types"), ("bert.embeddings.LayerNorm", "model.embed_norm"),
            ("bert.encoder.layer", "model.layers"), ("attention.self.query", "self_attn.q_proj"), ("attention.self.key", "self_attn.k_proj"),
            ("attention.self.value", "self_attn.v_proj"), ("attention.output.dense", "self_attn.o_proj"),
            ("attention.output.LayerNorm", "input_layernorm"), ("intermediate.dense", "mlp.up_proj"), ("output.LayerNorm", "post_attention_layernorm"),
            ("output.dense", "mlp.down_proj"), ("cls.predictions.transform.dense", "lm_head.dense"),
            ("cls.predictions.transform.LayerNorm", "lm_head.norm"), ("cls.predictions.bias", "lm_head.decoder.bias")]
    gpt2 = [("transformer.", "model."), (".wte", ".embed_tokens"), (".wpe", ".embed_positions"), (".h.", ".layers."),
            ("ln_f", "norm"), ("ln_1", "input_layernorm"), ("ln_2", "post_attention_layernorm"),
            ("mlp.c_fc", "mlp.up_proj"), ("mlp.c_proj", "mlp.down_proj"), ("attn.c_attn", "self_attn.qkv_proj"), ("attn.c_proj", "self_attn.o_proj")]
    renames = {"gpt2": gpt2, "bert": bert}.get(hf.config.model_type, [])
    found = {}
    for name, weight in hf.named_parameters():
        gradient = weight.grad
        if hf.config.model_type == "gpt2":
            gradient = gradient.T if ".c_" in name and name.endswith("weight") else gradient
        for theirs, ours in renames:
            name = name.replace(theirs, ours)
        found[name] = gradient
    return found


@every_family
def test_gradients_equal_transformers(family, hub):
    hf, model, ids = reference(family), MODEL.load(hub(family)), ids_of(2, 24, seed=4)
    hf.zero_grad()
    F.cross_entropy(hf(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected = their_gradients(hf)
    (-model(ids[:, :-1], targets=ids[:, 1:]).logprobs.mean()).backward()
    ours = {name: weight.grad for name, weight in model.named_parameters()}
    assert set(ours) == set(expected)
    for name, gradient in ours.items():
        if gradient is None or expected[name] is None:  # an unused token type
            assert gradient is None and expected[name] is None
            continue
        error = (gradient - expected[name]).norm() / expected[name].norm().clamp(min=1e-2)  # gradients of key biases are 0
        assert error < 1e-4, (name, float(error))


@every_family
def test_models_built_here_open_in_transformers(family, hub, tmp_path):
    config = MODEL.read_config(hub(family))
    model = roughen(MODEL.build(config, seed=5), 6).eval()
    MODEL.save(model, tmp_path)
    hf, info = type(reference(family)).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(hf) is type(reference(family))
    with torch.no_grad():
        close(model(ids_of(2, 24)).logits, hf.eval()(ids_of(2, 24)).logits, 1e-4)
    assert MODEL.read_config(tmp_path) == config
    close(MODEL.load(tmp_path)(ids_of(2, 24)).logits, model(ids_of(2, 24)).logits, 1e-6)


MIXTURES = {
    "query norm": dict(qk_norm=True),
    "query norm and all attention biases": dict(qk_norm=True, attention_bias=True, attention_out_bias=True),
    "window": dict(sliding_window=5),
    "input biases": dict(attention_bias=True),
    "window and input biases": dict(sliding_window=5, attention_bias=True),
    "mistral with input biases": dict(model_type="mistral", sliding_window=5, attention_bias=True),
    "window and MLP biases": dict(sliding_window=5, mlp_bias=True),
    "input and MLP biases": dict(attention_bias=True, mlp_bias=True),
    "query norm and MLP biases": dict(qk_norm=True, mlp_bias=True),
    "all biases": dict(attention_bias=True, attention_out_bias=True, mlp_bias=True),
    "mixed layers": dict(sliding_window=5, layer_types=["sliding_attention", "full_attention"]),
    "input biases and mixed layers": dict(sliding_window=5, layer_types=["sliding_attention", "full_attention"],
                                          attention_bias=True),
    "wide heads and input biases": dict(head_dim=16, attention_bias=True),
    "plain MLP": dict(mlp_gated=False),
    "GPT-2's layers with rotary positions": dict(norm_type="layernorm", mlp_gated=False, attention_bias=True),
    "learned positions and a gate": dict(position_embedding_type="learned"),
    "no query norm in qwen3": dict(model_type="qwen3"),
    "gelu and tied": dict(hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True),
    "gpt2 with query groups": {k: v for k, v in MODEL._GPT2.items() if k not in SIZES},
}
IN_TRANSFORMERS = ("query norm", "query norm and all attention biases", "window", "input biases", "window and input biases",
                   "all biases", "input biases and mixed layers", "wide heads and input biases", "gelu and tied")


@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_mixed_architecture_is_saved_as_a_family_that_computes_it(mixture, tmp_path):
    """Either a family of transformers computes the same logits, or model_type is custom."""
    model = tiny(**MIXTURES[mixture])
    MODEL.save(model, tmp_path)
    ids = ids_of(1, 16)
    with torch.no_grad():
        expected = model(ids).logits
        close(MODEL.load(tmp_path)(ids).logits, expected, 1e-6)
        if json.loads((tmp_path / "config.json").read_text())["model_type"] == MODEL.CUSTOM:
            assert mixture not in IN_TRANSFORMERS
            return
        hf, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        close(hf.eval()(ids).logits, expected, 1e-4)


def test_formulas_of_activations_and_norms_are_those_of_transformers():
    numbers = torch.linspace(-6, 6, 97)
    for name, formula in MODEL.HUB_ACTIVATIONS.items():
        close(torch.tensor([formula(x) for x in numbers.tolist()]), ACT2FN[name](numbers), 1e-6)
    norms = {"rmsnorm": LlamaRMSNorm(97, 0.3), "layernorm": torch.nn.LayerNorm(97, 0.3)}
    for name, formula in MODEL.HUB_NORMS.items():
        close(formula(numbers, 0.3), norms[name](numbers), 1e-6)


def snake(hidden):
    return hidden + hidden.sin() ** 2


@pytest.mark.parametrize(("table", "name", "function", "kind"), [
    ("ACTIVATIONS", "silu", torch.nn.functional.silu, "llama"), ("ACTIVATIONS", "silu", snake, "custom"), ("ACTIVATIONS", "snake", snake, "custom"),
    ("ACTIVATIONS", "relu2", lambda hidden: hidden.relu() ** 2, "llama"), ("NORMS", "rmsnorm", MODEL.LayerNorm, "custom")])
def test_a_replaced_function_is_not_written_as_a_family_that_computes_another(table, name, function, kind, tmp_path, monkeypatch, capsys):
    """A fork replaces a function or adds one: either transformers computes the same, or the folder says that it does not."""
    monkeypatch.setitem(getattr(MODEL, table), name, function)
    model = tiny(**({"hidden_act": name} if table == "ACTIVATIONS" else {}))
    MODEL.say_portability(model.config)
    assert ("matches no Hugging Face class" in capsys.readouterr().err) == (kind == "custom")
    MODEL.save(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == kind
    ids = ids_of(1, 16)
    again = MODEL.load(tmp_path)
    with torch.no_grad():
        close(again(ids).logits, model(ids).logits, 1e-6)
        if kind != "custom":
            close(transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, model(ids).logits, 1e-4)
    MODEL.save(again, tmp_path)  # which also keeps model_type custom
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == kind


def test_choices_of_a_table_are_looked_up_when_a_value_is_checked(monkeypatch):
    for table, section, key in (("ACTIVATIONS", ModelConfig, "hidden_act"), ("KERNELS", MODEL.ModelSection, "attn_implementation")):
        with pytest.raises(UserError, match=f"model.{key}: 'mine' is not one of "):
            section(**{key: "mine"})
        monkeypatch.setitem(getattr(MODEL, table), "mine", None)
        assert getattr(section(**{key: "mine"}), key) == "mine"


def test_model_type_custom_is_kept(tmp_path):
    """The way for a fork to say that it has changed the network itself."""
    MODEL.save(tiny(model_type="custom"), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "custom"
    assert MODEL.load(tmp_path).config.model_type == "custom"


@pytest.mark.parametrize("head", ["lm", "score"])
def test_a_folder_has_only_the_keys_that_its_class_uses(head, tmp_path):
    tokenizer = TOKENIZER.train(["one two three"] * 9, 300)
    model = MODEL.build(ModelConfig(**dict(SIZES, vocab_size=300), labels=["a", "b", "c"] if head == "score" else None), head, seed=1).eval()
    MODEL.save(model, tmp_path)
    for _ in range(2):  # as trained, and as loaded
        TOKENIZER.save(tokenizer, tmp_path, model.config.max_position_embeddings)
        facts = json.loads((tmp_path / "tokenizer_config.json").read_text())
        assert facts["model_max_length"] == 64 and not {"is_local", "local_files_only"} & set(facts)
        tokenizer = TOKENIZER.load(tmp_path)
    assert ("num_labels" in json.loads((tmp_path / "config.json").read_text())) == (head == "score")
    auto = transformers.AutoModelForSequenceClassification if head == "score" else transformers.AutoModelForCausalLM
    theirs, reader = auto.from_pretrained(tmp_path).eval(), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert reader.model_max_length == 64 and (head == "lm" or theirs.config.num_labels == 3)
    ids = torch.tensor([reader("one two").input_ids])
    assert ids.tolist() == [tokenizer("one two").input_ids]
    with torch.no_grad():
        out = model(ids, want=("scores",) if head == "score" else ())
        close(theirs(ids).logits, out.logits if head == "lm" else out.scores[:, -1], 1e-4)
    TOKENIZER.save(TOKENIZER.train(["one"], 300), tmp_path / "alone")
    assert "model_max_length" not in json.loads((tmp_path / "alone" / "tokenizer_config.json").read_text())


@pytest.mark.parametrize("family", ["gpt2", "llama-gqa"])
def test_score_head_opens_in_transformers(family, hub, tmp_path):
    config = dataclasses.replace(MODEL.read_config(hub(family)), num_labels=3)
    model = roughen(MODEL.build(config, "score", seed=5), 6).eval()
    MODEL.save(model, tmp_path)
    hf, info = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = ids_of(1, 9)
    with torch.no_grad():
        scores = model(ids, want=("scores",)).scores
        close(scores[:, -1], hf.eval()(ids).logits, 1e-4)
        close(MODEL.load(tmp_path)(ids, want=("scores",)).scores, scores, 1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama-gqa"])
def test_transformers_classifier_gives_the_same_scores(family, tmp_path):
    """transformers stores the number of labels as label names in config.json."""
    config = type(reference(family).config)(**{**reference(family).config.to_dict(), "num_labels": 3})
    hf = roughen(transformers.AutoModelForSequenceClassification.from_config(config), 2).eval()
    hf.save_pretrained(tmp_path)
    model = MODEL.load(tmp_path)
    assert model.heads == ("score",)
    with torch.no_grad():
        close(model(ids_of(1, 9), want=("scores",)).scores[:, -1], hf(ids_of(1, 9)).logits, 1e-4)


def test_bfloat16_stays_bfloat16(tmp_path):
    hf = transformers.LlamaForCausalLM(reference("llama-gqa").config)
    hf.load_state_dict(reference("llama-gqa").state_dict())
    hf.bfloat16().save_pretrained(tmp_path)
    for dtype in ("auto", "bfloat16", torch.bfloat16):
        assert {w.dtype for w in MODEL.load(tmp_path, dtype).parameters()} == {torch.bfloat16}
    model = MODEL.load(tmp_path, "auto")
    with torch.no_grad():
        exact = MODEL.load(tmp_path)(ids_of(2, 24)).logits
        ours, theirs = model(ids_of(2, 24)).logits, hf.eval()(ids_of(2, 24)).logits
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - exact).norm() < 1.3 * (theirs.float() - exact).norm()  # no more rounding than transformers
    assert MODEL.load(tmp_path).dtype == torch.float32
    MODEL.save(model, tmp_path / "again")
    assert {t.dtype for t in load_file(tmp_path / "again" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "bfloat16"


def test_rope_angles_stay_float32_in_bfloat16(tmp_path):
    """bf16 represents 256, 258, 260: bf16 angles would give adjacent tokens far from the start the same position."""
    MODEL.save(tiny(max_position_embeddings=4096), tmp_path)
    positions = torch.tensor([[3001]])
    exact, _ = MODEL.load(tmp_path).model.rope_tables(positions, torch.float32)
    loaded, _ = MODEL.load(tmp_path, "bfloat16").model.rope_tables(positions, torch.float32)
    converted, _ = MODEL.load(tmp_path).to(torch.bfloat16).model.rope_tables(positions, torch.float32)
    assert torch.equal(loaded, exact)
    assert torch.equal(converted, exact)


def test_heads_are_selected_and_new_heads_depend_on_the_seed(hub):
    folder = hub("llama-gqa")
    ids = ids_of(1, 6)
    both = MODEL.load(folder, head=("lm", "value"))
    assert both.heads == ("lm", "value") and not both(ids, want=("values",)).values.any()
    close(both(ids).logits, MODEL.load(folder)(ids).logits, 1e-6)
    first, same, other = (MODEL.load(folder, head="score", seed=s).score.weight for s in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other) and first.std() > 0
    assert MODEL.load(folder, head="score")(ids).logits is None
    with pytest.raises(UserError, match="head"):
        MODEL.load(folder, head="pooler")


# ---------------------------------------------------------------------------------------------------- positions


def our_rope(hf_config, **parameters):
    config = ModelConfig(hidden_size=hf_config.hidden_size, num_attention_heads=hf_config.num_attention_heads,
                         max_position_embeddings=hf_config.max_position_embeddings, rope_theta=parameters.pop("rope_theta"),
                         rope_scaling=parameters)
    return MODEL.rope_frequencies(config)


BIG_YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768, rope_theta=1e6)
ROPES = {
    "default": dict(rope_type="default", rope_theta=10000.0),
    "linear": dict(rope_type="linear", factor=2.5, rope_theta=10000.0),
    "llama3": dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=8192, rope_theta=500000.0),
    "yarn": BIG_YARN,
    "yarn betas": dict(BIG_YARN, beta_fast=16.0, beta_slow=2.0),
    "yarn untruncated": dict(BIG_YARN, truncate=False),
    "yarn mscale": dict(BIG_YARN, factor=40.0, mscale=0.707, mscale_all_dim=1.2),
    "yarn attention_factor": dict(BIG_YARN, attention_factor=1.25),
}


@pytest.mark.parametrize("kind", ROPES)
def test_rope_frequencies_equal_transformers(kind):
    parameters = ROPES[kind]
    config = transformers.LlamaConfig(hidden_size=512, num_attention_heads=4, max_position_embeddings=131072,
                                      rope_parameters=dict(parameters))
    known = modeling_rope_utils.ROPE_INIT_FUNCTIONS
    compute = known.get(parameters["rope_type"], LlamaRotaryEmbedding.compute_default_rope_parameters)
    frequencies, factor = compute(config)
    ours, our_factor = our_rope(config, **parameters)
    torch.testing.assert_close(ours, frequencies, rtol=1e-6, atol=0)
    assert our_factor == pytest.approx(factor, rel=1e-9)


def test_yarn_follows_the_paper():
    """Peng 2023, section 3.2 (dimension d makes r(d) = L / wavelength rotations) and eq. 15; the ramp is linear in the dimension,
    as in the authors' released code."""
    dim, base, scale, length, beta_fast, beta_slow = 128, 1e6, 4.0, 32768, 32.0, 1.0
    stand_in = types.SimpleNamespace(hidden_size=512, num_attention_heads=4, max_position_embeddings=131072)
    ours, factor = our_rope(stand_in, **BIG_YARN)
    low = math.floor(dim * math.log(length / (beta_fast * 2 * math.pi)) / (2 * math.log(base)))
    high = math.ceil(dim * math.log(length / (beta_slow * 2 * math.pi)) / (2 * math.log(base)))
    for d in range(dim // 2):
        theta = base ** (-2 * d / dim)
        turns = length * theta / (2 * math.pi)
        gamma = 1 - min(max((d - low) / (high - low), 0), 1)
        assert float(ours[d]) == pytest.approx((1 - gamma) * theta / scale + gamma * theta, rel=1e-5)
        if turns > beta_fast * 1.3:  # at least one dimension beyond the rounded boundary
            assert float(ours[d]) == pytest.approx(theta, rel=1e-5)
        if turns < beta_slow / 1.3:
            assert float(ours[d]) == pytest.approx(theta / scale, rel=1e-5)
    assert factor == pytest.approx(0.1 * math.log(scale) + 1)


def test_llama3_frequencies_follow_metas_reference():
    """apply_scaling of Meta's llama-models, for each frequency separately."""
    stand_in = types.SimpleNamespace(hidden_size=512, num_attention_heads=4, max_position_embeddings=131072)
    ours, factor = our_rope(stand_in, **ROPES["llama3"])
    kinds = set()
    for d in range(64):
        frequency = 500000.0 ** (-2 * d / 128)
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            kind, expected = "kept", frequency
        elif wavelength > 8192 / 1:
            kind, expected = "stretched", frequency / 8
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            kind, expected = "blended", (1 - smooth) * frequency / 8 + smooth * frequency
        kinds.add(kind)
        assert float(ours[d]) == pytest.approx(expected, rel=1e-5)
    assert len(kinds) == 3 and factor == 1


def test_rotation_turns_each_pair_as_a_complex_number():
    config = ModelConfig(**SIZES)
    model = MODEL.build(config)
    states = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    turned = MODEL.rotate(states, *model.model.rope_tables(torch.arange(5)[None] + 7, torch.float32))
    first, second = states.double().chunk(2, -1)
    frequencies = 10000.0 ** (-torch.arange(0, 8, 2).double() / 8)
    turn = torch.polar(torch.ones(5, 4).double(), (torch.arange(5).double() + 7)[:, None] * frequencies)
    expected = torch.complex(first, second) * turn
    close(turned.double(), torch.cat((expected.real, expected.imag), -1), 1e-5)


# -------------------------------------------------------------------------------------------------- config.json


@pytest.mark.parametrize("scaling", [dict(LLAMA3), dict(YARN), dict(rope_type="linear", factor=2.0, rope_theta=100.0)])
def test_both_formats_of_rope_keys_are_equivalent(scaling):
    theta = scaling.pop("rope_theta")
    plain = dict(SIZES, model_type="llama")
    unprefixed = {"type" if k == "rope_type" else k: v for k, v in scaling.items()}
    spellings = [dict(plain, rope_theta=theta, rope_scaling=scaling), dict(plain, rope_theta=theta, rope_scaling=unprefixed),
                 dict(plain, rope_parameters=dict(scaling, rope_theta=theta)),
                 dict(plain, rope_parameters=dict(scaling, rope_theta=theta, type=scaling["rope_type"]))]
    configs = [MODEL.config_from_hub(raw) for raw in spellings]
    assert all(config == configs[0] for config in configs)
    assert configs[0].rope_theta == theta and configs[0].rope_scaling == scaling
    default = MODEL.config_from_hub(dict(plain, rope_parameters=dict(rope_type="default", rope_theta=theta)))
    assert default == MODEL.config_from_hub(dict(plain, rope_theta=theta, rope_scaling=None)) != configs[0]


def test_unused_config_keys_are_ignored():
    raw = dict(SIZES, model_type="llama", use_cache=True, pretraining_tp=1, torch_dtype="float16", _name_or_path="x",
               transformers_version="4.30.0", sliding_window=7, layer_types=["nonsense"])
    assert MODEL.config_from_hub(raw) == MODEL.config_from_hub(dict(SIZES, model_type="llama"))


@pytest.mark.parametrize("prefix", ["Llama", "Mistral", "Qwen2", "Qwen3", "GPT2"])
def test_missing_config_keys_take_the_class_defaults(prefix):
    """A config.json may omit keys that have their default, so the defaults must be those of transformers."""
    theirs = getattr(transformers, prefix + "Config")()
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    spelling = MODEL.FAMILIES["gpt2"].names if prefix == "GPT2" else {}
    raw = {spelling.get(name, name): getattr(theirs, name) for name in sizes}
    if prefix != "GPT2":
        raw["intermediate_size"] = theirs.intermediate_size
    ours = MODEL.config_from_hub(dict(raw, model_type=theirs.model_type))
    kv_heads = getattr(theirs, "num_key_value_heads", theirs.num_attention_heads)
    expected = dict(num_key_value_heads=kv_heads, max_position_embeddings=theirs.max_position_embeddings,
                    tie_word_embeddings=theirs.tie_word_embeddings, initializer_range=theirs.initializer_range,
                    rms_norm_eps=getattr(theirs, "rms_norm_eps", getattr(theirs, "layer_norm_epsilon", None)),
                    hidden_act=getattr(theirs, "hidden_act", getattr(theirs, "activation_function", None)),
                    sliding_window=theirs.sliding_window if prefix == "Mistral" else None)
    assert {name: getattr(ours, name) for name in expected} == expected


def test_unsupported_features_are_refused():
    """Ignoring a key that changes the computation would load a model with wrong outputs."""
    for key, value in (("scale_attn_by_inverse_layer_idx", True), ("reorder_and_upcast_attn", True),
                       ("scale_attn_weights", False)):
        with pytest.raises(UserError, match=key):
            MODEL.config_from_hub(dict(GPT2, model_type="gpt2", **{key: value}))


@pytest.mark.parametrize("preset", MODEL.PRESETS)
def test_presets_round_trip_through_config_json(preset):
    config = MODEL.preset_config(preset)
    raw = json.loads(json.dumps(MODEL.config_to_hub(config)))
    assert raw["model_type"] == config.model_type
    assert MODEL.config_from_hub(raw) == config


PUBLISHED = {"gpt2-124m": 124_439_808, "llama3-8b": 8_030_261_248, "mistral-7b": 7_241_732_096, "qwen2-0.5b": 494_032_768,
             "qwen3-0.6b": 596_049_920, "llama2-7b": 6_738_415_616, "llama3.1-405b": 405_853_388_800}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(preset):
    model = MODEL.build(preset, device="meta")
    assert MODEL.count_parameters(model) == (PUBLISHED[preset], PUBLISHED[preset])


def test_generation_config_overrides_the_end_of_text(hub, tmp_path):
    shutil.copytree(hub("llama-gqa"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 9], "pad_token_id": 3}))
    config = MODEL.read_config(tmp_path)
    assert config.eos_ids == [5, 9] and config.pad_token_id == 3


# ------------------------------------------------------------------------------------------------ files of the hub


def write_folder(folder: Path, family: str, state: dict, name: str = "model.safetensors", **config) -> Path:
    """A folder with a family's config.json and any tensors."""
    folder.mkdir(exist_ok=True)
    raw = {**reference(family).config.to_diff_dict(), **config}
    (folder / "config.json").write_text(json.dumps(raw))
    state = {key: tensor.detach().clone().contiguous() for key, tensor in state.items()}
    if name.endswith("safetensors"):
        save_file(state, folder / name)
    else:
        torch.save(state, folder / name)
    return folder


def weights_of(family: str) -> dict:
    return dict(reference(family).state_dict())


def assert_loads(folder: Path, family: str):
    with torch.no_grad():
        close(MODEL.load(folder)(ids_of(1, 20)).logits, reference(family)(ids_of(1, 20)).logits, 1e-4)


def hub_logits(folder: Path) -> torch.Tensor:
    """The logits of transformers for the model in a folder."""
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids_of(1, 20)).logits


def our_logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return MODEL.load(folder)(ids_of(1, 20)).logits


@pytest.mark.parametrize("family, embedding", [("llama-gqa", "model.embed_tokens.weight"), ("gpt2", "transformer.wte.weight")])
@pytest.mark.parametrize("case", ["a head that differs", "the head alone", "both are equal"])
def test_a_head_that_config_json_declares_tied(family, embedding, case, tmp_path):
    state = weights_of(family)
    head = state[embedding].clone() if case == "both are equal" else torch.randn_like(state[embedding])
    state["lm_head.weight"] = head
    if case == "the head alone":
        del state[embedding]
    folder = write_folder(tmp_path / "tied", family, state, tie_word_embeddings=True)
    close(our_logits(folder), hub_logits(folder), 1e-4)
    MODEL.save(MODEL.load(folder), tmp_path / "again")
    close(hub_logits(tmp_path / "again"), hub_logits(folder), 1e-4)


def test_a_single_file_is_preferred_to_an_index(hub, tmp_path):
    transformers.AutoModelForCausalLM.from_pretrained(hub("llama-gqa")).save_pretrained(tmp_path, max_shard_size="10KB")
    MODEL.save(tiny(seed=9), tmp_path / "newer")
    for name in ("model.safetensors", "config.json"):
        shutil.copy(tmp_path / "newer" / name, tmp_path)
    assert len(list(tmp_path.glob("model-*"))) > 1
    close(our_logits(tmp_path), hub_logits(tmp_path), 1e-4)
    close(our_logits(tmp_path), our_logits(tmp_path / "newer"))


@pytest.mark.parametrize("change", [
    dict(rope_scaling=dict(rope_type="linear", factor=4.0)), dict(rope_scaling={k: v for k, v in YARN.items() if k != "rope_theta"}),
    dict(rope_parameters=dict(LLAMA3), original_max_position_embeddings=16),
    dict(rope_parameters={k: v for k, v in YARN.items() if k != "original_max_position_embeddings"}, original_max_position_embeddings=16),
])
def test_duplicate_rope_keys_are_read_as_in_transformers(change, tmp_path):
    """The keys of v4 and v5 together, and the original length outside of both."""
    MODEL.save(tiny(), tmp_path)
    before, raw = our_logits(tmp_path), json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, **({} if "rope_scaling" in change else {"rope_scaling": None}), **change}))
    close(our_logits(tmp_path), hub_logits(tmp_path), 1e-4)
    assert apart(our_logits(tmp_path), before) > 1e-3


def test_gpt2_files_of_the_hub_load(tmp_path):
    """Early files: base class without prefix, with mask buffers; later files: with masked_bias and lm_head."""
    state = weights_of("gpt2")
    head = state.pop("lm_head.weight")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(2)}
    assert_loads(write_folder(tmp_path / "bare", "gpt2", bare | masks), "gpt2")
    masked = {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    masks = {f"transformer.{name}": mask.bool() for name, mask in masks.items()}
    assert_loads(write_folder(tmp_path / "prefixed", "gpt2", state | masks | masked | {"lm_head.weight": head}), "gpt2")


def test_llama_files_of_the_hub_load(tmp_path):
    """Early Llama files contain rotary buffers; a base class has no `model.` prefix, and its head is the embedding."""
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    assert_loads(write_folder(tmp_path / "old", "llama-gqa", weights_of("llama-gqa") | old), "llama-gqa")
    base = {name.removeprefix("model."): t for name, t in weights_of("llama-mqa").items() if name != "lm_head.weight"}
    assert_loads(write_folder(tmp_path / "base", "llama-mqa", base, architectures=["LlamaModel"]), "llama-mqa")
    tied = write_folder(tmp_path / "tied", "llama-mqa", weights_of("llama-mqa"))
    assert "lm_head.weight" in load_file(tied / "model.safetensors")
    assert_loads(tied, "llama-mqa")
    model = MODEL.load(tied)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_pickled_weights_load(tmp_path):
    folder = write_folder(tmp_path / "one", "llama-gqa", weights_of("llama-gqa"), "pytorch_model.bin")
    assert_loads(folder, "llama-gqa")
    state = weights_of("llama-gqa")
    names = list(state)
    parts = {"pytorch_model-00001-of-00002.bin": names[:7], "pytorch_model-00002-of-00002.bin": names[7:]}
    for file, keys in parts.items():
        folder = write_folder(tmp_path / "two", "llama-gqa", {key: state[key] for key in keys}, file)
    index = {"metadata": {}, "weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_loads(folder, "llama-gqa")
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(UserError, match="pytorch_model-00002-of-00002.bin"):
        MODEL.load(folder)


def test_pickles_in_the_old_format_load(tmp_path):
    """torch before 1.6 wrote plain pickles, which the oldest files of the hub are (gpt2, for example)."""
    folder = write_folder(tmp_path, "gpt2", {}, "pytorch_model.bin")
    torch.save(weights_of("gpt2"), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_loads(folder, "gpt2")


class Payload:
    """Runs when unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_pickled_code_is_refused_and_not_run(form, tmp_path):
    folder, marker = write_folder(tmp_path / "model", "llama-gqa", {}, "pytorch_model.bin"), tmp_path / "ran"
    state = weights_of("llama-gqa") | {"lm_head.bias": Payload(marker)}
    path = folder / "pytorch_model.bin"
    if form == "pickle":
        path.write_bytes(pickle.dumps(state))
        pickle.loads(path.read_bytes())
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
        torch.load(path, weights_only=False)
    assert marker.exists()  # the payload works
    marker.rmdir()
    with pytest.raises(UserError, match="pytorch_model.bin"):
        MODEL.load(folder)
    assert not marker.exists()


def test_shards_are_written_and_read(tmp_path, monkeypatch):
    import huggingface_hub

    model, whole = tiny(), huggingface_hub.save_torch_state_dict

    def in_shards(state, folder, **options):
        return whole(state, folder, max_shard_size="10KB")

    MODEL.save(tiny(seed=9), tmp_path)
    monkeypatch.setattr(huggingface_hub, "save_torch_state_dict", in_shards)
    MODEL.save(model, tmp_path)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / "model.safetensors").exists()
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = model(ids_of(1, 20)).logits
        close(MODEL.load(tmp_path)(ids_of(1, 20)).logits, expected, 1e-6)
        close(hf(ids_of(1, 20)).logits, expected, 1e-4)
    monkeypatch.undo()
    MODEL.save(model, tmp_path)
    assert {path.name for path in tmp_path.glob("model*")} == {"model.safetensors"}  # old shards and the index are removed


def damaged(state: dict, how: str) -> dict:
    key = "model.layers.1.mlp.up_proj.weight"
    if how == "missing":
        state.pop(key)
    elif how == "extra":
        state["model.layers.2.mlp.up_proj.weight"] = state[key]
    elif how == "misshapen":
        state[key] = state[key][:, :-1]
    elif how == "headless":
        state.pop("lm_head.weight")
    return state


@pytest.mark.parametrize("how, named", [("missing", "missing tensor model.layers.1.mlp.up_proj.weight"),
                                        ("extra", "unexpected tensor model.layers.2.mlp.up_proj.weight"),
                                        ("misshapen", r"model.layers.1.mlp.up_proj.weight has shape \(48, 31\).*\(48, 32\)"),
                                        ("headless", "missing tensor lm_head.weight")])
def test_mismatched_tensors_are_refused(how, named, tmp_path):
    folder = write_folder(tmp_path, "llama-gqa", damaged(weights_of("llama-gqa"), how))
    with pytest.raises(UserError, match=named) as error:
        MODEL.load(folder)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_truncated_file_is_refused(name, tmp_path):
    folder = write_folder(tmp_path, "llama-gqa", weights_of("llama-gqa"), name)
    data = (folder / name).read_bytes()
    for size in (0, 5, len(data) // 2, len(data) - 1):
        (folder / name).write_bytes(data[:size])
        with pytest.raises(UserError, match=name):
            MODEL.load(folder)


@pytest.mark.parametrize("text, named", [("{", "not valid JSON"), ("[1, 2]", "config.json"), ('{"model_type": "t5"}', "t5"),
                                         ("{}", "model_type"), ('{"model_type": "llama", "hidden_size": "wide"}', "config.json"),
                                         (None, "config.json.*missing")])
def test_an_invalid_config_json_is_refused(text, named, tmp_path):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=named) as error:
        MODEL.load(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_folder_without_weights_is_refused(hub, tmp_path):
    shutil.copy(hub("llama-gqa") / "config.json", tmp_path)
    with pytest.raises(UserError, match="model.safetensors"):
        MODEL.load(tmp_path)
    with pytest.raises(UserError, match="folder not found"):
        MODEL.load(tmp_path / "elsewhere")


def test_an_invalid_index_is_refused(hub, tmp_path):
    shutil.copy(hub("llama-gqa") / "config.json", tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"metadata": {}}')
    with pytest.raises(UserError, match="index.json"):
        MODEL.load(tmp_path)


# ------------------------------------------------------------------------------------------------- the forward pass


@pytest.fixture()
def batch():
    """ids, targets and positions with one masked target and padding at the end."""
    ids, targets = ids_of(3, 8, seed=7), ids_of(3, 8, seed=8)
    positions = torch.arange(8).expand(3, 8).clone()
    targets[0, 2], positions[1, 6:] = -100, -1
    return ids, targets, positions, (targets != -100) & (positions >= 0)


def gradients_of(model, loss) -> dict:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("keep", [0, 2**40])
@pytest.mark.parametrize("chunk", [1, 4 * VOCAB * 5, 2**25])
def test_logprobs_and_entropy_equal_log_softmax(temperature, chunk, keep, batch, monkeypatch):
    """For any chunk size, with logits kept or recomputed; values and gradients."""
    monkeypatch.setattr(MODEL, "HEAD_CHUNK_BYTES", (chunk, chunk))
    monkeypatch.setattr(MODEL, "HEAD_KEEP_BYTES", keep)
    ids, targets, positions, trained = batch
    model = tiny()
    weights = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    out = model(ids, positions, targets=targets, temperature=temperature, want=("entropy",))
    ours = gradients_of(model, (out.logprobs * weights + out.entropy * weights.flip(0)).sum())
    table = (model(ids, positions).logits / temperature).log_softmax(-1)
    logprobs = torch.where(trained, table.gather(-1, targets.clamp(min=0)[..., None])[..., 0], 0)
    entropy = torch.where(trained, -(table.exp() * table).sum(-1), 0)
    assert out.logits is None and out.logprobs.dtype == torch.float32
    close(out.logprobs, logprobs)
    close(out.entropy, entropy)
    theirs = gradients_of(model, (logprobs * weights + entropy * weights.flip(0)).sum())
    for name in ours:
        assert (ours[name] - theirs[name]).norm() <= 1e-5 * theirs[name].norm() + 1e-7, name


def test_masked_positions_are_exactly_zero(batch):
    ids, targets, positions, trained = batch
    model = tiny()
    out = model(ids, positions, targets=targets, reduce=lambda logits, rows: {"top": logits.amax(-1)}, want=("entropy",))
    for values in (out.logprobs, out.entropy, out.reduced["top"]):
        assert (values[~trained] == 0).all() and (values[trained] != 0).all()
    loss = (out.logprobs + out.entropy + out.reduced["top"])[~trained].sum()
    assert all(not gradient.any() for gradient in gradients_of(model, loss).values())


@pytest.mark.parametrize("keep", [0, 2**40])
def test_reduce_receives_the_logits(keep, batch, monkeypatch):
    monkeypatch.setattr(MODEL, "HEAD_CHUNK_BYTES", (4 * VOCAB * 4, 4 * VOCAB * 4))
    monkeypatch.setattr(MODEL, "HEAD_KEEP_BYTES", keep)
    ids, targets, positions, trained = batch
    model, seen = tiny(), {}
    teacher = torch.randn(24, VOCAB, generator=torch.Generator().manual_seed(0))

    def reduce(logits, rows):
        seen.update(zip(rows.tolist(), logits.detach(), strict=True))
        return {"cross": (logits * teacher[rows]).sum(-1), "row": rows.float()}

    out = model(ids, positions, targets=targets, reduce=reduce, temperature=0.5)
    logits = model(ids, positions).logits.flatten(0, 1)
    indices = trained.flatten().nonzero()[:, 0].tolist()
    assert sorted(seen) == indices
    close(torch.stack([seen[index] for index in indices]), logits[indices])
    assert out.reduced["row"].flatten().tolist() == [float(i) if i in indices else 0.0 for i in range(24)]
    expected = torch.where(trained, (logits * teacher).sum(-1).view(3, 8), 0)
    close(out.reduced["cross"], expected, 1e-4)
    ours, theirs = (gradients_of(model, loss.sum()) for loss in (out.reduced["cross"], expected))
    for name in ours:
        close(ours[name], theirs[name], 1e-4)
    alone = model(ids, reduce=reduce)
    assert alone.logits is None and alone.logprobs is None and alone.reduced["row"].flatten().tolist() == list(range(24))


@some_families
def test_hidden_states_have_the_order_of_transformers(family, hub):
    ids = ids_of(2, 9)
    with torch.no_grad():
        ours = MODEL.load(hub(family))(ids, want=("hidden_states",))
        theirs = reference(family)(ids, output_hidden_states=True).hidden_states
    assert len(ours.hidden_states) == len(theirs)
    for states, expected in zip(ours.hidden_states, theirs):
        close(states, expected, 1e-4)
    assert ours.logits is not None and ours.values is None and ours.entropy is None


def test_value_and_score_heads_are_applied_at_every_position():
    model = tiny(head=("lm", "value", "score"), num_labels=3)
    with torch.no_grad():
        model.value_head.weight.normal_(generator=torch.Generator().manual_seed(0))
        out = model(ids_of(2, 6), want=("values", "scores", "hidden_states"))
    last = out.hidden_states[-1]
    close(out.values, (last @ model.value_head.weight.T)[..., 0])
    close(out.scores, last @ model.score.weight.T)
    assert out.values.shape == (2, 6) and out.scores.shape == (2, 6, 3) and out.values.dtype == torch.float32
    close(model.head_logits(last[0]), out.logits[0])


def test_invalid_arguments_are_refused():
    model, ids = tiny(), ids_of(1, 4)
    kv = model.new_cache(1, 8)
    step = MODEL.CacheStep(kv, [(*texts_of(kv, 1, 4), 4)])
    for arguments in (dict(token_types=torch.zeros(1, 4)), dict(cache=step, positions=torch.arange(4)[None]),
                      dict(cache=step, segment_ids=torch.zeros(1, 4))):
        with pytest.raises(ValueError):
            model(ids, **arguments)


class Largest(TorchDispatchMode):
    """Records the largest number of elements of any float32 result of an operation."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.numel = max(self.numel, tensor.numel())
        return result


def test_targets_do_not_allocate_all_logits(monkeypatch):
    vocab, shape = 1000, (8, 16)
    monkeypatch.setattr(MODEL, "HEAD_CHUNK_BYTES", (4 * vocab * 8, 4 * vocab * 8))
    monkeypatch.setattr(MODEL, "HEAD_KEEP_BYTES", 0)
    model, ids = tiny(vocab_size=vocab), ids_of(*shape)
    everything = math.prod(shape) * vocab
    for arguments in (dict(targets=ids, want=("entropy",)), dict(reduce=lambda logits, rows: {"top": logits.amax(-1)})):
        with Largest() as largest:
            out = model(ids, **arguments)
            (out.reduced["top"] if out.reduced else out.logprobs).sum().backward()
        assert vocab * 8 <= largest.numel <= everything / 3, arguments  # the embedding's gradient is a quarter
    with Largest() as largest:
        model(ids)
    assert largest.numel == everything  # the full logits are detected


@pytest.mark.parametrize("keep, chunks", [(4 * VOCAB * 24, 3), (4 * VOCAB * 24 - 1, 6)])
def test_large_logits_are_recomputed_in_backward(keep, chunks, monkeypatch):
    monkeypatch.setattr(MODEL, "HEAD_CHUNK_BYTES", (4 * VOCAB * 8, 4 * VOCAB * 8))
    monkeypatch.setattr(MODEL, "HEAD_KEEP_BYTES", keep)
    model, ids, calls = tiny(), ids_of(3, 8), []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    model(ids, targets=ids).logprobs.sum().backward()
    assert len(calls) == chunks
    calls.clear()
    with torch.no_grad():
        model(ids, targets=ids)
    assert len(calls) == 3


@every_kernel
def test_a_batch_of_only_padding(kernel):
    model, ids = tiny(kernel=kernel), ids_of(2, 5)
    out = model(ids, torch.full((2, 5), -1), targets=ids, want=("entropy", "hidden_states"))
    assert not out.logprobs.any() and not out.entropy.any()
    assert all(state.isfinite().all() for state in out.hidden_states)
    gradients = gradients_of(model, out.logprobs.sum())
    assert all(gradient.isfinite().all() and not gradient.any() for gradient in gradients.values())
    assert not model(ids, targets=torch.full((2, 5), -100)).logprobs.any()


# ------------------------------------------------------------------------------------------- packing and padding

DOCUMENTS = [[11, 3], [4, 7, 2]]  # lengths in each row of 14; the rest is padding


def pack() -> tuple:
    """ids, positions, segment_ids (2, 14), and the documents: (row, start, ids)."""
    ids, positions, segments, documents = ids_of(2, 14, seed=5), torch.full((2, 14), -1), torch.full((2, 14), -1), []
    for row, lengths in enumerate(DOCUMENTS):
        start = 0
        for number, length in enumerate(lengths):
            span = slice(start, start + length)
            positions[row, span], segments[row, span] = torch.arange(length), number
            documents.append((row, start, ids[row, span]))
            start += length
    return ids, positions, segments, documents


def assert_documents(model, logits, documents):
    for row, start, document in documents:
        close(logits[row, start : start + len(document)], model(document[None]).logits[0], 2e-5)


@every_kernel
@some_families
@pytest.mark.parametrize("training", [True, False])
def test_packed_documents_equal_separate_documents(family, kernel, training, hub):
    ids, positions, segments, documents = pack()
    model = with_kernel(hub(family), kernel)
    with torch.set_grad_enabled(training):
        given = model(ids, positions, segment_ids=segments).logits
        default = model(ids, segment_ids=segments).logits
    assert given.isfinite().all() and default.isfinite().all()
    with torch.no_grad():
        assert_documents(with_kernel(hub(family), "eager"), given, documents)
        assert_documents(model, default, documents)


@every_kernel
@some_families
@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_changes_nothing(family, kernel, padding, hub):
    ids, lengths = ids_of(3, 12, seed=6), [12, 9, 1]
    positions = torch.full((3, 12), -1)
    documents = []
    for row, length in enumerate(lengths):
        start = 12 - length if padding == "left" else 0
        positions[row, start : start + length] = torch.arange(length)
        documents.append((row, start, ids[row, start : start + length]))
    model = with_kernel(hub(family), kernel)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            logits = model(ids, positions).logits
        assert logits.isfinite().all()
        with torch.no_grad():
            assert_documents(with_kernel(hub(family), "eager"), logits, documents)


@every_kernel
def test_padding_contributes_no_gradient(kernel):
    """Tokens at padded positions must not affect the gradients through other tokens."""
    model = tiny(kernel=kernel)
    ids, positions = ids_of(2, 6), torch.arange(6).expand(2, 6).clone()
    positions[1, 3:] = -1
    targets = ids.roll(-1, 1)
    first = gradients_of(model, model(ids, positions, targets=targets).logprobs.sum())
    ids[1, 3:] = (ids[1, 3:] + 1) % VOCAB
    second = gradients_of(model, model(ids, positions, targets=targets).logprobs.sum())
    assert all(torch.equal(first[name], second[name]) for name in first)


# --------------------------------------------------------------------------------------------------- the KV cache


def texts_of(kv, count, length):
    """`count` sequences with room for `length` tokens each."""
    made = [MODEL.Sequence() for _ in range(count)]
    assert all(kv.extend(sequence, length) for sequence in made)
    return made


@torch.no_grad()
def feed(model, kv, *parts):
    """Run one step with the next ids (T,) of each sequence; returns the logits (T, V) of each."""
    step = MODEL.CacheStep(kv, [(sequence, len(ids)) for sequence, ids in parts])
    return model(torch.cat([ids for _, ids in parts])[None], cache=step).logits[0].split([len(ids) for _, ids in parts])


PAGES = [1, 4, 16]  # tokens per page: several pages per sequence, or each sequence in one page that is read in place


@every_kernel
@some_families
@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("steps", [[1] * 12, [7, 1, 4], [12]])
def test_cached_steps_equal_a_full_forward_pass(family, kernel, steps, page, hub):
    model, ids = with_kernel(hub(family), kernel), ids_of(2, 12)
    kv, done, found = model.new_cache(-(-12 // page) * 2, page), 0, []
    both = texts_of(kv, 2, 12)
    for step in steps:
        found.append(torch.stack(feed(model, kv, *((sequence, row[done : done + step]) for sequence, row in zip(both, ids)))))
        done += step
    with torch.no_grad():
        close(torch.cat(found, 1), model(ids).logits, 2e-5)


@pytest.mark.parametrize("gather", [0, 2**20])
@pytest.mark.parametrize("page", PAGES)
@some_families
def test_steps_that_mix_prompts_and_decoding(family, page, gather, hub, monkeypatch):
    """Prompts, continued prompts and single tokens in one step, in any order, in scattered pages."""
    monkeypatch.setitem(MODEL.GATHER_BYTES, "cpu", gather)
    model, texts, random = MODEL.load(hub(family)), ids_of(6, 14), np.random.default_rng(0)
    kv = model.new_cache(6 * -(-14 // page), page)
    with torch.no_grad():
        expected = model(texts).logits
    open_, done = [MODEL.Sequence() for _ in texts], [0] * 6
    while min(done) < 14:
        parts = [(row, min(int(random.choice([1, 1, 1, 3, 6])), 14 - done[row])) for row in random.permutation(6) if done[row] < 14]
        parts = parts[: random.integers(1, 7)]
        assert all(kv.extend(open_[row], done[row] + count) for row, count in parts)
        logits = feed(model, kv, *((open_[row], texts[row, done[row] : done[row] + count]) for row, count in parts))
        for (row, count), found in zip(parts, logits):
            close(found, expected[row, done[row] : done[row] + count], 2e-5)
            done[row] += count
    for sequence in open_:
        kv.close(sequence)
    assert kv.available() == kv.pages and not any(kv.references)


@pytest.mark.parametrize("page", PAGES)
def test_forks_share_full_pages_and_diverge(page):
    model, texts = tiny(), ids_of(2, 8)
    texts[1, :5] = texts[0, :5]
    kv = model.new_cache(3 * -(-8 // page), page)
    with torch.no_grad():
        expected = model(texts).logits
    [first] = texts_of(kv, 1, 8)
    feed(model, kv, (first, texts[0, :6]))
    second = kv.fork(first, 5)
    assert second.pages[: 5 // page] == first.pages[: 5 // page] and not set(second.pages[5 // page :]) & set(first.pages)
    kv.extend(second, 8)
    for found, row, start in zip(feed(model, kv, (second, texts[1, 5:]), (first, texts[0, 6:])), (1, 0), (5, 6)):
        close(found, expected[row, start:], 2e-5)
    kv.close(first)
    kv.close(second)
    assert kv.available() == kv.pages


def test_cached_pages_are_found_until_they_are_evicted():
    model, texts = tiny(), ids_of(3, 13)
    texts[1, :9] = texts[0, :9]
    kv, [prompt, similar, _] = model.new_cache(5, 4), texts.tolist()
    with torch.no_grad():
        expected = model(texts).logits
    [first] = texts_of(kv, 1, 13)
    feed(model, kv, (first, texts[0]))
    kv.remember(first, prompt)
    assert [kv.find(ids).length for ids in (prompt[:12], prompt[:4], [*prompt[:3], 99, *prompt[4:]])] == [8, 0, 0]  # without the last token
    assert kv.find(prompt, b"adapter").length == 0
    kv = model.new_cache(5, 4)
    [first] = texts_of(kv, 1, 13)
    feed(model, kv, (first, texts[0]))
    kv.remember(first, prompt)
    kv.close(first)
    assert kv.available() == 5
    second = kv.find(similar)
    assert second.length == 8 and kv.available() == 3
    assert kv.extend(second, 13)
    close(feed(model, kv, (second, texts[1, 8:]))[0], expected[1, 8:], 2e-5)
    kv.close(second)
    [third] = texts_of(kv, 1, 13)  # takes free pages first, then the least recently used
    close(feed(model, kv, (third, texts[2]))[0], expected[2], 2e-5)
    kv.close(third)
    assert kv.find(prompt).length == 4 and not kv.extend(MODEL.Sequence(), 21)


def test_compact_moves_sequences_into_gaps():
    model, texts = tiny(), ids_of(4, 8)
    kv = model.new_cache(4, 8)
    with torch.no_grad():
        expected = model(texts).logits
    four = texts_of(kv, 4, 8)
    feed(model, kv, *((sequence, text[:5]) for sequence, text in zip(four, texts)))
    for number in (0, 2):
        kv.close(four[number])
    left = [four[1], four[3]]
    kv.compact(left)
    assert sorted(sequence.pages[0] for sequence in left) == [0, 1] and sorted(kv.free) == [2, 3]
    for found, row in zip(feed(model, kv, *((four[row], texts[row, 5:]) for row in (1, 3))), (1, 3)):
        close(found, expected[row, 5:], 2e-5)


def test_logits_at_selected_positions():
    model, ids = tiny(), ids_of(2, 6)
    with torch.no_grad():
        close(model(ids, at=torch.tensor([3, 10])).logits, model(ids).logits.flatten(0, 1)[[3, 10]])


def test_cache_bounds_and_size():
    model = tiny()
    kv = model.new_cache(6, 4)
    [sequence] = texts_of(kv, 1, 8)
    feed(model, kv, (sequence, ids_of(8)))
    with pytest.raises(IndexError):
        feed(model, kv, (sequence, ids_of(1)))
    assert not kv.extend(MODEL.Sequence(), 17) and kv.extend(MODEL.Sequence(), 16)
    states = 2 * 2 * 2 * (6 * 4) * 8  # keys and values, layers, heads, slots, head width
    assert kv.bytes() == 4 * states
    half = tiny().bfloat16()
    kv = half.new_cache(6, 4)
    feed(half, kv, (texts_of(kv, 1, 1)[0], ids_of(1)))
    assert kv.bytes() == 2 * states


# ----------------------------------------------------------------------------------------------- flash attention


def slow_attention(query, key, value, window):
    """Attention of one sequence (T, H, D), for each query separately."""
    result = torch.zeros_like(query)
    group = query.shape[1] // key.shape[1]
    for t in range(len(query)):
        first = 0 if window[0] < 0 else max(0, t - window[0])
        for h in range(query.shape[1]):
            seen = slice(first, t + 1), h // group
            scores = key[seen].float() @ query[t, h].float() / query.shape[-1] ** 0.5
            result[t, h] = scores.softmax(0) @ value[seen].float()
    return result


def fake_flash(calls: list):
    """flash_attn's function according to its documentation, in loops."""
    dtypes = (torch.float16, torch.bfloat16)

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                               softmax_scale=None, causal=False, window_size=(-1, -1)):
        assert causal and not dropout_p and q.dtype in dtypes, "FlashAttention only support fp16 and bf16 data type"
        assert cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
        edges = cu_seqlens_q.tolist()
        assert edges[0] == 0 and edges[-1] == len(q) == len(k)
        assert max_seqlen_q == max_seqlen_k == max(b - a for a, b in zip(edges, edges[1:]))
        calls.append("ragged")
        outputs = [slow_attention(q[a:b], k[a:b], v[a:b], window_size) for a, b in zip(edges, edges[1:])]
        return torch.cat(outputs)

    return types.SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)


@pytest.fixture()
def flash(monkeypatch):
    """flash() installs a fake flash-attn and returns the list of its calls."""
    def install():
        calls = []
        monkeypatch.setitem(sys.modules, "flash_attn", fake_flash(calls))
        monkeypatch.setattr(MODEL, "_installed", lambda package: True)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setitem(MODEL.KERNELS, "flash_attention_2", MODEL.KERNELS["flash_attention_2"]._replace(device="cpu"))
        return calls

    return install


@some_families
def test_flash_attention_of_packed_and_padded_batches(family, hub, flash):
    ids, positions, segments, documents = pack()
    left = torch.tensor([[-1] * 5 + list(range(9)), list(range(14))])
    cases = {"dense": dict(), "packed": dict(positions=positions, segment_ids=segments), "left padding": dict(positions=left),
             "segments": dict(segment_ids=segments)}
    eager = MODEL.load(hub(family), torch.float16, attn_implementation="eager")
    calls = flash()
    model = MODEL.load(hub(family), torch.float16, attn_implementation="flash_attention_2")
    with torch.no_grad():
        for name, arguments in cases.items():
            real = arguments.get("positions", torch.zeros(2, 14)) >= 0
            ours = model(ids, **arguments).logits
            assert ours.isfinite().all()
            assert apart(ours[real], eager(ids, **arguments).logits[real]) < 1e-2, name
            assert set(calls) == {"ragged"}, name
            calls.clear()
        kv = model.new_cache(2, 14)
        found = torch.stack(feed(model, kv, *zip(texts_of(kv, 2, 14), ids)))
        assert apart(found, eager(ids).logits) < 1e-2
    assert not calls  # cached states are not read by flash-attn


def test_flash_attention_passes_gradients(flash):
    ids, positions, segments, _ = pack()
    flash()
    found = []
    for kernel in ("eager", "flash_attention_2"):
        model = tiny(kernel=kernel, sliding_window=4).half()
        found.append(gradients_of(model, model(ids, positions, segment_ids=segments, targets=ids).logprobs.sum()))
    for name in found[0]:
        assert apart(found[1][name], found[0][name]) < 2e-2, name


def test_flash_attention_is_not_used_where_it_cannot_run(flash):
    """flash-attn has no float32 kernels, so auto uses others for a float32 model."""
    with pytest.raises(UserError, match="flash_attention_2 needs"):
        MODEL.choose_attention("flash_attention_2")
    with pytest.raises(UserError, match="nonsense"):
        MODEL.choose_attention("nonsense")
    ids, positions, _, _ = pack()
    expected = tiny(kernel="eager")(ids, positions).logits
    flash()
    real = positions >= 0
    close(tiny(kernel="auto")(ids, positions).logits[real], expected[real], 2e-5)
    whole = dict(kernel="eager", sliding_window=4)
    close(tiny(**{**whole, "kernel": "auto"})(ids).logits, tiny(**whole)(ids).logits, 2e-5)


# ------------------------------------------------------------------------- training: checkpoints, dropout, initial weights


@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_gradient_checkpointing_changes_nothing_but_memory(family, hub, monkeypatch):
    """With dropout, the second forward pass must draw the same random numbers."""
    ids, positions, segments, _ = pack()
    config = dataclasses.replace(MODEL.read_config(hub(family)), resid_pdrop=0.1, attention_dropout=0.1)
    found, forwards = [], []
    for checkpointing in (False, True):
        model = roughen(MODEL.build(config, seed=1), 2).train()
        model.model.gradient_checkpointing = checkpointing
        count = []
        model.model.layers[0].mlp.register_forward_hook(lambda *_, count=count: count.append(1))
        torch.manual_seed(0)
        loss = -model(ids, positions, segment_ids=segments, targets=ids).logprobs.sum()
        found.append((loss, gradients_of(model, loss)))
        forwards.append(len(count))
    assert forwards == [1, 2]
    close(found[0][0], found[1][0])
    for name in found[0][1]:
        close(found[0][1][name], found[1][1][name])


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("which", ["attention_dropout", "resid_pdrop", "embd_pdrop"])
def test_each_dropout_works_only_in_training(which, kernel):
    gpt2 = MODEL.config_from_hub(dict(GPT2, model_type="gpt2"))
    assert (gpt2.attention_dropout, gpt2.resid_pdrop, gpt2.embd_pdrop) == (0.1, 0.1, 0.1)
    none = dict(attention_dropout=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
    model = MODEL.build(dataclasses.replace(gpt2, **{**none, which: 0.1}), attn_implementation=kernel)
    ids = ids_of(2, 9)
    with torch.no_grad():
        still = model.eval()(ids).logits
        assert torch.equal(model(ids).logits, still)
        torch.manual_seed(0)
        first, second = model.train()(ids).logits, model(ids).logits
        assert not torch.allclose(first, second) and not torch.allclose(first, still)
        torch.manual_seed(0)
        assert torch.equal(model(ids).logits, first)
        undropped = MODEL.build(dataclasses.replace(gpt2, **none), attn_implementation=kernel).train()
        close(undropped(ids).logits, still)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_dropout_on_attention_keeps_its_mean(kernel):
    torch.manual_seed(0)
    query, key = torch.randn(2, 8, 4, 64, 8)
    ones = torch.ones(8, 4, 64, 8)
    output = MODEL.KERNELS[kernel].attend(query, key, ones, None, dropout=0.3)[:, :, 8:]
    assert float(output.mean()) == pytest.approx(1, abs=0.02) and output.std() > 0.05


def test_initial_weights_have_the_documented_standard_deviation():
    config = ModelConfig(**{**SIZES, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 8,
                            "initializer_range": 0.02, "attention_bias": True, "attention_out_bias": True})
    model = MODEL.build(config, ("lm", "value"), seed=3)
    for name, weight in model.named_parameters():
        if name.endswith("bias") or name.startswith("value_head"):
            assert not weight.any(), name
        elif weight.dim() == 1:
            assert (weight == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * 8) if re.search("o_proj|down_proj", name) else 0.02
            assert float(weight.std()) == pytest.approx(std, rel=0.05), name
            assert abs(float(weight.mean())) < 0.05 * std, name
    same, other = MODEL.build(config, ("lm", "value"), seed=3), MODEL.build(config, ("lm", "value"), seed=4)
    for (name, weight), twin, stranger in zip(model.named_parameters(), same.parameters(), other.parameters()):
        assert torch.equal(weight, twin)
        assert torch.equal(weight, stranger) == (weight.unique().numel() == 1), name


# ------------------------------------------------------------------------------------------------------- hardware


def prompts():
    return [ids_of(5, seed=1).tolist(), ids_of(11, seed=2).tolist()]


@pytest.mark.parametrize("family", ["gpt2", "llama-gqa", "llama-biases", "llama-mqa", "qwen3"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_fused_and_packed_weights_compute_the_same(family, stored, hub, capsys, monkeypatch):
    """Weights that 16 bits represent exactly stay in 16 bits. The results equal those of the same weights in float32."""
    monkeypatch.setattr(INFER, "PACK_WIDTH", 0)
    ids, greedy = ids_of(2, 16), INFER.Sampling(12, temperature=0, ignore_eos=True)
    plain = MODEL.load(hub(family), stored if stored == "bfloat16" else "float32")
    plain = (plain.half() if stored == "float16" else plain).float()
    with torch.no_grad():
        expected = plain(ids).logits
    text = [answer.ids for [answer] in INFER.generate(plain, prompts(), greedy)]
    fast = MODEL.fast_half("cpu") == torch.bfloat16 and stored == "bfloat16"
    tuned = INFER.configure_for_hardware(plain.bfloat16() if stored == "bfloat16" else plain)
    assert not hasattr(tuned.model.layers[0].self_attn, "q_proj")
    assert tuned.dtype == (torch.bfloat16 if fast else torch.float32)
    log, half = capsys.readouterr().err, "fbgemm" in torch.backends.quantized.supported_engines
    if not fast:
        linears = [module for module in tuned.modules() if isinstance(module, INFER.PackedLinear)]
        assert len(linears) == 4 * tuned.config.num_hidden_layers + 1  # including the head
        assert all(linear.half == (half and stored != "float32") for linear in linears)
        assert ("float16 weights" in log) == (half and stored != "float32")
    with torch.no_grad():
        error = (tuned(ids).logits.float() - expected).norm() / expected.norm()
    assert error < (3e-2 if fast else 1e-5)
    again = [answer.ids for [answer] in INFER.generate(tuned, prompts(), greedy)]
    assert [len(answer) for answer in again] == [12, 12]
    if not fast:
        assert again == text


def test_weights_that_float16_would_round_stay_float32(monkeypatch):
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this build of torch has no FBGEMM")
    monkeypatch.setattr(MODEL, "fast_half", lambda device: None)
    exact = torch.randn(1500, 8, generator=torch.Generator().manual_seed(0)).half()
    assert INFER.fits_float16(exact) and INFER.fits_float16(exact.float())
    for index, number in ((0, 1 / 3), (1400, 1 / 3), (1400, 1e5), (3, float("nan"))):
        rounded = exact.float()
        rounded[index] = number
        assert not INFER.fits_float16(rounded)
    assert INFER.fits_float16(torch.tensor([[2.0**-30, -2.0**-24, 60000.0]])) and INFER.fits_float16(torch.zeros(2, 3))
    usual = (exact * 0.02).bfloat16()
    assert INFER.fits_float16(usual) and not INFER.fits_float16(usual * 2.0**-10) and not INFER.fits_float16(usual * 2.0**24)
    monkeypatch.setattr(MODEL, "fast_half", lambda device: torch.bfloat16)
    assert not INFER.fits_float16(usual)


PEAK = """
import sys, threading, time, torch, MODEL
torch.set_num_threads(1)
page = 4096
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * page
MODEL.load(sys.argv[2])  # what torch itself loads at its first use is not the model's
peak, done = resident(), False
before = peak
def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.0005)
thread = threading.Thread(target=watch)
thread.start()
model = MODEL.load(sys.argv[1])
touched = sum(float(weight.detach().sum()) for weight in model.parameters())  # mapped pages count once they are read
done = True
thread.join()
weights = sum(weight.numel() * 4 for weight in model.parameters())
print((max(peak, resident()) - before) / weights, weights / 1e6)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_loading_keeps_one_copy_of_the_weights(hub, tmp_path):
    config = ModelConfig(vocab_size=16000, hidden_size=512, intermediate_size=1408, num_hidden_layers=4)
    state = {name: torch.zeros(weight.shape) for name, weight in MODEL.build(config, device="meta").state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(MODEL.config_to_hub(config)))
    command = [sys.executable, "-c", PEAK, str(tmp_path), str(hub("llama-gqa"))]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    growth, megabytes = map(float, result.stdout.split())
    assert 90 < megabytes < 140
    assert 0.9 < growth <= 1.35


class Allocated(TorchDispatchMode):
    """Counts the elements of uninitialized tensors on the CPU."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.empty.memory_format and result.device.type == "cpu":
            self.numel += result.numel()
        return result


def test_loading_allocates_no_initial_weights(hub):
    folder = hub("llama-gqa")
    with Allocated() as loading:
        model = MODEL.load(folder)
    with Allocated() as building:
        MODEL.build(model.config)
    total = MODEL.count_parameters(model)[0]
    assert loading.numel < total / 10 and building.numel >= total


# ------------------------------------------------------------------------------------------- command line and errors


def test_list_shows_every_preset(capsys):
    MODEL.main(["--list"])
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert set(MODEL.PRESETS) < set(rows)
    assert rows["gpt2-124m"] == ["gpt2-124m", "gpt2", "124,439,808", "124,439,808", "12", "768", "12", "12", "1024"]


def test_summary_shows_the_costs(capsys, hub):
    MODEL.main(["--model.preset", "llama3-8b"])
    text = capsys.readouterr().out
    flops = 2 * (8_030_261_248 - 128256 * 4096 - 65 * 4096)  # all weights except embedding and norms are matrix products
    assert "8,030,261,248" in text and f"{flops / 1e9:,.3f} G" in text
    assert f"{2 * 32 * 8 * 128 * 2:,} bytes in 16 bits" in text and "GQA" in text  # keys and values, layers, heads, head dimension, bytes
    assert "model.layers.*.self_attn.q_proj.weight" in text
    scores = 32 * 8192 * 4 * 4096  # layers, context, 2 products with 2 operations, width
    assert f"at full context {(flops + scores) / 1e9:,.3f} G" in text
    MODEL.main(["--model.preset", "llama-2m", "--model.num_hidden_layers", "3", "--model.vocab_size", "1000"])
    assert "3 x attention" in (text := capsys.readouterr().out) and "vocabulary 1,000" in text
    MODEL.main(["--model", str(hub("mistral"))])
    assert "window 5" in (text := capsys.readouterr().out)
    assert f"{sum(w.numel() for w in reference('mistral').parameters()):,}" in text
    with pytest.raises(UserError, match="llama3-8b"):
        MODEL.main(["--model.preset", "llama3-8bb"])


@pytest.mark.parametrize("knobs, named", [
    (dict(hidden_size=30), "num_attention_heads: hidden_size 30 is not divisible by 4"),
    (dict(num_key_value_heads=3), "num_key_value_heads: num_attention_heads 4 is not divisible by 3"),
    (dict(head_dim=7), "head_dim: 7"),
    (dict(vocab_size=0), "vocab_size: 0"),
    (dict(attention_dropout=1.0), "attention_dropout"),
    (dict(hidden_act="tanhh"), "hidden_act: 'tanhh'"),
    (dict(sliding_window=0), "sliding_window: 0"),
    (dict(layer_types=["full_attention"]), "layer_types: expected 2 values .one per layer., found 1"),
    (dict(layer_types=["full_attention", "chunked"]), "chunked"),
    (dict(layer_types=["full_attention", "sliding_attention"]), "sliding_window"),
    (dict(rope_scaling=dict(rope_type="spiral", factor=2.0)), "spiral"),
    (dict(rope_scaling=dict(factor=2.0)), "rope_type"),
    (dict(rope_scaling=dict(rope_type="yarn")), "yarn requires factor"),
    (dict(rope_scaling=dict(rope_type="llama3", factor=2.0)), "low_freq_factor"),
    (dict(norm_type="batchnorm"), "norm_type"),
    (dict(position_embedding_type="alibi"), "position_embedding_type"),
])
def test_invalid_settings_are_refused(knobs, named):
    with pytest.raises(UserError, match=named):
        MODEL.build(ModelConfig(**{**SIZES, **knobs}))


def test_learned_positions_allow_odd_head_dimensions():
    assert ModelConfig(**{**SIZES, "head_dim": 7, "position_embedding_type": "learned"}).head_dim == 7


def test_an_unknown_family_is_refused():
    with pytest.raises(UserError, match="model.model_type: 'lama' is not one of llama"):
        ModelConfig(model_type="lama")


def test_a_yaml_boolean_becomes_on_or_off():
    for value, text in ((True, "on"), (False, "off"), ("off", "off")):
        assert MODEL.convert(value, str, "inference.chat", ("auto", "on", "off")) == text


def test_an_unknown_preset_suggests_the_nearest():
    with pytest.raises(UserError, match="'qwen3-0.6b'"):
        MODEL.build("qwen3-0.6")
    with pytest.raises(UserError, match="'gpt2-xl'"):
        MODEL.build(dict(preset="gpt2-xxl"))
    assert MODEL.preset_config("qwen3-2m", num_attention_heads=4).head_dim == 48  # derived from the number of heads


def test_vector_functions_are_first_called_on_one_element():
    """In a separate process, in which no function was called before."""
    code = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode
names, late = {}, []
class First(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::").rstrip("_")
        if name in ("cos", "sin", "exp", "log", "tanh", "sqrt", "erf") and args[0].device.type == "cpu" and (name, args[0].dtype) not in names:
            names[name, args[0].dtype] = args[0].numel()
        return function(*args, **(kwargs or {}))
import MODEL
with First():
    with torch.device("meta"):
        MODEL.Transformer(MODEL.ModelConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, vocab_size=64))
    model = MODEL.build(MODEL.ModelConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, vocab_size=64))
    model(torch.zeros(2, 1024, dtype=torch.long))
print({size for size in names.values()}, len(names))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["{1}", "14"], done.stdout


def test_hub_files_are_fetched_once_and_pickles_only_without_safetensors(tmp_path, monkeypatch):
    import huggingface_hub

    MODEL.save(tiny(), tmp_path / "new")
    (tmp_path / "old").mkdir()
    torch.save(load_file(tmp_path / "new/model.safetensors"), tmp_path / "old/pytorch_model.bin")
    shutil.copy(tmp_path / "new/config.json", tmp_path / "old")
    calls: list = []

    def snapshot(name, allow_patterns):
        calls.append((name, "*.bin" in allow_patterns))
        return str(tmp_path / name.partition("/")[2])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    for _ in range(2):
        close(our_logits("someone/new"), our_logits("someone/old"))
    assert calls == [("someone/new", False), ("someone/old", False), ("someone/old", True)]
    MODEL.from_hub.cache_clear()


def test_classifiers_of_another_problem_type_are_refused(tmp_path):
    MODEL.save(tiny(head="score", num_labels=3), tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    for problem in ("regression", "multi_label_classification"):
        (tmp_path / "config.json").write_text(json.dumps({**raw, "problem_type": problem}))
        with pytest.raises(UserError, match=f"config.json: problem_type '{problem}' is not supported"):
            MODEL.load(tmp_path)


def test_score_and_value_heads_compute_outside_autocast():
    """Under bf16 autocast the backbone is rounded, but the products of score and value heads are not."""
    model, ids = tiny(head=("score", "value"), num_labels=2), ids_of(2, 9)
    torch.nn.init.normal_(model.value_head.weight)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        out = model(ids, want=("scores", "values", "hidden_states"))
    hidden = out.hidden_states[-1].float()
    close(out.scores, hidden @ model.score.weight.T, 1e-5)
    close(out.values, (hidden @ model.value_head.weight.T)[..., 0], 1e-5)


def test_list_counts_the_trained_parameters(capsys):
    MODEL.main(["--list"])
    rows = {line.split()[0]: line.split()[2] for line in capsys.readouterr().out.splitlines()[1:]}
    assert rows["llama-225k"] == "225,728" and rows["llama3-8b"] == "8,030,261,248"


@pytest.mark.parametrize("sharded", [True, False])
def test_an_interrupted_save_does_not_mix_old_and_new_files(sharded, tmp_path, monkeypatch):
    """Interrupted before each file operation: the folder loads with the old or the new weights, or is refused."""
    import huggingface_hub

    whole = huggingface_hub.save_torch_state_dict
    if sharded:
        monkeypatch.setattr(huggingface_hub, "save_torch_state_dict", lambda state, folder, **_: whole(state, folder, max_shard_size="10KB"))
    old, new = tiny(seed=1), tiny(seed=2, rope_theta=77.0)
    ids, moment, found = ids_of(1, 9), 0, []
    plain = {name: getattr(os, name) for name in ("replace", "unlink")}
    while not found or found[-1] != "saved":
        folder, calls = tmp_path / f"at{moment}", []
        MODEL.save(old, folder)

        def stop(name, calls=calls, moment=moment):
            def run(*words, **more):
                calls.append(name)
                if len(calls) > moment:
                    raise KeyboardInterrupt
                return plain[name](*words, **more)

            return run

        with monkeypatch.context() as patch:
            for name in plain:
                patch.setattr(os, name, stop(name))
            try:
                MODEL.save(new, folder)
                found.append("saved")
            except KeyboardInterrupt:
                found.append("stopped")
        try:
            logits = MODEL.load(folder)(ids).logits
        except UserError:
            assert found[-1] == "stopped"
        else:
            same = [bool((logits - model(ids).logits).abs().max() < 1e-5) for model in (old, new)]
            assert any(same) and (found[-1] == "stopped" or same[1])
        moment += 1
    assert len(found) > 3
