"""Residual states of a frozen model: computed once, kept on disk, shared by every run on the same weights and rows.

    stored = StoredStates.of(model, rows, layers=("final",), weights=weights_digest(model))     # computed, or found
    stored.read(ids, lengths, ("final",))["final"]                                            # [R, T, d]

A flat file per layer holds the states of all rows one after the other. It is memory-mapped: what is not read takes no
memory. Its folder is named by a hash of all that they follow from: weights, configuration, rows (so data and tokenizer),
layers, precision, kind of device, attention and version of transformers.
"""

import hashlib
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import IO

import torch
import transformers
from torch import nn
from tqdm.auto import tqdm

from expunge.config import cache_folder
from expunge.errors import ExpungeError
from expunge.models import Layer, facts_digest, hidden_states, inner_model, width

TOKENS = 4096  # in one forward
UNFINISHED = ".new-"

log = logging.getLogger("expunge")


class StoredStates:
    """States `[N, d]` of the tokens of all rows by layer, memory-mapped, and where each row begins."""

    def __init__(self, layers: Mapping[Layer, torch.Tensor], starts: Mapping[bytes, int]):
        self.layers, self._starts = layers, starts

    @classmethod
    def of(
        cls, model: nn.Module, rows: Iterable[Sequence[int]], layers: Sequence[Layer], weights: str, quiet: bool = True
    ) -> "StoredStates":
        """Those of `model` at `rows` of token ids, under the autocast that is on; the same rows are stored once.

        weights: a hash of the model's weights. The size is announced before anything is written.
        Raises ExpungeError where the disk has no room, or cannot be written to.
        """
        distinct = sorted({tuple(row) for row in rows}, key=lambda row: (len(row), row))
        inner = inner_model(model)
        device = inner.device.type
        facts = {
            "weights": weights,
            "model": f"{type(inner).__name__} {inner.config._attn_implementation} on {device}",
            "settings": facts_digest(inner.config.to_dict()),
            "autocast": str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None,
            "layers": list(layers),
            "version": transformers.__version__,
        }
        key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode() + b"".join(map(_key, distinct)))
        folder = cache_folder("states") / key.hexdigest()
        if not folder.exists():
            _compute(model, distinct, layers, folder, quiet)
        dtypes = json.loads((folder / "states.json").read_text(encoding="utf-8"))
        starts = [0, *accumulate(map(len, distinct))]
        found: dict[Layer, torch.Tensor] = {}
        for layer in layers:
            dtype, size = getattr(torch, dtypes[str(layer)]), starts[-1] * width(model)
            mapped = torch.from_file(str(_file(folder, layer)), shared=False, size=size, dtype=dtype)
            found[layer] = mapped.view(-1, width(model))
        return cls(found, dict(zip(map(_key, distinct), starts, strict=False)))

    def read(self, ids: torch.Tensor, lengths: torch.Tensor, layers: Sequence[Layer]) -> dict[Layer, torch.Tensor]:
        """`[R, T, d]` of right-padded `ids` `[R, T]`, zero at the padding. KeyError for a row that was not stored."""
        rows = [row[:length] for row, length in zip(ids.tolist(), lengths.tolist(), strict=True)]
        starts = [self._starts[_key(row)] for row in rows]
        found = {}
        for layer in layers:
            stored = self.layers[layer]
            states = stored.new_zeros(*ids.shape, stored.shape[1])
            for into, row, start in zip(states, rows, starts, strict=True):
                into[: len(row)] = stored[start : start + len(row)]
            found[layer] = states.to(ids.device)
        return found


def _key(row: Sequence[int]) -> bytes:
    return hashlib.blake2b(",".join(map(str, row)).encode(), digest_size=16).digest()


def _file(folder: Path, layer: Layer) -> Path:
    return folder / f"{layer}.bin"


@torch.no_grad()
def _compute(model: nn.Module, rows: Sequence[tuple[int, ...]], layers: Sequence[Layer], folder: Path, quiet: bool) -> None:
    """All files in a folder of another name, which is renamed when it is whole."""
    dtypes = {layer: states.dtype for layer, states in _forward(model, rows[:1], layers).items()}
    need = sum(map(len, rows)) * width(model) * sum(dtype.itemsize for dtype in dtypes.values())
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder.parent)
        free = shutil.disk_usage(folder.parent).free
        log.info("reference states: %.3g GB in %s, %.3g GB are free there", need / 1e9, folder.parent, free / 1e9)
        if need > free:
            raise ExpungeError(
                f"the reference states need {need / 1e9:.3g} GB, {folder.parent} has {free / 1e9:.3g} GB: set EXPUNGE_CACHE "
                "to a folder with room, or training.reference=live"
            )
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=UNFINISHED) as name:
            temporary = Path(name) / "states"
            temporary.mkdir()
            _write(model, rows, layers, temporary, quiet)
            names = {str(layer): str(dtype).removeprefix("torch.") for layer, dtype in dtypes.items()}
            (temporary / "states.json").write_text(json.dumps(names), encoding="utf-8")
            try:
                temporary.rename(folder)
            except OSError:
                if not folder.exists():  # else another run was faster
                    raise
    except OSError as error:
        reason = error.strerror or error
        raise ExpungeError(f"{folder.parent}: cannot keep the reference states there ({reason})") from None


def _sweep(folder: Path) -> None:
    """Remove what runs that were killed left behind, a day ago or earlier."""
    for path in folder.glob(f"{UNFINISHED}*"):
        if path.stat().st_mtime < time.time() - 24 * 3600:
            shutil.rmtree(path, ignore_errors=True)


def _write(model: nn.Module, rows: Sequence[tuple[int, ...]], layers: Sequence[Layer], folder: Path, quiet: bool) -> None:
    files: dict[Layer, IO[bytes]] = {layer: _file(folder, layer).open("wb") for layer in layers}
    try:
        with tqdm(total=len(rows), desc="reference states", unit=" rows", disable=quiet) as bar:
            for batch in _batches(rows):
                states = _forward(model, batch, layers)
                for layer, file in files.items():
                    for row, tokens in zip(states[layer].cpu(), batch, strict=True):
                        file.write(row[: len(tokens)].contiguous().view(torch.uint8).numpy().tobytes())
                bar.update(len(batch))
    finally:
        for file in files.values():
            file.close()


def _batches(rows: Sequence[tuple[int, ...]]) -> Iterator[Sequence[tuple[int, ...]]]:
    """Runs of rows, which come in order of length, of at most TOKENS tokens with their padding."""
    start = 0
    while start < len(rows):
        end = start + 1
        while end < len(rows) and (end + 1 - start) * len(rows[end]) <= TOKENS:
            end += 1
        yield rows[start:end]
        start = end


def _forward(model: nn.Module, rows: Sequence[tuple[int, ...]], layers: Sequence[Layer]) -> dict[Layer, torch.Tensor]:
    device = inner_model(model).device
    lengths = torch.tensor([len(row) for row in rows], device=device)
    longest = int(lengths.max())
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
    mask = torch.arange(longest, device=device)[None] < lengths[:, None]
    return hidden_states(model, ids, mask.long(), layers)
