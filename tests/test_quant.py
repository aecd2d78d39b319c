"""Packed weights: what they compute, that they stay what they are, and adapters that learn on them."""

import itertools
import json
import math
import sys

import pytest
import torch
from safetensors.torch import load_file
from test_sft import questions

import INFER
import MODEL
import QUANT
import SFT
import TOKENIZER
from MODEL import UserError

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*JIT|.*is_gradient_checkpointing")]
# The 16 values of NF4 (Dettmers 2023, appendix E).
NF4 = torch.tensor([-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
                    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
                    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0])
EXPERTS = dict(model_type="mixtral", num_experts=4, moe_intermediate_size=64)


def nf4_by_hand(weight: torch.Tensor, size: int = 64) -> torch.Tensor:
    """Each run of `size` weights divided by its largest and put to the nearest value; the scales in full."""
    groups = weight.flatten().view(-1, size)
    scale = groups.abs().amax(1, keepdim=True)
    nearest = ((groups / scale)[..., None] - NF4).abs().argmin(-1)
    return (NF4[nearest] * scale).view_as(weight)


def base(folder, **knobs):
    config = MODEL.ModelConfig(**{**dict(vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                                         max_position_embeddings=128, initializer_range=0.1), **knobs})
    MODEL.save(MODEL.build(config, seed=1), folder)
    return folder


@pytest.mark.parametrize("knobs", [{}, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_packed_weights_are_the_published_form(method, knobs, tmp_path):
    """The logits are those of a model whose matrices were rounded by hand."""
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
    # The scales of nf4 are 8-bit numbers themselves (double quantization), which moves weights by under a percent;
    # int8 rounds weights in float16 on their way.
    assert (ours - by_hand).std() < (0.06 if method == "nf4" else 0.02) * exact.std()
    assert (ours - exact).std() > (2 if method == "nf4" else 0.5) * (ours - by_hand).std() and not torch.equal(ours, exact)
    torch.testing.assert_close(ours, in_place, atol=1e-6, rtol=1e-6)
    share = INFER.weight_bytes(packed) / INFER.weight_bytes(MODEL.load(folder))
    assert share < (0.45 if method == "nf4" else 0.55)


@pytest.mark.parametrize("knobs", [{}, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_an_adapter_learns_on_packed_weights_that_do_not_move(method, knobs, tmp_path):
    """Also through eval mode, where bitsandbytes would repack the weights of some processors."""
    model = MODEL.load(base(tmp_path / "base", **knobs), quantization=method)
    SFT.attach_lora(model, tmp_path / "base", r=8)

    def stored() -> dict:
        return {name: value.clone() for name, value in model.state_dict().items() if not MODEL.tensor_is_trained(name)}

    before = stored()
    assert sum(value.dtype in (torch.uint8, torch.int8) for value in before.values()) >= 8
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


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_qlora_end_to_end(method, tmp_path, tokenizer, model_folder, text_file, capsys):
    """SFT.py on packed weights: resume is exact, the base's file stays as it was, the adapter runs on it and merges."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in questions(40)))
    flags = ["--model", str(model_folder), "--model.device", "cpu", "--data", str(data), "--lora.r", "4", "--model.quantization", method,
             "--data.validation_fraction", "0.2", "--learning-rate", "1e-2", "--training.sample_tokens", "0", "--sft.eval_answers", "0", "--batch-size", "4", "--max-length", "64",
             "--training.mixed_precision", "no"]
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
    said = capsys.readouterr()
    assert said.out.strip() and f"{method} weights" in said.err
    SFT.main(["--merge", str(tmp_path / "whole"), "--out", str(tmp_path / "merged")])
    assert "differ by at most" in capsys.readouterr().err and (tmp_path / "merged" / "model.safetensors").exists()
    tables = []
    for name in ("whole", "merged"):  # an adapter's folder is measured as the model that it makes of its base
        QUANT.main(["--model", str(tmp_path / name), "--data", str(text_file), "--method", method, "--model.device", "cpu", "--model.dtype", "float32"])
        tables.append([[float(line.split()[i]) for i in (1, 3)] for line in capsys.readouterr().out.splitlines()[1:]])
    torch.testing.assert_close(*map(torch.tensor, tables), rtol=1e-3, atol=1e-3)


def test_a_foreign_model_is_packed_by_transformers(tmp_path):
    import transformers

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


def test_wrong_uses_are_one_line(tmp_path, model_folder, monkeypatch):
    with pytest.raises(UserError, match="quantization: 'nf5' is not one of none, nf4, int8"):
        MODEL.load(model_folder, quantization="nf5")
    with pytest.raises(UserError, match="model.quantization: nf4 weights cannot learn; adapters on a trained model's can"):
        SFT.main(["--model", str(model_folder), "--model.quantization", "nf4", "--out", str(tmp_path / "out")])
    with pytest.raises(UserError, match="is not one of none, nf4, int8"):
        SFT.main(["--model", str(model_folder), "--model.quantization", "nf5", "--out", str(tmp_path / "out")])
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="model.quantization: needs `pip install bitsandbytes`"):
        MODEL.load(model_folder, quantization="nf4")


def test_the_table_of_what_packing_costs(tmp_path, model_folder, text_file, capsys):
    QUANT.main(["--model", str(model_folder), "--data", str(text_file), "--method", "int8", "--model.device", "cpu"])
    head, plain, packed = capsys.readouterr().out.splitlines()
    assert head.split() == ["form", "weights", "nats", "a", "token", "perplexity", "tokens/s"]
    plain, packed = plain.split(), packed.split()
    assert plain[0] == "none" and packed[0] == "int8" and float(packed[1]) < float(plain[1])
    texts = TOKENIZER.sample_texts(TOKENIZER.DataSection(train=[str(text_file)]), part="val")
    with pytest.raises(UserError, match="has no language-model head"):
        MODEL.save(MODEL.build(MODEL.read_config(model_folder), head="score"), tmp_path / "labels")
        TOKENIZER.save(TOKENIZER.load(model_folder), tmp_path / "labels")
        QUANT.main(["--model", str(tmp_path / "labels"), "--data", str(text_file)])
    reference = INFER.score(MODEL.load(model_folder), TOKENIZER.load(model_folder), itertools.islice(texts, 100))
    assert math.isclose(float(plain[3]), reference["loss"], abs_tol=1e-4)
