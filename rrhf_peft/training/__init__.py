"""Training: `RRHFTrainer` for Python, `train_recipe` for a recipe."""

from rrhf_peft.training.config import RRHFConfig
from rrhf_peft.training.run import TrainOutcome, train_recipe
from rrhf_peft.training.trainer import RRHFTrainer

__all__ = ["RRHFConfig", "RRHFTrainer", "TrainOutcome", "train_recipe"]
