"""`python -m rrhf_peft.score` and `accelerate launch -m rrhf_peft.score`: the verb `rrhf-peft score`."""

from rrhf_peft.cli import run_module

if __name__ == "__main__":
    run_module("score")
