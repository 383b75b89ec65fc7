"""A server that streams events as llama.cpp does, a token each 20 ms; it prints its port first."""

import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        wanted = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["n_predict"]
        self.send_response(200)
        self.end_headers()
        for number in range(1, wanted + 1):
            time.sleep(0.02)
            event = {"content": "a", "tokens": [5], "tokens_predicted": number, "stop": number == wanted}
            self.wfile.write(b"data: " + json.dumps({**event, "stop_type": "limit"}).encode() + b"\n\n")
            self.wfile.flush()

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
