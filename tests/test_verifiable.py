"""Every weighting of `verifiable`, trained: the same however a step is divided, and wrong uses said where they are
read."""
import json, os, shutil, subprocess, sys
from pathlib import Path

import pytest, torch

import warm
from weighted_mtp.schema import BY_CRITIC, WEIGHTINGS

REPO, BIN = Path(__file__).resolve().parent.parent, Path(sys.executable).parent
SMALL = ['data_sampling.n_validation=20', 'model.backbone=micro', 'model.hidden_size=32', 'dataset.embedded=false',
         'dataset.train=marked.jsonl', 'model.tokenizer=storage/datasets/synthetic/tokenizer',
         'model.n_layers=2', 'model.n_heads=2', 'training.log_every=1', 'training.cpu_threads=1',
         'training.max_steps=3']

MODELS = '''
import json, torch
from pathlib import Path
from transformers import AutoTokenizer
from weighted_mtp.data import vocabulary_id
from weighted_mtp.models import build_ratio_model, build_value_model, save_checkpoint
from weighted_mtp.synthetic import make_dataset, make_micro_model
made = Path('storage/datasets/synthetic')
make_dataset(made, n_problems=60, n_held_out=30, vocab_size=500)
tok = AutoTokenizer.from_pretrained(made/'tokenizer')
sizes = dict(hidden_size=32, n_layers=2, n_heads=2, max_length=256)
def micro(seed): return make_micro_model(tokenizer=tok, seed=seed, **sizes)
torch.manual_seed(0)
ratio = build_ratio_model(micro(1))
with torch.no_grad(): # p+ and p- that differ
    for name, p in ratio.named_parameters(): p.add_(torch.randn(p.shape)*.05)
good = dict(vocabulary=vocabulary_id(tok), metrics=dict(roc_auc=.93, ece=.04))
save_checkpoint('critic.pt', ratio, **good)
poor = good | dict(metrics=dict(roc_auc=.55, ece=.2), config='dataset: {blind: true}')
save_checkpoint('poor.pt', build_value_model(micro(2), head='linear'), **poor)
rows = [json.loads(line) for line in (made/'train.jsonl').read_text().splitlines()]
Path('plain.jsonl').write_text('\\n'.join(json.dumps(r | dict(critical=None)) for r in rows)) # as other data is
Path('marked.jsonl').write_text('\\n'.join(json.dumps(r | dict(critical=[[4, 9]])) for r in rows))
'''

def environment(**more):
    path = f"{BIN}:{os.environ['PATH']}"
    return {**os.environ, 'PYTHONPATH': str(REPO), 'PATH': path, 'OMP_NUM_THREADS': '1', **more}

@pytest.fixture(scope='module')
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp('verifiable')
    shutil.copytree(REPO/'configs', root/'configs')
    shutil.copy(REPO/'settings.ini', root/'settings.ini')
    done = warm.run([sys.executable, '-c', MODELS], root, environment())
    assert done.returncode == 0, done.stderr
    return root

def train(root, name, *overrides): # the pipeline, with its record in a folder
    record = root/'runs'/name
    record.mkdir(parents=True)
    words = [w for o in (*SMALL, f'experiment.name={name}', *overrides) for w in ('--override', o)]
    command = ['-m', 'weighted_mtp.pipelines.run_verifiable', '--config', 'configs/verifiable/verifiable_micro.yaml']
    return warm.run([sys.executable, *command, *words], root, environment(WMTP_RUN_DIR=str(record))), record

# Two steps of every weighting, with a learning rate so small that the weights stay what they are
STEPS = '''
import sys, torch
from weighted_mtp.config import load_config
from weighted_mtp.loop import evaluate, make_trainer, train
from weighted_mtp.runs import is_main, load_parts, prepare
from weighted_mtp.verifiable import VerifiableObjective
(out, cuts, weightings), found = sys.argv[1:4], {}
for how in weightings.split(','):
    for cut in cuts.split(','):
        batch, accum = cut.split('x')
        c = load_config('configs/verifiable/verifiable_micro.yaml', [
            *sys.argv[4:], f'training.weighting={how}', f'training.batch_size={batch}',
            f'training.gradient_accumulation_steps={accum}'])
        prepare(c)
        objective = VerifiableObjective(c, *load_parts(c))
        trainer, grads = make_trainer(objective, c), []
        def keep(*args):
            in_order = sorted(trainer.model.named_parameters())
            grads.append(torch.cat([p.grad.flatten() for _, p in in_order]))
        trainer.optimizer.register_step_pre_hook(keep)
        train(trainer)
        logs = [{k: v for k, v in l.items() if k.startswith('train/')} for l in trainer.logs if 'train/loss' in l]
        found[how, cut] = dict(grads=torch.stack(grads), logs=logs, evaluated=evaluate(trainer))
if is_main(): torch.save(found, out)
'''
STILL = ['training.max_steps=2', 'training.learning_rate=1e-9', 'training.max_grad_norm=1e9',
         'experiment.critic_checkpoint=critic.pt', 'distributed.fsdp.sharding_strategy=NO_SHARD']

BY_KIND = ('credit', 'gae', 'focal') # on two ranks: one of each way in which a step comes to its mean

@pytest.fixture(scope='module')
def steps(root): # (weighting, cut) -> gradients, logs, validation; '1x4' is of two ranks
    (root/'steps.py').write_text(STEPS)
    words = ['steps.py', 'one.pt', '8x1,2x4', ','.join(WEIGHTINGS), *SMALL, *STILL]
    one = warm.run([sys.executable, *words], root, environment())
    assert one.returncode == 0, one.stderr[-3000:]
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    two = subprocess.run([*torchrun, 'steps.py', 'two.pt', '1x4', ','.join(BY_KIND), *SMALL, *STILL], cwd=root,
                         env=environment(), capture_output=True, text=True, timeout=300)
    assert two.returncode == 0, two.stderr[-3000:]
    return {k: v for f in ('one.pt', 'two.pt') for k, v in torch.load(root/f, weights_only=True).items()}

@pytest.mark.parametrize('how, cut', [(how, '2x4') for how in WEIGHTINGS] + [(how, '1x4') for how in BY_KIND])
def test_every_cut_gives_the_same_loss_and_gradient(steps, how, cut):
    want, got = steps[how, '8x1'], steps[how, cut]
    for g, w in zip(got['grads'], want['grads'], strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=1e-5*w.abs().max().item())
    for g, w in zip(got['logs'], want['logs'], strict=True):
        assert g.keys() == w.keys()
        for k in g: assert g[k] == pytest.approx(w[k], rel=1e-5, abs=1e-6), k
    for k, w in want['evaluated'].items(): assert got['evaluated'][k] == pytest.approx(w, rel=1e-5, abs=1e-6), k

def test_weightings_differ_in_their_weights_alone(steps):
    logs = {how: steps[how, '8x1']['logs'][-1] for how in WEIGHTINGS}
    for log in logs.values(): # one model, one batch
        assert log['train/uniform_loss'] == pytest.approx(logs['uniform']['train/uniform_loss'], rel=1e-5)
    assert len({log['train/loss'] for log in logs.values()}) == len(WEIGHTINGS)
    assert logs['uniform']['train/loss'] == pytest.approx(logs['uniform']['train/uniform_loss'], rel=1e-5)
    assert logs['uniform']['train/weight_entropy'] == pytest.approx(1)
    for k in ('mean', 'std', 'entropy', 'clipped_low', 'clipped_high'): # the same numbers on other tokens
        assert logs['shuffled'][f'train/weight_{k}'] == pytest.approx(logs['credit'][f'train/weight_{k}'], rel=1e-6)
    assert 0 < logs['credit']['train/credit_not_positive'] < 1

def test_poor_critic_is_said_in_log_and_record(root):
    done, record = train(root, 'poor', 'experiment.critic_checkpoint=poor.pt', 'training.weighting=gae')
    assert done.returncode == 0, done.stderr[-3000:]
    said, = json.loads((record/'result.json').read_text())['warnings']
    for words in ('AUC 0.55', 'full range', 'ECE 0.20', 'dataset.blind', 'no probabilities'): assert words in said, said
    assert done.stdout.count('warning: the critic poor.pt') == 1
    good, record = train(root, 'good', 'experiment.critic_checkpoint=critic.pt')
    assert json.loads((record/'result.json').read_text())['warnings'] == [], good.stderr[-3000:]
    assert all((record/f).is_file() for f in ('tokens.json', 'verifiable_tokens.html'))

def test_what_needs_no_critic_runs_without(root):
    for how in sorted(set(WEIGHTINGS) - {*BY_CRITIC}):
        done, record = train(root, how, 'experiment.critic_checkpoint=null', f'training.weighting={how}')
        assert done.returncode == 0, done.stderr[-3000:]
        assert (record/'verifiable_tokens.html').is_file() and json.loads((record/'tokens.json').read_text())['most']
        assert json.loads((record/'result.json').read_text())['warnings'] == []

def test_errors_say_what_is_missing(root):
    done, _ = train(root, 'none', 'experiment.critic_checkpoint=null')
    assert done.returncode == 2 and 'needs a critic' in done.stderr, done.stderr[-2000:]
    done, _ = train(root, 'unmarked', 'training.weighting=oracle', 'dataset.train=plain.jsonl')
    assert done.returncode == 2 and "no solution has a field 'critical'" in done.stderr, done.stderr[-2000:]

def test_launch_side_knows_which_weightings_need_a_critic():
    from weighted_mtp.launch import make_plan
    def blockers(*overrides):
        plan = make_plan('verifiable', 1, target='local', overrides=['experiment.critic_checkpoint=null', *overrides])
        return '\n'.join(plan.blockers)
    assert 'critic checkpoint' in blockers() and 'critic' not in blockers('training.weighting=focal')

def test_an_old_run_does_not_go_on_with_other_weights(root, monkeypatch, capsys):
    from weighted_mtp.checkpoints import config_fingerprint
    from weighted_mtp.config import load_config
    from weighted_mtp.runs import begin_run
    monkeypatch.chdir(root)
    c = load_config('configs/verifiable/verifiable_micro.yaml', ['checkpoint.save_dir=old'])
    new = {'training.weighting', 'training.credit_floor', 'training.credit_gain', 'training.focal_gamma'}
    old = {k: v for k, v in config_fingerprint(c, 1).items() if k not in new} | {'training.normalize_weights': False}
    Path('old').mkdir()
    Path('old/run.json').write_text(json.dumps(dict(run='x', config=old, finished=False)))
    assert begin_run(c)['checkpoint'] is None
    said = capsys.readouterr().out
    assert 'begins anew' in said and 'training.weighting' in said, said
