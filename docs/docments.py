"""For mkdocstrings: fastcore's docments (a comment after each parameter) become a docstring's table of parameters."""
import re

import griffe

COMMENT = re.compile(r'#\s*(.*)$')
NOTEBOOK_LINK = re.compile(r'\[([^\]]+)\]\([^)]*\.ipynb[^)]*\)')
PARAMETER = re.compile(r'\s*(?:def \w+\()?\s*(\*{0,2}\w+)\s*(?:[:=,)]|$)')

def docments(lines):
    "Parameter name to what its comment says, `return` for what is returned: from a signature's lines."
    found = {}
    for line in lines:
        comment = COMMENT.search(line)
        if not comment: continue
        code = line[:comment.start()]
        name = 'return' if code.lstrip().startswith(')') else (PARAMETER.match(code) or [None, None])[1]
        if name: found[name.lstrip('*')] = NOTEBOOK_LINK.sub(r'\1', comment[1].strip())
    return found

def signature_lines(obj):
    "The lines of a function's signature, or of a dataclass's fields."
    lines = obj.source.splitlines()
    start = next((i for i, line in enumerate(lines) if line.lstrip().startswith(('def ', 'class '))), 0)
    end = next((i for i, line in enumerate(lines[start+1:], start+1) if re.match(r'\s*["\']', line)), len(lines))
    return lines[start:end]


class Docments(griffe.Extension):
    def on_object(self, *, obj, loader, **kwargs):
        "Links to notebooks are relative to a notebook; on a reference page the name has to do."
        if obj.docstring: obj.docstring.value = NOTEBOOK_LINK.sub(r'\1', obj.docstring.value)

    def on_function(self, *, func, loader, **kwargs):
        if not func.docstring: return
        about = docments(signature_lines(func))
        known = [p.name for p in func.parameters if p.name in about]
        parts = []
        if known: parts += ['Args:', *[f'    {name}: {about[name]}' for name in known]]
        if about.get('return'): parts += ['', 'Returns:', f"    {about['return']}"]
        if parts: func.docstring.value = '\n'.join([func.docstring.value, '', *parts])

    def on_class(self, *, cls, loader, **kwargs):
        "A field's comment is its attribute's docstring."
        about = docments(cls.source.splitlines())
        for name, member in cls.members.items():
            if member.is_attribute and not member.docstring and name in about:
                member.docstring = griffe.Docstring(about[name], parent=member)
