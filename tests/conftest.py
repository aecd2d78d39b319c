"""Shared by all tests: offline, few threads' noise, tiny models and data made on the spot."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))  # they share the processor
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
import torch

import MODEL
import TOKENIZER

ROOT = Path(__file__).parent.parent
TINY = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=128)
WORDS = "the red fox ran over a small hill and saw one old owl near two blue lakes while rain fell on every tree".split()


def make_text(lines: int, seed: int = 0) -> list[str]:
    """Deterministic lines of 6 to 14 words."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda high: int(torch.randint(high, (1,), generator=generator))  # noqa: E731
    return [" ".join(WORDS[draw(len(WORDS))] for _ in range(6 + draw(9))).capitalize() + "." for _ in range(lines)]


def launch(folder, *words, stdin=None) -> subprocess.Popen:
    """python with these words, in this folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([sys.executable, *map(str, words)], cwd=folder, env=environment, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def two_processes(folder: Path, runs: dict[str, list[list[str]]]) -> None:
    """Two processes run scripts, each with its lists of arguments one after another."""
    (folder / "runs.json").write_text(json.dumps(runs))
    process = launch(ROOT, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", ROOT / "tests" / "two_ranks.py", folder / "runs.json")
    _, talk = process.communicate(timeout=280)
    assert process.returncode == 0, talk


def wait_for_steps(process: subprocess.Popen, count: int = 1) -> str:
    """What it says until so many steps are logged."""
    seen = ""
    for line in process.stderr:
        seen += line
        if seen.count("| loss") == count:
            return seen
    raise AssertionError(f"ended with {process.wait()} before step {count}:\n{seen}")


def kills(times: int, *words) -> Iterator[subprocess.Popen]:
    """Starts python with these words in the repository and kills it (-9) at a random moment, several times."""
    draw = random.Random(5)
    for _ in range(times):
        process = launch(ROOT, *words)
        wait_for_steps(process, draw.randint(2, 9))
        time.sleep(draw.uniform(0, 0.1))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        yield process


@pytest.fixture(scope="module")
def one_thread():
    """Threads only wait for each other in models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer():
    return TOKENIZER.train(make_text(400), 320, "bpe")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer):
    """A tiny random Llama with its tokenizer, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("model")
    config = MODEL.ModelConfig(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
                               eos_token_id=tokenizer.eos_token_id, initializer_range=0.2, **TINY)
    MODEL.save(MODEL.build(config, seed=1), folder)
    TOKENIZER.save(tokenizer, folder)
    return folder


@pytest.fixture()
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(make_text(200)) + "\n")
    return path


def foreign_tokenizer(kind: str, texts: list[str], size: int = 330):
    """A tokenizer of a kind that the program does not train: unigram (Kudo 2018, SentencePiece's) or wordpiece (BERT's)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = [TOKENIZER.END, TOKENIZER.PAD, *TOKENIZER.CHAT_TOKENS, TOKENIZER.MASK, TOKENIZER.UNKNOWN]
    options = dict(vocab_size=size, special_tokens=special, show_progress=False)
    if kind == "unigram":
        raw, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer(unk_token=TOKENIZER.UNKNOWN, **options)
        raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Digits(individual_digits=True)])
        raw.decoder = decoders.Metaspace()
    else:
        raw, trainer = Tokenizer(models.WordPiece(unk_token=TOKENIZER.UNKNOWN)), trainers.WordPieceTrainer(**options)
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    raw.train_from_iterator(texts, trainer)
    raw.post_processor = processors.TemplateProcessing(single=f"{TOKENIZER.END} $A", pair=f"{TOKENIZER.END} $A $B",
                                                       special_tokens=[(TOKENIZER.END, raw.token_to_id(TOKENIZER.END))])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=TOKENIZER.END, eos_token=TOKENIZER.END, pad_token=TOKENIZER.PAD,
                                   mask_token=TOKENIZER.MASK, unk_token=TOKENIZER.UNKNOWN, clean_up_tokenization_spaces=False)
