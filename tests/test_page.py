"""The chat page of INFER.py --serve in headless Chromium."""

import base64
import json
import re
import shutil
import signal
import threading
from types import SimpleNamespace

import pytest
from conftest import TINY, free_port
from test_serve import CHATML, is_idle, metric, start, wait_until

import INFER
import MODEL
import TOKENIZER

CHROMIUM = "/usr/bin/chromium"
FLAGS = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update --disable-sync".split()
pytest.importorskip("gradio", reason="the chat page needs gradio")
playwright = pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright")
if not shutil.which(CHROMIUM):
    pytest.skip(f"{CHROMIUM} is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def browser():
    playwright.expect.set_options(timeout=20_000)
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)


class Tab:
    """A browser page that can reach only the server; requests to other hosts are recorded."""

    def __init__(self, browser, url: str, **options):
        context = browser.new_context(**options)
        context.set_default_timeout(20_000)
        self.foreign: list[str] = []
        self.page = context.new_page()
        context.route(re.compile(f"^(?!{re.escape(url)}|data:|blob:)"), self.block)
        self.page.goto(url)
        self.page.get_by_placeholder("Type a message").wait_for()
        self.box, self.answers = self.page.locator("textarea").last, self.page.get_by_test_id("bot")

    def block(self, route) -> None:
        self.foreign.append(route.request.url)
        route.abort()

    def send(self, text: str) -> None:
        playwright.expect(self.box).to_be_enabled()
        self.box.fill(text)
        self.box.press("Enter")

    def click(self, name: str) -> None:
        self.page.get_by_label(name, exact=True).last.click()

    def set(self, label: str, value) -> None:
        self.page.get_by_label(label).fill(str(value))

    def stop(self) -> None:
        self.page.locator(".stop-button").click()

    def wait_for_growth(self) -> None:
        """Wait until the text of the last answer has grown three times."""
        grown = "n => [...document.querySelectorAll('[data-testid=bot]')].at(-1)?.innerText.length > n"
        for _ in range(3):
            self.answers.last.wait_for()
            self.page.wait_for_function(grown, arg=len(self.answers.last.inner_text()))


def test_the_page_streams_stops_and_clears(browser, tokenizer, tmp_path):
    """The server's model generates until it is stopped. SIGTERM does not wait for the open page."""
    config = MODEL.ModelConfig(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                               **{**TINY, "max_position_embeddings": 2**15})
    MODEL.save(MODEL.build(config, seed=1), tmp_path / "tiny-chat")
    tokenizer.chat_template = CHATML
    TOKENIZER.save(tokenizer, tmp_path / "tiny-chat")
    tokenizer.chat_template = None
    server = start(tmp_path / "tiny-chat", "--ignore-eos", "true")
    try:
        tab = Tab(browser, server.url)
        tab.set("Max new tokens", 30_000)
        tab.send("The red fox")
        tab.wait_for_growth()
        assert tab.page.title() == server.name and metric(server, "num_requests_running") == 1
        tab.stop()
        wait_until(lambda: is_idle(server))
        assert tab.answers.count() == 1
        tab.click("Retry")
        tab.wait_for_growth()
        assert metric(server, "num_requests_running") == tab.answers.count() == 1
        playwright.expect(tab.page.get_by_label("Clear", exact=True)).to_be_hidden()
        tab.stop()
        wait_until(lambda: is_idle(server))
        tab.click("Clear")
        playwright.expect(tab.answers).to_have_count(0)
        tab.send("Rain")
        tab.wait_for_growth()
        assert tab.page.get_by_test_id("user").count() == 1 and not tab.foreign
        tab.page.close()
        wait_until(lambda: is_idle(server))
        Tab(browser, server.url)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) in (0, -signal.SIGTERM)
    finally:
        server.process.kill()


@pytest.fixture()
def stub():
    """A server with the page and an API with fixed responses; `requests` records the requests."""
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, StreamingResponse

    app, requests, port = FastAPI(), [], free_port()

    @app.get("/v1/models")
    def models():
        return {"data": [{"id": "base"}, {"id": "adapter"}]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request):
        record = json.loads(await request.body())
        requests.append((request.headers["authorization"], record))
        if record["messages"][-1]["content"] == "long":
            return JSONResponse({"error": {"message": "the prompt has 99 tokens; prompt and completion must fit a context of 9"}}, 400)
        deltas = [{"role": "assistant"}, {"reasoning_content": "First"}, {"reasoning_content": " I think."},
                  {"content": "**Yes** ![](https://example.com/x.png)"}, {"content": f" number {len(requests)}"}]
        events = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
        if record["messages"][-1]["content"] == "fail":
            events.append({"error": {"message": "the model failed on this request"}})
        lines = [f"data: {json.dumps(event)}\n\n" for event in events] + ["data: [DONE]\n\n"]
        return StreamingResponse(iter(lines), media_type="text/event-stream")

    settings = INFER.InferenceSection(api_key="secret", system="Be kind.")
    session = SimpleNamespace(settings=settings, sampling=INFER.Sampling(temperature=0.5, top_k=7, max_new_tokens=40), chat=True,
                              tokenizer=SimpleNamespace(chat_template="{{ enable_thinking }}"))
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    INFER.add_page(app, session, "some/base", server)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    yield SimpleNamespace(url=f"http://127.0.0.1:{port}/", requests=requests)
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


def test_the_page_sends_settings_and_shows_thinking_and_errors(browser, stub):
    for password, status in ((None, 401), ("wrong", 401), ("secret", 200)):
        credentials = {"Authorization": f"Basic {base64.b64encode(f'me:{password}'.encode()).decode()}"} if password else {}
        with browser.new_context(extra_http_headers=credentials) as context:
            response = context.request.get(stub.url)
            assert response.status == status and ("www-authenticate" in response.headers) == (status == 401)
            assert context.request.get(f"{stub.url}v1/nothing").status == 404

    tab = Tab(browser, stub.url, http_credentials={"username": "me", "password": "secret"})
    tab.send("Hello")
    playwright.expect(tab.answers.last).to_contain_text("Yes")
    key, record = stub.requests.pop()
    assert key == "Bearer secret" and record == {
        "model": "base", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0.5, "top_p": 1, "min_p": 0, "top_k": "7",
        "max_new_tokens": "40", "n": 1, "stream": True, "chat_template_kwargs": {"enable_thinking": True}}
    thinking = tab.page.get_by_text("First I think.")
    playwright.expect(thinking).not_to_be_visible()
    tab.page.get_by_role("log").get_by_text("Thinking").click()
    playwright.expect(thinking).to_be_visible()
    tab.click("Toggle Sidebar")
    tab.set("System message", "Be short.")
    tab.set("Seed", 5)
    tab.page.get_by_label("Thinking", exact=True).uncheck()
    tab.page.get_by_label("Model", exact=True).click()
    tab.page.get_by_role("option", name="adapter").click()
    for text, message in (("long", "fit a context of 9"), ("fail", "the model failed")):
        tab.send(text)
        playwright.expect(tab.page.get_by_text(message)).to_be_visible()
    tab.send("More")
    playwright.expect(tab.page.get_by_text("number 3")).to_be_visible()
    record = stub.requests.pop()[1]
    sent = [(message["role"], message["content"].split(" ")[0]) for message in record["messages"]]
    assert sent == [("system", "Be"), ("user", "Hello"), ("assistant", "**Yes**"), ("user", "fail"), ("assistant", "**Yes**"), ("user", "More")]
    assert record["seed"] == "5" and record["model"] == "adapter" and record["chat_template_kwargs"] == {"enable_thinking": False}
    assert not tab.foreign


def test_without_gradio_there_is_no_page(monkeypatch, capsys):
    monkeypatch.setattr(INFER.importlib.util, "find_spec", lambda name: None)
    app = SimpleNamespace(mount=None)
    INFER.add_page(app, None, "name", None)
    assert "gradio is not installed" in capsys.readouterr().err.lower()
