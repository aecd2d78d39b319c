"""INFER.py --eval against lm-eval's own class for transformers, and lm-eval's client against INFER.py --serve."""

import json
import math
import sys
import threading
import time
from types import SimpleNamespace
from unittest import mock

import pytest
from conftest import TINY, free_port, make_text

import INFER
import MODEL
import TOKENIZER
from MODEL import UserError

lm_eval = pytest.importorskip("lm_eval")
pytestmark = pytest.mark.usefixtures("one_thread")
COMMON = "dataset_path: json\ndataset_kwargs: {data_files: %s}\ntest_split: train\nfewshot_split: train\nmetadata: {version: 1}\n"
TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: text
target_delimiter: ""
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "writing": """
output_type: generate_until
doc_to_text: text
doc_to_target: answer
generation_kwargs: {until: ["e", "zz"], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: long
process_results: !function measure.nats
metric_list: [{metric: word_perplexity, higher_is_better: false}, {metric: bits_per_byte, higher_is_better: false}]
""",
}
MEASURE = """
def nats(document, results):
    text = document["long"]
    return {"word_perplexity": (results[0], len(text.split())), "bits_per_byte": (results[0], len(text.encode()))}
"""
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


@pytest.fixture(scope="module")
def setup(model_folder, tmp_path_factory):
    """A model, three tasks and a function that runs them. Some prompts and documents exceed the context of 128 tokens, some prompts
    end with a space, and one prompt is empty."""
    from lm_eval.tasks import TaskManager

    home = tmp_path_factory.mktemp("eval")
    folder, tasks = home / "model", home / "tasks"
    tasks.mkdir()
    MODEL.save(MODEL.load(model_folder), folder)
    tokenizer = TOKENIZER.load(model_folder)
    tokenizer.chat_template = CHATML
    TOKENIZER.save(tokenizer, folder)
    session = INFER.load(str(folder), batch_size=5, chat="off", temperature=0)
    lines = make_text(48, seed=5)
    records = []
    for i in range(12):
        text = " ".join(lines[: 20 * (i == 3)] + [lines[i]])[: 30 + 2000 * (i == 3)]
        text = (text + " " * (i % 2)) * (i != 5)
        choices = ["owl saw", session.generate(text, max_new_tokens=1) or "a", f" {lines[i + 12][:9]}", "\u00e9 42"]
        records.append({"text": text, "choices": choices, "answer": " a", "long": " ".join(lines[i : i + 1 + i % 4 * 5])})
    (home / "data.json").write_text("\n".join(map(json.dumps, records)))
    (tasks / "measure.py").write_text(MEASURE)
    for name, text in TASKS.items():
        (tasks / f"{name}.yaml").write_text(f"task: {name}\n{COMMON % (home / 'data.json')}{text}")
    manager = TaskManager(include_path=tasks, include_defaults=False)

    def evaluate(model, names=tuple(TASKS), **options):
        with mock.patch("lm_eval.evaluator.add_env_info"):  # it takes seconds to list all packages
            return lm_eval.simple_evaluate(model, tasks=list(names), task_manager=manager, bootstrap_iters=0, **options)

    return SimpleNamespace(folder=folder, tasks=tasks, evaluate=evaluate, session=session)


@pytest.fixture(scope="module")
def reference(setup):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(setup.folder), device="cpu", batch_size=4)


def responses(results, name) -> list:
    return [sample["resps"] for sample in sorted(results["samples"][name], key=lambda sample: sample["doc_id"])]


def check_equal(ours, theirs, tolerance):
    """Compare numbers within a tolerance, booleans and texts exactly."""
    if isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        for our, their in zip(ours, theirs, strict=True):
            check_equal(our, their, tolerance)
    elif isinstance(theirs, float):
        assert math.isclose(ours, theirs, rel_tol=1e-5, abs_tol=tolerance)
    else:
        assert ours == theirs


@pytest.mark.parametrize("options", [{}, dict(num_fewshot=2, limit=6, apply_chat_template=True, system_instruction="Be kind.")])
def test_results_equal_lm_evals_own_class(options, setup, reference):
    ours, theirs = setup.evaluate(INFER.as_lm(setup.session), **options), setup.evaluate(reference, **options)
    for name in TASKS:
        check_equal(responses(ours, name), responses(theirs, name), 1e-4)
        assert ours["results"][name].keys() == theirs["results"][name].keys()
        for key, value in theirs["results"][name].items():
            assert ours["results"][name][key] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), (name, key)
    greedy = {result[1] for texts in responses(theirs, "choice") for [result] in texts}
    assert options or greedy == {True, False}  # so the comparison covers both


def test_results_of_an_unsupported_architecture(setup, tmp_path):
    """A model that runs in transformers: scored in right-padded batches, completed by its own `generate`."""
    from lm_eval.models.huggingface import HFLM
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(vocab_size=len(setup.session.tokenizer), bos_token_id=0, eos_token_id=0, initializer_range=0.2, **TINY)
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path)
    TOKENIZER.save(setup.session.tokenizer, tmp_path)
    session = INFER.load(str(tmp_path), batch_size=3)
    assert isinstance(session.model, MODEL.ForeignModel)
    ours, theirs = (setup.evaluate(model, limit=5) for model in (INFER.as_lm(session), HFLM(pretrained=str(tmp_path), device="cpu")))
    for name in TASKS:
        check_equal(responses(ours, name), responses(theirs, name), 1e-4)


def test_the_command_prints_a_table_and_writes_a_file(setup, capsys, tmp_path, monkeypatch):
    INFER.main(["--model", str(setup.folder), "--eval", f"{setup.tasks / 'choice.yaml'},{setup.tasks / 'rolling.yaml'}", "--limit", "4"])
    out = capsys.readouterr().out.splitlines()
    saved = json.loads((setup.folder / "eval.json").read_text())
    accuracy = saved["results"]["choice"]["acc,none"]
    assert out[0].split() == ["task", "metric", "value", "stderr", "n"] and len(out) == 5
    assert out[1].split() == ["choice", "acc", f"{accuracy:.4f}", f"{saved['results']['choice']['acc_stderr,none']:.4f}", "4"]
    assert saved["versions"] == {"choice": 1, "rolling": 1} and saved["settings"]["limit"] == 4 and saved["model"] == str(setup.folder)
    assert saved["lm_eval_version"] and saved["date"]


def test_errors_are_one_line(setup, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    from lm_eval.tasks import TaskManager

    everything = TaskManager(include_path=setup.tasks, include_defaults=False)  # reading lm-eval's own tasks takes seconds
    (tmp_path / "far.yaml").write_text("task: far\ndataset_path: nobody/nothing\noutput_type: generate_until\ntest_split: test\n")
    actions = SimpleNamespace(eval=str(tmp_path / "far.yaml"), limit=None, num_fewshot=None)
    with pytest.raises(UserError, match="--eval: .*nobody/nothing.*; the dataset of a task is downloaded on first use"):
        INFER.run_eval(setup.session, actions, "out")
    with monkeypatch.context() as patch:
        patch.setattr("lm_eval.tasks.TaskManager", lambda **options: everything)
        assert INFER.find_tasks(["ch*", "rolling"])[0] == ["choice", "rolling"]
        with pytest.raises(UserError, match="no task or file is named 'chioce'; nearest are choice"):
            INFER.find_tasks(["chioce"])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "lm_eval", None)
        with pytest.raises(UserError, match="--eval: needs lm_eval; pip install -r requirements-extras.txt"):
            INFER.run_eval(setup.session, actions, "out")
    for flags, message in ((["--prompt", "a", "--limit", "3"], "--limit: requires --eval"), (["--eval", "a", "--limit", "0"], "--limit: 0 is not >= 1"),
                           (["--eval", "a", "--jsonl"], "--jsonl and --eval are mutually exclusive")):
        with pytest.raises(UserError, match=message):
            INFER.main(flags)
    config = MODEL.ModelConfig(vocab_size=len(setup.session.tokenizer), eos_token_id=0, labels=["a", "b"], **TINY)
    MODEL.save(MODEL.build(config, head="score"), tmp_path / "labels")
    TOKENIZER.save(setup.session.tokenizer, tmp_path / "labels")
    with pytest.raises(UserError, match="--eval: this model cannot generate text"):
        INFER.main(["--model", str(tmp_path / "labels"), "--eval", "choice"])
    actions.eval, actions.limit = str(setup.tasks), 1
    capsys.readouterr()
    INFER.run_eval(setup.session, actions, "nobody/nothing")
    printed = capsys.readouterr()
    assert "eval.json was not written: nobody/nothing is not a folder" in printed.err
    assert {line.split()[0] for line in printed.out.splitlines()} == {"task", *TASKS}


@pytest.fixture(scope="module")
def address(setup):
    """The completions route of a server that runs in a thread."""
    import uvicorn

    port = free_port()
    app = INFER.Server(setup.session, "m", setup.session.engine(reuse=True)).app()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}/v1/completions"
    server.should_exit = True


@pytest.mark.parametrize("tokenized, batch_size", [(True, 4), (False, 1)])
def test_lm_evals_client_gets_the_same_results_from_the_server(tokenized, batch_size, setup, reference, address):
    pytest.importorskip("tenacity")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    client = LocalCompletionsAPI(address, "huggingface", model="m", tokenizer=str(setup.folder), tokenized_requests=tokenized,
                                 batch_size=batch_size, max_length=128, add_bos_token=True)
    samples = {"choice": [0, 1, 2, 5, 6, 7], "writing": [0, 1, 2, 6], "rolling": [0, 4, 8]}  # samples that fit the context
    ours, theirs = (setup.evaluate(model, samples=samples) for model in (client, reference))
    for name in TASKS:
        check_equal(responses(ours, name), responses(theirs, name), 1e-3)
    for key in ("acc,none", "acc_norm,none"):
        assert ours["results"]["choice"][key] == theirs["results"]["choice"][key]
    assert {result[1] for texts in responses(theirs, "choice") for [result] in texts} == {True, False}
