"""python tests/tracker_server.py PORT: answers wandb and SwanLab just so far that they take it for their server.

Every answer holds the fields of all of them. To hang it is stopped (SIGSTOP), to be gone it is killed.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PROJECT = {
    "id": "1",
    "cuid": "1",
    "name": "p",
    "version": 1,
    "path": "/me/p",
    "group": {"username": "me"},
    "_count": {"experiments": 0},
    "entity": {"id": "1", "name": "me"},
}
ANSWER = {
    # SwanLab: the login, the project, the experiment
    **PROJECT,
    "sid": "1",
    "slug": "1",
    "expiredAt": "2999-01-01T00:00:00.000Z",
    "createdAt": "2026-01-01T00:00:00.000Z",
    "userInfo": {"username": "me"},
    # wandb's GraphQL
    "data": {
        "serverInfo": {"features": []},
        "viewer": {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}},
        "createRunFiles": {"runID": "1", "uploadHeaders": [], "files": []},
        "upsertBucket": {"bucket": {"id": "1", "name": "r", "displayName": "r", "project": PROJECT}, "inserted": True},
    },
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.dumps(ANSWER).encode()
        self.send_response(201 if self.path.endswith("/experiment") else 200)  # SwanLab's "created"
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_PUT = do_PATCH = do_GET


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
