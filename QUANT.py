"""QUANT.py: the form a model is shipped in.

Two forms of frozen weights, both bitsandbytes': `nf4` (4 bits, QLoRA's) and `int8`. `MODEL.load(..., quantization="nf4")`
packs each weight as it is read, so memory never holds the whole model in full; adapters (`SFT.py --lora.r 16`) learn on top.

    python QUANT.py --model out                                      # what a packed form saves, and what it costs (--method int8)
    python SFT.py --model gpt2-xl --data mine.jsonl --lora.r 16 --model.quantization nf4
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from functools import partial

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
