"""`python -m rrhf_peft.merge` and `accelerate launch -m rrhf_peft.merge`: the verb `rrhf-peft merge`."""

from rrhf_peft.cli import run_module

if __name__ == "__main__":
    run_module("merge")
