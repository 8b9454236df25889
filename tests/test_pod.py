"""What the cluster runs is run: the commands of the planned YAML, in order, in a folder laid out like its container.

The folder has a home of its own, the volumes as the YAML imports them, and no checkout: the pinned commit is cloned
from a bare repository. `image/` is a Python with torch and everything else in its own site-packages, as the container's
image is. Three things differ from the cluster, none of which the project decides:

* no package index: pip gets none, so that the test fails if anything would be downloaded;
* `nvidia-smi` is a stand-in that prints a line;
* `uv` is a stand-in where this machine has none: it does what `uv run` does under UV_NO_SYNC=1, no more.
"""
import shutil, sqlite3, subprocess, sys, sysconfig
from pathlib import Path

import pytest, torch, yaml

REPO = Path(__file__).resolve().parent.parent
UV = '''#!/bin/sh
test "$1" = run && test "$UV_NO_SYNC" = 1 || { echo "a stand-in: only uv run, with UV_NO_SYNC=1" >&2; exit 2; }
shift
export VIRTUAL_ENV="$PWD/.venv" PATH="$PWD/.venv/bin:$PATH"
exec "$@"
'''

def git(*words, at):
    config = ['-c', 'user.name=x', '-c', 'user.email=x@example.org', '-c', 'init.defaultBranch=main']
    return subprocess.run(['git', *config, *words], cwd=at, check=True, capture_output=True, text=True).stdout.strip()

def program(path, text):
    path.write_text(text)
    path.chmod(0o755)

def link_all(source, to, skip=()):
    to.mkdir(parents=True, exist_ok=True)
    for f in Path(source).iterdir():
        if f.name not in skip and 'weighted_mtp' not in f.name: (to/f.name).symlink_to(f)

def make_image(root):
    "A Python of its own, whose site-packages are those of this environment, without this project."
    base, name = Path(sys.base_prefix), f'python{sys.version_info.major}.{sys.version_info.minor}'
    (root/'bin').mkdir(parents=True)
    shutil.copy(Path(sys.executable).resolve(), root/'bin'/name) # a copy: Python looks for its library beside it
    (root/'bin/python3').symlink_to(name)
    (root/'bin/python').symlink_to(name)
    link_all(base/'lib', root/'lib', skip=(name,))
    link_all(sysconfig.get_path('stdlib'), root/'lib'/name, skip=('site-packages', 'dist-packages'))
    link_all(sysconfig.get_path('purelib'), root/'lib'/name/'site-packages')
    torchrun = 'import sys\nfrom torch.distributed.run import main\nsys.exit(main())\n'
    program(root/'bin/torchrun', f'#!{root}/bin/python3\n{torchrun}')
    return root

@pytest.fixture(scope='module')
def project(tmp_path_factory):
    "A checkout whose main branch is pushed; `pod/` is what the container has."
    root = tmp_path_factory.mktemp('cluster')
    listed = git('ls-files', '-co', '--exclude-standard', at=REPO).splitlines()
    for f in (f for f in listed if (REPO/f).is_file()):
        (root/'here'/f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPO/f, root/'here'/f)
    settings = (REPO/'settings.ini').read_text().splitlines()
    ours = dict(git_url=f'file://{root}/weighted-mtp.git', workdir=f'{root}/pod/root/weighted-mtp',
                mlflow_uri='http://127.0.0.1:9')
    keep = [line for line in settings if line.partition(' =')[0] not in ours]
    (root/'here/settings.ini').write_text('\n'.join([*keep, *(f'{k} = {v}' for k, v in ours.items())]) + '\n')
    git('init', '-q', '--bare', 'weighted-mtp.git', at=root)
    git('init', '-q', at=root/'here')
    git('add', '.', at=root/'here')
    git('commit', '-qm', 'planned', at=root/'here')
    git('remote', 'add', 'origin', f'{root}/weighted-mtp.git', at=root/'here')
    git('push', '-q', 'origin', 'main', at=root/'here')
    return root

def lay_out(run, volumes): # what stands before the first command: clone and copies of the volumes
    for to, source in run['import'].items():
        if isinstance(source, str): shutil.copytree(volumes/source.rpartition('/')[2], to)
        else:
            git('clone', '-q', source['git']['url'], to, at='/')
            git('checkout', '-q', source['git']['ref'], at=to)

def environment(root, run):
    own = {'HOME': str(root/'pod/home'), 'PATH': f"{root}/image/bin:{root}/tools:/usr/local/bin:/usr/bin:/bin"}
    # to pip, a `no` option that is 0 means no: it builds with the setuptools that is here
    offline = {'PIP_NO_INDEX': '1', 'PIP_NO_BUILD_ISOLATION': '0', 'PIP_DISABLE_PIP_VERSION_CHECK': '1',
               'UV_OFFLINE': '1', 'OMP_NUM_THREADS': '1'}
    return {**own, **offline, **{k: v for k, v in run['env'].items() if isinstance(v, str)}}

def execute(steps, env): # one shell a command; the first that fails ends it
    for step in steps:
        done = subprocess.run(['bash', '-c', step['command']], cwd=step['workdir'], env=env, capture_output=True,
                              text=True, timeout=300)
        assert done.returncode == 0, (step['command'], done.stdout[-2000:], done.stderr[-3000:])
    return done

@pytest.fixture(scope='module')
def pod(project):
    make_image(project/'image')
    (project/'tools').mkdir()
    program(project/'tools/nvidia-smi', '#!/bin/sh\necho no GPU here\n')
    if not (uv := shutil.which('uv')): program(project/'tools/uv', UV)
    else: (project/'tools/uv').symlink_to(uv)
    (project/'pod/home').mkdir(parents=True)
    for v in ('models', 'datasets', 'checkpoints', 'mlruns'): (project/'volumes'/v).mkdir(parents=True)
    return project

SMALL = ['dataset.n_problems=40', 'data_sampling.n_validation=20', 'model.backbone=micro', 'model.hidden_size=32',
         'model.n_layers=2', 'model.n_heads=2', 'training.max_steps=2', 'training.batch_size=4',
         'training.cpu_threads=1', 'mlflow.tracking_uri=sqlite:///storage/mlruns/mlflow.db']

def plan_here(project, monkeypatch, **fields):
    from weighted_mtp.plan import make_plan
    monkeypatch.chdir(project/'here')
    return make_plan('baseline', 2, config='configs/baseline/baseline_micro.yaml', overrides=SMALL, **fields)

def test_the_planned_commands_train_in_the_container(pod, monkeypatch):
    plan = plan_here(pod, monkeypatch)
    run = yaml.safe_load(yaml.safe_dump(plan.run_yaml)) # as it is sent
    head = git('rev-parse', 'HEAD', at=pod/'here')
    assert f'commit {head} of' in str(plan) and not [w for w in plan.warnings if 'git' in w.lower()], plan.warnings
    (pod/'here/settings.ini').open('a').write('# newer\n') # main moves on between the plan and the clone
    git('commit', '-qam', 'newer', at=pod/'here')
    git('push', '-q', 'origin', 'main', at=pod/'here')
    lay_out(run, pod/'volumes')
    env = environment(pod, run)
    done = execute(run['run'], env)
    workdir = Path(run['run'][0]['workdir'])
    assert git('rev-parse', 'HEAD', at=workdir) == head
    assert 'test/loss' in done.stdout, done.stdout
    installed = {p.name for p in (workdir/'.venv/lib').glob('python*/site-packages/*')}
    assert not {p for p in installed if 'weighted_mtp' not in p} - {'__pycache__'}, installed # no second torch
    exported = {source.rpartition('/')[2]: Path(folder) for folder, source in run['export'].items()}
    assert set(exported) == {'checkpoints', 'mlruns'}
    best = exported['checkpoints']/'baseline/baseline-micro/checkpoint_best.pt'
    assert torch.load(best, weights_only=True)['step'] == 2
    database = sqlite3.connect(exported['mlruns']/'mlflow.db')
    assert database.execute('select name, status from runs').fetchall() == [('baseline-micro', 'FINISHED')]
    where = "import sys; from importlib.util import find_spec as f; " # what a run on 1 GPU is started with
    where += "print(sys.prefix, *(f(name).origin for name in ('torch', 'weighted_mtp')))"
    one = execute([dict(command=f'uv run python -c "{where}"', workdir=str(workdir))], env).stdout.split()
    assert one[0] == f'{workdir}/.venv' and one[1].startswith(f'{pod}/image/'), one
    assert one[2] == f'{workdir}/weighted_mtp/__init__.py', one

def test_warnings_of_code_that_the_cluster_does_not_have(project, monkeypatch):
    from weighted_mtp import preflight
    def warnings():
        preflight._code_state.cache_clear() # it holds for three seconds
        return '\n'.join(plan_here(project, monkeypatch).warnings)
    here, url = project/'here', project/'weighted-mtp.git'
    pushed = git('rev-parse', 'HEAD', at=here)
    assert 'ommit' not in warnings()
    (here/'settings.ini').open('a').write('# mine\n')
    assert 'changes that are not committed' in warnings()
    git('commit', '-qam', 'mine', at=here)
    assert 'is on no remote branch' in warnings()
    git('push', '-q', 'origin', 'HEAD:mine', at=here) # to another branch: main stays what it was
    mine = git('rev-parse', 'HEAD', at=here)
    assert f'The cluster runs commit {pushed[:8]} (git ref main), and here is {mine[:8]}' in warnings()
    git('commit', '-q', '--allow-empty', '-m', 'more', at=here)
    url.rename(project/'away.git')
    assert 'Git ref main of git_url could not be looked up' in warnings()
