"""Changes of a token string: those of GCG, and the operators of FLRT's search.

GCG (Zou et al. 2023, Algorithm 2) replaces random places by tokens that the gradient likes: `candidates`. FLRT (Thompson and
Sklar 2024, Fluent student-teacher redteaming) changes one place by one of four operators:

gcg      a token becomes one of the k that the gradient of the loss likes best in its place
swap     a token becomes one of k drawn from what the model expects there
insert   one of k so drawn comes in between, or at either end
delete   a token goes

operator = pick({"gcg": 0.7, "delete": 0.1, "insert": 0.1, "swap": 0.1}, len(string), 32, 64, generator)
proposals = propose(operator, string, liked(slope, allowed, 64), 16, survives, generator)
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from expunge.errors import ExpungeError

AT_ONCE, A_FEW = 64, 8
"""Strings that are looked at for whether they survive: to have some, and to have one."""


def random_strings(allowed: torch.Tensor, count: int, length: int, draw: torch.Generator) -> torch.Tensor:
    """int64 `[count, length]` of allowed tokens, each as likely."""
    tokens = allowed.nonzero().flatten()
    return tokens[torch.randint(len(tokens), (count, length), generator=draw)]


def candidates(
    string: torch.Tensor,
    slope: torch.Tensor,
    allowed: torch.Tensor,
    width: int,
    top_k: int,
    replace: int,
    draw: torch.Generator,
) -> torch.Tensor:
    """int64 `[N, S]`, at most `width` distinct strings, each `string` `[S]` with `replace` random places set anew.

    slope: dL / d one-hot `[S, V]`; a place gets one of its `top_k` allowed tokens of least slope, each as likely.
    """
    slope = slope.masked_fill(~allowed, math.inf)
    top = slope.topk(min(top_k, int(allowed.sum())), largest=False).indices  # [S, k]
    places = torch.rand(width, len(string), generator=draw).argsort(1)[:, :replace]
    ranks = torch.randint(top.shape[1], (width, replace), generator=draw)
    drawn = string.repeat(width, 1).scatter_(1, places, top[places, ranks]).unique(dim=0)
    return drawn[(drawn != string).any(1)]


def minimum_length(iteration: int, first: int, last: int, ramp: int) -> float:
    """Rises from `first` to `last` over `ramp` iterations."""
    return first + (last - first) * min(1.0, iteration / ramp)


def pick(weights: Mapping[str, float], length: int, minimum: float, maximum: int, generator: torch.Generator) -> str:
    """An operator by its weight. A string of `minimum` tokens or fewer is only inserted into, one of `maximum` never is.

    A string that may neither shrink nor be inserted into keeps its length.
    """
    left = dict(weights)
    if length >= maximum:
        left["insert"] = 0.0
    if length <= minimum:
        left = {"insert": left["insert"]} if left["insert"] else {**left, "delete": 0.0}
    chances = torch.tensor(list(left.values()), dtype=torch.double)
    return list(left)[int(torch.multinomial(chances, 1, generator=generator))]


def liked(slope: torch.Tensor, allowed: torch.Tensor, k: int) -> torch.Tensor:
    """int64 `[n, k]`: at each place the allowed tokens that lower the loss most, to first order.

    slope: `[n, V]`, the derivative by one-hot rows; allowed: bool `[V]`.
    """
    return (-slope).masked_fill(~allowed, -torch.inf).topk(min(k, int(allowed.sum())), dim=-1).indices


def expected(logits: torch.Tensor, allowed: torch.Tensor, k: int, generator: torch.Generator) -> torch.Tensor:
    """int64 `[n, k]`: for each row of `logits` `[n, V]`, different allowed tokens drawn by their probability."""
    noise = -torch.empty(logits.shape, dtype=torch.double).exponential_(generator=generator).log()  # Gumbel
    return liked(-(logits.double().cpu() + noise), allowed.cpu(), k)


def propose(
    operator: str,
    string: Sequence[int],
    candidates: torch.Tensor | None,
    count: int,
    survives: Callable[[torch.Tensor], torch.Tensor],
    generator: torch.Generator,
) -> list[list[int]]:
    """Up to `count` different strings, each one change away from `string`, drawn at random from those that survive.

    candidates: int64 `[n, k]` for gcg and swap, `[n + 1, k]` for insert, where place i is before token i; None for delete.
    survives: rows `[N, T]` to bool `[N]`.
    """
    tokens = torch.zeros(len(string), 1, dtype=torch.long) if candidates is None else candidates.cpu()
    order = torch.randperm(tokens.numel(), generator=generator).tolist()
    found: dict[tuple[int, ...], None] = {}
    for start in range(0, len(order), AT_ONCE):
        rows: dict[tuple[int, ...], None] = {}
        for number in order[start : start + AT_ONCE]:
            place, which = divmod(number, tokens.shape[1])
            new = [] if operator == "delete" else [int(tokens[place, which])]
            changed = (*string[:place], *new, *string[place + (operator != "insert") :])
            if changed and changed != tuple(string):
                rows[changed] = None
        if rows:
            kept = survives(torch.tensor(list(rows))).tolist()
            found |= {row: None for row, survived in zip(rows, kept, strict=True) if survived}
        if len(found) >= count:
            break
    return [list(row) for row in found][:count]


def grow(
    length: int, draw: Callable[[list[int]], torch.Tensor], survives: Callable[[torch.Tensor], torch.Tensor]
) -> list[int]:
    """Ids of a string of `length` tokens that survives, written token by token.

    draw: what may come after a string, int64 `[k]`, of which the first with which it survives is taken.
    Raises ExpungeError where there is none.
    """
    string: list[int] = []
    while len(string) < length:
        for tokens in draw(string).split(A_FEW):
            rows = torch.tensor([[*string, token] for token in tokens.tolist()])
            kept = rows[survives(rows)]
            if len(kept):
                string = kept[0].tolist()
                break
        else:
            raise ExpungeError(f"no string of {length} tokens was found that the tokenizer gives back as it was: take fewer")
    return string
