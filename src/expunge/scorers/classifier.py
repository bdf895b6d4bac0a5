"""Any sequence classifier of transformers as a scorer: the probability of one of its labels.

load_scorer("hf:unitary/unbiased-toxic-roberta").score(["a kind word"])
load_scorer("hf:./mine@LABEL_1")                                            # the label named

multi-label, or one label    score = sigmoid(z_label)
several exclusive labels     score = softmax(z)_label
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from expunge.errors import ExpungeError
from expunge.models import in_batches, loaded_identity, reading
from expunge.scorers.base import Scorer

BATCH_TOKENS = 8192
LONGEST = 512  # tokens read of a text, or fewer where the classifier says so

log = logging.getLogger("expunge")


class ClassifierScorer(Scorer):
    """The probability of one label of a sequence classifier from the hub or a folder; `name` without `hf:`."""

    def __init__(self, name: str):
        source, _, label = name.rpartition("@") if "@" in name else (name, "", "")
        with reading(source, "sequence classifier", "its weights"):
            model, info = AutoModelForSequenceClassification.from_pretrained(
                source, use_safetensors=True, output_loading_info=True
            )
        with reading(source, "sequence classifier", "its tokenizer"):
            self.tokenizer: Any = AutoTokenizer.from_pretrained(source)
        if info["missing_keys"]:
            raise ExpungeError(
                f"hf:{source}: no sequence classifier: {sorted(info['missing_keys'])[0]} is not in its weights"
            )
        if self.tokenizer.pad_token_id is None:
            raise ExpungeError(f"hf:{source}: its tokenizer has no pad token, which batches need")
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self.label, why = choose_label(model.config.id2label, label, f"hf:{source}")
        self.exclusive = model.config.num_labels > 1 and model.config.problem_type != "multi_label_classification"
        self.longest = min(LONGEST, self.tokenizer.model_max_length)
        named = model.config.id2label[self.label]
        self.name = f"hf:{source}@{named}"
        facts = {
            **loaded_identity(model, self.tokenizer).parts,
            "label": self.label,
            "longest": self.longest,
        }
        self.digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
        log.info("%s: label %r (%s), %s", self.name, named, why, "softmax" if self.exclusive else "sigmoid")

    def score(self, texts: Sequence[str]) -> np.ndarray:
        scores = np.zeros(len(texts))
        filled = [i for i, text in enumerate(texts) if text.strip()]
        if not filled:
            return scores
        encoded = self.tokenizer([texts[i] for i in filled], truncation=True, max_length=self.longest, verbose=False)
        rows = dict(zip(filled, encoded["input_ids"], strict=True))
        order = sorted(filled, key=lambda i: len(rows[i]), reverse=True)

        def work(batch: Sequence[int]) -> None:
            padded = self.tokenizer.pad({"input_ids": [rows[i] for i in batch]}, return_tensors="pt").to(self.model.device)
            with torch.inference_mode():
                logits = self.model(**padded).logits.double()
            found = logits.softmax(-1) if self.exclusive else logits.sigmoid()
            scores[list(batch)] = found[:, self.label].cpu().numpy()

        in_batches(order, lambda first: BATCH_TOKENS // len(rows[first]), work)
        return scores


def choose_label(labels: Mapping[int, str], wanted: str, name: str) -> tuple[int, str]:
    """The number of the label that means toxic, and why it is that one: named, the only one, or called so.

    Raises ExpungeError, with all labels, where that is not plain.
    """
    known = ", ".join(map(repr, labels.values()))
    if wanted:
        found = [number for number, label in labels.items() if label.lower() == wanted.lower()]
        if not found:
            raise ExpungeError(f"{name}: no label {wanted!r} (labels: {known})")
        return found[0], "as asked"
    if len(labels) == 1:
        return next(iter(labels)), "the only one"
    called = [number for number, label in labels.items() if label.lower() in ("toxic", "toxicity")]
    if len(called) != 1:
        raise ExpungeError(f"{name}: no single label is called toxic or toxicity; add @LABEL to its name (labels: {known})")
    return called[0], "the one called so"
