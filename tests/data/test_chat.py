"""Conversations: as TRL renders them, one bos, and a line for each thing that can be wrong."""

import copy

import pytest
from trl import apply_chat_template, extract_prompt

from expunge.data import Pair, load_pairs, load_prompts, tokenize_pairs
from expunge.errors import ExpungeError

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if not (continue_final_message and loop.last) %}<eos>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
THINKING = CHATML.replace("<|assistant|>{% endif %}", "<|assistant|><think>{% endif %}")  # answers begin without it


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


ROWS = {
    "explicit": {"prompt": [user("Hi")], "chosen": [assistant("Hello")], "rejected": [assistant("Go")]},
    "implicit": {"chosen": [user("Hi"), assistant("Hello")], "rejected": [user("Hi"), assistant("Go")]},
    "turns": {
        "prompt": [{"role": "system", "content": "Be kind"}, user("Hi"), assistant("Yes?"), user("How?")],
        "chosen": [assistant("Well")],
        "rejected": [assistant("Badly")],
    },
}


@pytest.fixture
def chat(tokenizer):
    found = copy.deepcopy(tokenizer)
    found.chat_template = CHATML
    return found


@pytest.mark.parametrize("template", [CHATML, THINKING])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_conversation_is_rendered_as_trl_does(write, chat, template, row):
    chat.chat_template = template
    [pair] = load_pairs(write("a.jsonl", row), tokenizer=chat)
    explicit = row if "prompt" in row else extract_prompt(row)
    assert vars(pair) == apply_chat_template(copy.deepcopy(explicit), chat)


def test_the_prompt_ends_where_the_model_speaks(write, chat):
    [pair] = load_pairs(write("a.jsonl", ROWS["explicit"]), tokenizer=chat)
    assert pair == Pair("<|user|>Hi<eos>\n<|assistant|>", "Hello<eos>\n", "Go<eos>\n")
    [prompt] = load_prompts(write("b.jsonl", {"prompt": [user("Hi")]}), tokenizer=chat)
    assert prompt.text == pair.prompt
    [begun] = load_prompts(write("c.jsonl", {"prompt": [user("Hi"), assistant("Hel")]}), tokenizer=chat)
    assert begun.text == "<|user|>Hi<eos>\n<|assistant|>Hel"


def test_a_template_with_a_bos_gives_one_bos(write, bos_tokenizer):
    tokenizer = copy.deepcopy(bos_tokenizer)
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    pairs = load_pairs(write("a.jsonl", ROWS["explicit"]), tokenizer=tokenizer)
    [row], _ = tokenize_pairs(pairs, tokenizer)
    assert row.prompt.count(tokenizer.bos_token_id) == 1
    whole = tokenizer.apply_chat_template(ROWS["explicit"]["prompt"], add_generation_prompt=True)["input_ids"]
    assert row.prompt == whole


MISTAKES = {
    "no tokenizer": (ROWS["explicit"], "needs the model's chat template"),
    "a prompt that is text": ({**ROWS["explicit"], "prompt": "Hi"}, "'prompt' must be a list of messages"),
    "a side that is text": ({**ROWS["explicit"], "rejected": "Go"}, "'rejected' must be a list of messages"),
    "a side that is missing": ({"prompt": [user("Hi")], "chosen": [assistant("Hello")]}, "'rejected' must be a list"),
    "no message": ({**ROWS["explicit"], "chosen": []}, "'chosen' must be a list of messages"),
    "no role": ({**ROWS["explicit"], "chosen": [{"content": "Hello"}]}, "an object with 'role' and 'content'"),
    "nothing shared": ({"chosen": [user("Hi")], "rejected": [user("Ho")]}, "share no first message"),
    "a system message at the end": ({**ROWS["explicit"], "prompt": [{"role": "system", "content": "x"}]}, "role 'system'"),
    "equal sides": ({**ROWS["explicit"], "rejected": [assistant("Hello")]}, "chosen and rejected are equal"),
}


@pytest.mark.parametrize(("row", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_with_its_place(write, chat, row, message):
    path = write("a.jsonl", row)
    with pytest.raises(ExpungeError, match=message) as caught:
        load_pairs(path, tokenizer=None if "needs the model" in message else chat)
    assert str(caught.value).startswith(f"{path}:1: ") and "\n" not in str(caught.value)


def test_a_template_that_is_missing_or_refuses_is_one_line(write, tokenizer, chat):
    path = write("a.jsonl", ROWS["turns"])
    with pytest.raises(ExpungeError, match="the model's tokenizer has no chat template"):
        load_pairs(path, tokenizer=tokenizer)
    chat.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ExpungeError, match=r"a.jsonl:1: .*refuses the conversation \(no system role\)"):
        load_pairs(path, tokenizer=chat)
