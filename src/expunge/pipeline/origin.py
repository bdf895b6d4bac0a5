"""What a finished model was made from, and whether that is still what lies there. Finished work is never made anew over it.

inputs = inputs_of(config, args, data, probed)      # hashes, by what they are of
check_made(folder, inputs)                          # raises where OUT/model came from something else
run = origin_of(Path("runs/first"))                 # its model, method and loading, compared with what it recorded
"""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from expunge.assembly import build_method, loading, monitor_data
from expunge.callbacks import Mark
from expunge.config import RunConfig
from expunge.data import Pair, Unpaired, load_corpus
from expunge.errors import ExpungeError
from expunge.models import identity_of
from expunge.monitor import light_plan
from expunge.pipeline.paths import restored
from expunge.provenance import data_digest, digest
from expunge.scorers import load_scorer
from expunge.training import UnlearnConfig

log = logging.getLogger("expunge")

WHAT = {
    "model": "the model",
    "settings": "settings, which another version fills in otherwise",
    "data": "the data that is trained on",
    "probe": "the data of probes",
    "anchor": "training.anchor_text",
    "monitor": "what is measured in the midst of training",
}


def inputs_of(
    config: RunConfig,
    args: UnlearnConfig,
    data: list[Pair] | Unpaired,
    probed: Sequence[tuple[str, bool]],
    tokenizer: Any,
) -> dict[str, Any]:
    """Hashes of all that training follows from, by what they are of; of the model those of its parts."""
    model = identity_of(config.model, config.revision)
    how = {**model.loaded(loading(config)), "model": None}
    method: Any = build_method(config.method)
    settings = [how, config.method.get("name"), dataclasses.asdict(method), config.training, config.lora, config.seed]
    inputs: dict[str, Any] = {"model": model.parts, "settings": digest(settings), "data": data_digest(data)}
    if probed:
        inputs["probe"] = data_digest(probed)
    if args.anchor_text:
        inputs["anchor"] = data_digest(load_corpus(args.anchor_text))
    if method.applied:
        if config.monitor.corpus and config.method.get("match_perplexity"):
            inputs["monitor"] = digest([data_digest(load_corpus(config.monitor.corpus)), config.monitor.tokens])
    elif watched := monitor_data(config, args, tokenizer):  # what is measured decides which checkpoint is best
        plan = light_plan(config.monitor.samples, config.monitor.tokens, config.evaluation)
        inputs["monitor"] = digest([data_digest(watched), plan, load_scorer(config.monitor.scorer).digest])
    return inputs


def is_made(folder: Path, inputs: Mapping[str, Any]) -> bool:
    """Is the model in `folder` finished?

    Raises ExpungeError where it is, but was made from something else, or is not what training left there.
    """
    path = folder / "stages" / "train.json"
    record = read_record(path) if path.exists() else {}
    if not record or not (folder / "model").is_dir():
        return False
    _compare(folder, record, inputs, "choose another --out, or bring back what was there")
    return True


def check_run(folder: Path, config: Mapping[str, Any] | None) -> None:
    """Raise ExpungeError where a run's model, or, unless `config` is None, the reference that it names, is another now."""
    record = record_of(folder, "train")
    if record:
        if config and Path(config["model"]).is_absolute() and not Path(config["model"]).exists():
            raise ExpungeError(
                f"{folder}: {config['model']}, which it was made from, is no longer there: bring it back, or name its place "
                "by --reference"
            )
        model = {"model": identity_of(config["model"], config.get("revision")).parts} if config else {}
        _compare(folder, record, model, "bring it back, or name the models themselves: RUN/model, and --reference")


def _compare(folder: Path, record: Mapping[str, Any], inputs: Mapping[str, Any], advice: str) -> None:
    before, made = record.get("inputs"), record.get("made")
    if not isinstance(before, dict) or not isinstance(made, dict):
        raise ExpungeError(
            f"{folder}: its record of training, stages/train.json, does not say what the model was made from, as older "
            "versions left it: choose another --out"
        )
    if changed := changes(before, inputs):
        raise ExpungeError(f"{folder}/model was made before this changed: {changed}; {advice}")
    if parts := identity_of(folder / "model").changed(made):
        raise ExpungeError(f"{folder}/model is not what the run left there ({', '.join(parts)} changed since); {advice}")


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In words, what of `now` is not what it was; "" where all is."""
    looked_at = {**before, **now} if "settings" in now else now  # of a run that is only read the model alone
    names = [name for name in looked_at if now.get(name) != before.get(name)]
    told = [WHAT.get(name, name) for name in names]
    if "model" in names:
        was, is_ = before.get("model") or {}, now.get("model") or {}
        parts = [part for part in {**was, **is_} if was.get(part) != is_.get(part)]
        told[names.index("model")] = f"the model's {' and '.join(parts)}"
    return ", ".join(told)


def set_others_aside(checkpoints: Path, inputs: Mapping[str, Any]) -> None:
    """Rename a folder of checkpoints that do not come from `inputs`, such as of pairs that changed since, and say so."""
    mark = Mark.read(checkpoints)
    if not any(checkpoints.glob("checkpoint-*")) or mark == inputs:
        return
    number = 1
    while (aside := checkpoints.with_name(f"{checkpoints.name}-earlier-{number}")).exists():
        number += 1
    checkpoints.rename(aside)
    changed = changes(mark, inputs) if mark else "something else"
    log.warning("train: the checkpoints that were there come from other inputs (%s): kept in %s", changed, aside)


def origin_of(folder: Path, reference: str | None = None) -> dict[str, Any]:
    """What the run in `folder` started from: `model`, `method`, and `loading`, how the model was loaded, but for code of its
    own, as the run may be another's. Empty where it holds no run.

    reference: another model to compare with. Raises ExpungeError where the run's model, or the one that it started from and
    would be compared with, changed since.
    """
    run = settings_of_run(folder)
    if not run:
        return {}
    check_run(folder, None if reference else run)
    how = {name: run.get(name) for name in ("revision", "dtype", "attn_implementation", "quantization")}
    loading = {name: value for name, value in how.items() if value}
    return {"model": run["model"], "method": run.get("method") or {}, "loading": loading}


def settings_of_run(folder: Path) -> dict[str, Any]:
    """The configuration that the run in `folder` kept, with its paths as they are now; empty where it holds no run."""
    path = folder / "config.yaml"
    if not path.is_file() or not (folder / "model").is_dir():
        return {}
    try:
        run = yaml.safe_load(path.read_text(encoding="utf-8"))
        known = {key: value for key, value in run.items() if key in {field.name for field in dataclasses.fields(RunConfig)}}
        return restored({**known, "model": run["model"]}, folder)
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, KeyError):
        raise ExpungeError(f"{path}: not the configuration of a run: name its model's folder, and --reference") from None


def record_of(folder: Path, stage: str) -> dict[str, Any]:
    """What a stage left of itself, in stages/ or, where a sweep has removed that, in provenance.json; empty where it did not
    run."""
    path = folder / "stages" / f"{stage}.json"
    if path.exists():
        return read_record(path)
    provenance = folder / "provenance.json"
    return dict(read_record(provenance).get("stages", {}).get(stage, {})) if provenance.exists() else {}


def read_record(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ExpungeError(f"{path}: not the JSON object that the stage left: remove it, and the stage runs again") from None
