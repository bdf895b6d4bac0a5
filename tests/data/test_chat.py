"""Conversations: as TRL renders them, one bos, and a line for each thing that can be wrong."""

import copy
import csv
import json
from types import SimpleNamespace

import pytest
from datasets import Dataset
from trl import DPOTrainer, apply_chat_template, extract_prompt

from expunge.data import Pair, load_pairs, load_prompts, load_texts, tokenize_pairs
from expunge.data import chat as chat_module
from expunge.data.tokenize import tokenize_texts
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


TOOLS = (  # as templates in use do it: tools and documents before the turns, calls in place of content
    "{% if tools %}<|system|>{{ tools|tojson }}<eos>\n{% endif %}{% if documents %}<|docs|>{{ documents|tojson }}<eos>\n"
    "{% endif %}{% for m in messages %}<|{{ m.role }}|>{% if m.content %}{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function|tojson }}</call>{% endfor %}"
    "{% if shout is defined %}!{% endif %}{% if not (continue_final_message and loop.last) %}<eos>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}}
WITH_TOOLS = {
    "prompt": [user("Weather?")],
    "chosen": [{"role": "assistant", "content": None, "tool_calls": [CALL]}],
    "rejected": [assistant("How should I know")],
    "tools": [TOOL],
}


def test_tools_documents_and_arguments_reach_the_template_as_trl_gives_them(write, chat):
    chat.chat_template = TOOLS
    kwargs = {"shout": True}
    row = {**WITH_TOOLS, "chat_template_kwargs": kwargs}
    [pair] = load_pairs(write("a.jsonl", row), tokenizer=chat)
    assert vars(pair) == apply_chat_template({k: v for k, v in row.items() if k != "tools"}, chat, tools=[TOOL])
    assert '"weather"' in pair.prompt and "!" in pair.prompt and pair.chosen.startswith("<call>{")
    as_text = {**row, "tools": json.dumps([TOOL]), "chat_template_kwargs": json.dumps(kwargs)}
    assert load_pairs(write("b.jsonl", as_text), tokenizer=chat) == [pair]
    completion = {"prompt": row["prompt"], "completion": row["chosen"], "tools": [TOOL]}
    [text] = load_texts(write("c.jsonl", completion), "forget", tokenizer=chat)
    assert '"weather"' in text.prompt and text.completion.startswith("<call>{")
    [prompt] = load_prompts(write("d.jsonl", {"prompt": row["prompt"], "documents": [{"text": "Sun"}]}), tokenizer=chat)
    assert prompt.text.startswith('<|docs|>[{"text": "Sun"}]<eos>')
    path = write("e.jsonl", {"messages": [*row["prompt"], *row["chosen"]], "tools": [TOOL]})
    [whole] = load_texts(path, "forget", tokenizer=chat)
    assert '"weather"' in whole.completion and whole.completion.endswith("</call><eos>\n")


def test_a_turn_may_be_a_tool_call_alone(write, chat):
    """In the answer and before it, with null, blank or no content."""
    chat.chat_template = TOOLS
    wanted = load_pairs(write("a.jsonl", WITH_TOOLS), tokenizer=chat)
    for turn in ({"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "assistant", "tool_calls": [CALL]}):
        assert load_pairs(write("b.jsonl", {**WITH_TOOLS, "chosen": [turn]}), tokenizer=chat) == wanted
        before = [user("Weather?"), turn, {"role": "tool", "content": "4 degrees"}]
        row = {"prompt": before, "chosen": [assistant("Four")], "rejected": [assistant("No")]}
        [pair] = load_pairs(write("c.jsonl", row), tokenizer=chat)
        assert "<call>" in pair.prompt and pair.chosen == "Four<eos>\n"


def test_a_null_is_never_read_as_the_word_none(write, chat):
    """A template that prints content as it is, and one that adds it to text."""
    for template in (CHATML, CHATML.replace("{{ m.content }}", "{{ '' + m.content }}")):
        chat.chat_template = template.replace("<eos>", "{% if m.tool_calls %}call{% endif %}<eos>", 1)
        [pair] = load_pairs(write("a.jsonl", WITH_TOOLS), tokenizer=chat)
        assert pair.chosen == "call<eos>\n"


def test_a_system_column_is_the_first_turn(write, chat):
    system = {"role": "system", "content": "Be kind"}
    for name in ("explicit", "implicit"):
        row = ROWS[name]
        turned = {
            field: [system, *turns] if field == "prompt" or "prompt" not in row else turns for field, turns in row.items()
        }
        wanted = load_pairs(write("a.jsonl", turned), tokenizer=chat)
        assert load_pairs(write("b.jsonl", {**row, "system": "Be kind"}), tokenizer=chat) == wanted
        assert load_pairs(write("b.jsonl", {**turned, "system": "Be kind"}), tokenizer=chat) == wanted
        assert wanted[0].prompt.startswith("<|system|>Be kind<eos>")
        blank = load_pairs(write("c.jsonl", {**row, "system": " "}), tokenizer=chat)
        assert blank == load_pairs(write("d.jsonl", row), tokenizer=chat)


EMPTY = {
    "blank": ({**ROWS["explicit"], "chosen": [assistant(" ")]}, "message 1 of 'chosen' is an empty turn"),
    "null": (
        {**ROWS["explicit"], "rejected": [{"role": "assistant", "content": None}]},
        "message 1 of 'rejected' is an empty",
    ),
    "a call that is not shown": (WITH_TOOLS, "its content is blank, and the chat template does not show its tool calls"),
    "a user's": ({**ROWS["explicit"], "prompt": [user("")]}, "message 1 of 'prompt' is an empty turn"),
    "a later one": (
        {**ROWS["explicit"], "chosen": [assistant("Yes"), user("And?"), assistant("")]},
        "message 3 of 'chosen' is an empty turn",
    ),
    "without a prompt": (
        {"chosen": [user("Hi"), assistant("")], "rejected": [user("Hi"), assistant("Go")]},
        "message 1 of 'chosen' is an empty turn",
    ),
}


@pytest.mark.parametrize(("row", "message"), EMPTY.values(), ids=EMPTY)
def test_a_turn_of_which_the_template_makes_nothing_is_an_error(write, chat, row, message):
    path = write("a.jsonl", ROWS["explicit"], row)
    with pytest.raises(ExpungeError, match=message) as caught:
        load_pairs(path, tokenizer=chat)
    assert str(caught.value).startswith(f"{path}:2: ") and "\n" not in str(caught.value)


def test_an_empty_turn_of_a_whole_conversation_is_an_error(write, chat):
    path = write("a.jsonl", {"messages": [user("Hi"), assistant("")]})
    with pytest.raises(ExpungeError, match=r"a.jsonl:1: message 2 of 'messages' is an empty turn"):
        load_texts(path, "forget", tokenizer=chat)
    silent = CHATML.replace("{{ m.content }}", "{% if m.role != 'assistant' %}{{ m.content }}{% endif %}")
    chat.chat_template = silent  # emptiness is seen after rendering
    with pytest.raises(ExpungeError, match="message 1 of 'chosen' is an empty turn"):
        load_pairs(write("b.jsonl", ROWS["explicit"]), tokenizer=chat)


def test_the_boundary_is_found_in_tokens(write, family):
    """Prompt and answer share half a token's letters: TRL's boundary lies before it."""
    chat = copy.deepcopy(family("byte-level"))
    chat.add_special_tokens({"additional_special_tokens": ["<think>"]})
    chat.chat_template = THINKING
    rows = [
        {"prompt": [user("Hi")], "chosen": [assistant("<the sea>")], "rejected": [assistant(no)]} for no in ("<thorn>", "Go")
    ]
    made = []
    for row in rows:
        [pair] = load_pairs(write("a.jsonl", row), tokenizer=chat)
        [tokens], _ = tokenize_pairs([pair], chat)
        made.append((tokens.prompt, tokens.chosen, tokens.rejected))
        assert pair.prompt == "<|user|>Hi<eos>\n<|assistant|>" and pair.chosen == "<the sea><eos>\n"
    trainer = SimpleNamespace(_tokenizer=chat, _is_vision_dataset=False)
    args = SimpleNamespace(dataset_num_proc=None, max_length=None)
    wanted = DPOTrainer._prepare_dataset(trainer, Dataset.from_list(rows), chat, args, "train")  # type: ignore[arg-type]
    assert made == [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in wanted]  # type: ignore[call-overload]


def test_a_template_that_writes_a_bos_which_the_tokenizer_does_not_add(write, tokenizer):
    """SmolLM2's: the beginning of a turn is its bos."""
    smol = copy.deepcopy(tokenizer)
    smol.add_special_tokens({"bos_token": "<|im_start|>"})
    smol.chat_template = CHATML.replace("<|{{ m.role }}|>", "<|im_start|>{{ m.role }}\n")
    path = write("a.jsonl", {"messages": [user("Hi"), assistant("Hello")]})
    texts = load_texts(path, "forget", tokenizer=smol)
    [(prompt, completion)], _ = tokenize_texts(texts, smol)
    whole = smol.apply_chat_template([user("Hi"), assistant("Hello")])["input_ids"]
    assert prompt == [smol.bos_token_id] and prompt + completion == whole


def test_columns_of_another_form_are_one_line(write, chat):
    for more, message in (
        ({"tools": "weather"}, "field 'tools' is text that is not JSON"),
        ({"tools": {"a": 1}}, "field 'tools' must be a list"),
        ({"chat_template_kwargs": [1]}, "field 'chat_template_kwargs' must be an object"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs sets 'tokenize'"),
        ({"system": ["a"]}, "field 'system' must be text"),
    ):
        with pytest.raises(ExpungeError, match=f"a.jsonl:1: {message}"):
            load_pairs(write("a.jsonl", {**ROWS["explicit"], **more}), tokenizer=chat)
    both = {**ROWS["turns"], "system": "Be brief"}
    with pytest.raises(ExpungeError, match="a column 'system' beside a system message"):
        load_pairs(write("a.jsonl", both), tokenizer=chat)


def test_what_a_template_does_not_read_is_said_once(write, chat, caplog):
    chat_module._warn.cache_clear()
    rows = [{**ROWS[name], "tools": [TOOL]} for name in ("explicit", "implicit")]
    load_pairs(write("a.jsonl", *rows), tokenizer=chat)
    assert sum("does not read 'tools'" in record.message for record in caplog.records) == 1


PARTS = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]


@pytest.mark.parametrize("content", ["{{ m.content }}", "{{ '' + m.content }}", "{{ m.content | trim }}"])
def test_parts_are_never_read_as_python_writes_them(write, chat, content):
    """Templates that know text alone; the row with text in place of parts is what is right."""
    chat.chat_template = CHATML.replace("{{ m.content }}", content)
    wanted = load_pairs(write("a.jsonl", ROWS["explicit"]), tokenizer=chat)
    parts = {**ROWS["explicit"], "prompt": [{"role": "user", "content": PARTS}]}
    assert load_pairs(write("b.jsonl", parts), tokenizer=chat) == wanted


def test_a_template_that_reads_parts_is_given_them(write, chat):
    chat.chat_template = CHATML.replace("{{ m.content }}", "{% for part in m.content %}[{{ part.text }}]{% endfor %}")
    [prompt] = load_prompts(write("a.jsonl", {"prompt": [{"role": "user", "content": PARTS}]}), tokenizer=chat)
    assert prompt.text == "<|user|>[H][i]<eos>\n<|assistant|>"


def test_a_table_has_messages_as_json_text(tmp_path, chat):
    """As they are in JSON lines, in pairs, prompts and texts; as pandas writes lists, in Python's form, they are refused."""
    rows = {"pairs": ROWS["turns"], "texts": {"messages": ROWS["turns"]["prompt"]}}
    for kind, load in (
        ("pairs", load_pairs),
        ("pairs", load_prompts),
        ("texts", lambda *a, **k: load_texts(*a, "forget", **k)),
    ):
        for form, dump in (("jsonl", None), ("csv", json.dumps), ("py.csv", str)):
            path = tmp_path / f"{kind}.{form}"
            if dump is None:
                path.write_text(json.dumps(rows[kind]) + "\n", encoding="utf-8")
                wanted = load(path, tokenizer=chat)
                continue
            with path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([list(rows[kind]), [dump(turns) for turns in rows[kind].values()]])
            if form == "csv":
                assert load(path, tokenizer=chat) == wanted
            else:
                with pytest.raises(ExpungeError, match=r"py.csv:2: field '\w+' is text of messages that is not JSON"):
                    load(path, tokenizer=chat)


def test_what_plain_text_has_beside_it_for_a_template_is_said(write, caplog):
    chat_module._warn.cache_clear()
    row = {"prompt": "Hi", "chosen": " Hello", "rejected": " Go", "system": "Be kind", "tools": None}
    assert load_pairs(write("a.jsonl", row, row)) == [Pair("Hi", " Hello", " Go")] * 2
    assert [record.message for record in caplog.records] == [
        "rows of plain text have 'system' beside it, which only a chat template takes: it is left out"
    ]


IMAGE = {"role": "user", "content": [{"type": "image", "url": "a.png"}, *PARTS]}
MISTAKES = {
    "a part that is no text": ({**ROWS["explicit"], "prompt": [IMAGE]}, "content of a message of 'prompt' must be text"),
    "content that is a number": (
        {**ROWS["explicit"], "chosen": [{"role": "assistant", "content": 5}]},
        "'chosen' must be text",
    ),
    "parts without text": (
        {**ROWS["explicit"], "chosen": [{"role": "assistant", "content": [{"type": "text", "text": " "}]}]},
        "message 1 of 'chosen' is an empty turn",
    ),
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
