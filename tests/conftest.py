"""Shared by all tests: offline mode, number of threads, tiny models and generated data."""

import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))  # share the processor
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
import torch
import torch.nn.functional as F

import MODEL
import TOKENIZER

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when it is imported

ROOT = Path(__file__).parent.parent
TINY = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=128)
WORDS = "the red fox ran over a small hill and saw one old owl near two blue lakes while rain fell on every tree".split()


def make_text(lines: int, seed: int = 0) -> list[str]:
    """Deterministic lines of 6 to 14 words."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda high: int(torch.randint(high, (1,), generator=generator))  # noqa: E731
    return [" ".join(WORDS[draw(len(WORDS))] for _ in range(6 + draw(9))).capitalize() + "." for _ in range(lines)]


def in_file(path: Path, words: list, script, primary: str) -> list[str]:
    """Write default flags to a settings file, so that a test can override them: a flag can be given only once."""
    settings, files, sections = {}, [], script.SECTIONS
    kinds = {f"{name}.{key}": hint for name, kind in sections.items() for key, hint in MODEL.field_types(kind).items()}
    blocks = [name for name in MODEL.field_types(sections[primary]) if name in MODEL.SECTIONS]
    words = [str(word) for word in words]
    starts = [i for i, word in enumerate(words) if word.startswith("--")]
    for start, stop in zip(starts, [*starts[1:], len(words)], strict=True):
        if words[start] == "--config":
            files += words[start:stop]
            continue
        for key, value in MODEL.read_flags(words[start:stop], kinds, primary, blocks, {}, MODEL.SHORT_FLAGS)[0].items():
            *above, name = key.split(".")
            inner = settings
            for part in above:
                inner = inner.setdefault(part, {})
            inner[name] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings))
    return [*files, "--config", str(path)]


def run_here(script: Path, words: tuple, environment: dict) -> None:
    """Run a script in a forked child, which has its imports already: importing would take longer than these short runs."""
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        signal.signal(number, handler)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)
    os.environ.update(environment, TOKENIZERS_PARALLELISM="false")  # the thread pool does not survive a fork
    torch.set_num_threads(1)
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)  # an earlier test may have changed it
    GradientState._reset_state()
    sys.argv = [str(script), *map(str, words)]
    code: object = 1
    try:
        runpy.run_path(str(script), run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def launch(folder, script, *words, stdin=subprocess.DEVNULL, fork=True, **environment) -> subprocess.Popen:
    """Start a script in a separate process: a fork of this process, or a new interpreter if not `fork` or if CUDA is available."""
    if fork := fork and not torch.cuda.is_available():
        import accelerate  # noqa: F401 (imported once for all children)

        MODEL.import_peft()
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    command, become = [sys.executable, str(script), *map(str, words)], partial(run_here, Path(folder, script), words, environment)
    return subprocess.Popen(command, cwd=folder, env={**os.environ, **environment}, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            preexec_fn=become if fork else None)


def dockerfile() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile: (name, rest of the line)."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in "\n".join(lines).replace("\\\n", " ").splitlines() if line]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def two_ranks(*words) -> None:
    """Run tests/two_ranks.py in two processes, as torchrun does."""
    both = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [launch(ROOT, "tests/two_ranks.py", *words, RANK=rank, LOCAL_RANK=rank, **both) for rank in "01"]
    for process in processes:
        _, log = process.communicate(timeout=280)
        assert process.returncode == 0, log


def two_processes(folder: Path, runs: dict[str, list[list[str]]]) -> None:
    """Run scripts in two processes: {script: lists of arguments}, one run after another."""
    (folder / "runs.json").write_text(json.dumps(runs))
    two_ranks(folder / "runs.json")


def wait_for_steps(process: subprocess.Popen, count: int = 1) -> str:
    """The process's stderr until `count` steps are logged."""
    seen = ""
    for line in process.stderr:
        seen += line
        if seen.count("| loss") == count:
            return seen
    raise AssertionError(f"exit status {process.wait()} before step {count}:\n{seen}")


def emulate_bfloat16() -> None:
    """Compute bfloat16 products in float32 from rounded inputs and round the result. It equals torch's product, which is up to
    100 times slower on processors without bfloat16."""
    half, linear, attention = torch.bfloat16, F.linear, F.scaled_dot_product_attention

    def chosen(x) -> bool:
        return x.device.type == "cpu" and (x.dtype is half or torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is half)

    def rounded(x):
        return x if x is None or x.dtype is torch.bool else x.to(half).float()

    def linear_of_half(input, weight, bias=None):
        if not chosen(input):
            return linear(input, weight, bias)
        with torch.autocast("cpu", enabled=False):
            return linear(rounded(input), rounded(weight), rounded(bias)).to(half)

    def attention_of_half(query, key, value, attn_mask=None, *more, **options):
        if not chosen(query):
            return attention(query, key, value, attn_mask, *more, **options)
        with torch.autocast("cpu", enabled=False):
            return attention(*map(rounded, (query, key, value, attn_mask)), *more, **options).to(half)

    F.linear, F.scaled_dot_product_attention = linear_of_half, attention_of_half


def lacks_bfloat16() -> bool:
    """Whether MODEL.py chooses float32 on this processor if FAST_TYPE is not set."""
    with mock.patch.dict(os.environ):
        os.environ.pop("FAST_TYPE", None)
        slow = MODEL.fast_half("cpu") is None
    MODEL.fast_half.cache_clear()
    return slow


if os.environ.get("FAST_TYPE") == "bfloat16" and lacks_bfloat16():
    emulate_bfloat16()


@pytest.fixture(scope="module")
def one_thread():
    """Use one thread: more threads slow down models this small."""
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


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[Callable[[str], None]]:
    """A file system of this size in a folder; yields a function that mounts it again with other options."""
    folder.mkdir()
    if not shutil.which("mount") or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)  # mapped weights may still be open


@pytest.fixture()
def small_disk(tmp_path):
    """A folder on a file system of 2 MB."""
    with mounted(tmp_path / "disk", "2m"):
        yield tmp_path / "disk"


@pytest.fixture()
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(make_text(200)) + "\n")
    return path


def foreign_tokenizer(kind: str, texts: list[str], size: int = 330):
    """A tokenizer of a kind that TOKENIZER.py cannot train: unigram (Kudo 2018, as in SentencePiece) or wordpiece (BERT)."""
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


def saved_adapter(base, folder, seed, **more):
    """Save a LoRA adapter with peft that changes the model's completions."""
    from transformers import AutoModelForCausalLM

    import MODEL

    peft = MODEL.import_peft()
    torch.manual_seed(seed)
    config = peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **more})
    tuned = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.5)
    tuned.save_pretrained(folder)
    return str(folder)
