"""What a model is, as hashes of its content: the part of every key and record that stands for a model.

    before = identity_of("models/mine")                 # from its files; nothing is loaded
    identity_of("copy/of/it") == before                 # wherever it lies, and however it is called
    identity_of("models/mine").changed(before.parts)    # [] or, after an edit, ["weights", "tokenizer"]

In it, each part by itself:

    weights      every tensor's name, type, shape and bytes, however they are spread over files; of GGUF the file
    config       config.json, `quantization_config` included
    generation   generation_config.json, which holds end tokens
    tokenizer    its files, the chat template included
    adapter      the tensors and settings of a PEFT adapter; the parts above are then its base's
    steering     what is applied beside the weights
    code         Python files that come with the model

Left out, as no result follows from it: where the model lies and what it is called (`_name_or_path`, an adapter's
`base_model_name_or_path`), which version of a library wrote it (`transformers_version`, `peft_version`), cards, and the name
of the type that it was saved in (`dtype`): how it is loaded stands beside the identity in a key (`Identity.loaded`).
Left out too is what does change rounding, but is no part of a model: device and versions of libraries. Provenance has them.
"""

import dataclasses
import hashlib
import json
from collections.abc import Container, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from expunge.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from expunge.models.forward import inner_model
from expunge.models.loading import Place, place_of, reading
from expunge.steering import SETTINGS, TENSORS

VOLATILE = {
    "_name_or_path", "name_or_path", "base_model_name_or_path", "revision", "_commit_hash", "transformers_version",
    "peft_version", "dtype", "torch_dtype", "_from_model_config", "tokenizer_file", "is_local", "local_files_only",
    "inference_mode",
}  # fmt: skip
"""Keys of JSON files, at any depth, that no result follows from."""
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Identity:
    """Hex sha256 of each part of a model; None for a part that it does not have."""

    weights: str
    config: str
    generation: str | None
    tokenizer: str | None
    adapter: str | None = None
    steering: str | None = None
    code: str | None = None
    saved_as: str | None = dataclasses.field(default=None, compare=False)
    """The type that a checkpoint names, which counts where `dtype` is auto."""

    @property
    def parts(self) -> dict[str, str]:
        """The hashes by name, for a record."""
        return {name: part for name, part in vars(self).items() if part is not None and name != "saved_as"}

    @property
    def key(self) -> str:
        """All of it as one hash."""
        return _sha256(json.dumps(self.parts, sort_keys=True).encode())

    def loaded(self, loading: Mapping[str, Any]) -> dict[str, str]:
        """What a result follows from: the model, and how it is loaded.

        loading: arguments of `load_model`, of which those count that change results and are set.
        """
        how = {name: loading.get(name) for name in ("dtype", "attn_implementation", "quantization")}
        if how["dtype"] in (None, "auto"):
            how["dtype"] = self.saved_as
        return {"model": self.key, **{name: str(value) for name, value in how.items() if value}}

    def changed(self, before: Mapping[str, Any]) -> list[str]:
        """The names of the parts that are not what a record of them says."""
        return [name for name in PARTS if self.parts.get(name) != before.get(name)]


PARTS = tuple(field.name for field in dataclasses.fields(Identity) if field.compare)


def identity_of(name: str | Path, revision: str | None = None) -> Identity:
    """Of what `load_model` would load: a folder, an adapter and its base, a GGUF file, a built-in model, a hub name.

    A file is hashed once in a process while it does not change. Raises ExpungeError where there is no such model.
    """
    with reading(name, "causal language model", "its files"):
        at = place_of(name, revision)
        adapter = at.adapter
        own = _Files(at.source, at.revision)
        base = _Files(adapter.base, adapter.base_revision) if adapter else own
        words = own if own.has("tokenizer_config.json") else base
        tokens = [words.hash(file) for file in TOKENIZER] + words.hashes_under("additional_chat_templates")
        settings = base.json(CONFIG)
        return Identity(
            weights=base.weights(at),
            config=base.hash(CONFIG) or _sha256(b""),
            generation=base.hash("generation_config.json"),
            tokenizer=_joined(tokens),
            adapter=_joined([own.hash(ADAPTER_CONFIG), own.tensors(ADAPTER_WEIGHTS)]) if adapter else None,
            steering=_joined([base.hash(SETTINGS), base.tensors(TENSORS)]),
            code=base.code(),
            saved_as=settings.get("dtype") or settings.get("torch_dtype"),
        )


def loaded_identity(model: nn.Module, tokenizer: Any = None, skip: Container[str] = ()) -> Identity:
    """Of a model in memory, as it is now; skip: names of weights that are no part of it.

    Its values are other ones than those of `identity_of`: what is loaded is not byte for byte what lies in the files.
    """
    inner: Any = inner_model(model)
    adapters = {name: config.to_dict() for name, config in getattr(model, "peft_config", {}).items()}
    generation = getattr(inner, "generation_config", None)
    return Identity(
        weights=weights_digest(model, skip),
        config=facts_digest([type(inner).__name__, inner.config._attn_implementation, inner.config.to_dict()]),
        generation=facts_digest(generation.to_dict()) if generation else None,
        tokenizer=tokenizer_digest(tokenizer) if tokenizer is not None else None,
        adapter=facts_digest(adapters) if adapters else None,
    )


def weights_digest(model: nn.Module, skip: Container[str] = ()) -> str:
    """Hex sha256 of all weights in memory but those named: names, types, shapes and bytes."""
    return _digest_tensors((name, tensor) for name, tensor in sorted(model.state_dict().items()) if name not in skip)


def tokenizer_digest(tokenizer: Any) -> str:
    """Of a tokenizer in memory: how it cuts, its special tokens and its chat template."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else tokenizer.get_vocab()
    if tokenizer.is_fast:  # set by the last call, whoever made it
        backend |= {"truncation": None, "padding": None}
    names = ("special_tokens_map", "chat_template", "padding_side", "truncation_side", "model_max_length")
    return facts_digest([backend, *(getattr(tokenizer, name, None) for name in names)])


def facts_digest(facts: Any) -> str:
    """Of settings in JSON's types, without what no result follows from."""
    return _sha256(json.dumps(_lasting(facts), sort_keys=True, default=str).encode())


def _lasting(thing: Any) -> Any:
    if isinstance(thing, Mapping):
        return {str(key): _lasting(value) for key, value in thing.items() if key not in VOLATILE}
    if isinstance(thing, (list, tuple)):
        return [_lasting(value) for value in thing]
    return sorted(map(str, thing)) if isinstance(thing, (set, frozenset)) else thing


class _Files:
    """The files of one model, in a folder or in the cache of the hub, by name."""

    def __init__(self, source: str, revision: str | None):
        self.folder = Path(source) if Path(source).is_dir() else None
        self.source, self.revision = source, revision
        if not self.folder:  # from here on one commit, and no more questions about what is in the cache
            self.revision = extract_commit_hash(self.path(CONFIG), None) or revision

    def path(self, file: str) -> str | None:
        if self.folder:
            return str(self.folder / file) if (self.folder / file).is_file() else None
        return cached_file(self.source, file, revision=self.revision, _raise_exceptions_for_missing_entries=False)

    def has(self, file: str) -> bool:
        return self.path(file) is not None

    def json(self, file: str) -> dict[str, Any]:
        found = self.path(file)
        return json.loads(Path(found).read_text(encoding="utf-8")) if found else {}

    def hash(self, file: str) -> str | None:
        found = self.path(file)
        return found and _hash_file(found, *_state(found))

    def tensors(self, file: str) -> str | None:
        found = self.path(file)
        return found and _hash_tensors((found,), (_state(found),))

    def weights(self, at: Place) -> str:
        """Of all tensors, in one file or in several; what is missing of them is for the loader to say."""
        if at.gguf:
            return str(self.hash(at.gguf))
        if self.has(WEIGHTS) or not self.has(INDEX):
            shards = [WEIGHTS]
        else:
            shards = sorted(set(self.json(INDEX).get("weight_map", {}).values()))
        paths = [path for shard in shards if (path := self.path(shard))]
        return _hash_tensors(tuple(paths), tuple(map(_state, paths)))

    def hashes_under(self, folder: str) -> list[str | None]:
        """Of a folder beside the others; a hub's is not looked into."""
        found = sorted((self.folder / folder).glob("*")) if self.folder else []
        return [_sha256(path.name.encode() + path.read_bytes()) for path in found]

    def code(self) -> str | None:
        """Of Python files beside the model; on a hub the commit says which they are."""
        if "auto_map" not in self.json(CONFIG):
            return None
        if not self.folder:
            return self.revision
        return _joined([_sha256(file.name.encode() + file.read_bytes()) for file in sorted(self.folder.glob("*.py"))])


def _state(path: str) -> tuple[int, ...]:
    """What tells that a file has not changed since it was hashed."""
    at = Path(path).stat()
    return at.st_ino, at.st_size, at.st_mtime_ns, at.st_ctime_ns


@cache
def _hash_file(path: str, *state: int) -> str:
    """A JSON object's without what no result follows from."""
    if path.endswith(".json"):
        try:
            settings = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError:
            pass
        else:
            return facts_digest(settings)
    with Path(path).open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@cache
def _hash_tensors(paths: tuple[str, ...], states: tuple[tuple[int, ...], ...]) -> str:
    try:
        return _digest_tensors(_read_tensors(paths))
    except SafetensorError:  # a broken file, which the loader refuses, is known by its bytes
        return str(_joined(map(_hash_file, paths)))


def _read_tensors(paths: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """In order of their names, one at a time."""
    files = [safe_open(path, framework="pt") for path in paths]
    for name, at in sorted((name, at) for at, file in enumerate(files) for name in file.keys()):  # noqa: SIM118
        yield name, files[at].get_tensor(name)


def _digest_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _joined(hashes: Iterable[str | None]) -> str | None:
    """One hash of several in order; None where there are none."""
    found = list(hashes)
    return _sha256(json.dumps(found).encode()) if any(found) else None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
