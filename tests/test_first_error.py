"""The first-error critic for real: from pairs to a checkpoint whose credit is the same, on one process or two."""
import os, shutil, subprocess, sys
from pathlib import Path

import pytest, torch

REPO = Path(__file__).resolve().parent.parent
SMALL = ['dataset.n_problems=100', 'dataset.test=null', 'data_sampling.n_validation=40', 'critic.head=first_error',
         'critic.lm_weight=0', 'critic.lm_first=0', 'critic.blind_yardstick=false', 'model.backbone=backbone',
         'model.tokenizer=data/tokenizer', 'dataset.embedded=false', 'dataset.train=data/train.jsonl',
         'dataset.validation=data/validation.jsonl', 'training.cpu_threads=1', 'training.log_every=1',
         'training.batch_size=8', 'training.max_steps=2']
STILL = ['training.learning_rate=1e-9', 'training.head_learning_rate=1e-9', 'training.max_grad_norm=1e9']
LORA = ['model.tuning=lora', 'model.lora.r=4']

@pytest.fixture(scope='module')
def root(tmp_path_factory):
    from transformers import AutoTokenizer
    from weighted_mtp.synthetic import make_dataset, make_micro_model
    root = tmp_path_factory.mktemp('first-error')
    shutil.copytree(REPO/'configs', root/'configs')
    make_dataset(root/'data', n_problems=100, n_held_out=50)
    tokenizer = AutoTokenizer.from_pretrained(root/'data/tokenizer')
    make_micro_model(root/'backbone', tokenizer, hidden_size=32, n_layers=2, n_heads=2, max_length=256, seed=1)
    return root

@pytest.fixture
def objective_of(root, monkeypatch): # function of overrides
    from weighted_mtp.config import load_config
    from weighted_mtp.critic import CriticObjective
    from weighted_mtp.runs import load_parts, prepare
    monkeypatch.chdir(root)
    def make(*overrides):
        config = load_config('configs/critic/critic_micro.yaml', [*SMALL, *overrides])
        prepare(config)
        return CriticObjective(config, *load_parts(config))
    return make

def some_batch(objective, n=8):
    return objective.collate([objective.data[i] for i in range(n)])

def test_batches_know_the_first_wrong_token(objective_of):
    """Mutants by their mutation; siblings by their nearest correct program, or not at all."""
    from weighted_mtp.data import FIRST_WRONG_FROM, KINDS
    b = some_batch(objective_of(), 100)
    bad = b['labels'][100:]
    told_by = {(KINDS[k], FIRST_WRONG_FROM[f]) for k, f in zip(b['kind'].tolist(), b['first_wrong_from'].tolist())}
    assert told_by >= {('mutant', 'mutation'), ('sibling', 'difference')} and ('mutant', '') not in told_by
    for row, at, start in zip(bad, b['first_wrong'].tolist(), b['mutation_start'].tolist()):
        assert at == -1 or row[at] != -100 # a token of the response
        assert start == -1 or start - 2 <= at <= start

def test_a_step_moves_adapters_and_both_heads(objective_of):
    from weighted_mtp.loop import make_trainer, train
    objective = objective_of(*LORA, 'training.max_steps=2') # B of LoRA is 0 at first, so that A moves in the second
    before = {n: p.detach().clone() for n, p in objective.model.named_parameters() if p.requires_grad}
    assert {n.split('.')[1] for n in before if n.startswith('head.')} == {'hazard', 'risk'}
    train(make_trainer(objective, objective.config), progress=False)
    same = [n for n, p in objective.model.named_parameters() if p.requires_grad and (p == before[n]).all()]
    assert not same and any('lora_A' in n for n in before), same

@pytest.mark.parametrize('tuning', [['model.tuning=full'], LORA, ['model.tuning=frozen']],
                         ids=['full', 'lora', 'frozen'])
def test_risk_does_not_see_the_token(objective_of, tuning):
    """Changing x_t leaves the risk of t as it was, and all that comes before; hazard sees it."""
    objective = objective_of(*tuning)
    b, model = some_batch(objective), objective.model.eval()
    mask, t = b['labels'] != -100, int((b['labels'][0] != -100).nonzero()[2])
    changed = b['input_ids'].clone()
    changed[0, t] = (changed[0, t] + 1) % 100
    with torch.no_grad(): a, c = (model(ids, b['attention_mask'], mask) for ids in (b['input_ids'], changed))
    torch.testing.assert_close(a.risk[0, :t+1], c.risk[0, :t+1])
    torch.testing.assert_close(a.hazard[0, :t], c.hazard[0, :t])
    assert a.hazard[0, t] != c.hazard[0, t] and a.risk[0, t+1] != c.risk[0, t+1]

@pytest.mark.parametrize('tuning', [['model.tuning=full'], LORA], ids=['full', 'lora'])
def test_checkpoint_gives_the_same_credit(objective_of, root, tuning):
    from weighted_mtp.critic import load_critic, run_critic
    name = tuning[0].split('=')[1]
    objective = objective_of(*tuning, f'experiment.name={name}', f'checkpoint.save_dir={root}/{name}')
    metrics = run_critic(objective.config)
    assert {'validation/roc_auc', 'validation/ece', 'validation/drop_on_mutation'} <= set(metrics), sorted(metrics)
    best = root/name/'checkpoint_best.pt'
    saved = torch.load(best, weights_only=True)
    assert saved['head'] == 'first_error' and 0 <= saved['metrics']['roc_auc'] <= 1
    critic = load_critic(best)
    assert not any(p.requires_grad for p in critic.parameters())
    assert 0 < critic.mean_risk < 1 and critic.mean_risk == saved['state']['mean_risk']
    b = some_batch(objective)
    mask = b['labels'] != -100
    r, v = critic.credit(b['input_ids'], b['attention_mask'], mask)
    objective.model.load_state_dict(saved['state'], strict=False)
    for x, y in zip(objective.model.eval().credit(b['input_ids'], b['attention_mask'], mask), (r, v)):
        torch.testing.assert_close(x, y)
    assert r.dtype == v.dtype == torch.float32 and ((v > 0) == mask).all() and (v < 1).all()

def gradient(objective, batches):
    totals = sum(objective.counts(b) for b in batches)
    objective.model.zero_grad()
    losses = [objective.loss(objective.model.train(), b, totals)[0] for b in batches]
    for x in losses: x.backward()
    named = sorted(objective.model.named_parameters())
    return sum(x.item() for x in losses), torch.cat([p.grad.flatten() for _, p in named if p.grad is not None])

def test_accumulation_gives_the_same_gradient(objective_of):
    objective = objective_of('model.tuning=full')
    items = [objective.data[i] for i in range(12)]
    loss, want = gradient(objective, [objective.collate(items)])
    for cut in ((4, 8), (1, 2, 9), (12,)):
        pieces = [items[sum(cut[:i]):sum(cut[:i+1])] for i in range(len(cut))] + [[None, None]] # a filler does nothing
        other, got = gradient(objective, [objective.collate(p) for p in pieces])
        assert other == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5*want.abs().max().item())

RANKS = '''
import sys, torch
from weighted_mtp.config import load_config
from weighted_mtp.critic import CriticObjective
from weighted_mtp.loop import evaluate, make_trainer, train
from weighted_mtp.runs import is_main, load_parts, prepare
from weighted_mtp.sharding import full_tensor
c = load_config('configs/critic/critic_micro.yaml', sys.argv[2:])
prepare(c)
trainer = make_trainer(CriticObjective(c, *load_parts(c)), c)
grads = []
def keep(*args):
    named = sorted(trainer.model.named_parameters())
    grads.append(torch.cat([full_tensor(p.grad).flatten() for _, p in named if p.grad is not None]))
trainer.optimizer.register_step_pre_hook(keep)
train(trainer)
metrics = evaluate(trainer)
if is_main(): torch.save(dict(grads=torch.stack(grads), metrics=metrics), sys.argv[1])
'''

def test_two_ranks_give_the_same_gradient(root):
    (root/'ranks.py').write_text(RANKS)
    env = {**os.environ, 'PYTHONPATH': str(REPO), 'OMP_NUM_THREADS': '1'}
    found = []
    for n, batch in ((1, 8), (2, 4)):
        launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n}'] if n > 1 else []
        words = [*SMALL, *STILL, f'training.batch_size={batch}', 'model.tuning=full']
        done = subprocess.run([sys.executable, *launcher, 'ranks.py', f'{n}.pt', *words], cwd=root, env=env,
                              capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(torch.load(root/f'{n}.pt', weights_only=True))
    one, two = found
    torch.testing.assert_close(two['grads'], one['grads'], rtol=0, atol=1e-5*one['grads'].abs().max().item())
    for k, v in one['metrics'].items(): assert two['metrics'][k] == pytest.approx(v, rel=1e-4, abs=1e-5, nan_ok=True), k

def test_data_without_a_known_place_is_refused(objective_of, root):
    """Wrong programs far from every correct one: there is nothing to learn from, and it is said."""
    import json
    from weighted_mtp.files import UserError
    row = dict(instruction='Add one.', input='', problem_id='p', difficulty=3, source='demo')
    right = dict(row, output='def f(n):\n    return n + 1', is_correct=True)
    far = 'def f(values):\n    total = 0\n    while values:\n        total = total * 7 + values.pop()\n    return total'
    (root/'far.jsonl').write_text('\n'.join(map(json.dumps, [right, dict(row, output=far, is_correct=False)])))
    with pytest.raises(UserError, match='first wrong token'):
        objective_of('dataset.train=far.jsonl', 'data_sampling.length_balanced=false')
