"""Evaluation: texts and policies in, numbers out. Pure functions wherever no model is needed."""

from rrhf_peft.evaluation.likelihood import mean_log_probs, perplexity
from rrhf_peft.evaluation.ranking import pair_accuracy
from rrhf_peft.evaluation.reward import Interval, mean_reward
from rrhf_peft.evaluation.texts import distinct_n, mean_words

__all__ = ["Interval", "distinct_n", "mean_log_probs", "mean_reward", "mean_words", "pair_accuracy", "perplexity"]
