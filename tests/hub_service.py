"""A stand-in for the Hugging Face hub on loopback: what the real client asks it, to list a repository and fetch it."""
import hashlib, json, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

SHA = 'a'*40 # the only revision
LARGE = ('.parquet', '.pth', '.safetensors') # files that the hub keeps in LFS

class Hub:
    "`Hub({'openai/gsm8k': {'main/test.parquet': b'…'}})`; `.url`, and `.requests`: each (method, path, Range)."
    def __init__(self, repos, token=None, gated=()):
        self.repos, self.token, self.gated, self.requests = repos, token, gated, []
        self.spoil = set() # paths whose content is sent wrong
        self.cut = {} # path -> bytes after which the connection breaks, once
        handler = type('Handler', (_Handler,), {'hub': self})
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
        self.server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
    def close(self): self.server.shutdown(); self.server.server_close()
    def __enter__(self): return self
    def __exit__(self, *_): self.close()

def _entry(name, data): # of the listing
    blob = hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()
    entry = dict(rfilename=name, size=len(data), blobId=blob)
    if not name.endswith(LARGE): return entry
    return entry | dict(lfs=dict(size=len(data), sha256=hashlib.sha256(data).hexdigest(), pointerSize=130))

class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def log_message(self, *_): pass
    def do_HEAD(self): self.do_GET()
    def reply(self, code, body, **headers):
        self.send_response(code)
        for k, v in headers.items(): self.send_header(k.replace('_', '-'), v)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if self.command == 'GET': self.wfile.write(body)

    def do_GET(self):
        path, hub = unquote(urlsplit(self.path).path), self.hub
        hub.requests.append((self.command, path, self.headers.get('Range')))
        parts = path.strip('/').split('/')
        listing = parts[0] == 'api'
        if listing: parts = parts[2:]
        elif parts[0] == 'datasets': parts = parts[1:]
        repo, file = '/'.join(parts[:2]), '/'.join(parts[4:])
        if repo not in hub.repos: return self.reply(404, b'{}', X_Error_Code='RepoNotFound')
        if repo in hub.gated and self.headers.get('Authorization') != f'Bearer {hub.token}':
            return self.reply(403, b'{}', X_Error_Code='GatedRepo')
        return self.send_listing(repo) if listing else self.send_file(file, hub.repos[repo][file])

    def send_listing(self, repo):
        siblings = [_entry(name, data) for name, data in self.hub.repos[repo].items()]
        info = dict(id=repo, sha=SHA, siblings=siblings, private=False, disabled=False, gated=False, downloads=0,
                    likes=0, tags=[])
        self.reply(200, json.dumps(info).encode(), Content_Type='application/json')

    def send_file(self, file, body):
        if file in self.hub.spoil: body = b'x' + body[1:]
        start = int((self.headers.get('Range') or 'bytes=0-').split('=')[1].split('-')[0])
        self.send_response(206 if start else 200)
        self.send_header('Content-Length', str(len(body) - start))
        if start: self.send_header('Content-Range', f'bytes {start}-{len(body)-1}/{len(body)}')
        self.send_header('ETag', '"tag"')
        self.send_header('X-Repo-Commit', SHA)
        self.end_headers()
        end = self.hub.cut.pop(file, None)
        self.wfile.write(body[start:end])
        if end is not None: # the connection breaks in the middle
            self.wfile.flush()
            self.connection.shutdown(2)
            self.close_connection = True
