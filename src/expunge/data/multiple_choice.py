"""Multiple-choice questions, as a prompt and the texts of which one should follow it.

    questions = load_questions("wmdp-cyber", limit=256)
    questions = load_questions("mmlu", shots=5)             # five solved examples of the subject in each prompt

A row is `{"question", "choices", "answer"}`, asked as lm-evaluation-harness asks MMLU and WMDP: the choices are listed under
letters, and a letter is the answer. Or it is `{"prompt", "choices", "answer"}`, a cloze: each choice is read as what follows
the prompt, and brings its own leading space. `answer` counts from 0; `subject` may be there. A table has columns `choice0`,
`choice1`, ... in place of `choices`.
"""

import random
import string
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge.data.named import File, NamedSet, local_file, locate
from expunge.data.pairs import text_of
from expunge.data.records import Record, hub_records, named_records, read_records, selected
from expunge.errors import ExpungeError

LETTERS = string.ascii_uppercase
SUBJECTS = {"wmdp-bio": "biology", "wmdp-chem": "chemistry", "wmdp-cyber": "cybersecurity"}
"""What the harness calls the sets that do not say it themselves."""

SHOTS = 5


@dataclass(frozen=True)
class Question:
    """`choices` may follow `prompt`, each with its own leading space; `answer` is the place of the right one among them."""

    prompt: str
    choices: tuple[str, ...]
    answer: int
    subject: str = ""


def load_questions(source: str | Path, limit: int | None = None, seed: int = 0, shots: int = SHOTS) -> list[Question]:
    """The questions of a named set, a file, or a hub set's test split, in order.

    limit: so many, drawn at random with `seed`, order kept; all are checked. shots: solved examples before each question of
    mmlu, the first of its subject's dev split; no other set has any. Raises ExpungeError, with file and line.
    """
    found = locate(source, "questions")
    subject = SUBJECTS.get(str(source), "")
    examples = _examples(found, shots) if isinstance(found, NamedSet) and found.name == "mmlu" and shots else {}

    def read() -> Iterator[Question]:
        return (parse_question(row, where, subject, examples) for where, row in _records(found))

    questions = selected(read, limit, lambda n, few: random.Random(seed).sample(range(n), few), "question")
    if not questions:
        raise ExpungeError(f"{source}: no question in it")
    return questions


def parse_question(
    row: dict[str, Any], where: str, subject: str = "", examples: Mapping[str, str] | None = None
) -> Question:
    """One row as a question; `where` names it in errors. examples: by subject, what is put before a question of it."""
    lettered = "question" in row
    if not lettered and "prompt" not in row:
        raise ExpungeError(f"{where}: no field 'question' or 'prompt' (found: {', '.join(map(str, row)) or 'none'})")
    text = text_of(row, "question" if lettered else "prompt", where)
    choices, answer = _choices(row, where), str(row.get("answer"))
    if not (answer.isdecimal() and int(answer) < len(choices)):
        raise ExpungeError(
            f"{where}: field 'answer' must be the number of a choice, 0 to {len(choices) - 1}, found {row.get('answer')!r}"
        )
    subject = str(row.get("subject") or subject)
    if not lettered:
        if len(set(choices)) < len(choices):
            raise ExpungeError(f"{where}: two choices are the same, so that neither can be the likelier one")
        return Question(text, choices, int(answer), subject)
    if len(choices) > len(LETTERS):
        raise ExpungeError(
            f"{where}: {len(choices)} choices, more than there are letters; write it as a cloze, with 'prompt'"
        )
    prompt = heading(subject) + (examples or {}).get(subject, "") + listed(text, choices)
    return Question(prompt, tuple(f" {letter}" for letter in LETTERS[: len(choices)]), int(answer), subject)


def heading(subject: str) -> str:
    """What the harness says before questions; a subject's name is written with spaces."""
    about = f" about {subject.replace('_', ' ')}" if subject else ""
    return f"The following are multiple choice questions (with answers){about}.\n\n"


def listed(question: str, choices: tuple[str, ...]) -> str:
    """A question with its choices under letters, up to where a letter should follow."""
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return "\n".join([question.strip(), *lines, "Answer:"])


def _choices(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    numbered = [row[name] for name in map("choice{}".format, range(len(row))) if name in row]
    choices = row.get("choices", numbered or None)
    if not isinstance(choices, list):
        raise ExpungeError(f"{where}: no list 'choices', nor columns choice0, choice1 (found: {', '.join(map(str, row))})")
    if len(choices) < 2:
        raise ExpungeError(f"{where}: {len(choices)} choices; a question needs two or more")
    for number, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice.strip():
            raise ExpungeError(f"{where}: choice {number} must be text, found {choice!r}")
    return tuple(choices)


def _records(found: NamedSet | File | str, split: str = "test") -> Iterator[Record]:
    """Rows of a set; of mmlu also those of its dev split, each with its subject."""
    if isinstance(found, File):
        return read_records(found)
    if isinstance(found, str):
        return hub_records(found, split)
    if found.name != "mmlu":
        return named_records(found)
    if folder := local_file(found):
        return _tables(folder / split, f"_{split}")
    if split == found.split:
        return named_records(found)
    return hub_records(found.hub or "", split, found.config)


def _tables(folder: Path, ending: str) -> Iterator[Record]:
    """MMLU's tables, one for each subject."""
    files = sorted(folder.glob(f"*{ending}.csv"))
    if not files:
        raise ExpungeError(
            f"{folder}: no tables of MMLU, SUBJECT{ending}.csv with columns question, choice0 to choice3, answer"
        )
    for file in files:
        for where, row in read_records(file):
            yield where, {**row, "subject": file.stem.removesuffix(ending)}


def _examples(found: NamedSet, shots: int) -> dict[str, str]:
    """By subject: its first `shots` questions of the dev split, each with its answer."""
    solved: dict[str, list[str]] = defaultdict(list)
    for where, row in _records(found, "dev"):
        question = parse_question(row, where)
        text = question.prompt.removeprefix(heading(question.subject))
        solved[question.subject].append(f"{text}{question.choices[question.answer]}\n\n")
    for subject, texts in solved.items():
        if len(texts) < shots:
            raise ExpungeError(f"{found.name}: {len(texts)} examples of {subject}, fewer than evaluation.shots={shots}")
    return {subject: "".join(texts[:shots]) for subject, texts in solved.items()}
