"""Python values that a loss depends on may change between two calls."""

import copy
import functools
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchbatch import per_example
from torchbatch.errors import InputTypeError
from torchbatch.testing import assert_close

x, y = torch.linspace(-1, 1, 15, dtype=torch.float64).reshape(5, 3), torch.tensor([0, 1, 2, 1, 0])
temperature = 1.0


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.scale, self.shift, self.act = nn.Linear(3, 3).double(), 1.0, torch.zeros(3).double(), torch.tanh
        self.config = {"power": 1}

    def forward(self, x):
        return self.act(self.linear(x)) ** self.config["power"] * self.scale / temperature + self.shift


class Smoothed:
    def __init__(self):
        self.smoothing = 0.0

    def __call__(self, output, target):
        return F.cross_entropy(output, target, label_smoothing=self.smoothing)


def one_by_one(model, criterion):
    weight = next(model.parameters())
    return torch.stack([torch.autograd.grad(criterion(model(x[i, None]), y[i, None]), weight)[0] for i in range(len(x))])


def changes(model, criterion):
    """Each is a function that changes something, between two calls."""
    return {
        "a number": lambda: setattr(model, "scale", 3.0),
        "a tensor": lambda: setattr(model, "shift", torch.arange(3.0).double()),
        "a function": lambda: setattr(model, "act", torch.sin),
        "an entry of a dict": lambda: model.config.update(power=2),
        "a global name": lambda: globals().update(temperature=2.0),
        "a hook": lambda: model.linear.register_forward_hook(lambda module, args, output: output * 2),
        "an attribute of the criterion": lambda: setattr(criterion, "smoothing", 0.3),
    }


@pytest.mark.parametrize("what", changes(None, None))
def test_a_change_between_two_calls_is_seen(what, monkeypatch):
    monkeypatch.setitem(globals(), "temperature", 1.0)
    model, criterion = Scaled(), Smoothed()
    found = per_example.gradients(model, criterion, compile=False)
    before = found(x, y)["linear.weight"]
    changes(model, criterion)[what]()
    after = found(x, y)["linear.weight"]
    assert_close(after, one_by_one(model, criterion), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(after, before)


def test_a_change_of_what_a_function_closes_over_is_seen():
    scale = 1.0

    def loss(w, x):
        return scale * (w @ x)

    found = per_example.norms(loss, compile=False)
    assert found(torch.zeros(2), torch.ones(1, 2)).item() == pytest.approx(2**0.5)
    scale = 3.0
    assert found(torch.zeros(2), torch.ones(1, 2)).item() == pytest.approx(3 * 2**0.5)


def test_nothing_is_traced_anew_where_nothing_changed():
    ran = set()  # sets are not looked at

    def loss(w, x):
        ran.add(0)
        return w @ x

    found = per_example.norms(loss, compile=False)
    found(torch.zeros(2), torch.ones(1, 2))
    ran.clear()
    found(torch.ones(2), torch.ones(1, 2))
    assert not ran


def test_what_changes_at_each_call_is_a_warning_with_its_name():
    class Counting(nn.Linear):
        count = 0

        def forward(self, x):
            self.count += 1
            return super().forward(x)

    found = per_example.norms(Counting(2, 1), lambda output: output.sum(), targets=0, compile=False)
    with pytest.warns(RuntimeWarning, match="norms was traced for 9 sets of Python values .* Last there was another count"):
        for _ in range(9):
            found(torch.ones(1, 2))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda found: pickle.loads(pickle.dumps(found))])
@pytest.mark.parametrize("make", [per_example.norms, per_example.gram, functools.partial(per_example.clipped_sum, max_norm=0.1)])
def test_copies(copied, make):
    found = make(nn.Linear(3, 3).double(), F.cross_entropy, compile=False)
    assert_close(copied(found)(x, y), found(x, y))


def test_gram_in_two_threads():
    gram = per_example.gram(lambda w, x: w @ x, compile=False)
    batches = [torch.randn(4, 3) for _ in range(4)]
    wrong = []

    def run(batch):
        wrong.extend(0 for _ in range(20) if not torch.allclose(gram(torch.zeros(3), batch), batch @ batch.T, atol=1e-5))

    threads = [threading.Thread(target=run, args=(batch,)) for batch in batches]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong


class Words(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.words, self.out = nn.Embedding(7, 4, **options), nn.Linear(4, 3)

    def forward(self, numbers):
        return self.out(self.words(numbers).sum(1))


class Frozen(Words):
    def forward(self, numbers):
        with torch.no_grad():
            found = self.words(numbers)
        return self.out(found.sum(1))


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, given):
        return -given


class Adversary(Words):
    def forward(self, numbers):
        return self.out(Reversed.apply(self.words(numbers).sum(1)))


class Hooked(Words):
    def __init__(self):
        super().__init__()
        self.out.register_full_backward_hook(lambda module, given, taken: (given[0] * 2,))


_OPTIONS = [{"padding_idx": 0}, {"padding_idx": -1}, {"scale_grad_by_freq": True}]
_ONE_WAY = [*[functools.partial(Words, **options) for options in _OPTIONS], Frozen, Adversary, Hooked]


@pytest.mark.parametrize("make", _ONE_WAY)
@pytest.mark.parametrize("quantity", [per_example.dot, per_example.cosine])
def test_forward_mode_is_left_where_it_is_not_what_a_backward_pass_computes(make, quantity):
    model = make().double()
    numbers = torch.tensor([[0, 1, 1], [1, 1, 1], [2, 2, 1], [3, 2, 3], [6, 5, 4]])
    v = {name: torch.randn_like(value) for name, value in model.named_parameters()}
    gradients = per_example.gradients(model, F.cross_entropy, compile=False)(numbers, y)
    rows = torch.cat([value.flatten(1) for value in gradients.values()], 1)
    flat = torch.cat([value.flatten() for value in v.values()])
    expected = rows @ flat / (rows.norm(dim=1) * flat.norm() if quantity is per_example.cosine else 1)
    found = quantity(model, F.cross_entropy, v=v, compile=False)
    assert_close(found(numbers, y), expected, rtol=1e-10, atol=1e-12)
    assert "made for each example" in found.explain(numbers, y)


def test_a_batch_by_name_and_arguments_in_the_wrong_order():
    with pytest.raises(InputTypeError, match=r"^norms: the batch is given by position, but target is a keyword"):
        per_example.norms(nn.Linear(3, 3), F.cross_entropy)(x, target=y)
    with pytest.raises(InputTypeError, match=r"^norms: the module comes first and the criterion second, but the first"):
        per_example.norms(F.cross_entropy, nn.Linear(3, 3))


def test_forward_mode_stays_where_it_is_right():
    model, numbers = Words(), torch.zeros(5, 3, dtype=torch.int64)
    v = dict(model.named_parameters())
    assert "forward-mode" in per_example.dot(model, F.cross_entropy, v=v).explain(numbers, y)
