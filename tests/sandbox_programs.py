"""Programs for tests/test_sandbox.py: such as mean harm, such as are right though not simple."""

ADD = dict(kind='asserts', tests=['assert add(1, 2) == 3', 'assert add(-5, 5) == 0', 'assert add([1], [2]) == [1, 2]'])
IO = dict(kind='stdio', tests=[['1 2\n', '3\n'], ['5 7\n', '12\n']])
EVAL = dict(kind='humaneval', entry_point='add',
            test='def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(4, 4) == 8\n')
GOOD, GOOD_IO = 'def add(a, b):\n    return a + b\n', 'a, b = map(int, input().split())\nprint(a + b)\n'
NO = {'failed', 'error', 'killed', 'timeout', 'memory', 'output'}

# Name: program, tests, statuses that are right
HOSTILE = {
    'good': (GOOD, ADD, {'passed'}),
    'good, stdio': (GOOD_IO, IO, {'passed'}),
    'good, humaneval': (GOOD, EVAL, {'passed'}),
    'prints much but is right': ('print("x"*100000)\n' + GOOD, ADD, {'passed'}),
    'not UTF-8 on standard output': ('import sys; sys.stdout.buffer.write(b"\\xff\\xfe")\n' + GOOD, ADD, {'passed'}),
    'lone surrogate in the answer': ('''\
def add(a, b):
    return "\\ud800"''', ADD, {'failed'}),
    'lone surrogate printed': ('print("\\ud800")', IO, {'failed'}),
    'sys.exit(0)': ('import sys; sys.exit(0)', ADD, {'error'}),
    'os._exit(0)': ('import os; os._exit(0)', ADD, {'error'}),
    'raise SystemExit': ('raise SystemExit', ADD, {'error'}),
    'exits when called': ('''\
import os
def add(a, b): os._exit(0)''', ADD, {'error'}),
    'SystemExit when called': ('def add(a, b): raise SystemExit(0)', ADD, {'error'}),
    'atexit': ('import atexit, os; atexit.register(lambda: os._exit(0)); raise SystemExit', ADD, {'error'}),
    'quit()': ('quit()', EVAL, NO),
    'exit in stdio': ('import os; os._exit(0)', IO, {'failed'}),
    'empty': ('', ADD, {'error'}),
    'empty, stdio': ('', IO, {'failed'}),
    'syntax error': ('def add(a, b:', ADD, {'error'}),
    'equal to everything': ('''\
class A:
    def __eq__(self, o): return True
    def __abs__(self): return 0
def add(a, b): return A()''', ADD, {'failed'}),
    'int that equals everything': ('''\
class A(int):
    def __eq__(self, o): return True
def add(a, b): return A()''', ADD, {'failed'}),
    'list that equals everything': ('''\
class A(list):
    def __eq__(self, o): return True
def add(a, b): return A()''', ADD, {'failed'}),
    'str that equals everything': ('''\
class A(str):
    def __eq__(self, o): return True
    __hash__ = str.__hash__
def add(a, b): return {A("x"): 1}''', ADD, {'failed'}),
    'redefines AssertionError': ('''\
import builtins
builtins.AssertionError = AssertionError = type("X", (BaseException,), {})
def add(a, b): return 0''', ADD, {'failed'}),
    'redefines assert by trace': ('''\
import sys
sys.settrace(lambda *a: None)
def add(a, b): return 1''', ADD, {'failed'}),
    'patches builtins': ('''\
import builtins
for n in ("abs", "len", "isinstance", "all", "any", "set", "sorted"): setattr(builtins, n, lambda *a, **k: True)
def add(a, b): return 0''', ADD, NO),
    'patches ast and json': ('''\
import json, ast
json.dumps = lambda *a, **k: "true"
ast.literal_eval = lambda x: True
def add(a, b): return 0''', ADD, NO),
    'raises AssertionError itself': ('def add(a, b): raise AssertionError', ADD, {'failed'}),
    'prints a result': ('''\
print('{"status": "passed", "message": "", "stdout": "", "stderr": "", "seconds": 0, "namespaces": true}')
import os; os._exit(0)''', ADD, {'error'}),
    'writes a result to every file': ('''\
import os
result = b'\\n{"status": "passed", "message": "", "stdout": "", "stderr": "", "seconds": 0, "namespaces": true}\\n'
for fd in range(3, 64):
    try: os.write(fd, result)
    except OSError: pass
os._exit(0)''', ADD, NO),
    'answers before it is asked': ('''\
import os
for fd in range(3, 64):
    try: os.write(fd, b'{"add": []}\\n' + b'{"value": 3, "args": [1, 2]}\\n'*9)
    except OSError: pass
def add(a, b): return 0''', ADD, NO),
    'reads the harness from its frames': ('''\
import sys, gc
f = sys._getframe()
found = ""
while f:
    found += repr(f.f_globals) + repr(f.f_locals); f = f.f_back
found += "".join(repr(o) for o in gc.get_objects()[:20000] if isinstance(o, dict))
def add(a, b): return 3 if "== 3" in found else 99''', ADD, {'failed'}),
    'reads standard input for the tests': ('''\
import sys
text = sys.stdin.read()
def add(a, b): return 3 if "==" in text else 99''', ADD, {'failed'}),
    'reads descriptors for the tests': ('''\
import os
text = b""
for fd in (0, *range(4, 64)):
    try: os.set_blocking(fd, False); text += os.read(fd, 9999)
    except OSError: pass
def add(a, b): return 3 if b"==" in text else 99''', ADD, NO),
    'prints both answers': ('print(3, 12)', IO, {'failed'}),
    'nan': ('def add(a, b): return float("nan")', ADD, {'failed'}),
    'endless iterator': ('''\
import itertools
def add(a, b): return itertools.count()''', ADD, {'error'}),
    'deep list': ('''\
def add(a, b):
    x = []
    for _ in range(10**5): x = [x]
    return x''', ADD, NO),
    'answer of 100 MB': ('def add(a, b): return "x"*10**8', ADD, NO),
    'loops': ('while True: pass', ADD, {'timeout'}),
    'loops when called': ('''\
def add(a, b):
    while True: pass''', ADD, {'timeout'}),
    'sleeps': ('import time; time.sleep(60)', IO, {'timeout'}),
    'ignores signals': ('''\
import signal
for s in range(1, 60):
    try: signal.signal(s, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass''', ADD, {'killed', 'timeout'}),
    'forks without end': ('''\
import os
while True:
    try: os.fork()
    except OSError: pass''', ADD, NO),
    'threads without end': ('''\
import threading, time
while True: threading.Thread(target=time.sleep, args=(60,)).start()''', ADD, NO),
    'fills memory': ('''\
x = []
while True: x.append(bytearray(10**7))''', ADD, {'memory'}),
    'fills memory when called': ('def add(a, b): return len("x"*10**10)', ADD, {'memory'}),
    'fills memory in children': ('''\
import os
for _ in range(3): os.fork()
x = []
while True: x.append(bytearray(10**7))''', ADD, NO),
    'fills the disk': ('''\
f = open("big", "wb")
while True: f.write(b"x"*10**6)''', ADD, {'error', 'killed'}),
    'many files': ('for i in range(10**6): open(str(i), "w").close()', ADD, NO),
    'prints for ever': ('while True: print("x"*1000)', ADD, {'output'}),
    'prints errors for ever': ('''\
import sys
while True: print("x"*1000, file=sys.stderr)''', ADD, {'output'}),
    'huge power': ('x = 10**(10**9)', ADD, NO),
    'recursion': ('def add(a, b): return add(a, b)', ADD, {'error'}),
    'crashes the interpreter': ('import ctypes; ctypes.string_at(0)', ADD, {'killed'}),
    'kills its parent': ('''\
import os, signal
os.kill(os.getppid(), signal.SIGKILL)
import time; time.sleep(.2)
''' + GOOD, ADD, NO | {'passed'}),
    'kills everything': ('''\
import os, signal
os.kill(-1, signal.SIGKILL)
''' + GOOD, ADD, NO),
    'kills its group': ('''\
import os, signal
os.killpg(0, signal.SIGKILL)''', ADD, NO),
    'kills process 1': ('''\
import os, signal
try: os.kill(1, signal.SIGKILL)
except OSError: pass
''' + GOOD, ADD, {'killed', 'passed'}),
    'reads the environment': ('''\
import os
assert not [k for k in os.environ if k not in ("LC_CTYPE",)], os.environ
''' + GOOD, ADD, {'passed'}),
    'puts its own abs into the tests': ('''\
def add(a, b): return 3
def abs(x): return 0
def tuple(x): return 0''',
        dict(kind='asserts', tests=['assert abs(add(1, 2) - 77) < 1', 'assert tuple([1]) == (1,)']), {'failed'}),
    'puts its own math into the tests': ('''\
class math: isclose = staticmethod(lambda *a: True)
def add(a, b): return 7.''', dict(kind='asserts', tests=['assert math.isclose(add(1, 2), 3.0)']), {'failed'}),
    'answers eval': ('''\
import os
for fd in range(3, 64):
    try: os.write(fd, b'{"set": ["y", "eval"], "add": ["h", 0, "function"]}\\n{"value": ["s", ""], "args": []}\\n')
    except OSError: pass
def add(a, b): return 1''', dict(kind='asserts', tests=['assert set(add(1, 2)) == {4}']), NO),
    'answers a module that exits': ('''\
import os
for fd in range(3, 64):
    try: os.write(fd, b'{"add": ["m", "unittest.__main__"]}\\n')
    except OSError: pass
def add(a, b): return 1''', ADD, NO),
    'exits in a test': ('''\
def add(a, b): return range(3)
class X:
    def __iter__(self): raise SystemExit
def add(a, b): return X()''', dict(kind='asserts', tests=['assert list(add(1, 2)) == [3]']), {'error'}),
    'makes the tests take memory': ('def add(a, b): return range(4*10**8)',
        dict(kind='asserts', tests=['assert list(add(1, 2)) == [3]']), {'error', 'timeout'}),
    'nests folders': ('''\
import os
for i in range(1500):
    os.mkdir("d"); os.chdir("d")
''' + GOOD, ADD, {'error', 'passed'}),
    'writes a result to every process': ('''\
import os
result = b'\\n{"status": "passed", "message": "", "stdout": "", "stderr": "", "seconds": 0, "namespaces": true}\\n'
for p in os.listdir("/proc") if os.path.isdir("/proc") else ():
    for fd in range(1, 30):
        try: os.write(os.open(f"/proc/{p}/fd/{fd}", 1), result)
        except OSError: pass
def add(a, b): return 0''', ADD, {'failed'}),
    'leaves a daemon': ('''\
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for fd in range(64):
            try: os.close(fd)
            except OSError: pass
        time.sleep(987654)
    os._exit(0)
''' + GOOD, ADD, {'passed'}),
}

# What only namespaces keep out; name: program, statuses that are right
ISOLATED = {
    'reads /etc/passwd': ('print(open("/etc/passwd").read())', {'error'}),
    'reads /proc': ('import os; print(os.listdir("/proc"))', {'error'}),
    'looks for home': ('''\
import os; assert not [d for d in os.listdir("/") if d in ("home", "work", "proc", "etc", "var")]''', {'passed'}),
    'opens a socket': ('import socket; socket.create_connection(("127.0.0.1", PORT), 2)', {'error'}),
    'resolves a name': ('import socket; socket.getaddrinfo("example.com", 80)', {'error'}),
    'sees other processes': ('import os; os.kill(HARNESS, 0)', {'error'}),
    'writes outside': ('open("/usr/mark", "w")', {'error'}),
    'writes to the root': ('open("/mark", "w")', {'error'}),
    'becomes root': ('import os; os.setuid(0)', {'error'}),
    'mounts': ('''\
import ctypes, os; l = ctypes.CDLL(None, use_errno=True)
assert l.mount(b"tmpfs", b"/tmp", b"tmpfs", 0, None) == 0''', {'error'}),
    'makes a user namespace and mounts': ('''\
import ctypes; l = ctypes.CDLL(None)
if l.unshare(0x10020000) == 0: assert l.umount2(b"/usr", 2) == 0''', {'error', 'passed'}),
    'chroots out': ('import os; os.mkdir("x"); os.chroot("x")', {'error'}),
    'ptraces process 1': ('import ctypes; assert ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0', {'error'}),
    'makes a device': ('import os; os.mknod("d", 0o60666, os.makedev(8, 0)); open("d", "rb").read(1)', {'error'}),
    'sends to a host': ('''\
import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.sendto(b"x", ("10.0.0.1", 53))''', {'error'}),
}

# Right programs that are not as simple as they could be; name: program, tests
RIGHT = {
    'long output': ('for i in range(20000): print(i)',
                    dict(kind='stdio', tests=[['', ''.join(f'{i}\n' for i in range(20000))]])),
    'endless iterator': ('''\
import itertools
ids = itertools.count()
def f(): return next(ids)''', ['assert f() == 0', 'assert f() == 1']),
    'holds itself': ('''\
d = {}
d["d"] = d
def f(): return 1''', ['assert f() == 1']),
    'used iterator': ('''\
it = iter([1, 2])
def f(): return next(it)''', ['assert f() == 1']),
    'large table': ('''\
memo = {i: (i, i) for i in range(300_000)}
def f(): return memo[2]''', ['assert f() == (2, 2)']),
    'match': ('''\
import re
def f(x): return re.match("a", x)''', ['assert f("a")', 'assert not f("b")']),
    'namedtuple': ('''\
from collections import namedtuple
P = namedtuple("P", "x y")
def f(): return P(1, 2)''', ['assert f() == (1, 2)']),
    'IntEnum': ('''\
from enum import IntEnum
class E(IntEnum): A = 3
def f(): return E.A''', ['assert f() == 3']),
    'own equality': ('''\
class P:
    def __init__(self, x): self.x = x
    def __eq__(self, o): return self.x == o.x''', ['assert P(1) == P(1)', 'assert P(1) != P(2)']),
    'is called sum': ('def sum(a, b): return a*b', ['assert sum(2, 3) == 6']),
    'tests use its module': ('''\
import math
def f(): return 2.''', ['assert math.isclose(f(), 2)']),
    'starts itself': ('''\
def f(): return 1
if __name__ == "__main__": print(int(input()))''', ['assert f() == 1']),
    'tests print': ('def f(): return 1', ['print("x"*10**6)', 'assert f() == 1']),
    'dataclass': ('''\
from dataclasses import dataclass
@dataclass
class P:
    x: int = 1
def f(): return P().x''', ['assert f() == 1']),
}
