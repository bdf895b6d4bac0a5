"""Text as token ids: for every family of tokenizers the ids of the joined text, split where TRL splits them."""

import random
from types import SimpleNamespace

import pytest
from datasets import Dataset
from trl import DPOTrainer

from expunge.data import Pair, Text, Unpaired, load_pairs, tokenize_pairs, tokenize_unpaired
from expunge.errors import ExpungeError
from expunge.ids import check_known, continuation_text, encode, leading_tokens, opened, prompt_ids, split, with_start
from expunge.models import load_outline

KINDS = ("byte-level", "metaspace always", "metaspace first", "metaspace never", "prepend", "unigram")
AROUND = ("plain", "bos", "eos", "bos and eos")
WORDS = ["The", "river", "runs", "past", "window,", "rows;", "é", "雨", "10:45!", "a", "home", "x", "\n", "  ", "kind"]

every_family = pytest.mark.parametrize(
    ("kind", "around"), [(kind, around) for kind in KINDS for around in AROUND], ids=lambda value: value
)


def random_pairs(seed: str, count: int) -> list[Pair]:
    """Texts cut anywhere: at words, within them, before and after blanks, at the very beginning."""
    draw, found = random.Random(seed), []
    while len(found) < count:
        text = " ".join(draw.choices(WORDS, k=draw.randint(2, 9)))
        at = draw.randrange(len(text))
        other = draw.choice(["", " "]) + " ".join(draw.choices(WORDS, k=3))
        if text[at:] != other:
            found.append(Pair(text[:at], text[at:], other))
    return found


@every_family
def test_prompt_and_continuation_are_the_joined_text(family, kind, around):
    tokenizer, moved = family(kind, around), 0
    pairs = random_pairs(f"{kind} {around}", 200)
    sides = [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]
    for pair, found in zip(pairs, split(tokenizer, [pair.prompt for pair in pairs], *sides), strict=True):
        alone = tokenizer(pair.prompt, add_special_tokens=False)["input_ids"]
        for text, ids in zip((pair.chosen, pair.rejected), found.sides, strict=True):
            assert found.prompt + ids == tokenizer(pair.prompt + text, add_special_tokens=False)["input_ids"]
            whole = tokenizer.decode(found.prompt + ids)
            assert whole.lstrip(" ") == (pair.prompt + text).lstrip(" ")  # SentencePiece drops a space at the very start
        assert found.prompt == alone[: len(found.prompt)]
        assert found.moved == (found.prompt != alone)
        moved += found.moved
    assert 0 < moved < len(pairs)  # else this test shows little


@every_family
def test_rows_have_one_bos_no_eos_and_the_moved_boundaries_are_counted(family, kind, around):
    tokenizer = family(kind, around)
    pairs = [pair for pair in random_pairs(f"rows of {kind}", 60) if pair.prompt]
    rows, counts = tokenize_pairs(pairs, tokenizer, 1000, 1000)
    lead = [1] if "bos" in around else []
    assert leading_tokens(tokenizer) == lead and len(rows) == len(pairs)
    for pair, row in zip(pairs, rows, strict=True):
        for text, ids in ((pair.chosen, row.chosen), (pair.rejected, row.rejected)):
            whole = tokenizer(pair.prompt + text, add_special_tokens=False)["input_ids"]
            assert (row.prompt + ids) in ([*lead, *whole], [0, *whole])  # 0: eos for a prompt that is all within a token
    assert counts.boundaries_moved == sum(
        found.moved for found in split(tokenizer, *zip(*((p.prompt, p.chosen, p.rejected) for p in pairs), strict=True))
    )
    assert f"{counts.boundaries_moved} boundaries moved" in str(counts)


def trl_rows(rows: list[dict], tokenizer) -> list[tuple[list[int], list[int], list[int]]]:
    """What TRL's DPOTrainer trains on."""
    trainer = SimpleNamespace(_tokenizer=tokenizer, _is_vision_dataset=False)
    args = SimpleNamespace(dataset_num_proc=None, max_length=None)
    made = DPOTrainer._prepare_dataset(trainer, Dataset.from_list(rows), tokenizer, args, "train")  # type: ignore[arg-type]
    return [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in made]  # type: ignore[call-overload]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("around", ["plain", "bos"])
def test_the_boundary_is_trls(family, kind, around):
    tokenizer = family(kind, around)
    pairs = [pair for pair in random_pairs(f"oracle {kind}", 80) if encode(tokenizer, pair.prompt)]
    wanted = trl_rows([vars(pair) for pair in pairs], tokenizer)
    start = leading_tokens(tokenizer)
    split_here = split(tokenizer, *zip(*((p.prompt, p.chosen, p.rejected) for p in pairs), strict=True))
    for (prompt, (chosen, rejected), _), (theirs, theirs_chosen, theirs_rejected) in zip(split_here, wanted, strict=True):
        assert [start + prompt, chosen, rejected] == [theirs, theirs_chosen[:-1], theirs_rejected[:-1]]  # it adds an eos


def test_a_word_after_a_sentencepiece_prompt_has_one_space(family):
    """Encoded apart, " is mild" begins with two of them."""
    for around in AROUND:
        tokenizer = family("prepend", around)
        apart = tokenizer.convert_ids_to_tokens(tokenizer(" is mild", add_special_tokens=False)["input_ids"])
        assert apart[0] == "▁" and apart[1].startswith("▁")
        [row], counts = tokenize_pairs([Pair("The weather", " is mild", " is the sea")], tokenizer)
        for ids in (row.chosen, row.rejected):
            assert tokenizer.convert_ids_to_tokens(ids)[0].startswith("▁i")
        assert str(counts) == "1 pairs: nothing cut"


def test_a_bos_that_the_text_writes_itself_is_not_put_there_again(family, tmp_path):
    """Added by the tokenizer or not: SmolLM2's template writes its bos as the beginning of a turn."""
    for around, bos in (("bos", "<bos>"), ("plain", "<eos>"), ("bos and eos", "<bos>")):
        tokenizer = family("byte-level", around)
        token = tokenizer.convert_tokens_to_ids(bos)
        text = f"{bos}The river runs"
        assert prompt_ids(tokenizer, [text, "The river"]) == [
            [token, *encode(tokenizer, "The river runs")],
            [*leading_tokens(tokenizer), *encode(tokenizer, "The river")],
        ]
        sides, _ = tokenize_unpaired(Unpaired([Text("", text)], [Text("", "The sea")]), tokenizer)
        assert sides["forget"] == [([token], encode(tokenizer, "The river runs"))]
        assert sides["retain"] == [([token], encode(tokenizer, "The sea"))]
        [row], _ = tokenize_pairs([Pair(text, " past", " home")], tokenizer, max_prompt=2)
        assert row.prompt.count(token) == len(leading_tokens(tokenizer))  # apart from the two that are kept


def test_an_empty_prompt_becomes_bos_or_eos(family):
    plain, bos = family("byte-level"), family("byte-level", "bos")
    assert prompt_ids(plain, [""]) == [[0]] and prompt_ids(bos, [""]) == [[1]] and prompt_ids(bos, []) == []
    assert opened(plain, [], [0, 7], [8]) == ([0], [7], [8]) and opened(plain, [5], [0, 7]) == ([5], [0, 7])
    assert with_start(bos, []) == [1] and with_start(bos, [9]) == [9]


def test_a_side_that_adds_nothing_is_empty(family):
    tokenizer = family("unigram")
    assert split(tokenizer, ["The river"], [""], [" runs"])[0].sides[0] == []
    assert split(tokenizer, []) == []


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_continuation_adds_begins_with_its_space(family, kind):
    tokenizer = family(kind, "bos")
    [(prompt, (side,), _)] = split(tokenizer, ["The river"], [" runs to the sea ."])
    assert continuation_text(tokenizer, [1, *prompt], side) == " runs to the sea ."
    assert continuation_text(tokenizer, [1, *prompt], []) == ""


def test_an_id_beyond_the_embedding_is_one_line(family):
    tokenizer = family("byte-level")
    check_known([[3, 4], []], 5, tokenizer)
    check_known([[3, 99]], None)
    with pytest.raises(ExpungeError, match=r"the token '<\|user\|>', id 2, and the model's embedding has 2 rows: resize"):
        check_known([[0], [1, 2]], 2, tokenizer)


def test_of_the_built_in_pairs_only_those_that_end_a_word_of_the_prompt_changed():
    """Encoded apart they were what the model had written; committed figures rest on that."""
    _, tokenizer = load_outline("builtin")
    pairs = load_pairs("builtin-heldout")
    rows, counts = tokenize_pairs(pairs, tokenizer, 1000, 1000)
    moved = 0
    for pair, row in zip(pairs, rows, strict=True):
        apart = [encode(tokenizer, text) for text in (pair.prompt, pair.chosen, pair.rejected)]
        if apart != [row.prompt, row.chosen, row.rejected]:
            moved += 1
            assert any(pair.prompt[-1:].strip() and side[:1].strip() for side in (pair.chosen, pair.rejected))
    assert moved == counts.boundaries_moved == 3 and len(rows) == 512
