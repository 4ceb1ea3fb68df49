"""What tells a model from another one of the same name: contents, and neither times nor files beside them."""

from __future__ import annotations

import os
import shutil

from rrhf_peft.modeling import weights_fingerprint


def test_contents_count_and_times_and_other_files_do_not(tmp_path, tiny_model_folder):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    first = weights_fingerprint(tiny_model_folder)
    assert first is not None
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    (folder / "metrics.jsonl").write_text("{}")
    (folder / "optimizer.pt").write_text("state")
    assert weights_fingerprint(folder) == first
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        path = folder / name
        before = path.read_bytes()
        path.write_bytes(before[:-2] + b"\x20" + before[-1:])
        assert weights_fingerprint(folder) != first, name
        path.write_bytes(before)
    assert weights_fingerprint(folder) == first


def test_training_that_moves_a_large_file_is_seen_and_what_is_not_here_is_none(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(70 * 2**20))
    first = weights_fingerprint(tmp_path)
    path.write_bytes(b"\x01" * (70 * 2**20))
    assert weights_fingerprint(tmp_path) != first
    assert weights_fingerprint(path) is not None
    assert weights_fingerprint("owner/no-such-model") is None
