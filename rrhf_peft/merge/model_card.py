"""The merged model's card: what it is, how it was made, how faithful the merge is, how to load it."""

from __future__ import annotations

from pathlib import Path

import yaml

from rrhf_peft import __version__
from rrhf_peft.merge.report import MergeReport, fidelity_rows, size_text


def model_card(report: MergeReport) -> str:
    """Markdown with the hub's metadata block."""
    name = Path(report.output).name
    base_is_folder = Path(report.base_model).is_dir()
    base = Path(report.base_model).name if base_is_folder else report.base_model
    metadata: dict[str, object] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if not base_is_folder:  # the hub refuses a base model that is a folder on someone's disk
        metadata["base_model"] = report.base_model
    metadata["tags"] = ["rrhf", "rrhf-peft", "merged-adapter"]
    rows = "\n".join(f"| {title} | {value} |" for title, value in fidelity_rows(report))
    return f"""---
{yaml.safe_dump(metadata, sort_keys=False).strip()}
---

# {name}

Standalone weights: `{base}` with a LoRA adapter trained on ranked responses
([RRHF](https://arxiv.org/abs/2304.05302)) merged in by rrhf-peft {__version__}. Loading it needs neither PEFT nor
bitsandbytes.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

## How it was merged

{_explain_base(report)}

| | |
| --- | --- |
| weights written | {report.tensors} tensors, {size_text(report.total_bytes)}, {report.dtype} |
| changed by the adapter | {report.changed_tensors} tensors, sum of Frobenius norms {report.delta_norm:.4g} |
{rows}

`merge_report.json` holds these numbers for programs.
"""


def _explain_base(report: MergeReport) -> str:
    if report.training_quantization == "none":
        return f"The adapter was trained on the unquantised base in {report.training_dtype} and added to those weights."
    if report.base == "dequantized":
        return (
            f"The adapter was trained on the base in {report.training_quantization}. The base weights were quantised "
            "the same way and multiplied out again before the adapter was added: these are the weights it was "
            "trained with."
        )
    return (
        f"The adapter was trained on the base in {report.training_quantization} but added to the original, unquantised "
        "weights. It never saw those, so the model computes something slightly different from what was trained."
    )
