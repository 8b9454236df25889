"""Heads that learn first: made once, used by later runs, the same text with drafts and without, on two ranks."""
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path

import pytest, torch

import warm

REPO = Path(__file__).resolve().parent.parent
TRAINED = dict(hidden_size=48, n_layers=2, n_heads=2, max_length=192)
SMALL = ['model.backbone=base', 'dataset.embedded=false', 'dataset.train=data/train.jsonl', 'dataset.test=null',
         'dataset.validation=data/validation.jsonl', 'dataset.max_length=128', 'data_sampling.n_validation=10',
         'training.batch_size=8', 'training.max_steps=2', 'training.log_every=1', 'training.heads_first=120',
         'training.cpu_threads=1']
LORA = ['model.tuning=lora', 'model.lora.r=4', 'model.lora.dropout=0']
BASE = f'''
from transformers import AutoTokenizer
from weighted_mtp.synthetic import make_dataset, make_micro_model
make_dataset('data', n_problems=60, n_held_out=20)
tokenizer = AutoTokenizer.from_pretrained('data/tokenizer')
make_micro_model('from_seed', tokenizer, **{TRAINED})
tokenizer.save_pretrained('from_seed')
'''

def run(root, *words, n=1, timeout=600):
    env = {**os.environ, 'PYTHONPATH': str(REPO), 'OMP_NUM_THREADS': '1'}
    if n == 1: return warm.run([sys.executable, *words], root, env, timeout)
    torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n}']
    return subprocess.run([sys.executable, *torchrun, *words], cwd=root, env=env, capture_output=True, text=True,
                          timeout=timeout)

def train(root, pipeline, *overrides, n=1, code=0):
    words = [w for o in (*SMALL, *overrides) for w in ('--override', o)]
    config = f'configs/{pipeline}/{pipeline}_micro.yaml'
    done = run(root, '-m', f'weighted_mtp.pipelines.run_{pipeline}', '--config', config, *words, n=n)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
    return done

@pytest.fixture(scope='module')
def root(tmp_path_factory):
    "A project with a next-token model that has learnt a little: one head, so that there is something to draft."
    root = tmp_path_factory.mktemp('heads')
    shutil.copytree(REPO/'configs', root/'configs')
    shutil.copy(REPO/'settings.ini', root)
    done = run(root, '-c', BASE)
    assert done.returncode == 0, done.stderr
    train(root, 'ntp', 'model.backbone=from_seed', 'model.n_future_tokens=1', 'model.tuning=full',
          'training.heads_first=0', 'training.max_steps=60', 'training.learning_rate=5e-3', 'experiment.name=base')
    from transformers import AutoTokenizer
    from weighted_mtp.models import export_backbone, load_policy
    export_backbone(load_policy(root/'storage/checkpoints/ntp/base/checkpoint_best.pt'), root/'base',
                    AutoTokenizer.from_pretrained(root/'data/tokenizer'))
    return root

def heads_of(root): return sorted((root/'storage/checkpoints/heads').glob('base-*'))

def test_heads_are_made_once_and_drafts_change_nothing(root):
    train(root, 'baseline', *LORA)
    folder, = heads_of(root)
    facts = json.loads((folder/'heads.json').read_text())
    steps = [p['step'] for p in facts['curve']]
    assert steps == [0, *range(12, 121, 12)] and facts['answers'] == 120//4*8 and facts['backbone'] == 'base'
    first, last = facts['curve'][0], facts['curve'][-1]
    assert last['tokens_per_pass'] > first['tokens_per_pass'] + .2, (first, last)
    assert all(last[f'head_{k}'] > first[f'head_{k}'] for k in (2, 3, 4))
    assert facts['decoded']['same'] == facts['decoded']['prompts'] and facts['decoded']['tokens_per_pass'] > 1.2
    made = (folder/'model.safetensors').stat().st_mtime_ns
    done = train(root, 'verifiable', *LORA, 'training.weighting=dft', 'experiment.name=second')
    assert 'trained before' in done.stdout and heads_of(root) == [folder]
    assert (folder/'model.safetensors').stat().st_mtime_ns == made

def test_a_policy_on_them(root):
    "Its checkpoint names the folder with the heads; head 1 is the backbone's, and the heads are not copies any more."
    from weighted_mtp.models import load_backbone, read_checkpoint
    train(root, 'baseline', *LORA, 'experiment.name=on-heads')
    checkpoint = 'storage/checkpoints/baseline/on-heads/checkpoint_best.pt'
    folder, = heads_of(root)
    assert (root/read_checkpoint(root/checkpoint)['backbone']) == folder
    policy = run(root, '-c', f"""
from weighted_mtp.models import load_policy
p = load_policy('{checkpoint}')
assert p.config.n_future_tokens == 4
""")
    assert policy.returncode == 0, policy.stderr
    base, heads = load_backbone(root/'base'), load_backbone(folder)
    for name, x in base.state_dict().items(): torch.testing.assert_close(heads.backbone.state_dict()[name], x)
    last = base.get_decoder().layers[-1].mlp.up_proj.weight
    assert all((h.mlp.up_proj.weight - last).abs().max() > 1e-3 for h in heads.extra_heads)
    done = run(root, '-c', 'import sys; from weighted_mtp.evaluation import wmtp_evaluate; sys.exit(wmtp_evaluate())',
               checkpoint, '--benchmark', 'data/test.problems.jsonl', '--limit', '3', '--max-new-tokens', '40')
    assert done.returncode == 0 and 'tokens a pass' in done.stdout, done.stdout + done.stderr

def test_other_settings_have_heads_of_their_own(root):
    before = heads_of(root)
    train(root, 'baseline', *LORA, 'training.heads_first=4', 'experiment.name=other')
    assert len(heads_of(root)) == len(before) + 1

def test_two_ranks(root):
    before = set(heads_of(root))
    train(root, 'baseline', *LORA, 'training.heads_first=12', 'training.batch_size=4', 'experiment.name=two', n=2)
    folder, = set(heads_of(root)) - before
    facts = json.loads((folder/'heads.json').read_text())
    assert facts['answers'] == 12//4*4*2 and facts['decoded']['same'] == facts['decoded']['prompts'], facts

def test_a_run_that_was_killed_leaves_no_half_of_them(root):
    before, name = set(heads_of(root)), 'killed'
    overrides = *SMALL, *LORA, 'training.heads_first=400', f'experiment.name={name}'
    words = [w for o in overrides for w in ('--override', o)]
    command = [sys.executable, '-m', 'weighted_mtp.pipelines.run_baseline', '--config',
               'configs/baseline/baseline_micro.yaml', *words]
    env = {**os.environ, 'PYTHONPATH': str(REPO), 'OMP_NUM_THREADS': '1'}
    with open(root/'killed.log', 'w') as log:
        process = subprocess.Popen(command, cwd=root, env=env, stdout=log, stderr=log, start_new_session=True)
    for _ in range(1200):
        time.sleep(.1)
        if 'acceptance by head: {"step": 40' in (root/'killed.log').read_text(): break
        assert process.poll() is None, (root/'killed.log').read_text()[-2000:]
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert set(heads_of(root)) == before

@pytest.mark.parametrize('pipeline, overrides, says', [
    ('baseline', ['model.backbone=micro', 'model.tokenizer=data/tokenizer'], 'has weights from a seed'),
    ('ntp', ['model.n_future_tokens=1'], 'no heads to train'),
    ('baseline', ['dataset.train=nowhere.jsonl'], 'nowhere.jsonl')])
def test_errors(root, pipeline, overrides, says):
    done = train(root, pipeline, *LORA, *overrides, code=2)
    assert says in done.stderr and 'Traceback' not in done.stderr, done.stderr

def test_a_backbone_with_heads_keeps_them(root):
    done = train(root, 'baseline', 'model.backbone=micro-base', 'experiment.name=own', 'model.tuning=full')
    assert 'has heads of its own' in done.stdout

EXPORTED = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from weighted_mtp.models import load_policy
ids = torch.tensor([[1, 5, 9, 20, 7]])
policy = load_policy(sys.argv[1])
adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('base'), 'out/peft')
merged = AutoModelForCausalLM.from_pretrained('out/transformers')
with torch.no_grad(): expected, *found = (m(ids).logits for m in (policy, adapted, merged))
for x in found: torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)
"""

def test_an_export_goes_on_the_plain_backbone(root):
    "Adapters of a policy whose heads learnt first are for the backbone, which peft can load; head 1 is the same."
    train(root, 'baseline', *LORA, 'experiment.name=exported', 'training.learning_rate=1e-2')
    checkpoint = 'storage/checkpoints/baseline/exported/checkpoint_best.pt'
    program = 'import sys; from weighted_mtp.export import wmtp_export; sys.exit(wmtp_export())'
    for kind in ('peft', 'transformers'):
        done = run(root, '-c', program, checkpoint, f'out/{kind}', '--as', kind)
        assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((root/'out/peft/adapter_config.json').read_text())['base_model_name_or_path'] == 'base'
    done = run(root, '-c', EXPORTED, checkpoint)
    assert done.returncode == 0, done.stderr[-2000:]
