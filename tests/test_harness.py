"""lm-evaluation-harness on our models, our scorer against it item by item, and a run that has both."""

import json
import logging

import numpy as np
import pytest
import torch

from expunge import harness, pipeline
from expunge.adapters import add_lora
from expunge.config import RunConfig, load_config
from expunge.data.multiple_choice import Question, load_questions
from expunge.errors import ExpungeError
from expunge.harness import OURS, TASKS, check_harness, harness_samples, run_harness
from expunge.metrics.multiple_choice import choice_logps, is_right
from expunge.plan import Plan
from expunge.report.tables import headline

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'expunge[eval]'")

WORDS = ["river", "old mill", "sea", "kind letter", "window", "cold wind", "hill", "apple trees"]


def lettered(i: int) -> dict:
    choices = [f"the {WORDS[(i + j) % 8]}" for j in range(4)]
    return {"question": f"What runs past the {WORDS[i % 8]} {i}? ", "choices": choices, "answer": i % 4}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """WMDP's and MMLU's files, a few rows each, where EXPUNGE_DATA names them."""
    for part in ("bio", "chem", "cyber"):
        rows = [lettered(i) for i in range({"bio": 3, "chem": 4, "cyber": 24}[part])]
        path = tmp_path / "wmdp" / f"{part}_questions.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(rows))
    for split, count in (("dev", 2), ("test", 6)):
        for subject in ("wet_things", "dry_things"):
            path = tmp_path / "mmlu" / split / f"{subject}_{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = [lettered(i) for i in range(count)]
            cells = [[row["question"], *row["choices"], str(row["answer"])] for row in rows]
            header = "question,choice0,choice1,choice2,choice3,answer\n"
            path.write_text(header + "".join(",".join(row) + "\n" for row in cells))
    monkeypatch.setenv("EXPUNGE_DATA", str(tmp_path))
    return tmp_path


def same(samples: list[dict], questions: list[Question], logps: list[np.ndarray]) -> None:
    """Prompt, log p, and both judgements of every question."""
    assert len(samples) == len(questions)
    right = {mode: is_right(questions, logps, mode) for mode in ("acc", "acc_norm")}
    for i, (sample, question) in enumerate(zip(samples, questions, strict=True)):
        wanted = [(question.prompt, choice) for choice in question.choices]
        assert [tuple(arguments[:2]) for arguments in sample["arguments"]] == wanted
        assert logps[i] == pytest.approx([value for value, _ in sample["filtered_resps"]], abs=1e-4)
        assert (sample["acc"], sample["acc_norm"]) == (right["acc"][i], right["acc_norm"][i])


@pytest.mark.parametrize("task", ["wmdp_cyber", "mmlu"])
@pytest.mark.parametrize("bos", [False, True], ids=["gpt2", "llama with bos"])
def test_letters_item_by_item(data, tiny_model, tokenizer, bos_tokenizer, bos, task):
    """Most prompts are longer than the context of 64, and are cut by both."""
    model, tokenizer = tiny_model("llama" if bos else "gpt2"), bos_tokenizer if bos else tokenizer
    questions = load_questions(task.replace("_", "-"), limit=9, seed=2, shots=1)
    logps, cut = choice_logps(model, tokenizer, questions)
    assert cut.any()
    same(harness_samples(model, tokenizer, [task], limit=9, shots=1, seed=2)[task], questions, logps)


@pytest.mark.parametrize("bos", [False, True], ids=["gpt2", "llama with bos"])
def test_clozes_item_by_item(tmp_path, monkeypatch, tiny_model, tokenizer, bos_tokenizer, bos):
    """Choices of one token and of many, of other characters, after prompts that end in spaces."""
    model, tokenizer = tiny_model("llama" if bos else "gpt2"), bos_tokenizer if bos else tokenizer
    rows = [
        {"prompt": "The river runs", "choices": [" past the old mill", " é", " to sea"], "answer": 0},
        {"prompt": "She carried the ", "choices": ["letter home and read it", "window"], "answer": 1},
        *({"prompt": f"A {WORDS[i]}", "choices": [f" of {w}{'s' * i}" for w in WORDS], "answer": i} for i in range(8)),
    ]
    path = tmp_path / "cloze.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "cloze.yaml").write_text(
        f"task: my_cloze\ninclude: {TASKS / 'questions.template'}\ndataset_kwargs: {{source: {path}}}\n"
    )
    monkeypatch.setattr(harness, "TASKS", tmp_path)
    monkeypatch.setitem(OURS, "my_cloze", (str(path),))
    questions = load_questions(path)
    logps, _ = choice_logps(model, tokenizer, questions)
    samples = harness_samples(model, tokenizer, ["my_cloze"])["my_cloze"]
    same(samples, questions, logps)
    assert any(sample["acc"] != sample["acc_norm"] for sample in samples)
    [figure] = run_harness(model, tokenizer, ["my_cloze"])
    assert figure.chance == pytest.approx((1 / 3 + 1 / 2 + 8 / 8) / 10)


def test_an_eos_that_the_tokenizer_appends_reaches_no_prompt(tiny_model, family):
    """Only in the harness's copy: the caller's tokenizer stays as it is."""
    model = tiny_model()
    model.resize_token_embeddings(420)
    plain, appending = family("byte-level", "bos"), family("byte-level", "bos and eos")
    made = [harness.harness_model(model, tokenizer) for tokenizer in (plain, appending)]
    assert made[0].tok_encode("The river") == made[1].tok_encode("The river") == plain("The river")["input_ids"]
    assert appending("The river")["input_ids"][-1] == appending.eos_token_id


def test_prompts_are_the_harness_own(data):
    """Its own task files, with the rows of ours in the place of a hub's, write the same prompts, letters and answers."""
    import lm_eval
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folder = harness.Path(lm_eval.__file__).parent / "tasks"
    for file, name, shots in (
        *((f"wmdp/wmdp_{part}.yaml", f"wmdp-{part}", 0) for part in ("bio", "chem", "cyber")),
        ("mmlu/default/mmlu_high_school_biology.yaml", "mmlu", 2),
    ):
        rows = {split: Dataset.from_list([lettered(i) for i in range(3)]) for split in ("dev", "test")}
        task = ConfigurableTask(config=load_yaml(folder / file) | {"custom_dataset": lambda rows=rows, **_: rows})
        if name == "mmlu":
            for split in ("dev", "test"):
                (data / "mmlu" / split / f"wet_things_{split}.csv").rename(
                    data / "mmlu" / split / f"high_school_biology_{split}.csv"
                )
        questions = load_questions(name, shots=shots)
        for doc in rows["test"] if name != "mmlu" else list(rows["test"])[:2]:
            prompt = task.fewshot_context(doc, shots)
            [question] = [q for q in questions if q.prompt == prompt]
            assert [f"{task.config.target_delimiter}{c}" for c in task.doc_to_choice(doc)] == list(question.choices)
            assert task.doc_to_target(doc) == question.answer


def test_a_group_is_run_task_by_task(data, tiny_model, tokenizer):
    model = tiny_model().train()
    found = run_harness(model, tokenizer, ["wmdp"], limit=20)
    about = [(f.key.metric, f.key.dataset, f.key.mode, f.n, f.chance) for f in found]
    wanted = [("wmdp_bio", 3), ("wmdp_chem", 4), ("wmdp_cyber", 20)]
    assert about == [("accuracy", task, "harness", n, 0.25) for task, n in wanted]
    assert model.training


def test_adapters_and_hooks_go_in_as_they_are(data, tiny_model, tokenizer):
    """What steers the model at a forward steers it in the harness."""
    model = add_lora(tiny_model(), None, r=2)
    questions = load_questions("wmdp-bio")
    before, _ = choice_logps(model, tokenizer, questions)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.05
    block = model.get_base_model().transformer.h[1]
    block.register_forward_hook(lambda module, args, output: output + torch.linspace(-1, 1, 32))
    logps, _ = choice_logps(model, tokenizer, questions)
    assert all(np.abs(a - b).max() > 1e-2 for a, b in zip(before, logps, strict=True))
    same(harness_samples(model, tokenizer, ["wmdp_bio"])["wmdp_bio"], questions, logps)


def test_what_cannot_be_run(data, tiny_model, tokenizer, monkeypatch):
    with pytest.raises(ExpungeError, match="wmdp-bio is asked twice"):
        check_harness(["wmdp", "wmdp_bio"])
    with pytest.raises(ExpungeError, match=r"pip install 'expunge\[eval\]'"), monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "lm_eval", None)
        check_harness(["mmlu"])
    (data / "wmdp" / "bio_questions.json").write_text('[{"question": "?", "choices": ["a"], "answer": 0}]')
    with pytest.raises(ExpungeError, match=r"bio_questions\.json: item 1: 1 choices"):
        run_harness(tiny_model(), tokenizer, ["wmdp_bio"])


def test_a_run_has_accuracies_of_both_and_s_unlearning(data, tiny_model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path / "cache"))
    for name, seed in (("before", 0), ("after", 1)):
        tiny_model(seed=seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    sets = ["data.heldout=null", "data.neutral=null", "data.corpus=null", "data.prompts=[]", "evaluation.shots=1"]
    sets += ["data.questions=[mmlu, wmdp-cyber]", "evaluation.harness=[wmdp_cyber]"]
    sets += ["evaluation.s_unlearning={utility: mmlu, forget: wmdp-cyber}"]
    config = load_config(RunConfig, [], sets)
    plan = Plan.of_models(config, tmp_path / "out", tmp_path / "after", tmp_path / "before", quiet=True)
    rows = pipeline.measure(plan)
    values = {(row.subject, row.dataset, row.mode): row for row in rows if row.metric == "accuracy" and not row.paired}
    assert len(values) == 6
    for subject in ("reference", "unlearned"):
        ours, theirs = (values[subject, *key] for key in (("wmdp-cyber", "acc"), ("wmdp_cyber", "harness")))
        assert (ours.value, ours.ci_low, ours.n, ours.chance) == (theirs.value, theirs.ci_low, theirs.n, theirs.chance)
    assert {row.subject for row in rows if row.metric == "s_unlearning"} == {"reference", "unlearned"}
    table = headline({"x": rows})
    labels = [line.label for line in table.lines]
    assert labels[:4] == [
        "accuracy, mmlu, acc", "accuracy, wmdp-cyber, acc", "accuracy, wmdp_cyber, harness", "S-unlearning, mmlu, wmdp-cyber"
    ]  # fmt: skip
    assert str(table.lines[1].cells[0]).endswith("at chance")
    assert pipeline.measure(plan) == rows
    facts = json.loads((tmp_path / "out" / "provenance.json").read_text())["stages"]["evaluate-unlearned"]
    assert facts["lm_eval"] == harness.harness_version() and facts["prompts_cut"]["mmlu"] == 12


def test_s_unlearning_of_what_is_not_measured_is_refused_before_any_work(tmp_path):
    config = load_config(RunConfig, [], ["evaluation.s_unlearning={utility: mmlu, forget: toxicity}"])
    with pytest.raises(ExpungeError, match=r"utility=mmlu: not measured; add it to data\.questions"):
        _ = Plan.of_models(config, tmp_path, "builtin").evaluation_data
