"""SFT.py: supervised fine-tuning of a pretrained model on conversations, or as a text classifier.

A conversation becomes token ids with loss weights: 1 in the assistant's turns, 0 elsewhere. Batches, loss and training loop are
those of pretraining. A labeled text has one target, its label.

    python SFT.py --config config.yaml                                # out -> out/sft, on the bundled conversations
    python SFT.py --model gpt2 --data alpaca_data.json --out out/alpaca
    python SFT.py --sft.task classify --data data/notes.tsv --out out/notes   # a text classifier
    python SFT.py --data mine.jsonl --dry-run                         # preview which tokens are trained on, and the lengths
    python SFT.py --convert --data questions.csv --out mine.jsonl     # any supported format -> messages
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import INFER
import MODEL
import TOKENIZER
import TRAIN
from MODEL import Action, UserError, check, knob, load_config, run_main, say

# ---------------------------------------------------------------------------------------------------- settings


@dataclass
class LoraSection:
    r: int = knob(0, "rank of the LoRA adapters (Hu 2021); 0 trains all weights", low=0, often=True)
    lora_alpha: float = knob(16.0, "LoRA scaling: lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora", above=0, often=True)
    lora_dropout: float = knob(0.0, "dropout on the input of the adapters", low=0, below=1, often=True)
    target_modules: list[str] = knob(["all-linear"], "layers that get an adapter, such as [q_proj, v_proj]; all-linear is every "
                                                     "linear layer except heads (Dettmers 2023)", often=True)
    use_dora: bool = knob(False, "train magnitude and direction separately (DoRA, Liu 2024)", often=True)
    use_rslora: bool = knob(False, "scale by alpha / sqrt(r), which keeps high ranks stable (Kalajdzievski 2023)")
    loraplus_lr_ratio: float | None = knob(None, "learning rate of B / learning rate of A (LoRA+, Hayou 2024); 16 is usual",
                                           above=0)

    def attach(self, model: MODEL.LanguageModel, base: str, tokens: list[int], seed: int) -> None:
        options = {name: getattr(self, name) for name in ("r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora")}
        if tokens:
            say(f"lora: {MODEL.counted(len(tokens), 'token')} added for the chat template; in peft, AutoPeftModelForCausalLM "
                "opens the adapter with resized embeddings")
        attach_lora(model, base, self.target_modules, seed, trainable_token_indices=rows_to_train(model, tokens), **options)


@dataclass
class SFTSection:
    task: str = knob("chat", "chat (train on conversations) or classify (train a text classifier)", ("chat", "classify"),
                     often=True)
    columns: dict | None = knob(None, "column mapping: {prompt: my_column, completion: another}", often=True)
    system: str | None = knob(None, "system message for conversations without one", only=("task", "chat"), often=True)
    train_on_prompt: bool = knob(False, "train on user messages as well", only=("task", "chat"), often=True)
    last_turn_only: bool = knob(False, "train on the last assistant message only", only=("task", "chat"))
    too_long: str = knob("cut", "conversations longer than max_length: cut or drop them", ("cut", "drop"), often=True)
    neftune_noise_alpha: float = knob(0.0, "NEFTune: noise on the embeddings (Jain 2023); 5 is usual, 0 is off", low=0, high=1000)
    eval_answers: int = knob(1000, "held-out questions to answer in each validation (exact match; records with the key "
                                   "`answer`); 0 is off", low=0, often=True)
    answer_tokens: int = knob(64, "maximum tokens of those answers", low=1)
    class_weights: str | dict = knob("none", "classify: none, balanced (up-weight rare classes), or {label: weight}",
                                     only=("task", "classify"), often=True)
    model: dict = knob({"name": "./out"}, "overrides `model` for this stage")
    data: dict = knob({"train": ["data/chat.jsonl"], "validation": "data/chat_test.jsonl"}, "overrides `data` for this stage")
    training: dict = knob({"epochs": 5, "batch_size": 8, "eval_steps": 300}, "overrides `training` for this stage")
    lora: dict = knob({}, "overrides `lora` for this stage")
    output: dict = knob({"dir": "./out/sft"}, "overrides `output` for this stage")
    section = "sft"  # the section that errors name; DISTILL.py sets another one

    def __post_init__(self):
        check(self, "sft")
        if self.train_on_prompt and self.last_turn_only:
            raise UserError("sft.train_on_prompt and sft.last_turn_only are mutually exclusive; set one")
        if isinstance(self.class_weights, str) and self.class_weights not in ("none", "balanced"):
            raise UserError(f"sft.class_weights: '{self.class_weights}' is not one of none, balanced, {{label: weight}}")


# -------------------------------------------------------------------------- conversations and labels as tokens


class Sample:
    """A conversation as token ids, each with the weight of its loss, and the record that it was made from."""

    def __init__(self, where: str, record: dict, tokenizer, settings: SFTSection):
        self.where, self.record = where, record
        weight = record.get("weight", 1.0)
        if "text" in record:
            self.ids, self.turns = TOKENIZER.encode_text(tokenizer, record["text"]), []
            self.weights = [weight] * len(self.ids)
            return
        try:
            self.ids, self.turns = TOKENIZER.render_chat(tokenizer, record["messages"], record.get("tools"))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        self.weights = [weight * settings.train_on_prompt] * len(self.ids)
        for turn in self.turns[-1:] if settings.last_turn_only else self.turns:
            factor = record["messages"][turn.message].get("weight", 1)  # 0 excludes a message from the loss, as in OpenAI's API
            if factor not in (0, 1):
                raise UserError(f"{where}: message {turn.message + 1}: weight {factor!r} must be 0 or 1")
            self.weights[turn.start : turn.stop] = [weight * factor] * (turn.stop - turn.start)

    def cut(self, length: int) -> bool:
        """Truncate to `length` (input, target) pairs; returns whether there were more."""
        longer = len(self.ids) > length + 1
        self.ids, self.weights = self.ids[: length + 1], self.weights[: length + 1]
        return longer

    def has_targets(self) -> bool:
        return any(self.weights[1:])


class Labeled:
    """A text as token ids, followed by the index of its label, which is the only target."""

    def __init__(self, where: str, record: dict, tokenizer):
        self.where, self.record, self.tokenizer = where, record, tokenizer
        ids = tokenizer(record["text"]).input_ids or [TOKENIZER.begin_id(tokenizer)]
        self.text_ids = TOKENIZER.without_padding(ids, tokenizer.pad_token_id)
        self.ids: list[int] = []
        self.weights: list[float] = []

    def cut(self, length: int) -> bool:
        longer = len(self.text_ids) > length
        if longer:  # by the tokenizer, which keeps the last special token of an encoder
            ids = self.tokenizer(self.record["text"], truncation=True, max_length=length).input_ids
            self.text_ids = TOKENIZER.without_padding(ids, self.tokenizer.pad_token_id)
        return longer

    def has_targets(self) -> bool:
        return bool(self.text_ids)

    def number(self, labels: dict[str, int], weights: dict[str, float]) -> None:
        label = self.record["label"]
        self.ids, self.weights = [*self.text_ids, labels[label]], [0.0] * len(self.text_ids) + [weights[label]]


# ----------------------------------------------------------------------------------------- classification loss


def label_scores(model, batch: dict, causal: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(scores (N, L), labels (N,), weights (N,), balance loss) of the N texts in a batch. Scores are read at the last token of a
    decoder, which attends to the whole text, or at the first token of an encoder."""
    targets = batch["targets"].flatten()
    last = (targets != -100).nonzero()[:, 0]  # (N,)
    read_at = last
    if not causal:
        position = last % batch["targets"].shape[1] if batch["positions"] is None else batch["positions"].flatten()[last]
        read_at = last - position
    out = model(batch["input_ids"], positions=batch["positions"], segment_ids=batch["segment_ids"], want=("scores",))
    return out.scores.flatten(0, 1)[read_at], targets[last], batch["weights"].flatten()[last], out.aux_loss


def label_loss(causal: bool) -> Callable:
    """loss_fn for `fit`: cross-entropy of the labels, multiplied by the class weights."""

    def loss_fn(model, batch: dict, totals: dict) -> tuple[Tensor, dict]:
        scores, labels, weights, balance = label_scores(model, batch, causal)
        loss = (F.cross_entropy(scores, labels, reduction="none") * weights).sum() / totals["tokens"]
        accuracy = (scores.argmax(-1) == labels).sum() / totals["targets"]  # not weighted
        return loss + balance / totals["micro_batches"], {"loss": loss.detach(), "accuracy": accuracy.detach()}

    return loss_fn


# ------------------------------------------------------------------------------------------ adapters and noise


def attach_lora(model: MODEL.LanguageModel, base: str, target_modules: tuple | list = ("all-linear",), seed: int = 0,
                **options) -> None:
    """Freeze a model and add peft's low-rank adapters to it (Hu 2021): W x + (alpha / r) B A x. A is random and B is zero, so
    that the outputs do not change at first. `options` are those of peft.LoraConfig."""
    peft = MODEL.import_peft()
    host = MODEL.host_of(model)
    names, everywhere = linear_names(host), list(target_modules) == ["all-linear"]
    packed, mixture = model.quantization != "none", any(isinstance(m, MODEL.Experts) for m in host.modules())
    if packed and mixture:  # peft maps these names to the experts
        names = [name for name in names if name not in ("gate_proj", "up_proj", "down_proj")]
    targets = names if everywhere else list(target_modules)
    if options.get("use_dora") and model.quantization not in ("none", "nf4"):
        raise UserError(f"lora.use_dora: does not work on {model.quantization} weights; use --model.quantization nf4, or leave "
                        "lora.use_dora out")
    if "lm_head" in targets and getattr(model.config, "tie_word_embeddings", False):
        raise UserError("lora.target_modules: lm_head shares its weights with the embedding and cannot have a separate adapter")
    if "score" in model.heads:  # all weights of the new head are trained, and saved with the adapter
        options.update(modules_to_save=["score"])
    task = "SEQ_CLS" if model.heads == ("score",) else "CAUSAL_LM" if getattr(model.config, "causal", True) else None
    config = peft.LoraConfig(task_type=task, base_model_name_or_path=str(base), target_modules=targets, **options)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            MODEL.inject(config, host)
    except ValueError as error:
        raise UserError(f"lora.target_modules: {', '.join(targets)} cannot get adapters in this model "
                        f"({MODEL.first_line(error)}); its layers are {', '.join(names)}") from None
    if packed and config.target_parameters:
        raise UserError(f"lora.target_modules: {', '.join(targets)} refers to experts, and quantized experts cannot have "
                        "adapters; name attention layers")
    model.adapter = config
    tuned = tuple(name + "." for name, m in host.named_modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer))
    if everywhere:
        _print_frozen(host, tuned)
    else:
        # peft has other names for the projections of experts
        _check_targets([target for target in targets if not (mixture and target.endswith("_proj"))],
                       (*tuned, *(f"{name}." for name in config.target_parameters or ())), names)


def rows_to_train(model: MODEL.LanguageModel, tokens: list[int]) -> list[int] | dict[str, list[int]] | None:
    """peft's `trainable_token_indices` for tokens that are new to the base model: their rows of the embedding and of an untied
    output head, without which the model could not generate them."""
    host = MODEL.host_of(model)
    modules = [host.get_input_embeddings(), host.get_output_embeddings()]
    tied = len(modules) < 2 or modules[1] is None or modules[1].weight is modules[0].weight
    if not tokens or tied or model.config.model_type == "bert":
        return tokens or None
    names = {id(module): name.rpartition(".")[2] for name, module in host.named_modules()}
    return {names[id(module)]: tokens for module in modules}


def neftune(embedding: nn.Module, alpha: float) -> None:
    """Uniform noise of at most alpha / sqrt(T C) on the embeddings of a training batch (Jain 2023, section 3)."""

    def noise(module: nn.Module, _, output: Tensor) -> Tensor:
        if not module.training:
            return output
        limit = alpha / math.sqrt(output.shape[-2] * output.shape[-1])
        return output + torch.empty_like(output).uniform_(-limit, limit)

    embedding.register_forward_hook(noise)


# ======================================================================================================== edges

# ---------------------------------------------------------------------------------------------------- adapters


def linear_names(model: nn.Module) -> list[str]:
    """The target modules of `all-linear` (Dettmers 2023, section 4): the last name parts of all linear layers except heads."""
    layers = {id(m) for layer in MODEL.layers_of(model) for m in layer.modules()}
    kinds = ("Linear", "Conv1D")
    return sorted({name.rpartition(".")[2] for name, m in model.named_modules()
                   if id(m) in layers and any(kind in type(m).__name__ for kind in kinds)})


def _check_targets(targets: list[str], tuned: tuple, names: list[str]) -> None:
    """Check that each target name matches a layer with an adapter."""
    for target in targets:
        if not any(f".{name}".endswith(f".{target}.") for name in tuned):
            raise UserError(f"lora.target_modules: '{target}' is not a layer of this model; its layers are {', '.join(names)}")


def _print_frozen(host: nn.Module, tuned: tuple) -> None:
    """Print which linear layers have no adapter: in a mixture of experts, peft's all-linear covers only some layers."""
    inside = {id(m) for layer in MODEL.layers_of(host) for m in layer.modules()}
    left = {".".join(name.split(".")[-2:]) for name, m in host.named_modules()
            if isinstance(m, (MODEL.Experts, nn.Linear)) and id(m) in inside and not f"{name}.".startswith(tuned)}
    if left:
        say(f"lora: no adapter on {', '.join(sorted(left))}; these layers are frozen")


# -------------------------------------------------------------------------------------------------------- data


def read_samples(config, form: TOKENIZER.Form, make: Callable, kind: str) -> tuple[list, list, str]:
    """(training samples, held-out samples, a note on the rest): make(file:line, record), with long samples cut or dropped."""
    settings, left = config.sft, TOKENIZER.LeftOut()

    def samples(records: list[tuple[str, dict]]) -> list:
        found = []
        for where, record in records:
            sample = make(where, record)
            if longer := sample.cut(config.training.max_length):
                if settings.too_long == "drop":
                    left.add("too long for training.max_length", where)
                    continue
                left.truncated += 1
            if sample.has_targets():
                found.append(sample)
            else:
                beyond = f"whose completion is beyond training.max_length {config.training.max_length}"
                left.add(beyond if longer else "without target tokens", where)
        return found

    say_unused(config.data)
    train, held_out = map(samples, TOKENIZER.read_split(config.data, form, left, kind))
    if not train:
        raise UserError(f"data.train: no {kind} is left to train on{left.text()}")
    truncated = f"; {left.truncated:,} truncated" if left.truncated else ""
    return train, held_out, f"{len(held_out):,} held out{truncated}{left.text()}"


def read_conversations(config, tokenizer) -> tuple[list[Sample], list[Sample]]:
    """(training samples, held-out samples) of the conversations in config.data."""
    settings = config.sft
    form = TOKENIZER.Form(conversation, settings.section, settings.columns, settings.system, KEYS)
    train, held_out, rest = read_samples(config, form, partial(Sample, tokenizer=tokenizer, settings=settings), "conversation")
    tokens, targets = sum(len(sample.ids) for sample in train), sum(sum(w > 0 for w in sample.weights) for sample in train)
    say(f"{MODEL.counted(len(train), 'conversation')}, {tokens:,} tokens, {targets:,} trained on; {rest}")
    return train, held_out


def read_labeled(config, tokenizer, known: list[str] | None) -> tuple[list[Labeled], list[Labeled], list[str]]:
    """(training samples, held-out samples, labels). Labels are the `known` ones of the model, or those in the training data."""
    settings = config.sft
    form = TOKENIZER.Form(labeled, settings.section, settings.columns)
    train, held_out, rest = read_samples(config, form, partial(Labeled, tokenizer=tokenizer), "text")
    shares = Counter(item.record["label"] for item in train)
    labels = known or sorted(shares, key=lambda name: (len(name), name) if name.isdigit() else (0, name))
    if len(shares) < 2 or len(shares) > max(2, len(train) // 2):
        count = f"{MODEL.counted(len(shares), 'different label')} in {MODEL.counted(len(train), 'text')}"
        raise UserError(f"{train[0].where}: the training data has {count}; set the right columns in sft.columns, as in "
                        "{text: my_column, label: another}")
    for item in (*train, *held_out):
        if item.record["label"] not in labels:
            reason = (f"the labels of {config.model.name}; start from its base model" if known else
                      f"the labels of the training data: data.validation {config.data.validation} holds out all of its texts"
                      if config.data.validation in ("hash", "tail") else
                      "the labels of the training data; add training texts with this label, or remove it")
            raise UserError(f"{item.where}: label '{item.record['label']}' is not one of {', '.join(labels)}, {reason}")
    weights = class_weights(settings, labels, shares, len(train))
    numbers = {name: i for i, name in enumerate(labels)}
    for items, factors in ((train, weights), (held_out, dict.fromkeys(labels, 1.0))):
        for item in items:
            item.number(numbers, factors)
    say(f"{len(train):,} training texts ({', '.join(f'{shares[name]:,} {name}' for name in labels)}); {rest}")
    return train, held_out, labels


def class_weights(settings: SFTSection, labels: list[str], shares: Counter, count: int) -> dict[str, float]:
    """{label: weight}, scaled to a mean of 1 over the training data, so that they do not change the size of steps."""
    weights = dict.fromkeys(labels, 1.0)
    if settings.class_weights == "balanced":
        weights = {name: count / (len(shares) * shares[name]) if shares[name] else 0.0 for name in labels}
    elif isinstance(settings.class_weights, dict):
        for name, weight in settings.class_weights.items():
            number = isinstance(weight, (int, float)) and not isinstance(weight, bool) and 0 <= weight < math.inf
            if str(name) not in weights or not number:
                known = ", ".join(labels)
                raise UserError(f"sft.class_weights: {name}: {weight}; "
                                f"expected one of the labels {known} and a weight of at least 0")
            weights[str(name)] = float(weight)
    mean = sum(weights[name] * n for name, n in shares.items()) / count
    if not mean:
        raise UserError(f"sft.class_weights: all labels of the training data ({', '.join(shares)}) have weight 0")
    return {name: weight / mean for name, weight in weights.items()}


def say_unused(data: TOKENIZER.DataSection) -> None:
    """Print the settings of `data` that are set but used by pretraining only."""
    default = TOKENIZER.DataSection()
    keys = ("weights", "streaming", "text_unit", "text_field", "min_chars", "normalize", "remove_control")
    unused = [f"data.{key}" for key in keys if getattr(data, key) != getattr(default, key)]
    if unused:
        say(f"{', '.join(unused)}: ignored (for pretraining only)")


def in_batches(config, train: list, held_out: list) -> tuple[TOKENIZER.TokenStream, list[dict]]:
    """(the endless training stream, the held-out batches)."""
    training, packing, examples = config.training, config.data.packing, TOKENIZER.Examples.of(train)

    def plan(sources: list, seed: list[int] | None) -> TOKENIZER.WholeRows:
        return TOKENIZER.WholeRows(*sources, training.max_length, packing, seed)

    stream = TOKENIZER.TokenStream(lambda epoch: [[examples]], plan, training.batch_size, training.max_length)
    held_out = plan([TOKENIZER.Examples.of(held_out)], None) if held_out else None
    return stream, TOKENIZER.fixed_batches(held_out, training.batch_size, training.eval_batches) if held_out else []


# -------------------------------------------------------------------------------------------------- validation


def question_of(record: dict) -> tuple[list[dict], str] | None:
    """(messages before the last answer, last answer) of a record with the key `answer`, else None."""
    messages = record.get("messages") or []
    if "answer" not in record or len(messages) < 2 or messages[-1]["role"] != "assistant":
        return None
    return messages[:-1], messages[-1]["content"]


def same_answer(answer: str, expected: str) -> bool:
    """Whether two answers are equal, ignoring case and whitespace."""
    return " ".join(answer.split()).lower() == " ".join(expected.split()).lower()


def questions_of(records: list[dict], limit: int) -> list[tuple[dict, list[dict], str]]:
    """(record, messages before the answer, answer) of at most `limit` evenly spaced records with the key `answer`."""
    questions = [(record, *question) for record in records if (question := question_of(record))]
    return [questions[i] for i in np.linspace(0, len(questions) - 1, min(len(questions), limit)).astype(int)]


def read_questions(path: str | Path, limit: int, key: str, system: str | None = None) -> list[tuple[dict, list[dict], str]]:
    """`questions_of` the conversations in the file that the setting `key` names."""
    if not Path(path).exists():
        raise UserError(f"{key}: file not found: '{path}'")
    form = TOKENIZER.Form(conversation, key.partition(".")[0], None, system)
    questions = questions_of([record for _, record in form.read(Path(path), TOKENIZER.LeftOut())], limit)
    if not questions:
        raise UserError(f"{key}: {path} has no conversation with the key 'answer'")
    return questions


def exact_match(questions: list, tokenizer, sampling: INFER.Sampling) -> Callable:
    """measure(model) -> the fraction of questions whose answer matches exactly, except for case and whitespace."""

    def measure(model) -> float:
        part = questions[MODEL.process_rank() :: TRAIN.world_size()]
        room = 1 - model.config.max_position_embeddings
        prompts = [TOKENIZER.prompt_ids(tokenizer, messages, record.get("tools"))[room:] for record, messages, _ in part]
        answers = INFER.generate(model, prompts, sampling, tokenizer, batch_size=64)
        correct = sum(same_answer(answer.text, expected) for [answer], (_, _, expected) in zip(answers, part, strict=True))
        return TRAIN.all_sum([float(correct)], model.device)[0] / len(questions)

    return measure


def with_answers(evaluate: Callable | None, samples: list[Sample], tokenizer, config) -> Callable | None:
    """Validation: exact match on held-out questions, then the held-out loss. A few answers are printed."""
    records = [sample.record for sample in samples]
    questions = questions_of(records, config.sft.eval_answers)
    shown = questions or [(record, record["messages"][:-1], "") for record in records if len(record.get("messages", ())) > 1]
    greedy = INFER.Sampling(config.sft.answer_tokens, temperature=0)
    match = exact_match(questions, tokenizer, greedy)

    def measure(model) -> dict:
        return {"exact_match": match(model), **(evaluate(model) if evaluate else {})}

    shown = shown[:: max(1, len(shown) // 3)][:3]
    prompts = [(messages[-1]["content"], TOKENIZER.prompt_ids(tokenizer, messages, record.get("tools")))
               for record, messages, _ in shown]
    return TRAIN.with_samples(measure if questions else evaluate, tokenizer, config.training, prompts, greedy)


class Confusion:
    """evaluate(model) for `fit`: accuracy, F1 and loss over held-out texts. `counts` is the confusion matrix."""

    def __init__(self, batches: list[dict], labels: list[str], causal: bool):
        self.batches, self.labels, self.causal = batches, labels, causal
        self.counts = np.zeros((len(labels), len(labels)), int)  # (true, predicted)

    def __call__(self, model) -> dict:
        size = len(self.labels)
        sums = torch.zeros(size * size + 1, dtype=torch.float64)
        for batch in TRAIN.own_share(self.batches):
            batch = TRAIN.on_device(batch, model.device)
            scores, labels, *_ = label_scores(model, batch, self.causal)
            sums[:-1] += torch.bincount(size * labels + scores.argmax(-1), minlength=size * size).cpu()
            sums[-1] += float(F.cross_entropy(scores, labels, reduction="sum"))
        *counts, nats = TRAIN.all_sum(sums.tolist(), model.device)
        self.counts = np.array(counts).reshape(size, size).astype(int)
        say(self.table())
        return {"accuracy": float(np.trace(self.counts) / self.counts.sum()),
                f"f1_{'binary' if size == 2 else 'macro'}": self.f1(), "loss": nats / self.counts.sum()}

    def f1(self) -> float:
        """2 TP / (2 TP + FP + FN). With two labels, that of the rarer one; otherwise the mean over all labels that occur."""
        correct, total = np.diag(self.counts), self.counts.sum(0) + self.counts.sum(1)
        each = np.divide(2 * correct, total, out=np.zeros(len(correct)), where=total > 0)
        return float(each[self.counts.sum(1).argmin()] if len(each) == 2 else each[total > 0].mean())

    def table(self) -> str:
        names = [label if len(label) <= 14 else label[:13] + "…" for label in self.labels]
        width = max(6, *map(len, names))
        rows = [("true / predicted", names), *zip(names, (map("{:,}".format, row) for row in self.counts), strict=True)]
        return "\n".join(f"  | {name:>16} " + " ".join(f"{cell:>{width}}" for cell in cells) for name, cells in rows)

    def plot(self, path: Path) -> None:
        figure = TRAIN.new_figure(1.5 + 0.8 * (size := min(len(self.labels), 30)), 1.2 + 0.7 * size)
        if not figure:
            return
        axes = figure.add_subplot(title="held-out texts", xlabel="predicted label", ylabel="true label")
        axes.imshow(self.counts / self.counts.sum(1, keepdims=True).clip(min=1), cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(self.counts) if len(self.labels) <= 30 else ():
            color = "white" if count > self.counts[row].sum() / 2 else "black"
            axes.text(column, row, f"{count:,}", ha="center", va="center", color=color)
        axes.set_xticks(range(len(self.labels)), self.labels, rotation=30, ha="right", parse_math=False)  # $ starts no formula
        axes.set_yticks(range(len(self.labels)), self.labels, parse_math=False)
        TRAIN.save_figure(figure, path)


# ----------------------------------------------------------------------------------------------------- records


KEYS = TOKENIZER.USED_KEYS | {"text", "weight", *TOKENIZER.LABEL_KEYS}


def conversation(record: dict, where: str, form: TOKENIZER.Form) -> dict:
    """A record -> {"messages": [...]}, or {"text": ...} for plain text, with the record's `tools`, `weight` and `answer`."""
    keys = next((keys for keys in TOKENIZER.LAYOUTS if all(TOKENIZER.is_given(record, key) for key in keys)), None)
    extras = TOKENIZER.extras_of(record, where)
    if keys is None:
        if any(all(key in record for key in keys) for keys in TOKENIZER.LAYOUTS):
            raise TOKENIZER.Unusable("with an empty text, prompt or answer")
        if {"chosen", "rejected"} <= record.keys():
            raise UserError(f"{where}: a preference pair (chosen, rejected); train on it with RL.py")
        known = "; ".join(" + ".join(keys) for keys in TOKENIZER.LAYOUTS)
        raise UserError(f"{where}: keys {TOKENIZER.keys_of(record)} match no format ({known}); set {form.section}.columns, as in "
                        "{prompt: my_column, completion: another}")
    if keys == ("text",):
        labels = {key: record[key] for key in record if str(key).lower() in TOKENIZER.LABEL_KEYS}
        return {"text": TOKENIZER.text_of(record, "text", where), **extras, **labels}
    chat = keys[0] in TOKENIZER.CHAT_KEYS
    whole = {key: value for key, value in record.items() if not (chat and key in TOKENIZER.PROMPT_KEYS)}
    messages = TOKENIZER.as_messages(TOKENIZER.prompt_of(whole, where, form.system))
    if not chat:
        answer = TOKENIZER.words_of(record[keys[1]], "assistant", f"{where}: {keys[1]}", False)
        answer = TOKENIZER.as_messages(answer, "assistant")
        before, full = ([turn for turn in turns if turn["role"] != "system"] for turns in (messages, answer))
        if TOKENIZER.essence(full[: len(before)]) == TOKENIZER.essence(before):  # the completion repeats the prompt
            messages, answer = [turn for turn in messages if turn["role"] == "system"], full
        messages = [*messages, *answer]
    elif TOKENIZER.is_given(record, "answer"):
        extras["answer"] = record["answer"]
    if not any(turn["role"] == "assistant" for turn in messages):
        raise TOKENIZER.Unusable("without an assistant message")
    return {"messages": messages, **extras}


def labeled(record: dict, where: str, form: TOKENIZER.Form) -> dict:
    """A record -> {"text", "label"}. Keys are detected by their names, ignoring case; a single other key is the text."""
    lower = {str(key).lower(): key for key in record}
    label = next((lower[key] for key in TOKENIZER.LABEL_KEYS if key in lower), None)
    rest = [key for key in record if key != label]
    text = next((lower[key] for key in TOKENIZER.TEXT_KEYS if key in lower), rest[0] if len(rest) == 1 else None)
    if label is None or text is None:
        what = "label" if label is None else "text"
        raise UserError(f"{where}: none of the keys {TOKENIZER.keys_of(record)} is recognized as the {what}; "
                        f"set {form.section}.columns, as in {{text: my_column, label: another}}")
    value = record[label]
    if isinstance(value, (list, dict)) or value is None or not str(value).strip():
        raise UserError(f"{where}: '{label}' is {value!r}, expected one label")
    if not str(value).strip().isprintable():
        raise UserError(f"{where}: '{label}' is {value!r}, expected one line of printable text")
    if not TOKENIZER.text_of(record, text, where).strip():
        raise UserError(f"{where}: '{text}' is empty")
    return {"text": record[text], "label": str(value).strip()}


# --------------------------------------------------------------------------------------------- preparing a run


def pad_id(tokenizer) -> int:
    """The padding token, by which transformers' classifiers find the last token of a text; the end of text if there is none."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token
    return tokenizer.pad_token_id


def need_model(config) -> None:
    if not config.model.name:
        raise UserError("model.preset: fine-tuning starts from a trained model; set --model, or train one with TRAIN.py")


def prepare_model(config, tokenizer, head: str | tuple = "lm", labels: list | None = None,
                  noise: float = 0.0) -> MODEL.LanguageModel:
    """The trained model to fine-tune, with embeddings of new tokens, and with its adapter."""
    name, adapter = config.model.name, bool(config.actions.adapter or config.lora.r)
    if adapter and config.training.qat != "none":
        raise UserError(f"training.qat: {config.training.qat} is for training all weights; leave out lora.r and --adapter. "
                        "For adapters on quantized weights, set model.quantization")
    if labels and adapter and MODEL.is_foreign(MODEL.read_json(MODEL.resolve_folder(name) / "config.json")):
        raise UserError(f"lora.r: {name} is computed by transformers, and its new head cannot join an adapter; leave lora.r out, "
                        f"or use a model of {', '.join(MODEL.FAMILIES)}")
    model = TRAIN.prepare_model(config, tokenizer, head, labels, adapter, grow=True)
    if labels:
        model.config.pad_token_id = pad_id(tokenizer)
    finish_model(config, model, tokenizer, noise)
    return model


def finish_model(config, model, tokenizer, noise: float = 0.0) -> None:
    """Prepare a loaded model for fine-tuning: adapters, their learning rates, noise."""
    adapter = config.actions.adapter
    for field in fields(LoraSection):
        if getattr(config.lora, field.name) != getattr(LoraSection(), field.name):
            if adapter and field.name not in ("r", "loraplus_lr_ratio"):
                raise UserError(f"lora.{field.name}: {adapter} has its own value; leave this out")
            if not adapter and not config.lora.r:
                raise UserError(f"lora.{field.name}: needs an adapter; set lora.r")
    if adapter:
        MODEL.load_adapter(model, adapter, train=True)
        if config.lora.r not in (0, model.adapter.r):
            raise UserError(f"lora.r: {config.lora.r}, but {adapter} has rank {model.adapter.r}; leave it out")
    elif config.lora.r:
        if model.config.model_type == MODEL.CUSTOM:
            say("lora: this architecture matches no Hugging Face class, so only this program can open the adapter")
        known = TOKENIZER.load(config.tokenizer.name or config.model.name).get_vocab()
        new = {i for token, i in tokenizer.get_vocab().items() if token not in known}  # some may use spare rows of the model
        config.lora.attach(model, config.model.name, sorted(new.union(model.new_ids)), config.training.seed)
    if config.lora.loraplus_lr_ratio and config.training.optim == "muon":
        raise UserError("lora.loraplus_lr_ratio: has no effect with training.optim muon; use adamw")
    model.rates = {".lora_B.": config.lora.loraplus_lr_ratio} if config.lora.loraplus_lr_ratio else {}
    if noise:
        neftune(model.get_input_embeddings(), noise)


def prepare_labels(config, checkpoint: Path | None, device: torch.device) -> TRAIN.Stage:
    adapter, name = config.actions.adapter, config.model.name
    TRAIN.fit_length(config, MODEL.context_length(name, MODEL.overrides(config.model)))
    tokenizer = TOKENIZER.of_run(config, checkpoint)
    pad_id(tokenizer)
    known = MODEL.folder_labels(MODEL.resolve_folder(adapter or name))
    train, kept, labels = read_labeled(config, tokenizer, known)
    model = prepare_model(config, tokenizer, "score", labels, noise=config.sft.neftune_noise_alpha)
    stream, batches = in_batches(config, train, kept)
    causal = model.config.causal
    evaluate = Confusion(batches, labels, causal) if batches else None

    def save(text: str, tokenizer, model, folder: Path) -> None:
        TRAIN.save_product(text, tokenizer, model, folder)
        if evaluate and MODEL.process_rank() == 0:
            evaluate.plot(Path(folder) / "confusion.png")

    return TRAIN.Stage(model, tokenizer, stream, label_loss(causal), evaluate, save, share=1)


def prepare(config, checkpoint: Path | None, device: torch.device) -> TRAIN.Stage:
    need_model(config)
    if config.sft.task == "classify":
        return prepare_labels(config, checkpoint, device)
    tokenizer = TOKENIZER.of_run(config, checkpoint)
    TOKENIZER.ensure_chat(tokenizer)
    model = prepare_model(config, tokenizer, noise=config.sft.neftune_noise_alpha)
    if not model.config.causal:
        raise UserError(f"model.name: {config.model.name} is an encoder and cannot generate; conversations need a causal model")
    TOKENIZER.end_with_turns(model, tokenizer)
    train, kept = read_conversations(config, tokenizer)
    stream, batches = in_batches(config, train, kept)
    evaluate = with_answers(TRAIN.held_out_loss(batches, None) if batches else None, kept, tokenizer, config)
    return TRAIN.Stage(model, tokenizer, stream, TRAIN.token_loss, evaluate, TRAIN.save_product, share=1)


# ------------------------------------------------------------------------------------------------ command line


def dry_run(config) -> None:
    """Print the first records as the model reads them, trained tokens marked, and the distribution of lengths."""
    need_model(config)
    TRAIN.fit_length(config, MODEL.context_length(config.model.name, MODEL.overrides(config.model)))
    tokenizer = TOKENIZER.of_run(config)
    if config.sft.task == "classify":
        samples, _, _ = read_labeled(config, tokenizer, None)
    else:
        TOKENIZER.ensure_chat(tokenizer)
        samples, _ = read_conversations(config, tokenizer)
    shown = [(sample.where, f"{tokenizer.decode(sample.text_ids)} {marked(sample.record['label'])}"
              if isinstance(sample, Labeled) else marked_text(tokenizer, sample.ids, sample.weights)) for sample in samples[:3]]
    what = "text" if config.sft.task == "classify" else "conversation"
    preview(shown, [len(sample.ids) for sample in samples], what, f"max_length {config.training.max_length}")


def marked(text: str) -> str:
    """Text that is trained on: green on a terminal, otherwise in double brackets."""
    return f"\033[32m{text}\033[0m" if MODEL.shows_colors() else f"[[{text}]]"


def marked_text(tokenizer, ids: list[int], weights: list[float]) -> str:
    """Decode ids, and mark those of a positive weight, which are trained on."""
    groups = itertools.groupby(zip(ids, weights, strict=True), lambda pair: pair[1] > 0)
    spans = [(trained, tokenizer.decode([i for i, _ in group])) for trained, group in groups]
    return "".join(marked(text) if trained else text for trained, text in spans)


def preview(shown: list[tuple[str, str]], lengths: list[int], what: str, limit: str) -> None:
    """Print (where, text) of a few records, and the distribution of the lengths of all in tokens."""
    for where, text in shown:
        print(f"--- {where}\n{text}")
    counts, edges = np.histogram(lengths, bins=min(12, max(lengths) - min(lengths) + 1))
    print(f"--- tokens per {what}: median {int(np.median(lengths))}, longest {max(lengths)}, {limit}")
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        print(f"{int(np.ceil(low)):6}-{int(high):<6} {'#' * round(50 * count / counts.max())} {count:,}")


def convert(config) -> None:
    """Write records of any supported format as JSON lines with `messages`."""
    counts, lines, left = Counter(), [], TOKENIZER.LeftOut()
    form = TOKENIZER.Form(conversation, "sft", config.sft.columns, config.sft.system)
    for path in itertools.chain.from_iterable(TOKENIZER.data_files(config.data, TOKENIZER.RECORDS[:-1])[0]):
        for where, record in form.read(path, left):
            if "text" in record and any(key.lower() in TOKENIZER.LABEL_KEYS for key in record):
                raise UserError(f"{where}: labeled texts are not converted; use the file with --sft.task classify")
            lines.append(json.dumps(record, ensure_ascii=False))
            counts[path] += 1
    out = Path(config.output.dir)
    if not lines:
        raise UserError(f"data.train: no conversation in {' '.join(config.data.train)}{left.text()}")
    if out.suffix != ".jsonl":
        raise UserError(f"--out: '{out}' must be a file name that ends in .jsonl")
    if out.exists() and not config.actions.overwrite:
        raise UserError(f"--out: {out} exists; replace it with --overwrite")
    MODEL.write_text(out, "".join(line + "\n" for line in lines))
    origins = ", ".join(f"{n:,} from {path}" for path, n in counts.items())
    say(f"{out}: {MODEL.counted(len(lines), 'record')} ({origins}){left.text()}")


def merge(config) -> None:
    """Merge an adapter into the weights of its base and save the model, if the logits do not change."""
    if config.model.quantization != "none":
        raise UserError("model.quantization: adapters are merged into weights that are not quantized; leave it out")
    folder = Path(config.actions.merge)
    if not (folder / "adapter_config.json").exists():
        raise UserError(f"--merge: {folder} is not the folder of an adapter (adapter_config.json is missing)")
    if config.origins.get("output.dir") != "command line":
        raise UserError("--merge: needs a folder for the merged model; set --out")
    named, usual = MODEL.adapter_config(folder).base_model_name_or_path, SFTSection().model["name"]
    base = config.model.name if config.model.name not in (None, usual) else named  # --model takes precedence
    out = Path(config.output.dir)
    TRAIN.check_apart(out, model=base, merge=str(folder))
    if not base:
        raise UserError(f"{folder}/adapter_config.json: has no base model; set --model")
    model, tokenizer = TOKENIZER.open_model(MODEL.ModelSection(name=base, dtype="float32", device="cpu"), adapter=str(folder))
    labels = "score" in model.heads
    if labels:
        model.config.pad_token_id = pad_id(tokenizer)
    shape = 2, min(32, model.config.max_position_embeddings)
    ids = torch.randint(0, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))

    def outputs() -> Tensor:
        out = model(ids, want=("scores",) if labels else ())
        return out.scores if labels else out.logits

    with torch.no_grad():
        unmerged = outputs()
        MODEL.merge_adapter(model)
        difference = float((outputs() - unmerged).abs().max())
    if not difference <= 1e-3 * max(float(unmerged.std()), 1.0):
        raise UserError(f"{folder}: merged and unmerged logits differ by {difference:.2g}; nothing was written")
    stored = MODEL.stored_dtype(MODEL.read_json(MODEL.resolve_folder(base) / "config.json"))
    for weight in model.parameters():  # the dtype of the base; buffers, such as a router's bias, stay float32
        weight.data = weight.data.to(MODEL.DTYPES.get(stored, torch.float32))
    with TRAIN.run_folder(out, None, config.actions.overwrite):
        TRAIN.clear_run(out)
        TRAIN.save_product(MODEL.config_text(config), tokenizer, model, out)
    say(f"{out}: {folder} merged into {base}, in {stored}; {'scores' if labels else 'logits'} differ by at most {difference:.1g}")


ACTIONS = {**TRAIN.ACTIONS, "adapter": Action("continue training this LoRA adapter", str),
           "merge": Action("merge this adapter into its base and save the model in --out, without training", str),
           "dry_run": Action("preview which tokens are trained on, and the lengths, without training"),
           "convert": Action("convert --data to `messages` in the JSON lines file --out, without training")}
SECTIONS = {**TRAIN.SECTIONS, "lora": LoraSection, "sft": SFTSection}


def main(argv: list[str] | None = None) -> TRAIN.Result | None:
    config = load_config(argv, SECTIONS, "sft", ACTIONS, __doc__)
    actions = [name for name in ("convert", "merge", "dry_run") if getattr(config.actions, name)]
    others = config.actions.resume or config.actions.adapter and actions != ["dry_run"]
    if len(actions) > 1 or actions and others:
        names = " and ".join(f"--{name.replace('_', '-')}" for name in actions)
        raise UserError(f"{names}: cannot be combined with other actions, --resume or --adapter")
    if actions:
        return {"convert": convert, "merge": merge, "dry_run": dry_run}[actions[0]](config)
    show = {"chat": 'echo "..." | python INFER.py MODEL',
            "classify": "python INFER.py MODEL < lines.txt    # label and probability of each line"}
    return TRAIN.run_stage("sft", config, prepare, show[config.sft.task])


if __name__ == "__main__":
    run_main(main)
