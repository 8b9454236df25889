"""Solutions packed in rows: the numbers of each are those that it has alone, and no other solution changes them.
That all pipelines train as they do without packing, on one process and on two, is in test_distributed.py."""
from types import SimpleNamespace
import pytest, torch
from torch.nn.attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import (AutoModelForCausalLM, GemmaConfig, GPTNeoXConfig, LlamaConfig, MambaConfig, MistralConfig,
                          PreTrainedModel)
from transformers import modeling_flash_attention_utils as flash
from transformers.integrations import flex_attention as flex

from weighted_mtp import packing
from weighted_mtp.config import load_config
from weighted_mtp.files import UserError, project_root
from weighted_mtp.logit_check import check_packing
from weighted_mtp.loop import Window, reading_speed
from weighted_mtp.losses import pairwise_loss
from weighted_mtp.models import build_first_error_model, build_policy, build_ratio_model, build_value_model
from weighted_mtp.weighting import credit_weights, gae_advantages, lambda_returns, select_tokens

SMALL = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
             pad_token_id=0, bos_token_id=1, eos_token_id=2)
BUILD = dict(policy=lambda b: build_policy(b, 4), ratio=build_ratio_model, first_error=build_first_error_model,
             mlp=build_value_model, surprise=lambda b: build_value_model(b, head='surprise'))

def example(seed=0): # five solutions of 3 to 9 tokens: ids, attention mask, labels (B, T)
    g = torch.Generator().manual_seed(seed)
    lengths, T = torch.tensor([5, 3, 9, 2, 4]), 9
    mask = (torch.arange(T) < lengths[:, None]).long()
    ids = torch.randint(3, 50, (5, T), generator=g)*mask
    return ids, mask, ids.masked_fill((mask == 0) | (torch.arange(T) < 1), -100)

def built(kind, config=None):
    torch.manual_seed(0)
    model = BUILD[kind](AutoModelForCausalLM.from_config(config or LlamaConfig(**SMALL))).eval()
    with torch.no_grad(): # copies of a block, or of a model, would hide a mistake
        for n, p in model.named_parameters():
            if n.startswith(('extra_heads', 'wrong')): p.add_(.1*torch.randn_like(p))
    return model

def numbers(model, kind, ids, mask, labels, backward=True): # what is computed of every token, and the gradient
    model.zero_grad()
    known = labels != -100
    with torch.set_grad_enabled(backward):
        if kind == 'policy':
            out = model(ids, mask, labels=labels)
            found, loss = [out.token_ce.detach()], out.loss
        else:
            out, found = model(ids, mask, known), list(model.credit(ids, mask, known))
            has_values = hasattr(out, 'values') and torch.is_tensor(out.values)
            loss = (out.values if has_values else out.evidence)[known].sum()
    if backward: loss.backward()
    return found, [p.grad.clone() for p in model.parameters() if p.grad is not None]

@pytest.mark.parametrize('kind', BUILD)
def test_packed_equals_padded(kind):
    model, batch = built(kind), example()
    want, want_grads = numbers(model, kind, *batch)
    model.use_packing(10)
    check_packing(model)
    got, grads = numbers(model, kind, *batch)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads, want_grads, rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('kind', BUILD)
def test_another_solution_changes_nothing(kind):
    model, (ids, mask, labels) = built(kind), example()
    model.use_packing(10)
    before, _ = numbers(model, kind, ids, mask, labels)
    other = example(seed=1)[0]
    changed = ids.clone()
    changed[1] = other[1]
    after, _ = numbers(model, kind, changed, mask, labels.where(labels == -100, changed))
    rest = [0, 2, 3, 4]
    for a, b in zip(after, before):
        torch.testing.assert_close(a[rest], b[rest], rtol=0, atol=0)
        assert not torch.equal(a[1], b[1])

def test_two_documents_in_a_row_of_eight_tokens():
    """Documents of 5 and 3 tokens: head k at t has a target if t+k is in the same document; what is computed of
    values never crosses the border either."""
    model = built('policy')
    model.use_packing(8)
    ids = torch.tensor([[11, 12, 13, 14, 15], [21, 22, 23, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    labels = ids.masked_fill(mask == 0, -100)
    rows = model.decoder_inputs(ids, mask)[1]
    assert rows.pack(ids).tolist() == [[11, 12, 13, 14, 15, 21, 22, 23]]
    has_target = (model(ids, mask, labels=labels).token_ce > 0).long()
    assert has_target[0].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert has_target[1].tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    values = rows.unpack(torch.tensor([[.6, .7, .8, .9, 1., .4, .3, .2]]))
    torch.testing.assert_close(gae_advantages(values, mask, lam=1.)[:, 0], torch.tensor([.5, -.3])) # V_T - V_-1
    returns = lambda_returns(values, torch.tensor([1., 0.]), mask, lam=0.)
    torch.testing.assert_close(returns[0], torch.tensor([.7, .8, .9, 1., 1.]))
    torch.testing.assert_close(returns[1], torch.tensor([.3, .2, 0., 0., 0.]))
    weights = credit_weights(rows.unpack(torch.tensor([[0., 0., 0., 0., 1., 0., 0., 0.]])), mask, normalize=False)
    assert weights.tolist() == [[.5, .5, .5, .5, 2.5], [.5, .5, .5, 0., 0.]]
    excess = rows.unpack(torch.tensor([[5., 1., 4., 2., 9., 3., 6., 9.]]))[..., None] # the two of 9 have no target
    chosen = select_tokens(excess, torch.zeros_like(excess), mask, .5)[..., 0]
    assert chosen.tolist() == [[1, 0, 1, 0, 0], [0, 1, 0, 0, 0]] # the best half of the six others
    good, bad = values[:1], values[1:]
    loss = pairwise_loss(good, mask[:1], bad, mask[1:]) # softplus(.3 - .8), of their means
    torch.testing.assert_close(loss, torch.tensor(.4740770))

@pytest.mark.parametrize('packed', [False, True])
def test_tokens_and_padding_are_counted(packed):
    model, (ids, mask, labels) = built('policy'), example()
    if packed: model.use_packing(10)
    model.train() # what is read in evaluation does not count
    model(ids, mask, labels=labels)
    positions = 3*9 if packed else 5*9 # 9; 5 + 4; 3 + 2
    window = Window(torch.tensor(0.))
    window.began -= 2
    trainer = SimpleNamespace(model=model, window=window, accelerator=SimpleNamespace(reduce=lambda x, how: x))
    speed = reading_speed(trainer)
    assert speed['speed/padding'] == pytest.approx(1 - 23/positions)
    assert speed['speed/tokens_per_second'] == pytest.approx(23/2, rel=.1)
    assert 'speed/padding' not in reading_speed(trainer) # of the tokens since then: none

def test_which_attention_reads_packed_solutions(monkeypatch):
    def on(cuda, flash, dtype):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: cuda)
        monkeypatch.setattr(packing, 'is_flash_attn_2_available', lambda: flash)
        return packing.packed_attention(dtype)
    half = torch.bfloat16
    assert [on(False, True, half), on(True, False, half), on(True, True, half), on(True, True, torch.float32)] == \
        ['sdpa', 'flex_attention', 'flash_attention_2', 'flex_attention']

READ = [] # lengths of documents, call by call

def documents_alone(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, **kw):
    """What flash_attn_varlen_func computes: (tokens, heads, size) each, documents one after the other."""
    ends = cu_seqlens_q.tolist()
    lengths = [b - a for a, b in zip(ends, ends[1:])]
    assert cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k) and ends[0] == 0
    assert sum(lengths) == len(q) and max_seqlen_q == max_seqlen_k == max(lengths) and causal
    READ.append(lengths)
    parts = zip(*(x.transpose(0, 1).split(lengths, 1) for x in (q, k, v)))
    return torch.cat([scaled_dot_product_attention(*p, is_causal=True) for p in parts], 1).transpose(0, 1)

@pytest.mark.parametrize('attention', ['flash_attention_2', 'flex_attention'])
@pytest.mark.parametrize('kind', BUILD)
def test_attention_of_a_gpu(kind, attention, monkeypatch):
    """Through transformers' own calls of either, with a stand-in for FlashAttention's kernel, and FlexAttention as it
    is before it is compiled: torch has no backward pass of it on a CPU."""
    monkeypatch.setattr('weighted_mtp.backbones.packed_attention', lambda dtype: attention)
    monkeypatch.setattr(PreTrainedModel, '_flash_attn_can_dispatch', lambda *args, **kw: True)
    monkeypatch.setattr(flash, '_loaded_implementation', None)
    kernels = None, documents_alone, None, flash._pad_input, flash._unpad_input
    monkeypatch.setattr(flash, '_lazy_imports', lambda *args, **kw: kernels)
    plain = flex_attention.flex_attention
    monkeypatch.setattr(flex, 'compile_friendly_flex_attention',
                        lambda *args, training, **kw: READ.append(args[0].shape[2]) or plain(*args, **kw))
    model, batch = built(kind), example()
    has_backward = attention != 'flex_attention'
    want, want_grads = numbers(model, kind, *batch, has_backward)
    model.use_packing(10)
    check_packing(model)
    READ.clear()
    got, grads = numbers(model, kind, *batch, has_backward)
    # documents, and what rows are filled up with
    assert READ and all(x == 128 or sorted(x) == [2, 3, 4, 5, 9] for x in READ)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads, want_grads, rtol=1e-4, atol=1e-5)

def test_production_configs_pack():
    files = [f for f in (project_root()/'configs').glob('*/*.yaml') if not f.stem.endswith(('micro', 'smollm2'))]
    found = {f.stem: c.training.packing for f in files if (c := load_config(f)).pipeline != 'evaluation'}
    assert len(found) >= 7 and all(found.values()), found

GROUPED = dict(num_key_value_heads=1, head_dim=16)

@pytest.mark.parametrize('config', [MistralConfig(**SMALL, **GROUPED), GemmaConfig(**SMALL, **GROUPED),
                                    GPTNeoXConfig(**SMALL)], ids=lambda c: c.model_type)
def test_other_families(config):
    model = built('policy', config)
    want, _ = numbers(model, 'policy', *example())
    model.use_packing(10)
    check_packing(model)
    got, _ = numbers(model, 'policy', *example())
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)

def test_a_family_without_attention_is_refused():
    small = {k: v for k, v in SMALL.items() if k not in ('num_attention_heads', 'intermediate_size')}
    model = built('mlp', MambaConfig(**small, state_size=4))
    with pytest.raises(UserError, match='cannot read packed solutions: transformers has no sdpa'): model.use_packing(10)

def test_a_family_that_would_mix_solutions_is_refused(monkeypatch):
    model = built('mlp')
    def without_positions(packing, ids, attention): return dict(input_ids=packing.pack(ids), use_cache=False)
    monkeypatch.setattr('weighted_mtp.backbones.packed_inputs', without_positions)
    model.use_packing(10)
    with pytest.raises(UserError, match='cannot read packed solutions: its hidden states differ'): check_packing(model)
