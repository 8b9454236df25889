"""Why answers fail: what an evaluation keeps, counts and says of it, and the packages that programs may import."""
import json, re
from types import SimpleNamespace

import pytest

from weighted_mtp import model_evaluation
from weighted_mtp.answer_tests import check_references
from weighted_mtp.config import load_config
from weighted_mtp.errors import error_of
from weighted_mtp.evaluation import evaluate, run_evaluation, wmtp_evaluate
from weighted_mtp.files import UserError
from weighted_mtp.generation import Generation, NoRoom
from weighted_mtp.scores import metrics_of, summary, summary_text

from test_storage import REPO

TOKENIZER = SimpleNamespace(get_vocab=dict)
NUMPY = 'import numpy\ndef f(x): return int(numpy.int64(x))'

ASSERTS = dict(kind='asserts', tests=['assert f(1) == 1', 'assert f(2) == 2'])

def problem(i, **tests): return dict(problem_id=f'p{i}', instruction=f'{i}', tests=tests or ASSERTS)

@pytest.fixture
def answers(monkeypatch):
    """Answers by instruction, in place of a model's; `answers.asked` counts what was asked for."""
    given = SimpleNamespace(asked=0)
    def generate(model, tokenizer, prompts, **kw):
        given.asked += 1
        texts = given.texts[re.search(r'Instruction:\n(\d+)', prompts[0])[1]]
        if texts is None: raise NoRoom('600 tokens, and room for 512')
        return [Generation(t, [1], 'eos', 1) for t in texts]
    monkeypatch.setattr(model_evaluation, 'generate', generate)
    def of(*texts): given.texts = {str(i): t for i, t in enumerate(texts)}
    given.of = of
    return given

def rows_of(found): return [json.loads(l) for l in open(found['file'])]

def test_errors_by_type(tmp_path, answers):
    """Each answer keeps its error and test; the outcome has counts, examples, first failures, words and metrics."""
    stdio = dict(kind='stdio', tests=[['1\n', '1\n'], ['2\n', '2\n']])
    problems = [problem(0), problem(1, **stdio), problem(2, kind='answer', answer='12'), problem(3)]
    answers.of(['def f(x): return x', 'def f(x): return 1', 'def f(x) return x', 'def f(x): return x/0'],
               ['print(input())', 'print(1)', 'import sys; sys.exit(3)', 'raise type("Ü", (Exception,), {})'],
               ['#### 12', '#### 13', 'none', 'It is 12.'], None)
    found = evaluate(None, TOKENIZER, problems, ks=(1,), samples=4, folder=tmp_path, name='mixed', progress=False)
    assert [(r['error'], r['test']) for r in rows_of(found)] == [
        ('', 0), ('AssertionError', 2), ('SyntaxError', 0), ('ZeroDivisionError', 1),
        ('', 0), ('WrongOutput', 2), ('SystemExit', 1), ('Ü', 1),
        ('', 0), ('WrongAnswer', 1), ('WrongAnswer', 1), ('', 0), *[('PromptTooLong', 0)]*4]
    errors = found['errors']
    counts = dict(PromptTooLong=4, WrongAnswer=2, AssertionError=1, SyntaxError=1, ZeroDivisionError=1, WrongOutput=1)
    assert {k: e['count'] for k, e in errors.items()} == dict(counts, SystemExit=1, Ü=1)
    assert list(errors)[:2] == ['PromptTooLong', 'WrongAnswer'] # the most common first
    assert errors['WrongAnswer']['share'] == 2/16 and sum(e['count'] for e in errors.values()) == 16 - 4
    message = 'test 2: AssertionError: assert f(2) == 2'
    assert errors['AssertionError']['example'] == dict(problem_id='p0', message=message, program='def f(x): return 1')
    assert errors['WrongAnswer']['example']['message'] == '13 instead of 12'
    assert found['first_failures'] == {'p0': {'0': 1, '1': 1, '2': 1}, 'p1': {'1': 2, '2': 1}, 'p2': {'1': 2}}
    assert 'errors, of all answers: PromptTooLong 25 %, WrongAnswer 12 %, AssertionError 6 %' in summary_text(found)
    metrics = metrics_of(found)
    assert metrics['mixed/error/WrongAnswer'] == 2/16 and metrics['mixed/error/_'] == 1/16
    assert all(re.fullmatch(r'[/A-Za-z0-9_.\- ]{1,250}', k) for k in metrics) # what MLflow takes everywhere
    assert json.loads((tmp_path/found['file']).with_suffix('.json').read_text())['errors'] == errors

def test_packages_that_programs_may_import(tmp_path, answers):
    """Not by default, and then the setting is named; with it the same answers pass, as they are and in a fence."""
    answers.of([NUMPY, f'So:\n```python\n{NUMPY}\n```\nDone.', NUMPY + '\n\nprint(f(3))\n', 'import nosuch'])
    def run(**kw):
        return evaluate(None, TOKENIZER, [problem(0)], samples=4, folder=tmp_path, progress=False, **kw)
    without = run()
    assert without['pass@1'] == 0
    missing = dict(numpy=dict(answers=3, installed=True), nosuch=dict(answers=1, installed=False))
    assert without['missing_packages'] == missing
    words = summary_text(without)
    assert "No module named 'numpy' (3 answers): evaluation.packages=[numpy]" in words and '--packages numpy' in words
    assert "No module named 'nosuch' (1 answer): it is not installed here" in words
    allowed = run(packages=['numpy'])
    assert answers.asked == 2 and allowed['file'] != without['file'] # other settings: what was kept is not taken
    assert [r['status'] for r in rows_of(allowed)] == ['passed', 'passed', 'passed', 'error']
    assert [r['as_written'] for r in rows_of(allowed)] == ['passed', 'error', 'passed', 'error']
    assert allowed['settings']['packages'] == ['numpy'] and 'packages' not in without['settings']
    assert list(allowed['missing_packages']) == ['nosuch']
    run(packages=('numpy', 'numpy')); run()
    assert answers.asked == 2 # now they are

def test_a_package_that_is_not_installed(tmp_path, answers, capsys, monkeypatch):
    """Through the function, the command, the pipeline and `references`: before a checkpoint is read."""
    for packages, why in ((['numpyy'], "Did you mean 'numpy'"), (['scikit-learn'], 'not installed here'),
                           (['numpy', ''], 'not installed here'), ('numpy', 'has to be a list of names'),
                           (['os.path'], 'not installed here')):
        with pytest.raises(UserError, match=why):
            evaluate(None, TOKENIZER, [problem(0)], packages=packages, folder=tmp_path/'out')
    assert not answers.asked and not list((tmp_path/'out').glob('*'))
    for checkpoint in ('no.pt', 'references'):
        assert wmtp_evaluate([checkpoint, '--packages', 'numpy, numpyy', '--storage', str(tmp_path)]) == 2
        assert "Error: Package 'numpyy' is not installed here" in capsys.readouterr().err
    file = REPO/'configs/evaluation/evaluation_micro.yaml'
    overrides = ['evaluation.checkpoint=no.pt', 'evaluation.packages=[numpyy]', 'dataset.embedded=false']
    config = load_config(file, overrides)
    with pytest.raises(UserError, match="Package 'numpyy' is not installed"): run_evaluation(config)
    with pytest.raises(UserError, match='evaluation.packages'): load_config(file, ['evaluation.packages={a: 1}'])

def test_references_may_import_packages(tmp_path):
    folder = tmp_path/'mine'
    folder.mkdir()
    (folder/'test.problems.jsonl').write_text(json.dumps(problem(0)))
    row = dict(instruction='0', input='', output=NUMPY, problem_id='p0', is_correct=True, difficulty=1, source='')
    untested = dict(row, problem_id='p7') # its problem has no tests, so it is left out
    (folder/'test.jsonl').write_text(json.dumps(row) + '\n' + json.dumps(untested))
    found = [check_references('mine', tmp_path, progress=False, packages=p) for p in ((), ('numpy',))]
    assert [(r['solutions'], r['passed']) for r in found] == [(1, 0), (1, 1)]

def test_rows_of_older_evaluations(tmp_path, answers):
    """Without the fields they are kept, and counted as far as they say why; damaged rows are made anew."""
    answers.of(['def f(x): return 1', 'def f(x): retur'], ['import numpy', 'def f(x): return x'])
    def run(): return evaluate(None, TOKENIZER, [problem(0), problem(1)], samples=2, folder=tmp_path, progress=False)
    file = tmp_path/run()['file']
    new = [json.loads(l) for l in open(file)]
    old = [{k: v for k, v in r.items() if k not in ('error', 'test', 'kinds', 'as_written')} for r in new]
    old[1]['message'], old[2]['message'] = 'exit code 1', 'exit code 1' # as it was
    file.write_text(''.join(json.dumps(r) + '\n' for r in old))
    found = run()
    assert answers.asked == 2 and [error_of(r) for r in old] == ['AssertionError', 'Unknown', 'Unknown', '']
    assert {k: e['count'] for k, e in found['errors'].items()} == dict(Unknown=2, AssertionError=1)
    assert found['first_failures'] == {'p0': {'2': 1}} and 'errors, of all answers: Unknown 50 %' in summary_text(found)
    for damage in (b'[1, 2]\n', b'{"problem_id": "p0", "sam\n', b'{"sample": 0}\n', b'\xff\xfe\n', b'null\n'):
        file.write_bytes(damage + file.read_bytes().split(b'\n', 1)[1])
        run()
        assert len(rows_of(found)) == 4
    assert answers.asked == 7 # the problem of the damaged row, each time
    before = {k: v for k, v in found.items() if k not in ('errors', 'first_failures', 'missing_packages')}
    assert 'errors' not in summary_text(before) and not any('error' in k for k in metrics_of(before))
    assert summary(old)['pass@1'] == .25

def as_text(x): # a page's piece: a table, HTML, Markdown, or an image
    data = x.to_html() if hasattr(x, 'to_html') else getattr(x, 'data', '')
    return data if isinstance(data, str) else x.alt

def report_of(folder, evaluations): # what the cells of the report show, and the files that they keep
    folder.mkdir()
    plan = dict(command=['python'], resolved=dict(pipeline='evaluation', experiment={}), effective_batch=None)
    record = dict(name='x', created='2026-01-01', target='local', status='completed', plan=plan)
    (folder/'record.json').write_text(json.dumps(dict(record, request=dict(pipeline='evaluation', ngpus=1))))
    result = dict(metrics={}, seconds=dict(evaluation=1.), pictures=[], checkpoints={}, evaluations=evaluations)
    (folder/'result.json').write_text(json.dumps(result))
    cells = [c for c in json.loads((REPO/'nbs/report.ipynb').read_text())['cells'] if c['cell_type'] == 'code']
    out, scope = [], dict(record=str(folder))
    for c in cells[1:]: # the first holds the parameter
        exec(''.join(c['source']), scope)
        scope['display'] = lambda *x: out.extend(x)
    return '\n'.join(map(as_text, out)), {f.relative_to(folder).as_posix() for f in folder.glob('*/*.*')}

def test_report_of_an_evaluation(tmp_path, answers, monkeypatch):
    """Tables, figures and escaped programs of a new evaluation; of one without the counts pass@k alone."""
    monkeypatch.chdir(REPO)
    answers.of(['def f(x): return x', 'def f(x):\n    return "<b>" if x < 3 else $x$', 'import numpy', NUMPY])
    new = evaluate(None, TOKENIZER, [problem(0)], samples=4, folder=tmp_path, progress=False)
    old = {k: v for k, v in new.items() if k not in ('errors', 'first_failures', 'missing_packages')}
    page, files = report_of(tmp_path/'new', dict(problems=new, other=old))
    for word in ('2 (50 %)', 'ModuleNotFoundError', '&lt;b&gt;', 'evaluation.packages=[numpy]', '3 × before the tests'):
        assert word in page, word
    for name in ('errors', 'first_failures'): assert files.issuperset([f'tables/{name}.csv', f'figures/{name}.png'])
    page, files = report_of(tmp_path/'old', dict(problems=old))
    assert '25.0 %' in page and 'tables/evaluation.csv' in files and 'tests' not in page
    assert not any('errors' in f or 'failures' in f for f in files)
