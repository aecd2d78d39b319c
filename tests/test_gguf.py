"""GGUF files read by the gguf library: tensors, settings, vocabulary, adapters, and settings that llama.cpp does not support."""

import json
import re
import sys
import types

import pytest
import torch
from conftest import make_text
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import MODEL
import QUANT
import TOKENIZER
from MODEL import UserError

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = dict(vocab_size=330, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.1)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2)
LATENT = dict(model_type="deepseek_v3", num_key_value_heads=4, rms_norm_eps=1e-6, kv_lora_rank=32, q_lora_rank=32,
              qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=24, rope_interleave=True, n_shared_experts=1,
              n_group=2, topk_group=1,
              scoring_func="sigmoid", mlp_only_layers=[0], moe_intermediate_size=32, **EXPERTS)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)


def build(**knobs):
    return MODEL.build(MODEL.ModelConfig(**{**SHAPE, **knobs}), seed=1)


@pytest.fixture(scope="module")
def tokenizer():
    return TOKENIZER.train(make_text(60), 320)


def export(model, tokenizer, folder, kind="F32"):
    """-> ({key: value}, {name: dequantized tensor}, {name: type})"""
    QUANT.export_gguf(model, tokenizer, folder, QUANT.QuantizationSection(gguf_type=kind))
    return read(folder / "model.gguf")


def read(path):
    reader = gguf.GGUFReader(path)
    tensors = {t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    return ({key.removeprefix(reader.fields["general.architecture"].contents() + "."): field.contents()
             for key, field in reader.fields.items()}, tensors, {t.name: t.tensor_type.name for t in reader.tensors})


def neighbors(rows, heads):
    """Row i of a head's first half, then row i of its second half."""
    size = len(rows) // heads
    return rows[[head * size + half * size // 2 + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]]


# ------------------------------------------------------------------------------------------------------ tensors

STEPS = {  # maximum error relative to a block's largest number, or to its range, without the error of 16-bit scales
    "F32": 0, "F16": 0, "BF16": 2**-8, "Q8_0": 0.5 / 127, "Q5_0": 1 / 16, "Q5_1": 0.5 / 31, "Q4_0": 1 / 8, "Q4_1": 0.5 / 15}


@pytest.mark.parametrize("kind", STEPS)
def test_tensors_equal_those_of_the_model(kind, tokenizer, tmp_path):
    model = build(head_dim=32)
    _, tensors, kinds = export(model, tokenizer, tmp_path, kind)
    state = model.state_dict()
    assert len(tensors) == len(state)
    pairs = {"token_embd.weight": "model.embed_tokens.weight", "blk.1.attn_v.weight": "model.layers.1.self_attn.v_proj.weight",
             "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight", "blk.1.ffn_norm.weight":
             "model.layers.1.post_attention_layernorm.weight", "output.weight": "lm_head.weight"}
    expected = {theirs: state[ours] for theirs, ours in pairs.items()}
    expected["blk.0.attn_q.weight"] = neighbors(state["model.layers.0.self_attn.q_proj.weight"], 4)
    expected["blk.1.attn_k.weight"] = neighbors(state["model.layers.1.self_attn.k_proj.weight"], 2)
    for name, exact in expected.items():
        blocks = exact.reshape(-1, 32)
        step = STEPS["F32" if exact.dim() == 1 else "Q8_0" if name == "output.weight" and kind[:2] in ("Q4", "Q5") else kind]
        largest = blocks.amax(1) - blocks.amin(1) if kind.endswith("_1") and name != "output.weight" else blocks.abs().amax(1)
        error = (tensors[name].reshape(-1, 32) - blocks).abs().amax(1)
        assert (error <= step * largest + 2**-10 * blocks.abs().amax(1) * (kind != "F32")).all()
        assert (error.max() > 0) == (kind != "F32" and exact.dim() > 1)
    assert kinds["blk.0.attn_q.weight"] == kind and kinds["output_norm.weight"] == "F32"


def test_rows_that_are_not_divisible_into_blocks_are_stored_in_16_bits(tokenizer, tmp_path, capsys):
    _, _, kinds = export(build(intermediate_size=100), tokenizer, tmp_path, "Q4_0")
    assert kinds["blk.0.ffn_down.weight"] == "F16" and kinds["blk.0.ffn_up.weight"] == "Q4_0"
    assert "tensors whose row length is not divisible by 32 are stored in F16 (2): " in capsys.readouterr().err


FAMILIES = {
    "gpt2": None, "llama": dict(attention_bias=True, attention_out_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "mistral": dict(), "mixtral": EXPERTS, "qwen2": dict(attention_bias=True), "qwen3": dict(qk_norm=True),
    "qwen3_moe": dict(qk_norm=True, moe_intermediate_size=32, **EXPERTS), "deepseek_v3": LATENT}


@pytest.mark.parametrize("family", FAMILIES)
def test_all_weights_of_each_family_are_in_the_file(family, tokenizer, tmp_path):
    """The file contains all weights of the model, under names of the architecture."""
    if family == "gpt2":
        model = MODEL.build(MODEL.preset_config("gpt2-2m", vocab_size=330, max_position_embeddings=64))
    else:
        model = build(**{"model_type": family, **FAMILIES[family]})
    values, tensors, _ = export(model, tokenizer, tmp_path)
    architecture = values["general.architecture"]
    assert architecture == {"mistral": "llama", "mixtral": "llama", "qwen3_moe": "qwen3moe",
                            "deepseek_v3": "deepseek2"}.get(family, family)
    assert values["block_count"] == model.config.num_hidden_layers and values["embedding_length"] == model.config.hidden_size
    state = {name: tensor for name, tensor in model.state_dict().items()
             if not (model.config.tie_word_embeddings and name == "lm_head.weight")}
    assert sum(t.numel() for t in tensors.values()) == sum(t.numel() for t in state.values())
    sums = lambda tensors: sum(t.double().square().sum().item() for t in tensors.values())  # noqa: E731
    assert sums(tensors) == pytest.approx(sums(state), rel=1e-9)
    known = {gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[gguf.MODEL_ARCH[architecture.upper()]]}
    for name in tensors:
        assert re.sub(r"^blk\.\d+", "blk.{bid}", name.rpartition(".")[0]) in known


def test_experts_and_latents_are_split(tokenizer, tmp_path):
    model = build(**LATENT)
    values, tensors, _ = export(model, tokenizer, tmp_path)
    state, layer = model.state_dict(), "model.layers.1."
    assert torch.equal(torch.cat((tensors["blk.1.ffn_gate_exps.weight"], tensors["blk.1.ffn_up_exps.weight"]), 1),
                       state[f"{layer}mlp.experts.gate_up_proj"])
    both = torch.cat((tensors["blk.1.attn_k_b.weight"].transpose(1, 2), tensors["blk.1.attn_v_b.weight"]), 1)  # (H, Dc + Dv, R)
    assert torch.equal(both.flatten(0, 1), state[f"{layer}self_attn.kv_b_proj.weight"])
    expected = {"attention.key_length": 40, "attention.value_length": 32, "attention.key_length_mla": 24,
                "attention.value_length_mla": 24, "attention.head_count_kv": 1, "leading_dense_block_count": 1,
                "expert_gating_func": 2, "expert_group_count": 2}
    assert {key: values[key] for key in expected} == expected


def test_rope_scaling(tokenizer, tmp_path):
    _, tensors, _ = export(build(rope_scaling=LLAMA3), tokenizer, tmp_path / "llama3")
    divisors = tensors["rope_freqs.weight"]
    assert divisors[0] == 1 and divisors[-1] == 8 and 1 < divisors[2] < 8 and len(divisors) == 8
    values, *_ = export(build(rope_scaling=dict(YARN, attention_factor=0.5)), tokenizer, tmp_path / "yarn")
    assert values["rope.scaling.type"] == "yarn" and values["rope.scaling.original_context_length"] == 32
    default = 0.1 * torch.tensor(4.0).log().item() + 1  # which llama.cpp multiplies by
    assert values["rope.scaling.attn_factor"] * default == pytest.approx(0.5)
    values, *_ = export(build(rope_scaling=dict(rope_type="linear", factor=2.0)), tokenizer, tmp_path / "linear")
    assert (values["rope.scaling.type"], values["rope.scaling.factor"]) == ("linear", 2)


def test_the_context_is_limited_to_the_window(tokenizer, tmp_path, capsys):
    values, *_ = export(build(model_type="mistral", sliding_window=48), tokenizer, tmp_path)
    assert values["context_length"] == 48 and "48 tokens" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- vocabulary


def test_byte_level_vocabulary(tokenizer, tmp_path):
    """The file's vocabulary and merges give the same tokenizer; padding rows are marked as unused."""
    model = build(eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")])
    values, *_ = export(model, tokenizer, tmp_path)
    tokens, merges = values["tokenizer.ggml.tokens"], [tuple(merge.split(" ")) for merge in values["tokenizer.ggml.merges"]]
    raw = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    raw.pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
    text = "The red fox\n saw 42 owls, caf\u00e9 \U0001f600."
    assert raw.encode(text).ids == tokenizer(text, add_special_tokens=False).input_ids
    kinds = values["tokenizer.ggml.token_type"]
    assert kinds[tokenizer.eos_token_id] == 3 and kinds[300] == 1 and kinds[320:] == [5] * 10 and len(tokens) == 330
    expected = {"model": "gpt2", "pre": "qwen2", "add_bos_token": True, "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": model.config.eos_ids[0], "eot_token_id": model.config.eos_ids[1],
                "padding_token_id": tokenizer.pad_token_id}
    assert {key: values[f"tokenizer.ggml.{key}"] for key in expected} == expected


def test_characters_are_merged_from_their_bytes(tmp_path):
    tokenizer = TOKENIZER.train(["The owl \u20ac\u00e9\u00e8\u4f60\n12"], 60, "char")
    values, *_ = export(build(vocab_size=60), tokenizer, tmp_path)
    merges = [tuple(merge.split(" ")) for merge in values["tokenizer.ggml.merges"]]
    tokens = {token: i for i, token in enumerate(values["tokenizer.ggml.tokens"])}
    alphabet = {token for merge in merges for token in (*merge, "".join(merge))} | set(tokens)  # with parts of characters
    raw = Tokenizer(models.BPE(tokens | {token: 1000 + i for i, token in enumerate(sorted(alphabet - set(tokens)))}, merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text = "The \u4f60\u20ac\n\u00e8\u00e9 21"
    assert raw.encode(text).ids == tokenizer(text, add_special_tokens=False).input_ids


def sentencepiece(prefix=True):
    raw = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    spaces = [normalizers.Prepend("\u2581")] if prefix else []
    raw.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", "\u2581")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    words = [f"\u2581{word}" for line in make_text(40) for word in line.split(" ")]
    raw.train_from_iterator(words, trainers.BpeTrainer(vocab_size=320, special_tokens=special, show_progress=False))
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    spec = json.loads(raw.to_str())
    spec["added_tokens"] = spec["added_tokens"][:3]  # bytes are plain tokens
    raw = Tokenizer.from_str(json.dumps(spec))
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_scores_follow_the_merges(prefix, tmp_path):
    tokenizer = sentencepiece(prefix)
    values, *_ = export(build(), tokenizer, tmp_path)
    tokens, scores = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.scores"]
    text, expected = "the red fox", tokenizer("the red fox", add_special_tokens=False).input_ids
    parts = list(("\u2581" if prefix else "") + text.replace(" ", "\u2581"))
    while True:  # llama.cpp's rule: join the neighbors whose union has the best score
        pairs = ["".join(pair) for pair in zip(parts, parts[1:], strict=False)]
        joined = [(scores[tokens.index(pair)], -i) for i, pair in enumerate(pairs) if pair in tokens]
        if not joined:
            break
        i = -max(joined)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    assert [tokens.index(part) for part in parts] == expected
    assert values["tokenizer.ggml.model"] == "llama" and values["tokenizer.ggml.add_space_prefix"] is prefix
    assert values["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 6] and values["tokenizer.ggml.token_type"][-1] == 5


WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")
SPLITS = {  # from the tokenizer.json of published models
    "gpt-2": (None, False),
    "llama-bpe": (WORDS % "{1,3}", True),
    "dbrx": (WORDS % "{1,3}", False),
    "qwen2": (WORDS % "", False),
    "starcoder": (r"\d", False),
    None: (r"\S+|\s+", False),
}


@pytest.mark.parametrize("name", SPLITS)
def test_the_pre_tokenizer_is_detected_from_its_splits(name):
    pattern, ignores_merges = SPLITS[name]
    raw = Tokenizer(models.BPE())
    first = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    raw.pre_tokenizer = pre_tokenizers.Sequence([*first, pre_tokenizers.ByteLevel(add_prefix_space=False,
                                                                                  use_regex=name in ("gpt-2", "starcoder"))])
    if name is None:
        with pytest.raises(UserError, match="llama.cpp does not have this tokenizer's pre-tokenizer; it has gpt-2, "):
            QUANT.pre_tokenizer_name(raw, ignores_merges)
    else:
        assert QUANT.pre_tokenizer_name(raw, ignores_merges) == name


# ------------------------------------------------------------------------------------------------ unsupported


UNSUPPORTED = {
    "model.hidden_act": dict(hidden_act="relu"),
    "combination of `model` settings": dict(norm_type="layernorm"),
    "model.rope_scaling": dict(model_type="qwen2", attention_bias=True, rope_scaling=LLAMA3),
    "model.rope_scaling: .*beta_fast": dict(rope_scaling=dict(YARN, beta_fast=16)),
    "model.norm_topk_prob": dict(model_type="qwen3_moe", qk_norm=True, norm_topk_prob=False, moe_intermediate_size=32, **EXPERTS),
    "model.mlp_only_layers": dict(model_type="qwen3_moe", qk_norm=True, mlp_only_layers=[0], moe_intermediate_size=32, **EXPERTS),
    "model.n_shared_experts": {**LATENT, "n_shared_experts": 0},
    "model.rms_norm_eps": {**LATENT, "rms_norm_eps": 1e-5},
    "model.rope_interleave": {**LATENT, "rope_interleave": False},
}


@pytest.mark.parametrize("match", UNSUPPORTED)
def test_settings_that_llama_cpp_does_not_support_are_one_line_errors(match, tokenizer, tmp_path):
    with pytest.raises(UserError, match=match) as caught:
        export(build(**UNSUPPORTED[match]), tokenizer, tmp_path)
    assert "\n" not in str(caught.value)


def test_encoders_classifiers_and_other_tokenizers_are_rejected(tokenizer, tmp_path):
    for model, match in ((MODEL.build("bert-2m"), "is an encoder"),
                         (MODEL.build(MODEL.ModelConfig(**SHAPE), head="score"), "has no language-model head")):
        with pytest.raises(UserError, match=match):
            export(model, tokenizer, tmp_path)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "owl": 1}, unk_token="<unk>"))
    letters = Tokenizer(models.BPE({"<unk>": 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")], unk_token="<unk>"))
    several = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    several.post_processor = processors.TemplateProcessing(single=f"{TOKENIZER.END} {TOKENIZER.PAD} $A",
                                                           special_tokens=[(TOKENIZER.END, 0), (TOKENIZER.PAD, 1)])
    for raw, match in ((words, "the tokenizer is a WordLevel"), (letters, "does not have this tokenizer's pre-tokenizer"), (several, "adds several tokens")):
        with pytest.raises(UserError, match=match):
            export(build(), PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<unk>", eos_token="<unk>"), tmp_path)


def test_a_missing_library_is_a_one_line_error(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="needs gguf; pip install -r requirements-extras.txt"):
        QUANT.export_gguf(build(), tokenizer, tmp_path, QUANT.QuantizationSection())


# --------------------------------------------------------------------------------------- llama.cpp's own types


def test_llama_cpps_quantizer_gets_an_f16_file(tokenizer, tmp_path, monkeypatch):
    """A stub of llama_cpp gets an F16 file and the number of the type; the F16 file is removed."""
    calls = []

    def quantize(source, target, settings):
        calls.append((read(source.decode())[2]["blk.0.attn_q.weight"], settings._obj.ftype))
        with open(target, "wb") as file:
            file.write(b"packed")
        return 0

    import ctypes

    class Settings(ctypes.Structure):
        _fields_ = (("ftype", ctypes.c_int),)

    module = types.SimpleNamespace(llama_model_quantize_default_params=Settings, llama_model_quantize=quantize,
                                   LLAMA_FTYPE_MOSTLY_Q4_K_M=15)
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    QUANT.export_gguf(build(), tokenizer, tmp_path, QUANT.QuantizationSection(gguf_type="Q4_K_M"))
    assert calls == [("F16", 15)] and (tmp_path / "model.gguf").read_bytes() == b"packed"
    assert {path.name for path in tmp_path.iterdir()} == {"model.gguf", "Modelfile"}


def test_llama_quantize_on_path_is_used(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    settings = QUANT.QuantizationSection(gguf_type="Q6_K")
    with pytest.raises(UserError, match="llama-cpp-python.*llama-quantize on PATH"):
        QUANT.export_gguf(build(), tokenizer, tmp_path / "none", settings)
    program = tmp_path / "llama-quantize"
    program.write_text('#!/bin/sh\necho "$3" > "$2"\n')
    program.chmod(0o755)
    QUANT.export_gguf(build(), tokenizer, tmp_path / "out", settings)
    assert (tmp_path / "out/model.gguf").read_text() == "Q6_K\n"
    program.write_text("#!/bin/sh\necho no space >&2\nexit 1\n")
    with pytest.raises(UserError, match="gguf_type Q6_K: llama-quantize failed: no space"):
        QUANT.export_gguf(build(), tokenizer, tmp_path / "again", settings)


# ------------------------------------------------------------------------------------------- Ollama and adapters


def test_modelfile(tokenizer, tmp_path):
    chat = TOKENIZER.train(make_text(60), 320)
    TOKENIZER.ensure_chat(chat)
    model = build()
    TOKENIZER.end_with_turns(model, chat)
    values, *_ = export(model, chat, tmp_path / "chat")
    assert values["tokenizer.chat_template"] == chat.chat_template
    turn = "<|im_start|>{0}\n{{{{ .Content }}}}<|im_end|>\n"
    cases = [f'if eq .Role "{role}" }}}}{turn.format(role)}' for role in ("system", "user", "assistant")]
    template = "{{ range .Messages }}{{ " + "{{ else ".join(cases) + "{{ end }}{{ end }}<|im_start|>assistant\n"
    assert (tmp_path / "chat/Modelfile").read_text() == (
        f'FROM ./model.gguf\nTEMPLATE """{template}"""\nPARAMETER stop "<|im_end|>"\n'
        "PARAMETER temperature 0.8\nPARAMETER num_ctx 128\n")
    chat.chat_template = "{% for m in messages %}{{ loop.index ~ m.role ~ m.content }}<|im_end|>{% endfor %}"  # numbers its turns
    export(model, chat, tmp_path / "numbers")
    assert "TEMPLATE" not in (tmp_path / "numbers/Modelfile").read_text()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_adapter_adds_what_merging_adds(family, tokenizer, tmp_path):
    """alpha / r B A, which llama.cpp adds to the weights, equals the change by merging."""
    import peft

    model = MODEL.build(MODEL.preset_config("gpt2-2m", vocab_size=330)) if family == "gpt2" else build()
    name = {"gpt2": "qkv_proj", "llama": "q_proj"}[family]
    config = peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=[name, "o_proj"], alpha_pattern={"o_proj": 12})
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    MODEL.inject(config, model)
    model.adapter = config
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if ".lora_B" in key:
                tensor.normal_(generator=torch.Generator().manual_seed(0))
    QUANT.export_gguf_adapter(model, tokenizer, tmp_path, QUANT.QuantizationSection())
    values, tensors, _ = read(tmp_path / "adapter.gguf")
    assert (values["general.type"], values["adapter.type"], values["adapter.lora.alpha"]) == ("adapter", "lora", 6)
    MODEL.merge_adapter(model)
    for ours, theirs in ((name, "attn_qkv" if family == "gpt2" else "attn_q"), ("o_proj", "attn_output")):
        key = f"model.layers.1.self_attn.{ours}.weight"
        added = model.state_dict()[key] - before[key]
        added = neighbors(added, 4) if ours == "q_proj" else added
        low, high = (tensors[f"blk.1.{theirs}.weight.lora_{part}"] for part in "ab")
        assert torch.allclose(6 / 4 * high @ low, added, atol=1e-5)


@pytest.mark.parametrize("knobs, settings", [
    ({}, dict(target_modules=["q_proj"], use_dora=True)), (dict(tie_word_embeddings=True), dict(target_modules=["lm_head"])),
    (LATENT, dict(target_modules=["kv_b_proj"])), ({}, dict(target_modules=["q_proj"], modules_to_save=["lm_head"])),
    (dict(model_type="mixtral", **EXPERTS), dict(target_modules=[], target_parameters=["mlp.experts.down_proj"]))],
    ids=["dora", "tied head", "latent", "saved module", "experts"])
def test_adapters_that_llama_cpp_would_ignore_are_rejected(knobs, settings, tokenizer, tmp_path):
    import peft

    model = build(**knobs)
    with pytest.raises(UserError, match="--to gguf-lora: the model has no adapter"):
        QUANT.export_gguf_adapter(model, tokenizer, tmp_path, QUANT.QuantizationSection())
    model.adapter = peft.LoraConfig(r=2, **settings)
    MODEL.inject(model.adapter, model)
    with pytest.raises(UserError, match="has no effect in llama.cpp"):
        QUANT.export_gguf_adapter(model, tokenizer, tmp_path, QUANT.QuantizationSection())
