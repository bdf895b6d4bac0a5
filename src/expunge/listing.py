"""What there is to name on the command line, for `expunge list` and for the shell's completion; torch is not waited for.

LISTINGS["methods"]()        # [{"name": "dpo", "family": "output", "description": "Prefer the chosen ..."}, ...]
"""

import json
import re
from collections.abc import Callable
from typing import Any

from expunge.attacks import ATTACKS, Attack
from expunge.config import BUDGETS
from expunge.data import NAMED
from expunge.methods import METHODS, Method
from expunge.registry import Registry
from expunge.scorers import SCORERS

Entries = list[dict[str, Any]]


def methods() -> Entries:
    """data: what a method takes as its defaults are: pairs or two sets, and what it fits probes on."""
    found = []
    for name in METHODS.names():
        takes = {"pairs": ["pairs"], "any": ["pairs or sets"], "none": []}[METHODS.about(name, "data", Method.data)]
        probes = ["labelled texts"] if METHODS.about(name, "labelled", Method.labelled) else []
        found.append(
            {
                "name": name,
                "family": METHODS.about(name, "family", Method.family),
                "kind": "applied" if METHODS.about(name, "applied", Method.applied) else "trained",
                "data": " and ".join(takes + probes),
                "description": _first_line(METHODS, name),
                "paper": METHODS.about(name, "paper"),
            }
        )
    return found


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


def attacks() -> Entries:
    """needs: what an attack works with, beside the victim."""
    return [
        {
            "name": name,
            "family": ATTACKS.about(name, "family", Attack.family),
            "needs": ", ".join(ATTACKS.about(name, "needs", ())) or "the victim alone",
            "description": _first_line(ATTACKS, name),
            "paper": ATTACKS.about(name, "paper"),
        }
        for name in ATTACKS.names()
    ]


def budgets() -> Entries:
    return [{"name": name, "settings": settings} for name, settings in BUDGETS.items()]


LISTINGS: dict[str, Callable[[], Entries]] = {
    "methods": methods,
    "attacks": attacks,
    "scorers": scorers,
    "data": data,
    "budgets": budgets,
}


def shown(entry: dict[str, Any]) -> list[str]:
    """An entry as columns; one of many fields as its name beside lines: what is short in one, then the rest."""
    name, *rest = (value if isinstance(value, str) else json.dumps(value) for value in entry.values())
    if len(rest) < 4:
        return [name, *rest]
    return [name, "\n".join([", ".join(rest[:-2]), *filter(None, rest[-2:])])]


def completer(listing: str, **only: str) -> Callable[[str], list[tuple[str, str]]]:
    """What the shell offers for a word that is begun: the (name, description) of entries; only: with these values."""

    def complete(incomplete: str) -> list[tuple[str, str]]:
        entries = [entry for entry in LISTINGS[listing]() if all(entry[key] == value for key, value in only.items())]
        names = {re.split("[A-Z]", entry["name"])[0]: entry.get("description", "") for entry in entries}
        return [(name, description) for name, description in names.items() if name.startswith(incomplete)]

    return complete


def _first_line(registry: Registry, name: str) -> str:
    return registry.about(name, "__doc__").strip().split("\n")[0]
