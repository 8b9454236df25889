"""A stand-in for the VESSL service on loopback: what the real `vessl` client asks of it, with faults on demand.

It keeps runs in memory. A run goes pending -> initializing -> running -> completed by the clock (`pace` seconds a
step), or fails where its command holds the word `fail-on-cluster`, and prints a line every `pace`/4 while it runs.
Endpoints and fields: shared/reference/vessl-contract.md.
"""
import json, re, threading, time
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import yaml

ORG, PROJECT = 'weighted-mtp', 'weighted-mtp'
CLUSTER = 'vessl-kr-a100-80g-sxm'
PRESETS = {'gpu-a100-80g-small': 1, 'gpu-a100-80g-medium': 2, 'gpu-a100-80g-large': 4}
SECRETS = ['MLFLOW_TRACKING_USERNAME', 'MLFLOW_TRACKING_PASSWORD', 'AWS_ACCESS_KEY_ID', 'AWS_SECRET_ACCESS_KEY',
           'HF_TOKEN']
VOLUMES = ('models', 'datasets', 'checkpoints', 'mlruns')
TOKEN = 'stand-in-access-token-1234'
# `lost`: carried out, no answer; `late`: carried out some time after the connection broke
FAULTS = ('401', '429', '500', '503', 'hang', 'reset', 'lost', 'late', 'empty', 'html')
RUN_KEYS = {'name', 'description', 'tags', 'resources', 'image', 'import', 'mount', 'export', 'run', 'env', 'ports',
            'interactive', 'service_account_name', 'termination_protection'}


class Service:
    "`Service()` starts; `.url` is the address, `.runs` what was created, `.requests` every (method, path, body) seen."
    def __init__(self, pace=.4, hang=60., secrets=SECRETS, fault=lambda method, path: None):
        self.pace, self.hang, self.secrets, self.fault = pace, hang, list(secrets), fault
        self.bucket = None # of its volumes: the fields of a federation, endpoint and keys of an S3 server
        self.runs, self.requests, self.headers, self.lock, self.delay = {}, [], [], threading.Lock(), 1.
        handler = type('Handler', (_Handler,), {'service': self})
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
        self.server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self): self.server.shutdown(); self.server.server_close()
    def __enter__(self): return self
    def __exit__(self, *_): self.close()

    def create(self, text):
        spec = yaml.safe_load(text)
        with self.lock:
            id = 369367000000 + len(self.runs) + 1 # twelve digits, as the real ones
            self.runs[id] = dict(id=id, spec=spec, yaml=text, created=time.time(), ended=None, stop=None)
        return id

    def status(self, run):
        "Status by the clock."
        age = (time.time() - run['created'])/self.pace
        if run['stop']: return 'stopping' if time.time() - run['stop'] < self.pace else 'terminated'
        if age < 1: return 'pending'
        if age < 2: return 'initializing'
        if age < 2 + run.get('length', 3): return 'running'
        return 'failed' if 'fail-on-cluster' in run['spec']['run'][-1]['command'] else 'completed'

    def logs(self, run):
        "What a run has printed so far: two lines share each time stamp, one of them says the same every time."
        start, out = run['created'] + 2*self.pace, []
        end = min(time.time(), start + run.get('length', 3)*self.pace, run['stop'] or 9e18)
        for i in range(int(max(0, end - start)/(self.pace/4))):
            for message in (f'step {i} of {run["spec"]["name"]}', 'same line'):
                out.append(dict(timestamp=start + i*self.pace/4, message=message))
        if self.status(run) == 'completed': out.append(dict(timestamp=end, message='100%|###|\\rsaved ✓ done'))
        return out

    def view(self, run):
        "A run as the service describes it."
        spec, status = run['spec'], self.status(run)
        description, cluster = spec.get('description', ''), dict(name=spec['resources']['cluster'])
        return dict(id=run['id'], status=status, status_reason='the command failed' if status == 'failed' else '',
                    message=description, create_dt=datetime.fromtimestamp(run['created'], timezone.utc).isoformat(),
                    tags=[dict(id=i, name=t) for i, t in enumerate(spec.get('tags') or [])],
                    run_spec=dict(title=spec['name'], description=description, type='batch', cluster=cluster))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def log_message(self, *_): pass

    def _send(self, data, status=200, text=None):
        body = (json.dumps(data) if text is None else text).encode()
        self.send_response(status)
        self.send_header('Content-Type', 'application/json' if text is None else 'text/html')
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, status, code, message): self._send(dict(code=code, message=message, fields=[]), status)

    def _break(self): # the connection ends without an answer
        self.close_connection = True
        self.connection.shutdown(2)

    def _handle(self, method):
        s, url = self.service, urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0)).decode()
        with s.lock: s.requests.append((method, self.path, body)); s.headers.append(dict(self.headers))
        fault = s.fault(method, url.path)
        if fault in ('401', '429', '500', '503'): return self._refuse(int(fault), 'Fault', f'stand-in fault {fault}')
        if fault == 'hang': time.sleep(s.hang); return self._break()
        if fault == 'reset': return self._break()
        if fault == 'empty': return self._send({})
        if fault == 'html': return self._send(None, text='<html>gateway</html>')
        if fault == 'late':
            threading.Timer(s.delay, lambda: self._route(method, url, body)).start()
            return self._break()
        status, data = self._route(method, url, body)
        if fault == 'lost': return self._break()
        self._send(data, status)

    def do_GET(self): self._handle('GET')
    def do_POST(self): self._handle('POST')

    def _route(self, method, url, body): # status, answer
        s, path, query = self.service, url.path, parse_qs(url.query)
        def error(status, code, message): return status, dict(code=code, message=message, fields=[])
        if self.headers.get('Authorization') != f'Token {TOKEN}': return error(401, 'Unauthorized', 'invalid token')
        if path == '/api/v1/accounts/me':
            return 200, dict(username='someone', email='someone@example.org', display_name='Someone')
        if path == '/api/v1/organizations': return 200, dict(organizations=[dict(name=ORG), dict(name='other')])
        m = re.match(r'/api/v1/organizations/([^/]+)(/.*)?$', path)
        if not m or m[1] not in (ORG, 'other'): return error(404, 'NotFound', 'no such organization')
        rest = m[2] or ''
        if rest == '': return 200, dict(name=m[1])
        if rest == '/projects': return 200, dict(results=[dict(name=PROJECT), dict(name='another')])
        if rest == '/clusters':
            return 200, dict(clusters=[dict(id=7, name=CLUSTER, available_gpus=['NVIDIA-A100-SXM4-80GB'])])
        if rest == '/clusters/7/resource_specs':
            return 200, dict(results=[dict(id=i, name=n, gpu_limit=g) for i, (n, g) in enumerate(PRESETS.items())])
        if rest == '/secrets': return 200, dict(secrets=[dict(credentials_name=n) for n in s.secrets])
        v = re.match(r'/storages/vessl-storage/volumes/(\w+)/federate$', rest)
        if v and v[1] in VOLUMES and s.bucket: return 200, dict(s.bucket, type='s3', path=v[1])
        p = re.match(rf'/projects/{PROJECT}(/.*)$', rest)
        if not p: return error(404, 'NotFound', 'no such project')
        return self._project(method, p[1], query, body)

    def _create(self, body):
        def refuse(message): return 400, dict(code='BadRequest', message=message, fields=[])
        text = json.loads(body)['yaml_spec']
        try: spec = yaml.safe_load(text)
        except Exception as e: return refuse(f'yaml: {e}')
        unknown, mounts = set(spec) - RUN_KEYS, (spec.get('mount') or {}).values()
        if unknown or not {'image', 'resources', 'run'} <= set(spec): return refuse(f'invalid spec: {sorted(unknown)}')
        if any(str(v).startswith('volume://vessl-storage') for v in mounts): return refuse('mount')
        return 200, dict(run_execution=dict(id=self.service.create(text)))

    def _project(self, method, path, query, body):
        s = self.service
        if path == '/run/spec/create_from_yaml' and method == 'POST': return self._create(body)
        if path == '/run_executions':
            with s.lock: runs = sorted(s.runs.values(), key=lambda r: -r['id'])
            offset, limit = int(query.get('offset', ['0'])[0]), int(query.get('limit', ['50'])[0])
            return 200, dict(results=[s.view(r) for r in runs][offset:offset + limit])
        m = re.match(r'/run_executions/(\d+)(/\w+)?$', path)
        run = m and s.runs.get(int(m[1]))
        if not run: return 404, dict(code='NotFound', message='no such run', fields=[])
        if m[2] is None: return 200, s.view(run)
        if m[2] == '/logs':
            start, limit = float(query.get('log_start', ['0'])[0]), int(query.get('log_limit', ['0'])[0])
            lines = [x for x in s.logs(run) if x['timestamp'] >= start]
            return 200, dict(logs=lines[-limit:] if limit else lines)
        if m[2] == '/terminate' and method == 'POST':
            run['stop'] = run['stop'] or time.time()
            return 200, dict(id=run['id'])
        return 404, dict(code='NotFound', message=path, fields=[])


if __name__ == '__main__': # for looking at by hand
    service = Service()
    print(f'VESSL_API_HOST={service.url} VESSL_ACCESS_TOKEN={TOKEN}', flush=True)
    threading.Event().wait()
