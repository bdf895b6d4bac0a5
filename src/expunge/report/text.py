"""Text and numbers as the page shows them: a character that hides or reorders its neighbours is shown by its number.

    visible("left\\u202eright")   # 'left⟦U+202E⟧right'

Escaping for HTML is jinja2's work; this is about characters that HTML lets through.
"""

import unicodedata

UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # controls, bidi and zero width, surrogates, private, separators


def visible(text: str) -> str:
    """`text` with controls, formats, surrogates and unassigned characters as `⟦U+XXXX⟧`; newline and tab stay."""
    if text.isprintable():
        return text
    return "".join(f"⟦U+{ord(c):04X}⟧" if unicodedata.category(c) in UNSEEN and c not in "\n\t" else c for c in text)


def clip(text: str, length: int) -> str:
    """At most `length` characters, with an ellipsis where there were more."""
    return text if len(text) <= length else text[: length - 1] + "…"


def short(value: float) -> str:
    """Three significant digits, without an exponent from 1,000 up: `3,512`, `0.537`, `1e-06`."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
