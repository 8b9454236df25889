"""One process or two, sharded or not, in one batch or in micro-batches: the same training.
And what happens when one of two fails."""
import json, os, shutil, sqlite3, subprocess, sys, time
from pathlib import Path

import pytest, torch

import warm
from test_launch import in_one_kernel
from weighted_mtp.outcomes import last_words
from weighted_mtp.state_folder import read_facts

ALL = 'WMTP_ALL' in os.environ
REPO, BIN = Path(__file__).resolve().parent.parent, Path(sys.executable).parent
PIPELINES = ('baseline', 'ntp', 'ref_tuning', 'verifiable', 'rho1', 'critic')
CRITICS = ('critic', 'critic-bce', 'critic-lora', 'critic-mlp', 'critic-surprise', 'critic-first_error') # or ratio
# Trained in micro-batches of several sizes, on one and on two ranks
CUT = (*PIPELINES, *(f'verifiable-{x}' for x in ('gae', 'focal', 'dft', 'lora')), *CRITICS[1:])
SMALL = ['dataset.n_problems=100', 'data_sampling.n_validation=40', 'model.backbone=micro', 'model.hidden_size=32',
         'model.n_layers=2', 'model.n_heads=2', 'training.log_every=1', 'training.cpu_threads=1']
CRITIC, REFERENCE = 'experiment.critic_checkpoint=critic.pt', 'experiment.reference_checkpoint=reference.pt'

# A program of ours, under torchrun where it is more than one process; forked: not one that starts itself again
def shell(root, *words, n=1, timeout=300, forked=True):
    env = {**os.environ, 'PYTHONPATH': str(REPO), 'PATH': f"{BIN}:{os.environ['PATH']}", 'OMP_NUM_THREADS': '1'}
    if n == 1 and forked: return warm.run([sys.executable, *words], root, env, timeout)
    torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n}'] if n > 1 else []
    command = [sys.executable, *torchrun, *words]
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=timeout)

def train(root, pipeline, *overrides, n=1):
    words = [w for o in (*SMALL, *overrides) for w in ('--override', o)]
    config = f'configs/{pipeline}/{pipeline}_micro.yaml'
    return shell(root, '-m', f'weighted_mtp.pipelines.run_{pipeline}', '--config', config, *words, n=n)

MODELS = '''
import torch
from transformers import AutoTokenizer
from weighted_mtp.data import vocabulary_id
from weighted_mtp.models import build_policy, build_value_model, save_checkpoint
from weighted_mtp.synthetic import make_dataset, make_micro_model
make_dataset('storage/datasets/synthetic', n_problems=100, n_held_out=50)
tok = AutoTokenizer.from_pretrained('storage/datasets/synthetic/tokenizer')
sizes = dict(tokenizer=tok, hidden_size=32, n_layers=2, n_heads=2, max_length=256)
def micro(seed): return make_micro_model(seed=seed, **sizes)
torch.manual_seed(0)
save_checkpoint('critic.pt', build_value_model(micro(1), head='surprise'), vocabulary=vocabulary_id(tok))
save_checkpoint('reference.pt', build_policy(micro(2), 1), vocabulary=vocabulary_id(tok))
micro(3).save_pretrained('backbone')
tok.save_pretrained('backbone')
'''

@pytest.fixture(scope='module')
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp('distributed')
    shutil.copytree(REPO/'configs', root/'configs')
    for d in ('nbs', 'runs'): (root/d).mkdir()
    for part in ('settings.ini', 'nbs/launch.ipynb'): shutil.copy(REPO/part, root/part)
    done = shell(root, '-c', MODELS)
    assert done.returncode == 0, done.stderr
    return root

# Three steps of every objective, with a learning rate so small that the weights stay what they are. Gradients are read
# just before the optimizer step, and not clipped.
STEPS = '''
import sys, torch
from weighted_mtp.config import load_config
from weighted_mtp.critic import CriticObjective
from weighted_mtp.loop import evaluate, make_trainer, train
from weighted_mtp.policies import OBJECTIVES
from weighted_mtp.runs import is_main, load_parts, prepare
from weighted_mtp.sharding import full_tensor
out, overrides = sys.argv[1], sys.argv[2:]
found = {}
LORA = ['model.tuning=lora', 'model.lora.dropout=0', 'model.backbone=backbone', 'training.gradient_checkpointing=true']
VARIANTS = {'verifiable-gae': ['training.weighting=gae'],
            'verifiable-lora': LORA,
            'verifiable-focal': ['training.weighting=focal'],
            'verifiable-dft': ['training.weighting=dft'],
            'critic-bce': ['critic.bce_weight=0.5'],
            'critic-lora': LORA,
            'critic-surprise': ['critic.head=surprise'],
            'critic-first_error': ['critic.head=first_error'],
            'critic-mlp': ['critic.head=mlp', 'critic.value_weight=0.5', 'critic.lm_weight=1',
                           'training.gradient_checkpointing=true', 'training.selective_checkpointing=true']}
for name in %r:
    pipeline = name.split('-')[0]
    c = load_config(f'configs/{pipeline}/{pipeline}_micro.yaml', overrides + VARIANTS.get(name, []))
    prepare(c)
    objective = {**OBJECTIVES, 'critic': CriticObjective}[pipeline](c, *load_parts(c))
    if pipeline == 'critic': # as after some steps: two equal models would differ by rounding alone
        seeded = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for _, p in sorted(objective.model.named_parameters(), key=lambda x: x[0]):
                if p.requires_grad: p.add_(.02*torch.randn(p.shape, generator=seeded))
    total = sum(p.numel() for p in objective.model.parameters())
    trainer = make_trainer(objective, c)
    held = sum(getattr(p, '_local_tensor', p).numel() for p in objective.model.parameters())
    grads = []
    def keep(*args):
        in_order = sorted((n, p) for n, p in trainer.model.named_parameters() if p.requires_grad)
        grads.append(torch.cat([full_tensor(p.grad).flatten() for _, p in in_order]))
    trainer.optimizer.register_step_pre_hook(keep)
    train(trainer)
    logs = [{k: v for k, v in l.items() if k.startswith('train/')} for l in trainer.logs if 'train/loss' in l]
    padding = [l['speed/padding'] for l in trainer.logs if 'train/loss' in l]
    moments = getattr(objective, 'moments', None)
    found[name] = dict(grads=torch.stack(grads), logs=logs, padding=padding, held=held/total,
                       evaluated=evaluate(trainer), items=[len(objective.data)],
                       moments=moments and moments.state_dict())
if is_main(): torch.save(found, out)
''' % (CUT,)

def cut(batch, accum): return [f'training.batch_size={batch}', f'training.gradient_accumulation_steps={accum}']
PACKED = 'training.packing=true' # rows of dataset.max_length without padding: the same numbers
CUTS = {'one 1 x 24': (1, cut(24, 1)), 'one 3 x 8, packed': (1, [*cut(8, 3), PACKED]),
        'two 3 x 4, sharded, frozen replicated': (2, [*cut(4, 3), 'distributed.fsdp.sharding_strategy=FULL_SHARD',
                                                      'distributed.fsdp.shard_frozen=false']),
        'two 3 x 4, sharded, packed': (2, [*cut(4, 3), PACKED, 'distributed.fsdp.sharding_strategy=FULL_SHARD']),
        'two 3 x 4, DDP, packed': (2, [*cut(4, 3), PACKED, 'distributed.fsdp.sharding_strategy=NO_SHARD'])}
STILL = ['training.max_steps=3', 'training.learning_rate=1e-9', 'training.head_learning_rate=1e-9',
         'training.max_grad_norm=1e9']

@pytest.fixture(scope='module')
def steps(root):
    """150 of 300 solutions a rank and 24 a step: the third step of three is complete; an epoch's last, partial step
    has a test of its own below."""
    (root/'steps.py').write_text(STEPS)
    found = {}
    for name, (n, overrides) in CUTS.items():
        out = root/f'{n}-{len(found)}.pt'
        done = shell(root, 'steps.py', str(out), *SMALL, CRITIC, REFERENCE, *overrides, *STILL, n=n)
        assert done.returncode == 0, done.stderr[-3000:]
        found[name] = torch.load(out, weights_only=True)
    return found

@pytest.mark.parametrize('pipeline', CUT)
@pytest.mark.parametrize('name', list(CUTS)[1:])
def test_every_cut_gives_the_same_loss_and_gradient(steps, pipeline, name):
    want, got = steps['one 1 x 24'][pipeline], steps[name][pipeline]
    part = 3e-5 if 'surprise' in pipeline else 1e-5 # its gates add up log-probabilities, about -7, that cancel
    for g, w in zip(got['grads'], want['grads'], strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=part*w.abs().max().item())
    for g, w in zip(got['logs'], want['logs'], strict=True):
        assert g.keys() == w.keys()
        for k in g: assert g[k] == pytest.approx(w[k], rel=1e-5, abs=1e-6), k
    shape = ('position_correlation', 'delta_spikiness') # of a V that is constant: rounding
    skipped = shape if want['evaluated'].get('value_variance', 1) < 1e-9 else ()
    for k, w in want['evaluated'].items():
        assert k in skipped or got['evaluated'][k] == pytest.approx(w, rel=1e-5, abs=1e-6), k
    if want['moments']: torch.testing.assert_close(got['moments'], want['moments'])
    assert len(got['padding']) == 3 and all(0 <= p < 1 for p in got['padding'])

REDUCED = '''
import sys
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from weighted_mtp.config import load_config
from weighted_mtp.loop import make_trainer, train
from weighted_mtp.policies import OBJECTIVES
from weighted_mtp.runs import is_main, load_parts, prepare
c = load_config('configs/baseline/baseline_micro.yaml', sys.argv[1:])
prepare(c)
trainer, found, scatter = make_trainer(OBJECTIVES['baseline'](c, *load_parts(c)), c), [], dist.reduce_scatter_single
def hook(group, bucket): # of DDP's gradients
    found.append('bucket')
    return allreduce_hook(group, bucket)
def scattered(*args, **kwargs): # FSDP's
    found.append('block')
    return scatter(*args, **kwargs)
dist.reduce_scatter_single = scattered
if hasattr(trainer.wrapped, 'register_comm_hook'): trainer.wrapped.register_comm_hook(None, hook)
train(trainer, progress=False)
if is_main(): print('reduced', len(found))
'''

@pytest.mark.parametrize('strategy', ['FULL_SHARD', 'NO_SHARD'])
def test_gradients_are_reduced_once_a_step(root, strategy):
    (root/'reduced.py').write_text(REDUCED)
    def reduced(batch, accum):
        done = shell(root, 'reduced.py', *SMALL, *cut(batch, accum), 'training.max_steps=2',
                     f'distributed.fsdp.sharding_strategy={strategy}', n=2)
        assert done.returncode == 0, done.stderr[-3000:]
        return int(done.stdout.split('reduced ')[1].split()[0])
    assert reduced(4, 3) == reduced(12, 1) > 0

def test_sharding_spreads_the_parameters(steps):
    for name in CUTS:
        for pipeline, found in steps[name].items():
            if 'sharded' in name: assert .4 < found['held'] < .6, (pipeline, found['held'])
            else: assert found['held'] == 1

@pytest.fixture(scope='module')
def launched(root): # every pipeline through the launch notebook, on two processes (and WMTP_ALL=1: on one)
    def request(pipeline, ngpus):
        name = f'{pipeline}-{ngpus}'
        overrides = [*SMALL, CRITIC, REFERENCE, f'experiment.name={name}', *cut(12//ngpus, 2), 'training.max_steps=26',
                     'checkpoint.save_checkpoint_every=0.5', 'critic.blind_yardstick=false']
        return dict(pipeline=pipeline, ngpus=ngpus, target='local', name=name, overrides=' '.join(overrides))
    env = {**os.environ, 'PYTHONPATH': str(REPO), 'PATH': f"{BIN}:{os.environ['PATH']}", 'OMP_NUM_THREADS': '1'}
    requests = [request(p, n) for n in [2] + [1]*ALL for p in PIPELINES]
    return in_one_kernel(root, 'runs/all.ipynb', requests, ['--log-output'], env)

@pytest.mark.parametrize('ngpus', [2] + [1]*ALL)
@pytest.mark.parametrize('pipeline', PIPELINES)
def test_every_pipeline_through_the_launch_notebook(root, launched, pipeline, ngpus):
    """Checkpoint, MLflow run, record, and a validation loss that falls (the critic's next-token part: the pairwise one
    needs more than 26 steps).
    On two processes, over the end of an epoch: 300 solutions make 12.5 steps of 24, 290 pairs some 12.
    (With one process: WMTP_ALL=1; without, tests/test_training.py has most of it.)"""
    import mlflow
    folder = root/'runs'/f'{pipeline}-{ngpus}'
    assert launched.returncode == 0, launched.stderr[-3000:]
    record, result = (json.loads((folder/f).read_text()) for f in ('record.json', 'result.json'))
    assert record['status'] == 'completed' and record['plan']['effective_batch'] == 24
    assert (folder/'log.txt').read_text().count('/train.jsonl:') == 1 # only rank 0 prints
    ckpt = root/'storage/checkpoints'/pipeline/f'{pipeline}-{ngpus}'
    assert torch.load(ckpt/'checkpoint_final.pt', weights_only=True)['step'] == 26 and not list(ckpt.glob('*.part'))
    assert (root/result['checkpoints']['best']).is_file()
    client = mlflow.MlflowClient(result['mlflow_uri'])
    assert client.get_run(result['mlflow_run_id']).info.status == 'FINISHED'
    name = 'eval/lm_loss' if pipeline == 'critic' else 'eval/loss'
    history = client.get_metric_history(result['mlflow_run_id'], name)
    losses = [m.value for m in sorted(history, key=lambda m: m.step)]
    assert len(losses) >= 3 and losses[-1] < losses[0], losses

def cut_off(folder, keep): # as after a kill that left the first `keep` epoch checkpoints
    saved = {f: read_facts(f)['step'] for f in folder.glob('checkpoint_epoch_*')}
    for f in sorted(saved, key=saved.get)[keep:]: shutil.rmtree(f)
    for name in ('checkpoint_final.pt', 'history.jsonl'): (folder/name).unlink()
    (folder/'run.json').write_text(json.dumps({**json.loads((folder/'run.json').read_text()), 'finished': False}))

# the first three have the most to take along
RESUMED = [('verifiable', 'FULL_SHARD', (2, 1)), ('verifiable', 'FULL_SHARD', (1, 2)), ('critic', 'FULL_SHARD', (2, 1)),
           ('baseline', 'NO_SHARD', (2, 1))]

@pytest.mark.parametrize('pipeline, strategy, ranks', RESUMED)
def test_another_number_of_processes_resumes(root, pipeline, strategy, ranks):
    folder, cuts = root/f'ckpt-{pipeline}-{strategy}-{ranks[0]}', {1: cut(24, 1), 2: cut(4, 3)} # of the same 24
    common = [CRITIC, REFERENCE, 'training.max_steps=13', f'checkpoint.save_dir={folder}',
              f'distributed.fsdp.sharding_strategy={strategy}', 'critic.blind_yardstick=false',
              'checkpoint.save_checkpoint_every=0.5']
    done = train(root, pipeline, *common, *cuts[ranks[0]], n=ranks[0])
    assert done.returncode == 0, done.stderr[-3000:]
    before = torch.load(folder/'checkpoint_final.pt', weights_only=True)
    cut_off(folder, 1)
    done = train(root, pipeline, *common, *cuts[ranks[1]], n=ranks[1])
    assert done.returncode == 0 and 'resuming from' in done.stdout, done.stdout + done.stderr[-3000:]
    after = torch.load(folder/'checkpoint_final.pt', weights_only=True)
    assert after['step'] == before['step'] == 13
    for k, w in before['metrics'].items():
        if 'loss' in k: # Adam amplifies rounding: close, not equal
            assert after['metrics'][k] == pytest.approx(w, rel=1e-3), k

def test_two_processes_resume_in_the_second_epoch_bit_for_bit(root):
    """There each rank reads its share of the data in another order than in the first, and has to find it again."""
    folder = root/'ckpt-second-epoch'
    words = ['baseline', f'checkpoint.save_dir={folder}', 'training.max_steps=24', *cut(4, 3),
             'checkpoint.save_checkpoint_every=0.25', 'checkpoint.save_total_limit=99']
    done = train(root, *words, n=2)
    assert done.returncode == 0, done.stderr[-3000:]
    want = torch.load(folder/'checkpoint_final.pt', weights_only=True)
    cut_off(folder, 6)
    done = train(root, *words, n=2)
    assert done.returncode == 0 and 'checkpoint_epoch_1.' in done.stdout, done.stdout + done.stderr[-3000:]
    got = torch.load(folder/'checkpoint_final.pt', weights_only=True)
    assert got['metrics'] == want['metrics']
    for k, w in want['state'].items(): assert torch.equal(got['state'][k], w), k

FAIL = '''
import functools, os, signal, sys, time, torch
from datetime import timedelta
from pathlib import Path
from torch.distributed.distributed_c10d import _set_pg_timeout as wait_for_others
import weighted_mtp.failures as failures, weighted_mtp.policies as p, weighted_mtp.runs as runs
from weighted_mtp.state_folder import WholeFolder
from weighted_mtp.config import UserError
from weighted_mtp.policies import PolicyObjective, run_policy
RANK, AT, HANG, LOADING, TWICE = int(os.environ.get('RANK', 0)), NUMBER, SLOW, EARLY, BOTH
runs.Ranks = functools.partial(failures.Ranks, patience=2)
class Failing(PolicyObjective):
    seen = 0
    def loss(self, *a):
        self.seen += 1
        loss, shares = super().loss(*a)
        if self.seen == 1 and HANG: wait_for_others(timedelta(seconds=8)) # not at the start, which may take longer
        if self.seen == AT and (TWICE or 'WMTP_TRIED_AGAIN' not in os.environ) and ON:
            Path(os.environ['WMTP_RUN_DIR'], 'failed').touch()
            KIND
        if self.seen == 1: print('micro-batches of', len(a[1]['input_ids']), flush=True)
        return loss, shares
p.OBJECTIVES['baseline'] = Failing
def fail(*args, **kw): raise RuntimeError('planted failure of rank 1')
def full(*args, **kw): raise OSError(28, 'No space left on device')
if LOADING and ON:
    Path(os.environ['WMTP_RUN_DIR'], 'failed').touch()
    p.load_parts = fail
runs.pipeline_main('baseline', run_policy)
'''
SMALLER = "training.batch_size=2 with training.gradient_accumulation_steps=4 (the effective batch stays)"
FULL = ("raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of "
        "79.25 GiB of which 1.12 GiB is free. Including non-PyTorch memory …')")
FAILURES = { # on which rank, what happens, and what the one message says
    'UserError': (1, "raise UserError('planted failure of rank 1')", 'planted failure of rank 1'),
    'RuntimeError': (1, "raise RuntimeError('planted failure of rank 1')", 'RuntimeError: planted failure of rank 1'),
    'abort': (1, 'os.abort()', 'The process of rank 1 ended without a word (rank 0, step 2 of 50 noticed)'),
    'kill': (0, 'os.kill(os.getpid(), 9)', 'The process of rank 0 ended without a word (rank 1, step 2 of 50 noticed)'),
    'stop': (1, 'os.kill(os.getpid(), signal.SIGSTOP)', 'The process of rank 1 has been stopped by a signal'),
    'hang': (1, 'time.sleep(600)', 'rank 0, step 2 of 50: another rank failed, or did not answer for '),
    'nan': (1, "loss, self.seen = loss*float('nan'), self.seen - 1",
            'The loss became nan or infinite in 2 steps running; the last was step 3 on rank 1, problems '),
    'loading': (1, 'pass', 'RuntimeError: planted failure of rank 1'),
    'evaluation': (1, 'Failing.evaluate = fail', 'RuntimeError: planted failure of rank 1'),
    'saving': (1, 'WholeFolder.write_data = full', 'could not be saved ([Errno 28] No space left on device)'),
    'memory': (1, FULL, '(rank 1, step 2 of 50). Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 79.25 GiB '
                        f'of which 1.12 GiB is free. Lower it to {SMALLER}')}

@pytest.fixture(scope='module')
def database(root): # made before: a run that fails waits ten seconds for MLflow, and making it may take longer
    made = shell(root, '-c', 'import mlflow; mlflow.MlflowClient("sqlite:///failures.db").search_experiments()')
    assert made.returncode == 0, made.stderr
    return root/'failures.db'

# At which micro-batch of this rank, two a step; on how many ranks; in the second try, too?
def fail(root, folder, rank, what, *overrides, kind='', at=3, n=2, again=False):
    filled = dict(KIND=what, ON=f'RANK == {rank}', NUMBER=str(at), SLOW=str(kind == 'hang'),
                  EARLY=str(kind == 'loading'), BOTH=str(again))
    text = FAIL
    for k, v in filled.items(): text = text.replace(k, v)
    (folder/'fail.py').write_text(text)
    overrides = [*SMALL, *cut(4, 2), f'checkpoint.save_dir={folder}/ckpt', 'training.max_steps=50', *overrides,
                 'training.max_bad_steps=2', f'mlflow.tracking_uri=sqlite:///{root}/failures.db']
    words = [w for o in overrides for w in ('--override', o)]
    os.environ['WMTP_RUN_DIR'] = str(folder)
    try:
        program = [str(folder/'fail.py'), '--config', 'configs/baseline/baseline_micro.yaml']
        return shell(root, *program, *words, n=n, timeout=240, forked=False)
    finally: del os.environ['WMTP_RUN_DIR']

@pytest.mark.parametrize('kind', FAILURES)
def test_a_failing_rank_ends_the_job_with_one_message_within_a_minute(root, database, tmp_path, kind):
    rank, what, says = FAILURES[kind]
    often = ['checkpoint.save_checkpoint_every=0.1'] if kind in ('evaluation', 'saving') else []
    done = fail(root, tmp_path, rank, what, *often, kind=kind)
    took = time.time() - (tmp_path/'failed').stat().st_mtime
    print(f'{kind}: ended after {took:.0f} s')
    assert done.returncode != 0 and took < 60
    own = [l for l in done.stderr.splitlines() if l.startswith(('Error: ', 'RuntimeError: '))]
    assert len(own) == 1 and says in own[0], done.stderr
    if not says.startswith('RuntimeError'): assert done.stderr.count('Traceback') <= 1, done.stderr # torchrun's own
    spoken = kind not in ('abort', 'kill', 'stop') # by the rank itself: the record keeps it
    if spoken: assert says in (tmp_path/'error.txt').read_text() and done.stderr.count(says) == 2 # and torchrun
    said = last_words(done.stderr.splitlines())
    if kind == 'abort':
        assert 'Aborted' in said[0] and any('fail.py' in line for line in said), done.stderr
        assert said[-1] == 'The process of rank 1 ended first, with exit code -6 (SIGABRT)', done.stderr
    if kind == 'kill': assert 'rank 0 ended without a word' in '\n'.join(said) and '-9 (SIGKILL)' in said[-1], said
    else: assert 'FAILED' in mlflow_statuses(tmp_path, database) # rank 0 could still close its run

def mlflow_statuses(record, database): # of the newest run; with those of runs that are still to be sent
    with sqlite3.connect(database) as db: found = db.execute('select status from runs order by start_time').fetchall()
    unsent = [json.loads(f.read_text().splitlines()[-1]) for f in record.glob('mlflow-spool-*.jsonl')]
    return [status for status, in found[-1:]] + [x.get('end') for x in unsent]

def test_out_of_memory_a_second_time_ends_the_run(root, database, tmp_path):
    done = fail(root, tmp_path, 0, FULL.replace('GPU 1', 'GPU 0'), 'training.fit=auto', at=1, n=1, again=True)
    assert done.returncode != 0 and done.stderr.count('once more with') == 1, done.stderr
    own = [l for l in done.stderr.splitlines() if l.startswith('Error: ')]
    assert len(own) == 1 and 'Lower it to training.batch_size=1 with' in own[0] and 'Traceback' not in done.stderr

def test_out_of_memory_in_the_first_step_is_tried_once_more(root, database, tmp_path):
    done = fail(root, tmp_path, 1, FULL, 'training.max_steps=3', 'training.fit=auto', at=1)
    assert done.returncode == 0, done.stderr
    assert 'once more with training.batch_size=2 training.gradient_accumulation_steps=4' in done.stderr
    assert [l for l in done.stdout.splitlines() if 'micro-batches' in l][-1] == 'micro-batches of 2'
    assert torch.load(tmp_path/'ckpt/checkpoint_final.pt', weights_only=True)['step'] == 3
    assert not (tmp_path/'error.txt').is_file() and 'FINISHED' in mlflow_statuses(tmp_path, database)
    assert json.loads((tmp_path/'ckpt/run.json').read_text())['finished']
