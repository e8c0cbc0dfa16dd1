"""Flat vectors and their named parts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_dfml.core.weights import Layout
from tests.support import PROPERTY, normal

shapes = st.lists(st.lists(st.integers(1, 4), max_size=3).map(torch.Size), max_size=5)


@PROPERTY
@given(shapes)
def test_flatten_undoes_unflatten(device, parts):
    layout = Layout({f"p{i}": shape for i, shape in enumerate(parts)})
    flat = normal(layout.numel, device=device)
    named = layout.unflatten(flat) if parts else {}
    assert [t.shape for t in named.values()] == parts
    assert torch.equal(layout.flatten(named).double().to(device), flat)  # no parts are of no device


def test_gradients_of_parts_arrive_at_their_place_in_the_vector(device):
    layout = Layout({"a": (2,), "b": (1, 3)})
    flat = torch.arange(5.0, requires_grad=True, device=device)
    (grad,) = torch.autograd.grad(
        (layout.unflatten(flat)["b"] * torch.tensor([[1.0, 2.0, 3.0]], device=device)).sum(), flat
    )
    assert grad.tolist() == [0, 0, 1, 2, 3]


def test_flatten_refuses_missing_and_misshapen_parts(device):
    layout = Layout({"a": (2,), "b": (1, 3)})
    with pytest.raises(KeyError, match="b"):
        layout.flatten({"a": torch.zeros(2, device=device)})
    with pytest.raises(ValueError, match="b: expected shape"):
        layout.flatten({"a": torch.zeros(2, device=device), "b": torch.zeros(3, 1, device=device)})


def test_a_vector_of_the_wrong_length_is_refused(device):
    layout = Layout({"a": (2,)})
    with pytest.raises(RuntimeError, match="split"):
        layout.unflatten(torch.zeros(3, device=device))
