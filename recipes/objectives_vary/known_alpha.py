"""Does the policy find an alpha that is known to be the best? A toy of one weight x, from four starts; a minute.

    python recipes/objectives_vary/known_alpha.py        # prints a table, benchmarks/results/known-alpha.jsonl

    L_F = (1 - x)^2,   L_R = x^2,   x goes by `speed` of the way to 1 / (1 + alpha), where L_F + alpha L_R is least

normalised: L_F + L_R / 0.05 is least at x = 1 / 21, so alpha = 20; product: (1 - L_F) (1 - L_R) is greatest at alpha = 1.
Both losses are seen times exp(noise N(0, 1)), as those of single batches are.
"""

import itertools
import math
from pathlib import Path
from statistics import mean

import torch

from expunge.methods.policy import AlphaPolicy, Reward
from expunge.rows import write_lines

RESULTS = Path("benchmarks/results/known-alpha.jsonl")
BEST: dict[Reward, float] = {"normalised": 20.0, "improvement": 20.0, "product": 1.0}
STARTS, SPEEDS, NOISES = (0.1, 1.0, 10.0, 100.0), (0.5, 0.05), (0.0, 0.1, 0.3)
STEPS, LAST = 2000, 300


def losses(x: float) -> tuple[float, float]:
    """L_F and L_R of the weight."""
    return (1 - x) ** 2, x**2


def learn(policy: AlphaPolicy, steps: int = STEPS, speed: float = 0.5, noise: float = 0.0) -> list[float]:
    """Train the toy under `policy` for so many steps; returns exp(mu) after each."""
    x, means = 0.0, []
    drawn = torch.randn(steps, 2, generator=torch.Generator().manual_seed(policy.seed)).mul(noise).exp().tolist()
    for of_forget, of_retain in drawn:
        forget, retain = losses(x)
        x += speed * (1 / (1 + policy.alpha) - x)
        means.append(policy.observe(forget * of_forget, retain * of_retain)["alpha_mean"])
    return means


def settled(means: list[float]) -> float:
    """Where alpha is in the last steps, the geometric mean."""
    return math.exp(mean(math.log(alpha) for alpha in means[-LAST:]))


def main() -> None:
    found = []
    print(f"| reward | best | speed | noise | {' | '.join(f'from {start:g}' for start in STARTS)} |")
    print(f"| --- |{' ---: |' * (3 + len(STARTS))}")
    for reward, speed, noise in itertools.product(("normalised", "product"), SPEEDS, NOISES):
        ends = [settled(learn(AlphaPolicy(start, reward, seed=0), speed=speed, noise=noise)) for start in STARTS]
        for start, end in zip(STARTS, ends, strict=True):
            line = {"reward": reward, "best": BEST[reward], "speed": speed, "noise": noise, "start": start}
            found.append({**line, "seed": 0, "steps": STEPS, "alpha": round(end, 3)})
        print(
            f"| {reward} | {BEST[reward]:g} | {speed:g} | {noise:g} | {' | '.join(f'{end:.3g}' for end in ends)} |",
            flush=True,
        )
    write_lines(RESULTS, found)


if __name__ == "__main__":
    main()
