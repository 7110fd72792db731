"""The notebook: dot products of batches, then a linear layer, with the results it prints and the errors it shows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from torchbatch.testing import assert_close

COMPILED = pytest.mark.parametrize("how", ["eager", "jit", "inductor"], indirect=True)

# What `layer(batch_x[0])` prints there, up to where the page cuts it off.
PRINTED = """
    -1.3889999  -20.13941   -15.254608   12.268584   -11.33385    22.630579    0.6938019  -13.827613   11.879179
    -3.9626598   18.831705  -14.518444  -10.2607155  -12.685415    2.5124695  -4.255941   -1.3663094    6.949514
    -7.8258133   -8.293367   -6.7460346 -29.767748    -4.768342   14.712051   -1.9340608   6.222945    13.89996
    -11.409643   -3.2742107  -2.172195   10.826933    -2.5647306  -0.46695018 -11.210756  -7.7417426  -22.293255
    5.421152     1.3914765   3.3206863   -8.409932     2.8698087   7.1217403   3.547274   -4.9375544   -1.4757957
    -4.042242   -8.101669    0.17466497  -3.5307512   -8.768582   14.792691    0.30482912 20.986172    -0.58729076
    6.2752194  -20.083494    5.8386536
"""


class TestDot:
    def test_two_vectors(self, same):
        array1 = torch.arange(150)
        array2 = torch.arange(100, 250)
        output = torch.dot(array1, array2)
        assert output.item() == 2231275
        same(output, jnp.dot(jnp.arange(150), jnp.arange(100, 250)))

    @pytest.fixture
    def stacked(self):
        array1 = torch.stack([torch.arange(150) for i in range(100)])
        array2 = torch.stack([torch.arange(100, 250) for i in range(100)])
        assert (array1.shape, array2.shape) == ((100, 150), (100, 150))
        return array1, array2

    @pytest.fixture
    def jax_stacked(self):
        array1 = jnp.stack([jnp.arange(150) for i in range(100)])
        array2 = jnp.stack([jnp.arange(100, 250) for i in range(100)])
        return array1, array2

    def test_batch_by_a_loop(self, stacked):
        array1, array2 = stacked
        output = []
        for i in range(100):
            output.append(torch.dot(array1[i], array2[i]))
        output = torch.stack(output)
        assert output.tolist() == [2231275] * 100
        assert output.shape == (100,)

    def test_vmap_keeps_the_name(self, vmap):
        assert vmap(torch.dot).__name__ == jax.vmap(jnp.dot).__name__ == "dot"
        assert callable(vmap(torch.dot))

    @COMPILED
    def test_vmap(self, stacked, jax_stacked, same, vmap):
        output = vmap(torch.dot)(*stacked)
        assert output.tolist() == [2231275] * 100
        assert output.shape == (100,)
        same(output, jax.vmap(jnp.dot)(*jax_stacked))

    def test_vmap_with_in_axes(self, stacked, jax_stacked, same, vmap):
        output = vmap(torch.dot, in_axes=(0, 0))(*stacked)
        assert output.tolist() == [2231275] * 100
        same(output, jax.vmap(jnp.dot, in_axes=(0, 0))(*jax_stacked))

    def test_one_vector_against_a_batch(self, stacked, jax_stacked, same, vmap):
        array1, array2 = torch.arange(150), stacked[1]
        assert (array1.shape, array2.shape) == ((150,), (100, 150))
        output = vmap(torch.dot, in_axes=(None, 0))(array1, array2)
        assert output.tolist() == [2231275] * 100
        assert output.shape == (100,)
        same(output, jax.vmap(jnp.dot, in_axes=(None, 0))(jnp.arange(150), jax_stacked[1]))


@pytest.fixture(scope="module")
def jax_arrays():
    """The notebook's random arrays: it was written when the older layout of JAX's generator was the default."""
    with jax.threefry_partitionable(False):
        key = jax.random.PRNGKey(0)
        W = jax.random.normal(key, (64, 100), dtype=jnp.float32)
        batch_x = jax.random.normal(key, (16, 100), dtype=jnp.float32)
    return W, batch_x


@pytest.fixture
def W(jax_arrays):
    return torch.from_numpy(np.array(jax_arrays[0]))


@pytest.fixture
def batch_x(jax_arrays):
    return torch.from_numpy(np.array(jax_arrays[1]))


@pytest.fixture
def layer(W):
    def layer(x):
        # (64, 100) . (100, ) -> (64, )
        return torch.matmul(W, x)

    return layer


@pytest.fixture
def expected(jax_arrays):
    """The whole result by JAX."""
    W, batch_x = jax_arrays
    return jax.vmap(lambda x: jnp.dot(W, x))(batch_x)


@pytest.fixture
def close():
    """Sums of 100 products differ by their order: in the sixth digit of the largest term, not of the sum."""

    def check(ours, theirs):
        assert tuple(ours.shape) == tuple(theirs.shape)
        assert_close(ours, theirs, rtol=1e-6, atol=1e-5, dtypes=False)

    return check


def layer_with_weights(W, x):
    # (64, 100) . (100, ) -> (64, )
    return torch.matmul(W, x)


class TestLinearLayer:
    def test_shapes(self, W, batch_x):
        assert (W.shape, batch_x.shape) == ((64, 100), (16, 100))

    def test_the_layer_refuses_a_batch(self, layer, batch_x, jax_arrays):
        with pytest.raises(RuntimeError, match=r"cannot be multiplied \(64x100 and 16x100\)"):
            layer(batch_x)
        with pytest.raises(TypeError):
            jnp.dot(*jax_arrays)

    def test_one_input_gives_the_printed_numbers(self, layer, batch_x, close):
        printed = np.array(PRINTED.split(), dtype=np.float32)
        close(layer(batch_x[0])[: len(printed)], printed)

    def test_naive_batching(self, layer, batch_x, expected, close):
        def naive_batched_layer(batch_x):
            outputs = []
            for row in batch_x:
                outputs.append(layer(row))

            return torch.stack(outputs)

        close(naive_batched_layer(batch_x), expected)

    def test_manual_batching(self, W, batch_x, expected, close):
        def manual_batched_layer(batch_x):
            # (16, 100) . (100, 64) -> (16, 64)
            return torch.matmul(batch_x, W.T)

        close(manual_batched_layer(batch_x), expected)

    def test_auto_vectorized_batching(self, layer, batch_x, expected, close, vmap):
        def vmap_batched_layer(batch_x):
            return vmap(layer)(batch_x)

        close(vmap_batched_layer(batch_x), expected)

    def test_with_weights_and_no_in_axes_is_an_error(self, W, batch_x, jax_arrays, vmap):
        def vmap_batched_layer_with_weights(W, batch_x):
            return vmap(layer_with_weights)(W, batch_x)

        with pytest.raises(ValueError) as error:
            vmap_batched_layer_with_weights(W, batch_x)
        with pytest.raises(ValueError):
            jax.vmap(jnp.dot)(*jax_arrays)
        text = str(error.value)
        for part in ["size 64: axis 0 of argument W", "size 16: axis 0 of argument x", "[64,100]", "[16,100]"]:
            assert part in text.replace(", ", ","), text

    @COMPILED
    def test_with_weights_and_in_axes(self, W, batch_x, expected, close, vmap):
        def vmap_batched_layer_with_weights(W, batch_x):
            return vmap(layer_with_weights, in_axes=(None, 0))(W, batch_x)

        close(vmap_batched_layer_with_weights(W, batch_x), expected)
