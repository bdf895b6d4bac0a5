"""Runs beside each other: the arithmetic over seeds by hand, which figure is meant, and what may be chance."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from expunge.cli import main
from expunge.errors import ExpungeError
from expunge.report.compare import Entry, Wanted, combined, compare, find, headline_columns, read_folders, remarks
from expunge.rows import Row, write_rows


def row(value: float, half: float | None = 0.05, n: int | None = 101, **fields: Any) -> Row:
    about = {"stage": "evaluate", "subject": "unlearned", "metric": "toxicity", "scorer": "ngram", "decode": "sampled"}
    ends = (None, None) if half is None else (value - half, value + half)
    return Row(**{**about, "dataset": "set", **fields}, value=value, ci_low=ends[0], ci_high=ends[1], n=n)


STUDENT = {2: 4.302653, 1: 12.706205}  # the 97.5 % point, from a printed table


def test_of_one_run_its_own_interval():
    found = combined([Row("evaluate", "unlearned", "toxicity", 0.4, 0.3, 0.7, 100)])
    assert (found.value, found.low, found.high) == (0.4, 0.3, 0.7)


def test_seeds_without_intervals_of_their_own_give_student_s():
    """0.1 0.2 0.3: mean 0.2, standard error 0.1 / sqrt 3."""
    found = combined([row(value, None) for value in (0.1, 0.2, 0.3)])
    half = STUDENT[2] * 0.1 / math.sqrt(3)
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.2 - half, 0.2 + half), rel=1e-6)


def test_seeds_that_agree_are_no_surer_than_one_of_its_prompts():
    """Standard error 0.05 / 1.96 over 101 prompts, 1.983972 of them with 100 degrees of freedom; not less for 3 seeds."""
    found = combined([row(0.4)] * 3)
    half = 1.983972 * 0.05 / 1.96
    assert (found.low, found.high) == pytest.approx((0.4 - half, 0.4 + half), rel=1e-6)


def test_both_parts_add_up():
    """W = (0.0392 / 1.96)^2 = 4e-4, B / S = 0.02 / 2 = 0.01; (0.0104)^2 / (1.6e-7 / 100 + 1e-4 / 1) = 1.0816 degrees."""
    from scipy.stats import t

    found = combined([row(0.3, 0.0392), row(0.5, 0.0392)])
    half = t.ppf(0.975, 0.0104**2 / (4e-4**2 / 100 + 0.01**2)) * math.sqrt(0.0104)
    assert half < STUDENT[1] * math.sqrt(0.0104)
    assert (found.value, found.low, found.high) == pytest.approx((0.4, 0.4 - half, 0.4 + half), rel=1e-6)


def test_the_order_of_seeds_does_not_matter_and_a_nan_has_no_interval():
    rows = [row(0.1, 0.01), row(0.3, 0.03), row(0.2, 0.02)]
    one, two = combined(rows), combined(rows[::-1])
    assert (one.low, one.high) == pytest.approx((two.low, two.high), rel=1e-12)
    assert combined([row(math.nan), row(0.1)]).low is None


def test_an_accuracy_keeps_what_guessing_gives():
    assert combined([row(0.26, chance=0.25), row(0.25, chance=0.25)]).note == "at chance"
    assert combined([row(0.9, chance=0.25), row(0.91, chance=0.25)]).note == ""


ROWS = [
    row(0.5, subject="reference"),
    row(0.4),
    row(0.45, scorer="wordvec"),
    row(-0.1, paired=True),
    row(0.8, metric="toxicity_ratio", paired=True),
    row(0.3, side="rejected", k=8),
    row(0.2, dataset="other"),
    row(0.1, decode="greedy"),
    row(0.6, stage="attack", attack="relearn", draw=0),
]


@pytest.mark.parametrize(
    ("wanted", "value"),
    [
        (Wanted("toxicity", "set", "sampled"), 0.4),
        (Wanted("toxicity", "set", "sampled", scorer="wordvec"), 0.45),
        (Wanted("toxicity_difference", "set", "sampled"), -0.1),
        (Wanted("toxicity_ratio"), 0.8),
        (Wanted("toxicity", side="rejected", k=8), 0.3),
        (Wanted("toxicity", decode="greedy"), 0.1),
        (Wanted("toxicity", attack="relearn", draw=0), 0.6),
    ],
)
def test_a_figure_is_found_by_what_is_said_of_it(wanted, value):
    found = find(ROWS, wanted)
    assert found and found.value == value


def test_what_is_not_there_is_none_and_what_is_in_doubt_an_error():
    assert find(ROWS, Wanted("f1")) is None and find(ROWS, Wanted("toxicity", k=4)) is None
    found = find(ROWS, Wanted("toxicity"), "reference")
    assert found and found.value == 0.5
    with pytest.raises(ExpungeError, match=r"toxicity: 3 figures .*dataset: set or other; decode: sampled or greedy"):
        find(ROWS, Wanted("toxicity"))


COLUMNS = {"toxicity": Wanted("toxicity"), "ratio": Wanted("toxicity_ratio")}


def run_of(value: float, ratio: float, before: float = 0.5, **more: Any) -> list[Row]:
    return [
        row(before, subject="reference", model="small", **more),
        row(value, **more),
        row(ratio, 0.1, metric="toxicity_ratio", paired=True, **more),
    ]


def test_a_reference_that_each_seed_has_anew_is_a_mean_over_seeds_too():
    """Under an attack it is another for each seed; where it is one and the same it keeps its own interval."""
    seeds = [run_of(0.4, 0.8, before=before) for before in (0.5, 0.6)]
    table = compare([Entry("a", seeds)], {"toxicity": COLUMNS["toxicity"]})
    assert table.lines[0].cells[0] == combined([rows[0] for rows in seeds])
    assert table.lines[0].cells[0].value == pytest.approx(0.55)
    same = [run_of(value, 0.8) for value in (0.4, 0.3)]
    own = compare([Entry("a", same)], {"toxicity": COLUMNS["toxicity"]}).lines[0].cells[0]
    assert (own.low, own.high) == (same[0][0].ci_low, same[0][0].ci_high)


def test_lines_stand_below_their_reference():
    """Three runs on one reference and one on another; a run without a reference goes with the first."""
    entries = [
        Entry("a", [run_of(0.4, 0.8), run_of(0.2, 0.4)]),
        Entry("other", [run_of(0.1, 0.5, before=0.2)]),
        Entry("b", [run_of(0.45, 0.95)]),
        Entry("alone", [[row(0.7)]]),
    ]
    table = compare(entries, COLUMNS)
    assert [line.name for line in table.lines] == ["reference (small)", "a", "b", "alone", "reference (small)", "other"]
    assert [[c.value for c in line.cells] for line in table.lines] == [
        [0.5, None, None],
        pytest.approx([0.3, 0.6, 2]),
        [0.45, 0.95, 1],
        [0.7, None, 1],
        [0.2, None, None],
        [0.1, 0.5, 1],
    ]


def test_a_ratio_with_1_in_its_interval_may_be_chance():
    entries = [Entry("a", [run_of(0.4, 0.8)]), Entry("b", [run_of(0.45, 0.95)]), Entry("c", [run_of(0.6, 1.2)])]
    [said] = remarks(entries, {"toxicity": Wanted("toxicity")})
    assert said.startswith("toxicity: the change may be chance") and said.endswith(": b")
    assert remarks(entries[::2], COLUMNS) == []


def test_a_mean_of_fewer_runs_than_its_line_has_is_said():
    """As of an attack that is beyond the bound of perplexity in some seeds."""
    attacked = row(0.9, attack="orthogonalize")
    entries = [Entry("a", [[row(0.4)], [row(0.5), attacked]]), Entry("b", [[row(0.4), attacked]]), Entry("c", [[row(0.4)]])]
    columns = {"before": Wanted("toxicity"), "after": Wanted("toxicity", attack="orthogonalize")}
    [said] = remarks(entries, columns)
    assert said.startswith("after: some runs lack this figure") and said.endswith(": a (1 of 2)")


def test_the_headline_s_figures_are_the_columns():
    entries = [Entry("a", [ROWS[:3]]), Entry("b", [[row(2.0, metric="perplexity", mode="exact", scorer=None, decode=None)]])]
    assert headline_columns(entries) == {
        "toxicity, sampled, set, ngram": Wanted("toxicity", "set", "sampled", scorer="ngram"),
        "toxicity, sampled, set, wordvec": Wanted("toxicity", "set", "sampled", scorer="wordvec"),
        "perplexity, set, exact": Wanted("perplexity", "set", mode="exact"),
    }
    assert next(wanted.metric for wanted in headline_columns(entries, ratio=True).values()) == "toxicity_ratio"


# --- folders


def save(folder: Path, rows: list[Row]) -> Path:
    folder.mkdir(parents=True)
    write_rows(folder / "results.jsonl", rows)
    return folder


def sweep_in(folder: Path) -> Path:
    """Two seeds of a, one of b that is done, one that failed, and a trial."""
    cells = [("a", "0", None, 0.4), ("a", "1", None, 0.2), ("b", "0", None, 0.3), ("a", "0", {"weight": 1}, 0.9)]
    lines = [{"cell": "gone", "labels": {"method": "b", "seed": "1"}, "trial": None, "status": "failed"}]
    for number, (method, seed, trial, value) in enumerate(cells):
        save(folder / "cells" / str(number), run_of(value, value / 0.5))
        labels = {"method": method, "seed": seed}
        lines.append({"cell": str(number), "labels": labels, "trial": trial, "status": "done"})
    (folder / "sweep.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def call(*arguments: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["expunge", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
    return int(stopped.value.code or 0)


def test_runs_and_sweeps_in_one_table(tmp_path, capsys):
    first, second = save(tmp_path / "x/run", run_of(0.1, 0.2)), save(tmp_path / "y/run", run_of(0.15, 0.3))
    sweep = sweep_in(tmp_path / "swept")
    assert [(entry.name, len(entry.runs)) for entry in read_folders([first, sweep])] == [
        ("run", 1),
        ("swept: a", 2),
        ("swept: b", 1),
    ]
    assert call("compare", first, second, sweep, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [(line["name"], line["runs"]) for line in found["lines"]] == [
        ("reference", None),
        (str(first), 1),
        (str(second), 1),
        ("swept: a", 2),
        ("swept: b", 1),
    ]
    [figure] = found["lines"][3]["figures"].values()
    assert figure["value"] == pytest.approx(0.3) and figure["low"] < 0.2
    assert call("compare", first, sweep, "--ratio", "--json") == 0
    [figure] = json.loads(capsys.readouterr().out)["lines"][0]["figures"].values()
    assert figure["value"] == 0.2


@pytest.mark.parametrize(("form", "said"), [("md", "| run |"), ("csv", "group,run,"), ("tex", "\\begin{tabular}")])
def test_forms(tmp_path, capsys, form, said):
    folder = save(tmp_path / "run", run_of(0.1, 0.2))
    assert call("compare", folder, "--format", form) == 0
    assert capsys.readouterr().out.startswith(said)


def test_bad_folders_are_one_line(tmp_path, capsys):
    def said(*arguments: object) -> str:
        assert call("compare", *arguments) == 2
        [line] = capsys.readouterr().err.splitlines()
        return line

    good = save(tmp_path / "run", run_of(0.1, 0.2))
    assert "holds no results of a run or a sweep" in said(tmp_path / "nowhere")
    assert "holds no results of a run or a sweep" in said(good, tmp_path)
    assert "--format mx: no such form (did you mean 'md'?)" in said(good, "--format", "mx")
    sweep = sweep_in(tmp_path / "swept")
    (sweep / "cells/2/results.jsonl").write_text("no JSON\n")
    assert "cells/2/results.jsonl:1: not valid JSON" in said(sweep)
    (sweep / "sweep.jsonl").write_text("")
    assert "no cell of this sweep has finished" in said(sweep)
    (sweep / "sweep.jsonl").write_text('{"cell": "x"}\n')
    assert "sweep.jsonl:1: no field 'labels'" in said(sweep)
