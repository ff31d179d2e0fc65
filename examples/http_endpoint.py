"""An HTTP endpoint over an export: `python examples/http_endpoint.py --export_dir D --port 8000`.

    curl localhost:8000/top_k -d '{"k": 3, "exclude_seen": true,
        "columns": {"uih_seq__video_id": [[5, 6]], "uih_seq__action_timestamp": [[10, 20]], ...}}'
    {"model_version": "...", "item_ids": [[9, 2, 7]], "scores": [[0.8, 0.7, 0.6]]}

One user a row of `columns`, which are the export's `user_inputs` (GET / lists them). It needs the
loader's packages alone. A sketch to start from: no authentication, no batching of requests.
"""

import argparse
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa

from hstu_jax.serving import artifact, retrieval

_MAX_BYTES = 10_000_000


class Handler(BaseHTTPRequestHandler):
    """Answers GET / and POST /top_k; `export` and `search` are set by `make_server`."""

    export: artifact.Artifact
    search: retrieval.Search

    def do_GET(self):
        manifest = self.export.manifest
        inputs = {each.name: each.dtype for each in manifest.user_inputs}
        self._answer(200, {"model_version": manifest.model_version, "user_inputs": inputs})

    def do_POST(self):
        if self.path != "/top_k":
            self._answer(404, {"error": f"{self.path}: unknown; POST to /top_k."})
            return
        try:
            self._answer(200, self._top_k())
        except (KeyError, TypeError, ValueError, NotImplementedError) as error:  # Arrow's too
            self._answer(400, {"error": str(error)})

    def _top_k(self):
        size = int(self.headers.get("Content-Length", 0))
        if size > _MAX_BYTES:
            raise ValueError(f"request of {size} bytes: must be {_MAX_BYTES} or less.")
        request = json.loads(self.rfile.read(size))
        rows = pa.table(request["columns"])
        seen = retrieval.seen_items(self.export, rows) if request.get("exclude_seen") else None
        users = self.export.embed_users(rows)
        found = self.search.search(users, k=request.get("k", 10), exclusions=seen)
        lists = list(zip(found.ids, found.scores, found.counts, strict=True))
        return {
            "model_version": self.export.manifest.model_version,
            "item_ids": [ids[:count].tolist() for ids, _, count in lists],
            "scores": [scores[:count].tolist() for _, scores, count in lists],
        }

    def _answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format, *arguments):
        """Quiet; put your request log here."""


def make_server(export: artifact.Artifact, *, index: str = "exact", port: int = 0):
    """A server over an export, ready for `serve_forever`; port 0 takes a free one."""
    search = retrieval.make_search(export, index=index, exclude_cold=False)
    handler = type("ExportHandler", (Handler,), {"export": export, "search": search})
    return ThreadingHTTPServer(("127.0.0.1", port), handler)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--export_dir", required=True)
    parser.add_argument("--index", choices=retrieval.INDEXES, default="exact")
    parser.add_argument("--port", type=int, default=8000)
    flags = parser.parse_args()
    server = make_server(artifact.load(flags.export_dir), index=flags.index, port=flags.port)
    print(f"listening on port {server.server_port}")
    server.serve_forever()
