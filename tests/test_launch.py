"""Launching for real: the command, papermill, kernels, processes that are stopped, killed and left behind.

The project under test is a copy: the package's sources, the configs and nbs/launch.ipynb, with a stand-in for the
trainer. The stand-in suffices because launching knows a pipeline only by its command line and by the files it writes
into its record. Training end to end is tested elsewhere.
"""
import json, os, shutil, signal, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil, pytest

REPO = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
NAMES = ('MLFLOW_TRACKING_USERNAME', 'MLFLOW_TRACKING_PASSWORD', 'AWS_ACCESS_KEY_ID', 'AWS_SECRET_ACCESS_KEY',
         'HF_TOKEN')
SECRETS = {k: f'planted-{k.lower()}-5f1e' for k in NAMES}

TRAINER = '''
import json, os, subprocess, sys, time
from pathlib import Path
from weighted_mtp.config import UserError, load_config
args = sys.argv[1:]
overrides = [args[i+1] for i, a in enumerate(args) if a == '--override']
try: config = load_config(args[args.index('--config')+1], overrides)
except UserError as e: sys.exit(f'Error: {e}')
assert os.environ['HF_TOKEN'].startswith('planted'), 'the run must find its secrets'
run, kind = Path(os.environ['WMTP_RUN_DIR']), config.experiment.name
print('making the data set')
if kind == 'broken': print('storage/train.jsonl, line 7: not JSON', file=sys.stderr); sys.exit(2)
if kind == 'bug': raise RuntimeError('a bug')
if kind == 'slow': print('training', flush=True); time.sleep(300)
if kind == 'long':
    deaf = ("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('grandchild', flush=True); "
            "time.sleep(300)")
    subprocess.Popen([sys.executable, '-c', deaf], start_new_session=True)
    time.sleep(300)
for step in range(1, 5):
    time.sleep(.15)
    (run/'p').write_text(json.dumps(dict(step=step, max_steps=4, epoch=step/4, loss=.7/step)))
    os.replace(run/'p', run/'progress.json')
root = Path.cwd()
(run/'tokens.html').write_text('<b>a picture worth looking at</b>')
(run/'result.json').write_text(json.dumps(dict(
    mlflow_run_id='ab12', mlflow_uri=f'sqlite:///{root}/storage/mlflow.db', pictures=[str(run/'tokens.html')],
    metrics={'accuracy': config.training.beta*config.training.batch_size/10},
    checkpoints={'best': str(root/'storage/checkpoint_best.pt')})))
'''

@pytest.fixture(scope='session')
def project(tmp_path_factory):
    root = tmp_path_factory.mktemp('project')
    no_cache = shutil.ignore_patterns('__pycache__')
    for part in ('configs', 'weighted_mtp'): shutil.copytree(REPO/part, root/part, ignore=no_cache)
    for part in ('settings.ini', 'nbs/launch.ipynb', '.env.example', 'runs/README.md'):
        (root/part).parent.mkdir(exist_ok=True); shutil.copy(REPO/part, root/part)
    pipelines = root/'weighted_mtp'/'pipelines'
    shutil.rmtree(pipelines, ignore_errors=True); pipelines.mkdir(); (pipelines/'__init__.py').touch()
    (pipelines/'run_critic.py').write_text(TRAINER)
    (root/'configs/critic/critic_micro.yaml').write_text('''pipeline: critic
experiment: {name: critic-pretrain}
dataset: {train: train.jsonl, validation: validation.jsonl}
training: {batch_size: 8, gradient_accumulation_steps: 1}
''')
    (root/'.env').write_text('\n'.join(f'{k}={v}' for k, v in {**SECRETS, 'AWS_DEFAULT_REGION': 'eu-north-1'}.items()))
    (root/'home').mkdir()
    return root

@pytest.fixture
def here(project, monkeypatch): # the tests' own process works in the project too
    monkeypatch.chdir(project)
    return project

def environment(project):
    own = {k: v for k, v in os.environ.items() if k not in SECRETS}
    return {**own, 'PYTHONPATH': str(project), 'HOME': str(project/'home'), 'PATH': f"{BIN}:{os.environ['PATH']}"}

def start(project, *words, **kw):
    return subprocess.Popen(words, cwd=project, env=environment(project), stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **kw)

def shell(project, *words, cwd=None, timeout=60):
    done = subprocess.run(words, cwd=cwd or project, env=environment(project), capture_output=True, text=True,
                          timeout=timeout)
    printed = done.stdout + done.stderr # searched for secrets below
    if printed: (project/'home'/f'printed-{time.monotonic_ns()}').write_text(printed)
    return done

def wmtp(project, *words): return shell(project, 'wmtp-launch', *words)
def papermill(project, out, *parameters, notebook='nbs/launch.ipynb', options=()):
    words = [w for p in parameters for w in ('-p', *p.split('=', 1))]
    return shell(project, 'papermill', notebook, out, '--no-progress-bar', *options, *words)
def in_one_kernel(project, out, requests, options=(), env=None):
    """papermill reads each request's words and fills in its parameters; then all cells run in one kernel, since
    starting many takes longer than the rest."""
    import nbformat
    from click.testing import CliRunner
    from papermill.cli import papermill as command
    cells = []
    for r in requests:
        words = [w for k, v in r.items() for w in ('-p', k, str(v))]
        files = [str(project/'nbs/launch.ipynb'), str(project/'one.ipynb')]
        done = CliRunner().invoke(command, [*files, '--prepare-only', *words])
        assert done.exit_code == 0, done.output
        filled = [c for c in nbformat.read(project/'one.ipynb', 4).cells if c.cell_type == 'code']
        cells += [nbformat.v4.new_code_cell(c.source) for c in filled] # without tags: no parameter is left to give
    nbformat.write(nbformat.v4.new_notebook(cells=cells), project/'one.ipynb')
    words = [BIN/'papermill', 'one.ipynb', out, '-k', 'python3', '--no-progress-bar', *options]
    env = env or environment(project)
    return subprocess.run(words, cwd=project, env=env, capture_output=True, text=True, timeout=600)
def record(project, name): return json.loads((project/'runs'/name/'record.json').read_text())
def records(project): return {p.name for p in (project/'runs').iterdir() if p.is_dir()}
def until(done, seconds=30):
    end = time.time() + seconds
    while not done():
        assert time.time() < end, 'took too long'
        time.sleep(.05)

# ---- the plan

MODULE = '-m weighted_mtp.pipelines.run_{p} --config configs/{p}/{p}.yaml'
TORCHRUN = 'uv run torchrun --nproc_per_node={n} --nnodes=1 --node_rank=0 ' + MODULE
PLAIN = 'uv run python ' + MODULE
B, A = ' --override training.batch_size=', ' --override training.gradient_accumulation_steps='
C = ' --override experiment.critic_checkpoint='
BEST = 'storage/checkpoints/critic/critic-pretrain/checkpoint_best.pt'
PRESETS = {1: 'gpu-a100-80g-small', 2: 'gpu-a100-80g-medium', 4: 'gpu-a100-80g-large'}
GUIDE = [ # every example of the guide's usage and workflow sections
    (dict(pipeline='critic', ngpus=4), TORCHRUN, 48),
    (dict(pipeline='critic', ngpus=1), PLAIN.replace('/{p}.yaml', '/{p}_1gpu.yaml'), 24),
    (dict(pipeline='critic', ngpus=2), TORCHRUN, 24),
    (dict(pipeline='critic', ngpus=4, batch_size=8, grad_accum=3), TORCHRUN + B + '8' + A + '3', 96),
    (dict(pipeline='verifiable', ngpus=4), TORCHRUN, 96),
    (dict(pipeline='verifiable', ngpus=4, critic_checkpoint=BEST), TORCHRUN + C + BEST, 96),
    (dict(pipeline='verifiable', ngpus=4, critic_checkpoint='storage/checkpoints/critic/best.pt', batch_size=4,
          grad_accum=6),
     TORCHRUN + B + '4' + A + '6' + C + 'storage/checkpoints/critic/best.pt', 96),
    (dict(pipeline='verifiable', ngpus=1), PLAIN, 24),
    (dict(pipeline='baseline', ngpus=4), TORCHRUN, 96),
    (dict(pipeline='baseline', ngpus=1, batch_size=2, grad_accum=8), PLAIN + B + '2' + A + '8', 16),
    (dict(pipeline='baseline', ngpus=2, batch_size=6, grad_accum=2), TORCHRUN + B + '6' + A + '2', 24),
    (dict(pipeline='rho1', ngpus=4), TORCHRUN, 128),
    (dict(pipeline='rho1', ngpus=2, batch_size=4, grad_accum=3), TORCHRUN + B + '4' + A + '3', 24),
    (dict(pipeline='ntp', ngpus=1), PLAIN, 24),
    (dict(pipeline='ntp', ngpus=4, batch_size=8, grad_accum=2), TORCHRUN + B + '8' + A + '2', 64),
    (dict(pipeline='critic', ngpus=1, batch_size=2, grad_accum=4),
     PLAIN.replace('/{p}.yaml', '/{p}_1gpu.yaml') + B + '2' + A + '4', 8),
    (dict(pipeline='baseline', ngpus=1, batch_size=2, grad_accum=4), PLAIN + B + '2' + A + '4', 8),
    (dict(pipeline='critic', ngpus=1, batch_size=6, grad_accum=4),
     PLAIN.replace('/{p}.yaml', '/{p}_1gpu.yaml') + B + '6' + A + '4', 24),
    (dict(pipeline='critic', ngpus=2, batch_size=3, grad_accum=4), TORCHRUN + B + '3' + A + '4', 24),
    # numbers as text, overrides in order
    (dict(pipeline='critic', ngpus='4', batch_size='2', grad_accum='3',
          overrides='training.beta=0.5 training.beta=0.7'),
     TORCHRUN + B + '2' + A + '3 --override training.beta=0.5 --override training.beta=0.7', 24)]

@pytest.mark.parametrize('request_,line,effective', GUIDE)
def test_guide_examples(here, request_, line, effective):
    from weighted_mtp.launch import make_plan
    n, p = int(request_['ngpus']), request_['pipeline']
    plan = make_plan(**request_)
    assert plan.command_line == line.format(n=n, p=p)
    assert (plan.effective_batch, plan.preset) == (effective, PRESETS[n])
    y = plan.run_yaml
    assert (y['name'], y['resources']['cluster']) == (f'weighted-mtp-{p}-{n}gpu', 'vessl-kr-a100-80g-sxm')
    assert y['run'][-1]['command'] == plan.command_line
    assert any(k.startswith('NCCL') for k in y['env']) == (n > 1)
    assert set(y) <= {'name', 'description', 'tags', 'resources', 'image', 'import', 'export', 'env', 'run'}
    assert set(y['export']) < set(y['import']) and y['env']['HF_TOKEN'] == {'secret': 'HF_TOKEN'}
    # no side effects, and the same on another machine
    assert plan == make_plan(**request_) and str(here) not in json.dumps(plan.to_dict())

def test_local_plan(here):
    from weighted_mtp.launch import make_plan
    plan = make_plan('critic', 2, target='local', overrides=['training.seed=1'])
    assert plan.command_line == ('torchrun --nproc_per_node=2 --nnodes=1 --node_rank=0 '
                                 '-m weighted_mtp.pipelines.run_critic --config configs/critic/critic_micro.yaml '
                                 '--override training.seed=1')
    assert (plan.preset, plan.run_yaml, plan.effective_batch) == (None, None, 16)

def test_verifiable_waits_for_a_critic(here):
    from weighted_mtp.launch import make_plan
    local = dict(target='local', config='configs/verifiable/verifiable.yaml')
    def blockers(path): return '\n'.join(make_plan('verifiable', 1, critic_checkpoint=path, **local).blockers)
    assert 'storage/none.pt not found' in blockers('storage/none.pt')
    assert 'checkpoint' not in blockers('settings.ini')

# ---- what a user can get wrong

BAD = [(['critc', '--ngpus', '1'], "Did you mean 'critic'"),
    (['critic'], 'only 1, 2 or 4 GPUs are supported'),
    *[(['critic', '--ngpus', n], 'only 1, 2 or 4 GPUs are supported') for n in ('0', '3', '8', 'four', '4.0', '')],
    *[(['critic', '--ngpus', '1', '--batch-size', b], 'whole number of at least 1')
      for b in ('-1', '1.5', '0', 'eight')],
    (['critic', '--ngpus', '1', '--override', 'training.batchsize=8'], "Did you mean 'training.batch_size'"),
    (['critic', '--ngpus', '1', '--override', 'training.batch_size=eight'], 'training.batch_size'),
    (['critic', '--ngpus', '1', '--override', 'nonsense'], 'key=value'),
    (['critic', '--ngpus', '1', '--config', 'configs/critic/none.yaml'], 'not found'),
    (['critic', '--ngpus', '1', '--config', 'torn.yaml'], 'torn.yaml is not YAML'),
    (['critic', '--ngpus', '4', '--effective-batch', '24', '--batch-size', '2'], 'either the product or its factors'),
    (['critic', '--ngpus', '4', '--effective-batch', '25'], '24 and 28'),
    (['baseline', '--ngpus', '1', '--critic-checkpoint', 'x.pt'], 'verifiable only'),
    (['critic', '--ngpus', '1', '--target', 'moon'], 'vessl, local'),
    (['critic', '--ngpus', '1', '--target', 'local', '--name', '../x'], 'plain folder name'),
    (['critic', '--ngpus', '1', '--override', f"experiment.description={SECRETS['HF_TOKEN']}"], 'HF_TOKEN'),
    (['critic', '--ngpus', '1'], 'vessl configure')]

def test_bad_requests_by_command(project):
    (project/'torn.yaml').write_text('training: [')
    before = records(project)
    with ThreadPoolExecutor(2) as pool: ended = list(pool.map(lambda case: wmtp(project, *case[0]), BAD))
    for (words, says), done in zip(BAD, ended):
        assert (done.returncode, done.stdout) == (2, ''), (words, done)
        assert says in done.stderr and done.stderr.startswith('Error: '), (words, done.stderr)
        assert 'Traceback' not in done.stderr, (words, done.stderr)
        assert len(done.stderr.splitlines()) == 1, done.stderr
    assert records(project) == before # nothing was started and nothing left

def test_all_problems_at_once(here):
    from weighted_mtp.launch import UserError, launch
    with pytest.raises(UserError) as e:
        launch('critc', ngpus=8, batch_size=-1, overrides=['training.batchsize=8', 'training.beta=warm'], target='vesl',
               critic_checkpoint='x', name='/')
    assert len(str(e.value).splitlines()) == 7

def test_without_env_file(project):
    (project/'.env').rename(project/'.env-away')
    try:
        done = wmtp(project, 'critic', '--ngpus', '4')
        assert done.returncode == 2 and 'cp .env.example .env' in done.stderr
        assert wmtp(project, 'critic', '--ngpus', '4', '--dry-run', '--name', 'no-env').returncode == 0
    finally: (project/'.env-away').rename(project/'.env')

def test_light_imports(project):
    code = """import sys, time
t = time.perf_counter()
import weighted_mtp.{0}
heavy = ('torch', 'vessl', 'mlflow', 'pandas', 'papermill', 'numpy')
print([m for m in heavy if m in sys.modules], round(time.perf_counter() - t, 3))"""
    for module in ('launch', 'form', 'targets', 'commands'):
        out = shell(project, sys.executable, '-c', code.format(module)).stdout
        print(module, out)
        assert out.startswith('[] ')

# ---- one contract, four entry points

def test_entry_points_agree(here):
    from weighted_mtp.form import LaunchForm
    from weighted_mtp.launch import launch
    request = dict(ngpus=4, effective_batch=24, overrides=['training.beta=0.5', 'training.seed=1'], dry_run=True)
    launch('critic', name='by-cell', **request)
    def by_command():
        return wmtp(here, 'critic', '--ngpus', '4', '--effective-batch', '24', '--override', 'training.beta=0.5',
                    '--override', 'training.seed=1', '--dry-run', '--name', 'by-command')
    def by_papermill():
        return papermill(here, 'runs/by.ipynb', 'pipeline=critic', 'ngpus=4', 'effective_batch=24',
                         'overrides=training.beta=0.5 training.seed=1', 'dry_run=True', 'name=by-papermill')
    with ThreadPoolExecutor(2) as pool: ended = list(pool.map(lambda call: call(), (by_command, by_papermill)))
    assert [d.returncode for d in ended] == [0, 0] and ended[0].stderr == '', ended
    form = LaunchForm(pipeline='critic', **request)
    form.button.click()
    # the tests' own package may hold other pipelines than the copy's: that warning aside, all must be equal
    names = ('by-cell', 'by-command', 'by-papermill', form.view.run.name)
    plans = [{**record(here, n)['plan'], 'warnings': None} for n in names]
    assert plans[0] == plans[1] == plans[2] == plans[3]
    assert record(here, 'by-command')['plan'] == record(here, 'by-papermill')['plan']
    assert {record(here, n)['status'] for n in names} == {'planned'}

def test_same_name_twice(project):
    def launch_same(_): return wmtp(project, 'critic', '--ngpus', '1', '--dry-run', '--name', 'same')
    with ThreadPoolExecutor(2) as pool: done = list(pool.map(launch_same, range(2)))
    assert [d.returncode for d in done] == [0, 0]
    assert {n for n in records(project) if n.startswith('same')} == {'same', 'same-2'}
    assert all(record(project, n)['name'] == n for n in ('same', 'same-2'))

def test_papermill_runs_and_repeats(project):
    done = papermill(project, 'runs/x.ipynb', 'pipeline=critic', 'ngpus=1', 'target=local', 'name=pm',
                     'overrides=training.beta=0.5', options=['--log-output'])
    assert done.returncode == 0, done.stderr
    for part in ('100%', 'mlflow ui --backend-store-uri sqlite:///storage/mlflow.db', 'storage/checkpoint_best.pt'):
        assert part in done.stderr, part
    r = record(project, 'pm')
    assert (r['status'], r['exit_code'], r['notebook']) == ('completed', 0, 'runs/x.ipynb')
    kept = (project/'runs/pm/launch.ipynb').read_text()
    assert 'mlflow ui' in kept and '<b>a picture' in kept # as executed: its last cell's outputs are there
    assert 'unknown parameter' not in done.stderr and 'Unable to parse' not in done.stderr
    # the record's own notebook, from another folder of the project
    done = shell(project, 'papermill', '../runs/pm/launch.ipynb', '../runs/again.ipynb', '--no-progress-bar',
                 cwd=project/'nbs')
    assert done.returncode == 0, done.stderr
    again = record(project, 'pm-2')
    assert again['plan'] == r['plan'] and {**again['request'], 'name': None} == {**r['request'], 'name': None}
    results = [json.loads((project/'runs'/n/'result.json').read_text()) for n in ('pm', 'pm-2')]
    assert results[0]['metrics'] == results[1]['metrics']

REFUSED = [(['pipeline=critic', 'ngpus=8'], 'only 1, 2 or 4 GPUs'),
           (['pipeline=critic', 'ngpus=1', 'batchsize=8'], "Did you mean 'batch_size'"),
           (['ngpus=1'], 'pipeline is missing')]

def test_papermill_refused(project):
    before = records(project)
    def run(case): return papermill(project, f'runs/refused-{id(case)}.ipynb', *case[0])
    with ThreadPoolExecutor(3) as pool: ended = list(pool.map(run, REFUSED))
    for (_, says), done in zip(REFUSED, ended):
        last = done.stderr.split('Exception encountered')[-1]
        assert done.returncode == 1 and says in last and 'File "' not in last # the message comes last, and no traceback
    assert records(project) == before

def test_papermill_of_a_failing_run(project):
    done = papermill(project, 'runs/failing.ipynb', 'pipeline=critic', 'ngpus=1', 'target=local', 'name=failing',
                     'overrides=experiment.name=broken')
    assert done.returncode == 1 and 'line 7: not JSON' in done.stderr.split('Exception encountered')[-1]
    assert (record(project, 'failing')['status'], record(project, 'failing')['exit_code']) == ('failed', 2)
    assert 'line 7: not JSON' in (project/'runs/failing/launch.ipynb').read_text()

# ---- records of earlier versions

def test_a_record_from_before_the_notebooks_moved(here, capsys):
    "`old_record` is what `wmtp-launch … --dry-run` left at commit 08099fd, when all notebooks lay in `nbs/`."
    from weighted_mtp.launch import Run, relaunch
    from weighted_mtp.records import list_records, load_record
    shutil.copytree(REPO/'tests'/'old_record', here/'runs'/'before')
    old = load_record('before')
    row = list_records().set_index('name').loc['before']
    assert (row.status, row.pipeline, row.ngpus, row.effective_batch) == ('planned', 'critic', 4, 24)
    shown = shell(here, 'wmtp-runs', 'show', 'before')
    assert shown.returncode == 0 and 'before: planned' in shown.stdout and '--nproc_per_node=4' in shown.stdout, shown
    again = relaunch('before', dry_run=True)
    assert again.name == 'before-2'
    new = again.record()
    assert {**new['request'], 'name': None} == {**old['request'], 'name': None}
    for k in old['plan']: assert new['plan'][k] == old['plan'][k], k
    names = {} # its notebook, cell by cell
    for cell in json.loads((here/'runs/before/launch.ipynb').read_text())['cells']: exec(''.join(cell['source']), names)
    assert names['run'] == Run('before-3') and names['run'].record()['plan'] == new['plan']

# ---- local runs

def test_command_follows_a_run(project):
    kinds = [('critic-pretrain', 0, ''), ('broken', 1, 'line 7: not JSON'), ('bug', 1, 'RuntimeError: a bug')]
    def run(kind):
        return wmtp(project, 'critic', '--ngpus', '1', '--target', 'local', '--override', f'experiment.name={kind[0]}',
                    '--name', f'followed-{kind[0]}')
    with ThreadPoolExecutor(2) as pool: ended = list(pool.map(run, kinds))
    for (_, code, says), done in zip(kinds, ended): # a bug's traceback is in the log
        assert done.returncode == code and says in done.stderr and 'Traceback' not in done.stderr, done
    assert 'record      runs/followed-critic-pretrain' in ended[0].stdout and '4/4' in ended[0].stdout

def heed_ctrl_c(): # where a shell runs pytest in the background, it is ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)

def start_long(project, name, kind='long'): # long: with a grandchild that ignores SIGTERM, in a session of its own
    p = start(project, 'wmtp-launch', 'critic', '--ngpus', '1', '--target', 'local', '--name', name,
              '--override', f'experiment.name={kind}', preexec_fn=heed_ctrl_c)
    log = project/'runs'/name/'log.txt'
    until(lambda: log.is_file() and ('training' if kind == 'slow' else 'grandchild') in log.read_text())
    return p, project/'runs'/name

def processes(folder):
    from weighted_mtp.local_target import run_processes
    return run_processes(folder)

def test_interrupt_stops_the_run(project):
    p, folder = start_long(project, 'interrupted', 'slow')
    assert len(processes(folder)) == 2
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=30)
    assert p.returncode == 130 and 'Run interrupted: stopped' in err and 'Traceback' not in err
    assert record(project, 'interrupted')['status'] == 'stopped' and not processes(folder)

def test_run_outlives_its_launcher_and_is_stopped_from_elsewhere(here):
    from weighted_mtp.launch import Run
    p, folder = start_long(here, 'orphan')
    p.kill(); p.wait()
    run = Run('orphan')
    assert run.status() == 'running' and len(processes(folder)) == 3
    from weighted_mtp.targets import LocalTarget
    assert LocalTarget().stop(folder, grace=.5) == 'stopped'
    assert not processes(folder) and run.status() == 'stopped'

def test_supervisor_killed(here):
    from weighted_mtp.launch import Run, UserError
    p, folder = start_long(here, 'unwatched')
    ids = record(here, 'unwatched')['ids']
    child = psutil.Process(ids['pid']).children()[0]
    os.kill(ids['pid'], signal.SIGKILL)
    out, err = p.communicate(timeout=30)
    assert p.returncode == 1 and 'supervised this run is gone' in err
    with pytest.raises(UserError, match='gone'): Run('unwatched').wait()
    if sys.platform == 'linux': until(lambda: not child.is_running())
    for q in processes(folder): q.kill()

def test_the_end_is_written_when_nobody_waits(project):
    code = ("from weighted_mtp.launch import launch; import os; "
            "launch('critic', 1, target='local', name='alone'); os._exit(1)") # as a kernel that dies
    shell(project, sys.executable, '-c', code)
    until(lambda: record(project, 'alone')['status'] == 'completed')

def test_workflow_stops_at_a_failure_and_skips_what_is_done(here):
    from weighted_mtp.launch import UserError, workflow
    critic = dict(pipeline='critic', ngpus=1, target='local')
    stages = [dict(critic, name='wf-good', overrides=['training.seed=77']),
              dict(critic, name='wf-bad', overrides=['experiment.name=broken']), dict(critic, name='wf-never')]
    before = records(here)
    failure = r'(?s)Stage 2 of 3 \(critic\) did not complete.*line 7: not JSON'
    with pytest.raises(UserError, match=failure): workflow(stages, progress=False)
    assert records(here) - before == {'wf-good', 'wf-bad'}
    with pytest.raises(UserError, match='Stage 2 of 3'): workflow(stages, skip=True, progress=False)
    assert records(here) - before == {'wf-good', 'wf-bad', 'wf-bad-2'} # the first was not run again
    with pytest.raises(UserError, match='batch_size = 0'):
        workflow([stages[0], {**stages[1], 'batch_size': 0}], progress=False)
    assert records(here) - before == {'wf-good', 'wf-bad', 'wf-bad-2'} # a workflow that cannot work is not begun

def test_form_refreshes_itself_in_a_kernel(project):
    import nbformat
    from nbclient import NotebookClient
    cells = ['''
from weighted_mtp.form import LaunchForm
form = LaunchForm(pipeline='critic', ngpus=1, target='local')
form.button.click()
print(form.message.value)''', '''
import asyncio
seen = []
for _ in range(200):
    if form.view and form.view.head.value not in seen: seen.append(form.view.head.value)
    if seen and 'completed' in seen[-1]: break
    await asyncio.sleep(.05)
print(seen)''']
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    resources = {'metadata': {'path': str(project)}}
    client = NotebookClient(nb, kernel_name='python3', resources=resources, timeout=60)
    client.execute(env=environment(project))
    texts = [''.join(o.get('text', '') for o in c.outputs) for c in nb.cells]
    assert 'starting' in texts[0] and 'running' in texts[1] and 'completed' in texts[1]

def test_launch_notebook_without_parameters(project):
    done = shell(project, 'jupyter', 'nbconvert', '--to', 'notebook', '--execute', '--stdout', 'nbs/launch.ipynb')
    assert done.returncode == 0 and 'widget-view' in done.stdout, done.stderr[-500:]

def test_no_secret_was_written_or_printed(project): # last: everything above has left its traces
    files = [p for p in project.rglob('*') if p.is_file() and p.name != '.env']
    assert len(files) > 50
    for p in files:
        text = p.read_bytes()
        for name, secret in SECRETS.items(): assert secret.encode() not in text, (p, name)
