"""Draws the two maps, docs/images/launch.svg and training.svg: `python docs/maps.py` after a module was added."""
from html import escape
from pathlib import Path

# A map is a row of boxes: title, what happens there, modules
LAUNCH = [
    ('request', 'cell, form, papermill\nor command', ['launch', 'form', 'commands', 'launch_notebook', 'request']),
    ('plan', 'a pure function:\nall that will happen', ['plan', 'preflight', 'estimate', 'vessl_run']),
    ('target', 'this machine\nor VESSL', ['targets', 'local_target', 'vessl_target', 'vessl_client']),
    ('run', 'logs, wait, stop', ['run_handle', 'outcomes']),
    ('record', 'runs/NAME', ['records'])]
TRAINING = [
    ('config', 'YAML and overrides', ['config', 'schema']),
    ('data', 'solutions, pairs', ['data', 'corpus', 'sampling', 'synthetic', 'storage']),
    ('model', 'backbone and heads', ['backbones', 'mtp_model', 'ratio_model', 'packing', 'generation']),
    ('objective', 'token weights, loss', ['weighting', 'critic', 'calibration', 'verifiable', 'rho1']),
    ('loop', 'step, validate, save', ['loop', 'precision', 'sharding', 'checkpoints', 'runs']),
    ('evaluation', 'pass@k in a sandbox', ['evaluation', 'model_evaluation', 'benchmarks', 'answers', 'sandbox']),
    ('report', 'curves, programs', ['report', 'pictures', 'curves', 'report_tables'])]
MAPS = dict(launch=('LAUNCH: never imports torch', LAUNCH, '#3949ab'),
            training=('TRAIN: knows nothing of the cluster', TRAINING, '#00695c'))
WIDTH, GAP, LINE, TOP = 136, 26, 14, 42
STYLE = """<style>
text { font-family: system-ui, sans-serif; text-anchor: middle }
.title { font-size: 15px; font-weight: 600 }
.left { text-anchor: start }
.about { font-size: 11px; fill: #555 }
.module { font-size: 11.5px; font-family: ui-monospace, monospace; fill: #222 }
</style>"""

def text(x, y, kind, words, fill=None):
    colour = f' fill="{fill}"' if fill else ''
    return f'<text x="{x}" y="{y}" class="{kind}"{colour}>{escape(words)}</text>'

def frame(x, y, width, height, fill, stroke=None):
    border = f' stroke="{stroke}" stroke-width="1.5"' if stroke else ''
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{fill}"{border}/>'

def box(x, height, title, about, modules, colour):
    middle, lines = x + WIDTH/2, about.split('\n')
    start = TOP + 48 + LINE*len(lines)
    return [frame(x, TOP, WIDTH, height, '#fff', colour), text(middle, TOP + 22, 'title', title, colour),
            *[text(middle, TOP + 40 + LINE*i, 'about', line) for i, line in enumerate(lines)],
            *[text(middle, start + LINE*i, 'module', m) for i, m in enumerate(modules)]]

def arrow(x, y, colour):
    path = f'M{x - GAP + 3} {y} h{GAP - 9} m-5 -4 l6 4 l-6 4'
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>'

def draw(title, rooms, colour):
    "A row of boxes with arrows between them, as SVG; the background is light, so that it can be read on any page."
    height = 60 + LINE*max(about.count('\n') + 1 + len(modules) for _, about, modules in rooms)
    width, total = len(rooms)*(WIDTH + GAP) - GAP + 32, height + TOP + 16
    start = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {total}" role="img" aria-label="{title}">'
    head = text(16, 26, 'title left', title, '#222')
    parts = [start, STYLE, frame(0, 0, width, total, '#f6f7fb'), head]
    for i, room in enumerate(rooms):
        x = 16 + i*(WIDTH + GAP)
        parts += box(x, height, *room, colour)
        if i: parts.append(arrow(x, TOP + height/2, colour))
    return '\n'.join([*parts, '</svg>']) + '\n'

if __name__ == '__main__':
    for name, map_ in MAPS.items(): (Path(__file__).parent/f'images/{name}.svg').write_text(draw(*map_))
