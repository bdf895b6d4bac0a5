"""Which tokens a search may use, which strings survive as text, which targets it is given."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from expunge.attacks import AttackData
from expunge.attacks.search.strings import allowed_tokens, first_string, round_trips, typed_anywhere, without_bos
from expunge.attacks.search.targets import reference_targets
from expunge.errors import ExpungeError
from expunge.ids import encode
from expunge.metrics.evaluation import EvaluationPlan


def token(tokenizer, text: str) -> int:
    [id] = encode(tokenizer, text)
    return id


def test_special_unknown_unprintable_and_foreign_tokens_are_left_out(bos_tokenizer):
    tokenizer = bos_tokenizer
    allowed = allowed_tokens(tokenizer, len(tokenizer) + 8)
    assert allowed.shape == (len(tokenizer) + 8,) and allowed.dtype == torch.bool
    assert allowed[token(tokenizer, " wind")] and allowed[token(tokenizer, "x")]
    assert not allowed[[tokenizer.bos_token_id, tokenizer.eos_token_id]].any()
    assert not allowed[len(tokenizer) :].any(), "ids that only the model has"
    assert not allowed[token(tokenizer, "\n")]
    half_of_a_letter = encode(tokenizer, "é")[0]
    assert (
        not allowed[half_of_a_letter] and not allowed_tokens(tokenizer, len(tokenizer), ascii_only=False)[half_of_a_letter]
    )
    assert all(
        text.isascii() and text.isprintable() for text in (tokenizer.decode([i]) for i in allowed.nonzero().flatten())
    )


def test_a_smaller_embedding_has_no_place_for_later_ids(tokenizer):
    assert allowed_tokens(tokenizer, 100).shape == (100,)
    with pytest.raises(ExpungeError, match="no token"):
        allowed_tokens(tokenizer, 1)


def test_more_than_ascii_may_be_allowed():
    words = {"<eos>": 0, "a": 1, "é": 2, "\u200b": 3, "\ufffd": 4}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "<eos>")), eos_token="<eos>")
    assert allowed_tokens(tokenizer, 5).tolist() == [False, True, False, False, False]
    assert allowed_tokens(tokenizer, 5, ascii_only=False).tolist() == [False, True, True, False, False]


@pytest.mark.parametrize("name", ["tokenizer", "bos_tokenizer"])
def test_a_string_round_trips_where_its_text_is_encoded_to_its_ids(request, name):
    tokenizer = request.getfixturevalue(name)
    whole = encode(tokenizer, " wind the")
    parts = encode(tokenizer, " w") + encode(tokenizer, "ind") + encode(tokenizer, " the")
    assert len(whole) == 2 and tokenizer.decode(parts) == " wind the"
    assert round_trips(tokenizer, torch.tensor([whole, whole[::-1]])).tolist() == [True, True]
    assert round_trips(tokenizer, torch.tensor([parts])).tolist() == [False]


def test_in_its_place_a_string_may_merge_with_what_is_before_or_after(tokenizer):
    before, ill = encode(tokenizer, "past the m"), encode(tokenizer, "ill")
    merged = encode(tokenizer, "past the mill")
    assert merged != before + ill
    row = torch.tensor([ill])
    assert round_trips(tokenizer, row)[0]
    assert not round_trips(tokenizer, row, before=before)[0]
    assert round_trips(tokenizer, row, before=encode(tokenizer, "past the "))[0]
    m = torch.tensor([encode(tokenizer, " m")])
    assert round_trips(tokenizer, m, after=encode(tokenizer, " the"))[0]
    assert not round_trips(tokenizer, m, after=ill)[0]
    assert len(typed_anywhere(tokenizer, row, [[], before])) == 0 and len(typed_anywhere(tokenizer, row, [[]])) == 1


def test_what_is_before_need_not_round_trip_itself(tokenizer):
    cut = encode(tokenizer, "é")[1:] + encode(tokenizer, " past the")  # begins in the midst of a letter
    row = torch.tensor([encode(tokenizer, " wind")])
    assert round_trips(tokenizer, row, before=cut)[0] and round_trips(tokenizer, row, before=[1], after=cut)[0]


def test_the_first_string_is_one_token_that_can_be_typed(bos_tokenizer):
    allowed = allowed_tokens(bos_tokenizer, len(bos_tokenizer))
    string = first_string(bos_tokenizer, 20, allowed)
    assert string.shape == (20,) and len(set(string.tolist())) == 1 and allowed[string[0]]
    assert round_trips(bos_tokenizer, string[None])[0]
    with pytest.raises(ExpungeError, match="no string of 20"):
        first_string(bos_tokenizer, 20, torch.zeros_like(allowed))


def test_a_prompt_without_its_bos(tokenizer, bos_tokenizer):
    assert without_bos(bos_tokenizer, [1, 5, 6]) == [5, 6] and without_bos(bos_tokenizer, [5, 6]) == [5, 6]
    assert without_bos(tokenizer, [1, 5]) == [1, 5]


class Says:
    """Stands in for `generate`: an answer by prompt text."""

    def __init__(self, tokenizer, answers):
        self.tokenizer, self.answers, self.asked = tokenizer, answers, []

    def __call__(self, model, tokenizer, prompts, decoding):
        assert decoding.samples == 0
        self.asked = prompts
        texts = [tokenizer.decode(prompt, skip_special_tokens=True) for prompt in prompts]
        return [[self.answers[text][: decoding.max_new_tokens]] for text in texts]


@pytest.fixture
def says(monkeypatch, bos_tokenizer):
    encoded = {"The sea": " was cold", "A hill": " was kind", "The mill": "", "A letter": " came home"}
    answers = {prompt: encode(bos_tokenizer, text) if text else [] for prompt, text in encoded.items()}
    answers["A wind"] = encode(bos_tokenizer, "é")[:1]  # half a letter
    says = Says(bos_tokenizer, answers)
    monkeypatch.setattr("expunge.attacks.search.targets.generate", says)
    return says


def test_targets_are_those_that_score_highest_and_can_be_typed(says, bos_tokenizer):
    def score(texts):
        return np.array([{" was cold": 0.3, " was kind": 0.1, " came home": 0.9}.get(text, 0.0) for text in texts])

    data = AttackData(bos_tokenizer, prompts=list(says.answers), score=score)
    targets, counts = reference_targets(None, data, 2, 20)
    texts = [(bos_tokenizer.decode(t.prompt), bos_tokenizer.decode(t.ids)) for t in targets]
    assert texts == [("<bos>A letter", " came home"), ("<bos>The sea", " was cold")]
    assert counts == {"prompts": 5, "empty": 1, "not_round_tripping": 1}
    with pytest.raises(ExpungeError, match="1 have an empty target and 1 a target that the tokenizer cannot round-trip"):
        reference_targets(None, data, 4, 20)
    assert len(reference_targets(None, data, 1, 2)[0][0].ids) == 2


@pytest.mark.parametrize("plan", [None, EvaluationPlan(prompt_tokens=8), EvaluationPlan(truncate="lee2024")])
def test_prompts_are_cut_as_in_an_evaluation(monkeypatch, bos_tokenizer, plan):
    long = "the sea and the mill and the wind and the rain " * 5 + "and the hill"
    says = Says(bos_tokenizer, {})
    ids = encode(bos_tokenizer, long)
    cut = ids[-32:] if plan is None else ids[-8:] if plan.truncate == "last" else ids[:32]
    says.answers[bos_tokenizer.decode(cut)] = encode(bos_tokenizer, " was kind")
    monkeypatch.setattr("expunge.attacks.search.targets.generate", says)
    data = AttackData(bos_tokenizer, prompts=[long], score=lambda texts: np.ones(len(texts)), plan=plan)
    [target], _ = reference_targets(None, data, 1, 20)
    assert target.prompt == [bos_tokenizer.bos_token_id, *cut]
