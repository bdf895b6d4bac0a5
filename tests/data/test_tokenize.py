"""Pairs as token ids: exact tokens, what is cut, what is dropped, and where bos goes."""

import pytest
from transformers import PreTrainedTokenizerFast

from expunge.data import Pair, Text, TokenizedPair, Unpaired, tokenize_pairs, tokenize_unpaired
from expunge.errors import ExpungeError
from expunge.ids import leading_tokens


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_token_that_straddles_the_boundary_is_of_both_continuations_and_counted(tokenizer):
    [row], counts = tokenize_pairs([Pair("The ri", "ver", " film")], tokenizer)
    assert row.prompt == ids(tokenizer, "The ri")[:-1]
    assert row.prompt + row.chosen == ids(tokenizer, "The river")
    assert row.prompt + row.rejected == ids(tokenizer, "The ri film")
    assert str(counts) == "1 pairs: 1 boundaries moved"
    [row], counts = tokenize_pairs([Pair("The river", " is", " film")], tokenizer)
    assert row == TokenizedPair(ids(tokenizer, "The river"), ids(tokenizer, " is"), ids(tokenizer, " film"))
    assert str(counts) == "1 pairs: nothing cut"


def test_bos_goes_where_the_tokenizer_puts_it(tokenizer, tokenizer_with_bos):
    assert leading_tokens(tokenizer) == [] and leading_tokens(tokenizer_with_bos) == [0]
    pairs = [Pair("The river", " is", " was")]
    [plain], _ = tokenize_pairs(pairs, tokenizer)
    [row], _ = tokenize_pairs(pairs, tokenizer_with_bos)
    assert row == TokenizedPair([0, *plain.prompt], plain.chosen, plain.rejected)


def test_truncation_keeps_the_prompts_end_and_the_continuations_start(tokenizer_with_bos):
    long = "x1y2z3"
    whole = ids(tokenizer_with_bos, long)
    [row], counts = tokenize_pairs([Pair(long, long, "q")], tokenizer_with_bos, max_prompt=2, max_continuation=3)
    assert row == TokenizedPair([0, *whole[-2:]], whole[:3], ids(tokenizer_with_bos, "q"))
    assert (counts.prompts_cut, counts.chosen_cut, counts.rejected_cut) == (1, 1, 0)
    assert str(counts) == "1 pairs: 1 prompts cut, 1 chosen cut"


def test_equal_after_truncation_is_dropped_and_counted(tokenizer):
    rows, counts = tokenize_pairs([Pair("a", "xyz", "xyw"), Pair("a", "x", "y")], tokenizer, max_continuation=2)
    assert len(rows) == 1 and counts.dropped_equal == 1 and counts.chosen_cut == 0
    with pytest.raises(ExpungeError, match=r"no pair is left.*1 dropped equal"):
        tokenize_pairs([Pair("a", "xyz", "xyw")], tokenizer, max_continuation=2)


def test_empty_prompt_starts_from_bos_or_eos(tokenizer, tokenizer_with_bos):
    pairs = [Pair("", " is", " was")]
    for tok in (tokenizer, tokenizer_with_bos):
        [row], _ = tokenize_pairs(pairs, tok)
        assert row.prompt == [0]
    with pytest.raises(ExpungeError, match="neither bos nor eos"):
        tokenize_pairs(pairs, PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer))


def test_bad_limits_and_no_pairs(tokenizer):
    with pytest.raises(ExpungeError, match="max_prompt 0"):
        tokenize_pairs([Pair("a", "b", "c")], tokenizer, max_prompt=0)
    with pytest.raises(ExpungeError, match="no pair is left"):
        tokenize_pairs([], tokenizer)


def test_unpaired_texts_are_counted_side_by_side(tokenizer, tokenizer_with_bos):
    data = Unpaired([Text("", "x1y2z3"), Text("x1y2z3", "q")], [Text("", "ab"), Text("a", "bcdefg")])
    for tok in (tokenizer, tokenizer_with_bos):
        sides, counts = tokenize_unpaired(data, tok, max_prompt=2, max_continuation=3)
        whole, start = ids(tok, "x1y2z3"), leading_tokens(tok)
        assert sides["forget"] == [([0], whole[:3]), ([*start, *whole[-2:]], ids(tok, "q"))]
        assert str(counts["forget"]) == "2 texts: 1 prompts cut, 1 continuations cut"
        assert str(counts["retain"]) == "2 texts: 1 continuations cut"


def test_a_retained_text_that_is_a_forgotten_one_once_cut_is_dropped_and_counted(tokenizer):
    data = Unpaired([Text("", "xyz")], [Text("", "xyw"), Text("", "ab")])
    sides, counts = tokenize_unpaired(data, tokenizer, max_continuation=2)
    assert sides["retain"] == [([0], ids(tokenizer, "ab"))] and counts["retain"].dropped_equal == 1
    with pytest.raises(ExpungeError, match=r"no text to retain is left.*1 dropped equal"):
        tokenize_unpaired(Unpaired([Text("", "xyz")], [Text("", "xyw")]), tokenizer, max_continuation=2)
