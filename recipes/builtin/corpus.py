"""The pre-training corpus: a seeded mixture of public text, tokenised and packed into rows of one context.

`python recipes/builtin/corpus.py` writes build/builtin/{tokenizer/, corpus.safetensors, corpus.json}, and beside itself
corpus-digests.safetensors: hashes of every line and sentence, by which a test holds that no evaluation text is in it.
Short comments of one source and label are joined into threads: alone, they would mostly teach the model to stop.
"""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
from decontaminate import Forbidden, digests
from safetensors.numpy import save_file
from sources import forbidden_texts, imdb, labelled, wikipedia, wikitext_articles
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

BUILD = Path("build/builtin")
DIGESTS = Path(__file__).with_name("corpus-digests.safetensors")
SEED = 0
VOCABULARY = 8192
CONTEXT = 256
TOKENS = 3000 * 32 * CONTEXT
END = "<|endoftext|>"
SHARES = {"wikitext": 0.25, "wikipedia": 0.36, "imdb": 0.14, "toxic": 0.20, "civil": 0.05}
THREAD_CHARACTERS = 900


def threads(comments: list[tuple[str, str]], rng: random.Random) -> list[str]:
    """Comments of one source, shuffled and joined line by line into documents of some 900 characters."""
    documents, by_source = [], {}
    rng.shuffle(comments)
    for source, text in comments:
        thread = by_source.setdefault(source, [])
        thread.append(text)
        if sum(map(len, thread)) >= THREAD_CHARACTERS:
            documents.append("\n".join(by_source.pop(source)))
    return documents + ["\n".join(thread) for thread in by_source.values()]


def documents(rng: random.Random) -> dict[str, list[str]]:
    """Clean documents of each source, shuffled; nothing that repeats evaluation text."""
    forbidden = Forbidden(forbidden_texts())
    comments = [row for row in labelled() if not forbidden.touches(row[1])]
    articles = list(wikipedia())
    rng.shuffle(articles)
    pools = {
        "wikitext": wikitext_articles("wikitext-2/wiki.train.tokens"),
        "wikipedia": articles[:3200],
        "imdb": list(imdb()),
        "toxic": threads([(source, text) for source, text, toxic in comments if toxic], rng),
        "civil": threads([(source, text) for source, text, toxic in comments if not toxic], rng),
    }
    clean = {}
    for name, pool in pools.items():
        rng.shuffle(pool)
        clean[name] = [text for text in pool if not forbidden.touches(text)]
        print(f"{name}: {len(pool)} documents, {len(pool) - len(clean[name])} dropped for overlap", flush=True)
    return clean


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def pack(tokenizer: Tokenizer, pools: dict[str, list[str]], rng: random.Random) -> tuple[np.ndarray, dict]:
    """Rows `[N, CONTEXT]` of token ids: each source repeated to its share, all documents shuffled, cut into rows."""
    end = tokenizer.token_to_id(END)
    chosen, counts, passes = [], Counter(), {}
    for name, pool in pools.items():
        encoded = [np.array([*e.ids, end], dtype=np.uint16) for e in tokenizer.encode_batch(pool)]
        quota = int(SHARES[name] * TOKENS)
        passes[name] = round(quota / sum(map(len, encoded)), 2)
        while counts[name] < quota:
            rng.shuffle(encoded)
            for ids in encoded:
                if counts[name] >= quota:
                    break
                ids = ids[: quota - counts[name]]
                chosen.append(ids)
                counts[name] += len(ids)
    rng.shuffle(chosen)
    stream = np.concatenate(chosen)
    rows = stream[: len(stream) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
    return rows, {"tokens": dict(counts), "passes": passes, "rows": len(rows)}


def corpus_digests(rows: np.ndarray, tokenizer: Tokenizer, at_once: int = 2_000_000) -> np.ndarray:
    """Sorted int64 hashes of what the rows hold, read back from the token ids that the model is trained on."""
    stream, found = rows.reshape(-1), set()
    for start in range(0, len(stream), at_once):
        text = tokenizer.decode(stream[start : start + at_once].tolist(), skip_special_tokens=False)
        found |= digests(text.split(END))
    return np.array(sorted(found), dtype=np.int64)


def main() -> None:
    BUILD.mkdir(parents=True, exist_ok=True)
    rng = random.Random(SEED)
    pools = documents(rng)
    sample = [text for pool in pools.values() for text in pool[: len(pool) // 4]]
    tokenizer = train_tokenizer(sample)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, unk_token=END, model_max_length=CONTEXT
    ).save_pretrained(BUILD / "tokenizer")
    rows, facts = pack(tokenizer, pools, rng)
    save_file({"rows": rows}, BUILD / "corpus.safetensors")
    save_file({"digests": corpus_digests(rows, tokenizer)}, DIGESTS)
    (BUILD / "corpus.json").write_text(json.dumps({"seed": SEED, "shares": SHARES} | facts, indent=2))
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
