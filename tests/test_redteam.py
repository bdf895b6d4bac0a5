"""The attack stage on tiny models, with attacks made up here: what is measured, paired, kept and gone on from."""

import dataclasses
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import yaml
from tokenizers.normalizers import Lowercase

from expunge import redteam
from expunge.adapters import add_lora
from expunge.attacks import ATTACKS, Attack, AttackData, AttackResult, attack
from expunge.cli import main
from expunge.config import ATTACK_BUDGETS, EvaluationConfig, RunConfig, build
from expunge.errors import ExpungeError
from expunge.generation import Decoding, generate
from expunge.metrics.evaluation import evaluate_model
from expunge.metrics.figures import Evaluation
from expunge.models import identity_of, load_model, sharing_copy, weights_digest
from expunge.plan import Plan
from expunge.redteam import cases
from expunge.rows import read_rows

PAIRS = [
    {"prompt": f"The {thing}", "chosen": f" is {good} today.", "rejected": f" is {bad} and cold."}
    for thing, good, bad in [("river", "calm", "wild"), ("house", "warm", "empty"), ("tree", "green", "bare")] * 4
]
HELD = [{**pair, "prompt": pair["prompt"].replace("The", "Our")} for pair in PAIRS[:3]]
RAN: list[tuple[str, int, float]] = []


@pytest.fixture
def home(tmp_path, monkeypatch, tiny_model, tokenizer):
    """Two models and the files of a configuration; attacks `scale`, which scales a weight, and `ask`, a prefix."""
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for seed, name in ((0, "before"), (1, "after")):
        tiny_model(seed=seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    for name, records in {
        "pairs": PAIRS,
        "held": HELD,
        "prompts": [{"prompt": "A river"}, {"prompt": "A house"}],
    }.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "search.jsonl").write_text('{"prompt": "The tree"}\n')
    (tmp_path / "validation.jsonl").write_text(json.dumps(PAIRS[0]) + "\n")
    for name, copy in (("prompts", "copy"), ("held", "heldcopy")):
        (tmp_path / f"{copy}.jsonl").write_text((tmp_path / f"{name}.jsonl").read_text())
    (tmp_path / "neutral.txt").write_text("A cold wind came over the hill before the rain. " * 20)
    for name in ("corpus", "corpuscopy"):
        (tmp_path / f"{name}.txt").write_text("The river runs past the old mill and on to the sea. " * 20)

    @attack("scale")
    class Scale(Attack):
        """Scales a weight."""

        needs: ClassVar[tuple[str, ...]] = ("forget",)
        budgets: ClassVar = {"small": {"seed": [0, 1], "by": [1.0, 2.0]}}
        by: float = 1.0

        def run(self, unlearned, reference, data, budget):
            RAN.append((weights_digest(unlearned)[:8], self.seed, self.by))
            if self.by == 13:
                raise ExpungeError("no luck")
            name = "transformer.h.1.mlp.c_proj.weight"
            made = sharing_copy(unlearned, [name])
            with torch.no_grad():
                made.get_parameter(name).mul_(self.by + self.seed)
            return AttackResult(made)

    @attack("ask")
    class Ask(Attack):
        """A prefix."""

        needs: ClassVar[tuple[str, ...]] = ("reference", "prompts")
        word: str = "cold"

        def run(self, unlearned, reference, data, budget):
            return AttackResult(unlearned, plan={"prefix": tuple(data.tokenizer(self.word)["input_ids"])})

    RAN.clear()
    yield tmp_path
    for name in ("scale", "ask"):
        del ATTACKS._entries[name]


def config(**more) -> RunConfig:
    data = {
        "train": "pairs.jsonl",
        "heldout": "held.jsonl",
        "prompts": ["prompts.jsonl"],
        "neutral": None,
        "corpus": "corpus.txt",
    }
    team = {"attacks": ["scale"], "validation": "validation.jsonl", "search": "search.jsonl", "neutral": "neutral.txt"}
    evaluation = {"samples": 2, "max_new_tokens": 4}
    tree = {
        "model": "before",
        "method": {"name": "repo"},
        "data": data,
        "evaluation": evaluation,
        "redteam": {**team, **more},
    }
    return build(RunConfig, tree, "")


def attacked(home, reference="before", **more):
    made = config(**more.pop("team", {}))
    return redteam.red_team(Plan.of_models(replace(made, **more), home / "out", "after", reference, quiet=True))


def test_every_attack_runs_on_both_subjects_and_is_measured_like_a_run(home):
    rows = attacked(home)
    assert len(RAN) == 8 and len({digest for digest, *_ in RAN}) == 2  # 2 draws x 2 settings x 2 subjects
    cases = read_rows(home / "out" / "attacks.jsonl")
    kinds = {(row.dataset, row.decode) for row in cases if row.metric == "toxicity"}
    assert kinds == {(name, decode) for name in ("prompts.jsonl", "heldout") for decode in ("greedy", "sampled")}
    assert {row.scorer for row in cases if row.metric == "toxicity"} == {"ngram", "wordvec"}
    assert {"distinct_2", "loop_share", "perplexity"} <= {row.metric for row in cases}
    assert {(row.attack, row.over) for row in rows if row.metric == "toxicity"} >= {
        ("none", "mean"),
        ("scale", "mean"),
        ("all", "worst"),
    }
    assert all(row.stage == "attack" for row in rows) and (home / "out" / "attacks.md").is_file()


def test_an_attack_that_does_nothing_gives_the_figures_of_none(home):
    """The negative control: scaling by one is no change, on either subject."""
    attacked(home, attack={"scale": {"by": 1.0, "seed": 0}})
    rows = [row for row in read_rows(home / "out" / "attacks.jsonl") if not row.paired]
    figures = {
        name: [(r.subject, r.metric, r.dataset, r.decode, r.scorer, r.value) for r in rows if r.attack == name]
        for name in ("none", "scale")
    }
    assert figures["none"] == figures["scale"] and len(figures["none"]) > 20


def test_a_ratio_is_to_the_reference_under_the_same_attack(home):
    attacked(home, attack={"scale": {"by": 2.0, "seed": 0}})
    rows = [r for r in read_rows(home / "out" / "attacks.jsonl") if r.attack == "scale" and r.dataset == "corpus.txt"]
    exact = {(r.subject, r.metric): r.value for r in rows if r.mode == "exact"}
    before, after = exact["reference", "perplexity"], exact["unlearned", "perplexity"]
    assert exact["unlearned", "perplexity_ratio"] == pytest.approx(after / before)


def test_a_prefix_of_tokens_is_put_before_every_prompt(home, tokenizer):
    attacked(home, team={"attacks": ["ask"]})
    [place] = (home / "out" / "attacks").glob("unlearned-ask-*")
    samples = [s for s in Evaluation.load(place).samples if s["dataset"] == "prompts.jsonl" and s["decode"] == "greedy"]
    assert len(samples) == 2
    model, _ = load_model("after", dtype="float32")
    for sample in samples:
        prompt = tokenizer("cold")["input_ids"] + tokenizer(sample["prompt"])["input_ids"]
        [[new]] = generate(model, tokenizer, [prompt], Decoding(4))
        assert sample["continuation"] == tokenizer.decode(new)


@pytest.mark.parametrize("name, place", [("gcg", "suffix"), ("enhanced_gcg", "prefix")])
def test_what_a_search_found_is_what_is_measured(home, tokenizer, name, place):
    (home / "search.jsonl").write_text('{"prompt": "The tree"}\n{"prompt": "The old mill"}\n')
    settings = {"length": 3, "steps": 2, "optimised": 1, "target_tokens": 3}
    settings |= {"width": 4} if name == "gcg" else {"final_length": 3, "max_length": 5, "proposals": 2, "judged": 0}
    attacked(home, team={"attacks": [name]}, attack={name: settings})
    [case] = (home / "out" / "attacks").glob(f"unlearned-{name}-*")
    found = json.loads((case / "case.json").read_text())
    ids = tokenizer(found["about"]["string"])["input_ids"]
    assert len(ids) == found["about"].get("length", 3) and found["steps"] == 2
    samples = [s for s in Evaluation.load(case).samples if s["dataset"] == "prompts.jsonl" and s["decode"] == "greedy"]
    model, _ = load_model("after", dtype="float32")
    for sample in samples:
        prompt = tokenizer(sample["prompt"])["input_ids"]
        [[new]] = generate(model, tokenizer, [ids + prompt if place == "prefix" else prompt + ids], Decoding(4))
        assert sample["continuation"] == tokenizer.decode(new)
    assert len(samples) == 2


def test_the_same_call_does_nothing_twice_and_a_reference_is_attacked_once_for_all_runs(home):
    rows = attacked(home)
    ran = len(RAN)
    assert attacked(home) == rows and len(RAN) == ran
    redteam.red_team(Plan.of_models(config(), home / "other", "after", "before", quiet=True))
    assert len(RAN) == ran + 4  # the unlearned one alone


@pytest.fixture
def unmeasured(monkeypatch):
    """Nothing is measured of an attacked model."""
    monkeypatch.setattr("expunge.redteam.cases.evaluate_model", lambda *_, **__: Evaluation())


def test_a_case_is_shared_by_runs_that_differ_in_what_it_does_not_see(home, unmeasured):
    """Another seed draws other pairs: of the reference, `ask` and none are not run again, which see none of them."""

    def places():
        return {name: set((home / "cache/attacks").glob(f"reference-{name}-*")) for name in ("none", "ask", "scale")}

    team, once = {"attacks": ["ask", "scale"]}, {"scale": {"by": 2.0, "seed": 0}}
    data = replace(config().data, limit=4)
    attacked(home, team=team, attack=once, data=data)
    first = places()
    attacked(home, team=team, attack=once, data=data, seed=1)
    second = places()
    assert [len(found) for found in first.values()] == [1, 1, 1]
    assert (second["none"], second["ask"]) == (first["none"], first["ask"]) and len(second["scale"]) == 2


def test_a_case_is_not_shared_where_something_that_it_sees_differs(home, unmeasured):
    (home / "other.jsonl").write_text('{"prompt": "The mill"}\n')

    def fresh(**changed):
        """Which cases of the reference these changes make new."""
        before = set((home / "cache/attacks").glob("*"))
        attacked(home, **{**changed, "team": {"attacks": ["ask"], **changed.get("team", {})}})
        return {path.name.split("-")[1] for path in set((home / "cache/attacks").glob("*")) - before}

    assert fresh() == {"none", "ask"}
    assert fresh(team={"validation": None}) == set()
    assert fresh(team={"search": "other.jsonl"}) == {"ask"}
    assert fresh(team={"steps": 9}) == {"ask"}
    assert fresh(attack={"ask": {"word": "warm"}}) == {"ask"}
    assert fresh(training={"max_continuation_tokens": 3}) == {"ask"}
    assert fresh(evaluation=replace(config().evaluation, samples=1)) == {"none", "ask"}
    assert fresh(data=replace(config().data, prompts=["validation.jsonl"]), team={"validation": None}) == {"none", "ask"}
    _, other = load_model("after")
    other.backend_tokenizer.normalizer = Lowercase()
    other.save_pretrained("after")
    assert fresh() == {"none", "ask"}


def test_what_an_attack_left_as_it_was_is_not_measured_again(home, monkeypatch):
    measured = []
    actual = evaluate_model
    monkeypatch.setattr(
        "expunge.redteam.cases.evaluate_model", lambda *args, **more: measured.append(1) or actual(*args, **more)
    )
    attacked(
        home,
        team={"attacks": ["relearn_forget"]},
        attack={"relearn_forget": {"epochs": 0, "learning_rate": 1e-3, "samples": 2, "seed": 0}},
    )
    assert len(measured) == 2  # none, on both
    rows = [row for row in read_rows(home / "out" / "attacks.jsonl") if row.metric == "toxicity"]
    values = {name: [row.value for row in rows if row.attack == name] for name in ("none", "relearn_forget")}
    assert values["none"] == values["relearn_forget"] and len(values["none"]) > 4


def test_a_case_of_which_a_sweep_left_the_record_alone_is_run_again(home):
    only = {"scale": {"by": 2.0, "seed": 0}}
    rows = attacked(home, attack=only)
    [case] = (home / "out/attacks").glob("unlearned-scale-*")
    for path in case.iterdir():
        if path.name != "case.json":
            path.unlink()
    ran = len(RAN)
    assert attacked(home, attack=only) == rows and len(RAN) == ran + 1


def test_it_goes_on_after_a_stop(home, monkeypatch):
    keep = cases._keep
    calls = []

    def stopped(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        keep(*args)

    monkeypatch.setattr(cases, "_keep", stopped)
    with pytest.raises(KeyboardInterrupt):
        attacked(home)
    monkeypatch.setattr(cases, "_keep", keep)
    RAN.clear()
    attacked(home)
    assert len(RAN) == 8 - 1  # two of none and one of scale were whole


def test_an_attack_that_fails_is_said_and_the_others_are_written(home):
    with pytest.raises(ExpungeError, match=r"2 attacks failed, first scale \(by=13\.0, draw 0\) on reference: no luck"):
        attacked(home, attack={"scale": {"by": [2.0, 13.0], "seed": 0}})
    rows = read_rows(home / "out" / "attacks.jsonl")
    assert {row.attack_config.get("by") for row in rows if row.attack == "scale"} == {2.0}
    assert {row.attack for row in read_rows(home / "out" / "results.jsonl")} == {"none", "scale", "all"}


def test_an_attack_that_finds_no_memory_fails_alone(home, monkeypatch):
    def greedy(self, *given):
        torch.empty(2**55)

    monkeypatch.setattr(ATTACKS.get("ask"), "run", greedy)
    with pytest.raises(ExpungeError, match=r"2 attacks failed, first ask .* on reference: .*can't allocate memory"):
        attacked(home, team={"attacks": ["ask", "scale"]})
    assert {row.attack for row in read_rows(home / "out" / "attacks.jsonl")} == {"none", "scale"}


def test_what_cannot_be_measured_fails_alone(home):
    """A prefix as long as the context is found out after the attack."""
    with pytest.raises(ExpungeError, match=r"2 attacks failed, first ask .* on reference: a prompt of .* context of 64"):
        attacked(home, team={"attacks": ["ask", "scale"]}, attack={"ask": {"word": "cold " * 70}})
    assert {row.attack for row in read_rows(home / "out" / "attacks.jsonl")} == {"none", "scale"} and len(RAN) == 8


@pytest.mark.parametrize("name", ["gcg", "enhanced_gcg", "soft_prompt"])
def test_what_leaves_no_room_for_a_found_string_is_refused_before_the_search(home, name):
    team, settings = {"attacks": ["scale", name]}, {name: {"length": 62}}
    if name == "enhanced_gcg":
        settings[name] |= {"final_length": 64}
    with pytest.raises(ExpungeError, match=r"^a prompt of 6\d tokens and .* exceed the model's context of 64"):
        attacked(home, team=team, attack=settings)
    assert not RAN and not (home / "out" / "attacks.jsonl").exists()


def test_two_sets_instead_of_pairs_are_what_attacks_take(home, monkeypatch):
    had = []
    monkeypatch.setattr("expunge.redteam.data.AttackData", lambda *parts: had.append(actual(*parts)) or had[-1])
    actual = AttackData
    for name, text in (("forget", "The house is cold."), ("retain", "The house is warm.")):
        (home / f"{name}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    attacked(home, data=replace(config().data, train="builtin", forget="forget.jsonl", retain="retain.jsonl"))
    assert [[row.completion for row in part] for part in (had[0].forget, had[0].retain)] == [
        ["The house is cold."],
        ["The house is warm."],
    ]


def test_an_adapter_is_merged_before_it_is_attacked(tiny_model):
    """Rounding an adapter and what lies beneath it, each for itself, would leave the unlearning as fine as it was."""
    model = add_lora(tiny_model(dtype=torch.bfloat16), r=2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.1)
    ids = torch.tensor([[5, 17, 250]])
    wanted = model.float()(ids).logits
    whole = redteam.merged(model)
    assert not hasattr(whole, "disable_adapter") and whole.dtype == torch.float32
    torch.testing.assert_close(whole(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    assert redteam.merged(whole) is whole


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"team": {"attacks": ["scael"]}}, "unknown attack 'scael'.*did you mean 'scale'"),
        ({"attack": {"scale": {"bye": 1}}}, r"attack\.scale\.bye"),
        ({"team": {"attacks": ["ask"]}, "reference": None}, "give --reference"),
        ({"team": {"search": "prompts.jsonl"}}, r"redteam\.search=prompts\.jsonl: it is reported too"),
        ({"team": {"search": "./prompts.jsonl"}}, r"redteam\.search=\./prompts\.jsonl: it is reported too"),
        ({"team": {"neutral": "corpus.txt"}}, r"redteam\.neutral=corpus\.txt: it is reported too"),
        ({"team": {"neutral": "corpuscopy.txt"}}, r"redteam\.neutral=corpuscopy\.txt: it is reported too, all of it"),
        ({"team": {"validation": "held.jsonl"}}, r"redteam\.validation=held\.jsonl: it is reported too"),
        ({"team": {"search": "copy.jsonl"}}, r"redteam\.search=copy\.jsonl: it is reported too, all of it"),
        ({"team": {"validation": "heldcopy.jsonl"}}, r"redteam\.validation=heldcopy\.jsonl: it is reported too, all of it"),
        (
            {"data": replace(config().data, train="held.jsonl")},
            r"the forget set, held\.jsonl,: it is reported too, all of it",
        ),
        ({"team": {"attacks": ["scale", "orthogonalize"]}, "attack": {"orthogonalize": {"layers": [9]}}}, "9"),
        ({"team": {"attacks": ["scale", "enhanced_gcg"]}, "attack": {"enhanced_gcg": {"layers": [9]}}}, "9"),
        (
            {"team": {"attacks": ["scale", "relearn_forget"]}, "attack": {"relearn_forget": {"samples": 13}}},
            r"samples=13: the forget set has 12 texts",
        ),
        *(
            ({"team": {"attacks": ["scale", name]}}, "8 prompts were asked for and 1 given")
            for name in ("gcg", "enhanced_gcg", "soft_prompt")
        ),
        ({"team": {"steps": 0}}, r"budget\.steps=0"),
        ({"team": {"attacks": ["ask"], "search": None}}, r"redteam\.search"),
    ],
)
def test_what_cannot_be_is_one_line_before_any_attack(home, more, message):
    with pytest.raises(ExpungeError, match=message):
        attacked(home, **more)
    assert not RAN


def test_what_is_measured_too_is_left_out_of_what_an_attacker_has(home, tokenizer, caplog):
    (home / "search.jsonl").write_text('{"prompt": "The tree"}\n{"prompt": "A river "}\n')
    extra = {"prompt": "The mill", "chosen": " is old.", "rejected": " is cold."}
    (home / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in [*HELD, extra]))
    made = config()
    had = redteam.attackers_data(Plan.of_models(made, home / "out", "before"), made.redteam)
    assert [text.prompt for text in (*had.forget, *had.retain)] == ["The mill"] * 2 and had.prompts == ["The tree"]
    assert "redteam.search=search.jsonl: 1 of 2 texts are reported too, and left out" in caplog.text


def test_the_victims_files_stay_as_they_were(home):
    before = {path: path.read_bytes() for path in (home / "after").iterdir()}
    attacked(home)
    assert {path: path.read_bytes() for path in (home / "after").iterdir()} == before


def test_a_run_with_attacks_ends_its_results_with_their_summary(home, monkeypatch):
    made = replace(config(), training={"max_steps": 1, "warmup_steps": 0, "per_device_train_batch_size": 4})
    rows = redteam.run_and_attack(Plan.of(made, home / "run", quiet=True))
    assert rows == read_rows(home / "run" / "results.jsonl")
    assert {row.stage for row in rows} == {"evaluate", "attack"}
    model, _ = load_model(home / "run" / "model")
    assert weights_digest(model) != weights_digest(load_model("before")[0])
    assert "Under attack" in (home / "run" / "report.html").read_text()
    again = redteam.run_and_attack(Plan.of(made, home / "run", quiet=True))
    assert again == rows and "Under attack" in (home / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    "attacks, setting, message",
    [
        ("scale", "redteam.search=prompts.jsonl", "redteam.search=prompts.jsonl: it is reported too"),
        ("scale", "redteam.steps=0", "budget.steps=0"),
        ("orthogonalize", "attack.orthogonalize.layers=[9]", "block 9: the model has 3 blocks"),
        ("relearn_forget", "attack.relearn_forget.samples=13", "samples=13: the forget set has 12 texts"),
        ("ask", "redteam.search=null", "give redteam.search"),
        ("relearn_forget", "quantization=4bit", "attack relearn_forget: it changes weights, and these are quantized"),
        ("gcg", "attack.gcg={draft: no/such, optimised: 1}", "no/such"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["run", "plan"])
def test_a_run_that_could_not_be_attacked_is_not_begun(home, monkeypatch, capsys, attacks, setting, message, more):
    monkeypatch.setattr(
        sys, "argv", ["expunge", "run", "--model", "before", "--pairs", "pairs.jsonl", "--out", "run", *more]
    )
    sys.argv += ["data.prompts=[prompts.jsonl]", "data.heldout=held.jsonl", "data.corpus=corpus.txt", "data.neutral=null"]
    sys.argv += [f"redteam.attacks=[{attacks}]", "redteam.search=search.jsonl", "redteam.validation=validation.jsonl"]
    sys.argv += ["redteam.neutral=neutral.txt", setting]
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2 and not (home / "run").exists()
    assert message in capsys.readouterr().err


def test_attacks_under_a_launcher_are_refused_before_training(home, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ExpungeError, match=r"attacks run in one process: .* `expunge attack`"):
        redteam.run_and_attack(Plan.of(config(), home / "run", quiet=True))
    monkeypatch.setattr(sys, "argv", ["expunge", "attack", "after", "--reference", "before"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert (
        stopped.value.code == 2 and "attacks run in one process" in capsys.readouterr().err and not (home / "run").exists()
    )


def test_a_steered_run_is_attacked_like_any_other(home):
    """LEACE changes no weight; the red team's copies have its edits too."""
    method = {"name": "leace", "fit_on": "sides", "at": [0]}
    made = replace(config(), method=method, attack={"scale": {"seed": 0, "by": 2.0}})
    rows = redteam.run_and_attack(Plan.of(made, home / "run", quiet=True))
    values = {
        row.subject: row.value for row in rows if (row.attack, row.metric, row.mode) == ("scale", "perplexity", "exact")
    }
    assert values["unlearned"] != values["reference"] and len(RAN) == 2


def test_all_attacks_are_every_one_that_is_registered():
    for budget in ("small", "paper", "large"):
        tree = {"redteam": {"attacks": ["all", "gcg"], "budget": budget}}
        _, found = redteam.settings_of(build(RunConfig, tree, ""))
        assert set(found) == set(ATTACKS.names()) and all(found.values())
        assert all(isinstance(one, ATTACKS.get(name)) for name, several in found.items() for one in several)


def command(home, monkeypatch, *words, budget="small", victim="after"):
    """`expunge attack`, with the red team in a file; the exit status."""
    team = {**dataclasses.asdict(config())["redteam"], "budget": budget}
    (home / "team.yaml").write_text(json.dumps({"redteam": team}))
    words = ("attack", victim, "--reference", "before", "-c", "team.yaml", "--quiet", "--out", "cli", *words)
    words += ("data.heldout=held.jsonl", "data.prompts=[prompts.jsonl]", "data.corpus=corpus.txt", "evaluation.samples=1")
    words += ("evaluation.max_new_tokens=2", "attack.scale.seed=0", "attack.scale.by=[1.0, 2.0]")
    monkeypatch.setattr(sys, "argv", ["expunge", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code


def test_the_command_leaves_what_the_page_says(home, monkeypatch, capsys):
    assert not command(home, monkeypatch, "--pairs", "pairs.jsonl", "--json")
    printed = json.loads(capsys.readouterr().out)
    assert {line["name"] for line in printed["lines"]} == {
        *("none", "scale, mean", "scale, by=1.0", "scale, by=2.0", "scale, worst", "all, worst")
    }
    rows = read_rows(home / "cli" / "results.jsonl")
    assert {"mean", "worst"} <= {row.over for row in rows}
    kept = yaml.safe_load((home / "cli" / "config.yaml").read_text())
    assert kept["attack"] == {"scale": {"seed": 0, "by": [1.0, 2.0]}} and kept["attacked"]["reference"] == str(
        home / "before"
    )
    left = ("attacks.md", "attacks.csv", "attacks.tex", "attacks.jsonl", "attacks", "provenance.json")
    assert all((home / "cli" / name).exists() for name in left)


def test_provenance_has_what_was_attacked_and_how_long_it_took(home, monkeypatch):
    assert not command(home, monkeypatch, "--pairs", "pairs.jsonl")
    found = json.loads((home / "cli" / "provenance.json").read_text())
    stage = found["stages"]["attack"]
    before, after = (identity_of(folder).weights for folder in ("before", "after"))
    assert stage["weights_sha256"] == {"reference": before, "unlearned": after}
    assert len(stage["data_sha256"]["measured"]) == len(stage["data_sha256"]["had"]) == 64
    assert found["seconds"] == stage["seconds"] > 0 and found["peak_memory_bytes"] > 0


def test_of_a_model_that_is_no_run_no_method_is_known(home, monkeypatch):
    assert not command(home, monkeypatch, "--pairs", "pairs.jsonl")
    assert {row.method for row in read_rows(home / "cli" / "attacks.jsonl")} == {None}
    attacked(home)  # of a run it is
    found = {(row.subject, row.method) for row in read_rows(home / "out" / "attacks.jsonl")}
    assert found == {("reference", None), ("unlearned", "repo")}


@pytest.mark.parametrize(("words", "budget"), [((), "large"), (("--budget", "paper"), "paper")])
def test_a_budget_in_a_file_holds_unless_one_is_asked_for(home, monkeypatch, words, budget):
    assert not command(home, monkeypatch, "--pairs", "pairs.jsonl", *words, budget="large")
    kept = yaml.safe_load((home / "cli" / "config.yaml").read_text())
    assert kept["redteam"]["budget"] == budget and kept["evaluation"]["prompts"] is None  # "small" has 256


def test_a_budget_says_how_much_is_measured_whatever_a_run_measured(home, monkeypatch):
    shutil.copytree("after", "run/model")
    made = replace(config(), evaluation=EvaluationConfig(prompts=1, heldout=1, questions=1, perplexity_tokens=20))
    Path("run/config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(made)))
    assert not command(home, monkeypatch, "--budget", "paper", victim="run")
    kept = yaml.safe_load((home / "cli" / "config.yaml").read_text())["evaluation"]
    assert {kept[name] for name in ("prompts", "heldout", "questions", "perplexity_tokens")} == {None}
    assert kept["truncate"] == "lee2024"  # as the papers' code; the samples are this test's


def test_the_papers_budget_decodes_greedily_as_lees_code_does():
    made = build(EvaluationConfig, ATTACK_BUDGETS["paper"]["evaluation"], "")
    assert (made.samples, made.max_new_tokens, made.prompt_tokens, made.truncate) == (0, 20, 32, "lee2024")


def test_what_was_to_be_forgotten_has_to_be_said(home, monkeypatch, capsys):
    """The built-in pairs would make a weak attack on a model that was to forget something else."""
    assert command(home, monkeypatch) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert "attack scale: the forget set is empty" in said[-1] and "--pairs" in said[-1] and not RAN
    assert command(home, monkeypatch, "--forget", "search.jsonl") == 2
    assert "data.forget without data.retain" in capsys.readouterr().err
