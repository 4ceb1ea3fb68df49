"""Files -> RankedGroup -> token ids -> GroupBatch, and the report of what became of the data."""

from rrhf_peft.data.arrow import GroupTable, TokenTable
from rrhf_peft.data.formats import IMPORTERS
from rrhf_peft.data.inspect import plot_scores, render_example
from rrhf_peft.data.reading import (
    ConversionReport,
    convert,
    hold_out,
    open_groups,
    prompt_overlap,
    read_groups,
    without_overlap,
    write_ranked,
)
from rrhf_peft.data.report import DataReport, RankedStatistics, SourceReport, ranked_statistics, report_table
from rrhf_peft.data.templates import (
    TEMPLATES,
    chat_messages,
    end_of_response_ids,
    prompt_text,
    render_chat,
    stop_token_ids,
    template_note,
    tokenization_fingerprint,
    transcript,
)
from rrhf_peft.data.tokenizing import (
    Encoder,
    GroupCollator,
    continuation_ids,
    conversation_ids,
    encode_prompts,
    source_names,
    tokenize_every_response,
    tokenize_groups,
)

__all__ = [
    "IMPORTERS",
    "TEMPLATES",
    "ConversionReport",
    "DataReport",
    "Encoder",
    "GroupCollator",
    "GroupTable",
    "RankedStatistics",
    "SourceReport",
    "TokenTable",
    "chat_messages",
    "continuation_ids",
    "conversation_ids",
    "convert",
    "encode_prompts",
    "end_of_response_ids",
    "hold_out",
    "open_groups",
    "plot_scores",
    "prompt_overlap",
    "prompt_text",
    "ranked_statistics",
    "read_groups",
    "render_chat",
    "render_example",
    "report_table",
    "source_names",
    "stop_token_ids",
    "template_note",
    "tokenization_fingerprint",
    "tokenize_every_response",
    "tokenize_groups",
    "transcript",
    "without_overlap",
    "write_ranked",
]
