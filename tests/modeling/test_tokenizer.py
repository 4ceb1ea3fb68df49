"""Tokenizers get a padding token that they already have."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rrhf_peft.modeling import load_tokenizer, tokenizer_of
from rrhf_peft.recipe import ModelSection
from rrhf_peft.records import UserError


def _tokenizer(folder: Path, *added: str, **special: str) -> Path:
    """A tokenizer of three words and the given added tokens, without a padding token."""
    words = Tokenizer(models.WordLevel({"once": 0, "upon": 1, "a": 2}))
    words.add_special_tokens([*added, "<s>", "</s>"])
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", **{"eos_token": "</s>", **special}
    ).save_pretrained(folder)
    return folder


def test_a_padding_token_of_its_own_stays(tiny_model_folder: Path) -> None:
    assert load_tokenizer(tiny_model_folder).pad_token == "<pad>"


@pytest.mark.parametrize(
    ("added", "special", "expected"),
    [
        (["<|reserved_7|>", "<|finetune_right_pad_id|>"], {}, "<|finetune_right_pad_id|>"),
        (["<|im_start|>", "<|reserved_special_token_0|>"], {}, "<|reserved_special_token_0|>"),
        (["<|im_start|>", "<unk>"], {"unk_token": "<unk>"}, "<unk>"),
        (["<|im_start|>"], {}, "</s>"),
    ],
)
def test_padding_takes_a_reserved_token_then_unknown_then_eos(
    tmp_path: Path, added: list[str], special: dict[str, str], expected: str
) -> None:
    folder = _tokenizer(tmp_path, *added, **special)
    size = len(AutoTokenizer.from_pretrained(folder))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_token == expected
    assert len(tokenizer) == size


def test_a_tokenizer_without_an_end_is_an_error(tmp_path: Path) -> None:
    folder = _tokenizer(tmp_path / "endless")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": None}))
    with pytest.raises(UserError, match="no end-of-sequence token"):
        load_tokenizer(folder)


def test_damaged_and_missing_tokenizers_are_named(tiny_model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such tokenizer folder"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(UserError, match=r"holds no tokenizer_config\.json"):
        load_tokenizer(tmp_path)
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_model_folder, folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(folder)


def test_a_real_tokenizer_loads(tinystories: Path) -> None:
    tokenizer = load_tokenizer(tinystories)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


def test_a_chat_template_that_does_not_parse_is_told_before_it_is_used(tmp_path: Path) -> None:
    folder = _tokenizer(tmp_path)
    (folder / "chat_template.jinja").write_text("{% for message in messages %}\n{{ message.content }}\n{% endif %}")
    section = ModelSection(name=str(folder))
    with pytest.raises(UserError, match=r"chat template does not parse \(its line 3: .*endif.*Fix chat_template.jinja"):
        tokenizer_of(section, "chat")
    assert tokenizer_of(section, "raw").eos_token == "</s>"  # whoever does not use it may have it
    (folder / "chat_template.jinja").write_text("{% generation %}{{ raise_exception('no') }}{% endgeneration %}")
    tokenizer_of(section, "chat")
