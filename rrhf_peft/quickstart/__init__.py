"""The embedded default behind `rrhf-peft demo`: text, base model, reward and the whole way to a merged model."""

from rrhf_peft.quickstart.demo import DemoOutcome, run_demo
from rrhf_peft.quickstart.size import BRIEF, FULL, TINY, DemoSize

__all__ = ["BRIEF", "FULL", "TINY", "DemoOutcome", "DemoSize", "run_demo"]
