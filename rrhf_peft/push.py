"""`rrhf-peft push`: an adapter or a merged model to the hub, with a card that shows how it was measured.

Nothing is sent unless that is asked for: without it, what would be sent is listed and the card is printed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from rrhf_peft.evaluate.folder import PLOTS, TABLE
from rrhf_peft.plotting import styles
from rrhf_peft.records import UserError
from rrhf_peft.report.folders import Runs, TrainingRun, read_runs
from rrhf_peft.report.plots import Curve, curves_figure
from rrhf_peft.train.run_folder import DATA_REPORT, METRICS, RECIPE

#: What of a run's or a merged model's folder others can use; not checkpoints, logs or the optimizer's state.
SENT = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "adapter_config.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"),
    *("chat_template*", "merge_report.json", RECIPE, DATA_REPORT, METRICS),
)
_PANELS = {"loss": "loss", "pair_accuracy": "pairs ordered right"}


@dataclass(frozen=True)
class Upload:
    """What goes to the hub: files of the folder, and the card with its figures.

    Attributes:
        repository: Its hub id.
        files: Name there -> file here.
        figures: Name there -> contents.
        card: README.md.
        notes: What its readers could not use.
    """

    repository: str
    files: dict[str, Path]
    figures: dict[str, bytes]
    card: str
    notes: list[str]


def prepare(run: Path, repository: str, evaluations: Sequence[Path] = ()) -> Upload:
    """Collect what would be sent; reads only.

    Args:
        run: A run folder, or the folder of a merged model.
        repository: Hub id, user/name.
        evaluations: Evaluation folders whose tables and plots go onto the card.

    Raises:
        UserError: no such folder or no weights in it, a damaged file, or a name that the hub does not take.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"{repository!r} is no hub id ({error}). Give user/name.") from None
    if not run.is_dir():
        raise UserError(f"{run}: there is no such folder. Give a run's folder, or that of a merged model.")
    files = {path.name: path for pattern in SENT for path in sorted(run.glob(pattern)) if path.is_file()}
    weights = [name for name in files if name.endswith(".safetensors")]
    if not weights or not (run / "README.md").is_file():
        raise UserError(
            f"{run}: holds no finished run and no merged model (weights as .safetensors, and README.md). Train or "
            "merge first, or give another folder."
        )
    reported = [*([run] if (run / RECIPE).is_file() else []), *evaluations]
    card, notes = (run / "README.md").read_text(encoding="utf-8"), []
    figures: dict[str, bytes] = {}
    if reported:
        runs = read_runs(reported)
        results, figures = _results(runs, evaluations)
        head, separator, rest = card.partition("\n## ")
        card = f"{head}{results}{separator}{rest}"
        base = next((str((one.recipe.get("model") or {}).get("name")) for one in runs.training.values()), "")
        if "adapter_config.json" in files and Path(base).is_dir():
            notes.append(f"The adapter names its base as the folder {base}, which others do not have: push it merged.")
    return Upload(repository, files, figures, card.replace(str(run), repository.split("/")[-1]), notes)


def send(upload: Upload, *, public: bool = False) -> str:
    """Create the repository where it is not there yet, and upload; returns its address.

    Raises:
        UserError: not logged in, not allowed, or the hub is out of reach.
    """
    api = HfApi()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, path in upload.files.items():
            (folder / name).symlink_to(path.resolve())
        for name, content in {**upload.figures, "README.md": upload.card.encode("utf-8")}.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        try:
            url = api.create_repo(upload.repository, private=not public, exist_ok=True)
            api.upload_folder(repo_id=upload.repository, folder_path=folder, commit_message="Upload by rrhf-peft push")
        except HfHubHTTPError as error:
            code = error.response.status_code if error.response is not None else None
            remedy = {401: "Log in: `hf auth login`.", 403: "Use a token that may write there."}.get(
                code or 0, "Try again."
            )
            raise UserError(f"{upload.repository}: the hub refuses ({str(error).splitlines()[0]}). {remedy}") from error
        except OSError as error:
            raise UserError(f"{upload.repository}: the hub is out of reach ({error}). Check the network.") from error
    return str(url)


def _results(runs: Runs, evaluations: Sequence[Path]) -> tuple[str, dict[str, bytes]]:
    """The card's section of results: training curves, and each evaluation's table with its plots."""
    lines, figures = ["", "## Results", ""], {}
    for name, training in runs.training.items():
        if (curve := _curve(name, training)) is not None:
            figures["figures/training.png"] = curve
            lines += ["![Loss and pairs ordered right over optimizer steps](figures/training.png)", ""]
    for folder in evaluations:
        lines += [(folder / TABLE).read_text(encoding="utf-8").strip(), ""]
        for plot in sorted((folder / PLOTS).glob("*.png")):
            name = f"figures/{folder.name}-{plot.name}"
            figures[name] = plot.read_bytes()
            lines += [f"![{plot.stem.replace('_', ' ')}]({name})", ""]
    return ("\n".join(lines) if len(lines) > 3 else ""), figures


def _curve(name: str, training: TrainingRun) -> bytes | None:
    panels = {}
    for metric, title in _PANELS.items():
        curve = Curve(*training.series(metric), *training.series(metric, held_out=True))
        if len(curve.values) + len(curve.held_out_values) > 1:
            panels[title] = {name: curve}
    if not panels:
        return None
    figure: Any = curves_figure(panels, styles([name]))
    with tempfile.TemporaryDirectory() as scratch:
        figure.savefig(Path(scratch, "figure.png"), dpi=150)
        return Path(scratch, "figure.png").read_bytes()
