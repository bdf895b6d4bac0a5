"""What a finished model was made from, and whether that is still what lies there. Finished work is never made anew over it.

made = is_made(folder, training_inputs(plan))       # raises where OUT/model came from something else
run = origin_of(Path("runs/first"))                 # its model, method and loading, compared with what it recorded
"""

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from expunge.callbacks import Mark
from expunge.config import RunConfig
from expunge.errors import ExpungeError
from expunge.models import identity_of
from expunge.pipeline.paths import restored
from expunge.plan import changes

log = logging.getLogger("expunge")


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
