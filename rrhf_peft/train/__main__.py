"""`python -m rrhf_peft.train` and `accelerate launch -m rrhf_peft.train`: the verb `rrhf-peft train`."""

from rrhf_peft.cli import run_module

if __name__ == "__main__":
    run_module("train")
