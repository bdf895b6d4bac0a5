"""A training step of expunge against plain forms of the same loss: CPU time, memory, operations.

    python benchmarks/engine.py            # measures what is missing in benchmarks/results/engine.jsonl; then the tables
    python benchmarks/engine.py --table    # the tables of what there is

Every ratio is of steps that took turns in one process, on one thread: the median over rounds of one over the other. Before
that, the variants of a method are held to the same loss. Memory is resident memory, each variant in a process of its own.
"""

import argparse
import copy
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.nn.functional as F
import trl
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer

from expunge import DPO, NPO, REPO, RMU, UnlearnConfig, UnlearnTrainer
from expunge.adapters import add_lora
from expunge.data import Pair
from expunge.engine import collate
from expunge.models import only_training
from expunge.provenance import environment
from expunge.rows import read_lines, write_lines

RESULTS = Path("benchmarks/results/engine.jsonl")
ROUNDS = 7
STILL = {
    "model_type": "gpt2",
    "bos_token_id": 0,
    "eos_token_id": 0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
GPT2_SMALL = {**STILL, "n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257}
SMALL = {**STILL, "n_layer": 4, "n_embd": 256, "n_head": 4, "vocab_size": 50257, "n_positions": 512}
GEMMA_VOCABULARY = {
    "model_type": "gemma",
    "num_hidden_layers": 4,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 256_000,
}


@dataclass(frozen=True)
class Case:
    """A model's configuration and a batch of pairs whose prompts and continuations all have these lengths in tokens."""

    name: str
    model: Mapping[str, Any]
    method: str
    batch: int = 8
    prompt: int = 20
    continuation: int = 20
    lora: int = 0  # rank of an adapter, whose absence is the reference


TIMED = [
    Case("GPT-2 small, 20 + 20 tokens", GPT2_SMALL, "repo"),
    Case("GPT-2 small, 20 + 20 tokens", GPT2_SMALL, "dpo"),
    Case("GPT-2 small, 64 + 64 tokens", GPT2_SMALL, "repo", prompt=64, continuation=64),
    Case("GPT-2 small, 20 + 20 tokens", GPT2_SMALL, "npo"),
    Case("GPT-2 small, 20 + 20 tokens", GPT2_SMALL, "rmu"),
]
GROWTH = [
    *(Case(f"4 x 256, batch {batch}", SMALL, "repo", batch=batch) for batch in (4, 8, 16, 32)),
    *(Case(f"4 x 256, {n} + {n} tokens", SMALL, "repo", prompt=n, continuation=n) for n in (20, 40, 80, 160)),
    *(Case(f"4 x 256, vocabulary {v}", {**SMALL, "vocab_size": v}, "repo") for v in (8_192, 32_768, 131_072)),
]
WEIGHED = [
    Case("GPT-2 small, 64 + 64 tokens", GPT2_SMALL, "repo", prompt=64, continuation=64),
    Case("GPT-2 small, 64 + 64 tokens", GPT2_SMALL, "dpo", prompt=64, continuation=64),
    Case("GPT-2 small, 64 + 64 tokens, LoRA", GPT2_SMALL, "repo", prompt=64, continuation=64, lora=16),
    Case("vocabulary 256,000, 4 x 512, 64 + 64 tokens", GEMMA_VOCABULARY, "repo", prompt=64, continuation=64),
    *GROWTH,
]
CASES = {"time": TIMED, "growth": GROWTH, "memory": WEIGHED}
METHODS = {
    "repo": REPO(weight=0.2),
    "dpo": DPO(beta=0.1, clamp=None),
    "npo": NPO(alpha=0.2, beta=0.5),
    "rmu": RMU(form="wmdp", layer=3),
}
BASELINE = {"repo": "plain form", "dpo": "TRL", "npo": "plain form", "rmu": "plain form"}
VARIANTS = {method: [baseline, "plain layout", "live", "cached"] for method, baseline in BASELINE.items()}


def model_of(case: Case) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**case.model))


@torch.no_grad()
def move(model: torch.nn.Module, case: Case) -> None:
    """What is trained, away from its reference, where the losses would be trivial."""
    draw = torch.Generator().manual_seed(1)
    method = METHODS[case.method].placed(model.config.get_text_config().num_hidden_layers)
    trained = method.trains(model)
    for name, parameter in model.named_parameters():
        if trained is None or name in trained:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=draw))


def rows_of(case: Case) -> list[dict[str, tuple[list[int], list[int]]]]:
    draw = torch.Generator().manual_seed(0)
    shape = (case.batch, case.prompt + 2 * case.continuation)
    ids = torch.randint(1, case.model["vocab_size"], shape, generator=draw).tolist()
    a, b = case.prompt, case.prompt + case.continuation
    return [{"retain": (row[:a], row[a:b]), "forget": (row[:a], row[b:])} for row in ids]


def tokenizer_of(vocabulary: int) -> PreTrainedTokenizerFast:
    """A word "7" is token 7."""
    words = {"<eos>": 0, **{str(i): i for i in range(1, vocabulary)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>")


def step_of(variant: str, case: Case, folder: Path) -> tuple[torch.nn.Module, Callable[[], float]]:
    """A model, and what computes its loss on the case's batch and adds the gradients to it."""
    if variant == "plain form":
        return {"repo": plain_repo, "npo": plain_npo, "rmu": plain_rmu}[case.method](case)
    if variant == "TRL":
        return trl_dpo(case, folder)
    model, tokenizer = model_of(case), tokenizer_of(case.model["vocab_size"])
    if case.lora:
        model = add_lora(model, r=case.lora)
    args = UnlearnConfig(
        output_dir=str(folder),
        layout="plain" if variant == "plain layout" else "auto",
        reference="cached" if variant == "cached" else "live",
        max_prompt_tokens=case.prompt,
        max_continuation_tokens=case.continuation,
        use_cpu=True,
        disable_tqdm=True,
    )
    pairs = [Pair(*("".join(f" {i}" for i in ids) for ids in (*row["retain"], row["forget"][1]))) for row in rows_of(case)]
    trainer = UnlearnTrainer(model, METHODS[case.method], args, pairs, tokenizer)
    batch = collate([trainer.train_dataset[i] for i in range(case.batch)])  # type: ignore[index]
    return model, training_step(trainer, batch, trainer.trained)


def training_step(trainer: Trainer, batch: Any, trained: list[str] | None = None) -> Callable[[], float]:
    """Loss and gradients, as the trainer computes them within an epoch."""
    trainer.current_gradient_accumulation_steps = 1

    def step() -> float:
        with only_training(trainer.model, trained):
            return trainer.training_step(trainer.model, batch).item()

    return step


def plain_repo(case: Case) -> tuple[torch.nn.Module, Callable[[], float]]:
    """REPO as one would write it down: both sides in one batch through the model and a frozen copy, with all logits.

    The leaner plain form, which projects only what the loss reads, is the engine's own `plain layout`.
    """
    model = model_of(case)
    reference = copy.deepcopy(model).requires_grad_(False)
    torch.manual_seed(42)
    discriminator = METHODS["repo"].heads(model.config.get_text_config().hidden_size)["discriminator"]
    rows = rows_of(case)
    both = torch.tensor([row[side][0] + row[side][1] for side in ("retain", "forget") for row in rows])

    def step() -> float:
        out = model(both, output_hidden_states=True, use_cache=False)
        with torch.no_grad():
            wanted = reference(both, use_cache=False).logits[: case.batch].log_softmax(-1)
        given = out.logits[: case.batch].log_softmax(-1)
        anchor = F.kl_div(given, wanted, reduction="none", log_target=True).sum(-1).mean()
        states = out.hidden_states[-1][:, case.prompt :].flatten(0, 1)
        labels = torch.cat([torch.zeros(len(states) // 2), torch.ones(len(states) // 2)])
        erase = F.binary_cross_entropy_with_logits(discriminator(Reverse.apply(states)).squeeze(-1), labels)
        loss = anchor + erase
        loss.backward()
        return loss.item()

    return model, step


def plain_npo(case: Case) -> tuple[torch.nn.Module, Callable[[], float]]:
    """NPO as public code has it: both sides through the model, the rejected one through a frozen copy, with all logits."""
    model, method = model_of(case), METHODS["npo"]
    reference = copy.deepcopy(model).requires_grad_(False)
    rows = rows_of(case)
    both = torch.tensor([row[side][0] + row[side][1] for side in ("retain", "forget") for row in rows])
    labels = both.clone()
    labels[:, : case.prompt] = -100

    def token_nll(network: torch.nn.Module, ids: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        logits = network(ids, use_cache=False).logits[:, :-1].float()
        return F.cross_entropy(logits.transpose(1, 2), wanted[:, 1:], ignore_index=-100, reduction="none")

    def step() -> float:
        nll = token_nll(model, both, labels)
        with torch.no_grad():
            ref = token_nll(reference, both[case.batch :], labels[case.batch :])
        forget = -F.logsigmoid(method.beta * (nll[case.batch :] - ref).sum(1)).mean() * 2 / method.beta
        loss = method.alpha * forget + nll[: case.batch].sum() / (case.batch * case.continuation)
        loss.backward()
        return loss.item()

    return model, step


def plain_rmu(case: Case) -> tuple[torch.nn.Module, Callable[[], float]]:
    """RMU as public code has it: whole forwards with logits, gradients for all weights, states kept on the way."""
    model = model_of(case)
    method = METHODS["rmu"].placed(model.config.get_text_config().num_hidden_layers)
    reference = copy.deepcopy(model).requires_grad_(False)
    torch.manual_seed(42)
    control = method.heads(model_width(case))["control"]
    rows = rows_of(case)
    sides = {name: torch.tensor([row[name][0] + row[name][1] for row in rows]) for name in ("retain", "forget")}

    def states(network: torch.nn.Module, side: str) -> torch.Tensor:
        out = network(sides[side], output_hidden_states=True, use_cache=False)
        return out.hidden_states[method.layer + 1][:, case.prompt :]

    def step() -> float:
        forget = F.mse_loss(states(model, "forget"), control.target.expand(case.batch, case.continuation, -1))
        with torch.no_grad():
            wanted = states(reference, "retain")
        loss = forget + method.alpha * F.mse_loss(states(model, "retain"), wanted)
        loss.backward()
        return loss.item()

    return model, step


class Reverse(torch.autograd.Function):
    """The gradient, with its sign turned and at the weight of REPO."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor) -> torch.Tensor:
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return -METHODS["repo"].weight * grad


def trl_dpo(case: Case, folder: Path) -> tuple[torch.nn.Module, Callable[[], float]]:
    """TRL's trainer with a live reference, on the same token ids."""

    class Pretokenized(trl.DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [dict(zip(names, (*row["retain"], row["forget"][1]), strict=True)) for row in rows_of(case)]
    model = model_of(case)
    trainer = Pretokenized(
        model=model,
        ref_model=copy.deepcopy(model),
        args=trl.DPOConfig(
            output_dir=str(folder),
            beta=METHODS["dpo"].beta,
            max_length=None,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            report_to="none",
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer_of(case.model["vocab_size"]),
    )
    batch = trainer.data_collator(rows)
    return model, training_step(trainer, batch)


def time_case(case: Case, variants: list[str]) -> dict[str, Any]:
    """Seconds of CPU time of each variant's step, in rounds; and their operations against the rate of a matrix product."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["EXPUNGE_CACHE"] = folder
        steps = {variant: step_of(variant, case, Path(folder) / variant.replace(" ", "-")) for variant in variants}
        for model, _ in steps.values():
            move(model, case)
        losses = {variant: step() for variant, (_, step) in steps.items()}  # also the warm-up
        first = losses[variants[0]]
        assert all(abs(loss - first) < 1e-4 * abs(first) for loss in losses.values()), losses
        operations = {}
        for variant, (model, step) in steps.items():
            with FlopCounterMode(display=False) as counter:
                step()
            operations[variant] = counter.get_total_flops()
            model.zero_grad(set_to_none=False)
        seconds: dict[str, list[float]] = {variant: [] for variant in variants}
        rates = []
        for _ in range(ROUNDS):
            rates.append(matrix_rate(case))
            for variant, (_, step) in steps.items():
                start = time.process_time()
                step()
                seconds[variant].append(time.process_time() - start)
    return {"seconds": seconds, "operations": operations, "operations_per_second": rates}


def matrix_rate(case: Case) -> float:
    """Operations a second of CPU time in a product of the shape of the feed-forward layers."""
    width = model_width(case)
    tokens = case.batch * (case.prompt + 2 * case.continuation)
    a, b = torch.randn(tokens, width), torch.randn(width, 4 * width)
    a @ b
    start, runs = time.process_time(), 0
    while time.process_time() - start < 0.3:
        a @ b
        runs += 1
    return runs * 2 * tokens * width * 4 * width / (time.process_time() - start)


def model_width(case: Case) -> int:
    return case.model.get("n_embd") or case.model["hidden_size"]


def weigh(case: Case, variant: str) -> dict[str, int]:
    """Bytes that the most of memory lies above weights, gradients and Adam's state, in steps of this process."""
    start = held()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["EXPUNGE_CACHE"] = folder
        model, step = step_of(variant, case, Path(folder))
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(learned, lr=1e-6, foreach=False)
        for _ in range(2):
            step()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        peak = peak_of(step)
    sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in model.parameters()]
    trained = sum(size * (4 if learned else 1) for size, learned in sizes)
    return {"beyond": peak - start - trained, "trained": trained}


def held() -> int:
    """Resident bytes of this process, after what is free has gone back to the system."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return resident("VmRSS")


def peak_of(step: Callable[[], Any]) -> int:
    """The most resident bytes of this process while `step` runs."""
    held()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    step()
    return resident("VmHWM")


def resident(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", action="store_true", help="print the tables of what there is, and stop")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # in a process of its own: kind, number, variant
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one:
        kind, number, variant = arguments.one
        case = CASES[kind][int(number)]
        print(json.dumps(weigh(case, variant) if kind == "memory" else time_case(case, variants_of(case))))
        return
    records = read_lines(RESULTS) if RESULTS.exists() else []
    for kind, cases in {} if arguments.table else CASES.items():
        for number, case in enumerate(cases):
            head = {"kind": kind, **asdict(case)}
            if not case.lora:
                del head["lora"]
            if any(all(record.get(key) == value for key, value in head.items()) for record in records):
                continue
            print(kind, case.name, case.method, flush=True)
            variants = variants_of(case)
            if kind == "memory":
                found = {"bytes": {variant: alone(__file__, kind, str(number), variant) for variant in variants}}
            else:
                found = alone(__file__, kind, str(number), "all", timed=True)
            records.append({**head, **found, "environment": environment()})
            write_lines(RESULTS, records)
    print(tables(records))


def variants_of(case: Case) -> list[str]:
    if case.lora:
        return ["live"]
    return ["plain form", "cached"] if case in GROWTH else VARIANTS[case.method]


def alone(script: str, *arguments: str, timed: bool = False) -> Any:
    """What a process of its own measures: memory that one case leaves with a process is none of another's."""
    environ = dict(os.environ)
    if not timed:  # freed blocks go back to the system
        environ = {key: value for key, value in environ.items() if not key.startswith("MALLOC_")}
        environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    command = [sys.executable, script, "--one", *arguments]
    done = subprocess.run(command, env=environ, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def tables(records: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| step | CPU time (s) | against the first | operations | share of the matrix rate |",
        "| --- | --- | --- | --- | --- |",
    ]
    for record in records:
        if record["kind"] == "memory":
            continue
        first = next(iter(record["seconds"].values()))
        rate = statistics.median(record["operations_per_second"])
        for variant, seconds in record["seconds"].items():
            middle, operations = statistics.median(seconds), record["operations"][variant]
            ratios = [one / other for one, other in zip(first, seconds, strict=True)]
            speed = f"{statistics.median(ratios):.2f} x faster ({min(ratios):.2f} to {max(ratios):.2f})"
            cells = [f"{record['method']}, {record['name']}: {variant}", f"{middle:.2f}", speed]
            cells += [f"{operations / 1e9:.0f} G", f"{operations / rate / middle:.0%}"]
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| memory beyond weights, gradients, Adam | MB | against the first |", "| --- | --- | --- |"]
    for record in records:
        if record["kind"] == "memory":
            first = next(iter(record["bytes"].values()))["beyond"]
            for variant, found in record["bytes"].items():
                name = f"{record['method']}, {record['name']}: {variant}"
                lines.append(f"| {name} | {found['beyond'] / 1e6:.0f} | {found['beyond'] / first:.2f} x |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
