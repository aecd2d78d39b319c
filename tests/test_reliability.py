"""Reliability: a run that is killed, a full disk, damaged files and hostile input cost nothing that was saved and are reported in one line."""

import contextlib
import copy
import csv
import dataclasses
import errno
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import hypothesis
import pytest
import torch
import yaml
from conftest import ROOT, launch, make_text, mounted
from hypothesis import strategies as st

import DISTILL
import INFER
import MODEL
import QUANT
import RL
import SFT
import TOKENIZER
import TRAIN
from MODEL import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

TRAINING = "--model.device cpu --training.mixed_precision no --training.logging_steps 1 --training.save_steps 2 --training.sample_tokens 0 --training.warmup_steps 2 "
ROWS = TRAINING + "--max-steps 6 --max-length 48 --batch-size 4 --training.eval_batches 2 --training.eval_steps 4 --data.dir {ids} "
PAIRS = TRAINING + "--max-steps 6 --batch-size 4 --training.eval_batches 2 --model {base} --learning-rate 1e-3 --data {shop}/pairs.jsonl --rl.method "
ROLLOUTS = (TRAINING + "--max-steps 8 --batch-size 8 --model {base} --learning-rate 1e-3 --data {shop}/prompts.jsonl --rl.rollout_size 16 --rl.eval_prompts 4 "
            "--rl.max_completion_length 6 --rl.reward_funcs regex:o length:3 --rl.method ")
STUDENT = "--teacher {base} --distill.rollout-size 8 --distill.max-completion-length 6 "
CONVERT = "--model {base} --model.device cpu --model.dtype float32 "
STAGES = {  # script and flags
    "TRAIN": (TRAIN, ROWS + "--model.preset llama-1m --model.hidden_size 32 --model.num_hidden_layers 2 --model.num_attention_heads 4 --model.intermediate_size 48 "
                     "--model.max_position_embeddings 64 --data {shop}/text.txt --tokenizer.kind byte --resume auto --out {out}"),
    "SFT": (SFT, ROWS + "--model {base} --data {shop}/chats.jsonl --sft.eval_answers 4 --lora.r 4 --lora.lora_dropout 0.2 --resume auto --out {out}"),
    "RL reward": (RL, PAIRS + "reward --resume auto --out {out}"),
    "RL dpo": (RL, PAIRS + "dpo --resume auto --out {out}"),
    "RL ppo": (RL, ROLLOUTS + "ppo --rl.num_iterations 2 --resume auto --out {out}"),
    "RL grpo": (RL, ROLLOUTS + "grpo --resume auto --out {out}"),
    "DISTILL": (DISTILL, ROWS + STUDENT + "--model {base} --data {shop}/chats.jsonl --lmbda 0.5 --sft.eval_answers 0 --resume auto --out {out}"),
    "DISTILL --cache": (DISTILL, "--cache --teacher {base} --model.device cpu --training.mixed_precision no --data {shop}/text.txt --data.dir {ids} --max-length 48 --batch-size 1 "
                                 "--cache-dir {out}"),
    "DISTILL --generate": (DISTILL, "--generate --teacher {base} --model.device cpu --data {shop}/prompts.jsonl --batch-size 1 --sampling '{{max_new_tokens: 8}}' "
                                    "--out {out}/answers.jsonl"),
    "QUANT int8": (QUANT, CONVERT + "--method int8 --data {shop}/text.txt --data.dir {ids} --out {out}"),
    "QUANT gguf": (QUANT, CONVERT + "--to gguf --out {out}"),
    "QUANT torch-export": (QUANT, CONVERT + "--to torch-export --out {out}/model.pt2"),
}


class Whole(NamedTuple):
    """An uninterrupted run: the files that it leaves, the number of its changes on the disk, and its duration."""

    files: dict
    changes: int
    seconds: float


class Shop:
    """A folder with tiny models and data for every stage, and what uninterrupted runs of the stages leave."""

    def __init__(self, folder: Path):
        self.folder, self.base, self.numbers = folder, folder / "base", itertools.count()
        self.known: dict[str, Whole] = {}
        self.runs: dict[str, Path] = {}
        lines = make_text(240, seed=5)
        tokenizer = TOKENIZER.train(lines, kind="byte")
        TOKENIZER.ensure_chat(tokenizer)
        ends = [TOKENIZER.chat_ends(tokenizer).stop[0], tokenizer.eos_token_id, *map(ord, "aeiou")]  # so that completions end
        config = MODEL.ModelConfig(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=ends, initializer_range=0.2, hidden_size=32,
                                   intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=768)
        MODEL.save(MODEL.build(config, seed=1), self.base)
        TOKENIZER.save(tokenizer, self.base)
        (folder / "text.txt").write_text("\n".join(lines[:60]) + "\n")
        questions, answers, others = lines[:40], lines[40:80], lines[80:120]
        chats = [{"messages": [{"role": "user", "content": a[:12]}, {"role": "assistant", "content": b[:12]}]} for a, b in zip(questions, answers, strict=True)]
        pairs = [{"prompt": a[:20], "chosen": b[:20], "rejected": c[:20]} for a, b, c in zip(questions, answers, others, strict=True)]
        prompts = [{"prompt": a[:20], "answer": "fox"} for a in questions]
        for name, records in {"chats": chats, "pairs": pairs, "prompts": prompts}.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    def fresh(self) -> Path:
        """A new folder."""
        folder = self.folder / f"{next(self.numbers)}"
        folder.mkdir()
        return folder

    def clean(self) -> None:
        """Remove the folders of past cases."""
        kept = {path.name for path in self.runs.values()}
        for folder in self.folder.iterdir():
            if folder.name.isdigit() and folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)

    def words(self, stage: str, out: Path, ids: Path | None = None) -> list[str]:
        names = {"shop": self.folder, "base": self.base, "out": out, "ids": ids or out.parent / "ids"}
        return [word.format(**names).strip("'") for word in re.findall(r"'[^']*'|\S+", STAGES[stage][1])]

    def start(self, stage: str, out: Path, count: int = 0) -> subprocess.Popen:
        """Run a stage in a process that dies before its `count`-th change of a file; 0: which ends by itself."""
        script = ROOT / f"{STAGES[stage][0].__name__}.py"
        return launch(ROOT, ROOT / "tests" / "killed.py", out.parent, count, script, *self.words(stage, out))

    def whole(self, stage: str) -> Whole:
        if stage not in self.known:
            out, clock = self.fresh() / "out", time.perf_counter()
            _, message = (process := self.start(stage, out)).communicate()
            assert process.returncode == 0, message
            self.runs[stage] = out.parent
            self.known[stage] = Whole(files_of(out), int(message.rpartition("changes: ")[2]), time.perf_counter() - clock)
        return self.known[stage]

    @cached_property
    def client(self):
        """A client of the server, in this process. Errors of the server are raised here."""
        from starlette.testclient import TestClient

        session = INFER.load(str(self.base), max_new_tokens=4, timeout=60, max_body=100_000, **{"model.device": "cpu"})
        client = TestClient(INFER.Server(session, "base", session.engine(True, 512)).app())
        client.__enter__()  # one event loop for all requests
        return client


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TRAIN, "plot_curves", lambda *_: None)  # drawing takes longer than these runs
        yield Shop(tmp_path_factory.mktemp("shop"))


TIMES = ("seconds", "tokens_per_second", "mfu", "time/rollout", "time/score", "time/reward")
VARIED = ("result.json", "config.yaml", "loss.png", "rollouts.png", ".lock", "checksums.json")  # times and paths


def files_of(out: Path) -> dict:
    """{name: content} of the files that a run leaves, without its checkpoints, and without times and paths."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if not path.is_file() or name.startswith("ckpt-step-") or path.name in VARIED:
            continue
        if path.name == "log.jsonl":
            found[name] = [{key: value for key, value in record.items() if key not in TIMES} for record in TRAIN.json_lines(path)]
        elif path.name == "tokenizer_config.json":  # which says whether it was loaded from a folder
            found[name] = {key: value for key, value in json.loads(path.read_text()).items() if "local" not in key}
        else:
            found[name] = path.suffix == ".pt2" or path.read_bytes()  # an archive that contains its own name and times
    return found


# ------------------------------------------------------------------------------------------------------- kill -9


COMPLETE = "has a complete cache|exists; replace it with --overwrite"  # killed after its last file was renamed


def killed(shop: Shop, draw: random.Random, stage: str, times: int = 2) -> None:
    """A stage is killed at random moments: before changes on the disk, and at any time. After each kill, every file with a final name is
    whole. Continued, it leaves the files of an uninterrupted run."""
    whole, out = shop.whole(stage), shop.fresh() / "out"
    for number in range(times + 1):
        count = draw.randint(1, whole.changes) if draw.random() < 0.7 else 0
        process = shop.start(stage, out, count if number < times else 0)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=draw.uniform(0, whole.seconds) if number < times and not count else None)
        process.kill()
        _, message = process.communicate()
        if process.returncode == 0 or process.returncode == 2 and re.search(COMPLETE, message):
            break
        assert process.returncode == -signal.SIGKILL, message
        for checkpoint in TRAIN.checkpoints(out):
            assert MODEL.damage(checkpoint) is None and TRAIN.load_state(checkpoint)
        if stage.startswith("QUANT"):
            assert {name for name, content in final_files(out).items() if content != whole.files[name]} == set()
    assert process.returncode != -signal.SIGKILL
    if STAGES[stage][0] in (QUANT, DISTILL):
        assert final_files(out) == whole.files
    else:  # a new run in the folder has removed what the killed one left
        assert files_of(out) == whole.files


def final_files(out: Path) -> dict:
    """`files_of` without those of an unfinished save."""
    return {name: content for name, content in files_of(out).items() if not re.match(r"\.tmp-|.*\.part|.*\.lock$", name)}


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_continues_and_ends_with_the_same_files(stage, shop):
    killed(shop, random.Random(stage), stage)


# ------------------------------------------------------------------------------------------------- disks and files


def run(script, words: list) -> tuple[int, str]:
    """Run a program in this process: (exit status, stderr). A failed run says so in its last line; a traceback is an exception here."""
    log = io.StringIO()
    with contextlib.redirect_stderr(log), contextlib.redirect_stdout(io.StringIO()):
        try:
            MODEL.run_main(script.main, [str(word) for word in words])
            status = 0
        except SystemExit as stop:
            status = stop.code
        finally:
            MODEL.QUIET = False  # of --quiet
    message = log.getvalue().strip()
    assert status in (0, None) or status in (1, 2) and message.splitlines()[-1].startswith("error: "), (status, message)
    return status or 0, message.splitlines()[-1] if message else ""


def full_disk(shop: Shop, draw: random.Random, stage: str | None = None, size: int | None = None) -> None:
    """A disk of `size` KiB fills up during a run. The same command continues once there is space, and ends with the same files."""
    stage = stage or draw.choice(list(STAGES))
    whole, folder = shop.whole(stage), shop.fresh() / "disk"
    with mounted(folder, f"{size or draw.choice((8, 16, 40, draw.randint(4, 500)))}k") as remount:
        status, line = run(STAGES[stage][0], shop.words(stage, folder / "out"))
        assert status == 0 or re.search("disk is full|No space left", line), line
        assert not size or status == 2
        for checkpoint in TRAIN.checkpoints(folder / "out"):
            assert MODEL.damage(checkpoint) is None
        remount("size=64m")
        if status:
            status, line = run(STAGES[stage][0], shop.words(stage, folder / "out"))
        assert status == 0 and final_files(folder / "out") == whole.files, line


@pytest.mark.parametrize("stage, size", [("TRAIN", 8), ("TRAIN", 40), ("TRAIN", 260), ("SFT", 124), ("RL reward", 360), ("DISTILL --cache", 92),
                                         ("DISTILL --generate", 8), ("QUANT int8", 40), ("QUANT gguf", 16)])
def test_a_full_disk_costs_nothing_that_was_saved(stage, size, shop):
    full_disk(shop, random.Random(0), stage, size)


def read_only(shop: Shop, draw: random.Random, stage: str | None = None) -> None:
    """The output folder, with what a killed run left in it or without, is on a disk that cannot be written."""
    stage, folder = stage or draw.choice(list(STAGES)), shop.fresh() / "disk"
    with mounted(folder, "64m") as remount:
        if draw.random() < 0.5:
            shop.start(stage, folder / "out", draw.randint(1, shop.whole(stage).changes)).communicate()
        before = files_of(folder)
        remount("ro")
        status, line = run(STAGES[stage][0], shop.words(stage, folder / "out"))
        assert status == 2 and str(folder) in line and files_of(folder) == before, line


@pytest.mark.parametrize("stage", ["TRAIN", "DISTILL --cache", "DISTILL --generate", "QUANT gguf"])
def test_a_read_only_folder_is_one_line(stage, shop):
    read_only(shop, random.Random(3), stage)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EIO])
def test_a_disk_that_fails_during_a_run_is_one_line(number, shop, monkeypatch):
    whole, out, real = shop.whole("TRAIN"), shop.fresh() / "out", TRAIN.Log.write

    def write(log, record):
        if record["step"] == 3:
            raise OSError(number, os.strerror(number), str(out / "log.jsonl"))
        real(log, record)

    monkeypatch.setattr(TRAIN.Log, "write", write)
    status, line = run(TRAIN, shop.words("TRAIN", out))
    assert status == 2 and f"log.jsonl: {os.strerror(number)}; check the disk" in line
    monkeypatch.undo()
    assert run(TRAIN, shop.words("TRAIN", out))[0] == 0 and files_of(out) == whole.files


READERS = [stage for stage in STAGES if "--data" in STAGES[stage][1]]


def unreadable(shop: Shop, draw: random.Random, stage: str | None = None, how: str | None = None) -> None:
    """A data file that exists but cannot be read: a device error, a folder, a path below a file, a link to nothing."""
    stage, how = stage or draw.choice(READERS), how or draw.choice(("error", "folder", "below", "link"))
    words = shop.words(stage, shop.fresh() / "out")
    place = words.index("--data") + 1
    path = shop.fresh() / f"data{draw.choice((Path(words[place]).suffix, '.csv', '.json', '.parquet', '.jsonl.gz'))}"
    if how == "error":
        path.symlink_to("/proc/self/mem")  # whose first page is not mapped
    elif how == "folder":
        path.mkdir()
    elif how == "link":
        path.symlink_to(path.parent / "nothing")
    else:
        path.write_text("")
        path = path / path.name
    words[place] = str(path)
    status, line = run(STAGES[stage][0], words)
    assert status == 2 and str(path) in line, line


@pytest.mark.parametrize("how", ["error", "folder", "below", "link"])
def test_unreadable_data_is_one_line(how, shop):
    for number, stage in enumerate(("TRAIN", "SFT", "DISTILL --generate")):
        unreadable(shop, random.Random(number), stage, how)


# --------------------------------------------------------------------------------------------------------- damage

HARMS = ("missing", "empty", "cut", "flipped", "zeros")


def harm(path: Path, how: str, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    place = draw.randrange(len(data))
    if how == "flipped":  # one bit
        data[place] ^= 1 << draw.randrange(8)
    elif how == "zeros":  # what some file systems leave after a power cut
        data[place:] = bytes(len(data) - place)
    path.write_bytes({"cut": data[:place], "empty": b""}.get(how, data))
    if how == "missing":
        path.unlink()


def finished(shop: Shop, stage: str) -> Path:
    """A copy of a stage's uninterrupted run, with its token files."""
    shop.whole(stage)
    folder = shop.fresh()
    shutil.copytree(shop.runs[stage], folder, dirs_exist_ok=True)
    return folder / "out"


def is_reported(path: Path, line: str | None) -> bool:
    """Whether a line names a damaged file; a changed number in the checksums is taken for damage of another file."""
    return bool(line) and re.search(f"{path.parent}/{'.*' if path.name == MODEL.CHECKSUMS else path.name} is missing or damaged", line) is not None


def damaged_checkpoint(shop: Shop, draw: random.Random, stage: str | None = None, name: str | None = None, how: str | None = None) -> None:
    """A damaged file of the newest checkpoint is named; the run continues from the one before and ends with the same files."""
    stage = stage or draw.choice([stage for stage in STAGES if "--resume" in STAGES[stage][1]])
    out = finished(shop, stage)
    [older, newest] = TRAIN.checkpoints(out)
    path, how = newest / (name or draw.choice(sorted(path.name for path in newest.iterdir()))), how or draw.choice(HARMS)
    before = path.read_bytes()
    harm(path, how, draw)
    if path.read_bytes() == before if path.exists() else path.name == MODEL.CHECKSUMS:  # as in checkpoints of earlier versions
        return
    words = shop.words(stage, out)
    place = words.index("--resume") + 1
    status, line = run(STAGES[stage][0], [*words[:place], newest, *words[place + 1 :]])
    assert status == 2 and f"try --resume {older}" in line, line
    assert is_reported(path, line) or path.name == TRAIN.STATE_FILE and f"has no {path.name}" in line, line
    assert run(STAGES[stage][0], words)[0] == 0 and files_of(out) == shop.whole(stage).files
    for checkpoint in TRAIN.checkpoints(out):
        harm(checkpoint / path.name, "cut", draw)
    status, line = run(STAGES[stage][0], words)
    assert status == 2 and is_reported(path, line) and "start again with --overwrite" in line, line


@pytest.mark.parametrize("stage", ["TRAIN", "SFT", "RL ppo"])
def test_every_file_of_a_checkpoint_is_checked(stage, shop):
    out, draw = finished(shop, stage), random.Random(stage)
    [_, newest] = TRAIN.checkpoints(out)
    names = sorted(path.name for path in newest.iterdir())
    assert {TRAIN.STATE_FILE, "config.yaml", "tokenizer.json", MODEL.CHECKSUMS} < set(names)
    for number, (name, how) in enumerate(itertools.product(names, HARMS)):
        copy = shutil.copytree(newest, out / f"{number}")  # checksums are remembered by path and time
        harm(copy / name, how, draw)
        unchanged = (copy / name).exists() and (copy / name).read_bytes() == (newest / name).read_bytes()
        unchecked = (name, how) == (MODEL.CHECKSUMS, "missing")  # as in checkpoints of earlier versions
        assert unchanged or unchecked and TRAIN.load_state(copy) or is_reported(copy / name, MODEL.damage(copy)), (name, how)
        shutil.rmtree(copy)
    damaged_checkpoint(shop, draw, stage)
    damaged_checkpoint(shop, draw, stage, "config.yaml", "flipped")


def damaged_model(shop: Shop, draw: random.Random, name: str | None = None, how: str | None = None, adapter: bool | None = None) -> None:
    """A damaged file of a model's or an adapter's folder is refused in one line, except where nothing can show the damage: formats without checksums."""
    adapter = draw.random() < 0.5 if adapter is None else adapter
    folder = finished(shop, "SFT") if adapter else Path(shutil.copytree(shop.base, shop.fresh() / "model"))
    names = [path.name for path in folder.iterdir() if "adapter" in path.name or not adapter and path.suffix in (".json", ".safetensors")]
    names += ["tokenizer.json", "chat_template.jinja"] if adapter else ["chat_template.jinja"]
    path, how = folder / (name or draw.choice(sorted(names))), how or draw.choice(HARMS)
    harm(path, how, draw)
    words = ["--model", shop.base, "--adapter", folder] if adapter else ["--model", folder]
    status, line = run(INFER, [*words, "--model.device", "cpu", "--prompt", "hi", "--max-new-tokens", "2"])
    if path.name not in ("generation_config.json", "tokenizer_config.json", "chat_template.jinja"):
        assert status == 2 or how in ("flipped", "zeros"), (path, how)
    assert status == 0 or str(folder) in line or "chat template" in line, line


@pytest.mark.parametrize("adapter", [False, True])
def test_damaged_model_folders_are_one_line(adapter, shop):
    names = ("adapter_config.json", "adapter_model.safetensors") if adapter else ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json")
    for number, (name, how) in enumerate(itertools.product(names, HARMS)):
        damaged_model(shop, random.Random(number), name, how, adapter)


def damaged_tokens(shop: Shop, draw: random.Random, name: str | None = None, how: str | None = None) -> None:
    """Token files and a tokenizer that were made from the data are made again; where they are named by the user, that is an error."""
    ids = finished(shop, "TRAIN").parent / "ids"
    names = sorted(path.relative_to(ids).as_posix() for path in ids.rglob("*") if path.is_file() and path.name != ".lock")
    path = ids / (name or draw.choice(names))
    harm(path, how or draw.choice(HARMS), draw)
    if path.name == "train_ids.bin" and path.exists():
        words = shop.words("TRAIN", ids.parent / "named", shop.fresh())
        words[words.index("--data") + 1] = str(path)
        status, line = run(TRAIN, words)
        assert status == 2 and f"{path} is missing or damaged" in line, line
    status, line = run(TRAIN, shop.words("TRAIN", ids.parent / "again"))
    assert status == 0 and files_of(ids.parent / "again") == shop.whole("TRAIN").files, line


@pytest.mark.parametrize("name", ["train_ids.bin", "val_ids.json", "checksums.json", "tokenizer/tokenizer.json", "tokenizer/trained_on.json"])
def test_damaged_token_files_are_made_again(name, shop):
    for how in ("empty", "flipped"):
        damaged_tokens(shop, random.Random(name), name, how)


def damaged_cache(shop: Shop, draw: random.Random, name: str | None = None, how: str | None = None) -> None:
    cache = finished(shop, "DISTILL --cache")
    names = sorted(path.name for path in cache.iterdir() if path.name[0] != ".")
    path = cache / (name or draw.choice(names))
    harm(path, how or draw.choice(HARMS), draw)
    status, line = run(DISTILL, [*(ROWS + "--model {base} --data {shop}/text.txt --cache-dir").format(base=shop.base, shop=shop.folder, ids=cache.parent / "ids").split(), cache,
                                 "--out", cache.parent / "run", "--teacher", shop.base])
    if path.name == MODEL.CHECKSUMS and not path.exists():  # as in caches of earlier versions
        assert status == 0, line
        return
    assert status == 2 and (is_reported(path, line) or path.name == "cache.json" and re.search("cache.json.*not valid|has (no|a) cache", line)), line


def test_a_damaged_cache_of_a_teacher_is_one_line(shop):
    for number, (name, how) in enumerate(itertools.product(("entries.bin", "cache.json", "tokenizer.json", "checksums.json"), HARMS)):
        damaged_cache(shop, random.Random(number), name, how)


def damaged_log(shop: Shop, draw: random.Random, stage: str | None = None) -> None:
    """A damaged log loses lines and nothing else."""
    stage, out = stage or draw.choice(("TRAIN", "RL ppo", "DISTILL")), shop.fresh() / "out"
    whole = shop.whole(stage)
    shop.start(stage, out, whole.changes * 3 // 4).communicate()
    for path in (out / "log.jsonl", out / "rollouts.jsonl"):
        if path.exists():
            for _ in range(draw.randint(1, 5)):
                harm(path, draw.choice(("cut", "flipped", "flipped", "flipped", "zeros")), draw)
                if not path.stat().st_size:
                    break
    status, line = run(STAGES[stage][0], shop.words(stage, out))
    same = ({name: content for name, content in files.items() if not name.endswith(".jsonl")} for files in (files_of(out), whole.files))
    assert status == 0 and next(same) == next(same), line


def test_a_damaged_log_stops_no_run(shop):
    for seed in range(3):
        damaged_log(shop, random.Random(seed), ("TRAIN", "RL ppo", "RL ppo")[seed])


# -------------------------------------------------------------------------------------------- numbers and clocks


def finite(folder: Path) -> bool:
    """Whether all saved weights below a folder are finite numbers, and there are some."""
    tensors = [tensor for path in folder.rglob("*.safetensors") for _, tensor in MODEL.read_tensors(path)]
    return bool(tensors) and all(bool(tensor.isfinite().all()) for tensor in tensors)


@contextlib.contextmanager
def broken_steps(steps, where: str = "loss"):
    """In these forward passes with gradients the outputs, or only their gradients, are not numbers."""
    forward, passes = MODEL.LanguageModel.forward, itertools.count()

    def broken(model, *words, **more):
        out = forward(model, *words, **more)
        if not torch.is_grad_enabled() or next(passes) not in steps:
            return out

        def spoil(part):
            if isinstance(part, torch.Tensor) and part.requires_grad:
                if where == "loss":
                    return part * math.nan
                part.register_hook(lambda gradient: gradient * math.nan)
            return part

        return out._make(TRAIN.map_tensors(spoil, list(out)))

    with mock.patch.object(MODEL.LanguageModel, "forward", broken):
        yield


LEARNING = [stage for stage in STAGES if "--resume" in STAGES[stage][1]]


def not_numbers(shop: Shop, draw: random.Random, stage: str | None = None, where: str | None = None) -> None:
    """A step whose loss or gradients are not numbers is skipped and counted. A run of such steps alone is an error."""
    stage, where, out = stage or draw.choice(LEARNING), where or draw.choice(("loss", "gradient")), shop.fresh() / "out"
    with broken_steps((draw.randint(0, 5),), where):
        status, line = run(STAGES[stage][0], shop.words(stage, out))
    assert status == 0 and finite(out) and TRAIN.json_lines(out / "log.jsonl")[-2]["skipped_steps"] == 1, line
    with broken_steps(range(10**6), where):
        status, line = run(STAGES[stage][0], [*shop.words(stage, out.parent / "other"), "--training.max_skipped_steps", draw.choice((2, 100))])
    assert status == 2 and "had a non-finite loss or gradient" in line and not (out.parent / "other/config.json").exists(), line
    assert finite(out.parent / "other") or not list((out.parent / "other").glob("ckpt*"))


@pytest.mark.parametrize("stage, where", zip(LEARNING, itertools.cycle(("loss", "gradient"))))
def test_steps_that_are_not_numbers_are_skipped(stage, where, shop):
    not_numbers(shop, random.Random(stage), stage, where)


def not_a_weight(shop: Shop, draw: random.Random, value: str | None = None) -> None:
    """A weight in the data that is not a finite number, in JSON or in a table."""
    value, table, number = value or draw.choice(("NaN", "Infinity", "-Infinity", "1e999", '"nan"', "1" + 400 * "0", "[]")), draw.random() < 0.5, draw.randint(2, 20)
    path, words = shop.fresh() / f"chats.{'csv' if table else 'jsonl'}", shop.words("SFT", shop.fresh() / "out")
    weights = ["1"] * 20
    weights[number - 1] = value
    if table:
        path.write_text("prompt,completion,weight\n" + "".join(f"Who is {i}?,me,{weight.strip(chr(34))}\n" for i, weight in enumerate(weights)))
    else:
        path.write_text("".join(f'{{"prompt": "Who is {i}?", "completion": "me", "weight": {weight}}}\n' for i, weight in enumerate(weights)))
    words[words.index("--data") + 1] = str(path)
    status, line = run(SFT, words)
    assert status == 2 and re.search(f"{path}:{number + table}: weight .* must be a number", line), line


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999", '"nan"', pytest.param("1" + 400 * "0", id="long")])
def test_weights_of_the_data_are_numbers(value, shop):
    for seed in range(4):
        not_a_weight(shop, random.Random(seed), value)


def broken_base(shop: Shop, draw: random.Random, stage: str | None = None) -> None:
    """A base model, teacher or policy with a weight that is not a number is never trained into a finished model."""
    stage, base = stage or draw.choice([stage for stage in LEARNING if stage != "TRAIN"]), Path(shutil.copytree(shop.base, shop.fresh() / "model"))
    model = MODEL.load(str(base))
    weight = model.get_parameter(draw.choice([name for name, _ in model.named_parameters() if "layers" in name]))
    with torch.no_grad():
        weight.view(-1)[draw.randrange(weight.numel())] = draw.choice((math.nan, math.inf, -math.inf))
    MODEL.save(model, base)
    out = shop.fresh() / "out"
    status, line = run(STAGES[stage][0], [str(base) if word == str(shop.base) else word for word in shop.words(stage, out)])
    assert status == 2 and ("non-finite" in line or "not finite" in line) and not (out / "config.json").exists(), line


@pytest.mark.parametrize("stage", ["SFT", "RL dpo", "RL grpo", "DISTILL"])
def test_a_broken_base_is_not_trained(stage, shop):
    broken_base(shop, random.Random(stage), stage)


@contextlib.contextmanager
def jumping_clocks(draw: random.Random):
    """The clock of the day jumps by up to ten days in both directions, the monotonic clocks forward only, as after a suspended machine."""
    offsets = {"time": 0.0, "monotonic": 0.0, "perf_counter": 0.0}

    def jumping(name: str):
        real = getattr(time, name)

        def read() -> float:
            if draw.random() < 0.05:
                offsets[name] += draw.uniform(-864_000 if name == "time" else 0, 864_000)
            return real() + offsets[name]

        return read

    with mock.patch.multiple(time, **{name: jumping(name) for name in offsets}):
        yield


def jumps(shop: Shop, draw: random.Random, stage: str | None = None) -> None:
    """A run under jumping clocks ends with the same files, and with a time limit it ends."""
    stage, out = stage or draw.choice(LEARNING), shop.fresh() / "out"
    with jumping_clocks(draw):
        status, line = run(STAGES[stage][0], shop.words(stage, out))
        assert status == 0 and files_of(out) == shop.whole(stage).files, line
        words = [word.replace("--max-steps", "--max-minutes") for word in shop.words("TRAIN", out.parent / "timed")]
        words[words.index("--max-minutes") + 1] = "0.02"
        status, line = run(TRAIN, words)
    assert status == 0 and finite(out.parent / "timed"), line
    numbers = [value for record in TRAIN.json_lines(out.parent / "timed" / "log.jsonl") for value in record.values()]
    assert numbers and all(math.isfinite(value) for value in numbers)


def test_clocks_that_jump_change_no_result(shop):
    jumps(shop, random.Random(1), "TRAIN")


# ------------------------------------------------------------------------------------------------- two at once


def two_at_once(shop: Shop, draw: random.Random, stage: str | None = None) -> None:
    """The same command twice at the same time: one of the two is refused or continues what the other finished, and the files are those of one run."""
    stage, out = stage or draw.choice(list(STAGES)), shop.fresh() / "out"
    processes = [shop.start(stage, out) for _ in range(2)]
    messages = [process.communicate()[1] for process in processes]
    statuses = [process.returncode for process in processes]
    assert 0 in statuses and set(statuses) <= {0, 2} and not any("Traceback" in text for text in messages), messages
    for status, text in zip(statuses, messages, strict=True):
        assert status == 0 or re.search(f"error: .*(another run is writing to|{COMPLETE})", text), text
    assert final_files(out) == shop.whole(stage).files


@pytest.mark.parametrize("stage", ["TRAIN", "DISTILL --cache", "DISTILL --generate", "QUANT int8"])
def test_two_runs_in_a_folder(stage, shop):
    two_at_once(shop, random.Random(0), stage)


def shared_tokens(shop: Shop, draw: random.Random) -> None:
    """Two runs with other output folders prepare the same token files at the same time."""
    folder = shop.fresh()
    processes = [shop.start("TRAIN", folder / name) for name in ("a", "b")]
    for process, name in zip(processes, ("a", "b"), strict=True):
        _, message = process.communicate()
        assert process.returncode == 0 and files_of(folder / name) == shop.whole("TRAIN").files, message


def test_two_runs_prepare_the_same_token_files(shop):
    shared_tokens(shop, random.Random(0))


# ------------------------------------------------------------------------------------------------- hostile files


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


CODE = "import os\nos.mkdir({marker!r})\nclass Evil:\n    pass\n"
PLANTED = ("checkpoint", "model", "adapter", "tokens", "data", "remote code", "tokenizer code")


def planted(shop: Shop, draw: random.Random, kind: str | None = None) -> None:
    """A pickle or a Python file in a downloaded folder would make a folder. It never runs."""
    kind, folder = kind or draw.choice(PLANTED), shop.fresh()
    marker, form = folder / "ran", draw.choice(("zip", "legacy", "pickle"))

    def plant(path: Path) -> None:
        if form == "pickle":
            path.write_bytes(pickle.dumps({"lm_head.weight": Payload(marker)}))
        else:
            torch.save({"lm_head.weight": Payload(marker)}, path, _use_new_zipfile_serialization=form == "zip")

    plant(folder / "bait")
    pickle.loads((folder / "bait").read_bytes()) if form == "pickle" else torch.load(folder / "bait", weights_only=False)
    assert marker.exists()  # the payload is a real one
    marker.rmdir()
    base = Path(shutil.copytree(shop.base, folder / "model"))
    script, words = INFER, ["--model", base, "--prompt", "hi"]
    if kind == "checkpoint":
        out = finished(shop, "TRAIN")
        for checkpoint in TRAIN.checkpoints(out):
            plant(checkpoint / TRAIN.STATE_FILE)
            MODEL.write_checksums(checkpoint, [path for path in checkpoint.iterdir() if path.name != MODEL.CHECKSUMS])
        script, words = TRAIN, shop.words("TRAIN", out)
    elif kind == "model":
        (base / "model.safetensors").unlink()
        plant(base / "pytorch_model.bin")
    elif kind == "adapter":
        adapter = finished(shop, "SFT")
        (adapter / "adapter_model.safetensors").unlink()
        plant(adapter / "adapter_model.bin")
        words += ["--adapter", adapter]
    elif kind in ("tokens", "data"):
        path = folder / ("train_ids.bin" if kind == "tokens" else f"data{draw.choice(('.txt', '.jsonl', '.parquet', '.json', '.csv'))}")
        plant(path)
        script, words = TRAIN, [*shop.words("TRAIN", folder / "out"), "--tokenizer.name", base]
        words[words.index("--data") + 1] = path
        del words[words.index("--tokenizer.kind") : words.index("--tokenizer.kind") + 2]
    else:
        (base / "evil.py").write_text(CODE.format(marker=str(marker)))
        name = "config.json" if kind == "remote code" else "tokenizer_config.json"
        raw = json.loads((base / name).read_text())
        raw |= {"model_type": "evil", "architectures": ["Evil"]} if kind == "remote code" else {"tokenizer_class": "Evil"}
        classes = ("AutoConfig", "AutoModel", "AutoModelForCausalLM") if kind == "remote code" else ("AutoTokenizer",)
        (base / name).write_text(json.dumps({**raw, "auto_map": {key: ["evil.Evil", "evil.Evil"] if key == "AutoTokenizer" else "evil.Evil" for key in classes}}))
    status, line = run(script, words)
    assert status == 2 and not marker.exists(), line


@pytest.mark.parametrize("kind", PLANTED)
def test_planted_code_never_runs(kind, shop):
    for seed in range(3):
        planted(shop, random.Random(seed), kind)


TEMPLATES = (
    "{{{{ cycler.__init__.__globals__.os.mkdir('{marker}') }}}}", "{{{{ lipsum.__globals__['os'].mkdir('{marker}') }}}}",
    "{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}", "{{{{ raise_exception.__globals__['__builtins__']['open']('{marker}', 'w') }}}}",
    "{{{{ (strftime_now|attr('__globals__'))['datetime'] }}}}", "{{{{ messages.__class__.__base__ }}}}", "{{{{ '{{0.__class__.__mro__}}'.format(messages) }}}}",
    "{{% set _ = messages.append(messages[0]) %}}", "{{% set _ = messages[0].update(role='king') %}}", "{{% for i in range(10**10) %}}a{{% endfor %}}",
    "{{% macro again() %}}{{{{ again() }}}}{{% endmacro %}}{{{{ again() }}}}", "{{% include '/etc/passwd' %}}", "{{% import 'os' as os %}}{{{{ os.mkdir('{marker}') }}}}",
    "{{{{ self.__init__.__globals__ }}}}", "{{{{ messages[0].content.encode.__self__.__class__ }}}}", "{{% for m in messages %}}{{{{ m", "{{{{ namespace().__class__.__init__.__globals__ }}}}",
)


def hostile_template(shop: Shop, draw: random.Random, template: str | None = None) -> None:
    """A chat template that reaches for Python's internals, changes its input or never ends is refused in one line."""
    folder = shop.fresh()
    base, marker = Path(shutil.copytree(shop.base, folder / "model")), folder / "ran"
    (base / "chat_template.jinja").write_text((template or draw.choice(TEMPLATES)).format(marker=marker))
    status, line = run(INFER, ["--model", base, "--prompt", "hi", "--max-new-tokens", "2"])
    assert status == 2 and re.search("chat template|at least one token", line) and not marker.exists(), line  # undefined values are empty texts


@pytest.mark.parametrize("template", TEMPLATES, ids=range(len(TEMPLATES)))
def test_templates_stay_in_their_sandbox(template, shop):
    hostile_template(shop, random.Random(0), template)


# --------------------------------------------------------------------------------------------------- random input


def tried(check: Callable, values: st.SearchStrategy, examples: int, seed: int | None = None) -> int:
    """Call check(value) for so many values (the same in each run unless there is a seed). An error shows the smallest value that fails."""
    count = 0

    @hypothesis.settings(max_examples=examples, derandomize=seed is None, database=None, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(values)
    def cases(value) -> None:
        nonlocal count
        count += 1
        check(value)

    (cases if seed is None else hypothesis.seed(seed)(cases))()
    return count


TEXT = st.sampled_from(("", "a", "null", "nan", "1e999", "-1", "\0", "{", "[[", "<|im_end|>", "{{ 1 }}", "\u2028", "010", "on", "~", "none", "\ud800", "é\u0301", "\n")) | st.text("aé {}[]:\"'\\<|>\t\r0.-", max_size=12)
LEAF = st.none() | st.booleans() | st.integers(-2, 9) | st.sampled_from((10**20, -(10**400), 0.5, -0.0, 1e308, math.nan, math.inf)) | TEXT
TREE = LEAF | st.recursive(LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6)
EDITS = st.lists(st.tuples(st.sampled_from(("set", "drop", "add", "copy")), st.integers(0, 999), TEXT, TREE), max_size=2)


def edited(tree, edits: list[tuple]):
    """A copy of a JSON tree in which single places are replaced, removed, added or copied from elsewhere."""
    tree = {"": copy.deepcopy(tree)}
    for kind, number, key, value in edits:
        places = []

        def walk(node, places=places) -> None:
            for name in list(node) if isinstance(node, dict) else range(len(node)):
                places.append((node, name))
                if isinstance(node[name], (dict, list)):
                    walk(node[name])

        walk(tree)
        node, name = places[number % len(places)]
        if kind == "copy":
            value = copy.deepcopy(places[number // 2 % len(places)][0])
        if kind == "drop" and node is not tree:
            del node[name]
        elif kind == "add" and isinstance(node[name], (dict, list)):
            node[name].append(value) if isinstance(node[name], list) else node[name].update({key: value})
        else:
            node[name] = value
    return tree[""]


def near(*good) -> st.SearchStrategy:
    """Values with up to two edits from one that is accepted."""
    return st.builds(edited, st.sampled_from(good), EDITS)


SCRIPTS = {TOKENIZER: "tokenizer", INFER: "inference", TRAIN: "training", SFT: "sft", RL: "rl", DISTILL: "distill", QUANT: "quantization"}
FIELDS = {script: {f"{section}.{f.name}": f for section, kind in script.SECTIONS.items() for f in dataclasses.fields(kind)} for script in SCRIPTS}


def given_keys(script) -> st.SearchStrategy:
    """(key, value) of a setting, mostly of the right type."""
    def values(key: str) -> st.SearchStrategy:
        field = FIELDS[script][key]
        return st.tuples(st.just(key), st.sampled_from([MODEL.default_of(field), *field.metadata["choices"]]) | st.sampled_from((0, 1, 2, 0.5, True, "1", [], {})) | TREE)

    return st.sampled_from(list(FIELDS[script])).flatmap(values)


def settled(words: list[str], script) -> None:
    """The settings of a script are read, or refused in one line."""
    read = partial(MODEL.load_config, sections=script.SECTIONS, primary=SCRIPTS[script], actions=getattr(script, "ACTIONS", {}), doc=script.__doc__)
    run(SimpleNamespace(main=read), words)


def settings_files(shop: Shop) -> tuple[Callable, st.SearchStrategy]:
    """Settings files: YAML of real keys with any values, and text that looks like YAML."""
    path = shop.fresh() / "settings.yaml"

    def check(case) -> None:
        script, content = case
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
        settled(["--config", str(path)], script)

    def content_for(script) -> st.SearchStrategy:
        def nested(pairs: list) -> dict:
            tree: dict = {}
            for key, value in pairs:
                section, _, name = key.partition(".")
                tree.setdefault(section, {})[name] = value
            return tree

        trees = st.builds(edited, st.lists(given_keys(script), max_size=3).map(nested), st.just([]) | EDITS)
        return st.tuples(st.just(script), trees.map(json.dumps) | st.builds(yaml.safe_dump, trees) | pieces.map("".join))

    pieces = st.lists(st.sampled_from((*"-:{}[]&*!|>%@`\"'#,\n \t?<", "\n  ", "model", "name", "training", ": ", "!!python/object/apply:os.abort []", "&a", "*a", "<<", "---", "1", "~")) | TEXT)
    return check, st.sampled_from(list(SCRIPTS)).flatmap(content_for)


def flags(shop: Shop) -> tuple[Callable, st.SearchStrategy]:
    """Command lines of real and unknown flags with any values."""
    def lines_for(script) -> st.SearchStrategy:
        names = st.sampled_from([*FIELDS[script], *(key.partition(".")[2] for key in FIELDS[script]), *getattr(script, "ACTIONS", {}), *MODEL.COMMON, *MODEL.SHORT_FLAGS])
        values = LEAF.map(str) | TREE.map(json.dumps)
        pair = given_keys(script).map(lambda pair: (pair[0], pair[1] if isinstance(pair[1], str) else json.dumps(pair[1]))) | st.tuples(names, values) | st.tuples(TEXT, values)
        flag = st.builds(lambda pair, equals: ["--" + "=".join(pair)] if equals else [f"--{pair[0]}", pair[1]], pair, st.booleans()) | st.lists(TEXT, max_size=1)
        return st.tuples(st.just(script), st.lists(flag, max_size=3))

    return lambda case: settled([word for words in case[1] for word in words], case[0]), st.sampled_from(list(SCRIPTS)).flatmap(lines_for)


TOOL = {"type": "function", "function": {"name": "rain", "description": "Rain?", "parameters": {"type": "object", "properties": {"day": {"type": "integer"}}, "required": ["day"]}}}
CHAT = [{"role": "user", "content": "Will it rain?"},
        {"role": "assistant", "content": "", "reasoning_content": "Hm.", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "rain", "arguments": {"day": 2}}}]},
        {"role": "tool", "tool_call_id": "1", "content": "yes"}, {"role": "assistant", "content": [{"type": "text", "text": "It rains."}]}]
QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who is Mip?"}]
RECORDS = {
    (SFT,): ({"messages": CHAT, "tools": [TOOL], "weight": 0.5}, {"prompt": "Hi", "completion": "Yo"}, {"prompt": QUESTION, "completion": CHAT[-1:]}, {"question": "Hi", "answer": "Yo"},
             {"instruction": "Say", "input": "a", "output": "b", "system": "c", "history": [["d", "e"]]},
             {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}], "tools": json.dumps([TOOL])}),
    (SFT, "--sft.task", "classify"): ({"text": "a fox", "label": "red"}, {"prompt": QUESTION, "label": 3, "weight": 2}, {"messages": QUESTION, "label": True}),
    (RL, "--rl.method", "dpo"): ({"prompt": "Hi", "chosen": "Yo", "rejected": "No", "margin": 1}, {"prompt": QUESTION, "chosen": CHAT[-1:], "rejected": "No"},
                                 {"chosen": [*QUESTION, CHAT[-1]], "rejected": [*QUESTION, {"role": "assistant", "content": "No"}], "tools": [TOOL]}),
    (RL, "--rl.method", "kto"): ({"prompt": "Hi", "completion": "Yo", "label": True}, {"prompt": QUESTION, "completion": CHAT[-1:], "label": 0}),
    (RL, "--rl.method", "grpo", "--rl.reward_funcs", "exact_answer"): ({"prompt": "Hi", "answer": "Yo"}, {"prompt": QUESTION, "answer": 3, "tools": [TOOL]}, {"messages": CHAT, "answer": "a"}),
    (TOKENIZER,): ({"text": "The red fox."}, {"content": "The red fox.", "id": 1}, {"text": ["a", "b"]}),
}


def records(shop: Shop) -> tuple[Callable, st.SearchStrategy]:
    """Data files: JSON lines, arrays, tables and bytes, read by every stage."""
    folder = shop.fresh()
    usual = ["--model.device", "cpu", "--model", shop.base, "--data.dir", folder, "--data.validation", "none", "--data"]

    def check(case) -> None:
        (script, *words), (suffix, content) = case
        path = folder / f"data{suffix}"
        path.write_bytes(content)
        run(script, [*words, *(["--dry-run"] if script is not TOKENIZER else []), *usual, path])

    def table(rows: list[dict], delimiter: str) -> bytes:
        text = io.StringIO()
        names = list(dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row))
        cells = [[row.get(name) for name in names] if isinstance(row, dict) else [row] for row in rows]
        csv.writer(text, delimiter=delimiter).writerows([names, *([json.dumps(cell) if isinstance(cell, (list, dict)) else cell for cell in row] for row in cells)])
        return text.getvalue().encode("utf-8", "surrogatepass")

    def content_for(kind: tuple) -> st.SearchStrategy:
        rows = st.lists(near(*RECORDS[kind]), min_size=1, max_size=3)
        lines = rows.map(lambda rows: "\n".join(map(json.dumps, rows)).encode())
        broken = st.builds(lambda text, place, part: text[: place % (len(text) + 1)] + part + text[place % (len(text) + 1) :], lines, st.integers(0, 500), st.binary(max_size=2))
        deep = st.sampled_from((b"[" * 10**5, b'{"prompt": ' * 10**4, b'{"prompt": "a", "weight": 1' + b"0" * 5000 + b"}"))
        forms = [st.tuples(st.sampled_from((".jsonl", ".json")), lines | lines | rows.map(lambda rows: json.dumps(rows).encode()) | broken | deep),
                 st.tuples(st.just(".csv"), rows.map(lambda rows: table(rows, ","))), st.tuples(st.just(".tsv"), rows.map(lambda rows: table(rows, "\t"))),
                 st.tuples(st.sampled_from((".jsonl", ".json", ".csv", ".txt", ".parquet", ".jsonl.gz", ".txt.gz")), st.binary(max_size=30))]
        return st.tuples(st.just(kind), st.one_of(forms))

    return check, st.sampled_from(list(RECORDS)).flatmap(content_for)


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
SHORT = {"max_tokens": 3, "temperature": 0.7, "seed": 3}
REQUESTS = {
    "/v1/completions": ({"prompt": "The red fox", **SHORT}, {"prompt": ["a", "b"], "n": 2, "echo": True, "logprobs": 2, **SHORT}, {"prompt": [5, 6], "stream": True, "stop": ["a", "b"], **SHORT},
                        {"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}, **SHORT},
                        {"prompt": "a", "structured_outputs": {"regex": "[a-z]+"}, "logit_bias": {"5": -100}, "min_p": 0.1, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.1, **SHORT},
                        {"prompt": "a", "structured_outputs": {"choice": ["yes", "no"]}, "presence_penalty": 1, "frequency_penalty": 0.5, "min_tokens": 1, "ignore_eos": True, **SHORT}),
    "/v1/chat/completions": ({"messages": QUESTION, **SHORT}, {"messages": CHAT[:3], "tools": [TOOL], "tool_choice": "auto", "stream": True, "stream_options": {"include_usage": True}, **SHORT},
                             {"messages": QUESTION, "tools": [TOOL], "tool_choice": "required", **SHORT}, {"messages": QUESTION, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "rain"}}, **SHORT},
                             {"messages": QUESTION, "logprobs": True, "top_logprobs": 2, "chat_template_kwargs": {"enable_thinking": False}, "response_format": {"type": "json_object"}, **SHORT}),
    "/v1/embeddings": ({"input": "The red fox"}, {"input": ["a", "b"], "encoding_format": "base64", "model": "base"}, {"input": [[5, 6], [7]]}),
    "/tokenize": ({"prompt": "The red fox"}, {"messages": CHAT, "tools": [TOOL]}),
    "/detokenize": ({"tokens": [5, 6, 7]},),
}


def bodies(shop: Shop) -> tuple[Callable, st.SearchStrategy]:
    """HTTP requests: each body is answered, or refused with a 4xx, and the server goes on."""
    good = {"prompt": "The red fox", "max_tokens": 4, "temperature": 0}
    answer = shop.client.post("/v1/completions", json=good).json()["choices"]

    def check(case) -> None:
        route, body = case
        found = shop.client.post(route, content=body, headers={"content-type": "application/json"})
        assert found.status_code == 200 or 400 <= found.status_code < 500 and found.json()["error"]["message"], (found.status_code, found.text)
        assert not re.search(r'"code": ?5\d\d', found.text)  # in a stream
        again = shop.client.post("/v1/completions", json=good)
        assert again.status_code == 200 and again.json()["choices"] == answer

    requests = [st.tuples(st.just(route), st.one_of([near(*good).map(lambda record: json.dumps(record).encode())] * 4 + [st.binary(max_size=20)])) for route, good in REQUESTS.items()]
    return check, st.one_of(requests[:2] + requests)


def lines(shop: Shop) -> tuple[Callable, st.SearchStrategy]:
    """Requests of INFER.py --jsonl, read against a loaded model."""
    session = INFER.load(str(shop.base), max_new_tokens=3, **{"model.device": "cpu"})

    def check(line: str) -> None:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(UserError):
            _, prompt, sampling = INFER._record(line, "stdin:1", session.sampling)
            session.complete(prompt, sampling)

    good = [{key: value for key, value in record.items() if key not in ("stream", "stream_options", "echo", "tool_choice", "response_format", "chat_template_kwargs", "model")}
            for route in ("/v1/completions", "/v1/chat/completions") for record in REQUESTS[route]]
    return check, near(*good, {"prompt": "a", "system": "b", "history": [["c", "d"]]}).map(json.dumps) | st.text(max_size=20)


RANDOM = {"settings files": settings_files, "flags": flags, "records": records, "requests (--jsonl)": lines, "requests (HTTP)": bodies}


@pytest.mark.parametrize("kind", RANDOM)
def test_random_input_is_accepted_or_refused_in_one_line(kind, shop):
    assert tried(*RANDOM[kind](shop), 40) >= 20


def jumps_in_service(shop: Shop, draw: random.Random) -> None:
    """A request under jumping clocks is answered or times out; later requests are answered."""
    body = {"prompt": "The red fox", "max_tokens": 4, "temperature": 0}
    answer = shop.client.post("/v1/completions", json=body).json()["choices"]
    with jumping_clocks(draw):
        statuses = {shop.client.post("/v1/completions", json=body).status_code for _ in range(3)}
    assert statuses <= {200, 408, 504}
    found = shop.client.post("/v1/completions", json=body)
    assert found.status_code == 200 and found.json()["choices"] == answer


def test_clocks_that_jump_do_not_stop_the_server(shop):
    jumps_in_service(shop, random.Random(0))


# What bench/reliability.py counts. Each function draws one case, and returns the number of cases if it draws several.
CASES = {
    **{f"kill -9: {stage}": partial(killed, stage=stage) for stage in STAGES},
    "full disk": full_disk, "read-only folder": read_only, "unreadable data": unreadable, "damaged checkpoint": damaged_checkpoint, "damaged model or adapter": damaged_model,
    "damaged token files": damaged_tokens, "damaged teacher cache": damaged_cache, "damaged log": damaged_log, "steps that are not numbers": not_numbers,
    "weights that are not numbers": not_a_weight, "broken base model": broken_base, "jumping clocks": jumps, "two runs, one folder": two_at_once,
    "two runs, one data.dir": shared_tokens, "planted code": planted, "hostile chat template": hostile_template,
    **{f"random {kind}": partial(lambda kind, shop, draw: tried(*RANDOM[kind](shop), 100, draw.getrandbits(32)), kind) for kind in RANDOM},
    "jumping clocks, server": jumps_in_service,
}
