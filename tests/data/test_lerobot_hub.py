"""A dataset of the hub, from a server on this machine that speaks the hub's protocol."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import toy_lerobot as toy

COMMIT = "0123456789abcdef0123456789abcdef01234567"
READ = """
import sys
import toy_lerobot as toy
from openvla_lightning.data.oxe.registry import describe
from openvla_lightning.data.source.lerobot import LeRobot
described = describe("mine", {"format": "lerobot", "hub": sys.argv[2], "cameras": {"primary": toy.FRONT}})
source = LeRobot(sys.argv[1], "mine", described)
assert source.missing() is None
source.prepare()
print(source.index.num_steps, *toy.seen(source.pixels("primary", 7)))
"""


class Hub:
    """Repositories of datasets: `owner/name` -> folder. `asked` holds the paths of files that were sent."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, list[str]()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                path = self.path.partition("?")[0]
                if path.startswith("/api/datasets/lab/arm/tree/"):
                    files = [f for f in sorted(hub.folder.rglob("*")) if f.is_file()]
                    self.send(json.dumps([self.entry(file) for file in files]).encode(), body)
                elif path.startswith("/api/datasets/lab/arm"):
                    facts = {"id": "lab/arm", "sha": COMMIT, "siblings": [], "private": False, "tags": []}
                    self.send(json.dumps(facts).encode(), body)
                elif path.startswith("/datasets/lab/arm/resolve/"):
                    name = path.split("/", 6)[6]
                    if body:
                        hub.asked.append(name)
                    content = (hub.folder / name).read_bytes()
                    etag = hashlib.sha1(content).hexdigest()
                    self.send(content, body, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'})
                else:
                    self.send(b'{"error": "Repository not found"}', body, {"X-Error-Code": "RepoNotFound"}, 404)

            def entry(self, file: Path) -> dict:
                oid = hashlib.sha1(file.read_bytes()).hexdigest()
                name = file.relative_to(hub.folder).as_posix()
                return {"type": "file", "path": name, "size": file.stat().st_size, "oid": oid}

            def send(self, content: bytes, body: bool, headers: dict | None = None, code: int = 200) -> None:
                self.send_response(code)
                for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                if body:
                    self.wfile.write(content)

            def log_message(self, *what: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    toy.write(tmp_path / "hub" / "arm")
    (tmp_path / "hub" / "arm" / "README.md").write_text("an arm")
    found = Hub(tmp_path / "hub" / "arm")
    yield found
    found.server.shutdown()


def read(hub: Hub, tmp_path: Path, name: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    environment |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_HUB_DISABLE_XET": "1", **settings}
    command = [sys.executable, "-c", READ, str(tmp_path / "data"), name]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_a_dataset_of_the_hub_is_downloaded_once_and_only_what_is_described(hub: Hub, tmp_path: Path) -> None:
    first = read(hub, tmp_path, "lab/arm")
    assert first.returncode == 0, first.stderr
    assert first.stdout.split() == [str(sum(toy.LENGTHS)), "1", "2", "0"]
    assert any(name.startswith(f"videos/{toy.FRONT}/") for name in hub.asked)
    assert not any(toy.WRIST in name for name in hub.asked if name.startswith("videos/"))
    assert "README.md" not in hub.asked

    asked = len(hub.asked)
    again = read(hub, tmp_path, f"lab/arm@{COMMIT}")
    assert again.returncode == 0, again.stderr
    assert len(hub.asked) == asked
    offline = read(hub, tmp_path, "lab/arm", HF_HUB_OFFLINE="1")
    assert offline.stdout == first.stdout


def test_a_dataset_that_the_hub_does_not_have_is_named(hub: Hub, tmp_path: Path) -> None:
    found = read(hub, tmp_path, "lab/leg")
    assert found.returncode != 0
    assert "lab/leg" in found.stderr
