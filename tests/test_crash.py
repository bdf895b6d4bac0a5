"""Kill a run at random moments, saves included, and start it again: it ends where an undisturbed one does, bit by bit.

EXPUNGE_KILLS=20 pytest tests/test_crash.py        # as often as that; 2 by default
"""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

from expunge.callbacks import last_checkpoint

KILLS = int(os.environ.get("EXPUNGE_KILLS", "2"))
STATE = ("model.safetensors", "heads.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")


def unfinished(checkpoints: Path) -> list[Path]:
    return [path for path in checkpoints.glob("*") if not (path / "trainer_state.json").exists()]


def test_killed_anywhere_a_run_ends_where_an_undisturbed_one_does(tmp_path, tiny_model, tokenizer, pairs):
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [f'{{"prompt": "{pair.prompt}", "chosen": "{pair.chosen}", "rejected": "{pair.rejected}"}}\n' for pair in pairs]
    (tmp_path / "pairs.jsonl").write_text("".join(rows))

    steps = 12 * KILLS

    def start(name: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "expunge", "train", "--quiet", "--model", tmp_path / "model"]
        command += ["--pairs", tmp_path / "pairs.jsonl", "--out", tmp_path / name, f"training.max_steps={steps}"]
        command += ["training.save_steps=1", "training.per_device_train_batch_size=2", "training.warmup_steps=0"]
        return subprocess.Popen(
            map(str, command), stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )

    moment = random.Random(0)
    checkpoints = tmp_path / "killed" / "checkpoints"
    half_written = 0
    for kill in range(KILLS):
        before = set(checkpoints.glob("*"))
        process = start("killed")
        while process.poll() is None and set(checkpoints.glob("*")) <= before:
            time.sleep(0.001)
        if kill % 2:
            time.sleep(moment.uniform(0, 0.2))
        else:  # in the middle of a save
            while process.poll() is None and not unfinished(checkpoints):
                pass
        assert process.poll() is None, f"ended before it was killed for the {kill + 1}th time: {process.communicate()[1]}"
        process.kill()
        process.wait()
        half_written += bool(unfinished(checkpoints))
    assert half_written
    said = ""
    for name in ("killed", "whole"):
        process = start(name)
        said += process.communicate()[1]
        assert process.returncode == 0, said
    print(f"{KILLS} kills, after {half_written} of which a checkpoint was half-written")

    last = last_checkpoint(checkpoints)
    assert last is not None and last.name == f"checkpoint-{steps}"
    for name in STATE:
        assert (last / name).read_bytes() == (tmp_path / "whole" / "checkpoints" / last.name / name).read_bytes(), name
    for name in ("model/model.safetensors", "training.jsonl"):
        assert (tmp_path / "killed" / name).exists()
    assert (tmp_path / "killed/model/model.safetensors").read_bytes() == (
        tmp_path / "whole/model/model.safetensors"
    ).read_bytes()
