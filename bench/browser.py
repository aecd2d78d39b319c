"""Run an exported ONNX model in a browser: serve bench/browser.html, or compare its greedy completion with INFER.generate.

    python QUANT.py --model out --to onnx --out out/onnx
    python bench/browser.py --onnx out/onnx                   # serve the page at http://127.0.0.1:8124
    python bench/browser.py --onnx out/onnx --model out       # generate in headless Chromium, compare, write bench/browser.png

The first run installs transformers.js from npm into the folder --npm. The page loads nothing from other hosts.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import INFER
import MODEL
import TOKENIZER

PORT = 8124
NPM = Path.home() / ".cache/workshop-npm"
FLAGS = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update --disable-sync".split()


class Handler(http.server.SimpleHTTPRequestHandler):
    """/ is the page, /model/ the ONNX folder, /node_modules/ transformers.js."""

    extensions_map = {".mjs": "text/javascript", ".js": "text/javascript", ".wasm": "application/wasm", ".html": "text/html",
                      ".json": "application/json", "": "application/octet-stream"}

    def __init__(self, *args, folders: dict[str, Path], **options):
        self.folders = folders
        super().__init__(*args, **options)

    def translate_path(self, path: str) -> str:
        first, _, rest = path.partition("?")[0].lstrip("/").partition("/")
        folder = self.folders.get(first)
        if folder is None or ".." in rest.split("/"):
            return str(ROOT / "bench/browser.html") if not first else ""
        return str(folder / rest)

    def log_message(self, *_) -> None:
        pass


def serve(onnx: Path, npm: Path) -> http.server.ThreadingHTTPServer:
    if not (npm / "node_modules/@huggingface/transformers").exists():
        npm.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", npm, "@huggingface/transformers@4"],
                       check=True, stdout=sys.stderr)
    folders = {"model": onnx.resolve(), "node_modules": npm.resolve() / "node_modules"}
    return http.server.ThreadingHTTPServer(("127.0.0.1", PORT), functools.partial(Handler, folders=folders))


def open_page(driver):
    """Open the page in headless Chromium and wait until the model is loaded."""
    from playwright.sync_api import expect

    page = driver.chromium.launch(executable_path="/usr/bin/chromium", args=FLAGS).new_page(viewport={"width": 800, "height": 560})
    page.on("pageerror", lambda error: print("page error:", error, file=sys.stderr))
    page.on("console", lambda message: message.type == "error" and print("console:", message.text[:300], file=sys.stderr))
    page.goto(f"http://127.0.0.1:{PORT}/")
    expect(page.locator("#run")).to_be_enabled(timeout=120_000)
    return page


def generated(prompt: str, picture: Path) -> tuple[list[int], str]:
    """The token ids that the page generates, and its status line."""
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as driver:
        page = open_page(driver)
        page.locator("#prompt").fill(prompt)
        page.locator("#run").click()
        expect(page.locator("#run[data-ids]")).to_be_enabled(timeout=120_000)
        page.screenshot(path=picture)
        return [int(number) for number in page.locator("#run").get_attribute("data-ids").split()], page.locator("#state").inner_text()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--onnx", type=Path, required=True, help="folder of QUANT.py --to onnx")
    parser.add_argument("--model", help="folder of the original model; compares the completions")
    parser.add_argument("--npm", type=Path, default=NPM, help="folder for npm packages")
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--picture", type=Path, default=ROOT / "bench/browser.png")
    options = parser.parse_args()
    server = serve(options.onnx, options.npm)
    print(f"http://127.0.0.1:{PORT}", file=sys.stderr)
    if not options.model:
        return server.serve_forever()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    ids, state = generated(options.prompt, options.picture)
    tokenizer, model = TOKENIZER.load(options.model), MODEL.load(options.model)
    prompt = TOKENIZER.encode_prompt(tokenizer, options.prompt)
    [[ours]] = INFER.generate(model, [prompt], INFER.Sampling(max_new_tokens=64, temperature=0))
    same = next((i for i, pair in enumerate(zip(ids, ours.ids)) if pair[0] != pair[1]), min(len(ids), len(ours.ids)))
    print(f"browser: {state}; the first {same} of {len(ours.ids)} greedy tokens equal those of INFER.generate")


if __name__ == "__main__":
    main()
