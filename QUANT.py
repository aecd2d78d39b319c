"""QUANT.py: quantization and export to other formats.

Read in this order: rounding (`quantize_groups`), the layer (`QuantizedLinear`), methods that use calibration text (`gptq`, `awq`,
`smoothquant`), the pass through the layers that calibrates them (`layer_by_layer`), `quantize`, and quantization-aware training
(`fake_quantize`). Below the banner: bitsandbytes, quantized folders, the exports (GGUF; ONNX, OpenVINO and torch's formats), the
comparison of methods, the command line.

    python QUANT.py --model out --method int4 --out out/int4          # a folder that INFER.py, transformers and vLLM open
    python QUANT.py --model out --method gptq --data text.txt         # without --out, only print the table
    python QUANT.py --model out --compare                             # size, quality and speed of every method
    python QUANT.py --model out --to gguf --out out/gguf              # for llama.cpp, Ollama and LM Studio
    python INFER.py --model out --quantization int8                   # quantize while loading
    python SFT.py --training.qat int4                                 # train with rounded weights, then quantize
    python SFT.py --model gpt2-xl --data mine.jsonl --lora.r 16 --model.quantization nf4      # QLoRA
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import importlib
import io
import itertools
import json
import logging
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import INFER
import MODEL
import TOKENIZER
from MODEL import Action, UserError, knob, load_config, run_main, say

FP8 = "fp8"  # 8-bit floats with 4 exponent bits and 3 mantissa bits (E4M3, Micikevicius 2022); the maximum is 448


class Form(NamedTuple):
    """The number format of a linear layer."""

    bits: int | str  # bits per integer, or FP8
    group: int = 0  # weights per scale; 0: the whole row
    dynamic: bool = False  # activations are rounded to 8 bits as well


FORMS = {"int8": Form(8), "int8_dynamic": Form(8, dynamic=True), "smoothquant": Form(8, dynamic=True), "int4": Form(4, 32),
         "gptq": Form(4, 32), "awq": Form(4, 32), "fp8": Form(FP8, dynamic=True)}
BITSANDBYTES = ("nf4", "llm_int8")
METHODS = ChainMap(dict.fromkeys(BITSANDBYTES), FORMS, dict.fromkeys(("none", *MODEL.AUTOCAST)))  # with what forks add to FORMS


@dataclass
class QuantizationSection:
    method: str = knob("int8", "quantization method, such as int8, int8_dynamic (activations as well), int4, gptq or awq",
                       METHODS, often=True)
    group_size: int = knob(0, "int4, gptq, awq, nf4: weights per scale; 0: 32, for nf4 64; smaller groups are more accurate but "
                           "use more memory", low=0)
    exclude: list[str] = knob([], "regular expressions of layers that are not quantized")
    lm_head: bool = knob(False, "quantize the output head as well, unless it shares the embedding's weight")
    calibration_samples: int = knob(128, "gptq, awq, smoothquant: number of calibration texts from data.train", low=1)
    calibration_length: int = knob(512, "gptq, awq, smoothquant: maximum tokens per calibration text", low=8)
    questions: str | None = knob("auto", "file of questions for the exact match (answered); auto: the bundled file if data.train "
                                         "is bundled")
    gguf_type: str = knob("Q8_0", "data type of the matrices in a GGUF file",
                          ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q5_1", "Q5_0", "Q4_1", "Q4_0"))
    model: dict = knob({"name": "./out"}, "overrides `model` for this stage")


# ---------------------------------------------------------------------------------------------------- rounding


def grouped(weight: Tensor, size: int) -> Tensor:
    """(..., in) -> (..., in / size, size); size 0 is the whole row"""
    return weight.unflatten(-1, (-1, size or weight.shape[-1]))


def largest_scale(groups: Tensor, bits: int) -> Tensor:
    """The scale (..., G) at which the largest weight of each group (..., G, size) just fits."""
    largest = groups.abs().amax(-1).clamp(min=1e-12)
    # CUDA multiplies by the reciprocal of a Python number, so the largest weights would round differently than on a CPU.
    return largest / torch.full_like(largest, 448 if bits == FP8 else 2 ** (bits - 1) - 0.5)


def group_scale(groups: Tensor, bits: int) -> Tensor:
    """The scale (..., G), positive or negative, that maps the weight with the largest magnitude of each group (..., G, size) to
    the lowest level, -2**(bits - 1), because there is one more level below zero than above."""
    farthest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
    farthest = torch.where(farthest.abs() < 1e-12, 1e-12, farthest)
    return round_to_bfloat16(farthest / -(2 ** (bits - 1)))


def round_to_bfloat16(scale: Tensor) -> Tensor:
    """Round to bfloat16, in which scales of groups are stored, without changing the dtype."""
    return scale.bfloat16().to(scale.dtype)


def best_scale(groups: Tensor, bits: int, products: Tensor) -> Tensor:
    """Search larger and smaller scales of groups (out, G, size) for the least squared error of the outputs, given the sum of
    x x^T over the inputs of each group (G, size, size). Clipping a few large weights makes the steps of all others finer."""
    first = best = group_scale(groups, bits)
    least = torch.full_like(first, math.inf)
    for size in torch.linspace(1.15, 0.5, 27).tolist():
        scale = round_to_bfloat16(first * size)
        difference = dequantize(quantize_groups(groups, scale, bits), scale) - groups
        error = (torch.einsum("ogi,gij->ogj", difference, products) * difference).sum(-1)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


def quantize_groups(groups: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Round to the nearest of 2**bits levels: groups (..., G, size), scale (..., G) -> int8 (or float8) of the same shape."""
    if bits == FP8:
        return (groups / scale[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    top = 2 ** (bits - 1)
    return (groups / scale[..., None]).round_().clamp_(-top, top - 1).to(torch.int8)


def dequantize(levels: Tensor, scale: Tensor) -> Tensor:
    return levels.to(scale.dtype) * scale[..., None]


def nearest(weight: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Round (..., out, in) to the nearest level -> levels (..., out, in), scale (..., out, groups)."""
    groups = grouped(weight.float(), form.group)
    scale = group_scale(groups, form.bits) if form.group else largest_scale(groups, form.bits)
    return quantize_groups(groups, scale, form.bits).flatten(-2), scale


def rounded(weight: Tensor, form: Form) -> Tensor:
    """Quantize (..., out, in) to the nearest levels and dequantize it to float32."""
    levels, scale = nearest(weight, form)
    return dequantize(grouped(levels, form.group), scale).flatten(-2)


def round_activations(hidden: Tensor, bits: int | str = 8) -> Tensor:
    """Round activations (..., in) to 8 bits, with one scale per token. Gradients pass unchanged."""
    return rounded(hidden.detach(), Form(bits)).to(hidden.dtype) + (hidden - hidden.detach())


class QuantizedLinear(nn.Linear):
    """y = x W^T + b with W = scale * integers and one scale per group of a row, stored in the layout of compressed-tensors."""

    def __init__(self, out_features: int, in_features: int, bias: Tensor | None, form: Form, device=None):
        nn.Module.__init__(self)
        self.out_features, self.in_features, self.form, self.bias = out_features, in_features, form, bias
        bits = 8 if form.bits == FP8 else form.bits
        groups, integers = -(-in_features // (form.group or in_features)), -(-in_features * bits // 32)
        self.register_buffer("weight_packed", torch.empty(out_features, integers, dtype=torch.int32, device=device))
        self.register_buffer("weight_scale", torch.empty(out_features, groups, dtype=torch.bfloat16, device=device))
        self.register_buffer("weight_shape", torch.tensor([out_features, in_features], device=device))

    @classmethod
    def of(cls, linear: nn.Linear, levels: Tensor, scale: Tensor, form: Form) -> QuantizedLinear:
        """Create a layer from integers (out, in) and their scale (out, groups)."""
        new = cls(*levels.shape, linear.bias, form, levels.device)
        new.weight_packed, new.weight_scale = pack(levels, form.bits), scale.bfloat16() if form.group else scale.float()
        return new.train(linear.training)

    @property
    def levels(self) -> Tensor:
        return unpack(self.weight_packed, self.form.bits, self.in_features)

    @property
    def weight(self) -> Tensor:
        """(out, in) float32"""
        return dequantize(grouped(self.levels, self.form.group), self.weight_scale.float()).flatten(-2)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = round_activations(hidden, self.form.bits) if self.form.dynamic else hidden
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        return F.linear(hidden, self.weight.to(hidden.dtype), bias)

    @classmethod
    def join(cls, linears: list[QuantizedLinear]) -> QuantizedLinear:
        """Fuse layers with the same input into one."""
        first, rows = linears[0], sum(linear.out_features for linear in linears)
        join = lambda name: torch.cat([getattr(linear, name) for linear in linears])  # noqa: E731
        bias = None if first.bias is None else nn.Parameter(join("bias"), requires_grad=False)
        new = cls(rows, first.in_features, bias, first.form, first.weight_packed.device)
        new.weight_packed, new.weight_scale = join("weight_packed"), join("weight_scale")
        return new.train(first.training)

    def packed(self) -> KernelLinear | None:
        """The layer for the device's integer or fp8 kernels, or None if they do not support its form. On CPUs without VNNI or
        AMX the kernels' sums would saturate."""
        form, (rows, width), device = self.form, (self.out_features, self.in_features), self.weight_packed.device
        in_groups = form.bits == 4 and form.group in (32, 64, 128, 256)
        if device.type == "cuda":
            fits = rows % 16 == 0 and width % (128 if form.group else 16) == 0 and (in_groups or not form.group)
            needed = (9, 0) if form.bits == FP8 else (8, 0)
            return KernelLinear(self) if fits and torch.cuda.get_device_capability(device) >= needed else None
        kernels = device.type == "cpu" and torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()
        fits = in_groups and rows % 16 == 0 or not form.group and form.bits != FP8
        return KernelLinear(self) if kernels and fits else None


# ------------------------------------------------------------------------------------- methods with calibration


class Inputs:
    """Statistics of the inputs x of one linear layer over the calibration text."""

    def __init__(self, width: int, device):
        self.count, self.products = 0, torch.zeros(width, width, device=device)  # sum of x x^T, (in, in)
        self.mean, self.largest = torch.zeros(2, width, device=device)  # of |x|

    def add(self, hidden: Tensor) -> None:
        rows = hidden.detach().flatten(0, -2).float()  # (N, in)
        self.products += rows.T @ rows
        self.mean += rows.abs().sum(0)
        self.largest = torch.maximum(self.largest, rows.abs().amax(0))
        self.count += len(rows)

    def error(self, difference: Tensor) -> float:
        """The squared change of the outputs, summed over the text, if `difference` (out, in) is added to the weights."""
        return float(((difference @ self.products) * difference).sum())


def gptq(weight: Tensor, products: Tensor, form: Form, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    """GPTQ (Frantar 2022, algorithm 1): weight (out, in), sum of x x^T (in, in) -> levels (out, in), scale (out, groups).

    Columns are rounded one after the other. The columns that are not rounded yet compensate the rounding error of each column, in
    proportion to its row in the upper Cholesky factor of the inverse Hessian of the output error."""
    weight, size = weight.float().clone(), form.group or weight.shape[1]
    hessian = products.float().clone()
    unused = hessian.diagonal() == 0
    hessian.diagonal()[unused] = 1
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    hessian = torch.linalg.cholesky(hessian)
    hessian = torch.cholesky_inverse(hessian)
    factor = torch.linalg.cholesky(hessian, upper=True)
    levels, scales = torch.empty_like(weight, dtype=torch.int8), []
    block = size if size <= 512 else 128
    for start in range(0, weight.shape[1], block):
        stop = min(start + block, weight.shape[1])
        errors = torch.empty_like(weight[:, start:stop])
        for i in range(start, stop):
            if i % size == 0:
                part = slice(i, i + size)
                scales.append(best_scale(weight[:, None, part], form.bits, products[None, part, part].float())[:, 0])
            level = quantize_groups(weight[:, i, None, None], scales[-1][:, None], form.bits)[:, 0, 0]  # (out,)
            levels[:, i] = level
            errors[:, i - start] = (weight[:, i] - level * scales[-1]) / factor[i, i]
            weight[:, i + 1 : stop] -= errors[:, i - start, None] * factor[i, i + 1 : stop]
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return levels, torch.stack(scales, 1)


def round_weighted(weight: Tensor, products: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Round to the nearest levels, with the scales that are best for these inputs."""
    groups = grouped(weight.float(), form.group)  # (out, G, size)
    _, count, size = groups.shape
    blocks = products.view(count, size, count, size).diagonal(dim1=0, dim2=2).movedim(-1, 0)  # (G, size, size)
    scale = best_scale(groups, form.bits, blocks)
    return quantize_groups(groups, scale, form.bits).flatten(-2), scale


def awq_factors(weights: list[Tensor], inputs: Inputs, form: Form) -> Tensor:
    """AWQ (Lin 2023, section 3.2): factors (in,) that multiply the columns of all `weights` with these inputs before rounding,
    and divide the inputs. Columns with large inputs matter most, and a larger weight has a smaller relative error. The factors
    are mean(|x|) ** alpha, with the alpha that gives the least output error."""
    best, least = torch.ones_like(inputs.mean), math.inf
    for alpha in torch.linspace(0, 0.95, 20).tolist():
        factors = (inputs.mean / inputs.count).clamp(min=1e-4) ** alpha
        factors = factors / (factors.amax() * factors.amin()).sqrt()
        error = 0.0
        for weight in weights:
            error += inputs.error(rounded(weight.float() * factors, form) / factors - weight.float())
        if error < least:
            best, least = factors, error
    return best


def smooth_factors(weights: list[Tensor], inputs: Inputs, form: Form, alpha: float = 0.5) -> Tensor:
    """SmoothQuant (Xiao 2022, eq. 4): max|x|^alpha / max|w|^(1 - alpha) for each input channel. Activations have outliers in a
    few channels, which would reduce the precision of all others; part of their magnitude is moved into the weights."""
    largest = torch.stack([weight.float().abs().amax(0) for weight in weights]).amax(0)
    return (inputs.largest.clamp(min=1e-5) ** alpha / largest.clamp(min=1e-5) ** (1 - alpha)).clamp(min=1e-5)


def fold(before: nn.Module, after: list[nn.Linear], factors: Tensor) -> None:
    """Divide the outputs of `before` by the factors (in,), and multiply the columns of the layers that read them."""
    before.weight.data = before.weight / (factors[:, None] if isinstance(before, nn.Linear) else factors).to(before.weight.dtype)
    if getattr(before, "bias", None) is not None:
        before.bias.data = before.bias / factors.to(before.bias.dtype)
    for linear in after:
        linear.weight.data = linear.weight * factors.to(linear.weight.dtype)


def scaled_pairs(layer: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Linear]]]:
    """Pairs (module, the only linear layers that read its output) whose output can be divided by factors: norms, and linear
    layers with only averages and products between them and the next linear layer."""
    attention, mlp = layer.self_attn, layer.mlp
    if layer.post_norm or isinstance(attention, MODEL.LatentAttention):
        return
    yield layer.input_layernorm, [getattr(attention, name) for name in ("qkv_proj", "q_proj", "k_proj", "v_proj")
                                  if hasattr(attention, name)]
    if hasattr(attention, "v_proj") and attention.heads[0] == attention.heads[1]:
        yield attention.v_proj, [attention.o_proj]
    if isinstance(mlp, MODEL.MLP):
        yield layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj] if mlp.gated else [mlp.up_proj]
        if mlp.gated:
            yield mlp.up_proj, [mlp.down_proj]


# Methods that use the inputs of each layer over the calibration text; all others round each weight to the nearest level.
ROUNDINGS = {"gptq": gptq, "awq": round_weighted}  # method -> rounding(weight, products, form) -> levels, scale
FACTORS = {"awq": awq_factors, "smoothquant": smooth_factors}  # method -> factors(weights, inputs, form), which are folded
CALIBRATED = ChainMap(FACTORS, ROUNDINGS)


class Stop(Exception):
    pass


def packed_texts(texts: list[list[int]], limit: int = 2048) -> list[list[list[int]]]:
    """Group texts into rows of at most `limit` tokens: with 4, [[1, 2], [3, 4], [5]] -> [[[1, 2], [3, 4]], [[5]]]."""
    groups: list[list[list[int]]] = []
    for ids in texts:
        if not groups or sum(map(len, groups[-1])) + len(ids) > limit:
            groups.append([])
        groups[-1].append(ids)
    return groups


@torch.no_grad()
def layer_inputs(model: MODEL.LanguageModel, texts: list[list[int]]) -> tuple[list[Tensor], list[list[tuple[tuple, dict]]]]:
    """The hidden states (1, T, C) before the first layer for each row of packed texts, and for each layer and row the other
    arguments of its call, such as masks. The layers themselves do not run."""
    layers, foreign = MODEL.layers_of(model), isinstance(model, MODEL.ForeignModel)
    states, arguments = [], [[] for _ in layers]

    def skip(number: int, hidden_states: Tensor, *args, **kwargs):
        if number == 0:
            states.append(hidden_states)
        arguments[number].append((args, kwargs))
        if number == len(layers) - 1:
            raise Stop
        return hidden_states if foreign else (hidden_states, None)

    for number, layer in enumerate(layers):
        layer.forward = partial(skip, number)
    try:
        for row in packed_texts(texts, 1 if foreign else 2048):
            ids = torch.tensor([list(itertools.chain(*row))], device=model.device)
            segments = torch.tensor([[i for i, text in enumerate(row) for _ in text]], device=model.device)
            with contextlib.suppress(Stop):
                model(ids, segment_ids=segments if len(row) > 1 else None)
    finally:
        for layer in layers:
            del layer.forward
    return states, arguments


@torch.no_grad()
def layer_by_layer(model: MODEL.LanguageModel, texts: list[list[int]], work: Callable[[nn.Module, Callable], None],
                   done: Callable[[nn.Module], None] = lambda layer: None) -> list[Tensor]:
    """Call work(layer, observe) for each layer in turn. observe(linears) -> {linear: Inputs} runs the texts through the layer;
    its inputs are the outputs of the layers before it after `work`. Only one layer's statistics exist at a time. done(layer) is
    called when the layer is no longer needed. Returns the hidden states after the last layer for each row of packed texts."""
    layers = MODEL.layers_of(model)
    states, arguments = layer_inputs(model, texts)

    def outputs(layer: nn.Module, number: int) -> Iterator[Tensor]:
        for hidden, (args, kwargs) in zip(states, arguments[number], strict=True):
            output = layer(hidden, *args, **kwargs)
            yield output[0] if isinstance(output, tuple) else output

    for number, layer in enumerate(layers):
        def observe(linears: list[nn.Linear], layer=layer, number=number) -> dict[nn.Linear, Inputs]:
            found = {linear: Inputs(linear.in_features, model.device) for linear in linears}
            hooks = [linear.register_forward_pre_hook(lambda module, inputs: found[module].add(inputs[0])) for linear in linears]
            for _ in outputs(layer, number):
                pass
            for hook in hooks:
                hook.remove()
            if not all(inputs.mean.isfinite().all() for inputs in found.values()):
                raise UserError(f"model.name: the hidden states of layer {number + 1} are not finite; the weights are damaged")
            return found

        work(layer, observe)
        with dequantized(layer, states[0].dtype):
            for i, output in enumerate(outputs(layer, number)):
                states[i] = output
        done(layer)
        say(f"layer {number + 1} of {len(layers)}")
    return states


@contextlib.contextmanager
def dequantized(layer: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Dequantize a layer's weights once for many texts."""
    quantized = {name: module for name, module in layer.named_modules()
                 if isinstance(module, QuantizedLinear) and not module.form.dynamic}
    for name, module in quantized.items():
        plain = nn.Linear(module.in_features, module.out_features, device="meta")
        plain.weight, plain.bias = nn.Parameter(module.weight.to(dtype)), module.bias
        layer.set_submodule(name, plain)
    yield
    for name, module in quantized.items():
        layer.set_submodule(name, module)


# ---------------------------------------------------------------------------------------------------- quantize


def quantizable(model: MODEL.LanguageModel, exclude: list[str] = (), lm_head: bool = False) -> dict[str, tuple[nn.Module, str]]:
    """{name of a matrix: (its module, the parameter's name)} for the linear layers and experts of all layers. Embeddings, norms
    and routers are not quantized."""
    inside = {module for layer in MODEL.layers_of(model) for module in layer.modules()}
    if lm_head and not model.config.tie_word_embeddings:
        inside.add(getattr(model, "inner", model).get_output_embeddings())
    parts = {nn.Linear: ("weight",), MODEL.Experts: ("gate_up_proj", "down_proj")}
    found = {f"{name}.{part}": (module, part) for name, module in model.named_modules()
             if module in inside for part in parts.get(type(module), ())}
    for pattern in exclude:
        if not any(re.search(pattern, name) for name in found):
            raise UserError(f"quantization.exclude: '{pattern}' matches no layer; layer names look like {next(iter(found), 'none')}")
    found = {name: matrix for name, matrix in found.items() if not any(re.search(pattern, name) for pattern in exclude)}
    if not found:
        raise UserError("quantization.exclude: no layer is left to quantize; exclude fewer layers")
    return found


def replace_matrix(model: nn.Module, name: str, levels: Tensor, scale: Tensor, form: Form) -> None:
    """Replace the matrix `name` by its levels and scales."""
    if not scale.isfinite().all():
        raise UserError(f"model.name: {name} has values that are not finite; the weights are damaged")
    owner, _, part = name.rpartition(".")
    module, (parent, _, child) = model.get_submodule(owner), owner.rpartition(".")
    if part == "weight":
        setattr(model.get_submodule(parent), child, QuantizedLinear.of(module, levels, scale, form))
    else:
        replace_experts(module, part, pack(levels, form.bits), DequantizedExperts(scale, form, levels.shape[-1]))


def quantize(model: MODEL.LanguageModel, method: str = "int8", group_size: int = 0, calibration: list[list[int]] | None = None,
             exclude: list[str] = (), lm_head: bool = False, dtype: torch.dtype | None = None,
             done: Callable[[nn.Module], None] = lambda layer: None) -> MODEL.LanguageModel:
    """Quantize a loaded model in place. `calibration`: token ids of texts, for gptq, awq and smoothquant. `dtype`: type of the
    computation and of the weights that are not quantized. done(layer) is called when the weights of a layer are final."""
    check_method(model, method)
    if method in CALIBRATED and not calibration:
        raise UserError(f"quantization.method: {method} needs calibration text, but data.train contains none")
    layers, matrices = MODEL.layers_of(model), quantizable(model, exclude, lm_head)
    if method in BITSANDBYTES:
        packer = Packer(model, method, group_size, model.device)
        packer.matrices = divisible(matrices, Form(8))
        for name, (module, part) in matrices.items():
            packer(name, getattr(module, part).data)
        return keep_form(model, method)
    if method in MODEL.AUTOCAST:
        form, matrices, dtype = None, {}, MODEL.AUTOCAST[method]
    else:
        form = form_of(method, group_size)
        matrices = divisible(matrices, form)
        keep_form(model, method)

    def work(layer: nn.Module, observe: Callable | None = None) -> None:
        if observe:
            convert(layer.parameters(), dtype)
        modules = set(layer.modules())
        names = {module: name for name, (module, part) in matrices.items() if module in modules and part == "weight"}
        if method in FACTORS:
            inputs = observe(names)
            for before, after in scaled_pairs(layer):
                if all(linear in names for linear in after):
                    fold(before, after, FACTORS[method]([linear.weight for linear in after], inputs[after[0]], form))
        inputs = observe(names) if method in ROUNDINGS else {}
        for linear in [*inputs]:
            round_one(names[linear], partial(ROUNDINGS[method], products=inputs.pop(linear).products))
        for name in [name for name, (module, _) in matrices.items() if module in modules]:
            round_one(name)
        convert(layer.parameters(), dtype)

    def round_one(name: str, rounding: Callable = nearest) -> None:
        module, part = matrices.pop(name)  # which frees the original weights
        replace_matrix(model, name, *rounding(getattr(module, part).data, form=form), form)

    in_layers = {id(weight) for layer in layers for weight in layer.parameters()}
    for name in [name for name, matrix in matrices.items() if id(getattr(*matrix)) not in in_layers]:  # the output head
        round_one(name)
    convert((weight for weight in model.parameters() if id(weight) not in in_layers), dtype)
    if method in CALIBRATED:
        say(f"calibrating on {sum(map(len, calibration)):,} tokens (texts: {len(calibration)})")
        layer_by_layer(model, calibration, work, done)
    else:
        for layer in layers:
            work(layer)
            done(layer)
    return model


def convert(weights: Iterator[nn.Parameter], dtype: torch.dtype | None) -> None:
    """Convert weights in place, but not buffers: scales of quantized weights, biases of routers, rotary frequencies."""
    for weight in weights:
        weight.data = weight.data.to(dtype) if weight.is_floating_point() else weight.data


def form_of(method: str, group_size: int = 0) -> Form:
    form = FORMS[method]
    return form._replace(group=group_size) if form.group and group_size else form


# ----------------------------------------------------------------------------------- quantization-aware training


@torch.library.custom_op("quant::straight_through", mutates_args=(),
                         schema="(Tensor numbers, int bits, int group) -> Tensor")
def straight_through(numbers: Tensor, bits: int, group: int) -> Tensor:
    """`rounded` as one operation, in the dtype of its input. Gradients pass unchanged (straight-through estimator, Bengio 2013),
    because the true ones are zero almost everywhere.

    The largest weight of a row is half-way between two levels. If torch.compile fused the steps, its less exact division would
    round many of these weights to the other level."""
    return rounded(numbers, Form(bits, group)).to(numbers.dtype)


straight_through.register_fake(lambda numbers, bits, group: torch.empty_like(numbers))
straight_through.register_autograd(lambda context, gradient: (gradient, None, None))


class FakeQuantized(nn.Module):
    """A module that computes with the weights that `quantize` would store. Its parameters are the float32 weights to train."""

    forms: dict[str, Form]  # {name of a rounded parameter: its form}
    kept: dict[str, nn.Parameter]  # rounded weights in eval mode, where they do not change

    def read(self, part: str) -> Tensor:
        """A parameter's weights as the forward pass uses them."""
        if part in self.kept and not torch.is_grad_enabled():
            return self.kept[part]
        weight, form = getattr(self, part), self.forms.get(part)
        return straight_through(weight, form.bits, form.group) if form else weight

    def train(self, mode: bool = True) -> nn.Module:
        """Generation reads all weights for each token, so eval mode rounds them once, unless they are sharded (FSDP2)."""
        weights = {part: getattr(self, part).detach() for part in self.forms}
        self.kept = {part: nn.Parameter(rounded(weight, self.forms[part]))  # autocast converts parameters once
                     for part, weight in weights.items() if not mode and not hasattr(weight, "full_tensor")}
        return super().train(mode)


class FakeQuantizedLinear(FakeQuantized, nn.Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        hidden = straight_through(hidden, 8, 0) if self.forms["weight"].dynamic else hidden
        return F.linear(hidden, self.read("weight"), self.bias)


class FakeQuantizedExperts(FakeQuantized, MODEL.Experts):
    def product(self, runs: Tensor, part: str, ends: Tensor) -> Tensor:
        return MODEL.grouped_product(runs, self.read(part), ends)


def fake_quantize(model: MODEL.LanguageModel, method: str, group_size: int = 0) -> MODEL.LanguageModel:
    """Prepare a float32 model for quantization-aware training (Jacob 2018, section 3; Liu 2023), in place. Its outputs are then
    those after `quantize(model, method, group_size)`, while its float32 weights are trained."""
    if model.quantization != "none":
        raise UserError(f"training.qat: the model is already quantized ({model.quantization}); use the original model")
    if isinstance(model, MODEL.ForeignModel):
        raise UserError(f"training.qat: {method} is not supported for {model.config.model_type}, which runs in transformers; use "
                        f"one of {', '.join(MODEL.FAMILIES)}")
    form = form_of(method, group_size)
    for module, part in divisible(quantizable(model), form, "training.qat_group_size").values():
        if not isinstance(module, FakeQuantized):
            module.__class__ = FakeQuantizedLinear if type(module) is nn.Linear else FakeQuantizedExperts
            module.forms, module.kept = {}, {}
        module.forms[part] = form
    return model


# ======================================================================================================== edges

# ----------------------------------------------------------------------------------------- packing and kernels


def pack(levels: Tensor, bits: int) -> Tensor:
    """Pack 32 / bits levels (out, in) into each int32, unsigned, the first in the lowest bits (compressed-tensors' layout). FP8
    values are not changed."""
    if bits == FP8:
        return F.pad(levels.view(torch.uint8), (0, -levels.shape[-1] % 4)).view(torch.int32)
    levels = F.pad(levels, (0, -levels.shape[-1] % (32 // bits)), value=-(2 ** (bits - 1)))
    unsigned = levels.view(torch.uint8) & 2**bits - 1 ^ 2 ** (bits - 1)  # -8 -> 0, 7 -> 15
    if bits == 4:
        unsigned = unsigned[..., ::2] | unsigned[..., 1::2] << 4
    return unsigned.view(torch.int32)


def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """Unpack (..., in * bits / 32) int32 -> levels (..., in) int8 (or float8)."""
    unsigned = packed.view(torch.uint8)
    if bits == FP8:
        return unsigned[..., :width].contiguous().view(torch.float8_e4m3fn)
    if bits == 4:  # spread the two halves of each byte over two bytes
        pairs = unsigned.to(torch.int16)
        unsigned = pairs.bitwise_or_(pairs << 4).bitwise_and_(0x0F0F).view(torch.uint8)
    return unsigned[..., :width].sub(2 ** (bits - 1)).view(torch.int8)


class KernelLinear(nn.Module):
    """A frozen QuantizedLinear in the layout of the device's integer kernels (`QuantizedLinear.packed`). Small batches are
    limited by memory bandwidth, so a quarter of the bytes takes almost a quarter of the time. Large ones use dequantized weights.

    With 8 bits and several rows, int8 products summed in int32 are exact. Activations that must not be rounded are split into two
    rows, x = unit * (256 * high + low): 16-bit integers, as exact as bfloat16."""

    def __init__(self, linear: QuantizedLinear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.form, self.bias = linear.form, linear.bias
        self.scale = scale = linear.weight_scale  # (out, groups)
        if self.form.group:
            self.bytes, self.many = 1 + 6 / self.form.group, linear.weight_packed  # bytes per weight
            self.few, self.multiply = int4_kernel(linear.levels)
            self.offset = torch.stack((scale.T, torch.zeros_like(scale.T)), -1).bfloat16()  # (groups, out, 2)
        else:
            self.bytes, self.levels = 1 + 4 / self.in_features, linear.levels
            self.ones = torch.ones(self.out_features, dtype=torch.bfloat16, device=scale.device)
            self.onednn = self.form.dynamic and not scale.is_cuda and self.out_features >= 64  # narrower layers: slow
            if self.onednn:
                self.levels = torch.ops.onednn.qlinear_prepack(self.levels, None)
                self.scale, self.zeros = scale[:, 0].contiguous(), torch.zeros(self.out_features, dtype=torch.int32)

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, self.in_features)  # (N, in)
        out = (self.in_groups if self.form.group else self.dynamic if self.form.dynamic else self.in_bytes)(rows)
        out = out if self.bias is None else out + self.bias
        return out.to(hidden.dtype).view(*hidden.shape[:-1], self.out_features)

    def in_groups(self, rows: Tensor) -> Tensor:
        """(N, in) -> (N, out)"""
        if len(rows) <= 32:
            return self.multiply(rows.bfloat16().contiguous(), self.few, self.form.group, self.offset)
        levels = unpack(self.many, self.form.bits, self.in_features).to(rows.dtype)
        return F.linear(rows, grouped(levels, self.form.group).mul_(self.scale[..., None]).flatten(-2))

    def dynamic(self, rows: Tensor) -> Tensor:
        rows = rows.float()
        unit = largest_scale(rows, self.form.bits)
        levels = quantize_groups(rows, unit, self.form.bits)
        if self.form.bits == FP8:
            return torch._scaled_mm(levels, self.levels.T, unit[:, None], self.scale.T, out_dtype=torch.bfloat16)
        least = 32 if rows.is_cuda else 16 if self.onednn else 0  # minimum rows of the kernel
        levels = F.pad(levels, (0, 0, 0, max(least - len(rows), 0)))
        if self.onednn:
            out = torch.ops.onednn.qlinear_pointwise(levels, 1.0, 0, self.levels, self.scale, self.zeros, None, 1.0, 0,
                                                     torch.float32, "none", [], "")
            return out[: len(rows)].mul_(unit[:, None])
        sums = torch._int_mm(levels, self.levels.T)[: len(rows)]  # (N, out) int32
        return sums * unit[:, None] * self.scale[:, 0].float()

    def in_bytes(self, rows: Tensor) -> Tensor:
        if len(rows) <= 2 and not rows.is_cuda:
            return torch._weight_int8pack_mm(rows, self.levels, self.ones.to(rows.dtype)).mul_(self.scale[:, 0])
        if len(rows) > 128 or rows.is_cuda:
            return F.linear(rows, self.levels.to(rows.dtype)).mul_(self.scale[:, 0])
        unit = rows.abs().amax(-1, True).float().clamp_(min=1e-12) / (127 * 256)  # (N, 1)
        # The bytes of x / unit + 128 in memory are low + 128 and high; the exclusive or subtracts the 128 again.
        halves = (rows / unit).round_().to(torch.int16).add_(128).bitwise_xor_(128)
        halves = halves.view(torch.int8).unflatten(-1, (-1, 2)).permute(2, 0, 1).flatten(0, 1).contiguous()  # (2 N, in)
        low, high = torch._int_mm(halves, self.levels.T).float().unflatten(0, (2, -1))
        return low.add_(high, alpha=256).mul_(unit).mul_(self.scale[:, 0])


def int4_kernel(levels: Tensor) -> tuple[Tensor, Callable]:
    """Levels (out, in) in the layout of torch's 4-bit kernel for their device, and the kernel."""
    levels = levels.int() + 8
    if levels.is_cuda:
        pairs = (levels[:, ::2] << 4 | levels[:, 1::2]).to(torch.uint8)  # (out, in / 2)
        return torch.ops.aten._convert_weight_to_int4pack(pairs, 8), torch.ops.aten._weight_int4pack_mm
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1), torch.ops.aten._weight_int4pack_mm_for_cpu


class DequantizedExperts(nn.Module):
    """A parametrization that dequantizes the stacked weights of experts (E, out, in) at each use."""

    def __init__(self, scale: Tensor, form: Form, width: int):
        super().__init__()
        self.form, self.width = form, width
        self.register_buffer("scale", scale)

    def forward(self, packed: Tensor) -> Tensor:
        return dequantize(grouped(unpack(packed, self.form.bits, self.width), self.form.group), self.scale).flatten(-2)


# ------------------------------------------------------------------------------------------------------ checks


def check_method(model: MODEL.LanguageModel, method: str) -> None:
    if method not in METHODS:
        raise UserError(f"quantization.method: '{method}' is not one of {', '.join(METHODS)}")
    if model.quantization != "none":
        raise UserError(f"quantization.method: the model is already quantized ({model.quantization}); use the original model")
    if method in FACTORS and isinstance(model, MODEL.ForeignModel):
        raise UserError(f"quantization.method: {method} is not supported for {model.config.model_type}, which runs in "
                        "transformers; use gptq, int4 or int8")


def divisible(matrices: dict[str, tuple[nn.Module, str]], form: Form,
              key: str = "quantization.group_size") -> dict[str, tuple[nn.Module, str]]:
    """The matrices whose width is divisible by the group size; the others are logged. Messages start with the setting `key`."""
    widths = {name: getattr(*matrix).shape[-1] for name, matrix in matrices.items()}
    kept = sorted(name for name, width in widths.items() if form.group and width % form.group)
    if len(kept) == len(matrices):
        raise UserError(f"{key}: no layer's width is divisible by {form.group}; use a divisor of {widths[kept[0]]}")
    if kept:
        say(f"{key}: layers whose width is not divisible by {form.group} are not quantized ({len(kept)}): "
            + ", ".join(kept[:3]) + (", ..." if kept[3:] else ""))
    return {name: matrix for name, matrix in matrices.items() if name not in kept}


# ------------------------------------------------------------------------------------------------ bitsandbytes


def bitsandbytes():
    return MODEL.library("bitsandbytes", "quantization.method: nf4 and llm_int8 need")


class DequantizedNf4(nn.Module):
    """A parametrization that dequantizes nf4 weights at each use."""

    def __init__(self, state):
        super().__init__()
        self.state = state  # bitsandbytes' QuantState

    @torch.no_grad()
    def forward(self, packed: Tensor) -> Tensor:
        return bitsandbytes().functional.dequantize_4bit(packed, self.state)

    def _apply(self, function, recurse: bool = True):
        self.state.to(function(self.state.absmax).device)
        return super()._apply(function, recurse)


class Packer:
    """Quantizes the weights of a model on `meta` while they are read: packer(name, weight) -> whether the weight was quantized.

    nf4 (Dettmers 2023, section 3): each group of weights is divided by its largest and rounded to the nearest of 16 quantiles of
    a normal distribution; the scales are 8-bit numbers themselves. llm_int8 (Dettmers 2022): one scale per row; on CUDA the
    inputs are rounded too, except those above 6. Experts in llm_int8 are dequantized before their product."""

    def __init__(self, model: MODEL.LanguageModel, method: str, group_size: int = 0, device=None):
        self.model, self.method, self.device = model, method, torch.device(device or "cpu")
        self.bnb = bitsandbytes() if method in BITSANDBYTES else None
        self.group_size, self.matrices = group_size or 64, quantizable(model)
        if method != "nf4":
            self.form = form_of("int8" if method == "llm_int8" else method)
            self.matrices = divisible(self.matrices, self.form, "model.quantization")
        elif self.group_size not in (sizes := [2**i for i in range(5, 13)]):
            raise UserError(f"quantization.group_size: nf4 supports groups of {', '.join(map(str, sizes))}, not {group_size}")
        self.exact = {} if self.bnb else self.matrices  # rounded from the stored weights, without a conversion before

    def __call__(self, name: str, weight: Tensor) -> bool:
        if name not in self.matrices:
            return False
        module, part = self.matrices[name]
        parent, _, child = name.rpartition(".")[0].rpartition(".")
        weight = weight.to(self.device)
        if self.bnb and part == "weight":
            setattr(self.model.get_submodule(parent), child, self._linear(module, weight))
        elif self.method == "nf4":
            packed, state = self.bnb.functional.quantize_4bit(weight, blocksize=self.group_size, compress_statistics=True,
                                                              quant_type="nf4")
            replace_experts(module, part, packed, DequantizedNf4(state))
        else:
            replace_matrix(self.model, name, *nearest(weight, self.form), self.form)
        return True

    def _linear(self, plain: nn.Linear, weight: Tensor) -> nn.Module:
        nn4 = self.bnb.nn
        shape = (plain.in_features, plain.out_features, plain.bias is not None)
        if self.method == "nf4":
            layer = nn4.Linear4bit(*shape, quant_type="nf4", device="meta")
            packed = nn4.Params4bit(weight, False, quant_type="nf4", blocksize=self.group_size, module=layer)
        else:
            layer = nn4.Linear8bitLt(*shape, has_fp16_weights=False, threshold=6.0, device="meta")
            packed = nn4.Int8Params(weight.cpu(), False)  # quantized when it moves to the device
        layer.weight, layer.bias = packed.to(self.device), plain.bias
        return layer.train(plain.training)


def replace_experts(experts: MODEL.Experts, part: str, packed: Tensor, parametrization: nn.Module) -> None:
    """Replace stacked weights by packed ones. The backward pass dequantizes them again, so only one layer's exist at a time."""
    setattr(experts, part, nn.Parameter(packed, requires_grad=False))
    parametrize.register_parametrization(experts, part, parametrization, unsafe=True)
    if "forward" not in vars(experts):
        experts.forward = partial(checkpoint, experts.forward, use_reentrant=False)


def keep_form(model: MODEL.LanguageModel, method: str) -> MODEL.LanguageModel:
    """Set the attributes of a quantized model that MODEL, peft and bitsandbytes read."""
    model.quantization = method
    if method in BITSANDBYTES:
        setattr(model, "is_loaded_in_4bit" if method == "nf4" else "is_loaded_in_8bit", True)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On some processors eval mode would repack the weights with coarser scales, and training would keep these.
            module.support_avx512bf16_for_cpu = False
    return model


def hub_settings(method: str):
    """The `quantization_config` to load a model with transformers; None for methods that `quantize` applies afterwards."""
    from transformers import BitsAndBytesConfig

    if method not in BITSANDBYTES:
        return None
    bitsandbytes()
    if method == "llm_int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


# ----------------------------------------------------------------------------------------------------- folders


def hub_scheme(form: Form) -> tuple[dict, dict]:
    """compressed-tensors' schemes of weights and activations, {} for activations that are not rounded."""
    bits, kind = (8, "float") if form.bits == FP8 else (form.bits, "int")
    numbers = {"num_bits": bits, "type": kind, "symmetric": True}
    scales = {"strategy": "group", "group_size": form.group} if form.group else {"strategy": "channel"}
    return {**numbers, "dynamic": False, **scales}, {**numbers, "dynamic": True, "strategy": "token"} if form.dynamic else {}


def hub_config(model: MODEL.Transformer, kind: str) -> dict:
    """`quantization_config` of config.json, as compressed-tensors, transformers and vLLM read it.

    Runs in: INFER.py, transformers, vLLM"""
    form = next(module.form for module in model.modules() if isinstance(module, (QuantizedLinear, DequantizedExperts)))
    plain = [MODEL.hub_name(kind, f"{name}.weight").removesuffix(".weight") for name, module in model.named_modules()
             if isinstance(module, (nn.Linear, MODEL.Router)) and not isinstance(module, QuantizedLinear)]
    plain += [f"re:.*{re.escape(MODEL.hub_name(kind, name + '.').removesuffix('.'))}.*" for name, module in model.named_modules()
              if type(module) is MODEL.Experts]
    weights, activations = hub_scheme(form)
    return {"quant_method": "compressed-tensors", "format": f"{weights['type']}-quantized" if form.dynamic else "pack-quantized",
            "quantization_status": "compressed", "ignore": plain,
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations or None,
                                          "output_activations": None}}}


def check_folder(model: MODEL.LanguageModel) -> None:
    """Raise a UserError if the layout of compressed-tensors cannot represent a quantized model."""
    experts = [module for module in model.modules() if isinstance(module, MODEL.Experts) and parametrize.is_parametrized(module)]
    dynamic = any(isinstance(module, QuantizedLinear) and module.form.dynamic for module in model.modules())
    if model.quantization in BITSANDBYTES:
        reason = f"{model.quantization} weights; quantize while loading (--quantization)"
    elif isinstance(model, MODEL.ForeignModel) and any(".experts." in name for name, _ in model.named_parameters()):
        reason = f"the experts of {model.config.model_type}, which runs in transformers"
    elif experts and dynamic:
        reason = f"experts in {model.quantization}; use int8 or int4"
    elif any(len(module.parametrizations) == 1 for module in experts):
        reason = "experts with one width that the group size does not divide; set quantization.group_size to a divisor of both"
    else:
        return
    raise UserError(f"quantization.method: a folder cannot store {reason}")


def to_hub(model: MODEL.LanguageModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a quantized model, or of a part of it, under compressed-tensors' names."""
    check_folder(model)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear) and module.form.dynamic and f"{name}.weight_packed" in state:
            state[f"{name}.weight"] = module.levels  # bytes instead of packed integers
            del state[f"{name}.weight_packed"], state[f"{name}.weight_shape"]
        elif isinstance(module, DequantizedExperts) and f"{name}.scale" in state:
            owner, _, part = name.removesuffix(".0").partition(".parametrizations.")
            packed, scale = (state.pop(name.removesuffix("0") + end) for end in ("original", "0.scale"))
            state.update(expert_tensors(owner, part, packed, scale, module.width))
    return state


def expert_tensors(owner: str, part: str, packed: Tensor, scale: Tensor, width: int) -> Iterator[tuple[str, Tensor]]:
    """Quantized matrices of all experts (E, out, ...) -> the names and tensors of each expert's linear layers."""
    names = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[part]
    for number, both in enumerate(zip(packed, scale, strict=True)):
        for name, *parts in zip(names, *(tensor.chunk(len(names)) for tensor in both), strict=True):
            linear = f"{owner}.{number}.{name}"
            yield f"{linear}.weight_packed", parts[0]
            yield f"{linear}.weight_scale", parts[1]
            yield f"{linear}.weight_shape", torch.tensor([len(parts[0]), width])


def form_of_hub(folder: Path, quantization: dict) -> tuple[Form, list[str]]:
    """The form in config.json, and the layers that are not quantized."""
    groups = list((quantization.get("config_groups") or {}).values())
    weights, activations = (groups[0].get(key) or {} for key in ("weights", "input_activations")) if groups else ({}, {})
    group = weights.get("group_size") if weights.get("strategy") == "group" else 0
    form = Form(FP8 if weights.get("type") == "float" else weights.get("num_bits"), group, bool(activations))
    scheme = hub_scheme(form)
    if len(groups) != 1 or form.bits not in ((8, FP8) if form.dynamic else (4, 8, FP8)) or weights.get("actorder") or \
            not (scheme[0].items() <= weights.items() and scheme[1].items() <= activations.items()):
        raise UserError(f"{folder}/config.json: this compressed-tensors scheme is not supported; expected symmetric 4- or 8-bit "
                        "integers per group or row or fp8, with 8-bit activations only if weights have 8 bits")
    return form, quantization.get("ignore") or []


def adopt(model: MODEL.Transformer, folder: Path, quantization: dict) -> None:
    """Prepare a model on `meta` for the tensors of a quantized folder."""
    form, plain = form_of_hub(folder, quantization)

    def is_plain(name: str) -> bool:
        name = MODEL.hub_name(model.config.model_type, f"{name}.weight").removesuffix(".weight")
        return any(re.match(entry.removeprefix("re:"), name) if entry.startswith("re:") else name == entry for entry in plain)

    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and not is_plain(name):
            model.set_submodule(name, QuantizedLinear(module.out_features, module.in_features, module.bias, form, "meta"))
        elif type(module) is MODEL.Experts and not is_plain(f"{name}.0.down_proj"):
            for part in ("gate_up_proj", "down_proj"):
                count, height, width = getattr(module, part).shape
                stored = QuantizedLinear(count * height, width, None, form, "meta")
                parametrization = DequantizedExperts(stored.weight_scale.unflatten(0, (count, -1)), form, width)
                replace_experts(module, part, stored.weight_packed.unflatten(0, (count, -1)), parametrization)
    dynamic = form.dynamic or form.bits == FP8
    keep_form(model, next(name for name, known in FORMS.items() if (known.bits, known.dynamic) == (form.bits, dynamic)))


def from_hub(tensors: Iterator[tuple[Path, str, Tensor]]) -> Iterator[tuple[Path, str, Tensor]]:
    for path, name, tensor in tensors:
        if tensor.dtype in (torch.int8, torch.float8_e4m3fn):
            yield path, f"{name}_packed", pack(tensor, 8 if tensor.dtype == torch.int8 else FP8)
            yield path, f"{name}_shape", torch.tensor(tensor.shape)
        else:
            yield path, name, tensor


# -------------------------------------------------------------------------------------------------------- GGUF

# llama.cpp's architecture for each family
GGUF_ARCHITECTURES = {"gpt2": "gpt2", "llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2",
                      "qwen3": "qwen3", "qwen3_moe": "qwen3moe", "deepseek_v3": "deepseek2"}
K_QUANTS = ("Q6_K", "Q5_K_M", "Q4_K_M")  # encoded by llama.cpp


def optional(package: str, target: str):
    """Import an optional package that `--to target` needs."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"--to {target}: needs {package.partition('.')[0]}; pip install -r requirements-extras.txt") from None


def import_gguf():
    optional("gguf.quants", "gguf")
    return optional("gguf", "gguf")


def export_gguf(model: MODEL.LanguageModel, tokenizer, target: Path, section: QuantizationSection) -> None:
    """Write the folder `target`: model.gguf and Ollama's Modelfile. A UserError names what llama.cpp does not support.

    Runs in: llama.cpp, Ollama, LM Studio"""
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
    """llama.cpp's name for the architecture of a model. A UserError names the first setting that it does not support."""
    config = model.config
    check_exportable(model)
    kind = MODEL.config_to_hub(config)["model_type"]
    if kind not in GGUF_ARCHITECTURES:
        raise UserError("--to gguf: no architecture of llama.cpp has this combination of `model` settings; use --to onnx")
    scaling, latent = config.rope_scaling or {}, bool(config.kv_lora_rank)
    rope = scaling.get("rope_type", "default")
    # llama.cpp's YaRN has the default ramp, and scales the scores of latent attention in only one of the two known ways.
    other_yarn = rope == "yarn" and (
        scaling.get("beta_fast") not in (None, 32) or scaling.get("beta_slow") not in (None, 1)
        or scaling.get("truncate") is False
        or latent and (not scaling.get("mscale_all_dim") or MODEL.rope_frequencies(config)[1] != 1))
    unsupported = {
        "hidden_act": config.hidden_act not in (("gelu_new", "gelu_pytorch_tanh") if kind == "gpt2" else ("silu",)),
        "attention_out_bias": config.attention_out_bias and kind not in ("gpt2", "llama"),
        "norm_topk_prob": kind == "qwen3_moe" and not config.norm_topk_prob,
        "mlp_only_layers": kind == "qwen3_moe" and config.mlp_only_layers,
        "num_hidden_layers": config.q_lora_rank and config.num_hidden_layers in (26, 27),  # treated as DeepSeek-V2-Lite
        "n_shared_experts": latent and not config.n_shared_experts,
        "rope_interleave": latent and not config.rope_interleave,
        "rms_norm_eps": latent and config.rms_norm_eps != 1e-6,  # as in the norms of the latents
        "rope_scaling": other_yarn or rope == "llama3" and GGUF_ARCHITECTURES[kind] != "llama",
    }
    for name in (name for name, condition in unsupported.items() if condition):
        raise UserError(f"model.{name}: llama.cpp does not support {getattr(config, name)} for {kind}; use --to onnx")
    return GGUF_ARCHITECTURES[kind]


def gguf_values(config: MODEL.ModelConfig) -> dict:
    """The hyperparameters as {method of GGUFWriter without "add_": value}."""
    gguf = import_gguf()
    windows = [config.window(i) for i in range(config.num_hidden_layers)]
    context = min([config.max_position_embeddings, *filter(None, windows)])
    if context < config.max_position_embeddings:  # up to this length, full attention is the same
        say(f"llama.cpp has no sliding window for this architecture: the context is limited to the window of {context} tokens")
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
    if rank := config.kv_lora_rank:  # one head of latents, which are keys and values of all query heads
        nope, rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        values |= {"head_count_kv": 1, "rope_dimension_count": rope, "key_length": rank + rope, "value_length": rank,
                   "key_length_mla": nope + rope, "value_length_mla": config.v_head_dim, "kv_lora_rank": rank,
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
            values["rope_scaling_yarn_log_mul"] = scaling["mscale_all_dim"] / 10  # llama.cpp's convention
        else:  # llama.cpp multiplies by the default factor
            values["rope_scaling_attn_factors"] = MODEL.rope_frequencies(config)[1] / (0.1 * math.log(factor) + 1)
    return values


def adjacent_pairs(rows: Tensor, name: str, config: MODEL.ModelConfig, architecture: str) -> Tensor:
    """Order the rows of a projection `name` for llama.cpp, where Llama rotates adjacent channels, others channels half a head
    apart."""
    heads = config.num_attention_heads * (".q_proj" in name) or config.num_key_value_heads * (".k_proj" in name)
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2) if heads and architecture == "llama" else rows


def gguf_tensors(model: MODEL.LanguageModel, architecture: str) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of a GGUF file, in the same order in each call."""
    gguf, config = import_gguf(), model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    if (config.rope_scaling or {}).get("rope_type") == "llama3":
        plain, _ = MODEL.rope_frequencies(dataclasses.replace(config, rope_scaling=None))
        yield "rope_freqs.weight", plain / MODEL.rope_frequencies(config)[0]
    for name, tensor in model.state_dict().items():
        if name == model.tied_name and config.tie_word_embeddings:
            continue
        stem, _, part = name.rpartition(".")
        tensors = {name: adjacent_pairs(tensor, name, config, architecture)}
        if part == "gate_up_proj":  # (E, 2I, C)
            tensors = dict(zip((f"{stem}.gate_proj.weight", f"{stem}.up_proj.weight"), tensor.chunk(2, 1), strict=True))
        elif part in ("down_proj", "e_score_correction_bias"):
            tensors = {f"{stem}.{part.removesuffix('_bias')}.{'bias' if part[0] == 'e' else 'weight'}": tensor}
        elif stem.endswith(".kv_b_proj"):
            sizes = [config.qk_nope_head_dim, config.v_head_dim]
            keys, values = tensor.unflatten(0, (config.num_attention_heads, -1)).split(sizes, 1)
            tensors = {name.replace(".kv_b_", ".k_b_"): keys.transpose(1, 2),  # (H, R, Dc)
                       name.replace(".kv_b_", ".v_b_"): values}  # (H, Dv, R)
        for name, tensor in tensors.items():
            yield names.get_name(name, (".weight", ".bias")), tensor


def write_tensors(writer, tensors: Callable[[], Iterator[tuple[str, Tensor]]], kind: str) -> None:
    """Encode and write tensors one by one. As in llama.cpp's converter, norms, routers and positions stay float32, and tensors
    whose rows are not divisible into blocks become float16. The output head has 8 bits if the others have fewer."""
    gguf = import_gguf()
    default, types, narrow = gguf.GGMLQuantizationType[kind], {}, []
    head = "output.weight" if any(name == "output.weight" for name, _ in tensors()) else "token_embd.weight"
    block, _ = gguf.GGML_QUANT_SIZES[default]
    for name, tensor in tensors():
        types[name] = default
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
        say(f"tensors whose row length is not divisible by {block} are stored in F16 ({len(narrow)}): {', '.join(narrow[:4])}"
            f"{', ...' if len(narrow) > 4 else ''}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors():
        numbers = tensor.detach().float().contiguous().cpu().numpy()
        writer.write_tensor_data(gguf.quants.quantize(numbers, types[name]).view(np.uint8))
    writer.close()


def pack_gguf(source: Path, target: Path, kind: str) -> None:
    """Quantize an F16 file with llama.cpp."""
    try:
        import llama_cpp
    except ImportError:
        program = shutil.which("llama-quantize")
        if not program:
            raise UserError(f"quantization.gguf_type: {kind} needs llama.cpp's quantizer; pip install llama-cpp-python, put "
                            "llama-quantize on PATH, or use Q8_0, Q5_1 or Q4_1") from None
        return run_program([program, source, target, kind], f"quantization.gguf_type {kind}")
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if llama_cpp.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(settings)):
        raise UserError(f"quantization.gguf_type: llama.cpp could not quantize to {kind} (see above); use Q8_0")


def run_program(command: list, key: str, folder: Path | None = None) -> None:
    """Run another program in a folder. If it fails, raise a UserError with the last line of its output."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
        raise UserError(f"{key}: {Path(command[0]).name} failed: {lines[-1][:300]}")


# llama.cpp's name of a pre-tokenizer -> the patterns that it applies in turn to split a text (its src/llama-vocab.cpp)
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
    """llama.cpp's name for the pre-tokenizer of a byte-level tokenizer, found by splitting a probe text."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    probe = normalizers.NFC().normalize_str(PROBE)
    normal = raw.normalizer.normalize_str(probe) if raw.normalizer else probe
    splits = raw.pre_tokenizer.pre_tokenize_str(normal) if raw.pre_tokenizer else None
    for name, patterns in PRE_TOKENIZERS.items():
        steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        if splits == pre_tokenizers.Sequence(steps).pre_tokenize_str(probe):
            return "dbrx" if name == "llama-bpe" and not ignores_merges else name
    raise UserError(f"--to gguf: llama.cpp does not have this tokenizer's pre-tokenizer; it has {', '.join(PRE_TOKENIZERS)}")


def gguf_tokenizer(tokenizer, config: MODEL.ModelConfig) -> dict:
    """The tokenizer as {method of GGUFWriter without "add_": value}. llama.cpp has byte-level BPE and SentencePiece's BPE. The
    tokens of a character tokenizer become byte-level tokens, each merged from the bytes of its character."""
    from tokenizers import pre_tokenizers

    kinds, raw = import_gguf().TokenType, tokenizer.backend_tokenizer
    model, added = json.loads(raw.to_str())["model"], tokenizer.added_tokens_decoder
    tokens = {i: token for token, i in tokenizer.get_vocab().items()}
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model.get("merges", ())]
    values = {"tokenizer_model": "gpt2", "tokenizer_pre": "gpt-2"}
    if model["type"] == "BPE" and model["byte_fallback"]:
        probe = "".join(tokenizer.convert_ids_to_tokens(tokenizer("a a  a", add_special_tokens=False).input_ids))
        if probe.removeprefix("\u2581") != "a\u2581a\u2581\u2581a":
            raise UserError("--to gguf: llama.cpp does not have this tokenizer's normalizer")
        ranks = {merge.replace(" ", ""): -float(rank) for rank, merge in reversed([*enumerate(merges)])}
        values = {"tokenizer_model": "llama", "tokenizer_pre": "default", "add_space_prefix": probe[0] == "\u2581",
                  "token_scores": [ranks.get(tokens.get(i), -float(len(merges))) for i in range(config.vocab_size)]}
    elif model["type"] == "WordLevel" and all(len(token) == 1 for i, token in tokens.items() if i not in added):
        say(f"llama.cpp drops characters that are not in the vocabulary instead of encoding them as {tokenizer.unk_token}")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokens |= {i: byte_level.pre_tokenize_str(token)[0][0] for i, token in tokens.items() if i not in added}
        plain = [token for i, token in tokens.items() if i not in added]
        merges = [*dict.fromkeys(f"{token[:k]} {token[k]}" for token in plain for k in range(1, len(token)))]
    elif model["type"] != "BPE":
        raise UserError(f"--to gguf: the tokenizer is a {model['type']}; llama.cpp has only byte-level and SentencePiece BPE")
    elif merges or not {*pre_tokenizers.ByteLevel.alphabet()} <= {*tokens.values()}:
        values["tokenizer_pre"] = pre_tokenizer_name(raw, model["ignore_merges"])
    if values["tokenizer_model"] == "gpt2":
        values["token_merges"] = merges or ["\u2581 \u2581"]  # the list must not be empty; never applied

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
        raise UserError("--to gguf: the tokenizer adds several tokens before or after a text; llama.cpp adds at most one")
    stops = config.eos_ids or [TOKENIZER.end_id(tokenizer)]
    stops = sorted(stops, key=lambda i: i != tokenizer.eos_token_id)  # end of text, then ends of turns
    return {"bos_token_id": ids[0] if begins else TOKENIZER.begin_id(tokenizer), "add_bos_token": begins, "add_eos_token": ends,
            **dict(zip(("eos_token_id", "eot_token_id", "eom_token_id"), stops, strict=False)),
            **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "unk", "mask")}}


def modelfile(tokenizer, config: MODEL.ModelConfig, values: dict) -> str:
    """Ollama's Modelfile for a GGUF file."""
    template = ollama_template(tokenizer, values["add_bos_token"]) if tokenizer.chat_template else None
    stops = tokenizer.convert_ids_to_tokens(config.eos_ids)
    context = min(values["context_length"], 8192)  # Ollama reserves memory for the whole context
    return "\n".join(["FROM ./model.gguf", *([f'TEMPLATE """{template}"""'] if template else ()),
                      *(f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops),
                      f"PARAMETER temperature {INFER.InferenceSection().temperature}", f"PARAMETER num_ctx {context}\n"])


def ollama_template(tokenizer, begins: bool) -> str | None:
    """The chat template in Go's template language, without tools, if each turn is its content in a fixed frame (as in ChatML).
    Otherwise None: Ollama then uses the template in the GGUF file."""
    opening = tokenizer.bos_token or ""

    def rendered(*roles: str, prompt: bool = False) -> str:
        return TOKENIZER.render(tokenizer, [{"role": role, "content": f"zq{i}z"} for i, role in enumerate(roles)], None, prompt)

    try:
        user = rendered("user").removeprefix(opening)
        prompt = rendered("user", prompt=True).removeprefix(opening + user)
        system = rendered("system", "user").removeprefix(opening).removesuffix(user.replace("zq0z", "zq1z"))
        reply = rendered("user", "assistant").removeprefix(opening + user).replace("zq1z", "zq0z")
        roles = ("system", "user", "assistant", "user", "assistant", "user")
        whole = rendered(*roles, prompt=True)
    except UserError:  # the template may reject a system turn
        return None
    frames = {"system": system, "user": user, "assistant": reply}
    joined = "".join(frames[role].replace("zq0z", f"zq{i}z") for i, role in enumerate(roles)) + prompt
    if whole.removeprefix(opening) != joined or '"""' in joined or "{{" in joined:
        return None
    cases = [f'if eq .Role "{role}" }}}}{frame.replace("zq0z", "{{ .Content }}")}' for role, frame in frames.items()]
    first = opening if whole.startswith(opening) and not begins else ""
    return first + "{{ range .Messages }}{{ " + "{{ else ".join(cases) + "{{ end }}{{ end }}" + prompt


def export_gguf_adapter(model: MODEL.LanguageModel, tokenizer, target: Path, section: QuantizationSection) -> None:
    """Write the folder `target` with adapter.gguf, the unmerged LoRA of a model in float32 (llama-server --lora FILE).

    Runs in: llama.cpp"""
    if not model.adapter:
        raise UserError("--to gguf-lora: the model has no adapter; set --model to the folder of an adapter")
    gguf, architecture = import_gguf(), gguf_architecture(model)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], model.config.num_hidden_layers)
    tensors, alpha, latent = {}, float(model.adapter.lora_alpha), model.config.kv_lora_rank
    for name, tensor in model.state_dict().items():
        if not MODEL.tensor_is_trained(name):
            continue
        module, _, part = name.rpartition(".lora_")
        ignored = ".experts" in module or module == "lm_head" and (latent or model.config.tie_word_embeddings)
        ignored = ignored or latent and re.search(r"\.(q|q_a|q_b|kv_a|kv_b)_proj", module)
        if ignored or part not in ("A.default.weight", "B.default.weight"):
            raise UserError(f"--adapter: {name} has no effect in llama.cpp, which supports plain LoRA on linear layers; merge it")
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


# --------------------------------------------------- ONNX, OpenVINO, torch.export, AOTInductor, TorchScript, TensorRT


def check_exportable(model: MODEL.LanguageModel, foreign: bool = False) -> None:
    reason = "is an encoder" if not model.config.causal else "has no language-model head" if "lm" not in model.heads else \
        "is not an architecture of MODEL.py" if isinstance(model, MODEL.ForeignModel) and not foreign else ""
    if reason:
        raise UserError(f"model.name: this {model.config.model_type} {reason}; this export needs a causal language model")


class GivenStates:
    """A KV cache whose states are inputs and outputs of the forward pass, with the `attend` of `MODEL.CacheStep`.

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
    """`MODEL.attend_sdpa` without conditions on lengths, which tracing would turn into constants."""
    bias, grouped = None if mask is None else mask.bias, bool(query.shape[1] != key.shape[1])
    return F.scaled_dot_product_attention(query, key, value, bias, is_causal=mask is None, enable_gqa=grouped)


class SplitExperts(nn.Module):
    """`MODEL.Experts` with one product per expert: exporters lack grouped products, and quantizers lack stacked weights."""

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
                module.attend, module.expand_from = attend_fused, 0  # expanded latents work for all lengths
        self.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, *past: Tensor):
        positions = torch.arange(input_ids.shape[1])[None] if position_ids is None else position_ids
        cache = GivenStates(positions, attention_mask, past)
        logits = self.model(input_ids, cache=cache).logits
        return (logits, *cache.present) if past else logits


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the warnings and log lines of exporters, which are about their internals."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


# transformers.js's names of types and files
ONNX_FILES = {"none": ("fp32", "model.onnx"), "int8": ("q8", "model_quantized.onnx"), "int4": ("q4", "model_q4.onnx")}
ONNX_SINGLE = 2**30  # maximum bytes in an ONNX file; larger weights go into a second file, as protobuf's limit is 2 GiB


def onnx_graph(model: MODEL.Transformer, untied: bool):
    """An onnx.ModelProto with the inputs and outputs that onnxruntime-genai, transformers.js and optimum share:
    input_ids, attention_mask, position_ids, past_key_values.N.key/value -> logits, present.N.key/value.

    Keys and values are (B, H_kv, P, D); of latent attention (MLA) the key is the latent (B, 1, P, R), the value the rotary key
    (B, 1, P, Dr). `untied` copies an output head that shares the embedding, so that it can be quantized. Operator set 23 has an
    attention operator."""
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

        quantizer = MatMulNBitsQuantizer(graph, block_size=section.group_size or 32, is_symmetric=True, accuracy_level=4)
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
    say(f"{path.name}: {size / 1e6:,.1f} MB; logits in onnxruntime differ by {difference:.1e} standard deviations")
    if exact and not difference < 1e-3:
        raise RuntimeError(f"{path.name}: the logits in onnxruntime differ from the model's")


def export_onnx(model, tokenizer, target: Path, section: QuantizationSection) -> None:
    """Write a folder for transformers.js and onnxruntime-genai: onnx/model*.onnx, config.json, tokenizer, genai_config.json.

    Runs in: transformers.js, onnxruntime, onnxruntime-genai"""
    dtype, name = ONNX_FILES[section.method]
    for package in ("onnx", "onnxscript", "onnxruntime"):
        optional(package, "onnx")
    config, path = model.config, target / "onnx" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    model.float()  # onnxruntime has no bfloat16 on CPUs
    with quiet():
        large = write_onnx(onnx_graph(model, section.method != "none"), path, section)
    check_onnx(path, model, section.method == "none")
    TOKENIZER.save(tokenizer, target, model.config.max_position_embeddings)
    raw = MODEL.config_to_hub(config)
    special = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if raw.get(key) is not None}
    browser = {"dtype": dtype, "use_external_data_format": {name: int(large)}}
    files = {"config.json": {**raw, "transformers.js_config": browser}, "generation_config.json": special}
    if not config.kv_lora_rank:  # onnxruntime-genai requires equal widths of keys and values
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
    """Write the folder of `export_onnx`, build_engine.sh, which builds model.engine, and model.engine if trtexec is on PATH.

    Runs in: TensorRT"""
    export_onnx(model, tokenizer, target, section)
    import onnx

    half = model.config.max_position_embeddings // 2  # maximum new tokens per step, and maximum tokens before them
    lengths = {"batch_size": (1, 1, 1), "sequence_length": (1, 1, half), "past_sequence_length": (0, half, half),
               "total_sequence_length": (1, half + 1, 2 * half)}  # minimum, optimum, maximum
    inputs = onnx.load(target / "onnx/model.onnx", load_external_data=False).graph.input
    command = ["trtexec", "--onnx=onnx/model.onnx", "--saveEngine=model.engine"]
    for i, flag in enumerate(("minShapes", "optShapes", "maxShapes")):
        shapes = [[lengths[dim.dim_param][i] if dim.dim_param else dim.dim_value for dim in tensor.type.tensor_type.shape.dim]
                  for tensor in inputs]
        named = (f"{tensor.name}:{'x'.join(map(str, shape))}" for tensor, shape in zip(inputs, shapes))
        command.append(f"--{flag}={','.join(named)}")
    (target / "build_engine.sh").write_text(f"cd \"$(dirname \"$0\")\" && {shlex.join(command)}\n")
    if shutil.which("trtexec") is None:
        return say("trtexec is not on PATH; run build_engine.sh in the folder on a machine with TensorRT")
    run_program(command, "--to tensorrt", target)


OPENVINO_FORMATS = {"none": "fp16", "int8": "int8", "int4": "int4"}


def export_openvino(model, tokenizer, target: Path, section: QuantizationSection) -> None:
    """Write a folder for openvino-genai with the exporter of optimum-intel, which reads Hugging Face folders.

    Runs in: openvino-genai"""
    check_exportable(model, foreign=True)
    groups = ["--sym", "--ratio", "1.0", "--group-size", str(section.group_size or 32), "--group-size-fallback", "adjust"]
    command = shutil.which("optimum-cli", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))
    if command is None:
        raise UserError("--to openvino: optimum-cli is not on PATH; pip install optimum-intel openvino openvino-tokenizers nncf")
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        MODEL.save(model, folder)
        TOKENIZER.save(tokenizer, folder, model.config.max_position_embeddings)
        run_program([command, "export", "openvino", "--model", folder, "--task", "text-generation-with-past", "--weight-format",
                     OPENVINO_FORMATS[section.method], *(groups if section.method == "int4" else ()), target], "--to openvino")


def traced_program(model) -> torch.export.ExportedProgram:
    """Trace ids (1, T) -> logits (1, T, V) with torch.export."""
    length = torch.export.Dim("T", max=model.config.max_position_embeddings)
    with quiet():
        return torch.export.export(Exportable(model), (torch.ones(1, 8, dtype=torch.long),), dynamic_shapes=({1: length},))


def buffered(target: Path, write: Callable) -> None:
    """Call write(file) on a buffer in memory and write that: on a full disk, torch's writers end the process."""
    file = io.BytesIO()
    write(file)
    target.write_bytes(file.getbuffer())


def export_pt2(model, tokenizer, target: Path, section: QuantizationSection) -> None:
    """Write a .pt2 file: torch.export.load(FILE).module()(ids (1, T)) -> logits (1, T, V) with torch as the only import.

    Runs in: torch"""
    buffered(target, partial(torch.export.save, traced_program(model)))


def export_compiled(model, tokenizer, target: Path, section: QuantizationSection) -> None:
    """Write a .pt2 package, compiled by AOTInductor for this machine: torch._inductor.aoti_load_package(FILE)(ids (1, T)).

    Runs in: torch"""
    program = traced_program(model)
    with quiet():
        buffered(target, lambda file: torch._inductor.aoti_compile_and_package(program, package_path=file))


def export_torchscript(model, tokenizer, target: Path, section: QuantizationSection) -> None:
    """Write a TorchScript file: torch.jit.load(FILE)(ids (1, T)) -> logits (1, T, V).

    Runs in: torch"""
    say("TorchScript is deprecated in torch; use --to torch-export instead")
    with quiet():
        program = torch.jit.trace(Exportable(model), torch.ones(1, 8, dtype=torch.long), check_trace=False)
        buffered(target, partial(torch.jit.save, program))


# ------------------------------------------------------------------------------------- comparison, command line

SECTIONS = {**INFER.SECTIONS, "quantization": QuantizationSection}
EXPORTS = {"gguf": export_gguf, "gguf-lora": export_gguf_adapter, "onnx": export_onnx, "openvino": export_openvino,
           "torch-export": export_pt2, "aotinductor": export_compiled, "torchscript": export_torchscript,
           "tensorrt": export_tensorrt}
ONE_FILE = ("torch-export", "aotinductor", "torchscript")
ACTIONS = {"out": Action("output folder (for torch-export, aotinductor and torchscript, output file)", str),
           "compare": Action("measure all methods; writes compare.png to --out or to the model's folder"),
           "to": Action(f"export to {', '.join(EXPORTS)}", str)}
COMPARED = ("bf16", "int8", "int8_dynamic", "smoothquant", "int4", "gptq", "awq", "fp8", "nf4", "llm_int8")
COLUMNS = {"size, MB": ",.2f", "perplexity": ".3f", "correct": ".1%", "KL, nats": ".4f", "answered": ".1%",
           "prefill, tokens/s": ",.0f", "decode, tokens/s": ",.0f"}  # of the table, and their formats


class Comparison:
    """Measures of a model and its quantized versions on the same held-out texts and questions. Add the original first."""

    def __init__(self, config, model: MODEL.LanguageModel, tokenizer, layerwise: torch.dtype | None = None):
        self.layerwise = layerwise  # compute a large model in this type, layer by layer, and free each layer afterwards
        self.rows: dict[str, dict[str, float]] = {}  # {name: {column: value}}
        self.original: Tensor | None = None  # log-probabilities (N, V)
        self.dtype = model.dtype
        self.context, self.texts = model.config.max_position_embeddings, []
        tokens = min(8192, (2**26 if layerwise else 2**28) // model.config.vocab_size)  # at most a GB of log-probabilities
        chunks = sample_ids(config.data, tokenizer, "val", min(self.context, 1024) + 1)
        while sum(map(len, self.texts)) < tokens and (chunk := next(chunks, None)):
            self.texts.append(chunk)
        if not self.texts:
            raise UserError(f"data.validation: '{config.data.validation}' holds out no text, but perplexity is measured on "
                            "held-out text; use hash, tail or a file")
        self.answered = exact_answers(config, tokenizer)

    def add(self, name: str, model: MODEL.LanguageModel) -> None:
        """Measure a model, which cannot be used afterwards."""
        say(f"{name}: measuring on {sum(map(len, self.texts)):,} held-out tokens")
        row = {"size, MB": INFER.weight_bytes(model) / 1e6}
        if self.layerwise:
            self.rows[name] = row | self.scores(self.layerwise_logits(model))
            return
        row |= self.quality(lambda ids: model(torch.tensor([ids], device=model.device)).logits[0])
        model = INFER.configure_for_hardware(model, quiet=True)
        answered = {"answered": self.answered(model)} if self.answered else {}
        self.rows[name] = row | answered | self.speed(partial(token_times, model))

    @torch.no_grad()
    def quality(self, logits_of: Callable[[list[int]], Tensor]) -> dict[str, float]:
        """The columns that depend only on logits_of(ids) -> (T, V)."""
        return self.scores(logits_of(ids[:-1]) for ids in self.texts)

    @torch.no_grad()
    def layerwise_logits(self, model: MODEL.LanguageModel) -> Iterator[Tensor]:
        """Yield the logits of each text, computed with one layer in memory at a time."""
        inputs = [ids[:-1] for ids in self.texts]
        in_layers = {id(weight) for layer in MODEL.layers_of(model) for weight in layer.parameters()}
        convert((weight for weight in model.parameters() if id(weight) not in in_layers), self.layerwise)
        states = layer_by_layer(model, inputs, lambda layer, observe: convert(layer.parameters(), self.layerwise),
                                lambda layer: layer.to("meta"))
        yield from (model.head_logits(model.model.norm(hidden))[0] for hidden in states)

    @torch.no_grad()
    def scores(self, logits: Iterable[Tensor]) -> dict[str, float]:
        """Perplexity, the fraction of tokens that were the most probable, and the KL divergence per token from the original."""
        logs = torch.cat([part.float().log_softmax(-1).cpu() for part in logits])  # (N, V)
        targets = torch.tensor([token for ids in self.texts for token in ids[1:]])  # (N,)
        self.original = logs if self.original is None else self.original
        return {"perplexity": float(F.nll_loss(logs, targets).exp()),
                "correct": float((logs.argmax(-1) == targets).float().mean()),
                "KL, nats": float(F.kl_div(logs, self.original, reduction="batchmean", log_target=True).clamp(min=0))}

    def speed(self, times: Callable[[list[int], int], list[float]]) -> dict[str, float]:
        """Tokens/s of prefilling 256 tokens and of generating 64 (fewer in a short context), the best of three runs.
        times(prompt, count) -> seconds from the start to each new token."""
        prompt, count = [5] * min(256, self.context // 2), min(64, self.context // 4)
        runs = [times(prompt, count) for _ in range(3)]
        return {"prefill, tokens/s": max(len(prompt) / run[0] for run in runs),
                "decode, tokens/s": max((count - 1) / (run[-1] - run[0]) for run in runs)}

    def table(self) -> str:
        width = max(map(len, self.rows))
        lines = [f"| {'method':{width}} | " + " | ".join(COLUMNS) + " |",
                 f"|{'-' * (width + 2)}|" + "".join(f"{'-' * (len(title) + 1)}:|" for title in COLUMNS)]
        for name, row in self.rows.items():
            cells = (format(row[title], form) if title in row else "-" for title, form in COLUMNS.items())
            lines.append(f"| {name:{width}} |" + "".join(f" {cell:>{len(title)}} |" for cell, title in zip(cells, COLUMNS)))
        return "\n".join(lines)

    def plot(self, path: Path) -> None:
        """Plot perplexity and speed against size. Names are next to each panel, in the vertical order of their points."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return say("no plot: matplotlib is not installed; pip install matplotlib")
        figure = Figure(figsize=(15, 5), layout="constrained")
        runtimes = dict.fromkeys(name.rpartition(" ")[0] for name in self.rows)  # such as llama.cpp; "" for methods
        colors = dict(zip(runtimes, itertools.cycle(("#1f5fa8", "#d1495b", "#2a9d5c", "#e09f3e", "#7b5ea7"))))
        for axes, title in zip(figure.subplots(1, 3), ("perplexity", "decode, tokens/s", "prefill, tokens/s"), strict=True):
            points = sorted((row[title], row["size, MB"], name) for name, row in self.rows.items() if title in row)
            for height, (value, size, name) in zip(np.linspace(0, 1, len(points)), points, strict=True):
                color = colors[name.rpartition(" ")[0]]
                axes.plot(size, value, "o", color=color, markersize=5)
                line = {"arrowstyle": "-", "color": color, "alpha": 0.4, "relpos": (0, 0.5), "shrinkA": 0}
                axes.annotate(name, (size, value), (1.05, height), textcoords="axes fraction", va="center", color=color,
                              arrowprops=line)
            axes.set(xlabel="size, MB", title=title, yscale="log" if points[-1][0] > 10 * points[0][0] else "linear")
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        with MODEL.staged(path.parent) as scratch:
            figure.savefig(scratch / path.name, dpi=120)
        say(f"plot: {path}")


def sample_ids(data: TOKENIZER.DataSection, tokenizer, part: str, length: int) -> Iterator[list[int]]:
    """Yield token ids of random texts of a part ("train" or "val") in chunks of at most `length` tokens."""
    texts = list(TOKENIZER.sample_texts(data, part=part))
    random.Random(0).shuffle(texts)
    for text in texts:
        ids = INFER.score_prompt(tokenizer, text)
        yield from (ids[start : start + length] for start in range(0, len(ids) - 1, length))


def exact_answers(config, tokenizer) -> Callable[[MODEL.LanguageModel], float] | None:
    """A function of a model that returns its exact match on 200 questions; None if there are no questions."""
    name, bundled = config.quantization.questions, "data/chat_test.jsonl"
    if name == "auto":
        name = bundled if config.data.train == TOKENIZER.DataSection().train and Path(bundled).exists() else None
    if name is None:
        return None
    import SFT

    questions = SFT.read_questions(name, 200, "quantization.questions")
    greedy = INFER.Sampling(64, 0, stop=None if tokenizer.chat_template else ["\n"])
    return SFT.exact_match(questions, tokenizer, greedy)


def token_times(model: MODEL.LanguageModel, prompt: list[int], count: int) -> list[float]:
    """Seconds from the start of generation to each of `count` tokens."""
    [rows] = INFER._make_rows(model, [prompt], [INFER.Sampling(count, 0, ignore_eos=True)], None, 0)
    start = time.perf_counter()
    return [time.perf_counter() - start for _ in INFER._steps(model, rows, True, 1)]


def check_request(config) -> None:
    section, actions = config.quantization, config.actions
    if actions.to and not config.origins.get("quantization.method", "").startswith("command line"):
        section.method = "none"  # the default is a method for folders
    if not config.model.name:
        raise UserError("model.preset: an untrained model cannot be quantized or exported; set --model to a trained model")
    if config.model.quantization != "none":
        raise UserError("model.quantization: has no effect in QUANT.py; use --method")
    grouping = ("nf4", *(method for method, form in FORMS.items() if form.group))
    if section.group_size and section.method not in grouping and not actions.compare:
        raise UserError(f"quantization.group_size: {section.method} has no groups; leave it out, or use {', '.join(grouping)}")
    if actions.to != "gguf" and config.origins.get("quantization.gguf_type", "").startswith("command line"):
        raise UserError("quantization.gguf_type: has no effect without --to gguf; leave it out")
    if actions.to and (actions.to not in EXPORTS or not actions.out or actions.compare):
        raise UserError("--to: requires --out and excludes --compare" if actions.to in EXPORTS else
                        f"--to: '{actions.to}' is not one of {', '.join(EXPORTS)}")
    if section.method == "none" and not actions.to and not actions.compare:
        raise UserError("quantization.method: none requires --to or --compare; set a method")
    if (section.exclude or section.lm_head) and (actions.to or section.method in ("none", *MODEL.AUTOCAST)):
        raise UserError("quantization.exclude and quantization.lm_head: have no effect on exports, fp16 and bf16; leave them out")
    for pattern in section.exclude:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"quantization.exclude: '{pattern}' is not a regular expression ({error})") from None
    if actions.compare and actions.out and is_file_name(Path(actions.out)):
        raise UserError(f"--out: --compare writes compare.png into a folder, not into a file such as '{actions.out}'")
    if actions.out and not actions.to and not actions.compare:
        check_out(Path(actions.out), section.method)


def is_file_name(out: Path) -> bool:
    """Whether a path is the name of a file and not of a folder: model.gguf, but not Qwen2.5-gguf."""
    return out.is_file() or out.suffix[1:2].isalpha() and not out.is_dir()


def check_out(out: Path, method: str) -> None:
    """Raise a UserError if a quantized model cannot be written to `out`, or would overwrite a model."""
    if method in BITSANDBYTES:
        raise UserError(f"--out: a folder cannot store {method} weights; quantize while loading (--quantization)")
    if out.is_file():
        raise UserError(f"--out: {out} is a file; use a folder")
    model = (out / "config.json").exists() and not MODEL.read_json(out / "config.json").get("quantization_config")
    if model or (out / "adapter_config.json").exists():
        raise UserError(f"--out: {out} contains a model that is not quantized and would be overwritten; use another folder")


@contextlib.contextmanager
def full_disk_error(out: Path) -> Iterator[None]:
    """If the disk is full while `out` is written, raise a UserError."""
    try:
        yield
    except Exception as error:
        if not MODEL.is_disk_full(error, next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())):
            raise
        raise UserError(f"--out: {out}: the disk is full; free some space") from None


def load_original(config, merge: bool = True, dtype: torch.dtype | str | None = None) -> tuple[MODEL.LanguageModel, object]:
    """Load the model and its tokenizer; `dtype` overrides model.dtype."""
    section = copy.copy(config.model)
    section.dtype = dtype or section.dtype
    model, tokenizer = TOKENIZER.open_model(section, TOKENIZER.of_run(config), head="lm")
    if not model.config.causal:
        raise UserError(f"model.name: {config.model.name} is an encoder; use a causal language model")
    if model.adapter and merge:
        MODEL.merge_adapter(model)
    return model, tokenizer


def export(model, tokenizer, form: str, out: str | Path, section: QuantizationSection | None = None) -> None:
    """Write a model in another program's format (`EXPORTS`). Files get their final names when all are complete."""
    out, one_file, section = Path(out), form in ONE_FILE, section or QuantizationSection("none")
    if one_file and out.is_dir() or not one_file and is_file_name(out):
        raise UserError(f"--out: {out} is the name of a {'folder' if one_file else 'file'}, but --to {form} writes a "
                        f"{'file' if one_file else 'folder'}")
    methods = {"onnx": ONNX_FILES, "openvino": OPENVINO_FORMATS}.get(form, ("none",))
    if section.method not in methods:
        raise UserError(f"quantization.method: --to {form} supports {', '.join(methods)}, not {section.method}"
                        + ("; see quantization.gguf_type" if form == "gguf" else ""))
    if form == "onnx" and section.group_size not in (0, *(sizes := (16, 32, 64, 128, 256))):
        raise UserError(f"quantization.group_size: onnxruntime supports groups of {', '.join(map(str, sizes))}, not "
                        f"{section.group_size}")
    if model.quantization != "none" and form not in ("gguf-lora", "torch-export", "aotinductor"):
        raise UserError(f"--to {form}: the model is already quantized ({model.quantization}); use the original model")
    with full_disk_error(out), MODEL.staged(out.parent if one_file else out) as scratch:
        target = scratch / (out.name if one_file else "export")
        EXPORTS[form](model, tokenizer, target, section)
        for path in () if one_file else sorted(path for path in target.rglob("*") if path.is_file()):
            destination = out / path.relative_to(target)
            destination.parent.mkdir(parents=True, exist_ok=True)
            MODEL.sync(path)
            path.replace(destination)
        if not one_file:
            shutil.rmtree(target)
    hint = f" ({section.gguf_type}); try: llama-cli -m {out}/model.gguf, or ollama create NAME -f {out}/Modelfile"
    say(f"exported to {out}" + hint * (form == "gguf"))


def calibration_of(config, tokenizer, method: str, context: int) -> list[list[int]]:
    """Token ids of training texts that fit the context, if the method needs calibration."""
    section = config.quantization
    length = min(section.calibration_length, context)
    chunks = sample_ids(config.data, tokenizer, "train", length) if method in CALIBRATED else ()
    return list(itertools.islice(chunks, section.calibration_samples))


def quantized(config, method: str, dtype: torch.dtype) -> tuple[MODEL.LanguageModel, object]:
    """The quantized model and its tokenizer. `dtype`: type of the weights that are not quantized."""
    section, folder = config.quantization, MODEL.resolve_folder(MODEL.base_and_adapter(config.model.name)[0])
    # Weights that were converted to 16 bits could round to other levels.
    nearest_levels = method in FORMS and method not in CALIBRATED
    precise = nearest_levels and MODEL.stored_dtype(MODEL.read_json(folder / "config.json")) == "float32"
    model, tokenizer = load_original(config, dtype="float32" if precise else None)
    calibration = calibration_of(config, tokenizer, method, model.config.max_position_embeddings)
    quantize(model, method, section.group_size, calibration, section.exclude, section.lm_head, dtype if precise else None)
    return model, tokenizer


def compare_original(config) -> Comparison:
    model, tokenizer = load_original(config)
    comparison = Comparison(config, model, tokenizer)
    comparison.add("none", model)
    return comparison


def compare(config) -> Comparison:
    """Measure the original and the model after each method. Methods that do not support this model are skipped."""
    comparison = compare_original(config)
    for method in COMPARED:
        try:
            comparison.add(method, quantized(config, method, comparison.dtype)[0])
        except UserError as error:
            say(f"skipped {method}: {error}")
    return comparison


LARGE = 4e9  # bytes of weights; larger models are measured layer by layer and not timed


def quantize_to_folder(config, out: Path) -> Comparison:
    """Quantize a model, save it in a folder, and measure both. The weights are read from the original's files when they are
    needed, and each layer is written and freed before the next one, so memory does not grow with the model."""
    section, folder = config.quantization, MODEL.resolve_folder(MODEL.base_and_adapter(config.model.name)[0])
    raw = MODEL.read_json(folder / "config.json")
    foreign = MODEL.is_foreign(raw)  # transformers loads all weights at once
    stored = None if foreign else getattr(torch, str(raw.get("dtype") or raw.get("torch_dtype")), torch.float32)
    model, tokenizer = load_original(config, dtype=stored)
    device = model.device
    dtype = MODEL._chosen_dtype(config.model.dtype, raw, model, device) or torch.float32
    dtype = MODEL.AUTOCAST.get(section.method, dtype)
    layerwise = dtype if INFER.weight_bytes(model) > LARGE and not foreign else None
    comparison = Comparison(config, model, tokenizer, layerwise)  # fails without held-out text, before anything is written
    calibration = calibration_of(config, tokenizer, section.method, model.config.max_position_embeddings)
    settings = (section.method, section.group_size, calibration, section.exclude, section.lm_head)
    with full_disk_error(out):
        if foreign:
            quantize(model, *settings)
            TOKENIZER.save(tokenizer, out, model.config.max_position_embeddings)
            MODEL.save(model, out)
        else:
            with MODEL.saving(model, out) as write:
                quantize(model, *settings, dtype, write)
                TOKENIZER.save(tokenizer, out, model.config.max_position_embeddings)
    say(f"saved to {out}")
    comparison.add("none", load_original(config, dtype=stored if layerwise else None)[0])
    comparison.add(section.method, model if foreign else MODEL.load(out, dtype, device))
    return comparison


def main(argv: list[str] | None = None) -> None:
    config = load_config(argv, SECTIONS, "quantization", ACTIONS, __doc__)
    section, actions = config.quantization, config.actions
    check_request(config)
    if actions.to:
        export(*load_original(config, actions.to != "gguf-lora"), actions.to, actions.out, section)
        return
    if actions.compare:
        comparison, folder = compare(config), Path(actions.out or config.model.name)
        print(comparison.table())
        comparison.plot((folder if actions.out or folder.is_dir() else Path()) / "compare.png")
        return
    if actions.out:
        comparison = quantize_to_folder(config, Path(actions.out))
    else:
        comparison = compare_original(config)
        comparison.add(section.method, quantized(config, section.method, comparison.dtype)[0])
    print(comparison.table())


if __name__ == "__main__":
    sys.modules["QUANT"] = sys.modules[__name__]  # MODEL imports this file by its name, and its classes must exist once
    run_main(main)
