"""Scoring: prompts and responses in, one number per response out, higher is better."""

from rrhf_peft.scoring.rule import Rule, load_rule
from rrhf_peft.scoring.sentiment import vader

__all__ = ["Rule", "load_rule", "vader"]
