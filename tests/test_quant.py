"""QUANT.py against bitsandbytes, compressed-tensors and slow direct solutions: quantized weights, training, folders, measures."""

import contextlib
import itertools
import json
import math
import shutil
import sys
import weakref

import pytest
import torch
import transformers
from conftest import make_text
from safetensors.torch import load_file
from test_model import VOCAB, reference
from test_sft import questions

import INFER
import MODEL
import QUANT
import RL
import SFT
import TOKENIZER
import TRAIN
from bench import quant
from MODEL import UserError

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*JIT|.*is_gradient_checkpointing")]
# The 16 values of NF4 (Dettmers 2023, appendix E).
NF4 = torch.tensor([-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
                    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
                    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0])
EXPERTS = dict(model_type="mixtral", num_experts=4, moe_intermediate_size=64)


def nf4_by_hand(weight: torch.Tensor, size: int = 64) -> torch.Tensor:
    """Divide each group of `size` weights by its largest and round to the nearest value, with scales in float32."""
    groups = weight.flatten().view(-1, size)
    scale = groups.abs().amax(1, keepdim=True)
    nearest = ((groups / scale)[..., None] - NF4).abs().argmin(-1)
    return (NF4[nearest] * scale).view_as(weight)


SMALL = dict(vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128,
             initializer_range=0.1)


def base(folder, **knobs):
    MODEL.save(MODEL.build(MODEL.ModelConfig(**{**SMALL, **knobs}), seed=1), folder)
    return folder


@pytest.mark.parametrize("knobs", [{}, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("method", ["nf4", "llm_int8"])
def test_packed_weights_equal_the_published_format(method, knobs, tmp_path):
    """The logits equal those of a model whose matrices were rounded by hand."""
    folder = base(tmp_path / "base", **knobs)
    plain, packed = MODEL.load(folder), MODEL.load(folder, quantization=method)
    ids = torch.randint(0, 320, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = plain(ids).logits
        for name, weight in plain.named_parameters():
            if "layers." in name and weight.dim() >= 2 and not name.endswith("mlp.gate.weight"):
                scale = weight.abs().amax(-1, keepdim=True) / 127
                weight.copy_(nf4_by_hand(weight) if method == "nf4" else (weight / scale).round() * scale)
        by_hand, ours = plain(ids).logits, packed.train()(ids).logits
        in_place = QUANT.quantize(MODEL.load(folder), method).train()(ids).logits
    # The scales of nf4 are 8-bit numbers themselves (double quantization), which changes weights by less than a percent;
    # int8 converts weights to float16 before rounding.
    assert (ours - by_hand).std() < (0.06 if method == "nf4" else 0.02) * exact.std()
    assert (ours - exact).std() > (2 if method == "nf4" else 0.5) * (ours - by_hand).std() and not torch.equal(ours, exact)
    torch.testing.assert_close(ours, in_place, atol=1e-6, rtol=1e-6)
    share = INFER.weight_bytes(packed) / INFER.weight_bytes(MODEL.load(folder))
    assert share < (0.45 if method == "nf4" else 0.55)


@pytest.mark.parametrize("knobs", [{}, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("method", ["nf4", "llm_int8", "int8", "int8_dynamic", "int4", "fp8"])
def test_adapters_train_on_packed_weights_that_do_not_change(method, knobs, tmp_path):
    """Also through eval mode, where bitsandbytes would repack the weights of some processors."""
    model = MODEL.load(base(tmp_path / "base", **knobs), quantization=method)
    SFT.attach_lora(model, tmp_path / "base", r=8)

    def stored() -> dict:
        return {name: value.clone() for name, value in model.state_dict().items() if not MODEL.tensor_is_trained(name)}

    before = stored()
    assert sum(value.dtype in (torch.uint8, torch.int8, torch.int32) for value in before.values()) >= 8
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-2)
    ids = torch.randint(0, 320, (4, 33), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(12):
        model.train()
        loss = -model(ids[:, :-1], targets=ids[:, 1:]).logprobs.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            model.eval()(ids)
    after = stored()
    assert losses[-1] < losses[0] - 0.3
    assert set(before) == set(after)
    for name, value in before.items():
        assert value.dtype == after[name].dtype and torch.equal(value, after[name]), name


@pytest.mark.parametrize("method", ["nf4", "llm_int8"])
def test_qlora_trains_resumes_generates_and_merges(method, tmp_path, tokenizer, model_folder, text_file, capsys):
    """SFT.py on packed weights: resuming is exact, the base's file does not change, the adapter runs on the base and merges."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in questions(40)))
    flags = ["--model", str(model_folder), "--model.device", "cpu", "--data", str(data), "--lora.r", "4", "--model.quantization", method,
             "--data.validation_fraction", "0.2", "--learning-rate", "1e-2", "--training.sample_tokens", "0", "--sft.eval_answers", "0", "--batch-size", "4", "--max-length", "64",
             "--training.mixed_precision", "no", "--training.warmup_steps", "2", "--training.lr_scheduler_type", "constant"]
    file = (model_folder / "model.safetensors").read_bytes()
    result = SFT.main([*flags, "--max-steps", "10", "--out", str(tmp_path / "whole")])
    assert result.after["loss"] < result.before["loss"] - 0.2
    assert (model_folder / "model.safetensors").read_bytes() == file
    SFT.main([*flags, "--max-steps", "5", "--out", str(tmp_path / "halves")])
    SFT.main([*flags, "--max-steps", "10", "--out", str(tmp_path / "halves"), "--resume", "auto"])
    whole, halves = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "halves"))
    assert set(whole) == set(halves) and all(torch.equal(whole[name], halves[name]) for name in whole)
    capsys.readouterr()
    INFER.main(["--model", str(model_folder), "--adapter", str(tmp_path / "whole"), "--model.quantization", method, "--prompt", "What is 3?",
                "--temperature", "0", "--max-new-tokens", "4", "--model.device", "cpu"])
    printed = capsys.readouterr()
    assert printed.out.strip() and f"{method} weights" in printed.err
    SFT.main(["--merge", str(tmp_path / "whole"), "--out", str(tmp_path / "merged")])
    assert "differ by at most" in capsys.readouterr().err and (tmp_path / "merged" / "model.safetensors").exists()
    tables = []
    for name in ("whole", "merged"):  # the folder of an adapter is measured as its base with the adapter
        QUANT.main(["--model", str(tmp_path / name), "--data", str(text_file), "--method", method, "--model.device", "cpu", "--model.dtype", "float32"])
        tables.append([[float(row[title]) for title in ("size, MB", "perplexity")] for row in table_of(capsys.readouterr().out)])
    torch.testing.assert_close(*map(torch.tensor, tables), rtol=1e-3, atol=1e-3)


def test_an_unsupported_architecture_is_packed_by_transformers(tmp_path):
    config = transformers.GPTNeoXConfig(vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                                        max_position_embeddings=128)
    transformers.GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "neox")
    model = MODEL.load(tmp_path / "neox", quantization="nf4")
    assert isinstance(model, MODEL.ForeignModel) and any(type(m).__name__ == "Linear4bit" for m in model.modules())
    SFT.attach_lora(model, tmp_path / "neox", r=4)
    before = {name: value.clone() for name, value in model.state_dict().items() if not MODEL.tensor_is_trained(name)}
    ids = torch.randint(0, 320, (2, 17))
    (-model.train()(ids[:, :-1], targets=ids[:, 1:]).logprobs.mean()).backward()
    with torch.no_grad():
        model.eval()(ids)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(w.grad is not None for w in model.parameters() if w.requires_grad)
    with pytest.raises(UserError, match="training.qat: int8 is not supported for gpt_neox, which runs in transformers"):
        QUANT.fake_quantize(MODEL.load(tmp_path / "neox"), "int8")


def test_invalid_uses_are_one_line_errors(tmp_path, model_folder, monkeypatch):
    with pytest.raises(UserError, match="quantization: 'nf5' is not one of none, int8"):
        MODEL.load(model_folder, quantization="nf5")
    with pytest.raises(UserError, match="model.quantization: nf4 weights cannot be trained; train an adapter on a trained model"):
        SFT.main(["--model", str(model_folder), "--model.quantization", "nf4", "--out", str(tmp_path / "out")])
    with pytest.raises(UserError, match="is not one of none, int8"):
        SFT.main(["--model", str(model_folder), "--model.quantization", "nf5", "--out", str(tmp_path / "out")])
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="quantization.method: nf4 and llm_int8 need `pip install bitsandbytes`"):
        MODEL.load(model_folder, quantization="nf4")


# -------------------------------------------------------------------------- integers against slow direct solutions


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [8, 24, 19])
def test_packed_integers_are_unpacked(bits, width):
    levels = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, width), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    packed = QUANT.pack(levels, bits)
    assert packed.dtype == torch.int32 and packed.shape == (5, -(-width * bits // 32)) and torch.equal(QUANT.unpack(packed, bits, width), levels)
    if compressed := pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers", reason="no peer"):
        assert torch.equal(packed, compressed.pack_to_int32(levels, bits))


@pytest.mark.parametrize("method, bits, group", [("int8", 8, 0), ("int4", 4, 32), ("int4", 4, 16)])
@pytest.mark.parametrize("knobs", [{}, EXPERTS], ids=["dense", "experts"])
def test_rounding_to_nearest_by_hand(method, bits, group, knobs, tmp_path):
    """The logits of a model whose matrices were rounded by hand: levels from -2^(b-1) to 2^(b-1) - 1, the largest weight at the end."""
    folder = base(tmp_path / "base", **knobs)
    plain, ids = MODEL.load(folder), torch.randint(0, 320, (2, 24), generator=torch.Generator().manual_seed(0))
    packed = QUANT.quantize(MODEL.load(folder), method, group)
    loaded = MODEL.load(folder, quantization=method)  # with the default group
    with torch.no_grad():
        exact = plain(ids).logits
        for name, weight in plain.named_parameters():
            if "layers." in name and weight.dim() >= 2 and not name.endswith("mlp.gate.weight"):
                rows = weight.reshape(-1, group or weight.shape[-1])
                scale = rows.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 0.5)
                if group:  # stored in bfloat16, with the sign that maps the largest weight to the lowest level
                    scale = (rows.gather(1, rows.abs().argmax(1, keepdim=True)) / -(2 ** (bits - 1))).bfloat16().float()
                weight.copy_((rows / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).mul(scale).view_as(weight))
        torch.testing.assert_close(packed(ids).logits, plain(ids).logits, atol=2e-5, rtol=1e-5)
        if group in (0, 32):
            torch.testing.assert_close(loaded(ids).logits, packed(ids).logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(exact, plain(ids).logits, atol=1e-3)
    assert INFER.weight_bytes(packed) < (0.55 if bits == 8 else 0.5) * INFER.weight_bytes(MODEL.load(folder))


def test_integers_are_rounded_from_the_stored_weights(tmp_path, model_folder, text_file, monkeypatch):
    """The dtype of the other weights has no effect on them."""
    monkeypatch.setattr(QUANT.Comparison, "speed", lambda *args: {})
    QUANT.main(["--model", str(model_folder), "--method", "int4", "--data", str(text_file), "--model.device", "cpu", "--model.dtype", "bfloat16",
                "--out", str(tmp_path)])
    exact, saved = QUANT.quantize(MODEL.load(model_folder), "int4").state_dict(), load_file(tmp_path / "model.safetensors")
    while_loading = MODEL.load(model_folder, "bfloat16", quantization="int4").state_dict()
    names = [name for name in exact if name.endswith(("weight_packed", "weight_scale"))]
    for found in (saved, while_loading):
        assert names and all(torch.equal(found[name], exact[name]) for name in names)
        assert found["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_dynamic_activations_by_hand():
    linear, hidden = torch.nn.Linear(16, 6), draw(3, 5, 16)
    form = QUANT.FORMS["int8_dynamic"]
    quantized = QUANT.QuantizedLinear.of(linear, *QUANT.nearest(linear.weight.data, form), form)
    weight = linear.weight.data
    row = weight.abs().amax(1, keepdim=True) / 127.5
    token = hidden.abs().amax(-1, keepdim=True) / 127.5
    products = (hidden / token).round().clamp(-128, 127).double() @ (weight / row).round().clamp(-128, 127).double().T
    torch.testing.assert_close(quantized(hidden).double(), products * token * row[:, 0] + linear.bias, atol=1e-5, rtol=1e-5)


def test_fp8_by_hand():
    """The nearest of all 253 finite fp8 numbers, after each row of weights and each token is scaled to a maximum of 448."""
    linear, hidden = torch.nn.Linear(16, 6, bias=False), draw(3, 16)
    numbers = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()].unique()
    near = lambda x: numbers[(x[..., None] - numbers).abs().argmin(-1)]  # noqa: E731
    row, token = (x.abs().amax(1, keepdim=True) / 448 for x in (linear.weight.data, hidden))
    expected = (near(hidden / token) * token).double() @ (near(linear.weight.data / row) * row).double().T
    quantized = QUANT.QuantizedLinear.of(linear, *QUANT.nearest(linear.weight.data, QUANT.FORMS["fp8"]), QUANT.FORMS["fp8"])
    torch.testing.assert_close(quantized(hidden).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [QUANT.Form(8), QUANT.Form(8, dynamic=True), QUANT.Form(4, 32), QUANT.Form(4)], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 40, 200])
def test_integer_kernels_agree_with_dequantized_weights(form, rows, dtype):
    """With outliers in the inputs. Without VNNI the kernels are slower but equally exact."""
    linear, hidden = torch.nn.Linear(96, 48), (draw(2, rows, 96) * torch.exp(draw(96, seed=1))).to(dtype)
    quantized = QUANT.QuantizedLinear.of(linear, *QUANT.nearest(linear.weight.data, form), form)
    found, exact = QUANT.KernelLinear(quantized)(hidden), quantized(hidden.float())
    assert found.dtype == dtype
    in_bfloat16 = dtype == torch.bfloat16 or form.group and 2 * rows <= 32
    assert (found - exact).norm() < (5e-3 if in_bfloat16 else 1e-4) * exact.norm()


@pytest.mark.parametrize("method", ["int8", "int8_dynamic", "int4"])
def test_quantized_models_run_on_integer_kernels(method, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    config = MODEL.ModelConfig(vocab_size=320, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                               num_key_value_heads=2, attention_bias=True)
    model = QUANT.quantize(MODEL.build(config, seed=1).eval(), method)
    ids = torch.randint(0, 320, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, size = model(ids).logits, INFER.weight_bytes(model)
        tuned = INFER.configure_for_hardware(model)
        assert sum(isinstance(module, QUANT.KernelLinear) for module in tuned.modules()) == 2 * 4  # fused projections
        assert (tuned(ids).logits - expected).norm() < 2e-2 * expected.norm()
    assert INFER.weight_bytes(tuned) < (1.6 if method == "int4" else 1.1) * size


@pytest.mark.parametrize("group", [0, 8])
def test_gptq_equals_direct_solutions(group):
    """After each rounded column, the remaining columns are solved for directly, for the least output error."""
    weight, inputs = draw(6, 24), draw(200, 24, seed=1) @ draw(24, 24, seed=2)
    products = inputs.T @ inputs
    form = QUANT.Form(4, group)
    levels, scale = QUANT.gptq(weight, products, form)
    hessian = products.double() + 0.01 * products.diagonal().mean() * torch.eye(24)
    now, found, scales = weight.double().clone(), torch.zeros(6, 24), []
    for i in range(24):
        if i % (group or 24) == 0:
            part = now[:, None, i : i + (group or 24)].float()
            block = products[None, i : i + (group or 24), i : i + (group or 24)]
            scales.append(QUANT.best_scale(part, 4, block)[:, 0])
        found[:, i] = (now[:, i] / scales[-1]).round().clamp(-8, 7)
        now[:, i] = found[:, i] * scales[-1]
        rest, fixed = slice(i + 1, 24), slice(0, i + 1)
        change = now[:, fixed] - weight[:, fixed]  # the best rest: weight - H_rr^-1 H_rf change
        now[:, rest] = weight[:, rest] - torch.linalg.solve(hessian[rest, rest], hessian[rest, fixed] @ change.T).T
    assert torch.equal(levels.float(), found) and torch.allclose(scale, torch.stack(scales, 1).float(), rtol=1e-4)
    error = lambda levels, scale: float(((QUANT.dequantize(QUANT.grouped(levels, group), scale).flatten(-2) - weight) @ inputs.T).square().sum())  # noqa: E731
    assert error(levels, scale) < 0.9 * error(*QUANT.nearest(weight, form))


def test_scales_have_the_least_output_error():
    """Among the candidates, for the outputs of each group."""
    weight, inputs = draw(5, 32), draw(100, 32, seed=1) @ draw(32, 32, seed=2)
    _, scale = QUANT.round_weighted(weight, inputs.T @ inputs, QUANT.Form(4, 16))
    for row, group in itertools.product(range(5), range(2)):
        part, x = weight[row, 16 * group : 16 * group + 16].double(), inputs[:, 16 * group : 16 * group + 16].double()
        first = (part[part.abs().argmax()] / -8).bfloat16().double()
        scales = [(first * size).bfloat16().double() for size in torch.linspace(1.15, 0.5, 27)]
        errors = [(x @ ((part / candidate).round().clamp(-8, 7) * candidate - part)).square().sum() for candidate in scales]
        assert errors[scales.index(scale[row, group])] <= 1.0001 * min(errors)


def observed(inputs):
    found = QUANT.Inputs(inputs.shape[-1], "cpu")
    found.add(inputs[:50])
    found.add(inputs[50:])
    return found


def test_awq_chooses_the_factors_with_the_least_error():
    weights, inputs = [draw(6, 32), draw(10, 32, seed=1)], draw(100, 32, seed=2) * torch.exp(draw(32, seed=3))
    form = QUANT.Form(4, 16)
    factors = QUANT.awq_factors(weights, observed(inputs), form)

    def error(factors):
        outputs = [(QUANT.dequantize(QUANT.grouped(levels, 16), scale).flatten(-2) / factors - weight) @ inputs.T for weight in weights
                   for levels, scale in [QUANT.nearest(weight * factors, form)]]
        return sum(float(output.square().sum()) for output in outputs)

    candidates = []
    for alpha in torch.linspace(0, 0.95, 20).tolist():
        powers = inputs.abs().mean(0) ** alpha
        candidates.append((error(powers / (powers.max() * powers.min()).sqrt()), powers / (powers.max() * powers.min()).sqrt()))
    least, best = min(candidates, key=lambda pair: pair[0])
    torch.testing.assert_close(factors, best, rtol=1e-4, atol=1e-5)
    assert least < 0.9 * error(torch.ones(32))


def test_smoothquant_equals_the_published_formula():
    weights, inputs = [draw(6, 12), draw(10, 12, seed=1)], draw(100, 12, seed=2)
    expected = inputs.abs().amax(0).sqrt() / torch.cat(weights).abs().amax(0).sqrt()
    torch.testing.assert_close(QUANT.smooth_factors(weights, observed(inputs), QUANT.Form(8)), expected)


@pytest.mark.parametrize("knobs", [{}, dict(num_key_value_heads=2, model_type="qwen3", qk_norm=True), EXPERTS,
                                   dict(model_type="gpt2", position_embedding_type="learned", norm_type="layernorm", mlp_gated=False, mlp_bias=True,
                                        attention_bias=True, attention_out_bias=True)], ids=["llama", "qwen3", "experts", "gpt2"])
def test_folded_factors_change_nothing_before_rounding(knobs):
    model = MODEL.build(MODEL.ModelConfig(vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                                          **{"num_attention_heads": 4, **knobs}), seed=1).eval()
    ids, pairs = torch.randint(0, 320, (2, 24), generator=torch.Generator().manual_seed(0)), 0
    with torch.no_grad():
        exact = model(ids).logits
        for layer in MODEL.layers_of(model):
            for before, after in QUANT.scaled_pairs(layer):
                QUANT.fold(before, after, torch.exp(draw(after[0].in_features, seed=pairs)))
                pairs += 1
        torch.testing.assert_close(model(ids).logits, exact, atol=1e-4, rtol=1e-4)
    assert pairs >= 2


TEXTS = [torch.randint(0, 320, (40,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(6)]


@pytest.mark.parametrize("method", QUANT.CALIBRATED)
def test_calibrated_methods_have_less_error_than_rounding(method, tmp_path):
    folder, ids = base(tmp_path / "base"), torch.tensor(TEXTS[:2])
    nearest = {"gptq": "int4", "awq": "int4", "smoothquant": "int8_dynamic"}[method]
    with torch.no_grad():
        exact = MODEL.load(folder)(ids).logits
        rounded, calibrated = (QUANT.quantize(MODEL.load(folder), name, 0, TEXTS)(ids).logits for name in (nearest, method))
    limit = {"gptq": 0.8, "awq": 1.0, "smoothquant": 1.2}[method]  # random weights and inputs have no outliers
    assert (calibrated - exact).norm() < limit * (rounded - exact).norm()


def test_a_method_of_a_fork_is_a_form_and_a_rounding(tmp_path, monkeypatch):
    folder, seen = base(tmp_path / "base"), []

    def to_zero(weight, products, form):
        seen.append(float(products.diagonal().min()))
        return torch.zeros_like(weight, dtype=torch.int8), weight.new_ones(len(weight), weight.shape[1] // form.group)

    with pytest.raises(UserError, match="quantization.method: 'zero' is not one of none, bf16, fp16, int8, "):
        MODEL.check(QUANT.QuantizationSection(method="zero"), "quantization")
    monkeypatch.setitem(QUANT.FORMS, "zero", QUANT.Form(4, 16))
    monkeypatch.setitem(QUANT.ROUNDINGS, "zero", to_zero)
    MODEL.check(QUANT.QuantizationSection(method="zero"), "quantization")
    with pytest.raises(UserError, match="zero needs calibration text"):
        QUANT.quantize(MODEL.load(folder), "zero")
    model = QUANT.quantize(MODEL.load(folder), "zero", 0, TEXTS)
    weights = [module.weight for module in model.modules() if isinstance(module, QUANT.QuantizedLinear)]
    assert len(weights) == len(seen) > 0 and not any(weight.any() for weight in weights) and max(seen) > 0


def test_layers_are_calibrated_on_the_outputs_of_quantized_layers(tmp_path):
    """The inputs of each layer are computed by the layers before it after their change, with each layer's attention mask."""
    windows = dict(model_type="qwen2", attention_bias=True, sliding_window=5, layer_types=["full_attention", "sliding_attention", "full_attention"])
    model, seen = MODEL.load(base(tmp_path / "base", num_hidden_layers=3, **windows)), []

    def work(layer, observe):
        seen.append(observe([layer.self_attn.q_proj])[layer.self_attn.q_proj])
        layer.mlp.down_proj.weight.data.zero_()

    QUANT.layer_by_layer(model, TEXTS, work)
    with torch.no_grad():
        hidden = torch.cat([model(torch.tensor([ids]), want=("hidden_states",)).hidden_states[2][0] for ids in TEXTS])
        inputs = model.model.layers[2].input_layernorm(hidden)
    assert seen[2].count == 6 * 40
    torch.testing.assert_close(seen[2].products, inputs.T @ inputs, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(seen[2].largest, inputs.abs().amax(0))


# ----------------------------------------------------------------------------------- quantization-aware training

LATENT = dict(model_type="deepseek_v3", q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32)
GPT2 = dict(model_type="gpt2", position_embedding_type="learned", norm_type="layernorm", mlp_gated=False, mlp_bias=True, attention_bias=True,
            attention_out_bias=True)


def loss_of(model, ids) -> torch.Tensor:
    return -model(ids[:, :-1], targets=ids[:, 1:]).logprobs.mean()


@pytest.mark.parametrize("method", ["int8_dynamic", "int4"])
@pytest.mark.parametrize("knobs", [{}, EXPERTS, LATENT, GPT2, dict(intermediate_size=48)], ids=["llama", "experts", "latent", "gpt2", "48 wide"])
def test_a_model_in_quantization_aware_training_equals_the_converted_one(method, knobs, tmp_path):
    """Bit for bit, also in generation and under bfloat16. All float32 weights are trained and saved."""
    model, ids = MODEL.build(MODEL.ModelConfig(**{**SMALL, **knobs}), seed=1), torch.tensor(TEXTS[:2])
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    QUANT.fake_quantize(model, method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model.train(), ids).backward()
    optimizer.step()
    after = model.state_dict()
    assert list(after) == list(before)
    assert not [name for name, weight in model.named_parameters() if weight.dim() > 1 and torch.equal(weight, before[name])]
    MODEL.save(model, tmp_path)
    plain, converted = MODEL.load(tmp_path), QUANT.quantize(MODEL.load(tmp_path), method)
    with torch.no_grad():
        expected = converted(ids).logits
        assert torch.equal(model(ids).logits, expected) and torch.equal(model.eval()(ids).logits, expected)
        assert not torch.equal(plain(ids).logits, expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(ids).logits, converted(ids).logits)
        assert torch.equal(MODEL.load(tmp_path, quantization=method)(ids).logits, expected)
    sampling = INFER.Sampling(8, temperature=0, ignore_eos=True)
    assert INFER.generate(model, TEXTS[:2], sampling) == INFER.generate(converted, TEXTS[:2], sampling)


def test_gradients_pass_through_rounding():
    weight, outward = draw(6, 32).requires_grad_(), draw(6, 32, seed=1)
    QUANT.straight_through(weight, 4, 8).backward(outward)
    assert torch.equal(weight.grad, outward)
    assert QUANT.straight_through(weight.to("meta"), 4, 8).shape == weight.shape  # as torch.compile traces it
    linear = QUANT.fake_quantize(MODEL.build(MODEL.ModelConfig(**SMALL)), "int4").model.layers[0].mlp.down_proj.eval()
    linear(draw(3, 128)).sum().backward()  # also in eval mode, which keeps rounded weights
    assert linear.kept and linear.weight.grad.abs().sum() > 0
    linear.weight.data.mul_(2)
    hidden = draw(3, 128)
    torch.testing.assert_close(linear.train()(hidden), hidden @ QUANT.rounded(linear.weight.data, QUANT.Form(4, 32)).T)


def test_quantization_aware_training_loses_less_than_rounding_afterwards(tmp_path):
    """Two models overfit the same 32 rows, and both are converted."""
    ids, losses = torch.randint(0, 64, (32, 17), generator=torch.Generator().manual_seed(0)), []
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, initializer_range=0.3)
    for aware in (False, True):
        model = MODEL.build(MODEL.ModelConfig(**{**SMALL, **sizes}), seed=0)
        if aware:
            QUANT.fake_quantize(model, "int4")
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 60)
        for _ in range(60):
            optimizer.zero_grad()
            loss_of(model, ids).backward()
            optimizer.step()
            schedule.step()
        MODEL.save(model, tmp_path)
        with torch.no_grad():
            losses.append(float(loss_of(QUANT.quantize(MODEL.load(tmp_path), "int4"), ids)))
    assert losses[1] < losses[0] / 3


def test_the_held_out_loss_of_a_run_is_that_of_the_converted_model(tmp_path, text_file, capsys, monkeypatch):
    monkeypatch.setattr(TRAIN.Log, "plot", lambda self: None)
    flags = ["--model.preset", "llama-1m", "--model.hidden_size", "64", "--model.num_hidden_layers", "1", "--model.num_attention_heads", "4",
             "--model.intermediate_size", "96", "--model.device", "cpu", "--tokenizer.kind", "byte", "--max-length", "32", "--batch-size", "4",
             "--training.mixed_precision", "no", "--training.sample_tokens", "0", "--data", str(text_file), "--data.dir", str(tmp_path / "ids"),
             "--max-steps", "3", "--training.qat", "int4", "--training.qat_group_size", "16", "--out", str(tmp_path / "out")]
    result = TRAIN.main(flags)
    assert "out has float32 weights; QUANT.py --method int4 --group-size 16 rounds them as in training" in capsys.readouterr().err
    converted = QUANT.quantize(MODEL.load(tmp_path / "out"), "int4", 16)
    _, evaluate = TRAIN.prepare_data(MODEL.load_config(flags, TRAIN.SECTIONS, "training", TRAIN.ACTIONS), TOKENIZER.load(tmp_path / "out"))
    assert evaluate(converted) == result.after


def test_unsupported_quantization_aware_training_is_a_one_line_error(tmp_path, model_folder, capsys):
    build = lambda **knobs: MODEL.build(MODEL.ModelConfig(**{**SMALL, **knobs}))  # noqa: E731
    model = QUANT.fake_quantize(build(intermediate_size=48), "int4")
    assert "training.qat_group_size: layers whose width is not divisible by 32 are not quantized (2): " in capsys.readouterr().err
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    with pytest.raises(UserError, match="training.qat_group_size: no layer's width is divisible by 48; use a divisor of 128"):
        QUANT.fake_quantize(build(), "int4", 48)
    with pytest.raises(UserError, match="training.qat: the model is already quantized"):
        QUANT.fake_quantize(QUANT.quantize(build(), "int8"), "int8")
    flags = ["--model", str(model_folder), "--training.qat", "int4", "--out", str(tmp_path / "out")]
    for main, more, message in ((SFT.main, ["--lora.r", "4"], "training.qat: int4 is for training all weights"),
                                (RL.main, [], "training.qat: not available in RL.py"),
                                (TRAIN.main, ["--model.quantization", "nf4"], "nf4 weights cannot be trained"),
                                (TRAIN.main, ["--training.qat_group_size", "-1"], "training.qat_group_size: -1 must be at least 0")):
        with pytest.raises(UserError, match=message):
            main([*flags, *more])
    with pytest.raises(UserError, match="training.qat_group_size: has no effect with training.qat int8"):
        TRAIN.main(["--training.qat", "int8", "--training.qat_group_size", "16"])


# --------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("method", ["int8", "int8_dynamic", "int4", "gptq", "fp8"])
def test_a_quantized_folder_opens_here_and_in_transformers(method, tmp_path):
    model = QUANT.quantize(MODEL.load(base(tmp_path / "base", num_key_value_heads=2)), method, 0, TEXTS, exclude=["layers.1.*down_proj"])
    MODEL.save(model, tmp_path / "out")
    again, ids = MODEL.load(tmp_path / "out"), torch.tensor(TEXTS[:2])
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(again(ids).logits, expected)
    assert type(again.model.layers[1].mlp.down_proj) is torch.nn.Linear
    with pytest.raises(UserError, match="is already quantized"):
        QUANT.quantize(again, "int8")
    with pytest.raises(UserError, match="are already quantized; leave it out"):
        MODEL.load(tmp_path / "out", quantization="int8")
    pytest.importorskip("compressed_tensors")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        difference = (theirs(ids).logits - expected).norm() / expected.norm()
    # Rounding errors of activations accumulate over the layers.
    assert difference < (1e-2 if method in ("int8_dynamic", "fp8") else 1e-5)


@pytest.mark.parametrize("family, method", [
    ("gpt2", "gptq"), ("llama-biases", "smoothquant"), ("llama-mqa", "awq"), ("mistral", "int8"), ("qwen2-window", "gptq"), ("qwen3", "int4"),
    ("mixtral", "int8"), ("qwen3-moe", "awq"), ("deepseek-v3", "gptq"), ("deepseek-v3-direct", "int4"), ("bert", "int8_dynamic")])
def test_a_quantized_folder_of_every_family(family, method, tmp_path, capsys):
    reference(family).save_pretrained(tmp_path / "base")
    texts = [[token % VOCAB for token in text] for text in TEXTS]
    model = QUANT.quantize(MODEL.load(tmp_path / "base"), method, 0 if "int8" in method else 4, texts)
    MODEL.save(model, tmp_path / "out")
    ids = torch.tensor(texts[:2])
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(MODEL.load(tmp_path / "out")(ids).logits, expected)
    auto = transformers.AutoModelForMaskedLM if family == "bert" else transformers.AutoModelForCausalLM
    if family == "gpt2":  # its layers are Conv1D in transformers
        assert "only this program can open" in capsys.readouterr().err
        with pytest.raises(ValueError, match="custom"):
            auto.from_pretrained(tmp_path / "out")
        return
    pytest.importorskip("compressed_tensors")
    theirs = auto.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        difference = (theirs(ids).logits - expected).norm() / expected.norm()
    assert difference < (1e-2 if method in ("int8_dynamic", "smoothquant") else 1e-5)


@pytest.mark.parametrize("family", ["deepseek-v3", "gpt_neox"])
def test_16_bit_methods_equal_loading_in_16_bits(family, tmp_path):
    """Routers' biases and rotary frequencies stay float32."""
    config = transformers.GPTNeoXConfig(vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    (reference(family) if family != "gpt_neox" else transformers.GPTNeoXForCausalLM(config)).save_pretrained(tmp_path / "base")
    whole, narrow = MODEL.load(tmp_path / "base"), MODEL.load(tmp_path / "base", torch.bfloat16)
    expected = {name: (tensor.dtype, tensor.tolist()) for name, tensor in [*narrow.named_parameters(), *narrow.named_buffers()]}
    assert {kind for kind, _ in expected.values()} == {torch.bfloat16, torch.float32}
    QUANT.quantize(whole, "bf16")
    assert {name: (tensor.dtype, tensor.tolist()) for name, tensor in [*whole.named_parameters(), *whole.named_buffers()]} == expected


def test_an_unsupported_architecture_is_quantized_and_saved(tmp_path):
    pytest.importorskip("compressed_tensors")
    config = transformers.Gemma2Config(vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                                       num_key_value_heads=2, head_dim=16, sliding_window=8, max_position_embeddings=128)
    config.tie_word_embeddings = False
    transformers.Gemma2ForCausalLM(config).save_pretrained(tmp_path / "base")
    texts = [[token % VOCAB for token in text] for text in TEXTS]
    model, ids = QUANT.quantize(MODEL.load(tmp_path / "base"), "gptq", 0, texts, lm_head=True), torch.tensor(texts[:2])
    MODEL.save(model, tmp_path / "out")
    again = MODEL.load(tmp_path / "out")
    assert sum(isinstance(module, QUANT.QuantizedLinear) for module in model.modules()) == 15 and again.quantization == "compressed-tensors"
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)
        rounded = MODEL.load(tmp_path / "base", quantization="int8")(ids).logits
        assert 0 < (rounded - MODEL.load(tmp_path / "base")(ids).logits).norm() < 0.05 * rounded.norm()
    with pytest.raises(UserError, match="awq is not supported for gemma2, which runs in transformers; use gptq, int4 or int8"):
        QUANT.quantize(MODEL.load(tmp_path / "base"), "awq", 0, texts)
    with pytest.raises(UserError, match="are already quantized; leave it out"):
        MODEL.load(tmp_path / "out", quantization="int4")


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_lm_head_and_exclude(method, tmp_path):
    model = QUANT.quantize(MODEL.load(base(tmp_path / "base")), method, exclude=["layers.0.*q_proj"], lm_head=True)
    assert type(model.lm_head) is not torch.nn.Linear and type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert type(model.model.layers[1].self_attn.q_proj) is type(model.lm_head)
    if method == "int8":  # weights are rounded before the others are converted
        model, weight = MODEL.load(tmp_path / "base"), MODEL.load(tmp_path / "base").lm_head.weight
        QUANT.quantize(model, method, lm_head=True, dtype=torch.bfloat16)
        assert torch.equal(model.lm_head.levels, QUANT.nearest(weight, QUANT.Form(8))[0]) and model.dtype == torch.bfloat16


def test_models_that_cannot_be_quantized_or_saved_are_one_line_errors(tmp_path, capsys):
    folder = base(tmp_path / "base", intermediate_size=100)
    QUANT.quantize(MODEL.load(folder), "int4")
    assert "quantization.group_size: layers whose width is not divisible by 32 are not quantized (2): " in capsys.readouterr().err
    for more, message in ((dict(group_size=48), "no layer's width is divisible by 48"), (dict(exclude=["."]), "no layer is left")):
        with pytest.raises(UserError, match=message):
            QUANT.quantize(MODEL.load(folder), "int4", **more)
    with pytest.raises(UserError, match="quantization.group_size: nf4 supports groups of 32, 64, .* 4096, not 48"):
        QUANT.quantize(MODEL.load(folder), "nf4", 48)
    with pytest.raises(UserError, match="no layer is left"):
        QUANT.quantize(MODEL.load(folder), "nf4", exclude=["."])
    MODEL.load(folder, quantization="int4")
    assert "model.quantization: layers whose width is not divisible by 32 are not quantized (2)" in capsys.readouterr().err
    with pytest.raises(UserError, match="model.quantization: no layer's width is divisible by 32"):
        MODEL.load(base(tmp_path / "odd", hidden_size=40, intermediate_size=72), quantization="int4")
    with pytest.raises(UserError, match="gptq needs calibration text, but data.train contains none"):
        QUANT.quantize(MODEL.load(folder), "gptq")
    for method, knobs, reason in (("int8_dynamic", {}, "experts in int8_dynamic; use int8 or int4"), ("nf4", {}, "nf4 weights; quantize while"),
                                  ("int4", dict(moe_intermediate_size=48), "experts with one width that the group size does not divide")):
        with pytest.raises(UserError, match=f"a folder cannot store {reason}"):
            MODEL.save(QUANT.quantize(MODEL.build(MODEL.ModelConfig(**{**SMALL, **EXPERTS, **knobs})), method), tmp_path / "no")
    MODEL.save(QUANT.quantize(MODEL.load(folder), "int8"), tmp_path / "odd")
    config = json.loads((tmp_path / "odd/config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    weights, eight = group["weights"], {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    for settings, activations in (({"symmetric": False}, None), ({"num_bits": 3}, None), ({"strategy": "tensor"}, None), ({"num_bits": 4}, eight),
                                  ({"type": "float", "num_bits": 4}, None), ({}, {**eight, "type": "float"}), ({"strategy": "group"}, None)):
        group.update(weights={**weights, **settings}, input_activations=activations)
        (tmp_path / "odd/config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match="this compressed-tensors scheme is not supported"):
            MODEL.load(tmp_path / "odd")
    group.update(weights={**weights, "group_size": -1}, input_activations=None)  # as other programs write one scale per row
    (tmp_path / "odd/config.json").write_text(json.dumps(config))
    assert MODEL.load(tmp_path / "odd").model.layers[0].mlp.up_proj.form == QUANT.Form(8)


def table_of(text: str) -> list[dict]:
    """The rows of a printed table, {title: cell}."""
    head, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines())
    return [dict(zip(head, line, strict=True)) for line in lines]


def test_a_quantized_folder_is_measured_and_generates(tmp_path, model_folder, text_file, capsys):
    QUANT.main(["--model", str(model_folder), "--data", str(text_file), "--method", "awq", "--calibration-samples", "8", "--out", str(tmp_path / "out"), "--model.device", "cpu"])
    plain, packed = table_of(capsys.readouterr().out)
    assert plain["method"] == "none" and packed["method"] == "awq" and float(packed["size, MB"]) < float(plain["size, MB"])
    assert float(plain["KL, nats"]) == 0 < float(packed["KL, nats"]) and plain["answered"] == "-"
    INFER.main(["--model", str(tmp_path / "out"), "--prompt", "The red", "--temperature", "0", "--max-new-tokens", "8", "--model.device", "cpu"])
    printed = capsys.readouterr()
    assert printed.out.strip() and "int4 weights" in printed.err
    reference = INFER.score(MODEL.load(model_folder), TOKENIZER.load(model_folder),
                            TOKENIZER.sample_texts(TOKENIZER.DataSection(train=[str(text_file)]), part="val"))
    assert math.isclose(float(plain["perplexity"]), reference["perplexity"], rel_tol=1e-3)


# ------------------------------------------------------------------------------------------------------- comparison


def comparison_of(model_folder, text_file, **flags) -> QUANT.Comparison:
    argv = [f"--{key}={value}" for key, value in {"model": model_folder, "data": text_file, "model.device": "cpu", **flags}.items()]
    return QUANT.compare_original(MODEL.load_config(argv, QUANT.SECTIONS, "quantization"))


def test_quality_by_hand():
    """Two models that look up the next token in a table of logits."""
    ours, texts = QUANT.Comparison.__new__(QUANT.Comparison), [[1, 2, 0, 2], [2, 0]]
    ours.texts, ours.original = texts, None
    tables = draw(3, 3), draw(3, 3, seed=1)
    nats, right, divergence, pairs = 0.0, 0, 0.0, [pair for ids in texts for pair in itertools.pairwise(ids)]
    for first, second in pairs:
        old, new = (table[first].double().softmax(0).tolist() for table in tables)
        nats -= math.log(new[second])
        right += max(new) == new[second]
        divergence += sum(p * math.log(p / q) for p, q in zip(old, new, strict=True))
    first, second = (ours.quality(lambda ids, table=table: table[ids]) for table in tables)
    assert first["KL, nats"] == 0
    assert second == pytest.approx({"perplexity": math.exp(nats / 4), "correct": right / 4, "KL, nats": divergence / 4}, rel=1e-5)


def test_held_out_chunks_cover_a_long_text(model_folder, tmp_path):
    (tmp_path / "book.txt").write_text(" ".join(make_text(300)))
    ours = comparison_of(model_folder, tmp_path / "book.txt", **{"data.text_unit": "file", "data.validation": "tail"})
    assert len(ours.texts) > 1 and max(map(len, ours.texts)) <= ours.context + 1
    [text] = TOKENIZER.sample_texts(TOKENIZER.DataSection(train=[str(tmp_path / "book.txt")], text_unit="file", validation="tail"), part="val")
    assert sum(ours.texts, []) == INFER.score_prompt(TOKENIZER.load(model_folder), text)


def test_exact_answers_are_counted(model_folder, text_file, tmp_path):
    """All expected answers but three are the model's own completions up to the end of the line."""
    model, tokenizer, prompts = MODEL.load(model_folder), TOKENIZER.load(model_folder), make_text(8, seed=3)
    rows = [TOKENIZER.encode_prompt(tokenizer, prompt) for prompt in prompts]
    generated = [completion.text for [completion] in INFER.generate(model, rows, INFER.Sampling(64, 0, stop=["\n"]), tokenizer)]
    pairs = [(prompt, text) for prompt, text in zip(prompts, generated, strict=True) if text.strip()]
    pairs = [*pairs, *((prompt, "No.") for prompt, _ in pairs[:3])]
    assert len(pairs) > 6
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps({"answer": text, "messages": [
        {"role": "user", "content": prompt}, {"role": "assistant", "content": text}]}) + "\n" for prompt, text in pairs))
    ours = comparison_of(model_folder, text_file, questions=tmp_path / "questions.jsonl")
    assert ours.rows["none"]["answered"] == 1 - 3 / len(pairs)
    with pytest.raises(UserError, match="quantization.questions: file not found"):
        comparison_of(model_folder, text_file, questions=tmp_path / "none.jsonl")


def test_compare_prints_and_plots_the_methods_that_work(model_folder, text_file, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    flags = ["--model", str(folder), "--data", str(text_file), "--compare", "--model.device", "cpu"]
    with pytest.raises(UserError, match="--out: --compare writes compare.png into a folder, not into a file such as 'a.png'"):
        QUANT.main([*flags, "--out", "a.png"])
    monkeypatch.setattr(QUANT, "COMPARED", ("int8", "nf4"))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    QUANT.main([*flags, "--group-size", "16"])  # for the methods that have groups
    printed = capsys.readouterr()
    assert [row["method"] for row in table_of(printed.out)] == ["none", "int8"]
    assert f"plot: {folder}/compare.png" in printed.err and (folder / "compare.png").stat().st_size > 10_000
    assert "skipped nf4: quantization.method: nf4 and llm_int8 need `pip install bitsandbytes`" in printed.err


def test_labels_of_the_plot_do_not_overlap(tmp_path, monkeypatch):
    from matplotlib.text import Text

    figures, ours = [], QUANT.Comparison.__new__(QUANT.Comparison)
    runtimes = [f"onnxruntime {name}" for name in ("float32", "int8", "int4")] + [f"llama.cpp {name}" for name in ("F16", "Q8_0", "Q4_0")]
    ours.rows = {name: {"size, MB": 1.34, "perplexity": 1.5, "decode, tokens/s": 100.0 + i, "prefill, tokens/s": 1e4}
                 for i, name in enumerate(("none", *QUANT.COMPARED, *runtimes))}
    del ours.rows["llama.cpp F16"]["perplexity"]
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, dpi: figures.append(figure) or path.touch())
    ours.plot(tmp_path / "compare.png")
    figures[0].draw_without_rendering()
    for axes, count in zip(figures[0].axes, (len(ours.rows) - 1, len(ours.rows), len(ours.rows)), strict=True):
        labels = [Text.get_window_extent(label) for label in axes.texts]  # without their lines
        assert len(labels) == count and not any(first.overlaps(second) for first, second in itertools.combinations(labels, 2))
        assert all(figures[0].bbox.x1 >= label.x1 and not axes.bbox.overlaps(label) for label in labels)


def test_llama_cpp_is_measured(model_folder, text_file, tmp_path):
    pytest.importorskip("xllamacpp")
    ours = comparison_of(model_folder, text_file)
    settings = QUANT.QuantizationSection("none", gguf_type="F16")
    QUANT.export(MODEL.load(model_folder), TOKENIZER.load(model_folder), "gguf", tmp_path / "out", settings)
    quant.add(ours, "llama.cpp F16", quant.LlamaCpp, tmp_path / "out")
    row = ours.rows["llama.cpp F16"]
    assert row["KL, nats"] < 1e-3 and row["perplexity"] == pytest.approx(ours.rows["none"]["perplexity"], rel=1e-2)
    assert row["decode, tokens/s"] > 0 and row["prefill, tokens/s"] > 0


def test_a_model_without_a_language_model_head_is_rejected(tmp_path, model_folder, text_file):
    MODEL.save(MODEL.build(MODEL.read_config(model_folder), head="score"), tmp_path / "labels")
    TOKENIZER.save(TOKENIZER.load(model_folder), tmp_path / "labels")
    with pytest.raises(UserError, match="has no language-model head"):
        QUANT.main(["--model", str(tmp_path / "labels"), "--data", str(text_file)])


# ------------------------------------------------------------------------------------- layer by layer, invalid input


def quantized(model_folder, text_file, *flags):
    QUANT.main(["--model", str(model_folder), "--data", str(text_file), "--model.device", "cpu", "--calibration-samples", "8", *map(str, flags)])


@pytest.mark.parametrize("method", ["int4", "gptq", "int8_dynamic", "bf16"])
def test_large_models_are_quantized_and_measured_layer_by_layer(method, model_folder, text_file, tmp_path, monkeypatch, capsys):
    """Folder and measures equal those of the usual way. Each layer is freed after it is written."""
    group = ["--group-size", "16"] if method in ("int4", "gptq") else []
    quantized(model_folder, text_file, "--method", method, *group, "--out", tmp_path / "whole")
    capsys.readouterr()
    alive, saving = [], MODEL.saving

    @contextlib.contextmanager
    def watched(model, folder):
        matrices = [weakref.ref(weight) for layer in model.model.layers for weight in layer.parameters() if weight.dim() == 2]
        with saving(model, folder) as write:
            yield lambda layer: (write(layer), alive.append(sum(matrix() is not None for matrix in matrices)))

    monkeypatch.setattr(MODEL, "saving", watched)
    monkeypatch.setattr(MODEL.Shards, "limit", 2_000)
    monkeypatch.setattr(QUANT, "LARGE", 0)
    quantized(model_folder, text_file, "--method", method, *group, "--out", tmp_path / "parts")
    parts = [line.split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    assert alive == [7, 0] and [cell.strip() for cell in parts[1][-3:-1]] == ["-", "-"]  # not timed
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 2
    ids = torch.randint(0, 300, (2, 24))
    with torch.no_grad():
        expected = MODEL.load(tmp_path / "whole")(ids).logits
        torch.testing.assert_close(MODEL.load(tmp_path / "parts")(ids).logits, expected, atol=0, rtol=0)


def test_calibration_texts_fit_learned_positions(model_folder, text_file, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    base(folder, **GPT2, vocab_size=MODEL.read_json(folder / "config.json")["vocab_size"], max_position_embeddings=16)
    (tmp_path / "long.txt").write_text("the fox and the dog " * 40)
    QUANT.main(["--model", str(folder), "--data", str(tmp_path / "long.txt"), "--validation", str(text_file), "--method", "gptq"])


def test_models_are_not_overwritten_and_invalid_settings_are_named(model_folder, text_file, tmp_path):
    (tmp_path / "file").write_text("")
    adapter = MODEL.load(model_folder)
    SFT.attach_lora(adapter, model_folder, r=2)
    MODEL.save(adapter, tmp_path / "adapter")
    quantized(model_folder, text_file, "--method", "int8", "--out", tmp_path / "int8")
    before = {path: path.read_bytes() for path in model_folder.iterdir()}
    out = ("--out", tmp_path / "out")
    for flags, message in ((("--out", model_folder), "contains a model that is not quantized and would be overwritten"),
                           (("--out", tmp_path / "adapter"), "contains a model that is not quantized and would be overwritten"),
                           (("--out", tmp_path / "file"), "is a file; use a folder"), (("--method", "none", *out), "none requires --to or --compare"),
                           (("--data.validation", "none", *out), "'none' holds out no text"),
                           (("--group-size", "32", *out), "group_size: int8 has no groups; leave it out, or use nf4, int4"),
                           (("--gguf-type", "Q4_0", *out), "gguf_type: has no effect without --to gguf"),
                           (("--exclude", "*", *out), "'\\*' is not a regular expression"), (("--exclude", "lm_heat", *out), "'lm_heat' matches no layer"),
                           (("--model", tmp_path / "int8", *out), "is already quantized"), (("--model", tmp_path / "int8"), "is already quantized")):
        with pytest.raises(UserError, match=message):
            quantized(model_folder, text_file, *flags) if "--model" not in flags else QUANT.main([*map(str, flags), "--data", str(text_file)])
    assert {path: path.read_bytes() for path in model_folder.iterdir()} == before and not (tmp_path / "out/config.json").exists()


@pytest.mark.parametrize("method", ["int4", "gptq"])
def test_weights_that_are_not_finite_are_rejected(method, model_folder, tmp_path):
    model = MODEL.load(model_folder)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = math.inf
    with pytest.raises(UserError, match="not finite"):
        QUANT.quantize(model, method, 16, TEXTS)


def test_an_interrupted_run_leaves_no_files(model_folder, text_file, tmp_path, small_disk, monkeypatch):
    (small_disk / "filler").write_bytes(bytes(2**21 - 40_000))
    for flags in (("--method", "bf16"), ("--to", "torch-export")):
        out = small_disk / ("out.pt2" if "--to" in flags else "out")
        with pytest.raises(UserError, match="the disk is full; free some space"):
            quantized(model_folder, text_file, *flags, "--out", out)
    assert not [path for path in small_disk.rglob("*") if "safetensors" in path.name or path.name == "config.json" or path.suffix == ".pt2"]
    nearest, calls = QUANT.nearest, itertools.count()

    def interrupted(*args, **kwargs):
        if next(calls) == 9:
            raise KeyboardInterrupt
        return nearest(*args, **kwargs)

    monkeypatch.setattr(QUANT, "nearest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantized(model_folder, text_file, "--out", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
