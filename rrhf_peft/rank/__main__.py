"""`python -m rrhf_peft.rank`: the verb `rrhf-peft rank`."""

from rrhf_peft.cli import run_module

if __name__ == "__main__":
    run_module("rank")
