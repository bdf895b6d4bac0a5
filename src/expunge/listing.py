"""What there is to name on the command line, for `expunge list` and for the shell's completion; torch is not waited for.

LISTINGS["methods"]()        # [{"name": "dpo", "family": "output", "description": "Prefer the chosen ..."}, ...]
"""

import re
from collections.abc import Callable
from typing import Any

from expunge.config import BUDGETS
from expunge.data import NAMED
from expunge.methods import METHODS, Method
from expunge.registry import Registry
from expunge.scorers import SCORERS

Entries = list[dict[str, Any]]


def methods() -> Entries:
    return [
        {"name": name, "family": METHODS.about(name, "family", Method.family), "description": _first_line(METHODS, name)}
        for name in METHODS.names()
    ]


def scorers() -> Entries:
    hub = "A sequence classifier from the hub or a folder: the probability of its toxic label."
    found = [{"name": name, "description": _first_line(SCORERS, name)} for name in SCORERS.names()]
    perspective = "Another attribute of Perspective, such as INSULT; or max7, the highest of seven."
    return [
        *found,
        {"name": "hf:NAME[@LABEL]", "description": hub},
        {"name": "perspective:ATTRIBUTE", "description": perspective},
    ]


def data() -> Entries:
    return [{"name": entry.name, "kind": entry.kind, "description": entry.description} for entry in NAMED]


def budgets() -> Entries:
    return [{"name": name, "settings": settings} for name, settings in BUDGETS.items()]


LISTINGS: dict[str, Callable[[], Entries]] = {"methods": methods, "scorers": scorers, "data": data, "budgets": budgets}


def completer(listing: str, **only: str) -> Callable[[str], list[tuple[str, str]]]:
    """What the shell offers for a word that is begun: the (name, description) of entries; only: with these values."""

    def complete(incomplete: str) -> list[tuple[str, str]]:
        entries = [entry for entry in LISTINGS[listing]() if all(entry[key] == value for key, value in only.items())]
        names = {re.split("[A-Z]", entry["name"])[0]: entry.get("description", "") for entry in entries}
        return [(name, description) for name, description in names.items() if name.startswith(incomplete)]

    return complete


def _first_line(registry: Registry, name: str) -> str:
    return registry.about(name, "__doc__").strip().split("\n")[0]
