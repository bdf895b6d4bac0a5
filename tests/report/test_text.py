import pytest

from expunge.report.text import clip, short, visible


@pytest.mark.parametrize("code", [0x00, 0x1B, 0x7F, 0x85, 0x200B, 0x202E, 0x2066, 0x2028, 0xFEFF, 0xD800, 0xE000])
def test_what_hides_or_reorders_is_shown_by_its_number(code):
    assert visible(f"a{chr(code)}b") == f"a⟦U+{code:04X}⟧b"


def test_ordinary_text_stays():
    text = "Zażółć, naïve\t«слово»\n日本語 🙂"
    assert visible(text) == text


def test_clip_says_that_it_cut():
    assert clip("abcd", 4) == "abcd"
    assert clip("abcde", 4) == "abc…"


@pytest.mark.parametrize(("value", "text"), [(3512.4, "3,512"), (0.53712, "0.537"), (1e-6, "1e-06"), (0.0, "0")])
def test_short_numbers(value, text):
    assert short(value) == text
