"""Sampling: prompts and a policy in, candidate responses out."""

from rrhf_peft.sampling.candidate import Candidate, Decoding
from rrhf_peft.sampling.diverse_beam import diverse_beam_search
from rrhf_peft.sampling.prompts import encode_prompts
from rrhf_peft.sampling.transformers_backend import sample_top_p
from rrhf_peft.sampling.transformers_policy import TokenBudget, respond

__all__ = [
    "Candidate",
    "Decoding",
    "TokenBudget",
    "diverse_beam_search",
    "encode_prompts",
    "respond",
    "sample_top_p",
]
