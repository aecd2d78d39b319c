"""QUANT.py: the form a model is shipped in.

Two forms of frozen weights, both bitsandbytes': `nf4` (4 bits, QLoRA's) and `int8`. `MODEL.load(..., quantization="nf4")`
packs each weight as it is read, so memory never holds the whole model in full; adapters (`SFT.py --lora.r 16`) learn on top.

    python QUANT.py --model out                                      # what a packed form saves, and what it costs (--method int8)
    python SFT.py --model gpt2-xl --data mine.jsonl --lora.r 16 --model.quantization nf4
"""

from __future__ import annotations

import copy
import importlib
import itertools
import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
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


# --------------------------------------------------- ONNX, OpenVINO, torch.export, AOTInductor, TorchScript, TensorRT


def check_exportable(model: MODEL.LanguageModel, foreign: bool = False) -> None:
    reason = "is an encoder" if not model.config.causal else "has no language-model head" if "lm" not in model.heads else \
        "is not an architecture of MODEL.py" if isinstance(model, MODEL.ForeignModel) and not foreign else ""
    if reason:
        raise UserError(f"model.name: this {model.config.model_type} {reason}; this export needs a causal language model")


class GivenStates:
    """A KV cache whose states are inputs and outputs of the forward pass; `attend` is that of `MODEL.CacheStep`.

    past: the states of all layers in order, two per layer (B, H, P, D); mask (B, P + T): 0 is padding.
    """

    def __init__(self, positions: Tensor, mask: Tensor | None, past: tuple[Tensor, ...]):
        self.positions, self.mask, self.past, self.present = positions, mask, past, []

    def attend(self, layer: int, queries: tuple[Tensor, ...], new: tuple[Tensor, ...], window: int | None,
               compute: Callable) -> Tensor:
        past = self.past[2 * layer : 2 * layer + 2]
        states = [torch.cat(pair, 2) for pair in zip(past, new)] if past else new  # (B, H, P + T, D)
        self.present += states
        if self.mask is None and window is None:
            return compute(*queries, *states, None)
        keys = torch.arange(states[0].shape[2])
        last = keys[-new[0].shape[2] :, None]  # (T, 1), the last key that each query attends to
        allowed = (keys <= last) & (keys > last - window) if window else keys <= last  # (T, P + T)
        allowed = allowed[None] if self.mask is None else allowed & self.mask[:, None].bool() | (keys == last)  # padding: itself
        return compute(*queries, *states, MODEL.Mask(MODEL.bias_of(allowed, queries[0].dtype), None))


def attend_fused(query: Tensor, key: Tensor, value: Tensor, mask: MODEL.Mask | None, window=None, dropout=0.0) -> Tensor:
    """`MODEL.attend_sdpa` without conditions on lengths, which tracing would fix."""
    bias, grouped = None if mask is None else mask.bias, bool(query.shape[1] != key.shape[1])
    return F.scaled_dot_product_attention(query, key, value, bias, is_causal=mask is None, enable_gqa=grouped)


class SplitExperts(nn.Module):
    """`MODEL.Experts` as one product per expert: exporters know no grouped product, quantizers no stacked weights."""

    def __init__(self, stacked: MODEL.Experts):
        super().__init__()
        self.gate_up_proj, self.down_proj = (nn.ParameterList(nn.Parameter(weight, False) for weight in weights.detach())
                                             for weights in (stacked.gate_up_proj, stacked.down_proj))
        self.activation = stacked.activation

    def forward(self, hidden: Tensor, experts: Tensor, weights: Tensor, real: None) -> Tensor:
        mixed = torch.zeros_like(hidden)  # (N, C)
        for number, (gate_up, down) in enumerate(zip(self.gate_up_proj, self.down_proj)):
            tokens, rank = (experts == number).nonzero(as_tuple=True)  # (n,) tokens of this expert
            gate, up = F.linear(hidden[tokens], gate_up).chunk(2, -1)
            output = F.linear(self.activation(gate) * up, down) * weights[tokens, rank][:, None]
            mixed = mixed.index_add(0, tokens, output)
        return mixed


class Exportable(nn.Module):
    """A model with tensors as inputs and outputs: ids (B, T) -> logits (B, T, V), or with a KV cache -> logits and all states."""

    def __init__(self, model: MODEL.LanguageModel):
        super().__init__()
        check_exportable(model)
        frozen = {id(weight): nn.Parameter(weight.detach(), False) for weight in model.parameters()}  # in the same memory
        self.model = copy.deepcopy(model, frozen)
        for module in list(self.model.modules()):
            if isinstance(module, MODEL.MixtureOfExperts):
                module.experts = SplitExperts(module.experts)
            elif hasattr(module, "attend"):
                module.attend, module.expand_from = attend_fused, 0  # expanded latents suit all lengths
        self.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, *past: Tensor):
        positions = torch.arange(input_ids.shape[1])[None] if position_ids is None else position_ids
        cache = GivenStates(positions, attention_mask, past)
        logits = self.model(input_ids, cache=cache).logits
        return (logits, *cache.present) if past else logits


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and log lines of exporters, which name their internals."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def optional(package: str, target: str):
    """An optional package that the export `--to target` needs."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"--to {target}: needs {package}; pip install -r requirements-extras.txt") from None


# The types and file names of transformers.js.
ONNX_FILES = {"none": ("fp32", "model.onnx"), "int8": ("q8", "model_quantized.onnx"), "int4": ("q4", "model_q4.onnx")}
ONNX_SINGLE = 2**30  # bytes of an ONNX file; larger weights go into a second file, since protobuf ends at 2 GiB


def onnx_graph(model: MODEL.Transformer, untied: bool):
    """An onnx.ModelProto with the inputs and outputs that onnxruntime-genai, transformers.js and optimum share:
    input_ids, attention_mask, position_ids, past_key_values.N.key/value -> logits, present.N.key/value.

    Keys and values are (B, H_kv, P, D); of latent attention (MLA) the key is the latent (B, 1, P, R), the value the rotary key
    (B, 1, P, Dr). `untied` copies an output head that shares the embedding, so that it can be quantized. Operator set 23 has
    attention as an operator."""
    config, exportable = model.config, Exportable(model)
    if untied and config.tie_word_embeddings:
        exportable.model.lm_head.weight = nn.Parameter(exportable.model.lm_head.weight.clone(), False)
    sizes = [(config.num_key_value_heads, config.head_dim)] * 2
    if config.kv_lora_rank:
        sizes = [(1, config.kv_lora_rank), (1, config.qk_rope_head_dim)]
    layers = range(config.num_hidden_layers)
    past = [torch.zeros(2, heads, 3, width, dtype=model.dtype) for _ in layers for heads, width in sizes]
    ids, mask, positions = torch.ones(2, 4, dtype=torch.long), torch.ones(2, 7, dtype=torch.long), torch.arange(3, 7).repeat(2, 1)
    batch, length, before, total = map(torch.export.Dim, ("batch_size", "sequence_length", "past_sequence_length",
                                                          "total_sequence_length"))
    names = [f".{layer}.{kind}" for layer in layers for kind in ("key", "value")]
    dynamic = ({0: batch, 1: length}, {0: batch, 1: total}, {0: batch, 1: length}, ({0: batch, 2: before},) * len(past))
    program = torch.onnx.export(
        exportable, (ids, mask, positions, *past), dynamo=True, verbose=False, opset_version=23, dynamic_shapes=dynamic,
        input_names=["input_ids", "attention_mask", "position_ids", *("past_key_values" + name for name in names)],
        output_names=["logits", *("present" + name for name in names)])
    graph = program.model_proto
    for node in graph.graph.node:
        del node.metadata_props[:]  # stack traces
    return graph


def write_onnx(graph, path: Path, section: QuantizationSection) -> bool:
    """Quantize and write a graph; True if its weights are in a second file."""
    import onnx

    if section.method == "int8":
        from onnxruntime.quantization import QuantType, quantize_dynamic

        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            full, quantized = Path(scratch) / "full.onnx", Path(scratch) / "quantized.onnx"
            onnx.save_model(graph, full, save_as_external_data=True, location="full.onnx_data")
            # Unsigned weights: products of signed ones saturate on x86 processors without VNNI.
            quantize_dynamic(full, quantized, ["MatMul", "Gather"], per_channel=True, weight_type=QuantType.QUInt8,
                             use_external_data_format=True)
            graph = onnx.load(quantized)
    if section.method == "int4":
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        quantizer = MatMulNBitsQuantizer(graph, block_size=section.group_size, is_symmetric=True, accuracy_level=4)
        quantizer.process()
        graph = quantizer.model.model
    large = sum(len(tensor.raw_data) for tensor in graph.graph.initializer) > ONNX_SINGLE
    onnx.save_model(graph, path, save_as_external_data=large, location=path.name + "_data")
    return large


def check_onnx(path: Path, model: MODEL.Transformer, exact: bool) -> None:
    """Compare the logits of an ONNX file in onnxruntime with those of the model."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    positions = torch.arange(min(16, model.config.max_position_embeddings))[None]
    ids = positions % model.config.vocab_size
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}
    for state in session.get_inputs()[3:]:
        given[state.name] = torch.zeros(1, state.shape[1], 0, state.shape[3])
    with torch.no_grad():
        expected = model(ids).logits
    [logits] = session.run(["logits"], {name: tensor.numpy() for name, tensor in given.items()})
    difference = float((torch.from_numpy(logits) - expected).std() / expected.std())
    size = sum(file.stat().st_size for file in path.parent.iterdir())
    say(f"{path.name}: {size / 1e6:,.1f} MB; its logits in onnxruntime differ by {difference:.1e} standard deviations")
    if exact and not difference < 1e-3:
        raise RuntimeError(f"{path.name}: its logits in onnxruntime are not those of the model")


def export_onnx(model, tokenizer, target: Path, section: QuantizationSection) -> None:
    """A folder for transformers.js and onnxruntime-genai: onnx/model*.onnx, config.json, tokenizer, genai_config.json."""
    if section.method not in ONNX_FILES:
        raise UserError(f"quantization.method: --to onnx writes {', '.join(ONNX_FILES)}; found {section.method}")
    dtype, name = ONNX_FILES[section.method]
    for package in ("onnx", "onnxscript", "onnxruntime"):
        optional(package, "onnx")
    config, path = model.config, target / "onnx" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with quiet():
        large = write_onnx(onnx_graph(model, section.method != "none"), path, section)
    check_onnx(path, model, section.method == "none")
    TOKENIZER.save(tokenizer, target)
    raw = MODEL.config_to_hub(config)
    special = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if raw.get(key) is not None}
    browser = {"dtype": dtype, "use_external_data_format": {name: int(large)}}
    files = {"config.json": {**raw, "transformers.js_config": browser}, "generation_config.json": special}
    if not config.kv_lora_rank:  # onnxruntime-genai has one width for keys and values
        files["genai_config.json"] = genai_config(config, f"onnx/{name}", special)
    for file, content in files.items():
        (target / file).write_text(json.dumps(content, indent=2) + "\n")


def genai_config(config: MODEL.ModelConfig, path: str, special: dict) -> dict:
    """genai_config.json of onnxruntime-genai."""
    decoder = {
        "filename": path, "session_options": {"provider_options": []}, "hidden_size": config.hidden_size,
        "head_size": config.head_dim,
        **{f"num_{key}": getattr(config, f"num_{key}") for key in ("hidden_layers", "attention_heads", "key_value_heads")},
        "inputs": {**{name: name for name in ("input_ids", "attention_mask", "position_ids")},
                   **{f"past_{kind}_names": f"past_key_values.%d.{kind}" for kind in ("key", "value")}},
        "outputs": {"logits": "logits", **{f"present_{kind}_names": f"present.%d.{kind}" for kind in ("key", "value")}}}
    ids = {"pad_token_id": (config.eos_ids or [0])[0], **special}
    return {"model": {"type": "decoder", "vocab_size": config.vocab_size, "context_length": config.max_position_embeddings, **ids,
                      "decoder": decoder},
            "search": {"max_length": config.max_position_embeddings, "past_present_share_buffer": False}}


def export_tensorrt(model, tokenizer, target: Path, section: QuantizationSection) -> None:
    """The folder of `export_onnx`, build_engine.sh, which makes model.engine of it, and model.engine if trtexec is on PATH."""
    if section.method != "none":
        raise UserError(f"quantization.method: --to tensorrt writes none; found {section.method}")
    import onnx

    export_onnx(model, tokenizer, target, section)
    half = model.config.max_position_embeddings // 2  # new tokens in a step, and tokens before them, at most
    lengths = {"batch_size": (1, 1, 1), "sequence_length": (1, 1, half), "past_sequence_length": (0, half, half),
               "total_sequence_length": (1, half + 1, 2 * half)}  # smallest, usual, largest
    inputs = onnx.load(target / "onnx/model.onnx", load_external_data=False).graph.input
    command = ["trtexec", "--onnx=onnx/model.onnx", "--saveEngine=model.engine"]
    for i, flag in enumerate(("minShapes", "optShapes", "maxShapes")):
        shapes = [[lengths[dim.dim_param][i] if dim.dim_param else dim.dim_value for dim in tensor.type.tensor_type.shape.dim]
                  for tensor in inputs]
        named = (f"{tensor.name}:{'x'.join(map(str, shape))}" for tensor, shape in zip(inputs, shapes))
        command.append(f"--{flag}={','.join(named)}")
    (target / "build_engine.sh").write_text(f"cd \"$(dirname \"$0\")\" && {shlex.join(command)}\n")
    if shutil.which("trtexec") is None:
        return say("trtexec is not on PATH; run build_engine.sh of this folder on a machine with TensorRT")
    done = subprocess.run(command, cwd=target, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"--to tensorrt: trtexec failed: {last_line(done)}")


def last_line(done: subprocess.CompletedProcess) -> str:
    return ((done.stderr or done.stdout).strip().splitlines() or ["no message"])[-1][:300]


def export_openvino(model, tokenizer, target: Path, section: QuantizationSection) -> None:
    """A folder for openvino-genai, by the exporter of optimum-intel, which reads Hugging Face folders."""
    check_exportable(model, foreign=True)
    int4 = ["int4", "--sym", "--ratio", "1.0", "--group-size", str(section.group_size), "--group-size-fallback", "adjust"]
    formats = {"none": ["fp16"], "int8": ["int8"], "int4": int4}
    if section.method not in formats:
        raise UserError(f"quantization.method: --to openvino writes {', '.join(formats)}; found {section.method}")
    command = shutil.which("optimum-cli", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))
    if command is None:
        raise UserError("--to openvino: optimum-cli is not on PATH; pip install optimum-intel openvino openvino-tokenizers nncf")
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        MODEL.save(model, folder)
        TOKENIZER.save(tokenizer, folder)
        done = subprocess.run([command, "export", "openvino", "--model", folder, "--task", "text-generation-with-past",
                               "--weight-format", *formats[section.method], str(target)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"--to openvino: optimum-cli failed: {last_line(done)}")


def traced_program(model) -> torch.export.ExportedProgram:
    """ids (1, T) -> logits (1, T, V) as torch.export traces it."""
    length = torch.export.Dim("T", max=model.config.max_position_embeddings)
    with quiet():
        return torch.export.export(Exportable(model), (torch.ones(1, 8, dtype=torch.long),), dynamic_shapes=({1: length},))


def export_pt2(model, tokenizer, target: Path, section: QuantizationSection) -> None:
    """A .pt2 file: torch.export.load(FILE).module()(ids (1, T)) -> logits (1, T, V) in a program that imports only torch."""
    with target.open("wb") as file:
        torch.export.save(traced_program(model), file)


def export_compiled(model, tokenizer, target: Path, section: QuantizationSection) -> None:
    """A .pt2 package that AOTInductor compiled for this machine: torch._inductor.aoti_load_package(FILE)(ids (1, T))."""
    program = traced_program(model)
    with target.open("wb") as file, quiet():
        torch._inductor.aoti_compile_and_package(program, package_path=file)


def export_torchscript(model, tokenizer, target: Path, section: QuantizationSection) -> None:
    """A TorchScript file: torch.jit.load(FILE)(ids (1, T)) -> logits (1, T, V)."""
    say("TorchScript is deprecated in torch; --to torch-export is its successor")
    with quiet():
        torch.jit.trace(Exportable(model), torch.ones(1, 8, dtype=torch.long), check_trace=False).save(str(target))


EXPORTS = {"onnx": export_onnx, "openvino": export_openvino, "torch-export": export_pt2, "aotinductor": export_compiled,
           "torchscript": export_torchscript, "tensorrt": export_tensorrt}


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
