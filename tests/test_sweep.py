"""A sweep: every cell once, in a folder of its own; trials apart from what is reported; failures, stops and bad recipes.

Most tests give `run_sweep` a runner that writes results by a formula: stronger settings erase more and cost perplexity.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from expunge.cli import main
from expunge.config import RunConfig
from expunge.errors import ExpungeError, Interrupted
from expunge.plan import Plan
from expunge.rows import Row, write_rows
from expunge.sweep import Outcome, Sweep, run_sweep

RECIPE = """
base: {data: {train: pairs.jsonl, heldout: null, neutral: null, corpus: report.txt, prompts: [report.jsonl]}}
budgets:
  small: {training: {max_steps: 1}}
  large: {training: {max_steps: 2}}
grid:
  method:
    repo: {method: {name: repo}, tune: {method.weight: [0.5, 1, 2]}}
    dpo: {method: {name: dpo}, tune: {method.beta: [0.3, 0.2, 0.1]}}
  seed: [0, 1]
tune:
  base: {data: {prompts: [tuning.jsonl], corpus: tuning.txt}}
  keep: {metric: perplexity_ratio, at_most: 1.015}
  by: {metric: toxicity, decode: sampled}
columns:
  toxicity: {metric: toxicity, decode: sampled}
  perplexity ratio: {metric: perplexity_ratio}
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    """The recipe and the files that it names, in the folder where all is done."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path / "cache"))
    Path("recipe.yaml").write_text(RECIPE)
    for name in ("pairs.jsonl", "report.jsonl", "tuning.jsonl", "report.txt", "tuning.txt"):
        Path(name).write_text(name)
    return tmp_path


def change(**changes: Any) -> None:
    """Top-level keys of the recipe, by dotted path with `__` for the dot."""
    tree = yaml.safe_load(Path("recipe.yaml").read_text())
    for path, value in changes.items():
        *outer, last = path.split("__")
        inside = tree
        for key in outer:
            inside = inside[key]
        inside[last] = value
    Path("recipe.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))


class Stub:
    """Writes the results of a run: a strength s has toxicity .5 - .1 s + .01 seed, and 1 + .01 s times the perplexity."""

    def __init__(self, fail=lambda config: None):
        self.fail, self.configs, self.folders = fail, [], []

    def __call__(self, plan: Plan) -> None:
        config, folder = plan.config, plan.folder
        self.configs.append(config)
        self.folders.append(folder)
        self.fail(config)
        strength = config.method.get("weight") or 0.1 / config.method["beta"]
        toxicity, [dataset] = 0.5 - 0.1 * strength + 0.01 * config.seed, config.data.prompts
        about: dict[str, Any] = {"dataset": dataset, "decode": "sampled", "scorer": "ngram", "n": 100}
        rows = [Row("evaluate", "reference", "toxicity", 0.5, 0.45, 0.55, **about)]
        rows += [Row("evaluate", "unlearned", "toxicity", toxicity, toxicity - 0.05, toxicity + 0.05, **about)]
        ratio = 1 + 0.01 * strength
        rows += [Row("evaluate", "unlearned", "perplexity_ratio", ratio, ratio - 0.001, ratio + 0.001, paired=True, n=50)]
        for name in ("model/weights", "checkpoints/state", "stages/train.json", "config.yaml"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("")
        write_rows(folder / "results.jsonl", rows)


def sweep(stub: Stub, **options: Any) -> Outcome:
    return run_sweep(Path("recipe.yaml"), Path("out"), runner=stub, **options)


def told(config: RunConfig) -> tuple[Any, ...]:
    """A run in short: method, strength, seed, what it is measured on."""
    method = dict(config.method)
    return method["name"], method.get("weight", method.get("beta")), config.seed, *config.data.prompts


TRIALS = [("repo", s, 0, "tuning.jsonl") for s in (0.5, 1, 2)] + [("dpo", s, 0, "tuning.jsonl") for s in (0.3, 0.2, 0.1)]
FINALS = [("repo", 1, 0), ("dpo", 0.1, 0), ("repo", 1, 1), ("dpo", 0.1, 1)]
FINALS = [(*each, "report.jsonl") for each in FINALS]


def test_trials_choose_and_the_cells_take_what_they_chose():
    """Of repo's weights 2 costs 1.02 and is out; of the rest the strongest erases most. dpo keeps all three."""
    stub = Stub()
    found = sweep(stub)
    assert [told(config) for config in stub.configs] == TRIALS + FINALS
    assert len(set(stub.folders)) == 10 and not found.left and not found.failed
    records = [json.loads(line) for line in Path("out/sweep.jsonl").read_text().splitlines()]
    assert [record["trial"] for record in records if record.get("taken")] == [{"method.weight": 1}, {"method.beta": 0.1}]
    assert records[0]["figures"] == {"toxicity decode=sampled": 0.45, "perplexity_ratio": 1.005}
    assert [record["labels"] for record in records if record["trial"] is None][1] == {"method": "repo", "seed": "1"}
    assert "repo: method.weight=1, trial 2 of 3" in found.notes
    assert all((Path("out/cells") / record["cell"] / "results.jsonl").is_file() for record in records)


def test_the_table_has_a_line_for_each_method_below_the_reference():
    table = sweep(Stub()).table
    assert table is not None and table.headers == ("method", "toxicity", "perplexity ratio", "runs")
    assert [line.name for line in table.lines] == ["reference", "repo", "dpo"]
    values = [[c.value for c in line.cells] for line in table.lines]
    assert values[0] == [0.5, None, None]
    assert values[1] == pytest.approx([0.405, 1.01, 2]) and values[2] == pytest.approx([0.405, 1.01, 2])
    assert Path("out/table.md").read_text().startswith("| method | toxicity | perplexity ratio | runs |\n")
    assert Path("out/table.csv").exists() and Path("out/table.tex").exists()
    trials = Path("out/trials.md").read_text()
    assert "| repo: method.weight=1, taken | 0.400 | 1.010 |" in trials and trials.count("taken") == 2


def test_what_is_done_is_skipped():
    sweep(Stub())
    before = Path("out/sweep.jsonl").read_bytes()
    again = Stub()
    assert not sweep(again).left
    assert again.configs == [] and Path("out/sweep.jsonl").read_bytes() == before


def test_without_the_cells_the_records_are_enough():
    """What a repository keeps of a sweep: sweep.yaml, sweep.jsonl and the tables."""
    sweep(Stub())
    table, records = Path("out/table.md").read_text(), Path("out/sweep.jsonl").read_text()
    shutil.rmtree("out/cells")
    again = Stub()
    assert not sweep(again).left and again.configs == []
    assert Path("out/table.md").read_text() == table and Path("out/sweep.jsonl").read_text() == records
    change(grid__seed=[0, 1, 2])
    sweep(again)
    assert [told(config) for config in again.configs] == [("repo", 1, 2, "report.jsonl"), ("dpo", 0.1, 2, "report.jsonl")]


def test_cells_that_changed_run_again_and_the_others_do_not():
    sweep(Stub())
    change(grid__method__dpo={"method": {"name": "dpo"}, "tune": {"method.beta": [0.3, 0.2, 0.05]}})
    again = Stub()
    sweep(again)
    # dpo's last costs too much, so that its second is taken
    assert [told(config)[:3] for config in again.configs] == [("dpo", 0.05, 0), ("dpo", 0.2, 0), ("dpo", 0.2, 1)]


def test_a_file_that_changed_makes_its_cells_run_again():
    sweep(Stub())
    Path("report.jsonl").write_text("other prompts")
    again = Stub()
    sweep(again)
    assert [told(config) for config in again.configs] == FINALS
    Path("pairs.jsonl").write_text("other pairs")
    again = Stub()
    sweep(again)
    assert len(again.configs) == 10


def test_a_changed_model_or_base_of_an_adapter_is_another_cell():
    for name, settings in (("base", {}), ("adapter", {"base_model_name_or_path": "base", "peft_type": "LORA"})):
        Path(name).mkdir()
        Path(name, "adapter_config.json" if settings else "config.json").write_text(json.dumps(settings))
    change(base__model="adapter")

    def names() -> set:
        return {place["cell"] for place in Sweep(Path("recipe.yaml"), Path("out")).plan()} - {None}

    before = names()
    assert before and names() == before
    Path("base", "model.safetensors").write_text("other weights")
    assert not names() & before


def test_budgets_are_laid_over_the_base_and_do_not_share_cells():
    sweep(Stub())
    other = Stub()
    sweep(other, budget="large")
    assert len(other.configs) == 10 and {config.training["max_steps"] for config in other.configs} == {2}
    assert len(list(Path("out/cells").glob("*/results.jsonl"))) == 20


def test_a_budget_changes_the_grid_and_how_trials_are_measured():
    Path("other.jsonl").write_text("other prompts")
    over = {"grid": {"method": {"dpo": None, "npo": {"method": {"name": "npo"}, "tune": {"method.beta": [0.4, 0.2, 0.1]}}}}}
    over["tune"] = {"base": {"data": {"prompts": ["other.jsonl"]}}}
    change(budgets__large=over)
    stub = Stub()
    sweep(stub, budget="large")
    assert {config.method["name"] for config in stub.configs} == {"repo", "npo"} and len(stub.configs) == 10
    trials = [config.data for config in stub.configs if config.data.prompts != ["report.jsonl"]]
    assert {(*data.prompts, data.corpus) for data in trials} == {("other.jsonl", "tuning.txt")}
    sweep(small := Stub())
    assert {config.method["name"] for config in small.configs} == {"repo", "dpo"}


def test_a_budget_may_have_columns_of_its_own():
    change(budgets__large={"training": {"max_steps": 2}, "columns": {"the ratio": {"metric": "perplexity_ratio"}}})
    table = sweep(Stub(), budget="large").table
    assert table is not None and table.headers == ("method", "the ratio", "runs")
    table = sweep(Stub(), budget="small").table
    assert table is not None and table.headers == ("method", "toxicity", "perplexity ratio", "runs")


def test_a_budget_may_take_the_trials_away():
    change(budgets__large={"tune": None, "training": {"max_steps": 2}})
    sweep(stub := Stub(), budget="large")
    assert [config.method["name"] for config in stub.configs] == ["repo", "dpo"] * 2
    assert {*stub.configs[0].data.prompts} == {"report.jsonl"}


RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*/*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
@pytest.mark.parametrize("budget", ["small", "paper"])
def test_the_recipes_that_are_here_can_be_planned_and_their_columns_told_apart(recipe, budget):
    made = Sweep(recipe, Path("out"), budget)
    assert made.plan()
    for wanted in made.recipe.wanted.values():
        team = made.groups[0].final(next(iter(made.groups[0].seeds)), {}).config.redteam
        assert wanted.attack in (None, "all", *(team.attacks if team else []))
        assert wanted.scorer in (None, *made.groups[0].final("0", {}).config.evaluation.scorers)
    assert len(set(made.recipe.wanted.values())) == len(made.recipe.wanted)


def test_the_budgets_of_every_run_lie_below_the_base():
    change(budgets={}, base__evaluation={"samples": 7})
    stub = Stub()
    sweep(stub)
    settings = stub.configs[0].evaluation
    assert (settings.samples, settings.prompts) == (7, 256)  # ours, and that of quick


def explode(*methods: str, error: BaseException | None = None):
    def fail(config: RunConfig) -> None:
        if config.method["name"] in methods and config.data.prompts == ["report.jsonl"] and config.seed == 1:
            raise error or RuntimeError("it\nbroke")

    return fail


def test_a_failed_cell_is_a_row_and_the_rest_goes_on():
    found = sweep(Stub(explode("repo")))
    [failed] = found.failed
    assert failed["error"] == "it broke" and "RuntimeError" in failed["traceback"]
    assert (failed["labels"], failed["status"]) == ({"method": "repo", "seed": "1"}, "failed")
    assert "repo, seed 1: failed: it broke" in found.notes and not found.left
    assert found.table and [line.cells[-1].value for line in found.table.lines] == [None, 1, 2]
    again = Stub()
    assert not sweep(again).failed
    assert [told(config)[:3] for config in again.configs] == [("repo", 1, 1)]


def test_a_trial_that_failed_is_not_chosen_and_said():
    def fail(config: RunConfig) -> None:
        if told(config)[:2] == ("repo", 1):
            raise ExpungeError("no")

    stub = Stub(fail)
    found = sweep(stub)
    assert "repo: method.weight=0.5, trial 1 of 3; 1 of 3 trials failed" in found.notes
    assert [told(config)[1] for config in stub.configs[6:] if told(config)[0] == "repo"] == [0.5, 0.5]


def test_without_any_trial_nothing_is_run_in_its_name():
    def fail(config: RunConfig) -> None:
        if config.method["name"] == "repo":
            raise ExpungeError("no")

    stub = Stub(fail)
    found = sweep(stub)
    assert [told(config)[0] for config in stub.configs[6:]] == ["dpo", "dpo"]
    assert [record["error"] for record in found.failed] == ["no"] * 3 + ["none of its 3 trials finished"] * 2
    assert found.table and [line.cells[0].value is None for line in found.table.lines] == [False, True, False]


def test_where_no_trial_keeps_the_bound_the_weakest_is_taken_and_said():
    change(tune__keep=[{"metric": "perplexity_ratio", "at_most": 1.001}])
    stub = Stub()
    found = sweep(stub)
    assert [told(config)[1] for config in stub.configs[6:]] == [0.5, 0.3, 0.5, 0.3]
    assert "repo: no trial keeps perplexity_ratio at most 1.001; the weakest is taken, method.weight=0.5" in found.notes


def test_the_highest_can_be_best():
    change(tune__by={"metric": "toxicity", "decode": "sampled", "best": "highest"})
    stub = Stub()
    sweep(stub)
    assert [told(config)[1] for config in stub.configs[6:8]] == [0.5, 0.3]


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), Interrupted("stopped at step 1 of 2")])
def test_a_sweep_that_was_stopped_goes_on_at_the_cell(stop):
    first = Stub(explode("repo", error=stop))
    with pytest.raises(type(stop)):
        sweep(first)
    assert len(Path("out/sweep.jsonl").read_text().splitlines()) == 8
    again = Stub()
    assert not sweep(again).left
    assert [told(config) for config in again.configs] == FINALS[2:]
    assert again.folders[0] == first.folders[-1]


def test_a_sweep_under_a_launcher_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ExpungeError, match="one process"):
        sweep(Stub())


def test_after_its_minutes_no_cell_is_begun(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("expunge.sweep.run.time.monotonic", lambda: clock[0])

    def work(config: RunConfig) -> None:
        clock[0] += 50

    stub = Stub(work)
    found = sweep(stub, minutes=2)
    assert len(stub.configs) == 3 and len(found.left) == 7 and found.table is None
    assert found.left[0] == "repo, seed 0" and "dpo, trial method.beta=0.3" in found.left
    assert not sweep(Stub()).left


def test_only_narrows_what_is_run_not_what_is_shown():
    sweep(Stub(), only=["method=repo"])
    stub = Stub()
    found = sweep(stub, only=["method=dpo", "seed=1"])
    assert [told(config)[:3] for config in stub.configs] == [each[:3] for each in TRIALS[3:]] + [("dpo", 0.1, 1)]
    assert found.left == ["dpo, seed 0"]
    assert found.table and [line.cells[-1].value for line in found.table.lines] == [None, 2, 1]


def test_only_takes_a_label_that_holds_commas():
    tree = yaml.safe_load(Path("recipe.yaml").read_text())
    tree["grid"]["method"]["repo, plain"] = tree["grid"]["method"].pop("repo")
    Path("recipe.yaml").write_text(yaml.safe_dump(tree))
    stub = Stub()
    sweep(stub, only=["method=repo, plain", "seed=0"])
    assert {config.method["name"] for config in stub.configs} == {"repo"}


def test_what_a_cell_needed_to_resume_is_gone_when_it_is_done():
    stub = Stub(explode("repo"))
    sweep(stub)
    done, failed = stub.folders[0], stub.folders[-2]
    assert sorted(path.name for path in done.iterdir()) == ["config.yaml", "results.jsonl"]
    assert not failed.exists()  # it broke before it wrote
    change(keep_models=True, budgets__small={"training": {"max_steps": 3}})
    stub = Stub()
    sweep(stub)
    assert sorted(path.name for path in stub.folders[0].iterdir()) == ["config.yaml", "model", "results.jsonl"]


def test_what_attacks_chose_and_found_stays_and_the_bulk_of_them_goes():
    stub, left = Stub(), ("case.json", "figures.jsonl", "samples.jsonl", "columns.safetensors")

    def attacked(plan: Plan) -> None:
        stub(plan)
        for name in left:
            (plan.folder / "attacks" / "unlearned-gcg-1").mkdir(parents=True, exist_ok=True)
            (plan.folder / "attacks" / "unlearned-gcg-1" / name).write_text("{}")

    run_sweep(Path("recipe.yaml"), Path("out"), runner=attacked)
    for folder in stub.folders:
        assert [str(path.relative_to(folder)) for path in folder.rglob("attacks/*/*")] == [
            "attacks/unlearned-gcg-1/case.json"
        ]


def test_two_processes_share_a_sweep():
    """The first trial of dpo is another's: all else is done but what waits for it."""
    planned = Sweep(Path("recipe.yaml"), Path("out"))
    theirs = planned.groups[1].trials[0]
    Path("out/cells").mkdir(parents=True)
    Path("out/sweep.yaml").write_text("sweep: recipe\n")
    hold = (
        "import fcntl, sys; file = open('out/.lock', 'w'); "
        f"fcntl.lockf(file, fcntl.LOCK_EX, 1, {int(theirs.name[-12:], 16)}); print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdin and other.stdout and other.stdout.readline() == b"held\n"
    stub = Stub()
    found = sweep(stub)
    assert [told(config) for config in stub.configs] == [*TRIALS[:3], *TRIALS[4:], FINALS[0], FINALS[2]]
    assert found.left == ["dpo, trial method.beta=0.3", "dpo, seed 0", "dpo, seed 1"]
    other.stdin.close()
    other.wait()
    assert not sweep(Stub()).left


def test_labels_that_read_alike_do_not_share_a_folder():
    patch = {"method": {"name": "repo"}}
    change(grid={"method": {"a b": patch, "a_b": patch, "a/b": patch}}, tune=None)
    stub = Stub(lambda config: config.method.update(weight=1))
    sweep(stub)
    assert len(set(stub.folders)) == 3 and {folder.parent.name for folder in stub.folders} == {"cells"}


def test_trials_may_be_listed_one_by_one():
    settings = [{"method.weight": 0.5, "training.learning_rate": 1e-4}, {"method.weight": 1, "training.learning_rate": 1e-5}]
    change(grid__method={"repo": {"method": {"name": "repo"}, "tune": settings}})
    stub = Stub()
    sweep(stub)
    assert [(config.method["weight"], config.training["learning_rate"]) for config in stub.configs[:2]] == [
        (0.5, 1e-4),
        (1, 1e-5),
    ]


def test_combinations_of_two_keys_are_trials():
    change(grid__method={"repo": {"method": {"name": "repo"}, "tune": {"method.weight": [1, 2], "method.width": [4, 8]}}})
    stub = Stub()
    sweep(stub)
    tried = [(config.method["weight"], config.method["width"]) for config in stub.configs[:4]]
    assert tried == [(1, 4), (1, 8), (2, 4), (2, 8)]


def test_what_has_nothing_to_tune_says_so_and_runs_as_it_is():
    change(grid__method__dpo={"method": {"name": "dpo", "beta": 0.2}, "tune": None})
    stub = Stub()
    sweep(stub)
    assert [told(config)[:3] for config in stub.configs if config.method["name"] == "dpo"] == [
        ("dpo", 0.2, 0),
        ("dpo", 0.2, 1),
    ]


def test_an_axis_is_a_key_or_labelled_patches():
    change(grid={"model": {"one": {}, "two": {"lora.r": 2}}, "method.weight": [1, 2]}, tune=None, columns={})
    stub = Stub()
    found = sweep(stub)
    assert [(config.lora, config.method["weight"]) for config in stub.configs] == [
        (None, 1),
        (None, 2),
        ({"r": 2}, 1),
        ({"r": 2}, 2),
    ]
    assert found.table and [line.name for line in found.table.lines] == [
        "reference",
        "one, weight 1",
        "one, weight 2",
        "two, weight 1",
        "two, weight 2",
    ]


SAME = {"tune__base": {"data": {"prompts": ["./report.jsonl"], "corpus": None}}}
APART = {"data": {"prompts": ["tuning.jsonl"], "corpus": "tuning.txt"}}
BAD = {
    "an unknown key": ({"gird": {}}, "recipe.yaml: unknown key 'gird' (did you mean 'grid'?)"),
    "an empty grid": ({"grid": {}}, "recipe.yaml: grid: empty; give at least one axis"),
    "an empty axis": ({"grid__seed": []}, "recipe.yaml: grid.seed: empty"),
    "a value twice": ({"grid__seed": [0, 0]}, "grid.seed: a value stands twice"),
    "a label twice": ({"grid__seed": {0: {}, "0": {}}}, "the key '0' stands twice"),
    "a patch that is none": ({"grid__method__dpo": "dpo"}, "grid.method.dpo='dpo': expected keys and values"),
    "a key of no run": (
        {"base__datta": {}},
        "recipe.yaml: repo, seed 0, method.weight=0.5: unknown key 'datta' (did you mean 'data'?)",
    ),
    "a key of no method": (
        {"grid__method__dpo__method": {"name": "dpo", "gamma": 1}},
        "dpo, seed 0, method.beta=0.3: unknown key 'method.gamma'",
    ),
    "a method of no name": ({"grid__method__dpo__method": {"name": "dop"}}, "unknown method 'dop' (did you mean 'dpo'?)"),
    "a key of no training": ({"base__training": {"learning_rat": 1}}, "unknown key 'training.learning_rat'"),
    "unequal trials": ({"grid__method__dpo__tune": {"method.beta": [0.1]}}, "not equally many trials (repo 3, dpo 1)"),
    "no trials beside some": ({"grid__method__dpo": {"method": {"name": "dpo"}}}, "not equally many trials (repo 3, dpo 0)"),
    "trials on two axes": (
        {"grid__seed": {"0": {"tune": {"method.weight": [1, 2, 3]}}}},
        "on the axes method and seed: trials belong to one",
    ),
    "a trial twice": (
        {"grid__method__dpo__tune": {"method.beta": [0.1, 0.1, 0.2]}},
        "grid.method.dpo.tune: the trial method.beta=0.1 stands twice in it",
    ),
    "a trial twice in other words": (
        {"grid__method__dpo__tune": [{"method.beta": 1}, {"method.beta": 0.1}, {"method": {"beta": 1.0}}]},
        "grid.method.dpo.tune: the trial method.beta=1 stands twice in it",
    ),
    "trials and no way to choose": ({"tune": None}, "grid.method: trials, and nothing says how one is chosen: give tune.by"),
    "a choice and no trials": ({"grid": {"seed": [0]}}, "tune: no value of the grid has trials"),
    "nothing to choose by": ({"tune": {"keep": []}}, "recipe.yaml: tune: 'by' is missing"),
    "a bound that is none": ({"tune__keep": {"metric": "f1"}}, "tune.keep: f1 has no bound: give at_most or at_least"),
    "an unknown field": ({"columns__toxicity": {"metric": "f1", "dataste": "x"}}, "unknown key 'columns.toxicity.dataste'"),
    "a column without a metric": ({"columns__toxicity": {}}, "columns: 'metric' is missing"),
    "trials on what is reported": (SAME, "trials are measured on"),
    "trials on a harness's questions": (
        {
            "base__evaluation": {"harness": ["wmdp"]},
            "tune__base": {**APART, "evaluation": {"harness": []}},
            "tune__base__data__questions": ["wmdp-cyber"],
        },
        "trials are measured on wmdp-cyber, which is reported too",
    ),
    "a figure that no trial has": (
        {"tune__by": {"metric": "accuracy"}},
        "tune.by: trials have no accuracy (there is perplexity_ratio, toxicity)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_recipe_is_one_line(case):
    changes, said = BAD[case]
    change(**changes)
    stub = Stub()
    with pytest.raises(ExpungeError) as error:
        sweep(stub)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert len(stub.configs) <= 1 and (stub.configs or not Path("out").exists())


def test_a_figure_in_doubt_is_an_error():
    class Two(Stub):
        def __call__(self, plan: Plan) -> None:
            super().__call__(plan)
            with (plan.folder / "results.jsonl").open("a") as file:
                row = {"stage": "evaluate", "subject": "unlearned", "metric": "toxicity", "value": 0.1}
                file.write(json.dumps({**row, "dataset": "other", "decode": "sampled", "scorer": "ngram"}) + "\n")

    with pytest.raises(
        ExpungeError, match=r"toxicity decode=sampled: 2 figures may be meant.*dataset: tuning.jsonl or other"
    ):
        sweep(Two())


def test_a_column_that_is_in_doubt_or_empty_does_not_stop_the_cells():
    change(columns={"accuracy": {"metric": "accuracy", "dataset": "x"}})
    assert "accuracy: no cell has this figure (accuracy dataset=x)" in sweep(Stub()).notes

    class Two(Stub):
        def __call__(self, plan: Plan) -> None:
            super().__call__(plan)
            with (plan.folder / "results.jsonl").open("a") as file:
                file.write(json.dumps({"stage": "evaluate", "subject": "unlearned", "metric": "f1", "value": 1}) + "\n")
                file.write(
                    json.dumps({"stage": "evaluate", "subject": "unlearned", "metric": "f1", "value": 1, "mode": "x"})
                )

    change(columns={"F1": {"metric": "f1"}}, budgets__small={"seed": 7})
    stub = Two()
    with pytest.raises(ExpungeError, match="f1: 2 figures may be meant"):
        sweep(stub)
    assert len(stub.configs) == 10


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"budget": "smal"}, "unknown budget 'smal' (did you mean 'small'?)"),
        ({"only": ["methd=repo"]}, "--only methd=repo: expected AXIS=LABEL,LABEL (did you mean 'method'?)"),
        ({"only": ["method=repo,dop"]}, "method has no 'dop' (did you mean 'dpo'?)"),
    ],
)
def test_bad_options_are_one_line(options, said):
    with pytest.raises(ExpungeError) as error:
        sweep(Stub(), **options)
    assert said in str(error.value) and not Path("out").exists()


def test_a_folder_of_something_else_is_left_alone():
    Path("out").mkdir()
    Path("out/mine.txt").write_text("mine")
    with pytest.raises(ExpungeError, match="holds no sweep"):
        sweep(Stub())
    Path("out/mine.txt").unlink()
    sweep(Stub())
    Path("recipe.yaml").rename("other.yaml")
    with pytest.raises(ExpungeError, match="holds another sweep \\(recipe\\)"):
        run_sweep(Path("other.yaml"), Path("out"), runner=Stub())


# --- the command, with the pipeline itself


def call(*arguments: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["expunge", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
    return int(stopped.value.code or 0)


def test_the_command_runs_a_sweep_of_real_runs(place, tiny_model, tokenizer, capsys):
    tiny_model().save_pretrained("tiny")
    tokenizer.save_pretrained("tiny")
    pair = {"prompt": "The river", "chosen": " is calm today.", "rejected": " is wild and cold."}
    Path("pairs.jsonl").write_text((json.dumps(pair) + "\n") * 4)
    for name in ("report", "tuning"):
        Path(f"{name}.jsonl").write_text(json.dumps({"prompt": f"The {name}"}) + "\n" + '{"prompt": "A house"}\n')
        Path(f"{name}.txt").write_text(f"The {name} runs past the old mill and on to the sea. " * 10)
    change(
        base__model="tiny",
        base__evaluation={"samples": 1, "max_new_tokens": 2, "scorers": ["ngram"]},
        base__training={"per_device_train_batch_size": 2},
        tune__keep={"metric": "perplexity_ratio", "mode": "exact", "at_most": 1.5},
        columns={},
        grid={
            "method": {
                "repo": {"method.name": "repo", "tune": {"method.weight": [0.5]}},
                "dpo": {"method.name": "dpo", "tune": {"data.train": ["nowhere.jsonl"]}},
            }
        },
    )
    assert call("sweep", "recipe.yaml", "--dry-run", "--json") == 0
    planned = json.loads(capsys.readouterr().out)["cells"]
    assert [cell["status"] for cell in planned] == ["to do"] * 2 + ["waiting for its trials"] * 2
    assert not Path("runs").exists()
    for times in ("first", "again"):
        assert call("sweep", "recipe.yaml", "--quiet", "--json") == 2, times
        said = capsys.readouterr()
        assert said.err.splitlines()[-1].startswith(
            "expunge: 2 of 4 cells failed, first dpo, trial data.train=nowhere.jsonl"
        )
        found = json.loads(said.out)
        assert [record["status"] for record in found["cells"]] == ["done", "done", "failed", "failed"]
    [cell] = [record for record in found["cells"] if record["status"] == "done" and record["trial"] is None]
    run = Path("runs/recipe/cells", cell["cell"])
    assert {path.name for path in run.iterdir()} >= {"config.yaml", "provenance.json", "results.jsonl", "report.html"}
    assert not (run / "model").exists()
    assert call("sweep", "recipe.yaml", "--only", "method=repo") == 2  # dpo's cells are still failed ones
    assert "reference" in capsys.readouterr().out
    assert call("compare", "runs/recipe", run, "--json") == 0
    one, two = [line for line in json.loads(capsys.readouterr().out)["lines"] if line["name"] != "reference"]
    assert (one["name"], two["name"]) == ("recipe: repo", cell["cell"]) and one["figures"] == two["figures"]
    assert call("report", run) == 0
