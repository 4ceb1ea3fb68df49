"""`python -m rrhf_peft.demo` and `accelerate launch -m rrhf_peft.demo`: the verb `rrhf-peft demo`."""

from rrhf_peft.cli import run_module

if __name__ == "__main__":
    run_module("demo")
