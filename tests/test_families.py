"""Every decoder family is exact against transformers' own logits and loss, or refused by name: no third outcome."""
import copy, json, re, runpy
from pathlib import Path

import pytest, torch, transformers
import torch.nn.functional as F
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from weighted_mtp import drafting, generation
from weighted_mtp.config import UserError
from weighted_mtp.models import (MTPForCausalLM, build_policy, build_value_model, check_logits, export_backbone,
                                 load_backbone, load_policy, load_value_model, save_checkpoint)
from weighted_mtp.optim import check_gradients

REPO, V = Path(__file__).resolve().parent.parent, 64
SIZES = dict(vocab_size=V, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
             head_dim=8, intermediate_size=48, max_position_embeddings=64, sliding_window=5, num_experts=4,
             num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, state_size=8,
             n_embd=32, n_layer=3, n_head=4, n_positions=64, rotary_dim=4, d_model=32, n_layers=3, n_heads=4,
             ffn_dim=48, word_embed_proj_dim=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, use_cache=True)
LATENT = dict(q_lora_rank=16, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
              num_key_value_heads=4)
PLAIN = ('Llama', 'Mistral', 'Qwen3', 'SmolLM3', 'Gemma', 'Gemma2', 'Gemma3Text', 'Cohere', 'Cohere2', 'Granite',
         'GraniteMoe', 'HyperCLOVAX', 'Phi', 'Phi3', 'GPTNeoX', 'Olmo', 'Olmo2', 'Starcoder2', 'Mixtral', 'Nemotron',
         'Glm', 'Helium', 'Exaone4', 'NanoChat', 'VaultGemma', 'Persimmon', 'GptOss', 'OPT')
EXACT = dict.fromkeys(PLAIN, {}) | { # class name of the config: what is set beside sizes and scales
    'Qwen2': dict(use_sliding_window=True, max_window_layers=1), 'StableLm': dict(use_parallel_residual=True),
    'MiniCPM3': LATENT, 'DeepseekV3': LATENT | dict(first_k_dense_replace=1, n_group=2, topk_group=1)}

def is_scale(name, value): # a field that multiplies, divides or caps
    if isinstance(value, bool) or re.search(r'rope|init|drop|theta|num_|_type|loss|size|lru_width', name): return False
    if isinstance(value, (int, float)): return bool(re.search(r'scal|multipl|mup|width|cap|dim_model_base', name))
    return value is None and bool(re.search(r'softcapping|soft_cap|logit_scale|multiplier', name))

def config_of(name, **more):
    "A small config whose every scale is away from its default."
    cls = getattr(transformers, f'{name}Config')
    default = cls().to_dict()
    def away(k, v): return 2. if 'cap' in k else 3 if isinstance(v, int) else 1.7*v if v else .6
    scales = {k: away(k, v) for k, v in default.items() if is_scale(k, v)}
    sizes = {k: v for k, v in SIZES.items() if k in default}
    config = cls(**(sizes | scales | more))
    assert all(config.to_dict()[k] != default[k] for k in scales)
    return config

def backbone_of(name, seed=0, **more):
    "Weights so large that caps bite, biases and norms that are not neutral."
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(name, **more)).eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(torch.randn_like(p)*.2 + (n.endswith('norm.weight') and p.ndim == 1))
        model.get_output_embeddings().weight.mul_(3)
    return model


LORA = dict(r=2, alpha=3, dropout=0., target_modules='all-linear')
NO_LAYERS, RECURRENT = 'keeps its blocks in no `layers`', 'keeps a recurrent state'
REFUSED = { # what a policy cannot stand on: the reason, and settings
    **{name: (NO_LAYERS, {}) for name in ('GPT2', 'GPTBigCode', 'GPTJ', 'CodeGen', 'Bloom', 'Falcon', 'Mpt')},
    **{name: (RECURRENT, {}) for name in ('Mamba', 'FalconMamba', 'MiniMax', 'RecurrentGemma')},
    'OPT': ('has no final norm', dict(do_layer_norm_before=False)), 'Bert': (NO_LAYERS, dict(is_decoder=True)),
    'Mixtral': ('output_router_logits', dict(output_router_logits=True))}
REFUSED_VALUE = {'Mixtral': 'output_router_logits', 'Bert': 'its last hidden states differ by up to'} # others are exact

@pytest.fixture(scope='module')
def ids(): return torch.randint(3, V, (2, 12), generator=torch.Generator().manual_seed(1))

def next_token_loss(logits, ids): # (B, T - 1)
    rows, targets = logits[:, :-1].flatten(0, 1).float(), ids[:, 1:]
    return F.cross_entropy(rows, targets.flatten(), reduction='none').view_as(targets)

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
    how = dict(max_new_tokens=10, do_sample=False)
    plain = policy.generate(ids, **how)
    assert torch.equal(plain, backbone.generate(ids, **how))
    assert torch.equal(policy.generate(ids[:1], use_mtp=True, **how), policy.generate(ids[:1], **how))
    assert policy.last_drafts.drafted > 0
    want = policy(ids[:1], return_all_heads=True).logits[0, -1, 1:]
    heads = drafting.HeadDrafter(policy, [], False, 99)
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
    for model, load in ((policy, load_policy), (value, load_value_model)): # complete, or on a backbone
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
    names = 'q_proj|query_key_value|qkv_proj|o_proj|out_proj|dense|lm_head|embed_out'
    lora = LORA | dict(target_modules=f'.*({names})')
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

class Words: # a tokenizer of one token a number
    eos_token_id, pad_token_id, bos_token_id = 2, 0, None
    def __call__(self, texts, **kw): return dict(input_ids=[[int(w) for w in t.split()] for t in texts])
    def decode(self, ids, skip_special_tokens=True): return ' '.join(map(str, ids))

PROMPTS = ['10 53 51 11 40 4 44 59', '7 7 3']

def test_blocks_that_cannot_draft_generate_without(capsys, monkeypatch):
    "As DeepSeek 3.2, whose blocks need a cache with an index: said once, and the text is the same."
    class Needy(LlamaDecoderLayer):
        def forward(self, *args, past_key_values=None, **kw):
            if past_key_values is not None and self.self_attn.layer_idx >= 2: raise ValueError('no index in this cache')
            return super().forward(*args, past_key_values=past_key_values, **kw)
    policy = MTPForCausalLM.from_backbone(llama(num_attention_heads=2, num_key_value_heads=2, initializer_range=.3), 3)
    want = [g.ids for g in generation.generate(policy, Words(), PROMPTS, 8, self_speculative=False)]
    for head in policy.extra_heads: head.__class__ = Needy
    monkeypatch.setattr(drafting.LlamaHeads, 'fits', lambda model: False)
    got = [[g.ids for g in generation.generate(policy, Words(), PROMPTS, 8)] for _ in range(2)]
    assert got == [want, want]
    assert capsys.readouterr().out.count('LlamaForCausalLM generates without drafts') == 1

UNUSUAL = (dict(hidden_act='gelu'), dict(attn_implementation='eager'), dict(mlp_bias=True))

@pytest.mark.parametrize('more', UNUSUAL, ids=str)
@torch.no_grad()
def test_drafts_of_unusual_llamas(more, ids):
    "The fast way for Llama's heads is taken only where it computes what they do; masks fit the kind of attention."
    backbone = llama(num_key_value_heads=2, initializer_range=.3, **more)
    policy = perturbed(MTPForCausalLM.from_backbone(backbone, 3), 'extra_heads')
    drafting_is_exact(policy, backbone, ids)

def test_a_family_that_begins_a_new_cache():
    "Phi 3 turns its positions another way once a text is longer than `original_max_position_embeddings`."
    rope = dict(rope_type='longrope', rope_theta=1e4, short_factor=[1.]*4, long_factor=[4.]*4, factor=4.,
                original_max_position_embeddings=16)
    backbone = backbone_of('Phi3', rope_parameters=rope, original_max_position_embeddings=16, sliding_window=None)
    policy = MTPForCausalLM.from_backbone(backbone, 2)
    want = [g.ids for g in generation.generate(backbone, Words(), PROMPTS, 14)]
    assert [g.ids for g in generation.generate(policy, Words(), PROMPTS, 14)] == want and not policy.can_draft

@pytest.mark.parametrize('name', REFUSED)
def test_refused_by_name(name, ids):
    reason, more = REFUSED[name]
    backbone = backbone_of(name, **more)
    who = type(backbone).__name__
    for make in (lambda: MTPForCausalLM.from_backbone(backbone, 3), lambda: build_policy(backbone, 2, 'lora', LORA),
                 lambda: MTPForCausalLM.from_backbone(backbone.config, 1)):
        with pytest.raises(UserError, match=f'^{who}.*{reason}'): make()
    if name in REFUSED_VALUE:
        with pytest.raises(UserError, match=f'^{who}.*{REFUSED_VALUE[name]}'): build_value_model(backbone)
    else:
        with torch.no_grad(): value_is_exact(build_value_model(backbone).eval(), ids, backbone(ids).logits)


SMALL = dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=48)

def llama(cls=transformers.LlamaForCausalLM, **more):
    torch.manual_seed(0)
    return cls(transformers.LlamaConfig(**SMALL | more)).eval()

def altered(change, name='Altered'):
    "Llama, whose logits are changed after the head: a family that nobody listed."
    def forward(self, *args, **kw):
        out = transformers.LlamaForCausalLM.forward(self, *args, **kw)
        out.logits = change(out.logits)
        return out
    return type(name, (transformers.LlamaForCausalLM,), dict(forward=forward))

class Normed(transformers.LlamaForCausalLM): # a second norm, before the head
    def forward(self, input_ids, attention_mask=None, use_cache=None):
        hidden = self.model(input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(F.normalize(hidden, dim=-1)))

DIFFER = 'differ by up to .* from its own'
UNLISTED = dict(scaled=(altered(lambda z: 1.01*z), DIFFER), shifted=(altered(lambda z: z + .01), DIFFER),
                capped=(altered(lambda z: 500*torch.tanh(z/500)), DIFFER), # a new model's logits are about 0.1
                normed=(Normed, DIFFER),
                sliced=(altered(lambda z: z[..., :60]), 'cuts the 64 logits that its head computes to 60'))

@pytest.mark.parametrize('kind', UNLISTED)
def test_families_that_nobody_listed(kind):
    cls, words = UNLISTED[kind]
    for make in (lambda b: MTPForCausalLM.from_backbone(b, 2), build_policy, build_value_model):
        with pytest.raises(UserError, match=f'^{cls.__name__}.*{words}'): make(llama(cls))

def test_a_block_that_depends_on_its_place():
    "Its copies are no copies: the hidden states are multiplied by something of the block's number."
    class Placed(LlamaDecoderLayer):
        def forward(self, x, *args, **kw):
            return super().forward(x, *args, **kw)*torch.linspace(1, 1 + self.self_attn.layer_idx, x.shape[-1])
    backbone = llama()
    for layer in backbone.model.layers: layer.__class__ = Placed
    assert build_value_model(backbone) and MTPForCausalLM.from_backbone(backbone, 1) # which have no copies
    words = 'LlamaForCausalLM: its last block, run again as head 2, gives other logits'
    with pytest.raises(UserError, match=words): MTPForCausalLM.from_backbone(backbone, 2)

def test_the_check_leaves_no_trace():
    "Random numbers, training modes, gradients and buffers are as before; without weights nothing is computed."
    backbone = llama(attention_dropout=.5).train()
    backbone.model.layers[0].eval()
    policy, x = MTPForCausalLM.from_backbone(backbone, 2), torch.arange(8)[None]
    policy(x, labels=x).loss.backward()
    modes, random = [m.training for m in policy.modules()], torch.get_rng_state()
    buffers = {n: b.clone() for n, b in policy.named_buffers()}
    grads = {n: p.grad.clone() for n, p in policy.named_parameters()}
    check_logits(policy, copies=True)
    assert torch.equal(random, torch.get_rng_state()) and [m.training for m in policy.modules()] == modes
    assert not all(modes) and any(modes)
    for n, p in policy.named_parameters(): assert torch.equal(p.grad, grads[n])
    for n, b in policy.named_buffers(): assert torch.equal(b, buffers[n])
    with torch.device('meta'): MTPForCausalLM.from_backbone(transformers.LlamaConfig(**SMALL), 3)

@pytest.mark.parametrize('dtype', (torch.bfloat16, torch.float16))
def test_the_check_knows_rounding(dtype):
    for name in ('Llama', 'Gemma2', 'Cohere', 'Granite', 'Mixtral', 'Phi'):
        backbone = backbone_of(name).to(dtype)
        assert build_policy(copy.deepcopy(backbone), 2) and build_value_model(backbone)
    with pytest.raises(UserError, match=DIFFER): build_value_model(llama(altered(lambda z: 1.1*z)).to(dtype))

def test_what_is_loaded_is_checked(tmp_path, monkeypatch):
    "As if the library had changed what the family does since the model was saved."
    policy, value = MTPForCausalLM.from_backbone(llama(), 2), build_value_model(llama())
    save_checkpoint(tmp_path/'p.pt', policy); save_checkpoint(tmp_path/'v.pt', value)
    policy.save_pretrained(tmp_path/'folder')
    plain = transformers.LlamaForCausalLM.forward
    def forward(self, *args, **kw):
        out = plain(self, *args, **kw)
        out.logits = 1.01*out.logits
        return out
    monkeypatch.setattr(transformers.LlamaForCausalLM, 'forward', forward)
    for load in (lambda: load_policy(tmp_path/'p.pt'), lambda: load_value_model(tmp_path/'v.pt'),
                 lambda: build_policy(AutoModelForCausalLM.from_pretrained(tmp_path/'folder'), 2)):
        with pytest.raises(UserError, match=f'LlamaForCausalLM.*{DIFFER}'): load()


TARGETS = (['q_proj', 'lm_head'], '.*lm_head', ['embed_tokens'], ('embed_tokens', 'lm_head'), 'all-linear',
           '.*(lm_head|embed_tokens|v_proj)')

@pytest.mark.parametrize('targets', TARGETS, ids=str)
@pytest.mark.parametrize('tied', (False, True))
def test_adapters_on_the_ends(targets, tied, ids, tmp_path):
    "Head and embedding: loss, gradients, saving, drafting and export agree with the logits that peft's layers give."
    start = llama(tie_word_embeddings=tied, initializer_range=.3)
    lora = LORA | dict(target_modules=targets)
    policy = perturbed(build_policy(copy.deepcopy(start), 3, 'lora', lora), 'lora_', .3)
    with torch.no_grad(): own = policy.backbone(ids).logits
    assert (own - start(ids).logits).abs().max() > .1
    policy_is_exact(policy, ids, own)
    policy(ids, labels=ids).loss.backward()
    check_gradients(policy)
    value = perturbed(build_value_model(copy.deepcopy(start), 'lora', lora, 'surprise'), 'lora_', .3)
    with torch.no_grad():
        value_is_exact(value, ids, value.backbone(ids).logits)
        saved_is_exact(policy, value, ids, tmp_path, start)
        drafting_is_exact(policy, policy.backbone, ids)
        plain = AutoModelForCausalLM.from_pretrained(export_backbone(policy, tmp_path/'plain')).eval()
        near(plain(ids).logits, own)
        ends = 'lm_head' in str(targets) or 'embed' in str(targets)
        assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == (tied and not ends)

def test_dropout_of_an_adapter_on_the_head(ids):
    "While training, the loss draws the same numbers as peft's layer does, and is the loss of its logits."
    lora = LORA | dict(dropout=.5, target_modules=['lm_head'])
    policy = perturbed(build_policy(llama(), 3, 'lora', lora), 'lora_', .3).train()
    torch.manual_seed(5); ours = policy(ids, labels=ids).token_ce[:, :-1, 0]
    torch.manual_seed(5); want = next_token_loss(policy(ids, return_all_heads=True).logits[:, :, 0], ids)
    near(ours, want)
    torch.manual_seed(6); assert (policy(ids, labels=ids).token_ce[:, :-1, 0] - ours).abs().max() > .01

BAD_LORA = ((dict(modules_to_save=['lm_head']), 'model.lora.modules_to_save is not supported'),
            (dict(target_modules=['q_projj']), 'q_projj'), (dict(target_modules=['norm']), 'norm'),
            (dict(target_modules='(('), r'target_modules = \(\('), (dict(target_modules=[]), 'target_modules'),
            (dict(target_modules='q_proj'), 'a text is a regular expression for a layer.s full name'),
            (dict(target_modules=['q_proj', 'v_prj']), "no layer is called v_prj.*'v_proj'"),
            (dict(target_modules=[3]), 'target_modules = .*list of texts'),
            (dict(target_modules=None), 'target_modules'),
            (dict(r=0), 'lora.r = 0'), (dict(r=2.5), 'lora.r = 2.5'), (dict(alpha=float('nan')), 'lora.alpha = nan'),
            (dict(alpha=0), 'lora.alpha = 0'), (dict(dropout=2.), 'lora.dropout = 2.0'))

@pytest.mark.parametrize('lora,words', BAD_LORA, ids=str)
def test_adapters_that_cannot_be(lora, words):
    for make in (build_policy, build_value_model):
        with pytest.raises(UserError, match=words): make(llama(), tuning='lora', lora=LORA | lora)

def vision_language():
    vision = transformers.CLIPVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                           num_attention_heads=2, image_size=28, patch_size=14)
    config = transformers.LlavaConfig(text_config=transformers.LlamaConfig(**SMALL), vision_config=vision)
    return transformers.LlavaForConditionalGeneration(config)

def quantized(): return transformers.LlamaConfig(**SMALL, quantization_config=dict(quant_method='fp8'))

def with_quantized_config():
    model = llama()
    model.config.quantization_config = dict(quant_method='gptq', bits=4)
    return model

BAD_BACKBONES = ((vision_language, 'AutoModelForCausalLM makes no model from a LlavaConfig'),
                 (quantized, 'quantized .*fp8'), (with_quantized_config, 'quantized .*gptq'),
                 (lambda: build_value_model(llama()), 'ValueModel cannot be used'),
                 (lambda: llama(num_hidden_layers=0), 'no layers'),
                 *((lambda x=x: x, 'A backbone is a causal language model')
                   for x in ('some/name', {}, torch.nn.Linear(2, 2))))

@pytest.mark.parametrize('make,words', BAD_BACKBONES)
def test_backbones_that_cannot_be(make, words):
    "Refused before anything is trained: what could not be saved and loaded again would be lost."
    for build in (build_policy, MTPForCausalLM.from_backbone) + (build_value_model,)*(words != 'no layers'):
        with pytest.raises(UserError, match=words): build(make())

def test_settings_that_cannot_be(tmp_path):
    for n in (0, -1, 2., '3', None, True):
        for build in (build_policy, MTPForCausalLM.from_backbone):
            with pytest.raises(UserError, match='n_future_tokens'): build(llama(), n)
        with pytest.raises(UserError, match='n_future_tokens'): build_policy(build_policy(llama(), 2), n)
    for build in (build_policy, build_value_model):
        with pytest.raises(UserError, match="model.tuning = 'heads'"): build(llama(), tuning='heads')
        with pytest.raises(UserError, match='needs model.lora'): build(llama(), tuning='lora')
        with pytest.raises(UserError, match='lora.r is missing'): build(llama(), tuning='lora', lora=dict(alpha=1))
    with pytest.raises(UserError, match="critic.head = 'mpl'"): build_value_model(llama(), head='mpl')
    with pytest.raises(UserError, match='head_dropout = 2.0'): build_value_model(llama(), head_dropout=2.)
    save_checkpoint(tmp_path/'whole.pt', build_policy(llama(), 2))
    whole = torch.load(tmp_path/'whole.pt', weights_only=True)
    for key in ('state', 'model_type', 'model_config'):
        torch.save({k: v for k, v in whole.items() if k != key}, tmp_path/'part.pt')
        with pytest.raises(UserError, match='part.pt was not written by this package'): load_policy(tmp_path/'part.pt')

BAD_CONFIGS = (dict(quantization_config=dict(quant_method='gptq', bits=4)), dict(hidden_size='32'),
               dict(hidden_size=33), dict(num_attention_heads=0), dict(hidden_act='none'),
               dict(rope_parameters=dict(rope_type='none')), dict(model_type='none'), dict(num_hidden_layers=9))

def test_folders_that_cannot_be_loaded(tmp_path, capfd):
    "Whatever a config.json makes transformers raise, it is said of which setting and folder."
    llama().save_pretrained(tmp_path)
    right = json.loads((tmp_path/'config.json').read_text())
    assert load_backbone(tmp_path)
    for wrong in BAD_CONFIGS:
        (tmp_path/'config.json').write_text(json.dumps(right | wrong))
        with pytest.raises(UserError) as e: build_policy(load_backbone(tmp_path))
        assert str(tmp_path) in str(e.value) or 'is quantized' in str(e.value), (wrong, e.value)
    (tmp_path/'config.json').write_text(json.dumps(right))
    (tmp_path/'model.safetensors').unlink()
    (tmp_path/'pytorch_model.bin').write_text('torn')
    with pytest.raises(UserError, match='model.backbone = .*cannot be loaded'): load_backbone(tmp_path)

def letters(**special): # a tokenizer of the 26 letters, as tokens 3 to 28
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = {'<s>': 1, '</s>': 2, '?': 0} | {c: i for i, c in enumerate('abcdefghijklmnopqrstuvwxyz', 3)}
    plain = Tokenizer(models.WordLevel(words, unk_token='?'))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, **special)

BAD_TEXTS = ((dict(prompts='a b'), 'prompts'), (dict(prompts=None), 'prompts'), (dict(prompts=[3]), 'prompts'),
             (dict(max_new_tokens=0), 'max_new_tokens = 0'), (dict(max_new_tokens=2.5), 'max_new_tokens = 2.5'),
             (dict(temperature=-1.), 'temperature = -1.0'), (dict(temperature=float('nan')), 'temperature = nan'),
             (dict(top_p=0.), 'top_p = 0.0'), (dict(top_p=1.5), 'top_p = 1.5'), (dict(stop='ab'), "stop = 'ab'"),
             (dict(stop=['']), 'stop'), (dict(batch_size=-1), 'batch_size = -1'), (dict(seed=-1), 'seed = -1'),
             (dict(prompts=['a', '']), 'Prompt 2 of 2 is empty'), (dict(prompts=['a z']), 'token 28; .* only 20'))

def test_texts_that_cannot_be_written():
    "As a batch of -1 gave None for a text, and a prompt that was no list one text a letter."
    policy = build_policy(llama(vocab_size=20), 2)
    for self_speculative in (True, False):
        for settings, words in BAD_TEXTS:
            settings = dict(prompts=['a'], self_speculative=self_speculative) | settings
            with pytest.raises(UserError, match=words): generation.generate(policy, letters(), **settings)
    with pytest.raises(UserError, match='A ValueModel writes no text'):
        generation.generate(build_value_model(llama()), letters(), ['a'])

def test_a_tokenizer_without_padding():
    "Prompts of several lengths in a batch: what stands in for padding is masked."
    policy, how = build_policy(llama(initializer_range=.3), 2), dict(max_new_tokens=6, self_speculative=False)
    prompts = ['a', 'b c d', 'e f']
    alone = [generation.generate(policy, letters(), [p], **how)[0].ids for p in prompts]
    assert [g.ids for g in generation.generate(policy, letters(), prompts, **how)] == alone

def test_buffers_of_heads_are_made_anew(ids, tmp_path):
    "Moshi's blocks have rotary frequencies of their own, which no file holds."
    policy = MTPForCausalLM.from_backbone(backbone_of('Moshi', sliding_window=64), 3).eval()
    policy.save_pretrained(tmp_path)
    again = MTPForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad(): near(again(ids, return_all_heads=True).logits, policy(ids, return_all_heads=True).logits)
    buffers = dict(again.named_buffers())
    assert any('extra_heads' in n for n in buffers)
    for n, b in policy.named_buffers(): assert torch.equal(b, buffers[n]), n

@pytest.mark.parametrize('case', ('scaled_heads.py', 'lora_on_head.py'))
def test_shared_case(case):
    path = REPO.parent/'shared/cases'/case
    if not path.is_file(): pytest.skip(f'{path} is not here')
    with pytest.raises(SystemExit) as done: runpy.run_path(str(path), run_name='__main__')
    assert not done.value.code
