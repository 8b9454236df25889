"""The house rules that a program can check: lines, names, notebooks' order and shape, sizes, imports."""
import ast, importlib, inspect, json, re
from pathlib import Path
import pytest

REPO = Path(__file__).parent.parent
PACKAGE = REPO/'weighted_mtp/__init__.py' # the only module that is not exported
MODULES = sorted(p for p in (REPO/'weighted_mtp').rglob('*.py') if p.name not in ('_modidx.py', '__init__.py'))
NOTEBOOKS = sorted(p for p in (REPO/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
LIBRARY = [p for p in NOTEBOOKS if p.parent.name not in ('nbs', 'studies', 'pipelines')] + [REPO/'nbs/00_config.ipynb']
WIDTH = 120
# What transformers' guide to writing models asks for: https://huggingface.co/docs/transformers/custom_models
MODEL_ATTRIBUTES = {'_no_split_modules', '_tied_weights_keys', '_init_weights', '_keys_to_ignore_on_load_missing',
                    '_keys_to_ignore_on_load_unexpected', '_supports_sdpa', '_supports_flash_attn',
                    '_supports_flex_attn', '_supports_attention_backend', '_is_stateful'}
OWN_BY_NAME = {'_fields', '_replace', '_asdict', '_make', '_exit'} # documented as public: namedtuple's, os._exit
# What a forked process has to do at its end, and Python has no public function for; its multiprocessing calls the same.
# And what torch's documentation has under these names alone: "Fake tensor", and "Extending PyTorch" on modes
EXCEPTIONS = {'sandbox_program': {'_shutdown', '_run_exitfuncs'},
              'step_memory': {'FakeTensorMode', 'TorchDispatchMode'}}

def cells(path): return json.loads(path.read_text())['cells']
def source(cell): return ''.join(cell['source'])
def exported(cell): return cell['cell_type'] == 'code' and re.match(r'(#\|.*\n)*#\| *exporti?\b', source(cell))
def name(path): return str(path.relative_to(REPO))

def too_long(text):
    "Numbers of lines over `WIDTH` columns; a URL may be as long as it is, and nbdev writes `__all__` as it likes."
    text = re.sub(r'^__all__ = \[.*?\]', lambda m: '\n'*m[0].count('\n'), text, flags=re.S | re.M)
    lines = enumerate(text.splitlines(), 1)
    return [i for i, line in lines if len(line) > WIDTH and not re.search(r'https?://\S{60}', line)]

SCRIPTS = [p for folder in ('tests', 'docs') for p in sorted((REPO/folder).glob('*.py'))]

@pytest.mark.parametrize('path', [PACKAGE, *MODULES, *SCRIPTS], ids=name)
def test_lines_of_python_are_short(path):
    assert not too_long(path.read_text())

@pytest.mark.parametrize('path', NOTEBOOKS, ids=name)
def test_lines_of_notebooks_are_short(path):
    found = {i: too_long(source(c)) for i, c in enumerate(cells(path))}
    assert not {i: lines for i, lines in found.items() if lines}, 'cell: lines'

def test_notebooks_stand_in_order():
    assert sorted(p.name for p in (REPO/'nbs').glob('*.ipynb')) == \
        ['00_config.ipynb', 'index.ipynb', 'launch.ipynb', 'report.ipynb']
    for folder in {p.parent for p in LIBRARY} - {REPO/'nbs'}:
        numbers = sorted(p.name[:3] for p in folder.glob('*.ipynb'))
        assert numbers == [f'{i:02}_' for i in range(1, len(numbers)+1)], name(folder)

@pytest.mark.parametrize('path', LIBRARY, ids=name)
def test_exported_cells_are_followed_by_checks(path):
    "No more than three exported cells in a row without a cell that shows and checks them; imports do not count."
    run, longest, where = 0, 0, None
    for i, cell in enumerate(cells(path)):
        if cell['cell_type'] != 'code': continue
        body = ast.parse('\n'.join(l for l in source(cell).splitlines() if not l.startswith(('!', '%'))) or 'pass').body
        if all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in body): continue
        run = run + 1 if exported(cell) else 0
        if run > longest: longest, where = run, i
    assert longest <= 3, f'{longest} exported cells up to cell {where}'

@pytest.mark.parametrize('path', MODULES, ids=name)
def test_modules_are_small(path):
    assert len(path.read_text().splitlines()) <= 350

def imports(path):
    "Modules of the package that a module imports when it is imported itself."
    nodes = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ImportFrom) and n.level == 1 and n.module]
    return {n.module.split('.')[0] for n in nodes} & {p.stem for p in MODULES}

def test_imports_have_no_cycle():
    graph = {p.stem: imports(p) for p in MODULES if p.parent.name == 'weighted_mtp'}
    while graph:
        leaves = {m for m, used in graph.items() if not used & graph.keys()}
        assert leaves, f'a cycle among {sorted(graph)}'
        for m in leaves: del graph[m]

def definitions():
    "Every name that the package itself gives to something."
    found = set()
    for path in MODULES:
        for n in ast.walk(ast.parse(path.read_text())):
            if isinstance(n, (ast.FunctionDef, ast.ClassDef)): found.add(n.name)
            elif isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store): found.add(n.id)
            elif isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store): found.add(n.attr)
            elif isinstance(n, ast.alias) and n.asname: found.add(n.asname)
    return found

def is_private(word): return word.startswith('_') and not word.startswith('__') and word != '_'

@pytest.mark.parametrize('path', MODULES, ids=name)
def test_no_private_name_of_a_library_is_used(path):
    own = definitions() | OWN_BY_NAME | MODEL_ATTRIBUTES | EXCEPTIONS.get(path.stem, set())
    tree = ast.parse(path.read_text())
    used = {(n.lineno, n.attr) for n in ast.walk(tree) if isinstance(n, ast.Attribute) and is_private(n.attr)}
    for n in ast.walk(tree):
        if isinstance(n, ast.ImportFrom) and not n.level:
            private = any(is_private(part) for part in n.module.split('.'))
            used |= {(n.lineno, a.name) for a in n.names if private or is_private(a.name)}
        if isinstance(n, ast.Call) and getattr(n.func, 'id', '') in ('getattr', 'setattr', 'hasattr'): # by its text
            used |= {(n.lineno, a.value) for a in n.args[1:2] if isinstance(a, ast.Constant) and is_private(a.value)}
    assert not {(line, word) for line, word in used if word not in own}

WRITTEN_BY_PYTHON = {'_abc_impl', '_is_protocol', '_is_runtime_protocol', '_backward_cls'} # by metaclasses

def overridden(cls):
    "Private names of libraries' classes that a class of ours gives a meaning of its own."
    bases = [b for b in cls.__mro__[1:] if not b.__module__.startswith('weighted_mtp') and b is not object]
    return {n for n in vars(cls) if is_private(n) and any(n in vars(b) for b in bases)} - MODEL_ATTRIBUTES

@pytest.mark.parametrize('path', [p for p in MODULES if p.parent.name == 'weighted_mtp'], ids=name)
def test_no_private_method_of_a_library_is_overridden(path):
    module = importlib.import_module(f'weighted_mtp.{path.stem}')
    classes = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
    found = {c.__name__: overridden(c) - WRITTEN_BY_PYTHON for c in classes}
    assert not {c: names for c, names in found.items() if names}
