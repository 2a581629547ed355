import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from pyfleet.data import Samples
from pyfleet.errors import ShapeError

X, Y = torch.arange(12.0).view(6, 2), torch.arange(6)


class Mapped(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        assert type(i) is int
        return X[i], int(Y[i])


@pytest.mark.parametrize("dataset", [(X, Y), [X.numpy(), Y.numpy()], TensorDataset(X, Y), Mapped(),
                                     Subset(TensorDataset(X, Y), range(6))],
                         ids=["tensors", "arrays", "TensorDataset", "mapped", "Subset"])
def test_every_kind_of_dataset_gives_the_same_batch(dataset):
    samples = Samples(dataset)
    assert len(samples) == 6
    inputs, targets = samples.fetch(np.array([4, 0, 5]))
    assert inputs.tolist() == [[8, 9], [0, 1], [10, 11]]
    assert targets.tolist() == [4, 0, 5]
    assert targets.dtype == torch.int64


def test_several_inputs_come_before_the_target():
    first, second, target = Samples((X, X + 1, Y)).fetch([1])
    assert (first.tolist(), second.tolist(), target.tolist()) == ([[2, 3]], [[3, 4]], [1])


@pytest.mark.parametrize("dataset", [(X, Y[:5]), (X,), (X, torch.tensor(1))])
def test_tensors_that_do_not_fit_are_refused(dataset):
    with pytest.raises(ShapeError, match="inputs and targets of one length, got lengths"):
        Samples(dataset)


def test_samples_without_a_target_are_refused():
    with pytest.raises(ShapeError, match=r"a sample must be \(input, target\), got Tensor"):
        Samples(list(range(5))).fetch([0])


def test_a_dataset_without_length_is_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([])

        def __len__(self):
            return 0
    with pytest.raises(TypeError, match="needs a length and items by index.*got int"):
        Samples(5)
    with pytest.raises(TypeError, match="got Stream"):
        Samples(Stream())
