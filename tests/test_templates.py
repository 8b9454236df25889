"""One template from training to evaluation: the checkpoint keeps it, and another one is refused."""
import json, os, shutil, sys
from pathlib import Path

import pytest

import warm
from weighted_mtp.schema import TEMPLATES

REPO = Path(__file__).resolve().parent.parent
SMALL = ['model.backbone=backbone', 'dataset.embedded=false', 'dataset.train=data/train.jsonl', 'dataset.test=null',
         'dataset.validation=data/validation.jsonl', 'data_sampling.n_validation=10', 'training.batch_size=4',
         'training.max_steps=2', 'training.cpu_threads=1', 'model.tuning=full']
CRITIC, POLICY = ['critic.blind_yardstick=false'], 'storage/checkpoints/baseline/chatting/checkpoint_best.pt'
CHAT = ("{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}")
PARTS = f'''
from transformers import AutoTokenizer
from weighted_mtp.synthetic import make_dataset, make_micro_model
make_dataset('data', n_problems=40, n_held_out=20)
tokenizer = AutoTokenizer.from_pretrained('data/tokenizer')
make_micro_model('backbone', tokenizer, hidden_size=32, n_layers=2, n_heads=2, max_length=256)
tokenizer.chat_template = {CHAT!r}
tokenizer.save_pretrained('backbone')
'''

@pytest.fixture(scope='module')
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp('templates')
    shutil.copytree(REPO/'configs', root/'configs')
    shutil.copy(REPO/'settings.ini', root)
    done = run(root, '-c', PARTS)
    assert done.returncode == 0, done.stderr
    pipeline(root, 'critic', 'dataset.template=chat', *CRITIC, 'experiment.name=chatting')
    pipeline(root, 'baseline', 'dataset.template=chat', 'experiment.name=chatting')
    return root

def run(root, *words, **env):
    env = {**os.environ, 'PYTHONPATH': str(REPO), 'OMP_NUM_THREADS': '1', **env}
    return warm.run([sys.executable, *words], root, env, 600)

def pipeline(root, name, *overrides, code=0, config='micro', **env):
    words = [w for o in (*(SMALL if name != 'evaluation' else ()), *overrides) for w in ('--override', o)]
    done = run(root, '-m', f'weighted_mtp.pipelines.run_{name}', '--config', f'configs/{name}/{name}_{config}.yaml',
               *words, **env)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
    return done

def evaluate(root, *words, code=0):
    program = 'import sys; from weighted_mtp.evaluation import wmtp_evaluate; sys.exit(wmtp_evaluate())'
    done = run(root, '-c', program, *words, '--benchmark', 'data/test.problems.jsonl', '--limit', '2',
               '--max-new-tokens', '8')
    assert done.returncode == code, done.stdout + done.stderr
    return done

def settings_of(root, folder): # of the newest evaluation kept in a folder
    files = sorted((root/folder).glob('evaluation/*.json'), key=lambda f: f.stat().st_mtime)
    return json.loads(files[-1].read_text())['settings']

def test_training_reads_prompts_of_the_template(root):
    from transformers import AutoTokenizer
    from weighted_mtp.config import load_config
    from weighted_mtp.data import read_solutions
    from weighted_mtp.sampling import load_solutions
    tokenizer = AutoTokenizer.from_pretrained(root/'backbone')
    row, = [r for r in read_solutions(root/'data/train.jsonl') if r['is_correct']][:1]
    for template, begins in (('alpaca', 'Below is'), ('chat', '<|user|>'), ('plain', row['instruction'][:9])):
        config = load_config(REPO/'configs/baseline/baseline_micro.yaml', [f'dataset.template={template}'])
        sample = load_solutions(root/'data/train.jsonl', tokenizer, 1, config)[0]
        text = tokenizer.decode(sample.ids[:sample.n_prompt], skip_special_tokens=True)
        assert template == 'plain' or text.startswith(begins), text
        assert (template == 'plain') == ('###' not in text and '<|' not in text)

def test_a_checkpoint_keeps_template_and_chat_template(root):
    from weighted_mtp.data import stored_tokenizer
    from weighted_mtp.models import read_checkpoint
    for checkpoint in (POLICY, 'storage/checkpoints/critic/chatting/checkpoint_best.pt'):
        facts = read_checkpoint(root/checkpoint)
        assert facts['template'] == 'chat' and stored_tokenizer(facts['tokenizer']).chat_template == CHAT

@pytest.mark.parametrize('name, key', [('verifiable', 'critic'), ('rho1', 'reference')])
def test_a_critic_or_reference_of_another_template_is_refused(root, name, key):
    trained = 'critic/chatting' if key == 'critic' else 'baseline/chatting'
    given = f'experiment.{key}_checkpoint=storage/checkpoints/{trained}/checkpoint_best.pt'
    done = pipeline(root, name, given, 'dataset.template=plain', code=2)
    assert 'trained with dataset.template=chat, this policy reads plain' in done.stderr
    pipeline(root, name, given, 'dataset.template=chat', 'experiment.name=same')

def test_an_evaluation_of_another_template_is_refused(root):
    own = [f'evaluation.checkpoint={POLICY}', 'evaluation.benchmarks=[data/test.problems.jsonl]', 'evaluation.limit=2',
           'evaluation.max_new_tokens=8', 'dataset.embedded=false']
    done = pipeline(root, 'evaluation', *own, code=2)
    said = 'trained with the template chat, and would be evaluated with alpaca: set dataset.template=chat'
    assert said in done.stderr
    pipeline(root, 'evaluation', *own, 'dataset.template=chat')
    assert 'evaluated with plain' in evaluate(root, POLICY, '--template', 'plain', code=2).stderr

def test_the_command_takes_a_models_own(root):
    "A checkpoint's template; of a folder the tokenizer's chat template, unless another one is asked for."
    evaluate(root, POLICY)
    assert settings_of(root, 'storage/checkpoints/baseline/chatting')['template'] == 'chat'
    evaluate(root, 'backbone')
    assert settings_of(root, 'backbone')['template'] == 'chat'
    evaluate(root, 'backbone', '--template', 'alpaca')
    assert 'template' not in settings_of(root, 'backbone') # as in files of before there were others

def test_chat_without_a_chat_template(root):
    done = pipeline(root, 'baseline', 'dataset.template=chat', 'model.tokenizer=data/tokenizer', code=2)
    assert 'the tokenizer has no chat template' in done.stderr and 'Traceback' not in done.stderr

def test_pictures_show_the_template(root):
    record = root/'record'
    record.mkdir()
    pipeline(root, 'critic', 'dataset.template=chat', *CRITIC, 'experiment.name=pictured', WMTP_RUN_DIR=str(record))
    page = (record/'critic_tokens.html').read_text()
    assert page.count('<table') or page.count('<div')
    from transformers import AutoTokenizer
    from weighted_mtp.critic import load_critic, picture_of_pair
    critic = load_critic(root/'storage/checkpoints/critic/pictured/checkpoint_best.pt')
    pictures = {template: picture_of_pair(critic, AutoTokenizer.from_pretrained(root/'backbone'),
                                          root/'data/validation.jsonl', 256, 0, template) for template in TEMPLATES}
    assert {template for template, x in pictures.items() if x in page} == {'chat'}

def test_the_card_of_an_export_shows_the_template(root):
    program = 'import sys; from weighted_mtp.export import wmtp_export; sys.exit(wmtp_export())'
    done = run(root, '-c', program, POLICY, 'out', '--as', 'transformers')
    assert done.returncode == 0, done.stdout + done.stderr
    card = (root/'out/README.md').read_text()
    assert '<|user|>{instruction}<|assistant|>' in card and '### Response' not in card
    assert CHAT in (root/'out/chat_template.jinja').read_text()
    code = card.split('```python\n')[1].split('```')[0].replace('"out"', f'"{root}/out"')
    done = run(root, '-c', code)
    assert done.returncode == 0, done.stderr
