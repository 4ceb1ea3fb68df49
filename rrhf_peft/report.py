"""The verb `rrhf-peft report`, and `python -m rrhf_peft.report`.

Left to others: what the report holds (`rrhf_peft.reporting`), and every other verb (`cli`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rrhf_peft.console import plain_errors


@plain_errors()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN", help="Folders of training runs, evaluations, rounds or merged models.", show_default=False
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The HTML file. Unset: report.html in the first folder.", show_default=False
        ),
    ] = None,
) -> None:
    """Show runs in one HTML file: results, curves, rewards before and after, examples side by side.

    The file needs no network and no server. Several training runs are
    drawn into the same axes. An earlier report is replaced; any other
    file is not.

    [bold]Examples[/bold]

      rrhf-peft report runs/quickstart
      rrhf-peft report runs/evaluation runs/quickstart -o report.html
    """
    from rrhf_peft.reporting import write_report

    typer.echo(f"Done: {write_report(runs, output)}")


def main() -> None:
    """The entry of `python -m rrhf_peft.report`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
    app.command()(report)
    app(prog_name="python -m rrhf_peft.report")


if __name__ == "__main__":
    main()
