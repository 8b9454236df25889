"""From a model's text to the program that is run: the forms in which models answer, through the sandbox; beside evalplus's `sanitize`, where that is installed."""
import json, sys, time, types
from pathlib import Path

import pytest

from weighted_mtp.answers import find_code, whole_program
from weighted_mtp.sandbox import judge_many

REPO = Path(__file__).parents[1]
CASES = REPO.parent/'shared/cases/answer_forms.json'

ASSERTS = dict(kind='asserts', tests=['assert add(1, 2) == 3', 'assert add(2, 5) == 7'])
HUMANEVAL = dict(kind='humaneval', entry_point='add', test='def check(f):\n    assert f(1, 2) == 3\n    assert f(2, 5) == 7\n',
                 prompt='from typing import List\n\n\ndef add(a, b):\n    """ Add.\n    >>> add(1, 2)\n    3\n    """\n')
STDIO = dict(kind='stdio', tests=[['1 2\n', '3\n'], ['2 5\n', '7\n']])

GOOD, BAD = 'def add(a, b):\n    return a + b\n', 'def add(a, b):\n    return a - b\n'
READS = 'a, b = map(int, input().split())\nprint(a + b)\n'
HELPED = 'def total(xs):\n    return sum(xs)\n\n\ndef add(a, b):\n    return total([a, b])\n'
FILLED = 'sums = {}\nfor i in range(10):\n    for j in range(10):\n        sums[i, j] = i + j\n\n\ndef add(a, b):\n    return sums[a, b]\n'
DECORATED = 'import functools\n\n@functools.lru_cache(None)\ndef add(a, b):\n    return a + b\n'
BODY, LONG_BODY = '    return a + b\n', '    out = a\n    for _ in range(b):\n        out += 1\n    return out\n'

def fence(code, label='python'): return f'```{label}\n{code}```\n'

FORMS = [ # what, tests, answer, whether it is right
    ('plain', ASSERTS, GOOD, True), ('plain and wrong', ASSERTS, BAD, False),
    # prose
    ('prose before and after', ASSERTS, f'Here is the solution:\n\n{GOOD}\nHope this helps!', True),
    ('prose before and after, wrong', ASSERTS, f'Here is the solution:\n\n{BAD}\nHope this helps!', False),
    ('prose after, in the same paragraph', ASSERTS, GOOD + 'This adds the two numbers.', True),
    ('prose with brackets and quotes', ASSERTS, f"Here's it (the \"best\" way:\n\n{GOOD}\n- it's O(1) (constant\n- it doesn't loop", True),
    ('prose with the indentation of the body', ASSERTS, GOOD + '    This adds the two numbers.\n', True),
    ('a single word after', ASSERTS, GOOD + '\nDone', True),
    ('prose between helper and function', ASSERTS, HELPED.replace('\n\n\n', '\n\nNow we can use it:\n\n'), True),
    ('a line of Markdown above', ASSERTS, f'## Solution\n\n{GOOD}\n**Complexity**: O(1)', True),
    ('indented as Markdown has it', ASSERTS, 'Like this:\n\n' + ''.join(f'    {l}\n' for l in GOOD.splitlines()) + '\nThat is all.', True),
    ('a numbered list, indented', ASSERTS, '1. First, write\n\n' + ''.join(f'       {l}\n' for l in GOOD.splitlines()) + '2. Then be glad.', True),
    ('the next task, begun', ASSERTS, f'{GOOD}\n\n### Instruction:\nSubtract.\n\n### Response:\n{BAD}', True),
    ('decorated, prose around', ASSERTS, f'Here:\n\n{DECORATED}\nDone.', True),
    ('a generator as helper', ASSERTS, 'Sure!\n\ndef both(a, b):\n    yield a\n    yield b\n\ndef add(a, b):\n    return sum(both(a, b))\n\nEnjoy!', True),
    ('a table filled by a loop', ASSERTS, f'We fill a table first.\n\n{FILLED}\nThat is it.', True),
    ('a lambda', ASSERTS, 'The shortest way:\n\nadd = lambda a, b: a + b\n\nThat is it.', True),
    ('a function of operator', ASSERTS, 'Use the library:\n\nfrom operator import add\n\nThat is it.', True),
    ('an import that may fail', ASSERTS, 'So:\n\ntry:\n    from fast import plus\nexcept ImportError:\n    plus = lambda a, b: a + b\n\ndef add(a, b):\n    return plus(a, b)\n\nDone.', True),
    # what stands beside the function
    ('an example that reads input', ASSERTS, GOOD + '\nprint(add(int(input()), int(input())))\n', True),
    ('an example that asserts something wrong', ASSERTS, GOOD + '\nassert add(1, 1) == 3\n', True),
    ('a main guard that reads input', ASSERTS, GOOD + '\nif __name__ == "__main__":\n    print(add(int(input()), int(input())))\n', True),
    ('the function is only in a docstring', ASSERTS, '"""\n' + GOOD + '"""\nadd_two = 1\n', False),
    ('the function is only in a comment', ASSERTS, ''.join(f'# {l}\n' for l in GOOD.splitlines()), False),
    ('the function is only in a string, with prose', ASSERTS, f'Here is a string.\n\ntext = """\n{GOOD}"""\n\nThat is all.', False),
    ('the function is another one', ASSERTS, GOOD.replace('add', 'sum_of'), False),
    ('no code at all', ASSERTS, 'I cannot help with that.', False), ('nothing', ASSERTS, '', False),
    # fences
    ('a fence', ASSERTS, f'Here:\n{fence(GOOD)}Done.', True), ('a wrong one', ASSERTS, f'Here:\n{fence(BAD)}Done.', False),
    ('a fence not closed', ASSERTS, f'```python\n{GOOD}', True), ('a fence not closed, and prose', ASSERTS, f'```python\n{GOOD}\nThis adds them.', True),
    ('the end of a fence alone', ASSERTS, f'{GOOD}```\nThis adds them.', True),
    ('tildes', ASSERTS, f'~~~\n{GOOD}~~~', True), ('no label, in a list', ASSERTS, '1. So:\n   ```\n   def add(a, b):\n       return a + b\n   ```', True),
    ('closed behind the last line', ASSERTS, f'```python\n{GOOD.strip()}```\nDone', True),
    ('on one line', ASSERTS, '```python def add(a, b): return a + b```', True),
    ('Windows line ends', ASSERTS, f'Here:\n{fence(GOOD)}Done.'.replace('\n', '\r\n'), True),
    ('a draft, then the answer', ASSERTS, f'First try:\n{fence(BAD)}That subtracts. Correct:\n{fence(GOOD)}', True),
    ('a long draft, then the answer', ASSERTS, f'First try:\n{fence(BAD + "# a" * 9 + HELPED.replace("add", "other"))}Correct:\n{fence(GOOD)}', True),
    ('a right draft, then a wrong answer', ASSERTS, f'First try:\n{fence(GOOD)}Better:\n{fence(BAD)}', False),
    ('the answer, then how to use it', ASSERTS, f'{fence(GOOD)}Use it:\n{fence("from solution import add" + chr(10) + "print(add(1, 2))" + chr(10)*3)}', True),
    ('the answer, then its signature', ASSERTS, f'{fence(GOOD)}The signature is\n{fence("def add(a, b):" + chr(10) + "    ..." + chr(10))}', True),
    ('helper and function in two fences', ASSERTS, f'A helper:\n{fence(HELPED.split("def add")[0])}and\n{fence("def add" + HELPED.split("def add")[1])}', True),
    ('commands and output beside it', ASSERTS, f'{fence("pip install add" + chr(10), "bash")}{fence(GOOD)}{fence("3" + chr(10), "text")}', True),
    ('a fence in a docstring', ASSERTS, fence('def add(a, b):\n    """Use:\n    ```\n    add(1, 2)\n    ```\n    """\n    return a + b\n'), True),
    ('a draft without a fence, then a draft corrected', ASSERTS, f'{BAD}\nWait, that subtracts.\n\n{GOOD}', True),
    ('a right draft without a fence, then a wrong one', ASSERTS, f'{GOOD}\nWait, better subtract.\n\n{BAD}', False),
    # tags
    *((f'tags {a}', ASSERTS, f'{a}\n{GOOD}{b}', True) for a, b in (('[PYTHON]', '[/PYTHON]'), ('<code>', '</code>'), ('<answer>', '</answer>'), ('[BEGIN]', '[DONE]'), ('\\begin{code}', '\\end{code}'), ('<|python_tag|>', '<|eom_id|>'))),
    ('a wrong one in tags', ASSERTS, f'[PYTHON]\n{BAD}[/PYTHON]', False), ('tags not closed', ASSERTS, f'[PYTHON]\n{GOOD}', True),
    ('HTML', ASSERTS, '<pre><code class="python">def add(a, b):\n    return a + b if a &lt; 9 else b + a\n</code></pre>', True),
    ('a fence in an answer, drafts before', ASSERTS, f'{fence(BAD)}<answer>\n{fence(GOOD)}</answer>', True),
    ('a right draft, a wrong answer in tags', ASSERTS, f'{fence(GOOD)}<answer>\n{fence(BAD)}</answer>', False),
    # reasoning
    ('reasoning with a wrong draft', ASSERTS, f'<think>\nMaybe\n{fence(BAD)}no.\n</think>\n{fence(GOOD)}', True),
    ('reasoning with a right draft', ASSERTS, f'<think>\nMaybe\n{fence(GOOD)}no.\n</think>\n{fence(BAD)}', False),
    ('reasoning with a right draft, no answer', ASSERTS, f'<think>\nMaybe\n{fence(GOOD)}no.\n</think>\nI do not know.', False),
    ('reasoning that never ends', ASSERTS, f'<think>\nMaybe\n{fence(GOOD)}or', False),
    ('reasoning without a beginning', ASSERTS, f'Maybe\n{fence(BAD)}no.\n</think>\n\n{GOOD}', True),
    *((f'reasoning {a}', ASSERTS, f'{a}\n{fence(BAD)}{b}\n{GOOD}', True) for a, b in (('<reasoning>', '</reasoning>'), ('<|begin_of_thought|>', '<|end_of_thought|>'), ('[THINK]', '[/THINK]'), ('<|channel|>analysis<|message|>', '<|end|><|start|>assistant<|channel|>final<|message|>'))),
    ('two reasoning parts', ASSERTS, f'<think>a</think>{fence(BAD)}<think>no: {BAD}</think>{fence(GOOD)}', True),
    ('a tag in a string', ASSERTS, f'Here:\n{fence(GOOD + "TAG = " + chr(39) + "</think>" + chr(39) + chr(10))}', True),
    # end marks
    *((f'end mark {m.strip()}', ASSERTS, f'{GOOD.strip()}{m}', True) for m in ('<|endoftext|>', '<|im_end|>', '</s>', '<|eot_id|>', '<end_of_turn>', '<｜end▁of▁sentence｜>', '\n[DONE]')),
    ('a wrong one with an end mark', ASSERTS, f'{BAD.strip()}<|endoftext|>', False),
    ('a second turn after the end mark', ASSERTS, f'{GOOD.strip()}<|im_end|>\n<|im_start|>user\nNow subtract.<|im_end|>\n<|im_start|>assistant\n{BAD}', True),
    ('an end mark in a string', ASSERTS, 'END = "</s>"\n' + GOOD, True),
    # cut off
    ('the next function cut off', ASSERTS, f'{GOOD}\n\ndef sub(a, b):\n    """ Sub', True), ('an example cut off', ASSERTS, f'{GOOD}\nprint(add(1, ', True),
    ('cut off in the function', ASSERTS, 'def add(a, b):\n    total = a +', False),
    ('an error in the middle of the function', ASSERTS, 'def add(a, b):\n    return a + b\n    x = = 1\n    return x\n', False),
    # HumanEval
    ('a body', HUMANEVAL, BODY, True), ('a wrong body', HUMANEVAL, '    return a - b\n', False), ('a body and prose', HUMANEVAL, BODY + '\nThis function adds.\n', True),
    ('a wrong body and prose', HUMANEVAL, '    return a - b\n\nThis function adds.\n', False), ('a body and the next function, cut off', HUMANEVAL, BODY + '\n\ndef sub(a, b):\n    """ Sub', True),
    ('a body and an example that reads', HUMANEVAL, BODY + '\nprint(add(int(input()), 1))\n', True), ('a body without its first indentation', HUMANEVAL, LONG_BODY.lstrip() + '\nThis adds.', True),
    ('a body without any', HUMANEVAL, fence('out = a\nout += b\nreturn out\n'), True), ('a body in a fence', HUMANEVAL, f'The body:\n{fence(LONG_BODY)}Done.', True),
    ('a body that lost one blank', HUMANEVAL, LONG_BODY[1:], True), ('a body after prose', HUMANEVAL, f'Here is the completed body:\n\n{LONG_BODY}\nIt counts.', True),
    ('a body with a helper behind it', HUMANEVAL, '    return total([a, b])\n\n\ndef total(xs):\n    return sum(xs)\n\n\nThat is all.', True),
    ('the whole function', HUMANEVAL, GOOD, True), ('the whole function, prose around', HUMANEVAL, f'Sure! Here it is:\n\n{GOOD}\nHope this helps.', True),
    ('the prompt again', HUMANEVAL, HUMANEVAL['prompt'] + BODY, True), ('the prompt again in a fence', HUMANEVAL, f'Sure!\n{fence(HUMANEVAL["prompt"] + BODY)}Done.', True),
    ('the prompt again, wrong', HUMANEVAL, f'Sure!\n{fence(HUMANEVAL["prompt"] + "    return a - b" + chr(10))}Done.', False),
    ('the prompt again, prose after', HUMANEVAL, HUMANEVAL['prompt'] + BODY + '\nThis adds.', True), ('a body and an end mark', HUMANEVAL, BODY.rstrip() + '<|endoftext|>', True),
    ('prose alone', HUMANEVAL, 'I cannot help with that.', False), ('the docstring alone', HUMANEVAL, HUMANEVAL['prompt'], False),
    # programs that read and print
    ('a program', STDIO, READS, True), ('a program in prose', STDIO, f'Here it is:\n\n{READS}\nIt adds the two numbers.', True), ('a wrong program in prose', STDIO, f'Here it is:\n\n{READS.replace("+", "-")}\nIt adds them.', False),
    ('a program and sample input', STDIO, f'{fence(READS)}Input:\n{fence("1 2" + chr(10), "")}Output:\n{fence("3" + chr(10), "")}', True), ('a program with a main guard', STDIO, f'{fence(GOOD + "if __name__ == " + repr("__main__") + ":" + chr(10) + "    print(add(*map(int, input().split())))" + chr(10))}', True),
    ('a draft, then a program', STDIO, f'{fence(READS.replace("+", "-"))}No:\n{fence(READS)}', True), ('function and program in two fences', STDIO, f'{fence(GOOD)}and\n{fence("print(add(*map(int, input().split())))" + chr(10))}', True),
    ('reasoning, then a program', STDIO, f'<think>{READS.replace("+", "-")}</think>\n{READS}', True), ('a line with an error in it', STDIO, 'a, b = map(int, input().split())\na = a +* 3\nprint(a + b)\n', False),
]

def results(programs): # each of them run once
    keys = [json.dumps(p) for p in programs]
    said = dict(zip(once := dict(zip(keys, programs)), judge_many(once.values())))
    return [said[k].status for k in keys]

def program(answer, tests): return whole_program(find_code(answer, tests)[0], tests), tests

def test_forms():
    """Right answers pass in whatever form, wrong ones in none; what needs no finding is left as it is."""
    assert len(FORMS) >= 100
    said = results([program(a, t) for _, t, a, _ in FORMS])
    assert [(what, s, find_code(a, t)) for (what, t, a, right), s in zip(FORMS, said) if (s == 'passed') != right] == []
    assert [find_code(a, t) for a, t in ((GOOD, ASSERTS), (BODY, HUMANEVAL), (READS, STDIO), (FILLED, ASSERTS))] == [(x, ()) for x in (GOOD, BODY, READS, FILLED)]

def test_case_file():
    if not CASES.is_file(): pytest.skip('no shared/cases')
    cases = json.loads(CASES.read_text())
    said = results([program(c['answer'], cases['tests'][c['tests']]) for c in cases['cases']])
    assert [(c['what'], s) for c, s in zip(cases['cases'], said) if s != c['right'].split()[0]] == [] and len(said) == 11
