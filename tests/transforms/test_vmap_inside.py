"""Rules 12 and 13: tensors that are made and written inside a mapped function, each held to the loop.

Every case runs both in eager mode and through the form of ``vmap`` that Dynamo traces.
"""

from __future__ import annotations

import copy
import operator
import pickle
import re
from functools import lru_cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp
from torch.func import vmap as tvmap
from torch.utils.checkpoint import checkpoint

import torchbatch
from torchbatch._torch.local import LocalTensor
from torchbatch.errors import InPlaceError, UnsupportedOperationError
from torchbatch.testing import assert_close, loop

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
OUTSIDE = torch.arange(4.0)
K = OUTSIDE
CASES = {}
vmap = torchbatch.vmap


def case(fun):
    """``vmap(fun)(X)`` equals the loop, and leaves X as the loop does."""
    CASES[fun.__name__] = lambda _: fun
    return fun


def nesting_case(fun):
    """The same, for a function that maps another one with what it is given as ``vmap``."""
    CASES[fun.__name__] = lambda vmap: lambda x: fun(vmap, x)
    return fun


def run(lib, name):
    x = X.clone()
    return lib(CASES[name](lib))(x), x


@case
def zeros_set(x):
    o = torch.zeros(4)
    o[0] = x.sum()
    return o


@case
def views_of_views(x):
    o = torch.zeros(2, 4)
    v = o[0]
    w = v[1:3]
    u = w.view(2, 1)
    u[0, 0] = x.sum()
    return (o, v, w, u)


@case
def view_then_parent(x):
    o = torch.zeros(4)
    v = o[1:]
    o[2] = x[0]
    return (v, o)


@case
def dtype_view(x):
    o = torch.zeros(4)
    v = o.view(torch.int32)
    o[1] = x[0]
    return (v, o)


@case
def dtype_view_write(x):
    o = torch.zeros(4)
    v = o.view(torch.int32)
    v[1] = x.view(torch.int32)[0]
    return (v, o)


@case
def broadcast_add(x):
    o = torch.zeros(2, 4)
    o += x
    return o


@case
def add_(x):
    o = torch.zeros(4)
    o.add_(x, alpha=2)
    return o


@case
def imatmul(x):
    o = torch.eye(4)
    o @= x.outer(x)
    return o


@case
def copy_(x):
    o = torch.empty(4)
    o.copy_(x)
    return o


@case
def fill_tensor(x):
    o = torch.empty(4)
    o.fill_(x[0])
    return o


@case
def zero_after(x):
    o = torch.zeros(4)
    o[0] = x[0]
    o.zero_()
    return o


@case
def slice_step(x):
    o = torch.zeros(8)
    o[::2] = x
    o[1::2] = -x
    return o


@case
def ellipsis_set(x):
    o = torch.zeros(2, 4)
    o[..., 1:] = x[1:]
    return o


@case
def idx_tensor(x):
    o = torch.zeros(4)
    o[torch.tensor([0, 2])] = x[:2]
    return o


@case
def idx_mapped(x):
    o = torch.zeros(4)
    o[x.argsort()] = torch.arange(4.0)
    return o


@case
def idx_mapped_scalar(x):
    o = torch.zeros(4)
    o[x.argmax()] = 1.0
    return o


@case
def mask_const(x):
    o = torch.zeros(4)
    o[torch.tensor([True, False, True, False])] = x[:2]
    return o


@case
def index_put(x):
    o = torch.zeros(4)
    o.index_put_((torch.tensor([0, 0, 1, 3]),), x, accumulate=True)
    return o


@case
def scatter(x):
    o = torch.zeros(4)
    o.scatter_(0, x.argsort(), x)
    return o


@case
def scatter_add(x):
    o = torch.zeros(4)
    o.scatter_add_(0, torch.tensor([0, 0, 1, 1]), x)
    return o


@case
def index_add(x):
    o = torch.zeros(4)
    o.index_add_(0, torch.tensor([0, 0, 1, 1]), x)
    return o


@case
def index_copy(x):
    o = torch.zeros(4)
    o.index_copy_(0, torch.tensor([3, 2, 1, 0]), x)
    return o


@case
def index_fill(x):
    o = torch.zeros(4)
    o.index_fill_(0, torch.tensor([3, 2]), x[0])
    return o


@case
def masked_fill(x):
    o = torch.zeros(4)
    o.masked_fill_(x > 0, 3.0)
    return o


@case
def masked_fill_t(x):
    o = torch.zeros(4)
    o.masked_fill_(x > 0, x[0])
    return o


@case
def masked_scatter(x):
    o = torch.zeros(4)
    o.masked_scatter_(torch.tensor([True, True, False, False]), x)
    return o


@case
def out_kw(x):
    o = torch.empty(4)
    torch.add(x, 1, out=o)
    return o


@case
def out_kw_view(x):
    o = torch.empty(2, 4)
    torch.mul(x, 2, out=o[1])
    o[0] = 0
    return o


@case
def out_pair(x):
    v = torch.empty(())
    i = torch.empty((), dtype=torch.long)
    torch.max(x, 0, out=(v, i))
    return (v, i)


@case
def out_dtype(x):
    o = torch.empty(4, dtype=torch.float64)
    torch.add(x, 1, out=o)
    return o


@case
def expand_write(x):
    o = torch.zeros(4)
    e = o.expand(2, 4)
    o[0] = x[0]
    return e


@case
def chunk_write(x):
    o = torch.zeros(4)
    a, b = o.chunk(2)
    a[0] = x[0]
    b.copy_(x[2:])
    return (o, a, b)


@case
def unbind_write(x):
    o = torch.zeros(4)
    p = o.unbind()
    p[1].copy_(x[1])
    o[0] = x[0]
    return (o, list(p))


@case
def split_write(x):
    o = torch.zeros(4)
    p = o.split([1, 3])
    p[1][0] = x[1]
    return (o, list(p))


@case
def iter_write(x):
    o = torch.zeros(2, 4)
    for r in o:
        r += x
    return o


@case
def enumerate_write(x):
    o = torch.zeros(4)
    for i in range(4):
        o[i] = x[:i + 1].sum()
    return o


@case
def resize_(x):
    o = torch.zeros(4)
    o.resize_(2)
    o[0] = x[0]
    return o


@case
def unsqueeze_(x):
    o = torch.zeros(4)
    o.unsqueeze_(0)
    o[0] = x
    return o


@case
def unsqueeze_view_(x):
    o = torch.zeros(4)
    v = o[1:]
    v.unsqueeze_(0)
    o[1] = x[0]
    return (o, v)


@case
def t_(x):
    o = torch.zeros(2, 4)
    o.t_()
    o[:, 0] = x
    return o


@case
def squeeze_(x):
    o = torch.zeros(1, 4)
    o.squeeze_(0)
    o += x
    return o


@case
def detach_write(x):
    o = torch.zeros(4)
    o.detach()[0] = x[0]
    return o


@case
def from_numpy(x):
    a = np.zeros(4, dtype=np.float32)
    o = torch.from_numpy(a)
    o[0] = x[0]
    return o


@case
def deepcopy_(x):
    o = torch.zeros(4)
    d = copy.deepcopy(o)
    d[0] = x[0]
    return (o, d)


@case
def copycopy(x):
    o = torch.zeros(4)
    d = copy.copy(o)
    d[0] = x[0]
    return (o, d)


@case
def pick(x):
    o = torch.ones(4)
    d = pickle.loads(pickle.dumps(o))
    d[0] = x[0]
    return (o, d)


@case
def repr_(x):
    o = torch.zeros(4)
    s = repr(o)
    assert s == 'tensor([0., 0., 0., 0.])', s
    return x


@case
def item_(x):
    o = torch.zeros(4)
    assert o.sum().item() == 0
    assert not bool(o.any())
    assert o.tolist() == [0] * 4
    return x


@case
def np_asarray(x):
    o = torch.ones(4)
    return x + torch.as_tensor(np.asarray(o) * 2)


@case
def param(x):
    p = torch.nn.Parameter(torch.zeros(4))
    return p + x


@case
def module_inside(x):
    torch.manual_seed(0) if False else None
    m = torch.nn.LayerNorm(4)
    return m(x)


@case
def batchnorm_inside(x):
    m = torch.nn.BatchNorm1d(2)
    y = m(x.view(2, 2))
    return (y, m.running_mean)


@case
def stack_list(x):
    o = [torch.zeros(()) for _ in range(3)]
    o[1] += x[0]
    return torch.stack(o)


@case
def inplace_relu(x):
    o = torch.zeros(4)
    o += x
    F.relu(o, inplace=True)
    return o


@case
def where_tensor(x):
    o = torch.full((4,), 2.0)
    o = torch.where(x > 0, o, x)
    o[0] = 7
    return o


@case
def newzeros(x):
    o = x.new_zeros(2, 4)
    o[1] = x
    return o


@case
def new_tensor(x):
    o = x.new_tensor([1.0, 2.0, 3.0, 4.0])
    o *= x
    return o


@case
def tensor_of_list(x):
    o = torch.tensor([1.0, 2, 3, 4])
    o[1:3] -= x[:2]
    return o


@case
def zeros_like(x):
    o = torch.zeros_like(x)
    o[0] = x[1]
    return o


@case
def empty_like(x):
    o = torch.empty_like(x)
    o[:] = x
    return o


@case
def arange(x):
    o = torch.arange(4.0)
    o.mul_(x)
    return o


@case
def eye(x):
    o = torch.eye(4)
    o.diagonal().copy_(x)
    return o


@case
def diag_fill(x):
    o = torch.eye(4)
    o.diagonal()[:] = x
    o.T[0, 1] = 9
    return o


@case
def swap_rows(x):
    o = torch.arange(8.0).view(2, 4)
    o[[0, 1]] = o[[1, 0]]
    o[0] += x
    return o


@case
def alias_arith(x):
    o = torch.arange(4.0)
    o[1:] = o[:-1].clone() + x[1:]
    return o


@case
def complex_view(x):
    o = torch.zeros(4, dtype=torch.complex64)
    o.real.copy_(x)
    o.imag[0] = x[1]
    return o


@case
def as_strided(x):
    o = torch.zeros(4)
    v = o.as_strided((2, 2), (2, 1))
    o[3] = x[0]
    return v


@case
def as_strided_w(x):
    o = torch.zeros(4)
    v = o.as_strided((2, 2), (2, 1))
    v[1, 1] = x[0]
    return o


@case
def unfold(x):
    o = torch.zeros(4)
    v = o.unfold(0, 2, 1)
    o += x
    return v


@case
def logical(x):
    o = torch.zeros(4, dtype=torch.bool)
    o |= x > 0
    o[0] ^= True
    return o


@case
def int_accum(x):
    o = torch.zeros((), dtype=torch.long)
    o += (x > 0).sum()
    return o


@case
def lerp(x):
    o = torch.zeros(4)
    o.lerp_(x, 0.5)
    return o


@case
def addcmul(x):
    o = torch.zeros(4)
    o.addcmul_(x, x, value=2.0)
    return o


@case
def addmv(x):
    o = torch.zeros(2)
    o.addmv_(torch.ones(2, 4), x)
    return o


@case
def baddbmm(x):
    o = torch.zeros(1, 2, 2)
    o.baddbmm_(x.view(1, 2, 2), x.view(1, 2, 2))
    return o


@case
def clamp_(x):
    o = torch.ones(4)
    o.clamp_(max=x[0])
    return o


@case
def cumsum_(x):
    o = torch.zeros(4)
    o += x
    o.cumsum_(0)
    return o


@case
def sub_setitem_none(x):
    o = torch.zeros(4)
    o[None] = x
    o[None, :, None][0, 0] = 2 * x[0]
    return o


@case
def setitem_local_idx(x):
    i = torch.zeros((), dtype=torch.long)
    i += (x > 0).sum()
    o = torch.zeros(5)
    o[i] = 1
    return o


@case
def local_idx_in_x(x):
    i = torch.zeros(2, dtype=torch.long)
    i[1] = x.argmax()
    return x[i]


@case
def write_in_x(x):
    o = torch.zeros(4)
    x[0] = o[0]
    x[1:] = 7
    return x * 1


@case
def fillrow(x):
    o = torch.zeros(2, 4)
    r = o[0]
    r[:] = x
    o[1] = r
    return o


@case
def vstack_out(x):
    o = torch.empty(2, 4)
    torch.stack([x, x], out=o)
    return o


@case
def tensor_attr_T(x):
    o = torch.zeros(2, 4)
    o.T[:, 0] = x
    o.mT[1, 1] = 3
    return o


@case
def broadcast_tensors(x):
    o = torch.zeros(4)
    a, b = torch.broadcast_tensors(o, x)
    return a + b


@case
def cat_then(x):
    o = torch.cat([torch.zeros(2), x])
    o[0] = x[0]
    return o


@case
def cat_nonvar(x):
    o = torch.cat([torch.zeros(2), torch.ones(2)])
    o[0] = x[0]
    return o


@case
def math_nonvar(x):
    o = torch.zeros(4) + 1
    o[0] = x[0]
    return o


@case
def math_nonvar2(x):
    o = torch.sin(torch.ones(4)) * 2
    o[0] = x[0]
    return o


@nesting_case
def nested_factory_outer_written_inner_val(vmap, x):
    o = torch.zeros(4)

    def inner(s):
        t = torch.zeros(2)
        t[0] = s
        return t
    r = vmap(inner)(x)
    o[:2] = r[0]
    return (o, r)


@nesting_case
def nested_outer_made_inner_write_outer_val(vmap, x):
    o = torch.zeros(4)

    def inner(s):
        o[0] = x[0]
        return s * o
    r = vmap(inner)(x)
    return (o, r)


@nesting_case
def nested_inner_made_write_outer_val(vmap, x):

    def inner(s):
        o = torch.zeros(4)
        v = o[1:]
        o[1] = x[0]
        v[1] = s
        return (o, v)
    return vmap(inner)(x)


@nesting_case
def nested_pass_local_mapped(vmap, x):
    o = torch.zeros(4)

    def inner(s, t):
        s.add_(t)
        return s * 2
    r = vmap(inner)(o, torch.ones(4))
    return (o, r)


@nesting_case
def nested_pass_local_unmapped(vmap, x):
    o = torch.zeros(4)

    def inner(s, t):
        t = t.clone()
        t[0] = s
        return t
    return (vmap(inner, in_axes=(0, None))(x, o), o)


@nesting_case
def nested_out_none_local(vmap, x):

    def inner(s):
        return torch.zeros(3)
    o = vmap(inner, out_axes=None)(x)
    o[0] = x[0]
    return o


@nesting_case
def nested_unmapped_local_identity(vmap, x):
    o = torch.zeros(3)

    def inner(s):
        return o
    p = vmap(inner, out_axes=None)(x)
    o[0] = x[0]
    return p


@nesting_case
def three_levels(vmap, x):
    a = torch.zeros(2)

    def f(s):
        b = torch.zeros(2)

        def g(u):
            cc = torch.zeros(3)
            cc[0] = x[0]
            cc[1] = s
            cc[2] = u
            return cc
        r = vmap(g)(x)
        b[0] = r.sum()
        b[1] = x[1]
        return (b, r)
    p, q = vmap(f)(x)
    a[0] = p.sum()
    return (a, p, q)


@case
def grad_inside(x):

    def f(y):
        o = torch.zeros(4)
        o[1:] = y[1:] ** 2
        o[0] = x[0] * y[0]
        return o.sum()
    return grad(f)(x)


@case
def grad_inside_view(x):

    def f(y):
        o = torch.zeros(2, 4)
        r = o[0]
        r += y
        r.mul_(y)
        return (o * x).sum()
    return grad(f)(x)


@case
def grad_inside_local_input(x):
    o = torch.ones(4)

    def f(y):
        return (y * x).sum()
    return grad(f)(o)


@case
def grad_of_local_written_inside(x):
    o = torch.ones(4)

    def f(y):
        z = o.clone()
        z[0] = y[0]
        return (z * z).sum()
    return grad(f)(x)


@case
def jacrev_in(x):

    def f(y):
        o = torch.zeros(4)
        for i in range(4):
            o[i] = y[:i + 1].prod()
        return o
    return jacrev(f)(x)


@case
def jacfwd_in(x):

    def f(y):
        o = torch.zeros(4)
        for i in range(4):
            o[i] = y[:i + 1].prod()
        return o
    return jacfwd(f)(x)


@case
def hess_in(x):

    def f(y):
        o = torch.zeros(4)
        for i in range(4):
            o[i] = y[:i + 1].prod()
        return o.sum()
    return hessian(f)(x)


@case
def jvp_in(x):

    def f(y):
        o = torch.zeros(4)
        o[1] = y[0] * x[1]
        o += y
        return o
    return jvp(f, (x,), (torch.ones(4),))


@case
def jvp_local_tangent(x):
    t = torch.zeros(4)
    t[0] = 1
    t[1] = x[0]
    return jvp(lambda y: y.sin(), (x,), (t,))


@case
def vjp_in(x):

    def f(y):
        o = torch.zeros(4)
        o[1:] = y[1:]
        return o * y
    r, b = vjp(f, x)
    ct = torch.zeros(4)
    ct[2] = 1
    ct[1] = x[0]
    return (r, b(ct))


@case
def tvmap_in(x):
    o = torch.zeros(4)

    def inner(s):
        t = torch.zeros(2) + s
        return t
    r = tvmap(inner)(x)
    o[:2] = r[0]
    return (o, r)


@case
def sc3(x: torch.Tensor):
    o = torch.zeros(4)
    o[0] = x[0]
    return o


@case
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@case
def inc(x: torch.Tensor) -> None:
    x.add_(1)


@case
def op_direct(x):
    o = torch.zeros(4)
    torch.ops.aten.add_(o, x)
    return o


@case
def optim_inside(x):
    w = torch.zeros(4)
    for _ in range(3):
        g = grad(lambda w: ((w - x) ** 2).sum())(w)
        w -= 0.1 * g
    return w


@case
def optim_mom(x):
    w = torch.zeros(4)
    m = torch.zeros_like(w)
    for _ in range(3):
        g = grad(lambda w: ((w - x) ** 2).sum())(w)
        m.mul_(0.9).add_(g)
        w = w - 0.1 * m
    return (w, m)


@case
def no_grad_ctx(x):
    with torch.no_grad():
        o = torch.zeros(4)
        o[0] = x[0]
    return o


@case
def ckpt(x):

    def f(y):
        o = torch.zeros(4)
        o[0] = y[0]
        return (o * y).sin()
    return checkpoint(f, x, use_reentrant=False)


@case
def sdpa(x):
    q = torch.zeros(1, 2, 2)
    q += x.view(1, 2, 2)
    return F.scaled_dot_product_attention(q, q, q)


@case
def buf_conv(x):
    w = torch.zeros(1, 1, 2)
    w[0, 0, 0] = x[0]
    return F.conv1d(x.view(1, 1, 4), w)


@case
def linspace_(x):
    o = torch.linspace(0, 1, 4)
    o[1] = x[0]
    return o


@case
def cat_out_local(x):
    o = torch.zeros(2, 4)
    for i, r in enumerate(o.unbind()):
        r.copy_(x * i)
    return o


@case
def setdefault_dict(x):
    d = {'a': torch.zeros(2), 'b': [torch.zeros(2)]}
    d['a'][0] = x[0]
    d['b'][0] += x[1]
    return d


@case
def tensor_subclass_param(x):
    p = torch.nn.Parameter(torch.zeros(4))
    with torch.no_grad():
        p[0] = 2.0
    return p * x


@case
def param_write_sample(x):
    p = torch.nn.Parameter(torch.zeros(4))
    with torch.no_grad():
        p[0] = x[0]
    return p * x


@case
def buffer_reg(x):
    m = torch.nn.Module()
    m.register_buffer('b', torch.zeros(4))
    m.b[0] = x[0]
    m.b += 1
    return m.b


@case
def view_nograd(x):
    o = torch.zeros(4)
    with torch.no_grad():
        v = o[1:]
    o[1] = x[0]
    v[1] = x[2]
    return (v, o)


@case
def detached(x):
    o = torch.zeros(4)
    d = o.detach()
    o[0] = x[0]
    d[1] = x[1]
    return (o, d)


@case
def to_noop(x):
    o = torch.zeros(4)
    d = o.to(torch.float32)
    e = o.float()
    g = o.contiguous()
    h = o.reshape(4)
    o[0] = x[0]
    return (d, e, g, h)


@case
def to_dtype(x):
    o = torch.zeros(4)
    d = o.double()
    o[0] = x[0]
    d[1] = x[1].double()
    return (d, o)


@case
def flattened(x):
    o = torch.zeros(2, 2)
    f = o.flatten()
    f[0] = x[0]
    r = o.ravel()
    r[1] = x[1]
    return (o, f, r)


@case
def flattened_nc(x):
    o = torch.zeros(2, 2).t()
    f = o.flatten()
    f[1] = x[0]
    o[0, 0] = x[1]
    return (o, f)


@case
def reshape_after_batched(x):
    o = torch.zeros(2, 2)
    o[0, 0] = x[0]
    f = o.view(4)
    f[3] = x[1]
    o[0, 1] = 9
    return (o, f)


@case
def is_leaf(x):
    o = torch.zeros(4)
    o[0] = x[0]
    assert o.shape == (4,)
    assert o.dim() == 1
    assert len(o) == 4
    assert o.dtype == torch.float32
    assert o.device.type == 'cpu'
    assert o.numel() == 4
    assert o.size(0) == 4
    return o


@case
def hash_key(x):
    o = torch.zeros(4)
    d = {o: 1}
    o[0] = x[0]
    assert d[o] == 1
    return o


@case
def iadd_operator(x):
    o = torch.zeros(4)
    p = operator.iadd(o, x)
    assert p is o
    return o


@case
def zero_dim(x):
    o = torch.zeros(())
    o += x.sum()
    o[...] = o * 2
    return o


@case
def setitem_list(x):
    o = torch.zeros(2, 2)
    o[0] = torch.tensor([1.0, 2.0])
    o[[0, 1], [1, 0]] = x[:2]
    return o


@case
def setitem_bool(x):
    o = torch.zeros(2, 2)
    o[True] = x[0]
    return o


@case
def setitem_number_after(x):
    o = torch.zeros(4)
    o += x
    o[0] = 3
    o[1:3] = torch.tensor([7.0, 8.0])
    return o


@case
def np_value(x):
    o = torch.zeros(4)
    o[:2] = torch.from_numpy(np.ones(2, dtype=np.float32))
    o[2] = float(np.float64(3))
    o += x
    return o


@case
def tensor_split_w(x):
    o = torch.zeros(4)
    p = torch.tensor_split(o, 3)
    p[0][0] = x[0]
    return (o, list(p))


@case
def meshgrid(x):
    o = torch.arange(2.0)
    a, b = torch.meshgrid(o, o, indexing='ij')
    o[0] = x[0]
    return (a, b)


@case
def movedim(x):
    o = torch.zeros(2, 3, 4)
    m = o.movedim(-1, 0).permute(2, 0, 1).transpose(0, 1)
    m[0] = x[0]
    o[1, 1] = x
    return (m, o)


@case
def select_scatter(x):
    o = torch.zeros(4)
    return (o.select_scatter(x[0], 0, 2), o)


@case
def narrow_w(x):
    o = torch.zeros(4)
    n = o.narrow(0, 1, 2)
    torch.sin(x[:2], out=n)
    return o


@case
def view_as_complex(x):
    o = torch.zeros(2, 2)
    z = torch.view_as_complex(o)
    o[0, 0] = x[0]
    z[1] = 1j
    return (torch.view_as_real(z), o)


@case
def aug_slices(x):
    o = torch.ones(4)
    o[1:3] *= x[:2]
    o[::2] -= x[0]
    o[-1] **= 2
    o[0] /= x[0]
    return o


@case
def swap_refs(x):
    a = torch.zeros(4)
    b = torch.ones(4)
    for i in range(3):
        a, b = (b, a)
        a[i] = x[i]
        b += a
    return (a, b)


@case
def cumulative_cache(x):
    cache = torch.zeros(4, 4)
    for i in range(4):
        cache[i] = x * i
        cache[:, i] += cache[i]
    return cache


@nesting_case
def nested_identity_alias(vmap, x):
    o = torch.zeros(4)
    vmap(lambda s: s)(o)
    o[0] = x[0]
    return o


@nesting_case
def nested_identity_alias2(vmap, x):
    o = torch.zeros(4, 2)
    r = vmap(lambda s: s[0], out_axes=0)(o)
    o[0] = x[0]
    return (r, o)


@nesting_case
def inner_const_write(vmap, x):
    o = torch.zeros(4, 2)

    def inner(s):
        v = s[1:]
        s[1] = 3
        return v
    r = vmap(inner)(o)
    o[0, 1] = x[0]
    return (r, o)


@case
def local_returned_twice(x):
    o = torch.zeros(4)
    o[0] = x[0]
    return (o, o)


@case
def local_returned_nonvar_twice(x):
    o = torch.zeros(4)
    return (o, o)


@case
def ret_view(x):
    o = torch.zeros(4)
    return (o[1:], o)


@nesting_case
def inner_const_closure_write(vmap, x):
    o = torch.zeros(4)

    def inner(s):
        o[0] = 5.0
        return s
    vmap(inner)(x)
    return o


@case
def local_kept_in_list_reused(x):
    L = []
    for i in range(3):
        t = torch.zeros(2)
        L.append(t)
        t[0] = x[i]
    for t in L:
        t[1] = x[3]
    return torch.stack(L)


# What PyTorch's tracers cannot do: a traced form gives every new tensor its room at once.
EAGER_ONLY = {
    "mask_const": "a constant mask counts as per-sample",
    "from_numpy": "not a factory of PyTorch's", "np_asarray": "a value is asked for", "item_": "a value is asked for",
    "repr_": "a value is asked for", "pick": "pickle", "deepcopy_": "copy.deepcopy", "copycopy": "copy.copy",
    "nested_out_none_local": "an output that does not vary counts as one that does",
    "nested_identity_alias2": "the result of a view shares memory with the argument",
    "inner_const_write": "the result of a view shares memory with the argument",
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_written_tensor_holds_what_the_loop_writes(name):
    results, x = run(vmap, name)
    expected, x_after = run(loop, name)
    assert_close(results, expected)
    assert_close(x, x_after)
    assert all(type(leaf) is torch.Tensor for leaf in torchbatch.tree.leaves(results))


@pytest.mark.parametrize("name", CASES)
def test_the_traced_form_writes_the_same(name, monkeypatch, request):
    if name in EAGER_ONLY:
        request.applymarker(pytest.mark.xfail(reason=EAGER_ONLY[name], strict=True))
    monkeypatch.setattr("torchbatch.transforms.vmap._is_compiling", lambda: True)
    results, x = run(vmap, name)
    expected, x_after = run(loop, name)
    assert_close(results, expected)
    assert_close(x, x_after)


# --- what differs from the loop, or cannot be done --------------------------------------------------------------------


def error_of(fun, *args, **options):
    """The class and the text of the error; a line of source that ends the text is cut off, but its place is checked."""
    with pytest.raises(torchbatch.errors.TorchbatchError) as caught:
        vmap(fun, **options)(*args)
    text, _, place = str(caught.value).partition("\n")
    assert re.match(rf"  in \w+, {re.escape(__file__)}:\d+\n    \S", place), place
    return type(caught.value), text


SHARED = (
    "A per-sample value is written in place into {}, which all samples share: it was made outside the mapped function, or from "
    "such tensors alone. Make it inside (torch.zeros(…), .clone()), pass it as a mapped argument, or return the value."
)
UNMAPPED = (
    "A per-sample value is written in place into argument {}, which is unmapped (None in in_axes) and so shared by all samples. "
    "Map it over an axis, write into a copy (.clone()), or return the value instead."
)
MADE_OUTSIDE = (
    "A per-sample value is written in place into a tensor that was made outside {}. Make the tensor inside the mapped function, "
    "or return the value instead."
)


def test_a_write_into_an_unmapped_argument_names_it():
    def write(x, batch):
        batch["y"][0] += x
        return x

    assert error_of(write, X, {"y": [torch.zeros(4)]}, in_axes=(0, None)) == (InPlaceError, UNMAPPED.format("batch['y'][0]"))


@pytest.mark.parametrize("form", ["[0] = x[0]", "[1:] += x[1:]", ".add_(x)", ".copy_(x)", ".T.mul_(x)", "[x > 0] = x[0]"])
def test_a_write_into_an_unmapped_argument_in_every_spelling(form):
    scope = {}
    source = f"def write(x, y):\n    y{form}\n    return x\n"
    exec(compile(source, "<a line that cannot be read>", "exec"), scope)
    y = torch.zeros(4)
    with pytest.raises((InPlaceError, torchbatch.errors.DataDependentError)):
        vmap(scope["write"], (0, None))(X, y)
    assert (y == 0).all()


def test_a_write_into_a_tensor_from_outside():
    def write(x):
        OUTSIDE[0] = x[0]
        return x

    assert error_of(write, X) == (InPlaceError, SHARED.format("'OUTSIDE[0]'"))


def test_a_write_into_what_was_computed_from_tensors_from_outside_alone():
    def write(x):
        twice = OUTSIDE * 2
        twice[0] = x[0]
        return twice

    assert error_of(write, X) == (InPlaceError, SHARED.format("'twice[0]'"))


def test_a_write_of_an_inner_value_into_a_tensor_of_the_outer_function():
    def outer(x):
        room = torch.zeros(4)

        def inner(s):
            room[0] = s
            return s

        return vmap(inner)(x)

    assert error_of(outer, X) == (InPlaceError, MADE_OUTSIDE.format("the vmap that maps it, so that its samples share it"))


@pytest.mark.parametrize("value", [lambda x, y: x[0], lambda x, y: y[0]])
def test_a_write_inside_grad_into_a_tensor_from_outside_of_it(value):
    def outer(x):
        room = torch.ones(4)

        def inner(y):
            room[0] = value(x, y)
            return (y * room).sum()

        return grad(inner)(x)

    assert error_of(outer, X) == (InPlaceError, MADE_OUTSIDE.format("the function that is being differentiated"))


def test_set_and_resize_are_refused_where_they_would_be_wrong():
    def set_(x):
        room = torch.zeros(4)
        room.set_(torch.ones(4))
        return room + x

    def resize(x):
        room = torch.zeros(4)
        room[0] = x[0]
        return room.resize_(2)

    def resize_with_views(x):
        room = torch.zeros(4)
        view = room[1:]
        room.resize_(2)
        return view + x[1:]

    assert error_of(set_, X) == (
        UnsupportedOperationError,
        "set_ cannot make a tensor share the memory of another one inside a mapped function. Use the other one, or copy_.",
    )
    cannot = (
        UnsupportedOperationError,
        "resize_ cannot change the shape of a tensor that varies from sample to sample, or has views. Make a new one, or take a "
        "part of it (narrow).",
    )
    assert error_of(resize, X) == cannot
    assert error_of(resize_with_views, X) == cannot


def test_data_is_refused():
    def read(x):
        return x.data

    def assign(x):
        room = torch.zeros(4)
        room.data = x
        return room

    expected = (
        UnsupportedOperationError,
        "The attribute .data does not work inside a mapped function. Use x.detach() to read, and x.copy_(…) to write.",
    )
    assert error_of(read, X) == expected
    assert error_of(assign, X) == expected


def test_a_view_that_cannot_be_made_again_is_refused(monkeypatch):
    def write(x):
        room = torch.zeros(2, 4)
        view = room.reshape(8)
        with monkeypatch.context() as patch:
            patch.setattr("torchbatch._torch.levels.share_memory", lambda a, b: False)
            room[0] = x
        return view

    assert error_of(write, X) == (
        UnsupportedOperationError,
        "A per-sample value is written in place into a tensor of which reshape made a view, and PyTorch makes no such view where "
        "the tensor varies from sample to sample. Write first and take the view then.",
    )


def test_errors_of_the_write_itself_are_those_of_one_sample():
    def cast(x):
        room = torch.zeros(4, dtype=torch.long)
        room += x
        return room

    def shape(x):
        room = torch.zeros(3)
        room += x
        return room

    def index(x):
        room = torch.zeros(3)
        room[7] = x[0]
        return room

    def leaf(x):
        room = torch.zeros(4, requires_grad=True)
        room[0] = x[0]
        return room

    def out(x):
        return torch.add(x, 1, out=torch.zeros(2, 4))

    def out_of_unmapped(x):
        room = torch.zeros(4)
        torch.add(OUTSIDE, 1, out=room[:2])
        return x + room

    for fun, kind in ((cast, RuntimeError), (shape, RuntimeError), (index, IndexError), (leaf, RuntimeError)):
        with pytest.raises(kind) as ours:
            vmap(fun)(X)
        with pytest.raises(kind) as loops:
            loop(fun)(X)
        assert re.sub("dimension [01]", "", str(ours.value)) == re.sub("dimension [01]", "", str(loops.value))
    with pytest.raises(InPlaceError, match=re.escape("out= has shape (2, 4), but the result for one sample has shape (4,).")):
        vmap(out)(X)
    with pytest.raises(InPlaceError, match=re.escape("out= has shape (2,), but the result for one sample has shape (4,).")):
        vmap(out_of_unmapped)(X)


def test_a_mapped_argument_written_in_place_is_the_callers():
    """Rule 13."""

    def write(x, tree):
        x[0] = x.sum()
        tree["a"].mul_(x)
        return tree["a"] + 0

    ours, theirs = [(X.clone(), {"a": X.t().clone()}) for _ in range(2)]
    assert_close(vmap(write, (0, 1))(*ours), loop(write, (0, 1))(*theirs))
    assert_close(ours, theirs)
    assert not torch.equal(ours[0], X)


def test_a_constant_written_into_an_unmapped_argument_stays():
    def write(x, y):
        y[0] = 5
        return x * y

    ours, theirs = torch.ones(4), torch.ones(4)
    assert_close(vmap(write, (0, None))(X, ours), loop(write, (0, None))(X, theirs))
    assert torch.equal(ours, theirs)


# --- tensors that stay behind -----------------------------------------------------------------------------------------


class Keeper:
    def __init__(self):
        self.room = None

    def __call__(self, x):
        if self.room is None:
            self.room = torch.zeros(4)
            self.room[0] = 1.0
        return self.room * x


def test_a_tensor_that_an_object_keeps_is_an_ordinary_one_later():
    keeper = Keeper()
    first = vmap(keeper)(X)
    assert torch.equal(vmap(keeper)(X), first)
    assert torch.equal(keeper.room, torch.tensor([1.0, 0, 0, 0]))
    assert type(keeper.room) is torch.Tensor
    keeper.room += 1
    assert torch.equal(vmap(keeper)(X), X * keeper.room)


def test_a_tensor_that_a_cache_keeps():
    @lru_cache
    def positions(n):
        table = torch.zeros(n)
        table[1:] = torch.arange(1.0, n)
        return table

    def encode(x):
        out = positions(4).clone()
        out += x
        return out

    for _ in range(3):
        assert torch.equal(vmap(encode)(X), X + torch.arange(4.0))
    assert pickle.loads(pickle.dumps(positions(4))).tolist() == [0, 1, 2, 3]


def test_a_kept_tensor_does_not_take_values_of_a_later_call():
    keeper = Keeper()
    vmap(keeper)(X)

    def write(x):
        keeper.room[1] = x[0]
        return x

    with pytest.raises((InPlaceError, torchbatch.errors.EscapedValueError)):
        vmap(write)(X)
        keeper.room + 1


def test_a_local_tensor_looks_and_pickles_like_an_ordinary_one():
    seen = {}

    def look(x):
        room = torch.zeros(2)
        room[0] = 1
        seen.update(text=repr(room), pickled=pickle.dumps(room), copy=copy.copy(room), deep=copy.deepcopy(room))
        seen.update(parameter=torch.nn.Parameter(room.clone()), isinstance=isinstance(room, torch.Tensor))
        seen["deep"] += 1
        return x

    vmap(look)(X)
    assert seen["text"] == "tensor([1., 0.])"
    assert type(pickle.loads(seen["pickled"])) is torch.Tensor
    assert b"torchbatch" not in seen["pickled"]
    assert seen["copy"].tolist() == [1, 0] and seen["deep"].tolist() == [2, 1]
    assert seen["parameter"].requires_grad and isinstance(seen["parameter"], torch.nn.Parameter)
    assert seen["isinstance"]


def test_a_module_can_be_made_and_initialised_inside():
    def layer(x):
        linear = torch.nn.Linear(4, 2)
        with torch.no_grad():
            linear.weight.copy_(x.expand(2, 4))
            linear.bias.fill_(1.0)
        return linear(x)

    expected = torch.stack([x @ x + torch.ones(2) for x in X])
    assert_close(vmap(layer, randomness="different")(X), expected)


def test_gradients_of_the_caller_flow_through_written_tensors():
    def write(x):
        room = torch.zeros(2, 4)
        view = room[:, 1:]
        room[0] = x**2
        row = room[1]
        row += x.sin()
        room[:, 0] *= x[1]
        return room, view.exp()

    ours, theirs = X.clone().requires_grad_(), X.clone().requires_grad_()
    weights = torch.arange(8.0).view(2, 4)
    for lib, x in ((vmap, ours), (loop, theirs)):
        room, view = lib(write)(x)
        ((room * weights).sum() + view.sum()).backward()
    assert_close(ours.grad, theirs.grad)


def test_a_leaf_made_inside_stays_one():
    leaves = []

    def write(x):
        leaf = torch.zeros(4, requires_grad=True)
        with torch.no_grad():
            leaf[0] = x[0]
        leaves.append(leaf)
        return leaf * x

    assert vmap(write)(X).requires_grad
    assert_close(vmap(write)(X).detach(), loop(write)(X).detach())


def test_drawing_in_place_gives_each_sample_its_own():
    def draw(x):
        room = torch.zeros(100)
        room.normal_()
        torch.nn.init.uniform_(room[:50])
        return room

    different, same = vmap(draw, randomness="different")(X), vmap(draw, randomness="same")(X)
    assert not torch.equal(different[0], different[1])
    assert not torch.equal(different[0, :50], different[1, :50])
    assert torch.equal(same[0], same[1])


def test_views_that_are_gone_are_forgotten():
    rooms = []

    def read(x):
        room = torch.zeros(4)
        rooms.append(room)
        for i in range(50):
            room[i % 4] + x
        view = room[1:]
        assert len(room._views) <= 2
        room += x
        return view

    assert_close(vmap(read)(X), X[:, 1:])
    assert not isinstance(rooms[0], LocalTensor)
