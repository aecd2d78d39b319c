"""Reliability: a run that is killed, a full disk, damaged files and hostile input cost nothing that was saved and are reported in one line."""

import contextlib
import itertools
import json
import random
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT, launch, make_text

import DISTILL
import MODEL
import QUANT
import RL
import SFT
import TOKENIZER
import TRAIN

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
        self.folder, self.base, self.numbers, self.known = folder, folder / "base", itertools.count(), {}
        lines = make_text(240, seed=5)
        tokenizer = TOKENIZER.train(lines, kind="byte")
        TOKENIZER.ensure_chat(tokenizer)
        ends = [TOKENIZER.chat_ends(tokenizer).stop[0], tokenizer.eos_token_id, *map(ord, "aeiou")]  # so that completions end
        config = MODEL.ModelConfig(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=ends, initializer_range=0.2, hidden_size=32,
                                   intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=160)
        MODEL.save(MODEL.build(config, seed=1), self.base)
        TOKENIZER.save(tokenizer, self.base)
        (folder / "text.txt").write_text("\n".join(lines[:60]) + "\n")
        asked, answers, others = lines[:40], lines[40:80], lines[80:120]
        chats = [{"messages": [{"role": "user", "content": a[:12]}, {"role": "assistant", "content": b[:12]}]} for a, b in zip(asked, answers, strict=True)]
        pairs = [{"prompt": a[:20], "chosen": b[:20], "rejected": c[:20]} for a, b, c in zip(asked, answers, others, strict=True)]
        prompts = [{"prompt": a[:20], "answer": "fox"} for a in asked]
        for name, records in {"chats": chats, "pairs": pairs, "prompts": prompts}.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    def fresh(self) -> Path:
        """A new folder."""
        folder = self.folder / f"{next(self.numbers)}"
        folder.mkdir()
        return folder

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
            _, said = (process := self.start(stage, out)).communicate()
            assert process.returncode == 0, said
            self.known[stage] = Whole(files_of(out), int(said.rpartition("changes: ")[2]), time.perf_counter() - clock)
        return self.known[stage]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return Shop(tmp_path_factory.mktemp("shop"))


TIMES = ("seconds", "tokens_per_second", "mfu", "time/rollout", "time/score", "time/reward")
VARIED = ("result.json", "config.yaml", "loss.png", "rollouts.png", ".lock", "checksums.json")  # times and paths


def files_of(out: Path) -> dict:
    """{name: content} of the files that a run leaves, without its checkpoints, and without times and paths."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.name == "log.jsonl":
            found[name] = [{key: value for key, value in record.items() if key not in TIMES} for record in TRAIN.json_lines(path)]
        elif path.name == "tokenizer_config.json":  # which says whether it was loaded from a folder
            found[name] = {key: value for key, value in json.loads(path.read_text()).items() if "local" not in key}
        elif path.is_file() and not name.startswith("ckpt-step-") and path.name not in VARIED:
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
        _, said = process.communicate()
        if process.returncode == 0 or process.returncode == 2 and re.search(COMPLETE, said):
            break
        assert process.returncode == -signal.SIGKILL, said
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
