"""The critic for real, from launch to checkpoint, on a small embedded data set in a copy of the project."""
import json, math, os, resource, shutil, subprocess, sys
from pathlib import Path

import pytest, torch

import warm

REPO, BIN = Path(__file__).resolve().parent.parent, Path(sys.executable).parent
SMALL = ['dataset.n_problems=100', 'data_sampling.n_validation=40', 'model.backbone=micro', 'model.hidden_size=32',
         'model.n_layers=2', 'model.n_heads=2', 'training.max_steps=12', 'training.log_every=4',
         'training.cpu_threads=1', 'checkpoint.save_checkpoint_every=0.2']

@pytest.fixture(scope='module')
def project(tmp_path_factory):
    root = tmp_path_factory.mktemp('training')
    shutil.copytree(REPO/'configs', root/'configs')
    for part in ('settings.ini', 'nbs/launch.ipynb'):
        (root/part).parent.mkdir(exist_ok=True); shutil.copy(REPO/part, root/part)
    (root/'home').mkdir()
    return root

def shell(project, *words, timeout=280, **kw):
    env = {**os.environ, 'HOME': str(project/'home'), 'PYTHONPATH': str(REPO), 'PATH': f"{BIN}:{os.environ['PATH']}"}
    return subprocess.run(words, cwd=project, env=env, capture_output=True, text=True, timeout=timeout, **kw)

def wmtp(project, name, *overrides): # the command, on the small data set
    words = [w for o in (*SMALL, *overrides) for w in ('--override', o)]
    return shell(project, 'wmtp-launch', 'critic', '--ngpus', '1', '--target', 'local', '--name', name, *words)

def train(project, *overrides): # the pipeline itself, without a launch
    words = [w for o in (*SMALL, *overrides) for w in ('--override', o)]
    env = {**os.environ, 'HOME': str(project/'home'), 'PYTHONPATH': str(REPO), 'PATH': f"{BIN}:{os.environ['PATH']}"}
    pipeline = ['weighted_mtp.pipelines.run_critic', '--config', 'configs/critic/critic_micro.yaml']
    return warm.run([sys.executable, '-m', *pipeline, *words], project, env)

def read(project, name, file='record.json'): return json.loads((project/'runs'/name/file).read_text())

@pytest.fixture(scope='module')
def first(project): # one run, looked at by several tests
    done = wmtp(project, 'first')
    assert done.returncode == 0, done.stdout + done.stderr
    return done

def test_run_leaves_everything(project, first):
    record, result = read(project, 'first'), read(project, 'first', 'result.json')
    assert record['status'] == 'completed' and record['plan']['effective_batch'] == 16
    m = result['metrics']
    for name in ('pairwise_accuracy', 'pairwise_accuracy_mutant', 'pairwise_accuracy_sibling', 'margin', 'roc_auc',
                 'value_variance', 'delta_spikiness', 'position_correlation', 'likelihood_accuracy', 'blind_accuracy',
                 'blind_accuracy_sibling', 'blind_auc', 'drop_within_2', 'drop_within_2_random', 'drop_on_mutation',
                 'drop_on_mutation_random', 'accuracy', 'ece', 'brier', 'likelihood_auc', 'base_likelihood_auc',
                 'base_likelihood_auc_min', 'length_correlation'):
        assert math.isfinite(m[f'test/{name}']), name
    assert all(w in first.stdout for w in ('checkpoint_best.pt', 'runs/first', 'mlflow ui')), first.stdout
    assert (project/result['pictures'][0]).is_file()
    programs = read(project, 'first', 'critic_programs.json')
    assert len(programs) == 2*m['test/pairs'] and all(0 <= p['value'] <= 1 for p in programs)
    right = sum((p['value'] > .5) == p['correct'] for p in programs)/len(programs)
    assert right == pytest.approx(m['test/accuracy'])
    found = [p['mutation'][0] <= p['drop_at'] <= p['mutation'][1] for p in programs if p['mutation']]
    assert sum(found)/len(found) == pytest.approx(m['test/drop_on_mutation'])

def test_checkpoints_describe_themselves(project, first):
    folder = project/'storage/checkpoints/critic/critic-pretrain'
    names, epochs = ([f.name for f in folder.glob(pattern)] for pattern in ('*.pt', 'checkpoint_epoch_*'))
    assert {*names} == {'checkpoint_best.pt', 'checkpoint_final.pt'} and 1 <= len(epochs) <= 3, names + epochs
    for name in names:
        c = torch.load(folder/name, weights_only=True)
        assert {'model_config', 'state', 'config', 'step', 'metrics', 'code_version', 'pipeline'} <= c.keys()
    from weighted_mtp.critic import load_critic
    critic, ids = load_critic(folder/'checkpoint_best.pt'), torch.tensor([[3, 4, 5]])
    r, V = critic.credit(ids, torch.ones_like(ids), torch.ones_like(ids))
    assert r.shape == V.shape == (1, 3) and r.isfinite().all() and ((V > 0) & (V < 1)).all()
    assert critic.scale > 0 and c['head'] == 'ratio' and {'roc_auc', 'ece'} <= c['metrics'].keys()

def test_mlflow_holds_the_run(project, first):
    import mlflow
    result = read(project, 'first', 'result.json')
    run = mlflow.tracking.MlflowClient(result['mlflow_uri']).get_run(result['mlflow_run_id'])
    assert run.info.status == 'FINISHED' and run.data.params['training.batch_size'] == '16'
    assert run.data.metrics['test/pairwise_accuracy'] == result['metrics']['test/pairwise_accuracy']
    assert {'train/loss', 'train/lm_loss', 'train/lm_loss_wrong', 'eval/roc_auc', 'eval/ece'} <= run.data.metrics.keys()

def test_papermill_of_the_record_repeats_bit_for_bit(project, first):
    done = shell(project, 'papermill', 'runs/first/launch.ipynb', 'runs/again.ipynb')
    assert done.returncode == 0, done.stderr[-2000:]
    again = next(p.parent.name for p in (project/'runs').glob('*/record.json') if json.loads(p.read_text())['notebook'])
    assert read(project, again)['plan'] == read(project, 'first')['plan']
    assert read(project, again, 'result.json')['metrics'] == read(project, 'first', 'result.json')['metrics']

DATA = dict(instruction='Return one.', input='', output='return 1', problem_id='p', is_correct=True, difficulty=3,
            source='demo')
BEST = 'storage/checkpoints/critic/critic-pretrain/checkpoint_best.pt'

def no_data(what):
    tokenizer = 'model.tokenizer=storage/datasets/synthetic/tokenizer'
    return ['dataset.embedded=false', f'dataset.train={what}.jsonl', tokenizer]

def test_bad_data(project, first):
    (project/'broken.jsonl').write_text('\n'.join([json.dumps(DATA), '{"instruction":']))
    done = wmtp(project, 'data-broken', *no_data('broken'))
    assert done.returncode == 1 and 'line 2' in done.stderr and 'Traceback' not in done.stderr, done.stderr
    assert read(project, 'data-broken')['status'] == 'failed'

def test_loss_that_is_no_number(project, first):
    done = train(project, 'training.learning_rate=1e30', 'training.log_every=1', 'experiment.name=nan',
                 'critic.blind_yardstick=false')
    assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stderr
    assert 'in 3 steps running; the last was step' in done.stderr and 'problems ' in done.stderr, done.stderr

BAD = [('critic', no_data('empty'), 'is empty'),
    ('critic', no_data('one-sided'), 'no pair can be made'),
    ('critic', no_data('missing'), 'not found'),
    ('verifiable', ['experiment.critic_checkpoint=none.pt'], 'none.pt not found'),
    ('verifiable', ['experiment.critic_checkpoint=torn.pt'], 'truncated'),
    ('verifiable', ['experiment.critic_checkpoint=policy.pt'], 'not a critic'),
    ('verifiable', ['experiment.critic_checkpoint=foreign.pt'], 'another tokenizer'),
    ('rho1', ['experiment.reference_checkpoint=none.pt'], 'ref_tuning'),
    ('rho1', [f'experiment.reference_checkpoint={BEST}'], 'not a policy'),
    ('baseline', ['model.n_future_tokens=300'], 'looks past dataset.max_length'),
    ('ntp', ['model.n_future_tokens=2'], 'must be 1'),
    ('baseline', ['model.tuning=frozen', 'model.n_future_tokens=1'], 'leaves nothing to train'),
    ('baseline', ['dataset.max_length=8'], 'nothing to train on'), # no prompt leaves room for a response
    ('baseline', ['checkpoint.upload_to=bucket/x'], 's3://BUCKET/PREFIX'),
    ('baseline', ['checkpoint.save_dir=/dev/null/x'], 'cannot be written to'),
    ('baseline', ['data_sampling.difficulty_bins=[[1,15],[10,25]]', 'data_sampling.difficulty_weights=[1,1]'],
     'overlap'),
    ('baseline', ['model.backbone=foreign'], 'not the tokenizer that it was trained with'), # the embedded data's
    ('baseline', ['model.backbone=renumbered'], 'gives tokens other numbers')]

def make_bad_models(folder, best):
    from transformers import AutoTokenizer
    from weighted_mtp.models import build_policy, load_critic_model, save_checkpoint
    from weighted_mtp.synthetic import make_micro_model, train_tokenizer
    sizes = dict(hidden_size=32, n_layers=2, n_heads=2)
    for name, n in (('foreign', 300), ('renumbered', 1024)):
        tokenizer = train_tokenizer([f'other words {i}' for i in range(4000)], folder/name, n)
        make_micro_model(folder/name, tokenizer, **sizes)
    (folder/'torn.pt').write_bytes(best.read_bytes()[:9000])
    save_checkpoint(folder/'foreign.pt', load_critic_model(best), vocabulary='another')
    own = AutoTokenizer.from_pretrained(folder/'storage/datasets/synthetic/tokenizer')
    save_checkpoint(folder/'policy.pt', build_policy(make_micro_model(tokenizer=own, **sizes), 2))

ALL_BAD = f'''
import contextlib, importlib, io, json
def run(pipeline, overrides):
    words = ['--config', f'configs/{{pipeline}}/{{pipeline}}_micro.yaml']
    words += [w for o in {SMALL!r} + overrides for w in ('--override', o)]
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        try: importlib.import_module(f'weighted_mtp.pipelines.run_{{pipeline}}').main(words)
        except SystemExit as e: return e.code, printed.getvalue()
    return 0, printed.getvalue()
json.dump([run(pipeline, overrides) for pipeline, overrides, _ in {BAD!r}], open('results.json', 'w'))
'''

@pytest.fixture(scope='module')
def results(project, first): # exit code and message of each; in one process, since importing torch takes long
    make_bad_models(project, project/BEST)
    (project/'empty.jsonl').touch()
    (project/'one-sided.jsonl').write_text('\n'.join([json.dumps(DATA)]*3))
    done = warm.run([sys.executable, '-c', ALL_BAD], project, {**os.environ, 'HOME': str(project/'home')})
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((project/'results.json').read_text())

@pytest.mark.parametrize('i', range(len(BAD)), ids=[b[2] for b in BAD])
def test_bad_models_and_numbers(results, i):
    code, printed = results[i]
    errors = [l for l in printed.splitlines() if l.startswith('Error: ')]
    assert code == 2 and len(errors) == 1 and BAD[i][2] in errors[0] and 'Traceback' not in printed, printed

def test_too_large_a_batch_says_what_to_lower(project, first):
    large = SMALL + ['training.batch_size=256', 'model.hidden_size=1024', 'experiment.name=large']
    code = f'''
import resource, runpy, sys
import weighted_mtp.policies, transformers, mlflow # what is loaded is no part of the limit
used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2000*2**20,)*2) # Arrow sets address space aside, too
sys.argv = ['run_baseline', '--config', 'configs/baseline/baseline_micro.yaml']
sys.argv += [w for o in {large!r} for w in ('--override', o)]
runpy.run_module('weighted_mtp.pipelines.run_baseline', run_name='__main__')
'''
    done = shell(project, sys.executable, '-c', code)
    assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stderr[-2000:]
    assert 'training.batch_size=128 with training.gradient_accumulation_steps=2' in done.stderr, done.stderr[-2000:]

def test_full_disk_keeps_the_previous_checkpoint(project, first):
    """A limit on file size stands in for a full disk: the write fails half-way in both cases, and the limit needs no
    device of its own."""
    code = '''
import signal, sys, torch
from weighted_mtp.config import UserError
from weighted_mtp.models import load_critic_model, save_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN) # the write then fails with an error, as on a full disk
model = load_critic_model(sys.argv[1])
try: save_checkpoint(sys.argv[1], model, step=99)
except UserError as e: print(e); sys.exit(2)
'''
    best = project/BEST
    before = best.read_bytes()
    limit = len(before)//2
    def lower(): resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    done = shell(project, sys.executable, '-c', code, str(best), preexec_fn=lower)
    assert done.returncode == 2 and 'could not be saved' in done.stdout, done.stdout + done.stderr
    assert best.read_bytes() == before and not list(best.parent.glob('*.part'))

TUNED = [('lora', 'mlp'), ('lora', 'ratio'), ('frozen', 'linear'), ('full', 'sigmoid')]

@pytest.mark.parametrize('tuning, head', TUNED)
def test_every_tuning_trains_and_loads(project, first, tuning, head):
    """LoRA and a frozen backbone need a backbone on disk: the checkpoint holds only what was trained, and names it."""
    from transformers import AutoTokenizer
    from weighted_mtp.critic import load_critic
    from weighted_mtp.synthetic import make_micro_model
    backbone, tokenizer = project/'storage/models/micro', project/'storage/datasets/synthetic/tokenizer'
    if not backbone.exists(): make_micro_model(backbone, AutoTokenizer.from_pretrained(tokenizer), 32, 2, 2)
    done = train(project, f'model.backbone={backbone}', f'model.tuning={tuning}', f'critic.head={head}',
                 f'experiment.name={tuning}-{head}', 'critic.value_weight=0.5', 'critic.lm_first=0',
                 'critic.lm_weight=0', 'training.td_lambda_schedule=cosine', 'model.lora.r=4',
                 'critic.blind_yardstick=false', 'training.gradient_checkpointing=true')
    assert done.returncode == 0, done.stdout + done.stderr
    best = project/f'storage/checkpoints/critic/{tuning}-{head}/checkpoint_best.pt'
    state = torch.load(best, weights_only=True)['state']
    assert any(n.startswith('backbone.') and 'lora_' not in n for n in state) == (tuning == 'full')
    ids = torch.tensor([[3, 4, 5]])
    assert all(x.isfinite().all() for x in load_critic(best).credit(ids, torch.ones_like(ids), torch.ones_like(ids)))

def run_page(project, name, **sizes): # lines of its results file, and what it printed
    for folder in ('nbs/studies', 'runs'): (project/folder).mkdir(exist_ok=True)
    shutil.copy(REPO/f'nbs/studies/{name}.ipynb', project/'nbs/studies')
    given = json.dumps(dict(sizes, seeds=[0], n_problems=60, results=f'runs/{name}.jsonl', folder='pages', workers=2))
    done = shell(project, 'papermill', f'nbs/studies/{name}.ipynb', f'runs/{name}.ipynb', '-y', given, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    cells = json.loads((project/f'runs/{name}.ipynb').read_text())['cells']
    printed = ''.join(''.join(o.get('text', '')) for c in cells for o in c.get('outputs', ()))
    return [json.loads(line) for line in (project/f'runs/{name}.jsonl').read_text().splitlines()], printed

def test_critic_page_runs(project):
    """nbs/studies/critic.ipynb, whose kept outputs come from full runs, runs from top to bottom on a small budget:
    all heads, with the blind one; and what needs the critics of two seeds."""
    sizes = dict(run=True, steps=3, held_out=20, pairs=30)
    rows, _ = run_page(project, 'critic', **sizes, studies=['heads'])
    assert {r['arm'] for r in rows} == {'ratio', 'first_error', 'surprise', 'mlp', 'linear', 'blind'}
    for r in rows: assert 0 <= r['metrics']['roc_auc'] <= 1 and 0 <= r['metrics']['ece'] <= 1, r
    base = {r['metrics'].get('base_likelihood_auc') for r in rows if r['arm'] != 'blind'}
    assert len(base) == 1 # the same programs, the same base
    more, _ = run_page(project, 'critic', **sizes, only=['two seeds together', 'temperature by length'])
    found = {(r['arm'], r['seed']): r['metrics'] for r in more}
    assert more[:len(rows)] == rows and len(more) == len(rows) + 3 # with the ratio critic of seed 1
    both, *alone = (found[x]['brier'] for x in (('two seeds together', 0), ('ratio', 0), ('ratio', 1)))
    assert both not in alone and both < max(alone) + .05
    assert 0 <= found['temperature by length', 0]['ece'] <= 1

def test_compare_page_runs(project):
    """nbs/studies/compare.ipynb, whose kept outputs come from full runs, runs from top to bottom on a small budget:
    all arms; and again from its results file, without training."""
    sizes = dict(steps=4, judged=12, samples=2, critic_steps=3, studies=['main'])
    rows, _ = run_page(project, 'compare', run=True, **sizes)
    arms = ['baseline', 'credit', 'oracle', 'shuffled', 'risk', 'gae', 'rho1', 'focal', 'dft', 'ntp', 'all']
    assert sorted(r['arm'] for r in rows) == sorted(arms)
    for r in rows: assert len(r['passed']) == 12 and len(r['sampled'].split(',')) == 12, r['arm']
    losses = {r['arm']: tuple(r['losses']) for r in rows}
    assert len(set(losses.values())) == len(arms) # every arm trained on a loss of its own
    again, printed = run_page(project, 'compare', run=False, **sizes)
    assert again == rows and '11 of 11 policies' in printed
