"""Values on their way: what is typed into an override, a YAML file, a form, papermill or `.env` is what arrives,
or one clear error says why not.
"""
import json, math, random, re, shlex, shutil, string, warnings
from dataclasses import fields, is_dataclass
from pathlib import Path, PurePosixPath
from typing import get_type_hints

import nbformat, pytest, yaml
from omegaconf import OmegaConf

from weighted_mtp.config import (UserError, apply_overrides, load_config, load_site, plain, quoted, read_override,
                                 to_yaml)
from weighted_mtp.env_secrets import SECRET_NAMES, EnvWarning, known_secrets, load_env
from weighted_mtp.files import flatten
from weighted_mtp.schema import Config, schema

REPO = Path(__file__).resolve().parent.parent
CASES = REPO.parent/'shared'/'cases'

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
    monkeypatch.setattr('weighted_mtp.preflight.code_warnings', lambda site: []) # asks git each time
    return project

def get(config, key): return flatten(OmegaConf.to_container(config, resolve=True))[key]
def error(call, *args, **kw): # the text of the `UserError` that the call has to raise
    with pytest.raises(UserError) as e: call(*args, **kw)
    return str(e.value)
def from_file(folder, text):
    (folder/'my.yaml').write_text(text, encoding='utf-8')
    return load_config(folder/'my.yaml')

# ---- single values

NULL, REFUSED = object(), object()
OVERRIDES = [ # as typed, and what it has to come to; first the cases of the issue
    ('experiment.name', '2026_11_26', '2026_11_26'), ('experiment.name', '1e5', '1e5'), ('experiment.name', 'on', 'on'),
    ('experiment.name', '007', '007'), ('training.learning_rate', 'inf', REFUSED), ('training.seed', '-1', REFUSED),
    ('model.lora.target_modules', '[q_proj,v_proj]', ['q_proj', 'v_proj']), ('training.max_steps', '1e3', 1000),
    ('training.learning_rate', '1e-5', 1e-5),
    # text keeps its characters, whatever YAML would make of them
    *[('experiment.name', t, t) for t in ('1:30', '0x10', '12:30:45', 'yes', 'null', '~', 'NaN', '.inf', '1_000', '0b1',
        '2026-11-26', '=', '- a', 'a: b', 'a #b', '!x', '*a', '&a', '@x', '%x', '{a}', '[a]', "it's", 'a "b"',
        'x | y')],
    ('experiment.name', '"a b "', 'a b '), ('experiment.name', "'it''s'", "it's"), ('experiment.name', ' x ', 'x'),
    ('experiment.name', r'"\u00e9"', 'é'), ('experiment.name', '', REFUSED), ('experiment.name', '"a', REFUSED),
    ('experiment.critic_checkpoint', 'null', NULL), ('experiment.critic_checkpoint', '', NULL),
    ('experiment.critic_checkpoint', '~', NULL), ('experiment.critic_checkpoint', '"null"', 'null'),
    ('experiment.critic_checkpoint', '~/a.pt', '~/a.pt'), ('experiment.description', '', ''),
    # whole numbers
    ('training.max_steps', '1_000', 1000), ('training.max_steps', '1000.0', 1000), ('training.max_steps', '-1', -1),
    ('training.seed', '007', 7), ('training.seed', '4294967295', 2**32 - 1), ('training.seed', '4294967296', REFUSED),
    *[('training.max_steps', t, REFUSED) for t in ('0', '-2', '1e-3', '1e99', 'true', '1__0', '1:30', '0x10', '',
                                                   'null')],
    ('training.cpu_threads', 'null', NULL), ('training.cpu_threads', '', NULL), ('training.cpu_threads', '0', REFUSED),
    # numbers
    ('training.beta', '1_000.5', 1000.5), ('training.beta', '.5', .5), ('training.beta', '2', 2.),
    *[('training.beta', t, REFUSED) for t in ('nan', '-.inf', '1e999', '1/2', '50%', '1,5', 'true', '0', '1e-999')],
    # truth values
    *[('training.gradient_checkpointing', t, True) for t in ('true', 'Yes', 'ON')],
    *[('training.gradient_checkpointing', t, False) for t in ('false', 'no', 'Off')],
    *[('training.gradient_checkpointing', t, REFUSED) for t in ('1', '0', 'maybe', '', 'null', '[true]')],
    # lists
    ('evaluation.benchmarks', '["mbpp", my file.jsonl]', ['mbpp', 'my file.jsonl']),
    ('evaluation.benchmarks', '[007, on, 1e5, 1:30, null]', ['007', 'on', '1e5', '1:30', 'null']),
    *[('evaluation.benchmarks', t, REFUSED) for t in ('mbpp', '[]', '[""]', '[[mbpp]]', '[mbpp', '{mbpp: 1}', '')],
    ('evaluation.ks', '[1e0]', [1]), ('evaluation.ks', '[1.5]', REFUSED), ('evaluation.ks', '[]', REFUSED),
    ('model.lora.target_modules', 'all-linear', 'all-linear'), ('model.lora.target_modules', '.*(q|v)', '.*(q|v)'),
    ('model.lora.target_modules', '["q_proj"]', ['q_proj']), ('model.lora.target_modules', '[]', REFUSED),
    ('data_sampling.difficulty_weights', '[1, .inf, 1]', REFUSED),
    ('data_sampling.curriculum', '[[1, 1, nan]]', REFUSED),
    ('data_sampling.difficulty_weights', '[1, -1, 1]', REFUSED),
    ('data_sampling.difficulty_weights', '[1, [1], 1]', REFUSED),
    ('data_sampling.curriculum', '[[1, 2, 3], [0, 0, 1e0]]', [[1., 2., 3.], [0., 0., 1.]])]

def test_override_values():
    for key, value, right in OVERRIDES:
        override = f'{key}={value}'
        if right is REFUSED:
            message = error(apply_overrides, {}, [override])
            assert key in message and value[:9] in message and override[:40] in message, message
            assert any(s in message for s in ('must be', 'is empty', 'not YAML', 'whole numbers')), message
        else:
            found = get(apply_overrides({}, [override]), key)
            assert found is None if right is NULL else (found, type(found)) == (right, type(right)), (override, found)

def test_shared_override_cases():
    if not CASES.is_dir(): pytest.skip('no shared cases')
    ours = {f'{key}={value}' for key, value, _ in OVERRIDES}
    cases = json.loads((CASES/'override_values.json').read_text())
    assert {c['override'] for c in cases if 'override' in c} <= ours # the one of papermill is below

# ---- every field of the schema, at its edges and beyond

def keys_of(cls=Config, prefix=''): # from the dataclasses alone, not by the code under test
    hints = get_type_hints(cls)
    for f in fields(cls):
        if is_dataclass(hints[f.name]): yield from keys_of(hints[f.name], f'{prefix}{f.name}.')
        else: yield prefix + f.name, str(hints[f.name]).removeprefix("<class '").removesuffix("'>"), f.metadata

KEYS = list(keys_of())
TEXT = ('a', '007', 'on', '1e5', '2026_11_26', '12:30:45', 'ä 😀', 'x/y #1', '-a', 'a=b')
NO_TEXT = ('a\tb', 'a\nb', '???', '${nothing.here}', '${oc.env:HOME}', '${', 'a\\${experiment.name}', '\ud800',
           'x'*5000)
ANYTHING = ([1], {'a': 1}, b'x', object(), ['a', ['b']], math.nan, math.inf, -math.inf, 1e300, 10**40, -10**40, 1.5,
            True,
            None, '', 'x y', '[1', "'", '"', [], [[]], [None], {}, 1 + 2j, range(3), *NO_TEXT)
TRUTH = dict(true=True, Yes=True, on=True, false=False, no=False, OFF=False)
NO_NUMBERS = ('inf', '-inf', 'nan', '.inf', '.nan', 'true', '1:30', '0x10', 'two', '1e999', '1__0')

def edges(interval, whole): # numbers accepted, numbers refused
    low, high = interval.low, interval.high
    step = (lambda x, to: x + (1 if to > x else -1)) if whole else math.nextafter
    good, bad = [step(low, high), step(high, low)], [step(low, -math.inf), step(high, math.inf)]
    (good if interval.brackets[0] == '[' else bad).append(low)
    (good if interval.brackets[1] == ']' else bad).append(high)
    return good, bad

def number_cases(kind, metadata):
    good, bad = edges(metadata['within'], 'float' not in kind)
    good, bad = [*good, *metadata['also']], [x for x in bad if x not in metadata['also']]
    return good, [*bad, *NO_NUMBERS, *((1.5, '1e-3') if 'float' not in kind else ())]

def test_every_field():
    "Accepted and equal, or refused naming key, override, value and what is allowed."
    assert len(KEYS) > 70
    for key, kind, metadata in KEYS:
        if 'int' in kind or 'float' in kind: good, bad = number_cases(kind, metadata)
        elif metadata.get('choices'): good, bad = metadata['choices'], ('on', 'x' + metadata['choices'][0], '7')
        elif kind == 'bool': good, bad = TRUTH, (1, 0, 'maybe', 'y', '1.0', 2)
        else: good, bad = ([['a', 'b']] if 'list' in kind else TEXT), ()
        depth = kind.count('list') if 'int' in kind or 'float' in kind else 0
        def typed(x): return '['*depth + str(x) + ']'*depth
        for x in good: # alone: what does not go with it is another matter
            right = TRUTH[x] if kind == 'bool' else x
            for _ in range(depth): right = [right]
            assert read_override(f'{key}={typed(x)}') == (key, right)
        for x in bad:
            message = error(read_override, f'{key}={typed(x)}')
            assert message.startswith(f"override '{key}={typed(x)}': {key} = ") and '\n' not in message, message
            assert 'must be' in message or 'allowed are' in message, message

def nested(key, value):
    for part in reversed(key.split('.')): value = {part: value}
    return value

def test_python_values_are_taken_as_they_are_or_refused():
    for key, kind, _ in KEYS:
        for value in ANYTHING:
            try: found = get(apply_overrides(nested(key, value)), key)
            except UserError as e:
                assert key in str(e) or key.split('.')[-1] in str(e), (key, value, e)
                continue
            assert found == value or value == '' and found is None, (key, value, found)
            assert not isinstance(value, bool) or kind == 'bool', (key, value)

def test_all_problems_of_a_file_at_once(tmp_path):
    tree = {}
    for key, *_ in KEYS:
        at = tree
        for part in key.split('.')[:-1]: at = at.setdefault(part, {})
        at[key.split('.')[-1]] = {'no': 'value'}
    lines = error(from_file, tmp_path, yaml.safe_dump(tree)).splitlines()
    assert len(lines) == len(KEYS)
    for key, *_ in KEYS: assert any(re.search(rf'my\.yaml, line \d+: {key} = ', line) for line in lines), key

def test_random_text_never_ends_in_a_traceback(tmp_path):
    draw = random.Random(0)
    letters = string.ascii_letters[:6] + string.digits + ' \t\n\'"[]{}:,#&*!|>%@`$\\=-_.~?<' + 'äß😀\u2028\x85\x00'
    for _ in range(3000):
        key, text = draw.choice(KEYS)[0], ''.join(draw.choices(letters, k=draw.randrange(9)))
        try: assert read_override(f'{key}={text}')[0] == key
        except UserError as e: assert 'override' in str(e)
    for i in range(300):
        section, _, name = draw.choice(KEYS)[0].rpartition('.')
        text = ''.join(draw.choices(letters, k=draw.randrange(40)))
        try: from_file(tmp_path, f'{section or "training"}: {{{name}: {text}}}' if i % 2 else text)
        except UserError as e: assert 'my.yaml' in str(e)

def test_limits_are_those_of_torch_peft_and_numpy():
    import numpy as np, torch
    from peft import LoraConfig
    def high(key): return schema()[key].within.high
    for key in ('training.seed', 'data_sampling.seed'):
        for seed in (schema()[key].within.low, high(key)):
            np.random.default_rng(seed), np.random.seed(seed), torch.manual_seed(seed)
        with pytest.raises(ValueError): np.random.seed(high(key) + 1)
    below, p = math.nextafter(1, 0), [torch.nn.Parameter(torch.ones(1))]
    torch.optim.AdamW(p, lr=high('training.learning_rate'), betas=(below, below),
                      weight_decay=high('training.weight_decay'))
    with pytest.raises(ValueError): torch.optim.AdamW(p, betas=(high('training.adam_beta1'), .9))
    with pytest.raises(ValueError): torch.nn.Dropout(math.nextafter(high('model.lora.dropout'), 2))
    lora = plain(apply_overrides({}, ['model.lora.target_modules=["q_proj", v_proj]']).model.lora)
    assert LoraConfig(target_modules=lora['target_modules']).target_modules == {'q_proj', 'v_proj'} and json.dumps(lora)

# ---- files

STYLES = '''
experiment:
  name: 2026_11_26 # a comment
  description: "on"
  critic_checkpoint: null
  reference_checkpoint: "null"
dataset: {train: 007, validation: 1e5, test: ~}
model: {backbone: 0x10, tokenizer: yes, lora: {target_modules: [q_proj, 1e5]}}
evaluation:
  benchmarks:
  - mbpp
  - "007"
  - 12:30:45
  tokenizer:
mlflow: {experiment: 1:30}
training:
critic: {}
'''
IN_STYLES = {'experiment.name': '2026_11_26', 'experiment.description': 'on', 'experiment.critic_checkpoint': None,
    'experiment.reference_checkpoint': 'null', 'dataset.train': '007', 'dataset.validation': '1e5',
    'dataset.test': None,
    'model.backbone': '0x10', 'model.tokenizer': 'yes', 'model.lora.target_modules': ['q_proj', '1e5'],
    'evaluation.benchmarks': ['mbpp', '007', '12:30:45'], 'evaluation.tokenizer': None, 'mlflow.experiment': '1:30'}

def test_text_in_files(tmp_path):
    "Quoted or not, in any style of YAML: the characters as typed. Also when the config is written and read again."
    c = from_file(tmp_path, STYLES)
    again = from_file(tmp_path, to_yaml(c))
    assert {k: get(c, k) for k in IN_STYLES} == IN_STYLES == {k: get(again, k) for k in IN_STYLES}
    assert to_yaml(again) == to_yaml(c)
    several = 'experiment:\n  description: |\n    two\n    lines\n'
    assert from_file(tmp_path, several).experiment.description == 'two\nlines\n'
    assert 'one line' in error(from_file, tmp_path, several.replace('description', 'name'))

def test_references():
    c = apply_overrides({}, ['experiment.name=a', 'checkpoint.save_dir=out/${pipeline}/${experiment.name}',
                             'training.log_every=${training.batch_size}', 'training.batch_size=3'])
    assert (c.checkpoint.save_dir, c.training.log_every) == ('out/critic/a', 3)
    for override, says in (
            ('training.log_every=${training.beta}', 'training.log_every'),
            ('training.seed=${training.max_steps}', 'training.seed = -1'),
            ('experiment.name=${experiment.name}', 'experiment.name'), ('experiment.name=${training}', 'unknown key'),
            ('training.seed=${experiment.name}', 'training.seed'), ('training.seed=a${training.seed}', 'training.seed'),
            ('experiment.name=${training.sed}', "Did you mean 'training.seed'"),
            ('experiment.name=${oc.env:HOME}', 'begins a reference'), ('experiment.name=${', 'begins a reference'),
            ('experiment.name=\\${experiment.description}', 'begins a reference'),
            ('evaluation.benchmarks=["${x}"]', 'unknown key')):
        assert says in error(apply_overrides, {}, [override]), override

FILES = [ # what is in it, and what the message says
    (b'training:\n  seed: 1\n  seed: 2\n', "line 3: the key 'seed' is there twice"),
    (b'training:\n\tseed: 1\n', 'line 2, column 1'), (b'experiment:\n  name: \xe9\n', 'line 2: not UTF-8'),
    ('training:\n seed: 1'.encode('utf-16'), 'not UTF-8'),
    (b'training: {seed: 1}\x00', 'line 1: it holds the character'),
    (b'experiment: {name: !!python/object/apply:os.system [x]}', 'tag'), (b'training: {seed: !!int "3"}', 'tag'),
    (b'training: {seed: "3}', 'line 1'), (b'[', 'line 1'), (b'a: 1\n---\nb: 2', 'line 2'), (b'[' * 3000, 'too deeply'),
    (b'- a', 'a list'), (b'just text', 'one text'), (b'training: 3', 'must be a section'),
    (b'training: [seed]', 'must be a section'), (b'model: {lora: [r]}', 'must be a section'),
    (b'training.seed: 3', 'write it as a section'), (b'trainig: {}', "Did you mean 'training'"),
    (b'training: {sed: 3}', "Did you mean 'training.seed'"), (b'? [a]\n: b', 'one word'), (b'1: 2', "unknown key '1'"),
    (b'training: &t {seed: *t}', 'holds itself'), (b'training: {<<: {seed: 1}}', 'merge keys'),
    (b'experiment: {name: ' + b'x'*5000 + b'}', '4000'),
    (b'training: {seed: 1' + b'0'*5000 + b'}', 'training.seed = 1000')]

def test_bad_files(tmp_path):
    for content, says in FILES:
        (tmp_path/'my.yaml').write_bytes(content)
        message = error(load_config, tmp_path/'my.yaml')
        assert says in message and 'my.yaml' in message and len(message) < 400, message
    names = string.ascii_lowercase
    bomb = 'a: &a [x]\n' + ''.join(f'{b}: &{b} [{", ".join([f"*{a}"]*9)}]\n' for a, b in zip(names, names[1:]))
    assert len(error(from_file, tmp_path, bomb)) < 4000 # 9**25 items, if it were written out
    for path in (tmp_path, tmp_path/'none.yaml', '', 5, None, b'x', 'x'*5000, 'a\0b', '~nobody/x', ['a']):
        assert 'Config file' in error(load_config, path), path

def test_files_of_windows_and_empty_ones(tmp_path):
    (tmp_path/'my.yaml').write_bytes(b'\xef\xbb\xbftraining:\r\n  seed: 3\r\n')
    assert load_config(tmp_path/'my.yaml').training.seed == 3
    for text in ('', '# nothing\n', '---\n', 'training:\n# seed: 3\n'):
        assert from_file(tmp_path, text).training.seed == 42

def test_python_values():
    import numpy as np
    c = apply_overrides({'training': {'seed': np.int64(3), 'beta': np.float32(.5), 'max_steps': 1e3},
                         'experiment': {'critic_checkpoint': PurePosixPath('a/b.pt'), 'name': 'null'}})
    assert (c.training.seed, c.training.beta, c.training.max_steps) == (3, .5, 1000)
    assert (c.experiment.critic_checkpoint, c.experiment.name) == ('a/b.pt', 'null')
    c.training.seed = -1 # set by hand, so found when next used
    for bad, says in (({'experiment': {'name': 7}}, 'write it in quotes'),
                      ({'training': {'seed': '\u0663'}}, 'whole number'),
                      ({'training': {'beta': np.array([1.])}}, 'a number'),
                      ({'training': {'head_learning_rate': np.array([])}}, 'a number'),
                      ({'experiment': {'name': None}}, 'experiment.name = None'), ({3: 4}, "unknown key '3'"),
                      ('x', 'config'),
                      (3, 'config'), (c, 'training.seed = -1')):
        assert says in error(apply_overrides, bad)
    for overrides in (5, {'training.seed': 1}, [None], [5], ['=1'], [''], [b'training.seed=1']):
        assert 'key=value' in error(apply_overrides, {}, overrides)

def test_no_message_repeats_a_secret(here, tmp_path):
    for override in ('mlflow.tracking_uri=http://me:geheim@host', 'experiment.nam=not-real-hf_token',
                     'training.seed=not-real-hf_token'):
        message = error(apply_overrides, {}, [override])
        assert 'geheim' not in message and 'not-real-hf' not in message and '***' in message
    assert 'not-real-hf' not in error(from_file, tmp_path, 'training: {seed: not-real-hf_token}')

# ---- requests, by every entry point

AWKWARD = ['a b', ' a', 'a ', 'a "b" \'c\'', "it's", 'a\\b\\', 'a=b', 'a: b', '# a', 'a #b', '50% %(x)s',
           '$HOME $(x) `x`',
    'ä ß ü', '😀 👨\u200d👩\u200d👧', '-x', '--override', '', 'null', '~', 'on', '007', '1e5', '12:30:45', '2026_11_26',
    '[a, b]', '{a: b}', '!x *a &b', '|', '"', 'a training.seed=1', 'a b=c', '\u00a0a', 'abc/' + 'x/'*148]
NEVER = ['${x}', '\x00', '\u2028', '???', '\ud800'] # in no text
NOT_EVERYWHERE = ['a\nb', 'a\tb', 'x'*300] # in a description only
FIELDS = ('experiment.description', 'dataset.train', 'experiment.reference_checkpoint', 'evaluation.tokenizer',
          'mlflow.experiment',
          'checkpoint.save_dir', 'model.backbone')

def through_yaml_and_shell(plan): # as VESSL does: parsed, dumped, parsed; then a shell's words
    from weighted_mtp.vessl_run import run_yaml_text
    again = yaml.safe_load(yaml.dump(yaml.safe_load(run_yaml_text(plan.run_yaml))))
    assert again == plan.run_yaml
    words = shlex.split(again['run'][-1]['command'])
    assert words == plan.command
    given = [b for a, b in zip(words, words[1:]) if a == '--override']
    return load_config(words[words.index('--config') + 1], given)

def injected(request): # what the parameters cells of the launch notebook come to
    from weighted_mtp.launch import notebook_request
    from weighted_mtp.launch_notebook import request_notebook
    names = {}
    for cell in nbformat.reads(request_notebook(request), 4).cells:
        if {'parameters', 'injected-parameters'} & set(cell.metadata.get('tags', ())): exec(cell.source, names)
    return notebook_request({k: v for k, v in names.items() if not k.startswith('__')})

def by_command(request): # the words of a terminal
    from fastcore.script import anno_parser
    from weighted_mtp.commands import wmtp_launch
    words = [request['pipeline'], '--ngpus', str(request['ngpus'])]
    if 'critic_checkpoint' in request: words.append(f"--critic-checkpoint={request['critic_checkpoint']}")
    for o in request['overrides']: words += ['--override', o]
    a = anno_parser(wmtp_launch, pos=['pipeline']).parse_args(words)
    return dict(pipeline=a.pipeline, ngpus=a.ngpus, critic_checkpoint=a.critic_checkpoint, overrides=a.override or ())

def test_round_trip(here):
    "Request → command, papermill's parameters, form → command line → run YAML → config: the same text in every field."
    from weighted_mtp.form import LaunchForm
    from weighted_mtp.launch import make_plan
    for text in AWKWARD:
        empty = {f for f in FIELDS if text == '' and schema()[f].default}
        refused = empty | ({'checkpoint.save_dir'} if text.startswith('~') else set()) # not everybody's home folder
        asked = dict(pipeline='verifiable', ngpus=1,
                     overrides=[f'{f}={quoted(text)}' for f in FIELDS if f not in refused])
        if text == text.strip() != '': asked['critic_checkpoint'] = text
        plan = make_plan(**asked)
        config = through_yaml_and_shell(plan)
        for f in (*FIELDS, *(['experiment.critic_checkpoint'] if 'critic_checkpoint' in asked else [])):
            right = None if text == '' and schema()[f].optional else text
            if f not in refused: assert flatten(plan.resolved)[f] == right == get(config, f), (f, text)
        for request in (injected(asked), by_command(asked), LaunchForm(**asked).request):
            assert make_plan(**request) == plan, text
        for f in empty: assert 'is empty' in error(make_plan, 'critic', 1, overrides=[f'{f}='])
    for text in (*NEVER, *NOT_EVERYWHERE):
        for f in FIELDS:
            asked = dict(pipeline='critic', ngpus=1, overrides=[f'{f}={quoted(text) if text != NEVER[-1] else text}'])
            if text in NOT_EVERYWHERE and f == 'experiment.description':
                assert get(through_yaml_and_shell(make_plan(**injected(asked))), f) == text
            else: assert re.search('must be|one line', error(make_plan, **asked)), (f, text)
    for text in (*NEVER, *NOT_EVERYWHERE, '', ' a', 'a '):
        assert 'must be' in error(make_plan, 'verifiable', 1, critic_checkpoint=text)

def test_names_and_records(here):
    from weighted_mtp.launch import Run, new_run, relaunch
    for name in ('2026_11_26', '007', 'on', 'ä 😀 #1: "x" \'y\' 50% $HOME', '=', 'null', 'a b'):
        run, plan = new_run(pipeline='critic', ngpus=1, name=name, dry_run=True, overrides=['experiment.name=1e5'])
        request = run.record()['request']
        assert run.name == name == Run(name).name == request['name'] and injected(request) == request
        assert load_config(run.folder/'config.yaml').experiment.name == '1e5'
    again = relaunch('007', dry_run='yes', target='local')
    assert again.name == '007-2' and again.record()['plan']['resolved']['experiment']['name'] == '1e5'
    for name in ('', ' a', 'a\n', '../a', '.a', '-a', 'x'*300, 7, True, 1e5, ['a'], b'a'):
        assert error(new_run, pipeline='critic', ngpus=1, name=name, dry_run=True).startswith('name = ')
    assert "Did you mean 'ngpus'" in error(relaunch, '007', ngpu=2)

def test_a_workflow_names_the_stage(here):
    from weighted_mtp.launch import workflow
    for stages, says in (([dict(pipeline='critic', ngpu=1)],
                          "Stage 1 of the workflow (critic): unknown field 'ngpu'. Did you mean 'ngpus'"),
                         (['critic'], 'Stage 1 of the workflow'), ([dict(ngpus=1)], 'pipeline is missing'),
                         ('critic', 'list of requests')):
        assert says in error(workflow, stages)

def test_a_workflow_leaves_a_given_checkpoint_alone():
    from weighted_mtp.launch import _with_checkpoint
    made = dict(verifiable={'experiment.critic_checkpoint': 'new.pt'})
    for given in ('experiment.critic_checkpoint=mine.pt', 'experiment.critic_checkpoint = mine.pt',
                  '["experiment.critic_checkpoint=mine.pt"]'):
        assert _with_checkpoint(dict(pipeline='verifiable', overrides=given), made)['overrides'] == given
    added = _with_checkpoint(dict(pipeline='verifiable', overrides=None),
                             dict(verifiable={'experiment.critic_checkpoint': ' odd'}))
    assert read_override(added['overrides'][0])[1] == ' odd'

TWO = ['training.learning_rate=1e-5', 'training.max_steps=3']
LISTS = ['["training.learning_rate=1e-5", "training.max_steps=3"]',
         '["training.learning_rate=1e-5","training.max_steps=3"]',
         "['training.learning_rate=1e-5', 'training.max_steps=3']",
         '[training.learning_rate=1e-5, training.max_steps=3]',
         ' '.join(TWO), '\n'.join(TWO) + '\n', '\r\n'.join(TWO), '  '.join(TWO), TWO]

def test_overrides_in_any_form(here):
    import papermill.cli
    from weighted_mtp.launch import make_plan
    for given in LISTS:
        if isinstance(given, str): given = papermill.cli._resolve_type(given) # what -p makes of it
        assert make_plan('critic', 1, overrides=given).overrides == TWO, given
        assert make_plan(**injected(dict(pipeline='critic', ngpus=1, overrides=given))).overrides == TWO
    assert make_plan('critic', 1, overrides=tuple(TWO)).overrides == TWO
    def description(overrides): return make_plan('critic', 1, overrides=overrides).resolved['experiment']['description']
    assert description(json.dumps(['experiment.description=😀 a=b', 'training.seed=1'])) == '😀 a=b'
    assert description('experiment.description="a training.seed=2" training.seed=1') == 'a training.seed=2'
    assert description("training.seed=1 experiment.description='it''s training.seed=2'") == "it's training.seed=2"
    for given, says in (('["training.seed=1"', 'begins like a list'), ('[5]', 'key=value'), ('[[1]]', 'key=value'),
                        (5, 'key=value'), ({'training.seed': 1}, 'key=value'), ('training.seed', 'key=value'),
                        (['experiment.description=a training.seed=1'], 'give each override by itself'),
                        (['training.seed=1\ntraining.beta=2'], 'one line'),
                        ('seed=1', "unknown key 'seed'. Did you mean")):
        assert says in error(make_plan, 'critic', 1, overrides=given), given

def test_what_papermill_makes_of_text(here):
    "`-p` turns text into numbers before we see it: refused with the way out, never changed. `-r` keeps the characters."
    import papermill.cli
    from weighted_mtp.launch import make_plan
    for field in ('name', 'critic_checkpoint', 'config'):
        for text in ('007', '1e5', 'True', 'inf', '2026_11_26', 'nan'):
            request = injected(dict(pipeline='verifiable', ngpus=1) | {field: papermill.cli._resolve_type(text)})
            message = error(make_plan, **request)
            assert message.startswith(f'{field} = ') and f'-r {field} TEXT' in message
    raw = injected(dict(pipeline='verifiable', ngpus='2', critic_checkpoint='007', dry_run='True', batch_size='1e1'))
    plan = make_plan(**raw)
    assert (get(OmegaConf.create(plan.resolved), 'experiment.critic_checkpoint'), plan.batch_size,
            plan.request['ngpus']) == ('007', 10, 2)

def test_a_path_in_the_parameters_cell_is_not_dropped():
    from weighted_mtp.launch import notebook_request
    assert notebook_request(dict(pipeline='critic', critic_checkpoint=Path('a.pt'),
                                 other=Path('b')))['critic_checkpoint'] == Path('a.pt')

def test_numbers_of_requests(here):
    from weighted_mtp.launch import make_plan
    for value in (10, '10', '1e1', 10.0, ' 10 ', '1_0'):
        assert make_plan('critic', 2, batch_size=value).batch_size == 10
    assert make_plan('critic', '2', effective_batch='2.4e1').effective_batch == 24
    for value in (0, -1, 1.5, True, '', 'ten', math.inf, math.nan, [1], '1e9', 10**12):
        message = error(make_plan, 'critic', 1, batch_size=value)
        assert re.search('batch_size = .*must be a whole number', message), value
    for value in (3, 8, 2.0, True, '2.0', '1e0', 'two', '', [1], math.nan, '٢', None):
        assert 'only 1, 2 or 4 GPUs' in error(make_plan, 'critic', value), value
    for value in (1, 0, 'maybe', '', None, []): assert 'dry_run' in error(make_plan, 'critic', 1, dry_run=value), value
    for value in (1, True, ['local'], {}, 'Local', None):
        assert 'target' in error(make_plan, 'critic', 1, target=value) and 'pipeline' in error(make_plan, value, 1)

def test_form(here):
    from weighted_mtp.form import LaunchForm
    from weighted_mtp.launch import make_plan
    form = LaunchForm(pipeline='critic', ngpus='2', batch_size=' 1e1', grad_accum=None, overrides=' '.join(TWO))
    right = make_plan('critic', 2, batch_size=10, overrides=TWO)
    assert make_plan(**form.request) == right
    for text in LISTS[:4] + ['\n'.join(TWO)]:
        form.fields['overrides'].value = text
        assert make_plan(**form.request) == right, text
    form.fields['overrides'].value = ' '.join(TWO) # one a line: this is one, of two
    assert 'give each override by itself' in error(make_plan, **form.request)
    for field, value in (('pipeline', 'critc'), ('ngpus', 8), ('ngpus', 2.5), ('target', 'moon'),
                         ('dry_run', 'perhaps'),
                         ('overrides', ['a\nb']), ('overrides', [5]), ('nope', 1)):
        assert field in error(LaunchForm, **{field: value}), field

def test_config_files_of_requests(here):
    from weighted_mtp.launch import make_plan
    for name in ('-x.yaml', 'a b.yaml', "it's #1.yaml", '007', 'ü😀.yaml'):
        (here/name).write_text('pipeline: critic\nexperiment: {name: 2026_11_26}\n', encoding='utf-8')
        plan = make_plan('critic', 1, config=name)
        assert through_yaml_and_shell(plan).experiment.name == '2026_11_26' and not plan.config.startswith('-')
    for name in ('none.yaml', 'configs', 'x'*5000, 'a\0b', '~nobody/x.yaml', '', ' ', 5, True):
        assert 'onfig' in error(make_plan, 'critic', 1, config=name), name

def test_secrets_do_not_get_into_plans(here):
    from weighted_mtp.launch import make_plan
    (here/'leak.yaml').write_text('pipeline: critic\nexperiment: {description: a not-real-hf_token}\n')
    message = error(make_plan, 'critic', 1, config='leak.yaml')
    assert 'experiment.description holds the value of HF_TOKEN' in message and 'not-real-hf_token' not in message
    (here/'.env').write_text(r"""MLFLOW_TRACKING_PASSWORD="ab'c\\d\"e12" """)
    secret = 'ab\'c\\d"e12' # which the repr of a list would show in another way
    assert ('MLFLOW_TRACKING_PASSWORD', secret) in known_secrets()
    message = error(make_plan, 'critic', 1, overrides=[f'experiment.description={secret}', f'experiment.nam={secret}'])
    assert 'holds the value of MLFLOW_TRACKING_PASSWORD' in message and secret not in message

# ---- the site

def with_field(text, field, value): return re.sub(rf'(?m)^(# )?{field} = .*', lambda _: f'{field} = {value}', text)

def test_site(tmp_path):
    good = (REPO/'settings.ini').read_text()
    def site(text, encoding='utf-8'):
        (tmp_path/'s.ini').write_bytes(text.encode(encoding))
        return load_site(tmp_path/'s.ini')
    def changed(field, value): return site(with_field(good, field, value))
    for field, value in (('image', 'a/b%20c:%(x)s%'), ('cluster', '2026_11_26'), ('git_ref', '1e5'), ('git_ref', 'on'),
                         ('project', '007'), ('cluster', '12:30:45'), ('organization', 'ü')):
        assert getattr(changed(field, value), field) == value
    for value, right in (('2.5', 2.5), ('0', 0.), ('1e0', 1.), ('', None)):
        assert changed('price_per_gpu_hour', value).price_per_gpu_hour == right
    for value in ('inf', 'nan', '-1', 'two', '1,5', '2 EUR'):
        assert 's.ini: price_per_gpu_hour = ' in error(changed, 'price_per_gpu_hour', value)
    for value in ('a b', 'a # b', '- a', '{{x}}: y'): # test_vessl sends them
        assert changed('image', value).image == value
    for value in ('a\n   b', 'a\tb'): assert 's.ini: image = ' in error(changed, 'image', value)
    for field in ('cluster', 'git_url', 'organization', 'workdir', 'preset_2gpu', 'secrets'):
        for value in ('/a b', '/a\n   b', '/a # b', '/a\tb'):
            assert f's.ini: {field} = ' in error(changed, field, value)
    for field in ('mlflow_uri', 'git_url'):
        message = error(changed, field, 'https://me:geheim@host/x')
        assert field in message and 'geheim' not in message
    assert "Did you mean 'checkpoints'" in error(changed, 'exports', 'checkpoint, mlruns')
    for text, encoding, says in (('[DEFAULT', 'utf-8', 'ini file'), (good, 'utf-16', 'UTF-8'),
                                 ('x = 1\n', 'utf-8', 'ini file'),
                                 (good.replace('cluster', 'clutser'), 'utf-8', "Did you mean 'cluster'"),
                                 ('', 'utf-8', 'missing'),
                                 (good + '\ncluster = x\n', 'utf-8', 'cluster'),
                                 (good.replace('DEFAULT', 'site'), 'utf-8', '[DEFAULT]')):
        assert says in error(site, text, encoding)

def test_awkward_sites_survive_vessl(here):
    from weighted_mtp.launch import make_plan
    good = text = (here/'settings.ini').read_text()
    for field, value in dict(git_ref='0123', image='yes', cluster='12:30:45', preset_1gpu='1e5', aws_region='on',
                             organization='~',
                             mlflow_uri='http://x/%20#a').items(): text = with_field(text, field, value)
    try:
        (here/'settings.ini').write_text(text)
        plan = make_plan('critic', 1)
        through_yaml_and_shell(plan)
    finally: (here/'settings.ini').write_text(good)
    assert (plan.run_yaml['image'], plan.run_yaml['resources']) == ('yes', dict(cluster='12:30:45', preset='1e5'))
    assert plan.run_yaml['env']['AWS_DEFAULT_REGION'] == 'on'

# ---- .env

P = 'MLFLOW_TRACKING_PASSWORD'
DUMMIES = ('...', '…', '<token>', 'changeme', 'CHANGE_ME', 'change-me', 'xxx', 'hf_xxxxxxxx', 'your_token_here',
           'YOUR-TOKEN', 'HF_TOKEN',
           '***', 'todo', 'placeholder', '<your key>', '"a b"', 'hf_abc\u200b', 'hf_ä')
ENV = [ # text, what is read, lines that are named as wrong; first the cases of the issue
    (f'{P}: x\n', {}, [1]), (f"export {P}='it''s'\nHF_TOKEN=abc\n", dict(HF_TOKEN='abc'), [1]),
    ('HF_TOKEN=hf_xxx your token here\n', {}, [1]), (f'{P}=ab$cd\n', {P: 'ab$cd'}, []),
    (f'# a comment\n\n\n{P} x\nOTHER=1\n', dict(OTHER='1'), [4]), ('HF_TOKEN\n', {}, [1]),
    (f'{P}="abc\nHF_TOKEN=abc\n', dict(HF_TOKEN='abc'), [1]), (f"{P}='abc\nHF_TOKEN=abc\n", dict(HF_TOKEN='abc'), [1]),
    ('MY NAME=x\nA-B=x\n1A=x\n=x\nHF_TOKEN=abc', dict(HF_TOKEN='abc'), [1, 2, 3, 4]),
    ('"A B"=x\nHF_TOKEN=abc', dict(HF_TOKEN='abc'), [1]),
    ('\ufeffHF_TOKEN=abc\r\n\r\nOTHER: 1\r\nAWS_DEFAULT_REGION = eu\r\n', dict(HF_TOKEN='abc', AWS_DEFAULT_REGION='eu'),
     [3]),
    ('HF_TOKEN=abc\nHF_TOKEN=def\n', dict(HF_TOKEN='def'), [2]),
    ('OTHER=abc\nexport OTHER=abc\n', dict(OTHER='abc'), [2]),
    (f'{P}="two words # $x"\n', {P: 'two words # $x'}, []), (f"{P}='a\"b'\n", {P: 'a"b'}, []),
    (f'{P}=two words\n', {P: 'two words'}, [1]), (f'{P}=ab#cd # a comment\n', {P: 'ab#cd'}, []),
    (f'{P}=${{HOME}}\n', {}, [1]),
    (f'{P}="a\nb"\n', {}, [1]), (f'{P}=p=q\n', {P: 'p=q'}, []), ('HF_TOKEN=\nAWS_DEFAULT_REGION=\n', {}, []),
    *[(f'HF_TOKEN={p}\n', {}, [1]) for p in DUMMIES],
    *[(f'{P}={p}\n', {}, [1]) for p in ('your password here', 'your-password', '....', '"<the password>"')],
    ('AWS_ACCESS_KEY_ID=AKIAIOSFODNN7EXAMPLE\nAWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY\n', {},
     [1, 2]),
    *[(f'{P}={p}\n', {P: p}, []) for p in ('hunter2', 'Axxx9', 'a<b>c', '%41', 'ünïcode', 'x.y.z', 'secret!', "it's",
                                           'a\\nb')]]

def test_env_lines(tmp_path, caplog, capsys):
    for text, right, lines in ENV:
        (tmp_path/'.env').write_bytes(text.encode())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            env = load_env(tmp_path/'.env')
        messages = [str(w.message) for w in caught if issubclass(w.category, EnvWarning)]
        named = [int(re.search(r'\.env, line (\d+): ', m)[1]) for m in messages]
        assert (env, named) == (right, lines), (text, messages)
        for m in messages: assert re.search('expected|twice|looks like|into quotes|closed', m), m
    assert not caplog.records and capsys.readouterr() == ('', '') # nothing of python-dotenv's own

def test_shared_env_cases():
    if not CASES.is_dir(): pytest.skip('no shared cases')
    assert {case['text'] for case in json.loads((CASES/'env_lines.json').read_text())} <= {text for text, *_ in ENV}

def test_env_is_strict_where_it_is_needed(tmp_path):
    full = ''.join(f'{k}=real-{k.lower()}\n' for k in SECRET_NAMES)
    def needed(text):
        (tmp_path/'.env').write_text(text)
        return load_env(tmp_path/'.env', required=True)
    # only what a launch needs
    assert len(needed(full)) == 6 and needed(full + 'OTHER=...\nMINE=y\nMINE=z\n')['MINE'] == 'z'
    for extra, says in (('OTHER: geheim', 'line 7: cannot be read: expected NAME=value'),
                        ("A='geheim", 'has to end with the quote'),
                        ('HF_TOKEN=geheim', 'HF_TOKEN is there twice, first in line 6')):
        message = error(needed, full + extra + '\n')
        assert says in message and 'geheim' not in message and str(tmp_path/'.env') in message
    worse = full.replace('real-hf_token', '<token>').replace('real-aws_default_region', '')
    worse = worse.replace('AWS_ACCESS', 'AWS_ACESS')
    message = error(needed, worse)
    assert 'line 6: HF_TOKEN looks like a placeholder' in message and message.count('HF_TOKEN') == 1
    assert "no value for AWS_ACCESS_KEY_ID (it has AWS_ACESS_KEY_ID: rename it), AWS_DEFAULT_REGION" in message
    (tmp_path/'.env.example').write_text('HF_TOKEN=real-hf_token\nAWS_DEFAULT_REGION=real-aws_default_region\n')
    assert error(needed, full).count('placeholder') == 1 # the example's text; the region may be the example's
    (tmp_path/'.env').write_bytes(full.encode() + b'OTHER=\xff\n')
    for required in (True, False): assert 'line 7: not UTF-8' in error(load_env, tmp_path/'.env', required=required)

def test_plans_report_problems_of_env(here):
    from weighted_mtp.launch import make_plan
    (here/'.env').write_text(''.join(f'{k}=real-{k.lower()}\n' for k in SECRET_NAMES) + 'OTHER: geheim\n')
    vessl, local = make_plan('critic', 1), make_plan('critic', 1, target='local')
    assert any('.env, line 7: cannot be read' in b for b in vessl.blockers)
    assert any('.env, line 7: cannot be read' in w for w in local.warnings)
    assert not any('.env' in b for b in local.blockers)
    assert not any(s in json.dumps([vessl.to_dict(), local.to_dict()]) for s in ('geheim', str(here)))
    (here/'.env').write_bytes(b'A=\xff')
    assert any('UTF-8' in b for b in make_plan('critic', 1, target='local').blockers)

# ---- what a fresh user tried (issue 15, thirty bad inputs and more)

def test_launch_reads_dry_run_as_the_record_does(here, monkeypatch):
    "papermill -r gives text, and the text 'false' is true to Python."
    from weighted_mtp.launch import launch
    started = []
    monkeypatch.setattr('weighted_mtp.targets.LocalTarget.submit',
                        lambda self, plan, folder: started.append(folder.name))
    for text, right in (('false', False), ('no', False), (False, False), ('True', True), ('yes', True), (True, True)):
        run = launch('critic', 1, target='local', dry_run=text)
        assert (run.record()['request']['dry_run'], run.name not in started) == (right, right), text

def test_addresses_and_paths_of_a_config():
    for override, says in (('mlflow.tracking_uri=htp://x', 'https://HOST'),
                           ('mlflow.tracking_uri=http://', 'https://HOST'),
                           ('mlflow.tracking_uri=sqlite://x.db', 'sqlite:///FILE'),
                           ('mlflow.tracking_uri=http://me:geheim@[x', 'into .env'),
                           ('model.backbone=https://me:geheim@host/x', 'model.backbone holds'),
                           ('evaluation.benchmarks=[a, "s3://me:geheim@b/x.jsonl"]', 'evaluation.benchmarks holds'),
                           ('dataset.train=s3://me:geheim@b/x.jsonl', 'dataset.train holds'),
                           ('checkpoint.save_dir=~/x', 'save_dir'), ('checkpoint.save_dir=~', 'save_dir'),
                           ('checkpoint.save_dir=~me/x', 'save_dir')):
        message = error(apply_overrides, {}, [override])
        assert says in message and 'geheim' not in message, message
    for uri in ('http://h', 'https://h:5000/x', 'sqlite:///a.db', 'sqlite:////a/b.db', 'file:///a', 'mlruns',
                'databricks', 'postgresql+psycopg2://h/db', 'http://[::1]:5000'):
        assert apply_overrides({}, [f'mlflow.tracking_uri={uri}']).mlflow.tracking_uri == uri
    for fine in ('model.backbone=org/name', 'dataset.train=a/~/b.jsonl', 'experiment.description=see http://x/@y'):
        apply_overrides({}, [fine])

def test_hints_say_what_is_right(tmp_path):
    for override, says in (('data_sampling.difficulty_bins=[1, 7]', '(write [[1, 7]])'),
                           ('data_sampling.curriculum=5', '(write [[5]])'), ('evaluation.ks=1,5', '(write [1,5])')):
        assert says in error(apply_overrides, {}, [override])
    for text, says in (('training: {seed: 1}\n---\ntraining: {}\n', 'line 2'),
                       ('a: 1\nb: a\0b\n', "line 2: it holds the"),
                       ('a: 1\n\nb: a\x07b\n', "line 3: it holds the character '\\x07'"),
                       ('experiment: {name: "${experiment.name}"}\n', 'experiment.name: refers to itself'),
                       ('experiment: {name: "${experiment.description}", description: "${experiment.name}"}\n',
                        'refers to itself')):
        message = error(from_file, tmp_path, text)
        assert says in message and 'my.yaml' in message, message
    assert 'a second document begins' in error(from_file, tmp_path, 'training: {seed: 1}\n---\ntraining: {}\n')

def test_plans_name_what_a_config_lacks(here):
    from weighted_mtp.launch import make_plan
    mine = here/'configs'/'mine.yaml'
    try:
        for text in ('', '# nothing\n', 'training: {seed: 3}\n'):
            mine.write_text(text)
            message = error(make_plan, 'baseline', 1, config='configs/mine.yaml')
            assert 'configs/mine.yaml names no pipeline: write the line `pipeline: baseline`' in message
        mine.write_text('pipeline: ntp\ndataset:\n  train:\n')
        assert 'line 3: dataset.train = ' in error(make_plan, 'ntp', 1, config='configs/mine.yaml')
        mine.write_text(to_yaml(apply_overrides({}, ['pipeline=ntp']))) # a config as a record keeps it
        make_plan('ntp', 1, config='configs/mine.yaml')
        mine.write_text('pipeline: critic\n')
        assert 'is a config for pipeline critic, not ntp' in error(make_plan, 'ntp', 1, config='configs/mine.yaml')
        mine.write_text('training: {seed: 3}\n')
        message = error(make_plan, 'ntp', 1, config='configs/mine.yaml', overrides=['pipeline=rho1'])
        assert 'for pipeline rho1' in message
    finally: mine.unlink()
    for target in ('local', 'vessl'):
        for key in ('train', 'validation'):
            for value in ('', '  '):
                message = error(make_plan, 'baseline', 1, target=target, overrides=[f'dataset.{key}={value}'])
                assert f'dataset.{key} = ' in message and '(it is empty)' in message

def test_a_plan_warns_before_a_finished_run_is_replaced(here):
    from weighted_mtp.launch import make_plan
    old = make_plan('ntp', 1, target='local')
    folder = here/old.resolved['checkpoint']['save_dir']
    folder.mkdir(parents=True)
    def warnings(finished, changes, overrides=()):
        config = flatten(old.resolved) | changes | {'effective batch': 16}
        (folder/'run.json').write_text(json.dumps(dict(config=config, finished=finished)))
        return ' '.join(make_plan('ntp', 1, target='local', overrides=overrides).warnings)
    try:
        assert 'replaced' not in warnings(True, {})
        assert 'replaced' not in warnings(False, {'model.n_layers': 7}) # such a run begins anew, and says so
        for changes, overrides in (({'model.n_layers': 7}, ()), ({}, ['training.seed=7'])):
            assert 'finished run of other settings (' in warnings(True, changes, overrides)
        assert 'replaced' not in warnings(True, {}, ['training.seed=7', 'experiment.name=other'])
        (folder/'run.json').write_text('[1]')
        make_plan('ntp', 1, target='local')
    finally: shutil.rmtree(folder)

def test_settings_never_show_a_line_nor_hold_a_secret(here):
    good = (here/'settings.ini').read_text()
    (here/'.env').write_text('HF_TOKEN=hf_geheim1234\nMLFLOW_TRACKING_PASSWORD=geheim5678\n')
    def site(text):
        (here/'s.ini').write_bytes(text.encode())
        return load_site(here/'s.ini')
    last = good.count('\n') + 1
    for text, says in ((good + 'hf_geheim1234\n', f'line {last}: expected NAME = VALUE'),
                       (good + 'HF_TOKEN hf_geheim9999\n', f'line {last}: expected NAME = VALUE'),
                       ('hf_geheim9999\n' + good, 'line 1: expected [DEFAULT]'),
                       (good.replace('[DEFAULT]', ''), 'expected [DEFAULT]'),
                       (good + 'cluster = x\n', f'line {last}: cluster is there twice')):
        message = error(site, text)
        assert says in message and 'geheim' not in message and 's.ini' in message and 'Path(' not in message, message
    for field, value in (('image', 'hf_geheim1234'), ('git_url', 'https://h/x/hf_geheim1234'),
                         ('git_ref', 'geheim5678'),
                         ('project', 'a hf_geheim1234')):
        message = error(site, with_field(good, field, value))
        assert f'{field} ' in message and 'geheim' not in message, message
    for bom in ('\ufeff', '\ufeff\n', ): assert site(bom + good) == site(good) == site(bom + good.replace('\n', '\r\n'))
    for field, value in (('workdir', '/'), ('workdir', '/root/x/'), ('workdir', '/root/../x'),
                         ('volume_root', '/mnt/x'), ('volume_root', 'volume://'),
                         ('volume_root', 'volume://me:geheim@x'),
                         ('git_url', 'notaurl'),
                         ('git_url', 'https://host'), ('git_ref', '--upload-pack=x'),
                         ('cluster', '-x')):
        message = error(site, with_field(good, field, value))
        assert f's.ini: {field} = ' in message and 'geheim' not in message, message
    for field, value in (('git_url', 'git@host:me/x.git'), ('git_url', 'ssh://git@host/me/x'),
                         ('git_url', 'file:///a/b'), ('volume_root', 'volume://a/b'), ('workdir', '/x'),
                         ('workdir', '/root/.a/..b')):
        assert getattr(site(with_field(good, field, value)), field) == value

def test_no_advice_replaces_an_env_that_is_there(tmp_path):
    full = ''.join(f'{k}=real-{k.lower()}\n' for k in SECRET_NAMES)
    for text, says in (('', 'no value for MLFLOW'),
                       (full.replace('HF_TOKEN', 'HFTOKEN'), '(it has HFTOKEN: rename it)'),
                       (full.replace('HF_TOKEN', 'hf_token'), '(it has hf_token: rename it)'),
                       (full.replace('HF_TOKEN', 'Aws_Region_'), 'no value for HF_TOKEN. Fill')):
        (tmp_path/'.env').write_text(text)
        message = error(load_env, tmp_path/'.env', required=True)
        assert says in message and 'cp ' not in message and '?.' not in message, message
    assert 'cp .env.example .env' in error(load_env, tmp_path/'none', required=True)
    (tmp_path/'folder').mkdir()
    assert 'is not a file' in error(load_env, tmp_path/'folder', required=True)

def test_damaged_records_and_odd_workflows(here):
    from weighted_mtp.launch import Run, launch, relaunch, workflow
    from weighted_mtp.records import list_records, load_record
    run = launch('critic', 1, target='local', dry_run=True, name='sound')
    record = json.loads((run.folder/'record.json').read_text())
    worse = [{k: v for k, v in record.items() if k != lost} for lost in ('target', 'request', 'plan', 'status')]
    for held in (*worse, {}, record | dict(target='moon'), record | dict(request=[1]), record | dict(status=5)):
        (run.folder/'record.json').write_text(json.dumps(held))
        for act in (load_record, relaunch, lambda f: Run(f).status(), lambda f: Run(f).wait(), lambda f: Run(f).stop()):
            assert 'record.json has no usable ' in error(act, run.folder), held
        assert list_records().set_index('name').status['sound'] == 'unreadable'
    for bad in ('', ' ', None, 5, ['a']): assert 'give its name' in error(Run, bad)
    for bad in (None, 5, 'critic', dict(pipeline='critic', ngpus=1)): assert 'list of requests' in error(workflow, bad)
    assert workflow([]) == []
