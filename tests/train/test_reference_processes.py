"""Two processes compare with the same reference as one does: DDP and FSDP2, adapter off and cached."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file
from train.ranked_files import logged, small_recipe, write_groups
from train.test_processes import FSDP2, accelerate_launch

from rrhf_peft.train.reference import FILE
from rrhf_peft.train.run import train_recipe

#: A margin is beta (0.1) times the difference of four sums of up to 200 nats, float32 numbers 1.5e-5 apart; sharded
#: layers add their terms in another order than whole ones, and so do five steps of training on them.
ROUNDING = 0.1 * 4 * 1.5e-5

CURVE = ("loss", "grad_norm", "rank_loss", "rewards/margins", "rewards/accuracies", "pair_accuracy")


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["adapter_off", "cached"])
@pytest.mark.parametrize("config", [{"distributed_type": "MULTI_GPU"}, FSDP2], ids=["ddp", "fsdp2"])
def test_two_processes_equal_one(tiny_model_folder, tmp_path, config, reference):
    """23 groups make an odd number of batches for the cached pass, and chunks of 150 tokens a ragged number of them."""
    ranked = write_groups(tmp_path / "ranked.jsonl", 23)
    sections = {"objective": {"name": "dpo", "reference": reference}, "engine": {"chunk_tokens": 150}}
    steps = {"learning_rate": 1e-2, "max_steps": 5, "per_device_eval_batch_size": 5}
    train_recipe(small_recipe(tiny_model_folder, ranked, tmp_path / "one", training=steps, **sections))
    split = {**steps, "per_device_train_batch_size": 2}
    recipe = small_recipe(tiny_model_folder, ranked, tmp_path / "two", training=split, **sections)
    accelerate_launch(recipe, tmp_path / "launch", config)
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    for metric in CURVE:
        expected = [line[metric] for line in one]
        assert [line[metric] for line in two] == pytest.approx(expected, rel=1e-4, abs=ROUNDING), metric
    assert abs(one[-1]["loss"] - one[0]["loss"]) > 1e-3
    if reference == "cached":
        expected, got = load_file(tmp_path / "one" / FILE), load_file(tmp_path / "two" / FILE)
        assert expected.keys() == got.keys()
        for key, values in expected.items():
            assert got[key].tolist() == pytest.approx(values.tolist(), rel=1e-5), key
