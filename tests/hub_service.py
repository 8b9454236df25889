"""A stand-in for the Hugging Face hub on loopback: what the real client asks of it to list a repository and fetch its files."""
import hashlib, json, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

SHA = 'a'*40 # the only revision

class Hub:
    "`Hub({'openai/gsm8k': {'main/test.parquet': b'…'}})`; `.url` is the address, `.requests` every (method, path, Range) seen."
    def __init__(self, repos, token=None, gated=()):
        self.repos, self.token, self.gated, self.requests, self.spoil, self.cut = repos, token, gated, [], set(), {} # cut: path -> bytes after which the connection breaks, once
        handler = type('Handler', (_Handler,), {'hub': self})
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
        self.server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
    def close(self): self.server.shutdown(); self.server.server_close()
    def __enter__(self): return self
    def __exit__(self, *_): self.close()

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
        if parts[0] == 'api': repo, file = '/'.join(parts[2:4]), None
        else:
            if parts[0] == 'datasets': parts = parts[1:]
            repo, file = '/'.join(parts[:2]), '/'.join(parts[4:])
        if repo not in hub.repos: return self.reply(404, b'{}', X_Error_Code='RepoNotFound')
        if repo in hub.gated and self.headers.get('Authorization') != f'Bearer {hub.token}': return self.reply(403, b'{}', X_Error_Code='GatedRepo')
        files = hub.repos[repo]
        if file is None:
            def entry(n, b): return dict(rfilename=n, size=len(b), blobId=hashlib.sha1(b'blob %d\0' % len(b) + b).hexdigest(), **(dict(lfs=dict(size=len(b), sha256=hashlib.sha256(b).hexdigest(), pointerSize=130)) if n.endswith(('.parquet', '.pth', '.safetensors')) else {}))
            return self.reply(200, json.dumps(dict(id=repo, sha=SHA, siblings=[entry(n, b) for n, b in files.items()], private=False, disabled=False, gated=False, downloads=0, likes=0, tags=[])).encode(), Content_Type='application/json')
        body = files[file]
        if file in hub.spoil: body = b'x' + body[1:]
        start = int((self.headers.get('Range') or 'bytes=0-').split('=')[1].split('-')[0])
        self.send_response(206 if start else 200)
        self.send_header('Content-Length', str(len(body) - start))
        if start: self.send_header('Content-Range', f'bytes {start}-{len(body)-1}/{len(body)}')
        self.send_header('ETag', '"tag"'); self.send_header('X-Repo-Commit', SHA)
        self.end_headers()
        if (end := hub.cut.pop(file, None)) is not None: # breaks in the middle
            self.wfile.write(body[start:end]); self.wfile.flush(); self.connection.shutdown(2); self.close_connection = True
            return
        self.wfile.write(body[start:])
