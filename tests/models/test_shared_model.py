"""SharedCompactModel: the factorised readout by hand, its linear family, round trips, training and errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cortexloop.models import CompactModel, SharedCompactModel


def make(relu: bool = True, seed: int = 0) -> SharedCompactModel:
    generator = torch.Generator().manual_seed(seed)
    model = SharedCompactModel((3, 4), 5, (5, 3), (1, 2), 9, 8, relu=relu, generator=generator).double()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
            elif tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model.eval()


def images(seed: int = 0) -> torch.Tensor:
    return torch.randn(3, 9, 8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 40


def test_the_readout_is_the_published_sum():
    model = make()
    got = model(images()).detach().numpy()
    last = model.activity(images(), 1).detach().numpy()
    w = model.to_weights("m")
    for b in range(3):
        for n in range(5):
            mixed = w.mixing_bias[n] + last[b] @ w.mixing[:, n]
            expected = w.spatial_bias[n] + (w.spatial[:, :, n] * mixed).sum()
            assert got[b, n] == pytest.approx(expected, rel=1e-12)


def test_each_neuron_is_a_compact_model_with_a_rank_one_readout():
    model = make()
    w = model.to_weights("m")
    single = CompactModel((3, 4), (5, 3), (1, 2), 9, 8).double().eval()
    single.trunk.load_state_dict(model.trunk.state_dict())
    for n in range(5):
        with torch.no_grad():
            readout = w.spatial[:, :, n, None] * w.mixing[None, None, :, n]
            single.readout.copy_(torch.from_numpy(readout))
            single.readout_bias.fill_(w.spatial_bias[n] + w.mixing_bias[n] * w.spatial[:, :, n].sum())
        torch.testing.assert_close(single(images()), model(images())[:, n], rtol=1e-12, atol=1e-9)


def test_without_relu_the_model_is_affine():
    linear, plain = make(relu=False), make(relu=True)
    a, b, zero = images(1), images(2), torch.zeros(3, 9, 8, 3, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(linear(a + b) + linear(zero), linear(a) + linear(b), rtol=1e-10, atol=1e-8)
        assert not torch.allclose(plain(a + b) + plain(zero), plain(a) + plain(b))
    assert linear.activity(a, 0).min() < 0


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_round_trip_bit_for_bit(relu, dtype):
    first = make(relu).to(dtype).to_weights("m")
    second = SharedCompactModel.from_weights(first).to_weights("m")
    assert second.relu is relu
    for key in ("mixing", "mixing_bias", "spatial", "spatial_bias"):
        assert getattr(first, key).tobytes() == getattr(second, key).tobytes()
        assert getattr(first, key).dtype == getattr(second, key).dtype
    for a, b in zip(first.layers, second.layers, strict=True):
        assert a.variance.tobytes() == b.variance.tobytes()


def test_parameter_counts_are_the_published_ones():
    for filters, expected in ((5, 208_909), (35, 219_259), (200, 340_534)):
        model = SharedCompactModel((filters,) * 3 + (100, 100), 219)
        statistics = 2 * (3 * filters + 200)
        assert sum(p.numel() for p in model.parameters()) + statistics == expected


def test_it_trains():
    model = SharedCompactModel((4, 3), 2, 3, (1, 2), 8, 8, generator=torch.Generator().manual_seed(0)).train()
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(16, 8, 8, 3, generator=generator) * 50
    target = torch.randn(16, 2, generator=generator)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = (model(inputs) - target).square().mean()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_errors():
    with pytest.raises(ValueError, match="neurons should be at least 1"):
        SharedCompactModel((3,), 0, 3, (1,))
    with pytest.raises(ValueError, match=r"images should be \[B, 9, 8, 3\]"):
        make()(torch.zeros(1, 8, 9, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="layer should be in 1"):
        make().depthwise_output(images(), 0)
    assert make().depthwise_output(images(), 1).shape == (3, 5, 4, 3)
    broken = make().to_weights("m")
    broken.spatial[0, 0, 0] = np.inf
    with pytest.raises(ValueError, match="model 'm': spatial should be finite"):
        SharedCompactModel.from_weights(broken)
