"""From a model's text to the program that is run: the forms in which models answer, through the sandbox.

One test compares with evalplus's own `sanitize`, where that is there:

    pip install --no-deps evalplus tree_sitter tree_sitter_python
"""
import json, sys, textwrap, time, types
from pathlib import Path

import pytest

from weighted_mtp.answers import find_code, whole_program
from weighted_mtp.sandbox import run_tests_batch

REPO = Path(__file__).parents[1]
CASES = REPO.parent/'shared/cases/answer_forms.json'

ASSERTS = dict(kind='asserts', tests=['assert add(1, 2) == 3', 'assert add(2, 5) == 7'])
CHECK = 'def check(f):\n    assert f(1, 2) == 3\n    assert f(2, 5) == 7\n'
PROMPT = 'from typing import List\n\n\ndef add(a, b):\n    """ Add.\n    >>> add(1, 2)\n    3\n    """\n'
HUMANEVAL = dict(kind='humaneval', entry_point='add', test=CHECK, prompt=PROMPT)
ASSERTS_TWO = dict(kind='asserts', tests=[*ASSERTS['tests'], 'assert twice(3) == 6'])
STDIO = dict(kind='stdio', tests=[['1 2\n', '3\n'], ['2 5\n', '7\n']])

GOOD, BAD = 'def add(a, b):\n    return a + b\n', 'def add(a, b):\n    return a - b\n'
TWICE = 'def twice(a):\n    return 2*a\n'
READS = 'a, b = map(int, input().split())\nprint(a + b)\n'
HELPED = 'def total(xs):\n    return sum(xs)\n\n\ndef add(a, b):\n    return total([a, b])\n'
FILLED = '''sums = {}
for i in range(10):
    for j in range(10):
        sums[i, j] = i + j


def add(a, b):
    return sums[a, b]
'''
GENERATOR = 'def both(a, b):\n    yield a\n    yield b\n\ndef add(a, b):\n    return sum(both(a, b))\n'
FALLBACK = '''try:
    from fast import plus
except ImportError:
    plus = lambda a, b: a + b

def add(a, b):
    return plus(a, b)
'''
FENCED = 'def add(a, b):\n    """Use:\n    ```\n    add(1, 2)\n    ```\n    """\n    return a + b\n'
COUNTING = 'calls = 0\ndef add(a, b):\n    global calls\n    calls += 1\n    return a + b\n'
GUARDED = GOOD + 'if __name__ == "__main__":\n    print(add(*map(int, input().split())))\n'
WITH_MAIN = 'import sys\n\ndef main():\n    print(sum(map(int, sys.stdin.read().split())))\n\nmain()\n'
ALPACA = 'Below is an instruction for you.\n\n### Instruction:\nAdd.\n\n### Input:\nadd(a, b)\n\n### Response:\n'

TAGS = {'[PYTHON]': '[/PYTHON]', '<code>': '</code>', '<answer>': '</answer>', '[BEGIN]': '[DONE]',
        '\\begin{code}': '\\end{code}', '<|python_tag|>': '<|eom_id|>'}
REASONING = {'<reasoning>': '</reasoning>', '<|begin_of_thought|>': '<|end_of_thought|>', '[THINK]': '[/THINK]',
             '<|channel|>analysis<|message|>': '<|end|><|start|>assistant<|channel|>final<|message|>'}
END_MARKS = ('<|endoftext|>', '<|im_end|>', '</s>', '<|eot_id|>', '<end_of_turn>', '<｜end▁of▁sentence｜>', '\n[DONE]')
DECORATED = 'import functools\n\n@functools.lru_cache(None)\ndef add(a, b):\n    return a + b\n'
BODY, LONG_BODY = '    return a + b\n', '    out = a\n    for _ in range(b):\n        out += 1\n    return out\n'

def fence(code, label='python'): return f'```{label}\n{code}```\n'

FORMS = [ # what, tests, answer, whether it is right
    ('plain', ASSERTS, GOOD, True),
    ('plain and wrong', ASSERTS, BAD, False),
    # prose
    ('prose before and after', ASSERTS, f'Here is the solution:\n\n{GOOD}\nHope this helps!', True),
    ('prose before and after, wrong', ASSERTS, f'Here is the solution:\n\n{BAD}\nHope this helps!', False),
    ('prose after, in the same paragraph', ASSERTS, GOOD + 'This adds the two numbers.', True),
    ('prose with brackets and quotes', ASSERTS,
     f"Here's it (the \"best\" way:\n\n{GOOD}\n- it's O(1) (constant\n- it doesn't loop", True),
    ('prose with the indentation of the body', ASSERTS, GOOD + '    This adds the two numbers.\n', True),
    ('a single word after', ASSERTS, GOOD + '\nDone', True),
    ('prose between helper and function', ASSERTS, HELPED.replace('\n\n\n', '\n\nNow we can use it:\n\n'), True),
    ('a line of Markdown above', ASSERTS, f'## Solution\n\n{GOOD}\n**Complexity**: O(1)', True),
    ('indented as Markdown has it', ASSERTS,
     'Like this:\n\n' + ''.join(f'    {l}\n' for l in GOOD.splitlines()) + '\nThat is all.', True),
    ('a numbered list, indented', ASSERTS,
     '1. First, write\n\n' + ''.join(f'       {l}\n' for l in GOOD.splitlines()) + '2. Then be glad.', True),
    ('the next task, begun', ASSERTS, f'{GOOD}\n\n### Instruction:\nSubtract.\n\n### Response:\n{BAD}', True),
    ('decorated, prose around', ASSERTS, f'Here:\n\n{DECORATED}\nDone.', True),
    ('a generator as helper', ASSERTS,
     f'Sure!\n\n{GENERATOR}\nEnjoy!', True),
    ('a table filled by a loop', ASSERTS, f'We fill a table first.\n\n{FILLED}\nThat is it.', True),
    ('a lambda', ASSERTS, 'The shortest way:\n\nadd = lambda a, b: a + b\n\nThat is it.', True),
    ('a function of operator', ASSERTS, 'Use the library:\n\nfrom operator import add\n\nThat is it.', True),
    ('an import that may fail', ASSERTS,
     f'So:\n\n{FALLBACK}\nDone.', True),
    ('bullets that Python could read', ASSERTS, f'{GOOD}\n- O(n)\n- Note: fast\n* Complexity: O(1)\n', True),
    ('the label of a fence that the prompt began', ASSERTS, f'python\n{GOOD}```\nDone.', True),
    ('the prompt again, Alpaca', ASSERTS,
     ALPACA + GOOD, True),
    ('an example for an old Python', ASSERTS, f'{GOOD}\nprint add(1, 2)\n', True),
    ('a block quote', ASSERTS, '> Here:\n> ```python\n> def add(a, b):\n>     return a + b\n> ```\n', True),
    ('as typed into Python', ASSERTS,
     'Try:\n\n>>> def add(a, b):\n...     return a + b\n...\n>>> add(1, 2)\n3\n', True),
    ('a counter in the module', ASSERTS,
     f'So:\n\n{COUNTING}\nprint(add(int(input()), 1))', True),
    ('an import, prose, the function', ASSERTS,
     'Import\n\nimport operator\n\nand then write this:\n\ndef add(a, b):\n    return operator.add(a, b)\n', True),
    ('in a sentence', ASSERTS, 'Use `add = lambda a, b: a + b`, which adds.', True),
    ('blanks that are none', ASSERTS, '\ufeff' + GOOD.replace('    ', '\xa0'*4), True),
    # what stands beside the function
    ('an example that reads input', ASSERTS, GOOD + '\nprint(add(int(input()), int(input())))\n', True),
    ('an example that asserts something wrong', ASSERTS, GOOD + '\nassert add(1, 1) == 3\n', True),
    ('a main guard that reads input', ASSERTS,
     GOOD + '\nif __name__ == "__main__":\n    print(add(int(input()), int(input())))\n', True),
    ('the function is only in a docstring', ASSERTS, '"""\n' + GOOD + '"""\nadd_two = 1\n', False),
    ('the function is only in a comment', ASSERTS, ''.join(f'# {l}\n' for l in GOOD.splitlines()), False),
    ('the function is only in a string, with prose', ASSERTS,
     f'Here is a string.\n\ntext = """\n{GOOD}"""\n\nThat is all.', False),
    ('the function is another one', ASSERTS, GOOD.replace('add', 'sum_of'), False),
    ('no code at all', ASSERTS, 'I cannot help with that.', False),
    ('nothing', ASSERTS, '', False),
    ('a main function that reads input and the table', ASSERTS,
     FILLED + '\ndef main():\n    print(sums[int(input()), 1])\n\nmain()\n', True),
    ('a star import where there may be none', ASSERTS, GOOD.replace('return', 'from math import *; return'), False),
    # fences
    ('a fence', ASSERTS, f'Here:\n{fence(GOOD)}Done.', True),
    ('a wrong one', ASSERTS, f'Here:\n{fence(BAD)}Done.', False),
    ('a fence not closed', ASSERTS, f'```python\n{GOOD}', True),
    ('a fence not closed, and prose', ASSERTS, f'```python\n{GOOD}\nThis adds them.', True),
    ('the end of a fence alone', ASSERTS, f'{GOOD}```\nThis adds them.', True),
    ('tildes', ASSERTS, f'~~~\n{GOOD}~~~', True),
    ('no label, in a list', ASSERTS, '1. So:\n   ```\n   def add(a, b):\n       return a + b\n   ```', True),
    ('closed behind the last line', ASSERTS, f'```python\n{GOOD.strip()}```\nDone', True),
    ('on one line', ASSERTS, '```python def add(a, b): return a + b```', True),
    ('Windows line ends', ASSERTS, f'Here:\n{fence(GOOD)}Done.'.replace('\n', '\r\n'), True),
    ('a draft, then the answer', ASSERTS, f'First try:\n{fence(BAD)}That subtracts. Correct:\n{fence(GOOD)}', True),
    ('a long draft, then the answer', ASSERTS,
     f'First try:\n{fence(BAD + "# a" * 9 + HELPED.replace("add", "other"))}Correct:\n{fence(GOOD)}', True),
    ('a right draft, then a wrong answer', ASSERTS, f'First try:\n{fence(GOOD)}Better:\n{fence(BAD)}', False),
    ('the answer, then how to use it', ASSERTS,
     f'{fence(GOOD)}Use it:\n{fence("from solution import add" + chr(10) + "print(add(1, 2))" + chr(10)*3)}', True),
    ('the answer, then its signature', ASSERTS,
     f'{fence(GOOD)}The signature is\n{fence("def add(a, b):" + chr(10) + "    ..." + chr(10))}', True),
    ('helper and function in two fences', ASSERTS,
     f'A helper:\n{fence(HELPED.split("def add")[0])}and\n{fence("def add" + HELPED.split("def add")[1])}', True),
    ('commands and output beside it', ASSERTS,
     f'{fence("pip install add" + chr(10), "bash")}{fence(GOOD)}{fence("3" + chr(10), "text")}', True),
    ('a fence in a docstring', ASSERTS, fence(FENCED), True),
    ('a draft without a fence, then a draft corrected', ASSERTS, f'{BAD}\nWait, that subtracts.\n\n{GOOD}', True),
    ('a right draft without a fence, then a wrong one', ASSERTS, f'{GOOD}\nWait, better subtract.\n\n{BAD}', False),
    ('a right draft of two functions, one of them then wrong', ASSERTS_TWO,
     f'{fence(GOOD + TWICE)}Better:\n{fence(BAD)}', False),
    ('a wrong draft of two functions, one of them mended', ASSERTS_TWO,
     f'{fence(BAD + TWICE)}Better:\n{fence(GOOD)}', True),
    ('two functions in two fences', ASSERTS_TWO, f'{fence(GOOD)}and\n{fence(TWICE)}', True),
    ('a draft that fills a table of the same name', ASSERTS,
     f'{fence(FILLED + "sums[1, 2] = 9" + chr(10))}No:\n{fence(FILLED)}', True),
    ('a draft with a builtin of its own', ASSERTS,
     f'{fence("def sum(xs): return 0" + chr(10) + BAD)}No:\n{fence(GOOD.replace("a + b", "sum([a, b])"))}', True),
    ('the answer, then its outline', ASSERTS,
     f'{fence(GOOD)}So it is\n{fence(GOOD.replace("a + b", "..."))}', True),
    # tags
    *((f'tags {a}', ASSERTS, f'{a}\n{GOOD}{b}', True) for a, b in TAGS.items()),
    ('a wrong one in tags', ASSERTS, f'[PYTHON]\n{BAD}[/PYTHON]', False),
    ('tags not closed', ASSERTS, f'[PYTHON]\n{GOOD}', True),
    ('HTML', ASSERTS,
     '<pre><code class="python">def add(a, b):\n    return a + b if a &lt; 9 else b + a\n</code></pre>', True),
    ('a fence in an answer, drafts before', ASSERTS, f'{fence(BAD)}<answer>\n{fence(GOOD)}</answer>', True),
    ('a right draft, a wrong answer in tags', ASSERTS, f'{fence(GOOD)}<answer>\n{fence(BAD)}</answer>', False),
    # reasoning
    ('reasoning with a wrong draft', ASSERTS, f'<think>\nMaybe\n{fence(BAD)}no.\n</think>\n{fence(GOOD)}', True),
    ('reasoning with a right draft', ASSERTS, f'<think>\nMaybe\n{fence(GOOD)}no.\n</think>\n{fence(BAD)}', False),
    ('reasoning with a right draft, no answer', ASSERTS,
     f'<think>\nMaybe\n{fence(GOOD)}no.\n</think>\nI do not know.', False),
    ('reasoning that never ends', ASSERTS, f'<think>\nMaybe\n{fence(GOOD)}or', False),
    ('reasoning without a beginning', ASSERTS, f'Maybe\n{fence(BAD)}no.\n</think>\n\n{GOOD}', True),
    *((f'reasoning {a}', ASSERTS, f'{a}\n{fence(BAD)}{b}\n{GOOD}', True) for a, b in REASONING.items()),
    ('two reasoning parts', ASSERTS, f'<think>a</think>{fence(BAD)}<think>no: {BAD}</think>{fence(GOOD)}', True),
    ('a tag in a string', ASSERTS, f'Here:\n{fence(GOOD + "TAG = " + chr(39) + "</think>" + chr(39) + chr(10))}', True),
    # end marks
    *((f'end mark {m.strip()}', ASSERTS, f'{GOOD.strip()}{m}', True) for m in END_MARKS),
    ('a wrong one with an end mark', ASSERTS, f'{BAD.strip()}<|endoftext|>', False),
    ('a second turn after the end mark', ASSERTS,
     f'{GOOD.strip()}<|im_end|>\n<|im_start|>user\nNow subtract.<|im_end|>\n<|im_start|>assistant\n{BAD}', True),
    ('an end mark in a string', ASSERTS, 'END = "</s>"\n' + GOOD, True),
    # cut off
    ('the next function cut off', ASSERTS, f'{GOOD}\n\ndef sub(a, b):\n    """ Sub', True),
    ('an example cut off', ASSERTS, f'{GOOD}\nprint(add(1, ', True),
    ('cut off in the function', ASSERTS, 'def add(a, b):\n    total = a +', False),
    ('an error in the middle of the function', ASSERTS,
     'def add(a, b):\n    return a + b\n    x = = 1\n    return x\n', False),
    # HumanEval
    ('a body', HUMANEVAL, BODY, True),
    ('a wrong body', HUMANEVAL, '    return a - b\n', False),
    ('a body and prose', HUMANEVAL, BODY + '\nThis function adds.\n', True),
    ('a wrong body and prose', HUMANEVAL, '    return a - b\n\nThis function adds.\n', False),
    ('a body and the next function, cut off', HUMANEVAL, BODY + '\n\ndef sub(a, b):\n    """ Sub', True),
    ('a body and an example that reads', HUMANEVAL, BODY + '\nprint(add(int(input()), 1))\n', True),
    ('a body without its first indentation', HUMANEVAL, LONG_BODY.lstrip() + '\nThis adds.', True),
    ('a body without any', HUMANEVAL, fence('out = a\nout += b\nreturn out\n'), True),
    ('a body in a fence', HUMANEVAL, f'The body:\n{fence(LONG_BODY)}Done.', True),
    ('a body that lost one blank', HUMANEVAL, LONG_BODY[1:], True),
    ('a body after prose', HUMANEVAL, f'Here is the completed body:\n\n{LONG_BODY}\nIt counts.', True),
    ('a body, and a part of it explained', HUMANEVAL,
     f'{fence(LONG_BODY)}The last line\n{fence("    return out" + chr(10))}', True),
    ('a body, then the function announced', HUMANEVAL, BODY + '\n\nNow:\n\ndef add(a, b):\n    pass\n', True),
    ('a body with a helper behind it', HUMANEVAL,
     '    return total([a, b])\n\n\ndef total(xs):\n    return sum(xs)\n\n\nThat is all.', True),
    ('the whole function', HUMANEVAL, GOOD, True),
    ('the whole function, prose around', HUMANEVAL, f'Sure! Here it is:\n\n{GOOD}\nHope this helps.', True),
    ('the prompt again', HUMANEVAL, PROMPT + BODY, True),
    ('the prompt again in a fence', HUMANEVAL, f'Sure!\n{fence(PROMPT + BODY)}Done.', True),
    ('the prompt again, wrong', HUMANEVAL,
     f'Sure!\n{fence(PROMPT + "    return a - b" + chr(10))}Done.', False),
    ('the prompt again, prose after', HUMANEVAL, PROMPT + BODY + '\nThis adds.', True),
    ('a body and an end mark', HUMANEVAL, BODY.rstrip() + '<|endoftext|>', True),
    ('prose alone', HUMANEVAL, 'I cannot help with that.', False),
    ('the docstring alone', HUMANEVAL, PROMPT, False),
    ('a body and the end of a fence', HUMANEVAL, BODY + '```\n\nThis adds.', True),
    ('a body with tabs', HUMANEVAL, '\treturn a + b\n', True),
    ('a body, doctests, wrong assertions', HUMANEVAL,
     BODY + '\nif __name__ == "__main__":\n    import doctest\n    doctest.testmod()\nassert add(1, 1) == 3\n', True),
    ('a body with a function in it', HUMANEVAL,
     '    def plus(x):\n        return a + x\n    return plus(b)\n\nThe inner function adds.', True),
    ('a body with an error, prose after', HUMANEVAL, '    return a + + * b\n\nThis adds.', False),
    ('the whole function, indented below a word', HUMANEVAL, 'Solution\n\n' + textwrap.indent(GOOD, '    '), True),
    ('the whole function, its colon missing', HUMANEVAL, GOOD.replace(':', ''), False),
    ('another function', HUMANEVAL, GOOD.replace('add', 'plus'), False),
    ('a loop without its colon', HUMANEVAL, 'for i in range(b)\n    return a + b\n', False),
    ('a fence in a docstring, a word before', HUMANEVAL, f'Done\n{FENCED}It adds.', True),
    # programs that read and print
    ('a program', STDIO, READS, True),
    ('a program in prose', STDIO, f'Here it is:\n\n{READS}\nIt adds the two numbers.', True),
    ('a wrong program in prose', STDIO, f'Here it is:\n\n{READS.replace("+", "-")}\nIt adds them.', False),
    ('a program and sample input', STDIO,
     f'{fence(READS)}Input:\n{fence("1 2" + chr(10), "")}Output:\n{fence("3" + chr(10), "")}', True),
    ('a program with a main guard', STDIO,
     fence(GUARDED), True),
    ('a draft, then a program', STDIO, f'{fence(READS.replace("+", "-"))}No:\n{fence(READS)}', True),
    ('function and program in two fences', STDIO,
     f'{fence(GOOD)}and\n{fence("print(add(*map(int, input().split())))" + chr(10))}', True),
    ('a program, prose with brackets', STDIO, f'{READS}\nO(1) time.\n- O(1)\n', True),
    ('a program with a function, prose around', STDIO,
     f'Here:\n\n{WITH_MAIN}\nIt adds.', True),
    ('samples without a fence', STDIO, f'Input:\n1 2\nOutput:\n3\n\n{READS}', True),
    ('a call of what is not there', STDIO, READS + 'mian()\n', False),
    ('reasoning, then a program', STDIO, f'<think>{READS.replace("+", "-")}</think>\n{READS}', True),
    ('a line with an error in it', STDIO, 'a, b = map(int, input().split())\na = a +* 3\nprint(a + b)\n', False),
]

def results(programs): # each of them run once, however many blank lines it ends with
    keys = [json.dumps((program.rstrip(), tests)) for program, tests in programs]
    once = dict(zip(keys, programs))
    statuses = dict(zip(once, run_tests_batch(once.values())))
    return [statuses[k].status for k in keys]

def program(answer, tests): return whole_program(find_code(answer, tests)[0], tests), tests

def test_forms():
    """Right answers pass in whatever form, wrong ones in none; what needs no finding is left as it is."""
    assert len(FORMS) >= 100
    statuses = results([program(a, t) for _, t, a, _ in FORMS])
    wrong = [(what, s, find_code(a, t)) for (what, t, a, right), s in zip(FORMS, statuses) if (s == 'passed') != right]
    assert not wrong
    for answer, tests in ((GOOD, ASSERTS), (BODY, HUMANEVAL), (READS, STDIO), (FILLED, ASSERTS)):
        assert find_code(answer, tests) == (answer, ())

def test_case_file():
    if not CASES.is_file(): pytest.skip('no shared/cases')
    cases = json.loads(CASES.read_text())
    statuses = results([program(c['answer'], cases['tests'][c['tests']]) for c in cases['cases']])
    right = {c['what']: c['right'].split()[0] for c in cases['cases']}
    assert dict(zip(right, statuses)) == right and len(statuses) == 11

# Forms around a program, and around the body of a HumanEval function; `draft` is another program
AROUND = [
    lambda c, draft: c,
    lambda c, draft: f'Here is the solution:\n\n{c}\nHope this helps!',
    lambda c, draft: f'Sure (it\'s short):\n\n```python\n{c}```\n\nIt\'s O(n).',
    lambda c, draft: f'```\n{c}',
    lambda c, draft: f'1. So:\n   ```py\n{textwrap.indent(c, "   ")}   ```\n',
    lambda c, draft: f'[PYTHON]\n{c}[/PYTHON]',
    lambda c, draft: f'<reasoning>\n{draft}</reasoning>\n<answer>\n{c}</answer>',
    lambda c, draft: f'<think>\nMaybe\n```python\n{draft}```\nno.\n</think>\n\n```python\n{c}```\n',
    lambda c, draft: f'Let us try\n{draft}\nno.\n</think>\n{c}',
    lambda c, draft: f'{c}\n<think>or\n```python\n{draft}```\n?</think>\n',
    lambda c, draft: f'First:\n```python\n{draft}```\nBut it fails. Better:\n```python\n{c}```\n',
    lambda c, draft: f'{c.rstrip()}<|im_end|>\n<|im_start|>user\nThen?\n{draft}',
    lambda c, draft: f'{c}\n\ndef next_one(a):\n    """ Does',
    lambda c, draft: f'{c}\nassert 1 == 2\nprint(int(input()))\n',
]
AROUND_BODY = [
    lambda b, draft: b,
    lambda b, draft: f'{b}\nThis function does what it should.\n',
    lambda b, draft: f'{b}\n\ndef next_one(a):\n    """ Does',
    lambda b, draft: b.lstrip(),
    lambda b, draft: f'```python\n{textwrap.dedent(b)}```\n',
    lambda b, draft: f'Here is the body:\n\n{b}\nHope this helps!',
    lambda b, draft: f'<think>{draft}</think>\n{b.rstrip()}</s>',
]

def test_mutants():
    """Right and wrong programs in every form: each has the result that it has alone."""
    from weighted_mtp.synthetic import make_problems, problem_rows
    alone, formed = [], []
    for p in make_problems(4, seed=3):
        rows, tests = problem_rows(p, per_problem=2), dict(kind='asserts', tests=p.tests)
        for row in rows:
            code, right = row['output'].rstrip() + '\n', row['is_correct']
            draft = next(r['output'].rstrip() + '\n' for r in rows if r['is_correct'] != right)
            alone.append(((code, tests), right))
            formed += [(program(form(code, draft), tests), right) for form in AROUND]
            first, _, body = code.partition('\n')
            if not first.startswith('def f('): continue
            check = ''.join(['def check(f):\n', *(f'    {t}\n' for t in p.tests)])
            prompt = f'{first}\n    """ {p.instruction} """\n'
            prompt = dict(kind='humaneval', entry_point='f', test=check, prompt=prompt)
            formed += [(program(form(body, draft), prompt), right) for form in AROUND_BODY]
    every = [*alone, *formed]
    assert {right for _, right in alone} == {True, False} and len(formed) >= 200
    statuses = results([job for job, _ in every])
    assert [(job, s) for (job, right), s in zip(every, statuses) if (s == 'passed') != right] == []

LONG = dict(
    prose='Here is (the "next" line.\n'*2000, brackets='x = [\n'*2000, strings='"""\nx = 1\n'*1000,
    errors='def f(x):\n    x = = 1\n'*1000, code='def g(x):\n    return x\n'*1000, fences='```python\ndef g(x):\n'*1000,
    tags='<code>\n'*2000, table='x = [\n' + '(1, 2),\n'*2000 + ']\n',
    chain='def g0(x): return x\n' + ''.join(f'def g{i}(x): return g{i-1}(x)\n' for i in range(1, 2000)))
DEEP = dict(
    brackets='('*100_000, minus='x = ' + '-'*100_000 + '1', attributes='x' + '.x'*50_000, sums='x = 1' + ' + 1'*50_000,
    indents=''.join(' '*i + 'if 1:\n' for i in range(300)), nothing='\0')

def test_time_and_depth():
    """Two thousand lines of the kinds that cost most, and what is nested too deeply to be parsed, around a function."""
    for name, text in [*LONG.items(), *DEEP.items()]:
        start = time.process_time()
        code, kinds = find_code(f'Let us see.\n{text}\n\n{GOOD}', ASSERTS)
        took = time.process_time() - start # 0.1 s on a quiet machine
        assert 'def add' in code and took < 3, (name, kinds, took)
    for text in DEEP.values(): assert find_code(text, ASSERTS)[0] is not None

def evalplus_program(sanitize, answer, tests): # as its command does it
    if tests['kind'] == 'asserts': return sanitize(answer, 'add'), tests
    checks = [f'assert add({x}) == {y}' for x, y in (('1, 2', 3), ('2, 5', 7))]
    return sanitize(tests['prompt'] + '\n' + answer, tests['entry_point']), dict(kind='asserts', tests=checks)

def test_beside_evalplus(monkeypatch):
    """No form that evalplus's own function gets right is wrong here, and more are right."""
    pytest.importorskip('tree_sitter_python')
    data = types.ModuleType('evalplus.data') # which wants packages for downloading
    for name in ('get_human_eval_plus', 'get_mbpp_plus', 'load_solutions', 'write_directory', 'write_jsonl'):
        setattr(data, name, None)
    monkeypatch.setitem(sys.modules, 'evalplus.data', data)
    sanitize = pytest.importorskip('evalplus.sanitize').sanitize
    forms = [f for f in FORMS if f[1]['kind'] != 'stdio'] # it knows functions only
    def rightly(programs): return [(s == 'passed') == right for s, (*_, right) in zip(results(programs), forms)]
    ours = rightly([program(answer, tests) for _, tests, answer, _ in forms])
    theirs = rightly([evalplus_program(sanitize, answer, tests) for _, tests, answer, _ in forms])
    print(f'{len(forms)} forms: {sum(ours)} right here, {sum(theirs)} by evalplus')
    assert [what for (what, *_), o, t in zip(forms, ours, theirs) if t and not o] == []
    assert len(forms) >= 100 and sum(ours) > sum(theirs)
