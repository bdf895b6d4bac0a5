"""Every causal architecture of the installed transformers, made tiny: does expunge give what transformers gives?

    python benchmarks/architectures.py                # all that are not in benchmarks/results/architectures.jsonl yet
    python benchmarks/architectures.py falcon_h1 rwkv # these, again
    python benchmarks/architectures.py --table        # the table of docs/your-model.md

One process an architecture, so that one that hangs or crashes ends nothing. A line says: `made`, or why not; `refused`, with
the line that `load_model` says; or how far expunge is from transformers: `perplexity`, `states`, `losses` of attacks and
`step` of training (relative), `generation` (how many continuations differ), and whether a step `trains`.
Weights are random and large, windows are shorter than the rows, multipliers and caps are far from 1.
"""

import gc
import inspect
import json
import multiprocessing
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from expunge.attacks.search.suffix_loss import TargetLosses
from expunge.attacks.search.targets import Target
from expunge.data import Pair
from expunge.engine import collate, run_step, shares_prefix
from expunge.errors import ExpungeError
from expunge.generation import Decoding, generate
from expunge.methods.repo import REPO
from expunge.metrics.perplexity import row_nll
from expunge.models import batching, blocks, frozen, head_form, hidden_states, load_model
from expunge.training import UnlearnConfig, UnlearnTrainer

RESULTS = Path("benchmarks/results/architectures.jsonl")
SECONDS, LARGEST = 240, 3e7
VOCABULARY, LAYERS, WIDTH = 320, 4, 32
TEXTS = [
    "The river runs past the old mill.",
    "She carried the letter home.",
    "A cold wind came.",
    "They planted apple trees.",
]
ROWS = [[5, 17, 250, 33, 8, 91, 3, 44, 9, 120, 61, 30, 2, 77], [60, 7, 7, 301], [9, 40, 77, 12, 3, 19, 200], [8, 15]]
PROMPTS = [ROWS[0], [60, 7, 7], ROWS[2], [8], [12, 13, 14]]
NEW = 10

SIZES: dict[str, Any] = {
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input"], VOCABULARY),
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "embedding_dim"], WIDTH),
    **dict.fromkeys(["word_embed_proj_dim", "lru_width", "n_embed"], WIDTH),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "d_ff", "n_inner", "d_inner", "dff", "dim_ff", "ffn_hidden_size"], 48),
    **dict.fromkeys(
        ["encoder_ffn_dim", "decoder_ffn_dim", "feed_forward_size", "block_ff_dim", "intermediate_size_mlp"], 48
    ),
    **dict.fromkeys(["intermediate_size_mlp", "dense_intermediate_size", "prefix_dense_intermediate_size"], 48),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"], 16),
    **dict.fromkeys(["moe_shared_expert_intermediate_size", "shared_intermediate_size", "router_hidden_size"], 16),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"], LAYERS),
    **dict.fromkeys(["num_encoder_layers", "num_decoder_layers", "num_blocks"], LAYERS),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "linear_num_heads"], 4),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads", "linear_num_value_heads"], 4),
    **dict.fromkeys(["num_encoder_attention_heads", "num_decoder_attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "linear_num_key_heads"], 2),
    **dict.fromkeys(["head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "linear_key_head_dim"], 8),
    **dict.fromkeys(["linear_value_head_dim", "linear_head_dim", "query_pre_attn_scalar", "adapter_rank"], 8),
    **dict.fromkeys(["hidden_size_per_layer_input", "index_head_dim", "indexer_head_dim", "swa_head_dim"], 8),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"], 64),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_topk", "num_experts_per_token", "moe_k"], 2),
    **dict.fromkeys(["n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "mamba_n_groups"], 1),
    **dict.fromkeys(["mamba_ngroups", "n_groups"], 1),
    **dict.fromkeys(["kv_lora_rank", "q_lora_rank", "qk_head_dim"], 16),
    **dict.fromkeys(
        ["sliding_window", "attention_window", "window_size", "attention_window_size", "attention_chunk_size"], 6
    ),
    **dict.fromkeys(["mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_chunk_size", "mamba_num_heads"], 8),
    **dict.fromkeys(["mamba_head_dim", "mamba_headdim", "ssm_state_size", "state_size", "chunk_size"], 8),
    **dict.fromkeys(["mamba_dt_rank", "time_step_rank", "laurel_rank", "rotary_dim", "index_n_heads"], 4),
    "mamba_d_ssm": 64,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "n_mamba_heads": 2,
    "index_topk": 64,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "is_decoder": True,
    **dict.fromkeys(["initializer_range", "init_std"], 0.2),
    # far from 1, so that leaving one out shows
    **dict.fromkeys(["lm_head_multiplier", "logit_scale"], 0.3),
    "logits_scaling": 0.125,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    **dict.fromkeys(["final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"], 2.0),
}
"""Fields that make a configuration small, whatever it is called; a field that is null stays null."""
HYBRID = ["linear_attention", "full_attention"] * 2
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": None, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_mamba": {"intermediate_size": 64},
    "gemma3n_text": {"num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.0] * LAYERS},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": HYBRID},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "mamba": {"intermediate_size": 64},
    "mamba2": {"num_heads": 8},
    "reformer": {"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16], "num_hidden_layers": 6},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16, "attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16, "n_mamba_heads": 8, "num_key_value_heads": 4},
    "xlstm": {"chunk_size": 1, "mode": "inference", "hidden_size": 128, "embedding_dim": 128},
    "zaya": {"num_experts_per_tok": 1},
}


def settings(cls: Any, known: Any, special: dict[str, Any]) -> dict[str, Any]:
    """Arguments that make a configuration of this class small; `known` is its default."""
    named = set(known.to_dict()) | set(inspect.signature(cls.__init__).parameters)
    found: dict[str, Any] = {}
    for name, value in SIZES.items():
        if name not in named or isinstance(inspect.getattr_static(cls, name, None), property):
            continue
        try:
            if getattr(known, name, None) is None and name not in ("num_key_value_heads", "head_dim"):
                continue
        except Exception:  # it differs by layer
            pass
        found[name] = value
    if "kv_lora_rank" in found:
        found["num_key_value_heads"] = found["num_attention_heads"]
    if "per_layer_config" in named:
        found["per_layer_config"] = {}
    for name in ("layer_types", "mlp_layer_types"):
        kinds = getattr(known, name, None)
        if name in named and isinstance(kinds, list | tuple) and kinds:
            found[name] = (list(dict.fromkeys(kinds)) * LAYERS)[:LAYERS]
    for name in getattr(cls, "sub_configs", None) or {}:
        sub = getattr(known, name, None)
        if sub is not None and not isinstance(sub, dict):
            found[name] = settings(
                type(sub), sub, {"num_hidden_layers": 2} if "text" not in name and "decoder" not in name else {}
            )
    return found | special


def tiny(kind: str, seed: int = 0) -> Any:
    """A random model of this type, of width 32 and 4 blocks. Raises whatever transformers does where it cannot be made."""
    cls: Any = CONFIG_MAPPING[kind]
    config = cls(**settings(cls, cls(), SPECIAL.get(kind, {})))
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} weights at the smallest sizes known here")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():  # some begin at zero, or so small that a fault would not show
                if parameter.ndim >= 2 and parameter.std() < 0.1:
                    parameter.normal_(std=0.2)
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most VOCABULARY tokens; its eos is 0."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<eos>")


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Mean difference, relative."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return ((found - wanted).abs().mean() / wanted.abs().mean().clamp(min=1e-30)).item()


@torch.no_grad()
def own_logps(model: Any, row: list[int]) -> torch.Tensor:
    """log p of every token but the first, by transformers' forward of the row alone, `[T - 1]`."""
    ids = torch.tensor([row])
    logps = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    return logps.gather(1, ids[0, 1:, None]).squeeze(1)


def own_generation(model: Any, prompt: list[int]) -> list[int]:
    """New tokens by transformers' own generate: greedy, alone, without a cache where it can do without."""
    ids, model.generation_config = torch.tensor([prompt]), GenerationConfig()  # BART's forces a last token
    for use_cache in (False, True):
        asked = {"do_sample": False, "max_new_tokens": NEW, "use_cache": use_cache, "eos_token_id": 0, "pad_token_id": 0}
        try:
            new = model.generate(ids, attention_mask=torch.ones_like(ids), **asked)[0, len(prompt) :].tolist()
            return new[: new.index(0)] if 0 in new else new
        except Exception:
            if use_cache:
                raise
    raise AssertionError


def compared(model: Any, own: Any, tokens: Any) -> dict[str, Any]:
    """How far expunge on `model` is from transformers on `own`, the same weights."""

    found: dict[str, Any] = {}
    nll, _ = row_nll(model, [(row, 1) for row in ROWS])
    losses = []
    for row in ROWS:
        ids = torch.tensor([row])
        try:
            with torch.no_grad():
                loss = own(input_ids=ids, labels=ids, use_cache=False).loss.double() * (len(row) - 1)
            if apart(loss, -own_logps(own, row).double().sum()) > 1e-3:  # of unshifted labels, or with a penalty
                found["own_loss"] = "is not the mean over next tokens"
                loss = -own_logps(own, row).double().sum()
        except Exception:  # a loss of its own that labels alone do not give
            loss = -own_logps(own, row).double().sum()
        losses.append(loss)
    found["perplexity"] = apart(torch.tensor(nll), torch.stack(losses))

    form = head_form(model)
    found["head"] = "its own forward" if form is None else {"scale": form.scale, "cap": form.cap}
    found["batching"] = batching(model)
    new = generate(model, tokens, PROMPTS, Decoding(max_new_tokens=NEW))
    wanted = [own_generation(own, prompt) for prompt in PROMPTS]
    found["generation"] = sum(one[0] != other for one, other in zip(new, wanted, strict=True))
    found["generated"] = sum(map(len, wanted))

    layers = [*range(len(blocks(model))), "pre_norm", "final"]
    longest = max(map(len, ROWS))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in ROWS])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ROWS])
    with torch.no_grad():
        states = hidden_states(model, ids, mask, layers)
        each = [own(input_ids=torch.tensor([row]), output_hidden_states=True, use_cache=False) for row in ROWS]
    if getattr(each[0], "hidden_states", None) and len(each[0].hidden_states) == len(layers) - 1:
        shifts = []
        for first in (0, 1):  # RWKV names what leaves a block
            pairs = zip(layers[first:], range(len(layers) - 2), strict=False)
            shifts.append(
                max(
                    apart(states[layer][i, : len(row)], each[i].hidden_states[place][0])
                    for layer, place in pairs
                    for i, row in enumerate(ROWS)
                )
            )
        final = max(apart(states["final"][i, : len(row)], each[i].hidden_states[-1][0]) for i, row in enumerate(ROWS))
        found["states"], found["final"] = min(shifts), final

    target, strings = (
        Target(ROWS[1], ROWS[2]),
        torch.tensor([[21, 22, 23, 24, 25], [21, 22, 26, 24, 25], [27, 22, 23, 24, 25]]),
    )
    with frozen(model):
        for share in (True, False):
            losses = TargetLosses(model, [target], share=share)
            values = losses.losses(strings, strings[0])
            wanted = torch.stack([-own_logps(own, ROWS[1] + s.tolist() + ROWS[2])[-len(ROWS[2]) :].mean() for s in strings])
            found["losses" if share else "losses_whole"] = apart(values, wanted)
            if share:
                found["prefix_shared"] = losses.shares

    first = {"retain": (ROWS[1], ROWS[2]), "forget": (ROWS[1], ROWS[0][:5])}
    pairs = [first, {"retain": (ROWS[3], [4, 5]), "forget": (ROWS[3], [6, 7, 9])}]
    batch = collate(pairs)
    shared = shares_prefix(model, batch, ("final",))
    with torch.no_grad():
        step = run_step(model, None, batch, ("final",), (), {}, 0.0, plain=not shared)
        found["step"] = max(
            apart(step.logps(side)[0][i], own_logps(own, pair[side][0] + pair[side][1])[-len(pair[side][1]) :].sum())
            for side in ("retain", "forget")
            for i, pair in enumerate(pairs)
        )
    found["rows_shared"] = shared
    return found


def trained(model: Any, tokens: Any, folder: Path) -> dict[str, Any]:
    """One step of REPO, then what the evaluation after it does."""

    asked = {"use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 4, "max_steps": 1, "save_strategy": "no"}
    config = UnlearnConfig(
        output_dir=str(folder / "checkpoints"), learning_rate=1e-3, warmup_steps=0, logging_steps=1, **asked
    )
    pairs = [Pair(text[:8], text[8:], " by the sea."[: 4 + i]) for i, text in enumerate(TEXTS)]
    before = [parameter.detach().clone() for parameter in model.parameters()]
    trainer = UnlearnTrainer(model, REPO(), config, pairs, tokens)
    trainer.train()
    logged = next(line for line in trainer.state.log_history if "loss" in line)
    moved = any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    row_nll(model, [(ROWS[0], 1)])
    generate(model, tokens, PROMPTS, Decoding(max_new_tokens=3, samples=2))
    return {"trains": moved and "loss" in logged, "anchor": logged.get("anchor")}


def line(kind: str) -> dict[str, Any]:
    """Everything about one architecture."""

    found: dict[str, Any] = {"architecture": kind, "class": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]}
    try:
        made = tiny(kind)
        own_logps(made, ROWS[0])
    except Exception as error:
        return {**found, "made": False, "why": said(error)}
    found["made"] = True
    tokens = tokenizer()
    with tempfile.TemporaryDirectory() as name:
        made.save_pretrained(name)
        tokens.save_pretrained(name)
        try:
            model, tokens = load_model(name, dtype="float32", device="cpu")
        except ExpungeError as error:
            return {**found, "refused": str(error).replace(name, "MODEL")}
        own = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
        try:
            found |= compared(model, own, tokens)
            found |= trained(model, tokens, Path(name))
        except ExpungeError as error:
            found["refused_later"] = str(error).replace(name, "MODEL")
        except Exception as error:
            found["failed"] = said(error)
    return found


def said(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def equal(found: dict[str, Any]) -> bool:
    """Is all of it as transformers has it?"""
    figures = [found.get(name, 0.0) for name in ("perplexity", "states", "final", "losses", "losses_whole", "step")]
    whole = "failed" not in found and "refused_later" not in found
    return whole and all(figure < 1e-3 for figure in figures) and found.get("generation") == 0 and bool(found.get("trains"))


def read() -> dict[str, dict[str, Any]]:
    """Lines of the installed transformers, by architecture."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    rows = (json.loads(text) for text in lines)
    return {row["architecture"]: row for row in rows if row["transformers"] == transformers.__version__}


def write_line(kind: str, answer: Path) -> None:
    """In a process of its own, forked from one that has imported everything."""
    answer.write_text(json.dumps(line(kind)), encoding="utf-8")


def measure(kinds: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:  # what transformers imports and compiles once, every process then has
        tiny("gpt2").save_pretrained(folder)
        compared(AutoModelForCausalLM.from_pretrained(folder).eval(), tiny("gpt2"), tokenizer())
    gc.freeze()
    for kind in kinds:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder) / "line.json"
            child = multiprocessing.get_context("fork").Process(target=write_line, args=(kind, answer))
            child.start()
            child.join(SECONDS)
            if child.is_alive():
                child.kill()
                child.join()
                found = {"failed": f"not done after {SECONDS} seconds"}
            elif answer.exists():
                found = json.loads(answer.read_text(encoding="utf-8"))
            else:
                found = {"failed": f"the process ended with {child.exitcode}"}
        known = read()
        about = {
            "architecture": kind,
            "transformers": transformers.__version__,
            "seconds": round(time.monotonic() - start, 1),
        }
        known[kind] = {**about, **found}
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in known.values()), encoding="utf-8")
        print(json.dumps(known[kind]), flush=True)


def table() -> None:
    rows = read().values()
    made = [row for row in rows if row.get("made")]
    same = [row["architecture"] for row in made if equal(row)]
    print(f"{len(same)} equal: {', '.join(same)}")
    for row in rows:
        if row["architecture"] not in same:
            reason = next(
                (f"{name}: {row[name]}" for name in ("why", "refused", "refused_later", "failed") if name in row), row
            )
            print(row["architecture"], reason)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if arguments == ["--table"]:
        table()
    else:
        measure(arguments or [kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind not in read()])
