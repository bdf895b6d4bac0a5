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


def strftime_now(form: str) -> str:
    """In place of the function of this name that transformers gives to templates."""
    return datetime.combine(today(), time()).strftime(form)
