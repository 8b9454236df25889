"""Draws the two maps: docs/images/launch.svg and training.svg. `python docs/maps.py` after modules were added or renamed."""
from html import escape
from pathlib import Path

# A map: a row of boxes (title, what happens there, modules), and the words on the arrows between them.
LAUNCH = [('request', 'cell, form, papermill\nor command', ['launch', 'form', 'commands', 'request']),
          ('plan', 'a pure function:\nall that will happen', ['plan', 'estimate', 'config']),
          ('target', 'this machine\nor VESSL', ['targets', 'vessl_client']),
          ('run', 'logs, wait, stop', ['launch']),
          ('record', 'runs/NAME', ['records'])]
TRAINING = [('config', 'YAML + overrides', ['config', 'schema']),
            ('data', 'solutions, pairs', ['data', 'corpus', 'sampling', 'synthetic']),
            ('model', 'backbone + heads', ['models', 'generation']),
            ('objective', 'token weights, loss', ['weighting', 'losses', 'critic', 'policies']),
            ('loop', 'step, validate, save', ['loop', 'optim', 'sharding', 'checkpoints', 'runs']),
            ('evaluation', 'pass@k in a sandbox', ['evaluation', 'sandbox', 'answers']),
            ('report', 'curves, programs', ['report'])]
COLOUR = dict(launch='#3949ab', training='#00695c')

def box(x, y, width, height, title, about, modules, colour):
    "One room of a map."
    lines = about.split('\n')
    parts = [f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="#fff" stroke="{colour}" stroke-width="1.5"/>',
             f'<text x="{x+width/2}" y="{y+22}" class="title" fill="{colour}">{escape(title)}</text>']
    parts += [f'<text x="{x+width/2}" y="{y+40+13*i}" class="about">{escape(line)}</text>' for i, line in enumerate(lines)]
    start = y + 40 + 13*len(lines) + 8
    parts += [f'<text x="{x+width/2}" y="{start+14*i}" class="module">{escape(m)}</text>' for i, m in enumerate(modules)]
    return parts

def draw(rooms, colour, title, width=136, gap=26):
    "A row of rooms with arrows between them, as SVG."
    height = 70 + 13*max(about.count('\n')+1 for _, about, _ in rooms) + 14*max(len(m) for _, _, m in rooms)
    total = len(rooms)*(width+gap) - gap + 32
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {height+58}" role="img" aria-label="{escape(title)}">',
             '<style>text{font-family:system-ui,sans-serif;text-anchor:middle} .title{font-size:15px;font-weight:600} '
             '.about{font-size:11px;fill:#555} .module{font-size:11.5px;font-family:ui-monospace,monospace;fill:#222}</style>',
             f'<rect width="{total}" height="{height+58}" rx="10" fill="#f6f7fb"/>',
             f'<text x="16" y="26" style="text-anchor:start" class="title" fill="#222">{escape(title)}</text>']
    for i, (name, about, modules) in enumerate(rooms):
        x = 16 + i*(width+gap)
        parts += box(x, 42, width, height, name, about, modules, colour)
        if i: parts.append(f'<path d="M{x-gap+3} {42+height/2} h{gap-9} m-5 -4 l6 4 l-6 4" fill="none" stroke="{colour}" stroke-width="1.6"/>')
    return '\n'.join([*parts, '</svg>']) + '\n'

MAPS = dict(launch=(LAUNCH, COLOUR['launch'], 'LAUNCH: never imports torch'),
            training=(TRAINING, COLOUR['training'], 'TRAIN: knows nothing of the cluster'))

if __name__ == '__main__':
    for name, map_ in MAPS.items(): (Path(__file__).parent/f'images/{name}.svg').write_text(draw(*map_))
