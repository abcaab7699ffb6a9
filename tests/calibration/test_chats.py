"""Chats: the template gets the messages as they are, and what goes wrong there is said in a sentence."""

from __future__ import annotations

import json

import datasets
import pytest

from hf_sparsity.calibration.calibration import calibration_batches
from hf_sparsity.calibration.chats import chat_ids, without_missing
from tests.calibration.texts import make_tokenizer

LENIENT = (
    "{% if tools %}[TOOLS]{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}]"
    "{% if m.reasoning_content %}<{{ m.reasoning_content }}>{% endif %}{% if m.content %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}[CALL]{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
)
STRICT = "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}{% endfor %}"
PARTS = "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "the weather", "parameters": {}}}
ROW = {
    "messages": [
        {"role": "user", "content": "how warm"},
        {"role": "assistant", "content": None, "reasoning_content": "look", "tool_calls": [CALL]},
        {"role": "tool", "name": "weather", "content": "31"},
    ],
    "tools": [TOOL],
}


def rendered(chat, template=LENIENT, row=None) -> str:
    tokenizer = make_tokenizer(template)
    return tokenizer.decode(chat_ids(chat, tokenizer, row))


@pytest.mark.parametrize("form", ["rows", "dataset", "json tools"])
def test_tools_calls_and_reasoning_reach_the_template(form):
    tokenizer = make_tokenizer(LENIENT, limit=512)
    meant = tokenizer.apply_chat_template(ROW["messages"], tools=ROW["tools"], tokenize=False)
    row = ROW | {"tools": json.dumps(ROW["tools"])} if form == "json tools" else ROW
    data = datasets.Dataset.from_list([row]) if form == "dataset" else [row]
    length = len(tokenizer(meant)["input_ids"])
    assert tokenizer.decode(calibration_batches(data, tokenizer, sequences=1, length=length)[0]) == meant


def test_fields_that_a_table_adds_are_taken_out_again():
    table = {
        "role": "user",
        "content": None,
        "name": None,
        "tool_calls": [{"arguments": {"city": "Rome", "unit": None}}],
    }
    assert without_missing([table]) == [
        {"role": "user", "content": None, "tool_calls": [{"arguments": {"city": "Rome"}}]}
    ]


def test_sharegpt_is_translated():
    chat = [
        {"from": "system", "value": "brief"},
        {"from": "human", "value": "sort"},
        {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": {"city": "Rome"}})},
        {"from": "observation", "value": "31"},
        {"from": "gpt", "value": "done"},
    ]
    assert rendered(chat) == '[system]brief[user]sort[assistant][CALL]weather{"city": "Rome"}[tool]31[assistant]done'
    beside = {"conversations": chat[1:2], "system": "be kind"}
    assert rendered(chat[1:2], row=beside) == "[system]be kind[user]sort"
    with pytest.raises(ValueError, match="a message is from 'narrator'; ShareGPT's names are system, human"):
        rendered([{"from": "narrator", "value": "x"}])


@pytest.mark.parametrize("template", [LENIENT, STRICT, PARTS])
def test_parts_and_texts_reach_templates_that_want_the_other(template):
    parts = [{"role": "user", "content": [{"type": "text", "text": "how "}, {"type": "text", "text": "warm"}]}]
    assert (
        rendered(parts, template) == rendered([{"role": "user", "content": "how warm"}], template) == "[user]how warm"
    )


def test_a_picture_is_no_text():
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it"}]}]
    with pytest.raises(ValueError, match="calibration document 0: a message has a part of type image"):
        calibration_batches([chat], make_tokenizer(PARTS), length=8)


@pytest.mark.parametrize(
    ("template", "chat", "says"),
    [
        (STRICT, ROW["messages"], r"calibration document 1: .*\(roles user, assistant, tool.*UndefinedError"),
        (
            "{{ raise_exception('System role not supported') }}",
            [{"role": "system", "content": "x"}],
            "document 1: .*TemplateError: System role not supported",
        ),
        ("{% for m in messages %}", [{"role": "user", "content": "x"}], "document 1: .*TemplateSyntaxError"),
    ],
)
def test_what_a_template_does_not_take_is_a_sentence(template, chat, says):
    data = iter([[], chat])
    with pytest.raises(ValueError, match=says):
        calibration_batches(data, make_tokenizer(template), length=8)


def test_prompts_with_their_completions():
    tokenizer = make_tokenizer(LENIENT)
    texts = datasets.Dataset.from_list([{"prompt": "two and two ", "completion": "is four"}])
    assert tokenizer.decode(calibration_batches(texts, tokenizer, sequences=1, length=19)[0]) == "two and two is four"
    say = [{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "ho"}]
    for answer in (say[1], say[0] + say[1]):  # some hold the prompt again
        chats = [{"prompt": say[0], "chosen": answer, "rejected": say[0]}]
        for data in (chats, datasets.Dataset.from_list(chats)):
            ids = calibration_batches(data, tokenizer, sequences=1, length=21)
            assert tokenizer.decode(ids[0]) == "[user]hi[assistant]ho"
