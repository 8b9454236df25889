"""A model that several processes share: each reads its part of the files, all start from the same numbers, and a state
that two wrote is read by one, and the reverse."""
import json, os, shutil, subprocess, sys
from pathlib import Path

import pytest, torch

import warm
from weighted_mtp.state_folder import Saver, contents, read_facts

REPO, BIN = Path(__file__).resolve().parent.parent, Path(sys.executable).parent

# A backbone of 100 M parameters in ten files, one small enough to train, and checkpoints to be frozen
MODELS = '''
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from weighted_mtp.config import apply_overrides
from weighted_mtp.data import vocabulary_id
from weighted_mtp.models import build_policy, build_ratio_model, build_value_model, save_checkpoint
from weighted_mtp.synthetic import make_dataset, make_micro_model
make_dataset('storage/datasets/synthetic', n_problems=60, n_held_out=30)
tok = AutoTokenizer.from_pretrained('storage/datasets/synthetic/tokenizer')
vocabulary, lora = vocabulary_id(tok), dict(r=2, alpha=4, dropout=0., target_modules=['q_proj', 'down_proj'])
sizes = dict(tokenizer=tok, hidden_size=32, n_layers=2, n_heads=2, max_length=256)
def again(seed=3): return make_micro_model(seed=seed, **sizes)
again().save_pretrained('backbone', max_shard_size='30KB')
tok.save_pretrained('backbone')
def some(model): # not the start values
    torch.manual_seed(7)
    for p in model.parameters():
        if p.requires_grad: p.data += .01*torch.randn(p.shape)
    return model
part = dict(complete=False, backbone='backbone', vocabulary=vocabulary)
save_checkpoint('critic-value.pt', some(build_value_model(again(1), head='surprise')), vocabulary=vocabulary)
save_checkpoint('critic-ratio.pt', some(build_ratio_model(again(1))), vocabulary=vocabulary)
save_checkpoint('critic-lora.pt', some(build_ratio_model(again(), 'lora', lora)), **part)
save_checkpoint('reference-full.pt', some(build_policy(again(2), 1)), vocabulary=vocabulary)
save_checkpoint('reference-lora.pt', some(build_policy(again(), 1, 'lora', lora)), **part)
c = LlamaConfig(vocab_size=2000, hidden_size=768, num_hidden_layers=14, num_attention_heads=12, intermediate_size=2048,
                tie_word_embeddings=True)
with torch.device('meta'): large = LlamaForCausalLM(c)
large.to_empty(device='cpu')
for p in large.parameters(): p.data.uniform_(-.02, .02)
large.save_pretrained('large', max_shard_size='40MB')
'''

LOAD = '''
import json, os, resource, sys
import psutil, torch
from weighted_mtp.checkpoints import resume_tensors
from weighted_mtp.config import load_config
from weighted_mtp.critic import CriticObjective, load_critic
from weighted_mtp.loop import make_trainer
from weighted_mtp.models import build_policy, load_backbone
from weighted_mtp.policies import OBJECTIVES
from weighted_mtp.rho1 import load_reference
from weighted_mtp.runs import is_main, load_parts, prepare
from weighted_mtp.sharding import full_tensor, is_distributed, is_sharded, shard
from weighted_mtp.state_folder import Saver
out, other, overrides = sys.argv[1], sys.argv[2], sys.argv[3:]
def config(pipeline, *more): return load_config(f'configs/{pipeline}/{pipeline}_micro.yaml', [*overrides, *more])
c = config('baseline')
prepare(c)

torch.ones(1).sum()
before = psutil.Process().memory_info().rss
model = build_policy(load_backbone('large', parts=is_sharded(c)), 1)
if is_sharded(c): shard(model)
size = sum(p.numel()*4 for p in model.parameters())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024 - before
rank = os.environ.get('RANK', 0)
print(f'rank {rank}: {peak/1e6:.0f} MB more at the peak, for a model of {size/1e6:.0f} MB', flush=True)
with open(f'{out}-memory-{rank}', 'w') as f: json.dump([peak, size], f)
del model

def full(model):
    named = [*model.named_parameters(), *model.named_buffers()]
    return {n: full_tensor(p.detach()).clone() for n, p in named}
found = {}
LORA = ['model.tuning=lora', 'model.lora.dropout=0']
VALUE = ['critic.head=mlp', 'critic.value_weight=0.5', 'critic.lm_weight=1', *LORA]
NO_SHARD = 'distributed.fsdp.sharding_strategy=NO_SHARD'
for name, pipeline, more in [('lora', 'baseline', LORA), ('frozen', 'baseline', ['model.tuning=frozen']),
                             ('full', 'baseline', []), ('ratio', 'critic', []), ('ratio-lora', 'critic', LORA),
                             ('value', 'critic', VALUE), ('replicated', 'baseline', [*LORA, NO_SHARD])]:
    c = config(pipeline, 'model.backbone=backbone', *more)
    prepare(c)
    objective = (CriticObjective if pipeline == 'critic' else OBJECTIVES[pipeline])(c, *load_parts(c))
    assert is_distributed() == any(p.is_meta for p in objective.model.parameters())
    trainer = make_trainer(objective, c, {})
    found[name] = full(trainer.model)
    if name == 'lora': # a step, for AdamW to have a state
        for p in trainer.model.parameters():
            if p.requires_grad: p.grad = torch.full_like(p, .5)
        trainer.optimizer.step()
        tensors = resume_tensors(trainer.model, trainer.optimizer)
        trainer.saver.save(f'{out}-state', tensors, dict(training=dict(run='x', step=1)))
        trainer.saver.wait()
        want = {n: full_tensor(x).clone() for n, x in tensors.items()}
        for x in tensors.values(): x.zero_()
        trainer.saver.load(f'{other}-state' if os.path.exists(f'{other}-state') else f'{out}-state', tensors)
        assert len(want) > 20 and all(torch.equal(full_tensor(x), want[n]) for n, x in tensors.items())

ids, HOW = torch.arange(24).view(2, 12) + 3, [('', is_distributed()), (', replicated', False)]
for name in ('value', 'ratio', 'lora'):
    for how, sharded in HOW:
        critic = load_critic(f'critic-{name}.pt', sharded=sharded)
        assert sharded == hasattr(critic, 'unshard')
        if sharded: assert f'critic-{name}.pt' not in open('/proc/self/maps').read() # a rank keeps its part alone
        found[f'critic-{name}{how}'] = dict(zip('rv', critic.credit(ids, torch.ones_like(ids), ids > 6)))
for path in ('reference-full.pt', 'reference-lora.pt', 'backbone'):
    for how, sharded in HOW:
        reference = load_reference(path, objective.tokenizer, sharded)
        with torch.no_grad(): ce = reference(ids, torch.ones_like(ids), labels=ids).token_ce
        found[f'{path}{how}'] = dict(ce=ce)
if is_main(): torch.save(found, f'{out}.pt')
if torch.distributed.is_initialized(): torch.distributed.barrier(); sys.stdout.flush(); os._exit(0)
'''

SMALL = ['dataset.n_problems=60', 'data_sampling.n_validation=20', 'training.cpu_threads=1',
         'model.tokenizer=storage/datasets/synthetic/tokenizer', 'distributed.fsdp.sharding_strategy=FULL_SHARD']

@pytest.fixture(scope='module')
def loaded(tmp_path_factory): # by one process, then by two
    root = tmp_path_factory.mktemp('loading')
    shutil.copytree(REPO/'configs', root/'configs')
    shutil.copy(REPO/'settings.ini', root/'settings.ini')
    (root/'load.py').write_text(LOAD)
    env = {**os.environ, 'PYTHONPATH': str(REPO), 'PATH': f"{BIN}:{os.environ['PATH']}", 'OMP_NUM_THREADS': '1'}
    made = warm.run([sys.executable, '-c', MODELS], root, env)
    assert made.returncode == 0, made.stderr[-3000:]
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    for words, run in (([sys.executable, 'load.py', 'one', 'none'], warm.run),
                       ([*torchrun, 'load.py', 'two', 'one'], subprocess.run)):
        more = dict(capture_output=True, text=True) if run is subprocess.run else {}
        done = run([*words, *SMALL], cwd=root, env=env, timeout=200, **more)
        assert done.returncode == 0, done.stdout + done.stderr[-4000:]
        print(done.stdout)
    yield root
    shutil.rmtree(root)

def test_a_rank_holds_its_part_alone(loaded):
    """Of a model of 400 MB in ten files. One process takes all of it; of two, each half and a file at a time."""
    names = 'one-memory-0', 'two-memory-0', 'two-memory-1'
    (alone, size), *ranks = (json.loads((loaded/n).read_text()) for n in names)
    assert alone > .95*size and size > 390e6
    for peak, _ in ranks: assert peak < .72*size, (peak/1e6, size/1e6)

@pytest.mark.parametrize('name', ['lora', 'frozen', 'full', 'ratio', 'ratio-lora', 'value', 'replicated'])
def test_one_and_two_processes_start_from_the_same_numbers(loaded, name):
    one, two = (torch.load(loaded/f'{n}.pt', weights_only=True)[name] for n in ('one', 'two'))
    assert one.keys() == two.keys()
    for k, x in one.items(): assert torch.equal(two[k], x), k

FROZEN = ['critic-value', 'critic-ratio', 'critic-lora', 'reference-full.pt', 'reference-lora.pt', 'backbone']

@pytest.mark.parametrize('name', [f'{n}{how}' for n in FROZEN for how in ('', ', replicated')])
def test_frozen_models_say_the_same_on_two_processes(loaded, name): # sharded, or a copy each
    one, two = (torch.load(loaded/f'{n}.pt', weights_only=True)[name] for n in ('one', 'two'))
    for k, x in one.items():
        assert x.abs().sum() > 0
        torch.testing.assert_close(two[k], x)

def test_one_process_reads_what_two_wrote(loaded): # the reverse is in LOAD
    assert read_facts(loaded/'two-state')['training']['step'] == 1
    assert len(list((loaded/'two-state').glob('*.distcp'))) == 2
    states = []
    for folder in ('one-state', 'two-state'):
        states.append({n: torch.empty(x.size) for n, x in contents(loaded/folder).items()})
        Saver().load(loaded/folder, states[-1])
    assert states[0].keys() == states[1].keys()
    for n, x in states[0].items(): assert torch.equal(states[1][n], x), n
