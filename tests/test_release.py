"""Meta's release: to our format, to a trained policy and a plain Llama; damaged and incomplete ones."""
import hashlib, json, shutil

import pytest, torch

from test_storage import REPO, SHARED, questions, real_data, run_python, setup, write_lines
from test_storage import here # noqa: F401 (a fixture)

DIM, FFN, VOCAB, HEADS = 64, 160, 500, 4

def train_sentencepiece(folder):
    "`tokenizer.model`, trained on programs."
    import sentencepiece
    from weighted_mtp.synthetic import make_problems
    texts = [t for p in make_problems(200) for t in (p.instruction, *p.solutions)]
    (folder/'text.txt').write_text('\n'.join(texts))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder/'text.txt'), model_prefix=str(folder/'tokenizer'), vocab_size=VOCAB, model_type='bpe',
        byte_fallback=True, pad_id=-1, minloglevel=2, normalization_rule_name='identity',
        remove_extra_whitespaces=False)

def random_state():
    "Random weights under Meta's names: two blocks of the trunk, three extra heads."
    def w(*shape): return torch.randn(*shape)*.05
    def block(p):
        attention = {f'{p}.attention.w{c}.weight': w(DIM, DIM) for c in 'qkvo'}
        shapes = dict(w1=(FFN, DIM), w2=(DIM, FFN), w3=(FFN, DIM))
        norms = {f'{p}.{name}_norm.weight': torch.ones(DIM) for name in ('attention', 'ffn')}
        return attention | {f'{p}.feed_forward.{k}.weight': w(*s) for k, s in shapes.items()} | norms
    torch.manual_seed(0)
    state = {'tok_embeddings.weight': w(VOCAB, DIM), 'norm.weight': torch.ones(DIM), 'output.weight': w(VOCAB, DIM)}
    for name in ('layers.0', 'layers.1', 'extra_heads.0', 'extra_heads.1', 'extra_heads.2'): state |= block(name)
    return state

@pytest.fixture(scope='module')
def release(tmp_path_factory):
    "A micro checkpoint in Meta's layout, with a sentencepiece tokenizer trained on programs."
    folder = tmp_path_factory.mktemp('release')
    train_sentencepiece(folder)
    (folder/'7B_1T_4').mkdir()
    torch.save(random_state(), folder/'7B_1T_4/consolidated.pth')
    params = dict(dim=DIM, n_layers=5, n_heads=HEADS, norm_eps=1e-5, vocab_size=VOCAB, n_future_tokens=4,
                  rope_theta=10000.)
    (folder/'7B_1T_4/params.json').write_text(json.dumps(params))
    return folder

def test_source_that_lies_where_the_result_goes(here, release): # noqa: F811
    """The result's folder is made anew: the user's files in it would be gone."""
    data, model = here/'storage/datasets/gsm8k', here/'storage/models/meta-mtp-7b'
    data.mkdir(parents=True)
    write_lines(data/'train.jsonl', questions(40))
    shutil.copytree(release, model)
    shutil.copytree(release/'7B_1T_4', model, dirs_exist_ok=True) # found from the folder above, too
    for kind, name, folder in (('data', 'gsm8k', data), ('model', 'meta-mtp-7b', model),
                               ('model', 'meta-mtp-7b', model.parent)):
        assert 'Move them elsewhere' in setup(here, kind, name, '--from', str(folder), code=2).stderr
        assert (data/'train.jsonl').is_file() and (model/'7B_1T_4/consolidated.pth').is_file()
    disk = here/'disk'
    data.rename(disk)
    data.symlink_to(disk) # on another disk, and given from a folder above
    (here/'train.jsonl').write_text((disk/'train.jsonl').read_text())
    setup(here, 'data', 'gsm8k', '--from', str(here/'train.jsonl'))
    assert data.is_symlink() and (disk/'dataset.json').is_file()

@real_data
def test_release_and_real_data_to_a_trained_policy(here, release): # noqa: F811
    """Meta's layout in, real MBPP in, a short run of the pipeline `baseline`, a plain Llama out; without the hub."""
    setup(here, 'model', 'meta-mtp-7b', '--from', str(release))
    setup(here, 'data', 'mbpp', '--from', str(SHARED/'mbpp'))
    out = setup(here, 'verify').stdout
    assert 'meta-mtp-7b forward pass: loss' in out and 'FAILED' not in out
    model, data = here/'storage/models/meta-mtp-7b', 'storage/datasets/mbpp'
    overrides = [f'model.backbone={model}', 'dataset.embedded=false', 'dataset.max_length=512',
                 *(f'dataset.{split}={data}/{split}.jsonl' for split in ('train', 'validation', 'test')),
                 'training.max_steps=30', 'training.cpu_threads=1', 'data_sampling.n_validation=40',
                 'mlflow.tracking_uri=sqlite:///mlflow.db']
    config = str(REPO/'configs/baseline/baseline_micro.yaml')
    done = run_python(here, '-m', 'weighted_mtp.pipelines.run_baseline', '--config', config,
                      *[w for o in overrides for w in ('--override', o)])
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert '374 correct solutions of 374 problems' in done.stdout
    assert 'no room for a response in 512 tokens' in done.stdout
    checkpoint = next((here/'storage/checkpoints/baseline').rglob('checkpoint_best.pt'))
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from weighted_mtp.models import export_backbone, load_policy
    exported = export_backbone(load_policy(checkpoint), here/'plain', AutoTokenizer.from_pretrained(model))
    plain = AutoModelForCausalLM.from_pretrained(exported)
    assert type(plain).__name__ == 'LlamaForCausalLM'
    tok = AutoTokenizer.from_pretrained(here/'plain')
    ids = tok('def f(x):\n    return x', return_tensors='pt').input_ids
    torch.testing.assert_close(plain(ids).logits, load_policy(checkpoint)(ids).logits, rtol=1e-4, atol=1e-4)
    text = 'def f(x):\n    return x  # é'
    assert tok.decode(tok(text)['input_ids'], skip_special_tokens=True) == text

def test_bad_items_are_named(here, release): # noqa: F811
    setup(here, 'model', 'meta-mtp-7b', '--from', str(release))
    folder = here/'storage/models/meta-mtp-7b'
    file = next(folder.glob('*.safetensors'))
    file.write_bytes(file.read_bytes()[:-1] + b'x')
    out = setup(here, 'verify', code=1).stdout
    assert f'FAILED storage/models/meta-mtp-7b: {file.name} is not what it was' in out
    (folder/'tokenizer.json').unlink()
    assert 'FAILED' in setup(here, 'verify', code=1).stdout

def test_release_that_lacks_a_tensor(here, release, tmp_path): # noqa: F811
    folder = tmp_path/'lacking'
    folder.mkdir()
    for file in (release/'7B_1T_4/params.json', release/'tokenizer.model'): shutil.copy(file, folder)
    state = torch.load(release/'7B_1T_4/consolidated.pth', weights_only=True)
    lacking = {k: v for k, v in state.items() if k != 'layers.1.feed_forward.w3.weight'}
    misshapen = state | {'extra_heads.2.attention.wv.weight': torch.zeros(3, 64)}
    for changed, says in ((lacking, 'layers.1.mlp.up_proj.weight is missing'),
                          (misshapen, 'v_proj.weight has the shape (3, 64) instead of (64, 64)')):
        torch.save(changed, folder/'consolidated.pth')
        assert says in (err := setup(here, 'model', 'meta-mtp-7b', '--from', str(folder), code=2).stderr), err

def test_model_whose_files_lack_a_tensor(here, release): # noqa: F811
    "The checksums are right, so only the forward pass tells."
    from safetensors.torch import load_file, save_file
    setup(here, 'model', 'meta-mtp-7b', '--from', str(release))
    model = here/'storage/models/meta-mtp-7b'
    file, index = next(model.glob('*.safetensors')), model/'model.safetensors.index.json'
    lacking = load_file(file)
    lacking.popitem()
    save_file(lacking, file, metadata={'format': 'pt'})
    index.write_text(json.dumps(dict(metadata={}, weight_map={k: file.name for k in lacking})))
    facts = json.loads((model/'setup.json').read_text())
    for f in (file, index):
        facts['files'][f.name] = dict(bytes=f.stat().st_size, sha256=hashlib.sha256(f.read_bytes()).hexdigest())
    (model/'setup.json').write_text(json.dumps(facts))
    assert 'forward pass: no file holds the tensor' in setup(here, 'verify', code=1).stdout

BIG = '''
import json, sys, threading, time, torch
from pathlib import Path
from weighted_mtp.models import convert_meta
dim, ffn, vocab, layers = 1024, 2816, 8000, 12
def anonymous_memory(): # MiB
    return int(next(l for l in open('/proc/self/status') if l.startswith('RssAnon')).split()[1])/1024
def block(p):
    shapes = {f'attention.w{c}': (dim, dim) for c in 'qkvo'} | {'attention_norm': (dim,), 'ffn_norm': (dim,),
        'feed_forward.w1': (ffn, dim), 'feed_forward.w2': (dim, ffn), 'feed_forward.w3': (ffn, dim)}
    return {f'{p}.{name}.weight': torch.zeros(*s) for name, s in shapes.items()}
def make():
    Path('big').mkdir()
    s = {'tok_embeddings.weight': torch.zeros(vocab, dim), 'norm.weight': torch.zeros(dim),
         'output.weight': torch.zeros(vocab, dim)}
    for i in range(layers-3): s |= block(f'layers.{i}')
    for i in range(3): s |= block(f'extra_heads.{i}')
    torch.save(s, 'big/consolidated.pth')
    params = dict(dim=dim, n_layers=layers, n_heads=16, norm_eps=1e-5, n_future_tokens=4)
    Path('big/params.json').write_text(json.dumps(params))
def convert():
    before, peak, done = anonymous_memory(), [0.], threading.Event()
    def watch():
        while not done.is_set(): peak[0] = max(peak[0], anonymous_memory()); time.sleep(.002)
    t = threading.Thread(target=watch)
    t.start()
    convert_meta('big', 'out', shard_bytes=200 << 20)
    done.set(); t.join()
    sizes = [f.stat().st_size for f in Path('out').glob('*.safetensors')]
    print(json.dumps(dict(grown=peak[0] - before, largest=max(sizes)/2**20, shards=len(sizes))))
make() if sys.argv[1] == 'make' else convert()
'''

def test_conversion_holds_a_shard_at_a_time(here): # noqa: F811
    for step in ('make', 'convert'):
        done = run_python(here, '-c', BIG, step)
        assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found['shards'] >= 3 and found['grown'] < 1.2*found['largest'], found
