"""bench/recipes: every file is valid, does what its header says, and runs to the end with a tiny model and few steps."""

import contextlib
import importlib
import json
import os
import re
import time
import urllib.request
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, free_port, launch, make_text

import MODEL
import SFT
import TOKENIZER
from MODEL import UserError

FILES = sorted((ROOT / "bench" / "recipes").glob("*.yaml"))
COMMAND = re.compile(r"^#   python (\w+)\.py((?: --\w+)*) --config (\S+)$", re.M)
PLANNED = re.compile(r'([\d.]+ [kMG]B)\s+\("([^"]+)" of `python MODEL\.py ([^`]+)`')
STAGES = {"SFT": "sft", "RL": "rl", "DISTILL": "distill", "INFER": "inference"}
# What Qwen3's template does: an empty block of reasoning in front of the last answer, none in front of earlier ones.
TEMPLATE = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
            "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
            "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
SHORT = {"SFT": ["--max-length", "128", "--max-steps", "2"], "DISTILL": ["--max-length", "128", "--max-steps", "2"],
         "RL": ["--max-length", "256", "--max-steps", "2"], "INFER": ["--max-new-tokens", "6"]}


def header_of(path: Path) -> str:
    return path.read_text().partition("\nmodel:")[0]


def program_of(path: Path) -> str:
    return COMMAND.search(header_of(path))[1]


def leaves(tree: dict, above: tuple = ()) -> dict[tuple, object]:
    """{("training", "max_steps"): 200, ...}"""
    return {key: value for name, inner in tree.items()
            for key, value in (leaves(inner, (*above, name)) if isinstance(inner, dict) else {(*above, name): inner}).items()}


def without(tree: dict, key: tuple) -> dict:
    name, *below = key
    return {k: without(inner, below) if k == name else inner for k, inner in tree.items() if below or k != name}


def settings(name: str, path: Path) -> dict:
    """All settings that a program runs with, given this file."""
    return MODEL.settings(MODEL.load_config(["--config", str(path)], importlib.import_module(name).SECTIONS, STAGES[name]))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_setting_is_valid_and_has_an_effect(path, tmp_path):
    """A recipe holds only settings of its program, and each of them changes a default."""
    name, recipe, found = program_of(path), yaml.safe_load(path.read_text()), settings(program_of(path), path)
    assert set(recipe) <= set(importlib.import_module(name).SECTIONS)
    for key, value in leaves(recipe).items():
        assert found[".".join(key)] in (value, [value]), key
        (tmp_path / "shorter.yaml").write_text(yaml.safe_dump(without(recipe, key)))
        with contextlib.suppress(UserError):  # the other settings may need this one
            assert settings(name, tmp_path / "shorter.yaml") != found, f"{key} is the default"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_header_names_the_command_and_the_planned_memory(path, capsys):
    header = header_of(path)
    [(_, _, named)] = COMMAND.findall(header)
    assert named == str(path.relative_to(ROOT)) and 3 <= len(header.splitlines()) <= 6
    [machine] = re.findall(r"^# Machine: one GPU with (\d+) GB\.", header, re.M)
    # Numbers may end a line of the header.
    planned, total = PLANNED.findall(header.replace("\n# ", " ")), 0.0
    assert planned and len(planned) == len(re.findall(r"[\d.]+ [kMG]B\b", header.partition("# Memory:")[2]))
    for size, label, flags in planned:
        MODEL.main(["--config", os.devnull, *flags.split()])
        row = {line[:24].strip(): line[24:] for line in capsys.readouterr().out.splitlines()}[label]
        assert size in re.findall(r"[\d.]+ [kMG]B", row), row
        total += float(size.split()[0]) * {"kB": 1e-6, "MB": 1e-3, "GB": 1}[size.split()[1]]
    assert total < 0.75 * int(machine)  # the rest is for activations


@pytest.mark.parametrize("tied", [True, False])
def test_the_planned_memory_of_lora_is_that_of_the_weights(tied, tmp_path):
    """A model with adapters as training holds it, tensor by tensor; a trained weight takes 12 bytes more."""
    config = MODEL.preset_config("qwen3-2m", vocab_size=500, tie_word_embeddings=tied)
    MODEL.save(MODEL.build(config), tmp_path)
    planned = MODEL.adapter_memory(MODEL.build(config, device="meta"))
    for form, expected in zip(("none", "nf4"), planned, strict=True):
        model = MODEL.load(str(tmp_path), "float32", quantization=form)
        SFT.attach_lora(model, "base", r=16)
        MODEL.narrow_frozen(model, torch.bfloat16)
        scales = [tensor for weight in model.parameters() if (state := getattr(weight, "quant_state", None)) is not None
                  for tensor in (state.absmax, state.state2.absmax)]
        held = sum(tensor.nbytes for tensor in {id(weight): weight for weight in model.parameters()}.values())
        held += sum(tensor.nbytes for tensor in scales)
        assert bool(scales) == (form == "nf4")
        held += 12 * sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        assert held == pytest.approx(expected, rel=1e-3)
    assert f"{MODEL.size_text(planned[1])} on nf4 weights" in MODEL.summary(config)


def capybara(number: int) -> dict:
    lines = make_text(4, number)
    turns = [{"content": line, "role": role} for line, role in zip(lines, ("user", "assistant") * 2)]
    return {"source": "Dove", "messages": turns[: 2 + 2 * (number % 2)], "num_turns": 1 + number % 2}


def ultrafeedback(number: int) -> dict:
    prompt, better, worse = make_text(3, number)
    question = {"content": prompt, "role": "user"}
    chosen, rejected = ([question, {"content": text, "role": "assistant"}] for text in (better, worse))
    return {"prompt": prompt, "prompt_id": f"{number:064x}", "chosen": chosen, "rejected": rejected, "messages": chosen,
            "score_chosen": 8.5, "score_rejected": 4.0}


def gsm8k(number: int) -> dict:
    return {"question": f"Mip has {number} plums and finds {number} more. How many plums has Mip?",
            "answer": f"Mip has {number}+{number}=<<{number}+{number}={2 * number}>>{2 * number} plums.\n#### {2 * number}"}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A folder in which the names of the recipes' models and datasets are folders in the hub's layout."""
    folder = tmp_path_factory.mktemp("hub")
    tokenizer = TOKENIZER.train([], kind="byte")
    tokenizer.chat_template = TEMPLATE
    for name, width in (("Qwen3-0.6B", 64), ("Qwen3-8B", 128)):
        config = MODEL.preset_config("qwen3-0.6b", vocab_size=len(tokenizer), hidden_size=width, intermediate_size=96,
                                     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                                     eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=width == 64)
        MODEL.save(MODEL.build(config, seed=width), folder / "Qwen" / name)
        TOKENIZER.save(tokenizer, folder / "Qwen" / name)
    for name, config, splits, make in (
            ("trl-lib/Capybara", "default", ("train", "test"), capybara), ("openai/gsm8k", "main", ("train", "test"), gsm8k),
            ("HuggingFaceH4/ultrafeedback_binarized", "default", ("train_prefs", "test_prefs"), ultrafeedback)):
        (folder / name).mkdir(parents=True)
        files = []
        for split, numbers in zip(splits, (range(40), range(40, 48)), strict=True):
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(make(number)) + "\n" for number in numbers))
            files.append({"split": split, "path": f"{split}.jsonl"})
        card = yaml.safe_dump({"configs": [{"config_name": config, "data_files": files}]})
        (folder / name / "README.md").write_text(f"---\n{card}---\n")
    return folder


def answer_of(port: int, process) -> dict:
    """One chat completion of the server, once it is ready."""
    data = json.dumps({"messages": [{"role": "user", "content": "Who is Mip?"}], "seed": 1}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", data)
    for _ in range(600):
        assert process.poll() is None, process.stderr.read()
        try:
            return json.loads(urllib.request.urlopen(request).read())
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the server did not start")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_runs_to_the_end(path, hub, monkeypatch, one_thread):
    """The file as it is; only lengths and steps are shorter. Names of models and datasets mean the folders of `hub`."""
    name, recipe = program_of(path), yaml.safe_load(path.read_text())
    words = ["--config", str(path), "--model.device", "cpu", *SHORT[name]]
    if name == "INFER":
        words += ["--serve", "--port", str(port := free_port())]
        process = launch(hub, ROOT / "INFER.py", *words)
        try:
            out = answer_of(port, process)
        finally:
            process.kill()
        assert out["model"] == recipe["model"]["name"] and out["usage"]["completion_tokens"] == 6
        return
    pytest.importorskip("datasets")
    monkeypatch.chdir(hub)
    words += ["--max-completion-length", "8"] if recipe.get("rl", {}).get("method") == "grpo" else []
    importlib.import_module(name).main(words)
    out = hub / recipe["output"]["dir"]
    assert json.loads((out / "result.json").read_text())["steps"] == 2
    used = leaves(yaml.safe_load((out / "config.yaml").read_text()))
    shortened = {("training", key) for key in ("epochs", "max_steps", "max_length")} | {("rl", "max_completion_length")}
    for key, value in leaves(recipe).items():
        assert key in shortened or used[key] in (value, [value]), key
    adapter = out / "adapter_config.json"
    assert adapter.exists() == ("lora" in recipe) and (out / "model.safetensors").exists() != adapter.exists()
    if "lora" in recipe:
        made = json.loads(adapter.read_text())
        assert (made["r"], made["lora_alpha"]) == (recipe["lora"]["r"], recipe["lora"]["lora_alpha"])
    if (out / "rollouts.jsonl").exists():
        rollout = json.loads((out / "rollouts.jsonl").read_text().splitlines()[0])
        assert recipe["rl"]["system"] in json.dumps(rollout) and "number_after:####" in json.dumps(rollout)
