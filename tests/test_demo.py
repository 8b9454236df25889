"""The demo from its stages to its screen, with stand-ins for the runs; reports of runs old and new."""
import io, json, shutil, sys, time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from weighted_mtp import demo
from weighted_mtp.files import project_root
from weighted_mtp.local_target import LocalTarget

REPO = project_root(__file__)

# What a run does towards its record, and no training: arguments are the pipeline, seconds to take, and what to do
STAND_IN = '''
import json, os, pathlib, sys, time
pipeline, seconds, fails = sys.argv[1], float(sys.argv[2]), sys.argv[3] == 'fail'
run = pathlib.Path(os.environ['WMTP_RUN_DIR'])
(run/'progress.json').write_text(json.dumps(dict(step=1, max_steps=2, loss=.5)))
time.sleep(seconds)
if fails: sys.exit('storage/train.jsonl, line 7: not JSON')
(run/'progress.json').write_text(json.dumps(dict(step=2, max_steps=2, loss=.4)))
result = dict(metrics={}, checkpoints={}, pictures=[], warnings=[], seconds={pipeline: 1.})
if pipeline == 'evaluation':
    solved = 60 if 'verifiable' in run.name else 20
    rows = [dict(problem_id=str(i), sample=0, status='passed' if i < solved else 'failed') for i in range(100)]
    (run/'rows.jsonl').write_text(''.join(json.dumps(r) + chr(10) for r in rows))
    e = {'problems': 100, 'pass@1': solved/100, 'pass@1_interval': [.1, .7], 'file': str(run/'rows.jsonl')}
    result['evaluations'] = dict(synthetic=e)
else:
    best = pathlib.Path('storage/checkpoints')/pipeline/'best.pt'
    best.parent.mkdir(parents=True, exist_ok=True); best.touch()
    result['checkpoints'] = dict(best=str(best))
if pipeline == 'critic':
    result['metrics'] = {'test/roc_auc': .93, 'test/ece': .03, 'test/base_likelihood_auc': .7,
                         'test/drop_on_mutation': .87, 'test/drop_on_mutation_random': .04}
    (run/'critic_tokens.html').write_text('<p>V</p>')
    result['pictures'] = [str(run/'critic_tokens.html')]
if pipeline == 'verifiable': result['warnings'] = ['the critic says 0.21 more than it keeps']
(run/'result.json').write_text(json.dumps(result))
'''

@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of its own, whose runs are stand-ins; `project.slow` and `.fails` name a stage that is."""
    for part in ('settings.ini', 'configs'):
        (shutil.copytree if (REPO/part).is_dir() else shutil.copy)(REPO/part, tmp_path/part)
    monkeypatch.chdir(tmp_path)
    submit = LocalTarget.submit
    def submit_stand_in(self, plan, folder):
        name = Path(folder).name
        seconds, how = 30 if name == here.slow else .3, 'fail' if name == here.fails else 'work'
        command = ['python', '-c', STAND_IN, plan.request['pipeline'], str(seconds), how]
        record = json.loads((folder/'record.json').read_text())
        record['plan_asked'], record['plan']['command'] = record['plan']['command'], command
        (folder/'record.json').write_text(json.dumps(record))
        submit(self, replace(plan, command=command), folder)
        record = json.loads((folder/'record.json').read_text())
        record['plan']['command'] = record['plan_asked'] # what it would have been: the same plan is found again
        (folder/'record.json').write_text(json.dumps(record))
    monkeypatch.setattr(LocalTarget, 'submit', submit_stand_in)
    class here: path, slow, fails = tmp_path, None, None
    return here

def run(*words): # exit status and what was shown
    out = io.StringIO()
    return demo.main([*words], out), out.getvalue()

def records(project): return sorted(f.parent.name for f in project.path.glob('runs/*/record.json'))

def test_demo_from_stages_to_screen(project):
    status, shown = run()
    assert status == 0
    for word in ('0.930', '87%', 'by chance 4%', '60.0 %', 'pass@1 on 100 unseen problems', '+40.0 points',
                 'the weights helped', 'warning: the critic says 0.21', 'runs/demo-critic/critic_tokens.html',
                 ' left · '): assert word in shown, word
    assert len(records(project)) == 6
    assert run('--show') == (0, shown[shown.index('╭'):])
    read = json.loads((project.path/'runs/demo-evaluation-verifiable/record.json').read_text())
    assert 'evaluation.checkpoint=storage/checkpoints/verifiable/best.pt' in read['plan_asked']
    assert run()[0] == 0 and len(records(project)) == 12 # one that is through starts anew

def test_demo_that_was_cut_off(project, capsys):
    """By a failure, and by Ctrl-C: said in a sentence; the same command does only what is left."""
    project.fails = 'demo-verifiable'
    status, shown = run()
    error = capsys.readouterr().err
    assert status == 1 and 'line 7: not JSON' in error and 'the same command goes on' in error
    assert 'Traceback' not in error + shown
    project.fails, before = None, len(records(project))
    status, shown = run()
    assert status == 0 and 'Going on with the demo that was cut off' in shown
    names = records(project)
    assert 'demo-critic-2' not in names and 'demo-verifiable-2' in names and len(names) > before

def test_demo_and_ctrl_c(project, capsys, monkeypatch):
    project.slow = 'demo-baseline'
    def interrupt(self, chains):
        if chains[1].runs and chains[1].runs[-1].name == 'demo-baseline': raise KeyboardInterrupt
    monkeypatch.setattr(demo.DemoProgress, '__call__', interrupt)
    start = time.monotonic()
    status, _ = run()
    assert status == 130 and 'Stopped.' in capsys.readouterr().err and time.monotonic() - start < 25
    record = json.loads((project.path/'runs/demo-baseline/record.json').read_text())
    assert record['status'] == 'stopped'

# ---- reports

def report_of(folder): # what the cells of the report show, as text, and the files that they keep
    cells = [c for c in json.loads((REPO/'nbs/report.ipynb').read_text())['cells'] if c['cell_type'] == 'code']
    out, scope = [], dict(record=str(folder))
    for c in cells[1:]: # the first holds the parameter
        exec(''.join(c['source']), scope)
        scope['display'] = lambda *x: out.extend(x)
    def text(x):
        data = x.to_html() if hasattr(x, 'to_html') else getattr(x, 'data', '')
        return data if isinstance(data, str) else x.alt
    return '\n'.join(map(text, out)), {f.relative_to(folder).as_posix() for f in folder.glob('*/*.*')}

def make_record(folder, pipeline, result, **files):
    folder.mkdir()
    plan = dict(command=['python'], effective_batch=16, config=f'configs/{pipeline}/{pipeline}_micro.yaml', overrides=[],
                resolved=dict(pipeline=pipeline, experiment={}))
    record = dict(name=folder.name, created='2026-01-01T00:00:00+00:00', target='local', status='completed', plan=plan,
                  request=dict(pipeline=pipeline, ngpus=1), git=dict(commit='0'*40, dirty=False))
    basic = dict(metrics={}, seconds={pipeline: 100.}, checkpoints={})
    for name, x in {'record': record, 'result': basic | result, **files}.items():
        (folder/f'{name}.json').write_text(json.dumps(x))
    return folder

def test_report_of_an_old_critic(tmp_path, monkeypatch):
    """Of a version that knew pairs alone, no warnings, and no single programs."""
    monkeypatch.chdir(REPO)
    metrics = {'test/roc_auc': .8, 'test/pairwise_accuracy': .9, 'test/likelihood_accuracy': .89, 'test/drop_within_2': .3}
    pairs = dict(kind=['mutant']*20, good_value=[1., 2.]*10, bad_value=[0., 1.5]*10, good_tokens=[9]*20, bad_tokens=[9]*20)
    page, files = report_of(make_record(tmp_path/'old', 'critic', dict(metrics=metrics), critic_pairs=pairs))
    for word in ('## Summary', '0.800', 'likelihood 0.890', '## Pairs', '100 seconds'): assert word in page, word
    assert '## The critic' not in page and 'Warning' not in page
    assert {'tables/summary.csv', 'figures/critic.png'} <= files and 'figures/critic_quality.png' not in files

def test_report_of_a_critic(tmp_path, monkeypatch):
    """The summary comes first, then programs, reliability, groups."""
    monkeypatch.chdir(REPO)
    def program(i): # half of them wrong, those valued low
        wrong = i % 2
        return dict(problem_id=f'sum/{i}', family='sum' if i % 3 else 'max', kind='mutant' if wrong else 'correct',
                    correct=not wrong, value=.1 + .1*(i % 4) if wrong else .95, initial=.5, tokens=30, drop_at=4,
                    mutation=[4, 4] if wrong else None, likelihood_base_mean=-.2*(i % 5), likelihood_mean=-.1)
    folder = make_record(tmp_path/'new', 'critic', dict(
        metrics={'test/roc_auc': .99, 'test/ece': .2, 'test/brier': .1}, warnings=['ECE 0.20 <b>'],
        pictures=['runs/new/critic_tokens.html']), critic_programs=[program(i) for i in range(40)])
    (folder/'critic_tokens.html').write_text('<p>the picture δ</p>', encoding='utf-8')
    page, files = report_of(folder)
    order = [page.index(x) for x in ('## Summary', 'ECE 0.20 &lt;b&gt;', '## Programs', 'the picture δ', '## The critic',
                                     'kind mutant', '## Numbers')]
    assert order == sorted(order)
    assert {'figures/critic_quality.png', 'tables/critic_groups.csv'} <= files

def test_report_of_a_policy_with_warnings(tmp_path, monkeypatch):
    monkeypatch.chdir(REPO)
    result = dict(metrics={'test/next_token_loss': .5}, warnings=['validation AUC 0.55 < 0.6', 'ECE 0.3 > 0.15'])
    page, _ = report_of(make_record(tmp_path/'policy', 'verifiable', result))
    assert page.count('Warning:') == 2 and 'perplexity 1.65' in page and 'AUC 0.55 &lt; 0.6' in page
