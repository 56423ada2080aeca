"""A dataset on a web server is read like a local one, through a cache that stays within its bounds."""

import functools
import http.server
import multiprocessing
import os
import pickle
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import toy_rlds

from openvla_lightning.data.oxe import describe
from openvla_lightning.data.source.rlds import RLDS
from openvla_lightning.data.source.rlds.shards import Shards

CONTEXT = multiprocessing.get_context("spawn")


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; counts what is fetched; sends only half of a shard, or waits in its middle, so many times."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        self.fetched: Counter[str] = Counter()
        self.cut = self.hang = 0
        self.lists = True
        self.half_sent, self.go_on = threading.Event(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.SimpleHTTPRequestHandler):
    server: Server

    def log_message(self, *args: object) -> None:
        pass

    def list_directory(self, path: str) -> None:
        if self.server.lists:
            return super().list_directory(path)
        self.send_error(403)
        return None

    def copyfile(self, source, outputfile) -> None:
        if "tfrecord" in self.path:
            self.server.fetched[Path(self.path).name] += 1
            content = source.read()
            outputfile.write(content[: len(content) // 2])
            if self.server.cut:
                self.server.cut -= 1
                self.close_connection = True
                return
            if self.server.hang:
                self.server.hang -= 1
                self.server.half_sent.set()
                self.server.go_on.wait(30)
            outputfile.write(content[len(content) // 2 :])
        else:
            super().copyfile(source, outputfile)


@pytest.fixture
def server(toy_root: Path, tmp_path: Path) -> Iterator[Server]:
    shutil.copytree(toy_root, tmp_path / "served", ignore=shutil.ignore_patterns(".openvla_lightning"))
    server = Server(tmp_path / "served")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.go_on.set()
    server.shutdown()
    server.server_close()


def remote(server: Server, cache: Path, gigabytes: float = 1.0, **options) -> RLDS:
    spec = describe("toy", toy_rlds.SPEC)
    return RLDS(server.url, "toy", spec, cache_dir=cache, cache_gb=gigabytes, **options)


def shards(server: Server, cache: Path, gigabytes: float = 1.0) -> Shards:
    return Shards(server.url, "toy", cache, gigabytes)


def stored(cache: Path) -> list[Path]:
    return [*cache.glob("*/shards/*"), *cache.glob("*/partial/*")]


def fetch(source: Shards, name: str) -> None:
    with source.held(name) as path:
        assert path.stat().st_size == source.sizes[name]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_step_is_right_through_a_cache_that_holds_one_shard(
    server: Server, toy_root: Path, tmp_path: Path, workers: int
) -> None:
    cache = tmp_path / "cache"
    largest = max(shards(server, cache).sizes.values())
    source = remote(server, cache, largest * 1.5 / 1e9, workers=workers)
    local = RLDS(toy_root, "toy", describe("toy", toy_rlds.SPEC))
    assert source.missing() is None
    np.testing.assert_array_equal(source.index.action, local.index.action)
    np.testing.assert_array_equal(source.index.sizes, local.index.sizes)
    assert source.statistics.to_dict() == local.statistics.to_dict()
    for step in np.random.default_rng(0).permutation(source.index.num_steps)[:40].tolist():
        for role in ("primary", "wrist", "secondary"):
            assert source.encoded(role, step) == local.encoded(role, step)
    # two workers may have held two of them at once
    assert sum(path.stat().st_size for path in stored(cache)) <= largest * 1.5
    assert max(server.fetched.values()) > 1  # it did have to let go


def test_what_is_cached_is_not_fetched_again(server: Server, tmp_path: Path) -> None:
    for source in (remote(server, tmp_path / "cache"), remote(server, tmp_path / "cache")):
        for step in range(0, source.index.num_steps, 7):
            pickle.loads(pickle.dumps(source)).encoded("primary", step)
    assert set(server.fetched.values()) == {1}


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_worker_processes_read_through_a_source_that_was_used_before(
    server: Server, tmp_path: Path, start: str
) -> None:
    source = remote(server, tmp_path / "cache", 6e-5)
    steps = range(0, source.index.num_steps, 5)
    here = [source.encoded("primary", step) for step in steps]
    with multiprocessing.get_context(start).Pool(2) as pool:
        assert pool.map_async(functools.partial(source.encoded, "primary"), steps).get(60) == here


def test_a_shard_that_is_read_stays_while_others_come(server: Server, tmp_path: Path) -> None:
    source = shards(server, tmp_path / "cache", 1e-9)
    one, two = sorted(source.sizes)[:2]
    with source.held(one) as path:
        fetch(source, two)
        assert path.exists()
    fetch(source, sorted(source.sizes)[2])
    assert not path.exists()


def test_the_longest_unused_shard_goes_first(server: Server, tmp_path: Path) -> None:
    names = sorted(shards(server, tmp_path / "cache").sizes)[:3]
    sizes = shards(server, tmp_path / "cache").sizes
    source = shards(server, tmp_path / "cache", (sum(sizes[name] for name in names) - 1) / 1e9)
    for name in (names[0], names[1], names[0], names[2]):
        fetch(source, name)
        time.sleep(0.02)
    left = {path.name for path in stored(tmp_path / "cache")}
    assert names[0] in left
    assert names[1] not in left


def test_a_shard_that_two_processes_want_is_fetched_once(server: Server, tmp_path: Path) -> None:
    source = shards(server, tmp_path / "cache")
    name = min(source.sizes)
    server.hang = 1
    processes = [CONTEXT.Process(target=fetch, args=(source, name)) for _ in range(2)]
    for process in processes:
        process.start()
    assert server.half_sent.wait(30)
    time.sleep(0.5)
    server.go_on.set()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert server.fetched[name] == 1


def test_a_download_cut_short_is_tried_again(server: Server, tmp_path: Path) -> None:
    source = shards(server, tmp_path / "cache")
    server.cut = 1
    fetch(source, min(source.sizes))
    assert server.fetched[min(source.sizes)] == 2


def test_a_download_that_is_always_cut_short_is_an_error_and_leaves_nothing(server: Server, tmp_path: Path) -> None:
    source = shards(server, tmp_path / "cache")
    server.cut = 100
    with pytest.raises(OSError, match=f"{min(source.sizes)} cannot be fetched"), source.held(min(source.sizes)):
        pass
    assert not stored(tmp_path / "cache")


def test_a_file_that_changed_in_the_store_is_an_error(server: Server, tmp_path: Path) -> None:
    source = shards(server, tmp_path / "cache")
    name = min(source.sizes)
    with (tmp_path / "served" / "toy" / "1.0.0" / name).open("ab") as file:
        file.write(b"more")
    with pytest.raises(OSError, match="bytes arrived"), source.held(name):
        pass


def test_a_process_killed_while_downloading_blocks_nobody(server: Server, tmp_path: Path) -> None:
    source = shards(server, tmp_path / "cache", 1e-9)
    one, two = sorted(source.sizes)[:2]
    server.hang = 1
    process = CONTEXT.Process(target=fetch, args=(source, one))
    process.start()
    assert server.half_sent.wait(30)
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    assert [path.parent.name for path in stored(tmp_path / "cache")] == ["partial"]
    fetch(source, two)
    assert [path.name for path in stored(tmp_path / "cache")] == [two]  # what was left half done is gone
    fetch(source, one)


def test_a_server_that_cannot_list(server: Server, tmp_path: Path) -> None:
    server.lists = False
    assert "where a store cannot list its folders" in remote(server, tmp_path / "cache").missing()
    (tmp_path / "served" / "toy" / "1.0.0").rename(tmp_path / "served" / "plain")
    shutil.rmtree(tmp_path / "served" / "toy")
    (tmp_path / "served" / "plain").rename(tmp_path / "served" / "toy")
    source = remote(server, tmp_path / "cache")
    assert source.missing() is None
    assert source.encoded("primary", 3)


def test_the_newest_version_is_taken(server: Server, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "served" / "toy" / "1.0.0", tmp_path / "served" / "toy" / "0.9.0")
    shutil.copytree(tmp_path / "served" / "toy" / "1.0.0", tmp_path / "served" / "toy" / "0.10.0")
    assert shards(server, tmp_path / "cache").url == f"{server.url}/toy/1.0.0"
    (tmp_path / "served" / "toy" / "1.0.0" / "dataset_info.json").unlink()
    assert shards(server, tmp_path / "cache").url == f"{server.url}/toy/0.10.0"


def test_a_file_url_is_cached_too(toy_root: Path, tmp_path: Path) -> None:
    source = RLDS(f"file://{toy_root}", "toy", describe("toy", toy_rlds.SPEC), cache_dir=tmp_path)
    assert source.encoded("primary", 0)
    assert stored(tmp_path)
    assert tmp_path in source.index.folder.parents


def test_what_is_wrong_is_said(server: Server, tmp_path: Path) -> None:
    def message(root: str, name: str = "toy") -> str:
        return RLDS(root, name, describe("toy", toy_rlds.SPEC), cache_dir=tmp_path / "cache").missing() or ""

    assert f"no {server.url}/other/<version>/dataset_info.json" in message(server.url, "other")
    assert "Protocol not known: nowhere" in message("nowhere://bucket")
    server.shutdown()
    server.server_close()
    assert "cannot be read" in message(server.url)
    with pytest.raises(ValueError, match="cache_gb=0"):
        Shards("gs://bucket", "toy", cache_gb=0)


@pytest.mark.parametrize(("url", "module", "extra"), [("gs://bucket", "gcsfs", "gcs"), ("s3://bucket", "s3fs", "s3")])
def test_an_extra_that_is_not_installed_is_named(
    url: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    assert f"pip install 'openvla-lightning[{extra}]'" in (Shards(url, "toy").missing() or "")
