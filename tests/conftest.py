"""Fixtures that every test folder uses: the real material, where it is there, and tiny models, always."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch

torch.set_num_threads(max(1, min(2, torch.get_num_threads())))

# A shell that runs the suite in the background has it ignore SIGINT, and every child would inherit that: the tests that
# press Ctrl-C would press it in vain.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)


#: Files whose tests take longest: begun first, so that no worker is left alone with one at the end.
LONGEST = (
    "house/test_readme.py",
    "train/test_processes.py",
    "test_kills.py",
    "sample/test_sample_kills.py",
    "notebooks/test_notebooks.py",
    "rank/test_rank_browser.py",
    "cli/test_console.py",
    "score/test_score_kills.py",
    "rounds/test_rounds_examples.py",
    "house/test_recipe_folders.py",
    "train/test_online_processes.py",
    "train/test_online.py",
    "train/test_resume.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def order(item: pytest.Item) -> int:
        name = item.path.relative_to(Path(__file__).parent).as_posix()
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=order)  # stable: all others keep their order


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real models and data beside the checkout; tests that need it skip from a plain clone."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    return folder


@pytest.fixture(scope="session")
def tinystories(shared_data: Path) -> Path:
    """A real pretrained Llama of 656k parameters with its tokenizer."""
    return shared_data / "models" / "TinyStories-656K"


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser. Tests that need it skip where it is missing, but fail under CI and RRHF_REQUIRE_BROWSER=1."""
    path = shutil.which("chromium")
    if path is None:
        reason = "chromium is not installed; on Debian: apt-get install chromium"
        if os.environ.get("CI") == "true" or os.environ.get("RRHF_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained two-layer Llama with a byte-level tokenizer, made here: for tests that need no language."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-llama")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
