"""The report: folders of training, evaluation and rounds in, one HTML file that needs nothing else out.

    folders --read--> runs --say and draw--> sections of blocks --page.html--> report.html

Left to others: the numbers themselves (`rrhf_peft.training`, `rrhf_peft.evaluation`, `rrhf_peft.rounds`) and the
plots of an evaluation (`rrhf_peft.evaluation.plots`).
"""

from rrhf_peft.reporting.page import write_report

__all__ = ["write_report"]
