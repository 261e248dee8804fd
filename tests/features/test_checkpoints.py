"""Files of robust networks, made here in the form of the published ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cortexloop.features import load_robust_checkpoint
from cortexloop.testing import SmallResNet

MEAN, STD = (0.4850, 0.4560, 0.4060), (0.2290, 0.2240, 0.2250)


def published(network: SmallResNet) -> dict[str, Tensor]:
    """The state of a network inside the attacker model of the "robustness" package."""
    own = network.state_dict()
    normaliser = {"new_mean": torch.tensor(MEAN)[:, None, None], "new_std": torch.tensor(STD)[:, None, None]}
    state = {f"module.normalizer.{key}": value for key, value in normaliser.items()}
    state |= {f"module.model.{key}": value for key, value in own.items()}
    state |= {f"module.attacker.normalize.{key}": value for key, value in normaliser.items()}
    return state | {f"module.attacker.model.{key}": value + 1 for key, value in own.items()}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "robust.ckpt"
    torch.save({"model": published(SmallResNet(seed=5)), "epoch": 90, "arch": "small"}, path)
    return path


def test_weights_and_normaliser_are_read(file):
    network = SmallResNet(seed=1).train()
    mean, std = load_robust_checkpoint(network, file)
    assert mean == pytest.approx(MEAN)
    assert std == pytest.approx(STD)
    assert not network.training
    expected = SmallResNet(seed=5).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in network.state_dict().items())


def test_plain_states_and_old_states_without_counters(tmp_path):
    state = {k: v for k, v in SmallResNet(seed=5).state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "plain.pt")
    network = SmallResNet(seed=1)
    assert load_robust_checkpoint(network, tmp_path / "plain.pt") is None
    assert torch.equal(network.conv1.weight, SmallResNet(seed=5).conv1.weight)


def test_files_of_other_networks_are_refused_and_change_nothing(file, tmp_path):
    before = SmallResNet(width=4, seed=1)
    network = SmallResNet(width=4, seed=1)
    with pytest.raises(ValueError, match="SmallResNet has"):
        load_robust_checkpoint(network, file)
    deeper = SmallResNet(blocks=(1, 1, 3, 1))
    with pytest.raises(ValueError, match=r"lacks 15 of .* tensors of SmallResNet, such as 'layer3\.2"):
        load_robust_checkpoint(deeper, file)
    shallower = SmallResNet(blocks=(1, 1, 1, 1))
    with pytest.raises(ValueError, match=r"holds 'module\.model\.layer3\.1.*which SmallResNet does not have"):
        load_robust_checkpoint(shallower, file)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="no dictionary of tensors"):
        load_robust_checkpoint(network, tmp_path / "list.pt")
    with pytest.raises(FileNotFoundError):
        load_robust_checkpoint(network, tmp_path / "missing.pt")
    assert all(
        torch.equal(a, b) for a, b in zip(before.state_dict().values(), network.state_dict().values(), strict=True)
    )


class Surprise:
    """Something that would run code when unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("code ran",))


def test_files_with_code_are_refused(tmp_path, capsys):
    torch.save({"model": published(SmallResNet()), "optimizer": Surprise()}, tmp_path / "code.ckpt")
    with pytest.raises(ValueError, match="no checkpoint of plain tensors"):
        load_robust_checkpoint(SmallResNet(), tmp_path / "code.ckpt")
    (tmp_path / "noise.ckpt").write_bytes(b"not a checkpoint at all")
    with pytest.raises(ValueError, match="no checkpoint of plain tensors"):
        load_robust_checkpoint(SmallResNet(), tmp_path / "noise.ckpt")
    assert "code ran" not in capsys.readouterr().out
