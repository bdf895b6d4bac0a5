"""The date that chat templates are told: one for all of a run, whichever day it goes on, so that its text stays what it was.

    with told(date(2026, 12, 1)):
        load_pairs("chats.jsonl", tokenizer=tokenizer)          # a template's strftime_now says 1 December

Without it templates are told today's date, as transformers does. The time of day is always 00:00.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import date, datetime, time

_told: ContextVar[date | None] = ContextVar("told", default=None)


@contextlib.contextmanager
def told(day: date) -> Iterator[None]:
    """Templates that are rendered in the block are told this date."""
    before = _told.set(day)
    try:
        yield
    finally:
        _told.reset(before)


def today() -> date:
    """What templates are told now."""
    return _told.get() or date.today()


class _Told(datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.combine(today(), time(), tz)


@contextlib.contextmanager
def templates_told() -> Iterator[None]:
    """In the block the function `strftime_now`, which transformers gives to templates, tells the date of `today`.

    transformers makes text of whatever else a template is given, so that a function cannot be passed; its own asks the
    `datetime` of its module.
    """
    from transformers.utils import chat_template_utils

    before = chat_template_utils.datetime
    chat_template_utils.datetime = _Told  # type: ignore[misc]
    try:
        yield
    finally:
        chat_template_utils.datetime = before  # type: ignore[misc]
