"""The article on `predict`, distances, the RBF kernel and Gram matrices, snippet by snippet."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from torchbatch import vmap
from torchbatch.testing import assert_close

COMPILED = pytest.mark.parametrize("how", ["eager", "jit", "inductor"], indirect=True)

def predict(params, input_vector):
    w, b = params
    output_vec = torch.matmul(w, input_vector) + b
    output_vec = torch.tanh(output_vec)
    return output_vec


def jax_predict(params, input_vector):
    w, b = params
    output_vec = jnp.dot(w, input_vector) + b
    output_vec = jnp.tanh(output_vec)
    return output_vec


@pytest.fixture(params=[(), (3,)], ids=["one output", "three outputs"])
def case(request, draw):
    """`params` and `input_batch` in both libraries; `w` is a vector as in the text's formula, or a matrix."""
    w, b, batch = draw(*request.param, 4), draw(*request.param), draw(6, 4)
    b = np.asarray(b, dtype=np.float32)
    ours = (torch.from_numpy(w), torch.from_numpy(b)), torch.from_numpy(batch)
    return *ours, (jnp.asarray(w), jnp.asarray(b)), jnp.asarray(batch)


@pytest.fixture
def expected(case):
    return jnp.stack(list(map(partial(jax_predict, case[2]), case[3])))


class TestPredict:
    def test_partial_map_stack_in_one_line(self, case, expected, same):
        params, input_batch, *_ = case
        same(torch.stack(list(map(partial(predict, params), input_batch))), expected)

    def test_partial_map_stack_step_by_step(self, case, expected, same):
        params, input_batch, *_ = case
        predict_f = partial(predict, params)
        preds = list(map(predict_f, input_batch))
        assert all(torch.equal(a, predict_f(ix)) for a, ix in zip(preds, input_batch, strict=True))
        same(torch.stack(preds), expected)

    def test_list_comprehension(self, case, expected, same):
        params, input_batch, *_ = case
        predict_f = partial(predict, params)
        preds = [predict_f(ix) for ix in input_batch]
        same(torch.stack(preds), expected)

    def test_partial_holds_what_it_was_given_and_a_lambda_looks_again(self, case, expected, same):
        params, input_batch, *_ = case
        held = vmap(partial(predict, params))
        looked_up = vmap(lambda x: predict(params, x))
        same(looked_up(input_batch), expected)
        params = (torch.zeros_like(params[0]), torch.zeros_like(params[1]))
        same(held(input_batch), expected)
        assert torch.equal(looked_up(input_batch), torch.zeros(tuple(expected.shape)))

    @COMPILED
    def test_vmap_of_the_partial(self, case, expected, same, vmap):
        params, input_batch, jax_params, jax_batch = case
        predict_batch_f = vmap(partial(predict, params))
        predictions = predict_batch_f(input_batch)
        same(predictions, expected)
        same(predictions, jax.vmap(partial(jax_predict, jax_params))(jax_batch))

    def test_in_axes_says_what_is_batched(self, case, expected, same, vmap):
        params, input_batch, jax_params, jax_batch = case
        predict_batch_f = vmap(predict, in_axes=(None, 0))
        predictions = predict_batch_f(params, input_batch)
        same(predictions, expected)
        same(predictions, jax.vmap(jax_predict, in_axes=(None, 0))(jax_params, jax_batch))

    def test_either_argument_can_be_bound_by_its_name(self, case, vmap):
        """The text could not bind `input_batch` and leave `params` free: by keyword it works."""
        params, input_batch, jax_params, jax_batch = case
        bound = partial(predict, input_vector=input_batch[0])
        many = tuple(torch.stack([p, 2 * p]) for p in params)
        jax_many = tuple(jnp.stack([p, 2 * p]) for p in jax_params)
        theirs = jax.vmap(partial(jax_predict, input_vector=jax_batch[0]))(jax_many)
        assert_close(vmap(bound)(many), theirs, rtol=1e-5, atol=1e-6, dtypes=False)


def sqeuclidean_distances(x, y):
    return torch.sum((x - y) ** 2)


def jax_sqeuclidean_distances(x, y):
    return jnp.sum((x - y) ** 2)


def einsum_distances(np_, x, y, square):
    """The text's version over whole matrices; `square` leaves the root out there, and so it does here."""
    XX = np_.einsum("ik,ik->i", x, x)
    YY = np_.einsum("ik,ik->i", y, y)
    XY = np_.einsum("ik,jk->ij", x, y)
    if not square:  # noqa: SIM108
        dists = np_.sqrt(XX[:, None] + YY[None, :] - 2 * XY)
    else:
        dists = XX[:, None] + YY[None, :] - 2 * XY
    return dists


def dot_distances(np_, x, y, square):
    XX = np_.dot(x, x)
    YY = np_.dot(y, y)
    XY = np_.dot(x, y)
    if not square:  # noqa: SIM108
        dists = np_.sqrt(XX + YY - 2 * XY)
    else:
        dists = XX + YY - 2 * XY
    return dists


@pytest.fixture
def xy(draw):
    """Two sets of vectors of length 3, in torch and in JAX."""
    x, y = draw(4, 3), draw(5, 3)
    return torch.from_numpy(x), torch.from_numpy(y), jnp.asarray(x), jnp.asarray(y)


class TestDistances:
    def test_vector_representation(self, xy, same):
        x, y, jx, jy = xy
        same(sqeuclidean_distances(x[0], y[0]), jax_sqeuclidean_distances(jx[0], jy[0]))

    def test_numpy_implementation(self, xy, same):
        x, y, jx, jy = (rows[0] for rows in xy)
        ours = torch.sqrt(torch.dot(x, x) - 2.0 * torch.dot(x, y) + torch.dot(y, y))
        same(ours, jnp.sqrt(jnp.dot(jx, jx) - 2.0 * jnp.dot(jx, jy) + jnp.dot(jy, jy)))
        assert_close(ours**2, sqeuclidean_distances(x, y), rtol=1e-5, dtypes=False)

    @pytest.mark.parametrize("square", [False, True])
    def test_einsum(self, xy, same, square):
        x, y, jx, jy = xy
        same(einsum_distances(torch, x, y, square), einsum_distances(jnp, jx, jy, square))

    @pytest.mark.parametrize("square", [False, True])
    def test_dot_products(self, xy, same, square):
        x, y, jx, jy = (rows[1] for rows in xy)
        same(dot_distances(torch, x, y, square), dot_distances(jnp, jx, jy, square))

    @pytest.mark.parametrize("square", [False, True])
    def test_pairwise_distances_by_two_vmaps(self, xy, same, square, vmap):
        x, y, jx, jy = xy
        arg = {"square": square}
        dist, jax_dist = partial(dot_distances, torch), partial(dot_distances, jnp)
        dists = vmap(vmap(partial(dist, **arg), in_axes=(None, 0)), in_axes=(0, None))
        theirs = jax.vmap(jax.vmap(partial(jax_dist, **arg), in_axes=(None, 0)), in_axes=(0, None))
        out = dists(x, y)
        assert out.shape == (4, 5)
        same(out, theirs(jx, jy))
        same(out, einsum_distances(jnp, jx, jy, square))

    def test_pairwise_distances_of_the_vector_form(self, xy, same, vmap):
        x, y, jx, jy = xy
        dists = vmap(vmap(sqeuclidean_distances, in_axes=(None, 0)), in_axes=(0, None))
        same(dists(x, y), einsum_distances(jnp, jx, jy, square=True))


def rbf_kernel(params, x, y):
    """The RBF Kernel"""
    # calculate the kernel
    return torch.exp(-params["gamma"] * (sqeuclidean_distances(x, y)))


def jax_rbf_kernel(params, x, y):
    return jnp.exp(-params["gamma"] * (jax_sqeuclidean_distances(x, y)))


def gram(kernel_func, params, X, Y=None, vmap=vmap):
    if Y is None:
        return vmap(lambda x: vmap(lambda y: kernel_func(params, x, y))(X))(X)
    else:
        return vmap(lambda x: vmap(lambda y: kernel_func(params, x, y))(Y))(X)


def covariance_matrix(kernel_func, x, y, vmap=vmap):
    mapx1 = vmap(lambda x, y: kernel_func(x, y), in_axes=(0, None), out_axes=0)
    mapx2 = vmap(lambda x, y: mapx1(x, y), in_axes=(None, 0), out_axes=1)
    return mapx2(x, y)


@pytest.fixture(params=["number", "array"])
def gammas(request):
    if request.param == "number":
        return {"gamma": 0.5}, {"gamma": 0.5}
    return {"gamma": torch.tensor(0.5)}, {"gamma": jnp.float32(0.5)}


class TestKernels:
    def test_rbf_kernel_of_two_vectors(self, xy, gammas, same):
        x, y, jx, jy = xy
        ours = rbf_kernel(gammas[0], x[0], y[0])
        assert ours.shape == ()
        same(ours, jax_rbf_kernel(gammas[1], jx[0], jy[0]))

    @COMPILED
    def test_gram_matrix_in_a_single_call(self, xy, gammas, same, vmap):
        x, y, jx, jy = xy
        same(gram(rbf_kernel, gammas[0], x, y, vmap=vmap), gram(jax_rbf_kernel, gammas[1], jx, jy, vmap=jax.vmap))

    def test_gram_matrix_of_one_set_with_itself(self, xy, gammas, same, vmap):
        x, _, jx, _ = xy
        out = gram(rbf_kernel, gammas[0], x, vmap=vmap)
        same(out, gram(jax_rbf_kernel, gammas[1], jx, vmap=jax.vmap))
        assert torch.equal(out, out.T)
        assert torch.equal(out.diagonal(), torch.ones(4))

    def test_gram_matrix_in_multiple_calls(self, xy, gammas, same, vmap):
        x, y, jx, jy = xy
        ours, theirs = partial(rbf_kernel, gammas[0]), partial(jax_rbf_kernel, gammas[1])
        out = covariance_matrix(ours, x, y, vmap=vmap)
        same(out, covariance_matrix(theirs, jx, jy, vmap=jax.vmap))
        assert_close(out, gram(rbf_kernel, gammas[0], x, y, vmap=vmap), rtol=1e-6, dtypes=False)


class TestVectorsToMatrices:
    """`vv`, `mv` and `mm`: an inner product becomes a matrix product by two vmaps."""

    @pytest.fixture
    def ours(self, vmap):
        vv = lambda x, y: torch.vdot(x, y)  # noqa: E731
        mv = vmap(vv, (0, None), 0)
        mm = vmap(mv, (None, 1), 1)
        return vv, mv, mm

    @pytest.fixture
    def theirs(self):
        vv = lambda x, y: jnp.vdot(x, y)  # noqa: E731
        mv = jax.vmap(vv, (0, None), 0)
        mm = jax.vmap(mv, (None, 1), 1)
        return vv, mv, mm

    def test_vv(self, ours, theirs, draw, same):
        """`([a], [a]) -> []`"""
        x, y = draw(3), draw(3)
        same(ours[0](torch.from_numpy(x), torch.from_numpy(y)), theirs[0](x, y))

    def test_mv(self, ours, theirs, draw, same):
        """`([b, a], [a]) -> [b]`"""
        x, y = draw(2, 3), draw(3)
        out = ours[1](torch.from_numpy(x), torch.from_numpy(y))
        same(out, theirs[1](x, y))
        assert_close(out, x @ y, rtol=1e-5, dtypes=False)

    @COMPILED
    def test_mm(self, ours, theirs, draw, same):
        """`([b, a], [a, c]) -> [b, c]`"""
        x, y = draw(2, 3), draw(3, 4)
        out = ours[2](torch.from_numpy(x), torch.from_numpy(y))
        same(out, theirs[2](x, y))
        assert_close(out, x @ y, rtol=1e-5, dtypes=False)
