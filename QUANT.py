"""QUANT.py: the form a model is shipped in.

Two forms of frozen weights, both bitsandbytes': `nf4` (4 bits, QLoRA's) and `int8`. `MODEL.load(..., quantization="nf4")`
packs each weight as it is read, so memory never holds the whole model in full; adapters (`SFT.py --lora.r 16`) learn on top.

    python QUANT.py --model out                                      # what a packed form saves, and what it costs (--method int8)
    python SFT.py --model gpt2-xl --data mine.jsonl --lora.r 16 --model.quantization nf4
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import json
import math
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import INFER
import MODEL
import TOKENIZER
from MODEL import UserError, knob, load_config, run_main, say


@dataclass
class QuantizationSection:
    method: str = knob("nf4", "quantization method: nf4 (4 bits), int8 (8 bits) or none", MODEL.QUANTIZATIONS, often=True)
    group_size: int = knob(64, "nf4: weights per scale; smaller groups are more accurate but use more memory",
                           (32, 64, 128, 256, 512, 1024), often=True)
    gguf_type: str = knob("Q8_0", "type of the matrices in a GGUF file",
                          ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q5_1", "Q5_0", "Q4_1", "Q4_0"))


def bitsandbytes():
    import logging

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # talk of kernels that could be fetched, of types that are cast
    try:
        import bitsandbytes as bnb
        import bitsandbytes.nn
    except ImportError:
        raise UserError("model.quantization: needs `pip install bitsandbytes`") from None
    return bnb


class Unpacked(nn.Module):
    """A parametrization: the parameter is kept packed and unpacked at each use."""

    def __init__(self, scale: Tensor | None = None, state=None):
        super().__init__()
        self.register_buffer("scale", scale)  # of int8
        self.state = state  # bitsandbytes' QuantState, of nf4

    @torch.no_grad()
    def forward(self, packed: Tensor) -> Tensor:
        return packed * self.scale if self.state is None else bitsandbytes().functional.dequantize_4bit(packed, self.state)

    def _apply(self, function, recurse: bool = True):
        if self.state is not None:
            self.state.to(function(self.state.absmax).device)
        return super()._apply(function, recurse)


class Packer:
    """Puts the packed form of weights where a model's full ones stood: `packer(name, weight)`, True if it took it.

    nf4 (Dettmers 2023, section 3): each group of weights is divided by its largest and rounded to the nearest of 16
    quantiles of a normal distribution; the scales are themselves 8-bit numbers. int8 (Dettmers 2022): one scale a row;
    CUDA rounds the inputs too, but for those above 6. Embedding, output head, norms and routers stay as they are.
    """

    def __init__(self, model: MODEL.LanguageModel, method: str, group_size: int = 64, device=None):
        self.bnb, self.model, self.method, self.group_size = bitsandbytes(), model, method, group_size
        self.device = torch.device(device or "cpu")
        inside = {id(m) for layer in MODEL.layers_of(model) for m in layer.modules()}
        parts = {nn.Linear: ("weight",), MODEL.Experts: ("gate_up_proj", "down_proj")}
        self.names = {f"{name}.{part}" for name, module in model.named_modules() if id(module) in inside
                      for part in parts.get(type(module), ())}

    def __call__(self, name: str, weight: Tensor) -> bool:
        if name not in self.names:
            return False
        owner, _, part = name.rpartition(".")
        parent, _, own = owner.rpartition(".")
        module = self.model.get_submodule(owner)
        if part == "weight":
            setattr(self.model.get_submodule(parent), own, self._linear(module, weight))
        else:
            self._stacked(module, part, weight)
        return True

    def _linear(self, plain: nn.Linear, weight: Tensor) -> nn.Module:
        nn4 = self.bnb.nn
        shape = (plain.in_features, plain.out_features, plain.bias is not None)
        if self.method == "nf4":
            layer = nn4.Linear4bit(*shape, quant_type="nf4", device="meta")
            packed = nn4.Params4bit(weight, False, quant_type="nf4", blocksize=self.group_size, module=layer)
        else:
            layer = nn4.Linear8bitLt(*shape, has_fp16_weights=False, threshold=6.0, device="meta")
            packed = nn4.Int8Params(weight.cpu(), False)  # packed on its way from there
        layer.weight, layer.bias = packed.to(self.device), plain.bias
        return layer.train(plain.training)

    def _stacked(self, experts: MODEL.Experts, part: str, weight: Tensor) -> None:
        """Experts (E, out, in) are unpacked together, and again in backward, so that one layer's exist at a time."""
        weight = weight.to(self.device)
        if self.method == "nf4":
            options = dict(blocksize=self.group_size, compress_statistics=True, quant_type="nf4")
            packed, state = self.bnb.functional.quantize_4bit(weight, **options)
            unpacked = Unpacked(state=state)
        else:
            scale = weight.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127  # (E, out, 1)
            packed, unpacked = (weight / scale).round().to(torch.int8), Unpacked(scale)
        setattr(experts, part, nn.Parameter(packed, requires_grad=False))
        parametrize.register_parametrization(experts, part, unpacked, unsafe=True)
        if "forward" not in vars(experts):
            experts.forward = partial(checkpoint, experts.forward, use_reentrant=False)


def keep_form(model: MODEL.LanguageModel, method: str) -> None:
    """Note a model's form where MODEL, peft and bitsandbytes look for it."""
    model.quantization = method
    setattr(model, "is_loaded_in_4bit" if method == "nf4" else "is_loaded_in_8bit", True)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Some processors would repack the weights in eval mode, with coarser scales, and keep them so in training.
            module.support_avx512bf16_for_cpu = False


def quantize(model: MODEL.LanguageModel, method: str = "nf4", group_size: int = 64) -> MODEL.LanguageModel:
    """Pack a loaded model's matrices in place."""
    packer = Packer(model, method, group_size, model.device)
    for name in sorted(packer.names):
        packer(name, model.get_parameter(name).data)
    keep_form(model, method)
    return model


def hub_settings(method: str):
    """The same for a model that transformers loads."""
    from transformers import BitsAndBytesConfig

    bitsandbytes()
    if method == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


# ---- GGUF (llama.cpp, Ollama)

# The network of llama.cpp that computes each family.
GGUF_ARCHITECTURES = {"gpt2": "gpt2", "llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2",
                      "qwen3": "qwen3", "qwen3_moe": "qwen3moe", "deepseek_v3": "deepseek2"}
K_QUANTS = ("Q6_K", "Q5_K_M", "Q4_K_M")  # encoded by llama.cpp


def import_gguf():
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise UserError("--to gguf: needs gguf; pip install -r requirements-extras.txt") from None
    return gguf


def export_gguf(model: MODEL.LanguageModel, tokenizer, target: Path, section: QuantizationSection) -> None:
    """Write the folder `target`: model.gguf and Ollama's Modelfile. UserError for what llama.cpp cannot compute."""
    gguf, architecture = import_gguf(), gguf_architecture(model)
    target.mkdir(exist_ok=True)
    packed = section.gguf_type in K_QUANTS
    path, kind = target / ("float.gguf" if packed else "model.gguf"), "F16" if packed else section.gguf_type
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType[("ALL_" if kind == "F32" else "MOSTLY_") + kind])
    values = gguf_values(model.config) | gguf_tokenizer(tokenizer, model.config) | special_tokens(tokenizer, model.config)
    for name, value in values.items():
        if value is not None:
            getattr(writer, f"add_{name}")(value)
    write_tensors(writer, partial(gguf_tensors, model, architecture), kind)
    if packed:
        pack_gguf(path, target / "model.gguf", section.gguf_type)
        path.unlink()
    MODEL.write_text(target / "Modelfile", modelfile(tokenizer, model.config, values))


def gguf_architecture(model: MODEL.LanguageModel) -> str:
    """llama.cpp's name for the network of a model; UserError names the first setting that it does not compute."""
    config = model.config
    if isinstance(model, MODEL.ForeignModel) or model.heads != ("lm",) or not config.causal:
        raise UserError(f"--to gguf: only causal language models of {', '.join(GGUF_ARCHITECTURES)} can be exported, without "
                        "encoders, classifiers and models that transformers runs")
    kind = MODEL.config_to_hub(config)["model_type"]
    if kind not in GGUF_ARCHITECTURES:
        raise UserError("--to gguf: no network of llama.cpp has this combination of `model` settings; use --to onnx")
    scaling, latent = config.rope_scaling or {}, bool(config.kv_lora_rank)
    rope = scaling.get("rope_type", "default")
    # llama.cpp's YaRN has the usual ramp, and scales the scores of latent attention in one of the two ways that exist.
    other_yarn = rope == "yarn" and (
        scaling.get("beta_fast") not in (None, 32) or scaling.get("beta_slow") not in (None, 1)
        or scaling.get("truncate") is False
        or latent and (not scaling.get("mscale_all_dim") or MODEL.rope_frequencies(config)[1] != 1))
    impossible = {
        "hidden_act": config.hidden_act not in (("gelu_new", "gelu_pytorch_tanh") if kind == "gpt2" else ("silu",)),
        "attention_out_bias": config.attention_out_bias and kind not in ("gpt2", "llama"),
        "norm_topk_prob": kind == "qwen3_moe" and not config.norm_topk_prob,
        "mlp_only_layers": kind == "qwen3_moe" and config.mlp_only_layers,
        "num_hidden_layers": config.q_lora_rank and config.num_hidden_layers in (26, 27),  # taken for a DeepSeek-V2-Lite
        "n_shared_experts": latent and not config.n_shared_experts,
        "rope_interleave": latent and not config.rope_interleave,
        "rms_norm_eps": latent and config.rms_norm_eps != 1e-6,  # as in the norms of the latents
        "rope_scaling": other_yarn or rope == "llama3" and GGUF_ARCHITECTURES[kind] != "llama",
    }
    for name in (name for name, wrong in impossible.items() if wrong):
        raise UserError(f"model.{name}: llama.cpp does not compute {getattr(config, name)} in a {kind}; use --to onnx")
    return GGUF_ARCHITECTURES[kind]


def gguf_values(config: MODEL.ModelConfig) -> dict:
    """The hyperparameters as {method of GGUFWriter without "add_": value}."""
    gguf = import_gguf()
    windows = [config.window(i) for i in range(config.num_hidden_layers)]
    context = min([config.max_position_embeddings, *filter(None, windows)])
    if context < config.max_position_embeddings:  # up to this length, full attention is the same
        say(f"llama.cpp has no sliding window in these models: the context is limited to the window, {context} tokens")
    values = {"vocab_size": config.vocab_size, "context_length": context, "embedding_length": config.hidden_size,
              "block_count": config.num_hidden_layers, "feed_forward_length": config.intermediate_size,
              "head_count": config.num_attention_heads, "head_count_kv": config.num_key_value_heads,
              {"rmsnorm": "layer_norm_rms_eps", "layernorm": "layer_norm_eps"}[config.norm_type]: config.rms_norm_eps}
    if config.position_embedding_type == "rope":
        values |= {"rope_dimension_count": config.head_dim, "rope_freq_base": config.rope_theta,
                   "key_length": config.head_dim, "value_length": config.head_dim}
    if config.num_experts:
        values |= {"expert_count": config.num_experts, "expert_used_count": config.num_experts_per_tok,
                   "expert_feed_forward_length": config.moe_intermediate_size}
    if rank := config.kv_lora_rank:  # one head of latents, which serve as keys and values of all query heads
        content, place = config.qk_nope_head_dim, config.qk_rope_head_dim
        values |= {"head_count_kv": 1, "rope_dimension_count": place, "key_length": rank + place, "value_length": rank,
                   "key_length_mla": content + place, "value_length_mla": config.v_head_dim, "kv_lora_rank": rank,
                   "q_lora_rank": config.q_lora_rank or 0, "leading_dense_block_count": len(config.mlp_only_layers or ()),
                   "expert_shared_count": config.n_shared_experts, "expert_weights_norm": config.norm_topk_prob,
                   "expert_weights_scale": config.routed_scaling_factor, "expert_group_count": config.n_group,
                   "expert_group_used_count": config.topk_group,
                   "expert_gating_func": gguf.ExpertGatingFuncType[config.scoring_func.upper()]}
    scaling = config.rope_scaling or {}
    kind, factor = scaling.get("rope_type"), scaling.get("factor")
    if kind in ("linear", "yarn"):  # llama3's frequencies are a tensor
        values |= {"rope_scaling_type": gguf.RopeScalingType[kind.upper()], "rope_scaling_factor": factor}
    if kind == "yarn":
        values["rope_scaling_orig_ctx_len"] = scaling.get("original_max_position_embeddings") or config.max_position_embeddings
        if config.kv_lora_rank:
            values["rope_scaling_yarn_log_mul"] = scaling["mscale_all_dim"] / 10  # which is how llama.cpp wants it
        else:  # llama.cpp multiplies by the usual factor itself
            values["rope_scaling_attn_factors"] = MODEL.rope_frequencies(config)[1] / (0.1 * math.log(factor) + 1)
    return values


def adjacent_pairs(rows: Tensor, name: str, config: MODEL.ModelConfig, architecture: str) -> Tensor:
    """Rows of a projection `name` in llama.cpp's order: a Llama rotates neighbors, the others numbers half a head apart."""
    heads = config.num_attention_heads * (".q_proj" in name) or config.num_key_value_heads * (".k_proj" in name)
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2) if heads and architecture == "llama" else rows


def gguf_tensors(model: MODEL.LanguageModel, architecture: str) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a GGUF file, in the same order in each call."""
    gguf, config = import_gguf(), model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    if (config.rope_scaling or {}).get("rope_type") == "llama3":
        plain, _ = MODEL.rope_frequencies(dataclasses.replace(config, rope_scaling=None))
        yield "rope_freqs.weight", plain / MODEL.rope_frequencies(config)[0]
    for name, tensor in model.state_dict().items():
        if name == model.tied_name and config.tie_word_embeddings:
            continue
        stem, _, part = name.rpartition(".")
        pieces = {name: adjacent_pairs(tensor, name, config, architecture)}
        if part == "gate_up_proj":  # (E, 2I, C)
            pieces = dict(zip((f"{stem}.gate_proj.weight", f"{stem}.up_proj.weight"), tensor.chunk(2, 1), strict=True))
        elif part in ("down_proj", "e_score_correction_bias"):
            pieces = {f"{stem}.{part.removesuffix('_bias')}.{'bias' if part[0] == 'e' else 'weight'}": tensor}
        elif stem.endswith(".kv_b_proj"):
            sizes = [config.qk_nope_head_dim, config.v_head_dim]
            keys, values = tensor.unflatten(0, (config.num_attention_heads, -1)).split(sizes, 1)
            pieces = {name.replace(".kv_b_", ".k_b_"): keys.transpose(1, 2),  # (H, R, Dc)
                      name.replace(".kv_b_", ".v_b_"): values}  # (H, Dv, R)
        for name, piece in pieces.items():
            yield names.get_name(name, (".weight", ".bias")), piece


def write_tensors(writer, tensors: Callable[[], Iterator[tuple[str, Tensor]]], kind: str) -> None:
    """Encode and write tensors one by one. As in llama.cpp's converter, norms, routers and positions stay float32, and rows
    that a block does not divide become float16. The output head has 8 bits where the others have fewer."""
    gguf = import_gguf()
    wanted, types, narrow = gguf.GGMLQuantizationType[kind], {}, []
    head = "output.weight" if any(name == "output.weight" for name, _ in tensors()) else "token_embd.weight"
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    for name, tensor in tensors():
        types[name] = wanted
        if tensor.dim() == 1 or name.endswith(("_norm.weight", "ffn_gate_inp.weight", "position_embd.weight")):
            types[name] = gguf.GGMLQuantizationType.F32
        elif tensor.shape[-1] % block:
            types[name] = gguf.GGMLQuantizationType.F16
            narrow.append(name)
        elif name == head and kind[:2] in ("Q4", "Q5"):
            types[name] = gguf.GGMLQuantizationType.Q8_0
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, types[name])
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), math.prod(shape), types[name])
    if narrow:
        say(f"{len(narrow)} tensors stay in F16, since {block} does not divide the length of their rows: {', '.join(narrow[:4])}"
            f"{', ...' if len(narrow) > 4 else ''}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors():
        numbers = tensor.detach().float().contiguous().cpu().numpy()
        writer.write_tensor_data(gguf.quants.quantize(numbers, types[name]).view(np.uint8))
    writer.close()


def pack_gguf(source: Path, target: Path, kind: str) -> None:
    """Quantize a file in F16 with llama.cpp."""
    try:
        import llama_cpp
    except ImportError:
        program = shutil.which("llama-quantize")
        if not program:
            raise UserError(f"quantization.gguf_type: {kind} needs llama.cpp's quantizer: `pip install llama-cpp-python`, or "
                            "llama-quantize on PATH; Q8_0, Q5_1 and Q4_1 need neither") from None
        run = subprocess.run([program, source, target, kind], capture_output=True, text=True)
        failed = run.returncode and (run.stderr.strip() or run.stdout.strip() or "no message").splitlines()[-1]
    else:
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
        failed = llama_cpp.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(settings)) and "see above"
    if failed:
        raise UserError(f"quantization.gguf_type: llama.cpp could not quantize to {kind} ({failed}); use Q8_0")


# llama.cpp's name of a pre-tokenizer -> the patterns at which it splits a text, one after the other (its src/llama-vocab.cpp)
_SUFFIXES = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_BLANKS = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = _SUFFIXES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*" + _BLANKS
_CASED = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
          r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
          r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*") + _BLANKS
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {
    "gpt-2": (_GPT2,),
    "starcoder": (r"\p{N}", _GPT2),
    "qwen2": (_WORDS % "",),
    "llama-bpe": (_WORDS % "{1,3}",),
    "qwen35": (_SUFFIXES + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _BLANKS,),
    "gpt-4o": (_CASED % (_SUFFIXES + "?", _SUFFIXES + "?", "{1,3}"),),
    "tekken": (_CASED % ("", "", ""),),
    "deepseek-v3": (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
                    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
                    r"| ?[\p{P}\p{S}]+[\r\n]*" + _BLANKS),
}
PROBE = ("\n \n\n \t\t \n  word   I've 'TOLD it's 'RE \r\n\r\n3 33 333 4444 3.14 x_y foo(bar)/;\n\n a-b\u00a0c d\u00e9j\u00e0"
         " HTTPServer e\u0301 \u4f60\u597d\u30c6\u30b9 \u041f\u0440\u0438 \u0939\u093f\u0928\u094d\u0926 \U0001f600\U0001f680"
         " ```py\n\tx = [1, 2]  # ok!!  \n")


def pre_tokenizer_name(raw, ignores_merges: bool) -> str:
    """llama.cpp's name for the way in which a byte-level tokenizer splits texts into words, found with a probe."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    probe = normalizers.NFC().normalize_str(PROBE)
    normal = raw.normalizer.normalize_str(probe) if raw.normalizer else probe
    words = raw.pre_tokenizer.pre_tokenize_str(normal) if raw.pre_tokenizer else None
    for name, patterns in PRE_TOKENIZERS.items():
        steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        if words == pre_tokenizers.Sequence(steps).pre_tokenize_str(probe):
            return "dbrx" if name == "llama-bpe" and not ignores_merges else name
    raise UserError(f"--to gguf: the tokenizer splits texts in none of these ways of llama.cpp: {', '.join(PRE_TOKENIZERS)}")


def gguf_tokenizer(tokenizer, config: MODEL.ModelConfig) -> dict:
    """The tokenizer as {method of GGUFWriter without "add_": value}. llama.cpp has byte-level BPE and SentencePiece's BPE; the
    tokens of a character tokenizer become byte-level ones, each merged from the bytes of its character."""
    from tokenizers import pre_tokenizers

    kinds, raw = import_gguf().TokenType, tokenizer.backend_tokenizer
    model, added = json.loads(raw.to_str())["model"], tokenizer.added_tokens_decoder
    tokens = {i: token for token, i in tokenizer.get_vocab().items()}
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model.get("merges", ())]
    values = {"tokenizer_model": "gpt2", "tokenizer_pre": "gpt-2"}
    if model["type"] == "BPE" and model["byte_fallback"]:
        pieces = "".join(tokenizer.convert_ids_to_tokens(tokenizer("a a  a", add_special_tokens=False).input_ids))
        if pieces.removeprefix("\u2581") != "a\u2581a\u2581\u2581a":
            raise UserError("--to gguf: the tokenizer changes texts in a way that llama.cpp does not")
        ranks = {merge.replace(" ", ""): -float(rank) for rank, merge in reversed([*enumerate(merges)])}
        values = {"tokenizer_model": "llama", "tokenizer_pre": "default", "add_space_prefix": pieces[0] == "\u2581",
                  "token_scores": [ranks.get(tokens.get(i), -float(len(merges))) for i in range(config.vocab_size)]}
    elif model["type"] == "WordLevel" and all(len(token) == 1 for i, token in tokens.items() if i not in added):
        say(f"llama.cpp will leave out characters that are not in the vocabulary, instead of reading {tokenizer.unk_token}")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokens |= {i: byte_level.pre_tokenize_str(token)[0][0] for i, token in tokens.items() if i not in added}
        words = [token for i, token in tokens.items() if i not in added]
        merges = [*dict.fromkeys(f"{word[:k]} {word[k]}" for word in words for k in range(1, len(word)))]
    elif model["type"] != "BPE":
        raise UserError(f"--to gguf: the tokenizer is a {model['type']}; llama.cpp has byte-level BPE and SentencePiece's BPE")
    elif merges or not {*pre_tokenizers.ByteLevel.alphabet()} <= {*tokens.values()}:
        values["tokenizer_pre"] = pre_tokenizer_name(raw, model["ignore_merges"])
    if values["tokenizer_model"] == "gpt2":
        values["token_merges"] = merges or ["\u2581 \u2581"]  # a list may not be empty; no byte-level text has this

    def kind_of(i: int) -> int:
        if i in added:
            return kinds.CONTROL if added[i].special else kinds.USER_DEFINED
        if i not in tokens:
            return kinds.UNUSED
        return kinds.BYTE if re.fullmatch("<0x[0-9A-F]{2}>", tokens[i]) else kinds.NORMAL

    rows = range(config.vocab_size)
    template = tokenizer.chat_template
    return values | {"token_list": [tokens.get(i, f"[PAD{i}]") for i in rows], "token_types": [kind_of(i) for i in rows],
                     "chat_template": template.get("default") if isinstance(template, dict) else template}


def special_tokens(tokenizer, config: MODEL.ModelConfig) -> dict:
    ids, bare = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    begins, ends = ids[:1] != bare[:1], ids[-1:] != bare[-1:]
    if len(ids) - len(bare) != begins + ends:
        raise UserError("--to gguf: the tokenizer puts several tokens before or after a text; llama.cpp puts one at most")
    stops = config.eos_ids or [TOKENIZER.end_id(tokenizer)]
    stops = sorted(stops, key=lambda i: i != tokenizer.eos_token_id)  # the end of a text, then ends of turns
    return {"bos_token_id": ids[0] if begins else TOKENIZER.begin_id(tokenizer), "add_bos_token": begins, "add_eos_token": ends,
            **dict(zip(("eos_token_id", "eot_token_id", "eom_token_id"), stops, strict=False)),
            **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "unk", "mask")}}


def modelfile(tokenizer, config: MODEL.ModelConfig, values: dict) -> str:
    """Ollama's settings for a GGUF file."""
    template = ollama_template(tokenizer, values["add_bos_token"]) if tokenizer.chat_template else None
    stops = tokenizer.convert_ids_to_tokens(config.eos_ids)
    context = min(values["context_length"], 8192)  # Ollama reserves memory for the whole context
    return "\n".join(["FROM ./model.gguf", *([f'TEMPLATE """{template}"""'] if template else ()),
                      *(f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops),
                      f"PARAMETER temperature {INFER.InferenceSection().temperature}", f"PARAMETER num_ctx {context}\n"])


def ollama_template(tokenizer, begins: bool) -> str | None:
    """A chat template in Go's language if all turns are their contents in a fixed frame (ChatML), else None: Ollama then goes
    by the template in the GGUF file. Tools are left out."""
    opening = tokenizer.bos_token or ""

    def rendered(*roles: str, ask: bool = False) -> str:
        return TOKENIZER.render(tokenizer, [{"role": role, "content": f"zq{i}z"} for i, role in enumerate(roles)], None, ask)

    try:
        user = rendered("user").removeprefix(opening)
        ask = rendered("user", ask=True).removeprefix(opening + user)
        system = rendered("system", "user").removeprefix(opening).removesuffix(user.replace("zq0z", "zq1z"))
        reply = rendered("user", "assistant").removeprefix(opening + user).replace("zq1z", "zq0z")
        roles = ("system", "user", "assistant", "user", "assistant", "user")
        whole = rendered(*roles, ask=True)
    except UserError:  # a system turn may be forbidden
        return None
    frames = {"system": system, "user": user, "assistant": reply}
    joined = "".join(frames[role].replace("zq0z", f"zq{i}z") for i, role in enumerate(roles)) + ask
    if whole.removeprefix(opening) != joined or '"""' in joined or "{{" in joined:
        return None
    cases = [f'if eq .Role "{role}" }}}}{frame.replace("zq0z", "{{ .Content }}")}' for role, frame in frames.items()]
    first = opening if whole.startswith(opening) and not begins else ""
    return first + "{{ range .Messages }}{{ " + "{{ else ".join(cases) + "{{ end }}{{ end }}" + ask


def export_gguf_adapter(model: MODEL.LanguageModel, tokenizer, target: Path, section: QuantizationSection) -> None:
    """Write the folder `target` with adapter.gguf, the unmerged LoRA of a model in float32 (llama-server --lora FILE)."""
    gguf, architecture = import_gguf(), gguf_architecture(model)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], model.config.num_hidden_layers)
    tensors, alpha, latent = {}, float(model.adapter.lora_alpha), model.config.kv_lora_rank
    for name, tensor in model.state_dict().items():
        if not MODEL.tensor_is_trained(name):
            continue
        module, _, part = name.rpartition(".lora_")
        lost = ".experts" in module or module == "lm_head" and (latent or model.config.tie_word_embeddings)
        lost = lost or latent and re.search(r"\.(q|q_a|q_b|kv_a|kv_b)_proj", module)
        if lost or part not in ("A.default.weight", "B.default.weight"):
            raise UserError(f"--adapter: {name} has no effect in llama.cpp, which adds plain LoRA to linear layers; merge it")
        if part[0] == "B":  # llama.cpp multiplies by alpha / r
            tensor = tensor * (model.get_submodule(module).scaling["default"] * tensor.shape[1] / alpha)
            tensor = adjacent_pairs(tensor, module, model.config, architecture)
        tensors[f"{names.get_name(module)}.weight.lora_{part[0].lower()}"] = tensor
    target.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(target / "adapter.gguf", architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    write_tensors(writer, lambda: iter(tensors.items()), "F32")


# ------------------------------------------------------------------------------------------------ command line

SECTIONS = {**INFER.SECTIONS, "quantization": QuantizationSection}


def main(argv: list[str] | None = None) -> None:
    config = load_config(argv, SECTIONS, "quantization", {}, __doc__)
    name, section = config.model.name, config.quantization
    if not name:
        raise UserError("model.preset: fresh weights say nothing about what packing costs; name a trained model with --model")
    if config.model.quantization != "none":
        raise UserError("model.quantization: has no effect here, where both forms are compared; say --method")
    if section.method == "int8" and section.group_size != 64:
        raise UserError("quantization.group_size: int8 has one scale for each row; leave it out")
    texts = list(itertools.islice(TOKENIZER.sample_texts(config.data, part="val"), 100))
    if not texts:
        raise UserError(f"data.validation: '{config.data.validation}' holds out no text, and perplexity is measured on held-out "
                        "text; use hash, tail or a file")
    model, tokenizer = TOKENIZER.open_model(config.model, TOKENIZER.of_run(config), head="lm")
    if not model.config.causal:
        raise UserError(f"model.name: {name} is an encoder, so its texts have no perplexity; name a causal language model")
    if model.adapter:
        MODEL.merge_adapter(model)
    rows = []
    for method in dict.fromkeys(("none", section.method)):
        if method != "none":
            quantize(model, method, section.group_size)
        say(f"{method}: measuring perplexity on {len(texts)} held-out texts")
        start = time.perf_counter()
        score = INFER.score(model, tokenizer, texts)
        rows.append((method, INFER.weight_bytes(model), score, time.perf_counter() - start))
    print(f"{'form':6} {'weights':>13} {'nats a token':>13} {'perplexity':>11} {'tokens/s':>9}")
    for method, size, score, seconds in rows:
        print(f"{method:6} {size / 1e6:10,.2f} MB {score['loss']:13.4f} {score['perplexity']:11.3f} "
              f"{score['tokens'] / seconds:9,.0f}")


if __name__ == "__main__":
    run_main(main)
