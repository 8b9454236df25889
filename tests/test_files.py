"""JSONL as people have it: other forms of it are read everywhere, all else is an error that names file and line."""
import gzip, json, tracemalloc

import pytest

from weighted_mtp.config import UserError, load_config
from weighted_mtp.corpus import open_corpus
from weighted_mtp.data import format_prompt, read_solutions
from weighted_mtp.evaluation import evaluate, load_benchmark
from weighted_mtp.jsonl import read_jsonl
from weighted_mtp.rows import read_rows
from weighted_mtp.sampling import load_pairs, load_solutions
from weighted_mtp.schema import Config
from weighted_mtp.storage import setup_data

from test_storage import REPO

BOM = b'\xef\xbb\xbf'

def solution(i, is_correct=True, **changes):
    output = f'return {i}  # \u2028 ä' + 'x'*i
    return dict(instruction=f'Gib {i} zurück.', input='', output=output, problem_id=f'p{i//2}', is_correct=is_correct,
                difficulty=3, source='test') | changes

def problem(i):
    return dict(problem_id=f'p{i}', instruction=f'Give {i}, ä.', tests=dict(kind='asserts', tests=['assert x']))

def lines(rows, end='\n'): return end.join(json.dumps(r, ensure_ascii=False) for r in rows).encode()

# What a text in UTF-8 with \n may look like on a disk, and a name that it may have there
FORMS = {'plain.jsonl': lambda b: b + b'\n',
    'no-last-newline.jsonl': lambda b: b,
    'bom.jsonl': lambda b: BOM + b + b'\n',
    'crlf.jsonl': lambda b: b.replace(b'\n', b'\r\n') + b'\r\n',
    'windows.jsonl': lambda b: BOM + b.replace(b'\n', b'\r\n') + b'\r\n\r\n\r\n', # as in shared/cases
    'blank-lines.jsonl': lambda b: b'\n \t\n' + b.replace(b'\n', b'\n\n') + b'\n\n\n',
    'indented.jsonl': lambda b: b.replace(b'\n', b' \n\t ') + b'  ',
    'joined.jsonl': lambda b: BOM + b.replace(b'\n', b'\n' + BOM), # cat a.jsonl b.jsonl
    'escaped.jsonl': lambda b: '\n'.join(json.dumps(json.loads(l)) for l in b.split(b'\n')).encode(),
    'packed.jsonl.gz': lambda b: gzip.compress(b), # shared/cases
    'packed-windows.jsonl.gz': lambda b: gzip.compress(BOM + b.replace(b'\n', b'\r\n\r\n')),
    'members.jsonl.gz': lambda b: gzip.compress(b[:50]) + gzip.compress(b[50:]) + bytes(100), # cat a.gz b.gz; padded
    'gzip-without-its-name.jsonl': lambda b: gzip.compress(b)}

@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
    from weighted_mtp.synthetic import train_tokenizer
    texts = [format_prompt(f'Gib {i} zurück.') + f'return {i}' for i in range(40)]
    return train_tokenizer(texts, tmp_path_factory.mktemp('tokenizer')/'tokenizer', 400)

def test_forms_are_read(tmp_path, tokenizer):
    """The same solutions, samples, pairs, problems and downloads, whatever the form."""
    solutions, problems = [solution(i, i % 2 == 0) for i in range(8)], [problem(i) for i in range(4)]
    (tmp_path/'right.jsonl').write_bytes(lines(solutions))
    right, c = open_corpus(tmp_path/'right.jsonl', tokenizer), Config()
    c.data_sampling.length_balanced = False
    pairs = list(load_pairs(tmp_path/'right.jsonl', tokenizer, 4, c))
    assert len(pairs) == 4 and len(list(right)) == 8
    for name, form in FORMS.items():
        f = tmp_path/name
        f.write_bytes(form(lines(solutions)))
        corpus = open_corpus(f, tokenizer)
        assert read_solutions(f) == list(read_rows(f, {})) == solutions, name
        assert list(corpus) == list(right) and corpus.index.line.tolist() == right.index.line.tolist(), name
        assert list(load_pairs(f, tokenizer, 4, c)) == pairs and len(load_solutions(f, tokenizer, 9, c)) == 4, name
        f.write_bytes(form(lines(problems)))
        assert load_benchmark(str(f)) == problems, name
    folders = {f.name for f in tmp_path.iterdir() if f.is_dir()}
    assert {'right.index', 'packed.jsonl.index', 'windows.index'} <= folders and len(folders) == len(FORMS) + 1

def as_(encoding): return lambda b: b.decode().encode(encoding)

def cut(b): return b[:-20]

def damaged(b): return b[:40] + bytes([b[40] ^ 255]) + b[41:]

# File, what becomes of three good lines, the line that the error names (None: the file alone), what it says
REFUSED = [
    ('cut.jsonl', cut, 3, 'cut off'),
    ('cut-newline.jsonl', lambda b: cut(b) + b'\n\n', 3, 'cut off, and it is the last'),
    ('torn.jsonl', lambda b: b.replace(b'"source": "test"}\n', b'\n', 1), 1, 'cut off, and another follows'),
    ('array.jsonl', lambda b: b'[' + b.replace(b'\n', b',\n') + b']', 1, 'an array, not lines: .*jq'),
    ('array-in-lines.jsonl', lambda b: BOM + b'\n[\n' + b + b'\n]', 2, 'an array, not lines'),
    ('array.json', lambda b: json.dumps([json.loads(l) for l in b.split(b'\n')], indent=1).encode(), 1,
        'an array, not lines'),
    ('array.jsonl.gz', lambda b: gzip.compress(b'[' + b.replace(b'\n', b',\n') + b']'), 1, 'an array, not lines'),
    ('pretty.jsonl', lambda b: b'\n'.join(json.dumps(json.loads(l), indent=2).encode() for l in b.split(b'\n')), 1,
        'goes on in the next line'),
    ('one-object.jsonl', lambda b: json.dumps(dict(data=[1]), indent=2).encode(), 1, 'goes on in the next line'),
    ('commas.jsonl', lambda b: b.replace(b'\n', b',\n'), 1, 'a comma after the object'),
    ('one-line.jsonl', lambda b: b.replace(b'\n', b' '), 1, 'another object begins in column'),
    ('old-mac.jsonl', lambda b: b.replace(b'\n', b'\r'), 1, 'another object begins in column'),
    ('python.jsonl', lambda b: '\n'.join(str(json.loads(l)) for l in b.split(b'\n')).encode(), 1, 'single quotes'),
    ('number.jsonl', lambda b: b + b'\n\n17', 5, 'not a JSON object, but 17'),
    ('nan.jsonl', lambda b: b.replace(b'"difficulty": 3', b'"difficulty": NaN'), 1, 'NaN is not a number'),
    ('infinity.jsonl', lambda b: b + b'\n' + b.split(b'\n')[0].replace(b': 3', b': -Infinity'), 4,
        '-Infinity is not a number'),
    ('twice.jsonl', lambda b: b + b'\n{"input": "", "a": 2, "input": "1"}', 4, "key 'input' is there twice"),
    ('twice-within.jsonl', lambda b: b + b'\n{"tests": {"kind": "asserts", "kind": "stdio"}}', 4,
        "key 'kind' is there twice"),
    ('utf16.jsonl', as_('utf-16'), 1, 'UTF-16.*iconv'), ('utf16-be.jsonl', as_('utf-16-be'), 1, 'UTF-16'),
    ('utf32.jsonl', as_('utf-32'), 1, 'UTF-32'),
    ('latin1.jsonl', lambda b: b.replace(b'\xe2\x80\xa8', b'').decode().encode('latin-1'), 1,
        'byte 0xfc in column .* is not UTF-8'),
    ('surrogate.jsonl', lambda b: b + b'\n' + b.split(b'\n')[0].replace(b'Gib', b'Gib \\ud83d'), 4,
        'half a surrogate pair'),
    ('deep.jsonl', lambda b: b + b'\n{"a": ' + b'['*100_000, 4, 'nested too deeply'),
    ('long-number.jsonl', lambda b: b.replace(b': 3,', b': ' + b'3'*5000 + b','), 1, 'Exceeds the limit'),
    ('cut.jsonl.gz', lambda b: gzip.compress(b)[:-9], None, 'cannot be read .it is cut off.'),
    ('head.jsonl.gz', lambda b: gzip.compress(b)[:5], None, 'cannot be read'),
    ('damaged.jsonl.gz', lambda b: damaged(gzip.compress(b)), None, 'cannot be read'),
    ('not-gzip.jsonl.gz', lambda b: b, None, 'is not gzip, though its name ends in .gz'),
    ('twice.jsonl.gz', lambda b: gzip.compress(gzip.compress(b)), 1, 'compressed twice'),
    ('zip.jsonl', lambda b: b'PK\x03\x04' + b, 1, 'a zip archive'),
    ('parquet.jsonl', lambda b: b'PAR1' + b, 1, 'a Parquet file'),
    ('zstd.jsonl', lambda b: b'\x28\xb5\x2f\xfd' + b, 1, 'zstd'),
    ('tar.jsonl.gz', lambda b: gzip.compress(b'train.jsonl'.ljust(257, b'\0') + b'ustar'), 1, 'a tar archive'),
    ('lfs.jsonl', lambda b: b'version https://git-lfs.github.com/spec/v1\noid sha256:00\n', 1, 'git lfs pull'),
    ('page.jsonl', lambda b: b'<!DOCTYPE html><title>Sign in</title>', 1, 'HTML or XML'),
    ('empty.jsonl', lambda b: b'', None, 'is empty'), ('blank.jsonl', lambda b: BOM + b'\r\n\n', None, 'is empty'),
    ('empty.jsonl.gz', lambda b: b'', None, 'is empty'),
    ('packed-nothing.jsonl.gz', lambda b: gzip.compress(b''), None, 'is empty')]

def refusal(read, f):
    with pytest.raises(UserError) as e: read(f)
    return str(e.value)

def test_what_is_not_jsonl_is_refused(tmp_path, tokenizer):
    """By every reader, with the same message, which names file and line."""
    import re
    for name, spoil, line, expected in REFUSED:
        f = tmp_path/name
        f.write_bytes(spoil(lines([solution(i) for i in range(3)])))
        message = refusal(read_solutions, f)
        assert str(f) in message and re.search(expected, message) and len(message) < 500, message
        assert line is None or f'{f}, line {line}: ' in message, message
        for read in (lambda f: open_corpus(f, tokenizer), lambda f: load_benchmark(str(f))):
            again = refusal(read, f)
            assert message == again or 'missing' in again, again # the first line is no problem of a benchmark
        assert all(p.suffix == '.part' for p in tmp_path.glob('*.index/*-*')), name # nothing is taken for complete
        if f.suffix == '.json' or 'surrogate' in name: continue # in a download these are read
        assert refusal(lambda f: list(read_rows(f, {})), f) == message

def test_bad_lines_of_a_benchmark(tmp_path):
    """The line is that of the file, blank lines counted."""
    f = tmp_path/'x.jsonl'
    for changes, expected in ((dict(tests=3), 'have to be of one of the kinds'),
                              (dict(problem_id=7), 'have to be text'),
                              (dict(problem_id='p0'), 'there before, in line 2'),
                              (dict(input=['1']), 'have to be text'),
                              (dict(tests=dict(kind='answer', answer=10**400)), 'is no number'),
                              (dict(instruction='\udc00'), 'half a surrogate pair')):
        f.write_text(f'\n{json.dumps(problem(0))}\n\n{json.dumps(problem(1) | changes)}')
        message = refusal(load_benchmark, str(f))
        assert f'{f}, line 4: ' in message and expected in message, message
    f.write_text(f'\n\n{json.dumps(dict(problem_id="p", tests={}))}')
    assert refusal(load_benchmark, str(f)) == f"{f}, line 3: field 'instruction' is missing."

WRONG = dict(instruction=[None, 1, ['a']], output=[None, {}], problem_id=[True, None, 1.5, ['p']], source=[0],
    is_correct=[1, 'true', None, 0.0], difficulty=['3', 3.0, None, True, -1, 2**15, 10**30], kind=[1, ['mutant']],
    twin=['p', 1.0, True], mutation=['ab', [1], [1, 2, 3], [2, 1], [-1, 2], [0, 1.5], {}])

def test_wrong_types_of_a_solution(tmp_path):
    f = tmp_path/'x.jsonl'
    for name, values in WRONG.items():
        for value in values:
            f.write_bytes(lines([solution(0), solution(1, **{name: value})], '\r\n\r\n'))
            message = refusal(read_solutions, f)
            assert message.startswith(f"{f}, line 3: field '{name}' is ") and len(message) < 300, message
    for changes in (dict(problem_id=0), dict(kind=None, mutation=None, twin=None), dict(mutation=[0, 3], twin=0),
                    dict(difficulty=28)):
        f.write_bytes(lines([row := solution(1, **changes)]))
        assert read_solutions(f) == [row]

def test_correct_counterpart_that_is_not_there(tmp_path):
    """No picture of a pair, rather than a run that fails after training."""
    from weighted_mtp.critic import picture_of_pair
    f = tmp_path/'x.jsonl'
    for twin in (7, -1, None):
        f.write_bytes(lines([solution(0), solution(1, False, mutation=[0, 3], twin=twin)]))
        assert picture_of_pair(None, None, f) == ''

def test_files_that_are_not_there(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'train.jsonl').write_bytes(lines([solution(0)])); (tmp_path/'folder.jsonl').mkdir()
    (tmp_path/'other.jsonl.gz').write_bytes(gzip.compress(lines([solution(0)])))
    for name, expected in (('train.jsonl.gz', 'not found. Did you mean train.jsonl?'),
                           ('folder.jsonl', 'is a folder'), ('no.jsonl', 'not found'),
                           ('other.jsonl', 'not found. Did you mean other.jsonl.gz?'),
                           ('x'*300 + '.jsonl', 'File name too long'), ('train.jsonl/x.jsonl', 'not found')):
        for read in (read_solutions, lambda f: open_corpus(f, tokenizer)):
            message = refusal(read, name)
            assert expected in message and message.endswith('Check dataset.train and dataset.validation.'), message
        assert expected in refusal(load_benchmark, name)
    assert 'not found' in refusal(load_benchmark, 'no.json.gz') # a file, not a benchmark's name
    assert 'Give one of its files: other.jsonl.gz, train.jsonl' in refusal(read_solutions, '.')
    assert "Did you mean 'mbpp'? There are synthetic, " in refusal(load_benchmark, 'mbp')

def test_memory_does_not_grow_with_the_file(tmp_path):
    """Also of a compressed file, and of an array in one line, which is refused by its first byte."""
    def peak(read):
        tracemalloc.start()
        read()
        try: return tracemalloc.get_traced_memory()[1]
        finally: tracemalloc.stop()
    def count(f): return sum(1 for _ in read_jsonl(f))
    row = lines([solution(3, output='x = 1\n'*300)]) + b'\n' # 2 kB
    for name, write in (('x.jsonl', open), ('x.jsonl.gz', gzip.open)):
        with write(tmp_path/name, 'wb') as f: f.writelines([row]*5000)
        assert peak(lambda: count(tmp_path/name)) < 1e6 and count(tmp_path/name) == 5000
    with gzip.open(tmp_path/'array.jsonl.gz', 'wb', 1) as f: f.writelines([b'[', *[b' '*1_000_000]*50, b']'])
    assert peak(lambda: refusal(count, tmp_path/'array.jsonl.gz')) < 1e6

def test_training_on_compressed_files(tmp_path, tokenizer, monkeypatch):
    """`dataset.train=x.jsonl.gz` gives the same weights and validation loss as the plain file."""
    from weighted_mtp.policies import PolicyObjective
    from weighted_mtp.runs import fit, load_parts
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('WMTP_RUN_DIR', raising=False)
    tokenizer.save_pretrained('tokenizer')
    data = lines([solution(i) for i in range(12)])
    for split in ('train', 'validation'):
        (tmp_path/f'{split}.jsonl').write_bytes(data)
        (tmp_path/f'{split}.jsonl.gz').write_bytes(gzip.compress(BOM + data.replace(b'\n', b'\r\n\r\n')))
    small = ['dataset.test=null', 'dataset.embedded=false', 'model.tokenizer=tokenizer', 'model.backbone=micro',
             'model.hidden_size=32',
             'model.n_layers=2', 'model.n_heads=2', 'training.max_steps=2', 'training.batch_size=4',
             'training.cpu_threads=1']
    def train(end):
        files = [f'dataset.{split}={split}.{end}' for split in ('train', 'validation')]
        config = load_config(REPO/'configs/ntp/ntp_micro.yaml', small + files)
        objective = PolicyObjective(config, *load_parts(config))
        trainer = fit(objective, config)
        size = sum(p.double().abs().sum().item() for p in trainer.model.parameters())
        return objective.evaluate(trainer, 'validation'), size
    plain = train('jsonl')
    assert plain[0]['loss'] > 0 and train('jsonl.gz') == plain
    folders = ('train.index', 'train.jsonl.index', 'validation.index', 'validation.jsonl.index')
    assert sorted(f.name for f in tmp_path.glob('*.index')) == [*folders]

def test_benchmark_from_a_compressed_file(tmp_path, tokenizer, monkeypatch):
    """Named after its file; and the pipeline's key takes it."""
    from weighted_mtp import evaluation, model_evaluation
    from weighted_mtp.generation import Generation
    answer = Generation('x = 1', [1], 'eos', 1)
    def generate(model, tokenizer, prompts, **kw): return [answer]*len(prompts)
    monkeypatch.setattr(model_evaluation, 'generate', generate)
    f = tmp_path/'mine.problems.jsonl.gz'
    f.write_bytes(gzip.compress(lines([problem(i) for i in range(2)], '\r\n')))
    found = evaluate(None, tokenizer, str(f), folder=tmp_path/'out', progress=False)
    assert found['benchmark'] == 'mine' and found['pass@1'] == 1 and (tmp_path/'out').joinpath(found['file']).is_file()
    config = load_config(REPO/'configs/evaluation/evaluation_micro.yaml', [f'evaluation.benchmarks=[{f}]'])
    assert [evaluation._benchmark_file(n, config) for n in config.evaluation.benchmarks] == [str(f)]

def test_compressed_downloads(tmp_path):
    """`wmtp-setup data … --from`: of each source the file that people have, compressed."""
    fields = dict(text='t', code='x = 1', test_list=['assert x'], test_setup_code='', challenge_test_list=[])
    mbpp = [dict(task_id=i, **fields) for i in (20, 520, 620)]
    def questions(numbers): return [dict(question=f'{i}?', answer=f'#### {i}') for i in numbers]
    train, test = questions(range(30)), questions(range(29, 31))
    for name, files in dict(mbpp={'mbpp.jsonl': mbpp}, gsm8k={'train.jsonl': train, 'test.jsonl': test}).items():
        counts = []
        for packed in (False, True):
            folder = tmp_path/f'{name}-{packed}'
            folder.mkdir()
            for file, rows in files.items():
                data = lines(rows, '\r\n\r\n')
                if packed: (folder/f'{file}.gz').write_bytes(gzip.compress(BOM + data))
                else: (folder/file).write_bytes(data)
            facts = setup_data(name, tmp_path/'datasets', folder)
            counts.append({split: s['problems'] for split, s in facts['splits'].items()})
        assert counts[0] == counts[1] and sum(counts[0].values()) == (3 if name == 'mbpp' else 31)
    (tmp_path/'mbpp-True/mbpp.jsonl.gz').write_bytes(gzip.compress(lines(mbpp))[:-9])
    message = refusal(lambda f: setup_data('mbpp', tmp_path/'datasets', f), tmp_path/'mbpp-True')
    assert 'A half-finished download?' in message
    (tmp_path/'mbpp-False/mbpp.jsonl').write_bytes(lines([mbpp[0], mbpp[1] | dict(code=7)], '\n\n'))
    message = refusal(lambda f: setup_data('mbpp', tmp_path, f), tmp_path/'mbpp-False')
    assert 'mbpp.jsonl, line 3: cannot be understood' in message

def test_empty_paths_and_files_in_the_way(tmp_path, tokenizer, monkeypatch, capsys):
    "An unset variable in a shell gives an empty path; and a file stands where a folder is to be made."
    from weighted_mtp.evaluation import wmtp_evaluate
    from weighted_mtp.storage import wmtp_setup
    for path in ('', ' '):
        with pytest.raises(UserError, match='the path is empty'): open_corpus(path, tokenizer)
    (tmp_path/'file').write_text('x')
    problem = dict(problem_id='p', instruction='', input='', tests=dict(kind='asserts', tests=['assert f()']))
    for folder in (tmp_path/'file', tmp_path/'file'/'below'):
        with pytest.raises(UserError, match='cannot be made'): evaluate(None, tokenizer, [problem], folder=folder)
    for what, value in (('temperature', float('nan')), ('temperature', float('inf')), ('top_p', 0), ('limit', 0)):
        with pytest.raises(UserError, match=f'{what} = .* is not possible: it has to be '):
            evaluate(None, tokenizer, [problem], **{what: value})
    monkeypatch.setattr('weighted_mtp.upload._sender_to_volume', lambda storage: pytest.fail('uploads'))
    monkeypatch.setattr('weighted_mtp.storage.hub_files', lambda *a: pytest.fail('fetches'))
    for command, words, says in ((wmtp_setup, ['upload', ''], 'path is empty'),
                                 (wmtp_setup, ['upload', ' '], 'path is empty'),
                                 (wmtp_setup, ['data', 'mbpp', '--mutants', '-1'], 'at least 0'),
                                 (wmtp_setup, ['data', 'gsm8k', '--mutants', '2'], 'MBPP only'),
                                 (wmtp_evaluate, [''], 'checkpoint is empty')):
        assert command(words) == 2 and says in capsys.readouterr().err
