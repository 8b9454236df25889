"""Programs that mean harm, each with the result it must get; afterwards nothing of them is left.

With namespaces and without; the programs are in sandbox_programs.py.
"""
import json, os, re, shutil, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil, pytest

from sandbox_programs import ADD, GOOD, GOOD_IO, HOSTILE, ISOLATED, RIGHT
from weighted_mtp import sandbox
from weighted_mtp.config import UserError
from weighted_mtp.sandbox import protections, run_program, run_tests, run_tests_batch

SHARED = Path(__file__).resolve().parent.parent.parent/'shared/data'
real_data = pytest.mark.skipif(not SHARED.is_dir(), reason=f'{SHARED} is not there')

LIBC = 'import ctypes, os, time\nlibc = ctypes.CDLL(None)\n'
DAEMON = """import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork(): os._exit(0)
    while True: """
KEYCTL = {'aarch64': 217}.get(os.uname().machine, 248) # add_key; keyctl comes two later
LEAVES = """
## files
for f in ("mark", "/tmp/mark", "/var/tmp/mark", "/dev/shm/mark"):
    try: open(f, "w").write("x")
    except OSError: pass
## many files
for i in range(3000): open(str(i), "w").close()
## a full disk
f = open("mark", "wb")
while True: f.write(bytes(10**6))
## folders nobody may enter
import os
os.makedirs("mark/a/b"); open("mark/a/f", "w").close()
os.chmod("mark/a", 0); os.chmod("mark", 0); os.chmod(".", 0)
## its folder renamed
import os
os.rename(os.getcwd(), os.getcwd() + "mark")
## its folder a link
import os
os.symlink("/", "mark")
os.rmdir(os.getcwd())
## shared memory
LIBC
assert libc.shmget(4242, 4096, 0o1666) >= 0
## a semaphore
LIBC
assert libc.semget(4242, 1, 0o1666) >= 0
## a message queue
LIBC
q = libc.msgget(4242, 0o1666); assert q >= 0
libc.msgsnd(q, b"1234567890", 2, 0)
## a POSIX queue
LIBC
libc.mq_open(b"/mark", 0o102, 0o666, None)
## a POSIX semaphore
LIBC
libc.sem_open(b"/mark", 0o100, 0o666, 1)
## keys
LIBC
for ring in (-3, -4, -5): libc.syscall(KEYCTL, b"user", b"mark", b"x", 1, ring)
## the keys that outlive it
LIBC
libc.syscall(KEYCTL, b"user", b"mark", b"x", 1, libc.syscall(KEYCTL + 2, 22, -1, -2))
## a daemon that works
DAEMON pass

## a daemon that writes
DAEMON open("/tmp/mark", "a").close(); open("mark", "a").close()

## a daemon that prints
DAEMON os.write(1, b"mark"); os.write(2, b"mark"); time.sleep(.001)

## a daemon that listens
DAEMON import socket; s = socket.socket(socket.AF_UNIX); s.bind("\\0mark"); s.listen(); time.sleep(99)

## a daemon that kills
DAEMON os.kill(-1, 9)

## a stopped child
import os, signal
if os.fork() == 0: os.kill(os.getpid(), signal.SIGSTOP)
## orphans
import os, time
for i in range(12):
    if os.fork() == 0: time.sleep(99)
## niceness
import os
P = os.PRIO_PROCESS
for what, who in ((P, os.getppid()), (os.PRIO_USER, os.getuid()), (os.PRIO_PGRP, 0), (P, 1)):
    try: os.setpriority(what, who, 19)
    except OSError: pass
## one core
import os
for p in (0, 1, os.getppid()):
    try: os.sched_setaffinity(p, {0}); os.sched_setscheduler(p, os.SCHED_IDLE, os.sched_param(0))
    except OSError: pass
## limits
import os, resource as r
for p in (0, 1, os.getppid()):
    for what in (r.RLIMIT_AS, r.RLIMIT_NOFILE, r.RLIMIT_NPROC, r.RLIMIT_FSIZE, r.RLIMIT_CPU):
        try: r.prlimit(p, what, (1, 1))
        except (OSError, ValueError): pass
## signals
import os, signal
for s in range(1, 60):
    try: signal.signal(s, signal.SIG_IGN)
    except (OSError, ValueError): pass
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 60)); os.umask(0o777)
## signals to its parents
import os, signal
for p in (1, os.getppid()):
    for s in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGALRM, signal.SIGSTOP):
        try: os.kill(p, s)
        except OSError: pass
## changed modules
import builtins, json, os, socket, sys
json.loads = os.fork = socket.recv_fds = builtins.print = builtins.len = None
sys.modules.clear(); builtins.mark = 1
## what memory holds
mark = b"ma" + b"rk"*1000
kept = [bytearray(mark*100) for _ in range(50)]
## closed descriptors
import os
os.closerange(0, 1000)
## open descriptors
import os
for i in range(50): os.open("/dev/null", 0)
## a terminal
import os
os.setsid()
## a host name
import socket
socket.sethostname("mark")
## a new root
import os
os.chroot("/tmp")
## no dumps
LIBC
libc.prctl(4, 1); libc.ptrace(16, os.getppid(), 0, 0); libc.personality(0x0040000)
## a timer
import signal, os
signal.setitimer(signal.ITIMER_REAL, .01)
os.execv("/bin/sleep", ["sleep", "9"])
## descriptors on their way
import socket
a, b = socket.socketpair(socket.AF_UNIX)
socket.send_fds(a, [b"x"], [a.fileno(), b.fileno()])
"""
LEAVES = re.sub('DAEMON (.*)', lambda m: DAEMON + m[1], LEAVES).replace('LIBC', LIBC).replace('KEYCTL', str(KEYCTL))
LEAVES = dict(part.split('\n', 1) for part in LEAVES.split('## ')[1:])

# What a program finds; the same whatever ran before it
PROBE = LIBC + """
import builtins, json, resource, signal, socket, stat, sys
mark = 'ma' + 'rk'
def tried(f, *args):
    try: return f(*args)
    except OSError as e: return e.errno
def alive(p): return tried(os.kill, p, 0) is None
def search(ring): return libc.syscall(KEYCTL + 2, 10, ring, b'user', mark.encode(), 0)
def there(f): return NAMESPACES or mark in f # without namespaces other people's files are there, too
folders = [d for d in ('/tmp', '/var/tmp', '/dev/shm', '/dev/mqueue') if os.path.isdir(d)]
persistent = libc.syscall(KEYCTL + 2, 22, -1, -2)
found = dict(
    folder=os.listdir('.'), mode=oct(os.stat('.').st_mode), root=os.listdir('/') if NAMESPACES else None,
    environment=dict(os.environ), files=[f for d in folders for f in os.listdir(d) if there(f)],
    free=os.statvfs('.').f_bavail if NAMESPACES else None, open=[fd for fd in range(100) if tried(os.fstat, fd) != 9],
    kinds=[stat.S_IFMT(os.fstat(fd).st_mode) for fd in range(3)], limits=[resource.getrlimit(i) for i in range(16)],
    nice=[os.getpriority(os.PRIO_PROCESS, p) for p in (0, os.getppid())], policy=os.sched_getscheduler(0),
    cores=sorted(os.sched_getaffinity(0)), signals=[str(tried(signal.getsignal, s)) for s in range(1, 32)],
    blocked=sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())), pending=sorted(signal.sigpending()),
    timer=signal.getitimer(signal.ITIMER_REAL), umask=os.umask(0o77), host=socket.gethostname(),
    processes=[p for p in range(1, 300) if alive(p)] if NAMESPACES else None, session=os.getsid(0) == os.getpid(),
    memory=[libc.shmget(4242, 0, 0), libc.semget(4242, 0, 0), libc.msgget(4242, 0), libc.mq_open(b'/mark', 0)],
    keys=[search(ring) for ring in (-3, -4, persistent)], modules=sorted(sys.modules), builtins=sorted(dir(builtins)),
    path=sys.path, flags=[libc.prctl(i, 0, 0, 0, 0) for i in (3, 21, 39, 2)], personality=libc.personality(-1),
    busy=time.process_time() > .5)
with socket.socket(socket.AF_UNIX) as s: found['socket'] = tried(s.bind, '\\0' + mark)
if os.fork() == 0: os._exit(0)
found['child'] = os.wait()[1]
print(json.dumps(found))
"""
def probe(namespaces, **kw):
    program = PROBE.replace('NAMESPACES', str(namespaces)).replace('KEYCTL', str(KEYCTL))
    r = run_program(program, namespaces=namespaces, timeout=5, memory_mb=256, **kw)
    assert r.passed and not r.stderr, r
    return json.loads(r.stdout)

def differences(first, found): return {k: (v, found[k]) for k, v in first.items() if found[k] != v}

@pytest.fixture
def own_worker(monkeypatch, request):
    "The worker's files in a folder of their own: tests beside this one run programs, too. Afterwards nothing is left."
    home = Path(tempfile.mkdtemp(prefix='hostile-', dir='/dev/shm' if os.path.isdir('/dev/shm') else None))
    request.addfinalizer(lambda: shutil.rmtree(home))
    worker_file, temp = home/'sandbox_worker.py', home/'temp'
    for file in Path(sandbox._worker_file()).parent.glob('sandbox_*.py'): shutil.copy(file, home)
    temp.mkdir()
    home.chmod(0o711) # Without namespaces a program is another user, who must get into its folder
    monkeypatch.setattr(sandbox, '_worker_file', lambda: str(worker_file))
    monkeypatch.setattr(tempfile, 'tempdir', str(temp))
    def running(word): return [p for p in psutil.process_iter(['cmdline']) if word in ' '.join(p.info['cmdline'] or ())]
    def workers(): return [w for (_, _, file), w in sandbox._idle if file == str(worker_file)]
    yield workers
    for w in workers(): w.process.stdin.close() # as when this process ends
    end = time.time() + 10
    while running(str(worker_file)) and time.time() < end: time.sleep(.05)
    assert not running(str(worker_file)) and not running('987654')
    assert not list(temp.iterdir())
    sandbox.close_workers()

@pytest.mark.parametrize('namespaces', [True, False], ids=['namespaces', 'no namespaces'])
def test_hostile_programs(namespaces, own_worker):
    """One after another in one worker; after each, the next program finds what the first one found."""
    first, wrong = probe(namespaces), {}
    worker, = own_worker()
    for name, (program, tests, right) in HOSTILE.items():
        if own_worker() != [worker]: wrong[name] = 'another worker'; worker, = own_worker()
        r = run_tests(program, tests, timeout=.4 if 'timeout' in right else 30, memory_mb=256, namespaces=namespaces)
        if r.status not in right: wrong[name] = r
        if r.namespaces != namespaces and r.namespaces: wrong[name] = 'namespaces'
        if (found := probe(namespaces)) != first: wrong[name] = differences(first, found)
    for name, program in LEAVES.items():
        if own_worker() != [worker]: wrong[name] = 'another worker'; worker, = own_worker()
        run_program(program, namespaces=namespaces, timeout=.4, memory_mb=256)
        if (found := probe(namespaces)) != first: wrong[name] = differences(first, found)
    assert not wrong, wrong
    assert len(HOSTILE) + len(ISOLATED) + len(LEAVES) > 100

def processes_of(worker): # supervisor, worker, fork server
    found = psutil.Process(worker.process.pid)
    return [found, *found.children(), *found.children()[0].children()][:3]

def kill(worker, which): # one of the three, and with it those that it started
    gone = processes_of(worker)[which:]
    gone[0].kill()
    def alive(p):
        try: return p.is_running() and p.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess: return False
    end = time.time() + 5
    while any(map(alive, gone)) and time.time() < end: time.sleep(.01)

def test_a_worker_that_dies_is_replaced(own_worker):
    """Before a program comes, or while it runs: the program gets its result from the next one."""
    for namespaces in (True, False):
        for which in range(3):
            assert run_program('', namespaces=namespaces).passed
            worker = own_worker()[-1]
            kill(worker, which)
            assert run_program('print(1)', namespaces=namespaces).stdout == '1\n' and worker not in own_worker()
            worker = own_worker()[-1]
            with ThreadPoolExecutor(1) as pool:
                result = pool.submit(run_program, 'import time\ntime.sleep(.3)\nprint(2)', namespaces=namespaces)
                time.sleep(.15)
                kill(worker, which)
            r = result.result()
            assert r.stdout == '2\n' or which and r.error == 'Killed', (namespaces, which, r)

def test_a_program_that_ends_its_worker_each_time(own_worker, monkeypatch):
    def run(self, *args): raise sandbox.WorkerGone('no words')
    monkeypatch.setattr(sandbox.Worker, 'run', run)
    r = run_program('')
    assert (r.status, r.error, r.message) == ('killed', 'Killed', 'the worker is gone: no words')

def test_a_test_that_does_not_end(own_worker, monkeypatch):
    usual = sandbox._limits
    monkeypatch.setattr(sandbox, '_limits', lambda *a: dict(usual(*a), test_seconds=.1))
    r = run_tests(GOOD, dict(kind='asserts', tests=['while True: pass']), timeout=.2)
    assert (r.status, r.error, r.message) == ('timeout', 'TimeoutError', 'a test did not end')
    assert run_tests(GOOD, ADD).passed and len(own_worker()) == 1

def test_a_forked_process_has_workers_of_its_own(own_worker):
    assert run_program('print(1)').passed
    worker, = own_worker()
    if (pid := os.fork()) == 0:
        try: os._exit(not (not own_worker() and run_program('print(2)').stdout == '2\n' and own_worker() != [worker]))
        finally: os._exit(9)
    assert os.waitpid(pid, 0)[1] == 0
    assert run_program('print(3)').stdout == '3\n' and own_worker() == [worker]

USER = """
import sys, tempfile
from weighted_mtp import sandbox
worker_file, tempfile.tempdir = sys.argv[1:]
sandbox._worker_file = lambda: worker_file
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(2) as pool:
    for namespaces in (True, False): print(sandbox.run_program('', namespaces=namespaces).status, flush=True)
    program = 'import os, time\\nos.fork()\\nopen("f", "w").close()\\ntime.sleep(99)'
    for namespaces in (True, False): pool.submit(sandbox.run_program, program, namespaces=namespaces, timeout=60)
"""

def test_workers_end_with_a_parent_that_is_killed(own_worker):
    """The fixture looks for what is left."""
    command = [sys.executable, '-c', USER, sandbox._worker_file(), tempfile.tempdir]
    p = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert [p.stdout.readline() for _ in range(2)] == ['passed\n']*2
    time.sleep(.3)
    running = [q for w in psutil.Process(p.pid).children() for q in w.children(recursive=True)]
    assert len(running) > 8 # with two programs of two processes each
    p.kill(); p.wait(); p.stdout.close()

@pytest.mark.skipif(os.getuid() != 0, reason="only root may look into a worker's memory")
def test_no_test_is_in_the_memory_that_programs_are_forked_from(own_worker):
    secret = 'never to be' + ' seen'
    tests = dict(kind='asserts', tests=[f'assert add("{secret}", "") == "{secret}"'])
    assert all(run_tests(GOOD, tests).passed for _ in range(3))
    def has(process):
        with open(f'/proc/{process.pid}/maps') as f: ranges = [l.split()[0].split('-') for l in f if ' rw' in l]
        with open(f'/proc/{process.pid}/mem', 'rb', 0) as f:
            def read(start, end): f.seek(start); return f.read(end - start)
            return any(secret.encode() in read(int(a, 16), int(b, 16)) for a, b in ranges)
    _, worker, fork_server, *_ = processes_of(own_worker()[0]) # the last program's may be there for a moment
    assert has(worker) and not has(fork_server)

@pytest.mark.parametrize('namespaces', [True, False], ids=['namespaces', 'no namespaces'])
def test_right_programs(namespaces):
    def tests_of(tests): return dict(kind='asserts', tests=tests) if isinstance(tests, list) else tests
    found = {name: run_tests(program, tests_of(tests), namespaces=namespaces)
             for name, (program, tests) in RIGHT.items()}
    assert not {k: r for k, r in found.items() if not r.passed}

ASSERTS = dict(kind='asserts', tests=['assert f(1) == 1', 'assert f(2) == 2, "two"', 'assert f(3) == 3'])
CHECK = 'def check(g):\n    assert g(1) == 1\n    assert g(\n        2) == 2\n'
CHECK = dict(kind='humaneval', test=CHECK, entry_point='f')
STDIO = dict(kind='stdio', tests=[['2', '1'], ['x', '2']])

# A program, its tests (None: it is run), and what the result has to be; `_has`: contained, `lacks`: not in stderr
WORDS = [
    # the six of shared/cases/sandbox_stderr.json
    ('1/0', None, dict(status='error', error='ZeroDivisionError', message='ZeroDivisionError: division by zero',
        stderr='Traceback (most recent call last):\n  File "program.py", line 1, in <module>\n    1/0\n    ~^~\n'
               'ZeroDivisionError: division by zero\n')),
    ('def f(:\n pass', None, dict(status='error', error='SyntaxError', message_has='SyntaxError: invalid syntax',
        stderr='  File "program.py", line 1\n    def f(:\n          ^\nSyntaxError: invalid syntax\n')),
    ('print(input())', None, dict(status='error', error='EOFError', message_has='EOFError')),
    ("import sys\nprint('to stderr', file=sys.stderr)", None,
        dict(status='passed', stderr='to stderr\n', error='', message='')),
    ("import sys\nsys.stderr.write('why'); sys.exit(3)", None,
        dict(status='error', error='SystemExit', message='why')),
    ('import numpy', None, dict(error='ModuleNotFoundError', message="ModuleNotFoundError: No module named 'numpy'")),
    # ways to end
    ("import sys\nprint('out'); sys.exit('text')", None,
        dict(status='error', message='text', stderr='text\n', stdout='out\n')),
    ("import sys\nsys.stdout.write('out'); sys.exit()", None, dict(status='passed', stdout='out')),
    ('import os\nprint("lost?", flush=True); os._exit(4)', None,
        dict(error='SystemExit', message='exit code 4', stdout='lost?\n')),
    ('raise KeyboardInterrupt', None, dict(status='error', error='KeyboardInterrupt', message='KeyboardInterrupt')),
    ('import os\nos.abort()', None, dict(status='killed', error='Killed', message='killed by signal 6 (SIGABRT)')),
    ('import sys\nsys.stderr.write("was here\\n")\nprint(1, flush=True)\nwhile True: pass', None,
        dict(status='timeout', error='TimeoutError', message='timed out after 1 s', stderr='was here\n',
             stdout='1\n')),
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
    ('import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.buffer); print("wrapped")', None,
        dict(stdout='wrapped\n')),
    ('import sys\nsys.stdout.buffer.write(b"bytes"); raise ValueError', None,
        dict(stdout='bytes', message='ValueError')),
    ('f = open(1, "w")\nf.write("kept")', None, dict(status='passed', stdout='kept')),
    ('import sys\nsys.stdout = sys.stderr = None\n1/0', None, dict(error='ZeroDivisionError', stderr_has='line 3')),
    ('import ctypes\nctypes.CDLL(None).printf(b"from C")', None, dict(status='passed', stdout='from C')),
    # what an error says
    ('def f(x):\n    assert x == 3, "not three"\nf(4)', None, dict(error='AssertionError',
        message='AssertionError: not three: assert x == 3, "not three" (line 2)', stderr_has='line 3, in <module>')),
    ('x = 2\nassert (x ==\n        3)', None, dict(message='AssertionError: assert (x == 3) (line 2)')),
    ('try: 1/0\nexcept Exception as e: raise ValueError("a\\nb") from e', None,
        dict(error='ValueError', message='ValueError: a b', stderr_has='The above exception was the direct cause')),
    ('def f(): f()\nf()', None, dict(error='RecursionError', stderr_has='Previous line repeated')),
    ('class E(Exception):\n    def __str__(self): raise SystemExit\nraise E', None,
        dict(error='E', message_has='str() failed')),
    ('class Own(ValueError): pass\nraise Own("no way")', None,
        dict(error='Own', message='Own: no way', stderr_has='\nOwn: no way')),
    ('raise type("x y"*50, (Exception,), {})("odd")', None, dict(error='Exception', message_has='odd')),
    ('raise ExceptionGroup("all", [ValueError(1), TypeError(2)])', None,
        dict(error='ExceptionGroup', stderr_has='TypeError: 2')),
    ('import json\njson.loads("{")', None,
        dict(error='JSONDecodeError', stderr_has='line 2, in <module>\n', lacks='json/decoder')),
    ('if x:\n    pass\n  y', None, dict(error='IndentationError', stderr_has='line 3')),
    ('exec("1/0")', None, dict(stderr_has='File "<string>", line 1')),
    ('raise ValueError("\\ud800")', None, dict(error='ValueError', message='ValueError: ?')),
    ('raise ValueError("x"*100_000)', None,
        dict(error='ValueError', message_has='ValueError: xxx', stderr_has='\n  ...\n')),
    # tests
    ('def f(x):\n    print("said", x)\n    return 1', ASSERTS, dict(status='failed', error='AssertionError', test=2,
        message='test 2: AssertionError: two: assert f(2) == 2, "two"', stdout='said 1\nsaid 2\n', stderr='')),
    ('def f(x):\n    return 6//(3 - x) if x == 3 else x', ASSERTS,
        dict(status='error', error='ZeroDivisionError', test=3, message_has='test 3: ZeroDivisionError: ',
             stderr_has='  File "program.py", line 2, in f\n')),
    ('def f(x):\n    assert x < 2\n    return x', ASSERTS, dict(status='failed', error='AssertionError', test=2,
        message='test 2: AssertionError: assert x < 2 (line 2)', stderr_has='line 2, in f')),
    ('class Own(KeyError): pass\ndef f(x): raise Own("k")', ASSERTS,
        dict(error='Own', test=1, message="test 1: Own: 'k'")),
    ('def f(x): raise UnicodeDecodeError("utf-8", b"a", 0, 1, "bad")', ASSERTS,
        dict(error='UnicodeDecodeError', test=1)),
    ('def f(x):\n    while x == 2: pass\n    return x', ASSERTS,
        dict(error='TimeoutError', test=2, message='test 2: timed out after 1 s')),
    ('import sys\ndef f(x): sys.exit(x - 1)', ASSERTS, dict(status='error', error='SystemExit', test=1)),
    ('def g(): pass', ASSERTS, dict(status='error', error='NameError', test=1)),
    ('def f(x:', ASSERTS, dict(status='error', error='SyntaxError', test=0, stderr_has='line 1')),
    ('def f(x): return h(x)', dict(ASSERTS, setup='import os\n\ndef h(x): return x/(2 - x)'),
        dict(error='ZeroDivisionError', test=2,
             stderr_has='  File "program.py", line 1, in f\n    def f(x): return h(x)\n')),
    ('def f(x): return h', dict(ASSERTS, setup='import os, ('),
        dict(error='SyntaxError', test=0, stderr_has='setup.py')),
    ('def f(x): return 1', CHECK, dict(status='failed', test=2, message='test 2: AssertionError: assert g( 2) == 2')),
    ('def f(x): return x if x == 1 else 1/0', CHECK,
        dict(status='error', error='ZeroDivisionError', test=2, stderr_has='line 1, in f')),
    ('print(int(input())//2)', STDIO,
        dict(status='error', error='ValueError', test=2, message_has='test 2: ValueError: invalid')),
    ('print(1)', STDIO,
        dict(status='failed', error='WrongOutput', test=2, message='test 2: other output than expected')),
    ('print(', STDIO, dict(status='error', error='SyntaxError', test=0)),
    # what the interpreter's start-up adds, and a byte order mark
    ('print(1)\nexit()', STDIO, dict(status='failed', error='WrongOutput', test=2)),
    ('print(1)\nexit()', None, dict(status='passed', stdout='1\n')), ('quit(0)', None, dict(status='passed')),
    ('exit(3)', None, dict(status='error', error='SystemExit', message='exit code 3')),
    ('quit("why")', None, dict(error='SystemExit', message='why')),
    ('def f(x): exit(x - 1)', ASSERTS, dict(status='error', error='SystemExit', test=1)),
    ('\ufeffprint(1)', None, dict(status='passed', stdout='1\n')),
    # a program that has replaced what it takes to describe its end
    ('import builtins\nbuiltins.len = builtins.isinstance = builtins.open = None\n1/0', None,
        dict(message='ZeroDivisionError: division by zero', stderr_has='line 3, in <module>')),
    ('import builtins, sys\nbuiltins.isinstance = None\nsys.exit("why")', None, dict(message='why')),
    # a test that expects an error takes no other end for it
    ('def f(x):\n    while True: pass', dict(kind='asserts', tests=['try: f(1)\nexcept Exception: pass']),
        dict(error='TimeoutError')),
    ('import os\ndef f(x): os._exit(0)', dict(kind='asserts', tests=['try: f(1)\nexcept: pass']),
        dict(error='SystemExit')),
    ('class Own(ValueError): pass\ndef f(x): raise Own("k")',
        dict(kind='asserts', tests=['try: f(1)\nexcept ValueError as e: assert str(e) == "k"']),
        dict(status='passed')),
]

@pytest.mark.parametrize('namespaces', [True, False], ids=['namespaces', 'no namespaces'])
def test_words_of_a_program(namespaces):
    """What a program says, and what became of it, arrives; nothing of the worker's is in it."""
    wrong = []
    for program, tests, right in WORDS:
        limit = 1 if right.get('error') == 'TimeoutError' else 30 # a slow machine takes seconds to fill 256 MB
        r = run_tests(program, tests or dict(kind='script', stdin=''), timeout=limit, memory_mb=256,
                      namespaces=namespaces)
        for key, value in right.items():
            has = getattr(r, key.removesuffix('_has')) if key != 'lacks' else r.stderr
            good = value in has if key.endswith('_has') else value not in has if key == 'lacks' else has == value
            if not good: wrong.append((program, key, value, r))
        if 'sandbox_' in r.stderr or r.passed == bool(r.error) or r.passed and r.test: wrong.append((program, r))
    assert not wrong, wrong

ARRAYS = dict(kind='asserts', tests=[
    'assert total([1, 2]) == 3', 'assert (first(3) == np.arange(3)).all()',
    'a = np.array([3, 1]); order(a); assert a.tolist() == [1, 3]',
    'import numpy\nassert numpy.allclose(first(2), [0, 1])', 'assert list(first(2)) == [0, 1]'])
WITH_NUMPY = """import numpy as np
def total(x): return np.sum(x)
def first(n): return np.arange(n)
def order(a): a.sort()
"""
FORGED_NUMPY = """class T:
    def all(self): return True
    def __eq__(self, other): return self
class np: arange = allclose = lambda *a: T()
first, total = np.arange, lambda x: 3
def order(a): a.sort()
"""

@pytest.mark.parametrize('namespaces', [True, False], ids=['namespaces', 'no namespaces'])
def test_packages(namespaces):
    def run(program, **kw): return run_program(program, namespaces=namespaces, packages=['numpy'], **kw)
    works = run('import numpy as np, numpy.testing\n'
                'print(np.linalg.inv(np.eye(2)*2)[0, 0], np.fft.fft([1, 2])[0].real)\n'
                'print((np.ones((300, 300))@np.ones((300, 300))).sum(), np.random.default_rng(0).integers(9))')
    assert works.stdout == '0.5 3.0\n27000000.0 7\n', works
    assert run('import numpy as np\nnp.ones(10**8)', memory_mb=256).error == 'MemoryError'
    assert run('import numpy as np\nnp.ones(20*10**6)', memory_mb=256).passed # numpy's own memory does not count
    for other in ('torch', 'numpy.nothing', 'pytest'):
        assert run(f'import {other}').message == f"ModuleNotFoundError: No module named '{other}'"
    for tests in (ARRAYS, dict(kind='asserts', tests=['assert np.allclose(first(2), [0, 1])'])):
        assert run_tests(WITH_NUMPY, tests, packages=['numpy'], namespaces=namespaces).passed
        assert not run_tests(FORGED_NUMPY, tests, packages=['numpy'], namespaces=namespaces).passed
    draws = 'import numpy\nprint(numpy.random.rand())'
    drawn = [run_program(draws, namespaces=namespaces, packages=['pandas']) for _ in range(2)]
    assert drawn[0].passed and drawn[0].stdout != drawn[1].stdout # pandas imports numpy.random
    run('import numpy as np\nnp.sum = np.pi = None\nnp.seterr(all="raise")')
    assert run('import numpy as np\nprint(np.sum([1, 2]), np.pi > 3, np.geterr()["over"])').stdout == '3 True warn\n'

def test_packages_that_are_not_there():
    wrong = {'is not installed here': (['numpi'], ['scikit-learn'], ['../numpy'], ['']),
             'a list of names': ('numpy', [3])}
    for why, packages in ((why, p) for why, many in wrong.items() for p in many):
        with pytest.raises(UserError, match=why): sandbox.check_packages(packages)
        with pytest.raises(UserError, match=why): run_tests_batch([('', ADD)], packages=packages)
        with pytest.raises(UserError, match=why): run_program('', packages=packages)
    assert sandbox.check_packages(()) == () and sandbox.check_packages(['json']) == ('json',)

BAD_ARGUMENTS = [
    (lambda: run_program(None), 'A program has to be text, not NoneType'),
    (lambda: run_program('', stdin=None), "tests of kind script: stdin = 'None' has to be text"),
    *((lambda t=t: run_program('', timeout=t), f'timeout = {t!r}') for t in (0, -1, float('inf'), float('nan'), '3')),
    *((lambda m=m: run_program('', memory_mb=m), f'memory_mb = {m!r}') for m in (0, -5, 1.5, None)),
    (lambda: run_program('', packages=None), 'packages = None'), (lambda: run_tests('', None), 'no known kind'),
    (lambda: run_tests('', {}), 'no known kind'), (lambda: run_tests('', dict(kind='assert')), 'no known kind'),
    (lambda: run_tests('', dict(kind='asserts')), 'asserts: tests = '),
    (lambda: run_tests('', dict(kind='asserts', tests=[])), 'one or more statements'),
    (lambda: run_tests('', dict(kind='asserts', tests='assert 1')), 'one or more statements'),
    (lambda: run_tests('', dict(ADD, setup=5)), 'setup = '),
    (lambda: run_tests('', dict(kind='stdio', tests=[['1']])), 'pairs of input and output'),
    (lambda: run_tests('', dict(kind='humaneval', test='')), 'entry_point'),
    (lambda: run_tests_batch([], workers=-1), 'workers = -1')]

def test_arguments_that_cannot_be():
    "None of them reaches a worker, and none passes."
    for i, (call, words) in enumerate(BAD_ARGUMENTS):
        with pytest.raises(UserError) as e: call()
        assert words in str(e.value), (i, str(e.value))

def test_a_long_input_takes_time_in_proportion():
    "It came in pieces of 64 KB, and each was added to a copy of all before it: 50 MB took longer than the limit."
    r = run_program('import sys\nprint(len(sys.stdin.read()))', stdin='x'*30_000_000, timeout=5)
    assert (r.status, r.stdout) == ('passed', '30000000\n'), r

@pytest.mark.skipif(not protections()['files'], reason='this kernel gives no namespaces')
def test_namespaces():
    import socket
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0)); s.listen()
        wrong = {}
        for name, (program, right) in ISOLATED.items():
            program = program.replace('PORT', str(s.getsockname()[1])).replace('HARNESS', str(os.getpid()))
            r = run_program(program, timeout=5)
            if r.status not in right: wrong[name] = r
        assert not wrong, wrong

def test_same_results_in_a_crowd():
    """Hostile ones beside good ones: results in order, none disturbed."""
    jobs = [(p, t) for p, t, _ in list(HOSTILE.values())[:30]]*2 + [(GOOD, ADD)]*20
    found = run_tests_batch(jobs, workers=8, timeout=5)
    assert [r.status for r in found[-20:]] == ['passed']*20
    for r, (_, _, right) in zip(found, list(HOSTILE.values())[:30]*2): assert r.status in right, r

def test_many_trivial_programs():
    start = time.time()
    assert all(r.passed for r in run_tests_batch([(GOOD_IO, dict(kind='stdio', tests=[['1 2', '3']]))]*100))
    print(f'100 programs in {time.time()-start:.1f} s')

@real_data
def test_reference_solutions_of_mbpp():
    """The data's README: 974 of 974 pass."""
    rows = [json.loads(l) for l in (SHARED/'mbpp/mbpp.jsonl').read_text().splitlines()]
    if 'WMTP_ALL' not in os.environ: rows = rows[::10]
    def tests_of(r): return [r['test_setup_code'].replace('\r\n', '\n'), *r['test_list'], *r['challenge_test_list']]
    jobs = [(r['code'].replace('\r\n', '\n'), dict(kind='asserts', tests=tests_of(r))) for r in rows]
    start = time.time()
    found = run_tests_batch(jobs)
    wrong = [(r['task_id'], f) for r, f in zip(rows, found) if not f.passed]
    assert not wrong, wrong
    print(f'{len(rows)} in {time.time()-start:.1f} s')
    assert not any(f.passed for f in run_tests_batch([('', t) for _, t in jobs]))
