"""UnlearnTrainer: one subclass of `transformers.Trainer` for every trained method.

trainer = UnlearnTrainer(model, REPO(weight=0.2), UnlearnConfig(output_dir="out"), load_pairs("builtin"), tokenizer)
trainer.train(); trainer.save_model("out/model")
"""

from expunge.training.arguments import UnlearnConfig
from expunge.training.trainer import UnlearnTrainer

__all__ = ["UnlearnConfig", "UnlearnTrainer"]
