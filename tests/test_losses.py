"""The MTP loss against its definition, written as loops, on what the notebook does not show; and what it never does."""
import json, os, shutil, subprocess, sys
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from weighted_mtp import losses
from weighted_mtp.losses import mtp_counts, mtp_cross_entropy, mtp_loss, mtp_token_cross_entropy

REPO, BIN = Path(__file__).resolve().parent.parent, Path(sys.executable).parent
KINDS, DTYPES = ('none', 'target', 'source'), (torch.float32, torch.bfloat16, torch.float64)


def reference(hidden, unembedding, labels, weights=None, normalizer=None):
    "The definition (02_losses), token by token: (loss, token losses, counts)."
    B, T, n, _ = hidden.shape
    token, terms, counts = torch.zeros(B, T, n, dtype=hidden.dtype), [[] for _ in range(n)], torch.zeros(n)
    for b, t, k in product(range(B), range(T), range(1, n+1)):
        if t+k >= T or labels[b, t+k] == -100: continue
        ce = F.cross_entropy(unembedding @ hidden[b, t, k-1], labels[b, t+k])
        w = 1. if weights is None else weights[b, t, k-1] if weights.ndim == 3 else weights[b, t+k]
        token[b, t, k-1] = ce.detach()
        terms[k-1].append(w*ce)
        counts[k-1] += 1
    N = counts.tolist() if normalizer is None else torch.as_tensor(normalizer, dtype=torch.float64).expand(n).tolist()
    return sum(sum(x)/N[k] for k, x in enumerate(terms) if x)/n, token, counts

def example(T=11, n=4, B=5, D=6, V=23, kind='target', dtype=torch.float32, seed=0):
    "Random holes, a row without targets, a full one, only the first or last token; junk on what has no target."
    g = torch.Generator().manual_seed(seed)
    hidden, unembedding = torch.randn(B, T, n, D, generator=g), torch.randn(V, D, generator=g)
    labels, mask = torch.randint(0, V, (B, T), generator=g), torch.rand(B, T, generator=g) < .6
    mask[0], mask[1] = False, True
    mask[2], mask[3] = (torch.arange(T) == T-1), (torch.arange(T) == 0)
    weights = {'none': None, 'target': torch.rand(B, T, generator=g), 'source': torch.rand(B, T, n, generator=g)}[kind]
    if weights is not None: weights[weights < .3] = 0
    return hidden.to(dtype), unembedding.to(dtype), labels.masked_fill(~mask, -100), weights

def gradients(f, hidden, unembedding, *rest):
    h, u = hidden.clone().requires_grad_(), unembedding.clone().requires_grad_()
    loss = f(h, u, *rest)
    loss.backward()
    return loss.detach(), h.grad, u.grad

def near(got, want, rel=1e-5): assert (got.double()-want.double()).abs().max() <= rel*want.double().abs().max()

def reference_gradients(hidden, unembedding, *rest): # of the definition, in float64
    return gradients(lambda *x: reference(*x)[0], hidden.double(), unembedding.double(), *rest)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('n', (1, 2, 3, 4))
def test_agrees_with_the_definition(kind, dtype, n, monkeypatch):
    monkeypatch.setattr(losses, '_chunk_rows', lambda *_: 7) # several chunks, the last one not full
    for seed in range(2):
        h, u, y, w = example(n=n, kind=kind, dtype=dtype, seed=seed)
        want, grad_h, grad_u = reference_gradients(h, u, y, w)
        got = gradients(mtp_cross_entropy, h, u, y, w)
        assert got[0].dtype == torch.float32 and got[0].shape == () and got[1].dtype == got[2].dtype == dtype
        near(got[0], want)
        rel = 5e-3 if dtype == torch.bfloat16 else 1e-5 # bfloat16 only rounds the result
        for a, b in zip(got[1:], (grad_h, grad_u)): near(a, b, rel)
        _, token, counts = reference(h.double(), u.double(), y)
        assert torch.equal(mtp_counts(y, n), counts)
        mine = mtp_token_cross_entropy(h, u, y)
        assert mine.dtype == torch.float32 and not mine.requires_grad
        assert_close(mine, token.float(), rtol=1e-5, atol=1e-6)
        assert ((mine == 0) == (token == 0)).all()

@pytest.mark.parametrize('scale', (1., .25))
@pytest.mark.parametrize('kind', KINDS)
def test_fused_path_agrees(kind, scale, monkeypatch):
    monkeypatch.setattr(losses, '_chunk_rows', lambda *_: 7)
    h, u, y, w = example(n=3, kind=kind, dtype=torch.float32, seed=0)
    want = gradients(lambda *x: mtp_cross_entropy(*x, logit_scale=scale), h, u, y, w)
    monkeypatch.setattr(losses, '_compiling_pays', lambda logits: True)
    monkeypatch.setattr(losses, '_compiled_loss_and_slope', lambda: losses._loss_and_slope)
    monkeypatch.setattr(losses, '_nll_', None) # not this way
    for a, b in zip(gradients(lambda *x: mtp_cross_entropy(*x, logit_scale=scale), h, u, y, w), want): near(a, b)

@pytest.mark.parametrize('kind', ('target', 'source'))
def test_normalizer(kind):
    h, u, y, w = example(kind=kind)
    below_1 = torch.rand(4, dtype=torch.float64) + .1 # counts/world_size
    for N in (17, 17., torch.tensor(17.), torch.tensor([9, 8, 7, 6]), [9., .5, 7., 6.], below_1):
        found = zip(gradients(mtp_cross_entropy, h, u, y, w, N), reference_gradients(h, u, y, w, N))
        for got, want in found: near(got, want)
    step = mtp_counts(y, 4)
    parts = [gradients(mtp_cross_entropy, h[i], u, y[i], w[i], step) for i in (slice(0, 1), slice(1, 3), slice(3, 5))]
    loss, grad_h, grad_u = gradients(mtp_cross_entropy, h, u, y, w)
    near(sum(p[0] for p in parts), loss)
    near(torch.cat([p[1] for p in parts]), grad_h)
    near(sum(p[2] for p in parts), grad_u)

def test_weights_as_they_come():
    h, u, y, w = example()
    w = w.bfloat16()
    assert torch.equal(mtp_cross_entropy(h, u, y, w), mtp_cross_entropy(h, u, y, w.float()))
    assert torch.equal(mtp_cross_entropy(h, u, y, w > .5), mtp_cross_entropy(h, u, y, (w > .5).float())) # a selection
    learned = w.float().requires_grad_()
    assert not mtp_cross_entropy(h, u, y, learned).requires_grad
    mtp_cross_entropy(h.requires_grad_(), u, y, learned).backward()
    assert learned.grad is None
    h.grad = None
    loss = mtp_cross_entropy(h, u, y, 0*w)
    loss.backward()
    assert loss.item() == 0 and (h.grad == 0).all()

@pytest.mark.parametrize('junk', (float('nan'), float('inf')))
def test_what_has_no_target_never_leaks(junk):
    h, u, y, _ = example()
    aim = losses.by_source(y != -100, 4)
    for kind in ('target', 'source'):
        w = example(kind=kind)[3]
        bad = w.masked_fill(~aim if kind == 'source' else y == -100, junk)
        got = gradients(mtp_cross_entropy, h.masked_fill(~aim[..., None], junk), u, y, bad)
        for a, b in zip(got, gradients(mtp_cross_entropy, h, u, y, w)): assert torch.equal(a, b)

@pytest.mark.parametrize('T,n', ((1, 1), (1, 3), (2, 5), (3, 3)))
def test_more_heads_than_positions(T, n):
    h, u, y, w = example(T=T, n=n)
    want = reference(h.double(), u.double(), y, w)
    near(mtp_cross_entropy(h, u, y, w), torch.as_tensor(want[0], dtype=torch.float64))
    assert torch.equal(mtp_counts(y, n), want[2]) and want[2][T-1:].sum() == 0

def test_no_targets():
    h, u, y, w = example()
    for norm in (None, 0, [0, 0, 0, 0], 10):
        loss, grad_h, grad_u = gradients(mtp_cross_entropy, h, u, torch.full_like(y, -100), w, norm)
        assert loss.item() == 0 and (grad_h == 0).all() and (grad_u == 0).all()
    assert (mtp_token_cross_entropy(h, u, torch.full_like(y, -100)) == 0).all()
    assert mtp_cross_entropy(h[:0], u, y[:0]).item() == 0 # an empty batch

def test_large_logits():
    h, u, y, w = example()
    found = gradients(mtp_cross_entropy, 1e3*h, u, y, w)
    for got, want in zip(found, reference_gradients(1e3*h.double(), u, y, w)): near(got, want, 1e-4)

def test_views_and_small_integers():
    h, u, y, w = example()
    turned = h.transpose(0, 2).contiguous().transpose(0, 2) # not contiguous, and no view of rows
    found = gradients(mtp_cross_entropy, turned, u.T.contiguous().T, y.int(), w)
    for a, b in zip(found, gradients(mtp_cross_entropy, h, u, y, w)): assert_close(a, b)

def test_wrong_shapes():
    h, u, y, w = example()
    def refused(words, *args):
        with pytest.raises(ValueError, match=words): mtp_cross_entropy(*args)
    refused(r'\(11, 4, 6\)', h[0], u, y)
    refused(r'unembedding has shape \(6, 23\)', h, u.T, y)
    refused(r'labels has shape \(5, 10\): allowed are \(5, 11\)', h, u, y[:, 1:])
    refused(r'weights has shape \(1, 11\)', h, u, y, w[:1])
    refused(r'\(5, 11\) or \(5, 11, 4\)', h, u, y, w[..., None])
    refused(r'normalizer has shape \(3,\)', h, u, y, w, torch.ones(3))


def test_gradient_modes():
    h, u, y, w = example()
    loss, grad_h, grad_u = gradients(mtp_cross_entropy, h, u, y, w)
    for need_h, need_u in product((True, False), repeat=2):
        a, b = h.clone().requires_grad_(need_h), u.clone().requires_grad_(need_u)
        got = mtp_cross_entropy(a, b, y, w)
        assert torch.equal(got, loss) and got.requires_grad == (need_h or need_u)
        if got.requires_grad: (3*got).backward() # the chain goes on behind the loss
        assert (a.grad is None) != need_h and (b.grad is None) != need_u
        if need_h: assert_close(a.grad, 3*grad_h)
        if need_u: assert_close(b.grad, 3*grad_u)
    with torch.no_grad(): got, token = mtp_loss(a.requires_grad_(), b.requires_grad_(), y, w)
    assert not got.requires_grad and torch.equal(got, loss) and torch.equal(token, mtp_token_cross_entropy(h, u, y))
    assert not mtp_loss(a, b, y, w)[1].requires_grad

@pytest.mark.parametrize('reentrant', (True, False))
def test_checkpointed(reentrant):
    h, u, y, w = example()
    f = lambda a, b, *x: checkpoint(lambda a, b: mtp_cross_entropy(a.tanh(), b, *x), a, b, use_reentrant=reentrant)
    plain = gradients(lambda a, *x: mtp_cross_entropy(a.tanh(), *x), h, u, y, w)
    for got, want in zip(gradients(f, h, u, y, w), plain): assert torch.equal(got, want)

def test_tied_unembedding():
    "One tensor embeds and unembeds: both gradients add up."
    _, u, y, w = example()
    def tied(f):
        e = u.clone().requires_grad_()
        f(e[y.clamp(min=0)][:, :, None].tanh(), e, y, w).backward()
        return e.grad
    near(tied(mtp_cross_entropy), tied(lambda *x: reference(*x)[0]))

def test_autocast_and_mixed_dtypes():
    h, u, y, w = example()
    plain = gradients(mtp_cross_entropy, h, u, y, w)
    with torch.autocast('cpu', torch.bfloat16): got = gradients(mtp_cross_entropy, h, u, y, w)
    for a, b in zip(got, plain): assert torch.equal(a, b) # on a CPU the products stay in float32
    mixed = gradients(mtp_cross_entropy, h.bfloat16(), u, y, w)
    assert mixed[1].dtype == torch.bfloat16 and mixed[2].dtype == torch.float32
    near(mixed[0], mtp_cross_entropy(h.bfloat16().float(), u, y, w))

def test_bfloat16_products(monkeypatch):
    "The walk as a GPU takes it, factors in bfloat16 and float32 results; the one call that needs a GPU is emulated."
    def addmm(out, a, b, beta=1, alpha=1):
        assert a.dtype == b.dtype == torch.bfloat16 and out.dtype == torch.float32
        return out.copy_((beta*out if beta else 0) + alpha*(a.float() @ b.float()))
    h, u, y, w = example(dtype=torch.bfloat16)
    want = gradients(mtp_cross_entropy, h, u, y, w)
    monkeypatch.setattr(losses, '_addmm_', addmm)
    monkeypatch.setattr(losses, '_factor_dtype', lambda h, u: torch.bfloat16)
    got = gradients(mtp_cross_entropy, h, u, y, w)
    assert_close(got[0], want[0])
    for a, b in zip(got[1:], want[1:]): near(a, b, 2e-2)


class Watch(TorchDispatchMode):
    "The largest tensor made, and the multiplications of matrix products."
    def __init__(self): super().__init__(); self.largest = self.products = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ('mm', 'addmm'):
            a, b = args[-2:]
            self.products += a.shape[0]*a.shape[1]*b.shape[1]
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor): self.largest = max(self.largest, x.untyped_storage().nbytes()//4)
        return out

def watched(masked, frozen=False, grad=True, **head):
    V, D, T, n = 4096, 64, 200, 4
    h, u = torch.randn(2, T, n, D).requires_grad_(), torch.randn(V, D).requires_grad_(not frozen)
    y = torch.randint(0, V, (2, T))
    y[:, :masked] = -100
    with torch.set_grad_enabled(grad), Watch() as w:
        loss = mtp_cross_entropy(h, u, y, torch.rand(2, T), **head)
        if grad: loss.backward()
    return w.largest, w.products/(V*D), int(mtp_counts(y, n).sum()), V, D

def test_never_holds_all_logits_and_multiplies_no_more_than_it_must():
    for kw, times in ((dict(), 3), (dict(frozen=True), 2), (dict(grad=False), 1)):
        for masked in (0, 150, 200):
            largest, products, rows, V, D = watched(masked, **kw)
            assert products == times*rows # rows without a target cost nothing
            assert largest <= V*D # the unembedding's own size; all logits would be
            if masked == 0: assert rows*V > 20*V*D


def test_a_head_of_any_kind_holds_no_more():
    "An adapter is never merged, a cap takes a second chunk: no tensor is larger than the unembedding."
    def leaf(*shape): return torch.randn(*shape, requires_grad=True)
    adapter = dict(low_rank=(leaf(2, 200, 4, 2), leaf(4096, 2)))
    for head, r in ((dict(logit_scale=.1), 0), (dict(softcap=3.), 0), (dict(bias=leaf(4096)), 0), (adapter, 2)):
        for frozen, times in ((False, 3), (True, 2)):
            largest, products, rows, V, D = watched(0, frozen=frozen, **head)
            assert largest <= V*D and products == rows*(times + 3*r/D)

@pytest.mark.parametrize('dtype', DTYPES)
def test_a_head_of_every_kind_agrees(dtype, monkeypatch):
    "Scale, cap, bias and adapter at once, in several chunks, against plain logits; and where nothing has a target."
    monkeypatch.setattr(losses, '_chunk_rows', lambda *_: 7)
    h, u, y, w = example(dtype=dtype)
    g = torch.Generator().manual_seed(1)
    z, f, b = (torch.randn(s, generator=g).to(dtype) for s in ((5, 11, 4, 2), (23, 2), 23))
    def plain(h, u, z, f, b):
        logits = 2*torch.tanh(.3*(torch.cat([h, z], -1) @ torch.cat([u, f], -1).T + b)/2)
        return reference(logits, torch.eye(23, dtype=torch.float64), y, w)[0]
    def ours(h, u, z, f, b): return mtp_cross_entropy(h, u, y, w, logit_scale=.3, softcap=2., bias=b, low_rank=(z, f))
    found = []
    for call, kind in ((plain, torch.float64), (ours, dtype)):
        leaves = [x.to(kind).requires_grad_() for x in (h, u, z, f, b)]
        loss = call(*leaves)
        found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for want, got in zip(*found): near(got, want, 5e-3 if dtype == torch.bfloat16 else 1e-5)
    with torch.no_grad(): assert_close(ours(*leaves), found[1][0], rtol=0, atol=0)
    nothing = mtp_cross_entropy(h.requires_grad_(), u, torch.full_like(y, -100), bias=leaves[-1], softcap=2.)
    nothing.backward()
    assert nothing == 0 and (leaves[-1].grad == 0).all() and (h.grad == 0).all()

class Heads(torch.nn.Module):
    def __init__(self, unembedding):
        super().__init__()
        self.mix, self.unembedding = torch.nn.Linear(6, 6), torch.nn.Parameter(unembedding.clone())
        with torch.no_grad(): self.mix.weight.copy_(torch.eye(6)); self.mix.bias.zero_()
    def forward(self, hidden, *rest): return mtp_cross_entropy(self.mix(hidden), self.unembedding, *rest)

def ddp_on_a_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    h, u, y, w = example()
    model, share = DistributedDataParallel(Heads(u)), slice(0, 2) if rank == 0 else slice(2, 5)
    model(h[share], y[share], w[share], mtp_counts(y, 4)/2).backward() # DDP averages
    torch.save([p.grad for p in model.parameters()], f'{folder}/{rank}.pt')
    dist.destroy_process_group()
    # at a normal exit one process in thirty aborts ("terminate called without an active exception"), its work done
    os._exit(0)

def test_two_ranks_are_one_batch(tmp_path):
    mp.spawn(ddp_on_a_rank, (str(tmp_path),), nprocs=2)
    h, u, y, w = example()
    alone = Heads(u)
    alone(h, y, w).backward()
    for rank in range(2):
        for got, p in zip(torch.load(tmp_path/f'{rank}.pt', weights_only=True), alone.parameters()): near(got, p.grad)


def test_benchmarks_page(tmp_path):
    "nbs/studies/benchmarks.ipynb, whose stored outputs come from a full run, runs from top to bottom at a small size."
    small = dict(
        seconds=.01, tokens=64, dim=32, vocab=500, rounds=1, # losses
        problems=40, batch=4, step_rounds=1, micro_steps=1, wide_steps=1, plain_steps=2, wide_vocab=1500, # steps
        peak_dim=64, peak_steps=1, peak_size=256, # memory
        solutions=600, index_problems=50, index_solutions=3000, n_pairs=300, padding_samples=100, # data
        made_problems=60, programs=6, prompts=2, generate_rounds=1, policy_steps=5, adapter_numbers=6400, saves=1,
        policy_overrides=['dataset.n_problems=60', 'training.cpu_threads=1', 'data_sampling.n_validation=20'])
    shutil.copytree(REPO/'configs', tmp_path/'configs')
    shutil.copy(REPO/'settings.ini', tmp_path)
    (tmp_path/'runs').mkdir() # what it trains stays here
    page, out = REPO/'nbs/studies/benchmarks.ipynb', tmp_path/'out.ipynb'
    done = subprocess.run([BIN/'papermill', page, out, '--no-progress-bar', '-y', json.dumps(small)], cwd=tmp_path,
                          env={**os.environ, 'PATH': f"{BIN}:{os.environ['PATH']}"},
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
