"""Score candidate responses, higher is better: `run` is the story, each scorer a file beside it."""

from rrhf_peft.score.rule import Rule, load_rule, math_answer, vader

__all__ = ["Rule", "load_rule", "math_answer", "vader"]
