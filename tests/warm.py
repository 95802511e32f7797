"""Processes that need not import: a server has imported the heavy libraries once, and `Popen` and `run` of this module ask it to fork instead of starting from nothing, which costs five seconds of a core.

A child has the code, words, environment, folder and descriptors that a started one would have, and `vidlab` from the folder that its PYTHONPATH names first. That commands start from nothing is seen
elsewhere, with `subprocess`: by `test_cli.py`, `test_light.py`, `test_package.py` and one test of each other kind. Of a run in processes: `monkeypatch.setattr('vidlab.train.subprocess', warm)`.

A fork of what has imported so much is safe on Linux alone; elsewhere `Popen` and `run` are those of `subprocess`."""
import atexit, functools, gc, importlib, json, os, select, signal, socket, struct, subprocess, sys, tempfile, threading, time, weakref
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT, CompletedProcess, TimeoutExpired      # noqa: F401 so that this module can stand where `subprocess` stands

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = ('vidlab.train vidlab.results vidlab.explain vidlab.tinyclip vidlab.models vidlab.tasks vidlab.data.sets vidlab.data.transforms vidlab.ready '
            'open_clip timm.utils timm.optim torchvision.transforms.v2 safetensors.torch av pandas nbdev.test accelerate torchmetrics scipy.stats scipy.sparse.csgraph '
            'matplotlib.pyplot matplotlib_inline.config').split()
PLACE = 'VIDLAB_WARM'                                           # the server's address, for those that its children start


# -- the server: a process of one thread, so no lock is held by a thread that a child does not have
def serve(listener, lifeline):
    "Fork a child for each request and tell how it ended; comes back in the children, with the request, and ends with the process that started it"
    assert len(os.listdir('/proc/self/task')) == 1, 'an import has started threads'
    heard, wake = os.pipe()
    for fd in (heard, wake): os.set_blocking(fd, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    living = {}                                                 # pid -> who wants to hear of its end
    while True:
        ready = select.select([listener, lifeline, heard], [], [])[0]
        if lifeline in ready: os._exit(0)
        if listener in ready:
            asking = listener.accept()[0]
            head, fds, *_ = socket.recv_fds(asking, 8, 3)
            request = json.loads(_exactly(asking, struct.unpack('q', head)[0]))
            if not (pid := os.fork()):
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for i, fd in enumerate(fds): os.dup2(fd, i)
                for fd in (heard, wake, *fds): os.close(fd)
                for s in (listener, lifeline, asking, *living.values()): s.close()
                return request
            living[pid] = asking
            for fd in fds: os.close(fd)
            asking.sendall(struct.pack('q', pid))
        try: os.read(heard, 4096)
        except BlockingIOError: pass
        while living and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            with living.pop(ended[0]) as s:
                try: s.sendall(struct.pack('q', ended[1]))
                except OSError: pass                            # nobody asks any more

def _exactly(sock, n):
    data = b''
    while len(data) < n and (more := sock.recv(n - len(data))): data += more
    return data

def become(words, env, cwd, session):
    "What `python WORDS` does"
    import runpy, types
    if session: os.setsid()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    how, *rest = words
    path = [p for p in env.get('PYTHONPATH', '').split(os.pathsep) if p]
    sys.path[0] = '' if how == '-c' else cwd if how == '-m' else str(Path(how).resolve().parent)
    sys.path[1:1] = path
    if other := [p for p in path if (Path(p)/'vidlab').exists()][:1]:
        if Path(other[0]).resolve() != ROOT:
            for m in [m for m in sys.modules if m.partition('.')[0] == 'vidlab']: del sys.modules[m]
    for p in path:
        if (Path(p)/'sitecustomize.py').exists(): runpy.run_path(str(Path(p)/'sitecustomize.py'))
    if how == '-m':
        sys.modules.pop(rest[0], None)                          # it is `__main__` now
        sys.argv = rest
        return runpy.run_module(rest[0], run_name='__main__', alter_sys=True)
    sys.argv = ['-c', *rest[1:]] if how == '-c' else words
    if how != '-c': return runpy.run_path(how, run_name='__main__')
    main = sys.modules['__main__'] = types.ModuleType('__main__')
    exec(compile(rest[0], '<string>', 'exec'), main.__dict__)

def finish(request):
    "Run, then end as an interpreter ends, but for taking down all that is imported, which costs half a second of a core"
    code = 0
    try: become(**request)
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if not isinstance(e.code, int | None): print(e.code, file=sys.stderr)
    except BaseException as e:
        sys.excepthook(type(e), e, e.__traceback__)
        code = -signal.SIGINT if isinstance(e, KeyboardInterrupt) else 1
    threading._shutdown()                                       # threads that are no daemons end by themselves
    atexit._run_exitfuncs()
    for f in (sys.stdout, sys.stderr):
        try: f.flush()
        except (OSError, ValueError): code = code or 120        # nobody reads it; Python ends with this number, too
    if code >= 0: os._exit(code & 255)
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)


# -- the client
@functools.lru_cache
def server() -> str: # its address
    "The server that this process asks: the one of those that started it, or its own, made when it is first needed"
    if PLACE in os.environ: return os.environ[PLACE]
    where = tempfile.TemporaryDirectory(prefix='warm-')
    place = f'{where.name}/socket'
    mine, its = socket.socketpair()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(place)
    listener.listen(64)
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'JE_ARROW_MALLOC_CONF': 'background_thread:false'}       # pyarrow's allocator would start a thread
    fds = [listener.fileno(), its.fileno()]
    p = subprocess.Popen([sys.executable, __file__, *map(str, fds)], pass_fds=fds, env=env, cwd=ROOT, stdin=DEVNULL, start_new_session=True)
    listener.close(), its.close()
    def end(me=os.getpid()):
        if os.getpid() != me: return
        mine.close()
        p.wait()
        where.cleanup()
    atexit.register(end)
    return place

class Forked:
    "As `subprocess.Popen` for a command that begins with this Python"
    def __init__(self, args, stdin=None, stdout=None, stderr=None, env=None, cwd=None, text=False, start_new_session=False):
        self.args, self.returncode, theirs = [str(a) for a in args], None, []
        assert self.args[0] == sys.executable, args
        def end(asked, fd, mode): # -> our end of a pipe or None, the child's descriptor
            if asked is None: return None, fd
            if asked == DEVNULL: theirs.append(os.open(os.devnull, os.O_RDWR)); return None, theirs[-1]
            if asked != PIPE: return None, asked if isinstance(asked, int) else asked.fileno()
            r, w = os.pipe()
            theirs.append(w if fd else r)
            return os.fdopen(r if fd else w, mode + 'b'*(not text)), theirs[-1]
        self.stdin, into = end(stdin, 0, 'w')
        self.stdout, out = end(stdout, 1, 'r')
        self.stderr, err = (None, out) if stderr == STDOUT else end(stderr, 2, 'r')
        place = server()
        env = {**(os.environ if env is None else env), PLACE: place}
        request = json.dumps(dict(words=self.args[1:], env=env, cwd=str(cwd or os.getcwd()), session=start_new_session)).encode()
        self._told = socket.socket(socket.AF_UNIX)
        self._told.connect(place)
        socket.send_fds(self._told, [struct.pack('q', len(request))], [into, out, err])
        self._told.sendall(request)
        said = _exactly(self._told, 8)
        for fd in theirs: os.close(fd)
        if not said: raise RuntimeError('the server of tests/warm.py ended before it had a child; what it said stands above')
        self.pid, = struct.unpack('q', said)

    def wait(self, timeout=None):
        if self.returncode is None:
            if not select.select([self._told], [], [], timeout)[0]: raise TimeoutExpired(self.args, timeout)
            with self._told: said = _exactly(self._told, 8)
            self.returncode = os.waitstatus_to_exitcode(struct.unpack('q', said)[0]) if said else -signal.SIGKILL
        return self.returncode

    def poll(self):
        try: return self.wait(0)
        except TimeoutExpired: return None

    def communicate(self, input=None, timeout=None): # -> stdout, stderr
        until, got = None if timeout is None else time.time() + timeout, {}
        left = lambda: None if until is None else max(0., until - time.time())
        def read(name): got[name] = getattr(self, name).read()
        threads = [threading.Thread(target=read, args=[n], daemon=True) for n in ('stdout', 'stderr') if getattr(self, n)]
        for t in threads: t.start()
        if self.stdin:
            if input: self.stdin.write(input)
            self.stdin.close()
        for t in threads:
            t.join(left())
            if t.is_alive(): raise TimeoutExpired(self.args, timeout)
        self.wait(left())
        return got.get('stdout'), got.get('stderr')

    def send_signal(self, sig):
        if self.poll() is None: os.kill(self.pid, sig)

    def terminate(self): self.send_signal(signal.SIGTERM)

    def kill(self): self.send_signal(signal.SIGKILL)

    def __enter__(self): return self

    def __exit__(self, *_):
        for f in (self.stdin, self.stdout, self.stderr):
            if f: f.close()
        self.wait()

def run_forked(args, capture_output=False, timeout=None, check=False, input=None, **kw) -> CompletedProcess:
    "As `subprocess.run`"
    if capture_output: kw |= dict(stdout=PIPE, stderr=PIPE)
    if input is not None: kw |= dict(stdin=PIPE)
    with Forked(args, **kw) as p:
        try: out, err = p.communicate(input, timeout)
        except BaseException:
            p.kill()
            raise
    if check and p.returncode: raise subprocess.CalledProcessError(p.returncode, p.args, out, err)
    return CompletedProcess(p.args, p.returncode, out, err)

Popen, run = (Forked, run_forked) if sys.platform == 'linux' else (subprocess.Popen, subprocess.run)

def ranks(args, n=2, timeout=300, **env) -> list: # what each said
    "The processes of one job, as a launcher starts them; raises with what they said unless all succeed"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]), 'WORLD_SIZE': str(n), 'LOCAL_WORLD_SIZE': str(n), 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port),
           'ACCELERATE_USE_CPU': 'true', **env}
    procs = [Popen([sys.executable, *(str(a).format(rank=r) for a in args)], env=dict(env, RANK=str(r), LOCAL_RANK=str(r)), stdout=PIPE, stderr=STDOUT, text=True) for r in range(n)]
    try: logs = [p.communicate(timeout=timeout)[0] for p in procs]
    finally:
        for p in procs: p.kill()
    assert all(p.returncode == 0 for p in procs), '\n'.join(f'--- process {r}, exit code {p.returncode}\n{log}' for r, (p, log) in enumerate(zip(procs, logs)))
    return logs


if __name__ == '__main__':
    listener, lifeline = (socket.socket(fileno=int(fd)) for fd in sys.argv[1:])
    if lifeline in select.select([listener, lifeline], [], [])[0]: os._exit(0)     # nobody has asked for a child
    gc.disable()                                                # nothing of what is imported is garbage
    for name in IMPORTED: importlib.import_module(name)
    from vidlab.data.text import piece_ids
    from vidlab.ssm import scan_path
    piece_ids('once'), scan_path()                              # CLIP's tokenizer is read, the scan chosen
    for f in [*weakref.finalize._registry]:
        if f.peek()[1].__name__ == '_del_library': f.atexit = False        # torch takes down its operators one by one
    gc.freeze()                                                 # and it stays shared with the children
    gc.enable()
    finish(serve(listener, lifeline))
