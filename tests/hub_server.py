"""A server on loopback that answers as the hubs do, as far as their clients ask for a snapshot.

The Hugging Face Hub: revision, tree and files of data sets and models, with ETag and commit. ModelScope: tree and
files. What was asked is kept. An HTTP proxy asks for whole addresses, which it answers as if they were its own.
"""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def as_json(self, value):
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        server, url = self.server, urlparse(self.path)
        if server.drops and "/resolve/" in url.path:
            self.close_connection = True
            return
        path, query = unquote(url.path), parse_qs(url.query)
        server.asked.append(path)
        files, repo = server.files, server.repo
        kind = "models" if path.startswith("/api/models/") else "datasets"
        hub, scope = f"/api/{kind}/{repo}", f"/api/v1/datasets/{repo}/repo"
        sha = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        if path.startswith(f"{hub}/tree/"):
            self.as_json([{"type": "file", "path": n, "size": len(d), "oid": sha[n][:40]} for n, d in files.items()])
        elif path in (hub, f"{hub}/revision/main", f"{hub}/revision/{COMMIT}"):
            siblings = [{"rfilename": name} for name in files]
            self.as_json({"id": repo, "sha": COMMIT, "private": False, "gated": False, "siblings": siblings})
        elif path.startswith((f"/datasets/{repo}/resolve/", f"/{repo}/resolve/")):
            name = path.split("/resolve/")[1].split("/", 1)[1]
            self.answer(200, files[name], {"ETag": f'"{sha[name][:40]}"', "X-Repo-Commit": COMMIT})
        elif path == f"{scope}/tree":
            entries = [
                {
                    "Path": n,
                    "Name": n.split("/")[-1],
                    "Type": "blob",
                    "Size": len(d),
                    "Sha256": sha[n],
                    "Revision": "r1",
                }
                for n, d in files.items()
            ]
            self.as_json({"Code": 200, "Success": True, "Data": {"Files": entries}})
        elif path == scope:
            self.answer(200, files[query["FilePath"][0]])
        else:
            self.answer(404, b'{"error": "Repository not found", "Code": 404, "Success": false}')


@contextmanager
def hub(repo, files, drops=False):
    """Serve `files`, a dictionary of names to bytes, as the data set `repo`; the address, and the paths asked for.

    If it `drops`, it lists the files and ends the connection when one is asked for.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.repo, server.files, server.asked, server.drops = repo, files, [], drops
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
