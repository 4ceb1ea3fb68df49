"""`python -m rrhf_peft.sample` and `accelerate launch -m rrhf_peft.sample`: the verb `rrhf-peft sample`."""

from rrhf_peft.cli import run_module

if __name__ == "__main__":
    run_module("sample")
