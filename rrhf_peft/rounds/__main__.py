"""The entry of `python -m rrhf_peft.rounds` and `accelerate launch -m rrhf_peft.rounds`.

Left to others: the verb itself (`rounds.command`).
"""

import typer

from rrhf_peft.rounds.command import rounds

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
app.command()(rounds)

if __name__ == "__main__":
    app(prog_name="python -m rrhf_peft.rounds")
