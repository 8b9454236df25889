"""Weighting and critic losses against plain loops, on the masks that notebooks do not show, and on two processes."""
import math
from itertools import product

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.testing import assert_close

from weighted_mtp.losses import masked_mean, pairwise_loss, value_loss
from weighted_mtp.weighting import (RunningMoments, advantage_weights, by_source, content_seeds, credit_weights,
                                    dft_weights, focal_weights, gae_advantages, lambda_returns, lambda_schedule,
                                    posterior, select_tokens, shuffle_within_response, td_errors)

GRID = list(product((0., .5, .95, 1.), (0., .5, .95, 1.)))


def loop_td(values, mask, gamma, initial_value=.5, rewards=None):
    out = [[0.]*len(row) for row in mask]
    for b, row in enumerate(mask):
        prev, valid = initial_value, [t for t, m in enumerate(row) if m]
        for t in valid:
            out[b][t] = (rewards[b] if rewards is not None and t == valid[-1] else gamma*values[b][t]) - prev
            prev = values[b][t]
    return out

def loop_gae(values, mask, gamma, lam, initial_value=.5, rewards=None):
    delta = loop_td(values, mask, gamma, initial_value, rewards)
    out = [[0.]*len(row) for row in mask]
    for b, row in enumerate(mask):
        a = 0.
        for t in reversed([t for t, m in enumerate(row) if m]): a = out[b][t] = delta[b][t] + gamma*lam*a
    return out

def loop_returns(values, rewards, mask, gamma, lam):
    out = [[0.]*len(row) for row in mask]
    for b, row in enumerate(mask):
        g = nxt = None
        for t in reversed([t for t, m in enumerate(row) if m]):
            g = out[b][t] = rewards[b] if g is None else (1-lam)*gamma*nxt + lam*gamma*g
            nxt = values[b][t]
    return out


def masks(T=37):
    "Holes of every density, a prompt, padding left and right, one token (first, middle, last), none, all."
    g = torch.Generator().manual_seed(T)
    m = torch.rand(12, T, generator=g) < torch.linspace(.1, .9, 12)[:, None]
    m[0], m[1] = False, True
    m[2], m[3], m[4] = (torch.arange(T) == t for t in (0, T//2, T-1))
    m[5, :T//3] = False; m[5, T//3:] = True
    m[6, :T//3], m[6, -T//3:] = False, False
    return m

def example(T=37):
    g = torch.Generator().manual_seed(100+T)
    return torch.rand(12, T, generator=g), masks(T), (torch.rand(12, generator=g) < .5).float()

def plain(x): return None if x is None else x.double().tolist()
def same(got, want, **kw): assert_close(got, torch.tensor(want, dtype=torch.float32), rtol=1e-5, atol=1e-5, **kw)


@pytest.mark.parametrize('gamma,lam', GRID)
@pytest.mark.parametrize('T', (1, 2, 37, 300))
def test_recurrences_agree_with_loops(gamma, lam, T):
    v, m, R = example(T)
    for rewards, start in product((None, R), (.5, 0., -1.25)):
        rest = start, plain(rewards)
        same(td_errors(v, m, gamma, start, rewards), loop_td(plain(v), m.tolist(), gamma, *rest))
        same(gae_advantages(v, m, gamma, lam, start, rewards), loop_gae(plain(v), m.tolist(), gamma, lam, *rest))
    want = loop_returns(plain(v), plain(R), m.tolist(), gamma, lam)
    same(lambda_returns(v, R, m, gamma, lam), want)
    tensors = [torch.tensor(x, dtype=torch.float64) for x in (gamma, lam)]
    same(lambda_returns(v, R, m, *tensors), want)

def test_long_sequences_and_telescoping():
    torch.manual_seed(0)
    v, m, R = torch.rand(3, 2048), torch.rand(3, 2048) > .2, torch.tensor([0., 1., 1.])
    same(gae_advantages(v, m, 1., .95), loop_gae(plain(v), m.tolist(), 1., .95))
    same(lambda_returns(v, R, m, .95, .95), loop_returns(plain(v), plain(R), m.tolist(), .95, .95))
    a = gae_advantages(v, m, 1., 1., rewards=R)
    for b in range(3): # R - V_{t-1} over prompts and holes
        before = torch.cat([torch.tensor([.5]), v[b][m[b]][:-1]])
        assert_close(a[b][m[b]], R[b] - before, rtol=1e-5, atol=1e-5)

def test_continuous_in_lam_and_gamma():
    v, m, R = example()
    for near, at in ((1-1e-6, 1.), (1e-6, 0.)):
        assert_close(gae_advantages(v, m, 1., near), gae_advantages(v, m, 1., at), rtol=0, atol=1e-4)
        assert_close(lambda_returns(v, R, m, near, near), lambda_returns(v, R, m, at, at), rtol=0, atol=1e-4)

@pytest.mark.parametrize('junk', (math.nan, math.inf, -math.inf, 1e30))
def test_masked_values_never_leak(junk):
    v, m, R = example()
    w, bad = v.masked_fill(~m, junk), R.masked_fill(~m.any(1), junk)
    for dtype in (torch.bool, torch.long, torch.float32): # any kind of mask
        k = m.to(dtype)
        assert torch.equal(gae_advantages(w, k, rewards=bad), gae_advantages(v, m, rewards=R))
        assert torch.equal(lambda_returns(w, bad, k), lambda_returns(v, R, m))
        assert torch.equal(advantage_weights(w, k), advantage_weights(v, m))
        assert torch.equal(masked_mean(w, k), masked_mean(v, m))
        assert torch.equal(value_loss(w, w, k), value_loss(v, v, m))
        assert torch.equal(pairwise_loss(w, k, v, m), pairwise_loss(v, m, v, m))
    one, two = RunningMoments(), RunningMoments()
    one.update(w, m); two.update(v, m)
    assert torch.equal(one.mean, two.mean) and torch.equal(one.std, two.std)
    for x in (gae_advantages(w, m), lambda_returns(w, R, m), advantage_weights(w, m)): assert (x[~m] == 0).all()

def test_padding_changes_nothing():
    v, m, R = example()
    for left, right in ((0, 91), (5, 0), (64, 64)):
        pad = lambda x: torch.nn.functional.pad(x, (left, right))
        cut = lambda x: x[:, left:left+v.shape[1]]
        assert_close(cut(gae_advantages(pad(v), pad(m), rewards=R)), gae_advantages(v, m, rewards=R))
        assert_close(cut(lambda_returns(pad(v), R, pad(m))), lambda_returns(v, R, m))

def test_bf16_in_float32_out():
    v, m, R = example()
    h, r = v.bfloat16(), R.bfloat16()
    f = h.float()
    pairs = [(gae_advantages(h, m, rewards=r), gae_advantages(f, m, rewards=R)),
             (lambda_returns(h, r, m), lambda_returns(f, R, m)),
             (advantage_weights(h, m), advantage_weights(f, m)),
             (value_loss(h, h*0, m), value_loss(f, f*0, m)),
             (pairwise_loss(h, m, h.flip(0), m), pairwise_loss(f, m, f.flip(0), m))]
    for got, want in pairs:
        assert got.dtype == torch.float32
        assert torch.equal(got, want)

@pytest.mark.parametrize('junk', (0., math.nan, math.inf))
def test_gradients(junk):
    v, m, R = example(9)
    v = v.masked_fill(~m, junk)
    def grad(f):
        x = v.clone().requires_grad_()
        f(x).sum().backward()
        assert x.grad.isfinite().all() and (x.grad[~m] == 0).all()
        return x.grad
    # lam = gamma = 1 with a reward: the sum of A is sum(R - V_{t-1}), so all valid tokens but the last of a row get -1
    last = m & (m.flip(1).cumsum(1).flip(1) == 1)
    assert_close(grad(lambda x: gae_advantages(x, m, 1., 1., rewards=R)), -(m & ~last).float())
    # lam = 0: every valid token but the first of its row is someone's target
    assert_close(grad(lambda x: lambda_returns(x, R, m, 1., 0.)), (m & (m.cumsum(1) > 1)).float())
    assert grad(lambda x: value_loss(x, R[:, None].expand_as(x), m, 'huber')).abs().sum() > 0
    assert grad(lambda x: pairwise_loss(x, m, x.flip(0).detach(), m.flip(0))).abs().sum() > 0

def test_no_host_sync_no_fixed_device():
    "The meta device has no data: `.item()`, `bool(tensor)` and tensors made on the CPU all raise there."
    v, m, R = (x.to('meta') for x in example())
    for x in (gae_advantages(v, m, rewards=R), lambda_returns(v, R, m), advantage_weights(v, m), td_errors(v, m)):
        assert x.shape == v.shape
    by_head = v[..., None].expand(-1, -1, 4)
    assert select_tokens(by_head, by_head, m).shape == (*v.shape, 4)
    RunningMoments().update(v, m)
    assert value_loss(v, v, m).shape == pairwise_loss(v, m, v, m).shape == ()


def test_lambda_schedule():
    for kind in ('constant', 'linear', 'cosine'):
        assert lambda_schedule(0, 1., .8, kind, .25) == lambda_schedule(.25, 1., .8, kind, .25) == 1.
        assert lambda_schedule(1, 1., .8, kind, .25) == pytest.approx(1. if kind == 'constant' else .8)
        assert lambda_schedule(1, .9, .8, kind, 1.) == .9 # held to the end
    for kind in ('linear', 'cosine'): assert lambda_schedule(.625, 1., .8, kind, .25) == pytest.approx(.9)
    assert lambda_schedule(.4, 1., .8, 'cosine') > lambda_schedule(.4, 1., .8, 'linear')
    with pytest.raises(ValueError, match='constant, linear, cosine'): lambda_schedule(.5, 1., .8, 'cubic')


def test_weights_agree_with_a_loop():
    v, m, _ = example()
    flat = [x for x, k in zip(v.double().flatten().tolist(), m.flatten().tolist()) if k]
    mu = sum(flat)/len(flat)
    sd = math.sqrt(sum((x-mu)**2 for x in flat)/len(flat))
    def weight(x): return min(2., max(.2, math.exp((x-mu)/(sd+1e-8)/.7)))
    want = [[weight(x) if k else 0. for x, k in zip(*rows)] for rows in zip(plain(v), m.tolist())]
    same(advantage_weights(v, m, .7, .2, 2.), want)
    same(advantage_weights(v, m, .7, .2, 2., mean=mu, std=sd), want)
    same(advantage_weights(v, m, .7, .2, 2., mean=torch.tensor(mu), std=torch.tensor(sd)), want)

def test_weights_of_few_or_equal_tokens():
    v, one, none = torch.randn(2, 5), torch.zeros(2, 5), torch.zeros(2, 5)
    one[1, 3] = 1
    for top in (3., .5):
        for mask in (one, none): assert torch.equal(advantage_weights(v, mask, max_weight=top), mask)
    given = advantage_weights(v, one, mean=v[1, 3]-1, std=1.) # with given moments one token is enough
    assert given[1, 3].item() == pytest.approx(math.e, rel=1e-5)
    for c in (.1, -.3, 1/3, 1e4): assert (advantage_weights(torch.full((7, 1001), c), torch.ones(7, 1001)) == 1).all()
    for kw in (dict(mean=0.), dict(std=1.)):
        with pytest.raises(ValueError, match='both'): advantage_weights(v, one, **kw)


def loop_moments(steps, momentum):
    mean, var = 0., 1.
    for i, xs in enumerate(steps, 1):
        mb = sum(xs)/len(xs)
        vb, a = sum((x-mb)**2 for x in xs)/len(xs), max(momentum, 1/i)
        mean, var = (1-a)*mean + a*mb, (1-a)*var + a*vb + a*(1-a)*(mb-mean)**2
    return mean, math.sqrt(var)

@pytest.mark.parametrize('momentum', (.1, .5, 1.))
def test_running_moments_agree_with_a_loop(momentum):
    torch.manual_seed(1)
    rm, seen = RunningMoments(momentum), []
    assert (rm.mean.item(), rm.std.item()) == (0., 1.)
    for i in range(25):
        x, m = 1000 + torch.randn(4, 9)*(1+i%3) + i, torch.rand(4, 9) < .6
        rm.update(x, m); rm.update(x, m & False) # a step without tokens does not count
        seen.append(x[m].double().tolist())
        mean, std = loop_moments(seen, momentum)
        assert_close(rm.mean, torch.tensor(mean), rtol=1e-6, atol=0.)
        assert_close(rm.std, torch.tensor(std), rtol=1e-5, atol=0.)
    assert rm.mean.dtype == rm.std.dtype == torch.float32 and rm.mean.shape == rm.std.shape == ()

def test_running_moments_state(tmp_path):
    torch.manual_seed(2)
    one, two, x = RunningMoments(.3), RunningMoments(), torch.randn(5, 4, 6, requires_grad=True)
    for i in range(3): one.update(x[i], torch.ones(4, 6))
    torch.save(one.state_dict(), tmp_path/'state.pt')
    saved = one.state_dict()
    two.load_state_dict(torch.load(tmp_path/'state.pt', weights_only=True))
    for rm in (one, two): rm.update(x[3], torch.ones(4, 6))
    assert torch.equal(one.mean, two.mean) and torch.equal(one.std, two.std)
    assert not one.mean.requires_grad and not torch.equal(saved['mean'], one.mean) # a state is a snapshot

def moment_steps():
    "Six steps of two unequal halves; in one a rank has no tokens, in one neither has."
    torch.manual_seed(3)
    steps = [(torch.randn(8, 31)*(i+1) + 10*i, torch.rand(8, 31) < .1+.1*i) for i in range(6)]
    steps[2][1][:3], steps[4][1][:] = False, False
    return [(x.bfloat16() if i == 5 else x, m) for i, (x, m) in enumerate(steps)]

def moments_on_a_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    rm, share = RunningMoments(), slice(0, 3) if rank == 0 else slice(3, 8)
    for x, m in moment_steps(): rm.update(x[share], m[share])
    torch.save(rm.state_dict(), f'{folder}/{rank}.pt')
    dist.destroy_process_group()

def test_running_moments_on_two_ranks(tmp_path):
    mp.spawn(moments_on_a_rank, (str(tmp_path),), nprocs=2)
    alone = RunningMoments()
    for x, m in moment_steps(): alone.update(x, m)
    ranks = [torch.load(tmp_path/f'{r}.pt', weights_only=True) for r in range(2)]
    for k, want in alone.state_dict().items():
        assert torch.equal(torch.as_tensor(ranks[0][k]), torch.as_tensor(ranks[1][k])) # to the last bit
        assert_close(torch.as_tensor(ranks[0][k]), torch.as_tensor(want), rtol=1e-6, atol=0.)
    assert alone.state_dict()['count'] == 5


def loop_select(score, mask, k_percent):
    B, T, n = score.shape
    out = torch.zeros(B, T, n)
    for k in range(1, n+1):
        valid = [(b, t) for b in range(B) for t in range(T-k) if mask[b, t+k]]
        best = sorted(valid, key=lambda bt: -score[bt[0], bt[1], k-1].item()) # stable: ties by position
        for b, t in best[:math.ceil(round(k_percent*len(valid), 9))]: out[b, t, k-1] = 1
    return out

@pytest.mark.parametrize('mode', ('signed', 'absolute', 'difficult'))
@pytest.mark.parametrize('k_percent', (1e-9, .01, .3, .6, 1., 1))
def test_select_tokens_agrees_with_a_loop(mode, k_percent):
    _, m, _ = example()
    torch.manual_seed(4)
    p, r = (torch.randint(0, 5, (12, 37, 4)).float() for _ in range(2)) # few different scores: many ties
    score = {'signed': p-r, 'absolute': (p-r).abs(), 'difficult': r}[mode]
    got = select_tokens(p, r, m, k_percent, mode)
    assert torch.equal(got, loop_select(score, m, k_percent))
    junk = torch.where(torch.stack([torch.nn.functional.pad(m[:, k:], (0, k)) for k in range(1, 5)], -1), 0., torch.nan)
    assert torch.equal(select_tokens(p+junk, r+junk, m.float(), k_percent, mode), got)

def test_select_tokens_counts_exactly():
    for N in (1, 2, 3, 10, 99, 100, 1000):
        x, m = torch.rand(1, N+1, 1), torch.ones(1, N+1)
        for percent in (1, 7, 29, 30, 55, 57, 58, 60, 70, 90, 99, 100): # 0.07*100, 0.55*100, … are no integers
            assert select_tokens(x, x*0, m, percent/100).sum().item() == -(-percent*N//100), (percent, N)

def test_select_tokens_edges():
    x = torch.rand(2, 3, 5) # more heads than positions
    got = select_tokens(x, x*0, torch.ones(2, 3), 1.)
    assert got.sum((0, 1)).tolist() == [4, 2, 0, 0, 0] and got.dtype == torch.float32
    assert (select_tokens(x, x*0, torch.zeros(2, 3)) == 0).all()
    infinite, mask = torch.full((1, 6, 1), -torch.inf), torch.tensor([[0, 0, 0, 1, 1, 0]])
    assert select_tokens(infinite, torch.zeros(1, 6, 1), mask, 1.)[0, :, 0].tolist() == [0, 0, 1, 1, 0, 0]
    with pytest.raises(ValueError, match='signed, absolute, difficult'): select_tokens(x, x, x[..., 0], mode='hard')
    for k in (0, -.1, 1.01, 60, math.nan):
        with pytest.raises(ValueError, match='above 0 and at most 1'): select_tokens(x, x, x[..., 0], k)


def test_posterior_and_credit_agree_with_loops():
    v, m, _ = example()
    r = 4*v - 2
    V, w = posterior(r.masked_fill(~m, math.nan), m, .7, -.3), credit_weights(r.masked_fill(~m, math.nan), m)
    raw = []
    for b in range(12):
        total, row = 0., r[b].tolist()
        for t in m[b].nonzero().flatten().tolist():
            total += row[t]
            assert V[b, t].item() == pytest.approx(1/(1 + math.exp(.3 - .7*total)), abs=1e-6)
            raw.append(min(3., max(.1, .5 + 2*max(row[t], 0))))
    assert_close(w[m], torch.tensor(raw)/(sum(raw)/len(raw)))
    assert (V[~m] == 0).all() and (w[~m] == 0).all() and ((V >= 0) & (V <= 1)).all()
    delta = td_errors(V, m, initial_value=torch.tensor(-.3).sigmoid())
    last = torch.tensor([V[b][m[b]][-1] if m[b].any() else torch.tensor(-.3).sigmoid() for b in range(12)])
    assert_close(delta.sum(1), last - torch.tensor(-.3).sigmoid(), rtol=0, atol=1e-6)

@pytest.mark.parametrize('floor,low', ((.5, .1), (.3, .1), (0., .1), (0., 0.), (1e-3, 0.)))
def test_no_credit_weighs_all_tokens_exactly_alike(floor, low):
    _, m, _ = example(300)
    assert torch.equal(credit_weights(torch.zeros(12, 300), m, floor, 2., low), m.float())
    assert torch.equal(credit_weights(-torch.rand(12, 300), m, floor, 2., low), m.float())
    none = credit_weights(torch.rand(12, 300), torch.zeros(12, 300)) # no token at all
    assert (none == 0).all()

def test_shuffling_depends_on_the_program_alone():
    v, m, _ = example()
    w, ids = torch.where(m, v, 0.), torch.randint(1000, (12, 37))
    got = shuffle_within_response(w, m, content_seeds(ids, ids >= 0, 3))
    for b in range(12): assert sorted(got[b][m[b]].tolist()) == sorted(w[b][m[b]].tolist())
    assert (got[~m] == 0).all() and not torch.equal(got, w)
    order = torch.randperm(12) # neither the batch's order nor its width
    wide = [torch.nn.functional.pad(x[order], (0, 9)) for x in (w, m, ids, torch.ones_like(ids))]
    again = shuffle_within_response(*wide[:2], content_seeds(*wide[2:], 3))
    assert torch.equal(again[:, :37], got[order])
    assert not torch.equal(shuffle_within_response(w, m, content_seeds(ids, ids >= 0, 4)), got)

def test_weights_by_loss_have_mean_1_by_head_and_no_gradient():
    ce = torch.rand(12, 37, 4, requires_grad=True)
    m = masks()
    valid = by_source(m, 4)
    for w in (focal_weights(ce, m), focal_weights(ce, m, 0.), dft_weights(ce, m)):
        assert_close(w.sum((0, 1))/valid.sum((0, 1)), torch.ones(4))
        assert (w[~valid] == 0).all() and not w.requires_grad
    assert torch.equal(focal_weights(ce*0, m), valid.float()) # every token known: none is left to prefer

def test_losses_agree_with_loops():
    v, m, R = example()
    w, n = v.flip(0, 1), m.flip(0)
    tokens = [(v[i][m[i]].tolist(), w[i][n[i]].tolist()) for i in range(12)]
    rows = [(sum(a)/len(a), sum(b)/len(b)) for a, b in tokens if a and b]
    assert_close(pairwise_loss(v, m, w, n), torch.tensor(sum(math.log1p(math.exp(b-a)) for a, b in rows)/len(rows)))
    far = torch.where(torch.rand(12, 37) < .5, 3*w, w)
    huber = lambda d: d*d/2 if abs(d) <= 1 else abs(d) - .5
    for kind, f in (('mse', lambda d: d*d), ('huber', huber)):
        means = [sum(map(f, d))/len(d) for d in ((v[i]-far[i])[m[i]].tolist() for i in range(12)) if d]
        assert_close(value_loss(v, far, m, kind), torch.tensor(sum(means)/len(means)))

def test_losses_without_tokens():
    v, none = torch.randn(3, 4, requires_grad=True), torch.zeros(3, 4)
    loss = value_loss(v, v, none) + value_loss(v, v, none, 'huber') + pairwise_loss(v, none, v, none+1)
    loss.backward()
    assert loss.item() == 0 and (v.grad == 0).all()
    target = torch.randn(3, 4, requires_grad=True)
    value_loss(v, target, none+1).backward()
    assert target.grad is None # a target is no parameter
    with pytest.raises(ValueError, match='mse, huber'): value_loss(v, v, none, 'mae')
