#!/usr/bin/env bash
# huggingface_hub repeats a download whose body was cut, but ends a whole snapshot at the first 503 for a file.
#
# Of two failures that pass, only one is tried again. A body that is shorter than stated is requested again, several
# times. An answer of 503 to the same request raises HfHubHTTPError at once, although the request for the file's size and
# version, sent just before, is repeated after a 503. So a large snapshot fails at one busy moment of the server. Files
# that were finished are kept, and calling snapshot_download again goes on.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet huggingface_hub==2.4.0
HF_HOME="$folder/hf" HF_HUB_DISABLE_PROGRESS_BARS=1 "$folder/venv/bin/python" - <<'PYTHON'
import hashlib
import http.server
import json
import os
import pathlib
import threading

COMMIT, FILES = "a" * 40, {f"{n}.bin": bytes([n]) * 100_000 for n in range(3)}
planned: dict[tuple[str, str], list[str]] = {}
asked: list[str] = []


class Hub(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        name = path.removeprefix(f"/datasets/me/set/resolve/{COMMIT}/")
        status, headers, whole = 404, {}, b"{}"
        if path.startswith("/api/datasets/me/set/revision/"):
            status, whole = 200, json.dumps({"id": "me/set", "sha": COMMIT, "siblings": []}).encode()
        elif path == f"/api/datasets/me/set/tree/{COMMIT}":
            tree = [{"type": "file", "oid": "0", "size": len(data), "path": n} for n, data in FILES.items()]
            status, whole = 200, json.dumps(tree).encode()
        elif name in FILES:
            asked.append(f"{self.command} {name}")
            status, whole = 200, FILES[name]
            headers = {"ETag": f'"{hashlib.sha1(whole).hexdigest()}"', "X-Repo-Commit": COMMIT}
        pending = planned.get((self.command, name), [])
        fault = pending.pop(0) if pending else ""
        if fault == "503":
            status, headers, whole = 503, {}, b"{}"
        self.send_response(status)
        for key, value in {**headers, "Content-Type": "application/json", "Content-Length": str(len(whole))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(whole[: len(whole) // 2] if fault == "cut" else whole)
        self.close_connection = fault == "cut"

    do_GET = do_HEAD = answer

    def log_message(self, *args: object) -> None:
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_address[1]}"

import huggingface_hub

print(f"huggingface_hub {huggingface_hub.__version__}")


def download(where: str) -> str:
    try:
        huggingface_hub.snapshot_download("me/set", repo_type="dataset", cache_dir=where, max_workers=1)
    except huggingface_hub.errors.HfHubHTTPError as error:
        return str(error).splitlines()[0]
    return "all files"


home = os.environ["HF_HOME"]
planned[("GET", "1.bin")] = ["cut", "cut", "cut"]
cut = download(f"{home}/cut")
print(f"a body cut three times: {cut}, GET {asked.count('GET 1.bin')} times")
asked.clear()
planned[("HEAD", "1.bin")] = ["503"]
head = download(f"{home}/head")
print(f"one 503 for the size: {head}, HEAD {asked.count('HEAD 1.bin')} times")
asked.clear()
planned[("GET", "1.bin")] = ["503"]
get = download(f"{home}/get")
print(f"one 503 for the file: {get}, GET {asked.count('GET 1.bin')} times")
kept = sorted(path.name for path in pathlib.Path(f"{home}/get").rglob("*.bin"))
again = download(f"{home}/get")
print(f"kept by then: {kept}; the same call again: {again}")
assert cut == head == again == "all files"
assert "503" in get, "a 503 for a file is tried again now"
PYTHON
