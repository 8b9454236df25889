"""Programs that mean harm, each with the verdict it must get; afterwards nothing of them is left. With walls (namespaces) and without."""
import json, os, re, shutil, subprocess, sys, tempfile, time
from pathlib import Path

import psutil, pytest

from weighted_mtp import sandbox
from weighted_mtp.config import UserError
from weighted_mtp.sandbox import judge, judge_many, protections, run_program

SHARED = Path(__file__).resolve().parent.parent.parent/'shared/data'
real_data = pytest.mark.skipif(not SHARED.is_dir(), reason=f'{SHARED} is not there')
ADD = dict(kind='asserts', tests=['assert add(1, 2) == 3', 'assert add(-5, 5) == 0', 'assert add([1], [2]) == [1, 2]'])
IO = dict(kind='stdio', tests=[['1 2\n', '3\n'], ['5 7\n', '12\n']])
EVAL = dict(kind='humaneval', test='def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(4, 4) == 8\n', entry_point='add')
GOOD, GOOD_IO = 'def add(a, b):\n    return a + b\n', 'a, b = map(int, input().split())\nprint(a + b)\n'
NO = {'failed', 'error', 'killed', 'timeout', 'memory', 'output'}

FORGED = 'import os\nfor fd in range(3, 64):\n    try: os.write(fd, b\'%s\')\n    except OSError: pass\n' # to the referee

# name: (program, tests, statuses that are right)
HOSTILE = {
    'good': (GOOD, ADD, {'passed'}), 'good, stdio': (GOOD_IO, IO, {'passed'}), 'good, humaneval': (GOOD, EVAL, {'passed'}),
    'prints much but is right': ('print("x"*100000)\n' + GOOD, ADD, {'passed'}), 'not UTF-8 on standard output': ('import sys; sys.stdout.buffer.write(b"\\xff\\xfe")\n' + GOOD, ADD, {'passed'}),
    'lone surrogate in the answer': ('def add(a, b):\n    return "\\ud800"', ADD, {'failed'}), 'lone surrogate printed': ('print("\\ud800")', IO, {'failed'}),
    # ending before the tests
    'sys.exit(0)': ('import sys; sys.exit(0)', ADD, {'error'}), 'os._exit(0)': ('import os; os._exit(0)', ADD, {'error'}), 'raise SystemExit': ('raise SystemExit', ADD, {'error'}),
    'exits when called': ('import os\ndef add(a, b): os._exit(0)', ADD, {'error'}), 'SystemExit when called': ('def add(a, b): raise SystemExit(0)', ADD, {'error'}), 'atexit': ('import atexit, os; atexit.register(lambda: os._exit(0)); raise SystemExit', ADD, {'error'}),
    'quit()': ('quit()', EVAL, NO), 'exit in stdio': ('import os; os._exit(0)', IO, {'failed'}), 'empty': ('', ADD, {'error'}), 'empty, stdio': ('', IO, {'failed'}), 'syntax error': ('def add(a, b:', ADD, {'error'}),
    # looking right
    'equal to everything': ('class A:\n    def __eq__(self, o): return True\n    def __abs__(self): return 0\ndef add(a, b): return A()', ADD, {'failed'}), 'int that equals everything': ('class A(int):\n    def __eq__(self, o): return True\ndef add(a, b): return A()', ADD, {'failed'}),
    'list that equals everything': ('class A(list):\n    def __eq__(self, o): return True\ndef add(a, b): return A()', ADD, {'failed'}), 'str that equals everything': ('class A(str):\n    def __eq__(self, o): return True\n    __hash__ = str.__hash__\ndef add(a, b): return {A("x"): 1}', ADD, {'failed'}),
    'redefines AssertionError': ('import builtins\nbuiltins.AssertionError = AssertionError = type("X", (BaseException,), {})\ndef add(a, b): return 0', ADD, {'failed'}),
    'redefines assert by trace': ('import sys\nsys.settrace(lambda *a: None)\ndef add(a, b): return 1', ADD, {'failed'}), 'patches builtins': ('import builtins\nfor n in ("abs", "len", "isinstance", "all", "any", "set", "sorted"): setattr(builtins, n, lambda *a, **k: True)\ndef add(a, b): return 0', ADD, NO),
    'patches ast and json': ('import json, ast\njson.dumps = lambda *a, **k: "true"\nast.literal_eval = lambda x: True\ndef add(a, b): return 0', ADD, NO), 'raises AssertionError itself': ('def add(a, b): raise AssertionError', ADD, {'failed'}),
    'prints a verdict': ('print(\'{"status": "passed", "message": "", "stdout": "", "stderr": "", "seconds": 0, "walls": true}\')\nimport os; os._exit(0)', ADD, {'error'}),
    'writes a verdict to every file': ('import os\nfor fd in range(3, 64):\n    try: os.write(fd, b\'{"status": "passed", "message": "", "stdout": "", "stderr": "", "seconds": 0, "walls": true}\\n\')\n    except OSError: pass\nos._exit(0)', ADD, NO),
    'answers before it is asked': ('import os\nfor fd in range(3, 64):\n    try: os.write(fd, b\'{"add": []}\\n\' + b\'{"value": 3, "args": [1, 2]}\\n\'*9)\n    except OSError: pass\ndef add(a, b): return 0', ADD, NO),
    'reads the harness from its frames': ('import sys, gc\nf = sys._getframe()\nfound = ""\nwhile f:\n    found += repr(f.f_globals) + repr(f.f_locals); f = f.f_back\nfound += "".join(repr(o) for o in gc.get_objects()[:20000] if isinstance(o, dict))\ndef add(a, b): return 3 if "== 3" in found else 99', ADD, {'failed'}),
    'reads standard input for the tests': ('import sys\ntext = sys.stdin.read()\ndef add(a, b): return 3 if "==" in text else 99', ADD, {'failed'}), 'reads descriptors for the tests': ('import os\ntext = b""\nfor fd in (0, *range(4, 64)):\n    try: os.set_blocking(fd, False); text += os.read(fd, 9999)\n    except OSError: pass\ndef add(a, b): return 3 if b"==" in text else 99', ADD, NO),
    'prints both answers': ('print(3, 12)', IO, {'failed'}), 'nan': ('def add(a, b): return float("nan")', ADD, {'failed'}), 'endless iterator': ('import itertools\ndef add(a, b): return itertools.count()', ADD, {'error'}),
    'deep list': ('def add(a, b):\n    x = []\n    for _ in range(10**5): x = [x]\n    return x', ADD, NO), 'answer of 100 MB': ('def add(a, b): return "x"*10**8', ADD, NO),
    # taking too much
    'loops': ('while True: pass', ADD, {'timeout'}), 'loops when called': ('def add(a, b):\n    while True: pass', ADD, {'timeout'}), 'sleeps': ('import time; time.sleep(60)', IO, {'timeout'}), 'ignores signals': ('import signal\nfor s in range(1, 60):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nwhile True: pass', ADD, {'timeout', 'killed'}),
    'forks without end': ('import os\nwhile True:\n    try: os.fork()\n    except OSError: pass', ADD, NO), 'threads without end': ('import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()', ADD, NO),
    'fills memory': ('x = []\nwhile True: x.append(bytearray(10**7))', ADD, {'memory'}), 'fills memory when called': ('def add(a, b): return len("x"*10**10)', ADD, {'memory'}), 'fills memory in children': ('import os\nfor _ in range(3): os.fork()\nx = []\nwhile True: x.append(bytearray(10**7))', ADD, NO),
    'fills the disk': ('f = open("big", "wb")\nwhile True: f.write(b"x"*10**6)', ADD, {'error', 'killed'}), 'many files': ('for i in range(10**6): open(str(i), "w").close()', ADD, NO), 'prints for ever': ('while True: print("x"*1000)', ADD, {'output'}), 'prints errors for ever': ('import sys\nwhile True: print("x"*1000, file=sys.stderr)', ADD, {'output'}),
    'huge power': ('x = 10**(10**9)', ADD, NO), 'recursion': ('def add(a, b): return add(a, b)', ADD, {'error'}), 'crashes the interpreter': ('import ctypes; ctypes.string_at(0)', ADD, {'killed'}),
    # getting out
    'kills its parent': ('import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nimport time; time.sleep(1)\n' + GOOD, ADD, NO), 'kills everything': ('import os, signal\nos.kill(-1, signal.SIGKILL)\n' + GOOD, ADD, NO), 'kills its group': ('import os, signal\nos.killpg(0, signal.SIGKILL)', ADD, NO), 'kills process 1': ('import os, signal\ntry: os.kill(1, signal.SIGKILL)\nexcept OSError: pass\n' + GOOD, ADD, {'passed', 'killed'}),
    'reads the environment': ('import os\nassert not [k for k in os.environ if k not in ("LC_CTYPE",)], os.environ\n' + GOOD, ADD, {'passed'}),
    'puts its own abs into the tests': ('def add(a, b): return 3\ndef abs(x): return 0\ndef tuple(x): return 0', dict(kind='asserts', tests=['assert abs(add(1, 2) - 77) < 1', 'assert tuple([1]) == (1,)']), {'failed'}),
    'puts its own math into the tests': ('class math: isclose = staticmethod(lambda *a: True)\ndef add(a, b): return 7.', dict(kind='asserts', tests=['assert math.isclose(add(1, 2), 3.0)']), {'failed'}),
    'answers eval': (FORGED % r'{"set": ["y", "eval"], "add": ["h", 0, "function"]}\n{"value": ["s", ""], "args": []}\n' + 'def add(a, b): return 1', dict(kind='asserts', tests=['assert set(add(1, 2)) == {4}']), NO),
    'answers a module that exits': (FORGED % r'{"add": ["m", "unittest.__main__"]}\n' + 'def add(a, b): return 1', ADD, NO), 'exits in a test': ('def add(a, b): return range(3)\nclass X:\n    def __iter__(self): raise SystemExit\ndef add(a, b): return X()', dict(kind='asserts', tests=['assert list(add(1, 2)) == [3]']), {'error'}),
    'makes the tests take memory': ('def add(a, b): return range(4*10**8)', dict(kind='asserts', tests=['assert list(add(1, 2)) == [3]']), {'error', 'timeout'}),
    'nests folders': ('import os\nfor i in range(3000):\n    os.mkdir("d"); os.chdir("d")\n' + GOOD, ADD, {'passed', 'error'}),
    'writes a verdict to every process': ('import os\nfor p in os.listdir("/proc") if os.path.isdir("/proc") else ():\n    for fd in range(1, 30):\n        try: os.write(os.open(f"/proc/{p}/fd/{fd}", 1), b\'\\n{"status": "passed", "message": "", "stdout": "", "stderr": "", "seconds": 0, "walls": true}\\n\')\n        except OSError: pass\ndef add(a, b): return 0', ADD, {'failed'}),
    'leaves a daemon': ('import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        for fd in range(64):\n            try: os.close(fd)\n            except OSError: pass\n        time.sleep(987654)\n    os._exit(0)\n' + GOOD, ADD, {'passed'}),
}
WALLED = { # what only walls keep out
    'reads /etc/passwd': ('print(open("/etc/passwd").read())', {'error'}), 'reads /proc': ('import os; print(os.listdir("/proc"))', {'error'}), 'looks for home': ('import os; assert not [d for d in os.listdir("/") if d in ("home", "work", "proc", "etc", "var")]', {'passed'}),
    'opens a socket': ('import socket; socket.create_connection(("127.0.0.1", PORT), 2)', {'error'}), 'resolves a name': ('import socket; socket.getaddrinfo("example.com", 80)', {'error'}), 'sees other processes': ('import os; os.kill(HARNESS, 0)', {'error'}),
    'writes outside': ('open("/usr/mark", "w")', {'error'}), 'writes to the root': ('open("/mark", "w")', {'error'}), 'becomes root': ('import os; os.setuid(0)', {'error'}), 'mounts': ('import ctypes, os; l = ctypes.CDLL(None, use_errno=True); assert l.mount(b"tmpfs", b"/tmp", b"tmpfs", 0, None) == 0', {'error'}),
    'makes a user namespace and mounts': ('import ctypes; l = ctypes.CDLL(None)\nif l.unshare(0x10020000) == 0: assert l.umount2(b"/usr", 2) == 0', {'error', 'passed'}), 'chroots out': ('import os; os.mkdir("x"); os.chroot("x")', {'error'}), 'ptraces process 1': ('import ctypes; assert ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0', {'error'}),
    'makes a device': ('import os; os.mknod("d", 0o60666, os.makedev(8, 0)); open("d", "rb").read(1)', {'error'}), 'sends to a host': ('import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.sendto(b"x", ("10.0.0.1", 53))', {'error'}),
}

@pytest.mark.parametrize('walls', [True, False], ids=['walls', 'no walls'])
def test_hostile_programs(walls, request, monkeypatch):
    # A jail.py and a folder of its own: tests beside this one judge programs, too
    home = Path(tempfile.mkdtemp(prefix='hostile-'))
    request.addfinalizer(lambda: shutil.rmtree(home))
    jail, temp = home/'jail.py', home/'temp'
    shutil.copy(sandbox._jail(), jail); temp.mkdir(); home.chmod(0o711) # Without walls a program is another user, who must get into its folder
    monkeypatch.setattr(sandbox, '_jail', lambda: str(jail))
    monkeypatch.setattr(tempfile, 'tempdir', str(temp))
    def left(): return {p.pid: p.info['cmdline'] for p in psutil.process_iter(['cmdline']) if str(jail) in (p.info['cmdline'] or ())}
    start = time.time()
    wrong = {}
    for name, (program, tests, right) in HOSTILE.items():
        r = judge(program, tests, timeout=2, memory_mb=256, walls=walls)
        if r.status not in right: wrong[name] = r
        if r.walls != walls and r.walls: wrong[name] = 'walls'
    assert not wrong, wrong
    assert len(HOSTILE) + len(WALLED) > 55
    print(f'{len(HOSTILE)} programs in {time.time()-start:.1f} s')
    end = time.time() + 5
    while left() and time.time() < end: time.sleep(.1)
    assert not left() and not [p for p in psutil.process_iter(['cmdline']) if '987654' in ' '.join(p.info['cmdline'] or ())]
    assert not list(temp.iterdir())

RIGHT = { # right programs that are not as simple as they could be, with tests
    'long output': ('for i in range(20000): print(i)', dict(kind='stdio', tests=[['', ''.join(f'{i}\n' for i in range(20000))]])),
    'endless iterator': ('import itertools\nids = itertools.count()\ndef f(): return next(ids)', ['assert f() == 0', 'assert f() == 1']), 'holds itself': ('d = {}\nd["d"] = d\ndef f(): return 1', ['assert f() == 1']),
    'used iterator': ('it = iter([1, 2])\ndef f(): return next(it)', ['assert f() == 1']), 'large table': ('memo = {i: (i, i) for i in range(300_000)}\ndef f(): return memo[2]', ['assert f() == (2, 2)']),
    'match': ('import re\ndef f(x): return re.match("a", x)', ['assert f("a")', 'assert not f("b")']), 'namedtuple': ('from collections import namedtuple\nP = namedtuple("P", "x y")\ndef f(): return P(1, 2)', ['assert f() == (1, 2)']),
    'IntEnum': ('from enum import IntEnum\nclass E(IntEnum): A = 3\ndef f(): return E.A', ['assert f() == 3']), 'own equality': ('class P:\n    def __init__(self, x): self.x = x\n    def __eq__(self, o): return self.x == o.x', ['assert P(1) == P(1)', 'assert P(1) != P(2)']),
    'is called sum': ('def sum(a, b): return a*b', ['assert sum(2, 3) == 6']), 'tests use its module': ('import math\ndef f(): return 2.', ['assert math.isclose(f(), 2)']), 'starts itself': ('def f(): return 1\nif __name__ == "__main__": print(int(input()))', ['assert f() == 1']),
    'tests print': ('def f(): return 1', ['print("x"*10**6)', 'assert f() == 1']), 'dataclass': ('from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int = 1\ndef f(): return P().x', ['assert f() == 1'])}

@pytest.mark.parametrize('walls', [True, False], ids=['walls', 'no walls'])
def test_right_programs(walls):
    found = {name: judge(program, dict(kind='asserts', tests=tests) if isinstance(tests, list) else tests, walls=walls) for name, (program, tests) in RIGHT.items()}
    assert not {k: r for k, r in found.items() if not r.passed}

ASSERTS = dict(kind='asserts', tests=['assert f(1) == 1', 'assert f(2) == 2, "two"', 'assert f(3) == 3'])
CHECK = dict(kind='humaneval', test='def check(g):\n    assert g(1) == 1\n    assert g(\n        2) == 2\n', entry_point='f')
STDIO = dict(kind='stdio', tests=[['2', '1'], ['x', '2']])

# A program, its tests (None: it is run), and what the result has to be; what ends in `_has` is contained, `lacks` is not
WORDS = [
    # the six of shared/cases/sandbox_stderr.json
    ('1/0', None, dict(status='error', error='ZeroDivisionError', message='ZeroDivisionError: division by zero',
        stderr='Traceback (most recent call last):\n  File "program.py", line 1, in <module>\n    1/0\n    ~^~\n'
               'ZeroDivisionError: division by zero\n')),
    ('def f(:\n pass', None, dict(status='error', error='SyntaxError', message_has='SyntaxError: invalid syntax',
        stderr='  File "program.py", line 1\n    def f(:\n          ^\nSyntaxError: invalid syntax\n')),
    ('print(input())', None, dict(status='error', error='EOFError', message_has='EOFError')),
    ("import sys\nprint('to stderr', file=sys.stderr)", None, dict(status='passed', stderr='to stderr\n', error='', message='')),
    ("import sys\nsys.stderr.write('why'); sys.exit(3)", None, dict(status='error', error='SystemExit', message='why')),
    ('import numpy', None, dict(error='ModuleNotFoundError', message="ModuleNotFoundError: No module named 'numpy'")),
    # ways to end
    ("import sys\nprint('out'); sys.exit('text')", None, dict(status='error', message='text', stderr='text\n', stdout='out\n')),
    ("import sys\nsys.stdout.write('out'); sys.exit()", None, dict(status='passed', stdout='out')),
    ('import os\nprint("lost?", flush=True); os._exit(4)', None, dict(error='SystemExit', message='exit code 4', stdout='lost?\n')),
    ('raise KeyboardInterrupt', None, dict(status='error', error='KeyboardInterrupt', message='KeyboardInterrupt')),
    ('import os\nos.abort()', None, dict(status='killed', error='Killed', message='killed by signal 6 (SIGABRT)')),
    ('import sys\nsys.stderr.write("was here\\n")\nprint(1, flush=True)\nwhile True: pass', None,
        dict(status='timeout', error='TimeoutError', message='timed out after 1 s', stderr='was here\n', stdout='1\n')),
    ('x = []\nwhile True: x.append(bytearray(10**7))', None,
        dict(status='memory', error='MemoryError', message='more than 256 MB', stderr_has='program.py", line 2')),
    ('while True: print("x"*1000)', None, dict(status='output', error='OutputLimit')),
    ('import atexit\natexit.register(print, "bye")\n1/0', None, dict(stdout='bye\n', error='ZeroDivisionError')),
    ('import threading, time\nthreading.Thread(target=lambda: (time.sleep(.1), print("late"))).start()', None,
        dict(status='passed', stdout='late\n')),
    ('import os\nif os.fork() == 0: 1/0\nos.wait(); print("parent")', None,
        dict(status='passed', stdout='parent\n', stderr_has='ZeroDivisionError')),
    # streams that are closed, replaced, or somebody else's
    ('import sys\nprint("out"); sys.stderr.close(); sys.stdout.close()\n1/0', None,
        dict(stdout='out\n', stderr_has='line 3', error='ZeroDivisionError')),
    ('import sys\nprint("out"); sys.stdout.close()', None, dict(status='passed', stdout='out\n')),
    ('import os\nos.close(1); os.close(2)\n1/0', None, dict(stderr_has='line 3', error='ZeroDivisionError')),
    ('import io, sys\nprint("out"); sys.stderr = sys.stdout = io.StringIO()\nprint("gone"); 1/0', None,
        dict(stdout='out\n', stderr_has='line 3')),
    ('import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.buffer); print("wrapped")', None, dict(stdout='wrapped\n')),
    ('import sys\nsys.stdout.buffer.write(b"bytes"); raise ValueError', None, dict(stdout='bytes', message='ValueError')),
    ('f = open(1, "w")\nf.write("kept")', None, dict(status='passed', stdout='kept')),
    ('import sys\nsys.stdout = sys.stderr = None\n1/0', None, dict(error='ZeroDivisionError', stderr_has='line 3')),
    ('import ctypes\nctypes.CDLL(None).printf(b"from C")', None, dict(status='passed', stdout='from C')),
    # what an error says
    ('def f(x):\n    assert x == 3, "not three"\nf(4)', None, dict(error='AssertionError',
        message='AssertionError: not three: assert x == 3, "not three" (line 2)', stderr_has='line 3, in <module>')),
    ('x = 2\nassert (x ==\n        3)', None, dict(message='AssertionError: assert (x == 3) (line 2)')),
    ('try: 1/0\nexcept Exception as e: raise ValueError("a\\nb") from e', None, dict(error='ValueError', message='ValueError: a b',
        stderr_has='The above exception was the direct cause')),
    ('def f(): f()\nf()', None, dict(error='RecursionError', stderr_has='Previous line repeated')),
    ('class E(Exception):\n    def __str__(self): raise SystemExit\nraise E', None, dict(error='E', message_has='str() failed')),
    ('class Own(ValueError): pass\nraise Own("no way")', None, dict(error='Own', message='Own: no way', stderr_has='\nOwn: no way')),
    ('raise type("x y"*50, (Exception,), {})("odd")', None, dict(error='Exception', message_has='odd')),
    ('raise ExceptionGroup("all", [ValueError(1), TypeError(2)])', None, dict(error='ExceptionGroup', stderr_has='TypeError: 2')),
    ('import json\njson.loads("{")', None, dict(error='JSONDecodeError', stderr_has='line 2, in <module>\n', lacks='json/decoder')),
    ('if x:\n    pass\n  y', None, dict(error='IndentationError', stderr_has='line 3')),
    ('exec("1/0")', None, dict(stderr_has='File "<string>", line 1')),
    ('raise ValueError("\\ud800")', None, dict(error='ValueError', message='ValueError: ?')),
    ('raise ValueError("x"*100_000)', None, dict(error='ValueError', message_has='ValueError: xxx', stderr_has='\n  ...\n')),
    # tests
    ('def f(x):\n    print("said", x)\n    return 1', ASSERTS, dict(status='failed', error='AssertionError', test=2,
        message='test 2: AssertionError: two: assert f(2) == 2, "two"', stdout='said 1\nsaid 2\n', stderr='')),
    ('def f(x):\n    return 6//(3 - x) if x == 3 else x', ASSERTS, dict(status='error', error='ZeroDivisionError', test=3,
        message_has='test 3: ZeroDivisionError: ', stderr_has='  File "program.py", line 2, in f\n')),
    ('def f(x):\n    assert x < 2\n    return x', ASSERTS, dict(status='failed', error='AssertionError', test=2,
        message='test 2: AssertionError: assert x < 2 (line 2)', stderr_has='line 2, in f')),
    ('class Own(KeyError): pass\ndef f(x): raise Own("k")', ASSERTS, dict(error='Own', test=1, message="test 1: Own: 'k'")),
    ('def f(x): raise UnicodeDecodeError("utf-8", b"a", 0, 1, "bad")', ASSERTS, dict(error='UnicodeDecodeError', test=1)),
    ('def f(x):\n    while x == 2: pass\n    return x', ASSERTS, dict(error='TimeoutError', test=2, message='test 2: timed out after 1 s')),
    ('import sys\ndef f(x): sys.exit(x - 1)', ASSERTS, dict(status='error', error='SystemExit', test=1)),
    ('def g(): pass', ASSERTS, dict(status='error', error='NameError', test=1)),
    ('def f(x:', ASSERTS, dict(status='error', error='SyntaxError', test=0, stderr_has='line 1')),
    ('def f(x): return h(x)', dict(ASSERTS, setup='import os\n\ndef h(x): return x/(2 - x)'), dict(error='ZeroDivisionError',
        test=2, stderr_has='  File "program.py", line 1, in f\n    def f(x): return h(x)\n')),
    ('def f(x): return h', dict(ASSERTS, setup='import os, ('), dict(error='SyntaxError', test=0, stderr_has='setup.py')),
    ('def f(x): return 1', CHECK, dict(status='failed', test=2, message='test 2: AssertionError: assert g( 2) == 2')),
    ('def f(x): return x if x == 1 else 1/0', CHECK, dict(status='error', error='ZeroDivisionError', test=2, stderr_has='line 1, in f')),
    ('print(int(input())//2)', STDIO, dict(status='error', error='ValueError', test=2, message_has='test 2: ValueError: invalid')),
    ('print(1)', STDIO, dict(status='failed', error='WrongOutput', test=2, message='test 2: other output than expected')),
    ('print(', STDIO, dict(status='error', error='SyntaxError', test=0)),
    # a test that expects an error takes no other end for it
    ('def f(x):\n    while True: pass', dict(kind='asserts', tests=['try: f(1)\nexcept Exception: pass']), dict(error='TimeoutError')),
    ('import os\ndef f(x): os._exit(0)', dict(kind='asserts', tests=['try: f(1)\nexcept: pass']), dict(error='SystemExit')),
    ('class Own(ValueError): pass\ndef f(x): raise Own("k")',
        dict(kind='asserts', tests=['try: f(1)\nexcept ValueError as e: assert str(e) == "k"']), dict(status='passed')),
]

@pytest.mark.parametrize('walls', [True, False], ids=['walls', 'no walls'])
def test_words_of_a_program(walls):
    """What a program says, and what became of it, arrives; nothing of the worker's is in it."""
    wrong = []
    for program, tests, right in WORDS:
        r = judge(program, tests or dict(kind='script', stdin=''), timeout=1, memory_mb=256, walls=walls)
        for key, value in right.items():
            has = getattr(r, key.removesuffix('_has')) if key != 'lacks' else r.stderr
            good = value in has if key.endswith('_has') else value not in has if key == 'lacks' else has == value
            if not good: wrong.append((program, key, value, r))
        if 'jail' in r.stderr or r.passed == bool(r.error) or r.passed and r.test: wrong.append((program, r))
    assert not wrong, wrong

ARRAYS = dict(kind='asserts', tests=[
    'assert total([1, 2]) == 3', 'assert (first(3) == np.arange(3)).all()', 'a = np.array([3, 1]); order(a); assert a.tolist() == [1, 3]',
    'import numpy\nassert numpy.allclose(first(2), [0, 1])', 'assert list(first(2)) == [0, 1]'])
WITH_NUMPY = 'import numpy as np\ndef total(x): return np.sum(x)\ndef first(n): return np.arange(n)\ndef order(a): a.sort()\n'
FORGED_NUMPY = 'class np: arange = allclose = lambda *a: type("T", (), {"all": lambda s: True, "__eq__": lambda s, o: s})()\n'

@pytest.mark.parametrize('walls', [True, False], ids=['walls', 'no walls'])
def test_packages(walls):
    def run(program, **kw): return run_program(program, walls=walls, packages=['numpy'], **kw)
    works = run('import numpy as np, numpy.testing\nprint(np.linalg.inv(np.eye(2)*2)[0, 0], np.fft.fft([1, 2])[0].real)\n'
                'print((np.ones((300, 300))@np.ones((300, 300))).sum(), np.random.default_rng(0).integers(9))')
    assert works.stdout == '0.5 3.0\n27000000.0 7\n', works
    assert run('import numpy as np\nnp.ones(10**8)', memory_mb=256).error == 'MemoryError'
    assert run('import numpy as np\nnp.ones(20*10**6)', memory_mb=256).passed # numpy's own memory does not count
    for other in ('torch', 'numpy.nothing', 'pytest'): assert run(f'import {other}').message == f"ModuleNotFoundError: No module named '{other}'"
    assert judge(WITH_NUMPY, ARRAYS, packages=['numpy'], walls=walls).passed
    forged = judge(FORGED_NUMPY + 'total = lambda x: 3\nfirst = np.arange\ndef order(a): a.sort()', ARRAYS, packages=['numpy'], walls=walls)
    assert not forged.passed
    assert len({run('import numpy as np\nprint(np.random.rand())').stdout for _ in range(3)}) == 3
    run('import numpy as np\nnp.sum = np.pi = None\nnp.seterr(all="raise")')
    assert run('import numpy as np\nprint(np.sum([1, 2]), np.pi > 3, np.geterr()["over"])').stdout == '3 True warn\n'

def test_packages_that_are_not_there():
    for names, why in ((['numpi'], "'numpi' is not installed here"), ('numpy', 'a list of names'), (['scikit-learn'], 'not installed'),
                       (['../numpy'], 'not installed'), ([''], 'not installed'), ([3], 'a list of names')):
        for call in (lambda: sandbox.check_packages(names), lambda: judge_many([('', ADD)], packages=names), lambda: run_program('', packages=names)):
            with pytest.raises(UserError, match=re.escape(why)): call()
    assert sandbox.check_packages(()) == () and sandbox.check_packages(['json']) == ('json',)

@pytest.mark.skipif(not protections()['files'], reason='this kernel gives no namespaces')
def test_walls():
    import socket
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0)); s.listen()
        wrong = {}
        for name, (program, right) in WALLED.items():
            r = run_program(program.replace('PORT', str(s.getsockname()[1])).replace('HARNESS', str(os.getpid())), timeout=5)
            if r.status not in right: wrong[name] = r
        assert not wrong, wrong

def test_same_verdicts_in_a_crowd():
    """Hostile ones beside good ones: results in order, none disturbed."""
    jobs = [(p, t) for p, t, _ in list(HOSTILE.values())[:30]]*2 + [(GOOD, ADD)]*20
    found = judge_many(jobs, workers=8, timeout=5)
    assert [r.status for r in found[-20:]] == ['passed']*20
    for r, (_, _, right) in zip(found, list(HOSTILE.values())[:30]*2): assert r.status in right, r

def test_many_trivial_programs():
    start = time.time()
    assert all(r.passed for r in judge_many([(GOOD_IO, dict(kind='stdio', tests=[['1 2', '3']]))]*100))
    print(f'100 programs in {time.time()-start:.1f} s')

@real_data
def test_reference_solutions_of_mbpp():
    """The data's README: 974 of 974 pass."""
    rows = [json.loads(l) for l in (SHARED/'mbpp/mbpp.jsonl').read_text().splitlines()]
    if 'WMTP_ALL' not in os.environ: rows = rows[::10]
    jobs = [(r['code'].replace('\r\n', '\n'), dict(kind='asserts', tests=[r['test_setup_code'].replace('\r\n', '\n'), *r['test_list'], *r['challenge_test_list']])) for r in rows]
    start = time.time()
    found = judge_many(jobs)
    wrong = [(r['task_id'], f) for r, f in zip(rows, found) if not f.passed]
    assert not wrong, wrong
    print(f'{len(rows)} in {time.time()-start:.1f} s')
    assert not any(f.passed for f in judge_many([('', t) for _, t in jobs]))
