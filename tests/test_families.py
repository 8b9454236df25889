"""Every decoder family is exact against transformers' own logits and loss, or refused by name: there is no third outcome."""
import copy, math, re, subprocess, sys
from pathlib import Path

import pytest, torch, transformers
import torch.nn.functional as F
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForCausalLM

from weighted_mtp import generation, models
from weighted_mtp.config import UserError
from weighted_mtp.models import (MTPForCausalLM, build_policy, build_value_model, check_logits, export_backbone, load_policy, load_value_model,
                                 save_checkpoint)

REPO, V = Path(__file__).resolve().parent.parent, 64
SIZES = dict(vocab_size=V, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, head_dim=8,
             max_position_embeddings=64, sliding_window=5, pad_token_id=0, bos_token_id=1, eos_token_id=2, num_experts=4, num_local_experts=4,
             n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_embd=32, n_layer=3, n_head=4, n_positions=64, rotary_dim=4,
             d_model=32, n_layers=3, n_heads=4, ffn_dim=48, word_embed_proj_dim=32, state_size=8, use_cache=True)
MLA = dict(q_lora_rank=16, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, head_dim=8)
EXACT = { # class name of the config: what is set beside sizes and scales
    'Llama': dict(), 'Mistral': dict(), 'Qwen2': dict(use_sliding_window=True, max_window_layers=1), 'Qwen3': dict(), 'SmolLM3': dict(), 'Gemma': dict(),
    'Gemma2': dict(), 'Gemma3Text': dict(), 'Cohere': dict(), 'Cohere2': dict(), 'Granite': dict(), 'GraniteMoe': dict(),
    'HyperCLOVAX': dict(), 'MiniCPM3': MLA | dict(num_key_value_heads=4), 'Phi': dict(), 'Phi3': dict(), 'GPTNeoX': dict(), 'Olmo': dict(), 'Olmo2': dict(),
    'StableLm': dict(use_parallel_residual=True), 'Starcoder2': dict(), 'Mixtral': dict(), 'Nemotron': dict(), 'Glm': dict(),
    'Helium': dict(), 'Exaone4': dict(), 'NanoChat': dict(), 'VaultGemma': dict(), 'Persimmon': dict(), 'GptOss': dict(), 'DeepseekV3': MLA | dict(num_key_value_heads=4, first_k_dense_replace=1, n_group=2, topk_group=1)}

def is_scale(name, value): # a field that multiplies, divides or caps
    if re.search(r'rope|init|drop|theta|num_|_type|loss', name): return False
    if isinstance(value, float): return bool(re.search(r'scal|multipl|mup|width|cap', name))
    return value is None and bool(re.search(r'softcapping|soft_cap|logit_scale|multiplier', name))

def config_of(name, **more):
    "A small config whose every scale is away from its default."
    cls = getattr(transformers, f'{name}Config')
    default = cls().to_dict()
    scales = {k: 2. if 'cap' in k else 1.7*v if v else .6 for k, v in default.items() if is_scale(k, v)}
    sizes = {k: v for k, v in SIZES.items() if k in default}
    return cls(**(sizes | scales | more))

def backbone_of(name, seed=0, **more):
    "Weights so large that caps bite, biases and norms that are not neutral."
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(name, **more)).eval()
    with torch.no_grad():
        for n, p in model.named_parameters(): p.copy_(torch.randn_like(p)*.2 + (1 if n.endswith('norm.weight') and p.ndim == 1 else 0))
        model.get_output_embeddings().weight.mul_(3)
    return model


@pytest.fixture(scope='module')
def ids(): return torch.randint(3, V, (2, 12), generator=torch.Generator().manual_seed(1))

def next_token_loss(logits, ids): return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction='none').view_as(ids[:, 1:])

def perturbed(model, match='', by=.05):
    torch.manual_seed(3)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if match in n: p.add_(by*torch.randn_like(p))
    return model.eval()

def near(got, want, atol=1e-4): assert_close(got, want, rtol=1e-4, atol=atol)

def policy_is_exact(policy, ids, own):
    "Logits, losses and gradients of all heads against the logits that transformers computes."
    out = policy(ids, return_all_heads=True).logits
    near(policy(ids).logits, own); near(out[:, :, 0], own)
    by_head = [F.cross_entropy(out[:, :-k, k-1].flatten(0, 1).float(), ids[:, k:].flatten()) for k in (1, 2, 3)]
    trained = [p for p in policy.parameters() if p.requires_grad]
    want = torch.autograd.grad(sum(by_head)/3, trained, allow_unused=True)
    ours = policy(ids, labels=ids)
    near(ours.loss, sum(by_head)/3)
    near(ours.token_ce[:, :-1, 0], next_token_loss(own, ids))
    for p, g, w in zip(trained, torch.autograd.grad(ours.loss, trained, allow_unused=True), want):
        assert (g is None) == (w is None)
        if w is not None: near(g, w, 1e-4*max(1, w.abs().max().item()))

def value_is_exact(model, ids, own):
    near(model(ids, with_logp=True).logp[:, 1:], -next_token_loss(own, ids))

def drafting_is_exact(policy, backbone, ids):
    "Greedy text with drafts is the text without, beyond the window; and the drafts are what the heads say."
    how = dict(max_new_tokens=16, do_sample=False)
    plain = policy.generate(ids, **how)
    assert torch.equal(plain, backbone.generate(ids, **how))
    assert torch.equal(policy.generate(ids[:1], use_mtp=True, **how), policy.generate(ids[:1], **how)) and policy.last_drafts.drafted > 0
    heads, want = generation.HeadCandidates(policy, [], False, 99), policy(ids[:1], return_all_heads=True).logits[0, -1, 1:]
    cache = transformers.DynamicCache()
    for part, seen in ((ids[:1, :10], 10), (ids[:1, 10:], 2)): # what is new after a first pass, too
        out = policy(part, past_key_values=cache, use_cache=True, return_trunk=True)
        hidden = heads.heads(out.trunk, seen)
    near(policy.compute_logits(heads.norm(hidden)), want)

def saved_is_exact(policy, value, ids, tmp_path, backbone=None):
    for model, auto in ((policy, AutoModelForCausalLM), (value, AutoModel)):
        model.save_pretrained(tmp_path/'folder')
        again = auto.from_pretrained(tmp_path/'folder').eval()
        assert type(again) is type(model)
        for key in ('logits',) if model is policy else ('values', 'logp'):
            kw = dict(return_all_heads=True) if model is policy else dict(with_logp=True)
            assert_close(again(ids, **kw)[key], model(ids, **kw)[key], rtol=0, atol=0)
    for model, load in ((policy, load_policy), (value, load_value_model)): # with adapters only they are in the checkpoint
        save_checkpoint(tmp_path/'c.pt', model, complete=backbone is None, backbone='somewhere')
        again = load(tmp_path/'c.pt', copy.deepcopy(backbone))
        for key in ('logits', 'values'):
            if key in model(ids): assert_close(again(ids)[key], model(ids)[key], rtol=0, atol=0)

@pytest.mark.parametrize('name', EXACT)
def test_exact(name, ids, tmp_path):
    backbone = backbone_of(name, **EXACT[name])
    with torch.no_grad(): own = backbone(ids).logits
    policy = perturbed(MTPForCausalLM.from_backbone(copy.deepcopy(backbone), 3), 'extra_heads')
    value = build_value_model(copy.deepcopy(backbone), head='surprise').eval()
    policy_is_exact(policy, ids, own)
    with torch.no_grad():
        value_is_exact(value, ids, own)
        drafting_is_exact(policy, backbone, ids)
        saved_is_exact(policy, value, ids, tmp_path)

@pytest.mark.parametrize('name', EXACT)
def test_exact_with_adapters(name, ids, tmp_path):
    "On every linear layer, the head included: against transformers' own logits with the adapters that peft put in."
    backbone = backbone_of(name, **EXACT[name])
    lora = dict(r=2, alpha=3, dropout=.0, target_modules=r'.*(q_proj|query_key_value|qkv_proj|o_proj|dense|lm_head|embed_out)')
    policy = perturbed(build_policy(copy.deepcopy(backbone), 3, 'lora', lora), 'lora_')
    with torch.no_grad(): own = policy.backbone(ids).logits
    assert any('lm_head.lora_A' in n or 'embed_out.lora_A' in n for n, _ in policy.named_parameters())
    assert (own - backbone(ids).logits).abs().max() > 1e-3
    policy_is_exact(policy, ids, own)
    value = perturbed(build_value_model(copy.deepcopy(backbone), 'lora', lora, 'surprise'), 'lora_')
    with torch.no_grad():
        value_is_exact(value, ids, value.backbone(ids).logits)
        plain = AutoModelForCausalLM.from_pretrained(export_backbone(policy, tmp_path/'plain')).eval()
        near(plain(ids).logits, own)
        saved_is_exact(policy, value, ids, tmp_path, backbone)
