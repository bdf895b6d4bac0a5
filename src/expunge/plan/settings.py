"""The settings of a run: what was left open filled in, and what does not go together refused.

config = resolve(RunConfig(model="builtin", method={"name": "repo"}))
method, args = build_method(config.method), build_training(config.training, Path("runs/first"), config.seed)
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

from expunge import hub
from expunge.adapters import lora_config
from expunge.config import DataConfig, EvaluationConfig, RunConfig, convert
from expunge.errors import ExpungeError
from expunge.methods import METHODS, Method
from expunge.metrics.evaluation import EvaluationPlan
from expunge.models import is_adapter, loading_options
from expunge.registry import UnknownName, did_you_mean
from expunge.training import UnlearnConfig

BUILTIN_DEFAULTS = Path(__file__).parent.parent / "assets" / "defaults.json"
"""Hyper-parameters tuned for the built-in model, by method; other models start from the paper's."""

ANCHOR = "builtin-anchor"
"""Neutral text under the KL of methods that have one, unless `training.anchor_text` names another, or null."""


def resolve(config: RunConfig) -> RunConfig:
    """`config` with what the user left open: neutral text under a KL, the built-in model's tuned values; no pairs beside two
    sets. Raises ExpungeError where there is nothing to train on, or where neutral text is reported on too."""
    return settled(config)[0]


def settled(config: RunConfig) -> tuple[RunConfig, Method]:
    """The same, and the method that it names."""
    name, tuned = config.method.get("name", "repo"), tuned_values(config)
    method = {"name": name, **tuned.get("method", {}), **{k: v for k, v in config.method.items() if k != "name"}}
    made, data = build_method(method), one_kind(config.data)
    neutral = {"anchor_text": ANCHOR} if "anchor" in made.sides else {}
    training = {**neutral, **tuned.get("training", {}), **config.training}
    if data.train is None and data.forget is None and made.data != "none":
        raise ExpungeError("nothing to train on: give data.train (--pairs), or data.forget and data.retain")
    if training.get("anchor_text") and training["anchor_text"] in (*texts_of(data), data.neutral):
        raise ExpungeError(
            f"training.anchor_text={training['anchor_text']}: it is reported on too, so perplexity or F1 would be held "
            "where it is measured; name other text, or null"
        )
    return dataclasses.replace(config, method=method, training=training, data=data), made


def tuned_values(config: RunConfig) -> dict[str, dict[str, Any]]:
    """The built-in model's tuned values for the method, by section; of other models none."""
    if config.model != "builtin":
        return {}
    return json.loads(BUILTIN_DEFAULTS.read_text(encoding="utf-8")).get(config.method.get("name", "repo"), {})


def one_kind(data: DataConfig) -> DataConfig:
    """Without pairs where two sets are given. Raises ExpungeError for one set alone, and for other pairs beside two."""
    if data.forget is None and data.retain is None:
        return data
    if data.forget is None or data.retain is None:
        given, missing = ("forget", "retain") if data.retain is None else ("retain", "forget")
        raise ExpungeError(f"data.{given} without data.{missing}: give both (a set with labels may be both)")
    if data.train not in (None, DataConfig.train):
        raise ExpungeError(f"data.train={data.train!r} beside data.forget and data.retain: give pairs, or the two sets")
    return dataclasses.replace(data, train=None)


def build_method(settings: dict[str, Any]) -> Method:
    """The method named by `settings["name"]` with its hyper-parameters; ExpungeError for an unknown name or key."""
    settings = dict(settings)
    try:
        cls = METHODS.get(settings.pop("name", "repo"))
    except UnknownName as error:
        raise ExpungeError(str(error)) from None
    return cls(**_checked(cls, settings, "method"))


def build_training(settings: dict[str, Any], folder: Path, seed: int, quiet: bool = False) -> UnlearnConfig:
    """UnlearnConfig with `settings`; checkpoints go to `folder`."""
    values = _checked(UnlearnConfig, settings, "training")
    values.setdefault("seed", seed)
    values.setdefault("disable_tqdm", quiet)
    try:
        args = UnlearnConfig(output_dir=str(folder), **values)
    except ValueError as error:
        raise ExpungeError(f"training: {' '.join(str(error).split())}") from None
    hub.check_settings(args)
    return args


def texts_of(data: DataConfig) -> list[str]:
    """The texts that perplexity is reported on, by name."""
    return [*([data.corpus] if data.corpus else []), *data.corpora]


def check_model(config: RunConfig, trains: bool) -> None:
    """Raise ExpungeError, before any weight is read, for settings of the model that do not go together.

    trains: does the method train, or is it fitted and applied?
    """
    merged = lora_of(config)[1]
    if config.lora is not None and not trains:
        raise ExpungeError(f"lora: {config.method['name']} trains nothing, an adapter least of all; leave it out")
    loading_options(config.dtype or "float32", config.attn_implementation, config.quantization, config.trust_remote_code)
    if config.quantization and config.lora is None:
        raise ExpungeError(
            f"quantization={config.quantization}: quantized weights cannot be trained; add an adapter: lora.r=16"
        )
    if config.quantization and merged:
        raise ExpungeError(
            "lora.merge=true: an adapter cannot be merged into the quantized weights that it was trained on; leave it out. "
            "load_model(OUT/model, dtype='float32') merges it into the weights that they were made from"
        )
    if not is_adapter(config.model, config.revision):
        return
    if config.quantization or config.dtype not in (None, "float32"):
        raise ExpungeError(
            f"{config.model}: an adapter is merged into its base before training goes on, which lower precision would round "
            "off: leave out dtype and quantization"
        )
    if config.lora is not None and not merged:
        raise ExpungeError(
            f"{config.model}: an adapter on top of an adapter is no model by itself: add lora.merge=true, or leave out lora "
            "to train all weights"
        )


def lora_of(config: RunConfig) -> tuple[dict[str, Any], bool]:
    """Fields of peft.LoraConfig, which are checked, and whether the export is merged."""
    settings = dict(config.lora or {})
    merged = convert(bool, settings.pop("merge", False), "lora.merge")
    lora_config(settings)
    return settings, merged


def loading(config: RunConfig) -> dict[str, Any]:
    """How `load_model` is to load the weights, the revision aside."""
    names = ("device_map", "attn_implementation", "quantization", "trust_remote_code")
    return {"dtype": config.dtype or "float32", **{name: getattr(config, name) for name in names}}


def check_unreported(config: RunConfig, *keys: str) -> None:
    """Raise ExpungeError for a set of `config.monitor` that is reported too: a choice by it would flatter the report."""
    data = config.data
    reported = {"prompts": [*data.prompts, data.neutral], "corpus": [*texts_of(data), data.neutral, data.heldout]}
    for key in keys:
        if (name := getattr(config.monitor, key)) is not None and name in reported[key]:
            raise ExpungeError(f"monitor.{key}={name}: it is reported too; measure other text in the midst of training")


def _checked(cls: type, settings: dict[str, Any], section: str) -> dict[str, Any]:
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init and field.name != "output_dir"}
    for key in settings:
        if key not in fields:
            raise ExpungeError(f"unknown key {section + '.' + key!r}{did_you_mean(key, fields)}")
    simple = (int, float, bool, str, type(None))
    return {
        key: convert(hint, value, f"{section}.{key}") if all(part in simple for part in get_args(hint) or [hint]) else value
        for key, value in settings.items()
        for hint in [fields[key].type]
    }


def evaluation_plan(config: EvaluationConfig) -> EvaluationPlan:
    """How much of what is measured."""
    return EvaluationPlan(
        samples=config.samples,
        max_new_tokens=config.max_new_tokens,
        prompt_tokens=config.prompt_tokens,
        truncate=config.truncate,  # type: ignore[arg-type]
        ks=tuple(config.forced),
        perplexity_tokens=config.perplexity_tokens,
        seed=config.seed,
    )
