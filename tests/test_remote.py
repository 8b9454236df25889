"""MLflow and S3 servers on loopback: both are killed in the middle, and nothing that was logged or saved is lost."""
import base64, contextlib, json, os, shutil, signal, socket, subprocess, sys, time, urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3, pytest, torch

from weighted_mtp.config import UserError, apply_overrides
from weighted_mtp.mlflow_sender import SPOOLS
from weighted_mtp.remote import replay, wmtp_sync
from weighted_mtp.tracking import Tracker
from weighted_mtp.uploading import Uploader

REPO, BIN = Path(__file__).resolve().parent.parent, Path(sys.executable).parent
USER, PASSWORD = 'admin', 'a-password-that-shows-nowhere'

def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]

class Server:
    "A server process on a port of its own, which can be killed and started again."
    def __init__(self, folder, path, words, **env):
        self.folder, self.port, self.env = folder, free_port(), env
        self.uri = f'http://127.0.0.1:{self.port}'
        self.words, self.path, self.p = [str(BIN/words[0]), *words[1:], str(self.port)], path, None

    def start(self):
        with open(self.folder/'server.log', 'ab') as log:
            self.p = subprocess.Popen(self.words, cwd=self.folder, env=os.environ | self.env, stdout=log, stderr=log,
                                      start_new_session=True) # kill() ends its workers too
        end = time.monotonic() + 60
        while time.monotonic() < end and self.p.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(self.uri + self.path, timeout=5): return self
            time.sleep(.1)
        raise RuntimeError((self.folder/'server.log').read_text()[-3000:])

    def kill(self):
        if self.p is None: return
        with contextlib.suppress(ProcessLookupError): os.killpg(self.p.pid, signal.SIGKILL)
        self.p.wait()

@pytest.fixture(scope='module', autouse=True)
def environment(): # for this module only, and for the processes it starts
    names = {
        'MLFLOW_TRACKING_USERNAME': USER, 'MLFLOW_TRACKING_PASSWORD': PASSWORD,
        'MLFLOW_DISABLE_TELEMETRY': 'true', 'MLFLOW_HTTP_REQUEST_TIMEOUT': '5',
        'AWS_ACCESS_KEY_ID': 'AKIAEXAMPLE', 'AWS_SECRET_ACCESS_KEY': 'secret-example',
        'AWS_DEFAULT_REGION': 'eu-north-1', 'AWS_EC2_METADATA_DISABLED': 'true'}
    with pytest.MonkeyPatch.context() as m:
        m.delenv('MLFLOW_TRACKING_URI', raising=False)
        for k, v in names.items(): m.setenv(k, v)
        yield m

AUTH = '''[mlflow]
default_permission = READ
auth_cache_ttl_seconds = 600
database_uri = sqlite:///{folder}/auth.db
admin_username = {user}
admin_password = {password}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
'''

@pytest.fixture(scope='module')
def cold_server(tmp_path_factory, environment): # MLflow, not started yet
    folder = tmp_path_factory.mktemp('mlflow')
    (folder/'auth.ini').write_text(AUTH.format(folder=folder, user=USER, password=PASSWORD))
    words = ['mlflow', 'server', '--app-name', 'basic-auth', '--backend-store-uri', f'sqlite:///{folder}/mlflow.db',
             '--artifacts-destination', str(folder/'artifacts'), '--workers', '1', '--host', '127.0.0.1', '--port']
    server = Server(folder, '/health', words, MLFLOW_AUTH_CONFIG_PATH=str(folder/'auth.ini'),
                    MLFLOW_FLASK_SERVER_SECRET_KEY='for-tests', MLFLOW_SERVER_ENABLE_JOB_EXECUTION='false')
    yield server
    server.kill()

@pytest.fixture
def mlflow_server(cold_server):
    is_up = cold_server.p and cold_server.p.poll() is None
    return cold_server if is_up else cold_server.start()

@pytest.fixture(scope='module')
def s3_server(tmp_path_factory, environment):
    server = Server(tmp_path_factory.mktemp('s3'), '/moto-api/', ['moto_server', '-H', '127.0.0.1', '-p'])
    environment.setenv('AWS_ENDPOINT_URL', server.uri)
    yield server.start()
    server.kill()

def config(uri, name='demo'): return apply_overrides({}, [f'experiment.name={name}', f'mlflow.tracking_uri={uri}'])

def client(uri):
    from mlflow import MlflowClient
    return MlflowClient(uri)

def history(uri, run_id, name): return sorted((m.step, m.value) for m in client(uri).get_metric_history(run_id, name))

def runs(uri, name): # all runs of that name
    c = client(uri)
    e = c.get_experiment_by_name('weighted-mtp')
    return c.search_runs([e.experiment_id], f"attributes.run_name = '{name}'") if e else []

def until(true, seconds=30):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := true(): return value
        time.sleep(.2)
    raise AssertionError('it did not happen')

@pytest.fixture
def hanging(): # accepts connections and never answers
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0)); s.listen(50)
        yield f'http://127.0.0.1:{s.getsockname()[1]}'

# ------------------------------------------------------------------ MLflow

def test_mlflow_killed_and_restarted(cold_server, tmp_path, capfd):
    """The server is not there when the run starts, then up, killed while the run logs, and up again: each metric
    is there once, and the run has ended."""
    server = cold_server
    (tmp_path/'picture.html').write_text('<b>a picture</b>')
    t = Tracker(config(server.uri, 'outage'), tmp_path)
    t._worker.max_pause = 1 # pauses of half a minute are for real outages
    t.params({'training.batch_size': 8})
    for i in range(50): t.log({'train/loss': 1/(i+1), 'grad_norm': float(i)}, i)
    until(lambda: 'does not answer' in capfd.readouterr().err)
    server.start()
    until(lambda: 'works again' in capfd.readouterr().err)
    until(lambda: len(history(server.uri, t.run_id, 'train/loss')) == 50)
    for i in range(50, 150): # some of these are on their way when the server dies
        t.log({'train/loss': 1/(i+1), 'grad_norm': float(i)}, i)
        if i == 100: time.sleep(.1); server.kill()
    t.artifact(tmp_path/'picture.html', 'pictures')
    until(lambda: 'does not answer' in capfd.readouterr().err)
    server.start()
    for i in range(150, 160): t.log({'train/loss': 1/(i+1), 'grad_norm': float(i)}, i)
    assert t.close('FINISHED', 60) is True and not t.spool.exists()
    run, = runs(server.uri, 'outage')
    assert run.info.run_id == t.run_id and run.info.status == 'FINISHED'
    assert run.data.params == {'training.batch_size': '8'}
    assert history(server.uri, t.run_id, 'train/loss') == [(i, 1/(i+1)) for i in range(160)]
    assert history(server.uri, t.run_id, 'grad_norm') == [(i, float(i)) for i in range(160)]
    assert [f.path for f in client(server.uri).list_artifacts(t.run_id, 'pictures')] == ['pictures/picture.html']

def test_logging_does_not_wait_for_a_server_that_hangs(hanging, tmp_path, capfd):
    """A request to this server takes its whole time limit, 5 s; 300 steps that waited for one would take minutes."""
    t = Tracker(config(hanging), tmp_path)
    start = time.monotonic()
    t.params({'training.seed': 1})
    for i in range(300): t.log({'train/loss': 1/(i+1)}, i)
    assert time.monotonic() - start < 2
    until(lambda: 'does not answer' in capfd.readouterr().err)
    start = time.monotonic()
    assert t.close(timeout=.5) is False and time.monotonic() - start < 4
    assert 'wmtp-sync' in capfd.readouterr().err
    assert t.run_id is None and t.spool.read_text().count('train/loss') == 300

LOGS = '''
import sys, time
from weighted_mtp.config import apply_overrides
from weighted_mtp.tracking import Tracker
t = Tracker(apply_overrides({}, ['experiment.name=killed', 'mlflow.tracking_uri=' + sys.argv[1]]), sys.argv[2])
t.params({'training.seed': 1})
for i in range(1000):
    t.log({'train/loss': float(i)}, i)
    print(i, flush=True)
    if i == 20:
        while t.run_id is None: time.sleep(.01)
time.sleep(600)
'''
def test_killed_training_is_replayed_into_one_run(mlflow_server, tmp_path, capfd):
    """kill -9 while it logs: the run in MLflow continues where it was, and what had arrived is not doubled; then the
    same run is resumed."""
    env = os.environ | {'PYTHONPATH': str(REPO)}
    command = [sys.executable, '-c', LOGS, mlflow_server.uri, str(tmp_path)]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as p:
        for line in p.stdout:
            if int(line) == 500: break
        spool, = tmp_path.glob(SPOOLS)
        with pytest.raises(UserError, match='still going on'): replay(spool)
        p.kill()
        logged = max([500, *map(int, p.stdout)]) # every step it said it had logged
    assert wmtp_sync(str(tmp_path)) == 0 and 'sent, MLflow run' in capfd.readouterr().out and not spool.exists()
    run, = runs(mlflow_server.uri, 'killed')
    steps = history(mlflow_server.uri, run.info.run_id, 'train/loss')
    assert steps == [(i, float(i)) for i in range(len(steps))] and len(steps) > logged
    assert run.info.status == 'KILLED' and run.data.params == {'training.seed': '1'}
    key = spool.stem.rpartition('-')[2]
    again = Tracker(config(mlflow_server.uri, 'killed'), tmp_path, key=key)
    until(lambda: again.run_id and client(mlflow_server.uri).get_run(again.run_id).info.status == 'RUNNING')
    again.log({'train/loss': -1.}, 5000)
    assert again.close() is True
    run, = runs(mlflow_server.uri, 'killed')
    assert run.info.status == 'FINISHED' and run.data.metrics['train/loss'] == -1.

def test_server_that_does_not_come_back(mlflow_server, tmp_path, capfd):
    """`close` keeps to its limit and says what to do; `replay` sends everything later, twice is the same as once."""
    t = Tracker(config('http://127.0.0.1:9', 'later'), tmp_path)
    for i in range(20): t.log({'eval/auc': i/20}, i)
    start = time.monotonic()
    assert t.close('FAILED', timeout=1) is False and time.monotonic() - start < 10
    said = capfd.readouterr().err
    assert str(t.spool) in said and f'wmtp-sync {tmp_path}' in said
    with pytest.raises(UserError, match='does not answer'): replay(t.spool)
    t.spool.write_text(t.spool.read_text().replace('http://127.0.0.1:9', mlflow_server.uri)) # that server at last
    copy = t.spool.read_text()
    run_id = replay(t.spool)
    assert not t.spool.exists()
    t.spool.write_text(copy)
    assert replay(t.spool) == run_id
    run, = runs(mlflow_server.uri, 'later')
    assert run.info.status == 'FAILED'
    assert history(mlflow_server.uri, run_id, 'eval/auc') == [(i, i/20) for i in range(20)]

def test_wrong_password_has_a_readable_message(mlflow_server, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv('MLFLOW_TRACKING_PASSWORD', 'not-the-password')
    t = Tracker(config(mlflow_server.uri, 'refused'), tmp_path)
    t.log({'train/loss': 1.}, 1)
    until(lambda: t._worker.error)
    assert t.close(timeout=1.5) is False
    said = capfd.readouterr()
    assert said.err.count('refuses this user (401)') == 1
    assert 'MLFLOW_TRACKING_USERNAME' in said.err and 'MLFLOW_TRACKING_PASSWORD' in said.err
    with pytest.raises(UserError, match='MLFLOW_TRACKING_PASSWORD') as e: replay(t.spool)
    written = said.out + said.err + t.spool.read_text() + str(e.value)
    for secret in ('not-the-password', PASSWORD): assert secret not in written
    monkeypatch.setenv('MLFLOW_TRACKING_PASSWORD', PASSWORD)
    assert history(mlflow_server.uri, replay(t.spool), 'train/loss') == [(1, 1.)]

def test_password_in_the_address_is_not_written_down(mlflow_server, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv('MLFLOW_TRACKING_URI', mlflow_server.uri.replace('http://', f'http://{USER}:{PASSWORD}@'))
    for name in ('MLFLOW_TRACKING_USERNAME', 'MLFLOW_TRACKING_PASSWORD'): monkeypatch.delenv(name)
    t = Tracker(apply_overrides({}, ['experiment.name=address']), tmp_path)
    assert t.uri == mlflow_server.uri and PASSWORD not in t.spool.read_text()
    t.log({'train/loss': 1.}, 1)
    assert t.close() is True and PASSWORD not in capfd.readouterr().err

def test_run_that_vanished_is_made_anew(mlflow_server, tmp_path):
    """A server that comes back with an empty database: the run is made again, complete. Here only the run is gone."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    t = Tracker(config(mlflow_server.uri, 'vanished'), tmp_path)
    t.log({'train/loss': 1.}, 1)
    first = until(lambda: t.run_id)
    until(lambda: history(mlflow_server.uri, first, 'train/loss'))
    client(mlflow_server.uri).delete_run(first)
    SqlAlchemyStore(f'sqlite:///{mlflow_server.folder}/mlflow.db', str(tmp_path/'artifacts'))._hard_delete_run(first)
    t.log({'train/loss': 2.}, 2)
    assert t.close() is True and t.run_id != first
    assert history(mlflow_server.uri, t.run_id, 'train/loss') == [(1, 1.), (2, 2.)]

def test_many_threads_and_many_metrics(mlflow_server, tmp_path):
    """More than one request may hold, from several threads; each value is there once."""
    t = Tracker(config(mlflow_server.uri, 'many'), tmp_path)
    t.params({f'p{i}': i for i in range(250)})
    def log(i): t.log({f'm{j}': float(i) for j in range(50)}, i)
    with ThreadPoolExecutor(4) as pool: list(pool.map(log, range(60)))
    assert t.close() is True
    run = client(mlflow_server.uri).get_run(t.run_id)
    assert len(run.data.params) == 250 and len(run.data.metrics) == 50
    assert history(mlflow_server.uri, t.run_id, 'm49') == [(i, float(i)) for i in range(60)]

# ------------------------------------------------------------------ S3

def bucket(server, name='checkpoints'):
    s3 = boto3.Session().client('s3', endpoint_url=server.uri)
    s3.create_bucket(Bucket=name, CreateBucketConfiguration={'LocationConstraint': 'eu-north-1'})
    return s3

def stored(s3): # name -> bytes
    found = s3.list_objects_v2(Bucket='checkpoints', Prefix='critic/demo/').get('Contents', [])
    def read(key): return s3.get_object(Bucket='checkpoints', Key=key)['Body'].read()
    return {o['Key'].removeprefix('critic/demo/'): read(o['Key']) for o in found}

def save(folder, name, content): # as checkpoints are written
    (folder/f'{name}.part').write_bytes(content)
    return (folder/f'{name}.part').replace(folder/name)

def save_folder(folder, name, content): # as a state to resume from
    part = folder/f'{name}.part'
    part.mkdir()
    for file in ('.metadata', '__0_0.distcp'): (part/file).write_bytes(content)
    return part.rename(folder/name)

def test_s3_killed_and_restarted(s3_server, tmp_path, capfd):
    """The server dies between checkpoints and comes back empty: uploads continue, and at the end the bucket holds what
    the folder holds, old files too."""
    s3 = bucket(s3_server)
    up = Uploader('s3://checkpoints/critic/demo')
    big = os.urandom(70 << 20) # more than one part
    up.put(save_folder(tmp_path, 'checkpoint_epoch_0.20', b'one'))
    up.put(save(tmp_path, 'checkpoint_best.pt', big))
    until(lambda: not up._todo)
    first = {f'checkpoint_epoch_0.20/{f}': b'one' for f in ('.metadata', '__0_0.distcp')}
    assert stored(s3) == first | {'checkpoint_best.pt': big}
    s3_server.kill()
    start = time.monotonic()
    for i in range(2, 6): # goes on training, with save_total_limit = 3
        up.put(save_folder(tmp_path, f'checkpoint_epoch_{i/5:.2f}', b'%d' % i))
        if i > 3:
            old = tmp_path/f'checkpoint_epoch_{(i-3)/5:.2f}'
            shutil.rmtree(old)
            up.delete(old)
    assert time.monotonic() - start < 2
    until(lambda: 'does not answer' in capfd.readouterr().err)
    s3_server.start() # with nothing in it
    until(lambda: "there is no bucket 'checkpoints'" in capfd.readouterr().err)
    bucket(s3_server)
    up.put(save(tmp_path, 'checkpoint_final.pt', b'final'))
    assert up.close(30) is True
    files = [f for f in tmp_path.rglob('*') if f.is_file()]
    assert stored(s3) == {f.relative_to(tmp_path).as_posix(): f.read_bytes() for f in files}
    names = {'epoch_0.60', 'epoch_0.80', 'epoch_1.00', 'best.pt', 'final.pt'}
    assert {name.partition('/')[0] for name in stored(s3)} == {f'checkpoint_{x}' for x in names}

def test_s3_that_hangs_holds_nothing_up(hanging, tmp_path):
    """Neither the loop, nor `close`, nor the end of the process, which would wait for a thread that is not a daemon."""
    code = '''
import sys, time
from pathlib import Path
from weighted_mtp.uploading import Uploader
up = Uploader('s3://checkpoints/x')
file = Path(sys.argv[1])/'checkpoint_best.pt'
for i in range(50): file.write_bytes(b'x'*100_000); up.put(file)
time.sleep(1)
sys.exit(3 if up.close(.5) is False else 0)
'''
    env = os.environ | {'PYTHONPATH': str(REPO), 'AWS_ENDPOINT_URL': hanging}
    done = subprocess.run([sys.executable, '-c', code, str(tmp_path)], env=env, capture_output=True, text=True,
                          timeout=30) # a read times out after 60 s
    assert done.returncode == 3 and f"put {tmp_path/'checkpoint_best.pt'}" in done.stderr, done.stderr

def test_s3_refusing_credentials_has_a_readable_message(tmp_path, capfd, monkeypatch, tmp_path_factory):
    server = Server(tmp_path_factory.mktemp('s3-strict'), '/moto-api/', ['moto_server', '-H', '127.0.0.1', '-p'],
                    INITIAL_NO_AUTH_ACTION_COUNT='0')
    try:
        server.start()
        monkeypatch.setenv('AWS_ENDPOINT_URL', server.uri)
        up = Uploader('s3://checkpoints')
        up.put(save(tmp_path, 'checkpoint_best.pt', b'best'))
        until(lambda: up._worker.error)
        assert up.close(1.5) is False
    finally: server.kill()
    said = capfd.readouterr().err
    assert said.count('refuses these credentials') == 1 and 'AWS_SECRET_ACCESS_KEY' in said
    for secret in ('secret-example', 'AKIAEXAMPLE'): assert secret not in said
    monkeypatch.delenv('AWS_ACCESS_KEY_ID'); monkeypatch.delenv('AWS_SECRET_ACCESS_KEY')
    monkeypatch.setenv('HOME', str(tmp_path)) # no credentials of the machine's own
    up = Uploader('s3://checkpoints')
    up.put(tmp_path/'checkpoint_best.pt')
    until(lambda: up._worker.error)
    assert up.close(.1) is False and 'cannot be used without AWS_ACCESS_KEY_ID' in capfd.readouterr().err

# ------------------------------------------------------------------ a complete training

STEPS, EVERY = 400, 5
SMALL = ['dataset.n_problems=100', 'data_sampling.n_validation=20',
         'model.hidden_size=32', 'model.n_layers=1', 'model.n_heads=2',
         'training.cpu_threads=1', 'training.batch_size=4', f'training.log_every={EVERY}',
         f'training.max_steps={STEPS}', 'checkpoint.save_checkpoint_every=0.3',
         'checkpoint.save_total_limit=100']
KEYS = {'AWS_ACCESS_KEY_ID': 'AKIA5PLANTED7KEY9ID', 'AWS_SECRET_ACCESS_KEY': 'planted/secret+access/key'}

@pytest.fixture(scope='module')
def project(tmp_path_factory):
    root = tmp_path_factory.mktemp('project')
    shutil.copytree(REPO/'configs', root/'configs')
    shutil.copy(REPO/'settings.ini', root/'settings.ini')
    (root/'home').mkdir()
    return root

def process_env(project, **more):
    return os.environ | KEYS | {'PYTHONPATH': str(REPO), 'HOME': str(project/'home'), **more}

class Training:
    "A training process; what it says goes into files of the project."
    def __init__(self, project, name, uri, *overrides):
        self.record, self.checkpoints = project/'runs'/name, project/'storage/checkpoints/ntp'/name
        self.record.mkdir(parents=True)
        overrides = [*SMALL, f'experiment.name={name}', f'mlflow.tracking_uri={uri}', *overrides]
        command = [sys.executable, '-m', 'weighted_mtp.pipelines.run_ntp', '--config', 'configs/ntp/ntp_micro.yaml']
        for o in overrides: command += ['--override', o]
        env = process_env(project, WMTP_RUN_DIR=str(self.record))
        with open(project/f'{name}.out', 'wb') as out, open(project/f'{name}.err', 'wb') as err:
            self.p = subprocess.Popen(command, cwd=project, env=env, stdout=out, stderr=err)
        self.err = Path(err.name)

    def step(self): # as the progress bar of the form sees it
        try: return json.loads((self.record/'progress.json').read_text())['step']
        except FileNotFoundError: return 0

    def logged(self): # the last step whose loss has gone into the spool
        spool, = self.record.glob(SPOOLS)
        lines = map(json.loads, spool.read_text().splitlines(keepends=True)[:-1])
        return max(x['step'] for x in lines if 'train/loss' in x.get('metrics', {}))

    def said(self, text): return text in self.err.read_text()
    def result(self): return json.loads((self.record/'result.json').read_text())
    def final(self): return torch.load(self.checkpoints/'checkpoint_final.pt', weights_only=True)
    def ended(self): return self.p.wait(300) == 0 or pytest.fail(self.err.read_text()[-3000:])

    def kill(self): self.p.kill(); self.p.wait()

@pytest.fixture(scope='module')
def alone(project, cold_server): # trains without any server; the one its config names is started when it is over
    late = Server(cold_server.folder, cold_server.path, cold_server.words[:-1], **cold_server.env)
    t = Training(project, 'alone', late.uri)
    yield t, late
    t.kill(); late.kill()

def files_with(folder, *texts):
    files = [f for f in folder.rglob('*') if f.is_file()]
    return [(f.name, x) for f in files for x in texts if x.encode() in f.read_bytes()]

def assert_no_secret(project):
    assert files_with(project, 'train/loss') # it does look into the files
    header = base64.b64encode(f'{USER}:{PASSWORD}'.encode()).decode()
    assert not files_with(project, PASSWORD, *KEYS.values(), header)

def test_training_outlives_both_servers(project, alone, mlflow_server, s3_server):
    """Both servers are killed while a process trains, and come back steps later, the S3 one empty: it ends as if
    nothing had happened, and both hold all of it."""
    s3, uri = bucket(s3_server, 'wmtp-training'), mlflow_server.uri
    names = f'MLflow at {uri}', 's3://wmtp-training/wmtp/ntp/served'
    in_bucket = lambda: {o['Key']: o['Size'] for o in s3.list_objects_v2(Bucket='wmtp-training').get('Contents', [])}
    steps = lambda run_id: [i for i, _ in history(uri, run_id, 'train/loss')]
    t = Training(project, 'served', uri, 'checkpoint.upload_to=s3://wmtp-training/wmtp')
    try:
        run, = until(lambda: runs(uri, 'served'), 300)
        epochs = lambda: [k for k in in_bucket() if 'epoch' in k] # files that are not written again
        held = until(lambda: t.step() > 0 and steps(run.info.run_id) and epochs(), 300)
        mlflow_server.kill(); s3_server.kill()
        before = t.logged()
        noticed = lambda: all(t.said(f'{name} does not answer') for name in names)
        until(lambda: noticed() and t.logged() >= before + 4*EVERY, 300)
        t.p.send_signal(signal.SIGSTOP) # however slowly servers start, steps are left for when they are back
        between = t.logged()
        assert 0 < before < between < STEPS - 4*EVERY and t.p.poll() is None
        mlflow_server.start(); s3_server.start()
        assert max(steps(run.info.run_id)) <= before + EVERY # a log may have been on its way when both were killed
        s3 = bucket(s3_server, 'wmtp-training')
        assert not in_bucket()
        t.p.send_signal(signal.SIGCONT)
        t.ended()
    finally: t.kill()
    for name in names: assert t.said(f'{name} works again')
    run, = runs(uri, 'served')
    assert run.info.status == 'FINISHED' and steps(run.info.run_id) == [*range(EVERY, STEPS+1, EVERY)]
    params = {'pipeline': 'ntp', 'training.max_steps': str(STEPS), 'checkpoint.upload_to': 's3://wmtp-training/wmtp'}
    assert run.data.params.items() >= params.items()
    result = t.result()
    assert result['mlflow_run_id'] == run.info.run_id and result['mlflow_uri'] == uri
    assert not list(t.record.glob(SPOOLS))
    assert result['metrics'] and run.data.metrics.items() >= result['metrics'].items()
    left = [f for f in t.checkpoints.rglob('*') if f.is_file() and 'checkpoint_' in f'{f.parent.name}{f.name}']
    files = {f'wmtp/ntp/served/{f.relative_to(t.checkpoints).as_posix()}': f.stat().st_size for f in left}
    last = {f'wmtp/ntp/served/checkpoint_{x}.pt' for x in ('best', 'final')}
    assert in_bucket() == files and files.keys() >= {*held, *last}
    until((alone[0].checkpoints/'checkpoint_final.pt').is_file, 300)
    state, other = t.final()['state'], alone[0].final()['state']
    assert state.keys() == other.keys()
    for k, w in state.items(): assert torch.equal(w, other[k]), k
    assert_no_secret(project)

def test_training_whose_mlflow_never_comes_back(project, alone):
    """It ends well and says where its log waits; `wmtp-sync` sends all of it, once the server is there."""
    t, late = alone
    t.ended()
    spool, = t.record.glob(SPOOLS)
    assert t.said('did not get everything of this run') and t.said(f'{spool}: send it with: wmtp-sync {t.record}')
    result = t.result()
    assert result['mlflow_run_id'] is None and result['metrics'] and t.final()['step'] == STEPS
    late.start()
    sync = subprocess.run([BIN/'wmtp-sync', t.record], cwd=project, env=process_env(project), capture_output=True,
                          text=True, timeout=120)
    assert sync.returncode == 0 and not spool.exists(), sync.stdout + sync.stderr
    run, = runs(late.uri, 'alone')
    assert run.info.run_id in sync.stdout and run.info.status == 'FINISHED'
    assert run.data.params['training.max_steps'] == str(STEPS)
    assert [i for i, _ in history(late.uri, run.info.run_id, 'train/loss')] == [*range(EVERY, STEPS+1, EVERY)]
    assert run.data.metrics.items() >= result['metrics'].items()
    (project/'sync.log').write_text(sync.stdout + sync.stderr)
    assert_no_secret(project)
