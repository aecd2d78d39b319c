"""The front door: every command and every claim of README.md, in a small copy of the project."""

import contextlib
import importlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT, free_port, launch, make_text
from test_serve import wait_until

import MODEL
import TOKENIZER

README = (ROOT / "README.md").read_text()
FILES = ["MODEL", "TOKENIZER", "INFER", "TRAIN", "SFT", "RL", "DISTILL", "QUANT"]
SMALL = """
model: {preset: llama-1m, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4, device: cpu}
tokenizer: {kind: byte}
training: {max_steps: 2, batch_size: 4, max_length: 128, eval_batches: 1, sample_tokens: 0}
sft: {eval_answers: 2, model: {name: ./out}, training: {max_steps: 2, batch_size: 4}}
rl: {model: {name: ./out/sft}, training: {max_steps: 2, batch_size: 4}}
inference: {max_new_tokens: 8, model: {name: ./out}}
quantization: {model: {name: ./out}}
"""


STAGES = ["pretrain", "sft", "reward", "dpo", "ppo", "grpo", "distill", "quantize", "export", "serve"]


def commands(markdown: str) -> list[str]:
    """The commands of all bash blocks and of inline code that starts with python or torchrun, in order; without comments."""
    found = []
    for block, inline in re.findall(r"^```bash\n(.*?)^```|`((?:python|torchrun) [^`]+)`", markdown, re.M | re.S):
        for line in (block.replace("\\\n", " ") if block else inline).splitlines():
            words = shlex.split(line, comments=True)
            if words:
                found.append(re.sub(r"\s+#\s.*", "", line).strip())
    return found


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A copy of the project whose settings and data are small, with the user's files that the commands name."""
    folder = tmp_path_factory.mktemp("workshop")
    for name in FILES:
        shutil.copy(ROOT / f"{name}.py", folder)
    for name in ("requirements.txt", "requirements-dev.txt", "requirements-extras.txt"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "bench" / "recipes", folder / "bench" / "recipes")
    (folder / "config.yaml").write_text(SMALL)
    (folder / "data").mkdir()
    for file in (ROOT / "data").iterdir():
        if file.suffix in (".txt", ".jsonl", ".tsv"):
            lines = file.read_text().splitlines(keepends=True)
            (folder / "data" / file.name).write_text("".join(lines[:80]))
    (folder / "book.txt").write_text("\n".join(make_text(300)))
    (folder / "text.txt").write_text("\n".join(make_text(3)))
    (folder / "prompts.txt").write_text("The red\nRain\n")
    (folder / "judge.py").write_text("def polite(prompts, completions, **columns):\n    return [float(len(text)) for text in completions]\n")
    questions = make_text(40, 1)
    for name, records in (("mine", [{"prompt": text, "completion": text[::-1]} for text in questions]),
                          ("pairs", [{"prompt": text, "chosen": "Yes.", "rejected": "No."} for text in questions])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tokenizer = TOKENIZER.train(make_text(200), 320, "bpe")
    TOKENIZER.ensure_chat(tokenizer)
    for name in ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B"):
        config = MODEL.preset_config("qwen3-2m", hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                     vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
        MODEL.save(MODEL.build(config), folder / name)
        TOKENIZER.save(tokenizer, folder / name)
    return folder


def run(command: str, folder: Path) -> str:
    """Run a line of a shell in `folder`, and return what it prints. Python runs in a fork of this process, which has the imports."""
    output = ""
    for part in command.split(" && "):
        words, stdin, target = shlex.split(part), subprocess.DEVNULL, None
        if words[:3] == ["pip", "install", "-r"]:
            assert (folder / words[3]).exists()
            continue
        if words[0] == "echo":
            (folder / "stdin.txt").write_text(words[1] + "\n")
            stdin, words = (folder / "stdin.txt").open(), words[words.index("|") + 1 :]
        if ">" in words:
            target, words = folder / words[words.index(">") + 1], words[: words.index(">")]
        if "<" in words:
            stdin, words = (folder / words[words.index("<") + 1]).open(), words[: words.index("<")]
        assert words[0] == "python", command
        process = launch(folder, *words[1:], stdin=stdin)
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, f"{command}\n{errors}"
        if target:
            target.write_text(output)
    return output


def test_every_command_of_the_readme_runs(workshop):
    """In the order of the page, since a command may use the folders of those before it."""
    seen = commands(README)
    for command in seen:
        if command.endswith("-m pytest"):
            assert command.rpartition("&& ")[2] in (ROOT / ".ci" / "run").read_text()
        elif "bench/lifecycle.py" in command:
            assert (ROOT / "bench" / "lifecycle.py").exists()  # test_the_lifecycle_runs
        elif "--serve" in command:
            ask_server(command, workshop)
        elif command.startswith("torchrun"):
            words = re.sub(r"nproc_per_node \d+", "nproc_per_node 2", command).split()
            words[0] = str(Path(sys.executable).parent / words[0])
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run(words, cwd=workshop, env=environment, check=True, capture_output=True, timeout=300)
        else:
            output = run(command, workshop)
            if "INFER.py" in command and ">" not in command:
                assert output, command
    assert len(seen) > 25
    for name in ("book", "moe", "big", "full", "lora", "merged", "notes", "dpo", "reward", "grpo", "small", "int4"):
        assert MODEL.read_json(workshop / "out" / name / ("adapter_config.json" if name == "lora" else "config.json"))
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "bench" / "recipes" / "README.md").read_text(), re.M | re.S)
    [code] = [block for block in blocks if "AutoPeft" in block]
    opened = subprocess.run([sys.executable, "-c", code], cwd=workshop, capture_output=True, text=True)
    assert opened.returncode == 0 and "What is 12 plus 30?" in opened.stdout, opened.stderr
    assert list((workshop / "out" / "gguf").glob("*.gguf")) and (workshop / "answers.txt").read_text().count("\n") == 2


def test_the_lifecycle_runs(workshop):
    """Every stage once, with two steps: nothing is learned, which the exit status and a line report."""
    shutil.copy(ROOT / "bench" / "lifecycle.py", workshop / "bench")
    command = [sys.executable, "bench/lifecycle.py", "--quick"]
    done = subprocess.run(command, cwd=workshop, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 or "no improvement in: " in done.stderr.splitlines()[-1], done.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == ["stage", "---", *STAGES, "all"]
    assert all(re.match(r"-?\d", cell) for row in rows[2:-1] for cell in (row[3], row[4], row[6], row[7]))
    assert float(rows[-3][4]) < float(rows[-3][3])  # the GGUF file is smaller than the folder
    assert (workshop / "out" / "lifecycle" / "lifecycle.png").stat().st_size > 10_000
    again = subprocess.run([*command, "--table"], cwd=workshop, capture_output=True, text=True)
    assert again.stdout == done.stdout  # from lifecycle.json, without running a stage


def test_every_stage_of_the_readme_improves_its_measure():
    rows = re.findall(r"^\| (\w+) \| .+ \| (-?[\d.]+) \| (-?[\d.]+) \|(?: ?[\d.,%]* \|){4}$", README, re.M)
    assert [name for name, _, _ in rows] == STAGES
    for name, before, after in rows:
        assert (float(after) < float(before)) == (name in ("pretrain", "distill", "quantize", "export")), name
        assert before != after, name
    assert (ROOT / "bench" / "lifecycle.png").exists()


def ask_server(command: str, folder: Path) -> None:
    """Start the server of a command on a free port, and run the page's client code against it."""
    port = free_port()
    words = shlex.split(command.rpartition("&& ")[2])
    process = launch(folder, *words[1:], "--port", port, fork=False)
    try:
        def ready() -> bool:
            assert process.poll() is None, process.stderr.read()
            with contextlib.suppress(OSError):
                return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
            return False

        wait_until(ready, 120)
        [code] = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
        client = subprocess.run([sys.executable, "-c", code.replace(":8000", f":{port}")], capture_output=True, text=True, timeout=120)
        assert client.returncode == 0 and client.stdout, client.stderr
    finally:
        process.terminate()
        process.communicate(timeout=60)


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 110


def test_the_files_are_as_long_as_the_readme_says():
    """Core lines are those above the banner `edges`; 25 of them take a minute. `python bench/guide.py` updates them."""
    rows = re.findall(r"^\| `(\w+)\.py` \| .+ \| ([\d,]+) \| (\d+) \|$", README, re.M)
    assert [name for name, _, _ in rows] == FILES
    for name, core, minutes in rows:
        above = re.split(r"^# =+ edges$", (ROOT / f"{name}.py").read_text(), maxsplit=1, flags=re.M)
        lines, core = above[0].count("\n"), int(core.replace(",", ""))
        assert len(above) == 2 and lines == core and int(minutes) == round(core / 25), (name, lines)


def test_the_records_of_the_readme_are_read(workshop):
    [block] = re.findall(r"^```json\n(.*?)^```", README, re.M | re.S)
    lines = block.splitlines()
    assert len(lines) == 8
    for program in ("TRAIN.py", "SFT.py"):
        run(f"python {program} --resume auto", workshop)
    for line in lines:
        record = json.loads(line)
        (workshop / "record.jsonl").write_text(line + "\n")
        none_held_out = "--data record.jsonl --data.validation none --overwrite"
        if "rejected" in record or record.get("label") is True:
            method = "dpo" if "rejected" in record else "kto"
            assert record["prompt"] in run(f"python RL.py --model out/sft --rl.method {method} --dry-run {none_held_out}", workshop)
        elif "text" in record:
            others = {"text": "another document", "label": "other"}
            (workshop / "record.jsonl").write_text(f"{line}\n{json.dumps(others)}\n" * 4)
            run(f"python SFT.py --model out --sft.task classify --out out/record {none_held_out}", workshop)
            assert set(MODEL.read_json(workshop / "out/record/config.json")["label2id"]) == {record["label"], "other"}
        else:
            run("python SFT.py --convert --data record.jsonl --out converted.jsonl --overwrite", workshop)
            messages = json.loads((workshop / "converted.jsonl").read_text())["messages"]
            assert [message["role"] for message in messages] == ["user", "assistant"]
            assert messages[-1]["content"] in line


MEMORY = [("134M", "llama-134m", 16, 8), ("Qwen3-0.6B", "qwen3-0.6b", 4, 8), ("int4 to 8B", "qwen3-8b", 0.6, 8),
          ("1B", "gpt2-774m", 16, 24), ("LoRA to 8B", "qwen3-8b", 2, 24), ("QLoRA to 14B", "qwen3-14b", 0.6, 24),
          ("4B", "qwen3-4b", 16, 80), ("QLoRA to 70B", "llama3-70b", 0.6, 80)]


@pytest.mark.parametrize("size, preset, width, memory", MEMORY)
def test_the_sizes_that_the_readme_promises_fit(size, preset, width, memory):
    """Bytes per parameter: 16 for full training in float32 with AdamW, 4 or 2 for frozen weights, 0.6 for nf4 and int4 with its embeddings."""
    rows = dict(re.findall(r"^\| (?:laptop|one GPU), (\d+) GB \| (.+) \|$", README, re.M))
    assert size in rows[str(memory)]
    assert MODEL.count_parameters(MODEL.build(preset, device="meta"))[0] * width < 0.85e9 * memory


FLAGS = [command for command in commands((ROOT / "bench/recipes/README.md").read_text()) if re.search(r"\b(?!SCRIPT)[A-Z]+\.py ", command)]


class Loaded(Exception):
    pass


@pytest.mark.parametrize("command", FLAGS)
def test_the_flags_of_a_recipe_exist(command, monkeypatch, tmp_path):
    """Each setting and action is one of the program, and has an effect with the others."""
    name, words = re.search(r"\b([A-Z]+)\.py (.*)$", command).groups()
    words = list(itertools.takewhile(lambda word: word not in "<>", shlex.split(words)))
    script, load_config = importlib.import_module(name), MODEL.load_config

    def load_only(*arguments, **more):
        load_config(*arguments, **more)
        raise Loaded

    for file in ("mine.yaml", "tonight.yaml"):
        (tmp_path / file).write_text("")
    (tmp_path / "bench").symlink_to(ROOT / "bench")
    shutil.copy(ROOT / "config.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "load_config", load_only)
    with pytest.raises((Loaded, SystemExit)) as end:  # --help and --print-config exit
        script.main(words)
    assert end.type is Loaded or end.value.code in (0, None)


def test_the_recipes_mention_every_program():
    assert len(FLAGS) > 60 and {re.search(r"([A-Z]+)\.py", command)[1] for command in FLAGS} == set(FILES)
