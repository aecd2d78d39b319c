"""Compare all methods of `QUANT.py --compare`, and the exports in their runtimes.

    python bench/quant.py --model out                         # prints the table and plots bench/compare.png

Accepts the settings of QUANT.py. The other runtimes run on the CPU, with as many threads as torch: llama.cpp, onnxruntime,
OpenVINO, and transformers.js in headless Chromium. Runtimes that are not installed are skipped, and a line on stderr names the
packages to install. If optimum-intel needs an older transformers than this project, install it in a separate environment and add
its bin folder to PATH.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import threading
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from torch import Tensor

import MODEL
import QUANT
from MODEL import UserError, say


class OnnxRuntime:
    needs = {}  # {module or program: command to install it}, besides the requirements of the export
    files = "onnx/*"

    def __init__(self, folder: Path, context: int):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        [path] = folder.glob("onnx/*.onnx")
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def step(self, ids: list[int], past: dict) -> tuple[Tensor, dict]:
        """Logits (T, V) of the next tokens, and the keys and values (1, H, P + T, D) of all tokens."""
        states = self.session.get_inputs()[3:]
        past = past or {state.name: np.zeros((1, state.shape[1], 0, state.shape[3]), np.float32) for state in states}
        before = past[states[0].name].shape[2]
        inputs = {"input_ids": np.array([ids]), "position_ids": np.arange(before, before + len(ids))[None],
                  "attention_mask": np.ones((1, before + len(ids)), np.int64)}
        logits, *new = self.session.run(None, {**inputs, **past})
        return torch.from_numpy(logits[0]), dict(zip(past, new, strict=True))

    def logits(self, ids: list[int]) -> Tensor:
        return self.step(ids, {})[0]

    def times(self, prompt: list[int], count: int) -> list[float]:
        start, times, new, past = time.perf_counter(), [], prompt, {}
        for _ in range(count):
            logits, past = self.step(new, past)
            new = [int(logits[-1].argmax())]
            times.append(time.perf_counter() - start)
        return times


class OpenVINO:
    needs = {"openvino_genai": "pip install openvino-genai"}
    files = "openvino_model.*"

    def __init__(self, folder: Path, context: int):
        import openvino
        import openvino_genai

        threads, scheduler = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}, openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        self.request = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", threads).create_infer_request()
        self.pipeline = openvino_genai.LLMPipeline(folder, "CPU", scheduler_config=scheduler, **threads)
        self.tensor = openvino.Tensor

    def logits(self, ids: list[int]) -> Tensor:
        row = np.array([ids])
        inputs = {"input_ids": row, "attention_mask": np.ones_like(row), "position_ids": np.arange(len(ids))[None],
                  "beam_idx": np.zeros(1, np.int32)}
        names = {name for port in self.request.model_inputs for name in port.names}
        self.request.reset_state()
        return torch.from_numpy(self.request.infer({name: inputs[name] for name in names})["logits"][0].copy())

    def times(self, prompt: list[int], count: int) -> list[float]:
        found = self.pipeline.generate(self.tensor(np.array([prompt])), max_new_tokens=count, ignore_eos=True, do_sample=False)
        first, each = found.perf_metrics.get_ttft().mean, found.perf_metrics.get_tpot().mean  # ms
        return [first / 1e3, (first + each * (count - 1)) / 1e3]


class LlamaCpp:
    needs = {"xllamacpp": "pip install xllamacpp"}
    files = "model.gguf"

    def __init__(self, folder: Path, context: int):
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path, settings.port, settings.n_parallel = str(folder / "model.gguf"), 0, 1
        settings.n_ctx, settings.verbosity = context + 64, 1  # room for a token after a full context; log only errors
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
        self.server = xllamacpp.Server(settings)
        self.letter = self.post("/tokenize", content="a")["tokens"][-1]

    def post(self, path: str, **values) -> dict:
        request = urllib.request.Request(self.server.listening_address + path, json.dumps(values).encode())
        return json.loads(urllib.request.urlopen(request).read())

    def complete(self, prompt: list[int], count: int, **values) -> dict:
        return self.post("/completion", prompt=prompt, n_predict=count, temperature=0, ignore_eos=True, **values)

    def logits(self, ids: list[int]) -> Tensor:
        """Log-probabilities. The server returns those of one position, before `logit_bias`. A letter is forced, because for a token
        that is part of a character the server returns none."""
        rows, settings = [], {"n_probs": 2**20, "cache_prompt": True, "logit_bias": [[self.letter, 1000]]}
        for length in range(1, len(ids) + 1):
            [token] = self.complete(ids[:length], 1, **settings)["completion_probabilities"]
            pairs = sorted((entry["id"], entry["logprob"]) for entry in token["top_logprobs"])
            rows.append([value for _, value in pairs])
        return torch.tensor(rows)

    def times(self, prompt: list[int], count: int) -> list[float]:
        found = self.complete(prompt, count, cache_prompt=False)["timings"]
        return [found["prompt_ms"] / 1e3, (found["prompt_ms"] + found["predicted_ms"]) / 1e3]


class Browser:
    needs = {"playwright": "pip install playwright", "chromium": "apt-get install chromium", "npm": "apt-get install npm"}
    files = "onnx/*"
    logits = None  # not available outside the page

    def __init__(self, folder: Path, context: int):
        import browser
        from playwright.sync_api import sync_playwright

        self.server = browser.serve(folder, browser.NPM)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.driver = sync_playwright().start()
        self.page = browser.open_page(self.driver)

    def times(self, prompt: list[int], count: int) -> list[float]:
        return self.page.evaluate("([prompt, count]) => window.times(prompt, count)", [prompt, count])

    def close(self) -> None:
        self.driver.stop()
        self.server.shutdown()
        self.server.server_close()


# (format of QUANT.py --to, its settings, {row: runtime})
EXPORTS = [
    *(("gguf", {"method": "none", "gguf_type": kind}, {f"llama.cpp {kind}": LlamaCpp}) for kind in ("F16", "Q8_0", "Q4_0")),
    *(("onnx", {"method": method}, {f"onnxruntime {name}": OnnxRuntime, f"browser {name}": Browser})
      for method, name in (("none", "float32"), ("int8", "int8"), ("int4", "int4"))),
    *(("openvino", {"method": method}, {f"OpenVINO {name}": OpenVINO})
      for method, name in (("none", "fp16"), ("int8", "int8"), ("int4", "int4"))),
]
LARGE = 4096  # maximum vocabulary size for llama.cpp's logits, as its server is slow at printing probabilities


def add(comparison: QUANT.Comparison, name: str, runtime: type, folder: Path) -> None:
    session = runtime(folder, comparison.context)
    row = {"size, MB": sum(path.stat().st_size for path in folder.glob(runtime.files)) / 1e6}
    try:
        if session.logits and not (runtime is LlamaCpp and comparison.original.shape[1] > LARGE):
            row |= comparison.quality(session.logits)
        comparison.rows[name] = row | comparison.speed(session.times)
    finally:
        getattr(session, "close", lambda: None)()


def main(argv: list[str] | None = None) -> None:
    config = MODEL.load_config(argv, QUANT.SECTIONS, "quantization", QUANT.ACTIONS, __doc__)
    config.actions.compare = True
    QUANT.check_request(config)
    comparison, (model, tokenizer) = QUANT.compare(config), QUANT.load_original(config)
    model.cpu().float()
    for form, settings, runtimes in EXPORTS:
        with tempfile.TemporaryDirectory() as folder:
            for name, runtime in runtimes.items():
                missing = [hint for need, hint in runtime.needs.items() if not (find_spec(need) or shutil.which(need))]
                try:
                    if missing:
                        raise UserError("; ".join(missing))
                    if not any(Path(folder).iterdir()):
                        QUANT.export(model, tokenizer, form, folder, QUANT.QuantizationSection(**settings))
                    say(f"{name}: measuring")
                    add(comparison, name, runtime, Path(folder))
                except Exception as error:  # raised by another program
                    say(f"skipped {name}: {MODEL.first_line(error)}")
    print(comparison.table())
    comparison.plot(Path(config.actions.out or ROOT / "bench") / "compare.png")


if __name__ == "__main__":
    MODEL.run_main(main)
