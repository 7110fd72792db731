"""The linear layer of the seed's notebook prints the same numbers here."""

from __future__ import annotations

import torch

from torchbatch import random, vmap
from torchbatch.testing import assert_close

PRINTED = [
    -1.3889999, -20.13941, -15.254608, 12.268584, -11.33385, 22.630579, 0.6938019, -13.827613, 11.879179, -3.9626598,
    18.831705, -14.518444, -10.2607155, -12.685415, 2.5124695, -4.255941, -1.3663094, 6.949514, -7.8258133, -8.293367,
    -6.7460346, -29.767748,
    -4.768342, 14.712051, -1.9340608, 6.222945, 13.89996, -11.409643, -3.2742107, -2.172195, 10.826933, -2.5647306, -0.46695018,
    -11.210756, -7.7417426, -22.293255, 5.421152, 1.3914765, 3.3206863, -8.409932, 2.8698087, 7.1217403, 3.547274, -4.9375544,
    -1.4757957, -4.042242, -8.101669, 0.17466497, -3.5307512, -8.768582, 14.792691, 0.30482912, 20.986172, -0.58729076, 6.2752194,
    -20.083494,
]  # fmt: skip


def test_the_notebook():
    with random.threefry_partitionable(False):
        key = random.PRNGKey(0)
        weights = random.normal(key, (64, 100), dtype=torch.float32)
        batch_x = random.normal(key, (16, 100), dtype=torch.float32)

    def layer(x):
        return torch.mv(weights, x)

    assert_close(layer(batch_x[0])[: len(PRINTED)], torch.tensor(PRINTED), rtol=2e-6, atol=4e-6)
    assert_close(vmap(layer)(batch_x)[0], layer(batch_x[0]), rtol=1e-5, atol=1e-5)
