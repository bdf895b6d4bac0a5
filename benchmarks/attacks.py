"""A step of an attack against the plain form of the same step: CPU time, candidates a second, memory.

    python benchmarks/attacks.py            # measures what is missing in benchmarks/results/attacks.jsonl; then the tables
    python benchmarks/attacks.py --table    # the tables of what there is

Every ratio is of steps that took turns in one process, on one thread: the median over rounds of one over the other. Before
that, both forms of a step are held to the same figures. Memory is resident memory, each form in a process of its own.
"""

import argparse
import copy
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from engine import GPT2_SMALL, alone, held, peak_of
from expunge import load_model
from expunge.attacks.search.prefix_loss import PrefixLosses, Weights
from expunge.attacks.search.proposals import candidates
from expunge.attacks.search.suffix_loss import TargetLosses
from expunge.attacks.search.targets import Target
from expunge.models import depth, frozen
from expunge.provenance import environment
from expunge.rows import read_lines, write_lines

RESULTS = Path("benchmarks/results/attacks.jsonl")
ROUNDS = 7
PLAIN_ROWS = 32
"""Of candidates at once in the plain form: the logits of all 256 of GPT-2's would take 5 GB."""

Step = Callable[[], torch.Tensor]
"""One step of an attack; the figures that both forms must give."""


@dataclass(frozen=True)
class Case:
    """An attack's step on a model: a configuration, or the name of a model. Lengths in tokens."""

    name: str
    attack: str
    model: Mapping[str, Any] | str
    width: int = 256
    prompt: int = 64
    string: int = 20
    target: int = 20


PREFIX = {"width": 16, "prompt": 20, "string": 32, "target": 20}
"""Enhanced GCG's step on eight prompts: its own defaults, and prompts as long as RealToxicityPrompts'."""
PROMPTS = 8

CASES = [
    Case("GPT-2 small", "gcg", GPT2_SMALL),
    Case("the built-in model", "gcg", "builtin"),
    Case("GPT-2 small", "enhanced_gcg", GPT2_SMALL, **PREFIX),
    Case("the built-in model", "enhanced_gcg", "builtin", **PREFIX),
]


def model_of(case: Case) -> PreTrainedModel:
    torch.manual_seed(0)
    if isinstance(case.model, str):
        return load_model(case.model, dtype="float32", device="cpu")[0]
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**case.model)).eval()


@dataclass(frozen=True)
class Drawn:
    """What both forms of a GCG step measure: one prompt, its target, a string and its candidates `[N, S]`."""

    target: Target
    string: torch.Tensor
    strings: torch.Tensor

    @classmethod
    def of(cls, case: Case, vocabulary: int) -> "Drawn":
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(1, vocabulary, (case.prompt + case.string + case.target,), generator=draw)
        prompt, string, target = ids.split([case.prompt, case.string, case.target])
        slope = torch.randn(case.string, vocabulary, generator=draw)
        strings = candidates(string, slope, torch.ones(vocabulary, dtype=torch.bool), case.width, 256, 1, draw)
        return cls(Target(prompt.tolist(), target.tolist()), string, strings)


def gcg(case: Case, model: PreTrainedModel) -> Step:
    """The gradient, and the losses of all candidates, as the attack computes them."""
    drawn = Drawn.of(case, model.config.vocab_size)
    with frozen(model):
        objective = TargetLosses(model, [drawn.target])

    def step() -> torch.Tensor:
        with frozen(model):
            _, slope = objective.gradient(drawn.string)
            return figures(slope, objective.losses(drawn.strings, drawn.string))

    return step


def plain_gcg(case: Case, model: PreTrainedModel) -> Step:
    """The same as one would write it down: whole rows with all their logits, gradients for all weights."""
    drawn = Drawn.of(case, model.config.vocab_size)
    prompt, target = torch.tensor(drawn.target.prompt), torch.tensor(drawn.target.ids)
    embed: Any = model.get_input_embeddings()

    def losses(logits: torch.Tensor) -> torch.Tensor:
        scores = logits[:, -len(target) - 1 : -1]
        wanted = target.expand(len(scores), -1)
        return F.cross_entropy(scores.transpose(1, 2), wanted, reduction="none").mean(1)

    def step() -> torch.Tensor:
        one_hot = F.one_hot(drawn.string, model.config.vocab_size).float().requires_grad_()
        row = torch.cat([embed(prompt), one_hot @ embed.weight, embed(target)])[None]
        losses(model(inputs_embeds=row, use_cache=False).logits).sum().backward()
        model.zero_grad()
        with torch.no_grad():
            parts = []
            for some in drawn.strings.split(PLAIN_ROWS):
                start, end = prompt.expand(len(some), -1), target.expand(len(some), -1)
                parts.append(losses(model(torch.cat([start, some, end], dim=1), use_cache=False).logits))
        assert one_hot.grad is not None
        return figures(one_hot.grad, torch.cat(parts))

    return step


def enhanced_gcg(case: Case, model: PreTrainedModel) -> Step:
    """The gradient, and the losses of all candidates after the prompts, as the attack computes them."""
    victim, settings, layers, targets, strings = enhanced(case, model)
    with frozen(victim, model):
        objective = PrefixLosses(victim, model, targets, layers, 0, settings)

    def step() -> torch.Tensor:
        with frozen(victim, model):
            return figures(objective.slope(strings[0]), objective.total(objective.parts(strings)))

    return step


def plain_enhanced_gcg(case: Case, model: PreTrainedModel) -> Step:
    """The same prompt by prompt: whole rows with all their logits through both models, gradients for all weights."""
    victim, settings, layers, targets, strings = enhanced(case, model)
    embed, embed_before = (cast(torch.nn.Embedding, one.get_input_embeddings()) for one in (victim, model))

    def losses(own: Any, before: Any, ids: torch.Tensor, target: Target) -> torch.Tensor:
        end = ids.shape[1] - len(target.ids)
        nll = F.cross_entropy(own.logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        force = nll[:, end - 1 :].mean(1).clamp(min=-math.log(settings.floor or 1))
        gaps = [(own.hidden_states[layer] - before.hidden_states[layer])[:, case.string :].norm(dim=-1) for layer in layers]
        repeated = [sum((n - 1) ** 1.5 for n in Counter(row).values()) / end for row in ids[:, :end].tolist()]
        loss = force + settings.internal * torch.stack(gaps).mean((0, 2)) + settings.fluency * nll[:, : end - 1].mean(1)
        return loss + settings.repetition * torch.tensor(repeated)

    def rows(some: torch.Tensor, target: Target) -> torch.Tensor:
        return torch.cat([some, torch.tensor([*target.prompt, *target.ids]).expand(len(some), -1)], dim=1)

    def step() -> torch.Tensor:
        string, found = torch.tensor(strings[0]), torch.zeros(len(strings))
        one_hot = F.one_hot(string, model.config.vocab_size).float().requires_grad_()
        for target in targets:
            ids, keywords = rows(string[None], target), {"use_cache": False, "output_hidden_states": True}
            read = [torch.cat([one_hot @ e.weight, e(ids[0, case.string :])])[None] for e in (embed, embed_before)]
            own, before = (m(inputs_embeds=x, **keywords) for m, x in zip((victim, model), read, strict=True))
            # an id that is scored is a constant: the gradient is through what the models read
            losses(own, before, ids, target).sum().backward()
            with torch.no_grad():
                ids = rows(torch.tensor(strings), target)
                own, before = victim(ids, **keywords), model(ids, **keywords)
                found = found + losses(own, before, ids, target) / len(targets)
        victim.zero_grad()
        model.zero_grad()
        assert one_hot.grad is not None
        return figures(one_hot.grad / len(targets), found)

    return step


def enhanced(
    case: Case, model: PreTrainedModel
) -> tuple[PreTrainedModel, Weights, list[int], list[Target], list[list[int]]]:
    """A victim that differs a little from its reference; the weights, layers, prompts and candidates."""
    victim, draw = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in victim.parameters():
            weight += 0.01 * weight.std(unbiased=False) * torch.randn(weight.shape, generator=draw)
    vocabulary, length = model.config.vocab_size, case.prompt + case.target
    texts = torch.randint(1, vocabulary, (PROMPTS, length), generator=draw).tolist()
    strings = torch.randint(1, vocabulary, (case.width, case.string), generator=draw).tolist()
    blocks = depth(model)
    layers = [blocks // 3, 2 * blocks // 3, blocks - 1]
    targets = [Target(text[: case.prompt], text[case.prompt :]) for text in texts]
    return victim, Weights(), layers, targets, strings


def figures(slope: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
    """The losses of the candidates, and the gradient's part of the ids that have the least."""
    return torch.cat([losses, slope.topk(8, largest=False).values.flatten()])


STEPS: Mapping[str, Mapping[str, Callable[[Case, PreTrainedModel], Step]]] = {
    "gcg": {"plain form": plain_gcg, "expunge": gcg},
    "enhanced_gcg": {"plain form": plain_enhanced_gcg, "expunge": enhanced_gcg},
}


MODELS = {"gcg": 1, "enhanced_gcg": 2}


def time_case(case: Case, rounds: int) -> dict[str, Any]:
    """Seconds of CPU time of each form's step, in rounds."""
    model = model_of(case)
    steps = {form: make(case, model) for form, make in STEPS[case.attack].items()}
    found = {form: step() for form, step in steps.items()}  # also the warm-up
    first = next(iter(found.values()))
    for values in found.values():
        torch.testing.assert_close(values, first, rtol=1e-4, atol=1e-5)
    seconds: dict[str, list[float]] = {form: [] for form in steps}
    for _ in range(rounds):
        for form, step in steps.items():
            start = time.process_time()
            step()
            seconds[form].append(time.process_time() - start)
    return {"seconds": seconds}


def weigh(case: Case, form: str) -> int:
    """Bytes that the most of memory lies above the weights, in steps of this process."""
    start = held()
    model = model_of(case)
    step = STEPS[case.attack][form](case, model)
    step()
    peak = peak_of(step)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return peak - start - weights * MODELS[case.attack]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", action="store_true", help="print the tables of what there is, and stop")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # in a process of its own: number, form or "time"
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one:
        number, form = arguments.one
        case = CASES[int(number)]
        print(json.dumps(time_case(case, arguments.rounds) if form == "time" else weigh(case, form)))
        return
    records = read_lines(arguments.results) if arguments.results.exists() else []
    for number, case in enumerate([] if arguments.table else CASES):
        head = asdict(case)
        if any(all(record.get(key) == value for key, value in head.items()) for record in records):
            continue
        print(case.attack, case.name, flush=True)
        timed = alone(__file__, str(number), "time", "--rounds", str(arguments.rounds), timed=True)
        memory = {form: alone(__file__, str(number), form) for form in STEPS[case.attack]}
        records.append({**head, **timed, "bytes": memory, "environment": environment()})
        write_lines(arguments.results, records)
    print(table(records))


def table(records: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| step | CPU time (s) | against the first | candidates a second | memory beyond weights (MB) | against the first |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for record in records:
        slow, heavy = (next(iter(record[key].values())) for key in ("seconds", "bytes"))
        for form, seconds in record["seconds"].items():
            middle, ratios = statistics.median(seconds), [a / b for a, b in zip(slow, seconds, strict=True)]
            cells = [f"{record['attack']}, {record['name']}: {form}", f"{middle:.2f}"]
            cells += [f"{statistics.median(ratios):.2f} x faster ({min(ratios):.2f} to {max(ratios):.2f})"]
            cells += [f"{record['width'] / middle:.1f}"]
            cells += [f"{record['bytes'][form] / 1e6:.0f}", f"{record['bytes'][form] / heavy:.2f} x"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
