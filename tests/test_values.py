"""Values on their way: what is typed into an override, a YAML file, a form, papermill or `.env` is what arrives, or one clear error says why not."""
import json, math, random, re, shlex, shutil, string, warnings
from dataclasses import fields, is_dataclass
from pathlib import Path, PurePosixPath
from typing import get_type_hints

import nbformat, pytest, yaml
from omegaconf import OmegaConf

from weighted_mtp.config import (SECRET_NAMES, Config, EnvWarning, UserError, apply_overrides, flatten, known_secrets, load_config, load_env,
                                 load_site, plain, quoted, read_override, schema, to_yaml)

REPO = Path(__file__).resolve().parent.parent

@pytest.fixture(scope='module')
def project(tmp_path_factory): # a copy, so that nothing is left in the real runs/
    root = tmp_path_factory.mktemp('values')
    for part in ('settings.ini', 'configs', 'nbs/launch.ipynb', '.env.example'):
        (root/part).parent.mkdir(exist_ok=True)
        (shutil.copytree if (REPO/part).is_dir() else shutil.copy)(REPO/part, root/part)
    return root

@pytest.fixture
def here(project, monkeypatch):
    (project/'.env').write_text('\n'.join(f'{k}=not-real-{k.lower()}' for k in SECRET_NAMES))
    monkeypatch.chdir(project)
    monkeypatch.setenv('VESSL_ACCESS_TOKEN', 'not-a-real-vessl-token')
    return project

def get(config, key): return flatten(OmegaConf.to_container(config, resolve=True))[key]
def told(call, *args, **kw): # the error, which has to be one for users
    with pytest.raises(UserError) as e: call(*args, **kw)
    return str(e.value)
def from_file(folder, text):
    (folder/'my.yaml').write_text(text, encoding='utf-8')
    return load_config(folder/'my.yaml')

# ---- single values

CASES = [('experiment.name=2026_11_26', '2026_11_26'), ('experiment.name=1e5', '1e5'), ('experiment.name=on', 'on'), ('experiment.name=007', '007'),
    ('training.learning_rate=inf', None), ('training.seed=-1', None), ('model.lora.target_modules=[q_proj,v_proj]', ['q_proj', 'v_proj']),
    ('training.max_steps=1e3', 1000), ('training.learning_rate=1e-5', 1e-5), # the cases of the issue; and more of each kind:
    *[(f'experiment.name={t}', t) for t in ('1:30', '0x10', '12:30:45', 'yes', 'null', '~', 'NaN', '.inf', '1_000', '0b1', '2026-11-26', '=', '- a', 'a: b',
                                            'a #b', '!x', '*a', '&a', '@x', '%x', '{a}', '[a]', "it's", 'a "b"', 'x | y')],
    ('experiment.name="a b "', 'a b '), ("experiment.name='it''s'", "it's"), ('experiment.name= x ', 'x'), ('experiment.name="\\u00e9"', 'é'),
    ('experiment.critic_checkpoint=null', None.__class__), ('experiment.critic_checkpoint=', None.__class__), ('experiment.critic_checkpoint="null"', 'null'),
    ('training.max_steps=1_000', 1000), ('training.max_steps=1000.0', 1000), ('training.max_steps=-1', -1), ('training.seed=007', 7), ('training.seed=4294967295', 2**32 - 1),
    ('training.max_steps=1e-3', None), ('training.max_steps=0', None), ('training.max_steps=1e99', None), ('training.max_steps=true', None), ('training.seed=4294967296', None),
    ('training.beta=1_000.5', 1000.5), ('training.beta=.5', .5), ('training.beta=2', 2.), ('training.beta=nan', None), ('training.beta=1e999', None), ('training.beta=1/2', None),
    ('training.gradient_checkpointing=ON', True), ('training.gradient_checkpointing=no', False), ('training.gradient_checkpointing=1', None), ('training.gradient_checkpointing=', None),
    ('evaluation.benchmarks=["mbpp", my file.jsonl]', ['mbpp', 'my file.jsonl']), ('evaluation.benchmarks=[007, on, 1e5]', ['007', 'on', '1e5']),
    ('evaluation.benchmarks=mbpp', None), ('evaluation.benchmarks=[]', None), ('evaluation.benchmarks=[""]', None), ('evaluation.ks=[1e0, 1_0]', [1, 10]),
    ('model.lora.target_modules=all-linear', 'all-linear'), ('model.lora.target_modules=.*(q|v)_proj', '.*(q|v)_proj'), ('model.lora.target_modules=[]', None),
    ('data_sampling.difficulty_weights=[1, .inf, 1]', None), ('data_sampling.difficulty_weights=[1, nan, 1]', None), ('data_sampling.curriculum=[[1, 1, inf]]', None),
    ('data_sampling.curriculum=[[1, 2, 3], [0, 0, 1e0]]', [[1., 2., 3.], [0., 0., 1.]]), ('data_sampling.difficulty_bins=[[1, 7], [8, 2.5]]', None)]

def test_override_values():
    for override, right in CASES:
        key, value = override.split('=', 1)
        extra = ['evaluation.samples=10'] if key == 'evaluation.ks' else []
        if right is None:
            message = told(apply_overrides, {}, [override])
            assert key in message and value.strip()[:9] in message and ('must be' in message or 'empty' in message), message
        elif right is type(None): assert get(apply_overrides({}, [override]), key) is None
        else:
            found = get(apply_overrides({}, [*extra, override]), key)
            assert found == right and type(found) is type(right), (override, found)

def test_shared_cases():
    file = REPO.parent/'shared'/'cases'/'override_values.json'
    if not file.is_file(): pytest.skip('no shared cases')
    ours = dict(CASES)
    for case in json.loads(file.read_text()):
        assert case.get('override', '') in {**ours, '': 0}, f"{case} is no case of this file"

# ---- every field of the schema, at its edges and beyond

def keys_of(cls=Config, prefix=''): # from the dataclasses alone, not by the code under test
    hints = get_type_hints(cls)
    for f in fields(cls):
        if is_dataclass(hints[f.name]): yield from keys_of(hints[f.name], f'{prefix}{f.name}.')
        else: yield prefix + f.name, hints[f.name], f.metadata

KEYS = list(keys_of())
TEXT = dict(good=('a', '007', 'on', '1e5', '2026_11_26', '12:30:45', 'ä 😀', 'x/y #1', '-a', 'a=b'),
            bad=('a\tb', 'a\nb', '???', '${nothing.here}', '${oc.env:HOME}', '${', 'a\\${experiment.name}', '\ud800', 'x'*5000))
OTHER = ([1], {'a': 1}, b'x', object(), ['a', ['b']], math.nan, math.inf, -math.inf, 1e300, 10**40, -10**40, 1.5, True, None, '', 'x y', '[1', "'", '"')

def edges(low, high, brackets, whole): # (accepted, refused)
    step = (lambda x, to: x + (1 if to > x else -1)) if whole else math.nextafter
    good, bad = [step(low, high), step(high, low)], [step(low, -math.inf), step(high, math.inf)]
    (good if brackets[0] == '[' else bad).append(low)
    (good if brackets[1] == ']' else bad).append(high)
    return good, bad

def typed(x): return f'{x}' if isinstance(x, str) else repr(x)

def test_every_field():
    "Accepted and equal, or refused naming key, override, value and what is allowed; by override, by file, and from Python."
    assert len(KEYS) > 70
    for key, hint, metadata in KEYS:
        kind, within = str(hint), metadata.get('within')
        whole, number, many = 'int' in kind, 'int' in kind or 'float' in kind, 'list' in kind
        assert not number or within, f'{key} has no range'
        good, bad = [], []
        if number:
            good, bad = edges(within.low, within.high, within.brackets, whole)
            assert all(map(math.isfinite, (within.low, within.high)))
            good, bad = good + list(metadata['also']), [x for x in bad if x not in metadata['also']] + ['inf', '-inf', 'nan', '.inf', '.nan', 'true', '1:30', '0x10', 'two', '1e999']
            if whole: bad += [1.5, '1e-3']
        elif metadata.get('choices'): good, bad = metadata['choices'], ['on', 'x' + metadata['choices'][0]]
        elif hint is bool: good, bad = ['true', 'false', 'Yes', 'no', 'on', 'OFF'], [1, 0, 'maybe', 'y', '1.0', 2]
        elif not many and 'str' in kind: good = TEXT['good']
        wrap = {1: lambda x: [x], 2: lambda x: [[x]]}.get(kind.count('list'), lambda x: x) if number else lambda x: x
        for x in good: # the value alone; what goes with what is not looked at here
            truth = dict(true=True, false=False, yes=True, no=False, on=True, off=False)
            right = truth[x.lower()] if hint is bool else wrap(x)
            found = read_override(f'{key}={typed(wrap(x))}')
            assert found == (key, right), (key, x, found)
        for x in bad:
            message = told(read_override, f'{key}={typed(wrap(x))}')
            assert message.startswith(f"override '{key}=") and typed(x)[:50] in message and ('must be' in message or 'allowed are' in message), message

def nested(key, value):
    for part in reversed(key.split('.')): value = {part: value}
    return value

def test_no_field_takes_anything_else(tmp_path):
    "From Python: refused, or the very value; never another error."
    for key, hint, metadata in KEYS:
        for value in (*OTHER, *TEXT['bad']):
            try: config = apply_overrides(nested(key, value))
            except UserError as e: assert key in str(e) or key.split('.')[-1] in str(e), (key, value, e); continue
            found = get(config, key)
            assert found == value or value == '' and found is None, (key, value, found)
            assert not isinstance(value, bool) or hint is bool, (key, value)

def test_all_fields_of_a_file_at_once(tmp_path):
    wrong = '\n'.join(yaml.safe_dump(nested(k, {'no': 'value'})) for k, *_ in KEYS if '.' not in k)
    tree = {}
    for key, *_ in KEYS:
        at = tree
        for part in key.split('.')[:-1]: at = at.setdefault(part, {})
        at[key.split('.')[-1]] = {'no': 'value'}
    lines = told(from_file, tmp_path, yaml.safe_dump(tree)).splitlines()
    assert len(lines) == len(KEYS)
    for key, *_ in KEYS: assert any(f'{key} = ' in line and 'my.yaml, line ' in line for line in lines), key

def test_random_text_never_ends_in_a_traceback(tmp_path):
    draw = random.Random(0)
    letters = string.ascii_letters[:6] + string.digits + ' \t\n\'"[]{}:,#&*!|>%@`$\\=-_.~?<' + 'äß😀\u2028\x85\x00'
    for i in range(3000):
        key = draw.choice(KEYS)[0]
        text = ''.join(draw.choices(letters, k=draw.randrange(9)))
        try: assert read_override(f'{key}={text}')[0] == key
        except UserError as e: assert 'override' in str(e)
    for i in range(300):
        text = ''.join(draw.choices(letters, k=draw.randrange(40)))
        section, _, name = draw.choice(KEYS)[0].rpartition('.')
        try: from_file(tmp_path, f'{section or "training"}: {{{name}: {text}}}' if i % 2 else text)
        except UserError as e: assert 'my.yaml' in str(e)

def test_limits_are_those_of_torch_peft_and_numpy():
    import numpy as np, torch
    from peft import LoraConfig
    def edge(key, high): w = schema()[key].within; return w.high if high else w.low
    for key in ('training.seed', 'data_sampling.seed'):
        for high in (False, True): np.random.default_rng(edge(key, high)); np.random.seed(edge(key, high)); torch.manual_seed(edge(key, high))
    with pytest.raises(ValueError): np.random.seed(edge('training.seed', True) + 1)
    below, p = math.nextafter(1, 0), [torch.nn.Parameter(torch.ones(1))]
    torch.optim.AdamW(p, lr=edge('training.learning_rate', True), betas=(below, below), weight_decay=edge('training.weight_decay', True))
    with pytest.raises(ValueError): torch.optim.AdamW(p, betas=(edge('training.adam_beta1', True), .9))
    torch.nn.Dropout(edge('model.lora.dropout', False)), torch.nn.Dropout(below)
    lora = plain(apply_overrides({}, ['model.lora.target_modules=["q_proj", v_proj]']).model.lora)
    assert LoraConfig(target_modules=lora['target_modules']).target_modules == {'q_proj', 'v_proj'} and json.dumps(lora)

# ---- files

def test_text_in_files(tmp_path):
    "Quoted or not, in any style of YAML: the characters as typed."
    c = from_file(tmp_path, 'experiment:\n  name: 2026_11_26 # a comment\n  description: "on"\n  critic_checkpoint: null\n  reference_checkpoint: "null"\n'
        'dataset: {train: 007, validation: 1e5, test: ~}\nmodel: {backbone: 0x10, tokenizer: yes, lora: {target_modules: [q_proj, 1e5]}}\n'
        'evaluation:\n  benchmarks:\n  - mbpp\n  - "007"\n  - 12:30:45\n  tokenizer:\nmlflow: {experiment: 1:30}\ntraining:\ncritic: {}\n')
    right = {'experiment.name': '2026_11_26', 'experiment.description': 'on', 'experiment.critic_checkpoint': None, 'experiment.reference_checkpoint': 'null',
             'dataset.train': '007', 'dataset.validation': '1e5', 'dataset.test': None, 'model.backbone': '0x10', 'model.tokenizer': 'yes',
             'model.lora.target_modules': ['q_proj', '1e5'], 'evaluation.benchmarks': ['mbpp', '007', '12:30:45'], 'evaluation.tokenizer': None, 'mlflow.experiment': '1:30'}
    assert {k: get(c, k) for k in right} == right
    again = from_file(tmp_path, to_yaml(c))
    assert to_yaml(again) == to_yaml(c) and {k: get(again, k) for k in right} == right
    lines = from_file(tmp_path, 'experiment:\n  description: |\n    two\n    lines\n').experiment.description
    assert lines == 'two\nlines\n'

def test_references(tmp_path):
    c = apply_overrides({}, ['experiment.name=a', 'checkpoint.save_dir=out/${pipeline}/${experiment.name}', 'training.log_every=${training.batch_size}', 'training.batch_size=3'])
    assert (c.checkpoint.save_dir, c.training.log_every) == ('out/critic/a', 3)
    for override, says in (('training.log_every=${training.beta}', 'training.log_every'), ('training.seed=${training.max_steps}', 'training.seed = -1'),
                           ('experiment.name=${experiment.name}', 'experiment.name'), ('experiment.name=${training}', 'unknown key'), ('training.seed=${experiment.description}', 'training.seed'),
                           ('training.seed=a${training.seed}', 'training.seed'), ('evaluation.benchmarks=["${x}"]', 'unknown key')):
        assert says in told(apply_overrides, {}, [override]), override

FILES = [(b'training:\n  seed: 1\n  seed: 2\n', "line 3: the key 'seed' is there twice"), (b'training:\n\tseed: 1\n', 'line 2, column 1'), (b'experiment:\n  name: \xe9\n', 'line 2: not UTF-8'),
    ('training:\n seed: 1'.encode('utf-16'), 'not UTF-8'), (b'experiment: {name: !!python/object/apply:os.system [x]}', 'tag'), (b'training: {seed: !!int "3"}', 'tag'),
    (b'training: {seed: "3}', 'line 1'), (b'[', 'line 1'), (b'- a', 'a list'), (b'just text', 'one text'), (b'training: 3', 'must be a section'), (b'training: [seed]', 'must be a section'),
    (b'training.seed: 3', 'write it as a section'), (b'trainig: {}', "Did you mean 'training'"), (b'training: {sed: 3}', "Did you mean 'training.seed'"), (b'? [a]\n: b', 'one word'),
    (b'training: &t {seed: *t}', 'holds itself'), (b'a: 1\n---\nb: 2', 'line 2'), (b'training: {<<: {seed: 1}}', 'merge keys'), (b'[' * 3000, 'too deeply'), (b'training: {seed: 1}\x00', 'special characters'),
    (b'1: 2', "unknown key '1'"), (b'true: x', "unknown key 'true'"), (b'model: {lora: [r]}', 'must be a section')]

def test_bad_files(tmp_path):
    for content, says in FILES:
        (tmp_path/'my.yaml').write_bytes(content)
        message = told(load_config, tmp_path/'my.yaml')
        assert says in message and 'my.yaml' in message and len(message) < 400, message
    bomb = 'a: &a [x, x]\n' + ''.join(f'{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}]\n' for a, b in zip('abcdefghijklmnop', 'bcdefghijklmnop'))
    assert len(told(from_file, tmp_path, bomb)) < 3000
    for path in (tmp_path, tmp_path/'none.yaml', '', 5, None, b'x', 'x'*5000, 'a\0b', '~nobody/x', ['a']): assert 'Config file' in told(load_config, path), path
    (tmp_path/'my.yaml').write_bytes(b'\xef\xbb\xbftraining:\r\n  seed: 3\r\n') # as Windows editors write it
    assert load_config(tmp_path/'my.yaml').training.seed == 3
    assert from_file(tmp_path, '').training.seed == 42 and from_file(tmp_path, '# nothing\n').training.seed == 42

def test_python_values():
    import numpy as np
    c = apply_overrides({'training': {'seed': np.int64(3), 'beta': np.float32(.5), 'max_steps': 1e3}, 'experiment': {'critic_checkpoint': PurePosixPath('a/b.pt'), 'name': 'null'}})
    assert (c.training.seed, c.training.beta, c.training.max_steps, c.experiment.critic_checkpoint, c.experiment.name) == (3, .5, 1000, 'a/b.pt', 'null')
    changed = load_config(REPO/'configs/critic/critic.yaml')
    changed.training.seed = -1 # set by hand, so checked when next used
    for bad, says in (({'experiment': {'name': 7}}, 'write it in quotes'), ({'training': {'seed': '\u0663'}}, 'whole number'), ({'training': {'beta': np.array([1.])}}, 'a number'), (changed, 'training.seed = -1'),
                      ({'training': None, 'experiment': {'name': None}}, 'experiment.name'), ({3: 4}, "unknown key '3'"), ('x', 'config'), (3, 'config'), ({'training': {'batch_size': 1.5}}, 'whole number')):
        assert says in told(apply_overrides, bad)
    for overrides in (5, {'training.seed': 1}, [None], [5], ['=1'], [''], [b'training.seed=1']): assert 'key=value' in told(apply_overrides, {}, overrides)

# ---- requests, by every entry point

AWKWARD = ['a b', ' a', 'a ', 'a "b" \'c\'', "it's", 'a\\b\\', 'a=b', 'a: b', '# a', 'a #b', '50% %(x)s', '$HOME $(x) `x`', '${x}', 'ä ß ü', '😀 👨\u200d👩\u200d👧', '-x', '--override', '', 'null', '~', 'on',
           '007', '1e5', '12:30:45', '2026_11_26', '[a, b]', '{a: b}', '!x *a &b', '|', '"', 'a training.seed=1', 'a b=c', '\u00a0a', 'abc/' + 'x/'*148, 'x'*300, 'a\nb', 'a\tb', '\x00', '\u2028', '???']
FIELDS = ('experiment.name', 'experiment.description', 'dataset.train', 'experiment.reference_checkpoint', 'evaluation.tokenizer', 'mlflow.experiment', 'checkpoint.save_dir')

def through_yaml_and_shell(plan): # as VESSL does: parsed, dumped, parsed; then a shell's words
    from weighted_mtp.targets import run_yaml_text
    again = yaml.safe_load(yaml.dump(yaml.safe_load(run_yaml_text(plan.run_yaml))))
    assert again == plan.run_yaml
    words = shlex.split(again['run'][-1]['command'])
    assert words == plan.command
    given = [b for a, b in zip(words, words[1:]) if a == '--override']
    return load_config(words[words.index('--config') + 1], given)

def injected(request): # what the parameters cells of the launch notebook come to
    from weighted_mtp.launch import notebook_request
    from weighted_mtp.records import request_notebook
    names = {}
    for cell in nbformat.reads(request_notebook(request), 4).cells:
        if {'parameters', 'injected-parameters'} & set(cell.metadata.get('tags', ())): exec(cell.source, names)
    return notebook_request({k: v for k, v in names.items() if not k.startswith('__')})

def test_round_trip(here, monkeypatch):
    "Request → papermill's parameters → form → command line → run YAML → config: the same value for every text, or refused."
    from weighted_mtp.form import LaunchForm
    from weighted_mtp.launch import make_plan
    monkeypatch.setattr('weighted_mtp.plan._code_warnings', lambda site: [])
    arrived = set()
    for text in AWKWARD:
        for field in ('critic_checkpoint', *FIELDS):
            asked = dict(critic_checkpoint=text) if field == 'critic_checkpoint' else dict(overrides=[f'{field}={quoted(text)}'])
            asked = dict(pipeline='verifiable', ngpus=1, **asked)
            key = 'experiment.critic_checkpoint' if field == 'critic_checkpoint' else field
            try: plan = make_plan(**asked)
            except UserError as e:
                assert field in str(e) and 'must be' in str(e) or 'unknown key' in str(e), (field, text, e)
                continue
            arrived.add((field, text))
            right = None if text == '' and schema()[key].optional else text
            assert flatten(plan.resolved)[key] == right
            assert get(through_yaml_and_shell(plan), key) == right
            assert make_plan(**injected(asked)) == plan
            form = LaunchForm(**asked)
            assert make_plan(**form.request) == plan, (field, text)
    described = {t for f, t in arrived if f == 'experiment.description'}
    assert set(AWKWARD) - described == {'${x}', '\x00', '\u2028', '???'} # all others arrive, line breaks and tabs too
    assert {t for f, t in arrived if f == 'experiment.reference_checkpoint'} == described - {'a\nb', 'a\tb', 'x'*300}
    assert len([1 for f, t in arrived if f == 'critic_checkpoint']) > 25

def test_names_of_records(here):
    from weighted_mtp.launch import Run, launch, new_run, relaunch
    for name in ('2026_11_26', '007', 'on', 'ä 😀 #1: "x" \'y\' 50% $HOME', '=', 'null', 'a b'):
        run, plan = new_run(pipeline='critic', ngpus=1, name=name, dry_run=True, overrides=['experiment.name=1e5'])
        assert run.name == name and Run(name).record()['request']['name'] == name
        assert {**injected(run.record()['request']), 'overrides': 0} == {**run.record()['request'], 'overrides': 0}
        assert load_config(run.folder/'config.yaml').experiment.name == '1e5'
    again = relaunch('007', dry_run='yes', target='local')
    assert again.name == '007-2' and again.record()['plan']['resolved']['experiment']['name'] == '1e5'
    for name in ('', ' a', 'a\n', '../a', '.a', '-a', 'x'*300, 7, True, 1e5, ['a'], b'a'):
        assert told(new_run, pipeline='critic', ngpus=1, name=name, dry_run=True).startswith('name = ')
    assert "Did you mean 'ngpus'" in told(relaunch, '007', ngpu=2)

def test_overrides_in_any_form(here):
    import papermill.cli
    from weighted_mtp.launch import make_plan
    two = ['training.learning_rate=1e-5', 'training.max_steps=3']
    forms = ['["training.learning_rate=1e-5", "training.max_steps=3"]', '["training.learning_rate=1e-5","training.max_steps=3"]', "['training.learning_rate=1e-5', 'training.max_steps=3']",
             '[training.learning_rate=1e-5, training.max_steps=3]', ' '.join(two), '\n'.join(two) + '\n', '\r\n'.join(two), two, tuple(two), '  '.join(two)]
    for given in forms:
        if isinstance(given, str): given = papermill.cli._resolve_type(given) # what -p makes of it
        assert make_plan('critic', 1, overrides=given).overrides == two, given
        assert make_plan(**injected(dict(pipeline='critic', ngpus=1, overrides=given))).overrides == two
    assert make_plan('critic', 1, overrides='["experiment.description=\\ud83d\\ude00 a=b"]').resolved['experiment']['description'] == '😀 a=b'
    assert make_plan('critic', 1, overrides='experiment.description="a training.seed=2" training.seed=1').resolved['experiment']['description'] == 'a training.seed=2'
    for given, says in (('["training.seed=1"', 'begins like a list'), ('[5]', 'key=value'), ('[[1]]', 'key=value'), (5, 'key=value'), ({'training.seed': 1}, 'key=value'), ('training.seed', 'key=value'),
                        (['experiment.description=a training.seed=1'], 'give each override by itself'), (['training.seed=1\ntraining.beta=2'], 'one line'), ('seed=1', "Did you mean 'training.seed'")):
        assert says in told(make_plan, 'critic', 1, overrides=given), given

def test_what_papermill_makes_of_text(here):
    "`-p` turns text into numbers before we see it: refused with the way out, never changed. `-r` keeps the characters."
    import papermill.cli
    from weighted_mtp.launch import make_plan
    for field in ('name', 'critic_checkpoint', 'config'):
        for text in ('007', '1e5', 'True', 'inf', '2026_11_26', 'nan'):
            value = papermill.cli._resolve_type(text)
            assert not isinstance(value, str)
            message = told(make_plan, **injected(dict(pipeline='verifiable', ngpus=1) | {field: value}))
            assert message.startswith(f'{field} = ') and f'-r {field} TEXT' in message
    raw = injected(dict(pipeline='verifiable', ngpus='2', critic_checkpoint='007', dry_run='True', batch_size='1e1')) # as with -r
    plan = make_plan(**raw)
    assert (plan.resolved['experiment']['critic_checkpoint'], plan.batch_size, plan.request['ngpus']) == ('007', 10, 2)

def test_numbers_of_requests(here):
    from weighted_mtp.form import LaunchForm
    from weighted_mtp.launch import make_plan
    for value in (10, '10', '1e1', 10.0, ' 10 ', '1_0'): assert make_plan('critic', 2, batch_size=value, grad_accum=1).batch_size == 10
    assert make_plan('critic', '2', effective_batch='2.4e1').effective_batch == 24
    for value in (0, -1, 1.5, True, '', 'ten', math.inf, math.nan, [1], '1e9', 10**12): assert re.search('batch_size = .*must be a whole number', told(make_plan, 'critic', 1, batch_size=value)), value
    for value in (3, 8, 2.0, True, '2.0', '1e0', 'two', '', [1], math.nan, '٢'): assert 'only 1, 2 or 4 GPUs' in told(make_plan, 'critic', value), value
    for value in (1, 0, 'maybe', '', None, []): assert 'dry_run' in told(make_plan, 'critic', 1, dry_run=value), value
    for value in (1, True, ['local'], {}, 'Local'): assert 'target = ' in told(make_plan, 'critic', 1, target=value) and 'pipeline = ' in told(make_plan, value, 1)
    form = LaunchForm(pipeline='critic', ngpus='2', batch_size=' 1e1', grad_accum=None, overrides='training.seed=1 training.beta=2', config=None) if False else \
        LaunchForm(pipeline='critic', ngpus='2', batch_size=' 1e1', grad_accum=None, overrides='training.seed=1 training.beta=2')
    assert form.request == {**make_plan('critic', 2, batch_size=10, overrides=['training.seed=1', 'training.beta=2']).request, 'batch_size': '1e1', 'dry_run': False, 'name': None}
    form.fields['overrides'].value = '["training.seed=1", "training.beta=2"]'
    assert make_plan(**form.request).overrides[1:] == ['training.seed=1', 'training.beta=2']
    for field, value in (('pipeline', 'critc'), ('ngpus', 8), ('ngpus', 2.5), ('target', 'moon'), ('dry_run', 'perhaps'), ('overrides', ['a\nb']), ('nope', 1)):
        assert field in told(LaunchForm, **{field: value}), field

def test_config_files_of_requests(here):
    from weighted_mtp.launch import make_plan
    for name in ('-x.yaml', 'a b.yaml', "it's #1.yaml", '007', 'ü😀.yaml'):
        (here/name).write_text('pipeline: critic\nexperiment: {name: 2026_11_26}\n', encoding='utf-8')
        plan = make_plan('critic', 1, config=name)
        assert through_yaml_and_shell(plan).experiment.name == '2026_11_26' and not plan.config.startswith('-')
    for name in ('none.yaml', 'configs', 'x'*5000, 'a\0b', '~nobody/x.yaml', '', ' ', 5, True): assert 'onfig' in told(make_plan, 'critic', 1, config=name), name
    (here/'leak.yaml').write_text('pipeline: critic\nexperiment: {description: not-real-hf_token}\n')
    message = told(make_plan, 'critic', 1, config='leak.yaml')
    assert 'experiment.description holds the value of HF_TOKEN' in message and 'not-real-hf_token' not in message

def test_a_secret_with_quotes_is_found(here):
    from weighted_mtp.launch import make_plan
    (here/'.env').write_text(r"""MLFLOW_TRACKING_PASSWORD="ab'c\\d\"e12" """)
    secret = 'ab\'c\\d"e12'
    assert ('MLFLOW_TRACKING_PASSWORD', secret) in known_secrets()
    message = told(make_plan, 'critic', 1, overrides=[f'experiment.description={secret}', f'experiment.nam={secret}'])
    assert 'holds the value of MLFLOW_TRACKING_PASSWORD' in message and secret not in message

# ---- the site

def test_site(here, tmp_path):
    good = (here/'settings.ini').read_text()
    def site(text, encoding='utf-8'):
        (tmp_path/'s.ini').write_bytes(text.encode(encoding))
        return load_site(tmp_path/'s.ini')
    def changed(field, value): return site(re.sub(rf'(?m)^(# )?{field} = .*', lambda _: f'{field} = {value}', good))
    for field, value in (('image', 'a/b%20c:%(x)s%'), ('cluster', '2026_11_26'), ('git_ref', '1e5'), ('git_ref', 'on'), ('project', '007'), ('cluster', '12:30:45'), ('organization', 'ü')):
        assert getattr(changed(field, value), field) == value
    for value, right in (('2.5', 2.5), ('0', 0.), ('1e0', 1.), ('', None)): assert changed('price_per_gpu_hour', value).price_per_gpu_hour == right
    for value in ('inf', 'nan', '-1', 'two', '1,5', '2 EUR'): assert 'price_per_gpu_hour' in told(changed, 'price_per_gpu_hour', value)
    for field in ('cluster', 'image', 'git_url', 'organization', 'workdir', 'preset_2gpu', 'secrets'):
        for value in ('/a b', '/a\n   b', '/a # b', '/a\tb'): assert f's.ini: {field} = ' in told(changed, field, value)
    for field in ('mlflow_uri', 'git_url'): assert 'geheim' not in (m := told(changed, field, 'https://me:geheim@host/x')) and field in m
    assert "Did you mean 'checkpoints'" in told(changed, 'exports', 'checkpoint, mlruns')
    for text, encoding, says in (('[DEFAULT', 'utf-8', 'ini file'), (good, 'utf-16', 'UTF-8'), (good.replace('cluster', 'clutser'), 'utf-8', "Did you mean 'cluster'"), ('', 'utf-8', 'missing'),
                                 (good + '\ncluster = x\n', 'utf-8', 'cluster'), (good.replace('# My', 'My'), 'utf-8', '') if False else ('x = 1\n', 'utf-8', 'ini file')):
        assert says in told(site, text, encoding)

def test_awkward_sites_survive_vessl(here):
    from weighted_mtp.launch import make_plan
    good = (here/'settings.ini').read_text()
    try:
        text = good
        for field, value in dict(git_ref='0123', image='yes', cluster='12:30:45', preset_1gpu='1e5', aws_region='on', organization='~', mlflow_uri='http://x/%20#a').items():
            text = re.sub(rf'(?m)^{field} = .*', lambda _: f'{field} = {value}', text)
        (here/'settings.ini').write_text(text)
        plan = make_plan('critic', 1)
        through_yaml_and_shell(plan)
        assert (plan.run_yaml['image'], plan.run_yaml['resources']) == ('yes', dict(cluster='12:30:45', preset='1e5'))
        assert plan.run_yaml['env']['AWS_DEFAULT_REGION'] == 'on'
    finally: (here/'settings.ini').write_text(good)

# ---- .env

def read_env(folder, text, example=None):
    (folder/'.env').write_bytes(text if isinstance(text, bytes) else text.encode())
    if example is not None: (folder/'.env.example').write_text(example)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        return load_env(folder/'.env'), [str(w.message) for w in found if issubclass(w.category, EnvWarning)]

PASSWORD = 'MLFLOW_TRACKING_PASSWORD'
LINES = [ # text, what is read, lines that are named
    (f'{PASSWORD}: x\n', {}, [1]), (f"export {PASSWORD}='it''s'\nHF_TOKEN=abc\n", dict(HF_TOKEN='abc'), [1]), ('HF_TOKEN=hf_xxx your token here\n', {}, [1]), (f'{PASSWORD}=ab$cd\n', {PASSWORD: 'ab$cd'}, []),
    # and more of each kind
    (f'# a comment\n\n\n{PASSWORD} x\nOTHER=1\n', dict(OTHER='1'), [4]), (f'{PASSWORD}="abc\nHF_TOKEN=abc\n', dict(HF_TOKEN='abc'), [1]), (f"{PASSWORD}='abc\nHF_TOKEN=abc\n", dict(HF_TOKEN='abc'), [1]),
    ('MY NAME=x\nA-B=x\n1A=x\n=x\nHF_TOKEN=abc', dict(HF_TOKEN='abc'), [1, 2, 3, 4]), ('"A B"=x\nHF_TOKEN=abc', dict(HF_TOKEN='abc'), [1]), ('HF_TOKEN\n', {}, [1]),
    ('\ufeffHF_TOKEN=abc\r\n\r\nOTHER: 1\r\nAWS_DEFAULT_REGION = eu\r\n', dict(HF_TOKEN='abc', AWS_DEFAULT_REGION='eu'), [3]),
    ('HF_TOKEN=abc\nHF_TOKEN=def\n', dict(HF_TOKEN='def'), [2]), ('OTHER=abc\nexport OTHER=abc\n', dict(OTHER='abc'), [2]),
    (f'{PASSWORD}="two words # $x"\n', {PASSWORD: 'two words # $x'}, []), (f"{PASSWORD}='a\"b'\n", {PASSWORD: 'a"b'}, []), (f'{PASSWORD}=two words\n', {PASSWORD: 'two words'}, [1]),
    (f'{PASSWORD}=ab#cd # a comment\n', {PASSWORD: 'ab#cd'}, []), (f'{PASSWORD}=${{HOME}}\n', {}, [1]), (f'{PASSWORD}="a\nb"\n', {}, [1]), (f'{PASSWORD}=p=q\n', {PASSWORD: 'p=q'}, []),
    ('HF_TOKEN="a b"\n', {}, [1]), ('HF_TOKEN=hf_abc\u200b\n', {}, [1]), ('AWS_ACCESS_KEY_ID=ÄÖ\n', {}, [1]), ('HF_TOKEN=\nAWS_DEFAULT_REGION=\n', {}, []),
    *[(f'HF_TOKEN={p}\n', {}, [1]) for p in ('...', '…', '<token>', 'changeme', 'CHANGE_ME', 'change-me', 'xxx', 'hf_xxxxxxxx', 'your_token_here', 'YOUR-TOKEN', 'HF_TOKEN', '***', 'todo', 'placeholder', '<your key>')],
    *[(f'{PASSWORD}={p}\n', {}, [1]) for p in ('your password here', 'your-password', '....', '"<the password>"')],
    ('AWS_ACCESS_KEY_ID=AKIAIOSFODNN7EXAMPLE\nAWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY\n', {}, [1, 2]),
    *[(f'{PASSWORD}={p}\n', {PASSWORD: p}, []) for p in ('hunter2', 'Axxx9', 'a<b>c', '%41', 'ünïcode', 'x.y.z', 'secret!', "it's", 'a\\nb')]]

def test_env_lines(tmp_path):
    for text, right, lines in LINES:
        env, said = read_env(tmp_path, text)
        assert env == right, (text, env, said)
        assert [int(re.search(r'\.env, line (\d+): ', m)[1]) for m in said] == lines, (text, said)
        for m in said: assert 'expected' in m or 'remove one' in m or 'twice' in m or 'quote' in m or 'looks like' in m, m

def test_env_is_strict_where_it_is_needed(tmp_path, caplog, capsys):
    full = ''.join(f'{k}=real-{k.lower()}\n' for k in SECRET_NAMES)
    def needed(text):
        (tmp_path/'.env').write_text(text)
        return load_env(tmp_path/'.env', required=True)
    assert len(needed(full)) == 6 and len(needed(full + 'OTHER=...\nOTHER=x\n')) == 7 # only what a launch needs
    for extra, says in (('OTHER: geheim', 'line 7: cannot be read: expected NAME=value'), ('HF_TOKEN=geheim', 'HF_TOKEN is there twice, first in line 6'), ("A='geheim", 'has to end with the quote')):
        message = told(needed, full + extra + '\n')
        assert says in message and 'geheim' not in message and str(tmp_path/'.env') in message
    message = told(needed, full.replace('real-hf_token', '<token>').replace('real-aws_default_region', '').replace('AWS_ACCESS_KEY_ID', 'AWS_ACESS_KEY_ID'))
    assert 'line 6: HF_TOKEN looks like a placeholder' in message and 'no value for' in message and 'AWS_DEFAULT_REGION' in message and "Did you mean 'AWS_ACESS_KEY_ID'" in message
    (tmp_path/'.env.example').write_text('HF_TOKEN=real-hf_token\nAWS_DEFAULT_REGION=real-aws_default_region\n')
    assert told(needed, full).count('placeholder') == 1 # the example's own text; but for the region, which is no secret
    (tmp_path/'.env').write_bytes(full.encode() + b'OTHER=\xff\n')
    for required in (True, False): assert 'line 7: not UTF-8' in told(load_env, tmp_path/'.env', required=required)
    assert not caplog.records and capsys.readouterr() == ('', '') # nothing of python-dotenv's own

def test_env_case_files():
    file = REPO.parent/'shared'/'cases'/'env_lines.json'
    if not file.is_file(): pytest.skip('no shared cases')
    ours = {text for text, *_ in LINES}
    assert all(case['text'] in ours for case in json.loads(file.read_text()))

def test_plans_tell_of_the_env(here):
    from weighted_mtp.launch import make_plan
    (here/'.env').write_text(''.join(f'{k}=real-{k.lower()}\n' for k in SECRET_NAMES) + 'OTHER: geheim\n')
    plans = make_plan('critic', 1), make_plan('critic', 1, target='local')
    assert any('.env, line 7: cannot be read' in b for b in plans[0].blockers) and any('.env, line 7' in w for w in plans[1].warnings)
    assert not any('.env' in b for b in plans[1].blockers) and 'geheim' not in str(plans) and str(here) not in json.dumps([p.to_dict() for p in plans])
    (here/'.env').write_bytes(b'A=\xff')
    assert any('UTF-8' in b for b in make_plan('critic', 1, target='local').blockers)
