"""`make gpu-check` as CI can run it: all of it small, on the CPU, each part in its own process."""
import json, os, shutil, subprocess, sys
from pathlib import Path
import pytest
from weighted_mtp.gpu_check import PARTS, Part, run_parts
from weighted_mtp.schema import PIPELINES

REPO = Path(__file__).resolve().parent.parent

@pytest.fixture(scope='module')
def dry(tmp_path_factory):
    "The report of one dry run, and its folder."
    out = tmp_path_factory.mktemp('gpu-check')
    command = ['make', 'gpu-check', 'DRY=1', f'GPU_VENV={Path(sys.executable).parent.parent}', f'ARGS=--out {out}',
               '-o', f'{Path(sys.executable).parent.parent}/.installed']
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=600,
                          env={**os.environ, 'PYTHONPATH': str(REPO), 'WMTP_TRACE': '1'})
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return json.loads((out/'gpu-check.json').read_text()), out

def test_the_environment_of_a_gpu_machine_uses_its_own_torch(tmp_path):
    for name in ('Makefile', 'pyproject.toml', 'constraints.txt', 'README.md'): shutil.copy(REPO/name, tmp_path)
    shutil.copytree(REPO/'weighted_mtp', tmp_path/'weighted_mtp')
    command = ['make', '.venv-gpu/.installed', f'PYTHON={sys.executable}']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    code = 'import torch, weighted_mtp.gpu_check as g; print(torch.__file__, g.__file__, sep="\\n")'
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    python, texts = tmp_path/'.venv-gpu/bin/python', dict(capture_output=True, text=True)
    found = subprocess.run([python, '-c', code], cwd='/', env=env, **texts)
    own = subprocess.run([sys.executable, '-c', 'import torch; print(torch.__file__)'], **texts)
    assert found.stdout.splitlines() == [own.stdout.strip(), f'{tmp_path}/weighted_mtp/gpu_check.py'], found.stderr

def test_every_part_ran_and_says_on_what(dry):
    report, _ = dry
    states = {name: (p['status'], p.get('reason')) for name, p in report['parts'].items()}
    assert states.keys() == {p.name for p in PARTS}
    assert {s for s, _ in states.values()} <= {'passed', 'measured'}, states
    assert report['dry'] and report['machine']['card'] == 'CPU' and report['machine']['torch'] and report['date']

def test_pipelines_are_compared(dry):
    "Losses, weights and gradients of all pipelines are there; on one and the same device they are equal."
    figures = dry[0]['parts']['micro_gpu']['figures']['differences']
    assert {name.split(',')[0] for name in figures} == {*PIPELINES} - {'evaluation'}
    weighed = {name for name, d in figures.items() if d['weights'] is not None}
    assert {name for name in figures if name.startswith(('verifiable', 'rho1'))} == weighed
    assert all(d[k] <= 1e-6 for d in figures.values() for k in d if d[k] is not None)

@pytest.mark.parametrize('part', ['policy', 'critic'])
def test_steps_are_measured_beside_the_plan(dry, part):
    f = dry[0]['parts'][part]['figures']
    assert f['tokens_per_second'] > 0 and f['step_seconds'] > 0 and 0 <= f['padding_share'] < 1
    assert min(f['model_flops_of_a_step'].values()) > 0 and f['hardware_tflops'] > f['model_tflops'] > 0
    room = f['memory']
    assert room['measured_gb'] > 0 and room['formula_gb'] > 0 and room['basis'].startswith('traced'), room['basis']
    assert abs(sum(room['predicted_parts'].values()) - room['predicted_gb']) < 1e-6 < room['predicted_gb']
    assert 0 <= f['waiting_for_data'] < 1
    assert abs(sum(f['kinds'].values()) - 1) < 1e-6 and f['kinds']['attention'] > 0
    assert dry[0]['achieved_flops']['CPU'][part] > 0

def test_other_parts_have_their_figures(dry):
    parts = {name: p['figures'] for name, p in dry[0]['parts'].items()}
    assert all(parts['loss'][f'{x} unembedding']['ratio'] > 0 for x in ('frozen', 'trained'))
    assert parts['resume']['bit_equal'] and parts['resume']['losses_apart'] == 0
    assert parts['decoding']['micro-base']['with drafts']['tokens_per_pass'] > 1
    assert parts['decoding']['1B shape, random']['one at a time']['tokens_per_second'] > 0
    assert parts['sandbox']['passed'] == parts['sandbox']['of'] > 0

def test_a_page_shows_it(dry):
    page = (dry[1]/'gpu-check.html').read_text()
    assert page.count('<svg') == 2 and 'matrix products' in page and 'policy, planned' in page
    assert all(f'<td>{p.name}</td>' in page for p in PARTS)

def test_a_broken_part_is_noted_and_the_others_go_on(tmp_path, capsys):
    parts = [PARTS[0], Part('wrong', 'Raises an error', 'operator:neg'), Part('gone', 'Dies', 'os:_exit'),
             *(p for p in PARTS if p.name == 'sandbox')]
    run_parts(parts, tmp_path, dry=True)
    found = json.loads((tmp_path/'gpu-check.json').read_text())['parts']
    assert [p['status'] for p in found.values()] == ['measured', 'failed', 'failed', 'passed']
    assert 'TypeError' in found['wrong']['reason'] and '\n' not in found['wrong']['reason']
    assert 'wrong         failed' in capsys.readouterr().out
    assert 'Traceback' in (tmp_path/'log/wrong.txt').read_text()
