"""Exports: each file gives the outputs of the model in its runtime."""

import copy
import json
import subprocess
import sys

import pytest
import torch

import INFER
import MODEL
import QUANT
import TOKENIZER
from bench import quant
from MODEL import UserError

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
TINY = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=64, initializer_range=0.3)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
FAMILIES = {
    "llama": {},
    "gpt2": dict(norm_type="layernorm", mlp_gated=False, attention_bias=True, attention_out_bias=True, mlp_bias=True, fused_qkv=True,
                 position_embedding_type="learned", hidden_act="gelu_new", tie_word_embeddings=True, num_key_value_heads=4),
    "qwen3": dict(qk_norm=True, head_dim=16, rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)),
    "mistral": dict(sliding_window=6),
    "mixtral": EXPERTS,
    "deepseek_v3": dict(EXPERTS, kv_lora_rank=16, q_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
                        rope_interleave=True, n_shared_experts=1, n_group=2, topk_group=1, scoring_func="sigmoid",
                        num_key_value_heads=4, mlp_only_layers=[0]),
}
PROMPT = [5, 17, 90, 3, 41]


def tiny(family: str, **changes) -> MODEL.Transformer:
    return MODEL.build(MODEL.ModelConfig(model_type=family, **{**TINY, **FAMILIES[family], **changes}), seed=3).eval()


def greedy(model, prompt: list[int], count: int) -> list[int]:
    return INFER.generate(model, [prompt], INFER.Sampling(max_new_tokens=count, temperature=0))[0][0].ids


def section(method: str = "none", group_size: int = 0) -> QUANT.QuantizationSection:
    return QUANT.QuantizationSection(method=method, group_size=group_size)


@pytest.fixture(scope="module")
def tokenizer():
    return TOKENIZER.train(["a small text"] * 4, 64, "char")


# ----------------------------------------------------------------------------------------- files that need only torch


@pytest.mark.parametrize("family", FAMILIES)
def test_torch_files_compute_the_logits_of_every_length(family, tmp_path):
    model = tiny(family)
    QUANT.EXPORTS["torch-export"](model, None, tmp_path / "program", section())
    QUANT.EXPORTS["torchscript"](model, None, tmp_path / "script", section())
    loaded = torch.export.load(tmp_path / "program").module(), torch.jit.load(tmp_path / "script")
    for length in (1, 7, 20):
        ids = torch.randint(96, (1, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            expected = model(ids).logits
            for run in loaded:
                torch.testing.assert_close(run(ids), expected, rtol=1e-3, atol=1e-3)


def test_torch_files_need_only_torch(tmp_path):
    model = tiny("llama")
    QUANT.EXPORTS["torch-export"](model, None, tmp_path / "program.pt2", section())
    QUANT.EXPORTS["torchscript"](model, None, tmp_path / "script", section())
    code = f"""
import json, sys, torch
def text(run):
    ids = {PROMPT}
    for _ in range(24):
        ids.append(int(run(torch.tensor([ids]))[0, -1].argmax()))
    return ids
print(json.dumps([text(torch.export.load("program.pt2").module()), text(torch.jit.load("script"))]))
assert not {{"MODEL", "QUANT", "transformers"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    expected = PROMPT + greedy(model, PROMPT, 24)
    assert json.loads(done.stdout) == [expected, expected]


def test_an_export_does_not_change_the_model(tmp_path):
    model = tiny("mixtral")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    QUANT.EXPORTS["torchscript"](model, None, tmp_path / "script", section())
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("to", ["torch-export", "aotinductor", "torchscript", "onnx", "openvino"])
def test_encoders_and_classifiers_are_rejected(to, tokenizer, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    encoder = MODEL.build("bert-2m")
    with pytest.raises(UserError, match="bert is an encoder"):
        QUANT.EXPORTS[to](encoder, tokenizer, tmp_path / "out", section())
    labels = MODEL.build(MODEL.ModelConfig(**TINY), head="score")
    with pytest.raises(UserError, match="has no language-model head"):
        QUANT.EXPORTS[to](labels, tokenizer, tmp_path / "out2", section())


# ------------------------------------------------------------------------------------------------------------- ONNX


def start(path):
    """A session of onnxruntime, and a function that makes its inputs without past tokens for B rows."""
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session, lambda rows: {state.name: torch.zeros(rows, state.shape[1], 0, state.shape[3]).numpy() for state in session.get_inputs()[3:]}


def step(session, ids: torch.Tensor, mask: torch.Tensor, past: dict) -> tuple[torch.Tensor, dict]:
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    given = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "position_ids": positions.numpy(), **past}
    logits, *present = session.run(None, given)
    return torch.from_numpy(logits), dict(zip(past, present, strict=True))


def greedy_onnx(path, prompt: list[int], count: int) -> list[int]:
    session, empty = start(path)
    ids, past, new = [], empty(1), prompt
    while len(ids) < count:
        mask = torch.ones(1, len(prompt) + len(ids), dtype=torch.long)
        logits, past = step(session, torch.tensor([new]), mask, past)
        new = [int(logits[0, -1].argmax())]
        ids += new
    return ids


@pytest.fixture(scope="module")
def mistral():
    """A model with grouped keys and a sliding window, and its ONNX graph with an untied output head."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = tiny("mistral", tie_word_embeddings=True)
    with QUANT.quiet():
        return model, QUANT.onnx_graph(model, True)


@pytest.fixture
def onnx_model(mistral, monkeypatch):
    """The model, with its graph reused by each export."""
    monkeypatch.setattr(QUANT, "onnx_graph", lambda model, untied: copy.deepcopy(mistral[1]))
    return mistral[0]


def test_the_onnx_folder_generates_the_same_completion(onnx_model, tokenizer, tmp_path):
    """With the names and files that onnxruntime-genai and transformers.js read."""
    QUANT.EXPORTS["onnx"](onnx_model, tokenizer, tmp_path, section())
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert names >= {"onnx/model.onnx", "config.json", "generation_config.json", "tokenizer.json", "genai_config.json"}
    assert not any("safetensors" in name for name in names)
    session, _ = start(tmp_path / "onnx/model.onnx")
    states = [f"{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]
    inputs = {value.name: value.shape for value in session.get_inputs()}
    assert list(inputs) == ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{state}" for state in states)]
    assert inputs["past_key_values.0.key"] == ["batch_size", 2, "past_sequence_length", 8]
    assert [value.name for value in session.get_outputs()] == ["logits", *(f"present.{state}" for state in states)]
    assert greedy_onnx(tmp_path / "onnx/model.onnx", PROMPT, 40) == greedy(onnx_model, PROMPT, 40)
    assert b"test_export" not in (tmp_path / "onnx/model.onnx").read_bytes()  # no stack traces


def test_onnx_rows_with_left_padding_are_independent(onnx_model, tokenizer, tmp_path):
    QUANT.EXPORTS["onnx"](onnx_model, tokenizer, tmp_path, section())
    session, empty = start(tmp_path / "onnx/model.onnx")
    rows = [PROMPT * 2, PROMPT[1:4]]
    ids, mask = torch.zeros(2, 2, 10, dtype=torch.long)
    for row, prompt in enumerate(rows):
        ids[row, 10 - len(prompt) :], mask[row, 10 - len(prompt) :] = torch.tensor(prompt), 1
    past = empty(2)
    for _ in range(12):
        logits, past = step(session, ids[:, -(1 if past["past_key_values.0.key"].shape[2] else 10) :], mask, past)
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), 1)
        mask = torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), 1)
    assert [row[-12:] for row in ids.tolist()] == [greedy(onnx_model, prompt, 12) for prompt in rows]


@pytest.mark.parametrize("method, name, product", [("int8", "model_quantized", "MatMulInteger"), ("int4", "model_q4", "MatMulNBits")])
def test_quantized_onnx(method, name, product, onnx_model, tokenizer, tmp_path):
    """All weight matrices are quantized, including the output head, and the logits stay close."""
    onnx = pytest.importorskip("onnx")
    QUANT.EXPORTS["onnx"](onnx_model, tokenizer, tmp_path, section(method))
    path = tmp_path / f"onnx/{name}.onnx"
    products = [node.op_type for node in onnx.load(path).graph.node if "MatMul" in node.op_type]
    assert products.count(product) == 2 * 7 + 1
    browser = json.loads((tmp_path / "config.json").read_text())["transformers.js_config"]
    assert browser == {"dtype": {"int8": "q8", "int4": "q4"}[method], "use_external_data_format": {f"{name}.onnx": 0}}
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    session, empty = start(path)
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        expected = onnx_model(ids).logits
    logits, _ = step(session, ids, torch.ones_like(ids), empty(1))
    assert (logits - expected).std() < (0.1 if method == "int8" else 0.4) * expected.std()


def test_large_weights_are_in_a_second_onnx_file(onnx_model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(QUANT, "ONNX_SINGLE", 1000)
    QUANT.EXPORTS["onnx"](onnx_model, tokenizer, tmp_path, section())
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == ["model.onnx", "model.onnx_data"]
    assert json.loads((tmp_path / "config.json").read_text())["transformers.js_config"]["use_external_data_format"] == {"model.onnx": 1}
    assert greedy_onnx(tmp_path / "onnx/model.onnx", PROMPT, 8) == greedy(onnx_model, PROMPT, 8)


def test_onnx_of_latent_attention_and_grouped_experts(tokenizer, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = tiny("deepseek_v3")
    QUANT.EXPORTS["onnx"](model, tokenizer, tmp_path, section())
    session, empty = start(tmp_path / "onnx/model.onnx")
    assert [empty(1)[f"past_key_values.0.{kind}"].shape for kind in ("key", "value")] == [(1, 1, 0, 16), (1, 1, 0, 4)]
    assert greedy_onnx(tmp_path / "onnx/model.onnx", PROMPT, 24) == greedy(model, PROMPT, 24)
    assert not (tmp_path / "genai_config.json").exists()


def test_onnxruntime_genai_opens_the_folder(onnx_model, tokenizer, tmp_path):
    genai = pytest.importorskip("onnxruntime_genai")
    QUANT.EXPORTS["onnx"](onnx_model, tokenizer, tmp_path, section())
    model = genai.Model(str(tmp_path))
    options = genai.GeneratorParams(model)
    options.set_search_options(max_length=len(PROMPT) + 24, do_sample=False)
    generator = genai.Generator(model, options)
    generator.append_tokens(PROMPT)
    while not generator.is_done():
        generator.generate_next_token()
    assert list(generator.get_sequence(0))[len(PROMPT) :] == greedy(onnx_model, PROMPT, 24)


def test_the_benchmark_measures_an_onnx_file(onnx_model, tokenizer, tmp_path):
    QUANT.EXPORTS["onnx"](onnx_model, tokenizer, tmp_path, section())
    comparison = QUANT.Comparison.__new__(QUANT.Comparison)
    comparison.rows, comparison.texts, comparison.original, comparison.context = {}, [PROMPT * 6, PROMPT], None, 64
    expected = comparison.quality(lambda ids: onnx_model(torch.tensor([ids])).logits[0])
    quant.add(comparison, "onnxruntime", quant.OnnxRuntime, tmp_path)
    row = comparison.rows["onnxruntime"]
    assert {title: row[title] for title in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert row["size, MB"] == (tmp_path / "onnx/model.onnx").stat().st_size / 1e6
    assert row["decode, tokens/s"] > 0 and row["prefill, tokens/s"] > 0
    times = quant.OnnxRuntime(tmp_path, 64).times(PROMPT, 5)
    assert len(times) == 5 and times == sorted(times)


def test_onnx_is_computed_in_float32(onnx_model, tokenizer, tmp_path, monkeypatch):
    """onnxruntime has no bfloat16 on CPUs."""
    dtypes, graph = [], QUANT.onnx_graph
    monkeypatch.setattr(QUANT, "onnx_graph", lambda model, untied: dtypes.append(model.dtype) or graph(model, untied))
    monkeypatch.setattr(QUANT, "check_onnx", lambda path, model, exact: dtypes.append(model.dtype))
    QUANT.EXPORTS["onnx"](copy.deepcopy(onnx_model).bfloat16(), tokenizer, tmp_path, section())
    assert dtypes == [torch.float32] * 2


def test_unsupported_methods_and_missing_packages_are_one_line_errors(onnx_model, tokenizer, tmp_path, monkeypatch):
    for to, method, message in (("onnx", "nf4", "--to onnx supports none, int8, int4, not nf4"), ("tensorrt", "int8", "supports none, not int8"),
                                ("gguf", "int4", "--to gguf supports none, not int4; see quantization.gguf_type"),
                                ("torchscript", "bf16", "--to torchscript supports none, not bf16")):
        with pytest.raises(UserError, match=message):
            QUANT.export(onnx_model, tokenizer, to, tmp_path / "rejected", section(method))
    with pytest.raises(UserError, match="onnxruntime supports groups of 16, .* 256, not 7"):
        QUANT.export(onnx_model, tokenizer, "onnx", tmp_path, section("int4", 7))
    for package, to in (("onnxscript", "onnx"), ("onnx", "tensorrt")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UserError, match=f"--to onnx: needs {package}; pip install -r requirements-extras.txt"):
            QUANT.EXPORTS[to](onnx_model, tokenizer, tmp_path, section())


def test_a_quantized_model_is_exported_only_to_torch_formats(tmp_path):
    model = QUANT.quantize(tiny("llama"), "int8")
    for to in ("gguf", "onnx", "openvino", "torchscript"):
        with pytest.raises(UserError, match=f"--to {to}: the model is already quantized .int8.; use the original model"):
            QUANT.export(model, None, to, tmp_path / "out")
    QUANT.export(model, None, "torch-export", tmp_path / "out.pt2")
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(tmp_path / "out.pt2").module()(ids), model(ids).logits)


def test_a_folder_name_may_contain_a_dot(monkeypatch, tmp_path):
    monkeypatch.setitem(QUANT.EXPORTS, "gguf", lambda model, tokenizer, target, section: target.mkdir())
    for name in ("Qwen2.5-gguf", "version.one"):
        (tmp_path / "version.one").mkdir(exist_ok=True)
        QUANT.export(tiny("llama"), None, "gguf", tmp_path / name)
    with pytest.raises(UserError, match="model.gguf is the name of a file, but --to gguf writes a folder"):
        QUANT.export(tiny("llama"), None, "gguf", tmp_path / "model.gguf")


# ----------------------------------------------------------------------------------------------------- other programs


def program(folder, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def test_tensorrt_gets_an_onnx_model_and_its_shapes(onnx_model, tokenizer, tmp_path, monkeypatch, capsys):
    """trtexec is replaced by a program that records its arguments."""
    QUANT.EXPORTS["tensorrt"](onnx_model, tokenizer, tmp_path / "bare", section())
    assert "trtexec is not on PATH" in capsys.readouterr().err
    program(tmp_path / "bin", "trtexec", 'printf "%s\\n" "$@" > model.engine')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    subprocess.run(["sh", tmp_path / "bare/build_engine.sh"], check=True)
    QUANT.EXPORTS["tensorrt"](onnx_model, tokenizer, tmp_path / "built", section())
    flags = (tmp_path / "built/model.engine").read_text().splitlines()
    assert (tmp_path / "bare/model.engine").read_text().splitlines() == flags
    assert flags[:2] == ["--onnx=onnx/model.onnx", "--saveEngine=model.engine"]
    assert flags[3].startswith("--optShapes=input_ids:1x1,attention_mask:1x33,position_ids:1x1,past_key_values.0.key:1x2x32x8,")
    program(tmp_path / "bin", "trtexec", "echo no GPU >&2; exit 1")
    with pytest.raises(UserError, match="trtexec failed: no GPU"):
        QUANT.EXPORTS["tensorrt"](onnx_model, tokenizer, tmp_path / "failed", section())


def test_openvino_gets_a_hugging_face_folder(tokenizer, tmp_path, monkeypatch):
    """optimum-cli is replaced by a program that copies the folder and records its arguments."""
    model = tiny("llama")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin/python"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with pytest.raises(UserError, match="optimum-cli is not on PATH; pip install optimum-intel"):
        QUANT.EXPORTS["openvino"](model, tokenizer, tmp_path / "out", section())
    program(tmp_path / "bin", "optimum-cli", 'for last; do :; done; cp -r "$4" "$last"; echo "$@" > "$last/flags"')
    QUANT.EXPORTS["openvino"](model, tokenizer, tmp_path / "out", section("int4"))
    assert greedy(MODEL.load(tmp_path / "out"), PROMPT, 8) == greedy(model, PROMPT, 8)
    assert TOKENIZER.load(tmp_path / "out").get_vocab() == tokenizer.get_vocab()
    assert "--weight-format int4 --sym --ratio 1.0 --group-size 32" in (tmp_path / "out/flags").read_text()
    program(tmp_path / "bin", "optimum-cli", "echo ValueError: unknown architecture >&2; exit 1")
    with pytest.raises(UserError, match="optimum-cli failed: ValueError: unknown architecture"):
        QUANT.EXPORTS["openvino"](model, tokenizer, tmp_path / "other", section())
