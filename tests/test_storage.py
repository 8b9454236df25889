"""Data sets and models from the hub's own client, from files and into S3 and VESSL's volumes; the hub and VESSL are stand-ins on loopback, S3 is moto."""
import json, os, re, subprocess, sys
from pathlib import Path

import pyarrow as pa, pyarrow.parquet as pq, pytest, torch

from hub_service import Hub
from test_launch import wmtp
from test_remote import Server
from vessl_service import TOKEN, Service

REPO = Path(__file__).resolve().parent.parent
SHARED = REPO.parent/'shared/data'
real_data = pytest.mark.skipif(not SHARED.is_dir(), reason=f'{SHARED} is not there')

def setup(folder, *words, code=0, timeout=300, **env):
    done = subprocess.run([sys.executable, '-c', 'import sys; from weighted_mtp.storage import wmtp_setup; sys.exit(wmtp_setup())', *words], cwd=folder, capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, 'PYTHONPATH': str(REPO), 'HF_HOME': str(folder/'hf'), 'HF_ENDPOINT': 'http://127.0.0.1:9', 'AWS_DEFAULT_REGION': 'eu-north-1', **env})
    assert done.returncode == code, done.stdout + done.stderr[-3000:]
    return done

@pytest.fixture
def here(tmp_path):
    (tmp_path/'settings.ini').write_text((REPO/'settings.ini').read_text()); (tmp_path/'configs').mkdir() # a project
    return tmp_path

def parquet(rows):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()

def questions(n, start=0): return [dict(question=f'What is {i} + 1?', answer=f'It is <<{i}+1={i+1}>>.\n#### {i+1}') for i in range(start, start+n)]

@pytest.fixture
def hub():
    files = {'main/train-00000-of-00001.parquet': parquet(questions(3000)), 'main/test-00000-of-00001.parquet': parquet(questions(50, 3000)), 'socratic/train-00000-of-00001.parquet': b'', 'README.md': b'x'}
    with Hub({'openai/gsm8k': files, 'princeton-nlp/Sheared-LLaMA-2.7B': {}}, token='hf_a-token-that-shows-nowhere', gated=['princeton-nlp/Sheared-LLaMA-2.7B']) as h: yield h

TRAIN = 'main/train-00000-of-00001.parquet'

def test_from_the_hub(here, hub):
    out = setup(here, 'data', 'gsm8k', HF_ENDPOINT=hub.url).stdout
    facts = json.loads((here/'storage/datasets/gsm8k/dataset.json').read_text())
    assert facts['revision'] == 'a'*40 and facts['splits']['test']['problems'] == 50
    assert facts['splits']['train']['problems'] + facts['splits']['validation']['problems'] == 3000 and facts['splits']['validation']['problems'] > 100
    assert '50 problems' in out and not [p for _, p, _ in hub.requests if 'socratic' in p or 'README' in p]
    before = len(hub.requests)
    setup(here, 'data', 'gsm8k', HF_ENDPOINT=hub.url)
    assert [p for _, p, _ in hub.requests[before:] if 'resolve' in p] == [] # nothing is fetched twice
    assert setup(here, 'verify').stdout.count('ok ') == 3

def test_download_goes_on_where_it_was_cut(here, hub):
    big = os.urandom(24 << 20)
    hub.gated, hub.repos['princeton-nlp/Sheared-LLaMA-2.7B'] = [], {'config.json': b'{}', 'model.safetensors': big}
    hub.cut['model.safetensors'] = 21 << 20 # the connection breaks: the same process goes on from the last of its 10 MB
    setup(here, 'model', 'sheared-llama-2.7b', HF_ENDPOINT=hub.url)
    assert (here/'storage/models/sheared-llama-2.7b/model.safetensors').read_bytes() == big
    assert [r for _, p, r in hub.requests if p.endswith('model.safetensors')] == [None, f'bytes={20 << 20}-']
    setup(here, 'data', 'gsm8k', HF_ENDPOINT=hub.url)
    whole, file = hub.repos['openai/gsm8k'][TRAIN], here/'storage/downloads/gsm8k'/TRAIN
    file.unlink(); file.with_name(file.name + '.part').write_bytes(whole[:7000]) # the process was killed: the next one goes on
    setup(here, 'data', 'gsm8k', HF_ENDPOINT=hub.url)
    assert file.read_bytes() == whole and ('GET', f'/datasets/openai/gsm8k/resolve/{"a"*40}/{TRAIN}', 'bytes=7000-') in hub.requests

def test_what_is_not_what_the_hub_keeps(here, hub):
    hub.spoil.add(TRAIN)
    assert 'another checksum' in setup(here, 'data', 'gsm8k', HF_ENDPOINT=hub.url, code=2).stderr
    assert not (here/'storage/datasets/gsm8k').exists() and not list((here/'storage/downloads').rglob('*.part'))
    hub.spoil.clear()
    setup(here, 'data', 'gsm8k', HF_ENDPOINT=hub.url)

def test_errors_of_the_hub(here, hub):
    token = 'hf_a-token-that-shows-nowhere'
    assert 'no such repository' in setup(here, 'data', 'mbpp', HF_ENDPOINT=hub.url, code=2).stderr
    assert 'cannot be fetched' in (err := setup(here, 'data', 'gsm8k', code=2).stderr) and '--from' in err and 'Traceback' not in err
    assert 'HF_HUB_OFFLINE' in setup(here, 'data', 'gsm8k', HF_ENDPOINT=hub.url, HF_HUB_OFFLINE='1', code=2).stderr
    assert 'is gated: accept its terms' in setup(here, 'model', 'sheared-llama-2.7b', HF_ENDPOINT=hub.url, code=2).stderr
    (here/'.env').write_text(f'HF_TOKEN={token}\n')
    done = setup(here, 'model', 'sheared-llama-2.7b', HF_ENDPOINT=hub.url, code=2) # let in, but the repository is empty
    assert 'has no file like' in done.stderr and token not in done.stdout + done.stderr
    hub.repos['openai/gsm8k'][TRAIN] = parquet([dict(question='?', solution='#### 1')])
    assert f"field 'answer' is missing; it has question, solution" in setup(here, 'data', 'gsm8k', HF_ENDPOINT=hub.url, code=2).stderr
    for spoilt in (token + '\n', token + 'é'): # as a mounted secret ends; the client shows it as repr
        done = setup(here, 'data', 'mbpp', HF_ENDPOINT=hub.url, HF_TOKEN=spoilt, code=2)
        assert token not in done.stdout + done.stderr and 'Traceback' not in done.stderr

@real_data
def test_real_mbpp_and_gsm8k(here):
    setup(here, 'data', 'mbpp', '--from', str(SHARED/'mbpp')); setup(here, 'data', 'gsm8k', '--from', str(SHARED/'gsm8k'))
    counts = {n: {k: s['problems'] for k, s in json.loads((here/f'storage/datasets/{n}/dataset.json').read_text())['splits'].items()} for n in ('mbpp', 'gsm8k')}
    assert counts['mbpp'] == dict(train=374, validation=90, test=500, prompt=10) # Austin et al. 2021
    assert counts['gsm8k']['test'] == 1319 and counts['gsm8k']['train'] + counts['gsm8k']['validation'] == 7473
    problems = [json.loads(l) for l in (here/'storage/datasets/mbpp/test.problems.jsonl').read_text().splitlines()]
    assert all(len(p['tests']['tests']) >= 3 for p in problems)
    assert all(float(json.loads(l)['tests']['answer']) is not None for l in (here/'storage/datasets/gsm8k/test.problems.jsonl').read_text().splitlines())
    assert 'FAILED' not in setup(here, 'verify').stdout

def contest(**changes): return dict(dict(name='1_A', description='Add.', public_tests=dict(input=['1 2'], output=['3']), private_tests=dict(input=[], output=[]), generated_tests=dict(input=[], output=[]), source=2, difficulty=7,
    solutions=dict(language=[3, 2], solution=['print(3)', 'int main']), incorrect_solutions=dict(language=[3], solution=['print(4)']), time_limit=None, memory_limit_bytes=0), **changes)

def test_rows_that_are_not_as_expected(here):
    """The file, the row and what is wrong with it; nothing is taken for less than it is."""
    def convert(code=0, **changes):
        (here/'raw').mkdir(exist_ok=True)
        (here/'raw/train-0.jsonl').write_text(json.dumps(contest()) + '\n' + json.dumps(contest(name='1_B', **changes)))
        done = setup(here, 'data', 'codecontests', '--from', 'raw', code=code)
        assert 'Traceback' not in done.stderr and (not code or 'line 2: ' in done.stderr), done.stderr
        return done.stderr if code else done.stdout
    assert '2 problems          2 correct          2 incorrect' in convert()
    assert "field 'solutions.language' is missing" in convert(2, solutions=[dict(lang=3, solution='x')])
    assert "'PYTHON3', not a number" in convert(2, solutions=dict(language=['PYTHON3'], solution=['x']))
    assert 'zip() argument' in convert(2, solutions=dict(language=[3, 3], solution=['x']))
    assert 'instruction is None, not text' in convert(2, description=None)
    assert 'difficulty is None' in convert(2, difficulty=None) and 'a solution is None' in convert(2, solutions=dict(language=[3], solution=[None]))
    assert '2 correct' in convert(solutions=[dict(language=3, solution='x')]) # the other way round

def test_what_is_there_twice_is_taken_once(here):
    (here/'raw/sub').mkdir(parents=True)
    for f, rows in (('raw/train.jsonl', questions(40)), ('raw/sub/train.jsonl', questions(40)), ('raw/test.jsonl', questions(10, 35))): (here/f).write_text('\n'.join(map(json.dumps, rows)))
    out = setup(here, 'data', 'gsm8k', '--from', 'raw').stdout
    s = json.loads((here/'storage/datasets/gsm8k/dataset.json').read_text())['splits']
    assert sum(x['problems'] for x in s.values()) == 45 and sum(x.get('repeated', 0) for x in s.values()) == 45 and 'problems that were there already' in out
    assert 'FAILED' not in setup(here, 'verify').stdout

def test_source_that_lies_where_the_result_goes(here, release):
    """The result's folder is made anew: the user's files in it would be gone."""
    import shutil
    data, model = here/'storage/datasets/gsm8k', here/'storage/models/meta-mtp-7b'
    data.mkdir(parents=True); (data/'train.jsonl').write_text('\n'.join(map(json.dumps, questions(40))))
    shutil.copytree(release, model); shutil.copytree(release/'7B_1T_4', model, dirs_exist_ok=True) # found from the folder above, too
    for words in (('data', 'gsm8k', '--from', str(data)), ('model', 'meta-mtp-7b', '--from', str(model)), ('model', 'meta-mtp-7b', '--from', str(model.parent))):
        assert 'Move them elsewhere' in setup(here, *words, code=2).stderr
        assert (data/'train.jsonl').is_file() and (model/'7B_1T_4/consolidated.pth').is_file()
    disk = here/'disk'; data.rename(disk); data.symlink_to(disk) # on another disk, and given from a folder above
    (here/'train.jsonl').write_text((disk/'train.jsonl').read_text())
    setup(here, 'data', 'gsm8k', '--from', str(here/'train.jsonl'))
    assert data.is_symlink() and (disk/'dataset.json').is_file()

MADE = '''
import random, sys, pyarrow as pa, pyarrow.parquet as pq
problems, each = int(sys.argv[1]), int(sys.argv[2])
rng = random.Random(0)
io = pa.struct(dict(input=pa.list_(pa.string()), output=pa.list_(pa.string())))
sol = pa.struct(dict(language=pa.list_(pa.int64()), solution=pa.list_(pa.string())))
schema = pa.schema(dict(name=pa.string(), description=pa.string(), public_tests=io, private_tests=io, generated_tests=io, source=pa.int64(), difficulty=pa.int64(), solutions=sol, incorrect_solutions=sol,
                        time_limit=pa.struct(dict(seconds=pa.int64(), nanos=pa.int64())), memory_limit_bytes=pa.int64()))
with pq.ParquetWriter('made/train-00000-of-00001.parquet', schema) as w:
    for p in range(problems):
        def some(n, word): return dict(language=[3]*n, solution=['\\n'.join(f'{word}{p} = {rng.randrange(10**6)} + x{k}' for k in range(rng.randint(5, 30))) for _ in range(n)])
        tests = dict(input=['1 2 3\\n'*50]*20, output=['6\\n']*20)
        w.write_table(pa.Table.from_pylist([dict(name=f'{p}_A', description='Add the numbers. '*50, public_tests=tests, private_tests=tests, generated_tests=tests, source=2, difficulty=p%26, solutions=some(each//2, 'a'),
                      incorrect_solutions=some(each - each//2, 'b'), time_limit=dict(seconds=1, nanos=0), memory_limit_bytes=2**28)], schema))
'''

def test_dry_runs_of_the_production_configs(here):
    """Plan, estimate and the statistics of their data, for each of them and either number of GPUs; and without data a word about it."""
    import shutil
    shutil.rmtree(here/'configs'); shutil.copytree(REPO/'configs', here/'configs'); (here/'home').mkdir(); (here/'.env').write_text((REPO/'.env.example').read_text())
    requests = [(p, n) for p in ('critic', 'baseline', 'verifiable', 'rho1', 'ntp', 'ref_tuning') for n in (1, 4)]
    def told(pipeline, ngpus):
        words = [pipeline, '--ngpus', str(ngpus), '--dry-run', *(['--critic-checkpoint', 'storage/checkpoints/critic/critic-pretrain/checkpoint_best.pt'] if pipeline == 'verifiable' else [])]
        done = wmtp(here, *words)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
    steps = dict(critic=(14, 8), rho1=(7, 2)) # of 200 pairs, and of 200 solutions 32 at a time
    assert 'nothing is known of storage/datasets/codecontests/train.jsonl here' in told('critic', 4)
    (here/'made').mkdir()
    subprocess.run([sys.executable, '-c', MADE, '40', '10'], cwd=here, check=True)
    setup(here, 'data', 'codecontests', '--from', 'made')
    for pipeline, ngpus in requests:
        out = told(pipeline, ngpus)
        assert f'run_{pipeline} --config configs/{pipeline}/' in out and 'effective batch' in out
        assert 'train: 40 problems, 200 correct and 200 incorrect solutions' in out, out
        assert re.search(r'memory per GPU +[\d.]+ GB of 80', out) and re.search(rf'time +[\d.]+ s a step × {steps.get(pipeline, (9, 3))[ngpus == 4]} steps', out), out

def test_memory_of_a_large_train_split(here):
    """From Parquet to our files and on to tokens and pairs, below 2 GB whatever the size: a million solutions with WMTP_ALL=1 (some minutes), fifty thousand without."""
    problems, each = (13_000, 77) if 'WMTP_ALL' in os.environ else (650, 77)
    (here/'made').mkdir()
    subprocess.run([sys.executable, '-c', MADE, str(problems), str(each)], cwd=here, check=True)
    code = '''
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
start = time.time()
ds = load_pairs('storage/datasets/codecontests/train.jsonl', tok, 125_000, Config())
print('tokenised', time.time() - start)
start = time.time()
ds = load_pairs('storage/datasets/codecontests/train.jsonl', tok, 125_000, Config())
print('opened and drawn', time.time() - start, len(ds), ds[0][0].n_response)
print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20)
'''
    done = subprocess.run([sys.executable, '-c', code], cwd=here, capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(REPO)})
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout.split('PEAK')[1]) < 2
    s = json.loads((here/'storage/datasets/codecontests/dataset.json').read_text())['splits']['train']
    assert s['correct'] + s['incorrect'] == problems*each

@pytest.fixture(scope='module')
def release(tmp_path_factory):
    "A micro checkpoint in Meta's layout, with a sentencepiece tokenizer trained on programs."
    import sentencepiece
    from weighted_mtp.synthetic import make_problems
    folder = tmp_path_factory.mktemp('release')
    texts = [t for p in make_problems(200) for t in (p.instruction, *p.solutions)]
    (folder/'text.txt').write_text('\n'.join(texts))
    sentencepiece.SentencePieceTrainer.train(input=str(folder/'text.txt'), model_prefix=str(folder/'tokenizer'), vocab_size=500, model_type='bpe', byte_fallback=True, pad_id=-1, minloglevel=2, normalization_rule_name='identity', remove_extra_whitespaces=False)
    def w(*shape): return torch.randn(*shape)*.05
    dim, ffn, vocab, heads = 64, 160, 500, 4
    def block(p): return {f'{p}.attention.w{c}.weight': w(dim, dim) for c in 'qkvo'} | {f'{p}.feed_forward.w1.weight': w(ffn, dim), f'{p}.feed_forward.w2.weight': w(dim, ffn), f'{p}.feed_forward.w3.weight': w(ffn, dim),
                  f'{p}.attention_norm.weight': torch.ones(dim), f'{p}.ffn_norm.weight': torch.ones(dim)}
    torch.manual_seed(0)
    state = {'tok_embeddings.weight': w(vocab, dim), 'norm.weight': torch.ones(dim), 'output.weight': w(vocab, dim)}
    for name in ('layers.0', 'layers.1', 'extra_heads.0', 'extra_heads.1', 'extra_heads.2'): state |= block(name)
    (folder/'7B_1T_4').mkdir()
    torch.save(state, folder/'7B_1T_4/consolidated.pth')
    (folder/'7B_1T_4/params.json').write_text(json.dumps(dict(dim=dim, n_layers=5, n_heads=heads, norm_eps=1e-5, vocab_size=vocab, n_future_tokens=4, rope_theta=10000.)))
    return folder

@real_data
def test_release_and_real_data_to_a_trained_policy(here, release):
    """Meta's layout in, real MBPP in, a short run of the pipeline `baseline`, a plain Llama out: with the hub unreachable."""
    setup(here, 'model', 'meta-mtp-7b', '--from', str(release)); setup(here, 'data', 'mbpp', '--from', str(SHARED/'mbpp'))
    out = setup(here, 'verify').stdout
    assert 'meta-mtp-7b forward pass: loss' in out and 'FAILED' not in out
    model, data = here/'storage/models/meta-mtp-7b', 'storage/datasets/mbpp'
    overrides = [f'model.backbone={model}', 'dataset.embedded=false', f'dataset.train={data}/train.jsonl', f'dataset.validation={data}/validation.jsonl', f'dataset.test={data}/test.jsonl', 'dataset.max_length=512',
                 'training.max_steps=30', 'training.cpu_threads=1', 'data_sampling.n_validation=40', 'mlflow.tracking_uri=sqlite:///mlflow.db']
    done = subprocess.run([sys.executable, '-m', 'weighted_mtp.pipelines.run_baseline', '--config', str(REPO/'configs/baseline/baseline_micro.yaml'), *[w for o in overrides for w in ('--override', o)]],
                          cwd=here, capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(REPO)})
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert '374 correct solutions of 374 problems' in done.stdout and 'no room for a response in 512 tokens' in done.stdout
    checkpoint = next((here/'storage/checkpoints/baseline').rglob('checkpoint_best.pt'))
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from weighted_mtp.models import export_backbone, load_policy
    plain = AutoModelForCausalLM.from_pretrained(export_backbone(load_policy(checkpoint), here/'plain', AutoTokenizer.from_pretrained(model)))
    assert type(plain).__name__ == 'LlamaForCausalLM'
    tok = AutoTokenizer.from_pretrained(here/'plain')
    ids = tok('def f(x):\n    return x', return_tensors='pt').input_ids
    torch.testing.assert_close(plain(ids).logits, load_policy(checkpoint)(ids).logits, rtol=1e-4, atol=1e-4)
    assert tok.decode(tok('def f(x):\n    return x  # é')['input_ids'], skip_special_tokens=True) == 'def f(x):\n    return x  # é'

def test_bad_items_are_named(here, release):
    setup(here, 'model', 'meta-mtp-7b', '--from', str(release))
    folder = here/'storage/models/meta-mtp-7b'
    file = next(folder.glob('*.safetensors'))
    file.write_bytes(file.read_bytes()[:-1] + b'x')
    out = setup(here, 'verify', code=1).stdout
    assert f'FAILED storage/models/meta-mtp-7b: {file.name} is not what it was' in out
    (folder/'tokenizer.json').unlink()
    assert 'FAILED' in setup(here, 'verify', code=1).stdout

def test_release_that_lacks_a_tensor(here, release, tmp_path):
    folder = tmp_path/'lacking'; folder.mkdir()
    state = torch.load(release/'7B_1T_4/consolidated.pth', weights_only=True)
    (folder/'params.json').write_text((release/'7B_1T_4/params.json').read_text()); (folder/'tokenizer.model').write_bytes((release/'tokenizer.model').read_bytes())
    for name, change in (('layers.1.feed_forward.w3.weight', None), ('extra_heads.2.attention.wv.weight', torch.zeros(3, 64))):
        torch.save({k: change if k == name else v for k, v in state.items() if k != name or change is not None}, folder/'consolidated.pth')
        err = setup(here, 'model', 'meta-mtp-7b', '--from', str(folder), code=2).stderr
        assert ('layers.1.mlp.up_proj.weight is missing' in err) if change is None else ('v_proj.weight has the shape (3, 64) instead of (64, 64)' in err), err
    setup(here, 'model', 'meta-mtp-7b', '--from', str(release))
    model = here/'storage/models/meta-mtp-7b'
    from safetensors.torch import load_file, save_file
    file = next(model.glob('*.safetensors'))
    lost = load_file(file); lost.popitem(); save_file(lost, file, metadata={'format': 'pt'})
    index = model/'model.safetensors.index.json'; index.write_text(json.dumps(dict(metadata={}, weight_map={k: file.name for k in lost})))
    facts = json.loads((model/'setup.json').read_text())
    import hashlib
    for f in (file, index): facts['files'][f.name] = dict(bytes=f.stat().st_size, sha256=hashlib.sha256(f.read_bytes()).hexdigest())
    (model/'setup.json').write_text(json.dumps(facts))
    assert 'forward pass: no file holds the tensor' in setup(here, 'verify', code=1).stdout

def test_verify_names_what_is_damaged_and_goes_on(here):
    from transformers import AutoTokenizer
    from weighted_mtp.config import UserError
    from weighted_mtp.corpus import open_corpus
    from weighted_mtp.synthetic import make_dataset
    (here/'raw').mkdir(); (here/'raw/train-0.jsonl').write_text(json.dumps(contest()))
    (here/'raw/valid-0.jsonl').write_text(json.dumps(contest(name='1_B', solutions=dict(language=[2], solution=['int main']), incorrect_solutions=[]))) # nothing in Python
    setup(here, 'data', 'codecontests', '--from', 'raw')
    make_dataset(here/'synthetic', n_problems=20, n_held_out=10)
    tokenizer, data = AutoTokenizer.from_pretrained(here/'synthetic/tokenizer'), here/'storage/datasets/codecontests'
    assert len(open_corpus(data/'train.jsonl', tokenizer)) == 2
    index = next((data/'train.index').iterdir()); (data/'train.index'/f'{index.name}.part').mkdir() # a process was killed
    (here/'storage/datasets/aa').mkdir(); (here/'storage/datasets/aa/dataset.json').write_text('{}')
    out = setup(here, 'verify', code=1).stdout
    assert out.count('FAILED') == 1 and "FAILED storage/datasets/aa: dataset.json is not as wmtp-setup writes it (KeyError: 'splits')" in out and out.count('ok ') == 3
    file = index/'solutions.arrow'; file.write_bytes(file.read_bytes()[:-200])
    assert 'is damaged' in setup(here, 'verify', code=1).stdout
    with pytest.raises(UserError, match='is damaged .*Delete it'): open_corpus(data/'train.jsonl', tokenizer)
    assert 'does not lie in' in setup(here, 'upload', '../settings.ini', 's3://data/x', code=2).stderr
    (here/'storage/x.db').write_text('x')
    assert 'Error: ' in (err := setup(here, 'data', 'codecontests', '--from', 'raw', '--storage', 'storage/x.db', code=2).stderr) and 'Traceback' not in err

def test_conversion_holds_a_shard_at_a_time(here):
    code = '''
import json, sys, torch
from pathlib import Path
from weighted_mtp.models import convert_meta
def anon(): return int(next(l for l in open('/proc/self/status') if l.startswith('RssAnon')).split()[1])/1024
import threading, time
dim, ffn, vocab, layers = 1024, 2816, 8000, 12
if sys.argv[1] == 'make':
    Path('big').mkdir()
    w = lambda *s: torch.zeros(*s)
    def block(p): return {f'{p}.attention.w{c}.weight': w(dim, dim) for c in 'qkvo'} | {f'{p}.feed_forward.w1.weight': w(ffn, dim), f'{p}.feed_forward.w2.weight': w(dim, ffn), f'{p}.feed_forward.w3.weight': w(ffn, dim), f'{p}.attention_norm.weight': w(dim), f'{p}.ffn_norm.weight': w(dim)}
    s = {'tok_embeddings.weight': w(vocab, dim), 'norm.weight': w(dim), 'output.weight': w(vocab, dim)}
    for i in range(layers-3): s |= block(f'layers.{i}')
    for i in range(3): s |= block(f'extra_heads.{i}')
    torch.save(s, 'big/consolidated.pth')
    Path('big/params.json').write_text(json.dumps(dict(dim=dim, n_layers=layers, n_heads=16, norm_eps=1e-5, n_future_tokens=4)))
else:
    before, peak, done = anon(), [0.], False
    def watch():
        while not done: peak[0] = max(peak[0], anon()); time.sleep(.002)
    t = threading.Thread(target=watch); t.start()
    convert_meta('big', 'out', shard_bytes=200 << 20)
    done = True; t.join()
    largest = max(f.stat().st_size for f in Path('out').glob('*.safetensors'))/2**20
    print(json.dumps(dict(grown=peak[0] - before, largest=largest, shards=len(list(Path('out').glob('*.safetensors'))))))
'''
    (here/'big.py').write_text(code)
    env = {**os.environ, 'PYTHONPATH': str(REPO)}
    subprocess.run([sys.executable, 'big.py', 'make'], cwd=here, check=True, env=env)
    done = subprocess.run([sys.executable, 'big.py', 'convert'], cwd=here, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found['shards'] >= 3 and found['grown'] < 1.2*found['largest'], found

KEYS = dict(aws_access_key_id='AKIAEXAMPLE', aws_secret_access_key='secret-example')

@pytest.fixture
def bucket(tmp_path_factory):
    "A bucket `data` on an S3 server (moto)."
    import boto3
    server = Server(tmp_path_factory.mktemp('s3'), '/moto-api/', ['moto_server', '-H', '127.0.0.1', '-p'])
    try:
        server.start()
        s3 = boto3.client('s3', endpoint_url=server.uri, region_name='eu-north-1', **KEYS)
        s3.create_bucket(Bucket='data', CreateBucketConfiguration=dict(LocationConstraint='eu-north-1'))
        s3.at = server.uri
        yield s3
    finally: server.kill()

@pytest.fixture
def mbpp(here):
    (here/'mbpp.jsonl').write_text('\n'.join(json.dumps(dict(task_id=i, text='t', code=f'x = {i}', test_list=['assert 1'], test_setup_code='', challenge_test_list=[])) for i in (100, 550, 700)))
    setup(here, 'data', 'mbpp', '--from', str(here))
    return here/'storage/datasets/mbpp'

def test_upload_to_s3(here, bucket, mbpp):
    env = {**{k.upper(): v for k, v in KEYS.items()}, 'AWS_ENDPOINT_URL': bucket.at, 'AWS_EC2_METADATA_DISABLED': 'true'}
    def held(key): return bucket.get_object(Bucket='data', Key=key)['Body'].read()
    assert '14 of 14 files sent' in setup(here, 'upload', 'datasets/mbpp', 's3://data/wmtp', **env).stdout
    assert held('wmtp/datasets/mbpp/train.jsonl') == (mbpp/'train.jsonl').read_bytes()
    (mbpp/'train.jsonl').write_text('{}\n')
    assert '1 of 14 files sent' in setup(here, 'upload', 'datasets/mbpp', 's3://data/wmtp', **env).stdout and held('wmtp/datasets/mbpp/train.jsonl') == b'{}\n'
    err = setup(here, 'upload', 'datasets/mbpp', 's3://nobucket/wmtp', code=2, **env).stderr
    assert 's3://nobucket does not take' in err and 'secret-example' not in err
    for wrong in ('/tmp', 'volume://vessl-storage/datasets'): assert 'is no place to upload to' in setup(here, 'upload', 'datasets/mbpp', wrong, code=2).stderr

def test_upload_to_a_volume_of_vessl(here, bucket, mbpp):
    """The real client asks the stand-in where the volume lies, and sends the files to an S3 server there; a run imports the volume as storage/datasets."""
    with Service() as service:
        env = dict(VESSL_API_HOST=service.url, VESSL_ACCESS_TOKEN=TOKEN)
        service.bucket = dict(bucket_name='data', region='eu-north-1', endpoint=bucket.at, force_path_style=True, s3_token=dict(session_token=None, access_key_id=KEYS['aws_access_key_id'], secret_access_key=KEYS['aws_secret_access_key']))
        assert '14 of 14 files sent to volume://vessl-storage' in setup(here, 'upload', 'datasets/mbpp', **env).stdout
        files = {o['Key']: bucket.get_object(Bucket='data', Key=o['Key'])['Body'].read() for o in bucket.list_objects_v2(Bucket='data')['Contents']}
        assert files == {f.relative_to(here/'storage').as_posix(): f.read_bytes() for f in mbpp.rglob('*') if f.is_file()}
        (here/'storage/downloads').mkdir(); (here/'storage/downloads/x').write_text('x')
        assert 'no such' in (err := setup(here, 'upload', 'downloads/x', code=2, **env).stderr) and 'Traceback' not in err # no such volume
        assert 'vessl configure' in setup(here, 'upload', 'datasets/mbpp', code=2, **{**env, 'VESSL_ACCESS_TOKEN': 'wrong'}).stderr
        service.bucket['bucket_name'] = 'nobucket'
        err = setup(here, 'upload', 'datasets/mbpp', code=2, **env).stderr
        assert 'secret-example' not in err and 'Traceback' not in err and 'nobucket' in err, err
