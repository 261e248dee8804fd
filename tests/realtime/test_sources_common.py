"""What sources share: shares, budgets, packed arrays, digests of banks, images and networks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from source_replay import TickingClock, as_journalled
from torch import nn

import cortexloop as cl
from cortexloop.features import BankFeatures, ModuleFeatures
from cortexloop.realtime.clock import ManualClock
from cortexloop.realtime.sources import common


@pytest.mark.parametrize("fraction", [0.0, 0.1, 1 / 3, 0.25, 0.999, 1.0])
@pytest.mark.parametrize("count", [1, 7, 32])
def test_shares_add_up(fraction: float, count: int) -> None:
    given = [common.share(fraction, count, generation) for generation in range(100)]
    assert all(0 <= n <= count for n in given)
    assert max(given) - min(given) <= 1
    assert sum(given) == np.floor(100 * count * fraction)


def test_packed_arrays_come_back_to_the_bit(rng: np.random.Generator) -> None:
    array = rng.standard_normal((5, 3)).astype(np.float32)
    array[0] = [np.nan, np.inf, -0.0]
    back = common.unpacked(as_journalled(common.packed(array)), (5, 3), "rows")
    assert back.tobytes() == array.tobytes()
    assert json.loads(json.dumps(common.packed(array))) == common.packed(array)
    assert common.packed(array.astype(">f4")) == common.packed(array)
    for wrong in (
        None,
        {},
        {"dtype": "<f4", "shape": [1], "base64": "?"},
        {"dtype": "nothing", "shape": [], "base64": ""},
    ):
        with pytest.raises(ValueError, match="the decision does not belong to this source: its rows are no array"):
            common.unpacked(wrong, (1,), "rows")
    with pytest.raises(ValueError, match=r"its rows should be float32 \[3, 5\], got float32 \[5, 3\]"):
        common.unpacked(common.packed(array), (3, 5), "rows")


def test_budgets() -> None:
    clock = ManualClock()
    budget = common.Budget(clock, 100.0)
    clock.advance(0.06)
    assert budget.spent_ms() == pytest.approx(60)
    assert budget.allows(40)
    assert not budget.allows(41)
    assert common.Budget(TickingClock(1e9), None).allows(1e9)
    pace = common.Pace()
    assert pace.slowest_ms == 0
    for ms in (1.0, 500.0, *range(2, 10)):
        pace.note(float(ms))
    assert pace.slowest_ms == 9  # the hiccup is forgotten


def test_digests_know_contents_not_places(small_bank: cl.ModelBank) -> None:
    images = np.random.default_rng(0).integers(0, 256, (1500, 4, 3, 3), dtype=np.uint8)
    assert common.images_digest(images) == common.images_digest(np.asfortranarray(images))
    assert common.images_digest(images) != common.images_digest(images.reshape(1500, 3, 4, 3))
    assert common.bank_digest(small_bank) == common.bank_digest(cl.ModelBank(small_bank.models))
    assert common.bank_digest(small_bank) != common.bank_digest(small_bank.select([1, 0, 2]))


def test_digests_of_networks(small_bank: cl.ModelBank) -> None:
    def network(dtype: torch.dtype) -> ModuleFeatures:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
        module.register_buffer("scale", torch.ones(3, dtype=dtype))
        return ModuleFeatures(module, "2", size=8, mean=(0.5,) * 3, std=(0.5,) * 3)

    same = common.features_settings(network(torch.float32))
    json.dumps(same)
    assert common.features_settings(network(torch.float32)) == same
    assert common.features_settings(network(torch.bfloat16)) != same
    other = network(torch.float32)
    other.module.get_buffer("scale")[1] = 2.0
    assert common.features_settings(other) != same
    first, second = (common.features_settings(BankFeatures(small_bank, 0, layer)) for layer in (0, 1))
    assert first["weights_sha256"] != second["weights_sha256"]
