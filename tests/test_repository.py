"""Properties of the whole repository: imports between files, settings, documentation, data, and copies of some files."""

import ast
import dataclasses
import importlib
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, dockerfile, in_file, make_text

import DISTILL
import INFER
import MODEL
import QUANT
import RL
import SFT
import TOKENIZER
import TRAIN
from MODEL import UserError

FILES = ["MODEL", "TOKENIZER", "INFER", "TRAIN", "SFT", "RL", "DISTILL", "QUANT"]
PRESENT = [name for name in FILES if (ROOT / f"{name}.py").exists()]
HEAVY = ["transformers", "accelerate", "peft", "bitsandbytes", "matplotlib", "pyarrow", "huggingface_hub"]
TINY = ("--model.preset llama-1m --model.hidden_size 32 --model.num_hidden_layers 2 --model.num_attention_heads 4 --model.device cpu "
        "--tokenizer.kind byte --max-length 32 --batch-size 4 --max-steps 2 --training.sample_tokens 0").split()


def tree(name: str) -> ast.Module:
    return ast.parse((ROOT / f"{name}.py").read_text())


def python(code: str, folder: Path, *argv: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, *map(str, argv)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=180)


# ------------------------------------------------------------------------------------------------------ imports


@pytest.mark.parametrize("name", PRESENT)
def test_a_file_imports_only_files_above_it(name):
    imported = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    below = {other for other in FILES if FILES.index(other) >= FILES.index(name)}
    if name in ("MODEL", "TRAIN"):
        below -= {"QUANT"}  # imported by these files above it, inside functions
    assert not imported & below


@pytest.mark.parametrize("name", PRESENT)
def test_heavy_packages_are_imported_inside_functions(name):
    top = [node for node in tree(name).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = {alias.name.split(".")[0] for node in top if isinstance(node, ast.Import) for alias in node.names}
    modules |= {(node.module or "").split(".")[0] for node in top if isinstance(node, ast.ImportFrom)}
    allowed = set(FILES) | {"torch", "numpy", "safetensors"} | sys.stdlib_module_names
    assert not modules - allowed


def test_nothing_from_outside_is_unpickled():
    seen = 0
    for name in PRESENT:
        for node in ast.walk(tree(name)):
            if not isinstance(node, ast.Call):
                continue
            call = ast.unparse(node.func)
            assert call not in ("pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load", "eval", "exec"), (name, node.lineno)
            if call == "torch.load":
                seen += 1
                assert {k.arg: ast.unparse(k.value) for k in node.keywords}.get("weights_only") == "True", (name, node.lineno)
            if call in ("np.load", "numpy.load"):
                assert not any(k.arg == "allow_pickle" and ast.unparse(k.value) == "True" for k in node.keywords), (name, node.lineno)
    assert seen >= 2
    assert not [name for name in PRESENT if "trust_remote_code=True" in (ROOT / f"{name}.py").read_text()]


QUIET = """
import importlib, json, os, signal, sys, threading, torch
def state():
    return [dict(os.environ), torch.get_num_threads(), str(torch.get_default_dtype()), torch.initial_seed(), threading.active_count(),
            str(signal.getsignal(signal.SIGINT)), sorted(os.listdir(".")), torch.are_deterministic_algorithms_enabled()]
heavy, scripts = json.loads(sys.argv[1])
before = state()
modules = {name: importlib.import_module(name) for name in scripts}
print(json.dumps(["import", state() == before, [m for m in heavy if m in sys.modules]]))
import io, contextlib
for name, module in modules.items():
    with contextlib.redirect_stdout(io.StringIO()) as text:
        try:
            module.main(["--help"])
            code = None
        except SystemExit as stop:
            code = stop.code
    print(json.dumps([name, code == 0 and "--config FILE" in text.getvalue(), [m for m in heavy if m in sys.modules]]))
"""


def test_imports_and_help_have_no_side_effects(tmp_path):
    done = python(QUIET, tmp_path, json.dumps([HEAVY, PRESENT]))
    assert done.returncode == 0 and done.stderr == "", done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["import", *PRESENT]
    for name, unchanged, heavy in lines:
        assert unchanged and heavy == [], (name, heavy)


# ------------------------------------------------------------------------------------------------------ settings


def all_sections() -> dict:
    found = {}
    for name in PRESENT[1:]:
        found.update(importlib.import_module(name).SECTIONS)
    return found


def default(field: dataclasses.Field):
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()


def test_config_yaml_has_the_defaults_and_comments_of_the_settings():
    """At most 90 lines. Keys, defaults and comments are those of the dataclasses, up to a semicolon in the comment."""
    lines, sections, section, seen = (ROOT / "config.yaml").read_text().splitlines(), all_sections(), None, []
    assert len(lines) <= 90
    for line in lines:
        if match := re.fullmatch(r"(\w+):", line):
            section = match[1]
        elif line.startswith("  "):
            key, text, comment = re.fullmatch(r"  (\w+): (.*?)(?:\s+# (.*))?", line).groups()
            field = {f.name: f for f in dataclasses.fields(sections[section])}[key]
            value = MODEL.convert(yaml.safe_load(text), MODEL.field_types(sections[section])[key], key, field.metadata["choices"])
            assert value == default(field) and type(value) is type(default(field)) and value is not None, line
            assert field.metadata["comment"].startswith(comment or "overrides"), line
            seen.append((section, key))
        else:
            assert not line or line.startswith("# "), line
    assert len(set(seen)) == len(seen) > 55
    for shown in ("model.preset", "model.dtype", "training.grad_accum", "training.mixed_precision", "training.fsdp", "lora.r", "rl.method", "rl.epsilon",
                  "quantization.method", "inference.use_cache"):
        assert tuple(shown.split(".")) in seen


def test_config_yaml_gives_the_default_settings():
    for script, stage in ((TRAIN, "training"), (SFT, "sft"), (RL, "rl"), (DISTILL, "distill"), (INFER, "inference"), (QUANT, "quantization")):
        file, bare = (MODEL.load_config(argv, script.SECTIONS, stage) for argv in (["--config", str(ROOT / "config.yaml")], ["--config", os.devnull]))
        assert {name: getattr(file, name) for name in script.SECTIONS} == {name: getattr(bare, name) for name in script.SECTIONS}, stage


def test_printed_settings_are_a_valid_config_file(tmp_path, capsys):
    flags = ["--max-steps", "7", "--rl.reward_funcs", "length:60", "regex:a # \"b\": [c]", "--rl.method", "grpo", "--rl.system", "two\nlines", "--learning-rate", "1e-05"]
    with pytest.raises(SystemExit):
        MODEL.load_config([*flags, "--print-config"], RL.SECTIONS, "rl")
    (tmp_path / "all.yaml").write_text(capsys.readouterr().out)
    again, given = (MODEL.load_config(argv, RL.SECTIONS, "rl") for argv in (["--config", str(tmp_path / "all.yaml")], flags))
    assert {name: getattr(again, name) for name in RL.SECTIONS} == {name: getattr(given, name) for name in RL.SECTIONS}
    for name, kind in RL.SECTIONS.items():
        for field in dataclasses.fields(kind):
            if not isinstance(default(field), dict) or field.name not in MODEL.SECTIONS:
                assert re.search(rf"^  {field.name}: .*# {re.escape(field.metadata['comment'])}$", (tmp_path / "all.yaml").read_text(), re.M), (name, field.name)


NUMBERS = [(name, field.name) for name, kind in (("training", TRAIN.TrainingSection), ("data", TRAIN.SECTIONS["data"]), ("tokenizer", TRAIN.SECTIONS["tokenizer"]), ("model", MODEL.ModelSection),
                                                 ("lora", SFT.LoraSection), ("sft", SFT.SFTSection), ("rl", RL.RLSection), ("distill", DISTILL.DistillSection),
                                                 ("inference", INFER.InferenceSection), ("quantization", QUANT.QuantizationSection))
           for field in dataclasses.fields(kind) if re.search(r"\b(int|float)\b", str(MODEL.field_types(kind)[field.name]))]


@pytest.mark.parametrize("section, key", NUMBERS)
def test_every_number_is_accepted_or_an_error_that_names_the_key(section, key):
    """An impossible value is an error in one line that names the key."""
    script, stage = next((script, stage) for script, stage in ((TRAIN, "training"), (SFT, "sft"), (RL, "rl"), (DISTILL, "distill"), (INFER, "inference"), (QUANT, "quantization"))
                       if section in script.SECTIONS)
    kind = MODEL.field_types(script.SECTIONS[section])[key]
    field = {f.name: f for f in dataclasses.fields(script.SECTIONS[section])}[key]
    needs = [f"--{section}.{field.metadata['only'][0]}", str(field.metadata["only"][1])] if field.metadata["only"][1:] else []
    for text in (".nan", ".inf", "-.inf", "1e999", "-1", "0", "1e30", "text", "[1, 2]", "{a: 1}", "null", "true", str(2**64)):
        try:
            config = MODEL.load_config(["--config", os.devnull, *needs, f"--{section}.{key}={text}"], script.SECTIONS, stage)
        except UserError as error:
            assert f"{section}.{key}" in str(error) and "\n" not in str(error), (text, error)
            continue
        value = getattr(getattr(config, section), key)
        for number in value if isinstance(value, list) else [value]:
            assert number is None or isinstance(number, str) or math.isfinite(number) and abs(number) <= 10**30, (text, value)
        assert text not in (".nan", ".inf", "-.inf", "1e999", "text") or "str" in str(kind), (text, value)


def test_every_setting_accepts_its_default():
    sections = all_sections()
    for name, kind in sections.items():
        owner = next(s for s in map(importlib.import_module, PRESENT[1:]) if name in s.SECTIONS)
        stage = list(owner.SECTIONS)[-1] if name not in ("training", "inference") else name
        for field in dataclasses.fields(kind):
            value = default(field)
            if isinstance(value, dict):
                continue  # the keys of a stage block are separate flags
            text = value if isinstance(value, str) else json.dumps(value)
            config = MODEL.load_config([f"--{name}.{field.name}", text], owner.SECTIONS, stage)
            assert getattr(getattr(config, name), field.name) == value, (name, field.name)


def load(argv=(), text: str | None = None, folder: Path | None = None, script=TRAIN, stage="training", **more):
    argv = [str(argument) for argument in argv]
    if text is not None:
        path = folder / "settings.yaml"
        path.write_text(text)
        argv = ["--config", str(path), *argv]
    return MODEL.load_config(argv, script.SECTIONS, stage, script.ACTIONS, **more)


WRONG = {
    "training: {learning_rat: 1}": "settings.yaml: training.learning_rat: unknown key; nearest is 'learning_rate'",
    "trainig: {epochs: 1}": "settings.yaml: unknown section 'trainig'; nearest is 'training'",
    "training: {batch_size: many}": "settings.yaml: training.batch_size: 'many' is not of type int",
    "training: {batch_size: 1.5}": "settings.yaml: training.batch_size: 1.5 is not of type int",
    "training: {batch_size: true}": "settings.yaml: training.batch_size: True is not of type int",
    "training: {fsdp: 1}": "settings.yaml: training.fsdp: 1 is not of type bool",
    "training: {batch_size: null}": "settings.yaml: training.batch_size: a value is required, not null",
    "training: {optim: adam}": "settings.yaml: training.optim: 'adam' is not one of .*nearest: adamw",
    "training: 3": "settings.yaml: training: expected keys and values, found 3",
    "- a list": "settings.yaml: expected sections such as 'model:'",
    "model: {name: gpt2, preset: llama-1m}": "settings.yaml: model.name and model.preset are mutually exclusive",
    "model: {name: gpt2}\ntraining: [1\nb: 2": r"settings.yaml:3: not valid YAML",
    "training: {epochs: null}": "settings.yaml: training.epochs: set one of epochs, max_steps and max_minutes",
    "training: {max_steps: 1:30}": "settings.yaml: training.max_steps: '1:30' is not of type int",
    "training: {? [a, b] : 4}": "settings.yaml:1: not valid YAML .keys must be strings",
    "training: {epochs: 1\0}": "settings.yaml:1: not valid YAML",
    "training: {epochs: 1}\ntraining: {max_length: 8}": "settings.yaml:2: not valid YAML .*duplicate key 'training'",
    "training:\n  epochs: 1\n  epochs: 2": "settings.yaml:3: not valid YAML .*duplicate key 'epochs'",
    "data: {weights: [1]}": "data.weights: expected one per path in data.train .2., found 1",
}


@pytest.mark.parametrize("text", WRONG)
def test_an_invalid_file_is_an_error_with_file_and_key(text, tmp_path):
    with pytest.raises(UserError, match=WRONG[text]) as error:
        load(text=text, folder=tmp_path)
    assert "\n" not in str(error.value)


WRONG_FLAGS = {
    ("--learnin-rate", "1"): "--learnin-rate: unknown flag; nearest is --learning_rate",
    ("--training.epoch", "1"): "--training.epoch: unknown flag; nearest is --training.epochs",
    ("--model.num_layers", "2"): "--model.num_layers: unknown flag; nearest is --model.num_hidden_layers",
    ("--batch-size", "x"): "command line: training.batch_size: 'x' is not of type int",
    ("--batch-size",): "--batch-size: a value is missing",
    ("--model", "a", "--model.preset", "llama-1m"): "command line: model.name and model.preset are mutually exclusive",
    ("stray",): "'stray': unexpected argument",
    ("--overwrite=no",): "--overwrite: does not take a value",
    ("--lr=",): "--lr: the value is empty",
    ("--resume", ""): "--resume: the value is empty",
    ("--config", "/nowhere.yaml"): "--config: file not found: '/nowhere.yaml'",
    ("--rl.beta", "1"): "--rl.beta: 'rl' is a section of another script",
    ("--inference.temperature", "1"): "--inference.temperature: 'inference' is a section of another script",
    ("--model.preset", "mixtral-tiny", "--model.num_experts", "null"): "command line: model.num_experts: null is the preset's value, 8",
    ("--batch-size", "null"): "command line: training.batch_size: a value is required",
}


@pytest.mark.parametrize("argv", WRONG_FLAGS)
def test_an_invalid_flag_is_an_error(argv):
    with pytest.raises(UserError, match=WRONG_FLAGS[argv]):
        load(argv)


def test_flags_of_other_scripts_are_errors():
    for flag in ("--sft.task", "--inference.temperature"):
        with pytest.raises(UserError, match=f"{flag}: '.*' is a section of another script"):
            RL.main([flag, "0.5"])


def test_numbers_that_yaml_parses_as_text(tmp_path):
    assert load(text="training: {learning_rate: 3e-5}", folder=tmp_path).training.learning_rate == 3e-5
    assert load(["--learning-rate", "3e-5"]).training.learning_rate == 3e-5
    assert load(["--training.batch_size", "1e2"]).training.batch_size == 100


def test_lists_have_yaml_syntax():
    assert load(["--model.layer_types", "[full_attention, sliding_attention]"]).model.layer_types == ["full_attention", "sliding_attention"]
    assert load(["--model.mlp_only_layers", "[0, 2]"]).model.mlp_only_layers == [0, 2]


def test_a_later_model_replaces_an_earlier_model_and_its_settings(tmp_path):
    text = "model: {preset: llama-1m, hidden_size: 64, dtype: float32}\ntokenizer: {kind: char}\n"
    kept = load(text=text, folder=tmp_path)
    assert (kept.model.preset, kept.model.name, kept.model.hidden_size, kept.tokenizer.kind) == ("llama-1m", None, 64, "char")
    fresh = load(["--model.preset", "llama-14m"], text, tmp_path)
    assert (fresh.model.preset, fresh.model.hidden_size, fresh.tokenizer.kind) == ("llama-14m", None, "char")
    named = load(["--model", "gpt2", "--model.sliding_window", "3"], text, tmp_path)
    assert (named.model.name, named.model.preset, named.model.hidden_size, named.model.sliding_window) == ("gpt2", None, None, 3)
    assert named.tokenizer.kind == "bpe" and named.model.dtype == "float32"  # settings of the computation are kept


def test_null_on_the_command_line_unsets():
    """`--model.name null` equals `name: null` in a file: the preset is kept. `--max-steps null` keeps the epochs."""
    config = load(["--model.name", "null", "--max-steps", "null"])
    assert (config.model.name, config.model.preset, config.training.epochs) == (None, "llama-1m", 2.5)


def test_stage_blocks_override_shared_sections_and_flags_override_both(tmp_path):
    def name(*argv, text="model: {name: shared}\ninference: {model: {name: block}, seed: 3}\n"):
        return load(argv, text, tmp_path, INFER, "inference").model.name

    assert name(text="") == "./out"  # the default of INFER.py
    assert name(text="model: {name: shared}") == "shared"
    assert name() == "block"
    assert name("--model", "flag") == "flag"
    assert name("--model", "flag", "--inference.model.name", "prefixed") == "prefixed"
    assert load([], "model: {preset: llama-1m}", tmp_path).model.preset == "llama-1m"
    with pytest.raises(UserError, match="inference.*nam.*nearest is 'name'"):
        name(text="inference: {model: {nam: x}}")


def test_a_stage_block_of_another_type_is_an_error(tmp_path):
    for argv, text in ((["--inference.model", "x"], ""), ([], "inference: {model: x}")):
        with pytest.raises(UserError, match="inference.model"):
            load(argv, text, tmp_path, INFER, "inference")


def test_short_flags_depend_on_the_sections_of_the_script():
    config = load("--data a.txt b.jsonl --out o --epochs 2 --batch-size 3 --grad_accum 4 --max-length 5".split())
    assert (config.data.train, config.output.dir, config.training.epochs) == (["a.txt", "b.jsonl"], "o", 2.0)
    assert (config.training.batch_size, config.training.grad_accum, config.training.max_length) == (3, 4, 5)
    infer = load(["--seed", "7", "--batch-size", "2"], script=INFER, stage="inference")
    assert (infer.inference.seed, infer.inference.batch_size) == (7, 2)
    for flag in ("--epochs", "--grad-accum", "--learning-rate", "--max-length", "--max-steps", "--out"):
        with pytest.raises(UserError, match=f"{flag}: "):
            load([flag, "1"], script=INFER, stage="inference")


def test_later_config_files_override_earlier_files(tmp_path):
    for name, text in (("a", "model: {preset: llama-225k, hidden_size: 64}\ntraining: {max_steps: 7, max_length: 48, seed: 1}"), ("b", "model: {name: some/folder}\ntraining: {epochs: 3, seed: 2}")):
        (tmp_path / f"{name}.yaml").write_text(text)
    config = load(["--config", tmp_path / "a.yaml", "--config", tmp_path / "b.yaml", "--seed", "3"])
    assert (config.model.name, config.model.preset, config.model.hidden_size) == ("some/folder", None, None)
    assert (config.training.epochs, config.training.max_steps, config.training.max_length, config.training.seed) == (3.0, None, 48, 3)
    (tmp_path / "a.yaml").write_text("training: {epochs: 7}\ninference: {seed: 1, model: {name: one}}")
    (tmp_path / "b.yaml").write_text("model: {name: two}")
    assert load(["--config", tmp_path / "a.yaml", "--config", tmp_path / "b.yaml"], script=INFER, stage="inference").model.name == "two"
    (tmp_path / "a.yaml").write_text("training: {learing_rate: 1}")
    with pytest.raises(UserError, match=r"a\.yaml: training.learing_rate: unknown key; nearest is 'learning_rate'"):
        load(["--config", tmp_path / "a.yaml", "--config", tmp_path / "b.yaml"])


def test_a_repeated_flag_extends_a_list_and_is_otherwise_an_error():
    assert load(["--data", "a.txt", "--data", "b.txt", "c.txt"]).data.train == ["a.txt", "b.txt", "c.txt"]
    assert load(["--data.weights", "[1]", "--data.weights", "2"]).data.weights == [1.0, 2.0]
    assert load(["--init_layers", "0", "--init_layers", "null"], script=DISTILL, stage="distill").distill.init_layers == [0]
    for argv in (["--seed", "1", "--seed", "2"], ["--lr", "1", "--learning-rate", "1"], ["--resume", "a", "--resume", "b"]):
        with pytest.raises(UserError, match="given more than once; give it once"):
            load(argv)
    with pytest.raises(UserError, match="--prompt: given more than once"):
        load(["--prompt", "a", "--prompt", "b"], script=INFER, stage="inference")


def test_common_spellings_of_values(tmp_path):
    def infer(*argv):
        return load(argv, script=INFER, stage="inference")

    for text in ("no", "No", "off", "false", '"no"'):
        assert load(text=f"training: {{mixed_precision: {text}}}", folder=tmp_path).training.mixed_precision == "no"
    for words, stop in ((["[INST]"], ["[INST]"]), (['["[INST]", "b"]'], ["[INST]", "b"]), (["a", "[INST]"], ["a", "[INST]"]), (["a, b"], ["a, b"])):
        assert infer("--stop", *words).inference.stop == stop
    for prompt in ("-h", "--help", "--config", "-1"):
        assert infer("--prompt", prompt).actions.prompt == infer(f"--prompt={prompt}").actions.prompt == prompt
    assert load(["--lora.target_modules", "[q_proj]"], script=SFT, stage="sft").lora.target_modules == ["q_proj"]
    assert load(["--task", "classify", "--class-weights", "{a: 2}"], script=SFT, stage="sft").sft.class_weights == {"a": 2}


def test_settings_without_effect_are_errors_and_not_in_the_help(capsys):
    for script, stage, argv, message in ((RL, "rl", ["--lam", "0.9"], "rl.lam: has no effect with rl.method dpo .only with ppo."),
                                         (SFT, "sft", ["--class-weights", "balanced"], "sft.class_weights: has no effect with sft.task chat"),
                                         (DISTILL, "distill", ["--hidden-weight", "2"], "distill.hidden_weight: has no effect with distill.method logits")):
        with pytest.raises(UserError, match=message):
            load(argv, script=script, stage=stage)
    with pytest.raises(UserError, match="model.v_head_dim: has no effect without model.kv_lora_rank"):
        MODEL.preset_config("llama-1m", v_head_dim=8)
    pages = {}
    for method in ("dpo", "ppo"):
        with pytest.raises(SystemExit):
            load(["--help", "--method", method] if method == "dpo" else ["--method", method, "--help"], script=RL, stage="rl")
        pages[method] = capsys.readouterr().out
    assert "label_smoothing" in pages["dpo"] and "\n  lam " not in pages["dpo"] and "\n  lam " in pages["ppo"] and "label_smoothing" not in pages["ppo"]


@pytest.mark.parametrize("script, stage, shown", [(TRAIN, "training", {"epochs": "2.5"}), (SFT, "sft", {"epochs": "5.0", "batch_size": "8", "dir": "./out/sft"}),
                                                  (RL, "rl", {"max_steps": "100", "epochs": "null", "name": "./out/sft"}), (DISTILL, "distill", {"preset": "llama-225k"}),
                                                  (INFER, "inference", {"name": "./out"}), (QUANT, "quantization", {"name": "./out"})])
def test_help_shows_the_values_in_use(script, stage, shown, capsys):
    def page(*argv):
        with pytest.raises(SystemExit) as stop:
            MODEL.load_config(list(argv), script.SECTIONS, stage, getattr(script, "ACTIONS", {}), script.__doc__)
        assert not stop.value.code
        return capsys.readouterr().out

    first = page("--config", str(ROOT / "config.yaml"), "--help")
    assert len(first.splitlines()) <= 60
    assert re.findall(r"^(\w+):$", first, re.M)[0] == stage
    for key, value in shown.items():
        assert re.search(rf"^  {key} +{re.escape(value)} ", first, re.M), key
    assert "initializer_range" not in first and "initializer_range" in page("--help", "model") and "--seed" not in page("--help", "model")
    with pytest.raises(UserError, match="unknown section; the sections are"):
        page("--help", "nothing")
    assert page("--version") == f"{MODEL.VERSION}\n" and f'version = "{MODEL.VERSION}"' in (ROOT / "pyproject.toml").read_text()


def test_errors_name_the_file_that_set_the_value(tmp_path, capsys):
    (tmp_path / "settings.yaml").write_text("data: {train: nowhere.txt}\nmodel: {preset: llama-225k}\nsft: {model: {name: nowhere}}\n")
    for main, origin in ((TRAIN.main, "(set in {})"), (SFT.main, "(set in {}: sft)")):
        with pytest.raises(SystemExit):
            MODEL.run_main(main, ["--config", str(tmp_path / "settings.yaml"), "--out", str(tmp_path / "out")])
        assert origin.format(tmp_path / "settings.yaml") in capsys.readouterr().err.splitlines()[-1]
    MODEL.load_config(["--config", str(tmp_path / "settings.yaml")], SFT.SECTIONS, "sft")
    assert load(["--model.eos_token_id", "2"]).model.eos_token_id == 2
    MODEL.load_config(["--config", str(tmp_path / "settings.yaml"), "--data", "x"], TRAIN.SECTIONS, "training")
    assert "data.train" not in MODEL.ORIGINS and "model.preset" in MODEL.ORIGINS  # set by the flag, not by the file
    MODEL.load_config(["--config", str(tmp_path / "settings.yaml")], SFT.SECTIONS, "sft")
    assert MODEL.ORIGINS["data.train"] == f"set in {tmp_path / 'settings.yaml'}; sft.data.train overrides it for sft"


def test_errors_of_new_users_name_the_next_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("a line")
    (tmp_path / "conversations.jsonl").write_text('{"messages": []}')
    (tmp_path / "judge.py").write_text("def kind(completions): ...\ndef short(completions): ...")
    for main, argv, message in ((SFT.main, [], f"model.name: folder not found: './out' (in {tmp_path}); train it first: python TRAIN.py"),
                                (RL.main, [], f"model.name: folder not found: './out/sft' (in {tmp_path}); train it first: python SFT.py"),
                                (DISTILL.main, [], "distill.teacher: ./out contains no finished model; train it first: python TRAIN.py"),
                                (INFER.main, ["--prompt", "x"], "model.name: ./out contains no finished model; train it first: python TRAIN.py"),
                                (SFT.main, ["--model", "llama-1m"], "'llama-1m' is a preset without trained weights; train it first: python TRAIN.py --preset llama-1m"),
                                (MODEL.main, ["--out", "x"], "--out: 'output' is a section of another script"),
                                (TRAIN.main, ["--data", "conversations.jsonl"], "conversations are for SFT.py")):
        with pytest.raises(UserError, match=re.escape(message)):
            main(argv)
    with pytest.raises(UserError, match="choose a function: judge.py:kind, judge.py:short"):
        RL.Judges.find("judge.py", None, "cpu")
    with pytest.raises(UserError, match="plain text is for TRAIN.py"):
        next(TOKENIZER.read_records(tmp_path / "notes.txt"))


def test_an_error_is_one_line_with_exit_status_2(capsys):
    with pytest.raises(SystemExit) as stop:
        MODEL.run_main(TRAIN.main, ["--training.epoch", "1"])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("error: ")


# ---------------------------------------------------------------------------------------------- packages and copies

HIDDEN = """
import json, os, sys
for name in ("accelerate", "peft", "bitsandbytes", "matplotlib", "pyarrow"):
    sys.modules[name] = None  # its import fails as if it were not installed
import INFER, MODEL, TRAIN
argv = json.loads(sys.argv[1])
def error(call, *args):
    try:
        call(*args)
    except MODEL.UserError as problem:
        print("error:", problem)
TRAIN.main([*argv, "--out", "out"])
INFER.main(["--model", "out", "--prompt", "The", "--max-new-tokens", "4", "--model.device", "cpu"])
error(TRAIN.main, [*argv, "--out", "a", "--training.optim", "adamw_8bit"])
error(TRAIN.main, [*argv, "--out", "b", "--data", "table.parquet", "--data.dir", "other"])
error(TRAIN.main, [*argv, "--out", "c", "--training.report_to", "tensorboard"])
os.environ["WORLD_SIZE"] = "2"
error(TRAIN.main, [*argv, "--out", "d"])
"""


def test_missing_packages_are_errors_only_where_they_are_used(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(make_text(60)))
    (tmp_path / "table.parquet").write_bytes(b"PAR1")
    done = python(HIDDEN, tmp_path, json.dumps(in_file(tmp_path / "usual.yaml", [*TINY, "--data", "text.txt", "--data.dir", "ids"], TRAIN, "training")))
    assert done.returncode == 0, done.stderr
    assert "no plot: matplotlib is not installed" in done.stderr and not (tmp_path / "out" / "loss.png").exists()
    assert (tmp_path / "out" / "model.safetensors").exists()
    errors = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    expected = (["adamw_8bit", "pip install bitsandbytes"], ["parquet", "pip install pyarrow"],
                ["tensorboard", "pip install accelerate"], ["several processes", "pip install accelerate"])
    for line, parts in zip(errors, expected, strict=True):
        assert all(part in line for part in parts), line


def copied(folder: Path, *names: str) -> Path:
    for name in names:
        shutil.copy(ROOT / f"{name}.py", folder / f"{name}.py")
    return folder


def script(folder: Path, name: str, *argv) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, f"{name}.py", *map(str, argv)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=180)


def test_a_copy_of_the_first_three_files_generates(tmp_path, model_folder):
    shutil.copy(ROOT / "config.yaml", tmp_path / "config.yaml")  # sections of other scripts are ignored
    done = script(copied(tmp_path, *FILES[:3]), "INFER", "--model", model_folder, "--prompt", "The red", "--max-new-tokens", 5,
                  "--temperature", 0, "--model.device", "cpu")
    assert done.returncode == 0, done.stderr
    tokenizer = TOKENIZER.load(model_folder)
    ids = TOKENIZER.encode_prompt(tokenizer, "The red")
    [[expected]] = INFER.generate(MODEL.load(str(model_folder)), [ids], INFER.Sampling(5, 0.0), tokenizer)
    assert done.stdout == expected.text + "\n"


def test_a_copy_of_the_first_four_files_trains(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(make_text(60)))
    done = script(copied(tmp_path, *FILES[:4]), "TRAIN", *TINY, "--data", "text.txt", "--data.dir", "ids")
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert {"model.safetensors", "tokenizer.json", "result.json", "log.jsonl"} <= {path.name for path in (tmp_path / "out").iterdir()}


# ----------------------------------------------------------------------------------------------------- container


def instructions(name: str) -> list[str]:
    return [rest for found, rest in dockerfile() if found == name]


def settings(command: list[str], capsys) -> dict:
    """The settings of a command in a container."""
    python, name, *argv = command
    assert python == "python"
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(Path(name).stem).main([*argv, "--print-config"])
    assert not stop.value.code
    return yaml.safe_load(capsys.readouterr().out)


def test_the_image_installs_the_requirements_and_runs_as_a_user():
    runs, values = " ".join(instructions("RUN")), dict(argument.split("=") for argument in instructions("ARG"))
    listed = set(re.findall(r"-r (\S+)", runs))
    assert listed == {"requirements.txt", "requirements-extras.txt"} and all((ROOT / name).exists() for name in listed)
    assert instructions("USER") == ["$UID:$GID"] and int(values["UID"]) > 0 and values["TORCH"] == "cpu"
    assert "non-unique" not in runs.partition("useradd")[2]  # so that UID=0 is an error


def test_the_commands_of_the_containers_are_valid(capsys):
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    gpu = yaml.safe_load((ROOT / "docker-compose.gpu.yml").read_text())["services"]
    assert set(services) == set(gpu) == {"dev", "train", "serve"} and services["dev"]["command"] == ["bash"]
    assert settings(services["train"]["command"], capsys)["output"]["dir"] == "./out"
    for command in (services["serve"]["command"], json.loads(instructions("CMD")[0])):
        found = settings(command, capsys)
        assert "--serve" in command and found["inference"]["host"] == "0.0.0.0" and found["model"]["name"] == "out"
    assert services["serve"]["ports"][0].endswith(f"127.0.0.1:8000}}:{found['inference']['port']}")
    assert instructions("EXPOSE") == [str(found["inference"]["port"])]


HADOLINT = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))


@pytest.mark.skipif(not HADOLINT, reason="hadolint is not installed")
def test_hadolint_accepts_the_dockerfile():
    done = subprocess.run([HADOLINT, ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stdout, done.stdout


# ---------------------------------------------------------------------------------------------------------- data


def test_the_bundled_data_is_the_output_of_make_py():
    done = subprocess.run([sys.executable, str(ROOT / "data" / "make.py"), "--check"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("make", ROOT / "data" / "make.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["make"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["make"]


def test_no_held_out_question_is_in_the_training_text(make):
    held = {item.question for item in make.questions("test")}
    shown = {item.question for item in make.questions("train")}
    assert len(held) >= 500 and not held & shown
    texts = [json.loads(line)["text"] for line in (ROOT / "data" / "train.jsonl").read_text().splitlines()]
    # A question ends at its first question mark; a document has one question per line.
    questions = {line[: line.index("?") + 1] for text in texts for line in text.split("\n") if "?" in line}
    assert len(questions & shown) > 1000 and not questions & held
    conversations = [json.loads(line)["messages"] for line in (ROOT / "data" / "chat.jsonl").read_text().splitlines()]
    contents = [message["content"] for messages in conversations for message in messages]
    assert len(shown & set(contents)) == len(shown) and {len(messages) for messages in conversations} == {2, 4, 6}
    tests = [json.loads(line) for line in (ROOT / "data" / "chat_test.jsonl").read_text().splitlines()]
    assert {test["messages"][0]["content"] for test in tests} == held
    assert all(test["answer"] in test["messages"][1]["content"] for test in tests)
    everything = "\n".join(texts) + "\n".join(contents) + (ROOT / "data" / "train.txt").read_text() + (ROOT / "data" / "notes.tsv").read_text()
    starts = {question[:12] for question in held}
    windows = {everything[i : i + 12] for i in range(len(everything) - 11)}
    assert not [q for q in held if q[:12] in windows and q in everything] and starts


def test_the_bundled_data_is_small():
    shipped = [path for path in (ROOT / "data").iterdir() if path.is_file() and not path.name.endswith(("_ids.bin", "_ids.json", MODEL.CHECKSUMS))]
    assert {"train.txt", "train.jsonl", "chat.jsonl", "chat_test.jsonl", "notes.tsv", "make.py"} <= {path.name for path in shipped}
    assert sum(path.stat().st_size for path in shipped) <= 5_500_000


def test_the_notes_have_five_labels():
    header, *rows = (ROOT / "data" / "notes.tsv").read_text().splitlines()
    texts, labels = zip(*(row.split("\t") for row in rows), strict=True)
    assert header == "text\tlabel" and len(set(texts)) == len(texts) == 1500
    assert set(labels) == {"invitation", "thanks", "apology", "request", "news"} and min(map(labels.count, set(labels))) > 200


def test_the_readme_has_the_test_command_of_the_ci():
    readme, ci = ROOT / "README.md", ROOT / ".ci" / "run"
    if not (readme.exists() and ci.exists()):
        pytest.skip("README.md or .ci/run does not exist")
    commands = [re.search(r"python3? -m pytest[^\n`#|&;]*", path.read_text()) for path in (readme, ci)]
    assert all(commands), "no test command"
    assert commands[0][0].strip() == commands[1][0].strip()


EXAMPLES = re.compile(r'^(echo "([^"]+)" \| python (INFER\.py --model out/sft .*?))\n# (.+)$', re.M)


def test_answers_in_the_readme_are_correct_and_greedy(make):
    """The README shows only greedy answers, because sampled answers differ between calls."""
    found = EXAMPLES.findall((ROOT / "README.md").read_text())
    assert found
    for _, question, command, answer in found:
        assert "--temperature 0" in command
        a, word, b = re.fullmatch(r"What is (\d+) (plus|minus) (\d+)\?", question).groups()
        assert answer == make.worked(int(a), 1 if word == "plus" else -1, int(b))


@pytest.mark.skipif("DEFAULT_RUNS" not in os.environ, reason="DEFAULT_RUNS=1 trains the default models first, in about ten minutes")
def test_the_default_runs_give_the_answers_in_the_readme(tmp_path):
    shutil.copytree(ROOT / "data", tmp_path / "data", ignore=shutil.ignore_patterns("*.bin"))
    for path in (*ROOT.glob("[A-Z]*.py"), ROOT / "config.yaml"):
        shutil.copy(path, tmp_path / path.name)
    for name in ("TRAIN", "SFT"):
        subprocess.run([sys.executable, f"{name}.py", "--config", "config.yaml"], cwd=tmp_path, check=True)
    for command, _, _, answer in EXAMPLES.findall((ROOT / "README.md").read_text()):
        assert subprocess.run(["sh", "-c", command.replace("python", sys.executable)], cwd=tmp_path, capture_output=True, text=True).stdout.strip() == answer


def test_every_step_of_a_worked_answer_is_correct(make):
    items = [item for split in ("train", "test") for item in make.questions(split) if item.kind in ("sums", "differences", "sequences")]
    steps = [step for item in items for step in re.findall(r"(\d+) (plus|minus) (\d+) is (-?\d+)", item.sentence)]
    assert all(int(result) == (int(a) + int(b) if word == "plus" else int(a) - int(b)) >= 0 for a, word, b, result in steps)
    assert len(steps) > 2 * len(items) and all(item.sentence.endswith(f" is {item.answer}.") for item in items)


def test_prompts_and_preferences_are_correct_and_held_out(make):
    def read(name):
        return [json.loads(line) for line in (ROOT / "data" / name).read_text().splitlines()]

    prompts = {name: read(name) for name in ("prompts.jsonl", "prompts_test.jsonl")}
    shown = {item.question for item in make.questions("train")}
    for name, records in prompts.items():
        for record in records:
            a, b = map(int, re.findall(r"\d+", record["prompt"]))
            plus = "plus" in record["prompt"]
            assert record["answer"] == str(a + b if plus else a - b)
            plain = f"What is {a} {'plus' if plus else 'minus'} {b}?"
            assert make.is_held_out(plain) == (name == "prompts_test.jsonl") and not (plain in shown and name == "prompts_test.jsonl")
    pairs = {name: read(name) for name in ("preferences.jsonl", "preferences_test.jsonl")}
    assert min(len(prompts["prompts_test.jsonl"]), len(pairs["preferences_test.jsonl"])) == 500
    for kind in (prompts, pairs):
        train, test = ({record["prompt"] for record in records} for records in kind.values())
        assert not train & test and len(test) == 500
    for record in pairs["preferences.jsonl"] + pairs["preferences_test.jsonl"]:
        time_phrase = re.compile(r"One \w+|On |Early on |It was ")
        assert time_phrase.match(record["chosen"]) is None and record["chosen"] != record["rejected"]


@pytest.mark.parametrize("script, stage, flag, hint", [
    (TRAIN, "training", "--per_device_train_batch_size", "use --batch_size"), (SFT, "sft", "--model_name_or_path", "use --model"),
    (SFT, "sft", "--training.num_train_epochs", "use --epochs"), (SFT, "sft", "--load_in_4bit", "use --model.quantization nf4"),
    (RL, "rl", "--resume_from_checkpoint", "use --resume"), (INFER, "inference", "--do_sample", "use --temperature"),
    (QUANT, "quantization", "--num_train_epochs", "unknown flag")])
def test_a_flag_of_transformers_trainers_gets_the_flag_of_this_program(script, stage, flag, hint):
    with pytest.raises(UserError, match=f"{flag}: unknown flag.*{hint}" if "use" in hint else f"{flag}: unknown flag$"):
        load([flag, "1"], script=script, stage=stage)


def test_every_suggested_flag_exists():
    """Flags of the table for transformers' names, in the program that people use them with."""
    for name, same in MODEL.TRANSFORMERS_FLAGS.items():
        script, stage = (INFER, "inference") if name == "do_sample" else (SFT, "sft")
        with pytest.raises(UserError, match=f"use --{re.escape(same)}$"):
            load([f"--{name}", "1"], script=script, stage=stage)
        flag, *value = same.split()
        if flag != "resume":
            load([f"--{flag}", *(value or ["0.5" if flag == "training.warmup_steps" else "float32" if flag == "model.dtype" else "1"])], script=script, stage=stage)


def test_values_of_a_fixed_set_ignore_case():
    assert load(["--gguf-type", "q4_k_m"], script=QUANT, stage="quantization").quantization.gguf_type == "Q4_K_M"
    assert load(["--optim", "AdamW"]).training.optim == "adamw"


def test_settings_of_tools_need_tools():
    for more in ([], ["--method", "grpo"]):
        with pytest.raises(UserError, match="rl.max_turns"):
            load([*more, "--max-turns", "3"], script=RL, stage="rl")
    assert load(["--method", "grpo", "--max-turns", "3", "--tools", "tools.py:add"], script=RL, stage="rl").rl.max_turns == 3
