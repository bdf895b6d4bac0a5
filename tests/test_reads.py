"""What one run reads, and how often: each input once, however many stages use it, and no model more often than they need."""

import functools
import importlib
import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from expunge import data, models, scorers
from expunge.cli import main
from expunge.data import multiple_choice
from expunge.rows import read_rows

READERS = (
    data.load_corpus,
    data.load_probe_data,
    data.load_pairs,
    data.load_prompts,
    data.load_unpaired,
    multiple_choice.load_questions,
    models.load_model,
    models.load_outline,
    scorers.load_scorer,
)
LINES = {
    "pairs": [
        {"prompt": f"The {thing}", "chosen": f" is {good} today.", "rejected": f" is {bad} and cold."}
        for thing, good, bad in [("river", "calm", "wild"), ("house", "warm", "empty"), ("tree", "green", "bare")] * 4
    ],
    "held": [{"prompt": "Our river", "chosen": " is calm today.", "rejected": " is wild and cold."}],
    "validation": [{"prompt": "Her river", "chosen": " is calm today.", "rejected": " is wild and cold."}],
    "prompts": [{"prompt": "A river"}, {"prompt": "A house"}],
    "neutral": [{"prompt": "A cold wind", "gold": " came over the hill."}],
    "search": [{"prompt": "The tree"}],
    "watched": [{"prompt": "The mill"}],
    "probe": [{"text": f"{word} {n}", "label": label} for n in range(9) for label, word in enumerate(("kind", "cold"))],
    "questions": [{"prompt": "A river runs", "choices": [" to the sea", " up the hill"], "answer": 0}],
}
TEXTS = {
    "corpus": "The river runs past the old mill and on to the sea. ",
    "anchor": "She carried the kind letter home and read it by the window. ",
    "benign": "A cold wind came over the hill before the rain. ",
}
DATA = {
    "data.prompts": "[prompts.jsonl]",
    "data.heldout": "held.jsonl",
    "data.neutral": "neutral.jsonl",
    "data.corpus": "corpus.txt",
    "data.questions": "[questions.jsonl]",
    "evaluation.samples": "1",
    "evaluation.max_new_tokens": "2",
    "redteam.attacks": "[prefill, relearn_benign]",
    "redteam.search": "search.jsonl",
    "redteam.validation": "validation.jsonl",
    "redteam.neutral": "benign.txt",
    "attack.relearn_benign": "{epochs: 0, samples: 2, learning_rate: 1e-3, seed: 0}",
    "attack.prefill.k": "2",
    "monitor.corpus": "benign.txt",
    "training.max_prompt_tokens": "8",
    "training.max_continuation_tokens": "8",
}
TRAINED = {
    "method.name": "repo",
    "training.anchor_text": "anchor.txt",
    "training.anchor_tokens": "8",
    "training.max_steps": "1",
    "training.per_device_train_batch_size": "2",
    "training.warmup_steps": "0",
    "training.eval_strategy": "steps",
    "training.eval_steps": "1",
    "monitor.prompts": "watched.jsonl",
}
FITTED = {"method.name": "tvi", "method.alpha": "1", "data.probe": "probe.jsonl"}


@pytest.fixture
def reads(tmp_path, monkeypatch, tiny_model, tokenizer) -> Counter:
    """A folder with a model and all that a run reads; how often each reader was called from another file, by name."""
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("model")
    tokenizer.save_pretrained("model")
    for name, rows in LINES.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TEXTS.items():
        Path(f"{name}.txt").write_text(text * 30)
    importlib.import_module("expunge.doctor")  # whatever a run imports is there before its names are replaced
    importlib.import_module("expunge.redteam")
    found: Counter = Counter()

    def counted(read):
        @functools.wraps(read)
        def spy(*args, **options):
            found[(read.__name__, str(args[0]))] += 1
            return read(*args, **options)

        return spy

    for read in READERS:
        spy = counted(read)
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] == "expunge" and name != read.__module__:
                for bound in [key for key, value in vars(module).items() if value is read]:
                    monkeypatch.setattr(module, bound, spy)
    return found


def run(monkeypatch, settings: dict[str, str], *words: str) -> None:
    told = [f"{key}={value}" for key, value in {**DATA, **settings}.items()]
    monkeypatch.setattr(
        sys, "argv", ["expunge", "run", "--model", "model", "--pairs", "pairs.jsonl", "--out", "out", *words, *told]
    )
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code


@pytest.mark.parametrize("method", [TRAINED, FITTED], ids=lambda settings: settings["method.name"])
def test_a_run_reads_each_input_once_and_loads_each_model_for_the_stages_that_change_it(reads, monkeypatch, method):
    run(monkeypatch, method, "--quiet")
    assert {row.stage for row in read_rows(Path("out/results.jsonl"))} == {"evaluate", "attack"}
    texts = ["benign.txt", "corpus.txt", *(["anchor.txt"] if method is TRAINED else [])]
    wanted = Counter(
        {
            **{("load_pairs", f"{name}.jsonl"): 1 for name in ("pairs", "held", "validation")},
            **{("load_corpus", name): 1 for name in texts},
            **{("load_prompts", f"{name}.jsonl"): 1 for name in ("prompts", "neutral", "search")},
            **{("load_scorer", name): 1 for name in ("ngram", "wordvec")},
            ("load_questions", "questions.jsonl"): 1,
            ("load_outline", "model"): 1,
        }
    )
    wanted |= {("load_model", "model"): 2, ("load_model", "out/model"): 1}  # training changes the first in place
    wanted[("load_prompts", "watched.jsonl")] = int(method is TRAINED)
    wanted[("load_probe_data", "probe.jsonl")] = int(method is FITTED)
    assert reads == +wanted
    reads.clear()
    run(monkeypatch, method, "--quiet")  # all is there: the data is read to see that, and no weight is
    loaded = {("load_model", "model"), ("load_model", "out/model")}
    assert reads == Counter(
        {("load_outline", "out/model"): 1, **{read: n for read, n in wanted.items() if read not in loaded}}
    )
