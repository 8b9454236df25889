"""What the documentation site takes from elsewhere: notebooks, docstrings, the schema, every command's help."""
import json, os, re, subprocess, sys
from dataclasses import fields
from html import escape
from pathlib import Path

from bs4 import BeautifulSoup
from fastcore.docments import docments
from latex2mathml.converter import convert
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
FOLDERS = dict(config='Config', data='Data', models='Models', training='Training', evaluation='Evaluation',
               launching='Launching', gpu_check='GPU check')
STUDIES = ['critic', 'compare', 'real', 'memory', 'benchmarks']
COMMANDS = ['wmtp-launch', 'wmtp-runs', 'wmtp-setup', 'wmtp-evaluate', 'wmtp-export', 'wmtp-sync',
            'python -m weighted_mtp.pipelines.run_critic', 'python -m weighted_mtp.report']

def notebooks(folder): return sorted((ROOT/'nbs'/folder).glob('**/[0-9r]*.ipynb')) # run_* of the pipelines last

def module_of(path):
    "The module that a notebook exports to, or None."
    named = re.search(r'#\| *default_exp +([\w.]+)', path.read_text())
    return named and named[1]

def library():
    "Title, notebooks and modules of each folder of the library, 00_config before all others."
    for folder, title in FOLDERS.items():
        found = ([ROOT/'nbs/00_config.ipynb'] if folder == 'config' else []) + notebooks(folder)
        if found: yield title, found, [m for m in map(module_of, found) if m]

# ---- pages that are generated

def reference_page(module):
    return f'# {module}\n\n`from weighted_mtp.{module} import …`\n\n::: weighted_mtp.{module}\n'

def cell(text): return escape(str(text), quote=False).replace('|', '\\|').replace('\n', ' ')

def config_page():
    from weighted_mtp.schema import key_table
    about = ('Generated from the schema, which reading, checking and error messages go by, too. '
             'A key is set in a YAML file of `configs/` or by `--override key=value`.')
    parts = ['# Every config key', '', about]
    sections = {}
    for row in key_table(): sections.setdefault(row['key'].rpartition('.')[0], []).append(row)
    for section, rows in sections.items():
        parts += ['', f"## {section or 'the run'}", '', '| key | may be | default | meaning |', '|---|---|---|---|']
        for row in rows:
            default = cell(json.dumps(row['default']))
            parts.append(f"| `{row['key']}` | {cell(row['allowed'])} | `{default}` | {cell(row['meaning'])} |")
    return '\n'.join(parts)

def site_page():
    from weighted_mtp.launch_site import Site
    about = docments(Site)
    rows = [f'| `{f.name}` | {cell(about.get(f.name) or "")} |' for f in fields(Site)]
    about = 'Where runs are sent: the launch site. `.env` (from `.env.example`) holds the keys.'
    file = ['```ini', (ROOT/'settings.ini').read_text(), '```']
    return '\n'.join(['# settings.ini', '', about, '', '| name | meaning |', '|---|---|', *rows, '', *file])

def help_of(command):
    words = command.split()
    program = [sys.executable, *words[1:]] if words[0] == 'python' else [str(Path(sys.executable).parent/words[0])]
    done = subprocess.run([*program, '--help'], capture_output=True, text=True, cwd=ROOT, timeout=120,
                          env=dict(os.environ, COLUMNS='100', NO_COLOR='1'))
    if done.returncode: raise RuntimeError(f'{command} --help failed:\n{done.stderr[-1000:]}')
    return done.stdout.strip()

def cli_page():
    about = 'What each command says to `--help`. All pipelines take the same options as `run_critic`.'
    parts = ['# Commands', '', about]
    for command in COMMANDS: parts += ['', f'## {command}', '', '```text', help_of(command), '```']
    return '\n'.join(parts)

def readme_page(): return local_links((ROOT/'README.md').read_text())

def local_links(text):
    "README's links, which start at the repository, as links within the site; docs/notebooks is nbs/."
    text = re.sub(r'\]\(docs/([^)]+)\)', r'](\1)', text)
    text = text.replace('](runs/README.md)', '](records.md)')
    text = re.sub(r'\]\(CONTRIBUTING\.md\)', '](contributing.md)', text).replace('](CHANGELOG.md)', '](changelog.md)')
    return re.sub(r'\]\(nbs/([^)]+)\)', r'](notebooks/\1)', text)

# ---- mkdocs' events

def on_config(config):
    notebook = lambda p: f'notebooks/{p.relative_to(ROOT/"nbs")}'
    nav = [{title: [notebook(p) for p in found]} for title, found, _ in library()]
    reference = [{title: [{m: f'reference/{m}.md'} for m in modules]} for title, _, modules in library()]
    to_run = [notebook(ROOT/'nbs'/f'{name}.ipynb') for name in ('launch', 'report')]
    studies = [notebook(ROOT/f'nbs/studies/{s}.ipynb') for s in STUDIES]
    config['nav'] += [{'Library': [{'To run': to_run}, *nav]}, {'Reference': reference}, {'Results': studies}]
    config['watch'] = [str(ROOT/'nbs'), str(ROOT/'README.md')]
    return config

@event_priority(100) # before mkdocs-jupyter looks for notebooks
def on_files(files, config):
    def text(uri, content): files.append(File.generated(config, uri, content=content))
    for _, _, modules in library():
        for m in modules: text(f'reference/{m}.md', reference_page(m))
    text('index.md', readme_page())
    text('config.md', config_page())
    text('site.md', site_page())
    text('cli.md', cli_page())
    for name, path in dict(contributing='CONTRIBUTING.md', changelog='CHANGELOG.md', records='runs/README.md').items():
        text(f'{name}.md', local_links((ROOT/path).read_text()))
    return files

MATH = re.compile(r'\$\$(.+?)\$\$|\$([^$\n]+?)\$', re.S)

def mathml(match):
    block, inline = match.groups()
    return convert((block or inline).strip(), display='block' if block else 'inline')

def with_mathml(soup):
    "Formulas as MathML, which browsers draw by themselves: a script that draws them would come from a network."
    for node in list(soup.find_all(string=lambda s: '$' in s)):
        if node.find_parent(['code', 'pre', 'script', 'style', 'a']) or not MATH.search(node): continue
        node.replace_with(BeautifulSoup(MATH.sub(mathml, node), 'html.parser'))

def with_page_links(soup, page, files):
    "A notebook's links to notebooks, as links to their pages."
    folder = Path(page.file.src_uri).parent
    for a in soup.find_all('a', href=re.compile(r'^[^:]+\.ipynb(#.*)?$')):
        path, _, anchor = a['href'].partition('#')
        target = files.get_file_from_path(os.path.normpath(folder/path))
        if target is None: raise RuntimeError(f"{page.file.src_uri} links to {path}, which is no page.")
        a['href'] = target.url_relative_to(page.file) + (f'#{anchor}' if anchor else '')

def on_page_content(html, page, config, files):
    if not page.file.src_uri.endswith('.ipynb') and '$' not in html: return html
    soup = BeautifulSoup(html, 'html.parser')
    for outer in soup.find_all('script', src=re.compile('^https?:')): outer.decompose()
    with_mathml(soup)
    with_page_links(soup, page, files)
    return str(soup)
