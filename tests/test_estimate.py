"""The estimates of memory against the measured peak of real training runs, each in a process of its own.
`python tests/test_estimate.py` prints the table, and writes it for nbs/studies/memory.ipynb."""
import contextlib, gc, io, json, multiprocessing, os, socket, subprocess, sys, tempfile, time
from functools import partial
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
PER_STEP = 2 # steps of a run: the second has the optimizer's moments; then it saves
ACCUMULATE, NO_SHARD = 'gradient_accumulation_steps=2', 'distributed.fsdp.sharding_strategy=NO_SHARD'
CASES = { # pipeline, model, training, length of samples, processes, more overrides; every part is large in one of them
    'ntp: activations': ('ntp', 'hidden_size=512 n_layers=2 n_heads=8', 'batch_size=6', 256, 1),
    'ntp: weights': ('ntp', 'hidden_size=1024 n_layers=2 n_heads=8', 'batch_size=1', 64, 1),
    'baseline: four heads': ('baseline', 'hidden_size=384 n_layers=2 n_heads=8', 'batch_size=4', 256, 1),
    'baseline: accumulation': (
        'baseline', 'hidden_size=512 n_layers=2 n_heads=8', f'batch_size=2 {ACCUMULATE}', 192, 1),
    'baseline: checkpointing': (
        'baseline', 'hidden_size=256 n_layers=1 n_heads=8 n_future_tokens=8',
        'batch_size=8 gradient_checkpointing=true', 256, 1),
    'baseline: selective checkpointing': (
        'baseline', 'hidden_size=256 n_layers=5 n_heads=8 n_future_tokens=2',
        'batch_size=8 gradient_checkpointing=true selective_checkpointing=true', 256, 1),
    'baseline: packed': ('baseline', 'hidden_size=384 n_layers=2 n_heads=8', 'batch_size=4 packing=true', 256, 1),
    'baseline: LoRA': ('baseline', 'hidden_size=512 n_layers=2 n_heads=8 tuning=lora', 'batch_size=2', 256, 1),
    'baseline: LoRA in bfloat16': (
        'baseline', 'hidden_size=512 n_layers=2 n_heads=8 tuning=lora dtype=bfloat16', 'batch_size=3', 128, 1),
    'baseline: heads alone': ('baseline', 'hidden_size=512 n_layers=4 n_heads=8 tuning=frozen', 'batch_size=3', 256, 1),
    'critic: with logits': ('critic', 'hidden_size=128 n_layers=1 n_heads=4', 'batch_size=16', 256, 1,
                            'critic.head=surprise', 'critic.lm_weight=1'),
    'critic: ratio': ('critic', 'hidden_size=512 n_layers=2 n_heads=8', 'batch_size=2', 256, 1),
    'critic: ratio, both on all': ('critic', 'hidden_size=128 n_layers=1 n_heads=4', 'batch_size=16', 256, 1,
                                   'critic.bce_weight=1'),
    'rho1: with reference': ('rho1', 'hidden_size=384 n_layers=1 n_heads=8', 'batch_size=3', 256, 1),
    'critic: first_error': ('critic', 'hidden_size=256 n_layers=2 n_heads=4', 'batch_size=6', 256, 1,
                            'critic.head=first_error'),
    'verifiable: sharded over two': ('verifiable', 'hidden_size=384 n_layers=2 n_heads=8', 'batch_size=3', 128, 2),
    'baseline: LoRA, packed, recomputed, sharded over four': (
        'baseline', 'hidden_size=512 n_layers=3 n_heads=8 tuning=lora',
        'batch_size=3 packing=true gradient_checkpointing=true', 256, 4),
    'ntp: sharded over two': ('ntp', 'hidden_size=640 n_layers=3 n_heads=8', f'batch_size=2 {ACCUMULATE}', 128, 2),
    'rho1: sharded over two': ('rho1', 'hidden_size=512 n_layers=2 n_heads=8', 'batch_size=2', 128, 2),
    'ntp: copied over two': ('ntp', 'hidden_size=640 n_layers=2 n_heads=8', 'batch_size=2', 128, 2, NO_SHARD)}

def config_of(case, root): # the case's config, its files in `root`
    from weighted_mtp.config import load_config
    pipeline, model, training, length, _, *other = CASES[case]
    overrides = [f'model.{w}' for w in model.split()] + [f'training.{w}' for w in training.split()]
    overrides += [f'dataset.{s}={root}/data/{s}.jsonl' for s in ('train', 'validation')]
    overrides += ['dataset.test=null', f'checkpoint.save_dir={root}/{os.getpid()}', f'dataset.max_length={length}',
                  'dataset.n_problems=100', 'data_sampling.n_validation=2', 'training.cpu_threads=1',
                  f'training.max_steps={PER_STEP}', 'checkpoint.save_checkpoint_every=1',
                  'model.backbone=micro', 'critic.blind_yardstick=false', 'critic.lm_first=0', *other]
    if pipeline == 'rho1': overrides.append(f'experiment.reference_checkpoint={root}/reference')
    if pipeline == 'verifiable': overrides.append(f'experiment.critic_checkpoint={root}/critic.pt')
    return load_config(f'configs/{pipeline}/{pipeline}_micro.yaml', overrides)

def status(key):
    lines = open('/proc/self/status').read().splitlines()
    return int(next(l for l in lines if l.startswith(key)).split()[1])*1024

def train(config, length): # a run from backbone to checkpoint, on made-up samples as long as allowed
    import torch
    from weighted_mtp.critic import CriticObjective
    from weighted_mtp.data import Sample
    from weighted_mtp.policies import OBJECTIVES
    from weighted_mtp.sampling import PairDataset, SolutionDataset
    from weighted_mtp.runs import fit, load_parts
    tokenizer, backbone = load_parts(config)
    objective = {'critic': CriticObjective, **OBJECTIVES}[config.pipeline](config, tokenizer, backbone)
    t, processes = config.training, int(os.environ.get('WORLD_SIZE', 1))
    items = t.batch_size*t.gradient_accumulation_steps*PER_STEP*processes
    def sample(i): # one of two is shorter: padding needs a mask
        return Sample(torch.randint(3, 200, (length - i%2,)).tolist(), 1, str(i//2), True, 1)
    samples = [sample(i) for i in range(2*items)]
    pairs = [(2*i, 2*i+1) for i in range(items)]
    is_critic = config.pipeline == 'critic'
    objective.data = PairDataset(samples, pairs) if is_critic else SolutionDataset(samples[:items])
    fit(objective, config, dict(checkpoint=None))

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def measure(root, case, n, port, rank): # growth of this process's peak
    from weighted_mtp.config import apply_overrides
    from weighted_mtp.runs import prepare
    if n > 1:
        os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n),
                           MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    config = config_of(case, root)
    prepare(config)
    small = ['model.hidden_size=32', 'model.n_layers=1', 'model.n_heads=2', 'training.batch_size=1']
    train(apply_overrides(config, small), CASES[case][3]) # what is loaded on first use
    time.sleep(.5) # the thread that saved lets go of the model a moment after the folder is there
    gc.collect()
    Path('/proc/self/clear_refs').write_text('5')
    before = status('VmRSS')
    train(config, CASES[case][3])
    return status('VmHWM') - before

def measure_all(root): # each case in a process of its own, forked from one that has imported everything
    import weighted_mtp.step_memory, weighted_mtp.synthetic # noqa: F401
    peaks, fork = {}, multiprocessing.get_context('fork')
    for case in CASES:
        n, port = CASES[case][4], free_port()
        with fork.Pool(n, maxtasksperchild=1) as pool:
            peaks[case] = max(pool.map(partial(measure, root, case, n, port), range(n), 1))
    return dict(peaks=peaks, traced={case: trace(case, root) for case in CASES})

def trace(case, root): # part -> bytes, by running the real model on fake tensors
    from weighted_mtp.memory_formula import with_overhead
    from weighted_mtp.model_sizes import architecture, as_attributes
    from weighted_mtp.step_memory import memory_by_kind
    config, n = config_of(case, root), CASES[case][4]
    c = as_attributes(config)
    parts = with_overhead(memory_by_kind(config, n, gpu=False), c, architecture(c.model), n, gpu=False)
    return {k: v for k, v in parts.items() if k != 'overhead'}

def measured(root): # what is freed goes back to the system at once, so that a process is as large as what it uses
    env = {**os.environ, 'PYTHONPATH': str(REPO), 'OMP_NUM_THREADS': '1', 'MALLOC_MMAP_THRESHOLD_': '65536',
           'MALLOC_TRIM_THRESHOLD_': '131072', 'MALLOC_ARENA_MAX': '1'}
    command = [sys.executable, __file__, str(root)]
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])

def make_data(root):
    from transformers import AutoTokenizer
    from weighted_mtp.data import vocabulary_id
    from weighted_mtp.models import build_ratio_model, save_checkpoint
    from weighted_mtp.synthetic import make_dataset, make_micro_model
    with contextlib.redirect_stderr(io.StringIO()): make_dataset(Path(root)/'data', n_problems=100, n_held_out=50)
    tokenizer = AutoTokenizer.from_pretrained(Path(root)/'data/tokenizer')
    make_micro_model(f'{root}/reference', tokenizer, hidden_size=768, n_layers=4, n_heads=8)
    sizes = dict(hidden_size=512, n_layers=4, n_heads=8)
    critic = build_ratio_model(make_micro_model(tokenizer=tokenizer, **sizes))
    save_checkpoint(f'{root}/critic.pt', critic, vocabulary=vocabulary_id(tokenizer))
    run = {'pipeline': 'critic', 'critic.head': 'ratio', 'model.backbone': 'micro', 'model.tuning': 'full'}
    facts = dict(config=run | {f'model.{k}': v for k, v in sizes.items()})
    (Path(root)/'run.json').write_text(json.dumps(facts)) # what a plan reads of it
    return root

def predicted(case, root):
    from weighted_mtp.estimate import estimate
    memory = estimate(config_of(case, root), CASES[case][4], gpu=False).memory
    return {k: v for k, v in memory.items() if k != 'overhead'}

@pytest.fixture(scope='module')
def root(tmp_path_factory): return make_data(tmp_path_factory.mktemp('estimate'))

@pytest.fixture(scope='module')
def found(root): return measured(root)

@pytest.fixture(scope='module')
def peaks(found): return found['peaks']

@pytest.mark.parametrize('case', CASES)
def test_memory_is_near_the_measured_peak(case, root, peaks):
    ratio = sum(predicted(case, root).values())/peaks[case]
    assert 0.9 < ratio < 1.2, f'estimated {ratio:.2f} of the measured peak'

@pytest.mark.parametrize('case', CASES)
def test_a_traced_step_is_nearer_to_it(case, found):
    ratio = sum(found['traced'][case].values())/found['peaks'][case]
    assert 0.9 < ratio < 1.1, f'traced {ratio:.2f} of the measured peak'

def test_every_part_is_needed(root, peaks): # a part that is small everywhere could be wrong unseen
    parts = {case: predicted(case, root) for case in CASES}
    def least_without(k): return min((sum(p.values()) - p[k])/peaks[case] for case, p in parts.items())
    least = {k: least_without(k) for k in parts['ntp: weights']}
    assert max(least.values()) < 0.9, '\n'.join(f'{k} {v:.2f}' for k, v in least.items()) # some case above would fail

def test_launching_loads_no_model_library():
    code = """import sys
from weighted_mtp.config import load_config
from weighted_mtp.estimate import estimate
print(estimate(load_config('configs/rho1/rho1.yaml'), 4))
assert not {'torch', 'transformers', 'mlflow', 'pandas'} & sys.modules.keys()"""
    env = {**os.environ, 'PYTHONPATH': str(REPO)}
    done = subprocess.run([sys.executable, '-c', code], cwd=REPO, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and 'extrapolated' in done.stdout, done.stderr

def production(pipeline, ngpus, *overrides):
    from weighted_mtp.config import load_config
    from weighted_mtp.estimate import estimate
    return estimate(load_config(f'configs/{pipeline}/{pipeline}.yaml', overrides), ngpus)

LARGER = ('training.batch_size=40', 'dataset.max_length=8192', 'model.tuning=full', NO_SHARD,
          'training.gradient_checkpointing=false')

@pytest.mark.parametrize('pipeline', ('critic', 'verifiable', 'baseline', 'rho1', 'ntp', 'ref_tuning'))
def test_more_of_anything_takes_more(pipeline):
    one, two, four = (production(pipeline, n) for n in (1, 2, 4))
    assert one.memory_gb > two.memory_gb > four.memory_gb and one.hours > two.hours > four.hours
    assert 10 < four.memory_gb < one.memory_gb < 80 and not one.warnings # what these configs are made for
    for override in LARGER: assert production(pipeline, 2, override).memory_gb > two.memory_gb, override
    small = production(pipeline, 1, 'training.batch_size=1', 'training.max_steps=3')
    assert small.steps == 3 and small.memory_gb < one.memory_gb and small.seconds_per_step < one.seconds_per_step

def test_warning_names_figure_limit_and_remedy():
    e = production('baseline', 1, 'training.gradient_checkpointing=false')
    facts = (f'{e.memory_gb:.0f} GB', '80 GB', 'training.batch_size (now 12)', 'dataset.max_length (now 2048)',
             'gradient_checkpointing=true')
    assert e.memory_gb > 80 and all(w in e.warnings[0] for w in facts)

def table(root):
    found = measured(make_data(root))
    rows = {case: dict(measured=peak, traced=sum(found['traced'][case].values()),
                       formula=sum(predicted(case, root).values())) for case, peak in found['peaks'].items()}
    (REPO/'nbs/studies/memory.json').write_text(json.dumps(rows, indent=1) + '\n')
    width = max(map(len, rows))
    yield f"{'':{width}} measured    traced        formula"
    for case, r in rows.items():
        ratios = (f"{r[k]/1e6:6.0f} MB {r[k]/r['measured']:.2f}" for k in ('traced', 'formula'))
        yield f"{case:{width}} {r['measured']/1e6:5.0f} MB  {'  '.join(ratios)}"

def test_choices_are_bounded_by_traced_steps(monkeypatch, tmp_path):
    """`training.fit: auto` traces the smallest and the largest micro-batch, sharded; what lies between, and what is
    replicated, is derived from these: a little above what a step of its own takes, or the same."""
    from weighted_mtp.config import apply_overrides, load_config
    from weighted_mtp.fitting import _settings_of, all_choices
    from weighted_mtp.memory_formula import FIXED, with_overhead
    from weighted_mtp.model_sizes import architecture, as_attributes
    from weighted_mtp.step_memory import memory_by_kind
    monkeypatch.setenv('WMTP_TRACE', '1')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    config = load_config('configs/baseline/baseline.yaml', [
        'model.backbone=micro', 'model.hidden_size=64', 'model.n_layers=2', 'model.n_heads=2', 'model.lora.r=8',
        'dataset.max_length=64', 'training.batch_size=2', 'training.gradient_accumulation_steps=4'])
    choices, why = all_choices(config, 2, ('no block', 'every block'))
    assert why is None and len(choices) == 2*2*4 # layouts, levels, sizes
    for c in choices:
        if c.batch_size not in (2, 4) or c.layout == 'sharded' and c.batch_size == 4: continue # each takes seconds
        own = apply_overrides(config, _settings_of(c.recomputed, c.batch_size, c.grad_accum, c.layout))
        a = as_attributes(own)
        step = sum(with_overhead(memory_by_kind(own, 2), a, architecture(a.model), 2).values()) - FIXED[True]
        assert .999 < (c.memory - FIXED[True])/step < 1.2, (str(c), step)

def test_a_plan_says_that_a_step_was_traced(monkeypatch, tmp_path):
    from weighted_mtp.plan import make_plan
    monkeypatch.setenv('WMTP_TRACE', '1')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    small = ['model.backbone=micro', 'model.hidden_size=64', 'model.n_layers=2', 'model.n_heads=2',
             'dataset.max_length=64']
    e = make_plan('baseline', ngpus=1, target='vessl', overrides=small).estimate()
    assert e.memory_basis.startswith('traced: ') and 'memory' in str(e) and 0 < e.memory_gb < 10
    assert len(list(tmp_path.rglob('*.json'))) == 1

if __name__ == '__main__':
    if len(sys.argv) > 1: print(json.dumps(measure_all(sys.argv[1])))
    else:
        with tempfile.TemporaryDirectory() as d: print('\n'.join(table(d)))
