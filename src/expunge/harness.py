"""Tasks of EleutherAI's lm-evaluation-harness on a model that is loaded, adapters and steering included.

    figures = run_harness(model, tokenizer, ["wmdp_cyber"], limit=256)

`mmlu`, `wmdp`, `wmdp_bio`, `wmdp_chem` and `wmdp_cyber` are read from task files of ours, which take the named sets of
`expunge.data`, so that no hub is needed: the same questions and examples as `data.questions` has, asked in the same words.
For the harness's own command they lie in `expunge.harness.TASKS`: `lm_eval --include_path FOLDER`. Any other name is a task
of the harness itself, with the hub set that it names.
"""

import contextlib
import copy
import io
import logging
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers.processors import TemplateProcessing

from expunge.data.multiple_choice import SHOTS, load_questions
from expunge.errors import ExpungeError
from expunge.ids import encode, leading_tokens
from expunge.metrics.figures import Figure, Key
from expunge.models import context_length, evaluating
from expunge.provenance import data_digest, digest

TASKS = Path(__file__).parent / "tasks"
OURS = {
    "mmlu": ("mmlu",),
    "wmdp": ("wmdp-bio", "wmdp-chem", "wmdp-cyber"),
    **{f"wmdp_{part}": (f"wmdp-{part}",) for part in ("bio", "chem", "cyber")},
}
"""The named sets behind the tasks of our files."""

METRIC, MODE = "acc", "harness"


def run_harness(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    limit: int | None = None,
    shots: int = SHOTS,
    seed: int = 0,
    progress: bool = False,
) -> list[Figure]:
    """The accuracy of each task, a group's tasks one by one, question by question as the harness judges them.

    limit: so many questions of each task, of ours drawn with `seed` as `load_questions` does, of others the first. shots:
    solved examples before those of mmlu. Raises ExpungeError for an unknown task, or one without accuracy.
    """
    samples = harness_samples(model, tokenizer, tasks, limit, shots, seed, progress)
    found = []
    for task, answers in samples.items():
        if METRIC not in answers[0]:
            raise ExpungeError(f"evaluation.harness: {task} has no accuracy (it has {', '.join(answers[0]['metrics'])})")
        right = np.array([answer[METRIC] for answer in answers], dtype=np.float64)
        chance = np.array([1 / len(answer["filtered_resps"]) for answer in answers])
        found.append(Figure.accuracy(Key("accuracy", task, mode=MODE), right, chance))
    return found


def harness_samples(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    limit: int | None = None,
    shots: int = SHOTS,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, list[dict[str, Any]]]:
    """By task, what the harness notes of each question: `filtered_resps` (log p, greedy) of each choice, `acc`, ..."""
    check_harness(tasks)
    import lm_eval
    from lm_eval.tasks import TaskManager

    evaluate: Any = lm_eval.simple_evaluate  # of no type that a checker knows
    chosen = {"limit": limit, "shots": shots, "seed": seed}  # what `task_rows` is called with
    with _quiet(progress), evaluating(model):
        manager = TaskManager(include_path=TASKS, include_defaults=not set(tasks) <= set(OURS), metadata=chosen)
        loaded = _load(manager, tasks)
        found = evaluate(
            harness_model(model, tokenizer),
            tasks=loaded,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=0,
            random_seed=None,  # the caller's stay
            numpy_random_seed=None,
            torch_random_seed=None,
        )
    return {task: sorted(answers, key=lambda answer: answer["doc_id"]) for task, answers in found["samples"].items()}


def _load(manager: Any, tasks: Sequence[str]) -> list[Any]:
    """The harness's objects of these tasks, and of those in a group."""
    for task in tasks:
        if task not in manager.all_tasks:
            raise ExpungeError(f"evaluation.harness: {task!r} is no task; `lm_eval ls tasks` names those there are")
    try:
        return list(manager.load(list(tasks))["tasks"].values())
    except ExpungeError:
        raise
    except Exception as error:  # of reading a hub set: the library's own, urllib's, httpx's and plain ones alike
        reason = str(error).strip().split("\n")[0]
        raise ExpungeError(f"evaluation.harness={list(tasks)}: the harness cannot load its tasks ({reason})") from None


def harness_model(model: Any, tokenizer: Any, batch_size: int = 16) -> Any:
    """The model as the harness takes it: its context as we measure it, its softmax in float32 whatever the weights are.

    Of what the tokenizer puts around a text it keeps what stands before: after an eos there is no answer.
    """
    check_harness()
    from lm_eval.models import huggingface

    wrap: Any = huggingface.HFLM
    tokenizer = _without_trailing(copy.deepcopy(tokenizer))  # it is given a pad token
    tokenizer.model_max_length = sys.maxsize  # what is too long is cut later, not complained of
    return wrap(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        max_length=context_length(model),
        softmax_dtype="float32",
        batch_size=batch_size,
    )


def _without_trailing(tokenizer: Any) -> Any:
    """The tokenizer, changed where it puts special tokens after a text: now it puts none there."""
    lead = leading_tokens(tokenizer)
    if tokenizer("a")["input_ids"] == lead + encode(tokenizer, "a"):
        return tokenizer
    if not tokenizer.is_fast:
        raise ExpungeError("evaluation.harness: the tokenizer appends special tokens to a text; switch that off and save it")
    names = tokenizer.convert_ids_to_tokens(lead)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*names, "$A"], special_tokens=list(zip(names, lead, strict=True))
    )
    return tokenizer


def check_harness(tasks: Sequence[str] = ()) -> None:
    """Raise ExpungeError where the harness is not installed, or tasks ask the same questions twice."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise ExpungeError("lm-evaluation-harness is not installed; pip install 'expunge[eval]'") from None
    sets = [name for task in tasks for name in OURS.get(task, (task,))]
    if twice := [name for name in sets if sets.count(name) > 1]:
        raise ExpungeError(f"evaluation.harness={list(tasks)}: {twice[0]} is asked twice; name each task once")


def task_rows(source: str, limit: int | None = None, shots: int = SHOTS, seed: int = 0, **_: Any) -> Any:
    """The test split of one of our task files, which name this function; further arguments are the harness's own."""
    from datasets import Dataset

    rows = [vars(question) for question in load_questions(source, limit, seed, shots)]
    return {"test": Dataset.from_list([{**row, "choices": list(row["choices"])} for row in rows])}


def harness_version() -> str:
    return version("lm_eval")


def fingerprint(tasks: Sequence[str], limit: int | None, shots: int, seed: int) -> str:
    """Of what decides the figures beside the model: the harness, its arguments, and the questions of our tasks.

    Questions of the harness's own tasks are hub sets: they stand by name, with the version of the harness.
    """
    sets = [name for task in tasks for name in OURS.get(task, ())]
    questions = [load_questions(name, limit, seed, shots) for name in sets]
    return digest([harness_version(), list(tasks), limit, shots, seed, data_digest(questions)])


@contextlib.contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """Without the harness's warnings, which are of how it is called here, and without its bars unless asked for."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.nullcontext() if progress else contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
