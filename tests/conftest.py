"""The files that take longest start first, so that no core is left with one of them at the end."""
import os

os.environ['GIT_ALLOW_PROTOCOL'] = 'file' # a plan may ask the site's repository for a commit; no test asks a network
# A step is traced in a process of its own, of ten seconds: only the tests of that ask for it
os.environ.setdefault('WMTP_TRACE', '0')

LONGEST = ('distributed', 'pod', 'training', 'vessl', 'evaluation', 'resume', 'storage', 'remote', 'estimate', 'launch',
           'losses', 'heads_first', 'sandbox', 'export', 'families', 'templates')

def pytest_collection_modifyitems(items):
    places = {f'test_{name}.py': i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))
