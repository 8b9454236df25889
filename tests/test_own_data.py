"""Data that people bring, by the command: every layout, the preview, labels by running, files that are not right."""
import base64, gzip, json, os, pickle, pty, select, signal, subprocess, sys, time, zlib

import pyarrow as pa, pyarrow.parquet as pq, pytest

from test_storage import COMMAND, REPO, SHARED, facts_of, here, read_lines, real_data, setup, write_lines  # noqa: F401
from weighted_mtp.answer_tests import check_references
from weighted_mtp.benchmarks import load_benchmark

def own(here, name, layout, *words, files='raw', code=0):
    return setup(here, 'data', name, '--from', str(files), '--format', layout, *words, code=code)

def counts(here, name):
    splits = facts_of(here, name)['splits']
    return {k: (s['problems'], s['correct'], s['incorrect']) for k, s in splits.items()}

@pytest.fixture
def raw(here): # noqa: F811
    (here/'raw').mkdir()
    return here/'raw'

def solution(problem, output, **more):
    return dict(problem_id=problem, instruction=f'Do {problem}.', output=output, **more)

ADD = dict(tests=['assert add(1, 2) == 3'])
RIGHT, WRONG = ('def add(a, b):\n    return a ' + rest for rest in ('+ b', '- b'))

def pack(x): return base64.b64encode(zlib.compress(pickle.dumps(x))).decode()

def cases(*pairs, kind='stdin'): return json.dumps([dict(input=a, output=b, testtype=kind) for a, b in pairs])

def test_humaneval_and_mbpp(here, raw):
    row = dict(prompt='def add(a, b):\n    """Add."""\n', canonical_solution='    return a + b\n', entry_point='add',
               test='def check(f):\n    assert f(1, 2) == 3\n')
    with gzip.open(raw/'plus.jsonl.gz', 'wt') as f: f.write(json.dumps(dict(row, task_id='HumanEval/0')))
    own(here, 'plus', 'humaneval', '--yes')
    assert counts(here, 'plus') == dict(test=(1, 1, 0))
    (raw/'plus.jsonl.gz').unlink()
    row = dict(code=RIGHT.replace('\n', '\r\n'), test_imports=['import math'], test_list=['assert add(1, 2) == 3'])
    rows = [dict(row, prompt=f'Add {i}.', task_id=i) for i in (5, 11, 600, 700)]
    (raw/'sanitized.json').write_text(json.dumps(rows))
    own(here, 'plain', 'mbpp', '--yes', '--relabel')
    assert counts(here, 'plain') == dict.fromkeys(('train', 'validation', 'test', 'prompt'), (1, 1, 0))
    own(here, 'changed', 'mbpp', '--yes', '--mutants', '2')
    assert counts(here, 'changed')['train'] == (1, 1, 2) and not (here/'storage/downloads/changed.mutants').exists()
    for name in ('plus', 'plain'):
        found = check_references(name, here/'storage/datasets', progress=False)
        assert found['passed'] == found['solutions'] and not found['empty_passed'], found
    assert 'FAILED' not in setup(here, 'verify').stdout

def test_apps(here, raw):
    """Programs that read and print, functions, and methods; numbers start anew in each split."""
    io = json.dumps(dict(inputs=['1 2\n', '3 4\n'], outputs=['3\n', '7\n']))
    call = json.dumps(dict(inputs=[[1, 2], [0, 5]], outputs=[[3], 5], fn_name='add'))
    reads = 'print(sum(map(int, input().split())))'
    method = 'class Solution:\n    def add(self, a: int, b: Optional[int]) -> List[int]:\n        return a + b'
    row = dict(question='Add.', difficulty='interview', starter_code='', url='')
    rows = [dict(row, problem_id=0, solutions=json.dumps([reads, 'print(3)']), input_output=io),
            dict(row, problem_id=1, question='Call.', solutions=json.dumps([RIGHT, WRONG]), input_output=call),
            dict(row, problem_id=2, question='Method.', solutions=json.dumps([method]), input_output=call,
                 starter_code='class Solution:\n    def add(self, a, b):\n'),
            dict(row, problem_id=3, question='Nothing.', solutions='', input_output='')]
    (raw/'train').mkdir()
    pq.write_table(pa.Table.from_pylist(rows), raw/'train/part-0.parquet')
    write_lines(raw/'test.jsonl', [dict(rows[0], question='Add two.'), dict(rows[1], solutions='')])
    out = own(here, 'apps', 'apps', '--yes', '--relabel').stdout
    assert counts(here, 'apps') == dict(train=(2, 2, 0), test=(2, 1, 0)), out # `Call.` is in test already
    assert 'left out (given as correct, the tests fail): 2' in out and 'Left out: problems without tests: 1' in out
    problems = load_benchmark('apps', here/'storage/datasets')
    assert [p['problem_id'] for p in problems] == ['apps/test/0', 'apps/test/1']
    assert problems[0]['tests']['kind'] == 'stdio' and problems[0]['difficulty'] == 12

def test_livecodebench(here, raw):
    """A pickle that would run code is refused, and nothing of it is run."""
    class Attack:
        def __reduce__(self): return os.system, (f'touch {here}/it-ran',)
    starter = 'class Solution:\n    def total(self, numbers: List[int]) -> int:\n        '
    row = dict(question_title='t', platform='atcoder', contest_date='2024-01-01T00:00:00', starter_code='',
               difficulty='easy', public_test_cases=cases(('1 2', '3')))
    leet = dict(row, starter_code=starter, metadata='{"func_name": "total"}',
                public_test_cases=cases(('[1, 2]', '3'), kind='functional'),
                private_test_cases=pack(cases(('[4]', '4'), kind='functional')))
    more = cases(('2 2', '4'))
    private = [pack(more), pack(Attack()), pack([more]), more, 'not base64']
    rows = [dict(row, private_test_cases=x) for x in private] + [leet]
    rows = [dict(r, question_id=f'q{i}', question_content=f'Do {i}.') for i, r in enumerate(rows)]
    write_lines(raw/'test5.jsonl', rows)
    out = own(here, 'lcb', 'livecodebench', '--yes').stdout
    assert not (here/'it-ran').exists()
    pickled = 'a pickle that is more than one text'
    for why in (f'{pickled} (STACK_GLOBAL)', f'{pickled} (EMPTY_LIST)', 'neither JSON nor base64 of zlib'):
        assert f'Note: problems whose private tests are left out ({why}): 1' in out, out
    problems = load_benchmark('lcb', here/'storage/datasets')
    assert [len(p['tests']['tests']) for p in problems] == [2, 1, 1, 2, 1, 3] # the last with its comparison
    from weighted_mtp.sandbox import run_tests
    code = 'class Solution:\n    def total(self, numbers: List[int]) -> int:\n        return sum(numbers)'
    assert run_tests(code, problems[-1]['tests']).passed
    assert not run_tests(code.replace('sum', 'len'), problems[-1]['tests']).passed

def test_jsonl_labelled_by_running(here, raw):
    rows = [solution('a', RIGHT, **ADD), solution('a', WRONG), solution('a', RIGHT + '\n', is_correct=False),
            dict(problem_id='b', instruction='Give.', solutions=['#### 4', dict(output='#### 5', is_correct=False)],
                 tests=dict(kind='answer', answer='4'), split='valid'),
            solution('c', 'x', is_correct=True, split='train'), solution('d', 'import numpy', **ADD, split='test'),
            solution('e', RIGHT, tests=ADD['tests'], test_setup_code='y = 1', split='test')]
    write_lines(raw/'mine.jsonl', [rows[0] | dict(split='train'), *rows[1:]])
    out = own(here, 'mine', 'jsonl', '--yes').stdout
    assert counts(here, 'mine') == dict(train=(2, 2, 2), validation=(1, 1, 1), test=(2, 1, 0)), out
    assert 'left out, no result (out of time, memory or packages): 1' in out and "No module named 'numpy'" in out
    assert facts_of(here, 'mine')['labels']['labelled correct'] == 3
    out = own(here, 'mine', 'jsonl', '--yes', '--relabel').stdout
    assert counts(here, 'mine')['train'] == (2, 2, 1) and 'left out (given as wrong, the tests pass): 1' in out
    assert '5 results were there already' in out
    again = own(here, 'again', 'jsonl', '--yes', files='storage/datasets/mine').stdout # what was made can be read
    assert counts(here, 'again') == counts(here, 'mine'), again
    assert 'FAILED' not in setup(here, 'verify').stdout

def test_preview_writes_nothing(here, raw):
    write_lines(raw/'train.jsonl', [solution('a', f'{RIGHT}  # {i} [bold]\x1b[31m', is_correct=True) for i in range(9)])
    before = sorted(here.rglob('*'))
    done = own(here, 'mine', 'jsonl', '--tokenizer', 'micro-base')
    assert sorted(p for p in here.rglob('*') if 'hf' not in p.parts) == before
    for said in ('give the same command with --yes', 'characters of a solution: min', 'tokens of prompt and solution',
                 'no problem is in validation or test', 'def add(a, b):'): assert said in done.stdout, done.stdout
    assert '\x1b' not in done.stdout

def on_terminal(here, answer): # what the command says, and its exit code
    env = dict(os.environ, PYTHONPATH=str(REPO), TERM='dumb')
    master, slave = pty.openpty()
    words = ['data', 'mine', '--from', 'raw', '--format', 'jsonl']
    with subprocess.Popen([sys.executable, '-c', COMMAND, *words], cwd=here, env=env, stdin=slave, stdout=slave,
                          stderr=slave) as process:
        os.close(slave)
        said, end = b'', time.monotonic() + 120
        while time.monotonic() < end:
            if not select.select([master], [], [], 1)[0]: continue
            try: more = os.read(master, 1 << 16)
            except OSError: break # it ended
            said += more
            if b'[y/N]' in more: os.write(master, answer)
            if not more: break
    os.close(master)
    return said.decode(), process.returncode

def test_a_terminal_is_asked(here, raw):
    write_lines(raw/'train.jsonl', [solution('a', RIGHT, is_correct=True)])
    for answer, written in ((b'n\n', False), (b'\n', False), (b'y\n', True)):
        said, code = on_terminal(here, answer)
        assert 'Write? [y/N]' in said and not code, said
        assert (here/'storage/datasets/mine/dataset.json').exists() == written

def test_rows_that_are_not_as_expected(here, raw):
    good = solution('a', RIGHT, is_correct=True)
    bad = [dict(good, problem_id=None), dict(good, is_correct='yes'), dict(good, output=3), dict(good, split='all'),
           dict(good, instruction='Do another.'), dict(good, problem_id='b', tests=dict(kind='stdio', tests=['x']))]
    says = ["field 'problem_id' is missing", "field 'is_correct' is 'yes', not true or false",
            "field 'output' is 3, not text", "field 'split' is 'all', not one of train"]
    write_lines(raw/'train.jsonl', [good, *bad])
    out = own(here, 'mine', 'jsonl', '--yes').stdout
    for i, words in enumerate(says, 2): assert f'train.jsonl, line {i}: {words}' in out, out
    assert 'Left out: rows that cannot be read: 6' in out and counts(here, 'mine') == dict(train=(1, 1, 0))
    assert facts_of(here, 'mine')['left_out'] == {'rows that cannot be read': 6}
    pq.write_table(pa.Table.from_pylist([dict(problem_id=1, question='?')]), raw/'a.parquet')
    err = own(here, 'apps', 'apps', files='raw/a.parquet', code=2).stderr
    assert 'holds nothing that can be used as apps' in err and 'Traceback' not in err
    assert "a.parquet, row 1: field 'input_output' is missing; it has problem_id, question" in err
    (raw/'train.jsonl').write_text(json.dumps(good) + '\n{"problem_id": ')
    assert 'train.jsonl, line 2: not valid JSON' in own(here, 'mine', 'jsonl', files='raw/train.jsonl', code=2).stderr
    (raw/'x.json.gz').write_bytes(gzip.compress(b'[1]')[:-9])
    assert 'x.json.gz cannot be read' in own(here, 'mine', 'jsonl', files='raw/x.json.gz', code=2).stderr

def test_requests_that_are_not_right(here, raw):
    (raw/'notes.txt').write_text('x')
    (here/'storage/datasets/theirs').mkdir(parents=True)
    (here/'storage/datasets/theirs/thesis.txt').write_text('x')
    def refused(*words): return own(here, *words, code=2).stderr
    assert "Unknown format 'human-eval'. Did you mean 'humaneval'" in refused('x', 'human-eval')
    assert 'it holds notes.txt' in refused('x', 'apps')
    assert 'is made of letters' in refused('../x', 'apps') and 'another name' in refused('gsm8k', 'jsonl')
    assert 'did not write' in refused('theirs', 'jsonl')
    assert "'numpi' is not installed" in refused('x', 'apps', '--package', 'numpi')
    assert '--from FOLDER' in setup(here, 'data', 'x', '--format', 'apps', code=2).stderr
    assert 'go with --format' in setup(here, 'data', 'mbpp', '--yes', code=2).stderr

def test_no_problem_is_in_two_splits(here, raw):
    for name, ids in (('train', range(300)), ('valid', range(200, 320)), ('test', range(310, 350))):
        write_lines(raw/f'{name}.jsonl', [solution(i, f'{RIGHT}  # {name}', is_correct=True) for i in ids])
    write_lines(raw/'more.jsonl', [solution(i, RIGHT, is_correct=True) for i in range(340, 900)]
                + [dict(solution('copy', RIGHT, is_correct=True), instruction='Do 320.')])
    out = own(here, 'mine', 'jsonl', '--yes').stdout
    ids = {s: {r['problem_id'] for r in read_lines(here/f'storage/datasets/mine/{s}.jsonl')}
           for s in ('train', 'validation', 'test')}
    assert sum(map(len, ids.values())) == len(set.union(*ids.values())) == 900, out
    assert len(ids['train'] & set(map(str, range(350, 900)))) > 450 and len(ids['validation']) > 15
    assert 'rows of a problem that is in another split already: 110' in out and 'drawn by a hash' in out
    drawn = [x for x in ids['test'] if int(x) >= 350]
    (raw/'train.jsonl').unlink()
    own(here, 'other', 'jsonl', '--yes')
    problems = read_lines(here/'storage/datasets/other/test.problems.jsonl')
    assert set(drawn) <= {p['problem_id'] for p in problems} # whatever else is in the files

SLOW = 'import time\ntime.sleep(.2)\n'

def test_labelling_resumes_after_kill(here, raw):
    n = 120
    programs = [f'{SLOW}{RIGHT if i % 2 else WRONG}  # {i}' for i in range(n)]
    write_lines(raw/'train.jsonl', [solution('a', code, **ADD) for code in programs])
    words = ['data', 'mine', '--from', 'raw', '--format', 'jsonl', '--yes']
    labels = here/'storage/downloads/mine.labels.jsonl'
    process = subprocess.Popen([sys.executable, '-c', COMMAND, *words], cwd=here, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, env=dict(os.environ, PYTHONPATH=str(REPO)))
    end = time.monotonic() + 120
    while not labels.is_file() and process.poll() is None and time.monotonic() < end: time.sleep(.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL # it was under way
    known = len(read_lines(labels))
    assert 0 < known < n and not (here/'storage/datasets/mine').exists()
    with open(labels, 'a') as f: f.write('{"key": "torn')
    out = own(here, 'mine', 'jsonl', '--yes').stdout
    assert f'{known} results were there already' in out and counts(here, 'mine') == dict(train=(1, n//2, n//2))
    keys = [line.split('"')[3] for line in labels.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == n + 1 # nothing ran twice; one line is torn
    assert not (here/'storage/datasets/mine.part').exists() and 'FAILED' not in setup(here, 'verify').stdout

@real_data
def test_real_files(here):
    own(here, 'sanitized', 'mbpp', '--yes', files=SHARED/'mbpp/sanitized-mbpp.json')
    assert sum(n for n, _, _ in counts(here, 'sanitized').values()) == 427
    out = own(here, 'quix', 'jsonl', '--yes', files=SHARED/'quixbugs').stdout
    splits = counts(here, 'quix').values()
    assert [sum(x) for x in zip(*splits)] == [40, 40, 40], out
    out = own(here, 'refactory', 'jsonl', '--yes', files=SHARED/'refactory/refactory_python.jsonl.gz').stdout
    assert [sum(x) for x in zip(*counts(here, 'refactory').values())] == [5, 1296, 1503], out
    assert 'Left out: solutions that were there before: 1370' in out
