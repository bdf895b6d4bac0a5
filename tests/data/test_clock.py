"""The date that chat templates are told: fixed in a block, today's outside, and nobody else's."""

from datetime import date, datetime

from transformers.utils import chat_template_utils

from expunge.data import load_pairs
from expunge.data.clock import today, told

TEMPLATE = "{% for m in messages %}{{ m.content }} {{ strftime_now('%Y-%m-%d %H:%M') }}. {% endfor %}"
ROW = {
    "prompt": [{"role": "user", "content": "Hi"}],
    "chosen": [{"role": "assistant", "content": "Well"}],
    "rejected": [{"role": "assistant", "content": "Badly"}],
}


def test_templates_are_told_one_date_in_the_block(write, tokenizer):
    tokenizer.chat_template = TEMPLATE
    path = write("chats.jsonl", ROW)
    with told(date(2026, 3, 1)):
        with told(date(2025, 1, 2)):
            assert load_pairs(path, tokenizer=tokenizer)[0].prompt == "Hi 2025-01-02 00:00. "
        assert load_pairs(path, tokenizer=tokenizer)[0].chosen == "Well 2026-03-01 00:00. "
    assert today() == date.today() and chat_template_utils.datetime is datetime
    assert str(date.today().year) in load_pairs(path, tokenizer=tokenizer)[0].prompt
