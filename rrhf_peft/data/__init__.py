"""Files -> RankedGroup -> token ids -> GroupBatch, and the report of what became of the data."""

from rrhf_peft.data.collating import GroupCollator, source_names
from rrhf_peft.data.example_view import render_example
from rrhf_peft.data.formats import IMPORTERS
from rrhf_peft.data.ranked_statistics import RankedStatistics, SourceReport, ranked_statistics
from rrhf_peft.data.reading import ConversionReport, convert, hold_out, read_groups, write_ranked
from rrhf_peft.data.report import DataReport
from rrhf_peft.data.report_view import report_table
from rrhf_peft.data.score_plots import plot_scores
from rrhf_peft.data.templates import TEMPLATES
from rrhf_peft.data.tokenizing import tokenize_groups

__all__ = [
    "IMPORTERS",
    "TEMPLATES",
    "ConversionReport",
    "DataReport",
    "GroupCollator",
    "RankedStatistics",
    "SourceReport",
    "convert",
    "hold_out",
    "plot_scores",
    "ranked_statistics",
    "read_groups",
    "render_example",
    "report_table",
    "source_names",
    "tokenize_groups",
    "write_ranked",
]
