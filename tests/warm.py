"""Python processes that start in a moment: forked from one that has already imported what a training process imports,
which takes longer than these tests train.

They are processes of their own in every other way: with a folder, an environment, files and a process number, they can
be killed, and end by their own exit code. What they share is the interpreter's hash seed: `of=1` asks a second
interpreter, with another one. Where the start itself is tested, tests start `sys.executable`.
"""
import atexit, ctypes, json, os, runpy, signal, socket, struct, subprocess, sys, tempfile, threading, time
from functools import lru_cache
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent

# ---- in the prepared interpreter

def _wait_for_work(path):
    "Fork for every request; returns in the forked process alone."
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f'{path}-')
        listener.listen()
        os.rename(f'{path}-', path)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0: break
            connection.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return _fork_and_report(connection)

def _fork_and_report(connection): # this process waits for the one that does the work
    text, fds, _, _ = socket.recv_fds(connection, 1 << 20, 2)
    size, = struct.unpack('I', text[:4])
    text = text[4:]
    while len(text) < size: text += connection.recv(1 << 20)
    if (pid := os.fork()) == 0:
        connection.close()
        for i, fd in enumerate(fds, 1): os.dup2(fd, i)
        for fd in fds: os.close(fd)
        return json.loads(text)
    for fd in fds: os.close(fd)
    connection.sendall(struct.pack('i', pid))
    _, status = os.waitpid(pid, 0)
    connection.sendall(struct.pack('i', os.waitstatus_to_exitcode(status)))
    os._exit(0)

def _work(words, cwd, env): # as `python WORDS` would
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if words[0] == '-m':
        sys.argv, sys.path[0] = words[1:], cwd
        return runpy.run_module(words[1], run_name='__main__', alter_sys=True)
    if words[0] == '-c':
        sys.argv, sys.path[0] = ['-c', *words[2:]], ''
        main = sys.modules['__main__'] = type(sys)('__main__')
        return exec(compile(words[1], '<string>', 'exec'), main.__dict__)
    sys.argv, sys.path[0] = list(words), str(Path(words[0]).parent)
    return runpy.run_path(words[0], run_name='__main__')

# ---- in the tests

@lru_cache(None)
def _interpreter(number): # its socket
    path = f'{tempfile.mkdtemp(prefix="warm-")}/socket'
    env = {**os.environ, 'PYTHONPATH': str(REPO), 'PYTHONHASHSEED': str(number), 'OMP_NUM_THREADS': '1'}
    p = subprocess.Popen([sys.executable, __file__, path, str(os.getpid())], env=env, cwd='/', stdin=subprocess.DEVNULL)
    atexit.register(p.kill)
    while not os.path.exists(path):
        assert p.poll() is None, 'the prepared interpreter did not start'
        time.sleep(.02)
    return path

class Process:
    "A Python program under way: the part of `subprocess.Popen` that tests use. What it prints is kept until it ends."
    def __init__(self, words, cwd, env, of=0):
        assert words[0] == sys.executable
        self.args, self.returncode = words, None
        self._printed = [tempfile.TemporaryFile('w+', encoding='utf-8') for _ in range(2)]
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(_interpreter(of))
        text = json.dumps(dict(words=[str(w) for w in words[1:]], cwd=str(cwd), env=env)).encode()
        socket.send_fds(self._connection, [struct.pack('I', len(text))], [f.fileno() for f in self._printed])
        self._connection.sendall(text)
        self.pid, = struct.unpack('i', self._connection.recv(4))

    def wait(self, timeout=None): # its exit code, as `subprocess` counts them
        self._connection.settimeout(timeout)
        try:
            if self.returncode is None: self.returncode, = struct.unpack('i', self._connection.recv(4))
        except (TimeoutError, BlockingIOError): raise subprocess.TimeoutExpired(self.args, timeout) from None
        return self.returncode

    def poll(self):
        try: return self.wait(0)
        except subprocess.TimeoutExpired: return None

    def communicate(self, timeout=None): # (stdout, stderr)
        self.wait(timeout)
        for f in self._printed: f.seek(0)
        return tuple(f.read() for f in self._printed)

    def send_signal(self, number):
        if self.poll() is None: os.kill(self.pid, number)
    def terminate(self): self.send_signal(signal.SIGTERM)
    def kill(self): self.send_signal(signal.SIGKILL)

def run(words, cwd, env, timeout=300): # as `subprocess.run` with `capture_output` and `text`
    p = Process(words, cwd, env)
    try: out, err = p.communicate(timeout)
    except subprocess.TimeoutExpired: p.kill(); raise
    return subprocess.CompletedProcess(words, p.returncode, out, err)

if __name__ == '__main__':
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0) # ends with the tests
    if os.getppid() != int(sys.argv[2]): sys.exit()
    import weighted_mtp.critic, weighted_mtp.evaluation, weighted_mtp.policies # noqa: E401, F401
    import weighted_mtp.remote, weighted_mtp.synthetic # noqa: E401, F401
    import mlflow.tracking # noqa: F401 (imported only when it is needed)
    assert threading.active_count() == 1, 'a thread does not survive a fork'
    _work(**_wait_for_work(sys.argv[1]))
