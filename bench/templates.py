"""Check which tokens of conversations are trained with the chat templates of many models, and show them in color.

    python bench/templates.py                                   # the templates of the tests
    python bench/templates.py PATH/site-packages/trl/chat_templates    # those of an installed trl
    python bench/templates.py my.jinja --quiet                  # print the verdicts only

Six conversations are rendered with each template. They are right if the ids are those of the template's rendering; if the text,
reasoning and tool calls of each assistant message and one end token are trained, but no other message and no generation prompt; and
if generation stops at the last token of a conversation. A template may refuse a conversation, with a reason.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import TOKENIZER
from MODEL import UserError

TOKENS = re.compile(r"<\|[^<>|\s]+\|>|<\|\"\|>|<\|[a-z_]+>|<[a-z_]+\|>|<｜[^｜<>]+｜>|<(?:start|end)_of_\w+>|\[/?INST\]|\[gMASK\]|<sop>|</s>|<EOS>")
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Weather of a town.", "parameters": {
    "type": "object", "properties": {"town": {"type": "string", "description": "Its name."}}, "required": ["town"]}}}]


def turn_of(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


def conversations() -> dict[str, tuple[list[dict], list | None]]:
    """Six kinds of conversations, in which no word occurs in two messages."""
    call = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Alder \"on\" Sea"}}}
    return {
        "two turns": ([turn_of("user", "Who bakes?"), turn_of("assistant", "Mip, at dawn.\n\nTwice."), turn_of("user", "And buys?"), turn_of("assistant", "Sorrel.")], None),
        "reasoning": ([turn_of("user", "12 plus 30?"), turn_of("assistant", "It's 42.", reasoning_content="Tens first."),
                       turn_of("user", "Plus five?"), turn_of("assistant", "Then 47.", reasoning_content="Units next.")], None),
        "tool call": ([turn_of("user", "How is the sky?"), turn_of("assistant", "", tool_calls=[call]), turn_of("tool", "rain, 9 degrees"),
                       turn_of("assistant", "Wet, I fear.")], TOOLS),
        "system": ([turn_of("system", "Be a miller."), turn_of("user", "What do you grind?"), turn_of("assistant", " Rye and oats. ")], None),
        "assistant first": ([turn_of("assistant", "Good morning!"), turn_of("user", "Two rolls."), turn_of("assistant", "Here they are.")], None),
        "one word": ([turn_of("user", "Which bird?"), turn_of("assistant", "Owl"), turn_of("user", "Is it late?"), turn_of("assistant", "user")], None),
    }


def tokenizer_of(template: str):
    """A byte tokenizer with the special tokens of a template."""
    tokenizer = TOKENIZER.train([], 0, "byte")
    tokenizer.add_tokens(["<s>", "</s>"], special_tokens=True)
    tokenizer.add_tokens(sorted({*TOKENS.findall(template), "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>", "<|bot|>"}), special_tokens=True)
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template = "<s>", "</s>", template
    return tokenizer


def renderings(tokenizer, messages: list[dict], tools) -> list[list[int]]:
    """The ids of a conversation as the template renders it, in each format of tool calls that it accepts."""
    found = []
    for spelled in TOKENIZER.spellings(messages):
        try:
            text = tokenizer.apply_chat_template(spelled, tools=tools, tokenize=False)
        except Exception:
            continue
        found.append(tokenizer(text, add_special_tokens=False).input_ids)
    return found


def words_of(message: dict) -> list[str]:
    arguments = [value for call in message.get("tool_calls") or () for value in call["function"]["arguments"].values()]
    return [word for text in (message["content"], *arguments) for word in re.findall(r"[^\s\"]+", text)]


def problems(tokenizer, messages: list[dict], tools, ids: list[int], turns: list) -> list[str]:
    """The errors in the turns that `render_chat` found."""
    found, ends = [], TOKENIZER.chat_ends(tokenizer)
    decode = lambda part: tokenizer.decode(part, clean_up_tokenization_spaces=False)  # noqa: E731
    if not any(ids[: len(expected)] == expected and len(ids) <= len(expected) + 1 for expected in renderings(tokenizer, messages, tools)):
        found.append("the ids are not those of the template's rendering")
    if [turn.message for turn in turns] != [i for i, message in enumerate(messages) if message["role"] == "assistant"]:
        return [*found, "some assistant messages are not turns"]
    trained, before = [decode(ids[turn.start : turn.stop]) for turn in turns], 0
    for turn, text in zip(turns, trained, strict=True):
        message, gap = messages[turn.message], decode(ids[before : turn.start])
        missing = [word for word in words_of(message) if word not in text and word not in text.replace("\\", "")]
        thought = message.get("reasoning_content", "")
        if missing or thought and thought in decode(ids) and thought not in text:
            found.append(f"message {turn.message + 1}: not trained: {' '.join(missing) or thought}")
        others = [word for other in messages if other["role"] != "assistant" for word in words_of(other)]
        if more := [word for word in others if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) and word not in words_of(message)]:
            found.append(f"message {turn.message + 1}: trained, but part of other messages: {' '.join(more)}")
        last = tokenizer.convert_ids_to_tokens(ids[turn.stop - 1])
        if ends.tokens and (last not in ends.tokens or any(token in text.removesuffix(last).split(words_of(message)[-1])[-1] for token in ends.tokens)):
            found.append(f"message {turn.message + 1}: ends with {text[-20:]!r}, not with one end token")
        try:
            prompt = tokenizer.apply_chat_template(messages[: turn.message], tools=tools, tokenize=False, add_generation_prompt=True) if turn.message else ""
        except Exception:
            prompt = ""
        words = words_of(messages[turn.message - 1])[-1:] if turn.message else []
        tail, opened = (piece.rsplit(words[0], 1)[-1] if words else "" for piece in (prompt, gap))
        if prompt and opened.strip() not in tail and opened.removeprefix(tail) not in ends.opening:
            found.append(f"message {turn.message + 1}: {opened!r} is context, but the prompt ends with {tail!r}")
        rest = tail.removeprefix(opened)
        if prompt and rest != tail and rest and text.startswith(rest[:3]):
            found.append(f"message {turn.message + 1}: {rest!r} of the prompt is trained")
        before = turn.stop
    if ends.tokens and ids[turns[-1].stop - 1] not in ends.stop:
        found.append(f"generation does not stop at the last token, {tokenizer.convert_ids_to_tokens(ids[turns[-1].stop - 1])}")
    return found


def verdict(tokenizer, messages: list[dict], tools) -> tuple[list[str], str]:
    """(problems, the conversation with trained tokens in color, or the reason for which it is refused)."""
    try:
        ids, turns = TOKENIZER.render_chat(tokenizer, messages, tools)
    except UserError as error:
        reason = str(error)
        return ([f"refused in several lines: {reason!r}"] if "\n" in reason else []), f"refused: {reason}"
    shown, at = "", 0
    for turn in turns:
        shown += tokenizer.decode(ids[at : turn.start]) + f"\033[32m{tokenizer.decode(ids[turn.start : turn.stop])}\033[0m"
        at = turn.stop
    return problems(tokenizer, messages, tools, ids, turns), shown + tokenizer.decode(ids[at:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("templates", nargs="*", type=Path, default=[ROOT / "tests/templates"], help="files or folders of .jinja")
    parser.add_argument("--quiet", action="store_true", help="print the verdicts only")
    options = parser.parse_args()
    files = [file for path in options.templates for file in (sorted(path.glob("*.jinja")) if path.is_dir() else [path])]
    counts = {"right": 0, "refused": 0, "WRONG": 0}
    for file in files:
        tokenizer = tokenizer_of(file.read_text())
        for kind, (messages, tools) in conversations().items():
            wrong, shown = verdict(tokenizer, messages, tools)
            result = "WRONG" if wrong else "refused" if shown.startswith("refused") else "right"
            counts[result] += 1
            reason = "; ".join(wrong) or (shown.removeprefix("refused: ") if result == "refused" else "")
            print(f"{result:8} {file.stem}, {kind}{': ' * bool(reason)}{reason}")
            if result != "refused" and not options.quiet:
                print("    " + shown.replace("\n", "\n    "))
    print(f"{len(files)} templates: " + ", ".join(f"{count} {result}" for result, count in counts.items()))
    sys.exit(counts["WRONG"] > 0)


if __name__ == "__main__":
    main()
