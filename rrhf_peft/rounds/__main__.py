"""`python -m rrhf_peft.rounds` and `accelerate launch -m rrhf_peft.rounds`: the verb `rrhf-peft rounds`."""

from rrhf_peft.cli import run_module

if __name__ == "__main__":
    run_module("rounds")
