"""The log-prob engine: model + GroupBatch -> ResponseLogProbs, each prompt computed once, exactly."""

from rrhf_peft.logprobs.engine import LogProbEngine, TokenCount, install, uninstall
from rrhf_peft.logprobs.self_check import Proof, prove

__all__ = ["LogProbEngine", "Proof", "TokenCount", "install", "prove", "uninstall"]
