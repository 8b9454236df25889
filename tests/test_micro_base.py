"""The pretrained model that comes with the package: what it may not have seen, and that its recipe repeats."""
import hashlib, json, re
from pathlib import Path

import pytest, torch

from weighted_mtp.config import load_config
from weighted_mtp.files import model_folder
from weighted_mtp.micro_base import make_base
from weighted_mtp.models import build_policy, load_backbone
from weighted_mtp.problems import half_of, make_problems
from weighted_mtp.runs import load_parts
from weighted_mtp.synthetic import make_dataset

FOLDER = Path(model_folder('micro-base'))

def recipe(): # steps, problems, seed: as the card says
    card = (FOLDER/'README.md').read_text()
    command = re.search(r'wmtp-setup base --steps (\d+) --problems (\d+) --seed (\d+)', card)
    return [int(x) for x in command.groups()]

def test_it_saw_no_problem_of_the_embedded_default():
    "By id and by text: neither what pipelines tune on, nor validation and test, nor what the comparison is judged by."
    _, n, seed = recipe()
    seen = make_problems(n + n//15, seed, half='base')
    default = make_problems(6000 + 2*400, 0, half='tune') # of `make_dataset`; the comparison's begin with the same
    compared = make_problems(6000 + 2*2000, 0, half='tune')
    assert [p.problem_id for p in default] == [p.problem_id for p in compared[:len(default)]]
    ids, texts = {p.problem_id for p in seen}, {p.instruction for p in seen}
    assert len(ids) == len(seen) and not ids & {p.problem_id for p in compared}
    assert not texts & {p.instruction for p in compared}
    assert len({p.instruction for p in compared}) == len(compared)

def test_data_sets_hold_the_other_half(tmp_path):
    for seed in (0, 5):
        make_dataset(tmp_path/str(seed), 30, 10, seed=seed)
        for file in (tmp_path/str(seed)).glob('*.jsonl'):
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            assert {half_of(r['problem_id']) for r in rows} == {'tune'}

def test_it_is_small_and_what_its_card_says():
    weights = FOLDER/'model.safetensors'
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) <= 3_000_000
    text = (FOLDER/'README.md').read_text()
    assert hashlib.sha256(weights.read_bytes()).hexdigest()[:16] in text
    solved = float(re.search(r'\*\*([\d.]+) %\*\*', text)[1])
    assert 10 <= solved <= 25 # room above and below

def test_it_loads_exactly():
    base = load_backbone('micro-base')
    assert {p.dtype for p in base.parameters()} == {torch.float32}
    assert all(torch.equal(p, p.half().float()) for p in base.parameters())

def test_the_recipe_repeats(tmp_path):
    def made(name): return make_base(tmp_path/name/'models/base', steps=3, n_problems=40, n_judged=10)
    a, b = made('a'), made('b')
    for file in ('model.safetensors', 'tokenizer.json', 'README.md'):
        assert (a/file).read_bytes() == (b/file).read_bytes(), file
    assert load_backbone(a).config.n_future_tokens == 4

@pytest.mark.parametrize('pipeline', ['critic', 'verifiable', 'baseline', 'rho1', 'ntp', 'ref_tuning'])
def test_every_micro_config_starts_from_it(pipeline):
    assert load_config(f'configs/{pipeline}/{pipeline}_micro.yaml').model.backbone == 'micro-base'

def test_a_policy_begins_as_it_is(tmp_path):
    config = load_config('configs/baseline/baseline_micro.yaml', [f'dataset.train={tmp_path}/data/train.jsonl',
                                                                  'dataset.n_problems=30'])
    tokenizer, backbone = load_parts(config)
    policy, base = build_policy(backbone, 4), load_backbone('micro-base')
    assert len(tokenizer) == base.get_input_embeddings().num_embeddings
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), base.parameters(), strict=True))
