"""A server of other software."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def other_server(**answers):
    """A server of other software: each path has a status and a JSON, or hangs."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            found = answers.get(self.path.rpartition("/")[2], (404, {}))
            if found == "hangs":
                ended.wait(20)
                return
            status, value = found
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(value).encode() if not isinstance(value, bytes) else value)

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def log_message(self, *_):
            pass

    ended = threading.Event()
    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{found.server_port}/v1"
    finally:
        ended.set()
        found.shutdown()
        found.server_close()
