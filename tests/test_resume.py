"""A run that is killed, at whatever moment and however often, ends as if nothing had happened: the same weights,
bit for bit.

WMTP_KILLS=20 python -m pytest tests/test_resume.py   takes some minutes and is the full measure; CI kills six times."""
import json, os, random, shutil, signal, sys, time
from pathlib import Path

import pytest, torch

import warm
from test_estimate import free_port
from weighted_mtp.checkpoints import newest_checkpoint
from weighted_mtp.state_folder import Saver, contents, read_facts

REPO, BIN = Path(__file__).resolve().parent.parent, Path(sys.executable).parent
KILLS = int(os.environ.get('WMTP_KILLS', 6))
SMALL = ['dataset.n_problems=100', 'data_sampling.n_validation=40', 'model.hidden_size=32', 'model.n_layers=2',
         'model.n_heads=2', 'training.log_every=5', 'training.cpu_threads=1', 'training.batch_size=4',
         'training.gradient_accumulation_steps=2', 'checkpoint.save_checkpoint_every=0.25',
         'checkpoint.save_total_limit=2', 'experiment.critic_checkpoint=critic.pt']

MODELS = '''
import torch
from transformers import AutoTokenizer
from weighted_mtp.data import vocabulary_id
from weighted_mtp.models import build_value_model, save_checkpoint
from weighted_mtp.synthetic import make_dataset, make_micro_model
make_dataset('storage/datasets/synthetic', n_problems=100, n_held_out=50)
tok = AutoTokenizer.from_pretrained('storage/datasets/synthetic/tokenizer')
sizes = dict(tokenizer=tok, hidden_size=32, n_layers=2, n_heads=2, max_length=256)
def micro(seed=0): return make_micro_model(seed=seed, **sizes)
model = micro()
model.save_pretrained('micro-dropout'); tok.save_pretrained('micro-dropout')
config = 'micro-dropout/config.json'
import json
c = json.load(open(config))
json.dump(c | dict(attention_dropout=0.1), open(config, 'w')) # random numbers in every step
torch.manual_seed(0)
save_checkpoint('critic.pt', build_value_model(micro(1), head='surprise'), vocabulary=vocabulary_id(tok))
'''

@pytest.fixture(scope='module')
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp('resume')
    shutil.copytree(REPO/'configs', root/'configs')
    shutil.copy(REPO/'settings.ini', root/'settings.ini')
    done = warm.run([sys.executable, '-c', MODELS], root, environment())
    assert done.returncode == 0, done.stderr
    return root

def environment(**more): return {**os.environ, 'PYTHONPATH': str(REPO), 'PATH': f"{BIN}:{os.environ['PATH']}", **more}

def command(pipeline, folder, *overrides):
    words = [w for o in (*SMALL, f'checkpoint.save_dir={folder}', *overrides) for w in ('--override', o)]
    config = f'configs/{pipeline}/{pipeline}_micro.yaml'
    return [sys.executable, '-m', f'weighted_mtp.pipelines.run_{pipeline}', '--config', config, *words]

def start(root, words, record, **kw):
    record.mkdir(exist_ok=True)
    return warm.Process(words, root, environment(WMTP_RUN_DIR=str(record)), **kw)

def to_the_end(root, words, record, **kw):
    p = start(root, words, record, **kw)
    out, err = p.communicate(timeout=200)
    assert p.returncode == 0, out + err[-3000:]
    return out

def step(record):
    try: return json.loads((record/'progress.json').read_text())['step']
    except (OSError, ValueError): return 0

def weights(folder, name='checkpoint_final.pt'): return torch.load(folder/name, weights_only=True)

# gae: its moments have to go on, too
WITH_DROPOUT = ['model.backbone=micro-dropout', 'training.max_steps=200', 'training.weighting=gae']

@pytest.mark.parametrize('pipeline, overrides', [('verifiable', WITH_DROPOUT)])
def test_killed_run_ends_with_the_same_weights(root, tmp_path, pipeline, overrides):
    # With another hash seed than those that are killed
    to_the_end(root, command(pipeline, tmp_path/'whole', *overrides), tmp_path/'a', of=1)
    whole = weights(tmp_path/'whole')
    rng, resumed, codes = random.Random(os.urandom(8)), 0, []
    words = command(pipeline, tmp_path/'cut', *overrides)
    for i in range(KILLS):
        p, before = start(root, words, tmp_path/'b'), step(tmp_path/'b')
        if rng.random() < .8: # mostly while it trains; sometimes while it starts
            while step(tmp_path/'b') in (0, before) and p.poll() is None: time.sleep(.01)
        time.sleep(rng.random()*1.5)
        p.send_signal(signal.SIGKILL if i%2 else signal.SIGTERM)
        out, _ = p.communicate(timeout=60)
        codes.append(p.returncode)
        resumed += 'resuming from' in out
        if p.returncode == 0: break # too late: it had come to its end
    out = to_the_end(root, words, tmp_path/'b')
    print(f'{len(codes)} kills {codes}, {resumed + ("resuming from" in out)} resumes')
    assert set(codes) <= {-9, -15, 143, 0} and (resumed or 'resuming from' in out)
    cut = weights(tmp_path/'cut')
    assert whole['state'].keys() == cut['state'].keys() and whole['step'] == cut['step'] == 200
    for k, w in whole['state'].items(): assert torch.equal(w, cut['state'][k]), k
    # cut off after its last step, in the final evaluation; and its files were copied, so their times say nothing
    def metrics(record): return json.loads((record/'result.json').read_text())['metrics']
    assert metrics(tmp_path/'b') == metrics(tmp_path/'a')
    run = tmp_path/'cut/run.json'
    run.write_text(json.dumps(json.loads(run.read_text()) | dict(finished=False)))
    (tmp_path/'cut/checkpoint_final.pt').unlink()
    files = sorted((tmp_path/'cut').glob('checkpoint_epoch_*'), key=lambda f: float(f.name.rsplit('_', 1)[1]))
    for age, f in enumerate(files): os.utime(f, (1e9 - age, 1e9 - age)) # the newest looks oldest
    assert f'resuming from {files[-1]}' in to_the_end(root, words, tmp_path/'b')
    assert metrics(tmp_path/'b') == metrics(tmp_path/'a')
    assert whole['metrics'] == cut['metrics'] and not list((tmp_path/'cut').glob('*.part*'))
    best_w, best_c = weights(tmp_path/'whole', 'checkpoint_best.pt'), weights(tmp_path/'cut', 'checkpoint_best.pt')
    assert best_w['step'] == best_c['step']
    for k, w in best_w['state'].items(): assert torch.equal(w, best_c['state'][k]), k

# Saves without a break: every number of a checkpoint is its step
SAVES = '''
import itertools, sys, torch
from pathlib import Path
from weighted_mtp.checkpoints import epoch_name, prune_checkpoints
from weighted_mtp.state_folder import Saver
folder, saver, tensors = Path(sys.argv[1]), Saver(), {f'w{i}': torch.empty(1 << 20) for i in range(4)}
def done(step):
    prune_checkpoints(folder, 2)
    (folder/'done').write_text(str(step))
for step in itertools.count(int(sys.argv[2])):
    for x in tensors.values(): x.fill_(step)
    saver.save(folder/epoch_name(step/1000, 999), tensors, dict(training=dict(run='mine', step=step)),
               after=lambda step=step: done(step))
'''

def test_killed_twenty_times_while_it_saves(tmp_path):
    step, cut, rng = 0, 0, random.Random(os.urandom(8))
    def said(): return int(done.read_text() or 0) if (done := tmp_path/'done').exists() else 0
    for _ in range(20):
        p = warm.Process([sys.executable, '-c', SAVES, str(tmp_path), str(step+1)], tmp_path, environment())
        while said() <= step: time.sleep(.002); assert p.poll() is None, p.communicate()
        time.sleep(rng.random()*.2)
        p.kill(); p.wait(30)
        cut += bool(list(tmp_path.glob('*.part')))
        newest = newest_checkpoint(tmp_path, 'mine')
        step, least = read_facts(newest)['training']['step'], said()
        assert step >= least and len(list(tmp_path.glob('checkpoint_epoch_*'))) <= 4
        tensors = {name: torch.empty(1 << 20) for name in contents(newest)}
        Saver().load(newest, tensors)
        assert len(tensors) == 4 and all((x == step).all() for x in tensors.values()), newest
    assert cut >= 5, f'only {cut} of 20 kills came while a folder was being written'

# The same on two ranks, each of which holds half of every tensor
SAVES_ON_TWO = SAVES.replace('folder, saver,', """
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
dist.init_process_group('gloo')
mesh = init_device_mesh('cpu', (2,))
folder, saver,""").replace("torch.empty(1 << 20)", "distribute_tensor(torch.zeros(1 << 20), mesh, [Shard(0)])")

def test_two_ranks_killed_while_they_save(tmp_path):
    """Either is killed, now and then before the other: a folder is whole only when both halves are."""
    step, cut, rng = 0, 0, random.Random(os.urandom(8))
    def said(): return int(done.read_text() or 0) if (done := tmp_path/'done').exists() else 0
    for i in range(KILLS):
        port = free_port()
        def rank(r): return environment(RANK=str(r), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
        both = [warm.Process([sys.executable, '-c', SAVES_ON_TWO, str(tmp_path), str(step+1)], tmp_path, rank(r))
                for r in range(2)]
        while said() <= step: time.sleep(.002); assert both[0].poll() is None, both[0].communicate()
        time.sleep(rng.random()*.2)
        for p in both[::1 if i%2 else -1]:
            p.kill()
            time.sleep(rng.random()*.1)
        for p in both: p.wait(30)
        cut += bool(list(tmp_path.glob('*.part')))
        newest = newest_checkpoint(tmp_path, 'mine')
        step, least = read_facts(newest)['training']['step'], said()
        assert step >= least
        tensors = {name: torch.empty(1 << 20) for name in contents(newest)}
        Saver().load(newest, tensors)
        assert len(tensors) == 4 and all((x == step).all() for x in tensors.values()), newest
    assert cut, f'none of {KILLS} kills came while a folder was being written'

def test_sigterm_saves_first(root, tmp_path):
    record, rare = tmp_path/'record', 'checkpoint.save_checkpoint_every=1000'
    words = command('ntp', tmp_path/'ckpt', 'training.max_steps=3000', rare)
    p = start(root, words, record)
    while step(record) < 20: time.sleep(.01); assert p.poll() is None
    p.terminate()
    out, err = p.communicate(timeout=60)
    assert p.returncode == 143 and 'resumes from there' in out + err, out + err[-1000:]
    saved, = (tmp_path/'ckpt').glob('checkpoint_epoch_*') # none was due: this one came with the signal
    assert read_facts(saved)['training']['step'] >= 20

def test_another_config_begins_anew_and_a_finished_run_too(root, tmp_path):
    run = lambda *o: to_the_end(root, command('ntp', tmp_path/'ckpt', 'training.max_steps=6', *o), tmp_path/'record')
    run()
    assert 'resuming' not in run() # finished
    file = tmp_path/'ckpt'/'run.json'
    file.write_text(json.dumps({**json.loads(file.read_text()), 'finished': False}))
    out = run('training.weight_decay=0.02')
    assert 'begins anew' in out and 'training.weight_decay' in out and 'resuming' not in out

def test_two_runs_do_not_share_a_folder(root, tmp_path):
    words = command('ntp', tmp_path/'ckpt', 'training.max_steps=3000')
    p = start(root, words, tmp_path/'record')
    while step(tmp_path/'record') < 1: time.sleep(.01); assert p.poll() is None
    second = warm.run(words, root, environment(), timeout=100)
    p.kill(); p.communicate()
    assert second.returncode == 2 and f'process {p.pid}' in second.stderr and 'Traceback' not in second.stderr
