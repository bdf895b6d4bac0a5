"""What a configuration stands for: its method, the trainer's arguments, data to train on, and what is measured.

    config = resolve(RunConfig(model="builtin", method={"name": "repo"}))
    method, args = build_method(config.method), build_training(config.training, Path("runs/first"), config.seed)

Nothing here trains, measures or writes. What does not go together raises ExpungeError, one line.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, get_args

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from expunge import harness, hub
from expunge.adapters import lora_config
from expunge.config import DataConfig, EvaluationConfig, RunConfig, convert
from expunge.data import Pair, Unpaired, load_corpus, load_pairs, load_probe_data, load_prompts, load_unpaired
from expunge.data.multiple_choice import load_questions
from expunge.errors import ExpungeError
from expunge.methods import METHODS, Method
from expunge.metrics.evaluation import EvaluationData, EvaluationPlan
from expunge.metrics.s_unlearning import check_sets
from expunge.models import is_adapter, load_outline, loading_options, quantization_of
from expunge.monitor import FIGURES
from expunge.registry import UnknownName, did_you_mean
from expunge.training import UnlearnConfig

PROBE_TEXTS = 4000
"""At most so many labelled texts, or pairs, are read for a probe."""

BUILTIN_DEFAULTS = Path(__file__).parent / "assets" / "defaults.json"
"""Hyper-parameters tuned for the built-in model, by method; other models start from the paper's."""

ANCHOR = "builtin-anchor"
"""Neutral text under the KL of methods that have one, unless `training.anchor_text` names another, or null."""


def resolve(config: RunConfig) -> RunConfig:
    """`config` with what the user left open: neutral text under a KL, the built-in model's tuned values; no pairs beside two
    sets. Raises ExpungeError where there is nothing to train on, or where neutral text is reported on too."""
    name, tuned = config.method.get("name", "repo"), _tuned(config)
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
    return dataclasses.replace(config, method=method, training=training, data=data)


def _tuned(config: RunConfig) -> dict[str, dict[str, Any]]:
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


def explained(config: RunConfig, outline: PreTrainedConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """Every field of the method as it is in a model of this depth; and of what was left open what it is, whether that is
    the paper's, scaled to the depth, or ours, and why. Raises ExpungeError for blocks that are not there."""
    resolved, depth = resolve(config), outline.get_text_config().num_hidden_layers
    method = build_method(resolved.method)
    fields = {"name": resolved.method["name"], **dataclasses.asdict(method.placed(depth))}  # type: ignore[call-overload]
    given = {"method": config.method, "training": config.training}
    anchor = {"training.anchor_text": f"{ANCHOR} (ours: neutral text under the KL)"}
    return fields, (anchor if resolved.training.get("anchor_text") == ANCHOR else {}) | {
        f"{section}.{name}": f"{value} (ours: tuned for the built-in model)"
        for section, values in _tuned(config).items()
        for name, value in values.items()
        if name not in given[section]
    } | {
        f"method.{name}": f"{default.value} ({default.source}: {default.why})"
        for name, default in method.left_open(depth).items()
    }


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


def check_model(config: RunConfig) -> None:
    """Raise ExpungeError, before any weight is read, for settings of the model that do not go together."""
    merged = lora_of(config)[1]
    if config.lora is not None and build_method(config.method).applied:
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


def check_trainable(config: RunConfig, outline: PreTrainedConfig) -> None:
    """The same for a checkpoint that says that it is quantized itself. outline: its configuration."""
    own = quantization_of(outline)
    if own is None or build_method(config.method).applied:
        return
    if config.lora is None:
        raise ExpungeError(
            f"{config.model}: quantized already ({own}), and quantized weights cannot be trained; add an adapter: lora.r=16"
        )
    if lora_of(config)[1]:
        raise ExpungeError(
            f"lora.merge=true: an adapter cannot be merged into quantized weights, as those of {config.model} are ({own}); "
            "leave it out"
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


def monitor_data(config: RunConfig, args: UnlearnConfig, tokenizer: Any) -> EvaluationData | None:
    """What is measured in the midst of training; None without `training.eval_strategy`.

    Raises ExpungeError for a set that is reported too: what is stopped or chosen by it would flatter the report.
    """
    if args.eval_strategy == "no":
        return None
    monitor = config.monitor
    check_unreported(config, "prompts", "corpus")
    best = args.metric_for_best_model
    if best and best.removeprefix("eval_") not in FIGURES:
        raise ExpungeError(f"training.metric_for_best_model={best!r}: not measured{did_you_mean(best, FIGURES)}")
    if not (monitor.prompts or monitor.corpus):
        raise ExpungeError("training.eval_strategy: nothing to measure; give monitor.prompts, monitor.corpus or both")
    prompts = load_prompts(monitor.prompts, monitor.limit, tokenizer) if monitor.prompts else []
    return EvaluationData(
        challenge={monitor.prompts: [prompt.text for prompt in prompts]} if monitor.prompts else {},
        corpora={monitor.corpus: load_corpus(monitor.corpus)} if monitor.corpus else {},
    )


def check_unreported(config: RunConfig, *keys: str) -> None:
    data = config.data
    reported = {"prompts": [*data.prompts, data.neutral], "corpus": [*texts_of(data), data.neutral, data.heldout]}
    for key in keys:
        if (name := getattr(config.monitor, key)) is not None and name in reported[key]:
            raise ExpungeError(f"monitor.{key}={name}: it is reported too; measure other text in the midst of training")


def steps_of(args: UnlearnConfig, rows: int) -> int:
    """Optimizer steps on one device, over so many pairs or texts to forget."""
    if args.max_steps > 0:
        return args.max_steps
    a_pass = math.ceil(math.ceil(rows / args.per_device_train_batch_size) / args.gradient_accumulation_steps)
    return math.ceil(args.num_train_epochs * a_pass)


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


def outline_of(config: RunConfig) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """Configuration and tokenizer of the model that is trained."""
    return load_outline(config.model, revision=config.revision, trust_remote_code=config.trust_remote_code)


def training_data(config: RunConfig, tokenizer: PreTrainedTokenizerBase, args: UnlearnConfig) -> list[Pair] | Unpaired:
    """What is trained on; empty where none is given to a method that needs none. ExpungeError where it does not take it."""
    data = config.data
    method = build_method(config.method)
    if method.data == "none" and data.train is None and data.forget is None:
        return []
    method.check_data(paired=data.train is not None)
    if data.train is not None:
        return load_pairs(data.train, limit=data.limit, seed=config.seed, tokenizer=tokenizer)
    passage = args.max_continuation_tokens
    return load_unpaired(data.forget, data.retain, data.limit, config.seed, tokenizer, passage)  # type: ignore[arg-type]


def probe_data(config: RunConfig, data: list[Pair] | Unpaired) -> list[tuple[str, bool]]:
    """Labelled texts for a method that fits probes, none of which is to be forgotten; none for other methods."""
    if not build_method(config.method).labelled:
        return []
    if isinstance(data, Unpaired):
        forget = [text.prompt + text.completion for text in data.forget]
    else:
        forget = [pair.prompt + pair.rejected for pair in data]
    return load_probe_data(config.data.probe, PROBE_TEXTS, config.seed, forget)


def texts_of(data: DataConfig) -> list[str]:
    """The texts that perplexity is reported on, by name."""
    return [*([data.corpus] if data.corpus else []), *data.corpora]


def evaluation_data(data: DataConfig, plan: EvaluationConfig, tokenizer: Any = None) -> EvaluationData:
    """The text that a model is measured on; conversations are rendered by the tokenizer's chat template.

    Raises ExpungeError also for what `plan` asks of questions that `data` does not have, or of a harness that is not there.
    """
    if plan.harness:
        harness.check_harness(plan.harness)
    if plan.s_unlearning:
        check_sets(plan.s_unlearning.utility, plan.s_unlearning.forget, data.questions, toxicity=bool(data.prompts))
    return EvaluationData(
        challenge={name: [p.text for p in load_prompts(name, plan.prompts, tokenizer)] for name in data.prompts},
        pairs=load_pairs(data.heldout, limit=plan.heldout, tokenizer=tokenizer) if data.heldout else [],
        neutral=load_prompts(data.neutral, plan.prompts, tokenizer) if data.neutral else [],
        corpora={name: load_corpus(name) for name in texts_of(data)},
        questions={name: load_questions(name, plan.questions, plan.seed, plan.shots) for name in data.questions},
    )


def evaluation_plan(config: EvaluationConfig) -> EvaluationPlan:
    return EvaluationPlan(
        samples=config.samples,
        max_new_tokens=config.max_new_tokens,
        prompt_tokens=config.prompt_tokens,
        truncate=config.truncate,  # type: ignore[arg-type]
        ks=tuple(config.forced),
        perplexity_tokens=config.perplexity_tokens,
        seed=config.seed,
    )
