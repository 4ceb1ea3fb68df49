"""`python -m rrhf_peft.report` and `accelerate launch -m rrhf_peft.report`: the verb `rrhf-peft report`."""

from rrhf_peft.cli import run_module

if __name__ == "__main__":
    run_module("report")
