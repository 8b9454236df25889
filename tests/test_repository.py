"""What has to be true of the repository itself."""
import filecmp, json, os, shutil, subprocess, sys
from pathlib import Path

REPO, BIN = Path(__file__).resolve().parent.parent, Path(sys.executable).parent

def tracked(): return [Path(p) for p in subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=REPO, capture_output=True, text=True, check=True).stdout.splitlines()]

def test_export_changes_nothing(tmp_path):
    """Modules, clean notebooks and README.md are what nbs/ says: exported in a copy, then compared. In case of a difference: make export."""
    files = [p for p in tracked() if (REPO/p).is_file()]
    for p in files: (tmp_path/p).parent.mkdir(parents=True, exist_ok=True); shutil.copy(REPO/p, tmp_path/p)
    env = {**os.environ, 'PATH': f"{BIN}:{os.environ['PATH']}"}
    for words in (['nbdev-export'], ['nbdev-clean'], ['jupyter', 'nbconvert', '--to', 'markdown', '--output-dir', '.', '--output', 'README', 'nbs/index.ipynb']):
        subprocess.run(words, cwd=tmp_path, env=env, check=True, capture_output=True)
    assert [str(p) for p in files if not filecmp.cmp(REPO/p, tmp_path/p, shallow=False)] == []

def test_papermill_notebooks_keep_their_tag():
    for name in ('launch', 'critic', 'compare', 'benchmarks'):
        cells = json.loads((REPO/f'nbs/{name}.ipynb').read_text())['cells']
        assert sum('parameters' in c['metadata'].get('tags', []) for c in cells) == 1, name

def test_notebooks_stay_small():
    assert [p for p in (REPO/'nbs').glob('*.ipynb') if p.stat().st_size > 1_000_000] == []
