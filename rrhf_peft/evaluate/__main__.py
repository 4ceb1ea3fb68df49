"""`python -m rrhf_peft.evaluate` and `accelerate launch -m rrhf_peft.evaluate`: the verb `rrhf-peft evaluate`."""

from rrhf_peft.cli import run_module

if __name__ == "__main__":
    run_module("evaluate")
