import inspect
from importlib.metadata import EntryPoint

import pytest

from expunge import registry
from expunge.errors import ExpungeError
from expunge.listing import methods
from expunge.methods import METHODS, Method
from expunge.registry import Registry, UnknownName, did_you_mean, load_plugin
from expunge.scorers import SCORERS, load_scorer


@pytest.fixture
def colours() -> Registry:
    return Registry("colour", {"red": "collections:OrderedDict", "green": "collections:Counter"})


def test_classes_are_imported_when_they_are_asked_for(colours):
    from collections import OrderedDict

    assert colours.get("red") is OrderedDict
    assert colours.get("red") is OrderedDict


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gren", "unknown colour 'gren' (did you mean 'green'?)"),
        ("xyz", "unknown colour 'xyz' (known: green, red)"),
    ],
)
def test_an_unknown_name_is_one_line_with_a_suggestion(colours, name, message):
    with pytest.raises(UnknownName) as caught:
        colours.get(name)
    assert str(caught.value) == message


def test_a_plug_in_registers_by_decorator(colours):
    @colours.register("blue")
    class Blue:
        pass

    assert colours.get("blue") is Blue
    assert Blue.name == "blue"
    assert colours.names() == ["blue", "green", "red"]


def test_a_plug_in_registers_by_entry_point(colours, monkeypatch):
    point = EntryPoint(name="violet", value="collections:deque", group="expunge.colours")

    def entry_points(group, name=None):
        return [point] if group == point.group and name in (None, point.name) else []

    monkeypatch.setattr(registry, "entry_points", entry_points)
    from collections import deque

    assert colours.names() == ["green", "red", "violet"]
    assert colours.get("violet") is deque
    assert did_you_mean("violt", colours.names()) == " (did you mean 'violet'?)"


def test_two_classes_cannot_have_one_name(colours, monkeypatch):
    class Red:
        pass

    with pytest.raises(ExpungeError, match=r"^two colours are called 'red': collections:OrderedDict and .*Red; rename one"):
        colours.register("red")(Red)
    assert colours.get("red").__name__ == "OrderedDict"
    points = [EntryPoint(name=name, value="collections:deque", group="expunge.colours") for name in ("green", "violet")]
    points.append(EntryPoint(name="violet", value="collections:Counter", group="expunge.colours"))
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    for name in ("green", "violet"):
        with pytest.raises(ExpungeError, match=f"^two colours are called '{name}': collections:.* and collections:"):
            colours.get(name)


def test_a_class_may_register_again_from_the_same_place(colours):
    for _ in range(2):

        @colours.register("blue")
        class Blue:
            pass

    assert colours.get("blue") is Blue


def test_a_plug_in_file_runs_once(tmp_path, colours, monkeypatch):
    file = tmp_path / "my colours.py"
    file.write_text("runs = []\nruns.append(1)\n")
    assert load_plugin(file) is load_plugin(tmp_path / "." / "my colours.py")
    assert load_plugin(file).runs == [1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, ": not a Python file"),
        ("x = 1\nunknown_name\n", ":2: NameError: name 'unknown_name' is not defined"),
        ("x = (\n", ":1: SyntaxError: '(' was never closed"),
        ("from expunge.errors import ExpungeError\nraise ExpungeError('no')\n", ":2: no"),
    ],
)
def test_a_plug_in_that_fails_is_one_line_with_its_place(tmp_path, text, said):
    file = tmp_path / "plugin.py"
    if text is not None:
        file.write_text(text)
    for _ in range(2):
        with pytest.raises(ExpungeError) as caught:
            load_plugin(file)
        assert str(caught.value).startswith(f"--plugin {file}{said}")


@pytest.mark.parametrize("builtin", [METHODS, SCORERS], ids=lambda registry: registry.kind)
def test_what_is_built_in_is_there_under_its_name(builtin):
    for name in builtin.names():
        assert builtin.get(name).name == name


def test_an_unknown_scorer_is_an_error_for_the_user():
    with pytest.raises(ExpungeError, match=r"^unknown scorer 'ngramm' \(did you mean 'ngram'\?\)$"):
        load_scorer("ngramm")


@pytest.mark.parametrize("builtin", [METHODS, SCORERS], ids=lambda registry: registry.kind)
def test_what_the_source_says_of_a_class_is_what_the_class_says(builtin):
    asked = [
        ("__doc__", ""),
        ("paper", ""),
        *((key, getattr(Method, key)) for key in ("family", "data", "applied", "labelled")),
    ]
    source = Registry(
        builtin.kind, {name: f"{builtin.get(name).__module__}:{builtin.get(name).__name__}" for name in builtin.names()}
    )
    for name in builtin.names():
        for constant, default in asked:
            said = getattr(builtin.get(name), constant, default) or default
            if constant == "__doc__":
                said = inspect.cleandoc(said)
            assert source.about(name, constant, default) == said, (name, constant)


def test_what_a_method_takes_is_listed():
    takes = {entry["name"]: entry["data"] for entry in methods()}
    assert takes["dpo"] == "pairs" and takes["repo"] == "pairs or sets"
    assert takes["probe_directions"] == "pairs or sets and labelled texts"
    assert takes["leace"] == takes["tvi"] == "labelled texts"


def test_about_a_plug_in_it_asks_the_class(colours):
    @colours.register("blue")
    class Blue:
        """Like the sky."""

    assert colours.about("blue", "__doc__") == "Like the sky."
    assert colours.about("blue", "family", "cold") == "cold"
    with pytest.raises(UnknownName):
        colours.about("bleu", "__doc__")
