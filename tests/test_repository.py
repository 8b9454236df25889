"""What has to be true of the repository itself."""
import filecmp, json, os, shutil, subprocess, sys
from pathlib import Path

REPO, BIN = Path(__file__).resolve().parent.parent, Path(sys.executable).parent
EXPORT = (['nbdev-export'], ['nbdev-clean'],
          ['jupyter', 'nbconvert', '--to', 'markdown', '--output-dir', '.', '--output', 'README', 'nbs/index.ipynb'])

def tracked():
    listed = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=REPO, capture_output=True, text=True,
                            check=True)
    return [Path(p) for p in listed.stdout.splitlines() if (REPO/p).is_file()]

def test_export_changes_nothing(tmp_path):
    "Modules, clean notebooks and README.md are what nbs/ says, exported in a copy. If they differ: make export."
    files = tracked()
    for p in files:
        (tmp_path/p).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPO/p, tmp_path/p)
    env = {**os.environ, 'PATH': f"{BIN}:{os.environ['PATH']}"}
    for command in EXPORT: subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True)
    assert [str(p) for p in files if not filecmp.cmp(REPO/p, tmp_path/p, shallow=False)] == []

def test_papermill_notebooks_keep_their_tag():
    for name in ('launch', 'studies/critic', 'studies/compare', 'studies/benchmarks'):
        cells = json.loads((REPO/f'nbs/{name}.ipynb').read_text())['cells']
        assert sum('parameters' in c['metadata'].get('tags', []) for c in cells) == 1, name

def test_notebooks_stay_small():
    notebooks = [p for p in (REPO/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts]
    assert len(notebooks) > 30 and [p for p in notebooks if p.stat().st_size > 1_000_000] == []
