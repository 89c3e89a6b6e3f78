"""Rotary positions as multiplication of complex numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tokenformer.ops.rotary import apply_rotary, rotary_angles


@pytest.mark.parametrize(("rotary_dim", "theta"), [(8, 10000.0), (2, 10000.0), (6, 500.0)])
def test_pairs_of_features_turn_as_complex_numbers(rotary_dim: int, theta: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 8)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 100, 3, 3, 1000]])
    found = apply_rotary(x, *rotary_angles(positions, rotary_dim, theta)).numpy()

    half = rotary_dim // 2
    values = x.double().numpy()
    pairs = values[..., :half] + 1j * values[..., half:rotary_dim]
    frequencies = theta ** (-2 * np.arange(half) / rotary_dim)
    turned = pairs * np.exp(1j * positions.numpy()[:, None, :, None] * frequencies)
    expected = np.concatenate((turned.real, turned.imag, values[..., rotary_dim:]), axis=-1)
    np.testing.assert_allclose(found, expected, atol=2e-4)  # angles are float32: 1000 radians to 6e-5
    np.testing.assert_allclose(found[0], expected[0], atol=2e-6)


def test_scores_depend_on_the_distance_alone() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 16)

    def score(query_position: int, key_position: int) -> torch.Tensor:
        rotated = [
            apply_rotary(x, *rotary_angles(torch.tensor([[position]]), 16, 10000.0))
            for x, position in ((query, query_position), (key, key_position))
        ]
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(score(9, 4), score(25, 20), rtol=1e-5, atol=1e-5)
    assert (score(9, 4) - score(9, 5)).abs() > 1e-3


def test_keeps_the_dtype_of_its_input() -> None:
    x = torch.randn(1, 1, 3, 4, dtype=torch.bfloat16)
    assert apply_rotary(x, *rotary_angles(torch.arange(3)[None], 2, 10000.0)).dtype == torch.bfloat16


@pytest.mark.parametrize("rotary_dim", [2, 6])
def test_the_gradient_is_that_of_the_plain_operations(rotary_dim: int) -> None:
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    cos, sin = (angle.double() for angle in rotary_angles(torch.arange(5)[None], rotary_dim, 100.0))
    assert torch.autograd.gradcheck(lambda inputs: apply_rotary(inputs, cos, sin), (x,))
    assert torch.autograd.gradgradcheck(lambda inputs: apply_rotary(inputs, cos, sin), (x,))


@pytest.mark.parametrize("rotary_dim", [2, 6])
def test_heads_of_a_position_stay_side_by_side_in_memory(rotary_dim: int) -> None:
    x = (
        torch.randn(2, 5, 3 * 6).unflatten(-1, (3, 6)).transpose(1, 2)
    )  # [b, h, t, e], as a projection gives it
    turned = apply_rotary(x, *rotary_angles(torch.arange(5)[None], rotary_dim, 100.0))
    assert turned.stride() == x.stride()
