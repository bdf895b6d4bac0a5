"""Faults of pairs that their text shows: each has a warning with its count and place, and a sound set has none."""

import copy

import pytest

from expunge.data import load_pairs
from expunge.data.faults import text_faults
from expunge.data.pairs import Pair
from expunge.models import load_outline

SOUND = [Pair(f"The river {i}", f" runs {i} times", f" sits {i} times") for i in range(20)]
FAULTY = {
    "glued": (Pair("The river", "runs to the sea", "sits down"), "glued to the last word of its prompt"),
    "a prompt's space": (Pair("The river ", "runs", "sits"), "ends in a space"),
    "a side's space": (Pair("The river", " runs ", " sits"), "ends in a space"),
    "length": (Pair("The river", " runs", " runs to the sea"), "differ in their length alone"),
    "an empty turn": (Pair("The river", " runs", " <|endoftext|>\n"), "an empty turn"),
    "foreign markers": (Pair("[INST] The river [/INST]", " runs", " sits"), "a chat template that is not the model's"),
    "own markers": (Pair("The river", " runs<|endoftext|>A film", " sits"), "special tokens stand within a side"),
}


@pytest.mark.parametrize(("pair", "message"), FAULTY.values(), ids=FAULTY)
def test_each_fault_has_its_warning(tokenizer, pair, message):
    many = [pair, *SOUND[: 4 if "glued" in message else 20]]
    [warning] = text_faults([SOUND[0], *many], tokenizer)
    assert message in warning and f": 1 of {len(many) + 1} pairs, first pair 2, " in warning


def test_a_sound_set_has_none(tokenizer):
    assert text_faults(SOUND, tokenizer) == []
    ended = [Pair(p.prompt, p.chosen + "<|endoftext|>\n", p.rejected + "<|endoftext|>\n") for p in SOUND]
    assert text_faults(ended, tokenizer) == []
    assert text_faults([Pair("天気", "は晴れ", "は雨")], tokenizer) == []  # a script without spaces


def test_the_models_own_template_is_no_fault(tokenizer):
    chat = copy.deepcopy(tokenizer)
    marked = [Pair("<|user|>Hi<|assistant|>", "Hello<|endoftext|>", "Go<|endoftext|>")]
    assert len(text_faults(marked, chat)) == 1
    chat.chat_template = "{% for m in messages %}<|user|>{{ m.content }}<|assistant|>{% endfor %}"
    assert text_faults(marked, chat) == []


def test_what_a_model_leaves_of_a_word_is_no_fault():
    """Of the built-in sets up to a tenth of the pairs go on within the prompt's last word."""
    _, tokenizer = load_outline("builtin")
    for name in ("builtin-heldout", "builtin-validation"):
        assert text_faults(load_pairs(name), tokenizer) == []
