import torch

from expunge.losses import masked_mean


def test_the_mean_of_what_the_mask_keeps_by_hand():
    values = torch.tensor([[1.0, 5.0, 7.0], [2.0, 4.0, 9.0]])
    mask = torch.tensor([[True, False, False], [True, True, False]])
    torch.testing.assert_close(masked_mean(values, mask), torch.tensor((1 + 2 + 4) / 3))


def test_an_empty_mask_is_zero_with_a_zero_gradient():
    values = torch.tensor([3.0, 4.0], requires_grad=True)
    mean = masked_mean(values, torch.tensor([False, False]))
    mean.backward()
    assert mean.item() == 0
    assert values.grad.tolist() == [0, 0]


def test_what_is_masked_out_may_be_nan():
    values = torch.tensor([1.0, float("nan")], requires_grad=True)
    mean = masked_mean(values, torch.tensor([True, False]))
    mean.backward()
    assert mean.item() == 1
    assert values.grad.tolist() == [1, 0]
