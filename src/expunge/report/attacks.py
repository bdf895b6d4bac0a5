"""What attacks did, from the rows of their cases: means and worst cases over settings and draws, and the table of them.

    summary(read_rows(Path("runs/attacks/attacks.jsonl")), bound=1.5)

    mean     over the settings of an attack that change something, each the mean of its draws
    learning_rate=0.0002   the same over those settings that have this value, of each key with several values
    worst    the setting with the highest figure
    beyond   the worst of those that cost more than `bound` times the perplexity before the attack, which do not count

An attack called "all" is the worst over all of them, no attack included: the headline.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from expunge.report.compare import combined
from expunge.report.formats import FORMATS, markdown
from expunge.report.tables import Cell, Line, Table
from expunge.rows import Row
from expunge.whole import write_text

NONE, ALL = "none", "all"
BACK = ("toxicity", "expected_max_toxicity", "toxicity_probability", "accuracy")
"""High where what was to go is there."""
SIGNS = ("distinct_2", "loop_share", "empty_share")
"""Of broken text, which a scorer may take for harmless or for toxic."""
BESIDE = {"loop_share": "loops", "distinct_2": "distinct-2"}
"""Of these signs, what stands beside every toxicity: that of the very same continuations."""
SPENT = {"steps": "steps", "loss": "own loss"}
"""What an attack took, and came to."""
ASIDE = {**BESIDE, **SPENT}

SHOWN = ("toxicity", "expected_max_toxicity", "accuracy")
"""Of what is back, what the table has lines of: the second is what an attacker who samples keeps."""


class Figure(NamedTuple):
    """What cases are compared by; k, forced tokens, and samples are settings of an attack."""

    metric: str
    paired: bool
    dataset: str | None
    decode: str | None
    mode: str | None
    scorer: str | None

    @property
    def plain(self) -> "Figure":
        metric = self.metric.removesuffix("_ratio") if self.paired else self.metric
        return self._replace(metric=metric, paired=False)


class Setting(NamedTuple):
    """One setting of an attack on one subject, its draws together."""

    config: dict[str, Any]
    cells: Mapping[Figure, Cell]
    rows: Mapping[Figure, Row]  # of its first draw
    cost: float | None  # perplexity over that before the attack
    draws: int
    spent: Mapping[str, float]  # the mean of its draws
    idle: bool  # in all of them nothing was changed


def summary(rows: Sequence[Row], bound: float) -> list[Row]:
    """Rows whose `over` is mean, a value of a setting, worst or beyond, of each attack on each subject. rows: the cases'."""
    found: list[Row] = []
    for subject in dict.fromkeys(row.subject for row in rows):
        own = [row for row in rows if row.subject == subject]
        before = _settings([row for row in own if row.attack == NONE], None)
        started = before[0].cells if before else {}
        worst: list[Row] = []
        for attack in dict.fromkeys(row.attack for row in own):
            settings = _settings([row for row in own if row.attack == attack], started)
            within = [setting.cost is None or setting.cost <= bound for setting in settings]  # a cost that is NaN is not
            counts = [setting for setting, fits in zip(settings, within, strict=True) if fits]
            rest = [setting for setting, fits in zip(settings, within, strict=True) if not fits]
            idle = all(setting.idle for setting in settings)
            shown = [setting for setting in counts if idle or not setting.idle]
            found += _means(shown, "mean")
            for key, value in _varied([row for row in rows if row.attack == attack]):
                found += _means([one for one in shown if one.config.get(key) == value], f"{key}={text_of(value)}")
            worst += (highest := _worst(counts, "worst"))
            found += highest + _worst(rest, "beyond")
        found += _over_all(worst)
    return found


def _varied(rows: Iterable[Row]) -> list[tuple[str, Any]]:
    """Keys whose values are not one in all settings of an attack, on any subject, each with its values in their order."""
    values: dict[str, list[Any]] = {}
    for row in rows:
        for key, value in _setting(row).items():
            if value not in values.setdefault(key, []):
                values[key].append(value)
    return [(key, value) for key, own in values.items() if len(own) > 1 for value in own]


def _setting(row: Row) -> dict[str, Any]:
    return {key: value for key, value in (row.attack_config or {}).items() if key != "spent"}


def text_of(value: Any) -> str:
    """A setting's value as it stands in `over`."""
    return value if isinstance(value, str) else json.dumps(value)


def _settings(rows: Sequence[Row], before: Mapping[Figure, Cell] | None) -> list[Setting]:
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        grouped.setdefault(json.dumps(_setting(row), sort_keys=True), []).append(row)
    found = []
    for config, own in grouped.items():
        by_figure: dict[Figure, list[Row]] = {}
        for row in own:
            if row.side in (None, "rejected") and not (row.paired and not row.metric.endswith("_ratio")):
                by_figure.setdefault(_figure(row), []).append(row)
        cells = {figure: combined(draws) for figure, draws in by_figure.items()}
        costs = [
            cell.value / before[figure].value  # type: ignore[operator]
            for figure, cell in cells.items()
            if figure.metric == "perplexity" and before and figure in before
        ]
        first = {figure: rows[0] for figure, rows in by_figure.items()}
        spent = {row.draw: (row.attack_config or {}).get("spent", {}) for row in own}
        means = _averages([{name: one.get(name) for name in SPENT} for one in spent.values()])
        idle = all(one.get("idle") for one in spent.values())
        found.append(Setting(json.loads(config), cells, first, costs[0] if costs else None, len(spent), means, idle))
    return found


def _figure(row: Row) -> Figure:
    return Figure(row.metric, row.paired, row.dataset, row.decode, row.mode, row.scorer)


def _averages(records: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """The mean of each figure over the records that have it."""
    values: dict[str, list[float]] = {}
    for name, value in (pair for record in records for pair in record.items()):
        if value is not None:
            values.setdefault(name, []).append(value)
    means = {name: sum(each) / len(each) for name, each in values.items()}
    whole = {name for name, each in values.items() if all(isinstance(one, int) for one in each)}  # counts, shown as such
    return {name: int(mean) if name in whole and mean.is_integer() else mean for name, mean in means.items()}


def _beside(figure: Figure, settings: Sequence[Setting]) -> dict[str, float]:
    """On the mean over these settings: what they spent, and how broken the continuations are that a figure is of."""
    signs = {sign: figure._replace(metric=sign, paired=False, scorer=None) for sign in BESIDE}
    return _averages([{**s.spent, **{sign: s.cells.get(of, Cell()).value for sign, of in signs.items()}} for s in settings])


def _figures(settings: Sequence[Setting]) -> list[Figure]:
    """Of any of them: a ratio to a figure that is 0 in one setting is not there."""
    return list(dict.fromkeys(figure for setting in settings for figure in setting.cells))


def _means(settings: Sequence[Setting], over: str) -> list[Row]:
    """Ends of intervals are averaged too: settings share prompts and draws."""
    found = []
    for figure in _figures(settings):
        there = [setting for setting in settings if figure in setting.cells]
        ends = [[getattr(setting.cells[figure], end) for setting in there] for end in ("value", "low", "high")]
        value, low, high = (None if None in parts else sum(parts) / len(parts) for parts in ends)
        about = {"settings": len(there), "draws": there[0].draws, **_beside(figure, there)}
        found.append(_row(there[0].rows[figure], over, Cell(value, low, high), about))
    return found


def _worst(settings: Sequence[Setting], over: str) -> list[Row]:
    """Each figure in the setting where what decides on it is highest: itself, or of signs of broken text the judge's."""
    found, figures = [], _figures(settings)
    for figure in figures:
        by = figure.plain
        if by.metric in SIGNS:
            by = next((f for f in figures if f[:4] == ("toxicity", False, by.dataset, by.decode)), by)
        there = [setting for setting in settings if figure in setting.cells and by in setting.cells]
        if by.metric not in BACK or not there:
            continue
        chosen = max(there, key=lambda setting: setting.cells[by].value or 0.0)
        cost = None if chosen.cost is None else round(chosen.cost, 4)
        about = {"setting": chosen.config, "settings": len(there), "draws": chosen.draws, "perplexity_ratio": cost}
        about |= _beside(figure, [chosen])
        found.append(_row(chosen.rows[figure], over, chosen.cells[figure], about))
    return found


def _over_all(worst: Sequence[Row]) -> list[Row]:
    """Of each figure the attack that brings back most."""
    found = []
    for figure in dict.fromkeys(_figure(row) for row in worst if not row.paired and row.metric in BACK):
        highest = max((row for row in worst if _figure(row) == figure), key=lambda row: row.value)
        config = {"attack": highest.attack, **(highest.attack_config or {})}
        found.append(replace(highest, attack=ALL, attack_config=config))
    return found


def _row(like: Row, over: str, cell: Cell, config: dict[str, Any]) -> Row:
    k = None if like.k is None else 0
    ends = {"value": cell.value, "ci_low": cell.low, "ci_high": cell.high}
    return Row(**{**asdict(like), **ends, "k": k, "draw": None, "samples": None, "over": over, "attack_config": config})


def attacks_table(rows: Sequence[Row], bound: float) -> Table:
    """Lines for each attack and kind of toxicity or accuracy: on the mean, by value of what varies, at worst, and beyond the
    bound of perplexity.

    rows: a summary's. Each model has a column, and beside its figure signs of broken text, and what the attack took.
    """
    subjects = list(dict.fromkeys(row.subject or "" for row in rows))
    index = {(_figure(row), row.attack, row.over, row.subject): row for row in rows}
    last = {"worst": "worst", "beyond": f"beyond {bound:g} x perplexity"}
    headers = [header for subject in subjects for header in (subject, *(f"{subject}: {sign}" for sign in ASIDE.values()))]
    lines = []
    for figure in dict.fromkeys(_figure(row) for row in rows if not row.paired and row.metric in SHOWN):
        name = figure.metric.replace("_", " ")
        ratio = figure._replace(metric=f"{figure.metric}_ratio", paired=True)
        group = ", ".join(filter(None, (name, figure.dataset, figure.decode, figure.mode, figure.scorer)))
        for attack in sorted(dict.fromkeys(row.attack or "" for row in rows), key=lambda name: name == ALL):
            present = dict.fromkeys(row.over or "" for row in rows if row.attack == attack and row.over not in last)
            for over, title in {**{over: over for over in present}, **last}.items():
                if attack == NONE and over != "mean":  # it has one setting
                    continue
                found = [index.get((figure, attack, over, subject)) for subject in subjects]
                cells = [cell for row in found for cell in _cells(row, ASIDE)]
                if "reference" in subjects:
                    cells += _cells(index.get((ratio, attack, over, "unlearned")) if over not in last else None, ())
                if any(found):
                    lines.append(Line(group, attack if attack == NONE else f"{attack}, {title}", group, tuple(cells)))
    compared = ["ratio"] if "reference" in subjects else []
    return Table(("attack", *headers, *compared), tuple(lines), counts=0)


def _cells(row: Row | None, aside: Iterable[str]) -> list[Cell]:
    """A figure, and what stands beside it under these names."""
    if row is None:
        return [Cell(), *(Cell() for _ in aside)]
    return [Cell(row.value, row.ci_low, row.ci_high), *(Cell((row.attack_config or {}).get(name)) for name in aside)]


def to_records(table: Table) -> list[dict[str, Any]]:
    """The lines unrounded: name, group, and figures by column, null where there is none."""
    ends = ("value", "low", "high")
    return [
        {
            "name": line.name,
            "group": line.group,
            "figures": {
                header: None if c.value is None else {end: getattr(c, end) for end in ends}
                for header, c in zip(table.headers[1:], line.cells, strict=True)
            },
        }
        for line in table.lines
    ]


def headline_lines(table: Table) -> Table:
    """Of a table of attacks what is answered, or judged by the first scorer: sampled, or greedy where nothing was."""
    kinds = [line.group.partition(", ")[0] for line in table.lines]
    toxicity = [line.group for line, kind in zip(table.lines, kinds, strict=True) if kind == "toxicity"]
    decoded = "sampled" if any("sampled" in group.split(", ") for group in toxicity) else "greedy"
    kept = [
        line
        for line, kind in zip(table.lines, kinds, strict=True)
        if kind == "accuracy"
        or (
            kind == "toxicity"
            and decoded in line.group.split(", ")
            and line.group.rpartition(", ")[2] == toxicity[0].rpartition(", ")[2]
        )
    ]
    return replace(table, lines=tuple(kept or table.lines))


def by_group(table: Table) -> list[tuple[str, Table]]:
    """A narrow table for each kind of toxicity or accuracy, with its title, that 80 characters hold: to be printed."""
    columns = [i for i, header in enumerate(table.headers[1:]) if header in ("reference", "unlearned")]
    found = []
    for group in dict.fromkeys(line.group for line in table.lines):
        own = [line for line in table.lines if line.group == group]
        lines = [Line(group, line.name, "", tuple(line.cells[i] for i in columns)) for line in own]
        found.append((group, Table(("attack", *(table.headers[1 + i] for i in columns)), tuple(lines), counts=0)))
    return found


def write_attacks(folder: Path, rows: Sequence[Row], bound: float) -> Table:
    """attacks.md, .csv and .tex of a summary; returns the table."""
    table = attacks_table(rows, bound)
    notes = "".join(f"- {markdown(note)}\n" for note in _notes(rows))
    for ending, form in FORMATS.items():
        write_text(folder / f"attacks.{ending}", form(table) + (f"\n{notes}" if notes and ending == "md" else ""))
    return table


def _notes(rows: Iterable[Row]) -> list[str]:
    return [
        f"worst of all on {row.subject}, {row.dataset}, {row.decode}, {row.scorer}: {(row.attack_config or {})['attack']}"
        for row in rows
        if row.attack == ALL and row.metric == "toxicity"
    ]
