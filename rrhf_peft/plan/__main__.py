"""`python -m rrhf_peft.plan` and `accelerate launch -m rrhf_peft.plan`: the verb `rrhf-peft plan`."""

from rrhf_peft.cli import run_module

if __name__ == "__main__":
    run_module("plan")
