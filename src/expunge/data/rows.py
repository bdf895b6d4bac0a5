"""What a batch is made of: rows of `{side: (prompt ids, continuation ids)}`, of pairs or of two sets.

    rows = PairRows(tokenize_pairs(pairs, tokenizer)[0])
    rows[0]["retain"], rows[0]["forget"]           # one prompt, two continuations

Of two sets the forget set is passed over once in an epoch. Beside each of its rows stands one of the retain set, which is
gone through in an order drawn anew for each pass, and goes on where the epoch before ended. So a shorter retain set repeats,
of a longer one each epoch reads another part, and after any epoch all its rows came equally often, to within one.
"""

import random
from collections.abc import Collection, Iterator, Mapping, Sequence

from expunge.data.tokenize import TokenizedPair, TokenizedText

Row = dict[str, TokenizedText]


class PairRows:
    """Tokenised pairs, each with a window of neutral text if asked for."""

    def __init__(self, pairs: Sequence[TokenizedPair], anchor: Sequence[list[int]] = ()):
        self.pairs, self.anchor = pairs, anchor

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Row:
        pair = self.pairs[index]
        row: Row = {"retain": (pair.prompt, pair.chosen), "forget": (pair.prompt, pair.rejected)}
        return _anchored(row, self.anchor, index)

    def sequences(self, sides: Collection[str] | None) -> Iterator[list[int]]:
        """The ids of every row's sides that are named, prompt and continuation together; None: of all."""
        for index in range(len(self)):
            for side, (prompt, continuation) in self[index].items():
                if sides is None or side in sides:
                    yield prompt + continuation


class SetRows:
    """Tokenised texts of two sets side by side, each with a window of neutral text if asked for."""

    def __init__(self, sides: Mapping[str, Sequence[TokenizedText]], seed: int, anchor: Sequence[list[int]] = ()):
        self.sides, self.seed, self.anchor = sides, seed, anchor
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw what stands beside the forget rows in that pass over them; the same for the same seed."""
        ours, theirs = len(self.sides["forget"]), len(self.sides["retain"])
        first = epoch * ours
        passes = range(first // theirs, (first + ours - 1) // theirs + 1)
        orders = {n: random.Random(f"{self.seed}/{n}").sample(range(theirs), theirs) for n in passes}
        self.beside = [orders[at // theirs][at % theirs] for at in range(first, first + ours)]

    def __len__(self) -> int:
        return len(self.sides["forget"])

    def __getitem__(self, index: int) -> Row:
        row: Row = {"retain": self.sides["retain"][self.beside[index]], "forget": self.sides["forget"][index]}
        return _anchored(row, self.anchor, index)

    def sequences(self, sides: Collection[str] | None) -> Iterator[list[int]]:
        """As of pairs: of both whole sets, whatever the epoch."""
        for side, rows in self.sides.items():
            if sides is None or side in sides:
                yield from (prompt + continuation for prompt, continuation in rows)
        if sides is None or "anchor" in sides:
            yield from self.anchor[: len(self)]


def _anchored(row: Row, anchor: Sequence[list[int]], index: int) -> Row:
    if anchor:
        row["anchor"] = ([], anchor[index % len(anchor)])
    return row
