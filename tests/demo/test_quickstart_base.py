"""The base model: an ordinary folder, cached by content, the same whenever it is made."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rrhf_peft.demo.base import cache_folder, cached_base, make_base
from rrhf_peft.demo.run import TINY
from rrhf_peft.demo.stories import make_stories

SIZE = dataclasses.replace(TINY.base, stories=160, epochs=1)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RRHF_PEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RRHF_PEFT_CACHE", "/somewhere")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/somewhere")
    monkeypatch.delenv("RRHF_PEFT_CACHE")
    assert cache_folder() == Path("/xdg/rrhf-peft")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache/rrhf-peft"


def test_a_second_call_finds_the_model_and_does_not_train(own_cache: Path) -> None:
    steps: list[int] = []
    folder = make_base(SIZE, progress=lambda step, loss: steps.append(step))
    assert folder.parent == own_cache
    assert steps == list(range(1, SIZE.steps + 1))
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert make_base(SIZE, progress=lambda step, loss: steps.append(step)) == folder
    assert len(steps) == SIZE.steps
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert [path.name for path in own_cache.iterdir()] == [folder.name]


def test_anything_that_shapes_the_model_gives_another_folder(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [cached_base(SIZE), cached_base(SIZE, seed=1)]
    folders += [cached_base(dataclasses.replace(SIZE, **{name: 7})) for name in ("epochs", "hidden_size", "stories")]
    monkeypatch.setattr("rrhf_peft.demo.stories.MOOD_SHARES", (0.9, 0.05, 0.05))
    folders.append(cached_base(SIZE))
    assert len(set(folders)) == len(folders)


def test_made_again_it_is_the_same_to_the_bit_whatever_the_number_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    weights = []
    for number in (1, 2):
        monkeypatch.setenv("RRHF_PEFT_CACHE", str(tmp_path / str(number)))
        torch.set_num_threads(number)
        torch.rand(number)  # the caller's random state plays no part
        state = torch.get_rng_state()
        folder = make_base(SIZE)
        assert torch.equal(state, torch.get_rng_state())
        assert torch.get_num_threads() == number
        weights.append((folder / "model.safetensors").read_bytes())
    torch.set_num_threads(threads)
    assert weights[0] == weights[1]


def test_it_is_an_ordinary_folder_whose_tokenizer_keeps_stories_whole(own_cache: Path) -> None:
    folder = make_base(SIZE)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == model.config.vocab_size == SIZE.vocab_size
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    for story in make_stories(20, seed=9):
        apart = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in story[:2]]
        assert apart[0] + apart[1] == tokenizer("".join(story[:2]), add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(apart[1]) == story.continuation


def test_it_learns(own_cache: Path) -> None:
    losses: list[float] = []
    make_base(SIZE, progress=lambda step, loss: losses.append(loss))
    assert losses[-1] < losses[0] - 0.3


def test_a_training_that_is_interrupted_leaves_nothing(own_cache: Path) -> None:
    def interrupt(step: int, loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_base(SIZE, progress=interrupt)
    assert not own_cache.exists()
