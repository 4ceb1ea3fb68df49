"""`rrhf-peft doctor`: what this machine has of all that training may need, and what to do about the rest."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from huggingface_hub import constants, get_token
from packaging.requirements import Requirement

#: The hub answers within this many seconds or counts as out of reach.
SECONDS_FOR_THE_HUB = 4.0
#: A 7B model and its merged copy take about this much.
USUAL_GB = 40


class Finding(NamedTuple):
    """One thing that was looked at. `problem`: something will fail; `note`: something cannot be used."""

    subject: str
    state: Literal["ok", "note", "problem"]
    detail: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Look at everything; takes some seconds, changes nothing."""
    return [*_packages(), *_devices(), _quantization(), *_extras(), _disk(), _hub()]


def _packages() -> Iterator[Finding]:
    """The required packages at the versions that the installed metadata asks for."""
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for requirement in map(Requirement, importlib.metadata.requires("rrhf-peft") or []):
        if requirement.marker is None:
            yield _package(requirement)


def _package(requirement: Requirement) -> Finding:
    install = f"pip install '{requirement.name}{requirement.specifier}'"
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(requirement.name, "problem", "not installed", install)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(requirement.name, "problem", f"{version}, but {requirement.specifier} is needed", install)
    return Finding(requirement.name, "ok", version)


def _devices() -> Iterator[Finding]:
    for index in range(torch.cuda.device_count()):
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info(index))
        name, has_bf16 = torch.cuda.get_device_name(index), torch.cuda.is_bf16_supported(including_emulation=False)
        detail = f"{name}, {free:.1f} of {total:.1f} GiB free, {'bfloat16' if has_bf16 else 'no bfloat16'}"
        remedy = "" if has_bf16 else "Training computes in float32 there; training.fp16: true is faster, and riskier."
        yield Finding(f"GPU {index}", "ok" if has_bf16 else "note", detail, remedy)
    if torch.cuda.device_count():
        return
    if shutil.which("nvidia-smi") and torch.version.cuda is None:
        remedy = "This torch was built for CPUs. Install one for CUDA: https://pytorch.org/get-started/locally."
        yield Finding("GPU", "problem", "there is a driver, but torch cannot use it", remedy)
    else:
        remedy = "Small models train on the CPU; for others rent a GPU (`rrhf-peft plan RECIPE` says how large)."
        yield Finding("GPU", "note", f"none that torch sees; {os.cpu_count()} CPU cores", remedy)


def _quantization() -> Finding:
    """Whether bitsandbytes can store weights in 4 bits on the device that training would use."""
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        device = "cuda" if torch.cuda.is_available() else "cpu"
        values = torch.linspace(-1, 1, 256, device=device).reshape(4, 64)
        restored = dequantize_4bit(*quantize_4bit(values, quant_type="nf4"))
        error = float((restored - values).abs().max())
    except Exception as error_raised:  # a broken library raises whatever it likes
        said = str(error_raised).splitlines() or [type(error_raised).__name__]
        remedy = "Install bitsandbytes again, for this CUDA version; without it: model.quantization: none."
        return Finding("4-bit weights", "problem", said[0][:200], remedy)
    return Finding("4-bit weights", "ok", f"nf4 works on {device} (largest error {error:.2f} of 1)")


def _extras() -> Iterator[Finding]:
    """Per extra of the installed package, whether all it asks for is here."""
    wanted: dict[str, list[Requirement]] = {}
    for requirement in map(Requirement, importlib.metadata.requires("rrhf-peft") or []):
        for extra in importlib.metadata.metadata("rrhf-peft").get_all("Provides-Extra") or []:
            if extra in ("dev", "docs") or requirement.name == "rrhf-peft" or requirement.marker is None:
                continue
            if requirement.marker.evaluate({"extra": extra}) and not requirement.marker.evaluate({"extra": ""}):
                wanted.setdefault(extra, []).append(requirement)
    for extra, requirements in wanted.items():
        lacking = [finding.subject for finding in map(_package, requirements) if finding.state != "ok"]
        if lacking:
            detail = f"not installed: {', '.join(lacking)}"
            yield Finding(f"extra {extra}", "note", detail, f"pip install 'rrhf-peft[{extra}]', if you want it")
        else:
            yield Finding(f"extra {extra}", "ok", ", ".join(requirement.name for requirement in requirements))


def _disk() -> Finding:
    cache = Path(constants.HF_HUB_CACHE)
    there = next(path for path in (cache, *cache.parents) if path.exists())
    free = {folder: shutil.disk_usage(folder).free / 1e9 for folder in (Path.cwd(), there)}
    detail = f"{free[Path.cwd()]:.0f} GB free here, {free[there]:.0f} GB where the hub's files go ({cache})"
    if min(free.values()) >= USUAL_GB:
        return Finding("disk", "ok", detail)
    remedy = f"A 7B model with its merged copy takes about {USUAL_GB} GB. Make room, or set HF_HOME to another disk."
    return Finding("disk", "note", detail, remedy)


def _hub() -> Finding:
    if constants.HF_HUB_OFFLINE:
        return Finding("hub", "note", "switched off by HF_HUB_OFFLINE", "Unset it to download models and data.")
    import urllib.error
    import urllib.request

    request = urllib.request.Request(f"{constants.ENDPOINT}/api/models/gpt2", headers={"User-Agent": "rrhf-peft"})
    try:
        with contextlib.closing(urllib.request.urlopen(request, timeout=SECONDS_FOR_THE_HUB)):
            pass
    except urllib.error.HTTPError as error:
        return Finding("hub", "note", f"{constants.ENDPOINT} answers {error.code}", "Try again later.")
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "reason", error))
        remedy = "Check network and proxy (HTTPS_PROXY); or copy models here and name their folders (HF_HUB_OFFLINE=1)."
        return Finding("hub", "note", f"{constants.ENDPOINT} is out of reach ({reason})", remedy)
    if get_token() is None:
        return Finding("hub", "ok", f"{constants.ENDPOINT}, no token", "For gated models and push: `hf auth login`.")
    return Finding("hub", "ok", f"{constants.ENDPOINT}, with a token")
