"""Score candidate responses, higher is better: `run` is the story, each scorer a file beside it."""

from rrhf_peft.score.sentiment import vader

__all__ = ["vader"]
