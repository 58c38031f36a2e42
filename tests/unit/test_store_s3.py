"""Checkpoints in a bucket whose server fails at every request."""

import gc
import logging
import random
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
import s3fs

import snapshot.objects
from actors import saving
from actors.ring import Ring
from actors.saving import SaveSpec
from actors.vault import Vault
from resilient.core.saves import Saves
from resilient.restoring import fetch_stored
from snapshot.core.stripes import Group
from snapshot.files import Files, StorageError, open_files
from snapshot.store import checkpoints, newest
from snapshot.stored import Stored
from tests.buckets import Fault, Proxy, s3
from tests.saving import FORMER, STEP, check, check_one, former, points, save
from tests.shards import LARGE, state_of
from tests.unit.test_rank_snapshots import Training
from tests.unit.test_saving import InThread

BUCKET = "checkpoints"


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[int, Proxy]]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with s3() as both:
        yield both


@pytest.fixture
def proxy(server: tuple[int, Proxy], monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    port, proxy = server
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    direct = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")
    direct.create_bucket(Bucket=BUCKET)
    proxy.rest()
    yield proxy
    proxy.rest()
    empty(direct)
    direct.close()


def empty(direct: object) -> None:
    found = direct.list_objects_v2(Bucket=BUCKET).get("Contents", [])  # type: ignore[attr-defined]
    for each in found:
        direct.delete_object(Bucket=BUCKET, Key=each["Key"])  # type: ignore[attr-defined]


@pytest.fixture
def files(proxy: Proxy) -> Files:
    return open_files(f"s3://{BUCKET}/gpt")


@pytest.mark.parametrize("compression", [None, 1])
def test_what_was_saved_is_read(files: Files, compression: int | None) -> None:
    state = state_of(shapes=LARGE, world=3)
    state.save(files, compression)
    check_one(files, state)
    assert Stored.open(files, state.folder).verify() == []
    assert Stored.open(files, state.folder).mapped(0, 10) is None


@pytest.mark.parametrize(
    "fault", ["error", *(pytest.param(fault, marks=pytest.mark.long) for fault in ("cut request", "cut reply"))]
)
def test_whatever_fails_a_whole_checkpoint_is_left(files: Files, proxy: Proxy, fault: Fault) -> None:
    former(files)
    kept = FORMER[-1]

    def fail(point: int) -> bool:
        nonlocal kept
        proxy.fail(point, fault, lasting=point % 3 == 0)
        try:
            save(files, STEP + point, world=1)
        except StorageError as error:
            assert f"{BUCKET}/gpt" in str(error) and error.__cause__ is not None
        over = proxy.requests < point
        proxy.rest()
        kept = check_newest(files, kept)
        if point % 4 == 1:
            save(files, STEP + point, world=1)
            kept = check_newest(files, STEP + point)
        return over

    assert points(fail) > 15
    save(files, STEP + 100)
    assert [(each.key.step, each.complete) for each in checkpoints(files)][-1] == (STEP + 100, True)
    assert len(checkpoints(files)) == 2


def check_newest(files: Files, least_step: int) -> int:
    found = newest(files)
    assert found is not None and found.key.step >= least_step
    check_one(files, state_of(found.key.step))
    return found.key.step


def test_a_slow_bucket_is_only_slow(files: Files, proxy: Proxy) -> None:
    proxy.fail(1, "slow", lasting=True)
    save(files)
    assert check(files, STEP) == STEP


BLOCK = 5 << 20
DATA = random.Random(0).randbytes(BLOCK + 1_500_000)
PARTS = [DATA[at : at + 1_000_001] for at in range(0, len(DATA), 1_000_001)]


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot.objects, "BLOCK_BYTES", BLOCK)


@pytest.mark.usefixtures("blocks")
def test_a_large_object_is_uploaded_in_blocks(files: Files, proxy: Proxy) -> None:
    assert files.write("step/large.bin", PARTS) == len(DATA)
    assert proxy.requests >= 4
    assert files.read("step/large.bin") == DATA
    assert files.read("step/large.bin", 10, 20) == DATA[10:20]


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("fault", ["error", "cut request", "cut reply"])
@pytest.mark.parametrize("lasting", [False, True])
def test_a_large_object_is_whole_or_not_there(files: Files, proxy: Proxy, fault: Fault, lasting: bool) -> None:
    def fail(point: int) -> bool:
        proxy.fail(point, fault, lasting=lasting)
        failed = False
        try:
            files.write("step/large.bin", PARTS)
        except StorageError:
            failed = True
        gc.collect()  # a file that was forgotten completes its upload then
        over = proxy.requests < point
        proxy.rest()
        there = files.names("step") == ["large.bin"]
        assert there or failed
        if there:
            assert files.size("step/large.bin") == len(DATA)
            files.remove("step/large.bin")
        return over

    assert points(fail) > 4


@pytest.mark.usefixtures("blocks")
def test_whoever_gives_up_while_uploading_leaves_nothing(files: Files, proxy: Proxy) -> None:
    class Enough(Exception):
        pass

    def parts() -> Iterator[bytes]:
        yield from PARTS[:-1]
        raise Enough

    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{proxy.port}")
    before = client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
    files.write("step/large.bin", [b"former"])
    with pytest.raises(Enough):
        files.write("step/large.bin", parts())
    gc.collect()
    assert files.read("step/large.bin") == b"former"
    assert proxy.requests >= 6  # it had begun to upload
    assert client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", []) == before
    client.close()


def test_an_object_may_be_empty(files: Files) -> None:
    """As the file of a share without bytes is."""
    assert files.write("step/empty.bin", []) == 0
    assert files.size("step/empty.bin") == 0 and files.read("step/empty.bin") == b""
    assert files.names("step") == ["empty.bin"] and files.names() == ["step"]


def test_what_is_not_there_is_said(files: Files) -> None:
    assert files.names() == files.names("step") == []
    for ask in (files.size, files.read):
        with pytest.raises(FileNotFoundError):
            ask("step/manifest.json")
    files.remove("step/manifest.json")
    files.remove_folder("step")


def test_a_bucket_that_is_not_there_is_an_error(proxy: Proxy) -> None:
    with pytest.raises(StorageError, match="s3://nowhere/gpt"):
        save(open_files("s3://nowhere/gpt"))


def test_a_keepers_saver_writes_into_a_bucket(proxy: Proxy, files: Files, tmp_path: Path) -> None:
    """The whole way: a rank's slots, the keeper's process for it, the bucket, and a state that is read back."""
    training = Training(tmp_path / "memory", saves=Saves(every_steps=2))
    spec = SaveSpec(run="r", node="a", url=f"s3://{BUCKET}/gpt", keep=2, level=1, token="0123abcd")
    vault = Vault(run="r", attempt=1, node="a", folder=training.folder, secret="s", ip="127.0.0.1", save=spec)
    states = {}
    try:
        vault.ring(Ring(generation=1, group=Group(nodes=("a",), parity=0), shares={"a": (0,)}))
        training.ready()
        while training.snapshots._slots.lifecycle.kept is None:
            state = training.step()
            if state is not None:
                states[training.steps] = state.digest()
            training.snapshots.gate()
        assert vault.saving is not None
        vault.saving.wait_until_done()
        assert vault.saving.news.failures == 0, vault.saving.news
    finally:
        vault.close()
    found = newest(files)
    assert found is not None and fetch_stored(spec.url, found.folder).digest() == states[found.key.step]


@pytest.mark.parametrize("fault", ["slow down", "expired"])
def test_a_store_that_refuses_for_a_while_is_caught_up_with(
    proxy: Proxy, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    """Failures are counted, no request is made in a hurry, and the same checkpoint is written then."""
    pauses: list[float] = []
    whole = saving.pause_s

    def pause_s(tries: int, node: str) -> float:
        pauses.append(whole(tries, node))
        if len(pauses) == 4:
            proxy.rest()
        return 0.05

    monkeypatch.setattr(saving, "pause_s", pause_s)
    training = Training(tmp_path / "memory", saves=Saves(every_steps=2))
    keeper = InThread(training, SaveSpec(run="r", node="a", url=files.url, keep=2, level=1, token="0123abcd"))
    proxy.fail(1, fault, lasting=True)
    try:
        training.ready()
        while training.snapshots._slots.lifecycle.kept is None:
            training.step()
            training.snapshots.gate()
        kept = training.snapshots._slots.lifecycle.kept
        keeper.wait_until_done()
        news = keeper.news
        assert news.durable is not None and news.durable.step == kept.step, "the one that was refused"
        assert news.failures == 4 and pauses == sorted(pauses) and sum(pauses) > 20.0, (news, pauses)
    finally:
        keeper.close()
    assert newest(files, run="r") is not None
