"""Train the built-in base model on build/builtin/corpus.safetensors: GPT-2, 12 layers x 192, 7 M parameters.

`python recipes/builtin/pretrain.py` on CPU or accelerator; the same command goes on from the last checkpoint.
On a CPU, `MALLOC_TOP_PAD_=1073741824 MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592` keeps large
blocks from being handed back and forth to the system at every step.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

BUILD = Path("build/builtin")
CHECKPOINT = BUILD / "pretrain.pt"
BATCH = 32
LEARNING_RATE = 3e-3
WARMUP = 100
SEED = 0
SECONDS_BETWEEN_CHECKPOINTS = 600


def build_model(vocabulary: int, context: int, end: int) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=context,
        n_embd=192,
        n_layer=12,
        n_head=3,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=end,
        eos_token_id=end,
        activation_function="gelu_pytorch_tanh",
    )
    return GPT2LMHeadModel(config)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a fiftieth."""
    if step < WARMUP:
        return LEARNING_RATE * (step + 1) / WARMUP
    progress = (step - WARMUP) / max(1, steps - WARMUP)
    return LEARNING_RATE * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def optimizer_for(model: torch.nn.Module) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", action="store_true", help="torch.compile the loss (needs a C++ compiler)")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(BUILD / "tokenizer")
    rows = load_file(BUILD / "corpus.safetensors")["rows"]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED))
    steps = len(rows) // BATCH
    model = build_model(len(tokenizer), rows.shape[1], tokenizer.eos_token_id).to(device).train()
    optimizer = optimizer_for(model)
    step, seconds = 0, 0.0
    if CHECKPOINT.exists():
        state = torch.load(CHECKPOINT, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]

    def save() -> None:
        temporary = CHECKPOINT.with_suffix(".tmp")
        torch.save(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds},
            temporary,
        )
        temporary.replace(CHECKPOINT)

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16):
            hidden = model.transformer(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
            logits = F.linear(hidden, model.lm_head.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    compute = torch.compile(loss_of) if arguments.compile else loss_of
    saved = time.monotonic()
    while step < steps:
        started = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        ids = rows[order[step * BATCH : (step + 1) * BATCH]].to(device=device, dtype=torch.long)
        loss = compute(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        seconds += time.monotonic() - started
        if step % 20 == 0:
            line = {"step": step, "of": steps, "loss": round(loss.item(), 4), "seconds": round(seconds)}
            print(json.dumps(line), flush=True)
        if time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
            save()
            saved = time.monotonic()
    save()
    model.to(torch.bfloat16).save_pretrained(BUILD / "model")
    tokenizer.save_pretrained(BUILD / "model")
    facts = {
        "steps": step,
        "tokens": step * BATCH * rows.shape[1],
        "seconds": round(seconds),
        "loss": loss.item(),
        "batch_rows": BATCH,
        "learning_rate": LEARNING_RATE,
        "seed": SEED,
        "device": device,
    }
    (BUILD / "pretrain.json").write_text(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
