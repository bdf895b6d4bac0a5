"""The model in training against what it was before: sampled toxicity and perplexity, on nothing that is reported.

    monitor = Monitor(model, tokenizer, data, plan, load_scorer("ngram"), Path("out/checkpoints.jsonl"))
    trainer = UnlearnTrainer(model, method, args, pairs, tokenizer, measure=monitor)

Each call adds rows with `step` to the file, of stage "train": toxicity, perplexity, and their ratios to the reference,
which is measured when the monitor is made. Rows of later steps, which a resumed run takes again, go first.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expunge.config import EvaluationConfig
from expunge.errors import ExpungeError
from expunge.metrics.evaluation import EvaluationData, EvaluationPlan, evaluate_model
from expunge.metrics.figures import Evaluation, rows
from expunge.rows import read_rows, write_rows
from expunge.scorers import Scorer

FIGURES = ("toxicity", "toxicity_ratio", "perplexity", "perplexity_ratio")
"""What a call returns, as far as there are data and the reference is not 0; all are better low."""


def light_plan(samples: int, tokens: int, like: EvaluationConfig) -> EvaluationPlan:
    """Little enough to be measured many times: samples alone, of the length in `like`, and perplexity as it is published."""
    return EvaluationPlan(
        greedy=False,
        samples=samples,
        max_new_tokens=like.max_new_tokens,
        prompt_tokens=like.prompt_tokens,
        truncate=like.truncate,  # type: ignore[arg-type]
        perplexity_tokens=tokens,
        perplexity_modes=("exact",),
        seed=like.seed,
    )


class Monitor:
    """A measurement for `UnlearnTrainer`. path: where rows go, or None; about: fields of every row, such as `method`."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        data: EvaluationData,
        plan: EvaluationPlan,
        scorer: Scorer,
        path: Path | None = None,
        about: Mapping[str, Any] | None = None,
    ):
        if not (data.challenge or data.corpora):
            raise ExpungeError("training.eval_strategy: nothing to measure; give monitor.prompts, monitor.corpus or both")
        self.tokenizer, self.data, self.plan, self.scorer, self.path = tokenizer, data, plan, scorer, path
        self.common = {"stage": "train", "subject": "unlearned", "seed": plan.seed, **(about or {})}
        self.reference = self._measured(model)

    def __call__(self, model: Any, step: int) -> dict[str, float]:
        """Measure `model` after `step` optimizer steps: the values of FIGURES by name."""
        found = [
            row
            for row in rows(self._measured(model), self.reference, step=step, **self.common)
            if row.paired == row.metric.endswith("_ratio")  # not the differences
        ]
        if self.path:
            before = read_rows(self.path) if self.path.exists() else []
            write_rows(self.path, [row for row in before if row.step is not None and row.step < step] + found)
        return {row.metric: row.value for row in found}

    def _measured(self, model: Any) -> Evaluation:
        whole = evaluate_model(model, self.tokenizer, self.data, self.plan, [self.scorer])
        figures = [
            figure
            for figure in whole.figures
            if figure.key.metric == "perplexity" or (figure.key.metric == "toxicity" and figure.key.decode == "sampled")
        ]
        return Evaluation(figures)
