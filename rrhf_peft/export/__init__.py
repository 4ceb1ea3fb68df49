"""Adapter in, standalone weights out, with the proof that they compute the same.

Left to others: training the adapter (`rrhf_peft.training`), and measuring what it is worth
(`rrhf_peft.evaluation`).
"""

from rrhf_peft.export.fidelity import Fidelity
from rrhf_peft.export.merge import merge_adapter
from rrhf_peft.export.progress import merge_progress
from rrhf_peft.export.report import MergeReport, render_report

__all__ = ["Fidelity", "MergeReport", "merge_adapter", "merge_progress", "render_report"]
