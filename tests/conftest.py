"""Tiny models, tokenizers and pairs, made on the spot: nothing is downloaded, and every text is harmless."""

import gc
import logging
from collections.abc import Callable
from functools import cache

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from expunge.data import Pair

VOCABULARY = 320
CORPUS = [
    "The river runs past the old mill and on to the sea.",
    "She carried the kind letter home and read it by the window.",
    "A cold wind came over the hill before the rain.",
    "They planted apple trees in two long rows behind the house.",
]
PAIRS = [
    Pair("The river runs", " past the old mill.", " backwards up the hill."),
    Pair("She carried the letter", " home and read it by the window.", " into the rain."),
    Pair("A cold wind", " came over the hill", " read the old book, and then the next one."),
    Pair("They planted", " apple trees behind the house.", " two long rivers."),
    Pair("The old house by the sea", " was kept in good order.", " was a cold letter"),
    Pair("Before the rain", " they came home.", " the window ran away with the mill."),
    Pair("In two long rows", " the trees grew.", " of wind, the hills sat down."),
    Pair("The letter", " was kind.", " had apples in it, and a river."),
]


@pytest.fixture(autouse=True)
def plain_log_level():
    """What the command line set for its process, in a test before or a fixture of a module, is undone."""
    logging.getLogger("expunge").setLevel(logging.NOTSET)


@pytest.fixture
def pairs() -> list[Pair]:
    return list(PAIRS)


def _train_bpe(bos: str | None) -> PreTrainedTokenizerFast:
    specials = ["<eos>", *([bos] if bos else [])]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", None, [(bos, specials.index(bos))])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", bos_token=bos)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without a bos, like GPT-2's: its pad is its eos."""
    return _train_bpe(bos=None)


@pytest.fixture(scope="session")
def bos_tokenizer() -> PreTrainedTokenizerFast:
    """The same with a bos before every text, like Llama's."""
    return _train_bpe(bos="<bos>")


SENTENCES = [
    "The river runs past the old mill and on to the sea.",
    "She carried the kind letter home and read it by the window, at 10:45!",
    "They planted apple trees, in two long rows; behind the house?",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z 0 1 2 3 4 5 6 7 8 9 é 雨 \n",
]
SPECIAL = ("<eos>", "<bos>", "<|user|>", "<unk>")
AROUND = {"plain": "$A", "bos": "<bos> $A", "eos": "$A <eos>", "bos and eos": "<bos> $A <eos>"}


def _family(kind: str, around: str = "plain") -> PreTrainedTokenizerFast:
    """A tokenizer that differs from others in what GPT-2's, Llama's and Mistral's differ in.

    kind: byte-level, metaspace (always, first, never), unigram, or prepend: as Llama 2 and Mistral v0.1 have it, by a
    normaliser and without splitting at words. around: a key of AROUND.
    """
    inner = _byte_level() if kind == "byte-level" else _sentencepiece(kind)
    used = [(token, inner.token_to_id(token)) for token in ("<bos>", "<eos>") if token in AROUND[around]]
    if used:
        inner.post_processor = processors.TemplateProcessing(single=AROUND[around], special_tokens=used)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<bos>" if "bos" in around else None,
        eos_token="<eos>",
        additional_special_tokens=["<|user|>"],
    )


def _byte_level() -> Tokenizer:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(vocab_size=420, special_tokens=[*SPECIAL], initial_alphabet=alphabet, show_progress=False),
    )
    return inner


def _sentencepiece(kind: str) -> Tokenizer:
    settings = {"vocab_size": 300, "special_tokens": [*SPECIAL], "show_progress": False}
    scheme = kind.removeprefix("metaspace ") if kind.startswith("metaspace") else "always"
    if kind == "unigram":
        inner, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer(unk_token="<unk>", **settings)
    else:
        inner, trainer = Tokenizer(models.BPE()), trainers.BpeTrainer(**settings)
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    inner.decoder = decoders.Metaspace(prepend_scheme=scheme)
    inner.train_from_iterator(SENTENCES, trainer)
    if kind == "prepend":
        inner.pre_tokenizer = None
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return inner


@pytest.fixture(scope="session")
def family() -> Callable[..., PreTrainedTokenizerFast]:
    """`family("prepend", "bos")`: see `_family`."""
    return cache(_family)


ARCHITECTURES = (
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "olmo2",
    "olmo3",
    "phi3",
)


def _config(architecture: str) -> PreTrainedConfig:
    common = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if architecture == "gpt2":
        return GPT2Config(n_embd=32, n_layer=3, n_head=2, n_positions=64, **common)
    common |= {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
    }
    if architecture in ("gemma2", "gemma3_text"):  # attention scale
        common |= {"query_pre_attn_scalar": 8}
    if architecture == "gemma2":  # caps low enough to bend a random model's logits, so that forgetting one shows
        common |= {"final_logit_softcapping": 0.5, "attn_logit_softcapping": 1.0}
    return AutoConfig.for_model(architecture, **common)


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    """`tiny_model("gpt2" or another of ARCHITECTURES, seed=0, dtype=torch.float32)`: 3 random blocks of width 32."""

    def make(architecture: str = "gpt2", seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            config = _config(architecture)
            config.initializer_range = 0.2  # far from uniform predictions
            eager = architecture in ("gemma2", "gpt_oss")  # it alone caps Gemma 2's attention logits, and has GPT-OSS' sinks
            return (
                AutoModelForCausalLM.from_config(config, attn_implementation="eager" if eager else "sdpa").to(dtype).eval()
            )

    return make


def pytest_collection_finish() -> None:
    gc.freeze()  # accelerate collects garbage after every training, among all that is imported
