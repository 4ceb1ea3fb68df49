"""`python -m rrhf_peft.compare` and `accelerate launch -m rrhf_peft.compare`: the verb `rrhf-peft compare`."""

from rrhf_peft.cli import run_module

if __name__ == "__main__":
    run_module("compare")
