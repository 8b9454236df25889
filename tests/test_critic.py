"""The critic's two language models in training, and its checkpoints: this version's and the one before."""
import copy
from pathlib import Path

import pytest, torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from weighted_mtp.config import apply_overrides
from weighted_mtp.critic import CriticObjective, load_critic
from weighted_mtp.files import UserError
from weighted_mtp.loop import evaluate, make_trainer, train
from weighted_mtp.models import (MTPForCausalLM, build_value_model, load_value_model, read_checkpoint, save_checkpoint)
from weighted_mtp.ratio_model import SIDES
from weighted_mtp.runs import prepare
from weighted_mtp.synthetic import make_dataset, make_micro_model

LORA = ['model.tuning=lora', 'model.lora.r=4', 'model.lora.dropout=0']

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('critic')
    make_dataset(folder, n_problems=60, n_held_out=20, vocab_size=500)
    return folder

def objective(data, *overrides, head='ratio'):
    files = [f'dataset.{split}={data}/{split}.jsonl' for split in ('train', 'validation')]
    c = apply_overrides({}, [*files, 'dataset.max_length=256', 'data_sampling.n_validation=30', 'model.dtype=float32',
                             f'checkpoint.save_dir={data}/ckpt', 'model.tuning=full', 'training.batch_size=4',
                             'training.gradient_accumulation_steps=2', 'training.max_steps=1', f'critic.head={head}',
                             'training.learning_rate=1e-3', 'training.warmup_ratio=0', *overrides])
    prepare(c)
    tokenizer = AutoTokenizer.from_pretrained(data/'tokenizer')
    micro = make_micro_model(tokenizer=tokenizer, hidden_size=32, n_layers=2, n_heads=2)
    return c, CriticObjective(c, tokenizer, micro)

def moved(before, model): # name -> whether a trained parameter has changed
    return {n: not torch.equal(p, before[n]) for n, p in model.named_parameters() if p.requires_grad}

@pytest.mark.parametrize('checkpointing', ['true', 'false'])
@pytest.mark.parametrize('bce', [0, .5])
@pytest.mark.parametrize('tuning', ['full', 'lora'])
def test_one_step_moves_both_models(data, tuning, bce, checkpointing):
    """peft's `set_adapter` would freeze the first adapter before its gradient arrives: p+ would stay the backbone.
    B of an adapter starts at 0, so A has no gradient in the first step."""
    more = LORA if tuning == 'lora' else []
    c, o = objective(data, *more, f'critic.bce_weight={bce}', f'training.gradient_checkpointing={checkpointing}')
    before = {n: p.clone() for n, p in o.model.named_parameters()}
    train(make_trainer(o, c), progress=False)
    changed = moved(before, o.model)
    if tuning == 'full': assert all(changed.values()) and {n.split('.')[0] for n in changed} == {'backbone', 'wrong'}
    for side in SIDES if tuning == 'lora' else ():
        of_side = {n: x for n, x in changed.items() if f'lora_B.{side}.' in n}
        assert len(of_side) == 14 and all(of_side.values()), side
    assert not any('lora_' not in n for n in changed) or tuning == 'full' # the backbone is frozen

def gradient(data, size, *overrides): # of one step over 8 pairs, in micro-batches of `size`
    _, o = objective(data, *overrides)
    with torch.no_grad(): # as after some steps
        for p in o.model.parameters(): p.add_(.02*torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    batches = [o.collate([o.data[j] for j in range(i, i+size)]) for i in range(0, 8, size)]
    totals = sum(o.counts(b) for b in batches)
    o.model.train()
    loss = sum(o.loss(o.model, b, totals)[0] for b in batches)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in o.model.named_parameters() if p.grad is not None}

@pytest.mark.parametrize('more', [LORA, [*LORA, 'critic.bce_weight=0.5'], ['critic.bce_weight=0.5']])
def test_accumulation_changes_nothing(data, more):
    (l1, g1), (l2, g2) = gradient(data, 8, *more), gradient(data, 2, *more)
    torch.testing.assert_close(l1, l2)
    torch.testing.assert_close(g1, g2, rtol=1e-4, atol=1e-6)

def test_a_frozen_backbone_is_refused(data):
    with pytest.raises(UserError, match='frozen leaves nothing to train with critic.head = ratio'):
        objective(data, 'model.tuning=frozen')

def test_policys_backbone_is_its_trunk_and_first_head(data):
    c, o = objective(data)
    tokenizer = o.tokenizer
    policy = MTPForCausalLM.from_backbone(make_micro_model(tokenizer=tokenizer, hidden_size=32, n_layers=2, n_heads=2))
    assert type(CriticObjective(c, tokenizer, policy).model.backbone) is LlamaForCausalLM

def ask(o): # a batch, as `credit` takes it
    b = o.collate([o.data[i] for i in range(4)])
    return b['input_ids'], b['attention_mask'], b['labels'] != -100

@pytest.mark.parametrize('head', ['ratio', 'sigmoid', 'mlp'])
def test_checkpoint_gives_the_same_credit(data, head):
    c, o = objective(data, 'training.max_steps=3', head=head)
    trainer = make_trainer(o, c)
    o.start(trainer)
    train(trainer, progress=False)
    metrics = evaluate(trainer)
    path = Path(c.checkpoint.save_dir)/'critic.pt'
    save_checkpoint(path, o.model, **o.checkpoint_facts(), metrics=metrics)
    critic, facts = load_critic(path, o.tokenizer), read_checkpoint(path)
    r, V = critic.credit(*ask(o))
    torch.testing.assert_close((r, V), o.model.eval().credit(*ask(o)), rtol=0, atol=0)
    assert facts['head'] == head and {'roc_auc', 'accuracy', 'ece', 'brier'} <= facts['metrics'].keys()
    assert critic.scale.dtype == torch.float32 and critic.scale > 0 and not critic.training
    assert head != 'ratio' or critic.scale != 1 # fitted, and in the file
    assert r.dtype == V.dtype == torch.float32 and not r[~ask(o)[2]].any() and not V[~ask(o)[2]].any()
    assert head == 'mlp' or 0 <= V.min() and V.max() <= 1

def test_start_draws_no_random_number(data):
    """The likelihood before tuning is read before training, which must not change what is trained."""
    states = []
    for starts in (True, False):
        c, o = objective(data, head='mlp')
        trainer = make_trainer(o, c)
        if starts: o.start(trainer)
        states.append(torch.get_rng_state())
    assert torch.equal(*states) and (o.base == {})

@pytest.mark.parametrize('head', ['linear', 'sigmoid', 'mlp', 'surprise'])
def test_checkpoints_of_the_version_before_load(tmp_path, head):
    """They hold neither scale and bias nor an initial value. (Files that version wrote were loaded once, by hand.)"""
    backbone = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                            intermediate_size=64))
    model = build_value_model(copy.deepcopy(backbone), head=head).eval()
    save_checkpoint(tmp_path/'now.pt', model, vocabulary='v')
    old = torch.load(tmp_path/'now.pt', weights_only=True)
    for name in ('scale', 'bias'): del old['state'][name]
    del old['model_config']['initial_value']
    torch.save(old, tmp_path/'old.pt')
    ids = torch.randint(50, (2, 9))
    for load in (load_value_model, load_critic):
        V = load(tmp_path/'old.pt').credit(ids, torch.ones_like(ids), torch.ones_like(ids))[1]
        torch.testing.assert_close(V, model(ids).values, rtol=0, atol=0)
